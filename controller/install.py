"""Headgate as a service of systemd: the files that make it one, as they are and as they are to be, and writing them.

What systemd is told then stands in cli_install.py.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path

from controller.adapters.whole import put, read
from controller.errors import HeadgateError
from controller.resources import systemd_dir
from controller.settings import DEFAULT_FILE, Settings

UNIT = "headgate.service"
TMPFILES = "/etc/tmpfiles.d/headgate.conf"
RUNTIME, STATE = "/run/headgate", "/var/lib/headgate"

_UNITS = "/etc/systemd/system"
_MARK = b"# Written by `headgate install"
_WRITABLE = (
    "/run",
    "/tmp",
    "/var/tmp",
    "/etc/headgate",
    "/etc/nginx",
    "/var/lib/headgate",
    "/var/lib/nginx",
    "/var/log/nginx",
)


class CannotInstall(HeadgateError):
    """Headgate cannot be installed, or taken out, as things are."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of Headgate's; None stands for no file."""

    path: Path
    before: bytes | None
    after: bytes | None

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return self.before != self.after

    def shown(self) -> str:
        """The change as a unified diff, empty where there is none."""
        old, new = ("/dev/null" if content is None else str(self.path) for content in (self.before, self.after))
        return "".join(unified_diff(_lines(self.before), _lines(self.after), old, new))


def service(settings: Settings, config: str, root: Path) -> tuple[File, ...]:
    """The unit, what makes its directory at boot, and settings where there are none yet.

    `config` is the path of headgate.toml; everything lies under `root`, and speaks of `/`. CannotInstall.
    """
    nginx, api = settings.nginx, settings.api
    sockets = {os.path.dirname(path) for path in (nginx.control, nginx.version_socket, api.socket)}
    files = (nginx.conf, nginx.snapshot, nginx.include, nginx.version_file, str(settings.journal))
    unit = _template(
        "headgate.service",
        COMMAND=_command(config),
        PATHS=" ".join(_word(f"-{path}") for path in _outermost({*_WRITABLE, *sockets, *map(os.path.dirname, files)})),
    )
    made = [f"d {path} 0750 root root -\n" for path in sorted(sockets) if path.startswith("/run/")]
    tmpfiles = f"{_MARK.decode()}`: nginx's control socket lies there, and nginx starts first.\n{''.join(made)}"
    written = [_file(root, f"{_UNITS}/{UNIT}", unit), _file(root, TMPFILES, tmpfiles.encode())]
    first = _file(root, config, _template("headgate.toml"))
    return (*written, first) if first.before is None else tuple(written)


def application(unit: str, config: str, root: Path) -> File:
    """The drop-in that makes this unit, such as `app@.service`, drain its server before it stops; CannotInstall."""
    isolated = f"{_word(sys.executable)} -I "
    text = _template("application.conf", UNIT=unit, COMMAND=isolated + _command(config))
    return _file(root, f"{_UNITS}/{unit}.d/headgate.conf", text)


def removal(root: Path, units: Iterable[str] = (), config: str | None = None) -> tuple[File, ...]:
    """What takes out all that was installed, and `config` with it, or only the drop-ins of these units.

    Files that others have written in those places are left alone. CannotInstall.
    """
    if chosen := tuple(units):
        paths = [f"{_UNITS}/{unit}.d/headgate.conf" for unit in chosen]
    else:
        dropins = sorted(_under(root, _UNITS).glob("*.service.d/headgate.conf"))
        paths = [*(f"/{each.relative_to(root)}" for each in dropins), f"{_UNITS}/{UNIT}", TMPFILES]
    ours = tuple(file for path in paths if (file := _file(root, path, None)).before and _MARK in file.before)
    return (*ours, _file(root, config, None)) if config else ours


def write(files: Sequence[File]) -> None:
    """Write what changes; directories are made, and removed where they are ours and empty. CannotInstall."""
    for file in files:
        try:
            if file.after is not None:
                file.path.parent.mkdir(parents=True, exist_ok=True)
            put(file.path, file.after)
            if file.after is not None:
                file.path.chmod(0o644)
            elif re.search(r"\.service\.d$|^headgate$", file.path.parent.name) and not any(file.path.parent.iterdir()):
                file.path.parent.rmdir()
        except OSError as error:
            raise CannotInstall(f"{error.filename or file.path}: {error.strerror}", _remedy(error)) from error


def _remedy(error: OSError) -> str:
    return "use sudo" if isinstance(error, PermissionError) else "see that the disk and its file system are well"


def _file(root: Path, path: str, after: bytes | None) -> File:
    place = _under(root, path)
    try:
        return File(place, read(place), after)
    except OSError as error:
        raise CannotInstall(f"{place}: {error.strerror}", _remedy(error)) from error


def _under(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _command(config: str) -> str:
    """How systemd starts the command of this installation."""
    script = Path(sys.executable).with_name("headgate")
    if not script.exists():
        remedy = "install Headgate into a virtual environment of its own (README.md)"
        raise CannotInstall(f"there is no {script}, which the unit would start", remedy)
    words = [str(script)] if config == DEFAULT_FILE else [str(script), "--config", config]
    return " ".join(_word(word.replace("$", "$$")) for word in words)


def _word(text: str) -> str:
    """A word of a unit file, as systemd.syntax(7) quotes it."""
    text = text.replace("%", "%%").replace("\\", r"\\")
    return text if re.fullmatch(r"[\w./:@%$+=,~\\-]+", text) else '"{}"'.format(text.replace('"', r"\""))


def _outermost(paths: Iterable[str]) -> list[str]:
    """The paths of which none lies in another."""
    found: list[str] = []
    for path in sorted(paths):
        if not any(path == other or path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found


def _template(name: str, **values: str) -> bytes:
    text = (systemd_dir() / name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text.encode()


def _lines(content: bytes | None) -> list[str]:
    return (content or b"").decode("utf-8", "replace").splitlines(keepends=True)
