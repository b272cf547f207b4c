"""What every command-line tool shares: a user's mistake is one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from zenith_det.errors import UserError

EXIT_INTERRUPTED = 130


def run(main: Callable[[], int | None]) -> None:
    """Run ``main`` as a command and leave the process with its exit code.

    Args:
        main: the tool's body; returns an exit code, ``None`` meaning 0.

    A :class:`~zenith_det.errors.UserError` is printed as ``error: <message>`` on standard error,
    without a traceback, and ends the process with its exit code: 2, as :mod:`argparse` does, or 75 for a run
    that was stopped on request (``stopped: <message>``). Anything else that escapes is a bug of ours and keeps
    its traceback.
    """
    try:
        code = main() or 0
    except UserError as error:
        print(f"{error.label}: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    raise SystemExit(code)
