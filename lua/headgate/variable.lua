-- Variables of nginx that are read for every request. `ngx.var` lowers and hashes a name at each reading, which takes
-- longer than the look-up; here that is done once for each name.
--
-- ngx_http_get_variable() and its value are what every module of nginx is compiled against, and have been the same for
-- more than ten years. The value's bit fields are read as one number, since LuaJIT does not compile bit fields.
local bit = require("bit")
local ffi = require("ffi")
require("resty.core.base") -- declares ngx_http_request_t

ffi.cdef([[
struct headgate_name { size_t length; const char *data; char text[?]; };
struct headgate_variable { unsigned int bits; const char *data; };
struct headgate_variable *headgate_get_variable(ngx_http_request_t *request, void *name, uintptr_t key)
  __asm__("ngx_http_get_variable");
]])

local C = ffi.C
local band = bit.band
local LENGTH, NOT_FOUND = 0x0fffffff, 0x40000000

-- Where an nginx did not have it, `nginx -t` shall say so and not the first request.
assert(C.headgate_get_variable)

local _M = {}

-- nginx's ngx_str_t of a text, which it holds itself.
local function named(text)
  local name = ffi.new("struct headgate_name", #text + 1)
  name.length, name.data = #text, name.text
  ffi.copy(name.text, text)
  return name
end

-- nginx's ngx_hash_key().
local function hash(text)
  local key = 0ULL
  for i = 1, #text do
    key = key * 31 + text:byte(i)
  end
  return key
end

--- A function that gives the value of a variable for a request (as get_request() names it), nil where it has none.
function _M.reader(variable)
  local name, key = named(variable:lower()), hash(variable:lower())
  return function(request)
    local value = C.headgate_get_variable(request, name, key)
    if value == nil or band(value.bits, NOT_FOUND) ~= 0 then
      return nil
    end
    return ffi.string(value.data, band(value.bits, LENGTH))
  end
end

return _M
