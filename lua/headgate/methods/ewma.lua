-- PURE: the quicker of two random servers, by peak EWMA of their response times. No clock, no nginx.
--
-- The measure is that of Finagle and linkerd: a slower answer counts at once and in full, quicker ones gradually, and
-- what is known fades with time, so that a server that was slow is tried again. The choice is random.pick_of_two(), by
-- which weights, and so ramps, hold. The state is round robin's with `random`, `measure` and the seed added.
local random_method = require("headgate.methods.random")
local round_robin = require("headgate.methods.round_robin")

local _M = { reweigh = round_robin.reweigh }

local exp, max = math.exp, math.max

--- Seconds in which a measure fades to 1/e.
_M.TAU = 10
-- Seconds. Without it load would not count where all that is known has faded to nothing.
local LEAST = 1e-6

--- A measure of `value` seconds, taken at `stamp`, as it stands at `now`.
function _M.faded(value, stamp, now)
  return value * exp(-max(0, now - stamp) / _M.TAU)
end

--- The measure after a try that took `seconds`, at `now`; `value` and `stamp` are those of the former one, `value` 0
-- for none. A try that `failed` can make a server look slower but never quicker, and measures none: errors are fast.
function _M.observe(value, stamp, seconds, now, failed)
  if failed then
    return value > 0 and max(value, seconds) or 0
  elseif seconds >= value then
    return max(seconds, LEAST)
  end
  local kept = exp(-max(0, now - stamp) / _M.TAU)
  return value * kept + seconds * (1 - kept)
end

--- As round_robin.new(); `options.measure(server)` gives a server's measure as it stands now, in seconds, nil without
-- one.
function _M.new(servers, previous, random, options)
  local state = round_robin.new(servers, previous, random)
  state.random, state.measure = random, options.measure
  state.seed, state.seed_picks = LEAST, 0
  return state
end

-- The mean of all measures, computed once in as many uses as there are servers: constant cost for each pick.
local function seed(state)
  if state.seed_picks == 0 then
    local sum, count = 0, 0
    for _, ring in ipairs(state.rings) do
      for _, server in ipairs(ring.servers) do
        local value = state.measure(server)
        if value then
          sum, count = sum + value, count + 1
        end
      end
    end
    state.seed, state.seed_picks = count > 0 and sum / count or LEAST, state.size
  end
  state.seed_picks = state.seed_picks - 1
  return state.seed
end

-- Seconds until the answer to one more request: those in flight are before it, and a server of half the mean weight
-- takes twice as long for each of them.
local function cost(state, server, weight, load)
  local value = state.measure(server) or seed(state)
  return max(value, LEAST) * (1 + load(server) / (weight * state.gain * state.size))
end

--- A server for which `refused(server)` is false; nil when all are refused. A server without a measure counts as quick
-- as the mean of the others. `load` gives the requests in flight at a server.
function _M.pick_except(state, refused, load)
  return random_method.pick_of_two(state, refused, load, cost)
end

return _M
