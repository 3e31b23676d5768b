package pdp.subject_test

import data.pdp.subject

of(tenant, roles) := {"subject": {"properties": {"tenant": tenant, "roles": roles}}}

test_roles_are_those_the_tenant_defines if {
	roles := subject.roles with input as of("tenant_acme", ["viewer", "nobody"])
	roles == {{"tools": ["orders.read"]}}
}

test_a_suspended_tenant_is_known_and_not_active if {
	subject.tenant with input as of("tenant_initech", [])
	not subject.active with input as of("tenant_initech", [])
}

test_nothing_is_known_of_an_unknown_tenant if {
	every tenant in ["tenant_nobody", "", null, ["tenant_acme"], {"id": "tenant_acme"}] {
		not subject.tenant with input as of(tenant, ["viewer"])
		not subject.active with input as of(tenant, ["viewer"])
		roles := subject.roles with input as of(tenant, ["viewer"])
		roles == set()
	}
}

test_a_tenant_whose_data_is_no_object_is_unknown if {
	every slip in [true, "active", ["active"]] {
		not subject.tenant with input as of("tenant_slip", []) with data.tenants.tenant_slip as slip
	}
}
