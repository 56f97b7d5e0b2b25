"""Writes the model of a run in the format of other programs, with its tokenizer and its card.

All that can be refused is refused before TensorFlow is loaded. What is written is whole or not there.
"""

import contextlib
import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from trainer.errors import UserError, quoted
from trainer.exchange.card import card_of
from trainer.exchange.huggingface_export import Dtype, layout_for, remarks
from trainer.exchange.keras_file import FACTS
from trainer.exchange.kerashub import family_for
from trainer.exchange.open import open_model
from trainer.model.build import GPT_MODEL
from trainer.runs.run_data import load_tokenizer_of
from trainer.runs.run_folder import CONFIG, CheckpointStep, RunFolder, run_and_step
from trainer.system.progress import shown
from trainer.system.storage import locate, on_disk, reason_and_remedy
from trainer.system.terminal import quiet_import
from trainer.system.whole import written_whole
from trainer.tokenizers.bpe import BpeTokenizer
from trainer.tokenizers.tokenizer_files import SETTINGS

FORMATS = ("huggingface", "savedmodel", "keras", "kerashub")
CARD = "README.md"


class Exported(NamedTuple):
    """A model that was written.

    Attributes:
        path: the file or folder.
        step: the steps that the model was trained for.
        num_bytes: the size of all its files.
        how_to_load: Python code that loads the model.
    """

    path: Path
    step: int
    num_bytes: int
    how_to_load: str

    def __str__(self) -> str:
        size = f"{self.num_bytes / 1e6:,.1f} MB"
        return f"{self.path}: the model of step {self.step:,}, {size}. To load it:\n\n{self.how_to_load}"


def export(
    path: str,
    to: str,
    output: str | None = None,
    step: str | CheckpointStep | None = None,
    dtype: Dtype = "float32",
    say: Callable[[str], None] = print,
) -> Exported:
    """Writes the model of a run; see `trainer.export`."""
    run = RunFolder(run_and_step(path, step)[0])
    _check(run, to, dtype)
    target = _target(run, to, output)
    for remark in remarks(run.config.model) if to == "huggingface" else ():
        say(f"warning: {remark}")
    with quiet_import():
        import tensorflow as tf

        from trainer.exchange.formats import FORMATS as formats

    # A GPU may be too small for the whole model.
    with tf.device("/cpu:0"):
        opened, form = open_model(path, step=step, say=say), formats[to]
    card = card_of(run, opened).to_markdown(form.how_to_load(opened, target.name))
    num_weight_bytes = opened.model.count_params() * (2 if dtype == "bfloat16" else 4)
    with (
        _reported(target),
        written_whole(target) as partial,
        shown(say, "writing", num_weight_bytes, in_bytes=True, measure=lambda: _num_bytes(partial)),
    ):
        form.write(opened, _files(run, card, opened.step), partial, dtype)
        num_bytes = _num_bytes(partial)
    return Exported(target, opened.step, num_bytes, form.how_to_load(opened, str(target)))


def _check(run: RunFolder, to: str, dtype: Dtype) -> None:
    """Raises UserError if the run's model cannot be written in a format, or in a dtype."""
    if to not in FORMATS:
        nearest = difflib.get_close_matches(str(to), FORMATS, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"to={to!r} is not a format; choose one of {', '.join(FORMATS)}.{hint}")
    if run.facts["model"] != GPT_MODEL:
        raise UserError(
            f"{run.path} trains a foreign model, which {run.facts['model']} built, and export writes only trainer's "
            f"GPT. From Python, trainer.resume({str(run.path)!r}, build_model).model is that model; call its save()."
        )
    if dtype not in get_args(Dtype):
        raise UserError(f"dtype={dtype!r} is not possible; choose one of {', '.join(get_args(Dtype))}.")
    if to == "huggingface":
        layout_for(run.config.model)
    elif dtype != "float32":
        raise UserError(f"dtype={dtype!r}: only --to huggingface writes 16-bit weights; leave it out.")
    if to == "kerashub":
        family_for(run.config.model)
    if to in ("savedmodel", "kerashub"):
        _check_tokenizer(run, to)


def _check_tokenizer(run: RunFolder, to: str) -> None:
    """Raises UserError if a format cannot have the run's tokenizer. WordPiece is not loaded: it needs TensorFlow."""
    try:
        kind = json.loads((run.path / "tokenizer" / SETTINGS).read_bytes())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = ""  # `load_tokenizer_of` finds out what is wrong.
    tokenizer = None if kind == "wordpiece" else load_tokenizer_of(run)
    others = "These write it: --to keras, --to huggingface"
    if isinstance(tokenizer, BpeTokenizer):
        if not tokenizer.is_as_gpt2:
            raise UserError(
                f"{run.path / 'tokenizer'}: --to {to} makes tokens of text as GPT-2 does, and this tokenizer.json does "
                f"something else, such as a normalizer. {others}."
            )
    elif to == "kerashub":
        raise UserError(
            f"{run.path / 'tokenizer'}: KerasHub's GPT-2 and Llama 3 have byte-level BPE, and this tokenizer is "
            f"{kind}. {others}, --to savedmodel."
        )


def _target(run: RunFolder, to: str, output: str | None) -> Path:
    """Returns the file or folder to write, which is not there yet."""
    suffix = ".keras" if to == "keras" else f"-{to}"
    home = Path.cwd() if run.path == Path() else run.path
    target = locate(f"{home}{suffix}" if output is None else output)
    if not isinstance(target, Path):
        raise UserError(f"{target}: an export is written to a disk; name a place there with --output, and copy it.")
    if to == "keras" and target.suffix != ".keras":
        raise UserError(f"output={str(target)!r}: Keras reads only files whose name ends with .keras; add that.")
    if target.exists():
        raise UserError(f"{target} is there already; delete it, or name another place with --output.")
    return target


@contextlib.contextmanager
def _reported(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {reason_and_remedy(error)}, or name another place with --output "
            f"{quoted('FOLDER')}; nothing half-written is left."
        ) from None


def _files(run: RunFolder, card: str, step: int) -> dict[str, bytes]:
    """Returns the files that belong to the model, by their names."""
    with on_disk(run.path / "tokenizer") as folder:
        tokenizer = {f"tokenizer/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}
    facts = json.dumps({"step": step}) + "\n"
    return {CARD: card.encode(), CONFIG: run.config.to_toml().encode(), FACTS: facts.encode(), **tokenizer}


def _num_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
