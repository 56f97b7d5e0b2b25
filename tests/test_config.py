import ast
import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from trainer.config.file import json_schema, load_config, make_config
from trainer.config.refusals import sections_of, setting_names
from trainer.config.settings import Config, Section, TokenizerConfig
from trainer.errors import UserError

ROOT = Path(__file__).parent.parent
SETTINGS = {"run_folder": "runs/x", "train": {"precision": "float32", "total_steps": 10}}


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        make_config(SETTINGS, overrides)
    return str(error.value)


def test_defaults_are_the_tutorial_s():
    config = make_config(SETTINGS)
    assert (config.model.num_layers, config.model.num_heads, config.model.hidden_dim) == (2, 3, 256)
    assert config.model.head_width() == 85
    assert config.tokenizer.vocabulary_size == 5000
    assert (config.train.sequence_length, config.train.global_batch_size) == (128, 64)


def test_a_name_in_quotation_marks_is_refused_as_one_name():
    with pytest.raises(UserError, match=r"^'train\.seed' is one name in quotation marks; write it without them\.$"):
        make_config({**SETTINGS, "train.seed": 1})


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        make_config(SETTINGS).train.seed = 1


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("train.total_step=1", "train.total_step is not a setting. Did you mean train.total_steps?"),
        ("train.batch_size=1", "Did you mean train.global_batch_size or train.micro_batch_size?"),
        ("trian.seed=1", "trian is not a setting. Did you mean train?"),
        ("tokenizer={kind='wordpiece',vocab_size=9}", "Did you mean tokenizer.vocabulary_size?"),
        # Good keys in the wrong section, the second nearer in spelling to a sister, and one without a section.
        ("train.hidden_dim=1", "train.hidden_dim is not a setting. Did you mean model.hidden_dim?"),
        ("train.num_heads=1", "train.num_heads is not a setting. Did you mean model.num_heads?"),
        ("train.lerning_rate=1", "train.lerning_rate is not a setting. Did you mean optimizer.learning_rate?"),
        ("total_steps=1", "total_steps is not a setting. Did you mean train.total_steps?"),
        ("distribution.num_gpus=2", "distribution.num_gpus is not a setting. Did you mean distribution.gpus?"),
        ("optimizer.lr=1", "Known settings: kind, learning_rate, schedule"),
        ("xyzzy=1", "xyzzy is not a setting. Known sections: run_folder, data, tokenizer, model, train"),
        # Dropping a misspelt key must not pass for done, nor a key be taken for the kind of tokenizer.
        ("train.sed=none", "train.sed is not a setting. Did you mean train.seed?"),
        ("train.char=1", "train.char is not a setting. Known settings: precision"),
        ("tra\x1b[31min.seed=1", r"'tra\x1b[31min' is not a setting. Did you mean train?"),
        ("'' = 1", "\"''\" is not a setting. Known sections: run_folder, data"),
        ("a" * 5_000 + "=1", "'" + "a" * 199 + "... is not a setting."),
    ],
)
def test_unknown_key_names_the_nearest_known_one(override: str, advice: str):
    assert advice in refusal(override)


