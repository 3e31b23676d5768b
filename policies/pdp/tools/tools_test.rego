package pdp.tools_test

import data.pdp.tools

caller(tenant, roles, scopes) := {
	"subject": {
		"id": "alice",
		"type": "user",
		"properties": {"tenant": tenant, "roles": roles, "scopes": scopes},
	},
	"action": {"name": "tools.list"},
}

support := caller("tenant_acme", ["support_agent"], ["orders:read", "orders:write"])

codes(listed) := {tool.name: tool.reason_code | some tool in listed}

test_each_tool_of_the_tenant_says_how_far_the_caller_comes if {
	listed := tools.visible with input as support with data.workloads as {}
	code := codes(listed)
	code["orders.read"] == "ok"
	code["mail.send"] == "scope_missing"
	code["reports.generate"] == "role_not_allowed"
}

test_only_what_is_ok_is_callable if {
	listed := tools.visible with input as support with data.workloads as {}
	callable := {tool.name | some tool in listed; tool.callable}
	callable == {tool.name | some tool in listed; tool.reason_code == "ok"}
	"orders.read" in callable
}

test_a_workload_that_is_not_listed_sees_why if {
	listed := tools.visible with input as support with data.workloads as {"spiffe://example.org/other": {}}
	codes(listed)["orders.read"] == "workload_not_allowed"
}

test_a_role_that_may_use_nothing_sees_why if {
	listed := tools.visible with input as caller("tenant_acme", ["nobody"], [])
	{tool.reason_code | some tool in listed} == {"role_not_allowed"}
}

test_tools_off_the_allowlist_are_not_mentioned if {
	listed := tools.visible with input as support
		with data.tenants.tenant_acme.allowlist as ["orders.read"]
	{tool.name | some tool in listed} == {"orders.read"}
}

test_an_allowlisted_tool_that_is_not_defined_is_not_mentioned if {
	listed := tools.visible with input as support
		with data.tenants.tenant_acme.allowlist as ["orders.read", "orders.drop"]
	{tool.name | some tool in listed} == {"orders.read"}
}

test_a_suspended_tenant_calls_nothing if {
	listed := tools.visible with input as caller("tenant_initech", ["support_agent"], ["orders:read"])
	every tool in listed {
		tool.reason_code == "tenant_suspended"
	}
}

test_nobody_sees_nothing if {
	tools.visible == [] with input as caller("tenant_nobody", ["support_agent"], ["orders:read"])
	tools.visible == [] with input as {}
}
