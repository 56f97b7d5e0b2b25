"""Laws of preparing with Apache Beam: it differs from preparing without in who does the work, and in nothing else."""

import gzip
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer import verbs
from trainer.cli import main
from trainer.config.settings import Config
from trainer.data import beam
from trainer.data.beam import prepare_with_beam
from trainer.data.prepare import prepare
from trainer.errors import UserError
from trainer.system.storage import locate
from trainer.version import __version__

# Workers that are threads of this process.
HERE = ("--direct_running_mode=in_memory", "--direct_num_workers=1")


def config_for(folder: Path, kind: str, **data) -> Config:
    """A config of the files in a folder, which do not alike fill shards of 1,000 tokens."""
    for i, count in enumerate((300, 1, 120)):
        lines = [f"line {i} {j}" + " of text, 한글" * (j % 7) for j in range(count)]
        (folder / f"{i}.txt").write_text("\n\n".join(lines) + "\n")
    (folder / "3.txt.gz").write_bytes(gzip.compress(b"packed\n" * 50, mtime=0))
    (folder / "4.jsonl").write_text("".join(json.dumps({"text": f"record {i}\n"}) + "\n" for i in range(100)))
    rows = pyarrow.table({"id": list(range(90)), "text": [f"row {i} of a table\n" for i in range(90)]})
    pyarrow.parquet.write_table(rows, folder / "5.parquet", row_group_size=7)
    (folder / "6.txt.zst").write_bytes(pyarrow.compress(b"packed by zstd\n" * 50, codec="zstd", asbytes=True))
    (folder / "held.txt").write_text("held out\n\nfrom line 0 \x7f\n" * 9)
    size = {"wordpiece": {"vocabulary_size": 90}, "bpe": {"vocabulary_size": 300}}.get(kind, {})
    data = {"train": str(folder / "[0-9]*"), "held_out_fraction": 0.1, **data}
    return tiny_config(folder, data=data, tokenizer={"kind": kind, **size})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def locally(config: Config) -> tuple[dict[str, bytes], list[str]]:
    """The bytes and lines of a preparation without Apache Beam; the prepared folder is empty again."""
    said: list[str] = []
    found = contents(prepare(config, said.append, 1000).folder)
    shutil.rmtree(config.data.prepared_folder)
    assert len(found) > 8  # Several shards.
    return found, [line for line in said if ": prepared in " not in line]  # Which says how long it took.


