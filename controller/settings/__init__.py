"""headgate.toml: the file and the environment, read and validated once, with every error at once.

What a key means to a decision stands with the core's policies; docs/settings.md lists every key for users.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from controller.errors import SettingsError
from controller.settings.tables import BELONGS
from controller.settings.whole import Settings

__all__ = ["DEFAULT_FILE", "Settings", "build", "load"]

DEFAULT_FILE = "/etc/headgate/headgate.toml"


def load(file: str | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings of `file`, else of the one that HEADGATE_CONFIG names, else of DEFAULT_FILE where it exists.

    HEADGATE_<SECTION>__<KEY> in the environment goes before the file. SettingsError tells of everything that is wrong.
    """
    named = file or environ.get("HEADGATE_CONFIG")
    path = named or DEFAULT_FILE
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if named:
            raise SettingsError(f"{path}: no such file; create it, or leave it out for the defaults") from error
        raw = {}
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; correct the path or its permissions") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}; correct the TOML there") from error
    return build(raw, environ, path)


def build(raw: Mapping[str, Any], environ: Mapping[str, str], source: str) -> Settings:
    """Validate what was read from `source`, the environment joined in; SettingsError."""
    merged = deepcopy(dict(raw))
    variables = {}
    for name, text in environ.items():
        if name.startswith("HEADGATE_") and "__" in name:
            key = tuple(name.removeprefix("HEADGATE_").lower().split("__"))
            variables[key] = name
            _set(merged, key, _value(text))
    defaults = merged.get("defaults")
    given = merged.get("upstream")
    own = given if isinstance(given, dict) else {}
    if own and isinstance(defaults, dict):
        merged["upstream"] = {name: _joined(defaults, table) for name, table in own.items()}
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        lines = []
        for each in error.errors():
            loc = tuple(str(part) for part in each["loc"])
            if not _inherited(loc, own):
                variable = next((name for key, name in variables.items() if key[: len(loc)] == loc), None)
                place = f"{'.'.join(loc)}: " if loc else ""
                lines.append(f"{variable or source}: {place}{_sentence(each, loc)}")
        raise SettingsError("\n".join(lines)) from None


def _value(text: str) -> object:
    """A variable's number, truth value or list as TOML writes it; everything else is text as it stands."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, int | float | list | dict) else text


def _set(table: dict[str, Any], key: tuple[str, ...], value: object) -> None:
    for part in key[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return  # not a table, which validation reports
    table[key[-1]] = value


def _joined(defaults: Mapping[str, Any], own: object) -> object:
    """One upstream's tables over the defaults, key by key."""
    if not isinstance(own, dict):
        return own
    joined = {**defaults, **own}
    for name, table in own.items():
        if isinstance(table, dict) and isinstance(defaults.get(name), dict):
            joined[name] = {**_fitting(name, defaults[name], table), **table}
    return joined


def _fitting(name: str, table: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults without what means nothing to the type of check, or the method, that an upstream has instead."""
    of, belongs = BELONGS.get(name, ("", {}))
    kind = own.get(of)
    return {key: value for key, value in table.items() if kind is None or kind in belongs.get(key, (kind,))}


def _inherited(loc: tuple[str, ...], own: Mapping[str, Any]) -> bool:
    """Whether this error of an upstream is one of the defaults, which is reported there."""
    table: object = own.get(loc[1]) if loc[:1] == ("upstream",) and len(loc) > 2 else None
    for part in loc[2:4]:
        if not isinstance(table, dict):
            return False
        if part not in table:
            return True
        table = table[part]
    return False


def _sentence(error: ErrorDetails, loc: tuple[str, ...]) -> str:
    """What is wrong, and the remedy."""
    match error["type"]:
        case "extra_forbidden":
            known = sorted(_model_at(loc[:-1]).model_fields)
            near = difflib.get_close_matches(loc[-1], known, 1)
            return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known are {', '.join(known)}"
        case "value_error":
            return str(error["ctx"]["error"])
        case "model_type" | "dict_type":
            return f"must be a table; write [{'.'.join(loc)}]"
        case "literal_error":
            return f"{error['input']!r} is not known; write {error['ctx']['expected']}"
        case "string_type":
            return "must be text; put it in quotes"
        case "int_type":
            return "must be a whole number; write it without quotes"
        case "bool_type":
            return "must be true or false; write it without quotes"
        case "too_short" | "string_too_short":
            return "must not be empty; fill it, or leave it out"
        case "tuple_type":
            return 'must be a list; write ["…", "…"]'
        case _:
            problem = error["msg"].removeprefix("Input should be ")
            return f"{error['input']!r} does not fit; it should be {problem[:1].lower()}{problem[1:]}"


def _model_at(loc: tuple[str, ...]) -> type[BaseModel]:
    """The table of the schema that stands at this path."""
    model: type[BaseModel] = Settings
    for part in ("defaults", *loc[2:]) if loc[:1] == ("upstream",) else loc:
        if part.isdigit():
            continue  # an entry of a list, whose kind has been found
        annotation = model.model_fields[part].annotation
        model = next(each for each in (annotation, *get_args(annotation)) if isinstance(each, type))
    return model
