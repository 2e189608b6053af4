"""What operators trust: arguments that their kernels take without a look, though only autograd makes them right.

A worker's caller may give an operator anything, and memory beyond a tensor may be the owner's. So wherever a session is
held to limits, or holds private data, shapes are looked at before the first run on their types (`check_types`), and
elements before each run (`check_values`); an operator for which no rule can be stated is refused by name.

No torch here: tensors are asked what every tensor knows. The rules were found by giving operators wrong arguments and
wild ones (`tools/vet.py`); they may not be all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..errors import ProgramError
from ..types import Ref
from .call import Call, refs
from .check import arguments
from .elements import VALUES, Args, Rule, Wrong, is_tensor
from .ops import operator

__all__ = ["FORWARDS", "REFUSED", "check_given_back", "check_types", "check_values", "from_forward", "trusts_values"]

_BAG = "nn.Embedding, and a sum or mean of its rows, does the same"
_LSTM = "turn it off with torch.backends.mkldnn.flags(enabled=False): torch then takes small operators"
_ATTENTION = "turn it off with torch.backends.mha.set_fastpath_enabled(False): torch then takes small operators"
_SEGMENTS = "scatter_reduce or index_add do the same"

# No rule can be stated for all that these follow. Operator -> what to do instead.
REFUSED = {
    "_ctc_loss": "take the loss where the labels are yours",
    "_ctc_loss_backward": "take the loss where the labels are yours",
    "_embedding_bag": _BAG,
    "_embedding_bag_backward": _BAG,
    "_embedding_bag_forward_only": _BAG,
    "_embedding_bag_per_sample_weights_backward": _BAG,
    "_native_multi_head_attention": _ATTENTION,
    "_segment_reduce_backward": _SEGMENTS,
    "_transformer_encoder_layer_fwd": _ATTENTION,
    "linalg_ldl_solve": "linalg.solve does the same",
    "mkldnn_rnn_layer": _LSTM,
    "mkldnn_rnn_layer_backward": _LSTM,
    "segment_reduce": _SEGMENTS,
}


def check_types(op: str, args: Args) -> None:
    """Raise `ProgramError` for arguments, by name, whose types the operator's kernel would not look at."""
    base = _base(op)
    if base in REFUSED:
        raise ProgramError(
            f"{op} was refused: its kernel trusts arguments that cannot be checked before it runs; {REFUSED[base]}"
        )
    rule = _TYPES.get(base)
    if rule is not None:
        _held(op, rule, args)


def trusts_values(op: str) -> bool:
    """Whether an operator's kernel trusts elements that nobody looks at."""
    return _base(op) in VALUES


def check_values(op: str, args: Args) -> None:
    """Raise `ProgramError` for arguments, by name, whose elements the operator's kernel would follow anywhere."""
    rule = VALUES.get(_base(op))
    if rule is not None:
        _held(op, rule, args)


def _base(op: str) -> str:
    """The name of an operator without its overload and the mark of its form in place."""
    return op.partition(".")[0].removesuffix("_")


def _held(op: str, rule: Rule, args: Args) -> None:
    try:
        rule(args)
    except Wrong as error:
        raise ProgramError(f"{op}: {error}") from None
    except (AttributeError, TypeError, KeyError, IndexError) as error:  # a number for a tensor, and the like
        raise ProgramError(f"{op}: its arguments are of the wrong kinds ({error})") from None


# -- shapes -----------------------------------------------------------------------------------------------


def _has_shape(args: Args, name: str, expected: Sequence[int], why: str) -> None:
    tensor = args.get(name)
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise Wrong(f"'{name}' has the shape {list(tensor.shape)}, expected {list(expected)}, {why}")


def _at_least(args: Args, name: str, dims: int) -> None:
    if args[name].dim() < dims:
        raise Wrong(f"'{name}' has {args[name].dim()} dimensions, expected {dims} or more")


def _has_dims(args: Args, name: str, *allowed: int) -> None:
    if args[name].dim() not in allowed:
        raise Wrong(f"'{name}' has {args[name].dim()} dimensions, expected {' or '.join(map(str, allowed))}")


def _in_a_row(args: Args, *names: str) -> None:
    for name in names:
        if args.get(name) is not None and not args[name].is_contiguous():
            raise Wrong(f"'{name}' is a view whose elements do not stand in a row; give a copy of it")


def _without_gaps(args: Args, *names: str) -> None:
    for name in names:
        if args.get(name) is not None and not _dense(args[name]):
            raise Wrong(f"'{name}' is a view with gaps, or one that repeats elements; give a copy of it")


