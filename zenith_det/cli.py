"""What every command-line tool shares: a user's mistake is one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from zenith_det.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def run(main: Callable[[], int | None]) -> None:
    """Run ``main`` as a command and leave the process with its exit code.

    Args:
        main: the tool's body; returns an exit code, ``None`` meaning 0.

    A :class:`~zenith_det.errors.UserError` is printed as ``error: <message>`` on standard error,
    without a traceback, and ends the process with code 2, as :mod:`argparse` does. Anything else
    that escapes is a bug of ours and keeps its traceback.
    """
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    raise SystemExit(code)
