"""NginxFiles on real files, with a look-up of names that the tests own."""

import asyncio
import os
import re
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.adapters.nginx.files import SETTLED, DiskReader, NginxFiles, lookup
from controller.core.model import Group, Peer, Place, Server, State
from controller.core.policy import BalancePolicy, Policy, WarmUpPolicy
from controller.core.table import table
from controller.ports import ConfigError, NginxConfig
from tests.support.nginx import missing_parts

POLICY = Policy(warm_up=WarmUpPolicy(duration=7.0))


class Names:
    """A name server in memory; a name that is not in `known` does not resolve, one in `silent` never answers."""

    def __init__(self, **known: tuple[str, ...]) -> None:
        self.known = known
        self.silent: dict[str, asyncio.Event] = {}
        self.asked: list[str] = []

    async def __call__(self, host: str) -> tuple[str, ...]:
        self.asked.append(host)
        if host in self.silent:
            await self.silent[host].wait()
        if host not in self.known:
            raise OSError(-2, "Name or service not known")
        return self.known[host]


class House:
    """A configuration file and its source."""

    def __init__(self, folder: Path, names: Names) -> None:
        self.path = folder / "nginx.conf"
        self.policy = POLICY
        self.files = NginxFiles(str(self.path), lambda name: self.policy, lookup=names, lookup_timeout=0.2)

    def write(self, servers: str, more: str = "") -> None:
        hook = 'balancer_by_lua_block { require("headgate").balance("app") }'
        self.path.write_text(f"events {{}}\nhttp {{\nupstream app {{\n{servers}\n{hook}\n}}\n{more}\n}}")

    async def read(self, servers: str, more: str = "") -> NginxConfig:
        self.write(servers, more)
        return await self.files.read()


@pytest.fixture
def names() -> Names:
    return Names(app=("10.0.0.1", "10.0.0.2"))


@pytest.fixture
def house(tmp_path: Path, names: Names) -> House:
    return House(tmp_path, names)


async def test_literal_addresses_become_servers_under_the_address_as_written(house: House) -> None:
    config = await house.read("server 127.0.0.1:81 weight=3 max_conns=5;\nserver [::1] backup;\nserver unix:/a down;")
    place = str(house.path)
    assert config.upstreams[0].servers == (
        Server("127.0.0.1:81", "127.0.0.1:81", "127.0.0.1", 81, 3, max_conns=5, place=Place(place, 4)),
        Server("[::1]", "[::1]", "::1", 80, backup=True, place=Place(place, 5)),
        Server("unix:/a", "unix:/a", "unix:/a", 0, down=True, place=Place(place, 6)),
    )
    assert config.upstreams[0].policy == POLICY
    assert config.upstreams[0].place == Place(place, 3)
    assert (config.files, config.warnings) == ((place,), ())


async def test_a_name_becomes_one_server_for_each_address(house: House) -> None:
    config = await house.read("server app:82 weight=2;")
    assert [(each.key, each.address, each.ip, each.port, each.weight) for each in config.upstreams[0].servers] == [
        ("app:82@10.0.0.1", "app:82", "10.0.0.1", 82, 2),
        ("app:82@10.0.0.2", "app:82", "10.0.0.2", 82, 2),
    ]


async def test_names_are_followed_without_reading_the_file_again(house: House, names: Names) -> None:
    await house.read("server app:82;")
    house.path.unlink()
    assert await house.files.resolve_again() is None
    names.known["app"] = ("10.0.0.3",)
    config = await house.files.resolve_again()
    assert config is not None
    assert [each.ip for each in config.upstreams[0].servers] == ["10.0.0.3"]
    assert await house.files.resolve_again() is None


async def test_without_names_nothing_is_looked_up(house: House, names: Names) -> None:
    assert await house.files.resolve_again() is None
    await house.read("server 127.0.0.1;", "upstream other { server app; }")
    assert await house.files.resolve_again() is None
    assert names.asked == []


async def test_a_name_that_stops_resolving_keeps_its_addresses_and_is_told(house: House, names: Names) -> None:
    before = await house.read("server app:82;")
    addresses = names.known.pop("app")
    config = await house.files.resolve_again()
    assert config is not None
    assert config.upstreams == before.upstreams
    assert config.warnings == (
        f"{house.path}:4: app does not resolve (Name or service not known); going on with 10.0.0.1, 10.0.0.2",
    )
    names.known["app"] = addresses
    assert await house.files.resolve_again() == before


async def test_an_upstream_with_a_name_that_never_resolved_is_left_to_nginx(house: House, names: Names) -> None:
    config = await house.read("server 127.0.0.1:81;\nserver gone:82;")
    assert config.upstreams == ()
    assert config.warnings == (
        f"{house.path}:5: gone does not resolve (Name or service not known); app is left to nginx",
    )
    names.known["gone"] = ("10.0.0.9",)
    config = await house.files.resolve_again()
    assert [each.ip for each in config.upstreams[0].servers] == ["127.0.0.1", "10.0.0.9"]


