"""How a gunicorn or uvicorn was started, to the settings that it has. No user code runs: files are only parsed.

gunicorn takes its defaults, the configuration file, GUNICORN_CMD_ARGS and the command line, each over the one before
(gunicorn.app.base.Application.load_config).
"""

from __future__ import annotations

import argparse
import ast
import os.path
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NoReturn

Read = Callable[[str], bytes | None]
"""Gives the content of a file, None where it is not there or may not be read."""

_UVICORN_KEEP_ALIVE = 5.0
_FILE = "gunicorn.conf.py"
_DEFAULTS: dict[str, object] = {
    "timeout": 30,
    "graceful_timeout": 30,
    "keepalive": 2,
    "worker_class": "sync",
    "threads": 1,
    "preload_app": False,
    "daemon": False,
    "backlog": 2048,
}


@dataclass(frozen=True, slots=True)
class Launch:
    """A command line with its environment and the directory in which it was given."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    directory: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What could be learned; see `controller.doctor.model.App`. `hidden` says what could not be, and why."""

    known: Mapping[str, object]
    uvicorn: bool | None
    keep_alive: float | None
    own_graceful: float | None = None
    hidden: tuple[str, ...] = ()


def where_begun(seen: Launch, file: Read) -> Launch:
    """The launch of a process that is seen in its working directory, to which gunicorn's `chdir` may have moved it."""
    began = seen.environment.get("PWD", seen.directory)
    options = " ".join((*seen.words, seen.environment.get("GUNICORN_CMD_ARGS", "")))
    settings = None if file(os.path.join(seen.directory, _FILE)) else file(os.path.join(began, _FILE))
    moved = "--chdir" in options or b"chdir" in (settings or b"")
    return replace(seen, directory=began) if moved else seen


UNREAD = Reading({}, None, None, None, ("its command line does not show how it was started",))


def read(launch: Launch, file: Read) -> Reading | None:
    """The settings of a gunicorn, or of a uvicorn on its own; None where the command shows neither."""
    words = _arguments(launch.words, "gunicorn")
    if words is not None:
        return _gunicorn(launch, words, file)
    words = _arguments(launch.words, "uvicorn")
    return None if words is None else _uvicorn(words)


def _gunicorn(launch: Launch, words: Sequence[str], file: Read) -> Reading:
    try:
        line = _options(words)
        variables = _options(shlex.split(launch.environment.get("GUNICORN_CMD_ARGS", "")))
    except (argparse.ArgumentError, ValueError) as error:
        return replace(UNREAD, hidden=(f"its arguments are not gunicorn's: {error}",))
    known, hidden = dict(_DEFAULTS), []
    named = line.get("config", variables.get("config"))
    path = os.path.join(launch.directory, (named or _FILE).removeprefix("file:"))
    source = None if named and named.startswith("python:") else file(path)
    if source is not None:
        unread = _apply(source, known)
        hidden += [f"{path} computes {', '.join(unread)}"] if unread else []
    elif named:
        known.clear()
        hidden.append(f"its configuration {named} cannot be read")
    known |= {name: value for name, value in (variables | line).items() if name in _DEFAULTS}
    chdir = os.path.join(launch.directory, line.get("chdir", variables.get("chdir", "")))
    return _judge(known, hidden, [chdir, launch.directory, *launch.environment.get("PYTHONPATH", "").split(":")], file)


def _uvicorn(words: Sequence[str]) -> Reading:
    parser = _Parser(add_help=False)
    parser.add_argument("--timeout-keep-alive", type=float, default=_UVICORN_KEEP_ALIVE)
    parser.add_argument("--timeout-graceful-shutdown", type=float)
    try:
        given, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        return replace(UNREAD, hidden=(f"its arguments are not uvicorn's: {error}",))
    return Reading({}, True, given.timeout_keep_alive, given.timeout_graceful_shutdown)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def _arguments(words: Sequence[str], program: str) -> Sequence[str] | None:
    """What follows the program on a command line: `…/gunicorn`, or `python -m gunicorn`."""
    for at, word in enumerate(words[:8]):
        name = os.path.basename(word)
        if name == program or (name == "__main__.py" and os.path.basename(os.path.dirname(word)) == program):
            return words[at + 1 :]
        if at and words[at - 1] == "-m" and word.partition(".")[0] == program:
            return words[at + 1 :]
    return None


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Those of gunicorn's options that matter here, by the names of the settings; argparse.ArgumentError."""
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for name, *options in (
        ("config", "-c", "--config"),
        ("chdir", "--chdir"),
        ("worker_class", "-k", "--worker-class"),
    ):
        parser.add_argument(*options, dest=name)
    for name, *options in (
        ("timeout", "-t", "--timeout"),
        ("graceful_timeout", "--graceful-timeout"),
        ("keepalive", "--keep-alive"),
        ("threads", "--threads"),
        ("backlog", "--backlog"),
    ):
        parser.add_argument(*options, dest=name, type=int)
    parser.add_argument("--preload", dest="preload_app", action="store_true")
    parser.add_argument("-D", "--daemon", dest="daemon", action="store_true")
    # Named only so that what follows them is not taken for something else.
    for name in ("-b", "-w", "-p", "-n", "-u", "-g", "-m", "-e"):
        parser.add_argument(name, dest="_")
    return vars(parser.parse_known_args(list(words))[0])


