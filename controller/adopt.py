"""Adoption of a user's nginx: which files have to change for Headgate to manage it, or to leave it, and doing that.

Needs no daemon. How bytes change stands in conf/edit.py, how files are written in adapters/nginx/writer.py, and what
keeps an upstream from the Lua plane in obstacles.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from controller.adapters.clock import SystemClock
from controller.adapters.nginx import check, verify
from controller.adapters.nginx.files import DiskReader
from controller.adapters.nginx.lua import LuaPlane, render_include
from controller.adapters.nginx.memory import Memory
from controller.adapters.nginx.writer import Changed, CheckFailed, ConfWriter, Edit, OwnFile, WriteFailed
from controller.adapters.pidfd import is_alive, send
from controller.adapters.procfs import read as read_process
from controller.adapters.whole import put
from controller.conf import obstacles, tree
from controller.conf.diff import FileEdit, diff
from controller.conf.draft import EditRefused, Reason
from controller.conf.edit import AddHook, AddInclude, RemoveHook, RemoveInclude, SetParameter, plan
from controller.conf.edit import Edit as Wish
from controller.conf.index import Index
from controller.conf.ledger import OURS, restoring, written_lines
from controller.conf.parse import ConfSyntaxError
from controller.conf.spans import directives
from controller.conf.tree import Node
from controller.errors import HeadgateError, SettingsError
from controller.ports import ConfigError, PlaneRefused, PlaneUnreachable
from controller.resources import lua_dir, nginx_dir
from controller.settings import Settings

RELOAD_TIMEOUT = 20.0
"""Seconds until a reload of nginx must be proved."""

_POLL = 0.02  # seconds between two looks at nginx's workers
_HTTP = (b"http",)
_TMPFILES = ("/etc/tmpfiles.d", "/run/tmpfiles.d", "/usr/lib/tmpfiles.d")


class CannotAdopt(HeadgateError):
    """nginx cannot be adopted, or released, as it is; each line of the message says why, and the remedy."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Files to write, in this order, and what that means.

    `plane` is lua or reload for an adoption, else empty. `upstreams` are adopted or released by it; `left` says of each
    other one why it is not, `notes` what else to know. `meant` stands in no file yet: what the author wants where the
    reload plane holds a parameter.
    """

    writes: tuple[Edit, ...]
    plane: str = ""
    upstreams: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    meant: tuple[SetParameter, ...] = ()

    def shown(self) -> str:
        """The change for people: unified diffs of the user's files, a line for each of ours."""
        text = ""
        for write in self.writes:
            if isinstance(write, FileEdit):
                text += diff(write)
            elif write.after is None:
                text += f"{write.path}, a file of Headgate's own, is deleted\n"
            else:
                lines = write.after.count(b"\n")
                text += f"{write.path}, a file of Headgate's own, is written ({lines} lines)\n"
        for each in self.meant:
            wish = f"without {each.name}" if each.value is None else f"{each.name}={each.value}".removesuffix("=")
            text += f"{each.address} of {each.upstream}: {wish}, as soon as Headgate's own {each.name} goes\n"
        return text


# --- plans --------------------------------------------------------------------------------------------------------


