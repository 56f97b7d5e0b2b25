import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.runs.run_lock import only_run_in

ROOT = Path(__file__).parent.parent

HOLD = """
import pathlib, sys
from trainer.runs.run_lock import only_run_in
with only_run_in(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_one_process_trains_in_a_folder(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(UserError) as error, only_run_in(tmp_path):
            pass
        assert str(error.value) == f"{tmp_path} is being trained in by another process; wait for it or stop it."
        process.kill()
    with only_run_in(tmp_path):  # What was killed holds nothing.
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    said: list[str] = []
    with only_run_in(tmp_path / "runs/a", said.append):
        assert (tmp_path / "runs/a").is_dir()
    assert said == [
        f"warning: the file system of {tmp_path}/runs/a has no locks ({os.strerror(number)}): see to it that no two "
        "processes train in it."
    ]
    assert not (tmp_path / "runs/a").exists()


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path: Path):
    with pytest.raises(UserError, match=r"^/proc/nothing/run cannot be written: .* or choose another run_folder\.$"):
        only_run_in(Path("/proc/nothing/run")).__enter__()
    (tmp_path / "lock").symlink_to(tmp_path / "nothing/lock")
    with pytest.raises(UserError, match=r"cannot be written: No such file .*, or choose another run_folder\.$"):
        only_run_in(tmp_path).__enter__()
    (tmp_path / "run.json").touch()  # A run that is there cannot go on in another folder.
    with pytest.raises(UserError, match=r"cannot be written: No such file .*Check the path and its file system\.$"):
        only_run_in(tmp_path).__enter__()


def test_one_holder_per_folder_and_it_lets_go(tmp_path: Path):
    with only_run_in(tmp_path), pytest.raises(UserError, match="is being trained in"), only_run_in(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), only_run_in(tmp_path):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []
    with only_run_in(tmp_path):
        pass
