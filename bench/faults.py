"""The matrix of faults as a table: 12 kinds of fault x 5 operations, each struck on its way out and back.

`python bench/faults.py` prints it; `figures.py` puts it on its page. The cells are those that the tests assert.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import fault_matrix
import torch
from fault_matrix import ERROR, ONCE, Row

import housecall as hc

SHORT = {ONCE: "once", ERROR: "error"}


def section(rows: list[Row]) -> str:
    """The table, a kind of fault a line; a cell says what came of it on the way out / on the way back."""
    operations = list(fault_matrix.OPERATIONS)
    lines = [f"| fault | {' | '.join(operations)} |", f"| --- |{' --- |' * len(operations)}"]
    for kind in fault_matrix.FAULTS:
        cells = [
            f"{SHORT.get(row.sent, row.sent)} / {SHORT.get(row.came, row.came)}" for row in rows if row.kind == kind
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """The row of the page of figures."""
    found = [outcome for row in rows for outcome in (row.sent, row.came)]
    once, error = found.count(ONCE), found.count(ERROR)
    hangs, leaks = found.count("a hang"), sum(one.startswith("a leak") for one in found)
    wrong = len(found) - once - error - hangs - leaks
    kinds, operations = len(fault_matrix.FAULTS), len(fault_matrix.OPERATIONS)
    what = f"faults: {kinds} kinds x {operations} operations, each out and back"
    named = "exactly once / one clear error / wrong / hangs / leaks"
    ends = f"{once} / {error} / {wrong} / {hangs} / {leaks}"
    return f"| {what}: {named} | **{ends}** | {len(found)} in the first two |"


def measured() -> list[Row]:
    """All outcomes, about half a minute."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    try:
        return fault_matrix.matrix()
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    hook = hc.TorchHook(torch)
    outcomes = measured()
    hook.remove()
    print(section(outcomes))
    print()
    print(summary(outcomes))
