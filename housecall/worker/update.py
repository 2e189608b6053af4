"""Updates: what a model has learnt, on its way out through the stages that its owners' policies demand.

What must live here: what can be an update, and that all of it passes the stages in one row. What must not: stages
(`privacy`), and whether it may leave (`gate`).

An update is the difference between values that derive from private data and public ones of the same types: the weights
of a model before and after. Nothing is assumed of how they came about. All private values of one question pass as one
vector, in float64, since their norm is what `clip` bounds; values that derive from nobody's data leave as they are.
"""

from __future__ import annotations

import secrets

import torch

from ..errors import DataError, ProgramError, UsageError
from ..owned.catalogue import Catalogue
from ..privacy import pipeline
from ..privacy.gaussian import Random
from ..program.typing import DTYPES
from ..transport.arrays import share
from ..types import PUBLIC, Label
from ..wire.messages import Update, Updated
from .gate import Gate, Who
from .private import FAILED
from .release import release_update
from .statistics import registered
from .store import Store

__all__ = ["derives_from", "room", "updated"]

_BYTES = 64  # that one value takes on its way, at most: vectors of 8 bytes each, and two that are being joined


def derives_from(message: Update, store: Store) -> Label:
    """The label of an update. Raises `UsageError` and `ProgramError` for what is none."""
    if len(message.ids) != len(message.since) or not message.ids:
        counts = f"{len(message.ids)} values and {len(message.since)}"
        raise UsageError(f"an update is of some values since as many others; found {counts}")
    label = PUBLIC
    for ref, since in zip(message.ids, message.since, strict=True):
        _check(ref, since, store)
        label = label | store.label(ref)
    if not label:
        raise UsageError("these values derive from nobody's data: fetch them, nothing hides in them")
    return label


def _check(ref: int, since: int, store: Store) -> None:
    for one in (ref, since):
        if one not in store.specs:
            raise ProgramError(f"%{one} is no value of this session")
    now, before = store.specs[ref].type, store.specs[since].type
    if (now.dtype, now.shape) != (before.dtype, before.shape):
        raise UsageError(f"an update is of values of one type: now a {now}, before a {before}")
    if not DTYPES[now.dtype].is_floating_point:
        raise UsageError(f"an update is of real numbers, and this is a {now}: it has no norm that could be bounded")
    if label := store.label(since):
        raise UsageError(f"what an update is since derives from {label}: give what you sent, which is public")


def room(message: Update, store: Store) -> int:
    """The bytes that an update takes on its way out: an expanded view is filled up."""
    return _BYTES * sum(store.specs[ref].size.numel() for ref in message.ids)


def updated(
    message: Update,
    label: Label,
    store: Store,
    catalogue: Catalogue,
    gate: Gate,
    who: Who,
    random: Random = secrets.token_bytes,
) -> Updated:
    """What leaves of an update. Decided, spent and written down before a value is read. Raises `PolicyError` and
    `LedgerError`."""
    owned = [registered(catalogue, catalogue.owned(name)) for name in label.sources]
    pairs = list(zip(message.ids, message.since, strict=True))
    private = [(ref, since) for ref, since in pairs if store.label(ref)]
    values = sum(store.specs[ref].size.numel() for ref, _ in private)
    tensors = f"{len(private):,} tensor{'s' if len(private) != 1 else ''}"
    stages, paid = gate.update(who, owned, f"an update: {tensors}, {values:,} value{'s' if values != 1 else ''}")
    if not pipeline.rho(stages) and any(store.cells[ref].failed for ref, _ in private):
        raise DataError(FAILED)  # as any release that is allowed; with noise nobody is told
    hidden = iter(release_update([_both(store, *pair) for pair in private], stages, gate, who, paid, random))
    arrays = [next(hidden) if store.label(ref) else share(store[ref]) for ref, since in pairs]
    return Updated(tuple(arrays), min(map(gate.left, paid)))


def _both(store: Store, ref: int, since: int) -> tuple[torch.Tensor, torch.Tensor]:
    return store[ref], store[since]
