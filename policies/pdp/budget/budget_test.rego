package pdp.budget_test

import data.pdp.budget

# Whatever workloads the data lists, these are about the actor.
answer := decision if {
	# regal ignore:with-outside-test-context
	decision := budget.decision with data.workloads as {}
}

spend(tenant, roles, charges) := {
	"subject": {
		"id": "planner",
		"type": "user",
		"properties": {"tenant": tenant, "roles": roles, "scopes": []},
	},
	"action": {"name": "budget.charge"},
	"tool": "",
	"charges": charges,
}

tokens := {"budget": "llm", "unit": "tokens_in", "amount": 1200}

dollars := {"budget": "llm", "unit": "usd_micros", "amount": 900}

test_an_agent_may_charge_its_tokens if {
	every operation in ["budget.charge", "budget.reserve"] {
		decision := answer with input as spend("tenant_acme", ["agent"], [tokens, dollars])
			with input.action.name as operation
		decision == {"allow": true, "reason_code": "ok"}
	}
}

test_every_charge_must_be_granted if {
	decision := answer with input as spend("tenant_globex", ["agent"], [tokens, dollars])
	decision == {"allow": false, "reason_code": "budget_not_allowed"}
}

test_what_is_not_granted_is_refused if {
	every request in [
		spend("tenant_acme", [], [tokens]),
		spend("tenant_acme", ["viewer"], [tokens]),
		spend("tenant_acme", ["agent"], []),
		spend("tenant_acme", ["agent"], [{"budget": "spend", "unit": "usd_micros", "amount": 1}]),
		spend("tenant_acme", ["agent"], [{"budget": "llm", "unit": "seconds", "amount": 1}]),
		object.union(spend("tenant_acme", ["agent"], [tokens]), {"action": {"name": "orders.read"}}),
		object.remove(spend("tenant_acme", ["agent"], [tokens]), ["charges"]),
	] {
		decision := answer with input as request
		decision == {"allow": false, "reason_code": "budget_not_allowed"}
	}
}

test_unknown_and_suspended_tenants_charge_nothing if {
	every tenant, reason_code in {"tenant_nobody": "tenant_unknown", "tenant_initech": "tenant_suspended"} {
		decision := answer with input as spend(tenant, ["agent"], [tokens])
		decision == {"allow": false, "reason_code": reason_code}
		limits := budget.limits with input as spend(tenant, ["agent"], [tokens])
		limits == []
	}
}

test_limits_are_those_of_the_tenant_in_its_order if {
	acme := budget.limits with input as spend("tenant_acme", ["agent"], [tokens])
	acme == data.tenants.tenant_acme.limits
	globex := budget.limits with input as spend("tenant_globex", ["agent"], [tokens])
	globex == data.tenants.tenant_globex.limits
}

test_a_tenant_without_limits_has_none if {
	limits := budget.limits with input as spend("tenant_new", [], [])
		with data.tenants.tenant_new as {"status": "active"}
	limits == []
}

usage(operation, tenant, roles, model, quantities) := object.union(
	spend(tenant, roles, []),
	{"action": {"name": operation}, "usage": {"model": model, "quantities": quantities}},
)

test_usage_is_priced if {
	every operation in ["budget.charge", "budget.reserve"] {
		request := usage(operation, "tenant_acme", ["agent"], "gpt-x", {"tokens_in": 1200, "tokens_out": 4000})
		decision := answer with input as request
		decision == {
			"allow": true,
			"reason_code": "ok",
			"charges": [
				{"budget": "llm", "unit": "tokens_in", "amount": 1200},
				{"budget": "llm", "unit": "tokens_out", "amount": 4000},
				{"budget": "llm", "unit": "usd_micros", "amount": 43000},
			],
			"price_version": data.prices.current,
		}
	}
}

