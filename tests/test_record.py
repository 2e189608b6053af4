"""Recorded programs: the same in every bit as the calls that they were recorded from; and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import housecall as hc
from housecall.owner.policy import Policy, Use
from housecall.pointers.adapted import _plain_kernels
from housecall.program.call import Call, Input, Program
from housecall.program.check import check
from housecall.program.files import save_program
from housecall.program.flow import flow
from housecall.types import Label, Ref, TensorType

Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[..., Any]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3), nn.LogSoftmax(1))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.25), nn.Flatten(), nn.Linear(36, 16),
        nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3), nn.LogSoftmax(1),
    )  # fmt: skip


class Reader(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found, _ = self.lstm(x.squeeze(1))
        return F.log_softmax(self.out(found[:, -1]), dim=1)


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn, "lstm": Reader}
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.05),
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD, fused": lambda p: optim.SGD(p, lr=0.05, fused=True),
    "SGD, momentum, fused": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "Adam, amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam, amsgrad, foreach": lambda p: optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "Adam, fused": lambda p: optim.Adam(p, lr=0.01, fused=True),
    "Adamax": lambda p: optim.Adamax(p),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "Adagrad": lambda p: optim.Adagrad(p, lr_decay=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.5, centered=True),
    "NAdam": lambda p: optim.NAdam(p),
    "ASGD": lambda p: optim.ASGD(p),
    "Adadelta": lambda p: optim.Adadelta(p),
    "Rprop": lambda p: optim.Rprop(p),
}


def batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes
    ]


def training(optimizer: optim.Optimizer) -> Step:
    def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.nll_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return train


def trained(
    make: Callable[[], nn.Module],
    optimizer_of: Callable[[Any], optim.Optimizer],
    data: list[Batch],
    workers: tuple[Any, ...],
    wrap: Callable[[Step, nn.Module], Step] = lambda step, model: step,
) -> tuple[list[torch.Tensor], optim.Optimizer]:
    """Losses, parameters, buffers, gradients and optimizer state after one pass; two batches at each worker in turn,
    at home if there is none."""
    torch.manual_seed(0)
    model: Any = make()
    optimizer = optimizer_of(model.parameters())
    step = wrap(training(optimizer), model)
    found = []
    for at, (x, y) in enumerate(data):
        if not workers:
            found.append(step(model, x, y).detach())
            continue
        worker = workers[at // 2 % len(workers)]
        if hc.location_of(model) is not worker:
            if hc.location_of(model) is not None:
                model.get()
            model.send(worker)
        found.append(step(model, x.send(worker), y.send(worker)).detach().get())
    if workers:
        model.get()
    found += [value.detach() for value in model.state_dict().values()]
    found += [p.grad for p in model.parameters() if p.grad is not None]
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    return found + [value.get() if hasattr(value, "_slot") else value for value in state], optimizer


def recording(data: list[Batch]) -> Callable[[Step, nn.Module], Step]:
    return lambda step, model: hc.record(step, model, *data[0])


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 5 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def plain(forward: Callable[..., Any]) -> Callable[..., Any]:
    def plainly(*args: Any) -> Any:
        with _plain_kernels():
            return forward(*args)

    return plainly


# -- the same in every bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [False, True])
@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        *(("mlp", optimizer) for optimizer in OPTIMIZERS),
        *((model, optimizer) for model in ("cnn", "lstm") for optimizer in ("SGD, momentum", "Adam")),
    ],
)
def test_a_recorded_step_is_the_step(model: str, optimizer: str, codec: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make, optimizer_of = MODELS[model], OPTIMIZERS[optimizer]
    if model == "lstm":  # a program takes plain kernels, since it may go anywhere; they round otherwise than oneDNN's
        monkeypatch.setattr(nn.LSTM, "forward", plain(nn.LSTM.forward))
    data = batches(5, 5, 5, 3, 5, 5, 3, 5)  # the last of an epoch is smaller
    workers = hc.VirtualWorker(id="a", codec=codec), hc.VirtualWorker(id="b", codec=codec)
    issued, _ = trained(make, optimizer_of, data, workers)
    wrapped: list[hc.Recorded] = []

    def wrap(step: Step, model: nn.Module) -> Step:
        wrapped.append(hc.record(step, model, *data[0]))
        return wrapped[0]

    recorded, kept = trained(make, optimizer_of, data, workers, wrap)
    assert same(recorded, issued)
    if model != "cnn":  # at a second worker dropout draws from a stream of its own
        local, _ = trained(make, optimizer_of, data, ())
        assert same(recorded, local)
    if optimizer in ("SGD", "SGD, momentum", "Adam"):  # one for each batch size and the first step, not one a step
        assert len(wrapped[0].programs) <= 4
    del wrapped[:]
    kept.state.clear()
    assert [len(worker._objects) for worker in workers] == [0, 0]


def test_dropout_draws_as_it_does_at_home() -> None:
    data = batches(6, 6, 6, 6)
    worker = hc.VirtualWorker(id="a")
    local, _ = trained(cnn, OPTIMIZERS["SGD"], data, ())
    recorded, _ = trained(cnn, OPTIMIZERS["SGD"], data, (worker,), recording(data))
    assert same(recorded, local)


def test_recording_changes_nothing() -> None:
    torch.manual_seed(0)
    model = cnn()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step, (x, y) = training(optimizer), batches(5)[0]
    step(model, x, y)
    objects = [*model.parameters(), *model.buffers()]
    before = [tensor.clone() for tensor in objects]
    grads = [p.grad for p in model.parameters()]
    state = [entry["momentum_buffer"] for entry in optimizer.state.values()]
    kept = [value.clone() for value in state]
    random = torch.get_rng_state()
    hc.record(step, model, x, y)
    assert [*model.parameters(), *model.buffers()] == objects or all(
        one is other for one, other in zip([*model.parameters(), *model.buffers()], objects, strict=True)
    )
    assert all(torch.equal(one, other) for one, other in zip(objects, before, strict=True))
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    now = [entry["momentum_buffer"] for entry in optimizer.state.values()]
    assert all(one is other for one, other in zip(now, state, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(now, kept, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert type(x) is torch.Tensor


def test_a_function_that_fails_leaves_everything_as_it_was() -> None:
    model = mlp()
    x = torch.randn(4, 1, 8, 8)
    before = [p.clone() for p in model.parameters()]

    def fails(model: nn.Module, x: torch.Tensor) -> None:
        model(x).sum().backward()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        hc.record(fails, model, x)
    assert all(type(p) is nn.Parameter and p.grad is None for p in model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_types_alone_suffice(clinic: hc.VirtualWorker) -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        return x @ y, {"sum": x.sum(), "what": "plain", "twice": y * 2.5}

    typed = hc.record(f, TensorType("float32", (2, 3), (3, 1)), torch.empty(3, 4, device="meta"))
    x, y = torch.randn(2, 3), torch.randn(3, 4)
    product, rest = typed(x.send(clinic), y.send(clinic))
    assert torch.equal(product.get(), x @ y)
    assert torch.equal(rest["sum"].get(), x.sum())
    assert torch.equal(rest["twice"].get(), y * 2.5)
    assert rest["what"] == "plain"
    assert len(typed.programs) == 1
    assert [item.name for item in typed.program.inputs] == ["x", "y"]
    assert [name for name, _ in typed.program.outputs] == ["result[0]", "result[1]", "result[3]"]  # [2] is plain


def test_a_module_alone_and_a_module_that_the_function_names(clinic: hc.VirtualWorker) -> None:
    model: Any = mlp()
    x = torch.randn(4, 1, 8, 8)
    expected = model(x)
    forward = hc.record(model, x)
    named = hc.record(lambda x: model(x).exp(), x)
    model.send(clinic)
    assert torch.equal(forward(x.send(clinic)).get(), expected)
    assert torch.equal(named(x.send(clinic)).get(), expected.exp())
    assert "model.1.weight" in str(named)


def test_gradients_accumulate_where_the_function_lets_them(clinic: hc.VirtualWorker) -> None:
    def backward(model: nn.Module, x: torch.Tensor) -> None:
        model(x).sum().backward()

    torch.manual_seed(0)
    model: Any = mlp()
    x = torch.randn(4, 1, 8, 8)
    recorded = hc.record(backward, model, x)
    model.send(clinic)
    for _ in range(3):
        recorded(model, x.send(clinic))
    model.get()
    torch.manual_seed(0)
    local = mlp()
    for _ in range(3):
        backward(local, x)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), local.parameters(), strict=True))  # type: ignore[arg-type]


def test_a_gradient_that_somebody_holds_stays_what_it_was(clinic: hc.VirtualWorker) -> None:
    def backward(model: nn.Module, x: torch.Tensor) -> None:
        model.zero_grad()
        model(x).sum().backward()

    model: Any = nn.Linear(2, 1)
    recorded = hc.record(backward, model, torch.ones(1, 2))
    model.send(clinic)
    recorded(model, torch.ones(1, 2).send(clinic))
    held = model.weight.grad
    for scale in (2.0, 3.0):
        recorded(model, torch.full((1, 2), scale).send(clinic))
    assert held.copy().get().tolist() == [[1.0, 1.0]]
    assert model.weight.grad.copy().get().tolist() == [[3.0, 3.0]]


def test_train_and_eval_are_two_programs(clinic: hc.VirtualWorker) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.randn(3, 4)
    recorded = hc.record(lambda model, x: model(x), model, x)
    model.eval()
    expected = model(x)
    model.send(clinic)
    assert torch.equal(recorded(model, x.send(clinic)).get(), expected)
    assert len(recorded.programs) == 2


def test_results_that_are_inputs_and_views(clinic: hc.VirtualWorker) -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x.add_(1)
        return x, x.detach(), x[0], x

    recorded = hc.record(f, torch.zeros(2, 3))
    x = torch.zeros(2, 3).send(clinic)
    first, alias, row, again = recorded(x)
    assert first is x
    assert again is x
    assert torch.equal(alias.copy().get(), torch.ones(2, 3))
    assert torch.equal(row.copy().get(), torch.ones(3))
    x.mul_(5)
    assert torch.equal(row.get(), torch.full((3,), 5.0))
    assert recorded.program.inputs[0].updates
    assert "x: float32[2, 3] updated" in str(recorded)


def test_local_numbers_become_constants(clinic: hc.VirtualWorker) -> None:
    scale, flag, count = torch.tensor(0.1, dtype=torch.float64), torch.tensor(True), torch.tensor(2**60 + 1)

    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * scale, x.bool() & flag, x.long() + count, x * 1j

    x = torch.randn(4)
    recorded = hc.record(f, x)
    for found, expected in zip(recorded(x.send(clinic)), f(x), strict=True):
        assert torch.equal(found.get(), expected)


# -- numbers ------------------------------------------------------------------------------------------------


def test_adams_corrections_are_numbers_and_one_program_serves_every_step() -> None:
    worker = hc.VirtualWorker(id="a")
    data = batches(*[4] * 6)
    torch.manual_seed(0)
    model: Any = mlp()
    optimizer = optim.Adam(model.parameters())
    step = hc.record(training(optimizer), model, *data[0])
    model.send(worker)
    digests = []
    for x, y in data:
        step(model, x.send(worker), y.send(worker))
        digests.append(step.digest)
    assert len(set(digests[1:])) == 1
    assert len(step.program.numbers) == 2  # both corrections, the same for every parameter
    assert re.search(r"other1: number, value2: number\)", str(step))
    assert all(entry["step"].item() == 6 for entry in optimizer.state.values())


def test_a_scheduler_outside_becomes_a_number() -> None:
    def run(recorded: bool) -> tuple[list[torch.Tensor], int]:
        worker = hc.VirtualWorker(id="a")
        data = batches(*[4] * 5)
        torch.manual_seed(0)
        model: Any = mlp()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        step: Any = training(optimizer)
        if recorded:
            step = hc.record(step, model, *data[0])
        model.send(worker)
        for x, y in data:
            step(model, x.send(worker), y.send(worker))
            scheduler.step()
        model.get()
        return [p.detach() for p in model.parameters()], len(step.programs) if recorded else 0

    one, programs = run(True)
    other, _ = run(False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert programs <= 2


def test_a_scheduler_inside_is_refused() -> None:
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.7)

    def train(model: nn.Module, x: torch.Tensor) -> None:
        model(x).sum().backward()
        optimizer.step()
        scheduler.step()

    with pytest.raises(hc.UsageError, match="changes an optimizer's settings"):
        hc.record(train, model, torch.randn(2, 1, 8, 8))


# -- what cannot be recorded --------------------------------------------------------------------------------


def by_item(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def by_truth(x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        return x
    return -x


def by_nonzero(x: torch.Tensor) -> torch.Tensor:
    return x.nonzero()


def by_mask(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


def by_get(x: Any) -> Any:
    return x.get()


def by_text(x: torch.Tensor) -> str:
    return f"{x.sum():.3f}"


def by_list(x: torch.Tensor) -> Any:
    return x.tolist()


def by_index(x: torch.Tensor) -> torch.Tensor:
    return x[x[0].long()]


@pytest.mark.parametrize("fn", [by_item, by_truth, by_nonzero, by_mask, by_get, by_text, by_list])
def test_what_needs_a_value_is_refused_at_its_line(fn: Callable[..., Any]) -> None:
    with pytest.raises(hc.UsageError) as caught:
        hc.record(fn, torch.randn(4))
    code = fn.__code__
    line = re.search(rf"{re.escape(code.co_filename)}:(\d+) in {fn.__name__}: (.*)\. Say it with", str(caught.value))
    assert line is not None, str(caught.value)
    assert int(line[1]) == code.co_firstlineno + 1
    assert "x" in line[2]


STEPS: dict[str, tuple[Callable[[Any], optim.Optimizer], str]] = {
    "Adagrad, fused": (
        lambda p: optim.Adagrad(p, fused=True),
        "Make the optimizer with fused=False, which does the same",
    ),
    "Adafactor": (optim.Adafactor, "it needs a value .*Call its step\\(\\) outside of the function"),
    "LBFGS": (optim.LBFGS, "it needs a value .*Call its step\\(\\) outside of the function"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_cannot_be_recorded_names_its_optimizer(name: str) -> None:
    make, text = STEPS[name]
    model = mlp()
    optimizer = make(model.parameters())

    def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            found = F.nll_loss(model(x), y)
            found.backward()
            return found

        optimizer.step(loss)  # type: ignore[arg-type]  # torch expects a float

    before = [p.clone() for p in model.parameters()]
    state = {p: dict(kept) for p, kept in optimizer.state.items()}  # Adagrad's begins with it
    kind = "Adagrad with fused=True" if name == "Adagrad, fused" else name
    with pytest.raises(hc.UsageError, match=f"the step of {kind} cannot be recorded, at .*test_record.py:.*{text}"):
        hc.record(train, model, *batches(5)[0])
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert {p: dict(kept) for p, kept in optimizer.state.items()} == state  # the same objects


def test_a_value_that_a_closure_needs_is_the_callers_own() -> None:
    model = mlp()
    optimizer = optim.SGD(model.parameters())

    def train(model: nn.Module, x: torch.Tensor) -> None:
        optimizer.step(lambda: model(x).sum().item())

    with pytest.raises(hc.UsageError, match=r"a value .* cannot be had while a program is recorded"):
        hc.record(train, model, batches(5)[0][0])


def test_a_local_tensor_is_refused_by_name() -> None:
    weights = torch.randn(4)
    with pytest.raises(hc.UsageError, match=r"'weights' is no argument of the recorded function.*test_record.py:\d+"):
        hc.record(lambda x: x * weights, torch.randn(4))


def test_a_pointer_from_elsewhere_is_refused_by_name(clinic: hc.VirtualWorker) -> None:
    theirs = torch.randn(4).send(clinic)
    with pytest.raises(hc.UsageError, match="'theirs' is no argument of the recorded function"):
        hc.record(lambda x: x * theirs, torch.randn(4))
    with pytest.raises(hc.UsageError, match="returns a pointer that it was not given"):
        hc.record(lambda x: theirs, torch.randn(4))


def test_positions_written_in_the_function_are_refused() -> None:
    with pytest.raises(hc.UsageError, match=r"a local tensor of shape \(2,\) cannot be recorded, at .*test_record.py"):
        hc.record(lambda x: x[[0, 2]], torch.randn(4))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: (lambda x: x.t_(), torch.randn(2, 3)), "puts another shape or kind of tensor in the place of 'x'"),
        (lambda: (lambda x: x * 2, torch.randn(3, requires_grad=True) * 2), "'x' was computed"),
        (lambda: (lambda x: x, {1, 2}), "argument 'x' is a set"),
    ],
)
def test_other_refusals(make: Callable[[], tuple[Any, Any]], text: str) -> None:
    fn, example = make()
    with pytest.raises(hc.UsageError, match=re.escape(text)):
        hc.record(fn, example)


def test_a_parameter_with_hooks_is_refused() -> None:
    model = mlp()
    next(model.parameters()).register_hook(lambda grad: grad)
    with pytest.raises(hc.UsageError, match=re.escape("'model.1.weight' has hooks")):
        hc.record(lambda model, x: model(x), model, torch.randn(2, 1, 8, 8))


# -- running ------------------------------------------------------------------------------------------------


def test_one_message_a_run() -> None:
    worker = hc.VirtualWorker(id="a")
    recorded = hc.record(lambda x, y: (x + y).relu().sum(), torch.zeros(3), torch.zeros(3))
    x, y = torch.ones(3).send(worker), torch.ones(3).send(worker)
    recorded(x, y)
    before = len(worker.session.outbox)
    recorded(x, y)
    kinds = [type(message).__name__ for message, _ in tuple(worker.session.outbox)[before:]]
    assert [kind for kind in kinds if kind != "Drop"] == ["Run"]


def test_tensors_at_two_places_are_refused(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    recorded = hc.record(lambda x, y: x + y, torch.zeros(3), torch.zeros(3))
    x = torch.ones(3).send(schools[0])
    with pytest.raises(hc.PlaceError, match="'y' is at 'grapevine', and others are at 'westside'"):
        recorded(x, torch.ones(3).send(schools[1]))
    with pytest.raises(hc.PlaceError, match="'y' is here, and others are at 'westside'"):
        recorded(x, torch.ones(3))
    with pytest.raises(hc.UsageError, match="none of the tensors is at a worker"):
        recorded(torch.ones(3), torch.ones(3))


def test_other_types_are_another_program(clinic: hc.VirtualWorker) -> None:
    recorded = hc.record(lambda x: x.reshape(-1).cumsum(0), torch.zeros(2, 3))
    for shape in ((2, 3), (4,), (2, 3)):
        x = torch.randn(shape)
        assert torch.equal(recorded(x.send(clinic)).get(), x.reshape(-1).cumsum(0))
    turned = torch.randn(3, 2).send(clinic).t()
    assert torch.equal(recorded(turned).get(), turned.get().reshape(-1).cumsum(0))
    assert len(recorded.programs) == 3


def test_the_same_tensor_twice(clinic: hc.VirtualWorker) -> None:
    recorded = hc.record(lambda x, y: x.add_(1) * y, torch.zeros(2), torch.zeros(2))
    x = torch.ones(2).send(clinic)
    assert recorded(x, x).get().tolist() == [4.0, 4.0]
    assert len(recorded.programs) == 2
    three = hc.record(lambda x, y, z: x + 10 * y + 100 * z, *[torch.zeros(2)] * 3)
    y = torch.ones(2).send(clinic)
    assert three(x, y, x).get().tolist() == [212.0, 212.0]
    assert three(x, y, y).get().tolist() == [112.0, 112.0]


def test_a_failure_names_the_call_and_what_depends_on_nothing_of_it_is_done(clinic: hc.VirtualWorker) -> None:
    def f(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, at)

    def g(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return x.add_(1).index_select(0, at)

    x, at = torch.zeros(3).send(clinic), torch.tensor([7]).send(clinic)
    found = hc.record(f, torch.zeros(3), torch.tensor([1]))(x, at)
    with pytest.raises(hc.OperatorError) as caught:
        found.get()
    assert caught.value.operator == "index_select.default"
    assert caught.value.reason == (
        "call 0, `%2 = index_select.default(x, 0, at)`; what does not depend on it was done: IndexError: index out of "
        "range in self"
    )
    assert "test_record.py" in caught.value.site
    assert x.copy().get().tolist() == [0.0, 0.0, 0.0]
    hc.record(g, torch.zeros(3), torch.tensor([1]))(x, at)
    assert x.copy().get().tolist() == [1.0, 1.0, 1.0]


def test_a_synchronous_worker_raises_at_the_line() -> None:
    worker = hc.VirtualWorker(id="a", synchronous=True)
    recorded = hc.record(lambda x, at: x.index_select(0, at), torch.zeros(3), torch.tensor([1]))
    with pytest.raises(hc.OperatorError, match="call 0"):
        recorded(torch.zeros(3).send(worker), torch.tensor([7]).send(worker))


def test_owned_data_labels_what_comes_of_it() -> None:
    worker = hc.VirtualWorker(id="a")
    x, y = torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))
    worker.add("scans", x=x, y=y, policy=Policy(use=Use(interactive=("*",))))
    torch.manual_seed(0)
    model: Any = mlp()
    optimizer = optim.Adam(model.parameters())
    step = hc.record(training(optimizer), model, x[:6], y)
    model.send(worker)
    scans = worker.dataset("scans")
    for _ in range(3):
        loss = step(model, scans.column("x"), scans.column("y"))
    worker.session.wait()
    store = worker._door.store
    assert store.label(loss._slot.id) == Label(("scans",))
    assert all(store.label(p._slot.id) == Label(("scans",)) for p in model.parameters())
    assert all(ref < 1 << 64 for ref in store)
    found = flow(step.program, {"x": Label(("scans",))})
    assert set(found.values()) == {Label(("scans",))}
    with pytest.raises(hc.PolicyError):
        loss.get()


def test_what_is_lent_cannot_be_updated() -> None:
    worker = hc.VirtualWorker(id="a")
    values = torch.zeros(4, 2)
    worker.add("scans", x=values, policy=Policy(use=Use(interactive=("*",))))
    recorded = hc.record(lambda x: x.add_(1), torch.zeros(4, 2))
    assert recorded.program.inputs[0].updates
    recorded(worker.dataset("scans").column("x"))
    with pytest.raises(hc.OperatorError, match="'self' is the owner's data, which is there to be read"):
        worker.session.wait()
    assert values.tolist() == torch.zeros(4, 2).tolist()


def test_over_the_wire() -> None:
    data = batches(4, 4, 4, 4)
    with hc.LocalCluster(2) as workers:
        remote, kept = trained(mlp, OPTIMIZERS["Adam"], data, tuple(workers), recording(data))
        local, _ = trained(mlp, OPTIMIZERS["Adam"], data, ())
        kept.state.clear()
    assert same(remote, local)


# -- programs on disk ---------------------------------------------------------------------------------------


def test_save_load_and_run_elsewhere(tmp_path: Path, clinic: hc.VirtualWorker) -> None:
    torch.manual_seed(0)
    model: Any = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    x, y = batches(5)[0]
    step = hc.record(training(optimizer), model, x, y)
    step.save(tmp_path / "step.program")
    program = hc.load_program(tmp_path / "step.program")
    assert program == step.program
    assert program.digest == step.digest
    inputs = {f"model.{name}": value.detach().clone().send(clinic) for name, value in model.named_parameters()}
    found = hc.run_program(program, {**inputs, "x": x.send(clinic), "y": y.send(clinic)})
    expected = training(optimizer)(model, x, y)
    assert torch.equal(found["result"].get(), expected.detach())
    assert torch.equal(found["model.1.weight.grad"].get(), model[1].weight.grad)
    for name, value in model.named_parameters():
        assert torch.equal(inputs[f"model.{name}"].get(), value.detach())


def test_run_program_refuses_what_does_not_fit(clinic: hc.VirtualWorker, schools: Any) -> None:
    program = hc.record(lambda x, y: x + y, torch.zeros(3), torch.zeros(3)).program
    x = torch.ones(3).send(clinic)
    with pytest.raises(hc.UsageError, match=r"missing \['y'\]"):
        hc.run_program(program, {"x": x})
    with pytest.raises(hc.UsageError, match=r"not known \['z'\]"):
        hc.run_program(program, {"x": x, "y": x, "z": x})
    with pytest.raises(hc.UsageError, match=r"input 'y' is float32\[3\], and was given float32\[4\]"):
        hc.run_program(program, {"x": x, "y": torch.ones(4).send(clinic)})
    with pytest.raises(hc.UsageError, match="input 'y' is here"):
        hc.run_program(program, {"x": x, "y": torch.ones(3)})  # type: ignore[dict-item]
    with pytest.raises(hc.PlaceError, match="'y' is at 'westside'"):
        hc.run_program(program, {"x": x, "y": torch.ones(3).send(schools[0])})


@pytest.mark.parametrize("damage", ["head", "tail", "bytes", "operator", "kind"])
def test_a_file_that_was_tampered_with_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "step.program"
    hc.record(lambda x: x.neg().exp(), torch.zeros(3)).save(path)
    data = path.read_bytes()
    match damage:
        case "head":
            data = b"x" + data
        case "tail":
            data = data[:-1]
        case "bytes":
            data = data + b"\x00"
        case "operator":
            data = data.replace(b"neg.default", b"nig.default")
        case "kind":
            data = data.replace(b"program", b"prohram", 2)
    path.write_bytes(data)
    with pytest.raises(hc.ProgramError):
        hc.load_program(path)


def test_a_program_that_may_not_run_is_not_saved(tmp_path: Path) -> None:
    bad = Program((Input("x", 1, TensorType("float32", (3,), (1,))),), (Call("neg.default", (Ref(9),), {}, (2,)),), ())
    with pytest.raises(hc.ProgramError, match="%9 is used before it is bound"):
        save_program(bad, tmp_path / "bad.program")


DIGEST = """
import torch, housecall as hc
from torch import nn
torch.manual_seed({seed})
model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def step(model, x):
    model(x).sum().backward()
    optimizer.step()
hc.TorchHook(torch)
print(hc.record(step, model, torch.randn(2, 4)).digest)
"""


def test_the_digest_is_the_same_in_every_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", DIGEST.format(seed=seed)], capture_output=True, text=True, check=True
        ).stdout
        for seed in (1, 2)
    }
    assert len(found) == 1
    assert len(found.pop().strip()) == 64


def test_what_is_recorded_passes_the_check_and_prints() -> None:
    model = cnn()
    step = hc.record(training(optim.Adam(model.parameters())), model, *batches(4)[0])
    check(step.program)
    text = str(step)
    assert "model.0.weight: float32[4, 1, 3, 3] updated" in text
    assert "model.6.running_mean: float32[16] updated" in text
    assert "y: int64[4]," in text or "y: int64[4])" in text
    assert "return result=" in text
    assert repr(step).startswith("<recorded training.<locals>.train")
