"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def test_data() -> Path:
    """The folder of larger real text, named by TRAINER_TEST_DATA; a test that needs it skips without it."""
    folder = os.environ.get("TRAINER_TEST_DATA")
    if not folder:
        pytest.skip("TRAINER_TEST_DATA does not name a folder of test text")
    return Path(folder)
