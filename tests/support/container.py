"""Containers: one in which real systemd is process 1, with Headgate installed from its wheel and nothing else from
here; and a fresh Debian 12, with what a newcomer has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path
from typing import Any

from docker.errors import BuildError, DockerException
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient
from testcontainers.core.image import DockerImage
from testcontainers.core.wait_strategies import ExecWaitStrategy

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "headgate-test-systemd"
PYTHON = "/opt/headgate/bin/python"
# Seconds that the engine may be silent: an image's layer is written without a word.
_CLIENT = {"timeout": 300}


def missing() -> str:
    """Why no container can be run here; empty where one can."""
    try:
        with closing(DockerClient().client) as client:
            client.ping()
    except DockerException as error:
        where = os.environ.get("DOCKER_HOST", "the default socket")
        return f"no container engine answers at {where}: {error}"
    return ""


def wheelhouse(directory: Path, *more: str) -> Path:
    """Headgate's wheel and those of all that it and its demo need on Debian 12, with `more` that is named."""
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(directory), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = directory.glob("headgate-*.whl")
    target = ["--python-version", "3.11", "--implementation", "cp", "--only-binary", ":all:"]
    needs = ["--constraint", str(ROOT / "constraints.txt"), f"{wheel}[demo]", *more]
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(directory), *target, *needs]
    subprocess.run(fetch, check=True, capture_output=True)
    return directory


class Running:
    """A container that runs; `close` removes it."""

    def __init__(self, container: DockerContainer) -> None:
        self._container = container
        try:
            self._container.start()
        except BaseException:
            self.close()
            raise
        self.id = self._container.get_container_id()

    def copy(self, source: Path, target: str) -> None:
        """Copy a file to a path in it, and make the directories that lead there."""
        self._container.copy_into_container(source, target)

    def write(self, path: str, text: str) -> None:
        self._container.copy_into_container(textwrap.dedent(text).encode(), path)

    def run(self, *command: str) -> str:
        """Run a command in it and return its output; an AssertionError with all of it where it fails."""
        code, streams = self._container.get_wrapped_container().exec_run(list(command), demux=True)
        output, errors = ((stream or b"").decode() for stream in streams)
        assert code == 0, f"{' '.join(command)}: {code}\n{output}\n{errors}"
        return output

    def close(self) -> None:
        self._container.stop()


class Fresh(Running):
    """Debian 12 with make and Python, and the network of this machine: packages come from Debian's servers."""

    def __init__(self) -> None:
        _build("headgate-test-fresh", "fresh.Dockerfile")
        super().__init__(DockerContainer("headgate-test-fresh", _CLIENT).with_kwargs(network="host"))

    def as_user(self, user: str, directory: str, *command: str, **environment: str) -> tuple[int, str]:
        """Run a command as somebody; its exit code, and what it says."""
        options = {"user": user, "workdir": directory, "environment": environment}
        code, output = self._container.get_wrapped_container().exec_run(list(command), **options)
        return code, output.decode()


class Container(Running):
    """A container with systemd."""

    def __init__(self) -> None:
        _build(IMAGE, "systemd.Dockerfile")
        self._booted = (
            ExecWaitStrategy(["sh", "-c", "systemctl is-system-running | grep -xE 'running|degraded'"])
            .with_startup_timeout(60)
            .with_poll_interval(0.1)
        )
        # What systemd needs of a container that is not privileged, and root to see what other users' processes do.
        rights = {"cap_add": ["SYS_ADMIN", "SYS_PTRACE"], "security_opt": ["seccomp=unconfined"], "cgroupns": "host"}
        super().__init__(
            DockerContainer(IMAGE, _CLIENT)
            .with_kwargs(network="none", **rights)
            .with_tmpfs_mount("/run")
            .with_tmpfs_mount("/run/lock")
            .with_volume_mapping("/sys/fs/cgroup", "/sys/fs/cgroup", "rw")
            .waiting_for(self._booted)
        )

    def install(self, wheels: Path) -> None:
        for wheel in wheels.iterdir():
            self.copy(wheel, f"/opt/wheels/{wheel.name}")
        self.run("python3", "-m", "venv", "/opt/headgate")
        install = [PYTHON, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", "/opt/wheels"]
        self.run(*install, "headgate[demo]")

    def reboot(self) -> None:
        """Shut it down and boot it again: /run is empty then."""
        self._container.get_wrapped_container().restart(timeout=60)
        self._booted.wait_until_ready(self._container)

    def python(self, body: str) -> Any:
        """Run statements in an `async def` there, with Headgate's own Python; what they return, by way of JSON."""
        script = (
            "import asyncio, json, sys\n"
            "async def main():\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n"
            "print(json.dumps(asyncio.run(main())))\n"
        )
        return json.loads(self.run(PYTHON, "-c", script).splitlines()[-1])


def _build(tag: str, dockerfile: str) -> None:
    image = DockerImage(
        ROOT / "docker",
        _CLIENT,
        tag=tag,
        clean_up=False,
        dockerfile_path=dockerfile,
        network_mode="host",
        forcerm=True,
    )
    try:
        image.build()
    except BuildError as error:
        log = "".join(line.get("stream", "") for line in error.build_log)
        raise AssertionError(f"{tag} cannot be built: {error}\n{log}") from error
    finally:
        image.remove()  # Without clean_up this only closes the client; the image stays, for its layers.
