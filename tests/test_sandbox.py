"""The sandbox, from within: real processes enter it and then try what they should not, and what they must.

A test of a protection that this kernel does not have checks that the report says so, and is skipped with its reason.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console

import housecall as hc
from housecall.cli.status import _sandbox
from housecall.errors import UsageError
from housecall.host.config import Config, Sandbox
from housecall.sandbox import seccomp
from housecall.sandbox.environment import born_clean, kept
from housecall.sandbox.kernel import ARCHITECTURES, Architecture, architecture
from housecall.sandbox.landlock import trees
from housecall.sandbox.limits import most_memory_mb
from housecall.sandbox.report import Protection, Report
from housecall.sandbox.seccomp import Sockets
from housecall.service import _memory_mb

NAMES = ("environment", "limits", "privileges", "system calls", "files", "network")
PATIENCE = 60.0  # seconds
EPERM, EACCES, ENOSYS, EFBIG = "EPERM", "EACCES", "ENOSYS", "EFBIG"

PRELUDE = """
import ctypes, errno, fcntl, json, os, resource, signal, socket, subprocess, sys, threading
from pathlib import Path
from housecall.sandbox import environment, kernel, landlock, seccomp
from housecall.sandbox.process import Needs, enter
given = json.loads(sys.argv[1])
folder, outside = Path(given["folder"]), Path(given["outside"])
report = {}
def go(**needs):
    report["protections"] = enter(Needs(folder, **needs)).protections
def tried(work):
    try:
        said = work()
    except OSError as error:
        return errno.errorcode[error.errno]
    return str(said)
def deny(name):  # a kernel without this system call
    here = kernel.architecture()
    seccomp.install([seccomp._Step(0x20, 0), seccomp._Step(0x15, here.calls[name], 0, 1),
                     seccomp._refuse(errno.ENOSYS), seccomp._allow()])
