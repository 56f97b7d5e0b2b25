import pytest

from trainer.errors import UserError
from trainer.training.health import MAX_SKIPPED_IN_A_ROW, check_is_learning, report_skipped


def test_skipped_steps_are_reported_however_many_they_are():
    said: list[str] = []
    report_skipped(100, 50, 0, None, said.append)
    assert said == []
    report_skipped(100, 50, 49, None, said.append)
    report_skipped(101, 1, 1, 1024.0, said.append)
    assert said == [
        "step 100: skipped 49 of 50 steps, whose loss or gradient was not finite.",
        "step 101: skipped 1 of 1 steps, whose loss or gradient was not finite; the loss scale, which each of them "
        "halves, is 1024 now.",
    ]


def test_a_run_stops_if_too_many_steps_in_a_row_or_all_were_skipped():
    most = MAX_SKIPPED_IN_A_ROW
    check_is_learning(100, 200, most - 1, 5)
    check_is_learning(100, 100, most - 1, 1)
    check_is_learning(20, 20, 9, 11)
    check_is_learning(99, 100, most - 1, 0)
    told = (
        " had a loss or gradient that was not finite and were skipped. Lower optimizer.learning_rate, set "
        "optimizer.clip_norm (1.0 is common) or raise optimizer.warmup_steps. Skipped steps do not change the weights: "
        "the newest checkpoint is finite."
    )
    with pytest.raises(UserError) as error:
        check_is_learning(100, 200, most, 5)
    assert str(error.value) == f"The last {most} steps before step 100 all{told}"
    with pytest.raises(UserError) as error:
        check_is_learning(20, 20, 10, 10)
    assert str(error.value) == f"The last 10 steps before step 20 all{told}"
    with pytest.raises(UserError) as error:
        check_is_learning(3, 3, 0, 0)
    assert str(error.value) == f"All 3 steps of the run{told}"
