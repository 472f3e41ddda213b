"""A built wheel, installed into an empty environment far from the checkout, has all that it needs and works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing but the wheel and what it depends on."""
    home = tmp_path_factory.mktemp("far from the checkout")
    run(ROOT, sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(home), str(ROOT))
    (wheel,) = home.glob("headgate-*.whl")
    run(home, sys.executable, "-m", "venv", str(home / "env"))
    pip = (str(home / "env/bin/python"), "-m", "pip")
    run(home, *pip, "install", "--quiet", "-c", str(ROOT / "constraints.txt"), f"headgate[demo] @ {wheel.as_uri()}")
    return home


def run(where: Path, *command: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HEADGATE_CONFIG")}
    done = subprocess.run(command, cwd=where, env=clean, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_carries_what_nginx_loads(home: Path) -> None:
    include = run(home, "env/bin/headgate", "include")
    (line,) = (line for line in include.splitlines() if line.startswith("lua_package_path"))
    lua = Path(line.split('"')[1].split("/?.lua")[0])
    assert lua.is_relative_to(home), "the files of the wheel, not those of the checkout"
    assert {path.relative_to(lua) for path in lua.rglob("*.lua")} == {
        path.relative_to(ROOT / "lua") for path in (ROOT / "lua").rglob("*.lua")
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_runs_from_the_wheel_alone(home: Path) -> None:
    told = run(home, "env/bin/headgate", "demo", "--once")
    assert "0 failed requests of" in told
