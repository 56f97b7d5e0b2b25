from pathlib import Path

import pytest

from trainer.monitoring import tags
from trainer.monitoring.curves import read_curves
from trainer.monitoring.event_log import EventLog

TODAY = {
    tags.LOSS,
    tags.RAW_LOSS,
    tags.PERPLEXITY,
    tags.EXCESS,
    tags.bits_per_byte(False),
    tags.bits_per_byte(True),
    tags.of_set(tags.LOSS, "books"),
    tags.of_set(tags.bits_per_byte(True), "loss"),
    tags.loss_of_source(0),
    tags.TOKENS_PER_SEC_OVERALL,
    tags.GRAD_NORM,
    tags.EPOCH,
    tags.CONFIG,
    tags.samples_of("greedy"),
}


@pytest.mark.parametrize("tag", sorted(TODAY))
def test_a_tag_of_today_stays_as_it_is(tag: str):
    assert tags.current(tag) == tag


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("loss", tags.LOSS),
        ("loss/books", "loss/nats_per_token/books"),
        ("loss_of_source_1", tags.loss_of_source(1)),
        ("bits_per_byte_lossy", "loss/bits_per_byte_lossy"),
        ("bits_per_byte/books", "loss/bits_per_byte/books"),
        ("excess_nats_per_token", tags.EXCESS),
        ("mfu_overall", tags.MFU_OVERALL),
        ("learning_rate", tags.LEARNING_RATE),
        ("skipped_steps", tags.SKIPPED_STEPS),
        ("epoch", tags.EPOCH),
    ],
)
def test_a_tag_of_version_0_1_0_has_a_name_of_today(old: str, new: str):
    assert tags.current(old) == new


def test_a_run_of_version_0_1_0_that_goes_on_is_one_curve(tmp_path: Path):
    old = EventLog(tmp_path, 0)
    for step in (10, 20, 30):
        old.scalars(step, {"loss": float(step), "loss/books": 1.0})
    old.close()
    new = EventLog(tmp_path, 20)
    new.scalars(30, {tags.LOSS: 3.0})
    new.close()
    curves = read_curves(tmp_path)
    assert curves[tags.LOSS].steps.tolist() == [10, 20, 30]
    assert curves[tags.LOSS].values.tolist() == [10.0, 20.0, 3.0]
    assert curves["loss/nats_per_token/books"].steps.tolist() == [10, 20]
