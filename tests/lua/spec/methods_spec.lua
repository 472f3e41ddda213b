-- LuaJIT's bit library, for the Lua that busted runs on.
package.preload["bit"] = package.preload["bit"] or bit32 and function() return bit32 end

local hash = require("headgate.methods.hash")
local ip_hash = require("headgate.methods.ip_hash")
local least_conn = require("headgate.methods.least_conn")
local random = require("headgate.methods.random")

-- A generator that gives the same numbers each time.
local function generator()
  local seed = 1
  return function()
    seed = (seed * 1664525 + 1013904223) % 4294967296
    return seed / 4294967296
  end
end

local function server(key, weight, fields)
  local made = { key = key, written = key, weight = weight, eligible = true }
  for name, value in pairs(fields or {}) do
    made[name] = value
  end
  return made
end

local function new(method, all, options)
  local eligible = {}
  for _, each in ipairs(all) do
    if each.eligible then
      table.insert(eligible, each)
    end
  end
  options = options or {}
  options.all = all
  return method.new(eligible, nil, generator(), options)
end

local function refusing(...)
  local keys = {}
  for _, key in ipairs({ ... }) do
    keys[key] = true
  end
  return function(each) return keys[each.key] or false end
end

local function loads(by_key)
  return function(each) return by_key[each.key] or 0 end
end

local function key_of(picked)
  return picked and picked.key
end

local function three()
  return { server("127.0.0.1:8001", 1), server("127.0.0.1:8002", 2), server("127.0.0.1:8003", 3) }
end

local METHODS = {
  least_conn = { least_conn },
  ["random"] = { random },
  ["random two"] = { random, { two = true } },
  ["hash"] = { hash },
  ["hash consistent"] = { hash, { consistent = true } },
  ip_hash = { ip_hash },
}

for name, method in pairs(METHODS) do
  describe(name, function()
    local function pick(state, refused, subject)
      return key_of(method[1].pick_except(state, refused, loads({}), subject or "\10\0\0\1"))
    end

    it("picks the one server that is not refused, whatever the subject", function()
      local state = new(method[1], three(), method[2])
      for i = 0, 255 do
        local address = "\10\0" .. string.char(i) .. "\1"
        assert.equal("127.0.0.1:8002", pick(state, refusing("127.0.0.1:8001", "127.0.0.1:8003"), address))
      end
    end)

    it("picks none when all are refused, and none when there is none", function()
      local all = refusing("127.0.0.1:8001", "127.0.0.1:8002", "127.0.0.1:8003")
      assert.is_nil(pick(new(method[1], three(), method[2]), all))
      assert.is_nil(pick(new(method[1], {}, method[2]), refusing()))
    end)

    it("picks a single server, and none that cannot serve", function()
      assert.equal("a", pick(new(method[1], { server("a", 1) }, method[2]), refusing()))
      assert.is_nil(pick(new(method[1], { server("a", 1, { eligible = false }) }, method[2]), refusing()))
    end)

    it("goes on from the state of another method", function()
      local state = new(METHODS.least_conn[1], three())
      local options = { all = three(), consistent = true }
      assert.is_truthy(pick(method[1].new(options.all, state, generator(), options), refusing()))
    end)
  end)
end