def adoption(settings: Settings, wanted: Sequence[str] = ()) -> Plan:
    """What makes these upstreams Headgate's, or with none all that can be; CannotAdopt, ConfigError, EditRefused."""
    house = _House(settings)
    plane: str = settings.nginx.data_plane
    if plane == "reload":
        return _adoption_by_reload(house, wanted)
    for name in wanted:
        house.known(name)
    found = house.obstacles()
    if found.general:
        raise CannotAdopt("\n  ".join(["nginx cannot be adopted as it is:", *found.general]), "")
    hooked = obstacles.hooked(house.root)
    wishes: list[Wish] = []
    left = []
    for name in wanted or house.upstreams:
        if name not in hooked:
            if reason := found.upstreams.get(name) or house.refusal(AddHook(name)):
                left.append(reason)
            else:
                wishes.append(AddHook(name))
    if not house.upstreams:
        left.append(f"no upstream is in the http block of {house.index.main}; write one with your servers")
    if left and (wanted or not (wishes or hooked)):
        raise CannotAdopt("\n  ".join(["not adopted, and nothing was changed:", *left]), "")
    names = tuple(wish.upstream for wish in wishes if isinstance(wish, AddHook))
    include = settings.nginx.include
    own = []
    if found.by_hand is None:
        own = [house.own(include, house.include_text(found.taken))]
        wishes += [] if house.includes(include) else [AddInclude(include)]
    if house.includes(settings.nginx.version_file):
        more, files = house.without_reload_plane()
        wishes += more
        own += files
    notes = [*found.notes, *_until_a_table(house.root, names), *_after_a_reboot(settings)]
    return Plan(house.in_order(wishes, own, adding=True), plane, names, tuple(left), tuple(notes))


def release(settings: Settings) -> Plan:
    """What takes everything out again that an adoption put there; CannotAdopt, ConfigError, EditRefused."""
    house = _House(settings)
    include = settings.nginx.include
    names = obstacles.hooked(house.root)
    wishes, own = house.without_reload_plane()
    wishes += map(RemoveHook, names)
    if house.includes(include):
        if strangers := obstacles.strangers(house.root, include):
            raise CannotAdopt("\n  ".join(["nginx cannot be released as it is:", *strangers]), "")
        wishes.append(RemoveInclude(include))
    own.append(house.own(include, None))
    return Plan(house.in_order(wishes, own, adding=False), upstreams=tuple(names))


def _adoption_by_reload(house: _House, wanted: Sequence[str]) -> Plan:
    if wanted:
        message = 'with data_plane = "reload" the upstreams are managed that headgate.toml names'
        raise CannotAdopt(message, "leave the names out, and write [upstream.NAME] into headgate.toml")
    nginx = house.settings.nginx
    names = obstacles.hooked(house.root)
    wishes: list[Wish] = [RemoveHook(name) for name in names]
    own = []
    if house.includes(nginx.include):
        wishes.append(RemoveInclude(nginx.include))
        own.append(house.own(nginx.include, None))
    if not house.includes(nginx.version_file):
        wishes.append(AddInclude(nginx.version_file))
    if not Path(nginx.version_file).exists():
        try:
            text = verify.version_include(Path(nginx.version_socket), "0")
        except ValueError as error:
            raise SettingsError(f"[nginx] version_socket: {error}") from error
        own.append(house.own(nginx.version_file, text))
    named = [name for name in house.upstreams if name in house.settings.upstream]
    adopted = named if wishes or own else ()
    notes = _after_a_reboot(house.settings)
    if not named:
        notes.append("headgate.toml names no upstream yet: write [upstream.NAME] for each that Headgate shall manage")
    return Plan(house.in_order(wishes, own, adding=False), "reload", tuple(adopted), notes=tuple(notes))


def servers(settings: Settings, wishes: Sequence[Wish]) -> Plan:
    """What makes these edits of `server` lines; ConfigError, EditRefused.

    Where the reload plane holds a parameter now, the file stays, and the wish is for the plane to remember.
    """
    index, plane = _index(settings), str(settings.nginx.data_plane)
    edits = plan(index, wishes)
    if plane != "reload":
        return Plan(edits)
    ledger = Memory.load(settings.nginx_state, SystemClock()).ledger
    written: list[Wish] = []
    meant = []
    for wish in wishes:
        if not (isinstance(wish, SetParameter) and wish.name in OURS):
            written.append(wish)
            continue
        for line in written_lines(index, wish.upstream)[1]:
            one = replace(wish, occurrence=line.number)
            if line.address == wish.address and not ledger.holds(line, wish.name):
                written.append(one)
            elif line.address == wish.address and ledger.meant(line)[wish.name] != wish.value:
                meant.append(one)
    return Plan(plan(index, written), meant=tuple(meant))


