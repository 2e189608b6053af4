"""`Owned`: a data set without its values, what makes one fit to be kept, and its description as TOML and back.

What must live here: every rule about names, tags, columns and counts. What must not: files, locks, elements.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

import msgspec
import tomli_w
import torch
from msgspec import Meta

from ..errors import PolicyError, UsageError
from ..owner.policy import Policy
from ..types import Label, TensorType, Unit
from ..wire.codec import ITEM_BYTES

__all__ = [
    "Described",
    "Owned",
    "check_unit",
    "check_words",
    "describe",
    "dtype_name",
    "from_text",
    "is_name",
    "plain",
    "record_type",
    "to_text",
    "unit_trouble",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_TAG = re.compile(r"#[A-Za-z0-9][A-Za-z0-9._:/-]{0,62}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Owned(msgspec.Struct, frozen=True):
    """An owned data set, without its values.

    `columns`: name -> the type of one record, so a batch of n is `(n, *shape)`. `classes`: column -> the values that
    its integers number; they stand in the data, so whoever answers for the owner decides whether they may be told.
    `sources`: column -> what the places of its dimension 1 are, where it was grouped from several. `withheld`: the one
    column that says whose record each is, where the unit of privacy is a person; it is with the data, and never lent.
    `mock`: the number of records of its mock, 0 if it has none.
    """

    name: str
    columns: dict[str, TensorType]
    count: int
    tags: tuple[str, ...]
    description: str
    created: datetime
    classes: dict[str, tuple[str, ...]] = {}
    sources: dict[str, tuple[str, ...]] = {}
    withheld: dict[str, TensorType] = {}
    mock: int = 0

    @property
    def unit(self) -> Unit:
        """What is protected: a record, or all records of a person."""
        return "person" if self.withheld else "record"

    @property
    def label(self) -> Label:
        """What is computed from it bears this."""
        return Label((self.name,), (self.name,) if self.withheld else ())


class Described(NamedTuple):
    """What a description on disk says: the data set, and the SHA-256 of its elements' file and of its mock's."""

    owned: Owned
    digest: str
    mock: str = ""


class _Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A column as its description on disk has it: `shape` is of one record."""

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()


class _Mock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mock as the description of its data set has it; its columns are of the same types."""

    count: int
    sha256: str


class _Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `data/NAME.toml` holds."""

    count: int
    tags: tuple[str, ...]
    description: str
    created: Annotated[datetime, Meta(tz=True)]
    sha256: str
    columns: dict[str, _Column]
    classes: dict[str, tuple[str, ...]] = {}
    unit: Unit = "record"
    person: str = ""
    mock: _Mock | None = None


def is_name(name: str) -> bool:
    """Whether a data set may be called so: it becomes part of file names."""
    return bool(_NAME.fullmatch(name))


def describe(
    name: str,
    columns: Mapping[str, torch.Tensor],
    tags: Iterable[str],
    description: str,
    classes: Mapping[str, tuple[str, ...]] | None,
    sources: Mapping[str, tuple[str, ...]] | None,
    created: datetime,
    *,
    unit: Unit = "record",
    person: str = "",
) -> Owned:
    """The description of a data set whose columns are these. `UsageError` for what is unfit, by name."""
    if not is_name(name):
        raise UsageError(f"name {name!r} must be 1 to 63 letters, digits, '-', '.' or '_', a letter or digit first")
    tags = tuple(dict.fromkeys([tags] if isinstance(tags, str) else tags))
    for tag in tags:
        if not _TAG.fullmatch(tag):
            raise UsageError(f"tag {tag!r} must be '#' and 1 to 63 letters, digits or one of ._:/- , as in '#dna'")
    if len(description) > 10_000 or not all(mark.isprintable() or mark in "\n\t" for mark in description):
        raise UsageError(f"the description of '{name}' must be printable text of at most 10,000 characters")
    count = _count(name, columns)
    types = {column: record_type(tensor) for column, tensor in columns.items()}
    _check_person(name, types, unit, person)
    withheld = {person: types.pop(person)} if person else {}
    created = created.astimezone(UTC).replace(microsecond=0)
    return Owned(name, types, count, tags, description, created, dict(classes or {}), dict(sources or {}), withheld)


