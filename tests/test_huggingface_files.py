"""Models in Hugging Face's form go out and come in. NumPy computes from the files what the classes would compute;
tests/parity/ compares with the classes themselves.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from random_run import SEQUENCE_LENGTH, random_run  # type: ignore[import-not-found]
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

import trainer
from trainer.config.file import load_config
from trainer.config.settings import Config
from trainer.errors import UserError
from trainer.exchange import huggingface_export
from trainer.exchange.huggingface import check_settings, config_of, read_weights
from trainer.exchange.huggingface_export import layout_for, remarks, write_huggingface
from trainer.exchange.layouts import LAYOUTS, misfits
from trainer.exchange.open import open_model
from trainer.model.build import build_gpt
from trainer.model.size import parameter_shapes
from trainer.tokenizers.characters import ByteTokenizer, CharTokenizer
from trainer.tokenizers.tokenizer_files import load_tokenizer

LENGTH = 12
GPT2 = {"num_layers": 2, "hidden_dim": 12, "intermediate_dim": 20, "pre_norm": True, "activation": "gelu_tanh"}
LLAMA = {
    **GPT2,
    "num_heads": 4,
    "activation": "swiglu",
    "norm": "rms",
    "positions": "rope",
    "use_bias": False,
    "head_dim": 4,
}
WITHOUT_OUTPUT_BIAS = ["query_key_value", "attention_output", "feedforward", "norm"]
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2 tied": {**GPT2, "tied_embeddings": True},
    "gpt2 untied": {**GPT2, "use_bias": WITHOUT_OUTPUT_BIAS, "activation": "relu", "num_heads": 3},
    "gpt2 padded": {**GPT2, "tied_embeddings": True, "vocabulary_multiple": 64, "activation": "gelu"},
    "gpt2 epsilon": {**GPT2, "tied_embeddings": True, "norm_epsilon": 0.01, "num_heads": 1},
    "llama untied": {**LLAMA, "head_dim": None, "hidden_dim": 16},
    "llama tied": {**LLAMA, "tied_embeddings": True, "norm_epsilon": 0.01, "rope_theta": 100.0},
    "llama grouped": {**LLAMA, "num_key_value_heads": 2, "vocabulary_multiple": 64},
    "llama biases": {
        **LLAMA,
        "num_key_value_heads": 1,
        "use_bias": ["query_key_value", "attention_output", "feedforward"],
    },
    "qwen3": {**LLAMA, "qk_norm": True, "num_key_value_heads": 2, "norm_epsilon": 0.01},
}

# Their classes have biases that these models lack: zeros are written.
FEWER_BIASES: dict[str, dict[str, Any]] = {
    "gpt2 without biases": {**GPT2, "use_bias": False, "activation": "relu"},
    "llama query biases": {**LLAMA, "use_bias": ["query_key_value"]},
}


def config_for(shape: str, **model: Any) -> Config:
    of_shape = (SHAPES | FEWER_BIASES)[shape]
    settings = {key: value for key, value in {**of_shape, **model}.items() if value is not None}
    return tiny_config(model={"num_heads": 2, **settings}, train={"sequence_length": LENGTH})


def lively_weights(config: Config, vocabulary_size: int = 258) -> dict[str, np.ndarray]:
    """Returns weights that all change the logits: new ones are near 0 or 1."""
    random = np.random.default_rng(0)
    shapes = parameter_shapes(config.model, vocabulary_size, config.train.sequence_length)
    return {path: (random.normal(0, 0.3, shape) + path.endswith("gamma")).astype(np.float32) for path, shape in shapes}


def written(folder: Path, shape: str = "gpt2 tied", **model: Any) -> tuple[Config, dict[str, np.ndarray]]:
    config = config_for(shape, **model)
    weights = lively_weights(config)
    write_huggingface(weights, config, ByteTokenizer(), folder)
    return config, weights


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Changes tensors of model.safetensors; __ in a name is a dot. None removes one."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: value for name, value in tensors.items() if value is not None}
    safetensors.numpy.save_file(kept, folder / "model.safetensors")


# --- what the classes compute, in NumPy, from the files ---


def logits_of_files(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Returns float64 [sequence, vocab_size] for int [sequence]."""
    settings = json.loads((folder / "config.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: t.astype(np.float64) for file in files for name, t in safetensors.numpy.load_file(file).items()}
    compute = {"gpt2": gpt2_logits, "llama": llama_logits, "qwen3": llama_logits}[settings["model_type"]]
    return compute(settings, tensors, tokens)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns [sequence, heads, width] for queries of that shape, and keys and values [sequence, key_heads, width]."""
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
    return np.einsum("hqk,khd->qhd", softmax(scores), v)


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def gpt2_logits(c: dict[str, Any], t: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centered = x - x.mean(-1, keepdims=True)
        unit = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + c["layer_norm_epsilon"])
        return unit * t[f"transformer.{name}.weight"] + t[f"transformer.{name}.bias"]

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"transformer.{name}.weight"] + t[f"transformer.{name}.bias"]

    n = len(tokens)
    x = t["transformer.wte.weight"][tokens] + t["transformer.wpe.weight"][:n]
    for i in range(c["n_layer"]):
        q, k, v = np.split(conv(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        heads = attend(*(part.reshape(n, c["n_head"], -1) for part in (q, k, v)))
        x = x + conv(heads.reshape(n, -1), f"h.{i}.attn.c_proj")
        inner = ACTIVATIONS[c["activation_function"]](conv(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"))
        x = x + conv(inner, f"h.{i}.mlp.c_proj")
    tied = c["tie_word_embeddings"]
    return norm(x, "ln_f") @ t["transformer.wte.weight" if tied else "lm_head.weight"].T


def llama_logits(c: dict[str, Any], t: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c["rms_norm_eps"]) * t[f"model.{name}.weight"]

    def linear(x: np.ndarray, name: str, has_bias: bool) -> np.ndarray:
        y = x @ t[f"model.{name}.weight"].T
        return y + t[f"model.{name}.bias"] if has_bias else y

    def unit(x: np.ndarray, name: str) -> np.ndarray:
        return norm(x, name) if f"model.{name}.weight" in t else x

    n, width = len(tokens), c["head_dim"]
    theta = c["rope_parameters"]["rope_theta"]
    angles = np.arange(n)[:, None] * theta ** (-np.arange(0, width, 2) / width)
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def rotated(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        return x * cos + np.concatenate([-second, first], -1) * sin

    x = t["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        normed, layer = norm(x, f"layers.{i}.input_layernorm"), f"layers.{i}.self_attn"
        q, k, v = (
            linear(normed, f"{layer}.{name}_proj", c["attention_bias"]).reshape(n, -1, width)
            for name in ("q", "k", "v")
        )
        q, k = unit(q, f"{layer}.q_norm"), unit(k, f"{layer}.k_norm")
        mixed = attend(rotated(q), rotated(k), v).reshape(n, -1)
        x = x + linear(mixed, f"{layer}.o_proj", c["attention_bias"])
        normed, mlp = norm(x, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp"
        has_bias = c.get("mlp_bias", False)  # Qwen3 has no such key.
        gate, up = (linear(normed, f"{mlp}.{name}_proj", has_bias) for name in ("gate", "up"))
        x = x + linear(ACTIVATIONS[c["hidden_act"]](gate) * up, f"{mlp}.down_proj", has_bias)
    tied = c["tie_word_embeddings"]
    return norm(x, "norm") @ t["model.embed_tokens.weight" if tied else "lm_head.weight"].T


@pytest.mark.parametrize("shape", [*SHAPES, *FEWER_BIASES])
def test_the_files_compute_what_the_model_computes(shape: str, tmp_path: Path):
    config, weights = written(tmp_path, shape)
    model = build_gpt(config, ByteTokenizer.vocabulary_size, ByteTokenizer.bos_id)
    assert weights.keys() == {variable.path for variable in model.variables}
    for variable in model.variables:
        variable.assign(weights[variable.path])
    tokens = np.random.default_rng(1).integers(0, 258, LENGTH)
    expected = logits_of_files(tmp_path, tokens)
    assert np.abs(expected).max() > 1
    difference = np.abs(model(tokens[np.newaxis].astype(np.int32)).numpy()[0] - expected).max()
    assert difference <= 1e-5 * np.abs(expected).max()  # float32: separates a formula from rounding


# --- there and back ---


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_settings_come_back_bit_for_bit(shape: str, tmp_path: Path):
    config, weights = written(tmp_path, shape)
    check_settings(tmp_path, config)
    again = read_weights(tmp_path, config, 258)
    assert {path: array.tobytes() for path, array in again.items()} == {
        path: array.tobytes() for path, array in weights.items()
    }
    assert {(array.dtype, array.flags.c_contiguous) for array in again.values()} == {(np.dtype(np.float32), True)}
    found = config_of(tmp_path)
    shapes = [list(parameter_shapes(each.model, 258, LENGTH)) for each in (found, config)]
    assert shapes[0] == shapes[1]
    assert found.train.sequence_length == LENGTH
    check_settings(tmp_path, found)


def test_bfloat16_is_rounded_once_and_takes_half_the_space(tmp_path: Path):
    config, weights = written(tmp_path / "wide", "llama grouped")
    write_huggingface(weights, config, ByteTokenizer(), tmp_path / "narrow", "bfloat16")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("wide", "narrow")]
    assert sizes[1] < 0.6 * sizes[0]
    again = read_weights(tmp_path / "narrow", config, 258)
    for path, weight in weights.items():
        assert again[path].dtype == np.float32
        assert np.all(np.abs(again[path] - weight) <= 2.0**-8 * np.abs(weight))
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_large_models_are_written_in_several_files(tmp_path: Path, monkeypatch):
    config, weights = written(tmp_path / "one", "llama biases")
    monkeypatch.setattr(huggingface_export, "MAX_SHARD_BYTES", 6000)
    write_huggingface(weights, config, ByteTokenizer(), tmp_path / "several")
    files = sorted(file.name for file in (tmp_path / "several").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * weight.size for weight in weights.values())
    stored = {name: file for file in files for name in safetensors.numpy.load_file(tmp_path / "several" / file)}
    assert index["weight_map"] == stored
    again = read_weights(tmp_path / "several", config, 258)
    assert all(np.array_equal(again[path], weight) for path, weight in weights.items())
    (tmp_path / "several" / files[1]).unlink()
    with pytest.raises(UserError, match=rf"several/{files[1]}: cannot be read"):
        read_weights(tmp_path / "several", config, 258)


def test_files_as_other_programs_write_them_are_read(tmp_path: Path):
    config, weights = written(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    # GPT-2 as it was published: names without the class, and the causal mask beside the weights.
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, LENGTH, LENGTH), np.float32) for i in range(2)}
    safetensors.numpy.save_file(bare | masks, tmp_path / "model.safetensors")
    again = read_weights(tmp_path, config, 258)
    assert all(np.array_equal(again[path], weight) for path, weight in weights.items())
    # A tied matrix that was saved twice.
    twice = bare | {"lm_head.weight": bare["wte.weight"]}
    safetensors.numpy.save_file(twice, tmp_path / "model.safetensors")
    read_weights(tmp_path, config, 258)
    safetensors.numpy.save_file(bare | {"lm_head.weight": bare["wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has a tensor lm_head\.weight, which the model of config\.json has no place"):
        read_weights(tmp_path, config, 258)


def test_half_precision_is_read(tmp_path: Path):
    config, weights = written(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(halves, tmp_path / "model.safetensors")
    again = read_weights(tmp_path, config, 258)
    assert all(np.array_equal(again[path], weight.astype(np.float16)) for path, weight in weights.items())
    edit_tensors(tmp_path, transformer__ln_f__weight=np.ones(12, np.int8))
    with pytest.raises(UserError, match=r"the tensor transformer\.ln_f\.weight is I8; only float32, bfloat16 and"):
        read_weights(tmp_path, config, 258)


def test_an_exported_run_computes_the_bits_of_the_run(tmp_path: Path):
    shape = ("model.pre_norm=true", "model.tied_embeddings=true", "model.vocabulary_multiple=64")
    run = random_run(tmp_path / "run", *shape)
    out = trainer.export(str(run.path), "huggingface", str(tmp_path / "out"), say=lambda line: None)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
        each.name for each in out.path.iterdir()
    }
    tokens = np.random.default_rng(1).integers(0, 258, (2, SEQUENCE_LENGTH)).astype(np.int32)
    of_run, again = (open_model(str(path)) for path in (run.path, out.path))
    assert np.array_equal(of_run.model(tokens), again.model(tokens))
    assert of_run.tokenizer.fingerprint == again.tokenizer.fingerprint


# --- what does not fit ---


@pytest.mark.parametrize("shape", SHAPES)
def test_settings_of_another_model_are_refused_with_the_overrides_that_fit(shape: str, tmp_path: Path):
    written(tmp_path, shape)
    other = tiny_config(
        model={"num_heads": 2, "num_key_value_heads": 1, "head_dim": 6},
        train={"sequence_length": 2 * LENGTH},
        tokenizer={"kind": "saved", "path": str(tmp_path)},
    )
    with pytest.raises(UserError, match=r"config\.json: the settings describe another model\. Give: model\.") as error:
        check_settings(tmp_path, other)
    overrides = str(error.value).partition(" Give: ")[2].replace("'", "").split()
    sections = {name: getattr(other, name).model_dump(exclude_none=True) for name in ("model", "train", "tokenizer")}
    fitting = tiny_config("unused", *overrides, **sections)
    check_settings(tmp_path, fitting)
    read_weights(tmp_path, fitting, 258, say=lambda line: None)


def test_positions_beyond_the_sequence_length_are_left_out_and_a_line_says_so(tmp_path: Path):
    config, weights = written(tmp_path)
    lines: list[str] = []
    shorter = tiny_config(model=config.model.model_dump(exclude_none=True), train={"sequence_length": LENGTH - 2})
    check_settings(tmp_path, shorter)
    again = read_weights(tmp_path, shorter, 258, lines.append)
    name = "gpt/position_embedding/embeddings"
    assert np.array_equal(again[name], weights[name][: LENGTH - 2])
    assert lines == [f"{tmp_path} has 12 positions; the first 10 are used (train.sequence_length)."]
    longer = tiny_config(model=config.model.model_dump(exclude_none=True), train={"sequence_length": LENGTH + 1})
    with pytest.raises(UserError, match=r"another model\. Give: train\.sequence_length=12$"):
        check_settings(tmp_path, longer)
    with pytest.raises(
        UserError, match=r"transformer\.wpe\.weight has the shape \[12, 12\].*Give train\.sequence_length=12 or less"
    ):
        read_weights(tmp_path, longer, 258)


def test_rows_beyond_the_vocabulary_need_vocabulary_multiple(tmp_path: Path):
    written(tmp_path, "gpt2 padded")
    (tmp_path / "tokenizer.json").unlink()
    config = config_for("gpt2 padded", vocabulary_multiple=1)
    with pytest.raises(
        UserError,
        match=r"wte\.weight has the shape \[320, 12\], and the config needs \[258, 12\]\. With "
        r"model\.vocabulary_multiple=64 the 258 tokens have 320 rows",
    ):
        read_weights(tmp_path, config, 258)
    read_weights(tmp_path, config_for("gpt2 padded"), 258)


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path):
    config, _ = written(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json has 258 tokens, and the tokenizer of the run 300"):
        read_weights(tmp_path, config, 300)


def test_the_first_tensor_that_differs_is_named(tmp_path: Path):
    config, _ = written(tmp_path)
    changes = {
        "transformer__h__1__mlp__c_fc__weight": (
            np.zeros((12, 21), np.float32),
            r"c_fc\.weight has the shape \[12, 21\]",
        ),
        "transformer__h__0__ln_1__bias": (None, r"has no tensor transformer\.h\.0\.ln_1\.bias, which the model needs"),
        "transformer__wte__weight": (np.zeros((257, 12), np.float32), r"wte\.weight has the shape \[257, 12\], and"),
    }
    for name, (tensor, message) in changes.items():
        edit_tensors(tmp_path, **{name: tensor})
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path, config, 258)


def test_a_tensor_without_a_place_is_named(tmp_path: Path):
    config, _ = written(tmp_path)
    edit_tensors(tmp_path, transformer__h__0__attn__q_norm__weight=np.ones(4, np.float32))
    with pytest.raises(UserError, match=r"has a tensor transformer\.h\.0\.attn\.q_norm\.weight, which the model of"):
        read_weights(tmp_path, config, 258)


def test_damaged_and_missing_files_are_named(tmp_path: Path):
    config, _ = written(tmp_path / "whole")

    def damaged(name: str, content: bytes | None) -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        return folder

    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for name, content, message in [
        ("model.safetensors", whole[:-1], "model.safetensors: cannot be read"),
        ("model.safetensors", b"", "model.safetensors: cannot be read"),
        ("model.safetensors", None, "has no model.safetensors and no model.safetensors.index.json"),
        ("config.json", None, "has no config.json that can be read"),
        ("config.json", b"{", "config.json: not JSON"),
        ("config.json", b"[]", "config.json: not a JSON object"),
        ("config.json", b'{"model_type": "gpt2", "n_layer": "2"}', "n_layer='2' is not a count"),
        ("config.json", b'{"model_type": "gpt2", "layer_norm_epsilon": 2}', "no such model: norm_epsilon: Input"),
        ("config.json", b'{"model_type": "gpt2", "n_positions": -1}', "n_positions=-1 is not a count"),
        ("tokenizer.json", b'{"model": {"vocab": [["a", 1]]}}', "tokenizer.json: its vocabulary is not one of"),
    ]:
        with pytest.raises(UserError) as error:
            read_weights(damaged(name, content), config, 258)
        assert message in str(error.value)
    only_torch = damaged("model.safetensors", None)
    (only_torch / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"PyTorch's own form, which can hold programs\. Save them as safetensors"):
        read_weights(only_torch, config, 258)


def test_every_shipped_config_except_the_tutorial_s_can_leave_for_transformers():
    configs = (Path(__file__).parent.parent / "configs").glob("*.toml")
    models = {path.stem: load_config(path).model for path in configs}
    stay = {name for name, model in models.items() if all(misfits(layout, model) for layout in LAYOUTS)}
    assert stay == {"minigpt"}


def test_a_model_that_no_class_can_hold_is_refused_with_the_ways_that_work(tmp_path: Path):
    tutorial = tiny_config(model={"num_heads": 3, "hidden_dim": 256})
    with pytest.raises(UserError) as error:
        write_huggingface({}, tutorial, ByteTokenizer(), tmp_path / "out")
    assert str(error.value) == (
        "No Hugging Face class can hold this model: GPT2LMHeadModel has no model.pre_norm=false, model.num_heads=3, "
        "model.use_bias=[unembedding]; LlamaForCausalLM has no model.norm=layer, model.positions=learned, "
        "model.pre_norm=false, model.activation=relu, model.num_heads=3, model.use_bias=[norm,unembedding]; "
        "Qwen3ForCausalLM has no model.norm=layer, model.positions=learned, model.pre_norm=false, "
        "model.qk_norm=false, model.activation=relu, model.num_heads=3, model.use_bias=[feedforward,norm,unembedding]. "
        "These hold every GPT: --to savedmodel, --to keras."
    )
    assert not (tmp_path / "out").exists()
    assert layout_for(config_for("llama tied").model).architecture == "LlamaForCausalLM"


def test_settings_that_do_not_go_along_are_said():
    gpt2 = config_for("gpt2 tied", dropout=0.1, document_mask=True).model
    assert remarks(gpt2) == [
        "model.document_mask=true: GPT2LMHeadModel has no such mask; give it one document at a time."
    ]
    assert remarks(config_for("llama tied", dropout=0.1).model) == [
        "model.dropout=0.1: LlamaForCausalLM has no such dropout, so a training that goes on there has none."
    ]
    assert remarks(config_for("llama tied").model) == []


# --- the tokenizer ---


def test_the_tokenizer_goes_along(tmp_path: Path):
    text = "the cat [BOS] s\u00e0t \U0001f642"
    characters = CharTokenizer(["[PAD]", "[UNK]", "[BOS]", *sorted(set(text))])
    for tokenizer in (ByteTokenizer(), characters):
        config = config_for("gpt2 tied", vocabulary_multiple=300)
        folder = tmp_path / tokenizer.kind
        write_huggingface(lively_weights(config, tokenizer.vocabulary_size), config, tokenizer, folder)
        assert load_tokenizer(folder / "tokenizer").fingerprint == tokenizer.fingerprint
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        expected = [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
        assert theirs.encode(text).ids == expected
        assert theirs.encode(text, add_special_tokens=False).ids == expected[1:]
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["bos_token"] == settings["eos_token"] == "[BOS]"
        assert settings["model_max_length"] == LENGTH
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["bos_token_id"] == generation["eos_token_id"] == tokenizer.bos_id
        never = [id for id in (tokenizer.pad_id, tokenizer.unknown_id) if id >= 0]
        assert generation["suppress_tokens"] == [*never, *range(tokenizer.vocabulary_size, 300)]