def _index(settings: Settings) -> Index:
    try:
        return Index(settings.nginx.conf, DiskReader())
    except ConfSyntaxError as error:
        raise _broken(error) from error


def _broken(error: ConfSyntaxError) -> ConfigError:
    return ConfigError(str(error), "correct it and see what `nginx -t` says")


class _House:
    """The configuration as it is."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.index = _index(settings)
        try:
            self.root = tree.read(settings.nginx.conf, DiskReader())
        except ConfSyntaxError as error:
            raise _broken(error) from error
        blocks = [upstream for http in self.root.own("http") for upstream in http.own("upstream")]
        self.upstreams = [" ".join(upstream.args) for upstream in blocks]

    def known(self, name: str) -> None:
        """See that there is such an upstream; EditRefused."""
        if name not in self.upstreams:
            names = ", ".join(self.upstreams) or "none"
            raise EditRefused(Reason.NO_UPSTREAM, f'no upstream "{name}" is in the http block; there are: {names}')

    def obstacles(self) -> obstacles.Found:
        """What keeps it from the Lua plane."""
        body = {
            each.name.decode().removesuffix("_block"): (each.lua or b"").decode()
            for each in directives(self._rendered().encode(), self.settings.nginx.include)
            if each.lua is not None
        }
        found = obstacles.find(self.root, self.settings.nginx.include, str(lua_dir()), body)
        if not obstacles.loads_module(self.root):
            built = check.built_with(check.find(self.settings.nginx.conf).program)
            if remedy := check.lua_module(built):
                found.general.append(f"{self.index.main}: nginx loads no Lua module; {remedy}")
        return found

    def refusal(self, wish: Wish) -> str:
        """Why this alone cannot be done, empty when it can."""
        try:
            plan(self.index, [wish])
        except EditRefused as error:
            return str(error)
        return ""

    def includes(self, path: str) -> bool:
        """Whether the http block includes this file."""
        return bool(self.index.includes(_HTTP, path.encode()))

    def include_text(self, taken: Iterable[str]) -> bytes:
        """Our include, without the directives that the user's own ones do the work of."""
        data = self._rendered().encode()
        for each in reversed(directives(data, self.settings.nginx.include)):
            if each.name.decode().removesuffix("_block") in taken:
                data = data[: each.start] + data[each.end :].removeprefix(b"\n")
        return data

    def without_reload_plane(self) -> tuple[list[Wish], list[OwnFile]]:
        """What takes out all that the reload plane has written: its include, and its weights and marks in the lines."""
        version, state = self.settings.nginx.version_file, self.settings.nginx_state
        wishes: list[Wish] = [RemoveInclude(version)] if self.includes(version) else []
        ledger = Memory.load(state, SystemClock()).ledger
        written = {name for name, *_ in ledger.entries}
        for name in (each for each in self.upstreams if each in written):
            wishes += restoring(ledger, written_lines(self.index, name)[1])
        return wishes, [self.own(version, None), self.own(str(state), None)]

    def own(self, path: str, content: bytes | None) -> OwnFile:
        """A file of ours as it is and as it is to be."""
        try:
            return OwnFile(path, Path(path).read_bytes(), content)
        except FileNotFoundError:
            return OwnFile(path, None, content)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}", "correct its permissions") from error

    def in_order(self, wishes: Sequence[Wish], own: Sequence[OwnFile], *, adding: bool) -> tuple[Edit, ...]:
        """All writes, so that after each of them nginx could be started: the include before the hooks that need it."""
        ours = self.index.includes(_HTTP, self.settings.nginx.include.encode())
        heads = {path for path, _ in (*self.index.blocks(_HTTP), *ours)}
        edits: list[Edit] = sorted(plan(self.index, wishes), key=lambda each: (each.path not in heads) is adding)
        appearing = [each for each in own if each.after is not None and each.before != each.after]
        vanishing = [each for each in own if each.after is None and each.before is not None]
        return (*appearing, *edits, *vanishing)

    def _rendered(self) -> str:
        nginx = self.settings.nginx
        template = (nginx_dir() / "headgate.conf").read_text()
        try:
            return render_include(template, lua=str(lua_dir()), socket=nginx.control, snapshot=nginx.snapshot)
        except ValueError as error:
            raise SettingsError(f"[nginx] control or snapshot: {error}") from error


