"""Attacks by raw frames on labels, shapes, errors, and on what is not a value: ids, tags, randomness, the table."""

from __future__ import annotations

from typing import Any

import torch
from hostile import SECRET, World, attack, call, named

from housecall.program.call import Call, Items, Symbol
from housecall.transport.arrays import share
from housecall.types import Ref
from housecall.wire.messages import Clear, Describe, Drop, Failure, Fetch, Load, Put, Search, Seed, Tag

X, Y, MINE, OUT = Ref(1), Ref(2), Ref(5), 10


# -- what derives from it -------------------------------------------------------------------------------------


def _derived(*calls: Call) -> Any:
    """Issue calls, with zeros of her own at %5, and fetch %10."""

    def attack(world: World) -> Any:
        world.put(5, torch.zeros(6, 4))
        world.done(*calls)
        return world.taken(OUT)

    return attack


DERIVED = {
    "permute": call("permute.default", X, Items((1, 0))),
    "t": call("t.default", X),
    "expand": call("expand.default", X, Items((2, 6, 4))),
    "select": call("select.int", X, 0, 3),
    "slice": call("slice.Tensor", X, 0, 1, 3),
    "unfold": call("unfold.default", X, 0, 2, 2),
    "view": call("view.default", X, Items((24,))),
    "diagonal": call("diagonal.default", X),
    "squeeze": call("squeeze.default", X),
    "split": Call("split.Tensor", (X, 6), {}, (10,)),
    "unsqueeze": call("unsqueeze.default", X, 0),
    "cat": call("cat.default", Items((MINE, X))),
    "stack": call("stack.default", Items((MINE, X))),
    "where": call("where.self", Ref(6), MINE, X),
    "mean": call("mean.default", X),
    "max": Call("max.dim", (X, 0), {}, (10, 11)),
    "argmax": call("argmax.default", X),
    "embedding": call("embedding.default", MINE, Y),
    "index": call("index.Tensor", MINE, Items((Y,))),
    "comparison": call("gt.Scalar", X, 7010.0),
    "isnan": call("isnan.default", X),
    "scalar_tensor_operand": call("mul.Tensor", MINE, Ref(7)),
    "equal": call("equal.default", X, X),
    "zeros_like": call("zeros_like.default", X),
    "foreach": Call("_foreach_add.List", (Items((MINE,)), Items((X,))), {}, (10,)),
    "double_clone": call("clone.default", X),
}
for _name, _call in DERIVED.items():
    _steps = {
        "where": (call("isnan.default", MINE, outs=(6,)),),
        "scalar_tensor_operand": (
            call("select.int", X, 0, 0, outs=(8,)),
            call("select.int", Ref(8), 0, 0, outs=(7,)),
        ),
    }.get(_name, ())
    if _name == "equal":  # a truth about private elements is refused before it is a value
        continue
    _views = (
        "permute", "t", "expand", "select", "slice", "unfold", "view", "diagonal", "squeeze", "split", "unsqueeze"
    )  # fmt: skip
    named(f"raw_get_of_{_name}", _derived(*_steps, _call), "door", "aliases" if _name in _views else "labels")
named("raw_get_of_the_column", lambda world: world.taken(1), "door")
named("raw_get_in_a_long_list", lambda world: world.taken(*([1] * 5000)), "door")


def _written(*calls: Call) -> Any:
    def attack(world: World) -> Any:
        world.put(5, torch.zeros(6, 4))
        world.done(*calls)
        return world.taken(5)

    return attack


WRITES = {
    "add_": (Call("add_.Tensor", (MINE, X), {}, ()),),
    "copy_": (Call("copy_.default", (MINE, X), {}, ()),),
    "out": (Call("add.out", (X, X), {"out": MINE}, ()),),
    "addcmul_": (Call("addcmul_.default", (MINE, X, X), {}, ()),),
    "lerp_": (Call("lerp_.Scalar", (MINE, X, 0.5), {}, ()),),
    "view_then_copy_": (
        call("t.default", MINE),
        call("t.default", X, outs=(11,)),
        Call("copy_.default", (Ref(10), Ref(11)), {}, ()),
    ),
    "row_then_fill_": (
        call("select.int", MINE, 0, 0),
        call("select.int", X, 0, 0, outs=(11,)),
        call("select.int", Ref(11), 0, 0, outs=(12,)),
        Call("fill_.Tensor", (Ref(10), Ref(12)), {}, ()),
    ),
    "index_put_": (Call("index_put_.default", (MINE, Items((Y,)), X), {}, ()),),
    "scatter_": (
        call("unsqueeze.default", Y, 1),
        Call("scatter_.value", (MINE, 1, Ref(10), 1.0), {}, ()),
    ),
    "index_add_": (Call("index_add_.default", (MINE, 0, Y, X), {}, ()),),
    "foreach_copy_": (Call("_foreach_copy_.default", (Items((MINE,)), Items((X,))), {}, ()),),
    "foreach_out_alias": (
        call("view.default", MINE, Items((6, 4))),
        Call("_foreach_add_.List", (Items((Ref(10),)), Items((X,))), {}, ()),
    ),
}
for _name, _calls in WRITES.items():
    named(f"raw_write_by_{_name}", _written(*_calls), "door", "write labels")

