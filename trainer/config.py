"""The settings of a run and their checks: frozen, strict models, one class for each section of the TOML file.

Every check that needs neither data nor a device is made here or in config_file.py, before TensorFlow is imported. Each
default has its one home in a class below. Where a setting has a counterpart in the tutorial, the default is the
tutorial's. config_file.py reads files and overrides into these models.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
import tomli_w
from pydantic import Discriminator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Tag
from pydantic_core import PydanticCustomError

from trainer.errors import UserError

# Of so many examples in a row, each source of data.weights has exactly its share.
MIXTURE_EXAMPLES = 1024
STORYBOOK_SOURCE = "storybook"
# One for each byte, for padding and for what begins a document.
MIN_BPE_TOKENS = 258
# Below it the likeliest token is certain, above it all are as likely, and float32 comes to its ends.
TEMPERATURES = (1e-6, 1e6)
_MAX_STEM_BYTES = 100

Fraction = Annotated[float, Field(gt=0, lt=1)]
# The largest number below 1 that 32 bits hold: what is nearer to 1 would be read as 1.
BelowOne = Annotated[float, Field(ge=0, le=1 - 2.0**-24)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(pydantic.BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @pydantic.field_validator("*")
    @classmethod
    def _check_size_of_numbers(cls, value: Any) -> Any:
        """Refuses numbers that the training would read as others: 1e39 as infinite, 1e-50 as 0."""
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) >= 2**63:
                raise PydanticCustomError("size", "input should be less than 2**63, to fit 64 bits")
            if isinstance(number, float) and number and not 2.0**-126 <= abs(number) < 2.0**128:
                raise PydanticCustomError("size", "input should be 0 or from 1.2e-38 to 3.4e+38, to fit 32 bits")
        return value


class DataConfig(Section):
    """Where the text comes from and how it is cut into training examples."""

    train: tuple[str, ...] = (STORYBOOK_SOURCE,)
    """Files or globs of UTF-8 text or JSON Lines (.jsonl, .ndjson, .jsonlines or .json), plain or packed with gzip, on
    a disk or in an object store (gs://...); splits of tensorflow-datasets, as tfds:imdb_reviews:train[:90%]; or
    "storybook", the built-in source."""
    validation: tuple[str, ...] | None = None
    """Like train. Left out, part of the training text is held out."""
    documents: Literal["line", "paragraph", "file", "auto"] = "line"
    """What one document is in a text file: a line, a block between blank lines, or the whole file; auto: a block if the
    first text file has a blank line for every 20 lines or more often, otherwise a line. A record of JSON Lines
    or of tensorflow-datasets is one; setting this is refused if no source is a text file, except to auto."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """The field of JSON Lines, or the feature of a tensorflow-datasets split, that holds a document; refused if no
    source is one of these."""
    max_broken_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the documents that may be broken (not UTF-8, not JSON, without the text) and is left out; with 0 the
    first one is an error."""
    min_bytes: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Only documents of more UTF-8 bytes than this are used."""
    held_out_fraction: Fraction = 0.01
    """Share of the text held out when validation is left out: documents picked by their hash, or the tail of each file
    where a document is a file."""
    mode: Literal["lines", "packed"] = "packed"
    """packed: documents are joined by [BOS] and cut into full windows, so that every token is used. lines: each example
    is one document, cut or padded to train.sequence_length."""
    predict_end: bool = True
    """With data.mode="lines": the model also learns where a document ends, from the [BOS] after each document that fits
    into train.sequence_length. false is the tutorial's recipe, whose models do not stop at the end of a document."""
    weights: tuple[PositiveFloat, ...] | None = None
    """How often an example comes from each of data.train, relative to the others; data.validation, where it is given,
    names one source for each of them, and each is scored by itself as well. Left out, data.train is one text."""
    shuffle_window_mb: PositiveInt | None = None
    """For data that no host's memory holds: blocks of 8 MB are read in a shuffled order, and the examples of so many
    megabytes of them are shuffled together. Left out, every example may come anywhere in an epoch."""
    storybook_stories: PositiveInt = 40_000
    """How many stories the built-in source tells, held-out ones included."""
    storybook_seed: Seed = 0
    """Other seed, other stories."""
    prepared_folder: Annotated[str, Field(min_length=1)] = "prepared"
    """Folder that keeps prepared data sets, each in a folder of its own."""

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

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        for key in ("train", "validation"):
            sources = getattr(self, key)
            if sources is not None and len(sources) != len(weights):
                raise ValueError(
                    f"data.weights={list(weights)} are {len(weights)}, and data.{key} names {len(sources)} sources; "
                    "give as many, or leave out data.weights."
                )
        if min(weights) * MIXTURE_EXAMPLES < sum(weights):
            raise ValueError(
                f"data.weights={list(weights)}: the smallest must be at least a {MIXTURE_EXAMPLES}th of their sum."
            )
        if self.shuffle_window_mb is not None:
            raise ValueError("data.shuffle_window_mb does not go with data.weights; leave out one of them.")

    def sources(self) -> "tuple[DataConfig, ...]":
        """Returns the settings of each source that is mixed by data.weights; without these, of the only one."""
        if self.weights is None:
            return (self,)
        validation = [None] * len(self.train) if self.validation is None else [(each,) for each in self.validation]
        return tuple(
            self.model_copy(update={"train": (train,), "validation": each, "weights": None})
            for train, each in zip(self.train, validation, strict=True)
        )

    def is_storybook(self) -> bool:
        """Whether the text is the built-in storybook's."""
        return self.train == (STORYBOOK_SOURCE,)


class WordPieceConfig(Section):
    """A WordPiece vocabulary trained on the text, with the tutorial's settings."""

    kind: Literal["wordpiece"]
    vocabulary_size: Annotated[int, Field(ge=4)] = 5000
    """Tokens in the vocabulary, the special ones included; fewer where the text has no more to offer."""
    lowercase: bool = True
    """Fold case before splitting words."""
    sample_bytes: PositiveInt = 20_000_000
    """How much text the vocabulary is trained on at most. Every character of the text gets a token all the same."""


class WordPieceFileConfig(Section):
    """A WordPiece vocabulary that is there already, such as BERT's."""

    kind: Literal["wordpiece"]
    path: Annotated[str, Field(min_length=1)]
    """A vocab.txt, or the tokenizer.json of Hugging Face; words are split with the tutorial's settings all the same."""
    lowercase: bool = True
    """Fold case before splitting words; as the vocabulary was made."""


class BpeConfig(Section):
    """A byte-level BPE vocabulary trained on the text, which is split into words as GPT-2's."""

    kind: Literal["bpe"]
    # Twice as many make Korean 9% and English 4% shorter.
    vocabulary_size: Annotated[int, Field(ge=MIN_BPE_TOKENS)] = 16_384
    """Tokens in the vocabulary at most, the special ones and one for each byte included. A small text makes fewer: only
    what comes several times in it becomes a token."""
    sample_bytes: PositiveInt = 20_000_000
    """How much text the vocabulary is trained on at most."""


class BpeFileConfig(Section):
    """A byte-level BPE vocabulary that is there already, such as GPT-2's."""

    kind: Literal["bpe"]
    path: Annotated[str, Field(min_length=1)]
    """A tokenizer.json of Hugging Face."""


class CharConfig(Section):
    """One token per character of the text."""

    kind: Literal["char"]


class ByteConfig(Section):
    """One token per UTF-8 byte."""

    kind: Literal["byte"]
    vocabulary_size: ClassVar[int] = 256 + 2  # Padding and what begins a document.


def tokenizer_tag(settings: Any) -> str | None:
    """Returns which member of the union below a tokenizer's settings are: as read, or as a section to be written."""
    if isinstance(settings, Section):
        settings = {name: getattr(settings, name) for name in type(settings).model_fields}
    if not isinstance(settings, dict):
        return "wordpiece"  # Which refuses what is no section.
    kind = settings.get("kind")
    if not isinstance(kind, str):
        return None
    return f"{kind} file" if kind in ("wordpiece", "bpe") and "path" in settings else kind


TokenizerConfig = Annotated[
    Annotated[WordPieceConfig, Tag("wordpiece")]
    | Annotated[WordPieceFileConfig, Tag("wordpiece file")]
    | Annotated[BpeConfig, Tag("bpe")]
    | Annotated[BpeFileConfig, Tag("bpe file")]
    | Annotated[CharConfig, Tag("char")]
    | Annotated[ByteConfig, Tag("byte")],
    Discriminator(tokenizer_tag),
]


class ModelConfig(Section):
    """The shape of the GPT; the defaults are the tutorial's model."""

    num_layers: Annotated[int, Field(ge=1, le=10_000)] = 2
    """Transformer blocks."""
    num_heads: PositiveInt = 3
    """Attention heads per block; each is hidden_dim // num_heads wide."""
    num_key_value_heads: PositiveInt | None = None
    """Heads that keys and values have, each for as many attention heads: fewer make a smaller cache to write text with.
    Left out, num_heads."""
    hidden_dim: PositiveInt = 256
    """Width of the embeddings and of every block."""
    intermediate_dim: PositiveInt = 256
    """Width of the feed-forward layer."""
    activation: Literal["relu", "gelu", "swiglu"] = "relu"
    """Of the feed-forward layer; gelu is the exact one, with the error function. swiglu multiplies the layer by a gate,
    which takes half as many weights again for the same intermediate_dim."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalize by mean and variance, or by the root mean square alone."""
    positions: Literal["learned", "rope"] = "learned"
    """An embedding of each position, or queries and keys turned by an angle that grows with it."""
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    """Of rope: the larger, the slower the slowest turns; long sequences want more."""
    pre_norm: bool = False
    """Normalize before attention and feed-forward, and once at the end, rather than after each sum."""
    tied_embeddings: bool = False
    """Use the token embedding as output projection too, without a bias."""
    use_bias: bool = True
    """Biases in projections and normalizations."""
    dropout: BelowOne = 0.0
    """Share of activations dropped after attention, feed-forward and, with pre_norm, the embeddings."""
    vocabulary_multiple: PositiveInt = 1
    """Rows of the embedding and of the logits are rounded up to a multiple of this; 128 fills a TPU's tiles. The rows
    beyond the vocabulary are trained as tokens that never come, and never written."""
    document_mask: bool = False
    """With packed data: a token attends to those of its own document alone, and positions count from its start."""

    def head_dim(self) -> int:
        """Returns the width of one attention head."""
        return self.hidden_dim // self.num_heads

    def key_value_heads(self) -> int:
        """Returns how many heads keys and values have."""
        return self.num_key_value_heads or self.num_heads

    def query_key_value_dim(self) -> int:
        """Returns the width of queries, keys and values of all heads together."""
        return (self.num_heads + 2 * self.key_value_heads()) * self.head_dim()

    def intermediate_projection_dim(self) -> int:
        """Returns the width that the feed-forward layer is projected to: swiglu's gate is made along with it."""
        return 2 * self.intermediate_dim if self.activation == "swiglu" else self.intermediate_dim

    def num_logits(self, vocabulary_size: int) -> int:
        """Returns the rows of the embedding and of the logits for so many tokens."""
        return -(-vocabulary_size // self.vocabulary_multiple) * self.vocabulary_multiple

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads > self.hidden_dim:
            raise ValueError(
                f"model.num_heads={self.num_heads} is more than model.hidden_dim={self.hidden_dim}; "
                "a head needs a width of at least 1."
            )
        if self.num_heads % self.key_value_heads():
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_key_value_heads="
                f"{self.num_key_value_heads}, of which each serves as many; change either."
            )
        if self.positions == "rope" and self.head_dim() % 2:
            raise ValueError(
                "model.positions='rope' turns pairs of a head's numbers, of which model.hidden_dim="
                f"{self.hidden_dim} // model.num_heads={self.num_heads} leaves {self.head_dim()}; change either for an "
                "even number."
            )
        if self.positions != "rope" and self.rope_theta != type(self).model_fields["rope_theta"].default:
            raise ValueError(
                f"model.rope_theta={self.rope_theta} has no effect with model.positions={self.positions!r}; choose "
                "'rope', or leave it out."
            )
        return self


class TrainConfig(Section):
    """Batches, length and arithmetic of the training."""

    precision: Literal["float32", "mixed_bfloat16", "mixed_float16", "float64"]
    """A Keras dtype policy. Both mixed ones keep float32 weights. mixed_bfloat16 is fast on TPUs, on GPUs since Ampere
    and on CPUs that multiply bfloat16 (Intel's with AMX, AMD's since Zen 4); on other CPUs the GPT trains in float32
    instead, unless XLA compiles the step: from embeddings that are rounded, and as fast as in float32. mixed_float16,
    with a loss scale, is for older GPUs."""
    total_steps: PositiveInt | None = None
    """Optimizer steps to train for; this or num_epochs."""
    num_epochs: PositiveInt | None = None
    """Passes over the training examples; this or total_steps."""
    global_batch_size: PositiveInt = 64
    """Examples per step over all replicas."""
    micro_batch_size: PositiveInt | Literal["auto"] | None = None
    """Examples a replica works through at a time: fewer need less memory, and a step's gradients are added up before
    the optimizer sees them. Left out, all of its share at once, or on a CPU in two halves; auto: that, or the largest
    part that fits the device, which is tried out and written into the run's own config."""
    sequence_length: Annotated[int, Field(ge=2)] = 128
    """Tokens per example."""
    steps_per_call: PositiveInt = 50
    """Steps that run in one call of the compiled loop, without coming back to Python."""
    xla: Literal["auto", "on", "off"] = "auto"
    """Compile each replica's forward and backward pass with XLA; auto: on GPUs, where it pays. Where a CPU is all there
    is, normalizations and activations but relu are compiled in any case."""
    recompute: Literal["auto", "nothing", "attention", "blocks"] = "auto"
    """What the backward pass computes again instead of keeping it: the probabilities of attention, for a sixth of its
    products more, and what activations return; or all of a transformer block but its input, for the whole forward pass
    once more. auto: on accelerators attention, on a CPU nothing."""
    z_loss: NonNegativeFloat = 0.0
    """Trains for this times log(sum(exp(logits)))**2 of each target as well, which keeps logits from drifting. The loss
    that is reported stays without it."""
    seed: Seed = 0
    """Of the initial weights, the order of the examples and the dropout masks."""

    def steps_for(self, num_examples: int) -> int:
        """Returns the steps of the run: total_steps, or what num_epochs take of so many examples, rounded up."""
        if self.total_steps is not None:
            return self.total_steps
        assert self.num_epochs is not None  # The check below sees to it that one of the two is set.
        return -(-num_examples * self.num_epochs // self.global_batch_size)

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
                f"{self.micro_batch_size}; change either."
            )
        return self

    def fixed_micro_batch_size(self) -> int | None:
        """Returns micro_batch_size where it is a number; None where the device decides."""
        return None if self.micro_batch_size == "auto" else self.micro_batch_size


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule; the defaults are the tutorial's Adam."""

    learning_rate: PositiveFloat = 1e-3
    """The peak, reached after warmup_steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes from learning_rate to final_learning_rate at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the rate rises linearly to learning_rate."""
    final_learning_rate: NonNegativeFloat = 0.0
    """The rate at the last step; not used by a constant schedule."""
    beta_1: BelowOne = 0.9
    """Decay of the mean of the gradients."""
    beta_2: BelowOne = 0.999
    """Decay of the mean of their squares."""
    epsilon: PositiveFloat = 1e-7
    """Added to the root of the mean square."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay of matrices and embeddings; biases and normalizations are left alone."""
    clip_norm: PositiveFloat | None = None
    """Largest global norm of the gradient; left out, it is not clipped."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.schedule == "constant" and self.final_learning_rate:
            raise ValueError(
                f"optimizer.final_learning_rate={self.final_learning_rate} has no effect with "
                "optimizer.schedule='constant'; choose 'linear' or 'cosine', or leave it out."
            )
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"optimizer.final_learning_rate={self.final_learning_rate} is above "
                f"optimizer.learning_rate={self.learning_rate}; the schedule only falls."
            )
        return self


class EvaluationConfig(Section):
    """When the validation text is scored; it always is at the end."""

    every_steps: PositiveInt | None = None
    """Left out, only at the end."""
    num_batches: PositiveInt | None = None
    """Score only that many batches during training; left out, all. The last evaluation always scores all."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_batches is not None and self.every_steps is None:
            raise ValueError(
                f"evaluation.num_batches={self.num_batches} has no effect without evaluation.every_steps, because the "
                "evaluation at the end scores all; set that too, or leave num_batches out."
            )
        return self


class SamplesConfig(Section):
    """What the model is asked to write for TensorBoard and at the end of a run."""

    every_steps: PositiveInt | None = None
    """Left out, only at the end."""
    prompt: str = ""
    """Text to continue."""
    num_tokens: PositiveInt | None = None
    """Tokens to write after the prompt; left out, up to the model's last position."""
    stop: Annotated[str, Field(min_length=1)] | None = None
    """Text that ends a sample."""
    num_beams: PositiveInt = 10
    """Of beam search."""
    top_k: PositiveInt = 10
    """Of top-k sampling."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of top-p sampling."""
    temperature: Annotated[float, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])] = 1.0
    """Divides the logits of top-k and top-p sampling."""


