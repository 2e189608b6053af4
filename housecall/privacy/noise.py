"""`Noise`: what hides a whole data set in its update, and what it costs.

NOTE [What is promised]
Who sees updates learns of the data next to nothing: what one update tells of *everything* that its owner has is
bounded, so what it tells of one record, or of all records of one person, is, too. Nothing is assumed of how the update
was made: a hostile program's is hidden as well. That is why the noise is so great: `multiplier` times the norm that
`clip` allows, in each value, whatever the number of values. Two updates of norm C differ by 2C at most, so one costs
rho = (2C)^2 / (2 (multiplier C)^2) = 2 / multiplier^2 of zero-concentrated differential privacy (Bun and Steinke 2016,
proposition 1.6; `accounting`).

NOTE [On a grid]
As everywhere here noise is of whole numbers (`laplace`, NOTE [Whole numbers]): an update is rounded towards zero to
steps of a public grid, 2^20 of which are the noise's standard deviation, and the discrete Gaussian is added (Canonne,
Kamath and Steinke 2020, theorem 14: the same rho as the continuous one, in any number of dimensions). That it is no
longer than `clip` allows is looked at once more in whole numbers, exactly.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta

from .gaussian import Random, gaussian

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Noise"]

_BITS = 20  # 2^20 steps are one standard deviation


class Noise(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="stage", tag="noise"):
    """Add to each value Gaussian noise whose standard deviation is `multiplier` times the norm of the `clip` before."""

    multiplier: Annotated[float, Meta(ge=0.01, le=1e6)]

    @property
    def rho(self) -> float:
        """What one update costs, rounded up: see NOTE [What is promised]."""
        cost = 2 / Fraction(self.multiplier) ** 2
        near = float(cost)
        return near if Fraction(near) >= cost else math.nextafter(near, math.inf)

    def passed(self, update: NDArray[np.float64], bound: float, random: Random) -> NDArray[np.float64]:
        """(values,) -> (values,): an update of this norm at most, with noise."""
        steps = self.steps(update, bound) + gaussian(update.size, _BITS, random)
        return steps.astype(np.float64) * (self.multiplier * bound / (1 << _BITS))

    def steps(self, update: NDArray[np.float64], bound: float) -> NDArray[np.int64]:
        """An update in whole steps, of which none is longer than `bound`."""
        limit = (Fraction(1 << _BITS) / Fraction(self.multiplier)) ** 2  # of the sum of squares
        found = np.trunc(update / bound * ((1 << _BITS) / self.multiplier)).astype(np.int64)
        while sum_of_squares(found) > limit:  # by a rounding: it was clipped
            found -= np.sign(found) * ((np.abs(found) >> _BITS) + 1)
        return found

    def __str__(self) -> str:
        return f"noise(multiplier={self.multiplier:g})"


def sum_of_squares(values: NDArray[np.int64]) -> int:
    """Exactly, as long as each is below 2^62."""
    high, low = values >> 31, values & 0x7FFFFFFF
    return (_dot(high, high) << 62) + (_dot(high, low) << 32) + _dot(low, low)


def _dot(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """The sum of products of numbers below 2^31."""
    products = one * other
    return (int((products >> 32).sum()) << 32) + int((products & 0xFFFFFFFF).sum())
