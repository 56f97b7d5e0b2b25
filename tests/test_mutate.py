import argparse
import itertools
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mutate
import mutation_lab
import trainer.verbs
from mutated_settings import expect_values
from mutated_values import mutated_json
from trainer.errors import UserError

SAMPLE_SECS = 20


@pytest.mark.slow
def test_mutations_of_every_kind_of_input_are_accepted_or_refused_properly():
    done = subprocess.run(
        [sys.executable, mutate.__file__, "--secs", str(SAMPLE_SECS), "--number", "400"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "" and sum(map(int, re.findall(r"(\d+) tried", done.stdout))) > 0


def test_the_same_seed_makes_the_same_mutations():
    def some(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [mutated_json(rng, b'{"a": [1, {"b": "c"}]}', b"other") for _ in range(50)]

    assert some(3) == some(3) != some(4)


def raised(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def printed(text: str, error: Exception | None = None) -> Callable[..., Any]:
    def speak(*_: Any) -> None:
        print(text, file=sys.stderr)
        if error is not None:
            raise error
        raise SystemExit(0)

    return speak


@pytest.mark.parametrize(
    ("what_trainer_does", "fault"),
    [
        (raised(ZeroDivisionError("by 0")), "ZeroDivisionError at "),
        (raised(SystemExit(3)), "exit status 3"),
        (raised(RecursionError("deep")), "RecursionError at "),
        (lambda *_: time.sleep(30), "Hang at "),
        (printed("WARNING:tensorflow: something"), "noise: WARNING:tensorflow: something"),
        (printed("/a/b.py:3: DeprecationWarning: too old"), "noise: .*DeprecationWarning: too old"),
        (raised(UserError("")), "refused without a message"),
        (printed("x" * 10_000, UserError("wrong")), "a message of 100"),  # trainer shortens its own.
    ],
)
def test_what_trainer_should_not_do_is_a_fault(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    what_trainer_does: Callable[..., Any],
    fault: str,
):
    def case(lab: Any, _: random.Random) -> bool:
        lab.trainer("plan", "config.toml", statuses=(0, 2))
        return True

    monkeypatch.setattr(trainer.verbs, "load_config", what_trainer_does)
    monkeypatch.setitem(mutate.KINDS, "planted", case)
    monkeypatch.setattr(mutation_lab, "HANG_SECS", 0.5 if fault.startswith("Hang") else 60.0)
    with capfd.disabled():
        verdict = mutate.attempt(mutation_lab.Lab(tmp_path), "planted", 0, 0)
    assert verdict.result == "fault" and re.match(fault, verdict.fault), verdict.fault


def test_files_left_behind_are_a_fault(tmp_path: Path):
    (tmp_path / "prepared").mkdir()
    mutation_lab.expect_no_leftovers(tmp_path)
    (tmp_path / "prepared" / ".partial-text-0").mkdir()
    with pytest.raises(mutation_lab.Fault, match=r"left behind: .*\.partial-text-0"):
        mutation_lab.expect_no_leftovers(tmp_path)


def test_a_setting_read_as_another_is_a_fault():
    expect_values({"data": {"train": "a", "min_bytes": 1}}, {"data": {"train": ["a"], "min_bytes": 1}})
    for given, taken in (("a", ["b"]), (True, 1), (1, 2), ([1], [1, 2])):
        with pytest.raises(mutation_lab.Fault, match=r"data\.x=.* is read as"):
            expect_values({"data": {"x": given}}, {"data": {"x": taken}})


def test_a_case_that_kills_its_process_is_a_fault_and_the_next_ones_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # In Python's place: the first process dies in the second case, the other one goes on from the third.
    killed = tmp_path / "python"
    killed.write_text(
        "#!/bin/bash\n"
        'while [[ $1 != --from ]]; do shift; done\necho "panic" >>"$(dirname "$0")/log.txt"\n'
        "if [[ $2 == 0 ]]; then echo '[0]'; echo '[0, \"refused\", 0, \"\"]'; echo '[1]'; kill -SEGV $$; fi\n"
        "echo '[2]'; echo '[2, \"accepted\", 0, \"\"]'\n"
    )
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    options = argparse.Namespace(kinds=["config"], number=3, seed=0)
    found = list(mutate.watch(tmp_path, options, time.monotonic() + 60))
    assert [(number, verdict.result) for _, number, verdict in found] == list(
        zip(itertools.count(), ("refused", "fault", "accepted"))
    )
    assert "the process ended with status -11: panic" in found[1][2].fault
