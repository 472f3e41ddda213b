"""Instructions that a worker of nginx spends on one proxied request outside the kernel, counted by valgrind.

Unlike time they do not depend on the machine or on what else it does, so that a change of a few per cent can be seen.
The kernel's part, two thirds of the time, is the same for all rows and not in them.

    python -m tests.bench.plane_instructions [REQUESTS]
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.plane_cpu import BACKEND, BARE, WAYS, addresses, cookies, nginx_http, table, ways_table
from tests.support.nginx import Nginx, free_port, missing_parts

WARM = 2000  # requests until LuaJIT has compiled what it will
HOOK = 'balancer_by_lua_block {{ require("headgate").balance("{name}") }}'


class Counted(Nginx):
    """An nginx whose instructions are counted, one worker, which valgrind slows down some thirty times."""

    def command(self, *words: str) -> list[str]:
        out = f"--callgrind-out-file={self.prefix}/count.%p"
        counter = ["valgrind", "--tool=callgrind", out, "--smc-check=all"] if "daemon off;" in words else []
        return counter + super().command(*words)

    def workers(self) -> list[int]:
        """Under valgrind a worker's title is not its own."""
        return self.children()


@dataclass(frozen=True)
class Case:
    """What is counted: the http{} text that listens at `port`, a table for the Lua plane, cookies that are sent."""

    name: str
    http: str
    port: int
    table: dict[str, object] | None = None
    cookies: tuple[str, ...] = ("",)


def cases(backend: int) -> Iterator[Case]:
    """Native nginx, a hook that only sets the peer, the Lua plane, and each way of plane_cpu.py beside nginx's own."""
    ips = addresses(4)

    def case(name: str, hook: str, table: dict[str, object] | None, of: str = "app", sticky: bool = False) -> Case:
        port = free_port()
        sent = tuple(cookies(ips, backend)) if sticky else ("",)
        return Case(name, nginx_http(ips, backend, port, hook, of), port, table, sent)

    plain, ways = table(ips, backend), ways_table(ips, backend)
    yield case("native nginx", "", None)
    yield case("a hook that only sets the peer", BARE.format(ip=ips[0], port=backend), plain)
    yield case("Lua plane", HOOK.format(name="app"), plain)
    for number, way in enumerate(WAYS):
        of = f"way{number}"
        yield case(f"native nginx for {way.name}", way.native, None, of, way.sticky)
        yield case(way.name, HOOK.format(name=of), ways, of, way.sticky)


def spent(case: Case, requests: int) -> int:
    """The worker's instructions from its start to its end, with so many requests on one connection."""
    nginx = Counted(case.http, workers=1, plane=case.table is not None)
    if case.table is not None:
        nginx.snapshot.write_text(json.dumps(case.table))
    with nginx:
        (worker,) = nginx.workers()
        connection = http.client.HTTPConnection("127.0.0.1", case.port, timeout=60)
        for number in range(requests):
            cookie = case.cookies[number % len(case.cookies)]
            connection.request("GET", "/", headers={"Cookie": cookie} if cookie else {})
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b"ok")
        connection.close()
        nginx.stop()
        counted = (nginx.prefix / f"count.{worker}").read_text()
    found = re.search(r"^(?:totals|summary): (\d+)", counted, re.MULTILINE)
    assert found, counted[-500:]
    return int(found[1])


def main(requests: int = 10_000) -> None:
    """Print the rows as they come; half a minute each."""
    if reason := missing_parts() or ("" if shutil.which("valgrind") else "not installed: apt-get install valgrind"):
        raise SystemExit(reason)
    backend = free_port()
    with Nginx(BACKEND.format(port=backend), workers=1, plane=False):
        for case in cases(backend):
            each = (spent(case, WARM + requests) - spent(case, WARM)) / requests
            print(f"{case.name:58}{each:7.0f} instructions a request", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
