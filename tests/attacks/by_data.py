"""Attacks on what a name means: mocks in the place of data and data in the place of mocks, data that is replaced, and
whose records they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hostile import ASKING, SECRET, World, attack, call, named

from housecall.owned.catalogue import Catalogue
from housecall.owned.mocks import Fakes
from housecall.owner.policies import Policies, draft, sign
from housecall.owner.policy import Plans, Policy, Release, Use
from housecall.owner.signing import OwnerKey
from housecall.program.call import Call, Input, Program
from housecall.transport.arrays import share
from housecall.types import Ref, TensorType
from housecall.wire.messages import Clear, Define, Drop, Load, Mock, Mocked, Open, Put, Run, Search, Submit, Tag

X = Ref(1)


def _mocked(world: World, name: str) -> Any:
    """What comes of asking for a mock."""
    given = [result for result in world.frame(Mock(name)).results if isinstance(result, Mocked)]
    return given[0].columns[0].data if given else None


# -- mocks --------------------------------------------------------------------------------------------------------


@attack("mocks apart")
def attack_asks_for_a_mock_that_the_owner_gives_not(world: World) -> Any:
    return _mocked(world, "heart")


@attack("mocks apart")
def attack_asks_for_the_mock_of_what_she_may_not_use(world: World) -> Any:
    world.worker.catalogue.register("closed", {"x": SECRET + 1}, mock=Fakes(6))
    mock = _mocked(world, "closed")
    return mock if torch.equal(mock, SECRET + 1) else None


@attack(because="a mock has no name of its own, and names are looked up as they are")
def attack_names_of_mocks(world: World) -> Any:
    """There is no name under which a mock could be loaded, and none of data that a mock is asked by."""
    world.worker.catalogue.register("heart", {"x": SECRET, "y": world.labels}, mock=Fakes(6, y=3), replace=True)
    for name in ("heart.mock", "mock/heart", "mock", "../heart", "heart\0", "heart/../heart", "HEART", " heart"):
        world.frame(Drop((7, 8)), Load(name, (7, 8)))
        if {7, 8} & set(world.door.store.tensors()) or _mocked(world, name) is not None:
            return name
    return None


@attack("door")
def attack_takes_the_data_where_its_mock_is_free(world: World) -> Any:
    """A mock makes nothing else public: not the data, nor what has the mock's type, tag or values in it."""
    world.worker.catalogue.register("heart", {"x": SECRET, "y": world.labels}, mock=Fakes(6, y=3), replace=True)
    world.done(Clear(), Load("heart", (1, 2)), Mock("heart"), Put(5, share(_mocked(world, "heart"))))
    world.done(Tag(5, ("#heart",), "heart"), Search(("#heart",)), Call("copy_.default", (Ref(5), X), {}, ()))
    return world.taken(1, 5)


@attack(because="it is made of the schema and of what its owner states")
def attack_a_mock_is_told_by_what_the_data_holds(world: World) -> Any:
    """A mock that is made up is the same whatever the elements are."""
    worlds = World(), World(SECRET * -3, torch.zeros(6, dtype=torch.int64))
    for one in worlds:
        columns = {"x": one.secret, "y": one.labels}
        one.worker.catalogue.register("heart", columns, mock=Fakes(50, y=3), replace=True)
    return world.told(worlds, Mock("heart"), Open("heart"), Search(()))


def _files(attempt: Callable[[Path, Catalogue], Any]) -> Callable[[World], Any]:
    """An attack on a catalogue's folder, which has "heart" with a mock of as many records."""

    def attack(world: World) -> Any:
        with TemporaryDirectory() as folder:
            catalogue = Catalogue(folder)
            catalogue.add("heart", {"x": SECRET}, mock=Fakes(6))
            return attempt(Path(folder) / "data", catalogue)

    return attack


def _swapped(folder: Path, catalogue: Catalogue) -> Any:
    """By a script that mixes the files up, or somebody who may write them and not send them."""
    (mock,) = folder.glob("*.mock.safetensors")
    (data,) = set(folder.glob("*.safetensors")) - {mock}
    shutil.copy(data, mock)
    try:
        served = catalogue.mock("heart")["x"]
    except Exception:
        return None
    return served if torch.equal(served, SECRET) else None


named("the_datas_file_in_the_place_of_the_mocks", _files(_swapped), "mock's file")


# -- whose records they are -----------------------------------------------------------------------------------------


def _visits(world: World) -> None:
    columns = {"x": SECRET.clone(), "subject": torch.arange(6)}
    world.worker.catalogue.register("visits", columns, unit="person", person="subject")
    world.owner.policies.register("visits", ASKING)


@attack("withheld")
def attack_binds_one_column_more_than_is_offered(world: World) -> Any:
    _visits(world)
    world.frame(Load("visits", (11, 12)))
    return world.door.store.tensors().get(12)


@attack(because="a description has no such column to tell of")
def attack_reads_of_subjects_where_data_is_described(world: World) -> Any:
    _visits(world)
    found = repr([world.frame(Open("visits")), world.frame(Search(()))])
    return found if "subject" in found else None


# -- other data under an old name -----------------------------------------------------------------------------------


