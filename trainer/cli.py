"""The command line: reads arguments, loads what a verb needs, and turns errors a user can mend into messages.

Imports the standard library only until `main` watches for signals.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from trainer.distributed.tpu_install import check_tpu_install
from trainer.errors import UserError
from trainer.system.signals import EXIT_STOPPED, STOPPING, Ending, ended_by
from trainer.system.storage import REMEDIES, Url, locate, reason_and_remedy
from trainer.system.terminal import (
    discard,
    lasting_errors,
    lasting_output,
    open_streams,
    printable,
    quiet_import,
    say,
    warn,
)
from trainer.version import __version__

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.training.run_folder import Step

EXIT_USER_ERROR = 2
# What a shell says of a program that a closed pipe ends, as it does others behind `| head`.
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE

OVERRIDES_HELP = "settings that replace the file's, such as train.total_steps=200"

# A message that quotes a file of one line would fill the terminal with it.
_MAX_LINE_CHARS = 1_000
_MAX_LINES = 60

_SAME_COMMAND = "Start it again with the same command."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status.

    0: done. 1: what was to be verified is not so. 2: a message says what to mend. 75: `train` was stopped by SIGINT,
    SIGTERM or SIGHUP, whatever it was doing, and says how to go on. 130: another verb was stopped by Ctrl-C. 141:
    nobody reads standard output any more.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    open_streams()
    with lasting_errors():
        if words[:1] == ["prepare"]:  # Ctrl-C is an exception there, as it leaves what can be gone on with.
            return _run(words, Ending())
        if words[:1] != ["train"]:
            with ended_by([signal.SIGINT], Ending()):
                return _run(words, Ending())
        ending = Ending(EXIT_STOPPED, lambda: f"No run was begun. {_SAME_COMMAND}")
        with ended_by(STOPPING, ending):
            status = _run(words, ending)
    if arguments is None:
        for number in STOPPING:  # All is done: a signal could only change the status that says so.
            signal.signal(number, signal.SIG_IGN)
    return status


def _run(words: list[str], ending: Ending) -> int:

    try:
        try:
            options = _parse(words)
            options.ending = ending
            return int(options.run(options) or 0)
        finally:
            sys.stdout.flush()
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        warn("trainer: stopped.")
        return 130
    except BrokenPipeError:
        discard(sys.stdout)
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(OSError(f"{where}{reason_and_remedy(error)}."))


def _fail(error: Exception) -> int:
    warn(f"trainer: {_message(str(error))}")
    return EXIT_USER_ERROR


def _message(text: str) -> str:
    """Returns a message as it is printed: what it quotes can neither steer a terminal nor fill it.

    A line keeps its start, which says where the mistake is, and its end, which says what to do.
    """
    kept = _MAX_LINE_CHARS // 2
    lines = printable(text).split("\n")
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES // 2 : -_MAX_LINES // 2] = ["[...]"]
    return "\n".join(f"{line[:kept]} [...] {line[-kept:]}" if len(line) > _MAX_LINE_CHARS else line for line in lines)


class _Parser(argparse.ArgumentParser):
    """Prints its errors as those of the verbs are printed."""

    def error(self, message: str) -> NoReturn:
        """Prints how the command is used and what is wrong, and ends with a status of 2."""
        super().error(_message(message))


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _parser()
    beam_options: list[str] = []
    if words[:1] == ["prepare"] and "--" in words:
        words, beam_options = words[: words.index("--")], words[words.index("--") + 1 :]
    if not words:
        parser.print_help()
        parser.exit()
    options, rest = parser.parse_known_args(words)
    options.beam_options = beam_options
    # argparse takes no further overrides, and no prompt, once an option came between.
    if len(rest) == 1 and rest[0][:1] != "-" and getattr(options, "text", "") is None:
        options.text = rest.pop()
    if rest and not (hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> _Parser:
    parser = _Parser(prog="trainer", description="Train GPT language models on your own text.")
    parser.add_argument("--version", action="version", version=f"trainer {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    prepare = verbs.add_parser(
        "prepare", help="turn text into token shards, which train does too where they are missing"
    )
    _add_config(prepare)
    prepare.add_argument(
        "--runner",
        default="local",
        choices=("local", "beam"),
        help="beam: Apache Beam has each file encoded by one of its workers, to the same bytes. Those are processes "
        "on this machine, one per core, unless Beam's own options, which follow -- at the end, name others, as in: "
        "-- --runner=FlinkRunner --flink_master=HOST:8081. Workers need the same trainer and have to see the files and "
        "data.prepared_folder (default: %(default)s)",
    )
    prepare.set_defaults(run=_prepare)

    train = verbs.add_parser(
        "train",
        help="train a model, or go on with a run",
        epilog=f"Exit status {EXIT_STOPPED}: SIGINT (Ctrl-C), SIGTERM or SIGHUP stopped it, whatever it was doing; all "
        "steps are saved. Go on with --resume RUN, or with the same command and --or-resume.",
    )
    train.add_argument("config", nargs="?", help="a TOML file, or the name of a shipped config, such as quickstart")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help=OVERRIDES_HELP)
    train.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, by the config kept there")
    train.add_argument(
        "--or-resume", action="store_true", help="go on with the config's run where its folder is there already"
    )
    _add_step(train, "with --resume, go on from")
    train.set_defaults(run=_train)

    inspect = verbs.add_parser("inspect", help="verify prepared data, and show what is in it")
    inspect.add_argument("path", metavar="PATH", help="prepared folder, or a run's, for the data it was started on")
    inspect.add_argument(
        "--split", default="train", choices=("train", "validation"), help="for lengths and examples (default: train)"
    )
    inspect.add_argument("--examples", type=int, default=3, help="documents to show (default: %(default)s)")
    inspect.add_argument("--sequence-length", type=int, help="also say what this one would cut")
    inspect.set_defaults(run=_inspect)

    evaluate = verbs.add_parser("evaluate", help="score a run's newest checkpoint on the whole validation text")
    evaluate.add_argument("run_folder", metavar="RUN", help="folder of the run, or of one of its checkpoints")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="devices or a place of the data other than the run's: distribution.kind=cpu, data.prepared_folder=FOLDER",
    )
    _add_step(evaluate, "score")
    evaluate.set_defaults(run=_evaluate)

    generate = verbs.add_parser("generate", help="let a run's newest checkpoint write")
    generate.add_argument("run_folder", metavar="RUN", help="folder of the run, or of one of its checkpoints")
    _add_step(generate, "write with")
    generate.add_argument("text", nargs="?", metavar="PROMPT", help="text to continue; left out, a new text is begun")
    generate.add_argument("--prompt", help="the same")
    generate.add_argument("--sampler", default="top-p", help="greedy, beam, top-k or top-p (default: %(default)s)")
    generate.add_argument("--k", type=int, help="of top-k; this and what follows defaults to the run's own settings")
    generate.add_argument("--p", type=float, help="of top-p")
    generate.add_argument("--num-beams", type=int, help="of beam")
    generate.add_argument("--temperature", type=float, help="of top-k and top-p")
    generate.add_argument("--num-tokens", type=int, help="how many to write at most")
    generate.add_argument("--stop", help="text that ends a sample; in bash a line break is $'\\n'")
    generate.add_argument("--seed", type=int, help="of top-k and top-p; left out, 0")
    generate.add_argument("--num-samples", type=int, default=1, help="how many texts to write (default: %(default)s)")
    generate.set_defaults(run=_generate)

    verify = verbs.add_parser("verify", help="prove that a config gives the same model on any number of replicas")
    _add_config(verify)
    verify.add_argument("--replicas", default="1,2,4", help="numbers of replicas to compare (default: %(default)s)")
    verify.add_argument("--steps", type=int, default=5, help="steps to train on each (default: %(default)s)")
    verify.set_defaults(run=_verify)

    plan = verbs.add_parser("plan", help="show what a config costs: parameters, memory, tokens, disk and hours")
    _add_config(plan)
    plan.add_argument("--target", help="devices to plan for, such as gpu:H100x8, tpu:v5e-8 or cpu")
    plan.add_argument("--utilisation", type=float, help="model FLOPs utilisation to tell hours by, such as 0.5")
    plan.add_argument("--compile", action="store_true", help="ask the target's own compiler for its memory; minutes")
    plan.add_argument("--weights", action="store_true", help="list every weight")
    plan.add_argument("--vocabulary-size", type=int, help="where the config does not say it, as with characters")
    plan.set_defaults(run=_plan)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a TOML file, or the name of a shipped config, such as quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=OVERRIDES_HELP)


def _add_step(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--step",
        metavar="N|best",
        help=f"{what} the checkpoint after this many steps, or the one with the lowest validation loss (default: the "
        "newest)",
    )


def _read_config(options: argparse.Namespace) -> "Config":
    from trainer.config_file import load_config

    return load_config(options.config, options.overrides)


def _prepare(options: argparse.Namespace) -> None:
    if options.beam_options and options.runner != "beam":
        raise UserError(
            f"-- {' '.join(options.beam_options)}: options of Apache Beam; add --runner beam before the --."
        )
    config = _read_config(options)
    with ended_by([signal.SIGINT], Ending()), quiet_import():
        from trainer.data.beam import prepare_with_beam
        from trainer.data.prepare import check_sources, prepare

        check_sources(config)  # First: a misspelt path should not wait for TensorFlow, which WordPiece takes.
        if config.tokenizer.kind == "wordpiece":
            import trainer.data.wordpiece  # noqa: F401
    if options.runner == "beam":
        prepare_with_beam(config, options.beam_options, say)
    else:
        prepare(config, say)


def _train(options: argparse.Namespace) -> int:
    if options.resume is None and options.config is None:
        raise UserError("train needs a config, such as quickstart or your own TOML file, or --resume RUN.")
    if options.resume is not None:
        if options.or_resume:
            raise UserError(f"--resume {options.resume} and --or-resume, which goes with a config: leave out one.")
        from trainer.training.run_folder import RunFolder, run_and_step

        overrides = [word for word in (options.config, *options.overrides) if word is not None]
        files = [word for word in overrides if "=" not in word]
        if files:
            raise UserError(
                f"--resume {options.resume} goes on with the config that this run keeps; leave out {files[0]!r}, or "
                "start a new run with it."
            )
        run_folder, step = run_and_step(options.resume, options.step)
        RunFolder(run_folder, overrides).check_model(None)
        options.ending.advice = lambda: f"Go on with: trainer train --resume {shlex.quote(str(run_folder))}"
    else:
        if options.step is not None:
            raise UserError(f"--step {options.step} goes with --resume RUN; a new run begins at step 0. Leave it out.")
        from trainer.distributed.workers import find_workers
        from trainer.training.run_folder import find_run

        config = _read_config(options)
        if config.distribution.kind == "tpu":
            check_tpu_install()
        is_new = find_run(config, options.or_resume) is None
        options.ending.advice = lambda: _how_to_go_on(config)
        with quiet_import():
            if is_new:
                from trainer.data.prepare import check_sources

                check_sources(config)  # A misspelt path should not wait for TensorFlow.
            # On SLURM TensorFlow finds them.
            find_workers(config.distribution)
    with quiet_import():
        from trainer.training import loop

    with lasting_output():
        if options.resume is None:
            result = loop.start(config, or_resume=options.or_resume)
        else:
            result = loop.resume(run_folder, overrides=overrides, step=step)
        if result.is_stopped:
            return EXIT_STOPPED
        for name, text in result.samples.items():
            say(f"\n{name}{_story_verdict(text) if result.tells_stories else ''}:\n{text}")
        say(f"\nvalidation: {result.evaluation}")
    return 0


def _how_to_go_on(config: "Config") -> str:
    from trainer.training.run_folder import RECORD

    folder = locate(config.run_folder)
    if isinstance(folder, Url):  # A store may not answer in time.
        return "Go on with the same command and --or-resume."
    if (folder / RECORD).is_file():
        return f"Go on with: trainer train --resume {shlex.quote(str(folder))}"
    return f"There is no run yet. {_SAME_COMMAND}"


def _story_verdict(text: str) -> str:
    """Says whether a sample is, to the last word, a story that the storybook could have told."""
    from trainer.storybook.storybook import log_probability

    try:
        log_probability(text)
    except ValueError as error:
        return f" (leaves the storybook's grammar: {str(error).split(': ', 1)[1].split(', after', 1)[0]})"
    return " (a story of the storybook's grammar)"


def _inspect(options: argparse.Namespace) -> int:
    from trainer.commands.inspect_run import inspect

    # All of it: TensorFlow is loaded on the way, and only for WordPiece and object stores.
    with quiet_import():
        return 0 if inspect(options.path, options.split, options.examples, options.sequence_length) else 1


def _evaluate(options: argparse.Namespace) -> None:
    from trainer.training.run_folder import RunFolder

    for override in options.overrides:
        if not override.startswith(("distribution.", "data.prepared_folder=")):
            raise UserError(
                f"{override}: of a run's settings evaluate takes other devices, distribution.*, and another place of "
                "the data, data.prepared_folder, only."
            )
    run_folder, step = _run_of(options)
    run = RunFolder(run_folder, options.overrides)
    with quiet_import():
        from trainer.distributed.strategy import describe_devices, make_strategy
        from trainer.distributed.workers import Workers
        from trainer.training.evaluation import Evaluator
        from trainer.training.run_checkpoints import load_model
        from trainer.training.run_data import find_prepared

    strategy = make_strategy(run.config.distribution, alone=True)
    for line in describe_devices(strategy, run.config.distribution, Workers()):
        warn(line)
    prepared = find_prepared(run)
    with strategy.scope():
        model, checkpoint = load_model(run, say=warn, step=step)
    say(f"step {checkpoint.step}: {Evaluator(model, strategy, prepared, run.config)()}")


def _run_of(options: argparse.Namespace) -> "tuple[str, Step | None]":
    """Returns the run and step that are meant, after what can be refused was, before TensorFlow is loaded."""
    from trainer.training.run_folder import RunFolder, run_and_step

    run_folder, step = run_and_step(options.run_folder, options.step)
    RunFolder(run_folder).check_model(None)
    return run_folder, step


def _generate(options: argparse.Namespace) -> None:
    from trainer.decoding.decoder import Decoder
    from trainer.training.run_folder import RunFolder

    if options.text is not None and options.prompt is not None:
        raise UserError(f"{options.text!r} and --prompt {options.prompt!r}: two prompts; leave out one.")
    prompt = options.prompt or options.text or ""
    if options.num_samples < 1:
        raise UserError(f"--num-samples {options.num_samples} must be at least 1.")
    run_folder, step = _run_of(options)
    given = {name: getattr(options, name) for name in ("k", "p", "num_beams", "temperature", "seed")}
    decoder = Decoder.from_options(options.sampler, RunFolder(run_folder).config.samples, **given)
    if options.num_samples > 1 and not decoder.is_random:
        with_k = " with k=1" if decoder.name == "top-k" else ""
        raise UserError(
            f"--num-samples {options.num_samples}: {decoder.name}{with_k} always writes the same text; ask for 1."
        )
    with quiet_import():
        from trainer import generate
        from trainer.distributed.strategy import unseen_gpu

    if warning := unseen_gpu():
        warn(f"warning: {warning}")
    texts = generate(
        run_folder,
        [prompt] * options.num_samples,
        options.sampler,
        options.num_tokens,
        stop=options.stop,
        step=step,
        **given,
    )
    say("\n\n".join(texts))


def _verify(options: argparse.Namespace) -> int:
    from trainer.config_file import whole_number

    config = _read_config(options)
    numbers = [whole_number(text) or 0 for text in options.replicas.split(",")]
    if not all(numbers) or len(numbers) < 2:
        raise UserError(f"--replicas {options.replicas} must be numbers such as 1,2,4: at least two, to compare.")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--replicas {options.replicas} names a number twice, which compares nothing; leave one out.")
    if options.steps < 1:
        raise UserError(f"--steps {options.steps} must be at least 1.")
    with quiet_import():
        from trainer.commands.verify import verify
    return 0 if verify(config, numbers, options.steps) else 1


def _plan(options: argparse.Namespace) -> int:
    from trainer.hardware.devices import parse_target
    from trainer.planning.plan import print_compiled, print_plan

    config = _read_config(options)
    target = None if options.target is None else parse_target(options.target)
    print_plan(config, options.vocabulary_size, target, options.utilisation, options.weights)
    return 1 if options.compile and not print_compiled(config, options.vocabulary_size, target) else 0
