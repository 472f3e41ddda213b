-- PURE: when failures or a mark take a server out of traffic, and for how long. No clock, no nginx, no shared memory:
-- `now` is an argument, in seconds; lengths in a table are milliseconds. Envoy's outlier detection, where it has one.
--
-- Bounds on how much may be out at once, for an upstream of `size` servers: by failures floor(max_ejected x size), by
-- marks half of it, both at least 1; and whatever the reason, never the last server that would serve. Outliers that the
-- table's author found count with those by failures.
local _M = {}

local floor, max, min = math.floor, math.max, math.min

--- How many earlier ejections still count at `now`: one is lived down for each `base_ms` that the server has spent in
-- traffic since the last one ended.
function _M.remembered(times, ended_at, base_ms, now)
  return max(0, times - floor(max(0, now - ended_at) * 1000 / base_ms))
end

--- Seconds that the ejection number `times` lasts.
function _M.length(outlier, times)
  return min(outlier.base_ms * times, outlier.cap_ms) / 1000
end

--- May one more server be ejected? `out` are out for the same kind of reason, `serving` would serve now, the server
-- itself included where `serves`.
function _M.allows(share, size, out, serving, serves)
  return out < max(1, floor(share * size)) and (not serves or serving > 1)
end

--- Is a mark a lie? A server that came back after a mark, was not forgiven since (as a restart is) and marks itself
-- again is not believed for `quarantine_ms` after its first quarantine, twice that after the next one, and so on.
function _M.lies(marks, ended_at, quarantine_ms, now)
  return marks > 0 and now < ended_at + marks * quarantine_ms / 1000
end

return _M
