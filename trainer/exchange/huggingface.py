"""Reads models in Hugging Face's form: folders with config.json, safetensors and tokenizer.json.

layouts.py says which tensor holds which weight. What a config.json alone shows to be wrong is refused before TensorFlow
is loaded.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import pydantic
import safetensors

from trainer.config.file import make_config
from trainer.config.settings import Config, ModelConfig, SavedTokenizerConfig
from trainer.errors import UserError, quoted
from trainer.exchange.layouts import (
    Layout,
    Part,
    Settings,
    check_count,
    joined,
    layout_of,
    model_settings,
    parts_of,
    written,
)
from trainer.model.size import parameter_shapes
from trainer.system.storage import Location, locate, on_disk
from trainer.system.terminal import Say
from trainer.system.terminal import say as print_line
from trainer.tokenizers.tokenizer import Tokenizer

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
GENERATION = "generation_config.json"
# The formats of numbers that are read. Others are packed, and only their own libraries unpack them.
_READABLE = ("F64", "F32", "F16", "BF16")
_EMBEDDINGS, _POSITIONS = "gpt/token_embedding/embeddings", "gpt/position_embedding/embeddings"
# The settings of the model that its weights do not depend on.
_FREE = {"dropout", "vocabulary_multiple", "document_mask"}


def is_huggingface(path: str | Location) -> bool:
    """Whether a path is a folder with a model in Hugging Face's form."""
    return (locate(path) / CONFIG).is_file()


def config_of(path: str | Location) -> Config:
    """Returns the config of a run that has the model and the tokenizer of a folder.

    Raises:
        UserError: the folder has no model in Hugging Face's form, or a kind that trainer does not have.
    """
    folder, theirs = locate(path), _Described(path)
    model = {name: value for name, value in theirs.model.model_dump(mode="json").items() if value is not None}
    if (vocabulary := _vocabulary(folder)) is not None:
        model["vocabulary_multiple"] = _multiple(vocabulary, theirs.num_logits, str(folder))
    train = {"precision": "float32", "total_steps": 1, "sequence_length": theirs.num_positions}
    tokenizer = {"kind": "saved", "path": str(folder)}
    return make_config({"run_folder": str(folder), "model": model, "train": train, "tokenizer": tokenizer})


def end_tokens(path: str | Location, vocabulary_size: int) -> tuple[int, ...]:
    """Returns the tokens that end a text of a folder's model: eos_token_id of generation_config.json, or if that has
    none, of config.json. Numbers that are no tokens are left out.

    Raises:
        UserError: a file is damaged.
    """
    folder = locate(path)
    for name in (GENERATION, CONFIG):
        ids = _read_json(folder, name).get("eos_token_id") if (folder / name).is_file() else None
        if ids is not None:
            return tuple(id for id in (ids if isinstance(ids, list) else [ids]) if _is_token(id, vocabulary_size))
    return ()


def remarks_on_bos(path: str | Location, tokenizer: Tokenizer) -> list[str]:
    """Returns a line if config.json has another token before a text than the tokenizer, which chooses it by name."""
    bos_id = _read_json(locate(path), CONFIG).get("bos_token_id")
    if not _is_token(bos_id, tokenizer.vocabulary_size) or bos_id == tokenizer.bos_id:
        return []
    theirs, ours = tokenizer.vocabulary[bos_id], tokenizer.vocabulary[tokenizer.bos_id]
    return [
        f"warning: {locate(path) / CONFIG}: bos_token_id={bos_id} is {theirs!r}, but each text begins with {ours!r}, "
        f"which is chosen by its name. If {theirs!r} is right, name it [BOS] in {TOKENIZER}."
    ]


def _is_token(id: object, vocabulary_size: int) -> TypeGuard[int]:
    return type(id) is int and 0 <= id < vocabulary_size


def check_settings(path: str | Location, config: Config) -> None:
    """Checks that a config describes the model of a folder. TensorFlow is not loaded.

    Raises:
        UserError: it describes another model; the message has the overrides that make it fit. Or the folder has no
            model in Hugging Face's form, or a kind that trainer does not have.
    """
    theirs = _Described(path)
    overrides = overrides_for(config.model, theirs.model)
    if theirs.model.positions == "learned" and config.train.sequence_length > theirs.num_positions:
        overrides.append(f"train.sequence_length={theirs.num_positions}")
    if isinstance(config.tokenizer, SavedTokenizerConfig):
        vocabulary = _vocabulary(locate(config.tokenizer.path))
        if vocabulary is not None and config.model.num_logits(vocabulary.size) != theirs.num_logits:
            overrides.append(f"model.vocabulary_multiple={_multiple(vocabulary, theirs.num_logits, path)}")
    if overrides:
        raise UserError(
            f"{theirs.place}: the settings describe another model. Give: {' '.join(map(quoted, overrides))}"
        )


