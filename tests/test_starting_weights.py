"""Laws of init.from with a run: the weights are the parent's, everything else begins anew."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import quiet, tiny_prepared  # type: ignore[import-not-found]  # pytest has this folder on its path
from tiny_run import text_run  # type: ignore[import-not-found]  # pytest has this folder on its path

import trainer
from trainer.cli import main
from trainer.config.settings import Config
from trainer.errors import UserError
from trainer.exchange.starting_weights import read_beginning
from trainer.runs import run_folder
from trainer.runs.run_checkpoints import find_checkpoint, load_model, open_checkpoints, write_beginning
from trainer.runs.run_data import load_tokenizer_of
from trainer.runs.run_folder import RunFolder


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("parent")
    trainer.train(text_run(folder, "parent"), say=quiet)
    return RunFolder(folder / "parent")


def folder_of(parent: RunFolder) -> Path:
    return Path(str(parent.path)).parent


def child(parent: RunFolder, name: str, *overrides: str) -> Config:
    return text_run(folder_of(parent), name, f"init.from={parent.path}", *overrides)


def first_loss(run: str) -> float:
    events = EventAccumulator(f"{run}/logs/train")
    events.Reload()
    first = events.Tensors("loss/nats_per_token")[0]
    assert first.step == 1
    return float(tf.make_ndarray(first.tensor_proto))


def loss_of(parent: RunFolder, config: Config, step: int | None = None) -> float:
    """The loss of the parent's model on the first batch of a config."""
    model, _ = load_model(parent, step=step)
    inputs, targets, weights = next(iter(trainer.batches(config, say=quiet)))
    each = tf.keras.losses.sparse_categorical_crossentropy(targets, model(inputs), from_logits=True)
    return float(tf.reduce_sum(each * weights) / tf.reduce_sum(weights))


def test_the_first_loss_is_the_parent_s(parent: RunFolder):
    config = child(parent, "same")
    trainer.train(config, say=quiet)
    # float32: separates a bug from another order of sums.
    assert first_loss(config.run_folder) == pytest.approx(loss_of(parent, config), rel=1e-5)
    assert abs(first_loss(config.run_folder) - first_loss(str(parent.path))) > 0.01
    run = RunFolder(config.run_folder)
    [entry] = run.facts["parents"]
    manifest = open_checkpoints(parent).of_step(3).manifest
    assert entry["kind"] == "init" and entry["from"] == str(parent.path) and entry["step"] == 3
    assert entry["weights_sha256"] == manifest["files"]["weights.safetensors"]["sha256"]
    assert f"init.from={str(parent.path)!r} (was None)" in entry["changed"]


def test_another_text_gets_the_parent_s_tokenizer_even_if_the_parent_is_gone_later(tmp_path: Path):
    trainer.train(text_run(tmp_path, "parent"), say=quiet)
    parent = RunFolder(tmp_path / "parent")
    (tmp_path / "b.txt").write_text("that hat is on a hot mat\n" * 60, encoding="utf-8")
    config = child(parent, "other", f"data.train={tmp_path}/b.txt", "train.seed=5")
    expected = loss_of(parent, config)
    trainer.train(config, say=quiet)
    run = RunFolder(config.run_folder)
    assert load_tokenizer_of(run).fingerprint == load_tokenizer_of(parent).fingerprint
    assert first_loss(config.run_folder) == pytest.approx(expected, rel=1e-5)
    (tmp_path / "parent").rename(tmp_path / "gone")
    assert trainer.resume(config.run_folder, say=quiet).step == 3
    assert RunFolder(config.run_folder).facts["parents"][0]["from"] == str(parent.path)


def test_the_checkpoint_is_the_one_that_is_named(parent: RunFolder):
    arrays = [
        read_beginning(child(parent, "unused", f"init.from={parent.path}{step}"), is_foreign=False, say=quiet)
        for step in ("@1", "/checkpoints/step_000000001", "@best", "")
    ]
    weights = [each.groups["weights"]["gpt/token_embedding/embeddings"] for each in arrays if each is not None]
    assert [each.parents[0]["step"] for each in arrays if each is not None] == [1, 1, 3, 3]
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(weights[2], weights[3])
    assert np.any(weights[0] != weights[2])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.hidden_dim=6"],
            r"does not fit this config, which needs gpt/token_embedding/embeddings as \[\d+, 6\]: it has it as "
            r"\[\d+, 8\]\. Add: model.hidden_dim=8$",
        ),
        (["model.num_layers=2"], r"needs gpt/block_1/.*: it does not have it\. Add: model.num_layers=1$"),
        (
            ["model.positions=rope"],
            r"it has gpt/position_embedding/embeddings as \[8, 8\], which .*model.positions=learned$",
        ),
        (["model.use_bias=[norm]"], r"has gpt/block_0/.*the config's model does not have\. Add: model.use_bias=true$"),
        (["train.sequence_length=9"], r"as \[9, 8\]: it has it as \[8, 8\]\. .*train.sequence_length=8$"),
        (
            ["tokenizer.kind=byte"],
            r"trained with another tokenizer \(char, \d+ tokens\) than tokenizer.\* describes \(byte, 258 tokens\), so "
            r"its weights mean other tokens\. Add: tokenizer.kind=saved tokenizer.path=\S+/parent$",
        ),
        (["init.from=PARENT@7"], r"parent has no checkpoint of step 7; it has: 1, 2, 3\."),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(parent: RunFolder, overrides: list[str], message: str):
    overrides = [each.replace("PARENT", str(parent.path)) for each in overrides]
    config = child(parent, "refused", *overrides)
    with pytest.raises(UserError, match=message):
        trainer.train(config, say=quiet)
    assert not Path(config.run_folder).exists()


