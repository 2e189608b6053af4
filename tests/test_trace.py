"""Traces: what repeats leaves as one run of a program, and nobody can tell by what comes of it.

The plain twin is a session that has seen nothing twice: its calls leave one by one.
"""

from __future__ import annotations

import copy
import gc
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_modules
import test_optimizers
import test_session
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from opdb import EXCEPTIONS, check, entries, tolerance
from torch import nn, optim

import housecall as hc
from housecall.pointers import dispatch, repeat, session, trace
from housecall.program.call import Call
from housecall.testing import World
from housecall.wire.messages import Define, Drop, Put, Run
from housecall.worker import plan
from housecall.worker.limits import Limits

FIXED = settings(deadline=None, database=None, derandomize=True, max_examples=60)
FEWER = settings(FIXED, max_examples=12)
NEVER = 1 << 60
Value = Any


def worker(how: str, frame_messages: int = 256) -> hc.VirtualWorker:
    """A worker in this process: "direct", "codec", "synchronous", or "metered", which holds its session to limits."""
    made = hc.VirtualWorker(id="clinic", codec=how == "codec", synchronous=how == "synchronous")
    if how == "metered":
        made.worker.limits = Limits()
        made._door._begin_metering()
    made.session.transport.frame_messages = frame_messages
    return made


# -- scripts at random --------------------------------------------------------------------------------------

# What a step does with two pointers and a number that is another in each batch: a line each, as errors name them.
STEPS: dict[str, Callable[[Any, Any, float], Any]] = {
    "neg": lambda x, y, f: -x,
    "exp": lambda x, y, f: x.exp(),
    "relu": lambda x, y, f: x.relu(),
    "clone": lambda x, y, f: x.clone(),
    "detach": lambda x, y, f: x.detach(),
    "turn": lambda x, y, f: x.t(),
    "flat": lambda x, y, f: x.view(-1),
    "rows": lambda x, y, f: x[1:],
    "column": lambda x, y, f: x[..., 0],
    "wide": lambda x, y, f: x.expand(2, *x.shape),
    "pieces": lambda x, y, f: x.unbind(0)[-1],
    "sum": lambda x, y, f: x.sum(),
    "two results": lambda x, y, f: x.max(0).values,
    "add": lambda x, y, f: x + y,
    "mul": lambda x, y, f: torch.mul(x, y),
    "product": lambda x, y, f: x @ y.t(),
    "both": lambda x, y, f: torch.cat([x, y]),
    "scaled": lambda x, y, f: torch.add(x, y, alpha=2),
    "times a number": lambda x, y, f: x * f,
    "plus one": lambda x, y, f: x + 1,
    "times true": lambda x, y, f: x * True,
    "times 1.0": lambda x, y, f: x * 1.0,
    "times a local number": lambda x, y, f: x * torch.tensor(f),
    "at most": lambda x, y, f: x.clamp(max=f),
    "as double": lambda x, y, f: x.double(),
    "zeros": lambda x, y, f: torch.zeros_like(x),
    "dropout": lambda x, y, f: F.dropout(x, 0.5),
    "add in place": lambda x, y, f: x.add_(y),
    "step": lambda x, y, f: x.sub_(y, alpha=f),
    "mul in place": lambda x, y, f: x.mul_(f),
    "write a row": lambda x, y, f: x[0].copy_(y[0]),
    "set": lambda x, y, f: x.__setitem__(0, f),
    "gradient": lambda x, y, f: torch.autograd.grad((x.detach().requires_grad_() * y).relu().sum(), y)[0],
    "learn": lambda x, y, f: grown(x),
    "send": lambda x, y, f: torch.full((2, 3), f).send(x.location),
    "value": lambda x, y, f: x.tolist(),
    "number": lambda x, y, f: x.sum().item(),
    "where": lambda x, y, f: x.nonzero(),
    "mask": lambda x, y, f: x[x > 0],
    "bad row": lambda x, y, f: x.index_select(0, torch.tensor([9]).send(x.location)),
    "bad write": lambda x, y, f: x.index_fill_(0, torch.tensor([9]).send(x.location), 1.0),
    "wait": lambda x, y, f: x.location.session.wait(),
}  # fmt: skip


