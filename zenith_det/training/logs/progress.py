"""Progress of training and evaluation: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable
from types import TracebackType

from rich.columns import Columns
from rich.text import Text

from zenith_det.training.logs import terminal
from zenith_det.training.logs.events import EventStorage
from zenith_det.training.logs.logging_setup import FILE_ONLY
from zenith_det.training.logs.memory import peak_cuda_mib, resident_mib

logger = logging.getLogger(__name__)

# Iteration times that the ETA looks back on: long, since a median over few jumps about.
ETA_WINDOW = 1000
EVALUATION_LINE_SECONDS = 5.0


def format_duration(seconds: float | None) -> str:
    """``0:01:20``, ``1 day, 2:03:04``; ``?`` when it is not known."""
    if seconds is None or not 0 <= seconds < 1e9:  # NaN fails both comparisons
        return "?"
    return str(datetime.timedelta(seconds=int(seconds)))


class ConsoleWriter:
    """Shows a training run to whoever watches it.

    On a terminal: a bar with iterations, epoch and ETA, the losses, effective LR, LR ratio, gradient norm,
    images/s and memory, redrawn by :meth:`update`; log lines appear above it. Elsewhere: one line at each
    :meth:`write`, in Detectron2's layout (``eta: … iter: … total_loss: … lr: … max_mem: …M``). ``log.txt``
    gets these lines in both cases.

    Args:
        max_iter: iterations of the whole run.
        start_iter: where this run starts.
        iters_per_epoch: iterations per pass over the data; ``None`` shows no epochs.
        batch_size: images per iteration over all processes; ``None`` shows no images/s.

    Reads these scalars where they are there: ``total_loss``, ``loss_*``, ``lr``, ``zenith/ratio``,
    ``zenith/grad_norm``, ``time`` and ``data_time`` (seconds per iteration).
    """

    def __init__(
        self,
        max_iter: int,
        *,
        start_iter: int = 0,
        iters_per_epoch: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        self._max_iter = max_iter
        self._iters_per_epoch = iters_per_epoch
        self._batch_size = batch_size
        self._start_iter, self._started = start_iter, time.monotonic()
        self._eta: float | None = None
        self._below: list[Columns] = []
        self._bar = terminal.DISPLAY.add("Training", max_iter) if terminal.is_interactive() else None
        self._show(start_iter, now=True)

    def update(self, storage: EventStorage) -> None:
        """Move the bar to the iteration just done; cheap, to be called after each."""
        self._show(storage.iter + 1)

    def _show(self, done: int, *, now: bool = False) -> None:
        if self._bar is None:
            return
        facts = [f"{done}/{self._max_iter}"]
        if self._iters_per_epoch:
            whole = self._max_iter / self._iters_per_epoch
            facts.append(f"epoch {done / self._iters_per_epoch:.1f}/{whole:.4g}")
        facts.append(f"eta {format_duration(self._eta if done < self._max_iter else 0)}")
        terminal.DISPLAY.show(self._bar, done, facts, self._below, now=now)

    def write(self, storage: EventStorage) -> None:
        """Show the scalars as they are now and put ``eta_seconds`` among them.

        After the last iteration (``storage.iter == max_iter``) there is nothing left to report.
        """
        if storage.iter >= self._max_iter:
            return
        self._eta = self._eta_seconds(storage)
        if self._eta is not None:
            storage.put_scalar("eta_seconds", self._eta, smoothing=False)
        logger.info(self._line(storage), extra={FILE_ONLY: self._bar is not None})
        # Under the word "loss" the parts need no 'loss_' of their own.
        losses = [
            ("loss" if name == "total_loss" else name.removeprefix("loss_"), f"{value:.4g}")
            for name, value in self._losses(storage).items()
        ]
        stats = [(name.replace("grad_norm", "grad\u00a0norm"), value) for name, value in self._stats(storage)]
        self._below = [_pairs(pairs) for pairs in (losses, stats) if pairs]
        self._show(storage.iter + 1, now=True)

    def close(self) -> None:
        """Leave the bar as it ended; the terminal is ordinary again."""
        if self._bar is not None:
            terminal.DISPLAY.remove(self._bar, keep=True)

    def _eta_seconds(self, storage: EventStorage) -> float | None:
        done = storage.iter + 1 - self._start_iter
        if "time" in storage.latest():
            per_iter = storage.median("time", ETA_WINDOW)
        elif done > 0:  # a loop that records no time
            per_iter = (time.monotonic() - self._started) / done
        else:
            return None
        return per_iter * (self._max_iter - storage.iter - 1)

    def _images_per_second(self, storage: EventStorage) -> float | None:
        if self._batch_size is None or "time" not in storage.latest():
            return None
        seconds = storage.average("time")
        return self._batch_size / seconds if seconds > 0 else None

    def _losses(self, storage: EventStorage) -> dict[str, float]:
        # The sum first: it is what people look for.
        names = sorted((n for n in storage.names() if "loss" in n), key=lambda n: n != "total_loss")
        return {name: storage.median(name) for name in names}

    def _stats(self, storage: EventStorage) -> list[tuple[str, str]]:
        """Short name and value of everything beside the losses, in the order in which it is shown."""
        latest = storage.latest()
        stats = []
        for name, scalar, form in (
            ("lr", "lr", "{:.5g}"),
            ("ratio", "zenith/ratio", "{:.4f}"),
            ("grad_norm", "zenith/grad_norm", "{:.4g}"),
        ):
            if scalar in latest:
                stats.append((name, form.format(latest[scalar][0])))
        if "zenith/skipped_steps" in latest and latest["zenith/skipped_steps"][0] > 0:
            stats.append(("skipped_steps", f"{latest['zenith/skipped_steps'][0]:.0f}"))
        speed = self._images_per_second(storage)
        if speed is not None:
            stats.append(("images/s", f"{speed:.3g}" if speed < 100 else f"{speed:.0f}"))
        peak = peak_cuda_mib()
        stats.append(("rss", f"{resident_mib():.0f}M") if peak is None else ("max_mem", f"{peak:.0f}M"))
        return stats

    def _line(self, storage: EventStorage) -> str:
        latest = storage.latest()
        parts = [f"eta: {format_duration(self._eta)}"] if self._eta is not None else []
        parts.append(f"iter: {storage.iter}")
        if self._iters_per_epoch:
            parts.append(f"epoch: {(storage.iter + 1) / self._iters_per_epoch:.2f}")
        parts += [f"{name}: {value:.4g}" for name, value in self._losses(storage).items()]
        for name in ("time", "data_time"):
            if name in latest:
                parts.append(f"{name}: {storage.average(name):.4f}")
                parts.append(f"last_{name}: {latest[name][0]:.4f}")
        parts += [f"{name}: {value}" for name, value in self._stats(storage)]
        return "  ".join(parts)


class EvaluationProgress:
    """Images evaluated so far, with the time left: a bar on a terminal, a line every 5 seconds elsewhere.

    Args:
        total: images to evaluate.
        name: of the data set.
        clock: seconds, monotonic.

    A context manager: ``with EvaluationProgress(len(images), name) as progress: … progress.update(8)``.
    On ranks that print nothing, ``total=0`` keeps it silent.
    """

    def __init__(
        self,
        total: int,
        name: str = "",
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._name = name
        self._clock = clock
        self._done = 0
        self._started = self._said = clock()
        self._rate_from: tuple[float, int] | None = None
        label = f"Evaluating {name}".strip() if len(name) <= 40 else "Evaluating"
        self._bar = terminal.DISPLAY.add(label, total) if total and terminal.is_interactive() else None

    def __enter__(self) -> EvaluationProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, images: int = 1) -> None:
        """Count ``images`` more as done."""
        self._done += images
        now = self._clock()
        if self._rate_from is None:
            # The first batch pays for start-up (workers, kernels); the rate is measured after it.
            self._rate_from = (now, self._done)
        if not self._total:
            return
        since, done_then = self._rate_from
        rate = (self._done - done_then) / (now - since) if now > since and self._done > done_then else None
        speed = [f"{rate:.3g} images/s"] if rate else []
        eta = format_duration((self._total - self._done) / rate if rate else None)
        last = self._done >= self._total
        if self._bar is not None:
            facts = [f"{self._done}/{self._total}", *speed, f"eta {eta}"]
            terminal.DISPLAY.show(self._bar, self._done, facts, now=last)
        elif now - self._said >= EVALUATION_LINE_SECONDS and not last:
            self._said = now
            told = "".join(f"{part}. " for part in speed)
            logger.info("Inference done %d/%d%s. %sETA=%s", self._done, self._total, self._of(), told, eta)

    def close(self) -> None:
        """Say how long it took; the bar goes."""
        if self._bar is not None:
            terminal.DISPLAY.remove(self._bar, keep=False)
        if self._total:
            took = self._clock() - self._started
            speed = f", {self._done / took:.3g} images/s" if took > 0 else ""
            logger.info(
                "Inference done %d/%d%s in %s%s",
                self._done, self._total, self._of(), format_duration(took), speed,
            )  # fmt: skip
            self._total = 0

    def _of(self) -> str:
        return f" of {self._name}" if self._name else ""


def _pairs(pairs: list[tuple[str, str]]) -> Columns:
    """``name value`` pairs that break between pairs, never inside one."""
    texts = [Text.assemble((f"{name}\u00a0", "dim"), (value, "bold")) for name, value in pairs]
    return Columns(texts, padding=(0, 3))
