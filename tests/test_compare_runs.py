import math
from pathlib import Path

import pytest
from test_report import Page  # type: ignore[import-not-found]
from tiny_run import prepared_text  # type: ignore[import-not-found]
from watched_run import evaluation_at, finish, record, watch  # type: ignore[import-not-found]

from trainer.cli import main
from trainer.monitoring import tags
from trainer.monitoring.run_log import Dot
from trainer.reports.compare_runs import score_rows, verdict
from trainer.reports.comparison import Comparison, compare, differing_settings
from trainer.reports.history import History, read_history


def trained(folder: Path, *overrides: str, above: float = 0.0, facts: dict[str, object] | None = None) -> Path:
    """Makes a finished run whose losses are this far above those of `watched_run.loss_at`."""
    run = record(folder, *overrides, facts={"data_fingerprint": "d", "tokenizer_fingerprint": "t", **(facts or {})})
    watch(run, 0, 40, above=above, sample=f"a story of {folder.name}")
    finish(run, above=above)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compare")
    return {
        "low": trained(folder / "low"),
        "high": trained(folder / "high", "optimizer.learning_rate=0.1", above=0.5),
        "wide": trained(folder / "wide", "train.global_batch_size=128", above=0.25),
        "bpe": trained(
            folder / "bpe",
            "tokenizer.kind=bpe",
            above=1.0,
            facts={"data_fingerprint": "other", "tokenizer_fingerprint": "other"},
        ),
        "text": trained(folder / "text", "data.storybook_seed=7", facts={"data_fingerprint": "other"}),
    }


def compared(runs: dict[str, Path], *names: str) -> Comparison:
    return compare([read_history(str(runs[name])) for name in names])


def test_only_the_settings_that_differ_are_shown(runs: dict[str, Path]):
    both = compared(runs, "low", "high")
    assert differing_settings(both.histories) == [("optimizer.learning_rate", [0.001, 0.1])]
    three = dict(differing_settings(compared(runs, "low", "high", "bpe").histories))
    assert three["tokenizer.kind"] == ["wordpiece", "wordpiece", "bpe"]
    assert three["tokenizer.lowercase"] == [True, True, None] and "model.num_layers" not in three
    assert differing_settings([both.histories[0]] * 2) == []


def test_the_lowest_final_loss_wins_among_runs_with_one_text_and_tokenizer(runs: dict[str, Path]):
    both = compared(runs, "high", "low")
    assert both.winner() == (1, pytest.approx(0.5)) and both.notes == [] and both.unit == "nats per token"
    assert verdict(both) == "low has the lowest final loss, by 0.5000 nats per token."
    rows = dict(score_rows(both))
    assert rows["final, nats per token"] == [f"{evaluation_at(40, each).loss:.4f}" for each in (0.5, 0.0)]
    assert rows["tokens seen"] == ["328k", "328k"] and rows["tokens per second"] == ["800", "800"]


def test_losses_are_compared_after_the_same_tokens(runs: dict[str, Path]):
    # The batch of the second run is twice as large, so it has seen the same tokens after half as many steps.
    rows = compared(runs, "low", "wide").at_equal_amounts()
    per_step = 64 * 128
    assert [tokens for tokens, _ in rows] == [per_step * step for step in (20, 30, 40)]
    (_, (low, wide)), (_, (_, between)), _ = rows
    assert low == pytest.approx(evaluation_at(20).loss) and wide == pytest.approx(evaluation_at(10, 0.25).loss)
    ends = [evaluation_at(step, 0.25).loss for step in (10, 20)]
    assert between == pytest.approx(sum(ends) / 2)
    assert all(len(values) == 3 for _, values in compared(runs, "low", "wide", "high").at_equal_time())


def test_different_tokenizers_are_compared_in_bits_per_byte(runs: dict[str, Path]):
    comparison = compared(runs, "low", "bpe")
    assert comparison.unit == "bits per byte" and "have different tokenizers" in comparison.notes[0]
    assert comparison.winner() == (0, pytest.approx(1 / 3))
    assert "final, bits per byte" in dict(score_rows(comparison))
    # Without the prepared data the bytes of a token are not known.
    assert comparison.amount == "tokens" and "prepared data of a run are gone" in comparison.notes[1]
    assert comparison.at_equal_amounts()[0][1][0] == pytest.approx(evaluation_at(10).bits_per_byte)
    low, bpe = comparison.histories
    known = compare([low._replace(bytes_per_token=2.0), bpe._replace(bytes_per_token=4.0)])
    assert known.amount == "bytes of text" and len(known.notes) == 1
    # The second run has read twice as much text at each step.
    assert [amount for amount, _ in known.at_equal_amounts()] == [64 * 128 * 2 * step for step in (20, 30, 40)]
    ends = (
        [evaluation_at(step).bits_per_byte for step in (20, 40)],
        [evaluation_at(s, 1.0).bits_per_byte for s in (10, 20)],
    )
    assert [values[0] for _, values in known.at_equal_amounts()[::2]] == pytest.approx(ends[0])
    assert [values[1] for _, values in known.at_equal_amounts()[::2]] == pytest.approx(ends[1])


def test_no_winner_is_named_if_the_validation_texts_differ_or_a_run_is_not_over(runs: dict[str, Path], tmp_path: Path):
    texts = compared(runs, "low", "text")
    assert texts.winner() is None and "(data.storybook_seed)" in texts.notes[0]
    assert verdict(texts) == "No run is called the best: they are scored on different texts."
    watch(
        unfinished := record(tmp_path / "unfinished", facts={"data_fingerprint": "d", "tokenizer_fingerprint": "t"}),
        0,
        20,
    )
    comparison = compare([read_history(str(runs["low"])), read_history(str(unfinished.path))])
    assert comparison.winner() is None and "not all are finished" in verdict(comparison)
    equal = compare([read_history(str(runs["low"]))] * 2)
    assert equal.winner() is None and verdict(equal) == "The final losses are equal."