@pytest.mark.parametrize(
    ("recorded", "given", "remedy"),
    [
        (["kind=gpu", "gpus=[0, 1]"], "kind=cpu", "gpus=none"),
        (["kind=cpu", "logical_devices=4"], "kind=gpu", "logical_devices=1"),
        (["kind=auto", "gpus=[0, 1]"], "logical_devices=2", "gpus=none"),
        (["kind=auto", "logical_devices=2"], "gpus=[0, 1]", "logical_devices=1"),
        (["shard=weights", "shard_over=2"], "shard=nothing", "shard_over=none"),
        (["kind=tpu", "tpu_name=grpc://1.2.3.4:8470"], "kind=cpu", "tpu_name=local"),
        (
            ["kind=tpu", "tpu_name=grpc://1.2.3.4:8470", "tpu_zone=a"],
            "kind=cpu",
            "tpu_name=local distribution.tpu_zone=none",
        ),
    ],
)
def test_devices_that_a_run_has_recorded_are_undone_by_the_overrides_that_the_refusal_names(
    recorded: list[str], given: str, remedy: str
):
    run = make_config(SETTINGS, [f"distribution.{each}" for each in recorded]).model_dump(mode="json")
    with pytest.raises(UserError) as error:
        make_config(run, [f"distribution.{given}"])
    assert f"distribution.{remedy}" in str(error.value)
    make_config(run, [f"distribution.{given}", *f"distribution.{remedy}".split()])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["distribution.logical_devices=2", "distribution.kind=gpu"],
            "distribution.logical_devices=2 splits a CPU and does not go with distribution.kind='gpu'; set "
            "distribution.logical_devices=1, or choose 'cpu'.",
        ),
        (
            ["distribution.gpus=[0, 1]", "distribution.kind=cpu"],
            "distribution.gpus=[0, 1] does not go with distribution.kind='cpu'; set distribution.gpus=none, or choose",
        ),
        (
            ["distribution.gpus=[0, 1]", "distribution.logical_devices=2"],
            "distribution.gpus=[0, 1] and distribution.logical_devices=2: replicas are on GPUs or on a split CPU; "
            "set distribution.gpus=none, or distribution.logical_devices=1.",
        ),
        (
            ["distribution.shard_over=2"],
            "distribution.shard_over=2 has no effect with distribution.shard='nothing'; choose",
        ),
        (["distribution.gpus=[]"], "distribution.gpus=[] must name at least one GPU, and none twice; leave it out for"),
        (["distribution.gpus=[1, 1]"], "distribution.gpus=[1, 1] must name at least one GPU, and none twice; leave it"),
        (["distribution.gpus=[-1]"], "distribution.gpus.0=-1: input should be greater than or equal to 0."),
        (
            ["distribution.tpu_zone=us-central1-a"],
            "distribution.tpu_name, tpu_zone and tpu_project do not go with distribution.kind='auto'; set "
            "distribution.tpu_zone=none, or choose 'tpu'.",
        ),
        (
            ["train.micro_batch_size=24"],
            "train.global_batch_size=64 is not a multiple of train.micro_batch_size=24; change one of the two.",
        ),
        (
            ["train.micro_batch_size=0"],
            "train.micro_batch_size=0: input should be greater than 0.\n"
            "train.micro_batch_size=0: input should be 'auto'.",
        ),
        (["train.micro_batch_size=most"], "train.micro_batch_size='most': input should be 'auto'."),
        (["profile.at_step=0"], "profile.at_step=0: input should be greater than 0."),
        (
            ["profile.num_steps=3"],
            "profile.num_steps=3 has no effect without profile.at_step; set that too, or leave num_steps out.",
        ),
        (
            ["profile.at_step=6"],
            "profile.at_step=6 and profile.num_steps=5 go beyond train.total_steps=10; lower one of them.",
        ),
        (
            ["train.num_epochs=1", "train.total_steps=10"],
            "train.total_steps=10 and train.num_epochs=1: set exactly one of the two.",
        ),
        (["train.total_steps=none"], "train.total_steps=None and train.num_epochs=None: set exactly one of the two"),
        (
            ["model.num_heads=3", "model.hidden_dim=2"],
            "model.num_heads=3 is more than model.hidden_dim=2; a head needs a width of at least 1; change",
        ),
        (["model.head_dim=5", "model.positions=rope"], "model.head_dim=5 is an odd width; change it."),
        (
            ["model.use_bias=[unembedding]", "model.tied_embeddings=true"],
            "model.use_bias=['unembedding']: 'unembedding' has no effect with model.tied_embeddings=true",
        ),
        (
            ["model.use_bias=[query]"],
            "model.use_bias=['query']: input should be true, false, or a list of: query_key_value, attention_output, ",
        ),
        (
            ["model.num_heads=4", "model.num_key_value_heads=3"],
            "model.num_heads=4 is not a multiple of model.num_key_value_heads=3; each of these must",
        ),
        (
            ["model.num_key_value_heads=6"],
            "model.num_heads=3 is not a multiple of model.num_key_value_heads=6; each of these must",
        ),
        (
            ["model.positions=rope"],
            "model.positions='rope' rotates the numbers of a head in pairs, but model.hidden_dim=256 // "
            "model.num_heads=3 is 85, an odd width; change one of the two.",
        ),
        (
            ["model.rope_theta=5e5"],
            "model.rope_theta=500000.0 has no effect with model.positions='learned'; choose 'rope', or leave it out.",
        ),
        (["model.rope_theta=1.0"], "model.rope_theta=1.0: input should be greater than 1."),
        (["train.z_loss=-1e-4"], "train.z_loss=-0.0001: input should be greater than or equal to 0."),
        (["model.vocabulary_multiple=0"], "model.vocabulary_multiple=0: input should be greater than 0."),
        (["train.sequence_length=1"], "train.sequence_length=1: input should be greater than or equal to 2."),
        (["tokenizer={kind='wordpiece',vocabulary_size=3}"], "tokenizer.vocabulary_size=3: input should be greater"),
        (["tokenizer={kind='bpe',vocabulary_size=257}"], "tokenizer.vocabulary_size=257: input should be greater"),
        (
            ["tokenizer.kind=gpt2"],
            "tokenizer.kind must be one of 'wordpiece', 'bpe', 'saved', 'char', 'byte'; received 'gpt2'.",
        ),
        (["tokenizer.path=vocab.txt"], "must be one of 'wordpiece', 'bpe', 'saved', 'char', 'byte'; received None."),
        (["tokenizer.kind=[1]"], "must be one of 'wordpiece', 'bpe', 'saved', 'char', 'byte'; received '[1]'."),
        (
            ["tokenizer=char"],
            "'tokenizer=char': tokenizer is a section; give its settings one by one: tokenizer.kind, ",
        ),
        (["tokenizer={kind=bpe}"], "'tokenizer={kind=bpe}': tokenizer is a section; give its settings one by one: tok"),
        (
            ["tokenizer.kind=char", "tokenizer.lowercase=true"],
            "tokenizer.lowercase is not a setting of tokenizer.kind='char'; leave it out.",
        ),
        (
            ["tokenizer={kind='bpe',path='a.json',lowercase=true}"],
            "tokenizer.lowercase is not a setting of tokenizer.kind='bpe'; leave it out.",
        ),
        (["tokenizer={kind='byte',path='a.json'}"], "tokenizer.path is not a setting of tokenizer.kind='byte'; leave"),
        (
            ["tokenizer={kind='bpe',path='a.json',vocabulary_size=999}"],
            "tokenizer.vocabulary_size cannot be set with tokenizer.path, because that file decides it; leave",
        ),
        (
            ["tokenizer={kind='wordpiece',path='vocab.txt',sample_bytes=999}"],
            "tokenizer.sample_bytes cannot be set with tokenizer.path, because that file decides it; leave",
        ),
        (["tokenizer={kind='bpe',path=''}"], "tokenizer.path='': string should have at least 1 character."),
        (["data.train="], "data.train is empty; give a file, a glob or 'storybook'."),
        (["data.train=[]"], "data.train is empty; give a file, a glob or 'storybook'."),
        (["data.validation=[]"], "data.validation is empty; give a file, a glob or 'storybook'."),
        (["data.train=['storybook', 'a.txt']"], "data.train mixes 'storybook' with files; use one or the other."),
        (["data.validation=storybook"], "data.validation='storybook' would repeat the training stories; leave"),
        (["data.held_out_fraction=1.0"], "data.held_out_fraction=1.0: input should be less than 1."),
        (
            ["optimizer.final_learning_rate=1e-4"],
            "optimizer.final_learning_rate=0.0001 has no effect with optimizer.schedule='constant'; choose 'linear', "
            "'cosine' or 'wsd', or leave it out.",
        ),
        (
            ["optimizer.schedule=wsd"],
            "optimizer.schedule='wsd' needs optimizer.decay_steps, the number of steps at the end over which the rate "
            "falls; a fifth of the run is a good start.",
        ),
        (
            ["optimizer.decay_steps=2", "optimizer.schedule=cosine"],
            "optimizer.decay_steps=2 has no effect with optimizer.schedule='cosine'; choose 'wsd' or 'inverse_sqrt', "
            "or leave it out (optimizer.decay_steps=none).",
        ),
        (
            ["optimizer.decay_shape=sqrt"],
            "optimizer.decay_shape='sqrt' has no effect without optimizer.decay_steps; set that too, or leave "
            "decay_shape out.",
        ),
        (
            ["optimizer.schedule=inverse_sqrt"],
            "optimizer.schedule='inverse_sqrt' falls as the root of optimizer.warmup_steps / step, and "
            "optimizer.warmup_steps is 0; set it.",
        ),
        (
            ["optimizer.schedule=inverse_sqrt", "optimizer.warmup_steps=2", "optimizer.final_learning_rate=1e-4"],
            "optimizer.final_learning_rate=0.0001 has no effect with optimizer.schedule='inverse_sqrt'; choose",
        ),
        (
            ["optimizer.schedule=wsd", "optimizer.warmup_steps=4", "optimizer.decay_steps=7"],
            "optimizer.decay_steps=7 of train.total_steps=10 leaves no step at the peak of the rate, which comes after "
            "optimizer.warmup_steps=4; it may be at most 6; lower it, or train longer.",
        ),
        (
            ["train.batch_warmup=8"],
            "train.batch_warmup='8' has no steps; write 'train.batch_warmup.STEP=SIZE' for each",
        ),
        (["train.batch_warmup.0=8"], "train.batch_warmup: '0' is not a step; write a whole number, from 1 on."),
        (
            ["train.batch_warmup.3=8", "train.batch_warmup.5=8"],
            "train.batch_warmup.5=8: the batches must grow from step to step, and be smaller than "
            "train.global_batch_size=64; change one of them.",
        ),
        (
            ["train.batch_warmup.3=64"],
            "train.batch_warmup.3=64: the batches must grow from step to step, and be smaller",
        ),
        (
            ["train.batch_warmup.3=6", "train.micro_batch_size=4"],
            "train.batch_warmup.3=6 is not a multiple of train.micro_batch_size=4; change one of the two.",
        ),
        (
            ["train.batch_warmup.10=8"],
            "train.batch_warmup.10: the batches would not reach train.global_batch_size=64 within "
            "train.total_steps=10; set an earlier step, or train longer.",
        ),
        (
            ["optimizer.momentum=0.9"],
            "optimizer.momentum=0.9 has no effect with optimizer.kind='adamw'; choose 'muon', or leave it out.",
        ),
        (
            ["optimizer.final_learning_rate=0.1", "optimizer.schedule=cosine"],
            "optimizer.final_learning_rate=0.1 is above optimizer.learning_rate=0.001; the schedule only falls.",
        ),
        (
            ["optimizer.warmup_steps=11"],
            "optimizer.warmup_steps=11 is more than train.total_steps=10; the rate would never peak. Lower it, "
            "or train longer.",
        ),
        (
            ["optimizer.warmup_steps=10", "optimizer.schedule=cosine"],
            "optimizer.schedule='cosine' falls after its peak, but with optimizer.warmup_steps=10 the rate reaches its "
            "peak at the last step of train.total_steps=10; train longer, lower optimizer.warmup_steps, or choose "
            "optimizer.schedule='constant'.",
        ),
        (
            ["train.total_steps=1", "optimizer.schedule=linear"],
            "with optimizer.warmup_steps=0 the rate reaches its peak at the last step of train.total_steps=1; train",
        ),
        (
            ["samples.num_tokens=129"],
            "samples.num_tokens=129 is more than train.sequence_length=128, the most positions the model has; lower it",
        ),
        (["samples.stop="], "samples.stop='': string should have at least 1 character."),
        (["data.prepared_folder="], "data.prepared_folder='': string should have at least 1 character."),
        (["run_folder="], "run_folder='': string should have at least 1 character."),
        (
            ["evaluation.num_batches=2"],
            "evaluation.num_batches=2 has no effect without evaluation.every_steps, because the evaluation at the end",
        ),
        (
            ["train.precision=float16"],
            "train.precision='float16': input should be 'float32', 'mixed_bfloat16', 'mixed_float16' or",
        ),
        (
            ["model.document_mask=true", "data.mode=lines"],
            "model.document_mask=true does not go with data.mode='lines', where every example is one document; leave "
            "it out, or choose 'packed'.",
        ),
        (
            ["data.predict_end=false"],
            "data.predict_end=false has no effect with data.mode='packed', where every [BOS] is a target; leave it "
            "out (data.predict_end=none), or set data.mode='lines'.",
        ),
        (
            ["train.precision=none"],
            "train.precision is missing; it has no default. Choose one of: 'float32', 'mixed_bfloat16', "
            "'mixed_float16', 'float64'.",
        ),
        (["train=none"], "train is missing; it has no default."),
        (["train=3"], "'train=3': train is a section; give its settings one by one: train.precision, "),
        (["run_folder=none"], "run_folder is missing; it has no default."),
        ([f"train.seed={2**63}"], f"train.seed={2**63}: input should be less than {2**63}."),
    ],
)
def test_impossible_settings_are_refused(overrides: list[str], message: str):
    assert message in refusal(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_heads=2", "model.hidden_dim=2"],
        ["model.num_key_value_heads=3"],
        ["model.num_key_value_heads=1"],
        ["model.positions=rope", "model.num_heads=128", "model.rope_theta=1.5"],
        ["model.rope_theta=10_000.0"],
        ["train.sequence_length=2"],
        ["tokenizer={kind='wordpiece',vocabulary_size=4}"],
        ["tokenizer={kind='bpe',vocabulary_size=258}"],
        ["tokenizer={kind='wordpiece',path='v',lowercase=false}"],
        ["optimizer.warmup_steps=10"],
        ["optimizer.warmup_steps=9", "optimizer.schedule=cosine"],
        ["optimizer.warmup_steps=9", "optimizer.schedule=inverse_sqrt"],
        ["optimizer.schedule=wsd", "optimizer.warmup_steps=4", "optimizer.decay_steps=6"],
        ["optimizer.schedule=wsd", "optimizer.decay_steps=9", "optimizer.decay_shape=sqrt"],
        ["train.batch_warmup.9=63"],
        ["train.total_steps=1", "optimizer.warmup_steps=1"],
        ["train.total_steps=2", "optimizer.warmup_steps=1", "optimizer.schedule=linear"],
        ["profile.at_step=5"],
        ["train.micro_batch_size=auto"],
        ["samples.num_tokens=128"],
        ["model.document_mask=true"],
        ["data.mode=lines", "data.predict_end=false"],
        ["data.mode=packed", "data.predict_end=true"],
        ["optimizer.final_learning_rate=0.001", "optimizer.schedule=linear"],
        ["optimizer.momentum=0.9", "optimizer.kind=muon"],
        ["evaluation.num_batches=2", "evaluation.every_steps=1"],
        [f"train.seed={2**63 - 1}"],
    ],
)
def test_settings_at_their_limits_are_accepted(overrides: list[str]):
    make_config(SETTINGS, overrides)


