"""Laws of the program that a TPU's or GPU's compiler gets."""

import sys

import pytest
import tensorflow as tf

from trainer.config.file import make_config
from trainer.errors import UserError
from trainer.hardware.devices import parse_target
from trainer.planning import lower
from trainer.planning.estimate import sent_bytes
from trainer.planning.lower import lower_step, main
from trainer.training.batch_hash import hash_to_floats

GPU = parse_target("gpu:H100")

CONFIG = """
model = {{num_layers = 1, num_heads = 1, hidden_dim = 8, intermediate_dim = 8, vocabulary_multiple = {multiple}}}
train = {{precision = "float32", total_steps = 1, sequence_length = 16, global_batch_size = 2}}
"""


def config_of(**train):
    return make_config(
        {
            "run_folder": "unused",
            "model": {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 16},
            "train": {"precision": "float32", "total_steps": 9, "global_batch_size": 8, "sequence_length": 8, **train},
        }
    )


def test_a_program_of_several_replicas_sums_each_gradient_once_over_them():
    assert b"all-reduce" not in lower_step(config_of(), 13, GPU)
    averaged = make_config(config_of(micro_batch_size=1).model_dump(mode="json"), ["optimizer.ema_decay=0.9"])
    for config in (config_of(micro_batch_size=2), averaged):
        of_four = lower_step(config, 13, GPU._replace(num_devices=4))
        # 16 weights, and the loss, the count, the hash and the votes: for the compiler to make one operation of. The
        # average of the weights needs none.
        assert of_four.count(b"all-reduce") == 16 + 4


def count_operations(hlo, name):
    # An operation's opcode, and the name that begins with it.
    count = hlo.count(name)
    assert count % 2 == 0
    return count // 2


def test_a_split_optimizer_scatters_each_gradient_once_and_gathers_each_weight_once():
    config = make_config(config_of(micro_batch_size=2).model_dump(mode="json"), ["distribution.shard=optimizer"])
    of_four = lower_step(config, 13, GPU._replace(num_devices=4))
    # 7 matrices by themselves, and 9 vectors that are joined; the loss, the counts and the square of the norm.
    assert [count_operations(of_four, name) for name in (b"reduce-scatter", b"all-gather", b"all-reduce")] == [8, 8, 1]
    with pytest.raises(UserError, match=r"distribution.shard='optimizer' splits over several replicas"):
        lower_step(config, 13, GPU)


@pytest.mark.parametrize(
    ("kind", "shard", "over"),
    [
        ("adamw", "nothing", None),
        ("adamw", "optimizer", None),
        ("adamw", "optimizer", 2),
        ("muon", "nothing", None),
        ("muon", "optimizer", None),
        ("muon", "optimizer", 2),
        ("adamw", "weights", None),
        ("muon", "weights", 2),
    ],
)
def test_plan_counts_what_a_step_sends(monkeypatch, kind, shard, over):
    sent, pieces = [], over or 4

    def record(owner, name, tensors_of, share):
        real = getattr(owner, name)

        def recording(self, *arguments):
            # The loss, the counts and the hash have too few numbers for a weight.
            sent.extend(share * x.shape.num_elements() * x.dtype.size for x in tensors_of(arguments) if x.shape.rank)
            return real(self, *arguments)

        monkeypatch.setattr(owner, name, recording)

    record(lower._StepOfMany, "sum_over_replicas", lambda arguments: arguments[1], 2 * 3 / 4)
    record(lower.XlaCollectives, "gather", lambda arguments: arguments[0], pieces - 1)
    record(lower.XlaCollectives, "reduce_scatter", lambda arguments: arguments[0], (pieces - 1) / pieces)
    record(lower.XlaCollectives, "all_to_all", lambda arguments: arguments[0], (pieces - 1) / pieces)
    # Two groups of two add up their pieces.
    record(lower.XlaCollectives, "_reduced", lambda arguments: arguments[:1] if arguments[1] == "place" else [], 1)
    settings = config_of(precision="mixed_bfloat16", micro_batch_size=2).model_dump(mode="json")
    config, four = (
        make_config(
            settings,
            [f"optimizer.kind={kind}", f"distribution.shard={shard}", f"distribution.shard_over={over or 'none'}"],
        ),
        parse_target("tpu:v5e-4"),
    )
    lower_step(config, 13, four)
    hash_bytes = 4 * hash_to_floats(tf.zeros([], tf.int64)).shape.num_elements()
    of_hash = 0 if config.distribution.shard != "nothing" else 2 * 3 / 4 * hash_bytes
    assert sum(sent) - of_hash == sum(sent_bytes(config, 13, four).values())


@pytest.mark.parametrize("target", ["tpu:v5e-4", "gpu:H100x4"])
def test_a_step_with_split_weights_gathers_its_blocks_in_two_loops_and_scatters_their_gradients_in_one(target):
    settings = config_of(micro_batch_size=2).model_dump(mode="json")
    config = make_config(settings, ["distribution.shard=weights", "model.num_layers=3", "model.tied_embeddings=false"])
    of_four = lower_step(config, 13, parse_target(target))
    # A block has four matrices, and its vectors are joined; the embeddings have two, and the rest a matrix and vectors.
    # One block stands for all.
    assert [count_operations(of_four, name) for name in (b"all-gather", b"reduce-scatter", b"all-reduce")] == [
        2 * 5 + 2 + 2,
        5 + 2 + 2,
        1,
    ]


def test_a_batch_that_replicas_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"train.global_batch_size=8 is not a multiple of 3 replicas"):
        lower_step(config_of(), 13, GPU._replace(num_devices=3))


def test_a_program_takes_a_number_of_examples():
    with pytest.raises(
        UserError, match=r"'auto' is found on the device itself; .*, such as train.micro_batch_size=4\.$"
    ):
        lower_step(config_of(micro_batch_size="auto"), 13, GPU._replace(num_devices=2))
    with pytest.raises(UserError, match=r"such as train.micro_batch_size=2\.$"):
        lower_step(config_of(micro_batch_size="auto", batch_warmup={3: 4}), 13, GPU._replace(num_devices=2))


def has_matrix(hlo, num_rows, num_columns):
    # The dimensions of a Shape in an HloModuleProto: field 3, two bytes long, for numbers below 128 a byte each.
    return bytes([0x1A, 2, num_rows, num_columns]) in hlo


def test_a_step_lowered_without_text_has_the_rows_of_the_padded_vocabulary(tmp_path, monkeypatch):
    for multiple, num_rows, other in (1, 50, 64), (64, 64, 50):
        config, out = tmp_path / f"{num_rows}.toml", tmp_path / f"{num_rows}.hlo"
        config.write_text(CONFIG.format(multiple=multiple))
        monkeypatch.setattr(sys, "argv", ["lower", str(config), "50", "gpu:H100x2", str(out)])
        main()
        assert has_matrix(out.read_bytes(), num_rows, 8) and not has_matrix(out.read_bytes(), other, 8)
