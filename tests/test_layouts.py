"""config.json of Hugging Face and our settings of a model say the same, in both directions."""

import json
from typing import Any

import pytest

from trainer.config.settings import ModelConfig
from trainer.errors import UserError
from trainer.exchange.layouts import GPT2, LLAMA, QWEN3, config_json, layout_of, misfits, model_settings

OPENAI = {
    # The config.json of GPT-2, as it was published.
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
GPT2_SETTINGS = {"pre_norm": True, "activation": "gelu_tanh", "num_heads": 4, "tied_embeddings": True}
LLAMA_SETTINGS = {
    "pre_norm": True,
    "activation": "swiglu",
    "norm": "rms",
    "positions": "rope",
    "use_bias": False,
    "num_heads": 4,
}
QWEN3_SETTINGS = LLAMA_SETTINGS | {"qk_norm": True}
SETTINGS_OF = {"gpt2": GPT2_SETTINGS, "llama": LLAMA_SETTINGS, "qwen3": QWEN3_SETTINGS}


def model(**settings: Any) -> ModelConfig:
    return ModelConfig.model_validate_json(json.dumps(settings), strict=True)


def test_the_published_config_of_gpt2_is_read():
    assert model(**model_settings(OPENAI, "")) == model(
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
        activation="gelu_tanh",
        pre_norm=True,
        tied_embeddings=True,
    )
    assert model_settings({"model_type": "gpt2"}, "") == model_settings(OPENAI, "")  # They are the defaults.


def test_rotary_frequencies_are_read_in_the_form_of_transformers_4_and_of_5():
    new = SMALL_LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    old = SMALL_LLAMA | {"rope_theta": 5e5, "rope_scaling": None}
    older = SMALL_LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "default"}}
    for settings in (new, old, older):
        assert model_settings(settings, "")["rope_theta"] == 5e5
    assert model_settings(SMALL_LLAMA, "")["rope_theta"] == 1e4


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        (GPT2, {}),
        (GPT2, {"num_layers": 5, "hidden_dim": 32, "intermediate_dim": 80, "norm_epsilon": 1e-3}),
        (GPT2, {"activation": "relu", "dropout": 0.25}),
        (GPT2, {"activation": "gelu"}),
        (GPT2, {"tied_embeddings": False, "use_bias": ["query_key_value", "attention_output", "feedforward", "norm"]}),
        (LLAMA, {}),
        (LLAMA, {"num_layers": 5, "hidden_dim": 32, "intermediate_dim": 80, "norm_epsilon": 1e-6}),
        (LLAMA, {"num_key_value_heads": 2, "head_dim": 16, "rope_theta": 5e5}),
        (LLAMA, {"tied_embeddings": True, "use_bias": ["query_key_value", "attention_output"]}),
        (LLAMA, {"num_key_value_heads": 1, "use_bias": ["feedforward"]}),
        (QWEN3, {}),
        (QWEN3, {"num_key_value_heads": 2, "head_dim": 16, "use_bias": ["query_key_value", "attention_output"]}),
    ],
)
def test_a_config_json_of_settings_gives_the_settings_back(layout, settings):
    ours = model(**SETTINGS_OF[layout.model_type] | settings)
    assert misfits(layout, ours) == []
    written = json.loads(json.dumps(config_json(layout, ours, 300, 77)))
    assert layout_of(written, "") is layout
    assert (written["vocab_size"], written[layout.positions_key]) == (300, 77)
    again = model(**model_settings(written, ""))
    other = {"use_bias", "dropout"}  # The first can be written in two ways, and the second is a matter of training.
    assert again.model_dump(exclude=other) == ours.model_dump(exclude=other)
    assert again.biases() == ours.biases()
    assert written.get("resid_pdrop", 0.0) == written.get("embd_pdrop", 0.0) == ours.dropout


@pytest.mark.parametrize(
    ("settings", "unfit_for_gpt2"),
    [
        ({"pre_norm": False}, ["model.pre_norm=false"]),
        ({"norm": "rms"}, ["model.norm=rms"]),
        ({"positions": "rope"}, ["model.positions=rope"]),
        ({"activation": "swiglu"}, ["model.activation=swiglu"]),
        ({"use_bias": False}, []),  # Its biases are then zeros.
        ({"use_bias": ["norm"]}, []),
        ({"tied_embeddings": False}, ["model.use_bias=[unembedding]"]),
        ({"num_heads": 3}, ["model.num_heads=3"]),
        ({"head_dim": 16}, ["model.head_dim=16"]),
        ({"num_key_value_heads": 2}, ["model.num_key_value_heads=2"]),
        ({"qk_norm": True}, ["model.qk_norm=true"]),
    ],
)
def test_every_setting_that_gpt2_cannot_have_is_named(settings, unfit_for_gpt2):
    assert misfits(GPT2, model(**GPT2_SETTINGS)) == []
    assert misfits(GPT2, model(**GPT2_SETTINGS | settings)) == unfit_for_gpt2


@pytest.mark.parametrize(
    ("settings", "unfit_for_llama"),
    [
        ({"pre_norm": False}, ["model.pre_norm=false"]),
        ({"norm": "layer"}, ["model.norm=layer"]),
        ({"positions": "learned"}, ["model.positions=learned"]),
        ({"activation": "gelu"}, ["model.activation=gelu"]),
        ({"use_bias": True}, ["model.use_bias=[norm,unembedding]"]),
        ({"use_bias": ["query_key_value"]}, []),
        ({"qk_norm": True}, ["model.qk_norm=true"]),
        ({"use_bias": ["unembedding"]}, ["model.use_bias=[unembedding]"]),
        ({"num_heads": 5, "head_dim": 8}, ["model.num_heads=5"]),
    ],
)
def test_every_setting_that_llama_cannot_have_is_named(settings, unfit_for_llama):
    assert misfits(LLAMA, model(**LLAMA_SETTINGS)) == []
    assert misfits(LLAMA, model(**LLAMA_SETTINGS | settings)) == unfit_for_llama


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not a kind that trainer has (gpt2, llama, qwen3)"),
        ({"model_type": None}, "model_type=None"),
        (OPENAI | {"activation_function": "tanh"}, "activation_function='tanh' is not in trainer; it has gelu_new"),
        (OPENAI | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not in trainer"),
        (OPENAI | {"scale_attn_weights": False}, "scale_attn_weights=False is not in trainer, only"),
        (OPENAI | {"add_cross_attention": True}, "add_cross_attention=True is not in trainer"),
        (SMALL_LLAMA | {"hidden_act": "gelu"}, "hidden_act='gelu' is not in trainer; it has silu"),
        (SMALL_LLAMA | {"sliding_window": 128}, "sliding_window=128 is not in trainer, only sliding_window=null"),
        (SMALL_LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling={'type': 'linear'"),
        (SMALL_LLAMA | {"rope_parameters": {"rope_type": "llama3"}}, "only rope_type='default'"),
        (SMALL_LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters={'partial_rotary"),
        (SMALL_LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not in trainer"),
    ],
)
def test_what_trainer_does_not_have_is_refused_by_name(settings, message):
    with pytest.raises(UserError) as error:
        model_settings(settings, "f/config.json")
    assert str(error.value).startswith("f/config.json: ")
    assert message in str(error.value)