def test_the_overrides_of_a_refusal_work_for_every_kind_of_tokenizer(parent: RunFolder):
    with pytest.raises(UserError) as error:
        read_beginning(child(parent, "unused", "tokenizer.kind=byte"), is_foreign=False, say=quiet)
    overrides = str(error.value).partition("Add: ")[2].split()
    fixed = child(parent, "unused", "tokenizer.kind=byte", *overrides[1:], overrides[0])
    # The last override of a setting counts.
    assert read_beginning(fixed, is_foreign=False, say=quiet) is not None


def test_positions_that_are_not_needed_are_left_out_with_a_line(parent: RunFolder):
    said: list[str] = []
    beginning = read_beginning(child(parent, "short", "train.sequence_length=5"), is_foreign=False, say=said.append)
    assert beginning is not None
    assert beginning.groups["weights"]["gpt/position_embedding/embeddings"].shape == (5, 8)
    assert f"init.from={str(parent.path)!r} has 8 positions: the first 5 are used." in said


def test_weights_that_fit_and_mean_something_else_are_reported(parent: RunFolder):
    said: list[str] = []
    read_beginning(child(parent, "same", "model.head_dim=4", "model.dropout=0.1"), is_foreign=False, say=said.append)
    assert said.pop() == f"The run begins with the weights of {parent.path}, step 3." and not said
    read_beginning(child(parent, "heads", "model.num_heads=4"), is_foreign=False, say=said.append)
    assert said[0] == (
        "warning: the weights fit, but the model computes something else with model.num_heads=4 (the parent's: 2)."
    )


def test_a_foreign_model_does_not_take_the_weights_of_the_gpt(parent: RunFolder):
    with pytest.raises(
        UserError, match=r"has the weights of trainer's GPT, and build_model builds another model; leave out"
    ):
        read_beginning(child(parent, "foreign"), is_foreign=True, say=quiet)


def test_a_missing_parent_is_refused_before_the_text_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text_run(tmp_path, "run")
    (tmp_path / "my.toml").write_text('[train]\nprecision = "float32"\ntotal_steps = 3\n')
    assert main(["train", f"{tmp_path}/my.toml", f"init.from={tmp_path}/nothing", f"run_folder={tmp_path}/new"]) == 2
    assert "/nothing' is neither a run, whose folder has a run.json, nor a folder of" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_run_does_not_begin_with_itself(parent: RunFolder, capsys: pytest.CaptureFixture[str]):
    file = folder_of(parent) / "itself.toml"
    file.write_text(f'run_folder = "{folder_of(parent)}/new"\n[train]\nprecision = "float32"\ntotal_steps = 3\n')
    assert main(["train", str(file), f"init.from={folder_of(parent)}/new"]) == 2
    assert "neither a run" in capsys.readouterr().err


@pytest.mark.parametrize("killed_in", ["copy_folder", "_write_record", "remove_file"])
def test_a_process_that_is_killed_while_it_makes_the_run_leaves_no_run_with_random_weights(
    parent: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
):
    """The kill is an exception that no clean-up follows."""
    config = child(parent, "child", f"run_folder={tmp_path}/child")
    beginning, prepared = read_beginning(config, is_foreign=False, say=quiet), tiny_prepared(config)
    assert beginning is not None
    write_first = partial(write_beginning, beginning)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, killed_in, kill)
        patched.setattr(run_folder, "_undo", quiet)
        with pytest.raises(KeyboardInterrupt):
            RunFolder.create(config, prepared, None, write_first)
    (tmp_path / "child/lock").touch()  # As a killed process leaves it.
    is_run = killed_in == "remove_file"
    assert (tmp_path / "child/run.json").exists() == is_run
    assert (tmp_path / "child/checkpoints/step_000000000/manifest.json").exists()
    run = RunFolder(config.run_folder) if is_run else RunFolder.create(config, prepared, None, write_first)
    found = find_checkpoint(run, open_checkpoints(run))
    assert found is not None and found.step == 0
    np.testing.assert_array_equal(
        found.arrays("weights")["gpt/token_embedding/embeddings"],
        beginning.groups["weights"]["gpt/token_embedding/embeddings"],
    )


def test_the_checkpoint_of_a_killed_process_does_not_get_into_another_run(parent: RunFolder, tmp_path: Path):
    folder = tmp_path / "run"
    (folder / "checkpoints/step_000000000").mkdir(parents=True)
    config = text_run(folder_of(parent), "unused", f"run_folder={folder}")
    with pytest.raises(UserError, match="is there already and is not a run"):
        RunFolder.create(config, tiny_prepared(config))  # Nothing shows that it is not the user's.
    (folder / "lock").touch()
    (folder / "begun").touch()
    RunFolder.create(config, tiny_prepared(config))
    assert not (folder / "begun").exists() and not (folder / "checkpoints").exists()


def test_the_tokenizer_of_the_source_takes_the_place_of_one_that_would_be_learned(parent: RunFolder):
    settings = json.loads(child(parent, "unused").model_dump_json())
    assert settings["init"] == {"from": str(parent.path)}
    assert settings["tokenizer"] == {"kind": "saved", "path": str(parent.path)}
    with pytest.raises(UserError, match=r"tokenizer.kind=bpe' has no effect with init.from="):
        child(parent, "unused", "tokenizer.kind=bpe")
    assert child(parent, "unused", f"init.from={parent.path}@2").tokenizer.path == str(parent.path)  # type: ignore[union-attr]
