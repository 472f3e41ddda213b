"""`headgate doctor` as people run it, at a real nginx and a real gunicorn; and docs/doctor.md lists every check."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from controller.doctor.checks import CHECKS
from tests.support.gunicorn import GTHREAD, Gunicorns, free_port
from tests.support.nginx import Nginx, missing_parts

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "doctor.md"
HOOK = 'balancer_by_lua_block { require("headgate").balance("app") }'

needs_nginx = pytest.mark.skipif(missing_parts() is not None, reason=missing_parts() or "")


@pytest.fixture
def gunicorns(tmp_path: Path) -> Iterator[Gunicorns]:
    started = Gunicorns(tmp_path)
    yield started
    started.close()


# Everything is loaded, by looking once, before the privileges go: an interpreter under /root cannot be read afterwards.
AS_NOBODY = """
import asyncio, os, pwd
from controller import cli
from controller.doctor import checks, facts, report
from controller.settings import Settings
asyncio.run(facts.gather(Settings(), ""))
nobody = pwd.getpwnam("nobody")
os.setgroups([]), os.setgid(nobody.pw_gid), os.setuid(nobody.pw_uid)
cli.main()
"""


def doctor(
    directory: Path, toml: str, *words: str, program: Sequence[str] = ("-m", "controller")
) -> subprocess.CompletedProcess[str]:
    (directory / "headgate.toml").write_text(toml)
    command = [sys.executable, *program, "--config", f"{directory}/headgate.toml", "doctor", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def settings(nginx: Nginx, directory: Path) -> str:
    return (
        f'[nginx]\nconf = "{nginx.prefix}/nginx.conf"\ncontrol = "{nginx.socket}"\nsnapshot = "{nginx.snapshot}"\n'
        f'[api]\nsocket = "{directory}/api.sock"\n[upstream.app.process]\nstart = ["gunicorn"]\n'
        'graceful_timeout = "20s"\n'
    )


def site(app: int, port: int, timeout: str) -> str:
    return (
        f"upstream app {{\nserver 127.0.0.1:{app};\n{HOOK}\nkeepalive 4;\nkeepalive_timeout {timeout};\n}}\n"
        f"server {{ listen 127.0.0.1:{port};\nproxy_http_version 1.1;\nproxy_set_header Connection '';\n"
        "location / { proxy_pass http://app; } }"
    )


@needs_nginx
def test_a_trap_is_told_with_file_line_pid_and_remedy_and_is_gone_when_mended(
    tmp_path: Path, gunicorns: Gunicorns
) -> None:
    app = free_port()
    master = gunicorns.master(f"127.0.0.1:{app}", "--keep-alive", "5", "--timeout", "60", worker=GTHREAD)
    with Nginx(site(app, free_port(), "60s"), main="worker_shutdown_timeout 10m;") as nginx:
        done = doctor(tmp_path, settings(nginx, tmp_path), "--json")
        assert (done.returncode, done.stderr) == (1, "")
        answer = json.loads(done.stdout)
        assert list(answer) == ["severe", "warning", "hint", "checks", "findings"]
        assert answer["checks"] == len(CHECKS)
        (severe,) = [each for each in answer["findings"] if each["severity"] == "severe"]
        conf = (nginx.prefix / "nginx.conf").read_text().splitlines()
        assert severe == {
            "check": "upstream-keepalive",
            "severity": "severe",
            "subject": f"app: 127.0.0.1:{app}",
            "evidence": f"{nginx.prefix}/nginx.conf:{conf.index('keepalive_timeout 60s;') + 1}, pid {master.pid}",
            "message": "nginx keeps idle connections for 60 s, the server for 5 s",
            "remedy": severe["remedy"],
        }
        assert "--keep-alive 75" in severe["remedy"]
        shown = doctor(tmp_path, settings(nginx, tmp_path))
        assert shown.returncode == 1
        lines = shown.stdout.splitlines()
        assert lines[0] == "SEVERE"
        assert lines[1:4] == [
            f"  {severe['message']}  [upstream-keepalive]",
            f"    {severe['subject']}  {severe['evidence']}",
            f"    → {severe['remedy']}",
        ]
        assert lines[-1].startswith("1 severe, ")
        assert f"{len(CHECKS)} checks looked at nginx 1." in lines[-1]
        assert lines[-1].endswith("1 upstream and 1 application")
        assert not [line for line in lines if line != line.rstrip()]
        nginx.http = site(app, free_port(), "2s")
        nginx.write()
        nginx.reload()
        mended = doctor(tmp_path, settings(nginx, tmp_path))
        assert (mended.returncode, "SEVERE" in mended.stdout) == (0, False)


@needs_nginx
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_nobody_may_look_at_is_said_and_nothing_breaks(gunicorns: Gunicorns) -> None:
    app = free_port()
    gunicorns.master(f"127.0.0.1:{app}")
    with Nginx(site(app, free_port(), "60s")) as nginx, tempfile.TemporaryDirectory() as readable:
        Path(readable).chmod(0o755)
        for mode in (0o700, 0o755):
            nginx.prefix.chmod(mode)
            toml = settings(nginx, Path(readable))
            done = doctor(Path(readable), toml, "--json", program=("-c", AS_NOBODY))
            assert done.stderr == ""
            unseen = [each for each in json.loads(done.stdout)["findings"] if each["check"] == "unseen"]
            assert all(each["severity"] == "hint" for each in unseen)
            told = " ".join(each["message"] for each in unseen)
            assert ("failed (Permission denied)" in told) == (mode == 0o700)
            assert ("its process cannot be seen" in told) == (mode == 0o755)


def test_a_configuration_that_nginx_would_refuse_is_severe(tmp_path: Path) -> None:
    (tmp_path / "nginx.conf").write_text("http {\n  server { listen 80 }\n}\n")
    done = doctor(tmp_path, f'[nginx]\nconf = "{tmp_path}/nginx.conf"\n')
    assert done.returncode == 1
    assert f"{tmp_path}/nginx.conf:2" in done.stdout


def test_settings_that_cannot_be_read_end_it_with_2(tmp_path: Path) -> None:
    done = doctor(tmp_path, "[nginx]\nkonf = 1\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean conf?" in done.stderr


def test_one_trap_in_many_places_is_told_once(tmp_path: Path) -> None:
    lines = "".join(f"upstream app{number} {{ server 192.0.2.1; keepalive 8; }}\n" for number in range(9))
    (tmp_path / "nginx.conf").write_text(f"http {{\n{lines}}}\n")
    shown = doctor(tmp_path, f'[nginx]\nconf = "{tmp_path}/nginx.conf"\n').stdout
    assert shown.count("[upstream-keepalive]") == 1
    assert shown.count("    app") == 5
    assert "    and in 4 more places, which --json lists\n" in shown
    told = json.loads(doctor(tmp_path, f'[nginx]\nconf = "{tmp_path}/nginx.conf"\n', "--json").stdout)
    assert len([each for each in told["findings"] if each["check"] == "upstream-keepalive"]) == 9


def test_the_documentation_lists_every_check_as_it_is() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (.+) \|$", DOCS.read_text(), re.MULTILINE)
    assert rows == [(check.id, check.severity.value, check.sentence) for check in CHECKS]
