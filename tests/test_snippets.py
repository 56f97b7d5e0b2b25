"""Laws of what a newcomer copies: the commands and programs in README, docs, help texts, docstrings and the headers of
configs work as they are printed, in the order in which they are printed, in a checkout after scripts/quickstart.

Words in capitals, such as YOUR.txt, are the reader's to fill in, and this module fills them in. The checkout is a copy
whose configs describe tiny models. A command that needs other hardware, a service or an installation is not run: it is
parsed by what would read it, and DRY and DRY_WORDS give the reason. A command that this module does not know fails.
"""

import ast
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pyarrow
import pyarrow.parquet
import pytest
import tomli_w
import yaml
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tokenizers import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel

import trainer
import trainer.config.file
from trainer import cli, parser
from trainer.config.file import load_config, make_config
from trainer.config.refusals import setting_names
from trainer.config.settings import examples_per_replica
from trainer.errors import UserError
from trainer.hardware.devices import parse_target
from trainer.text.sources import open_source
from trainer.training.loop import TrainingResult

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "README.ko.md",
    "CONTRIBUTING.md",
    "docker/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
)
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
PROGRAMS = (
    *("trainer", ".venv", "scripts", "tests", "docker", "sbatch", "kubectl", "sky"),
    *("pip", "uv", "mkdir", "curl", "gcloud", "git", "python", "hf"),
)

# What a fenced block of a page can hold: commands, programs and settings; output and pictures are not run.
LANGUAGES = ("sh", "python", "toml", "text", "mermaid")

# What the reader puts in the place of words in capitals.
FILLED_IN = {
    "YOUR/*.txt.gz": "texts/*.txt.gz",
    "YOUR/*.txt": "texts/*.txt",
    "TRAIN/*.txt.gz": "texts/*.txt.gz",
    "VALIDATION.txt.gz": "texts/b.txt.gz",
    "TEXT/train/*.txt.gz": "texts/*.txt.gz",
    "TEXT/validation.txt.gz": "texts/b.txt.gz",
    "YOUR.txt": "texts/a.txt",
    "PROMPTS.txt": "texts/prompts.txt",
    "YOUR.jsonl.gz": "texts/c.jsonl",
    "/text/texts": "texts",
    "CONFIG": "configs/quickstart.toml",
    "RUN": "runs/quickstart",
    "PROMPT": "Once upon a time",
    # The last step of the tiny quickstart.
    "step_000001000": "step_000000025",
    "IMAGE": "gpt-trainer",
    "CLAIM": "runs",
    "HOST": "master",
    "ZONE": "us-central1-a",
    "NAME": "my-tpu",
    "--type TYPE": "--type v5litepod-8",
}


# Reading.


def blocks(text: str) -> Iterator[str]:
    """Yields the indented blocks of a docstring."""
    block: list[str] = []
    before = ""
    for line in [*text.split("\n"), "end"]:
        if line.startswith("    ") and (block or not before.strip()):
            block.append(line[4:])
        elif block and not line.strip():
            block.append("")
        elif block:
            yield "\n".join(block).rstrip()
            block = []
        before = line


def fenced_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yields the language and the text of each fenced block of a page; a block that could hide a command fails."""
    language, block = None, []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.startswith("```"):
            assert language is not None or not line.startswith("    "), f"line {number}: indented, not fenced: {line}"
            block.append(line)
        elif language is None:
            language, block = line.removeprefix("```"), []
            assert language in LANGUAGES, f"line {number}: {language!r} is not one of {LANGUAGES}"
        else:
            assert line == "```", f"line {number}: {line}"
            yield language, "\n".join(block)
            language = None
    assert language is None, f"a block of {language} has no end"


def blocks_of_page(name: str) -> Iterator[tuple[str, str]]:
    return fenced_blocks((ROOT / name).read_text(encoding="utf-8"))


def commands_of(block: str) -> list[str]:
    return [line for line in re.sub(r"\\\n *", "", block).split("\n") if line.strip()]


def inline_commands(name: str) -> list[str]:
    """The commands within the prose of a page that have arguments."""
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]
    # One word after the program, as in `trainer plan`, is the name of a verb.
    program = rf"(\w+=\S+ )*({'|'.join(map(re.escape, PROGRAMS))})(/\S*)?"
    return [span for span in spans if re.match(rf"{program} (\S+ \S|-)", span)]


def header_commands(path: Path) -> list[str]:
    """The commands in a config's header: lines of their own, and those within its sentences."""
    lines = [line[1:] for line in path.read_text(encoding="utf-8").split("\n") if line.startswith("#")]
    own = [line.strip() for line in lines if re.match(r"   (trainer|\.venv-tpu/|scripts/|curl|gcloud)\b", line)]
    sentences = " ".join(line.strip() for line in lines)
    found = own + re.findall(r"\((trainer [^)]*)\)", sentences)
    return [command.replace(".venv-tpu/", ".venv/") for command in found]


