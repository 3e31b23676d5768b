# What agents of the kill loops may do: everything, at a price.
package pdp.authz

decision := {
	"allow": true,
	"reason_code": "ok",
	"charge": [{"budget": "tools", "unit": "calls", "amount": 2}],
} if {
	input.action.name == "orders.update"
}

# For any arguments, several times.
decision := {
	"allow": true,
	"reason_code": "ok",
	"charge": [{"budget": "tools", "unit": "calls", "amount": 1}],
	"permit": {"binds": ["tool"], "max_uses": 4},
} if {
	input.action.name == "orders.search"
}

decision := {"allow": true, "reason_code": "ok"} if input.action.name == "orders.read"
