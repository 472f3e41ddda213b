"""The flag itself, and that an application needs nothing else of Headgate for it."""

from __future__ import annotations

import pkgutil
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import controller.integration

HOME = Path(controller.integration.__file__).parent


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", script], capture_output=True, text=True, timeout=20)


def test_the_package_works_where_nothing_but_itself_is_installed(tmp_path: Path) -> None:
    shutil.copytree(HOME, tmp_path / "controller" / "integration")
    names = sorted({module.name for module in pkgutil.iter_modules([str(HOME)])} - {"worker"})
    assert "gunicorn" in names
    imports = "; ".join(f"import controller.integration.{name}" for name in names)
    done = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {imports}; print('imported')", "-I", "-S")
    assert (done.stdout, done.stderr) == ("imported\n", "")


def test_whoever_sets_the_flag_every_process_of_the_family_sees_it() -> None:
    script = """
import os
from controller.integration import shutdown
there, back = os.pipe(), os.pipe()
if not os.fork():
    os.read(there[0], 1)
    os.write(back[1], b"yes" if shutdown.begun() else b"no")
    os._exit(0)
assert not shutdown.begun()
if not os.fork():
    shutdown.begin()
    os._exit(0)
os.write(there[1], b"x" if os.wait() else b"")
print(os.read(back[0], 3).decode(), shutdown.begun())
"""
    assert run(script).stdout == "yes True\n"


@pytest.mark.parametrize(
    ("before", "said", "status"),
    [
        ("lambda *_: print('the server stops')", "the server stops\nTrue\n", 0),
        ("signal.SIG_IGN", "True\n", 0),
        ("signal.SIG_DFL", "", -signal.SIGTERM),
    ],
)
def test_term_sets_the_flag_and_then_does_what_it_did_before(before: str, said: str, status: int) -> None:
    done = run(
        "import os, signal\n"
        "from controller.integration import shutdown\n"
        f"signal.signal(signal.SIGTERM, {before})\n"
        "shutdown.begin_on_term()\n"
        "assert not shutdown.begun()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(shutdown.begun())\n"
    )
    assert (done.stdout, done.returncode, done.stderr) == (said, status, "")
