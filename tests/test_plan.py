import itertools
import math

import pytest

from trainer.config import UserError, make_config
from trainer.model.gpt import GPT
from trainer.plan import parameter_shapes, print_plan

SETTINGS = {"run_folder": "r", "train": {"precision": "float32", "total_steps": 1}}
MODERN = ["model.norm=rms", "model.positions=rope", "model.num_key_value_heads=2", "model.activation=swiglu"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.pre_norm=true", "model.tied_embeddings=true", "model.use_bias=false"],
        ["model.num_heads=5", "model.hidden_dim=16", "model.intermediate_dim=7", "model.tied_embeddings=true"],
        ["model.pre_norm=true", "model.num_layers=1"],
        ["model.vocabulary_multiple=16"],
        ["model.vocabulary_multiple=16", "model.tied_embeddings=true"],
        *(["model.num_heads=4", *settings] for n in range(5) for settings in itertools.combinations(MODERN, n)),
    ],
)
def test_planned_weights_are_those_of_the_model(overrides: list[str]):
    config = make_config(SETTINGS, ["train.sequence_length=9", *overrides])
    model = GPT(config.model, 31, config.train.sequence_length)
    planned = dict(parameter_shapes(config.model, 31, config.train.sequence_length))
    assert planned == {variable.path: tuple(variable.shape) for variable in model.variables}


def test_the_tutorial_s_model_has_3_387_266_parameters(capsys: pytest.CaptureFixture[str]):
    config = make_config(SETTINGS)
    shapes = [shape for _, shape in parameter_shapes(config.model, 5000, 128)]
    assert sum(math.prod(shape) for shape in shapes) == 3_387_266
    print_plan(config, None)
    table = capsys.readouterr().out
    assert "3,387,266" in table
    assert "vocabulary 5,000, sequence length 128" in table


def test_vocabulary_size_given_goes_before_the_config_s(capsys: pytest.CaptureFixture[str]):
    print_plan(make_config(SETTINGS), 100)
    assert "100 x 256" in capsys.readouterr().out


def test_planned_parameters_are_those_of_the_padded_vocabulary(capsys: pytest.CaptureFixture[str]):
    print_plan(make_config(SETTINGS, ["model.vocabulary_multiple=128"]), 5000)
    table = capsys.readouterr().out
    # 120 rows more, in the embedding, the projection and its bias.
    assert "5120 x 256" in table and f"{3_387_266 + 120 * (2 * 256 + 1):,}" in table


def test_vocabulary_that_only_the_text_knows_must_be_given(capsys: pytest.CaptureFixture[str]):
    config = make_config(SETTINGS, ["tokenizer.kind=char"])
    with pytest.raises(
        UserError, match=r"tokenizer.kind='char' takes its vocabulary from the text, which plan does not"
    ):
        print_plan(config, None)
    with_file = make_config(SETTINGS, ["tokenizer={kind='bpe',path='tokenizer.json'}"])
    with pytest.raises(UserError, match=r"tokenizer.kind='bpe' takes its vocabulary from tokenizer.path, which plan"):
        print_plan(with_file, None)
    print_plan(make_config(SETTINGS, ["tokenizer.kind=byte"]), None)
    assert "vocabulary 258" in capsys.readouterr().out
    print_plan(config, 68)
    assert "vocabulary 68" in capsys.readouterr().out
    with pytest.raises(UserError, match="--vocabulary-size 0 must be at least 1"):
        print_plan(config, 0)
