from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from zenith_det import cli
from zenith_det.errors import ConfigError, DatasetError, UserError
from zenith_det.files import write_whole
from zenith_det.training.processes import distributed
from zenith_det.training.processes.launching import launch

LIMIT = 180  # seconds, for a loaded machine; a hang would be the thirty minutes of a collective

PACKAGE = Path(distributed.__file__).parents[2]


def talk(folder: Path) -> None:
    rank = distributed.get_rank()
    assert distributed.get_world_size() == 2
    assert distributed.get_local_rank() == rank
    assert distributed.is_main_process() == (rank == 0)
    assert distributed.all_gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert distributed.broadcast_object(("from", rank)) == ("from", 0)
    total = torch.tensor(float(rank + 1))
    torch.distributed.all_reduce(total)
    assert total.item() == 3.0
    distributed.barrier()
    with distributed.first_on_each_machine(True, rank):
        found = (folder / "left behind").exists()
        time.sleep(0.2 * (1 - rank))
        (folder / "left behind").touch()
    assert found == (rank == 1)
    (folder / f"said{rank}").write_text(distributed.process_line())
    (folder / f"starts{rank}").write_text(multiprocessing.get_start_method())


def talk_among_themselves(folder: Path) -> None:
    talk(folder)
    for process in (psutil.Process(), psutil.Process().parent()):  # the parent keeps the store
        sockets = getattr(process, "net_connections", process.connections)("tcp")
        listening = [one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN]
        assert listening
        assert set(listening) <= {"127.0.0.1", "::1"}
    distributed.barrier()


def fail(folder: Path, kind: str) -> None:
    """What rank 1 does wrong, while rank 0 waits for it."""
    rank = distributed.get_rank()
    write_whole(folder / f"pid{rank}", str(os.getpid()))
    if kind == "talk, then both mistaken":
        talk(folder)
        raise DatasetError("train.json: no such file; give --train-json")
    if rank == 1:
        if kind == "crash":
            raise ZeroDivisionError("the cause")
        if kind == "mistaken":
            raise DatasetError("images/7.jpg: cannot be read; remove it")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exit":
            sys.exit(5)
    if kind == "busy":
        time.sleep(600)
    distributed.barrier()


def command(kind: str, folder: Path, *before: str) -> list[str]:
    return [sys.executable, *before, __file__, str(folder), kind]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)


def failure(kind: str, folder: Path) -> BaseException:
    with pytest.raises((SystemExit, UserError)) as error:
        launch(fail, 2, args=(folder, kind), device="cpu")
    assert gone(folder)
    return error.value


def gone(folder: Path) -> bool:
    """Whether no process of the run is left."""
    for file in folder.glob("pid*"):
        try:
            os.kill(int(file.read_text()), 0)
        except ProcessLookupError:
            continue
        return False
    return True


def test_two_processes_talk_and_end_well(tmp_path: Path) -> None:
    launch(talk_among_themselves, 2, args=(tmp_path,), device="cpu")
    assert (tmp_path / "said0").read_text().startswith("process 0 of 2 on ")
    assert (tmp_path / "said1").read_text().endswith("(gloo)")
    # A loader's workers, if spawned as the ranks are, would import everything at each start.
    assert (tmp_path / "starts0").read_text() == multiprocessing.get_start_method()
    assert (tmp_path / "starts1").read_text() == multiprocessing.get_start_method()


def test_torchrun_processes_talk_and_a_mistake_of_all_is_told_once(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        command("talk, then both mistaken", tmp_path, *torchrun),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (tmp_path / "said0").exists(), done.stderr
    assert (tmp_path / "said1").exists(), done.stderr
    assert done.returncode != 0
    assert done.stderr.count("error: train.json") == 1
    assert "DatasetError" not in done.stderr


def test_a_crash_of_one_rank_ends_all_with_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failure("crash", tmp_path)
    assert isinstance(error, SystemExit)
    assert error.code == 1
    told = capsys.readouterr().err
    assert "rank 1 failed" in told
    assert "ZeroDivisionError: the cause" in told
    # The reason alone, not what the other said when it lost it.
    assert told.count("Traceback") == 1


def test_a_users_mistake_on_one_rank_is_raised_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = failure("mistaken", tmp_path)
    assert type(error) is DatasetError
    assert str(error) == "images/7.jpg: cannot be read; remove it"
    assert "Traceback" not in capfd.readouterr().err


def test_a_killed_rank_ends_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = failure("killed", tmp_path)
    assert isinstance(error, SystemExit)
    assert error.code == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL (out of memory?)" in capsys.readouterr().err


def test_a_rank_that_exits_ends_all_with_its_code(tmp_path: Path) -> None:
    error = failure("exit", tmp_path)
    assert isinstance(error, SystemExit)
    assert error.code == 5


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="processes follow their parent on Linux only"
)
def test_no_process_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    # What a shell without job control starts with "&" ignores SIGINT, and so does all that it starts.
    shell = ["sh", "-c", '"$@" & echo $!; wait', "sh"]
    launcher = subprocess.Popen(
        [*shell, *command("busy", tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    deadline = time.monotonic() + LIMIT
    while not all((tmp_path / f"pid{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    launcher.wait()
    launcher.stdout.close()
    while not gone(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_process_runs_here_and_returns_its_result() -> None:
    assert launch(lambda x: x + 1, 1, args=(2,), device="cpu") == 3
    assert distributed.get_rank() == 0
    assert distributed.get_world_size() == 1
    assert distributed.get_local_rank() == 0
    assert distributed.is_main_process()
    assert distributed.all_gather_objects("x") == ["x"]
    assert distributed.broadcast_object("x") == "x"
    distributed.barrier()


def test_processes_that_do_not_join_are_told_of() -> None:
    with pytest.raises(UserError, match=r"rank 0: only 1 of 2 processes joined at tcp://127\.0\.0\.1:"):
        launch(
            print, 1, num_machines=2, dist_url=f"tcp://127.0.0.1:{free_port()}", device="cpu",
            join_timeout=datetime.timedelta(seconds=2),
        )  # fmt: skip


def test_a_machine_0_that_is_not_there_is_told_of() -> None:
    with pytest.raises(UserError, match="rank 1: no connection at tcp://127"):
        launch(
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
        launch(print, 2, num_machines=2, dist_url=url, device="cpu")


@pytest.mark.parametrize("numbers", [(0, 1, 0), (1, 0, 0), (1, 2, 2), (1, 1, -1)])
def test_numbers_that_make_no_sense_are_told(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="processes on machine"):
        launch(print, *numbers, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_where_there_is_none_is_told() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        launch(print, 2, device="cuda")


if __name__ == "__main__":
    cli.run(lambda: launch(fail, 2, args=(Path(sys.argv[1]), sys.argv[2]), device="cpu"))
