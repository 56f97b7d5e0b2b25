"""Laws of the size of a GPT by its config."""

import itertools
from pathlib import Path

import pytest

from trainer.config.file import load_config, make_config
from trainer.hardware.devices import parse_target
from trainer.model.gpt import GPT
from trainer.model.size import (
    count_parameters,
    flops_per_token,
    matrix_parameters,
    parameter_shapes,
    tokens_per_sec_at_peak,
)

CONFIGS = Path(__file__).parent.parent / "configs"
SETTINGS = {"run_folder": "r", "train": {"precision": "float32", "total_steps": 1}}
MODERN = ["model.norm=rms", "model.positions=rope", "model.num_key_value_heads=2", "model.activation=swiglu"]
GPT2 = load_config(CONFIGS / "gpt2_124m_tpu_v5e_8.toml")
V5E_8 = parse_target("tpu:v5e-8")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.pre_norm=true", "model.tied_embeddings=true", "model.use_bias=false"],
        ["model.num_heads=5", "model.hidden_dim=16", "model.intermediate_dim=7", "model.tied_embeddings=true"],
        ["model.pre_norm=true", "model.num_layers=1"],
        ["model.vocabulary_multiple=16"],
        ["model.head_dim=10", "model.use_bias=[query_key_value,norm]"],
        ["model.head_dim=10", "model.num_heads=300", "model.use_bias=[attention_output,feedforward]"],
        ["model.use_bias=[unembedding]", "model.pre_norm=true"],
        ["model.vocabulary_multiple=16", "model.tied_embeddings=true"],
        ["model.qk_norm=true", "model.head_dim=10"],
        *(["model.num_heads=4", *settings] for n in range(5) for settings in itertools.combinations(MODERN, n)),
    ],
)
def test_planned_weights_are_those_of_the_model(overrides: list[str]):
    config = make_config(SETTINGS, ["train.sequence_length=9", *overrides])
    model = GPT(config.model, 31, config.train.sequence_length)
    planned = dict(parameter_shapes(config.model, 31, config.train.sequence_length))
    assert planned == {variable.path: tuple(variable.shape) for variable in model.variables}
    assert count_parameters(config, 31) == model.count_params()


def test_operations_of_a_token_are_those_of_the_formula():
    # The tutorial's model: two layers of 256, three heads of 85, 5000 logits, 128 tokens.
    config = make_config(SETTINGS)
    matrices = 2 * (4 * 256 * 255 + 2 * 256 * 256) + 5000 * 256
    assert matrix_parameters(config, 5000) == matrices
    assert flops_per_token(config, 5000) == 6 * matrices + 12 * 2 * 3 * 85 * 128
    tied = make_config(SETTINGS, ["model.tied_embeddings=true"])
    assert matrix_parameters(tied, 5000) == matrices


def test_tokens_at_peak_use_all_operations_of_all_devices():
    at_peak = tokens_per_sec_at_peak(GPT2, 50257, V5E_8)
    assert at_peak is not None
    assert at_peak * flops_per_token(GPT2, 50257) == pytest.approx(8 * 197e12)
    assert tokens_per_sec_at_peak(GPT2, 50257, parse_target("cpu")) is None
    # It has no circuits for bfloat16.
    assert tokens_per_sec_at_peak(GPT2, 50257, parse_target("gpu:V100-16GB")) is None
