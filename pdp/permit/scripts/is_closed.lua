#!lua
-- Whether a permit is closed: "1" or "0".
--
-- KEYS[1] the permit's uses
-- ARGV[1] attempt: stands first in the reply, so that no reply can pass for another's

return {ARGV[1], tostring(redis.call('HEXISTS', KEYS[1], 'closed'))}
