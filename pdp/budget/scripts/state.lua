-- How limits stand.
--
-- KEYS[2] on: of each limit its account and expiries
-- ARGV[5] on: of each what read_entry reads

local entries = {}
for number = 1, (#KEYS - 1) / 2 do
  entries[number] = read_entry(number * 2, 5 + (number - 1) * ENTRY)
  if not entries[number] then
    return tell_time()
  end
end
keep_clock()
local states = {}
for number, entry in ipairs(entries) do
  let_expired_go(entry)
  states[number] = show_entry(entry)
end
return {attempt, 'done', table.concat(states, ' ')}