def assert_same_bytes(config: Config, options=HERE) -> None:
    expected, said = locally(config)
    heard: list[str] = []
    prepared = prepare_with_beam(config, options, heard.append, 1000)
    found = contents(prepared.folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    heard = [line for line in heard if ": prepared in " not in line]
    assert heard[len(heard) - len(said) :] == said
    assert [path.name for path in Path(config.data.prepared_folder).iterdir()] == [prepared.folder.name]


def run_python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", f"from test_beam import *\n{program}", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# The same bytes.


@pytest.mark.parametrize(
    ("kind", "documents", "validation"),
    [("char", "line", None), ("bpe", "paragraph", "held.txt"), ("char", "file", None), ("byte", "file", "held.txt")],
)
def test_every_byte_is_that_of_preparing_without_beam(tmp_path, kind, documents, validation):
    data = {} if validation is None else {"validation": str(tmp_path / validation)}
    assert_same_bytes(config_for(tmp_path, kind, documents=documents, min_bytes=7, **data))


@pytest.mark.parametrize("validation", [None, ["held.txt", "held.txt"]])
def test_sources_that_are_mixed_keep_their_splits(tmp_path, validation):
    data = {} if validation is None else {"validation": [str(tmp_path / name) for name in validation]}
    names = [str(tmp_path / name) for name in ("[0-2].txt", "[3-9]*")]
    assert_same_bytes(config_for(tmp_path, "char", train=names, weights=[3, 1], **data))


@pytest.mark.parametrize("weights", [None, [1]])
def test_the_storybook_is_told_by_one_worker(tmp_path, weights):
    config = config_for(tmp_path, "char", train="storybook", storybook_stories=60, weights=weights)
    assert_same_bytes(config)
    nats = [split.source_nats for split in prepare(config, shard_tokens=1000).parts("validation")]
    assert [is_known is not None for is_known in nats] == [weights is None]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_workers"), [("wordpiece", 2), ("char", 3)])
def test_several_processes_write_the_same_bytes(tmp_path, kind, num_workers):
    assert_same_bytes(config_for(tmp_path, kind), [f"--direct_num_workers={num_workers}"])


@pytest.mark.slow
def test_a_runner_behind_a_job_server_writes_the_same_bytes(tmp_path):
    options = ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"]
    assert_same_bytes(config_for(tmp_path, "char"), options)


def test_a_part_that_is_written_twice_counts_once(tmp_path, monkeypatch):
    write = beam._write_part

    def write_twice(parts, version, numbered):
        write(parts, version, numbered)
        write(parts, version, numbered)
        assert len(list(parts.glob(f"{numbered[0]:06}-*.json"))) == 2

    monkeypatch.setattr(beam, "_write_part", write_twice)
    assert_same_bytes(config_for(tmp_path, "char"))


def test_broken_records_are_left_out_and_reported_as_without_beam(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"5{name}.jsonl").write_text('{"text": "right"}\nwrong\n' * 4)
    monkeypatch.chdir(tmp_path)  # Files are called what the config calls them.
    data = {"train": ["[0-9]*", "5a.jsonl"], "validation": ["held.txt", "held.txt"], "weights": [1, 1]}
    config = config_for(tmp_path, "char", max_broken_fraction=0.5, **data)
    said, heard = [], []
    prepare(config, said.append)
    shutil.rmtree(config.data.prepared_folder)
    prepare_with_beam(config, HERE, heard.append)
    lines = [line for line in said if "broken records" in line]
    assert [line for line in heard if "broken records" in line] == lines
    assert lines[0].startswith("8 broken records (") and "left out: 5a.jsonl: line 2 is" in lines[0]
    assert lines[0].endswith(" ...")
    assert lines[1].startswith("4 broken records (") and "left out: 5a.jsonl: line 2 is" in lines[1]


@pytest.mark.slow
def test_parts_of_a_killed_pipeline_do_no_harm(tmp_path):
    config = config_for(tmp_path, "char")
    expected, _ = locally(config)
    program = (
        "def killed(sources, parts, *others):\n"
        "    for path in parts.rglob('*'): path.is_dir() or path.write_bytes(b'damaged')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "beam._join = killed\n"
        "prepare_with_beam(config_for(Path(sys.argv[1]), 'char'), HERE, shard_tokens=1000)"
    )
    ways = (lambda: prepare_with_beam(config, HERE, print, 1000), lambda: prepare(config, print, 1000))
    for prepare_again in ways:
        child = run_python(program, tmp_path)
        assert child.returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob("prepared/.partial-*/parts/*.json"))) == 7
        folder = prepare_again().folder
        assert contents(folder) == expected
        assert list(tmp_path.glob("prepared/*")) == [folder]
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_store_gets_the_same_shards_and_keeps_no_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = f"ram://{secrets.token_hex(4)}/prepared"
    fingerprint = prepare(config_for(tmp_path, "char")).fingerprint
    prepared = prepare_with_beam(config_for(tmp_path, "char", prepared_folder=store), HERE)
    assert prepared.fingerprint == fingerprint
    assert [str(path) for path in locate(store).iterdir() if any(path.iterdir())] == [prepared.stored_in]


# Errors.


