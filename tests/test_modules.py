"""Modules at a worker: one training step equals local training, bit for bit."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn

import housecall as hc
from housecall.worker.limits import Limits


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.25))
        self.fc = nn.Linear(4 * 3 * 3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).flatten(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 7, batch_first=True, **options)
        self.fc = nn.Linear(7 * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.rnn(x)[0][:, -1])


class Cell(nn.Module):
    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = kind(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.cell(x[:, 0])
        state = self.cell(x[:, 1], state)
        return state[0] if isinstance(state, tuple) else state


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0].mean(1)


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).mean(1)


def image() -> torch.Tensor:
    return torch.randn(8, 1, 8, 8)


def sequence() -> torch.Tensor:
    return torch.randn(8, 4, 6)


def vectors() -> torch.Tensor:
    return torch.randn(8, 4, 8)


def words() -> torch.Tensor:
    return torch.randint(0, 20, (8, 4))


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "conv net with batch norm and dropout": (ConvNet, image),
    "LSTM": (lambda: Recurrent(nn.LSTM), sequence),
    "LSTM, two layers, dropout, both ways": (
        lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.3, bidirectional=True),
        sequence,
    ),
    "LSTM with projection": (lambda: nn.Sequential(_First(nn.LSTM(6, 7, proj_size=5, batch_first=True))), sequence),
    "GRU": (lambda: Recurrent(nn.GRU), sequence),
    "RNN": (lambda: Recurrent(nn.RNN), sequence),
    "LSTMCell": (lambda: Cell(nn.LSTMCell), sequence),
    "GRUCell": (lambda: Cell(nn.GRUCell), sequence),
    "RNNCell": (lambda: Cell(nn.RNNCell), sequence),
    "Embedding": (lambda: nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(24, 5)), words),
    "EmbeddingBag": (lambda: nn.Sequential(nn.EmbeddingBag(20, 6), nn.Linear(6, 5)), words),
    "MultiheadAttention": (Attention, vectors),
    "causal attention": (Causal, vectors),
    "TransformerEncoderLayer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(32, 5)),
        vectors,
    ),
    "BatchNorm1d": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)), vectors),
    "LayerNorm, GroupNorm, PReLU": (
        lambda: nn.Sequential(nn.LayerNorm(8), nn.GroupNorm(2, 4), nn.PReLU(), nn.Flatten(), nn.Linear(32, 5)),
        vectors,
    ),
    "dropouts": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.AlphaDropout(0.2), nn.Flatten(), nn.Linear(32, 5)),
        vectors,
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.Flatten(), torch.nn.utils.parametrizations.weight_norm(nn.Linear(32, 5))),
        vectors,
    ),
}


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0][:, -1]


def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(model(x)[:, :5], y)
    loss.backward()
    return loss


def assert_equal_models(found: nn.Module, expected: nn.Module, exact: bool = True) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {}
    for (name, a), (_, b) in zip(
        found.state_dict(keep_vars=True).items(), expected.state_dict(keep_vars=True).items(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}", **tolerance)
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}.grad: {m}", **tolerance)


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch says that it takes a slower path
@pytest.mark.parametrize("name", MODULES)
def test_one_training_step_equals_local(name: str, clinic: hc.VirtualWorker) -> None:
    make, inputs = MODULES[name]
    torch.manual_seed(0)
    local = make()
    remote = copy.deepcopy(local)
    x, y = inputs(), torch.randint(0, 5, (8,))
    kept = [id(p) for p in remote.parameters()]

    torch.manual_seed(1)
    expected = step(local, x, y)
    torch.manual_seed(1)
    found = step(remote.send(clinic), x.send(clinic), y.send(clinic)).get()
    remote.get()

    assert torch.equal(found, expected)
    assert kept == [id(p) for p in remote.parameters()]
    assert_equal_models(remote, local)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", MODULES)
def test_evaluation_equals_local(name: str, clinic: hc.VirtualWorker) -> None:
    make, inputs = MODULES[name]
    torch.manual_seed(0)
    local = make().eval()
    remote = copy.deepcopy(local)
    x = inputs()
    with torch.no_grad():
        expected = local(x)
        found = remote.send(clinic)(x.send(clinic)).get()
    # In evaluation torch takes a fused path for plain tensors in two layers; sums are then rounded otherwise.
    torch.testing.assert_close(found, expected)
    assert remote.get() is remote


def test_a_module_comes_home_whole(clinic: hc.VirtualWorker) -> None:
    model = ConvNet()
    before = copy.deepcopy(model.state_dict())
    assert model.send(clinic) is model
    assert hc.location_of(model) is clinic
    assert all(isinstance(p, nn.Parameter) and isinstance(p, hc.PointerTensor) for p in model.parameters())
    assert model.get() is model
    assert hc.location_of(model) is None
    assert all(type(p) is nn.Parameter for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    gc.collect()
    assert clinic._objects == {}


def test_tied_weights_stay_tied(clinic: hc.VirtualWorker) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model.send(clinic)
    assert model[1].weight is model[0].weight
    assert len(clinic._objects) == 1
    model.get()
    assert model[1].weight is model[0].weight


def test_frozen_parameters_stay_frozen(clinic: hc.VirtualWorker) -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    model.send(clinic)
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    model.get()
    assert [p.requires_grad for p in model.parameters()] == [True, False]


def test_the_gradient_of_a_frozen_parameter_travels(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    model.requires_grad_(False)
    for worker in schools:
        assert model.send(worker).get().weight.grad is not None
    assert torch.equal(model.weight.grad, torch.ones(2, 3))


def test_a_deep_copy_leaves_gradients_behind_as_torch_does(clinic: hc.VirtualWorker) -> None:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    assert copy.deepcopy(model).weight.grad is None
    model.send(clinic)
    assert copy.deepcopy(model).weight.grad is None
    assert copy.deepcopy(model.weight.grad).copy().get().sum() == 6


def test_deepcopy_and_state_dict_at_the_worker(clinic: hc.VirtualWorker) -> None:
    model = ConvNet()
    kept = copy.deepcopy(model)
    model.send(clinic)
    twin = copy.deepcopy(model)
    assert hc.location_of(twin) is clinic
    state = model.state_dict()
    assert all(isinstance(value, hc.PointerTensor) for value in state.values())
    other = ConvNet().send(clinic)
    other.load_state_dict(state)
    fresh = ConvNet().send(clinic)
    fresh.load_state_dict(kept.state_dict())  # local values are sent along, as torch copies between devices
    for copied in (twin, other, fresh):
        assert_equal_models(copied.get(), kept)
    with pytest.raises(hc.UsageError, match=r"cannot be saved or pickled: call \.get\(\) first"):
        torch.save(model.state_dict(), "/dev/null")


def test_module_errors_say_what_to_do(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    west, grape = schools
    model = nn.Linear(3, 2)
    with pytest.raises(hc.UsageError, match="at home already"):
        model.get()
    model.send(west)
    with pytest.raises(hc.UsageError, match=r"at 'westside' already: bring it home with \.get\(\)"):
        model.send(grape)
    with pytest.raises(hc.UsageError, match="expected a worker"):
        nn.Linear(3, 2).send("clinic")
    with pytest.raises(hc.PlaceError, match=r"'westside' and a local one"):
        model(torch.ones(1, 3))
    with pytest.raises(hc.PlaceError, match=r"at 'grapevine' and at 'westside'|at 'westside' and at 'grapevine'"):
        model(torch.ones(1, 3).send(grape))
    with pytest.raises(hc.UsageError, match=r"call \.get\(\) on the module"):
        model.weight.get()
    assert model.get() is model


def test_backward_through_a_module_that_has_moved_is_an_error(clinic: hc.VirtualWorker) -> None:
    model = nn.Linear(3, 2).send(clinic)
    loss = model(torch.ones(1, 3).send(clinic)).sum()
    model.get()
    with pytest.raises(hc.UsageError, match="moved since its forward"):
        loss.backward()


def test_gradients_accumulate_over_two_workers(schools: tuple[hc.VirtualWorker, hc.VirtualWorker]) -> None:
    torch.manual_seed(0)
    local = nn.Linear(3, 2)
    remote = copy.deepcopy(local)
    for worker in (*schools, None):
        x = torch.randn(4, 3)
        local(x).square().sum().backward()
        if worker is None:
            remote(x).square().sum().backward()
        else:
            remote.send(worker)
            remote(x.send(worker)).square().sum().backward()
            remote.get()
    assert_equal_models(remote, local)


def test_clip_grad_norm(clinic: hc.VirtualWorker) -> None:
    torch.manual_seed(0)
    local = ConvNet()
    remote = copy.deepcopy(local)
    x, y = image(), torch.randint(0, 5, (8,))
    torch.manual_seed(1)
    step(local, x, y)
    expected = torch.nn.utils.clip_grad_norm_(local.parameters(), 0.1)
    torch.manual_seed(1)
    step(remote.send(clinic), x.send(clinic), y.send(clinic))
    found = torch.nn.utils.clip_grad_norm_(remote.parameters(), 0.1)
    assert torch.equal(found.get(), expected)
    assert_equal_models(remote.get(), local)


# -- a module travels whole ------------------------------------------------------------------------------------


class Counts(nn.Module):
    """A buffer that no state_dict has, one that is not there, and a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(3), persistent=False)
        self.register_buffer("absent", None)
        self.scales = nn.ParameterList([torch.ones(3), torch.full((3,), 2.0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return self.layer(x) * self.seen * self.scales[0] + self.scales[1]


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have the new one
        return nn.utils.weight_norm(nn.Linear(3, 3))


def pruned() -> nn.Module:
    layer = nn.Linear(3, 3)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", amount=4)
    return layer


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "buffers and lists": Counts,
    "weight norm": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    "weight norm, as it was": old_weight_norm,
    "orthogonal": lambda: torch.nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
    "pruned": pruned,
    "DataParallel, where there is no GPU": lambda: nn.DataParallel(nn.Linear(3, 3)),
    "tied": lambda: tied(),
}


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("name", WHOLE)
def test_a_module_travels_whole(name: str, clinic: hc.VirtualWorker) -> None:
    if name.startswith("DataParallel") and torch.cuda.is_available():
        pytest.skip("it wants its parameters on a GPU, and says so")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(WHOLE[name]())
    local, remote = models
    keys, kept = list(local.state_dict()), [id(p) for p in remote.parameters()]
    x = torch.randn(4, 3)
    for _ in range(2):
        expected = local(x).square().sum()
        expected.backward()
        found = remote.send(clinic)(x.send(clinic)).square().sum()
        found.backward()
        assert torch.equal(found.get(), expected)
        remote.get()
        assert list(remote.state_dict()) == keys
        assert [id(p) for p in remote.parameters()] == kept
        assert_equal_models(remote, local)
        for (name, one), (_, other) in zip(remote.named_buffers(), local.named_buffers(), strict=True):
            assert torch.equal(one, other), name
    assert torch.equal(remote(x), local(x))


def test_hooks_of_a_module_get_pointers(clinic: hc.VirtualWorker) -> None:
    model, called = nn.Linear(3, 2), []
    model.register_forward_pre_hook(lambda module, inputs: called.append(type(inputs[0])))
    model.register_forward_hook(lambda module, inputs, output: called.append(type(output)))
    model.register_full_backward_hook(lambda module, inward, outward: called.append(type(outward[0])))
    model.send(clinic)
    model(torch.ones(2, 3).send(clinic).requires_grad_()).sum().backward()
    assert called == [hc.PointerTensor] * 3
    model.get()


HINDERED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)), "run it once at home first"),
    "lazy buffers": (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)), "run it once at home"),
    "hooks of a parameter": (lambda: hooked(), "remove them first"),
    "sparse": (lambda: sparse(), r"to_dense\(\)"),
    "meta": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), "no values to send"),
}


