# METADATA
# title: Rules for the arguments of a tool
# description: |
#   A rule is an object of keywords, and a value must keep every one of them. A
#   keyword that is not known here, or whose bound is of the wrong type, is kept by
#   nothing, so that a slip in the data refuses calls instead of widening them.
package pdp.arguments

# Whether a call's arguments are within the rules. The tool's rules say which
# arguments exist at all; the tenant's come on top, so that they can only tighten.
allowed(arguments, tool_rules, tenant_rules) if {
	is_object(arguments)
	is_object(tool_rules)
	is_object(tenant_rules)
	needed(tool_rules, tenant_rules) - object.keys(arguments) == set()
	every name, value in arguments {
		valid(value, tool_rules[name], object.get(tenant_rules, name, {}))
	}
}

# A tool needs every argument that it does not call optional; a tenant may add to them.
needed(tool_rules, tenant_rules) := of_tool | of_tenant if {
	of_tool := {name | some name, rule in tool_rules; not rule.required == false}
	of_tenant := {name | some name, rule in tenant_rules; rule.required != false}
}

valid(value, tool_rule, tenant_rule) if {
	tool_rule.type
	satisfies(value, tool_rule)
	satisfies(value, tenant_rule)
	not tenant_rule_missing(tool_rule, tenant_rule)
}

# Where only the tenant can say what is right, its silence is a no.
tenant_rule_missing(tool_rule, tenant_rule) if {
	tool_rule.tenant_rule_required
	tenant_rule == {}
}

satisfies(value, rule) if {
	is_object(rule)
	every keyword, bound in rule {
		keeps(keyword, bound, value)
	}
}

# The keywords.
keeps("description", bound, _) if is_string(bound)

keeps("required", bound, _) if is_boolean(bound)

keeps("tenant_rule_required", bound, _) if is_boolean(bound)

keeps("type", "string", value) if is_string(value)

keeps("type", "boolean", value) if is_boolean(value)

keeps("type", "number", value) if is_number(value)

keeps("type", "integer", value) if {
	is_number(value)
	floor(value) == value
}

keeps("enum", bound, value) if {
	is_array(bound)
	value in bound
}

keeps("max_length", bound, value) if {
	is_number(bound)
	is_string(value)
	count(value) <= bound
}

# A pattern is matched against the whole value.
keeps("pattern", bound, value) if {
	is_string(bound)
	is_string(value)
	regex.match(concat("", ["^(?:", bound, ")$"]), value)
}

keeps("minimum", bound, value) if {
	is_number(bound)
	is_number(value)
	value >= bound
}

keeps("maximum", bound, value) if {
	is_number(bound)
	is_number(value)
	value <= bound
}

# The domain of a mail address is one of these, written in lower case.
keeps("domains", bound, value) if {
	is_array(bound)
	is_string(value)
	[_, domain] = split(value, "@")
	lower(domain) in bound
}
