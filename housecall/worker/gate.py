"""The gate: asks the owner's policies, and writes her ledger, before private data is used or leaves."""

from __future__ import annotations

from typing import NamedTuple

from ..types import Label

__all__ = ["Gate", "Who"]


class Who(NamedTuple):
    """A principal, as the worker knows it: a name, and what it may be."""

    name: str
    role: str


class Gate:
    """STAND-IN until policy lands."""

    def load(self, who: Who, name: str) -> None:
        """x"""

    def release(self, who: Who, label: Label) -> None:
        """x"""
