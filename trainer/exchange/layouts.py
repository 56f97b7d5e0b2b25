"""How Hugging Face lays out a GPT: the tensors and the config.json of its GPT-2, Llama and Qwen3 classes.

Each layout is one table, read in both directions: for models that come in and for models that go out. These are pure
functions of settings, names, shapes and NumPy arrays; huggingface.py reads and writes the files.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from trainer.config.settings import BiasedPart, ModelConfig
from trainer.errors import UserError

Shape = tuple[int, ...]
Settings = Mapping[str, Any]


class Entry(NamedTuple):
    """A weight of our GPT, and the tensors of a layout that hold it.

    Attributes:
        ours: the path of our weight; {i} is the number of a block.
        theirs: the names of the tensors. Our weight is these side by side, along its last axis.
        is_transposed: whether the tensors have the outputs first. Our kernels have the inputs first.
    """

    ours: str
    theirs: tuple[str, ...]
    is_transposed: bool = False


class Layout(NamedTuple):
    """A Hugging Face class, and how its model is described in our settings.

    Attributes:
        model_type: the class's name in config.json.
        architecture: the class.
        prefix: begins the names of the tensors, except in files of a model without its output projection.
        entries: the tensors of each of our weights.
        computed: a pattern of tensors that some files have and that hold no weight, such as the causal mask.
        keys: the name in config.json of each of our settings that is a number or a yes or no.
        positions_key: the name in config.json of the number of positions.
        defaults: what the class takes for a name that config.json leaves out.
        activations: the names in config.json of our activations; the first is the one that is written.
        activation_key: the name in config.json of the activation.
        biases: groups of parts that have biases together: always, or if this name in config.json is true.
        always: our settings that the class cannot have otherwise.
        dropout_keys: the names in config.json of our dropout.
        zero_keys: the names in config.json of dropouts that trainer does not have.
        fixed: names in config.json that must have this value if they are there: trainer lacks what others mean.
    """

    model_type: str
    architecture: str
    prefix: str
    entries: tuple[Entry, ...]
    computed: str
    keys: Mapping[str, str]
    positions_key: str
    defaults: Settings
    activations: Mapping[str, tuple[str, ...]]
    activation_key: str
    biases: Mapping[tuple[BiasedPart, ...], Literal[True] | str]
    always: Settings
    dropout_keys: tuple[str, ...]
    zero_keys: tuple[str, ...]
    fixed: Settings

    def is_computed(self, name: str) -> bool:
        """Whether a tensor holds no weight."""
        return re.fullmatch(self.computed, name) is not None


def _linear(ours: str, *theirs: str, is_transposed: bool = False) -> tuple[Entry, Entry]:
    return (
        Entry(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), is_transposed),
        Entry(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs)),
    )


def _norm(ours: str, theirs: str) -> tuple[Entry, Entry]:
    return Entry(f"{ours}/gamma", (f"{theirs}.weight",)), Entry(f"{ours}/beta", (f"{theirs}.bias",))


# The kernels of GPT-2's Conv1D have the inputs first, as ours.
GPT2 = Layout(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    entries=(
        Entry("gpt/token_embedding/embeddings", ("transformer.wte.weight",)),
        Entry("gpt/position_embedding/embeddings", ("transformer.wpe.weight",)),
        *_norm("gpt/block_{i}/attention_norm", "transformer.h.{i}.ln_1"),
        *_linear("gpt/block_{i}/query_key_value", "transformer.h.{i}.attn.c_attn"),
        *_linear("gpt/block_{i}/attention_output", "transformer.h.{i}.attn.c_proj"),
        *_norm("gpt/block_{i}/feedforward_norm", "transformer.h.{i}.ln_2"),
        *_linear("gpt/block_{i}/intermediate", "transformer.h.{i}.mlp.c_fc"),
        *_linear("gpt/block_{i}/output", "transformer.h.{i}.mlp.c_proj"),
        *_norm("gpt/final_norm", "transformer.ln_f"),
        Entry("gpt/unembedding/kernel", ("lm_head.weight",)),
    ),
    computed=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
    keys={
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "hidden_dim": "n_embd",
        "intermediate_dim": "n_inner",
        "norm_epsilon": "layer_norm_epsilon",
        "tied_embeddings": "tie_word_embeddings",
    },
    positions_key="n_positions",
    defaults={
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "n_positions": 1024,
        "vocab_size": 50257,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
    },
    activations={
        "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "gelu": ("gelu", "gelu_python"),
        "relu": ("relu",),
    },
    activation_key="activation_function",
    biases={("query_key_value", "attention_output", "feedforward", "norm"): True},
    always={"norm": "layer", "positions": "learned", "pre_norm": True, "qk_norm": False},
    dropout_keys=("resid_pdrop", "embd_pdrop"),
    zero_keys=("attn_pdrop",),  # The dropout of attention probabilities.
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
)

LLAMA = Layout(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    entries=(
        Entry("gpt/token_embedding/embeddings", ("model.embed_tokens.weight",)),
        *_norm("gpt/block_{i}/attention_norm", "model.layers.{i}.input_layernorm"),
        *_linear(
            "gpt/block_{i}/query_key_value",
            "model.layers.{i}.self_attn.q_proj",
            "model.layers.{i}.self_attn.k_proj",
            "model.layers.{i}.self_attn.v_proj",
            is_transposed=True,
        ),
        *_linear("gpt/block_{i}/attention_output", "model.layers.{i}.self_attn.o_proj", is_transposed=True),
        *_norm("gpt/block_{i}/feedforward_norm", "model.layers.{i}.post_attention_layernorm"),
        *_linear(
            "gpt/block_{i}/intermediate",
            "model.layers.{i}.mlp.gate_proj",
            "model.layers.{i}.mlp.up_proj",
            is_transposed=True,
        ),
        *_linear("gpt/block_{i}/output", "model.layers.{i}.mlp.down_proj", is_transposed=True),
        *_norm("gpt/final_norm", "model.norm"),
        Entry("gpt/unembedding/kernel", ("lm_head.weight",)),
    ),
    computed=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    keys={
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "hidden_dim": "hidden_size",
        "intermediate_dim": "intermediate_size",
        "norm_epsilon": "rms_norm_eps",
        "tied_embeddings": "tie_word_embeddings",
    },
    positions_key="max_position_embeddings",
    defaults={
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    },
    activations={"swiglu": ("silu", "swish")},
    activation_key="hidden_act",
    biases={("query_key_value", "attention_output"): "attention_bias", ("feedforward",): "mlp_bias"},
    always={"norm": "rms", "positions": "rope", "pre_norm": True, "qk_norm": False},
    dropout_keys=(),
    zero_keys=("attention_dropout",),
    fixed={"sliding_window": None},
)

# Llama with normalized queries and keys, and without biases in the feed-forward layer.
QWEN3 = LLAMA._replace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    entries=(
        *LLAMA.entries,
        Entry("gpt/block_{i}/query_norm/gamma", ("model.layers.{i}.self_attn.q_norm.weight",)),
        Entry("gpt/block_{i}/key_norm/gamma", ("model.layers.{i}.self_attn.k_norm.weight",)),
    ),
    defaults={
        **LLAMA.defaults,
        "head_dim": 128,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "vocab_size": 151936,
    },
    biases={("query_key_value", "attention_output"): "attention_bias"},
    always={**LLAMA.always, "qk_norm": True},
    fixed={"use_sliding_window": False},
)

LAYOUTS = (GPT2, LLAMA, QWEN3)


class Part(NamedTuple):
    """A tensor of a layout that holds one of our weights, or a part of it.

    Attributes:
        name: its name.
        shape: its shape in the file.
    """

    name: str
    shape: Shape


def parts_of(layout: Layout, model: ModelConfig, path: str, shape: Shape) -> tuple[list[Part], bool]:
    """Returns the tensors that hold one of our weights, and whether they are transposed.

    Args:
        layout: the layout.
        model: the model's settings.
        path: the path of our weight, as `trainer.model.size.parameter_shapes` yields it.
        shape: its shape.
    """
    block = re.search(r"block_(\d+)/", path)
    pattern = path if block is None else path.replace(block[0], "block_{i}/")
    (entry,) = (entry for entry in layout.entries if entry.ours == pattern)
    parts = []
    for name, width in zip(entry.theirs, _widths(model, len(entry.theirs), shape[-1]), strict=True):
        theirs = (*shape[:-1], width)
        parts.append(Part(name.format(i=block and block[1]), theirs[::-1] if entry.is_transposed else theirs))
    return parts, entry.is_transposed


def _widths(model: ModelConfig, num_parts: int, width: int) -> list[int]:
    if num_parts == 3:  # Queries, keys and values.
        return [n * model.head_width() for n in (model.num_heads, model.key_value_heads(), model.key_value_heads())]
    return [width // num_parts] * num_parts


def joined(tensors: Sequence[np.ndarray], is_transposed: bool) -> np.ndarray:
    """Returns our weight, float32, of the tensors that `parts_of` names."""
    weight = np.concatenate([tensor.T if is_transposed else tensor for tensor in tensors], axis=-1, dtype=np.float32)
    return np.ascontiguousarray(weight)


def split(layout: Layout, model: ModelConfig, path: str, weight: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the content of the tensors that hold one of our weights; the inverse of `joined`."""
    parts, is_transposed = parts_of(layout, model, path, weight.shape)
    start = 0
    for name, shape in parts:
        width = shape[0] if is_transposed else shape[-1]
        tensor = weight[..., start : start + width]
        yield name, np.ascontiguousarray(tensor.T if is_transposed else tensor)
        start += width


