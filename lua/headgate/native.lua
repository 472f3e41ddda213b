-- Requests that nginx balances by itself because the table does not know their upstream, counted while they are in
-- flight: the first table comes while some of them run, and a drain right after it must wait for them too, for nobody
-- knows at which server they are. Counted in the shared dict, by upstream and pid of the worker: this is no hot path.
local store = require("headgate.store")

local _M = {}

local state = store.state
local pid
local names, open = {}, 0 -- request -> upstream

local function key(process, name)
  return "native:" .. process .. ":" .. name
end

--- Forgets what a dead worker of the same pid left.
function _M.start(process)
  pid = process
  for _, each in ipairs(state:get_keys(0)) do
    if each:find("native:" .. pid .. ":", 1, true) == 1 then
      state:delete(each)
    end
  end
end

--- Counts a request that nginx balances natively. One that was counted already, a retry, stays as it is.
function _M.enter(request, name)
  if names[request] == name then
    return
  end
  _M.leave(request)
  names[request], open = name, open + 1
  state:incr(key(pid, name), 1, 0)
end

--- Ends the count of a request, if it has one.
function _M.leave(request)
  local name = open > 0 and names[request]
  if name then
    names[request], open = nil, open - 1
    state:incr(key(pid, name), -1)
  end
end

--- Requests of an upstream in flight that nginx balanced natively, in the living workers.
function _M.in_flight(name, pids)
  local sum = 0
  for _, process in ipairs(pids) do
    sum = sum + (state:get(key(process, name)) or 0)
  end
  return sum
end

return _M
