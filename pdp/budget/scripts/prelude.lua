#!lua
-- What every script of the ledger begins with; what it needs besides, and its own text,
-- follow.
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
-- Amounts come and go as text. As numbers they are doubles, exact below 2^53. What may
-- pass that is computed so that it is exact wherever it decides: sums are compared by
-- subtracting, and a product is compared with what is at most 2^53, or cut off there.

local call, format = redis.call, string.format
local attempt, kept = ARGV[1], tonumber(ARGV[4])
local strict = string.find(ARGV[3], 's', 1, true) ~= nil
local MOST = 9007199254740991
local CLOCK_KEPT = 400 * 86400
local FIELDS_AT_ONCE = 1000 -- Lua passes some 8000 arguments at most

local function whole(number)
  return format('%.0f', number)
end

-- a / b, rounded up. Only fmod is exact for all of them: "%" divides first.
local function divide_up(a, b)
  local rest = math.fmod(a, b)
  return (a - rest) / b + (rest > 0 and 1 or 0)
end

local clock = call('GET', KEYS[1])
if not clock and string.find(ARGV[3], 'k', 1, true) then
  do return {attempt, 'lost'} end
end
local highest = tonumber(clock or '0')
local now
if ARGV[2] ~= '' then
  now = tonumber(ARGV[2])
else
  local time = call('TIME')
  now = tonumber(time[1]) + tonumber(time[2]) / 1e6
end
if now < highest then
  now = highest
end
local second, millisecond = math.floor(now), math.floor(now * 1000)
local until_now = whole(second)
local since_now = '-' .. until_now -- of what is scored below zero

local function keep_clock()
  if second > highest or strict then
    call('SET', KEYS[1], until_now, 'EX', CLOCK_KEPT)
  end
end

local function is_kept(at)
  return tonumber(at) > second - kept
end

local function refuse(code)
  return {attempt, 'error', code}
end

local function tell_time()
  return {attempt, 'time', format('%.17g', now)}
end

-- Answers

local has_old_answer = false

-- The first answer under a key, or nil.
local function first_answer(key, sha256)
  local answer = call(
    'HMGET', key, 'sha256', 'at', 'attempt', 'note', 'asked', 'limit', 'outcome')
  if not answer[1] or not is_kept(answer[2]) then
    has_old_answer = answer[1]
    return nil
  end
  if answer[1] ~= sha256 then
    return refuse('idempotency_key_reused')
  end
  if strict then
    -- WAIT waits for what its own connection has written, and another may have
    -- written the answer a moment ago.
    call('SET', KEYS[1], whole(highest), 'EX', CLOCK_KEPT)
  end
  local own = answer[3] == attempt and '1' or '0'
  return {attempt, 'first', own, answer[4], answer[5], answer[6], answer[7]}
end

local function remember(key, sha256, note, asked, limit, outcome)
  keep_clock()
  if has_old_answer then
    call('DEL', key)
  end
  call('HSET', key, 'sha256', sha256, 'at', until_now, 'attempt', attempt,
    'note', note, 'asked', asked, 'limit', limit, 'outcome', outcome)
  call('EXPIRE', key, kept + 1)
  return {attempt, 'done', outcome, limit}
end

-- Accounts. Each is of a kind, by its limit:
--   "r" counts spend, and what is held returns on expiry
--   "c" counts spend, and what is held is charged on expiry
--   "h" counts only what is held: concurrency
--   "g" is a rate: level, in thousandths of a second in which one unit drains, when
--       it was drained last, and nothing else
-- Of the others an account is a hash with spent, held, granted, the highest warned
-- percent and, under each second at which holds expire, the sum of what returns then
-- and, with a "c" behind it, of what is charged then. Its expiries are those fields,
-- scored by the second, and those that are charged by the second below zero: never more
-- than twice the seconds of the longest hold, whatever the number of holds. They may
-- outlive the account, but never go before it: what they hold could not return.
-- Of each, limit is how its limit was named last, and kept_until, where it stands,
-- when it may go unless it is used again.

local function expiry_field(expires_at, kind)
  return kind == 'c' and expires_at .. 'c' or expires_at
end

local function expiry_score(expires_at, kind)
  return kind == 'c' and '-' .. expires_at or expires_at
end

-- What has expired is left out of what is held, as let_expired_go will write it. `field`
-- is read besides, where there is one.
local function read_account(key, expiries, field)
  local row = call('HMGET', key, 'spent', 'held', 'granted', 'warned', 'limit', 'kept_until',
    field or '')
  local account = {
    key = key,
    expiries = expiries,
    is_new = not row[1],
    spent = tonumber(row[1] or 0),
    held = tonumber(row[2] or 0),
    granted = tonumber(row[3] or 0),
    warned = tonumber(row[4] or 0),
    shown = row[5],
    kept_until = tonumber(row[6] or 0),
    in_field = tonumber(row[7] or 0),
    expired = call('ZRANGEBYSCORE', expiries, since_now, until_now),
    -- Room for what scripts add: a table that grows is made anew.
    at = nil, kind = nil, limit = nil, amount = nil, ends_at = nil,
  }
  for from = 1, #account.expired, FIELDS_AT_ONCE do
    local to = math.min(from + FIELDS_AT_ONCE - 1, #account.expired)
    local amounts = call('HMGET', key, unpack(account.expired, from, to))
    for number, amount in ipairs(amounts) do
      amount = tonumber(amount or 0)
      account.held = account.held - amount
      if string.sub(account.expired[from + number - 1], -1) == 'c' then
        account.spent = math.min(account.spent + amount, MOST)
      end
    end
  end
  return account
end

-- Fields and values besides may follow.
local function write_sums(account, ...)
  call(
    'HSET', account.key, 'spent', whole(account.spent), 'held', whole(account.held), ...)
end

local function let_expired_go(account)
  if #account.expired > 0 then
    call('ZREMRANGEBYSCORE', account.expiries, since_now, until_now)
    for from = 1, #account.expired, FIELDS_AT_ONCE do
      local to = math.min(from + FIELDS_AT_ONCE - 1, #account.expired)
      call('HDEL', account.key, unpack(account.expired, from, to))
    end
    write_sums(account)
  end
end
