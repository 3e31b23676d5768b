# Every call is allowed, and costs one.
package pdp.authz

decision := {
	"allow": true,
	"reason_code": "ok",
	"charge": [{"budget": "tools", "unit": "calls", "amount": 1}],
}
