"""What a scene may hold: pictograms with their words, the contexts that they are typical of, and what keeps whose company.

A kind is one pictogram. Its first word list gives the nouns that captions use for it; its node is the COCO class that CHAIR counts
(several kinds may share one: a duck and an owl are birds). Nothing but these nouns may read as a COCO object in a caption: no table,
desk, seat or light in the phrases around them.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Kind(NamedTuple):
    name: str
    node: str
    glyph: str
    words: tuple[str, ...]
    scale: float  # of the pictogram's long side, against the others
    manner: str  # which phrases of the grammar follow it


# name: node, glyph, nouns, scale, manner. Where the node is "", it is the name.
_KINDS = """
person       |            | 🧍 | person               | 1.2 | person
walker       | person     | 🚶 | person, walker       | 1.2 | person
woman        | person     | 💃 | woman, lady          | 1.2 | person
man          | person     | 🕺 | man, guy             | 1.2 | person
bicycle      |            | 🚲 | bicycle, bike        | 1.1 | parked
car          |            | 🚗 | car                  | 1.2 | parked
suv          | car        | 🚙 | car, suv             | 1.2 | parked
taxi         | car        | 🚕 | taxi, cab            | 1.2 | parked
motorcycle   |            | 🏍 | motorcycle, motorbike| 1.1 | parked
scooter      | motorcycle | 🛵 | scooter, moped       | 1.1 | parked
airplane     |            | 🛩 | airplane, plane      | 1.2 | flying
jet          | airplane   | ✈  | plane, jet           | 1.1 | flying
bus          |            | 🚌 | bus                  | 1.3 | parked
train        |            | 🚆 | train                | 1.3 | parked
locomotive   | train      | 🚂 | locomotive, train    | 1.3 | parked
truck        |            | 🚚 | truck, lorry         | 1.3 | parked
pickup       | truck      | 🛻 | pickup               | 1.2 | parked
firetruck    | truck      | 🚒 | firetruck            | 1.3 | parked
sailboat     | boat       | ⛵ | sailboat, boat       | 1.2 | afloat
speedboat    | boat       | 🚤 | speedboat, motorboat | 1.1 | afloat
canoe        | boat       | 🛶 | canoe, kayak         | 1.1 | afloat
ship         | boat       | 🚢 | ship                 | 1.3 | afloat
traffic light|            | 🚦 | traffic light        | 1.0 | fixed
stop sign    |            | 🛑 | stop sign            | 0.9 | fixed
bird         |            | 🐦 | bird                 | 0.8 | animal
duck         | bird       | 🦆 | duck, bird           | 0.9 | animal
owl          | bird       | 🦉 | owl                  | 0.9 | animal
swan         | bird       | 🦢 | swan                 | 0.9 | animal
parrot       | bird       | 🦜 | parrot               | 0.9 | animal
rooster      | bird       | 🐓 | rooster              | 0.9 | animal
flamingo     | bird       | 🦩 | flamingo             | 1.0 | animal
cat          |            | 🐈 | cat                  | 0.9 | animal
dog          |            | 🐕 | dog                  | 0.9 | animal
poodle       | dog        | 🐩 | poodle, dog          | 0.9 | animal
horse        |            | 🐎 | horse                | 1.2 | animal
sheep        |            | 🐑 | sheep                | 1.0 | animal
goat         | sheep      | 🐐 | goat                 | 1.0 | animal
cow          |            | 🐄 | cow                  | 1.2 | animal
ox           | cow        | 🐂 | ox, bull             | 1.2 | animal
elephant     |            | 🐘 | elephant             | 1.4 | animal
bear         |            | 🐻 | bear                 | 1.0 | animal
panda        | bear       | 🐼 | panda                | 1.0 | animal
zebra        |            | 🦓 | zebra                | 1.2 | animal
giraffe      |            | 🦒 | giraffe              | 1.4 | animal
backpack     |            | 🎒 | backpack             | 0.9 | lying
umbrella     |            | ☂  | umbrella             | 1.0 | lying
handbag      |            | 👜 | handbag              | 0.8 | lying
purse        | handbag    | 👛 | purse                | 0.8 | lying
tie          |            | 👔 | tie                  | 0.9 | lying
suitcase     |            | 🧳 | suitcase             | 1.0 | lying
briefcase    | handbag    | 💼 | briefcase            | 0.9 | lying
frisbee      |            | 🥏 | frisbee              | 0.8 | lying
skis         |            | 🎿 | skis                 | 1.0 | lying
soccer ball  | sports ball| ⚽ | ball                 | 0.8 | lying
basketball   | sports ball| 🏀 | ball                 | 0.8 | lying
kite         |            | 🪁 | kite                 | 1.0 | flying
skateboard   |            | 🛹 | skateboard           | 0.9 | lying
racket       |tennis racket| 🏸 | racket              | 0.9 | lying
bottle       |            | 🍾 | bottle               | 0.9 | standing
wine glass   |            | 🍷 | wine glass           | 0.9 | standing
cup          |            | ☕ | cup                  | 0.8 | standing
knife        |            | 🔪 | knife                | 0.9 | lying
spoon        |            | 🥄 | spoon                | 0.8 | lying
bowl         |            | 🥣 | bowl                 | 0.9 | standing
banana       |            | 🍌 | banana               | 0.8 | food
apple        |            | 🍎 | apple                | 0.8 | food
sandwich     |            | 🥪 | sandwich             | 0.9 | food
burger       | sandwich   | 🍔 | burger, hamburger    | 0.9 | food
orange       |            | 🍊 | orange               | 0.8 | food
broccoli     |            | 🥦 | broccoli             | 0.8 | food
carrot       |            | 🥕 | carrot               | 0.8 | food
hot dog      |            | 🌭 | hot dog              | 0.9 | food
pizza        |            | 🍕 | pizza                | 0.9 | food
donut        |            | 🍩 | donut, doughnut      | 0.8 | food
bagel        | donut      | 🥯 | bagel                | 0.8 | food
cake         |            | 🎂 | cake                 | 0.9 | food
cupcake      | cake       | 🧁 | cupcake              | 0.8 | food
pancake      | cake       | 🥞 | pancake              | 0.9 | food
chair        |            | 🪑 | chair                | 1.1 | fixed
couch        |            | 🛋 | couch, sofa          | 1.3 | fixed
potted plant |            | 🪴 | potted plant, houseplant | 1.0 | fixed
bed          |            | 🛏 | bed                  | 1.4 | fixed
toilet       |            | 🚽 | toilet               | 1.1 | fixed
tv           |            | 📺 | tv, television       | 1.1 | fixed
monitor      | tv         | 🖥 | monitor              | 1.1 | fixed
laptop       |            | 💻 | laptop               | 1.0 | standing
mouse        |            | 🖱 | mouse                | 0.7 | lying
keyboard     |            | ⌨  | keyboard             | 0.9 | lying
cell phone   |            | 📱 | cell phone, phone    | 0.8 | lying
telephone    | cell phone | ☎  | telephone            | 0.9 | standing
book         |            | 📕 | book                 | 0.9 | lying
clock        |            | ⏰ | clock                | 0.9 | fixed
vase         |            | 🏺 | vase                 | 1.0 | standing
scissors     |            | ✂  | scissors             | 0.8 | lying
teddy bear   |            | 🧸 | teddy bear           | 0.9 | lying
toothbrush   |            | 🪥 | toothbrush           | 0.8 | lying
"""


def _parse(line: str) -> Kind:
    name, node, glyph, words, scale, manner = (part.strip() for part in line.split("|"))
    return Kind(name, node or name, glyph, tuple(word.strip() for word in words.split(",")), float(scale), manner)


KINDS = tuple(_parse(line) for line in _KINDS.strip().splitlines())
CLASSES = tuple(kind.name for kind in KINDS)
_INDEX = {kind.name: i for i, kind in enumerate(KINDS)}


class Context(NamedTuple):
    phrase: str  # the opening of a caption
    sky: tuple[int, ...]  # colours above and below the horizon
    ground: tuple[int, ...]
    horizon: float  # share of the height
    texture: str  # of the ground: tiles | planks | grass | waves | road | plain
    typical: dict[int, float]  # kind -> weight: 4, 2, 1


# phrase | colours above and below the horizon | its height | texture | kinds, the most typical ones first
_CONTEXTS = """
a bright kitchen with tiles on the floor | f3ead8 cdd6d9 | 0.45 | tiles
    / knife, spoon, bowl, cup
    / bottle, apple, carrot, broccoli, banana
    / orange, clock, potted plant, pizza, chair, cat
