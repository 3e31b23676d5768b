# METADATA
# title: What may a tenant use of the sidecar itself?
# description: Asked once for each tenant and release, in the background, and not for a call.
# schemas:
#   - input: schema.service_class_input
package pdp.sidecar

import data.pdp.subject

# METADATA
# title: The tenant's service class
# description: |
#   Handed on as it stands in the tenant's data. A tenant without one, or with one that
#   is not well-formed, has the class that the sidecar's configuration gives to all.
# entrypoint: true
service_class := subject.tenant.service
