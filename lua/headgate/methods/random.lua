-- PURE: a random server by weight, or the less loaded of two random ones. No clock, no nginx.
--
-- nginx's ngx_http_upstream_random_module, with weights that follow warm-ups. The state is round robin's with
-- `random` and `two` added.
local round_robin = require("headgate.methods.round_robin")

local _M = { reweigh = round_robin.reweigh }

-- nginx's: so many draws may hit a server that cannot serve, then round robin finds one.
local MAX_MISSES = 20

--- As round_robin.new(); `options.two` for the less loaded of two.
function _M.new(servers, previous, random, options)
  local state = round_robin.new(servers, previous, random)
  state.random, state.two = random, options.two
  return state
end

-- A server, and its weight.
local function draw(state)
  local rings, total = state.rings, 0
  for i = 1, #rings do
    total = total + rings[i].weight * rings[i].size
  end
  local at = state.random() * total
  for i = 1, #rings do
    local ring = rings[i]
    local whole = ring.weight * ring.size
    if at < whole or i == #rings then
      return ring.servers[math.min(math.floor(at / ring.weight) + 1, ring.size)], ring.weight
    end
    at = at - whole
  end
end

--- A server for which `refused(server)` is false; nil when all are refused. `load` gives the requests in flight at a
-- server.
function _M.pick_except(state, refused, load)
  local first, first_weight
  local misses = state.size > 1 and 0 or MAX_MISSES + 1
  while misses <= MAX_MISSES do
    local server, weight = draw(state)
    if server == first or refused(server) then
      misses = misses + 1
    elseif not state.two then
      return server
    elseif first then
      return load(server) * first_weight > load(first) * weight and first or server
    else
      first, first_weight = server, weight
    end
  end
  return round_robin.pick_except(state, refused)
end

return _M
