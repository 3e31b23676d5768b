-- How accounts stand, and their limits as they were named last; both empty where there is
-- none any more.
--
-- KEYS[2] on: of each the account and its expiries
-- ARGV[5] on: of each where its window ends (empty: never)

keep_clock()
local reply = {attempt, 'done'}
for number = 1, (#KEYS - 1) / 2 do
  local key, limit = KEYS[number * 2], call('HGET', KEYS[number * 2], 'limit')
  local state = ''
  if limit then
    local fields = cjson.decode(limit)
    local account
    if fields[4] == 'rolling' then
      account = read_rate(key, fields[5], fields[8] * 1000)
      account.kind = 'g'
    else
      account = read_account(key, KEYS[number * 2 + 1])
    end
    account.ends_at = ARGV[4 + number]
    let_expired_go(account)
    state = show_entry(account)
  end
  table.insert(reply, limit or '')
  table.insert(reply, state)
end
return reply
