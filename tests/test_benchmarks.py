"""Laws of the benchmarks in scripts/benchmarks/: what they count is right on both sides, and they end with all figures.
No test looks at how fast anything was.
"""

import argparse
import io
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import rich.console
import tensorflow as tf
from PIL import Image

import tutorial
from harness import Training, stream_of, tutorial_model
from trainer.config.file import load_config
from trainer.data.batches import training_batches, whole_validation
from trainer.data.prepare import prepare
from trainer.model.build import build_gpt
from trainer.model.size import count_parameters
from trainer.tokenizers.vocabulary import SPECIAL_TOKENS

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "scripts" / "benchmarks"
ROUNDS = 5


def run(name, folder, *arguments):
    """Runs a benchmark in quick mode on the storybook; returns what it wrote and what it printed."""
    out = folder / "figures.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--json", str(out), *arguments]
    (folder / "tmp").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "COLUMNS": "120"}
    environment.pop("TRAINER_TEST_DATA", None)
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    assert not any((folder / "tmp").iterdir())
    return json.loads(out.read_text()), process.stdout


def functions_of(name):
    return runpy.run_path(str(BENCHMARKS / f"{name}.py"))


def write_lines(path, num_lines):
    path.write_text("".join(f"line {i} of a text to read\n" for i in range(num_lines)))


def test_a_text_is_read_from_one_shard_and_from_several_and_prepared_data_as_it_is(tmp_path):
    bench = functions_of("input")
    write_lines(tmp_path / "text.txt", 300)
    options = argparse.Namespace(data=str(tmp_path / "text.txt"), shards=4)
    data = bench["find_data"](options, tmp_path)
    whole, parts = (prepared.split("train") for prepared in data)
    assert (len(whole.shards), len(parts.shards)) == (1, 4)
    assert whole.num_tokens == parts.num_tokens
    (found,) = bench["find_data"](argparse.Namespace(data=str(data[1].folder), shards=2), tmp_path)
    assert found == data[1]

    pipelines = [bench["Pipeline"](prepared, bench["Shape"](4, 8, 1.0), None, num_steps=10) for prepared in data]
    for pipeline in pipelines:
        assert pipeline.take() > 0
        # All tokens of 10 batches, except the padding of a shard's last window, which comes once in hundreds.
        assert 10 * 4 * 8 - 4 * 8 < pipeline.num_tokens <= 10 * 4 * 8

    with pytest.raises(SystemExit, match=r"--window-mb 16 holds all of the data, 0\.0 MB of tokens; give more text"):
        bench["check_window"](data[0], 16)


def test_a_loss_of_text_is_a_fault(tmp_path):
    bench = functions_of("prepare")
    exact = bench["Case"]("exact", write=None)
    stories = exact._replace(is_exact=False)
    counts = bench["Counts"](num_documents=3, num_tokens=20, num_bytes=60)
    more, fewer = counts._replace(num_tokens=21), counts._replace(num_tokens=19)
    assert [bench["find_fault"](case, counts, counts) for case in (exact, stories)] == ["", ""]
    # A word is one token; in stories it may be several.
    assert bench["find_fault"](stories, counts, more) == ""
    assert bench["find_fault"](exact, counts, more) == f"{more} instead of {counts}"
    assert bench["find_fault"](stories, counts, fewer) == f"{fewer} instead of {counts}"
    one_document_less = counts._replace(num_documents=2)
    assert bench["find_fault"](stories, counts, one_document_less) == f"{one_document_less} instead of {counts}"


def test_texts_grow_threefold_to_the_largest_and_hold_what_their_counts_state(tmp_path):
    bench = functions_of("texts")
    options = argparse.Namespace(max_mb=150.0, documents=1500, long_mb=0.01)
    stories, nasty = [], []
    for case in bench["cases"](options):
        (nasty if case.is_exact else stories).append(case)
    assert [case.name for case in stories] == [f"{size} MB of stories" for size in (10, 30, 100, 150)]
    assert len(nasty) == 5
    for case in [*nasty, stories[0]._replace(write=lambda folder: bench["write_numbered"](folder, 5000))]:
        folder = tmp_path / case.name
        folder.mkdir()
        counts = case.write(folder)
        texts = [path.read_bytes().decode(errors="replace") for path in folder.iterdir()]
        lines = [line for text in texts for line in text.split("\n") if line.strip() and "\ufffd" not in line]
        words = sum(len(line.split()) for line in lines)
        assert counts == (len(lines), words, sum(len(line.encode()) for line in lines)), case.name
    assert not (tmp_path / "no newline at the end" / "text.txt").read_bytes().endswith(b"\n")


