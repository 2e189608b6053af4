"""The pages: their code runs, what they print is what is printed, each is in the site, and the site builds.

A ```python block runs; the blocks of one page run in order, in one namespace. In docs/, a ```text block right after a
```python block must be what that block printed. Ids (ten digits and more) and line numbers of pages may differ.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import housecall as hc

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


class Block(NamedTuple):
    line: int  # of its first line of code, from 1
    source: str
    expected: str | None  # what the block after it says that it prints


def blocks(page: Path) -> list[Block]:
    """The python blocks of a page."""
    fences = list(re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", page.read_text(), re.M | re.S))
    found = []
    for fence, after in zip_longest(fences, fences[1:]):
        if fence[1] != "python":
            continue
        follows = after is not None and after[1] == "text" and not fence.string[fence.end() : after.start()].strip()
        expected = after[2] if after is not None and follows and page.parent == DOCS else None
        found.append(Block(fence.string.count("\n", 0, fence.start(2)) + 1, fence[2], expected))
    return found


PAGES = [page for page in (*sorted(DOCS.glob("**/*.md")), ROOT / "README.md") if page.exists() and blocks(page)]


def plain(printed: str) -> str:
    """What of an output must be the same in every run."""
    printed = printed.replace(f"{ROOT}{os.sep}", "")
    return re.sub(r"\d{10,}", "ID", re.sub(r"(\.md:)\d+", r"\1LINE", printed)).rstrip()


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A namespace for one page, in a folder of its own; afterwards its hooks are gone."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    before = hc.TorchHook._hooks
    log = logging.getLogger("housecall")
    level = log.level
    namespace: dict[str, object] = {"__name__": "page"}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield namespace
    log.setLevel(level)
    for value in namespace.values():
        if isinstance(value, hc.TorchHook):
            value.remove()
    namespace.clear()
    gc.collect()
    left, hc.TorchHook._hooks = hc.TorchHook._hooks, before
    assert left == before, "the page makes a TorchHook that it keeps under no name, so it cannot be removed"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path, apart: dict[str, object]) -> None:
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        # Blank lines in front, so that a traceback names the line of the page.
        code = compile("\n" * (block.line - 1) + block.source, str(page), "exec", dont_inherit=True)
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                exec(code, apart)
        except Exception as error:
            trace, line = error.__traceback__, block.line
            while trace is not None:  # the innermost line that is the page's
                line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(page) else line
                trace = trace.tb_next
            name = page.relative_to(ROOT)
            raise AssertionError(f"block at {where}, line {name}:{line}: {type(error).__name__}: {error}") from error
        if block.expected is not None and plain(out.getvalue()) != plain(block.expected):
            pytest.fail(f"block at {where} prints\n{plain(out.getvalue())}\nbut the page says\n{plain(block.expected)}")


def test_every_page_is_in_the_navigation_and_nothing_else() -> None:
    _, _, navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    listed = re.findall(r"^\s+- .*?:\s*(\S+\.md)\s*$", navigation, re.M)
    assert len(listed) == len(set(listed))
    assert set(listed) == {page.relative_to(DOCS).as_posix() for page in DOCS.glob("**/*.md")}


def files() -> list[Path]:
    """The files of the repository, also those not yet committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot list the files here: {error}")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    machine = re.compile(r"(?<![\w.~-])/(work|tmp|root|home|Users)/")
    found = []
    for path in files():
        if path.is_relative_to(ROOT / "tests"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # not a text
            continue
        lines = enumerate(text.splitlines(), 1)
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for number, line in lines if machine.search(line)
        ]
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a broken link, or a page outside the navigation, is an error."""
    for name in ("mkdocs", "material"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[docs]'")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    # The variables silence what the theme has to say about its own future.
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    built = subprocess.run(
        [*command, "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(target)],
        cwd=target, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr + built.stdout
    return target


def test_the_site_builds_strictly(site: Path) -> None:
    for page in DOCS.glob("**/*.md"):
        made = page.relative_to(DOCS).with_suffix("")
        assert (site / (made.parent if made.name == "index" else made) / "index.html").is_file()
    assert "Keep a Changelog" in (site / "changelog" / "index.html").read_text()


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    found = [
        f"{page.relative_to(site)}: {tag}" for page in site.glob("**/*.html") for tag in loads.findall(page.read_text())
    ]
    assert not found, "\n".join(found)
