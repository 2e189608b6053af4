"""The discrete Gaussian distribution, drawn exactly: many at a time, and one by one as the plain twin.

What must live here: sampling. What must not: what is measured, how much it may cost, floating point.

NOTE [How it is drawn]
By rejection from the discrete Laplace distribution (Canonne, Kamath and Steinke 2020, "The discrete Gaussian for
differential privacy", algorithms 1 to 3). Where the standard deviation is a power of two every probability in it is
e^-(a / 2^b) of whole numbers a and b, which comparing random bits gives exactly, for many at a time. How long that
takes depends on what is drawn, never on what it is added to.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from .laplace import Below, laplace

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Random", "gaussian", "gaussian_one"]

Random = Callable[[int], bytes]  # so many random bytes: `secrets.token_bytes`

_CHUNK = 1 << 16  # drawn at a time
_MOST_BITS = 24  # a square of 2^30 standard deviations fits into 63 bits, and nobody will ever see 2^6


def gaussian(count: int, bits: int, random: Random = secrets.token_bytes) -> NDArray[np.int64]:
    """`count` whole numbers, each z with a probability proportional to e^(-z^2 / (2 s^2)), where s is 2^bits."""
    if not 0 <= bits <= _MOST_BITS:
        raise ValueError(f"a standard deviation of 2^{bits}: expected 2^0 to 2^{_MOST_BITS}")
    source = _Bits(random)
    made = np.empty(count, dtype=np.int64)
    for first in range(0, count, _CHUNK):
        _fill(made[first : first + _CHUNK], bits, source)
    return made


def gaussian_one(scale: int, below: Below = secrets.randbelow) -> int:
    """The plain twin of `gaussian`: one of them, where s is `scale`."""
    while True:
        found = laplace(Fraction(scale), below)
        if _is_exp_one(Fraction((abs(found) - scale) ** 2, 2 * scale**2), below):
            return found


def _is_exp_one(power: Fraction, below: Below) -> bool:
    """True with probability e^-power."""
    while power > 1:
        if not _is_exp_one(Fraction(1), below):
            return False
        power -= 1
    count = 1
    while below(power.denominator * count) < power.numerator:
        count += 1
    return count % 2 == 1


# -- many at a time -------------------------------------------------------------------------------------------


class _Bits:
    """Random whole numbers."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def words(self, count: int, bits: int) -> NDArray[np.int64]:
        """From 0 on below 2^bits, at most 2^63."""
        drawn = np.frombuffer(self._random(8 * count), dtype="<u8") >> np.uint64(64 - bits) if bits else np.zeros(count)
        return drawn.astype(np.int64)

    def is_first_of(self, count: int, among: int) -> NDArray[np.bool_]:
        """Each true with probability 1 / among."""
        if among == 1:
            return np.ones(count, dtype=np.bool_)
        top = (1 << 62) // among * among  # above, some remainders would come more often
        drawn = self.words(count, 62)
        while (over := drawn >= top).any():
            drawn[over] = self.words(int(over.sum()), 62)
        first: NDArray[np.bool_] = drawn % among == 0
        return first

    def is_exp(self, tops: NDArray[np.int64], bits: int) -> NDArray[np.bool_]:
        """Each true with probability e^-(top / 2^bits), for tops up to 2^bits."""
        odd = np.ones(tops.size, dtype=np.bool_)
        active = np.arange(tops.size)
        among = 1
        while active.size:
            goes_on = self.is_first_of(active.size, among) & (self.words(active.size, bits) < tops[active])
            active = active[goes_on]
            odd[active] = ~odd[active]
            among += 1
        return odd

    def is_exp_of_any(self, tops: NDArray[np.int64], bits: int) -> NDArray[np.bool_]:
        """The same for any tops: e^-1 as often as it is in it, and the rest."""
        whole = tops >> bits
        found = self.is_exp(tops & ((1 << bits) - 1), bits)
        at = np.flatnonzero(found & (whole > 0))
        while at.size:
            kept = self.is_exp(np.ones(at.size, dtype=np.int64), 0)
            found[at[~kept]] = False
            whole[at] -= 1
            at = at[kept & (whole[at] > 0)]
        return found


def _fill(into: NDArray[np.int64], bits: int, source: _Bits) -> None:
    """Draw until every place has been given one."""
    filled = 0
    while filled < into.size:
        found = _laplace(2 * (into.size - filled) + 16, bits, source)
        found = found[source.is_exp_of_any((np.abs(found) - (1 << bits)) ** 2, 2 * bits + 1)]
        taken = found[: into.size - filled]
        into[filled : filled + taken.size] = taken
        filled += taken.size


def _laplace(count: int, bits: int, source: _Bits) -> NDArray[np.int64]:
    """`laplace` of scale 2^bits, up to `count` of them: as many as were not rejected."""
    part = source.words(count, bits)
    part = part[source.is_exp(part, bits)]
    whole = np.zeros(part.size, dtype=np.int64)
    active = np.arange(part.size)
    while active.size:
        active = active[source.is_exp(np.ones(active.size, dtype=np.int64), 0)]
        whole[active] += 1
    size = part + (whole << bits)
    negative = source.words(part.size, 1) == 1
    kept = (size > 0) | ~negative  # or zero would come twice as often
    found: NDArray[np.int64] = np.where(negative, -size, size)[kept]
    return found
