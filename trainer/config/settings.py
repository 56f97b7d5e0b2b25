"""The settings of a run and their checks: frozen, strict models, one class for each section of the TOML file.

Every check that needs neither data nor a device is made here or in file.py, before TensorFlow is imported. Each
default is written only here, in a class below. If a setting of the model or the optimizer has a counterpart in the
tutorial, the default is the tutorial's. file.py reads files and overrides into these models.
"""

import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import pydantic
import tomli_w
from pydantic import Discriminator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Tag
from pydantic_core import PydanticCustomError

from trainer.errors import UserError

# Among this many consecutive examples, each source of data.weights has exactly its share.
MIXTURE_EXAMPLES = 1024
STORYBOOK_SOURCE = "storybook"
# One for each byte, one for padding, and one for the beginning of a document.
MIN_BPE_TOKENS = 258
# Below the first the likeliest token is certain, above the second all tokens are equally likely, and float32 reaches
# its limits.
TEMPERATURES = (1e-6, 1e6)
_MAX_STEM_BYTES = 100

# How a token is picked; trainer/decoding/decoder.py.
Sampler = Literal["greedy", "beam", "random", "top-k", "top-p", "min-p"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

Fraction = Annotated[float, Field(gt=0, lt=1)]
# The parts of the GPT that can have a bias.
BiasedPart = Literal["query_key_value", "attention_output", "feedforward", "norm", "unembedding"]
# The largest number below 1 that 32 bits hold: training would read a number closer to 1 as 1.
BelowOne = Annotated[float, Field(ge=0, le=1 - 2.0**-24)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(pydantic.BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @pydantic.field_validator("*")
    @classmethod
    def _check_size_of_numbers(cls, value: Any) -> Any:
        """Refuses numbers that training would read as others: 1e39 as infinity, 1e-50 as 0."""
        values = value.values() if isinstance(value, dict) else (value,)
        for number in itertools.chain.from_iterable(each if isinstance(each, tuple) else (each,) for each in values):
            if isinstance(number, int) and abs(number) >= 2**63:
                raise PydanticCustomError("size", "input should be less than 2**63, to fit 64 bits")
            if isinstance(number, float) and number and not 2.0**-126 <= abs(number) < 2.0**128:
                raise PydanticCustomError("size", "input should be 0 or from 1.2e-38 to 3.4e+38, to fit 32 bits")
        return value


def by_step(name: str, example: str, value: Any) -> dict[int, Any]:
    """Returns a setting that has a value for each of some steps, in the order of the steps.

    Args:
        name: the setting.
        example: what a value looks like, for messages.
        value: the setting as it was read.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} has no steps; write '{name}.STEP={example}' for each change.")
    for step in value:
        if not re.fullmatch(r"0*[1-9][0-9]{0,17}", str(step).replace("_", "")):
            raise ValueError(f"{name}: {step!r} is not a step; write a whole number, from 1 on.")
    steps = [int(str(step).replace("_", "")) for step in value]
    if len({*steps}) < len(steps):
        raise ValueError(f"{name}: {max(steps, key=steps.count)} is there twice; leave out one.")
    return dict(sorted(zip(steps, value.values(), strict=True), key=lambda pair: pair[0]))


class DataConfig(Section):
    """Where the text comes from, and how it is cut into training examples."""

    train: tuple[str, ...] = (STORYBOOK_SOURCE,)
    """The training text: "storybook", which is built in; files or globs of UTF-8 text or JSON Lines (.jsonl, .ndjson,
    .jsonlines or .json), plain or packed with gzip or zstd, or of tables (.parquet, .arrow), on a disk or in an object
    store (gs://...); folders of Hugging Face's datasets; or splits of tensorflow-datasets, such as
    tfds:imdb_reviews:train[:90%]."""
    validation: tuple[str, ...] | None = None
    """The validation text, given like train. By default part of the training text is held out."""
    documents: Literal["line", "paragraph", "file", "auto"] = "line"
    """What one document of a text file is. line: a line. paragraph: a block between blank lines. file: the whole file.
    auto: a paragraph if the first text file has a blank line for every 20 lines or more often, otherwise a line. A
    record of JSON Lines, of a table or of tensorflow-datasets is always one document; if no source is a text file, only
    auto may be set."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """The field of JSON Lines, the column of a table, or the feature of a tensorflow-datasets split, that holds a
    document. It may be set only if a source is one of these."""
    max_broken_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the documents that may be broken (not UTF-8, not JSON, or without the text); broken documents are
    left out. With 0 the first one is an error."""
    min_bytes: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Only documents of more UTF-8 bytes than this are used."""
    held_out_fraction: Fraction = 0.01
    """The share of the text that is held out if validation is left out: documents chosen by their hash, or the tail of
    each file if a document is a whole file."""
    mode: Literal["lines", "packed"] = "packed"
    """packed: documents are joined by [BOS] and cut into full windows, so that every token is used. lines: each example
    is one document, cut or padded to train.sequence_length."""
    predict_end: bool = True
    """With data.mode="lines": the model also learns where a document ends, from a [BOS] after each document that fits
    into train.sequence_length. false is the tutorial's recipe; its models do not stop at the end of a document."""
    weights: tuple[NonNegativeFloat, ...] | None = None
    """How often an example comes from each source of data.train, relative to the others. data.validation, if it is
    given, names one source for each of them, and each is also scored separately. By default all of data.train is one
    text."""
    weights_from_step: dict[PositiveInt, tuple[NonNegativeFloat, ...]] = {}
    """Other weights from a step on, by that step: with weights_from_step.1000 = [1, 1] the batches after step 1000 have
    as many examples from the one source as from the other. A weight may be 0 for some of the steps."""
    shuffle_window_mb: PositiveInt | None = None
    """For data larger than the memory of any host: blocks of 8 MB are read in a shuffled order, and the examples of
    this many megabytes of blocks are shuffled together. By default every example can be at any place of an epoch."""
    storybook_stories: PositiveInt = 40_000
    """The number of stories that the built-in source tells, held-out ones included."""
    storybook_seed: Seed = 0
    """The seed of the stories; another seed tells other stories."""
    prepared_folder: Annotated[str, Field(min_length=1)] = "prepared"
    """The folder that holds all prepared data sets, each in a separate folder."""

    @pydantic.field_validator("train", "validation", mode="before", json_schema_input_type=str | tuple[str, ...] | None)
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("train", "validation"):
            sources = getattr(self, key)
            if sources is not None and not all(sources):
                raise ValueError(f"data.{key} is empty; give a file, a glob or {STORYBOOK_SOURCE!r}.")
            if sources is not None and len(sources) != 1 and STORYBOOK_SOURCE in sources:
                raise ValueError(f"data.{key} mixes {STORYBOOK_SOURCE!r} with files; use one or the other.")
            if sources == ():
                raise ValueError(f"data.{key} is empty; give a file, a glob or {STORYBOOK_SOURCE!r}.")
        if self.weights is not None:
            self._check_weights(self.weights)
        elif self.weights_from_step:
            raise ValueError(
                "data.weights_from_step has no effect without data.weights, the weights of the first steps; set them."
            )
        if self.mode == "packed" and not self.predict_end:
            raise ValueError(
                "data.predict_end=false has no effect with data.mode='packed', where every [BOS] is a target; leave it "
                "out (data.predict_end=none), or set data.mode='lines'."
            )
        if self.validation == (STORYBOOK_SOURCE,):
            raise ValueError(
                f"data.validation={STORYBOOK_SOURCE!r} would repeat the training stories; leave data.validation out, "
                "and part of the stories is held out."
            )
        return self

    @pydantic.field_validator("weights_from_step", mode="before")
    @classmethod
    def _by_step(cls, value: Any) -> Any:
        steps = by_step("data.weights_from_step", "[WEIGHT,WEIGHT]", value)
        return {step: tuple(weights) if isinstance(weights, list) else weights for step, weights in steps.items()}

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        for setting, each in self._weights_by_setting(weights).items():
            what = f"{setting}={list(each)}"
            for key in ("train", "validation"):
                sources = getattr(self, key)
                if sources is not None and len(sources) != len(each):
                    raise ValueError(
                        f"{what} must have a weight for each source of data.{key}: {len(sources)}, not {len(each)}. Or "
                        f"leave out {setting}."
                    )
            if not any(each):
                raise ValueError(f"{what}: no source has a weight; one of them must be above 0.")
            if min(filter(None, each)) * MIXTURE_EXAMPLES < sum(each):
                raise ValueError(
                    f"{what}: the smallest weight must be at least 1/{MIXTURE_EXAMPLES} of their sum, or 0."
                )
        for i, source in enumerate(self.train):
            if not any(each[i] for each in self._weights_by_setting(weights).values()):
                raise ValueError(
                    f"data.weights={list(weights)}: the source {source!r} has weight 0 at every step; leave it out, or "
                    "give it another weight from a step on, in data.weights_from_step."
                )
        if self.shuffle_window_mb is not None:
            raise ValueError("data.shuffle_window_mb and data.weights cannot be used together; leave out one of them.")

    def _weights_by_setting(self, weights: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
        changes = {f"data.weights_from_step.{step}": each for step, each in self.weights_from_step.items()}
        return {"data.weights": weights, **changes}

    def sources(self) -> "tuple[DataConfig, ...]":
        """Returns the settings of each source that data.weights mixes. Without weights there is one source."""
        if self.weights is None:
            return (self,)
        validation = [None] * len(self.train) if self.validation is None else [(each,) for each in self.validation]
        return tuple(
            self.model_copy(update={"train": (train,), "validation": each, "weights": None, "weights_from_step": {}})
            for train, each in zip(self.train, validation, strict=True)
        )

    def is_storybook(self) -> bool:
        """Whether the text is the built-in storybook."""
        return self.train == (STORYBOOK_SOURCE,)


class WordPieceConfig(Section):
    """A WordPiece vocabulary trained on the text, with the tutorial's settings."""

    kind: Literal["wordpiece"]
    vocabulary_size: Annotated[int, Field(ge=4)] = 5000
    """The number of tokens, special ones included. A text with too few words makes fewer."""
    lowercase: bool = True
    """Whether the case of letters is folded before the text is split into words."""
    sample_bytes: PositiveInt = 20_000_000
    """The most text that the vocabulary is trained on. Every character of the whole text still gets a token."""


class WordPieceFileConfig(Section):
    """A WordPiece vocabulary that already exists, such as BERT's."""

    kind: Literal["wordpiece"]
    path: Annotated[str, Field(min_length=1)]
    """A vocab.txt, or a tokenizer.json of Hugging Face. Words are split with the tutorial's settings in both cases."""
    lowercase: bool = True
    """Whether the case of letters is folded before the text is split into words; set it as it was when the vocabulary
    was made."""


class BpeConfig(Section):
    """A byte-level BPE vocabulary trained on the text, which is split into words as by GPT-2."""

    kind: Literal["bpe"]
    # Twice as many make Korean text 9% and English text 4% shorter, in tokens.
    vocabulary_size: Annotated[int, Field(ge=MIN_BPE_TOKENS)] = 16_384
    """The most tokens in the vocabulary, the special ones and one for each byte included. A small text makes fewer:
    only a sequence that occurs several times becomes a token."""
    sample_bytes: PositiveInt = 20_000_000
    """The most text that the vocabulary is trained on."""


class BpeFileConfig(Section):
    """A byte-level BPE vocabulary that already exists, such as GPT-2's."""

    kind: Literal["bpe"]
    path: Annotated[str, Field(min_length=1)]
    """A tokenizer.json of Hugging Face."""


class SavedTokenizerConfig(Section):
    """The tokenizer of a run or of a Hugging Face model, of whatever kind."""

    kind: Literal["saved"]
    path: Annotated[str, Field(min_length=1)]
    """The folder of a run, or a folder with a tokenizer.json of Hugging Face. With init.from this is the default, and
    the folder is the one of init.from."""


class CharConfig(Section):
    """One token per character of the text."""

    kind: Literal["char"]


class ByteConfig(Section):
    """One token per UTF-8 byte."""

    kind: Literal["byte"]
    vocabulary_size: ClassVar[int] = 256 + 2  # Padding, and the beginning of a document.


def tokenizer_tag(settings: Any) -> str | None:
    """Returns the tag of the section below that a tokenizer's settings belong to: settings as read, or a section."""
    if isinstance(settings, Section):
        settings = {name: getattr(settings, name) for name in type(settings).model_fields}
    if not isinstance(settings, dict):
        return "wordpiece"  # WordPieceConfig refuses what is not a section.
    kind = settings.get("kind")
    if not isinstance(kind, str):
        return None
    return f"{kind} file" if kind in ("wordpiece", "bpe") and "path" in settings else kind


def learns_vocabulary(tag: str | None) -> bool:
    """Returns whether the tokenizer of a tag takes its vocabulary from the text."""
    return tag in ("wordpiece", "bpe", "char")


TokenizerConfig = Annotated[
    Annotated[WordPieceConfig, Tag("wordpiece")]
    | Annotated[WordPieceFileConfig, Tag("wordpiece file")]
    | Annotated[BpeConfig, Tag("bpe")]
    | Annotated[BpeFileConfig, Tag("bpe file")]
    | Annotated[SavedTokenizerConfig, Tag("saved")]
    | Annotated[CharConfig, Tag("char")]
    | Annotated[ByteConfig, Tag("byte")],
    Discriminator(tokenizer_tag),
]


# No class body can have a field of this name, because `from` is a keyword of Python.
_FROM: dict[str, Any] = {
    "from": (
        Annotated[str, Field(min_length=1)] | None,
        Field(
            None,
            description="The model whose weights a new run begins with: a run, RUN@1000 or RUN@best for another of its "
            "checkpoints than the newest; a folder of Hugging Face; or a preset of KerasHub. The sizes of the model "
            "must be the same. Steps and optimizer begin anew. By default the weights are random.",
        ),
    )
}


class InitConfig(pydantic.create_model("_From", __base__=Section, **_FROM)):  # type: ignore[misc]
    """What a new run begins with."""

    @property
    def source(self) -> str | None:
        """The value of init.from."""
        value: str | None = getattr(self, "from")
        return value


class ModelConfig(Section):
    """The shape of the GPT; the defaults are the tutorial's model."""

    num_layers: Annotated[int, Field(ge=1, le=10_000)] = 2
    """The number of transformer blocks."""
    num_heads: PositiveInt = 3
    """The attention heads of each block."""
    head_dim: PositiveInt | None = None
    """The width of an attention head. By default hidden_dim // num_heads."""
    num_key_value_heads: PositiveInt | None = None
    """The heads of the keys and values; each serves the same number of attention heads. Fewer of them make the cache
    smaller that text is written with. By default num_heads."""
    hidden_dim: PositiveInt = 256
    """The width of the embeddings and of every block."""
    intermediate_dim: PositiveInt = 256
    """The width of the feed-forward layer."""
    activation: Literal["relu", "gelu", "gelu_tanh", "swiglu"] = "relu"
    """The activation of the feed-forward layer. gelu is the exact one, with the error function; gelu_tanh is the
    approximation that GPT-2 was trained with. swiglu multiplies the layer by a gate, which needs half as many weights
    again for the same intermediate_dim."""
    norm: Literal["layer", "rms"] = "layer"
    """layer: normalize by mean and variance. rms: normalize by the root mean square only."""
    norm_epsilon: Fraction = 1e-5
    """Added to the variance, or to the mean square with rms, before its root is taken."""
    positions: Literal["learned", "rope"] = "learned"
    """learned: an embedding of each position. rope: queries and keys are rotated by an angle that grows with the
    position."""
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    """With rope: the base of the rotary frequencies. Raise it for long sequences."""
    qk_norm: bool = False
    """Normalize the queries and the keys of each head by their root mean square, before rope rotates them, so that no
    score can grow with their lengths."""
    pre_norm: bool = False
    """Normalize before attention and before the feed-forward layer, and once at the end, instead of after each sum."""
    tied_embeddings: bool = False
    """Use the token embedding as the output projection too, without a bias."""
    use_bias: bool | tuple[BiasedPart, ...] = True
    """Whether projections and normalizations have biases: true, false, or a list of the parts that have them, such as
    ["query_key_value"]. With tied_embeddings the output projection never has one."""
    dropout: BelowOne = 0.0
    """The share of activations that is dropped after attention, after the feed-forward layer and, with pre_norm, after
    the embeddings."""
    vocabulary_multiple: PositiveInt = 1
    """The rows of the embedding and of the logits are rounded up to a multiple of this; 128 fills the tiles of a TPU.
    The rows beyond the vocabulary are trained as tokens that never occur, and are never written."""
    document_mask: bool = False
    """With packed data: a token attends only to tokens of its own document, and positions count from its start."""

    def head_width(self) -> int:
        """Returns the width of one attention head."""
        return self.head_dim or self.hidden_dim // self.num_heads

    def key_value_heads(self) -> int:
        """Returns the number of heads of the keys and values."""
        return self.num_key_value_heads or self.num_heads

    def query_key_value_dim(self) -> int:
        """Returns the width of the queries, keys and values of all heads together."""
        return (self.num_heads + 2 * self.key_value_heads()) * self.head_width()

    def intermediate_projection_dim(self) -> int:
        """Returns the width of the first projection of the feed-forward layer, which includes the gate of swiglu."""
        return 2 * self.intermediate_dim if self.activation == "swiglu" else self.intermediate_dim

    def biases(self) -> frozenset[BiasedPart]:
        """Returns the parts that have a bias."""
        parts: tuple[BiasedPart, ...] = self.use_bias if isinstance(self.use_bias, tuple) else ()
        if self.use_bias is True:
            parts = get_args(BiasedPart)
        return frozenset(parts) - ({"unembedding"} if self.tied_embeddings else set())

    def num_logits(self, vocabulary_size: int) -> int:
        """Returns the rows of the embedding and of the logits for a vocabulary of this size."""
        return -(-vocabulary_size // self.vocabulary_multiple) * self.vocabulary_multiple

    @pydantic.field_validator("use_bias", mode="before")
    @classmethod
    def _check_parts(cls, value: Any) -> Any:
        parts = get_args(BiasedPart)
        if isinstance(value, bool):
            return value
        if isinstance(value, list | tuple) and set(map(str, value)) <= set(parts):
            return tuple(value)
        raise PydanticCustomError("parts", f"input should be true, false, or a list of: {', '.join(parts)}")

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim is None and self.num_heads > self.hidden_dim:
            raise ValueError(
                f"model.num_heads={self.num_heads} is more than model.hidden_dim={self.hidden_dim}; "
                "a head needs a width of at least 1; change one of the two, or set model.head_dim."
            )
        if self.num_heads % self.key_value_heads():
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_key_value_heads="
                f"{self.num_key_value_heads}; each of these must serve the same number of heads. Change one of the two."
            )
        if self.positions == "rope" and self.head_width() % 2:
            width, remedy = f"model.head_dim={self.head_dim} is", "change it"
            if self.head_dim is None:
                width = (
                    f"model.hidden_dim={self.hidden_dim} // model.num_heads={self.num_heads} is {self.head_width()},"
                )
                remedy = "change one of the two"
            raise ValueError(
                f"model.positions='rope' rotates the numbers of a head in pairs, but {width} an odd width; {remedy}."
            )
        if isinstance(self.use_bias, tuple) and self.tied_embeddings and "unembedding" in self.use_bias:
            raise ValueError(
                f"model.use_bias={list(self.use_bias)}: 'unembedding' has no effect with model.tied_embeddings=true, "
                "because a token embedding has no bias; leave it out of the list."
            )
        if self.positions != "rope" and self.rope_theta != type(self).model_fields["rope_theta"].default:
            raise ValueError(
                f"model.rope_theta={self.rope_theta} has no effect with model.positions={self.positions!r}; choose "
                "'rope', or leave it out."
            )
        return self


class TrainConfig(Section):
    """The batches, length and arithmetic of training."""

    precision: Literal["float32", "mixed_bfloat16", "mixed_float16", "float64"]
    """A Keras dtype policy. Under the mixed ones weights stay float32. mixed_bfloat16 is fast on TPUs, on GPUs since
    Ampere, and on CPUs that multiply bfloat16 (Intel with AMX, AMD since Zen 4). On other CPUs the GPT computes in
    float32 instead, unless XLA compiles the step: its embeddings are rounded to bfloat16, and it is as fast as with
    float32. mixed_float16, with a loss scale, is for older GPUs."""
    total_steps: PositiveInt | None = None
    """The number of optimizer steps; set this or num_epochs."""
    num_epochs: PositiveInt | None = None
    """The number of passes over the training examples; set this or total_steps."""
    global_batch_size: PositiveInt = 64
    """The number of examples per step, over all replicas."""
    batch_warmup: dict[PositiveInt, PositiveInt] = {}
    """Smaller batches at the beginning, by the step that they end at: with batch_warmup.500 = 16 the batches of the
    first 500 steps have 16 examples. A run with them sees the examples in the same order as a run without, unless
    data.weights_from_step changes the weights at a step: it comes after fewer examples then."""
    micro_batch_size: PositiveInt | Literal["auto"] | None = None
    """The number of examples that a replica computes at a time. Fewer need less memory; the gradients of a step are
    summed before the optimizer uses them. By default a replica computes its whole share at once, or on a CPU in two
    halves. auto: the same, or the largest micro-batch that fits the device: it is tried out before the first step and
    written into the run's own config."""
    sequence_length: Annotated[int, Field(ge=2)] = 128
    """The number of tokens per example."""
    steps_per_call: PositiveInt = 50
    """The number of steps in one call of the compiled loop, without a return to Python."""
    xla: Literal["auto", "on", "off"] = "auto"
    """Compile the forward and backward pass of each replica with XLA; if distribution.shard is "weights", the two
    passes of a block, and the loss. A TPU's whole step is compiled in any case. auto: on GPUs only, and not on those
    that the build of TensorFlow does not know (Blackwell with TensorFlow up to 2.21): XLA aborts there. On a machine
    with only a CPU, normalizations and the activations other than relu are compiled in any case."""
    recompute: Literal["auto", "nothing", "attention", "blocks"] = "auto"
    """What the backward pass computes again instead of keeping it in memory. attention: the probabilities of attention,
    for a sixth more of its matrix products, and the outputs of activations. blocks: all of a transformer block except
    its input, for one more forward pass. auto: attention on accelerators, nothing on a CPU."""
    z_loss: NonNegativeFloat = 0.0
    """Also minimize this times log(sum(exp(logits)))**2 of each target, which keeps the logits from drifting. The
    reported loss is without it."""
    seed: Seed = 0
    """The seed of the initial weights, of the order of the examples and of the dropout masks."""

    @pydantic.field_validator("batch_warmup", mode="before")
    @classmethod
    def _by_step(cls, value: Any) -> Any:
        return by_step("train.batch_warmup", "SIZE", value)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if (self.total_steps is None) == (self.num_epochs is None):
            raise ValueError(
                f"train.total_steps={self.total_steps} and train.num_epochs={self.num_epochs}: "
                "set exactly one of the two."
            )
        if self.global_batch_size % (self.fixed_micro_batch_size() or 1):
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of train.micro_batch_size="
                f"{self.micro_batch_size}; change one of the two."
            )
        before = 0
        for step, size in self.batch_warmup.items():
            if not before < size < self.global_batch_size:
                raise ValueError(
                    f"train.batch_warmup.{step}={size}: the batches must grow from step to step, and be smaller than "
                    f"train.global_batch_size={self.global_batch_size}; change one of them."
                )
            if size % (self.fixed_micro_batch_size() or 1):
                raise ValueError(
                    f"train.batch_warmup.{step}={size} is not a multiple of train.micro_batch_size="
                    f"{self.micro_batch_size}; change one of the two."
                )
            before = size
        return self

    def batch_sizes(self) -> tuple[int, ...]:
        """Returns the examples of a batch in each part of the run: those of batch_warmup, and global_batch_size."""
        return (*self.batch_warmup.values(), self.global_batch_size)

    def fixed_micro_batch_size(self) -> int | None:
        """Returns micro_batch_size if it is a number; None if the device decides."""
        return None if self.micro_batch_size == "auto" else self.micro_batch_size


class OptimizerConfig(Section):
    """The optimizer and its learning-rate schedule; the defaults are the tutorial's Adam."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon, which orthogonalizes the momentum of the matrices inside the blocks, and leaves embeddings, the
    output projection, normalizations and biases to AdamW. Its updates are as large as those of AdamW, so learning_rate
    and weight_decay are for both."""
    learning_rate: PositiveFloat = 1e-3
    """The peak of the learning rate, reached after warmup_steps."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "constant"
    """How the learning rate goes on after the warm-up. constant: it stays. linear, cosine: it falls from learning_rate
    to final_learning_rate at the last step. wsd: it stays, and falls only in the last decay_steps steps. inverse_sqrt:
    it falls as 1 over the root of the step."""
    warmup_steps: NonNegativeInt = 0
    """The number of steps over which the learning rate rises linearly to learning_rate."""
    final_learning_rate: NonNegativeFloat = 0.0
    """The learning rate at the last step; constant and inverse_sqrt do not use it."""
    decay_steps: PositiveInt | None = None
    """The number of steps at the end of the run over which the learning rate falls to final_learning_rate, with
    schedule="wsd"; or to 0 with "inverse_sqrt", which by default goes on to the end without that."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """How the learning rate falls over decay_steps. sqrt: by 1 minus the root of the part of the decay that is over,
    fast at first."""
    beta_1: BelowOne = 0.9
    """The decay of the mean of the gradients."""
    beta_2: BelowOne = 0.999
    """The decay of the mean of the squared gradients."""
    epsilon: PositiveFloat = 1e-7
    """Added to the root of the mean of the squared gradients."""
    momentum: BelowOne = 0.95
    """With muon: the decay of the sum of the gradients of these matrices."""
    weight_decay: NonNegativeFloat = 0.0
    """The decoupled decay of matrices and embeddings; biases and normalizations do not decay."""
    clip_norm: PositiveFloat | None = None
    """The largest global norm of the gradient; a longer gradient is shortened to it. By default it is not clipped."""
    ema_decay: Annotated[float, Field(gt=0, le=1 - 2.0**-24)] | None = None
    """The decay of an exponential average of the weights, such as 0.999: an average over about the last
    1 / (1 - ema_decay) steps, but at most over the last ninth of all steps. Evaluation, samples, generate, evaluate and
    export use it in place of the weights. By default there is none."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "muon" and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError(
                f"optimizer.momentum={self.momentum} has no effect with optimizer.kind={self.kind!r}; choose 'muon', "
                "or leave it out."
            )
        if self.schedule in ("constant", "inverse_sqrt") and self.final_learning_rate:
            raise ValueError(
                f"optimizer.final_learning_rate={self.final_learning_rate} has no effect with "
                f"optimizer.schedule={self.schedule!r}; choose 'linear', 'cosine' or 'wsd', or leave it out."
            )
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"optimizer.final_learning_rate={self.final_learning_rate} is above "
                f"optimizer.learning_rate={self.learning_rate}; the schedule only falls."
            )
        self._check_decay()
        return self

    def _check_decay(self) -> None:
        if self.schedule == "wsd" and self.decay_steps is None:
            raise ValueError(
                "optimizer.schedule='wsd' needs optimizer.decay_steps, the number of steps at the end over which the "
                "rate falls; a fifth of the run is a good start."
            )
        if self.schedule not in ("wsd", "inverse_sqrt") and self.decay_steps is not None:
            raise ValueError(
                f"optimizer.decay_steps={self.decay_steps} has no effect with optimizer.schedule={self.schedule!r}; "
                "choose 'wsd' or 'inverse_sqrt', or leave it out (optimizer.decay_steps=none)."
            )
        if self.decay_shape != type(self).model_fields["decay_shape"].default and self.decay_steps is None:
            raise ValueError(
                f"optimizer.decay_shape={self.decay_shape!r} has no effect without optimizer.decay_steps; set that "
                "too, or leave decay_shape out."
            )
        if self.schedule == "inverse_sqrt" and not self.warmup_steps:
            raise ValueError(
                "optimizer.schedule='inverse_sqrt' falls as the root of optimizer.warmup_steps / step, and "
                "optimizer.warmup_steps is 0; set it."
            )


class EvaluationConfig(Section):
    """When the validation text is scored. It is always scored at the end."""

    every_steps: PositiveInt | None = None
    """The number of steps between two evaluations. By default only the end is scored."""
    num_batches: PositiveInt | None = None
    """Score only this many batches of the validation text during training. By default all are scored, as they always
    are at the end."""
    sets: dict[str, tuple[str, ...]] = {}
    """Other texts that are scored whenever the validation text is, each by its name: files or globs of text or JSON
    Lines. data.documents and data.text_field apply to them, too. A text is scored whole, its end is not."""

    @pydantic.field_validator("sets", mode="before", json_schema_input_type=dict[str, str | tuple[str, ...]])
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"evaluation.sets={value!r} has no names; write evaluation.sets.NAME=FILE for each text.")
        for name, sources in value.items():
            listed = [sources] if isinstance(sources, str) else sources
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"evaluation.sets: {name!r} is not a name; use letters, digits, _ and -.")
            is_list = isinstance(listed, list | tuple) and all(isinstance(each, str) and each for each in listed)
            if not is_list or not listed:
                raise ValueError(f"evaluation.sets.{name}={sources!r} is not a file, a glob or a list of these.")
        return {name: (each,) if isinstance(each, str) else tuple(each) for name, each in value.items()}

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_batches is not None and self.every_steps is None:
            raise ValueError(
                f"evaluation.num_batches={self.num_batches} has no effect without evaluation.every_steps, because the "
                "evaluation at the end scores all batches; set evaluation.every_steps too, or leave num_batches out."
            )
        return self


