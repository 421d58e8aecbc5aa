"""The training loop that tower and language model share: rate, steps, checkpoints, development figures, log and bar.

Which samples a step sees is a function of the seed and the step alone, and nothing else in training is random: a run that goes on from a
checkpoint repeats what an uninterrupted one does.
"""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .recipe import Pace, TrainingError
from .work import Work, finished

Figures = dict[str, float]


def keep(model: nn.Module, path: Path) -> None:
    """A stage's result: the tensors of model as safetensors."""
    with finished(path) as part:
        save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, part)


def fill(model: nn.Module, path: Path) -> None:
    """The tensors that keep wrote, into a model of the same sizes."""
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TrainingError(f"{path}: not of a model of these sizes: {str(error).splitlines()[0]}") from error


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The samples of an epoch, shuffled."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def rate(pace: Pace, step: int) -> float:
    """Linear warm-up, then half a cosine down to a share of the peak."""
    warm = max(1, int(pace.warm * pace.steps))
    if step < warm:
        return pace.rate * (step + 1) / warm
    turn = math.pi * (step - warm) / max(1, pace.steps - warm)
    return pace.rate * (pace.floor + (1 - pace.floor) * 0.5 * (1 + math.cos(turn)))


def optimizers(model: nn.Module, pace: Pace) -> list[torch.optim.Optimizer]:
    """AdamW, of which only matrices decay; with pace.muon the matrices inside layers are Muon's, with steps of AdamW's size."""
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = [p for name, p in learnt.items() if pace.muon and ".layers." in name and p.dim() == 2]
    outer = [p for p in learnt.values() if not any(p is one for one in inner)]
    groups = [
        {"params": [p for p in outer if p.dim() > 1], "weight_decay": pace.decay},
        {"params": [p for p in outer if p.dim() <= 1], "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=pace.rate, betas=(0.9, 0.98), fused=True)]
    if inner:
        found.append(torch.optim.Muon(inner, lr=pace.rate, weight_decay=pace.decay, adjust_lr_fn="match_rms_adamw"))
    return found


@dataclass
class Loop:
    """model: what learns; loss: of a step, the first entry is minimized, the others are shown; check: figures on development scenes.

    every: seconds between checkpoints; seed and other things that make a checkpoint this run's are in identity.
    """

    work: Work
    stage: str
    model: nn.Module
    pace: Pace
    loss: Callable[[int], dict[str, Tensor]]
    check: Callable[[], Figures]
    identity: dict[str, object]
    every: float = 180.0
    checks: int = 12

    def __post_init__(self) -> None:
        self.optimizers = optimizers(self.model, self.pace)
        self.path = self.work.path(f"{self.stage}.checkpoint")
        self.identity = json.loads(json.dumps({**self.identity, "pace": asdict(self.pace)}))

    def run(self) -> None:
        """From the checkpoint, or from nothing, to the last step. An interrupt costs what came after the last checkpoint."""
        first = self._resume()
        saved, spent, sums = time.monotonic(), 0.0, {}
        stride = max(1, self.pace.steps // self.checks)
        with self.work.bar() as bar:
            row = bar.add_task(self.stage, total=self.pace.samples, completed=first * self.pace.batch, note="")
            for step in range(first, self.pace.steps):
                begun = time.monotonic()
                for name, value in self._step(step).items():
                    sums.setdefault(name, []).append(value)
                spent += time.monotonic() - begun
                done = step + 1
                speed = (done - first) * self.pace.batch / spent
                bar.update(row, completed=done * self.pace.batch, note=f"loss {next(iter(sums.values()))[-1]:.3f}  {speed:.0f}/s")
                if done % stride == 0 or done == self.pace.steps:
                    means = {name: sum(values) / len(values) for name, values in sums.items()}
                    self.work.log(self.stage, done, rate=rate(self.pace, step), **means, **self._look(), speed=speed)
                    sums.clear()
                if time.monotonic() - saved > self.every:
                    self._save(done)
                    saved = time.monotonic()
        self.model.eval()

    def forget(self) -> None:
        """When the stage's result is on disk the checkpoint has done its work."""
        self.path.unlink(missing_ok=True)

    def _step(self, step: int) -> Figures:
        self.model.train()
        for group in (group for one in self.optimizers for group in one.param_groups):
            group["lr"] = rate(self.pace, step)
        losses = self.loss(step)
        first = next(iter(losses.values()))
        if not torch.isfinite(first):
            raise TrainingError(f"{self.stage}: the loss is {first.item()} at step {step}: choose a lower rate")
        self.model.zero_grad(set_to_none=True)
        first.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for one in self.optimizers:
            one.step()
        return {name: value.item() for name, value in losses.items()}

    def _look(self) -> Figures:
        self.model.eval()
        with torch.no_grad():
            return self.check()

    def _save(self, step: int) -> None:
        kept = [one.state_dict() for one in self.optimizers]
        state = {"step": step, "identity": self.identity, "model": self.model.state_dict(), "optimizers": kept}
        with finished(self.path) as part:
            torch.save(state, part)

    def _resume(self) -> int:
        if not self.path.exists():
            return 0
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            same = state["identity"] == self.identity
            if same:
                self.model.load_state_dict(state["model"])
                for one, kept in zip(self.optimizers, state["optimizers"], strict=True):
                    one.load_state_dict(kept)
        except (RuntimeError, KeyError, TypeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise TrainingError(f"{self.path}: not a checkpoint of this stage ({type(error).__name__}): remove it") from error
        if not same:
            raise TrainingError(f"{self.path}: of a run with other settings: remove it, or give the same ones")
        self.work.console.print(f"{self.stage}: goes on at step {state['step']} of {self.pace.steps}", highlight=False)
        return int(state["step"])
