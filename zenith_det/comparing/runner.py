"""Carries out the runs of a comparison: a process each of ``zenith-det train``, several at once.

Every run's folder holds ``result.json``: what became of it. A comparison that is started again leaves finished
runs as they are and lets the others go on from their last checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

from zenith_det.comparing.plan import Run
from zenith_det.errors import RunStopped, TrainingDivergedError, UserError, one_line
from zenith_det.files import write_whole
from zenith_det.training.course.metrics_file import read_metrics

RESULT_FILE = "result.json"
LOG_FILE = "train.log"
#: Exit code of a run that stopped on request, saved: it can go on.
STOPPED, DIVERGED = RunStopped.exit_code, TrainingDivergedError.exit_code
#: Seconds between two looks at the processes.
_POLL = 0.2
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The end of a log that is searched for the reason of a failure, in bytes.
_TAIL = 20_000


@dataclass
class Result:
    """What became of a run; the content of ``result.json``.

    Attributes:
        status: ``ok``, ``failed``, ``diverged``, or ``unfinished``: started, then interrupted.
        fingerprint: of the configuration that it ran with.
        command: what started it.
        pid: of the process, while it is unfinished.
        seconds: wall-clock time, evaluation and start-up included, summed over interruptions.
        attempts: how often it was started.
        exit_code: of the last process; negative: the signal that ended it.
        reason: one line, where it isn't ok.
        rss_mb: highest resident memory of the process without its data workers, MiB, as sampled.
        device: that it was given; "" leaves it to the config.
        final: the last value of each metric that its evaluation gave.
    """

    status: str
    fingerprint: str
    command: list[str]
    pid: int = 0
    seconds: float = 0.0
    attempts: int = 0
    exit_code: int | None = None
    reason: str = ""
    rss_mb: float = 0.0
    device: str = ""
    final: dict[str, float] | None = None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do for it."""
        return self.status != "unfinished"

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        write_whole(folder / RESULT_FILE, json.dumps(asdict(self), indent=1))


