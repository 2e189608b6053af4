"""Bring home what a module has learnt from an owner's data, as far as her policy lets updates out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import UsageError
from ..transport.whole import whole
from ..wire.messages import Update, Updated
from .adapted import restore
from .module import check_returns, modules_of, return_home
from .request import ask_gate
from .session import Session
from .slot import Slot
from .tensor import PointerTensor, sessions_of

__all__ = ["UpdateAnswer", "get_update"]


class UpdateAnswer(NamedTuple):
    """`model`: the module, home again; `left`: the epsilon that the budgets of the data have left, the least of them,
    infinite if nothing was paid."""

    model: nn.Module
    left: float


def get_update(module: nn.Module, since: nn.Module | Mapping[str, torch.Tensor]) -> UpdateAnswer:
    """Bring a module home as `since` plus its update: the difference to what it is now, through the stages that the
    policies of the data demand (`clip`, `noise`), of all parameters and buffers together. `since` is the module as it
    was when it was sent, here: a deep copy, or its `state_dict()`. What no noise can be added to (a counter of batches)
    comes home as it was. Gradients stay, and are forgotten; what an optimizer keeps (momentum) stays as well, so go on
    with a new one.

    Raises `UsageError` for what is no update, and `PolicyError` if the owners' rules, or what is left of their budgets,
    say no; then the module is where it was."""
    now = _tensors(module)
    before = _tensors(since) if isinstance(since, nn.Module) else _without_extras(since)
    session = _session(now)
    pairs = _pairs(now, before)
    for pointer, _ in pairs:
        check_returns(pointer)
    learnt = [(pointer, old) for pointer, old in pairs if old.is_floating_point()]
    slots: list[Slot] = [session.put(old.detach(), None) for _, old in learnt]
    message = Update(tuple([pointer._slot.id for pointer, _ in learnt]), tuple([slot.id for slot in slots]))
    found = ask_gate(session, message, "update")
    assert isinstance(found, Updated)
    home = {id(pointer): old.detach().clone() for pointer, old in pairs}
    home.update({id(pointer): array.data for (pointer, _), array in zip(learnt, found.arrays, strict=True)})
    with whole():
        for pointer, _ in pairs:
            value = home[id(pointer)].requires_grad_(pointer.requires_grad)
            pointer.grad = None
            return_home(pointer, value)
    restore(modules_of(module))
    return UpdateAnswer(module, found.left)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those too that a `state_dict()` leaves out: they are at the worker as well."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _without_extras(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A state without what modules add to it beside tensors (`get_extra_state`)."""
    return {name: value for name, value in state.items() if name.rpartition(".")[2] != "_extra_state"}


def _session(now: Mapping[str, Any]) -> Session:
    pointers = [tensor for tensor in now.values() if isinstance(tensor, PointerTensor)]
    sessions = sessions_of(pointers)
    if len(sessions) != 1 or len(pointers) != len(now):
        raise UsageError("this module is not at one worker: .send(worker) it there, train, and then ask for its update")
    return sessions.pop()


def _pairs(now: Mapping[str, Any], before: Mapping[str, torch.Tensor]) -> list[tuple[Any, torch.Tensor]]:
    """Each parameter and buffer, once, and what it was."""
    if now.keys() != before.keys():
        raise UsageError(f"since= is another module: {sorted(now.keys() ^ before.keys())[:5]} are in only one of them")
    found: dict[int, tuple[Any, torch.Tensor]] = {}
    for name, pointer in now.items():
        old = before[name]
        if isinstance(old, PointerTensor) or not isinstance(old, torch.Tensor):
            raise UsageError(
                f"since= has no tensor here as '{name}': keep a deep copy of the module before you send it"
            )
        if old.is_complex():
            raise UsageError(
                f"'{name}' is complex, and an update is of real numbers: torch.view_as_real() makes them so"
            )
        if (old.shape, old.dtype) != (pointer.shape, pointer.dtype):
            raise UsageError(
                f"'{name}' is a {pointer.dtype} of {tuple(pointer.shape)}, and was a {old.dtype} of {tuple(old.shape)}"
            )
        found[id(pointer)] = pointer, old
    return list(found.values())
