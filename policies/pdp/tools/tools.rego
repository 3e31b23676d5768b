# METADATA
# title: Which tools may the caller see?
# description: |
#   For showing them to a model. It allows nothing: each call is decided when it is made,
#   by the same ladder.
# schemas:
#   - input: schema.tools_input
package pdp.tools

import data.pdp.authz
import data.pdp.subject

# METADATA
# title: The tools of the caller's tenant, and how far the caller comes with each
# description: |
#   Every tool on the tenant's allowlist, and whether it is callable by this caller, if the
#   arguments are allowed; else why not. Nothing is said of tools that are not on it.
# scope: document
# entrypoint: true
visible := sort({tool |
	some name in subject.tenant.allowlist
	is_object(data.tools[name])

	# So that what is listed and what is decided are worked out by the same rules.
	# regal ignore:with-outside-test-context
	code := standing(authz.reason_code) with input.action.name as name
	tool := {"name": name, "callable": code == "ok", "reason_code": code}
})

# What a call without arguments comes to, where only they can be what is wrong with it.
standing(reason_code) := object.get({"argument_not_allowed": "ok"}, reason_code, reason_code)
