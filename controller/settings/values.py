"""What a single value of headgate.toml must look like, and how it is read: durations, shares, paths, statuses, URLs."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

SHORTEST, LONGEST = 0.001, 315_360_000.0  # seconds: nginx is told milliseconds, as whole numbers


class Table(BaseModel):
    """A table of headgate.toml: nothing unknown in it, and no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _duration(value: object) -> object:
    """Seconds of `2s`, `500ms`, `2m`, `1h` or a number."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(ms|s|m|h|)", str(value))
    if not match:
        raise ValueError(f'{value!r} is no duration; write "2s", "500ms", "2m", "1h" or a number of seconds')
    seconds = float(match[1]) * {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    if seconds and not SHORTEST <= seconds <= LONGEST:
        raise ValueError(
            f"{match[0][:40]!r} is out of range; write 1 ms to 10 years ({LONGEST / 3600:.0f}h), or 0 for none"
        )
    return seconds


def _share(value: object) -> object:
    """The fraction that `10%` or `0.1` is."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(%|)", str(value))
    if not match or isinstance(value, bool):
        raise ValueError(f'{value!r} is no percentage; write "10%" or 0.1')
    share = float(match[1]) / (100 if match[2] else 1)
    if share > 1:
        raise ValueError(f'{value!r} is more than the whole; write "{match[1]}%" or at most 1.0')
    return share


def _statuses(value: object) -> object:
    """Inclusive ranges of `[200, "300-399"]`."""
    ranges = []
    for each in value if isinstance(value, list) else [value]:
        match = re.fullmatch(r"([1-5][0-9]{2})(?:-([1-5][0-9]{2}))?", str(each))
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise ValueError(f'{each!r} is no HTTP status or range; write [200, "300-399"]')
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return tuple(ranges)


def _absolute(path: str) -> str:
    if not os.path.isabs(path):
        raise ValueError(f'{path!r} is not an absolute path; begin it with "/"')
    return path


def _template(text: str) -> str:
    for name in re.findall(r"\{(\w*)\}", text):
        if name not in ("upstream", "address", "host", "port"):
            raise ValueError(
                f"{{{name}}} is no placeholder; there are {{upstream}}, {{address}}, {{host}} and {{port}}"
            )
    return text


def _readable(path: str) -> str:
    if not os.access(_absolute(path), os.R_OK):
        raise ValueError(f"{path!r} does not exist or cannot be read; create it or correct the path")
    return path


def _url_path(path: str) -> str:
    if not re.fullmatch(r"/[!-~]*", path):
        raise ValueError(f'{path!r} is no path of a URL; begin it with "/" and encode blanks')
    return path


def _one_line(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError(f"{text!r} is no host name; take out blanks and control characters")
    return text


def _header(text: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:: *[ -~]+)?", text):
        raise ValueError(f'{text!r} is no header; write "Name", or "Name: part of its value"')
    return text


def _token(text: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]*", text):
        raise ValueError(f"{text!r} is no name of a cookie; use letters, digits, - and _")
    return text


def _cookie_path(path: str) -> str:
    if ";" in _url_path(path):
        raise ValueError(f'{path!r} would end at ";" in a cookie; leave ";" out')
    return path


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[!-~]+", text):
        raise ValueError(f'{text!r} is no URL; begin it with "http://" or "https://"')
    return text


def _hook_text(text: str) -> str:
    for name in re.findall(r"\{(\w+(?::[^{}\s\"']*)?)\}", text):
        if not re.fullmatch(r"upstream|address|host|port|env:\w+|file:/.+", name):
            raise ValueError(
                f"{{{name}}} is no placeholder; there are {{upstream}}, {{address}}, {{host}}, {{port}}, {{env:NAME}} "
                "and {file:/path}"
            )
    return text


def _hook_url(url: str) -> str:
    if not re.fullmatch(r"https?://[!-~]+", url):  # not shown: a URL may hold a secret
        raise ValueError('this is no URL; begin it with "http://" or "https://", and encode blanks')
    return _hook_text(url)


def _header_name(name: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError(f"{name!r} is no name of a header; use letters, digits and -")
    return name


def _variables(text: str) -> str:
    if text and "$" not in text:
        raise ValueError(f'{text!r} is the same for every request; write a variable of nginx, such as "$remote_addr"')
    for name in re.findall(r"\$\{?(\w*)", text):
        if not name:
            raise ValueError(f'{text!r} has a "$" without a name; write "$name" or "${{name}}"')
    return text


def _store(url: str) -> str:
    if not url.startswith("sqlite:////"):
        raise ValueError(
            f'{url!r} is no store; write "sqlite:///" and an absolute path, "sqlite:////var/lib/headgate/state.db"'
        )
    return url


def _listen(value: str) -> str:
    if value:
        host, _, port = value.rpartition(":")
        if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
            raise ValueError(f'{value!r} is no address to listen on; write "127.0.0.1:9470", or "" for none')
    return value


Duration = Annotated[float, BeforeValidator(_duration)]
PositiveDuration = Annotated[Duration, Field(gt=0)]
Share = Annotated[float, BeforeValidator(_share)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]
Template = Annotated[str, AfterValidator(_template)]
TemplatePath = Annotated[AbsolutePath, AfterValidator(_template)]
ReadableFile = Annotated[str, AfterValidator(_readable)]
HostName = Annotated[str, AfterValidator(_one_line)]
Statuses = Annotated[tuple[tuple[int, int], ...], BeforeValidator(_statuses), Field(min_length=1)]
UrlPath = Annotated[str, AfterValidator(_url_path)]
Header = Annotated[str, AfterValidator(_header)]
Url = Annotated[str, AfterValidator(_url)]
HookText = Annotated[str, AfterValidator(_hook_text)]
HookUrl = Annotated[str, AfterValidator(_hook_url)]
HeaderName = Annotated[str, AfterValidator(_header_name)]
Variables = Annotated[str, AfterValidator(_variables)]
CookiePath = Annotated[str, AfterValidator(_cookie_path)]
CookieName = Annotated[str, AfterValidator(_token)]
StoreUrl = Annotated[str, AfterValidator(_store)]
Listen = Annotated[str, AfterValidator(_listen)]
