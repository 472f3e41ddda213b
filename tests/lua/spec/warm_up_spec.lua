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

describe("the share of a warming server", function()
  it("is that of Envoy's slow start", function()
    near(0.2, warm_up.share(12, 60, 1, 0.1))
    near(0.333, warm_up.share(20, 60, 1, 0.1))
    near(0.288, warm_up.share(5, 60, 1 / 2, 0.1), 0.001)
    near(0.658, warm_up.share(26, 60, 1 / 2, 0.1))
    near(0.932, warm_up.share(9, 10, 1 / 1.5, 0.1))
    near(0.35, warm_up.share(12, 60, 1, 0.35))
    near(0.5, warm_up.share(30, 60, 1, 0.35))
  end)

  it("is that of Sermant and of Dubbo", function()
    for elapsed, percent in pairs({ [30] = 6, [60] = 25, [90] = 56, [110] = 84, [119] = 98 }) do
      near(percent, warm_up.share(elapsed, 120, 2, 0.01) * 100, 0.51)
    end
    for elapsed, percent in pairs({ [6] = 1, [60] = 10, [180] = 30, [360] = 60 }) do
      near(percent, warm_up.share(elapsed, 600, 1, 0.01) * 100)
    end
  end)

  it("is full from the end on", function()
    assert.equal(1, warm_up.share(60, 60, 2, 0.1))
    assert.equal(1, warm_up.share(61, 60, 2, 0.1))
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
end)
