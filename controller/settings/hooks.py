"""`[*.hooks]`: what is called around a change, and the calls that each service registry wants."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import quote

from pydantic import Field, model_validator

from controller.core.policy import Hook, HookPolicy
from controller.settings.values import (
    HeaderName,
    HookText,
    HookUrl,
    PositiveDuration,
    Statuses,
    Table,
    Template,
)

OnFailure = Literal["abort", "proceed"]
Tries = Annotated[int, Field(ge=1, le=100)]


class HookTable(Table):
    """[[*.hooks.before_drain]], [[*.hooks.after_drain]], [[*.hooks.after_up]]: a request to `url`, or a `command`."""

    url: HookUrl | None = None
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "POST"
    headers: dict[HeaderName, HookText] = {}  # noqa: RUF012 - pydantic copies it
    body: HookText = ""
    statuses: Statuses = ((200, 299),)
    tries: Tries = 3
    command: Annotated[tuple[Template, ...], Field(strict=False)] = ()
    timeout: PositiveDuration = 5.0
    on_failure: OnFailure = "abort"

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.url) == bool(self.command):
            raise ValueError("a hook is a request or a command; write either url or command")
        if self.command:
            for key in sorted(self.model_fields_set & {"method", "headers", "body", "statuses", "tries"}):
                raise ValueError(f"{key} means nothing to a command; take it out")
            if any("{env:" in word or "{file:" in word for word in self.command):
                raise ValueError(
                    "anybody can see the arguments of a command; let it read the secret itself, "
                    "from a file or from the environment, which is the daemon's"
                )
        return self

    def hook(self) -> Hook:
        """This call as the core takes it."""
        return Hook(
            ((self.method, self.url),) if self.url else (),
            self.headers,
            self.body,
            self.statuses,
            self.command,
            self.tries,
            self.timeout,
            self.on_failure,
        )


class RegistryTable(Table):
    """[*.hooks.registry]: the service registry that a server leaves before it drains, and returns to when it is up."""

    preset: Literal["", "spring-actuator", "eureka", "consul", "nacos"] = ""
    url: HookUrl | None = None
    service: Annotated[Template, Field(min_length=1)] | None = None
    instance: Annotated[Template, Field(min_length=1)] | None = None
    namespace: str = "public"
    group: str = "DEFAULT_GROUP"
    cluster: str = "DEFAULT"
    headers: dict[HeaderName, HookText] = {}  # noqa: RUF012 - pydantic copies it
    tries: Tries = 3
    return_tries: Tries = 30
    timeout: PositiveDuration = 5.0
    on_failure: OnFailure = "abort"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = ", ".join(f'"{name}"' for name in _URLS)
        if not self.preset and self.model_fields_set & {"url", "service", "instance"}:
            raise ValueError(f"which registry it is does not stand there; write preset = one of {names}")
        for key, belongs in _BELONGS.items():
            given = key in self.model_fields_set
            if key in ("service", "instance") and self.preset in belongs and not given:
                raise ValueError(f'preset = "{self.preset}" needs {key}; write what the registry calls it')
            if given and self.preset and self.preset not in belongs:
                raise ValueError(f'{key} means nothing to preset = "{self.preset}"; take it out')
        return self

    def hook(self, back: bool) -> tuple[Hook, ...]:
        """What takes a server out of the registry, or brings it `back`; nothing without a preset."""
        if not self.preset:
            return ()
        actuator = {"Content-Type": "application/vnd.spring-boot.actuator.v2+json"}
        return (
            Hook(
                self._requests(self.url or _URLS[self.preset], back),
                {**actuator, **self.headers} if self.preset == "spring-actuator" else self.headers,
                tries=self.return_tries if back else self.tries,
                timeout=self.timeout,
                on_failure=self.on_failure,
            ),
        )

    def _requests(self, url: str, back: bool) -> tuple[tuple[str, str], ...]:
        url = url.rstrip("/")
        service, instance = _quoted(self.service or ""), _quoted(self.instance or "")
        match self.preset:
            case "spring-actuator":
                # Eureka and Nacos know DOWN, Consul only OUT_OF_SERVICE; Nacos accepts that one too, and ignores it.
                return tuple(
                    ("POST", f"{url}/{path}?status={status}")
                    for status in (("UP",) if back else ("DOWN", "OUT_OF_SERVICE"))
                    for path in ("serviceregistry", "service-registry")
                )
            case "eureka":
                status = f"{url}/apps/{service}/{instance}/status?value="
                return (("DELETE", f"{status}UP") if back else ("PUT", f"{status}OUT_OF_SERVICE"),)
            case "consul":
                query = "enable=false" if back else "enable=true&reason=headgate"
                return (("PUT", f"{url}/v1/agent/service/maintenance/{service}?{query}"),)
            case _:
                enabled, group = "true" if back else "false", _quoted(self.group)
                where = (
                    f"ip={{host}}&port={{port}}&clusterName={_quoted(self.cluster)}"
                    f"&namespaceId={_quoted(self.namespace)}&enabled={enabled}"
                )
                return (
                    ("PUT", f"{url}/v3/admin/ns/instance/partial?serviceName={service}&groupName={group}&{where}"),
                    ("PATCH", f"{url}/v1/ns/instance?serviceName={group}%40%40{service}&{where}"),
                )


_URLS = {
    "spring-actuator": "http://{host}:{port}/actuator",
    "eureka": "http://127.0.0.1:8761/eureka",
    "consul": "http://127.0.0.1:8500",
    "nacos": "http://127.0.0.1:8848/nacos",
}
_BELONGS = {
    "service": ("eureka", "consul", "nacos"),
    "instance": ("eureka",),
    **dict.fromkeys(("namespace", "group", "cluster"), ("nacos",)),
}


def _quoted(text: str) -> str:
    """As a part of a URL, the placeholders as they are."""
    return quote(text, safe="{}:")


class HooksTable(Table):
    """[*.hooks]: what is called before a server drains, when it is empty, and when its probes have passed again."""

    before_drain: Annotated[tuple[HookTable, ...], Field(strict=False)] = ()
    after_drain: Annotated[tuple[HookTable, ...], Field(strict=False)] = ()
    after_up: Annotated[tuple[HookTable, ...], Field(strict=False)] = ()
    register_at: Literal["up", "warm"] = "up"
    registry: RegistryTable = RegistryTable()

    def policy(self) -> HookPolicy:
        """These settings as the core takes them: the registry is left first, and returned to last."""
        return HookPolicy(
            (*self.registry.hook(back=False), *(each.hook() for each in self.before_drain)),
            tuple(each.hook() for each in self.after_drain),
            (*(each.hook() for each in self.after_up), *self.registry.hook(back=True)),
            self.register_at,
        )
