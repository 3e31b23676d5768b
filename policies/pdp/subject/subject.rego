# METADATA
# title: Whose call it is, and what that tenant says of the actor
# description: |
#   The one place that reads data.tenants. Every other rule takes the tenant from
#   here, so that no rule can look at another tenant's data. The tenant is the one
#   that the verified token names; nothing else in a request names one. What is known
#   of the workload that asks stands here too.
# schemas:
#   - input: schema.input
package pdp.subject

# The tenant's own data; undefined for a tenant that is not known.
tenant := found if {
	found := data.tenants[input.subject.properties.tenant]
	is_object(found)
}

# True only for a tenant that is known and not suspended.
default active := false

active if tenant.status == "active"

# What the actor's roles mean at this tenant. A role that it does not define counts for nothing.
roles contains role if {
	some name in input.subject.properties.roles
	role := tenant.roles[name]
}

# What data.workloads says of the workload that asks; undefined for one that it does not list.
workload := data.workloads[input.subject.properties.workload]

# Whether the workload that asks may ask for this tenant at all. None has to show who it is
# where neither data.workloads nor the tenant lists any.
default workload_admitted := false

workload_admitted if {
	listed_for_tenant
	listed_by_tenant
}

listed_for_tenant if data.workloads == {}

listed_for_tenant if {
	is_object(workload)
	name := input.subject.properties.tenant
	name in object.get(workload, "tenants", [name])
}

listed_by_tenant if not "workloads" in object.keys(tenant)

listed_by_tenant if input.subject.properties.workload in tenant.workloads

# Whether the workload that asks may use a tool, for whatever tenant.
workload_may_use(_) if data.workloads == {}

workload_may_use(tool) if tool in workload.tools
