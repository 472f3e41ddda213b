-- A text with nginx's variables, as the directive `hash` takes one: $name, ${name} and what stands between.
local _M = {}

-- `name` is a number for what a regular expression has captured.
local function value_of(name)
  return ngx.var[name] or ""
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
      table.insert(parts, { text = plain, name = tonumber(name) or name })
      plain, from = "", last + 1
    else
      plain, from = plain .. text:sub(from, from), from + 1
    end
  end
  if #parts == 1 and parts[1].text == "" and plain == "" then
    local name = parts[1].name
    return function() return value_of(name) end
  end
  return function()
    local values = {}
    for i, part in ipairs(parts) do
      values[i] = part.text .. value_of(part.name)
    end
    return table.concat(values) .. plain
  end
end

return _M
