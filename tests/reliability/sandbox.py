"""Run a reader on a hostile file in a process of its own, with limits on memory and time.

``python -m tests.reliability.sandbox`` is the server: it imports once, and forks for each file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from typing import Any

from tests.conftest import ROOT


@dataclass(frozen=True)
class Outcome:
    """What became of one file.

    Attributes:
        kind: ``read``, ``refused``, ``failed`` (an error that isn't the user's), ``died`` or ``hung``.
        message: what the reader returned, the refusal, the traceback, or the signal.
        peak_mib: memory that the process took beyond what it had before.
        output: what it printed on standard output and standard error.
    """

    kind: str
    message: str
    peak_mib: float
    output: str


class Sandbox:
    """The client: one server process, one fork of it per file."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def read(self, target: str, *args: Any, memory_mib: int = 512, seconds: float = 20) -> Outcome:
        """Run ``READERS[target](*args)`` within limits."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {"target": target, "args": args, "memory_mib": memory_mib, "seconds": seconds}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Outcome(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()


def _status_mib(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def _child(request: dict[str, Any], report: int) -> None:
    import logging
    import resource

    from zenith_det.errors import UserError

    from .readers import READERS

    # A run logs what was dropped, in as many lines as there are kinds; what else is printed is looked at.
    logging.getLogger("zenith_det").addHandler(logging.NullHandler())
    # Address space is what can be limited; what the process has mapped already is not the file's doing.
    limit = int(_status_mib("VmSize:") + request["memory_mib"]) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = _status_mib("VmRSS:")
    try:
        kind, message = "read", READERS[request["target"]](*request["args"])
    except UserError as error:
        kind, message = "refused", str(error)
    except BaseException:
        kind, message = "failed", traceback.format_exc(limit=-6)[-3000:]
    message = message if len(message) < 8000 else f"{message[:8000]}… ({len(message)} characters)"
    outcome = {"kind": kind, "message": message, "peak_mib": max(0.0, _status_mib("VmHWM:") - before)}
    os.write(report, json.dumps(outcome).encode())


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    receive, report = os.pipe()
    with tempfile.TemporaryFile() as printed:
        pid = os.fork()
        if pid == 0:
            os.close(receive)
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            with contextlib.suppress(BaseException):
                _child(request, report)
            os._exit(0)
        os.close(report)
        deadline = time.monotonic() + request["seconds"]
        hung = False
        while os.waitpid(pid, os.WNOHANG)[0] == 0 if not hung else False:
            if time.monotonic() > deadline:
                hung = True
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            time.sleep(0.005)
        with os.fdopen(receive, "rb") as pipe:
            told = pipe.read()
        printed.seek(0)
        output = printed.read().decode(errors="replace")
    if told:
        return {**json.loads(told), "output": output}
    return {"kind": "hung" if hung else "died", "message": "", "peak_mib": 0.0, "output": output}


def main() -> None:
    from . import readers  # noqa: F401  # imported once, here, for all forks

    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
