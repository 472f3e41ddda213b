-- PURE: a random server by weight, or the better of two random ones. No clock, no nginx.
--
-- nginx's ngx_http_upstream_random_module, with weights that follow warm-ups. Of two equal ones nginx takes the second,
-- so that with two idle servers the lighter one gets nearly everything. Here the first is drawn by weight, the second
-- evenly among the others, and the second takes the first one's place only if it is better: equal servers get their
-- share of the weights exactly. One that warms and is lighter then takes it only with the probability second weight /
-- first weight (Metropolis' rule), so that it never gets more than twice its share, however idle or quick it is.
--
-- The state is round robin's with `random` and `two` added.
local round_robin = require("headgate.methods.round_robin")

local _M = { reweigh = round_robin.reweigh }

local floor, min = math.floor, math.min

-- nginx's: so many draws may hit a server that cannot serve, then round robin finds one.
local MAX_MISSES = 20

--- As round_robin.new(); `options.two` for the less loaded of two.
function _M.new(servers, previous, random, options)
  local state = round_robin.new(servers, previous, random)
  state.random, state.two = random, options.two
  return state
end

-- A server drawn by weight, and its weight.
local function draw_by_weight(state)
  local rings, total = state.rings, 0
  for i = 1, #rings do
    total = total + rings[i].weight * rings[i].size
  end
  local at = state.random() * total
  for i = 1, #rings do
    local ring = rings[i]
    local whole = ring.weight * ring.size
    if at < whole or i == #rings then
      return ring.servers[min(floor(at / ring.weight) + 1, ring.size)], ring.weight
    end
    at = at - whole
  end
end

-- A server drawn evenly, and its weight.
local function draw_evenly(state)
  local rings, at = state.rings, floor(state.random() * state.size)
  for i = 1, #rings do
    local ring = rings[i]
    if at < ring.size then
      return ring.servers[at + 1], ring.weight
    end
    at = at - ring.size
  end
end

--- The better of two servers for which `refused(server)` is false: the one with the lower `cost(state, server, weight,
-- load)`, by the rule above. The only one that is not refused where there is no second; nil when all are refused.
function _M.pick_of_two(state, refused, load, cost)
  local first, first_weight
  local misses = state.size > 1 and 0 or MAX_MISSES + 1
  while misses <= MAX_MISSES do
    local server, weight
    if first then
      server, weight = draw_evenly(state)
    else
      server, weight = draw_by_weight(state)
    end
    if server == first or refused(server) then
      misses = misses + 1
    elseif not first then
      first, first_weight = server, weight
    else
      local admitted = not server.ramp or weight >= first_weight or state.random() * first_weight < weight
      if admitted and cost(state, server, weight, load) < cost(state, first, first_weight, load) then
        return server
      end
      return first
    end
  end
  return first or round_robin.pick_except(state, refused)
end

local function relative_load(_, server, weight, load)
  return load(server) / weight
end

--- A server for which `refused(server)` is false; nil when all are refused. `load` gives the requests in flight at a
-- server.
function _M.pick_except(state, refused, load)
  if state.two then
    return _M.pick_of_two(state, refused, load, relative_load)
  end
  for _ = 0, state.size > 1 and MAX_MISSES or -1 do
    local server = draw_by_weight(state)
    if not refused(server) then
      return server
    end
  end
  return round_robin.pick_except(state, refused)
end

return _M
