"""Where the files are that nginx and systemd load: inside an installed wheel, or in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def lua_dir() -> Path:
    """The directory for lua_package_path: it holds `headgate/init.lua`."""
    return _find("lua")


def nginx_dir() -> Path:
    """The directory of nginx include files and examples."""
    return _find("nginx")


def systemd_dir() -> Path:
    """The directory of what `headgate install` writes, with its placeholders."""
    return _PACKAGE / "systemd"


def _find(name: str) -> Path:
    installed = _PACKAGE / "_data" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