"""
LAST = "\nprint(json.dumps({'answer': answer, **report}))"


class Place:
    """A worker's folder, a stranger's beside it, and processes that enter the sandbox of the first."""

    def __init__(self, root: Path) -> None:
        self.folder, self.outside = root / "clinic", root / "home"
        for path in (self.folder, self.outside):
            path.mkdir()
        (self.outside / "secret").write_text("the owner's diary")

    def run(self, code: str, *, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        given = json.dumps({"folder": str(self.folder), "outside": str(self.outside), **options.pop("given", {})})
        return subprocess.run(
            [sys.executable, "-c", PRELUDE + code + LAST, given],
            env=born_clean(os.environ) if env is None else env, capture_output=True, text=True, check=False,
            timeout=PATIENCE, **options,
        )  # fmt: skip

    def said(self, code: str, **options: Any) -> tuple[Any, Report]:
        """What `answer` is in the end, and what `go` reported."""
        done = self.run(code, **options)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found["answer"], Report(tuple(Protection(*one) for one in found.get("protections", ())))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def needs(report: Report, name: str) -> None:
    """Go on if a protection is in force; else it says why not, and the test is skipped for that reason."""
    protection = report[name]
    if not protection.active:
        assert protection.detail
        pytest.skip(f"{name}: {protection.detail}")


# -- what is refused --------------------------------------------------------------------------------------

# protection, what is tried, what the kernel answers; and what it answers without a sandbox, where anybody may
REFUSALS = {
    "a program": ("system calls", "subprocess.run(['/bin/true'])", EPERM, "CompletedProcess"),
    "a program in place of this one": ("system calls", "os.execv('/nowhere', ['nowhere'])", EPERM, "ENOENT"),
    "a shell": ("system calls", "os.system('exit 0')", "32512|EPERM", "0"),
    "a process": ("system calls", "os.fork() or os._exit(0)", EPERM, "[1-9]"),
    "tracing": ("system calls", "kernel.syscall('ptrace', 0, 0, 0, 0)", EPERM, "0|EPERM"),
    "others' memory": ("system calls", "kernel.syscall('process_vm_readv', os.getppid(), 0, 0, 0, 0, 0)", EPERM, "0"),
    "a namespace": ("system calls", "kernel.syscall('unshare', 0)", EPERM, "0"),
    "a mount": ("system calls", "kernel.syscall('mount', 0, 0, 0, 0, 0)", EPERM, None),
    "an io_uring": ("system calls", "kernel.syscall('io_uring_setup', 0, 0)", EPERM, None),
    "bpf": ("system calls", "kernel.syscall('bpf', 0, 0, 0)", EPERM, None),
    "keys": ("system calls", "kernel.syscall('keyctl', 0, 0, 0)", EPERM, None),
    "a new root": ("system calls", "os.chroot('.')", EPERM, None),
    "a mode": ("system calls", "(outside / 'secret').chmod(0o666)", EPERM, "None"),
    "a signal to the parent": ("system calls", "os.kill(os.getppid(), 0)", EPERM, "None"),
    "limits of the parent": ("system calls", "resource.prlimit(os.getppid(), resource.RLIMIT_CORE)", EPERM, "(.*)"),
    "reading": ("files", "(outside / 'secret').read_text()", EACCES, "the owner's diary"),
    "reading accounts": ("files", "Path('/etc/passwd').read_text()[:4]", EACCES, ".*"),
    "reading other processes": ("files", "Path('/proc/1/status').read_text()[:4]", EACCES, ".*"),
    "listing": ("files", "os.listdir(outside)", EACCES, ".'secret'."),
    "writing": ("files", "(outside / 'new').write_text('x')", EACCES, "1"),
    "appending": ("files", "os.open(outside / 'secret', os.O_WRONLY | os.O_APPEND)", EACCES, "[0-9]+"),
    "truncating": ("files", "os.truncate(outside / 'secret', 0)", EACCES, "None"),
    "removing": ("files", "os.remove(outside / 'secret')", EACCES, "None"),
    "taking": ("files", "os.rename(outside / 'secret', folder / 'taken')", "EACCES|EXDEV", "None"),
    "a hard link": ("files", "os.link(outside / 'secret', folder / 'link')", "EACCES|EXDEV", "None"),
    "a link": ("files", "os.symlink(outside / 'secret', folder / 'link')", EACCES, "None"),
    "a link that is there": ("files", "(folder / 'planted').read_text()", EACCES, "the owner's diary"),
    "a pipe for others": ("files", "os.mkfifo(folder / 'pipe')", EACCES, "None"),
    "a huge file": ("limits", "os.truncate(folder / 'mine', 5 * 10**9)", EFBIG, "None"),
    "a connection": ("network", "socket.create_connection(('127.0.0.1', given['port']))", EPERM, ".*127.0.0.1.*"),
    "a connection in a datagram": ("network", "socket.socket().sendto(b'x', 0x20000000, ('127.0.0.1', given['port']))",
                                   EPERM, "1|ENOTSUP|EOPNOTSUPP|EINPROGRESS"),
    "a datagram": ("network", "socket.socket(type=2).sendto(b'x', ('127.0.0.1', given['port']))", EPERM, "1"),
    "a service of this machine": ("network", "socket.socket(socket.AF_UNIX).connect(given['local'])", EPERM, "None"),
    "multipath TCP": ("network", "socket.socket(proto=262)", EPERM, None),
    "a raw socket": ("network", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", EPERM, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def listeners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A port and a local socket at which somebody listens."""
    local = str(tmp_path_factory.mktemp("local") / "socket")
    with socket.create_server(("127.0.0.1", 0)) as port, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(local)
        unix.listen()
        yield {"port": port.getsockname()[1], "local": local}


def attempt(work: str) -> str:
    return f"(folder / 'mine').touch()\n{{}}\nanswer = tried(lambda: {work})"


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_refused(what: str, place: Place, listeners: dict[str, Any]) -> None:
    protection, work, refusal, _ = REFUSALS[what]
    (place.folder / "planted").symlink_to(place.outside / "secret")
    answer, report = place.said(attempt(work).format("go()"), given=listeners)
    needs(report, protection)
    assert re.fullmatch(refusal, answer), answer
    assert (place.outside / "secret").read_text() == "the owner's diary"


@pytest.mark.parametrize("what", [what for what, row in REFUSALS.items() if row[3] is not None])
def test_it_is_the_sandbox_that_refuses(what: str, place: Place, listeners: dict[str, Any]) -> None:
    _, work, refusal, free = REFUSALS[what]
    (place.folder / "planted").symlink_to(place.outside / "secret")
    answer, _ = place.said(attempt(work).format("pass"), given=listeners)
    assert re.match(str(free), answer), answer
    assert free == "0|EPERM" or not re.fullmatch(refusal, answer)  # tracing is refused in some containers, too


