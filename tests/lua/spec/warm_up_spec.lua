local warm_up = require("headgate.warm_up")

local function near(expected, actual, tolerance)
  assert.is_true(math.abs(expected - actual) < (tolerance or 0.0006), actual .. " is not near " .. expected)
end

local function description(changes)
  local result = { epoch = 1, elapsed_ms = 0, duration_ms = 60000, curve = 1, floor = 0.1, held = false }
  result.starts = "healthy"
  for key, value in pairs(changes or {}) do
    result[key] = value
  end
  return result
end

local function share(elapsed, duration, curve, floor, steps)
  return warm_up.share({ duration = duration, curve = curve, floor = floor, steps = steps }, elapsed)
end

describe("the share of a warming server", function()
  it("is that of Envoy's slow start", function()
    near(0.2, share(12, 60, 1, 0.1))
    near(0.333, share(20, 60, 1, 0.1))
    near(0.288, share(5, 60, 1 / 2, 0.1), 0.001)
    near(0.658, share(26, 60, 1 / 2, 0.1))
    near(0.932, share(9, 10, 1 / 1.5, 0.1))
    near(0.35, share(12, 60, 1, 0.35))
    near(0.5, share(30, 60, 1, 0.35))
  end)

  it("is that of Sermant and of Dubbo", function()
    for elapsed, percent in pairs({ [30] = 6, [60] = 25, [90] = 56, [110] = 84, [119] = 98 }) do
      near(percent, share(elapsed, 120, 2, 0.01) * 100, 0.51)
    end
    for elapsed, percent in pairs({ [6] = 1, [60] = 10, [180] = 30, [360] = 60 }) do
      near(percent, share(elapsed, 600, 1, 0.01) * 100)
    end
  end)

  it("is that of HAProxy with 16 steps, and a stair of tenths with 10", function()
    local expected = {
      [0] = 6.25, [3] = 6.25, [4] = 12.5, [8] = 18.75, [15] = 31.25, [30] = 56.25, [45] = 81.25, [57] = 100,
    }
    for elapsed, percent in pairs(expected) do
      near(percent, share(elapsed, 60, 1, 1 / 16, 16) * 100)
    end
    for step = 0, 9 do
      near((step + 1) / 10, share(step * 0.7, 7, 1, 0.01, 10))
      near((step + 1) / 10, share(step * 0.7 + 0.69, 7, 1, 0.01, 10))
    end
    near(0.25, share(0, 60, 2, 0.01, 2))
  end)

  it("is full from the end on", function()
    assert.equal(1, share(60, 60, 2, 0.1))
    assert.equal(1, share(61, 60, 2, 0.1))
  end)
end)

describe("a ramp", function()
  it("runs from the put", function()
    local ramp = warm_up.ramp(description({ elapsed_ms = 1500 }), nil, 100)
    near(1.5, warm_up.elapsed(ramp, 100))
    near(11.5, warm_up.elapsed(ramp, 110))
  end)

  it("that waits for the first request stands still until it comes", function()
    local ramp = warm_up.ramp(description({ starts = "first-request" }), nil, 100)
    assert.is_true(ramp.waiting)
    assert.equal(0, warm_up.elapsed(ramp, 200))
    warm_up.start(ramp, 300)
    assert.is_false(ramp.waiting)
    near(7, warm_up.elapsed(ramp, 307))
  end)

  it("that has begun elsewhere does not wait again", function()
    assert.is_false(warm_up.ramp(description({ starts = "first-request", elapsed_ms = 1 }), nil, 0).waiting)
  end)

  it("that is held stands still", function()
    near(5, warm_up.elapsed(warm_up.ramp(description({ held = true, elapsed_ms = 5000 }), nil, 100), 900))
  end)

  it("keeps its own progress while epoch and hold stay the same", function()
    local first = warm_up.ramp(description(), nil, 100)
    local second = warm_up.ramp(description({ elapsed_ms = 3000, duration_ms = 30000 }), first, 110)
    near(10, warm_up.elapsed(second, 110))
    assert.equal(30, second.duration)
  end)

  it("takes the table's progress when it is held, released or begins a new epoch", function()
    local first = warm_up.ramp(description(), nil, 100)
    local held = warm_up.ramp(description({ elapsed_ms = 8000, held = true }), first, 110)
    near(8, warm_up.elapsed(held, 150))
    local released = warm_up.ramp(description({ elapsed_ms = 8000 }), held, 200)
    near(9, warm_up.elapsed(released, 201))
    near(0, warm_up.elapsed(warm_up.ramp(description({ epoch = 2 }), released, 300), 300))
  end)

  it("goes where the table says while it is held", function()
    local held = warm_up.ramp(description({ elapsed_ms = 8000, held = true }), nil, 100)
    local stepped_back = warm_up.ramp(description({ elapsed_ms = 2000, held = true }), held, 110)
    near(2, warm_up.elapsed(stepped_back, 150))
  end)

  it("goes on from a table that is read again, where it ran", function()
    for expected, changes in pairs({
      [7000] = { elapsed_ms = 2000 },
      [5000] = {},
      [5001] = { elapsed_ms = 1, starts = "first-request" },
      [0] = { starts = "first-request" },
      [3000] = { elapsed_ms = 3000, held = true },
    }) do
      local read = description(changes)
      warm_up.go_on(read, 5000)
      assert.equal(expected, read.elapsed_ms)
    end
  end)

  it("waits for a first request once in an epoch, whatever holds it", function()
    local late = { starts = "first-request" }
    local held = { starts = "first-request", held = true }
    local unseen = warm_up.ramp(description(held), warm_up.ramp(description(late), nil, 100), 110)
    assert.is_true(warm_up.ramp(description(late), unseen, 120).waiting)
    local seen = warm_up.ramp(description(late), nil, 100)
    warm_up.start(seen, 105)
    local released = warm_up.ramp(description(late), warm_up.ramp(description(held), seen, 110), 120)
    assert.is_false(released.waiting)
    near(3, warm_up.elapsed(released, 123))
  end)
end)
