#!lua
-- Redeem a permit, or close it.
--
-- KEYS[1] the permit's use
-- ARGV[1] attempt: stands first in the reply, so that no reply can pass for another's
-- ARGV[2] the redemption's key; empty: close
-- ARGV[3] Unix seconds until which the use is remembered  [4] and for how long at least
--
-- Every answer has written something: WAIT waits for what its own connection wrote.

local use = redis.call('HMGET', KEYS[1], 'key', 'closed', 'attempt')
local answer = 'redeemed'
if ARGV[2] == '' then
  redis.call('HSET', KEYS[1], 'key', use[1] or '', 'closed', '1')
  answer = 'closed'
elseif not use[1] then
  redis.call('HSET', KEYS[1], 'key', ARGV[2], 'closed', '0', 'attempt', ARGV[1])
elseif use[1] == ARGV[2] and use[2] == '0' then
  redis.call('HSET', KEYS[1], 'closed', '0')
  if use[3] ~= ARGV[1] then
    answer = 'again'
  end
else
  return {ARGV[1], 'used'}
end
local seconds = tonumber(ARGV[3]) - tonumber(redis.call('TIME')[1])
redis.call('EXPIRE', KEYS[1], math.max(seconds, tonumber(ARGV[4])))
return {ARGV[1], answer}
