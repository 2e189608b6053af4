"""PyTorch's own operator database through pointers, against local torch.

The harness that the tests (`test_operator_database.py`) and the table (`tools/coverage.py`) share, and the lists
of what is not equal, each with its reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from housecall.pointers.tensor import PointerTensor, send

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

OPS = {f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name: op for op in op_db}


# What is run of the database: element type, forward or gradient.
RUNS = (
    ("float32", "forward"),
    ("float32", "gradient"),
    ("float64", "forward"),
    ("complex64", "forward"),
    ("complex64", "gradient"),
    ("int64", "forward"),
    ("bool", "forward"),
)

_UNINITIALISED = "its elements are whatever memory held: shape and dtype are as local, a worker gives zeros"
_CUDA_ONLY = "compiles CUDA source; local torch cannot run it here either"
_SPARSE = "takes or gives a sparse layout; only strided tensors travel"
_STORAGE = "changes the size of a storage, which other values at the worker may share"
_NOT_ATEN = "is not an ATen operator (torch_nn::), and only those are in the table"
_LOCAL = "torch's Python code makes a tensor with dimensions here and mixes it with the pointer"

# Operators that do not give through pointers what they give here, for some sample at least, and why.
EXCEPTIONS: dict[str, str] = {
    "as_strided.partial_views": "reads elements outside of the view, and only the view's own elements travel",
    "empty": _UNINITIALISED,
    "empty_like": _UNINITIALISED,
    "empty_permuted": _UNINITIALISED,
    "empty_strided": _UNINITIALISED,
    "jiterator_2inputs_2outputs": _CUDA_ONLY,
    "jiterator_4inputs_with_extra_args": _CUDA_ONLY,
    "jiterator_binary": _CUDA_ONLY,
    "jiterator_binary_return_by_ref": _CUDA_ONLY,
    "jiterator_unary": _CUDA_ONLY,
    "masked.mean": _LOCAL,
    "masked.std": _LOCAL,
    "masked.var": _LOCAL,
    "new_empty": _UNINITIALISED,
    "new_empty_strided": _UNINITIALISED,
    "nn.functional.linear_cross_entropy.chunked": _NOT_ATEN,
    "nn.functional.linear_cross_entropy.chunked_none": _NOT_ATEN,
    "pca_lowrank": _LOCAL,
    "resize_": _STORAGE,
    "resize_as_": _STORAGE,
    "sparse.mm.reduce": _SPARSE,
    "sparse.sampled_addmm": _SPARSE,
    "svd_lowrank": _LOCAL,
    "tensor_split": "reads a tensor of indices inside torch's C++, where no pointer can answer; lists of indices work",
    "to_sparse": _SPARSE,
    "unravel_index": _LOCAL,
}
UNINITIALISED = frozenset(name for name, reason in EXCEPTIONS.items() if reason == _UNINITIALISED)
CUDA_ONLY = frozenset(name for name, reason in EXCEPTIONS.items() if reason == _CUDA_ONLY)

# How the others say no: a part of the message.
REFUSALS: dict[str, str] = {
    _SPARSE: r"a tensor of layout torch\.sparse_csr cannot be sent|operator '_to_sparse.* is not in the table",
    _STORAGE: r"operator 'resize_(as_)?\.default' is not in the table of allowed operators",
    _NOT_ATEN: r"operator 'torch_nn::\w+' is not torch's own \(aten\)",
    _LOCAL: r"was given a tensor at 'w' and a local one of shape .* Send the local one there",
    EXCEPTIONS["as_strided.partial_views"]: r"storage size of \d+ are out of bounds for storage of size \d+",
    EXCEPTIONS["tensor_split"]: r"tensor_split|its data is not allocated yet",
}

_VECTORS = "torch computes singular or eigen vectors as well for a tensor subclass: another LAPACK routine"
_PRODUCT = "torch's gradient takes the formula without branches on zeros for a tensor subclass"

# Operators for which torch itself takes another algorithm for a tensor subclass, or another order of sums: equal
# within `assert_close`'s own tolerance. All others are equal to the bit.
ROUNDING: dict[str, str] = {
    "__rmatmul__": "torch folds a batch into one product by other rules for a tensor subclass (complex only)",
    "cumprod": _PRODUCT,
    "linalg.cond": _VECTORS,
    "linalg.eigvalsh": _VECTORS,
    "linalg.lstsq": "LAPACK's rounding depends on where its work space lies in memory",
    "linalg.lstsq.grad_oriented": "LAPACK's rounding depends on where its work space lies in memory",
    "linalg.matrix_norm": _VECTORS,
    "linalg.norm": _VECTORS,
    "linalg.svdvals": _VECTORS,
    "masked.prod": _PRODUCT,
    "masked_fill": "torch's gradient sums with `where` for a tensor subclass, and with `masked_select` otherwise",
    "matmul": "torch folds a batch into one product by other rules for a tensor subclass (complex only)",
    "norm.nuc": _VECTORS,
    "prod": _PRODUCT,
}


def entries(dtype: str, kind: str) -> list[str]:
    """The names of the database's operators that have this dtype, forward or with a gradient."""
    wanted = getattr(torch, dtype)
    cpu = torch.device("cpu")
    return [
        name
        for name, op in OPS.items()
        if wanted in op.dtypes
        and (kind == "forward" or (op.supports_autograd and wanted in op.supported_backward_dtypes(cpu)))
    ]


