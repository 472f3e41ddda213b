-- The peers' numbers for what nginx does by itself (tests/test_as_peers.py has the others).
local outlier = require("headgate.outlier")
local round_robin = require("headgate.methods.round_robin")

describe("Ribbon's back-off", function()
  it("is 10, 20 and then 30 seconds, with base 10 s and cap 30 s", function()
    for failures = 3, 30 do
      local ribbon = math.min(30, 10 * 2 ^ math.min(failures - 3, 16))
      assert.equal(ribbon, outlier.length({ base_ms = 10000, cap_ms = 30000 }, failures - 2))
    end
  end)
end)

describe("Envoy's outlier detection", function()
  it("ejects for the base time as often as it was ejected, at most 300 s, at most 10 % and one at least", function()
    local envoy = { base_ms = 30000, cap_ms = 300000, max_ejected = 0.1 }
    for times = 1, 12 do
      assert.equal(math.min(30 * times, 300), outlier.length(envoy, times))
    end
    for size, most in pairs({ [1] = 1, [3] = 1, [10] = 1, [20] = 2, [100] = 10 }) do
      assert.is_true(outlier.allows(envoy.max_ejected, size, most - 1, size, false))
      assert.is_false(outlier.allows(envoy.max_ejected, size, most, size, false))
    end
  end)
end)

-- envoy#31378. Their cure is a random phase; ours is that, and the promise of first_pick_spec.lua.
describe("smooth weighted round robin without phases", function()
  local function first_pick(weight, phase)
    local servers = { { key = "cold", weight = weight } }
    for _, key in ipairs({ "a", "b", "c" }) do
      table.insert(servers, { key = key, weight = 100 })
    end
    local state = round_robin.new(servers, nil, phase)
    for pick = 1, 1000 do
      if round_robin.pick(state).key == "cold" then
        return pick
      end
    end
  end

  for weight, first in pairs({ [10] = 10, [1] = 76 }) do
    it(("picks a server at %d beside three at 100 first at request %d"):format(weight, first), function()
      assert.equal(first, first_pick(weight, function() return 0.5 end))
    end)
  end

  it("picks it at any request of its cycle with random ones", function()
    local seed, seen, latest = 7, {}, 0
    local function random()
      seed = (seed * 1664525 + 1013904223) % 4294967296
      return seed / 4294967296
    end
    for _ = 1, 300 do
      local first = first_pick(10, random)
      seen[math.ceil(first / 8)], latest = true, math.max(latest, first)
    end
    assert.is_true(latest <= 31 + 4)
    for part = 1, 3 do
      assert.is_true(seen[part])
    end
  end)
end)
