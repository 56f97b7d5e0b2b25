"""Laws of cutting: pieces are short, and a document in parts is cut at the same places as the whole."""

import pytest

from trainer.tokenizers.cutting import BPE_BREAKS, WORDPIECE_BREAKS, cut, cut_document


def test_pieces_are_short_and_only_a_very_long_word_is_cut():
    assert list(cut("", WORDPIECE_BREAKS)) == [""]
    for length in (9, 10, 11, 19, 20, 21, 30, 31):
        pieces = list(cut("x" * length, WORDPIECE_BREAKS, 10))
        assert "".join(pieces) == "x" * length
        assert max(map(len, pieces)) <= 20
    assert list(cut("aaaa bbbb cccc dddd", WORDPIECE_BREAKS, 6)) == ["aaaa bbbb ", "cccc dddd"]
    assert list(cut("aaaa bbbb cccc dddd", BPE_BREAKS, 6)) == ["aaaa bbbb", " cccc dddd"]
    assert list(cut("我能吞下玻璃而不傷", WORDPIECE_BREAKS, 4)) == ["我能吞下", "玻璃而不", "傷"]
    assert list(cut("我能吞下，玻璃而不傷。", BPE_BREAKS, 4)) == ["我能吞下", "，玻璃而不傷", "。"]


@pytest.mark.parametrize("breaks", [WORDPIECE_BREAKS, BPE_BREAKS])
@pytest.mark.parametrize("size", [1, 3, 7, 50, 1000])
def test_a_document_in_parts_is_cut_at_the_same_places_as_the_whole(breaks, size):
    for content in ("", "a", "one two, three. four five six, seven", "x" * 97, "ab " * 40 + "y" * 60 + " z"):
        parts = (content[i : i + size] for i in range(0, len(content), size))
        assert list(cut_document(parts, breaks, num_chars=8)) == list(cut(content, breaks, num_chars=8))