@pytest.mark.parametrize(
    "override",
    [
        "train.seed='3'",
        "train.seed=3.0",
        "train.seed=true",
        "model.use_bias=1",
        "model.use_bias='true'",
        "optimizer.learning_rate='1e-3'",
        "optimizer.learning_rate=nan",
        "optimizer.learning_rate=inf",
        "distribution.gpus=0",
        "distribution.gpus=[0.0]",
    ],
)
def test_a_value_of_another_type_is_refused(override: str):
    key = override.partition("=")[0]
    assert f"{key}" in refusal(override) and "input should be" in refusal(override)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        # Text is text, even if it looks like something else.
        ("run_folder=2024", "2024"),
        ("run_folder=~/x", "~/x"),
        ("samples.prompt=42", "42"),
        ("samples.prompt=1.5e3", "1.5e3"),
        ("samples.prompt=true", "true"),
        ("samples.prompt=[a, b]", "[a, b]"),
        ("samples.prompt={a = 1}", "{a = 1}"),
        ("samples.prompt=2024-01-31", "2024-01-31"),
        ("samples.prompt= a ", " a "),
        ("samples.prompt=1\nrun_folder = 2", "1\nrun_folder = 2"),
        ("samples.prompt='none'", "none"),
        ('samples.prompt="\\u0041\\n"', "A\n"),
        ("samples.prompt='it", "'it"),
        ('samples.prompt="Hi" # said he', '"Hi" # said he'),
        ('samples.prompt="Hi # said" ', "Hi # said"),
        ("samples.prompt = a = b", "a = b"),
        ("samples.stop=7", "7"),
        # Numbers as people write them.
        ("optimizer.learning_rate=.001", 0.001),
        ("optimizer.clip_norm=1.", 1.0),
        ("optimizer.learning_rate=1e-3", 0.001),
        ("optimizer.learning_rate=+.5E-2", 0.005),
        ("optimizer.clip_norm=1_000", 1000.0),
        ("train.total_steps=1e4", 10_000),
        ("train.total_steps=1.5E+2", 150),
        ("train.total_steps=1_000", 1000),
        ("train.micro_batch_size=3.2e1", 32),
        # true and false, as Python writes them too.
        ("model.pre_norm=True", True),
        ("model.use_bias=FALSE", False),
        # Lists, with quotation marks or after a shell took these away.
        ('data.train=["a","b"]', ("a", "b")),
        ("data.train=[a,b]", ("a", "b")),
        ("data.train=[a b.txt, c[1].txt,]", ("a b.txt", "c[1].txt")),
        ("data.train=['a', b]", ("a", "b")),
        ("data.train=[1,2]", ("1", "2")),
        ("data.train=7", ("7",)),
        ("data.train=a,b.txt", ("a,b.txt",)),
        ("data.train=tfds:imdb_reviews:train[:90%]", ("tfds:imdb_reviews:train[:90%]",)),
        ("data.train=[ab]*.txt", ("[ab]*.txt",)),
        ("distribution.gpus=[1,0]", (1, 0)),
    ],
)
def test_an_override_is_read_by_the_type_of_its_setting(override: str, value: object):
    key = override.partition("=")[0].strip()
    found: Any = make_config(SETTINGS, [override])
    for name in key.split("."):
        found = getattr(found, name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(("given", "value"), [("0", (0,)), ("0,1", (0, 1)), ("1, 0", (1, 0))])
def test_a_list_without_brackets_is_refused_with_what_to_write(given: str, value: tuple[int, ...]):
    message = refusal(f"distribution.gpus={given}")
    (advice,) = shlex.split(message.partition(" Write ")[2].removesuffix("."))
    assert make_config(SETTINGS, [advice]).distribution.gpus == value


def test_weights_of_a_mixture_may_be_written_without_a_digit_before_or_after_the_dot():
    config = make_config(SETTINGS, ["data.train=[a,b]", "data.weights=[.5,1.]"])
    assert config.data.weights == (0.5, 1.0)


@pytest.mark.parametrize("override", ["train.seed=1.5e0", "train.seed=1e-1", "train.seed=1e99999999", "train.seed=0x"])
def test_a_text_that_is_not_a_whole_number_is_refused_quickly(override: str):
    assert "input should be a valid integer" in refusal(override)


@pytest.mark.parametrize("number", ["9" * 5000, "[" * 5000 + "]" * 5000, "1e9999", "-", "'" * 3])
@pytest.mark.parametrize("key", ["train.seed", "optimizer.learning_rate", "data.train", "distribution.gpus", "train"])
def test_a_value_that_python_cannot_hold_is_refused_with_a_short_message(key: str, number: str):
    if key != "data.train":
        assert len(refusal(f"{key}={number}")) < 600


def test_text_that_is_not_utf8_is_refused_once_by_its_key():
    half = "\ud55c글".encode("utf-8", "surrogatepass")[:5].decode("utf-8", "surrogateescape")
    for key in (
        "samples.prompt",
        "run_folder",
        "data.train",
        "samples.stop",
        "data.text_field",
        "data.prepared_folder",
    ):
        message = refusal(f"{key}={half}")
        assert message.startswith(f"{key}") and " holds bytes that are not UTF-8; set the terminal" in message
        assert len(message) < 200
    assert "holds bytes that are not UTF-8" in refusal(f"samples.{half}=1")
    with pytest.raises(UserError, match=r"^samples\.prompt='\\ud83d' holds bytes that are not UTF-8"):
        make_config(SETTINGS | {"samples": {"prompt": "\ud83d"}})


def test_settings_that_are_nested_too_deeply_are_refused():
    settings: dict[str, Any] = {}
    for _ in range(300):
        settings = {"train": settings}
    with pytest.raises(UserError, match="nested too deeply"):
        make_config(settings)
    assert "too many dots" in refusal("a" + ".a" * 5000 + "=1")


@pytest.mark.parametrize("toml", ["run_folder = 3", "data.train = 3", "data.train = [3]", "run_folder = true"])
def test_a_file_is_strict_about_types(toml: str, tmp_path: Path):
    path = tmp_path / "x.toml"
    path.write_text(f"{toml}\ntrain = {{precision = 'float32', total_steps = 10}}")
    with pytest.raises(UserError, match="input should be"):
        load_config(path)


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("learning_rate = .001", "learning_rate = 0.001"),
        ("learning_rate = 1.", "learning_rate = 1.0"),
        ("learning_rate = 1.e-3 # small", "learning_rate = 0.001"),
        ("schedule = cosine", 'schedule = "cosine"'),
        ("schedule = \u201ccosine\u201d", 'schedule = "cosine"'),
        ("schedule = 'cosine", 'schedule = "cosine"'),
    ],
)
def test_a_line_that_is_not_toml_is_shown_as_it_should_be_written(line: str, advice: str, tmp_path: Path):
    path = tmp_path / "x.toml"
    rest = "\nwarmup_steps = 0\n[train]\nprecision = 'float32'\ntotal_steps = 10\n"
    path.write_text(f"[optimizer]\n{line}{rest}", "utf-8")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}: not a readable TOML file: ")
    assert str(error.value).endswith(f". In TOML that line is: {advice}")
    path.write_text(f"[optimizer]\n{advice}{rest}", "utf-8")
    load_config(path)


