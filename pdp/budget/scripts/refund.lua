-- Take back what was settled or charged.
--
-- KEYS[2] the answer, KEYS[3] the hold, then of the accounts of its parts that count spend
-- each and its expiries
-- ARGV[5] digest of the content  [6] note  [7] id and charges, for the answer
-- ARGV[8] the parts that the caller takes the hold to have: where they are others,
-- they are told, and the caller asks anew
-- ARGV[9] code of what is wrong with the charges, or empty  [10] how many parts there are
-- then of each part: what was held, what is refunded (empty: nothing; "*": all that is left)
-- then of each account: the number of its part

local FIRST_KEY, FIRST_ARGUMENT = 4, 11
local part_count = tonumber(ARGV[10])

local first = first_answer(KEYS[2], ARGV[5])
if first then
  return first
end

local hold = call('HMGET', KEYS[3], 'at', 'parts', 'progress')
if not hold[1] or not is_kept(hold[1]) then
  return refuse('hold_not_found')
end
if hold[2] ~= ARGV[8] then
  return {attempt, 'parts', hold[2]}
end
if ARGV[9] ~= '' then
  return refuse(ARGV[9])
end

local parts, shown, refunds_any = read_parts(hold[3], FIRST_ARGUMENT, part_count), {}, false
for number, part in ipairs(parts) do
  local most = part.settled - part.refunded
  part.refunds = part.asked == '*' and most or tonumber(part.asked) or 0
  if part.refunds > most then
    return refuse('refund_exceeds_spend')
  end
  refunds_any = refunds_any or part.refunds > 0
  part.refunded = part.refunded + part.refunds
  if part.asked == '*' then
    shown[number] = most > 0 and whole(most) or '-'
  end
end
if not refunds_any then
  return refuse('refund_exceeds_spend')
end

for number = 1, (#KEYS - FIRST_KEY + 1) / 2 do
  local key = FIRST_KEY + (number - 1) * 2
  local part = parts[tonumber(ARGV[FIRST_ARGUMENT + part_count * 2 + number - 1])]
  local account = read_account(KEYS[key], KEYS[key + 1])
  let_expired_go(account)
  if part.refunds > 0 and not account.is_new then
    account.spent = math.max(0, account.spent - part.refunds)
    write_sums(account)
  end
end
call('HSET', KEYS[3], 'progress', show_progress(parts))
local outcome = '0 0 0 0 -|' .. table.concat(shown, ' ')
return remember(KEYS[2], ARGV[5], ARGV[6], ARGV[7], '', outcome)
