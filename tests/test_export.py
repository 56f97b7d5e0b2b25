"""What leaves a run computes and writes the same elsewhere, and what cannot leave is refused by name."""

import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from random_run import PROMPTS, SEQUENCE_LENGTH, in_fresh_process, random_run  # type: ignore[import-not-found]
from tiny import quiet  # type: ignore[import-not-found]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import trainer
from trainer import cli
from trainer.errors import UserError
from trainer.exchange.open import open_model
from trainer.model.gpt import GPT
from trainer.runs.run_checkpoints import load_model
from trainer.runs.run_folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return random_run(tmp_path_factory.mktemp("exported"))


def test_keras_file_computes_the_logits_of_the_run_and_brings_its_files(run: RunFolder, tmp_path: Path):
    exported = trainer.export(str(run.path), "keras", str(tmp_path / "a.keras"), say=quiet)
    model, _ = load_model(run, say=quiet)
    loaded = keras.saving.load_model(exported.path)
    assert isinstance(loaded, GPT)
    tokens = np.random.default_rng(0).integers(0, model.vocabulary_size, [3, SEQUENCE_LENGTH], np.int32)
    np.testing.assert_array_equal(model.predict(tokens, verbose=0), loaded.predict(tokens, verbose=0))
    again = tmp_path / "again.keras"
    loaded.save(again)
    assert keras.saving.load_model(again).files == loaded.files
    assert loaded.files["config.toml"].decode() == run.config.to_toml()
    assert loaded.files["tokenizer/settings.json"] == (run.path / "tokenizer/settings.json").read_bytes()


def test_trainer_opens_a_keras_file_in_place_of_its_run(run: RunFolder, tmp_path: Path):
    exported = trainer.export(str(run.path), "keras", str(tmp_path / "a.keras"), say=quiet)
    texts = trainer.generate(str(exported.path), PROMPTS[:3], "greedy", 5)
    assert texts == trainer.generate(str(run.path), PROMPTS[:3], "greedy", 5)
    opened = open_model(str(exported.path))
    assert (opened.step, opened.config) == (2, run.config)
    with pytest.raises(UserError, match="so it has no step; leave out step=2"):
        open_model(str(exported.path), step=2)
    (tmp_path / "b.keras").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"b\.keras: not a \.keras file that trainer export wrote, or damaged"):
        open_model(str(tmp_path / "b.keras"))


def test_what_is_there_is_never_overwritten(run: RunFolder, tmp_path: Path):
    (tmp_path / "a.keras").write_text("mine")
    with pytest.raises(UserError, match=r"a\.keras is there already; delete it, or name another place with --output"):
        trainer.export(str(run.path), "keras", str(tmp_path / "a.keras"))
    assert (tmp_path / "a.keras").read_text() == "mine"


def test_a_failed_export_leaves_nothing(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "open", fail)
    with pytest.raises(UserError, match=r"a\.keras cannot be written: .*nothing half-written is left"):
        trainer.export(str(run.path), "keras", str(tmp_path / "a.keras"), say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_with_the_way_that_works(run: RunFolder, tmp_path: Path):
    path = str(run.path)
    with pytest.raises(UserError, match=r"to='kears' is not a format; choose one of .*\. Did you mean keras\?"):
        trainer.export(path, "kears")
    with pytest.raises(UserError, match=r"Keras reads only files whose name ends with \.keras; add that"):
        trainer.export(path, "keras", str(tmp_path / "model"))
    with pytest.raises(UserError, match=r"ram://a\.keras: an export is written to a disk; name a place there"):
        trainer.export(path, "keras", "ram://a.keras")
    with pytest.raises(UserError, match=r"dtype='bfloat16': only --to huggingface writes 16-bit weights; leave it out"):
        trainer.export(path, "keras", dtype="bfloat16")
    with pytest.raises(UserError, match="dtype='float8' is not possible; choose one of float32, bfloat16"):
        trainer.export(path, "huggingface", dtype="float8")  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"No Hugging Face class .* model\.pre_norm=false.*: --to savedmodel, --to keras"
    ):
        trainer.export(path, "huggingface")
    with pytest.raises(UserError, match="has no checkpoint of step 7; it has: 2"):
        trainer.export(path, "keras", step=7)
    assert not Path(f"{path}.keras").exists()


def test_a_tokenizer_that_changes_text_is_refused_before_a_saved_model_is_made(tmp_path: Path):
    letters = {token: id for id, token in enumerate(["<s>", *pre_tokenizers.ByteLevel.alphabet()])}
    twin = Tokenizer(models.BPE(letters, []))
    twin.pre_tokenizer, twin.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    twin.add_tokens(["cat"])
    twin.save(str(tmp_path / "a.json"))
    run = random_run(tmp_path, f"tokenizer={{kind='bpe',path='{tmp_path}/a.json'}}")
    with pytest.raises(UserError, match=r"this tokenizer\.json does something else, .* --to keras, --to huggingface"):
        trainer.export(str(run.path), "savedmodel")


def test_a_damaged_tokenizer_is_reported(tmp_path: Path):
    run = random_run(tmp_path)
    (Path(str(run.path)) / "tokenizer" / "settings.json").write_text("{")
    for to in ("savedmodel", "keras"):
        with pytest.raises(UserError, match="not a whole tokenizer"):
            trainer.export(str(run.path), to, say=quiet)


def test_what_is_refused_is_refused_before_tensorflow_is_loaded(run: RunFolder):
    program = """
import sys
import trainer
for to, output, dtype in (
    *(("huggingface", None, "float32"), ("kerashub", None, "float32")),
    *(("keras", "a", "float32"), ("keras", None, "bfloat16")),
):
    try:
        trainer.export(sys.argv[1], to, output, dtype=dtype)
    except trainer.UserError:
        print("tensorflow" in sys.modules)
"""
    assert in_fresh_process(program, str(run.path)).split() == ["False"] * 4


def test_card_says_what_the_model_is(run: RunFolder, tmp_path: Path):
    exported = trainer.export(str(run.path), "keras", str(tmp_path / "a.keras"), say=quiet)
    card = zipfile.ZipFile(exported.path).read("assets/README.md").decode()
    assert f"| trained on | `{run.config.data.train}` |" in card
    assert "| steps | 2, each of 2 examples of at most 24 tokens |" in card
    assert "| validation |" not in card  # This run was never scored.
    assert run.config.to_toml().strip() in card
    assert "keras.saving.load_model('a.keras')" in card


@pytest.mark.slow
def test_keras_file_writes_the_greedy_text_of_the_run_in_a_fresh_process(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "a.keras"
    assert cli.main(["export", str(run.path), "--to", "keras", "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    _, _, program = printed.partition("To load it:\n\n")
    program += """
import sys
import tempfile
from pathlib import Path
from trainer.decoding.decoder import Decoder
from trainer.decoding.generate import Generator
from trainer.tokenizers.tokenizer_files import load_tokenizer
with tempfile.TemporaryDirectory() as folder:
    model.save_assets(folder)
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
generator = Generator(model, tokenizer, model.sequence_length)
print(repr(generator.generate(eval(sys.argv[1]), Decoder("greedy"), 20)))
"""
    expected = trainer.generate(str(run.path), PROMPTS, "greedy", 20)
    assert in_fresh_process(program, repr(PROMPTS)).strip() == repr(expected)
    assert len(set(expected)) == len(PROMPTS)
