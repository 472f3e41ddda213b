-- Numbers in memory that all workers share: who writes where, and how they are added up. What a number is for stands
-- in balancer.lua and ejection.lua.
--
-- Counters: one slot for each worker, one cell for each server, eight numbers in a cell. A slot has one writer, the
-- worker that owns it, so counting is a plain addition. A slot belongs to (pid, start time); when that process is
-- gone, the next worker takes the slot over, forgets what was in flight and goes on from the totals: requests are
-- never lost from a sum, and nothing stays in flight for the dead.
--
-- Marks on servers: one cell for each server that any worker may write (streaks of failures, ejections, the mean
-- response time). Before them stands which table is in force, and a number that changes whenever somebody was ejected
-- or let in again. Ejections are written under a lock. Streaks and means are not: of two workers that write at the same
-- instant one is not seen, which makes a streak one shorter or a mean one answer older, and a number is never torn (8
-- bytes, aligned).
--
-- The memory is anonymous and made once by the nginx master, which all workers are forked from; its address waits in
-- a shared dict for the next configuration. So it outlives a reload, as a shared dict does, and costs no lock.
local ffi = require("ffi")
local system = require("headgate.system")

local _M = {}

--- Changes with the layout of this memory; store.lua starts afresh when a reload brings another one.
_M.LAYOUT = 3
_M.CELLS = 4096

--- A cell's numbers in a slot, as offsets from cell_offset(). Tries: begun, ended, without an answer (failed), those
-- of them that timed out, answered 5xx (errors), answered at all; seconds until these answers; marks not believed.
-- Begun less ended is in flight.
_M.BEGUN, _M.ENDED, _M.FAILED, _M.TIMEOUTS = 0, 1, 2, 3
_M.ERRORS, _M.ANSWERED, _M.SECONDS, _M.REFUSED_MARKS = 4, 5, 6, 7
--- Those that totals() adds up.
_M.TOTALS = {
  requests = _M.BEGUN, failures = _M.FAILED, timeouts = _M.TIMEOUTS, errors = _M.ERRORS, answered = _M.ANSWERED,
  seconds = _M.SECONDS, refused_marks = _M.REFUSED_MARKS,
}

--- A server's shared numbers, as offsets from shared_offset() into shared(). Moments are seconds of
-- system.monotonic(), 0 is never. The first eight are written seldom, so that reading them costs no cache miss.
_M.UNTIL = 0            -- the end of its ejection
_M.REASON = 1           -- why: an index of ejection.REASONS
_M.TIMES = 2            -- ejections so far, those that were lived down taken off
_M.STREAK_ERRORS = 3    -- consecutive failures of each kind
_M.STREAK_TIMEOUTS = 4
_M.STREAK_SERVER_ERRORS = 5
_M.PARDONED = 6         -- when it was forgiven last, or its cell taken
_M.ENDED_AT = 7         -- the end of the last ejection by failures
_M.EWMA = 8             -- mean response time in seconds, 0 without one
_M.EWMA_AT = 9          -- when it was updated
_M.MARKS = 10           -- like TIMES, of marks that were believed
_M.MARK_ENDED_AT = 11

local SLOTS = 512
local NUMBERS, SHARED_NUMBERS = 8, 16
-- Cells begin on cache lines.
local EPOCH, TABLE, REVISION, SHARED = 0, 1, 2, 8
local ALL_SLOTS = SHARED + SHARED_NUMBERS * _M.CELLS
local PID, START, FIRST = 0, 1, 8
local STRIDE = FIRST + NUMBERS * _M.CELLS

local memory, slots

--- Makes the memory, all zeros. Returns its address.
function _M.reserve()
  return system.share_memory((ALL_SLOTS + SLOTS * STRIDE) * ffi.sizeof("double"))
end

--- Attaches to the memory at `address`. Called by the master for each configuration.
function _M.attach(address)
  memory = ffi.cast("double *", address)
  slots = memory + ALL_SLOTS
end

local function is_used(slot)
  return slots[slot * STRIDE + PID] ~= 0
end

local function owner_lives(slot)
  return system.start_time(slots[slot * STRIDE + PID]) == slots[slot * STRIDE + START]
end