a dining room that is set for a meal | e8d3c0 b98d63 | 0.40 | planks
    / wine glass, chair, bowl, spoon
    / knife, cake, bottle, pizza, cup
    / vase, sandwich, donut, person, woman, potted plant
a cozy living room with a wooden floor | dfe3cf b5825a | 0.50 | planks
    / couch, tv, potted plant
    / book, cat, vase, chair, teddy bear
    / clock, dog, cell phone, laptop, person, cup, umbrella
a quiet bedroom with walls in soft colors | d5d8ee a99fb5 | 0.45 | plain
    / bed, teddy bear, book
    / clock, cell phone, potted plant, cat, chair
    / laptop, tie, backpack, handbag, suitcase, tv, cup
a clean bathroom with tiles on the walls | d4ecf2 9fc3cf | 0.35 | tiles
    / toilet, toothbrush, cup
    / scissors, bottle, potted plant
    / vase, clock, cat, chair, book, cell phone, umbrella
a plain office in the middle of a working day | e6e8ea 9aa0a8 | 0.50 | plain
    / laptop, keyboard, mouse, monitor
    / telephone, chair, cup, book
    / scissors, clock, potted plant, briefcase, tie, man, woman, cell phone
a city street with a line along the road | b9c9d9 74777d | 0.45 | road
    / car, traffic light, bus, walker
    / taxi, bicycle, truck, stop sign, person
    / suv, motorcycle, scooter, handbag, umbrella, firetruck, dog, woman
