"""Laws of what rules mean together: whatever a text would stumble over is refused before one is drawn."""

import pytest

from trainer.errors import UserError
from trainer.storybook.engine import Grammar


def grammar_text(rules):
    return "\n".join(line for symbol, lines in rules.items() for line in (symbol, *(f"    {each}" for each in lines)))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"story": ["once <upon>"]}, "^a.txt:2: symbol 'upon' is undefined; define it or correct the name."),
        ({"tale": ["once"]}, "^symbol 'story', which every text is derived from, is undefined; define it."),
        ({"story": ["once"], "time": ["now"]}, "^a.txt:3: nothing uses symbol 'time'; use or remove it."),
        ({"story": ["<x:a>"], "a": ["by | kind=b"], "a/b": ["now"]}, "^a.txt:5: nothing uses symbol 'a/b'"),
        ({"story": ["$hero ran"]}, r"^a.txt:2: '\$hero ran' reads the variable \$hero, which not every text has kept"),
        ({"story": ["<a> $x"], "a": ["<x:b>", "no"], "b": ["yes"]}, r"^a.txt:2: '<a> \$x' reads the variable \$x"),
        ({"story": ["<see/$x.kind> <x:a>"], "a": ["by | kind=b"], "see/b": ["now"]}, r"^a.txt:2: .* variable \$x"),
        (
            {"story": ["<x:a> <x:a>"], "a": ["one", "two"]},
            r"^a.txt:2: variable \$x is kept again; rename one of the two",
        ),
        ({"story": ["<x:a> <b>"], "a": ["one"], "b": ["by", "<x:a>"]}, r"^a.txt:7: variable \$x is kept again"),
        (
            {"story": ["<x:a> $x.his"], "a": ["mia | his=her", "tom"]},
            r"^a.txt:5: 'tom' has no attribute 'his', which '<x:a> \$x.his' \(a.txt:2\) reads; add it.",
        ),
        (
            {"story": ["<x:a> <see/$x.kind>"], "a": ["by | kind=b"]},
            r"^a.txt:4: symbol 'see/b', which \$x can select, is undefined; define it.",
        ),
        (
            {"story": ["<x:a>"], "a": ["red <b>", "red cap"], "b": ["cap"]},
            "^a.txt:5: symbol 'a' has the alternative 'red cap' twice",
        ),
        (
            {"story": ["<x:a>"], "a": ["red <y:b>"], "b": ["cap"]},
            "^a.txt:4: symbol 'a' is kept in a variable, so 'red <y:b>' may read or keep none; write words",
        ),
        (
            {"story": ["a <b>"], "b": ["<c>"], "c": ["no <b>"]},
            r"^a.txt:\d: a symbol may not contain itself: (b in )?c in",
        ),
    ],
)
def test_a_fault_is_named_by_file_and_line(rules, message):
    with pytest.raises(UserError, match=message):
        Grammar(grammar_text(rules), "a.txt")
