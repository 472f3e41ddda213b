-- The hot path: what happens in a worker for every proxied request. Picks a server, counts it, releases it.
--
-- A pick is *choose, count, look which table is in force*, with a full memory barrier before the look: either this
-- worker sees the newer table, takes its count back and chooses again, or whoever put that table in force and then
-- reads the counters sees this count. So a server that left the table or drains is free of requests when its count in
-- flight is 0, on all workers, those of older configurations included, without any acknowledgement.
--
-- Tries are remembered by the address of the request and not in ngx.ctx, which an internal redirect (error_page,
-- X-Accel-Redirect) clears.
local ffi = require("ffi")
local base = require("resty.core.base")
require("resty.core.misc")
require("resty.core.response")
require("ngx.balancer")
local cookies = require("headgate.cookies")
local ejection = require("headgate.ejection")
local ewma = require("headgate.methods.ewma")
local first_picks = require("headgate.first_picks")
local native = require("headgate.native")
local outcome = require("headgate.outcome")
local stats = require("headgate.stats")
local store = require("headgate.store")
local system = require("headgate.system")
local Upstream = require("headgate.upstream")

-- resty.core declares it only inside a function of its own.
ffi.cdef([[int headgate_response_status(ngx_http_request_t *r) __asm__("ngx_http_lua_ffi_get_resp_status");]])

local C = ffi.C
local intptr = ffi.typeof("intptr_t")
local get_request = base.get_request
local FFI_OK = base.FFI_OK
local barrier, monotonic = system.barrier, system.monotonic
local table_number = stats.table_number
local BEGUN, ENDED, FAILED, TIMEOUTS = stats.BEGUN, stats.ENDED, stats.FAILED, stats.TIMEOUTS
local ERRORS, ANSWERED_COUNT, SECONDS = stats.ERRORS, stats.ANSWERED, stats.SECONDS
local REFUSED_MARKS, EWMA, EWMA_AT = stats.REFUSED_MARKS, stats.EWMA, stats.EWMA_AT
local NONE, TIMED_OUT, SERVER_ERROR, ANSWERED = outcome.NONE, outcome.TIMED_OUT, outcome.SERVER_ERROR, outcome.ANSWERED
-- ngx_http_upstream_next() takes it for "no live upstreams": 502, no server touched, no error of Lua.
local NO_LIVE_SERVER = -3
-- Seconds. What takes longer may be a long body or a slow client: then nginx's own time until the header counts.
local SHORT = 0.1
-- A table would have to be published between two instructions that often in a row.
local MAX_LOADS = 16
local choose = Upstream.choose

local _M = {}

local error_pointer, status_pointer = ffi.new("char *[1]"), ffi.new("int[1]")

local counts           -- this worker's slot
local shared           -- what any worker may write (stats.lua)
local loaded           -- the number of the table that `upstreams` holds
local upstreams = {}
local open = {}        -- request -> server that its present try is counted at
local began = {}       -- request -> when that try was picked, in seconds of the monotonic clock
local tried = {}       -- request -> {[key] = true}, from the second try on
local tried_count = 0
local children = {}    -- main request -> its subrequests, which end without a log phase
local children_count = 0

local function load()
  local blob, number = store.current()
  local built = {}
  for name, description in pairs(blob and blob.upstreams or {}) do
    built[name] = Upstream.new(name, description, upstreams[name])
  end
  upstreams, loaded = built, number
end

-- The path that the client asked for.
local function path()
  return ngx.var.request_uri:match("^[^?]*")
end

local function take_back(server)
  counts[server.at + BEGUN] = counts[server.at + BEGUN] - 1
end

