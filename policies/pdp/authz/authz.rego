# METADATA
# title: May this call be made?
# description: |
#   Everything is read through the tenant that the verified token names. The first
#   rule of the ladder that applies gives the reason.
package pdp.authz

tenant := data.tenants[input.subject.properties.tenant]

tool := data.tools[input.action.name]

arguments := input.action.properties.arguments

# METADATA
# title: The decision on one tool call
# description: |
#   allow, reason_code and, for a call that is allowed, the scopes it runs under,
#   the terms of its permit and what is charged for it.
# entrypoint: true
decision := {
	"allow": true,
	"reason_code": "ok",
	"scopes": tool.scopes,
	"permit": object.union({"binds": ["tool", "arguments"]}, object.get(tool, "permit", {})),
	"charge": object.get(tool, "charge", []),
} if {
	reason_code == "ok"
} else := {"allow": false, "reason_code": reason_code}

# The ladder. Each rung stands on the ones above it.
default reason_code := "policy_denied"

reason_code := "tenant_unknown" if {
	not tenant
} else := "tenant_suspended" if {
	not tenant.status == "active"
} else := "tool_not_allowed" if {
	not tool_allowed
} else := "role_not_allowed" if {
	not role_allowed
} else := "scope_missing" if {
	not scopes_held
} else := "argument_not_allowed" if {
	not arguments_allowed
} else := "ok"

# The tool exists, and is on the tenant's allowlist.
tool_allowed if {
	tool
	input.action.name in tenant.allowlist
}

# One of the actor's roles, as this tenant defines it, may use the tool.
role_allowed if {
	some role in input.subject.properties.roles
	input.action.name in tenant.roles[role].tools
}

# Token and tenant both hold every scope that the tool needs.
scopes_held if {
	every scope in tool.scopes {
		scope in input.subject.properties.scopes
		scope in tenant.scopes
	}
}

# Nothing is missing, nothing is unknown, and each value is within its bounds.
arguments_allowed if {
	is_object(arguments)
	every name, rule in tool.arguments {
		argument_present(name, rule)
	}
	every name, value in arguments {
		argument_within(value, tool.arguments[name])
		argument_within(value, object.get(tenant_rules, name, {}))
	}
}

# A tenant may tighten the rules of a tool; it can not widen them.
tenant_rules := object.get(tenant, ["tools", input.action.name, "arguments"], {})

argument_present(name, _) if name in object.keys(arguments)

argument_present(_, rule) if object.get(rule, "required", true) == false

# Every bound that a rule names must hold.
argument_within(value, rule) if {
	every bound, limit in rule {
		within(bound, value, limit)
	}
}

within("required", _, _)

within("description", _, _)

within("type", value, limit) if type_name(value) == limit

within("enum", value, limit) if value in limit

within("max_length", value, limit) if count(value) <= limit

within("pattern", value, limit) if regex.match(limit, value)

within("minimum", value, limit) if {
	is_number(value)
	value >= limit
}

within("maximum", value, limit) if {
	is_number(value)
	value <= limit
}

within("domains", value, limit) if {
	parts := split(value, "@")
	count(parts) == 2
	lower(parts[1]) in limit
}
