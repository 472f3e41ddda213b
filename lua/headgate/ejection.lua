-- Ejections, which are seen by all workers at once: servers out of traffic for a while because their tries failed, or
-- because they said in a response that they go offline. The rules are in outlier.lua, the numbers in stats.lua.
--
-- `upstream` is one of upstream.lua. Used of it are `servers`, `outlier`, `quarantine_ms` and `fail_open`; kept here
-- are `ejected` of each server, their number `ejected`, the `epoch` that both stand for (see stats.lua), and `expires`,
-- when the next ejection ends, or nil.
local lock = require("headgate.lock")
local outcome = require("headgate.outcome")
local outlier = require("headgate.outlier")
local stats = require("headgate.stats")
local system = require("headgate.system")

local _M = {}

local UNTIL, REASON, PARDONED = stats.UNTIL, stats.REASON, stats.PARDONED
local STREAK_ERRORS, STREAK_TIMEOUTS, STREAK_SERVER_ERRORS =
  stats.STREAK_ERRORS, stats.STREAK_TIMEOUTS, stats.STREAK_SERVER_ERRORS

local MARK = 4
-- What the counters say; the kinds of failure are fields of a table's `outlier`, too.
local REASONS = {
  [outcome.FAILED] = "errors", [outcome.TIMED_OUT] = "timeouts", [outcome.SERVER_ERROR] = "server_errors",
  [MARK] = "mark",
}
local STREAKS = {
  [outcome.FAILED] = STREAK_ERRORS, [outcome.TIMED_OUT] = STREAK_TIMEOUTS,
  [outcome.SERVER_ERROR] = STREAK_SERVER_ERRORS,
}
local MARKS_SHARE = 0.5

local function exclusive(work, ...)
  return lock.hold("ejections", 0.25, system.pause, work, ...)
end

--- Brings `ejected` of an upstream's servers up to date.
function _M.refresh(upstream, now)
  local shared = stats.shared()
  -- Read before the ejections, as it is written behind them: one that comes now is seen as a change the next time.
  upstream.epoch = stats.epoch()
  system.barrier()
  upstream.ejected, upstream.expires = 0, nil
  for _, server in ipairs(upstream.servers) do
    local until_ = shared[server.shared + UNTIL]
    server.ejected = until_ > now and not upstream.fail_open
    if server.ejected then
      upstream.ejected = upstream.ejected + 1
      upstream.expires = math.min(upstream.expires or until_, until_)
    end
  end
end

-- Ejects `server` where the bounds allow it; true when it is out. The caller holds the lock.
local function eject(upstream, server, reason, now)
  local shared = stats.shared()
  local is_mark = reason == MARK
  local out, serving = 0, 0
  for _, each in ipairs(upstream.servers) do
    local is_out = shared[each.shared + UNTIL] > now
    if is_out and (shared[each.shared + REASON] == MARK) == is_mark or each.outlier and not is_mark then
      out = out + 1
    end
    if each.eligible and not is_out then
      serving = serving + 1
    end
  end
  local at = server.shared
  local is_out = shared[at + UNTIL] > now
  if is_out and (not is_mark or shared[at + REASON] == MARK) then
    return true
  end
  local share = is_mark and MARKS_SHARE or upstream.outlier.max_ejected
  if not outlier.allows(share, #upstream.servers, out, serving, server.eligible and not is_out) then
    return false
  end
  local until_
  if is_mark then
    until_ = now + upstream.quarantine_ms / 1000
    local before = outlier.remembered(shared[at + stats.MARKS], shared[at + stats.MARK_ENDED_AT],
      2 * upstream.quarantine_ms, now)
    shared[at + stats.MARKS], shared[at + stats.MARK_ENDED_AT] = before + 1, until_
  else
    local times = outlier.remembered(shared[at + stats.TIMES], shared[at + stats.ENDED_AT], upstream.outlier.base_ms,
      now) + 1
    until_ = now + outlier.length(upstream.outlier, times)
    shared[at + stats.TIMES], shared[at + stats.ENDED_AT] = times, until_
  end
  shared[at + REASON] = reason
  shared[at + UNTIL] = until_
  system.barrier()
  stats.next_epoch()
  return true
end

--- Notes that a try was answered below 500.
function _M.note_success(server)
  local shared, at = stats.shared(), server.shared
  if shared[at + STREAK_ERRORS] ~= 0 or shared[at + STREAK_TIMEOUTS] ~= 0 or shared[at + STREAK_SERVER_ERRORS] ~= 0
  then
    shared[at + STREAK_ERRORS], shared[at + STREAK_TIMEOUTS], shared[at + STREAK_SERVER_ERRORS] = 0, 0, 0
  end
end

--- Notes a failure of `kind` (of outcome.lua) by a try that began at `began`, and ejects the server when its streak is
-- full. What began before the server was pardoned, or ends while it is out, counts for nothing.
function _M.note_failure(upstream, server, kind, began, now)
  local wanted = upstream.outlier and upstream.outlier[REASONS[kind]] or 0
  local shared, at = stats.shared(), server.shared
  if wanted == 0 or upstream.fail_open or began < shared[at + PARDONED] or shared[at + UNTIL] > now then
    return
  end
  local streak = at + STREAKS[kind]
  shared[streak] = shared[streak] + 1
  if shared[streak] >= wanted then
    -- Where the bounds refuse, the next full streak asks again: a failing upstream is not searched at every failure.
    shared[streak] = 0
    exclusive(eject, upstream, server, kind, now)
  end
end

local function believe(upstream, server, now)
  local shared, at = stats.shared(), server.shared
  if shared[at + UNTIL] <= now
    and outlier.lies(shared[at + stats.MARKS], shared[at + stats.MARK_ENDED_AT], upstream.quarantine_ms, now)
  then
    return false
  end
  return eject(upstream, server, MARK, now)
end

--- Takes the server out because it marked itself in the response to a try that began at `began`; false when it is not
-- believed. One that is out by a mark already stays so until that mark's end.
function _M.mark(upstream, server, began, now)
  if (upstream.quarantine_ms or 0) == 0 or upstream.fail_open or began < stats.shared()[server.shared + PARDONED] then
    return false
  end
  return (exclusive(believe, upstream, server, now))
end

local function forget(cells)
  local now = system.monotonic()
  for _, cell in ipairs(cells) do
    stats.clear_shared(cell, now)
  end
  system.barrier()
  stats.next_epoch()
  return true
end

--- Forgets everything about the servers of these cells.
function _M.forgive(cells)
  -- Where the lock's owner was killed inside, it is better to write without it than to leave this out.
  if #cells > 0 and not exclusive(forget, cells) then
    forget(cells)
  end
end

--- What the counters say of a cell: {reason, remaining_ms, times}, or nil.
function _M.describe(cell, now)
  local shared, at = stats.shared(), stats.shared_offset(cell)
  local until_, reason = shared[at + UNTIL], shared[at + REASON]
  if until_ <= now then
    return nil
  end
  return {
    reason = REASONS[reason],
    remaining_ms = (until_ - now) * 1000,
    times = shared[at + (reason == MARK and stats.MARKS or stats.TIMES)],
  }
end

return _M