def test_a_file_s_flag_date_and_step_count_are_refused_with_what_to_write(tmp_path: Path):
    path = tmp_path / "x.toml"
    for given, advice in (
        ("pre_norm = True", "In TOML that line is: pre_norm = true"),
        ("pre_norm = true\n[samples]\nprompt = 2024-01-31", 'it in quotation marks: samples.prompt = "2024-01-31".'),
        ("num_layers = 1e1", "model.num_layers=10.0: input should be a valid integer. Write 10."),
    ):
        path.write_text(f"train = {{precision = 'float32', total_steps = 10}}\n[model]\n{given}")
        with pytest.raises(UserError) as error:
            load_config(path)
        assert advice in str(error.value)


def test_a_file_may_have_a_byte_order_mark_and_another_encoding_is_refused(tmp_path: Path):
    text = "run_folder = 'é'\r\ntrain = {precision = 'float32', total_steps = 10}\r\n"
    path = tmp_path / "x.toml"
    path.write_bytes(text.encode("utf-8-sig"))
    assert load_config(path).run_folder == "é"
    for encoding, place in (("utf-16", 0), ("latin-1", 14)):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=f"not UTF-8 at byte offset {place}; save it as UTF-8"):
            load_config(path)


def test_a_file_without_end_is_refused():
    with pytest.raises(UserError, match=r"/dev/zero: not a readable TOML file: more than \d+ bytes"):
        load_config("/dev/zero")


