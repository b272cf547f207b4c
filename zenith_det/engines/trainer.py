"""The training loop of either engine."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zenith_det.config import CfgNode
from zenith_det.engines.accumulating import backward_in_parts
from zenith_det.engines.device import amp_dtype, make_grad_scaler
from zenith_det.engines.engine import Batch, Engine
from zenith_det.engines.model_format import compile_backbone
from zenith_det.engines.prefetch import Prefetcher
from zenith_det.errors import RunStopped, UserError
from zenith_det.solver import build_lr_scheduler, build_optimizer, eval_mode, train_mode
from zenith_det.training.checkpoints import averaging
from zenith_det.training.checkpoints.averaging import WeightAverage
from zenith_det.training.checkpoints.best_checkpoint import BestCheckpoint
from zenith_det.training.checkpoints.checkpoint import FINAL_NAME, Checkpointer
from zenith_det.training.checkpoints.weights import load_model_weights
from zenith_det.training.course.evaluations import Evaluations, follow_evaluations
from zenith_det.training.course.seeding import seed_all, seed_step
from zenith_det.training.failures.out_of_memory import OutOfMemoryError, telling_of_memory
from zenith_det.training.failures.recovery import Diverged
from zenith_det.training.failures.step_guard import StepGuard
from zenith_det.training.logs.events import EventStorage, Writer
from zenith_det.training.logs.memory import peak_cuda_mib
from zenith_det.training.logs.progress import ConsoleWriter
from zenith_det.training.logs.zenith_metrics import effective_lr, optimizer_scalars
from zenith_det.training.processes.agreement import AgreedError, check_steps_agree, raise_together
from zenith_det.training.processes.ddp import unwrap
from zenith_det.training.processes.distributed import (
    agree_on_maximum,
    all_gather_objects,
    barrier,
    get_world_size,
    is_main_process,
)
from zenith_det.training.processes.stopping import EvaluationStopped, StopRequest, WaitStopped, describe_stop

logger = logging.getLogger(__name__)

LOG_PERIOD = 20


@dataclass
class Progress:
    """What a checkpoint holds beside weights, optimizer and schedule.

    Attributes:
        iteration: how many are done.
        seed: of all random choices.
        images_seen: where in the order of images the run stands.
        facts: what else a checkpoint tells of its run.
    """

    iteration: int = 0
    seed: int = 0
    images_seen: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Parts:
    """What a run trains and trains with.

    Attributes:
        weights: (loaded, all) tensors of ``MODEL.WEIGHTS``; ``None``: none were loaded.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    weights: tuple[int, int] | None


def build_parts(engine: Engine, cfg: CfgNode, seed: int, *, load_weights: bool = True) -> Parts:
    """All of it as it is before the first iteration, in one process; ``seed`` gives the random weights."""
    seed_all(seed)
    model = engine.build_model(cfg)
    weights = engine.load_weights(cfg, model) if load_weights else None
    compile_backbone(cfg, model)
    optimizer = build_optimizer(cfg, model)
    return Parts(model, optimizer, build_lr_scheduler(cfg, optimizer), weights)


