"""What a call will take, known before it runs: bytes, operations, and whether it would change a value's own size.

What must live here: how all that is found, from meta tensors where they suffice and from `bounds` where not. What must
not: limits, and who is charged. Nothing here allocates more than a call's own inputs do.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..errors import LimitError, ProgramError
from ..types import TensorType
from .bounds import BOUNDED, bound, pieces, reads_values, scratch, work
from .call import HOLE, Call, Program, with_numbers
from .check import check
from .ops import operator
from .outcome import Spec, expected, spec, spec_of, stand_in
from .run import arguments_of, computing, overload
from .trust import FORWARDS, check_given_back, check_types
from .typing import address_of, meta, type_of

__all__ = ["MOST_DIMS", "WRAPS", "Forecast", "Made", "forecast", "shown_by_shape", "type_program"]

WRAPS = 1 << 62  # bytes: near here torch's own arithmetic wraps around
MOST_DIMS = 64  # as many as torch's kernels take; sizes and strides are memory too
_STEPS = 10**9  # of a loop that types a call


class Made(NamedTuple):
    """A result that a call will make: its type, the bytes of its storage, and whether that is new (else it is an
    argument's, which the result is a view of)."""

    spec: Spec
    nbytes: int
    fresh: bool


class Forecast(msgspec.Struct, frozen=True):
    """What a call will take.

    `fresh`     bytes of new storage for its results
    `most`      bytes of the largest thing that it makes or goes through; the elements of an input count as often as
                they are repeated
    `flops`     operations, of an operator that can have many for the size of its inputs
    `single`    the type of its only result, if it has only one and that could be typed
    `made`      all its results, in the order of its ids, `None` for a hole; `None` if they could not be typed
    `lasting`   whether the same types always take the same; else it depends on elements
    """

    fresh: int
    most: int
    flops: int = 0
    single: Spec | None = None
    made: tuple[Made | None, ...] | None = None
    lasting: bool = True


def forecast(call: Call, values: Mapping[int, Any], nbytes: float, flops: float) -> Forecast:
    """What a call on these values will take. Beyond `nbytes` to go through or `flops` it is not looked at any closer:
    a long loop is long on meta tensors too, and so is a look at very many elements. Raises `ProgramError` for a call
    that breaks a rule, `LimitError` for one that cannot be sized, and whatever torch raises if the call is wrong."""
    rule = _rule(call.op)
    args = arguments_of(call, values)
    _check(rule, call, args)
    check_types(call.op, args)
    if rule.forward:
        check_given_back(call.op, _made_by(_rule(rule.forward), args), args)
    through = max([spec_of(tensor).volume for tensor in _tensors(args)], default=0)
    bounded = rule.name in BOUNDED and not _at_positions(args)
    if through > nbytes and (bounded or reads_values(call.op)):
        return Forecast(0, through)
    steps = work(call.op, args)
    if steps > flops:
        return Forecast(0, 0, steps, lasting=not reads_values(call.op))
    if bounded:
        return _bounded(rule, args, through, steps)
    try:
        return _typed(rule, args, through, steps)
    except ProgramError:
        raise
    except Exception as error:
        if rule.in_place:  # it makes nothing, and says itself what is wrong
            return Forecast(0, through, steps)
        if isinstance(error, NotImplementedError):  # torch has no meta kernel
            reason = str(error).partition("\n")[0][:300]
            raise LimitError(f"{call.op} cannot be sized before it runs, and is refused for that: {reason}") from None
        raise


def shown_by_shape(call: Call, values: Mapping[int, Any]) -> bool:
    """Whether the shape of a call's results, or what it takes, depends on the elements of its inputs."""
    rule = _rule(call.op)
    if not (rule.operator.dynamic or reads_values(call.op) or rule.name in BOUNDED):
        return False
    args = arguments_of(call, values)
    return not _at_positions(args)


def type_program(program: Program) -> dict[str, TensorType]:
    """The types of a program's outputs, from the forecasts of its calls: nothing is computed, whatever it says, and no
    kernel is given values of the program's own making. Raises as `check` and `forecast` do."""
    check(program)
    program = with_numbers(program, {name: 0.0 for name, _ in program.numbers})
    if any(len(item.type.shape) > MOST_DIMS for item in program.inputs):
        raise ProgramError(f"an input has more than {MOST_DIMS} dimensions")
    values = {item.id: meta(item.type) for item in program.inputs}
    for call in program.calls:
        made = forecast(call, values, 0, _STEPS).made
        if made is None and call.outs:
            raise ProgramError(f"what {call.op} gives is not known before it runs")
        for out, one in zip(call.outs, made or (), strict=False):
            if out != HOLE and one is not None:
                values[out] = meta(one.spec.type)
    missing = [name for name, ref in program.outputs if ref not in values]
    if missing:
        raise ProgramError(f"output '{missing[0]}' is a result that is none")
    types = {name: type_of(values[ref]) for name, ref in program.outputs}
    return {name: msgspec.structs.replace(type_, device="cpu") for name, type_ in types.items()}


class _Rule:
    """What a forecast needs of one operator, looked up once."""

    __slots__ = ("forward", "function", "in_place", "makes", "name", "operator", "positional")

    def __init__(self, name: str) -> None:
        self.operator = operator(name)
        self.name = self.operator.name
        self.function: Any = overload(name)
        self.positional = [param.name for param in self.operator.params if not param.keyword]
        self.in_place = self.operator.in_place
        self.makes = any(param.kind == "Device" for param in self.operator.params)
        self.forward = FORWARDS.get(name.partition(".")[0], ("",))[0]


@functools.cache
def _rule(name: str) -> _Rule:
    return _Rule(name)


def _check(rule: _Rule, call: Call, args: dict[str, Any]) -> None:
    if rule.operator.reshapes:
        raise ProgramError(f"{call.op} changes the shape of a slot under those that share it; call its plain form")
    if not rule.makes and next(_tensors(args), None) is None:
        raise ProgramError(f"{call.op} was given no tensor")
    if any(isinstance(value, torch.device) and value.type == "meta" for value in args.values()):
        raise ProgramError(f"{call.op}: the device 'meta' holds no values")
    results = pieces(call.op, args)
    if results > len(call.outs):
        raise ProgramError(f"{call.op} gives {results:,} results, and {len(call.outs):,} ids to bind them")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _at_positions(args: dict[str, Any]) -> bool:
    """Whether this is indexing without a mask: then types suffice."""
    indices = args.get("indices")
    return isinstance(indices, list) and not any(
        index.dtype in (torch.bool, torch.uint8) for index in _tensors(indices)
    )


def _bounded(rule: _Rule, args: dict[str, Any], through: int, steps: int) -> Forecast:
    nbytes = bound(rule.name, args)
    return Forecast(nbytes, max(nbytes, through if nbytes else 0), steps, lasting=False)


# -- on meta tensors --------------------------------------------------------------------------------------


def _typed(rule: _Rule, args: dict[str, Any], through: int, steps: int) -> Forecast:
    stands = {name: _as_meta(value, rule.operator.writes) for name, value in args.items()}
    if rule.makes:
        stands["device"] = torch.device("meta")
    written = [
        (param.name, tensor)
        for param in rule.operator.params
        if param.writes
        for tensor in _tensors(stands[param.name])
    ]
    before = [type_of(tensor) for _, tensor in written]
    result, tally = _run(rule, stands)
    for (name, tensor), type_ in zip(written, before, strict=True):
        if type_of(tensor) != type_:
            raise ProgramError(
                f"{rule.name} would change '{name}' in place from {type_} to {type_of(tensor)}, and other slots may "
                "share it; give it what it should have first"
            )
    if any(tensor.dim() > MOST_DIMS for tensor in _tensors(result)):
        raise ProgramError(f"{rule.name} gives a tensor of more than {MOST_DIMS} dimensions")
    if any(n < 0 for tensor in _tensors(result) for n in tensor.shape):  # torch's own `expand` gives such
        raise ProgramError(f"{rule.name} gives a tensor with a dimension below 0")
    given = {address_of(tensor) for tensor in _tensors(stands)}
    storages = {address_of(tensor): tensor.untyped_storage().nbytes() for tensor in _tensors(result)}
    fresh = sum(nbytes for address, nbytes in storages.items() if address not in given)
    outcome = expected(rule.operator, result)
    widest = max([spec_of(tensor).volume for tensor in _tensors(result)], default=0)
    reads = fresh or rule.operator.writes or not outcome.results  # else every result is a view
    on_the_way = max(tally.largest, scratch(rule.name, args))
    most = max(fresh, on_the_way, widest if widest >= WRAPS else 0, through if reads else 0)
    made = _made(rule, result, given)
    return Forecast(fresh, most, max(steps, tally.flops), outcome.single, made, lasting=not reads_values(rule.name))


def _made(rule: _Rule, result: Any, given: set[Any]) -> tuple[Made | None, ...] | None:
    """The results that get ids, of those on meta tensors; `given` are the addresses of the arguments' storages."""
    found: list[Made | None] = []
    for item, value in zip(
        rule.operator.returns, result if len(rule.operator.returns) > 1 else (result,), strict=False
    ):
        for one in () if item.same_as else value if item.many else (value,):
            if not isinstance(one, torch.Tensor | None):
                return None
            found.append(None if one is None else _made_one(one, given))
    return tuple(found)


def _made_one(tensor: torch.Tensor, given: set[Any]) -> Made:
    type_ = msgspec.structs.replace(type_of(tensor), device="cpu")
    return Made(spec(type_), tensor.untyped_storage().nbytes(), address_of(tensor) not in given)


def _run(rule: _Rule, stands: dict[str, Any]) -> tuple[Any, _Tally]:
    args = []
    for name in rule.positional:  # as many as stand in a row; the rest have their names
        if name not in stands:
            break
        args.append(stands[name])
    taken = rule.positional[: len(args)]
    kwargs = {name: value for name, value in stands.items() if name not in taken}
    with warnings.catch_warnings(), computing(), _Tally() as tally:
        warnings.simplefilter("ignore")  # the kernel says it again, if it runs
        return rule.function(*args, **kwargs), tally


def _as_meta(value: Any, fresh: bool) -> Any:
    if isinstance(value, torch.Tensor):
        given = spec_of(value)
        return meta(given.type) if fresh else stand_in(given)
    if isinstance(value, list):
        return [_as_meta(item, fresh) for item in value]
    return value


def _made_by(forward: _Rule, args: dict[str, Any]) -> list[torch.Tensor]:
    """What an operator makes of those of `args` that it takes, on meta tensors. What is missing shapes nothing."""
    stands: dict[str, Any] = {}
    for param in forward.operator.params:
        if param.name in args:
            stands[param.name] = _as_meta(args[param.name], False)
        elif param.required:
            stands[param.name] = None if param.optional else 1.0
    return list(_tensors([_run(forward, stands)[0]]))


class _Tally(TorchDispatchMode):
    """Looks into composite operators: the largest thing that one makes on the way, and the operations that it does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not type it
        self.largest = 0
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        given = {address_of(tensor) for tensor in _tensors([args, kwargs])}
        made = [tensor.untyped_storage().nbytes() for tensor in _tensors(result) if address_of(tensor) not in given]
        self.largest = max(self.largest, *made, 0)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += math.ceil(formula(*args, **kwargs, out_val=result))
        return result
