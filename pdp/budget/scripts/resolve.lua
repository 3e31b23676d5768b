-- Settle a hold, or a part of it, release it, or let it expire now.
--
-- KEYS[2] the answer, KEYS[3] the hold, KEYS[4] the tenant's open holds, then of the
-- accounts of its parts each and its expiries
-- ARGV[5] digest of the content  [6] note  [7] id and charges, for the answer
-- ARGV[8] which operation made the hold, and  [9] for which actor; empty: any, for any
-- ARGV[10] the parts that the caller takes the hold to have: where they are others,
-- they are told, and the caller asks anew
-- ARGV[11] "settle", "part", "release" or "expire"
-- ARGV[12] code of what is wrong with the charges, or empty  [13] how many parts there are
-- then of each part: what was held, what is spent (empty: not named; "*": all that is left)
-- then of each account: the number of its part, its kind

local FIRST_KEY, FIRST_ARGUMENT, EACH = 5, 14, 2
local verb, part_count = ARGV[11], tonumber(ARGV[13])
local settles = verb == 'settle' or verb == 'part'

local first = first_answer(KEYS[2], ARGV[5])
if first then
  return first
end

local hold = call('HMGET', KEYS[3], 'operation', 'actor', 'at', 'expires_at', 'state',
  'parts', 'progress', 'returns')
local is_meant = ARGV[8] == '' or hold[1] == ARGV[8] and hold[2] == ARGV[9]
if not hold[1] or not is_meant or not is_kept(hold[3]) then
  return refuse('hold_not_found')
end
local is_open = hold[5] == 'open'
if not is_open and not (settles and ARGV[8] == 'lease' and hold[5] == 'settled') then
  return refuse('hold_already_' .. hold[5])
end
if hold[6] ~= ARGV[10] then
  return {attempt, 'parts', hold[6]}
end
local expires_at = hold[4]
local late = not is_open or tonumber(expires_at) <= now
if late and not settles then
  return refuse('hold_expired')
end
if ARGV[12] ~= '' then
  return refuse(ARGV[12])
end

local parts, shown, over_hold = read_parts(hold[7], FIRST_ARGUMENT, part_count), {}, false
for number, part in ipairs(parts) do
  local named = part.asked ~= ''
  if part.asked == '*' then
    part.spends = settles and part.left or 0
    shown[number] = (settles or part.left > 0) and whole(part.left) or '-'
  else
    part.spends = named and tonumber(part.asked) or 0
  end
  if part.spends > MOST - part.settled then
    return refuse('budget_unavailable')
  end
  part.lets_go = verb == 'part' and math.min(part.left, part.spends) or part.left
  part.settled = part.settled + part.spends
  over_hold = over_hold or settles and named and part.settled > part.amount
end

local accounts = {}
for number = 1, (#KEYS - FIRST_KEY + 1) / 2 do
  local key = FIRST_KEY + (number - 1) * 2
  local at = FIRST_ARGUMENT + part_count * EACH + (number - 1) * EACH
  local part, kind = parts[tonumber(ARGV[at])], ARGV[at + 1]
  if kind == 'c' and hold[8] then
    kind = 'r' -- it was let expire, and nothing was charged
  end
  local field = expiry_field(expires_at, kind)
  local account = read_account(KEYS[key], KEYS[key + 1], field)
  account.field, account.lets_go, account.more = field, part.lets_go, part.spends
  -- Of an organisation's account another tenant may have let it go already, whose
  -- clock was ahead.
  if late or account.in_field < part.lets_go then
    account.lets_go = 0
    account.more = kind == 'c' and part.spends - part.lets_go or part.spends
  end
  if kind == 'h' then
    account.more = 0
  elseif account.more > MOST - account.spent then
    return refuse('budget_unavailable')
  end
  accounts[number] = account
end

for _, account in ipairs(accounts) do
  let_expired_go(account)
  account.spent = math.max(0, account.spent + account.more)
  account.held = account.held - account.lets_go
  local left = account.in_field - account.lets_go
  if account.lets_go > 0 and left == 0 then
    call('HDEL', account.key, account.field)
    call('ZREM', account.expiries, account.field)
    write_sums(account)
  elseif account.lets_go > 0 then
    write_sums(account, account.field, whole(left))
  elseif account.more ~= 0 then
    write_sums(account)
    if account.is_new then
      call('EXPIRE', account.key, kept + 1)
    end
  end
end

if verb == 'expire' then
  call('HSET', KEYS[3], 'expires_at', until_now, 'returns', '1')
else
  for _, part in ipairs(parts) do
    part.left = part.left - part.lets_go
  end
  local state = verb == 'settle' and 'settled' or verb == 'release' and 'released' or hold[5]
  call('HSET', KEYS[3], 'state', state, 'progress', show_progress(parts))
end
if verb ~= 'part' then
  call('ZREM', KEYS[4], KEYS[3])
end
local head = table.concat({'0', over_hold and '1' or '0', late and '1' or '0', '0', '-'}, ' ')
local outcome = head .. '|' .. table.concat(shown, ' ')
return remember(KEYS[2], ARGV[5], ARGV[6], ARGV[7], '', outcome)
