#!lua
-- Redeem a permit, or close it.
--
-- KEYS[1] the permit's uses: "closed", and a field for each redemption, which holds the
--         attempt that made it
-- ARGV[1] attempt: stands first in the reply, so that no reply can pass for another's
-- ARGV[2] the redemption's key; empty: close
-- ARGV[3] how many redemptions the permit allows
-- ARGV[4] Unix seconds until which the uses are remembered  [5] and for how long at least
--
-- The reply: attempt, "redeemed", "again", "closed" or "used", number of redemptions.
-- Every answer but a refusal has written something: WAIT waits for what its own connection
-- wrote.

local is_closed = redis.call('HEXISTS', KEYS[1], 'closed')
local redeemed = redis.call('HLEN', KEYS[1]) - is_closed
local answer = 'redeemed'
if ARGV[2] == '' then
  redis.call('HSET', KEYS[1], 'closed', '1')
  answer = 'closed'
else
  local field = 'by ' .. ARGV[2]
  local made_by = redis.call('HGET', KEYS[1], field)
  if is_closed == 1 or (not made_by and redeemed >= tonumber(ARGV[3])) then
    return {ARGV[1], 'used', tostring(redeemed)}
  end
  redis.call('HSET', KEYS[1], field, made_by or ARGV[1])
  if not made_by then
    redeemed = redeemed + 1
  elseif made_by ~= ARGV[1] then
    answer = 'again'
  end
end
local seconds = tonumber(ARGV[4]) - tonumber(redis.call('TIME')[1])
redis.call('EXPIRE', KEYS[1], math.max(seconds, tonumber(ARGV[5])))
return {ARGV[1], answer, tostring(redeemed)}
