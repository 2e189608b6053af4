"""The stages that an update passes on its way out: a closed table of them, and the walk from first to last.

What must live here: which stages there are, which may follow which, and what all of them cost. What must not: what a
stage does, which is its own file's. A new stage is one new file, and its name in `Stage`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import PolicyError
from .clip import Clip
from .gaussian import Random
from .noise import Noise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["NAMES", "Stage", "check", "passed", "rho", "words"]

Stage = Clip | Noise
NAMES = "clip or noise"


def check(stages: Iterable[Stage]) -> None:
    """Refuse noise that nothing before it bounds: it would hide nothing. Raises `PolicyError`."""
    bound: float | None = None
    for stage in stages:
        if isinstance(stage, Noise) and bound is None:
            raise PolicyError(f"{stage} has no clip before it: noise hides only what is bounded, so clip first")
        bound = stage.bound(bound) if isinstance(stage, Clip) else None


def passed(
    stages: Iterable[Stage], update: NDArray[np.float64], random: Random = secrets.token_bytes
) -> NDArray[np.float64]:
    """What leaves of an update, all of its values in one row: (values,) -> (values,)."""
    bound: float | None = None
    for stage in stages:
        if isinstance(stage, Clip):
            update, bound = stage.passed(update), stage.bound(bound)
        else:
            assert bound is not None  # `check` has seen it
            update, bound = stage.passed(update, bound, random), None
    return update


def rho(stages: Iterable[Stage]) -> float:
    """What one update costs of zero-concentrated differential privacy; 0 if no noise is in it, and then nothing is
    promised. Whatever happens to it after the first noise costs nothing more."""
    return next((stage.rho for stage in stages if isinstance(stage, Noise)), 0.0)


def words(stages: Iterable[Stage]) -> str:
    """As printed: `clip(norm=1) > noise(multiplier=8)`."""
    return " > ".join(map(str, stages))
