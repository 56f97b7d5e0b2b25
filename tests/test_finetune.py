"""A run begins with a folder of Hugging Face, as a user who has downloaded one does it: by the config that ships."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import trainer
from trainer.cli import main
from trainer.config.file import load_config
from trainer.config.settings import Config
from trainer.errors import UserError
from trainer.exchange.huggingface import config_of, end_tokens, read_weights, remarks_on_bos
from trainer.exchange.huggingface_export import write_huggingface
from trainer.exchange.open import open_model
from trainer.exchange.source import check_source
from trainer.exchange.starting_weights import read_beginning
from trainer.model.size import parameter_shapes
from trainer.tokenizers.bpe import BpeTokenizer

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"The {i} cats, don't they, sat on the mat.\n" for i in range(200))
SIZES = ("model.num_layers=1", "model.num_heads=2", "model.hidden_dim=8", "model.intermediate_dim=16")


def tokenizer_like_gpt2() -> str:
    """Returns a tokenizer.json as GPT-2's is: [BOS] is <|endoftext|>, the last token, and there is no padding."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(["<|endoftext|>"])
    text: str = made.to_str()
    return text


@pytest.fixture
def downloaded(tmp_path: Path) -> Path:
    """A tiny random GPT-2, with the three files that a user downloads."""
    tokenizer = BpeTokenizer(tokenizer_like_gpt2())
    config = load_config(ROOT / "configs/finetune_gpt2.toml", [*SIZES, "train.sequence_length=64"])
    random = np.random.default_rng(0)
    weights = {
        path: (random.normal(0, 0.1, shape) + path.endswith("gamma")).astype(np.float32)
        for path, shape in parameter_shapes(config.model, tokenizer.vocabulary_size, 64)
    }
    write_huggingface(weights, config, tokenizer, tmp_path / "whole")
    folder = tmp_path / "gpt2"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "whole" / name).rename(folder / name)
    (folder / "tokenizer.json").write_text(tokenizer_like_gpt2(), encoding="utf-8")
    return folder


def config_for(folder: Path, *overrides: str) -> Config:
    home = folder.parent
    (home / "text.txt").write_text(TEXT, encoding="utf-8")
    places = [f"init.from={folder}", f"data.train={home / 'text.txt'}", f"data.prepared_folder={home / 'prepared'}"]
    short = [
        "train.total_steps=2",
        "train.sequence_length=16",
        "train.steps_per_call=1",
        "samples.num_tokens=3",
        "optimizer.warmup_steps=1",
    ]
    return load_config(ROOT / "configs/finetune_gpt2.toml", [*places, *short, f"run_folder={home / 'run'}", *overrides])


def test_the_sizes_of_another_model_are_named_before_tensorflow_is_loaded(downloaded: Path):
    with pytest.raises(UserError) as error:
        check_source(config_for(downloaded))
    assert str(error.value) == (
        f"{downloaded}/config.json: the settings describe another model. Give: {' '.join(SIZES)}"
    )
    check_source(config_for(downloaded, *SIZES))


def test_a_run_begins_with_the_weights_and_the_tokenizer_of_the_folder(downloaded: Path):
    lines: list[str] = []
    beginning = read_beginning(config_for(downloaded, *SIZES), is_foreign=False, say=lines.append)
    assert beginning is not None and beginning.step == 0
    whole = config_of(downloaded)
    assert (whole.train.sequence_length, whole.tokenizer.kind) == (64, "saved")
    stored = read_weights(downloaded, whole, beginning.groups["weights"]["gpt/token_embedding/embeddings"].shape[0])
    for path, weight in stored.items():
        rows = weight[:16] if path == "gpt/position_embedding/embeddings" else weight
        assert np.array_equal(beginning.groups["weights"][path], rows)
    assert lines == [
        f"{downloaded} has 64 positions; the first 16 are used (train.sequence_length).",
        f"The run begins with the weights of {downloaded}.",
    ]
    (parent,) = beginning.parents
    assert parent["from"] == str(downloaded) and len(parent["weights_sha256"]) == 64


@pytest.mark.slow
def test_the_config_that_ships_fine_tunes_and_the_folder_itself_writes(downloaded: Path):
    few = ("evaluation.every_steps=none", "evaluation.num_batches=none", "samples.num_tokens=2", "samples.num_beams=2")
    result = trainer.train(config_for(downloaded, *SIZES, *few), say=lambda line: None)
    assert result.step == 2 and result.evaluation is not None and np.isfinite(result.evaluation.loss)
    text = trainer.generate(str(downloaded), "The 7 cats", sampler="greedy", num_tokens=5)[0]
    assert text.startswith("The 7 cats") and len(text) > len("The 7 cats")


