"""The training loop of the built-in engine."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zenith_det.config import CfgNode
from zenith_det.errors import TrainingDivergedError
from zenith_det.solver import eval_mode, train_mode
from zenith_det.training.checkpoint import Checkpointer
from zenith_det.training.distributed import all_gather_objects, get_rank, get_world_size, is_main_process
from zenith_det.training.events import EventStorage, Writer
from zenith_det.training.progress import ConsoleWriter
from zenith_det.training.zenith_metrics import optimizer_scalars

logger = logging.getLogger(__name__)

LOG_PERIOD = 20

Batch = list[dict[str, Any]]


@dataclass
class Progress:
    """What a checkpoint holds beside weights, optimizer and schedule."""

    iteration: int = 0
    seed: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Takes SGD-like steps on detection losses, logs, evaluates and saves.

    Random choices inside the model (which anchors and proposals are sampled) are seeded by iteration and
    rank, and the loader's by image, so a resumed run repeats an uninterrupted one.

    Args:
        cfg: the configuration.
        model: called with a list of samples, returns a dict of scalar losses; maybe wrapped by DDP.
        optimizer: from :func:`zenith_det.solver.build_optimizer`.
        scheduler: stepped once per iteration.
        batches: this rank's batches, from ``progress.iteration`` on.
        progress: where the run stands.
        checkpointer: of the output directory.
        writers: of the main process; none on the others.
        evaluate: runs an evaluation and returns scalars; called on every rank.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        batches: Iterator[Batch],
        progress: Progress,
        checkpointer: Checkpointer,
        writers: list[Writer],
        evaluate: Callable[[], dict[str, float]],
    ) -> None:
        self.cfg = cfg
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batches = batches
        self.progress = progress
        self.checkpointer = checkpointer
        self.writers = writers
        self.evaluate = evaluate
        self.parts: int = cfg.SOLVER.GRADIENT_ACCUMULATION
        self.max_iter: int = cfg.SOLVER.MAX_ITER
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.storage = EventStorage(progress.iteration)
        self.amp = cfg.SOLVER.AMP.ENABLED and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.amp)
        self._losses: list[tuple[int, dict[str, Tensor]]] = []
        self._console = next((w for w in writers if isinstance(w, ConsoleWriter)), None)

    def train(self) -> dict[str, float]:
        """Train to ``SOLVER.MAX_ITER`` and return the scalars of the last evaluation.

        Raises:
            TrainingDivergedError: the loss or the gradients stayed non-finite.
        """
        self.model.train()
        train_mode(self.optimizer)
        results: dict[str, float] = {}
        try:
            while self.progress.iteration < self.max_iter:
                self.iterate()
                done = self.progress.iteration
                last = done == self.max_iter
                if done % LOG_PERIOD == 0 or last:
                    self._write()
                if done % self.cfg.SOLVER.CHECKPOINT_PERIOD == 0 and not last:
                    self.save(f"model_{done - 1:07d}")
                if last:
                    self.save("model_final")
                period = self.cfg.TEST.EVAL_PERIOD
                if last or (period > 0 and done % period == 0):
                    results = self._evaluate()
        finally:
            for writer in self.writers:
                writer.close()
        return results

    def iterate(self) -> None:
        """One iteration: a batch, a step, the LR of the next. Nothing is written."""
        iteration = self.progress.iteration
        self.storage.iter = iteration
        start = time.perf_counter()
        batch = next(self.batches)
        data_time = time.perf_counter() - start
        seed_step(self.progress.seed, iteration)
        self._step(batch, iteration)
        self.progress.iteration = iteration + 1
        self.storage.put_scalars(time=time.perf_counter() - start, data_time=data_time)
        if self._console is not None:
            self._console.update(self.storage)

    def _step(self, batch: Batch, iteration: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for number, part in enumerate(split_batch(batch, self.parts)):
            with self._sync_last(number), torch.autocast(self.device.type, torch.float16, enabled=self.amp):
                losses = self.model(part)
                total = sum(losses.values(), torch.zeros((), device=self.device)) / self.parts
            with self._sync_last(number):
                self.scaler.scale(total).backward()
            for name, loss in losses.items():
                share = loss.detach() / self.parts
                totals[name] = totals[name] + share if name in totals else share
        try:
            self.scaler.step(self.optimizer)
        except FloatingPointError as error:
            self._diverged(totals, str(error))
        self.scaler.update()
        self._losses.append((iteration, totals))
        if (iteration + 1) % LOG_PERIOD == 0 or iteration + 1 == self.max_iter:
            # Before the scheduler moves on: these are the figures of the step just taken.
            self.storage.put_scalars(smoothing=False, **optimizer_scalars(self.optimizer))
        self.scheduler.step()

    def _sync_last(self, number: int) -> AbstractContextManager[Any]:
        """Gradients cross the processes once per step, with the last part of the batch."""
        if number < self.parts - 1 and isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return nullcontext()

    def _write(self) -> None:
        """Fetch the losses since the last call in one transfer, average them over ranks, and log."""
        if self._losses:
            names = list(self._losses[0][1])
            table = torch.stack(
                [torch.stack([losses[n] for n in names]) for _, losses in self._losses]
            ).float()
            rows = table.cpu().tolist()
            if get_world_size() > 1:
                gathered = all_gather_objects(rows)
                rows = [
                    [sum(rank[i][j] for rank in gathered) / len(gathered) for j in range(len(names))]
                    for i in range(len(rows))
                ]
            for (iteration, _), row in zip(self._losses, rows):
                for name, value in [("total_loss", sum(row)), *zip(names, row)]:
                    self.storage.put_scalar(name, value, iteration=iteration)
            last = self._losses[-1][1]
            self._losses = []
            if not math.isfinite(sum(rows[-1])) and not hasattr(self.optimizer, "zenith_state"):
                # ZENITH skips such steps and counts them; other optimizers have already taken them in.
                self._diverged(last, "the loss is not finite")
        for writer in self.writers:
            writer.write(self.storage)

    def _diverged(self, losses: dict[str, Tensor], reason: str) -> None:
        parts = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.items())
        lr = optimizer_scalars(self.optimizer)["lr"]
        raise TrainingDivergedError(
            f"training diverged at iteration {self.progress.iteration} (LR {lr:.4g}; {parts}): {reason}; "
            "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or set SOLVER.CLIP_GRADIENTS.ENABLED True"
        )

    def _evaluate(self) -> dict[str, float]:
        eval_mode(self.optimizer)
        self.model.eval()
        results = self.evaluate()
        self.model.train()
        train_mode(self.optimizer)
        self.storage.put_scalars(smoothing=False, **results)
        for writer in self.writers:
            if writer is not self._console:
                writer.write(self.storage)
        return results

    def save(self, name: str) -> None:
        """Write a checkpoint; the main process alone does."""
        if not is_main_process():
            return
        eval_mode(self.optimizer)
        state = {
            "model": unwrap(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": self.progress.iteration - 1,
            "seed": self.progress.seed,
            **self.progress.facts,
        }
        train_mode(self.optimizer)
        path = self.checkpointer.save(name, state)
        logger.info("saved %s", path)

    def load(self, state: dict[str, Any]) -> None:
        """Go on where ``state``, a checkpoint of :meth:`save`, stopped."""
        unwrap(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.amp and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


def seed_step(seed: int, iteration: int) -> None:
    """Seed torch for one iteration of this rank, so that no random state needs saving."""
    # Large odd multipliers keep (iteration, rank) pairs apart; any 63-bit value is a valid seed.
    torch.manual_seed((seed + iteration * 1_000_003 + get_rank() * 2_147_483_647) % 2**63)


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """``batch`` in ``parts`` runs of equal length."""
    size = len(batch) // parts
    return [batch[i * size : (i + 1) * size] for i in range(parts)]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
