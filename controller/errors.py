"""The exception tree. Every message says place and remedy.

    HeadgateError
    ├── SettingsError       headgate.toml: names the key
    ├── ApiError            the daemon answered with the one error shape
    ├── DaemonUnreachable   no daemon at the socket
    ├── (controller.ports)  PlaneUnreachable, PlaneRefused, ProcessError, HookError, ConfigError,
    │                       StoreError
    ├── (api/serve.py)      ListenError
    ├── (nginx/writer.py)   Changed, CheckFailed, WriteFailed
    ├── (nginx/verify.py)   ReloadFailed
    ├── (nginx/check.py)    NginxMissing
    ├── (adopt.py)          CannotAdopt
    └── (install.py)        CannotInstall

The pure rooms have their own: a wish that a guard refuses is `core.model.Refused`, an edit that cannot be made as meant
`conf.draft.EditRefused`, a configuration that cannot be read `conf.parse.ConfSyntaxError`.
"""

from __future__ import annotations


class HeadgateError(Exception):
    """Something went wrong that a person can act on: what, and the remedy."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class SettingsError(HeadgateError):
    """headgate.toml is wrong; the message names the file and the key."""


class ApiError(HeadgateError):
    """The daemon refused or failed: HTTP status and the code of the one error shape."""

    def __init__(self, status: int, code: str, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.status = status
        self.code = code


class DaemonUnreachable(HeadgateError):
    """No daemon answers at the socket."""
