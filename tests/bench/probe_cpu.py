"""What probing costs: CPU and memory of a process that probes many servers, each once a second.

    python -m tests.bench.probe_cpu [SERVERS [SECONDS [TYPE]]]

The servers are listeners of one other process, whose CPU is not counted.
"""

from __future__ import annotations

import asyncio
import json
import resource
import selectors
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import IO, cast

import psutil

from controller.adapters.probe import NetProber
from controller.core.events import ProbeResult
from controller.core.model import Server
from controller.ports import Check, Target


@dataclass(frozen=True, slots=True)
class ProbeCost:
    """`cpu` is the share of one core (0.15 = 15 %), `rss` bytes, `rate` probes a second, `failed` of all `probes`."""

    servers: int
    seconds: float
    probes: int
    failed: int
    rate: float
    cpu: float
    rss: int


def measure(servers: int = 1000, seconds: float = 10.0, kind: str = "http") -> ProbeCost:
    """Probe `servers` listeners once a second for `seconds`, after 2 s to settle, in a process of its own; print it."""
    with _child("serve", str(servers)) as listeners, _child("probe", str(seconds), kind) as prober:
        try:
            ports = cast(IO[str], listeners.stdout).readline()
            out, _ = prober.communicate(ports, timeout=seconds + 60)
        finally:
            listeners.terminate()
            prober.kill()
    cost = ProbeCost(**json.loads(out))
    print(
        f"{cost.servers} servers, {cost.rate:.0f} {kind} probes/s: {cost.cpu:.1%} of a core "
        f"({cost.cpu / cost.rate * 1e6:.0f} us a probe), {cost.rss / 2**20:.0f} MiB, {cost.failed} failed"
    )
    return cost


def _child(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.bench.probe_cpu", *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _serve(count: int) -> None:
    """Listen on `count` ports, print them, and answer every request with a small 200."""
    _allow_files()
    selector = selectors.DefaultSelector()
    listeners = [socket.create_server(("127.0.0.1", 0), backlog=16) for _ in range(count)]
    for listener in listeners:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, "listener")
    print(*(listener.getsockname()[1] for listener in listeners), flush=True)
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
    while True:
        for key, _ in selector.select():
            sock = cast(socket.socket, key.fileobj)
            if key.data == "listener":
                connection, _ = sock.accept()
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ, "connection")
                continue
            if sock.recv(4096):
                sock.send(answer)
            selector.unregister(sock)
            sock.close()


async def _probe(ports: list[int], seconds: float, kind: str) -> ProbeCost:
    results: Counter[bool] = Counter()

    def count(result: ProbeResult) -> None:
        results[result.ok] += 1

    prober = NetProber(count)
    check = Check(type=kind, interval=1.0, timeout=1.0)
    addresses = {f"127.0.0.1:{port}": port for port in ports}
    prober.set_targets(
        {("bench", key): Target(Server(key, key, "127.0.0.1", port), check) for key, port in addresses.items()}
    )
    await asyncio.sleep(2)
    results.clear()
    cpu, began = time.process_time(), time.monotonic()
    await asyncio.sleep(seconds)
    cpu, took = time.process_time() - cpu, time.monotonic() - began
    probes, failed = results.total(), results[False]
    await prober.close()
    return ProbeCost(len(ports), took, probes, failed, probes / took, cpu / took, psutil.Process().memory_info().rss)


def _allow_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", count]:
            _serve(int(count))
        case ["probe", seconds, kind]:
            _allow_files()
            cost = asyncio.run(_probe([int(port) for port in sys.stdin.readline().split()], float(seconds), kind))
            print(json.dumps(asdict(cost)))
        case words:
            measure(*(convert(word) for convert, word in zip((int, float, str), words, strict=False)))
