"""`loss.backward()` once more: what is said as a phrase is what torch would have said, and only where it would."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import opdb
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import housecall as hc
from housecall.errors import UsageError
from housecall.pointers import backward as subject
from housecall.pointers.tensor import PointerTensor

ROUNDS = 6  # the first is learned from; from the third on the trace leaves as a program


@pytest.fixture
def phrases(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each backward said as one phrase."""
    found: list[int] = []

    def said(session: Any, trace: Any, phrase: Any) -> Any:
        found.append(phrase.calls)
        return real(session, trace, phrase)

    real = subject.said
    monkeypatch.setattr(subject, "said", said)
    return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.two(F.relu(self.one(x))), dim=1)


def twins(make: Callable[[], nn.Module] = Net) -> tuple[Any, Any]:
    torch.manual_seed(1)
    model = make()
    other = make()
    other.load_state_dict(model.state_dict())
    return model, other


def batches(rounds: int = ROUNDS) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(rounds):
        yield torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)


def grads(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            one = one.copy().get() if isinstance(one, PointerTensor) else one
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


def test_a_loop_equals_plain_torch_and_says_its_backward_once(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    model, plain = twins()
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain))
    for x, y in batches():
        model.send(clinic)
        for m, o, xs, ys in ((model, ours, x.send(clinic), y.send(clinic)), (plain, theirs, x, y)):
            o.zero_grad()
            F.nll_loss(m(xs), ys).backward()
            o.step()
        model.get()
        same(grads(model), grads(plain))
        same(list(model.state_dict().values()), list(plain.state_dict().values()))
    assert len(phrases) >= ROUNDS - 2
    assert len(set(phrases)) == 1


