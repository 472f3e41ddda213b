local round_robin = require("headgate.methods.round_robin")

local function middle()
  return 0.5
end

local function servers(weights)
  local list = {}
  for key, weight in pairs(weights) do
    list[#list + 1] = { key = key, weight = weight }
  end
  table.sort(list, function(a, b) return a.key < b.key end)
  return list
end

local function count(state, picks)
  local counts = {}
  for _ = 1, picks do
    local key = round_robin.pick(state).key
    counts[key] = (counts[key] or 0) + 1
  end
  return counts
end

local function is_a(server)
  return server.key == "a"
end

-- nginx's ngx_http_upstream_get_peer(), literally, for integer weights.
local function nginx_sequence(list, picks)
  local current, total, keys = {}, 0, {}
  for i, server in ipairs(list) do
    current[i], total = 0, total + server.weight
  end
  for _ = 1, picks do
    local best
    for i, server in ipairs(list) do
      current[i] = current[i] + server.weight
      if not best or current[i] > current[best] then
        best = i
      end
    end
    current[best] = current[best] - total
    keys[#keys + 1] = list[best].key
  end
  return table.concat(keys)
end

describe("round robin", function()
  it("picks in nginx's order", function()
    -- Weights whose total is a power of two, so that ties are ties in floating point, too; listed by weight, as rings
    -- stand.
    local cases = { { a = 1, b = 1, c = 1, d = 1 }, { a = 5, b = 2, c = 1 }, { a = 4, b = 4, c = 6, d = 2 } }
    for _, weights in ipairs(cases) do
      local list, keys = servers(weights), {}
      local state = round_robin.new(list, nil, middle)
      for _ = 1, 32 do
        keys[#keys + 1] = round_robin.pick(state).key
      end
      assert.equal(nginx_sequence(list, 32), table.concat(keys))
    end
  end)

  it("gives fractional weights their share", function()
    local state = round_robin.new(servers({ a = 0.25, b = 1.5, c = 2.25 }), nil, math.random)
    local counts = count(state, 1600)
    for key, expected in pairs({ a = 100, b = 600, c = 900 }) do
      assert.is_true(math.abs(counts[key] - expected) <= 1, key .. ": " .. counts[key])
    end
  end)

  it("returns nothing where there is no server", function()
    local state = round_robin.new({}, nil, math.random)
    assert.is_nil(round_robin.pick(state))
    assert.is_nil(round_robin.pick_except(state, function() return false end))
  end)

  it("is smooth in every window, for any weights and phases", function()
    for _ = 1, 50 do
      local weights, total = {}, 0
      for i = 1, math.random(2, 9) do
        local weight = math.random() < 0.5 and 1 or math.random(1, 40) / 8
        weights["s" .. i], total = weight, total + weight
      end
      local state = round_robin.new(servers(weights), nil, math.random)
      count(state, math.random(1, 50))
      local counts = count(state, 500)
      for key, weight in pairs(weights) do
        assert.is_true(math.abs((counts[key] or 0) - 500 * weight / total) < 3, key)
      end
    end
  end)

  it("spreads the first pick of a tiny weight over its whole cycle", function()
    local early, runs = 0, 400
    for _ = 1, runs do
      local state = round_robin.new(servers({ a = 99, tiny = 1 }), nil, math.random)
      local counts = count(state, 50)
      early = early + (counts.tiny or 0)
    end
    assert.is_true(math.abs(early / runs - 0.5) < 0.12, "share of runs with a pick in the first half: " .. early / runs)
  end)

  it("keeps its state over tables that change nothing", function()
    local list = servers({ a = 3, b = 2, c = 2, d = 1 })
    local undisturbed, disturbed = round_robin.new(list, nil, middle), round_robin.new(list, nil, middle)
    for _ = 1, 64 do
      local counted = round_robin.pick(undisturbed).key
      assert.equal(counted, round_robin.pick(disturbed).key)
      disturbed = round_robin.new(list, disturbed, error)
    end
  end)

  it("gives no burst to a server that comes in, comes back or changes its weight", function()
    local state = round_robin.new(servers({ a = 1, b = 1 }), nil, math.random)
    count(state, 1001)
    for _ = 1, 100 do
      state = round_robin.new(servers({ a = 1, b = 1, c = 1 }), state, math.random)
      local counts = count(state, 3)
      assert.is_true((counts.c or 0) <= 2)
      count(state, 300)
      state = round_robin.new(servers({ a = 1, b = 1, c = 0.01 }), state, math.random)
      assert.is_true((count(state, 20).c or 0) <= 1)
      state = round_robin.new(servers({ a = 1, b = 1 }), state, math.random)
      count(state, 300)
    end
  end)

  it("passes over refused servers, and they save nothing up", function()
    for _, weights in ipairs({ { a = 1, b = 1, c = 1 }, { a = 3, b = 2, c = 1 }, { a = 1, b = 5, c = 5 } }) do
      local state = round_robin.new(servers(weights), nil, math.random)
      for _ = 1, 300 do
        assert.not_equal("a", round_robin.pick_except(state, is_a).key)
      end
      local total = weights.a + weights.b + weights.c
      local counts = count(state, 10 * total)
      assert.is_true(math.abs(counts.a - 10 * weights.a) <= 2, "a after its absence: " .. counts.a)
      assert.is_nil(round_robin.pick_except(state, function() return true end))
    end
  end)

  it("tries a dead server first at its share of the requests: one that was tried gains nothing by the retry", function()
    local cases = { { a = 1, b = 1 }, { a = 1, b = 1, c = 1, d = 1, e = 1 }, { a = 3, b = 1, c = 3 }, { a = 1, b = 4 } }
    for _, weights in ipairs(cases) do
      local list, total, dead = servers(weights), 0, 0
      for _, weight in pairs(weights) do
        total = total + weight
      end
      local state = round_robin.new(list, nil, math.random)
      for _ = 1, 100 * total do
        if round_robin.pick(state).key == "a" then
          dead = dead + 1
          assert.not_equal("a", round_robin.pick_except(state, is_a, nil, nil, { a = true }).key)
        end
      end
      -- A little more than nginx's exact share: credits within a ring stay within 1 of each other.
      assert.is_true(math.abs(dead / (100 * weights.a) - 1) <= 0.06, dead .. " first tries of " .. 100 * total)
      assert.is_nil(round_robin.pick_except(state, function() return true end, nil, nil, { a = true }))
    end
  end)

  it("follows a ramp, and says when none is left", function()
    local ramp = { duration = 10, curve = 1, floor = 0.1, held = false, since = 0 }
    local list = { { key = "warm", weight = 1 }, { key = "cold", weight = 1, ramp = ramp } }
    local state = round_robin.new(list, nil, math.random)
    local picked, expected = 0, 0
    for i = 0, 999 do
      local now = i / 100
      assert.is_false(round_robin.reweigh(state, now))
      local share = math.max(0.1, now / 10)
      expected = expected + share / (1 + share)
      picked = picked + (round_robin.pick(state).key == "cold" and 1 or 0)
    end
    assert.is_true(math.abs(picked - expected) < 2, picked .. " picks, expected " .. expected)
    assert.is_true(round_robin.reweigh(state, 10))
  end)

  it("freezes the share of a held ramp", function()
    local ramp = { duration = 10, curve = 1, floor = 0.1, held = true, elapsed = 2.5 }
    local list = { { key = "warm", weight = 1 }, { key = "cold", weight = 1, ramp = ramp } }
    local state = round_robin.new(list, nil, math.random)
    assert.is_true(math.abs(count(state, 1000).cold - 200) <= 1)
  end)

  it("goes on after a pick that was made for it as if it had been its own", function()
    local list = servers({ a = 3, b = 3, c = 1 })
    for forced = 1, 3 do
      local state = round_robin.new(list, nil, middle)
      local counts = { a = 0, b = 0, c = 0 }
      for turn = 1, 70 do
        local server = list[forced]
        if turn % 35 == 1 then
          round_robin.take(state, server)
        else
          server = round_robin.pick(state)
        end
        counts[server.key] = counts[server.key] + 1
      end
      assert.near(30, counts.a, 1)
      assert.near(30, counts.b, 1)
      assert.near(10, counts.c, 1)
    end
  end)
end)
