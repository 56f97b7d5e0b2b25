"""The card of a model: what it was trained on, for how long, and how well it does, as Markdown.

A number that the run does not know is left out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from trainer.config.schedule import describe_batch_warmup
from trainer.config.settings import Config
from trainer.exchange.open import OpenedModel
from trainer.model.size import count_parameters
from trainer.runs.parentage import describe_history
from trainer.runs.results import Evaluation, read_result, read_scores
from trainer.runs.run_folder import RunFolder
from trainer.version import __version__


class Card(NamedTuple):
    """What is known about a model that leaves its run.

    Attributes:
        name: the name of the run.
        config: the settings of the run.
        step: the steps that the model was trained for.
        num_parameters: the number of weights.
        vocabulary_size: the number of tokens.
        evaluation: the score on the whole validation text; None if this step has none.
        loss: nats per token on the validation batches of an evaluation while training; None if this step has none.
        history: a line for each change of the settings while it was trained, and for each model that it comes from.
    """

    name: str
    config: Config
    step: int
    num_parameters: int
    vocabulary_size: int
    evaluation: Evaluation | None
    loss: float | None
    history: Sequence[str]

    def to_markdown(self, how_to_load: str) -> str:
        """Returns the card.

        Args:
            how_to_load: Python code that loads the model.
        """
        train, decay = self.config.train, self.config.optimizer.ema_decay
        rows = {
            "trained on": f"`{self.config.data.train}`",
            "steps": f"{self.step:,}, each of {train.global_batch_size:,} examples of at most "
            f"{train.sequence_length:,} tokens{describe_batch_warmup(train)}",
            **self._score(),
            **({} if decay is None else {"weights": f"an average over the steps, with a decay of {decay}"}),
            **({"history": "<br>".join(self.history)} if self.history else {}),
            "parameters": f"{self.num_parameters:,}",
            "vocabulary": f"{self.vocabulary_size:,} tokens, {self.config.tokenizer.kind}",
            "context": f"{train.sequence_length:,} tokens, the first of which begins a document",
            "trainer": __version__,
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
        return (
            f"# {self.name}\n\nA GPT language model.\n\n| what | value |\n|---|---|\n{table}\n\n"
            f"## How to load it\n\n```python\n{how_to_load}\n```\n\n"
            f"## Settings\n\n```toml\n{self.config.to_toml().strip()}\n```\n"
        )

    def _score(self) -> dict[str, str]:
        if self.evaluation is not None:
            return {"validation": str(self.evaluation)}
        if self.loss is not None:
            batches = self.config.evaluation.num_batches
            on = "the validation text" if batches is None else f"{batches:,} batches of the validation text"
            return {"validation": f"loss {self.loss:.4f} nats per token, perplexity {math.exp(self.loss):.2f}, on {on}"}
        return {}


def card_of(run: RunFolder, opened: OpenedModel) -> Card:
    """Returns the card of a run's model."""
    result, vocabulary_size = read_result(run, opened.step), opened.tokenizer.vocabulary_size
    return Card(
        name=run.path.name,
        config=run.config,
        step=opened.step,
        num_parameters=count_parameters(run.config, vocabulary_size),
        vocabulary_size=vocabulary_size,
        evaluation=None if result is None else result[0],
        loss=read_scores(run).get(opened.step),
        history=describe_history(run),
    )
