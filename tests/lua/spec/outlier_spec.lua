local outlier = require("headgate.outlier")

local envoy = { base_ms = 30000, cap_ms = 300000, max_ejected = 0.1 }

describe("an ejection", function()
  it("lasts longer each time, up to the cap, as Envoy's", function()
    for times, seconds in pairs({ [1] = 30, [2] = 60, [3] = 90, [10] = 300, [11] = 300 }) do
      assert.equal(seconds, outlier.length(envoy, times))
    end
  end)

  it("is lived down by time in traffic, one for each base length", function()
    for well, times in pairs({ [0] = 3, [29.9] = 3, [30] = 2, [60] = 1, [90] = 0, [900] = 0 }) do
      assert.equal(times, outlier.remembered(3, 1000, envoy.base_ms, 1000 + well))
    end
  end)

  it("that is still running has lived nothing down", function()
    assert.equal(3, outlier.remembered(3, 1000, envoy.base_ms, 900))
  end)
end)

describe("how much may be out at once", function()
  it("is the share of the servers, but one in any case", function()
    assert.is_true(outlier.allows(0.1, 30, 2, 28, true))
    assert.is_false(outlier.allows(0.1, 30, 3, 27, true))
    assert.is_true(outlier.allows(0.1, 4, 0, 4, true))
    assert.is_false(outlier.allows(0.1, 4, 1, 3, true))
    assert.is_true(outlier.allows(0, 4, 0, 4, true))
  end)

  it("never reaches the last server that serves, but one that does not serve may go", function()
    assert.is_false(outlier.allows(1, 4, 3, 1, true))
    assert.is_true(outlier.allows(1, 4, 2, 2, true))
    assert.is_true(outlier.allows(1, 4, 1, 1, false))
  end)
end)

describe("a repeated mark", function()
  it("is a lie for as long as the quarantine was, and longer each time", function()
    assert.is_false(outlier.lies(0, 0, 120000, 5))
    assert.is_true(outlier.lies(1, 1000, 120000, 1119))
    assert.is_false(outlier.lies(1, 1000, 120000, 1120))
    assert.is_true(outlier.lies(2, 1000, 120000, 1239))
    assert.is_false(outlier.lies(2, 1000, 120000, 1240))
  end)
end)
