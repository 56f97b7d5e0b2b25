"""Laws of the initial weights: a new model guesses, and each seed has weights of its own."""

import itertools
import math
import random
from pathlib import Path

import keras
import numpy as np
import pytest

from trainer.config.file import load_config
from trainer.config.settings import ModelConfig
from trainer.model.gpt import GPT

TINY = ModelConfig(num_heads=3, hidden_dim=16, intermediate_dim=12)


def test_same_seed_same_weights_other_seed_others():
    one, two, other = (GPT(TINY, 20, 8, seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(one.variables, two.variables, other.variables, strict=True):
        np.testing.assert_array_equal(a, b)
        if len(a.shape) > 1:
            assert not np.array_equal(a, c)


def test_no_two_weights_start_alike():
    kernels = [v.numpy() for v in GPT(TINY, 20, 8).variables if v.path.endswith("kernel")]
    for i, one in enumerate(kernels):
        assert not any(np.array_equal(one, other) for other in kernels[:i])


SHIPPED = sorted(path for path in (Path(__file__).parent.parent / "trainer" / "configs").glob("*.toml"))


def first_loss_above_guessing(config, vocabulary_size, num_tokens=256):
    """The loss of a new model on random tokens, less the loss of guessing: ln V, with V its number of logits."""
    model = GPT(config, vocabulary_size, num_tokens, bos_id=2)
    tokens = np.random.default_rng(0).integers(0, vocabulary_size, (1, num_tokens + 1)).astype(np.int32)
    weights = np.ones((1, num_tokens), np.float32)
    loss_sum, num_targets = model.evaluation_loss(tokens[:, :-1], tokens[:, 1:], weights)
    return float(loss_sum) / float(num_targets) - math.log(config.num_logits(vocabulary_size))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_first_loss_of_every_shipped_config_is_that_of_guessing(path):
    config = load_config(path)
    # A deeper model starts alike: what a block adds is divided by the root of the number of blocks. A slow test has the
    # whole models.
    most = 1 if config.model.hidden_dim > 2048 else 2
    model = config.model.model_copy(update={"num_layers": min(most, config.model.num_layers)})
    assert abs(first_loss_above_guessing(model, config.vocabulary_size() or 65)) <= 0.2


# Up to 24 blocks: GPT-2 1.5B would take a minute and ten gigabytes.
@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if "gpt2" in path.stem and "1.5b" not in path.stem], ids=lambda path: path.stem
)
def test_the_first_loss_of_a_whole_shipped_config_is_that_of_guessing(path):
    config = load_config(path)
    assert abs(first_loss_above_guessing(config.model, config.vocabulary_size() or 65)) <= 0.2


def model_settings():
    """Yields real widths and vocabularies with a sample of all combinations of the other settings."""
    pick = random.Random(1)
    choices = {
        "pre_norm": (True, False),
        "tied_embeddings": (True, False),
        "norm": ("layer", "rms"),
        "positions": ("learned", "rope"),
        "activation": ("relu", "gelu", "gelu_tanh", "swiglu"),
        "use_bias": (True, False),
        "num_key_value_heads": (None, 2),
        "num_layers": (1, 2, 4),
        "share_of_width": (1 / 3, 1, 4),
    }
    combinations = [*itertools.product(*choices.values())]
    for width, vocabulary_size, num_picked in (
        (128, 65, 24),
        (128, 2000, 16),
        (512, 5000, 10),
        (768, 65, 8),
        (768, 8192, 6),
    ):
        picked = [dict(zip(choices, each, strict=True)) for each in pick.sample(combinations, num_picked)]
        # These combinations once began the farthest from guessing.
        picked += [
            {"pre_norm": pre_norm, "tied_embeddings": True, "norm": "rms", "positions": "rope", "activation": "swiglu"}
            for pre_norm in (True, False)
        ]
        for settings in picked:
            share = settings.pop("share_of_width", 4)
            yield (
                ModelConfig(num_heads=4, hidden_dim=width, intermediate_dim=int(share * width), **settings),
                vocabulary_size,
            )


@pytest.mark.parametrize(("config", "vocabulary_size"), [*model_settings()])
def test_the_first_loss_is_that_of_guessing_whatever_the_settings(config, vocabulary_size):
    above = first_loss_above_guessing(config, vocabulary_size)
    if config.pre_norm or config.tied_embeddings:
        assert abs(above) <= 0.2
    else:
        # With the tutorial's start the logits have a variance of 2 width / (width + V), and half of it is added.
        assert -0.2 <= above <= config.hidden_dim / (config.hidden_dim + vocabulary_size) + 0.2


def test_every_seed_that_a_config_allows_has_initial_weights_of_its_own():
    config = ModelConfig(num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8, pre_norm=True)
    seeds = (0, 1, 2, 2**31, 2**32 - 1, 2**47 - 1, 2**47, 2**62 + 5, 2**63 - 1)
    weights = [tuple(np.ravel(GPT(config, 5, 4, seed).token_embedding.embeddings.numpy())) for seed in seeds]
    assert len(set(weights)) == len(seeds)
    # Small seeds give the numbers that Keras draws with them.
    for seed, values in zip(seeds[:3], weights, strict=False):
        drawn = keras.initializers.RandomNormal(stddev=1.0, seed=seed * 2**16)((5, 8)).numpy().ravel()
        np.testing.assert_allclose(values / np.std(values), drawn / np.std(drawn), rtol=1e-4)
