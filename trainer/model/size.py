"""The size of a GPT by its config: its weights, the operations of a token, and the speed that a device allows.

Arithmetic without TensorFlow, so that `trainer plan` answers fast.
"""

import math
from collections.abc import Iterator

from trainer.config.settings import Config, ModelConfig
from trainer.execution import COMPUTE_DTYPES
from trainer.hardware.devices import Target

Shape = tuple[int, ...]


def parameter_shapes(model: ModelConfig, vocabulary_size: int, sequence_length: int) -> Iterator[tuple[str, Shape]]:
    """Yields the path and shape of every weight of the GPT, without building it."""
    width, attention_dim = model.hidden_dim, model.num_heads * model.head_width()
    num_logits, biases = model.num_logits(vocabulary_size), model.biases()
    yield "gpt/token_embedding/embeddings", (num_logits, width)
    if model.positions == "learned":
        yield "gpt/position_embedding/embeddings", (sequence_length, width)
    for i in range(model.num_layers):
        block = f"gpt/block_{i}"
        yield from _projection(
            f"{block}/query_key_value", (width, model.query_key_value_dim()), "query_key_value" in biases
        )
        if model.qk_norm:
            yield f"{block}/query_norm/gamma", (model.head_width(),)
            yield f"{block}/key_norm/gamma", (model.head_width(),)
        yield from _projection(f"{block}/attention_output", (attention_dim, width), "attention_output" in biases)
        yield from _norm(f"{block}/attention_norm", model)
        has_bias = "feedforward" in biases
        yield from _projection(f"{block}/intermediate", (width, model.intermediate_projection_dim()), has_bias)
        yield from _projection(f"{block}/output", (model.intermediate_dim, width), has_bias)
        yield from _norm(f"{block}/feedforward_norm", model)
    if model.pre_norm:
        yield from _norm("gpt/final_norm", model)
    if not model.tied_embeddings:
        yield "gpt/unembedding/kernel", (num_logits, width)
        if "unembedding" in biases:
            yield "gpt/unembedding/bias", (num_logits,)


def matrix_widths(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the paths of the matrices inside the blocks of the GPT, each with the widths of its parts: matrices that
    are side by side in one product, such as those that make queries, keys and values.
    """
    keys = model.key_value_heads() * model.head_width()
    num_parts = model.intermediate_projection_dim() // model.intermediate_dim  # Two if there is a gate.
    widths = {
        "query_key_value": (model.num_heads * model.head_width(), keys, keys),
        "attention_output": (model.hidden_dim,),
        "intermediate": (model.intermediate_dim,) * num_parts,
        "output": (model.hidden_dim,),
    }
    return {f"gpt/block_{i}/{layer}/kernel": each for i in range(model.num_layers) for layer, each in widths.items()}


def parts_of_matrices(model: ModelConfig) -> Iterator[tuple[int, int]]:
    """Yields the rows and columns of each part of the matrices of `matrix_widths`."""
    rows_of = {path: shape[0] for path, shape in parameter_shapes(model, 1, 1)}
    for path, widths in matrix_widths(model).items():
        yield from ((rows_of[path], width) for width in widths)


def count_parameters(config: Config, vocabulary_size: int) -> int:
    """Returns how many numbers a model learns."""
    shapes = parameter_shapes(config.model, vocabulary_size, config.train.sequence_length)
    return sum(math.prod(shape) for _, shape in shapes)


def optimizer_numbers(config: Config, vocabulary_size: int) -> int:
    """Returns how many numbers the optimizer keeps: AdamW's two moments of each weight. Muon keeps one momentum of the
    weights in its matrices instead.
    """
    of_muon = sum(map(math.prod, parts_of_matrices(config.model))) if config.optimizer.kind == "muon" else 0
    return 2 * count_parameters(config, vocabulary_size) - of_muon


def bytes_of_checkpoint(config: Config, vocabulary_size: int) -> float:
    """Returns the size of a checkpoint: the weights, what the optimizer keeps, and the average of the weights if there
    is one.
    """
    num_copies = 1 + (config.optimizer.ema_decay is not None)
    numbers = num_copies * count_parameters(config, vocabulary_size) + optimizer_numbers(config, vocabulary_size)
    return float(numbers) * (8 if config.train.precision == "float64" else 4)


def num_checkpoints(config: Config) -> int:
    """Returns the most checkpoints that a run has on disk at a time."""
    # A new checkpoint is written before the oldest is removed, and the best one that was scored is kept as well, and so
    # is the one before the decay of the learning rate.
    has_best, has_decay = config.evaluation.every_steps is not None, config.optimizer.decay_steps is not None
    return config.checkpoint.keep_last + 1 + has_best + has_decay


def matrix_parameters(config: Config, vocabulary_size: int) -> int:
    """Returns how many weights every token is multiplied by: the matrices of the blocks and of the output projection,
    which may be the token embedding. Embeddings that are looked up, biases and normalizations do not count.
    """
    shapes = parameter_shapes(config.model, vocabulary_size, config.train.sequence_length)
    tied = "gpt/token_embedding/embeddings" if config.model.tied_embeddings else ""
    return sum(math.prod(shape) for path, shape in shapes if path.endswith("/kernel") or path == tied)


def flops_per_token(config: Config, vocabulary_size: int) -> float:
    """Returns the operations that a token costs in training: 6 N + 12 layers heads head_dim sequence_length.

    N is `matrix_parameters`. Each weight costs a multiplication and an addition forward, and twice that backward. So do
    the scores of a query with all sequence_length keys, and the mix of their values. The causal mask makes half of
    these needless, and is ignored, as is usual. What the backward pass computes again is not counted again.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    model = config.model
    attention = model.num_layers * model.num_heads * model.head_width() * config.train.sequence_length
    return 6.0 * matrix_parameters(config, vocabulary_size) + 12.0 * attention


def tokens_per_sec_at_peak(config: Config, vocabulary_size: int, target: Target) -> float | None:
    """Returns the tokens per second at a model FLOPs utilisation of 1, which no training comes near. The utilisation of
    a training is its own tokens per second divided by these. None if the peak is not known, as for a CPU or float64.
    """
    peak = target.device.flops.get(COMPUTE_DTYPES[config.train.precision])
    return None if peak is None else target.num_devices * peak / flops_per_token(config, vocabulary_size)


def _projection(path: str, shape: Shape, has_bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{path}/kernel", shape
    if has_bias:
        yield f"{path}/bias", shape[-1:]


def _norm(path: str, model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    yield f"{path}/gamma", (model.hidden_dim,)
    if "norm" in model.biases():
        yield f"{path}/beta", (model.hidden_dim,)
