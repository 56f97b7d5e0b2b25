"""Presets of KerasHub: writes a run's GPT as one, and reads the weights of one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np

from trainer.config.settings import Config
from trainer.errors import UserError
from trainer.exchange.kerashub import (
    GPT2,
    Family,
    backbone_settings,
    family_for,
    from_kerashub,
    read_preset,
    to_kerashub,
)
from trainer.system.storage import Location, locate, on_disk
from trainer.tokenizers.tokenizer import Tokenizer

_WEIGHTS = ("model.weights.h5", "model.weights.json")
# Llama 3's tokenizer needs these to have a number. They get numbers that the model has no tokens for.
_LLAMA3_NAMES = ("<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")


def how_to_load(config: Config, path: str, tokenizer: Tokenizer) -> str:
    """Returns Python code that loads the preset of a run."""
    stop = "" if family_for(config.model) is GPT2 else f", stop_token_ids=[{tokenizer.bos_id}]"
    return (
        "import keras_hub\n\n"
        f"model = keras_hub.models.CausalLM.from_preset({path!r})\n"
        f'print(model.generate("Once upon a time", max_length={config.train.sequence_length}{stop}))'
    )


def write_preset(weights: Mapping[str, np.ndarray], config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a run's GPT and its tokenizer as a preset, for `keras_hub.models.CausalLM.from_preset`.

    Args:
        weights: every weight by its path.
        config: the run's config.
        tokenizer: the run's tokenizer: byte-level BPE, or bytes.
        folder: the folder to write.

    Raises:
        UserError: no class of KerasHub can hold the model.
    """
    family = family_for(config.model)
    backbone = _backbone(family.backbones[0], backbone_settings(family, config, tokenizer.vocabulary_size))
    theirs = to_kerashub(family, config.model, tokenizer.vocabulary_size, weights)
    for variable in backbone.variables:
        variable.assign(theirs[variable.path])
    classes = keras_hub.models
    preprocessor = getattr(classes, f"{family.name}CausalLMPreprocessor")(
        _tokenizer(family, tokenizer, folder), sequence_length=config.train.sequence_length
    )
    getattr(classes, f"{family.name}CausalLM")(backbone, preprocessor).save_to_preset(str(folder))


def read_weights(path: str | Location, config: Config, vocabulary_size: int) -> dict[str, np.ndarray]:
    """Reads the weights of a preset; no code that it names is run.

    Returns:
        Each weight by its path, float32. There can be more positions than the config has.

    Raises:
        UserError: the weights are missing or damaged, or are not of this vocabulary.
    """
    preset = read_preset(path)
    rows = preset.settings["vocabulary_size"]
    if rows != config.model.num_logits(vocabulary_size):
        raise UserError(
            f"{path} has {rows:,} tokens, and the tokenizer has {vocabulary_size:,}; give the tokenizer that it was "
            "trained with, or if it has a few rows more than tokens, set model.vocabulary_multiple."
        )
    settings = {key: value for key, value in preset.settings.items() if key not in ("name", "trainable", "dtype")}
    with on_disk(locate(path)) as folder:
        file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"{path} has no {_WEIGHTS[0]}; copy or download it again.")
        backbone = _backbone(preset.family.backbones[0], settings)
        try:
            backbone.load_weights(str(file))
        except Exception as error:  # Keras and h5py raise many kinds.
            raise UserError(f"{path}/{file.name} cannot be read: {error!s:.300}; copy it again.") from None
    arrays = {variable.path: variable.numpy() for variable in backbone.variables}
    return from_kerashub(preset.family, preset.model, arrays)


def digest_of_weights(path: str | Location) -> str:
    """Returns a SHA-256 of a preset's files of weights."""
    digest = hashlib.sha256()
    with on_disk(locate(path)) as folder:
        for file in sorted(folder.glob("model*.weights.h5")):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _backbone(name: str, settings: Mapping[str, Any]) -> keras.Model:
    return getattr(keras_hub.models, name)(**settings, dtype="float32")


def _tokenizer(family: Family, tokenizer: Tokenizer, folder: Path) -> Any:
    """Returns the tokenizer of a preset; only the names of the special tokens differ."""
    tokenizer.save(folder / "tokenizer")
    model = json.loads((folder / "tokenizer" / "tokenizer.json").read_bytes())["model"]
    names = {id: name for id, name in enumerate(tokenizer.vocabulary) if name}
    ids = {name: id for id, name in names.items()}
    names |= {ids.get(family.bos, tokenizer.bos_id): names[tokenizer.bos_id], tokenizer.bos_id: family.bos}
    if family is not GPT2:
        missing = [name for name in _LLAMA3_NAMES if name not in ids]
        names |= dict(enumerate(missing, start=tokenizer.vocabulary_size))
    if not model["merges"]:
        raise UserError(
            "KerasHub's tokenizers need a vocabulary with merged tokens; use --to savedmodel or --to keras."
        )
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    kind = getattr(keras_hub.tokenizers, f"{family.name}Tokenizer")
    return kind(vocabulary={name: id for id, name in names.items()}, merges=merges)
