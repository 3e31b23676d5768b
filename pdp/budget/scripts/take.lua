-- Reserve or charge: everything that is asked for, or nothing.
--
-- KEYS[2] the answer, KEYS[3] the hold, then of each entry its account and expiries
-- ARGV[5] digest of the content  [6] note  [7] id and charges, for the answer
-- ARGV[8] actor  [9] "1": the hold backs a permit  [10] how long it lasts; empty: a charge
-- ARGV[11] the hold's parts  [12] "1": some charge has no limit, "" if nothing is charged
-- then of each entry: where its window starts, where it ends (empty: never), the
-- limit, the amount, and the limit as it is shown again

local FIRST_KEY, FIRST_ARGUMENT, EACH = 4, 13, 5

local first = first_answer(KEYS[2], ARGV[5])
if first then
  return first
end
if ARGV[12] == '1' then
  return refuse('budget_unlimited')
end

local entries = {}
for number = 1, (#KEYS - FIRST_KEY + 1) / 2 do
  local at = FIRST_ARGUMENT + (number - 1) * EACH
  if is_outside(ARGV[at], ARGV[at + 1]) then
    return tell_time()
  end
  local key = FIRST_KEY + (number - 1) * 2
  local entry = read_account(KEYS[key], KEYS[key + 1])
  entry.ends_at = ARGV[at + 1]
  entry.limit, entry.amount = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  entry.shown = ARGV[at + 4]
  entries[number] = entry
end

local refused, retry_after, shown = 0, '-', ''
for number, entry in ipairs(entries) do
  local room = entry.limit - entry.spent
  if entry.amount > room - entry.held then
    local at
    if entry.ends_at ~= '' and entry.amount <= entry.limit then
      at = tonumber(entry.ends_at)
    end
    if entry.first_expiry and entry.amount <= room then
      at = math.min(at or entry.first_expiry, entry.first_expiry)
    end
    refused, shown = number, entry.shown
    retry_after = at and whole(math.ceil(at - now)) or '-'
    break
  end
end

local expires_at = 0
if refused == 0 and ARGV[10] ~= '' and #entries > 0 then
  expires_at = math.ceil(now + tonumber(ARGV[10]))
end

local outcome = {whole(expires_at), '0', '0', whole(refused), retry_after}
for _, entry in ipairs(entries) do
  let_expired_go(entry)
  if refused == 0 then
    if expires_at > 0 then
      entry.held = entry.held + entry.amount
      redis.call('HINCRBY', entry.key, whole(expires_at), whole(entry.amount))
      redis.call('ZADD', entry.expiries, whole(expires_at), whole(expires_at))
    else
      entry.spent = entry.spent + entry.amount
    end
    write_account(entry)
    if entry.ends_at ~= '' then
      -- For as long as a hold that was made in the window can be settled.
      local seconds = math.ceil(tonumber(entry.ends_at) - now) + kept + 1
      if entry.is_new then
        redis.call('EXPIRE', entry.key, seconds)
      end
      if expires_at > 0 and not entry.had_expiries then
        redis.call('EXPIRE', entry.expiries, seconds)
      end
    end
  end
  table.insert(outcome, whole(entry.spent))
  table.insert(outcome, whole(entry.held))
  table.insert(outcome, entry.ends_at ~= '' and entry.ends_at or '-')
end
if expires_at > 0 then
  redis.call('HSET', KEYS[3], 'actor', ARGV[8], 'backs_permit', ARGV[9], 'at', whole(second),
    'expires_at', whole(expires_at), 'state', 'open', 'parts', ARGV[11])
  redis.call('EXPIRE', KEYS[3], kept + 1)
end
return remember(KEYS[2], ARGV[5], ARGV[6], ARGV[7], shown, table.concat(outcome, ' '))