def test_text_cannot_be_typed_for_whoever_reads_the_terminal_next(place: Place) -> None:
    code = """
one, other = os.openpty()
go()
answer = [tried(lambda: fcntl.ioctl(other, request, b"x")) for request in (0x5412, 0x541C)]
answer.append(len(fcntl.ioctl(other, 0x5413, bytes(8))))
"""
    answer, report = place.said(code)
    needs(report, "system calls")
    assert answer == [EPERM, EPERM, 8]


def test_limits_stay(place: Place) -> None:
    code = """
go()
def more(name):
    try:
        resource.setrlimit(getattr(resource, name), (10**10, 10**10))
    except ValueError as error:
        return resource.getrlimit(getattr(resource, name))
answer = [more("RLIMIT_CORE"), more("RLIMIT_FSIZE")]
"""
    answer, report = place.said(code)
    needs(report, "limits")
    assert answer == [[0, 0], [4 * 10**9] * 2]


def test_memory_is_bounded(place: Place) -> None:
    code = """
go(memory_mb=300)
try:
    answer = len(bytearray(10**9))
except MemoryError:
    answer = "no memory"
"""
    answer, report = place.said(code)
    needs(report, "limits")
    assert answer == "no memory"
    assert "300 MB of memory" in report["limits"].detail
    assert "unbounded" in place.said("go(); answer = len(bytearray(10**9))")[1]["limits"].detail


def test_what_signs_for_the_owner_is_not_read(place: Place) -> None:
    code = """
(folder / "ledger").mkdir()
for name in ("owner.key", "owner.pub", "ledger/1.jsonl"):
    (folder / name).write_text(name)
go(secrets=(folder / "owner.key",))
def made():
    (folder / "draft").write_text("x")
    (folder / "draft").rename(folder / "status.json")
    (folder / "ledger" / "2.jsonl").write_text("y")
    return (folder / "ledger" / "2.jsonl").read_text()
answer = [tried(lambda: (folder / name).read_text()) for name in ("owner.key", "owner.pub", "ledger/1.jsonl")]
answer += [tried(made), tried(lambda: (folder / "owner.key").rename(folder / "ledger" / "key"))]
"""
    answer, report = place.said(code)
    needs(report, "files")
    assert answer[:4] == [EACCES, "owner.pub", "ledger/1.jsonl", "y"]
    assert answer[4] in (EACCES, "EXDEV")  # into a folder that may be read
    assert "owner.key not readable" in report["files"].detail


def test_a_bound_of_most_is_below_what_the_machine_has() -> None:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_000_000
    assert 0 < most_memory_mb() <= there * 9 // 10
    config = Config.parse('name = "clinic"')
    assert _memory_mb(config) == most_memory_mb()
    assert _memory_mb(msgspec.structs.replace(config, device="cuda:0")) == 0
    assert _memory_mb(Config.parse('name = "clinic"\n[sandbox]\nmemory_mb = 700')) == 700


def test_another_user_program_can_not_look_in(place: Place) -> None:
    code = "go(); answer = [ctypes.CDLL(None).prctl(option, 0, 0, 0, 0) for option in (3, 39)]"
    answer, report = place.said(
        code + "; answer.append(Path('/proc/self/status').read_text().split('CapEff:')[1].split()[0])"
    )
    needs(report, "privileges")
    assert answer == [0, 1, "0" * 16]  # dumpable, no_new_privs, capabilities


# -- the network of a worker that has an authority ---------------------------------------------------------


def test_a_worker_reaches_its_authority_and_nobody_else(place: Place, listeners: dict[str, Any]) -> None:
    code = """
go(authority=f"127.0.0.1:{given['port']}", ports=(0,))
def to(port):
    socket.create_connection(("127.0.0.1", port)).close()
answer = [tried(lambda: to(given["port"])), tried(lambda: to(given["other"])),
          tried(lambda: socket.socket(type=socket.SOCK_DGRAM)), tried(lambda: socket.socket(socket.AF_UNIX))]
"""
    with socket.create_server(("127.0.0.1", 0)) as other:
        answer, report = place.said(code, given={**listeners, "other": other.getsockname()[1]})
    needs(report, "network")
    assert answer == ["None", EACCES, EPERM, EPERM]
    assert f"connects to port {listeners['port']} only" in report["network"].detail


