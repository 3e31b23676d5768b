-- The parts of holds: what scripts need that end holds, or refund them.

-- The parts of a hold. ARGV[at] on: of each what was held or charged, and what is asked of
-- it. Progress is empty until something was settled: then it says of each part what is
-- still held, what was settled, and what was refunded.
local function read_parts(progress, at, count)
  local numbers = {}
  for number in string.gmatch(progress, '%d+') do
    table.insert(numbers, tonumber(number))
  end
  local parts = {}
  for number = 1, count do
    local amount = tonumber(ARGV[at + (number - 1) * 2])
    parts[number] = {
      amount = amount,
      asked = ARGV[at + (number - 1) * 2 + 1],
      left = numbers[number * 3 - 2] or amount,
      settled = numbers[number * 3 - 1] or 0,
      refunded = numbers[number * 3] or 0,
    }
  end
  return parts
end

local function show_progress(parts)
  local numbers = {}
  for _, part in ipairs(parts) do
    table.insert(numbers, whole(part.left))
    table.insert(numbers, whole(part.settled))
    table.insert(numbers, whole(part.refunded))
  end
  return table.concat(numbers, ' ')
end
