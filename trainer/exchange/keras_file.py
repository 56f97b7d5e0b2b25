"""A .keras file: a model in the format of Keras, with its tokenizer and settings in the file."""

from collections.abc import Mapping
from pathlib import Path

from trainer.model.gpt import GPT

_HOW_TO_LOAD = """\
import keras
from trainer import GPT  # Keras loads only classes that it knows.

model = keras.saving.load_model({path!r})"""


def how_to_load(path: str) -> str:
    """Returns Python code that loads a .keras file."""
    return _HOW_TO_LOAD.format(path=path)


def write_keras(model: GPT, files: Mapping[str, bytes], path: Path) -> None:
    """Writes a model into a .keras file.

    Args:
        model: the model.
        files: the content of the files that belong to it, by their names.
        path: the file.
    """
    model.files = dict(files)
    model.save(path)
