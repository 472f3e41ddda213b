local cjson = require("cjson")
local lfs = require("lfs")
local table_format = require("headgate.table")

local directory = "tests/fixtures/tables/"

describe("a table", function()
  for file in lfs.dir(directory) do
    if file:match("%.json$") then
      local handle = assert(io.open(directory .. file))
      local case = cjson.decode(handle:read("*a"))
      handle:close()
      it("is judged as " .. file .. " expects", function()
        local wrong = table_format.validate(case.table)
        if case.expect.status == 200 then
          assert.is_nil(wrong)
          return
        end
        assert.is_not_nil(wrong)
        assert.equal(case.expect.code, wrong.code)
        assert.is_true(#wrong.remedy > 0)
        for _, word in ipairs(case.expect.mentions) do
          assert.is_truthy(wrong.message:find(word, 1, true), wrong.message .. " does not mention " .. word)
        end
      end)
    end
  end

  it("that is no object is refused", function()
    for _, value in ipairs({ "text", 3, true }) do
      assert.equal("invalid_json", table_format.validate(value).code)
    end
  end)

  it("lets servers that are up be picked, and those that are down where the upstream fails open", function()
    for _, state in ipairs({ "up", "down", "drain", "sessions", "maint", "quarantine", "waiting" }) do
      assert.equal(state == "up", table_format.eligible(state, false))
      assert.equal(state == "up" or state == "down", table_format.eligible(state, true))
    end
  end)
end)
