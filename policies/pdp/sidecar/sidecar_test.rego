package pdp.sidecar_test

import data.pdp.sidecar

of(tenant) := {"subject": {"properties": {"tenant": tenant}}}

test_a_tenant_has_the_class_in_its_data if {
	service_class := sidecar.service_class with input as of("tenant_acme")
	service_class == data.tenants.tenant_acme.service
}

test_a_tenant_without_one_is_left_to_the_configuration if {
	every tenant in ["tenant_globex", "tenant_nobody"] {
		not sidecar.service_class with input as of(tenant)
	}
}