def _within(args: Args, name: str, least: float, most: float) -> None:
    if name in args and not least <= args[name] <= most:  # else it is the operator's own default
        raise Wrong(f"'{name}' is {args[name]}, expected {least} to {most}")


def _alike(first: str, *names: str) -> Rule:
    """All of one shape."""

    def rule(args: Args) -> None:
        for name in names:
            _has_shape(args, name, args[first].shape, f"that of '{first}'")

    return rule


def _pooled(dims: int) -> Rule:
    """What goes back through an adaptive pooling: only the last dimensions may differ."""

    def rule(args: Args) -> None:
        grad, given = args["grad_output"], args["self"]
        _has_dims(args, "self", dims + 1, dims + 2)
        _has_dims(args, "grad_output", given.dim())
        _has_shape(args, "grad_output", (*given.shape[:-dims], *grad.shape[-dims:]), "as 'self' but for its planes")
        _has_shape(args, "indices", grad.shape, "that of 'grad_output'")
        if 0 in (*given.shape[-dims:], *grad.shape[-dims:]):
            raise Wrong("the planes of 'self' or 'grad_output' are empty")
        if dims == 3:
            _in_a_row(args, "indices")

    return rule


def _drawn_windows(dims: int) -> Rule:
    """What goes back through a fractional pooling."""

    def rule(args: Args) -> None:
        _has_dims(args, "self", dims + 1, dims + 2)
        if len(args["output_size"]) != dims:
            raise Wrong(f"'output_size' has {len(args['output_size'])} numbers, expected {dims}")
        expected = (*args["self"].shape[:-dims], *args["output_size"])
        _has_shape(args, "grad_output", expected, "as 'self' with planes of 'output_size'")
        _has_shape(args, "indices", expected, "that of 'grad_output'")

    return rule


def _by_channel(args: Args) -> None:
    """Statistics and weights of a batch norm: one for each channel."""
    _at_least(args, "input", 2)
    for name in ("weight", "bias", "running_mean", "running_var", "save_mean", "save_invstd", "save_var"):
        if args.get(name) is not None and not (name.startswith("save") and not args[name].numel()):
            _has_shape(args, name, (args["input"].shape[1],), "one for each channel of 'input'")
    _has_shape(args, "grad_out", args["input"].shape, "that of 'input'")
    if args.get("train", args.get("update")):
        for name in ("save_mean", "save_invstd", "save_var"):
            if name in args:
                _has_shape(args, name, (args["input"].shape[1],), "one for each channel of 'input'")


def _by_group(args: Args) -> None:
    """A group norm says the sizes of its input in numbers too."""
    _at_least(args, "input", 2)
    sizes, group = args["input"].shape, args["group"]
    said = args["N"], args["C"], args["HxW"]
    if said != (sizes[0], sizes[1], math.prod(sizes[2:])):
        raise Wrong(f"N, C and HxW are {said}, and the shape of 'input' is {list(sizes)}")
    if group < 1 or sizes[1] % group:
        raise Wrong(f"'group' is {group}, which does not divide {sizes[1]} channels")
    for name in ("weight", "bias"):
        _has_shape(args, name, sizes[1:2], "one for each channel of 'input'")
    for name in ("mean", "rstd"):
        _has_shape(args, name, (sizes[0], group), "one for each row and group")
    _has_shape(args, "grad_out", sizes, "that of 'input'")
    _in_a_row(args, "weight", "bias", "mean", "rstd")
    _without_gaps(args, "input", "grad_out")


def _by_row(args: Args) -> None:
    """What a layer norm kept for its backward."""
    _in_a_row(args, "mean", "rstd", "weight", "bias")


def _by_norm(v: str, g: str, *alike: str) -> Rule:
    """A weight norm: one length for each slice along the first dimension or the last."""

    def rule(args: Args) -> None:
        _at_least(args, v, 1)
        sizes, dim = list(args[v].shape), args.get("dim", 0)
        if dim not in (0, len(sizes) - 1):
            raise Wrong(f"'dim' is {dim}, expected the first or the last of '{v}'")
        lengths = [n if at == dim else 1 for at, n in enumerate(sizes)]
        for name in (g, "saved_norms"):
            _has_shape(args, name, lengths, f"one for each slice of '{v}'")
        for name in alike:
            _has_shape(args, name, sizes, f"that of '{v}'")
        _in_a_row(args, v, g, "saved_norms", *alike)

    return rule


