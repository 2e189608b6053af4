"""Statistics of an owner's data, with differential privacy: computed and noised by her own code, paid from her budget.

What must live here: what can be asked, what one record or person changes of it at most, and the order of things. What
must not: who may ask and what is left (`gate`, `spending`), how noise is drawn (`privacy.laplace`).

NOTE [What is promised]
Who sees all answers learns of one record, or of all records of one person where that is the unit, no more than a factor
of e^epsilon in any probability: epsilon-differential privacy (Dwork and Roth 2014, definition 2.4), with delta 0.
- Unit "record": of two data sets that differ in the content of one record. How many records there are is no secret:
  whoever finds a data set is told.
- Unit "person": of two data sets that differ in all records of one person: there, not there, or others in their place.
  How many records there are in all is told, and no promise is made about that number.

NOTE [One contribution]
Each unit adds one bounded whole number, in steps of a public grid (2^20 steps or more between the bounds), so sums are
exact, in any order, and what one changes is known to the last bit (`privacy.laplace`, NOTE [Whole numbers]). A person's
records are made one first: for a mean, the mean of her clamped records; for a sum, the sum of her records, which is
then clamped: the bounds are of a *person's* sum; for a count, whether any of her records is within the bounds; for a
histogram, the bin of her first record in the order of the data set, since a place in a file says less about a person
than, say, her largest value would. NaN counts as the lower bound in sums and means, and as within nothing in counts and
histograms: dropping it would make the number of records, by which a mean is divided, depend on elements.

NOTE [Time]
Clamping, rounding and adding take as long whatever the elements are. Sorting persons, and finding the bins of what is
within the edges, do not quite; nor does drawing the noise, which tells of the noise. Whoever asks can measure all of it
together, coarsely.

NOTE [What each costs], per epsilon: the scale of its Laplace noise, in units of what one contribution can change (below
`spread` is 1 / epsilon)
- count: 1. A unit that is replaced, or gone, changes it by 1.
- histogram: 2 in each bin. One that is replaced leaves a bin and enters another; all bins are one release.
- sum: upper - lower by record; by person max(|lower|, |upper|, upper - lower), since she may be gone.
- mean by record: (upper - lower) / n, and n is no secret.
- mean by person: how many there are is a secret. The sum of (value - middle) with scale (upper - lower) / epsilon, and
  the number of persons with scale 2 / epsilon: whoever is replaced changes the first by upper - lower and the second
  not at all, whoever is gone the first by half of that and the second by 1. Either costs epsilon for both together.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import torch

from ..errors import DataError, PolicyError, UsageError
from ..owned.catalogue import Catalogue
from ..owned.description import Owned
from ..owner.policy import DENY
from ..owner.spending import told
from ..privacy.accounting import exact
from ..privacy.laplace import Below, noised
from ..program.typing import DTYPES
from ..wire.messages import Noised, Statistic, Statistics
from .gate import Gate, Registered, Who
from .release import release_noised

__all__ = [
    "EPSILON",
    "MOST_EDGES",
    "answer",
    "budgets",
    "check",
    "check_bounds",
    "check_same",
    "mean_of",
    "registered",
    "words",
]

log = logging.getLogger(__name__)

FAILED = "the statistic could not be made; the details are in the owner's log"
EPSILON = (1e-6, 1e6)  # least and greatest of one statistic
MOST_EDGES = 10_001
_LARGEST = 1e30  # of a bound; larger ones would overflow sums of float64
_NEAREST = 1e-9  # bounds nearer to each other than this, times their size, leave no steps between them
_LEAST = 1e-30  # between two bounds
_STEPS = 20  # as a power of two, between the bounds at least
_CHUNK = 1 << 20  # records at a time


def answer(catalogue: Catalogue, gate: Gate, who: Who, message: Statistics, below: Below = secrets.randbelow) -> Noised:
    """What leaves for a question. Decided, then written down as spent, and only then is an element read; the answer is
    in the ledger before it leaves. Raises `UsageError` for what cannot be asked, `PolicyError`, `LedgerError`."""
    name, asked, epsilon = message.name, message.statistic, message.epsilon
    identity, owned = catalogue.identity(name), catalogue.owned(name)
    check(owned, asked, epsilon)
    paid = gate.statistics(who, registered(catalogue, owned), epsilon, words(asked))
    whole = catalogue.whole(name)
    check_same(name, identity, whole.identity)
    try:
        values, scale = _made(owned, whole.columns, asked, 1 / exact(epsilon), below)
    except Exception as error:  # whatever it is, it stays here: its text could have elements
        log.warning("a statistic of '%s' failed (%s): %s: %s", name, words(asked), type(error).__name__, error)
        raise DataError(FAILED) from None
    return release_noised(values, scale, gate, who, paid)


def registered(catalogue: Catalogue, owned: Owned) -> Registered:
    """A data set as the gate asks for it."""
    return Registered(owned.name, owned.count, owned.unit, lambda: catalogue.content(owned.name))


def mean_of(
    owned: Owned,
    columns: Mapping[str, torch.Tensor],
    values: torch.Tensor,
    bounds: tuple[float, float],
    spread: Fraction,
    below: Below,
) -> _Made:
    """The mean of numbers that were made of the records one by one, (records,), as of a column. Without noise where
    `spread`, 1 / epsilon, is 0."""
    persons = next((columns[column] for column in owned.withheld), None)
    data = _Data(owned.count, _Column(values, ()), persons)
    return _MADE["mean", owned.unit](data, Statistic("mean", "score", bounds), spread, below)


def _made(owned: Owned, columns: Mapping[str, torch.Tensor], asked: Statistic, spread: Fraction, below: Below) -> _Made:
    persons = next((columns[column] for column in owned.withheld), None)
    column = _Column(columns[asked.column], asked.index) if asked.column else None
    return _MADE[asked.kind, owned.unit](_Data(owned.count, column, persons), asked, spread, below)


def budgets(catalogue: Catalogue, gate: Gate) -> dict[str, str]:
    """What is spent of each data set's budget, and what is left, in words, for the owner."""
    found = {}
    for name in catalogue.names() if gate.spending is not None else ():
        budget = gate.policies.get(name, DENY).budget
        if budget.epsilon and gate.spending is not None:
            with contextlib.suppress(DataError):  # it was removed meanwhile
                found[name] = told(budget, gate.spending.spent(catalogue.content(name)))
    return found