def test_a_name_has_to_be_looked_up(place: Place) -> None:
    code = "go(authority='authority.example:7440'); answer = tried(lambda: socket.socket(type=socket.SOCK_DGRAM))"
    answer, report = place.said(code)
    assert answer.startswith("<socket")
    assert not report["network"].active or "looks up names" in report["network"].detail


def test_a_worker_listens_where_it_said_and_nowhere_else(place: Place) -> None:
    code = """
go(ports=(given["port"],))
def at(port):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
answer = [tried(lambda: at(given["port"])), tried(lambda: at(given["port"] + 1))]
"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answer, report = place.said(code, given={"port": port})
    needs(report, "files")
    if "Landlock 1" in report["files"].detail or "Landlock 2" in report["files"].detail:
        pytest.skip("this kernel's Landlock knows no ports")
    assert answer == ["None", EACCES]


def test_an_open_network_is_reported_as_such(place: Place, listeners: dict[str, Any]) -> None:
    code = "go(network=False); answer = str(socket.create_connection(('127.0.0.1', given['port'])))"
    answer, report = place.said(code, given=listeners)
    assert "127.0.0.1" in answer
    assert report["network"] == Protection(
        "network", False, 'unrestricted, as worker.toml says (sandbox.network = "open")'
    )


# -- what a process is born with --------------------------------------------------------------------------

SEARCH = """
first, last = given["halves"]
def found():
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, rights = line.split()[:2]
            start, end = (int(one, 16) for one in span.split("-"))
            if rights[:2] != "rw":
                continue
            memory.seek(start)
            try:
                data = memory.read(end - start)
            except OSError:
                continue
            at = data.find(first.encode())
            while at >= 0:
                if data[at + len(first) : at + len(first) + len(last)] == last.encode():
                    return True
                at = data.find(first.encode(), at + 1)
    return False
"""


def test_secrets_of_the_environment_are_nowhere_in_memory(place: Place) -> None:
    """Whoever started the worker had a token. It is searched for in two halves: nothing here holds the whole."""
    halves = secrets.token_hex(8), secrets.token_hex(8)
    env = {**os.environ, "CLOUD_TOKEN": "".join(halves), "PASSWORD": "".join(halves)}
    code = SEARCH + "{}\ngo()\nanswer = [found(), sorted(os.environ), Path('/proc/self/environ').read_text()]"
    given = {"halves": halves}
    answer, report = place.said(code.replace("{}", "environment.begin_again()"), env=env, given=given)
    needs(report, "environment")
    assert answer[0] is False
    assert not {"CLOUD_TOKEN", "PASSWORD"} & set(answer[1])
    assert "PASSWORD" not in answer[2]

    answer, report = place.said(code.replace("{}", ""), env=env, given=given)  # as if it could not begin again
    assert answer[0] is True
    assert not {"CLOUD_TOKEN", "PASSWORD"} & set(answer[1])
    assert not report["environment"].active
    assert "too late to leave memory" in report["environment"].detail
    assert "".join(halves) not in report["environment"].detail


def test_what_is_kept_of_the_environment() -> None:
    given = {"PATH": "/bin", "LC_ALL": "C", "AWS_SECRET_ACCESS_KEY": "x", "GITHUB_TOKEN": "x", "https_proxy": "u:p@h"}
    assert kept(given) == {"PATH": "/bin", "LC_ALL": "C"}
    assert kept(born_clean(given)) == born_clean(given)


def test_it_begins_again_once(place: Place) -> None:
    """Even if it is not clean then."""
    code = "environment.born_clean = dict\nenvironment.begin_again()\ngo()\nanswer = 'AGAIN' in ''.join(os.environ)"
    answer, report = place.said(code, env={**os.environ, "PASSWORD": "x"})
    assert answer is False
    assert not report["environment"].active


def test_inherited_files_are_closed_and_nothing_is_read_from_outside(place: Place) -> None:
    reading, writing = os.pipe()
    code = """
