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

--- The first server that a number points to and that can serve; nil when all of them are refused. The numbers are
-- following(`number`, key, 0), following(that, key, 1) and so on.
function _M.pick(state, refused, following, number, key)
  if #state.all > 1 then
    for i = 0, MAX_MISSES do
      number = following(number, key, i)
      local server = server_at(state, number % state.width)
      if server.eligible and not refused(server) then
        return server
      end
    end
  end
  return round_robin.pick_except(state, refused)
end

return _M
