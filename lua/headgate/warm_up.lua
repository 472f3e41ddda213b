-- PURE: the weight of a server that warms up, and what becomes of its ramp when a new table arrives. No clock, no
-- nginx: `now` is an argument, in seconds on any monotonic clock.
--
-- A ramp is {epoch, duration, curve, floor, held, waiting, since, elapsed}, times in seconds:
--   since    set while it runs: the moment at which elapsed was 0
--   elapsed  set while it does not: frozen (held) or not started (waiting for the server's first request)
local _M = {}

local max = math.max

--- Share of the full weight at `elapsed` of a warm-up: max(floor, (elapsed / duration) ^ curve), 1 from `duration`
-- on. Envoy's slow start (aggression = 1 / curve), Sermant's and Dubbo's warm-up are this formula with other
-- parameters.
function _M.share(elapsed, duration, curve, floor)
  if elapsed >= duration then
    return 1
  end
  local progress = elapsed / duration
  if curve ~= 1 then
    progress = progress ^ curve
  end
  return max(floor, progress)
end

--- Seconds of the ramp that have passed at `now`.
function _M.elapsed(ramp, now)
  if ramp.since then
    return max(0, now - ramp.since)
  end
  return ramp.elapsed
end

--- Starts a waiting ramp at `moment`.
function _M.start(ramp, moment)
  ramp.waiting = false
  ramp.since = moment - ramp.elapsed
  ramp.elapsed = nil
end

--- The ramp for a server's `warm_up` as it stands in a table (milliseconds; see table.lua).
-- `previous` is the ramp that ran for this server until now. While its epoch and hold are the same, its own progress
-- counts and the table's `elapsed_ms` does not: the table's author knew that figure some time ago, nginx knows it
-- now.
function _M.ramp(warm_up, previous, now)
  local ramp = {
    epoch = warm_up.epoch,
    duration = warm_up.duration_ms / 1000,
    curve = warm_up.curve,
    floor = warm_up.floor,
    held = warm_up.held,
    waiting = false,
  }
  if previous and previous.epoch == ramp.epoch and previous.held == ramp.held then
    ramp.since, ramp.elapsed, ramp.waiting = previous.since, previous.elapsed, previous.waiting
    return ramp
  end
  local elapsed = warm_up.elapsed_ms / 1000
  if ramp.held then
    ramp.elapsed = elapsed
  elseif warm_up.starts == "first-request" and elapsed == 0 then
    ramp.waiting = true
    ramp.elapsed = 0
  else
    ramp.since = now - elapsed
  end
  return ramp
end

return _M