def test_a_speed_is_compared_round_by_round_with_trainer_at_its_better_precision():
    compare = functions_of("step")["compare"]

    def row(each, **more):
        return {"precision": "", "step_secs": statistics.median(each), "each_step_secs": each, **more}

    slow = row([4.0, 4.0, 4.0], precision="slow", each_alone_secs=[4.0, 4.0, 4.0])
    fast = row([1.0, 2.0, 3.0], precision="fast", each_alone_secs=[1.0, 1.0, 2.0])
    rows = compare([slow, fast, row([4.0, 3.0, 3.0]), row([2.0, 1.0])])
    assert [each["compared_with"] for each in rows] == ["fast"] * 4
    # The last contestant has not taken its third round yet.
    assert [each["ratio"] for each in rows] == [2.0, 1.0, 1.5, 1.25]
    assert rows[2]["each_ratio"] == [4.0, 1.5, 1.0]
    assert (rows[0]["overhead"], rows[0]["overhead_secs"]) == (0.0, 0.0)
    assert (rows[1]["overhead"], rows[1]["overhead_secs"]) == (0.5, 1.0)


def test_each_precision_of_trainer_is_compared_with_the_best_of_each_other():
    bench = functions_of("step")

    def row(name, precision, *each, **more):
        figures = {"name": name, "precision": precision, "each_step_secs": each, "step_secs": statistics.median(each)}
        return {**figures, "tokens_per_sec": 1.0, "loss": 1.0, **more}

    rows = [
        row("trainer", "float32", 1.0, 2.0, 3.0, each_alone_secs=[1.0, 2.0, 3.0]),
        row("trainer", "mixed_bfloat16", 2.0, 2.0, 2.0, each_alone_secs=[2.0, 2.0, 2.0]),
        row("Keras fit", "mixed_bfloat16", 9.0, 9.0, 9.0),
        row("trainer of the other checkout", "float32", 1.0, 1.998, 3.0),
        row("Keras fit, XLA", "float32", 3.0, 4.0, 6.0),
    ]
    figures = {"size": "tutorial", "contestants": bench["compare"](rows), "idle_cores": 0.0}
    with io.StringIO() as printed:
        bench["print_figures"](rich.console.Console(file=printed, width=200), figures)
        lines = printed.getvalue().splitlines()
    assert [line for line in lines if "times as fast" in line] == [
        "trainer in float32 is 1.000 times as fast as trainer of the other checkout in float32, "
        "median of 1.000, 0.999, 1.000",
        "trainer in float32 is 2.00 times as fast as Keras fit, XLA in float32, median of 3.00, 2.00, 2.00",
        "trainer in mixed_bfloat16 is 2.00 times as fast as Keras fit, XLA in float32, median of 1.50, 2.00, 3.00",
    ]


def test_contestants_train_on_the_rows_of_trainers_batches(tmp_path):
    bench = functions_of("step")
    config, prepared = bench["make_data"]("tutorial", True, tmp_path)
    rows = bench["rows_of"](prepared, config.train.sequence_length)
    assert rows.shape[1] == config.train.sequence_length + 1
    num_batches = len(rows) // config.train.global_batch_size - 1
    whole = {row.tobytes() for row in rows}
    for inputs, targets, weights in training_batches(prepared, config, 0, num_batches).as_numpy_iterator():
        for *row, weight in zip(inputs, targets, weights, strict=True):
            # Only the last example of all may be padded.
            if weight.all():
                assert np.append(row[0], row[1][-1]).tobytes() in whole
    assert np.bincount(rows.ravel(), minlength=5000)[: len(SPECIAL_TOKENS) - 1].sum() == 0


def test_steps_alone_leave_the_training_as_it_was(tmp_path):
    bench = functions_of("step")
    config, prepared = bench["make_data"]("tutorial", True, tmp_path)
    training, plain = (Training(config, prepared, sys.maxsize) for _ in range(2))
    # alone() takes the first batch.
    take, _ = functions_of("contestant")["alone"](training), next(plain.batches)
    for _ in range(2):
        training.take(2), plain.take(2)
        secs, loss = take(3)
        assert secs > 0 and np.isfinite(loss)
    training.take(1), plain.take(1)
    assert training.loss == plain.loss
    for kept, expected in zip(training.model.variables, plain.model.variables, strict=True):
        np.testing.assert_array_equal(kept.numpy(), expected.numpy())
    assert training.step.step.numpy() == 5


@pytest.mark.filterwarnings("ignore:Layer '")  # KerasNLP's layers drop a mask and warn of it.
def test_the_tutorials_model_has_float32_logits_in_bfloat16_too():
    config = load_config(ROOT / "configs" / "minigpt.toml", ["model.num_layers=1", "model.hidden_dim=24"])
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        model = tutorial_model(config, 50)
    finally:
        keras.config.set_dtype_policy(policy)
    assert model.output.dtype == "float32"
    assert model.layers[-2].compute_dtype == "bfloat16"


