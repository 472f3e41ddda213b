"""A file before and after, and the unified diff between the two without a look at the rest of the file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import unified_diff

from controller.conf.index import Splice

_CONTEXT = 3


@dataclass(frozen=True, slots=True)
class FileEdit:
    """What a file was, what it is to be, and the splices between the two, in order."""

    path: str
    before: bytes
    after: bytes
    splices: tuple[Splice, ...]


def diff(edit: FileEdit) -> str:
    """The change as a unified diff; bytes that are no UTF-8 are shown as escapes."""
    out = [f"--- {edit.path}\n", f"+++ {edit.path}\n"]
    for (start, end), (new_start, new_end) in _windows(edit):
        old, new = edit.before[start:end], edit.after[new_start:new_end]
        above, new_above = edit.before.count(b"\n", 0, start), edit.after.count(b"\n", 0, new_start)
        for line in [*unified_diff(_shown(old), _shown(new), n=_CONTEXT)][2:]:
            if header := re.fullmatch(r"@@ -(\d+)(.*) \+(\d+)(.*) @@\n", line):
                line = f"@@ -{int(header[1]) + above}{header[2]} +{int(header[3]) + new_above}{header[4]} @@\n"
            out.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    return "".join(out)


def _windows(edit: FileEdit) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The whole lines around the splices, before and after."""
    windows: list[tuple[tuple[int, int], tuple[int, int]]] = []
    moved = 0
    for splice in edit.splices:
        start, end = splice.start, splice.end
        for _ in range(_CONTEXT + 1):
            start = edit.before.rfind(b"\n", 0, max(start - 1, 0)) + 1
        for _ in range(_CONTEXT + 2):
            end = edit.before.find(b"\n", end) + 1 or len(edit.before)
        new_start = start + moved
        moved += len(splice.text) - (splice.end - splice.start)
        if windows and start <= windows[-1][0][1]:
            (start, last), (new_start, _) = windows.pop()
            end = max(end, last)
        windows.append(((start, end), (new_start, end + moved)))
    return windows


def _shown(data: bytes) -> list[str]:
    return [line.decode("utf-8", "backslashreplace") for line in re.findall(rb"[^\n]*\n|[^\n]+", data)]
