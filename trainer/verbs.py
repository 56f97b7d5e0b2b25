"""What each verb of the command does with its options.

TensorFlow, and all that loads it, is imported only after everything that can be refused without it: a mistake is
reported at once.
"""

import argparse
import json
import shlex
import signal
import sys
from typing import TYPE_CHECKING

import trainer
from trainer.commands.doctor import run_doctor
from trainer.commands.generate import answer_prompts, read_prompts, write_texts
from trainer.commands.inspect_run import inspect as inspect_data
from trainer.completion import shell_code
from trainer.config.file import kept_changes, load_config, make_config, whole_number
from trainer.config.settings import Config, check_histograms
from trainer.data.beam import prepare_with_beam
from trainer.data.prepare import check_sets, check_sources
from trainer.data.prepare import prepare as prepare_text
from trainer.decoding.request import Request
from trainer.distributed.tpu_install import check_tpu_install
from trainer.distributed.workers import Workers, find_workers
from trainer.errors import UserError
from trainer.exchange.huggingface import is_huggingface
from trainer.exchange.open import read_config_on_devices
from trainer.exchange.source import check_source
from trainer.exit_status import ExitStatus
from trainer.hardware.devices import parse_target
from trainer.planning.plan import print_compiled, print_plan
from trainer.planning.verdict import Command
from trainer.reports.compare_runs import compare_runs
from trainer.reports.list_runs import print_runs
from trainer.reports.report import report as print_report
from trainer.reports.watch import follow
from trainer.runs.fork import plan_fork
from trainer.runs.run_changes import changes_of, check_length, newest_step
from trainer.runs.run_data import find_prepared
from trainer.runs.run_folder import RECORD, CheckpointStep, RunFolder, check_is_free, find_run, run_and_step
from trainer.storybook.storybook import verdict
from trainer.system.progress import shown
from trainer.system.signals import Ending, ended_by
from trainer.system.storage import Url, locate
from trainer.system.terminal import lasting_output, quiet_import, say, show, warn
from trainer.text.downloads import fetch_texts
from trainer.text.sources import find_inputs

if TYPE_CHECKING:
    from trainer.training.loop import TrainingResult


def prepare(options: argparse.Namespace) -> None:
    """Prepares the text of a config."""
    if options.beam_options and options.runner != "beam":
        raise UserError(
            f"-- {' '.join(options.beam_options)}: these are options of Apache Beam; add --runner beam before the --."
        )
    config = load_config(options.config, options.overrides)
    if options.download:
        fetch_texts(config.data, say)
    # Here Ctrl-C ends the process at once: an import may catch KeyboardInterrupt.
    with ended_by([signal.SIGINT], Ending()), quiet_import():
        check_sources(config)
        if config.tokenizer.kind in ("wordpiece", "saved"):
            import trainer.tokenizers.wordpiece  # noqa: F401
    if options.runner == "beam":
        prepare_with_beam(config, options.beam_options, say)
    else:
        prepare_text(config, say)


def train(options: argparse.Namespace) -> ExitStatus:
    """Trains a new run, or resumes one."""
    if options.resume is not None:
        run_folder, step, overrides, config = _check_resumed(options)
    else:
        config = _check_started(options)
    with quiet_import():
        from trainer.training import launch

    with lasting_output():
        if options.resume is not None:
            result = launch.resume(run_folder, overrides=overrides, step=step)
        else:
            result = launch.start(config, or_resume=options.or_resume)
        return _report(result, config)


def fork(options: argparse.Namespace) -> ExitStatus:
    """Trains a fork of a run."""
    planned = plan_fork(options.run_folder, options.overrides, options.step)
    planned.parent.check_model(None)
    config = planned.config
    check_histograms(config)
    check_is_free(config)
    options.ending.advice = lambda: how_to_resume(config, config.run_folder)
    with quiet_import():
        (check_sets if planned.keeps_data else check_sources)(config)
        from trainer.training import launch

    with lasting_output():
        return _report(launch.fork(options.run_folder, options.overrides, step=planned.step), config)


def _report(result: "TrainingResult", config: Config) -> ExitStatus:
    """Prints what a finished run has written; returns how it ended."""
    if result.is_stopped:
        return ExitStatus.STOPPED
    for name, text in result.samples.items():
        say(f"\n{name}{f' ({verdict(text)})' if config.data.is_storybook() else ''}:\n{text}")
    say(f"\nvalidation: {result.evaluation}")
    for name, score in result.evaluation.sets.items() if result.evaluation is not None else ():
        say(f"{name}: {score}")
    return ExitStatus.DONE


def _check_resumed(options: argparse.Namespace) -> tuple[str, CheckpointStep | None, list[str], Config]:
    """Returns the run's folder, the step to resume from, the overrides, and the run's config with them."""
    if options.or_resume:
        raise UserError(f"--resume {options.resume} and --or-resume: --or-resume goes with a config; leave out one.")
    # argparse takes the first word after the options for the config.
    overrides = [word for word in (options.config, *options.overrides) if word is not None]
    if files := [word for word in overrides if "=" not in word]:
        raise UserError(
            f"--resume {options.resume} uses the config that the run was started with; leave out {files[0]!r}, or "
            "start a new run with it."
        )
    run_folder, step = run_and_step(options.resume, options.step)
    run = RunFolder(run_folder, overrides)
    run.check_model(None)
    check_histograms(run.config)
    if step != "best":
        check_length(run, newest_step(run) if step is None else step)
    options.ending.advice = lambda: how_to_resume(run.config, run_folder)
    _check_changes(run)
    return run_folder, step, overrides, run.config


