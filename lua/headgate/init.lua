-- What nginx's hooks call, one function for each; nginx/headgate.conf says where. Nothing is decided here.
local balancer = require("headgate.balancer")
local control = require("headgate.control")
local stats = require("headgate.stats")
local store = require("headgate.store")
local system = require("headgate.system")

local _M = {
  balance = balancer.balance,
  log = balancer.log,
  init_worker = balancer.start,
  control = control.serve,
}

--- init_by_lua, in the master: at nginx's start, at a reload, and in `nginx -t`. `options`: {socket = path, snapshot
-- = path}.
function _M.init(options)
  if not system.is_configuration_test() then
    system.remove_stale_socket(options.socket)
  end
  store.attach()
  if stats.revision() > 0 then
    return
  end
  local done, loaded, reason = pcall(store.load_snapshot, options.snapshot)
  if not done or not loaded then
    ngx.log(ngx.ERR, "headgate: snapshot ", options.snapshot, " is not used, nginx balances natively until a table is ",
      "published: ", tostring(done and reason or loaded))
  end
end

return _M