-- Slots are used from the first on and never given back, so the first unused one ends them.
local function each_used()
  local slot = -1
  return function()
    slot = slot + 1
    if slot < SLOTS and is_used(slot) then
      return slot
    end
  end
end

--- Where a cell (0 to CELLS - 1) begins within a slot.
function _M.cell_offset(cell)
  return FIRST + NUMBERS * cell
end

-- Forgets what was in flight in the slot of a process that is gone.
local function settle(slot)
  for cell = 0, _M.CELLS - 1 do
    local at = slot * STRIDE + _M.cell_offset(cell)
    slots[at + _M.ENDED] = slots[at + _M.BEGUN]
  end
end

--- Takes a slot for process `pid` and settles those of the dead; the caller holds the lock. Returns the slot as a
-- `double *` to index with cell_offset() + BEGUN and so on; nil when 512 living workers have one.
function _M.claim(pid)
  local mine, used
  for slot in each_used() do
    used = slot
    if not owner_lives(slot) then
      settle(slot)
      mine = mine or slot
    end
  end
  mine = mine or (used or -1) + 1
  if mine == SLOTS then
    return nil
  end
  local start = mine * STRIDE
  slots[start + START] = system.start_time(pid)
  slots[start + PID] = pid
  return slots + start
end

--- The living workers: {slots = {slot…}, pids = {pid…}}, those that shut down included.
function _M.living()
  local living = { slots = {}, pids = {} }
  for slot in each_used() do
    if owner_lives(slot) then
      table.insert(living.slots, slot)
      table.insert(living.pids, slots[slot * STRIDE + PID])
    end
  end
  return living
end

-- Exact where no picks come any more. Elsewhere a try may begin and end between the two reads, and make them differ
-- by less than nothing.
local function in_flight(slot, cell)
  local at = slot * STRIDE + FIRST + NUMBERS * cell
  return math.max(0, slots[at + _M.BEGUN] - slots[at + _M.ENDED])
end

--- Requests in flight at a cell's server, over the given slots.
function _M.in_flight(cell, given)
  local sum = 0
  for _, slot in ipairs(given) do
    sum = sum + in_flight(slot, cell)
  end
  return sum
end

--- The same over all slots, cheap enough for a pick. A dead worker counts until its successor claims a slot.
function _M.load(cell)
  local sum, slot = 0, 0
  while slot < SLOTS and is_used(slot) do
    sum, slot = sum + in_flight(slot, cell), slot + 1
  end
  return sum
end

--- The counters of a cell since its memory was made, over all workers that ever were: {requests, failures, …}, the
-- names of TOTALS.
function _M.totals(cell)
  local totals = {}
  for name in pairs(_M.TOTALS) do
    totals[name] = 0
  end
  for slot in each_used() do
    local at = slot * STRIDE + _M.cell_offset(cell)
    for name, number in pairs(_M.TOTALS) do
      totals[name] = totals[name] + slots[at + number]
    end
  end
  return totals
end

--- The shared numbers as a `double *`, to index with shared_offset() + UNTIL and so on.
function _M.shared()
  return memory
end

--- Where the shared numbers of a cell begin.
function _M.shared_offset(cell)
  return SHARED + SHARED_NUMBERS * cell
end

--- Forgets all shared numbers of a cell, for another server or the same one anew; `now` is its pardon.
function _M.clear_shared(cell, now)
  local at = _M.shared_offset(cell)
  for i = at, at + SHARED_NUMBERS - 1 do
    memory[i] = 0
  end
  memory[at + _M.PARDONED] = now
end

--- The number of the table in force, one higher than that of the table before; 0 before the first. Read at each pick.
function _M.table_number()
  return memory[TABLE]
end

--- Its revision, which the daemon gave it; 0 without a table.
function _M.revision()
  return memory[REVISION]
end

--- Puts a table in force. Who then reads its number or revision and, behind a barrier, the counters, sees every pick
-- that used an older one.
function _M.put_in_force(number, revision)
  memory[TABLE] = number
  system.barrier()
  memory[REVISION] = revision
end

--- What changes with each ejection and pardon; compare with what you saw last.
function _M.epoch()
  return memory[EPOCH]
end

--- Tells all workers that ejections changed; the caller holds the lock of ejections.
function _M.next_epoch()
  memory[EPOCH] = memory[EPOCH] + 1
end

return _M
