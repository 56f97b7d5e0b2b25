"""Every config for a TPU or GPU compiles with that device's own compiler on any machine, fits the device's memory as
`plan` estimates, and costs no more than before.

    scripts/test tests/test_compile.py --write-figures

compiles and writes tests/compiled_steps.json again, after the step was changed on purpose. A step is compiled only if
its program, the device or the compiler has changed since; otherwise the file's figures are those of this program.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import replica_steps  # type: ignore[import-not-found]  # pytest has this folder on its path
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from test_replicas import ODD, TIED, TOLERANCE, assert_equal, relative_difference  # type: ignore[import-not-found]

from trainer.config.file import load_config, make_config
from trainer.config.settings import Config, num_pieces
from trainer.distributed.collectives import XlaCollectives
from trainer.distributed.strategy import make_strategy
from trainer.errors import UserError
from trainer.execution import resolve
from trainer.hardware.devices import Target, parse_target
from trainer.model.pieces import Cut
from trainer.model.size import count_parameters, parameter_shapes
from trainer.optimizers.cost import optimizer_flops
from trainer.planning import compiler, lower
from trainer.planning.compile_hlo import digest
from trainer.planning.compiler import CompiledStep, compile_step, largest_that_fits
from trainer.planning.estimate import estimate_memory, sent_bytes
from trainer.planning.lower import trace_step
from trainer.planning.plan import find_vocabulary_size
from trainer.training.split import SplitArray
from trainer.training.step import Batch, StepMetrics

ROOT = Path(__file__).parent.parent
FIGURES = Path(__file__).with_name("compiled_steps.json")
# The one that needs most memory comes first; see conftest.py.
TARGETS = {
    "gpt2_1.5b_tpu_v5e_8": "tpu:v5e-8",
    "llama_7b_8gpu": "gpu:H100x8",
    "gpt2_350m_tpu_v4_32": "tpu:v4-32",
    "gpt2_124m_tpu_v5e_8": "tpu:v5e-8",
    "gpt2_124m_8gpu": "gpu:A100-80GBx8",
}
# All that a compiler reports, except how long it took.
STORED = (
    "arguments_bytes",
    "temporaries_bytes",
    "flops",
    "accessed_bytes",
    "num_all_reduces",
    "largest_constant_bytes",
    "sent_bytes",
    "program",
)


def test_every_config_for_an_accelerator_has_a_target_and_figures():
    configs = {path.stem for path in (ROOT / "configs").glob("*.toml") if re.search("tpu|gpu", path.stem)}
    assert configs == set(TARGETS) == set(json.loads(FIGURES.read_text()))


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("name", TARGETS)
def test_the_config_compiles_and_needs_as_much_as_before_and_as_planned(name: str, request: pytest.FixtureRequest):
    config, target = load_config(ROOT / "configs" / f"{name}.toml"), parse_target(TARGETS[name])
    vocabulary_size = find_vocabulary_size(config)
    writes, stored = request.config.getoption("--write-figures"), json.loads(FIGURES.read_text())
    known = None if writes else CompiledStep(compile_secs=0.0, **stored[name])
    try:
        step = compile_step(config, vocabulary_size, target, known=known)
    except UserError as error:
        if "the package index cannot be reached" in str(error):
            pytest.skip("no package index to take the compiler from")
        raise
    assert step.memory_bytes() <= target.device.memory_bytes
    # For example, a mask that constant folding puts into the program is a hundred times as large.
    assert step.largest_constant_bytes is not None and step.largest_constant_bytes < 1e6
    planned = sum(estimate_memory(config, vocabulary_size, target).values())
    assert planned == pytest.approx(step.memory_bytes(), rel=0.15)

    figures = {key: value for key, value in step._asdict().items() if key in STORED}
    if writes:
        FIGURES.write_text(json.dumps(stored | {name: figures}, indent=2) + "\n")
    else:
        # More than versions of TensorFlow differ by, and less than a mistake in the step costs.
        del figures["program"], stored[name]["program"]
        assert figures == pytest.approx(stored[name], rel=0.03)


# One example at a time on any number of devices, and the work of the optimizer exceeds that of the model.
TINY = make_config(
    {
        "run_folder": "unused",
        "model": {"num_layers": 2, "num_heads": 2, "hidden_dim": 128, "intermediate_dim": 128},
        "train": {
            "precision": "mixed_bfloat16",
            "total_steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "sequence_length": 8,
        },
        "optimizer": {"kind": "muon"},
    }
)


@functools.cache
def compiled_for_tpus(num_devices: int) -> CompiledStep:
    of_another = CompiledStep(1, 1, 1.0, 1.0, 1, 1, 0.0, "0" * 64)
    try:
        return compile_step(TINY, 300, parse_target(f"tpu:v5e-{num_devices}"), known=of_another)
    except UserError as error:
        if "the package index cannot be reached" in str(error):
            pytest.skip("no package index to take the compiler from")
        raise


@pytest.mark.slow
@pytest.mark.tpu
def test_only_a_program_that_has_changed_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = compiled_for_tpus(4)
    # The packages lie elsewhere on another machine.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(Path(tf.__file__).parent.parent, target_is_directory=True)
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))
    printed: list[str] = []
    run = compiler._run

    def noted(command: list[str]) -> str:
        printed.append(run(command))
        return printed[-1]

    monkeypatch.setattr(compiler, "_run", noted)
    assert found.arguments_bytes > 1
    assert len(found.program) == 64
    assert compile_step(TINY, 300, parse_target("tpu:v5e-4"), known=found) is found
    # The program that compiles said only which program this is.
    assert json.loads(printed[-1].splitlines()[-1]) == {"program": found.program}


def test_a_program_has_the_same_digest_however_its_functions_are_numbered():
    call = "func.func @while_cond_{} ... call @while_cond_{} ... call @step_{}"
    program = call.format("31__.1", "31__.1", "90")
    one = digest({}, program)
    assert digest({}, call.format("7__.1", "7__.1", "8")) == one
    another_call, another_number = call.format("31__.1", "32__.1", "90"), f"{program} ... 1024"
    others = [digest({}, another_call), digest({}, another_number), digest({"topology": "v5e:2x4"}, program)]
    assert len({one, *others}) == 4


@pytest.mark.slow
@pytest.mark.tpu
def test_the_work_of_muon_on_each_tpu_core_falls_with_their_number():
    alone, shared = (compiled_for_tpus(num_devices).flops for num_devices in (1, 4))
    in_products = [optimizer_flops(TINY, num_devices) for num_devices in (1, 4)]
    assert in_products[1] == in_products[0] / 4
    # The compiler counts the other operations of these steps, too: a few for each number.
    assert alone - shared == pytest.approx(in_products[0] - in_products[1], rel=0.03)


SPLIT_FIGURES, VOCABULARY_OF_SMALL = Path(__file__).with_name("compiled_splits.json"), 2048
# Matrices of rows that fill a TPU's tiles.
SMALL = {
    "run_folder": "unused",
    "model": {"num_layers": 2, "num_heads": 4, "hidden_dim": 256, "intermediate_dim": 1024, "tied_embeddings": True},
    "train": {
        "precision": "mixed_bfloat16",
        "total_steps": 4,
        "global_batch_size": 64,
        "micro_batch_size": 4,
        "sequence_length": 128,
    },
}


def compiled_split(overrides: list[str], target: Target, request: pytest.FixtureRequest) -> tuple[Config, CompiledStep]:
    """Returns SMALL with overrides, and its step compiled, whose figures are those of before."""
    writes, stored = request.config.getoption("--write-figures"), json.loads(SPLIT_FIGURES.read_text())
    config, name = make_config(SMALL, overrides), f"{' '.join(overrides)} {target}"
    known = None if writes else CompiledStep(compile_secs=0.0, **stored[name])
    try:
        step = compile_step(config, VOCABULARY_OF_SMALL, target, known=known)
    except UserError as error:
        if "the package index cannot be reached" in str(error):
            pytest.skip("no package index to take the compiler from")
        raise
    figures = {key: value for key, value in step._asdict().items() if key in STORED}
    if writes:
        SPLIT_FIGURES.write_text(json.dumps(stored | {name: figures}, indent=2) + "\n")
    else:
        del figures["program"], stored[name]["program"]
        assert figures == pytest.approx(stored[name], rel=0.03)
    return config, step


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("target_name", ["tpu:v5e-8", "gpu:H100x8"])
def test_a_split_optimizer_sends_no_more_and_leaves_each_device_its_share(
    target_name: str, request: pytest.FixtureRequest
):
    target, steps = parse_target(target_name), {}
    for shard in ("nothing", "optimizer"):
        config, steps[shard] = compiled_split([f"distribution.shard={shard}"], target, request)
        # A loss, counts and a hash are not planned.
        planned = sum(sent_bytes(config, VOCABULARY_OF_SMALL, target).values())
        assert steps[shard].sent_bytes == pytest.approx(planned, rel=0.01)
    whole, split = steps["nothing"], steps["optimizer"]
    assert whole.sent_bytes and split.sent_bytes
    # Gradients once and weights once, in place of gradients twice.
    assert split.sent_bytes <= 1.05 * whole.sent_bytes
    of_weights = 4 * count_parameters(config, VOCABULARY_OF_SMALL)
    batch = whole.arguments_bytes - 3 * of_weights
    # Two moments, and the rows of the weights that the device updates.
    kept = split.arguments_bytes - of_weights - batch
    assert kept == pytest.approx(3 * of_weights / target.num_devices, rel=0.02)


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("target_name", ["tpu:v5e-8", "gpu:H100x8"])
def test_split_weights_send_each_block_twice_and_its_gradients_once_in_every_micro_batch(
    target_name: str, request: pytest.FixtureRequest
):
    target = parse_target(target_name)
    config, step = compiled_split(["distribution.shard=weights", "model.tied_embeddings=false"], target, request)
    shapes = parameter_shapes(config.model, VOCABULARY_OF_SMALL, config.train.sequence_length)
    numbers = {name: math.prod(shape) for name, shape in shapes}
    of_blocks = sum(number for name, number in numbers.items() if "/block_" in name)
    # In bfloat16 the weights of blocks twice and all others once, and in float32 the gradients.
    of_micro_batch = 2 * (2 * of_blocks + sum(numbers.values()) - of_blocks) + 4 * sum(numbers.values())
    execution = resolve(config, target.processor(), target.num_devices)
    num_micro_batches = execution.examples // execution.micro_batch_size
    least = num_micro_batches * of_micro_batch * (target.num_devices - 1) / target.num_devices
    assert num_micro_batches == 2 and step.sent_bytes is not None
    assert least <= step.sent_bytes <= 1.05 * least
    batch = 3 * 4 * config.train.global_batch_size // target.num_devices * config.train.sequence_length
    # Weights and two moments.
    kept = step.arguments_bytes - batch
    assert kept == pytest.approx(3 * 4 * sum(numbers.values()) / target.num_devices, rel=0.02)


# The splits are run on as many virtual devices of the CPU as there are replicas.
NUM_REPLICAS = 8
SPLITS = {
    "nothing": {"shard": "nothing"},
    "optimizer": {"shard": "optimizer"},
    "weights": {"shard": "weights"},
    "weights in two groups": {"shard": "weights", "shard_over": 4},
}
CONTROLS = ["nothing", "weights"]


def config_of_program(split: str, num_replicas: int, micro_batches: int) -> Config:
    """A step that is clipped, drops, and adds up micro-batches, of sizes that leave pieces with padding."""
    recompute = "blocks" if "groups" in split else "auto"  # So that both ways to run blocks are in a loop.
    case = {"model": ODD | TIED, "micro_batches": micro_batches, "distribution": SPLITS[split]}
    case["train"] = {"recompute": recompute}
    config: Config = replica_steps.config_of({"kind": "cpu"}, case, num_replicas)
    return config


def split_among(values: np.ndarray) -> np.ndarray:
    """Returns the batches [steps, examples, ...] as [steps, replicas, examples of each, ...]."""
    return values.reshape(len(values), NUM_REPLICAS, -1, *values.shape[2:])


class StepThatRuns(lower._StepOfMany):
    """A step whose replicas have the places of their examples: when it is only compiled, they make no difference."""

    def _place_on_replica(self, batch: Batch) -> tuple[Batch, tf.Tensor, tf.Tensor | None]:
        batch, _, num_examples = super()._place_on_replica(batch)
        return batch, tf.cast(gen_xla_ops.xla_replica_id(), tf.int64) * self.execution.examples, num_examples


class Program:
    """The program of a step for a TPU's replicas, with names for what it takes and returns.

    Args:
        config: the run's configuration.
        folder: where the program and its arguments are written.
        initial: the whole weights that it begins with, by name; None: those of its own model, which has them.
    """

    def __init__(self, config: Config, folder: Path, initial: dict[str, np.ndarray] | None = None) -> None:
        self.folder = folder
        target = parse_target(f"tpu:v5e-{NUM_REPLICAS}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lower, "_StepOfMany", StepThatRuns)
            self.step, take_step, specs = trace_step(config, replica_steps.VOCABULARY, target)
        function = take_step.get_concrete_function(*specs)
        pieces = {} if self.step.split is None else self.step.split.pieces
        named = self.step.named_variables.items()
        self.num_pieces = num_pieces(config, NUM_REPLICAS)
        self.whole = {name: each.value for name, each in named if not isinstance(each, SplitArray)}
        self.initial = initial or {name: each.numpy() for name, each in self.whole.items()}
        self.weights = self.whole or {name: each.value for name, each in pieces.items()}
        known = [*self.weights.values(), *(each.value for each in pieces.values())]
        known += [*self.step.optimizer.state().values(), self.step.step, self.step.batches_hash]
        of_handle = {id(each.handle): each for each in (*known, self.step.skipped_in_a_row)}
        self.variables = [of_handle[id(handle)] for handle in function.captured_inputs]
        arguments = {f"b{i}": split_among(part) for i, part in enumerate(replica_steps.global_batches())}
        name_of = {id(variable): name for name, variable in self.weights.items()}
        for i, variable in enumerate(self.variables):
            values = [variable.numpy()]
            if not self.whole and id(variable) in name_of:
                array = self.initial[name_of[id(variable)]]
                cut = Cut(array.shape, self.num_pieces)
                values = list(cut.padded(array).reshape(self.num_pieces, *cut.piece_shape))
            # The replicas of each group have all of it.
            arguments[f"s{i}"] = np.stack(values * (NUM_REPLICAS // len(values)))
        folder.mkdir()
        np.savez(folder / "arguments.npz", **arguments)  # type: ignore[arg-type]  # Its stub lacks keywords.
        (folder / "program.hlo").write_bytes(take_step.experimental_get_compiler_ir(*specs)(stage="hlo_serialized"))

    def results(self) -> dict[str, np.ndarray]:
        """Returns what `replica_steps.take_steps` does, of the steps that run_program.py took."""
        arrays = dict(np.load(self.folder / "results.npz"))
        assert len([name for name in arrays if name[0] == "s"]) == len(self.variables)
        state = {id(variable): arrays[f"s{i}"] for i, variable in enumerate(self.variables)}
        metrics = StepMetrics(*(arrays[f"m{i}"] for i in range(len(StepMetrics._fields))))
        assert metrics.num_steps.tolist() == [[1] * NUM_REPLICAS] * replica_steps.NUM_STEPS
        shapes = {name: tuple(each.shape) for name, each in self.step.named_variables.items()}
        found = {"batches_hash": state[id(self.step.batches_hash)][-1, 0]}
        for name, variable in self.weights.items():
            found[f"weights/{name}"] = whole(state[id(variable)][-1], shapes[name], self.num_pieces)
        for name, variable in self.step.optimizer.state().items():
            weight, _, what = name.rpartition("/")
            if what == "first_moment":
                found[f"gradients/{name}"] = whole(state[id(variable)][0], shapes[weight], self.num_pieces)
        alike = [state[id(variable)][-1] for variable in self.whole.values()]
        alike += [each[-1] for each in metrics]
        if not self.whole:  # Groups are alike.
            last = [state[id(variable)][-1] for variable in self.weights.values()]
            alike += [each.reshape(-1, self.num_pieces, *each.shape[1:]) for each in last]
        found["replicas_agree"] = np.all([(each == each[:1]).all() for each in alike])
        after_first = StepMetrics(*(each[1:, 0].sum() for each in metrics))
        found["num_clipped"] = after_first.num_clipped
        found["loss"] = after_first.loss_sum / after_first.num_targets
        return found


def whole(of_replicas: np.ndarray, shape: tuple[int, ...], num_pieces: int) -> np.ndarray:
    """Returns the array that the first group's replicas hold pieces of, or the first of those that each holds whole."""
    if of_replicas.shape[1:] == shape:
        return of_replicas[0]
    cut = Cut(shape, num_pieces)
    array: np.ndarray = cut.whole(of_replicas[:num_pieces].reshape(cut.padded_shape))
    return array


