"""Tells when files that a configuration rests on have other content than when they were read.

Here: which directories to watch for that, when to look, and comparing. What is read, and what follows from a change,
is not known here.
"""

from __future__ import annotations

import asyncio
import errno
import glob
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import structlog
from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchCallback,
    WatchDescriptor,
)

from controller.adapters.nginx.files import DiskReader
from controller.conf.parse import digest

log = structlog.get_logger("headgate")

QUIET = 0.3
"""Seconds without an event after which it is time to look."""
PATIENCE = 2.0
"""Seconds after which it is time to look although events go on."""
RESCAN = 45.0
"""Seconds between two looks without any event: events can be lost, and network file systems send none."""

_LINKS = 40  # symbolic links in one path, as in Linux
# What reading causes (open, close after reading) is left out, and so are single writes: a file is looked at when its
# writer closes it, and a log that happens to lie there costs nothing.
_MASK = Mask(
    InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_MOVE
    | InotifyConstants.IN_CREATE
    | InotifyConstants.IN_DELETE
    | InotifyConstants.IN_ATTRIB
    | InotifyConstants.IN_DELETE_SELF
    | InotifyConstants.IN_MOVE_SELF
    | InotifyConstants.IN_ONLYDIR
)


class Watcher:
    """Calls `on_change` on the event loop with the paths whose content changed, or that joined or left a pattern.

    A file is a path and the digest of its content (controller.conf.parse.digest), empty where it cannot be read.
    `always` are files that are followed whatever `follow` says. Nothing is said of a touch, of files that nobody
    follows, or of content that was announced by `expect`. `quiet`, `patience` and `rescan` are seconds.
    """

    def __init__(
        self,
        on_change: Callable[[frozenset[str]], None],
        always: Mapping[str, str] | None = None,
        *,
        quiet: float = QUIET,
        patience: float = PATIENCE,
        rescan: float = RESCAN,
    ) -> None:
        self._on_change = on_change
        self._always = dict(always or {})
        self._quiet = quiet
        self._patience = patience
        self._rescan = rescan
        self._reader = DiskReader()
        self._files = dict(self._always)
        self._globs: dict[str, tuple[str, ...]] = {}
        self._expected: dict[str, str] = {}
        self._watches = _Watches(self._stir)
        self._stirred = asyncio.Event()
        self._stirred_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())
        self._stir()

    async def close(self) -> None:
        """Stop; `on_change` is not called any more."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        await asyncio.to_thread(self._watches.close)

    def follow(self, files: Mapping[str, str], globs: Mapping[str, tuple[str, ...]]) -> None:
        """Follow these instead: what was read, as it was when it was read, so that no later change is missed.

        `files` are contents by absolute path, `globs` the paths that matched each absolute pattern, sorted by bytes.
        """
        self._files = {**files, **{path: self._files[path] for path in self._always}}
        self._globs = dict(globs)
        self._stir()

    def expect(self, path: str, content_hash: str) -> None:
        """Say nothing when this file gets this content (empty: when it goes away): we are about to write it ourselves.

        It ends when the file is seen with that content, or with one that is neither that nor the former. Each call
        replaces the one before for this file: a writer that takes its work back, or fails, expects the former content.
        """
        self._expected[os.path.realpath(path)] = content_hash

    def announce(self, path: str, content: bytes | None) -> None:
        """The same for content as it is; None: the file goes away."""
        self.expect(path, "" if content is None else digest(content))

    def _stir(self) -> None:
        """Something may have changed; called on any thread."""
        self._stirred_at = time.monotonic()
        if self._loop and not self._stirred.is_set():
            self._loop.call_soon_threadsafe(self._stirred.set)

    async def _run(self) -> None:
        while True:
            await self._settled()
            try:
                await self._look()
            except Exception:
                log.exception("looking for changed files failed", again_in=self._rescan)

    async def _settled(self) -> None:
        """Return when something happened and then nothing for a while, or when it is time to look anyway."""
        try:
            async with asyncio.timeout(self._rescan):
                await self._stirred.wait()
        except TimeoutError:
            return
        latest = time.monotonic() + self._patience
        while True:
            left = min(self._stirred_at + self._quiet, latest) - time.monotonic()
            if left <= 0:
                break
            await asyncio.sleep(left)
        self._stirred.clear()

    async def _look(self) -> None:
        files, globs = self._files, self._globs
        seen = await asyncio.to_thread(self._see, files, globs)
        if files is not self._files:
            return  # what is followed was replaced meanwhile, and that stirs
        changed, met = set(), set()
        for path, content in seen.contents.items():
            target = seen.targets[path]
            former = files.get(path, "")
            differs = content != former or path in seen.moved
            if self._expected.get(target) == content:
                met.add(target)
            elif differs:
                changed.add(path)
                if content != former:
                    met.add(target)
        for target in met:
            self._expected.pop(target, None)
        self._files, self._globs = seen.contents, seen.globs
        if changed:
            self._on_change(frozenset(changed))

    def _see(self, files: Mapping[str, str], globs: Mapping[str, tuple[str, ...]]) -> _Sight:
        """Look at the world, in a thread. Directories first: what changes behind them from now on is an event."""
        places = _Places(self._reader)
        for pattern in globs:
            places.pattern(pattern)
        targets = {path: places.path(path) for path in files}
        self._watches.set(places.found)
        matches = {pattern: tuple(self._reader.glob(pattern)) for pattern in globs}
        moved = {path for pattern in globs for path in {*globs[pattern]} ^ {*matches[pattern]}}
        targets |= {path: places.path(path) for path in moved}
        return _Sight({path: self._reader.digest(path) for path in targets}, targets, matches, moved)


class _Sight(NamedTuple):
    """What a look saw: contents and real paths by path, matches by pattern, and what joined or left a pattern."""

    contents: dict[str, str]
    targets: dict[str, str]
    globs: dict[str, tuple[str, ...]]
    moved: set[str]


class _Places:
    """Collects in `found` the directories in which an entry decides what paths and patterns lead to.

    These are where links stand, where their targets stand, and where something is missing that may come. None of them
    is itself reached through a link.
    """

    def __init__(self, reader: DiskReader) -> None:
        self.found: set[str] = set()
        self._reader = reader
        self._folders: dict[str, str] = {}

    def path(self, path: str) -> str:
        """Where an absolute path leads; itself if it leads nowhere."""
        folder, name = os.path.split(path)
        if here := self._folder(folder):
            self.found.add(here)
            if target := self._walk(here, name):
                self.found.add(os.path.dirname(target))
                return target
        return path

    def pattern(self, pattern: str) -> None:
        """What can match an absolute pattern."""
        bases = [""]
        for part in pattern.split("/")[1:]:
            if not glob.has_magic(part):
                bases = [f"{base}/{part}" for base in bases]
                continue
            self.found |= {folder for base in bases if (folder := self._folder(base or "/"))}
            bases = [match for base in bases for match in self._reader.glob(f"{glob.escape(base)}/{part}")]
        for base in bases:
            self.path(base)

    def _folder(self, path: str) -> str:
        if path not in self._folders:
            self._folders[path] = self._walk("/", path)
        return self._folders[path]

    def _walk(self, here: str, path: str) -> str:
        """The real path of `path`, which starts at the real directory `here`; empty where it leads nowhere."""
        parts = path.split("/")[::-1]
        links = 0
        while parts:
            name = parts.pop()
            if name in ("", "."):
                continue
            if name == "..":
                here = os.path.dirname(here)
                continue
            try:
                target = os.readlink(os.path.join(here, name))
            except OSError as error:
                if error.errno == errno.EINVAL:  # no link
                    here = os.path.join(here, name)
                    continue
                self.found.add(here)
                return ""
            self.found.add(here)
            links += 1
            if links > _LINKS:
                return ""
            here = "/" if target.startswith("/") else here
            parts += target.split("/")[::-1]
        return here


class _Watches(WatchCallback):
    """The kernel's watches on a set of directories; each event, and each loss of events, calls `stir` on a thread.

    watchdog's observers are not enough here: they keep to themselves that events were lost or a directory was moved,
    and run a thread for each directory.
    """

    def __init__(self, stir: Callable[[], None]) -> None:
        self._stir = stir
        self._lock = threading.Lock()
        self._closed = False
        self._kernel: InotifyFD | None = None
        self._ids = itertools.count()
        self._held: list[tuple[WatchDescriptor, CallbackId]] = []
        self._problem = ""

    def set(self, directories: Iterable[str]) -> None:
        """Watch exactly these, as they are now. What cannot be watched is told once, and left to the rescan."""
        with self._lock:
            if self._closed:
                return
            problem = ""
            former, self._held = self._held, []
            try:
                kernel = self._kernel = self._kernel or _started()
                for directory in sorted(directories):
                    problem = self._watch(kernel, directory) or problem
                kernel.remove_callbacks(former)
            except OSError as error:
                problem = f"{error.strerror}; raise fs.inotify.max_user_instances"
            if problem and problem != self._problem:
                log.warning("some changes of files are only seen by looking now and then", reason=problem)
            self._problem = problem

    def _watch(self, kernel: InotifyFD, directory: str) -> str:
        """Watch what stands under this path now; what keeps us from it, empty if nothing does."""
        name = CallbackId(next(self._ids))
        try:
            watch = kernel.add_callback(os.fsencode(directory), _MASK, self, name)
        except OSError as error:
            gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
            return "" if gone else f"{directory}: {error.strerror}; raise fs.inotify.max_user_watches"
        self._held.append((watch, name))
        return f"{directory}: no permission to read it" if watch == -1 else ""

    def close(self) -> None:
        """Watch nothing any more, for ever; waits for a `set` under way."""
        with self._lock:
            self._closed = True
            if self._kernel:
                self._kernel.stop()
                self._kernel.join()

    def on_event(self, event: InotifyEvent) -> None:
        """Something happened in a directory, or to it."""
        self._stir()

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:
        """A directory is gone."""
        self._stir()

    def on_queue_overflow(self) -> None:
        """Events were lost."""
        self._stir()


def _started() -> InotifyFD:
    kernel = InotifyFD()
    kernel.start()
    return kernel