@pytest.mark.parametrize("key", ["train.seed = ", "x = "])
def test_a_file_that_python_cannot_read_is_refused(key: str, tmp_path: Path):
    path = tmp_path / "x.toml"
    for value in ("9" * 5000, "[" * 5000):
        path.write_text(key + value)
        with pytest.raises(UserError, match="not a readable TOML file"):
            load_config(path)


def test_a_config_below_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny.toml").write_text("train = {precision = 'float32', total_steps = 1}")
    assert load_config("~/tiny.toml").run_folder == "runs/tiny"
    with pytest.raises(UserError, match=r"~nobody-here/tiny\.toml: no such config file"):
        load_config("~nobody-here/tiny.toml")


# finetune_gpt2 has the tokenizer of init.from.
@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "configs").glob("*.toml")) if path.stem != "finetune_gpt2"],
    ids=lambda path: path.stem,
)
@pytest.mark.parametrize(
    "overrides",
    [
        ["tokenizer.kind=char"],
        ["tokenizer.kind=byte"],
        ["tokenizer.kind=bpe"],
        ["tokenizer.kind=wordpiece"],
        ["tokenizer.kind=bpe", "tokenizer.path=tokenizer.json"],
    ],
)
def test_another_kind_of_tokenizer_drops_the_settings_of_the_config_s_own_kind(path: Path, overrides: list[str]):
    tokenizer = load_config(path, overrides).tokenizer
    for override in overrides:
        key, _, value = override.partition("=")
        assert getattr(tokenizer, key.removeprefix("tokenizer.")) == value


def test_settings_of_the_same_kind_of_tokenizer_and_of_the_command_line_stay():
    settings = {**SETTINGS, "tokenizer": {"kind": "wordpiece", "vocabulary_size": 300, "lowercase": False}}
    assert make_config(settings, ["tokenizer.kind=wordpiece"]).tokenizer.lowercase is False
    assert make_config(settings, ["tokenizer.path=v"]).tokenizer.lowercase is False
    assert make_config(settings, ["tokenizer.kind=bpe"]).tokenizer.vocabulary_size == 300
    with pytest.raises(UserError, match=r"tokenizer\.lowercase is not a setting of tokenizer\.kind='char'"):
        make_config(settings, ["tokenizer.lowercase=true", "tokenizer.kind=char"])
    of_file = {**SETTINGS, "tokenizer": {"kind": "bpe", "path": "gpt2.json"}}
    assert make_config(of_file, ["tokenizer.kind=char"]).tokenizer.kind == "char"
    assert make_config(of_file, ["tokenizer.kind=wordpiece"]).tokenizer.vocabulary_size == 5000
    misspelt = {**SETTINGS, "tokenizer": {"kind": "wordpiece", "vocab_size": 300}}
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size is not a setting"):
        make_config(misspelt, ["tokenizer.kind=char"])


def test_the_message_has_a_line_for_each_problem():
    assert len(refusal("train.seed=true", "model.num_layers=0", "optimizer.beta_1=1.0").splitlines()) == 3


def test_overrides_take_toml_values_and_bare_words():
    config = make_config(
        SETTINGS | {"samples": {"stop": "\n"}},
        [
            "data.train=my books/*.txt",
            "data.validation=['a.txt', 'b.txt']",
            "samples.prompt=once upon = a time",
            "samples.stop=None",
            "optimizer.clip_norm=1",
            "train = {precision = 'float64', num_epochs = 2}",
            "run_folder=2024-01-31",
        ],
    )
    assert config.data.train == ("my books/*.txt",)
    assert config.data.validation == ("a.txt", "b.txt")
    assert config.samples.prompt == "once upon = a time"
    assert config.samples.stop is None
    assert config.optimizer.clip_norm == 1.0
    assert (config.train.precision, config.train.total_steps, config.train.num_epochs) == ("float64", None, 2)
    assert config.run_folder == "2024-01-31"


