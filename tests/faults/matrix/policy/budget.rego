# One limit that no clock ends, so that what it counts is the sum of all calls.
package pdp.budget

limits := [{
	"id": "calls",
	"budget": "tools",
	"unit": "calls",
	"window": "lifetime",
	"limit": 1000000,
	"scope": "tenant",
}]

decision := {"allow": true, "reason_code": "ok"}
