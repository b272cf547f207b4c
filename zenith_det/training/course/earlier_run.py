"""What an earlier run left in the folder of a new one: a mistake changes nothing of it, a run replaces none of it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from itertools import count
from pathlib import Path
from types import TracebackType

from zenith_det.data.statistics import STATISTICS_FILE
from zenith_det.errors import UserError
from zenith_det.files import write_whole
from zenith_det.training.checkpoints.checkpoint import LAST_FILE, SUFFIX
from zenith_det.training.course.run_record import CONFIG_FILE
from zenith_det.training.processes.distributed import is_main_process

logger = logging.getLogger(__name__)

FOLDER = "earlier_run_{}"
#: Files that say what a run is, in place before it begins to train.
DESCRIPTIONS = (CONFIG_FILE, STATISTICS_FILE)


class EarlierRun:
    """The checkpoints and descriptions (:data:`DESCRIPTIONS`) of an earlier run, around all of a new one::

        with EarlierRun(output_dir) as earlier:
            ...  # all that a mistake can end
            earlier.give_way(anew=True)
            ...  # train

    Left before it gave way, the descriptions are put back as they were: the folder still holds the earlier run, whose
    models they describe. The main process alone acts.

    Args:
        output_dir: of the new run.
    """

    def __init__(self, output_dir: Path) -> None:
        self._folder = output_dir
        self._before: dict[str, bytes] = {}
        self._gone = not is_main_process()

    def __enter__(self) -> EarlierRun:
        for name in DESCRIPTIONS:
            with contextlib.suppress(OSError):
                self._before[name] = (self._folder / name).read_bytes()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._gone and self._before:
            for name in DESCRIPTIONS:
                with contextlib.suppress(OSError, UserError):
                    if name in self._before:
                        write_whole(self._folder / name, self._before[name])
                    else:
                        (self._folder / name).unlink(missing_ok=True)

    def give_way(self, *, anew: bool, weights: str = "") -> None:
        """The new run begins to train. Of no effect when called again.

        Args:
            anew: it starts at iteration 0: the checkpoints and descriptions of the earlier one are moved to a folder
                beside.
            weights: a file that may be needed where it is; it is copied.

        Raises:
            UserError: they can't be moved.
        """
        if self._gone:
            return
        self._gone = True
        models = sorted(self._folder.glob(f"model_*{SUFFIX}"))
        if not anew or not models:
            return
        aside = next(path for n in count(1) if not (path := self._folder / FOLDER.format(n)).exists())
        try:
            aside.mkdir()
            for path in (*models, self._folder / LAST_FILE):
                if not path.exists():
                    continue
                if weights and os.path.realpath(weights) == os.path.realpath(path):
                    shutil.copy2(path, aside)
                else:
                    os.replace(path, aside / path.name)
            for name, content in self._before.items():
                (aside / name).write_bytes(content)
        except OSError as error:
            raise UserError(
                f"{self._folder} holds the checkpoints of an earlier run, which can't be moved to {aside.name}: "
                f"{error.strerror or error}; choose another OUTPUT_DIR"
            ) from error
        logger.warning(
            "%s held an earlier run, which --resume would have gone on with: its %d checkpoints are in %s now",
            self._folder, len(models), aside,
        )  # fmt: skip
