"""lm-evaluation-harness scores a run, its export and 4 replicas alike: scripts/parity runs this."""

import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

REASON = "scripts/parity installs what this needs, and runs it"
pytest.importorskip("torch", reason=REASON)
pytest.importorskip("lm_eval", reason=REASON)
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tiny import tiny_config, tiny_prepared  # type: ignore[import-not-found]  # noqa: E402

import trainer.commands.lm_eval_adapter  # noqa: E402
from trainer.exchange.export import export  # noqa: E402
from trainer.exchange.open import open_model  # noqa: E402
from trainer.model.build import build_gpt  # noqa: E402
from trainer.runs.run_checkpoints import open_checkpoints  # noqa: E402
from trainer.runs.run_folder import RunFolder  # noqa: E402
from trainer.scoring.last_word import score_last_words  # noqa: E402
from trainer.scoring.score import total  # noqa: E402
from trainer.scoring.scorer import Scorer  # noqa: E402

# The harness and its libraries warn about what their releases will change.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
LENGTH = 32
SHAPE = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "intermediate_dim": 40, "pre_norm": True}
GPT2 = {**SHAPE, "tied_embeddings": True, "activation": "gelu_tanh"}

OF_ALL = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
"""
TASKS = {
    "words": "loglikelihood",
    "texts": "loglikelihood_rolling",
    "choices": "multiple_choice",
    "goes_on": "generate_until",
}
REST = {
    "words": """doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "texts": """doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "choices": """doc_to_text: "{{text[:30]}}"
doc_to_choice: [" cat", " the dog and the mat", "!", "한국어"]
doc_to_target: 1
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    # Contexts that leave room: from others the harness's class leaves out [BOS], and trainer the token after it.
    "goes_on": """doc_to_text: "{{text[:7]}}"
doc_to_target: "cat"
generation_kwargs: {until: ["e ", "\\n\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


def paragraphs() -> list[str]:
    """Returns texts in two languages, shorter and longer than the context, without line ends and double blanks."""
    pages = [(ROOT / name).read_text("utf-8") for name in ("README.md", "README.ko.md")]
    texts = [" ".join(text.split()) for page in pages for text in page.split("\n\n")]
    return [text[: 10 + 17 * (i % 20)].strip() for i, text in enumerate(texts) if len(text) > 40][:40]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of a run, of its export, and of tasks on texts beside them."""
    folder = tmp_path_factory.mktemp("harness")
    os.environ["HF_HOME"] = str(folder / "cache")
    texts = paragraphs()
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    tasks = folder / "tasks"
    tasks.mkdir()
    for name, output_type in TASKS.items():
        head = OF_ALL.format(name=name, data=folder / "texts.jsonl", output_type=output_type)
        (tasks / f"{name}.yaml").write_text(head + REST[name], "utf-8")
    config = tiny_config(
        folder,
        data={"train": f"{folder}/texts.jsonl", "held_out_fraction": 0.3},
        tokenizer={"kind": "bpe", "vocabulary_size": 400},
        model=GPT2,
        train={"sequence_length": LENGTH},
    )
    run = RunFolder.create(config, tiny_prepared(config))
    tokenizer = run.path / "tokenizer"
    assert tokenizer.is_dir()
    prepared = tiny_prepared(config)
    random = np.random.default_rng(0)
    model = build_gpt(config, prepared.vocabulary_size, prepared.bos_id)
    weights = {
        each.path: (random.normal(0, 0.3, each.shape) + each.path.endswith("gamma")).astype(np.float32)
        for each in model.variables
    }
    checkpoints = open_checkpoints(run)
    checkpoints.save(1, {"weights": weights}, {})
    checkpoints.wait()
    export(str(run.path), "huggingface", str(folder / "exported"))
    return {"run": str(run.path), "exported": str(folder / "exported"), "tasks": str(tasks)}


def evaluated(world: dict[str, str], model: str, arguments: dict[str, Any], *tasks: str) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=world["tasks"], include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    assert found is not None
    return found


def metrics_of(found: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task}/{name}": value
        for task, results in found["results"].items()
        for name, value in results.items()
        if isinstance(value, float) and not name.startswith("name")
    }


