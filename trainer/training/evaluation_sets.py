"""Scores a model on the texts that evaluation.sets names, besides the validation text."""

from collections.abc import Callable

import keras
import tensorflow as tf

from trainer.config.settings import Config
from trainer.distributed.strategy import processor_of
from trainer.errors import UserError
from trainer.model.held import WHOLE, Held
from trainer.model.language_model import adapt
from trainer.model.ops import scoring_ops
from trainer.scoring.score import Score
from trainer.scoring.scorer import Scorer, tokenized
from trainer.text.sources import find_inputs, read_texts
from trainer.tokenizers.tokenizer import Tokenizer


class EvaluationSets:
    """The texts of evaluation.sets, read and tokenized once. Scoring them does not change the model.

    Args:
        model: a GPT, or any Keras model that returns logits.
        strategy: the strategy under whose scope the model was built.
        tokenizer: the run's tokenizer.
        config: the run's configuration.
        held: returns, in a replica function, how the layers of a GPT get their weights.

    Raises:
        UserError: a file is missing or cannot be read.
    """

    def __init__(
        self,
        model: keras.Model,
        strategy: tf.distribute.Strategy,
        tokenizer: Tokenizer,
        config: Config,
        held: Callable[[], Held] = lambda: WHOLE,
    ) -> None:
        # The variables of a model whose weights are split are on no device.
        ops = scoring_ops(config.train.precision, processor_of(strategy)) if adapt(model).is_gpt else None
        self._scorer = Scorer(model, tokenizer, config.train.sequence_length, strategy, held=held, ops=ops)
        self._texts = {}
        for name, sources in config.evaluation.sets.items():
            setting = f"evaluation.sets.{name}"
            texts = read_texts(find_inputs(sources, setting), setting, config.data.documents, config.data.text_field)
            self._texts[name] = list(tokenized(tokenizer, texts))

    def __call__(self) -> dict[str, Score]:
        """Returns the score of each text, by its name."""
        scores = self.until_stopped(lambda: False)
        assert scores is not None
        return scores

    def until_stopped(self, stop_requested: Callable[[], bool]) -> dict[str, Score] | None:
        """Scores each text, until a stop is requested. Every worker calls this, and scores its share.

        Returns:
            The scores by name. None if stop_requested, which is called after each batch, has returned True.

        Raises:
            UserError: the workers have different texts.
        """
        scores = {}
        for name, texts in self._texts.items():
            try:
                score = self._scorer.total(texts, stop_requested)
            except UserError as error:
                raise UserError(f"evaluation.sets.{name}: {error}") from None
            if score is None:
                return None
            scores[name] = score
        return scores
