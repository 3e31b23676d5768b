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
-- account is an organisation's), the amount, of a rate its burst and of others the
-- thresholds that warn, and the limit as it is shown again

local FIRST_KEY, FIRST_ARGUMENT, EACH = 6, 16, ENTRY + 4
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
  return entry.amount <= entry.burst
    and entry.level <= (entry.burst - entry.amount) * entry.period
end

-- Seconds until there could be room by waiting alone, or nil.
local function wait_for(entry)
  if entry.kind == 'h' then
    return entry.amount <= entry.limit and 1 or nil
  end
  if entry.kind == 'g' then
    if entry.amount > entry.burst then
      return nil
    end
    local above = entry.level - (entry.burst - entry.amount) * entry.period
    return math.max(1, divide_up(divide_up(above, entry.limit), 1000))
  end
  local at
  if entry.ends_at ~= '' and entry.amount <= entry.limit then
    at = tonumber(entry.ends_at)
  end
  if (entry.limit - entry.spent) + (entry.granted - entry.amount) >= 0 then
    local returns = redis.call(
      'ZRANGEBYSCORE', entry.expiries, '(' .. whole(second), '+inf', 'LIMIT', 0, 1)[1]
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

-- Write an entry of which the amount was taken; `changes` are its fields.
local function write_entry(entry, changes)
  if entry.shown ~= entry.shows then
    table.insert(changes, 'limit')
    table.insert(changes, entry.shows)
  end
  local until_second = kept_until(entry)
  local is_renewed = until_second and entry.ends_at == '' and until_second ~= entry.kept_until
  if is_renewed then
    table.insert(changes, 'kept_until')
    table.insert(changes, whole(until_second))
  end
  redis.call('HSET', entry.key, unpack(changes))
  if until_second and (entry.is_new or is_renewed) then
    redis.call('EXPIRE', entry.key, until_second - second)
  end
  if until_second and entry.expiries and (entry.has_new_expiry or is_renewed) then
    redis.call('EXPIRE', entry.expiries, until_second - second + 1)
  end
  if (entry.is_new or is_renewed) and not entry.is_shared then
    local ends_at = entry.ends_at ~= '' and entry.ends_at
    redis.call('ZADD', KEYS[5], ends_at or until_second and whole(until_second) or '+inf', entry.key)
    redis.call('EXPIRE', KEYS[5], CLOCK_KEPT)
  end
end

local warnings = {}

-- Thresholds that are reached for the first time in the window.
local function warn(number, entry, changes)
  local before, sum = entry.warned, entry.spent + entry.held
  for percent, from in string.gmatch(entry.thresholds, '(%d+):(%d+)') do
    if tonumber(percent) > entry.warned and sum >= tonumber(from) then
      entry.warned = tonumber(percent)
      table.insert(warnings, whole(number) .. ' ' .. percent)
    end
  end
  if entry.warned > before then
    table.insert(changes, 'warned')
    table.insert(changes, whole(entry.warned))
  end
end

local function take(number, entry)
  if entry.kind == 'g' then
    -- A shadow limit may be asked for more than fits.
    entry.level = math.min(entry.level + entry.amount * entry.period, MOST)
    return write_entry(entry, {'level', whole(entry.level), 'at', whole(entry.at)})
  end
  if not is_charge then
    entry.held = entry.held + entry.amount
  elseif entry.kind ~= 'h' then
    entry.spent = entry.spent + entry.amount
  end
  local changes = {'spent', whole(entry.spent), 'held', whole(entry.held)}
  if not is_charge then
    local field = expiry_field(expires_at, entry.kind)
    table.insert(changes, field)
    table.insert(changes, whole(entry.in_field + entry.amount))
    if entry.in_field == 0 then
      redis.call('ZADD', entry.expiries, expiry_score(expires_at, entry.kind), field)
      entry.has_new_expiry = true
    end
  end
  if entry.kind ~= 'h' then
    warn(number, entry, changes)
  end
  write_entry(entry, changes)
end

local function prune(index)
  local ended = redis.call('ZCOUNT', index, '-inf', whole(second))
  if ended > 0 then
    redis.call('ZREMRANGEBYRANK', index, 0, math.min(ended, PRUNED_AT_ONCE) - 1)
  end
end

local entries = {}
for number = 1, (#KEYS - FIRST_KEY + 1) / 2 do
  local at = FIRST_ARGUMENT + (number - 1) * EACH
  local entry = read_entry(FIRST_KEY + (number - 1) * 2, at, expires_at)
  if not entry then
    return tell_time()
  end
  at = at + ENTRY
  entry.is_shadow = string.find(ARGV[at], 's', 1, true) ~= nil
  entry.is_shared = string.find(ARGV[at], 'o', 1, true) ~= nil
  entry.amount = tonumber(ARGV[at + 1])
  entry.burst, entry.thresholds = tonumber(ARGV[at + 2]), ARGV[at + 2]
  entry.shows = ARGV[at + 3]
  entries[number] = entry
end

local refused, retry_after, shown, over = 0, '-', '', {}
for number, entry in ipairs(entries) do
  if not has_room(entry) then
    if entry.is_shadow then
      table.insert(over, whole(number) .. ' ' .. show_entry(entry))
    else
      local seconds = wait_for(entry)
      refused, shown = number, entry.shows
      retry_after = seconds and whole(seconds) or '-'
      over = {}
      break
    end
  end
end
if refused == 0 then
  for _, entry in ipairs(entries) do
    if entry.kind ~= 'g' and entry.amount > (MOST - entry.spent) - entry.held then
      return refuse('budget_unavailable')
    end
  end
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
  redis.call('HSET', KEYS[3], 'operation', ARGV[8], 'actor', ARGV[9], 'tool', ARGV[10],
    'memo', ARGV[11], 'at', whole(second), 'expires_at', expires_at,
    'state', is_charge and 'settled' or 'open', 'parts', ARGV[13], 'progress', ARGV[14])
  redis.call('EXPIRE', KEYS[3], kept + 1)
  if not is_charge then
    redis.call('ZADD', KEYS[4], expires_at, KEYS[3])
    redis.call('EXPIRE', KEYS[4], kept + 1)
  end
  if second > highest then
    prune(KEYS[4])
    prune(KEYS[5])
    redis.call('EXPIRE', KEYS[5], CLOCK_KEPT)
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
