"""A preset of KerasHub computes what the run computes, and a run begins with one."""

import json
import shutil
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np
import pytest
import tokenizers
from random_run import PROMPTS, SEQUENCE_LENGTH, TEXT, random_run  # type: ignore[import-not-found]
from tiny import quiet  # type: ignore[import-not-found]

import trainer
from trainer.config.settings import ModelConfig, SavedTokenizerConfig
from trainer.errors import UserError
from trainer.exchange.kerashub import check_settings, family_for, is_preset, read_preset
from trainer.exchange.kerashub_preset import read_weights
from trainer.exchange.open import open_model
from trainer.exchange.starting_weights import read_beginning
from trainer.runs.run_folder import RunFolder
from trainer.tokenizers.tokenizer_files import train_tokenizer

BPE = "tokenizer={kind='bpe',vocabulary_size=300}"
GPT2 = ("model.pre_norm=true", "model.tied_embeddings=true", "model.activation=gelu_tanh")
LLAMA = (
    *("model.pre_norm=true", "model.norm=rms", "model.positions=rope", "model.activation=swiglu"),
    *("model.use_bias=false", "model.num_key_value_heads=1", "model.norm_epsilon=1e-6", "model.rope_theta=5000"),
)
SHAPES = {
    "gpt2": GPT2,
    "gpt2_wide": (*GPT2, "model.num_layers=1", "model.vocabulary_multiple=64"),
    "llama": LLAMA,
    "llama_tied": (*LLAMA, "model.tied_embeddings=true", "model.num_key_value_heads=none"),
}


