"""A disk that fills up at some moment of a run: a real file system of a few MB."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.reliability import runs

SIZE_MIB = 150


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays_whole(
    engine: str, data: Path, tmp_path: Path, small_disk: Path
) -> None:
    runs.need(engine)
    output = small_disk / "run"
    common = {"CHECKPOINT__KEEP": 0, "TEST__EVAL_PERIOD": 0, "CHECKPOINT__BEST": "''"}
    code, printed = runs.run(runs.arguments(engine, data, output, SOLVER__MAX_ITER=6, **common))
    assert code == 0, printed
    last = (output / "last_checkpoint").read_text()
    size = (output / last).stat().st_size
    # Leave room for logs, and for half a checkpoint.
    free = SIZE_MIB * 2**20 - sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
    (small_disk / "other").write_bytes(b"\0" * (free - size // 2))
    code, printed = runs.run(runs.arguments(engine, data, output, resume=True, **common))
    assert code == 2, printed
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert f"{last} is whole: free some space and go on with --resume" in line
    torch.load(output / last, weights_only=True)
    (small_disk / "other").unlink()
    code, printed = runs.run(runs.arguments(engine, data, output, resume=True, SOLVER__MAX_ITER=8, **common))
    assert code == 0, printed


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_metrics_on_a_full_disk_are_one_line(
    engine: str, data: Path, tmp_path: Path, small_disk: Path
) -> None:
    runs.need(engine)
    output = small_disk / "run"
    words = runs.arguments(engine, data, output, TEST__EVAL_PERIOD=0, SOLVER__CHECKPOINT_PERIOD=100)
    code, printed = runs.run(words, {"fill": [str(small_disk), 5]})
    assert code == 2, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "metrics.json: cannot be written: No space left on device" in line
    assert "Traceback" not in printed
    assert not (output / "metrics.json").read_text()
    assert yaml.safe_load((output / "config.yaml").read_text())["SOLVER"]["CHECKPOINT_PERIOD"] == 100


@pytest.mark.parametrize("engine", runs.ENGINES)
@pytest.mark.parametrize(
    ("when", "what"), [("write_config", "config.yaml"), ("build_writers", "metrics.json")]
)
def test_a_disk_that_is_full_at_the_start_is_one_line_and_the_files_are_as_they_were(
    engine: str, when: str, what: str, data: Path, small_disk: Path
) -> None:
    runs.need(engine)
    output = small_disk / "run"
    few = {"SOLVER__MAX_ITER": 2, "TEST__EVAL_PERIOD": 0}
    code, printed = runs.run(runs.arguments(engine, data, output, **few))
    assert code == 0, printed
    before = {name: (output / name).read_bytes() for name in ("config.yaml", "metrics.json")}
    more = runs.arguments(engine, data, output, resume=True, **{**few, "SOLVER__MAX_ITER": 3, "SEED": 9})
    code, printed = runs.run(more, {"fill": [str(small_disk), when]})
    assert code == 2, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert "Traceback" not in printed
    assert (output / what).read_bytes() == before[what]
    assert not list(output.glob("*.tmp")) + list(output.glob(".*.tmp"))


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_pictures_on_a_full_disk_do_not_make_a_finished_run_a_failed_one(
    engine: str, data: Path, small_disk: Path
) -> None:
    runs.need(engine)
    words = runs.arguments(engine, data, small_disk / "run", SOLVER__MAX_ITER=2)
    code, printed = runs.run(words, {"fill": [str(small_disk), "draw"]})
    assert code == 0, printed
    assert "not all pictures are drawn: " in printed
    assert "Traceback" not in printed