def answers_of(found: dict[str, Any], task: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in sorted(found["samples"][task], key=lambda each: each["doc_id"])]


def assert_equal(one: list[Any], other: list[Any]) -> None:
    """Compares the answers to each request: log-probabilities, whether they are greedy, and texts."""
    assert len(one) == len(other) > 0
    for ours, theirs in zip(np.ravel(np.array(one, object)), np.ravel(np.array(other, object)), strict=True):
        if isinstance(theirs, float):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)  # float32 sums of some hundred nats
        else:
            assert ours == theirs


def test_the_entry_point_is_the_class():
    points = importlib.metadata.entry_points(group="lm_eval.models", name="trainer")
    assert [point.load() for point in points] == [trainer.commands.lm_eval_adapter.TrainerModel]


def test_the_harness_scores_a_run_and_its_export_alike(world: dict[str, str]):
    ours = evaluated(world, "trainer", {"run": world["run"], "device": "cpu"}, *TASKS)
    theirs = evaluated(world, "hf", {"pretrained": world["exported"], "device": "cpu"}, "words", "choices", "goes_on")
    # In rolling tasks the harness's class puts [BOS] before a text, and then scores the [BOS] of the tokenizer too.
    arguments = {"pretrained": world["exported"], "device": "cpu", "add_bos_token": False}
    rolling = evaluated(world, "hf", arguments, "texts")
    for task in TASKS:
        assert_equal(answers_of(ours, task), answers_of(rolling if task == "texts" else theirs, task))
    expected = metrics_of(theirs) | metrics_of(rolling)
    found = metrics_of(ours)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)
    # An export can be scored by trainer, too.
    again = evaluated(world, "trainer", {"run": world["exported"], "device": "cpu"}, "words", "texts")
    for task in ("words", "texts"):
        assert_equal(answers_of(again, task), answers_of(ours, task))


def test_the_harness_finds_the_figures_of_trainer_evaluate(world: dict[str, str]):
    found = metrics_of(evaluated(world, "trainer", {"run": world["run"], "device": "cpu"}, "words", "texts"))
    opened = open_model(world["run"])
    scorer = Scorer(opened.model, opened.tokenizer, LENGTH)
    score, words = total(scorer.scores(paragraphs())), score_last_words(scorer, paragraphs())
    assert found["texts/bits_per_byte,none"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    assert found["texts/word_perplexity,none"] == pytest.approx(score.word_perplexity, rel=1e-6)
    assert found["words/perplexity,none"] == pytest.approx(words.score.word_perplexity, rel=1e-6)
    assert found["words/acc,none"] == words.accuracy


def test_the_end_token_of_a_folder_ends_an_answer(world: dict[str, str], tmp_path: Path):
    folder = shutil.copytree(world["exported"], tmp_path / "exported")
    requests = [SimpleNamespace(args=("The cat", {"max_gen_toks": 16}))]

    def answer() -> str:
        return str(trainer.commands.lm_eval_adapter.TrainerModel(str(folder), device="cpu").generate_until(requests)[0])

    assert len(answer()) > 1
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(400))}))
    assert answer() == ""


def test_four_replicas_are_scored_by_the_command_as_one(world: dict[str, str], tmp_path: Path):
    arguments = f"run={world['run']},logical_devices=4"
    command = [
        sys.executable,
        "-m",
        "trainer.commands.lm_eval_adapter",
        "--model",
        "trainer",
        "--model_args",
        arguments,
    ]
    options: list[str | Path] = [
        "--device",
        "cpu",
        "--tasks",
        "words,texts",
        "--include_path",
        world["tasks"],
        "--output_path",
        tmp_path,
    ]
    subprocess.run([*command, *options], check=True, cwd=tmp_path)
    (results,) = tmp_path.rglob("results*.json")
    four = metrics_of(json.loads(results.read_text("utf-8")))
    one = metrics_of(evaluated(world, "trainer", {"run": world["run"], "device": "cpu"}, "words", "texts"))
    names = [name for name in one if "stderr" not in name]
    assert len(names) == 5 and all(math.isfinite(one[name]) for name in names)
    assert {name: four[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-5)