def without_reduction(self, name, operand, shape, how="", adds=False, among="group"):
    """In place of XlaCollectives._call: a replica takes its own summand for the sum."""
    if not adds:
        return with_reduction(self, name, operand, shape, how, adds, among)
    return operand if list(operand.shape) == list(shape) else self.own(operand)


with_reduction = XlaCollectives._call


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Program]:
    """The program of each split, which was run, and without a reduction."""
    folder, found = tmp_path_factory.mktemp("programs"), {}
    initial = None
    for split in SPLITS:
        config = config_of_program(split, NUM_REPLICAS, micro_batches=3)
        found[split] = Program(config, folder / split, initial)
        initial = initial or found[split].initial
        if split in CONTROLS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(XlaCollectives, "_call", without_reduction)
                found[f"{split}, broken"] = Program(config, folder / f"{split}, broken", initial)
    try:
        python = compiler._compiler_environment("tpu", print)
    except UserError as error:
        if "the package index cannot be reached" in str(error):
            pytest.skip("no package index to take the compiler from")
        raise
    script, module = Path(__file__).with_name("run_program.py"), Path(compiler.__file__).with_name("compile_hlo.py")
    command = [str(python), "-I", str(script), str(module), *(str(each.folder) for each in found.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert not done.returncode, done.stderr[-3000:]
    return found


@pytest.fixture(scope="module")
def one_device() -> dict[str, np.ndarray]:
    """What TensorFlow's own operations make of the same batches on one device."""
    config = config_of_program("nothing", 1, micro_batches=2)
    found: dict[str, np.ndarray] = replica_steps.take_steps(make_strategy(config.distribution), config)
    return found


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("split", SPLITS)
def test_the_program_of_eight_tpu_replicas_makes_the_weights_of_one_device(
    programs: dict[str, Program], one_device: dict[str, np.ndarray], split: str
):
    results = programs[split].results()
    assert_equal(results, one_device, TOLERANCE["float64"])
    assert results["replicas_agree"]


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("split", CONTROLS)
def test_a_program_without_its_reductions_is_seen(
    programs: dict[str, Program], one_device: dict[str, np.ndarray], split: str
):
    broken = programs[f"{split}, broken"].results()
    # Every replica trains on its own examples.
    with pytest.raises(AssertionError):
        assert_equal(broken, one_device, TOLERANCE["float32"])
    assert relative_difference(broken, one_device, "weights/") > 1e-3


# A loop of three turns, as the GPU's compiler writes it, around one of two turns as a TPU's compiler does.
LOOPS = """
%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(2)
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}
%part (p: bf16[8,4]) -> bf16[64,4] {
  %gather.2 = bf16[64,4]{1,0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="0"}
}
%all-reduce-scatter.1 (p: f32[64,4]) -> f32[8,4] {
  %sum = f32[64,4]{1,0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gather.1 = bf16[64,4]{1,0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, frontend_attributes={chain_id="0"}
  %rest = bf16[64,4]{1,0} fusion(%gather.1), kind=kCustom, calls=%part
  %scattered = f32[8,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
%outer_condition (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%counter, %unknown), direction=LT
}
%outer_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %inner = (s32[], f32[8]) while(%p), condition=%inner_condition, body=%inner_body
}
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %outer = (s32[], f32[8]) while(%p), condition=%outer_condition, body=%outer_body, backend_config={KNOWN}
  %total = f32[16]{0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""


def test_what_a_loop_sends_counts_as_often_as_it_turns_and_the_parts_of_an_operation_once():
    with unittest.mock.patch.dict(os.environ):  # It sets variables for the compilers.
        from trainer.planning.compile_hlo import sent_bytes as sent_by_program
    text, of_turn = LOOPS.replace("KNOWN", '"known_trip_count":{"n":"3"}'), 7 / 8 * (2 * 64 * 4 + 4 * 64 * 4)
    assert sent_by_program(text, 8) == 3 * 2 * of_turn + 2 * 7 / 8 * 4 * 16
    assert sent_by_program(LOOPS, 8) is None
    alone = "ENTRY %main (p: f32[16]) -> f32[16] {\n  %all = OPERATION, replica_groups={{0,1,2,3,4,5,6,7}}\n}"
    one_by_one = sent_by_program(alone.replace("OPERATION", "f32[16]{0} all-to-all(%p)"), 8)
    at_once = sent_by_program(alone.replace("OPERATION", "(f32[16]{0}, f32[16]{0}) all-to-all-start(%p)"), 8)
    assert one_by_one == at_once == 7 / 8 * 4 * 16


@pytest.mark.parametrize("largest", [0, 1, 2, 4, 8, 16, 32, 64])
def test_the_largest_that_fits_is_found_in_few_tries(largest: int):
    sizes, tried = [1, 2, 4, 8, 16, 32, 64], []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= largest

    assert largest_that_fits(sizes, fits) == (largest or None)
    assert len(tried) <= 3
    assert largest_that_fits([], fits) is None


@pytest.mark.slow
def test_a_compiler_that_cannot_be_installed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    config = load_config(ROOT / "configs" / "gpt2_124m_8gpu.toml")
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"compile-gpu: the compiler cannot be installed there: the package index cannot"
    ):
        compile_step(config, 50257, parse_target("gpu:H100x8"), said.append)
    assert said == [f"Installing the compiler into {tmp_path / 'compile-gpu'} (about 1 GB)."]