describe("least_conn", function()
  it("compares the load with the weight", function()
    local state = new(least_conn, three())
    local load = loads({ ["127.0.0.1:8001"] = 1, ["127.0.0.1:8002"] = 1, ["127.0.0.1:8003"] = 2 })
    assert.equal("127.0.0.1:8002", key_of(least_conn.pick_except(state, refusing(), load)))
  end)

  it("shares by weight while all are idle", function()
    local state, counts = new(least_conn, three()), {}
    for _ = 1, 60 do
      local key = key_of(least_conn.pick_except(state, refusing(), loads({})))
      counts[key] = (counts[key] or 0) + 1
    end
    assert.same({ ["127.0.0.1:8001"] = 10, ["127.0.0.1:8002"] = 20, ["127.0.0.1:8003"] = 30 }, counts)
  end)

  it("compares with the weight that a warming server has now", function()
    local ramp = { epoch = 1, duration = 100, curve = 1, floor = 0.1, held = false, since = 0 }
    local state = new(least_conn, { server("warm", 1), server("cold", 1, { ramp = ramp }) })
    assert.is_false(least_conn.reweigh(state, 25))
    local load = loads({ warm = 3, cold = 1 })
    for _ = 1, 20 do
      assert.equal("warm", least_conn.pick_except(state, refusing(), load).key)
    end
    least_conn.reweigh(state, 50)
    assert.equal("cold", least_conn.pick_except(state, refusing(), load).key)
  end)

  it("gives a server that warms no more than its share, though it is idle and all others are busy", function()
    for _, share in ipairs({ 0.01, 0.1, 0.25 }) do
      local ramp = { epoch = 1, duration = 100, curve = 1, floor = share, held = false, since = 0 }
      local state = new(least_conn, { server("a", 1), server("b", 1), server("cold", 1, { ramp = ramp }) })
      least_conn.reweigh(state, 0)
      for _, load in ipairs({ loads({ a = 2, b = 2 }), loads({}) }) do
        local cold = 0
        for _ = 1, 1000 do
          cold = cold + (least_conn.pick_except(state, refusing(), load).key == "cold" and 1 or 0)
        end
        assert.near(1000 * share / (2 + share), cold, 2)
      end
    end
  end)

  it("serves with servers that warm alone, and goes on from what they are owed", function()
    local ramp = { epoch = 1, duration = 100, curve = 1, floor = 0.1, held = false, since = 0 }
    local all = { server("a", 1, { ramp = ramp }), server("b", 1, { ramp = ramp }) }
    local state, counts = new(least_conn, all), {}
    for _ = 1, 50 do
      state = least_conn.new(all, state, generator())
      least_conn.reweigh(state, 0)
      local key = least_conn.pick_except(state, refusing(), loads({})).key
      counts[key] = (counts[key] or 0) + 1
    end
    assert.near(25, counts.a, 2)
  end)
end)

describe("random", function()
  it("shares by weight", function()
    local state, counts = new(random, three()), {}
    for _ = 1, 6000 do
      local key = key_of(random.pick_except(state, refusing(), loads({})))
      counts[key] = (counts[key] or 0) + 1
    end
    for i, key in ipairs({ "127.0.0.1:8001", "127.0.0.1:8002", "127.0.0.1:8003" }) do
      assert.is_true(math.abs(counts[key] - 1000 * i) < 6 * math.sqrt(6000 * i / 6 * (1 - i / 6)))
    end
  end)

  it("takes the less loaded of two", function()
    local state = new(random, { server("a", 1), server("b", 2) }, { two = true })
    for _ = 1, 50 do
      assert.equal("b", random.pick_except(state, refusing(), loads({ a = 2, b = 3 })).key)
      assert.equal("a", random.pick_except(state, refusing(), loads({ a = 1, b = 3 })).key)
    end
  end)
end)

local function mapping(method, all, options)
  local state, keys = new(method, all, options), {}
  for i = 1, 500 do
    local subject = method == ip_hash and string.char(10, i % 256, math.floor(i / 256), 1) or "key" .. i
    keys[i] = key_of(method.pick_except(state, refusing(), loads({}), subject))
  end
  return keys
end

for name, method in pairs({ ["hash"] = METHODS["hash"], ["hash consistent"] = METHODS["hash consistent"],
                            ip_hash = METHODS.ip_hash }) do
  describe(name, function()
    it("moves only the keys of a server that cannot serve, and spreads them", function()
      local all = three()
      local before = mapping(method[1], all, method[2])
      all[3].eligible = false
      local after, takers = mapping(method[1], all, method[2]), {}
      for i, key in ipairs(before) do
        if key == "127.0.0.1:8003" then
          takers[after[i]] = true
        else
          assert.equal(key, after[i])
        end
      end
      assert.same({ ["127.0.0.1:8001"] = true, ["127.0.0.1:8002"] = true }, takers)
    end)
  end)
end

describe("hash consistent", function()
  it("keeps its circle while addresses and weights stay", function()
    local state = new(hash, three(), { consistent = true })
    local same, other = three(), three()
    same[1].eligible = false
    other[1].weight = 2
    assert.equal(state.circle, hash.new(same, state, generator(), { all = same, consistent = true }).circle)
    assert.not_equal(state.circle, hash.new(other, state, generator(), { all = other, consistent = true }).circle)
  end)

  it("has 160 points for each weight, and one at least", function()
    assert.equal(1, new(hash, { server("a", 0.001) }, { consistent = true }).circle.size)
    assert.equal(6 * 160, new(hash, three(), { consistent = true }).circle.size)
  end)

  it("gives servers of one name the keys of the name in turn", function()
    local all = {
      server("app:80@10.0.0.1", 1, { written = "app:80" }), server("app:80@10.0.0.2", 1, { written = "app:80" }),
    }
    local state, seen = new(hash, all, { consistent = true }), {}
    for _ = 1, 4 do
      local key = hash.pick_except(state, refusing(), nil, "one").key
      seen[key] = (seen[key] or 0) + 1
    end
    assert.same({ ["app:80@10.0.0.1"] = 2, ["app:80@10.0.0.2"] = 2 }, seen)
  end)
end)

