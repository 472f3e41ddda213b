-- PURE: a key decides. No clock, no nginx.
--
-- nginx's ngx_http_upstream_hash_module, so that an adopted upstream keeps its mapping: the plain method is that of
-- Cache::Memcached, the consistent one that of Cache::Memcached::Fast (ketama). Servers that cannot serve keep their
-- places, so only their own keys move, and warm-ups do not move keys: any changed weight would move those of others.
--
-- With a bound the circle is "consistent hashing with bounded loads" (Mirrokni, Thorup, Zadimoghaddam, 2016): a server
-- takes at most bound times its fair share of the requests in flight, ceil(bound * (all in flight + 1) * weight / all
-- weights), where the weight is that of its warm-up; a key whose server is full goes on along the circle. Those
-- capacities add up to more than what is in flight, so there is always room.
local bit = require("bit")
local round_robin = require("headgate.methods.round_robin")
local slots = require("headgate.methods.slots")

local _M = { reweigh = round_robin.reweigh }

local band, bxor, rshift = bit.band, bit.bxor, bit.rshift
local POINTS_PER_WEIGHT = 160
-- So that 3 * (1 / 3) is not above 1.
local ROUNDING = 1e-9

local crc_table = {}
for i = 0, 255 do
  local value = i
  for _ = 1, 8 do
    value = band(value, 1) == 1 and bxor(rshift(value, 1), 0xEDB88320) or rshift(value, 1)
  end
  crc_table[i] = value
end

local function crc_byte(crc, byte)
  return bxor(rshift(crc, 8), crc_table[band(bxor(crc, byte), 255)])
end

local function crc_text(crc, text)
  for i = 1, #text do
    crc = crc_byte(crc, text:byte(i))
  end
  return crc
end

local function crc32(text)
  return bxor(crc_text(-1, text), -1) % 4294967296
end

-- The register after HOST \0 PORT of a `server` line as written. Digits behind the last colon are the port, so an
-- IPv6 address without brackets would lose its end; nginx does the same.
local function crc_of_address(address)
  local host, port = address, ""
  if address:lower():find("^unix:") then
    host = address:sub(6)
  elseif address:find(":%d*$") then
    host, port = address:match("^(.*):(%d*)$")
  end
  return crc_text(crc_byte(crc_text(-1, host), 0), port)
end

-- Sorts points by hash: four rounds of counting by one byte each, since table.sort() would stop a worker for a second
-- where there are 1,000 servers.
local function sort(hashes, owners)
  for shift = 0, 24, 8 do
    local starts = {}
    for digit = 0, 256 do
      starts[digit] = 1
    end
    for i = 1, #hashes do
      local digit = band(rshift(hashes[i], shift), 255)
      starts[digit + 1] = starts[digit + 1] + 1
    end
    for digit = 1, 256 do
      starts[digit] = starts[digit] + starts[digit - 1] - 1
    end
    local hashes_to, owners_to = {}, {}
    for i = 1, #hashes do
      hashes_to[i], owners_to[i] = 0, 0
    end
    for i = 1, #hashes do
      local digit = band(rshift(hashes[i], shift), 255)
      local to = starts[digit]
      starts[digit] = to + 1
      hashes_to[to], owners_to[to] = hashes[i], owners[i]
    end
    hashes, owners = hashes_to, owners_to
  end
  return hashes, owners
end

