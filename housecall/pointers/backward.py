"""`loss.backward()`, once more: where the same graph hangs from the same loss, its calls are said as one phrase.

A training loop builds the same graph batch after batch, and torch's engine walks it node by node: each gradient passes
through torch's dispatcher and ours, to take a step that is known. But the gradients of a graph are calls that depend on
nothing but the graph. So the first time torch does it, and what it said is remembered with the graph's shape; the next
time the shape is looked at, the phrase said (`phrase`), each leaf given its gradient, and the graph freed by the
engine.

What must live here: when a backward is the same as one before. What must not: what any backward says: that is torch's.

NOTE [The same graph]
A graph is the same if these are:
- the calls of the present trace up to the loss, so which operators were applied to which registers with what constants,
  and their numbers, of which a gradient's may be made;
- the graph's nodes and edges, in which order they were made, and which leaf is in which register. That differs after
  `detach`, `no_grad`, or where a parameter is frozen, none of which is a call. All must have been built in this trace:
  a graph that reaches back into an earlier one (`Trace.reaches_back`) is torch's. So is whatever could make a node do
  something else than its kind says: a Python function, a hook (`Session.watched`, `Trace.watched`), a hook on what is
  saved (it may compute anew), a gradient that is there already, or what stands between (`aside`).

NOTE [Freed]
torch frees what a graph has saved as its engine walks it, and refuses to walk it twice. So it still walks it, with no
gradient: a hook takes away that of the loss. torch's nodes that get none give none, and issue nothing.
"""

from __future__ import annotations

import functools
from _thread import get_ident
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..types import Ref
from .aside import nothing_between, plainly
from .phrase import Phrase, learned, said
from .session import Session
from .trace import Trace

__all__ = ["backward", "grad_fn", "is_known"]


class Backward(NamedTuple):
    """What a step remembers of the backward of a loss that was made there.

    `loss`: its register. `shape`: of its graph. `leaves`: their registers, in the order in which the graph is walked.
    `numbers`: of the calls before. `flags`: torch's, of which what a node does may depend."""

    loss: Ref
    shape: list[Any]
    leaves: list[Ref]
    numbers: bytes
    flags: tuple[bool, ...]
    phrase: Phrase


def backward(cls: Any, loss: Any, plain: Callable[[], None]) -> None:
    """Do what `plain` does: the backward of a loss with nothing special asked for, as torch does it."""
    slot = loss._slot
    session: Session = slot.session
    with session.lock, plainly():
        trace, here = session.trace, session.trace.step
        may_be_known = slot.trace is trace and not slot.taken and _is_plain(session, trace)
        graph = _graph_of(cls, loss, trace) if may_be_known else None
        if graph is not None:
            shape, leaves = graph
            said_of = slot.register, shape, [leaf._slot.register for leaf in leaves], _exact(trace.numbers), _flags()
            known: Backward | None = here.backward
            if known is not None and known[:5] == said_of and trace.room > known.phrase.calls:
                gradients = said(session, trace, known.phrase)
                _free(loss)
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.grad = gradient
                return
    session.learning = get_ident() if graph is not None else 0
    plain()  # without the lock: what it calls may wait for another session
    with session.lock:
        if graph is not None and session.learning == get_ident() and session.trace is trace:
            phrase = learned(cls, trace, here, [leaf.grad for leaf in leaves])
            here.backward = phrase and Backward(*said_of, phrase)
        session.learning = 0


def is_known(kind: type) -> None:
    """What nodes of this kind say is decided by the calls before them, as with torch's own."""
    _NODES.add(kind)


def _graph_of(cls: Any, loss: Any, trace: Trace) -> tuple[list[Any], list[Any]] | None:
    """The shape of a loss's graph, and its leaves; `None` if it has something that only torch can walk."""
    root = grad_fn(loss)
    if root is None or loss.dim():
        return None
    nodes = {root: 0}
    order, leaves, ages = [root], [], []
    shape: list[Any] = [loss.output_nr]
    for node in order:  # grows while it is walked
        kind = type(node)
        if kind is _Leaf:
            leaf = node.variable
            if type(leaf) is not cls or leaf._slot.trace is not trace or not _is_bare(leaf):
                return None
            leaves.append(leaf)
        elif kind not in _NODES:
            return None
        else:
            ages.append(node._sequence_nr())
        shape.append(kind)
        for following, number in node.next_functions:
            if following is None:
                shape.append(None)
                continue
            at = nodes.get(following)
            if at is None:
                at = nodes[following] = len(order)
                order.append(following)
            shape.append((at, number))
    if len(set(ages)) < len(ages):  # made in several threads
        return None
    shape.append(sorted(range(len(ages)), key=ages.__getitem__))  # torch adds gradients up in this order
    return shape, leaves


def _exact(numbers: list[float]) -> bytes:
    """Numbers as their bits: 0.0 and -0.0 are equal, and not the same."""
    return array("d", numbers).tobytes() if numbers else b""


def _is_bare(leaf: Any) -> bool:
    """Whether a gradient of this leaf is just put there."""
    return (
        leaf.grad is None
        and leaf.requires_grad
        and leaf._backward_hooks is None
        and leaf._post_accumulate_grad_hooks is None
    )


def _is_plain(session: Session, trace: Trace) -> bool:
    """Whether nothing stands between a graph and what it says."""
    return not (trace.reaches_back or trace.watched or session.watched or not nothing_between())


def _flags() -> tuple[bool, ...]:
    return _c._get_deterministic_algorithms(), _c._get_mkldnn_enabled()


def _free(loss: Any) -> None:
    """Let torch free a loss's graph. See NOTE [Freed]."""
    hook = grad_fn(loss).register_prehook(_nothing)
    try:
        _walk((loss,), (_one(loss.dtype),), False, False, (), allow_unreachable=True, accumulate_grad=True)
    finally:
        hook.remove()


def _nothing(gradients: tuple[Any, ...]) -> tuple[None, ...]:
    """What is sent down in place of the gradients of a loss."""
    return (None,) * len(gradients)


@functools.cache
def _one(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones((), dtype=dtype)


_HIDING = ("CopySlices", "CopyBackwards", "DelayedError", "Error", "NotImplemented", "SendRpcBackward")
_NODES = {
    kind for name, kind in vars(torch._C._functions).items() if isinstance(kind, type) and name not in _HIDING
}  # those that say what their edges show
_c: Any = torch._C
_tensor: Any = torch.Tensor
_Leaf: Any = _c._functions.AccumulateGrad
grad_fn: Any = _tensor.grad_fn.__get__  # a pointer's own says that somebody has looked
_walk: Any = torch.autograd.Variable._execution_engine.run_backward
