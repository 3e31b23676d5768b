-- Settle or release a hold, once.
--
-- KEYS[2] the answer, KEYS[3] the hold, then of each of its parts' accounts, in their
-- order, the account and its expiries
-- ARGV[5] digest of the content  [6] note  [7] id and charges, for the answer
-- ARGV[8] actor  [9] "1": holds that back a permit are meant, "0": others
-- ARGV[10] the parts that the caller takes the hold to have: where they are others,
-- they are told, and the caller asks anew
-- ARGV[11] "settled" or "released"  [12] code of what is wrong with the charges, or empty
-- ARGV[13] "1": more is spent than is held
-- then of each account: what is spent, what is held

local FIRST_KEY, FIRST_ARGUMENT, EACH = 4, 14, 2

local first = first_answer(KEYS[2], ARGV[5])
if first then
  return first
end

local hold = redis.call(
  'HMGET', KEYS[3], 'actor', 'backs_permit', 'at', 'expires_at', 'state', 'parts')
if hold[1] ~= ARGV[8] or hold[2] ~= ARGV[9] or not is_kept(hold[3]) then
  return refuse('hold_not_found')
end
if hold[5] ~= 'open' then
  return refuse('hold_already_' .. hold[5])
end
if hold[6] ~= ARGV[10] then
  return {attempt, 'parts', hold[6]}
end
local expires_at = tonumber(hold[4])
local late = expires_at <= now
if late and ARGV[11] == 'released' then
  return refuse('hold_expired')
end
if ARGV[12] ~= '' then
  return refuse(ARGV[12])
end

local accounts = {}
for number = 1, (#KEYS - FIRST_KEY + 1) / 2 do
  local key, at = FIRST_KEY + (number - 1) * 2, FIRST_ARGUMENT + (number - 1) * EACH
  local account = read_account(KEYS[key], KEYS[key + 1])
  account.spends, account.lets_go = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  if account.spends > MOST - account.spent then
    return refuse('budget_unavailable')
  end
  accounts[number] = account
end

for _, account in ipairs(accounts) do
  let_expired_go(account)
  account.spent = account.spent + account.spends
  if not late then
    account.held = account.held - account.lets_go
    local left = redis.call('HINCRBY', account.key, hold[4], whole(-account.lets_go))
    if left == 0 then
      redis.call('HDEL', account.key, hold[4])
      redis.call('ZREM', account.expiries, hold[4])
    end
  end
  write_account(account)
  if account.is_new then
    redis.call('EXPIRE', account.key, kept + 1)
  end
end
redis.call('HSET', KEYS[3], 'state', ARGV[11])
local outcome = table.concat({'0', ARGV[13], late and '1' or '0', '0', '-'}, ' ')
return remember(KEYS[2], ARGV[5], ARGV[6], ARGV[7], '', outcome)
