"""Operators whose kernels trust their indices: checked before they run, or refused.

Most of torch's kernels check an index before they follow it. These do not: some are only called by autograd, with what
the forward gave. A worker's caller may give them anything, and memory beyond a tensor may be the owner's. So in a
session that is held to limits, or holds private data, each index is looked at first; where no range can be stated, the
operator is refused by name. The list was found by giving operators that take integers wild ones; it may not be whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..errors import ProgramError
from ..program.call import Call
from ..program.check import complete_arguments
from ..program.ops import operator
from ..program.run import value_of

__all__ = ["REFUSED", "check_indices", "trusts_indices"]

Ranges = Iterator[tuple[torch.Tensor, int]]  # each index, and the number that it must be below


def _planes(dims: int) -> Callable[[dict[str, Any]], Ranges]:
    """Positions within the last `dims` dimensions of `self`."""

    def ranges(args: dict[str, Any]) -> Ranges:
        yield args["indices"], math.prod(args["self"].shape[-dims:])

    return ranges


def _rows(args: dict[str, Any]) -> Ranges:
    """Rows of an embedding's weights."""
    yield args["indices"], args["num_weights"]


def _classes(args: dict[str, Any]) -> Ranges:
    """Classes of a loss; `ignore_index` stands for none."""
    target = args["target"]
    ignored = args.get("ignore_index", -100)
    self = args["self"]
    yield torch.where(target == ignored, torch.zeros_like(target), target), self.shape[1 if self.dim() > 1 else 0]


_RANGES: dict[str, Callable[[dict[str, Any]], Ranges]] = {
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
    base = call.op.partition(".")[0]
    if base in REFUSED:
        raise ProgramError(f"{call.op} was refused: its kernel follows indices that cannot be checked before it runs")
    ranges = _RANGES.get(base)
    if ranges is None:
        return
    args = {param.name: value_of(arg, values) for param, arg in complete_arguments(operator(call.op), call)}
    for index, most in ranges(args):
        if index.numel():
            least, largest = (int(bound) for bound in torch.aminmax(index))
            if least < 0 or largest >= most:
                raise ProgramError(f"{call.op}: an index is out of range; each is from 0 to {most - 1}")
