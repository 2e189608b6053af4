"""Federated data: who holds what, and batches that never mix owners."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

import housecall as hc

Schools = tuple[hc.VirtualWorker, hc.VirtualWorker]


class Squares(Dataset[Any]):
    """Sample n is ({"x": n * n, "n": n}, n)."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.tensor([float(index * index)]), "n": index}, index


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(count)).view(-1, 1), torch.arange(count))


def owners(loader: hc.FederatedDataLoader) -> list[tuple[str, list[int]]]:
    return [(target.location.id, target.copy().get().tolist()) for _, target in loader]


def test_split_evenly(schools: Schools) -> None:
    federated = numbers(11).federate(schools)
    assert len(federated) == 11
    assert federated.workers == list(schools)
    assert [len(part) for part in federated.parts] == [5, 6]
    assert torch.equal(federated["grapevine"].columns[1].copy().get(), torch.arange(5, 11))
    assert federated[schools[0]] is federated.parts[0]
    assert repr(federated) == "FederatedDataset(11 records; westside: 5, grapevine: 6)"
    with pytest.raises(KeyError, match="there are parts at: westside, grapevine"):
        federated["clinic"]


def test_split_by_owner(schools: Schools) -> None:
    federated = Squares(6).federate(schools, [[5, 0, 3], [1]])
    loader = hc.FederatedDataLoader(federated, batch_size=2)
    assert owners(loader) == [("westside", [5, 0]), ("westside", [3]), ("grapevine", [1])]


def test_batches_keep_the_structure_of_a_sample(schools: Schools) -> None:
    loader = hc.FederatedDataLoader(Squares(4).federate(schools), batch_size=2)
    inputs, target = next(iter(loader))
    assert set(inputs) == {"x", "n"}
    assert isinstance(inputs["x"], hc.PointerTensor)
    assert torch.equal(inputs["x"].copy().get(), torch.tensor([[0.0], [1.0]]))
    assert target.location is schools[0]


@pytest.mark.parametrize("count", [2, 3, 7, 64, 65])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("interleave", [False, True])
def test_every_record_once_and_never_two_owners(
    count: int, batch_size: int, drop_last: bool, shuffle: bool, interleave: bool, schools: Schools
) -> None:
    federated = numbers(count).federate(schools)
    loader = hc.FederatedDataLoader(federated, batch_size, shuffle, drop_last, interleave=interleave)
    batches = owners(loader)
    assert len(loader) == len(batches)
    held = {"westside": set(range(count // 2)), "grapevine": set(range(count // 2, count))}
    seen: list[int] = []
    for name, batch in batches:
        assert set(batch) <= held[name]
        assert 0 < len(batch) <= batch_size
        assert not drop_last or len(batch) == batch_size
        seen += batch
    assert len(seen) == len(set(seen))
    if not drop_last:
        assert set(seen) == set(range(count))
    if not shuffle and not interleave:
        assert seen == sorted(seen)


def test_shuffling_follows_the_seed(schools: Schools) -> None:
    loader = hc.FederatedDataLoader(numbers(40).federate(schools), batch_size=8, shuffle=True)
    torch.manual_seed(1)
    first, second = owners(loader), owners(loader)
    torch.manual_seed(1)
    assert owners(loader) == first
    assert first != second
    with_generator = [
        owners(hc.FederatedDataLoader(loader.dataset, 8, True, generator=torch.Generator().manual_seed(2)))
        for _ in range(2)
    ]
    assert with_generator[0] == with_generator[1]


def test_interleaving_takes_turns(schools: Schools) -> None:
    loader = hc.FederatedDataLoader(numbers(12).federate(schools), batch_size=3, interleave=True)
    assert [name for name, _ in owners(loader)] == ["westside", "grapevine"] * 2


def test_a_batch_waits_for_nothing_and_sends_no_record(schools: Schools) -> None:
    west, grape = schools
    loader = hc.FederatedDataLoader(numbers(100).federate(schools), batch_size=10, shuffle=True)
    west.session.wait()
    grape.session.wait()
    waits, sent = west.session.waits + grape.session.waits, west.session.bytes_sent
    assert sum(1 for _ in loader) == 10
    assert west.session.waits + grape.session.waits == waits
    west.session.wait()
    assert west.session.bytes_sent - sent == 50 * 8  # one permutation


def test_nothing_is_left_after_an_epoch(schools: Schools) -> None:
    federated = numbers(100).federate(schools)
    assert sum(1 for _ in hc.FederatedDataLoader(federated, batch_size=7, shuffle=True)) == 16
    gc.collect()
    assert [len(school._objects) for school in schools] == [2, 2]
    del federated
    gc.collect()
    assert [len(school._objects) for school in schools] == [0, 0]


def test_subsets_and_one_worker(clinic: hc.VirtualWorker) -> None:
    federated = Subset(numbers(10), [1, 3, 5]).federate(clinic)
    assert owners(hc.FederatedDataLoader(federated, 8)) == [("clinic", [1, 3, 5])]


BAD_SPLITS: list[tuple[str, type[Exception], Any]] = [
    ("the data set is empty", hc.DataError, lambda s: numbers(0).federate(s)),
    ("2 workers, but only 1 records", hc.DataError, lambda s: numbers(1).federate(s)),
    ("1 lists of indices for 2 workers", hc.UsageError, lambda s: numbers(4).federate(s, [[0, 1]])),
    ("no records for 'grapevine'", hc.DataError, lambda s: numbers(4).federate(s, [[0], []])),
    ("record 9 for 'grapevine' does not exist", hc.DataError, lambda s: numbers(4).federate(s, [[0], [9]])),
    ("record 1 is given to both", hc.DataError, lambda s: numbers(4).federate(s, [[0, 1], [1]])),
    ("a worker is named twice", hc.UsageError, lambda s: numbers(4).federate((s[0], s[0]))),
    ("at least one worker", hc.UsageError, lambda s: numbers(4).federate(())),
    ("expected a worker", hc.UsageError, lambda s: numbers(4).federate(("a", "b"))),
]


@pytest.mark.parametrize(("text", "kind", "act"), BAD_SPLITS, ids=[text for text, _, _ in BAD_SPLITS])
def test_bad_splits(text: str, kind: type[Exception], act: Any, schools: Schools) -> None:
    with pytest.raises(kind, match=text):
        act(schools)


def test_bad_loaders(schools: Schools) -> None:
    federated = numbers(4).federate(schools)
    with pytest.raises(hc.UsageError, match=r"call \.federate"):
        hc.FederatedDataLoader(numbers(4))
    with pytest.raises(hc.UsageError, match="expected a FederatedDataset"):
        hc.FederatedDataLoader([1, 2])
    for size in (0, -1, 2.5, True, "8"):
        with pytest.raises(hc.UsageError, match="batch_size is a whole number of at least 1"):
            hc.FederatedDataLoader(federated, batch_size=size)
    with pytest.raises(hc.UsageError, match="no option num_workers"):
        hc.FederatedDataLoader(federated, num_workers=2)


def test_records_that_cannot_be_sent(schools: Schools) -> None:
    class Words(Squares):
        def __getitem__(self, index: int) -> Any:
            return "word", index

    with pytest.raises(hc.DataError, match="a record holds a"):
        Words(4).federate(schools)
