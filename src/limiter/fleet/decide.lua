-- Decides all limits of a request as one, on the server's clock: microseconds since 2026, with a fraction. A double holds
-- them to some nanoseconds; half a microsecond is forgiven, so that no rounding takes a cell of a burst.
-- KEYS: the states, each a theoretical arrival time. ARGV[1]: 0 asks, 1 charges what passes, 2 charges whatever comes of it.
-- Then for each check: what it adds, how long its burst takes to come back, whether it enforces, whether a second one
-- follows; and of that, what it adds and its burst. Answers for each: 0 allowed, -1 by the second, else how long to wait.
local time = redis.call('TIME')
local now = (time[1] - 1767225600) * 1000000 + time[2]
local states = redis.call('MGET', unpack(KEYS))
local mode = ARGV[1]
local answers, times = {}, {}
local pass = true
local arg, key = 2, 1

local function take(key, adds, window)
  local tat = tonumber(states[key]) or now
  if tat < now then tat = now end
  tat = tat + adds
  if tat <= now + window + 0.5 or mode == '2' then
    times[key] = tat
    return 0
  end
  return math.ceil(tat - now - window)
end

while arg <= #ARGV do
  local answer = take(key, ARGV[arg] + 0, ARGV[arg + 1] + 0)
  local enforces = ARGV[arg + 2] == '1'
  local second = ARGV[arg + 3] == '1'
  arg, key = arg + 4, key + 1
  if second then
    if answer > 0 and take(key, ARGV[arg] + 0, ARGV[arg + 1] + 0) == 0 then answer = -1 end
    arg, key = arg + 2, key + 1
  end
  if answer > 0 and enforces then pass = false end
  answers[#answers + 1] = answer
end

if pass and mode ~= '0' then
  for key, tat in pairs(times) do
    redis.call('SET', KEYS[key], string.format('%.3f', tat), 'PX', math.ceil((tat - now) / 1000) + 1)
  end
end
return answers
