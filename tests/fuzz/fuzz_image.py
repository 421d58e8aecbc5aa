"""Any bytes as a picture, and as depth: python tests/fuzz/fuzz_image.py [-max_total_time=60] tests/corpus/image (best with atheris)."""

from __future__ import annotations

import io
import sys
import warnings
from contextlib import suppress
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

from fuzz.drive import instrumented, main

with instrumented():
    from pykvsmooth.depth import check_map, read_values
    from pykvsmooth.errors import ImageError
    from pykvsmooth.images import load_image, preprocess
    from pykvsmooth.limits import Limits

LIMITS = Limits(image_pixels=1 << 16)  # more is legal, and slow


def try_one(data: bytes) -> None:
    """ImageError is the only error that bytes may give."""
    with suppress(ImageError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = load_image(data, limits=LIMITS)
        assert picture.mode == "RGB"
        for mode in ("pad", "crop", "stretch"):
            assert preprocess(picture, 14, mode).shape == (3, 14, 14)
    for name in ("depth.png", "depth.npy"):
        with suppress(ImageError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert check_map(name, read_values(io.BytesIO(data), name, LIMITS), LIMITS).dtype == "f4"


if __name__ == "__main__":
    main(try_one)
