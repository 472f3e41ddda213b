package.preload["bit"] = package.preload["bit"] or bit32 and function() return bit32 end

local first_pick = require("headgate.first_pick")
local round_robin = require("headgate.methods.round_robin")

local METHODS = {
  round_robin = round_robin,
  least_conn = require("headgate.methods.least_conn"),
  ewma = require("headgate.methods.ewma"),
  ["random"] = require("headgate.methods.random"),
}

local function generator(seed)
  return function()
    seed = (seed * 1664525 + 1013904223) % 4294967296
    return seed / 4294967296
  end
end

local function never()
  return false
end

local function ramp(floor)
  return { epoch = 1, duration = 100, curve = 1, floor = floor, held = false, since = 0 }
end

-- Workers that pick from one upstream; what they share of it are `picks` and `picked`, by key.
local House = {}
House.__index = House

local function house(method, weights, ramps, workers, random)
  local made = setmetatable({ method = method, picks = 0, picked = {}, workers = {}, random = random }, House)
  for _ = 1, workers do
    local servers, waiting = {}, {}
    for key, weight in pairs(weights) do
      local server = { key = key, weight = weight, ramp = ramps[key] }
      table.insert(servers, server)
      if server.ramp then
        table.insert(waiting, { server = server, base = 0 })
      end
    end
    local state = method.new(servers, nil, random, { two = true, measure = function() return random() end })
    table.insert(made.workers, { state = state, watch = first_pick.new(waiting, state) })
  end
  return made
end

-- The next pick, by a random worker, at `now` of the ramps; its key.
function House:pick(now, refused)
  local worker = self.workers[math.floor(self.random() * #self.workers) + 1]
  self.method.reweigh(worker.state, now)
  self.picks = self.picks + 1
  local server = first_pick.due(worker.watch, self.picks, refused or never, function(server)
    return not self.picked[server.key]
  end)
  self.forced = server ~= nil
  server = server or self.method.pick_except(worker.state, refused or never, function() return 0 end)
  self.picked[server.key] = self.picked[server.key] or self.picks
  return server.key
end

local function total(weights)
  local sum = 0
  for _, weight in pairs(weights) do
    sum = sum + weight
  end
  return sum
end

describe("a warming server's first pick", function()
  -- The numbers of envoy#31378: three servers at 100 and one at 10 or 1.
  for weight, bound in pairs({ [10] = 31, [1] = 301 }) do
    for name, method in pairs(METHODS) do
      it(("comes within %d picks at weight %d beside three of 100, by %s"):format(bound, weight, name), function()
        local latest = 0
        for seed = 1, 60 do
          local made = house(method, { a = 100, b = 100, c = 100, cold = 100 }, { cold = ramp(weight / 100) },
            seed % 4 + 1, generator(seed))
          for _ = 1, bound do
            made:pick(0)
          end
          latest = math.max(latest, made.picked.cold or math.huge)
        end
        assert.is_true(latest <= bound)
      end)
    end
  end

  it("is in time for any weights, workers and methods, and however many warm at once", function()
    local random, forced = generator(11), 0
    for round = 1, 150 do
      local count, weights, ramps = 1 + math.floor(random() * 8), {}, {}
      for i = 1, count do
        weights["s" .. i] = 0.1 + 10 * random()
        if random() < 0.5 or i == 1 then
          ramps["s" .. i] = ramp(math.max(0.01, random() ^ 3))
        end
      end
      local shares = {}
      for key, weight in pairs(weights) do
        shares[key] = weight * (ramps[key] and ramps[key].floor or 1)
      end
      local sum, last = total(shares), 0
      for key in pairs(ramps) do
        last = math.max(last, math.ceil(sum / shares[key]))
      end
      for name, method in pairs(METHODS) do
        local made = house(method, weights, ramps, 1 + math.floor(random() * 5), generator(round))
        for _ = 1, last do
          made:pick(0)
          forced = forced + (made.forced and 1 or 0)
        end
        for key in pairs(ramps) do
          local bound = math.ceil(sum / shares[key] - 1e-9)
          assert.is_true(made.picked[key] ~= nil and made.picked[key] <= bound, name .. ", round " .. round)
        end
      end
    end
    assert.is_true(forced > 100)
  end)

  it("is due at once when a risen weight has moved its deadline into the past", function()
    local servers = { { key = "warm", weight = 1 }, { key = "cold", weight = 1, ramp = ramp(0.001) } }
    local state = round_robin.new(servers, nil, generator(1))
    local watch = first_pick.new({ { server = servers[2], base = 0 } }, state)
    local function yes() return true end
    round_robin.reweigh(state, 0)
    assert.is_nil(first_pick.due(watch, 20, never, yes))
    -- Half the weight: a third of the picks.
    round_robin.reweigh(state, 50)
    assert.equal(servers[2], first_pick.due(watch, 21, never, yes))
  end)

  it("comes late by no more than the number of those that wait, when all weights rise at once", function()
    local weights, ramps = {}, {}
    for i = 1, 6 do
      weights["s" .. i], ramps["s" .. i] = 1, ramp(0.001)
    end
    weights.warm = 1000
    local made = house(round_robin, weights, ramps, 3, generator(5))
    for _ = 1, 20 do
      made:pick(0)
    end
    local at, waiting = made.picks, 0
    for key in pairs(ramps) do
      waiting = waiting + (made.picked[key] and 0 or 1)
    end
    assert.equal(6, waiting)
    -- All at full weight: shares of 1/1006, due by pick 1006.
    for _ = at + 1, 1006 do
      made:pick(99.999)
    end
    for key in pairs(ramps) do
      assert.is_true(made.picked[key] <= 1006)
    end
  end)

  it("passes over a server that is refused, and is made up for when it is not any longer", function()
    local made = house(round_robin, { a = 1, b = 1, cold = 1 }, { cold = ramp(0.1) }, 2, generator(3))
    local function refused(server) return server.key == "cold" end
    for _ = 1, 50 do
      assert.is_true(made:pick(0, refused) ~= "cold")
    end
    assert.equal("cold", made:pick(0))
  end)

  it("is not forced again by a worker that did not see it", function()
    local made = house(round_robin, { a = 1, cold = 1 }, { cold = ramp(0.1) }, 2, generator(9))
    made.picked.cold = 1
    for _ = 1, 100 do
      made:pick(0)
      assert.is_false(made.forced)
    end
    for _, worker in ipairs(made.workers) do
      assert.equal(0, #worker.watch.waiting)
    end
  end)

  it("is given in the order of the deadlines", function()
    local servers = {}
    for i, weight in ipairs({ 1, 2, 4 }) do
      servers[i] = { key = "s" .. i, weight = weight }
    end
    local state, waiting = round_robin.new(servers, nil, generator(1)), {}
    for _, server in ipairs(servers) do
      table.insert(waiting, { server = server, base = 0 })
    end
    local watch, order = first_pick.new(waiting, state), {}
    for number = 1, 7 do
      local server = first_pick.due(watch, number, never, function() return true end)
      if server then
        table.insert(order, number .. server.key)
        first_pick.forget(watch, server)
      end
    end
    -- Shares 1/7, 2/7, 4/7: deadlines 7, 4, 2.
    assert.same({ "2s3", "4s2", "7s1" }, order)
  end)
end)
