"""Files of a user's configuration, replaced all or none. What to write, and what is checked then, stands elsewhere.

A transaction: 1. the journal says which files are about to change; 2. beside each file stand its new content and a
second name of the original; 3. the new ones are renamed into place; 4. the check; 5. the journal says that all is done.
Going back only renames the originals, which needs no space on the disk and brings back owner, mode and times as well.
A process that is killed anywhere leaves the journal behind, from which the next one goes back, or clears up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from controller.errors import HeadgateError

T = TypeVar("T")

LOCK_TIMEOUT = 60.0
"""Seconds to wait while another process writes."""

_LOCK_POLL = 0.05  # seconds; a lock of flock(2) tells nobody when it becomes free
_REMEDIES = {
    errno.EACCES: "use sudo",
    errno.EPERM: "use sudo; `lsattr` shows whether the file is immutable",
    errno.EROFS: "the file system is read-only: mount it for writing",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in the quota",
    errno.EBUSY: "the file is mounted on its own and cannot be replaced: mount its directory instead",
    errno.ENOENT: "create the directory",
}


class Changed(HeadgateError):
    """Somebody else changed a file since it was read: nothing was written, and whoever wishes plans again."""


class CheckFailed(HeadgateError):
    """nginx does not take the files; they are as they were before, byte for byte."""


class WriteFailed(HeadgateError):
    """The files could not be written; they are as they were before, unless the message says otherwise."""


class Edit(Protocol):
    """A file to be `after` where it is `before`; None stands for no file. `conf.edit.FileEdit` is one."""

    @property
    def path(self) -> str:
        """Where it is; a symbolic link is followed."""

    @property
    def before(self) -> bytes | None:
        """What was read."""

    @property
    def after(self) -> bytes | None:
        """What to write."""


@dataclass(frozen=True, slots=True)
class OwnFile:
    """A file of Headgate's own, to be created (`before` None), changed, or deleted (`after` None)."""

    path: str
    before: bytes | None
    after: bytes | None


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a transaction: its place and the digests of its content, None for no file."""

    path: str
    before: str | None
    after: str | None

    @property
    def new(self) -> Path:
        """The companion that becomes the file. The dot keeps it out of nginx's `include *`."""
        return self._companion("new")

    @property
    def old(self) -> Path:
        """The companion that is the original."""
        return self._companion("old")

    def _companion(self, kind: str) -> Path:
        directory, name = os.path.split(self.path)
        return Path(directory, f".{name}.headgate-{kind}")


