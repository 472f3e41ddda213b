-- PURE: what a routing table must look like, and the first thing that is wrong with one. Table format 1:
--   {"format": 1, "revision": N, "upstreams": {NAME: {"method", "fail_open", "servers": [
--     {"key", "ip", "port", "weight", "state", "backup", "max_conns", "warm_up": null |
--      {"epoch", "elapsed_ms", "duration_ms", "curve", "floor", "starts", "held"}}]}}}
-- With method hash an upstream has "key" too, and may have "consistent" and "bound"; with random it may have "two". An
-- upstream may have "sticky", "ignore_paths", "outlier" and "quarantine_ms"; a server "address", "outlier" and
-- "forgive"; a warm_up "steps"; the table "written", the moment of which its "elapsed_ms" speak. Unknown fields are
-- ignored. Who may be picked is said here as well: it is a property of the format.
local _M = {}

_M.FORMAT = 1
-- What JSON numbers carry exactly through the encoder (14 digits).
_M.MAX_REVISION = 99999999999999
_M.METHODS = { round_robin = true, least_conn = true, ewma = true, hash = true, ip_hash = true, random = true }

local STATES = {
  up = true, down = true, drain = true, sessions = true, maint = true, quarantine = true, waiting = true,
}
local SAME_SITE = { Lax = true, Strict = true, None = true }
local STARTS = { healthy = true, ["first-request"] = true }
local MAX_UNIX_PATH = 107

--- May a server with this state get new requests? With "sessions" only those whose cookie names it.
function _M.eligible(state, fail_open)
  return state == "up" or (fail_open and state == "down")
end

local function is_number(value)
  return type(value) == "number" and value == value and value < math.huge and value > -math.huge
end

local function is_integer(value, low, high)
  return is_number(value) and value >= low and value <= high and value == math.floor(value)
end

local function is_ipv4(text)
  local parts = { text:match("^(%d%d?%d?)%.(%d%d?%d?)%.(%d%d?%d?)%.(%d%d?%d?)$") }
  for _, part in ipairs(parts) do
    if tonumber(part) > 255 then
      return false
    end
  end
  return #parts == 4
end

-- Groups of at most four digits; eight of them, or fewer around one "::"; an IPv4 address in place of the last two.
local function is_ipv6(text)
  local head, tail = text:match("^(.*:)([%d.]+%.[%d.]+)$")
  if head then
    if not is_ipv4(tail) then
      return false
    end
    text = head .. "0:0"
  end
  local elided = text:find("::", 1, true)
  if text:find(":::", 1, true) or (elided and text:find("::", elided + 1, true)) then
    return false
  end
  if text:find("^:[^:]") or text:find("[^:]:$") then
    return false
  end
  local groups = 0
  for group in text:gmatch("[^:]+") do
    if not group:match("^%x%x?%x?%x?$") then
      return false
    end
    groups = groups + 1
  end
  if elided then
    return groups <= 7
  end
  return groups == 8
end

local checks = {
  { "key", function(v) return type(v) == "string" and v ~= "" end, "a non-empty string" },
  { "ip", function(v)
    if type(v) ~= "string" then
      return false
    end
    local path = v:match("^unix:(/.*)$")
    return path and #path <= MAX_UNIX_PATH and not path:find("%z") or is_ipv4(v) or v:find(":", 1, true) and is_ipv6(v)
  end, 'an IPv4 or IPv6 address without brackets, or "unix:/path"' },
  { "address", function(v) return v == nil or type(v) == "string" and v ~= "" end, "a non-empty string, or absent" },
  { "port", function(v, server)
    if type(server.ip) == "string" and server.ip:find("^unix:") then
      return v == 0
    end
    return is_integer(v, 1, 65535)
  end, "an integer from 1 to 65535 (0 with a unix socket)" },
  { "weight", function(v) return is_number(v) and v > 0 end, "a number above 0 (to stop traffic, set the state)" },
  { "state", function(v) return STATES[v] ~= nil end, "one of up, down, drain, sessions, maint, quarantine, waiting" },
  { "backup", function(v) return type(v) == "boolean" end, "true or false" },
  { "max_conns", function(v) return is_integer(v, 0, 2 ^ 31) end, "an integer, 0 for no limit" },
  { "outlier", function(v) return v == nil or type(v) == "boolean" end, "true or false, or absent" },
  { "forgive", function(v) return v == nil or is_integer(v, 0, _M.MAX_REVISION) end,
    "an integer, 0 or more, or absent" },
}

