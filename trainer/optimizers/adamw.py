"""AdamW, applied on each replica to gradients that were summed and clipped. We name its state ourselves."""

from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from trainer.config.settings import OptimizerConfig
from trainer.optimizers.replicas import Replicas
from trainer.optimizers.variables import Piece, counter, slot

# Endings of the names that Keras's layers, and most custom layers, give to weights that are added or that multiply
# number by number: query_bias.
NAMES_WITHOUT_DECAY = ("bias", "gamma", "beta", "scale")


class AdamW(tf.Module):
    """Adam with decoupled weight decay; equal to Keras AdamW, and without decay to Keras Adam.

    Its own module because a Keras optimizer sums gradients over replicas by itself and names its slots by position.

    Args:
        config: betas, epsilon and weight decay.
        variables: the model's trainable variables, or this replica's pieces of them, by name. Create the optimizer
            under the strategy scope of these.

    Source: Kingma and Ba 2015, algorithm 1 in the form of the last paragraph of section 2; Loshchilov and Hutter 2019,
    algorithm 2.
    """

    def __init__(self, config: OptimizerConfig, variables: Mapping[str, keras.Variable | Piece]) -> None:
        super().__init__(name="adamw")
        self.config = config
        self.names = list(variables)
        self.variables_to_train = list(variables.values())
        self.num_updates = counter("num_updates")
        self.first_moments = [slot(variable) for variable in self.variables_to_train]
        self.second_moments = [slot(variable) for variable in self.variables_to_train]

    def state(self) -> dict[str, tf.Variable]:
        """Returns every variable of the optimizer by a name that begins with its weight's name."""
        named = {"num_updates": self.num_updates}
        for name, first, second in zip(self.names, self.first_moments, self.second_moments, strict=True):
            named[f"{name}/first_moment"] = first
            named[f"{name}/second_moment"] = second
        return named

    def updates(self, gradients: Sequence[tf.Tensor], replicas: Replicas) -> list[tf.Tensor]:
        """Returns what `apply` needs: the gradients. The replicas have nothing to share."""
        return list(gradients)

    def apply(self, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor) -> None:
        """Updates all weights and moments once.

        Args:
            gradients: gradients of the mean loss, one per variable, dense, of the variable's shape and dtype.
            learning_rate: scalar.
        """
        config = self.config
        count = tf.cast(self.num_updates.assign_add(1), tf.float64)
        beta_1_power = tf.pow(tf.constant(config.beta_1, tf.float64), count)
        beta_2_power = tf.pow(tf.constant(config.beta_2, tf.float64), count)
        for variable, first, second, gradient in zip(
            self.variables_to_train, self.first_moments, self.second_moments, gradients, strict=True
        ):
            weight, dtype = variable.value, gradient.dtype
            if config.weight_decay and decays(variable):
                decay = tf.cast(learning_rate * config.weight_decay, dtype)
                # The raw operation, as assign_sub would average over replicas, which all compute the same.
                tf.raw_ops.AssignSubVariableOp(resource=weight.handle, value=tf.convert_to_tensor(weight) * decay)
            # One kernel, one pass over weight and moments.
            tf.raw_ops.ResourceApplyAdam(
                var=weight.handle,
                m=first.handle,
                v=second.handle,
                beta1_power=tf.cast(beta_1_power, dtype),
                beta2_power=tf.cast(beta_2_power, dtype),
                lr=tf.cast(learning_rate, dtype),
                beta1=tf.constant(config.beta_1, dtype),
                beta2=tf.constant(config.beta_2, dtype),
                epsilon=tf.constant(config.epsilon, dtype),
                grad=gradient,
            )


def decays(variable: keras.Variable | Piece) -> bool:
    """Returns whether weight decay applies: to matrices and embeddings, not to biases and normalizations.

    The name decides as well as the shape: biases of Keras's MultiHeadAttention, EinsumDense and GRU have several axes,
    and so do the scales of a normalization over several axes.
    """
    return len(variable.shape) > 1 and not variable.name.endswith(NAMES_WITHOUT_DECAY)
