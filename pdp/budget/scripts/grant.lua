-- Let more be spent in an account than its limit says, or take that back.
--
-- KEYS[2] the answer, KEYS[3] the account, KEYS[4] its expiries, KEYS[5] the tenant's
-- accounts, by when they end
-- ARGV[5] digest of the content  [6] note  [7] id and charges, for the answer
-- ARGV[8] how much  [9] "1": it counts spend

local first = first_answer(KEYS[2], ARGV[5])
if first then
  return first
end

local ends_at = call('ZSCORE', KEYS[5], KEYS[3])
if ARGV[9] ~= '1' or not ends_at or tonumber(ends_at) <= now then
  return refuse('account_not_found')
end
local account = read_account(KEYS[3], KEYS[4])
if account.is_new then
  return refuse('account_not_found')
end
let_expired_go(account)
account.granted = math.min(math.max(0, account.granted + tonumber(ARGV[8])), MOST)
call('HSET', account.key, 'granted', whole(account.granted))
account.ends_at = ends_at == 'inf' and '' or ends_at
local outcome = '0 0 0 0 -|' .. show_entry(account)
return remember(KEYS[2], ARGV[5], ARGV[6], ARGV[7], account.shown, outcome)
