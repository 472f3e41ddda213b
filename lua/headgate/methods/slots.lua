-- PURE: what plain hash and ip_hash have in common: a number points into the row of all servers, as wide as their
-- weights, those included that cannot serve now. The state is round robin's over the servers that can, with that row
-- added.
local round_robin = require("headgate.methods.round_robin")

local _M = {}

-- nginx's: so many numbers may hit a server that cannot serve, then round robin finds one.
local MAX_MISSES = 20

--- As round_robin.new(); `options.all` are the servers of the table in its order, with `eligible` false where one
-- must not be picked.
function _M.new(servers, previous, random, options)
  local state = round_robin.new(servers, previous, random)
  state.all, state.width = options.all, 0
  for _, server in ipairs(options.all) do
    state.width = state.width + server.weight
  end
  return state
end

local function server_at(state, place)
  local all = state.all
  for i = 1, #all - 1 do
    if place < all[i].weight then
      return all[i]
    end
    place = place - all[i].weight
  end
  return all[#all]
end

--- The first server that `next_number()`, called again and again, points to and that can serve; nil when all of them
-- are refused.
function _M.pick(state, refused, next_number)
  if #state.all > 1 then
    for _ = 0, MAX_MISSES do
      local server = server_at(state, next_number() % state.width)
      if server.eligible and not refused(server) then
        return server
      end
    end
  end
  return round_robin.pick_except(state, refused)
end

return _M
