"""A command called where the test runs: as the process ends and says, without the seconds that its imports take."""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
from collections.abc import Callable

from zenith_det import cli
from zenith_det.training.logs.logging_setup import reset_logging


def called(main: Callable[[list[str]], int | None], *words: str) -> subprocess.CompletedProcess[str]:
    """Its exit code and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run(lambda: main([*words]))
        except SystemExit as leaving:
            code = leaving.code
        finally:
            logging.disable(logging.NOTSET)
            reset_logging()
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
