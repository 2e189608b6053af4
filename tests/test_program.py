"""What may be said: the printed form, the digest, the rules, and that running a program is running torch."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from housecall.errors import ProgramError, UnknownOperator
from housecall.pointers.tensor import PointerTensor
from housecall.program import run as run_module
from housecall.program.call import HOLE, Call, Complex, Input, Items, Program, Symbol, call_text, refs
from housecall.program.check import check, check_call
from housecall.program.forecast import type_program
from housecall.program.outcome import spec
from housecall.program.run import Randomness, run
from housecall.program.typing import DTYPES, type_of
from housecall.types import Ref, TensorType

FIXED = settings(deadline=None, database=None, derandomize=True)  # the same examples in every run


def typed(*shape: int, dtype: str = "float32") -> TensorType:
    return type_of(torch.empty(shape, dtype=DTYPES[dtype], device="cpu"))


def call(op: str, *args: Any, outs: tuple[int, ...] = (), **kwargs: Any) -> Call:
    return Call(op, args, kwargs, outs)


X, W, B = Ref(1), Ref(2), Ref(3)


def one(*calls: Call, outputs: tuple[tuple[str, int], ...] = ()) -> Program:
    """A program of one input, x: float32[3]."""
    return Program((Input("x", 1, typed(3)),), calls, outputs)


def mlp() -> Program:
    return Program(
        inputs=(
            Input("x", 1, typed(5, 4)),
            Input("w1", 2, typed(6, 4)),
            Input("b1", 3, typed(6)),
            Input("w2", 4, typed(3, 6)),
            Input("y", 5, typed(5, dtype="int64")),
        ),
        calls=(
            call("t.default", Ref(2), outs=(10,)),
            call("addmm.default", Ref(3), Ref(1), Ref(10), outs=(11,)),
            call("relu.default", Ref(11), outs=(12,)),
            call("t.default", Ref(4), outs=(13,)),
            call("mm.default", Ref(12), Ref(13), outs=(14,)),
            call("_log_softmax.default", Ref(14), 1, False, outs=(15,)),
            call("nll_loss_forward.default", Ref(15), Ref(5), None, 1, -100, outs=(16, HOLE)),
        ),
        outputs=(("loss", 16), ("logits", 14)),
    )


def mlp_values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (5, 4), "w1": (6, 4), "b1": (6,), "w2": (3, 6)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return values | {"y": torch.randint(0, 3, (5,), generator=generator)}


# -- printed form -----------------------------------------------------------------------------------------


def test_a_program_prints_as_it_reads() -> None:
    assert str(mlp()) == (
        "program(x: float32[5, 4], w1: float32[6, 4], b1: float32[6], w2: float32[3, 6], y: int64[5]) {\n"
        "  %5 = t.default(w1)\n"
        "  %6 = addmm.default(b1, x, %5)\n"
        "  %7 = relu.default(%6)\n"
        "  %8 = t.default(w2)\n"
        "  %9 = mm.default(%7, %8)\n"
        "  %10 = _log_softmax.default(%9, 1, False)\n"
        "  %11, _ = nll_loss_forward.default(%10, y, None, 1, -100)\n"
        "  return loss=%11, logits=%9\n"
        "}"
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (call("max.dim", X, 1, outs=(7, HOLE), keepdim=True), "%7, _ = max.dim(%1, 1, keepdim=True)"),
        (call("add_.Tensor", X, W), "add_.Tensor(%1, %2)"),
        (call("cat.default", Items((X, None, Items((1, 2))))), "cat.default([%1, None, [1, 2]])"),
        (call("mul.Scalar", X, Complex(1.0, -2.0), outs=(3,)), "%3 = mul.Scalar(%1, (1-2j))"),
        (
            call("_to_copy.default", X, outs=(3,), dtype=Symbol("dtype", "float64")),
            "%3 = _to_copy.default(%1, dtype=float64)",
        ),
        (
            call("div.Tensor_mode", X, W, outs=(3,), rounding_mode="floor"),
            "%3 = div.Tensor_mode(%1, %2, rounding_mode='floor')",
        ),
        (call("mul.Scalar", X, 1.0, outs=(3,)), "%3 = mul.Scalar(%1, 1.0)"),
    ],
)
def test_a_call_prints_as_it_reads(found: Call, expected: str) -> None:
    assert call_text(found) == expected


def test_types_print_shape_and_place() -> None:
    assert str(typed(64, 10)) == "float32[64, 10]"
    assert str(typed()) == "float32[]"
    assert str(TensorType("bool", (2,), (1,), device="cuda:1")) == "bool[2] @cuda:1"


def test_an_output_that_nothing_binds_is_visible_in_print() -> None:
    assert "return y=%?9" in str(one(outputs=(("y", 9),)))


def test_refs_reads_lists_in_order() -> None:
    assert refs(Items((W, 3, Items((X, B)), None))) == [2, 1, 3]
    assert refs(5) == []


# -- digest -----------------------------------------------------------------------------------------------


def test_equal_programs_have_equal_digests() -> None:
    assert mlp() == mlp()
    assert mlp().digest == mlp().digest
    assert len(bytes.fromhex(mlp().digest)) == 32


def test_the_order_of_keyword_arguments_is_no_difference() -> None:
    one_way = Call("sum.dim_IntList", (X, 0), {"keepdim": True, "dtype": Symbol("dtype", "float64")}, (2,))
    other = Call("sum.dim_IntList", (X, 0), dict(reversed(one_way.kwargs.items())), (2,))
    assert one(one_way).digest == one(other).digest


def test_any_change_changes_the_digest() -> None:
    def program(
        name: str = "x",
        type_: TensorType = typed(3),  # noqa: B008  # frozen
        op: str = "add.Scalar",
        arg: Any = 1,
        kwargs: Any = None,
        out: int = 2,
        outputs: Any = (("y", 2),),
        twice: bool = False,
    ) -> Program:
        calls = (Call(op, (X, arg), kwargs or {}, (out,)),) * (1 + twice)
        return Program((Input(name, 1, type_),), calls, outputs)

    changed = [
        program(),
        program(name="z"),
        program(type_=typed(4)),
        program(type_=typed(3, dtype="float64")),
        program(type_=TensorType("float32", (3,), (2,))),
        program(type_=TensorType("float32", (3,), (1,), 1)),
        program(type_=TensorType("float32", (3,), (1,), device="cuda")),
        program(type_=TensorType("float32", (3,), (1,), conj=True)),
        program(type_=TensorType("float32", (3,), (1,), neg=True)),
        program(op="sub.Scalar"),
        program(arg=2),
        program(arg=1.0),
        program(arg=-0.0),
        program(arg=0.0),
        program(arg=math.nan),
        program(arg=True),
        program(arg="1"),
        program(arg=None),
        program(arg=Ref(1)),
        program(arg=Complex(1.0, 0.0)),
        program(arg=Items((1,))),
        program(arg=Items((Items((1,)),))),
        program(arg=Symbol("dtype", "float32")),
        program(arg=Symbol("layout", "float32")),
        program(kwargs={"alpha": 1}),
        program(kwargs={"alpha": 2}),
        program(out=3),
        program(out=HOLE),
        program(outputs=()),
        program(outputs=(("z", 2),)),
        program(outputs=(("y", 1),)),
        program(outputs=(("y", 2), ("z", 2))),
        program(twice=True),
    ]
    assert len({item.digest for item in changed}) == len(changed)


# -- check ------------------------------------------------------------------------------------------------


def refused(program: Program, *texts: str, error: type[ProgramError] = ProgramError) -> None:
    with pytest.raises(ProgramError) as caught:
        check(program)
    assert type(caught.value) is error
    for text in texts:
        assert text in str(caught.value), str(caught.value)


GOOD = call("neg.default", X, outs=(2,))


def test_a_good_program_passes() -> None:
    check(mlp())
    check(one(GOOD, outputs=(("y", 2), ("x", 1))))


@pytest.mark.parametrize(
    ("bad", "texts"),
    [
        (call("neg.default", Ref(9), outs=(3,)), ["%9 is used before it is bound"]),
        (call("neg.default", Ref(3), outs=(3,)), ["%3 is used before it is bound"]),
        (call("cat.default", Items((X, Ref(9))), outs=(3,)), ["%9 is used before it is bound"]),
        (call("neg.default", Ref(HOLE), outs=(3,)), ["%0 is used before it is bound"]),
        (call("neg.default", X, outs=(2,)), ["%2 is bound already"]),
        (call("neg.default", X, outs=(1,)), ["%1 is bound already"]),
        (call("max.dim", X, 0, outs=(3, 3)), ["%3 is bound already"]),
        (call("neg.default", outs=(3,)), ["'self' is missing", "neg(Tensor self) -> Tensor"]),
        (call("neg.default", None, outs=(3,)), ["'self' expects Tensor, found NoneType None"]),
        (call("neg.default", X, X, outs=(3,)), ["2 positional arguments, at most 1 expected"]),
        (call("neg.default", X, outs=(3,), axis=1), ["unexpected argument 'axis'"]),
        (call("neg.default", X, outs=(3,), self=X), ["unexpected argument 'self'"]),
        (call("add.Tensor", X, X, 2, outs=(3,)), ["3 positional arguments, at most 2 expected"]),
        (call("neg.default", X), ["0 outputs bound, 1 expected"]),
        (call("neg.default", X, outs=(3, 4)), ["2 outputs bound, 1 expected"]),
        (call("max.dim", X, 0, outs=(3,)), ["1 outputs bound, 2 expected"]),
        (call("add_.Scalar", Ref(2), 1, outs=(3,)), ["1 outputs bound, 0 expected"]),
        (call("neg.default", 1.5, outs=(3,)), ["'self' expects Tensor, found float 1.5"]),
        (call("neg.default", Items((X,)), outs=(3,)), ["'self' expects Tensor, found Items"]),
        (call("select.int", X, True, 0, outs=(3,)), ["'dim' expects int, found bool True"]),
        (call("select.int", X, 0.0, 0, outs=(3,)), ["'dim' expects int, found float 0.0"]),
        (call("select.int", X, "0", 0, outs=(3,)), ["'dim' expects int, found str '0'"]),
        (call("select.int", X, X, 0, outs=(3,)), ["'dim' expects int, found Ref"]),
        (call("sum.dim_IntList", X, Items((0, True)), outs=(3,)), ["'dim' expects int, found bool True"]),
        (call("sum.dim_IntList", X, Items((Items((0,)),)), outs=(3,)), ["'dim' expects int, found Items"]),
        (call("sum.dim_IntList", X, 0, 1, outs=(3,)), ["'keepdim' expects bool, found int 1"]),
        (call("cat.default", Items((X, None)), outs=(3,)), ["'tensors' expects Tensor, found NoneType None"]),
        (call("native_dropout.default", X, True, False, outs=(3, 4)), ["'p' expects float, found bool True"]),
        (call("add.Tensor", X, "1", outs=(3,)), ["'other' expects Tensor, found str"]),
        (call("add.Scalar", X, Symbol("dtype", "float32"), outs=(3,)), ["'other' expects Scalar, found Symbol"]),
        (
            call("sum.default", X, outs=(3,), dtype=Symbol("layout", "strided")),
            ["'dtype' expects a dtype, found the layout strided"],
        ),
        (call("sum.default", X, outs=(3,), dtype="float32"), ["'dtype' expects ScalarType, found str 'float32'"]),
        (call("sum.default", X, outs=(3,), dtype=6), ["'dtype' expects ScalarType, found int 6"]),
        (
            call("clone.default", X, outs=(3,), memory_format=Symbol("dtype", "float32")),
            ["'memory_format' expects a memory_format, found the dtype float32"],
        ),
        (call("bernoulli.default", X, outs=(3,), generator=7), ["'generator' expects Generator, found int 7"]),
        (
            call("add_.Scalar", X, 1),
            ["'self' is an input of the program, or a view of one, and would be written; clone it first"],
        ),
        (
            call("add.out", Ref(2), Ref(2), out=X),
            ["'out' is an input of the program, or a view of one, and would be written"],
        ),
    ],
    ids=lambda value: value[0][:50] if isinstance(value, list) else None,
)
def test_check_refuses_and_names_the_call(bad: Call, texts: list[str]) -> None:
    refused(one(GOOD, bad, outputs=(("y", 2),)), f"call 1, `{call_text(bad)}`: ", *texts)


def test_an_unknown_operator_is_refused_by_name() -> None:
    bad = call("launch_missiles.default", X, outs=(3,))
    refused(
        one(GOOD, bad), f"call 1, `{call_text(bad)}`: ", "operator 'launch_missiles.default'", error=UnknownOperator
    )


def test_an_overload_that_is_not_named_is_unknown() -> None:
    refused(one(call("add", X, X, outs=(2,))), "operator 'add' is not in the table", error=UnknownOperator)


@pytest.mark.parametrize(
    ("program", "text"),
    [
        (one(GOOD, outputs=(("y", 9),)), "output 'y' is %9, which nothing binds"),
        (one(GOOD, outputs=(("y", HOLE),)), "output 'y' is %0, which nothing binds"),
        (Program((Input("x", 1, typed(3)), Input("z", 1, typed(3))), (), ()), "'z' binds %1, which is bound already"),
        (Program((Input("x", HOLE, typed(3)),), (), ()), "input 'x' binds %0"),
        (Program((Input("x", 1, TensorType("float32", (3,), ())),), (), ()), "input 'x': float32[3] with stride ()"),
        (Program((Input("x", 1, TensorType("float32", (-1,), (1,))),), (), ()), "is no tensor's type"),
        (Program((Input("x", 1, TensorType("float32", (1,), (-1,))),), (), ()), "is no tensor's type"),
        (Program((Input("x", 1, TensorType("float32", (1,), (1,), -1)),), (), ()), "is no tensor's type"),
    ],
)  # fmt: skip
def test_check_refuses_inputs_and_outputs(program: Program, text: str) -> None:
    refused(program, text)


@pytest.mark.parametrize(
    "good",
    [
        call("sum.dim_IntList", X, 0, outs=(3,)),  # one int for a list of them, as torch takes it
        call("sum.dim_IntList", X, None, outs=(3,)),
        call("native_dropout.default", X, 0, False, outs=(3, 4)),  # an int where a float is wanted
        call("add.Scalar", X, True, outs=(3,)),  # a truth is a scalar
        call("mul.Scalar", X, Complex(0.0, 1.0), outs=(3,)),
        call("index.Tensor", X, Items((None,)), outs=(3,)),
        call("split.Tensor", X, 2, outs=(3, 4)),  # as many outputs as come
        call("add_.Scalar", Ref(2), 1),
        call("bernoulli.default", X, outs=(3,), generator=None),
    ],
    ids=call_text,
)
def test_check_allows_what_torch_takes(good: Call) -> None:
    check(one(GOOD, good))
    assert check_call(good).name == good.op


def test_writing_to_an_input_through_a_view_of_it_is_refused() -> None:
    refused(one(call("t.default", X, outs=(2,)), call("add_.Scalar", Ref(2), 1)), "would be written")


def test_one_tensor_is_no_list_of_tensors() -> None:
    refused(one(call("cat.default", X, outs=(2,))), "'tensors' expects")


# -- run --------------------------------------------------------------------------------------------------


def test_a_small_network_equals_torch() -> None:
    values = mlp_values()
    logits = F.linear(F.relu(F.linear(values["x"], values["w1"], values["b1"])), values["w2"])
    found = run(mlp(), values)
    assert list(found) == ["loss", "logits"]
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=0)
    torch.testing.assert_close(found["loss"], F.nll_loss(F.log_softmax(logits, 1), values["y"]), rtol=0, atol=0)


def convolution_backward(mask: tuple[bool, bool, bool], outs: tuple[int, ...]) -> Program:
    ones, zeros = Items((1, 1)), Items((0, 0))
    arguments = (Ref(1), Ref(2), Ref(3), Items((4,)), ones, zeros, ones, False, zeros, 1, Items(mask))
    return Program(
        (Input("grad", 1, typed(2, 4, 3, 3)), Input("x", 2, typed(2, 1, 5, 5)), Input("w", 3, typed(4, 1, 3, 3))),
        (Call("convolution_backward.default", arguments, {}, outs),),
        tuple((name, out) for name, out in zip(("x", "weight", "bias"), outs, strict=True) if out != HOLE),
    )


@pytest.mark.parametrize(
    ("mask", "outs"),
    [
        ((False, True, True), (HOLE, 4, 5)),
        ((True, False, True), (4, HOLE, 5)),
        ((True, True, True), (4, 5, 6)),
        ((True, True, True), (HOLE, 5, HOLE)),  # what comes and is not wanted is not bound
    ],
)
def test_holes_keep_the_places_of_results(mask: tuple[bool, bool, bool], outs: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    grad, x, w = torch.randn(2, 4, 3, 3), torch.randn(2, 1, 5, 5), torch.randn(4, 1, 3, 3)
    program = convolution_backward(mask, outs)
    assert ("_" in str(program).split(" = ")[0]) is (HOLE in outs)
    expected = torch.ops.aten.convolution_backward(
        grad, x, w, [4], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(mask)
    )
    found = run(program, {"grad": grad, "x": x, "w": w})
    wanted = {n: e for n, e, out in zip(("x", "weight", "bias"), expected, outs, strict=True) if out != HOLE}
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_run_checks_first() -> None:
    x = torch.zeros(3)
    with pytest.raises(ProgramError, match="would be written"):
        run(one(call("add_.Scalar", X, 1)), {"x": x})
    assert torch.equal(x, torch.zeros(3))


def test_a_missing_input_is_named() -> None:
    with pytest.raises(ProgramError, match=r"no value for the input\(s\) x$"):
        run(one(GOOD), {"y": torch.zeros(3)})


def test_a_write_within_the_program_leaves_its_inputs_alone() -> None:
    x = torch.zeros(3)
    program = one(call("clone.default", X, outs=(2,)), call("add_.Scalar", Ref(2), 1), outputs=(("y", 2),))
    assert torch.equal(run(program, {"x": x})["y"], torch.ones(3))
    assert torch.equal(x, torch.zeros(3))


def test_a_result_that_is_a_truth_is_a_tensor() -> None:
    program = one(call("equal.default", X, X, outs=(2,)), outputs=(("same", 2),))
    found = run(program, {"x": torch.ones(3)})["same"]
    assert found.dtype is torch.bool
    assert found.shape == ()
    assert found.item() is True


def test_a_list_of_results_binds_each() -> None:
    program = one(call("split.Tensor", X, 2, outs=(2, 3)), outputs=(("a", 2), ("b", 3)))
    found = run(program, {"x": torch.arange(3.0)})
    assert found["a"].tolist() == [0.0, 1.0]
    assert found["b"].tolist() == [2.0]


def test_more_results_than_bound_is_an_error() -> None:
    program = one(call("split.Tensor", X, 1, outs=(2, 3)), outputs=(("a", 2),))
    with pytest.raises(ProgramError, match="2 outputs bound, 3 came"):
        run(program, {"x": torch.arange(3.0)})


def test_values_are_freed_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    program = one(
        call("neg.default", X, outs=(2,)),
        call("exp.default", Ref(2), outs=(3,)),  # the last use of %2
        call("add.Tensor", Ref(3), X, outs=(4,)),  # %3 is used once more
        call("mul.Tensor", Ref(3), Ref(4), outs=(5,)),
        call("sin.default", X, outs=(6,)),  # never used
        call("cos.default", Ref(5), outs=(7,)),
        outputs=(("y", 7), ("kept", 4)),
    )
    made: dict[int, weakref.ref[torch.Tensor]] = {}
    alive: list[set[int]] = []
    execute = run_module.execute

    def spy(call: Call, values: Any, randomness: Any = None) -> None:
        alive.append({ref for ref, value in made.items() if value() is not None})
        execute(call, values, randomness)
        made.update({out: weakref.ref(values[out]) for out in call.outs})

    monkeypatch.setattr(run_module, "execute", spy)
    found = run(program, {"x": torch.ones(3)})
    assert alive == [set(), {2}, {3}, {3, 4}, {4, 5}, {4, 5}]
    assert {ref for ref, value in made.items() if value() is not None} == {4, 7}
    assert set(found) == {"y", "kept"}


# -- types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, lambda: convolution_backward((True, True, True), (4, 5, 6))])
def test_types_are_those_of_the_values(make: Callable[[], Program]) -> None:
    program = make()
    values = {item.name: torch.zeros(item.type.shape, dtype=DTYPES[item.type.dtype]) for item in program.inputs}
    assert type_program(program) == {name: type_of(value) for name, value in run(program, values).items()}


def test_types_of_views_keep_stride_offset_and_bits() -> None:
    type_ = typed(4, 3, dtype="complex64")
    program = Program(
        (Input("x", 1, type_),),
        (
            call("t.default", X, outs=(2,)),
            call("select.int", Ref(2), 0, 1, outs=(3,)),
            call("_conj.default", Ref(2), outs=(4,)),
        ),
        (("t", 2), ("row", 3), ("conj", 4)),
    )
    types = type_program(program)
    assert types == {n: type_of(v) for n, v in run(program, {"x": torch.zeros(4, 3, dtype=torch.complex64)}).items()}
    assert types["t"].stride == (1, 3)
    assert types["row"].offset == 1
    assert types["conj"].conj


def test_typing_a_huge_program_computes_nothing() -> None:
    big = TensorType("float32", (1 << 30, 1 << 20), (1 << 20, 1))
    program = Program((Input("x", 1, big),), (call("mm.default", X, Ref(2), outs=(3,)),), (("y", 3),))
    program = Program((*program.inputs, Input("w", 2, typed(1 << 20, 2))), program.calls, program.outputs)
    assert type_program(program)["y"].shape == (1 << 30, 2)


def test_what_meta_tensors_cannot_do_types_nothing() -> None:
    """An operator that makes nothing needs no meta kernel."""
    options = {"weight_decay": 0.0, "momentum": 0.0, "lr": 0.1, "dampening": 0.0, "nesterov": False, "maximize": False}
    step = call("_fused_sgd_.default", Items((X,)), Items((W,)), Items(()), is_first_step=True, **options)
    inputs = Input("x", 1, typed(3), updates=True), Input("grad", 2, typed(3), updates=True)
    program = Program(inputs, (step, call("neg.default", X, outs=(3,))), (("y", 3),))
    assert type_program(program) == {"y": typed(3)}


def test_typing_makes_nothing_that_a_program_makes_itself() -> None:
    """A factory's values would be real, and a kernel that trusts an index would follow it anywhere."""
    many = call("full.default", Items((1 << 40,)), 1.0, outs=(2,))
    pool = [Ref(4), Ref(5), Items((2, 2)), Items((2, 2)), Items((0, 0)), Items((1, 1)), False, Ref(6)]
    wild = (
        call("full.default", Items((1, 1, 1, 1)), 1.0, outs=(4,)),
        call("zeros.default", Items((1, 1, 2, 2)), outs=(5,)),
        call("full.default", Items((1, 1, 1, 1)), 1 << 40, outs=(6,), dtype=Symbol("dtype", "int64")),
        call("max_pool2d_with_indices_backward.default", *pool, outs=(7,)),
    )
    program = Program((Input("x", 1, typed(2)),), (many, *wild), (("y", 2), ("z", 7)))
    types = type_program(program)
    assert (types["y"].shape, types["z"].shape) == ((1 << 40,), (1, 1, 2, 2))


