import argparse
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from trainer.cli import main
from trainer.completion import completed_parser, configs, overrides, runs, settings, steps
from trainer.config.refusals import setting_names
from trainer.config.settings import Config, TrainConfig

TOKENIZERS = Config.model_fields["tokenizer"].annotation
NOTHING = argparse.Namespace()
BASH = """
PATH={bin}:$PATH
eval "$(trainer completion bash)"
while read -r line; do
    COMP_LINE=$line COMP_POINT=${{#line}} COMP_TYPE=9 COMPREPLY=()
    _python_argcomplete trainer 2>&1
    echo "${{COMPREPLY[*]}}"
done
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run that has two checkpoints, a folder with a run, and files."""
    for run in ("runs/one", "runs/more/two"):
        (tmp_path / run / "checkpoints/step_000000100").mkdir(parents=True)
        (tmp_path / run / "run.json").touch()
    (tmp_path / "runs/one/checkpoints/step_000000020").mkdir()
    for name in ("mine.toml", "mine.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_bash_completes_verbs_options_configs_settings_values_and_runs(folder: Path):
    expected = {
        "trainer pre": "prepare ",
        "trainer plan m": "minigpt minigpt_fast mine.toml",
        "trainer train quickstart train.total_": "train.total_steps=",
        "trainer train quickstart train.precision=mixed_f": "mixed_float16 ",
        "trainer train --resume runs/one samples.pro": "samples.prompt=",
        "trainer generate runs/": "runs/more/ runs/one",
        "trainer generate runs/one --step 1": "100 ",
    }
    done = subprocess.run(
        ["bash", "-c", BASH.format(bin=Path(sys.executable).parent)],
        input="".join(f"{line}\n" for line in expected),
        capture_output=True,
        text=True,
        check=True,
    )
    assert dict(zip(expected, done.stdout.splitlines(), strict=True)) == expected
    assert done.stderr == ""


def test_a_program_for_each_shell_is_printed(capsys: pytest.CaptureFixture[str]):
    for shell, line in (
        ("bash", "-F _python_argcomplete trainer"),
        ("zsh", "compdef _python_argcomplete trainer"),
        ("fish", "complete --command trainer"),
    ):
        assert main(["completion", shell]) == 0
        assert line in capsys.readouterr().out


def test_every_setting_is_completed_and_the_values_of_those_that_have_a_few():
    assert set(settings()) == set(setting_names())
    assert set(overrides("")) == {f"{name}=" for name in setting_names()}
    precisions = get_args(TrainConfig.model_fields["precision"].annotation)
    assert overrides("train.precision=") == [f"train.precision={each}" for each in precisions]
    assert overrides("model.tied_embeddings=") == ["model.tied_embeddings=true", "model.tied_embeddings=false"]
    kinds = {get_args(each)[0].model_fields["kind"].annotation for each in get_args(TOKENIZERS)}
    assert {each.partition("=")[2] for each in overrides("tokenizer.kind=")} == {get_args(kind)[0] for kind in kinds}
    assert overrides("train.total_steps=") == overrides("no.such_setting=") == []


def test_paths_are_completed_as_they_are_written(folder: Path):
    assert list(configs("m", NOTHING))[-1] == "mine.toml" and "quickstart" in configs("", NOTHING)
    assert list(configs("./r", NOTHING))[-1] == "./runs/"
    assert runs("r") == ["runs/"] and runs("runs/") == ["runs/more/", "runs/one"]
    assert runs(f"{folder}/runs/more/") == [f"{folder}/runs/more/two"] and runs("nothing/") == []
    assert overrides("data.train=mi") == ["data.train=mine.toml", "data.train=mine.txt"]
    assert overrides("run_folder=runs/o") == ["run_folder=runs/one/"]
    assert steps(argparse.Namespace(run_folder="runs/one")) == ["best", "20", "100"]
    assert steps(NOTHING) == steps(argparse.Namespace(run_folder="nothing")) == []


def test_the_words_of_options_are_those_of_their_help():
    verbs = completed_parser()._subparsers._group_actions[0].choices
    options = {action.dest: action for verb in verbs.values() for action in verb._actions if action.help}
    for name in ("to", "sampler", "dtype"):
        words = options[name].completer(prefix="", parsed_args=NOTHING)
        assert words and all(word in options[name].help for word in words), name
