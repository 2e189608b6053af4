"""`Clip`: an update is no longer than this, whatever the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Clip"]


class Clip(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="stage", tag="clip"):
    """Scale an update down to this L2 norm, if it is longer (Abadi and others 2016, algorithm 1). Of one that is no
    number in some places, those are zero: they would make the norm nothing that could be bounded."""

    norm: Annotated[float, Meta(ge=1e-9, le=1e9)]

    def bound(self, before: float | None) -> float:
        """The largest norm of what has passed."""
        return self.norm if before is None else min(before, self.norm)

    def passed(self, update: NDArray[np.float64]) -> NDArray[np.float64]:
        """(values,) -> (values,)"""
        finite = np.nan_to_num(update, nan=0.0, posinf=0.0, neginf=0.0)
        largest = float(np.abs(finite).max(initial=0.0))
        if not largest:
            return finite
        scaled = finite / largest  # the square of 1e200 is no float
        norm = float(np.linalg.norm(scaled))
        return finite if largest * norm <= self.norm else scaled * (self.norm / norm)

    def __str__(self) -> str:
        return f"clip(norm={self.norm:g})"
