"""Laws of the two passes of a block whose weights are not kept between them."""

import collections
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.distributed.collectives import in_a_function
from trainer.execution import resolve
from trainer.hardware.processor import processor
from trainer.model.block import Block
from trainer.model.dropout import DropoutDraw
from trainer.model.gpt import GPT
from trainer.model.held import Held, RunBlock
from trainer.model.ops import make_ops
from trainer.training.passes import BlockPasses, passes_that_compute_again, passes_that_keep

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"dropout": 0.3},
    "llama": {
        "pre_norm": True,
        "use_bias": False,
        "norm": "rms",
        "positions": "rope",
        "num_key_value_heads": 1,
        "activation": "swiglu",
        "qk_norm": True,
    },
}
PRODUCTS = ("MatMul", "BatchMatMulV2", "Einsum")
SEQUENCE = 6


class Watched(Held):
    """Holds weights as usual, and remembers how blocks are run."""

    def blocks(self, blocks, run, x, recomputes):
        self.block, self.run, self.x = blocks[0], run, x
        return super().blocks(blocks, run, x, recomputes)


def made(name: str, changed: dict[str, Any] | None = None, **train: object) -> tuple[Block, RunBlock, tf.Tensor]:
    """Returns a block with random weights, what runs it in a training step, and what it reads."""
    shape = {"num_layers": 1, "num_heads": 2, "hidden_dim": 12, "intermediate_dim": 20}
    train = {"precision": "float64", "global_batch_size": 4, "sequence_length": SEQUENCE, "total_steps": 1, **train}
    config = tiny_config(model=shape | MODELS[name] | (changed or {}), train=train)
    model, random = GPT(config.model, 17, SEQUENCE, dtype=config.train.precision), np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(random.normal(size=variable.shape))
    held, tokens = Watched(), random.integers(0, 17, [4, SEQUENCE]).astype(np.int32)
    draw = DropoutDraw(*(tf.constant(each, tf.int64) for each in (1, 2, 3)))
    model._read(tokens, draw, make_ops(resolve(config, processor("CPU"), 1)), held)
    return held.block, held.run, held.x


def results(passes: BlockPasses, x: tf.Tensor, weights: list[tf.Tensor], is_compiled: bool) -> list[np.ndarray]:
    forward, backward = (in_a_function(each, is_compiled) for each in (passes.forward, passes.backward))
    place, upstream = tf.constant(0), tf.reverse(x, [0])
    result, *handed_over = forward(place, x, *weights)
    assert [tf.TensorSpec(each.shape, each.dtype) for each in handed_over] == list(passes.handed_over)
    return [each.numpy() for each in (result, *backward(place, upstream, x, *handed_over, *weights))]


def kept(block: Block, run: RunBlock, x: tf.Tensor, is_compiled: bool) -> BlockPasses:
    weights = [tf.TensorSpec(each.shape, each.dtype) for each in block.trainable_variables]
    return passes_that_keep(block, run, tf.TensorSpec(x.shape, x.dtype), weights, is_compiled)


@pytest.mark.parametrize("xla", ["off", "on"])
@pytest.mark.parametrize("recompute", ["nothing", "attention"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_gives_the_gradients_of_what_is_computed_again(name: str, recompute: str, xla: str):
    block, run, x = made(name, recompute=recompute, xla=xla)
    weights = [tf.convert_to_tensor(each) for each in block.trainable_variables]
    again = results(passes_that_compute_again(block, run), x, weights, xla == "on")
    keeping = results(kept(block, run, x, xla == "on"), x, weights, xla == "on")
    assert len(again) == 2 + len(weights) and all(np.any(each) for each in again)
    for one, other in zip(keeping, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def num_products(function: object, *arguments: tf.Tensor) -> int:
    graph = tf.function(function, autograph=False).get_concrete_function(*arguments).graph
    count = collections.Counter(op.type for op in graph.get_operations())
    return sum(count[each] for each in PRODUCTS)


@pytest.mark.parametrize("xla", ["off", "on"])
@pytest.mark.parametrize("name", MODELS)
def test_no_product_is_computed_again_and_no_weight_is_handed_over(name: str, xla: str):
    block, run, x = made(name, recompute="nothing", xla=xla)
    weights = [tf.convert_to_tensor(each) for each in block.trainable_variables]
    keeps, again = kept(block, run, x, xla == "on"), passes_that_compute_again(block, run)
    handed_over = [tf.zeros(each.shape, each.dtype) for each in keeps.handed_over]
    forward = num_products(keeps.forward, tf.constant(0), x, *weights)
    assert forward == num_products(again.forward, tf.constant(0), x, *weights) > 0
    backward = num_products(keeps.backward, tf.constant(0), x, x, *handed_over, *weights)
    assert backward == num_products(again.backward, tf.constant(0), x, x, *weights) - forward
    # Whatever follows from the batch has its examples, in one axis or with its tokens.
    assert all(each.shape[0] % 4 == 0 for each in keeps.handed_over)


def test_a_backward_pass_in_bfloat16_gets_nothing_in_float32_but_sums():
    block, run, x = made("llama", recompute="nothing", xla="on", precision="mixed_bfloat16")
    passes = kept(block, run, x, is_compiled=True)
    assert {each.dtype for each in passes.handed_over if each.shape[-1] > 1} == {tf.bfloat16}


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "swiglu"])
def test_what_leads_into_a_custom_gradient_and_is_not_read_is_not_kept(activation: str):
    block, run, x = made("gpt2", {"activation": activation}, recompute="nothing", xla="off")
    sizes = [each.shape[-1] for each in kept(block, run, x, is_compiled=False).handed_over]
    num_wide = sum(size in (20, 40) for size in sizes)
    assert num_wide == (1 if activation == "relu" else 2), sizes
