"""What init.from names: a run, a folder of Hugging Face, or a preset of KerasHub. TensorFlow is not needed to tell."""

from typing import Literal

from trainer.config.file import split_step
from trainer.config.settings import Config
from trainer.errors import UserError, quoted
from trainer.exchange import kerashub
from trainer.exchange.huggingface import check_settings, is_huggingface
from trainer.runs.run_folder import RECORD, RunFolder
from trainer.system.storage import locate

SourceKind = Literal["run", "huggingface", "kerashub"]


def kind_of_source(source: str) -> SourceKind:
    """Returns what init.from names.

    Raises:
        UserError: it names none of the three.
    """
    folder = locate(split_step(source)[0])
    if (folder / RECORD).is_file():
        return "run"
    if kerashub.is_preset(source):
        return "kerashub"
    if is_huggingface(source):
        return "huggingface"
    raise UserError(
        f"init.from={source!r} is neither a run, whose folder has a {RECORD}, nor a folder of Hugging Face, which has "
        "a config.json and *.safetensors, nor a preset of KerasHub, which has a config.json and model.weights.h5. "
        "Correct the path, or leave out init.from for random weights."
    )


def check_source(config: Config) -> None:
    """Raises UserError if init.from names nothing that a run can begin with, as far as that can be seen early."""
    source = config.init.source
    if source is None:
        return
    kind = kind_of_source(source)
    if kind == "huggingface":
        check_settings(source, config)
    if kind == "kerashub":
        kerashub.check_settings(source, config)
    if kind != "run":
        return
    folder = split_step(source)[0]
    if locate(folder) == locate(config.run_folder):
        raise UserError(
            f"init.from={source!r} is the run_folder of the new run itself; choose another run_folder, or go on with "
            f"that run: trainer train --resume {quoted(folder)}"
        )
    RunFolder(folder)
