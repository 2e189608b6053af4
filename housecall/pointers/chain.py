"""A chain of layers on pointers, an `nn.Sequential` of torch's own, as one node of the graph.

torch builds a node for each operator, and each of them, and each of its gradients, passes through torch's dispatcher
and ours. What a chain of its layers says is known from the layers. So it is one node: its forward is said as one phrase
(`phrase`), and its backward is the products and sums that torch's formulas take, in their order, without those that
only turn a matrix or share it. The same kernels get the same operands, so the values are the same, bit for bit.

What must live here: which layers are known, and what they say. What must not: how a phrase is learned. Where a chain
has anything else (a layer that is not in the table, a hook, a shape for which torch takes other operators) torch does
it all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

from ..errors import UsageError
from ..program.outcome import Spec
from .aside import nothing_between
from .backward import is_known
from .phrase import say
from .slot import Slot
from .tensor import PointerTensor

__all__ = ["forward"]

Size = tuple[int, ...]
_aten: Any = torch.ops.aten


class Layer(NamedTuple):
    """A kind of layer. `settings` are its attributes that decide what it says, `parameters` names its parameters.

    `size(settings, size of x, parameters' specs)` is the size of its result, `None` if torch says it in another way;
    `run(settings, x, *parameters)` the result. `reads(needs)` says whether `back` reads what is kept, and which
    parameters. `back(settings, size of x, gradient, kept, needs, *parameters)` gives the gradients of x and of each
    parameter, `None` where `needs` says so; `keeps` is which value it takes: "x" or "out". `views`: whether the result
    is a view of x."""

    settings: tuple[str, ...]
    parameters: tuple[str, ...]
    size: Callable[..., Size | None]
    run: Callable[..., Any]
    reads: Callable[[tuple[bool, ...]], tuple[bool, tuple[bool, ...]]]
    back: Callable[..., tuple[Any, ...]]
    keeps: str = ""
    views: bool = False


def _flat_size(settings: tuple[int, int], size: Size) -> Size | None:
    if not all(-len(size) <= dim < len(size) for dim in settings):
        return None
    start, end = (dim % len(size) for dim in settings)
    if start >= end or 0 in size:
        return None
    return (*size[:start], torch.Size(size[start : end + 1]).numel(), *size[end + 1 :])


def _linear_size(settings: tuple[()], size: Size, weight: Spec, bias: Spec | None = None) -> Size | None:
    """torch takes other products for what lies transposed, and a matrix of one row or column lies so as well."""
    if bias is None or len(size) != 2 or size[1] != weight.size[1] or min(*size, *weight.size) < 2:
        return None
    return size[0], weight.size[0]


def _linear_back(
    settings: tuple[()], size: Size, grad: Any, x: Any, needs: tuple[bool, ...], weight: Any, bias: Any
) -> tuple[Any, ...]:
    return (
        grad.mm(weight) if needs[0] else None,
        grad.t().mm(x) if needs[1] else None,
        grad.sum(0) if needs[2] else None,
    )


def _activation(run: Callable[..., Any], back: Callable[..., Any], keeps: str, *settings: str) -> Layer:
    """A layer that takes each element by itself. Only `inplace=False` is known."""
    return Layer(
        settings,
        (),
        lambda settings, size: None if True in settings else size,
        lambda settings, x: run(settings, x),
        lambda needs: (needs[0], ()),
        lambda settings, size, grad, kept, needs: (back(settings, grad, kept) if needs[0] else None,),
        keeps,
    )


_LAYERS: dict[type[nn.Module], Layer] = {
    nn.Flatten: Layer(
        ("start_dim", "end_dim"),
        (),
        _flat_size,
        lambda settings, x: x.flatten(*settings),
        lambda needs: (False, ()),
        lambda settings, size, grad, kept, needs: (grad.reshape(size) if needs[0] else None,),
        views=True,
    ),
    nn.Linear: Layer(
        (),
        ("weight", "bias"),
        _linear_size,
        lambda settings, x, weight, bias: torch.addmm(bias, x, weight.t()),
        lambda needs: (needs[1], (needs[0], False)),
        _linear_back,
        "x",
    ),
    nn.ReLU: _activation(
        lambda settings, x: torch.relu(x),
        lambda settings, grad, out: _aten.threshold_backward(grad, out, 0),
        "out", "inplace",
    ),
    nn.Tanh: _activation(
        lambda settings, x: torch.tanh(x), lambda settings, grad, out: _aten.tanh_backward(grad, out), "out"
    ),
    nn.Sigmoid: _activation(
        lambda settings, x: torch.sigmoid(x), lambda settings, grad, out: _aten.sigmoid_backward(grad, out), "out"
    ),
    nn.GELU: _activation(
        lambda settings, x: functional.gelu(x, approximate=settings[0]),
        lambda settings, grad, x: _aten.gelu_backward(grad, x, approximate=settings[0]),
        "x", "approximate",
    ),
}  # fmt: skip


class _Link(NamedTuple):
    """A layer at its place in a chain: the size of its x, where its parameters begin among those of the chain and end,
    and which of the chain's values it keeps (-1 if none): the chain's x is the first of them."""

    layer: Layer
    settings: tuple[Any, ...]
    size: Size
    begin: int
    end: int
    kept: int


class Chain:
    """What layers of these kinds, settings and types say, one after the other. It holds no module."""

    def __init__(self, links: list[_Link]) -> None:
        self.links = links
        self.seen = int(links[0].layer.views)  # which value is a view of x: made anew, not kept
        # Beside x, which is there already.
        self.kept = tuple(sorted({link.kept for link in links if link.kept > self.seen}))
        self._reads: dict[tuple[bool, ...], _Reads] = {}

    def reads(self, needs: tuple[bool, ...]) -> _Reads:
        """What `back` reads for these needs."""
        found = self._reads.get(needs)
        if found is None:
            found = self._reads[needs] = _reads_of(self, needs)
        return found

    def run(self, x: Any, *parameters: Any) -> tuple[Any, ...]:
        """The values that a backward takes, in their order, and the result."""
        values = [x]
        for link in self.links:
            values.append(link.layer.run(link.settings, values[-1], *parameters[link.begin : link.end]))
        return (*[values[at] for at in self.kept if at < len(self.links)], values[-1])

    def back(self, grad: Any, values: dict[int, Any], parameters: Any, needs: tuple[bool, ...]) -> tuple[Any, ...]:
        """The gradients of x and of the parameters; `needs` says of which. What it does not read may be `None`."""
        if self.seen and values[0] is not None:
            first = self.links[0]
            values[1] = first.layer.run(first.settings, values[0])
        found: list[Any] = [None] * len(needs)
        for link in reversed(self.links):
            wanted = any(needs[: 1 + link.begin]), *needs[1 + link.begin : 1 + link.end]
            kept, own = values.get(link.kept), parameters[link.begin : link.end]
            grad, *found[1 + link.begin : 1 + link.end] = link.layer.back(
                link.settings, link.size, grad, kept, wanted, *own
            )
            if grad is None:
                return tuple(found)
        found[0] = grad if needs[0] else None
        return tuple(found)


class _Reads(NamedTuple):
    """Of x and the parameters, which a backward reads and which not; and which of the values, by their numbers."""

    inputs: tuple[bool, ...]
    others: tuple[bool, ...]
    kept: tuple[int, ...]


def _reads_of(chain: Chain, needs: tuple[bool, ...]) -> _Reads:
    inputs, kept = [False] * len(needs), set()
    for link in chain.links:
        keeps, own = link.layer.reads((any(needs[: 1 + link.begin]), *needs[1 + link.begin : 1 + link.end]))
        inputs[1 + link.begin : 1 + link.end] = own
        if keeps:
            kept.add(link.kept)
    inputs[0] = any(at <= chain.seen for at in kept)
    others = tuple([not read for read in inputs])
    return _Reads(tuple(inputs), others, tuple(sorted(at for at in kept if at > chain.seen)))


class _Node(torch.autograd.Function):
    """A chain, x and the parameters -> the result.

    What a backward reads is saved with torch, which frees it and sees to it that nobody has written to it meanwhile.
    The rest is here for gradients that have a graph themselves: those are torch's own."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Any, *parameters: Any) -> Any:
        *kept, out = say(PointerTensor, x._slot.session, chain, chain.run, (x, *parameters))
        reads = chain.reads(ctx.needs_input_grad[1:])
        if reads.kept != chain.kept or len(kept) < len(reads.kept):
            values = {**dict(zip(chain.kept, kept, strict=False)), len(chain.links): out}
            kept = [values[at] for at in reads.kept]
        inputs = x, *parameters
        read = list(compress(inputs, reads.inputs))
        ctx.save_for_backward(*read, *kept)
        ctx.ids = [one._slot.id for one in read]
        ctx.rest = list(compress(inputs, reads.others))
        ctx.set_materialize_grads(False)
        ctx.chain = chain
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if grad is None:
            _ = ctx._raw_saved_tensors  # raises if the graph was freed, and unpacks nothing
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # first of all: it raises as well
        chain, needs = ctx.chain, ctx.needs_input_grad[1:]
        reads = chain.reads(needs)
        read, kept = iter(saved[: len(ctx.ids)]), saved[len(ctx.ids) :]
        _check_saved(saved, ctx.ids)
        if torch.is_grad_enabled():
            rest = iter(ctx.rest)
            everything = [next(read) if is_read else next(rest) for is_read in reads.inputs]
            return None, *_differentiable(chain.run(*everything)[-1], everything, grad, needs)
        inputs = [next(read) if is_read else None for is_read in reads.inputs]
        values = {0: inputs[0], **dict(zip(reads.kept, kept, strict=True))}
        return None, *chain.back(grad, values, inputs[1:], needs)


