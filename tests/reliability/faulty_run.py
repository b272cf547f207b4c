"""``tools/train_net.py`` with faults put into it, to be run by itself or by torchrun.

    python tests/reliability/faulty_run.py FAULTS ARGUMENT…
    python tests/reliability/faulty_run.py --serve

The second form imports once and forks a process for each line of its standard input, a JSON object with
``"arguments"``, ``"faults"``, ``"logs"`` (files for its standard output and error), ``"limit"``
(seconds, after which it is ended) and ``"processes"``; it answers with the exit code.

FAULTS is a JSON object; each fault is for the rank ``"rank"`` (default: every rank):

* ``"poison"``: {iteration: kind}; "gradient": NaN or infinity in one parameter's gradient, before ranks exchange
  it; "loss": one part of the loss is NaN though all gradients are finite; "forward": the forward pass raises
  ``FloatingPointError``, as Detectron2's does; "memory": it asks for more memory than there can be.
* ``"memory"``: it does so at so manieth image that is evaluated.
* ``"kill"``: {iteration: signal number} sent to the process itself, in torchrun's first attempt only;
  with ``"kill_twice"`` two of them.
* ``"stop_in_evaluation"``: SIGTERM to the process itself, at so manieth image.
* ``"explode"``: from this iteration on, the loss is multiplied by 1e6 for as long as the LR is above ``"above"``.
* ``"config"``: ["KEY", "VALUE"], for that rank alone.
* ``"fill"``: [folder, when]: its file system is filled after the iteration, or before the call of the function of this
  name in ``zenith_det.engines.run``.
* ``"kill_at"``: SIGKILL at the call of this name in ``zenith_det.engines.run``.
* ``"kill_worker"``: the iteration after which a loader worker gets SIGKILL.
* ``"stall"``: each loader worker, or the run without any, hangs at the image of this number that it reads. When the
  file ``"signal_after"`` is there, the first sends the run SIGTERM.
* ``"temporary"``: no fault: the folder that is the temporary one to it.
* ``"drift"``: the iteration after which the rank's ZENITH history is changed behind its back.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.reliability.kill_runs import attempt, before_call, kill_me, train_net  # noqa: E402
from tests.reliability.ranks import ranks  # noqa: E402
from zenith_det import cli  # noqa: E402
from zenith_det.engines import batches, evaluating, run  # noqa: E402
from zenith_det.engines.engine import load_engine  # noqa: E402
from zenith_det.training.failures.step_guard import StepGuard  # noqa: E402
from zenith_det.training.processes.distributed import restart_count  # noqa: E402


class Faults:
    """What goes wrong, and when."""

    def __init__(self, faults: dict[str, Any]) -> None:
        self.faults = faults
        self.iteration = -1

    def install(self) -> None:
        """Put the faults into every guarded model of this process."""
        attach, begin, take = StepGuard.attach, StepGuard.begin, StepGuard.take

        def with_faults(guard: StepGuard, *outlived: Any) -> None:
            self.guard, module = guard, guard.model
            forward = module.forward
            parameters = [p for p in module.parameters() if p.requires_grad]
            evaluated = itertools.count(1)

            def faulty(*args: Any, **kwargs: Any) -> Any:
                kind = self.poison() if module.training else None
                if kind == "forward":
                    raise FloatingPointError("Predicted boxes or scores contain Inf/NaN")
                if kind == "memory" or (not module.training and next(evaluated) == self.faults.get("memory")):
                    torch.empty(2**60, dtype=torch.uint8)
                losses = forward(*args, **kwargs)
                if kind == "loss":
                    name = next(iter(losses))
                    losses[name] = losses[name].detach() * math.nan + losses[name] * 0
                if module.training and self.exploded():
                    losses = {name: loss * 1e6 for name, loss in losses.items()}
                if kind == "gradient":
                    chosen = parameters[self.iteration % len(parameters)]
                    bad = math.inf if self.iteration % 2 else math.nan
                    handle = chosen.register_hook(lambda grad: torch.full_like(grad, bad))
                    self.handles.append(handle)
                return losses

            module.forward = faulty  # type: ignore[method-assign]
            attach(guard, *outlived)

        def next_iteration(guard: StepGuard, iteration: int) -> None:
            for handle in self.handles:
                handle.remove()
            self.handles.clear()
            self.iteration = iteration
            begin(guard, iteration)

        def counted_step(guard: StepGuard, step: Any) -> Any:
            result = take(guard, step)
            self.after(self.iteration, guard)
            return result

        if "stop_in_evaluation" in self.faults:
            images = itertools.count(1)

            def stop() -> None:
                if next(images) == self.faults["stop_in_evaluation"]:
                    os.kill(os.getpid(), signal.SIGTERM)

            before_call(evaluating.EvaluationProgress, "update", stop)
        if isinstance(when := self.faults.get("fill", [None, None])[1], str):
            before_call(run, when, self.fill)
        if "temporary" in self.faults:
            tempfile.tempdir = os.environ["TMPDIR"] = self.faults["temporary"]
        if "kill_at" in self.faults:
            before_call(run, self.faults["kill_at"], kill_me)
        if "stall" in self.faults:
            self.stall()
        self.handles: list[Any] = []
        StepGuard.attach = with_faults  # type: ignore[method-assign]
        StepGuard.begin = next_iteration  # type: ignore[method-assign]
        StepGuard.take = counted_step  # type: ignore[method-assign]

    def fill(self) -> None:
        """Leave no room where the run writes."""
        with contextlib.suppress(OSError), open(Path(self.faults["fill"][0]) / "other", "wb", 0) as file:
            while True:
                file.write(bytes(2**20))
        with contextlib.suppress(OSError), open(Path(self.faults["fill"][0]) / "others", "wb", 0) as file:
            while True:
                file.write(b"1")

    def stall(self) -> None:
        """Let a worker hang."""
        images = itertools.count(1)

        def hang() -> None:
            if next(images) < self.faults["stall"]:
                return
            worker = get_worker_info()
            if "signal_after" in self.faults and (worker is None or worker.id == 0):
                while not Path(self.faults["signal_after"]).exists():
                    time.sleep(0.05)
                os.kill(os.getpid() if worker is None else os.getppid(), signal.SIGTERM)
            time.sleep(1000)

        before_call(batches.TrainingDataset, "__getitem__", hang)

    def poison(self) -> str | None:
        """The kind for the iteration that begins now."""
        at = max(self.iteration, 0)
        found: str | None = self.faults.get("poison", {}).get(str(at))
        return found

    def exploded(self) -> bool:
        """Whether the loss is to be out of bounds."""
        if self.iteration < self.faults.get("explode", math.inf):
            return False
        return bool(self.guard.optimizer.param_groups[0]["lr"] > self.faults["above"])

    def after(self, iteration: int, guard: Any) -> None:
        """What happens when an iteration is done."""
        number = self.faults.get("kill", {}).get(str(iteration))
        if number is not None and restart_count() == 0:
            for _ in range(2 if self.faults.get("kill_twice") else 1):
                os.kill(os.getpid(), int(number))
        if self.faults.get("fill", [None, None])[1] == iteration:
            self.fill()
        if self.faults.get("kill_worker") == iteration:
            worker = multiprocessing.active_children()[0]
            worker.kill()
            worker.join()
        if self.faults.get("drift") == iteration:
            guard.optimizer._history.zenith.mul_(2)


def put_in(faults: dict[str, Any], arguments: list[str]) -> list[str]:
    """Put the faults for this rank into this process; the arguments, with what the faults add to them."""
    rank = int(os.environ.get("RANK", "0"))
    if rank != faults.get("rank", rank):
        return arguments
    Faults(faults).install()
    return [*arguments, *faults.get("config", [])]


def engine_of(arguments: list[str]) -> str:
    return arguments[arguments.index("--engine") + 1]


def serve() -> None:
    """Fork a run for each line that asks for one."""
    module = train_net()
    for line in sys.stdin:
        wanted = json.loads(line)
        load_engine(engine_of(wanted["arguments"]))

        def faulty(wanted: dict[str, Any] = wanted) -> int | None:
            return ranks(wanted["processes"], run)

        def run(wanted: dict[str, Any] = wanted) -> int | None:
            code: int | None = module.main(put_in(wanted["faults"], wanted["arguments"]))
            return code

        print(attempt(faulty, *map(Path, wanted["logs"]), limit=wanted["limit"]), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] == "--serve":
        serve()
        return
    arguments = put_in(json.loads(sys.argv[1]), sys.argv[2:])
    cli.run(lambda: train_net().main(arguments))


if __name__ == "__main__":
    main()