_STATISTICS = {
    "native_batch_norm": (True, 1.0, 1e-5),
    "_native_batch_norm_legit": (True, 1.0, 1e-5),
    "_batch_norm_with_update": (1.0, 1e-5),
}


def _statistics(name: str) -> Any:
    outs = (10, 11, 12, 13) if name == "_batch_norm_with_update" else (10, 11, 12)

    def attack(world: World) -> Any:
        world.done(Put(5, share(torch.zeros(4))), *(Put(ref, share(torch.ones(4))) for ref in (6, 7)))
        world.done(Call(f"{name}.default", (X, Ref(7), Ref(7), MINE, Ref(6), *_STATISTICS[name]), {}, outs))
        return world.taken(5, 6)

    return attack


for _name in _STATISTICS:  # the first one's schema does not say that it writes
    _guard = "unsaid writes" if _name == "native_batch_norm" else "write labels"
    named(f"running_statistics_of_{_name}", _statistics(_name), "door", _guard)


def _overwritten(*calls: Call) -> Any:
    """Whether the owner's data is changed."""

    def attack(world: World) -> Any:
        world.put(5, torch.zeros(6, 4))
        world.frame(Put(6, share(torch.ones(6, 6))), Put(7, share(torch.ones(6))), *calls)
        kept = world.worker.catalogue.columns("heart")["x"]
        return None if torch.equal(kept, world.secret) else kept

    return attack


named("overwrites_the_owners_data", _overwritten(Call("zero_.default", (X,), {}, ())), "lent")
named(
    "overwrites_a_view_of_the_owners_data",
    _overwritten(
        call("t.default", X),
        Call("copy_.default", (Ref(10), Ref(10)), {}, ()),
        Call("zero_.default", (Ref(10),), {}, ()),
    ),
    "lent",
)
named("overwrites_the_owners_data_by_out", _overwritten(Call("add.out", (MINE, MINE), {"out": X}, ())), "lent")
named(
    "overwrites_the_owners_data_by_foreach",
    _overwritten(Call("_foreach_zero_.default", (Items((X,)),), {}, ())),
    "lent",
)
named(
    "overwrites_the_owners_data_by_statistics",
    _overwritten(
        call("select.int", X, 1, 0, outs=(8,)),
        Call("native_batch_norm.default", (Ref(6), None, None, Ref(8), Ref(7), True, 1.0, 1e-5), {}, (10, 11, 12)),
    ),
    "unsaid writes",
)


# -- shapes, errors, and refusals -----------------------------------------------------------------------------

ZEROS = torch.zeros(6, 4)


def _pair(first: torch.Tensor, second: torch.Tensor, *, labels: bool = False) -> tuple[World, World]:
    return (World(y=first), World(y=second)) if labels else (World(first), World(second))


def _telling(first: torch.Tensor, second: torch.Tensor, *messages: Any, labels: bool = False) -> Any:
    """Whether two worlds that differ in private values alone can be told apart by what a session is told."""

    def attack(world: World) -> Any:
        mine = (Put(5, share(torch.zeros(6, 4))), Put(6, share(torch.ones(6, 4))))
        return world.told(
            _pair(first, second, labels=labels), *mine, *messages, Describe((10, 11, 12)), Fetch((10, 5)), Search(())
        )

    return attack


