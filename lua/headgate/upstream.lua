-- An upstream of the current table as a worker has it: its servers, and which of them is next. What is counted of a
-- choice, and when it must be made again, stands in balancer.lua.
local cookies = require("headgate.cookies")
local ejection = require("headgate.ejection")
local ewma = require("headgate.methods.ewma")
local first_picks = require("headgate.first_picks")
local key_template = require("headgate.key")
local round_robin = require("headgate.methods.round_robin")
local stats = require("headgate.stats")
local store = require("headgate.store")
local system = require("headgate.system")
local table_format = require("headgate.table")

local monotonic, epoch = system.monotonic, stats.epoch
local EWMA, EWMA_AT = stats.EWMA, stats.EWMA_AT

-- Beside round robin. A hash that finds no primary leaves the backups to round robin, as nginx does.
local METHODS = {
  least_conn = { primary = require("headgate.methods.least_conn"), backup = require("headgate.methods.least_conn") },
  hash = { primary = require("headgate.methods.hash"), backup = round_robin },
  ip_hash = { primary = require("headgate.methods.ip_hash"), backup = round_robin },
  random = { primary = require("headgate.methods.random"), backup = round_robin },
  ewma = { primary = ewma, backup = round_robin },
}

-- For a request whose key is empty. A hash's state is round robin's with places for keys added.
local UNKEYED = { primary = round_robin, backup = round_robin }

local _M = {}

-- A generator of our own: seeding math.random would disturb the user's Lua code.
local last
local function random()
  last = (last * 1664525 + 1013904223) % 4294967296
  return last / 4294967296
end

--- Starts the choices of this worker at chances of its own; `seed` is an integer below 2^32.
function _M.seed(seed)
  last = seed
end

local function address_of(server)
  if server.ip:find(":", 1, true) and not server.ip:find("^unix:") then
    return "[" .. server.ip .. "]"
  end
  return server.ip
end

local function new_server(described, upstream)
  local address = address_of(described)
  return {
    key = described.key,
    upstream = upstream,
    written = described.address or described.key,
    address = address,
    port = described.port,
    endpoint = (described.port == 0 and address or address .. ":" .. described.port):lower(),
    weight = described.weight,
    max_conns = described.max_conns,
    cell = described.cell,
    at = stats.cell_offset(described.cell),
    shared = stats.shared_offset(described.cell),
    ramp = described.ramp,
    state = described.state,
    outlier = described.outlier,
    eligible = table_format.eligible(described.state, upstream.fail_open),
    ejected = false,
  }
end

-- The state that picks among `group` (primary or backup), going on from `previous`.
local function new_state(upstream, group, previous)
  local method = upstream.methods and upstream.methods[group] or round_robin
  local servers = group == "primary" and upstream.primaries or upstream.backups
  return method.new(servers, previous, random, upstream.options)
end

-- When the present pick began; taken only for the method that needs it.
local picked_at = 0

-- A server's peak EWMA as it stands now, nil without one.
local function measure_of(server)
  local value = stats.shared()[server.shared + EWMA]
  return value > 0 and ewma.faded(value, stats.shared()[server.shared + EWMA_AT], picked_at) or nil
end

