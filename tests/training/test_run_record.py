from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zenith_det.errors import UserError
from zenith_det.training.memory import resident_mib
from zenith_det.training.run_record import prepare_output_dir, start_line, unused_keys_line, write_config


class Config:
    def dump(self) -> str:
        return "A: 1\n"


def test_the_config_is_written_whole(tmp_path: Path) -> None:
    folder = prepare_output_dir(tmp_path / "a" / "b")
    assert write_config(folder, Config()).read_text() == "A: 1\n"
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


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
    line = start_line(
        num_images=5000,
        batch_size=16,
        max_iter=90000,
        base_lr=0.02,
        optimizer="ZENITH",
        device="cuda",
        window=100,
    )
    assert line == (
        "5000 images, batch 16, 90000 iterations = 288 epochs, ZENITH: eta0 = 0.02, window = 100, device cuda"
    )
    assert start_line(
        num_images=100, batch_size=8, max_iter=10, base_lr=0.1, optimizer="SGD", device="cpu", start_iter=5,
        num_processes=2, accumulation=2,
    ) == (
        "100 images, batch 8 (over 2 processes) (2 x 4), 10 iterations = 0.8 epochs, from iteration 5, "
        "SGD: eta0 = 0.1, device cpu"
    )  # fmt: skip


def test_keys_set_in_vain_are_named_with_their_place() -> None:
    unused = [("SOLVER.GAMMA", "command line"), ("SOLVER.STEPS", "configs/x.yaml")]
    assert unused_keys_line(unused, "ZENITH", "WarmupZenithLR") == (
        "not used under ZENITH with WarmupZenithLR: SOLVER.GAMMA (from command line), "
        "SOLVER.STEPS (from configs/x.yaml)"
    )
    assert unused_keys_line([], "ZENITH", "WarmupZenithLR") is None


def test_memory_grows_with_what_is_held() -> None:
    if resident_mib() is None:
        pytest.skip("this system does not tell a process's memory")
    # In a process of its own: this one may hold freed memory that an allocation takes first.
    code = (
        "import torch; from zenith_det.training.memory import memory_scalars, resident_mib;"
        "before = resident_mib(); held = torch.ones(64 * 2**20 // 4);"
        "print(resident_mib() - before, memory_scalars()['rss_mb'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, resident = map(float, done.stdout.split())
    assert grown > 32
    assert resident > grown
