-- Limits and where they count: what scripts need that are given limits.

-- What may still be taken. As a difference of differences it is exact below 2^53.
local function room_in(account, limit)
  return (limit - account.spent) + (account.granted - account.held)
end

local function read_rate(key, limit, period)
  local row = call('HMGET', key, 'level', 'at', 'limit', 'kept_until')
  local drained_at = tonumber(row[2] or 0)
  local drained = limit * math.max(0, millisecond - drained_at)
  return {
    key = key,
    expired = {},
    is_new = not row[1],
    level = math.max(0, tonumber(row[1] or 0) - drained),
    drained_at = math.max(drained_at, millisecond),
    limit = limit,
    period = period,
    shown = row[3],
    kept_until = tonumber(row[4] or 0),
  }
end

-- What an entry's arguments begin with, and how many they are.
local ENTRY = 5

-- A limit and where it counts. KEYS[key] on: the account, its expiries. ARGV[at] on: where
-- the window starts, where it ends (empty: never), the kind, the limit, and of a rate the
-- thousandths of a second in which the limit drains. Nil where the caller computed the
-- window for another time than this. The entry's `at` is where more arguments may follow.
local function read_entry(key, at, expires_at)
  local ends_at, kind = ARGV[at + 1], ARGV[at + 2]
  if now < tonumber(ARGV[at]) or (ends_at ~= '' and now >= tonumber(ends_at)) then
    return nil
  end
  local limit = tonumber(ARGV[at + 3])
  local entry
  if kind == 'g' then
    entry = read_rate(KEYS[key], limit, tonumber(ARGV[at + 4]))
  else
    entry = read_account(KEYS[key], KEYS[key + 1], expires_at and expiry_field(expires_at, kind))
    entry.limit = limit
  end
  entry.at, entry.kind, entry.ends_at = at + ENTRY, kind, ends_at
  return entry
end

-- A limit's state: spent, held, when it resets, granted.
local function show_entry(entry)
  if entry.kind ~= 'g' then
    local resets_at = entry.ends_at ~= '' and entry.ends_at or '-'
    return format('%.0f %.0f %s %.0f', entry.spent, entry.held, resets_at, entry.granted)
  end
  if entry.level == 0 then
    return '0 0 - 0'
  end
  -- Apart, as their sum may pass 2^53.
  local drains = divide_up(entry.level, entry.limit)
  local over, over_at = math.fmod(drains, 1000), math.fmod(entry.drained_at, 1000)
  local resets_at = (drains - over) / 1000 + (entry.drained_at - over_at) / 1000
    + math.ceil((over + over_at) / 1000)
  return whole(divide_up(entry.level, entry.period)) .. ' 0 ' .. whole(resets_at) .. ' 0'
end
