-- PURE: smooth weighted round robin with fractional weights. No clock, no nginx, no shared memory.
--
-- nginx's algorithm: every server gains its weight at each pick, the largest sum is picked and pays the total of all
-- weights. Here sums are kept in units of the total ("picks owed"): a server gains weight / total and the picked one
-- pays 1. The sequence is nginx's; and since the unit does not depend on the weights, credits outlive any change of
-- table or weight without scaling.
--
-- Servers of one weight gain alike, so the order among them changes only by paying: the payer becomes the last. They
-- form a ring whose head is the best of them, and a pick compares heads only: O(number of different weights), not
-- O(servers). This holds while the credits within a ring differ by 1 at most, which new() establishes and paying
-- preserves.
local warm_up = require("headgate.warm_up")

local _M = {}

local huge = math.huge

local function by_credit(a, b)
  if a.credit ~= b.credit then
    return a.credit > b.credit
  end
  return a.position < b.position
end

local function new_ring(weight, entries)
  table.sort(entries, by_credit)
  local ring = { weight = weight, gained = 0, at = 1, size = #entries, servers = {}, credits = {} }
  for i, entry in ipairs(entries) do
    ring.servers[i] = entry.server
    ring.credits[i] = math.max(entry.credit, entries[1].credit - 1)
  end
  return ring
end

--- The credits of `state` by server key, their mean being 0.
function _M.credits(state)
  local credits, sum, count = {}, 0, 0
  for _, ring in ipairs(state.rings) do
    for i, server in ipairs(ring.servers) do
      local credit = ring.gained + ring.credits[i]
      credits[server.key] = credit
      sum, count = sum + credit, count + 1
    end
  end
  for key, credit in pairs(credits) do
    credits[key] = credit - sum / count
  end
  return credits
end

--- State for picking among `servers` ({key, weight, ramp or nil}; see warm_up.lua for ramps).
-- `previous` is the state to go on from, or nil; `random` returns numbers in [0, 1). A server that was not in
-- `previous` starts at a random phase of its cycle: it is not owed the past (no burst), and several workers do not
-- pick it in step.
function _M.new(servers, previous, random)
  local credits = previous and _M.credits(previous) or {}
  local state = { rings = {}, ramping = {}, fixed = 0, gain = 0, size = #servers }
  local by_weight, order = {}, {}
  for position, server in ipairs(servers) do
    local entry = { server = server, position = position, credit = credits[server.key] or random() - 0.5 }
    local ramp = server.ramp
    if ramp and not ramp.held then
      local ring = new_ring(0, { entry })
      state.rings[#state.rings + 1] = ring
      state.ramping[#state.ramping + 1] = ring
    else
      local weight = server.weight
      if ramp then
        weight = weight * warm_up.share(ramp, ramp.elapsed)
      end
      if not by_weight[weight] then
        by_weight[weight] = {}
        order[#order + 1] = weight
      end
      table.insert(by_weight[weight], entry)
      state.fixed = state.fixed + weight
    end
  end
  for _, weight in ipairs(order) do
    state.rings[#state.rings + 1] = new_ring(weight, by_weight[weight])
  end
  if #state.ramping == 0 then
    state.gain = 1 / state.fixed
  end
  return state
end

--- Brings the weights of warming servers up to `now`; true when none of them warms any longer (build a new state
-- then).
function _M.reweigh(state, now)
  local total, done = state.fixed, true
  for _, ring in ipairs(state.ramping) do
    local server = ring.servers[1]
    local ramp = server.ramp
    local elapsed = warm_up.elapsed(ramp, now)
    ring.weight = server.weight * warm_up.share(ramp, elapsed)
    total = total + ring.weight
    done = done and elapsed >= ramp.duration
  end
  state.gain = 1 / total
  return done
end

--- The next server, or nil when there is none at all. Weights of warming servers are those of the last reweigh().
function _M.pick(state)
  local rings, gain = state.rings, state.gain
  local best, top = nil, -huge
  for i = 1, #rings do
    local ring = rings[i]
    local gained = ring.gained + ring.weight * gain
    ring.gained = gained
    local credit = gained + ring.credits[ring.at]
    if credit > top then
      best, top = ring, credit
    end
  end
  if not best then
    return nil
  end
  local at = best.at
  best.credits[at] = best.credits[at] - 1
  best.at = at < best.size and at + 1 or 1
  return best.servers[at]
end

-- Index of the entry `distance` steps behind the ring's head.
local function index(ring, distance)
  return (ring.at - 1 + distance) % ring.size + 1
end

-- The server `distance` steps behind the ring's head pays for a pick, from `credit`, and becomes the last.
local function pay(ring, distance, credit)
  local server = ring.servers[index(ring, distance)]
  for step = distance, 1, -1 do
    local to, from = index(ring, step), index(ring, step - 1)
    ring.servers[to], ring.credits[to] = ring.servers[from], ring.credits[from]
  end
  ring.servers[ring.at], ring.credits[ring.at] = server, credit - 1
  ring.at = index(ring, 1)
  return server
end

-- Takes back what the server `distance` steps behind the ring's head has gained; it falls behind those that have more.
local function withdraw(ring, distance, gained)
  local at = index(ring, distance)
  local server = ring.servers[at]
  local credit = math.max(ring.credits[at] - gained, ring.credits[ring.at] - 1)
  while distance < ring.size - 1 and ring.credits[index(ring, distance + 1)] > credit do
    distance = distance + 1
    local from = index(ring, distance)
    ring.servers[at], ring.credits[at] = ring.servers[from], ring.credits[from]
    at = from
  end
  ring.servers[at], ring.credits[at] = server, credit
end

-- What a server of weight 1 gains at a retry: only those that were not tried share in it.
local function gain_without(state, tried)
  local total = 0
  for _, ring in ipairs(state.rings) do
    for _, server in ipairs(ring.servers) do
      total = total + (tried[server.key] and 0 or ring.weight)
    end
  end
  return total > 0 and 1 / total or 0
end

local function withdraw_from(state, tried, gain)
  for _, ring in ipairs(state.rings) do
    for distance = ring.size - 1, 0, -1 do
      if tried[ring.servers[index(ring, distance)].key] then
        withdraw(ring, distance, ring.weight * gain)
      end
    end
  end
end

--- Like pick(), among the servers for which `refused(server)` is false; nil when all are refused.
-- A refused server does not save up the turns that it missed. `tried`, nil or a set of keys, are those among them that
-- this very request had before: as in nginx they gain nothing, else a dead server would be the next one again as soon
-- as its request had gone elsewhere.
function _M.pick_except(state, refused, _, _, tried)
  local gain = tried and gain_without(state, tried) or state.gain
  local best, best_distance, top, passed = nil, nil, -huge, false
  for _, ring in ipairs(state.rings) do
    ring.gained = ring.gained + ring.weight * gain
    for distance = 0, ring.size - 1 do
      local at = index(ring, distance)
      if refused(ring.servers[at]) then
        passed = true
      else
        local credit = ring.gained + ring.credits[at]
        if credit > top then
          best, best_distance, top = ring, distance, credit
        end
        break
      end
    end
  end
  if not best then
    return nil
  end
  for _, ring in ipairs(passed and state.rings or {}) do
    for i = 1, ring.size do
      ring.credits[i] = math.min(ring.credits[i], top - ring.gained)
    end
  end
  local server = pay(best, best_distance, top - best.gained)
  if tried then
    withdraw_from(state, tried, gain)
  end
  return server
end

--- Like pick(), but the server is given: what others are owed grows as if it had been its turn.
function _M.take(state, server)
  for _, ring in ipairs(state.rings) do
    ring.gained = ring.gained + ring.weight * state.gain
    for distance = 0, ring.size - 1 do
      if ring.servers[index(ring, distance)] == server then
        pay(ring, distance, ring.credits[ring.at])
      end
    end
  end
end

return _M