def hooked() -> nn.Module:
    model = nn.Sequential(nn.LSTM(2, 2), nn.Linear(2, 2))
    model[1].weight.register_hook(lambda grad: grad)
    return model


def sparse() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("graph", torch.eye(3).to_sparse())
    return model


@pytest.mark.parametrize("name", HINDERED)
def test_a_module_that_cannot_travel_stays_as_it_is(name: str, clinic: hc.VirtualWorker) -> None:
    make, text = HINDERED[name]
    model = make()
    attributes = [set(part.__dict__) for part in model.modules()]
    with pytest.raises(hc.UsageError, match=text):
        model.send(clinic)
    assert not any(isinstance(tensor, hc.PointerTensor) for tensor in (*model.parameters(), *model.buffers()))
    assert attributes == [set(part.__dict__) for part in model.modules()]
    gc.collect()
    assert clinic._objects == {}


# -- modules that are helped while they are away: `adapted` ------------------------------------------------------


def guarded() -> hc.VirtualWorker:
    """A worker that holds its session to limits, as remote ones do."""
    made = hc.VirtualWorker(id="clinic")
    made.worker.limits = Limits()
    made._door._begin_metering()
    made.session.guarded = True
    return made


def first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


ADAPTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: nn.LSTM(3, 4, num_layers=2, batch_first=True), (2, 5, 3)),
    "LSTM with projection": (lambda: nn.LSTM(3, 4, proj_size=2), (5, 2, 3)),
    "LSTM without batches": (lambda: nn.LSTM(3, 4, bidirectional=True), (5, 3)),
    "GRU": (lambda: nn.GRU(3, 4, bidirectional=True), (5, 2, 3)),
    "RNN": (lambda: nn.RNN(3, 4), (5, 2, 3)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), (2, 3)),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), (2, 3)),
    "MultiheadAttention": (lambda: Itself(nn.MultiheadAttention(4, 2, batch_first=True)), (2, 5, 4)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 5, 4)),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2), (2, 5, 4),
    ),
    "TransformerDecoderLayer": (lambda: Itself(nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), 2), (2, 5, 4)),
}  # fmt: skip


