"""Runs the checks in processes and tells of each as it ends."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zenith_det.errors import one_line
from zenith_det.self_check.finding import BROKEN, Finding, broken
from zenith_det.self_check.images import make_set

#: Seconds of one check, imports included: ten times what any has taken. A GPU's first kernels may be compiled.
LIMIT = 300.0
PROCESS = [sys.executable, "-m", "zenith_det.self_check"]
_OF_AN_ENGINE = ("fp32", "bf16", "fp16", "waits", "memory", "exact resume")
#: The checks of each group, in the order in which they run.
NAMES: dict[str, tuple[str, ...]] = {
    "basics": ("ZENITH's step", "ZENITH doesn't wait", "evaluation"),
    "torchvision": _OF_AN_ENGINE,
    "detectron2": _OF_AN_ENGINE,
}
_TITLES = {"basics": "", "torchvision": "built-in engine, ", "detectron2": "Detectron2, "}


def run_checks(groups: Sequence[str], tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run the checks of ``groups`` (of :data:`NAMES`) on small generated images in a temporary folder.

    Args:
        tell: called with a line for each check as it ends.

    Returns:
        Per check its ``name``, ``verdict``, ``found``, ``to_do``, ``figures``, ``details`` and ``seconds``.
    """
    width = max(len(_TITLES[group] + name) for group in groups for name in NAMES[group])
    findings = []
    with tempfile.TemporaryDirectory(prefix="zenith_det_check_") as name:
        folder = Path(name)
        data = make_set(folder / "set")
        for group in groups:
            for finding in _run_group(group, data, folder):
                finding["name"] = _TITLES[group] + finding["name"]
                findings.append(finding)
                tell(f"{finding['name']:<{width}}  {finding['verdict']}: {finding['found']}")
                if finding["to_do"]:
                    tell(f"{'':<{width}}  -> {finding['to_do']}")
    return findings


def _run_group(group: str, data: tuple[Path, Path], folder: Path) -> Iterator[dict[str, Any]]:
    """Each check's finding; after a crash the checks that are left run in a new process."""
    left = list(NAMES[group])
    log = folder / f"{group}.log"
    while left:
        began = hung = False
        with _started([*PROCESS, group, *map(str, (*data, folder)), *left], log) as process:
            for line in _lines(process):
                if line is None:
                    hung = True
                    break
                began = "begins" in line
                if not began:
                    left.remove(line["name"])
                    yield line
        if left:
            name = left.pop(0)
            yield {"name": name, "seconds": None, **vars(_ended_early(process.returncode, hung, log))}
            if not began:  # and so would the others
                return


def _ended_early(code: int, hung: bool, log: Path) -> Finding:
    text = log.read_text(errors="replace").strip()
    if hung:
        why = f"did not end within {LIMIT:g} s"
    elif code < 0:
        why = f"the process was killed by signal {-code}, {signal.Signals(-code).name}"
    else:
        why = f"the process ended with exit code {code}: {one_line(text.rpartition(chr(10))[2], 300)}"
    return broken(why, details=text[-4000:])


@contextlib.contextmanager
def _started(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    # For DETERMINISTIC; cuBLAS reads it once. What cuBLAS and the rest say of themselves goes into the log.
    environment = {
        **os.environ,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=file, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started, such as compilers
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _lines(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any] | None]:
    """The objects that a process writes; None, once, where it says nothing for :data:`LIMIT` seconds."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        text = b""
        while True:
            if not selector.select(LIMIT):
                yield None
                return
            got = os.read(process.stdout.fileno(), 65536)
            if not got:
                process.wait()
                return
            *whole, text = (text + got).split(b"\n")
            for line in whole:
                yield json.loads(line)


def any_broken(findings: Sequence[dict[str, Any]]) -> bool:
    """Whether a check found something broken."""
    return any(finding["verdict"] == BROKEN for finding in findings)
