"""Writes the samples of a run between its steps."""

from collections.abc import Callable

import keras
import tensorflow as tf

from trainer.config.settings import SamplesConfig
from trainer.decoding.generate import Generator
from trainer.decoding.samples import warn_about_samples, write_samples
from trainer.model.language_model import adapt
from trainer.model.ops.plain import PLAIN
from trainer.system.terminal import Say
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.training.split import SplitWeights
from trainer.training.step import TrainingStep


class Sampler:
    """Writes samples with the model of a run at any time.

    If distribution.shard splits the weights, no device has all of them, and to gather each block for each token would
    take long. So the chief gathers the model into the memory of its host for as long as it writes.

    Args:
        training_step: the model and its devices.
        tokenizer: the run's tokenizer.
        config: the settings of the samples.
        say: prints a line.

    Raises:
        UserError: no samples can be written with these settings.
    """

    def __init__(
        self, training_step: TrainingStep, tokenizer: Tokenizer, config: SamplesConfig, say: Callable[[str], None]
    ) -> None:
        self._training_step, self._tokenizer, self._config = training_step, tokenizer, config
        self._length = training_step.config.train.sequence_length
        self.is_in_pieces = isinstance(training_step.split, SplitWeights)
        # With split weights this generator only checks the settings: its model has no values.
        ops = PLAIN if self.is_in_pieces else None
        self._generator = Generator(training_step.model, tokenizer, self._length, ops)
        warn_about_samples(self._generator, config, say)

    def write(self, is_chief: bool, say: Say, stop_requested: Callable[[], bool] = lambda: False) -> dict[str, str]:
        """Returns what each sampler writes after the prompt; nothing on workers except the chief. The chief calls it,
        and all workers do if `is_in_pieces`.

        Args:
            is_chief: whether this worker is the chief.
            say: see `write_samples`.
            stop_requested: see `write_samples`.
        """
        if not self.is_in_pieces or not self._config.samplers:
            return write_samples(self._generator, self._config, say, stop_requested) if is_chief else {}
        model = self._gathered(is_chief)
        if model is None:
            return {}
        # Without it TensorFlow would copy the weights to a GPU for every token.
        with tf.device("/cpu:0"):
            generator = Generator(model, self._tokenizer, self._length)
            return write_samples(generator, self._config, say, stop_requested)

    def _gathered(self, is_chief: bool) -> keras.Model | None:
        """Returns the model with whole weights in the memory of the chief's host; None on other workers, which send
        their pieces.
        """
        split, model = self._training_step.split, self._training_step.model
        assert isinstance(split, SplitWeights)
        if not is_chief:
            for array in split.arrays().values():
                array.send()
            return None
        with tf.device("/cpu:0"):
            whole = type(model).from_config(model.get_config())
            variables = adapt(whole).named_variables()
            for name, array in split.arrays().items():
                variables[name].assign(array.numpy())
        return whole