@dataclass(eq=False)
class Trainer:
    """Takes SGD-like steps on detection losses, logs, evaluates and saves.

    Random choices inside the model (which anchors and proposals are sampled) are seeded by iteration and
    rank, and the loader's by image, so a resumed run repeats an uninterrupted one.

    Attributes:
        cfg: the configuration.
        model: called with a list of samples, returns a dict of scalar losses; maybe wrapped by DDP.
        optimizer: from :func:`zenith_det.solver.build_optimizer`.
        scheduler: stepped once per iteration.
        batches: this rank's batches, from ``progress.iteration`` on.
        progress: where the run stands.
        checkpointer: of the output directory.
        best: of the output directory.
        evaluate: runs an evaluation and returns scalars; called on every rank with a function that says
            whether to break it off, upon which it raises ``EvaluationStopped``, and whether the model has
            its averaged weights.
        average: of the model's weights.
        evaluations: of this run so far; of the main process.
        before_evaluation: called where an evaluation is due, before the checkpoint is saved.
        at_the_end: as ``evaluate``: what is evaluated when training is over, beside the last evaluation.
    """

    cfg: CfgNode
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    batches: Prefetcher
    progress: Progress
    checkpointer: Checkpointer
    best: BestCheckpoint
    evaluate: Callable[[Callable[[], int], bool], dict[str, float]]
    average: WeightAverage | None = None
    evaluations: Evaluations | None = None
    before_evaluation: Callable[[], None] = lambda: None
    at_the_end: Callable[[Callable[[], int], bool], dict[str, float]] | None = None

    def __post_init__(self) -> None:
        cfg = self.cfg
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.writers: list[Writer] = []
        self.parts: int = cfg.SOLVER.GRADIENT_ACCUMULATION
        self.max_iter: int = cfg.SOLVER.MAX_ITER
        self.storage = EventStorage(self.progress.iteration)
        self.amp_dtype = amp_dtype(cfg)
        # float16 needs a GPU; see resolve_device.
        self.amp = cfg.SOLVER.AMP.ENABLED and (self.device.type == "cuda" or self.amp_dtype is torch.bfloat16)
        self.scaler = make_grad_scaler(cfg)
        self.guard = StepGuard(cfg, unwrap(self.model), self.optimizer, self.scaler)
        self._telling: Callable[[], AbstractContextManager[None]] = nullcontext
        self._out_of_memory: OutOfMemoryError | None = None
        self.guard.attach(self._outlived if get_world_size() > 1 else None)
        self._losses: list[tuple[int, dict[str, Tensor]]] = []
        self._whole = True  # the model: not in the middle of an optimizer's step
        self._console: ConsoleWriter | None = None

    def write_to(self, writers: list[Writer]) -> None:
        """Give these, on the main process, what is there to be written; :meth:`train` closes them."""
        self.writers = writers
        self._console = next((w for w in writers if isinstance(w, ConsoleWriter)), None)

    def train(self, stop: StopRequest, *, evaluate_first: bool = False) -> dict[str, float]:
        """Train to the end and return the scalars of the last evaluation.

        The end is at ``SOLVER.MAX_ITER``, or where ``evaluations`` finds it.

        Args:
            stop: asked after each iteration whether the run has to end.
            evaluate_first: the evaluation that was due where a resumed run stopped did not take place.

        Raises:
            RunStopped: ``stop`` said so; everything is saved.
            Diverged: the loss, or gradients that stayed non-finite, left nothing to go on with.
            RanksDisagreeError: the processes have drifted apart.
        """
        self.model.train()
        train_mode(self.optimizer)
        results: dict[str, float] = {}
        evaluated = evaluate_first
        try:
            if evaluate_first:
                results = self._evaluate(stop)
            ended = self._follow(stop)
            self._take_first_batch(stop)
            while self.progress.iteration < self.max_iter and not ended:
                started = time.perf_counter()
                try:
                    self.iterate()
                except OutOfMemoryError as error:
                    raise self._saved_after(error, stop) from None
                stop.note_iteration(time.perf_counter() - started)
                done = self.progress.iteration
                last = done == self.max_iter
                if done % LOG_PERIOD == 0 or last:
                    self._write()
                why, failed = self._agree(stop)
                if self.evaluation_due():
                    self.before_evaluation()
                if last or why or failed or done % self.cfg.SOLVER.CHECKPOINT_PERIOD == 0:
                    self.save(FINAL_NAME if last else f"model_{done - 1:07d}", stop)
                if why:
                    raise RunStopped(self._saved(describe_stop(why)))
                if failed:
                    self._tell_failure()
                if self.evaluation_due():
                    results, evaluated = self._evaluate(stop), True
                    ended = not last and self._follow(stop)
            if evaluated and self.at_the_end is not None:
                results |= self._evaluate_by(self.at_the_end, stop)
        finally:
            for writer in self.writers:
                writer.close()
        return results

    def _take_first_batch(self, stop: StopRequest) -> None:
        """See that there is one, before anything waits for this rank's gradients."""
        if self.progress.iteration >= self.max_iter:
            return
        self.batches.prefetch()
        why, no_batch = self._agree(stop)
        if no_batch and why:
            raise RunStopped(
                f"before iteration {self.progress.iteration}: {describe_stop(why)} while it waited for a batch; "
                "no step was taken: start it again"
            )
        if no_batch:
            raise_together(self.batches.failure)

    def _failure(self) -> Exception | None:
        """Why this rank can't go on after this iteration."""
        return self._out_of_memory or self.batches.failure

    def _tell_failure(self) -> None:
        """End all ranks for what one, or several, have failed with."""
        failure = self._failure()
        if isinstance(failure, OutOfMemoryError):
            failure = UserError(f"{failure}; the step was left out, and {self._how_to_go_on}")
        elif isinstance(failure, UserError):
            failure = UserError(self._saved(failure))
        raise_together(failure)

    def _outlived(self, error: Exception) -> bool:
        """Whether a forward pass ran out of memory: of several processes the others wait for this one's gradients."""
        try:
            with self._telling():
                raise error
        except OutOfMemoryError as told:
            self._out_of_memory = OutOfMemoryError(str(told))  # without the frames, and their tensors
            return True
        except Exception:
            return False

    def _saved_after(self, error: OutOfMemoryError, stop: StopRequest) -> UserError:
        """The error, with what can be saved saved; for several processes see :meth:`_outlived`."""
        if get_world_size() > 1 or not self._whole or self.progress.iteration == 0:
            return error
        self.optimizer.zero_grad(set_to_none=True)
        self._save_here(stop)
        return OutOfMemoryError(f"{error}; {self._how_to_go_on}")

    def _follow(self, stop: StopRequest) -> bool:
        """Do what the evaluations so far ask for; whether they end the run."""
        reason = follow_evaluations(self.evaluations, self.scheduler)
        if reason is None:
            return False
        logger.info("the run ends after iteration %d: %s", self.progress.iteration - 1, reason)
        self.save(FINAL_NAME, stop)
        return True

    def evaluation_due(self) -> bool:
        """Whether the model is to be evaluated as it is now."""
        done, period = self.progress.iteration, self.cfg.TEST.EVAL_PERIOD
        return done == self.max_iter or (period > 0 and done % period == 0)

    def iterate(self) -> None:
        """One iteration: a batch, a step, the LR of the next. Nothing is written."""
        iteration = self.progress.iteration
        self.storage.iter = iteration
        start, cpu_start = time.perf_counter(), time.process_time()
        batch = next(self.batches)
        data_time = self.batches.waited
        seed_step(self.progress.seed, iteration)
        self._step(batch, iteration)
        if iteration + 1 < self.max_iter:
            self.batches.prefetch()
        self.progress.iteration = iteration + 1
        self.progress.images_seen += self.cfg.SOLVER.IMS_PER_BATCH
        took, cpu_took = time.perf_counter() - start, time.process_time() - cpu_start
        self.storage.put_scalars(time=took, data_time=data_time, cpu_time=cpu_took)
        if self._console is not None:
            self._console.update(self.storage)

    def take_loss(self) -> float:
        """The loss of the iteration just done, on this rank; waits for the device."""
        (_, losses), self._losses = self._losses[-1], []
        return sum(float(loss) for loss in losses.values())

    def _step(self, batch: Batch, iteration: int) -> None:
        self.guard.begin(iteration)
        telling = partial(telling_of_memory, f"iteration {iteration}", batch, self.device, training=True)
        self._telling = telling
        with telling():
            totals = backward_in_parts(
                self.model,
                batch,
                self.parts,
                autocast=self._autocast,
                scaled=self.scaler.scale,
                before_backward=partial(self.optimizer.zero_grad, set_to_none=True),
            )
        with telling():
            self._whole = False
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._whole = True
        self._losses.append((iteration, totals))
        if (iteration + 1) % LOG_PERIOD == 0 or iteration + 1 == self.max_iter:
            # Before the scheduler moves on: these are the figures of the step just taken.
            self.storage.put_scalars(smoothing=False, **optimizer_scalars(self.optimizer))
        self.scheduler.step()
        if self.average is not None:
            self.average.update()

    def _autocast(self) -> torch.autocast:
        # A dtype that the device does not know is a warning, even where autocast is off.
        dtype = self.amp_dtype if self.amp else None
        return torch.autocast(self.device.type, dtype, enabled=self.amp)

    def _write(self) -> None:
        """Log the losses since the last call, and see whether the ranks still agree."""
        self._fetch_losses()
        check_steps_agree(self.progress.iteration - 1, optimizer_scalars(self.optimizer))
        if (peak := peak_cuda_mib()) is not None:
            self.storage.put_scalars(smoothing=False, max_mem_mb=peak)
        for writer in self.writers:
            writer.write(self.storage)
        self.storage.forget_pictures()

    def _fetch_losses(self) -> None:
        """Bring the losses of the last steps to the host in one transfer, averaged over ranks."""
        pending, self._losses = self._losses, []
        if not pending:
            return
        names = list(dict.fromkeys(name for _, losses in pending for name in losses))
        absent = torch.zeros((), device=self.device)
        table = torch.stack([torch.stack([losses.get(n, absent) for n in names]) for _, losses in pending])
        rows = [dict(zip(names, row)) for row in table.float().cpu().tolist()]
        gathered = all_gather_objects(rows)
        for i, (iteration, _) in enumerate(pending):
            mean: dict[str, float] = {}
            for rank in gathered:
                for name, value in rank[i].items():
                    mean[name] = mean.get(name, 0.0) + value / len(gathered)
            total = sum(mean.values())
            if math.isfinite(total):  # a bad step's are in its report, and would hide the others in a median
                for name, value in [("total_loss", total), *mean.items()]:
                    self.storage.put_scalar(name, value, iteration=iteration)
            self.guard.watch.add(total)

    def _agree(self, stop: StopRequest) -> tuple[int, int]:
        """All ranks come to one decision: 0 to go on, or the code to stop with; and whether any has failed.

        Raises:
            Diverged: any rank found that training can't go on.
        """
        failure = self._failure()
        why, lost, failed = agree_on_maximum(
            [
                stop.code(waiting=isinstance(failure, WaitStopped)),
                int(self.guard.verdict() is not None),
                int(failure is not None),
            ]
        )
        if lost:
            reason = next(r for r in all_gather_objects(self.guard.verdict()) if r)
            raise Diverged(self.progress.iteration - 1, reason, effective_lr(self.optimizer))
        return why, failed

    @property
    def _how_to_go_on(self) -> str:
        return f"everything is saved in {self.checkpointer.output_dir}: go on with --resume"

    def _saved(self, why: object) -> str:
        return f"after iteration {self.progress.iteration - 1}: {why}; {self._how_to_go_on}"

    def _evaluate(self, stop: StopRequest) -> dict[str, float]:
        results = self._evaluate_by(self.evaluate, stop)
        if is_main_process():
            if self.evaluations is not None:
                self.evaluations.add(self.progress.iteration - 1, results)
            self.best.offer(results, self.progress.iteration - 1, self._save_best)
        return results

    def _evaluate_by(
        self, evaluate: Callable[[Callable[[], int], bool], dict[str, float]], stop: StopRequest
    ) -> dict[str, float]:
        """Scalars of the model, and of its averaged weights; logged."""
        with self._evaluating(stop):
            results = evaluate(stop.code, False)
            if self.average is not None:
                with self.average.applied():
                    averaged = evaluate(stop.code, True)
                results = results | {averaging.PREFIX + name: value for name, value in averaged.items()}
        self._log(results)
        return results

    @contextmanager
    def _evaluating(self, stop: StopRequest) -> Iterator[None]:
        """The model as it is evaluated; an evaluation that is broken off ends the run."""
        eval_mode(self.optimizer)
        self.model.eval()
        try:
            yield
        except EvaluationStopped:
            # What it evaluated may lie between two checkpoints.
            self._save_here(stop)
            (why,) = agree_on_maximum([stop.code()])
            raise RunStopped(self._saved(describe_stop(why))) from None
        except AgreedError as error:
            self._save_here(stop)
            raise AgreedError(f"in the evaluation {self._saved(error)}") from error
        finally:
            self.model.train()
            train_mode(self.optimizer)

    def _log(self, scalars: dict[str, float]) -> None:
        """Put an evaluation at once where a run's scalars go."""
        if not scalars:
            return
        for name, value in scalars.items():
            # One that a resumed run makes up for belongs to the iteration before its first, too.
            self.storage.put_scalar(name, value, smoothing=False, iteration=self.progress.iteration - 1)
        for writer in self.writers:
            if writer is not self._console:
                writer.write(self.storage)
        self.storage.forget_pictures()

    def _save_here(self, stop: StopRequest) -> None:
        """Save where the run stands, unless that has been done."""
        done = self.progress.iteration
        if done != self.max_iter and done % self.cfg.SOLVER.CHECKPOINT_PERIOD:
            self.save(f"model_{done - 1:07d}", stop)

    def save(self, name: str, stop: StopRequest | None = None) -> None:
        """Write a checkpoint; the main process alone does, all wait for it."""
        start = time.perf_counter()
        self.guard.inspect()
        self._fetch_losses()
        if is_main_process():
            state = self._state()
            path = self.checkpointer.save(name, state)
            logger.info("saved %s", path)
            if self.average is not None and name == FINAL_NAME:
                averaged = self._save_averaged(name + averaging.SUFFIX, {})
                logger.info("saved %s, with the averaged weights", averaged)
            if state["good"]:
                self.guard.last_good = path
        # Nobody goes on as if it were saved while it is not: a full disk ends all ranks together.
        barrier()
        if stop is not None:
            stop.note_save(time.perf_counter() - start)

    def _state(self) -> dict[str, Any]:
        eval_mode(self.optimizer)
        state = {
            "model": unwrap(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": self.progress.iteration - 1,
            "seed": self.progress.seed,
            "images_seen": self.progress.images_seen,
            **self.guard.state_dict(),
            **self.progress.facts,
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if self.model.training:
            train_mode(self.optimizer)
        return state

    def _save_averaged(self, name: str, more: dict[str, Any]) -> Path:
        assert self.average is not None
        facts = {**self.progress.facts, "iteration": self.progress.iteration - 1, **more}
        return self.checkpointer.save(name, self.average.checkpoint(facts), mark_last=False)

    def _save_best(self, name: str, more: dict[str, Any]) -> None:
        if self.best.of_average:
            self._save_averaged(name, more)
        else:
            self.checkpointer.save(name, self._state() | more, mark_last=False)

    def load(self, state: dict[str, Any], source: str, *, optimizer: bool = True) -> None:
        """Go on where ``state``, a checkpoint of :meth:`save`, stopped.

        Args:
            source: the file, for messages.
            optimizer: whether its optimizer's state is for this one.

        Raises:
            CheckpointError: its model has other tensors; they are named.
        """
        load_model_weights(unwrap(self.model), state["model"], source=source, require_all=True)
        if optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        if "guard" in state:
            self.guard.load_state_dict(state)
        if self.average is not None:
            self.average.resume(state, source)
        if state.get("good"):
            self.guard.last_good = Path(source)
