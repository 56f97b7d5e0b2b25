"""What a resumed run may change: whatever leaves the weights as they are, and its length if its past stays the same."""

import shlex
from pathlib import Path

import pytest
from tiny import quiet, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path
from tiny_run import (  # type: ignore[import-not-found]  # pytest has this folder on its path
    assert_same_bits,
    prepared_text,
    save_checkpoint,
    saved,
    text_run,
    tiny,
)

import trainer
from trainer.cli import main
from trainer.config.file import load_config
from trainer.errors import UserError
from trainer.runs.fork import plan_fork
from trainer.runs.results import read_scores, write_scores
from trainer.runs.run_changes import changes_of, check_length, has_other_scores, newest_step, record_changes
from trainer.runs.run_checkpoints import find_checkpoint, load_model, open_checkpoints
from trainer.runs.run_folder import RunFolder, find_run, steps_in
from trainer.training import launch


@pytest.mark.slow
def test_an_extended_run_equals_the_longer_run_bit_for_bit(tmp_path: Path):
    evaluated = ("optimizer.warmup_steps=2", "evaluation.every_steps=2")
    trainer.train(text_run(tmp_path, "long", "train.total_steps=6", *evaluated), say=quiet)
    trainer.train(text_run(tmp_path, "short", *evaluated), say=quiet)
    run, long = tmp_path / "short", tmp_path / "long"
    assert (run / "result.json").exists()
    assert trainer.resume(str(run), say=quiet, overrides=["train.total_steps=6"]).step == 6
    assert_same_bits(saved(run, 6), saved(long, 6))
    scores = read_scores(RunFolder(run))
    assert {step: scores[step] for step in (2, 4, 6)} == read_scores(RunFolder(long))
    assert load_config(run / "config.toml").train.total_steps == 6
    assert RunFolder(run).facts["changes"] == [{"step": 3, "changed": ["train.total_steps=6 (was 3)"]}]
    # The new length stays, and the checkpoints of before stay checkpoints of this run.
    again = RunFolder(run)
    assert again.config.train.total_steps == 6
    assert [open_checkpoints(again).of_step(step).step for step in (1, 3, 6)] == [1, 3, 6]


@pytest.mark.slow
def test_a_run_before_its_decay_is_extended_and_cooled_down_to_the_bits_of_the_run_of_that_length(tmp_path: Path):
    decay = ("optimizer.schedule=wsd", "optimizer.warmup_steps=2", "optimizer.decay_steps=2")
    rare = ("checkpoint.every_steps=100", "checkpoint.keep_last=1")
    trainer.train(text_run(tmp_path, "long", "train.total_steps=6", *decay), say=quiet)
    trainer.train(text_run(tmp_path, "short", "train.total_steps=4", *decay, *rare), say=quiet)
    long, short = tmp_path / "long", tmp_path / "short"
    # The last checkpoint before the decay is made and kept, though no cadence is due and one is kept.
    assert steps_in(short / "checkpoints") == [2, 4]
    cooled = trainer.fork(f"{long}@2", [f"run_folder={tmp_path}/cooled", "train.total_steps=4"], say=quiet)
    assert_same_bits(saved(cooled.run_folder, 4), saved(short, 4))
    assert trainer.resume(str(short), say=quiet, overrides=["train.total_steps=6"], step=2).step == 6
    assert_same_bits(saved(short, 6), saved(long, 6))
    assert steps_in(short / "checkpoints") == [4, 6]


def test_a_run_after_its_decay_names_the_checkpoint_before_it(tmp_path: Path):
    decay = ("optimizer.schedule=wsd", "optimizer.decay_steps=3", "train.total_steps=9")
    run = RunFolder.create(tiny(tmp_path, *decay), prepared_text(tmp_path))
    longer = RunFolder(run.path, ["train.total_steps=12"])
    check_length(longer, 6)
    no_step_left = r"other learning rates\. Make a fork, which goes on from here .* trainer fork \S+/run@9 "
    with pytest.raises(UserError, match=no_step_left):
        check_length(longer, 9)
    for step in (5, 6, 9):
        save_checkpoint(run, step)
    with pytest.raises(UserError) as error:
        check_length(longer, 9)
    assert str(error.value) == (
        "train.total_steps=12 (was 9): optimizer.schedule='wsd' depends on the length, so the 9 steps that are taken "
        "would have had other learning rates. The checkpoint of step 6 is from before the decay. Fork it, and the fork "
        f"ends as the run that has this length from the start: trainer fork {run.path}@6 run_folder={run.path}-2 "
        "train.total_steps=12"
    )
    # A shorter run would have begun its decay earlier, at step 5.
    with pytest.raises(UserError, match=r"The checkpoint of step 5 is from before the decay\."):
        check_length(RunFolder(run.path, ["train.total_steps=8"]), 7)


