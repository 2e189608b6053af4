"""Attacks with pointers, as a scientist would write them in a notebook."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hostile import World, attack, named, stolen
from torch import nn

import housecall as hc


def _view(take: Callable[[Any], Any]) -> Any:
    return lambda world: stolen(world, lambda: take(world.x).get())


VIEWS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda x: x,
    "detach": lambda x: x.detach(),
    "t": lambda x: x.t(),
    "expand": lambda x: x.unsqueeze(0).expand(2, 6, 4),
    "row": lambda x: x[2],
    "element": lambda x: x[2, 1],
    "unfold": lambda x: x.unfold(0, 2, 2),
    "copy": lambda x: x.copy(),
    "clone": lambda x: x.clone(),
    "cat": lambda x: torch.cat([x, x]),
    "double": lambda x: x.double(),
    "numpy_order": lambda x: x.permute(1, 0).contiguous(),
    "sum": lambda x: x.sum(),
    "chunk": lambda x: x.chunk(2)[1],
    "where": lambda x: torch.where(x > 7010, x, -x),
}
for _name, _take in VIEWS.items():
    named(f"get_of_{_name}", _view(_take), "door", *(("labels",) if _name in ("sum", "clone") else ()))


def _written(write: Callable[[Any, Any], Any]) -> Any:
    def attack(world: World) -> Any:
        mine = world.mine()

        def take() -> Any:
            write(mine, world.x)
            return mine.get()

        return stolen(world, take)

    return attack


def _assign(mine: Any, x: Any) -> None:
    mine[:] = x


def _data(mine: Any, x: Any) -> None:
    mine.data = x


WRITES: dict[str, Callable[[Any, Any], Any]] = {
    "add_": lambda mine, x: mine.add_(x),
    "copy_": lambda mine, x: mine.copy_(x),
    "fill_": lambda mine, x: mine.fill_(x[0, 0]),
    "assignment": _assign,
    "index_put_": lambda mine, x: mine.index_put_((torch.arange(6).send(x.location),), x),
    "out": lambda mine, x: torch.add(x, x, out=mine),
    "a_view": lambda mine, x: mine.t().copy_(x.t()),
    "masked_fill_": lambda mine, x: mine.masked_fill_(x > 7010, 1.0),
    "sub_of_a_row": lambda mine, x: mine[1].sub_(x[1]),
    "foreach": lambda mine, x: torch._foreach_add_([mine], [x]),
    "data_setter": _data,
}
for _name, _write in WRITES.items():
    named(f"write_by_{_name}", _written(_write), *(("door",) if _name == "data_setter" else ("door", "write labels")))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.linear(self.norm(x))


def _trained(world: World, optimizer: Any = torch.optim.SGD, **options: Any) -> tuple[Any, Any, Any]:
    model = _Net().send(world.clinic)
    made = optimizer(model.parameters(), **(options or {"lr": 0.1, "momentum": 0.9}))
    loss = F.cross_entropy(model(world.x), world.y)
    loss.backward()
    made.step()
    return model, made, loss


@attack("door")
def attack_gradients(world: World) -> Any:
    return stolen(world, lambda: _trained(world)[0].linear.weight.grad.get())


@attack("door")
def attack_the_trained_model(world: World) -> Any:
    return stolen(world, lambda: _trained(world)[0].get().state_dict())


@attack("door")
def attack_a_trained_parameter(world: World) -> Any:
    return stolen(world, lambda: _trained(world)[0].linear.bias.data.get())


@attack("door", "unsaid writes")
def attack_batch_norm_buffers(world: World) -> Any:
    return stolen(world, lambda: _trained(world)[0].norm.running_mean.copy().get())


@attack("door")
def attack_the_momentum_buffer(world: World) -> Any:
    def take() -> Any:
        model, optimizer, _ = _trained(world)
        return optimizer.state[model.linear.weight]["momentum_buffer"].get()

    return stolen(world, take)


@attack("door")
def attack_adams_moments(world: World) -> Any:
    def take() -> Any:
        model, optimizer, _ = _trained(world, torch.optim.Adam, lr=0.1)
        return optimizer.state[model.linear.weight]["exp_avg_sq"].get()

    return stolen(world, take)


LOSS: dict[str, Callable[[Any], Any]] = {
    "get": lambda loss: loss.get(),
    "item": lambda loss: loss.item(),
    "float": lambda loss: float(loss.detach()),
    "int": lambda loss: int(loss.detach()),
    "bool": bool,
    "branch": lambda loss: 1 if loss > 0 else 2,
    "tolist": lambda loss: loss.tolist(),
    "range": lambda loss: list(range(loss.long())),
    "index": lambda loss: [1, 2, 3][(loss * 0).long()],
    "format": lambda loss: f"{loss:.3f}",
}
for _name, _read in LOSS.items():

    def _loss(world: World, read: Callable[[Any], Any] = _read) -> Any:
        return stolen(world, lambda: read(_trained(world)[2]))

    if _name == "format":
        named(f"loss_by_{_name}", _loss, because="a pointer is formatted without its value")
    else:
        named(f"loss_by_{_name}", _loss, "door")


def _saved(value: Any) -> str:
    file = io.BytesIO()
    torch.save(value, file)
    return repr(file.getvalue())


WORDS: dict[str, Callable[[Any], Any]] = {
    "print": lambda x: f"{x} {x!r} {x[0]}",
    "deepcopy": lambda x: repr(copy.deepcopy(x)),
    "numpy": lambda x: repr(x.numpy()),
    "array": lambda x: repr(x.__array__()),
    "pickle": lambda x: repr(pickle.dumps(x)),
    "save": _saved,
    "iteration": lambda x: repr([list(row) for row in x]),
    "storage": lambda x: repr(x.untyped_storage().tolist()),
    "data": lambda x: repr(x.data),
    "dlpack": lambda x: repr(torch.from_dlpack(x)),
    "state_dict": lambda x: repr(nn.ParameterDict({"x": nn.Parameter(x.clone())}).state_dict()),
}
for _name, _say in WORDS.items():

    def _said(world: World, say: Callable[[Any], Any] = _say) -> Any:
        try:
            text = stolen(world, lambda: say(world.x))
        except (RuntimeError, TypeError, AttributeError, NotImplementedError, BufferError, pickle.PicklingError):
            return None  # torch's own refusal: there are no elements here
        return text if text and ("70" in text.replace("7088", "") and "70" in _values(text)) else None

    named(f"words_by_{_name}", _said, because="a pointer has no elements: nothing is asked of the worker")


def _values(text: str) -> str:
    """What of a text could be elements: ids and times of pointers are numbers too."""
    return " ".join(word for word in text.replace(",", " ").split() if word.startswith(("70", "[70", "[[70")))


@attack("door")
def attack_moves_it_to_a_friend(world: World) -> Any:
    friend = hc.VirtualWorker(id="friend")
    return stolen(world, lambda: world.x.clone().move(friend).get())


@attack(because="a pointer cannot be sent: it has no elements to send")
def attack_sends_the_pointer(world: World) -> Any:
    friend = hc.VirtualWorker(id="friend")

    def take() -> Any:
        sent = world.x.send(friend)
        values = sent.get()
        return values if type(values) is torch.Tensor else None

    return stolen(world, take)


@attack("door")
def attack_calls_it_home_by_device(world: World) -> Any:
    return stolen(world, lambda: world.x.clone().to("cpu").tolist())


@attack("door")
def attack_compares_it_element_by_element(world: World) -> Any:
    return stolen(world, lambda: (world.x[0, 0] == 7000.0).item())


@attack("door")
def attack_a_search_by_halving(world: World) -> Any:
    """`.item()`-driven control flow: a bit each time."""

    def take() -> float:
        low, high = 0.0, 16384.0
        for _ in range(14):
            middle = (low + high) / 2
            low, high = (middle, high) if bool(world.x[0, 0] >= middle) else (low, middle)
        return low

    return stolen(world, take)


@attack("shapes")
def attack_a_shape_by_a_mask(world: World) -> Any:
    def take() -> Any:
        x = world.x
        return len(x[x > 7010])

    return stolen(world, take)


@attack(because="a session's tags are its own: the owner's data sets are looked up elsewhere")
def attack_replaces_the_data_set(world: World) -> Any:
    """Names are the owner's: a scientist's tensor with the same tag is another thing."""
    world.mine().tag("#heart")

    def take() -> Any:
        return world.clinic.dataset("heart").column("x").get()

    return stolen(world, take)


@attack("door")
def attack_a_loader(world: World) -> Any:
    loader = hc.FederatedDataLoader(world.clinic.dataset("heart"), batch_size=2)
    return stolen(world, lambda: next(iter(loader))[0].get())
