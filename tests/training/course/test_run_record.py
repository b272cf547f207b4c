from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from zenith_det.config import load_config, settle_files
from zenith_det.errors import UserError
from zenith_det.optim import ZENITH
from zenith_det.solver import build_lr_scheduler
from zenith_det.training.course.run_record import (
    evaluated,
    log_start,
    prepare_output_dir,
    remove_left_overs,
    short_run_lines,
    start_line,
    write_config,
)


class Config:
    def dump(self) -> str:
        return "A: 1\n"


def test_the_config_is_written_whole(tmp_path: Path) -> None:
    folder = prepare_output_dir(tmp_path / "a" / "b")
    assert yaml.safe_load(write_config(folder, Config()).read_text()) == {"A": 1}
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_an_output_directory_without_a_name_is_not_the_current_folder() -> None:
    loaded = load_config(None, ["OUTPUT_DIR", ""])
    settle_files(loaded)
    with pytest.raises(UserError, match="OUTPUT_DIR is empty"):
        prepare_output_dir(loaded.cfg.OUTPUT_DIR)


def test_what_a_killed_run_was_writing_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    kept = {".notes.tmp", "mine.4242.tmp", "config.yaml", "inference/evaluated.json", "other/.mine.4242.tmp"}
    cleared = {
        ".config.yaml.4242.tmp",
        "inference/.evaluated.json.42.tmp",
        "averaged/inference/.a.json.42.tmp",
    }
    for name in kept | cleared:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_left_overs(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_an_output_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"OUTPUT_DIR .*file.run: cannot be written: .*; choose another"):
        prepare_output_dir(tmp_path / "file" / "run")


def test_an_output_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    # /proc is not writable for anyone, root included.
    place = Path("/proc/self/fd") if Path("/proc/self/fd").is_dir() else tmp_path
    if place == tmp_path:
        if not hasattr(os, "geteuid") or os.geteuid() == 0:
            pytest.skip("no directory here that this user cannot write")
        tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written") as error:
        prepare_output_dir(place)
    assert "\n" not in str(error.value)


def test_the_start_line() -> None:
    words = ["SOLVER.IMS_PER_BATCH", 16, "SOLVER.MAX_ITER", 90000, "MODEL.DEVICE", "cuda"]
    words += ["SOLVER.BASE_LR", 0.02, "SOLVER.OPTIMIZER", "ZENITH"]
    assert start_line(load_config(None, words).cfg, num_images=5000) == (
        "5000 images, batch 16, 90000 iterations = 288 epochs, ZENITH: eta0 = 0.02, window = 100, device cuda"
    )
    words = ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 10, "MODEL.DEVICE", "cpu", "SOLVER.BASE_LR", 0.1]
    words += ["SOLVER.OPTIMIZER", "SGD", "SOLVER.GRADIENT_ACCUMULATION", 2]
    assert start_line(load_config(None, words).cfg, num_images=100, start_iter=5, num_processes=2) == (
        "100 images, batch 8 (over 2 processes) (2 x 4), 10 iterations = 0.8 epochs, from iteration 5, "
        "SGD: eta0 = 0.1, device cpu"
    )


def test_keys_set_in_vain_are_named_with_their_place(caplog: pytest.LogCaptureFixture) -> None:
    words = ["SOLVER.OPTIMIZER", "ZENITH", "SOLVER.LR_SCHEDULER_NAME", "WarmupZenithLR", "SOLVER.GAMMA", 0.5]
    loaded = load_config(None, words)
    log_start(loaded.cfg, loaded.sources, num_images=24, start_iter=0, num_processes=1)
    (told,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("not used under")]
    assert told == "not used under ZENITH with WarmupZenithLR: SOLVER.GAMMA (from command line)"


def short(length: int, **keys: Any) -> list[str]:
    """``short_run_lines`` of a run under ZENITH that ends after ``length`` iterations."""
    opts = {"OPTIMIZER": "ZENITH", "LR_SCHEDULER_NAME": "WarmupZenithLR", "MAX_ITER": length, **keys}
    words = [word for key, value in opts.items() for word in (f"SOLVER.{key.replace('__', '.')}", value)]
    return short_run_lines(load_config(None, words).cfg)