@pytest.fixture(scope="module", params=SHAPES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    run = random_run(folder, BPE, *SHAPES[request.param])
    return run, trainer.export(str(run.path), "kerashub", say=quiet)


def test_logits_are_those_of_the_run(exported: tuple[RunFolder, Any]):
    run, preset = exported
    opened = open_model(str(run.path), say=quiet)
    backbone = keras_hub.models.Backbone.from_preset(str(preset.path))
    size = opened.tokenizer.vocabulary_size
    tokens = np.random.default_rng(0).integers(0, size, [3, SEQUENCE_LENGTH], np.int32)
    hidden = backbone({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    logits = backbone.token_embedding(hidden, reverse=True)
    np.testing.assert_allclose(logits, opened.model(tokens)[..., :size], atol=1e-4)


def test_a_run_reads_back_the_weights(exported: tuple[RunFolder, Any], tmp_path: Path):
    run, preset = exported
    opened = open_model(str(run.path), say=quiet)
    size = opened.tokenizer.vocabulary_size
    untied = {"tied_embeddings": False} if run.config.model.positions == "rope" else {}
    model = run.config.model.model_copy(update={**untied, "vocabulary_multiple": 1})
    config = run.config.model_copy(update={"model": model})
    check_settings(preset.path, config)
    weights = read_weights(preset.path, config, size)
    for variable in opened.model.variables:
        own = variable.numpy()
        np.testing.assert_array_equal(
            weights[variable.path], own[:size] if "embedding" in variable.path and len(own) > size else own
        )


def test_settings_that_differ_are_listed_as_overrides(exported: tuple[RunFolder, Any]):
    run, preset = exported
    other = run.config.model_copy(
        update={"model": run.config.model.model_copy(update={"num_layers": 7, "intermediate_dim": 5})}
    )
    with pytest.raises(
        UserError, match=r"describe another model\. Give: .*model\.num_layers=\d .*model\.intermediate_dim=24"
    ):
        check_settings(preset.path, other)


def test_a_run_begins_with_a_preset_and_its_tokenizer(tmp_path: Path):
    run = random_run(tmp_path / "a", BPE, *GPT2)
    preset = trainer.export(str(run.path), "kerashub", say=quiet).path
    settings = json.loads(json.dumps(run.facts["config"]))
    settings["tokenizer"] = {"kind": "saved", "path": str(preset)}
    settings["init"] = {"from": str(preset)}
    settings["run_folder"] = str(tmp_path / "b")
    beginning = read_beginning(trainer.make_config(settings), False, quiet)
    assert beginning is not None
    for variable in open_model(str(run.path), say=quiet).model.variables:
        np.testing.assert_array_equal(beginning.groups["weights"][variable.path], variable.numpy())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"GPT2 has no model\.activation=relu, model\.pre_norm=false.*--to savedmodel, --to keras"),
        ({"num_heads": 3, "hidden_dim": 256}, r"model\.num_heads=3"),
        (
            {"norm_epsilon": 1e-6, "pre_norm": True, "tied_embeddings": True, "activation": "gelu_tanh"},
            "norm_epsilon=1e-06",
        ),
    ],
)
def test_a_model_that_no_class_holds_is_refused_by_its_settings(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        family_for(ModelConfig(**settings))


def test_what_a_preset_has_and_trainer_lacks_is_refused(tmp_path: Path):
    config = {"rope_frequency_adjustment_factor": 8.0}
    (tmp_path / "config.json").write_text(json.dumps({"registered_name": "keras_hub>Llama3Backbone", "config": config}))
    with pytest.raises(UserError, match=r"rope_frequency_adjustment_factor=8\.0 is not in trainer, only .*=None"):
        read_preset(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"registered_name": "keras_hub>GemmaBackbone", "config": {}}))
    with pytest.raises(UserError, match="GemmaBackbone is not a model that trainer has; it reads GPT2Backbone"):
        read_preset(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_preset_writes_the_greedy_text_of_the_run(shape: str, tmp_path: Path):
    run = random_run(tmp_path, BPE, *SHAPES[shape])
    exported = trainer.export(str(run.path), "kerashub", say=quiet)
    opened = open_model(str(run.path), say=quiet)
    model = keras_hub.models.CausalLM.from_preset(str(exported.path))
    model.compile(sampler="greedy")
    assert f"max_length={SEQUENCE_LENGTH}" in exported.how_to_load
    texts = model.generate(PROMPTS, max_length=SEQUENCE_LENGTH, stop_token_ids=[opened.tokenizer.bos_id])
    assert [str(text) for text in texts] == [str(text) for text in trainer.generate(str(run.path), PROMPTS, "greedy")]


def test_a_preset_without_files_of_trainer_has_its_own_vocabulary(tmp_path: Path):
    run = random_run(tmp_path, BPE, *GPT2)
    preset = trainer.export(str(run.path), "kerashub", say=quiet).path
    shutil.rmtree(preset / "tokenizer")
    tokenizer = train_tokenizer(SavedTokenizerConfig(kind="saved", path=str(preset)), ())
    ours = open_model(str(run.path), say=quiet).tokenizer
    assert (tokenizer.bos_id, tokenizer.pad_id) == (ours.bos_id, ours.pad_id)
    for line in [*TEXT.splitlines()[:7], *PROMPTS]:
        assert tokenizer.encode(line).tolist() == ours.encode(line).tolist()


def test_the_tokenizer_of_a_preset_gives_the_tokens_of_the_run_on_these_lines(tmp_path: Path):
    run = random_run(tmp_path, BPE, *GPT2)
    exported = trainer.export(str(run.path), "kerashub", say=quiet)
    theirs = keras_hub.tokenizers.GPT2Tokenizer.from_preset(str(exported.path))
    ours = open_model(str(run.path), say=quiet).tokenizer
    for line in TEXT.splitlines()[:7]:
        assert np.asarray(theirs(line)).tolist() == ours.encode(line).tolist()


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_special_tokens_that_a_file_only_adds_are_in_the_preset(shape: str, tmp_path: Path):
    run = random_run(tmp_path / "a", BPE, *SHAPES[shape])
    made = tokenizers.Tokenizer.from_file(str(run.path / "tokenizer" / "tokenizer.json"))
    file = json.loads(made.to_str())
    vocabulary = file["model"]["vocab"]
    vocabulary["unused"] = vocabulary.pop("[BOS]")
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] != "[BOS]"]
    made = tokenizers.Tokenizer.from_str(json.dumps(file))
    made.add_special_tokens(["[BOS]", "<|eot_id|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    run = random_run(tmp_path / "b", f"tokenizer={{kind='bpe',path='{tmp_path}/tokenizer.json'}}", *SHAPES[shape])
    preset = trainer.export(str(run.path), "kerashub", say=quiet).path
    theirs = json.loads((preset / "assets" / "tokenizer" / "vocabulary.json").read_text())
    bos = "<|endoftext|>" if shape == "gpt2" else "<|begin_of_text|>"
    assert (theirs[bos], theirs["<|eot_id|>"]) == (len(vocabulary), len(vocabulary) + 1)
    assert sorted(theirs.values()) == list(range(len(theirs)))


def test_a_preset_by_the_former_name_of_kerashub_is_read(tmp_path: Path):
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16, "max_sequence_length": 64}
    for package in ("keras_hub", "keras_nlp"):
        described = {"registered_name": f"{package}>GPT2Backbone", "config": {**sizes, "vocabulary_size": 300}}
        (tmp_path / "config.json").write_text(json.dumps(described))
        assert is_preset(tmp_path) and read_preset(tmp_path).num_positions == 64
        for read in (trainer.load, trainer.generate):
            with pytest.raises(
                UserError, match=r"is a preset of KerasHub, which only init\.from reads; begin a run with"
            ):
                read(str(tmp_path))
    (tmp_path / "config.json").write_text('{"registered_name": "keras>GPT2Backbone"}')
    assert not is_preset(tmp_path)
