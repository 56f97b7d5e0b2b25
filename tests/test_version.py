import re
from pathlib import Path

import pytest

from trainer.cli import main
from trainer.data import shards
from trainer.runs import checkpoint, run_folder
from trainer.version import __version__

CHANGELOG = Path(__file__).parents[1].joinpath("CHANGELOG.md").read_text(encoding="utf-8")


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"trainer {__version__}\n"


def test_the_changelog_s_newest_release_is_this_version():
    newest = re.findall(r"^## (\d\S*) - \d{4}-\d\d-\d\d$", CHANGELOG, flags=re.M)[0]
    assert newest == __version__


def test_the_upgrade_note_has_the_versions_of_all_formats():
    # When a format changes, its row moves into the notes of the release that changes it.
    for row in (
        rf"`manifest\.json` \| `format_version` {shards.FORMAT_VERSION} ",
        rf"`run\.json` \| `format` {run_folder.FORMAT} ",
        rf"`checkpoints/step_N` \| `format` {checkpoint.FORMAT} ",
    ):
        assert re.search(row, CHANGELOG), row
