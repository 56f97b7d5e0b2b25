"""Lowers the step and cached decoding for a TPU with tensorflow-tpu, and prints what it finds. Run by test_tpu.py.

In an environment that scripts/launch/install_tpu made, on a machine without a TPU: only tensorflow-tpu's registry lists
the operations that a TPU has. Weights are arguments, as variables would have to live on one.
"""

import os

os.environ["TPU_LIBRARY_PATH"] = "/nonexistent"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

from trainer.config.file import make_config
from trainer.model.dropout import DropoutDraw
from trainer.model.gpt import GPT
from trainer.model.ops.xla import XlaOps
from trainer.training.batch_hash import batch_hash, hash_from_floats, hash_to_floats
from trainer.training.step import accumulate, forward_backward, mean_and_clip

ROWS, LENGTH, VOCABULARY = 8, 64, 256

MODERN = {"norm": "rms", "positions": "rope", "num_heads": 4, "num_key_value_heads": 2, "activation": "swiglu"}


def lower(model_settings, z_loss, warms_up):
    settings = {
        "run_folder": "unused",
        "data": {"mode": "packed"},
        "model": {"dropout": 0.1, "pre_norm": True, "document_mask": True, **model_settings},
        "train": {"precision": "mixed_bfloat16", "total_steps": 10, "z_loss": z_loss},
    }
    config = make_config(settings)
    model = GPT(config.model, VOCABULARY, LENGTH, dtype=config.train.precision, bos_id=2)
    weight_specs = [tf.TensorSpec(variable.shape, tf.float32) for variable in model.trainable_variables]

    @tf.function(jit_compile=True, autograph=False)
    def step(inputs, targets, target_weights, number, first_example, num_examples, *weights):
        used = num_examples if warms_up else None  # In a batch warm-up the loop ends after a number of micro-batches.

        def gradients_of(weights, state, batch, first_example):
            draw = DropoutDraw(tf.constant(1, tf.int64), number, first_example)
            return forward_backward(model, weights, state, batch, draw, z_loss=config.train.z_loss, ops=XlaOps())

        batch = (inputs, targets, target_weights)
        sums = accumulate(gradients_of, weights, [], batch, first_example, ROWS // 2, num_examples=used)
        found = hash_from_floats(hash_to_floats(batch_hash(batch, first_example, used)))
        return mean_and_clip(sums.by_weight, sums.num_targets, 1.0), found

    @tf.function(jit_compile=True, autograph=False)
    def decode(tokens, index, *tensors):
        kept, weights = tensors[: 2 * len(model.blocks)], tensors[2 * len(model.blocks) :]
        cache = list(zip(kept[::2], kept[1::2], strict=True))
        with keras.StatelessScope(state_mapping=list(zip(model.trainable_variables, weights, strict=True))):
            return model.decode(tokens, cache, index, XlaOps())

    number = tf.TensorSpec([], tf.int64)
    batch = [tf.TensorSpec([ROWS, LENGTH], dtype) for dtype in (tf.int32, tf.int32, tf.float32)]
    cache = [tf.TensorSpec(kept.shape, tf.bfloat16) for of_block in model.empty_cache(2) for kept in of_block]
    position = [tf.TensorSpec([2, 1], tf.int32), tf.TensorSpec([], tf.int32), *cache]
    for name, function, specs in (("step", step, [*batch, number, number, number]), ("decode", decode, position)):
        hlo = function.experimental_get_compiler_ir(*specs, *weight_specs)(stage="hlo", platform_name="TPU")
        # A bounded dynamic shape is written as <=64.
        print(name, "has bounded dynamic shapes" if "<=" in hlo else "has static shapes", len(hlo) > 10_000)


if __name__ == "__main__":
    lower({}, 0.0, warms_up=False)
    lower(MODERN, 1e-4, warms_up=True)