def read_result(folder: Path) -> Result | None:
    """A run's result, ``None`` where there is none that can be read."""
    try:
        return Result(**json.loads((folder / RESULT_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@dataclass
class Slot:
    """A place for one run at a time."""

    device: str = ""
    run: Run | None = None
    result: Result | None = None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    seconds_before: float = 0.0


class Runner:
    """Starts runs as places get free, and says a line for each that has ended.

    Args:
        train: the words that start a run, before its flags.
        config_file: of all runs.
        flags: of all runs, such as ``["--engine", "torchvision"]``.
        jobs: runs at once.
        threads: of each run's CPU work (``OMP_NUM_THREADS``).
        devices: that the places take in turn; empty: the config decides.
        retry_failed: start failed runs again, from their last checkpoints.
        describe: the metrics of a finished run, in a few words.
        say: where lines go.
    """

    def __init__(
        self,
        train: Sequence[str],
        config_file: str,
        flags: Sequence[str],
        *,
        jobs: int = 1,
        threads: int = 1,
        devices: Sequence[str] = (),
        retry_failed: bool = False,
        describe: Callable[[Mapping[str, float]], str] = str,
        say: Callable[[str], None] = print,
    ) -> None:
        self._train = list(train)
        self._config_file = config_file
        self._flags = list(flags)
        self._threads = threads
        self._retry_failed = retry_failed
        self._describe = describe
        self._say = say
        self._slots = [Slot(devices[n % len(devices)] if devices else "") for n in range(jobs)]
        self._stops = 0
        self._took: list[float] = []

    def carry_out(self, runs: Sequence[Run]) -> None:
        """Carry out all runs that are not finished yet.

        Raises:
            RunStopped: a signal came; the runs have saved, and starting again goes on.
            UserError: a run is still being carried out by another process, or its folder can't be written.
        """
        waiting = deque(run for run in runs if not self._is_done(run))
        self._total, self._done = len(runs), len(runs) - len(waiting)
        if self._done:
            self._say(f"{self._done} of {self._total} runs are there already")
        before = {number: signal.signal(number, self._receive) for number in _STOP_SIGNALS}
        try:
            while (waiting and not self._stops) or any(slot.process for slot in self._slots):
                for slot in self._slots:
                    if slot.process is None and waiting and not self._stops:
                        self._start(slot, waiting.popleft())
                    elif slot.process is not None:
                        self._look(slot)
                time.sleep(_POLL)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for slot in self._slots:
                if slot.process is not None and slot.process.poll() is None:
                    slot.process.terminate()  # an error of ours: what runs still saves
        if self._stops:
            raise RunStopped(
                f"{self._done} of {self._total} runs are done; the others have saved: "
                "the same command goes on with them"
            )

    def _is_done(self, run: Run) -> bool:
        result = read_result(run.folder)
        if result is None:
            return False
        if result.fingerprint != run.fingerprint:
            self._set_aside(run)
            return False
        self._check_not_running(run, result)
        return result.finished and not (self._retry_failed and result.status in ("failed", "diverged"))

    def _set_aside(self, run: Run) -> None:
        """Keep a run of another configuration, but not in the way of the one to come."""
        number = 1
        while (aside := run.folder.with_name(f"{run.folder.name}.old{number}")).exists():
            number += 1
        try:
            run.folder.rename(aside)
        except OSError as error:
            raise UserError(f"{run.folder}: cannot be renamed: {error.strerror or error}") from error
        self._say(f"{run.title}: its config has changed; the earlier run is kept as {aside}")

    @staticmethod
    def _check_not_running(run: Run, result: Result) -> None:
        if result.finished or not result.pid:
            return
        try:
            words = psutil.Process(result.pid).cmdline()
        except psutil.Error:
            return
        if str(run.folder) in words:
            raise UserError(
                f"{run.folder}: process {result.pid} is still at work there: wait for it or end it, then start again"
            )

    def _start(self, slot: Slot, run: Run) -> None:
        earlier = read_result(run.folder)
        command = [*self._train, "--config-file", self._config_file, *self._flags]
        command += ["--resume"]
        keys: dict[str, str] = dict(run.keys)
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads)}
        if slot.device == "cpu":
            keys["MODEL.DEVICE"] = "cpu"
        elif slot.device:
            # Both engines, and what they start, see the one device.
            keys["MODEL.DEVICE"] = "cuda"
            environment["CUDA_VISIBLE_DEVICES"] = _visible(slot.device)
        keys["OUTPUT_DIR"] = str(run.folder)
        command += [word for pair in keys.items() for word in pair]
        slot.run, slot.seconds_before = run, earlier.seconds if earlier else 0.0
        slot.result = Result(
            "unfinished",
            run.fingerprint,
            command,
            seconds=slot.seconds_before,
            attempts=1 + (earlier.attempts if earlier else 0),
            rss_mb=earlier.rss_mb if earlier else 0.0,
            device=slot.device,
        )
        slot.result.save(run.folder)
        slot.started = time.monotonic()
        try:
            with (run.folder / LOG_FILE).open("ab") as log:
                # A session of its own: a terminal's Ctrl-C reaches this process alone, which passes it on
                # once. A second signal would end a run before it has saved.
                slot.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise UserError(f"{run.folder}: the run cannot be started: {error.strerror or error}") from error
        slot.result.pid = slot.process.pid
        slot.result.save(run.folder)
        if self._stops:  # came while it was being started
            slot.process.terminate()

    def _look(self, slot: Slot) -> None:
        """See whether a run has ended."""
        process, result, run = slot.process, slot.result, slot.run
        assert process is not None
        assert result is not None
        assert run is not None
        code = process.poll()
        if code is None:
            with contextlib.suppress(psutil.Error):
                result.rss_mb = max(result.rss_mb, psutil.Process(process.pid).memory_info().rss / 2**20)
            return
        slot.process = None
        result.exit_code, result.pid = code, 0
        result.seconds = slot.seconds_before + time.monotonic() - slot.started
        stopped = code == STOPPED or (self._stops and code in (-signal.SIGTERM, -signal.SIGKILL))
        if code and not stopped:
            result.reason = failure_reason(run.folder / LOG_FILE, code)
            result.status = "diverged" if code == DIVERGED else "failed"
        elif not code:
            result.status = "ok"
            result.final = final_metrics(run.folder)
        result.save(run.folder)
        if result.finished:
            self._done += 1
            self._took.append(result.seconds)
            self._say(self._progress(run, result))
        elif not self._stops:
            self._say(
                f"{run.title}: it was stopped from outside, and goes on when the command is given again"
            )

    def _progress(self, run: Run, result: Result) -> str:
        what = (
            self._describe(result.final or {})
            if result.status == "ok"
            else f"{result.status}: {result.reason}"
        )
        left = self._total - self._done
        line = f"[{self._done}/{self._total}] {run.title}: {what}, {duration(result.seconds)}"
        if left:
            each = sum(self._took) / len(self._took)
            line += f"; {left} left, about {duration(left * each / len(self._slots))}"
        return line

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        for slot in self._slots:
            if slot.process is not None and slot.process.poll() is None:
                if self._stops == 1:
                    slot.process.terminate()
                else:
                    slot.process.kill()


def final_metrics(folder: Path) -> dict[str, float]:
    """The last finite value of each evaluation metric in a run's metrics.json."""
    try:
        metrics = read_metrics(folder)
    except UserError:
        return {}
    return {
        name: float(series.values[-1])
        for name, series in metrics.items()
        if re.search(r"(^|/)(bbox|segm|keypoints)/", name)
    }


def failure_reason(log: Path, code: int) -> str:
    """One line that says why a run failed: its own, or the last line of a traceback."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith("error: ")]
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    last = next((line for line in reversed(lines) if line.strip()), "nothing in its log")
    # An error ends with what to do about it: not to be cut off.
    return one_line(told[-1].removeprefix("error: "), 2000) if told else one_line(last, 300)


def duration(seconds: float) -> str:
    """``"42 s"``, ``"3.4 min"``, ``"5h12m"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    return f"{minutes // 60}h{minutes % 60:02d}m"


def _visible(device: str) -> str:
    """``CUDA_VISIBLE_DEVICES`` for ``"cuda:1"``, counted among those that are visible now."""
    index = int(device.partition(":")[2] or 0)
    among = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return among[index] if index < len(among) else str(index)


def parse_device(text: str, gpus: int) -> str:
    """``cpu``, ``cuda`` or ``cuda:N``, of which there are ``gpus``.

    Raises:
        UserError: anything else, or a GPU that isn't there.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise UserError(f"--devices {text}: give cpu, cuda or cuda:N")
    if text != "cpu" and int(text.partition(":")[2] or 0) >= gpus:
        there = f"{gpus}, from cuda:0 on" if gpus else "none: give cpu"
        raise UserError(f"--devices {text}: of the GPUs, PyTorch sees {there}")
    return text
