package pdp.prices_test

import data.pdp.prices

table := {
	"current": "new",
	"versions": {
		"new": {"models": {
			"m": {"budget": "llm", "usd_micros_per_million": {"tokens_in": 2500000, "tokens_out": 10, "free": 0}},
			"dear": {"budget": "llm", "usd_micros_per_million": {"images": 1000000000000}},
			"homeless": {"usd_micros_per_million": {"tokens_in": 1}},
		}},
		"old": {"models": {"m": {"budget": "llm", "usd_micros_per_million": {"tokens_in": 5000000}}}},
	},
}

use(operation, model, quantities) := {
	"action": {"name": sprintf("budget.%s", [operation])},
	"usage": {"model": model, "quantities": quantities},
}

amounts(charges) := {charge.unit: charge.amount | some charge in charges}

test_usage_is_charged_with_what_it_costs if {
	charges := prices.charges with input as use("charge", "m", {"tokens_out": 700000, "tokens_in": 4})
		with data.prices as table
	charges == [
		{"budget": "llm", "unit": "tokens_in", "amount": 4},
		{"budget": "llm", "unit": "tokens_out", "amount": 700000},
		{"budget": "llm", "unit": "usd_micros", "amount": 17},
	]
}

test_a_fraction_is_rounded_up_before_the_use if {
	every operation in ["charge", "reserve"] {
		every amount, usd_micros in {1: 1, 100000: 1, 100001: 2} {
			charges := prices.charges with input as use(operation, "m", {"tokens_out": amount})
				with data.prices as table
			amounts(charges) == {"tokens_out": amount, "usd_micros": usd_micros}
		}
	}
}

test_a_half_is_rounded_to_even_after_the_use if {
	every amount, usd_micros in {1: 2, 3: 8, 5: 12, 7: 18, 4: 10} {
		charges := prices.charges with input as use("settle", "m", {"tokens_in": amount})
			with data.prices as table
		amounts(charges) == {"tokens_in": amount, "usd_micros": usd_micros}
	}
}

test_more_than_a_half_is_rounded_up_and_less_down_after_the_use if {
	every row in [
		[{"tokens_in": 1, "tokens_out": 1}, 3],
		[{"tokens_out": 149999}, 1],
		[{"tokens_out": 150001}, 2],
	] {
		[quantities, usd_micros] := row
		charges := prices.charges with input as use("settle", "m", quantities) with data.prices as table
		amounts(charges) == object.union(quantities, {"usd_micros": usd_micros})
	}
}

test_what_costs_nothing_is_counted_all_the_same if {
	every row in [
		["charge", {"free": 3, "tokens_in": 0}, {"free": 3}],
		["settle", {"tokens_out": 1}, {"tokens_out": 1}],
		["settle", {"tokens_out": 0}, {}],
	] {
		[operation, quantities, expected] := row
		charges := prices.charges with input as use(operation, "m", quantities) with data.prices as table
		amounts(charges) == expected
	}
}

test_large_amounts_are_exact if {
	every row in [
		["m", "tokens_in", 3602879701896397, 9007199254740993],
		["dear", "images", 9007199254, 9007199254000000],
	] {
		[model, unit, amount, usd_micros] := row
		charges := prices.charges with input as use("reserve", model, {unit: amount}) with data.prices as table
		amounts(charges) == {unit: amount, "usd_micros": usd_micros}
	}
}

test_an_unknown_model_or_unit_has_no_price if {
	every request in [
		use("charge", "n", {"tokens_in": 1}),
		use("charge", "m", {"tokens_in": 1, "images": 1}),
		use("charge", "m", {"images": 0}),
		use("charge", "homeless", {"tokens_in": 1}),
		use("settle", "n", {"tokens_in": 1}),
		{"action": {"name": "budget.charge"}},
	] {
		not prices.charges with input as request with data.prices as table
	}
}

test_there_is_no_price_without_a_table if {
	request := use("settle", "m", {"tokens_in": 1})
	not prices.charges with input as request with data.prices as {}
	not prices.charges with input as request with data.prices as {"current": "new", "versions": {}}
}

test_a_slip_in_a_price_makes_nothing_free if {
	every price in [-1, 0.5, "5", null, true, [1], 1000000000001] {
		model := {"budget": "llm", "usd_micros_per_million": {"tokens_in": price}}
		not prices.charges with input as use("settle", "m", {"tokens_in": 1})
			with data.prices as {"current": "v", "versions": {"v": {"models": {"m": model}}}}
	}
}

test_a_settlement_is_priced_as_its_hold_was if {
	request := object.union(use("settle", "m", {"tokens_in": 100}), {"price_version": "old"})
	charges := prices.charges with input as request with data.prices as table
	amounts(charges).usd_micros == 500
	version := prices.version with input as request with data.prices as table
	version == "old"
}

test_a_version_that_is_gone_is_the_current_one if {
	request := object.union(use("settle", "m", {"tokens_in": 100}), {"price_version": "older"})
	charges := prices.charges with input as request with data.prices as table
	amounts(charges).usd_micros == 250
	version := prices.version with input as request with data.prices as table
	version == "new"
}

test_nobody_chooses_old_prices_for_a_new_spend if {
	every operation in ["charge", "reserve"] {
		request := object.union(use(operation, "m", {"tokens_in": 100}), {"price_version": "old"})
		charges := prices.charges with input as request with data.prices as table
		amounts(charges).usd_micros == 250
	}
}
