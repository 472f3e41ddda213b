-- PURE: a client's address decides. No clock, no nginx.
--
-- nginx's ngx_http_upstream_ip_hash_module. Servers that cannot serve keep their place, so only their own clients
-- move, and warm-ups have no effect: any changed weight would move nearly everybody.
local round_robin = require("headgate.methods.round_robin")
local slots = require("headgate.methods.slots")

local _M = { reweigh = round_robin.reweigh }

_M.new = slots.new

-- What of an address counts: an IPv4 network of 24 bits, all of an IPv6 address, nothing of a unix socket.
local function significant(address)
  if #address == 4 then
    return { address:byte(1, 3) }
  elseif #address == 16 then
    return { address:byte(1, 16) }
  end
  return { 0, 0, 0 }
end

--- The server of a client, `address` being nginx's $binary_remote_addr, or where `refused(server)` is true the next
-- of its sequence; nil when all are refused.
function _M.pick_except(state, refused, _, address)
  local bytes, hash = significant(address), 89
  return slots.pick(state, refused, function()
    for i = 1, #bytes do
      hash = (hash * 113 + bytes[i]) % 6271
    end
    return hash
  end)
end

return _M
