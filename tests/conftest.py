"""One torch thread for each test process: results are compared bit for bit, and two cores are shared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import housecall as hc


@pytest.fixture(autouse=True)
def _threads() -> None:
    """Before each test: a service in this process sets the number for all of it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def hook() -> Iterator[hc.TorchHook]:
    hook = hc.TorchHook(torch)
    yield hook
    hook.remove()


@pytest.fixture(params=["direct", "codec"])
def clinic(request: pytest.FixtureRequest) -> hc.VirtualWorker:
    """A worker in this process; once with every message through bytes, as on a wire."""
    return hc.VirtualWorker(id="clinic", codec=request.param == "codec")


@pytest.fixture
def schools() -> tuple[hc.VirtualWorker, hc.VirtualWorker]:
    return hc.VirtualWorker(id="westside"), hc.VirtualWorker(id="grapevine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes; run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)
