"""Writes a run's GPT in Hugging Face's form, so that AutoModelForCausalLM and AutoTokenizer of transformers load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import processors

from trainer.config.settings import Config, ModelConfig
from trainer.errors import UserError
from trainer.exchange.huggingface import CONFIG, INDEX, TOKENIZER, WEIGHTS
from trainer.exchange.layouts import LAYOUTS, Layout, config_json, misfits, split, with_biases_of
from trainer.model.size import parameter_shapes
from trainer.tokenizers.tokenizer import Tokenizer

Dtype = Literal["float32", "bfloat16"]

# The most bytes of a file of weights, except that a single weight may be larger.
MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def layout_for(model: ModelConfig) -> Layout:
    """Returns the layout of the Hugging Face class that can hold a model.

    Raises:
        UserError: no class can; the message names the settings that none of them has.
    """
    found = [(layout, misfits(layout, model)) for layout in LAYOUTS]
    for layout, unfit in found:
        if not unfit:
            return layout
    reasons = "; ".join(f"{layout.architecture} has no {', '.join(unfit)}" for layout, unfit in found)
    raise UserError(
        f"No Hugging Face class can hold this model: {reasons}. These hold every GPT: --to savedmodel, --to keras."
    )


def remarks(model: ModelConfig) -> list[str]:
    """Returns a line for each setting of a model that does not go along."""
    layout, lines = layout_for(model), []
    if model.document_mask:
        lines.append(
            f"model.document_mask=true: {layout.architecture} has no such mask; give it one document at a time."
        )
    if model.dropout and layout.dropout_keys == ():
        lines.append(
            f"model.dropout={model.dropout}: {layout.architecture} has no such dropout, so a training that goes on "
            "there has none."
        )
    return lines


def write_huggingface(
    weights: Mapping[str, np.ndarray], config: Config, tokenizer: Tokenizer, folder: Path, dtype: Dtype = "float32"
) -> None:
    """Writes a run's GPT and its tokenizer so that transformers' AutoModelForCausalLM and AutoTokenizer load them.

    Args:
        weights: every weight by its path.
        config: the run's config.
        tokenizer: the run's tokenizer.
        folder: the folder to write into; config.json, without which it does not count, is written last.
        dtype: the format of the numbers in the file.

    Raises:
        UserError: no Hugging Face class can hold the model.
    """
    layout = layout_for(config.model)
    model, length = with_biases_of(layout, config.model), config.train.sequence_length
    folder.mkdir(parents=True, exist_ok=True)
    shapes = parameter_shapes(model, tokenizer.vocabulary_size, length)
    held = {path: weights.get(path, np.zeros(shape, np.float32)) for path, shape in shapes}
    _write_weights(folder, layout, model, held, dtype)
    _write_tokenizer(folder, tokenizer, length)
    num_logits = model.num_logits(tokenizer.vocabulary_size)
    # What trainer never writes: padding, [UNK], and the rows that belong to no token.
    never = {tokenizer.pad_id, tokenizer.unknown_id, *range(tokenizer.vocabulary_size, num_logits)}
    never -= {tokenizer.bos_id, -1}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    generation = ids | ({"suppress_tokens": sorted(never)} if never else {})
    _write_json(folder / "generation_config.json", generation)
    described = config_json(layout, model, num_logits, length)
    _write_json(folder / CONFIG, described | ids | {"torch_dtype": dtype})


def _write_weights(
    folder: Path, layout: Layout, model: ModelConfig, weights: Mapping[str, np.ndarray], dtype: Dtype
) -> None:
    """Writes the weights into one file, or into several with an index. One file's tensors are held at a time."""
    shards: list[list[str]] = [[]]
    num_bytes, total_bytes = 0, 0
    for path, weight in weights.items():
        size = weight.size * _DTYPES[dtype].itemsize
        if shards[-1] and num_bytes + size > MAX_SHARD_BYTES:
            shards.append([])
            num_bytes = 0
        shards[-1].append(path)
        num_bytes, total_bytes = num_bytes + size, total_bytes + size
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for name, paths in zip(names if len(shards) > 1 else [WEIGHTS], shards, strict=True):
        tensors = {
            theirs: tensor.astype(_DTYPES[dtype], copy=False)
            for path in paths
            for theirs, tensor in split(layout, model, path, weights[path])
        }
        # transformers wants to be told the library.
        safetensors.numpy.save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, sequence_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json; and the tokenizer as trainer reads it, in a folder of its own:
    a run that begins with this model then has exactly the same tokenizer, WordPiece included.
    """
    tokenizer.save(folder / "tokenizer")
    twin = tokenizers.Tokenizer.from_str((folder / "tokenizer" / TOKENIZER).read_bytes().decode())
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.bos_id, "pad_token": tokenizer.pad_id}
    if tokenizer.unknown_id >= 0:
        ids["unk_token"] = tokenizer.unknown_id
    names = {role: twin.id_to_token(id) for role, id in ids.items()}
    bos = names["bos_token"]
    # The model has read [BOS] before every document.
    twin.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, tokenizer.bos_id)]
    )
    (folder / TOKENIZER).write_bytes(twin.to_str(pretty=True).encode())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
        # If a text holds the name of a special token, the name is encoded like any other text.
        "split_special_tokens": True,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
