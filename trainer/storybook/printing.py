"""How a text of a grammar is printed: capitals, spaces and quotation marks as in a book; and how a print is read.

The grammar's tokens are words and the marks . , ! ? and ". Printing adds nothing that cannot be taken away again: if no
two words differ in case only, a print has the words and marks of one text, and so that text's probability.
"""

import re
from collections.abc import Iterable, Mapping

OPENING, CLOSING = "“", "”"
PIECE = re.compile(r"\w+|[^\w\s]")  # A word or a mark of a print.


def pieces(tokens: Iterable[str]) -> list[str]:
    """Returns each token as it is printed, with the space before it. What a token becomes depends on the tokens before
    it only, so a print that is cut between tokens is the print of its tokens.

    A sentence begins with a capital, and so does a quotation, unless it goes on after its speaker was named: “Come,”
    said the fox, “and see.” Words that the grammar writes with a capital keep it.

    Args:
        tokens: the words and marks of a text. Every second " closes a quotation.
    """
    printed_tokens: list[str] = []
    before = ""  # The token before.
    begins = True  # Whether the next word begins a sentence.
    is_quoted = False  # Whether a quotation is open.
    led_in = False  # Whether words of the same sentence stand before the quotation: asked Tom, “Where?”
    goes_on = False  # Whether the sentence holds a quotation that ended with a comma.
    for token in tokens:
        space = "" if before == "" or (before == '"' and is_quoted) else " "
        if token == '"' and not is_quoted:
            is_quoted, led_in, begins = True, not begins, not goes_on
            printed_tokens.append(space + OPENING)
        elif token == '"':
            is_quoted = False
            printed_tokens.append(CLOSING)
            # A speaker follows (“Where?” asked Tom.) unless the speaker stands before, or the speech ends with a stop.
            begins = before == "." or (before in ("!", "?") and led_in)
            goes_on = before == ","
        elif token in (".", "!", "?", ","):
            printed_tokens.append(token)
            if token != ",":
                begins, goes_on = True, False
        else:
            printed_tokens.append(space + (token[0].upper() + token[1:] if begins else token))
            begins = False
        before = token
    return printed_tokens


def printed(tokens: Iterable[str]) -> str:
    """Returns the print of a text's tokens: one line."""
    return "".join(pieces(tokens))


def tokens_of(text: str, spelling: Mapping[str, str]) -> list[str]:
    """Returns the tokens of a print: its words and marks, whatever their case and the spaces between them. So the words
    of a text come back from a tokenizer that folds case or loses spaces, too.

    Args:
        text: the print.
        spelling: how the grammar writes a word, by the word in lower case; other words are returned in lower case.
    """
    found = (piece.lower() for piece in PIECE.findall(text.replace(OPENING, '"').replace(CLOSING, '"')))
    return [spelling.get(piece, piece) for piece in found]


def forms(tokens: Iterable[str]) -> tuple[str, str, str]:
    """Returns the print of a text's tokens; the print with a space before every word and mark, as WordPiece decodes
    it; and the same in lower case, as WordPiece decodes it if it folds case."""
    as_printed = pieces(tokens)
    spaced = " ".join(piece.lstrip(" ") for piece in as_printed)
    return "".join(as_printed), spaced, spaced.lower()
