"""Runs that are killed again and again, each compared with one that nobody touched.

    python tests/reliability/kill_runs.py --engine torchvision --data SET --output DIR --kills 30

Each attempt is a process of its own, forked from this one after the imports, that runs ``tools/train_net.py``
and ends by a real SIGKILL at a random moment: within the start-up, the LR range test, the moving aside of an earlier
run (any rename), a step, the writers of metrics (any scalar), a save (any write, sync or rename of it), an evaluation
(any image), or the pictures after the last one. It begins in the folder of an earlier run, anew until that has been
moved aside, and is resumed until it reaches the end. Compared are weights and optimizer, the evaluations in
``metrics.json`` and TensorBoard, and the earlier run's files. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import tensorboard

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from zenith_det import cli  # noqa: E402
from zenith_det.config.metric_names import is_evaluated  # noqa: E402
from zenith_det.data.synthetic import split_files  # noqa: E402
from zenith_det.engines import evaluating, lr_range_test, run, run_pictures  # noqa: E402
from zenith_det.engines.engine import load_engine  # noqa: E402
from zenith_det.training.checkpoints import checkpoint  # noqa: E402
from zenith_det.training.failures.step_guard import StepGuard  # noqa: E402
from zenith_det.training.logs import events  # noqa: E402

#: The phases in the order in which each run is killed in them: before and after it has begun, it starts up.
ORDER = (
    "start-up", "range test", "moving aside", "step", "start-up", "writing", "save", "evaluation", "pictures",
)  # fmt: skip
PHASES = tuple(dict.fromkeys(ORDER))
MAX_ITER, SAVE_PERIOD, EVAL_PERIOD = 24, 4, 8
# A run makes so many writes to save a small model's checkpoint, evaluates so many images, moves so many files of an
# earlier run and writes so many scalars at least.
WRITES, IMAGES, RENAMES, SCALARS = 150, 4, 8, 60
# It takes about so long to begin, to draw, and to test LRs.
START_SECONDS, END_SECONDS, TEST_SECONDS = 1.5, 1.0, 1.5
RANGE_TEST_ITERATIONS = 8

KEYS = {
    "MODEL.DEVICE": "cpu",
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "TEST.DETECTIONS_PER_IMAGE": 20,
    "TEST.MAX_IMAGES": IMAGES,
    "INPUT.MIN_SIZE_TRAIN": "(48, 64)",
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 2,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.ZENITH.WINDOW": 5,
    "SOLVER.MAX_ITER": MAX_ITER,
    "SOLVER.CHECKPOINT_PERIOD": SAVE_PERIOD,
    "TEST.EVAL_PERIOD": EVAL_PERIOD,
    "SOLVER.AVERAGE.KIND": "ema",
    "SOLVER.AVERAGE.DECAY": 0.9,
    "CHECKPOINT.BEST": "averaged box AP",
    "CHECKPOINT.KEEP": 2,
    "SEED": 7,
    "DETERMINISTIC": True,
}


def command(engine: str, data: Path, output: Path, *, resume: bool) -> list[str]:
    """The arguments of ``tools/train_net.py``."""
    (train_json, train_images), (val_json, val_images) = (
        map(str, split_files(data, split, "instances")) for split in ("train", "val")
    )
    keys = [str(word) for pair in {**KEYS, "OUTPUT_DIR": output}.items() for word in pair]
    return [
        "--engine", engine, "--num-gpus", "0",
        "--config-file", str(ROOT / "configs" / "quickstart" / "mask_rcnn_zenith.yaml"),
        "--train-json", train_json, "--train-images", train_images,
        "--val-json", val_json, "--val-images", val_images,
        *(["--resume"] if resume else []), *keys,
    ]  # fmt: skip


def train_net() -> Any:
    """The command ``train``, with all that it and both engines import; its runs draw one image.

    Drawing more would take as long as the training does here.
    """
    for name in ("curves", "pictures"):  # a run imports them when it draws
        importlib.import_module(f"zenith_det.report.{name}")
    run_pictures.PICTURED_IMAGES = 1
    return importlib.import_module("zenith_det.commands.train")


def shorten_range_test() -> None:
    """Let a range test take few iterations, and its LR follow from their losses, whatever the curve."""

    def choose(test: lr_range_test.RangeTest) -> lr_range_test.Choice:
        lr = 0.01 + 0.01 * math.modf(float(test.losses.sum()))[0]
        return lr_range_test.Choice(lr, float(test.lrs[-1]), test.losses, "")

    (lr_range_test.measure.__kwdefaults__ or {})["iterations"] = RANGE_TEST_ITERATIONS
    lr_range_test.choose = choose
    importlib.import_module("zenith_det.report.lr_curve")


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(owner: Any, name: str, action: Callable[[], None]) -> None:
    """Let ``action`` run before each call of ``owner.name``."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def at_call(number: int) -> Callable[[], None]:
    """An action that kills at its ``number``-th call, counted from 1."""
    calls = itertools.count(1)
    main = os.getpid()
    return lambda: kill_me() if next(calls) == number and os.getpid() == main else None