test_a_model_without_a_price_is_not_free if {
	every request in [
		usage("budget.charge", "tenant_acme", ["agent"], "gpt-9", {"tokens_in": 1}),
		usage("budget.reserve", "tenant_acme", ["agent"], "gpt-x", {"images": 1}),
		usage("budget.settle", "tenant_acme", ["agent"], "gpt-9", {"tokens_in": 1}),
		object.union(spend("tenant_acme", ["agent"], [tokens]), {"action": {"name": "budget.settle"}}),
	] {
		decision := answer with input as request
		decision == {"allow": false, "reason_code": "model_unknown"}
	}
}

test_every_charge_of_usage_must_be_granted if {
	every tenant, roles in {"tenant_acme": ["viewer"], "tenant_globex": ["agent"]} {
		request := usage("budget.reserve", tenant, roles, "gpt-x", {"tokens_in": 1200})
		decision := answer with input as request
		decision == {"allow": false, "reason_code": "budget_not_allowed"}
	}
}

test_charges_beside_usage_do_not_stand_in_for_its_price if {
	request := usage("budget.charge", "tenant_globex", ["agent"], "gpt-x", {"tokens_in": 1200})
	decision := answer with input as object.union(request, {"charges": [tokens]})
	decision == {"allow": false, "reason_code": "budget_not_allowed"}
}

test_what_was_used_is_priced_whatever_became_of_the_tenant if {
	every tenant in ["tenant_acme", "tenant_initech", "tenant_nobody"] {
		decision := answer with input as usage("budget.settle", tenant, [], "gpt-x", {"tokens_out": 5})
		decision.allow
		decision.charges == [
			{"budget": "llm", "unit": "tokens_out", "amount": 5},
			{"budget": "llm", "unit": "usd_micros", "amount": 50},
		]
	}
}

refund(tenant, roles, charges) := object.union(
	spend(tenant, roles, charges),
	{"action": {"name": "budget.refund"}},
)

test_a_role_that_says_so_may_refund if {
	every charges in [[], [tokens]] {
		decision := answer with input as refund("tenant_acme", ["billing"], charges)
		decision == {"allow": true, "reason_code": "ok"}
	}
}

# The attack: spend up to the limit, take it back, spend again.
test_an_agent_can_not_refund_itself if {
	every request in [
		refund("tenant_acme", ["agent"], [tokens]),
		refund("tenant_acme", ["agent"], []),
		refund("tenant_acme", ["refunds", "true"], []),
		refund("tenant_globex", ["agent", "billing"], []),
		usage("budget.refund", "tenant_acme", ["agent"], "gpt-x", {"tokens_in": 1}),
	] {
		decision := answer with input as request
		decision == {"allow": false, "reason_code": "budget_not_allowed"}
	}
}

test_only_a_plain_yes_lets_a_role_refund if {
	every slip in ["true", 1, null, false, {}, ["llm"]] {
		decision := answer with input as refund("tenant_acme", ["agent"], [])
			with data.tenants.tenant_acme.roles as {"agent": {"refunds": slip}}
		decision == {"allow": false, "reason_code": "budget_not_allowed"}
	}
}

test_a_suspended_tenant_refunds_nothing if {
	decision := answer with input as refund("tenant_initech", ["viewer"], [])
		with data.tenants.tenant_initech.roles as {"viewer": {"refunds": true}}
	decision == {"allow": false, "reason_code": "tenant_suspended"}
}

test_a_workload_that_is_not_listed_spends_nothing if {
	every operation in ["budget.charge", "budget.reserve", "budget.refund"] {
		decision := budget.decision with input as {
			"subject": {"properties": {"tenant": "tenant_acme", "roles": ["agent", "billing"]}},
			"action": {"name": operation},
			"charges": [{"budget": "llm", "unit": "tokens_in", "amount": 1}],
		}
			with data.workloads as {"spiffe://example.org/reader": {"tools": []}}
		decision == {"allow": false, "reason_code": "workload_not_allowed"}
	}
}
