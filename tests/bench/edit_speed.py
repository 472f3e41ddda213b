"""One edit in a configuration of 3 MB and 10,000 server blocks, as one file and as many, without `nginx -t`.

    python -m tests.bench.edit_speed

The figures: start-up with parse <= 3 s, one edit with its proof <= 50 ms, and no full parse.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from controller.conf.edit import AddHook, AddServer, Edit, RemoveServer, SetParameter, plan
from controller.conf.index import Index
from controller.conf.parse import parse

SERVERS, UPSTREAMS = 10_000, 1_000
MAIN = "/etc/nginx/nginx.conf"
SITE = """    server {{
        listen 80;
        server_name host{n}.example www.host{n}.example;  # site {n}
        access_log /var/log/nginx/host{n}.log combined;
        location / {{
            proxy_pass http://app{of};
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For "${{remote_addr}}";
        }}
    }}
"""
APP = """    upstream app{n} {{
        server 127.0.0.1:8001 weight=5;
        server 127.0.0.1:8002;
        keepalive 16;
    }}
"""


class Reader:
    """Files in memory, and how many of them were read."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.reads = 0

    def read(self, path: str) -> bytes:
        self.reads += 1
        return self.files[path]

    def glob(self, pattern: str) -> list[str]:
        return sorted(path for path in self.files if os.path.dirname(path) == os.path.dirname(pattern))


@dataclass(frozen=True, slots=True)
class Figures:
    """In milliseconds: start-up (parse and index), the index anew after somebody edited a file, and our own edits.

    `reads` is how many files our edits read: none.
    """

    megabytes: float
    files: int
    start_up: float
    again: float
    edits: dict[str, float]
    reads: int


def tree(layout: str) -> Reader:
    """`one file`, or `many files`: a file for each server block and for each upstream."""
    sites = [SITE.format(n=n, of=n % UPSTREAMS) for n in range(SERVERS)]
    apps = [APP.format(n=n) for n in range(UPSTREAMS)]
    if layout == "one file":
        return Reader({MAIN: f"events {{}}\nhttp {{\n{''.join(apps)}{''.join(sites)}}}\n".encode()})
    files = {f"/etc/nginx/sites/{n:05}.conf": text for n, text in enumerate(sites)}
    files |= {f"/etc/nginx/apps/{n:04}.conf": text for n, text in enumerate(apps)}
    files[MAIN] = "events {}\nhttp {\n    include apps/*.conf;\n    include sites/*.conf;\n}\n"
    return Reader({path: text.encode() for path, text in files.items()})


def kinds() -> Iterator[tuple[str, list[Edit]]]:
    """What is timed: each edit of one upstream in the middle, and of 50 at once."""
    yield "weight", [SetParameter("app500", "127.0.0.1:8001", "weight", "7")]
    yield "down", [SetParameter("app500", "127.0.0.1:8002", "down", "")]
    yield "add server", [AddServer("app500", "127.0.0.1:8003", {"weight": "2"})]
    yield "remove server", [RemoveServer("app500", "127.0.0.1:8003")]
    yield "hook", [AddHook("app500")]
    yield "50 weights", [SetParameter(f"app{n}", "127.0.0.1:8001", "weight", "9") for n in range(0, UPSTREAMS, 20)]


def measure(layout: str) -> Figures:
    """Build, read and edit; every edit is taken into the index, and the next one is made on it."""
    reader = tree(layout)
    size = sum(map(len, reader.files.values())) / 1e6
    began = time.perf_counter()
    parse(MAIN, reader)
    index = Index(MAIN, reader)
    ready = time.perf_counter()
    edits: dict[str, float] = {}
    already = reader.reads
    for kind, wanted in kinds():
        start = time.perf_counter()
        made = plan(index, wanted)
        for each in made:
            index.take(each.path, each.after, each.splices)
        edits[kind] = 1e3 * (time.perf_counter() - start)
        reader.files |= {each.path: each.after for each in made}
    reads = reader.reads - already
    path = next(path for path, data in reader.files.items() if b"upstream app700 " in data)
    reader.files[path] = reader.files[path].replace(b"keepalive 16", b"keepalive 8")
    start = time.perf_counter()
    Index(MAIN, reader, index)
    again = 1e3 * (time.perf_counter() - start)
    return Figures(size, len(reader.files), 1e3 * (ready - began), again, edits, reads)


if __name__ == "__main__":
    for layout in ("one file", "many files"):
        got = measure(layout)
        print(f"{layout}: {got.megabytes:.1f} MB in {got.files} files, {SERVERS} server blocks")
        print(f"  start-up {got.start_up:6.0f} ms (at most 3000), index anew after a person's edit {got.again:.0f} ms")
        for kind, passed in got.edits.items():
            print(f"  {kind:14} {passed:6.1f} ms (at most 50)")
        print(f"  files read for these edits: {got.reads}")
