-- Holds and charges as they are kept.
--
-- KEYS[2] on: the holds

keep_clock()
local reply = {attempt, 'done'}
for number = 2, #KEYS do
  local hold = call('HMGET', KEYS[number], 'at', 'operation', 'actor', 'tool', 'expires_at',
    'state', 'memo', 'parts', 'progress')
  for field = 1, 9 do
    local is_there = hold[1] and is_kept(hold[1])
    table.insert(reply, is_there and hold[field] or '')
  end
end
return reply
