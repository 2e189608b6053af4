"""Limits at the door: what is too large is refused before it runs, the session goes on, honest work too.

Most calls here are written by hand, since an attacker does not use pointers.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from housecall.errors import OperatorError
from housecall.owned.catalogue import Catalogue
from housecall.owner.ledger import Ledger
from housecall.owner.policy import Policy
from housecall.pointers.location import Location
from housecall.pointers.session import Session
from housecall.pointers.tensor import send
from housecall.program.bounds import BOUNDED
from housecall.program.call import HOLE, Call, Complex, Items, Symbol
from housecall.program.forecast import forecast
from housecall.program.ops import operator, table
from housecall.program.run import computing, overload
from housecall.program.trust import REFUSED
from housecall.transport.memory import MemoryTransport
from housecall.types import Label, Ref
from housecall.wire.messages import (
    Array,
    Describe,
    Drop,
    Failure,
    Fetch,
    Frame,
    Heard,
    Load,
    Message,
    Open,
    Put,
    Reply,
    Search,
    Tag,
    Value,
)
from housecall.worker.gate import Gate
from housecall.worker.limits import ENTRY, QUESTIONS, TEXT, UNLIMITED, Limits
from housecall.worker.worker import Worker, WorkerSession

MB = 1_000_000
SMALL = Limits(session_bytes=8 * MB, slots=50, call_bytes=4 * MB, call_flops=10**9, compute_s=None, reply_bytes=8 * MB)


def session(limits: Limits = SMALL, **replaced: Any) -> WorkerSession:
    return Worker("w", msgspec.structs.replace(limits, **replaced)).open("mallory")


def array(value: Any) -> Array:
    return Array(None, value if isinstance(value, torch.Tensor) else torch.tensor(value))


def call(op: str, *args: Any, outs: Any = (), **kwargs: Any) -> Call:
    return Call(op, tuple(map(_arg, args)), {k: _arg(v) for k, v in kwargs.items()}, outs if outs != () else ())


def _arg(value: Any) -> Any:
    return Items(tuple(map(_arg, value))) if isinstance(value, list | tuple) else value


def say(door: WorkerSession, *messages: Message) -> Reply:
    door.handle(Frame(1, (Heard(1),)))  # of whatever failed before
    return door.handle(Frame(1, messages))


def reasons(door: WorkerSession, *messages: Message) -> list[str]:
    return [failure.reason for failure in say(door, *messages).failures]


def refused(door: WorkerSession, *messages: Message, match: str = "LimitError") -> str:
    """The one failure that these messages give; afterwards the session still works."""
    found = reasons(door, *messages)
    assert len(found) == 1, found
    assert match in found[0], found[0]
    alive(door)
    return found[0]


def alive(door: WorkerSession) -> None:
    reply = say(
        door,
        Put(10**6, array([1.0, 2.0])),
        call("add.Tensor", Ref(10**6), 1.0, outs=(10**6 + 1,)),
        Fetch((10**6 + 1,)),
        Drop((10**6,)),
        Drop((10**6 + 1,)),
    )
    assert reply.failures == ()
    result = reply.results[0]
    assert isinstance(result, Value)
    assert torch.equal(result.arrays[0].data, torch.tensor([2.0, 3.0]))  # type: ignore[union-attr]


X, Y, Z, MASK, INDEX, EMPTY = (Ref(n) for n in (1, 2, 3, 4, 5, 6))


@pytest.fixture
def door() -> Iterator[WorkerSession]:
    """A session of small limits with a few small tensors; nothing may be left of it at the end."""
    found = session()
    found.handle(
        Frame(
            1,
            (
                Put(1, array(torch.ones(1000))),
                Put(2, array(torch.ones(1))),
                Put(3, array(torch.ones(30, 30))),
                Put(4, array(torch.ones(1, dtype=torch.bool))),
                Put(5, array(torch.tensor([2**40]))),
                Put(6, array(torch.ones(0, 3))),
                Put(7, array(2**40)),
            ),
        )
    )
    yield found
    say(found, *[Drop((ref,)) for ref in list(found.store)])
    assert found.store.held == 0
    assert not found.store.specs
    assert not found.store.cells


HUGE = 10**9
BOMBS: dict[str, tuple[Call, ...]] = {
    "expand and add": (call("expand.default", Y, [HUGE], outs=(20,)), call("add.Tensor", Ref(20), 1, outs=(21,))),
    "expand and add two": (
        call("view.default", X, [1, 1000], outs=(20,)),
        call("view.default", X, [1000, 1, 1], outs=(21,)),
        call("expand.default", Ref(20), [1000, 1000], outs=(22,)),
        call("add.Tensor", Ref(22), Ref(21), outs=(23,)),
    ),
    "expand and clone": (call("expand.default", Y, [HUGE], outs=(20,)), call("clone.default", Ref(20), outs=(21,))),
    "expand and sum": (
        call("expand.default", Y, [2**20, 2**20, 2**19], outs=(20,)),
        call("sum.default", Ref(20), outs=(21,)),
    ),
    "expand and equal": (
        call("expand.default", Y, [2**20, 2**20], outs=(20,)),
        call("equal.default", Ref(20), Ref(20), outs=(21,)),
    ),
    "expand and fill": (
        call("expand.default", Y, [2**20, 2**20], outs=(20,)),
        Call("fill_.Scalar", (Ref(20), 1.0), {}, ()),
    ),
    "expand, nonzero": (
        call("expand.default", MASK, [2**20, 2**20], outs=(20,)),
        call("nonzero.default", Ref(20), outs=(21,)),
    ),
    "expand, masked_select": (
        call("expand.default", MASK, [10**6], outs=(20,)),
        call("masked_select.default", Y, Ref(20), outs=(21,)),
    ),
    "index by an expanded mask": (
        call("expand.default", MASK, [10**6], outs=(20,)),
        call("expand.default", Y, [10**6, 1000], outs=(21,)),
        call("index.Tensor", Ref(21), [Ref(20)], outs=(22,)),
    ),
    "index": (
        call("zeros.default", [1], dtype=Symbol("dtype", "int64"), outs=(20,)),
        call("expand.default", Ref(20), [HUGE], outs=(21,)),
        call("index.Tensor", X, [Ref(21)], outs=(22,)),
    ),
    "embedding": (
        call("zeros.default", [1], dtype=Symbol("dtype", "int64"), outs=(20,)),
        call("expand.default", Ref(20), [400_000], outs=(21,)),
        call("embedding.default", Z, Ref(21), outs=(22,)),
    ),
    "unique": (call("expand.default", Y, [10**6], outs=(20,)), call("_unique2.default", Ref(20), outs=(21, 22, 23))),
    "repeat": (call("repeat.default", X, [10**6], outs=(20,)),),
    "cat": (call("cat.default", [X] * 2000, outs=(20,)),),
    "stack": (call("stack.default", [X] * 2000, outs=(20,)),),
    "bincount": (call("bincount.default", INDEX, outs=(20,)),),
    "bincount, minlength": (
        call("zeros.default", [1], dtype=Symbol("dtype", "int64"), outs=(20,)),
        call("bincount.default", Ref(20), None, 2**40, outs=(21,)),
    ),
    "repeat_interleave.Tensor": (call("repeat_interleave.Tensor", INDEX, outs=(20,)),),
    "repeat_interleave whose sum wraps around": (
        call("full.default", [4], 2**62, dtype=Symbol("dtype", "int64"), outs=(20,)),
        call("repeat_interleave.Tensor", Ref(20), outs=(21,)),
    ),
    "repeat_interleave.self_Tensor": (call("repeat_interleave.self_Tensor", Y, INDEX, outs=(20,)),),
    "repeat_interleave.self_int": (call("repeat_interleave.self_int", X, 10**6, outs=(20,)),),
    "full": (call("full.default", [HUGE], 1.0, outs=(20,)),),
    "zeros": (call("zeros.default", [HUGE], outs=(20,)),),
    "zeros on a device": (call("zeros.default", [HUGE], device=Symbol("device", "cpu"), outs=(20,)),),
    "new_zeros": (call("new_zeros.default", X, [HUGE], outs=(20,)),),
    "arange": (call("arange.default", 2**40, outs=(20,)),),
    "arange.start_step": (call("arange.start_step", 0, 1.0, 1e-9, outs=(20,)),),
    "linspace": (call("linspace.default", 0, 1, 2**40, outs=(20,)),),
    "eye": (call("eye.default", 2**20, outs=(20,)),),
    "randperm": (call("randperm.default", 2**40, outs=(20,)),),
    "rand": (call("rand.default", [2**40], outs=(20,)),),
    "unfold and clone": (
        call("cat.default", [X] * 10, outs=(19,)),
        call("unfold.default", Ref(19), 0, 5000, 1, outs=(20,)),
        call("clone.default", Ref(20), outs=(21,)),
    ),
    "im2col": (
        call("view.default", Z, [1, 1, 30, 30], outs=(20,)),
        call("im2col.default", Ref(20), [3000, 3000], [1, 1], [3000, 3000], [1, 1], outs=(21,)),
    ),
    "pad": (call("constant_pad_nd.default", X, [HUGE, 0], outs=(20,)),),
    "interpolate": (
        call("view.default", Z, [1, 1, 30, 30], outs=(20,)),
        call("upsample_nearest2d.default", Ref(20), [10**5, 10**5], outs=(21,)),
    ),
    "interpolate by a scale": (
        call("view.default", Z, [1, 1, 30, 30], outs=(20,)),
        call("upsample_nearest2d.vec", Ref(20), None, [10**4 * 1.0, 10**4 * 1.0], outs=(21,)),
    ),
    "convolution, padding": (
        call("view.default", Z, [1, 1, 30, 30], outs=(20,)),
        call(
            "convolution.default", Ref(20), Ref(20), None, [1, 1], [10**5, 10**5], [1, 1], False, [0, 0], 1, outs=(21,)
        ),
    ),
    "cdist": (
        call("view.default", X, [1000, 1], outs=(20,)),
        call("repeat.default", Ref(20), [5, 1], outs=(21,)),
        call("_cdist_forward.default", Ref(21), Ref(21), 2.0, None, outs=(22,)),
    ),
    "one_hot of a huge class, as pointers write it": (
        call("zeros.default", [10, 10**9], dtype=Symbol("dtype", "int64"), outs=(20,)),
    ),
    "histogram": (call("histc.default", X, 2**40, outs=(20,)),),
    "histogram.bin_ct": (call("histogram.bin_ct", X, 2**40, outs=(20, 21)),),
    "mvlgamma": (call("mvlgamma.default", X, 10**12, outs=(20,)),),
    "mvlgamma of a large order": (call("mvlgamma.default", X, 10**6, outs=(20,)),),
    "convolution whose columns are large": (
        call("zeros.default", [1, 1, 300, 300], dtype=Symbol("dtype", "float64"), outs=(20,)),
        call("zeros.default", [1, 1, 150, 150], dtype=Symbol("dtype", "float64"), outs=(21,)),
        call("convolution.default", Ref(20), Ref(21), None, [100, 1], [0, 0], [1, 1], False, [0, 0], 1, outs=(22,)),
    ),
    "diag_embed": (call("cat.default", [X] * 10, outs=(20,)), call("diag_embed.default", Ref(20), outs=(21,))),
    "a polynomial of huge degree": (call("special_chebyshev_polynomial_t.n_scalar", Y, 2.0**60, outs=(20,)),),
    "a polynomial of huge degrees": (call("special_laguerre_polynomial_l.default", Y, INDEX, outs=(20,)),),
    "a polynomial of many degrees": (
        call("expand.default", Y, [2**40], outs=(20,)),
        call("special_legendre_polynomial_p.x_scalar", 0.5, Ref(20), outs=(21,)),
    ),
    "a long matrix product": (
        call("zeros.default", [900, 900], outs=(20,)),
        call("mm.default", Ref(20), Ref(20), outs=(21,)),
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name: str, door: WorkerSession) -> None:
    *before, last = BOMBS[name]
    assert reasons(door, *before) == []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(door, last)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kB: nothing of the size was made


def test_a_refusal_says_what_and_how_much_and_what_to_do(door: WorkerSession) -> None:
    said = refused(door, call("zeros.default", [2 * MB], outs=(20,)))
    assert said == (
        "LimitError: zeros.default would make or go through 8,000,000 bytes, and one call may 4,000,000: do it in parts"
    )
    held = door.store.held
    refused(door, call("zeros.default", [MB], outs=(22,)), call("zeros.default", [MB], outs=(23,)))
    said = reasons(door, call("zeros.default", [MB], outs=(24,)))[0]
    assert said.startswith("LimitError: zeros.default would make 4,000,000 bytes: this session holds")
    assert f"{held + 4 * MB:,} of the 8,000,000 that it may; let go of tensors" in said


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("a long matrix product", "mm.default would take some 1.5e+09 operations, and one call may take 1.0e+09"),
        ("a polynomial of huge degree", "operations"),
        ("expand and sum", "would make or go through"),
        ("mvlgamma of a large order", "would make or go through 8,000,000,000 bytes"),
        ("convolution whose columns are large", "would make or go through 54,360,000 bytes"),
    ],
)
def test_a_bomb_is_refused_for_the_right_reason(name: str, match: str, door: WorkerSession) -> None:
    *before, last = BOMBS[name]
    reasons(door, *before)
    refused(door, last, match=match)


def test_numbers_that_would_wrap_around_are_refused(door: WorkerSession) -> None:
    for size in ([2**62], [2**40, 2**40], [2**63 - 1], [-(2**62)]):
        found = reasons(door, call("zeros.default", size, outs=(30,)), Drop((30,)))
        assert len(found) == 1, size
    assert reasons(door, call("expand.default", Y, [2**40, 2**40], outs=(30,)), Drop((30,))) != []
    assert "LimitError" in reasons(door, call("expand.default", Y, [2**61], outs=(31,)), Drop((31,)))[0]
    alive(door)


def test_a_tensor_of_very_many_dimensions_is_refused(door: WorkerSession) -> None:
    for op in ("view.default", "expand.default", "repeat.default"):
        refused(door, call(op, Y, [1] * 10_000, outs=(20,)), match="dimensions")


def test_an_empty_dimension_hides_nothing(door: WorkerSession) -> None:
    """[10**12, 0] has no elements; an operator that loops over the first dimension would still never end."""
    assert reasons(door, call("zeros.default", [10**12, 0], outs=(20,))) == []
    refused(door, call("sum.dim_IntList", Ref(20), [1], outs=(21,)))
    refused(
        door, call("unbind.int", Ref(20), 0, outs=(22, 23)), match="ProgramError: unbind.int gives 1,000,000,000,000"
    )
    alive(door)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("unbind.int", (0,)),
        ("unbind_copy.int", (0,)),
        ("split.Tensor", (1,)),
        ("unsafe_split.Tensor", (1, 0)),
    ],
)
def test_more_results_than_ids_are_refused_before_they_are_made(
    op: str, args: tuple[Any, ...], door: WorkerSession
) -> None:
    assert reasons(door, call("expand.default", Y, [10**9], outs=(20,))) == []
    refused(door, call(op, Ref(20), *args, outs=(21, 22)), match="results, and 2 ids")


def test_doubling_by_cat_hits_the_quota(door: WorkerSession) -> None:
    ref = 1
    found: list[str] = []
    while not found:
        found = reasons(door, call("cat.default", [Ref(ref), Ref(ref)], outs=(ref + 100,)))
        ref += 100
        assert ref < 10_000
    assert "LimitError" in found[0]
    assert door.store.held <= 8 * MB
    alive(door)


def test_what_went_over_the_limit_is_named_to_whoever_reads_it(door: WorkerSession) -> None:
    reply = say(
        door,
        call("full.default", [HUGE], 1.0, outs=(20,)),
        call("neg.default", Ref(20), outs=(21,)),
        Fetch((21,)),
    )
    assert [failure.operator for failure in reply.failures] == ["full.default", "full.default"]
    result = reply.results[0]
    assert isinstance(result, Value)
    assert isinstance(result.arrays[0], Failure)
    assert "4,000,000,000 bytes" in result.arrays[0].reason


# -- whose memory it is -----------------------------------------------------------------------------------


def test_a_view_keeps_the_charge_of_its_base() -> None:
    """Make 4 MB, view it, drop the base, and again: the third time there is no room."""
    door = session()
    for turn in range(2):
        base, view = 10 + turn, 20 + turn
        assert (
            reasons(
                door,
                call("zeros.default", [MB], outs=(base,)),
                call("slice.Tensor", Ref(base), 0, 0, 1, outs=(view,)),
                Drop((base,)),
            )
            == []
        )
        assert door.store.held == 4 * MB * (turn + 1)
    alive_needs = reasons(door, call("zeros.default", [MB], outs=(12,)), Drop((12,)))
    assert "this session holds 8,000,000 of the 8,000,000" in alive_needs[0]
    say(door, Drop((20,)))
    assert door.store.held == 4 * MB
    assert reasons(door, call("zeros.default", [MB], outs=(13,))) == []


@pytest.mark.parametrize(
    "view",
    [
        call("view.default", Ref(1), [-1], outs=(2,)),
        call("split.Tensor", Ref(1), 500, outs=(2, 3)),
        call("expand.default", Ref(1), [5, 1000], outs=(2,)),
        call("unsqueeze.default", Ref(1), 0, outs=(2,)),
        call("slice.Tensor", Ref(1), 0, 0, 5, outs=(2,)),
    ],
    ids=lambda found: found.op,
)
def test_an_alias_costs_nothing_and_keeps_the_charge(view: Call) -> None:
    door = session()
    assert reasons(door, Put(1, array(torch.ones(1000))), view) == []
    assert door.store.held == 4000
    assert len({id(door.store.cells[ref]) for ref in door.store}) == 1
    say(door, Drop((1,)))
    assert door.store.held == 4000
    say(door, Drop((2,)), Drop((3,)))
    assert door.store.held == 0


@pytest.mark.parametrize(
    "copy",
    [
        call("_to_copy.default", Ref(2), dtype=Symbol("dtype", "int32"), outs=(3,)),
        call("clone.default", Ref(2), outs=(3,)),
    ],
    ids=lambda found: found.op,
)
def test_a_copy_is_charged_for_itself(copy: Call) -> None:
    door = session()
    assert reasons(door, Put(1, array(torch.ones(10, 100))), call("t.default", Ref(1), outs=(2,)), copy) == []
    assert door.store.held == 8000
    say(door, Drop((1,)), Drop((2,)))
    assert door.store.held == 4000


def test_a_list_of_results_is_charged_once_for_each_storage() -> None:
    door = session()
    split = call("split_with_sizes_copy.default", Ref(1), [5, 5], outs=(2, 3))
    assert reasons(door, Put(1, array(torch.ones(10, 10))), split) == []
    assert door.store.held == 800
    assert reasons(door, call("native_layer_norm.default", Ref(1), [10], None, None, 1e-5, outs=(4, HOLE, HOLE))) == []
    assert door.store.held == 1200


def test_clearing_ends_every_charge() -> None:
    door = session()
    say(door, Put(1, array(torch.ones(10))), call("view.default", Ref(1), [2, 5], outs=(2,)))
    door.store.clear()
    assert (door.store.held, door.store.specs, door.store.cells) == (0, {}, {})
    alive(door)


def test_what_is_put_is_charged_too() -> None:
    door = session()
    assert reasons(door, Put(1, array(torch.zeros(MB)))) == []
    said = refused(door, Put(2, array(torch.zeros(MB + 1))))
    assert "put would make 4,000,004 bytes: this session holds 4,000,000 of the 8,000,000" in said


def test_what_the_owner_lends_is_free_and_not_to_be_written() -> None:
    door = session()
    with computing():
        door.store.lend(1, torch.zeros(5 * MB), Label(("heart",)))
    assert door.store.held == 0
    assert reasons(door, call("slice.Tensor", Ref(1), 0, 0, 10, outs=(2,))) == []
    assert "'self' is the owner's data" in reasons(door, call("add_.Tensor", Ref(2), 1))[0]
    assert "is the owner's data" in reasons(door, Call("_foreach_add_.Scalar", (Items((Ref(2),)), 1), {}, ()))[0]
    assert reasons(door, call("clone.default", Ref(2), outs=(3,)), call("add_.Tensor", Ref(3), 1)) == []
    assert door.store.held == 40
    assert not door.store[1].any()


def test_loading_takes_slots_and_answers_take_room() -> None:
    catalogue = Catalogue()
    catalogue.register("heart", {"x": torch.zeros(MB), "y": torch.zeros(MB)}, description="d" * 5000)
    gate = Gate({"heart": Policy.open_to("me")}, ledger=Ledger())
    door = Worker("w", msgspec.structs.replace(SMALL, reply_bytes=30_000), catalogue=catalogue, gate=gate).open("me")
    assert reasons(door, Load("heart", (1, 2))) == []
    assert door.store.held == 0
    assert "bound already" in reasons(door, Load("heart", (2, 3)))[0]
    found = reasons(door, *[Load("heart", (2 * n, 2 * n + 1)) for n in range(2, 40)])
    assert "load needs a slot" in found[0]
    assert len(door.store) <= 50
    assert len(say(door, *[Open("heart")] * 20).results) == 5
    assert len(say(door, *[Search(())] * 20).results) == 5


# -- slots ------------------------------------------------------------------------------------------------


def test_many_tiny_slots_are_refused() -> None:
    door = session()
    say(door, Put(1, array(1.0)))
    found = reasons(door, *[call("add.Tensor", Ref(1), 1, outs=(ref,)) for ref in range(2, 60)])
    assert len(found) == 9
    assert found[0] == (
        "LimitError: add.Tensor needs a slot: this session holds 50 of the 50 that it may; "
        "let go of tensors that you no longer need"
    )
    assert len(door.store) == 50
    later = say(door, call("neg.default", Ref(55), outs=(70,)), Fetch((56,)))
    assert "needs a slot" in later.failures[0].reason
    assert "needs a slot" in later.results[0].arrays[0].reason  # type: ignore[union-attr]
    assert len(reasons(door, Put(80, array(1.0)))) == 1
    say(door, Drop((2,)), Drop((3,)), Drop((4,)))
    alive(door)


def test_failures_take_slots_too() -> None:
    door = session()
    reasons(door, *[call("neg.default", Ref(999), outs=(ref,)) for ref in range(1, 500)])
    assert len(door.store) == 50
    assert all(len(failed.failure.reason) <= TEXT for failed in door.store.values())


def test_a_call_needs_room_for_all_that_it_binds() -> None:
    door = session()
    say(door, Put(1, array(torch.ones(60))))
    assert "needs a slot" in reasons(door, call("unbind.int", Ref(1), outs=tuple(range(2, 62))))[0]
    say(door, *[Drop((ref,)) for ref in range(2, 62)])
    alive(door)


# -- ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outs", [(1,), (-5,)])
def test_an_id_is_bound_once_and_positive(outs: tuple[int, ...], door: WorkerSession) -> None:
    before = door.store[1]
    refused(door, call("neg.default", X, outs=outs), match="ProgramError: %")
    assert door.store[1] is before
    refused(door, Put(outs[0], array(3.0)), match="ProgramError: %")
    assert door.store[1] is before
    assert outs[0] not in door.store or outs[0] == 1


@pytest.mark.parametrize("outs", [(20, 20), (20, 1), (-1, 20)])
def test_several_ids_are_bound_once_and_positive(outs: tuple[int, ...], door: WorkerSession) -> None:
    refused(door, call("max.dim", X, 0, outs=outs), match="ProgramError: %")
    assert isinstance(door.store[1], torch.Tensor)


def test_a_hole_binds_nothing(door: WorkerSession) -> None:
    held = door.store.held
    assert reasons(door, call("neg.default", X, outs=(HOLE,)), call("max.dim", X, 0, outs=(HOLE, HOLE))) == []
    assert door.store.held == held
    assert HOLE not in door.store
    assert "ProgramError" in reasons(door, Put(HOLE, array(1.0)))[0]


# -- calls that no honest client writes -------------------------------------------------------------------


@pytest.mark.parametrize(
    "found",
    [
        call("t_.default", Z),
        call("squeeze_.default", Z),
        call("unsqueeze_.default", Z, 0),
        call("transpose_.default", Z, 0, 1),
    ],
    ids=lambda found: found.op,
)
def test_an_operator_that_reshapes_a_slot_is_refused(found: Call, door: WorkerSession) -> None:
    refused(door, found, match="changes the shape of a slot")
    assert door.store[3].shape == (30, 30)


@pytest.mark.parametrize(
    "found",
    [
        call("add.out", X, Y, out=Y),
        call("maximum.out", X, Y, out=EMPTY),
    ],
    ids=lambda found: found.op,
)
def test_an_out_of_another_size_is_refused(found: Call, door: WorkerSession) -> None:
    held = {ref: (value.shape, value.untyped_storage().nbytes()) for ref, value in door.store.tensors().items()}
    refused(door, found, match="would change '")
    assert {ref: (v.shape, v.untyped_storage().nbytes()) for ref, v in door.store.tensors().items()} == held


def test_an_out_of_the_right_size_is_written(door: WorkerSession) -> None:
    assert reasons(door, call("add.out", X, Y, out=X)) == []
    assert door.store[1].eq(2).all()


@pytest.mark.parametrize(
    "found",
    [
        call("neg.default", Ref(777), outs=(20,)),
        call("neg.default", Ref(0), outs=(20,)),
        call("neg.default", outs=(20,)),
        call("neg.default", None, outs=(20,)),
        call("neg.default", 1, outs=(20,)),
        call("neg.default", X, X, X, outs=(20,)),
        call("neg.default", X, 1, 2.0, True, outs=(20,)),
        call("neg.default", X, self=X, outs=(20,)),
        call("neg.default", X, nonsense=X, outs=(20,)),
        call("neg.default", X),
        call("neg.default", X, outs=(20, 21)),
        call("cat.default", [], outs=(20,)),
        call("cat.default", [[[X]]], outs=(20,)),
        call("stack.default", X, outs=(20,)),
        call("nonzero.default", "x", outs=(20,)),
        call("bincount.default", X, None, Complex(1.0, 2.0), outs=(20,)),
        call("repeat_interleave.Tensor", [1, 2], outs=(20,)),
        call("split.Tensor", X, None, outs=(20,)),
        call("unbind.int", X, "0", outs=(20,)),
        call("unbind.int", 5, 0, outs=(20,)),
        call("special_chebyshev_polynomial_t.n_scalar", X, float("inf"), outs=(20,)),
        call("zeros.default", [1], device=Symbol("device", "meta"), outs=(20,)),
        call("zeros.default", [1], device=Symbol("device", "cuda:99"), outs=(20,)),
        call("zeros.default", [1], dtype=Symbol("dtype", "os"), outs=(20,)),
        call("zeros.default", "x" * 10_000, outs=(20,)),
        call("einsum.default", "x" * 10_000, [X], outs=(20,)),
        call("as_strided.default", X, [10], [1], outs=(20,)),
        call("resize_.default", X, [HUGE]),
        call("set_.source_Storage", X, X),
        call("no such operator", X, outs=(20,)),
        call("add.Tensor\x00", X, X, outs=(20,)),
        call("mm.default", Z, X, outs=(20,)),
        call("index_fill_.int_Scalar", Z, 0, X, 1),
    ],
    ids=lambda found: found.op,
)
def test_nonsense_is_a_failure_and_nothing_more(found: Call, door: WorkerSession) -> None:
    assert len(reasons(door, found)) == 1
    alive(door)


def test_arguments_of_another_shape_are_another_key(door: WorkerSession) -> None:
    """What was typed for one call is not believed of another that only looks alike."""
    assert reasons(door, call("sum.dim_IntList", Z, [0], outs=(20,))) == []
    assert reasons(door, Call("sum.dim_IntList", (Z,), {"dim": Items((0, 1))}, (21,))) == []
    assert door.store[21].shape == ()
    assert door.store.specs[21].size == ()
    assert reasons(door, call("arange.default", 5, outs=(22,)), call("arange.default", 500, outs=(23,))) == []
    assert door.store.specs[23].size == (500,)
    assert reasons(door, call("full.default", [3], 1, outs=(24,)), call("full.default", [3], 1.0, outs=(25,))) == []
    assert [door.store.specs[ref].type.dtype for ref in (24, 25)] == ["int64", "float32"]
    assert reasons(door, call("repeat_interleave.self_int", Z, 1, 0, outs=(26,))) == []
    refused(door, call("repeat_interleave.self_int", Z, 10**6, 0, outs=(27,)), match="would make")
    for ref, value in door.store.tensors().items():
        assert door.store.specs[ref].size == value.shape


def test_an_error_of_torch_is_told_in_its_own_words(door: WorkerSession) -> None:
    said = reasons(door, Put(20, array(torch.ones(2, 3))), call("mm.default", Ref(20), Ref(20), outs=(21,)))
    assert said[0].startswith("RuntimeError: ")
    assert "3" in said[0]


# -- replies ----------------------------------------------------------------------------------------------


def test_a_view_that_would_be_filled_up_does_not_leave(door: WorkerSession) -> None:
    """Windows of windows: few elements at the worker, very many in a reply."""
    say(door, call("cat.default", [X] * 10, outs=(20,)), call("unfold.default", Ref(20), 0, 5000, 1, outs=(21,)))
    found = say(door, Fetch((21,))).results[0]
    assert isinstance(found, Value)
    assert "LimitError: fetch would take 100,020,000 bytes" in found.arrays[0].reason  # type: ignore[union-attr]
    alive(door)


def test_what_is_repeated_leaves_once(door: WorkerSession) -> None:
    found = say(door, call("expand.default", Y, [2**40], outs=(20,)), Fetch((20,))).results[0]
    assert isinstance(found, Value)
    assert found.arrays[0].data.untyped_storage().nbytes() == 4  # type: ignore[union-attr]


def test_one_value_is_not_fetched_without_end(door: WorkerSession) -> None:
    assert reasons(door, call("zeros.default", [MB // 2], outs=(20,))) == []
    found = say(door, *[Fetch((20,))] * 10)
    told = [isinstance(result.arrays[0], Failure) for result in found.results]  # type: ignore[union-attr]
    assert told == [False] * 3 + [True] * 7
    assert told.count(False) * (2 * MB + ENTRY) <= 8 * MB
    assert isinstance(say(door, Fetch((20,))).results[0].arrays[0], Array)  # type: ignore[union-attr]


def test_a_question_about_very_many_slots_is_refused(door: WorkerSession) -> None:
    for message in (Fetch((1,) * (QUESTIONS + 1)), Describe((1,) * (QUESTIONS + 1))):
        refused(door, message)


def test_tags_are_short(door: WorkerSession) -> None:
    refused(door, Tag(1, ("#a",), "x" * 3000))
    assert reasons(door, Tag(1, ("#a",), "x" * 1000)) == []
    found = say(door, *[Search(("#a",))] * 20_000)
    assert 0 < len(found.results) < 10_000
    assert "the answer would take" in found.failures[0].reason
    say(door, Drop((1,)))
    assert not door.store.tags


def test_a_reason_is_short(door: WorkerSession) -> None:
    found = say(door, call("x" * 100_000, outs=(20,)))
    assert len(found.failures[0].reason) <= TEXT
    assert len(found.failures[0].operator) <= TEXT


# -- time -------------------------------------------------------------------------------------------------


def test_computing_time_is_counted_and_ends() -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    door = Worker("w", Limits(compute_s=5.0), clock=clock).open("me")
    calls = [call("neg.default", Ref(1), outs=(ref,)) for ref in range(2, 9)]
    found = door.handle(Frame(1, (Put(1, array(1.0)), *calls)))
    assert [failure.index for failure in found.failures] == [5, 6, 7]
    assert found.failures[0].reason == (
        "LimitError: neg.default was not run: this session has used up its 5 s of computing time; "
        "what it holds can still be fetched"
    )
    value = say(door, Fetch((2,))).results[0]
    assert isinstance(value, Value)
    assert value.arrays[0].data == -1  # type: ignore[union-attr]


def test_time_between_slices_is_not_counted() -> None:
    now = [0.0]
    door = Worker("w", Limits(), clock=lambda: now[0]).open("me")
    steps = door.work(Frame(1, (Put(1, array(1.0)), call("neg.default", Ref(1), outs=(2,)), Fetch((2,)))))
    for _ in range(3):
        with computing():
            next(steps)
        now[0] += 100.0
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value.results[0].arrays[0].data == -1
    assert door.meter is not None
    assert door.meter.spent == 0


@pytest.mark.parametrize("limits", [UNLIMITED, Limits()], ids=["free", "metered"])
def test_work_in_steps_is_handle(limits: Limits) -> None:
    messages = (Put(1, array([1.0, 2.0])), call("neg.default", Ref(1), outs=(2,)), call("x", outs=(3,)), Fetch((2, 3)))
    whole = Worker("w", limits).open("me").handle(Frame(7, messages))
    steps = Worker("w", limits).open("me").work(Frame(7, messages))
    count = 0
    with computing():
        while True:
            try:
                next(steps)
            except StopIteration as end:
                parts = end.value
                break
            count += 1
    assert count == len(messages)
    assert parts.number == whole.number == 7
    assert parts.failures == whole.failures
    assert torch.equal(parts.results[0].arrays[0].data, whole.results[0].arrays[0].data)


# -- each limit stands alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["session_bytes", "slots", "call_bytes", "call_flops", "compute_s", "reply_bytes"])
def test_each_limit_can_stand_alone(name: str) -> None:
    door = session(msgspec.structs.replace(UNLIMITED, **{name: getattr(Limits(), name)}))
    assert door.meter is not None
    alive(door)


def test_without_limits_there_is_no_meter() -> None:
    door = Worker("w").open("me")
    assert door.meter is None
    alive(door)
    assert door.store.cells == {}


def test_sessions_do_not_share_what_they_learned() -> None:
    worker = Worker("w", Limits())
    one, other = worker.open("a"), worker.open("b")
    alive(one)
    assert one.meter is not None
    assert other.meter is not None
    assert one.meter._forecasts
    assert not other.meter._forecasts
    say(one, Put(1, array(torch.ones(100))))
    assert other.store.held == 0


# -- what torch cannot size -------------------------------------------------------------------------------

# Operators of the table that have no meta kernel, and no bound in `program.bounds`: a worker with limits refuses them.
UNSIZED: set[str] = set()
_META = ("Meta", "CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")


def has_meta_kernel(name: str) -> bool:
    function: Any = overload(name)
    in_python = {torch._C.DispatchKey.Meta, torch._C.DispatchKey.CompositeImplicitAutograd} & set(function.py_kernels)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return bool(in_python) or any(has(function.name(), key) for key in _META)


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the list is of torch 2.13")
def test_the_list_of_what_cannot_be_sized_is_what_torch_says() -> None:
    unsized = {
        name
        for name in table()
        if not has_meta_kernel(name)
        and name not in BOUNDED
        and not operator(name).in_place
        and name.partition(".")[0] not in REFUSED
    }
    assert sorted(unsized) == sorted(UNSIZED)


def test_every_dynamic_operator_has_a_bound() -> None:
    dynamic = {name for name in table() if operator(name).dynamic and name.partition(".")[0] not in REFUSED}
    assert sorted(dynamic - BOUNDED) == []
    assert sorted(BOUNDED - set(table())) == []


# -- bounds hold ------------------------------------------------------------------------------------------


def _bounded() -> list[Any]:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    x, i = torch.randn(2, 3), torch.tensor([3, 1, 2])
    return [
        ("nonzero.default", [mask], {}),
        ("masked_select.default", [x, mask], {}),
        ("index.Tensor", [x, [mask]], {}),
        ("index.Tensor", [x, [None, torch.tensor([True, False, True])]], {}),
        ("index.Tensor", [x, [torch.tensor([[0, 1], [1, 0]]), torch.tensor([True, False, True])]], {}),
        ("_unique.default", [i, True, True], {}),
        ("_unique2.default", [i, True, True, True], {}),
        ("unique_dim.default", [x, 0, True, True, True], {}),
        ("unique_consecutive.default", [i, True, True], {}),
        ("bincount.default", [i], {}),
        ("bincount.default", [i, None, 50], {}),
        ("repeat_interleave.Tensor", [i], {}),
        ("repeat_interleave.self_Tensor", [x, torch.tensor([4, 5])], {"dim": 0}),
        ("repeat_interleave.self_Tensor", [x, torch.tensor([9])], {}),
        ("linalg_lstsq.default", [torch.randn(5, 3), torch.randn(5, 40)], {}),
        ("linalg_lstsq.default", [torch.randn(3, 50), torch.randn(3, 40)], {"driver": "gelsd"}),
        ("histogram.bin_ct", [torch.randn(20), 30], {}),
        ("geqrf.default", [torch.randn(5, 4)], {}),
    ]


@pytest.mark.parametrize(("op", "args", "kwargs"), _bounded(), ids=lambda part: part if isinstance(part, str) else "")
def test_a_bound_is_not_below_what_is_made(op: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    values: dict[int, Any] = {}

    def sent(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            values[len(values) + 1] = value
            return Ref(len(values))
        return [sent(item) for item in value] if isinstance(value, list) else value

    result = overload(op)(*args, **kwargs)
    made = [item for item in (result if isinstance(result, tuple | list) else [result]) if item is not None]
    outs = tuple(range(100, 100 + len(made)))
    found = forecast(call(op, *[sent(arg) for arg in args], outs=outs, **kwargs), values, 1e18, 1e18)
    storages = {item.untyped_storage()._cdata: item.untyped_storage().nbytes() for item in made}
    assert sum(storages.values()) <= found.fresh
    assert not found.lasting


# -- honest work ------------------------------------------------------------------------------------------


class Limited(Location):
    """A worker with limits in this process, as pointers know it."""

    def __init__(self, limits: Limits) -> None:
        self.door = Worker("clinic", limits).open("me")
        super().__init__("clinic", Session(MemoryTransport(self.door, name="clinic"), self))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(4 * 4 * 50, 500), nn.Linear(500, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return F.log_softmax(self.fc2(x), dim=1)


def train(worker: Any) -> list[float]:
    torch.manual_seed(0)
    model: Any = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(3, 8, 1, 28, 28), torch.randint(0, 10, (3, 8))
    losses = []
    for batch, target in zip(x, y, strict=True):
        if worker is not None:
            model.send(worker)
            batch, target = send(batch, worker), send(target, worker)
        optimizer.zero_grad()
        loss = F.nll_loss(model(batch), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if worker is not None:
            model.get()
    return losses


def test_honest_training_runs_under_the_default_limits() -> None:
    worker = Limited(Limits())
    assert train(worker) == train(None)
    gc.collect()
    worker.session.wait()
    assert worker.door.store.held == sum(cell.nbytes for cell in set(worker.door.store.cells.values()))


def test_a_pointer_that_goes_over_the_limit_says_where() -> None:
    worker = Limited(SMALL)
    x = send(torch.ones(1000), worker)
    with pytest.raises(OperatorError, match=r"LimitError: repeat\.default would make") as caught:
        x.repeat(10**6).sum().item()
    assert "x.repeat(10**6)" in str(caught.value)
    assert x.sum().item() == 1000
    assert x[x > 0].shape == (1000,)


def test_a_loop_of_pointers_leaves_no_charge() -> None:
    worker = Limited(SMALL)
    x = send(torch.ones(1000), worker)
    for _ in range(20):
        view = (x + 1).reshape(10, 100).t()[0]
        view.add_(1)
    del view
    worker.session.wait()
    assert worker.door.store.held == 4000
    assert len(worker.door.store) == 1
