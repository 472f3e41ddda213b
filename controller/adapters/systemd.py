"""systemd, and one unit of it, driven through systemctl. Nothing of sockets and processes belongs here."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass

from controller.ports import ProcessError

_ANSWER = 20.0  # seconds in which systemd answers anything but a start
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True, slots=True)
class UnitState:
    """`active` is systemd's ActiveState; `main` is the main process, None where there is none."""

    active: str
    main: int | None


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit by name, with any placeholder filled."""

    name: str

    async def state(self) -> UnitState:
        """What systemd knows of it; ProcessError where it knows no such unit or there is no systemd."""
        code, text = await systemctl(_ANSWER, "show", "-p", "LoadState,ActiveState,MainPID", "--", self.name)
        values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        if code or "LoadState" not in values:
            raise ProcessError(f"systemctl show {self.name}: {text}", "without systemd, configure pid_file or start")
        if values["LoadState"] != "loaded":
            remedy = f"see `systemctl status {self.name}`, or correct unit in headgate.toml"
            raise ProcessError(f"unit {self.name} cannot be used: systemd calls it {values['LoadState']}", remedy)
        return UnitState(values["ActiveState"], int(values.get("MainPID", "0")) or None)

    async def stop(self) -> None:
        """Queue its stop and return; Restart= does not bring it back."""
        await self._do(_ANSWER, "stop", "--no-block")

    async def start(self, timeout: float) -> None:
        """Start it and wait until systemd calls it started; ProcessError with its status and last log lines."""
        await self._do(timeout, "start")

    async def kill(self) -> bool:
        """KILL everything in its control group; False where systemd does not run the unit any more."""
        code, _ = await systemctl(_ANSWER, "kill", "--signal=SIGKILL", "--", self.name)
        return code == 0

    async def report(self) -> str:
        """Its status and last log lines, as `systemctl status` prints them."""
        _, text = await systemctl(_ANSWER, "status", "--no-pager", "--full", "--lines=15", "--", self.name)
        return text

    async def _do(self, timeout: float, verb: str, *options: str) -> None:
        code, text = await systemctl(timeout, verb, *options, "--", self.name)
        if code:
            raise ProcessError(
                f"systemctl {verb} {self.name}: {text}\n{await self.report()}", "see `systemctl list-jobs`"
            )


async def systemctl(timeout: float, *arguments: str) -> tuple[int, str]:
    """Exit status and everything that it printed, stripped; 1 and a sentence where it takes longer than `timeout`.

    ProcessError where there is no systemctl.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            "systemctl",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0", "SYSTEMD_URLIFY": "0"},
        )
    except FileNotFoundError as error:
        remedy = "configure pid_file or start instead of unit"
        raise ProcessError(f"systemctl {' '.join(arguments)}: there is no systemctl on this machine", remedy) from error
    try:
        output, _ = await asyncio.wait_for(process.communicate(), timeout)
    except TimeoutError:
        return 1, f"systemctl {' '.join(arguments)} did not end within {timeout:g} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output.decode(errors="replace").strip()


def seconds(text: str) -> float | None:
    """A time span as `systemctl show` prints it (`1min 30s`), in seconds; None for `infinity` or nothing."""
    if not re.fullmatch(r"(\d+(\.\d+)?(us|ms|s|min|h|d|w) ?)+", text):
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?)(us|ms|s|min|h|d|w)", text)
    return float(sum(float(number) * _SECONDS[unit] for number, unit in parts))
