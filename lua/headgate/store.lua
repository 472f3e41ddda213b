-- The table that all workers share, published whole. Which one is in force stands in shared memory (stats.lua), the
-- rest in two shared dicts: `headgate_table` holds the blobs and may fill up; `headgate_state` holds the few small
-- things that must always find room (boot id, starts of ramps, lock).
--
-- A blob is the validated table, made ready for the workers: each server has its cell of counters (stats.lua) and its
-- ramp (warm_up.lua) and the blob lists cells whose server has left the table.
local cjson = require("cjson.safe")
local ejection = require("headgate.ejection")
local lock = require("headgate.lock")
local stats = require("headgate.stats")
local system = require("headgate.system")
local table_format = require("headgate.table")
local warm_up = require("headgate.warm_up")

local _M = {}

local blobs = ngx.shared.headgate_table
local state = ngx.shared.headgate_state
_M.state = state

--- Runs `work(...)` while no other process runs one; `pause(seconds)` waits for a turn. Returns what `work` returns,
-- or nil, "busy".
function _M.exclusive(pause, work, ...)
  return lock.hold("table", 5, pause, work, ...)
end

local function blob_key(number)
  return "table:" .. number
end

--- The blob in force, decoded, or nil without one; and its number.
function _M.current()
  -- Between the two reads a newer table may replace this one and remove its blob.
  for _ = 1, 100 do
    local number = stats.table_number()
    if number == 0 then
      return nil, 0
    end
    local blob = blobs:get(blob_key(number))
    if blob then
      return assert(cjson.decode(blob)), number
    end
  end
  error("headgate: the table in force is missing from the shared dict")
end

local boot

--- The id of this nginx: made at its start, the same after reloads.
function _M.boot()
  return boot
end

-- Attaches to the memory of the configuration before; false where there is none that is whole: at the start of nginx,
-- and after a reload that emptied a dict by another size, or that brings another layout of the memory.
local function go_on_in_memory()
  if state:get("layout") ~= stats.LAYOUT then
    return false
  end
  stats.attach(state:get("memory"))
  return (pcall(_M.current))
end

--- Called by the master for each configuration. Where it cannot go on it begins as a restart does: in new memory, from
-- the snapshot, under a new boot id. The workers of before stay in theirs, with the table that they have.
function _M.attach()
  if not go_on_in_memory() then
    state:flush_all()
    blobs:flush_all()
    local address = stats.reserve()
    stats.attach(address)
    assert(state:safe_set("memory", address))
    assert(state:safe_set("strangers", cjson.encode(system.other_workers())))
    assert(state:safe_set("boot", system.random_hex(16)))
    assert(state:safe_set("layout", stats.LAYOUT))
  end
  boot = state:get("boot")
end

--- How many workers live whose requests this memory does not count, since they began before it was made.
function _M.strangers()
  return system.count_living(cjson.decode(state:get("strangers")))
end

--- Key under which the moment of a waiting ramp's first request is kept.
function _M.start_key(upstream, key, epoch)
  return "start:" .. #upstream .. ":" .. upstream .. ":" .. key .. ":" .. epoch
end

--- Key under which stands whether a ramp's server has had its first pick (first_picks.lua).
function _M.first_key(upstream, key, epoch)
  return "first:" .. #upstream .. ":" .. upstream .. ":" .. key .. ":" .. epoch
end

--- Has a ramp's server had its first pick?
function _M.was_picked(upstream, key, epoch)
  return state:get(_M.first_key(upstream, key, epoch)) == true
end

--- Key of the count of an upstream's picks (first_picks.lua).
function _M.picks_key(upstream)
  return "picks:" .. upstream
end

--- Starts a ramp that waits, if its first request has come at any worker; true when it runs.
function _M.start_if_due(ramp, start_key)
  local moment = state:get(start_key)
  if moment then
    warm_up.start(ramp, moment)
  end
  return moment ~= nil
end

--- Notes the first request of a ramp that waits; the first worker to do so decides the moment.
function _M.note_start(start_key)
  state:safe_add(start_key, system.monotonic())
end

local function each_server(blob, visit)
  for name, upstream in pairs(blob.upstreams) do
    for _, server in ipairs(upstream.servers) do
      visit(name, server)
    end
  end
end

local function index_of(name, key)
  return #name .. ":" .. name .. ":" .. key
end

