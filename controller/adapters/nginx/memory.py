"""What the reload data plane must know in its next life, in one file of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from controller.adapters.nginx.lines import Table
from controller.adapters.whole import put, read
from controller.conf.ledger import Ledger
from controller.core.quantise import Key, Ramp
from controller.ports import Clock, PlaneRefused

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Memory:
    """The table that nginx serves as `version`, its ramps, and whose each parameter in the files is.

    `without` are the servers that no line sends to any more. `says` is what nginx has loaded for certain: a digest of
    each upstream's lines at the last reload that was proved. `dirty`: files were written that nginx may not have read.
    """

    version: str = ""
    table: Table | None = None
    ramps: Mapping[Key, Ramp] = field(default_factory=dict)
    without: frozenset[Key] = frozenset()
    ledger: Ledger = field(default_factory=Ledger)
    dirty: bool = False
    says: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path, clock: Clock) -> None:
        """Write the file; PlaneRefused. Blocks."""
        content = {
            "format": FORMAT,
            "boot": clock.boot(),
            "now": clock.now(),
            "version": self.version,
            "table": self.table,
            "ramps": [[*key, asdict(ramp)] for key, ramp in self.ramps.items()],
            "without": sorted(self.without),
            "ledger": self.ledger.to_json(),
            "dirty": self.dirty,
            "says": dict(self.says),
        }
        try:
            put(path, json.dumps(content, indent=1).encode())
        except OSError as error:
            message = f"{path} cannot be written: {error.strerror}"
            raise PlaneRefused("write_failed", message, "make room, or correct its permissions") from error

    @classmethod
    def load(cls, path: Path, clock: Clock) -> Memory:
        """What an earlier life saved, nothing where there is no file; PlaneRefused where it cannot be read. Blocks."""
        content = read(path)
        if content is None:
            return cls()
        try:
            return _restored(json.loads(content), clock)
        except (ValueError, TypeError, KeyError) as error:
            raise PlaneRefused(
                "state",
                f"{path} cannot be read: {error!r}",
                "mend it; or remove it, and then every weight and down mark in nginx.conf counts as its author's",
            ) from error


def _restored(raw: Mapping[str, Any], clock: Clock) -> Memory:
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']}")
    # After a reboot of the machine the monotonic clock starts afresh, and the ramps have gone on until `raw["now"]`.
    shift = 0.0 if raw["boot"] == clock.boot() else clock.now() - raw["now"]
    ramps = {(name, key): Ramp(**ramp) for name, key, ramp in raw["ramps"]}
    return Memory(
        raw["version"],
        raw["table"],
        {key: replace(ramp, since=ramp.since + shift) for key, ramp in ramps.items()},
        frozenset((name, key) for name, key in raw["without"]),
        Ledger.from_json(raw["ledger"]),
        raw["dirty"],
        raw.get("says", {}),
    )
