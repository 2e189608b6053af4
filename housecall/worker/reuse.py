"""Which memory is whose within a program: what may be written over, and what its writes can reach.

Within a program it is known that nothing reads a value after a call. Then `relu` of it may write over it: the elements
are the same, and a large convolution's result is gone through once less, in memory that is in the cache. So it is for
the few operators below, which do the same arithmetic in place, over values that are known to stand alone.

NOTE [What stands alone]
A schema does not say that an operator always gives new memory (`dropout` in evaluation gives its input, and whether it
does can depend on a number), and a view hides another reader. So a value is only taken to stand alone if an operator of
`_MAKERS` made it, whose kernels are known to take new memory. It is written over if nothing but such operators has read
it, since any other may have taken a view of it; if no output is it, and the call is the last that reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..program.call import HOLE, Program, refs
from ..program.check import arguments
from ..program.flow import written
from ..program.ops import operator
from ..types import Ref

__all__ = ["in_place", "taken_over", "writes_are_its_own"]

# fmt: off
_MAKERS = frozenset((
    "_foreach_add.List", "_foreach_add.Scalar", "_foreach_div.List", "_foreach_div.Scalar", "_foreach_mul.List",
    "_foreach_mul.Scalar", "_foreach_neg.default", "_foreach_sqrt.default", "_foreach_sub.List", "_foreach_sub.Scalar",
    "_log_softmax.default", "_log_softmax_backward_data.default", "_softmax.default", "_softmax_backward_data.default",
    "_to_copy.default", "abs.default", "add.Scalar", "add.Tensor", "addcdiv.default", "addcmul.default",
    "addmm.default", "avg_pool2d.default", "bmm.default", "cat.default", "clone.default", "convolution.default",
    "convolution_backward.default", "div.Scalar", "div.Tensor", "embedding.default",
    "embedding_dense_backward.default", "exp.default", "full.default", "full_like.default", "gather.default",
    "gelu.default", "gelu_backward.default", "index_select.default", "log.default", "max_pool2d_with_indices.default",
    "max_pool2d_with_indices_backward.default", "maximum.default", "mean.default", "mean.dim", "minimum.default",
    "mm.default", "mul.Scalar", "mul.Tensor", "native_batch_norm.default", "native_batch_norm_backward.default",
    "native_dropout.default", "native_dropout_backward.default", "native_layer_norm.default",
    "native_layer_norm_backward.default", "neg.default", "new_ones.default", "new_zeros.default",
    "nll_loss_backward.default", "nll_loss_forward.default", "ones.default", "ones_like.default", "pow.Tensor_Scalar",
    "reciprocal.default", "relu.default", "rsqrt.default", "sigmoid.default", "sigmoid_backward.default",
    "sign.default", "sqrt.default", "stack.default", "sub.Scalar", "sub.Tensor", "sum.default", "sum.dim_IntList",
    "tanh.default", "tanh_backward.default", "threshold_backward.default", "where.self", "zeros.default",
    "zeros_like.default",
))
# fmt: on


def _threshold_backward(grad: torch.Tensor, result: torch.Tensor, threshold: Any) -> torch.Tensor:
    if grad.numel() < _SMALL:
        return _threshold_backward_new(grad, result, threshold)  # type: ignore[no-any-return]  # torch's operators are untyped
    if grad.dtype is result.dtype and grad.shape == result.shape and grad.stride() == result.stride():
        return _threshold_backward_into(grad, result, threshold, grad_input=grad)  # type: ignore[no-any-return]  # as above
    return _threshold_backward_new(grad, result, threshold)  # type: ignore[no-any-return]  # as above


_aten: Any = torch.ops.aten
_SMALL = 1 << 14  # elements: below, new memory costs less than to look whether the old will do
_threshold_backward_new = _aten.threshold_backward.default._op
_threshold_backward_into = _aten.threshold_backward.grad_input._op

_FORMS: dict[str, Callable[..., Any]] = {
    "relu.default": torch.relu_,
    "threshold_backward.default": _threshold_backward,
}  # operators whose first argument may become their result


def in_place(op: str) -> Callable[..., Any]:
    """The function that does an operator in place of its first argument. Takes what the operator takes, in order."""
    return _FORMS[op]


def taken_over(program: Program) -> set[int]:
    """The numbers of the calls whose first argument may become their result: see NOTE [What stands alone]."""
    outputs = {ref for _, ref in program.outputs}
    alone: dict[int, int] = {}  # what a maker made, and which call read it last
    found: dict[int, int] = {}  # call -> its first argument
    for number, call in enumerate(program.calls):
        views = call.op not in _MAKERS and call.op not in _FORMS
        read = [ref for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg)]
        for ref in read:
            if ref in alone:
                alone[ref] = number
            if views:
                alone.pop(ref, None)
        first = call.args[0] if call.args else None
        if call.op in _FORMS and isinstance(first, Ref) and read.count(first.id) == 1 and not call.kwargs:
            found[number] = first.id
        if call.op in _MAKERS:
            alone.update((out, number) for out in call.outs if out != HOLE)
    return {number for number, ref in found.items() if ref not in outputs and alone.get(ref) == number}


def writes_are_its_own(program: Program) -> bool:
    """Whether all that a program can write to is known: what it says it updates, and what stands alone, and views."""
    known = {item.id for item in program.inputs if item.updates}
    for call in program.calls:
        rules = operator(call.op)
        if not known.issuperset(written(call, rules)):
            return False
        by_name = {param.name: arg for param, arg in arguments(rules, call)}
        sources = [ref for item in rules.returns if item.view_of for ref in refs(by_name.get(item.view_of))]
        if call.op in _MAKERS or (sources and known.issuperset(sources)):
            known.update(call.outs)
    return True