def layout_of(settings: Settings, place: str) -> Layout:
    """Returns the layout of a config.json.

    Args:
        settings: its content.
        place: names it in the message of an error.

    Raises:
        UserError: the model is of a kind that trainer does not have.
    """
    for layout in LAYOUTS:
        if settings.get("model_type") == layout.model_type:
            return layout
    known = ", ".join(layout.model_type for layout in LAYOUTS)
    raise UserError(f"{place}: model_type={settings.get('model_type')!r} is not a kind that trainer has ({known}).")


def model_settings(settings: Settings, place: str) -> dict[str, Any]:
    """Returns the settings of our model that a config.json describes, by their names below `model.`.

    Args:
        settings: the content of the config.json, of transformers 4 or 5.
        place: names it in the message of an error.

    Raises:
        UserError: it asks for something that trainer does not have.
    """
    layout = layout_of(settings, place)
    theirs = {**layout.defaults, **{key: value for key, value in settings.items() if value is not None}}
    for key, needed in {**layout.fixed, "quantization_config": None}.items():
        if theirs.get(key, needed) != needed:
            raise UserError(f"{place}: {key}={theirs[key]!r} is not in trainer, only {key}={json.dumps(needed)}.")
    activation = theirs[layout.activation_key]
    ours = {**layout.always, **{name: theirs.get(key) for name, key in layout.keys.items()}}
    for name, key in layout.keys.items():
        if name.startswith("num_") or name.endswith("_dim"):
            check_count(1 if ours[name] is None else ours[name], key, place)
    ours["activation"] = next((name for name, names in layout.activations.items() if activation in names), None)
    if ours["activation"] is None:
        known = ", ".join(name for names in layout.activations.values() for name in names)
        raise UserError(f"{place}: {layout.activation_key}={activation!r} is not in trainer; it has {known}.")
    if ours.get("num_key_value_heads") == ours["num_heads"]:
        ours["num_key_value_heads"] = None
    if ours.get("head_dim") is not None and ours["head_dim"] * ours["num_heads"] == ours["hidden_dim"]:
        ours["head_dim"] = None
    biased = [part for parts, key in layout.biases.items() if key is True or theirs.get(key) for part in parts]
    ours["use_bias"] = biased or False
    if ours["tied_embeddings"] and len(biased) == len(get_args(BiasedPart)) - 1:
        ours["use_bias"] = True  # The same in a word: only the output projection has none, because it is tied.
    if ours["positions"] == "rope":
        ours["rope_theta"] = _rope_theta(theirs, place)
    if ours["intermediate_dim"] is None:  # GPT-2's n_inner.
        ours["intermediate_dim"] = 4 * ours["hidden_dim"]
    return ours