-- The server for the next try, counted; nil, true when nginx shall balance natively; nil, false when no server may be
-- picked.
local function pick(name, keys, request)
  for _ = 1, MAX_LOADS do
    local upstream = upstreams[name]
    local server = upstream and choose(upstream, keys)
    if server then
      local at = server.at + BEGUN
      counts[at] = counts[at] + 1
    elseif not upstream then
      native.enter(request, name)
    end
    barrier()
    if table_number() == loaded then
      if server and server.start_key and not (upstream.ignored and upstream.ignored[path()]) then
        store.note_start(server.start_key)
      end
      if server and server.first_key then
        first_picks.confirm(upstream.watch, server)
      end
      return server, not upstream, upstream
    end
    if server then
      take_back(server)
    end
    load()
  end
  error("headgate: the table changed " .. MAX_LOADS .. " times during one pick")
end

local function forget_tries(request)
  if tried[request] then
    tried[request] = nil
    tried_count = tried_count - 1
  end
end

-- The upstream as it is now, for what concerns it as a whole, and the server in it.
local function present(server)
  if table_number() ~= loaded then
    load()
  end
  local upstream = upstreams[server.upstream.name]
  return upstream, upstream and upstream.by_key[server.key]
end

local function count(server, number)
  local at = server.at + number
  counts[at] = counts[at] + 1
end

-- What a try says about its server, beyond the counters. `server` is the one of the table that the try was picked by.
local function judge(server, kind, own_mark, start, now)
  local upstream, current = present(server)
  if current and kind ~= NONE and kind ~= ANSWERED then
    ejection.note_failure(upstream, current, kind, start, now)
  end
  if own_mark ~= nil and not (own_mark and current and ejection.mark(upstream, current, start, now)) then
    count(server, REFUSED_MARKS)
  end
end

-- Notes how long a try took where the method wants to know.
local function measure(server, kind, seconds, now)
  local value, at = server.shared + EWMA, server.shared + EWMA_AT
  -- A client that went away says only that there was no answer until then.
  if kind ~= NONE or seconds > shared[value] then
    shared[value] = ewma.observe(shared[value], shared[at], seconds, now, kind ~= ANSWERED)
    shared[at] = now
  end
end

-- Ends the count of a request's try: what it was (a kind of outcome.lua), the seconds until its answer, and whether the
-- answer has a mark (as outcome.mark() says).
local function release(request, server, kind, seconds, own_mark, now)
  local start = began[request]
  open[request], began[request] = nil, nil
  if kind >= SERVER_ERROR then
    local at = server.at
    counts[at + ANSWERED_COUNT] = counts[at + ANSWERED_COUNT] + 1
    counts[at + SECONDS] = counts[at + SECONDS] + seconds
    if kind == SERVER_ERROR then
      count(server, ERRORS)
    elseif server.upstream.outlier then
      ejection.note_success(server)
    end
  elseif kind ~= NONE then
    count(server, FAILED)
    if kind == TIMED_OUT then
      count(server, TIMEOUTS)
    end
  end
  if server.upstream.measured and now then
    measure(server, kind, seconds or now - start, now)
  end
  if own_mark ~= nil or kind ~= NONE and kind ~= ANSWERED then
    -- A count that never ends would be worse than a judgement that is missed.
    local done, why = pcall(judge, server, kind, own_mark, start, now)
    if not done then
      ngx.log(ngx.ERR, "headgate: server ", server.key, " was not judged: ", why)
    end
  end
  -- Last: when nothing is in flight any more, the server's numbers may become another one's.
  count(server, ENDED)
end

-- Ends the count of the try before this one. Returns the keys that this request has tried when nginx retries, nil
-- when it starts anew.
local function settle(request, pointer, server)
  local failure = C.ngx_http_lua_ffi_balancer_get_last_failure(pointer, status_pointer, error_pointer)
  local now = monotonic()
  local kind, seconds = outcome.read(true)
  if failure <= 0 then
    -- An internal redirect: the headers of the former answer are gone.
    release(request, server, kind, seconds, nil, now)
    forget_tries(request)
    return nil
  end
  release(request, server, kind, seconds, outcome.mark(pointer, kind, server.endpoint), now)
  local keys = tried[request]
  if not keys then
    keys = {}
    tried[request] = keys
    tried_count = tried_count + 1
  end
  keys[server.key] = true
  return keys
