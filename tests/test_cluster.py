"""The folders of clusters: each goes with its cluster, at the latest when the next one starts, and no other goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import housecall as hc
from housecall.cluster import OWNER, PREFIX, _hold, _sweep

HELD = """
import sys, time
from pathlib import Path
from housecall.cluster import _hold
folder = Path(sys.argv[1])
folder.mkdir()
handle = _hold(folder)
print("held", flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path: Path) -> None:
    left, other = tmp_path / f"{PREFIX}left", tmp_path / "housecall-other"
    process = subprocess.Popen([sys.executable, "-c", HELD, str(left)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    mine, young, elsewhere = tmp_path / f"{PREFIX}mine", tmp_path / f"{PREFIX}young", tmp_path / "elsewhere"
    for folder in (mine, young, elsewhere, other):
        folder.mkdir()
    handle = _hold(mine)
    (elsewhere / OWNER).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    _sweep(tmp_path)
    assert left.exists()  # its process lives
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    _sweep(tmp_path)
    assert not left.exists()
    assert all(folder.exists() for folder in (mine, young, elsewhere, other))
    os.close(handle)
    _sweep(tmp_path)
    assert not mine.exists()


def test_a_folder_of_another_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"{PREFIX}theirs"
    folder.mkdir()
    os.close(_hold(folder))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    _sweep(tmp_path)
    assert folder.exists()


def test_clusters_sweep_when_they_start() -> None:
    """In a place of its own, by a process of its own: `tempfile` remembers where that is."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / f"{PREFIX}left"
        folder.mkdir()
        os.close(_hold(folder))
        code = "import housecall as hc\nwith hc.LocalCluster(1) as cluster: print(cluster.folder)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TMPDIR": place},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith(place)
        assert list(Path(place).glob(f"{PREFIX}*")) == []


def test_data_is_added_and_removed_while_a_worker_runs() -> None:
    x = torch.arange(3.0)
    with hc.LocalCluster(("clinic",)) as (clinic,):
        clinic.add("heart", x=x, policy=hc.Policy.open_to("*"))
        doubled = clinic.dataset("heart").column("x") * 2
        assert torch.equal(doubled.copy().get(), x * 2)
        clinic.remove("heart")
        assert clinic.search() == []
        with pytest.raises(hc.PolicyError, match="data set 'heart' was removed or replaced"):
            doubled.get()
        with pytest.raises(hc.DataError, match="no data set 'heart'"):
            clinic.remove("heart")
        clinic.clear()
        clinic.add("heart", x=x)  # its rules do not come back with the name
        with pytest.raises(hc.OperatorError, match="'heart' does not let"):
            clinic.dataset("heart").column("x").sum().get()


@pytest.mark.slow
def test_two_gigabytes_go_there_and_back() -> None:
    x = torch.arange(2**29, dtype=torch.float32)
    with hc.LocalCluster(1) as (worker,):
        assert torch.equal(hc.send(x, worker).get(), x)
