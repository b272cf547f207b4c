"""A run that is stopped and resumed for a long time, while what it holds of the machine is counted.

    python tests/reliability/soak.py --engine torchvision --data SET --output DIR --minutes 30 --leg 300 KEY VALUE …

Each leg is ``tools/train_net.py --resume`` as a process of its own, ended by SIGTERM: a small model, two loader
workers, evaluations, saves and pictures in TensorBoard. Memory, open files and threads of all its processes together
are sampled; so are the files in its TMPDIR, which nothing else uses, in ``OUTPUT_DIR``, and the entries of /dev/shm
(its own, where the machine lets it mount one). Prints a JSON object a leg and one at the end, and ends with 1 if
anything has grown or was left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.reliability.kill_runs import command  # noqa: E402

#: What a run does besides training, so often.
MORE_KEYS = {
    "SOLVER.BASE_LR": 0.005,
    "SOLVER.MAX_ITER": 10_000_000,
    "SOLVER.CHECKPOINT_PERIOD": 50,
    "TEST.EVAL_PERIOD": 100,
    "TEST.MAX_IMAGES": 8,
    "VIS_PERIOD": 200,
    "DETERMINISTIC": False,
}
#: Runs what follows with a /dev/shm that nobody else uses.
OWN_SHARED_MEMORY = [
    "unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=2g tmpfs /dev/shm && exec "$@"', "sh",
]  # fmt: skip
# Seconds: to come to the first evaluation, and to end once asked to.
START_LIMIT, END_LIMIT = 300, 180
# Memory may differ by so much: caches of the allocator, and pages shared with processes that come and go.
TOLERANCE, TOLERANCE_MIB = 0.05, 16
# A tensor on its way from a worker is an open file.
TOLERANCE_FILES = 20


class Soak:
    """One engine's run, leg after leg."""

    def __init__(self, engine: str, data: Path, folder: Path, keys: list[str]) -> None:
        self.output, self.temporary, self.log = folder / "run", folder / "tmp", folder / "log.txt"
        self.temporary.mkdir(parents=True)
        more = [str(word) for pair in MORE_KEYS.items() for word in pair]
        self.words = [*command(engine, data, self.output, resume=True), *more, *keys]

    def leg(self, seconds: float, period: float) -> dict[str, Any]:
        """Train for so long after the first evaluation, then stop; what was held early and late, and what is left."""
        log_before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "tools" / "train_net.py"), *self.words],
                stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "TMPDIR": str(self.temporary), "PYTHONFAULTHANDLER": "1"},
            )  # fmt: skip
        try:
            start = time.monotonic()
            while b"copypaste" not in self.log.read_bytes()[log_before:]:
                if process.poll() is not None or time.monotonic() > start + START_LIMIT:
                    self.give_up(process, "it evaluated nothing")
                time.sleep(0.1)
            start = time.monotonic()
            samples = []
            while (now := time.monotonic() - start) < seconds and process.poll() is None:
                with contextlib.suppress(psutil.Error, FileNotFoundError):  # one that has just ended
                    samples.append((now / seconds, self.sample(process.pid)))
                time.sleep(period)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_LIMIT)
            if process.returncode != 75:
                self.give_up(process, "it did not end with 75 when asked to stop")
        finally:
            members = group(process.pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return {
            "iterations": int((self.output / "last_checkpoint").read_text()[6:13]) + 1,
            "samples": len(samples),
            "early": medians([s for at, s in samples if 0.2 < at < 0.6]),
            "late": medians([s for at, s in samples if at >= 0.6]),
            "left": {"processes": members, "shm": entries("/dev/shm"), "tmp": entries(self.temporary)},
        }

    def sample(self, pid: int) -> dict[str, float]:
        """What the run's processes hold now."""
        main = psutil.Process(pid)
        members = [main, *main.children(recursive=True)]
        memory = [p.memory_full_info() for p in members]
        return {
            "memory MiB": sum(m.pss for m in memory) / 2**20,
            "memory of the main process MiB": memory[0].rss / 2**20,
            "open files": sum(p.num_fds() for p in members),
            "threads": sum(p.num_threads() for p in members),
            "processes": len(members),
            "shm": len(entries("/dev/shm")),
            "tmp": len(entries(self.temporary)),
            "output": len([name for name in entries(self.output) if "tfevents" not in name]),
        }

    def give_up(self, process: Any, why: str) -> None:
        """End with what the run printed, and the stacks of its threads if it lives."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGABRT)
        time.sleep(2)
        raise SystemExit(f"{why}; exit code {process.poll()}: {self.log.read_text()[-4000:]}")


def group(leader: int) -> list[str]:
    """The command lines of the processes in a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:200])
    return found


def entries(folder: str | Path) -> list[str]:
    """All that is in a folder, at any depth."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def medians(samples: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(s[name] for s in samples), 1) for name in samples[0]}


def grown(legs: list[dict[str, Any]]) -> list[str]:
    """What the last leg held late and the first did not early, and what a leg has left."""
    first, last = legs[0]["early"], legs[-1]["late"]
    found = []
    for name, before in first.items():
        allowed = before
        if "memory" in name:
            allowed = before * (1 + TOLERANCE) + TOLERANCE_MIB
        elif name == "open files":
            allowed = before + TOLERANCE_FILES
        if last[name] > allowed:
            found.append(f"{name}: {before} early, {last[name]} late")
    for number, leg in enumerate(legs, 1):
        found += [f"leg {number} left {name}: {left}" for name, left in leg["left"].items() if left]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("torchvision", "detectron2"), default="torchvision")
    parser.add_argument(
        "--data", type=Path, required=True, help="annotations/instances_{train,val}.json, train, val"
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder that isn't there yet")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument(
        "--leg", type=float, default=300, help="seconds from a leg's first evaluation to its stop"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("keys", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    private = subprocess.run([*OWN_SHARED_MEMORY, "true"], capture_output=True).returncode == 0
    if private and "SOAK_INSIDE" not in os.environ:
        os.environ["SOAK_INSIDE"] = "1"
        os.execvp("unshare", [*OWN_SHARED_MEMORY, sys.executable, *sys.argv])
    rng = random.Random(args.seed)
    soak = Soak(args.engine, args.data, args.output, args.keys)
    end = time.monotonic() + 60 * args.minutes
    legs: list[dict[str, Any]] = []
    while time.monotonic() < end or len(legs) < 2:
        legs.append(soak.leg(args.leg * rng.uniform(0.8, 1.2), period=min(2.0, args.leg / 50)))
        print(json.dumps(legs[-1]), flush=True)
    found = grown(legs)
    print(json.dumps({"engine": args.engine, "legs": len(legs), "grown": found}))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