def _transformed(args: Args) -> None:
    """Dimensions of a Fourier transform: from 0, each once; the last is halved."""
    dims, sizes = list(args["dim"]), args["self"].shape
    if not dims or len(set(dims)) < len(dims) or not all(0 <= dim < len(sizes) for dim in dims):
        raise Wrong(f"'dim' is {dims}, expected some of 0 to {len(sizes) - 1}, each once")
    if "last_dim_size" in args:
        whole = args["last_dim_size"]
        if whole < 1 or sizes[dims[-1]] != whole // 2 + 1:
            raise Wrong(f"'last_dim_size' is {whole}, of which {sizes[dims[-1]]} is no half")


def _sampled(dims: int) -> Rule:
    """A grid that says where to look in an input, and how."""

    def rule(args: Args) -> None:
        _has_dims(args, "input", dims + 2)
        _has_dims(args, "grid", dims + 2)
        grid = args["grid"].shape
        _has_shape(args, "grid", (args["input"].shape[0], *grid[1:-1], dims), "a place for each sample")
        _within(args, "interpolation_mode", 0, 2)
        _within(args, "padding_mode", 0, 2)

    return rule


def _measured(args: Args) -> None:
    """Distances to the power of p."""
    _within(args, "p", 0, math.inf)


def _measured_within(args: Args) -> None:
    """Distances between the rows of one matrix."""
    _has_dims(args, "self", 2)
    _measured(args)
    rows = args["self"].shape[0]
    if not rows:
        raise Wrong("'self' has no rows")
    for name in ("grad", "pdist"):
        _has_shape(args, name, (rows * (rows - 1) // 2,), "one for each pair of rows")


def _factors(matrix: str, pivots: str) -> Rule:
    """The pivots of a factorisation: one for each step."""

    def rule(args: Args) -> None:
        _at_least(args, matrix, 2)
        sizes = args[matrix].shape
        _has_shape(args, pivots, (*sizes[:-2], min(sizes[-2:])), f"one for each step of '{matrix}'")

    return rule


def _classified(args: Args) -> None:
    """A class for each prediction, and a weight for each class."""
    _has_dims(args, "self", 0, 1, 2, 4)
    sizes = tuple(args["self"].shape) or (1,)
    along = 1 if len(sizes) > 1 else 0
    if args["self"].dim() > 1 or args["target"].numel() != 1:  # else torch takes a single one in any shape
        _has_shape(args, "target", (*sizes[:along], *sizes[along + 1 :]), "that of 'self' without its classes")
    _has_shape(args, "weight", (sizes[along],), "one for each class")
    _each_or_one(args, args["target"].shape)
    if args.get("total_weight") is not None and args["total_weight"].numel() != 1:
        raise Wrong(f"'total_weight' has the shape {list(args['total_weight'].shape)}, expected one number")


def _each_or_one(args: Args, rows: Sequence[int]) -> None:
    """The gradient of a loss: of each row, or of their sum or mean."""
    reduction = args.get("reduction", 1)
    if reduction not in (0, 1, 2):
        raise Wrong(f"'reduction' is {reduction}, expected 0, 1 or 2")
    if reduction == 0:
        _has_shape(args, "grad_output", rows, "one for each row")
    elif args["grad_output"].numel() != 1:
        raise Wrong(f"'grad_output' has the shape {list(args['grad_output'].shape)}, expected one number")


def _with_truths(args: Args) -> None:
    """A truth for each prediction."""
    _has_shape(args, "target", args["self"].shape, "that of 'self'")
    if "grad_output" in args:
        _each_or_one(args, args["self"].shape)


def _with_labels(args: Args) -> None:
    """Several classes for each prediction."""
    _has_dims(args, "self", 0, 1, 2)
    for name in ("target", "is_target"):
        _has_shape(args, name, args["self"].shape, "that of 'self'")
    _each_or_one(args, args["self"].shape[:-1])


def _attended(args: Args) -> None:
    """Queries, keys and values of [batch, heads, length, width]."""
    for name in ("query", "key", "value"):
        _has_dims(args, name, 4)
    batch, heads, _, width = args["query"].shape
    length = args["key"].shape[2]
    for name in ("key", "value"):
        _has_shape(args, name, (batch, heads, length, width), "as 'query' but for its length")
    if 0 in args["query"].shape or 0 in args["key"].shape:
        raise Wrong("there is nothing to attend to, or nobody who does: a query or key of no elements")
    for name in ("query", "key", "value", "out"):
        tensor = args.get(name)
        if tensor is not None and tensor.dim() == 4 and tensor.shape[3] > 1 and tensor.stride(3) != 1:
            raise Wrong(f"'{name}' is a view whose rows do not stand in a row; give a copy of it")


def _apart(args: Args) -> None:
    """A tensor none of whose elements are one: torch's median of those is wrong, for anybody."""
    tensor = args["self"]
    if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise Wrong("'self' is a view that repeats elements; give a copy of it")


def _stepped(args: Args) -> None:
    """One optimizer's step over many parameters: each list holds as many, of the same shapes, laid out alike."""
    given = {name: value for name, value in args.items() if isinstance(value, list)}
    kept = given["self"]
    steps = given.pop("state_steps", None)
    optional = {"momentum_buffer_list": args.get("momentum"), "max_exp_avg_sqs": args.get("amsgrad")}
    for name, tensors in given.items():
        if not tensors and name in optional and not optional[name]:
            continue
        if len(tensors) != len(kept):
            raise Wrong(f"'{name}' has {len(tensors)} tensors, expected {len(kept)}, as many as 'self'")
        for tensor, like in zip(tensors, kept, strict=True):
            same = tensor.shape == like.shape and tensor.stride() == like.stride() and tensor.dtype == like.dtype
            if not same or not _dense(tensor):
                raise Wrong(f"'{name}' holds a tensor that is not laid out as its parameter, or one with gaps")
    for tensor in [*(steps or ()), args.get("grad_scale"), args.get("found_inf"), args.get("lr")]:
        if is_tensor(tensor) and tensor.numel() != 1:
            raise Wrong(f"a step, scale or learning rate has the shape {list(tensor.shape)}, expected one number")
    if steps is not None and len(steps) != len(kept):
        raise Wrong(f"'state_steps' has {len(steps)} tensors, expected {len(kept)}, as many as 'self'")


def _dense(tensor: Any) -> bool:
    """Whether the elements fill one piece of memory, each once."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _paired(args: Args) -> None:
    """Two lists of as many tensors, each of one shape."""
    if len(args["self"]) != len(args["src"]):
        raise Wrong(f"'self' has {len(args['self'])} tensors and 'src' {len(args['src'])}")


def _resampled(args: Args) -> None:
    """A picture in another size: scales, where they are given, are those of the sizes within two orders, and never lead
    beyond the picture."""
    given = args.get("self", args.get("input"))
    sizes = args["input_size"][2:] if "input_size" in args else given.shape[2:]
    scales = args.get("scale_factors") or [args.get(name) for name in ("scales", "scales_d", "scales_h", "scales_w")]
    scales = [scale for scale in scales if scale is not None]
    if any(not 0 < scale < math.inf for scale in scales):
        raise Wrong(f"its scales are {scales}, expected positive numbers")
    results = args.get("output_size")
    if results is None or not scales:
        return
    if len(scales) != len(sizes) or any(
        not (1 - 1e-6) * out <= size * scale <= 100 * out
        for out, size, scale in zip(results, sizes, scales, strict=False)
    ):
        raise Wrong(f"its scales are {scales}, which do not make {list(results)} of {list(sizes)}")


def _rounded(args: Args) -> None:
    """Beyond these no float has digits."""
    if "decimals" in args:
        _within(args, "decimals", -400, 400)


_PLAIN_NORM = ("_batch_norm_with_update", "_native_batch_norm_legit", "batch_norm_backward", "native_batch_norm",
               "native_batch_norm_backward")  # fmt: skip
_RESAMPLING = (
    "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_trilinear3d",
)  # fmt: skip
_TYPES: dict[str, Rule] = {
    **dict.fromkeys(_PLAIN_NORM, _by_channel),
    **dict.fromkeys(("_fused_adagrad", "_fused_adam", "_fused_adamw", "_fused_sgd"), _stepped),
    **dict.fromkeys(("_fft_c2c", "_fft_c2r", "_fft_r2c"), _transformed),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_2d_backward"), _sampled(2)),
    **dict.fromkeys(("grid_sampler_3d", "grid_sampler_3d_backward"), _sampled(3)),
    **dict.fromkeys(("_pdist_forward", "_pdist_backward"), _measured_within),
    **dict.fromkeys(("median", "nanmedian"), _apart),
    **dict.fromkeys((name + back for name in _RESAMPLING for back in ("", "_backward")), _resampled),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), _alike("grad_output", "output")),
    **dict.fromkeys(("native_group_norm", "native_group_norm_backward"), _by_group),
    **dict.fromkeys(("nll_loss_backward", "nll_loss2d_backward", "multi_margin_loss_backward"), _classified),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
        _attended,
    ),
    "_adaptive_avg_pool2d_backward": _pooled(2),
    "_adaptive_avg_pool3d_backward": _pooled(3),
    "_cdist_backward": _measured,
    "_foreach_copy": _paired,
    "_weight_norm_interface": _by_norm("v", "g"),
    "_weight_norm_interface_backward": _by_norm("saved_v", "saved_g", "grad_w"),
    "adaptive_max_pool2d_backward": _pooled(2),
    "adaptive_max_pool3d_backward": _pooled(3),
    "binary_cross_entropy": _with_truths,
    "binary_cross_entropy_backward": _with_truths,
    "fractional_max_pool2d_backward": _drawn_windows(2),
    "fractional_max_pool3d_backward": _drawn_windows(3),
    "gelu_backward": _alike("self", "grad_output"),
    "linalg_lu_solve": _factors("LU", "pivots"),
    "lu_unpack": _factors("LU_data", "LU_pivots"),
    "multilabel_margin_loss_backward": _with_labels,
    "native_layer_norm_backward": _by_row,
    "round": _rounded,
}

# A backward is given what its forward has made: the operator that makes it, and which result is which argument. What
# types that has, the forward's own typing says; so its own checks hold for the backward too.
FORWARDS: dict[str, tuple[str, tuple[tuple[int, str], ...]]] = {
    "_cdist_backward": ("_cdist_forward.default", ((0, "grad"), (0, "cdist"))),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "_scaled_dot_product_flash_attention_for_cpu.default",
        ((0, "grad_out"), (0, "out"), (1, "logsumexp")),
    ),
    "avg_pool2d_backward": ("avg_pool2d.default", ((0, "grad_output"),)),
    "avg_pool3d_backward": ("avg_pool3d.default", ((0, "grad_output"),)),
    "convolution_backward": ("convolution.default", ((0, "grad_output"),)),
    "glu_backward": ("glu.default", ((0, "grad_output"),)),
    "grid_sampler_2d_backward": ("grid_sampler_2d.default", ((0, "grad_output"),)),
    "grid_sampler_3d_backward": ("grid_sampler_3d.default", ((0, "grad_output"),)),
    "max_pool2d_with_indices_backward": (
        "max_pool2d_with_indices.default",
        ((0, "grad_output"), (1, "indices")),
    ),
    "max_pool3d_with_indices_backward": (
        "max_pool3d_with_indices.default",
        ((0, "grad_output"), (1, "indices")),
    ),
    "native_layer_norm_backward": ("native_layer_norm.default", ((0, "grad_out"), (1, "mean"), (2, "rstd"))),
    **{
        f"{kind}_pad{dims}d_backward": (f"{kind}_pad{dims}d.default", ((0, "grad_output"),))
        for kind in ("reflection", "replication")
        for dims in (1, 2, 3)
    },
}


def check_given_back(op: str, made: Sequence[Any], args: Args) -> None:
    """Raise `ProgramError` if an argument has not the shape of what the forward of `op`, typed as `made`, has made."""
    forward, pairs = FORWARDS[_base(op)]

    def rule(args: Args) -> None:
        for at, name in pairs:
            _has_shape(args, name, made[at].shape, f"that of what {forward} makes")

    _held(op, rule, args)


# -- elements that need no look ---------------------------------------------------------------------------

# What finds the indices that these follow.
_FOUND_BY = {
    "max_pool2d_with_indices_backward": "max_pool2d_with_indices",
    "max_pool3d_with_indices_backward": "max_pool3d_with_indices",
    "adaptive_max_pool2d_backward": "adaptive_max_pool2d",
    "adaptive_max_pool3d_backward": "adaptive_max_pool3d",
}


def from_forward(calls: Sequence[Call]) -> set[int]:
    """The numbers of the calls that follow indices which need no look: their own forward, before them in the same
    program, found them in the same tensor, and nothing else has had them in its hands."""
    found: dict[int, tuple[str, Any]] = {}  # indices -> the operator that found them, and in what
    reads = Counter(ref for call in calls for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg))
    trusted = set()
    for number, call in enumerate(calls):
        base = _base(call.op)
        if operator(call.op).reshapes:
            return set()
        if base in _FOUND_BY.values() and len(call.outs) > 1 and call.args:
            found[call.outs[1]] = base, call.args[0]
        elif base in _FOUND_BY:
            args = {param.name: arg for param, arg in arguments(operator(call.op), call)}
            indices = args.get("indices")
            own = isinstance(indices, Ref) and found.get(indices.id) == (_FOUND_BY[base], args.get("self"))
            if own and reads[indices.id] == 1:  # type: ignore[union-attr]  # `own` says it is a Ref
                trusted.add(number)
    return trusted
