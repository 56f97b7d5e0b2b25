"""Chooses the optimizer of a run."""

from collections.abc import Mapping

import keras

from trainer.config.settings import OptimizerConfig
from trainer.errors import UserError
from trainer.execution import Execution
from trainer.model.language_model import adapt
from trainer.optimizers.adamw import AdamW
from trainer.optimizers.muon import Muon
from trainer.optimizers.variables import Piece

Optimizer = AdamW | Muon


def make_optimizer(
    config: OptimizerConfig,
    variables: Mapping[str, keras.Variable | Piece],
    model: keras.Model,
    sequence_length: int,
    execution: Execution,
) -> Optimizer:
    """Returns the optimizer that the settings name.

    Args:
        config: its settings.
        variables: the model's trainable variables, or this replica's pieces of them, by name. Call it under
            the strategy scope of these.
        model: the model to train.
        sequence_length: tokens of an example.
        execution: how each replica computes.

    Raises:
        UserError: the optimizer is Muon, and the model has no matrix for it.
    """
    if config.kind == "adamw":
        return AdamW(config, variables)
    matrices = {name: widths for name, widths in adapt(model).matrices(sequence_length).items() if name in variables}
    if not matrices:
        raise UserError(
            "optimizer.kind='muon' trains kernels with two axes, neither as long as the vocabulary, and this model has "
            "no such kernel; choose 'adamw'."
        )
    dtypes = execution.orthogonalization_dtype, execution.direction_dtype
    return Muon(config, variables, matrices, *dtypes, stacks=execution.stacks_matrices)
