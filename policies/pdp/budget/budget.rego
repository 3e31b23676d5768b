# METADATA
# title: What may be spent?
# description: Which limits apply to the subject, and which budgets it may charge by itself.
# schemas:
#   - input: schema.input
package pdp.budget

import data.pdp.subject

# METADATA
# title: The limits that apply to the subject, in the order in which they are checked
# description: |
#   Handed on as they stand in the tenant's data. One that is not well-formed makes
#   the answer invalid, so that this tenant can charge nothing: to leave it out would
#   be to lift it. An empty list lets nothing be charged either.
# scope: document
# entrypoint: true
default limits := []

limits := subject.tenant.limits if subject.active

# METADATA
# title: May the subject charge these budgets?
# description: For ChargeBudget and ReserveBudget; the cost of a tool is the tool's own matter.
# entrypoint: true
decision := {"allow": reason_code == "ok", "reason_code": reason_code}

# The ladder. Each rung stands on the ones above it.
default reason_code := "budget_not_allowed"

reason_code := "tenant_unknown" if {
	not subject.tenant
} else := "tenant_suspended" if {
	not subject.active
} else := "ok" if {
	charges_granted
}

# Every unit of every budget is one that a role of the actor may charge.
charges_granted if {
	input.action.name in {"budget.charge", "budget.reserve"}
	count(input.charges) > 0
	every charge in input.charges {
		some role in subject.roles
		charge.unit in role.budgets[charge.budget]
	}
}