def test_a_run_within_its_warm_up_and_window_is_told_which_keys_to_set() -> None:
    assert short(17) == [
        "the run's 17 iterations don't leave the warm-up of SOLVER.WARMUP_ITERS 1000, and the LR ends at 0.017 of "
        "SOLVER.BASE_LR: set SOLVER.WARMUP_ITERS to about 1, or train longer",
        "ZENITH's ratio is 1 in all of the run's 17 iterations, as it may fall only once SOLVER.ZENITH.WINDOW 100 "
        "norms are recorded: set SOLVER.ZENITH.WINDOW to about 4, or train longer",
    ]
    assert short(17, WARMUP_ITERS=1, ZENITH__WINDOW=4) == []
    assert len(short(1000)) == 1
    assert short(1001) == []
    # Other schedules lower the LR while it rises; other optimizers have no ratio.
    (line,) = short(17, OPTIMIZER="SGD", LR_SCHEDULER_NAME="WarmupCosineLR")
    assert "and the LR never gets to SOLVER.BASE_LR" in line
    (line,) = short(17, WARMUP_ITERS=0, ZENITH__RECORD_AFTER=10, ZENITH__WINDOW=7)
    assert (
        "7 norms are recorded after SOLVER.ZENITH.RECORD_AFTER 10: set SOLVER.ZENITH.RECORD_AFTER lower"
        in line
    )


@pytest.mark.parametrize("method", ["linear", "constant"])
def test_the_lr_that_the_line_names_is_the_last_one(method: str) -> None:
    words = [
        "SOLVER.LR_SCHEDULER_NAME",
        "WarmupZenithLR",
        "SOLVER.MAX_ITER",
        400,
        "SOLVER.WARMUP_METHOD",
        method,
    ]
    cfg = load_config(None, words).cfg
    optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for _ in range(399):
        optimizer.step()
        scheduler.step()
    assert f"ends at {optimizer.param_groups[0]['lr']:.3g} of" in short_run_lines(cfg)[0]


@pytest.mark.parametrize("record_after", [0, 3])
def test_the_ratio_may_fall_in_the_first_run_that_is_not_told(record_after: int) -> None:
    """Norms that fall all the time: the longest run that is told ends with a ratio of 1, the next longer one not."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = ZENITH([parameter], lr=0.1, window=5, record_after=record_after)
    ratios = []
    for i in range(12):
        parameter.grad = torch.tensor(1.0 / (i + 1))
        optimizer.step()
        ratios.append(float(optimizer.effective_lrs()[0]) / 0.1)
    for length in range(1, 13):
        told = short(length, WARMUP_ITERS=0, ZENITH__WINDOW=5, ZENITH__RECORD_AFTER=record_after)
        assert bool(told) == (min(ratios[:length]) == pytest.approx(1.0, abs=1e-6))


def test_the_start_of_a_short_run_warns(caplog: pytest.LogCaptureFixture) -> None:
    cfg = load_config(None, ["SOLVER.MAX_ITER", 17]).cfg
    log_start(cfg, {}, num_images=24, start_iter=0, num_processes=1)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == short_run_lines(cfg) != []


@pytest.mark.parametrize(("start", "at_its_end"), [(16, False), (17, True), (20, True)])
def test_a_run_resumed_at_its_end_says_how_to_go_on(
    start: int, at_its_end: bool, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["SOLVER.MAX_ITER", 17, "SOLVER.WARMUP_ITERS", 1, "SOLVER.ZENITH.WINDOW", 4]
    log_start(load_config(None, words).cfg, {}, num_images=24, start_iter=start, num_processes=1)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == at_its_end
    for line in warned:
        assert line.startswith("the run has reached its end, SOLVER.MAX_ITER 17: nothing is left to train")
        assert "--resume with more --epochs, or a higher SOLVER.MAX_ITER" in line


def test_memory_grows_with_what_is_held() -> None:
    # In a process of its own: this one may hold freed memory that an allocation takes first.
    code = (
        "import torch; from zenith_det.training.logs.memory import resident_mib;"
        "before = resident_mib(); held = torch.ones(64 * 2**20 // 4);"
        "print(resident_mib() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 32


@pytest.mark.parametrize(
    "metric", ["bbox/AP", "a_set/sem_seg/mIoU", "averaged/panoptic_seg/PQ", "validation_loss/total_loss"]
)
def test_an_evaluation_of_whatever_metric_is_not_repeated(tmp_path: Path, metric: str) -> None:
    lines = [{"iteration": 9, "total_loss": 1.0, "lr": 0.1}, {"iteration": 9, metric: 30.0}]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluated(tmp_path, 10)
    assert not evaluated(tmp_path, 11)
    (tmp_path / "metrics.json").write_text(json.dumps({**lines[0], "roi_head/num_fg_samples": 3.0}) + "\n")
    assert not evaluated(tmp_path, 10)


def test_one_with_test_time_augmentation_is_another(tmp_path: Path) -> None:
    """A run that was killed in between has the plain one only, and is to make the other when it is resumed."""
    lines = [{"iteration": 9, "total_loss": 1.0}, {"iteration": 9, "shapes/bbox/AP": 30.0}]
    for tta in (False, True):
        (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert evaluated(tmp_path, 10)
        assert evaluated(tmp_path, 10, tta=True) == tta
        lines.append({"iteration": 9, "averaged/shapes/bbox_TTA/AP": 31.0})
