"""The vocabulary of the little world: an orchard by a harbour, and who lives there."""

from __future__ import annotations

from random import Random

NAMES = tuple(
    "Pip Tess Otto Mina Juno Bram Cleo Dot Ezra Fern Gus Hazel Iris Jack Kit Lola Milo Nell Quinn"
    " Zoe".split()
)
COLOURS = tuple("red blue green yellow white black brown grey pink purple orange golden".split())
FOODS = tuple(
    "plums cherries pears apples figs seeds berries nuts crumbs shrimps beans oats peas grapes"
    " snails worms beetles mussels crabs olives".split()
)
PLACES = tuple(
    "garden harbour orchard lighthouse mill boathouse barn bridge meadow pond tower bakery school"
    " church market forest castle cottage stable quarry".split()
)
THINGS = tuple(
    "anchor apple barrel basket bell boat book bottle bucket button candle chair clock coat crate"
    " cup door drum egg feather fence fig flag hammer hat kettle key ladder lamp leaf".split()
)
OPPOSITES = tuple(
    tuple(pair.split("-"))
    for pair in (
        "warm-cold big-small wet-dry old-new fast-slow high-low long-short heavy-light dark-bright"
        " loud-quiet hard-soft full-empty clean-dirty rich-poor happy-sad early-late open-closed"
        " strong-weak thick-thin wide-narrow"
    ).split()
)
NUMBERS = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen twenty".split()
)

ORDINALS = ("first", "second", "third", "fourth")

LEXICON = (*NAMES, *COLOURS, *FOODS, *PLACES, *THINGS, *NUMBERS)
LEXICON += tuple(word for pair in OPPOSITES for word in pair)

_ONSETS = "b br ch d dr f fl g gr h j k kl l m n p pl r s sh st t tr v w z".split()
_VOWELS = "a e i o u ai ee oo ou".split()
_CODAS = ["", "", "", *"b d g k l m n p r s t x ck nd rt sk".split()]


def pseudo_word(rng: Random, syllables: int) -> str:
    """A word that nobody knows, such as `plodrai`."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)
    )
