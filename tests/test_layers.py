"""The layering law: imports go down only, two packages know no torch, and nothing is imported within functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "housecall"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# What each layer may import of this package, itself always. Higher lines stand on lower ones.
CARRIED = {"transport", "wire", "program", "types", "errors"}
OWNERS = {"host", "worker", "owned", "owner", "privacy"}
BELOW: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "datasets": {"errors"},
    "identity": {"errors"},
    "sandbox": {"errors"},
    "program": {"types", "errors"},
    "privacy": {"errors"},
    "wire": {"program", "types", "errors"},
    "transport": {"wire", "program", "types", "errors"},
    "owner": {"privacy", "types", "errors"},
    "owned": {"owner", *CARRIED},
    "worker": {"owned", "owner", "privacy", *CARRIED},
    "host": {"worker", "owned", "owner", *CARRIED},
    "pointers": CARRIED,
    "virtual": {"pointers", "worker", "owned", "owner", *CARRIED},
    "remote": {"pointers", "identity", "", *CARRIED},
    "metrics": set(),
    "logs": set(),
    "supervise": set(),
    "service": {"logs", "identity", "sandbox", "", *OWNERS, *CARRIED},
    "cluster": {"remote", "pointers", "identity", "sandbox", *OWNERS, *CARRIED},
    "testing": {"remote", "pointers", "identity", *OWNERS, *CARRIED},
    "cli": {
        "virtual", "remote", "metrics", "logs", "supervise", "service", "cluster", "pointers", "identity", "datasets",
        "sandbox", "", *OWNERS, *CARRIED,
    },
}  # fmt: skip
AUDITORS = ("program", "wire", "owner", "privacy", "types", "errors")  # read without torch
TORCH_IN_PROGRAM = {"program/forecast.py", "program/outcome.py", "program/run.py", "program/typing.py"}


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(), filename=name)


def layer(name: str) -> str:
    """The layer of a file, or of a module's dotted name without `housecall`; empty for the package itself."""
    first = name.replace(".py", "").replace("/", ".").split(".")[0]
    return "" if first == "__init__" else first


def imported(name: str, node: ast.AST) -> Iterator[str]:
    """The absolute names of the modules that an import statement of a file may load."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = ["housecall", *name.split("/")[:-1]]
            parts = package[: len(package) - node.level + 1]
            assert parts, f"{name}: an import beyond the package"
            base = ".".join([*parts, *([node.module] if node.module else [])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def own(name: str) -> set[str]:
    """The layers of this package that a file imports."""
    found = set()
    for node in ast.walk(tree(name)):
        modules = [module for module in imported(name, node) if module.split(".")[0] == "housecall"]
        # `from housecall import x` names the package and x: the package alone counts only if x is no layer.
        inner = [module for module in modules if module.count(".") and module.split(".")[1] in BELOW]
        found |= {layer(module.partition(".")[2]) for module in inner} if inner else {"" for _ in modules}
    return found


def foreign(name: str) -> set[str]:
    """The first names of all other packages that a file imports."""
    return {module.split(".")[0] for node in ast.walk(tree(name)) for module in imported(name, node)} - {"housecall"}


def test_the_table_knows_every_file() -> None:
    assert {layer(name) for name in FILES} - {"", "cli"} == set(BELOW) - {"cli"}
    assert len(FILES) > 20
    assert set(LAZY) <= set(FILES)


def test_the_table_has_no_cycles() -> None:
    for name, below in BELOW.items():
        assert name not in below
        assert all(name not in BELOW.get(lower, set()) for lower in below)
    assert "worker" not in BELOW["pointers"]
    assert "pointers" not in BELOW["worker"]


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__.py"])
def test_imports_go_down_only(name: str) -> None:
    here = layer(name)
    assert own(name) - {here} <= BELOW[here]


@pytest.mark.parametrize(
    "name",
    [name for name in FILES if layer(name) in AUDITORS and name not in TORCH_IN_PROGRAM],
)
def test_an_auditors_files_know_no_torch(name: str) -> None:
    heavy = {"torch", "safetensors"} | ({"numpy"} if layer(name) != "privacy" else set())  # its arithmetic
    assert foreign(name) & heavy == set()


@pytest.mark.parametrize("name", [name for name in FILES if layer(name) in ("types", "errors", "program", "wire")])
def test_no_file_of_the_lower_layers_opens_a_socket(name: str) -> None:
    assert foreign(name) & {"socket", "ssl", "http", "urllib", "asyncio", "grpc", "requests", "subprocess"} == set()


@pytest.mark.parametrize(
    "modules",
    [
        "housecall",
        "housecall.errors, housecall.types",
        "housecall, housecall.program.call, housecall.program.ops, housecall.program.check, "
        "housecall.wire.messages, housecall.wire.codec",
    ],
)
def test_an_auditors_imports_load_no_torch(modules: str) -> None:
    code = f"import sys\nimport {modules}\nprint(sorted({{'torch', 'numpy', 'pickle'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() in ("[]", "['pickle']"), done.stderr  # the standard library may load pickle itself
    assert "torch" not in done.stdout


def test_an_auditor_can_read_the_table_without_torch() -> None:
    code = (
        "import sys\nfrom housecall.program.ops import operator, table\n"
        "assert all(operator(name) for name in table())\nassert 'torch' not in sys.modules\nprint('read')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "read\n", done.stderr


# What few runs need, and would cost every run.
LAZY = {
    "datasets/fetch.py": {"rich.console", "rich.progress"},  # a progress bar, for downloads
    "datasets/mnist.py": {"PIL"},  # comes with matplotlib; without it images stay arrays
    "owned/readers/images.py": {"PIL"},  # reading npz must not need it
    "owned/readers/parquet.py": {"pyarrow"},  # an extra: 100 MB that few workers need
}


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__.py" and layer(name) != "cli"])
def test_nothing_is_imported_within_functions(name: str) -> None:
    functions = [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = {
        next(imported(name, node))
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert found == LAZY.get(name, set())


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(tree(name)), f"{name} has no docstring"


# -- the tests of the tests: the walk sees what it must see -----------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("worker/worker.py", "from ..pointers import session", {"pointers"}),
        ("worker/worker.py", "from ..pointers.session import Session", {"pointers"}),
        ("worker/worker.py", "from .. import pointers, types", {"pointers", "types"}),
        ("worker/worker.py", "from .store import Store", {"worker"}),
        ("worker/worker.py", "import housecall.pointers.tensor", {"pointers"}),
        ("worker/worker.py", "from housecall import virtual", {"virtual"}),
        ("worker/worker.py", "from housecall import send", {""}),
        ("worker/worker.py", "import housecall", {""}),
        ("virtual.py", "from .worker.worker import Worker", {"worker"}),
        ("worker/worker.py", "def f():\n    from ..pointers import tensor", {"pointers"}),
        ("worker/worker.py", "import torch", set()),
    ],
)
def test_the_walk_sees_every_form(name: str, source: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "tree", lambda _: ast.parse(source))
    assert own(name) == expected
