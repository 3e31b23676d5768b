# METADATA
# title: What may be spent?
# description: |
#   Which limits apply to the subject, and which budgets it may charge by itself.
#   Everything is read through the tenant that the verified token names.
package pdp.budget

tenant := data.tenants[input.subject.properties.tenant]

# METADATA
# title: The limits that apply to the subject
# description: An empty list lets nothing be charged, as a charge without a limit is refused.
# entrypoint: true
limits := tenant.limits if {
	tenant.status == "active"
} else := []

# METADATA
# title: May the subject charge these budgets?
# description: For ChargeBudget and ReserveBudget; the cost of a tool is the tool's own matter.
# entrypoint: true
decision := {"allow": reason_code == "ok", "reason_code": reason_code}

default reason_code := "policy_denied"

reason_code := "tenant_unknown" if {
	not tenant
} else := "tenant_suspended" if {
	not tenant.status == "active"
} else := "budget_not_allowed" if {
	not budgets_allowed
} else := "ok"

# Every budget is one that a role of the subject, as this tenant defines it, may charge.
budgets_allowed if {
	count(input.charges) > 0
	every charge in input.charges {
		charge.budget in chargeable
	}
}

chargeable contains budget if {
	some role in input.subject.properties.roles
	some budget in tenant.roles[role].budgets
}
