"""Sealed manifests: JSON files that contain the SHA-256 of their own entries, so that damage is noticed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from trainer.errors import UserError
from trainer.system.storage import Location
from trainer.system.whole import write_whole

_SEAL = "sha256"


class DamagedError(UserError):
    """A file is not as it was written."""


def sealed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Returns entries with their SHA-256 added as one more entry; the order of the entries does not change it."""
    content = {key: value for key, value in entries.items() if key != _SEAL}
    return content | {_SEAL: _sha256(json.dumps(content, sort_keys=True))}


def unsealed(content: bytes, path: object, to_the_byte: bool = False) -> dict[str, Any]:
    """Returns the entries of a JSON file that `sealed` returned.

    Args:
        content: the bytes of the file.
        path: the path of the file, for the message.
        to_the_byte: whether a change that JSON ignores counts as damage, in a file that `write_sealed` wrote.

    Raises:
        DamagedError: the content is not as it was written.
    """
    entries = unverified(content, path)
    if _SEAL not in entries:
        raise DamagedError(
            f"{path} is damaged: it does not contain its own SHA-256. If an earlier release of trainer wrote it, use "
            "that release."
        )
    is_as_written = not to_the_byte or content == _text(entries).encode()
    if not is_as_written or not _is_sealed(entries):
        raise DamagedError(f"{path} is damaged: its SHA-256 does not match.")
    return entries


def unverified(content: bytes, path: object) -> dict[str, Any]:
    """Returns the entries without a check of their SHA-256, for a file that may be of another format."""
    try:
        entries = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        reason = f"{error}" if content else "it has 0 bytes"
        raise DamagedError(f"{path} is damaged: {reason}.") from None
    if not isinstance(entries, dict):
        raise DamagedError(f"{path} is damaged: it is not a JSON object.")
    return entries


def _is_sealed(entries: dict[str, Any]) -> bool:
    # Earlier releases sealed prepared data by its entries in the order of the file.
    in_order = _sha256(json.dumps({key: value for key, value in entries.items() if key != _SEAL}))
    return entries[_SEAL] in (sealed(entries)[_SEAL], in_order)


def write_sealed(file: Location, entries: Mapping[str, Any]) -> None:
    """Writes entries with their SHA-256 into a file that exists whole or not at all."""
    write_whole(file, _text(sealed(entries)))


def _text(entries: Mapping[str, Any]) -> str:
    return json.dumps(entries, indent=2) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
