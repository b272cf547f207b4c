from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zenith_det.errors import UserError
from zenith_det.training.logs.events import EventStorage, JsonWriter, TensorBoardWriter


def lines(path: Path) -> list[dict]:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def train(path: Path, start: int, stop: int, period: int = 2, loss: float = 1.0, final: bool = False) -> None:
    storage = EventStorage(start)
    writer = JsonWriter(path, start_iter=start)
    for storage.iter in range(start, stop):
        storage.put_scalars(total_loss=loss, loss_cls=loss / 2)
        if storage.iter % period == period - 1:
            writer.write(storage)
    if final:  # as a last evaluation: after the last iteration
        storage.iter = stop
        storage.put_scalar("bbox/AP", 50.0, smoothing=False)
        writer.write(storage)
    writer.close()


def test_lines_are_json_even_for_nan_and_infinity(tmp_path: Path) -> None:
    storage = EventStorage()
    storage.put_scalars(smoothing=False, a=math.nan, b=math.inf, c=-math.inf, d=torch.tensor(2.5))
    writer = JsonWriter(tmp_path / "metrics.json")
    writer.write(storage)
    writer.close()
    assert lines(tmp_path / "metrics.json") == [{"iteration": 0, "a": None, "b": None, "c": None, "d": 2.5}]


def test_losses_are_smoothed_by_the_median_of_20_iterations_and_states_are_not(tmp_path: Path) -> None:
    storage = EventStorage()
    for storage.iter in range(40):
        storage.put_scalar("loss", storage.iter)
        storage.put_scalar("lr", storage.iter, smoothing=False)
    assert storage.latest()["loss"] == (39.0, 39)
    smoothed = storage.latest_smoothed()
    assert smoothed["loss"] == (29.5, 39)
    assert smoothed["lr"] == (39.0, 39)


def test_a_scalar_put_rarely_is_smoothed_over_iterations_not_over_values() -> None:
    storage = EventStorage()
    for storage.iter in range(0, 100, 10):
        storage.put_scalar("loss", storage.iter)
    assert storage.median("loss", 20) == 85.0  # of those at 80 and 90
    assert storage.average("loss", 1) == 90.0


def test_histories_stay_bounded() -> None:
    storage = EventStorage()
    for storage.iter in range(3000):
        storage.put_scalar("loss", 1.0)
    assert len(storage.history("loss").values()) == 1000


def test_a_scalar_of_an_iteration_already_written_is_not_lost(tmp_path: Path) -> None:
    storage = EventStorage()
    writer = JsonWriter(tmp_path / "metrics.json")
    storage.iter = 9
    storage.put_scalar("total_loss", 1.0)
    writer.write(storage)
    storage.put_scalar("bbox/AP", 30.0, smoothing=False)
    writer.write(storage)
    writer.write(storage)
    assert lines(tmp_path / "metrics.json") == [
        {"iteration": 9, "total_loss": 1.0},
        {"iteration": 9, "bbox/AP": 30.0},
    ]


def test_a_resumed_run_continues_the_axis_and_sets_the_abandoned_part_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    train(path, 0, 10, loss=1.0)
    with path.open("a") as file:
        file.write('{"iteration": 11, "total_lo')  # the crash
    train(path, 6, 12, loss=2.0)
    assert [(line["iteration"], line["total_loss"]) for line in lines(path)] == [
        (1, 1.0), (3, 1.0), (5, 1.0), (7, 2.0), (9, 2.0), (11, 2.0),
    ]  # fmt: skip
    aside = lines(tmp_path / "metrics.superseded.json")
    assert [(line["iteration"], line["total_loss"]) for line in aside] == [(7, 1.0), (9, 1.0)]


def test_extending_a_finished_run_keeps_its_last_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    train(path, 0, 4, final=True)
    train(path, 4, 8)
    assert [line["iteration"] for line in lines(path)] == [1, 3, 4, 5, 7]
    assert lines(path)[2]["bbox/AP"] == 50.0


def test_a_new_run_in_the_same_place_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    train(path, 0, 4, final=True)
    train(path, 0, 2, loss=3.0)
    assert lines(path) == [{"iteration": 1, "total_loss": 3.0, "loss_cls": 1.5}]
    assert len(lines(tmp_path / "metrics.superseded.json")) == 3


def test_an_evaluation_alone_keeps_every_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    train(path, 0, 4)
    JsonWriter(path).close()
    assert len(lines(path)) == 2


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.metrics\.json: cannot be written: No such file"):
        JsonWriter(tmp_path / "absent" / "metrics.json")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line() -> None:
    writer = JsonWriter("/dev/full")
    storage = EventStorage()
    storage.put_scalar("loss", 1.0)
    with pytest.raises(UserError, match="No space left"):
        writer.write(storage)
    writer.close()


FILLS_THE_DISK = """
import resource, sys
from zenith_det import cli
from zenith_det.training.logs.events import EventStorage, TensorBoardWriter

def main():
    writer = TensorBoardWriter(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    storage = EventStorage()
    for storage.iter in range(1000):
        storage.put_scalar("total_loss", 1.0)
        try:
            writer.write(storage)
        except BaseException:
            writer.close()
            raise

cli.run(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files by setrlimit")
def test_tensorboard_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FILLS_THE_DISK, str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: {tmp_path}: TensorBoard events cannot be written: File too large\n"


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop, loss in ((0, 6, 1.0), (4, 8, 2.0)):
        writer = TensorBoardWriter(tmp_path, start_iter=start)
        storage = EventStorage(start)
        for storage.iter in range(start, stop):
            storage.put_scalar("total_loss", loss)
            writer.write(storage)
        writer.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("total_loss")
    # A resumed run takes the place of what an older attempt wrote from there on.
    assert [(e.step, e.value) for e in events] == [(i, 1.0) for i in range(4)] + [
        (i, 2.0) for i in range(4, 8)
    ]


def test_missing_tensorboard_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard.writer", raising=False)
    with pytest.raises(UserError, match="pip install tensorboard"):
        TensorBoardWriter(tmp_path)
