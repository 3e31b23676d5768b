-- How limits stand.
--
-- KEYS[2] on: of each limit its account and expiries
-- ARGV[5] on: of each where its window starts, where it ends (empty: never)

local accounts = {}
for number = 1, (#KEYS - 1) / 2 do
  local at = 5 + (number - 1) * 2
  if is_outside(ARGV[at], ARGV[at + 1]) then
    return tell_time()
  end
  accounts[number] = read_account(KEYS[number * 2], KEYS[number * 2 + 1])
end
keep_clock()
local outcome = {}
for _, account in ipairs(accounts) do
  let_expired_go(account)
  table.insert(outcome, whole(account.spent))
  table.insert(outcome, whole(account.held))
end
return {attempt, 'done', table.concat(outcome, ' '), ''}