async def test_a_new_name_that_does_not_resolve_is_an_error_where_the_upstream_is_managed_already(
    house: House, names: Names
) -> None:
    """nginx refuses such a file: the old model stays, with its peers and changes."""
    await house.read("server 127.0.0.1:81;")
    house.write("server 127.0.0.1:81;\nserver typo:82;")
    with pytest.raises(ConfigError, match=rf"{house.path}:5: typo does not resolve \(Name or service not known\)"):
        await house.files.read()
    assert await house.files.resolve_again() is None
    names.known["typo"] = ("10.0.0.9",)
    config = await house.files.resolve_again()
    assert config is not None
    assert [each.ip for each in config.upstreams[0].servers] == ["127.0.0.1", "10.0.0.9"]


async def test_without_a_name_server_the_addresses_of_an_earlier_life_serve(house: House, names: Names) -> None:
    names.known.clear()
    house.files.remember({"app:82": ("10.0.0.1", "10.0.0.2"), "other": ("10.0.0.3",)})
    config = await house.read("server app:82;")
    assert [each.key for each in config.upstreams[0].servers] == ["app:82@10.0.0.1", "app:82@10.0.0.2"]
    assert "app does not resolve (Name or service not known); going on with 10.0.0.1, 10.0.0.2" in config.warnings[0]


async def test_look_ups_that_hang_keep_nothing_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = threading.Event()

    def hang(*_: object, **__: object) -> list[object]:
        silent.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    waiting = [asyncio.ensure_future(lookup(f"host-{number}")) for number in range(64)]
    try:
        async with asyncio.timeout(20):
            await asyncio.to_thread(lambda: None)
        assert not any(each.done() for each in waiting)
    finally:
        silent.set()
        assert await asyncio.gather(*waiting) == [()] * 64


async def test_a_name_server_that_does_not_answer_is_not_asked_twice_at_once(house: House, names: Names) -> None:
    names.silent["app"] = asyncio.Event()
    config = await house.read("server app;")
    assert "no answer within 0.2 s" in config.warnings[0]
    assert await house.files.resolve_again() is None
    assert names.asked == ["app"]
    names.silent["app"].set()
    config = await house.files.resolve_again()
    assert len(config.upstreams[0].servers) == 2
    assert names.asked == ["app"]


async def test_lines_of_one_address_are_one_server_with_their_weights_added(house: House) -> None:
    config = await house.read(
        "server 127.0.0.1 weight=2 max_conns=3;\nserver 127.0.0.1:80 max_conns=4;\n"
        "server 127.0.0.1:80 weight=9 down;\nserver 127.0.0.1:80 weight=9 backup;\nserver 127.0.0.1:81;"
    )
    first, second = config.upstreams[0].servers
    assert (first.key, first.weight, first.max_conns, first.down, first.backup) == ("127.0.0.1", 3, 7, False, False)
    assert (second.key, second.weight) == ("127.0.0.1:81", 1)
    assert "127.0.0.1 stands 4 times in app; taken as one" in config.warnings[0]


@pytest.mark.parametrize(
    ("directive", "fields"),
    [
        ("least_conn", {"method": "least_conn"}),
        ("ip_hash", {"method": "ip_hash"}),
        ("hash $uri", {"method": "hash", "key": "$uri", "consistent": False}),
        ('hash "a $uri" consistent', {"method": "hash", "key": "a $uri", "consistent": True}),
        ("random", {"method": "random", "two": False}),
        ("random two least_conn", {"method": "random", "two": True}),
    ],
)
async def test_the_method_goes_into_the_table_and_where_weights_place_clients_nothing_warms_up(
    house: House, directive: str, fields: dict[str, object]
) -> None:
    (upstream,) = (await house.read(f"{directive}; server 127.0.0.1; server app:82;")).upstreams
    peers = {server.key: Peer(incumbent=True) for server in upstream.servers}
    written: Any = table(State(groups={"app": Group(upstream, peers)}), 0.0)["upstreams"]
    entry = written["app"]
    servers = entry.pop("servers")
    del entry["outlier"], entry["quarantine_ms"]
    assert entry == {"fail_open": False, **fields}
    assert [server.get("address") for server in servers] == [None, "app:82", "app:82"]
    duration = 0.0 if "hash" in directive else POLICY.warm_up.duration
    assert upstream.policy == replace(POLICY, warm_up=replace(POLICY.warm_up, duration=duration))


@pytest.mark.parametrize(
    ("directive", "balance", "duration"),
    [
        ("", BalancePolicy("hash", "$uri"), 0.0),
        ("", BalancePolicy("hash", "$uri", bound=1.25), 7.0),
        ("hash $uri;", BalancePolicy("round_robin"), 7.0),
        ("hash $uri consistent;", BalancePolicy(bound=1.25), 7.0),
        ("hash $uri;", BalancePolicy(bound=1.25), 0.0),
    ],
)
async def test_the_method_of_the_settings_decides_whether_servers_warm_up(
    house: House, directive: str, balance: BalancePolicy, duration: float
) -> None:
    house.policy = replace(POLICY, balance=balance)
    (upstream,) = (await house.read(f"{directive} server 127.0.0.1; server app:82;")).upstreams
    assert upstream.policy.warm_up.duration == duration


