"""Fixtures shared by all tests."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-figures", action="store_true", help="of tests/test_compile.py")


def pytest_configure(config: pytest.Config) -> None:
    # What a shell runs in the background ignores SIGINT, and so would the runs that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Files of tests that take minutes, the longest first. If one of them came last, it would run alone.
LONG = ("snippets", "ops", "replicas", "evaluation", "loop", "starting_weights", "run_changes", "fork", "kerashub")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The compilers for accelerators need half of a machine's 24 GB. They run first, while the other process of the
    # tests is still small: what TensorFlow traced in hundreds of tests makes it grow to several gigabytes.
    # scripts/test keeps xdist from sorting the files by their number of tests.
    order = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (item.get_closest_marker("tpu") is None, order.get(item.path.name, len(order))))


@pytest.fixture(autouse=True)
def _stays_in_its_folder() -> Iterator[None]:
    """Fails a test that leaves the process in another working directory: later tests open files by relative paths."""
    before = Path.cwd()
    yield
    after = Path.cwd()
    os.chdir(before)
    assert after == before, f"the test ended in the folder {after}; it started in {before}"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of larger real text, named by TRAINER_TEST_DATA; a test that needs it skips without it."""
    folder = os.environ.get("TRAINER_TEST_DATA")
    if not folder:
        pytest.skip("TRAINER_TEST_DATA does not name a folder of test text")
    return Path(folder)


@pytest.fixture(scope="session")
def free_addresses() -> Callable[[int], list[str]]:
    """A function that finds addresses of this machine that nobody listens at just now."""

    def find(count: int) -> list[str]:
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        found = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        for each in sockets:
            each.close()
        return found

    return find
