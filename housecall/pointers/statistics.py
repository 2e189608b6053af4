"""Statistics with differential privacy, as a scientist asks for them: `dataset.statistics(Mean("age", 0, 120), ...)`.

What must live here: the question and its answer. The owner's own code computes and adds the noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from ..errors import UsageError
from ..wire.messages import Noised, Statistic, Statistics
from .request import ask_gate

__all__ = ["Asked", "Count", "Histogram", "Mean", "StatisticsAnswer", "Sum", "ask_statistics"]

Index = int | tuple[int, ...]


class Asked:
    """A statistic to be asked for."""

    def __init__(
        self,
        kind: Literal["count", "sum", "mean", "histogram"],
        column: str,
        bounds: Iterable[float],
        index: Index | None,
    ) -> None:
        if not isinstance(column, str):
            raise UsageError(f"the column of a {kind} is a name, found {column!r}")
        try:
            places = () if index is None else (index,) if isinstance(index, int) else tuple(map(int, index))
            self.statistic = Statistic(kind, column, tuple(map(float, bounds)), places)
        except (TypeError, ValueError, OverflowError):
            raise UsageError(f"the bounds of a {kind} are numbers, and index= whole ones; found {bounds!r}") from None

    def __repr__(self) -> str:
        asked = self.statistic
        index = f", index={asked.index}" if asked.index else ""
        bounds = f", {', '.join(map(repr, asked.bounds))}" if asked.bounds else ""
        return f"{type(self).__name__}({asked.column!r}{bounds}{index})" if asked.column else f"{type(self).__name__}()"


class Count(Asked):
    """How many records have a column from `lower` to `upper`, both included; how many *persons* have such a record,
    where those are protected. `Count()` alone is how many persons there are."""

    def __init__(
        self,
        column: str = "",
        lower: float | None = None,
        upper: float | None = None,
        *,
        index: Index | None = None,
    ) -> None:
        bounds = [bound for bound in (lower, upper) if bound is not None]
        if len(bounds) != (2 if column else 0):
            raise UsageError("a count is of a column between two bounds, Count('age', 40, 60), or Count() of persons")
        super().__init__("count", column, bounds, index)


class Sum(Asked):
    """The sum of a column, each number clamped to `lower` and `upper`. Where persons are protected: of what each
    person's records add up to, clamped."""

    def __init__(self, column: str, lower: float, upper: float, *, index: Index | None = None) -> None:
        super().__init__("sum", column, (lower, upper), index)


class Mean(Asked):
    """The mean of a column, each number clamped to `lower` and `upper`. Where persons are protected: of each person's
    own mean, so each counts once.

    Bounds are yours: say what you know beforehand, never what you read off the data. Narrow ones mean less noise, and
    what lies beyond them is clamped. `index` says which number of a record, if it has several."""

    def __init__(self, column: str, lower: float, upper: float, *, index: Index | None = None) -> None:
        super().__init__("mean", column, (lower, upper), index)


class Histogram(Asked):
    """How many records lie between each two of `edges`: from one on, below the next; the last bin has both of its
    edges. Where persons are protected: how many of each person's first records."""

    def __init__(self, column: str, edges: Iterable[float], *, index: Index | None = None) -> None:
        super().__init__("histogram", column, edges, index)


class StatisticsAnswer(NamedTuple):
    """`value`: a number, or a tuple of one for each bin; noise of the Laplace distribution with this `scale` is in each
    (its standard deviation is 1.4 times that). `epsilon` is what it cost, `left` what the data's budget has left,
    infinite for what costs nothing."""

    value: float | tuple[float, ...]
    scale: float
    epsilon: float
    left: float


def ask_statistics(session: Any, name: str, asked: Asked, epsilon: float) -> StatisticsAnswer:
    """Ask, and wait. Raises `UsageError` for what is no statistic, `PolicyError` if the owner's rules say no."""
    if not isinstance(asked, Asked):
        raise UsageError(f"statistics are of Count, Sum, Mean or Histogram; found {asked!r}")
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float):
        raise UsageError(f"epsilon is a number, found {epsilon!r}")
    found = ask_gate(session, Statistics(name, asked.statistic, float(epsilon)), "statistics")
    assert isinstance(found, Noised)
    value = found.values if asked.statistic.kind == "histogram" else found.values[0]
    return StatisticsAnswer(value, found.scale, found.epsilon, found.left)