--- The upstream `name` as its table describes it (store.lua), going on from `previous`, its former self, or nil.
function _M.new(name, description, previous)
  local upstream = {
    name = name, fail_open = description.fail_open, outlier = description.outlier,
    quarantine_ms = description.quarantine_ms, ejected = 0,
    servers = {}, by_key = {}, primaries = {}, backups = {}, waiting = {}, limited = false,
    methods = METHODS[description.method],
    measured = description.method == "ewma",
    options = {
      all = {}, consistent = description.consistent, bound = description.bound ~= 0 and description.bound or nil,
      two = description.two, measure = measure_of,
    },
  }
  local sessions = {}
  if description.method == "hash" then
    upstream.key, upstream.subject = description.key, key_template.compile(description.key)
  elseif description.method == "ip_hash" then
    upstream.subject = key_template.compile("$binary_remote_addr")
  end
  for _, path in ipairs(description.ignore_paths or {}) do
    upstream.ignored = upstream.ignored or {}
    upstream.ignored[path] = true
  end
  for _, described in ipairs(description.servers) do
    local server = new_server(described, upstream)
    table.insert(upstream.servers, server)
    upstream.by_key[server.key] = server
    if not described.backup then
      table.insert(upstream.options.all, server)
    end
    if server.eligible or described.state == "sessions" then
      table.insert(sessions, server)
    end
    if server.eligible then
      table.insert(described.backup and upstream.backups or upstream.primaries, server)
      upstream.limited = upstream.limited or server.max_conns > 0
      if server.ramp and server.ramp.waiting then
        server.start_key = store.start_key(name, server.key, server.ramp.epoch)
        table.insert(upstream.waiting, server)
      end
    end
  end
  upstream.primary = new_state(upstream, "primary", previous and previous.primary)
  upstream.backup = new_state(upstream, "backup", previous and previous.backup)
  if type(description.sticky) == "table" then
    upstream.sessions = cookies.new(description.sticky, sessions)
  end
  -- First picks are noted for all, and promised where neither a key decides nor primaries go before.
  local watch = first_picks.watch(name, upstream.primaries, upstream.primary)
  first_picks.watch(name, upstream.backups, upstream.backup)
  upstream.watch = not upstream.subject and watch or nil
  upstream.spare_tries = (upstream.sessions and #sessions or #upstream.primaries + #upstream.backups) - 1
  return upstream
end

local function refresh_waiting(upstream)
  for i = #upstream.waiting, 1, -1 do
    local server = upstream.waiting[i]
    if store.start_if_due(server.ramp, server.start_key) then
      server.start_key = nil
      table.remove(upstream.waiting, i)
    end
  end
end

-- Brings the weights in `group` (primary or backup) up to date.
local function reweigh(upstream, group)
  if #upstream.waiting > 0 then
    refresh_waiting(upstream)
  end
  if round_robin.reweigh(upstream[group], monotonic()) then
    for _, server in ipairs(group == "primary" and upstream.primaries or upstream.backups) do
      if server.ramp and not server.ramp.held then
        server.ramp = nil
      end
    end
    upstream[group] = new_state(upstream, group, upstream[group])
    if upstream.watch and group == "primary" then
      upstream.watch = first_picks.watch(upstream.name, upstream.primaries, upstream.primary)
    end
  end
end

-- The keys that the request being served has tried, or nil, and whether ejected servers may serve it; not arguments,
-- since a closure would end the JIT's trace.
local excluded, ejected_serve

local function is_refused(server)
  return server.ejected and not ejected_serve
    or excluded and excluded[server.key]
    or server.max_conns > 0 and stats.load(server.cell) >= server.max_conns
end

local function load_of(server)
  return stats.load(server.cell)
end

local noted = {} -- upstream -> the key that was said to be empty

-- Not for each table nor each request: clients without a cookie may be half of them.
local function note_empty_key(upstream)
  if noted[upstream.name] ~= upstream.key then
    noted[upstream.name] = upstream.key
    ngx.log(ngx.WARN, "headgate: upstream ", upstream.name, ': the key "', upstream.key, '" of a request is empty; ',
      "such requests go by round robin, and a variable that nginx does not know is always empty")
  end
end

local function choose_among(upstream, methods)
  if methods then
    local subject = upstream.subject and upstream.subject()
    if subject == "" then
      -- One key for all of them would give them all to one server. HAProxy does the same with an absent parameter.
      note_empty_key(upstream)
      methods = UNKEYED
    end
    return methods.primary.pick_except(upstream.primary, is_refused, load_of, subject, excluded)
      or methods.backup.pick_except(upstream.backup, is_refused, load_of, nil, excluded)
  end
  return round_robin.pick_except(upstream.primary, is_refused, nil, nil, excluded)
    or round_robin.pick_except(upstream.backup, is_refused, nil, nil, excluded)
end

-- The server that must be picked whatever the method: the one of the request's session (`named`, whether it can serve
-- or not), or one that warms and is due.
local function choose_first(upstream)
  local server = upstream.sessions and cookies.named(upstream.sessions)
  upstream.named = server
  if server and not is_refused(server) then
    return server
  end
  local watch = upstream.watch
  server = watch and first_picks.due(watch, is_refused)
  if server and not upstream.methods then
    round_robin.take(upstream.primary, server)
  elseif watch and #watch.waiting == 0 then
    upstream.watch = nil
  end
  return server
end

--- The server for a request that has tried those of `keys` (a set, or nil); nil when no server may be picked.
function _M.choose(upstream, keys)
  if upstream.epoch ~= epoch() or upstream.expires and monotonic() >= upstream.expires then
    ejection.refresh(upstream, monotonic())
  end
  if #upstream.primary.ramping > 0 then
    reweigh(upstream, "primary")
  end
  excluded, ejected_serve = keys, false
  if upstream.sessions or upstream.watch then
    local server = choose_first(upstream)
    if server then
      return server
    end
  end
  local methods = upstream.methods
  if upstream.measured then
    picked_at = monotonic()
  end
  if not keys and not upstream.limited and not methods and upstream.ejected == 0 then
    local server = round_robin.pick(upstream.primary)
    if server then
      return server
    end
  end
  if #upstream.backup.ramping > 0 then
    reweigh(upstream, "backup")
  end
  local server = choose_among(upstream, methods)
  if not server and upstream.ejected > 0 then
    -- Rather an ejected server than none: the others may be full, or tried, or left the table since.
    ejected_serve = true
    server = choose_among(upstream, methods)
  end
  return server
end

return _M
