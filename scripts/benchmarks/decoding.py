#!/usr/bin/env -S sh -c '"$(dirname -- "$0")/../venv_python" "$0" "$@"'
"""Measures the speed of generating with a key-value cache, in turn with GPT-2 in KerasNLP and in transformers.

    scripts/benchmarks/decoding.py [--quick] [--batches 1 16] [--peers keras_nlp transformers] [--json OUT]

All models have the same sizes and random weights in float32, write the same number of tokens after prompts of the same
length, and use the same samplers, on the same cores (taskset narrows these). KerasNLP's model is compiled with XLA and
without. transformers (transformers_gpt2.py beside this file) has trainer's own weights, and runs in its own process,
with PyTorch in inference mode, its fused attention, and a dynamic or a static cache. Its greedy texts have to be equal
to trainer's; otherwise nothing is timed. The newest PyTorch and transformers are installed into .venv-torch, once. The
faster variant of each program counts.

TensorFlow has one inter-op thread here, as in `trainer generate`, for trainer and KerasNLP; TF_NUM_INTEROP_THREADS sets
another number.

The others take tokens and return tokens; trainer's times include encoding the prompts and decoding the texts. A ratio
is trainer's speed divided by the other program's, in the same round.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import keras_nlp
import numpy as np
import rich.console

from harness import TORCH, about, install_torch, table_of
from trainer.config.file import make_config
from trainer.config.settings import ModelConfig
from trainer.decoding.decoder import Decoder
from trainer.decoding.generate import Generator
from trainer.distributed.strategy import use_one_inter_op_thread
from trainer.exchange.huggingface_export import write_huggingface
from trainer.model.gpt import GPT
from trainer.system.machine import num_cores
from trainer.tokenizers.tokenizer import Tokenizer
from trainer.tokenizers.vocabulary import SPECIAL_TOKENS
from trainer.tokenizers.wordpiece import WordPieceTokenizer

ROUNDS = 5
TOP_K = 5
SAMPLERS = ("greedy", "top-k")
PEERS = ("keras_nlp", "transformers")
SEED = 0

Figures = dict[str, Any]
# Writes texts, and returns the number of new tokens.
Contestant = Callable[[], int]


class Sizes(NamedTuple):
    """The sizes of the models and of the texts.

    Attributes:
        num_layers: the number of transformer blocks.
        num_heads: the number of attention heads.
        hidden_dim: the width of the model.
        vocabulary_size: the number of tokens in the vocabulary.
        prompt_tokens: the number of tokens of a prompt, without [BOS].
        num_tokens: the number of tokens to write.
    """

    num_layers: int
    num_heads: int
    hidden_dim: int
    vocabulary_size: int
    prompt_tokens: int
    num_tokens: int

    def sequence_length(self) -> int:
        """Returns the number of tokens of a whole text, with [BOS]."""
        return 1 + self.prompt_tokens + self.num_tokens


FULL = Sizes(num_layers=4, num_heads=8, hidden_dim=512, vocabulary_size=5000, prompt_tokens=7, num_tokens=80)
QUICK = Sizes(num_layers=1, num_heads=2, hidden_dim=32, vocabulary_size=100, prompt_tokens=2, num_tokens=5)


def make_tokenizer(vocabulary_size: int) -> Tokenizer:
    """Returns a tokenizer in whose vocabulary each word of three letters is one token."""
    words = map("".join, itertools.product(string.ascii_lowercase, repeat=3))
    known = itertools.islice(words, vocabulary_size - len(SPECIAL_TOKENS))
    return WordPieceTokenizer([*SPECIAL_TOKENS, *known], lowercase=True)


def make_ours(sizes: Sizes, tokenizer: Tokenizer) -> Generator:
    """Returns trainer's generator with random weights, which ends no text early."""
    config = ModelConfig(
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        hidden_dim=sizes.hidden_dim,
        intermediate_dim=4 * sizes.hidden_dim,
        activation="gelu",
        pre_norm=True,
        tied_embeddings=True,
    )
    model = GPT(config, tokenizer.vocabulary_size, sizes.sequence_length(), SEED, "float32", tokenizer.bos_id)
    # The logits of [BOS], and of the tokens that trainer keeps back, become 0, which is never among the largest of this
    # many.
    embeddings = model.token_embedding.embeddings
    is_word = np.arange(tokenizer.vocabulary_size) >= len(SPECIAL_TOKENS)
    embeddings.assign(embeddings * is_word[:, np.newaxis].astype(np.float32))
    return Generator(model, tokenizer, sizes.sequence_length())


