"""Lets EleutherAI's lm-evaluation-harness score a model of trainer: `lm_eval --model trainer --model_args run=RUN`.

trainer does not require the harness, and only this module imports it. The harness finds the class by the entry point
lm_eval.models. Releases up to 0.4.13 do not look for entry points; for them this module is a program that takes the
harness's own arguments:

    python -m trainer.commands.lm_eval_adapter --model trainer --model_args run=RUN --tasks TASK
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import lm_eval.models  # noqa: F401 (registers the harness's own models, which it does only if none is registered)
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry

from trainer.config.file import make_config
from trainer.decoding.decoder import Decoder
from trainer.decoding.generate import Generator
from trainer.decoding.request import Request
from trainer.distributed.strategy import make_strategy
from trainer.errors import UserError
from trainer.exchange.open import read_config
from trainer.model.language_model import adapt
from trainer.scoring.scorer import ScoredText, tokenized
from trainer.system.terminal import warn
from trainer.training.on_devices import open_on_devices

# The names that tasks give to the most tokens to write, and how many that are if a task has none of them.
_NUM_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NUM_TOKENS = 256


class TrainerModel(TemplateLM):
    """A model of trainer, as the harness reads it. Each text begins with [BOS].

    Args:
        run: the folder of the model; see `open_model`.
        step: the step of the checkpoint, or "best"; None: the newest.
        device: cpu or cuda; None: the devices of the run.
        logical_devices: the number of replicas that a CPU is split into.
        batch_size: not read: a batch has as many texts as have a certain number of tokens.
        max_batch_size: not read.

    Raises:
        UserError: the folder holds no model, or a device is not there.
    """

    def __init__(
        self,
        run: str,
        step: int | str | None = None,
        device: str | None = None,
        logical_devices: int = 1,
        batch_size: object = None,
        max_batch_size: object = None,
    ) -> None:
        super().__init__()
        overrides = [f"distribution.logical_devices={logical_devices}"] if logical_devices != 1 else []
        if device is not None:
            kind = {"cpu": "cpu", "cuda": "gpu"}.get(str(device))
            if kind is None:
                raise UserError(f"device={device!r} is not known; use cpu, or cuda for all GPUs.")
            overrides += [f"distribution.kind={kind}", "distribution.gpus=none"]
        config = make_config(read_config(run, step=step).model_dump(mode="json"), overrides)
        strategy = make_strategy(config.distribution, ignore_workers=True)
        model = open_on_devices(run, strategy, config, step=step, say=warn)
        opened = model.opened
        self._tokenizer = opened.tokenizer
        self.max_length = adapt(opened.model).max_length() or opened.config.train.sequence_length
        self._scorer = model.scorer(self.max_length)
        self._generator = (
            model.generator()
            if model.is_in_pieces
            else Generator(opened.model, opened.tokenizer, self.max_length, end_tokens=opened.end_tokens)
        )
        self._folder = opened.folder

    @property
    def eot_token_id(self) -> int:
        """The token at the end of a text, which is [BOS]; the harness also puts it before a text without a context."""
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, by which the harness keeps prepared requests: the model's folder."""
        return str(self._folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: object) -> list[int]:
        """Returns [BOS] and the tokens of a text; without [BOS] if add_special_tokens is False."""
        bos = [] if add_special_tokens is False else [self._tokenizer.bos_id]
        return bos + [int(token) for token in self._tokenizer.encode(string)]

    def loglikelihood_rolling(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text."""
        texts = [request.args[0] for request in requests]
        answers = [-score.nats for score, _ in self._scorer.results(tokenized(self._tokenizer, texts))]
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: object
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether greedy decoding writes it.

        Args:
            requests: for each its texts, the tokens of its context, at least one, and those of its continuation.
            options: not read.
        """
        texts = [
            ScoredText(np.array([*context, *continuation], np.int32), len(context) - 1, 0, 0)
            for _, context, continuation in requests
        ]
        answers = [(-score.nats, is_right) for score, is_right in self._scorer.results(texts)]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each context, cut before the first of its stops."""
        asked = [request.args for request in requests]
        answers = dict[int, str]()
        groups: dict[str, list[int]] = {}
        for number, (_, arguments) in enumerate(asked):
            groups.setdefault(json.dumps(arguments, sort_keys=True), []).append(number)
        for numbers in groups.values():
            # Contexts of about one length are continued together.
            numbers.sort(key=lambda number: len(asked[number][0]))
            answers |= zip(numbers, self._continue([asked[n][0] for n in numbers], asked[numbers[0]][1]), strict=True)
        for number, each in enumerate(asked):
            self.cache_hook.add_partial("generate_until", each, answers[number])
        return [answers[number] for number in range(len(asked))]

    def _continue(self, contexts: list[str], arguments: dict[str, Any]) -> list[str]:
        """Returns the continuation of each context.

        Args:
            contexts: the texts to continue; a start that leaves no room is left out.
            arguments: the harness's arguments of a generation.
        """
        until = arguments.get("until") or []
        until = [until] if isinstance(until, str) else [each for each in until if each]
        most = next((int(arguments[name]) for name in _NUM_TOKENS_NAMES if name in arguments), _NUM_TOKENS)
        num_tokens = max(1, min(most, self.max_length - 2))
        request = Request(_decoder(arguments), num_tokens, stop=[each for each in until if self._can_write(each)])
        kept = [self._end_of(context, max(1, self.max_length - 1 - num_tokens)) for context in contexts]
        written = [text.continuation for text in self._generator.texts(kept, request)]
        return [_before(text, until) for text in written]

    def _end_of(self, context: str, num_tokens: int) -> str:
        """Returns the end of a context that has this many tokens; all of it if it has no more."""
        tokens = self._tokenizer.encode(context)
        return context if len(tokens) <= num_tokens else self._tokenizer.decode(tokens[-num_tokens:])

    def _can_write(self, stop: str) -> bool:
        """Whether the model can write a stop at all: its vocabulary may have no tokens for it."""
        try:
            return bool(self._generator.as_written(stop))
        except UserError:
            return False


def _decoder(arguments: dict[str, Any]) -> Decoder:
    """Returns the decoder that the harness's arguments describe: greedy, unless they ask for samples."""
    temperature = float(arguments.get("temperature") or 0.0)
    if not arguments.get("do_sample", temperature > 0):
        return Decoder("greedy")
    top_k, top_p = arguments.get("top_k"), arguments.get("top_p")
    return Decoder("random", top_k=top_k or None, top_p=top_p or None, temperature=temperature or 1.0)


def _before(text: str, stops: Iterable[str]) -> str:
    """Returns a text up to the first of some stops."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


if "trainer" not in model_registry:
    # The name of the class, not the class: the harness may have imported this module by it.
    model_registry.register("trainer", target="trainer.commands.lm_eval_adapter:TrainerModel")

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
