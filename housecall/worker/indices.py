"""Operators whose kernels trust their indices: checked before they run, or refused.

Most of torch's kernels check an index before they follow it. These do not: some are only called by autograd, with what
the forward gave. A worker's caller may give them anything, and memory beyond a tensor may be the owner's. So in a
session that is held to limits, or holds private data, each index is looked at first; where no range can be stated, the
operator is refused by name. The list was found by giving operators that take integers wild ones; it may not be whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import ProgramError
from ..program.call import Call, refs
from ..program.check import arguments, complete_arguments
from ..program.ops import operator
from ..program.run import value_of
from ..types import Ref

__all__ = ["REFUSED", "check_arguments", "check_indices", "from_forward", "trusts_indices"]

Ranges = Iterator[tuple[torch.Tensor, int]]  # each index, and the number that it must be below


def _planes(dims: int) -> Callable[[Mapping[str, Any]], Ranges]:
    """Positions within the last `dims` dimensions of `self`."""

    def ranges(args: Mapping[str, Any]) -> Ranges:
        yield args["indices"], math.prod(args["self"].shape[-dims:])

    return ranges


def _rows(args: Mapping[str, Any]) -> Ranges:
    """Rows of an embedding's weights."""
    yield args["indices"], args["num_weights"]


def _classes(args: Mapping[str, Any]) -> Ranges:
    """Classes of a loss; `ignore_index` stands for none."""
    target = args["target"]
    ignored = args.get("ignore_index", -100)
    self = args["self"]
    yield torch.where(target == ignored, torch.zeros_like(target), target), self.shape[1 if self.dim() > 1 else 0]


# What finds the indices that these follow.
_FORWARDS = {
    "max_pool2d_with_indices_backward": "max_pool2d_with_indices",
    "max_pool3d_with_indices_backward": "max_pool3d_with_indices",
    "adaptive_max_pool2d_backward": "adaptive_max_pool2d",
    "adaptive_max_pool3d_backward": "adaptive_max_pool3d",
}

_RANGES: dict[str, Callable[[Mapping[str, Any]], Ranges]] = {
    "max_pool2d_with_indices_backward": _planes(2),
    "max_pool3d_with_indices_backward": _planes(3),
    "adaptive_max_pool2d_backward": _planes(2),
    "adaptive_max_pool3d_backward": _planes(3),
    "fractional_max_pool2d_backward": _planes(2),
    "fractional_max_pool3d_backward": _planes(3),
    "embedding_dense_backward": _rows,
    "nll_loss_backward": _classes,
    "nll_loss2d_backward": _classes,
}

# No range can be stated for all that these follow.
REFUSED = frozenset(
    {
        "_ctc_loss",
        "_ctc_loss_backward",
        "segment_reduce",
        "_segment_reduce_backward",
        "_convert_indices_from_coo_to_csr",
        "_convert_indices_from_csr_to_coo",
        "_embedding_bag",
        "_embedding_bag_forward_only",
        "_embedding_bag_backward",
        "_embedding_bag_dense_backward",
        "_embedding_bag_sparse_backward",
        "_embedding_bag_per_sample_weights_backward",
    }
)


def trusts_indices(op: str) -> bool:
    """Whether an operator's kernel follows indices that nobody checks."""
    base = op.partition(".")[0]
    return base in _RANGES or base in REFUSED


def check_indices(call: Call, values: Mapping[int, Any]) -> None:
    """Raise `ProgramError` for an index out of range, or an operator that cannot be checked."""
    check_arguments(
        call.op, {param.name: value_of(arg, values) for param, arg in complete_arguments(operator(call.op), call)}
    )


def check_arguments(op: str, args: Mapping[str, Any]) -> None:
    """The same for an operator with its arguments by name."""
    base = op.partition(".")[0]
    if base in REFUSED:
        raise ProgramError(f"{op} was refused: its kernel follows indices that cannot be checked before it runs")
    ranges = _RANGES.get(base)
    for index, most in ranges(args) if ranges is not None else ():
        if index.numel():
            least, largest = (int(bound) for bound in torch.aminmax(index))
            if least < 0 or largest >= most:
                raise ProgramError(f"{op}: an index is out of range; each is from 0 to {most - 1}")


def from_forward(calls: Sequence[Call]) -> set[int]:
    """The numbers of the calls that follow indices which need no look: their own forward, before them in the same
    program, found them in the same tensor, and nothing else has had them in its hands."""
    found: dict[int, tuple[str, Any]] = {}  # indices -> the operator that found them, and in what
    reads = Counter(ref for call in calls for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg))
    trusted = set()
    for number, call in enumerate(calls):
        base = call.op.partition(".")[0]
        if operator(call.op).reshapes:
            return set()
        if base in _FORWARDS.values() and len(call.outs) > 1 and call.args:
            found[call.outs[1]] = base, call.args[0]
        elif base in _FORWARDS:
            args = {param.name: arg for param, arg in arguments(operator(call.op), call)}
            indices = args.get("indices")
            own = isinstance(indices, Ref) and found.get(indices.id) == (_FORWARDS[base], args.get("self"))
            if own and reads[indices.id] == 1:  # type: ignore[union-attr]  # `own` says it is a Ref
                trusted.add(number)
    return trusted
