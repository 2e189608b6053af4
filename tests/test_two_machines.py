"""The walk through two machines, run as it is written: its commands, its script, its hosts.

Where the machine allows it, each host is a network namespace of its own, joined by a bridge; elsewhere all of them are
this machine's loopback, on ports of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "examples" / "two_machines.md"
HOSTS = ("authority.example", "clinic.example", "scientist")
BLOCK = re.compile(r'^```(bash|python|toml) title="([\w./]+)"\n(.*?)^```', re.M | re.S)
PATIENCE = 60.0


def blocks() -> list[tuple[str, str, str]]:
    """(language, title, text) of every titled block, in order."""
    return BLOCK.findall(PAGE.read_text())


def ip(*words: str) -> bool:
    tool = shutil.which("ip")
    return tool is not None and subprocess.run([tool, *words], capture_output=True, check=False).returncode == 0


class Network:
    """Three hosts: how to run on each, and the address of each."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.bridge = f"hcbr{tag}"
        self.namespaces = {host: f"hc{number}{tag}" for number, host in enumerate(HOSTS)}
        self.apart = self._made()
        if not self.apart:
            self.close()

    def _made(self) -> bool:
        made = ip("link", "add", self.bridge, "type", "bridge") and ip("link", "set", self.bridge, "up")
        for number, space in enumerate(self.namespaces.values(), start=1):
            pair = f"hv{number}{self.tag}", f"hw{number}{self.tag}"
            made = (
                made
                and ip("netns", "add", space)
                and ip("link", "add", pair[0], "type", "veth", "peer", "name", pair[1])
                and ip("link", "set", pair[1], "netns", space)
                and ip("link", "set", pair[0], "master", self.bridge)
                and ip("link", "set", pair[0], "up")
                and ip("-n", space, "addr", "add", f"10.77.31.{number}/24", "dev", pair[1])
                and ip("-n", space, "link", "set", pair[1], "up")
                and ip("-n", space, "link", "set", "lo", "up")
            )
        return made

    def address(self, host: str) -> str:
        return f"10.77.31.{HOSTS.index(host) + 1}" if self.apart else "127.0.0.1"

    def command(self, host: str, script: str) -> list[str]:
        shell = ["bash", "-euo", "pipefail", "-c", script]
        return ["ip", "netns", "exec", self.namespaces[host], *shell] if self.apart else shell

    def close(self) -> None:
        for space in self.namespaces.values():
            ip("netns", "del", space)
        ip("link", "del", self.bridge)


@contextmanager
def network(tag: str) -> Iterator[Network]:
    made = Network(tag)
    try:
        yield made
    finally:
        made.close()


class World:
    """Runs the blocks: foreground lines to their end, `&` lines until the world ends."""

    def __init__(self, net: Network, folder: Path) -> None:
        self.net, self.folder = net, folder
        self.behind: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def placed(self, text: str) -> str:
        for host in HOSTS:
            text = text.replace(host, self.net.address(host)) if "." in host else text
        return text

    def bash(self, host: str, text: str) -> str:
        said = ""
        for line in self.placed(text).replace("\\\n", " ").strip().splitlines():
            if line.endswith("&"):
                self._start(host, line.removesuffix("&"))
            else:
                said += self._run(host, line)
        return said

    def _run(self, host: str, line: str) -> str:
        done = subprocess.run(
            self.net.command(host, line), cwd=self.folder, env=self.environment, capture_output=True, text=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _start(self, host: str, line: str) -> None:
        with (self.folder / f"behind-{len(self.behind)}.log").open("wb") as log:
            command = self.net.command(host, f"exec {line}")
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)
        self.behind.append(process)
        self._await(host, 7443 if "worker up" in line else 7440)

    def _await(self, host: str, port: int) -> None:
        """Wait until something answers at a port of a host."""
        answers = f"(: </dev/tcp/{self.net.address(host)}/{port}) 2>/dev/null"
        look = f"for i in $(seq 600); do {answers} && exit 0; sleep 0.1; done; exit 1"
        done = subprocess.run(self.net.command(host, look), timeout=PATIENCE + 10, check=False)
        assert done.returncode == 0, [path.read_text() for path in self.folder.glob("behind-*.log")]

    def close(self) -> None:
        for process in reversed(self.behind):
            process.send_signal(signal.SIGINT if process is self.behind[0] else signal.SIGTERM)
            process.wait(PATIENCE)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with network(str(os.getpid() % 100_000)) as net:
        made = World(net, tmp_path)
        try:
            yield made
        finally:
            made.close()


def table(path: Path) -> None:
    rows = ["age,pressure,cholesterol,disease"]
    rows += [f"{30 + n % 40},{110 + 7 * n % 60},{180 + 13 * n % 120},{int(n % 40 > 22)}" for n in range(200)]
    path.write_text("\n".join(rows) + "\n")


def test_the_page_names_only_hosts_that_are_known() -> None:
    assert {title for language, title, _ in blocks() if language == "bash"} == set(HOSTS)


def test_two_machines(world: World) -> None:
    table(world.folder / "heart.csv")
    texts = blocks()
    (script,) = [text for language, _, text in texts if language == "python"]
    (world.folder / "train.py").write_text(world.placed(script))
    said = ""
    for language, title, text in texts:
        if language == "toml":
            (world.folder / title).write_text(text)
        if language == "bash" and "revoke" not in text:
            said += world.bash(title, text)
    columns = r"x: float32\[3\], y: int64\[\]"
    assert re.search(rf"<dataset 'heart' at clinic: 200 records of {columns} #heart, mock of 100>", said)
    assert re.search(rf"<mock of 'heart' at clinic: 100 records of {columns}; none of them is real>", said)
    (loss,) = re.findall(r"^loss ([\d.]+)$", said, re.M)
    assert float(loss) < 0.6
    status = world.bash("clinic.example", "housecall worker status --folder clinic --json")
    assert '"expired": ' not in status or '"sessions": []' in status
    (revoke,) = [text for _, _, text in texts if "revoke" in text]
    world.bash("authority.example", revoke)
    shutil.copy(world.folder / "ca" / "crl.pem", world.folder / "clinic" / "identity" / "crl.pem")  # not wait a minute
    deadline = time.monotonic() + PATIENCE
    while True:
        probe = subprocess.run(
            world.net.command("scientist", "python train.py"), cwd=world.folder, env=world.environment,
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        if probe.returncode or time.monotonic() > deadline:
            break
    assert "does not admit this identity" in probe.stderr, probe.stderr
