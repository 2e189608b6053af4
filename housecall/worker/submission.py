"""`Submission`: a program together with whose values its inputs are: what an owner reads, approves, and lets run.

What must live here: where the inputs of a run come from, the digest of program and inputs together, and the text that
an owner reads. What must not: whether it may run (`gate`), and how (`plans`).

NOTE [What an input is]
- a *column* of an owned data set, whole and as it is;
- *brought*: it derives from nobody's data; whoever submits the program has it, and can make it what she likes;
- *made*: it derives from data that only programs may read, by a run of an accepted one, which is named by its digest,
  and so is which of the values that it makes. Or it was made with pointers, of data on which she may work so: then it
  is this value, of this session, and no other.
An approved program may go on from what its own runs have made, as if that had been brought in its place: a training
step's parameters. That gives nobody more than she has: were it released in between, she could bring it again. In the
place of what another program has made goes only what bears the name of that input. To any other program it is `made`,
and that is part of what is approved. So no approved program can be pointed at other columns, nor at what another
program has left.

NOTE [Of slots, not of storages]
A label is of a storage: to be private is catching. What may leave is not: a program whose outputs may leave can give a
view of what another one made, and that one stays. So what made a value is known of its slot, and only until the slot is
freed, or its storage is written to by way of another.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import NamedTuple

import msgspec

from ..errors import ProgramError
from ..owner.approvals import Approval
from ..program.call import Program, text
from ..program.flow import flow
from ..program.forecast import type_program
from ..program.ops import operator
from ..types import PUBLIC, Label, TensorType
from .store import Cell, Store

__all__ = ["Origin", "Source", "Submission", "Submissions"]

_PURPOSE = b"housecall submission 1\0"
# Of inputs, outputs, numbers: nothing that could pass for a program, a constant or another name.
_NAME = re.compile(r"(?=.{1,100}\Z)[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+|\[[0-9]{1,9}\])*", re.ASCII)

_MOST = 1_000  # submissions that a session remembers: beyond, the oldest is forgotten, and what it made is `made`

# Where an input comes from: ("column", data set, column, the data's identity), ("brought",), or ("made", digest, which
# of what that makes, data sets ...), where with an empty digest the second is the one value that is meant. An approval
# of one data set's records is none of those that replace them.
Source = tuple[str, ...]
BROUGHT: Source = ("brought",)


class Origin(NamedTuple):
    """What a value that derives from such data was made by: the run's digest, and the approvals that let out what all
    runs of that on the way to it gave. `None`: not all of them were approved with that. `behind`: all approvals on the
    way to it, also of other programs' runs: it may leave only as long as none of them was withdrawn or is over."""

    digest: str
    approvals: frozenset[str] | None = None
    behind: frozenset[str] = frozenset()