def test_larger_size_has_as_many_weights_as_gpt2():
    bench = functions_of("step")
    overrides = [*bench["SIZES"]["4x512"], *bench["QUICK"]]
    config = load_config(ROOT / "configs" / "minigpt.toml", ["samples.num_tokens=none", *overrides])
    gpt2 = functions_of("contestant")["gpt2_model"](config, 5000)
    assert build_gpt(config, 5000, bos_id=2).count_params() == gpt2.count_params()


def test_another_checkout_has_to_have_the_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step.py", "--against", str(tmp_path)])
    with pytest.raises(SystemExit):
        functions_of("step")["main"]()
    assert f"--against {tmp_path} has no scripts/benchmarks/contestant.py" in capsys.readouterr().err


@pytest.mark.slow
def test_the_log_of_a_contestant_that_ends_is_printed(tmp_path):
    bench = functions_of("step")
    job = {
        "program": "trainer",
        "checkout": str(ROOT),
        "config": {"train": {"precision": "float32", "global_batch_size": 1}},
    }
    job["config"]["train"]["sequence_length"] = 1
    with pytest.raises(SystemExit, match=r"trainer, float32 ended:\n[\s\S]*train.sequence_length=1"):
        bench["Contestant"]("trainer", job, tmp_path)


# Takes steps with given weights, in an environment that has only PyTorch.
TORCH_STEPS = """
import json, runpy, sys, torch
job = json.load(sys.stdin)
training = runpy.run_path(sys.argv[1])["Training"](job)
with torch.no_grad():
    for name, parameter in training.model.named_parameters():
        parameter.copy_(torch.tensor(job["weights"].pop(name)))
assert not job["weights"], list(job["weights"])
print(json.dumps([[training.take(1)[1] for _ in range(4)], training.evaluate()]))
"""


def torch_weights(model):
    """Returns our model's weights under the names that torch_gpt.py gives them, and in PyTorch's layout."""
    weights = {}
    for variable in model.variables:
        name = variable.path.removeprefix("gpt/").replace("block_", "blocks.").replace("/", ".")
        value = variable.numpy().T if name.startswith("blocks.") else variable.numpy()
        for ours, theirs in (("kernel", "weight"), ("gamma", "weight"), ("embeddings", "weight"), ("beta", "bias")):
            name = name.replace(f".{ours}", f".{theirs}")
        weights[name] = value.tolist()
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tutorial", "4x512"])
def test_pytorch_takes_the_steps_that_trainer_takes(tmp_path, size):
    python = ROOT / ".venv-torch" / "bin" / "python"
    if not python.is_file():
        pytest.skip("scripts/benchmarks/step.py has not made .venv-torch")
    config, prepared = functions_of("step")["make_data"](size, True, tmp_path)
    # This is the only difference: PyTorch adds epsilon after the correction of the mean square, and trainer before.
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"epsilon": 1e-12})})
    training = Training(config, prepared, 100)
    for variable in training.model.variables:
        variable.assign(variable + np.random.default_rng(0).normal(0, 0.1, variable.shape))
    weights = torch_weights(training.model)
    # All examples are the same one, so that it does not matter how batches are drawn.
    row = np.random.default_rng(1).integers(0, 5000, config.train.sequence_length + 1).astype(np.int32)
    row.tofile(tmp_path / "rows")
    batch = np.tile(row, (config.train.global_batch_size, 1))
    training.batches = iter(
        tf.data.Dataset.from_tensors((batch[:, :-1], batch[:, 1:], np.ones_like(batch[:, 1:], "f"))).repeat()
    )
    losses = []
    for _ in range(4):
        training.take(1)
        losses.append(training.loss)
    # Two rows to score, one of them with padding.
    scored = np.stack([row, np.where(np.arange(len(row)) < 9, row, 0)])
    scored.tofile(tmp_path / "validation")
    logits = training.model(scored[:, :-1])
    each_loss = keras.losses.sparse_categorical_crossentropy(scored[:, 1:], logits, from_logits=True)
    validation_loss = np.mean(each_loss[scored[:, 1:] != 0])

    job = {"config": config.model_dump(mode="json"), "vocabulary_size": 5000, "is_compiled": False}
    job |= {"rows": str(tmp_path / "rows"), "validation": str(tmp_path / "validation"), "weights": weights}
    command = [str(python), "-c", TORCH_STEPS, str(BENCHMARKS / "torch_gpt.py")]
    process = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert losses[-1] < losses[0] - 0.01
    of_steps, (of_validation, num_scored) = json.loads(process.stdout)
    np.testing.assert_allclose(of_steps, losses, rtol=1e-5)
    assert num_scored == len(row) - 1 + 8
    assert of_validation == pytest.approx(validation_loss, rel=1e-5)


