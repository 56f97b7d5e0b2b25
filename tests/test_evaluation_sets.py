"""Laws of evaluation.sets: other texts that are scored while a run trains."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config  # type: ignore[import-not-found]  # pytest has this folder on its path

import trainer
from trainer.config.file import load_config, make_config
from trainer.data.prepare import check_sources
from trainer.errors import UserError
from trainer.exchange.open import open_model
from trainer.monitoring.curves import read_curves
from trainer.scoring.score import total
from trainer.scoring.scorer import Scorer

TEXT = "".join(f"the cat sat on mat {i}\n" for i in range(30))
TINY: dict[str, Any] = {"run_folder": "runs/x", "train": {"precision": "float32", "total_steps": 3}}


def sets_of(*overrides: str, **sets: Any) -> dict[str, tuple[str, ...]]:
    return make_config(TINY | {"evaluation": {"sets": sets}}, overrides).evaluation.sets


def test_sets_are_given_by_name_in_a_file_and_by_overrides(tmp_path: Path):
    assert sets_of(books="a/*.txt", news=["b.jsonl", "c.txt"]) == {"books": ("a/*.txt",), "news": ("b.jsonl", "c.txt")}
    assert sets_of("evaluation.sets.books=b.txt", books="a.txt") == {"books": ("b.txt",)}
    assert sets_of("evaluation.sets.books=[a.txt,b.txt]") == {"books": ("a.txt", "b.txt")}
    assert sets_of("evaluation.sets.books=none", books="a.txt", news="b.txt") == {"news": ("b.txt",)}
    assert sets_of("evaluation.sets=none", books="a.txt") == {}
    assert sets_of('evaluation.sets={news = "b.txt"}', books="a.txt") == {"news": ("b.txt",)}
    config = make_config(TINY | {"evaluation": {"sets": {"books": "a.txt"}}})
    (tmp_path / "config.toml").write_text(config.to_toml(), "utf-8")
    assert load_config(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("overrides", "sets", "message"),
    [
        (["evaluation.sets=a.txt"], {}, "evaluation.sets='a.txt' has no names; write evaluation.sets.NAME=FILE"),
        ([], {"a b": "a.txt"}, "evaluation.sets: 'a b' is not a name; use letters, digits, _ and -."),
        (
            ["evaluation.sets.a.b=a.txt"],
            {},
            "evaluation.sets.a={'b': 'a.txt'} is not a file, a glob or a list of these.",
        ),
        ([], {"books": 3}, "evaluation.sets.books=3 is not a file, a glob or a list of these."),
        (["evaluation.sets.books="], {}, "evaluation.sets.books='' is not a file, a glob or a list of these."),
        ([], {"books": []}, "evaluation.sets.books=[] is not a file, a glob or a list of these."),
        (["evaluation.set.books=a.txt"], {}, "evaluation.set is not a setting. Did you mean evaluation.sets?"),
    ],
)
def test_what_is_not_a_set_is_refused(overrides, sets, message):
    with pytest.raises(UserError) as error:
        sets_of(*overrides, **sets)
    assert message in str(error.value)


@pytest.mark.slow
def test_sets_are_scored_while_training_and_at_the_end(tmp_path: Path):
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    (tmp_path / "books.txt").write_text("the mat\nthe hat, it is said, is a mat\n", "utf-8")
    (tmp_path / "news.jsonl").write_text(json.dumps({"text": "the cat"}) + "\n", "utf-8")
    sets = {"books": f"{tmp_path}/b*.txt"}
    config = tiny_config(
        tmp_path,
        data={"train": f"{tmp_path}/a.txt", "held_out_fraction": 0.5},
        tokenizer={"kind": "byte"},
        train={"total_steps": 4, "sequence_length": 8, "global_batch_size": 2},
        evaluation={"every_steps": 2, "sets": sets},
        samples={"num_tokens": 2},
    )
    lines: list[str] = []
    result = trainer.train(config, say=lines.append)
    opened = open_model(result.run_folder)
    scorer = Scorer(opened.model, opened.tokenizer, 8)
    expected = total(scorer.scores(["the mat", "the hat, it is said, is a mat"]))
    assert result.evaluation is not None and result.evaluation.sets.keys() == {"books"}
    score = result.evaluation.sets["books"]
    assert score._replace(nats=0) == expected._replace(nats=0)
    assert score.nats == pytest.approx(expected.nats, rel=1e-6)
    curve = read_curves(tmp_path / "run/logs/validation")["loss/nats_per_token/books"]
    assert list(curve.steps) == [2, 4] and curve.values[-1] == pytest.approx(score.loss)
    assert sum(line.startswith("step 4/4") and line.endswith(f"books: {score}") for line in lines) == 1
    written = json.loads((tmp_path / "run/result.json").read_text())["evaluation"]["sets"]["books"]
    assert written["loss"] == score.loss and written["num_bytes"] == 7 + 29

    # The finished run has this result; with another set it is scored again.
    again = trainer.resume(result.run_folder, say=lines.append)
    assert again.evaluation == result.evaluation
    more = trainer.resume(
        result.run_folder, say=lines.append, overrides=[f"evaluation.sets.news={tmp_path}/news.jsonl"]
    )
    assert more.evaluation is not None and more.evaluation.sets.keys() == {"books", "news"}
    assert more.evaluation.sets["news"].num_bytes == 7


def test_a_set_without_a_file_is_refused_before_the_run_begins(tmp_path: Path):
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    config = tiny_config(
        tmp_path,
        data={"train": f"{tmp_path}/a.txt", "held_out_fraction": 0.5},
        evaluation={"sets": {"books": "none.txt"}},
    )
    with pytest.raises(UserError) as error:
        check_sources(config)  # The command does this before it loads TensorFlow.
    assert "evaluation.sets.books='none.txt': no such file" in str(error.value)
    assert str(error.value).endswith(", or leave it out with evaluation.sets.books=none.")
