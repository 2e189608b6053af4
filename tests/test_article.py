"""The article's script, only its import lines changed, runs from end to end; on real MNIST in the slow mode."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest
import torch
from digits import Digits

import housecall.datasets

SCRIPT = Path(__file__).parent.parent / "examples" / "article.py"


def run(epochs: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    source = SCRIPT.read_text()
    assert source.count("'epochs' : 10") == 1
    exec(compile(source.replace("'epochs' : 10", f"'epochs' : {epochs}"), SCRIPT, "exec"), {"__name__": "__main__"})
    return capsys.readouterr().out.splitlines()


def accuracies(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.search(r"Accuracy: (\d+)/\d+", line))]


@pytest.fixture
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housecall.datasets, "MNIST", Digits)


@pytest.mark.usefixtures("_digits")
def test_the_script_runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    lines = run(8, capsys)
    first = r"Train Epoch: 1 \[0/384 \(0%\)\]\tLoss: \d\.\d{6}"
    assert re.fullmatch(first, lines[0])
    found = accuracies(lines)
    assert len(found) == 8
    assert found[-1] == 100


def test_only_the_import_lines_differ() -> None:
    mine = SCRIPT.read_text()
    theirs = mine.replace("from housecall import datasets, transforms", "from torchvision import datasets, transforms")
    theirs = theirs.replace("import housecall as sy", "import syft as sy")
    changed = [line for line in difflib.ndiff(theirs.splitlines(), mine.splitlines()) if line.startswith(("+ ", "- "))]
    assert len(changed) == 4
    assert all("import" in line for line in changed)
    assert "housecall" not in theirs


@pytest.mark.slow
def test_one_epoch_on_real_mnist(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The article's settings: 94.6 % after one epoch, as plain torch on the same halves."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")  # the script keeps its data in ../data
    torch.manual_seed(0)
    (accuracy,) = accuracies(run(1, capsys))
    assert accuracy >= 9300
