"""Attacks on what the owner says: approvals, policies, the ledger; and on who is who."""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from at_once import at_once
from hostile import HEART, World, attack, call

from housecall.errors import LedgerError, PolicyError
from housecall.owner.ledger import Entry, Ledger
from housecall.owner.policies import Policies, draft, sign
from housecall.owner.policy import Policy, Use
from housecall.owner.signing import OwnerKey
from housecall.program.call import Call, Items
from housecall.transport.arrays import share
from housecall.types import Ref
from housecall.wire.messages import Clear, Drop, Fetch, Frame, Load, Put, Request, Status
from housecall.worker.gate import Gate, Question, Who
from housecall.worker.limits import Limits
from housecall.worker.worker import Worker

X, MINE = Ref(1), Ref(5)


def _mean(world: World, *, uses: int = 1) -> str:
    """The owner lets the mean out, %10."""
    world.done(call("mean.default", X))
    return world.approved(10, uses=uses)


# -- approvals ------------------------------------------------------------------------------------------------


@attack("spend")
def attack_fetches_before_the_answer(world: World) -> Any:
    world.done(call("mean.default", X))
    world.asked(10)
    return world.taken(10)


@attack("spend")
def attack_fetches_what_was_denied(world: World) -> Any:
    world.done(call("mean.default", X))
    world.owner.deny(world.asked(10), "no")
    return world.taken(10)


@attack("uses")
def attack_uses_an_approval_twice(world: World) -> Any:
    _mean(world)
    assert world.taken(10) is not None
    return world.taken(10)


@attack("uses")
def attack_spends_one_approval_in_parallel(world: World) -> Any:
    _mean(world)
    question = Question(HEART, *next(iter(world.door.asked.values())))
    gate, out = world.worker.gate, []

    def spend() -> None:
        try:
            gate.release(world.door.who, question)
        except PolicyError:
            return
        out.append(1)

    at_once(*[spend] * 8)
    assert out
    return None if len(out) == 1 else out


def _changed(world: World, *messages: Any) -> Any:
    """A clone of the data is blanked, shown, approved; then %10 is changed."""
    world.put(5, torch.zeros(6, 4))
    world.done(call("mul.Tensor", X, 0.0), call("t.default", Ref(10), outs=(11,)))
    world.approved(10)
    world.frame(*messages)
    return world.taken(10)


@attack("key")
def attack_writes_after_the_approval(world: World) -> Any:
    return _changed(world, Call("add_.Tensor", (Ref(10), X), {}, ()))


@attack("key")
def attack_writes_a_view_after_the_approval(world: World) -> Any:
    return _changed(world, call("t.default", X, outs=(12,)), Call("copy_.default", (Ref(11), Ref(12)), {}, ()))


@attack("key")
def attack_writes_by_out_after_the_approval(world: World) -> Any:
    return _changed(world, Call("add.out", (X, X), {"out": Ref(10)}, ()))


@attack(because="writes are counted, and failures are marked: either is enough")
def attack_a_write_that_fails_halfway(world: World) -> Any:
    """Some rows are written, then an index is out of range: writes are counted, and failures marked."""
    world.put(6, torch.tensor([0, 1, 99, 0, 0, 0]))
    return _changed(world, Call("index_copy_.default", (Ref(10), 0, Ref(6), X), {}, ()))


@attack("lives")
def attack_frees_an_approved_id_and_binds_it_anew(world: World) -> Any:
    _mean(world)
    world.done(Drop((10,)), call("clone.default", X))
    return world.taken(10)


@attack("lives")
def attack_frees_an_approved_id_and_asks_again(world: World) -> Any:
    """The program that her owner reads is the same, to the letter; what she brings to it is not."""
    world.put(5, torch.zeros(6, 4))
    world.done(call("mul.Tensor", X, MINE))
    world.approved(10)
    world.done(Drop((5, 10)))
    world.put(5, torch.ones(6, 4))
    world.done(call("mul.Tensor", X, MINE))
    world.asked(10)
    return world.taken(10)


@attack("lives")
def attack_clears_and_binds_an_approved_id_anew(world: World) -> Any:
    _mean(world)
    world.done(Clear(), Load("heart", (1, 2)), call("clone.default", X))
    return world.taken(10)


@attack("spend")
def attack_an_approval_of_another_slot(world: World) -> Any:
    _mean(world)
    world.done(call("clone.default", X, outs=(12,)))
    world.asked(12)
    return world.taken(12, 1)


