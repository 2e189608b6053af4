"""Whose memory a result is: what the table says of it holds for every call of PyTorch's own operator database.

Labels in a program, and what a plan writes over, rest on what schemas say of views; some say nothing (`program.ops`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from opdb import EXCEPTIONS, OPS, entries, run, samples
from torch.utils._python_dispatch import TorchDispatchMode

from housecall.program.ops import operator, table
from housecall.worker.reuse import _MAKERS

# Two of its results may be one; neither is an argument.
ALIKE = {"where.default"}


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def storages(value: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors(value) if tensor.layout is torch.strided}


class Looking(TorchDispatchMode):
    """Notes operators whose results share memory that their rules do not speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = f"{func.overloadpacket.__name__}.{func._overloadname}"
        if func.namespace == "aten" and name in table():
            self.seen.add(name)
            self._look(name, args, kwargs, result)
        return result

    def _look(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        rules = operator(name)
        given = storages([*args, *kwargs.values()])
        results = result if len(rules.returns) > 1 else (result,)
        silent = [value for item, value in zip(rules.returns, results, strict=False) if not item.view_of + item.same_as]
        if given & storages(silent):
            self.found.add(name)
        own = [storage for value in silent for storage in sorted(storages(value))]
        if len(own) > len(set(own)) and name not in ALIKE:
            self.found.add(f"{name}, two results")


def test_no_call_of_the_database_shares_memory_that_its_rules_do_not_speak_of() -> None:
    looking = Looking()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in ("float32", "complex64", "int64"):
            for name in entries(dtype, "forward"):
                if name in EXCEPTIONS:
                    continue
                for sample in samples(OPS[name], getattr(torch, dtype), False)[:20]:
                    with looking:
                        run(OPS[name], (sample.input, sample.args, sample.kwargs))
    assert looking.found == set()
    assert len(looking.seen) > 450


def test_what_is_taken_to_make_new_memory_does_by_its_schema() -> None:
    assert all(not item.view_of and not item.same_as for name in _MAKERS for item in operator(name).returns)