def grown(x: torch.Tensor) -> torch.Tensor:
    leaf = x.detach().requires_grad_()
    (leaf * leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


Script = list[tuple[str, int, int]]
steps = st.tuples(st.sampled_from([*STEPS, "drop"]), st.integers(0, 9), st.integers(0, 9))
scripts = st.lists(steps, min_size=1, max_size=14)


def said(act: Callable[[], Value]) -> Value:
    """What comes of it: a pointer, a value as text, or the error's own words."""
    try:
        found = act()
    except (hc.HousecallError, RuntimeError, IndexError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return found if isinstance(found, hc.PointerTensor) else repr(found)


class Play:
    """One script, played batch after batch at one worker; `seen` is all that anybody could see."""

    def __init__(self, script: Script, how: str, frame_messages: int) -> None:
        self.script = script
        self.worker = worker(how, frame_messages)
        self.first_id = next(self.worker.session.ids)
        self.seen: list[Value] = []
        columns = torch.linspace(-2, 2, 60).view(20, 3)
        self.columns = columns.send(self.worker), (columns * 10).long().send(self.worker)
        self.kept = [torch.ones(2, 3).send(self.worker), torch.arange(6.0).view(3, 2).t().send(self.worker)]

    def batch(self, number: int) -> None:
        torch.manual_seed(number)
        at = 2 * number
        pool = [*self.kept, *(column[at : at + 2] for column in self.columns)]
        for name, one, other in self.script:
            x, y = pool[one % len(pool)], pool[other % len(pool)]
            if name == "drop":
                if len(pool) > 1 and (number + other) % 4:  # in most batches
                    del pool[one % len(pool)]
                continue
            found = said(lambda: STEPS[name](x, y, 0.25 * number - 1))  # noqa: B023  # called here
            self.note(found)
            if isinstance(found, hc.PointerTensor):
                pool.append(found)
        if number % 3 == 2:
            self.note([said(lambda: one.detach().tolist()) for one in pool])  # noqa: B023  # as above

    def note(self, found: Value) -> None:
        if isinstance(found, hc.PointerTensor):
            found = found._slot.id - self.first_id, found.dtype, found.shape, found.stride(), found.storage_offset()
        self.seen.append(found)

    def look(self) -> None:
        """Wait, hear what failed, and look into the worker's store."""
        gc.collect(0)
        for _ in range(2):
            self.note(said(self.worker.session.wait))
        store = self.worker._door.store
        self.note({
            ref - self.first_id: str(value) if isinstance(value, Exception) else (value.stride(), repr(value.tolist()))
            for ref, value in store.items()
        })  # fmt: skip
        self.note(store.held)

    def play(self, batches: int) -> list[Value]:
        for number in range(batches):
            self.batch(number)
            if number % 2:
                self.look()
        self.look()
        return self.seen


@pytest.mark.parametrize("how", ["direct", "codec", "metered", "synchronous"])
def test_runs_are_their_calls_one_by_one(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = recognised = 0

    def counted(*call: Any) -> Any:
        nonlocal recognised
        found = repeat.again(*call)
        recognised += found is not None
        return found

    @FIXED
    @given(scripts, st.sampled_from((0, 1, 2)), st.sampled_from((3, 8, 256)))
    def alike(script: Script, seen: int, frame_messages: int) -> None:
        nonlocal programs
        monkeypatch.setattr(trace, "SEEN", NEVER)
        monkeypatch.setattr(dispatch, "again", lambda *call: None)  # no call is recognised
        expected = Play(script, how, frame_messages).play(6)
        monkeypatch.setattr(dispatch, "again", counted)
        monkeypatch.setattr(trace, "SEEN", seen)
        play = Play(script, how, frame_messages)
        assert play.play(6) == expected
        programs += len(play.worker._door.plans._plans)

    alike()
    assert programs > 60
    assert recognised > 100


# -- the same again, where each trace is a program the first time -------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "SEEN", 0)


ENTRIES = [
    (name, dtype, kind)
    for dtype, kind in (("float32", "forward"), ("float32", "gradient"), ("complex64", "forward"), ("int64", "forward"))
    for name in entries(dtype, kind)
    if name not in EXCEPTIONS
]


@pytest.mark.filterwarnings("ignore")  # many samples are there to make torch warn
@pytest.mark.parametrize(("name", "dtype", "kind"), ENTRIES[::9])
def test_an_operator_through_runs_equals_local(at_once: None, name: str, dtype: str, kind: str) -> None:
    check(name, dtype, kind, worker("direct"), **tolerance(name))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", test_modules.MODULES)
def test_a_module_trains_alike_through_runs(at_once: None, name: str) -> None:
    test_modules.test_one_training_step_equals_local(name, worker("direct"))


@pytest.mark.parametrize("name", test_optimizers.OPTIMIZERS)
def test_an_optimizer_steps_alike_through_runs(at_once: None, name: str) -> None:
    test_optimizers.test_travelling_model_equals_local_training(name, (worker("direct"), worker("metered")))


def test_a_model_trains_alike_over_the_wire(at_once: None) -> None:
    with World() as world:
        test_modules.test_one_training_step_equals_local("conv net with batch norm and dropout", world.worker)
        test_optimizers.test_travelling_model_equals_local_training("Adam", (world.worker, worker("codec")))


# -- nothing goes stale: whatever happens to a model between two batches ------------------------------------


class Life:
    """A model's life, at home or at two workers by turns: what happens to it, one event after another."""

    def __init__(self, places: tuple[hc.VirtualWorker, hc.VirtualWorker] | None) -> None:
        torch.manual_seed(3)
        self.places = places
        self.at = 0
        self.size, self.clips, self.keeps = 4, False, False
        self.model: Any = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2))
        self.frozen = False
        self.saved = copy.deepcopy(self.model.state_dict())
        self.kinds = itertools.cycle((optim.Adam, optim.RMSprop, optim.SGD))
        self.optimizer: Any = optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.told: list[Any] = []
        if places is not None:
            self.model.send(places[0])

    def place(self, tensor: torch.Tensor) -> Any:
        return tensor if self.places is None else tensor.send(self.places[self.at])  # type: ignore[attr-defined]  # the hook's

    def batch(self, number: int) -> None:
        torch.manual_seed(number)
        x, y = torch.randn(self.size, 3), torch.randint(0, 2, (self.size,))
        torch.manual_seed(number + 1)
        if not self.keeps:
            self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.place(x)), self.place(y))
        loss.backward()
        if self.clips:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
        self.optimizer.step()
        self.loss = loss.detach()

    def happens(self, event: str) -> None:
        match event:
            case "read":
                self.told.append(self.loss.item())
            case "smaller":
                self.size = 7 - self.size
            case "copy":
                optimizer, groups = self.optimizer, self.optimizer.param_groups
                self.model = copy.deepcopy(self.model)
                self.optimizer = type(optimizer)(self.model.parameters(), lr=groups[0]["lr"])
            case "load":
                self.model.load_state_dict(self.saved)
            case "save":
                self.saved = {name: value.clone() for name, value in self.model.state_dict().items()}
            case "optimizer":
                self.optimizer = next(self.kinds)(self.model.parameters(), lr=0.02)
            case "rate":
                self.optimizer.param_groups[0]["lr"] *= 0.7
            case "decay":
                self.optimizer.param_groups[0]["weight_decay"] = 0.1
            case "freeze":
                self.frozen = not self.frozen
                self.model[0].requires_grad_(not self.frozen)
            case "quiet":
                self.model.train(not self.model.training)
            case "accumulate":
                self.keeps = not self.keeps
            case "clip":
                self.clips = not self.clips
            case "write":
                with torch.no_grad():
                    self.model[3].weight.mul_(0.5)
            case "layer":
                torch.manual_seed(8)
                layer: Any = nn.Linear(5, 2)
                self.model[3] = layer if self.places is None else layer.send(self.places[self.at])
                self.optimizer = optim.SGD(self.model.parameters(), lr=0.1)
            case "move" if self.places is not None:
                self.model.get()
                self.at = 1 - self.at
                self.model.send(self.places[self.at])
                self.saved = {name: self.moved(value) for name, value in self.saved.items()}

    def moved(self, value: Any) -> Any:
        assert self.places is not None
        return value.move(self.places[self.at]) if isinstance(value, hc.PointerTensor) else value

    def end(self) -> list[Any]:
        if self.places is not None:
            self.model.get()
        values = [p.detach() for p in self.model.parameters()]
        values += [p.grad for p in self.model.parameters() if p.grad is not None]
        return [*self.told, *(value.tolist() for value in values)]


