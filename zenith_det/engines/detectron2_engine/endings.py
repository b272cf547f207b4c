"""How a run of Detectron2's training loop is ended, which knows no other way than an exception."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from zenith_det.errors import UserError
from zenith_det.training.processes.stopping import EvaluationStopped


class RunEnds(SystemExit):
    """The run ends here: at its end, or with an error. :meth:`ZenithTrainerMixin.train` turns it into either.

    Detectron2's loop logs the traceback of every ``Exception``; this is none. In a trainer whose own ``train`` lets it
    pass, the process ends with exit code 0, or with the error's line and exit code 1.
    """

    def __init__(self, error: UserError | EvaluationStopped | None = None) -> None:
        super().__init__(0 if error is None else str(error))
        self.error = error


@contextlib.contextmanager
def ending_the_run() -> Iterator[None]:
    """Inside, an error that has its own line ends the run without a traceback."""
    try:
        yield
    except (UserError, EvaluationStopped) as error:
        raise RunEnds(error) from None
