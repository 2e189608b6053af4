"""A worker that runs from its folder: where it listens, who may come in, what it says of itself, how it ends."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import torch
from typer.testing import CliRunner

import housecall as hc
from housecall.cli.main import app
from housecall.cli.status import read_status
from housecall.errors import IdentityError, UsageError
from housecall.host.config import Config
from housecall.identity.authority import Authority
from housecall.identity.certificate import Identity, utc_now
from housecall.identity.enrolment import EnrolmentServer
from housecall.identity.revocation import read_crl
from housecall.metrics import serve_metrics
from housecall.owner.approvals import Requests
from housecall.owner.ledger import Account
from housecall.owner.policies import POLICY_FOLDER, draft, sign
from housecall.owner.policy import Budget, Policy
from housecall.owner.signing import PUBLIC_FILE, OwnerKey
from housecall.service import STATUS_FILE, Service
from housecall.transport.grpc import Address, address, dial, is_loopback


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Config.create(tmp_path / "clinic", "clinic", "127.0.0.1:0")
    OwnerKey.create(tmp_path / "clinic")
    return tmp_path / "clinic"


@pytest.fixture
def service(folder: Path) -> Iterator[Service]:
    made = Service(folder, plaintext=True)
    yield made
    made.close(1)


def test_a_worker_of_a_folder_serves(service: Service) -> None:
    with hc.connect(f"grpc://{service.address}") as clinic:
        assert clinic.id == "clinic"
        x = torch.arange(3.0).send(clinic)
        assert torch.equal((x + 1).get(), torch.arange(3.0) + 1)
        (session,) = service.status()["sessions"]
        assert session["principal"] == "anonymous"
        assert session["slots"] >= 1
    assert service.status()["sessions"] == []


def test_what_the_owner_answers_is_in_the_ledger_though_nobody_asks(service: Service, folder: Path) -> None:
    key, gate = OwnerKey.load(folder), service.host.worker.gate
    assert gate.requests is not None
    made = gate.requests.ask("alice", "scientist", "value", ["heart"], "a" * 64, "program() {}", "why")
    Requests(folder, key.public).approve(made.id, key)
    service.notice()
    service.notice()
    (sealed,) = Account(folder).entries()
    assert sealed.entry.kind == "approval"
    assert f"request {made.id}: once until" in sealed.entry.decision


def test_a_policy_that_is_edited_closes_its_data_to_sessions_until_it_is_signed(service: Service, folder: Path) -> None:
    """From the next frame on; and they open again once the data set is looked up anew."""
    key = OwnerKey.load(folder)

    def write(policy: Policy) -> None:
        (folder / POLICY_FOLDER).mkdir(exist_ok=True)
        (folder / POLICY_FOLDER / "heart.toml").write_text(policy.text())

    service.catalogue.add("heart", {"x": torch.ones(3)})
    write(Policy.open_to("anonymous"))
    sign(folder, draft(folder, "heart", key.public), key)
    with hc.connect(f"grpc://{service.address}") as clinic:
        x = clinic.dataset("heart").column("x")
        before = x + 1
        assert before.copy().get().tolist() == [2.0] * 3
        write(msgspec.structs.replace(Policy.open_to("anonymous"), budget=Budget(epsilon=1.0)))
        for late in (x, before):
            with pytest.raises(hc.OperatorError, match="'heart' does not let 'anonymous' work on it with pointers"):
                (late * 2).get()
            with pytest.raises(hc.PolicyError, match="'heart'"):
                late.get()
        own = torch.ones(2).send(clinic)
        assert (own * 2).get().tolist() == [2.0, 2.0]  # the session goes on
        sign(folder, draft(folder, "heart", key.public), key)
        with pytest.raises(hc.OperatorError, match="work on it with pointers"):
            (x - before).get()
        again = clinic.dataset("heart").column("x")
        assert (again + x + before).get().tolist() == [4.0] * 3


def test_what_it_says_of_itself_is_read_by_the_command(service: Service, folder: Path) -> None:
    with hc.connect(f"grpc://{service.address}") as clinic:
        torch.ones(1000).send(clinic).copy().get()
        service.write_status()
        found = read_status(folder)
        assert found is not None
        assert found["worker"] == "clinic"
        shown = CliRunner().invoke(app, ["worker", "status", "--folder", str(folder)])
        assert shown.exit_code == 0
        assert "clinic" in shown.output
        assert "anonymous" in shown.output
        assert "plain text" in shown.output
        as_json = CliRunner().invoke(app, ["worker", "status", "--folder", str(folder), "--json"])
        assert json.loads(as_json.output)["counters"]["sessions"] == 1


def test_a_worker_that_does_not_run_is_said_to(folder: Path) -> None:
    shown = CliRunner().invoke(app, ["worker", "status", "--folder", str(folder)])
    assert shown.exit_code == 1
    assert "does not run" in shown.output
    (folder / STATUS_FILE).write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        read_status(folder)
    (folder / STATUS_FILE).write_text(json.dumps({"pid": 2**22 + 1}))
    assert read_status(folder) is None


def test_metrics_are_answered(service: Service) -> None:
    with hc.connect(f"grpc://{service.address}") as clinic:
        torch.ones(10).send(clinic).copy().get()
        asked = []

        def status() -> dict[str, object]:
            asked.append(True)
            return service.status()

        for port in range(20_000, 20_050):
            try:
                end = serve_metrics(status, "127.0.0.1", port)
                break
            except OSError:
                continue
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                text = answer.read().decode()
        finally:
            end()
    assert "housecall_open_sessions 1.0" in text
    assert "housecall_sessions_total 1.0" in text
    assert asked


def test_a_worker_without_keys_says_what_to_do(folder: Path) -> None:
    with pytest.raises(hc.HousecallError, match="ca join"):
        Service(folder)


def test_two_workers_on_one_port_is_an_error(service: Service, folder: Path) -> None:
    with pytest.raises(hc.HousecallError):
        Service(folder, listen=str(service.address), plaintext=True)


def test_closing_removes_what_it_said_and_refuses_what_comes(folder: Path) -> None:
    service = Service(folder, plaintext=True)
    clinic = hc.connect(f"grpc://{service.address}", patience=0.1)
    x = torch.ones(2).send(clinic)
    assert torch.equal(x.copy().get(), torch.ones(2))
    service.write_status()
    assert service.close(5)
    assert not (folder / STATUS_FILE).exists()
    with pytest.raises(hc.WorkerGone, match="clinic"):
        (x + 1).get()


@pytest.mark.parametrize(
    "url", ["clinic", "grpcs://clinic", "http://clinic:1", "grpcs://:1", "grpcs://clinic:x", "grpcs://clinic:70000"]
)
def test_addresses_that_cannot_be_meant(url: str) -> None:
    with pytest.raises(UsageError):
        address(url)


def test_addresses() -> None:
    assert address("grpcs://clinic.example:7443") == Address("clinic.example", 7443)
    assert address("grpc://[::1]:80/") == Address("::1", 80, secure=False)
    assert str(Address("::1", 80)) == "[::1]:80"
    assert [is_loopback(host) for host in ("localhost", "127.0.0.9", "::1", "10.0.0.1", "example.com")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_plain_text_has_to_be_asked_for() -> None:
    with pytest.raises(UsageError, match="plaintext=True"):
        hc.connect("grpc://10.255.255.1:7443")
    with pytest.raises(UsageError, match="shows no identity"):
        hc.connect("grpc://127.0.0.1:7443", identity="alice.pem")
    with pytest.raises(UsageError, match="needs an identity"):
        hc.connect("grpcs://127.0.0.1:7443")
    with pytest.raises(UsageError, match="credentials"):
        dial(Address("127.0.0.1", 1, secure=True), None)


# -- over mutual TLS --------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", "fed")


def secured(folder: Path, authority: Authority, *, keys: str = "identity", rest: str = "") -> Service:
    """The worker of a folder with keys of its own, in the folder that worker.toml names."""
    (folder / "worker.toml").write_text(
        f'name = "clinic"\nlisten = "127.0.0.1:0"\n{rest}\n[identity]\nfolder = "{keys}"\n'
    )
    authority.identity("clinic", "worker", ("127.0.0.1",)).save(folder / keys)
    return Service(folder)


@pytest.mark.parametrize("keys", ["identity", "elsewhere/keys"])
def test_who_is_revoked_is_cut_without_a_restart_though_idle(folder: Path, authority: Authority, keys: str) -> None:
    service = secured(folder, authority, keys=keys)
    alice, bob = (authority.identity(name, "scientist") for name in ("alice", "bob"))
    with hc.connect(f"grpcs://{service.address}", alice) as hers, hc.connect(f"grpcs://{service.address}", bob) as his:
        x, y = torch.ones(3).send(hers), torch.ones(3).send(his)
        hers.session.wait()
        authority.revoke("alice")
        shutil.copy(authority.folder / "crl.pem", folder / keys / "crl.pem")
        (seat,) = (seat for seat in service.host.seats if "alice" in seat.principal)
        with seat.changed:
            assert seat.changed.wait_for(lambda: seat.end is not None, 30)  # nothing is asked meanwhile
        with pytest.raises(hc.WorkerGone, match="no longer admits this identity: its certificate was revoked"):
            x.get()
        assert y.get().tolist() == [1.0] * 3
    with pytest.raises(hc.WorkerGone, match="revoked"):
        hc.connect(f"grpcs://{service.address}", alice)
    service.close(1)


def test_who_cannot_be_reached_over_tls_is_told_why(folder: Path, authority: Authority, tmp_path: Path) -> None:
    alice = authority.identity("alice", "scientist")
    other = Authority.create(tmp_path / "other", "other").identity("alice", "scientist")
    service = secured(folder, authority)
    port = service.address.port
    for host, identity, why in (
        ("localhost", alice, "its certificate is for other names than the one in this address: use one that"),
        ("127.0.0.1", other, "its certificate is of another authority than the identity that is shown"),
    ):
        with pytest.raises(hc.WorkerGone, match=rf"cannot be reached \({why}"):
            hc.connect(f"grpcs://{host}:{port}", identity, patience=0.1)
    service.close(1)
    plain = Service(folder, plaintext=True)
    with pytest.raises(hc.WorkerGone, match="what listens there speaks plain text"):
        hc.connect(f"grpcs://{plain.address}", alice, patience=0.1)
    plain.close(1)


def test_turns_go_on_while_a_list_is_read(folder: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading stops in the middle until this test lets it go on; so long the last list holds."""
    service = secured(folder, authority)
    alice = authority.identity("alice", "scientist")
    reading, may = threading.Event(), threading.Event()
    readers = []

    def held(pem: bytes, ca: object) -> object:
        readers.append(threading.current_thread().name)
        reading.set()
        assert may.wait(60)
        return read_crl(pem, ca)  # type: ignore[arg-type]  # it is a certificate

    monkeypatch.setattr("housecall.identity.revocation.read_crl", held)
    with hc.connect(f"grpcs://{service.address}", alice) as clinic:
        authority.revoke("alice")
        shutil.copy(authority.folder / "crl.pem", folder / "identity" / "crl.pem")
        assert reading.wait(60)
        for _ in range(3):
            assert torch.ones(2).send(clinic).add_(1).get().tolist() == [2.0, 2.0]
        with hc.connect(f"grpcs://{service.address}", alice) as another:
            assert torch.ones(2).send(another).get().tolist() == [1.0, 1.0]
        (seat,) = service.host.seats
        may.set()
        with seat.changed:
            assert seat.changed.wait_for(lambda: seat.end is not None, 60)
    assert readers == ["housecall-revocations"]
    service.close(1)