def check_same(name: str, decided: str, found: str) -> None:
    """Refuse data that is not what it was decided for. Raises `PolicyError`."""
    if found != decided:
        raise PolicyError(f"data set '{name}' was removed or replaced meanwhile: look it up anew")


# -- what can be asked ----------------------------------------------------------------------------------------


def check(owned: Owned, asked: Statistic, epsilon: float) -> None:
    """Refuse what cannot be asked of a data set, by its schema, which is no secret. Raises `UsageError`."""
    if not EPSILON[0] <= epsilon <= EPSILON[1]:
        raise UsageError(f"epsilon {epsilon!r}: one statistic costs from {EPSILON[0]:g} to {EPSILON[1]:g}")
    if asked.kind == "count" and not asked.column:
        if asked.bounds or asked.index:
            raise UsageError("a count between bounds is of a column: name it")
        if owned.unit == "record":
            raise UsageError(
                f"data set '{owned.name}' has {owned.count:,} records, which is no secret: nothing is spent for it. "
                "Count those whose column is between bounds, or of a data set that protects persons"
            )
        return
    _check_column(owned, asked)
    check_bounds(asked)


def _check_column(owned: Owned, asked: Statistic) -> None:
    if asked.column not in owned.columns:
        raise UsageError(
            f"data set '{owned.name}' has no column {asked.column[:80]!r}; it offers {', '.join(owned.columns)}"
        )
    kind = owned.columns[asked.column]
    if DTYPES[kind.dtype].is_complex:
        raise UsageError(f"column '{asked.column}' holds {kind.dtype}: complex numbers have no bounds")
    if not asked.index and math.prod(kind.shape) == 1:
        return
    if len(asked.index) != len(kind.shape) or not all(
        0 <= at < size for at, size in zip(asked.index, kind.shape, strict=True)
    ):
        raise UsageError(
            f"column '{asked.column}' holds {kind} a record, and a statistic is of one number: name which by index=, "
            f"one place for each of {len(kind.shape)} dimensions; found {asked.index[:8]}"
        )


