import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from trainer.cli import main
from trainer.config.file import make_config
from trainer.parser import parse
from trainer.runs.run_folder import FORMAT
from trainer.storybook.storybook import story, verdict
from trainer.system.manifest import sealed

ROOT = Path(__file__).parent.parent
MINIGPT = str(ROOT / "configs/minigpt.toml")

# Runs commands one after the other, and reports how each ended and what was loaded by then.
RUN = """
import json, sys
from trainer.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        status = main(arguments)
    except SystemExit as end:
        status = end.code
    print("ended:", json.dumps([status, sorted({"tensorflow", "keras", "keras_nlp", "numpy"} & set(sys.modules))]))
"""


def refusal(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("trainer: ")
    return captured.err


def unusable(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def taken_folder(path: Path) -> Path:
    path.mkdir()
    config = make_config({"run_folder": "x", "train": {"precision": "float32", "total_steps": 1}})
    facts = {"format": FORMAT, "config": config.model_dump(mode="json", exclude_none=True), "model": "gpt"}
    (path / "run.json").write_text(json.dumps(sealed(facts)))
    return path


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "trainer", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for verb in ("prepare", "train", "inspect", "evaluate", "generate", "plan"):
        assert f"    {verb} " in done.stdout


def test_a_message_is_short_and_does_not_control_the_terminal(capsys: pytest.CaptureFixture[str]):
    for name in ("\x1b[31mred", "long" * 5_000):
        said = [
            refusal(["prepare", f"{name}.toml"], capsys),
            refusal(["prepare", MINIGPT, f"tokenizer={{kind = 'bpe', path = '{name}'}}"], capsys),
            unusable([name], capsys),
            unusable(["plan", MINIGPT, "--target", name, "--utilisation", name], capsys),
        ]
        for message in said:
            assert "\x1b" not in message and max(map(len, message.split("\n"))) < 1_100
    assert refusal(["generate", " "], capsys).startswith("trainer: ' ': a path of blanks only")
    unknown = [f"x{i}=1" for i in range(500)]
    assert refusal(["prepare", MINIGPT, *unknown], capsys).count("\n") == 61
    # A long message keeps its start, what is wrong, and its end, what to do.
    assert refusal(["generate", "x" * 5_000], capsys).startswith("trainer: xxx")


def test_a_verb_that_does_not_need_tensorflow_does_not_load_it(tmp_path: Path):
    taken = taken_folder(tmp_path / "taken")
    commands: list[tuple[list[str], int]] = [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["--version"], 0),
        (["plan", MINIGPT, "--target", "tpu:v5e-8", "--weights"], 0),
        (["train", MINIGPT, "train.total_step=1"], 2),
        (["prepare", "nothing.toml"], 2),
        (["train", MINIGPT, f"run_folder={taken}"], 2),
        (["train", MINIGPT, "--or-resume", f"run_folder={taken}"], 2),
        (["train", "--resume", str(tmp_path)], 2),
        (["evaluate", str(tmp_path)], 2),
        (["generate", str(tmp_path)], 2),
        (["generate", str(taken), "--num-samples", "3", "--sampler", "greedy"], 2),
        (["generate", str(taken), "--k", "1"], 2),
        (["train", MINIGPT, f"data.train={tmp_path}/nothing.txt"], 2),
        (["train", MINIGPT, "data.train=storybook", f"tokenizer.path={tmp_path}/nothing.json"], 2),
        (["prepare", MINIGPT, f"data.train={tmp_path}/nothing.txt"], 2),
        (["runs", str(tmp_path)], 0),
        (["report", str(taken)], 0),
        (["report", str(taken), "--html"], 0),
        (["compare", str(taken), str(tmp_path)], 2),
        (["completion", "fish"], 0),
    ]
    program = [sys.executable, "-c", RUN, json.dumps([arguments for arguments, _ in commands])]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended = [json.loads(line.removeprefix("ended:")) for line in done.stdout.splitlines() if line.startswith("ended:")]
    # The help needs no NumPy either; the verbs load it, which takes a twentieth of a second.
    assert [status for status, _ in ended] == [status for _, status in commands], done.stderr
    assert [loaded for _, loaded in ended] == [[]] * 3 + [["numpy"]] * (len(commands) - 3)


def test_without_a_verb_the_verbs_are_shown_and_another_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0 and "    train " in capsys.readouterr().out
    assert "VERB" in unusable(["--"], capsys)
    assert "invalid choice: 'trian'" in unusable(["trian"], capsys)


def test_config_error_is_printed_without_a_traceback(capsys: pytest.CaptureFixture[str]):
    error = refusal(["plan", MINIGPT, "model.num_head=3"], capsys)
    assert error == "trainer: model.num_head is not a setting. Did you mean model.num_heads?\n"


def test_plan_of_the_shipped_minigpt_has_the_tutorial_s_parameters(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", MINIGPT]) == 0
    assert "3,387,266" in capsys.readouterr().out


def test_plan_of_characters_needs_the_vocabulary_size(capsys: pytest.CaptureFixture[str]):
    error = refusal(["plan", MINIGPT, "tokenizer={kind='char'}"], capsys)
    assert "tokenizer.kind='char' takes its vocabulary from the text" in error and "--vocabulary-size" in error


def test_overrides_may_come_before_and_after_an_option(capsys: pytest.CaptureFixture[str]):
    before = ["plan", MINIGPT, "model.num_layers=1", "model.pre_norm=true", "--weights", "--vocabulary-size", "100"]
    after = ["plan", MINIGPT, "--vocabulary-size", "100", "--weights", "model.num_layers=1", "model.pre_norm=true"]
    around = ["plan", MINIGPT, "model.num_layers=1", "--vocabulary-size", "100", "model.pre_norm=true", "--weights"]
    tables = []
    for arguments in (before, after, around):
        assert main(arguments) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] == tables[2]
    assert "block_0" in tables[0] and "block_1" not in tables[0] and "final_norm" in tables[0]


def test_a_word_that_is_neither_an_option_nor_an_override_is_refused(capsys: pytest.CaptureFixture[str]):
    assert "unrecognized arguments: --steps" in unusable(["plan", MINIGPT, "--steps"], capsys)
    assert "unrecognized arguments: --steps=3" in unusable(["plan", MINIGPT, "--steps=3"], capsys)
    assert "unrecognized arguments: x=1" in unusable(["inspect", "RUN", "x=1"], capsys)
    # A run from other devices can be scored on this machine's; no other setting would have an effect.
    assert (
        "train.xla=on: evaluate changes only the devices of a run, distribution.*, and the place of its data"
        in refusal(["evaluate", "RUN", "train.xla=on"], capsys)
    )
    assert "'x' is not an override; write section.key=value." in refusal(["plan", MINIGPT, "x"], capsys)


def test_a_step_is_a_number_or_best_and_goes_with_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = taken_folder(tmp_path / "run")
    assert "--step 5 goes with --resume RUN" in refusal(["train", MINIGPT, "--step", "5"], capsys)
    folder = f"{run}/checkpoints/step_000000010"
    for verb in (["evaluate"], ["generate"], ["train", "--resume"]):
        refused = refusal([*verb, str(run), "--step", "bset"], capsys)
        assert "step='bset' is not a step of a checkpoint; give a number of steps, or 'best'." in refused
        assert f"{folder} and step='best' are two" in refusal([*verb, folder, "--step", "best"], capsys)


def test_a_second_prompt_is_refused(capsys: pytest.CaptureFixture[str]):
    assert "unrecognized arguments: b" in unusable(["generate", "RUN", "a", "b"], capsys)
    assert "unrecognized arguments: b" in unusable(["generate", "RUN", "a", "--seed", "1", "b"], capsys)


def test_generate_tells_devices_from_the_prompt_in_any_order(capsys: pytest.CaptureFixture[str]):
    devices = ["distribution.kind=cpu", "distribution.shard=nothing"]
    for words in (
        ["a", *devices],
        [*devices, "a"],
        [devices[0], "--seed", "1", devices[1], "a"],
        ["--k", "2", "a", *devices],
    ):
        options = parse(["generate", "RUN", *words])
        assert (options.text, options.overrides) == ("a", devices)
    options = parse(["generate", "RUN", *devices])
    assert (options.text, options.overrides) == (None, devices)
    assert parse(["generate", "RUN", "x=1"]).text == "x=1"
    assert parse(["generate", "RUN", "train.xla=on"]).text == "train.xla=on"
    for words in (["a", "train.xla=on"], [devices[0], "train.xla=on"], ["train.xla=on", "--k", "2", devices[0]]):
        refused = refusal(["generate", "RUN", *words], capsys)
        assert "train.xla=on: generate and load change only the devices, distribution.*; leave it out." in refused
    spaced = parse(["generate", "RUN", "data.weights.a =1", devices[0]])
    assert (spaced.text, spaced.overrides) == (None, ["data.weights.a =1", devices[0]])


@pytest.mark.parametrize("verb", ["train", "plan", "doctor"])
def test_histograms_of_weights_in_pieces_are_refused_before_anything_is_done(
    verb: str, capsys: pytest.CaptureFixture[str]
):
    given = ["distribution.shard=weights", "log.histograms_every_steps=5"]
    refused = refusal([verb, MINIGPT, *given], capsys)
    assert "log.histograms_every_steps=5 needs whole weights and gradients" in refused


def test_train_needs_a_config_or_a_run(capsys: pytest.CaptureFixture[str]):
    assert "train needs a config, such as quickstart or your own TOML file, or --resume RUN." in refusal(
        ["train"], capsys
    )


def test_resume_refuses_a_config_or_an_override_that_it_would_ignore(capsys: pytest.CaptureFixture[str]):
    error = refusal(["train", MINIGPT, "--resume", "RUN", "train.xla=on"], capsys)
    assert f"uses the config that the run was started with; leave out {MINIGPT!r}, or start a new run" in error
    error = refusal(["train", "--resume", "RUN", "train.seed=1"], capsys)
    assert "train.seed=1: a resumed run keeps the config that it was started with; only distribution.*, train." in error
    # A setting that does not change the model is allowed; then the run is missing.
    error = refusal(["train", "--resume", "RUN", "distribution.logical_devices=2"], capsys)
    assert "RUN is not a run folder" in error


def test_or_resume_needs_a_config_with_the_settings_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    error = refusal(["train", "--or-resume", "--resume", "RUN"], capsys)
    assert "--resume RUN and --or-resume: --or-resume goes with a config; leave out one." in error
    assert "train needs a config" in refusal(["train", "--or-resume"], capsys)
    taken = taken_folder(tmp_path / "taken")
    error = refusal(["train", MINIGPT, "--or-resume", f"run_folder={taken}", "log.every_steps=3"], capsys)
    assert f"run_folder='{taken}' holds a run that was started with other settings: data.train=[" in error
    assert "(was ['storybook'])" in error and "log.every_steps" not in error.split("Go on with")[0]


def test_taken_run_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    taken = taken_folder(tmp_path / "taken")
    error = refusal(["train", MINIGPT, f"run_folder={taken}"], capsys)
    assert f"run_folder='{taken}' already holds a run. Go on with it: trainer train --resume {taken}; or start" in error


@pytest.mark.parametrize("verb", [["evaluate"], ["generate"], ["train", "--resume"]])
def test_a_folder_that_is_not_a_run_is_refused_with_the_runs_near_it(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    taken, beside = taken_folder(tmp_path / "taken"), tmp_path / "beside"
    error = refusal([*verb, str(beside)], capsys)
    assert error == f"trainer: {beside} is not a run folder: it has no run.json. Runs near it: {taken}.\n"


def test_generating_the_same_text_several_times_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = str(taken_folder(tmp_path / "run"))
    error = refusal(["generate", run, "--num-samples", "3", "--sampler", "greedy"], capsys)
    assert "num_samples=3: greedy always writes the same text; ask for 1." in error
    assert "num_samples=0 must be at least 1." in refusal(["generate", run, "--num-samples", "0"], capsys)


@pytest.mark.parametrize("number", ["9" * 5_000, "\u0663", "-1", "1e3", "0"])
def test_a_number_that_an_option_does_not_accept_is_refused(number: str, capsys: pytest.CaptureFixture[str]):
    assert "must be at least two numbers, such as 1,2,4." in refusal(
        ["verify", MINIGPT, "--replicas", f"1,{number}"], capsys
    )
    assert "is unknown" in refusal(["plan", MINIGPT, "--target", f"gpu:H100x{number}"], capsys)
    assert "v5e does not come with this number" in refusal(["plan", MINIGPT, "--target", f"tpu:v5e-{number}"], capsys)


def test_a_number_of_replicas_is_not_compared_with_itself(capsys: pytest.CaptureFixture[str]):
    error = refusal(["verify", MINIGPT, "--replicas", "1,2,01"], capsys)
    assert "--replicas 1,2,01 names a number twice; leave out the second one." in error


def test_a_mistake_in_the_options_of_generate_is_reported_before_tensorflow_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = str(taken_folder(tmp_path / "run"))
    for arguments, message in (
        (
            ["--sampler", "top_k"],
            "'top_k' is not a sampler; choose one of greedy, beam, random, top-k, top-p, min-p. Did you",
        ),
        (["--k", "1"], "k=1 has no effect with the sampler top-p, only with top-k and random; choose another"),
        (["--temperature", "2", "--sampler", "greedy"], "temperature=2.0 has no effect with the sampler greedy"),
        (["--temperature", "1e38"], "temperature=1e+38 is impossible; give a number from 1e-06 to 1e+06."),
        (
            ["--seed", "1", "once", "--prompt", "upon"],
            "PROMPT 'once' and --prompt 'upon' are two ways to give prompts; leave out one.",
        ),
        (
            ["once", "--prompt", "upon"],
            "PROMPT 'once' and --prompt 'upon' are two ways to give prompts; leave out one.",
        ),
        (["once", "--prompts", "f"], "PROMPT 'once' and --prompts 'f' are two ways to give prompts; leave out one."),
        (["--prompts", f"{run}/none.txt"], f"{run}/none.txt"),
        (["--sampler", "top-k", "--k", "1", "--num-samples", "2"], "top-k with k=1 always writes the same text"),
    ):
        assert message in refusal(["generate", run, *arguments], capsys)


def test_a_sample_is_called_a_story_or_the_place_where_it_leaves_the_grammar_is_named():
    assert verdict(story(0, 0)) == "a story of the storybook's grammar"
    words = story(0, 0).split(" ")
    words[3] = "xylophone"
    assert verdict(" ".join(words)) == f"leaves the storybook's grammar at 'xylophone', after {' '.join(words[:3])!r}"


TINY = """
[data]
train = "text.txt"
documents = "file"
mode = "packed"
held_out_fraction = 0.2
[tokenizer]
kind = "char"
[model]
num_layers = 1
num_heads = 2
hidden_dim = 8
intermediate_dim = 8
[train]
precision = "float32"
total_steps = {total_steps}
global_batch_size = 4
sequence_length = 8
steps_per_call = 5
[log]
every_steps = 5
[checkpoint]
every_steps = 1000000
[samples]
num_tokens = 2
num_beams = 1
"""


def start_training(folder: Path, total_steps: int) -> subprocess.Popen[str]:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog .\n" * 40)
    (folder / "tiny.toml").write_text(TINY.format(total_steps=total_steps))
    # Tests behind nohup ignore SIGHUP, and so would what they start.
    heeding = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", heeding, sys.executable, "-m", "trainer", "train", "tiny.toml"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, stdout=pipe, stderr=pipe, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


@pytest.mark.slow
def test_training_continues_after_the_reader_of_its_output_has_gone_away(tmp_path: Path):
    with start_training(tmp_path, total_steps=60) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert (
        errors
        == "trainer: standard output cannot be written (its reader has gone away); training continues without it.\n"
    )
    assert (tmp_path / "runs/tiny/checkpoints/step_000000060/manifest.json").is_file()
    assert json.loads((tmp_path / "runs/tiny/result.json").read_text())["step"] == 60


@pytest.mark.slow
def test_a_closed_terminal_saves_and_exits_75_and_so_does_a_signal_while_a_run_is_resumed(tmp_path: Path):
    with start_training(tmp_path, total_steps=10**9) as process:
        assert process.stdout is not None and process.stderr is not None
        while not process.stdout.readline().startswith("step 5/"):
            assert process.poll() is None, process.stderr.read()
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGHUP)
        try:
            assert process.wait(30) == 75
        finally:
            process.kill()
    (saved,) = (tmp_path / "runs/tiny/checkpoints").iterdir()
    assert int(saved.name.removeprefix("step_")) >= 5 and (saved / "manifest.json").is_file()
    assert not (tmp_path / "runs/tiny/lock").exists()  # It is there again once the run is held.
    resumed = [sys.executable, "-m", "trainer", "train", "--resume", "runs/tiny"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(resumed, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        while not (tmp_path / "runs/tiny/lock").exists():  # Taken before the model is built.
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and "Go on with: trainer train --resume runs/tiny" in errors, errors