@pytest.mark.slow
def test_step_benchmark_ends_with_all_figures(tmp_path):
    which = ["--sizes", "tutorial", "--peers", "fit", "gpt2", "--precisions", "float32", "--against", str(ROOT)]
    figures, printed = run("step", tmp_path, *which)
    (size,) = figures["sizes"]
    assert (size["size"], size["num_tokens"]) == ("tutorial", 4 * 32)
    ours, *others = size["contestants"]
    names = ["trainer of the other checkout", "Keras fit", "Keras fit, XLA", "GPT2Backbone in trainer"]
    assert [row["name"] for row in others] == names
    for row in (ours, *others):
        assert len(row["each_step_secs"]) == len(row["each_ratio"]) == ROUNDS
        assert row["step_secs"] == statistics.median(row["each_step_secs"]) > 0
        assert row["tokens_per_sec"] * row["step_secs"] == pytest.approx(4 * 32)
        assert 6 < row["loss"] < np.log(5000)  # It learns.
        assert f"{row['tokens_per_sec']:,.0f}" in printed
    assert ours["ratio"] == 1
    assert len(ours["each_alone_secs"]) == ROUNDS
    assert {row["num_parameters"] for row in others[:3]} == {ours["num_parameters"]}
    assert "trainer in float32 is" in printed and "as fast as trainer of the other checkout in float32" in printed


@pytest.mark.slow
def test_input_benchmark_ends_with_all_figures(tmp_path):
    figures, printed = run("input", tmp_path)
    rows = figures["pipelines"]
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert len(row["each_tokens_per_sec"]) == ROUNDS
        assert row["tokens_per_sec"] == statistics.median(row["each_tokens_per_sec"]) > 0
        # What is missing is padding.
        assert 0.99 * 2**17 < row["num_tokens"] <= 2**17
        assert row["ratio"] > 0
        assert row["pipeline"] in printed
    assert [row["ratio"] for row in rows if row["pipeline"] == "1 shard, in full"] == [1.0, 1.0]
    training = figures["training"]
    assert len(training["each_input_share"]) == ROUNDS
    assert 0 < training["input_share"] < 1
    assert f"{training['input_share']:.2%}" in printed


@pytest.mark.slow
def test_tokenizers_of_the_speed_benchmark_make_the_same_number_of_tokens(tmp_path):
    figures, printed = run("prepare", tmp_path, "--only", "speed")
    assert figures["text"] == "storybook"
    assert [comparison["kind"] for comparison in figures["speed"]] == ["wordpiece", "bpe"]
    for comparison in figures["speed"]:
        ours, *others = comparison["contestants"]
        assert (ours["name"], len(others)) == ("trainer", 2)
        # Equal on plain English; they differ on words of over 100 bytes.
        assert {each["num_tokens"] for each in others} == {ours["num_tokens"]}
        assert all(
            len(each["each_secs"]) == ROUNDS and each["tokens_per_sec"] > 0 for each in comparison["contestants"]
        )
        assert comparison["compared_with"] in {each["name"] for each in others}
        assert f"trainer is {comparison['ratio']:.2f} times as fast as {comparison['compared_with']}" in printed


@pytest.mark.slow
def test_vocabularies_of_one_text_are_compared_by_what_a_model_learns(tmp_path):
    figures, printed = run("prepare", tmp_path, "--only", "vocabulary")
    ours, theirs = figures["vocabulary"]
    assert (ours["name"], theirs["name"]) == ("trainer", "TensorFlow Text")
    for row in (ours, theirs):
        assert 100 < row["vocabulary_size"] <= 5000
        assert row["secs"] > 0
        assert row["bytes_per_token"] > 1
        assert row["unknown_share"] == 0
        assert 0 < row["bits_per_byte"] < 8
        assert f"{row['bits_per_byte']:.3f}" in printed


@pytest.mark.slow
def test_nothing_is_lost_of_unusual_texts(tmp_path):
    figures, printed = run("prepare", tmp_path, "--only", "scale", "--max-mb", "1", "--documents", "2000")
    rows = {row["text"]: row for row in figures["scale"]}
    assert len(rows) == 6
    for row in rows.values():
        assert row["fault"] == ""
        assert row["secs"] > 0
        assert row["peak_bytes"] > 50e6  # A Python with TensorFlow takes more.
    stories = rows["1 MB of stories"]
    assert (
        1e6 <= stories["text_bytes"] == stories["num_bytes"] + stories["num_documents"] < 1.01e6
    )  # The ends of lines.
    # One document of words to validate on goes with each.
    tiny = rows["2,000 tiny documents"]
    assert (tiny["num_documents"], tiny["num_tokens"]) == (2001, 2000 + 26 * 26)
    assert rows["6 MB in one line"]["num_documents"] == 2
    assert rows["a file with invalid UTF-8"]["num_documents"] == 20 * 100 + 1
    assert "nothing lost" in printed


