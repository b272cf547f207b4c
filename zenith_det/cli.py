"""What command-line tools share: a user's mistake is one line and an exit code; flags for datasets."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from zenith_det.errors import UserError

EXIT_INTERRUPTED = 130
#: What a shell reports of a command that a closed pipe has ended (SIGPIPE): 128 + 13.
EXIT_READER_GONE = 141
_FLAG = re.compile(r"--[a-z]")

_DATA_FLAGS = {
    "train_json": "COCO-format annotations to train on; or the folder of a dataset (COCO, YOLO, Pascal VOC, labelme)",
    "train_images": "where their images are",
    "val_json": "COCO-format annotations to evaluate on",
    "val_images": "where their images are",
    "val_share": "share of the training images to hold out and evaluate on, in place of --val-json; for example 0.2",
}


#: The scripts in ``tools/`` that aren't called what their word is.
_SCRIPTS = {"train": "train_net"}


def command(word: str) -> str:
    """The command ``word`` in the way that this process's own was typed.

    ``zenith-det find-lr``, ``python -m zenith_det find-lr`` or ``python tools/find_lr.py``; the first for a process
    that none of our commands started.
    """
    start = sys.modules.get("__main__")
    module = getattr(getattr(start, "main", None), "__module__", None) or ""
    script = Path(sys.argv[0] if sys.argv else "")
    if module.startswith("zenith_det.commands.") and script.name == script_name(module.rpartition(".")[2]):
        return f"python {script.with_name(script_name(word))}"
    as_module = script.parts[-2:] == ("zenith_det", "__main__.py")
    return f"{'python -m zenith_det' if as_module else 'zenith-det'} {word}"


def process(word: str) -> list[str]:
    """The words that start the command ``word`` as another process, which imports from where this one does."""
    here = "" in sys.path or os.getcwd() in sys.path
    # Without -P, -m looks into the current folder first, which may hold another Detectron2 or zenith_det.
    safe = ["-P"] if sys.version_info >= (3, 11) and not here else []
    return [sys.executable, *safe, "-m", "zenith_det", word]


def script_name(word: str) -> str:
    """The script in ``tools/`` for the command ``word``."""
    return f"{_SCRIPTS.get(word, word.replace('-', '_'))}.py"


def parser(word: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """The parser of the command ``word``; ``%(prog)s`` in its texts stands for how it was typed."""
    return argparse.ArgumentParser(
        prog=command(word),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_data_flags(parser: argparse.ArgumentParser, *, val: bool = True) -> None:
    """Add ``--train-json``, ``--train-images`` and, with ``val``, the same for evaluation."""
    for name, text in _DATA_FLAGS.items():
        if val or name.startswith("train"):
            metavar = "FILE" if name.endswith("json") else "DIR" if name.endswith("images") else "SHARE"
            parser.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=text)


def add_max_bad_images(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-bad-images``, which sets ``DATASETS.MAX_BAD_IMAGES``."""
    parser.add_argument(
        "--max-bad-images",
        type=int,
        metavar="N",
        help="leave out up to N images that are missing or can't be used (default 0)",
    )


def add_crowds(parser: argparse.ArgumentParser) -> None:
    """Add ``--crowds``, which sets ``DATASETS.CROWDS``."""
    parser.add_argument(
        "--crowds",
        choices=("auto", "regions", "objects"),
        help="what annotations with iscrowd 1 are. regions: areas of many objects, which are not trained, as in COCO. "
        "objects: single objects. auto (default): objects if a set, or a class with many, has nothing else and "
        "the masks are in one piece",
    )


def data_overrides(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """The (key, value, flag) of each flag of :func:`add_data_flags` that was given."""
    return [
        (f"DATASETS.{name.upper()}", value, f"--{name.replace('_', '-')}")
        for name in _DATA_FLAGS
        if (value := getattr(args, name, None))
    ]


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line whose KEY VALUE pairs (``opts``) may stand anywhere, also behind ``--input a.jpg b.jpg``.

    A misspelt KEY isn't known for one: it is left to the parser, whose own ``opts`` takes it.
    """
    # Here and not above: it takes fvcore, which most of what is here does without.
    from zenith_det.config import get_cfg
    from zenith_det.config.keys import is_key

    others: list[str] = []
    keys: list[str] = []
    cfg, now = get_cfg(), others
    for word in sys.argv[1:] if argv is None else argv:
        if _FLAG.match(word):
            now = others
        elif is_key(word, cfg):
            now = keys
        now.append(word)
    args = parser.parse_intermixed_args(others)
    args.opts = [*args.opts, *keys]
    return args


def run(main: Callable[[], int | None]) -> None:
    """Run ``main`` as a command and leave the process with its exit code.

    Args:
        main: the tool's body; returns an exit code, ``None`` meaning 0.

    A :class:`~zenith_det.errors.UserError` is printed as ``error: <message>`` on standard error,
    without a traceback, and ends the process with its exit code: 2, as :mod:`argparse` does, or 75 for a run
    that was stopped on request (``stopped: <message>``). A command whose output is no longer read, as in
    ``… | head``, ends with 141, as the shell's own do. Anything else that escapes is a bug of ours and keeps its
    traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # replaced, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    told = ""
    try:
        code: int | str | None = main() or 0
    except UserError as error:
        told, code = f"{error.label}: {error}", error.exit_code
    except KeyboardInterrupt:
        told, code = "interrupted", EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_READER_GONE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        # Files are told of where they are written: what is left is what a command prints.
        where = error.filename or "standard output"
        told, code = f"error: {where}: cannot be written: {error.strerror}", 2
    except SystemExit as leaving:  # argparse's
        code = leaving.code
    lost = _end_output(sys.stdout)
    if isinstance(lost, BrokenPipeError):
        code = code or EXIT_READER_GONE
    elif lost is not None and not told:
        told, code = f"error: standard output: cannot be written: {lost.strerror or lost}", 2
    tell(told)
    raise SystemExit(code)


def tell(line: str) -> None:
    """Write a line on standard error, if anybody is there to read it."""
    with contextlib.suppress(OSError, ValueError):
        if line:
            sys.stderr.write(f"{line}\n")
    _end_output(sys.stderr)


def _end_output(stream: TextIO) -> OSError | None:
    """Flush a stream; why that failed. Python would complain of it, and end with 120, when it flushes again."""
    try:
        stream.flush()
    except OSError as error:
        forget_reader(stream)
        return error
    except ValueError:  # closed
        pass
    return None


def forget_reader(stream: TextIO) -> None:
    """What is written to a stream from now on goes nowhere: whoever read it (``… | head``) has gone."""
    with contextlib.suppress(OSError, ValueError):  # it has no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
