"""Laws of the program that a TPU's or GPU's compiler gets."""

import pytest

from trainer.config import UserError, make_config
from trainer.lowering import lower_step


def config_of(**train):
    return make_config(
        {
            "run_folder": "unused",
            "model": {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 16},
            "train": {"precision": "float32", "total_steps": 9, "global_batch_size": 8, "sequence_length": 8, **train},
        }
    )


@pytest.mark.parametrize("micro_batch_size", [2, 1])
def test_a_program_of_several_replicas_sums_each_gradient_once_over_them(micro_batch_size):
    of_one, of_four = (lower_step(config_of(micro_batch_size=micro_batch_size), 13, n) for n in (1, 4))
    assert b"all-reduce" not in of_one
    # 16 weights, and the loss, the count, the hash and the votes: for the compiler to make one operation of.
    assert of_four.count(b"all-reduce") == 16 + 4


def test_a_batch_that_replicas_cannot_share_is_said():
    with pytest.raises(UserError, match=r"train.global_batch_size=8 is not a multiple of 3 replicas"):
        lower_step(config_of(), 13, 3)