def check_count(value: object, key: str, place: str) -> None:
    """Raises UserError if the value of a key is not a count."""
    if type(value) is not int or not 0 < value < 2**31:
        raise UserError(f"{place}: {key}={value!r} is not a count.")


def _rope_theta(theirs: Settings, place: str) -> Any:
    """Returns the base of the rotary frequencies; refuses frequencies that are scaled."""
    theta = theirs.get("rope_theta", ModelConfig.model_fields["rope_theta"].default)
    for key in ("rope_scaling", "rope_parameters"):  # The names of transformers 4 and 5.
        rope = theirs.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{place}: {key}={rope} is not in trainer, only rope_type='default'.")
        theta = rope.get("rope_theta", theta)
    return theta


def config_json(layout: Layout, model: ModelConfig, num_logits: int, sequence_length: int) -> dict[str, Any]:
    """Returns the config.json of a model: the inverse of `model_settings`, for transformers 4 and 5.

    Args:
        layout: a layout without `misfits`.
        model: the model's settings.
        num_logits: the rows of the embedding.
        sequence_length: the number of positions.
    """
    written = {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "vocab_size": num_logits,
        layout.positions_key: sequence_length,
        layout.activation_key: layout.activations[model.activation][0],
        **{key: getattr(model, name) for name, key in layout.keys.items()},
        **{key: set(parts) <= model.biases() for parts, key in layout.biases.items() if key is not True},
    }
    if model.positions == "rope":
        rope = {"rope_type": "default", "rope_theta": model.rope_theta}
        written |= {"rope_parameters": rope, "rope_theta": model.rope_theta}
    if "num_key_value_heads" in layout.keys:
        written |= {"num_key_value_heads": model.key_value_heads(), "head_dim": model.head_width()}
    return written | dict.fromkeys(layout.dropout_keys, model.dropout) | dict.fromkeys(layout.zero_keys, 0.0)