@pytest.mark.parametrize("options", [HERE, pytest.param(("--direct_num_workers=2",), marks=pytest.mark.slow)])
def test_what_is_wrong_with_a_file_arrives_as_without_beam(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    config = config_for(tmp_path, "byte", train="*.txt")  # No vocabulary for which the file would be read before.
    (tmp_path / "2.txt").write_bytes(b"a\nb\0c")
    with pytest.raises(UserError) as expected:
        prepare(config)
    with pytest.raises(UserError) as error:
        prepare_with_beam(config, options)
    assert str(error.value) == str(expected.value)
    assert str(error.value).startswith("2.txt: NUL byte at byte offset 3")
    assert list((tmp_path / "prepared").iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [{"min_bytes": 10_000}, {"held_out_fraction": 1e-9}, {"max_broken_fraction": 0.01}],
    ids=lambda data: str(data),
)
def test_text_that_is_wrong_as_a_whole_is_refused_as_without_beam(tmp_path, data):
    (tmp_path / "5.jsonl").write_text("wrong\n" * 90 * ("max_broken_fraction" in data))
    config = config_for(tmp_path, "byte", **data)
    with pytest.raises(UserError) as expected:
        prepare(config)
    with pytest.raises(UserError) as error:
        prepare_with_beam(config, HERE)
    assert str(error.value) == str(expected.value)


def test_a_folder_that_workers_do_not_share_is_an_error_naming_it(tmp_path, monkeypatch):
    monkeypatch.setattr(beam, "_write_part", lambda *arguments: None)
    message = r"data\.prepared_folder='.*': no worker of Apache Beam has written its part of .*0\.txt there; name a"
    with pytest.raises(UserError, match=message):
        prepare_with_beam(config_for(tmp_path, "byte"), HERE)


def test_a_worker_that_does_not_see_the_folder_does_nothing(tmp_path):
    beam._write_part(tmp_path / "parts", __version__, (0, b""))
    assert list(tmp_path.iterdir()) == []


def test_workers_with_another_trainer_are_refused(tmp_path, monkeypatch):
    write = beam._write_part
    monkeypatch.setattr(beam, "_write_part", lambda parts, version, numbered: write(parts, "0.0.1", numbered))
    message = rf"A worker of Apache Beam has trainer {__version__}, and not 0\.0\.1; install the same version\."
    with pytest.raises(UserError, match=message):
        prepare_with_beam(config_for(tmp_path, "byte"), HERE)


def test_a_pipeline_that_cannot_run_is_an_error_with_the_reason(tmp_path, monkeypatch):
    def broken(*arguments):
        raise MemoryError("so much")

    monkeypatch.setattr(beam, "_write_part", broken)
    with pytest.raises(UserError, match=r"Apache Beam could not run the pipeline: .*so much"):
        prepare_with_beam(config_for(tmp_path, "byte"), HERE)
    assert list((tmp_path / "prepared").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("handler", ["default_int_handler", "SIG_IGN"])
def test_a_worker_process_that_is_killed_ends_the_pipeline(handler, tmp_path):
    program = (
        f"signal.signal(signal.SIGINT, signal.{handler})\n"
        "def die(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "beam._write_part, beam._PROGRESS_SECS = die, 0.1\n"
        "prepare_with_beam(config_for(Path(sys.argv[1]), 'byte'), ['--direct_num_workers=2'])"
    )
    assert run_python(program, tmp_path).stderr.strip().split("\n")[-1] == (
        "trainer.errors.UserError: Apache Beam: Worker subprocess exited with return code 137. If memory ran out, "
        "use fewer workers: -- --direct_num_workers=1"
    )
    assert list((tmp_path / "prepared").iterdir()) == []


def test_options_that_beam_refuses_are_an_error_naming_them(tmp_path):
    with pytest.raises(UserError, match=r"Apache Beam refuses --runner=NoSuch: .*NoSuch"):
        prepare_with_beam(config_for(tmp_path, "byte"), ["--runner=NoSuch"])


def test_without_apache_beam_the_error_shows_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r'--runner beam needs Apache Beam: pip install "gpt-trainer\[beam\]"'):
        prepare_with_beam(config_for(tmp_path, "byte"), [])


# Telling.


def test_the_number_of_parts_is_printed_every_few_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(beam, "_PROGRESS_SECS", 0.001)
    for name in ("000000-ab.json", "000000-cd.json", "000002-ef.json", "000003-gh.json.partial"):
        (tmp_path / name).touch()
    said, is_said = [], threading.Event()

    def say(line: str) -> None:
        said.append(line)
        is_said.set()

    with beam._watched(tmp_path, 7, say):
        assert is_said.wait(60)
    assert said[0] == "encoding: 2 of 7 parts, 0 s"


def test_options_of_beam_without_beam_are_refused(tmp_path, capsys):
    config = tmp_path / "config.toml"
    config.write_text("run_folder = 'x'\ntrain = {precision = 'float32', total_steps = 1}")
    assert main(["prepare", str(config), "--", "--direct_num_workers=2"]) == 2
    assert (
        "-- --direct_num_workers=2: these are options of Apache Beam; add --runner beam before the --."
        in capsys.readouterr().err
    )


def test_what_follows_two_dashes_goes_to_beam(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(
        verbs, "prepare_with_beam", lambda config, options, say: heard.append((config.data.min_bytes, options))
    )
    config = tmp_path / "config.toml"
    config.write_text("run_folder = 'x'\ntrain = {precision = 'float32', total_steps = 1}")
    assert main(["prepare", str(config), "--runner", "beam", "data.min_bytes=3", "--", "--runner=A", "b=c"]) == 0
    assert heard == [(3, ["--runner=A", "b=c"])]
