"""models/cards.py: its arithmetic by hand and against rows of SPEED.md, and the loader's choice over tests/shim."""

import pytest
from devices import DEVICE

from models import cards
from pykvsmooth.bench import work
from pykvsmooth.machine import cuda_text

SEVEN = cards.Token(layers=32, layer=(3.899 + 0.3355) / 32, output=0.1075)


def test_seconds_of_two_devices() -> None:
    """10 layers of 1 GB and an output of 2: eight layers and the output at 10 GB/s, two layers at 4."""
    assert cards.Token(10, 1.0, 2.0).per_second(8, 10.0, 4.0) == pytest.approx(1 / (1.0 + 0.5))
    assert cards.Token(10, 1.0, 2.0).per_second(10, 12.0, 4.0) == pytest.approx(1)
    assert cards.Token(10, 1.0, 2.0).total == 12


def test_rows_of_the_table() -> None:
    assert cards.cells(SEVEN, 25, 336, 40) == "25 of 32 | 25 / 30"
    assert cards.cells(SEVEN, 32, 272, 40) == "all | 38 / 63" and cards.cells(SEVEN, 32, 1792, 40) == "all | 248 / 413"
    assert cards.cells(SEVEN, 4, 100, 30).count(".") == 2  # one digit behind the point below ten


def test_larger_cards_are_not_tried_where_all_fit(monkeypatch) -> None:
    tried = []

    def loaded(text: str, mmproj: str, memory: float, depth: int) -> tuple[cards.Token, int]:
        tried.append(memory)
        return SEVEN, min(32, 3 * int(memory))

    monkeypatch.setattr(cards, "loaded", loaded)
    _, fit = cards.plans("t", "m", 640)
    assert fit == {6: 18, 8: 24, 10: 30, 12: 32, 16: 32, 24: 32, 32: 32} and tried == [6, 8, 10, 12]


@pytest.mark.skipif(DEVICE == "cpu" or not cuda_text().startswith("archs shim"), reason="only the shim's memory is what one says")
def test_the_loader_chooses(tiny_pair, model, monkeypatch) -> None:
    """All of it where there is room; a token's bytes are those that bench counts."""
    monkeypatch.setenv("KVS_SHIM_MEMORY", "0")  # put back behind the test
    token, layers = cards.loaded(tiny_pair.text, tiny_pair.mmproj, 1.0, 64)
    assert layers == token.layers == model.n_layer
    assert 1e9 * token.total == pytest.approx(work.of_model(model).token_bytes + work.cache_bytes(model, "f16", 64))
