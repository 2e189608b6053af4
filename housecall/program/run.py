"""The interpreter: it executes calls on values. It stands on torch, as do `typing`, `outcome` and `forecast`; the rest
of this package does not.

A call names its operator; only a name that the closed table holds is ever looked up in torch. A binding may
hold an exception instead of a tensor (a call that failed): whoever reads it gets the exception.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import ProgramError
from ..types import Ref
from .call import HOLE, Arg, Call, Complex, Items, Program, Symbol, refs, with_numbers
from .check import check, complete_arguments
from .ops import Return, operator
from .typing import symbol

__all__ = [
    "Randomness",
    "arguments_of",
    "computing",
    "execute",
    "last_uses",
    "overload",
    "run",
    "value_of",
]

Values = MutableMapping[int, Any]


def overload(name: str) -> Callable[..., Any]:
    """torch's operator for a name of the table. Raises `UnknownOperator` for any other name."""
    base, _, which = operator(name).name.partition(".")
    return getattr(getattr(torch.ops.aten, base), which)  # type: ignore[no-any-return]  # torch is untyped here


class Randomness:
    """A generator of one session's own: random operators draw from it, never from the process's.

    It starts unseeded, from the system's entropy, and follows `follow(state)`: a caller sends the state of her
    own default generator whenever that has moved, so `torch.manual_seed` reaches her workers, and a worker that
    computes what she would have computed draws what she would have drawn.
    """

    # torch's default generator belongs to the process; borrowing it must not be seen by another thread.
    _borrowed = threading.Lock()

    def __init__(self) -> None:
        generator = torch.Generator()
        generator.seed()
        self._state = generator.get_state()

    def follow(self, state: torch.Tensor) -> None:
        """Continue from `state`, as `torch.Generator.get_state` gave it. Raises `ProgramError` if it is none."""
        try:
            torch.Generator().set_state(state)
        except (RuntimeError, TypeError) as error:
            raise ProgramError(f"not the state of a random generator: {error}") from None
        self._state = state

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within: torch's default generator is this one. Afterwards it is as it was."""
        default = torch.default_generator
        with self._borrowed:
            before = default.get_state()
            default.set_state(self._state)
            try:
                yield
            finally:
                self._state = default.get_state()
                default.set_state(before)


class computing:  # noqa: N801  # used as a function: `with computing():`
    """Within: torch computes values and builds no graph, wherever this is called from.

    NOTE [Where a frame runs]
    A frame may run while its caller stands inside torch (`.item()` in the middle of an operator). There torch has
    switched keys off for this thread, among them the one that makes operators honour the conjugate bit, and a
    complex result would be silently wrong. So the keys are set, not inherited. Gradient mode is on, as it is inside
    a kernel of a local forward: some kernels (oneDNN's LSTM) keep for the backward only then what it needs.
    """

    __slots__ = ("_before", "_guard")

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        self._guard = torch._C._ForceDispatchKeyGuard(*_keys())
        self._guard.__enter__()
        torch._C._set_grad_enabled(True)

    def __exit__(self, *error: object) -> None:
        torch._C._set_grad_enabled(self._before)
        self._guard.__exit__(*error)


