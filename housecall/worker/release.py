"""The only door out: every value that leaves a worker leaves through `release`.

What a session's own principal sent, or computed from that alone, is hers and leaves freely. What derives from owned
data leaves if the gate says so: by label, policy and who asks, never by the value, which is not looked at before. The
gate has written the owner's ledger, to the disk, when it says yes; if it cannot, it says no. Statistics that the
owner's own code has made of it, and noised, leave once their cost is in the ledger: `release_noised`; and so do updates
through the stages that policies demand: `release_update`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from ..errors import HousecallError
from ..owner.ledger import Sealed
from ..privacy import pipeline
from ..privacy.gaussian import Random
from ..privacy.pipeline import Stage
from ..transport.arrays import share
from ..wire.messages import Array, Failure, Noised
from .gate import Gate, Opening, Question, Who
from .private import FAILED
from .store import Cell

__all__ = ["release", "release_noised", "release_update"]


def release_update(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    stages: tuple[Stage, ...],
    gate: Gate,
    who: Who,
    paid: Sequence[Sealed],
    random: Random,
) -> list[Array]:
    """Pairs of tensors, now and before, on their way out: their differences pass the stages as one vector, and what
    leaves of each is what it was before, and its difference. `paid` are the entries of the ledger that have their cost;
    others say, on the disk, that they leave. Raises `LedgerError` if these cannot be written, and then nothing does."""
    rows = [(now.double() - before.double()).reshape(-1).cpu() for now, before in pairs]
    passed = torch.from_numpy(pipeline.passed(stages, torch.cat(rows).numpy(), random))  # (values,)
    for entry in paid:
        gate.answered(who, entry, "an update")
    parts = passed.split([row.numel() for row in rows])
    return [
        share((before.double().cpu() + part.reshape(now.shape)).to(now.dtype))
        for part, (now, before) in zip(parts, pairs, strict=True)
    ]


def release_noised(
    values: Sequence[Fraction | int],
    scale: Fraction | float,
    gate: Gate,
    who: Who,
    paid: Sealed,
    what: str = "a statistic",
) -> Noised:
    """A statistic of a data set, on its way out: `paid` is the entry of the ledger that has its cost. Another says, on
    the disk, that it leaves. Raises `LedgerError` if it cannot be written, and then nothing does."""
    gate.answered(who, paid, what)
    epsilon = paid.entry.privacy.epsilon if paid.entry.privacy is not None else 0.0
    return Noised(tuple([float(value) for value in values]), float(scale), epsilon, gate.left(paid))


def release(value: torch.Tensor, cell: Cell | None, opening: Opening, question: Question) -> Array | Failure:
    """The elements of a value, on their way out: its own, never the rest of its storage. Or why they stay. `question`
    says what they derive from, which is looked at here once more."""
    if cell is not None and cell.label:
        try:
            opening.ask(question._replace(label=cell.label))
        except HousecallError as error:
            return Failure(0, 0, "release", str(error), writes=False)
        if cell.failed:
            return Failure(0, 0, "release", FAILED, writes=False)
    return share(value)
