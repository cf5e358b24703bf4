-- Grants cells of limits to a node, and takes back what it did not use, on the server's clock: microseconds
-- since 2026, as decide.lua has them.
-- KEYS: the states, each a theoretical arrival time. For each in ARGV: what a cell adds, how long the burst takes to come
-- back, how many cells are wanted (below 0: given back), and how many are needed. Answers two numbers for each: how many
-- are granted, and if these are fewer than needed, how long until there are as many.
local time = redis.call('TIME')
local now = (time[1] - 1767225600) * 1000000 + time[2]
local states = redis.call('MGET', unpack(KEYS))
local answers, latest = {}, {}

for key = 1, #KEYS do
  local at = (key - 1) * 4
  local cell, window, want, need = ARGV[at + 1] + 0, ARGV[at + 2] + 0, ARGV[at + 3] + 0, ARGV[at + 4] + 0
  -- A key may be there twice: given back, and wanted again.
  local before = latest[KEYS[key]] or tonumber(states[key]) or now
  if before < now then before = now end
  local granted, wait = want, 0
  if want > 0 then
    granted = math.max(0, math.min(want, math.floor((now + window - before + 0.5) / cell)))
    if granted < need then wait = math.max(1, math.ceil(before + need * cell - now - window)) end
  end
  local tat = math.max(now, before + granted * cell)
  latest[KEYS[key]] = tat
  if granted ~= 0 then
    if tat > now then
      redis.call('SET', KEYS[key], string.format('%.3f', tat), 'PX', math.ceil((tat - now) / 1000) + 1)
    else
      redis.call('DEL', KEYS[key])
    end
  end
  answers[#answers + 1] = granted
  answers[#answers + 1] = wait
end
return answers
