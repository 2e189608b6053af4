"""PyTorch's own operator database through pointers, against local torch: the harness that the tests and the coverage table share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from housecall.pointers.tensor import PointerTensor, send

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

OPS = {f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name: op for op in op_db}


def samples(op: Any, dtype: torch.dtype, grad: bool) -> Iterator[Any]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from op.sample_inputs("cpu", dtype, requires_grad=grad)


def home(value: Any) -> Any:
    """Every pointer in a structure, as a local tensor."""
    return tree_map(lambda v: v.detach().copy().get() if isinstance(v, PointerTensor) else v, value)


def away(value: Any, worker: Any) -> Any:
    """Every tensor in a structure, at the worker."""
    sent: dict[int, Any] = {}

    def one(v: Any) -> Any:
        if not isinstance(v, torch.Tensor):
            return v
        if id(v) not in sent:
            leaf = v if v.is_leaf else v.detach()
            sent[id(v)] = send(leaf, worker)
            if v.requires_grad:
                sent[id(v)].requires_grad_()
        return sent[id(v)]

    return tree_map(one, value)


def fresh(value: Any) -> Any:
    """The same structure with leaf tensors of their own."""
    memo: dict[int, Any] = {}

    def one(v: Any) -> Any:
        if not isinstance(v, torch.Tensor):
            return v
        if id(v) not in memo:
            clone = v.detach().clone() if v.layout is torch.strided else v.detach()
            if v.is_conj() and not clone.is_conj():
                clone = v.detach().resolve_conj().conj_physical().conj()
            memo[id(v)] = clone.requires_grad_(v.requires_grad)
        return memo[id(v)]

    return tree_map(one, value)


def call(op: Any, sample: Any) -> Any:
    return op.op(sample.input, *sample.args, **sample.kwargs)


def leaves(value: Any) -> list[Any]:
    return [v for v in tree_flatten(value)[0] if isinstance(v, torch.Tensor)]


def same(found: Any, expected: Any, what: str) -> None:
    found_leaves, found_tree = tree_flatten(found)
    expected_leaves, expected_tree = tree_flatten(expected)
    assert len(found_leaves) == len(expected_leaves), f"{what}: {found_tree} against {expected_tree}"
    for f, e in zip(found_leaves, expected_leaves, strict=True):
        if isinstance(e, torch.Tensor):
            assert isinstance(f, torch.Tensor), f"{what}: {type(f)} against a tensor"
            assert f.dtype == e.dtype, f"{what}: {f.dtype} against {e.dtype}"
            assert f.shape == e.shape, f"{what}: {tuple(f.shape)} against {tuple(e.shape)}"
            torch.testing.assert_close(f.detach(), e.detach(), rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
        elif isinstance(e, float) and e != e:
            assert f != f, what
        else:
            assert f == e, f"{what}: {f!r} against {e!r}"


class Packed:
    """input, args and kwargs of a sample as one structure."""

    def __init__(self, sample: Any) -> None:
        self.leaves, self.tree = tree_flatten((sample.input, tuple(sample.args), dict(sample.kwargs)))

    def with_leaves(self, change: Callable[[Any], Any]) -> Any:
        return change(tree_unflatten(self.leaves, self.tree))


def run(op: Any, structure: Any) -> Any:
    first, args, kwargs = structure
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return op.op(first, *args, **kwargs)


def differentiable(outputs: Any) -> list[torch.Tensor]:
    return [v for v in leaves(outputs) if v.requires_grad]


def gradients(outputs: Any, structure: Any) -> list[torch.Tensor | None]:
    """d(sum of all outputs)/d(inputs), with a fixed, uneven weighting."""
    inputs = [v for v in leaves(structure) if v.requires_grad]
    outs = differentiable(outputs)
    weights = []
    for out in outs:
        generator = torch.Generator().manual_seed(2)
        real = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        weight = torch.complex(real, real.flip(0) if real.dim() else real) if out.is_complex() else real
        weight = weight.to(out.dtype)
        weights.append(send(weight, out.location) if isinstance(out, PointerTensor) else weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(torch.autograd.grad(outs, inputs, weights, allow_unused=True))


def check_forward(op: Any, dtype: torch.dtype, worker: Any) -> int:
    """Every sample forward, equal to local; returns how many there were."""
    count = 0
    for sample in samples(op, dtype, grad=False):
        packed = Packed(sample)
        local = run(op, packed.with_leaves(fresh))
        remote = run(op, packed.with_leaves(lambda s: away(fresh(s), worker)))
        same(home(remote), local, f"sample {count}")
        count += 1
    return count


def check_gradient(op: Any, dtype: torch.dtype, worker: Any) -> int:
    """Every sample's gradients, equal to local; returns how many there were."""
    count = 0
    for sample in samples(op, dtype, grad=True):
        packed = Packed(sample)
        here = packed.with_leaves(fresh)
        outputs = sample.output_process_fn_grad(run(op, here))
        if not differentiable(outputs):
            continue
        expected = gradients(outputs, here)
        there = packed.with_leaves(lambda s: away(fresh(s), worker))
        found = gradients(sample.output_process_fn_grad(run(op, there)), there)
        same(home(found), expected, f"gradient of sample {count}")
        count += 1
    return count


__all__ = ["OPS", "check_forward", "check_gradient", "copy"]