go()
answer = [tried(lambda: os.write(given["pipe"], b"x")), sys.stdin.read(), os.getcwd() == str(folder), oct(os.umask(0))]
"""
    try:
        answer, report = place.said(
            code, given={"pipe": writing}, pass_fds=(writing,), input="typed", cwd=place.outside
        )
    finally:
        os.close(reading)
        os.close(writing)
    needs(report, "environment")
    assert answer == ["EBADF", "", True, "0o77"]


@pytest.mark.parametrize("sandboxed", [True, False])
def test_nothing_is_imported_from_where_it_was_started(place: Place, sandboxed: bool) -> None:
    (place.outside / "evil.py").write_text("")
    code = "try:\n    import evil\n    answer = 'imported'\nexcept ImportError:\n    answer = 'not found'"
    answer, _ = place.said("go()\n" * sandboxed + code, cwd=place.outside)
    assert answer == ("not found" if sandboxed else "imported")


# -- what must go on --------------------------------------------------------------------------------------

WORK = """
go()
import time, zoneinfo
import numpy, torch
torch.set_num_threads(2)
x = torch.randn(2, 3, 16, 16, requires_grad=True)
torch.nn.functional.conv2d(x, torch.randn(4, 3, 3, 3)).square().mean().backward()
import torch._dynamo, torch._refs, torch._decomp, torch.func  # imported on first use, as are the meta kernels below
torch.ops.aten.linalg_vector_norm(torch.ones(3, device="meta"))
torch.linalg.svd(torch.randn(20, 20)); torch.fft.fft(torch.randn(64)); torch.ones(600, 600) @ torch.ones(600, 600)
numpy.linalg.inv(numpy.eye(50))
(folder / "data").mkdir()
from safetensors.torch import load_file, save_file
save_file({"x": torch.arange(3.0)}, folder / "data" / "x.safetensors")
(folder / "new").write_text("1"); (folder / "new").replace(folder / "status.json")
with open(folder / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX); os.fsync(lock.fileno()); os.fchmod(lock.fileno(), 0o600)
ran = []
thread = threading.Thread(target=lambda: ran.append(tried(lambda: (outside / "secret").read_text()))); thread.start()
thread.join()
answer = [x.grad.shape, load_file(folder / "data" / "x.safetensors")["x"].tolist(), os.urandom(2) != b"", *ran,
          tried(lambda: os.kill(os.getpid(), 0)), os.cpu_count() > 0, len(os.listdir("/proc/self/task")) > 1]
"""


def test_work_goes_on(place: Place) -> None:
    answer, report = place.said(WORK)
    refused = EACCES if report["files"].active else "the owner's diary"
    assert answer == [[2, 3, 16, 16], [0.0, 1.0, 2.0], True, refused, "None", True, True]


def test_work_goes_on_for_a_user_without_rights(place: Place) -> None:
    """Undumpable processes may not look into their own /proc as others may."""
    if os.geteuid():
        pytest.skip("every other test here is one")
    for path in (place.folder, *place.folder.parents[:3]):
        path.chmod(0o755)
    os.chown(place.folder, 65534, 65534)
    try:
        done = place.run("answer = 0", user=65534, group=65534, extra_groups=[])
        if done.returncode:
            pytest.skip("another user cannot run this Python")
        answer, report = place.said(WORK, user=65534, group=65534, extra_groups=[])
    except PermissionError as error:
        pytest.skip(f"another user cannot run this Python: {error}")
    assert answer[1] == [0.0, 1.0, 2.0]
    assert report["environment"].active
    assert report["privileges"].active


def test_a_cluster_computes_in_its_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_TOKEN", "a secret")
    with hc.LocalCluster(1) as cluster:
        (worker,) = cluster
        model = torch.nn.Linear(3, 2).send(worker)
        model(torch.randn(4, 3).send(worker)).square().sum().backward()
        assert torch.isfinite(model.get().weight.grad).all()
        found = json.loads((cluster.folder / "worker-1" / "status.json").read_text())["sandbox"]
        log = cluster.log("worker-1")
        born = Path(f"/proc/{worker.pid}/environ")
        assert not os.access(born, os.R_OK) or "CLOUD_TOKEN" not in born.read_text()
    assert tuple(one["name"] for one in found) == NAMES
    for one in found:
        line = f"sandbox: {one['name']}: {one['detail']}" if one["active"] else f"{one['name']} NOT IN FORCE"
        assert line in log
    assert {one["name"] for one in found if one["active"]} >= {"environment", "limits", "privileges"}


# -- kernels that lack something --------------------------------------------------------------------------

SERVICE = (
    "from housecall import service\n{}\nanswer = service.main([str(folder), '--listen', '127.0.0.1:0', '--plaintext'])"
)


@pytest.fixture
def seccomp_is_here(place: Place) -> None:
    """A kernel that can pretend to lack a system call."""
    if place.run("deny('bpf'); answer = 0").returncode:
        pytest.skip("this kernel has no seccomp filters")


@pytest.mark.parametrize("authority", ["", "127.0.0.1:7440", "authority.example:7440"])
def test_what_the_kernel_has_is_in_force(place: Place, authority: str) -> None:
    """Else a mistake of ours would make the tests above skip."""
    code = """