def misfits(layout: Layout, model: ModelConfig) -> list[str]:
    """Returns the settings of a model that the class of a layout cannot have, as `model.key=value`."""
    found = [name for name, needed in layout.always.items() if getattr(model, name) != needed]
    if model.activation not in layout.activations:
        found.append("activation")
    if "head_dim" not in layout.keys and model.head_width() * model.num_heads != model.hidden_dim:
        found.append("head_dim" if model.head_dim else "num_heads")
    elif model.hidden_dim % model.num_heads:
        found.append("num_heads")
    if "num_key_value_heads" not in layout.keys and model.key_value_heads() != model.num_heads:
        found.append("num_key_value_heads")
    unheld = sorted(model.biases() - with_biases_of(layout, model).biases())
    biases = [f"model.use_bias={written(unheld)}"] if unheld else []
    return [f"model.{name}={written(getattr(model, name))}" for name in found] + biases


def with_biases_of(layout: Layout, model: ModelConfig) -> ModelConfig:
    """Returns a model with all biases that the class has if it has those of the model. A bias of zeros is none."""
    held = [
        part for parts, key in layout.biases.items() if key is True or model.biases() & set(parts) for part in parts
    ]
    return model.model_copy(update={"use_bias": tuple(held) or False})


def written(value: object) -> str:
    """Returns a setting as an override writes it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
