"""An average of the weights, which scores better than the newest weights while these still jump around a minimum."""

import contextlib
from collections.abc import Iterator, Mapping

import keras
import tensorflow as tf

from trainer.optimizers.variables import Piece, counter, slot

# The average of t weights is mostly of the last t / (ETA + 1) of them, until `decay` limits it to 1 / (1 - decay).
ETA = 8


class WeightAverage(tf.Module):
    """An exponential average of the weights. Its start has no bias: the initial weights are no part of it.

    With w_t the weights after update t = 1, 2, ... since `begin`:

        average_t = average_(t-1) + rate_t (w_t - average_(t-1)),   rate_t = max(1 - decay, (ETA + 1) / (t + ETA))

    rate_1 is 1, so the average begins as w_1. Without the first rule of the maximum the average of a short run would be
    of its first, bad weights; without the second one it would get ever slower.

    Args:
        decay: above 0 and below 1.
        variables: the model's trainable variables, or this replica's pieces of them, by name. Create the average under
            the strategy scope of these.

    Source: Shamir and Zhang 2013, section 4, polynomial-decay averaging, for the second rate. It is also the rate of
    TensorFlow's ExponentialMovingAverage with num_updates, which is one update behind and so begins with a tenth of the
    initial weights.
    """

    def __init__(self, decay: float, variables: Mapping[str, keras.Variable | Piece]) -> None:
        super().__init__(name="weight_average")
        self.decay = decay
        self.names = list(variables)
        self.variables_to_average = list(variables.values())
        self.num_averaged = counter("num_averaged")
        self.averages = [slot(variable) for variable in self.variables_to_average]
        self._strategy = tf.distribute.get_strategy()
        self._begin = tf.function(lambda: self._strategy.run(self._begin_on_replica), autograph=False)
        self._exchange = tf.function(lambda: self._strategy.run(self._exchange_on_replica), autograph=False)

    def state(self) -> dict[str, tf.Variable]:
        """Returns its variables by name."""
        averages = {name_of_average(name): average for name, average in zip(self.names, self.averages, strict=True)}
        return {"num_averaged": self.num_averaged} | averages

    def begin(self) -> None:
        """Begins anew with the weights that the model has now."""
        self.num_averaged.assign(0)
        self._begin()

    def update(self) -> None:
        """Adds the newest weights to the average. Every replica does the same with its own copy."""
        count = tf.cast(self.num_averaged.assign_add(1), tf.float64)
        rate = tf.maximum(tf.constant(1 - self.decay, tf.float64), (ETA + 1) / (count + ETA))
        for variable, average in zip(self.variables_to_average, self.averages, strict=True):
            behind = tf.convert_to_tensor(average) - tf.convert_to_tensor(variable.value)
            # In place, by the raw operation: `assign_sub` would average over replicas, which all compute the same. No
            # kernel of TensorFlow makes both passes at once; XLA joins them.
            tf.raw_ops.ResourceApplyGradientDescent(var=average.handle, alpha=tf.cast(rate, behind.dtype), delta=behind)

    @contextlib.contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Lets the model have the average as its weights in this block. The weights come back with the same bits."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def exchange(self) -> None:
        """Exchanges the weights and their average. Nothing may be saved or trained before they are exchanged back."""
        self._exchange()

    def _begin_on_replica(self) -> None:
        for variable, average in zip(self.variables_to_average, self.averages, strict=True):
            # The raw operation, as above.
            tf.raw_ops.AssignVariableOp(resource=average.handle, value=tf.convert_to_tensor(variable.value))

    def _exchange_on_replica(self) -> None:
        for variable, average in zip(self.variables_to_average, self.averages, strict=True):
            weight = variable.value
            values = tf.convert_to_tensor(weight), tf.convert_to_tensor(average)
            # Buffers change their owners: a CPU copies nothing. The raw operation, as above.
            tf.raw_ops.AssignVariableOp(resource=average.handle, value=values[0])
            tf.raw_ops.AssignVariableOp(resource=weight.handle, value=values[1])


def name_of_average(weight: str) -> str:
    """Returns the name that the average of a weight has in a checkpoint."""
    return f"{weight}/average"
