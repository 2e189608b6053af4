"""The closed union of messages. A frame goes to a worker, one reply to each frame comes back.

What must live here: what may be asked and answered, as typed structs. What must not: torch, sockets, meaning.
Every tensor travels as an `Array`: its type and its elements. Within one process `data` is the tensor itself,
copied on write; on the wire it is raw little-endian bytes, within the message (few) or after it (a `Blob`).
There is no third form, and none of them is code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from ..program.call import Call, Program
from ..types import Struct, TensorType, Unit

__all__ = [
    "Ack",
    "Array",
    "Blob",
    "Bye",
    "Clear",
    "Column",
    "Control",
    "Define",
    "Describe",
    "Drop",
    "Evaluate",
    "Failure",
    "Fetch",
    "Found",
    "Frame",
    "Heard",
    "Hello",
    "Info",
    "Load",
    "Message",
    "Mock",
    "Mocked",
    "Noised",
    "Open",
    "Owned",
    "Put",
    "Refused",
    "Reply",
    "Request",
    "Requested",
    "Result",
    "Run",
    "Search",
    "Seed",
    "Statistic",
    "Statistics",
    "Status",
    "Submit",
    "Tag",
    "Types",
    "Update",
    "Updated",
    "Value",
    "Welcome",
]


Count = Annotated[int, msgspec.Meta(ge=0)]  # of frames, replies, records: never negative


class Blob(Struct, frozen=True, tag="blob", tag_field="t", gc=False):
    """Elements that follow the message: the next `size` bytes after it, in the order of its blobs."""

    size: int


if TYPE_CHECKING:
    Elements = Any  # within one process: a torch.Tensor, which this package does not know
else:
    Elements = bytes | Blob


class Array(Struct, frozen=True, tag="array", tag_field="t"):
    """A tensor on its way: `data` holds exactly the elements of `type`, never the rest of a storage. The type is
    left out within one process, where `data` is the tensor."""

    type: TensorType | None
    data: Elements


class Put(Struct, frozen=True, tag="put", tag_field="t"):
    """Store a tensor under a new id."""

    id: int
    value: Array


class Define(Struct, frozen=True, tag="define", tag_field="t"):
    """Keep a program for this session, to be run by its digest. One that `program.check` refuses is not kept."""

    program: Program


class Run(Struct, frozen=True, tag="run", tag_field="t"):
    """Run a program that was defined: `inputs` are slots in the order of its inputs, `outs` new ids in the order of its
    outputs, `numbers` in the order of its numbers. It does what its calls would do one by one: inputs that it updates
    are changed in place; if a call fails, so does what depends on it, and the others are done."""

    digest: str
    inputs: tuple[int, ...]
    outs: tuple[int, ...]
    numbers: tuple[float, ...] = ()


class Drop(Struct, frozen=True, tag="drop", tag_field="t", gc=False):
    """Nobody points at these ids any more. Stands in order among the calls, so memory is reused at once."""

    ids: tuple[int, ...]


class Heard(Struct, frozen=True, tag="heard", tag_field="t", gc=False):
    """The caller knows of the failures in the replies up to this frame. After a failure nothing is changed in place,
    until the caller has heard of it: she would not have gone on, had she known."""

    frame: Count


class Fetch(Struct, frozen=True, tag="fetch", tag_field="t"):
    """Ask for values: each leaves through the worker's `release`, or the reply says why not."""

    ids: tuple[int, ...]


class Describe(Struct, frozen=True, tag="describe", tag_field="t"):
    """Ask for the types of slots: for results whose shape the caller cannot know (`nonzero`)."""

    ids: tuple[int, ...]


class Seed(Struct, frozen=True, tag="seed", tag_field="t"):
    """The state of the caller's random generator: the session's draws continue from it."""

    state: Array


class Tag(Struct, frozen=True, tag="tag", tag_field="t"):
    """Name a slot, so that `Search` finds it: tags begin with '#', the description is free text."""

    id: int
    tags: tuple[str, ...]
    description: str


class Search(Struct, frozen=True, tag="search", tag_field="t"):
    """Which tagged slots of this session, and which of the worker's own data sets, carry all of these tags?"""

    tags: tuple[str, ...]


