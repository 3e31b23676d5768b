-- Reserve or charge: everything that is asked for, or nothing.
--
-- KEYS[2] the answer, KEYS[3] the hold, KEYS[4] the tenant's open holds, by when they
-- expire, KEYS[5] its accounts, by when they end, then of each entry its account and
-- expiries
-- ARGV[5] digest of the content  [6] note  [7] id and charges, for the answer
-- ARGV[8] operation  [9] actor  [10] tool  [11] memo
-- ARGV[12] how long the hold lasts; empty: a charge
-- ARGV[13] the hold's parts  [14] of a charge, what has become of them
-- ARGV[15] "1": some charge has no limit
-- then of each entry, after what read_entry reads: flags ("s": refuses nothing; "o": the
-- account is an organisation's), the amount, of a rate its burst and of others from which
-- sum on they warn, the thresholds ("percent:amount"), and the limit as it is shown again

local FIRST_KEY, FIRST_ARGUMENT, EACH = 6, 16, ENTRY + 5
local PRUNED_AT_ONCE = 1000

local first = first_answer(KEYS[2], ARGV[5])
if first then
  return first
end
if ARGV[15] == '1' then
  return refuse('budget_unlimited')
end

local is_charge = ARGV[12] == ''
local expires_at = is_charge and '0' or whole(math.ceil(now + tonumber(ARGV[12])))

local function has_room(entry)
  if entry.kind ~= 'g' then
    return entry.amount <= room_in(entry, entry.limit)
  end
  local left = tonumber(ARGV[entry.at + 2]) - entry.amount
  return left >= 0 and entry.level <= left * entry.period
end

-- Seconds until there could be room by waiting alone, or nil.
local function wait_for(entry)
  if entry.kind == 'h' then
    return entry.amount <= entry.limit and 1 or nil
  end
  if entry.kind == 'g' then
    local left = tonumber(ARGV[entry.at + 2]) - entry.amount
    if left < 0 then
      return nil
    end
    local above = entry.level - left * entry.period
    return math.max(1, divide_up(divide_up(above, entry.limit), 1000))
  end
  local at
  if entry.ends_at ~= '' and entry.amount <= entry.limit then
    at = tonumber(entry.ends_at)
  end
  if (entry.limit - entry.spent) + (entry.granted - entry.amount) >= 0 then
    local returns = call(
      'ZRANGEBYSCORE', entry.expiries, '(' .. until_now, '+inf', 'LIMIT', 0, 1)[1]
    at = returns and math.min(at or math.huge, tonumber(returns)) or at
  end
  return at and math.max(1, math.ceil(at - now)) or nil
end

-- In which second the entry's account may go, or nil: for as long as a hold that was
-- made in its window can be settled; without a window, if it is not used again.
local function kept_until(entry)
  if entry.ends_at ~= '' then
    return tonumber(entry.ends_at) + kept + 1
  end
  if entry.kind == 'r' or entry.kind == 'c' then
    return nil
  end
  local least = second + kept
  if entry.kind == 'g' then
    least = least + math.ceil(entry.level / entry.limit / 1000)
  end
  -- By as much again, as it is used again and again.
  return entry.kept_until >= least and entry.kept_until or least + kept + 1
end

-- What is written of an entry's account besides sums. `is_held`: it has a new expiry.
local function keep(entry, is_held)
  local shows = ARGV[entry.at + 4]
  if entry.shown ~= shows then
    call('HSET', entry.key, 'limit', shows)
  end
  local until_second = kept_until(entry)
  local is_renewed = until_second and entry.ends_at == '' and until_second ~= entry.kept_until
  if is_renewed then
    call('HSET', entry.key, 'kept_until', whole(until_second))
  end
  if until_second and (entry.is_new or is_renewed) then
    call('EXPIRE', entry.key, until_second - second)
  end
  if until_second and entry.expiries and (is_held or is_renewed) then
    call('EXPIRE', entry.expiries, until_second - second + 1)
  end
  if (entry.is_new or is_renewed) and not string.find(ARGV[entry.at], 'o', 1, true) then
    local ends_at = entry.ends_at ~= '' and entry.ends_at
    call('ZADD', KEYS[5], ends_at or until_second and whole(until_second) or '+inf', entry.key)
    call('EXPIRE', KEYS[5], CLOCK_KEPT)
  end
end

local warnings = {}

-- Thresholds that are reached for the first time in the window.
local function warn(number, entry)
  local before, sum = entry.warned, entry.spent + entry.held
  for percent, from in string.gmatch(ARGV[entry.at + 3], '(%d+):(%d+)') do
    if tonumber(percent) > entry.warned and sum >= tonumber(from) then
      entry.warned = tonumber(percent)
      table.insert(warnings, whole(number) .. ' ' .. percent)
    end
  end
  if entry.warned > before then
    call('HSET', entry.key, 'warned', whole(entry.warned))
  end
end

local function take(number, entry)
  local amount, kind = entry.amount, entry.kind
  if kind == 'g' then
    -- A shadow limit may be asked for more than fits.
    entry.level = math.min(entry.level + amount * entry.period, MOST)
    call('HSET', entry.key, 'level', whole(entry.level), 'at', whole(entry.drained_at))
    return keep(entry, false)
  end
  local is_held = false
  if is_charge then
    entry.spent = entry.spent + (kind == 'h' and 0 or amount)
    write_sums(entry)
  else
    local field = expiry_field(expires_at, kind)
    entry.held = entry.held + amount
    write_sums(entry, field, whole(entry.in_field + amount))
    if entry.in_field == 0 then
      call('ZADD', entry.expiries, expiry_score(expires_at, kind), field)
      is_held = true
    end
  end
  local warns_from = tonumber(ARGV[entry.at + 2])
  if warns_from and entry.spent + entry.held >= warns_from then
    warn(number, entry)
  end
  keep(entry, is_held)
end

local function prune(index)
  local ended = call('ZCOUNT', index, '-inf', until_now)
  if ended > 0 then
    call('ZREMRANGEBYRANK', index, 0, math.min(ended, PRUNED_AT_ONCE) - 1)
  end
end

local entries = {}
for number = 1, (#KEYS - FIRST_KEY + 1) / 2 do
  local entry = read_entry(
    FIRST_KEY + (number - 1) * 2, FIRST_ARGUMENT + (number - 1) * EACH, expires_at)
  if not entry then
    return tell_time()
  end
  entry.amount = tonumber(ARGV[entry.at + 1])
  entries[number] = entry
end

local refused, retry_after, shown, over, is_countable = 0, '-', '', {}, true
for number, entry in ipairs(entries) do
  if entry.kind ~= 'g' and entry.amount > (MOST - entry.spent) - entry.held then
    is_countable = false
  end
  if not has_room(entry) then
    if not string.find(ARGV[entry.at], 's', 1, true) then
      local seconds = wait_for(entry)
      refused, shown, over = number, ARGV[entry.at + 4], {}
      retry_after = seconds and whole(seconds) or '-'
      break
    end
    table.insert(over, whole(number) .. ' ' .. show_entry(entry))
  end
end
if refused == 0 and not is_countable then
  return refuse('budget_unavailable')
end

local is_taken = refused == 0 and #entries > 0
local states = {}
for number, entry in ipairs(entries) do
  let_expired_go(entry)
  if is_taken then
    take(number, entry)
  end
  states[number] = show_entry(entry)
end
if is_taken then
  call('HSET', KEYS[3], 'operation', ARGV[8], 'actor', ARGV[9], 'tool', ARGV[10],
    'memo', ARGV[11], 'at', until_now, 'expires_at', expires_at,
    'state', is_charge and 'settled' or 'open', 'parts', ARGV[13], 'progress', ARGV[14])
  call('EXPIRE', KEYS[3], kept + 1)
  if not is_charge then
    call('ZADD', KEYS[4], expires_at, KEYS[3])
    call('EXPIRE', KEYS[4], kept + 1)
  end
  if second > highest then
    prune(KEYS[4])
    prune(KEYS[5])
    call('EXPIRE', KEYS[5], CLOCK_KEPT)
  end
end
local head = {is_taken and expires_at or '0', '0', '0', whole(refused), retry_after}
local outcome = {
  table.concat(head, ' '),
  table.concat(states, ' '),
  table.concat(over, ' '),
  table.concat(warnings, ' '),
}
return remember(KEYS[2], ARGV[5], ARGV[6], ARGV[7], shown, table.concat(outcome, '|'))
