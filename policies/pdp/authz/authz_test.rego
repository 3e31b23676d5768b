package pdp.authz_test

import data.pdp.authz

# Whatever workloads the data lists, these are about the actor.
answer := decision if {
	# regal ignore:with-outside-test-context
	decision := authz.decision with data.workloads as {}
}

call(tenant, roles, scopes, tool, arguments) := {
	"subject": {
		"id": "alice",
		"type": "user",
		"properties": {"tenant": tenant, "roles": roles, "scopes": scopes},
	},
	"action": {"name": tool, "properties": {"arguments": arguments}},
}

update := call(
	"tenant_acme", ["support_agent"], ["orders:write", "mail:send"],
	"orders.update", {"order_id": "918", "status": "shipped"},
)

mail := call(
	"tenant_acme", ["support_agent"], ["mail:send"],
	"mail.send", {"to": "kim@customers.example", "subject": "Your order", "body": "It is on its way."},
)

read := call("tenant_acme", ["viewer"], ["orders:read"], "orders.read", {"order_id": "918"})

test_a_support_agent_may_update_an_order if {
	decision := answer with input as update
	decision == {
		"allow": true,
		"reason_code": "ok",
		"scopes": ["orders:write"],
		"permit": {"binds": ["tool", "arguments"], "ttl_seconds": 60},
		"charge": [{"budget": "tools", "unit": "calls", "amount": 1}],
	}
}

test_mail_is_charged_to_two_budgets if {
	decision := answer with input as mail
	decision.allow
	decision.charge == [
		{"budget": "tools", "unit": "calls", "amount": 1},
		{"budget": "spend", "unit": "usd_micros", "amount": 500},
	]
}

test_reading_is_free if {
	decision := answer with input as read
	decision.allow
	decision.charge == []
}

test_no_input_is_denied if {
	decision := answer with input as {}
	decision == {"allow": false, "reason_code": "tenant_unknown"}
}

# What a row breaks, the rows above it break too: each reason comes before those below it.
test_reasons_have_a_fixed_order if {
	every row in [
		["tenant_unknown", "tenant_nobody", ["nobody"], [], "orders.drop", {}],
		["tenant_suspended", "tenant_initech", ["nobody"], [], "orders.drop", {}],
		["tool_not_allowed", "tenant_acme", ["nobody"], [], "orders.drop", {}],
		["role_not_allowed", "tenant_acme", ["nobody"], [], "orders.update", {}],
		["scope_missing", "tenant_acme", ["support_agent"], [], "orders.update", {}],
		["argument_not_allowed", "tenant_acme", ["support_agent"], ["orders:write"], "orders.update", {}],
	] {
		[reason_code, tenant, roles, scopes, tool, arguments] := row
		decision := answer with input as call(tenant, roles, scopes, tool, arguments)
		decision == {"allow": false, "reason_code": reason_code}
	}
}

test_a_tenant_in_the_arguments_changes_nothing if {
	every name in ["tenant", "tenant_id"] {
		arguments := {"order_id": "918", "status": "shipped", name: "tenant_globex"}
		decision := answer with input as update with input.action.properties.arguments as arguments
		decision == {"allow": false, "reason_code": "argument_not_allowed"}
	}
}

test_a_role_means_what_the_tenant_says if {
	decision := answer with input as read
		with data.tenants.tenant_acme.roles as {"viewer": {"tools": ["mail.send"]}}
	decision.reason_code == "role_not_allowed"
}

test_a_scope_that_only_the_token_has_is_missing if {
	decision := answer with input as read
		with data.tenants.tenant_acme.scopes as ["mail:send"]
	decision.reason_code == "scope_missing"
}

test_a_tool_that_is_not_on_the_allowlist_is_not_allowed if {
	decision := answer with input as read
		with data.tenants.tenant_acme.allowlist as ["orders.update"]
	decision == {"allow": false, "reason_code": "tool_not_allowed"}
}

test_an_allowlisted_tool_that_is_not_defined_is_not_allowed if {
	decision := answer with input as call("tenant_acme", ["viewer"], [], "orders.drop", {})
		with data.tenants.tenant_acme.allowlist as ["orders.drop"]
	decision.reason_code == "tool_not_allowed"
}

test_a_slip_in_the_scopes_of_a_tool_refuses if {
	every tool in [
		{"arguments": {"order_id": {"type": "string"}}},
		{"arguments": {"order_id": {"type": "string"}}, "scopes": null},
		{"arguments": {"order_id": {"type": "string"}}, "scopes": "orders:read"},
	] {
		decision := answer with input as read with data.tools as {"orders.read": tool}
		decision == {"allow": false, "reason_code": "scope_missing"}
	}
}