def test_the_later_override_wins_and_the_given_settings_are_not_changed():
    settings = {"run_folder": "r", "train": {"precision": "float32", "total_steps": 10}}
    assert make_config(settings, ["train.seed=1", "train.seed=2"]).train.seed == 2
    assert settings == {"run_folder": "r", "train": {"precision": "float32", "total_steps": 10}}


@pytest.mark.parametrize("text", ["train.seed", "=3", "  =3", ""])
def test_a_word_that_assigns_nothing_is_not_an_override(text: str):
    assert f"{text!r} is not an override; write section.key=value." in refusal(text)


def test_a_setting_is_not_a_section():
    assert "'train.seed.x=1': seed is a setting, not a section." in refusal("train.seed=1", "train.seed.x=1")


@pytest.mark.parametrize("kind", ["wordpiece", "wordpiece,path=v.txt", "bpe", "bpe,path=a.json", "char", "byte"])
def test_resolved_config_reads_back_as_itself(kind: str, tmp_path: Path):
    config = make_config(
        SETTINGS,
        [
            *(f"tokenizer.{setting}" for setting in f"kind={kind}".split(",")),
            "data.train=['a \"b\".txt', 'c\\d.txt']",
            "data.validation=ü.txt",
            'samples.stop="\\n\\u0000"',
            "optimizer.epsilon=1e-30",
            "distribution.gpus=[1, 0]",
        ],
    )
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert load_config(tmp_path / "config.toml") == config


def test_run_folder_is_named_after_the_file(tmp_path: Path):
    path = tmp_path / "tiny.toml"
    path.write_text("train = {precision = 'float32', total_steps = 1}")
    assert load_config(path).run_folder == "runs/tiny"
    assert load_config(path, ["run_folder=else/where"]).run_folder == "else/where"


def test_unreadable_file_is_refused(tmp_path: Path):
    path = tmp_path / "bad.toml"
    for content in (b"[train\n", b"train = \xff", b"a = 1\na = 2", b"\0", b"a = 'b"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad.toml: not a readable TOML file: "):
            load_config(path)
    with pytest.raises(UserError, match=rf" is a folder, not a config file; .*: trainer train --resume {tmp_path}$"):
        load_config(tmp_path)


def test_a_missing_file_is_refused_with_the_configs_that_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"quickstat.toml: no such config file. In configs/: .*configs/quickstart.toml"):
        load_config("configs/quickstat.toml")
    monkeypatch.chdir(tmp_path)
    for path in ("x.toml", "configs/quickstart.toml", "quickstat"):
        with pytest.raises(UserError, match=rf"^{path}: no such config file. Shipped configs: .*minigpt, .*quickstart"):
            load_config(path)


def test_a_shipped_config_is_found_by_its_name_in_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    shipped = load_config(ROOT / "configs/quickstart.toml")
    assert load_config("quickstart") == load_config("quickstart.toml") == load_config(Path("quickstart")) == shipped
    assert load_config("quickstart").run_folder == "runs/quickstart"
    # A folder of that name, such as a checkout, is not a config. A run's folder is refused like any other folder.
    Path("quickstart").mkdir()
    assert load_config("quickstart") == shipped
    Path("quickstart/config.toml").touch()
    with pytest.raises(UserError, match=r" is a folder, not a config file; .*: trainer train --resume quickstart$"):
        load_config("quickstart")
    # A file goes first.
    Path("minigpt.toml").write_text('[train]\nprecision = "float32"\ntotal_steps = 3\n', encoding="utf-8")
    assert load_config("minigpt.toml").train.total_steps == 3