EVENTS = (
    "read", "smaller", "copy", "load", "save", "optimizer", "rate", "decay", "freeze", "quiet", "accumulate", "clip",
    "write", "layer", "move",
)  # fmt: skip
lives = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(EVENTS)), min_size=1, max_size=8)


@pytest.mark.parametrize("how", ["direct", "codec", "metered", "synchronous"])
def test_nothing_goes_stale(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = 0

    @FEWER
    @given(lives, st.sampled_from((0, 1, 2)))
    def alike(events: list[tuple[int, str]], seen: int) -> None:
        nonlocal programs
        monkeypatch.setattr(trace, "SEEN", seen)
        places = worker(how), worker("direct")
        here, away = Life(None), Life(places)
        for number, (batches, event) in enumerate(events):
            for life in (here, away):
                for one in range(batches):
                    life.batch(10 * number + one)
                life.happens(event)
        assert away.end() == here.end()
        programs += len(places[0]._door.plans._plans)

    alike()
    assert programs > 12


# -- what a session keeps of it -----------------------------------------------------------------------------


def sizes(tree: trace.Tree) -> tuple[int, int]:
    """How many steps and endings a tree has."""
    found, endings = [tree.root], 0
    for step in found:  # grows while it is walked
        endings += len(step.endings)
        found.extend(step.after.values())
    return len(found), endings


def test_a_loop_that_never_repeats_keeps_no_more_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOST_STEPS", 200)
    clinic = worker("direct")
    x = torch.arange(5000.0).send(clinic)
    for number in range(3000):
        _ = x[number] * 2  # a step that was never seen before
        if number % 10 == 9:
            clinic.session.cut()
        if number % 500 == 499:
            assert sum(sizes(clinic.session._tree)) <= 210
    clinic.session.wait()
    assert not clinic._door.plans._plans


def test_ends_that_never_repeat_keep_no_more_than_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOST_STEPS", 200)
    clinic = worker("direct")
    x = torch.ones(3).send(clinic)
    for number in range(1 << 10):
        made = [x.neg() for _ in range(10)]
        kept = [one for at, one in enumerate(made) if number >> at & 1]  # other ones each time
        del made
        clinic.session.cut()
        assert sum(sizes(clinic.session._tree)) <= 210
        del kept
    assert not clinic._door.plans._plans


def test_a_session_makes_so_many_programs_and_goes_on_without(at_once: None) -> None:
    clinic = worker("metered")
    x = torch.arange(300.0).send(clinic)
    for number in range(2 * trace.MOST_PROGRAMS):
        assert (x[number] * 2).item() == 2 * number
    assert len(clinic._door.plans._plans) == trace.MOST_PROGRAMS


def test_a_program_that_is_met_again_is_no_other(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOST_STEPS", 100)  # so the tree begins anew many times
    clinic = worker("direct")
    x = torch.ones(3).send(clinic)
    for _ in range(2 * trace.MOST_PROGRAMS):
        for _ in range(100):
            clinic.session._tree._grow()
        _ = (x * 2).neg()
        clinic.session.cut()
    counting = test_session.counted(clinic)
    _ = (x * 2).neg()
    clinic.session.wait()
    assert counting.kinds().count(Run) == 1
    assert Call not in counting.kinds()
    assert len(clinic._door.plans._plans) == 1


def reached(root: Any) -> Iterator[Any]:
    """All that an object refers to, but for modules, classes and functions."""
    known, found = {id(root)}, [root]
    for one in found:  # grows while it is walked
        yield one
        if isinstance(one, type | types.ModuleType | types.FunctionType | types.CodeType):
            continue
        for other in gc.get_referents(one):
            if id(other) not in known:
                known.add(id(other))
                found.append(other)


def test_what_is_kept_holds_no_value_no_pointer_and_no_frame() -> None:
    clinic = worker("direct")
    model = nn.Linear(3, 2).send(clinic)
    optimizer = optim.Adam(model.parameters())
    x = torch.ones(4, 3).send(clinic)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        clinic.session.wait()
    held = [one for one in reached(clinic.session._tree.root) if isinstance(one, torch.Tensor) and not one.is_meta]
    assert held == []
    assert not [one for one in reached(clinic.session._tree.root) if isinstance(one, session.Slot | types.FrameType)]


@pytest.mark.parametrize("remote", [False, True])
def test_a_training_step_leaves_as_one_run(remote: bool) -> None:
    with World() as world:
        clinic = world.worker if remote else worker("codec")
        model: Any = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).send(clinic)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batches = [(torch.randn(4, 3), torch.randint(0, 2, (4,))) for _ in range(8)]
        counting = test_session.counted(clinic)
        first = 0
        for number, (x, y) in enumerate(batches):
            optimizer.param_groups[0]["lr"] *= 0.9  # a number, and no other program
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.send(clinic)), y.send(clinic))
            loss.backward()
            optimizer.step()
            assert loss.item() > 0
            if number == 5:
                first = len(counting.frames)
        said = [type(message) for frame in counting.frames[first:] for message in frame.messages]
        assert {kind: said.count(kind) for kind in (Run, Put, Call, Define)} == {Run: 2, Put: 4, Call: 0, Define: 0}
        model.get()