def test_or_resume_takes_the_length_of_the_config(tmp_path: Path):
    RunFolder.create(tiny(tmp_path, "train.total_steps=3"), prepared_text(tmp_path))
    longer = tiny(tmp_path, "train.total_steps=4", "samples.prompt=the")
    found = find_run(longer, or_resume=True)
    assert found is not None
    check_length(found, 3)
    assert changes_of(found) == ["train.total_steps=4 (was 3)", "samples.prompt='the' (was '')"]
    record_changes(found, 3, 9, quiet)
    assert RunFolder(found.path).config == longer
    shorter = find_run(tiny(tmp_path, "train.total_steps=3", "samples.prompt=the"), or_resume=True)
    assert shorter is not None
    with pytest.raises(UserError, match=r"total_steps=3 \(was 4\): the run has taken 4 steps already\. Give at least"):
        check_length(shorter, 4)


@pytest.fixture
def cosine(tmp_path: Path) -> RunFolder:
    config = tiny(tmp_path, "optimizer.schedule=cosine", "train.total_steps=9", "optimizer.warmup_steps=3")
    return RunFolder.create(config, prepared_text(tmp_path))


def test_a_run_that_would_have_had_other_rates_is_not_extended_and_the_fork_is_named(
    cosine: RunFolder, capsys: pytest.CaptureFixture[str]
):
    longer = RunFolder(cosine.path, ["train.total_steps=12"])
    check_length(longer, 3)  # All rates so far are the warm-up's.
    with pytest.raises(UserError) as error:
        check_length(longer, 5)
    assert str(error.value).startswith(
        "train.total_steps=12 (was 9): optimizer.schedule='cosine' depends on the length, so the 5 steps that are "
        "taken would have had other learning rates. Make a fork, which goes on from here with the new schedule: "
    )
    words = shlex.split(str(error.value).rpartition("schedule: ")[2])
    assert words == [
        "trainer", "fork", f"{cosine.path}@5", f"run_folder={cosine.path}-2", "train.total_steps=12",
    ]  # fmt: skip
    # On the command line before TensorFlow is loaded: this run has no checkpoint that could be.
    save_checkpoint(cosine, 5)
    assert main(["train", "--resume", str(cosine.path), "train.total_steps=12"]) == 2
    assert "Make a fork, which" in capsys.readouterr().err


def test_a_run_may_get_shorter_down_to_the_steps_that_are_taken(tmp_path: Path):
    run = RunFolder.create(tiny(tmp_path, "train.total_steps=9"), prepared_text(tmp_path))
    shorter = RunFolder(run.path, ["train.total_steps=5"])
    check_length(shorter, 5)
    with pytest.raises(UserError, match=r"total_steps=5 \(was 9\): the run has taken 6 steps already\."):
        check_length(shorter, 6)
    # By epochs too, of which only the data tell the steps.
    epochs = RunFolder(run.path, ["train.num_epochs=2"])
    check_length(epochs, 6)
    with pytest.raises(UserError, match=r"total_steps=None \(was 9\); train.num_epochs=2 \(was None\): the run"):
        check_length(epochs, 6, before=9, now=5)


