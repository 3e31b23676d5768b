# Agents may charge; what is charged decides how the policy answers.
package pdp.budget

limits := [
	{"id": "tools-per-day", "budget": "tools", "unit": "calls", "window": "day", "limit": 1000000, "scope": "tenant"},
	{"id": "tokens", "budget": "llm", "unit": "tokens_out", "window": "lifetime", "limit": 1000000000, "scope": "tenant"},
	{"id": "ten-a-day", "budget": "ten", "unit": "calls", "window": "day", "limit": 10, "scope": "tenant"},
	{"id": "fifty", "budget": "fifty", "unit": "calls", "window": "lifetime", "limit": 50, "scope": "tenant"},
]

asks(budget) if {
	some charge in input.charges
	charge.budget == budget
}

ordinary if {
	not asks("undefined")
	not asks("nonboolean")
	not asks("impostor")
}

decision := {"allow": true, "reason_code": "ok"} if {
	ordinary
	"agent" in input.subject.properties.roles
}

decision := {"allow": false, "reason_code": "budget_not_allowed"} if {
	ordinary
	not "agent" in input.subject.properties.roles
}

decision := {"allow": 1, "reason_code": "ok"} if asks("nonboolean")

# A policy that borrows the product's own code for something else.
decision := {"allow": false, "reason_code": "internal"} if asks("impostor")