def _check_started(options: argparse.Namespace) -> Config:
    """Returns the config of a run to be started, or resumed with --or-resume."""
    if options.config is None:
        raise UserError("train needs a config, such as quickstart or your own TOML file, or --resume RUN.")
    if options.step is not None:
        raise UserError(f"--step {options.step} goes with --resume RUN; a new run begins at step 0. Leave it out.")
    config = load_config(options.config, options.overrides)
    check_histograms(config)
    if config.distribution.kind == "tpu":
        check_tpu_install()
    run = find_run(config, options.or_resume)
    if run is not None:
        check_length(run, newest_step(run))
    options.ending.advice = lambda: how_to_resume(config, config.run_folder)
    with quiet_import():
        if run is None:
            check_source(config)
            check_sources(config)
        else:
            _check_changes(run)
        find_workers(config.distribution)  # Loads TensorFlow if SLURM started this process.
    return config


def _check_changes(run: RunFolder) -> None:
    """Raises UserError if a run is to go on with other settings, and a file of evaluation.sets is missing."""
    if changes_of(run):
        with quiet_import():
            check_sets(run.config)


def how_to_resume(config: Config, run_folder: str) -> str:
    """Returns what to do after a signal has stopped a command that trains with this config in this folder."""
    folder = locate(run_folder)
    command = f"trainer train --resume {shlex.quote(str(folder))}"
    if isinstance(folder, Url):  # A store may not answer in time.
        return f"If there is no run yet, start it again with the same command. Otherwise go on with: {command}"
    if not (folder / RECORD).is_file():
        return "There is no run yet. Start it again with the same command."
    if kept_changes(config, RunFolder(folder).recorded):  # Nothing is recorded yet: `command` would lose it.
        return "Go on with the same command."
    return f"Go on with: {command}"


def inspect(options: argparse.Namespace) -> ExitStatus:
    """Verifies prepared data and shows what is in it."""
    # Around the whole call: it loads TensorFlow on the way, but only for WordPiece and object stores.
    with quiet_import():
        is_whole = inspect_data(options.path, options.split, options.examples, options.sequence_length)
    return ExitStatus.DONE if is_whole else ExitStatus.FAILED


def evaluate(options: argparse.Namespace) -> None:
    """Scores a checkpoint."""
    # After --data argparse takes all words for files.
    files = [word for word in options.data or [] if not word.startswith("distribution.")]
    overrides = [*options.overrides, *(word for word in options.data or [] if word not in files)]
    allowed = ("distribution.",) if options.data else ("distribution.", "data.prepared_folder=")
    for override in overrides:
        if not override.startswith(allowed):
            raise UserError(
                f"{override}: evaluate changes only the devices of a run, distribution.*, and the place of its data, "
                "data.prepared_folder, which --data does not read; leave it out."
            )
    if options.data:
        _evaluate_texts(options, files, overrides)
        return
    for name in ("name", "documents", "text_field", "stride", "with_ends", "last_word"):
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} goes with --data FILE; leave it out.")
    if is_huggingface(options.run_folder):
        raise UserError(
            f"{options.run_folder} is a model in Hugging Face's form, which has no validation text; name a text with "
            "--data FILE."
        )
    run_folder, step = run_and_step(options.run_folder, options.step)
    run = RunFolder(run_folder, overrides)
    run.check_model(None)
    with quiet_import():
        from trainer.distributed.strategy import describe_devices, make_strategy
        from trainer.training.evaluation import Evaluator
        from trainer.training.on_devices import open_on_devices

    strategy = make_strategy(run.config.distribution, ignore_workers=True)
    for line in describe_devices(strategy, run.config.distribution, Workers()):
        warn(line)
    prepared = find_prepared(run)
    model = open_on_devices(run_folder, strategy, run.config, step=step, say=warn)
    opened = model.opened
    with shown(warn, "evaluating") as bar:
        evaluation = Evaluator(opened.model, strategy, prepared, run.config, held=model.held)(note=bar.note)
    if options.json:
        print(json.dumps({"model": str(opened.folder), "step": opened.step, **evaluation.figures()}), flush=True)
    else:
        say(f"step {opened.step}: {evaluation}")