end

-- Names a request and all its subrequests alike.
local function family()
  return ngx.var.connection .. ":" .. ngx.var.connection_requests
end

local function adopt_subrequest(request)
  local name = family()
  if not children[name] then
    children[name] = {}
    children_count = children_count + 1
  end
  table.insert(children[name], request)
end

local function release_subrequests()
  local name = family()
  for _, request in ipairs(children[name] or {}) do
    if open[request] then
      release(request, open[request], NONE)
      forget_tries(request)
    end
    native.leave(request)
  end
  if children[name] then
    children[name] = nil
    children_count = children_count - 1
  end
end

--- balancer_by_lua: sets the peer for a try at upstream `name`; sets none when the table does not know it, so that
-- nginx balances over the block's own server lines.
function _M.balance(name)
  if not counts then
    return
  end
  local pointer = get_request()
  local request = tonumber(ffi.cast(intptr, pointer))
  local before = open[request]
  local keys
  if before then
    keys = settle(request, pointer, before)
  end
  local server, balanced_natively, upstream = pick(name, keys, request)
  if balanced_natively then
    if C.ngx_http_lua_ffi_is_subrequest(pointer) == 1 then
      adopt_subrequest(request)
    end
    return
  end
  native.leave(request)
  if not server then
    return ngx.exit(NO_LIVE_SERVER)
  end
  local address = server.address
  local set = C.ngx_http_lua_ffi_balancer_set_current_peer(pointer, address, #address, server.port, error_pointer)
  if set ~= FFI_OK then
    take_back(server)
    error("headgate: upstream " .. name .. ", server " .. server.key .. ": " .. ffi.string(error_pointer[0]))
  end
  open[request], began[request] = server, monotonic()
  if upstream.sessions and (keys or upstream.named ~= server) then
    cookies.set(upstream.sessions, server)
  end
  if not keys then
    if upstream.spare_tries > 0 then
      C.ngx_http_lua_ffi_balancer_set_more_tries(pointer, upstream.spare_tries, error_pointer)
    end
    if C.ngx_http_lua_ffi_is_subrequest(pointer) == 1 then
      adopt_subrequest(request)
    end
  end
end

--- log_by_lua: ends the count of the request's last try.
function _M.log()
  local pointer = get_request()
  local request = tonumber(ffi.cast(intptr, pointer))
  local server = open[request]
  if server then
    local now = monotonic()
    local kind, seconds = ANSWERED, now - began[request]
    -- A response below 400 can hide a failed try only behind an internal redirect (error_page 502 =200 …) or a stale
    -- answer from the cache.
    if seconds > SHORT or C.headgate_response_status(pointer) >= 400
      or C.ngx_http_lua_ffi_req_is_internal(pointer) == 1
    then
      local header
      kind, header = outcome.read()
      seconds = seconds > SHORT and header or seconds
    end
    release(request, server, kind, seconds, outcome.mark(pointer, kind, server.endpoint), now)
  end
  native.leave(request)
  if tried_count > 0 then
    forget_tries(request)
  end
  if children_count > 0 and C.ngx_http_lua_ffi_is_subrequest(pointer) == 0 then
    release_subrequests()
  end
end

--- init_worker_by_lua: a slot for this worker's counters, and the table, before the first request.
function _M.start()
  local pid = ngx.worker.pid()
  native.start(pid)
  local why
  counts, why = store.exclusive(system.pause, stats.claim, pid)
  if not counts then
    ngx.log(ngx.ERR, "headgate: worker ", pid, " balances natively, it got no slot of counters: ", why or "all taken")
    return
  end
  shared = stats.shared()
  Upstream.seed(tonumber(system.random_hex(4), 16))
  load()
end

return _M