class Clear(Struct, frozen=True, tag="clear", tag_field="t"):
    """Free every slot of this session."""


class Column(Struct, frozen=True):
    """A column of an owned data set: `shape` is of one record."""

    name: str
    dtype: str
    shape: tuple[Count, ...]


class Open(Struct, frozen=True, tag="open", tag_field="t"):
    """What is the worker's own data set of this name? Its schema, no values."""

    name: str


class Load(Struct, frozen=True, tag="load", tag_field="t"):
    """Bind the columns of one of the worker's own data sets to new ids, in the order of its schema. They can be read
    and not be written. `count` and `columns` are what was found, perhaps long ago: where they are given, and the data
    set is another by now, nothing is bound."""

    name: str
    ids: tuple[int, ...]
    count: Count = 0
    columns: tuple[Column, ...] = ()


class Mock(Struct, frozen=True, tag="mock", tag_field="t"):
    """Ask for the mock of one of the worker's own data sets: records that its owner made up, or chose, for whoever
    finds it. Answered by `Mocked`. No message binds a mock to a slot: it never stands in the place of the data."""

    name: str


class Statistic(Struct, frozen=True):
    """What is to be counted, added up or averaged: one number of each record of `column`, the one at `index` if it has
    several. `bounds` are two, or the edges of a histogram; they are the asker's. A count of persons has no column."""

    kind: Literal["count", "sum", "mean", "histogram"]
    column: str = ""
    bounds: tuple[float, ...] = ()
    index: tuple[int, ...] = ()


class Statistics(Struct, frozen=True, tag="statistics", tag_field="t"):
    """Ask the owner's own code for a statistic of one of her data sets, with differential privacy, and let the budget
    of that data pay `epsilon` for it. Answered by `Noised`."""

    name: str
    statistic: Statistic
    epsilon: float


class Evaluate(Struct, frozen=True, tag="evaluate", tag_field="t"):
    """Ask the owner's own loop for the mean, over all records of one of her data sets, of what a program that was
    defined gives for one record, clamped to `bounds`. `inputs`, in the order of its inputs: a slot, or the name of a
    column, of which it is given one record, (1, ...). Answered by `Noised`. With `runs`: ask the owner to let this be
    made so many times, for a reason in words; answered by `Requested`."""

    name: str
    digest: str
    inputs: tuple[int | str, ...]
    bounds: tuple[float, float]
    reason: str = ""
    runs: Count = 0


class Update(Struct, frozen=True, tag="update", tag_field="t"):
    """Ask for the differences between these slots and those of `since`, in this order, through the stages that the
    policies of all data sets that they derive from demand. Answered by `Updated`."""

    ids: tuple[int, ...]
    since: tuple[int, ...]


class Request(Struct, frozen=True, tag="request", tag_field="t"):
    """Ask the worker's owner to let these values out, with a reason in words. Answered by `Requested`."""

    ids: tuple[int, ...]
    reason: str


class Submit(Struct, frozen=True, tag="submit", tag_field="t"):
    """Ask the worker's owner to let a program that was defined run on these slots, in the order of its inputs, `runs`
    times, with a reason in words. Answered by `Requested`."""

    digest: str
    ids: tuple[int, ...]
    reason: str
    runs: Count = 1


class Status(Struct, frozen=True, tag="status", tag_field="t"):
    """What has become of a request of one's own? Answered by `Requested`."""

    request: str


Message = (
    Request
    | Submit
    | Status
    | Put
    | Call
    | Define
    | Run
    | Drop
    | Heard
    | Fetch
    | Describe
    | Seed
    | Tag
    | Search
    | Clear
    | Open
    | Load
    | Mock
    | Statistics
    | Evaluate
    | Update
)


class Frame(Struct, frozen=True):
    """Messages in the order of issue; `number` counts the frames of a session from 1."""

    number: int
    messages: tuple[Message, ...]


class Failure(Struct, frozen=True, tag="failure", tag_field="t"):
    """Message `index` of frame `frame` failed; if it was a `Run`, its program's call of number `call` did, from 0.
    `writes`: it was to change a value in place, and did not, or not wholly."""

    frame: Count
    index: Count
    operator: str
    reason: str
    writes: bool
    call: Count | None = None


