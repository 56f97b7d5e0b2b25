"""A grammar small enough to meet all its texts."""

import functools
import random
from collections import Counter

from trainer.storybook.engine import Grammar

# Every kind of notation: weights, kept values, attributes, selection, and lengths that depend on earlier choices.
TOY = """
# children and caps
story
    2 * <hero:child> lost $hero.his cap <place:place> . <found/$place.kind>
    <cap> <ending>
child
    <girl>
    2 * tom | he=he, his=his
girl | he=she, his=her
    mia
    3 * little anna
place
    by the lake | kind=water
    3 * in the park | kind=green, name=park
    at home | kind=green, name=very old house
cap
    a cap for <owner:girl> .
    a cap for <owner:girl> , said <friend:girl> .
ending
    the cap of $owner was $owner.his <size> treasure .
size
    big
    small
found/water
    $hero fished it out .
    2 * $hero.he got wet , poor $hero .
found/green
    it lay in the $place.name !
"""


@functools.cache
def toy() -> Grammar:
    """Returns the grammar."""
    return Grammar(TOY)


@functools.cache
def toy_counts() -> Counter[str]:
    """Returns how often each text is among 20,000 that were drawn."""
    source = random.Random(0)
    return Counter(toy().sample(source) for _ in range(20_000))