@attack("one answer for all")
def attack_an_approval_beside_what_it_is_for(world: World) -> Any:
    """Both in one message: what was decided for one value is no answer for another."""
    _mean(world)
    world.done(call("clone.default", X, outs=(12,)))
    reply = world.frame(Fetch((10, 12, 1)))
    values = [item for item in reply.results[0].arrays if hasattr(item, "data")]
    return None if len(values) == 1 and values[0].data.dim() == 0 else values


@attack("spend")
def attack_an_approval_in_another_session(world: World) -> Any:
    _mean(world)
    other = world.opened("mallory")
    world.done(call("clone.default", X), door=other)
    world.asked(10, door=other)
    return world.taken(10, door=other)


@attack("approval's principal")
def attack_another_principals_approval(world: World) -> Any:
    _mean(world)
    return _released(world, Who("me", "scientist"))


@attack("approval's principal")
def attack_an_approval_in_another_role(world: World) -> Any:
    _mean(world)
    return _released(world, Who("mallory", "hub"))


def _released(world: World, who: Who) -> Any:
    question = Question(HEART, *next(iter(world.door.asked.values())))
    try:
        world.worker.gate.release(who, question)
    except (PolicyError, LedgerError):
        return None
    return question


@attack("expiry")
def attack_an_expired_approval(world: World) -> Any:
    _mean(world)
    world.worker.gate._now = lambda: datetime.now(UTC) + timedelta(days=2)
    return world.taken(10)


@attack("genuine")
def attack_an_approval_signed_by_herself(world: World) -> Any:
    world.done(call("clone.default", X))
    request = world.owner.requests.get(world.asked(10))
    return _forged(world, request.id, OwnerKey.generate(), {})


def _forged(world: World, id_: str, key: OwnerKey, fields: dict[str, Any]) -> Any:
    """An approval as she would write it, laid where the owner's lie."""
    approvals, request = world.owner.requests, world.owner.requests.get(id_)
    made = approvals.approve(id_, world.owner._key)
    forged = msgspec.structs.replace(made, **fields)
    if not fields:
        forged = forged.signed(key)
    assert forged != made or fields
    approvals._shelf.write(f"approvals/{request.id}.json", msgspec.json.encode(forged))
    return world.taken(10)


@attack("genuine")
def attack_an_approval_with_its_end_moved(world: World) -> Any:
    world.done(call("clone.default", X))
    return _forged(world, world.asked(10), world.owner._key, {"expires": datetime(2999, 1, 1, tzinfo=UTC)})


@attack("genuine")
def attack_an_approval_with_more_uses(world: World) -> Any:
    world.done(call("clone.default", X))
    return _forged(world, world.asked(10), world.owner._key, {"uses": 1000})


@attack("genuine")
def attack_an_approvals_digest_edited(world: World) -> Any:
    """Approved is the mean; the file is made to say the clone."""
    world.done(call("mean.default", X, outs=(11,)), call("clone.default", X))
    mean, clone = world.asked(11), world.owner.requests.get(world.asked(10))
    made = world.owner.requests.approve(mean, world.owner._key)
    edited = msgspec.json.encode(msgspec.structs.replace(made, digest=clone.digest, shown=clone.shown))
    world.owner.requests._shelf.write(f"approvals/{mean}.json", edited)
    return world.taken(10)


@attack("uses")
def attack_an_approval_copied_under_another_name(world: World) -> Any:
    """A copy has its own count of uses."""
    request = _mean(world)
    shelf = world.owner.requests._shelf
    shelf.write("approvals/0123456789abcdef.json", shelf.read(f"approvals/{request}.json"))
    assert world.taken(10) is not None
    return world.taken(10)


@attack("request's principal")
def attack_reads_anothers_request(world: World) -> Any:
    world.done(call("mean.default", X))
    request = world.asked(10)
    reply = world.frame(Status(request), door=world.opened("me"))
    return reply.results or None


@attack("printable")
def attack_approves_by_a_reason(world: World) -> Any:
    """What she writes is read in a terminal: nothing there may rewrite a line."""
    world.done(call("mean.default", X))
    reply = world.frame(Request((10,), "fine \x1b[2K\rapproved"), Request((10,), "\u202edeworppa"), Request((10,), " "))
    return reply.results or None


