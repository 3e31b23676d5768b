# Wide limits to count by, and a narrow one for each session, which all its agents reach.
package pdp.budget

limits := [
	{"id": "tools", "budget": "tools", "unit": "calls", "window": "lifetime", "limit": 1000000000, "scope": "tenant"},
	{"id": "tokens", "budget": "llm", "unit": "tokens_out", "window": "lifetime", "limit": 1000000000, "scope": "tenant"},
	{"id": "session", "budget": "session", "unit": "calls", "window": "lifetime", "limit": 40, "scope": "session"},
]

decision := {"allow": true, "reason_code": "ok"}