def _until_a_table(root: Node, names: Sequence[str]) -> list[str]:
    """The hook takes the directive's place at the reload, and only a table brings the method back."""
    return [
        f'{node.place}: until the daemon has published a table, nginx balances upstream "{upstream.args[0]}" by round '
        f"robin and not by {node.name}; let the daemon run when you adopt"
        for http in root.own("http")
        for upstream in http.own("upstream")
        if " ".join(upstream.args) in names
        for node in upstream.own("hash", "ip_hash")
    ]


def _after_a_reboot(settings: Settings) -> list[str]:
    """What to do so that nginx finds the directory of its socket, without which it does not start."""
    plane: str = settings.nginx.data_plane
    directory = str(Path(settings.nginx.version_socket if plane == "reload" else settings.nginx.control).parent)
    if not directory.startswith("/run/"):
        return []
    for known in _TMPFILES:
        for file in Path(known).glob("*.conf"):
            with contextlib.suppress(OSError):
                if f" {directory} " in file.read_text(errors="replace"):
                    return []
    line = f"d {directory} 0750 root root -"
    return [
        f"{directory} is gone after a reboot, and without it nginx does not start; let systemd make it: "
        f"echo '{line}' > /etc/tmpfiles.d/headgate-nginx.conf"
    ]


# --- carrying out -------------------------------------------------------------------------------------------------


def writer(
    settings: Settings, announce: Callable[[str, bytes | None], None] = lambda path, content: None
) -> ConfWriter:
    """The writer of nginx's files, whose journal stands beside the store. Everybody who writes them uses this one."""

    async def test() -> None:
        await check.check(await asyncio.to_thread(check.find, settings.nginx.conf))

    return ConfWriter(settings.journal, test, announce)


async def recover(settings: Settings) -> tuple[str, ...]:
    """Undo what a killed process left half done; sentences for people. WriteFailed."""
    return await writer(settings).recover()


def owed(settings: Settings) -> bool:
    """Whether an adoption or a release was killed, so that nginx may not have loaded what it had written."""
    return _owed(settings).exists()


def _owed(settings: Settings) -> Path:
    return settings.journal / "reload-owed"


async def carry_out(settings: Settings, wanted: Plan, say: Callable[[str], None], *, reload: bool = True) -> None:
    """Write the files, have nginx test them, and reload it once if it runs; `say` gets a sentence about each.

    Until the reload is proved it is owed: whoever comes after a process that was killed here makes good for it.
    Changed: somebody edited meanwhile, plan again. CheckFailed, WriteFailed, ReloadFailed: all is as it was.
    """
    await asyncio.to_thread(_prepare, settings, wanted)
    nginx = await asyncio.to_thread(check.find, settings.nginx.conf)
    files, debt, owes = writer(settings), _owed(settings), owed(settings)
    if reload:
        await asyncio.to_thread(_note, debt)
    try:
        await files.apply(wanted.writes)
    except (Changed, CheckFailed, WriteFailed) as error:
        if not owes:
            debt.unlink(missing_ok=True)
        raise await _explained(nginx, error) if isinstance(error, CheckFailed) else error from error
    if wanted.writes:
        say(f"written, and taken by `nginx -t`: {', '.join(write.path for write in wanted.writes)}")
    if not reload:
        return
    if nginx.master is None:
        say("nginx does not run; it will start with this")
        debt.unlink(missing_ok=True)
        return
    try:
        say(await _turn_over(nginx.master, _ASK[wanted.plane](settings)))
        debt.unlink(missing_ok=True)
    except verify.ReloadFailed as error:
        await files.apply([OwnFile(each.path, each.after, each.before) for each in reversed(wanted.writes)])
        outcome = "every file is as it was before"
        if error.taken:
            await _turn_over(nginx.master, _nobody)
            outcome += ", and nginx was reloaded with them"
        if wanted.writes:
            debt.unlink(missing_ok=True)
        raise verify.ReloadFailed(f"{error.message}; {outcome}", error.remedy, error.taken) from error