# -- what the owner is shown ------------------------------------------------------------------------------------


def _shown(world: World, *ids: int) -> str:
    return world.owner.requests.get(world.asked(*ids)).program


@attack("shown by storage")
def attack_hides_a_copy_behind_a_view(world: World) -> Any:
    """The value is hers, she says; a view of it was written to."""
    world.done(
        Put(5, share(torch.zeros(6, 4))),
        call("view.default", MINE, Items((6, 4))),
        Call("copy_.default", (Ref(10), X), {}, ()),
    )
    program = _shown(world, 5)
    return None if "copy_.default" in program and "heart.x" in program else program


@attack("shown by binding")
def attack_gives_an_id_anew(world: World) -> Any:
    """What chose the records is let go, and its id given to something that looks harmless."""
    world.done(
        Put(5, share(torch.zeros(6, 4))), Call("mul.Tensor", (X, Ref(5)), {}, (10,)), Drop((5,)),
        Call("mean.default", (X,), {}, (5,)), Call("add.Tensor", (Ref(10), Ref(5)), {}, (11,)),
    )  # fmt: skip
    program = _shown(world, 11)
    return None if "mul.Tensor(heart.x, brought0)" in program else program


@attack("shown")
def attack_hides_a_copy_by_statistics(world: World) -> Any:
    world.done(Put(5, share(torch.zeros(4))), Put(6, share(torch.ones(4))))
    world.done(Call("native_batch_norm.default", (X, None, None, MINE, Ref(6), True, 1.0, 1e-5), {}, (10, 11, 12)))
    program = _shown(world, 5)
    return None if "native_batch_norm" in program and "heart.x" in program else program


@attack("forgotten")
def attack_floods_the_history(world: World) -> Any:
    """So many calls that the one which took the records is forgotten."""
    world.done(call("clone.default", X))
    for _ in range(30):
        world.done(call("neg.default", Ref(10), outs=(11,)), Drop((11,)))
    program = _shown(world, 10)
    return None if "heart.x" in program or "forgotten" in program else program


# -- policies, ledger -------------------------------------------------------------------------------------------


@attack("load")
def attack_loads_without_a_right(world: World) -> Any:
    door = world.opened("eve")
    return door.store.tensors() or None


@attack("door", "policy")
def attack_takes_after_the_right_was_withdrawn(world: World) -> Any:
    world.done(call("mean.default", X))
    world.owner.policies.register("heart", Policy.deny())
    return world.taken(10)


@attack("door")
def attack_after_the_policy_has_ended(world: World) -> Any:
    ended = Policy.open_to("mallory", expires=datetime(2020, 1, 1, tzinfo=UTC))
    world.owner.policies.register("heart", ended)
    return world.taken(1)


@attack("names of principals")
def attack_a_name_that_looks_like_a_rule(world: World) -> Any:
    world.owner.policies.register("heart", Policy(use=Use(interactive=("scientist/me", "me"))))
    doors = [world.opened(name, role) for name, role in (("*", "x"), ("scientist/me", ""), ("me\n", ""), ("", "*"))]
    return next((door.store.tensors() for door in doors if door.store.tensors()), None)


class _Full:
    """A ledger whose disk is full."""

    def entries(self) -> Any:
        return iter(())

    def append(self, entry: Any) -> Any:
        raise LedgerError("no space left on device")


@attack("ledger")
def attack_fills_the_owners_disk(world: World) -> Any:
    world.worker.gate = Gate({"heart": Policy.open_to("mallory")}, None, _Full())  # type: ignore[arg-type]
    return world.taken(1)


@attack("ledger")
def attack_a_worker_without_a_ledger(world: World) -> Any:
    world.worker.gate = Gate({"heart": Policy.open_to("mallory")})
    return world.taken(1)


@attack("written first")
def attack_leaves_no_trace(world: World) -> Any:
    """What leaves is in the ledger before: whatever way it took."""
    world.owner.policies.register("heart", Policy.open_to("mallory"))
    assert world.taken(1) is not None
    kinds = [sealed.entry.kind for sealed in world.owner.ledger.entries()]
    return None if kinds[-1] == "release" else kinds


def _folder(policies: Any) -> Any:
    """An attack on the files of a worker's folder: whether afterwards 'heart' permits her anything."""

    @functools.wraps(policies)
    def attack(world: World) -> Any:
        with TemporaryDirectory() as folder:
            key = OwnerKey.create(folder)
            return policies(Path(folder), key)

    return attack