def read_weights(
    path: str | Location, config: Config, vocabulary_size: int, say: Say = print_line
) -> dict[str, np.ndarray]:
    """Reads the weights of a folder's model.

    Args:
        path: the folder.
        config: the config of the run that begins with them.
        vocabulary_size: the number of tokens of the run's tokenizer.
        say: prints a line.

    Returns:
        Each weight by its path, float32, in the shapes of `parameter_shapes`.

    Raises:
        UserError: a file is missing or damaged, or a tensor does not fit; the message names the first one.
    """
    model, length = config.model, config.train.sequence_length
    theirs = _Described(path)
    with on_disk(locate(path)) as folder:
        vocabulary = _vocabulary(folder)
        if vocabulary is not None and vocabulary.size != vocabulary_size:
            raise UserError(
                f"{locate(path) / TOKENIZER} has {vocabulary.size} tokens, and the tokenizer of the run "
                f"{vocabulary_size}, so these are not the tokens that the model was trained with. Leave out the "
                "settings of the tokenizer."
            )
        tensors = _Tensors(folder, theirs.layout, str(locate(path)))
        found = {
            weight: parts_of(theirs.layout, model, weight, shape)
            for weight, shape in parameter_shapes(model, vocabulary_size, length)
        }
        for weight, (parts, _) in found.items():
            for part in parts:
                tensors.check(part, weight, vocabulary_size)
        tensors.check_rest({part.name for parts, _ in found.values() for part in parts}, model.tied_embeddings)
        if model.positions == "learned" and theirs.num_positions > length:
            say(f"{path} has {theirs.num_positions} positions; the first {length} are used (train.sequence_length).")
        return {
            weight: joined([tensors.read(part) for part in parts], is_transposed)
            for weight, (parts, is_transposed) in found.items()
        }


def digest_of_weights(path: str | Location) -> str:
    """Returns a SHA-256 of a folder's files of weights."""
    digest = hashlib.sha256()
    with on_disk(locate(path)) as folder:
        for name in _files_of_weights(folder, str(locate(path))):
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class _Described:
    """What the config.json of a folder describes.

    Args:
        path: the folder.

    Attributes:
        place: the path of the config.json.
        layout: the layout of the weights.
        model: our settings of the model.
        num_logits: the rows of the token embedding.
        num_positions: the most tokens of a text.

    Raises:
        UserError: there is no such file, or it describes a model that trainer does not have.
    """

    def __init__(self, path: str | Location) -> None:
        self.place = str(locate(path) / CONFIG)
        settings = _read_json(locate(path), CONFIG)
        self.layout = layout_of(settings, self.place)
        try:
            # As JSON: strict mode then takes a list for a tuple.
            ours = json.dumps(model_settings(settings, self.place))
            self.model = ModelConfig.model_validate_json(ours, strict=True)
        except pydantic.ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise UserError(f"{self.place}: trainer has no such model: {reasons}") from None
        self.num_logits = self._count(settings, "vocab_size")
        self.num_positions = self._count(settings, self.layout.positions_key)

    def _count(self, settings: Settings, key: str) -> int:
        value: int = settings.get(key, self.layout.defaults[key])
        check_count(value, key, self.place)
        return value


