"""Cutting a text into short pieces whose tokens, joined, are the tokens of the whole text."""

import re
from collections.abc import Iterable, Iterator

from trainer.text.files import Document, parts_of

# Punctuation and ideographs. WordPiece makes a separate word of each of these characters, and of each other character
# that is punctuation in Unicode.
LONE_CHARACTER = (
    "[!-/:-@\\[-`{-~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)
# A word ends at the end of a match, whatever surrounds it, so a cut there changes no token.
WORDPIECE_BREAKS = re.compile(r"[ \t\n\r\f!-/:-@\[-`{-~\u3400-\u4dbf\u4e00-\u9fff]")
# The marks of English books that are not in ASCII. To both kinds of tokenizers they are punctuation, which folding
# leaves as it is; so a text of ASCII and these is split into words as fast as one of ASCII.
BOOK_MARKS = "‘’“”–—"
# A space belongs to the word after it. The letters are listed, and are only a few scripts: which characters are letters
# depends on the version of Unicode, and Python and the encoder may have different versions.
BPE_BREAKS = re.compile(
    r"\S(?= )|[A-Za-z\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3](?=[\n,.!?、。，！？])"
)
ANYWHERE = re.compile(r"[\s\S]")
# Longer texts are handled in pieces of about this many characters, which bounds memory.
_PIECE_CHARS = 1 << 16


def cut(text: str, breaks: re.Pattern[str], num_chars: int = _PIECE_CHARS) -> Iterator[str]:
    """Yields a text in pieces whose tokens, joined, are the tokens of the whole; at least one piece.

    A word is cut inside only if it has no break for num_chars characters. Its parts are then two words.

    Args:
        text: the text.
        breaks: a tokenizer's breaks: the text may be cut at the end of a match, which has at least one character.
        num_chars: a piece has this many characters or a few more, and at most twice as many.
    """
    start = 0
    while len(text) - start > num_chars:
        found = breaks.search(text, start + num_chars - 1, start + 2 * num_chars)
        end = found.end() if found else start + 2 * num_chars
        yield text[start:end]
        start = end
    if start < len(text) or not text:
        yield text[start:]


def cut_document(document: Document, breaks: re.Pattern[str], num_chars: int = _PIECE_CHARS) -> Iterable[str]:
    """Returns the pieces that `cut` makes of a whole document, and holds only a part of the document at a time."""
    if isinstance(document, str) and len(document) <= num_chars:
        return (document,)
    return _cut_parts(document, breaks, num_chars)


def _cut_parts(document: Document, breaks: re.Pattern[str], num_chars: int) -> Iterator[str]:
    rest, is_cut = "", False
    for part in parts_of(document):
        rest = rest + part if rest else part
        start = 0
        # The place of the next cut depends on the next 2 * num_chars characters only.
        while len(rest) - start >= 2 * num_chars:
            found = breaks.search(rest, start + num_chars - 1, start + 2 * num_chars)
            end = found.end() if found else start + 2 * num_chars
            yield rest[start:end]
            start, is_cut = end, True
        rest = rest[start:] if start else rest
    if rest or not is_cut:
        yield from cut(rest, breaks, num_chars)
