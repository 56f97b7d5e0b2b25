"""A .keras file: a model in the format of Keras, with its tokenizer and settings in the file."""

import json
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.file import parse_config
from trainer.config.settings import Config
from trainer.errors import UserError
from trainer.runs.run_folder import CONFIG
from trainer.system.storage import Location, locate
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.tokenizers.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from trainer.model.gpt import GPT

# Where Keras puts the files of a model.
_FILES = "assets/"
# The facts about a model that trainer reads again.
FACTS = "export.json"

_HOW_TO_LOAD = """\
import keras
from trainer import GPT  # Keras loads only classes that it knows.

model = keras.saving.load_model({path!r})"""


def how_to_load(path: str) -> str:
    """Returns Python code that loads a .keras file."""
    return _HOW_TO_LOAD.format(path=path)


def write_keras(model: "GPT", files: Mapping[str, bytes], path: Path) -> None:
    """Writes a model into a .keras file.

    Args:
        model: the model.
        files: the content of the files that belong to it, by their names.
        path: the file.
    """
    model.files = dict(files)
    model.save(path)


def is_keras_file(path: str | Location) -> bool:
    """Whether a path is a .keras file on a disk."""
    place = locate(path)
    return isinstance(place, Path) and place.suffix == ".keras" and place.is_file()


class KerasFile:
    """What trainer has put into a .keras file beside the model. No code that the file names is run.

    Args:
        path: the file.

    Attributes:
        path: the file.
        config: the settings of the model's run.
        step: the steps that it was trained for.

    Raises:
        UserError: trainer did not write the file, or it is damaged.
    """

    def __init__(self, path: str | Location) -> None:
        self.path = Path(str(locate(path)))
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._files = {
                    name.removeprefix(_FILES): archive.read(name)
                    for name in archive.namelist()
                    if name.startswith(_FILES)
                }
            self.config: Config = parse_config(self._files[CONFIG].decode(), f"{self.path}/{CONFIG}")
            self.step = int(json.loads(self._files[FACTS])["step"])
        except Exception as error:  # A damaged file can make these libraries raise anything.
            raise self._fault(error) from None

    def load_weights(self, model: "GPT") -> None:
        """Loads the weights into a model of the config.

        Raises:
            UserError: they are damaged, or of another model.
        """
        try:
            model.load_weights(self.path)
        except Exception as error:  # A damaged file can make these libraries raise anything.
            raise self._fault(error) from None

    def _fault(self, reason: object) -> UserError:
        return UserError(
            f"{self.path}: not a .keras file that trainer export wrote, or damaged ({reason!s:.300}); export it again."
        )

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer of the model.

        Raises:
            UserError: its files are damaged.
        """
        with tempfile.TemporaryDirectory(prefix="trainer-") as name:
            for file, content in self._files.items():
                folder, _, last = file.partition("/")
                if folder == "tokenizer" and last and "/" not in last:
                    (Path(name) / last).write_bytes(content)
            try:
                return load_tokenizer(name)
            except UserError as error:
                reason = str(error).removeprefix(f"{name}: ").partition("; delete")[0]
                raise self._fault(reason) from None