class Value(Struct, frozen=True, tag="value", tag_field="t"):
    """The answer to `Fetch`, in its order."""

    arrays: tuple[Array | Failure, ...]


class Types(Struct, frozen=True, tag="types", tag_field="t"):
    """The answer to `Describe`, in its order; `None` for a hole."""

    types: tuple[TensorType | Failure | None, ...]


class Info(Struct, frozen=True, tag="info", tag_field="t"):
    """A tagged slot."""

    id: int
    tensor: TensorType
    tags: tuple[str, ...]
    description: str


class Owned(Struct, frozen=True, tag="owned", tag_field="t"):
    """A data set that the worker's owner registered: what may be said of it without a value. `unit` is what its owner
    protects, `mock` the number of records of its mock, 0 if it has none."""

    name: str
    columns: tuple[Column, ...]
    count: Count
    tags: tuple[str, ...]
    description: str
    unit: Unit = "record"
    mock: Count = 0


class Found(Struct, frozen=True, tag="found", tag_field="t"):
    """The answer to `Search` and `Open`."""

    slots: tuple[Info, ...]
    owned: tuple[Owned, ...] = ()


class Mocked(Struct, frozen=True, tag="mocked", tag_field="t"):
    """The answer to `Mock`: its columns, in the order of the schema, all of one count of records."""

    columns: tuple[Array, ...]


class Noised(Struct, frozen=True, tag="noised", tag_field="t"):
    """The answer to `Statistics` and `Evaluate`: one value, or one for each bin; the scale of the Laplace noise in it;
    the epsilon that it cost, and how much the budget of the data has left."""

    values: tuple[float, ...]
    scale: float
    epsilon: float
    left: float


class Updated(Struct, frozen=True, tag="updated", tag_field="t"):
    """The answer to `Update`: each value of `since` and what left of its difference, and how much epsilon the budgets
    of the data have left."""

    arrays: tuple[Array, ...]
    left: float


class Requested(Struct, frozen=True, tag="requested", tag_field="t"):
    """A request as it stands: its id (empty where the policy needs nobody's answer), "pending", "approved" or "denied",
    the owner's words, if she gave any, and the digest of what was asked for."""

    request: str
    status: str
    words: str
    digest: str = ""


Result = Requested | Value | Types | Found | Mocked | Noised | Updated


class Reply(Struct, frozen=True):
    """The answer to the frame of the same number: one result for each message that asks, in order, and every failure.

    `undone`: which messages of this frame, and which calls of a `Run`, were to change a value in place and did not, for
    this or an earlier failure."""

    number: int
    results: tuple[Result, ...]
    failures: tuple[Failure, ...]
    undone: tuple[tuple[Count, Count | None], ...] = ()


# -- how a session begins, resumes and ends: between transport and worker, no caller sees these -------------


class Hello(Struct, frozen=True, tag="hello", tag_field="t"):
    """The first packet of every stream. `session` is empty for a new one, else the token that `Welcome` gave;
    `received` is the number of the last reply that came."""

    version: int
    session: str
    received: Count
    client: str


class Welcome(Struct, frozen=True, tag="welcome", tag_field="t"):
    """The worker's answer: the token to resume with, the number of the last frame that came, for how many seconds an
    absent client's session is kept, and how many bytes of tensors one frame may bring."""

    version: int
    session: str
    received: Count
    lease_s: float
    frame_bytes: Count
    worker: str


class Refused(Struct, frozen=True, tag="refused", tag_field="t"):
    """The worker's other answer, and its last: why it will not go on with this session."""

    code: Literal["version", "identity", "session", "draining", "protocol", "limit"]
    reason: str


class Ack(Struct, frozen=True, tag="ack", tag_field="t", gc=False):
    """Everything up to this number has come and need not be kept."""

    received: Count


class Bye(Struct, frozen=True, tag="bye", tag_field="t", gc=False):
    """The client ends the session: its slots may be freed now."""


Control = Hello | Welcome | Refused | Ack | Bye
