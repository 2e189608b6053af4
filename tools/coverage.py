"""Write `docs/operators.md`: how much of PyTorch's own operator database gives equal results through pointers.

It runs the harness of the tests (`tests/opdb.py`), a few minutes on one core. `python tools/coverage.py`
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "operators.md"
sys.path.insert(0, str(ROOT / "tests"))

from opdb import CUDA_ONLY, EXCEPTIONS, ROUNDING, RUNS, UNINITIALISED, check, entries, tolerance  # noqa: E402

from housecall.program.ops import table  # noqa: E402
from housecall.virtual import VirtualWorker  # noqa: E402

HEAD = """\
# Operators

*This page is written by `tools/coverage.py`; do not edit it.*

PyTorch tests its operators with a database of its own (`torch.testing._internal`): {entries} entries, each with
sample inputs for every element type. Each sample is computed twice, by local torch {version} on the CPU and through
pointers at a worker, and the results are compared: structure, element type, shape and elements, bit for bit except
where [a tolerance](#equal-within-rounding) is named. The tests run the same harness, so none of this can change
unnoticed. A worker runs {operators:,} ATen operators; what is not among them is refused by name.

An entry counts as equal if all its samples are; below, "gradient" is the gradient of every result with respect to
every input that has one.

| element type | what | entries | equal | to the bit | not equal |
| --- | --- | ---: | ---: | ---: | --- |
"""


def equal(name: str, dtype: str, kind: str) -> bool:
    """Whether every sample of an entry that is no exception is equal."""
    worker = VirtualWorker(id="w")
    try:
        check(name, dtype, kind, worker, **tolerance(name))
    except Exception as error:  # whatever it is, the page says so
        print(f"{name} {dtype} {kind}: {error}", file=sys.stderr)
        return False
    finally:
        worker.session.close()
    return True


def row(dtype: str, kind: str) -> str:
    """One line of the table. What is listed as an exception is not tried: the tests hold it to its reason."""
    names = entries(dtype, kind)
    tried = [name for name in names if name not in EXCEPTIONS]
    good = [name for name in tried if equal(name, dtype, kind)]
    exact = [name for name in good if name not in ROUNDING]
    listed = len(names) - len(tried)
    failed = sorted(set(tried) - set(good))
    rest = f"{listed} [listed below](#not-equal)" + (f"; and {', '.join(failed)}" if failed else "")
    return f"| `{dtype}` | {kind} | {len(names)} | {len(good)} | {len(exact)} | {rest} |\n"


def listing(reasons: dict[str, str]) -> str:
    """A table of names by reason, in the order of the first name."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    lines = [f"| {', '.join(f'`{name}`' for name in names)} | {reason} |" for reason, names in groups.items()]
    return "\n".join(["| entries | why |", "| --- | --- |", *lines]) + "\n"


def page() -> str:
    """The whole page."""
    database = {name for dtype, kind in RUNS for name in entries(dtype, kind)}
    parts = [HEAD.format(entries=len(database), version=torch.__version__.partition("+")[0], operators=len(table()))]
    parts += [row(dtype, kind) for dtype, kind in RUNS]
    parts += [
        "\n## Not equal\n\n",
        f"{len(EXCEPTIONS)} entries. {len(UNINITIALISED)} have no value that could be equal, and {len(CUDA_ONLY)} do "
        "not run on a CPU at all; for at least one sample of each of the others there is an error that says so, and "
        "never another result.\n\n",
        listing(EXCEPTIONS),
        "\n## Equal within rounding\n\n",
        f"For {len(ROUNDING)} entries torch itself takes another algorithm, or another order of sums, when a tensor is "
        "of a subclass. They are equal within the tolerance of `torch.testing.assert_close`.\n\n",
        listing(ROUNDING),
    ]
    return "".join(parts)


def main() -> None:
    """Run everything and write the page."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
