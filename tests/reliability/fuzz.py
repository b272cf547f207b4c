#!/usr/bin/env python
"""Coverage-guided fuzzing of the three readers of foreign files, with atheris (libFuzzer).

    python tests/reliability/fuzz.py annotations --seconds 600
    python tests/reliability/fuzz.py checkpoint --seconds 600 --keep /tmp/inputs

Starts from the inputs under ``tests/reliability/corpus/<target>``; an input that raises anything but a UserError,
breaks what must hold of a result, takes too long or too much memory is kept there as ``crash-…``, ``timeout-…`` or
``oom-…``, and the exit code is not 0. ``pytest tests/reliability/test_fuzz.py`` replays the corpus without atheris.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
INSTRUMENTED = ["zenith_det.data", "zenith_det.config", "zenith_det.training", "zenith_det.errors"]
SECONDS_PER_INPUT = 20
MEMORY_MIB = 2048  # of the whole process, torch and all
TARGETS = ("annotations", "checkpoint", "config")
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), 2**31, 2**53, 2**63 -
    1, 2**63, -(2**63), 10**400, "", "a", "1", "\0", "\x1b[2J", "\ud800", "../1.png", "/1.png", "1.png", [],
    [1], [[1]], {}, {"a": 1}, [0, 0, 1, 1], [1, 1, 40, 30], [5, 5, 15, 5, 15, 15], [[5, 5, 15, 5, 15, 15]],
    {"size": [30, 40], "counts": [1200]}, {"size": [30, 40], "counts": "PPPPPP"}, [1, 2, 2, 3, 4, 1],
    ["left_a", "right_a"], [["left_a", "right_a"]], [[1, 2]],
]  # fmt: skip


def mutate_json(data: bytes, max_size: int, rng: random.Random) -> bytes | None:
    """One value of a JSON text changed for another, taken out, or doubled; None where it is no JSON."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    places: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        keys: Any = (
            node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        )
        for key in keys:
            places.append((node, key))
            waiting.append(node[key])
    if not places:
        return None
    for _ in range(rng.choice((1, 1, 2, 4))):
        node, key = rng.choice(places)
        other, other_key = rng.choice(places)
        try:
            what = rng.randrange(6)
            if what == 0:
                del node[key]
            elif what == 1 and isinstance(node, list):
                node.insert(rng.randrange(len(node) + 1), json.loads(json.dumps(other[other_key])))
            elif what == 2:
                node[key] = json.loads(json.dumps(other[other_key]))
            elif what == 3 and isinstance(node[key], (int, float)):
                node[key] = node[key] * rng.choice((-1, 2, 1000, 0.5)) + rng.choice((0, 1, -1))
            else:
                node[key] = rng.choice(JUNK)
        except (LookupError, ValueError, OverflowError, RecursionError):
            continue
    changed = json.dumps(tree).encode()
    return changed if len(changed) <= max_size else None


def fuzz(target: str, corpus: Path, work: Path, seconds: int) -> None:
    """Run libFuzzer; it leaves the process when it is done."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        import zenith_det.config
        import zenith_det.data
        import zenith_det.training.checkpoints.checkpoint
        import zenith_det.training.checkpoints.weights  # noqa: F401
    from tests.reliability.fuzz_targets import RUN, prepare

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    folder = work / "files"
    folder.mkdir()
    prepare(target, folder)
    run = RUN[target]

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = mutate_json(data, max_size, rng) if target == "annotations" and rng.random() < 0.7 else None
        return changed if changed is not None else atheris.Mutate(data, max_size)

    # libFuzzer reads the peak, and a peak outlives exec: that of the process that started this one counts along.
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    arguments = [
        sys.argv[0],
        str(work / "inputs"),
        str(corpus),
        f"-max_total_time={seconds}",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-rss_limit_mb={peak_mib + MEMORY_MIB}",
        "-max_len=4096",
        f"-dict={Path(__file__).parent / 'words' / target}.txt",
        f"-artifact_prefix={corpus}/",
        "-print_final_stats=1",
    ]
    atheris.Setup(arguments, lambda data: run(data, folder) and None, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60, help="time to spend (default 60)")
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="inputs to start from, and where findings go"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="where to keep the inputs that reached new code"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    corpus = args.corpus or Path(__file__).parent / "corpus" / args.target
    if args.work is not None:
        fuzz(args.target, corpus, args.work, args.seconds)
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        inputs = args.keep or Path(temporary) / "inputs"
        inputs.mkdir(parents=True, exist_ok=True)
        if args.keep is not None:
            (Path(temporary) / "inputs").symlink_to(args.keep.resolve())
        # libFuzzer ends the process that it runs in, whatever is still to be done there.
        command = [sys.executable, __file__, args.target, "--seconds", str(args.seconds)]
        return subprocess.call([*command, "--corpus", str(corpus.resolve()), "--work", temporary])


if __name__ == "__main__":
    sys.exit(main())