def _check_person(name: str, types: Mapping[str, TensorType], unit: str, person: str) -> None:
    """Whether the unit of privacy is one, and the data says where it ends."""
    if unit not in ("record", "person"):
        raise UsageError(f"the unit of data set '{name}' is 'record' or 'person', found {unit!r}")
    if unit == "person" and not person:
        raise UsageError(
            f"data set '{name}' protects persons: name the column that says whose record each is, as in "
            "person='subject'; it stays with you"
        )
    if person and unit == "record":
        raise UsageError(f"person={person!r} says whose record each is: data set '{name}' needs unit='person' with it")
    if not person:
        return
    if person not in types:
        raise UsageError(f"data set '{name}' has no column {person!r} for person=; it has {', '.join(types)}")
    if types[person].shape or not re.fullmatch(r"u?int\d+", types[person].dtype):
        raise UsageError(
            f"column '{person}' of data set '{name}' says whose record each is: expected one whole number a record, "
            f"found {types[person]}"
        )
    if len(types) == 1:
        raise UsageError(f"data set '{name}' has no column but '{person}', which stays with you")


def check_words(**options: object) -> None:
    """Refuse a column that was named like an option of `add`: it would be taken for that."""
    for word, value in options.items():
        if isinstance(value, torch.Tensor):
            raise UsageError(
                f"{word}= is an option of add, and found a tensor: a column cannot be called so here; the words "
                f"taken are {', '.join(options)}"
            )


def check_unit(owned: Owned, policy: Policy) -> None:
    """Refuse a policy whose budget counts by record what its data set protects by person: who has many records would
    be protected by a fraction. Raises `PolicyError`. A budget of nothing counts nothing, whatever its unit."""
    if not isinstance(policy, Policy):
        raise PolicyError(f"the policy of '{owned.name}' is a {type(policy).__name__}, expected a housecall.Policy")
    if owned.unit == "person" and (trouble := unit_trouble(owned, policy)):
        raise PolicyError(trouble)


def unit_trouble(owned: Owned, policy: Policy) -> str:
    """Why the budget of a policy pays for nothing of a data set, that protects another unit; empty if it does."""
    budget = policy.budget
    if budget.unit == owned.unit or not (budget.epsilon or budget.delta):
        return ""
    if owned.unit == "person":
        return (
            f"data set '{owned.name}' protects persons, and the budget of its policy counts by record: a person with "
            'many records would pay for one of them. Write unit = "person" under [budget]'
        )
    return (
        f"data set '{owned.name}' protects records, and the budget of its policy counts by person: no statistic can be "
        'paid, since nothing says whose a record is. Write unit = "record" under [budget], or add the data again with '
        "--person"
    )


def _count(name: str, columns: Mapping[str, torch.Tensor]) -> int:
    """How many records the columns have. `UsageError` if they do not agree, or there are none."""
    if not columns:
        raise UsageError(f"data set '{name}' has no columns")
    counts = {column: len(tensor) for column, tensor in columns.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"'{column}' has {count:,}" for column, count in counts.items())
        raise UsageError(f"the columns of data set '{name}' have different numbers of records: {found}")
    count = next(iter(counts.values()))
    for column, tensor in columns.items():
        if tensor.numel() == 0:
            raise UsageError(f"column '{column}' of data set '{name}' is empty: its shape is {tuple(tensor.shape)}")
    return count


def plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The values of a column, without autograd. `UsageError` for a column that cannot be stored or does not travel."""
    if not isinstance(name, str) or not 1 <= len(name) <= 128 or not name.isprintable() or name == "__metadata__":
        raise UsageError(f"column name {name!r} must be 1 to 128 printable characters")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise UsageError(f"column '{name}' is a {type(tensor).__name__}, expected a torch tensor with its values here")
    dtype = dtype_name(tensor)
    if tensor.layout is not torch.strided or dtype not in ITEM_BYTES or tensor.is_meta:
        raise UsageError(f"column '{name}' is {dtype} {tensor.layout}, expected a dense tensor of a dtype that travels")
    if tensor.dim() == 0:
        raise UsageError(f"column '{name}' is a single value: records lie along dimension 0")
    return tensor.detach().resolve_conj().resolve_neg()


def record_type(tensor: torch.Tensor) -> TensorType:
    """The type of one record, as it would lie by itself."""
    return _type(dtype_name(tensor), tuple(tensor.shape[1:]))


def _type(dtype: str, shape: tuple[int, ...]) -> TensorType:
    stride: list[int] = []
    step = 1
    for n in reversed(shape):
        stride.insert(0, step)
        step *= max(n, 1)
    return TensorType(dtype, shape, tuple(stride))


def dtype_name(tensor: torch.Tensor) -> str:
    """torch's name without its prefix: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def to_text(owned: Owned, digest: str, mock: str = "") -> str:
    """The description as TOML; `digest` and `mock` are the SHA-256 of the files with the elements and the mock's."""
    columns: dict[str, dict[str, Any]] = {}
    for name, type_ in (*owned.columns.items(), *owned.withheld.items()):
        columns[name] = {"dtype": type_.dtype, "shape": list(type_.shape)}
        if name in owned.sources:
            columns[name]["sources"] = list(owned.sources[name])
    description: dict[str, Any] = {
        "count": owned.count,
        "tags": list(owned.tags),
        "description": owned.description,
        "created": owned.created,
        "sha256": digest,
        "columns": columns,
    }
    if owned.withheld:
        description |= {"unit": owned.unit, "person": next(iter(owned.withheld))}
    if owned.mock:
        description["mock"] = {"count": owned.mock, "sha256": mock}
    if owned.classes:
        description["classes"] = {name: list(values) for name, values in owned.classes.items()}
    return "# A data set of this worker; `housecall worker` writes this file.\n" + tomli_w.dumps(description)


def from_text(name: str, text: str) -> Described:
    """The description that a TOML text holds. ValueError says what is wrong with it."""
    described = msgspec.toml.decode(text, type=_Description)  # its errors are ValueErrors
    _check(described)
    types = {column: _type(of.dtype, of.shape) for column, of in described.columns.items()}
    withheld = {described.person: types.pop(described.person)} if described.person else {}
    mock = described.mock
    owned = Owned(
        name,
        types,
        described.count,
        described.tags,
        described.description,
        described.created,
        described.classes,
        {column: of.sources for column, of in described.columns.items() if of.sources},
        withheld,
        mock.count if mock else 0,
    )
    return Described(owned, described.sha256, mock.sha256 if mock else "")


def _check(described: _Description) -> None:
    if not _DIGEST.fullmatch(described.sha256):
        raise ValueError("sha256 is no SHA-256")
    if not all(_TAG.fullmatch(tag) for tag in described.tags):
        raise ValueError("a tag is '#' and letters, digits or ._:/-")
    if described.count < 1 or not described.columns:
        raise ValueError("a data set has at least one record and one column")
    for column, of in described.columns.items():
        if of.dtype not in ITEM_BYTES or min(of.shape, default=1) < 1:
            raise ValueError(f"column '{column}' has no type that travels")
    try:
        types = {column: _type(of.dtype, of.shape) for column, of in described.columns.items()}
        _check_person("", types, described.unit, described.person)
    except UsageError:
        raise ValueError("unit and person do not fit each other, or the columns") from None
    if described.mock and (described.mock.count < 1 or not _DIGEST.fullmatch(described.mock.sha256)):
        raise ValueError("the mock has no records, or no SHA-256")
