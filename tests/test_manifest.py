import hashlib
import json
from pathlib import Path

import pytest

from trainer.system.manifest import DamagedError, sealed, unsealed, unverified, write_sealed

ENTRIES = {"step": 3, "name": "ö", "nested": {"b": [1, 2.5], "a": None}}


def test_what_was_sealed_comes_back_whatever_its_order_and_layout(tmp_path: Path):
    write_sealed(tmp_path / "file.json", ENTRIES)
    content = (tmp_path / "file.json").read_bytes()
    assert unsealed(content, "x", to_the_byte=True) == sealed(ENTRIES)
    assert sealed(sealed(ENTRIES)) == sealed(ENTRIES)
    for text in (json.dumps(sealed(ENTRIES)), json.dumps(sealed(ENTRIES), sort_keys=True, indent=1)):
        assert unsealed(text.encode(), "x") == sealed(ENTRIES)
        with pytest.raises(DamagedError, match=r"^x is damaged: its SHA-256 does not match\.$"):
            unsealed(text.encode(), "x", to_the_byte=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes."),
        (b"{", "Expecting property name"),
        (b"\xff", "'utf-8' codec can't decode"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b"[1]", "it is not a JSON object."),
        (b'{"step": 3}', "it does not contain its own SHA-256. If an earlier release of trainer wrote it, use that"),
        (json.dumps(sealed(ENTRIES) | {"step": 4}).encode(), "its SHA-256 does not match."),
        (json.dumps(sealed(ENTRIES) | {"more": 4}).encode(), "its SHA-256 does not match."),
        (json.dumps(sealed(ENTRIES) | {"sha256": 4}).encode(), "its SHA-256 does not match."),
    ],
)
def test_damage_is_an_error_that_names_the_file_and_the_reason(content: bytes, message: str):
    with pytest.raises(DamagedError) as error:
        unsealed(content, "a/run.json")
    assert str(error.value).startswith(f"a/run.json is damaged: {message}")


def test_a_file_of_another_format_can_be_read_before_it_is_verified():
    assert unverified(b'{"format": 1}', "x") == {"format": 1}


def test_what_an_earlier_release_sealed_in_the_order_of_its_entries_is_whole():
    in_order = {"sha256": hashlib.sha256(json.dumps(ENTRIES).encode()).hexdigest()}
    assert in_order["sha256"] != sealed(ENTRIES)["sha256"]
    content = json.dumps({**ENTRIES, **in_order}, indent=2) + "\n"
    assert unsealed(content.encode(), "x", to_the_byte=True)["step"] == 3
    with pytest.raises(DamagedError, match="its SHA-256 does not match"):
        unsealed(content.replace("3", "4").encode(), "x")
