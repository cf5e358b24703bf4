-- Whether this server evicts keys that have not expired when its memory is full. A server that does not let us ask does not.
local info = redis.pcall('INFO', 'memory')
if type(info) ~= 'string' then return {0} end
local bound = string.match(info, 'maxmemory:(%d+)')
local policy = string.match(info, 'maxmemory_policy:(%S+)')
return {bound ~= '0' and policy ~= 'noeviction' and 1 or 0}
