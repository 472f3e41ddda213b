-- Mutual exclusion between all processes of this nginx, by the shared dict.
local system = require("headgate.system")

local _M = {}

local state = ngx.shared.headgate_state

--- Runs `work(...)` while no other process holds the lock `name`; `pause(seconds)` waits for a turn. Returns what
-- `work` returns, or nil, "busy". `seconds`, longer than `work` takes by far, end the lock of a process that was killed
-- inside.
function _M.hold(name, seconds, pause, work, ...)
  local key = "lock:" .. name
  local patience = system.monotonic() + 2 * seconds
  while not state:add(key, ngx.worker.pid(), seconds) do
    if system.monotonic() > patience then
      return nil, "busy"
    end
    pause(0.001)
  end
  local results = { pcall(work, ...) }
  state:delete(key)
  if not results[1] then
    error(results[2], 0)
  end
  return unpack(results, 2, 3)
end

return _M
