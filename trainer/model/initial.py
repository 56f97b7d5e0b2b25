"""The initial weights of a GPT: each is a function of the model's seed and of the weight's place in the model."""

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence

import keras
import tensorflow as tf

from trainer.config.settings import ModelConfig

# The standard deviation of GPT-2's initial weights (Radford et al. 2019).
KERNEL_STDDEV = 0.02

# Wider than GPT-2's: at 0.02 what the first blocks add drowns the tokens, and small models learn late to copy a name.
# Tied embeddings are as wide as the logits allow.
EMBEDDING_STDDEV = 0.1

# The standard deviation of a new model's logits. Half of its square is added to the loss of a uniform guess, ln V.
LOGIT_STDDEV = 0.4

# Limit of Keras's "uniform", which the tutorial's embeddings start from.
TUTORIAL_EMBEDDING_LIMIT = 0.05


class Initializers:
    """Makes initializers. Each has its own seed, which depends only on the order in which they are made.

    Without pre_norm they are the initializers of the tutorial's KerasNLP layers, so that the same model also starts
    alike; with pre_norm they are GPT-2's. The exception is what makes logits, which can be far from small with both: a
    new model knows nothing, and a loss that begins above the loss of a uniform guess is learning time lost.

    Args:
        seed: the model's seed.
        config: the model's shape.
    """

    def __init__(self, seed: int, config: ModelConfig) -> None:
        self._seeds = map(functools.partial(_seed_of_weight, seed), itertools.count())
        self._config = config

    def embedding(self) -> keras.Initializer:
        """Makes the initializer of the token or the position embedding."""
        tied = self._config.tied_embeddings
        if self._config.pre_norm:
            return self._normal(self._logit_stddev() if tied else EMBEDDING_STDDEV)
        # The limit of a uniform distribution is sqrt(3) times its standard deviation.
        widest = math.sqrt(3) * self._logit_stddev() if tied else math.inf
        return self._uniform(min(TUTORIAL_EMBEDDING_LIMIT, widest))

    def unembedding(self, num_logits: int) -> keras.Initializer:
        """Makes the initializer of the output projection."""
        return self._kernel(self._logit_stddev(), self._config.hidden_dim + num_logits)

    def last_scales(self) -> keras.Initializer | str:
        """Makes the initializer of the scales of the normalization that the output projection reads."""
        return _Alternating() if self._config.tied_embeddings else "ones"

    def query_key_value(self) -> keras.Initializer:
        """Makes the initializer of the projection to queries, keys and values."""
        # The fans of a kernel that makes only queries, as in KerasNLP, where queries, keys and values have one each.
        return self._kernel(KERNEL_STDDEV, self._config.hidden_dim + self._attention_dim())

    def attention_output(self) -> keras.Initializer:
        """Makes the initializer of the projection that ends attention."""
        return self._kernel(self._residual_stddev(), self._config.hidden_dim + self._attention_dim())

    def intermediate(self) -> keras.Initializer:
        """Makes the initializer of the projection that begins the feed-forward layer."""
        return self._kernel(KERNEL_STDDEV, self._config.hidden_dim + self._config.intermediate_dim)

    def output(self) -> keras.Initializer:
        """Makes the initializer of the projection that ends the feed-forward layer."""
        return self._kernel(self._residual_stddev(), self._config.hidden_dim + self._config.intermediate_dim)

    def _attention_dim(self) -> int:
        return self._config.num_heads * self._config.head_width()

    def _logit_stddev(self) -> float:
        # The projection reads hidden_dim numbers of variance 1.
        return LOGIT_STDDEV / math.sqrt(self._config.hidden_dim)

    def _residual_stddev(self) -> float:
        # Every block adds to the residual stream twice. Divided by this root, its variance does not grow with depth.
        return KERNEL_STDDEV / math.sqrt(2 * self._config.num_layers)

    def _kernel(self, stddev: float, fans: int) -> keras.Initializer:
        """Makes a kernel's initializer. Source of the uniform one: Glorot and Bengio 2010, equation 16."""
        return self._normal(stddev) if self._config.pre_norm else self._uniform(math.sqrt(6 / fans))

    def _normal(self, stddev: float) -> keras.Initializer:
        return keras.initializers.RandomNormal(0.0, stddev, seed=next(self._seeds))

    def _uniform(self, limit: float) -> keras.Initializer:
        return keras.initializers.RandomUniform(-limit, limit, seed=next(self._seeds))


class _Alternating(keras.initializers.Initializer):
    """Makes 1 and -1 in turn: the last scales of a model with tied embeddings.

    The residual stream still holds a token's embedding when it meets the same embedding in the output projection.
    With scales of 1 all products have one sign, and a new model is sure that every token comes again. With both signs
    their sum is nearly 0, as it is for any other token.
    """

    def __call__(self, shape: Sequence[int], dtype: str | None = None) -> tf.Tensor:
        return tf.cast(1 - 2 * (tf.range(shape[-1]) % 2), dtype or keras.config.floatx())


def _seed_of_weight(seed: int, number: int) -> int:
    """Returns the seed of a model's weight by the weight's number, below the modulus of Keras's seeds."""
    if seed < 2**15:
        return seed * 2**16 + number
    # Products of larger seeds would collide modulo 2**31 - 2: seed 2**31 would give the products of seed 2.
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % (2**31 - 2)