def test_total_steps_and_num_epochs_replace_each_other():
    epochs = {**SETTINGS, "train": {"precision": "float32", "num_epochs": 2}}
    for settings in (SETTINGS, epochs):
        steps = make_config(settings, ["train.total_steps=7"]).train
        assert (steps.total_steps, steps.num_epochs) == (7, None)
        passes = make_config(settings, ["train.num_epochs=3"]).train
        assert (passes.total_steps, passes.num_epochs) == (None, 3)
        # With the other dropped by hand it stays as it was, and a contradiction on the command line is refused.
        assert make_config(settings, ["train.num_epochs=none", "train.total_steps=7"]).train == steps
        with pytest.raises(UserError, match=r"train.total_steps=7 and train.num_epochs=3: set exactly one of the two"):
            make_config(settings, ["train.num_epochs=3", "train.total_steps=7"])
    # Nothing replaces what the file sets.
    with pytest.raises(UserError, match=r"train.total_steps=None and train.num_epochs=None: set exactly one"):
        make_config(epochs, ["train.num_epochs=none"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_config_is_sound(path: Path):
    load_config(path)


def test_only_the_configs_of_the_tutorial_s_text_fold_capitals():
    configs = {path.stem: load_config(path).tokenizer for path in (ROOT / "configs").glob("*.toml")}
    lowering = {name for name, tokenizer in configs.items() if getattr(tokenizer, "lowercase", False)}
    assert lowering == {"minigpt", "minigpt_fast"}
    # GPT-2's own number of tokens, by which the model has GPT-2's shape.
    assert {each.vocabulary_size for name, each in configs.items() if name.startswith("gpt2")} == {50257}


def test_prepared_data_is_shared_by_configs_that_prepare_alike():
    def path(*overrides: str) -> str:
        return make_config(SETTINGS, ["data.train=a.txt", *overrides]).prepared_name()

    alike = [
        "data.mode=lines", "model.num_layers=9", "train.seed=4", "run_folder=other", "data.prepared_folder=elsewhere",
        "data.shuffle_window_mb=9",
    ]  # fmt: skip
    assert {path(override) for override in alike} == {path()}
    others = [
        "data.train=b.txt", "data.validation=b.txt", "data.documents=file", "data.min_bytes=1",
        "data.held_out_fraction=0.5", "tokenizer.kind=char", "tokenizer={kind='wordpiece',vocabulary_size=9}",
        "tokenizer={kind='wordpiece',lowercase=false}",
    ]  # fmt: skip
    assert len({path(), *(path(override) for override in others)}) == len(others) + 1
    files = ["tokenizer={kind='bpe'}", "tokenizer={kind='bpe',path='a'}", "tokenizer={kind='bpe',path='b'}"]
    assert len({path(), *(path(override) for override in files)}) == len(files) + 1
    # Nothing is held out if there is a validation text.
    validation = "data.validation=b.txt"
    of_file = {**SETTINGS, "data": {"held_out_fraction": 0.5, "storybook_seed": 3, "storybook_stories": 9}}
    assert make_config(of_file, ["data.train=a.txt", validation]).prepared_name() == path(validation)


@pytest.mark.parametrize(
    ("overrides", "cause"),
    [
        (["data.train=a.txt", "data.storybook_seed=3"], r"data\.train=\['a\.txt'\]"),
        (["data.storybook_stories=3", "data.train=a.txt"], r"data\.train=\['a\.txt'\]"),
        (["data.train=a.txt", "data.validation=b.txt", "data.held_out_fraction=0.5"], r"data\.validation=\['b\.txt'\]"),
    ],
)
def test_an_override_without_effect_is_refused_unless_it_drops_a_setting(overrides, cause):
    with pytest.raises(UserError, match=rf"^'data\.\w+=[\d.]+' has no effect with {cause}; leave out one of the two"):
        make_config(SETTINGS, overrides)
    make_config(SETTINGS, ["data.train=a.txt", "data.validation=b.txt", "data.held_out_fraction=none"])


def test_prepared_storybooks_differ_by_their_stories():
    def path(*overrides: str) -> str:
        return make_config(SETTINGS, overrides).prepared_name()

    assert len({path(), path("data.storybook_seed=3"), path("data.storybook_stories=9")}) == 3
    assert path().startswith("storybook-")


def test_logits_are_rounded_up_to_a_multiple():
    sizes = (1, 127, 128, 129, 50257)
    for multiple, rounded in ((1, sizes), (128, (128, 128, 128, 256, 50304))):
        model = make_config(SETTINGS, [f"model.vocabulary_multiple={multiple}"]).model
        assert tuple(model.num_logits(size) for size in sizes) == rounded


def test_every_setting_is_read_somewhere():
    read = set()
    for path in (ROOT / "trainer").rglob("*.py"):
        for node in ast.walk(_without_checks(ast.parse(path.read_text(encoding="utf-8")))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            # `from` is a keyword, so its attribute is read by getattr.
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 2:
                read.add(getattr(node.args[1], "value", None))
    assert [key for key in setting_names() if key.rpartition(".")[2] not in read] == []


class _WithoutChecks(ast.NodeTransformer):
    """To check a setting is not to use it."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        return None if node.name == "_check" else self.generic_visit(node)


def _without_checks(tree: ast.Module) -> ast.AST:
    return _WithoutChecks().visit(tree)


def _subclasses(kind: type[Section]) -> list[type[Section]]:
    return [each for direct in kind.__subclasses__() for each in (direct, *_subclasses(direct))]


@pytest.mark.slow
def test_a_run_reads_every_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Unlike the name only, which the test before looks for: it can be the name of another section's setting."""
    import trainer

    read: set[tuple[type, str]] = set()
    plain = Section.__getattribute__

    def noted(self: Section, name: str) -> Any:
        # To check a setting is not to use it.
        if sys._getframe(1).f_code.co_name != "_check":
            read.add((type(self), name))
        return plain(self, name)

    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("".join(f"the {i} cats sat on the mat\n" for i in range(300)), encoding="utf-8")
    Path("b.jsonl").write_text('{"text": "a dog"}\n{"broken"', encoding="utf-8")
    settings = {
        "run_folder": "run",
        "data": {"train": ["a.txt", "b.jsonl"], "max_broken_fraction": 0.5},
        "model": {"num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4, "positions": "rope"},
        "train": {"precision": "float32", "num_epochs": 1, "sequence_length": 8, "global_batch_size": 128},
        "optimizer": {"kind": "muon", "schedule": "wsd", "decay_steps": 1},
        "evaluation": {"every_steps": 2},
        "samples": {"num_beams": 2, "top_k": 2, "num_tokens": 2},
        "profile": {"at_step": 1, "num_steps": 1},
    }
    config = make_config(settings)
    stories = make_config(settings, ["data.train=storybook", "data.storybook_stories=300"])
    with_file = make_config(settings, ["tokenizer={kind='wordpiece',path='run/tokenizer/vocab.txt'}"])
    monkeypatch.setattr(Section, "__getattribute__", noted)
    trainer.train(config, say=lambda line: None)
    trainer.batches(stories, say=lambda line: None)
    trainer.batches(with_file, say=lambda line: None)
    monkeypatch.undo()

    unread = []
    for key in setting_names():
        section, _, name = key.rpartition(".")
        kinds = [kind for kind in _subclasses(Section) if name in kind.model_fields and _is_section(kind, section)]
        if not any((kind, name) in read for kind in kinds):
            unread.append(key)
    # Read only for a TPU, and this machine has none.
    assert unread == [f"distribution.tpu_{name}" for name in ("name", "zone", "project")]


def _is_section(kind: type, section: str) -> bool:
    return (
        kind is Config
        if not section
        else section in kind.__name__.lower() or (section == "tokenizer" and kind in sections_of(TokenizerConfig))
    )


def test_config_is_read_without_tensorflow():
    program = "import sys, trainer; trainer.load_config('configs/quickstart.toml'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"tensorflow", "keras", "numpy"} & set(loaded.stdout.split())


def test_shipped_schema_is_current():
    command = "python -c 'import trainer.config.file as c; print(c.json_schema(), end=\"\")' > configs/schema.json"
    assert (ROOT / "configs/schema.json").read_text(encoding="utf-8") == json_schema(), f"write it anew: {command}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_schema_knows_what_shipped_configs_set(path: Path):
    import tomllib

    schema = json.loads(json_schema())
    settings = tomllib.loads(path.read_text(encoding="utf-8"))
    assert set(schema["required"]) <= settings.keys()
    for section, values in settings.items():
        found = schema["properties"][section]
        kinds = [
            schema["$defs"][kind["$ref"].rpartition("/")[2]] for kind in found.get("oneOf", [found]) if "$ref" in kind
        ]
        if kinds:
            assert any(values.keys() <= kind["properties"].keys() for kind in kinds)
            assert any(set(kind.get("required", [])) <= values.keys() for kind in kinds)


def test_schema_describes_every_setting():
    schema = json.loads(json_schema())
    settings = [setting for section in schema["$defs"].values() for name, setting in section["properties"].items()]
    assert sum("description" in setting for setting in settings) > len(settings) - 8  # The kinds of tokenizer.
    kinds = schema["properties"]["tokenizer"]["oneOf"]
    assert len(kinds) == len({kind["$ref"] for kind in kinds}) == 7
    assert {"type": "string"} in schema["$defs"]["DataConfig"]["properties"]["train"]["anyOf"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.weights=[1]"], r"data\.weights=\[1\.0\] must have a weight for each source of data\.train: 2, not 1"),
        (["data.weights=[1,2]", "data.validation=v"], r"for each source of data\.validation: 1, not 2\. Or leave"),
        (["data.weights=[1,2000]"], r"data\.weights=\[1\.0, 2000\.0\]: the smallest weight must be at least 1/1024 of"),
        (
            ["data.weights=[1,0]"],
            r"data\.weights=\[1\.0, 0\.0\]: the source 'b' has weight 0 at every step; leave it out",
        ),
        (["data.weights=[0,0]"], r"data\.weights=\[0\.0, 0\.0\]: no source has a weight"),
        (["data.weights=[1,-1]"], r"data\.weights\.1=-1: input should be greater than or equal to 0"),
        (["data.weights=[1,2]", "data.shuffle_window_mb=8"], r"data\.shuffle_window_mb and data\.weights cannot be"),
        (["data.weights=[1,2]", "train.total_steps=none", "train.num_epochs=1"], r"train\.num_epochs cannot be used"),
    ],
)
def test_weights_that_do_not_make_a_mixture_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        make_config(SETTINGS, ['data.train=["a","b"]', *overrides])


def test_weights_change_from_steps_on_in_a_file_and_in_overrides():
    data = {"train": ["a", "b"], "weights": [9, 1], "weights_from_step": {"50": [0, 1]}}
    mixture = SETTINGS | {"data": data, "train": SETTINGS["train"] | {"total_steps": 99}}
    config = make_config(mixture, ["data.weights_from_step.1__0=[1,1.]"])
    assert list(config.data.weights_from_step.items()) == [(10, (1, 1)), (50, (0, 1))]
    assert make_config(tomllib.loads(config.to_toml())) == config
    assert not make_config(mixture, ["data.weights_from_step=none"]).data.weights_from_step
    assert not make_config(mixture, ["data.weights_from_step.50=none"]).data.weights_from_step
    whole = make_config(SETTINGS, ["data.train=[a,b]", "data.weights=[1,0]", "data.weights_from_step={5=[0, 1]}"])
    assert whole.data.weights_from_step == {5: (0, 1)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.weights=none"], r"data\.weights_from_step has no effect without data\.weights"),
        (
            ["data.weights_from_step.7=[1]"],
            r"data\.weights_from_step\.7=\[1\.0\] must have a weight for each source of",
        ),
        (["data.weights_from_step.7=[0,0]"], r"data\.weights_from_step\.7=\[0\.0, 0\.0\]: no source has a weight"),
        (
            ["data.weights_from_step.7=[1,2000]"],
            r"data\.weights_from_step\.7=.*: the smallest weight must be at least 1/1024",
        ),
        (["data.weights_from_step.7=[1e300,1]"], r"input should be 0 or from 1\.2e-38 to 3\.4e\+38"),
        (
            ["data.weights_from_step.0=[1,2]"],
            r"data\.weights_from_step: '0' is not a step; write a whole number, from 1",
        ),
        (["data.weights_from_step.05=[1,2]"], r"data\.weights_from_step: 5 is there twice"),
        (["data.weights_from_step.x=[1,2]"], r"data\.weights_from_step: 'x' is not a step"),
        (
            ["data.weights_from_step=[1,2]"],
            r"data\.weights_from_step=.* has no steps; write 'data\.weights_from_step\.STEP=",
        ),
        (
            ["data.weights_from_step.99=[1,2]"],
            r"data\.weights_from_step\.99 has no effect with train\.total_steps=99; leave",
        ),
        (["data.weights=[1,0]", "data.weights_from_step.5=[2,0]"], r"the source 'b' has weight 0 at every step"),
    ],
)
def test_changes_of_weights_without_a_sense_are_refused(overrides, message):
    mixture = {"train": ["a", "b"], "weights": [9, 1], "weights_from_step": {"5": [1, 1]}}
    settings = SETTINGS | {"data": mixture, "train": SETTINGS["train"] | {"total_steps": 99}}
    with pytest.raises(UserError, match=message):
        make_config(settings, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # In 32 bits infinite, and 0.
        ("optimizer.epsilon=1e39", "optimizer.epsilon=1e+39: input should be 0 or from 1.2e-38 to 3.4e+38"),
        (
            "optimizer.learning_rate=1e-50",
            "optimizer.learning_rate=1e-50: input should be 0 or from 1.2e-38 to 3.4e+38",
        ),
        # In 32 bits 1.
        (
            "optimizer.beta_2=0.99999999",
            "optimizer.beta_2=0.99999999: input should be less than or equal to 0.99999994",
        ),
        (
            "optimizer.beta_1=0.99999999",
            "optimizer.beta_1=0.99999999: input should be less than or equal to 0.99999994",
        ),
        ("model.dropout=0.99999999999", "model.dropout=0.99999999999: input should be less than or equal to 0.99999"),
        ("data.weights=[1e300]", "data.weights=[1e+300]: input should be 0 or from 1.2e-38 to 3.4e+38"),
        ("checkpoint.keep_last=9223372036854775808", "keep_last=9223372036854775808: input should be less than 2**63"),
        (f"log.every_steps={10**400}", "...: input should be less than 2**63, to fit 64 bits."),
        ("model.num_layers=99999999", "model.num_layers=99999999: input should be less than or equal to 10000."),
    ],
)
def test_a_number_that_training_would_read_as_another_is_refused(override: str, message: str):
    assert message in refusal(override)