describe("hash consistent with a bound", function()
  local function bounded(all, bound)
    return new(hash, all, { consistent = true, bound = bound })
  end

  local function held(state, all, requests, refused)
    local carried = {}
    for _, each in ipairs(all) do
      carried[each.key] = 0
    end
    for i = 1, requests do
      local picked = hash.pick_except(state, refused or refusing(), loads(carried), "key" .. i % 7)
      carried[picked.key] = carried[picked.key] + 1
    end
    return carried
  end

  it("keeps every key where it is while its server has room", function()
    local all = three()
    local plain, bound = new(hash, all, { consistent = true }), bounded(all, 1.25)
    for i = 1, 300 do
      local load = loads({ ["127.0.0.1:8001"] = 5, ["127.0.0.1:8002"] = 10, ["127.0.0.1:8003"] = 15 })
      local subject = "key" .. i
      local unbound = hash.pick_except(plain, refusing(), load, subject)
      assert.equal(unbound, hash.pick_except(bound, refusing(), load, subject))
    end
  end)

  it("never lets a server carry more than its bound, whatever the keys", function()
    for _, factor in ipairs({ 1, 1.25, 2 }) do
      for requests = 1, 120 do
        local all = three()
        for i, each in ipairs(all) do
          assert.is_true(held(bounded(all, factor), all, requests)[each.key] <= math.ceil(factor * requests * i / 6))
        end
      end
    end
  end)

  it("takes one key to the next servers of its circle as they fill", function()
    local all, order = three(), {}
    local state, carried = bounded(all, 1), {}
    for _ = 1, 6 do
      local key = hash.pick_except(state, refusing(), loads(carried), "one").key
      carried[key] = (carried[key] or 0) + 1
      order[#order + 1] = key
    end
    assert.same({ ["127.0.0.1:8001"] = 1, ["127.0.0.1:8002"] = 2, ["127.0.0.1:8003"] = 3 }, carried)
    local plain = new(hash, all, { consistent = true })
    assert.equal(hash.pick_except(plain, refusing(), nil, "one").key, order[1])
  end)

  it("shares what refused servers cannot take among the others, and finds room as long as one is left", function()
    local all = three()
    local carried = held(bounded(all, 1), all, 30, refusing("127.0.0.1:8003"))
    assert.same({ ["127.0.0.1:8001"] = 10, ["127.0.0.1:8002"] = 20, ["127.0.0.1:8003"] = 0 }, carried)
    carried = held(bounded(all, 1), all, 30, refusing("127.0.0.1:8003", "127.0.0.1:8001"))
    assert.equal(30, carried["127.0.0.1:8002"])
  end)

  it("holds a warming server to the share of its ramp", function()
    local ramp = { epoch = 1, duration = 100, curve = 1, floor = 0.1, held = false, since = 0 }
    local all = { server("warm", 1), server("cold", 1, { ramp = ramp }) }
    local state = bounded(all, 1)
    hash.reweigh(state, 25)
    assert.is_true(held(state, all, 100).cold <= 20)
  end)

  it("is without effect on the plain hash", function()
    local all = three()
    assert.same(mapping(hash, all, {}), mapping(hash, all, { bound = 1 }))
  end)
end)

describe("ip_hash", function()
  it("looks at the first three bytes of an IPv4 address, at all of IPv6, and at none of a unix socket", function()
    local function at(address)
      return key_of(ip_hash.pick_except(new(ip_hash, three()), refusing(), nil, address))
    end
    local networks, hosts = {}, {}
    for i = 0, 255 do
      assert.equal(at("\10\1\2\3"), at("\10\1\2" .. string.char(i)))
      networks[at("\10\1" .. string.char(i) .. "\3")] = true
      hosts[at(("\0"):rep(15) .. string.char(i))] = true
    end
    for _, seen in ipairs({ networks, hosts }) do
      assert.is_truthy(seen["127.0.0.1:8001"] and seen["127.0.0.1:8002"] and seen["127.0.0.1:8003"])
    end
    assert.equal(at("unix:"), at(""))
  end)
end)