a green park with a lot of grass | bfe0f7 7fb35a | 0.40 | grass
    / dog, bicycle, frisbee, kite
    / person, bird, duck, soccer ball, poodle
    / skateboard, hot dog, racket, backpack, woman, walker, umbrella
a sandy beach on a warm summer day | 9fd4f2 ecd9a3 | 0.40 | waves
    / umbrella, sailboat, kite, frisbee
    / speedboat, person, soccer ball, woman, bird
    / canoe, dog, backpack, handbag, bottle, parrot, flamingo
a farm in the country with wide fields | cde6f5 a4b857 | 0.40 | grass
    / cow, sheep, horse, rooster
    / goat, ox, pickup, duck, dog
    / truck, cat, person, man, apple, carrot, bird
a wide savanna with dry grass and sun | f6dfae cfa956 | 0.40 | grass
    / elephant, giraffe, zebra
    / ox, bird, flamingo, suv
    / owl, parrot, person, airplane, pickup, backpack, goat
a snowy hill on a cold winter day | c9dcec f2f6fa | 0.40 | plain
    / skis, person, walker
    / bear, backpack, dog, owl
    / suv, firetruck, panda, bird, horse, goat, man, suitcase, cup
a harbor with calm water and soft waves | b6d6ea 5f9cc0 | 0.40 | waves
    / ship, sailboat, speedboat, bird
    / canoe, swan, duck, person
    / walker, suitcase, truck, bicycle, dog, clock, man, bottle
a railway platform early in the morning | d3d6dc 8c8580 | 0.45 | road
    / train, suitcase, clock, walker
    / locomotive, backpack, person, handbag, briefcase
    / umbrella, bicycle, cell phone, woman, man, book, bird, cup
"""


def _context(entry: str) -> Context:
    head, *groups = entry.split("\n    / ")
    phrase, colours, horizon, texture = (part.strip() for part in head.split("|"))
    sky, ground = (tuple(bytes.fromhex(colour)) for colour in colours.split())
    weights = {_INDEX[name.strip()]: 4.0 / 2**i for i, names in enumerate(groups) for name in names.split(",")}
    return Context(phrase, sky, ground, float(horizon), texture, weights)


CONTEXTS = tuple(_context(entry) for entry in re.split(r"\n(?! )", _CONTEXTS.strip()))

# What comes along, once the first is there: (kind, companion, probability).
_COMPANY = """
laptop mouse .35, monitor keyboard .5, keyboard mouse .4, cup spoon .3, bowl spoon .35, knife apple .15,
bicycle walker .25, wine glass bottle .4, bus walker .25, dog frisbee .2, dog person .2, horse man .25,
suitcase woman .25, skis person .4, sailboat bird .25, ship bird .25, bed teddy bear .25, couch cat .25, cow rooster .2,
kite woman .25, toilet toothbrush .3, car stop sign .2, taxi traffic light .3, locomotive suitcase .25, sandwich cup .25,
cake wine glass .2, giraffe zebra .3, elephant giraffe .25, book cup .25, motorcycle man .3, soccer ball man .25,
racket woman .3, briefcase tie .3
"""


def _company() -> dict[int, list[tuple[int, float]]]:
    found: dict[int, list[tuple[int, float]]] = {}
    for entry in _COMPANY.replace("\n", " ").split(","):
        names, probability = entry.rsplit(None, 1)
        for cut in range(1, len(words := names.split())):  # names of several words: the cut that makes two of them
            first, second = " ".join(words[:cut]), " ".join(words[cut:])
            if first in _INDEX and second in _INDEX:
                found.setdefault(_INDEX[first], []).append((_INDEX[second], float(probability)))
                break
        else:
            raise ValueError(entry)
    return found


COMPANY = _company()