def _replaced(world: World, policy: Policy) -> None:
    """The owner puts something harmless, for everybody, in the place of the data."""
    columns = {"x": torch.zeros(6, 4), "y": torch.zeros(6, dtype=torch.int64)}
    world.worker.catalogue.register("heart", columns, replace=True)
    world.owner.policies.register("heart", policy)


@attack("replaced")
def attack_waits_for_a_weaker_policy_of_other_data(world: World) -> Any:
    world.done(call("mean.default", X))
    _replaced(world, Policy.open_to("mallory"))
    return world.taken(10, 1)


@attack("replaced")
def attack_keeps_an_approval_for_other_data(world: World) -> Any:
    world.done(call("mean.default", X))
    world.approved(10)
    _replaced(world, ASKING)
    return world.taken(10)


@attack("replaced")
def attack_asks_for_old_values_under_new_rules(world: World) -> Any:
    world.done(call("mean.default", X))
    _replaced(world, ASKING)
    try:
        world.approved(10)
    except AssertionError:  # it was refused
        return None
    return world.taken(10)


@attack("one meaning")
def attack_loads_the_new_data_to_free_the_old(world: World) -> Any:
    world.done(call("mean.default", X))
    _replaced(world, Policy.open_to("mallory"))
    world.frame(Load("heart", (21, 22)))
    return world.taken(10)


@attack("one meaning")
def attack_opens_closed_values_by_other_data(world: World) -> Any:
    """She may have the old data for programs only, and the new one for anything."""
    world.owner.policies.register("heart", Policy(use=Use(plans=("mallory",))))
    world.done(Clear(), Load("heart", (1, 2)))
    assert world.frame(call("mean.default", X)).failures
    _replaced(world, Policy.open_to("mallory"))
    world.frame(Load("heart", (21, 22)), call("mean.default", X, outs=(11,)))
    return world.door.store.tensors().get(11)


@attack("replaced")
def attack_waits_with_closed_values_for_other_data(world: World) -> Any:
    """She has not touched them before, so nothing is known of what she may do."""
    world.owner.policies.register("heart", Policy(use=Use(plans=("mallory",))))
    world.done(Clear(), Load("heart", (1, 2)))
    _replaced(world, Policy.open_to("mallory"))
    world.frame(call("mean.default", X, outs=(11,)))
    return world.door.store.tensors().get(11)


@attack("replaced")
def attack_a_name_that_is_free_again(world: World) -> Any:
    world.done(call("clone.default", X))
    world.worker.catalogue.remove("heart")
    world.owner.policies.register("heart", Policy.open_to("mallory"))
    return world.taken(10)


@attack("approved for the data")
def attack_runs_an_approved_program_on_other_data(world: World) -> Any:
    """The owner read that the old records are summed; more have come since."""
    policy = Policy(use=Use(plans=("mallory",)), plans=Plans(ask=True), release=Release(approvals=True))
    world.owner.policies.register("heart", policy)
    column = Input("x", 1, TensorType("float32", (6, 4), (4, 1)))
    program = Program((column,), (call("sum.default", X),), (("out", 10),))
    world.done(Clear(), Load("heart", (1, 2)), Define(program), Submit(program.digest, (1,), "why"))
    (asked,) = world.owner.pending()
    world.owner.approve(asked.id, uses=9, release=True)
    world.done(Run(program.digest, (1,), (20,)))
    assert world.taken(20) is not None
    _replaced(world, policy)
    world.frame(Clear(), Load("heart", (1, 2)), Run(program.digest, (1,), (21,)))
    return world.taken(21)


def _policies(attempt: Callable[[Path, OwnerKey, Catalogue], Any]) -> Callable[[World], Any]:
    """An attack on a worker's folder with an open policy for "heart": whether that opens other data of the name."""

    def attack(world: World) -> Any:
        with TemporaryDirectory() as name:
            folder, catalogue = Path(name), Catalogue(name)
            key = OwnerKey.create(folder)
            catalogue.add("heart", {"x": torch.zeros(2)})
            (folder / "policies").mkdir()
            (folder / "policies" / "heart.toml").write_text(Policy.open_to("mallory").text())
            sign(folder, draft(folder, "heart", key.public), key)
            assert Policies(folder, key.public)["heart"].use.interactive
            attempt(folder, key, catalogue)
            policy = Policies(folder, key.public).get("heart", Policy.deny())
            return policy if policy.use.interactive else None

    return attack


def _re_added(folder: Path, key: OwnerKey, catalogue: Catalogue) -> None:
    catalogue.remove("heart")
    catalogue.add("heart", {"x": SECRET})


def _put_back(folder: Path, key: OwnerKey, catalogue: Catalogue) -> None:
    signed = folder / "policies" / "heart.signed"
    kept = signed.read_bytes()
    catalogue.add("heart", {"x": SECRET}, replace=True)
    signed.write_bytes(kept)


named(
    "an_old_policy_for_replaced_data",
    _policies(lambda folder, key, catalogue: catalogue.add("heart", {"x": SECRET}, replace=True)),
    "signed for the data",
)
named("an_old_policy_for_data_of_a_name_that_was_free", _policies(_re_added), "signed for the data")
named("an_old_signature_put_back_for_replaced_data", _policies(_put_back), "versions")