class SamplesConfig(Section):
    """The text that the model writes for TensorBoard, and at the end of a run."""

    every_steps: PositiveInt | None = None
    """The number of steps between two sets of samples. By default only the end has samples."""
    prompt: str = ""
    """The text to continue."""
    samplers: Annotated[tuple[Sampler, ...], Field(min_length=1)] = ("greedy", "beam", "top-k", "top-p")
    """The samplers that write, each a text. Each compiles its own loop, before its first text."""
    num_tokens: PositiveInt | None = None
    """The most tokens to write after the prompt. By default as many as the model has positions left."""
    stop: Annotated[str, Field(min_length=1)] | None = None
    """A text that ends a sample."""
    num_beams: PositiveInt = 10
    """The number of beams of beam search."""
    top_k: PositiveInt = 10
    """The number of tokens that top-k sampling draws from, the likeliest ones."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Top-p sampling draws from the fewest tokens that together have this probability."""
    temperature: Annotated[float, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])] = 1.0
    """Divides the logits of all samplers that draw: random, top-k, top-p and min-p."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.samplers)) < len(self.samplers):
            raise ValueError(f"samples.samplers={list(self.samplers)} names a sampler twice; name each once.")
        return self


class CheckpointConfig(Section):
    """When weights and optimizer state are saved. They are always saved at the end."""

    every_steps: PositiveInt = 500
    """The number of steps between two checkpoints."""
    keep_last: PositiveInt = 3
    """The number of newest checkpoints that are kept. The one with the lowest validation loss is kept as well, and
    so is the last one before optimizer.decay_steps."""
    max_failures: PositiveInt | None = None
    """Stop the run after this many failures in a row to write a checkpoint. By default it reports each failure, trains
    on and tries again."""


class LogConfig(Section):
    """When progress is reported."""

    every_steps: PositiveInt = 50
    """The number of steps between two points of the curves in TensorBoard, and between two lines on the terminal."""
    histograms_every_steps: PositiveInt | None = None
    """The number of steps between two histograms of each weight and its gradient in TensorBoard. Each computes the
    gradients of a step once more. By default there are none."""
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Where the curves go besides TensorBoard: Weights & Biases, MLflow, trackio. Each needs its package, and is told
    where to send by its own environment variables."""

    @pydantic.field_validator("trackers")
    @classmethod
    def _check_trackers(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(trackers)) < len(trackers):
            raise ValueError(f"log.trackers={list(trackers)} names a tracker twice; leave one out.")
        return trackers