@pytest.mark.slow
def test_a_run_that_was_made_shorter_from_an_earlier_checkpoint_ends_at_its_new_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trainer.train(text_run(tmp_path, "run", "train.total_steps=5", "evaluation.every_steps=1"), say=quiet)
    folder = str(tmp_path / "run")
    write_scores(RunFolder(folder), {2: 3.0, 4: 0.5, 5: 0.0})
    assert trainer.resume(folder, say=quiet, overrides=["train.total_steps=3"], step=2).step == 3
    said: list[str] = []
    assert trainer.resume(folder, say=said.append).step == 3
    assert sorted(line for line in said if line.startswith("Skipping")) == [
        f"Skipping {folder}/checkpoints/step_00000000{step}: it is beyond train.total_steps=3." for step in (4, 5)
    ]
    assert read_scores(RunFolder(folder)).keys() == {2, 3}
    assert load_model(RunFolder(folder), say=quiet, step="best")[1].step == 3
    assert load_model(RunFolder(folder), say=quiet)[1].step == 3
    with pytest.raises(UserError, match=r"step 5 cannot be used: it is beyond train\.total_steps=3\.$"):
        load_model(RunFolder(folder), step=5)
    # The checks before TensorFlow count only the steps up to the end.
    longer = RunFolder(folder, ["train.total_steps=4"])
    check_length(longer, newest_step(longer))
    assert plan_fork(folder, [f"run_folder={folder}-2", "train.total_steps=4"]).config.train.total_steps == 4
    assert main(["train", "--resume", folder, "--step", "5"]) == 2
    assert "train.total_steps=3: the run has taken 5 steps already. Give at least" in capsys.readouterr().err


def test_checkpoints_of_another_length_are_of_another_run_if_their_rates_are_others(cosine: RunFolder, tmp_path: Path):
    longer = tiny(tmp_path, "optimizer.schedule=cosine", "train.total_steps=12", "optimizer.warmup_steps=3")
    other = RunFolder.create(longer.model_copy(update={"run_folder": f"{tmp_path}/other"}), tiny_prepared(longer))
    for step in (3, 5):
        save_checkpoint(other, step, with_facts=True)
    (tmp_path / "other/checkpoints").rename(tmp_path / "run/checkpoints")
    said: list[str] = []
    found = find_checkpoint(cosine, open_checkpoints(cosine, said.append))
    assert found is not None and found.step == 3
    assert "it is of another run: train.total_steps=9 (was 12)" in said[0]


def test_a_length_by_epochs_is_compared_in_steps(tmp_path: Path):
    config = tiny(tmp_path, "optimizer.schedule=cosine", "train.num_epochs=1")
    run = RunFolder.create(config, prepared_text(tmp_path))
    save_checkpoint(run, 4, with_facts=True)  # As in older releases, without the number of steps.
    assert run.total_steps is None
    record_changes(run, 0, 9, quiet)
    for step in (1, 5):
        save_checkpoint(run, step, with_facts=True)
    record_changes(RunFolder(run.path, ["train.num_epochs=2"]), 1, 18, quiet)
    checkpoints = open_checkpoints(RunFolder(run.path))
    with pytest.raises(UserError, match=r"^it is of another run: the 18 steps of train.num_epochs=2 \(was 9\)\.$"):
        checkpoints.of_step(5)
    assert checkpoints.usable_steps((1, 4, 5)) == [1, 4]
    record_changes(RunFolder(run.path, ["train.num_epochs=1"]), 1, 3, quiet)
    with pytest.raises(UserError, match=r"^it is beyond the 3 steps of train.num_epochs=1\.$"):
        open_checkpoints(RunFolder(run.path)).of_step(4)
    assert newest_step(RunFolder(run.path)) == 1
    # A number of steps takes the place of the epochs.
    record_changes(RunFolder(run.path, ["train.total_steps=9"]), 1, 9, quiet)
    assert open_checkpoints(RunFolder(run.path)).usable_steps((1, 4, 5)) == [1, 4, 5]


