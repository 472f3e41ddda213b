-- What Headgate needs from the machine and the operating system, through FFI: a monotonic clock, memory shared by all
-- workers, its order, processes, the fate of a unix socket. Nothing about balancing belongs here.
local ffi = require("ffi")
local base = require("resty.core.base")

-- Own names bound to the C symbols: another Lua library that declares the same function differently is not disturbed.
ffi.cdef([[
struct headgate_timespec { long seconds; long nanoseconds; };
struct headgate_sockaddr { unsigned short family; char path[108]; };
int headgate_clock_gettime(int clock, struct headgate_timespec *now) __asm__("clock_gettime");
void *headgate_mmap(void *address, size_t length, int protection, int flags, int fd, long offset) __asm__("mmap");
int headgate_socket(int domain, int kind, int protocol) __asm__("socket");
int headgate_connect(int fd, const struct headgate_sockaddr *address, unsigned int length) __asm__("connect");
int headgate_close(int fd) __asm__("close");
int headgate_unlink(const char *path) __asm__("unlink");
int headgate_poll(void *fds, unsigned long count, int milliseconds) __asm__("poll");
extern uintptr_t ngx_test_config;
struct headgate_mutex { volatile uintptr_t *word; uintptr_t rest[7]; };
uintptr_t headgate_try_lock(struct headgate_mutex *mutex) __asm__("ngx_shmtx_trylock");
]])

local C = ffi.C
local CLOCK_MONOTONIC = 1
local PROT_READ_WRITE = 3
local MAP_SHARED_ANONYMOUS_NORESERVE = 0x4021
local AF_UNIX = 1
local SOCK_STREAM_NONBLOCK = 0x801
local ECONNREFUSED = 111

local _M = {}

local timespec = ffi.new("struct headgate_timespec")

--- Seconds on the machine's monotonic clock: the same for every process, untouched by changes of the wall clock.
function _M.monotonic()
  C.headgate_clock_gettime(CLOCK_MONOTONIC, timespec)
  return tonumber(timespec.seconds) + tonumber(timespec.nanoseconds) * 1e-9
end

--- Reserves `bytes` of zeroed memory that every process forked from this one shares; a page costs nothing until it is
-- used. Returns its address as a number (user addresses are below 2^47, a double holds 2^53).
function _M.share_memory(bytes)
  local address = C.headgate_mmap(nil, bytes, PROT_READ_WRITE, MAP_SHARED_ANONYMOUS_NORESERVE, -1, 0)
  if ffi.cast("intptr_t", address) == -1 then
    error("headgate: cannot reserve " .. bytes .. " bytes of shared memory (mmap errno " .. ffi.errno() .. ")")
  end
  return tonumber(ffi.cast("intptr_t", address))
end

local word = ffi.new("uintptr_t[1]")
local mutex = ffi.new("struct headgate_mutex", { word = word })

--- A full memory barrier: what this process has written before, all others see before it reads anything behind.
-- Lua has none. nginx's own lock is one where it is taken, by its atomic compare-and-set; this process alone has this
-- lock, so that no other waits for it.
function _M.barrier()
  word[0] = 0
  C.headgate_try_lock(mutex)
end

_M.barrier()
assert(word[0] ~= 0, "headgate: this nginx is built without atomic operations, or its locks are made otherwise")

-- The text of a file in a process's directory, "" where there is none.
local function of_process(pid, name)
  local file = io.open("/proc/" .. pid .. "/" .. name, "r")
  local text = file and file:read("*a")
  if file then
    file:close()
  end
  return text or ""
end

-- Field `number` (from 4 on) of what proc(5) calls stat; nil when there is no such process.
local function stat(pid, number)
  -- The command name, field 2, may hold spaces and brackets: fields are counted from its last bracket.
  local state, rest = of_process(pid, "stat"):match("^.*%)%s+(%S)%s+(.*)$")
  if not state or state == "Z" or state == "X" then
    return nil
  end
  local index = 3
  for field in rest:gmatch("%S+") do
    index = index + 1
    if index == number then
      return tonumber(field)
    end
  end
end

--- When process `pid` started, in clock ticks since boot; nil when there is no such process. A pid alone is re-used by
-- the kernel; pid and start time together are not.
function _M.start_time(pid)
  return stat(pid, 22)
end

--- How many of these processes, {pid, start}, live still.
function _M.count_living(processes)
  local living = 0
  for _, process in ipairs(processes) do
    living = living + (_M.start_time(process.pid) == process.start and 1 or 0)
  end
  return living
end

--- The workers that serve beside those that the calling master will make, as a list of {pid, start}: its own of former
-- configurations, and those of the master whose binary it replaces. Empty where the kernel does not list children.
function _M.other_workers()
  local own = tonumber(of_process("self", "stat"):match("^%d+"))
  local parent = stat(own, 4)
  local found = {}
  for _, master in ipairs({ own, of_process(parent, "cmdline"):find("^nginx: master process") and parent or nil }) do
    for pid in of_process(master, "task/" .. master .. "/children"):gmatch("%d+") do
      if of_process(pid, "cmdline"):find("^nginx: worker process") then
        table.insert(found, { pid = tonumber(pid), start = _M.start_time(pid) })
      end
    end
  end
  return found
end

--- The kernel's id of this uptime of the machine: monotonic() is comparable within one.
function _M.boot_id()
  local file = assert(io.open("/proc/sys/kernel/random/boot_id", "r"))
  local id = file:read("*l")
  file:close()
  return id
end

--- `bytes` random bytes in hexadecimal.
function _M.random_hex(bytes)
  local file = assert(io.open("/dev/urandom", "rb"))
  local raw = file:read(bytes)
  file:close()
  return (raw:gsub(".", function(c) return string.format("%02x", c:byte()) end))
end

--- Blocks this process for some seconds; only where nginx cannot yield.
function _M.pause(seconds)
  C.headgate_poll(nil, 0, seconds * 1000)
end

--- True while this process is `nginx -t`, which must leave the disk as it is.
function _M.is_configuration_test()
  return C.ngx_test_config ~= 0
end

--- Removes the unix socket that a killed nginx left behind: nginx would refuse to start ("Address already in use").
-- Only a refused connection proves that nobody listens; on success and on every other error the file is left alone.
function _M.remove_stale_socket(path)
  local address = ffi.new("struct headgate_sockaddr", { family = AF_UNIX })
  if #path >= ffi.sizeof(address.path) then
    return
  end
  ffi.copy(address.path, path)
  local fd = C.headgate_socket(AF_UNIX, SOCK_STREAM_NONBLOCK, 0)
  if fd < 0 then
    return
  end
  local refused = C.headgate_connect(fd, address, ffi.sizeof(address)) ~= 0 and ffi.errno() == ECONNREFUSED
  C.headgate_close(fd)
  if refused then
    C.headgate_unlink(path)
  end
end

--- The address of the current request as a number: what names a request during its life.
function _M.request_id()
  local request = base.get_request()
  return tonumber(ffi.cast("intptr_t", request)), request
end

return _M