class Submission:
    """A program, and the source of each of its inputs, in their order; `labels` are theirs."""

    def __init__(self, program: Program, sources: tuple[Source, ...], labels: tuple[Label, ...]) -> None:
        self.program, self.sources, self._labels = program, sources, labels
        self.digest = hashlib.sha256(_PURPOSE + program.digest.encode() + msgspec.msgpack.encode(sources)).hexdigest()

    @cached_property
    def text(self) -> str:
        """What its owner reads. Raises `ProgramError` for names that could mislead her."""
        self._check_printed()
        lines = [f"submission  {self.digest}", f"program     {self.program.digest}", "", *self._inputs(), ""]
        return "\n".join([*lines, *self._outputs(), "", text(self._named())])

    @cached_property
    def shown(self) -> str:
        """The SHA-256 of the text: an approval is of the text that was read."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def _inputs(self) -> list[str]:
        lines = ["inputs"]
        for name, item, source in zip(self._names(), self.program.inputs, self.sources, strict=True):
            updated = ", updated" if item.updates else ""
            lines.append(f"  {name}: {item.type}{updated}: {_words(source)}")
        lines += [f"  {_number(name)}: a number, given anew with each run" for name, _ in self.program.numbers]
        if BROUGHT in self.sources:
            lines.append("  (brought: whoever submits this chooses it, or has it of an earlier run of just this)")
        if any(operator(call.op).random for call in self.program.calls):
            lines.append("  (random numbers: of a seed that whoever submits this chooses)")
        return lines

    def _outputs(self) -> list[str]:
        """What a run makes, and how much of it derives from whose data."""
        labels = self._flow()
        types = type_program(self.program)
        named = dict(zip((item.name for item in self.program.inputs), self._names(), strict=True))
        lines, values = ["what a run makes"], 0
        updated = [
            (f"{named[item.name]} (updated)", item.name, item.type) for item in self.program.inputs if item.updates
        ]
        made = [(name, name, types[name]) for name, _ in self.program.outputs]
        for shown, name, type_ in (*updated, *made):
            label = labels.get(name, PUBLIC)
            lines.append(f"  {shown}: {type_}: {f'of {label}' if label else 'of nobody'}")
            values += _count(type_) if label else 0
        return [*lines, f"  together {values:,} values that derive from owned data"]

    def _flow(self) -> dict[str, Label]:
        labels = {item.name: label for item, label in zip(self.program.inputs, self._labels, strict=True)}
        return flow(self.program, labels)

    def _names(self) -> list[str]:
        """What the inputs are called in print: a column by its own name, whatever else with where it comes from."""
        return [
            _column(*source[1:3]) if source[0] == "column" else f"{source[0]}/{item.name}"
            for item, source in zip(self.program.inputs, self.sources, strict=True)
        ]

    def _named(self) -> Program:
        inputs = [
            msgspec.structs.replace(item, name=name)
            for item, name in zip(self.program.inputs, self._names(), strict=True)
        ]
        numbers = tuple([(_number(name), ref) for name, ref in self.program.numbers])
        return msgspec.structs.replace(self.program, inputs=tuple(inputs), numbers=numbers)

    def _check_printed(self) -> None:
        """What is printed alike is the same. Raises `ProgramError`."""
        _check_names(self.program)
        known: dict[str, Source] = {}
        for name, source in zip(self._names(), self.sources, strict=True):
            if known.setdefault(name, source) != source:
                raise ProgramError(f"two inputs print as {name[:80]!r}: their owner could not tell them apart")


def _column(data_set: str, column: str) -> str:
    """What a column is called in print: not as the constant 1.5 prints, if that is what its owner calls it."""
    return f"{'data/' * data_set[0].isdigit()}{data_set}.{column}"


def _number(name: str) -> str:
    """What a number is called in print."""
    return f"number/{name}"


def _count(type_: TensorType) -> int:
    return math.prod(type_.shape)


def _words(source: Source) -> str:
    if source[0] == "column":
        return f"column '{source[2]}' of data set '{source[1]}'"
    if source == BROUGHT:
        return "brought"
    if source[1]:
        return f"made by the submission {source[1]} as '{source[2]}'"
    return "made of owned data with pointers: this one value, of this session"


def _check_names(program: Program) -> None:
    inputs = [item.name for item in program.inputs]
    for kind, names in (
        ("input", inputs),
        ("output", [name for name, _ in program.outputs]),
        ("number", [name for name, _ in program.numbers]),
    ):
        for name in names:
            if not _NAME.fullmatch(name):
                raise ProgramError(
                    f"{kind} {name[:80]!r}: an owner could misread that name; rename it: letters of ASCII, digits and "
                    "underscores, parts after dots, positions in brackets, at most 100 characters"
                )
        if len(set(names)) < len(names):
            raise ProgramError(f"two {kind}s have one name: an owner could not tell them apart; rename one")
    if {name for name, _ in program.outputs} & {item.name for item in program.inputs if item.updates}:
        raise ProgramError("an output has the name of an input that is updated; rename it")


class Submissions:
    """What one session has of data that only programs may read: which slots are columns, and what made the rest."""

    def __init__(self, store: Store, session: str) -> None:
        self._store, self._session = store, session
        # By binding (`Store.bindings`), not by slot: ids come again.
        self._columns: dict[int, tuple[Source, Cell]] = {}
        # With its name in that run, the storage, and how often that was written to.
        self._origins: dict[int, tuple[Origin, str, Cell, int]] = {}
        self._known: dict[str, Submission] = {}

    def lent(self, ref: int, data_set: str, column: str, identity: str) -> None:
        """A column was bound to a slot."""
        self._columns[self._store.bindings[ref]] = ("column", data_set, column, identity), self._store.cells[ref]

    def clear(self) -> None:
        """All slots were freed."""
        self._columns.clear()
        self._origins.clear()

    def origin(self, ref: int) -> Origin | None:
        """What made a slot's value; `None` where that was no single accepted program: see NOTE [Of slots]."""
        found = self._made(ref)
        return found[0] if found is not None else None

    def _made(self, ref: int) -> tuple[Origin, str] | None:
        """What made a slot's value, and what it was called there."""
        found = self._origins.get(self._store.bindings.get(ref, 0))
        if found is None:
            return None
        origin, name, cell, writes = found
        return (origin, name) if self._store.cells.get(ref) is cell and cell.writes == writes else None

    def of(self, program: Program, refs: tuple[int, ...], closed: Collection[str] = ()) -> Submission:
        """A program on these slots. Raises `ProgramError` for slots of other types than its inputs, for one memory
        where it says two, for names that do not say which value is meant, and for what nobody knows how it was made of
        `closed` data sets."""
        _check_names(program)
        self._check_types(program, refs)
        self._check_apart(program, refs)
        sources = tuple([self._source(ref) for ref in refs])
        self._check_known(program, refs, sources, closed)
        for digest in dict.fromkeys(source[1] for source in sources if source[0] == "made"):
            known = self._known.get(digest)
            if known is not None and known.program.digest == program.digest and _goes_on(known, sources):
                return known
        made = Submission(program, sources, tuple([self._store.label(ref) for ref in refs]))
        known = self._known.setdefault(made.digest, made)
        if len(self._known) > _MOST:
            del self._known[next(iter(self._known))]
        return known

    def after(self, submission: Submission, refs: tuple[int, ...], approval: Approval | None) -> Origin:
        """What a run of a submission on these slots makes its values of: they leave by its approval only if the runs of
        it that it goes on from were approved so. What another one made is an input that its owner read of; but all
        approvals behind it are remembered."""
        known = [origin for origin in map(self.origin, refs) if origin is not None]
        chain = [origin for origin in known if origin.digest == submission.digest]
        own = {approval.id} if approval is not None else set()
        behind = frozenset(own.union(*(origin.behind for origin in known)))
        if approval is None or not approval.release or any(origin.approvals is None for origin in chain):
            return Origin(submission.digest, None, behind)
        earlier = [origin.approvals for origin in chain if origin.approvals is not None]
        return Origin(submission.digest, frozenset(own.union(*earlier)), behind)

    def made(self, origin: Origin, program: Program, inputs: Iterable[int], outs: Iterable[int]) -> None:
        """An accepted run has made these slots, and changed those inputs that it updates."""
        names = {ref: name for ref, (name, _) in zip(outs, program.outputs, strict=False)}
        names |= {ref: item.name for item, ref in zip(program.inputs, inputs, strict=True) if item.updates}
        for ref, name in names.items():
            cell = self._store.cells.get(ref)
            if cell is not None and cell.label:
                self._origins[self._store.bindings[ref]] = origin, name, cell, cell.writes
        if len(self._origins) > 1_000 + 2 * len(self._store):
            alive = set(self._store.bindings.values())
            self._origins = {binding: made for binding, made in self._origins.items() if binding in alive}

    def _check_types(self, program: Program, refs: tuple[int, ...]) -> None:
        """An owner who reads that 64 rows are taken is not to find that it was one."""
        for item, ref in zip(program.inputs, refs, strict=True):
            spec = self._store.specs.get(ref)
            if spec is None or (spec.type.dtype, spec.type.shape) != (item.type.dtype, item.type.shape):
                found = "no value of this session" if spec is None else f"a {spec.type}"
                raise ProgramError(f"input '{item.name}' is {found}, expected a {item.type}")

    def _check_apart(self, program: Program, refs: tuple[int, ...]) -> None:
        """What is written to one input is not to change another: nobody could read that."""
        cells = [self._store.cells[ref] for ref in refs]
        for at, item in enumerate(program.inputs):
            if item.updates and cells.count(cells[at]) > 1:
                raise ProgramError(
                    f"input '{item.name}' is updated, and shares its memory with another: clone it first"
                )

    def _check_known(
        self, program: Program, refs: tuple[int, ...], sources: tuple[Source, ...], closed: Collection[str]
    ) -> None:
        """What no accepted run has left as it is cannot be described to its owner."""
        for item, ref, source in zip(program.inputs, refs, sources, strict=True):
            names = [name for name in self._store.label(ref).sources if name in closed]
            if names and source[:2] == ("made", ""):
                raise ProgramError(
                    f"input '{item.name}' derives from data set '{names[0]}', and is no longer what an accepted run "
                    "made: give what a run returned, or run that again"
                )

    def _source(self, ref: int) -> Source:
        cell = self._store.cells[ref]
        column = self._columns.get(self._store.bindings[ref]) if cell.label else None
        if column is not None and column[1] is cell and not cell.writes:
            return column[0]
        if not cell.label:
            return BROUGHT
        made = self._made(ref)
        if made is None:
            return ("made", "", f"{self._session}/{self._store.bindings[ref]}/{cell.writes}", *cell.label.sources)
        return ("made", made[0].digest, made[1], *cell.label.sources)


def _goes_on(known: Submission, sources: tuple[Source, ...]) -> bool:
    """Whether these are a submission's sources, or what its own runs have made in the place of what was brought, or,
    under the name of the input, of what was made."""
    return all(
        now == then
        or (now[:2] == ("made", known.digest) and (then == BROUGHT or (then[0] == "made" and now[2] == item.name)))
        for now, then, item in zip(sources, known.sources, known.program.inputs, strict=True)
    )
