-- PURE: sessions by cookie. What a cookie says, and which server it names; where it is set stands in balancer.lua.
--
-- A cookie's value is the digest of the server's key: it says nothing of the address, is the same on every worker,
-- after every restart and on every edge, and servers that two upstreams share have one value in both. It is no secret
-- and no signature: a client that makes one up chooses among servers that it could reach anyway.
local _M = {}

local function attributes_of(options)
  local parts = { "; Path=" .. options.path }
  if options.max_age > 0 then
    table.insert(parts, "; Max-Age=" .. string.format("%d", options.max_age))
  end
  if options.secure then
    table.insert(parts, "; Secure")
  end
  if options.http_only then
    table.insert(parts, "; HttpOnly")
  end
  table.insert(parts, "; SameSite=" .. options.same_site)
  return table.concat(parts)
end

--- Sessions over `servers` ({key, …}); `options` as a table has them ("sticky"), `digest(text)` gives a text of fixed
-- length that is fit for a cookie. `variable` of the result is nginx's variable that holds a request's cookie.
function _M.new(options, servers, digest)
  local sticky = {
    variable = "cookie_" .. options.cookie, prefix = options.cookie .. "=", attributes = attributes_of(options),
    by_value = {}, values = {},
  }
  for _, server in ipairs(servers) do
    local value = digest(server.key)
    sticky.by_value[value], sticky.values[server] = server, value
  end
  return sticky
end

--- The server that a cookie's value names, nil for anything else.
function _M.server(sticky, value)
  return value and sticky.by_value[value]
end

--- The text of Set-Cookie for a server.
function _M.cookie(sticky, server)
  return sticky.prefix .. sticky.values[server] .. sticky.attributes
end

--- The values of Set-Cookie for a response that has `former` (nil, a text or a list of texts) so far: with `cookie` in
-- place of the one that an earlier try of the request has set.
function _M.replaced(sticky, former, cookie)
  local values = {}
  for _, value in ipairs(type(former) == "table" and former or { former }) do
    if value:sub(1, #sticky.prefix) ~= sticky.prefix then
      table.insert(values, value)
    end
  end
  table.insert(values, cookie)
  return values
end

return _M
