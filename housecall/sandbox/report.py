"""`Report`: which protections are in force, and why the others are not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import UsageError

__all__ = ["Protection", "Report"]


class Protection(NamedTuple):
    """One protection. `detail`: what it refuses, or the reason why it is not in force."""

    name: str
    active: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """Every protection, whether it is in force or not."""

    protections: tuple[Protection, ...]

    def __getitem__(self, name: str) -> Protection:
        """The protection of this name. Raises `KeyError`."""
        for protection in self.protections:
            if protection.name == name:
                return protection
        raise KeyError(name)

    @property
    def missing(self) -> tuple[Protection, ...]:
        """Those that are not in force."""
        return tuple(one for one in self.protections if not one.active)

    def log(self, log: logging.Logger) -> None:
        """A line for each: INFO if it is in force, WARNING if not."""
        for name, active, detail in self.protections:
            if active:
                log.info("sandbox: %s: %s", name, detail)
            else:
                log.warning("sandbox: %s NOT IN FORCE: %s", name, detail)

    def demand(self) -> None:
        """Raise `UsageError` if one is missing."""
        if self.missing:
            lacking = "; ".join(f"{name} ({detail})" for name, _, detail in self.missing)
            raise UsageError(
                f"worker.toml has sandbox.strict = true, and these protections are not in force: {lacking}. "
                "Run the worker where they are, or set strict = false to run without them"
            )
