-- Counters in memory that all workers share: who writes where, and how they are added up. What a counter is for
-- stands in balancer.lua.
--
-- One slot for each worker, one cell for each server, three numbers in a cell. A slot has one writer, the worker that
-- owns it, so counting is a plain addition. A slot belongs to (pid, start time); when that process is gone, the next
-- worker takes the slot over, forgets what was in flight and goes on from the totals: requests are never lost from a
-- sum, and nothing stays in flight for the dead.
--
-- The memory is anonymous and made once by the nginx master, which all workers are forked from; its address waits in
-- a shared dict for the next configuration. So it outlives a reload, as a shared dict does, and costs no lock.
local ffi = require("ffi")
local system = require("headgate.system")

local _M = {}

_M.CELLS = 4096
local SLOTS = 512
local PID, START, FIRST = 0, 1, 2
local STRIDE = FIRST + 3 * _M.CELLS

--- A cell's numbers, as offsets from cell_offset(): tries begun, ended and failed. Begun less ended is in flight.
_M.BEGUN, _M.ENDED, _M.FAILED = 0, 1, 2

local memory

--- Attaches to the memory, making it when `dict` does not know it yet. Called by the master for each configuration.
function _M.attach(dict)
  local address = dict:get("memory")
  if not address then
    address = system.share_memory(SLOTS * STRIDE * ffi.sizeof("double"))
    assert(dict:safe_set("memory", address))
  end
  memory = ffi.cast("double *", address)
end

local function is_used(slot)
  return memory[slot * STRIDE + PID] ~= 0
end

local function owner_lives(slot)
  return system.start_time(memory[slot * STRIDE + PID]) == memory[slot * STRIDE + START]
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

-- Forgets what was in flight in the slot of a process that is gone.
local function settle(slot)
  local start = slot * STRIDE
  for cell = start + FIRST, start + STRIDE - 3, 3 do
    memory[cell + _M.ENDED] = memory[cell + _M.BEGUN]
  end
end

--- Takes a slot for process `pid` and settles those of the dead; the caller holds the lock of store.lua. Returns the
-- slot as a `double *` to index with cell_offset() + BEGUN, ENDED or FAILED; nil when 512 living workers have one.
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
  memory[start + START] = system.start_time(pid)
  memory[start + PID] = pid
  return memory + start
end

--- Where a cell (0 to CELLS - 1) begins within a slot.
function _M.cell_offset(cell)
  return FIRST + 3 * cell
end

--- The living workers: {slots = {slot…}, pids = {pid…}}, those that shut down included.
function _M.living()
  local living = { slots = {}, pids = {} }
  for slot in each_used() do
    if owner_lives(slot) then
      table.insert(living.slots, slot)
      table.insert(living.pids, memory[slot * STRIDE + PID])
    end
  end
  return living
end

-- Exact where no picks come any more. Elsewhere a try may begin and end between the two reads, and make them differ
-- by less than nothing.
local function in_flight(slot, cell)
  local at = slot * STRIDE + FIRST + 3 * cell
  return math.max(0, memory[at + _M.BEGUN] - memory[at + _M.ENDED])
end

--- Requests in flight at a cell's server, over the given slots.
function _M.in_flight(cell, slots)
  local sum = 0
  for _, slot in ipairs(slots) do
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

--- Tries begun and failed at a cell since its memory was made, by all workers that ever were.
function _M.totals(cell)
  local begun, failed = 0, 0
  for slot in each_used() do
    local at = slot * STRIDE + FIRST + 3 * cell
    begun = begun + memory[at + _M.BEGUN]
    failed = failed + memory[at + _M.FAILED]
  end
  return begun, failed
end

return _M
