"""What systemd is told, and what it asks for: sd_notify(3) and the watchdog, on the standard library."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Sends to the socket that systemd named in NOTIFY_SOCKET; without one every call does nothing.

    `watchdog` is the number of seconds within which systemd wants a ping, None where it wants none from this process.
    A message that cannot be delivered is dropped: the watchdog is there to see it.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
        wanted = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        self.watchdog: float | None = int(usec) / 1e6 if wanted else None

    def ready(self, status: str = "") -> bool:
        """The daemon serves, at start or after a reload."""
        return self._send("READY=1", status)

    def reloading(self, status: str = "") -> bool:
        """The daemon reads its configuration again; `ready` ends it."""
        # MONOTONIC_USEC is what Type=notify-reload wants (systemd 253); older ones ignore it.
        return self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", status)

    def stopping(self, status: str = "") -> bool:
        """The daemon is about to end."""
        return self._send("STOPPING=1", status)

    def status(self, status: str) -> bool:
        """One sentence for `systemctl status`."""
        return self._send("", status)

    def ping(self) -> bool:
        """The work is alive."""
        return self._send("WATCHDOG=1", "")

    def _send(self, state: str, status: str) -> bool:
        """Whether it was delivered."""
        if not self._address:
            return False
        lines = [state, f"STATUS={' '.join(status.split())}" if status else ""]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            try:
                sender.sendto("\n".join(filter(None, lines)).encode(), self._address)
            except OSError:
                return False
        return True
