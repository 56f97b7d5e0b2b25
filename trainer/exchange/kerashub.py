"""How KerasHub lays out a GPT: the settings and the weights of its GPT-2 and Llama backbones.

Functions of settings and NumPy arrays; kerashub_preset.py reads and writes the weights.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from trainer.config.settings import BiasedPart, Config, ModelConfig
from trainer.errors import UserError, quoted
from trainer.exchange.huggingface import overrides_for
from trainer.exchange.layouts import Shape, written
from trainer.system.storage import Location, locate

CONFIG = "config.json"

Arrays = Mapping[str, np.ndarray]


class Family(NamedTuple):
    """The classes of KerasHub for one kind of model, and how it is described in our settings.

    Attributes:
        name: begins the names of the classes that are written.
        backbones: the classes that are read.
        bos: the name of the token before a document.
        keys: the name that the classes have for each of our settings that is a number.
        always: our settings that the classes cannot have otherwise.
        biases: the parts that have a bias.
        fixed: settings of the classes that must have this value: trainer lacks what others mean.
    """

    name: str
    backbones: tuple[str, ...]
    bos: str
    keys: Mapping[str, str]
    always: Mapping[str, Any]
    biases: tuple[BiasedPart, ...]
    fixed: Mapping[str, Any]


_SAME = {name: name for name in ("num_layers", "hidden_dim", "intermediate_dim")}
GPT2 = Family(
    name="GPT2",
    backbones=("GPT2Backbone",),
    bos="<|endoftext|>",
    keys={**_SAME, "num_heads": "num_heads"},
    always={
        "activation": "gelu_tanh",
        "norm": "layer",
        "norm_epsilon": 1e-5,
        "positions": "learned",
        "pre_norm": True,
        "qk_norm": False,
        "tied_embeddings": True,
    },
    biases=("query_key_value", "attention_output", "feedforward", "norm"),
    fixed={},
)
# KerasHub's Llama forgets in a preset that embeddings are tied, so a tied model is written as one that is not.
LLAMA3 = Family(
    name="Llama3",
    backbones=("Llama3Backbone", "LlamaBackbone"),
    bos="<|begin_of_text|>",
    keys={
        **_SAME,
        "num_heads": "num_query_heads",
        "num_key_value_heads": "num_key_value_heads",
        "rope_theta": "rope_max_wavelength",
        "norm_epsilon": "layer_norm_epsilon",
    },
    always={"activation": "swiglu", "norm": "rms", "positions": "rope", "pre_norm": True, "qk_norm": False},
    biases=(),
    fixed={"rope_position_scaling_factor": 1.0, "rope_frequency_adjustment_factor": None},
)
FAMILIES = (GPT2, LLAMA3)


def family_for(model: ModelConfig) -> Family:
    """Returns the family that can hold a model.

    Raises:
        UserError: none can; the message names the settings that do not fit.
    """
    found = [(family, _misfits(family, model)) for family in FAMILIES]
    for family, unfit in found:
        if not unfit:
            return family
    reasons = "; ".join(f"{family.name} has no {', '.join(unfit)}" for family, unfit in found)
    raise UserError(
        f"No KerasHub class that trainer writes can hold this model: {reasons}. These hold every GPT: --to "
        "savedmodel, --to keras."
    )


def _misfits(family: Family, model: ModelConfig) -> list[str]:
    unfit = [name for name, needed in family.always.items() if getattr(model, name) != needed]
    if model.biases() != set(family.biases):
        unfit.append("use_bias")
    if model.head_width() * model.num_heads != model.hidden_dim:
        unfit.append("head_dim" if model.head_dim else "num_heads")
    if "num_key_value_heads" not in family.keys and model.key_value_heads() != model.num_heads:
        unfit.append("num_key_value_heads")
    return [f"model.{name}={written(getattr(model, name))}" for name in unfit]


def backbone_settings(family: Family, config: Config, vocabulary_size: int) -> dict[str, Any]:
    """Returns the arguments of a backbone's constructor for a run's model."""
    model = config.model
    settings = {theirs: getattr(model, ours) for ours, theirs in family.keys.items()}
    if "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = model.key_value_heads()
    if family is GPT2:
        settings["max_sequence_length"] = config.train.sequence_length
    return {**settings, "vocabulary_size": vocabulary_size, "dropout": model.dropout}


def is_preset(path: str | Location) -> bool:
    """Whether a path is the folder of a KerasHub preset."""
    return _class_of(_read_config(path)) is not None


def _read_config(path: str | Location) -> Any:
    file = locate(path) / CONFIG
    try:
        return json.loads(file.read_bytes()) if file.is_file() else None
    except ValueError:
        return None


def _class_of(described: Any) -> str | None:
    name = described.get("registered_name") if isinstance(described, dict) else None
    package, _, kind = name.partition(">") if isinstance(name, str) else ("", "", "")
    return kind if package in ("keras_hub", "keras_nlp") else None  # keras_nlp is its former name.


class Preset(NamedTuple):
    """What a preset says about its model.

    Attributes:
        family: its kind.
        settings: the arguments of its backbone.
        model: the same in our settings.
        num_positions: the number of positions; None if there is no limit.
    """

    family: Family
    settings: dict[str, Any]
    model: ModelConfig
    num_positions: int | None


def read_preset(path: str | Location) -> Preset:
    """Reads what a preset says about its model.

    Raises:
        UserError: the model is of a kind that trainer does not have.
    """
    described = _read_config(path)
    name = _class_of(described)
    family = next((family for family in FAMILIES if name in family.backbones), None)
    if family is None:
        known = ", ".join(name for family in FAMILIES for name in family.backbones)
        raise UserError(f"{path}: {name} is not a model that trainer has; it reads {known}.")
    settings = described["config"]
    for key, needed in family.fixed.items():
        if settings.get(key, needed) != needed:
            raise UserError(f"{path}: {key}={settings[key]!r} is not in trainer, only {key}={needed}.")
    ours = {name: settings[theirs] for name, theirs in family.keys.items()} | dict(family.always)
    ours["use_bias"] = bool(family.biases)
    if ours.get("num_key_value_heads") == ours["num_heads"]:
        del ours["num_key_value_heads"]
    return Preset(family, settings, ModelConfig(**ours), settings.get("max_sequence_length"))


def check_settings(path: str | Location, config: Config) -> None:
    """Checks that a config describes the model of a preset.

    Raises:
        UserError: it describes another model; the message has the overrides that make it fit. Or trainer does not have
            this kind of model.
    """
    preset = read_preset(path)
    overrides = overrides_for(config.model, preset.model)
    if preset.num_positions is not None and config.train.sequence_length > preset.num_positions:
        overrides.append(f"train.sequence_length={preset.num_positions}")
    if overrides:
        raise UserError(f"{path}: the settings describe another model. Give: {' '.join(map(quoted, overrides))}")


def to_kerashub(family: Family, model: ModelConfig, vocabulary_size: int, weights: Arrays) -> dict[str, np.ndarray]:
    """Returns the weights of a backbone by their paths. Rows that stand for no token are left out."""
    embeddings = weights["gpt/token_embedding/embeddings"][:vocabulary_size]
    found = {"token_embedding/embeddings": embeddings}
    if family is GPT2:
        found["position_embedding/embeddings"] = weights["gpt/position_embedding/embeddings"]
    else:
        kernel = embeddings if model.tied_embeddings else weights["gpt/unembedding/kernel"][:vocabulary_size]
        found["token_embedding/reverse_embeddings"] = kernel.T
    for ours, theirs in _norms(family, model):
        found[theirs] = weights[ours]
    for ours, parts in _denses(family, model):
        widths = [part.ours[-1] for part in parts]
        for part, weight in zip(parts, np.split(weights[ours], np.cumsum(widths)[:-1], axis=-1), strict=True):
            found[part.path] = weight.reshape(part.theirs)
    return found


def from_kerashub(family: Family, model: ModelConfig, arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns our weights of a backbone's; the inverse of `to_kerashub`."""
    found = {"gpt/token_embedding/embeddings": arrays["token_embedding/embeddings"]}
    if family is GPT2:
        found["gpt/position_embedding/embeddings"] = arrays["position_embedding/embeddings"]
    else:
        found["gpt/unembedding/kernel"] = arrays["token_embedding/reverse_embeddings"].T
    for ours, theirs in _norms(family, model):
        found[ours] = arrays[theirs]
    for ours, parts in _denses(family, model):
        found[ours] = np.concatenate([arrays[part.path].reshape(part.ours) for part in parts], axis=-1)
    return found


