-- PURE: the server with the fewest requests in flight for its weight; ties by smooth round robin. No clock, no nginx.
--
-- nginx's ngx_http_upstream_least_conn_module, with weights that follow warm-ups. An idle server always has the fewest,
-- so one that warms would be given a request whenever it has none: a quarter of the traffic of four servers, whatever
-- its weight. So a warming server is also owed its picks, as in round robin, and is only looked at while it is owed
-- one; then it wins ties. The state is round robin's with `warming` added, {server, ring, owed} for each of those.
local round_robin = require("headgate.methods.round_robin")

local _M = { reweigh = round_robin.reweigh }

local min = math.min

--- As round_robin.new().
function _M.new(servers, previous, random)
  local state, owed = round_robin.new(servers, previous, random), {}
  for _, entry in ipairs(previous and previous.warming or {}) do
    owed[entry.server.key] = entry.owed
  end
  state.warming, state.entry_of = {}, {}
  for _, ring in ipairs(state.rings) do
    for _, server in ipairs(ring.servers) do
      if server.ramp then
        local entry = { server = server, ring = ring, owed = owed[server.key] or random() }
        table.insert(state.warming, entry)
        state.entry_of[server] = entry
      end
    end
  end
  return state
end

-- Servers tie in the pick under way whose `tie` is this number. No set for each pick, and no closure, which would end
-- the JIT's trace.
local number = 0

local function does_not_tie(server)
  return server.tie ~= number
end

-- The least loaded server that is not refused, whether others tie with it, and its entry if it warms. `patient`: those
-- that warm are left out until they are owed a pick.
local function least_loaded(state, refused, load, patient)
  local warming = #state.warming > 0
  local least, best, tied, best_entry = math.huge, nil, false, nil
  for _, ring in ipairs(state.rings) do
    for _, server in ipairs(ring.servers) do
      local entry = warming and state.entry_of[server]
      if not (patient and entry and entry.owed < 1) and not refused(server) then
        local relative = load(server) / ring.weight
        if relative < least or relative == least and entry and not best_entry then
          least, best, tied, best_entry = relative, server, false, entry
          number = number + 1
          server.tie = number
        elseif relative == least and not best_entry then
          tied = true
          server.tie = number
        end
      end
    end
  end
  return best, tied, best_entry
end

--- The server with the least load(server) / weight among those for which `refused(server)` is false; nil when all
-- are refused. `load` gives the requests in flight at a server.
function _M.pick_except(state, refused, load)
  local warming = state.warming
  for i = 1, #warming do
    local entry = warming[i]
    entry.owed = min(2, entry.owed + entry.ring.weight * state.gain)
  end
  local best, tied, entry = least_loaded(state, refused, load, true)
  if not best and #warming > 0 then
    best, tied, entry = least_loaded(state, refused, load, false)
  end
  if entry then
    entry.owed = entry.owed - 1
  elseif tied then
    return round_robin.pick_except(state, does_not_tie)
  end
  return best
end

return _M
