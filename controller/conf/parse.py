"""nginx.conf to the upstreams of its http block, each with file and line.

Lexing is crossplane's; Lua blocks, includes and the meaning of `upstream` and `server` stand here. What becomes of
them (addresses, policies, keys) does not.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import chain
from typing import NamedTuple, Protocol

from crossplane.errors import NgxParserSyntaxError

# crossplane.lex opens files by itself; the two functions inside it take a text, and so the reader reads each file once.
from crossplane.lexer import _balance_braces, _lex_file_object, register_external_lexer

METHODS = frozenset({"least_conn", "ip_hash", "hash", "random", "least_time", "fair", "sticky"})


def is_balanced_in_lua(method: str, args: Sequence[str]) -> bool:
    """Whether the Lua plane balances by this directive as nginx does."""
    if method == "random":
        return tuple(args) in ((), ("two",), ("two", "least_conn"))
    return method in ("least_conn", "ip_hash") or (method == "hash" and len(args) in (1, 2))


class Place(NamedTuple):
    """Where a directive stands."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class ConfSyntaxError(Exception):
    """The configuration cannot be read; the message is a sentence as `nginx -t` writes it, file and line included."""

    def __init__(self, message: str, place: Place | None) -> None:
        super().__init__(shown(f"{message} in {place}" if place else message))
        self.place = place


def shown(text: str) -> str:
    """The text for people, with escapes for bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


class Reader(Protocol):
    """Where files come from."""

    def read(self, path: str) -> bytes:
        """The content of a file; OSError."""

    def glob(self, pattern: str) -> Sequence[str]:
        """The paths that match, in nginx's order (sorted by bytes)."""


def is_pattern(path: str) -> bool:
    """Whether the path of an `include` is a pattern to nginx."""
    return re.search(r"[*?\[]", path) is not None


_UNITS = "yMwdhms "  # in this order, each once
_SECONDS = {"y": 31536000, "M": 2592000, "w": 604800, "d": 86400, "h": 3600, "m": 60}

# Lua's short strings, to be kept, and its comments: a `--` within a string begins none.
_STRING_OR_COMMENT = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|--\[(?P<level>=*)\[.*?\](?P=level)\]|--[^\n]*""", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class ServerLine:
    """A `server` line of an upstream. `host` has no brackets; a unix socket has `unix` and neither host nor port.

    `fail_timeout` is in seconds. `others` are parameters that mean nothing to Headgate (`resolve`, `slow_start=…`).
    """

    address: str
    place: Place
    host: str = ""
    port: int = 0
    unix: str = ""
    weight: int = 1
    max_conns: int = 0
    max_fails: int = 1
    fail_timeout: float = 10.0
    backup: bool = False
    down: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UpstreamBlock:
    """An `upstream` of the http block. `hooked`: its balancer hook calls headgate under this upstream's name.

    `method_args` are the words behind the balancing method: `hash`'s key, for one.

    `obstacle` says why Headgate must leave it to nginx although somebody put a hook there, with place and remedy.
    """

    name: str
    place: Place
    servers: tuple[ServerLine, ...]
    method: str = "round_robin"
    hooked: bool = False
    obstacle: str = ""
    method_args: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tree:
    """What was read: the upstreams in their order, and every file, the main one first."""

    upstreams: tuple[UpstreamBlock, ...]
    files: tuple[str, ...]


def digest(content: bytes) -> str:
    """What stands for a file's content where only its change matters."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class Cache:
    """Files as they were parsed, each for as long as its content stays the same.

    `parsed` counts the files that had to be parsed since the cache was made.
    """

    def __init__(self) -> None:
        self.parsed = 0
        self._files: dict[str, tuple[str, list[RawDirective]]] = {}

    def directives(self, path: str, content: bytes) -> list[RawDirective]:
        """The tree of one file; ConfSyntaxError. Whoever gets it must not change it."""
        version = digest(content)
        known = self._files.get(path)
        if known and known[0] == version:
            return known[1]
        self.parsed += 1
        directives = raw_directives(path, content)
        self._files[path] = version, directives
        return directives

    def keep(self, paths: Collection[str]) -> None:
        """Forget all files but these."""
        self._files = {path: known for path, known in self._files.items() if path in paths}


def parse(path: str, reader: Reader, cache: Cache | None = None) -> Tree:
    """Read `path` and everything that it includes; ConfSyntaxError. Relative includes start at its directory.

    With the `cache` of an earlier call, every file is read, and only those with other content are parsed.
    """
    return _Parser(path, reader, cache or Cache()).tree()


