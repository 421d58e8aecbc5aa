"""Which objects a caption names: the rules of CHAIR, caption by caption, and what parity with the reference scorer changes."""

import pytest

from pykvsmooth.evaluate import find, mentions, node_of, node_words
from pykvsmooth.evaluate.tokens import tokens

# Written by hand from the rules. One line: caption | node words in order.
CAPTIONS = """
A dog runs after two cats. | dog, cat
Dogs and CATS, a Bird; the bird's nest. | dog, cat, bird, bird
A man, two men, a woman and three women | person, person, person, person
Several people and their children wait with a child. | person, person, person
Two buses and a bus, two busses | bus, bus, bus
Knives, a knife and a pocketknife beside forks | knife, knife, knife, fork
One sheep, two sheep, a ewe and her lambs | sheep, sheep, sheep, sheep
A goose and five geese at the lake | bird, bird
An ox and the oxen pull; calves follow the calf | cow, cow, cow, cow
The mice ran from the mouse of the computer. | mouse, mouse, laptop
Puppies, ponies and a puppy | dog, horse, dog
Ferries and a ferry beside canoes | boat, boat, boat
Benches, couches, a bench, a couch | bench, couch, bench, couch
Three wine glasses and a glass of wine | wine glass
A wine glass. Wine is in a glass. | wine glass
Glasses on his nose |
Two hot dogs with mustard | hot dog
A hot day; the dog sleeps | dog
It was hot: dogs panted | dog
A batter stands at home plate |
A plate at home, a train on the train track | train
Train tracks lead to the train | train
The tracks of a train | train
A passenger train with a passenger | train, person
Passenger jets take off | airplane
A baby elephant beside an adult elephant | elephant, elephant
A baby with a baby giraffe and a baby | person, giraffe, person
Adult sheep, baby sheep, an adult | sheep, sheep, person
A baby carrot | person, carrot
An animal and a cub, a baby animal |
The toilet seat is up | toilet
The seat of the toilet is up | toilet
A toilet, beside it a seat and another chair | toilet, chair
A seat by the window, two seats | chair, chair
Toilets with seats, stools | toilet, chair
A fire hydrant; hydrants | fire hydrant, fire hydrant
A stop sign at a stop light and a traffic light | stop sign, traffic light, traffic light
Stop! Sign here. |
A street light and a streetlight, traffic signals | traffic light, traffic light, traffic light
A parking meter in the parking lot, parking meters | parking meter, parking meter
He tries parking; meters run. |
A teddy bear, a bear, two teddy bears | teddy bear, bear, teddy bear
A cell phone, a mobile phone, a phone | cell phone, cell phone, cell phone
A laptop computer, a laptop, a computer | laptop, laptop, laptop
A baseball bat, a bat, a baseball glove, gloves | baseball bat, baseball glove
A sports ball, a ball, balls | sports ball, sports ball, sports ball
A tennis racket, rackets and a tennis ball | tennis racket, tennis racket, sports ball
A man in a bow tie and a tie with a bow | person, tie, tie, tie
A potted plant, potted plants and a plant | potted plant, potted plant
A hair drier and a hairdryer | hair drier, hair drier
A dining table, a table and a desk | dining table, dining table, dining table
A stove top oven | oven, oven
An air plane, an airplane, a motor cycle | airplane, airplane, motorcycle
A suit case with luggage | suitcase, suitcase
The man's dog's bowl; the dogs' bowls | person, dog, bowl, dog, bowl
A "dog" (a puppy), 'cat' and [bird]! | dog, dog, cat, bird
A dog-like cat on a half-eaten hot-dog | cat
dog,cat;bird bird/horse table.chair | dog, cat, bird
An orange cat with an orange | orange, cat, orange
Skis, a ski, scissors | skis, skis, scissors
A TV, a television, monitors | tv, tv, tv
Frisbees and kites... a kite?! | frisbee, kite, kite
A couch—a sofa – a bed | couch, couch, bed
**Person**: a `clock`, 2 vases & 3 books | person, clock, vase, book
The women's umbrellas aren't umbrellas | person, umbrella, umbrella
A category of catalogues, cathedrals and doggedness |
""".strip("\n").splitlines()
# The same, where the reference goes its own way: caption | default | parity
QUIRKS = """
A motor bike | motorcycle |
Two motor bikes and a bike | motorcycle, bicycle | bicycle
A cheesecake, a cupcake, cheesecakes | cake, cake, cake | cake
An iPhone and an iphone | cell phone, cell phone |
Two men and a man | person, person | person
Two vases and a vase | vase, vase | vase
Smartphones, a smartphone | cell phone, cell phone | cell phone
Pitbulls chase two coworkers | dog, person |
A man skiing down a slope | person | person, skis
A woman seated beside a boy | person, person | person, chair, person
A horse tied to a tree | horse | horse, tie
People snowboarding and skateboarding | person | person, snowboard, skateboard
""".strip("\n").splitlines()


