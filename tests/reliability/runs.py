"""Real training processes for the tests of reliability: started, signalled, resumed, compared."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reliability.kill_runs import KEYS, command, same, state_of

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds, for a loaded machine; a hang would be the thirty minutes of a collective
HERE = Path(__file__).parent

#: Both engines; Detectron2's where it is installed.
ENGINES = [
    "torchvision",
    pytest.param("detectron2", marks=pytest.mark.detectron2),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def need(engine: str) -> None:
    """Skip where the engine is not installed."""
    if engine == "detectron2":
        pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")


def environment() -> dict[str, str]:
    """One thread, no GPU, this checkout's package, and no other torchrun around it."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("TORCHELASTIC") and k not in ("RANK", "WORLD_SIZE")
    }
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def arguments(
    engine: str, data: Path, output: Path, *flags: str, resume: bool = False, **keys: Any
) -> list[str]:
    """``tools/train_net.py``'s arguments; keys with ``__`` for the dots override the small model's."""
    words = command(engine, data, output, resume=resume)
    # Flags go before the first key.
    first_key = words.index(next(iter(KEYS)))
    more = [str(word) for key, value in keys.items() for word in (key.replace("__", "."), value)]
    return [*words[:first_key], *flags, *words[first_key:], *more]


def start(
    words: list[str], faults: dict[str, Any] | None = None, launcher: list[str] | None = None, **streams: Any
) -> Any:
    """Start a run; its standard output and error go into one stream, or where ``streams`` says."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | streams
    script = [str(HERE / "faulty_run.py"), json.dumps(faults or {})]
    return subprocess.Popen(
        [*(launcher or [sys.executable]), *script, *words],
        cwd=ROOT, env=environment(), text=True, **streams,
    )  # fmt: skip


def finish(process: Any) -> tuple[int, str]:
    """Wait for a run; its exit code and all it printed."""
    try:
        printed, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, printed


def run(
    words: list[str],
    faults: dict[str, Any] | None = None,
    launcher: list[str] | None = None,
    *,
    processes: int = 1,
) -> tuple[int, str]:
    """Run to the end; the exit code and what it printed.

    Without a launcher the processes are forked from one that has done the imports, which take longer than the run.
    """
    if launcher:
        return finish(start(words, faults, launcher))
    done = forked(words, faults, processes=processes)
    return done.returncode, done.stdout


def forked(
    words: list[str],
    faults: dict[str, Any] | None = None,
    *,
    one_stream: bool = True,
    processes: int = 1,
) -> subprocess.CompletedProcess[str]:
    """A run in processes forked from :func:`fork_server`'s; its errors in its output unless asked for apart."""
    with (
        tempfile.NamedTemporaryFile("r", suffix=".out") as printed,
        tempfile.NamedTemporaryFile("r", suffix=".err") as errors,
    ):
        logs = [printed.name, printed.name if one_stream else errors.name]
        wanted = {
            "arguments": words, "faults": faults or {}, "logs": logs, "limit": LIMIT, "processes": processes,
        }  # fmt: skip
        server = fork_server()
        server.stdin.write(json.dumps(wanted) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        output, error = printed.read(), errors.read()
        assert answer, f"the process that forks the runs has ended:\n{output}{error}"
        if int(answer) == -signal.SIGALRM:
            raise TimeoutError(f"still running after {LIMIT} s:\n{output}{error}")
        return subprocess.CompletedProcess(words, int(answer), output, error)


@functools.cache
def fork_server() -> Any:
    """``faulty_run.py --serve``, for as long as this process lives."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "faulty_run.py"), "--serve"],
        cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(process: Any, text: str) -> str:
    """Read a run's output up to a line with ``text``."""
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"ended without {text!r}:\n{read}")


def events(output: Path) -> list[dict[str, Any]]:
    """The lines of ``bad_steps.jsonl``."""
    path = output / "bad_steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    """Of the finished model."""
    model: dict[str, torch.Tensor] = torch.load(output / "model_final.pth", weights_only=True)["model"]
    return model


def assert_same_result(one: Path, other: Path) -> None:
    """Two finished runs have the same weights, momentum and history, bit for bit."""
    assert same(state_of(one), state_of(other))
