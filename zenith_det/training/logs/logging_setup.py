"""Logging of a run: the console for people, ``log.txt`` for later."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from zenith_det import cli
from zenith_det.files import told
from zenith_det.training.logs import terminal

ROOT = "zenith_det"
# A record with this attribute is for the file alone: on a terminal the bar shows the same live.
FILE_ONLY = "file_only"

_DATE = "%m/%d %H:%M:%S"
_set_up: list[str] = []
_STYLES = {logging.WARNING: "bold yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class LineFormatter(logging.Formatter):
    """Detectron2's layout: ``[05/31 14:03:11 zenith_det.data]: message``, warnings marked as such."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname} " if record.levelno >= logging.WARNING else ""
        text = f"[{self.formatTime(record, _DATE)} {record.name}]: {level}{record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


class ConsoleHandler(logging.Handler):
    """Writes to standard output, above any progress bar.

    On a terminal it colours the line and leaves out the logger's name, which ``log.txt`` keeps.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, FILE_ONLY, False):
            return
        try:
            # Looked up at each line: tests and notebooks replace sys.stdout.
            stream = sys.stdout
            line = self.format(record)
            if terminal.DISPLAY.active or terminal.is_interactive(stream):
                text = Text(
                    line.replace(f" {record.name}]: ", "] ", 1), style=_STYLES.get(record.levelno, "")
                )
                text.stylize("dim", 0, text.plain.find("]") + 1)
                terminal.DISPLAY.print_above(text)
            else:
                stream.write(line + "\n")
                stream.flush()
        except OSError as error:
            # Training goes on, and so may other libraries' lines: `… | head`, a terminal that is gone, a full disk.
            terminal.DISPLAY.close()
            cli.forget_reader(stream)
            if not isinstance(error, BrokenPipeError):
                cli.tell(f"standard output: lines are lost: {error.strerror or error}")
        except Exception:
            self.handleError(record)


class LogFileHandler(logging.FileHandler):
    """Appends to a file; a full disk is said once, not once a line, and does not end training."""

    _failed = False

    def close(self) -> None:
        # Closing tries again to write what could not be written.
        with contextlib.suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            cli.tell(f"{self.baseFilename}: log lines are lost: {error.strerror or error}")


def setup_logging(
    output_dir: str | os.PathLike[str] | None = None,
    rank: int = 0,
    *,
    more: Sequence[str] = (),
) -> logging.Logger:
    """Send the package's log to the console (rank 0 only) and to a file.

    Args:
        output_dir: holds ``log.txt`` (``log.txt.rank1`` for rank 1, …), which is appended to;
            ``None``: no file.
        rank: of this process.
        more: names of loggers of libraries that are treated alike.

    Returns:
        The logger ``zenith_det``. Calling again replaces what an earlier call set up.

    Raises:
        UserError: the file cannot be written.
    """
    reset_logging()
    formatter = LineFormatter()
    handlers: list[logging.Handler] = []
    if rank == 0:
        handlers.append(ConsoleHandler())
    if output_dir is not None:
        path = Path(output_dir) / ("log.txt" if rank == 0 else f"log.txt.rank{rank}")
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(LogFileHandler(path, encoding="utf-8"))
    if not handlers:
        handlers.append(logging.NullHandler())
    for handler in handlers:
        handler.setFormatter(formatter)
    for name in (ROOT, *more):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        # Libraries configure the root logger (absl by way of tensorboard): each line would come twice.
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
        _set_up.append(name)
    return logging.getLogger(ROOT)


def reset_logging() -> None:
    """Undo :func:`setup_logging`: no handlers, records propagate again."""
    while _set_up:
        logger = logging.getLogger(_set_up.pop())
        for handler in list(logger.handlers):
            if isinstance(handler, ConsoleHandler | LogFileHandler | logging.NullHandler):
                logger.removeHandler(handler)
                handler.close()
        logger.propagate = True