GOOD, BAD = torch.arange(6) % 3, torch.tensor([0, 1, 2, 0, 1, 99])
SHAPES: dict[str, tuple[torch.Tensor, torch.Tensor, tuple[Call, ...]]] = {
    "nonzero": (GOOD, GOOD * 0, (call("nonzero.default", Y),)),
    "unique": (GOOD, GOOD * 0, (Call("_unique2.default", (Y,), {}, (10, 11, 12)),)),
    "unique_consecutive": (GOOD, GOOD * 0, (Call("unique_consecutive.default", (Y,), {}, (10, 11, 12)),)),
    "repeat_interleave": (GOOD, GOOD * 0, (call("repeat_interleave.Tensor", Y),)),
    "bincount": (GOOD, BAD, (call("bincount.default", Y),)),
    "masked_select": (GOOD, GOOD * 0, (call("gt.Scalar", Y, 1, outs=(9,)), call("masked_select.default", Y, Ref(9)))),
    "boolean_index": (
        GOOD,
        GOOD * 0,
        (call("gt.Scalar", Y, 1, outs=(9,)), call("index.Tensor", Y, Items((Ref(9),)))),
    ),
    "repeats_of_another": (GOOD, GOOD * 0, (call("repeat_interleave.self_Tensor", MINE, Y, 0),)),
    "nonzero_of_a_comparison": (
        GOOD,
        GOOD * 0,
        (call("gt.Scalar", Y, 1, outs=(9,)), call("nonzero.default", Ref(9))),
    ),
    "rows_that_are_alike": (GOOD, GOOD * 0, (Call("unique_dim.default", (Y, 0), {}, (10, 11, 12)),)),
    "allclose": (GOOD, GOOD + 1, (call("allclose.default", Y, MINE),)),
    "equal": (GOOD, GOOD + 1, (call("equal.default", Y, Y),)),
    "histogram": (GOOD, BAD, (Call("histogram.bins_tensor", (Y, Y), {}, (10, 11)),)),
    "a_polynomials_degree": (GOOD, BAD * 10**9, (call("special_hermite_polynomial_h.default", Y, Y),)),
}
_LABELLED = {"allclose", "equal", "histogram"}
for _name, (_first, _second, _calls) in SHAPES.items():
    named(
        f"shape_of_{_name}",
        _telling(_first, _second, *_calls, labels=True),
        *(() if _name in _LABELLED else ("labels",) if _name == "a_polynomials_degree" else ("shapes",)),
        because="also where it runs, what it gives is a labelled value like any other" if _name in _LABELLED else "",
    )

EYE = torch.eye(4)
SQUARE = torch.cat([EYE, ZEROS[:2]])  # the first four rows make a matrix
LIKE: dict[str, tuple[torch.Tensor, torch.Tensor, bool, tuple[Call, ...]]] = {
    "index_select": (GOOD, BAD, True, (call("index_select.default", MINE, 0, Y),)),
    "embedding": (GOOD, BAD, True, (call("embedding.default", MINE, Y),)),
    "index": (GOOD, BAD, True, (call("index.Tensor", MINE, Items((Y,))),)),
    "take": (GOOD, BAD, True, (call("take.default", MINE, Y),)),
    "gather": (GOOD, BAD, True, (call("unsqueeze.default", Y, 1, outs=(9,)), call("gather.default", MINE, 1, Ref(9)))),
    "nll_loss": (GOOD, BAD, True, (Call("nll_loss_forward.default", (MINE, Y, None, 1, -100), {}, (10, 11)),)),
    "scatter": (
        GOOD,
        BAD,
        True,
        (call("unsqueeze.default", Y, 1, outs=(9,)), call("scatter.value", MINE, 1, Ref(9), 1.0)),
    ),
    "index_add_": (GOOD, BAD, True, (Call("index_add_.default", (MINE, 0, Y, Ref(6)), {}, ()),)),
    "index_put_": (GOOD, BAD, True, (Call("index_put_.default", (MINE, Items((Y,)), Ref(6)), {}, ()),)),
    "division_by_zero": (GOOD + 1, GOOD * 0, True, (call("floor_divide.default", Y, Y),)),
    "negative_power": (GOOD, -GOOD, True, (call("pow.Tensor_Tensor", Y, Y),)),
    "cholesky": (
        SQUARE,
        -SQUARE,
        False,
        (
            call("slice.Tensor", X, 0, 0, 4, outs=(9,)),
            Call("linalg_cholesky_ex.default", (Ref(9),), {"check_errors": True}, (10, 11)),
        ),
    ),
    "inverse": (
        SQUARE,
        ZEROS,
        False,
        (
            call("slice.Tensor", X, 0, 0, 4, outs=(9,)),
            Call("linalg_inv_ex.default", (Ref(9),), {"check_errors": True}, (10, 11)),
        ),
    ),
    "binary_cross_entropy": (ZEROS, ZEROS - 1, False, (call("binary_cross_entropy.default", X, Ref(6)),)),
    "multinomial": (ZEROS + 1, ZEROS - 1, False, (call("multinomial.default", X, 1),)),
    "bernoulli": (ZEROS, ZEROS + 2, False, (call("bernoulli.default", X),)),
    "normal": (ZEROS, ZEROS - 1, False, (call("normal.Tensor_Tensor", X, X),)),
}
for _name, (_first, _second, _integers, _calls) in LIKE.items():
    _tells = _telling(_first, _second, *_calls, call("add.Tensor", Ref(10), 1.0, outs=(20,)), labels=_integers)
    named(
        f"error_of_{_name}",
        _tells,
        "labels" if _name == "negative_power" else "hidden failures",  # that one's failure is torch's type check
    )

