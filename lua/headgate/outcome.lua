-- What became of a try, read from nginx's variables about it.
--
-- upstream_status and upstream_header_time list tries with commas, and groups of them, one for each internal redirect
-- to an upstream, with colons. A try whose server is being picked stands behind a colon, too.
local variable = require("headgate.variable")

local _M = {}

local own_mark = variable.reader("upstream_http_x_headgate_offline")
local sermant_mark = variable.reader("upstream_http_sermant.grace.mark.shutdown.service.endpoint")

--- Kinds. NONE: neither a success nor a failure of the server, for instance a client that went away before the answer.
_M.NONE, _M.FAILED, _M.TIMED_OUT, _M.SERVER_ERROR, _M.ANSWERED = 0, 1, 2, 3, 4

--- The kind of the request's last try, and the seconds until its answer's header (nginx's milliseconds) where there was
-- one. `picking`: the one before the try that is being picked for.
function _M.read(picking)
  local statuses, times = ngx.var.upstream_status, ngx.var.upstream_header_time
  if picking and statuses and times then
    statuses, times = statuses:match("^(.*) : "), times:match("^(.*) : ")
  end
  if not statuses or not times then
    return _M.NONE
  end
  local status, seconds = statuses:match("(%S+)$"), times:match("(%S+)$")
  if seconds == "-" then
    return status == "504" and _M.TIMED_OUT or status == "502" and _M.FAILED or _M.NONE
  end
  return status:find("^5") and _M.SERVER_ERROR or _M.ANSWERED, tonumber(seconds)
end

local OWN = { [""] = true, ["1"] = true, ["true"] = true, ["on"] = true, ["yes"] = true }

-- Where the cache gave the response, its headers are those of another time and perhaps of another server.
local CACHED = { STALE = true, REVALIDATED = true, UPDATING = true, HIT = true }

--- Does the response that the request's last try got say that a server goes offline? nil when it does not; else whether
-- it is `address` itself, the server that sent it, and not another one. `request` is what get_request() gives, `kind`
-- the try's: nginx shows the headers of the try before where there was no answer. Sermant's second header names its
-- service and needs no reading.
function _M.mark(request, kind, address)
  if kind < _M.SERVER_ERROR then
    return nil
  end
  local mark = own_mark(request) or sermant_mark(request)
  if not mark or CACHED[ngx.var.upstream_cache_status] then
    return nil
  end
  mark = mark:lower()
  return OWN[mark] or mark == address
end

return _M
