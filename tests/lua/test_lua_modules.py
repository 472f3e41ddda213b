"""The pure Lua modules, by busted; and that all Lua is clean for luacheck."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.support.nginx import ROOT


def run(*command: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed (apt-get install lua-busted lua-check)")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pure_modules_pass_their_specs() -> None:
    run("busted", "--lpath", "lua/?.lua;lua/?/init.lua", "--pattern", "_spec", "tests/lua/spec")


def test_no_module_reads_the_wall_clock() -> None:
    """Its jumps are without effect on warm-ups, ejections, quarantines and response times."""
    found = [
        path.name
        for path in (ROOT / "lua").rglob("*.lua")
        if re.search(r"ngx\.(now|time|update_time|localtime|utctime)\b|os\.(time|date|clock)\b", path.read_text())
    ]
    assert found == []
    assert "CLOCK_MONOTONIC = 1\n" in (ROOT / "lua" / "headgate" / "system.lua").read_text()


def test_lua_is_clean() -> None:
    run("luacheck", "--quiet", "lua", "tests/lua/spec")
