package pdp.arguments_test

import data.pdp.arguments

rules := {
	"id": {"type": "string", "description": "Which one.", "pattern": "[0-9]{1,3}"},
	"size": {"type": "integer", "minimum": 1, "maximum": 10, "required": false},
	"ratio": {"type": "number", "required": false},
	"urgent": {"type": "boolean", "required": false},
	"colour": {"type": "string", "enum": ["red", "blue"], "max_length": 4, "required": false},
	"to": {"type": "string", "tenant_rule_required": true, "required": false},
}

tenant_rules := {"to": {"domains": ["customers.example"]}}

test_well_formed_arguments_are_allowed if {
	every call in [
		{"id": "7"},
		{"id": "7", "size": 10, "ratio": 0.5, "urgent": false, "colour": "blue"},
		{"id": "7", "size": 1.0},
		{"id": "7", "to": "kim@customers.example"},
		{"id": "7", "to": "kim@Customers.Example"},
	] {
		arguments.allowed(call, rules, tenant_rules)
	}
}

test_arguments_outside_the_rules_are_refused if {
	every call in [
		{},
		{"id": 7},
		{"id": null},
		{"id": ""},
		{"id": "1234"},
		{"id": "7\n"},
		{"id": "x7"},
		{"id": ["7"]},
		{"id": "7", "unknown": 1},
		{"id": "7", "size": 0},
		{"id": "7", "size": 11},
		{"id": "7", "size": 1.5},
		{"id": "7", "size": "1"},
		{"id": "7", "size": true},
		{"id": "7", "ratio": "0.5"},
		{"id": "7", "urgent": 0},
		{"id": "7", "urgent": null},
		{"id": "7", "colour": "green"},
		{"id": "7", "colour": ["red"]},
		{"id": "7", "to": "kim@other.example"},
		{"id": "7", "to": "kim@customers.example@other.example"},
		{"id": "7", "to": "customers.example"},
		[],
		["7"],
		null,
		"id",
	] {
		not arguments.allowed(call, rules, tenant_rules)
	}
}

test_no_arguments_for_no_rules if {
	arguments.allowed({}, {}, {})
}

test_an_argument_is_needed_unless_the_tool_calls_it_optional if {
	not arguments.allowed({}, {"id": {"type": "string"}}, {})
	arguments.allowed({}, {"id": {"type": "string", "required": false}}, {})
}

test_a_tenant_tightens if {
	arguments.allowed({"id": "7", "size": 9}, rules, {})
	every more in [{"size": {"maximum": 5}}, {"size": {"enum": [1, 2]}}, {"colour": {"required": true}}] {
		not arguments.allowed({"id": "7", "size": 9}, rules, more)
	}
}

test_a_tenant_does_not_widen if {
	every call, more in {
		{"id": "7", "size": 11}: {"size": {"maximum": 99}},
		{"id": "7", "extra": "x"}: {"extra": {"type": "string"}},
		{}: {"id": {"required": false}},
		{"id": "7", "colour": "pink"}: {"colour": {"enum": ["pink"]}},
	} {
		not arguments.allowed(call, rules, more)
	}
}

test_where_the_tenant_must_say_its_silence_is_a_no if {
	not arguments.allowed({"id": "7", "to": "kim@customers.example"}, rules, {})
}

test_texts_are_texts_and_counted_in_characters if {
	rule := {"type": "string", "max_length": 4}
	every value in ["", "abcd", "\u2603\u2603\u2603\u2603"] {
		arguments.allowed({"note": value}, {"note": rule}, {})
	}
	every value in ["abcde", 1, true, null, ["a"], {"a": 1}] {
		not arguments.allowed({"note": value}, {"note": rule}, {})
	}
	every value in [1, true, null, ["a"], {"a": 1}] {
		not arguments.allowed({"note": value}, {"note": {"type": "string"}}, {})
	}
}

test_a_slip_in_a_bound_refuses if {
	every keyword, value in {"maximum": 7, "minimum": 7, "tenant_rule_required": 7, "required": 7} {
		not arguments.allowed({"size": value}, {"size": {"type": "integer", keyword: "9"}}, {"size": {"enum": [7]}})
	}
}

test_a_slip_in_a_rule_refuses if {
	every rule in [
		{},
		{"required": false},
		{"type": "text"},
		{"type": null},
		{"type": "string", "max_lenght": 9},
		{"type": "string", "max_length": "9"},
		{"type": "string", "enum": "7"},
		{"type": "string", "enum": {"any": "7"}},
		{"type": "string", "pattern": "["},
		{"type": "string", "pattern": 7},
		{"type": "string", "minimum": 1},
		{"type": "string", "domains": "customers.example"},
		{"type": "string", "required": "yes"},
		{"type": "string", "tenant_rule_required": "yes"},
		{"type": "string", "description": 1},
		"string",
		true,
		["type"],
	] {
		not arguments.allowed({"id": "7"}, {"id": rule}, {})
	}
}

test_a_rule_of_the_tenant_that_is_no_object_refuses if {
	every slip in [null, true, "id", []] {
		not arguments.allowed({"id": "7"}, rules, {"id": slip})
	}
}

test_rules_that_are_no_object_refuse if {
	every slip in [null, true, "id", ["id"]] {
		not arguments.allowed({"id": "7"}, slip, {})
		not arguments.allowed({}, {"id": slip}, {})
		not arguments.allowed({"id": "7"}, rules, slip)
	}
}