def test_limits_of_the_folder_are_the_hosts(folder: Path) -> None:
    (folder / "worker.toml").write_text(
        'name = "clinic"\nlisten = "127.0.0.1:0"\n[limits]\nsessions = 2\ninbox_mb = 8\ncall_gflop = 3\n'
    )
    service = Service(folder, plaintext=True)
    assert service.host.worker.limits.call_flops == 3 * 10**9
    assert service.host.blobs.total == 8_000_000
    url = f"grpc://{service.address}"
    with hc.connect(url), hc.connect(url), pytest.raises(hc.WorkerGone, match="holds 2 sessions of anonymous already"):
        hc.connect(url)
    service.close(1)


# -- trouble ----------------------------------------------------------------------------------------------


def test_a_status_that_cannot_be_written_is_a_line_in_the_log(
    service: Service, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beside = folder / "status.new"
    beside.symlink_to("/dev/full")  # every write says that the disk is full
    service.write_status()
    service.write_status()
    assert caplog.text.count("No space left on device") == 1
    beside.unlink()
    service.write_status()
    assert read_status(folder) is not None


def test_the_end_waits_for_what_has_come_as_long_as_the_owner_says(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("housecall.host.host.CLOSE_S", 0.01)
    (folder / "worker.toml").write_text('name = "clinic"\nlisten = "127.0.0.1:0"\ndrain_s = 0.01\n')
    service = Service(folder, plaintext=True)
    begun, may = threading.Event(), threading.Event()

    def held(message: object) -> None:
        begun.set()
        may.wait(30)

    with hc.connect(f"grpc://{service.address}") as clinic:
        clinic.session.wait()
        (seat,) = service.host.seats
        assert seat.door.meter is not None
        seat.door.meter.call = held  # type: ignore[assignment,method-assign]  # an operator that takes long
        x = torch.ones(2).send(clinic) + 1
        clinic.session.flush()
        assert begun.wait(30)
        assert not service.close()
        assert not service.ended  # `run` ends the process by force then
        assert "cut: 1 frames of anonymous were not done within 0.01 s" in caplog.text
        may.set()
        assert service.host.turns.close(30)
        del x


def test_two_workers_of_one_folder_is_an_error(service: Service, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"a worker runs in .* already"):
        Service(folder, listen="127.0.0.1:0", plaintext=True)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from housecall.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)


def broken_toml(folder: Path) -> None:
    (folder / "worker.toml").write_text("name = clinic")


def port_in_use(folder: Path) -> socket.socket:
    port = socket.create_server(("127.0.0.1", 0))
    (folder / "worker.toml").write_text(f'name = "clinic"\nlisten = "127.0.0.1:{port.getsockname()[1]}"\n')
    return port


def corrupt_certificate(folder: Path) -> None:
    path = folder / "identity" / "identity.pem"
    path.write_bytes(path.read_bytes().replace(b"MII", b"AII", 1))


def corrupt_list(folder: Path) -> None:
    (folder / "identity" / "crl.pem").write_text("none")


def open_key(folder: Path) -> None:
    (folder / "identity" / "identity.pem").chmod(0o644)


def corrupt_owner(folder: Path) -> None:
    (folder / PUBLIC_FILE).write_text("none")


def folder_instead_of_a_file(folder: Path) -> None:
    (folder / "worker.toml").unlink()
    (folder / "worker.toml").mkdir()


@pytest.mark.parametrize(
    "trouble",
    [broken_toml, port_in_use, corrupt_certificate, corrupt_list, open_key, corrupt_owner, folder_instead_of_a_file],
)
def test_ordinary_trouble_is_one_message_and_status_2(
    folder: Path, authority: Authority, trouble: Callable[[Path], socket.socket | None]
) -> None:
    (folder / "worker.toml").write_text('name = "clinic"\nlisten = "127.0.0.1:0"\n')
    authority.identity("clinic", "worker", ("127.0.0.1",)).save(folder / "identity")
    with trouble(folder) or contextlib.nullcontext():
        done = command("worker", "up", "--folder", str(folder))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("housecall:") == 1


def test_trouble_of_other_commands_is_as_clear(tmp_path: Path, folder: Path, service: Service) -> None:
    (tmp_path / "ca").write_text("a file")
    for words in (
        ("ca", "init", str(tmp_path / "ca")),
        ("ca", "list", "--ca", "/dev/null/x"),
        ("ca", "serve", str(tmp_path / "none")),
        ("ca", "renew", str(tmp_path / "none")),
        ("worker", "up", "--folder", str(folder), "--metrics", "nonsense"),
        ("worker", "init", "clinic", "--folder", "/dev/null/clinic"),
        ("worker", "status", "--folder", str(tmp_path / "none")),
    ):
        done = command(*words)
        assert done.returncode == 2, (words, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("housecall: "), done.stderr


def test_a_worker_whose_authority_cannot_be_reached_says_so(folder: Path, authority: Authority) -> None:
    service = secured(folder, authority)
    service.write_status()
    shown = CliRunner().invoke(app, ["worker", "status", "--folder", str(folder)])
    assert "nobody says where the authority is" in " ".join(shown.output.split())
    service.close(0)
    identity = authority.identity("clinic", "worker", ("127.0.0.1",), timedelta(seconds=60))
    identity.save(folder / "identity")
    with socket.create_server(("127.0.0.1", 0)) as port:
        where = f"127.0.0.1:{port.getsockname()[1]}"
    (folder / "identity" / "authority.url").write_text(where + "\n")
    service = Service(folder)
    assert service._keeper is not None
    keeper = service._keeper
    for _ in range(3000):  # the service has begun at once: of so short a life two thirds are over
        if "renew" in keeper.trouble:
            break
        threading.Event().wait(0.01)
    assert "could not renew the certificate: no answer from the authority at" in keeper.trouble
    service.write_status()
    shown = CliRunner().invoke(app, ["worker", "status", "--folder", str(folder)])
    assert "its certificate ends" in shown.output
    assert "nobody says" not in shown.output
    assert "could not renew" in " ".join(shown.output.split())
    keeper._ask_renew = lambda old, url: authority.identity("clinic", "worker", ("127.0.0.1",))
    with keeper._tending:  # once what the service began is over, it is time for another try
        keeper._renew_after = identity.not_before
    keeper.tend()
    assert "renew" not in keeper.trouble
    service.close(1)


# -- a scientist's certificate ----------------------------------------------------------------------------


def test_a_scientists_certificate_is_renewed_while_she_works(
    folder: Path, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = secured(folder, authority)
    keys = tmp_path / "alice"
    old = authority.identity("alice", "scientist", (), timedelta(seconds=100))  # two thirds are over: clocks' skew
    old.save(keys)
    monkeypatch.setattr("housecall.remote.RENEW_EVERY_S", 0.0)
    with EnrolmentServer(authority, "127.0.0.1:0") as server:
        with hc.connect(f"grpcs://{service.address}", keys) as clinic:  # there is nobody yet who could renew it
            x = torch.ones(2).send(clinic)
            assert x.copy().get().tolist() == [1.0, 1.0]
            (seat,) = service.host.seats
            assert seat.who.serial == old.serial
            (keys / "authority.url").write_text(server.address + "\n")
        with hc.connect(f"grpcs://{service.address}", keys) as clinic:
            x = torch.ones(2).send(clinic)
            for _ in range(1000):  # it works, and what is due is done beside
                assert x.copy().get().tolist() == [1.0, 1.0]
                if Identity.load(keys).serial != old.serial:
                    break
                threading.Event().wait(0.01)
            new = Identity.load(keys)
            assert new.serial != old.serial
            clinic.session.transport._give_up_link()  # type: ignore[attr-defined]  # the next stream shows it
            assert x.copy().get().tolist() == [1.0, 1.0]
            (seat,) = (one for one in service.host.seats if one.stream)
            assert seat.who.serial == new.serial
            assert seat.streams == 2
    service.close(1)


def test_a_certificate_that_has_ended_is_a_clear_error(
    folder: Path, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = secured(folder, authority)
    ended = authority.identity("alice", "scientist")
    ended.save(tmp_path / "alice")
    monkeypatch.setattr("housecall.remote.utc_now", lambda: utc_now() + timedelta(days=30))
    for given in (ended, tmp_path / "alice", tmp_path / "alice" / "identity.pem"):
        with pytest.raises(IdentityError, match=r"of scientist 'alice' ended .* ask the authority's owner"):
            hc.connect(f"grpcs://{service.address}", given)
    service.close(1)