@pytest.mark.slow
def test_both_programs_write_the_same_number_of_tokens_with_models_of_the_same_size(tmp_path):
    bench = functions_of("decoding")
    sizes = bench["QUICK"]
    ours = bench["make_ours"](sizes, bench["make_tokenizer"](sizes.vocabulary_size))
    theirs = bench["make_theirs"](sizes)
    assert ours.model.count_params() == theirs.count_params()
    for sampler in bench["SAMPLERS"]:
        assert bench["writing"](ours, sizes, sampler, 3)() == 3 * sizes.num_tokens
        assert bench["keras_writing"](theirs, sizes, sampler, 3, is_compiled=False)() == 3 * sizes.num_tokens
    keras.backend.clear_session()


def test_texts_of_another_length_end_the_decoding_benchmark():
    bench = functions_of("decoding")
    with pytest.raises(AssertionError, match="slow wrote 3 tokens instead of 4"):
        bench["compete"]({"fast": lambda: 4, "slow": lambda: 3}, 4)


def write_benchmarks(folder, **bodies):
    for name, body in bodies.items():
        (folder / f"{name}.py").write_text(
            f"import json, pathlib, sys\n*arguments, out = sys.argv[1:]\nprint('this is', {name!r}, flush=True)\n{body}"
        )


def test_all_benchmarks_run_even_if_one_fails(tmp_path, capfd):
    bench = functions_of("all")
    write = "pathlib.Path(out).write_text(json.dumps(arguments))\n"
    write_benchmarks(tmp_path, a="sys.exit(3)", b=write, prepare=write + "sys.exit(1)")
    names = ["a", "b", "prepare"]
    failures = bench["run_all"](names, ["--quick"], tmp_path / "out.json", tmp_path)
    assert failures == ["a failed: exit status 3", "prepare failed: exit status 1"]
    printed = capfd.readouterr().out.splitlines()
    assert printed == [line for name in names for line in (f"== {name}", f"this is {name}")]
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["failures"] == failures
    assert figures["benchmarks"] == {
        "b": ["--quick", "--json"],
        "prepare": ["--only", "speed", "vocabulary", "--quick", "--json"],
    }


def test_every_benchmark_is_among_all_or_left_out_for_a_reason():
    no_benchmarks = {"all", "contestant", "torch_gpt", "transformers_gpt2", "harness", "texts", "learners", "curves"}
    need_something = {"gpu", "tutorial", "time_to_loss"}
    found = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert found - no_benchmarks - need_something == set(functions_of("all")["NAMES"])


def test_all_benchmarks_take_what_is_given_to_all():
    for name in functions_of("all")["NAMES"]:
        text = (BENCHMARKS / f"{name}.py").read_text()
        assert '"--quick"' in text
        assert '"--json"' in text


@pytest.mark.slow
def test_the_benchmark_of_all_ends_with_the_figures_of_each(tmp_path):
    figures, printed = run("all", tmp_path, "--only", "decoding")
    assert figures["failures"] == []
    assert printed.startswith("== decoding\n")
    cases = figures["benchmarks"]["decoding"]["decoding"]
    assert [(case["sampler"], case["batch_size"]) for case in cases] == [
        ("greedy", 1),
        ("greedy", 16),
        ("top-k", 1),
        ("top-k", 16),
    ]
    for case in cases:
        ours, *others = case["contestants"]
        assert [row["name"] for row in (ours, *others)] == ["trainer", "keras_nlp", "keras_nlp, XLA"]
        for row in (ours, *others):
            assert len(row["each_secs"]) == ROUNDS
            assert f"{row['tokens_per_sec']:,.0f}" in printed
        # The faster of the two counts.
        best = max(others, key=lambda row: row["tokens_per_sec"])
        (ratio,) = case["ratios"]
        assert ratio["compared_with"] == best["name"]
        each = [theirs / mine for mine, theirs in zip(ours["each_secs"], best["each_secs"], strict=True)]
        assert ratio["each_ratio"] == each
        assert ratio["ratio"] == statistics.median(each)


@pytest.mark.slow
def test_transformers_writes_the_greedy_texts_that_trainer_writes():
    if not (ROOT / ".venv-torch" / "bin" / "python").is_file():
        pytest.skip("scripts/benchmarks/decoding.py has not made .venv-torch")
    bench = functions_of("decoding")
    ours = bench["make_ours"](bench["QUICK"], bench["make_tokenizer"](bench["QUICK"].vocabulary_size))
    with bench["transformers_beside"](ours, bench["QUICK"], [1, 3]) as theirs:
        assert theirs.writing("top-k", 3, is_static=False)() == 3 * bench["QUICK"].num_tokens