def after(seconds: float) -> None:
    timer = threading.Timer(seconds, kill_me)
    timer.daemon = True
    timer.start()


def arm(phase: str, moment: float) -> None:
    """Prepare this process's end, at a moment of the phase between 0 and 1."""
    if phase == "step":
        # From the first step on: anywhere in the steps that follow, or what comes between them.
        started: list[bool] = []

        def start() -> None:
            if not started:
                started.append(True)
                after(1.5 * moment)

        before_call(StepGuard, "begin", start)
    elif phase == "save":
        kill = at_call(1 + int(moment * WRITES))
        before_call(checkpoint._KeepsFirstError, "write", kill)
        for name in ("replace", "fsync"):
            before_call(checkpoint.os, name, kill)
    elif phase == "start-up":
        after(START_SECONDS * moment)
    elif phase == "range test":
        before_call(lr_range_test, "measure", lambda: after(TEST_SECONDS * moment))
    elif phase == "moving aside":
        kill = at_call(1 + int(moment * RENAMES))
        before_call(run, "give_way", lambda: before_call(os, "replace", kill))
    elif phase == "writing":
        kill = at_call(1 + int(moment * SCALARS))
        before_call(events, "append_whole", kill)
        for name in ("add_scalar", "flush"):
            before_call(tensorboard.SummaryWriter, name, kill)
    elif phase == "pictures":
        before_call(run, "draw", lambda: after(END_SECONDS * moment))
    else:
        before_call(evaluating.EvaluationProgress, "update", at_call(1 + int(moment * IMAGES)))


def armed(module: Any, words: list[str], phase: str | None, moment: float) -> int | None:
    """``tools/train_net.py`` that will be killed in that phase, if any."""
    if phase:
        arm(phase, moment)
    code: int | None = module.main(words)
    return code


