local ewma = require("headgate.methods.ewma")
local random_method = require("headgate.methods.random")

local function generator(seed)
  return function()
    seed = (seed * 1664525 + 1013904223) % 4294967296
    return seed / 4294967296
  end
end

local function never()
  return false
end

local function idle()
  return 0
end

-- State over servers {key, weight, seconds (nil: not measured), ramp}.
local function new(servers)
  return ewma.new(servers, nil, generator(1), { measure = function(server) return server.seconds end })
end

local function shares(state, picks, load)
  local counts = {}
  for _ = 1, picks do
    local key = ewma.pick_except(state, never, load or idle).key
    counts[key] = (counts[key] or 0) + 1
  end
  return counts
end

local function off(count, picks, share)
  return math.abs(count - picks * share) / math.sqrt(picks * share * (1 - share))
end

describe("peak EWMA", function()
  it("takes a slower answer at once and in full", function()
    assert.equal(0.5, ewma.observe(0.01, 100, 0.5, 100, false))
    assert.equal(0.5, ewma.observe(0, 0, 0.5, 100, false))
  end)

  it("takes quicker answers gradually, by how long ago the former one was", function()
    assert.near(1, ewma.observe(1, 100, 0.01, 100, false), 1e-9)
    assert.near(1 / math.exp(1) + 0.01 * (1 - 1 / math.exp(1)), ewma.observe(1, 100, 0.01, 110, false), 1e-9)
    assert.near(0.01, ewma.observe(1, 100, 0.01, 400, false), 1e-9)
  end)

  it("fades to 1/e in ten seconds, and does not grow where the clock of a stamp is ahead", function()
    assert.near(1 / math.exp(1), ewma.faded(1, 100, 110), 1e-9)
    assert.equal(1, ewma.faded(1, 100, 99))
  end)

  it("lets no failed try make a server look quicker, and counts one that took long", function()
    assert.equal(0.2, ewma.observe(0.2, 100, 0.001, 160, true))
    assert.equal(60, ewma.observe(0.2, 100, 60, 160, true))
    assert.equal(0, ewma.observe(0, 0, 0.001, 160, true))
  end)

  it("stays between the quickest and the slowest answer", function()
    local random, value, stamp = generator(7), 0, 0
    for now = 1, 2000 do
      value, stamp = ewma.observe(value, stamp, 0.01 + random(), now, false), now
      assert.is_true(value >= 0.01 and value <= 1.01)
    end
  end)
end)

describe("ewma", function()
  it("never picks the one that is slower than all others", function()
    local state = new({
      { key = "a", weight = 1, seconds = 0.01 }, { key = "b", weight = 1, seconds = 0.02 },
      { key = "c", weight = 1, seconds = 0.011 }, { key = "slow", weight = 5, seconds = 0.1 },
    })
    local counts = shares(state, 4000)
    assert.is_nil(counts.slow)
    assert.is_true(counts.a > counts.c and counts.c > counts.b)
  end)

  it("picks a slow one all the same when the quick ones have more before them", function()
    local state = new({ { key = "quick", weight = 1, seconds = 0.01 }, { key = "slow", weight = 1, seconds = 0.1 } })
    local function load(server) return server.key == "quick" and 10 or 0 end
    assert.same({ slow = 50 }, shares(state, 50, load))
  end)

  it("shares by weight among servers of one cost", function()
    local state = new({
      { key = "a", weight = 1, seconds = 0.01 }, { key = "b", weight = 2, seconds = 0.01 },
      { key = "c", weight = 5, seconds = 0.01 },
    })
    local counts = shares(state, 8000)
    for key, weight in pairs({ a = 1, b = 2, c = 5 }) do
      assert.is_true(off(counts[key], 8000, weight / 8) < 6)
    end
  end)

  it("counts each request in flight by what the server's weight makes of it", function()
    local state = new({ { key = "light", weight = 1, seconds = 0.01 }, { key = "heavy", weight = 3, seconds = 0.01 } })
    -- 1 + 2 / 0.5 against 1 + 4 / 1.5
    local function load(server) return server.key == "light" and 2 or 4 end
    assert.same({ heavy = 100 }, shares(state, 100, load))
  end)

  it("gives a warming server at most twice its share, however quick it is", function()
    for _, weight in ipairs({ 0.01, 0.1, 0.5 }) do
      for others = 1, 5 do
        local ramp = { epoch = 1, duration = 100, curve = 1, floor = weight, held = false, since = 0 }
        local servers = { { key = "cold", weight = 1, seconds = 0.001, ramp = ramp } }
        for i = 1, others do
          servers[i + 1] = { key = "warm" .. i, weight = 1, seconds = 0.1 }
        end
        local state = new(servers)
        ewma.reweigh(state, 0)
        local share, picks = weight / (weight + others), 20000
        local found = shares(state, picks).cold / picks
        assert.is_true(found <= 2 * share + 6 * math.sqrt(2 * share / picks))
        assert.is_true(found >= share - 6 * math.sqrt(share / picks))
      end
    end
  end)

  it("seeds a server without a measure with the mean of the others", function()
    local servers = {
      { key = "quick", weight = 1, seconds = 0.01 }, { key = "new", weight = 1 },
      { key = "slow", weight = 1, seconds = 0.09 },
    }
    local counts = shares(new(servers), 3000)
    assert.is_nil(counts.slow)
    -- Drawn together with the slow one it wins, with the quick one it loses: one pair in three.
    assert.is_true(off(counts.new, 3000, 1 / 3) < 6)
  end)

  it("shares by weight while nothing is measured", function()
    local counts = shares(new({ { key = "a", weight = 1 }, { key = "b", weight = 3 } }), 4000)
    assert.is_true(off(counts.b, 4000, 3 / 4) < 6)
  end)

  it("lets load count among servers whose measures have faded to nothing", function()
    local state = new({ { key = "busy", weight = 1, seconds = 0 }, { key = "idle", weight = 1, seconds = 0 } })
    assert.same({ idle = 50 }, shares(state, 50, function(server) return server.key == "busy" and 1 or 0 end))
  end)
end)

describe("random two", function()
  it("shares by weight while all are idle, a warming server's included", function()
    local ramp = { epoch = 1, duration = 100, curve = 1, floor = 0.1, held = false, since = 0 }
    local state = random_method.new({ { key = "warm", weight = 1 }, { key = "cold", weight = 1, ramp = ramp } }, nil,
      generator(3), { two = true })
    random_method.reweigh(state, 0)
    local cold = 0
    for _ = 1, 6000 do
      cold = cold + (random_method.pick_except(state, never, idle).key == "cold" and 1 or 0)
    end
    assert.is_true(off(cold, 6000, 1 / 11) < 6)
  end)
end)