def _check_saved(saved: Any, ids: list[int]) -> None:
    """Raise `UsageError` for a tensor that has other data than when it was saved: torch would have kept the old."""
    for tensor, ref in zip(saved, ids, strict=False):
        slot = tensor._slot
        if type(slot) is Slot and slot.id != ref:  # another kind of slot says by itself what it is
            raise UsageError(
                "the .data of a parameter or input was replaced between forward and backward: call loss.backward() "
                "before, or write in place, with torch.no_grad()"
            )


def _differentiable(out: Any, inputs: list[Any], grad: Any, needs: tuple[bool, ...]) -> list[Any]:
    wanted = [one for one, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


_apply: Any = super(torch.autograd.Function, _Node).apply  # without what functorch needs, which is not there
is_known(_Node._backward_cls)  # what torch makes of it
_chains: dict[Any, Chain | None] = {}
_MOST = 1 << 12  # chains that are remembered


def forward(part: nn.Sequential, x: Any) -> Any:
    """`nn.Sequential.forward` of a module that is away."""
    if type(x) is PointerTensor and type(part) is nn.Sequential and nothing_between() and _is_untouched():
        parameters: list[Any] = []
        key = _key(part, x, parameters)
        chain = _chain_of(key) if key is not None else None
        if chain is not None:
            return _apply(chain, x, *parameters)
    elif not any(isinstance(held, PointerTensor) for held in part.parameters()):  # it came home in pieces
        part.__dict__.pop("forward", None)
    return type(part).forward(part, x)


forward._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch.compile's mark: not to be traced into


def _is_untouched() -> bool:
    """Whether torch calls modules as it was written to."""
    return nn.Sequential.forward is _FORWARD and nn.Module.__call__ is _CALL


def _key(part: nn.Sequential, x: Any, parameters: list[Any]) -> Any:
    """What decides what a chain says, and its parameters; `None` if not only its layers do."""
    session = x._slot.session
    key: list[Any] = [x._slot.spec]
    for child in part._modules.values():
        kind = type(child)
        layer = _LAYERS.get(kind)
        if layer is None or kind.forward is not _FORWARDS[kind]:
            return None
        held = child.__dict__
        if "forward" in held or "_call_impl" in held or held.get("_compiled_call_impl") is not None:
            return None
        if (
            held["_forward_hooks"]
            or held["_forward_pre_hooks"]
            or held["_backward_hooks"]
            or held["_backward_pre_hooks"]
        ):
            return None
        key.append((kind, *map(held.__getitem__, layer.settings)))
        own = held["_parameters"]
        if len(own) != len(layer.parameters):
            return None
        for name in layer.parameters:
            parameter = own.get(name)
            if type(parameter) is not PointerTensor:
                return None
            slot = parameter._slot
            if slot.session is not session:
                return None
            key.append(slot.spec)
            parameters.append(parameter)
    if torch_module._has_any_global_hook() or len(set(map(id, parameters))) < len(parameters):
        return None  # a parameter that is used twice: torch adds up its gradients in an order of its own
    return tuple(key)


_FORWARD, _CALL = nn.Sequential.forward, nn.Module.__call__
_FORWARDS: dict[Any, Any] = {kind: kind.forward for kind in _LAYERS}


def _chain_of(key: tuple[Any, ...]) -> Chain | None:
    """The chain of a key, `None` if torch says it in another way."""
    try:
        return _chains[key]
    except KeyError:
        if len(_chains) >= _MOST:
            _chains.clear()
        found = _chains[key] = _made(key)
        return found


def _made(key: tuple[Any, ...]) -> Chain | None:
    specs = [one for one in key if isinstance(one, Spec)]
    if not all(spec.dense and spec.dtype is specs[0].dtype for spec in specs) or not specs[0].dtype.is_floating_point:
        return None
    size: Size | None = specs[0].size
    links: list[_Link] = []
    begin = 0
    kinds = [at for at, one in enumerate(key) if not isinstance(one, Spec)]
    for number, (at, after) in enumerate(zip(kinds, [*kinds[1:], len(key)], strict=True)):
        kind, *settings = key[at]
        layer, own = _LAYERS[kind], key[at + 1 : after]
        before = size
        size = layer.size(tuple(settings), before, *own)
        if size is None or before is None:
            return None
        end = begin + len(own)
        kept = {"x": number, "out": number + 1}.get(layer.keeps, -1)
        links.append(_Link(layer, tuple(settings), before, begin, end, kept))
        begin = end
    # A result that is a view would share what it shares with a value that is saved, and torch would not know.
    return Chain(links) if len(links) > 1 and not links[-1].layer.views else None