class CheckpointConfig(Section):
    """When weights and optimizer state are written; they always are at the end."""

    every_steps: PositiveInt = 500
    """Steps between two checkpoints."""
    keep_last: PositiveInt = 3
    """How many of the newest are kept. The one with the lowest validation loss is kept besides."""
    max_failures: PositiveInt | None = None
    """End the run once writing has failed this many times in a row; left out, it trains on, says so and tries again."""


class LogConfig(Section):
    """When progress is reported."""

    every_steps: PositiveInt = 50
    """Steps between two points of the curves in TensorBoard and two lines on the terminal."""


class ProfileConfig(Section):
    """Which steps are profiled, for TensorBoard."""

    at_step: PositiveInt | None = None
    """Steps taken before the profile begins; left out, there is none."""
    num_steps: PositiveInt = 5
    """Steps in the profile, each in a call of its own, so that they can be told apart."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.at_step is None and self.num_steps != type(self).model_fields["num_steps"].default:
            raise ValueError(
                f"profile.num_steps={self.num_steps} has no effect without profile.at_step; set that too, or leave "
                "num_steps out."
            )
        return self

    def ends(self) -> range:
        """Returns after which steps the loop comes back for the profile: before its first step, and after each."""
        return range(0) if self.at_step is None else range(self.at_step, self.at_step + self.num_steps + 1)


class DistributionConfig(Section):
    """The devices the run uses. The model comes out the same whatever they are."""

    kind: Literal["auto", "cpu", "gpu", "multi_worker", "tpu"] = "auto"
    """auto: several workers where TF_CONFIG or SLURM names them, else every GPU that TensorFlow sees, else the CPU. A
    TPU is never taken unasked."""
    gpus: tuple[NonNegativeInt, ...] | None = None
    """Which GPUs of this machine to use, by the numbers that TensorFlow gives them from 0 on; left out, all. Of several
    workers each uses all that it sees, which CUDA_VISIBLE_DEVICES narrows."""
    logical_devices: PositiveInt = 1
    """Splits the CPU into this many replicas, to rehearse what a run on as many accelerators would do."""
    tpu_name: Annotated[str, Field(min_length=1)] = "local"
    """Of the TPU: local on a TPU VM, or the name of one in Google Cloud."""
    tpu_zone: str | None = None
    """Of a TPU with a name, such as us-central1-a; left out, that of this machine."""
    tpu_project: str | None = None
    """Google Cloud project of a TPU with a name; left out, that of this machine."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "tpu" and (self.tpu_name != "local" or self.tpu_zone or self.tpu_project):
            raise ValueError(
                f"distribution.tpu_name, tpu_zone and tpu_project do not go with distribution.kind={self.kind!r}; "
                "leave them out, or choose 'tpu'."
            )
        if self.logical_devices > 1 and self.kind in ("gpu", "multi_worker", "tpu"):
            raise ValueError(
                f"distribution.logical_devices={self.logical_devices} splits a CPU and does not go with "
                f"distribution.kind={self.kind!r}; leave it out, or choose 'cpu'."
            )
        if self.gpus is None:
            return self
        if not self.gpus or len(set(self.gpus)) < len(self.gpus):
            raise ValueError(
                f"distribution.gpus={list(self.gpus)} must name at least one GPU, and none twice; leave it out for all."
            )
        if self.kind in ("cpu", "tpu"):
            raise ValueError(
                f"distribution.gpus={list(self.gpus)} does not go with distribution.kind={self.kind!r}; leave it out, "
                "or choose 'gpu'."
            )
        if self.logical_devices > 1:
            raise ValueError(
                f"distribution.gpus={list(self.gpus)} and distribution.logical_devices={self.logical_devices}: "
                "replicas are on GPUs or on a split CPU; leave out one of the two."
            )
        return self


