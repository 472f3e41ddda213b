-- A text with nginx's variables, as the directive `hash` takes one: $name, ${name} and what stands between.
local get_request = require("resty.core.base").get_request
local variable = require("headgate.variable")

local _M = {}

-- A function without arguments for the value of a variable; $1 and so on are what a regular expression has captured.
local function reader(name)
  local number = tonumber(name)
  if number then
    return function() return ngx.var[number] or "" end
  end
  local read = variable.reader(name)
  return function() return read(get_request()) or "" end
end

--- A function without arguments that gives the text's value for the request being served. A variable without a value
-- is empty.
function _M.compile(text)
  local parts = {}
  local plain, from = "", 1
  while from <= #text do
    local first, last, name = text:find("^%${([%w_]+)}", from)
    if not first then
      first, last, name = text:find("^%$([%w_]+)", from)
    end
    if first then
      table.insert(parts, { text = plain, value = reader(name) })
      plain, from = "", last + 1
    else
      plain, from = plain .. text:sub(from, from), from + 1
    end
  end
  if #parts == 1 and parts[1].text == "" and plain == "" then
    return parts[1].value
  end
  return function()
    local values = {}
    for i, part in ipairs(parts) do
      values[i] = part.text .. part.value()
    end
    return table.concat(values) .. plain
  end
end

return _M
