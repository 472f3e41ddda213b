"""One edit in a configuration of 3 MB and 10,000 server blocks, as one file and as many, without `nginx -t`.

    python -m tests.bench.edit_speed

The figures: start-up with parse <= 3 s, one edit with its proof <= 50 ms, and no full parse. Measured is what the
reload plane does for a table (`ReloadPlane._planned` and what follows it), on files of this machine's disk.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controller.adapters.nginx.files import SETTLED, DiskReader
from controller.adapters.nginx.lines import Table, planned
from controller.conf.edit import SetParameter, plan
from controller.conf.index import Index
from controller.conf.ledger import Ledger
from controller.conf.parse import parse

SERVERS, UPSTREAMS = 10_000, 1_000
KINDS = ("a drain", "50 weights")
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


class Reader(DiskReader):
    """Files of this machine, and how many of them were read."""

    reads = 0

    def read(self, path: str) -> bytes:
        Reader.reads += 1
        return super().read(path)


@dataclass(frozen=True, slots=True)
class Figures:
    """Milliseconds of processor time: start-up (parse and index), what follows an edit by hand, and our own edits.

    `again` is what a data plane does first after somebody edited a file. `alone` is one edit by a command of its own,
    which knows no index yet and reads all files. `edits` is what the reload plane does for a table: look whether
    anything has changed, plan, prove, and follow the edit; `reads` is the most files that one of these has read.
    """

    megabytes: float
    files: int
    start_up: float
    again: float
    alone: float
    edits: dict[str, float]
    reads: int


def write(layout: str, directory: Path) -> Path:
    """`one file`, or `many files`: a file for each server block and for each upstream; the main one."""
    sites = [SITE.format(n=n, of=n % UPSTREAMS) for n in range(SERVERS)]
    apps = [APP.format(n=n) for n in range(UPSTREAMS)]
    main = directory / "nginx.conf"
    if layout == "one file":
        main.write_text(f"events {{}}\nhttp {{\n{''.join(apps)}{''.join(sites)}}}\n")
        return main
    for name, texts in (("sites", sites), ("apps", apps)):
        (directory / name).mkdir()
        for n, text in enumerate(texts):
            (directory / name / f"{n:05}.conf").write_text(text)
    main.write_text("events {}\nhttp {\n    include apps/*.conf;\n    include sites/*.conf;\n}\n")
    return main


def kinds() -> Iterator[tuple[str, Table]]:
    """What is timed: tables that change one upstream in the middle, and 50 at once, and take it back."""
    many = [f"app{n}" for n in range(0, UPSTREAMS, 20)]
    drain, weights = KINDS
    for kind, names, changed in (
        (drain, ["app500"], upstream(("up", "drain"), 5.0)),
        (weights, many, upstream(("up", "up"), 7.0)),
    ):
        yield kind, table(dict.fromkeys(names, changed))
        yield f"{kind} back", table(dict.fromkeys(names, upstream(("up", "up"), 5.0)))


def upstream(states: tuple[str, str], weight: float) -> dict[str, Any]:
    """An upstream as a table has it, with these states of its servers and the first one's weight."""
    servers = [
        {"key": f"127.0.0.1:{port}", "ip": "127.0.0.1", "port": port, "weight": w, "state": state, "backup": False}
        for port, w, state in ((8001, weight, states[0]), (8002, 1.0, states[1]))
    ]
    return {"method": "round_robin", "fail_open": False, "servers": servers}


def table(upstreams: dict[str, Any]) -> Table:
    """A routing table."""
    return {"format": 1, "revision": 1, "upstreams": upstreams}


def measure(layout: str) -> Figures:
    """Write, read and edit; every edit lies on the disk before the next one is made, as in the product."""
    with tempfile.TemporaryDirectory(prefix="headgate-edits-") as directory:
        main = write(layout, Path(directory))
        paths = [path for path in Path(directory).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in paths) / 1e6
        while time.time() - max(path.stat().st_ctime for path in paths) <= SETTLED:
            time.sleep(0.1)
        began = time.process_time()
        parse(str(main), DiskReader())
        index = Index(str(main), DiskReader())
        start_up = 1e3 * (time.process_time() - began)
        began = time.process_time()
        plan(Index(str(main), DiskReader()), [SetParameter("app500", "127.0.0.1:8001", "weight", "7")])
        alone = 1e3 * (time.process_time() - began)
        edits: dict[str, float] = {}
        reads, ledger = 0, Ledger()
        for kind, wanted in kinds():
            Reader.reads, began = 0, time.process_time()
            index = index.current(Reader())
            made = planned(index, wanted, {}, ledger)
            passed = time.process_time() - began
            for each in made.files:
                Path(each.path).write_bytes(each.after)
            began = time.process_time()
            for each in made.files:
                index.take(each.path, each.after, each.splices)
            edits[kind] = 1e3 * (passed + time.process_time() - began)
            ledger, reads = made.ledger, max(reads, Reader.reads)
            assert made.files, "it is an edit"
        path = next(path for path in paths if b"upstream app700 " in path.read_bytes())
        path.write_bytes(path.read_bytes().replace(b"keepalive 16", b"keepalive 8"))
        began = time.process_time()
        index.current(DiskReader())
        again = 1e3 * (time.process_time() - began)
    return Figures(size, len(paths), start_up, again, alone, edits, reads)


if __name__ == "__main__":
    for layout in ("one file", "many files"):
        got = measure(layout)
        print(f"{layout}: {got.megabytes:.1f} MB in {got.files} files, {SERVERS} server blocks")
        print(f"  start-up {got.start_up:6.0f} ms (at most 3000), index anew after a person's edit {got.again:.0f} ms")
        print(f"  one edit by a command of its own, which reads all files {got.alone:.0f} ms")
        for kind, passed in got.edits.items():
            print(f"  {kind:15} {passed:6.1f} ms (at most 50)")
        print(f"  files read for one of these tables: at most {got.reads}")
