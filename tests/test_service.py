"""A worker that runs from its folder: where it listens, who may come in, what it says of itself, how it ends."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import housecall as hc
from housecall.cli.main import app
from housecall.cli.status import read_status
from housecall.errors import UsageError
from housecall.identity.authority import Authority
from housecall.metrics import serve_metrics
from housecall.service import STATUS_FILE, Service
from housecall.transport.grpc import Address, address, dial, is_loopback
from housecall.worker.config import Config
from housecall.worker.signing import OwnerKey


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