@pytest.mark.slow
def test_run_benchmark_ends_with_all_figures(tmp_path):
    figures, printed = run("run", tmp_path)
    start = figures["start"]
    assert len(start["each_secs"]) == 3
    assert start["secs"] == statistics.median(start["each_secs"]) > 0
    assert f"{start['secs']:.1f} s" in printed
    assert [row["model"] for row in figures["checkpoint"]] == ["quickstart", "GPT-2, 1 layers"]
    for row in figures["checkpoint"]:
        assert len(row["rounds"]) == ROUNDS
        # float32 weights, and two moments of each or, of Muon's matrices, one.
        assert row["num_bytes"] > 2 * 4 * row["num_parameters"]
        for each in row["rounds"]:
            assert 0 < each["call_secs"] < each["stall_secs"] + row["num_steps"] * each["step_secs"]
            assert each["writing_secs"] > 0
            assert each["wait_secs"] >= 0
        assert row["stall_secs"] == statistics.median(each["stall_secs"] for each in row["rounds"])


def points_of(*losses):
    return [
        {"steps": 10 * i, "tokens": 100.0 * i, "secs": 2.0 * i, "loss": loss} for i, loss in enumerate(losses, start=1)
    ]


def test_a_target_is_reached_between_the_scores_around_it_in_proportion():
    bench = functions_of("learners")
    points = [bench["Point"](**point) for point in points_of(4.0, 3.0, 2.0, 2.5)]
    assert bench["to_target"](points, 2.75) == (225.0, 4.5)
    assert bench["to_target"](points, 3.0) == (200.0, 4.0)
    assert bench["to_target"](points, 2.0) == (300.0, 6.0)
    assert bench["to_target"](points, 1.99) is None
    # Before the first score nothing is known.
    assert bench["to_target"](points, 4.5) == (100.0, 2.0)


class FakeProcess:
    """A contestant's process: a step takes 2 s, and before each answer it waits, which takes 0.5 s of CPU time."""

    def __init__(self, name, job, folder):
        self.about, self.lines = {"num_parameters": 5}, []

    def ask(self, line):
        self.lines.append(line)
        figures = {"num_tokens": 7} if line == "evaluate" else {"step_secs": 2.0}
        return {**figures, "loss": 1.0, "idle_cpu_secs": 0.5}


def test_a_contestant_takes_its_steps_in_equal_turns_and_counts_what_it_takes_while_it_waits(tmp_path, monkeypatch):
    bench = functions_of("learners")
    monkeypatch.setitem(bench["Contestant"].take_turn.__globals__, "Process", FakeProcess)
    about = {"contestant": "a", "name": "a", "precision": "float32", "program": "trainer", "recipe": ""}
    contestant = bench["Contestant"]({**about, "total_steps": 14, "tokens_per_step": 3, "num_scored": 7}, tmp_path)
    for block in range(3):
        contestant.take_turn(block, 3)
    assert contestant.process.lines == ["2", "2", "evaluate", "5", "evaluate", "5", "evaluate"]
    figures = contestant.figures()
    assert [(point["steps"], point["tokens"], point["secs"]) for point in figures["points"]] == [
        (4, 12.0, 4.0),
        (9, 27.0, 14.0),
        (14, 42.0, 24.0),
    ]
    assert figures["idle_cpu_secs"] == 0.5 * 7