test_mail_goes_only_to_the_domains_of_the_tenant if {
	every address in ["kim@globex.example", "kim@customers.example.evil.example", "kim@evil.example"] {
		decision := answer with input as mail with input.action.properties.arguments.to as address
		decision.reason_code == "argument_not_allowed"
	}
}

test_mail_goes_nowhere_for_a_tenant_without_domains if {
	decision := answer with input as mail with data.tenants.tenant_acme.tools as null
	decision.reason_code == "argument_not_allowed"
}

test_a_subject_holds_no_further_header if {
	every subject in ["Hello\r\nBcc: eve@evil.example", "Hello\n", "", "\u0000"] {
		decision := answer with input as mail with input.action.properties.arguments.subject as subject
		decision.reason_code == "argument_not_allowed"
	}
}

test_a_slip_in_the_permit_of_a_tool_refuses if {
	tool := object.union(data.tools["orders.read"], {"permit": "60"})
	decision := answer with input as read with data.tools as {"orders.read": tool}
	decision == {"allow": false, "reason_code": "policy_denied"}
}

runtimes := {
	"spiffe://example.org/reader": {"tools": ["orders.read"]},
	"spiffe://example.org/acme": {"tools": ["orders.read"], "tenants": ["tenant_acme"]},
	"spiffe://example.org/globex": {"tools": ["orders.read"], "tenants": ["tenant_globex"]},
}

by(workload) := object.union(read, {"subject": {"properties": {"workload": workload}}})

test_a_workload_that_is_listed_may_use_its_tools if {
	every workload in ["spiffe://example.org/reader", "spiffe://example.org/acme"] {
		decision := authz.decision with input as by(workload) with data.workloads as runtimes
		decision.allow
	}
}

test_a_workload_that_is_not_listed_may_use_none if {
	every question in [read, by("spiffe://example.org/stranger"), by("")] {
		decision := authz.decision with input as question with data.workloads as runtimes
		decision == {"allow": false, "reason_code": "workload_not_allowed"}
	}
}

test_a_workload_asks_only_for_its_tenants if {
	decision := authz.decision with input as by("spiffe://example.org/globex") with data.workloads as runtimes
	decision == {"allow": false, "reason_code": "workload_not_allowed"}
}

test_an_actor_may_do_no_more_than_the_workload if {
	question := object.union(update, {"subject": {"properties": {"workload": "spiffe://example.org/reader"}}})
	decision := authz.decision with input as question with data.workloads as runtimes
	decision == {"allow": false, "reason_code": "workload_not_allowed"}
}

test_a_workload_may_do_no_more_than_the_actor if {
	question := object.union(by("spiffe://example.org/reader"), {"subject": {"properties": {"roles": []}}})
	decision := authz.decision with input as question with data.workloads as runtimes
	decision == {"allow": false, "reason_code": "role_not_allowed"}
}

test_a_tenant_may_demand_workloads_of_its_own if {
	every row in [
		[read, "workload_not_allowed"],
		[by("spiffe://example.org/stranger"), "workload_not_allowed"],
		[by("spiffe://example.org/reader"), "ok"],
	] {
		[question, reason_code] := row
		decision := answer with input as question
			with data.tenants.tenant_acme.workloads as ["spiffe://example.org/reader"]
		decision.reason_code == reason_code
	}
}

test_a_slip_in_what_is_said_of_workloads_refuses if {
	every slip in [
		null, true, [], "spiffe://example.org/reader",
		{"spiffe://example.org/reader": null},
		{"spiffe://example.org/reader": {}},
		{"spiffe://example.org/reader": {"tools": "orders.read"}},
		{"spiffe://example.org/reader": {"tools": ["orders.read"], "tenants": null}},
		{"spiffe://example.org/reader": {"tools": ["orders.read"], "tenants": "tenant_acme"}},
	] {
		decision := authz.decision with input as by("spiffe://example.org/reader") with data.workloads as slip
		decision == {"allow": false, "reason_code": "workload_not_allowed"}
	}
	every slip in [null, false, true, {}, [], "spiffe://example.org/reader"] {
		decision := authz.decision with input as by("spiffe://example.org/reader")
			with data.tenants.tenant_acme.workloads as slip
		decision == {"allow": false, "reason_code": "workload_not_allowed"}
	}
}