def make_theirs(sizes: Sizes) -> keras.Model:
    """Returns KerasNLP's GPT-2 with random weights, up to the hidden states."""
    keras.utils.set_random_seed(SEED)
    return keras_nlp.models.GPT2Backbone(
        sizes.vocabulary_size,
        sizes.num_layers,
        sizes.num_heads,
        sizes.hidden_dim,
        4 * sizes.hidden_dim,
        dropout=0.0,
        max_sequence_length=sizes.sequence_length(),
        dtype="float32",
    )


def prompt_of(tokenizer: Tokenizer, sizes: Sizes) -> str:
    """Returns the prompt of all texts, of different words."""
    return tokenizer.decode(np.arange(len(SPECIAL_TOKENS), len(SPECIAL_TOKENS) + sizes.prompt_tokens))


def writing(generator: Generator, sizes: Sizes, sampler: str, batch_size: int) -> Contestant:
    """Returns the function that writes a batch of texts with trainer."""
    words, decoder = prompt_of(generator.tokenizer, sizes), Decoder(sampler, top_k=TOP_K)

    def write() -> int:
        texts = generator.generate([words] * batch_size, decoder, sizes.num_tokens, SEED)
        return sum(len(text.split()) - sizes.prompt_tokens for text in texts)

    return write


def keras_writing(backbone: keras.Model, sizes: Sizes, sampler: str, batch_size: int, is_compiled: bool) -> Contestant:
    """Returns the function that writes a batch of texts with KerasNLP, with XLA or without."""
    model = keras_nlp.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    samplers = {
        "greedy": keras_nlp.samplers.GreedySampler(),
        "top-k": keras_nlp.samplers.TopKSampler(TOP_K, seed=SEED),
    }
    model.compile(sampler=samplers[sampler], jit_compile=is_compiled)
    is_given = np.arange(sizes.sequence_length()) <= sizes.prompt_tokens
    prompts = {
        "token_ids": np.tile(np.where(is_given, len(SPECIAL_TOKENS), 0).astype(np.int32), (batch_size, 1)),
        "padding_mask": np.tile(is_given, (batch_size, 1)),
    }

    def write() -> int:
        texts = model.generate(prompts, stop_token_ids=None)
        return int(np.sum(texts["padding_mask"]) - np.sum(prompts["padding_mask"]))

    return write