class ProfileConfig(Section):
    """Which steps are profiled, for TensorBoard."""

    at_step: PositiveInt | None = None
    """The number of steps before the profile begins. By default there is no profile."""
    num_steps: PositiveInt = 5
    """The number of steps in the profile, each in a separate call, so that they can be told apart."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.at_step is None and self.num_steps != type(self).model_fields["num_steps"].default:
            raise ValueError(
                f"profile.num_steps={self.num_steps} has no effect without profile.at_step; set that too, or leave "
                "num_steps out."
            )
        return self

    def ends(self) -> range:
        """Returns the steps after which the loop returns to Python for the profile."""
        return range(0) if self.at_step is None else range(self.at_step, self.at_step + self.num_steps + 1)


class DistributionConfig(Section):
    """The devices that the run uses. The model is the same whatever they are."""

    kind: Literal["auto", "cpu", "gpu", "multi_worker", "tpu"] = "auto"
    """auto: several workers if TF_CONFIG or SLURM names them, otherwise every GPU that TensorFlow sees, otherwise the
    CPU. auto never takes a TPU; choose tpu."""
    gpus: tuple[NonNegativeInt, ...] | None = None
    """The GPUs of this machine to use, by their numbers in TensorFlow, which begin at 0. By default all. Each of
    several workers uses all that it sees; CUDA_VISIBLE_DEVICES restricts these."""
    logical_devices: PositiveInt = 1
    """Split the CPU into this many replicas, to rehearse a run on as many accelerators."""
    shard: Literal["nothing", "optimizer", "weights"] = "nothing"
    """What is split over the replicas, instead of being held by each. optimizer: what the optimizer keeps of every
    weight; each replica updates its piece of the weights. weights: the weights too; each replica gathers those of a
    block when it computes the block."""
    shard_over: Annotated[int, Field(ge=2)] | None = None
    """Split within groups of this many neighbouring replicas, such as the GPUs of a host. Each group holds everything
    that is split, so only sums of gradients travel between groups. By default all replicas are one group."""
    tpu_name: Annotated[str, Field(min_length=1)] = "local"
    """local: the TPU of this VM. Or the grpc:// addresses of a TPU's servers, with commas. The name of a TPU in Google
    Cloud needs Google's API client, which is not installed, and is untested."""
    tpu_zone: str | None = None
    """The zone of a named TPU, such as us-central1-a. By default the zone of this machine."""
    tpu_project: str | None = None
    """The Google Cloud project of a named TPU. By default the project of this machine."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "tpu" and (self.tpu_name != "local" or self.tpu_zone or self.tpu_project):
            unset = {"tpu_name": "local", "tpu_zone": None, "tpu_project": None}
            changes = [
                f"distribution.{key}={value or 'none'}" for key, value in unset.items() if getattr(self, key) != value
            ]
            raise ValueError(
                f"distribution.tpu_name, tpu_zone and tpu_project do not go with distribution.kind={self.kind!r}; "
                f"set {' '.join(changes)}, or choose 'tpu'."
            )
        if self.logical_devices > 1 and self.kind in ("gpu", "multi_worker", "tpu"):
            raise ValueError(
                f"distribution.logical_devices={self.logical_devices} splits a CPU and does not go with "
                f"distribution.kind={self.kind!r}; set distribution.logical_devices=1, or choose 'cpu'."
            )
        if self.gpus is None:
            return self
        if not self.gpus or len(set(self.gpus)) < len(self.gpus):
            raise ValueError(
                f"distribution.gpus={list(self.gpus)} must name at least one GPU, and none twice; leave it out for all."
            )
        if self.kind in ("cpu", "tpu"):
            raise ValueError(
                f"distribution.gpus={list(self.gpus)} does not go with distribution.kind={self.kind!r}; set "
                "distribution.gpus=none, or choose 'gpu'."
            )
        if self.logical_devices > 1:
            raise ValueError(
                f"distribution.gpus={list(self.gpus)} and distribution.logical_devices={self.logical_devices}: "
                "replicas are on GPUs or on a split CPU; set distribution.gpus=none, or "
                "distribution.logical_devices=1."
            )
        return self


class Config(Section):
    """Everything that defines a run."""

    run_folder: Annotated[str, Field(min_length=1)]
    """The folder of this run: its config, tokenizer, checkpoints and logs."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = WordPieceConfig(kind="wordpiece")
    model: ModelConfig = ModelConfig()
    train: TrainConfig
    init: InitConfig = InitConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    distribution: DistributionConfig = DistributionConfig()

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.total_steps is not None:
            self.check_total_steps(self.train.total_steps, f"train.total_steps={self.train.total_steps}")
        if self.samples.num_tokens is not None and self.samples.num_tokens > self.train.sequence_length:
            raise ValueError(
                f"samples.num_tokens={self.samples.num_tokens} is more than train.sequence_length="
                f"{self.train.sequence_length}, the most positions the model has; lower it, or leave it out."
            )
        if self.data.weights is not None and self.train.total_steps is None:
            raise ValueError(
                "train.num_epochs cannot be used with data.weights, because the sources end at different times; set "
                "train.total_steps."
            )
        if self.model.document_mask and self.data.mode != "packed":
            raise ValueError(
                f"model.document_mask=true does not go with data.mode={self.data.mode!r}, where every example is one "
                "document; leave it out, or choose 'packed'."
            )
        if self.distribution.shard_over is not None and self.distribution.shard == "nothing":
            raise ValueError(
                f"distribution.shard_over={self.distribution.shard_over} has no effect with distribution.shard="
                "'nothing'; choose 'optimizer' or 'weights', or set distribution.shard_over=none."
            )
        return self

    def check_total_steps(self, total_steps: int, what: str) -> None:
        """Checks that warm-up, schedule and profile fit into a run of this length.

        Args:
            total_steps: the number of steps of the run.
            what: the setting that decides this number, for messages.

        Raises:
            UserError: the warm-up, the fall of the learning rate after it, its decay, a change of
                data.weights_from_step, the batch warm-up, or the profile does not fit.
        """
        warmup, schedule, profile = self.optimizer.warmup_steps, self.optimizer.schedule, self.profile
        if warmup > total_steps:
            raise UserError(
                f"optimizer.warmup_steps={warmup} is more than {what}; the rate would never peak. Lower it, or train "
                "longer."
            )
        peak = max(1, warmup)
        if schedule != "constant" and peak >= total_steps:
            raise UserError(
                f"optimizer.schedule={schedule!r} falls after its peak, but with "
                f"optimizer.warmup_steps={warmup} the rate reaches its peak at the last step of {what}; train longer, "
                "lower optimizer.warmup_steps, or choose optimizer.schedule='constant'."
            )
        decay = self.optimizer.decay_steps or 0
        if peak + decay > total_steps:
            raise UserError(
                f"optimizer.decay_steps={decay} of {what} leaves no step at the peak of the rate, which comes after "
                f"optimizer.warmup_steps={warmup}; it may be at most {total_steps - peak}; lower it, or train longer."
            )
        end = max(self.train.batch_warmup, default=0)
        if end >= total_steps:
            raise UserError(
                f"train.batch_warmup.{end}: the batches would not reach train.global_batch_size="
                f"{self.train.global_batch_size} within {what}; set an earlier step, or train longer."
            )
        last_change = max(self.data.weights_from_step, default=0)
        if last_change >= total_steps:
            raise UserError(
                f"data.weights_from_step.{last_change} has no effect with {what}; leave it out, or train longer."
            )
        if max(profile.ends(), default=0) > total_steps:
            raise UserError(
                f"profile.at_step={profile.at_step} and profile.num_steps={profile.num_steps} go beyond {what}; lower "
                "one of them."
            )

    def prepared_name(self) -> str:
        """Returns the name of this config's prepared data: the same for all configs that prepare text the same way."""
        what = {
            "data": self.data.model_dump(
                exclude={
                    "prepared_folder",
                    "mode",
                    "predict_end",
                    "shuffle_window_mb",
                    "weights",
                    "weights_from_step",
                }
            ),
            "tokenizer": self.tokenizer.model_dump(),
        }
        if not self.data.is_storybook():
            del what["data"]["storybook_stories"], what["data"]["storybook_seed"]
        if self.data.validation is not None:
            del what["data"]["held_out_fraction"]
        if self.data.weights is not None:
            what["data"]["is_mixture"] = True  # The shards do not depend on the weights.
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
        stem = re.sub(r"[^\w-]+", "_", Path(self.data.train[0]).name.split(".")[0])
        # File systems limit the bytes of a name, and prepare appends to this one.
        stem = stem.encode()[:_MAX_STEM_BYTES].decode(errors="ignore").strip("_") or "text"
        return f"{stem}-{digest}"

    def vocabulary_size(self) -> int | None:
        """Returns the most tokens that there can be; None if only the text or a file decides."""
        if isinstance(self.tokenizer, CharConfig | WordPieceFileConfig | BpeFileConfig | SavedTokenizerConfig):
            return None
        return self.tokenizer.vocabulary_size

    def with_micro_batch_size(self, size: int | Literal["auto"]) -> Self:
        """Returns the same config with another train.micro_batch_size."""
        return self.model_copy(update={"train": self.train.model_copy(update={"micro_batch_size": size})})

    def to_toml(self) -> str:
        """Returns the config with every default written out, as TOML that `load_config` reads back."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def examples_per_replica(config: Config, num_replicas: int) -> int:
    """Returns how many examples of a batch each replica gets: its share.

    Raises:
        UserError: the global batch cannot be divided into equal shares of whole micro-batches.
    """
    train = config.train
    size = train.fixed_micro_batch_size()
    sizes = {f"train.batch_warmup.{step}": each for step, each in train.batch_warmup.items()}
    for name, batch_size in {**sizes, "train.global_batch_size": train.global_batch_size}.items():
        if batch_size % (num_replicas * (size or 1)):
            micro = f" x train.micro_batch_size={size}" if size else ""
            way = " A run whose warm-up is over can be forked with train.batch_warmup=none." if name in sizes else ""
            raise UserError(
                f"{name}={batch_size} is not a multiple of {num_replicas} replicas{micro}; change one of them.{way}"
            )
    return train.global_batch_size // num_replicas


def num_pieces(config: Config, num_replicas: int) -> int:
    """Returns how many replicas hold together what distribution.shard splits."""
    return config.distribution.shard_over or num_replicas


def check_shard(config: Config, num_replicas: int) -> None:
    """Raises UserError if distribution.shard cannot split anything over this many replicas."""
    shard, over = config.distribution.shard, num_pieces(config, num_replicas)
    if num_replicas % over and num_replicas > 1:
        raise UserError(
            f"distribution.shard_over={over} does not divide {num_replicas} replicas into equal groups; choose a "
            "number that does, or set distribution.shard_over=none."
        )
    if shard != "nothing" and num_replicas == 1:
        raise UserError(
            f"distribution.shard={shard!r} splits over several replicas, and there is only one; choose 'nothing', or "
            "train on more devices."
        )


def check_histograms(config: Config) -> None:
    """Raises UserError if a training could not make its histograms. They do not keep a run from being scored, or from
    writing, in pieces.
    """
    if config.distribution.shard == "weights" and config.log.histograms_every_steps is not None:
        raise UserError(
            f"log.histograms_every_steps={config.log.histograms_every_steps} needs whole weights and gradients, and "
            "distribution.shard='weights' never has them; set log.histograms_every_steps=none, or choose 'optimizer'."
        )


def check_can_shard(config: Config, is_gpt: bool) -> None:
    """Raises UserError if distribution.shard cannot split the model.

    Args:
        config: the run's configuration.
        is_gpt: whether the model is trainer's own GPT.
    """
    if config.distribution.shard == "weights" and not is_gpt:
        raise UserError(
            "distribution.shard='weights' works only with trainer's own GPT, and this is another model; choose "
            "'optimizer', or 'nothing'."
        )


def divisor_of_shares(config: Config, num_replicas: int) -> int:
    """Returns the most examples that a replica's share of every batch can be divided by: its share, if all batches have
    the same size.
    """
    return math.gcd(*config.train.batch_sizes()) // num_replicas


def micro_batch_sizes(config: Config, num_replicas: int) -> list[int]:
    """Returns the micro-batches that divide a replica's share of every batch, rising."""
    share = divisor_of_shares(config, num_replicas)
    return [size for size in range(1, share + 1) if share % size == 0]