-- The circle of points for {address, weight} in `places`. Of points with one hash the first counts.
local function new_circle(places, signature)
  local hashes, owners = {}, {}
  for owner, place in ipairs(places) do
    local base, hash = crc_of_address(place.address), 0
    for _ = 1, math.max(1, math.floor(place.weight * POINTS_PER_WEIGHT)) do
      local crc = base
      for shift = 0, 24, 8 do
        crc = crc_byte(crc, band(rshift(hash, shift), 255))
      end
      hash = bxor(crc, -1) % 4294967296
      hashes[#hashes + 1], owners[#owners + 1] = hash, owner
    end
  end
  hashes, owners = sort(hashes, owners)
  local circle = { hashes = {}, owners = {}, size = 0, signature = signature }
  for i, hash in ipairs(hashes) do
    if hash ~= hashes[i - 1] then
      circle.size = circle.size + 1
      circle.hashes[circle.size], circle.owners[circle.size] = hash, owners[i]
    end
  end
  return circle
end

-- Servers by the address as written, in order: those of one host name share its points. Each place is {address,
-- weight, servers}.
local function places_of(all)
  local places, by_address = {}, {}
  for _, server in ipairs(all) do
    local place = by_address[server.written]
    if not place then
      place = { address = server.written, weight = 0, servers = {} }
      by_address[server.written] = place
      places[#places + 1] = place
    end
    place.weight = place.weight + server.weight
    table.insert(place.servers, server)
  end
  return places
end

local function signature_of(places)
  local parts = {}
  for i, place in ipairs(places) do
    parts[i] = place.address .. " " .. place.weight
  end
  return table.concat(parts, "\n")
end

--- As round_robin.new(); `options.all` are the servers of the table in its order, with `eligible` false where one
-- must not be picked, and `written`, the address as nginx.conf has it; `options.consistent` for the circle,
-- `options.bound` for its bound (1 or more), nil without one.
function _M.new(servers, previous, random, options)
  local state = slots.new(servers, previous, random, options)
  state.bound = options.consistent and options.bound
  if state.bound then
    state.ring_of = {}
    for _, ring in ipairs(state.rings) do
      for _, server in ipairs(ring.servers) do
        state.ring_of[server] = ring
      end
    end
  end
  if options.consistent and #state.all > 0 then
    state.places = places_of(state.all)
    local signature, circle = signature_of(state.places), previous and previous.circle
    state.circle = circle and circle.signature == signature and circle or new_circle(state.places, signature)
  end
  return state
end

-- Index of the first point at or behind `hash`, which may be one behind the last.
local function find(circle, hash)
  local low, high = 1, circle.size + 1
  while low < high do
    local middle = math.floor((low + high) / 2)
    if circle.hashes[middle] < hash then
      low = middle + 1
    else
      high = middle
    end
  end
  return low
end

-- Of the pick under way, for the functions below that refuse servers: closures would end the JIT's trace.
local asked, address           -- who else refuses servers, and the address of the place that is looked at
local refuses, bounded         -- who else refuses servers, and the state, for a pick with a bound
local load_of, room            -- what is in flight at a server, and the room for each unit of weight once it is known

local function is_elsewhere(server)
  return server.written ~= address or asked(server)
end

-- A place's server, by round robin where there are several.
local function pick_at(state, place, refused)
  local servers = place.servers
  if #servers == 1 then
    return servers[1].eligible and not refused(servers[1]) and servers[1] or nil
  end
  asked, address = refused, place.address
  return round_robin.pick_except(state, is_elsewhere)
end

local function pick_on_circle(state, refused, key)
  local circle, missed, misses = state.circle, nil, 0
  local start = find(circle, crc32(key))
  for at = start - 1, start + circle.size - 2 do
    local owner = circle.owners[at % circle.size + 1]
    if not (missed and missed[owner]) then
      local server = pick_at(state, state.places[owner], refused)
      if server then
        return server
      end
      missed, misses = missed or {}, misses + 1
      missed[owner] = true
      if misses == #state.places then
        return nil
      end
    end
  end
end

-- How many requests a server may carry for each unit of its weight.
local function room_per_weight(state, refused, load)
  local carried, weight = 0, 0
  for _, ring in ipairs(state.rings) do
    for _, server in ipairs(ring.servers) do
      if not refused(server) then
        carried, weight = carried + load(server), weight + ring.weight
      end
    end
  end
  return state.bound * (carried + 1) / weight
end

-- What all servers carry is summed up only where a key's own server is not idle: an idle one has room for one request
-- in any case.
local function is_refused_or_full(server)
  if refuses(server) then
    return true
  end
  local carried = load_of(server)
  if carried == 0 then
    return false
  end
  room = room or room_per_weight(bounded, refuses, load_of)
  return carried + 1 > math.ceil(room * bounded.ring_of[server].weight - ROUNDING)
end

-- nginx's numbers for a key, without the circle.
local function following(sum, key, rehash)
  return sum + band(rshift(crc32(rehash > 0 and rehash .. key or key), 16), 0x7fff)
end

--- The server of `key`, or where `refused(server)` is true or it is full the next in the key's order; nil when all are
-- refused.
function _M.pick_except(state, refused, load, key)
  if not state.circle then
    return slots.pick(state, refused, following, 0, key)
  elseif not state.ring_of then
    return pick_on_circle(state, refused, key)
  end
  refuses, bounded, load_of, room = refused, state, load, nil
  return pick_on_circle(state, is_refused_or_full, key)
end

return _M