def test_what_a_trace_does_not_use_is_dropped_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a parameter that came back is updated in place: its last copy at the worker is gone by then."""
    clinic = hc.VirtualWorker(id="clinic")
    model: Any = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x: Any = torch.ones(4, 3).send(clinic)  # type: ignore[attr-defined]  # the hook's
    said: list[Any] = []
    send = clinic.session.transport.send

    def sent(frame: Any) -> None:
        """Noted without the tensors, which would live on."""
        said[:] = [message for message in frame.messages if isinstance(message, Drop | Run)]
        send(frame)

    monkeypatch.setattr(clinic.session.transport, "send", sent)
    shared: list[bool] = []
    add_ = torch.Tensor.add_

    def added(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        before = torch._C._data_address(tensor)  # type: ignore[attr-defined]  # not in torch's stubs
        result = add_(tensor, *args, **kwargs)
        shared.append(before != torch._C._data_address(tensor))  # type: ignore[attr-defined]  # as above
        return result

    monkeypatch.setitem(plan._DIRECT, "add_.Tensor", added)
    for _ in range(6):
        model.send(clinic)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        model.get()
    first, run = said[:2]
    assert isinstance(first, Drop)
    assert isinstance(run, Run)
    assert set(first.ids).isdisjoint(run.inputs)
    assert shared
    assert not any(shared)