def test_changes_of_the_run_stay_and_changes_of_the_process_do_not(tmp_path: Path):
    run = RunFolder.create(tiny(tmp_path), prepared_text(tmp_path))
    again = RunFolder(run.path, ["samples.prompt=the", "samples.num_tokens=3", "log.every_steps=7", "train.xla=off"])
    assert changes_of(again) == ["samples.prompt='the' (was '')", "samples.num_tokens=3 (was None)"]
    said: list[str] = []
    record_changes(again, 1, 9, said.append)
    assert said == [
        f"From step 1 on, as {run.path} records: samples.prompt='the' (was ''); samples.num_tokens=3 (was None)"
    ]
    kept = RunFolder(run.path)
    assert (kept.config.samples.prompt, kept.config.samples.num_tokens) == ("the", 3)
    assert (kept.config.log.every_steps, kept.config.train.xla) == (50, "auto")
    record_changes(RunFolder(run.path, ["samples.num_tokens=none"]), 2, 9, quiet)
    assert RunFolder(run.path).config.samples.num_tokens is None
    assert [each["step"] for each in RunFolder(run.path).facts["changes"]] == [1, 2]
    # A process that is killed before config.toml is written again.
    (tmp_path / "run/config.toml").unlink()
    assert RunFolder(run.path).config.samples.prompt == "the"


def test_losses_of_other_batches_are_not_compared(tmp_path: Path):
    run = RunFolder.create(tiny(tmp_path, "evaluation.every_steps=1"), prepared_text(tmp_path))
    write_scores(run, {1: 2.5})
    other = RunFolder(run.path, ["evaluation.every_steps=2"])
    assert not has_other_scores(other)
    record_changes(other, 1, 9, quiet)
    assert read_scores(other) == {1: 2.5}
    fewer = RunFolder(run.path, ["evaluation.num_batches=1"])
    assert has_other_scores(fewer)
    said: list[str] = []
    record_changes(fewer, 1, 9, said.append)
    assert said[0].startswith(
        "evaluation.num_batches has changed, so the validation losses so far are of other batches"
    )
    assert read_scores(fewer) == {} and not has_other_scores(RunFolder(run.path))


@pytest.mark.slow
def test_a_change_that_does_not_work_leaves_the_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    trainer.train(text_run(tmp_path, "run", "evaluation.every_steps=1"), say=quiet)
    run = tmp_path / "run"

    def kept() -> dict[str, bytes]:
        return {name: (run / name).read_bytes() for name in ("run.json", "config.toml", "scores.json", "result.json")}

    before = kept()
    changed = [f"evaluation.sets.web={tmp_path}/typo.txt", "evaluation.num_batches=1"]
    with pytest.raises(UserError, match=r"evaluation\.sets\.web.*typo\.txt"):
        trainer.resume(str(run), say=refuse_records, overrides=changed)
    assert kept() == before
    # On the command line before TensorFlow is loaded, in a fork too.
    for verb in ("resume", "fork"):
        monkeypatch.setattr(launch, verb, lambda *_, **__: pytest.fail("TensorFlow is loaded"))
    for words in (["train", "--resume", str(run)], ["fork", f"{run}@1", f"run_folder={run}-2"]):
        assert main([*words, *changed]) == 2
        assert "typo.txt" in capsys.readouterr().err
    assert kept() == before and not Path(f"{run}-2").exists()


def refuse_records(line: str) -> None:
    assert not line.startswith(("From step", "evaluation.num_batches has changed"))


def test_results_stay_if_a_change_cannot_be_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunFolder.create(tiny(tmp_path, "evaluation.every_steps=1"), prepared_text(tmp_path))
    write_scores(run, {1: 2.5})
    (tmp_path / "run/result.json").write_text("{}")

    def full(run: RunFolder, **facts: object) -> None:
        raise UserError("No space left on device")

    monkeypatch.setattr(RunFolder, "record", full)
    with pytest.raises(UserError, match="No space left"):
        record_changes(RunFolder(run.path, ["evaluation.num_batches=1"]), 1, 9, quiet)
    assert (tmp_path / "run/result.json").exists() and read_scores(run) == {1: 2.5}


def test_what_is_to_be_recorded_has_to_be_a_config(tmp_path: Path):
    run = RunFolder.create(tiny(tmp_path, "profile.at_step=1", "profile.num_steps=1"), prepared_text(tmp_path))
    with pytest.raises(UserError, match=r"profile.at_step=1 and profile.num_steps=1 go beyond train.total_steps=1"):
        RunFolder(run.path, ["train.total_steps=1", "profile.at_step=none", "profile.num_steps=none"])
    assert find_run(tiny(tmp_path, "profile.at_step=1", "profile.num_steps=1", "samples.top_k=3"), or_resume=True)
