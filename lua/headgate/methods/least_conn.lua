-- PURE: the server with the fewest requests in flight for its weight; ties by smooth round robin. No clock, no nginx.
--
-- nginx's ngx_http_upstream_least_conn_module, with weights that follow warm-ups. The state is round robin's, and so
-- are new() and reweigh().
local round_robin = require("headgate.methods.round_robin")

local _M = { new = round_robin.new, reweigh = round_robin.reweigh }

--- The server with the least load(server) / weight among those for which `refused(server)` is false; nil when all
-- are refused. `load` gives the requests in flight at a server.
function _M.pick_except(state, refused, load)
  local least, best, tied = math.huge, nil, nil
  for _, ring in ipairs(state.rings) do
    for _, server in ipairs(ring.servers) do
      if not refused(server) then
        local relative = load(server) / ring.weight
        if relative < least then
          least, best, tied = relative, server, nil
        elseif relative == least then
          tied = tied or { [best] = true }
          tied[server] = true
        end
      end
    end
  end
  if not tied then
    return best
  end
  return round_robin.pick_except(state, function(server) return not tied[server] end)
end

return _M