def _norms(family: Family, model: ModelConfig) -> list[tuple[str, str]]:
    """Returns the paths of the weights of all normalizations, ours and theirs."""
    if family is GPT2:
        norms = {"attention_norm": "self_attention_layer_norm", "feedforward_norm": "feedforward_layer_norm"}
        last, names = "layer_norm", {"gamma": "gamma", "beta": "beta"}
    else:
        norms = {"attention_norm": "self_attention_layernorm", "feedforward_norm": "feedforward_layernorm"}
        last, names = "sequence_output_layernorm", {"gamma": "scale"}
    places = [("gpt/final_norm", last)]
    for i in range(model.num_layers):
        places += [(f"gpt/block_{i}/{ours}", f"transformer_layer_{i}/{theirs}") for ours, theirs in norms.items()]
    return [(f"{ours}/{name}", f"{theirs}/{names[name]}") for ours, theirs in places for name in names]


class Part(NamedTuple):
    """A kernel or bias of KerasHub.

    Attributes:
        path: its path.
        ours: the shape of the same numbers in our weight, which has some of these side by side.
        theirs: its shape.
    """

    path: str
    ours: Shape
    theirs: Shape


def _denses(family: Family, model: ModelConfig) -> Iterator[tuple[str, list[Part]]]:
    """Yields the path of each of our kernels and biases, and what holds it in KerasHub."""
    hidden, inner = (model.hidden_dim,), (model.intermediate_dim,)
    heads, key_heads = (model.num_heads, model.head_width()), (model.key_value_heads(), model.head_width())
    gates = ["feedforward_gate_dense"] if family is LLAMA3 else []
    layers: dict[str, list[tuple[str, Shape, Shape]]] = {
        "query_key_value": [
            ("self_attention/query", hidden, heads),
            ("self_attention/key", hidden, key_heads),
            ("self_attention/value", hidden, key_heads),
        ],
        "attention_output": [("self_attention/attention_output", heads, hidden)],
        "intermediate": [(name, hidden, inner) for name in (*gates, "feedforward_intermediate_dense")],
        "output": [("feedforward_output_dense", inner, hidden)],
    }
    for i, (ours, theirs) in itertools.product(range(model.num_layers), layers.items()):
        kernels, biases = [], []
        for name, inputs, outputs in theirs:
            path, width = f"transformer_layer_{i}/{name}", math.prod(outputs)
            kernels.append(Part(f"{path}/kernel", (math.prod(inputs), width), (*inputs, *outputs)))
            biases.append(Part(f"{path}/bias", (width,), outputs))
        yield f"gpt/block_{i}/{ours}/kernel", kernels
        if family.biases:
            yield f"gpt/block_{i}/{ours}/bias", biases