@functools.cache
def _keys() -> tuple[Any, Any]:
    """What torch includes and excludes below autograd, as a thread finds it that has done nothing else."""
    found: list[Any] = []

    def look() -> None:
        with torch._C._AutoDispatchBelowAutograd():
            found.extend((torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0], found[1]


_PLAIN = frozenset((int, float, bool, type(None), str))


def execute(call: Call, values: Values, randomness: Randomness | None = None) -> None:
    """Run one call: read its arguments from `values`, bind its results there."""
    runner = _runner(call.op)
    args = []
    for arg in call.args:
        kind = type(arg)
        if kind is Ref:
            value = values[arg.id]  # type: ignore[union-attr]  # `kind` says what mypy cannot see
            if type(value) is not torch.Tensor:
                _check_value(value)
            args.append(value)
        else:
            args.append(arg if kind in _PLAIN else value_of(arg, values))
    kwargs = {key: value_of(arg, values) for key, arg in call.kwargs.items()} if call.kwargs else {}
    if runner.random and randomness is not None:
        with randomness.drawing():
            result = runner.function(*args, **kwargs)
    else:
        result = runner.function(*args, **kwargs)
    if runner.single:
        values[call.outs[0]] = result
    elif call.outs:
        _bind(call.outs, runner.returns, result, values)


class _Runner:
    """What `execute` needs of one operator, looked up once."""

    __slots__ = ("function", "random", "returns", "single")

    def __init__(self, name: str) -> None:
        rules = operator(name)
        self.function = overload(name)._op  # type: ignore[attr-defined]  # what the overload itself calls
        self.random = rules.random
        self.returns = rules.returns
        only = rules.returns[0] if len(rules.returns) == 1 else None
        self.single = only is not None and only.kind == "Tensor" and not only.many and not only.same_as


@functools.cache
def _runner(name: str) -> _Runner:
    return _Runner(name)


def value_of(arg: Arg, values: Mapping[int, Any]) -> Any:
    """What torch is given for an argument. Raises a binding that is an exception."""
    kind = type(arg)
    if kind is Ref:
        value = values[arg.id]  # type: ignore[union-attr]  # `kind` says what mypy cannot see
        _check_value(value)
        return value
    if kind is Items:
        return [value_of(item, values) for item in arg.items]  # type: ignore[union-attr]  # as above
    if kind is Complex:
        return complex(arg.real, arg.imag)  # type: ignore[union-attr]  # as above
    if kind is Symbol:
        return symbol(arg.kind, arg.name)  # type: ignore[union-attr]  # as above
    return arg


def arguments_of(call: Call, values: Mapping[int, Any]) -> dict[str, Any]:
    """A call's arguments by name. Raises `ProgramError` if some are missing, and bindings that are exceptions."""
    return {param.name: value_of(arg, values) for param, arg in complete_arguments(operator(call.op), call)}


def _check_value(value: Any) -> None:
    """A binding may hold the failure of the call that was to bind it."""
    if isinstance(value, Exception):
        raise value


def _bind(outs: tuple[int, ...], returns: tuple[Return, ...], result: Any, values: Values) -> None:
    results = result if len(returns) > 1 else (result,)
    fresh: list[Any] = []
    for item, value in zip(returns, results, strict=True):
        if not item.same_as:
            fresh.extend(value if item.many else (value,))
    longer = returns[-1].many  # of a list whose length the caller did not know, the ids left over stay unbound
    if len(fresh) > len(outs) or (len(fresh) < len(outs) and not longer):
        raise ProgramError(f"{len(outs)} outputs bound, {len(fresh)} came")
    for out, value in zip(outs, fresh, strict=False):
        if out != HOLE and value is not None:
            # A truth or a number that depends on elements (`equal`) is kept as a tensor without dimensions.
            values[out] = value if isinstance(value, torch.Tensor) else torch.tensor(value)


def run(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    randomness: Randomness | None = None,
    numbers: Mapping[str, float] | None = None,
) -> dict[str, torch.Tensor]:
    """Check and run a program on named tensors and numbers; each value is freed after its last use. Inputs that it
    updates are changed in place."""
    check(program)
    numbers = numbers or {}
    missing = [item.name for item in program.inputs if item.name not in inputs]
    missing += [name for name, _ in program.numbers if name not in numbers]
    if missing:
        raise ProgramError(f"no value for the input(s) {', '.join(missing)}")
    program = with_numbers(program, numbers)
    values: Values = {item.id: inputs[item.name] for item in program.inputs}
    last = last_uses(program)
    for number, call in enumerate(program.calls):
        execute(call, values, randomness)
        for dead in last.get(number, ()):
            values.pop(dead, None)
    return {name: values[ref] for name, ref in program.outputs}


def last_uses(program: Program) -> dict[int, list[int]]:
    """Call number -> the ids that nothing reads after it."""
    kept = {ref for _, ref in program.outputs}
    last: dict[int, int] = {}
    for number, call in enumerate(program.calls):
        for arg in (*call.args, *call.kwargs.values()):
            last.update(dict.fromkeys(refs(arg), number))
        last.update({out: number for out in call.outs if out != HOLE})
    dead: dict[int, list[int]] = {}
    for ref, number in last.items():
        if ref not in kept:
            dead.setdefault(number, []).append(ref)
    return dead