@dataclass(slots=True)
class RawDirective:
    """A directive as crossplane's lexer reads it, its arguments unquoted; `block` is None where it has none."""

    name: str
    place: Place
    args: list[str] = field(default_factory=list)
    block: list[RawDirective] | None = None


class _Parser:
    def __init__(self, path: str, reader: Reader, cache: Cache) -> None:
        self.path = path
        self.reader = reader
        self.cache = cache
        self.files: dict[str, list[RawDirective]] = {}
        self.names: dict[str, Place] = {}

    def tree(self) -> Tree:
        main = self._load(self.path, None)
        try:
            main = self._expand(main, (self.path,))
        except RecursionError as error:
            raise ConfSyntaxError("blocks or includes are nested too deeply", Place(self.path, 1)) from error
        blocks = [_block(each) for each in main if each.name == "http"]
        upstreams = tuple(self._upstream(each) for each in chain(*blocks) if each.name == "upstream")
        self.cache.keep(self.files)
        return Tree(upstreams, tuple(self.files))

    def _expand(self, directives: Iterable[RawDirective], within: tuple[str, ...]) -> list[RawDirective]:
        """The directives with the content of included files in the place of `include`, as nginx sees them."""
        out = []
        for each in directives:
            if each.name == "include":
                for path in self._included(each):
                    if path in within:
                        raise ConfSyntaxError(f'"{path}" includes itself', each.place)
                    out += self._expand(self._load(path, each.place), (*within, path))
                continue
            if each.block is not None:
                each = RawDirective(each.name, each.place, each.args, self._expand(each.block, within))
            out.append(each)
        return out

    def _included(self, include: RawDirective) -> Sequence[str]:
        if len(include.args) != 1:
            raise ConfSyntaxError('invalid number of arguments in "include" directive', include.place)
        pattern = posixpath.join(posixpath.dirname(self.path), include.args[0])
        if "\0" in pattern:
            raise ConfSyntaxError('there is a zero byte in the path of "include"', include.place)
        return self.reader.glob(pattern) if is_pattern(pattern) else [pattern]

    def _load(self, path: str, at: Place | None) -> list[RawDirective]:
        if path not in self.files:
            self.files[path] = self.cache.directives(path, self._read(path, at))
        return self.files[path]

    def _read(self, path: str, at: Place | None) -> bytes:
        try:
            return self.reader.read(path)
        except OSError as error:
            raise ConfSyntaxError(f'open() "{path}" failed ({error.strerror})', at) from error

    def _upstream(self, directive: RawDirective) -> UpstreamBlock:
        block = _block(directive)
        if len(directive.args) != 1:
            raise ConfSyntaxError('invalid number of arguments in "upstream" directive', directive.place)
        name = directive.args[0]
        if name in self.names:
            raise ConfSyntaxError(f'duplicate upstream "{name}", first in {self.names[name]}', directive.place)
        self.names[name] = directive.place
        servers = tuple(_server(each) for each in block if each.name == "server")
        if not servers:
            raise ConfSyntaxError(f'no servers are inside upstream "{name}"', directive.place)
        method = next((each for each in reversed(block) if each.name in METHODS), None)  # nginx's: the last one counts
        hook = next((each for each in block if each.name.startswith("balancer_by_lua")), None)
        called, obstacle = self._hook(hook) if hook else (None, "")
        if called == name:
            obstacle = shown(next(_obstacles(name, block, servers), ""))
        elif hook and called is not None:
            obstacle = f'{hook.place}: the hook of upstream "{name}" names "{called}"; write balance("{name}")'
        named = (method.name, tuple(method.args)) if method else ("round_robin", ())
        return UpstreamBlock(name, directive.place, servers, named[0], called == name, obstacle, named[1])

    def _hook(self, hook: RawDirective) -> tuple[str | None, str]:
        """The upstream for which a balancer hook calls headgate, None where it does not; and what is wrong with it."""
        code = hook.args[0] if hook.args else ""
        if hook.name == "balancer_by_lua_file":
            if not posixpath.isabs(code) or "$" in code:
                return None, f"{hook.place}: a hook's file is only read under an absolute path; write a hook block"
            code = self._read(code, hook.place).decode("utf-8", "surrogateescape")
        code = _STRING_OR_COMMENT.sub(lambda found: found["string"] or "", code)
        if not re.search(r"""require\s*\(?\s*(["'])headgate\1""", code):
            return None, ""
        if call := re.search(r"""\bbalance\s*\(?\s*(["'])(.*?)\1""", code):
            return call[2], ""
        return None, f'{hook.place}: the hook loads headgate but names no upstream; write balance("NAME")'