def check_bounds(asked: Statistic) -> None:
    """Refuse bounds that are none. Raises `UsageError`."""
    bounds, what = asked.bounds, "edges" if asked.kind == "histogram" else "bounds"
    most = MOST_EDGES if asked.kind == "histogram" else 2
    if not 2 <= len(bounds) <= most:
        raise UsageError(f"a {asked.kind} has {'2' if most == 2 else f'2 to {most:,}'} {what}; found {len(bounds):,}")
    if not all(abs(bound) <= _LARGEST for bound in bounds):  # NaN is not
        raise UsageError(f"{what} are finite numbers from {-_LARGEST:g} to {_LARGEST:g}; found {bounds[:4]!r}")
    if not all(low < high for low, high in itertools.pairwise(bounds)):
        raise UsageError(f"{what} go up, each is greater than the one before; found {bounds[:4]!r}")
    if most == 2 and bounds[1] - bounds[0] < max(_LEAST, _NEAREST * max(map(abs, bounds))):
        raise UsageError(f"bounds {bounds!r} are too near each other for their size")


def words(asked: Statistic) -> str:
    """What was asked, for the owner's ledger."""
    if not asked.column:
        return "the number of persons"
    what = f"'{asked.column}'" + (f"{list(asked.index)}" if asked.index else "")
    if asked.kind == "histogram":
        return (
            f"a histogram of {what} in {len(asked.bounds) - 1:,} bins from {asked.bounds[0]!r} to {asked.bounds[-1]!r}"
        )
    return f"a {asked.kind} of {what} between {asked.bounds[0]!r} and {asked.bounds[1]!r}"


# -- what is made of the data ---------------------------------------------------------------------------------


class _Column:
    """One number of each record."""

    def __init__(self, values: torch.Tensor, index: tuple[int, ...]) -> None:
        for at in index or (0,) * (values.dim() - 1):
            values = values.select(1, at)
        self._values = values

    def chunks(self) -> Iterator[torch.Tensor]:
        """In float64, some records at a time. (records,)"""
        for chunk in self._values.split(_CHUNK):
            yield chunk.cpu().to(torch.float64)

    def of(self, records: torch.Tensor) -> torch.Tensor:
        """Those of some records."""
        return self._values.cpu()[records].to(torch.float64)


class _Data:
    """The column, and whose record each is."""

    def __init__(self, count: int, column: _Column | None, persons: torch.Tensor | None) -> None:
        self.count, self._column = count, column
        self.people, self.whose = 0, torch.empty(0, dtype=torch.int64)
        if persons is not None:
            # Compared as int64: no two become one.
            found, self.whose = persons.cpu().to(torch.int64).unique(return_inverse=True)
            self.people = len(found)

    @property
    def column(self) -> _Column:
        assert self._column is not None  # `check` has seen it
        return self._column

    def per_person(self, steps: Iterator[torch.Tensor], reduce: str) -> torch.Tensor:
        """Of each person's records: their sum, or the largest. (persons,)"""
        made = torch.zeros(self.people, dtype=torch.int64)
        at = 0
        for chunk in steps:
            made.scatter_reduce_(0, self.whose[at : at + len(chunk)], chunk.to(torch.int64), reduce)
            at += len(chunk)
        return made

    def first(self) -> torch.Tensor:
        """The first record of each person. (persons,)"""
        last = torch.full((self.people,), self.count, dtype=torch.int64)
        return last.scatter_reduce_(0, self.whose, torch.arange(self.count), "amin")


