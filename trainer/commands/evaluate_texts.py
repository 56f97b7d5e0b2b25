"""Scores a model on texts of one's own: `trainer evaluate RUN --data FILE`."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from trainer.config.settings import Config
from trainer.distributed.strategy import describe_devices, make_strategy
from trainer.distributed.workers import Workers
from trainer.model.language_model import adapt
from trainer.scoring.last_word import LastWords, score_last_words
from trainer.scoring.score import Score, total
from trainer.scoring.scorer import Scorer, checked_stride
from trainer.system.progress import shown
from trainer.system.terminal import say, warn
from trainer.text.source import Input
from trainer.text.sources import Documents, read_texts
from trainer.training.on_devices import open_on_devices


class Texts(NamedTuple):
    """The texts to score, and how.

    Attributes:
        name: the name of the texts in the output.
        inputs: the files.
        documents: what is one text of a text file.
        text_field: the field of JSON Lines that holds a text.
        stride: see `Scorer.results`.
        with_ends: whether the end of each text is scored, too.
        last_word: whether only the last word of each text is scored.
    """

    name: str
    inputs: Sequence[Input]
    documents: Documents
    text_field: str
    stride: int | None
    with_ends: bool
    last_word: bool


def evaluate_texts(path: str, step: str | None, config: Config, texts: Texts, as_json: bool) -> None:
    """Prints the score of a model on some texts.

    Args:
        path: the folder of the model; see `open_model`.
        step: the step of the checkpoint; see `open_model`.
        config: the settings of the model, with the devices to use.
        texts: the texts.
        as_json: whether to print a JSON object instead of a line.

    Raises:
        UserError: the model, the devices, the texts or the stride cannot be used.
    """
    strategy = make_strategy(config.distribution, ignore_workers=True)
    for line in describe_devices(strategy, config.distribution, Workers()):
        warn(line)
    model = open_on_devices(path, strategy, config, step=step, say=warn)
    opened = model.opened
    sequence_length = adapt(opened.model).max_length() or opened.config.train.sequence_length
    stride = checked_stride(texts.stride, sequence_length)
    with shown(warn, "evaluating") as bar:

        def note(num_tokens: int) -> None:
            bar.update(num_tokens, ["tokens"])

        score = _score(model.scorer(sequence_length, note), texts)
    if not as_json:
        # The step of another program's model is not known.
        say(f"{f'step {opened.step}: ' if opened.step else ''}{texts.name}: {score}")
        return
    how = {"documents": texts.documents, "sequence_length": sequence_length, "stride": stride}
    what = {"name": texts.name, "model": str(opened.folder), "step": opened.step, "files": list(map(str, texts.inputs))}
    # Not `say`: a terminal would break the line. JSON has escapes for all that could control a terminal.
    print(json.dumps({**what, **how, "with_ends": texts.with_ends, **score.figures()}), flush=True)


def _score(scorer: Scorer, texts: Texts) -> Score | LastWords:
    read = read_texts(texts.inputs, "--data", texts.documents, texts.text_field, "--text-field")
    if texts.last_word:
        return score_last_words(scorer, read)
    return total(scorer.scores(read, texts.stride, texts.with_ends))
