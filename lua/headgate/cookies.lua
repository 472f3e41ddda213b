-- Session cookies (sticky.lua) of the request being served: read and set in the balancer's phase. nginx copies the
-- upstream's headers behind those that are set here, so both reach the client; no header filter is needed, and a
-- response from a cache, which passes no balancer, names no server.
local get_request = require("resty.core.base").get_request
local sticky = require("headgate.sticky")
local variable = require("headgate.variable")

local _M = {}

--- Sessions over `servers`, with `options` as the table has them.
function _M.new(options, servers)
  local sessions = sticky.new(options, servers, ngx.md5)
  sessions.read = variable.reader(sessions.variable)
  return sessions
end

--- The server that the request's cookie names, or nil.
function _M.named(sessions)
  return sticky.server(sessions, sessions.read(get_request()))
end

--- Lets the response name `server`, and no server of an earlier try.
function _M.set(sessions, server)
  ngx.header["Set-Cookie"] = sticky.replaced(sessions, ngx.header["Set-Cookie"], sticky.cookie(sessions, server))
end

return _M