def parts(line: str) -> list:
    caption, *expected = line.split("|")
    return [caption.strip(), *([node.strip() for node in nodes.split(",") if node.strip()] for nodes in expected)]


@pytest.mark.parametrize("line", CAPTIONS)
def test_mentions(line):
    caption, expected = parts(line)
    assert mentions(caption) == expected


@pytest.mark.parametrize("line", QUIRKS)
def test_quirks_of_the_reference(line):
    caption, default, parity = parts(line)
    assert (mentions(caption), mentions(caption, parity=True)) == (default, parity)


def test_parity_changes_nothing_else():
    for caption, expected in map(parts, CAPTIONS):
        if " men," not in caption and " vases " not in caption:
            assert mentions(caption, parity=True) == expected


def test_the_list_of_words():
    nodes = node_words()
    assert len(nodes) == len(set(nodes)) == 80
    for node in nodes:
        assert mentions(f"There is a {node} here.") == mentions(f"A {node.upper()}!") == [node] == mentions(node, parity=True)
        assert node_of(node) == node
    assert node_of(" Bow  TIE ") == "tie" and node_of("iphone") == "cell phone" and node_of("cheesecake") == "cake"
    assert node_of("unicorn") is None and node_of("") is None


def test_places_and_length():
    text = "Two Hot  dogs (and a man's cell\nphone)."
    found, length = find(text)
    assert [text[m.begin : m.end] for m in found] == ["Hot  dogs", "man", "cell\nphone"]
    assert length == 10  # two, hot dog, (, and, a, man, 's, cell phone, ), .
    assert find("") == ([], 0) == find(" \n")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("can't won't it's they'll we've I'd I'm", "ca n't wo n't it 's they 'll we 've i 'd i 'm"),
        ("cannot gonna wanna gimme lemme gotta", "can not gon na wan na gim me lem me got ta"),
        ("dogs' o'clock 'cat' rock'n'roll", "dogs ' o'clock ' cat ' rock'n'roll"),
        ("3:30 1,000 a:b a,b 50% #1 $5", "3:30 1,000 a : b a , b 50 % # 1 $ 5"),
        ('end. end... end?! (end.) "end." e.g. a.b', 'end . end ... end ? ! ( end . ) " end . " e.g . a.b'),
        ("a--b a-b a — b “q” ‘q’ «q» [a] {b} <c> *d*", "a -- b a-b a — b “ q ” ‘ q ’ « q » [ a ] { b } < c > * d *"),
    ],
)
def test_tokens(text, expected):
    assert [word for word, _, _ in tokens(text)] == expected.split()


@pytest.mark.parametrize("unit", [".)", "'", "n't", ".", "a.", ",:", "-", "`'", "'s", "n'", "can", "dog ", "\x00", "İ"])
def test_any_text_is_taken_in_linear_time(unit):
    text = unit * (100_000 // len(unit))
    covered = 0
    for _, begin, end in tokens(text):
        assert covered <= begin < end and not text[covered:begin].strip()
        covered = end
    assert not text[covered:].strip()
