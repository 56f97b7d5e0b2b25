"""The arguments of each verb, by argparse."""

import argparse
import re
from typing import Any, NoReturn

from trainer.exit_status import ExitStatus
from trainer.system.terminal import printable
from trainer.version import __version__

# A message can quote a whole line of a file, and must not fill the terminal with it.
_MAX_LINE_CHARS = 1_000
_MAX_LINES = 60


class _Parser(argparse.ArgumentParser):
    """A parser that prints its errors in the form of a verb's errors."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **arguments)

    def error(self, message: str) -> NoReturn:
        """Prints the usage and what is wrong, and ends with ExitStatus.USER_ERROR, which is argparse's own."""
        super().error(shortened(message))


def parse(words: list[str]) -> argparse.Namespace:
    """Returns the verb and its arguments; a mistake in these ends the process with ExitStatus.USER_ERROR."""
    parser = make_parser()
    beam_options: list[str] = []
    if words[:1] == ["prepare"] and "--" in words:
        words, beam_options = words[: words.index("--")], words[words.index("--") + 1 :]
    if not words:
        parser.print_help()
        parser.exit()
    options, rest = parser.parse_known_args(words)
    options.beam_options = beam_options
    # After an option argparse accepts no further overrides, and no prompt.
    if hasattr(options, "text"):
        rest = _tell_apart(options, rest)
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _tell_apart(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """Tells the prompt of `generate` apart from the overrides, which may come in any order. Returns the words that are
    neither.
    """
    words = [word for word in (options.text, *options.overrides) if word is not None]
    words += [word for word in rest if word[:1] != "-"]
    options.overrides = [word for word in words if re.match(r"distribution\.\w+=", word)]
    if options.overrides:
        # The verb refuses another setting. Without an override it is a prompt, as any text may be.
        options.overrides = [word for word in words if re.match(r"[a-z_]+(\.\w+)+ ?=", word)]
    prompts = [word for word in words if word not in options.overrides]
    options.text = prompts[0] if prompts else None
    return [*prompts[1:], *(word for word in rest if word[:1] == "-")]


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command, with one for each verb."""
    statuses = "\n".join(f"  {status:<5d} {status.meaning}" for status in ExitStatus)
    parser = _Parser(
        prog="trainer",
        description="Trains GPT language models on your own text.",
        epilog=f"`trainer VERB --help` lists the arguments of a verb.\n\nexit status:\n{statuses}",
    )
    parser.add_argument("--version", action="version", version=f"trainer {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    for add in (
        _add_prepare,
        _add_train,
        _add_fork,
        _add_inspect,
        _add_evaluate,
        _add_generate,
        _add_export,
        _add_verify,
        _add_plan,
        _add_doctor,
        _add_runs,
        _add_report,
        _add_compare,
        _add_completion,
        _add_watch,
    ):
        add(verbs)
    return parser


def _add_prepare(verbs: Any) -> None:
    parser = verbs.add_parser("prepare", help="turn text into token shards; train does this too if they are missing")
    _add_config(parser)
    parser.add_argument(
        "--runner",
        default="local",
        choices=("local", "beam"),
        help="beam: the workers of Apache Beam encode a file each, and write the same bytes. By default they are "
        "processes on this machine, one per core. Beam's own options follow -- at the end and name other workers, for "
        "example: -- --runner=FlinkRunner --flink_master=HOST:8081. Every worker needs the same version of trainer, "
        "and access to the files and to data.prepared_folder (default: %(default)s)",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch the text first if it is not there; for the texts of the configs minigpt and shakespeare_char",
    )


def _add_train(verbs: Any) -> None:
    parser = verbs.add_parser(
        "train",
        help="train a model, or resume a run",
        epilog="SIGINT (Ctrl-C), SIGTERM and SIGHUP stop it at any time. It saves the steps that it has\n"
        f"taken and exits with status {ExitStatus.STOPPED:d}. Go on with --resume RUN, or with the same command and\n"
        "--or-resume.",
    )
    parser.add_argument("config", nargs="?", help=_CONFIG_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=_OVERRIDES_HELP)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="resume the run in this folder, with the config saved there; the overrides may change what "
        "leaves the weights as they are, and train.total_steps if the schedule allows it",
    )
    parser.add_argument(
        "--or-resume", action="store_true", help="if the config's run_folder already holds a run, resume that run"
    )
    _add_step(parser, "with --resume: the checkpoint to resume from")


def _add_fork(verbs: Any) -> None:
    parser = verbs.add_parser(
        "fork",
        help="go on from a run's newest checkpoint as a new run, by another plan",
        epilog="A fork has the weights, the optimizer, the steps and the tokenizer of its parent. Its learning rate,\n"
        "schedule, length, batch size or text may be others. Signals stop it as they stop train. Go on with it by\n"
        "trainer train --resume NEW.",
    )
    parser.add_argument("run_folder", metavar="RUN", help=f"{_RUN_HELP}, or RUN@N")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="run_folder=NEW, and the settings that are not the parent's, such as train.total_steps=3000",
    )
    _add_step(parser, "the checkpoint to go on from")


def _add_inspect(verbs: Any) -> None:
    parser = verbs.add_parser("inspect", help="verify prepared data, and show what is in it")
    parser.add_argument("path", metavar="PATH", help="a prepared folder, or a run's folder for the data of that run")
    parser.add_argument(
        "--split",
        default="train",
        choices=("train", "validation"),
        help="the split whose lengths and documents are shown (default: %(default)s)",
    )
    parser.add_argument(
        "--examples", type=int, default=3, help="the number of documents to show (default: %(default)s)"
    )
    parser.add_argument(
        "--sequence-length", type=int, help='also show how much data.mode="lines" would cut at this length'
    )


def _add_evaluate(verbs: Any) -> None:
    parser = verbs.add_parser("evaluate", help="score a model on its run's validation text, or on any text")
    parser.add_argument(
        "run_folder", metavar="RUN", help=f"{_RUN_HELP}; with --data also a model in Hugging Face's form"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="other devices than the run's, or another place of its data: distribution.kind=cpu, "
        "data.prepared_folder=FOLDER",
    )
    _add_step(parser, "the checkpoint to score")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="files or folders of text, as in data.train, or globs of these in quotation marks (default: the "
        "validation text of the run)",
    )
    parser.add_argument("--name", help="with --data: the name of these texts in the output (default: the files)")
    parser.add_argument(
        "--documents",
        choices=("file", "line", "paragraph", "auto"),
        help="with --data: what is one text of a text file, as in data.documents; each record or row is one "
        "(default: file)",
    )
    parser.add_argument("--text-field", help="with --data: the field or column that holds a text (default: text)")
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="with --data: how a text longer than the model's context is read. Each window after the first scores only "
        "N tokens, and has the tokens before them as context: smaller is slower and more exact (default: the context, "
        "which is fastest)",
    )
    parser.add_argument(
        "--with-ends",
        action="store_true",
        help="with --data: also score the end of each text, as the run's own evaluation of whole lines does",
    )
    parser.add_argument(
        "--last-word",
        action="store_true",
        help="with --data: score only the last word of each text, as the LAMBADA benchmark does",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def _add_generate(verbs: Any) -> None:
    parser = verbs.add_parser("generate", help="write text with a run's newest checkpoint")
    parser.add_argument("run_folder", metavar="RUN", help=_RUN_HELP)
    _add_step(parser, "the checkpoint to write with")
    parser.add_argument(
        "text",
        nargs="?",
        metavar="PROMPT",
        help="the text to continue (default: on a terminal, ask for prompts; otherwise none, which begins a new text)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="other devices, such as distribution.kind=cpu; the first of them writes, or, with "
        "distribution.shard=weights, all of them, which hold the model together",
    )
    parser.add_argument("--prompt", help="the same as PROMPT")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='a file of prompts: a line each, or JSON Lines (.jsonl) or a table with "prompt"; prints JSON Lines',
    )
    parser.add_argument("--json", action="store_true", help="print each text as JSON, with what is known about it")
    run_s = "(default: the run's own, samples.{})"
    parser.add_argument(
        "--sampler",
        default="top-p",
        help="greedy, beam, random, top-k, top-p or min-p; random draws from all tokens, or from those that --k, --p "
        "and --min-p leave (default: %(default)s)",
    )
    parser.add_argument("--k", type=int, help=f"draw from this many likeliest tokens {run_s.format('top_k')}")
    parser.add_argument(
        "--p",
        type=float,
        help=f"draw from the fewest tokens that together have this probability {run_s.format('top_p')}",
    )
    parser.add_argument(
        "--min-p", type=float, help="draw from tokens with this share of the likeliest one's probability (default: 0.1)"
    )
    parser.add_argument(
        "--temperature", type=float, help=f"divides the logits before a draw {run_s.format('temperature')}"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, help="more than 1: tokens that the text holds become less likely"
    )
    parser.add_argument("--num-beams", type=int, help=f"the number of beams {run_s.format('num_beams')}")
    parser.add_argument("--length-penalty", type=float, help="more than 0: beam search prefers longer texts")
    parser.add_argument("--num-tokens", type=int, help=f"the most tokens to write {run_s.format('num_tokens')}")
    parser.add_argument(
        "--stop",
        action="append",
        help=f"a text that ends a sample, or several: repeat it; in bash a line break is $'\\n' {run_s.format('stop')}",
    )
    parser.add_argument(
        "--stop-token",
        dest="stop_tokens",
        metavar="ID",
        type=int,
        action="append",
        help="a token that ends a sample and is left out, by its number; may be repeated",
    )
    parser.add_argument("--seed", type=int, help="decides what is drawn (default: 0)")
    parser.add_argument(
        "--num-samples", type=int, help="the number of texts for each prompt; beam: its best texts (default: 1)"
    )
    parser.add_argument(
        "--sliding-window",
        action="store_true",
        default=None,
        help="go on when the context is full, with the last half of the text as the new context",
    )
    parser.add_argument(
        "--batch-size", type=int, help="the most texts to write at a time; each beam counts as one (default: 32)"
    )


def _add_export(verbs: Any) -> None:
    parser = verbs.add_parser("export", help="write a run's newest checkpoint in the format of other programs")
    parser.add_argument("run_folder", metavar="RUN", help=_RUN_HELP)
    parser.add_argument("--to", required=True, metavar="FORMAT", help="huggingface, savedmodel, keras or kerashub")
    _add_step(parser, "the checkpoint to write")
    parser.add_argument(
        "--dtype", default="float32", help="float32, or bfloat16 for huggingface (default: %(default)s)"
    )
    parser.add_argument(
        "--output", metavar="PATH", help="the file or folder to write (default: beside the run's folder)"
    )


def _add_verify(verbs: Any) -> None:
    parser = verbs.add_parser("verify", help="check that a config gives the same model on any number of replicas")
    _add_config(parser)
    parser.add_argument("--replicas", default="1,2,4", help="the numbers of replicas to compare (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="the steps to train with each (default: %(default)s)")


def _add_plan(verbs: Any) -> None:
    parser = verbs.add_parser("plan", help="estimate what a config costs: parameters, memory, tokens, disk and hours")
    _add_config(parser)
    parser.add_argument(
        "--target", help="the devices to plan for, such as gpu:H100x8, tpu:v5e-8 or cpu; by default this machine's"
    )
    parser.add_argument(
        "--utilisation", type=float, help="the model FLOPs utilisation to compute hours with, such as 0.5"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="report how much memory the step needs, by the target's own compiler; takes minutes",
    )
    parser.add_argument("--weights", action="store_true", help="list every weight")
    parser.add_argument(
        "--vocabulary-size", type=int, help="the vocabulary size, if only the text decides it, as with characters"
    )


def _add_doctor(verbs: Any) -> None:
    parser = verbs.add_parser(
        "doctor",
        help="check packages, devices, folders and limits, and print how to repair what is wrong",
        epilog="A line for each check: ok, warning or error, and after the last two how to repair it.",
    )
    parser.add_argument(
        "config", nargs="?", help=f"{_CONFIG_HELP}; without one the folders runs and prepared are checked"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=_OVERRIDES_HELP)
    parser.add_argument("--json", action="store_true", help="print a JSON list of all that was found")


def _add_runs(verbs: Any) -> None:
    parser = verbs.add_parser("runs", help="list the runs in a folder: how far each is, its losses and its age")
    parser.add_argument(
        "folder",
        nargs="?",
        default="runs",
        metavar="FOLDER",
        help="a folder with runs in it, also in folders below it; or a run's own folder (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each run, a line each")


def _add_report(verbs: Any) -> None:
    parser = verbs.add_parser("report", help="show how a run went: scores, curves, time and samples")
    parser.add_argument("run_folder", metavar="RUN", help=_RUN_HELP)
    _add_html(parser, "report.html in the run's folder")


def _add_compare(verbs: Any) -> None:
    parser = verbs.add_parser("compare", help="show runs side by side: settings, scores, curves and samples")
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="the folders of two runs or more")
    _add_html(parser, "compare.html in the current folder")


def _add_html(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--html",
        nargs="?",
        const="",
        metavar="FILE",
        help=f"write a page instead, which a browser opens without a network; stands after RUN (default: {default})",
    )


def _add_completion(verbs: Any) -> None:
    parser = verbs.add_parser(
        "completion",
        help="print what makes a shell complete verbs, settings, configs and runs",
        epilog='bash and zsh: eval "$(trainer completion bash)", or zsh, in ~/.bashrc or ~/.zshrc.\n'
        "fish: trainer completion fish | source, in ~/.config/fish/config.fish.",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")


def _add_watch(verbs: Any) -> None:
    parser = verbs.add_parser(
        "watch",
        help="follow a run that another process trains, here or on another host",
        epilog="It reads the run's folder, which may be on a shared disk or in an object store, and ends when the run\n"
        f"ends: with status {ExitStatus.DONE:d} if it is finished, {ExitStatus.STOPPED:d} if it was stopped, "
        f"{ExitStatus.FAILED:d} if it was killed.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the folder of a run; it may begin later")
    parser.add_argument("--once", action="store_true", help="print the state of the run, and end")


_CONFIG_HELP = "a TOML file, or the name of a shipped config, such as quickstart"
_OVERRIDES_HELP = "settings that override the config, such as train.total_steps=200"
_RUN_HELP = "the folder of a run, or of one of its checkpoints"


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help=_CONFIG_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=_OVERRIDES_HELP)


def _add_step(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--step",
        metavar="N|best",
        help=f"{what}: the one after N steps, or the one with the lowest validation loss (default: the newest)",
    )


def shortened(text: str) -> str:
    """Returns a message in the form in which it is printed: a quoted text cannot control the terminal or fill it.

    A long line keeps its start, which names the mistake, and its end, which explains what to do.
    """
    kept = _MAX_LINE_CHARS // 2
    lines = printable(text).split("\n")
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES // 2 : -_MAX_LINES // 2] = ["[...]"]
    return "\n".join(f"{line[:kept]} [...] {line[-kept:]}" if len(line) > _MAX_LINE_CHARS else line for line in lines)
