"""The runner on real processes that end in every way there is; the script stands in for tools/train_net.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from zenith_det.comparing.arms import Arm
from zenith_det.comparing.plan import Run
from zenith_det.comparing.results import collect
from zenith_det.comparing.runner import Result, Runner, duration, failure_reason, parse_device, read_result
from zenith_det.comparing.summary import describe_final, save, text_table
from zenith_det.errors import RunStopped, UserError

SCRIPT = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
keys = dict(zip(words[words.index("--resume") + 1 :: 2], words[words.index("--resume") + 2 :: 2]))
folder = pathlib.Path(keys["OUTPUT_DIR"])
with (folder / "starts").open("a") as file:
    file.write(json.dumps({"threads": os.environ["OMP_NUM_THREADS"],
                           "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "keys": keys}) + "\\n")
what = keys["WHAT"]
if what == "error":
    print("error: SOLVER.X is 3: give 4", file=sys.stderr); sys.exit(2)
if what == "diverge":
    print("error: training diverged at iteration 7 (LR 3): not finite", file=sys.stderr); sys.exit(3)
if what == "crash":
    raise RuntimeError("a bug")
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    def stop(*_): print("stopped: saved"); sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").touch()
    if not (folder / "again").exists():
        (folder / "again").touch()
        time.sleep(60)
(folder / "metrics.json").write_text(
    json.dumps({"iteration": 9, "total_loss": 1.0, "time": 0.5}) + "\\n"
    + json.dumps({"iteration": 9, "bbox/AP": 40.0, "averaged/bbox/AP": 44.0}) + "\\n")
"""


@pytest.fixture
def train_net(tmp_path: Path) -> Path:
    path = tmp_path / "train_net.py"
    path.write_text(SCRIPT)
    return path


def a_run(tmp_path: Path, what: str, seed: int = 0, fingerprint: str = "f") -> Run:
    arm = Arm(what, what)
    return Run(
        arm, 0.1, seed, tmp_path / "runs" / what / f"seed{seed}", {"WHAT": what}, fingerprint, 10, "SGD"
    )


def carry_out(train_net: Path, runs: list[Run], **options: Any) -> list[str]:
    said: list[str] = []
    Runner(
        [sys.executable, str(train_net)], "c.yaml", [], describe=describe_final, say=said.append, **options
    ).carry_out(runs)
    return said


def starts(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "starts").read_text().splitlines()]


def test_every_ending_is_a_row(tmp_path: Path, train_net: Path) -> None:
    runs = [a_run(tmp_path, what) for what in ("fine", "error", "diverge", "crash", "killed")]
    said = carry_out(train_net, runs, jobs=2, threads=3)
    results = {run.arm.name: read_result(run.folder) for run in runs}
    assert {name: result.status for name, result in results.items() if result} == {
        "fine": "ok", "error": "failed", "diverge": "diverged", "crash": "failed", "killed": "failed",
    }  # fmt: skip
    assert results["error"].reason == "SOLVER.X is 3: give 4"
    assert results["crash"].reason == "RuntimeError: a bug"
    assert "SIGKILL" in results["killed"].reason
    assert results["fine"].final == {"bbox/AP": 40.0, "averaged/bbox/AP": 44.0}
    assert starts(runs[0])[0]["threads"] == "3"
    assert len(said) == 5
    assert any("fine lr 0.1 seed 0: box AP 40.0 (averaged weights 44.0)" in line for line in said)
    assert "[5/5]" in said[-1]

    # Once more: nothing is started, failures included; unless asked for.
    carry_out(train_net, runs)
    assert [len(starts(run)) for run in runs] == [1] * 5
    carry_out(train_net, runs, retry_failed=True)
    assert [len(starts(run)) for run in runs] == [1, 2, 2, 2, 2]

    comparison = collect(runs, [run.arm for run in runs], runs[0].arm)
    assert "diverged: training diverged at iteration 7" in text_table(comparison)
    files = save(comparison, tmp_path, {})
    rows = files[0].read_text().splitlines()
    assert len(rows) == 6
    assert json.loads(files[1].read_text())["runs"][1]["reason"] == "SOLVER.X is 3: give 4"


def test_a_long_error_keeps_its_end_which_says_what_to_do(tmp_path: Path) -> None:
    shapes = "; ".join(f"layer{i}.weight [7, 256] in the file, [2, 256] in the model" for i in range(8))
    log = tmp_path / "train.log"
    log.write_text(f"Start\nerror: w.pth: 9 tensors have another shape: {shapes}. Set MODEL.X True\n")
    assert failure_reason(log, 2).endswith("Set MODEL.X True")


def test_a_signal_stops_all_and_the_next_call_goes_on(tmp_path: Path, train_net: Path) -> None:
    runs = [a_run(tmp_path, "wait", seed) for seed in (0, 1)]

    def press() -> None:
        deadline = time.monotonic() + 60
        while not all((run.folder / "ready").exists() for run in runs) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(RunStopped, match="0 of 2 runs are done"):
        carry_out(train_net, runs, jobs=2)
    thread.join()
    before = [read_result(run.folder) for run in runs]
    assert [result.status for result in before if result] == ["unfinished"] * 2
    assert [result.exit_code for result in before if result] == [75] * 2

    carry_out(train_net, runs, jobs=2)
    after = [read_result(run.folder) for run in runs]
    assert [(result.status, result.attempts) for result in after if result] == [("ok", 2)] * 2
    assert all(a.seconds > b.seconds > 0 for a, b in zip(after, before) if a and b)


def test_another_config_is_another_run(tmp_path: Path, train_net: Path) -> None:
    carry_out(train_net, [a_run(tmp_path, "fine")])
    changed = a_run(tmp_path, "fine", fingerprint="another")
    said = carry_out(train_net, [changed])
    assert "its config has changed" in said[0]
    assert (tmp_path / "runs" / "fine" / "seed0.old1" / "metrics.json").exists()
    assert len(starts(changed)) == 1


def test_a_run_that_another_process_is_at_is_left_alone(tmp_path: Path, train_net: Path) -> None:
    run = a_run(tmp_path, "fine")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(run.folder)])
    try:
        Result("unfinished", run.fingerprint, [], pid=other.pid).save(run.folder)
        with pytest.raises(UserError, match=f"process {other.pid} is still at work there"):
            carry_out(train_net, [run])
    finally:
        other.kill()
        other.wait()
    carry_out(train_net, [run])  # it has gone: the run goes on
    assert len(starts(run)) == 1


def test_places_take_the_devices_in_turn(
    tmp_path: Path, train_net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    runs = [a_run(tmp_path, "fine", seed) for seed in (0, 1)]
    carry_out(train_net, runs, jobs=2, devices=["cuda:0", "cuda:1"])
    assert sorted(starts(run)[0]["gpus"] for run in runs) == ["4", "7"]
    assert {starts(run)[0]["keys"]["MODEL.DEVICE"] for run in runs} == {"cuda"}


def test_devices_and_durations() -> None:
    assert [parse_device(text, 2) for text in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    with pytest.raises(UserError, match="gpu0"):
        parse_device("gpu0", 2)
    with pytest.raises(UserError, match="cuda:7: of the GPUs, PyTorch sees 2, from cuda:0 on"):
        parse_device("cuda:7", 2)
    with pytest.raises(UserError, match="cuda: of the GPUs, PyTorch sees none: give cpu"):
        parse_device("cuda", 0)
    assert [duration(s) for s in (42.4, 204, 18720)] == ["42 s", "3.4 min", "5h12m"]
