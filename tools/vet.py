"""Look for operators that a stranger could hurt an owner with: calls with wrong arguments, at a worker with limits.

    python tools/vet.py                 every operator of the table, some 100 calls each (about 20 minutes)
    python tools/vet.py NAME ... -n 500 some of them, by base name, more often

Real calls are taken from PyTorch's own operator database, then spoilt: other shapes, types and sizes, wild numbers and
indices, not-a-numbers. Each runs twice in a process of its own, once with memory around it full of one pattern, once of
another. Told are calls
    that end the process or take longer than 20 s,
    whose results or words depend on the pattern: they read memory that nobody gave them,
    that write to memory around them,
    that take far more memory than the worker's limit for one call.
What is found must be met by a rule (`housecall/program/trust.py`), or leave `tools/allowed.txt`. Finding nothing proves
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import housecall as hc
from housecall.program.call import HOLE, Call, Complex, Items, Symbol, refs, replaced
from housecall.program.ops import Param, operator, table
from housecall.types import Ref
from housecall.wire.messages import Array, Frame, Put
from housecall.worker import worker as worker_module
from housecall.worker.limits import Limits
from housecall.worker.worker import Worker

LIMITS = Limits(
    session_bytes=64_000_000, slots=500, call_bytes=16_000_000, call_flops=2_000_000_000, compute_s=1e9,
    reply_bytes=64_000_000,
)  # fmt: skip
EACH = 8  # real calls kept of one operator
M_PERTURB = -6
PATTERNS = 0x3E, 0xC1
WILD = [0, 1, 2, 3, -1, -2, 4, 5, 7, 8, 16, 100, 1000, 10**5, 10**7, 2**31 - 1, 2**31, 2**40, 2**62, -(2**31), -(2**63)]
FLOATS = [0.0, 1.0, 0.5, -1.0, 1e30, 1e-30, 1e9, math.inf, -math.inf, math.nan]
DTYPES = ["float32", "float64", "int64", "int32", "uint8", "bool", "complex64", "bfloat16", "float16", "int8"]

Real = tuple[Call, dict[int, torch.Tensor]]


# -- real calls -------------------------------------------------------------------------------------------


def collected() -> dict[str, list[Real]]:
    """Calls that the operator database makes, with their arguments, by operator."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import opdb
    import test_trust

    hc.TorchHook(torch)
    found: dict[str, list[Real]] = {}
    shapes: dict[str, set[str]] = {}
    run = worker_module.execute

    def noted(call: Call, values: Any, randomness: Any = None) -> None:
        given = {ref: values[ref] for arg in (*call.args, *call.kwargs.values()) for ref in refs(arg)}
        shape = str([(v.dtype, v.dim()) for v in given.values() if isinstance(v, torch.Tensor)])
        known = shapes.setdefault(call.op, set())
        if shape not in known and len(known) < EACH and all(isinstance(v, torch.Tensor) for v in given.values()):
            known.add(shape)
            found.setdefault(call.op, []).append((call, {ref: value.clone() for ref, value in given.items()}))
        run(call, values, randomness)

    for op, (honest, _) in test_trust.CASES.items():
        call, values = test_trust.issued(op, honest)
        found[op] = [(call, values)]
    worker_module.execute = noted
    try:
        for job in (*_database(opdb), *_training()):
            with contextlib.suppress(Exception):  # whatever does not go through is no call
                job(hc.VirtualWorker(id="w"))
    finally:
        worker_module.execute = run
    return found


Job = Callable[[Any], Any]


def _database(opdb: Any) -> Iterator[Job]:
    """PyTorch's own operators on its own samples."""
    for dtype, kind in (
        ("float32", "gradient"),
        ("float32", "forward"),
        ("complex64", "gradient"),
        ("int64", "forward"),
    ):
        for name in opdb.entries(dtype, kind):
            if name not in opdb.EXCEPTIONS:
                for sample in opdb.samples(opdb.OPS[name], getattr(torch, dtype), grad=kind == "gradient")[:6]:
                    yield functools.partial(opdb.ONE[kind], opdb.OPS[name], sample)


def _training() -> Iterator[Job]:
    """Steps of the modules and optimizers that the tests train."""
    import test_modules
    import test_optimizers

    def step(make: Any, inputs: Any, worker: Any) -> None:
        test_modules.step(make().send(worker), inputs().send(worker), torch.randint(0, 5, (8,)).send(worker)).get()

    def optimize(make: Any, worker: Any) -> None:
        test_optimizers.train(test_optimizers.network(), make, [worker, worker, worker])

    for make, inputs in test_modules.MODULES.values():
        yield functools.partial(step, make, inputs)
    for make in test_optimizers.OPTIMIZERS.values():
        yield functools.partial(optimize, make)