def test_scores_of_different_parts_of_the_text_are_a_note(runs: dict[str, Path], tmp_path: Path):
    part = trained(tmp_path / "part", "evaluation.every_steps=10", "evaluation.num_batches=3")
    (note,) = compare([read_history(str(runs["low"])), read_history(str(part))]).notes
    assert "evaluation.num_batches" in note


def test_the_same_validation_files_are_one_text_whatever_is_trained_on(tmp_path: Path):
    files = ("data.train=a.txt", "data.validation=v.txt"), ("data.train=b.txt", "data.validation=v.txt")
    facts = {"data_fingerprint": "1"}, {"data_fingerprint": "2"}
    paths = [trained(tmp_path / str(i), *files[i], facts=dict(facts[i]), above=i) for i in (0, 1)]
    assert compare([read_history(str(path)) for path in paths]).winner() == (0, pytest.approx(1.0))


def test_the_terminal_and_the_page_show_the_runs_side_by_side(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    paths = [str(runs[name]) for name in ("low", "high", "wide")]
    assert main(["compare", *paths]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "low has the lowest final loss, by 0.2500" in shown and "a story of wide" in shown
    assert main(["compare", *paths, "--html"]) == 0
    page = Page(Path("compare.html").read_text(encoding="utf-8"))
    by_tokens = page.lines()["Validation loss"]
    assert list(by_tokens) == ["low", "high", "wide"]
    assert by_tokens["wide"][0][2:] == [f"{10 * 128 * 128:,}", f"{evaluation_at(10, 0.25).loss:.5g}"]
    # One scale for all: the end of the wide run is twice as far to the right as that of the others.
    assert by_tokens["wide"][-1][0] == 1 and by_tokens["low"][-1][0] < 0.5
    assert sum("a story of" in word for word in page.words["blockquote"]) == 6


def test_a_run_without_a_step_is_compared_too(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    record(tmp_path / "begun", facts={"data_fingerprint": "d", "tokenizer_fingerprint": "t"})
    assert main(["compare", str(tmp_path / "begun"), str(runs["low"])]) == 0
    assert "not all are finished" in (shown := capsys.readouterr().out) and "●" in shown and "⠉" not in shown
    assert main(["compare", str(runs["low"]), str(tmp_path / "begun"), "--html", str(tmp_path / "page.html")]) == 0
    Page((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_a_comparison_needs_two_different_runs(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    assert main(["compare", str(runs["low"])]) == 2
    assert "compare needs at least two runs" in capsys.readouterr().err
    assert main(["compare", str(runs["low"]), str(runs["low"])]) == 2
    assert "a run is named twice" in capsys.readouterr().err


def test_a_validation_text_that_was_replaced_under_its_path_is_noticed(tmp_path: Path):
    def history(name: str, text: str, **facts: object) -> History:
        (tmp_path / name).mkdir()
        prepared = prepared_text(tmp_path / name, text)
        known = {"data_fingerprint": prepared.fingerprint, "prepared_folder": str(prepared.folder)}
        known["tokenizer_fingerprint"] = prepared.tokenizer_fingerprint
        return read_history(str(trained(tmp_path / f"run_{name}", above=float(name), facts=known | facts)))

    old, new = history("0", "the cat sat\n" * 60), history("1", "the act sat\n" * 60)
    found = compare([old, new])
    assert found.winner() is None and len(found.notes) == 1 and "replaced under its path" in found.notes[0]
    assert verdict(found) == "No run is called the best: they are scored on different texts."
    # Only the training texts differ.
    assert compare([old, new._replace(validation_splits=old.validation_splits)]).winner() == (0, pytest.approx(1.0))
    # With other tokens, the bytes of the texts are compared.
    bpe = history("2", "the act sat\n" * 60, tokenizer_fingerprint="other")
    assert compare([old, bpe]).is_fair and compare([new, bpe]).is_fair
    longer = history("3", "the act sat on\n" * 60, tokenizer_fingerprint="another")
    assert not compare([old, longer]).is_fair
    # The prepared data are gone: what was scored has to do.
    gone = new._replace(validation_splits=None)
    assert gone.result is not None and compare([old, gone]).is_fair
    assert not compare([old, gone._replace(result=gone.result._replace(num_tokens=999))]).is_fair
    unknown = compare([old, gone._replace(result=gone.result._replace(cut_share=0.5))])
    assert not unknown.is_fair and "nothing shows whether the validation texts are the same" in unknown.notes[0]
    assert verdict(unknown) == "No run is called the best: they may be scored on different texts."


def test_a_loss_that_is_not_a_number_is_no_best_loss(runs: dict[str, Path]):
    low, high = compared(runs, "low", "high").histories
    assert high.result is not None
    diverged = high._replace(
        result=high.result._replace(loss=math.nan),
        scores={10: math.nan, 20: 5.0},
        validation=high.validation._replace(curves={tags.LOSS: [Dot(10, math.nan, 1.0), Dot(20, 5.0, 2.0)]}),
    )
    comparison = compare([low, diverged])
    assert comparison.winner() is None and comparison.best(diverged) == Dot(20, 5.0, 2.0)
    assert diverged.best_step == 20
    assert verdict(comparison) == "No run is called the best, because a final loss is not a number: high."
    assert dict(score_rows(comparison))["final, nats per token"][1] == ""


def test_a_name_cannot_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = [str(trained(tmp_path / name)) for name in ("a\x1b[2J", "b")]
    assert main(["compare", *paths]) == 0
    assert "\x1b" not in capsys.readouterr().out