def test_another_tokenizer_is_refused(downloaded: Path):
    config = config_for(downloaded, *SIZES, "tokenizer.kind=byte", "model.vocabulary_multiple=291")
    with pytest.raises(
        UserError, match=r"trained with another tokenizer \(bpe, \d+ tokens\).*Add: tokenizer\.kind=saved"
    ):
        read_beginning(config, is_foreign=False, say=lambda line: None)


def test_options_that_such_a_folder_does_not_have_are_refused(downloaded: Path):
    with pytest.raises(UserError, match=r"is a model and not a run, so it has no step; leave out step=3"):
        trainer.generate(str(downloaded), step=3)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def test_the_end_token_of_a_folder_ends_its_texts(downloaded: Path, capsys: pytest.CaptureFixture[str]):
    edit_json(downloaded / "config.json", eos_token_id=None)
    whole = trainer.load(str(downloaded))
    [text] = whole.generate("The", num_tokens=20, seed=3)
    tokens = whole.tokenizer.encode(text)
    end = next(id for id in tokens[4:] if tokens.count(id) == 1)
    expected = whole.tokenizer.decode(tokens[: tokens.index(end)])
    assert text.finish == "length" and expected != text
    edit_json(downloaded / "generation_config.json", eos_token_id=[999, end])
    edit_json(downloaded / "config.json", eos_token_id=tokens[1])  # generation_config.json comes before it.
    ended = trainer.load(str(downloaded))
    [again] = ended.generate("The", num_tokens=20, seed=3)
    assert (again, again.finish) == (expected, "end")
    assert "".join(ended.stream("The", num_tokens=20, seed=3)) == expected
    assert main(["generate", str(downloaded), "The", "--num-tokens", "20", "--seed", "3"]) == 0
    assert expected in (out := capsys.readouterr().out) and text not in out


@pytest.mark.parametrize(
    ("of_generation", "of_config", "expected"),
    [
        (None, None, ()),
        (None, 5, (5,)),
        ({}, [5, 6], (5, 6)),
        ({"eos_token_id": None}, 0, (0,)),
        ({"eos_token_id": 7}, 5, (7,)),
        ({"eos_token_id": [9, 10, -1, True, "a"]}, 5, (9,)),
    ],
)
def test_end_tokens_are_numbers_of_tokens(of_generation: Any, of_config: Any, expected: Any, tmp_path: Path):
    edit_json(tmp_path / "config.json", eos_token_id=of_config)
    if of_generation is not None:
        edit_json(tmp_path / "generation_config.json", **of_generation)
    assert end_tokens(tmp_path, vocabulary_size=10) == expected


def test_another_token_before_a_text_than_the_folder_s_is_said(downloaded: Path):
    edit_json(downloaded / "config.json", bos_token_id=5)
    lines: list[str] = []
    tokenizer = open_model(str(downloaded), say=lines.append).tokenizer
    assert lines == [
        f"warning: {downloaded}/config.json: bos_token_id=5 is {tokenizer.vocabulary[5]!r}, but each text begins with "
        f"'<|endoftext|>', which is chosen by its name. If {tokenizer.vocabulary[5]!r} is right, name it [BOS] in "
        "tokenizer.json."
    ]
    for silent in (tokenizer.bos_id, tokenizer.vocabulary_size, None):
        edit_json(downloaded / "config.json", bos_token_id=silent)
        assert remarks_on_bos(downloaded, tokenizer) == []


def test_tokens_that_were_added_without_rows_are_named(downloaded: Path):
    file = json.loads((downloaded / "tokenizer.json").read_text())
    size = len(file["model"]["vocab"]) + 1
    added = [{**file["added_tokens"][0], "id": size + i, "content": name} for i, name in enumerate(("[PAD]", "<x>"))]
    edit_json(downloaded / "tokenizer.json", added_tokens=file["added_tokens"] + added)
    config = config_for(downloaded, *SIZES)
    for read in (lambda: config_of(downloaded), lambda: check_source(config)):
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value) == (
            f"{downloaded}: the model has {size} rows for the {size + 2} tokens of the tokenizer, and none for "
            "'[PAD]', '<x>'; remove them from added_tokens in tokenizer.json."
        )
    edit_json(downloaded / "tokenizer.json", added_tokens=file["added_tokens"])
    assert config_of(downloaded).model.num_logits(size) == size
    file["model"]["vocab"]["zz"] = size
    edit_json(downloaded / "tokenizer.json", model=file["model"])
    with pytest.raises(UserError, match=f"{size} rows for the {size + 1} tokens of the tokenizer, which is therefore"):
        config_of(downloaded)