local function is_optional_boolean(value)
  return value == nil or type(value) == "boolean"
end

local function is_list_of_paths(value)
  if type(value) ~= "table" then
    return value == nil
  end
  for i, path in pairs(value) do
    if type(i) ~= "number" or type(path) ~= "string" or path:sub(1, 1) ~= "/" then
      return false
    end
  end
  return true
end

local function is_count(value)
  return is_integer(value, 0, 1e6)
end

local upstream_checks = {
  { "fail_open", function(v) return type(v) == "boolean" end, "true or false" },
  { "ignore_paths", is_list_of_paths, 'a list of paths that begin with "/", or absent' },
  { "quarantine_ms", function(v) return v == nil or is_number(v) and v >= 0 end,
    "a number of milliseconds, 0 to believe no marks, or absent" },
  { "sticky", function(v) return v == nil or type(v) == "table" end, "an object, or absent" },
  { "outlier", function(v) return v == nil or type(v) == "table" end, "an object, or absent" },
}

local sticky_checks = {
  { "cookie", function(v) return type(v) == "string" and v:find("^[%w!#$%%&'*+.^_`|~-]+$") ~= nil end,
    "a cookie's name (letters, digits, _ and the like)" },
  { "path", function(v) return type(v) == "string" and v:find("^/[^%c;]*$") ~= nil end, 'a path that begins with "/"' },
  { "secure", function(v) return type(v) == "boolean" end, "true or false" },
  { "http_only", function(v) return type(v) == "boolean" end, "true or false" },
  { "same_site", function(v) return SAME_SITE[v] ~= nil end, "one of Lax, Strict, None" },
  { "max_age", function(v) return is_integer(v, 0, 2 ^ 31) end, "an integer of seconds, 0 for a session cookie" },
}

local outlier_checks = {
  { "errors", is_count, "an integer, 0 for off" },
  { "timeouts", is_count, "an integer, 0 for off" },
  { "server_errors", is_count, "an integer, 0 for off" },
  { "base_ms", function(v) return is_number(v) and v > 0 end, "a number of milliseconds above 0" },
  { "cap_ms", function(v, outlier) return is_number(v) and is_number(outlier.base_ms) and v >= outlier.base_ms end,
    "a number of milliseconds, at least base_ms" },
  { "max_ejected", function(v) return is_number(v) and v >= 0 and v <= 1 end, "a number from 0 to 1" },
}

local method_checks = {
  hash = {
    { "key", function(v) return type(v) == "string" end, "a text with nginx's variables, such as $remote_addr" },
    { "consistent", is_optional_boolean, "true or false" },
    { "bound", function(v, upstream) return v == nil or v == 0 or is_number(v) and v >= 1 and upstream.consistent end,
      "a number of at least 1 with a consistent hash, or 0" },
  },
  random = { { "two", is_optional_boolean, "true or false" } },
}

local warm_up_checks = {
  { "epoch", function(v) return is_integer(v, 0, _M.MAX_REVISION) end, "an integer, 0 or more" },
  { "elapsed_ms", function(v) return is_number(v) and v >= 0 end, "a number of milliseconds, 0 or more" },
  { "duration_ms", function(v) return is_number(v) and v > 0 end, "a number of milliseconds above 0" },
  { "curve", function(v) return is_number(v) and v > 0 end, "a number above 0" },
  { "floor", function(v) return is_number(v) and v > 0 and v <= 1 end, "a number above 0, at most 1" },
  { "starts", function(v) return STARTS[v] ~= nil end, 'either "healthy" or "first-request"' },
  { "held", function(v) return type(v) == "boolean" end, "true or false" },
  { "steps", function(v) return v == nil or is_integer(v, 0, 1e6) end, "an integer, 0 for none, or absent" },
}

