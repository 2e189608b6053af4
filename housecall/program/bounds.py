"""What operators may take that cannot be typed on meta tensors, or that take more than their types say.

Four closed tables, by operator: `bound` gives the bytes of a call whose results depend on elements, or that has no
meta kernel; `scratch` the bytes of a work space that is larger than inputs and results together; `work` the steps of a
loop that is longer; `pieces` how many results a splitting operator gives. Each reads the call's own arguments, tensors
among them, and never allocates more than they do. No torch here: tensors are asked what every tensor knows.

Numbers are Python's: they do not wrap around.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["BOUNDED", "bound", "pieces", "reads_values", "scratch", "work"]

Args = dict[str, Any]
Rule = Callable[[Args], int]

_INDEX = 8  # bytes of an index
_THREADS = 64  # at most so many work on one call


def _nbytes(tensor: Any) -> int:
    return int(tensor.numel()) * int(tensor.element_size())


def _tensors(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [found for item in value for found in _tensors(item)]
    return [value] if hasattr(value, "element_size") else []


def _broadcast(*shapes: Iterable[int]) -> int:
    """Elements of the broadcast of some shapes; no more than that if they do not fit together."""
    padded = [list(shape)[::-1] for shape in shapes]
    most = max((len(shape) for shape in padded), default=0)
    return math.prod(max(shape[dim] if dim < len(shape) else 1 for shape in padded) for dim in range(most))


def _largest(tensor: Any) -> int:
    """The largest element; 0 for none."""
    return int(tensor.max().item()) if tensor.numel() else 0


# -- bytes of a call that cannot be typed -----------------------------------------------------------------


def _truth(args: Args) -> int:
    return _INDEX


def _compared(args: Args) -> int:
    first, second = args["self"], args["other"]
    return int(4 * _broadcast(first.shape, second.shape) * max(first.element_size(), second.element_size()))


def _nonzero(args: Args) -> int:
    tensor = args["self"]
    return int(tensor.count_nonzero().item() * max(tensor.dim(), 1) * _INDEX)


def _masked_select(args: Args) -> int:
    tensor, mask = args["self"], args["mask"]
    return int(
        _broadcast(tensor.shape, mask.shape) * (tensor.element_size() + 2 * _INDEX)
    )  # and the kernel's prefix sums


def _unique(args: Args) -> int:
    tensor = args["self"]
    return int(2 * int(tensor.numel()) * (tensor.element_size() + 2 * _INDEX))


def _bincount(args: Args) -> int:
    return int(max(_largest(args["self"]) + 1, args.get("minlength", 0)) * _INDEX)


def _total(repeats: Any) -> int:
    """Sum of repeats, or more. A sum of int64 may wrap around, and the kernel would believe it."""
    most = max(_largest(repeats), 0) * int(repeats.numel())
    return int(repeats.sum().item()) if most < 1 << 62 else most


def _repeats(args: Args) -> int:
    return _total(args["repeats"]) * _INDEX


def _repeat_interleave(args: Args) -> int:
    tensor, repeats, dim = args["self"], args["repeats"], args.get("dim")
    along = int(tensor.numel()) if dim is None else int(tensor.size(dim)) if tensor.dim() else 1
    total = _total(repeats) * (along if repeats.numel() == 1 else 1)
    row = int(tensor.numel()) // max(along, 1)
    return int(total * (row * tensor.element_size() + 2 * _INDEX))


def _index(args: Args) -> int:
    """A mask stands for the positions at which it is true, one list of them for each of its dimensions."""
    tensor = args["self"]
    shapes: list[Iterable[int]] = []
    taken: set[int] = set()
    dim = positions = 0
    for index in args["indices"]:
        mask = index is not None and str(index.dtype) in ("torch.bool", "torch.uint8")
        width = max(int(index.dim()), 0) if mask else 1
        if mask:
            count = int(index.count_nonzero().item())
            positions += count * max(width, 1) * _INDEX
            shapes.append((count,))
        elif index is not None:
            shapes.append(index.shape)
        if index is not None:
            taken.update(range(dim, dim + width))
        dim += width
    rest = math.prod(n for at, n in enumerate(tensor.shape) if at not in taken)
    return int(_broadcast(*shapes) * rest * int(tensor.element_size()) + positions)


def _lstsq(args: Args) -> int:
    matrix, right = args["self"], args["b"]
    rows, columns = (*matrix.shape, 1, 1)[:2] if matrix.dim() < 2 else matrix.shape[-2:]
    batch = _broadcast(matrix.shape[:-2], right.shape[:-2], right.shape[:-1])
    wide = max(rows, columns) * (right.shape[-1] if right.dim() else 1)
    return int(
        4 * int(matrix.element_size()) * (batch * (wide + max(rows, columns) ** 2 // max(rows, 1)) + matrix.numel())
    )


def _like_inputs(args: Args) -> int:
    """As many elements as come in, and a work space of the same size."""
    return 2 * sum(_nbytes(tensor) for tensor in _tensors(list(args.values())))


def _elementwise(args: Args) -> int:
    tensors = _tensors(list(args.values()))
    return _broadcast(*[tensor.shape for tensor in tensors]) * max([int(tensor.element_size()) for tensor in tensors])


def _bins(args: Args) -> int:
    """Counts and edges; each thread counts for itself."""
    return _THREADS * 2 * _INDEX * _bins_along(args["bins"])


def _bins_along(bins: Any) -> int:
    return int(bins.numel()) if _tensors(bins) else max(0, int(bins))


def _bins_grid(args: Args) -> int:
    return _THREADS * 2 * _INDEX * math.prod(_bins_along(bins) for bins in args["bins"])


def _bins_edges(args: Args) -> int:
    return 2 * _INDEX * sum(_bins_along(bins) for bins in args["bins"])


_NOT_LARGER = (
    "fractional_max_pool3d_backward.default", "geqrf.default", "multi_margin_loss_backward.default",
    "multilabel_margin_loss_backward.default", "native_norm.ScalarOpt_dim_dtype", "native_norm.default",
)  # fmt: skip
_BOUNDS: dict[str, Rule] = {
    **dict.fromkeys(_NOT_LARGER, _like_inputs),
    **dict.fromkeys(("_standard_gamma_grad.default", "binomial.default"), _elementwise),
    "_histogramdd_bin_edges.default": _bins_edges,
    "_histogramdd_from_bin_cts.default": _bins_grid,
    "_histogramdd_from_bin_tensors.default": _bins_grid,
    "histogram.bin_ct": _bins,
    "histogram.bins_tensor": _bins,
    "_unique.default": _unique,
    "_unique2.default": _unique,
    "allclose.default": _compared,
    "bincount.default": _bincount,
    "equal.default": _truth,
    "index.Tensor": _index,
    "linalg_lstsq.default": _lstsq,
    "masked_select.default": _masked_select,
    "nonzero.default": _nonzero,
    "repeat_interleave.Tensor": _repeats,
    "repeat_interleave.self_Tensor": _repeat_interleave,
    "unique_consecutive.default": _unique,
    "unique_dim.default": _unique,
}

BOUNDED = frozenset(_BOUNDS)


def bound(name: str, args: Args) -> int:
    """At most so many bytes does this call take, of an operator that is `BOUNDED`. `args` by parameter, tensors as
    they are. Raises what a tensor raises that is asked for what it has not."""
    return max(0, int(_BOUNDS[name](args)))


# -- how many results ------------------------------------------------------------------------------------


def _along(args: Args, dim: int) -> int:
    tensor = args["self"]
    return int(tensor.shape[dim]) if -tensor.dim() <= dim < tensor.dim() else 0


def _unbind(args: Args) -> int:
    return _along(args, args.get("dim", 0))


def _split(args: Args) -> int:
    return int(-(-_along(args, args.get("dim", 0)) // max(1, args["split_size"])))


_PIECES: dict[str, Rule] = {
    "split.Tensor": _split,
    "unbind.int": _unbind,
    "unbind_copy.int": _unbind,
    "unsafe_split.Tensor": _split,
}


def pieces(name: str, args: Args) -> int:
    """How many results a call gives at most whose number its arguments choose; 0 for every other call."""
    rule = _PIECES.get(name)
    return 0 if rule is None else rule(args)


# -- how much work ----------------------------------------------------------------------------------------


def _cubic(args: Args) -> int:
    """A dense factorisation: some 20 n m min(n, m) operations for each matrix of a batch."""
    return sum(20 * int(tensor.numel()) * min(tensor.shape[-2:], default=1) for tensor in _tensors(list(args.values())))


def _windows(args: Args) -> int:
    """A pooling looks at each element as often as windows hold it: at most all windows, at most once each."""
    tensor = args["self"]
    kernel = args["kernel_size"]
    sides = list(kernel) if isinstance(kernel, list | tuple) else [kernel]
    space = list(tensor.shape[2:]) or list(tensor.shape[1:]) or [1]
    sides = sides * (len(space) if len(sides) == 1 else 1)
    return int(int(tensor.numel()) * math.prod(min(max(k, 1), max(n, 1)) for k, n in zip(sides, space, strict=False)))


def _pairs(args: Args) -> int:
    first, second = args["x1"], args["x2"]
    return 3 * int(first.numel()) * int(second.shape[-2] if second.dim() > 1 else 1)


def _pairs_within(args: Args) -> int:
    return 3 * int(args["self"].numel()) * int(args["self"].shape[0] if args["self"].dim() else 1)


def _degree(args: Args) -> int:
    """An orthogonal polynomial of degree n by its recurrence: n steps for each element."""
    degree = args["n"]
    if _tensors(degree):
        steps = max(abs(int(degree.max().item())), abs(int(degree.min().item()))) if degree.numel() else 0
    else:
        steps = abs(int(degree))
    points = [tensor.shape for tensor in _tensors([args["x"], degree])]
    return steps * 100 * _broadcast(*points)


def _order(args: Args) -> int:
    return int(args["self"].numel()) * max(int(args["p"]), 1)


def _trilinear(args: Args) -> int:
    """Three tensors are expanded to one shape and multiplied."""
    shapes = []
    for name in ("1", "2", "3"):
        shape = list(args[f"i{name}"].shape)
        for dim in sorted(args[f"expand{name}"]):
            shape.insert(dim, 1)
        shapes.append(shape)
    return _broadcast(*shapes)


_POLYNOMIALS = (
    "chebyshev_polynomial_t", "chebyshev_polynomial_u", "chebyshev_polynomial_v", "chebyshev_polynomial_w",
    "hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p",
    "shifted_chebyshev_polynomial_t", "shifted_chebyshev_polynomial_u", "shifted_chebyshev_polynomial_v",
    "shifted_chebyshev_polynomial_w",
)  # fmt: skip
_FACTORISATIONS = (
    "_linalg_det", "_linalg_eigh", "_linalg_eigvals", "_linalg_slogdet", "_linalg_solve_ex", "_linalg_svd", "cholesky",
    "cholesky_inverse", "cholesky_solve", "geqrf", "linalg_cholesky_ex", "linalg_eig", "linalg_householder_product",
    "linalg_inv_ex", "linalg_ldl_factor_ex", "linalg_lstsq", "linalg_lu", "linalg_lu_factor_ex", "linalg_lu_solve",
    "linalg_matrix_exp", "linalg_pinv", "linalg_qr", "linalg_solve_triangular", "lu_unpack", "ormqr",
    "triangular_solve",
)  # fmt: skip
_POOLS = (
    "avg_pool2d", "avg_pool2d_backward", "avg_pool3d", "avg_pool3d_backward", "fractional_max_pool2d",
    "fractional_max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
)  # fmt: skip
_WORK: dict[str, Rule] = {
    **{f"special_{name}": _degree for name in _POLYNOMIALS},
    **dict.fromkeys(_FACTORISATIONS, _cubic),
    **dict.fromkeys(_POOLS, _windows),
    "_cdist_forward": _pairs,
    "_pdist_forward": _pairs_within,
    "_trilinear": _trilinear,
    "mvlgamma": _order,
    "mvlgamma_": _order,
}


# -- bytes on the way -------------------------------------------------------------------------------------

_LOWERED = frozenset(("torch.float32", "torch.bfloat16", "torch.float16"))  # oneDNN convolves these in small pieces


def _columns(args: Args) -> int:
    """A convolution by one large matrix product: each window of the batch, laid out as a column."""
    weight, given = args["weight"], args["input"]
    if str(given.dtype) in _LOWERED:
        return 0
    kernel = weight.shape[2:]
    places = list(given.shape[2:])
    if not args["transposed"]:
        rows = zip(places, kernel, args["stride"], args["padding"], args["dilation"], strict=False)
        places = [(n + 2 * pad - gap * (k - 1) - 1) // max(step, 1) + 1 for n, k, step, pad, gap in rows]
    each = math.prod(kernel) * math.prod(max(n, 0) for n in places)
    return int(given.shape[0] * weight.shape[1] * max(args["groups"], 1) * each * given.element_size())


def _by_thread(args: Args) -> int:
    """Each thread counts for itself."""
    return int(_THREADS * max(args.get("bins", 100), 0) * args["self"].element_size())


def _by_order(args: Args) -> int:
    """Each element in as many places as `p` says, and its logarithm."""
    return int(2 * _order(args) * args["self"].element_size())


_SCRATCH: dict[str, Rule] = {
    "convolution": _columns,
    "convolution_backward": _columns,
    "histc": _by_thread,
    "mvlgamma": _by_order,
    "mvlgamma_": _by_order,
}


def scratch(name: str, args: Args) -> int:
    """At most so many bytes does a call take and let go again, of an operator whose work space is larger than its
    inputs and results; 0 for the rest."""
    rule = _SCRATCH.get(name.partition(".")[0])
    return 0 if rule is None else max(0, int(rule(args)))


def work(name: str, args: Args) -> int:
    """So many operations does a call do at most that goes through its inputs more than a few times; 0 for the rest."""
    rule = _WORK.get(name.partition(".")[0])
    return 0 if rule is None else max(0, int(rule(args)))


def reads_values(name: str) -> bool:
    """Whether `work` looks at elements, or at numbers that do not shape a result."""
    return name.partition(".")[0].removeprefix("special_") in _POLYNOMIALS
