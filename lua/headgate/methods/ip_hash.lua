-- PURE: a client's address decides. No clock, no nginx.
--
-- nginx's ngx_http_upstream_ip_hash_module. Servers that cannot serve keep their place, so only their own clients
-- move, and warm-ups have no effect: any changed weight would move nearly everybody.
local round_robin = require("headgate.methods.round_robin")
local slots = require("headgate.methods.slots")

local _M = { reweigh = round_robin.reweigh }

_M.new = slots.new

-- How many bytes of an address count: those of an IPv4 network of 24 bits, all of IPv6, none of a unix socket.
local function significant(address)
  return #address == 4 and 3 or #address == 16 and 16 or 0
end

-- The next number for a client; what has no address counts as three zeros.
local function following(hash, address)
  local count = significant(address)
  for i = 1, math.max(count, 3) do
    hash = (hash * 113 + (i <= count and address:byte(i) or 0)) % 6271
  end
  return hash
end

--- The server of a client, `address` being nginx's $binary_remote_addr, or where `refused(server)` is true the next
-- of its sequence; nil when all are refused.
function _M.pick_except(state, refused, _, address)
  return slots.pick(state, refused, following, 89, address)
end

return _M
