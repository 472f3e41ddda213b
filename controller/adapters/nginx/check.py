"""nginx's own judgement of its files, and nginx itself: the program, and the master that runs with a configuration.

What follows from a judgement stands in writer.py; how a reload is proved stands in verify.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from controller.adapters.nginx.writer import CheckFailed
from controller.errors import HeadgateError

CHECK_TIMEOUT = 30.0
"""Seconds for `nginx -t`: a host name that does not resolve takes some, a large configuration less than one."""
LUA_PACKAGES = "apt install libnginx-mod-http-lua lua-resty-core lua-cjson"

_TITLE = b"nginx: master process "
_SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"  # an ordinary user's PATH lacks them on Debian
_NEWBORN = 0.5  # seconds for which a worker may look like its master, from which it was forked
_MODULES = ("ndk_http_module.so", "ngx_http_lua_module.so")
_LEVELS = ("[emerg]", "[alert]", "[crit]", "[error]")


class NginxMissing(HeadgateError):
    """There is no nginx, or it cannot be told which one is meant."""


@dataclass(frozen=True, slots=True)
class Nginx:
    """The nginx of a configuration. `master` is the pid of the one that runs with it, None where none does.

    `options` are -p, -e and -g as that one was started with, so that a test reads what it read.
    """

    program: str
    conf: str
    options: tuple[str, ...] = ()
    master: int | None = None


def find(conf: str) -> Nginx:
    """nginx as it runs with this configuration, else the installed one; NginxMissing. Blocks."""
    deadline = time.monotonic() + _NEWBORN
    while len(masters := [nginx for nginx in _masters() if _same(nginx.conf, conf)]) > 1:
        if time.monotonic() < deadline:
            time.sleep(0.01)
            continue
        pids = " and ".join(str(nginx.master) for nginx in masters)
        message = f"{len(masters)} nginx masters run with {conf}: {pids}"
        raise NginxMissing(message, "end all but one; a change of nginx's program (USR2) must come to its end first")
    if masters:
        return replace(masters[0], conf=conf)
    program = _which("nginx")
    if program is None:
        raise NginxMissing("nginx is not installed", "apt install nginx")
    return Nginx(program, conf)


async def check(nginx: Nginx, timeout: float = CHECK_TIMEOUT) -> None:
    """Run `nginx -t` for at most `timeout` seconds; CheckFailed with its own line, which names file and line.

    NginxMissing where it cannot be run.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *(nginx.program, "-t", "-q", *nginx.options, "-c", nginx.conf),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise NginxMissing(f"{nginx.program} does not run: {error.strerror}", "reinstall nginx") from error
    try:
        async with asyncio.timeout(timeout):
            _, said = await process.communicate()
    except TimeoutError:
        message = f"`nginx -t` had not ended after {timeout:g} s and was killed"
        remedy = "see by hand what holds it up: a host name that does not resolve, or Lua code in init_by_lua"
        raise CheckFailed(message, remedy) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode:
        raise CheckFailed(_reason(said.decode("utf-8", "replace")) or f"`nginx -t` ended with {process.returncode}")


@lru_cache(maxsize=8)
def built_with(program: str) -> str:
    """What `nginx -V` says: its version and the arguments it was built with; NginxMissing. Blocks."""
    try:
        return subprocess.run([program, "-V"], capture_output=True, text=True, check=True, timeout=CHECK_TIMEOUT).stderr
    except (OSError, subprocess.SubprocessError) as error:
        raise NginxMissing(f"{program} does not run: {error}", "reinstall nginx") from error


def lua_module(built: str) -> str:
    """What helps where no Lua module is loaded, empty where it is compiled in; `built` comes from `built_with`."""
    if re.search(r"--add-module=\S*lua", built):
        return ""
    directory = re.search(r"--modules-path=(\S+)", built)
    files = [Path(directory[1] if directory else "", name) for name in _MODULES]
    if all(file.is_file() for file in files):
        return "put at its top: " + " ".join(f"load_module {file};" for file in files)
    return f"install it: {LUA_PACKAGES}"


def _reason(said: str) -> str:
    lines = said.strip().splitlines()
    line = next((line for level in _LEVELS for line in lines if level in line), " ".join(lines))
    # Behind the first error_log nginx writes to stderr as it does to its log.
    return re.sub(r"^(?:nginx: |[0-9/]+ [0-9:]+ )(\[\w+\]) (?:\d+#\d+: )?", r"\1 ", line)


def _masters() -> Iterator[Nginx]:
    """The nginx masters that run here; not those of containers, whose files are others."""
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError, NginxMissing):  # it has ended, or is not ours to look at
                title = Path(f"/proc/{entry}/cmdline").read_bytes().rstrip(b"\0")
                if title.startswith(_TITLE) and _is_ours(entry):
                    yield _started_as(int(entry), os.fsdecode(title.removeprefix(_TITLE)))


def _is_ours(pid: str) -> bool:
    """Whether this process is in our own pid namespace."""
    found = re.search(r"^NSpid:(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return found is None or len(found[1].split()) == 1


def _started_as(master: int, command: str) -> Nginx:
    """A master by its command line, as nginx shows it in its title: the words joined by blanks."""
    name, *rest = re.split(r" -([cpeg]) ?", command)
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    start = "/"
    with contextlib.suppress(PermissionError):  # only relative words need it
        start = os.readlink(f"/proc/{master}/cwd")
    program = os.path.join(start, name) if "/" in name else _which(name) or name
    prefix = os.path.join(start, given["p"] if "p" in given else _built(program, "prefix"))
    conf = os.path.join(prefix, given["c"] if "c" in given else _built(program, "conf-path"))
    if "p" in given:
        given["p"] = prefix
    options = tuple(word for key in "peg" if key in given for word in (f"-{key}", given[key]))
    return Nginx(program, conf, options, master)


def _built(program: str, name: str) -> str:
    found = re.search(rf"--{name}=(\S+)", built_with(program))
    return found[1] if found else ""


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + _SBIN)


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.abspath(one) == os.path.abspath(other)
