"""Laws of printing: a print reads like a page of a book, and gives back the one text that it is the print of."""

import random

import pytest
from toy_grammar import toy  # type: ignore[import-not-found]  # pytest has this folder on its path

from trainer.errors import UserError
from trainer.storybook import storybook
from trainer.storybook.engine import Grammar
from trainer.storybook.printing import forms, pieces, printed, tokens_of


@pytest.mark.parametrize(
    ("text", "page"),
    [
        ("the fox ran . it saw Tom , and I laughed !", "The fox ran. It saw Tom, and I laughed!"),
        ('" come with me , " said the fox . the end .', "“Come with me,” said the fox. The end."),
        ('" who is there ? " he asked . " oh no ! " cried Mia .', "“Who is there?” he asked. “Oh no!” cried Mia."),
        ('Tom asked , " why ? " the fox sat . " so . " it ran .', "Tom asked, “Why?” The fox sat. “So.” It ran."),
        ('" come , " said Tom , " and look ! " it ran .', "“Come,” said Tom, “and look!” It ran."),
        ('" come , " said Tom . " look ! it ran . "', "“Come,” said Tom. “Look! It ran.”"),
        ('" look , " he said , and so it was . " I ? "', "“Look,” he said, and so it was. “I?”"),
        ("", ""),
    ],
)
def test_a_page_has_capitals_spaces_and_quotation_marks_as_a_book_has(text, page):
    tokens = text.split()
    assert printed(tokens) == page
    assert tokens_of(page, {"tom": "Tom", "mia": "Mia", "i": "I"}) == tokens


def test_each_print_gives_back_its_tokens_whatever_a_tokenizer_does_to_case_and_spaces():
    # So stories that differ have prints that differ, also in lower case: printing and folding cost no probability, and
    # a story is as likely as its derivation.
    grammar = storybook.built_in_grammar()
    assert {word for word in grammar.spelling if word != grammar.spelling[word]} > {"i", "tom", "sunday", "lucy"}
    for index in range(3000):
        tokens = grammar.sample(random.Random(f"1/{index}")).split(" ")
        for form in forms(tokens):
            assert tokens_of(form, grammar.spelling) == tokens
        assert forms(tokens)[0] == printed(tokens) == storybook.story(1, index)


def test_a_text_that_is_cut_is_printed_as_the_start_of_the_whole():
    for index in range(50):
        tokens = storybook.built_in_grammar().sample(random.Random(index)).split(" ")
        whole = pieces(tokens)
        assert all(pieces(tokens[:num_tokens]) == whole[:num_tokens] for num_tokens in range(len(tokens)))


def test_a_word_with_and_without_a_capital_is_refused_because_a_page_would_not_tell_which_it_was():
    with pytest.raises(UserError, match=r"^a.txt:\d: 'rose' is also written 'Rose'; write it in one way everywhere\.$"):
        Grammar("story\n    <girl> saw a rose .\ngirl\n    Rose\n    Mia", "a.txt")
    with pytest.raises(UserError, match="'may' is also written 'May'"):
        Grammar("story\n    <who:girl> saw $who.what\ngirl\n    May | what=it\n    Mia | what=may")
    assert toy().spelling["anna"] == "anna"
