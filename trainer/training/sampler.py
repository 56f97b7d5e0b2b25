"""Writes the samples of a run between its steps."""

from collections.abc import Callable

import keras
import tensorflow as tf

from trainer.config.settings import SamplesConfig
from trainer.decoding.generate import Generator
from trainer.decoding.samples import warn_about_samples, write_samples
from trainer.distributed.strategy import processor_of
from trainer.model.language_model import adapt
from trainer.model.ops import decoding_ops
from trainer.system.terminal import Say
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.training.split import SplitWeights
from trainer.training.step import TrainingStep


class Sampler:
    """Writes samples with the model of a run at any time.

    If distribution.shard splits the weights, all replicas write together, and gather each block for each token. All
    workers write the same tokens, those of the first replica, and none stops before the others: with several workers
    only the votes in a step end a run. On a TPU XLA would have to know the lengths of prompts when it compiles: there
    the chief gathers the model into the memory of its host for as long as it writes.

    Args:
        training_step: the model and its devices.
        tokenizer: the run's tokenizer.
        config: the settings of the samples.
        say: prints a line.

    Attributes:
        is_in_pieces: whether all workers take part.

    Raises:
        UserError: no samples can be written with these settings.
    """

    def __init__(
        self, training_step: TrainingStep, tokenizer: Tokenizer, config: SamplesConfig, say: Callable[[str], None]
    ) -> None:
        self._training_step, self._tokenizer, self._config = training_step, tokenizer, config
        self._length = training_step.config.train.sequence_length
        self.is_in_pieces = isinstance(training_step.split, SplitWeights)
        strategy, model = training_step.strategy, training_step.model
        device = processor_of(strategy)
        self._gathers_whole = self.is_in_pieces and device.kind == "TPU"
        if self.is_in_pieces:
            # The variables of a model in pieces are on no device. On a TPU this generator only checks the settings.
            ops = decoding_ops(training_step.config.train.precision, device, gathers=True)
            self._generator = Generator(model, tokenizer, self._length, ops, strategy=strategy, held=training_step.held)
        else:
            self._generator = Generator(model, tokenizer, self._length)
        warn_about_samples(self._generator, config, say)

    def write(self, is_chief: bool, say: Say, stop_requested: Callable[[], bool] = lambda: False) -> dict[str, str]:
        """Returns what each sampler writes after the prompt; nothing on workers except the chief. The chief calls it,
        and all workers do if `is_in_pieces`.

        Args:
            is_chief: whether this worker is the chief.
            say: see `write_samples`.
            stop_requested: see `write_samples`. If `is_in_pieces`, it returns the same on all workers.
        """
        if not self.is_in_pieces or not self._config.samplers:
            return write_samples(self._generator, self._config, say, stop_requested) if is_chief else {}
        if not self._gathers_whole:
            samples = write_samples(self._generator, self._config, say, stop_requested)
            return samples if is_chief else {}
        model = self._gathered(is_chief)
        if model is None:
            return {}
        # Without it TensorFlow would copy the weights to a TPU for every token.
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