class Itself(nn.Module):
    """Gives a module its input several times."""

    def __init__(self, inner: nn.Module, times: int = 3) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(*[x] * self.times)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", ["direct", "guarded"])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapted_modules_equal_local_and_show_no_trace_of_it(name: str, place: str, training: bool) -> None:
    make, shape = ADAPTED[name]
    torch.manual_seed(0)
    local = make().train(training)
    remote, x = copy.deepcopy(local), torch.randn(shape)
    worker = guarded() if place == "guarded" else hc.VirtualWorker(id="clinic")
    with torch.set_grad_enabled(training):
        torch.manual_seed(1)
        expected = first(local(x))
        torch.manual_seed(1)
        found = first(remote.send(worker)(x.send(worker)))
        assert list(remote.state_dict()) == list(local.state_dict())
        twin = copy.deepcopy(remote)
        if training:
            expected.sum().backward()
            found.sum().backward()
        torch.testing.assert_close(found.get(), expected)
        assert worker.session.failures == 0
    for model in (remote.get(), twin.get()):
        for name, p in model.named_parameters():
            assert torch.equal(p, local.get_parameter(name))
        for part, kept in zip(model.modules(), local.modules(), strict=True):
            assert set(part.__dict__) == set(kept.__dict__)
            assert not part._forward_pre_hooks
            assert not part._forward_pre_hooks_with_kwargs
            assert getattr(part, "use_nested_tensor", None) == getattr(kept, "use_nested_tensor", None)
    if training:
        assert_equal_models(remote, local, exact=False)
    again = pickle.loads(pickle.dumps(remote))
    torch.testing.assert_close(first(again.eval()(x)), first(local.eval()(x)))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch._C._get_mkldnn_enabled()