def tolerance(name: str) -> dict[str, float]:
    """What `assert_close` is given for this operator."""
    return {} if name in ROUNDING else {"rtol": 0.0, "atol": 0.0}


def seed(number: int) -> torch.Generator:
    """`torch.manual_seed` for the CPU alone: torch's own keeps a traceback for each device that is not there."""
    return torch.default_generator.manual_seed(number)


def samples(op: Any, dtype: torch.dtype, grad: bool) -> list[Any]:
    """All samples at once: they are drawn before anything else draws."""
    seed(0)
    with warnings.catch_warnings(), patch.object(torch, "manual_seed", seed):  # the database seeds for each sample
        warnings.simplefilter("ignore")
        return list(op.sample_inputs("cpu", dtype, requires_grad=grad))


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


def leaves(value: Any) -> list[Any]:
    return [v for v in tree_flatten(value)[0] if isinstance(v, torch.Tensor)]


def same(found: Any, expected: Any, what: str, **close: float) -> None:
    """Equal in structure, dtype, shape and elements; `close` is `assert_close`'s tolerance."""
    found_leaves, found_tree = tree_flatten(found)
    expected_leaves, expected_tree = tree_flatten(expected)
    assert len(found_leaves) == len(expected_leaves), f"{what}: {found_tree} against {expected_tree}"
    for f, e in zip(found_leaves, expected_leaves, strict=True):
        if isinstance(e, torch.Tensor):
            assert isinstance(f, torch.Tensor), f"{what}: {type(f)} against a tensor"
            assert f.dtype == e.dtype, f"{what}: {f.dtype} against {e.dtype}"
            assert f.shape == e.shape, f"{what}: {tuple(f.shape)} against {tuple(e.shape)}"
            torch.testing.assert_close(f.detach(), e.detach(), equal_nan=True, msg=lambda m: f"{what}: {m}", **close)
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
    seed(1)
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


def forward(op: Any, sample: Any, worker: Any) -> tuple[Any, Any]:
    """What one sample gives through pointers, and what it gives here."""
    packed = Packed(sample)
    local = run(op, packed.with_leaves(fresh))
    return home(run(op, packed.with_leaves(lambda s: away(fresh(s), worker)))), local


def gradient(op: Any, sample: Any, worker: Any) -> tuple[Any, Any]:
    """The gradients of one sample through pointers, and those here; empty if nothing has any."""
    packed = Packed(sample)
    here = packed.with_leaves(fresh)
    outputs = sample.output_process_fn_grad(run(op, here))
    if not differentiable(outputs):
        return [], []
    expected = gradients(outputs, here)
    there = packed.with_leaves(lambda s: away(fresh(s), worker))
    return home(gradients(sample.output_process_fn_grad(run(op, there)), there)), expected


ONE = {"forward": forward, "gradient": gradient}


def check(name: str, dtype: str, kind: str, worker: Any, **close: float) -> None:
    """Every sample of one entry, equal through pointers and here."""
    op = OPS[name]
    for number, sample in enumerate(samples(op, getattr(torch, dtype), grad=kind == "gradient")):
        found, expected = ONE[kind](op, sample, worker)
        same(found, expected, f"{name}, {dtype} {kind}, sample {number}", **close)


__all__ = [
    "CUDA_ONLY", "EXCEPTIONS", "ONE", "OPS", "REFUSALS", "ROUNDING", "RUNS", "UNINITIALISED", "Packed", "away", "check",
    "differentiable", "entries", "fresh", "home", "leaves", "run", "same", "samples", "tolerance",
]  # fmt: skip