def _signed(folder: Path, key: OwnerKey, policy: Policy, name: str = "heart") -> None:
    (folder / "policies").mkdir(exist_ok=True)
    (folder / "policies" / f"{name}.toml").write_text(policy.text())
    sign(folder, draft(folder, name, key.public), key)


def _permits(folder: Path, key: OwnerKey) -> Any:
    policy = Policies(folder, key.public).get("heart", Policy.deny())
    return policy if policy.use.interactive else None


@attack("signatures")
@_folder
def attack_an_unsigned_policy(folder: Path, key: OwnerKey) -> Any:
    (folder / "policies").mkdir()
    text = Policy.open_to("*").text()
    (folder / "policies" / "heart.toml").write_text(text)
    (folder / "policies" / "heart.signed").write_text(f"{text}# signature = {'00' * 64}\n")
    return _permits(folder, key)


@attack("signatures")
@_folder
def attack_an_edited_policy(folder: Path, key: OwnerKey) -> Any:
    _signed(folder, key, Policy())
    for kind in ("toml", "signed"):
        path = folder / "policies" / f"heart.{kind}"
        path.write_text(path.read_text().replace("interactive = []", 'interactive = ["mallory"]'))
    return _permits(folder, key)


@attack("signatures")
@_folder
def attack_a_policy_signed_by_herself(folder: Path, key: OwnerKey) -> Any:
    with TemporaryDirectory() as hers:
        mallory = OwnerKey.create(hers)
        _signed(Path(hers), mallory, Policy.open_to("*"))
        (folder / "policies").mkdir()
        for kind in ("toml", "signed"):
            (folder / "policies" / f"heart.{kind}").write_bytes(
                (Path(hers) / "policies" / f"heart.{kind}").read_bytes()
            )
    return _permits(folder, key)


@attack("signatures")
@_folder
def attack_another_data_sets_policy(folder: Path, key: OwnerKey) -> Any:
    _signed(folder, key, Policy.open_to("*"), "toys")
    for kind in ("toml", "signed"):
        (folder / "policies" / f"heart.{kind}").write_bytes((folder / "policies" / f"toys.{kind}").read_bytes())
    return _permits(folder, key)


@attack("versions")
@_folder
def attack_an_older_policy_put_back(folder: Path, key: OwnerKey) -> Any:
    _signed(folder, key, Policy.open_to("*"))
    kept = {path: path.read_bytes() for path in (folder / "policies").glob("heart.*")}
    assert _permits(folder, key)
    _signed(folder, key, Policy(version=2))
    assert _permits(folder, key) is None
    for path, data in kept.items():
        path.write_bytes(data)
    return _permits(folder, key)


@attack("chained")
@_folder
def attack_an_edited_ledger(folder: Path, key: OwnerKey) -> Any:
    """Whoever can write the folder cannot unsay what was let out."""
    with Ledger(folder) as ledger:
        for number in range(3):
            ledger.append(Entry("release", f"scientist 'mallory{number}'", ("heart",)))
    path = next(path for path in folder.rglob("*") if path.is_file() and b"mallory1" in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(b"mallory1", b"alice001"))
    try:
        with Ledger(folder) as again:
            again.verify()
    except LedgerError:
        return None
    return path


@attack("limits")
def attack_fills_the_memory(world: World) -> Any:
    """Bombs on private data: refused by their size, and the session goes on."""
    small = Worker("clinic", Limits(session_bytes=1 << 20, call_bytes=1 << 20), gate=world.owner.gate)
    small.catalogue.register("heart", {"x": world.secret, "y": world.labels})
    door = small.open("mallory")
    door.handle(Frame(1, (Load("heart", (1, 2)),)))
    calls = (
        call("expand.default", X, Items((20_000, 6, 4))),
        call("add.Tensor", Ref(10), 1.0, outs=(11,)),
        call("repeat.default", X, Items((20_000, 1)), outs=(12,)),
        call("zeros.default", Items((6, 1_000_000)), outs=(13,)),
        call("_cdist_forward.default", Ref(10), Ref(10), 2.0, None, outs=(14,)),
    )
    door.handle(Frame(2, calls))
    made = [ref for ref in (11, 12, 13, 14) if ref in door.store.tensors()]
    return made or None
