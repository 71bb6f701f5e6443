"""The training loop of `finetune`: one for all modes, for this process and for Ray Train workers.

Everything random comes from (seed, epoch, step) and a batch does not depend on the number of workers, so neither does the loss
curve, and a run that was killed goes on from its checkpoint to the same weights.
"""

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sanitize import storage
from sanitize.config import FinetuneConfig
from sanitize.errors import SanitizeError
from sanitize.training.checkpoints import load_checkpoint, save_checkpoint
from sanitize.training.distributed import Rank, ReportCallback
from sanitize.training.optimizer import adamw, warmup_cosine

log = logging.getLogger(__name__)
LEARNING_RATES = {"linear": 3e-3, "mlp": 1e-3, "full": 1e-4, "contrastive": 1e-5}
REPORT_EVERY = 1.0  # seconds
Metrics = dict[str, float]


@dataclass(frozen=True)
class Batch:
    """This rank's share of one optimiser step. pieces: what Objective.loss takes, as many on every rank.

    usable, unreadable: its samples that count, and those whose image or caption turned out to be broken.
    """

    pieces: list[Any]
    usable: int
    unreadable: int


class Objective(Protocol):
    """What one mode trains, and on what. Every rank gets `steps` batches in an epoch."""

    steps: int
    samples: int

    @property
    def model(self) -> nn.Module: ...

    def batches(self, epoch: int, first: int, rank: Rank) -> Generator[Batch, None, None]:
        """The batches of an epoch from number `first` on."""
        ...

    def loss(self, model: nn.Module, piece: Any, rank: Rank) -> Tensor:
        """Sum of the losses of this rank's samples; over all ranks, that of the whole piece. `model` may be wrapped by DDP."""
        ...

    def validate(self, rank: Rank) -> Metrics:
        """The same numbers on every rank; with `score`, higher = better, by which the best epoch is chosen. {} = no validation."""
        ...


@dataclass
class State:
    """Where a training stands. totals: (3,) float64 loss, usable, unreadable of this rank since the epoch began."""

    totals: Tensor
    epoch: int = 0
    step: int = 0
    best_epoch: int = 0  # counted from 1; 0 = none yet
    best_score: float = -math.inf
    metrics: list[dict[str, float]] = field(default_factory=list)

    def finished(self, config: FinetuneConfig) -> bool:
        stale = config.patience > 0 and self.epoch - self.best_epoch >= config.patience and self.best_epoch > 0
        return self.epoch >= config.epochs or stale


