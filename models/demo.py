"""The main job, shown: a streamed caption of a photograph, with the strength of the smoothing under each line, and a stats line.

There is no trained checkpoint in the box yet, so this makes a random LLaVA pair first. Its words mean nothing.
"""

import sys
from pathlib import Path

from random_pair import write_pair

from pykvsmooth.cli.main import main

HERE = Path(__file__).resolve().parent
PAIR = HERE / "demo-random"


def demo() -> int:
    text, mmproj = PAIR / "text.gguf", PAIR / "mmproj.gguf"
    if not (text.exists() and mmproj.exists()):
        write_pair(PAIR)
    print("A random model: its words mean nothing by design, only the machinery is real.", file=sys.stderr)
    model = ["--model", str(text), "--mmproj", str(mmproj), "--max-tokens", "90", "--repetition-penalty", "2"]
    return main(["caption", str(HERE / "demo" / "chelsea.png"), *model, "--heat", "--strengths"])


if __name__ == "__main__":
    sys.exit(demo())
