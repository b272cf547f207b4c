"""The command ``zenith-det``: a word for each tool, whose module is imported when its word is typed.

``python -m zenith_det`` and the scripts in ``tools/`` are other ways to the same commands.
"""

from __future__ import annotations

import difflib
import importlib
import sys

import zenith_det
from zenith_det import cli
from zenith_det.errors import UserError

#: Each word with what it does. The module is of the same name, with underscores.
COMMANDS = {
    "train": "train or evaluate, on Detectron2 or on the built-in engine",
    "demo": "draw what a trained model finds in images, folders or videos",
    "export": "write a trained model as ONNX, checked against PyTorch",
    "check-dataset": "check COCO-format datasets and say what training would do about each problem",
    "convert-dataset": "make COCO files of a YOLO, Pascal VOC or labelme dataset",
    "find-lr": "find SOLVER.BASE_LR by an LR range test",
    "report": "make one HTML page of a run",
    "plot": "draw the curves of a run, or of several over one another",
    "compare": "train one config with several optimizers and schedules, and compare them",
    "convert-checkpoint": "turn a checkpoint of one engine into the other's",
    "gradient-noise": "how much of the gradient norm is noise of the batch",
    "benchmark": "measure speed and memory side by side",
}


def usage() -> str:
    """What ``zenith-det --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {word:<{width}}  {text}" for word, text in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {cli.command('COMMAND')} [--help] …",
            "",
            "Train Faster, Mask and Keypoint R-CNN with ZENITH. The commands:",
            "",
            *lines,
            "",
            f"{cli.command('COMMAND')} --help says what a command takes; --version prints the version.",
        ]
    )


def dispatch(argv: list[str]) -> int | None:
    """Carry out the command that ``argv`` begins with; the exit code.

    Raises:
        UserError: there is no such command.
    """
    word = argv[0] if argv else "--help"
    if word in ("-h", "--help", "help"):
        if argv[1:2] and argv[1] in COMMANDS:
            return dispatch([argv[1], "--help"])
        print(usage())
        return 0
    if word in ("-V", "--version"):
        print(f"zenith_det {zenith_det.__version__}")
        return 0
    if word not in COMMANDS:
        raise UserError(f"{word}: no such command{_did_you_mean(word)}; {cli.command('--help')} lists them")
    module = importlib.import_module(f"{__name__}.{word.replace('-', '_')}")
    code: int | None = module.main(argv[1:])
    return code


def _did_you_mean(word: str) -> str:
    """The nearest command, or the flag's place where a flag comes first."""
    if word.startswith("-"):
        return f" (a command comes before its flags: {cli.command('train')} {word} …)"
    # Also by the names of the scripts: train_net.py, check_dataset.
    name = word.removesuffix(".py").replace("_", "-").lower()
    near = difflib.get_close_matches(name.removesuffix("-net"), COMMANDS, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def main() -> None:
    """The console script."""
    cli.run(lambda: dispatch(sys.argv[1:]))