def test_typing_makes_no_more_results_than_there_are_ids_for() -> None:
    made = call("zeros.default", Items((1 << 40,)), outs=(2,)), call("unbind.int", Ref(2), outs=(3,))
    with pytest.raises(ProgramError, match="results, and 1 ids"):
        type_program(Program((Input("x", 1, typed(2)),), made, (("y", 3),)))


def test_an_unknown_dtype_is_refused() -> None:
    program = Program((Input("x", 1, TensorType("float7", (3,), (1,))),), (), (("x", 1),))
    with pytest.raises(ProgramError, match="unknown dtype 'float7'"):
        type_program(program)


# -- randomness -------------------------------------------------------------------------------------------


def draws(randomness: Randomness, count: int) -> list[list[float]]:
    program = one(call("rand_like.default", X, outs=(2,)), outputs=(("y", 2),))
    return [run(program, {"x": torch.zeros(3)}, randomness)["y"].tolist() for _ in range(count)]


@FIXED
@given(seed=st.integers(0, 2**63 - 1), skip=st.integers(0, 5), count=st.integers(1, 5))
def test_the_same_state_gives_the_same_draws(seed: int, skip: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(skip):
        torch.rand(3, generator=generator)
    first, second = Randomness(), Randomness()
    first.follow(generator.get_state())
    second.follow(generator.get_state())
    found = draws(first, count)
    assert found == draws(second, count)
    assert found == [torch.rand(3, generator=generator).tolist() for _ in range(count)]
    assert draws(first, 1) == draws(second, 1)


def test_unseeded_randomness_is_its_own() -> None:
    torch.manual_seed(0)
    first = draws(Randomness(), 1)
    torch.manual_seed(0)
    assert draws(Randomness(), 1) != first


def test_drawing_leaves_torchs_generator_as_it_was() -> None:
    torch.manual_seed(3)
    before = torch.default_generator.get_state()
    randomness = Randomness()
    assert draws(randomness, 1) != draws(randomness, 1)
    assert torch.equal(torch.default_generator.get_state(), before)
    with pytest.raises(RuntimeError), randomness.drawing():
        torch.rand(2, out=torch.rand(3).requires_grad_())  # draws once, then fails
    assert torch.equal(torch.default_generator.get_state(), before)


def test_without_randomness_torchs_own_generator_draws() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    program = one(call("rand_like.default", X, outs=(2,)), outputs=(("y", 2),))
    assert torch.equal(run(program, {"x": torch.zeros(3)})["y"], expected)


@pytest.mark.parametrize("state", [torch.zeros(3, dtype=torch.uint8), torch.zeros(5056), torch.tensor(1)])
def test_what_is_no_state_is_refused(state: torch.Tensor) -> None:
    randomness = Randomness()
    with pytest.raises(ProgramError, match="not the state of a random generator"):
        randomness.follow(state)
    assert len(draws(randomness, 1)[0]) == 3


# -- random programs --------------------------------------------------------------------------------------

UNARY = {"neg.default": torch.neg, "sin.default": torch.sin, "abs.default": torch.abs, "sigmoid.default": torch.sigmoid}
BINARY = {"add.Tensor": torch.add, "mul.Tensor": torch.mul, "sub.Tensor": torch.sub, "maximum.default": torch.maximum}
SCALAR = {"add.Scalar": torch.add, "mul.Scalar": torch.mul}


@st.composite
def straight_line(draw: Any) -> tuple[Program, list[Callable[[dict[int, torch.Tensor]], torch.Tensor]]]:
    """A program of elementwise operators on float64[2, 3], and what torch does for each of its calls."""
    count = draw(st.integers(1, 3))
    bound = list(range(1, count + 1))
    inputs = tuple(Input(f"x{ref}", ref, typed(2, 3, dtype="float64")) for ref in bound)
    calls, direct = [], []
    for _ in range(draw(st.integers(1, 12))):
        op = draw(st.sampled_from([*UNARY, *BINARY, *SCALAR]))
        a = draw(st.sampled_from(bound))
        out = max(bound) + draw(st.integers(1, 3))
        if op in UNARY:
            calls.append(call(op, Ref(a), outs=(out,)))
            direct.append(lambda values, f=UNARY[op], a=a: f(values[a]))
        elif op in BINARY:
            b = draw(st.sampled_from(bound))
            calls.append(call(op, Ref(a), Ref(b), outs=(out,)))
            direct.append(lambda values, f=BINARY[op], a=a, b=b: f(values[a], values[b]))
        else:
            number = draw(st.one_of(st.integers(-3, 3), st.floats(-2, 2), st.booleans()))
            calls.append(call(op, Ref(a), number, outs=(out,)))
            direct.append(lambda values, f=SCALAR[op], a=a, n=number: f(values[a], n))
        bound.append(out)
    chosen = draw(st.lists(st.sampled_from(bound), min_size=1, max_size=3))
    return Program(inputs, tuple(calls), tuple((f"y{n}", ref) for n, ref in enumerate(chosen))), direct


@FIXED
@given(made=straight_line(), seed=st.integers(0, 1000))
def test_random_programs_run_as_torch_does(made: Any, seed: int) -> None:
    program, direct = made
    generator = torch.Generator().manual_seed(seed)
    inputs = {item.name: torch.randn(2, 3, generator=generator, dtype=torch.float64) for item in program.inputs}
    values = {item.id: inputs[item.name] for item in program.inputs}
    for item, compute in zip(program.calls, direct, strict=True):
        values[item.outs[0]] = compute(values)
    found = run(program, inputs)
    assert type_program(program) == {name: type_of(value) for name, value in found.items()}
    for name, ref in program.outputs:
        torch.testing.assert_close(found[name], values[ref], rtol=0, atol=0, equal_nan=True)


@FIXED
@given(made=straight_line(), data=st.data())
def test_a_call_before_what_it_needs_is_refused(made: Any, data: st.DataObject) -> None:
    program, _ = made
    binder = {out: number for number, item in enumerate(program.calls) for out in item.outs}
    late = [
        (number, binder[ref])
        for number, item in enumerate(program.calls)
        for arg in item.args
        for ref in refs(arg)
        if ref in binder
    ]
    if not late:
        return
    number, needs = data.draw(st.sampled_from(late))
    to = data.draw(st.integers(0, needs))
    calls = list(program.calls)
    moved = calls.pop(number)
    calls.insert(to, moved)
    refused(
        Program(program.inputs, tuple(calls), program.outputs),
        f"call {to}, `{call_text(moved)}`",
        "used before it is bound",
    )


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 0, 3), (1, 4, 1), (5, 1, 0)])
def test_what_torch_is_told_of_a_type_makes_that_type(shape: tuple[int, ...]) -> None:
    for value in (torch.empty(shape), torch.empty(shape).t() if len(shape) == 2 else torch.empty(shape)):
        kind = type_of(value)
        made = torch.Tensor._make_wrapper_subclass(PointerTensor, *spec(kind).wrapper)
        assert type_of(made) == kind
    huge = spec(TensorType("float32", (2**62, 2**62), (2**62, 1)))
    assert huge.wrapper[:2] == ((2**62, 2**62), None)