try:
    version = landlock.version()
except OSError:
    version = 0
answer = [version, "Seccomp:" in Path("/proc/self/status").read_text() and kernel.architecture() is not None]
go(authority=given["authority"])
"""
    (version, filters), report = place.said(code, given={"authority": authority})
    expected = {"environment", "limits", "privileges", *["system calls"] * filters, *["files"] * (version >= 1)}
    network = filters and (not authority or version >= 4)
    assert {one.name for one in report.protections if one.active} == {*expected, *["network"] * network}
    assert tuple(one.name for one in report.protections) == NAMES


@pytest.mark.usefixtures("seccomp_is_here")
@pytest.mark.parametrize(
    ("absent", "missing", "why"),
    [
        ("landlock_create_ruleset", {"files"}, "the kernel has no Landlock: Function not implemented (ENOSYS)"),
        ("landlock_restrict_self", {"files"}, "Landlock: Function not implemented (ENOSYS)"),
        ("seccomp", {"system calls", "network"}, "seccomp: Function not implemented (ENOSYS)"),
        ("capget", {"privileges"}, "Function not implemented (ENOSYS)"),
    ],
)
def test_what_the_kernel_lacks_is_said(absent: str, missing: set[str], why: str, place: Place) -> None:
    answer, report = place.said(f"deny({absent!r})\ngo()\nanswer = 'goes on'")
    assert answer == "goes on"
    assert {one.name for one in report.missing} >= missing
    assert any(why in one.detail for one in report.missing), report
    if absent in ("seccomp", "capget"):
        assert {one.name for one in report.missing} == missing or not report["files"].active


@pytest.mark.usefixtures("seccomp_is_here")
def test_without_landlock_an_authority_opens_the_network(place: Place) -> None:
    _, report = place.said("deny('landlock_create_ruleset')\ngo(authority='127.0.0.1:1')\nanswer = 0")
    assert not report["network"].active
    assert "Landlock" in report["network"].detail


@pytest.mark.usefixtures("seccomp_is_here")
def test_strict_does_not_start_without(place: Place) -> None:
    settings = {"name": "clinic", "sandbox": {"strict": True}}
    (place.folder / "worker.toml").write_text(toml(settings))
    done = place.run(SERVICE.format("deny('landlock_create_ruleset')"))
    assert json.loads(done.stdout)["answer"] == 2
    assert "sandbox.strict = true, and these protections are not in force: files (the kernel has no Land" in done.stderr
    assert "WARNING sandbox: files NOT IN FORCE" in done.stderr


def toml(settings: dict[str, Any]) -> str:
    lines = [f"name = {json.dumps(settings['name'])}", "[sandbox]"]
    return "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in settings["sandbox"].items())])


def test_threads_that_ran_before_are_said(place: Place) -> None:
    code = """