def expanded_by_zsh(command: str) -> list[str]:
    """The words of a command that zsh, macOS's shell, would not pass on: globs that match nothing are errors there, and
    # begins no comment in a command that is typed or pasted.
    """
    bare = re.sub(r"""\\.|'[^']*'|"[^"]*"|`[^`]*`""", lambda quoted: "x" * len(quoted[0]), command)
    return [
        command[word.start() : word.end()]
        for word in re.finditer(r"\S+", bare)
        if set(word[0]) & set("[]*?()^") or word[0].startswith("#")
    ]


def filled_in(command: str) -> str:
    for word, meant in FILLED_IN.items():
        command = command.replace(word, meant)
    return command


# A checkout.


def shrink(path: Path) -> None:
    """Makes a config a tiny one."""
    settings = tomllib.loads(path.read_text(encoding="utf-8"))
    settings.setdefault("model", {}).update(num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8)
    settings["train"] |= {"global_batch_size": 8, "steps_per_call": 20}
    settings["train"].pop("micro_batch_size", None)
    if "total_steps" in settings["train"]:
        settings["train"]["total_steps"] = 20
    settings.setdefault("data", {})["storybook_stories"] = 200
    settings["checkpoint"] = {"every_steps": 100}
    settings.setdefault("samples", {}).update(
        num_beams=2, num_tokens=4, samplers=["top-k"]
    )  # docs/tutorial.md prints this sample
    for section in ("evaluation", "samples"):
        settings.get(section, {}).pop("every_steps", None)
        settings.get(section, {}).pop("num_batches", None)
    settings.setdefault("optimizer", {})["warmup_steps"] = 2
    if settings["data"].get("held_out_fraction", 1) < 0.01:
        settings["data"]["held_out_fraction"] = 0.2  # A small part of a small text has no document.
    path.write_text(tomli_w.dumps(settings), encoding="utf-8")