for _name, _special in {"nan": float("nan"), "inf": float("inf"), "-0": -0.0, "denormal": 1e-42}.items():
    named(
        f"values_with_{_name}_look_alike",
        _telling(
            ZEROS,
            torch.full((6, 4), _special),
            call("sum.default", X),
            call("copysign.Tensor", Ref(6), X, outs=(11,)),
            Fetch((11,)),
        ),
        "door",
    )
named("refusals_depend_on_values", _telling(ZEROS, SECRET, call("exp.default", X), Fetch((1, 10, 2))), "door")
named(
    "a_private_failure_is_described",
    _telling(GOOD, BAD, call("embedding.default", MINE, Y), call("t.default", Ref(10), outs=(11,)), labels=True),
    "hidden failures",
)
named(
    "a_failed_slot_is_searched_for",
    _telling(GOOD, BAD, call("embedding.default", MINE, Y), Tag(10, ("#it",), "it"), Search(("#it",)), labels=True),
    "hidden failures",
)
named(
    "a_slot_freed_after_a_failure",
    _telling(GOOD, BAD, call("embedding.default", MINE, Y), Drop((10,)), Drop((10,)), Describe((10,)), labels=True),
    "hidden failures",
)

named(
    "strides_after_a_decomposition_that_failed",
    _telling(SECRET, ZEROS * float("nan"), Call("_linalg_svd.default", (X, False, True), {}, (10, 11, 12))),
    "settled",
)

# -- randomness ------------------------------------------------------------------------------------------------

STATE = torch.Generator().manual_seed(0).get_state()
RANDOM = {
    "poisson": (ZEROS, ZEROS + 100, call("poisson.default", X)),
    "multinomial_that_fails": (ZEROS + 1, ZEROS - 1, call("multinomial.default", X, 1)),
    "gamma": (ZEROS + 1, ZEROS + 0.1, call("_standard_gamma.default", X)),
    "bernoulli_that_fails": (ZEROS, ZEROS + 2, call("bernoulli.default", X)),
}
for _name, (_first, _second, _draw) in RANDOM.items():
    named(
        f"generator_after_{_name}",
        _telling(
            _first, _second, Seed(share(STATE)), _draw, call("rand.default", Items((8,)), outs=(11,)), Fetch((11,))
        ),
        "drawn",
    )


# -- ids, tags, dangerous names ---------------------------------------------------------------------------------


@attack("labels")
def attack_a_tag_carries_a_value(world: World) -> Any:
    """Tags are the scientist's own words; a description of what derives from data holds nothing of it."""
    world.done(call("mean.default", X), Tag(10, ("#m",), "mean"))
    found = world.done(Search(("#m",)))
    text = repr(found)
    return text if "70" in text else world.taken(10)


@attack("bound")
def attack_puts_onto_a_bound_id(world: World) -> Any:
    """A mock swap: what the owner approved by one id is another value."""
    world.frame(Put(1, share(torch.zeros(6, 4))))
    return None if torch.equal(world.door.store[1], SECRET) else world.door.store[1]


@attack("bound once")
def attack_loads_onto_a_bound_id(world: World) -> Any:
    world.put(5, torch.zeros(2))
    world.frame(Load("heart", (5, 6)), Load("heart", (1, 2)), Load("heart", (7, 7)), Load("heart", (0, -1)))
    return (
        None if torch.equal(world.door.store[5], torch.zeros(2)) and set(world.door.store.tensors()) == {1, 2, 5} else 1
    )


