"""What is read from a command line is what gunicorn itself makes of it; nothing of the user's runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from controller.doctor.launch import Launch, Reading, read

NAMES = ("timeout", "graceful_timeout", "keepalive", "worker_class", "threads", "preload_app", "daemon", "backlog")
MASTER = (sys.executable, "-m", "gunicorn")


def file(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except OSError:
        return None


def reading(directory: Path, *options: str, **environment: str) -> Reading:
    found = read(Launch((*MASTER, *options, "app:app"), environment, str(directory)), file)
    assert found is not None
    return found


def what_gunicorn_says(directory: Path, *options: str, **environment: str) -> dict[str, str]:
    done = subprocess.run(
        [*MASTER, *options, "--print-config", "app:app"],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    pairs = (re.match(r"(\w+) += (.*)", line) for line in done.stdout.splitlines())
    told = {pair[1]: pair[2] for pair in pairs if pair}
    assert "timeout" in told, done.stderr
    return told


@pytest.mark.parametrize(
    ("options", "variables", "conf"),
    [
        ((), "", None),
        (
            ("-t", "7", "--graceful-timeout=8", "--keep-alive", "9", "-b", "127.0.0.1:0", "-w2", "--backlog", "5"),
            "",
            None,
        ),
        (("--keep", "3", "--thread", "4", "-kgthread", "--preload", "-n", "name"), "", None),
        (("--timeout", "1"), "--timeout 2 --keep-alive 3", "timeout = 4\nkeepalive = 5\ngraceful_timeout = 6\n"),
        (("-c", "file:other/own.py"), "-c nowhere.py -D", "backlog = 1\n"),
        (("--chdir", "other"), "", "timeout: int = 4\nthreads = 2\n"),
    ],
)
def test_settings_are_those_that_gunicorn_prints(
    tmp_path: Path, options: tuple[str, ...], variables: str, conf: str | None
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "own.py").write_text("timeout = 77\npreload_app = True\n")
    (other / "gunicorn.conf.py").write_text("timeout = 78\n")
    for directory in (tmp_path, other):
        (directory / "app.py").write_text("app = print\n")
    if conf is not None:
        (tmp_path / "gunicorn.conf.py").write_text(conf)
    found = reading(tmp_path, *options, GUNICORN_CMD_ARGS=variables)
    told = what_gunicorn_says(tmp_path, *options, GUNICORN_CMD_ARGS=variables)
    assert not found.hidden
    assert {name: str(found.known[name]) for name in NAMES} == {name: told[name] for name in NAMES}


def test_a_setting_that_the_file_computes_is_unknown_and_named(tmp_path: Path) -> None:
    (tmp_path / "gunicorn.conf.py").write_text(
        "import os\ntimeout = int(os.environ['T'])\nkeepalive = 9\nif os.name == 'posix':\n    backlog = 1\n"
        "def helper():\n    threads = 3\n    return threads\n"
    )
    found = reading(tmp_path)
    assert set(NAMES) - set(found.known) == {"timeout", "backlog"}
    assert (found.known["keepalive"], found.known["threads"]) == (9, 1)
    assert found.hidden == (f"{tmp_path}/gunicorn.conf.py computes backlog, timeout",)
    assert reading(tmp_path, "--timeout", "5").known["timeout"] == 5


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        ("from base import *\n", (), "computes"),
        ("timeout = (\n", (), "no Python"),
        (None, ("-c", "gone.py"), "gone.py cannot be read"),
        (None, ("-c", "python:settings"), "python:settings cannot be read"),
        (None, ("--timeout", "soon"), "not gunicorn's"),
    ],
)
def test_what_cannot_be_known_is_said_and_not_guessed(
    tmp_path: Path, content: str | None, options: tuple[str, ...], told: str
) -> None:
    if content is not None:
        (tmp_path / "gunicorn.conf.py").write_text(content)
    found = reading(tmp_path, *options)
    assert dict(found.known) == {}
    assert found.keep_alive is None
    assert told in found.hidden[0]


WORKERS = """
from uvicorn_worker import UvicornWorker
import os
class Mended(UvicornWorker):
    CONFIG_KWARGS = {**UvicornWorker.CONFIG_KWARGS, "timeout_graceful_shutdown": 25}
class Called(UvicornWorker):
    CONFIG_KWARGS = dict(timeout_graceful_shutdown=25, timeout_keep_alive=70)
class Computed(UvicornWorker):
    CONFIG_KWARGS = {"timeout_graceful_shutdown": int(os.environ["G"])}
class Filled(UvicornWorker):
    def __init__(self, *a):
        self.CONFIG_KWARGS["timeout_graceful_shutdown"] = 5
class Plain(UvicornWorker):
    pass
class Other:
    pass
"""


@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        ("sync", (False, 0.0, None)),
        ("gthread", (False, 2.0, None)),
        ("uvicorn.workers.UvicornWorker", (True, 2.0, None)),
        ("uvicorn_worker.UvicornWorker", (True, 2.0, None)),
        ("controller.integration.worker.UvicornWorker", (True, 2.0, 29.0)),
        ("own.workers.Mended", (True, 2.0, 25.0)),
        ("own.workers.Called", (True, 70.0, 25.0)),
        ("own.workers.Computed", (True, 2.0, inf)),
        ("own.workers.Filled", (True, 2.0, 5.0)),
        ("own.workers.Plain", (True, 2.0, None)),
        ("own.workers.Other", (None, None, None)),
        ("own.workers.Missing", (None, None, None)),
        ("gone.Worker", (None, None, None)),
    ],
)
def test_worker_classes_are_read_and_not_imported(tmp_path: Path, worker: str, expected: tuple[object, ...]) -> None:
    package = tmp_path / "lib" / "own"
    package.mkdir(parents=True)
    (package / "workers.py").write_text(WORKERS + "raise SystemExit('it was imported')\n")
    found = reading(tmp_path, "-k", worker, PYTHONPATH=f"/nowhere:{tmp_path}/lib")
    assert (found.uvicorn, found.keep_alive, found.own_graceful) == expected
    assert bool(found.hidden) == (worker in ("own.workers.Missing", "gone.Worker"))


def test_sync_with_threads_keeps_connections_as_gthread_does(tmp_path: Path) -> None:
    assert reading(tmp_path, "--threads", "4", "--keep-alive", "6").keep_alive == 6.0


@pytest.mark.parametrize(
    ("words", "keep_alive"),
    [
        (("/venv/bin/uvicorn", "app:app"), 5.0),
        (("/venv/bin/python", "/venv/bin/uvicorn", "app:app", "--timeout-keep-alive", "70"), 70.0),
        (("python3", "-m", "uvicorn", "--timeout-keep-alive=1"), 1.0),
    ],
)
def test_a_uvicorn_on_its_own_is_known_by_its_command(words: tuple[str, ...], keep_alive: float) -> None:
    found = read(Launch(words, {}, "/"), file)
    assert found is not None
    assert (found.uvicorn, found.keep_alive, dict(found.known)) == (True, keep_alive, {})


@pytest.mark.parametrize(
    "words",
    [("gunicorn: master [app]",), ("nginx",), ("python", "manage.py"), (), ("vim", "notes-on-gunicorn.txt")],
)
def test_other_commands_are_neither(words: tuple[str, ...]) -> None:
    assert read(Launch(words, {}, "/"), file) is None
