"""CHAIR (Rohrbach et al. 2018): the COCO objects that a caption speaks of, found by a list of words. No NLTK, no WordNet.

The rules are those of the scorer that OPERA, PAI, SPARC, MiddleLayer and hence KVSmooth use: lower case, Treebank tokens, lemmas,
double words, "toilet" takes every "seat" away, and what is left is looked up. Words are taken for nouns. parity=True repeats the
reference also where it is plainly not what was meant:

- entries of the list with a leading space (" motor bike", " cheesecake") and "iPhone" never match;
- WordNet's lemmas: "men" stays "men" (workers) and "vases" becomes "vas" (a duct), both lost; words that WordNet 3.0 does not have keep
  their plural and are lost, too ("smartphones", "pitbulls");
- verbs give objects: "skiing" has skis, whoever is "seated" has a chair, what is "tied" has a tie.

Without parity the first two are mended and the third does not happen. Everything else is the same, so also "stove top oven" (three
words: two mentions of an oven), "orange" the colour, and "glass" that is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from .tokens import tokens

DOUBLE_WORDS = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, stop sign, parking meter, "
    "suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, hot dog, cell phone, mobile phone, teddy bear, "
    "hair drier, potted plant, bow tie, laptop computer, home plate, train track"
).split(", ")
ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()

# Lemmas of nouns, made with NLTK's WordNetLemmatizer on WordNet 3.0: for every word of the list and every part of a double word, all
# surface forms that its rules and exceptions could lead there were lemmatized. The rules are _plurals(); what they do not give is here.
IRREGULAR = {
    **{"children": "child", "grandchildren": "grandchild", "geese": "goose", "mice": "mouse", "oxen": "ox", "sports": "sport"},
    **{"knives": "knife", "pocketknives": "pocketknife", "busses": "bus", "buffaloes": "buffalo", "flamingoes": "flamingo"},
    "taxies": "taxi",
}
UNKNOWN_TO_WORDNET = frozenset(  # their plurals, that is
    "biker bluejay brindle children coworker firetruck hairdryer hot iphone knive lenovo longboard macbook netbook paddleboat pitbull "
    "potted riverboat sailboard shortboard skimboard skis smartphone solider sports stovetop teddybear televison".split()
)
LOST_PLURALS = ("men", "vases")  # WordNet has other words of that form

# Verbs, for parity: forms whose lemma as a verb is in the list. NLTK's tagger decides in context, and is not at hand here; these are
# the forms that captions use as verbs or not at all. Left as nouns, as they mostly are: bedding, booking, bowling, lighting, parking,
# potted, seating, shipping, topping, training, trucking, and other nouns in -ing.
VERBS = {
    "ball": "balled balling", "bear": "bearing born borne", "bicycle": "bicycled bicycling", "bike": "biked biking",
    "boat": "boated boating", "book": "booked", "bottle": "bottled bottling", "bow": "bowed bowing", "bowl": "bowled",
    "cake": "caked caking", "canoe": "canoed canoeing", "chair": "chaired chairing", "cup": "cupped cupping", "dog": "dogged dogging",
    "duck": "ducked ducking", "ferry": "ferried ferrying", "fork": "forked forking", "groom": "groomed grooming", "horse": "horsing",
    "kayak": "kayaked kayaking", "kid": "kidding", "man": "manned manning", "microwave": "microwaved microwaving",
    "monitor": "monitored monitoring", "mop": "moped", "motorcycle": "motorcycled motorcycling", "phone": "phoned phoning",
    "purse": "pursed pursing", "ram": "rammed ramming", "sandwich": "sandwiched sandwiching", "seat": "seated", "ship": "shipped",
    "sink": "sank sinking sunk sunken", "skateboard": "skateboarded skateboarding", "ski": "skied skiing",
    "snowboard": "snowboarded snowboarding", "surfboard": "surfboarding", "table": "tabled", "taxi": "taxied taxiing taxying",
    "telephone": "telephoned telephoning", "tie": "tied tying", "train": "trained", "truck": "trucked", "yacht": "yachting",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mention:
    """An object that a caption names: the node word, and where in the text (characters begin to end)."""

    node: str
    begin: int
    end: int


@dataclass(frozen=True)
class _Rules:
    nodes: dict[str, str]  # word or double word -> node word
    doubles: dict[tuple[str, str], str]  # two lemmas -> what they become
    lemmas: dict[str, str]  # surface form -> lemma, where they differ


def mentions(caption: str, parity: bool = False) -> list[str]:
    """The node words ("person", "dining table", ...) of the objects that the caption names, in its order, repeats kept."""
    return [mention.node for mention in find(caption, parity)[0]]


def find(caption: str, parity: bool = False) -> tuple[list[Mention], int]:
    """(mentions in order, the caption's length: its tokens, punctuation among them, a double word counting as one)."""
    rules = _rules(parity)
    words = _merged(caption, rules)
    names = {word for word, _, _ in words}
    without = "seat" if "toilet" in names else ""  # "the seat of the toilet" is no chair
    found = [Mention(rules.nodes[word], begin, end) for word, begin, end in words if word in rules.nodes and word != without]
    return found, len(words)


def node_of(name: str) -> str | None:
    """The node word for the name of an object (any entry of the list, in any case), None for a name that is not in it."""
    return _rules(False).nodes.get(" ".join(name.lower().split()))


def node_words() -> list[str]:
    """The 80 COCO classes, in the order of the list."""
    return [entries[0] for entries in _synonyms()]


def _merged(caption: str, rules: _Rules) -> list[tuple[str, int, int]]:
    """Lemmas with their places; two that make a double word are one, from the left."""
    lemmas = [(rules.lemmas.get(word, word), begin, end) for word, begin, end in tokens(caption)]
    merged = []
    i = 0
    while i < len(lemmas):
        word, begin, end = lemmas[i]
        double = rules.doubles.get((word, lemmas[i + 1][0])) if i + 1 < len(lemmas) else None
        if double is not None:
            word, end = double, lemmas[i + 1][2]
            i += 1
        merged.append((word, begin, end))
        i += 1
    return merged


@cache
def _rules(parity: bool) -> _Rules:
    nodes = {entry: entries[0] for entries in _synonyms() for entry in entries}
    if not parity:
        nodes = {entry.strip().lower(): node for entry, node in nodes.items()}
    doubles = {(first, second): f"{first} {second}" for first, second in (double.split() for double in DOUBLE_WORDS)}
    doubles |= {(age, animal): animal for age in ("baby", "adult") for animal in ANIMALS}
    doubles |= {("passenger", vehicle): vehicle for vehicle in ("jet", "train")}
    doubles |= {("bow", "tie"): "tie", ("toilet", "seat"): "toilet"}
    words = {
        word for name in (*nodes, *(word for double in doubles for word in double)) for word in [name.strip().lower()] if " " not in word
    }
    doubles["wine", "glas"] = "wine glass"  # what another lemmatizer makes of the glass
    return _Rules(nodes, doubles, _lemmas(words, parity))


@cache
def _synonyms() -> list[list[str]]:
    """One line per class, the node word first. The reference splits at exactly ", " and strips only the line."""
    text = files(__package__).joinpath("data/synonyms.txt").read_text("utf-8")
    return [line.strip().split(", ") for line in text.splitlines()]


def _lemmas(words: set[str], parity: bool) -> dict[str, str]:
    known = words - UNKNOWN_TO_WORDNET if parity else words
    regular = {form: word for word in sorted(known) for form in _plurals(word)}
    if not parity:
        return regular | IRREGULAR
    verbs = {form: word for word, forms in VERBS.items() for form in forms.split()}
    return {form: word for form, word in (regular | IRREGULAR | verbs).items() if form not in LOST_PLURALS}


def _plurals(word: str) -> Iterable[str]:
    """The forms that WordNet's rules of detachment lead back to the word."""
    yield word + "s"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        yield word + "es"
    for ending, plural in (("y", "ies"), ("f", "ves"), ("man", "men")):
        if word.endswith(ending):
            yield word.removesuffix(ending) + plural