def test_times_to_a_loss_are_compared_seed_by_seed_with_the_fastest_variant_of_each_program():
    bench = functions_of("time_to_loss")

    def contestant(name, program, start_secs, *losses):
        about = {"contestant": name, "name": name, "precision": "float32", "program": program, "num_parameters": 5}
        return {**about, "recipe": f"as {name}", "start_secs": start_secs, "points": points_of(*losses)}

    of_seeds = {
        7: [
            contestant("ours", "trainer", 1.0, 3.0, 2.0),
            contestant("keras", "tutorial", 2.0, 5.0, 4.0, 3.0),
            contestant("slow", "torch", 2.0, 9.0, 9.0, 3.5, 2.5),
            contestant("torch", "torch", 4.0, 4.0, 2.0),
        ],
        8: [
            contestant("ours", "trainer", 3.0, 4.0, 2.0),
            contestant("keras", "tutorial", 2.0, 5.0, 4.0, 3.5),
            contestant("slow", "torch", 2.0, 9.0, 9.0, 9.0, 2.5),
            contestant("torch", "torch", 4.0, 4.5, 2.5),
        ],
    }
    figures = bench["summary"]("books", of_seeds, None)
    # The tutorial's code ends there.
    assert figures["targets"] == [3.0, 3.5]
    ours, keras_fit, slow, torch = figures["contestants"]
    assert [run["secs"] for run in ours["runs"]] == [2.0, 2.5]
    assert [run["secs_with_start"] for run in ours["runs"]] == [3.0, 5.5]
    assert (ours["secs"], ours["final_loss"], keras_fit["tokens"]) == (2.25, 2.0, 300.0)
    assert [run["secs"] for run in torch["runs"]] == [3.0, 3.0] and slow["secs"] > 6
    lines = printed_of(bench, figures).splitlines()
    assert lines[-5:] == [
        "ours reaches the target in 0.38 of the time of keras, median of 0.33, 0.42; with the start 0.53",
        "  ours: as ours; keras: as keras",
        "ours reaches the target in 0.75 of the time of torch, median of 0.67, 0.83; with the start 0.61",
        "  ours: as ours; torch: as torch",
        "A share compares recipes as much as programs; only scripts/benchmarks/step.py compares equal models.",
    ]
    assert "target 3.000, 3.500 nats" in lines[0]
    # A fixed target that one seed does not reach.
    figures = bench["summary"]("shakespeare_char", of_seeds, 2.2)
    assert [row["secs"] for row in figures["contestants"]] == [pytest.approx(3.7), None, None, None]
    assert "A share compares" not in printed_of(bench, figures)


def test_each_program_is_trained_by_the_recipe_that_is_printed(tmp_path):
    bench = functions_of("learners")
    options = argparse.Namespace(
        quick=True, steps=8, precisions=["float32"], fast=None, contestants=["trainer", "keras", "torch"]
    )
    bench["write_quick_texts"](tmp_path)
    found = {text: [job["recipe"] for job in bench["jobs"](text, 0, options, tmp_path)] for text in bench["TEXTS"]}
    keras_recipe = "adam at 0.001, constant, untied embeddings"
    torch_recipe = "adamw at 0.001, cosine, tied embeddings"
    assert found == {
        "shakespeare_char": ["adamw at 0.005, cosine, untied embeddings", keras_recipe, torch_recipe],
        "books": ["adamw at 0.001, constant, untied embeddings", keras_recipe, torch_recipe],
    }
    # The tutorial's code names its optimizer only.
    assert float(keras.optimizers.get("adam").learning_rate) == pytest.approx(1e-3)


def printed_of(bench, figures):
    with io.StringIO() as printed:
        bench["print_figures"](rich.console.Console(file=printed, width=200), figures)
        return printed.getvalue()


def quick_config(bench, text, folder):
    bench["write_quick_texts"](folder)
    options = argparse.Namespace(quick=True, steps=4)
    path = bench["CONFIGS"] / f"{bench['TEXTS'][text].config}.toml"
    return bench["config_of"](path, text, "keras", ["train.precision=float32"], options, folder)


