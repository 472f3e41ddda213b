"""Picks stay in what LuaJIT has compiled: a closure that is made on their way sends every request to the interpreter.

That costs more than all else that a pick does, and no other test would see it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lua.house import STICKY, edge, server, warm_up

pytestmark = pytest.mark.usefixtures("lua_nginx")

VMDEF = next(Path("/usr/share").glob("luajit-2.1*/jit/vmdef.lua"), None)
WATCH = """
    location = /watch {
        content_by_lua_block {
            local errors, util, found = dofile("%s").traceerr, require("jit.util"), {}
            package.loaded.found = found
            require("jit").attach(function(what, _, func, pc, code)
                if what == "abort" and errors[code] and errors[code]:find("^NYI: bytecode") then
                    local at = util.funcinfo(func, pc)
                    found[#found + 1] = at.source .. ":" .. at.currentline
                end
            end, "trace")
            ngx.say("watching")
        }
    }
    location = /found { content_by_lua_block { ngx.say(table.concat(require("found"), "\\n")) } }
"""
METHODS: list[dict[str, Any]] = [
    {"method": "round_robin"},
    {"method": "round_robin", "sticky": STICKY},
    {"method": "least_conn"},
    {"method": "ewma"},
    {"method": "random"},
    {"method": "random", "two": True},
    {"method": "hash", "key": "$request_id"},
    {"method": "hash", "key": "$request_id", "consistent": True},
    {"method": "hash", "key": "$request_id", "consistent": True, "bound": 1.25},
    {"method": "ip_hash"},
]


@pytest.mark.skipif(VMDEF is None, reason="LuaJIT's own Lua files are not installed")
@pytest.mark.parametrize("limits", [{}, {"max_conns": 100}], ids=["", "limited"])
@pytest.mark.parametrize("method", METHODS, ids=str)
async def test_no_pick_leaves_compiled_code(method: dict[str, Any], limits: dict[str, int]) -> None:
    async with edge(3, workers=1, extra=WATCH % VMDEF) as app:
        warming = warm_up(duration_ms=600_000, floor=0.2)
        first, *others = (server(each.port, **limits) for each in app.backends)
        await app.publish([{**first, "warm_up": warming}, *others], **method)
        async with app.session.get(app.base + "/watch") as response:
            assert await response.text() == "watching\n"
        await app.shares(300)
        async with app.session.get(app.base + "/found") as response:
            places = (await response.text()).split()
        assert [place for place in places if "headgate" in place] == []