def _evaluate_texts(options: argparse.Namespace, files: list[str], overrides: list[str]) -> None:
    """Scores a checkpoint on files."""
    if not files:
        raise UserError(f"--data {' '.join(overrides)} names no file; name one first.")
    if options.last_word and (options.stride is not None or options.with_ends):
        other = "--with-ends" if options.with_ends else f"--stride {options.stride}"
        raise UserError(f"--last-word and {other}: a last word has neither windows nor an end to score; leave out one.")
    if options.stride is not None and options.stride < 1:
        raise UserError(f"--stride {options.stride} must be at least 1.")
    config = read_config_on_devices(options.run_folder, overrides, step=options.step)
    with quiet_import():
        inputs = find_inputs(files, "--data")
        from trainer.commands.evaluate_texts import Texts, evaluate_texts
    texts = Texts(
        options.name or " ".join(files),
        inputs,
        options.documents or "file",
        options.text_field or "text",
        options.stride,
        options.with_ends,
        options.last_word,
    )
    evaluate_texts(options.run_folder, options.step, config, texts, options.json)


_GENERATE_OPTIONS = (
    "sampler",
    "num_tokens",
    "seed",
    "stop",
    "k",
    "p",
    "min_p",
    "num_beams",
    "temperature",
    "repetition_penalty",
    "length_penalty",
    "stop_tokens",
    "num_samples",
    "sliding_window",
    "batch_size",
)


def generate(options: argparse.Namespace) -> None:
    """Writes text with a checkpoint."""
    names = {"PROMPT": options.text, "--prompt": options.prompt, "--prompts": options.prompts}
    given = [f"{name} {value!r}" for name, value in names.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are two ways to give prompts; leave out one.")
    config = read_config_on_devices(options.run_folder, options.overrides, step=options.step)
    request = Request.from_options(config.samples, **{name: getattr(options, name) for name in _GENERATE_OPTIONS})
    prompts = read_prompts(options.prompts) if options.prompts else [options.prompt or options.text or ""]
    with quiet_import():
        from trainer.distributed.strategy import use_one_inter_op_thread
        from trainer.training.on_devices import open_to_write

    distribution = config.distribution
    if distribution.shard != "weights" or distribution.logical_devices == 1:
        use_one_inter_op_thread()  # Several replicas on one thread would wait for each other.
    model = open_to_write(options.run_folder, config, bool(options.overrides), step=options.step, say=warn)
    generator = model.generator()
    if not given and not options.json and sys.stdin.isatty() and sys.stdout.isatty():
        answer_prompts(generator, request)
    else:
        write_texts(generator, prompts, request, options.json or options.prompts is not None)


def export(options: argparse.Namespace) -> None:
    """Writes a checkpoint in the format of other programs."""
    exported = trainer.export(options.run_folder, options.to, options.output, options.step, options.dtype, warn)
    say(str(exported))


def verify(options: argparse.Namespace) -> ExitStatus:
    """Compares the first steps of a config on several numbers of replicas."""
    config = load_config(options.config, options.overrides)
    numbers = [whole_number(text) or 0 for text in options.replicas.split(",")]
    if not all(numbers) or len(numbers) < 2:
        raise UserError(f"--replicas {options.replicas} must be at least two numbers, such as 1,2,4.")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--replicas {options.replicas} names a number twice; leave out the second one.")
    if options.steps < 1:
        raise UserError(f"--steps {options.steps} must be at least 1.")
    with quiet_import():
        from trainer.commands.verify import verify as compare_replicas
    return ExitStatus.DONE if compare_replicas(config, numbers, options.steps) else ExitStatus.FAILED


def watch(options: argparse.Namespace) -> ExitStatus:
    """Follows a run that another process trains."""
    return follow(run_and_step(options.run_folder)[0], options.once)


def plan(options: argparse.Namespace) -> ExitStatus:
    """Prints what a config costs."""
    config = load_config(options.config, options.overrides)
    check_histograms(config)
    target = None if options.target is None else parse_target(options.target)
    size = [] if options.vocabulary_size is None else ["--vocabulary-size", str(options.vocabulary_size)]
    further = (*size, *(["--compile"] if options.compile else []))
    command = Command(options.config, tuple(options.overrides), further, has_target=target is not None)
    print_plan(config, options.vocabulary_size, target, options.utilisation, options.weights, command)
    if options.compile and not print_compiled(config, options.vocabulary_size, target, command):
        return ExitStatus.FAILED
    return ExitStatus.DONE


def doctor(options: argparse.Namespace) -> ExitStatus:
    """Checks whether this machine can do what a config wants."""
    overrides, name = options.overrides, options.config
    if name is not None and "=" in name:  # argparse takes the first word for the config.
        overrides, name = [name, *overrides], None
    anything = {"run_folder": "runs", "train": {"precision": "float32", "total_steps": 1}}
    config = make_config(anything, overrides) if name is None else load_config(name, overrides)
    check_histograms(config)
    return ExitStatus.DONE if run_doctor(config, say, options.json) else ExitStatus.FAILED


def runs(options: argparse.Namespace) -> None:
    """Lists the runs in a folder."""
    print_runs(options.folder, options.json)


def report(options: argparse.Namespace) -> None:
    """Shows how a run went."""
    print_report(options.run_folder, options.html or None, options.html is not None)


def compare(options: argparse.Namespace) -> None:
    """Shows runs side by side."""
    compare_runs(options.run_folders, options.html or None, options.html is not None)


def completion(options: argparse.Namespace) -> None:
    """Prints what makes a shell complete the command."""
    show(shell_code(options.shell))
