"""`housecall demo` as its users type it; on digits that need no download."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digits import Digits
from safetensors.torch import load_file

from housecall.cli import _schools
from housecall.cli.main import main

HERE = Path(__file__).parent


@pytest.fixture
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_schools, "MNIST", Digits)


def demo(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["housecall", "demo", *words])
    with pytest.raises(SystemExit) as leaving:
        main()
    return int(leaving.value.code or 0)


@pytest.mark.usefixtures("_digits")
def test_a_run_learns_and_leaves_everything_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert demo(monkeypatch, "--epochs", "4", "--out", str(out), "--data", str(tmp_path)) == 0
    text = capsys.readouterr().out
    record = json.loads((out / "run.json").read_text())
    assert record["schools"] == {"westside": 160, "grapevine": 160}
    assert record["accuracy"] == max(test["accuracy"] for test in record["tests"]) > 0.95
    assert [test["after"] for test in record["tests"]] == ["westside", "grapevine"] * 4
    assert record["visits"] == 24
    # One wait for each visit of the model, one for each loss that is looked at, one where the optimizer's state
    # moves to the other school, and two for the data.
    assert record["waits"] == 24 + len(record["losses"]) + 7 + 2
    assert f"Test accuracy {record['accuracy']:.2%}" in text
    assert "What did not" in text
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    net = _schools.Net()
    net.load_state_dict(load_file(out / "model.safetensors"))
    images = torch.stack([torch.tensor(x) for x in Digits("", train=False).data.numpy()]).unsqueeze(1) / 255 - 0.1307
    predicted = net(images / 0.3081).argmax(1)
    assert (predicted == Digits("", train=False).targets).float().mean().item() == pytest.approx(record["accuracy"])


@pytest.mark.usefixtures("_digits")
def test_the_same_seed_gives_the_same_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = []
    for name in ("a", "b"):
        assert demo(monkeypatch, "--epochs", "1", "--seed", "7", "--owners", "--out", str(tmp_path / name)) == 0
        records.append(json.loads((tmp_path / name / "run.json").read_text()))
    assert records[0]["schools"] == {"westside": 80, "grapevine": 240}
    assert records[0]["losses"] == records[1]["losses"]
    assert records[0]["tests"] == records[1]["tests"]


@pytest.mark.usefixtures("_digits")
def test_a_folder_that_is_not_empty_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert demo(monkeypatch, "--out", str(tmp_path)) == 2
    assert "is not empty: name a new folder" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_ctrl_c_ends_cleanly_and_keeps_the_best_model(tmp_path: Path) -> None:
    """In a process of its own: it sends itself SIGINT in the middle of the second school."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
from digits import Digits
from housecall.cli import _schools
from housecall.cli.main import main
_schools.MNIST = Digits
seen = []
update = _schools.Show.update
def watch(self, **fields):
    seen.append(fields)
    if fields.get("place") == "grapevine" and len(seen) > 12:
        os.kill(os.getpid(), signal.SIGINT)
    update(self, **fields)
_schools.Show.update = watch
sys.argv = ["housecall", "demo", "--epochs", "50", "--out", {str(tmp_path / "run")!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Stopped early; the best model so far is kept." in done.stdout
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["interrupted"] is True
    assert set(load_file(tmp_path / "run" / "model.safetensors")) == set(_schools.Net().state_dict())


def test_ctrl_c_waits_for_the_end_of_a_frame() -> None:
    """A frame that is cut in the middle would leave the worker in no known state."""
    import housecall as hc

    worker = hc.VirtualWorker(id="w")
    handle = worker._door.handle
    done: list[int] = []

    def interrupted(frame):
        os.kill(os.getpid(), signal.SIGINT)
        reply = handle(frame)
        done.append(frame.number)
        return reply

    worker._door.handle = interrupted
    x = torch.ones(2).send(worker)
    x += 1
    with pytest.raises(KeyboardInterrupt):
        x.copy().get()
    assert done == [1]
    worker._door.handle = handle
    assert torch.equal(x.get(), torch.full((2,), 2.0))


def test_help_does_not_import_torch() -> None:
    code = """
import sys
from housecall.cli.main import main
sys.argv = ["housecall", "--help"]
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
