"""headgate.variable against ngx.var, in a real nginx."""

from __future__ import annotations

import http.client
import json

import pytest

from tests.support.nginx import Nginx, free_port

pytestmark = pytest.mark.usefixtures("lua_nginx")

NAMES = ("cookie_Route", "cookie_empty", "cookie_none", "arg_x", "http_x.dotted", "remote_addr", "nonsense")
READ = """
    local reader, request = require("headgate.variable").reader, require("resty.core.base").get_request()
    local found = {}
    for name in ngx.var.arg_names:gmatch("[^,]+") do
        table.insert(found, { reader(name)(request) or ngx.null, ngx.var[name] or ngx.null })
    end
    ngx.say(require("cjson").encode(found))
"""


def test_a_reader_gives_what_nginx_gives_for_every_kind_of_variable() -> None:
    port = free_port()
    with Nginx(f"server {{ listen 127.0.0.1:{port}; location / {{ content_by_lua_block {{ {READ} }} }} }}") as nginx:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        headers = {"Cookie": "a=b; route=r%41; empty=", "X.Dotted": "yes"}
        connection.request("GET", f"/?x=1%20&names={','.join(NAMES)}", headers=headers)
        found = dict(zip(NAMES, json.loads(connection.getresponse().read()), strict=True))
        connection.close()
        assert nginx.errors() == []
    assert {name: ours for name, (ours, _) in found.items()} == {name: theirs for name, (_, theirs) in found.items()}
    assert {name: ours for name, (ours, _) in found.items()} == {
        "cookie_Route": "r%41",
        "cookie_empty": "",
        "cookie_none": None,
        "arg_x": "1%20",
        "http_x.dotted": None,
        "remote_addr": "127.0.0.1",
        "nonsense": None,
    }
