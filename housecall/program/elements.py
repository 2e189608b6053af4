"""Which elements operators trust: indices and numbers that their kernels follow anywhere, unless somebody looks before.

What must live here: a rule for each such operator, of the values of its arguments. What must not: shapes (`trust`),
torch: tensors are asked what every tensor knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["VALUES", "Args", "Rule", "Wrong", "is_tensor"]

Args = Mapping[str, Any]
Rule = Callable[[Args], None]


class Wrong(Exception):  # it becomes a `ProgramError`
    """What is wrong with an argument."""


Ranges = Iterator[tuple[Any, int, int]]  # indices, the least that each may be, the most


def _ranged(ranges: Callable[[Args], Ranges]) -> Rule:
    def rule(args: Args) -> None:
        for index, least, most in ranges(args):
            if index.numel():
                found = [int(bound) for bound in index.aminmax()]
                if found[0] < least or found[1] > most:
                    raise Wrong(f"an index is out of range; each is from {least} to {most}")

    return rule


def _planes(dims: int) -> Rule:
    """Positions within the last `dims` dimensions of `self`."""

    def ranges(args: Args) -> Ranges:
        yield args["indices"], 0, math.prod(args["self"].shape[-dims:]) - 1

    return _ranged(ranges)


def _rows(args: Args) -> Ranges:
    """Rows of an embedding's weights."""
    yield args["indices"], 0, args["num_weights"] - 1


def _classes(args: Args) -> Ranges:
    """Classes of a loss; `ignore_index` stands for none."""
    target, sizes = args["target"], tuple(args["self"].shape) or (1,)
    if "ignore_index" in args:
        target = target[target != args["ignore_index"]]
    yield target, 0, (sizes[1] if len(sizes) > 1 else sizes[0]) - 1


def _labels(args: Args) -> Ranges:
    """Classes of a loss with several; -1 ends them."""
    yield args["target"], -1, (tuple(args["self"].shape) or (1,))[-1] - 1


def _steps(matrix: str, pivots: str) -> Rule:
    """Rows that a factorisation has swapped, counted from 1."""

    def ranges(args: Args) -> Ranges:
        yield args[pivots], 1, args[matrix].shape[-2]

    return _ranged(ranges)


_LOW = 0xFFFFFFFF


def _divided(args: Args) -> None:
    """The least integer by -1 is more than the most, and the processor stops at that. Whichever type torch makes of
    the two, these bits are left of them."""
    dividend, divisor = _integers(args["self"]), _integers(args["other"])
    if args.get("rounding_mode") is None or dividend is None or divisor is None:
        return
    least = ((dividend & _LOW) == 1 << 31) | (dividend == -(1 << 63))
    if _any(least) and _any((divisor & _LOW) == _LOW):
        raise Wrong("the least integer of its type by -1 is none of its type")


def _integers(value: Any) -> Any:
    """As 64-bit integers; `None` for floats."""
    if isinstance(value, int):
        return value
    if not is_tensor(value) or value.is_floating_point() or value.is_complex():
        return None
    return value.long()


def _any(truths: Any) -> bool:
    return bool(truths.any()) if is_tensor(truths) else bool(truths)


def is_tensor(value: Any) -> bool:
    """Whether an argument is one, and no number."""
    return hasattr(value, "numel")


def _finite(args: Args) -> None:
    """No infinity, nothing that is not a number."""
    if not bool(args["self"].isfinite().all()):
        raise Wrong("'self' has elements that are infinite or not a number")


def _counted(args: Args) -> None:
    """Numbers, which a loop counts down."""
    if bool(args["count"].isnan().any()) or bool(args["prob"].isnan().any()):
        raise Wrong("'count' or 'prob' has elements that are not a number")


VALUES: dict[str, Rule] = {
    "_linalg_eigvals": _finite,
    "adaptive_max_pool2d_backward": _planes(2),
    "adaptive_max_pool3d_backward": _planes(3),
    "binomial": _counted,
    "div": _divided,
    "embedding_dense_backward": _ranged(_rows),
    "fractional_max_pool2d_backward": _planes(2),
    "fractional_max_pool3d_backward": _planes(3),
    "linalg_lu_solve": _steps("LU", "pivots"),
    "lu_unpack": _steps("LU_data", "LU_pivots"),
    "max_pool2d_with_indices_backward": _planes(2),
    "max_pool3d_with_indices_backward": _planes(3),
    "multi_margin_loss_backward": _ranged(_classes),
    "multilabel_margin_loss_backward": _ranged(_labels),
    "nll_loss2d_backward": _ranged(_classes),
    "nll_loss_backward": _ranged(_classes),
}