def seeds_of(name: str, real: dict[str, list[Real]]) -> list[Real]:
    """Real calls of an operator, or of one that takes as much: its functional form, another overload."""
    if real.get(name):
        return real[name]
    base = name.partition(".")[0].removesuffix("_")
    wanted = len([p for p in operator(name).params if not p.keyword])
    alike = [calls for other, calls in real.items() if other.partition(".")[0].removesuffix("_") == base]
    return [(call, given) for calls in alike for call, given in calls if len(call.args) <= wanted]


# -- spoilt ones ------------------------------------------------------------------------------------------


class Spoiler:
    """Makes calls that are wrong, or nearly right, of real ones."""

    def __init__(self, name: str, seed: str) -> None:
        self.name, self.rules, self.dice = name, operator(name), random.Random(seed)  # noqa: S311  # repeatable

    def call(self, seeds: list[Real]) -> Real:
        """One call: a real one with one to three things changed, or one of random arguments."""
        dice = self.dice
        if not seeds or dice.random() < 0.1:
            call, given = self._invented()
        else:
            seed, values = dice.choice(seeds)
            given = {ref: value.clone() for ref, value in values.items()}
            call = Call(self.name, seed.args, seed.kwargs, self._outs())
            for _ in range(dice.choice((0, 1, 1, 1, 2, 2, 3))):
                call, given = self._changed(call, given)
        return call, given

    def _outs(self) -> tuple[int, ...]:
        fresh = [item for item in self.rules.returns if not item.same_as]
        return tuple(range(1000, 1000 + (12 if any(item.many for item in fresh) else len(fresh))))

    def _changed(self, call: Call, given: dict[int, torch.Tensor]) -> Real:
        dice = self.dice
        places: list[Any] = [*range(len(call.args)), *call.kwargs]
        if not places:
            return call, given
        at = dice.choice(places)
        old = call.args[at] if isinstance(at, int) else call.kwargs[at]
        new = self._spoilt(old, given)
        args = tuple([new if index == at else arg for index, arg in enumerate(call.args)])
        return Call(
            call.op, args, {name: new if name == at else arg for name, arg in call.kwargs.items()}, call.outs
        ), given

    def _spoilt(self, arg: Any, given: dict[int, torch.Tensor]) -> Any:
        dice = self.dice
        if isinstance(arg, Ref):
            if dice.random() < 0.15:
                return Ref(dice.choice(list(given)))
            ref = max(given) + 1
            given[ref] = self._other(given[arg.id])
            return Ref(ref)
        if isinstance(arg, Items):
            items = list(arg.items)
            match dice.randrange(4):
                case 0 if items:
                    del items[dice.randrange(len(items))]
                case 1 if items:
                    items.append(dice.choice(items))
                case _ if items:
                    which = dice.randrange(len(items))
                    items[which] = self._spoilt(items[which], given)
            return Items(tuple(items))
        if isinstance(arg, bool):
            return not arg
        if isinstance(arg, int):
            return dice.choice([*WILD, arg + 1, arg - 1, arg * 2, -arg])
        if isinstance(arg, float):
            return dice.choice(FLOATS)
        if isinstance(arg, Symbol) and arg.kind == "dtype":
            return Symbol("dtype", dice.choice(DTYPES))
        if arg is None:
            return dice.choice([None, 1, 0.5, *map(Ref, given)])
        return arg

    def _other(self, value: torch.Tensor) -> torch.Tensor:
        """Another tensor in the place of one."""
        dice = self.dice
        shape = list(value.shape)
        match dice.randrange(12):
            case 0 | 1 if shape:  # fewer
                dim = dice.randrange(len(shape))
                shape[dim] = dice.choice((1, max(shape[dim] // 2, 1), max(shape[dim] - 1, 0)))
            case 2 if shape:
                shape[dice.randrange(len(shape))] = 0
            case 3 if shape:  # more
                dim = dice.randrange(len(shape))
                shape[dim] = min(shape[dim] * dice.choice((2, 3, 7)) + 1, 300)
            case 4 if shape:
                del shape[dice.randrange(len(shape))]
            case 5:
                shape.insert(dice.randrange(len(shape) + 1), dice.choice((1, 2, 3)))
            case 6 if shape:
                return value[(0,) * len(shape)].reshape(()).expand(shape) if value.numel() else value
            case 7 if len(shape) > 1:
                return value.transpose(0, -1)
            case 8:
                return value.to(getattr(torch, dice.choice(DTYPES)))
            case 9:
                return self._filled(value)
            case 10:
                return self._filled(value).reshape(-1)[:1].reshape(()) if value.numel() else value
            case _:
                shape = [dice.choice((1, 2, 3, 5, 16)) for _ in range(dice.randrange(5))]
        if math.prod(shape) > 1 << 20:
            return value
        flat = value.reshape(-1)
        source = flat if flat.numel() else torch.ones(1, dtype=value.dtype)
        return source[torch.arange(math.prod(shape)) % source.numel()].reshape(shape)

    def _filled(self, value: torch.Tensor) -> torch.Tensor:
        """The same shape with wild elements."""
        wild = self.dice.choice((math.nan, math.inf, 0.0, -1e30, 1e9, -1.0, 2.0**31, 2.0**40))
        if not (value.is_floating_point() or value.is_complex()):
            wild = self.dice.choice((0, -1, 7, 10**6, 2**31 - 1, -(2**31)))
            if value.dtype in (torch.uint8, torch.int8, torch.int16, torch.bool):
                wild = abs(wild) % 100
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            filled = torch.full(value.shape, wild, dtype=torch.float64 if value.is_floating_point() else value.dtype)
            filled = filled.to(value.dtype)
        if filled.numel() and self.dice.random() < 0.5:
            filled.view(-1)[0] = 0
        return filled

    def _invented(self) -> Real:
        dice, given = self.dice, {}

        def one(param: Param) -> Any:
            match param.kind:
                case "Tensor":
                    ref = len(given) + 1
                    shape = [dice.choice((0, 1, 2, 3, 4, 8)) for _ in range(dice.randrange(5))]
                    given[ref] = self._other(torch.randn(shape))
                    return Ref(ref)
                case "int":
                    return dice.choice(WILD)
                case "float":
                    return dice.choice(FLOATS)
                case "Scalar":
                    return dice.choice([*FLOATS, 0, 1, -1, 2**40, True])
                case "bool":
                    return dice.random() < 0.5
                case "complex":
                    return Complex(1.0, 2.0)
                case "str":
                    return dice.choice(
                        ("mean", "sum", "none", "reflect", "linear", "floor", "trunc", "fro", "gelsd", "")
                    )
                case "ScalarType":
                    return Symbol("dtype", dice.choice(DTYPES))
                case "Device":
                    return Symbol("device", "cpu")
                case "Layout":
                    return Symbol("layout", "strided")
                case "MemoryFormat":
                    return Symbol("memory_format", dice.choice(("contiguous_format", "channels_last")))
            return None

        def whole(param: Param) -> Any:
            if param.optional and dice.random() < 0.4:
                return None
            return Items(tuple(one(param) for _ in range(dice.choice((0, 1, 2, 3, 4))))) if param.many else one(param)

        args = tuple(whole(param) for param in self.rules.params if not param.keyword)
        kwargs = {param.name: whole(param) for param in self.rules.params if param.keyword and param.required}
        return Call(self.name, args, kwargs, self._outs()), given


# -- trying them ------------------------------------------------------------------------------------------


class World:
    """A worker with limits, in a process whose memory is full of one pattern while it works."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._seed = torch.Generator().manual_seed(1).get_state()

    def tried(self, call: Call, given: dict[int, torch.Tensor], pattern: int) -> tuple[str, list[bytes | None], bool]:
        """What a call says and gives in such memory, and whether what lay around was left alone."""
        door = Worker("w", LIMITS).open("mallory")
        door.randomness._state = self._seed
        self._libc.mallopt(M_PERTURB, pattern)
        around: list[torch.Tensor] = []
        puts = []
        for ref, value in given.items():
            if value.numel() > 1 << 26:
                continue
            around.append(torch.full((max(value.nbytes, 64),), pattern, dtype=torch.uint8))
            repeated = value.dim() and not any(value.stride())
            own = value.reshape(-1)[:1].clone().reshape(()).expand(value.shape) if repeated else value.clone()
            puts.append(Put(ref, Array(None, own)))
            around.append(torch.full((max(value.nbytes, 64),), pattern, dtype=torch.uint8))
        reply = door.handle(Frame(1, (*puts, call)))
        outs = [door.store.get(out) for out in (*call.outs, *(given if operator(call.op).writes else ()))]
        bits = [_bits(value) if isinstance(value, torch.Tensor) and not reply.failures else None for value in outs]
        alone = all(bool((tensor == pattern).all()) for tensor in around)
        self._libc.mallopt(M_PERTURB, 0)
        return "; ".join(failure.reason for failure in reply.failures), bits, alone


def _bits(value: torch.Tensor) -> bytes:
    if value.numel() > 1 << 20:
        return b""
    plain = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    if plain.is_floating_point():
        plain = plain.nan_to_num(nan=7.0)  # the sign of a not-a-number is nobody's secret
    flat = plain.resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def child(names: list[str], count: int, seed: int, real_path: str, mark_path: str) -> None:
    """Try these operators; what is found is a line of JSON each on standard output."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    real: dict[str, list[Real]] = pickle.loads(Path(real_path).read_bytes())  # noqa: S301  # our own, of this run
    world = World()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Path(mark_path).open("w") as mark:
        for name in names:
            seeds, worked, told = seeds_of(name, real), 0, set()
            for at in range(count):
                call, given = Spoiler(name, f"{seed} {name} {at}").call(seeds)
                shown = _shown(call, given)
                mark.seek(0)
                mark.write(json.dumps([name, shown]))
                mark.truncate()
                mark.flush()
                signal.setitimer(signal.ITIMER_REAL, 20)
                one, other = (world.tried(call, given, pattern) for pattern in PATTERNS)
                signal.setitimer(signal.ITIMER_REAL, 0)
                worked += not one[0]
                now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                kinds = []
                if one[:2] != other[:2] and not operator(name).random:
                    kinds.append("reads memory around it")
                if not (one[2] and other[2]):
                    kinds.append("writes to memory around it")
                if now - peak > 100_000:
                    kinds.append(f"took {(now - peak) // 1000} MB")
                peak = max(peak, now)
                for kind in kinds:
                    if kind[:5] not in told:
                        told.add(kind[:5])
                        print(json.dumps(["found", name, kind, shown, one[0], other[0]]), flush=True)
            print(json.dumps(["done", name, worked, count]), flush=True)


def _shown(call: Call, given: dict[int, torch.Tensor]) -> str:
    """A call with the types of its arguments in their places."""
    types = {ref: f"{str(v.dtype)[6:]}{list(v.shape)}" for ref, v in given.items()}
    return str(replaced(call, lambda ref: types.get(ref.id, str(ref)), (HOLE,)))[:700]  # type: ignore[arg-type, return-value]  # to be read


def main() -> None:
    """Collect, then try in child processes; begin again behind what ended one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="base names, as in tools/allowed.txt; all if none")
    parser.add_argument("-n", type=int, default=100, help="calls of each operator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=Path, help="keep the real calls here, or take them from here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(json.loads(sys.stdin.read()), given.n, given.seed, *given.child)
        return
    names = [
        name for name in sorted(table()) if not given.names or name.partition(".")[0].removesuffix("_") in given.names
    ]
    with tempfile.TemporaryDirectory() as folder:
        real_path = given.real or Path(folder) / "real"
        if not real_path.exists():
            print("collecting real calls ...", flush=True)
            real_path.write_bytes(pickle.dumps(collected()))
        mark_path = Path(folder) / "mark"
        found = never = 0
        while names:
            options = ["-n", str(given.n), "--seed", str(given.seed), "--child", str(real_path), str(mark_path)]
            run = subprocess.run(  # noqa: S603  # this file
                [sys.executable, __file__, *options],
                input=json.dumps(names),
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=False,
            )
            done = set()
            for line in run.stdout.splitlines():
                if not line.startswith("["):  # a library's own words
                    continue
                kind, name, *rest = json.loads(line)
                if kind == "done":
                    done.add(name)
                    if not rest[0]:
                        never += 1
                        print(f"{name}: no call of {rest[1]} worked", flush=True)
                else:
                    found += 1
                    print(f"{name}: {rest[0]}\n    {rest[1]}\n    {rest[2:] if any(rest[2:]) else ''}", flush=True)
            names = [name for name in names if name not in done]
            if run.returncode and names:
                name, shown = json.loads(mark_path.read_text())
                found += 1
                how = (
                    "took longer than 20 s"
                    if run.returncode == -signal.SIGALRM
                    else f"ended the process ({run.returncode})"
                )
                print(f"{name}: {how}\n    {shown}\n    {run.stderr[-200:]}", flush=True)
                names.remove(name)
        print(f"{found} findings; {never} operators of which no call worked")


if __name__ == "__main__":
    main()