@attack("bound once")
def attack_binds_a_calls_result_twice(world: World) -> Any:
    world.put(5, torch.zeros(2))
    world.frame(call("clone.default", X, outs=(5,)), call("clone.default", MINE, outs=(1,)))
    same = torch.equal(world.door.store[5], torch.zeros(2)) and torch.equal(world.door.store[1], SECRET)
    return None if same else world.door.store[5]


@attack("bound")
def attack_strange_ids(world: World) -> Any:
    reply = world.frame(
        call("clone.default", X, outs=(0,)), call("clone.default", X, outs=(-3,)), Put(0, share(ZEROS)),
        Put(-1, share(ZEROS)), Fetch((0, -1, -3, 1 << 62)),
    )  # fmt: skip
    (fetched,) = reply.results
    return None if all(isinstance(item, Failure) for item in fetched.arrays) else fetched


@attack(because="ids are keys of a session's own dict: there is no way to say another's")
def attack_another_sessions_ids(world: World) -> Any:
    other = world.opened("mallory", load=False)
    world.done(call("clone.default", X))
    return world.taken(1, 2, 10, door=other)


@attack(because="what was freed is not there to be taken")
def attack_clear_makes_nothing_public(world: World) -> Any:
    world.done(call("clone.default", X), Clear())
    return world.taken(1, 10)


@attack("door")
def attack_drop_and_load_again(world: World) -> Any:
    world.done(Drop((1,)), Drop((2,)), Load("heart", (1, 2)), call("clone.default", X))
    return world.taken(1, 10)


@attack(because="torch refuses it, and so does the table's check, and its labels would count all")
def attack_arguments_given_twice(world: World) -> Any:
    """A keyword beside its position: which of both is labelled?"""
    world.put(5, torch.zeros(6, 4))
    world.frame(
        Call("add.Tensor", (MINE, MINE), {"other": X}, (10,)), Call("relu.default", (MINE,), {"self": X}, (11,))
    )
    return world.taken(10, 11)


@attack("table")
def attack_memory_that_others_left(world: World) -> Any:
    world.frame(Call("empty.memory_format", (Items((64,)),), {}, (10,)))
    return world.taken(10)


_TAKES_STORAGE = {
    "as_strided": Call("as_strided.default", (MINE, Items((4,)), Items((1,))), {}, (10,)),
    "set_": Call("set_.source_Tensor", (MINE, X), {}, ()),
    "resize_": Call("resize_.default", (MINE, Items((64,))), {}, ()),
}
for _name, _call in _TAKES_STORAGE.items():

    def _storage(world: World, call: Call = _call) -> Any:
        world.put(5, torch.zeros(6, 4))
        reply = world.frame(call)
        return None if reply.failures else reply

    if _name == "resize_":
        named(f"the_operator_{_name}", _storage, because="the table has none, and the meter lets nothing grow in place")
    else:
        named(f"the_operator_{_name}", _storage, "table")

for _name in (
    "from_file.default", "record_stream.default", "empty_strided.default", "new_empty.default", "set_.source_Storage",
    "_resize_output_.default", "swap_tensors.default", "data_ptr.default", "_print.default", "manual_seed.default",
    "_lazy_clone.default", "_to_dlpack.default", "to_sparse.default", "_values.default", "py_eval.default", "os.system",
    "__class__.default", "add.__call__", "../add.Tensor", "add.Tensor\n", "",
):  # fmt: skip

    def _named(world: World, op: str = _name) -> Any:
        reply = world.frame(Call(op, (X,), {}, (10,)))
        return None if reply.failures and world.taken(10) is None else reply

    named(
        f"the_name_{_name!r}", _named, because="the closed table has no such name, and nothing else gives it a meaning"
    )


@attack(because="no such device is known to the worker, and what it made would have a label")
def attack_a_symbol_for_a_device(world: World) -> Any:
    """`meta` and other places have no values that the worker accounts for."""
    places = ("meta", "cuda:0", "/etc/passwd")
    calls = [
        Call("_to_copy.default", (X,), {"device": Symbol("device", place)}, (20 + at,))
        for at, place in enumerate(places)
    ]
    world.frame(*calls)
    return world.taken(20, 21, 22)