@pytest.mark.parametrize("text", ["shakespeare_char", "books"])
def test_the_tutorials_batches_go_on_where_they_ended_and_hold_the_text(tmp_path, text):
    bench = functions_of("learners")
    config = quick_config(bench, text, tmp_path)
    prepared = prepare(config, lambda _: None)
    batches_of = tutorial.line_batches if text == "books" else tutorial.window_batches
    batches = batches_of(config, prepared)
    # More than an epoch of the lines, which are 300.
    parts = [list(batches(first, steps).as_numpy_iterator()) for first, steps in ((0, 90), (0, 60), (60, 30))]
    np.testing.assert_array_equal(np.array(parts[0]), np.array(parts[1] + parts[2]))
    inputs, targets = (np.concatenate(each) for each in zip(*parts[0], strict=True))
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    if text == "books":
        ours = bench["rows_of"](training_batches(prepared, config, 0, 75))
    else:
        ours = np.lib.stride_tricks.sliding_window_view(stream_of(prepared), config.train.sequence_length + 1)
    whole = {row.tobytes() for row in ours}
    rows = np.concatenate([inputs, targets[:, -1:]], axis=1, dtype=np.int32)
    assert all(row.tobytes() in whole for row in rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer '")  # KerasNLP's layers drop a mask and warn of it.
def test_the_tutorials_code_is_scored_on_the_tokens_that_all_others_are(tmp_path):
    bench = functions_of("learners")
    config = quick_config(bench, "books", tmp_path)
    prepared = prepare(config, lambda _: None)
    rows = bench["rows_of"](whole_validation(prepared, config))
    model, asked = functions_of("contestant")["as_in_the_tutorial"](config, prepared, {"is_compiled": False})
    before = asked["evaluate"](0)
    for _ in range(2):
        assert asked["steps"](3)["step_secs"] > 0
    score = asked["evaluate"](0)
    assert score["num_tokens"] == np.count_nonzero(rows[:, 1:])
    loss = keras.losses.sparse_categorical_crossentropy(rows[:, 1:], model(rows[:, :-1]), from_logits=True)
    assert score["loss"] == pytest.approx(np.mean(loss[rows[:, 1:] != 0]), rel=1e-5)
    assert score["loss"] < before["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "no/out.json"], "--json: no is not a folder that can be written to"),
        (["--json", "there"], "--json: there is a folder; name a file"),
        (["--curves", "no"], "--curves: no is not a folder that can be written to"),
        (["--blocks", "0"], "--blocks 0 is less than one turn"),
        ([], "There is no there/books/simple_train.txt.gz, there/books/simple_valid.txt."),
        (["--quick", "--steps", "7"], "shakespeare_char, trainer: 7 steps are too few for 2 turns of at least 4"),
        (["--quick", "--fast", "no.toml", "--texts", "books"], "no.toml"),
    ],
)
def test_time_to_loss_finds_faults_before_it_trains(tmp_path, monkeypatch, capsys, arguments, message):
    bench = functions_of("time_to_loss")
    for name in ("compete", "install_torch"):
        monkeypatch.setitem(bench["main"].__globals__, name, lambda *_: pytest.fail("it trains"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "tinyshakespeare.txt").write_text("cats sat on mats.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINER_TEST_DATA", "there")
    monkeypatch.setattr(sys, "argv", ["time_to_loss.py", *arguments])
    with pytest.raises(SystemExit) as raised:
        bench["main"]()
    assert message in str(raised.value) + capsys.readouterr().err


@pytest.mark.slow
def test_time_to_loss_benchmark_ends_with_all_figures(tmp_path, monkeypatch, capsys):
    contestants = ["trainer", *(["torch"] if (ROOT / ".venv-torch" / "bin" / "python").is_file() else [])]
    arguments = ["--quick", "--texts", "shakespeare_char", "--contestants", *contestants, "--target", "9"]
    out = ["--json", str(tmp_path / "out.json"), "--curves", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["time_to_loss.py", *arguments, *out])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    functions_of("time_to_loss")["main"]()
    (figures,) = json.loads((tmp_path / "out.json").read_text())["texts"]
    assert [row["contestant"] for row in figures["contestants"]] == contestants
    for row in figures["contestants"]:
        (run_of_seed,) = row["runs"]
        assert [(point["steps"], point["tokens"]) for point in run_of_seed["points"]] == [(4, 256.0), (8, 512.0)]
        assert row["start_secs"] > row["secs"] > 0
        assert run_of_seed["idle_cpu_secs"] >= 0
        assert row["final_loss"] < 4.0  # A uniform guess among 23 characters has 3.1.
    printed = capsys.readouterr().out
    assert "target 9.000 nats" in printed
    assert "shakespeare_char, seed 0: waiting contestants took " in printed
    with Image.open(tmp_path / "time_to_loss_shakespeare_char.png") as image:
        colors = {color for _, color in image.getcolors(1 << 24)}
    assert (0x25, 0x63, 0xEB) in colors


def test_the_output_of_a_training_that_does_not_start_is_printed(tmp_path):
    bench = functions_of("run")
    with pytest.raises(SystemExit, match=r"train\.sed is not a setting[\s\S]*ended before its first step"):
        bench["secs_to_first_step"](["train.sed=1"], tmp_path)


@pytest.mark.slow
def test_gpu_benchmark_is_skipped_without_a_gpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--quick"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (0, "TensorFlow finds no GPU: skipped\n")


@pytest.mark.slow
def test_the_training_of_the_gpu_benchmark_works_without_a_gpu(tmp_path):
    bench = functions_of("gpu")
    small = [*bench["QUICK"], "train.global_batch_size=4", "train.micro_batch_size=2", "data.storybook_stories=300"]
    config = bench["config_of"](tmp_path, [*small, "distribution.kind=cpu", "distribution.gpus=none"])
    figures = bench["measure"](config, 2, rich.console.Console())
    assert (figures["device"], figures["batch"], figures["micro_batch_size"]) == ("CPU", "4 x 32", 2)
    assert figures["tokens_per_sec"] == statistics.median(figures["each_tokens_per_sec"]) > 0
    assert len(figures["each_tokens_per_sec"]) == ROUNDS
    # The peak speed of a CPU is not in the table of devices.
    assert figures["mfu"] is figures["peak_bytes"] is None
    bench["print_figures"](rich.console.Console(), figures)


def test_gpu_benchmark_trains_gpt2():
    bench = functions_of("gpu")
    config = bench["config_of"](Path("none"), bench["ON_GPU"])
    assert 124e6 < count_parameters(config, 258) < 125e6
    assert (config.train.precision, config.distribution.gpus) == ("mixed_bfloat16", (0,))