-- Gives every server of `new` a cell: its own from `old` (also when it had left and still has requests in flight),
-- else a free one. A cell is freed when its server has left in an earlier table and nothing is in flight: the newer
-- table was seen after every pick that used the older one, so none can come any more. Counts of a cell's former server
-- are kept in `before`. Returns whether there was room, and the cells whose ejections are to be forgotten: those of new
-- and of forgiven servers.
local function assign_cells(new, old)
  local living = stats.living().slots
  local cells, forgiven = {}, {}
  new.free, new.left, new.next_cell = old.free, {}, old.next_cell
  for _, entry in ipairs(old.left) do
    if stats.in_flight(entry.cell, living) == 0 then
      table.insert(new.free, entry.cell)
    else
      cells[index_of(entry.upstream, entry.key)] = entry
    end
  end
  each_server(old, function(name, server)
    cells[index_of(name, server.key)] = {
      upstream = name, key = server.key, cell = server.cell,
      before = server.before, forgive = server.forgive,
    }
  end)
  local full = false
  each_server(new, function(name, server)
    local index = index_of(name, server.key)
    local entry = cells[index]
    cells[index] = nil
    if entry then
      server.cell, server.before = entry.cell, entry.before
      if (server.forgive or 0) ~= (entry.forgive or 0) then
        table.insert(forgiven, entry.cell)
      end
      return
    end
    server.cell = table.remove(new.free)
    if not server.cell then
      server.cell = new.next_cell
      new.next_cell = new.next_cell + 1
      full = full or server.cell >= stats.CELLS
    end
    if not full then
      server.before = stats.totals(server.cell)
      table.insert(forgiven, server.cell)
    end
  end)
  for _, entry in pairs(cells) do
    table.insert(new.left, entry)
  end
  return not full, forgiven
end

-- Returns the keys of ramps that are no longer in the table, as a set.
local function assign_ramps(new, old, now)
  local ramps, forgotten = {}, {}
  each_server(old, function(name, server)
    local ramp = server.ramp
    if ramp then
      local start_key = _M.start_key(name, server.key, ramp.epoch)
      ramps[index_of(name, server.key)] = ramp
      forgotten[start_key], forgotten[_M.first_key(name, server.key, ramp.epoch)] = true, true
      forgotten[_M.picks_key(name)] = true
      if ramp.waiting then
        _M.start_if_due(ramp, start_key)
      end
    end
  end)
  each_server(new, function(name, server)
    server.ramp = nil
    if type(server.warm_up) == "table" then
      local previous = ramps[index_of(name, server.key)]
      local ramp = warm_up.ramp(server.warm_up, previous, now)
      local same = previous and previous.epoch == ramp.epoch
      ramp.base = same and previous.base or state:get(_M.picks_key(name)) or 0
      server.ramp = ramp
      forgotten[_M.start_key(name, server.key, ramp.epoch)] = nil
      forgotten[_M.first_key(name, server.key, ramp.epoch)] = nil
      forgotten[_M.picks_key(name)] = nil
    end
    server.warm_up = nil
  end)
  return forgotten
end

--- Makes `document`, a valid table, the current one; `digest` names its text. The caller holds the lock, or is alone.
-- Returns true, or nil and "stale" (not newer than the current one), "full" (no room; the old table stays).
-- The very table that is current already is taken as published.
function _M.publish(document, digest)
  local old, number = _M.current()
  old = old or { revision = 0, upstreams = {}, free = {}, left = {}, next_cell = 0 }
  if document.revision == old.revision and digest == old.digest then
    -- A worker that was killed while it did this may have left it half done.
    stats.put_in_force(number, document.revision)
    return true
  end
  if document.revision <= old.revision then
    return nil, "stale"
  end
  document.digest = digest
  local fits, forgiven = assign_cells(document, old)
  if not fits then
    return nil, "full"
  end
  local forgotten = assign_ramps(document, old, system.monotonic())
  if not blobs:safe_set(blob_key(number + 1), assert(cjson.encode(document))) then
    return nil, "full"
  end
  ejection.forgive(forgiven)
  stats.put_in_force(number + 1, document.revision)
  blobs:delete(blob_key(number))
  for key in pairs(forgotten) do
    state:delete(key)
  end
  return true
end

local ENOENT = 2

-- Ramps go on from where they are now, when the snapshot was written since the machine's start.
local function go_on(document)
  local written = document.written
  if type(written) ~= "table" or written.boot_id ~= system.boot_id() then
    return
  end
  local ms = math.max(0, system.monotonic() * 1000 - written.monotonic_ms)
  each_server(document, function(_, server)
    if type(server.warm_up) == "table" then
      warm_up.go_on(server.warm_up, ms)
    end
  end)
end

--- Publishes the snapshot at `path`, the last table that was put: nginx balances as before its restart.
-- True when it did or there is no such file; else nil and what is wrong.
function _M.load_snapshot(path)
  local file, reason, errno = io.open(path, "r")
  if not file then
    return errno == ENOENT or nil, reason
  end
  local text
  text, reason = file:read("*a")
  file:close()
  if not text then
    return nil, reason
  end
  local document, syntax = cjson.decode(text)
  if document == nil then
    return nil, syntax
  end
  local wrong = table_format.validate(document)
  if wrong then
    return nil, wrong.message .. "; " .. wrong.remedy
  end
  go_on(document)
  return _M.publish(document, ngx.md5(text))
end

return _M
