"""Chooses the optimizer of a run."""

from collections.abc import Mapping

import keras

from trainer.config.settings import OptimizerConfig
from trainer.optimizers.adamw import AdamW


def make_optimizer(config: OptimizerConfig, variables: Mapping[str, keras.Variable]) -> AdamW:
    """Returns the optimizer that the settings name.

    Args:
        config: its settings.
        variables: the model's trainable variables by name. Call it under the strategy scope of these.
    """
    return AdamW(config, variables)
