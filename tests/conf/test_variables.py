"""Which variables nginx knows, as far as its configuration shows."""

from __future__ import annotations

import pytest

from controller.conf import tree, variables
from tests.doctor.site import CONF, Files

TEXT = """
http {
    map $host $tenant { default ${shard}; }
    geoip2 /db { $country_name names en; }
    server { location ~ "^/(?P<user>\\w+)/(?'page'\\w+)" { set $Level 1; } }
}
"""


def test_the_variables_of_a_text_are_named_once_each() -> None:
    assert variables.names("a$host-${uri}x$host$1") == ["host", "uri", "1"]


@pytest.mark.parametrize(
    "name", ["1", "Uri", "arg_a", "http_x", "tenant", "shard", "country_name", "user", "page", "level"]
)
def test_nginx_knows_its_own_variables_and_those_of_its_configuration(name: str) -> None:
    assert variables.known(name, tree.read(CONF, Files({CONF: TEXT})))


@pytest.mark.parametrize("name", ["nosuchvariable", "argx", "default", "db", "w"])
def test_it_knows_no_others(name: str) -> None:
    assert not variables.known(name, tree.read(CONF, Files({CONF: TEXT})))