class _Tensors:
    """The tensors in the files of a folder. They are read one by one.

    Args:
        folder: the folder on a disk.
        layout: the layout of the weights.
        place: names the folder in messages.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, layout: Layout, place: str) -> None:
        self._layout, self._place = layout, place
        self._files: dict[str, tuple[Any, str]] = {}  # The file of each tensor, and the tensor's name there.
        for name in _files_of_weights(folder, place):
            try:
                file = safetensors.safe_open(folder / name, "np")
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{place}/{name}: cannot be read ({error}); copy or download it again.") from None
            self._files |= {tensor: (file, tensor) for tensor in file.keys()}  # noqa: SIM118
        if not any(name.startswith(layout.prefix) for name in self._files):
            self._files = {_with_prefix(layout, name): value for name, value in self._files.items()}

    def check(self, part: Part, weight: str, vocabulary_size: int) -> None:
        """Raises UserError if a tensor is missing, or has another shape or an unknown format."""
        if part.name not in self._files:
            raise UserError(f"{self._place} has no tensor {part.name}, which the model needs for {weight}.")
        stored = self._stored(part.name)
        shape = tuple(stored.get_shape())
        if stored.get_dtype() not in _READABLE:
            raise UserError(
                f"{self._place}: the tensor {part.name} is {stored.get_dtype()}; only float32, bfloat16 and float16 "
                "are read. Save the model in one of these."
            )
        has_more_rows = weight == _POSITIONS and len(shape) == 2 and shape[0] > part.shape[0]
        if (part.shape[0], *shape[1:]) == part.shape if has_more_rows else shape == part.shape:
            return
        advice = ""
        if weight == _EMBEDDINGS and len(shape) == 2 and shape[0] >= vocabulary_size:
            multiple = _multiple(_Vocabulary(vocabulary_size, {}), shape[0], self._place)
            advice = f" With model.vocabulary_multiple={multiple} the {vocabulary_size} tokens have {shape[0]} rows."
        elif weight == _POSITIONS and len(shape) == 2:
            advice = f" Give train.sequence_length={shape[0]} or less."
        raise UserError(
            f"{self._place}: the tensor {part.name} has the shape {list(shape)}, and the config needs "
            f"{list(part.shape)}.{advice}"
        )

    def check_rest(self, used: set[str], is_tied: bool) -> None:
        """Raises UserError if there are tensors that the model has no use for."""
        rest = [name for name in sorted(self._files.keys() - used) if not self._layout.is_computed(name)]
        for name in rest:
            if name == "lm_head.weight" and is_tied:
                (embeddings,) = next(entry.theirs for entry in self._layout.entries if entry.ours == _EMBEDDINGS)
                if np.array_equal(self._stored(name)[:], self._stored(embeddings)[:]):
                    continue  # Some programs save a tied matrix twice.
            raise UserError(f"{self._place} has a tensor {name}, which the model of config.json has no place for.")

    def read(self, part: Part) -> np.ndarray:
        """Returns a tensor in the shape of a part, which may have fewer rows than the file."""
        tensor: np.ndarray = self._stored(part.name)[: part.shape[0]]
        return tensor

    def _stored(self, name: str) -> Any:
        file, key = self._files[name]
        return file.get_slice(key)


def _with_prefix(layout: Layout, name: str) -> str:
    return name if name.startswith("lm_head.") else f"{layout.prefix}{name}"


def _files_of_weights(folder: Path, place: str) -> Iterable[str]:
    if (folder / WEIGHTS).is_file():
        return (WEIGHTS,)
    if (folder / INDEX).is_file():
        names = _read_json(folder, INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(each, str) for each in names.values()):
            raise UserError(f"{place}/{INDEX}: no weight_map; copy or download it again.")
        return sorted({Path(name).name for name in names.values()})
    advice = ""
    if any(folder.glob("pytorch_model*.bin")):
        advice = (
            " Its weights are in PyTorch's own form, which can hold programs. Save them as safetensors: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER) in transformers."
        )
    raise UserError(f"{place} has no {WEIGHTS} and no {INDEX}.{advice}")


def _read_json(folder: Location, name: str) -> dict[str, Any]:
    try:
        read = json.loads((folder / name).read_bytes())
    except OSError as error:
        raise UserError(f"{folder} has no {name} that can be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / name}: not JSON: {error}; copy or download it again.") from None
    if not isinstance(read, dict):
        raise UserError(f"{folder / name}: not a JSON object; copy or download it again.")
    return read


class _Vocabulary(NamedTuple):
    """The vocabulary of a tokenizer.json.

    Attributes:
        size: the number of tokens.
        added: the tokens that are only in added_tokens, by their numbers.
    """

    size: int
    added: Mapping[int, str]


def _vocabulary(folder: Location) -> _Vocabulary | None:
    """Returns the vocabulary of the tokenizer.json in a folder; None if there is none."""
    if not (folder / TOKENIZER).is_file():
        return None
    file = _read_json(folder, TOKENIZER)
    try:
        added = {int(token["id"]): str(token["content"]) for token in file.get("added_tokens", [])}
        ids = set(file["model"]["vocab"].values())
        return _Vocabulary(max(ids | added.keys()) + 1, {id: added[id] for id in added.keys() - ids})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{folder / TOKENIZER}: its vocabulary is not one of byte-level BPE or WordPiece, or is damaged."
        ) from None


def _multiple(vocabulary: _Vocabulary, num_rows: int, place: object) -> int:
    """Returns the smallest model.vocabulary_multiple that gives a vocabulary this many rows.

    Raises:
        UserError: there are fewer rows than tokens.
    """
    if num_rows < vocabulary.size:
        reason = f"{place}: the model has {num_rows} rows for the {vocabulary.size} tokens of the tokenizer"
        extra = [repr(token) for id, token in sorted(vocabulary.added.items()) if id >= num_rows]
        if len(extra) == vocabulary.size - num_rows:
            raise UserError(f"{reason}, and none for {', '.join(extra)}; remove them from added_tokens in {TOKENIZER}.")
        raise UserError(
            f"{reason}, which is therefore not the one that it was trained with. Give the tokenizer of the model."
        )
    return next(m for m in range(num_rows - vocabulary.size + 1, num_rows + 1) if num_rows % m == 0)


def overrides_for(model: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Returns the overrides that make settings describe another model with the same weights and the same logits."""
    if _meaning(theirs) == _meaning(model):
        return []
    now, needed = (each.model_dump(mode="json", exclude=_FREE) for each in (model, theirs))
    return [f"model.{name}={written(value)}" for name, value in needed.items() if value != now[name]]


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """Returns what decides which weights a model has and what it computes with them."""
    settings = model.model_dump(exclude=_FREE)
    heads = {"head_dim": model.head_width(), "num_key_value_heads": model.key_value_heads()}
    return settings | heads | {"use_bias": model.biases()}
