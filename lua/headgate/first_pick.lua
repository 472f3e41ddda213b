-- PURE: a warming server's first pick in time. No clock, no nginx, no shared memory.
--
-- However small its weight, a server with share s of its upstream (its weight now, of all weights now) gets its first
-- pick within ceil(1 / s) picks of the upstream, those of all workers counted together. Methods alone do not promise
-- this: each worker starts at a phase of its own, and by chance a server may wait for long. The deadline follows the
-- weight at once. Where several wait, the earliest deadline is served first, and one is forced as soon as their slack
-- is used up: for some k, the k earliest deadlines leave k picks.
--
-- Shares add up to 1 at most, so servers that begin together are all in time. One that begins, or whose weight rises,
-- while others wait can push a deadline back by one pick for each server that waits.
local _M = {}

-- 1 / (10 / 310) is not above 31.
local ROUNDING = 1e-9

--- What is watched: `waiting` is a list of {server, base}, `base` being the upstream's picks when the server began to
-- wait; `state` is the method's state, made of rings (round_robin.lua).
function _M.new(waiting, state)
  local ring_of = {}
  for _, ring in ipairs(state.rings) do
    for _, server in ipairs(ring.servers) do
      ring_of[server] = ring
    end
  end
  for _, entry in ipairs(waiting) do
    entry.ring = ring_of[entry.server]
  end
  return { waiting = waiting, state = state }
end

--- The last of the upstream's picks by which an entry's server is due.
local function deadline(entry, gain)
  return entry.base + math.ceil(1 / (entry.ring.weight * gain) - ROUNDING)
end

-- By deadline; by insertion, since the order hardly changes from pick to pick.
local function sort(waiting)
  for i = 2, #waiting do
    local entry, at = waiting[i], i - 1
    while at > 0 and waiting[at].deadline > entry.deadline do
      waiting[at + 1] = waiting[at]
      at = at - 1
    end
    waiting[at + 1] = entry
  end
end

--- The server that must be picked now, nil when the method is free to choose. `number` is that of this pick of the
-- upstream. Servers for which `refused(server)` is true are passed over; `claim(server)` is asked before one is given
-- and says false when it has had its first pick already; it is forgotten then.
function _M.due(watch, number, refused, claim)
  local waiting = watch.waiting
  for _, entry in ipairs(waiting) do
    entry.deadline = deadline(entry, watch.state.gain)
  end
  sort(waiting)
  local at, place, forced = 1, 0, nil
  while at <= #waiting do
    local entry = waiting[at]
    if refused(entry.server) then
      at = at + 1
    else
      forced, place = forced or entry.server, place + 1
      if entry.deadline - number < place then
        if claim(forced) then
          return forced
        end
        _M.forget(watch, forced)
        at, place, forced = 1, 0, nil
      else
        at = at + 1
      end
    end
  end
end

--- Stops watching a server.
function _M.forget(watch, server)
  for at, entry in ipairs(watch.waiting) do
    if entry.server == server then
      table.remove(watch.waiting, at)
      return
    end
  end
end

return _M