def _apply(source: bytes, known: dict[str, object]) -> list[str]:
    """Take a configuration file's literal assignments over; the settings that it computes are unknown, and returned."""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError):
        known.clear()
        return ["everything: it is no Python that this one reads"]
    plain: dict[str, object] = {}
    computed: set[str] = set()
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        nodes = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        names = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
        for name in names & known.keys():
            computed.add(name)
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                try:
                    plain[name] = ast.literal_eval(statement.value)
                except ValueError:
                    continue
                computed.discard(name)
        imports = (node for node in ast.walk(statement) if isinstance(node, ast.ImportFrom | ast.Import))
        for alias in (alias for node in imports for alias in node.names):
            computed |= set(known) if alias.name == "*" else {alias.asname or alias.name} & known.keys()
    known |= plain
    for name in computed:
        del known[name]
    return sorted(computed)


def _judge(known: dict[str, object], hidden: list[str], directories: Sequence[str], file: Read) -> Reading:
    """What the worker class makes of the settings."""
    name = known.get("worker_class")
    keepalive = known.get("keepalive")
    keep_alive = float(keepalive) if isinstance(keepalive, int | float) else None
    if not isinstance(name, str):
        return Reading(known, None, None, None, tuple(hidden))
    if name == "sync" and known.get("threads") == 1:
        return Reading(known, False, 0.0, None, tuple(hidden))
    if "." not in name:
        return Reading(known, False, keep_alive, None, tuple(hidden))
    module, _, kind = name.rpartition(".")
    if module in ("uvicorn.workers", "uvicorn_worker", "uvicorn_worker._workers"):
        return Reading(known, True, keep_alive, None, tuple(hidden))
    if module == "controller.integration.worker":
        graceful = known.get("graceful_timeout")
        own = float(max(1, graceful - 1)) if isinstance(graceful, int) else inf
        return Reading(known, True, keep_alive, own, tuple(hidden))
    worker = _class(module, kind, directories, file)
    if worker is None:
        hidden.append(f"the source of its worker class {name} is not found")
        return Reading(known, None, None, None, tuple(hidden))
    bases = " ".join(ast.unparse(base) for base in worker.bases)
    if "uvicorn" not in bases.lower():
        return Reading(known, None, None, None, tuple(hidden))
    kept, graceful = (_keyword(worker, f"timeout_{what}") for what in ("keep_alive", "graceful_shutdown"))
    keep_alive = keep_alive if kept is None else None if kept == inf else kept
    return Reading(known, True, keep_alive, graceful, tuple(hidden))


def _class(module: str, name: str, directories: Sequence[str], file: Read) -> ast.ClassDef | None:
    parts = module.replace(".", "/")
    for directory in filter(None, directories):
        for path in (f"{parts}.py", f"{parts}/__init__.py"):
            source = file(os.path.join(directory, path))
            if source is None:
                continue
            try:
                body = ast.parse(source).body
            except (SyntaxError, ValueError):
                return None
            return next((node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)
    return None


def _keyword(worker: ast.ClassDef, name: str) -> float | None:
    """What a worker class gives uvicorn under this name: a number, infinite where it is computed, None without it."""
    for node in ast.walk(worker):
        pairs: list[tuple[object, ast.expr]] = []
        if isinstance(node, ast.Dict):
            pairs = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
        elif isinstance(node, ast.Call):
            pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            pairs = [(getattr(node.targets[0].slice, "value", None), node.value)]
        for key, value in pairs:
            if key == name:
                number = getattr(value, "value", None)
                return float(number) if isinstance(number, int | float) else inf
    return None