def test_a_forward_of_ones_own_stays(clinic: hc.VirtualWorker) -> None:
    model = nn.LSTM(3, 4)
    mine = model.forward
    model.forward = mine  # type: ignore[method-assign]  # as some do
    assert model.send(clinic).forward is mine
    assert model.get().forward is mine


def test_packed_sequences_and_their_limits(clinic: hc.VirtualWorker) -> None:
    torch.manual_seed(0)
    local = nn.GRU(3, 4, batch_first=True)
    remote, x = copy.deepcopy(local).send(clinic), torch.randn(2, 5, 3)
    pack = torch.nn.utils.rnn.pack_padded_sequence
    expected, last = local(pack(x, [5, 3], batch_first=True))
    found, there = remote(pack(x.send(clinic), [5, 3], batch_first=True))
    assert torch.equal(found.data.copy().get(), expected.data)
    assert torch.equal(there.get(), last)
    with pytest.raises(hc.UsageError, match="give them as a list or a local tensor"):
        pack(x.send(clinic), torch.tensor([5, 3]).send(clinic), batch_first=True)
    with pytest.raises(hc.PlaceError):
        pack(x.send(clinic), [3, 5], batch_first=True, enforce_sorted=False)
    with pytest.raises(hc.PlaceError):
        torch.nn.utils.rnn.pad_packed_sequence(found, batch_first=True)