class Transformers:
    """transformers' GPT-2 with the weights of trainer's model, in a process of its own.

    Args:
        generator: trainer's generator.
        sizes: the sizes of its model.
        folder: an empty folder for the model's files.

    Attributes:
        about: the versions of PyTorch and transformers.
    """

    def __init__(self, generator: Generator, sizes: Sizes, folder: Path) -> None:
        self._generator, self._sizes = generator, sizes
        model, tokenizer = generator.model, generator.tokenizer
        train = {"precision": "float32", "total_steps": 1, "sequence_length": sizes.sequence_length()}
        described = {"run_folder": str(folder), "train": train}
        config = make_config(described | {"model": model.config.model_dump(mode="json", exclude_none=True)})
        weights = {variable.path: variable.numpy() for variable in model.variables}
        write_huggingface(weights, config, tokenizer, folder)
        self._prompt = [tokenizer.bos_id, *map(int, tokenizer.encode(prompt_of(tokenizer, sizes)))]
        program = str(Path(__file__).resolve().parent / "transformers_gpt2.py")
        self._process = subprocess.Popen(
            [str(TORCH / "bin" / "python"), program, str(folder), str(num_cores())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._read()

    def writing(self, sampler: str, batch_size: int, is_static: bool) -> Contestant:
        """Returns the function that writes a batch of texts, with a static or a dynamic cache."""

        def write() -> int:
            texts = self._write(sampler, batch_size, is_static)
            return sum(len(text) - len(self._prompt) for text in texts)

        return write

    def check(self, batch_size: int) -> None:
        """Ends the program unless transformers writes the greedy texts that trainer writes."""
        tokenizer = self._generator.tokenizer
        words = prompt_of(tokenizer, self._sizes)
        ours = self._generator.generate([words] * batch_size, Decoder("greedy"), self._sizes.num_tokens, SEED)
        for is_static in (False, True):
            texts = self._write("greedy", batch_size, is_static)
            if [tokenizer.decode(np.array(text[1:])) for text in texts] != ours:
                sys.exit("transformers and trainer write different greedy texts, so their speeds do not compare.")

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _write(self, sampler: str, batch_size: int, is_static: bool) -> list[list[int]]:
        job = {"prompts": [self._prompt] * batch_size, "num_tokens": self._sizes.num_tokens, "is_static": is_static}
        assert self._process.stdin is not None
        print(json.dumps(job | {"top_k": TOP_K if sampler == "top-k" else None}), file=self._process.stdin, flush=True)
        texts: list[list[int]] = self._read()
        return texts

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else sys.exit("transformers ended; the lines above have the reason.")


@contextlib.contextmanager
def transformers_beside(generator: Generator, sizes: Sizes, batches: Sequence[int]) -> Iterator[Transformers]:
    """Runs transformers beside this process; it writes what trainer writes."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = Transformers(generator, sizes, Path(folder))
        try:
            for batch_size in batches:
                theirs.check(batch_size)
            yield theirs
        finally:
            theirs.end()


def compete(contestants: dict[str, Contestant], num_tokens: int) -> Figures:
    """Lets contestants write this many tokens in turn, and compares the first with the fastest variant of each other
    program, round by round. The name of a variant begins with its program's name and a comma.
    """
    secs: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(1 + ROUNDS):
        for name, write in contestants.items():
            start = time.perf_counter()
            num_written = write()
            if number:  # The first round traces and compiles.
                secs[name].append(time.perf_counter() - start)
            assert num_written == num_tokens, f"{name} wrote {num_written} tokens instead of {num_tokens}"
    ours, *others = contestants
    ratios = []
    for program in dict.fromkeys(name.split(",")[0] for name in others):
        variants = [name for name in others if name.split(",")[0] == program]
        best = min(variants, key=lambda name: statistics.median(secs[name]))
        each_ratio = [b / a for a, b in zip(secs[ours], secs[best], strict=True)]
        ratios.append({"compared_with": best, "each_ratio": each_ratio, "ratio": statistics.median(each_ratio)})
    return {
        "num_tokens": num_tokens,
        "contestants": [
            {"name": name, "tokens_per_sec": num_tokens / statistics.median(each), "each_secs": each}
            for name, each in secs.items()
        ],
        "ratios": ratios,
    }


def print_figures(console: rich.console.Console, figures: Figures) -> None:
    """Prints the figures of one sampler and batch size."""
    rows = [[each["name"], f"{each['tokens_per_sec']:,.0f}"] for each in figures["contestants"]]
    title = f"{figures['sampler']}, batch {figures['batch_size']}"
    console.print(table_of(title, ["written by", "tokens/s"], rows, num_names=1))
    for ratio in figures["ratios"]:
        each_ratio = ", ".join(f"{each:.2f}" for each in ratio["each_ratio"])
        console.print(
            f"medians of {ROUNDS} rounds; trainer is {ratio['ratio']:.2f} times as fast as {ratio['compared_with']}, "
            f"median of {each_ratio}",
            highlight=False,
        )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which only show that the benchmark works")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="numbers of texts at once (1 16)")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, help="programs to compare with (all; with --quick only keras_nlp)"
    )
    parser.add_argument("--json", metavar="OUT", type=Path, help="the file to write all figures to")
    options = parser.parse_args()
    peers = options.peers or (PEERS[:1] if options.quick else PEERS)
    sizes = QUICK if options.quick else FULL
    console = rich.console.Console()
    if "transformers" in peers:
        install_torch(console, "--peers keras_nlp", "transformers")
    use_one_inter_op_thread()
    ours, keras_model = make_ours(sizes, make_tokenizer(sizes.vocabulary_size)), make_theirs(sizes)
    report: Figures = {**about(), "keras_nlp": keras_nlp.__version__, "sizes": sizes._asdict(), "decoding": []}
    with contextlib.ExitStack() as stack:
        if "transformers" in peers:
            torch_model = stack.enter_context(transformers_beside(ours, sizes, options.batches))
            report |= torch_model.about
        for sampler, batch_size in itertools.product(SAMPLERS, options.batches):
            contestants = {"trainer": writing(ours, sizes, sampler, batch_size)}
            if "keras_nlp" in peers:
                for name, is_compiled in (("keras_nlp", False), ("keras_nlp, XLA", True)):
                    contestants[name] = keras_writing(keras_model, sizes, sampler, batch_size, is_compiled)
            if "transformers" in peers:
                for name, is_static in (("transformers", False), ("transformers, static cache", True)):
                    contestants[name] = torch_model.writing(sampler, batch_size, is_static)
            figures = compete(contestants, batch_size * sizes.num_tokens)
            report["decoding"].append({"sampler": sampler, "batch_size": batch_size, **figures})
            print_figures(console, report["decoding"][-1])
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