class _Grid:
    """Steps between two bounds: 2^20 to 2^21 of them, each a power of two, so that steps are exact."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.lower, self.upper = bounds
        width = self.upper - self.lower
        self.step = math.ldexp(1.0, math.frexp(width)[1] - 1 - _STEPS)
        self.top = math.ceil(width / self.step)

    def steps(self, values: torch.Tensor) -> torch.Tensor:
        """From 0 to `top`: of each value, clamped, above the lower bound. NaN is at the lower bound."""
        clamped = values.nan_to_num(nan=self.lower).clamp(self.lower, self.upper)
        return ((clamped - self.lower) / self.step).round().clamp(0, self.top).to(torch.int64)

    def unclamped(self, values: torch.Tensor) -> torch.Tensor:
        """In steps from zero. No more than 64 times the bounds: what is beyond would be clamped in the end, too."""
        most = 64 * max(abs(self.lower), abs(self.upper))
        clamped = values.nan_to_num(nan=self.lower, posinf=most, neginf=-most).clamp(-most, most)
        return (clamped / self.step).round().to(torch.int64)


_Made = tuple[Sequence[Fraction | int], Fraction | float]  # values, and the scale of their noise


def _count(data: _Data, asked: Statistic, spread: Fraction, below: Below) -> _Made:
    found = sum(int(_within(chunk, asked.bounds).sum()) for chunk in data.column.chunks())
    return [noised(found, spread, below)], spread


def _persons(data: _Data, asked: Statistic, spread: Fraction, below: Below) -> _Made:
    found = data.people
    if asked.column:
        found = int(data.per_person((_within(chunk, asked.bounds) for chunk in data.column.chunks()), "amax").sum())
    return [noised(found, spread, below)], spread


def _within(values: torch.Tensor, bounds: tuple[float, ...]) -> torch.Tensor:
    return (values >= bounds[0]) & (values <= bounds[-1])


def _sum(data: _Data, asked: Statistic, spread: Fraction, below: Below) -> _Made:
    grid = _Grid(asked.bounds)
    scale = grid.top * spread
    steps = noised(sum(int(grid.steps(chunk).sum()) for chunk in data.column.chunks()), scale, below)
    return [data.count * Fraction(grid.lower) + steps * Fraction(grid.step)], scale * Fraction(grid.step)


def _mean(data: _Data, asked: Statistic, spread: Fraction, below: Below) -> _Made:
    (total,), scale = _sum(data, asked, spread, below)
    return [Fraction(total) / data.count], scale / data.count


def _persons_sum(data: _Data, asked: Statistic, spread: Fraction, below: Below) -> _Made:
    grid = _Grid(asked.bounds)
    low, high = math.ceil(grid.lower / grid.step), math.floor(grid.upper / grid.step)
    sums = data.per_person((grid.unclamped(chunk) for chunk in data.column.chunks()), "sum").clamp(low, high)
    scale = Fraction(max(abs(low), abs(high), high - low)) * spread
    # In two parts: the sum of many that are far from zero does not fit into 64 bits.
    total = (int((sums >> 32).sum()) << 32) + int((sums & 0xFFFFFFFF).sum())
    return [noised(total, scale, below) * Fraction(grid.step)], scale * Fraction(grid.step)


def _persons_mean(data: _Data, asked: Statistic, spread: Fraction, below: Below) -> _Made:
    grid = _Grid(asked.bounds)
    records = data.whose.bincount(minlength=data.people)
    sums = data.per_person((grid.steps(chunk) for chunk in data.column.chunks()), "sum")
    means = (2 * sums + records).div(2 * records, rounding_mode="floor")  # rounded; in 0 to top
    scale = 2 * grid.top * spread
    total = noised(int((2 * means - grid.top).sum()), scale, below)  # of twice (value - middle)
    people = max(1, noised(data.people, 2 * spread, below))
    half = Fraction(grid.step) / 2
    return [Fraction(grid.lower) + half * (grid.top + Fraction(total, people))], half * scale / people


def _histogram(data: _Data, asked: Statistic, spread: Fraction, below: Below) -> _Made:
    return _binned(data.column.chunks(), asked.bounds, spread, below)


def _persons_histogram(data: _Data, asked: Statistic, spread: Fraction, below: Below) -> _Made:
    return _binned(iter([data.column.of(data.first())]), asked.bounds, spread, below)


def _binned(chunks: Iterator[torch.Tensor], edges: tuple[float, ...], spread: Fraction, below: Below) -> _Made:
    """Bins are from an edge on and below the next; the last has its upper edge, too."""
    bins = len(edges) - 1
    limits = torch.tensor(edges, dtype=torch.float64)
    counts = torch.zeros(bins, dtype=torch.int64)
    for chunk in chunks:
        inside = chunk[_within(chunk, edges)]
        place = (torch.bucketize(inside, limits, right=True) - 1).clamp(max=bins - 1)
        counts += place.bincount(minlength=bins)
    return [noised(int(count), 2 * spread, below) for count in counts], 2 * spread


_MADE = {
    ("count", "record"): _count,
    ("count", "person"): _persons,
    ("sum", "record"): _sum,
    ("sum", "person"): _persons_sum,
    ("mean", "record"): _mean,
    ("mean", "person"): _persons_mean,
    ("histogram", "record"): _histogram,
    ("histogram", "person"): _persons_histogram,
}
