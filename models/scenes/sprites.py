"""The sheet of pictograms, one cell of 64 x 64 for each kind, in the catalogue's order.

python -m models.scenes.sprites FONT        draws the sheet anew from NotoColorEmoji.ttf (only after the catalogue has changed)
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .catalogue import KINDS

CELL = 64
COLUMNS = 12
SHEET = Path(__file__).with_name("sprites.png")
FONT_SIZE = 109  # the one size that the font's bitmaps have


def draw(glyph: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """A pictogram cropped to what is seen of it, its long side CELL."""
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    ImageDraw.Draw(canvas).text((20, 20), glyph, font=font, embedded_color=True)
    box = canvas.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    if box is None:
        raise ValueError(f"the font has no {glyph!r}")
    seen = canvas.crop(box)
    return seen.resize([max(1, round(side * CELL / max(seen.size))) for side in seen.size], Image.Resampling.LANCZOS)


def write_sheet(font_path: str) -> None:
    font = ImageFont.truetype(font_path, FONT_SIZE)
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(KINDS) // COLUMNS) * CELL))
    for i, kind in enumerate(KINDS):
        cell = draw(kind.glyph, font)
        sheet.paste(cell, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    sheet.save(SHEET, optimize=True)


@cache
def sprites() -> tuple[Image.Image, ...]:
    """One for each kind, cropped, in mode RGBa: colours times coverage, which is what scaling and turning must average."""
    with Image.open(SHEET) as sheet:
        sheet.load()
    cells = []
    for i in range(len(KINDS)):
        x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
        cell = sheet.crop((x, y, x + CELL, y + CELL))
        rows, columns = (np.flatnonzero(np.asarray(cell)[:, :, 3].max(axis)) for axis in (1, 0))
        cells.append(cell.crop((0, 0, int(columns[-1]) + 1, int(rows[-1]) + 1)).convert("RGBa"))
    return tuple(cells)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_sheet(sys.argv[1])
