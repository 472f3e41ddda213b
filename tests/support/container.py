"""A container in which real systemd is process 1, with Headgate installed from its wheel and nothing else from here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "headgate-test-systemd"
PYTHON = "/opt/headgate/bin/python"
# What systemd needs of a container that is not privileged.
_SYSTEMD = [
    *("--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined", "--tmpfs", "/run", "--tmpfs", "/run/lock"),
    *("--cgroupns", "host", "-v", "/sys/fs/cgroup:/sys/fs/cgroup:rw"),
]


def missing() -> str:
    """Why no container can be run here; empty where one can."""
    if not shutil.which("docker"):
        return "there is no docker command"
    answer = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    where = os.environ.get("DOCKER_HOST", "the default socket")
    return f"no container engine answers at {where}: {answer.stderr.strip()}" if answer.returncode else ""


def wheelhouse(directory: Path) -> Path:
    """Headgate's wheel and those of all that it and its demo need on Debian 12."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(directory), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = directory.glob("headgate-*.whl")
    target = ["--python-version", "3.11", "--implementation", "cp", "--only-binary", ":all:"]
    needs = ["--constraint", str(ROOT / "constraints.txt"), f"{wheel}[demo]"]
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(directory), *target, *needs]
    subprocess.run(fetch, check=True, capture_output=True)
    return directory


class Container:
    """A running container; `close` removes it."""

    def __init__(self) -> None:
        build = [
            "docker",
            "build",
            "--network",
            "host",
            "--tag",
            IMAGE,
            "--file",
            str(ROOT / "docker/systemd.Dockerfile"),
        ]
        _run([*build, str(ROOT / "docker")])
        self.id = _run(["docker", "create", "--network", "none", *_SYSTEMD, IMAGE]).strip()
        try:
            _run(["docker", "start", self.id])
            self._await_boot()
        except BaseException:
            self.close()
            raise

    def install(self, wheels: Path) -> None:
        self.copy(wheels, "/opt/wheels")
        self.run("python3", "-m", "venv", "/opt/headgate")
        install = [PYTHON, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", "/opt/wheels"]
        self.run(*install, "headgate[demo]")

    def copy(self, source: Path, target: str) -> None:
        _run(["docker", "cp", str(source), f"{self.id}:{target}"])

    def write(self, path: str, text: str) -> None:
        _run(["docker", "exec", "-i", self.id, "tee", path], textwrap.dedent(text))

    def run(self, *command: str) -> str:
        """Run a command in it and return its output; an AssertionError with all of it where it fails."""
        return _run(["docker", "exec", self.id, *command])

    def python(self, body: str) -> Any:
        """Run statements in an `async def` there, with Headgate's own Python; what they return, by way of JSON."""
        script = (
            "import asyncio, json, sys\n"
            "async def main():\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n"
            "print(json.dumps(asyncio.run(main())))\n"
        )
        return json.loads(_run(["docker", "exec", "-i", self.id, PYTHON, "-"], script).splitlines()[-1])

    def close(self) -> None:
        _run(["docker", "rm", "--force", "--volumes", self.id])

    def _await_boot(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            command = ["docker", "exec", self.id, "systemctl", "is-system-running", "--wait"]
            state = subprocess.run(command, capture_output=True, text=True, check=False)
            if state.stdout.strip() in ("running", "degraded"):
                return
            assert time.monotonic() < deadline, f"systemd did not boot: {state.stdout}{state.stderr}"
            time.sleep(0.1)


def _run(command: list[str], given: str = "") -> str:
    answer = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, f"{' '.join(command)}: {answer.returncode}\n{answer.stdout}\n{answer.stderr}"
    return answer.stdout
