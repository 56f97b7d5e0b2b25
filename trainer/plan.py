"""What a config costs, before any of it is spent: so far its parameters."""

import math
from collections.abc import Iterator

import rich.box
import rich.console
import rich.table

from trainer.config import CharConfig, Config, ModelConfig, UserError

Shape = tuple[int, ...]


def parameter_shapes(model: ModelConfig, vocabulary_size: int, sequence_length: int) -> Iterator[tuple[str, Shape]]:
    """Yields the path and shape of every weight of the GPT, without building it."""
    width, attention_dim = model.hidden_dim, model.num_heads * model.head_dim()
    num_logits = model.num_logits(vocabulary_size)
    yield "gpt/token_embedding/embeddings", (num_logits, width)
    if model.positions == "learned":
        yield "gpt/position_embedding/embeddings", (sequence_length, width)
    for i in range(model.num_layers):
        block = f"gpt/block_{i}"
        yield from _projection(f"{block}/query_key_value", (width, model.query_key_value_dim()), model.use_bias)
        yield from _projection(f"{block}/attention_output", (attention_dim, width), model.use_bias)
        yield from _norm(f"{block}/attention_norm", model)
        yield from _projection(f"{block}/intermediate", (width, model.intermediate_projection_dim()), model.use_bias)
        yield from _projection(f"{block}/output", (model.intermediate_dim, width), model.use_bias)
        yield from _norm(f"{block}/feedforward_norm", model)
    if model.pre_norm:
        yield from _norm("gpt/final_norm", model)
    if not model.tied_embeddings:
        yield "gpt/unembedding/kernel", (num_logits, width)
        if model.use_bias:
            yield "gpt/unembedding/bias", (num_logits,)


def print_plan(config: Config, vocabulary_size: int | None) -> None:
    """Prints the parameter table of a config.

    Args:
        config: of the run.
        vocabulary_size: in place of the config's own.

    Raises:
        UserError: neither says it, or it is impossible.
    """
    vocabulary_size = config.vocabulary_size() if vocabulary_size is None else vocabulary_size
    if vocabulary_size is None:
        where, example = "tokenizer.path", "GPT-2: 50257"
        if isinstance(config.tokenizer, CharConfig):
            where, example = "the text", "English in plain characters: about 100"
        raise UserError(
            f"tokenizer.kind={config.tokenizer.kind!r} takes its vocabulary from {where}, which plan does not read; "
            f"give --vocabulary-size ({example})."
        )
    if vocabulary_size < 1:
        raise UserError(f"--vocabulary-size {vocabulary_size} must be at least 1.")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_footer=True)
    shapes = list(parameter_shapes(config.model, vocabulary_size, config.train.sequence_length))
    total = sum(math.prod(shape) for _, shape in shapes)
    table.add_column("weight", footer="all")
    table.add_column("shape", justify="right")
    table.add_column("parameters", justify="right", footer=f"{total:,}")
    table.add_column("share", justify="right")
    for path, shape in shapes:
        size = math.prod(shape)
        table.add_row(path, " x ".join(map(str, shape)), f"{size:,}", f"{size / total:.1%}")
    console = rich.console.Console()
    console.print(table)
    console.print(f"vocabulary {vocabulary_size:,}, sequence length {config.train.sequence_length:,}", highlight=False)


def _projection(path: str, shape: Shape, use_bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{path}/kernel", shape
    if use_bias:
        yield f"{path}/bias", shape[-1:]


def _norm(path: str, model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    yield f"{path}/gamma", (model.hidden_dim,)
    if model.use_bias:
        yield f"{path}/beta", (model.hidden_dim,)