def write_fineweb(folder: Path) -> None:
    """Writes small files with the names and columns of FineWeb's sample."""
    folder.mkdir(parents=True)
    for number in range(2):
        texts = [f"Page {i} of site {number} has news about cats.\n\nA cat sat on a mat." for i in range(40)]
        columns = {
            "text": texts,
            "id": [f"<urn:uuid:{number}-{i}>" for i in range(len(texts))],
            "dump": ["CC-MAIN-2021-04"] * len(texts),
            "url": [f"http://site{number}.test/{i}" for i in range(len(texts))],
            "date": ["2021-01-16T00:00:00Z"] * len(texts),
            "file_path": ["s3://commoncrawl/crawl-data/CC-MAIN-2021-04/segments/1.warc.gz"] * len(texts),
            "language": ["en"] * len(texts),
            "language_score": [0.9] * len(texts),
            "token_count": [20] * len(texts),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{number:03}_00000.parquet", row_group_size=10)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of tiny configs, with texts to fill in, as the working directory."""
    for name in ("configs", "scripts", "docker"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in (tmp_path / "configs").glob("*.toml"):
        shrink(path)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("".join(f"The {i} cats sat on a mat.\n" for i in range(300)), encoding="utf-8")
    (texts / "b.txt.gz").touch()
    (texts / "prompts.txt").write_text("once\n\nonce upon\n", encoding="utf-8")
    (texts / "c.jsonl").write_text('{"text": "A cat."}\n', encoding="utf-8")
    (tmp_path / "tinyshakespeare.txt").touch()
    write_fineweb(tmp_path / "data/fineweb/sample/10BT")
    (tmp_path / "data/gpt2").mkdir()
    vocabulary = {token: i for i, token in enumerate([*ByteLevel.alphabet(), "<|endoftext|>"])}
    ByteLevelBPETokenizer(vocabulary, []).save(str(tmp_path / "data/gpt2/tokenizer.json"))
    simplebooks = tmp_path / ".keras/datasets/simplebooks/simplebooks-92-raw"
    simplebooks.mkdir(parents=True)
    for name in ("train.txt", "valid.txt"):
        (simplebooks / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(trainer.config.file, "SHIPPED_CONFIGS", tmp_path / "configs")
    return tmp_path


# Checking without running.


def check_trainer(words: list[str]) -> None:
    """Has the real parsers read what follows `trainer`: its options, the config, the overrides and the text's place."""
    try:
        options = parser.parse(words)
    except SystemExit:
        raise AssertionError(f"trainer does not take {words}") from None
    run = getattr(options, "resume", None) or getattr(options, "run_folder", None)
    overrides = [word for word in getattr(options, "overrides", []) if word]
    if run is not None:
        # What `train --resume RUN x=y` reads as a config is an override, too.
        overrides += [word for word in [getattr(options, "config", None)] if word]
        if words[0] != "fork":
            trainer.config.file.check_resumable(overrides, run)
        make_config(SMALLEST, overrides)
    elif getattr(options, "config", None) is not None:
        config = load_config(options.config, overrides)
        if words[0] != "plan" and not any("://" in source for source in config.data.train):
            open_source(config.data)
    if getattr(options, "target", None) is not None:
        parse_target(options.target)
    if hasattr(options, "replicas"):
        assert all(number.isdecimal() for number in options.replicas.split(","))


SMALLEST: dict[str, Any] = {"run_folder": "runs/x", "train": {"precision": "float32", "total_steps": 3}}


def check_tensorboard(words: list[str]) -> None:
    assert (Path(sys.executable).parent / "tensorboard").exists()
    assert words[0] == "--logdir" and words[1].startswith(("runs", "gs://"))


def check_tests(words: list[str]) -> None:
    assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))


def check_docker(words: list[str]) -> None:
    if words[0] in ("stop", "buildx"):
        return
    if words[0] == "compose":
        check_compose(words[1:])
    elif words[0] == "build":
        assert Path(words[words.index("--file") + 1]).is_file()
        device = words[words.index("--tag") + 1].removeprefix("gpt-trainer:")
        assert f"packages-{device}\n" in DOCKERFILE
        assert device == "cpu" or f"DEVICE={device}" in words
    else:
        assert words[0] == "run"
        image = next(number for number, word in enumerate(words) if word.startswith("gpt-trainer"))
        if "--entrypoint" not in words:
            check_trainer(words[image + 1 :] or json.loads(re.findall(r"CMD (\[.*\])", DOCKERFILE)[0]))


def check_compose(words: list[str]) -> None:
    services = yaml.safe_load(Path(words[words.index("--file") + 1]).read_text(encoding="utf-8"))["services"]
    if "up" in words:
        assert set(words[words.index("up") + 1 :]) - {"--build"} <= services.keys()
    elif words[-1] != "stop":
        run, service = words.index("run"), next(number for number, word in enumerate(words) if word in services)
        assert words[run + 1] == "--rm" and set(words[run + 2 : service : 2]) <= {"--volume"}
        check_trainer(words[service + 1 :])


DOCKERFILE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")


def check_sky(words: list[str]) -> None:
    assert words[:2] == ["jobs", "launch"]
    task = yaml.safe_load(Path(words[2]).read_text(encoding="utf-8"))
    given = {word.split("=")[0] for before, word in itertools.pairwise(words) if before in ("--env", "--secret")}
    assert given == task["envs"].keys() | task["secrets"].keys()


def check_slurm(words: list[str]) -> None:
    script = words.index("scripts/launch/slurm")
    check_trainer(["train", "--or-resume", *words[script + 1 :]])


def check_launch(words: list[str]) -> None:
    assert words[0] == "-n" and words[2] == "trainer"
    check_trainer(words[3:])
    config = load_config(words[4], words[5:])
    examples_per_replica(config, int(words[1]))


def check_kubernetes(words: list[str]) -> None:
    words = words[: words.index("|")]
    printed = subprocess.run(["scripts/launch/kubernetes_job.py", *words], capture_output=True, text=True, check=True)
    assert json.loads(printed.stdout)["items"]
    check_trainer(words[words.index("trainer") + 1 :])


def check_tpu(words: list[str]) -> None:
    # It takes git's files along, so it runs where they are.
    command = [str(ROOT / "scripts/launch/tpu"), *words, *(["--dry-run"] if words != ["-h"] else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert words == ["-h"] or "gcloud compute tpus " in done.stdout
    if words[0] in ("train", "keep"):
        config = next(number for number, word in enumerate(words) if word.endswith(".toml"))
        check_trainer(["train", *words[config:]])


def check_program(words: list[str]) -> None:
    """A program with a description after it, as in a list."""


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for name, extra in re.findall(r"(\.|[\w-]+)\[(\w+)\]", " ".join(words)):
        assert f"\n{extra} =" in setup and (name == "." or f"\nname = {name}\n" in setup)
    assert all((ROOT / lock).is_file() for before, lock in itertools.pairwise(words) if before == "--constraint")


def check_python(words: list[str]) -> None:
    assert words[:2] == ["-m", "pip"]
    check_pip(words[2:])


def check_uv(words: list[str]) -> None:
    assert words[0] == "pip"
    check_pip(words[1:])


def check_eval(words: list[str]) -> None:
    """A shell evaluates what a command prints."""
    (printed,) = words
    check_trainer(shlex.split(printed.removeprefix("$(trainer ").removesuffix(")")))


def check_hub(words: list[str]) -> None:
    assert words[0] == "download"
    program = Path(sys.executable).parent / "hf"
    known = subprocess.run([program, "download", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(word in known for word in words if word.startswith("--"))


# Programs that are not run here, what is checked in their place, and why.
DRY: dict[str, tuple[Callable[[list[str]], None], str]] = {
    ".venv/bin/tensorboard": (check_tensorboard, "serves until it is stopped"),
    "scripts/quickstart": (
        check_program,
        "installs; tests/test_scripts.py runs it with that taken out, and CI in full",
    ),
    "scripts/test": (check_tests, "is what runs this"),
    "docker": (check_docker, "needs Docker"),
    "sky": (check_sky, "needs SkyPilot and a cloud; tests/test_sky.py runs what it would run"),
    "sbatch": (check_slurm, "needs SLURM; tests/test_scripts.py runs the script with a fake one"),
    "scripts/launch/local.py": (check_launch, "takes three trainings; tests/test_replicas.py has such"),
    "scripts/launch/kubernetes_job.py": (check_kubernetes, "needs a cluster to start what it prints"),
    "scripts/launch/tpu": (check_tpu, "needs Google Cloud; run with --dry-run"),
    "pip": (check_pip, "installs"),
    "python": (check_python, "installs"),
    "uv": (check_uv, "installs"),
    "eval": (check_eval, "changes the shell; tests/test_completion.py"),
    "gcloud": (check_program, "needs Google Cloud; tests/test_tpu_script.py has its parser read them"),
    "git": (check_program, "needs the address of the repository"),
    "mkdir": (check_program, "makes folders for Docker"),
    "curl": (check_program, "needs the internet"),
    "hf": (check_hub, "needs the internet"),
}
SCRIPTS = sorted(
    path
    for path in [*(ROOT / "scripts").rglob("*"), *(ROOT / "tests").rglob("*")]
    if path.is_file() and os.access(path, os.X_OK)
)
for path in SCRIPTS:
    why = "takes long, or installs; the tests of scripts have each"
    DRY.setdefault(str(path.relative_to(ROOT)), (check_program, why))

# The runs that a page's commands and programs make: at least these.
MAKES = {
    "README.md": ("quickstart", "mine", "python"),
    "README.ko.md": ("quickstart", "mine", "korean"),
    "docs/python.md": ("python", "own_model"),
    "docs/tutorial.md": ("tutorial",),
}

# Words that make a command of `trainer` one that is only parsed here, and why.
DRY_WORDS = {
    "verify": "splits the CPU, which a process can do only before it uses TensorFlow; tests/test_verify.py",
    "distribution.logical_devices": "splits the CPU, too; tests/test_loop.py",
    "distribution.gpus": "needs GPUs",
    "gs://": "needs an object store; tests/test_storage.py",
    "--compile": "installs a compiler; tests/test_compile.py",
    "doctor": "computes in a process of its own; tests/test_doctor.py",
    "--runner": "needs a cluster; tests/test_beam.py",
    "--download": "needs the internet; tests/test_downloads.py",
    "fork": "takes thousands of steps; tests/test_fork.py",
    "log.trackers": "needs the tracker's package; tests/test_trackers.py",
    "train.total_steps=3000": "takes as many steps; tests/test_run_changes.py",
    "compare": "needs two runs; tests/test_compare_runs.py",
    "init.from": "trains a whole config; tests/test_starting_weights.py",
}


def check_or_run(command: str, run_verbs: bool = False) -> None:
    """Runs a command, or checks it if it is listed above; a program that is not listed fails."""
    # In the lists of a script's header, what follows this many blanks describes the command; elsewhere a comment does.
    command = re.split(r" {8,}|    TYPE:" if command.startswith("scripts/launch/tpu ") else r" {3,}", command)[0]
    words = shlex.split(filled_in(command), comments=True)
    while re.match(r"\w+=", words[0]):  # A variable of the environment.
        del words[0]
    program, words = words[0].removeprefix(".venv/bin/").replace("tensorboard", ".venv/bin/tensorboard"), words[1:]
    if program != "trainer":
        assert program in DRY, f"no test knows how to check {command!r}"
        if program.startswith(("scripts/", "tests/")):
            assert os.access(ROOT / program, os.X_OK), command
        DRY[program][0](words)
        return
    words = words[: words.index("|")] if words[-2:] == ["|", "source"] else words  # fish evaluates what is printed.
    check_trainer(words)
    if run_verbs and not any(dry in word for dry in DRY_WORDS for word in words):
        assert cli.main(words) == 0, command


def check_toml(block: str) -> None:
    """Loads a block of settings; one whose first line is the name of a file is a whole config, and is written there."""
    name = re.match(r"# (\S+\.toml)\n", block)
    if name is None:
        make_config(SMALLEST | tomllib.loads(block))
        return
    path = Path(name[1])
    path.write_text(filled_in(block), encoding="utf-8")
    open_source(load_config(path).data)
    shrink(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_works_as_printed_from_top_to_bottom(checkout: Path, name: str, capsys: pytest.CaptureFixture[str]):
    if "runs/quickstart" in filled_in((ROOT / name).read_text(encoding="utf-8")):
        # What scripts/quickstart does once it has installed.
        assert cli.main(["train", "configs/quickstart.toml"]) == 0
    namespace: dict[str, Any] = {}
    for language, block in blocks_of_page(name):
        if language == "python":
            exec(block.replace("n_trials=20", "n_trials=1"), namespace)
        elif language == "toml":
            check_toml(block)
        elif language == "sh":
            for command in commands_of(block):
                check_or_run(command, run_verbs=True)
    assert all((checkout / "runs" / run / "result.json").exists() for run in MAKES.get(name, ()))
    assert name not in MAKES or "Once upon a time" in capsys.readouterr().out
    if name == "docs/settings.md":
        check_sweep(namespace)


def check_sweep(namespace: dict[str, Any]) -> None:
    """A pruner stops a trial of the sweep at its first score, and each trial is in the tab HParams. Ctrl-C ends it."""
    study = namespace["study"]
    study.pruner = optuna.pruners.ThresholdPruner(upper=0.0)
    study.optimize(namespace["objective"], n_trials=1)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    whole, pruned = (list(trial.intermediate_values) for trial in study.trials)
    assert (len(pruned), pruned) == (1, whole[:1])
    for trial in study.trials:
        events = EventAccumulator(f"runs/sweep/{trial.number}/logs/validation").Reload()
        start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        found = HParamsPluginData.FromString(start).session_start_info.hparams
        assert found["optimizer.learning_rate"].number_value == trial.params["rate"]
        assert found["model.num_layers"].number_value == trial.params["layers"]
    # What a run returns that Ctrl-C has stopped: it has no score.
    stopped = TrainingResult("runs/sweep/2", model=None, step=1, samples={}, is_stopped=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "train", lambda config, callbacks: stopped)
        study.optimize(namespace["objective"], n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "FAIL"]


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_a_page_are_read_by_what_would_run_them(checkout: Path, name: str):
    for language, block in blocks_of_page(name):
        if language == "toml":
            check_toml(block)
        elif language == "python":
            compile(block, name, "exec")
        elif language == "sh":
            for command in commands_of(block):
                check_or_run(command)
    for command in inline_commands(name):
        check_or_run(command)


@pytest.mark.parametrize(
    "command",
    [
        "trian train configs/quickstart.toml",
        "scripts/quikstart",
        "trainer trian configs/quickstart.toml",
        "trainer generate runs/quickstart --smapler top-p",
        "scripts/test tests/test_nothing.py",
        'pip install -e ".[cude]"',
    ],
)
def test_a_command_with_a_slip_is_seen(checkout: Path, command: str):
    with pytest.raises(AssertionError):
        check_or_run(command)


def test_a_slip_in_a_command_s_settings_is_seen(checkout: Path):
    with pytest.raises(UserError, match=r"train\.total_stepz"):
        check_or_run("trainer train configs/quickstart.toml train.total_stepz=3")
    with pytest.raises(UserError, match=r"model\.num_layer "):
        check_toml("[model]\nnum_layer = 3")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```bash\ntrainer\n```", "'bash' is not one of"),
        ("```\ntrainer\n```", "'' is not one of"),
        ("text\n\n    trainer train\n", "indented, not fenced"),
        ("```sh\ntrainer\n", "has no end"),
    ],
)
def test_a_block_of_a_page_that_could_hide_a_command_is_seen(page: str, message: str):
    with pytest.raises(AssertionError, match=message):
        list(fenced_blocks(page))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_s_header_has_commands_that_fit_it(checkout: Path, path: Path):
    commands = header_commands(path)
    assert any(f"configs/{path.name}" in command for command in commands)
    for command in commands:
        check_or_run(command)


@pytest.mark.slow
def test_the_package_s_docstring_is_a_program_that_works(checkout: Path, capsys: pytest.CaptureFixture[str]):
    assert trainer.__doc__ is not None
    (program,) = blocks(trainer.__doc__)
    exec(program, {})
    assert "Once upon a time" in capsys.readouterr().out


def help_of(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    return capsys.readouterr().out


VERBS = (
    *("prepare", "train", "inspect", "evaluate", "generate", "export", "verify", "plan", "doctor"),
    *("runs", "report", "compare"),
)


@pytest.mark.parametrize("verb", VERBS)
def test_help_s_examples_are_taken(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
):
    text = help_of([verb], capsys, monkeypatch)
    sections = {name.partition(".")[0] for name in setting_names() if "." in name}
    for override in re.findall(rf"\b((?:{'|'.join(sections)})\.\w+=[^\s,;)]+)", text):
        load_config("quickstart", [override])
    for name in re.findall(r"shipped config, such as (\w+)", text):
        load_config(name)
    for target in re.findall(r"\b(?:gpu|tpu):[\w-]+", text):
        parse_target(target)
    if verb == "prepare":
        (options,) = re.findall(r"for example: -- (.*?)\. Every", text)
        check_trainer(["prepare", "quickstart", "--runner", "beam", "--", *filled_in(options).split()])


def script_commands(path: Path) -> list[str]:
    """The commands in a script's header or docstring, without the optional parts, which stand in brackets; and what
    scripts/quickstart prints at its end.
    """
    text = path.read_text(encoding="utf-8")
    if "python" in text.split("\n")[0]:
        found = [line for block in blocks(ast.get_docstring(ast.parse(text)) or "") for line in commands_of(block)]
    else:
        lines = text.split("\n")
        found = [line[4:] for line in lines if line.startswith("#   ")]
        found += [line.strip() for line in lines if line.startswith("    .venv/bin/t")]
    found = [re.sub(r"\[[^]]*\]", "", line).replace(".venv-tpu/", ".venv/") for line in found]
    return [line for line in found if line.split()[0].split("/")[0] in PROGRAMS]


@pytest.mark.parametrize("path", [path for path in SCRIPTS if script_commands(path)], ids=lambda path: path.name)
def test_a_script_s_own_examples_are_read_by_what_would_run_them(checkout: Path, path: Path):
    for command in script_commands(path):
        check_or_run(command.replace("$runs", "runs").replace("$run", "runs/quickstart"))


def shell_lines() -> Iterator[tuple[str, str]]:
    """Yields where it stands and the command, for each that a reader may copy into a shell; overrides, too."""
    for name in PAGES:
        for language, block in blocks_of_page(name):
            if language == "sh":
                yield from ((name, command) for command in commands_of(block))
        text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
        spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", text)]
        # TOML has blanks around the =; an option's form is what stands in brackets.
        yield from ((name, span) for span in spans if re.match(rf"['\"]?({SECTIONS})\.[\w.]+=\S", span))
        yield from ((name, command) for command in inline_commands(name))
    for path in CONFIGS:
        yield from ((path.name, command) for command in header_commands(path))
    for path in SCRIPTS:
        yield from ((path.name, command) for command in script_commands(path))


SECTIONS = "|".join({name.partition(".")[0] for name in setting_names() if "." in name})


def test_every_command_and_override_to_copy_is_quoted_so_that_zsh_takes_it():
    assert [(where, line) for where, line in shell_lines() if expanded_by_zsh(line)] == []


@pytest.mark.parametrize(
    ("line", "expanded"),
    [
        ("trainer train a.toml distribution.gpus=[0,1] x=1", ["distribution.gpus=[0,1]"]),
        ("trainer train data.train=a/*.txt", ["data.train=a/*.txt"]),
        ("trainer plan a.toml # what it costs", ["#"]),
        ("""trainer train 'data.train=a/*.txt' "distribution.gpus=[0,1]" "$(id)" -t 'a?'""", []),
        (r"trainer train data.train=\[a,b\] run_folder=a#b", []),
    ],
)
def test_what_zsh_would_expand_is_seen(line: str, expanded: list[str]):
    assert expanded_by_zsh(line) == expanded


# `trainer VERB`, with or without --resume, at the end of a piece of a message.
BEFORE_A_WORD = re.compile(r"\btrainer [a-z]+( --resume| --or-resume)? $")


def test_advice_in_messages_help_and_comments_is_quoted_so_that_zsh_takes_it():
    bare = re.compile(rf"(?<![\w.'\"])(?:{SECTIONS})\.[\w.]+=(?:\[|[\w/.]*\*)\S*")
    sources = [*(ROOT / "trainer").rglob("*.py"), *CONFIGS, *SCRIPTS]
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    assert {(path.name, found) for path, text in texts.items() for found in bare.findall(text)} == set()
    for path in (ROOT / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(texts[path])):
            values = node.values if isinstance(node, ast.JoinedStr) else []
            for before, after in itertools.pairwise(values):
                if isinstance(before, ast.Constant) and BEFORE_A_WORD.search(str(before.value)):
                    assert isinstance(after, ast.FormattedValue)
                    word = ast.unparse(after.value)
                    assert word.startswith(("quoted(", "shlex.quote(")), f"{path.name}, line {node.lineno}: {word}"
