"""The pure Lua modules, by busted; and that all Lua is clean for luacheck."""

from __future__ import annotations

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


def test_lua_is_clean() -> None:
    run("luacheck", "--quiet", "lua", "tests/lua/spec")
