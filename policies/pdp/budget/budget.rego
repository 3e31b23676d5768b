# METADATA
# title: What may be spent?
# description: Which limits apply to the subject, and which budgets it may charge by itself.
# schemas:
#   - input: schema.input
package pdp.budget

import data.pdp.prices
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
# title: May the subject spend this, or take it back?
# description: |
#   For what is spent directly; the cost of a tool is the tool's own matter. Where usage
#   stands in place of charges, the answer says what it costs, and at which prices.
# entrypoint: true
decision := object.union({"allow": reason_code == "ok", "reason_code": reason_code}, priced)

default priced := {}

priced := {"charges": prices.charges, "price_version": prices.version} if {
	input.usage
	reason_code == "ok"
}

# The ladder. Each rung stands on the ones above it.
default reason_code := "budget_not_allowed"

# What was used is used: it is priced, whatever has become of the tenant and its roles.
reason_code := settled if {
	input.action.name == "budget.settle"
} else := "tenant_unknown" if {
	not subject.tenant
} else := "tenant_suspended" if {
	not subject.active
} else := "workload_not_allowed" if {
	not subject.workload_admitted
} else := "model_unknown" if {
	input.usage
	not prices.charges
} else := "ok" if {
	granted
}

default settled := "model_unknown"

settled := "ok" if prices.charges

# Every unit of every budget is one that a role of the actor may charge.
granted if {
	input.action.name in {"budget.charge", "budget.reserve"}
	count(charges) > 0
	every charge in charges {
		some role in subject.roles
		charge.unit in role.budgets[charge.budget]
	}
}

# Only a role that says so: an agent that could take back what it spent had no limit.
granted if {
	input.action.name == "budget.refund"
	some role in subject.roles
	role.refunds == true
}

charges := prices.charges if {
	input.usage
} else := input.charges
