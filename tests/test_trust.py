"""What kernels trust: wrong shapes, wild indices and the like are refused before they run, honest calls are not.

Each of the wrong calls here was seen to end a process, or to read memory beyond its arguments (`tools/vet.py`), so none
is ever run: `torch.ops` is not asked.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from housecall.errors import ProgramError
from housecall.owner.policy import Policy
from housecall.program.call import Call, Items, Symbol
from housecall.program.forecast import forecast
from housecall.program.ops import operator, table
from housecall.program.run import arguments_of, overload
from housecall.program.trust import (
    _RESAMPLING,
    _TYPES,
    FORWARDS,
    REFUSED,
    VALUES,
    check_types,
    check_values,
    from_forward,
    trusts_values,
)
from housecall.types import Ref
from housecall.wire.messages import Array, Frame, Load, Put
from housecall.worker.limits import Limits
from housecall.worker.owner import Owner
from housecall.worker.worker import Worker, WorkerSession


def f(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def n(*shape: int, at: int = 0) -> torch.Tensor:
    return torch.full(shape, at)


def steps(count: int) -> list[torch.Tensor]:
    return [torch.ones(()) for _ in range(count)]


def adam(**changed: Any) -> dict[str, Any]:
    """One step of fused Adam over two parameters, some of its lists replaced."""
    lists = {name: [f(3, 2), f(4)] for name in ("self", "grads", "exp_avgs", "exp_avg_sqs")}
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False}
    return {**lists, "max_exp_avg_sqs": [], "state_steps": steps(2), **numbers, "maximize": False, **changed}


BATCH = {"training": True, "momentum": 0.1, "eps": 1e-5}
BACK = {"eps": 1e-5, "output_mask": [True, True, True]}
GRID = {"interpolation_mode": 0, "padding_mode": 0, "align_corners": False}

# Operator -> an honest call of it, and changes to that which its kernel would not notice.
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "_adaptive_avg_pool2d_backward.default": (
        {"grad_output": f(2, 3, 2, 2), "self": f(2, 3, 8, 8)},
        [{"self": f(0, 3, 8, 8)}, {"self": f(2, 4, 8, 8)}, {"self": f(2, 3, 0, 8)}, {"grad_output": f(3, 2, 2)}],
    ),
    "_adaptive_avg_pool3d_backward.default": (
        {"grad_output": f(2, 3, 2, 2, 2), "self": f(2, 3, 4, 4, 4)},
        [{"self": f(0, 3, 4, 4, 4)}, {"self": f(4, 4, 4)}],
    ),
    "adaptive_max_pool2d_backward.default": (
        {"grad_output": f(1, 3, 2, 2), "self": f(1, 3, 8, 8), "indices": n(1, 3, 2, 2, at=63)},
        [{"indices": n(1, 3, 2, 2, at=64)}, {"indices": n(1, 3, 2, 1)}, {"self": f(0, 3, 8, 8)}],
    ),
    "adaptive_max_pool3d_backward.default": (
        {"grad_output": f(3, 2, 2, 2), "self": f(3, 4, 4, 4), "indices": n(3, 2, 2, 2)},
        [{"indices": n(1).expand(3, 2, 2, 2)}, {"indices": n(3, 2, 2, 2, at=-1)}],
    ),
    "fractional_max_pool2d_backward.default": (
        {"grad_output": f(2, 3, 2, 2), "self": f(2, 3, 5, 5), "kernel_size": [2, 2], "output_size": [2, 2],
         "indices": n(2, 3, 2, 2)},
        [{"grad_output": f(2, 3, 3, 2)}, {"indices": n(2, 3, 2, 2, at=25)}, {"output_size": [2]}],
    ),
    "max_pool2d_with_indices_backward.default": (
        {"grad_output": f(1, 1, 2, 2), "self": f(1, 1, 4, 4), "kernel_size": [2, 2], "stride": [2, 2],
         "padding": [0, 0], "dilation": [1, 1], "ceil_mode": False, "indices": n(1, 1, 2, 2, at=15)},
        [{"grad_output": f(1, 1, 3, 2)}, {"indices": n(1, 1, 2, 3)}, {"indices": n(1, 1, 2, 2, at=16)}],
    ),
    "avg_pool2d_backward.default": (
        {"grad_output": f(1, 1, 2, 2), "self": f(1, 1, 4, 4), "kernel_size": [2, 2], "stride": [2, 2],
         "padding": [0, 0], "ceil_mode": False, "count_include_pad": True, "divisor_override": None},
        [{"grad_output": f(1, 1, 3, 3)}],
    ),
    "native_batch_norm.default": (
        {"input": f(3, 2, 4), "weight": f(2), "bias": f(2), "running_mean": f(2), "running_var": f(2), **BATCH},
        [{"weight": f(0)}, {"bias": f(1)}, {"running_mean": f(3)}, {"running_var": f(0)}, {"input": f(3)}],
    ),
    "native_batch_norm_backward.default": (
        {"grad_out": f(3, 2), "input": f(3, 2), "weight": f(2), "running_mean": f(2), "running_var": f(2),
         "save_mean": f(2), "save_invstd": f(2), "train": True, **BACK},
        [{"save_mean": f(1)}, {"save_invstd": f(0)}, {"grad_out": f(3, 1)}, {"weight": f(1)}],
    ),
    "_native_batch_norm_legit.no_stats": (
        {"input": f(3, 2), "weight": f(2), "bias": None, **BATCH},
        [{"weight": f()}, {"bias": f(3)}],
    ),
    "native_group_norm.default": (
        {"input": f(1, 6, 3), "weight": f(6), "bias": f(6), "N": 1, "C": 6, "HxW": 3, "group": 2, "eps": 1e-5},
        [{"HxW": 4}, {"N": 2}, {"C": 12}, {"group": 0}, {"group": 4}, {"weight": f(5)}],
    ),
    "native_group_norm_backward.default": (
        {"grad_out": f(1, 6, 3), "input": f(1, 6, 3), "mean": f(1, 2), "rstd": f(1, 2), "weight": f(6), "N": 1, "C": 6,
         "HxW": 3, "group": 2, "output_mask": [True, True, True]},
        [{"grad_out": f(1, 6, 1)}, {"mean": f(1, 1)}, {"rstd": f(2)}, {"HxW": 30},
         {"input": f(1, 1, 3).expand(1, 6, 3)}, {"rstd": f(1, 1).expand(1, 2)}],
    ),
    "native_layer_norm_backward.default": (
        {"grad_out": f(3, 4), "input": f(3, 4), "normalized_shape": [4], "mean": f(3, 1), "rstd": f(3, 1),
         "weight": f(4), "bias": f(4), "output_mask": [True, True, True]},
        [{"grad_out": f(3, 2)}, {"mean": f(1, 1)}, {"rstd": f(0, 1)}, {"weight": f(3)},
         {"mean": f(1, 1).expand(3, 1)}],
    ),
    "_log_softmax_backward_data.default": (
        {"grad_output": f(3, 4), "output": f(3, 4), "dim": 1, "input_dtype": torch.float32},
        [{"output": f(4)}, {"grad_output": f(3, 5)}],
    ),
    "_softmax_backward_data.default": (
        {"grad_output": f(3, 4), "output": f(3, 4), "dim": 1, "input_dtype": torch.float32},
        [{"output": f(1, 4)}],
    ),
    "gelu_backward.default": ({"grad_output": f(3, 4), "self": f(3, 4)}, [{"self": f(4)}]),
    "glu_backward.default": ({"grad_output": f(3, 2), "self": f(3, 4), "dim": 1}, [{"grad_output": f(3, 4)}]),
    "binary_cross_entropy.default": ({"self": f(3), "target": f(3)}, [{"target": f(0)}, {"target": f(1)}]),
    "nll_loss_backward.default": (
        {"grad_output": f(), "self": f(3, 4), "target": n(3, at=3), "weight": None, "reduction": 1,
         "ignore_index": -100, "total_weight": f()},
        [{"target": n(3, at=4)}, {"target": n(3, at=-1)}, {"target": n(2)}, {"weight": f(3)}, {"total_weight": f(0)}],
    ),
    "multi_margin_loss_backward.default": (
        {"grad_output": f(), "self": f(3, 4), "target": n(3), "p": 1, "margin": 1},
        [{"target": n(3, at=9)}, {"target": n(3, at=-1)}, {"weight": f(2)}],
    ),
    "multilabel_margin_loss_backward.default": (
        {"grad_output": f(), "self": f(3, 4), "target": n(3, 4, at=-1), "reduction": 1, "is_target": f(3, 4)},
        [{"target": n(3, 4, at=4)}, {"target": n(3, 4, at=-2)}, {"is_target": f(3, 3)},
         {"grad_output": f(0)}, {"reduction": 0}, {"reduction": 7}],
    ),
    "_cdist_backward.default": (
        {"grad": f(3, 4), "x1": f(3, 2), "x2": f(4, 2), "p": 2.0, "cdist": f(3, 4)},
        [{"cdist": f(5)}, {"p": -1.0}, {"p": float("nan")}, {"grad": f(4, 3)}],
    ),
    "_pdist_forward.default": ({"self": f(3, 2), "p": 2.0}, [{"self": f(3, 4, 0)}, {"self": f(0, 2)}, {"p": -2.0}]),
    "_pdist_backward.default": (
        {"grad": f(3), "self": f(3, 2), "p": 2.0, "pdist": f(3)},
        [{"pdist": f(2)}, {"grad": f(4)}, {"self": f(0, 2), "grad": f(0), "pdist": f(0)}],
    ),
    "_fft_c2r.default": (
        {"self": torch.ones(3, dtype=torch.complex64), "dim": [0], "normalization": 0, "last_dim_size": 5},
        [{"last_dim_size": 16}, {"dim": [-1]}, {"dim": []}, {"dim": [0, 0]}, {"dim": [1]}],
    ),
    "_fft_r2c.default": (
        {"self": f(4), "dim": [0], "normalization": 0, "onesided": True}, [{"dim": [-2]}, {"dim": [5]}],
    ),
    "_weight_norm_interface.default": (
        {"v": f(4, 2), "g": f(4, 1)},
        [{"g": f()}, {"g": f(4)}, {"v": f(2, 4).t()}, {"g": f(1, 1).expand(4, 1)}, {"dim": 2}],
    ),
    "_weight_norm_interface_backward.default": (
        {"grad_w": f(4, 2), "saved_v": f(4, 2), "saved_g": f(4, 1), "saved_norms": f(4, 1), "dim": 0},
        [{"saved_norms": f(1, 1)}, {"grad_w": f(2, 4)}],
    ),
    "grid_sampler_2d.default": (
        {"input": f(1, 1, 3, 3), "grid": f(1, 2, 2, 2), **GRID},
        [{"interpolation_mode": -2}, {"padding_mode": 7}, {"grid": f(2, 2, 2, 2)}, {"grid": f(1, 2, 2, 3)}],
    ),
    "grid_sampler_3d_backward.default": (
        {"grad_output": f(1, 1, 2, 2, 2), "input": f(1, 1, 3, 3, 3), "grid": f(1, 2, 2, 2, 3), **GRID,
         "output_mask": [True, True]},
        [{"grad_output": f(0, 1, 2, 2, 2)}, {"interpolation_mode": 8}],
    ),
    "reflection_pad1d_backward.default": (
        {"grad_output": f(1, 6), "self": f(1, 3), "padding": [1, 2]}, [{"self": f(3, 3)}, {"grad_output": f(1, 7)}],
    ),
    "replication_pad2d_backward.default": (
        {"grad_output": f(1, 6, 3), "self": f(1, 3, 3), "padding": [0, 0, 1, 2]}, [{"grad_output": f(1, 3, 3)}],
    ),
    "convolution_backward.default": (
        {"grad_output": f(1, 2, 2, 2), "input": f(1, 1, 4, 4), "weight": f(2, 1, 3, 3), "bias_sizes": [2],
         "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "transposed": False, "output_padding": [0, 0],
         "groups": 1, "output_mask": [True, True, True]},
        [{"grad_output": f(1, 2, 3, 3)}, {"grad_output": f(2, 2, 2, 2)}],
    ),
    "_scaled_dot_product_flash_attention_for_cpu.default": (
        {"query": f(1, 2, 4, 8), "key": f(1, 2, 6, 8), "value": f(1, 2, 6, 8)},
        [{"key": f(1, 2, 6, 4)}, {"value": f(1, 2, 3, 8)}, {"key": f(2, 2, 6, 8)}, {"query": f(2, 4, 8)},
         {"query": f(1, 2, 8, 4).mT}, {"query": f(1, 2, 0, 8)}, {"key": f(1, 2, 0, 8), "value": f(1, 2, 0, 8)}],
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward.default": (
        {"grad_out": f(1, 2, 4, 8), "query": f(1, 2, 4, 8), "key": f(1, 2, 6, 8), "value": f(1, 2, 6, 8),
         "out": f(1, 2, 4, 8), "logsumexp": f(1, 2, 4), "dropout_p": 0.0, "is_causal": False},
        [{"grad_out": f(1, 2, 4, 4)}, {"out": f(1, 1, 4, 8)}, {"logsumexp": f(1, 2, 3)},
         {"out": f(1, 2, 4, 1).expand(1, 2, 4, 8)}],
    ),
    "lu_unpack.default": (
        {"LU_data": f(3, 3), "LU_pivots": torch.ones(3, dtype=torch.int32)},
        [{"LU_pivots": torch.full((3,), 4, dtype=torch.int32)}, {"LU_pivots": torch.zeros(3, dtype=torch.int32)},
         {"LU_pivots": torch.ones(3, 0, dtype=torch.int32)}],
    ),
    "linalg_lu_solve.default": (
        {"LU": torch.eye(3), "pivots": torch.ones(3, dtype=torch.int32), "B": f(3, 1)},
        [{"pivots": torch.full((3,), 9, dtype=torch.int32)}, {"pivots": torch.ones(2, dtype=torch.int32)}],
    ),
    "_upsample_bicubic2d_aa.default": (
        {"self": f(1, 2, 3, 8), "output_size": [5, 12], "align_corners": False, "scales_h": 1.7, "scales_w": 1.5},
        [{"scales_w": 1e30}, {"scales_h": 1.6}, {"scales_h": -1.7}, {"scales_w": float("nan")},
         {"output_size": [5, 2000]}],
    ),
    "upsample_nearest2d_backward.default": (
        {"grad_output": f(1, 2, 4, 6), "output_size": [4, 6], "input_size": [1, 2, 2, 3], "scales_h": 2.0,
         "scales_w": 2.0},
        [{"scales_h": 1000.0}, {"scales_w": 0.01}, {"scales_w": None}],
    ),
    "upsample_nearest1d.vec": ({"input": f(1, 2, 4), "output_size": None, "scale_factors": [2.5]},
                               [{"scale_factors": [float("inf")]}, {"scale_factors": [-1.0]}]),
    "median.dim": ({"self": f(3), "dim": 0}, [{"self": f(1).expand(3)}]),
    "nanmedian.dim": ({"self": f(2, 3), "dim": 1}, [{"self": f(2, 1).expand(2, 3)}]),
    "_linalg_eigvals.default": ({"self": f(3, 3)}, [{"self": f(3, 3) * float("nan")}, {"self": f(3, 3) / 0}]),
    "binomial.default": (
        {"count": f(3), "prob": f(3) / 2}, [{"count": f(3) * float("nan")}, {"prob": f(3) * float("nan")}],
    ),
    "div.Tensor_mode": (
        {"self": torch.tensor([-(2**31)], dtype=torch.int32), "other": torch.tensor([2], dtype=torch.int32),
         "rounding_mode": "trunc"},
        [{"other": torch.tensor([-1], dtype=torch.int32)}, {"other": torch.tensor(-1)},
         {"self": torch.tensor([-(2**63)]), "other": torch.tensor([-1, 1])}],
    ),
    "embedding_dense_backward.default": (
        {"grad_output": f(3, 4), "indices": n(3, at=8), "num_weights": 9, "padding_idx": -1,
         "scale_grad_by_freq": False},
        [{"indices": n(3, at=9)}, {"indices": n(3, at=-1)}],
    ),
    "round.decimals": ({"self": f(2), "decimals": 3}, [{"decimals": 2**30}]),
    "_foreach_copy_.default": ({"self": [f(2)], "src": [f(2)]}, [{"src": []}, {"src": [f(2), f(2)]}]),
    "_fused_adam_.default": (
        adam(),
        [{"grads": [f(3, 2)]}, {"grads": [f(3, 2), f(5)]}, {"exp_avgs": [f(2, 3).t(), f(4)]}, {"state_steps": steps(1)},
         {"exp_avgs": [f(1, 2).expand(3, 2), f(4)]}, {"amsgrad": True}, {"state_steps": [f(2), f(0)]},
         {"exp_avg_sqs": [f(3, 2), f(4).double()]}],
    ),
    "_fused_sgd_.default": (
        {"self": [f(2)], "grads": [f(2)], "momentum_buffer_list": [], "weight_decay": 0.0, "momentum": 0.0, "lr": 0.1,
         "dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": True},
        [{"momentum": 0.9}, {"momentum_buffer_list": [f(3)]}, {"grads": [f(2), f(2)]}],
    ),
}  # fmt: skip
WRONG = [(op, at) for op, (_, changes) in CASES.items() for at in range(len(changes))]


def issued(op: str, args: dict[str, Any]) -> tuple[Call, dict[int, Any]]:
    """The call with these arguments, and its values."""
    values: dict[int, Any] = {}

    def sent(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            values[len(values) + 1] = value
            return Ref(len(values))
        if isinstance(value, torch.dtype):
            return Symbol("dtype", str(value)[6:])
        return Items(tuple(map(sent, value))) if isinstance(value, list) else value

    fresh = [item for item in operator(op).returns if not item.same_as]
    return Call(
        op, (), {name: sent(value) for name, value in args.items()}, tuple(range(100, 100 + len(fresh)))
    ), values


def looked_at(op: str, args: dict[str, Any]) -> None:
    """What a worker does before such a call runs."""
    call, values = issued(op, args)
    forecast(call, values, 1e9, 1e12)
    check_values(op, arguments_of(call, values))


@pytest.mark.parametrize("op", CASES)
def test_an_honest_call_runs(op: str) -> None:
    honest, _ = CASES[op]
    looked_at(op, honest)
    overload(op)(**honest)


@pytest.mark.parametrize(("op", "at"), WRONG)
def test_a_wrong_one_is_refused_by_name(op: str, at: int) -> None:
    honest, changes = CASES[op]
    with pytest.raises((ProgramError, RuntimeError), match=r".") as caught:
        looked_at(op, {**honest, **changes[at]})
    if isinstance(caught.value, ProgramError):
        assert str(caught.value).startswith(f"{op}: ") or "was refused" in str(caught.value)


def test_most_are_refused_by_these_rules_and_not_by_torch() -> None:
    by_torch = []
    for op, at in WRONG:
        honest, changes = CASES[op]
        try:
            looked_at(op, {**honest, **changes[at]})
        except ProgramError:
            continue
        except RuntimeError:
            by_torch.append((op, at))
    assert len(by_torch) <= 8, by_torch


def test_every_rule_has_a_case() -> None:
    ruled = set(_TYPES) | set(VALUES) | set(FORWARDS)
    tried = {op.partition(".")[0].removesuffix("_") for op in CASES}
    # of one rule with another dimension, reduction or optimizer
    kin = {"_fused_adagrad", "_fused_adamw", "_batch_norm_with_update", "batch_norm_backward", "_fft_c2c",
           "avg_pool3d_backward", "binary_cross_entropy_backward", "fractional_max_pool3d_backward", "grid_sampler_3d",
           "grid_sampler_2d_backward", "max_pool3d_with_indices_backward", "nll_loss2d_backward",
           "reflection_pad2d_backward", "reflection_pad3d_backward", "replication_pad1d_backward",
           "replication_pad3d_backward",
           *(name + back for name in _RESAMPLING for back in ("", "_backward"))}  # fmt: skip
    assert ruled - tried == kin - tried
    bases = {name.partition(".")[0].removesuffix("_") for name in table()}
    assert ruled | set(REFUSED) <= bases
    for forward, pairs in FORWARDS.values():
        assert len(operator(forward).returns) > max(at for at, _ in pairs)


@pytest.mark.parametrize("base", sorted(REFUSED))
def test_what_cannot_be_checked_is_refused(base: str) -> None:
    (op, *_) = [name for name in table() if name.partition(".")[0].removesuffix("_") == base]
    with pytest.raises(ProgramError, match="was refused: its kernel trusts arguments"):
        check_types(op, {})


def test_a_number_for_a_tensor_is_no_crash() -> None:
    with pytest.raises(ProgramError, match="wrong kinds"):
        check_types("gelu_backward.default", {"self": 1, "grad_output": 2})


# -- in a session ----------------------------------------------------------------------------------------------


def guarded() -> WorkerSession:
    owner = Owner()
    worker = Worker("w", Limits(), gate=owner.gate)
    worker.catalogue.register("heart", {"y": torch.tensor([0, 1, 9])})
    owner.policies.register("heart", Policy.open_to("me"))
    door = worker.open("me")
    door.handle(Frame(1, (Load("heart", (1,)),)))
    return door


def test_a_session_refuses_and_goes_on() -> None:
    door = guarded()
    call, values = issued("gelu_backward.default", {"grad_output": f(3, 4), "self": f(4)})
    puts = [Put(ref + 10, Array(None, value)) for ref, value in values.items()]
    wrong = Call(call.op, (), {"grad_output": Ref(11), "self": Ref(12)}, (20,))
    reply = door.handle(Frame(2, (*puts, wrong, Call("neg.default", (Ref(11),), {}, (21,)))))
    (failure,) = reply.failures
    assert "gelu_backward.default: 'grad_output' has the shape [3, 4], expected [4]" in failure.reason
    assert 21 in door.store


def test_a_private_index_out_of_range_is_not_told() -> None:
    """Shapes are everybody's; what elements do stays with the owner."""
    door = guarded()
    grad = Put(10, Array(None, f(3, 4)))
    call = Call("embedding_dense_backward.default", (Ref(10), Ref(1), 5, -1, False), {}, (20,))
    reply = door.handle(Frame(2, (grad, call)))
    assert reply.failures == ()
    assert door.store.cells[20].failed
    assert not door.store[20].any()


# -- within a program ------------------------------------------------------------------------------------------


def pooling(given: int = 1, *, also_read: bool = False) -> list[Call]:
    window = Items((2, 2)), Items((2, 2)), Items((0, 0)), Items((1, 1)), False
    calls = [
        Call("max_pool2d_with_indices.default", (Ref(1), *window), {}, (2, 3)),
        Call("max_pool2d_with_indices_backward.default", (Ref(2), Ref(given), *window, Ref(3)), {}, (4,)),
    ]
    return [*calls, Call("add_.Scalar", (Ref(3), 1), {}, ())] if also_read else calls


def test_indices_of_the_own_forward_need_no_look() -> None:
    assert trusts_values("max_pool2d_with_indices_backward.default")
    assert from_forward(pooling()) == {1}
    assert from_forward(pooling(9)) == set()
    assert from_forward(pooling(also_read=True)) == set()
    assert from_forward([*pooling(), Call("t_.default", (Ref(1),), {}, ())]) == set()
