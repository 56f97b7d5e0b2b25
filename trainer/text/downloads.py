"""Fetching the texts that shipped configs are for: those of the tutorial and of nanoGPT.

A text gets its place when all of it is there and has been checked. Until then it is in a hidden folder beside that
place, which an error removes, and the next download as well.
"""

import glob
import hashlib
import http.client
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from trainer.config.settings import DataConfig
from trainer.errors import UserError, quoted
from trainer.system.storage import REMEDIES, is_url, locate, reason_and_remedy
from trainer.system.terminal import Say
from trainer.system.whole import written_whole

_PROGRESS_SECS = 5.0
_TIMEOUT_SECS = 60.0
_READ_BYTES = 1 << 20


class Download(NamedTuple):
    """A text that can be fetched.

    Attributes:
        name: its name.
        config: the shipped config that trains on it.
        url: its address.
        num_bytes: the size of what is at the address.
        sha256: the SHA-256 of what is at the address; "" if nobody has published it.
        place: the file or folder that it becomes. A source with the last name of this path in it means this text.
        member: the folder of a zip archive that becomes the place; "" if the address has the text itself, which then
            becomes the file that the source names.
    """

    name: str
    config: str
    url: str
    num_bytes: int
    sha256: str
    place: str
    member: str = ""

    def is_meant_by(self, source: str) -> bool:
        """Whether a source of data.train or data.validation names this text."""
        return not is_url(source) and Path(self.place).name in Path(source).parts


# Sources: the tutorial on keras.io prints the first size. tiny_shakespeare in tensorflow-datasets has the second size
# and its SHA-256. No SHA-256 of the first file is published: the checksums in the zip archive are checked instead.
KNOWN = (
    Download(
        "SimpleBooks",
        "minigpt",
        "https://dldata-public.s3.us-east-2.amazonaws.com/simplebooks.zip",
        282_386_239,
        "",
        "~/.keras/datasets/simplebooks/simplebooks-92-raw",
        "simplebooks/simplebooks-92-raw/",
    ),
    Download(
        "tiny Shakespeare",
        "shakespeare_char",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "tinyshakespeare.txt",
    ),
)


def download_of(source: str) -> Download | None:
    """Returns the text that a source means, if it can be fetched."""
    return next((each for each in KNOWN if each.is_meant_by(source)), None)


def fetch_texts(data: DataConfig, say: Say) -> None:
    """Fetches the texts of a config that are not there.

    Args:
        data: the settings.
        say: prints a line on the progress every few seconds.

    Raises:
        UserError: no text of the config is known; or it cannot be fetched or written, or is not what it should be.
    """
    sources = [*data.train, *(data.validation or ())]
    wanted = {
        each if each.member else each._replace(place=source)
        for source in sources
        if (each := download_of(source)) is not None
    }
    if not wanted:
        known = ", ".join(f"{each.config} ({each.name})" for each in KNOWN)
        raise UserError(
            f"--download: data.train={list(data.train)} names no text that trainer can fetch; it can fetch those of "
            f"the configs {known}. Leave it out, and fetch the text yourself."
        )
    for each in sorted(wanted):
        if _is_there(source for source in sources if each.is_meant_by(source)):
            say(f"{each.name} is already there")
        else:
            fetch(each, say)


def _is_there(sources: Iterable[str]) -> bool:
    # A hidden folder, such as one that a killed download has left, does not match **.
    return all(glob.glob(str(Path(source).expanduser()), recursive=True) for source in sources)  # noqa: PTH207


def fetch(download: Download, say: Say) -> None:
    """Fetches a text, checks it, and puts it in its place.

    Raises:
        UserError: as in fetch_texts.
    """
    place = locate(download.place)
    assert isinstance(place, Path)
    if place.exists():
        raise UserError(f"{place} is there, but not all of {download.name}; delete it, and give --download again.")
    say(f"{download.name}: fetching {download.num_bytes / 1e6:.1f} MB from {download.url}")
    try:
        with written_whole(place) as partial:
            if download.member:
                archive = partial.with_name(f"{partial.name}.zip")
                _receive(download, archive, say)
                _unpack(archive, download.member, partial)
                archive.unlink()
            else:
                _receive(download, partial, say)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{download.name} could not be fetched: {_reason(error).rstrip('.')}. By hand, here or with the file from "
            f"another machine:\n{by_hand(download)}"
        ) from None
    say(f"{download.name} is in {place}")


def by_hand(download: Download) -> str:
    """Returns commands that get a text without --download."""
    if not download.member:
        return f"  curl -fL --create-dirs -o {quoted(locate(download.place))} {download.url}"
    # As in the archive, the folder of the place is in another one.
    archive, folder = Path(download.url).name, quoted(Path(str(locate(download.place))).parent.parent)
    unpack = f"{quoted(sys.executable)} -m zipfile -e {archive} {folder}"
    return f"  curl -fLO {download.url}\n  mkdir -p {folder} && {unpack}"


def _receive(download: Download, file: Path, say: Say) -> None:
    """Writes what is at the address into a file.

    Raises:
        OSError: it cannot be read or written, or is not what it should be.
    """
    digest, said, num_bytes = hashlib.sha256(), time.monotonic(), 0
    with urllib.request.urlopen(download.url, timeout=_TIMEOUT_SECS) as response, file.open("xb") as target:
        while chunk := response.read(_READ_BYTES):
            target.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
            if time.monotonic() - said >= _PROGRESS_SECS:
                said = time.monotonic()
                say(f"{download.name}: {num_bytes / 1e6:.1f} of {download.num_bytes / 1e6:.1f} MB")
    if num_bytes != download.num_bytes:
        raise OSError(f"{num_bytes} bytes came from {download.url}, and not {download.num_bytes}")
    if download.sha256 and digest.hexdigest() != download.sha256:
        raise OSError(f"what came from {download.url} has another SHA-256 than it should have")


def _unpack(archive: Path, member: str, folder: Path) -> None:
    """Writes the files in a folder of an archive, whose checksums are compared, into a folder."""
    with zipfile.ZipFile(archive) as opened:
        names = [name for name in opened.namelist() if name.startswith(member) and not name.endswith("/")]
        if not names or any("/" in name.removeprefix(member) for name in names):
            raise zipfile.BadZipFile(f"{archive.name} has not the files of {member}")
        folder.mkdir()
        for name in names:
            with opened.open(name) as source, (folder / name.removeprefix(member)).open("xb") as target:
                shutil.copyfileobj(source, target, _READ_BYTES)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # It holds the connection.
    elif isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason  # Such as: Name or service not known.
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return reason_and_remedy(error)
    return str(error.strerror or error) if isinstance(error, OSError) else str(error) or type(error).__name__
