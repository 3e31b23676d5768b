# Every way in which a policy can answer, by the name of the tool.
package pdp.authz

decision := {
	"allow": true,
	"reason_code": "ok",
	"scopes": ["orders:write"],
	"charge": [{"budget": "tools", "unit": "calls", "amount": 2}],
	"permit": {"ttl_seconds": 30},
} if {
	input.action.name == "orders.update"
}

decision := {"allow": true, "reason_code": "ok"} if input.action.name == "orders.read"

decision := {
	"allow": true,
	"reason_code": "ok",
	"charge": [{"budget": "ten", "unit": "calls", "amount": 6}],
} if {
	input.action.name == "tools.costly"
}

# For any arguments, several times.
decision := {
	"allow": true,
	"reason_code": "ok",
	"charge": [{"budget": "tools", "unit": "calls", "amount": 2}],
	"permit": {"binds": ["tool"], "max_uses": 5},
} if {
	input.action.name == "orders.search"
}

# For so many calls that all of them never fit.
decision := {
	"allow": true,
	"reason_code": "ok",
	"charge": [{"budget": "ten", "unit": "calls", "amount": 6}],
	"permit": {"binds": ["tool"], "max_uses": 2},
} if {
	input.action.name == "tools.rare"
}

decision := {
	"allow": true,
	"reason_code": "ok",
	"charge": [{"budget": "nowhere", "unit": "calls", "amount": 1}],
} if {
	input.action.name == "tools.unlimited"
}

decision := {
	"allow": true,
	"reason_code": "ok",
	"approval": {"roles": ["manager"]},
} if {
	input.action.name == "tools.approved"
}

decision := {"allow": false, "reason_code": "closed_on_sundays"} if input.action.name == "tools.closed"

decision := {"allow": "yes", "reason_code": "ok"} if input.action.name == "tools.nonboolean"

decision := {"allow": true, "reason_code": "ok", "scopes": long_scopes} if input.action.name == "tools.verbose"

long_scopes := [concat("", [format_int(n, 10), long_text]) | some n in numbers.range(1, 60)]

long_text := concat("", ["x" | some _ in numbers.range(1, 240)])

# Two values at once: a conflict, which traps.
decision := {"allow": true, "reason_code": "ok", "scopes": [scope]} if {
	input.action.name == "tools.conflict"
	some scope in ["one", "two"]
}

# Runs for minutes.
decision := {"allow": true, "reason_code": "ok"} if {
	input.action.name == "tools.runaway"
	many := numbers.range(1, 3000)
	some a in many
	some b in many
	some c in many
	a < b
	b < c
	c < a
}

# As much as a permit may carry.
decision := {"allow": true, "reason_code": "ok", "scopes": full_scopes} if {
	startswith(input.action.name, "tools.xxx")
}

full_scopes := [concat("", [format_int(n, 10), concat("", ["x" | some _ in numbers.range(1, 30)])]) | some n in numbers.range(10, 73)]