def test_what_is_known_passes_no_dispatcher(
    clinic: hc.VirtualWorker, phrases: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = twins()
    model.send(clinic)
    issued: list[Any] = []
    real: Any = PointerTensor.__dict__["__torch_dispatch__"]

    def noted(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        issued.append(func)
        return real.__func__(cls, func, types, args, kwargs)

    monkeypatch.setattr(PointerTensor, "__torch_dispatch__", classmethod(noted))
    for x, y in batches():
        model.zero_grad()
        loss = F.nll_loss(model(x.send(clinic)), y.send(clinic))
        clinic_waits = clinic.session.waits
        issued.clear()
        loss.backward()
        assert clinic.session.waits == clinic_waits
        last = set(issued)
        loss.get()
    assert phrases
    assert last <= {torch.ops.aten.detach.default}  # of what the graph had saved: no call


def test_a_graph_is_freed(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    model, _ = twins()
    model.send(clinic)
    held = []
    for x, y in batches():
        model.zero_grad()
        loss = F.nll_loss(model(x.send(clinic)), y.send(clinic))
        loss.backward()
        clinic.session.wait()
        held.append(len(clinic._objects))  # while the loss is there
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        del loss
        clinic.session.wait()
    assert phrases
    assert len(set(held)) == 1


def test_gradients_add_up(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    model, plain = twins()
    model.send(clinic)
    for at, (x, y) in enumerate(batches(9)):
        if at % 2 == 0:
            model.zero_grad()
            plain.zero_grad()
        F.nll_loss(model(x.send(clinic)), y.send(clinic)).backward()
        F.nll_loss(plain(x), y).backward()
        same(grads(model), grads(plain))
        clinic.session.wait()
    assert phrases


class _Doubled(torch.autograd.Function):
    """Says what a plain function says, and has another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad + grad


# What changes nothing of the calls of a forward, and changes its backward. Of a model, a hidden value, the loss.
def _frozen(model: Any, hidden: Any) -> Any:
    model.one.weight.requires_grad_(False)
    return hidden


def _hooked_leaf(model: Any, hidden: Any) -> Any:
    model.two.weight.register_hook(lambda grad: grad * 3)
    return hidden


def _hooked_node(model: Any, hidden: Any) -> Any:
    hidden.grad_fn.register_hook(lambda given, taken: tuple(g * 2 if g is not None else None for g in given))
    return hidden


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "detached": lambda model, hidden: hidden.detach(),
    "a hook": lambda model, hidden: (hidden.register_hook(lambda grad: grad * 2), hidden)[1],
    "a hook on a leaf": _hooked_leaf,
    "a hook on a node": _hooked_node,
    "a frozen leaf": _frozen,
    "retained": lambda model, hidden: (hidden.retain_grad(), hidden)[1],
    "a leaf in the middle": lambda model, hidden: hidden.detach().requires_grad_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_call_and_changes_a_backward(change: str, clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    model, plain = twins()
    model.send(clinic)

    def step(m: Any, x: Any, y: Any, changed: bool) -> Any:
        m.zero_grad()
        for p in m.parameters():
            p.requires_grad_(True)
        hidden = m.one(x)
        if changed:
            hidden = CHANGES[change](m, hidden)
        loss = F.nll_loss(F.log_softmax(m.two(F.relu(hidden)), dim=1), y)
        loss.backward()
        return hidden.grad if hidden.requires_grad and (hidden.is_leaf or hidden.retains_grad) else None

    for at, (x, y) in enumerate(batches(8)):
        found = step(model, x.send(clinic), y.send(clinic), at in (3, 4, 6))
        expected = step(plain, x, y, at in (3, 4, 6))
        same([*grads(model), found], [*grads(plain), expected])
        if change == "a hook on a leaf" and at in (3, 4, 6):
            assert len(phrases) <= 3
        clinic.session.wait()
    assert phrases


def test_a_function_of_ones_own(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    x, local = torch.ones(3).send(clinic).requires_grad_(), torch.ones(3).requires_grad_()
    for at in range(8):
        for leaf in (x, local):
            leaf.grad = None
            hidden = leaf * 2
            hidden = _Doubled.apply(hidden) if at in (3, 4, 6) else hidden.clone()
            hidden.sum().backward()
        same([x.grad], [local.grad])
        clinic.session.wait()
    assert phrases


def test_no_grad_in_the_middle(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    x, local = torch.ones(3).send(clinic).requires_grad_(), torch.ones(3).requires_grad_()
    for at in range(8):
        for leaf in (x, local):
            leaf.grad = None
            with torch.set_grad_enabled(at not in (3, 4, 6)):
                factor = leaf * 2
            (leaf * factor).sum().backward()
        same([x.grad], [local.grad])
        clinic.session.wait()
    assert phrases


def test_numbers(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    """Of a forward they may be others each time, and those of its backward are made of them."""
    x, local = torch.ones(3).send(clinic).requires_grad_(), torch.ones(3).requires_grad_()
    for slope in (0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.0, 0.0, -0.0):
        for leaf in (x, local):
            leaf.grad = None
            (F.leaky_relu(-leaf, slope) / 1.5).sum().backward()
        same([x.grad], [local.grad])
        assert torch.equal(x.grad.copy().get().signbit(), local.grad.signbit())
        clinic.session.wait()
    assert len(phrases) == 4


def test_one_of_several_results(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    x: Any = torch.randn(2, 3).send(clinic)  # type: ignore[attr-defined]  # the hook's
    local = x.copy().get()
    for leaf in (x, local):
        leaf.requires_grad_()
    for _ in range(4):
        for leaf in (x, local):
            leaf.grad = None
            values = torch.var_mean(leaf * 2)
            values[0].backward()
        same([x.grad], [local.grad])
        clinic.session.wait()
    assert phrases


def test_dropout(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    model, plain = twins(lambda: nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.4), nn.Linear(40, 3)))
    found = []
    for m in (model, plain):  # one after the other: each draws what follows from the seed
        torch.manual_seed(3)
        for x, y in batches():
            if m is model:
                x, y = x.send(clinic), y.send(clinic)
                m.send(clinic)
            m.zero_grad()
            F.cross_entropy(m(x), y).backward()
            if m is model:
                m.get()
            found.append(grads(m))
    for ours, theirs in zip(found[:ROUNDS], found[ROUNDS:], strict=True):
        same(ours, theirs)
    assert phrases


def test_a_checkpoint(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    model, plain = twins()
    model.send(clinic)
    for at, (x, y) in enumerate(batches(8)):
        for m, xs, ys in ((model, x.send(clinic), y.send(clinic)), (plain, x, y)):
            m.zero_grad()
            out = checkpoint(m, xs, use_reentrant=False, preserve_rng_state=False) if at in (3, 4, 6) else m(xs)
            F.nll_loss(out, ys).backward()
        same(grads(model), grads(plain))
        clinic.session.wait()
    assert phrases


def test_a_graph_that_reaches_back(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    """A frame left in the middle of a forward: the rest of it says the same whatever came before."""
    x, local = torch.ones(3).send(clinic).requires_grad_(), torch.ones(3).requires_grad_()
    for at in range(8):
        for leaf in (x, local):
            leaf.grad = None
            hidden = leaf.exp() if at % 2 else leaf * 2
            if leaf is x:
                clinic.session.wait()
                hidden.detach().sum()  # its slot is known to the trace before what has the graph is used
            hidden.sum().backward()
        same([x.grad], [local.grad])
        clinic.session.wait()
    assert not phrases


def test_a_value_that_is_put_in_anothers_place(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    """`.data` is no call, and what a graph has saved is another value then."""
    for at in range(8):
        found = []
        for place in (clinic, None):
            leaf, factor, other = torch.ones(3), torch.full((3,), 2.0), torch.full((3,), 5.0)
            if place is not None:
                leaf, factor, other = leaf.send(place), factor.send(place), other.send(place)
            leaf.requires_grad_()
            product = leaf * factor + other
            if at in (3, 4, 6):
                factor.data = other
            product.sum().backward()
            found.append(leaf.grad)
        same(found[:1], found[1:])
        clinic.session.wait()
    assert phrases


def test_a_gradient_for_two(clinic: hc.VirtualWorker) -> None:
    """Each leaf has a gradient of its own, to be changed in place."""
    x, y = (torch.ones(3).send(clinic).requires_grad_() for _ in range(2))
    for _ in range(5):
        x.grad = y.grad = None
        (x + y).sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        x.grad.mul_(7)
        assert torch.equal(y.grad.copy().get(), torch.ones(3))  # type: ignore[attr-defined]  # a pointer


def test_an_error_stands_where_it_is_made(clinic: hc.VirtualWorker) -> None:
    x = torch.ones(3).send(clinic).requires_grad_()
    for _ in range(4):
        with pytest.raises(RuntimeError, match="scalar"):
            (x * 2).backward()
        with pytest.raises(RuntimeError, match="does not require grad"):
            x.detach().sum().backward()


def test_a_module_that_moved(clinic: hc.VirtualWorker) -> None:
    model, _ = twins()
    for at, (x, y) in enumerate(batches()):
        model.send(clinic)
        model.zero_grad()
        loss = F.nll_loss(model(x.send(clinic)), y.send(clinic))
        if at == ROUNDS - 1:
            model.get()
            with pytest.raises(UsageError, match="has moved"):
                loss.backward()
            return
        loss.backward()
        model.get()


@contextmanager
def _anomaly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is slow
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            yield


@pytest.mark.parametrize(
    "aside",
    [lambda: torch.autocast("cpu", torch.bfloat16), _anomaly, lambda: torch.device("cpu")],
    ids=["autocast", "anomaly", "a function mode"],
)
def test_what_stands_between(aside: Callable[[], Any], clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    model, _ = twins()
    model.send(clinic)
    for x, y in batches():
        model.zero_grad()
        loss = F.nll_loss(model(x.send(clinic)), y.send(clinic))
        with aside():
            loss.backward()
        clinic.session.wait()
    assert not phrases


# -- every operator ----------------------------------------------------------------------------------------


def _loss(op: Any, sample: Any, structure: Any) -> Any:
    outputs = opdb.differentiable(sample.output_process_fn_grad(opdb.run(op, structure)))
    return sum(out.abs().sum() for out in outputs) if outputs else None


@pytest.mark.parametrize("name", [name for name in opdb.entries("float32", "gradient") if name not in opdb.EXCEPTIONS])
@pytest.mark.filterwarnings("ignore")  # many samples are there to make torch warn
def test_an_operators_backward_once_more(name: str, phrases: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Said as a phrase it gives what it gave, and freeing its graph issues nothing."""
    worker = hc.VirtualWorker(id="w")
    session = worker.session
    free = subject._free

    def freed(loss: Any) -> None:
        step = session.trace.step
        free(loss)
        assert session.trace.step is step

    monkeypatch.setattr(subject, "_free", freed)
    op = opdb.OPS[name]
    for sample in opdb.samples(op, torch.float32, grad=True)[:2]:
        packed = opdb.Packed(sample)
        here = packed.with_leaves(opdb.fresh)
        there = packed.with_leaves(lambda s: opdb.away(opdb.fresh(s), worker))
        leaves = [[v for v in opdb.leaves(structure) if v.requires_grad] for structure in (there, here)]
        loss = _loss(op, sample, here)
        if loss is None:
            continue
        loss.backward()
        expected = [leaf.grad for leaf in leaves[1]]
        for _ in range(3):
            for leaf in leaves[0]:
                leaf.grad = None
            loss = _loss(op, sample, there)
            loss.backward()
            opdb.same(opdb.home([leaf.grad for leaf in leaves[0]]), expected, name, **opdb.tolerance(name))
    if name in ("addmm", "nn.functional.conv2d", "nn.functional.relu", "log_softmax", "matmul", "tanh"):
        assert phrases


# -- whatever is done: random graphs, over and over, with what is no call chosen anew each time ------------------------

OPS: list[Callable[[Any, Any], Any]] = [
    lambda a, b: a + b,
    lambda a, b: a * b,
    lambda a, b: a @ b,
    lambda a, b: torch.relu(a),
    lambda a, b: a.t() + b,
    lambda a, b: a.tanh(),
    lambda a, b: a.sum(0, keepdim=True) * b,
    lambda a, b: torch.addmm(a, a, b),
    lambda a, b: a.clone().add_(b),
    lambda a, b: torch.cat([a, b])[1:4],
    lambda a, b: a.softmax(1),
    lambda a, b: a.clone().mul_(2).relu_(),
]


def _grown(leaves: list[Any], choices: list[tuple[int, int, int, str]]) -> Any:
    """A value that is computed of these leaves as the choices say."""
    values = list(leaves)
    for op, one, other, aside in choices:
        a, b = values[one % len(values)], values[other % len(values)]
        if aside == "detach":
            a = a.detach()
        with torch.set_grad_enabled(aside != "no_grad"):
            c = OPS[op](a, b)
        if aside == "hook" and c.requires_grad:
            c.register_hook(lambda grad: grad * 0.5)
        if aside == "retain" and c.requires_grad:
            c.retain_grad()
        values.append(c)
    return values[-1].sum() + values[len(leaves)].sum()


ASIDES = ["", "", "", "", "", "detach", "no_grad", "hook", "retain"]


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(seed: int, clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    draw = random.Random(seed)
    shape = [(draw.randrange(len(OPS)), draw.randrange(9), draw.randrange(9)) for _ in range(draw.randrange(2, 9))]
    local = [torch.randn(3, 3, generator=torch.Generator().manual_seed(seed + at)) for at in range(3)]
    remote = [leaf.send(clinic) for leaf in local]
    frozen = -1
    asides = [""] * len(shape)
    for _ in range(12):
        if draw.random() < 0.4:
            asides = [draw.choice(ASIDES) for _ in shape]
            frozen = draw.choice([-1, -1, 0, 1, 2])
        elif draw.random() < 0.5:
            asides = [""] * len(shape)
        choices = [(*one, aside) for one, aside in zip(shape, asides, strict=True)]
        if draw.random() < 0.7:
            for leaf in (*local, *remote):
                leaf.grad = None
        results = []
        for leaves in (remote, local):
            for at, leaf in enumerate(leaves):
                leaf.requires_grad_(at != frozen)
            loss = _grown(leaves, choices)
            results.append(loss.detach())
            if loss.requires_grad:
                loss.backward()
        same(results[:1], results[1:])
        same([leaf.grad for leaf in remote], [leaf.grad for leaf in local])
        if draw.random() < 0.5:
            clinic.session.wait()


def test_random_graphs_are_said_as_phrases(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    """So that the test above holds them against something."""
    for seed in range(10):
        test_random_graphs(seed, clinic, phrases)
    assert len(phrases) > 20


# -- found by reviewers -----------------------------------------------------------------------------------


def test_a_checkpoint_computes_once_more_and_not_twice(clinic: hc.VirtualWorker) -> None:
    """Running statistics tell how often."""
    model, plain = twins(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    model.send(clinic)
    for x, _ in batches():
        for m, xs in ((model, x.send(clinic)), (plain, x)):  # type: ignore[attr-defined]  # the hook's
            m.zero_grad()
            checkpoint(m, xs, use_reentrant=False).square().sum().backward()
        same(grads(model), grads(plain))
        same(list(model.buffers()), list(plain.buffers()))
        clinic.session.wait()


def test_hooks_on_what_is_saved(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    x, local = torch.ones(3).send(clinic).requires_grad_(), torch.ones(3).requires_grad_()  # type: ignore[attr-defined]  # the hook's
    for at in range(8):
        for leaf in (x, local):
            leaf.grad = None
            changed = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * 4)
            with changed if at in (3, 4, 6) else nullcontext():
                loss = leaf.exp().sum()
            loss.backward()
        same([x.grad], [local.grad])
        clinic.session.wait()
    assert phrases


def test_a_loss_of_before_that_is_used_now(clinic: hc.VirtualWorker, phrases: list[int]) -> None:
    for factor in (2.0, 2.0, 3.0, 5.0):
        found = []
        for place in (clinic, None):
            leaf = torch.ones(3) if place is None else torch.ones(3).send(place)  # type: ignore[attr-defined]  # the hook's
            total = torch.zeros(()) if place is None else torch.zeros(()).send(place)  # type: ignore[attr-defined]  # as above
            leaf.requires_grad_()
            loss = (leaf * factor).sum()
            loss.item()
            total += loss.detach() + leaf.detach().sum()
            loss.backward()
            found.append(leaf.grad)
        same(found[:1], found[1:])
    assert not phrases


def test_what_a_view_hides(clinic: hc.VirtualWorker) -> None:
    """A function of one's own on a view shows as torch's own node."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Any) -> Any:
            ctx.mark_dirty(v)
            return v.exp_()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad * 10

    for at in range(6):
        found = []
        for place in (clinic, None):
            leaf = torch.ones(4) if place is None else torch.ones(4).send(place)  # type: ignore[attr-defined]  # the hook's
            leaf.requires_grad_()
            base = leaf * 1
            view = base[:2]
            if at % 2:
                Own.apply(view)
            else:
                view.exp_()
            base.sum().backward()
            found.append(leaf.grad)
        same(found[:1], found[1:])
        clinic.session.wait()


def test_two_threads_that_wait_for_each_other() -> None:
    """No lock is held while torch walks a graph."""
    a, b = hc.VirtualWorker(id="a"), hc.VirtualWorker(id="b")

    class Cross(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, there: Any) -> Any:
            ctx.back = x.location
            return x.detach().copy().move(there)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            gate.wait(20)
            return grad.detach().copy().move(ctx.back), None

    gate = threading.Barrier(2)
    results: list[Any] = []

    def run(here: Any, there: Any) -> None:
        x: Any = torch.ones(3).send(here)  # type: ignore[attr-defined]  # the hook's
        x.requires_grad_()
        Cross.apply(x * 2, there).sum().backward()
        results.append(x.grad.copy().get())

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in ((a, b), (b, a))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
    assert all(torch.equal(one, torch.full((3,), 2.0)) for one in results)
