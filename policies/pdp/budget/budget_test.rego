package pdp.budget_test

import data.pdp.budget

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
		decision := budget.decision with input as spend("tenant_acme", ["agent"], [tokens, dollars])
			with input.action.name as operation
		decision == {"allow": true, "reason_code": "ok"}
	}
}

test_every_charge_must_be_granted if {
	decision := budget.decision with input as spend("tenant_globex", ["agent"], [tokens, dollars])
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
		decision := budget.decision with input as request
		decision == {"allow": false, "reason_code": "budget_not_allowed"}
	}
}

test_unknown_and_suspended_tenants_charge_nothing if {
	every tenant, reason_code in {"tenant_nobody": "tenant_unknown", "tenant_initech": "tenant_suspended"} {
		decision := budget.decision with input as spend(tenant, ["agent"], [tokens])
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
