-- The control server: HTTP and JSON on a unix socket, for the Headgate daemon. Whole tables in, counters out;
-- docs/data-plane.md describes every route and code.
local cjson = require("cjson.safe")
local ejection = require("headgate.ejection")
local ewma = require("headgate.methods.ewma")
local native = require("headgate.native")
local stats = require("headgate.stats")
local store = require("headgate.store")
local system = require("headgate.system")
local table_format = require("headgate.table")
local warm_up = require("headgate.warm_up")

local _M = {}

local function answer(status, body)
  ngx.status = status
  ngx.header.content_type = "application/json"
  ngx.say(cjson.encode(body))
  return ngx.exit(ngx.HTTP_OK)
end

local function refuse(status, code, message, remedy)
  return answer(status, {
    error = { code = code, message = message, remedy = remedy },
    revision = stats.revision(),
    boot = store.boot(),
  })
end

local function body_text()
  ngx.req.read_body()
  local text = ngx.req.get_body_data()
  if text then
    return text
  end
  local path = ngx.req.get_body_file()
  local file = path and io.open(path, "r")
  if not file then
    return ""
  end
  text = file:read("*a")
  file:close()
  return text
end

local function status_body()
  return {
    format = table_format.FORMAT,
    boot = store.boot(),
    revision = stats.revision(),
    workers = stats.living().pids,
  }
end

local function put_table()
  local text = body_text()
  local document, syntax = cjson.decode(text)
  if document == nil then
    return refuse(400, "invalid_json", "the body is not JSON: " .. syntax, "send one JSON object")
  end
  local wrong = table_format.validate(document)
  if wrong then
    return refuse(400, wrong.code, wrong.message, wrong.remedy)
  end
  local revision = document.revision
  local done, why = store.exclusive(ngx.sleep, store.publish, document, ngx.md5(text))
  if done then
    return answer(200, status_body())
  elseif why == "stale" then
    local message = "revision " .. revision .. " is not newer than the current " .. stats.revision()
    return refuse(409, "stale_revision", message, "read the current revision and publish a greater one")
  elseif why == "full" then
    return refuse(507, "no_room", "the table does not fit into nginx's memory; the former one stays in force",
      "enlarge lua_shared_dict headgate_table, or publish fewer servers (" .. stats.CELLS .. " at most)")
  end
  return refuse(503, "busy", "another table is being published", "publish again")
end

local function ramp_body(name, server, now)
  local ramp = server.ramp
  if not ramp then
    return cjson.null
  end
  if ramp.waiting then
    store.start_if_due(ramp, store.start_key(name, server.key, ramp.epoch))
  end
  local elapsed = math.min(warm_up.elapsed(ramp, now), ramp.duration)
  return {
    epoch = ramp.epoch, elapsed_ms = elapsed * 1000, started = not ramp.waiting,
    picked = store.was_picked(name, server.key, ramp.epoch),
  }
end

local function ewma_ms(cell, now)
  local shared, at = stats.shared(), stats.shared_offset(cell)
  local value = shared[at + stats.EWMA]
  return value > 0 and 1000 * ewma.faded(value, shared[at + stats.EWMA_AT], now)
end

local function counters_body(only)
  -- Revision and table are read before the counters: who reads revision N here sees every pick that used an older
  -- table.
  local blob = store.current() or { upstreams = {}, left = {} }
  local living = stats.living()
  local now = system.monotonic()
  local upstreams, natives = {}, {}
  local function add(name, server)
    if only and only ~= name then
      return
    end
    local body = stats.totals(server.cell)
    for counter, before in pairs(server.before) do
      -- JSON rounds `seconds` to 14 digits.
      body[counter] = math.max(0, body[counter] - before)
    end
    body.in_flight = stats.in_flight(server.cell, living.slots)
    body.warm_up = ramp_body(name, server, now)
    body.ewma_ms = ewma_ms(server.cell, now) or cjson.null
    body.ejected = ejection.describe(server.cell, now) or cjson.null
    upstreams[name] = upstreams[name] or {}
    upstreams[name][server.key] = body
  end
  local strangers = store.strangers()
  for name, upstream in pairs(blob.upstreams) do
    for _, server in ipairs(upstream.servers) do
      add(name, server)
    end
    -- A stranger may have requests anywhere: it counts as one.
    natives[name] = (not only or only == name) and native.in_flight(name, living.pids) + strangers or nil
  end
  for _, entry in ipairs(blob.left) do
    if stats.in_flight(entry.cell, living.slots) > 0 then
      add(entry.upstream, entry)
    end
  end
  return {
    boot = store.boot(), revision = blob.revision or 0, workers = living.pids, upstreams = upstreams, native = natives,
  }
end

local routes = {
  ["/v1/table"] = { PUT = put_table },
  ["/v1/status"] = { GET = function() return answer(200, status_body()) end },
  ["/v1/counters"] = { GET = function()
    local only = ngx.req.get_uri_args().upstream
    return answer(200, counters_body(type(only) == "string" and only or nil))
  end },
}

--- content_by_lua of the control server.
function _M.serve()
  local route = routes[ngx.var.uri]
  if not route then
    return refuse(404, "unknown_route", "there is no " .. ngx.var.uri, "use /v1/table, /v1/status or /v1/counters")
  end
  local handler = route[ngx.req.get_method()]
  if not handler then
    return refuse(405, "method_not_allowed", ngx.req.get_method() .. " does not apply to " .. ngx.var.uri,
      "use " .. next(route))
  end
  return handler()
end

return _M
