"""Kernels of torch that believe the indices they are given: they read, or write, beyond their tensors.

What they find there is anybody's: labels follow tensors, not addresses. The first two read a private element exactly
and give it as a public value, unless their indices are looked at before they run (`worker.indices`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hostile import SECRET, World, call

from housecall.program.call import Call, Items
from housecall.transport.arrays import share
from housecall.types import Ref
from housecall.wire.messages import Put


def _distance(world: World, ref: int) -> int:
    """How many float elements lie between a tensor of hers and the private column: a guess of hers, known here."""
    return int((world.door.store[1].data_ptr() - world.door.store[ref].data_ptr()) // 4)


def attack_a_target_of_ctc_loss(world: World) -> Any:
    """With one step and one target the loss is -log_probs[target]."""
    world.done(Put(5, share(torch.zeros(1, 1, 4))))
    away = _distance(world, 5)
    world.done(Put(6, share(torch.tensor([[away]]))))
    world.frame(Call("_ctc_loss.default", (Ref(5), Ref(6), Items((1,)), Items((1,))), {}, (10, 11)))
    return world.taken(10)


def attack_a_bag_of_embeddings(world: World) -> Any:
    """The gradient of a bag's weight is the dot product of a row of `grad` and a row of `weight`."""
    world.done(Put(5, share(torch.ones(1, 1))), Put(7, share(torch.ones(1, 1))))
    away = _distance(world, 7)
    world.done(Put(6, share(torch.tensor([away]))), Put(8, share(torch.tensor([0]))))
    op = "_embedding_bag_per_sample_weights_backward.default"
    world.frame(call(op, Ref(5), Ref(7), Ref(6), Ref(8), Ref(8), 0))
    return world.taken(10)


@pytest.mark.parametrize("attack", [attack_a_target_of_ctc_loss, attack_a_bag_of_embeddings])
def test_nothing_is_read_beyond_a_tensor(attack: Any) -> None:
    taken = attack(World())
    assert taken is None or not bool(torch.isin(taken.abs(), SECRET).any()), taken


def test_nothing_is_written_beyond_a_tensor() -> None:
    """`max_pool2d_with_indices_backward` adds to wherever an index points: here to a plane of another image, within
    the same tensor, so that the test itself is harmless."""
    world = World()
    world.done(
        Put(5, share(torch.ones(2, 1, 2, 2))),
        Put(6, share(torch.zeros(2, 1, 4, 4))),
        Put(7, share(_first_only())),
    )
    sizes = (Items((2, 2)), Items((2, 2)), Items((0, 0)), Items((1, 1)))
    world.frame(Call("max_pool2d_with_indices_backward.default", (Ref(5), Ref(6), *sizes, False, Ref(7)), {}, (10,)))
    given = world.taken(10)
    assert given is None or not bool(given[1].any()), given


def _first_only() -> torch.Tensor:
    """Of 16 elements in a plane, number 21: the last image's would lie beyond the tensor."""
    indices = torch.zeros(2, 1, 2, 2, dtype=torch.int64)
    indices[0] = 16 + 5
    return indices