def _block(directive: RawDirective) -> list[RawDirective]:
    if directive.block is None:
        raise ConfSyntaxError(f'directive "{directive.name}" has no opening "{{"', directive.place)
    return directive.block


def _obstacles(name: str, block: Iterable[RawDirective], servers: Iterable[ServerLine]) -> Iterator[str]:
    """Why an upstream that is hooked cannot be managed."""
    behind_hook = False
    for each in block:
        behind_hook |= each.name.startswith("balancer_by_lua")
        if each.name in METHODS and not is_balanced_in_lua(each.name, each.args):
            method = " ".join((each.name, *each.args))
            yield (
                f'{each.place}: upstream "{name}" is balanced by {method}, which Headgate does not manage; '
                f"take out {each.name} or the hook"
            )
        elif each.name in METHODS and behind_hook:
            yield f"{each.place}: {each.name} stands behind the hook and switches it off; move it above"
        elif each.name == "zone":
            yield f'{each.place}: upstream "{name}" has a zone, in which a Lua balancer cannot work; take out the zone'
        elif each.name == "state":
            yield f'{each.place}: upstream "{name}" has its servers in a state file; write server lines'
    yield from unspeakable(name, servers)
    for line in servers:
        if "$" in line.address:
            yield f"{line.place}: {line.address} holds a variable, which no server line can; write the address"
        elif any(other.startswith("service=") for other in line.others):
            yield f"{line.place}: {line.address} is found by SRV records (service=), which Headgate does not follow"
        elif line.unix and not line.unix.startswith("/"):
            yield f'{line.place}: {line.address} is no absolute path; write it from "/" on'


def unspeakable(name: str, servers: Iterable[ServerLine]) -> Iterator[str]:
    """Why an upstream's name and addresses cannot be said to anybody: they are no UTF-8."""
    if shown(name) != name:
        yield f'upstream "{name}" has a name that is no UTF-8, which Headgate cannot manage; give it another one'
    for line in servers:
        if shown(line.address) != line.address:
            yield f"{line.place}: {line.address} is no UTF-8, and Headgate cannot manage it; rename that socket"


def _server(directive: RawDirective) -> ServerLine:
    place = directive.place
    if directive.block is not None:
        raise ConfSyntaxError('directive "server" is not terminated by ";"', place)
    if not directive.args:
        raise ConfSyntaxError('invalid number of arguments in "server" directive', place)
    address, *parameters = directive.args
    values: dict[str, int | float | bool] = {}
    others = []
    for parameter in parameters:
        key, is_pair, text = parameter.partition("=")
        value: int | float | bool | None
        if parameter in ("backup", "down"):
            value = True
        elif not is_pair or key not in ("weight", "max_conns", "max_fails", "fail_timeout"):
            others.append(parameter)
            continue
        elif key == "fail_timeout":
            value = duration_seconds(text)
        else:
            value = int(text) if re.fullmatch(r"[0-9]{1,18}", text) and int(text) >= (key == "weight") else None
        if value is None:
            raise ConfSyntaxError(f'invalid parameter "{parameter}"', place)
        values[key] = value
    host, port, unix = split_address(address, place)
    return ServerLine(address, place, host, port, unix, others=tuple(others), **values)  # type: ignore[arg-type]


def split_address(address: str, place: Place) -> tuple[str, int, str]:
    """Host without brackets, port, and path of a unix socket (nginx: ngx_parse_url with default port 80)."""
    if address.startswith("unix:"):
        if not address.removeprefix("unix:"):
            raise ConfSyntaxError(f'no path in the unix domain socket in upstream "{address}"', place)
        return "", 0, address.removeprefix("unix:")
    if "$" in address:
        return "", 0, ""
    parts = re.fullmatch(r"\[(?P<v6>[^\]]*)\](:(?P<port6>.*))?|(?P<host>[^:]*)(:(?P<port>.*))?", address, re.DOTALL)
    host = parts and (parts["v6"] or parts["host"])
    if not parts or not host or "/" in host:
        raise ConfSyntaxError(f'invalid host in upstream "{address}"', place)
    port = parts["port6"] or parts["port"] or ("" if address.endswith(":") else "80")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ConfSyntaxError(f'invalid port in upstream "{address}"', place)
    return host, int(port), ""


