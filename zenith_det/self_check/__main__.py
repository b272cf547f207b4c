"""One group of checks in a process of its own, so that a crash ends them and nothing else.

``python -m zenith_det.self_check GROUP JSON_FILE IMAGES FOLDER [NAME …]`` runs the checks NAME of GROUP (default: all)
and writes a JSON object a line: ``{"begins": name}``, then ``{"name": …, "seconds": …}`` with the finding.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from zenith_det.errors import UserError, one_line
from zenith_det.self_check.finding import Finding, broken
from zenith_det.self_check.runner import NAMES


def checks_of(group: str, data: tuple[Path, Path], folder: Path) -> Mapping[str, Callable[[], Finding]]:
    """The checks of a group, by their names."""
    import torch

    from zenith_det.self_check.evaluation import check_evaluation
    from zenith_det.self_check.optimizer import check_no_wait, check_step

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks: list[Callable[[], Finding]]
    if group == "basics":
        checks = [
            partial(check_step, device),
            partial(check_no_wait, device),
            partial(check_evaluation, data[0]),
        ]
    else:
        from zenith_det.self_check.training import PRECISIONS, EngineChecks

        engine = EngineChecks(group, data, folder, device)
        checks = [partial(engine.check_precision, precision) for precision in PRECISIONS]
        checks += [engine.check_waits, engine.check_memory, engine.check_resume]
    return dict(zip(NAMES[group], checks, strict=True))


def main(words: list[str]) -> None:
    """Run the checks; whatever they print goes to standard error."""
    group, json_file, images, folder, *wanted = words
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(line: dict[str, object]) -> None:
        print(json.dumps(line), file=out, flush=True)

    for name, check in checks_of(group, (Path(json_file), Path(images)), Path(folder)).items():
        if wanted and name not in wanted:
            continue
        tell({"begins": name})
        start = time.perf_counter()
        try:
            finding = check()
        except UserError as error:
            finding = broken(str(error))
        except Exception as error:  # whatever a broken installation raises
            finding = broken(
                f"{type(error).__name__}: {one_line(str(error), 300)}", details=traceback.format_exc()
            )
        tell({"name": name, "seconds": time.perf_counter() - start, **dataclasses.asdict(finding)})


if __name__ == "__main__":
    main(sys.argv[1:])
