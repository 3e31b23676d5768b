# METADATA
# title: Whose call it is, and what that tenant says of the actor
# description: |
#   The one place that reads data.tenants. Every other rule takes the tenant from
#   here, so that no rule can look at another tenant's data. The tenant is the one
#   that the verified token names; nothing else in a request names one.
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
