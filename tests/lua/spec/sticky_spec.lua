local sticky = require("headgate.sticky")

local function digest(text)
  return (text:gsub(".", function(c) return string.format("%02x", 255 - c:byte()) end))
end

local servers = { { key = "10.0.0.1:80" }, { key = "10.0.0.2:80" } }

local function new(options)
  local all = { cookie = "route", path = "/", secure = false, http_only = false, same_site = "Lax", max_age = 0 }
  for name, value in pairs(options or {}) do
    all[name] = value
  end
  return sticky.new(all, servers, digest)
end

describe("a session cookie", function()
  it("names its server by the digest of the key", function()
    local made = new()
    assert.equal("cookie_route", made.variable)
    assert.equal(servers[2], sticky.server(made, digest("10.0.0.2:80")))
    assert.equal("route=" .. digest("10.0.0.1:80") .. "; Path=/; SameSite=Lax", sticky.cookie(made, servers[1]))
  end)

  it("of another's making names none", function()
    local made = new()
    for _, value in ipairs({ "", "10.0.0.1:80", digest("10.0.0.3:80"), digest("10.0.0.1:80"):upper() .. " ",
                             ("x"):rep(8000), "\0", "variable" }) do
      assert.is_nil(sticky.server(made, value))
    end
    assert.is_nil(sticky.server(made, nil))
  end)

  it("has the attributes that are wished", function()
    local value = "route=" .. digest("10.0.0.1:80")
    local cases = {
      { { path = "/app", secure = true, http_only = true, same_site = "Lax", max_age = 3600 },
        "; Path=/app; Max-Age=3600; Secure; HttpOnly; SameSite=Lax" },
      { { same_site = "Strict", http_only = true }, "; Path=/; HttpOnly; SameSite=Strict" },
      { { same_site = "None", secure = true }, "; Path=/; Secure; SameSite=None" },
      { { max_age = 31536000 }, "; Path=/; Max-Age=31536000; SameSite=Lax" },
    }
    for _, case in ipairs(cases) do
      assert.equal(value .. case[2], sticky.cookie(new(case[1]), servers[1]))
    end
  end)

  it("takes the place of the one that an earlier try has set, and of no other", function()
    local made = new()
    assert.same({ "route=b" }, sticky.replaced(made, nil, "route=b"))
    assert.same({ "route=b" }, sticky.replaced(made, "route=a; Path=/", "route=b"))
    assert.same({ "user=1", "routes=2", "route=b" },
      sticky.replaced(made, { "user=1", "route=a", "routes=2" }, "route=b"))
    assert.same({ "user=1", "route=b" }, sticky.replaced(made, "user=1", "route=b"))
  end)
end)
