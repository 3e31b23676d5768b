# METADATA
# title: What does the use of a model cost?
# description: |
#   The one place that reads data.prices: for each version of the price table, each
#   model's budget, and what a million of each unit costs there in usd_micros.
# schemas:
#   - input: schema.budget_input
package pdp.prices

# METADATA
# title: The version of the price table that counts
# description: |
#   A settlement is priced as its hold was, or, where that version is in the data no
#   more, as everything else: at the current one.
version := input.price_version if {
	input.action.name == "budget.settle"
	data.prices.versions[input.price_version]
} else := data.prices.current

model := data.prices.versions[version].models[input.usage.model]

# METADATA
# title: What the usage is charged
# description: |
#   The quantities themselves, and the money that they cost together. Undefined for a
#   model that is not in the table, and where a unit has no sound price.
charges := array.concat(quantities, money) if {
	is_string(model.budget)
	every unit, _ in input.usage.quantities {
		priced(unit)
	}
}

quantities := [{"budget": model.budget, "unit": unit, "amount": amount} |
	some unit in sort(object.keys(input.usage.quantities))
	amount := input.usage.quantities[unit]
	amount > 0
]

money := [{"budget": model.budget, "unit": "usd_micros", "amount": usd_micros} |
	usd_micros > 0
]

# A price below zero would be a gain. A fraction of one would not be exact, nor would one of
# more than a dollar for each.
priced(unit) if {
	price := model.usd_micros_per_million[unit]
	is_number(price)
	price >= 0
	price <= 1000000000000
	floor(price) == price
}

# Rounded up for what is charged or held; half to even where the true use is settled.
usd_micros := whole + 1 if {
	rounds_up
} else := whole

rounds_up if {
	fraction > 0
	input.action.name != "budget.settle"
}

rounds_up if fraction > 500000

rounds_up if {
	fraction == 500000
	whole % 2 == 1
}

# Millions are multiplied apart from the rest, so that no product leaves the range in
# which every engine counts exactly.
whole := sum([cost |
	some unit, amount in input.usage.quantities
	cost := ((amount - (amount % 1000000)) / 1000000) * model.usd_micros_per_million[unit]
]) + ((millionths - fraction) / 1000000)

fraction := millionths % 1000000

millionths := sum([cost |
	some unit, amount in input.usage.quantities
	cost := (amount % 1000000) * model.usd_micros_per_million[unit]
])