def _note(debt: Path) -> None:
    try:
        debt.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        put(debt, b"nginx is to be reloaded\n")
    except OSError as error:
        raise ConfigError(f"{debt} cannot be written: {error.strerror}", "make room, or use sudo") from error


def _prepare(settings: Settings, wanted: Plan) -> None:
    """Make the directories that an adoption needs, and see that no table of long ago comes into force."""
    nginx = settings.nginx
    places = {"lua": (nginx.control, nginx.snapshot), "reload": (nginx.version_socket,), "": ()}[wanted.plane]
    files = [(Path(each.path).parent, 0o755) for each in wanted.writes if each.before is None]
    for directory, mode in (*files, *((Path(place).parent, 0o750) for place in places)):
        try:
            directory.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be made: {error.strerror}", "make it, or use sudo") from error
    if any(each.path == nginx.include and each.before is None for each in wanted.writes):
        Path(nginx.snapshot).unlink(missing_ok=True)


async def _explained(nginx: check.Nginx, failure: CheckFailed) -> CheckFailed:
    """The failure, with what helps where the configuration was bad before, or a module of Lua's is missing."""
    try:
        await check.check(nginx)
    except CheckFailed as error:
        message = f"nginx does not take its configuration as it is: {error.message}"
        return CheckFailed(message, "correct that first; nothing was changed")
    missing = "module 'resty" in failure.message or "module 'cjson" in failure.message
    return CheckFailed(failure.message, f"{check.LUA_PACKAGES}; {failure.remedy}" if missing else failure.remedy)


async def _turn_over(master: int, ask: Callable[[], Awaitable[object]]) -> str:
    """Reload nginx and wait until that is proved: the same master, only newer workers that accept, and an answer.

    A sentence for people; ReloadFailed.
    """
    process = read_process(master)
    old = frozenset(worker.identity for worker in verify.workers(master))
    if process is None or not send((master, process.created), signal.SIGHUP):
        raise verify.ReloadFailed(f"nginx's master {master} has ended", "start nginx", taken=False)
    clock = asyncio.get_running_loop().time
    deadline = clock() + RELOAD_TIMEOUT
    while True:
        seen = verify.workers(master)
        new = [worker.identity[0] for worker in seen if worker.identity not in old]
        late = [worker.identity[0] for worker in seen if worker.identity in old and not worker.exiting]
        missing = "no new worker has come" if not new else f"old workers still accept: {_listed(late)}"
        if new and not late:
            try:
                await ask()
            except (PlaneUnreachable, PlaneRefused) as error:
                missing = error.message
            else:
                return f"nginx was reloaded: master {master} stayed, workers {_listed(new)} are new"
        if clock() > deadline or not is_alive((master, process.created)):
            message = f"nginx was told to reload, and then {missing}"
            raise verify.ReloadFailed(message, "see nginx's error log for why", taken=bool(new))
        await asyncio.sleep(_POLL)


def _ask_lua(settings: Settings) -> Callable[[], Awaitable[object]]:
    async def ask() -> object:
        async with LuaPlane(Path(settings.nginx.control), Path(settings.nginx.snapshot)) as plane:
            return await plane.status()

    return ask


def _ask_version(settings: Settings) -> Callable[[], Awaitable[object]]:
    nginx = settings.nginx
    return verify.Reloader(Path(nginx.conf), Path(nginx.version_socket), Path(nginx.version_file)).served


async def _nobody() -> None:
    """There is nobody to ask: newer workers are the proof."""


def _ask_nobody(_: Settings) -> Callable[[], Awaitable[object]]:
    return _nobody


_ASK = {"lua": _ask_lua, "reload": _ask_version, "": _ask_nobody}


def _listed(pids: Iterable[int]) -> str:
    return ", ".join(map(str, pids))
