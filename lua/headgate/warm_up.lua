-- PURE: the weight of a server that warms up, and what becomes of its ramp when a new table arrives. No clock, no
-- nginx: `now` is an argument, in seconds on any monotonic clock.
--
-- A ramp is {epoch, duration, curve, floor, steps, held, begun, waiting, since, elapsed}, times in seconds:
--   since    set while it runs: the moment at which elapsed was 0
--   elapsed  set while it does not: frozen (held) or not started (waiting for the server's first request)
--   begun    it has run in this epoch, so it does not wait for a first request again
local _M = {}

local floor, max, min = math.floor, math.max, math.min

--- Share of the full weight at `elapsed` of a ramp: max(floor, (elapsed / duration) ^ curve), 1 from `duration` on.
-- Envoy's slow start (aggression = 1 / curve), Sermant's and Dubbo's warm-up are this formula with other parameters.
-- With n steps: max(floor, ((floor(n * elapsed / duration) + 1) / n) ^ curve); HAProxy's is 16 steps, floor 1/16.
function _M.share(ramp, elapsed)
  if elapsed >= ramp.duration then
    return 1
  end
  local progress = elapsed / ramp.duration
  if (ramp.steps or 0) > 0 then
    -- The small part keeps a step that begins at a moment without an exact binary form from beginning late.
    progress = (floor(ramp.steps * progress + 1e-9) + 1) / ramp.steps
  end
  if ramp.curve ~= 1 then
    progress = progress ^ ramp.curve
  end
  return max(ramp.floor, min(1, progress))
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
  ramp.waiting, ramp.begun = false, true
  ramp.since = moment - ramp.elapsed
  ramp.elapsed = nil
end

--- The ramp for a server's `warm_up` as it stands in a table (milliseconds; see table.lua).
-- `previous` is the ramp that this server had until now. While one of the same epoch runs, its own progress counts and
-- the table's `elapsed_ms` does not: the table's author knew that figure some time ago, nginx knows it now. A ramp that
-- is held stands where the table says, and goes on from where the table that ends the hold says.
function _M.ramp(warm_up, previous, now)
  local ramp = {
    epoch = warm_up.epoch,
    duration = warm_up.duration_ms / 1000,
    curve = warm_up.curve,
    floor = warm_up.floor,
    steps = warm_up.steps,
    held = warm_up.held,
    waiting = false,
  }
  local same = previous and previous.epoch == ramp.epoch
  if same and not previous.held and not ramp.held then
    ramp.since, ramp.elapsed, ramp.waiting, ramp.begun = previous.since, previous.elapsed, previous.waiting,
      previous.begun
    return ramp
  end
  local elapsed = warm_up.elapsed_ms / 1000
  ramp.begun = elapsed > 0 or same and previous.begun or warm_up.starts ~= "first-request"
  if ramp.held then
    ramp.elapsed = elapsed
  elseif not ramp.begun then
    ramp.waiting = true
    ramp.elapsed = 0
  else
    ramp.since = now - elapsed
  end
  return ramp
end

--- Lets the ramp of a table that is read again go on: `elapsed_ms` of its `warm_up` by so many milliseconds. One that
-- is held, or waits for a first request, stands still.
function _M.go_on(warm_up, ms)
  if not warm_up.held and (warm_up.elapsed_ms > 0 or warm_up.starts ~= "first-request") then
    warm_up.elapsed_ms = warm_up.elapsed_ms + ms
  end
end

return _M
