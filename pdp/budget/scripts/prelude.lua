#!lua
-- What every script of the ledger begins with; its own text follows.
--
-- KEYS[1] the tenant's clock: the highest time seen, in whole Unix seconds
-- ARGV[1] attempt: stands first in the reply, so that no reply can pass for another's
-- ARGV[2] the time, for tests; empty: the server's clock
-- ARGV[3] flags: "s", a reply must not leave before replicas can be waited for;
--   "k", the caller knows that the tenant has a clock, so that without one all is lost
-- ARGV[4] seconds for which answers and holds are kept
--
-- Whatever is refused is refused before anything is written: Redis undoes nothing. For
-- that, too, the first line: with it, a server without memory or disk does not begin.
-- Amounts come and go as text. As numbers they are doubles, exact below 2^53; sums
-- are compared by subtracting, which stays exact wherever it decides.

local attempt, kept = ARGV[1], tonumber(ARGV[4])
local strict = string.find(ARGV[3], 's', 1, true) ~= nil
local MOST = 9007199254740991
local CLOCK_KEPT = 400 * 86400
local FIELDS_AT_ONCE = 1000 -- Lua passes some 8000 arguments at most

local function whole(number)
  return string.format('%.0f', number)
end

local clock = redis.call('GET', KEYS[1])
if not clock and string.find(ARGV[3], 'k', 1, true) then
  do return {attempt, 'lost'} end
end
local highest = tonumber(clock or '0')
local now
if ARGV[2] ~= '' then
  now = tonumber(ARGV[2])
else
  local time = redis.call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end
if now < highest then
  now = highest
end
local second = math.floor(now)

local function keep_clock()
  if second > highest or strict then
    redis.call('SET', KEYS[1], whole(second), 'EX', CLOCK_KEPT)
  end
end

local function is_kept(at)
  return tonumber(at) > second - kept
end

local function refuse(code)
  return {attempt, 'error', code}
end

-- The first answer under a key, or nil.
local function first_answer(key, sha256)
  local answer = redis.call(
    'HMGET', key, 'sha256', 'at', 'attempt', 'note', 'asked', 'limit', 'outcome')
  if not answer[1] or not is_kept(answer[2]) then
    return nil
  end
  if answer[1] ~= sha256 then
    return refuse('idempotency_key_reused')
  end
  if strict then
    -- WAIT waits for what its own connection has written, and another may have
    -- written the answer a moment ago.
    redis.call('SET', KEYS[1], whole(highest), 'EX', CLOCK_KEPT)
  end
  local own = answer[3] == attempt and '1' or '0'
  return {attempt, 'first', own, answer[4], answer[5], answer[6], answer[7]}
end

local function remember(key, sha256, note, asked, limit, outcome)
  keep_clock()
  redis.call('DEL', key)
  redis.call('HSET', key, 'sha256', sha256, 'at', whole(second), 'attempt', attempt,
    'note', note, 'asked', asked, 'limit', limit, 'outcome', outcome)
  redis.call('EXPIRE', key, kept + 1)
  return {attempt, 'done', outcome, limit}
end

-- Whether the caller computed the windows for another time than this.
local function is_outside(starts_at, ends_at)
  return now < tonumber(starts_at) or (ends_at ~= '' and now >= tonumber(ends_at))
end

local function tell_time()
  return {attempt, 'time', string.format('%.17g', now)}
end

-- An account is a hash: spent, held, and under each second at which holds expire the
-- sum of them. Its expiries are those seconds in order: never more than the longest
-- hold has, whatever the number of holds.
local function read_account(key, expiries)
  local row = redis.call('HMGET', key, 'spent', 'held')
  local account = {
    key = key,
    expiries = expiries,
    is_new = not row[1],
    spent = tonumber(row[1] or '0'),
    held = tonumber(row[2] or '0'),
    expired = {},
  }
  local first = redis.call('ZRANGE', expiries, 0, 0)[1]
  account.had_expiries = first ~= nil
  if first and tonumber(first) <= now then
    account.expired = redis.call('ZRANGEBYSCORE', expiries, '-inf', whole(second))
    for from = 1, #account.expired, FIELDS_AT_ONCE do
      local to = math.min(from + FIELDS_AT_ONCE - 1, #account.expired)
      for _, amount in ipairs(redis.call('HMGET', key, unpack(account.expired, from, to))) do
        account.held = account.held - tonumber(amount or '0')
      end
    end
    first = redis.call('ZRANGEBYSCORE', expiries, '(' .. whole(second), '+inf', 'LIMIT', 0, 1)[1]
  end
  account.first_expiry = first and tonumber(first)
  return account
end

-- What has expired counts no more: read_account has left it out already.
local function let_expired_go(account)
  if #account.expired > 0 then
    redis.call('ZREMRANGEBYSCORE', account.expiries, '-inf', whole(second))
    for from = 1, #account.expired, FIELDS_AT_ONCE do
      local to = math.min(from + FIELDS_AT_ONCE - 1, #account.expired)
      redis.call('HDEL', account.key, unpack(account.expired, from, to))
    end
    redis.call('HSET', account.key, 'held', whole(account.held))
  end
end

local function write_account(account)
  redis.call('HSET', account.key, 'spent', whole(account.spent), 'held', whole(account.held))
end
