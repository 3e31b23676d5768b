-- What of an index lies ahead, the nearest first: each member and its score.
--
-- KEYS[2] the index  ARGV[5] how many at most

keep_clock()
local members = call('ZRANGEBYSCORE', KEYS[2], '(' .. until_now, '+inf', 'WITHSCORES',
  'LIMIT', 0, ARGV[5])
local reply = {attempt, 'done'}
for _, text in ipairs(members) do
  table.insert(reply, text)
end
return reply
