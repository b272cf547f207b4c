"""How a hook ends a run of Detectron2's training loop, which knows no other way than an exception."""

from __future__ import annotations

from zenith_det.errors import UserError


class RunEnds(SystemExit):
    """The run ends here: at its end, or with an error. :meth:`ZenithTrainerMixin.train` turns it into either.

    Detectron2's loop logs the traceback of every ``Exception``; this is none. In a trainer whose own ``train`` lets it
    pass, the process ends with exit code 0, or with the error's line and exit code 1.
    """

    def __init__(self, error: UserError | None = None) -> None:
        super().__init__(0 if error is None else str(error))
        self.error = error
