"""Where the files that nginx loads are: inside an installed wheel, or at the top level of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def lua_dir() -> Path:
    """The directory for lua_package_path: it holds `headgate/init.lua`."""
    return _find("lua")


def nginx_dir() -> Path:
    """The directory of nginx include files and examples."""
    return _find("nginx")


def _find(name: str) -> Path:
    installed = _PACKAGE / "_data" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