class Trainer:
    """One rank's training; `run` goes on from the last checkpoint in `folder` when there is one."""

    def __init__(
        self, config: FinetuneConfig, objective: Objective, rank: Rank, folder: str, report: ReportCallback
    ) -> None:
        self._config, self._objective, self._rank, self._folder = config, objective, rank, folder
        self._base_rate = config.learning_rate or LEARNING_RATES[config.mode]
        self._bare = objective.model.to(rank.device)
        learned = [p for p in self._bare.parameters() if p.requires_grad]
        self._optimizer = adamw(learned, self._base_rate, config.weight_decay)
        self._state = self._restore()
        self._model: nn.Module = self._bare
        if rank.world > 1:
            self._model = DistributedDataParallel(self._bare, broadcast_buffers=False)
        self._pace = _Pace(objective, report)

    def run(self) -> State:
        """Train to the last epoch or to the early stop."""
        while not self._state.finished(self._config):
            self._epoch()
            self._close_epoch()
            self._pace.show(self._state, force=True)
        return self._state

    def _epoch(self) -> None:
        config, state, steps = self._config, self._state, self._objective.steps
        with contextlib.closing(self._objective.batches(state.epoch, state.step, self._rank)) as batches:
            for batch in batches:
                self._step(batch)
                self._pace.show(state)
                if config.checkpoint_steps and state.step % config.checkpoint_steps == 0 and state.step < steps:
                    self._save_within_epoch()

    def _step(self, batch: Batch) -> None:
        state, steps = self._state, self._objective.steps
        warmup = round(self._config.warmup_epochs * steps)
        factor = warmup_cosine(state.epoch * steps + state.step, self._config.epochs * steps, warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = self._base_rate * factor
        count = int(sum_over_ranks(torch.tensor(batch.usable, device=self._rank.device), self._rank))
        loss = self._gradients(batch, count)
        if count:
            self._optimizer.step()
        state.totals += torch.stack([loss, *torch.tensor([batch.usable, batch.unreadable]).to(loss)])
        state.step += 1

    def _gradients(self, batch: Batch, count: int) -> Tensor:
        """Leave the gradient of the mean loss of all ranks' `count` samples; returns the sum of this rank's, () float64.

        DDP averages over ranks, hence the factor `world`.
        """
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self._rank.device)
        for number, piece in enumerate(batch.pieces):
            last = number == len(batch.pieces) - 1
            waits = isinstance(self._model, DistributedDataParallel) and not last
            with self._model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                loss = self._objective.loss(self._model, piece, self._rank)
                (loss * (self._rank.world / max(count, 1))).backward()
            total += loss.detach()
        return total

    def _close_epoch(self) -> None:
        """Measure, remember the best epoch, save."""
        state = self._state
        loss, usable, unreadable = sum_over_ranks(state.totals, self._rank).tolist()
        if not usable:
            raise SanitizeError(
                f"none of the {int(unreadable)} samples can be decoded. Give shards of readable images."
            )
        if not math.isfinite(loss):
            raise SanitizeError(
                f"training diverged in epoch {state.epoch + 1} (loss {loss}). Lower --learning-rate and run again with another --out."
            )
        measured = self._objective.validate(self._rank)
        state.epoch, state.step, state.totals = state.epoch + 1, 0, torch.zeros_like(state.totals)
        line: dict[str, float] = {"epoch": state.epoch, "loss": loss / usable}
        line["learning_rate"] = self._optimizer.param_groups[0]["lr"]
        line |= {"samples": int(usable), "unreadable": int(unreadable), **measured}
        state.metrics.append(line | {"samples_per_second": round(self._pace.speed(), 1)})
        better = measured.get("score", -math.inf) > state.best_score
        if better:
            state.best_epoch, state.best_score = state.epoch, measured["score"]
        if self._rank.index == 0:
            if better and self._config.patience:  # first: a kill after it repeats the epoch and writes it again
                save_checkpoint(storage.join(self._folder, "best.pt"), {"model": self._bare.state_dict()})
            self._checkpoint()
            _write_metrics(storage.join(self._folder.rsplit("/", 1)[0], "metrics.jsonl"), state.metrics)

    def _restore(self) -> State:
        rank = self._rank
        state = State(torch.zeros(3, dtype=torch.float64, device=rank.device))
        saved = load_checkpoint(storage.join(self._folder, "last.pt"), rank.device)
        if saved:
            self._bare.load_state_dict(saved["model"])
            self._optimizer.load_state_dict(saved["optimizer"])
            totals = saved["totals"].to(state.totals)
            state = State(**saved["state"], totals=totals if rank.index == 0 else torch.zeros_like(totals))
            log.info("going on after epoch %d, batch %d", state.epoch, state.step)
        return state

    def _save_within_epoch(self) -> None:
        """Rank 0 then holds what all ranks have counted."""
        totals = sum_over_ranks(self._state.totals, self._rank)
        self._state.totals = totals if self._rank.index == 0 else torch.zeros_like(totals)
        if self._rank.index == 0:
            self._checkpoint()

    def _checkpoint(self) -> None:
        plain = {f.name: getattr(self._state, f.name) for f in dataclasses.fields(State) if f.name != "totals"}
        content = {"model": self._bare.state_dict(), "optimizer": self._optimizer.state_dict()}
        save_checkpoint(storage.join(self._folder, "last.pt"), content | {"state": plain, "totals": self._state.totals})


def sum_over_ranks(value: Tensor, rank: Rank) -> Tensor:
    """The sum over all ranks, on every rank; `value` stays as it is."""
    if rank.world == 1:
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total


class _Pace:
    """Speed of this run, and reports of it about once a second."""

    def __init__(self, objective: Objective, report: ReportCallback) -> None:
        self._objective, self._report = objective, report
        self._last = self._begin = time.monotonic()
        self._steps = 0  # of this run
        self._first: float | None = None  # epochs done when this run began
        self._mark = (self._begin, 0)  # when the last epoch ended

    def show(self, state: State, force: bool = False) -> None:
        epochs = state.epoch + state.step / self._objective.steps
        self._steps += not force
        if self._first is None:
            self._first = epochs - 1 / self._objective.steps
        if force or time.monotonic() - self._last >= REPORT_EVERY:
            self._last = time.monotonic()
            done = round(self._steps * self._objective.samples / self._objective.steps)
            loss = f"loss {state.metrics[-1]['loss']:.4f}" if state.metrics else ""
            self._report({"epochs": epochs, "first": self._first, "samples": done, "note": loss})

    def speed(self) -> float:
        """Samples of all ranks per second since it was asked last."""
        now = (time.monotonic(), self._steps)
        steps, seconds = now[1] - self._mark[1], now[0] - self._mark[0]
        self._mark = now
        return steps * self._objective.samples / self._objective.steps / max(seconds, 1e-9)


# ---------------------------------------------------------------- checkpoints


def load_finished(config: FinetuneConfig, model: nn.Module, folder: str) -> State:
    """Put the final weights of the training in `folder` into `model`: the best epoch's when it could stop early."""
    device = torch.device("cpu")
    last = load_checkpoint(storage.join(folder, "last.pt"), device)
    best = load_checkpoint(storage.join(folder, "best.pt"), device) if config.patience else {}
    model.load_state_dict((best or last)["model"])
    return State(**last["state"], totals=last["totals"])


def _write_metrics(path: str, metrics: list[dict[str, float]]) -> None:
    """One JSON object a line, one line an epoch."""
    storage.write_bytes(path, "".join(json.dumps(line) + "\n" for line in metrics).encode())
