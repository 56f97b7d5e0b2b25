"""Laws of the notation: a line that cannot be read is refused by its file and number, with what is allowed."""

import configparser
import re
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.storybook.engine import Grammar
from trainer.storybook.grammar import read_rules
from trainer.storybook.printing import tokens_of
from trainer.storybook.storybook import GRAMMAR_FILE


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("    once", 1, "the alternative 'once' has no symbol above it; write one."),
        ("story\n    once\nstory | kind=b\n    now", 3, "symbol 'story' is defined twice; put its alternatives"),
        ("# comment\n\nstory\ntale\n    once", 3, "symbol 'story' has no alternatives; give it one, indented, below"),
        ("story\n    once\n    3 * once", 3, "symbol 'story' has the alternative 'once' twice; give one more weight."),
        ("story\n    2 * | kind=b", 2, "symbol 'story' has an empty alternative, which no text shows; write words."),
        (
            "story\n    ONCE",
            2,
            "cannot read 'ONCE'; write a word in lower case or a name, one of . , ! ? \", <symbol>, <va",
        ),
        ("story\n    once  upon", 2, "cannot read ''; write a word in lower case"),
        ("story\n    don't", 2, 'cannot read "don\'t"; write a word in lower case'),
        ("story\n    <a/b/c>", 2, "cannot read '<a/b/c>'; write a word in lower case"),
        ("story\n    0 * once", 2, "cannot read '0'; write a word in lower case"),
        ("story\n    once | kind", 2, "cannot read the attribute 'kind'; write name=words, and `, ` between two."),
        ("story | kind=bB\n    once", 1, "cannot read the attribute 'kind=bB'; write name=words"),
        ("story 1\n    once", 1, "cannot read the symbol 'story 1'; write letters and _, at most one /, then ` | name"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(text, line, message):
    with pytest.raises(UserError, match=f"^stories.txt:{line}: {re.escape(message)}"):
        read_rules(text, "stories.txt")


def test_comments_and_blank_lines_do_not_count_but_in_the_line_numbers():
    rules = read_rules("\n# a\nstory | kind=b\n\n    2 * once | name=c d\n    # b\n    <x:tale>\n", "a.txt")
    assert rules["story"].place == "a.txt:3"
    once, kept = rules["story"].alternatives
    assert (once.place, once.template, once.weight) == ("a.txt:5", "once", 2)
    assert once.attributes == {"kind": ("b",), "name": ("c", "d")}
    assert (kept.place, kept.template, kept.weight, kept.attributes) == ("a.txt:7", "<x:tale>", 1, {"kind": ("b",)})


def test_the_file_ships_in_the_wheel():
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[1] / "setup.cfg")
    assert GRAMMAR_FILE.name in settings["options.package_data"]["trainer.storybook"].split()


def test_the_example_in_the_head_of_the_file_is_a_grammar():
    head = GRAMMAR_FILE.read_text("utf-8").partition("\n\n")[0]
    lines = [line.removeprefix("#     ") for line in head.splitlines() if line.startswith("#     ")]
    # What explains a line stands to its right, after four blanks or more.
    example = Grammar("\n".join(re.sub(r"(?<=\S) {4,}.*", "", line) for line in lines))
    told = next(line for line in head.splitlines() if "printed as in a book: " in line).partition("book: ")[2]
    assert told.startswith("Mia lost her cap. Mia saw it. “I like it!” cried the girl.")
    for page in (
        "Mia lost her cap. Mia saw it. “I like it!” cried the girl.",
        "Tom lost his cap. Tom saw it. The boy sang.",
    ):
        assert list(example.derivations(" ".join(tokens_of(page, example.spelling))))