async def test_upstreams_without_a_hook_are_named_and_those_with_an_obstacle_are_explained(house: House) -> None:
    hook = 'balancer_by_lua_block { require("headgate").balance("least") }'
    more = f"upstream plain {{ server a; }}\nupstream least {{ sticky x; server b; {hook} }}"
    config = await house.read("server 127.0.0.1;", more)
    assert [each.name for each in config.upstreams] == ["app"]
    assert config.unhooked == ("plain",)
    assert config.warnings[0].startswith(f'{house.path}:8: upstream "least" is balanced by sticky x')


async def test_a_broken_file_is_a_config_error_that_names_file_and_line(house: House) -> None:
    await house.read("server app;")
    house.write("server 127.0.0.1")
    with pytest.raises(ConfigError, match=rf"in {house.path}:5 \(.*nginx -t"):
        await house.files.read()
    assert await house.files.resolve_again() is None


async def test_names_are_looked_up_as_this_machine_does(tmp_path: Path) -> None:
    assert "127.0.0.1" in await lookup("localhost")
    too_long = "a" * 64
    hook = 'balancer_by_lua_block { require("headgate").balance("app") }'
    path = tmp_path / "nginx.conf"
    path.write_text(f"http {{ upstream app {{ server {too_long}; {hook} }} }}")
    config = await NginxFiles(str(path), lambda name: POLICY).read()
    assert config.upstreams == ()
    assert f"{path}:1: {too_long} does not resolve" in config.warnings[0]


@pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "")
@pytest.mark.parametrize(
    "pattern",
    [
        "c/*.conf",
        "c/*",
        "c/.*.conf",
        "c/[[:digit:]]*.conf",
        "c/[^_]*.conf",
        "c/[!_]*.conf",
        r"c/a\*.conf",
        "c/[a-b]?.conf",
        "*/1.conf",
        "c/**/1.conf",
        "c/[.conf",
        "c/[]]*.conf",
        "c/{1,ab}*.conf",
        "c/é*.conf",
        "no/*.conf",
    ],
)
def test_an_include_matches_what_it_matches_for_nginx(tmp_path: Path, pattern: str) -> None:
    names = ("1", "_2", ".x", "a*", "ab", "B", "[", "]x", "{1,ab}", "é", "a\\*")
    (tmp_path / "c" / "d").mkdir(parents=True)
    for name in (*(f"c/{name}.conf" for name in names), "c/d/1.conf"):
        (tmp_path / name).write_text("# nothing\n")
    (tmp_path / "c" / "d").rename(tmp_path / "d")
    conf = tmp_path / "nginx.conf"
    conf.write_text(f"pid x.pid; events {{}}\ninclude '{pattern.replace(chr(92), chr(92) * 2)}';\n")
    done = subprocess.run(
        ["nginx", "-T", "-q", "-p", str(tmp_path), "-c", str(conf), "-e", "stderr"], capture_output=True, check=False
    )
    read = re.findall(r"^# configuration file (.*):$", done.stdout.decode(), re.MULTILINE)
    assert done.returncode == 0, done.stderr
    assert DiskReader().glob(f"{tmp_path}/{pattern}") == read[1:]


def test_a_stamp_stands_for_the_content_of_a_file_that_was_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, link = tmp_path / "a.conf", tmp_path / "l.conf"
    file.write_text("one")
    link.symlink_to("a.conf")
    assert DiskReader().look(str(link)) == (str(file.resolve()), None), "it was written just now"
    assert DiskReader().look(f"{tmp_path}/./a.conf").real == str(file.resolve())
    assert DiskReader().look(f"{tmp_path}/gone.conf").stamp is None
    later = time.time() + 2 * SETTLED
    monkeypatch.setattr("controller.adapters.nginx.files.time.time", lambda: later)
    look = DiskReader().look(str(link))
    assert look.stamp is not None
    assert look == DiskReader().look(str(file))
    times = file.stat()
    other = tmp_path / "new"
    other.write_text("two")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.rename(file)
    assert DiskReader().look(str(file)) != look


async def test_without_a_hook_a_name_that_is_no_utf_8_is_left_to_nginx_and_said(tmp_path: Path) -> None:
    conf = tmp_path / "nginx.conf"
    conf.write_bytes(b"http { upstream app { server unix:/tmp/caf\xe9.sock; } upstream caf\xe9 { server 10.0.0.1; } }")
    config = await NginxFiles(str(conf), lambda name: POLICY, managed=lambda block: block.name == "app").read()
    assert config.upstreams == ()
    (warning,) = config.warnings
    assert warning.endswith("cannot manage it; rename that socket (not managed)")
    assert config.unhooked == ("caf\\udce9",)