class ConfWriter:
    """Writes files and has them checked, one transaction at a time on this machine.

    `journal` is a directory of ours, made where it is missing. `checker` raises CheckFailed where nginx does not take
    what now lies there. `announce` is told of each content (None: no file) before it comes to lie there, so that
    whoever watches the files does not take it for somebody else's.
    """

    def __init__(
        self,
        journal: Path,
        checker: Callable[[], Awaitable[None]],
        announce: Callable[[str, bytes | None], None] = lambda path, content: None,
    ) -> None:
        self._journal = journal
        self._announce = announce
        self._manifest = journal / "transaction.json"
        self._checker = checker

    async def apply(self, edits: Sequence[Edit]) -> None:
        """Write all files in this order, or none; Changed, CheckFailed, WriteFailed.

        Mode, owner, extended attributes and access lists stay.
        """
        async with self._locked():
            await _to_end(self._recover)
            contents = await _to_end(lambda: _compared(edits))
            if not contents:
                return
            for file, content in contents.items():
                self._announce(file.path, content)
            try:
                await _to_end(lambda: self._write(contents))
                await self._checker()
            except BaseException as failure:
                for edit in edits:
                    self._announce(edit.path, edit.before)
                kept = await _to_end(lambda: self._undo(contents))
                outcome = "; ".join(kept) or "every file is as it was before"
                if isinstance(failure, CheckFailed | WriteFailed):
                    remedy = f"{failure.remedy}; {outcome}".removeprefix("; ")
                    raise type(failure)(failure.message, remedy) from failure
                raise
            await _to_end(lambda: self._commit(contents))

    async def recover(self) -> tuple[str, ...]:
        """Undo a transaction during which its process was killed; sentences for people, none when there was none."""
        if not await asyncio.to_thread(self._manifest.exists):
            return ()
        async with self._locked():
            return await _to_end(self._recover)

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        try:
            self._journal.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._journal / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _failed(str(self._journal), error) from error
        try:
            clock = asyncio.get_running_loop().time
            deadline = clock() + LOCK_TIMEOUT
            while not _try_lock(lock):
                if clock() > deadline:
                    message = f"another headgate has been writing to nginx's files for {LOCK_TIMEOUT:g} s"
                    raise WriteFailed(message, f"`fuser {self._journal}/lock` shows who it is")
                await asyncio.sleep(_LOCK_POLL)
            yield
        finally:
            os.close(lock)

    # --- the steps, each in a thread ------------------------------------------------------------------------------

    def _write(self, contents: Mapping[_File, bytes | None]) -> None:
        """Everything up to the check."""
        path = str(self._journal)
        try:
            self._record(contents, done=False)
            for file, content in contents.items():
                path = file.path
                if file.before is not None:
                    _second_name(file)
                if content is not None:
                    _create(file.new, content, file)
            for file in contents:
                path = file.path
                _expect(file)
                if file.after is not None:
                    file.new.replace(path)
                else:
                    os.unlink(path)
            for path in sorted({os.path.dirname(file.path) for file in contents}):
                _sync_directory(path)
        except OSError as error:
            raise _failed(path, error) from error

    def _undo(self, files: Iterable[_File]) -> tuple[str, ...]:
        """Give every file its original back, the last one first; what could not be is said."""
        kept = []
        for file in reversed(list(files)):
            try:
                current = _digest(_content(file.path))
                replaced = not os.path.lexists(file.new) and current != file.before
                if replaced and current != file.after:
                    kept.append(f"{file.path} was changed by somebody else and stays; its original is {file.old}")
                    continue
                if replaced and file.before is None:
                    os.unlink(file.path)
                elif replaced:
                    file.old.replace(file.path)
                _remove(file.old)
                _remove(file.new)
                _sync_directory(os.path.dirname(file.path))
            except FileNotFoundError:
                kept.append(f"{file.path} stays as it is now, for its original {file.old} is gone")
            except OSError as error:
                message = f"{file.path} could not be given its original back, which is {file.old}: {error.strerror}"
                raise WriteFailed(message, "mend that; the next `headgate adopt`, or daemon, tries again") from error
        self._forget()
        return tuple(kept)

    def _commit(self, files: Iterable[_File]) -> None:
        try:
            self._record(files, done=True)
        except OSError as error:
            self._undo(files)
            raise _failed(str(self._journal), error) from error
        with contextlib.suppress(OSError):  # it is done; the next transaction clears up
            self._clear(files)

    def _clear(self, files: Iterable[_File]) -> None:
        for file in files:
            _remove(file.old)
            _remove(file.new)
        self._forget()

    def _recover(self) -> tuple[str, ...]:
        try:
            record = json.loads(self._manifest.read_bytes())
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            raise WriteFailed(f"{self._manifest} cannot be read: {error}", "mend it, or move it away") from error
        files = [_File(**each) for each in record["files"]]
        if record["done"]:
            self._clear(files)
            return ()
        kept = self._undo(files)
        names = ", ".join(file.path for file in files)
        return (f"an interrupted change of {names} was undone", *kept)

    def _record(self, files: Iterable[_File], *, done: bool) -> None:
        """Write the journal; from then on a transaction is under way, or over."""
        temporary = self._manifest.with_suffix(".new")
        text = json.dumps({"done": done, "files": [asdict(file) for file in files]}, indent=1)
        with temporary.open("w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(self._manifest)
        _sync_directory(str(self._journal))

    def _forget(self) -> None:
        _remove(self._manifest)
        _remove(self._manifest.with_suffix(".new"))
        _sync_directory(str(self._journal))


async def _to_end(work: Callable[[], T]) -> T:
    """Run this in a thread. Whoever is cancelled meanwhile waits for its end first, so that nothing overlaps."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _compared(edits: Iterable[Edit]) -> dict[_File, bytes | None]:
    """The files that are to change, which still are what was read, each with its new content; Changed, WriteFailed."""
    contents: dict[_File, bytes | None] = {}
    for edit in edits:
        if edit.before == edit.after:
            continue
        file = _File(os.path.realpath(edit.path), _digest(edit.before), _digest(edit.after))
        if any(file.path == other.path for other in contents):
            message = f"{edit.path} and another file of this change are one and the same, {file.path}"
            raise WriteFailed(message, "include it under one name only")
        _expect(file)
        contents[file] = edit.after
    return contents


def _digest(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _content(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None


def _expect(file: _File) -> None:
    """See that the file is still what was read; Changed."""
    try:
        content = _content(file.path)
    except OSError as error:
        raise _failed(file.path, error) from error
    if _digest(content) != file.before:
        what = "vanished" if content is None else "appeared" if file.before is None else "was changed"
        raise Changed(f"{file.path} {what} after it was read; nothing was written", "try again")


def _remove(path: Path) -> None:
    if os.path.lexists(path):  # a read-only file system would refuse even what there is nothing to do for
        path.unlink(missing_ok=True)


def _second_name(file: _File) -> None:
    _remove(file.old)
    try:
        os.link(file.path, file.old)
    except OSError:  # not every file system has links, and not everybody may link other people's files
        _create(file.old, Path(file.path).read_bytes(), file)


def _create(path: Path, content: bytes, file: _File) -> None:
    """A companion with this content, on the disk, with the rights of the file where there is one."""
    _remove(path)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
        out.write(content)
        out.flush()
        if file.before is None:
            os.fchmod(out.fileno(), 0o644)
        else:
            _copy_rights(file.path, out.fileno())
        os.fsync(out.fileno())


def _copy_rights(path: str, descriptor: int) -> None:
    was, now = os.stat(path), os.fstat(descriptor)
    if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
        os.fchown(descriptor, was.st_uid, was.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(was.st_mode))
    try:
        names = os.listxattr(path)
    except OSError:  # a file system without them
        return
    for name in names:
        with contextlib.suppress(OSError):  # some belong to the system alone
            os.setxattr(descriptor, name, os.getxattr(path, name))


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _failed(path: str, error: OSError) -> WriteFailed:
    remedy = _REMEDIES.get(error.errno or 0, "see that the disk and its file system are well")
    return WriteFailed(f"{path} cannot be written: {error.strerror or error}", remedy)