stop, forked = threading.Event(), []
thread = threading.Thread(target=lambda: stop.wait() and forked.append(tried(lambda: os.fork() or os._exit(0))))
thread.start()
go()
stop.set(); thread.join()
answer = [tried(lambda: (outside / "secret").read_text()), *forked]
"""
    (answer, forked), report = place.said(code)
    assert not report["files"].active
    assert not report["system calls"].active or forked == EPERM  # a filter is for every thread
    assert answer in (EACCES, "the owner's diary")
    if answer == EACCES:
        assert "2 threads ran already" in report["files"].detail


def test_a_report_demands_what_is_missing() -> None:
    whole = Report((Protection("files", True, "closed"),))
    whole.demand()
    with pytest.raises(UsageError, match=r"not in force: network \(no kernel\)"):
        Report((*whole.protections, Protection("network", False, "no kernel"))).demand()
    with pytest.raises(KeyError):
        whole["network"]


def test_a_report_is_logged_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    report = Report((Protection("files", True, "closed"), Protection("network", False, "[no] kernel")))
    with caplog.at_level(logging.INFO):
        report.log(logging.getLogger("test"))
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "sandbox: files: closed"),
        ("WARNING", "sandbox: network NOT IN FORCE: [no] kernel"),
    ]
    console = Console(width=200)
    with console.capture() as shown:
        for line in _sandbox([one._asdict() for one in report.protections]):
            console.print(line)
        for line in _sandbox([]):
            console.print(line)
    assert shown.get() == (
        "sandbox: files\nnot in force: network: [no] kernel\n"
        "sandbox: none, it was not started by `housecall worker up`\n"
    )


def test_the_settings() -> None:
    assert Config.parse('name = "clinic"').sandbox == Sandbox(strict=False, memory_mb="most", network="listen")
    with pytest.raises(UsageError, match=r"sandbox\.network"):
        Config.parse('name = "clinic"\n[sandbox]\nnetwork = "none"')


# -- the filter, on a machine of its own ------------------------------------------------------------------

ALLOW, KILL = 0x7FFF0000, 0x80000000


def verdict(steps: list[Any], audit: int, number: int, *arguments: int) -> int | str:
    """What a filter answers: an interpreter of the part of BPF that it uses."""
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, audit, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    at = accumulator = 0
    for _ in range(len(steps)):
        code, value, then, otherwise = steps[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, value)
            case 0x54:
                accumulator &= value
            case 0x06:
                return errno.errorcode[value & 0xFFFF] if value & 0xFFFF0000 == 0x00050000 else value
            case 0x15 | 0x35 | 0x45:
                holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
                at += then if holds else otherwise
            case _:
                raise AssertionError(f"no instruction {code:#x}")
    raise AssertionError("a program that does not end")


@pytest.mark.parametrize("machine", ARCHITECTURES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("sockets", [None, Sockets(), Sockets(True), Sockets(True, True), Sockets(packets=True)])
def test_the_filter(machine: Architecture, sockets: Sockets | None) -> None:
    steps = seccomp.program(machine, 77, sockets)
    assert len(steps) <= 4096
    assert all(step.then < 256 and step.otherwise < 256 for step in steps)

    def asked(name: str, *arguments: int) -> int | str:
        return verdict(steps, machine.audit, machine.calls[name], *arguments)

    assert {asked(name) for name in seccomp.REFUSED if name in machine.calls} == {EPERM}
    assert asked("clone3") == ENOSYS
    assert (asked("clone", 0x3D0F00), asked("clone", 17), asked("clone", 0x4111)) == (ALLOW, EPERM, EPERM)
    for name in ("kill", "tgkill"):
        assert (asked(name, 77), asked(name, 1), asked(name, 0), asked(name, (1 << 64) - 1)) == (ALLOW, *[EPERM] * 3)
    assert (asked("prlimit64", 0), asked("prlimit64", 5)) == (ALLOW, EPERM)
    assert asked("ioctl", 0, 0x5412) == asked("ioctl", 0, 0x541C) == asked("ioctl", 0, 0xFFFFFFFF00005412) == EPERM
    assert asked("ioctl", 0, 0x5413) == ALLOW
    for name in ("read", "write", "mmap", "futex", "accept4"):
        assert name not in machine.calls
    assert verdict(steps, machine.audit, 280 if machine.name == "x86_64" else 88) == ALLOW  # utimensat: any other
    assert verdict(steps, machine.audit ^ 1, 0) == KILL
    assert verdict(steps, 0x40000003, 11) == KILL  # i386's execve
    if machine.name == "x86_64":
        assert verdict(steps, machine.audit, 0x40000000 | 520) == ENOSYS  # x32's execve

    restricted = sockets is not None
    connects, looks_up, packets = (True, True, True) if sockets is None else sockets
    assert asked("connect") == (ALLOW if connects else EPERM)
    for family in (2, 10):
        for flags in (0, 0o2000000, 0o4000):
            assert asked("socket", family, 1 | flags, 0) == asked("socket", family, 1 | flags, 6) == ALLOW
            assert asked("socket", family, 2 | flags, 0) == (ALLOW if looks_up else EPERM)
            assert asked("socket", family, 2 | flags, 17) == (ALLOW if looks_up else EPERM)
        for kind, protocol in ((1, 262), (1, 132), (1, 17), (2, 136), (2, 6), (3, 255), (5, 132), (6, 33)):
            assert asked("socket", family, kind, protocol) == (EPERM if restricted else ALLOW), (kind, protocol)
    assert asked("socket", 16, 3, 0) == ALLOW
    assert asked("socket", 1, 5, 0) == (ALLOW if packets else EPERM)
    for family, kind, protocol in ((1, 1, 0), (17, 3, 0), (16, 3, 9), (38, 5, 0), (40, 1, 0), (43, 1, 0), (44, 3, 0)):
        assert asked("socket", family, kind, protocol) == (EPERM if restricted else ALLOW), family
    fast_open = EPERM if restricted else ALLOW
    assert asked("sendto", 0, 0, 0, 0x20000000) == asked("sendmsg", 0, 0, 0x20004000) == fast_open
    assert asked("sendmmsg", 0, 0, 0, 0x20000000) == fast_open
    assert asked("sendto", 0, 0, 0, 0x4000) == asked("sendmsg", 0, 0, 0x4000) == ALLOW


def test_the_list_is_not_shorter_than_it_was_meant() -> None:
    """What root may do is refused twice, here and for want of capabilities: no attempt above would notice."""
    assert set(seccomp.REFUSED) >= {
        "acct", "add_key", "bpf", "chmod", "chown", "chroot", "fchmodat", "fchmodat2", "fchown", "fchownat", "lchown",
        "setxattr", "delete_module", "execve", "execveat", "finit_module", "fork", "fsconfig",
        "fsmount", "fsopen", "init_module", "io_uring_enter", "io_uring_register", "io_uring_setup", "kexec_file_load",
        "kexec_load", "keyctl", "mount", "mount_setattr", "move_mount", "open_by_handle_at", "open_tree",
        "perf_event_open", "pidfd_getfd", "pidfd_send_signal", "pivot_root", "process_madvise", "process_vm_readv",
        "process_vm_writev", "ptrace", "reboot", "request_key", "setns", "setuid", "swapoff", "swapon", "umount2",
        "unshare", "userfaultfd", "vfork",
    }  # fmt: skip


def test_every_refused_call_has_a_number() -> None:
    x86, arm = (set(machine.calls) for machine in ARCHITECTURES)
    assert set(seccomp.REFUSED) <= x86 | arm
    assert x86 - arm == {"chmod", "chown", "fork", "iopl", "ioperm", "lchown", "modify_ldt", "vfork"}  # of x86 alone
    assert arm <= x86
    for machine in ARCHITECTURES:
        assert len(set(machine.calls.values())) == len(machine.calls)


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("x86_64", "/usr/include/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_the_numbers_are_the_kernels_own(machine: str, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"no {header} here")
    theirs = dict(re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", Path(header).read_text(), re.M))
    ours = next(known for known in ARCHITECTURES if known.name == machine)
    compared = {name: number for name, number in ours.calls.items() if name in theirs}
    assert len(compared) > 80
    assert compared == {name: int(theirs[name]) for name in compared}


def test_this_machine_is_known() -> None:
    assert (architecture() is not None) == (os.uname().machine in ("x86_64", "aarch64"))


def test_trees_within_trees_need_no_rule(tmp_path: Path) -> None:
    for name in ("a/b/c", "ab"):
        (tmp_path / name).mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a")
    given = [tmp_path / name for name in ("a/b", "a", "ab", "gone", "link", "a/b/c")]
    assert trees(given) == (tmp_path / "a", tmp_path / "ab")
    shutil.rmtree(tmp_path / "a")
    assert trees(given) == (tmp_path / "ab",)
