"""The formats that a model can be written in. What a format cannot hold is refused in export.py."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.exchange import keras_file, kerashub_preset, saved_model
from trainer.exchange.huggingface_export import Dtype, write_huggingface
from trainer.exchange.open import OpenedModel
from trainer.model.language_model import adapt


class Format(NamedTuple):
    """A format.

    Attributes:
        write: writes a model, and the files that belong to it by their names, into the file or folder at a path, with
            numbers of a dtype.
        how_to_load: returns Python code that loads what was written at a path.
    """

    write: Callable[[OpenedModel, Mapping[str, bytes], Path, Dtype], None]
    how_to_load: Callable[[OpenedModel, str], str]


def _write_keras(opened: OpenedModel, files: Mapping[str, bytes], path: Path, dtype: Dtype) -> None:
    keras_file.write_keras(opened.model, files, path)


def _write_saved_model(opened: OpenedModel, files: Mapping[str, bytes], path: Path, dtype: Dtype) -> None:
    saved_model.write_saved_model(_weights(opened), opened.config, opened.tokenizer, path)
    _write_files(files, path)


def _write_huggingface(opened: OpenedModel, files: Mapping[str, bytes], path: Path, dtype: Dtype) -> None:
    _write_files(files, path)
    # Last, because a folder counts once it has config.json.
    write_huggingface(_weights(opened), opened.config, opened.tokenizer, path, dtype)


def _write_preset(opened: OpenedModel, files: Mapping[str, bytes], path: Path, dtype: Dtype) -> None:
    # KerasHub writes a README.md of its own, which is replaced.
    kerashub_preset.write_preset(_weights(opened), opened.config, opened.tokenizer, path)
    _write_files(files, path)


def _weights(opened: OpenedModel) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in adapt(opened.model).named_variables().items()}


def _write_files(files: Mapping[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


_LOAD_HUGGINGFACE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({path!r})
tokenizer = AutoTokenizer.from_pretrained({path!r})"""

FORMATS = {
    "huggingface": Format(_write_huggingface, lambda opened, path: _LOAD_HUGGINGFACE.format(path=path)),
    "keras": Format(_write_keras, lambda opened, path: keras_file.how_to_load(path)),
    "kerashub": Format(
        _write_preset, lambda opened, path: kerashub_preset.how_to_load(opened.config, path, opened.tokenizer)
    ),
    "savedmodel": Format(_write_saved_model, lambda opened, path: saved_model.how_to_load(opened.tokenizer, path)),
}