def duration_seconds(text: str) -> float | None:
    """nginx's time in seconds, greater units first: `10`, `10s`, `1m30s`; None where it is none.

    As ngx_parse_time reads it, with what it lets pass (`1s5`, `1m  30s`).
    """
    total, step = 0, -1
    for number, unit in re.findall(r"([0-9]*)(ms|[^0-9]?) *", text):
        if unit:
            at = _UNITS.find(unit)
            if at <= step or unit == "ms" or (unit == " " and step >= _UNITS.find("s")):
                return None
            step = at
        total += int(number or 0) * _SECONDS.get(unit, 1)
    return float(total) if re.search("[0-9]", text) and total < 2**63 else None


def raw_directives(path: str, content: bytes) -> list[RawDirective]:
    """One file as a tree, without what can neither be nor bring a part of an upstream: most of a large tree."""
    # nginx takes `…_by_lua_block{` too, crossplane needs the blank to see a Lua block.
    text = re.sub(r"(_by_lua_block)\{", r"\1 {", content.decode("utf-8", "surrogateescape"))
    last = Place(path, text.count("\n") + 1)
    root: list[RawDirective] = []
    outer: list[list[RawDirective]] = []
    current, directive = root, None
    try:
        for token, line, quoted in _balance_braces(_lex_file_object(StringIO(text)), path):
            if not quoted and token.startswith("#"):
                continue
            mark = None if quoted else token
            if directive is None:
                if mark == "}":
                    inner, current = current, outer.pop()
                    if current[-1].name != "upstream":
                        inner[:] = [each for each in inner if each.block or each.name in ("upstream", "include")]
                elif mark in (";", "{"):
                    raise ConfSyntaxError(f'unexpected "{mark}"', Place(path, line))
                else:
                    directive = RawDirective(token, Place(path, line))
                    current.append(directive)
            elif mark == "}":
                raise ConfSyntaxError(f'unexpected "}}", "{directive.name}" has no ";"', Place(path, line))
            elif mark == "{":
                outer.append(current)
                current = directive.block = []
                directive = None
            elif mark == ";":
                directive = None
            else:
                directive.args.append(token)
    except NgxParserSyntaxError as error:
        raise ConfSyntaxError(error.strerror, Place(path, error.lineno or last.line)) from error
    if directive is not None:
        raise ConfSyntaxError('unexpected end of file, expecting ";" or "}"', last)
    return root


def _lex_lua(characters: Iterator[tuple[str, int]], directive: str) -> Iterator[tuple[str, int, bool]]:
    """A Lua block as one quoted token, by Lua's own rules for strings, long brackets and comments.

    crossplane's own lexer for these knows neither long brackets nor all the directives.
    """
    line, depth, text = 0, 0, ""
    closer = ""  # what ends the string or comment that we are in
    start = 0  # where a `--` comment began
    for character, line in characters:
        if not depth:
            if character == "{":
                depth = 1
                yield from [(text.strip(), line, False)] if text.strip() else []
                text = ""
            else:
                text += character  # set_by_lua_block's variable
            continue
        text += character
        if closer:
            long = closer == "\n" and re.fullmatch(r"--\[(=*)\[", text[start:])
            if long:
                closer = f"]{long[1]}]"
            elif character == closer or (len(closer) > 1 and text.endswith(closer)) or character[-1] == closer == "\n":
                closer = ""
        elif character in ('"', "'"):
            closer = character
        elif text.endswith("--"):
            closer, start = "\n", len(text) - 2
        elif character == "[" and (opening := re.search(r"\[(=*)\[$", text[-16:])):
            closer = f"]{opening[1]}]"
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if not depth:
                yield text[:-1], line, True
                yield ";", line, False
                return
    raise NgxParserSyntaxError(f'unexpected end of file, expecting "}}" of {directive}', None, line)


_LUA_PHASES = (
    "init init_worker exit_worker set server_rewrite rewrite access content header_filter body_filter log balancer "
    "precontent preread ssl_client_hello ssl_certificate ssl_session_fetch ssl_session_store proxy_ssl_verify "
    "proxy_ssl_certificate"
)
register_external_lexer([f"{phase}_by_lua_block" for phase in _LUA_PHASES.split()], _lex_lua)