local written_checks = {
  { "boot_id", function(v) return type(v) == "string" end, "the kernel's boot id" },
  { "monotonic_ms", function(v) return is_number(v) and v >= 0 end, "a number of milliseconds, 0 or more" },
}

local function problem(code, message, remedy)
  return { code = code, message = message, remedy = remedy }
end

local function wrong_field(place, field, value, remedy, code)
  return problem(code or "invalid_field", place .. ': field "' .. field .. '" is ' .. tostring(value), remedy)
end

local function first_wrong(list, subject, place)
  for _, check in ipairs(list) do
    local field, accepts, wanted = check[1], check[2], check[3]
    if not accepts(subject[field], subject) then
      return wrong_field(place, field, subject[field], field .. " must be " .. wanted)
    end
  end
end

--- True for a JSON object or array. JSON's null is a userdata and counts as absent.
local function is_table(value)
  return type(value) == "table"
end

local function check_server(server, place)
  if not is_table(server) then
    return problem("invalid_field", place .. " is not an object", "give every server as an object")
  end
  if type(server.key) == "string" then
    place = place .. ' "' .. server.key .. '"'
  end
  local wrong = first_wrong(checks, server, place)
  if wrong then
    return wrong
  end
  local ramp = server.warm_up
  if is_table(ramp) then
    return first_wrong(warm_up_checks, ramp, place .. ", warm_up")
  end
  if ramp ~= nil and type(ramp) ~= "userdata" then
    return wrong_field(place, "warm_up", ramp, "warm_up must be an object or null")
  end
end

local function check_upstream(name, upstream)
  local place = 'upstream "' .. tostring(name) .. '"'
  if type(name) ~= "string" or not is_table(upstream) then
    return problem("invalid_field", place .. " is not an object", "give upstreams as an object of objects by name")
  end
  if not _M.METHODS[upstream.method] then
    return wrong_field(place, "method", upstream.method,
      "use round_robin, least_conn, ewma, hash, ip_hash or random", "unknown_method")
  end
  local wrong = first_wrong(method_checks[upstream.method] or {}, upstream, place)
    or first_wrong(upstream_checks, upstream, place)
    or upstream.sticky and first_wrong(sticky_checks, upstream.sticky, place .. ", sticky")
    or upstream.outlier and first_wrong(outlier_checks, upstream.outlier, place .. ", outlier")
  if wrong then
    return wrong
  end
  if not is_table(upstream.servers) or #upstream.servers == 0 then
    return problem("no_servers", place .. ': field "servers" holds no server',
      "leave the upstream out to let nginx balance it natively")
  end
  local seen = {}
  for i, server in ipairs(upstream.servers) do
    local where = place .. ", server " .. i
    wrong = check_server(server, where)
    if wrong then
      return wrong
    end
    if seen[server.key] then
      return problem("duplicate_key", where .. ': field "key" is "' .. server.key .. '" a second time',
        "give every server of an upstream a key of its own")
    end
    seen[server.key] = true
  end
end

--- nil when `document`, decoded JSON, is a table of this format; else {code, message, remedy} for the first thing
-- that is wrong.
function _M.validate(document)
  if not is_table(document) then
    return problem("invalid_json", "the table is not a JSON object", "send one JSON object")
  end
  if document.format ~= _M.FORMAT then
    return wrong_field("table", "format", document.format, "send format 1, or upgrade both sides",
      "unknown_format")
  end
  if not is_integer(document.revision, 1, _M.MAX_REVISION) then
    return wrong_field("table", "revision", document.revision, "revision must be an integer from 1 on")
  end
  if document.written ~= nil and not is_table(document.written) then
    return wrong_field("table", "written", document.written, "written must be an object, or absent")
  end
  local wrong = document.written and first_wrong(written_checks, document.written, "table, written")
  if wrong then
    return wrong
  end
  if not is_table(document.upstreams) then
    return wrong_field("table", "upstreams", document.upstreams, "upstreams must be an object by name")
  end
  for name, upstream in pairs(document.upstreams) do
    wrong = check_upstream(name, upstream)
    if wrong then
      return wrong
    end
  end
end

return _M