def fork(main: Callable[[], int | None]) -> int:
    """Run a command in a forked process, which ends with its exit code; the process's id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        cli.run(main)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a forked process; its exit code, or minus the signal that ended it."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def attempt(
    main: Callable[[], int | None], log: Path, error_log: Path | None = None, limit: float | None = None
) -> int:
    """Run a command in a forked process group; its exit code, or minus the signal that ended it.

    Args:
        log, error_log: for its standard output and error; both in ``log`` without the other.
        limit: seconds; then all its processes write the stacks of their threads and are ended, as if by SIGALRM.
    """

    def in_its_group() -> int | None:
        os.setsid()
        with log.open("a") as out, (error_log or log).open("a") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
        faulthandler.register(signal.SIGUSR2)  # loader workers and ranks inherit it
        return main()

    child = fork(in_its_group)
    try:
        if limit is not None and not ended_within(child, limit):
            os.killpg(child, signal.SIGUSR2)
            time.sleep(5)
            return -signal.SIGALRM
        return exit_code(child)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # loader workers that have lost their parent


def ended_within(child: int, seconds: float) -> bool:
    """Wait so long at most; the process is left to be waited for."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def same(one: Any, other: Any) -> bool:
    """Bit for bit, in containers of any depth."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and _equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[k], other[k]) for k in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other))
    return bool(one == other)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.nan_to_num(7e33), other.nan_to_num(7e33))


def state_of(output: Path) -> dict[str, Any]:
    """What a finished run has learned and would go on with."""
    state = torch.load(output / "model_final.pth", weights_only=True)
    names = (
        "model", "average", "optimizer", "scheduler", "iteration", "images_seen", "watch", "guard",
    )  # fmt: skip
    return {name: state[name] for name in names if name in state}


def evaluations_of(output: Path) -> dict[str, list[tuple[str, int, float]]]:
    """(scalar, iteration, value) of all evaluations, as a run's two writers have them.

    Killed between the two, a run does the evaluation again, and TensorBoard has the same values twice.
    """
    found: dict[str, list[tuple[str, int, float]]] = {"metrics.json": [], "TensorBoard": []}
    for line in (output / "metrics.json").read_text().splitlines():
        record = json.loads(line)
        found["metrics.json"] += [(k, record["iteration"], v) for k, v in record.items() if is_evaluated(k)]
    accumulated = EventAccumulator(str(output), size_guidance={"scalars": 0}).Reload()
    for name in filter(is_evaluated, accumulated.Tags()["scalars"]):
        found["TensorBoard"] += {(name, e.step, float(e.value)) for e in accumulated.Scalars(name)}
    return {writer: sorted(scalars, key=repr) for writer, scalars in found.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killing:
    """The runs of one engine: one of which nobody takes notice, and those that are killed."""

    def __init__(self, engine: str, data: Path, folder: Path) -> None:
        self.engine, self.data, self.folder = engine, data, folder
        self.log = folder / "log.txt"
        self.module = train_net()
        self.earlier, self.whole = folder / "earlier", folder / "undisturbed"
        # The earlier run's folder, in which the others begin.
        words = command(engine, data, self.earlier, resume=False)
        self.expect_end([*words, "SEED", "8", "SOLVER.MAX_ITER", "4"])
        (self.earlier / "log.txt").unlink()  # it would be continued
        shutil.copytree(self.earlier, self.whole)
        self.expect_end(self.words(self.whole))
        self.expected = state_of(self.whole)
        self.evaluated = evaluations_of(self.whole)
        self.of_the_earlier = files_of(self.whole / "earlier_run_1")

    def words(self, output: Path) -> list[str]:
        """Anew until the earlier run has been moved aside, then resumed."""
        words = command(self.engine, self.data, output, resume=(output / "earlier_run_1").exists())
        return ["--auto-lr", *words]

    def expect_end(self, words: list[str]) -> None:
        code = attempt(lambda: self.module.main(words), self.log)
        if code != 0:
            raise SystemExit(f"an undisturbed run ended with {code}: see {self.log}")

    def attempt(self, output: Path, phase: str | None, moment: float) -> int:
        """The exit code of one attempt at a run, killed in that phase."""
        return attempt(functools.partial(armed, self.module, self.words(output), phase, moment), self.log)

    def differences(self, output: Path) -> list[str]:
        """In what a run that was killed differs from the one that was not."""
        found = []
        if not same(self.expected, state_of(output)):
            found.append("weights or optimizer")
        found += [
            writer for writer, scalars in evaluations_of(output).items() if scalars != self.evaluated[writer]
        ]
        if files_of(output / "earlier_run_1") != self.of_the_earlier or (output / "earlier_run_2").exists():
            found.append("the earlier run")
        found += [f"{name} is left" for name in files_of(output) if name.endswith((".tmp", ".moving"))]
        return [f"{output}: {one}" for one in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("torchvision", "detectron2"), default="torchvision")
    parser.add_argument("--data", type=Path, required=True, help="a set of datasets/make_shapes.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    load_engine(args.engine)
    shorten_range_test()
    args.output.mkdir(parents=True, exist_ok=True)
    killing = Killing(args.engine, args.data, args.output)

    kills: Counter[str] = Counter()
    runs = attempts = 0
    differing = []
    while kills.total() < args.kills:
        runs += 1
        output = args.output / f"killed{runs}"
        shutil.copytree(killing.earlier, output)
        while True:
            attempts += 1
            # By the kills, not the attempts: one that ends by itself, as after the end, leaves its turn to the next.
            phase = ORDER[kills.total() % len(ORDER)] if kills.total() < args.kills else None
            # Drawn here: what a forked process draws, the next one draws again.
            code = killing.attempt(output, phase, rng.random())
            if code == 0:
                break
            if code != -signal.SIGKILL or phase is None:
                raise SystemExit(
                    f"attempt {attempts} (killed in: {phase}) ended with {code}: see {killing.log}"
                )
            kills[phase] += 1
        found = killing.differences(output)
        differing += found
        print(
            json.dumps({"kills": dict(kills), "runs": runs, "differing": differing}),
            file=sys.stderr,
            flush=True,
        )
        if not found:
            shutil.rmtree(output)
    print(json.dumps({"kills": dict(kills), "runs": runs, "attempts": attempts, "differing": differing}))


if __name__ == "__main__":
    main()