class Config(Section):
    """Everything that defines a run."""

    run_folder: Annotated[str, Field(min_length=1)]
    """Folder of this run: config, tokenizer, checkpoints and logs."""
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = WordPieceConfig(kind="wordpiece")
    model: ModelConfig = ModelConfig()
    train: TrainConfig
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
                "train.num_epochs does not go with data.weights, by which the sources end at different times; set "
                "train.total_steps."
            )
        if self.model.document_mask and self.data.mode != "packed":
            raise ValueError(
                f"model.document_mask=true does not go with data.mode={self.data.mode!r}, where every example is one "
                "document; leave it out, or choose 'packed'."
            )
        return self

    def check_total_steps(self, total_steps: int, what: str) -> None:
        """Checks what has to fit into a run of this length.

        Args:
            total_steps: of the run.
            what: the setting that it follows from, for messages.

        Raises:
            UserError: the warm-up, what the schedule does after it, or the profile does not fit.
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
                f"optimizer.schedule={schedule!r} ends at optimizer.final_learning_rate, but with "
                f"optimizer.warmup_steps={warmup} the last step of {what} is the one at the peak; train longer, lower "
                "optimizer.warmup_steps, or choose optimizer.schedule='constant'."
            )
        if max(profile.ends(), default=0) > total_steps:
            raise UserError(
                f"profile.at_step={profile.at_step} and profile.num_steps={profile.num_steps} go beyond {what}; lower "
                "one of them."
            )

    def prepared_name(self) -> str:
        """Returns the name of this config's prepared data: one for all configs that prepare the same way."""
        what = {
            "data": self.data.model_dump(
                exclude={"prepared_folder", "mode", "predict_end", "shuffle_window_mb", "weights"}
            ),
            "tokenizer": self.tokenizer.model_dump(),
        }
        if not self.data.is_storybook():
            del what["data"]["storybook_stories"], what["data"]["storybook_seed"]
        if self.data.validation is not None:
            del what["data"]["held_out_fraction"]
        if self.data.weights is not None:
            what["data"]["is_mixture"] = True  # Whatever the weights, the shards are the same.
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
        stem = re.sub(r"[^\w-]+", "_", Path(self.data.train[0]).name.split(".")[0])
        # File systems count a name in bytes, and prepare adds to this one.
        stem = stem.encode()[:_MAX_STEM_BYTES].decode(errors="ignore").strip("_") or "text"
        return f"{stem}-{digest}"

    def vocabulary_size(self) -> int | None:
        """Returns how many tokens there are at most; None where only the text or a file tells."""
        if isinstance(self.tokenizer, CharConfig | WordPieceFileConfig | BpeFileConfig):
            return None
        return self.tokenizer.vocabulary_size

    def with_micro_batch_size(self, size: int | Literal["auto"]) -> Self:
        """Returns the same config but for train.micro_batch_size."""
        return self.model_copy(update={"train": self.train.model_copy(update={"micro_batch_size": size})})

    def to_toml(self) -> str:
        """Returns the config with every default written out, as TOML that `load_config` reads back."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def examples_per_replica(config: Config, num_replicas: int) -> int:
    """Returns how many examples of a batch each replica gets.

    Raises:
        UserError: that is not a whole number, or not one of micro-batches.
    """
    train = config.train
    rows, rest = divmod(train.global_batch_size, num_replicas)
    size = train.fixed_micro_batch_size()
    if rest or rows % (size or 1):
        micro = f" x train.micro_batch_size={size}" if size else ""
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of {num_replicas} replicas{micro}; "
            "change one of them."
        )
    return rows
