# METADATA
# title: May this call be made?
# description: |
#   One decision with one reason: the first rule of the ladder that applies. A call
#   is allowed only when every question on the ladder has been answered with yes.
# schemas:
#   - input: schema.authz_input
package pdp.authz

import data.pdp.arguments
import data.pdp.subject

tenant := subject.tenant

tool := data.tools[input.action.name]

# METADATA
# title: The decision on one tool call
# description: |
#   allow, reason_code and, for a call that is allowed, the scopes it runs under,
#   the terms of its permit and what is charged for it.
# scope: document
# entrypoint: true
default decision := {"allow": false, "reason_code": "policy_denied"}

decision := {
	"allow": true,
	"reason_code": "ok",
	"scopes": tool.scopes,
	"permit": object.union({"binds": ["tool", "arguments"]}, object.get(tool, "permit", {})),
	"charge": object.get(tool, "charge", []),
} if {
	reason_code == "ok"
}

decision := {"allow": false, "reason_code": reason_code} if reason_code != "ok"

# The ladder. Each rung stands on the ones above it.
default reason_code := "argument_not_allowed"

reason_code := "tenant_unknown" if {
	not tenant
} else := "tenant_suspended" if {
	not subject.active
} else := "tool_not_allowed" if {
	not tool_allowed
} else := "role_not_allowed" if {
	not role_allowed
} else := "workload_not_allowed" if {
	not workload_allowed
} else := "scope_missing" if {
	not scopes_held
} else := "ok" if {
	arguments_allowed
}

# The tool exists, and is on the tenant's allowlist.
tool_allowed if {
	is_object(tool)
	input.action.name in tenant.allowlist
}

# One of the actor's roles, as this tenant defines it, may use the tool.
role_allowed if {
	some role in subject.roles
	input.action.name in role.tools
}

# The workload that asks may ask for this tenant, and use the tool.
workload_allowed if {
	subject.workload_admitted
	subject.workload_may_use(input.action.name)
}

# Token and tenant both hold every scope that the tool needs.
scopes_held if {
	every scope in tool.scopes {
		scope in input.subject.properties.scopes
		scope in tenant.scopes
	}
}

# Nothing is missing, nothing is unknown, and each value keeps the tool's rules
# and those that the tenant adds.
arguments_allowed if {
	tenant_rules := object.get(tenant, ["tools", input.action.name, "arguments"], {})
	arguments.allowed(input.action.properties.arguments, tool.arguments, tenant_rules)
}
