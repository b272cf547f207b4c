"""What is installed, which engine a command would take, and what is wrong with the rest.

``python -m zenith_det.env`` prints it, ready to paste into a bug report; ``--check`` also tries, in about a minute,
whether this machine trains as it should.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zenith_det
from zenith_det import cli, opencv
from zenith_det.engines.selection import (
    EngineStatus,
    detectron2_build,
    import_problem,
    probe_detectron2,
    probe_model_zoo,
    probe_torchvision,
    select_engine,
)
from zenith_det.errors import ConfigError
from zenith_det.files import write_whole

_ENGINE_ROW = "engine auto takes"

# (distribution, the module it installs), in the order printed.
_LIBRARIES = (
    ("fvcore", "fvcore"),
    ("pycocotools", "pycocotools"),
    ("faster-coco-eval", "faster_coco_eval"),
    ("opencv-python", "cv2"),
    ("opencv-python-headless", "cv2"),
    ("pillow", "PIL"),
    ("numpy", "numpy"),
    ("tensorboard", "tensorboard"),
    ("setuptools", "setuptools"),
)


def collect() -> tuple[list[tuple[str, str]], list[str]]:
    """What is here as (name, description) rows, and what is wrong as a list of lines.

    Imports torch, torchvision and, where it is installed, Detectron2.
    """
    detectron2, torchvision = probe_detectron2(), probe_torchvision()
    # Without Detectron2 the built-in engine is used, and nothing is wrong; a broken one is.
    problems = [
        status.problem
        for status in (detectron2, torchvision)
        if not status.usable and (status.location or not torchvision.usable)
    ]
    rows = [
        ("zenith_det", f"{zenith_det.__version__} in {_folder(zenith_det.__file__)}"),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", f"{platform.platform()}, {os.cpu_count()} CPUs"),
        ("torch", _torch(problems)),
        ("torchvision", _engine_library(torchvision)),
        ("detectron2", _engine_library(detectron2)),
    ]
    if detectron2.usable:
        build, problem = detectron2_build()
        rows.append(("  compiled", build))
        problems += [problem] if problem else []
        zoo = probe_model_zoo()
        rows.append(("  model zoo", "usable" if zoo.usable else "cannot be imported"))
        if not zoo.usable:
            problems.append(zoo.problem)
    rows += _libraries(problems)
    problems += _opencv_problems({name for name, _ in rows})
    rows.append(("DETECTRON2_DATASETS", os.environ.get("DETECTRON2_DATASETS", "not set: ./datasets")))
    try:
        choice = select_engine("auto")
        rows.append((_ENGINE_ROW, f"{choice.name}: {choice.reason.partition(';')[0]}"))
    except ConfigError:
        rows.append((_ENGINE_ROW, "none: no engine can be used"))
    return rows, problems


def report(rows: list[tuple[str, str]], problems: list[str]) -> str:
    """The rows and problems of :func:`collect` as text, with the home directory written as ``~``."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    lines.append(f"{'what is wrong':<{width}}  {len(problems) or 'nothing'}")
    lines += [f"  {number}. {problem}" for number, problem in enumerate(problems, start=1)]
    return _without_home("\n".join(lines))


def _torch(problems: list[str]) -> str:
    problem = import_problem("torch")
    if problem:
        problems.append(
            f"torch cannot be imported ({problem}); to install it: https://pytorch.org/get-started"
        )
        return "cannot be imported"
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    if not torch.cuda.is_available():
        return f"{torch.__version__} ({build}), no GPU can be used"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    counted = ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
    return f"{torch.__version__} ({build}), {counted}"


def _engine_library(status: EngineStatus) -> str:
    if not status.location:
        return "not installed"
    return f"{status.version} in {status.location}" + ("" if status.usable else ", cannot be imported")


def _libraries(problems: list[str]) -> list[tuple[str, str]]:
    rows = []
    for distribution, module in _LIBRARIES:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        # setuptools is here for its version alone: importing it changes how distutils is found.
        problem = "" if module == "setuptools" else import_problem(module)
        if problem:
            problems.append(f"{distribution} {version} cannot be imported ({problem})")
        rows.append((distribution, version + (", cannot be imported" if problem else "")))
    return rows


def _opencv_problems(installed: set[str]) -> list[str]:
    """Two packages install the module ``cv2``; neither is required."""
    there = {"opencv-python", "opencv-python-headless"} & installed
    if len(there) == 2:
        return [
            "opencv-python and opencv-python-headless are both installed and overwrite each other's cv2: pip uninstall "
            "both, then install one"
        ]
    # Another distribution, such as conda's, may bring it.
    if not there and importlib.util.find_spec("cv2") is None:
        return [f"OpenCV isn't installed, and no pictures are drawn: {opencv.HOW_TO_INSTALL}"]
    return []


def _folder(file: str | None) -> str:
    return str(Path(file).parent) if file else "an unknown place"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, and with ``--check`` what the checks find.

    Returns:
        1 where no engine can be used or a check found something broken, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m zenith_det.env", description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="train for a few iterations on each engine that is there, in each precision, on the GPU if there is one",
    )
    parser.add_argument("--json", metavar="FILE", help="write all of it to a file, for a bug report")
    args = parser.parse_args(argv)
    rows, problems = collect()
    print(report(rows, problems), flush=True)
    found: dict[str, Any] = {"environment": dict(rows), "problems": problems}
    failed = dict(rows)[_ENGINE_ROW].startswith("none")
    if args.check:
        found["checks"], any_broken = _check()
        failed = failed or any_broken
    if args.json:
        write_whole(args.json, _without_home(json.dumps(found, indent=1)) + "\n")
    return int(failed)


def _check() -> tuple[list[dict[str, Any]], bool]:
    """What the checks found, each told as it ends, and whether something is broken."""
    if problem := import_problem("torch"):
        raise ConfigError(f"--check needs torch, which cannot be imported ({problem})")
    # Here and not above: a broken torch is to be told of.
    from zenith_det.self_check.runner import any_broken, run_checks

    probes = (probe_torchvision(), probe_detectron2())
    print("\nchecks, about a minute; what they write goes to a temporary folder", flush=True)
    findings = run_checks(
        ["basics", *(p.name for p in probes if p.usable)], lambda line: print(line, flush=True)
    )
    return findings, any_broken(findings)


def _without_home(text: str) -> str:
    # Paths are needed to tell installations apart; whose account it is, is not.
    home = str(Path.home())
    return text if home == "/" else text.replace(home, "~")


if __name__ == "__main__":
    cli.run(main)
