"""The vocabulary of the little world: birds of an orchard by a harbour, and what surrounds them."""

from __future__ import annotations

from random import Random

NAMES = tuple(
    "Pip Tess Wren Otto Mina Juno Bram Cleo Dot Ezra Fern Gus Hazel Iris Jack Kit Lola Milo Nell"
    " Olive Penny Quinn Rosa Sol Tilly Una Vera Wally Xena Yuri Zoe Ada Basil Coco Daisy Elmo Flora"
    " Greta Hugo Ivy Koko Luna Max Nora Oscar Poppy Ruby Toby".split()
)

KINDS = tuple(
    "lorikeet heron gull robin finch owl crow duck puffin tern swift swan magpie goose parrot stork"
    " falcon pigeon sparrow kestrel raven starling thrush egret osprey plover".split()
)

COLOURS = tuple(
    "red blue green yellow white black brown grey pink purple orange golden silver".split()
)
SHADES = ("dark", "pale", "bright", "light")

FOODS = tuple(
    "plums cherries pears apples figs seeds berries nuts crumbs shrimps beans oats peas grapes"
    " snails worms beetles mussels crabs sardines olives chestnuts acorns melons lentils carrots"
    " radishes buns pancakes raisins".split()
)

FOOD_ADJECTIVES = ("fresh", "ripe", "sweet", "dried", "tasty")
KIND_ADJECTIVES = ("young", "old", "tiny", "big", "shy", "wise")
TIMES = ("at dawn", "at night", "at noon", "in the rain", "after lunch", "all day")

PREPOSITIONS = ("in", "by", "near", "behind", "under", "beside")
PLACES = tuple(
    "garden harbour orchard lighthouse mill boathouse barn bridge meadow pond tower bakery school"
    " church market station library stable quarry forest castle cottage greenhouse windmill jetty"
    " chapel tavern workshop well ferry".split()
)

HOBBIES = tuple(
    "sing dive sleep dance climb read paint swim whistle hop run fish cook sail dig juggle knit"
    " jump draw float hide race drum skate".split()
)

THINGS = tuple(
    "anchor barrel basket bell boat book bottle bucket candle chair clock coat crate cup door egg"
    " fence flag hammer hat kettle key ladder lamp leaf map mirror net oar pebble pot ring rope"
    " shell shovel stone table tree umbrella vase violin wheel window yarn".split()
)

OPPOSITES = tuple(
    tuple(pair.split("-"))
    for pair in (
        "warm-cold big-small wet-dry old-new fast-slow high-low long-short heavy-light dark-bright"
        " loud-quiet hard-soft full-empty clean-dirty rich-poor happy-sad early-late open-closed"
        " strong-weak thick-thin wide-narrow deep-shallow sweet-sour"
        " calm-stormy sharp-blunt"
    ).split()
)

NUMBERS = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen twenty".split()
)

ORDINALS = ("first", "second", "third", "fourth", "fifth")

# Words that only questions hold; the tokenizer and the repeating task know them too.
PLAIN = tuple(
    "about after again alphabet answer any assistant beside castle change copy count exactly find"
    " friend gold have here know like live lunch many not opposite order question read repeat"
    " reverse say second sentence sort story system tasty tell text these thing want what where"
    " which without word write".split()
)
LEXICON = (*NAMES, *KINDS, *COLOURS, *SHADES, *FOODS, *PLACES, *HOBBIES, *THINGS, *NUMBERS, *PLAIN)
LEXICON += tuple(word for pair in OPPOSITES for word in pair)

_ONSETS = "b br ch d dr f fl g gr h j k kl l m n p pl r s sh st t tr v w z".split()
_VOWELS = "a e i o u ai ee oo ou".split()
_CODAS = ["", "", "", *"b d g k l m n p r s t x ck nd rt sk".split()]


def pseudo_word(rng: Random, syllables: int) -> str:
    """A word that nobody knows, such as `plodrai`."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)
    )


def name(rng: Random) -> str:
    """A bird's name: mostly a familiar one, else one invented on the spot."""
    if rng.random() < 0.92:
        return rng.choice(NAMES)
    return pseudo_word(rng, rng.choice((1, 2))).capitalize()


def place(rng: Random) -> str:
    """A place with its preposition, such as `by the harbour`."""
    return f"{rng.choice(PREPOSITIONS)} the {rng.choice(PLACES)}"


def colour(rng: Random) -> str:
    """A colour, with or without a shade: `green`, `dark green`."""
    base = rng.choice(COLOURS)
    return f"{rng.choice(SHADES)} {base}" if rng.random() < 0.4 else base


def food(rng: Random) -> str:
    """Something to eat: `plums`, `fresh plums`."""
    base = rng.choice(FOODS)
    return f"{rng.choice(FOOD_ADJECTIVES)} {base}" if rng.random() < 0.4 else base


def kind(rng: Random) -> str:
    """A kind of bird with its article: `a heron`, `an old heron`."""
    base = rng.choice(KINDS)
    return with_article(f"{rng.choice(KIND_ADJECTIVES)} {base}" if rng.random() < 0.4 else base)


def hobby(rng: Random) -> str:
    """Something to do: `sing`, `sing at dawn`."""
    base = rng.choice(HOBBIES)
    return f"{base} {rng.choice(TIMES)}" if rng.random() < 0.4 else base


def with_article(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
