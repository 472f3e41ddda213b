-- First picks of warming servers (first_pick.lua) over all workers: what they share of it, in the shared dict.
--
-- An upstream's picks are counted only while a worker knows of a warming server without its first one; each such ramp
-- begins to wait at the count of its table (`base`, store.lua). A server that is forced is claimed before, so that two
-- workers do not spend two picks on it; a claim that is not confirmed, because a newer table came during that pick,
-- ends by itself.
local first_pick = require("headgate.first_pick")
local store = require("headgate.store")

local _M = {}

local state = store.state
-- Longer than a pick by far.
local CLAIM_SECONDS = 1

-- The key that this worker has claimed and not confirmed. A pick that is repeated under a newer table may use it.
local claimed

--- What is to be watched in upstream `name` among `servers` whose method's state is `method_state`; nil when every
-- warming server has had its first pick.
function _M.watch(name, servers, method_state)
  local waiting = {}
  for _, server in ipairs(servers) do
    server.first_key = nil
    local ramp = server.ramp
    if ramp and not store.was_picked(name, server.key, ramp.epoch) then
      server.first_key = store.first_key(name, server.key, ramp.epoch)
      table.insert(waiting, { server = server, base = ramp.base })
    end
  end
  if #waiting == 0 then
    return nil
  end
  local watch = first_pick.new(waiting, method_state)
  watch.picks_key = store.picks_key(name)
  return watch
end

local function claim(server)
  local key = server.first_key
  if key ~= claimed and not state:safe_add(key, false, CLAIM_SECONDS) then
    return false
  end
  claimed = key
  return true
end

--- Counts a pick of the watched upstream. The server that it must go to, nil when the method may choose.
function _M.due(watch, refused)
  local number = state:incr(watch.picks_key, 1, 0)
  return number and first_pick.due(watch, number, refused, claim)
end

--- Notes that a server with a `first_key` was picked; `watch` may be nil by then.
function _M.confirm(watch, server)
  state:set(server.first_key, true)
  claimed, server.first_key = nil, nil
  if watch then
    first_pick.forget(watch, server)
  end
end

return _M
