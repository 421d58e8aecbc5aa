"""How much a model invents: CHAIR's figures of captions whose pictures' objects are known.

    from pykvsmooth import evaluate
    truth = evaluate.read_truth("truth.jsonl")                          # or evaluate.coco_truth("annotations")
    captions = evaluate.run(model, [("0", "0.png"), ...], policy=kvs.KVSmooth(), out="captions.jsonl", tokens=True)
    report = evaluate.score(captions, truth)
    report.figures(), report.intervals(), evaluate.compare(report, baseline)

chair.py finds the objects in a text, score.py counts, controls.py has what a method must be held against, sweep.py walks parameters.
"""

from .captioning import PROMPT, run
from .chair import Mention, find, mentions, node_of, node_words
from .coco import coco_truth
from .controls import Separation, drop_last, entropy_separation, positions, sentence_ends, truncated
from .errors import EvaluationError
from .files import coco_id, opera500, read_captions, read_ids, read_truth, stem
from .score import FIGURES, Caption, Comparison, Report, Scored, TokenFacts, auc, compare, mcnemar, score
from .sweep import Point, Sweep, grid, sweep

__all__ = [
    "FIGURES",
    "PROMPT",
    "Caption",
    "Comparison",
    "EvaluationError",
    "Mention",
    "Point",
    "Report",
    "Scored",
    "Separation",
    "Sweep",
    "TokenFacts",
    "auc",
    "coco_id",
    "coco_truth",
    "compare",
    "drop_last",
    "entropy_separation",
    "find",
    "grid",
    "mcnemar",
    "mentions",
    "node_of",
    "node_words",
    "opera500",
    "positions",
    "read_captions",
    "read_ids",
    "read_truth",
    "run",
    "score",
    "sentence_ends",
    "stem",
    "sweep",
    "truncated",
]
