from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from zenith_det.errors import ConfigError, UserError
from zenith_det.training import distributed

LIMIT = 60  # seconds; a hang would be the thirty minutes of a collective

SCRIPT = """
import os, signal, sys, time
import torch
import torch.distributed as dist
from zenith_det import cli
from zenith_det.errors import DatasetError
from zenith_det.training import distributed as d

def main(kind, folder):
    rank = d.get_rank()
    open(os.path.join(folder, f"pid{rank}"), "w").write(str(os.getpid()))
    if kind == "talk":
        assert d.get_world_size() == 2 and d.is_main_process() == (rank == 0) and d.get_local_rank() == rank
        assert d.all_gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
        assert d.broadcast_object(("from", rank)) == ("from", 0)
        assert d.average_scalars({"loss": float(rank), f"only{rank}": 3.0}) == {
            "loss": 0.5, "only0": 3.0, "only1": 3.0}
        total = torch.tensor(float(rank + 1)); dist.all_reduce(total); assert total.item() == 3.0
        d.barrier()
        open(os.path.join(folder, f"done{rank}"), "w").write(d.process_line())
    elif kind == "both-mistaken":
        raise DatasetError("train.json: no such file; give --train-json")
    elif rank == 1:
        if kind == "crash": raise ZeroDivisionError("the cause")
        if kind == "mistaken": raise DatasetError("images/7.jpg: cannot be read; remove it")
        if kind == "killed": os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit": sys.exit(5)
    if kind == "busy": time.sleep(600)
    if kind != "talk": d.barrier()

if __name__ == "__main__":
    kind, folder, processes = sys.argv[1:]
    cli.run(lambda: d.launch(main, int(processes), args=(kind, folder), device="cpu"))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    return path


def environment() -> dict[str, str]:
    root = str(Path(distributed.__file__).parents[2])
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def start(script: Path, kind: str, folder: Path, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), kind, str(folder), "2"]
    if torchrun:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT)


def gone(folder: Path) -> bool:
    """Whether no process of the run is left."""
    for file in folder.glob("pid*"):
        try:
            os.kill(int(file.read_text()), 0)
        except ProcessLookupError:
            continue
        return False
    return True


@pytest.mark.parametrize("torchrun", [False, True])
def test_two_processes_talk_and_end_well(script: Path, tmp_path: Path, torchrun: bool) -> None:
    done = start(script, "talk", tmp_path, torchrun)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done0").read_text().startswith("process 0 of 2 on ")
    assert (tmp_path / "done1").read_text().endswith("(gloo)")


def test_a_crash_of_one_rank_ends_all_with_its_traceback(script: Path, tmp_path: Path) -> None:
    done = start(script, "crash", tmp_path)
    assert done.returncode == 1
    assert "rank 1 failed" in done.stderr
    assert "ZeroDivisionError: the cause" in done.stderr
    # The reason alone, not what the others said when they lost it.
    assert done.stderr.count("Traceback") == 1
    assert gone(tmp_path)


@pytest.mark.parametrize("kind", ["mistaken", "both-mistaken"])
def test_a_users_mistake_is_told_once_with_exit_code_2(script: Path, tmp_path: Path, kind: str) -> None:
    done = start(script, kind, tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert gone(tmp_path)


def test_a_users_mistake_under_torchrun_is_told_once(script: Path, tmp_path: Path) -> None:
    done = start(script, "both-mistaken", tmp_path, torchrun=True)
    assert done.returncode != 0
    assert done.stderr.count("error: train.json") == 1
    assert "DatasetError" not in done.stderr


def test_a_killed_rank_ends_all(script: Path, tmp_path: Path) -> None:
    done = start(script, "killed", tmp_path)
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL (out of memory?)" in done.stderr
    assert gone(tmp_path)


def test_a_rank_that_exits_ends_all_with_its_code(script: Path, tmp_path: Path) -> None:
    assert start(script, "exit", tmp_path).returncode == 5
    assert gone(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes follow their parent on Linux only")
def test_no_process_outlives_a_launcher_that_is_killed(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "busy", str(tmp_path), "2"]
    launcher = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + LIMIT
    while not all((tmp_path / f"pid{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    while not gone(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_process_runs_here_and_returns_its_result() -> None:
    assert distributed.launch(lambda x: x + 1, 1, args=(2,), device="cpu") == 3
    assert distributed.get_rank() == 0
    assert distributed.get_world_size() == 1
    assert distributed.get_local_rank() == 0
    assert distributed.is_main_process()
    assert distributed.all_gather_objects("x") == ["x"]
    assert distributed.broadcast_object("x") == "x"
    assert distributed.average_scalars({"a": 2.0}) == {"a": 2.0}
    distributed.barrier()


def test_processes_that_do_not_join_are_told_of() -> None:
    with pytest.raises(UserError, match=r"rank 0: only 1 of 2 processes joined at tcp://127\.0\.0\.1:"):
        distributed.launch(
            print, 1, num_machines=2, dist_url=f"tcp://127.0.0.1:{free_port()}", device="cpu",
            join_timeout=datetime.timedelta(seconds=2),
        )  # fmt: skip


def test_a_machine_0_that_is_not_there_is_told_of() -> None:
    with pytest.raises(UserError, match="rank 1: no connection at tcp://127"):
        distributed.launch(
            print, 1, num_machines=2, machine_rank=1, dist_url=f"tcp://127.0.0.1:{free_port()}", device="cpu",
            join_timeout=datetime.timedelta(seconds=2),
        )  # fmt: skip


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("url", ["auto", "tcp://host", "tcp://host:port", "http://host:1", "nonsense"])
def test_an_address_that_cannot_be_used_is_told(url: str) -> None:
    with pytest.raises(ConfigError, match="give tcp://HOST:PORT of machine 0"):
        distributed.launch(print, 2, num_machines=2, dist_url=url, device="cpu")


@pytest.mark.parametrize("numbers", [(0, 1, 0), (1, 0, 0), (1, 2, 2), (1, 1, -1)])
def test_numbers_that_make_no_sense_are_told(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="processes on machine"):
        distributed.launch(print, *numbers, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_where_there_is_none_is_told() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        distributed.launch(print, 2, device="cuda")
