"""Memory that runs out in a step or an evaluation: one line, and what was trained is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.reliability import runs
from zenith_det.training.failures.out_of_memory import OutOfMemoryError, telling_of_memory


def error_line(printed: str) -> str:
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_step_that_does_not_fit_is_told_in_one_line_and_the_run_can_go_on(
    engine: str, data: Path, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    whole = undisturbed(engine)
    code, printed = runs.run(runs.arguments(engine, data, tmp_path), {"poison": {"6": "memory"}})
    assert code == 2, printed
    line = error_line(printed)
    assert line.startswith("error: iteration 6, images ")
    assert line.count(" x ") == 2  # the sizes of two images
    assert "out of memory on cpu" in line
    assert "GiB is free now" in line
    for key in (
        "SOLVER.IMS_PER_BATCH",
        "SOLVER.GRADIENT_ACCUMULATION",
        "SOLVER.AMP.ENABLED",
        "INPUT.MIN_SIZE_TRAIN",
    ):
        assert key in line
    assert line.endswith(f"everything is saved in {tmp_path}: go on with --resume")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, resume=True))
    assert code == 0, printed
    runs.assert_same_result(whole, tmp_path)


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_of_two_processes_one_whose_forward_pass_does_not_fit_ends_both_saved(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    faults = {"rank": 1, "poison": {"6": "memory"}}
    code, printed = runs.run(runs.arguments(engine, data, tmp_path), faults, processes=2)
    assert code == 2, printed
    line = error_line(printed)
    assert line.startswith("error: iteration 6, image ")
    assert line.count(" x ") == 1
    assert line.endswith(f"the step was left out, and everything is saved in {tmp_path}: go on with --resume")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000006.pth"
    before, after = (
        torch.load(tmp_path / f"model_000000{number}.pth", weights_only=True) for number in (3, 6)
    )
    assert after["guard"] == {"streak": 1, "skipped": 1}
    assert all(tensor.isfinite().all() for tensor in after["model"].values())
    assert not runs.same(before["model"], after["model"])


@pytest.mark.parametrize("engine", runs.ENGINES)
@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_that_does_not_fit_is_told_in_one_line_and_saved(
    engine: str, processes: int, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    words = runs.arguments(engine, data, tmp_path, TEST__EVAL_PERIOD=3)
    faults = {"memory": 2, "rank": processes - 1}
    code, printed = runs.run(words, faults, processes=processes)
    assert code == 2, printed
    line = error_line(printed)
    assert line.startswith("error: in the evaluation after iteration 2: evaluation, image ")
    assert "INPUT.MIN_SIZE_TEST" in line
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"


def test_what_cuda_says_is_cut_to_what_a_user_can_use() -> None:
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 0 bytes is "
        "free. Of the allocated memory 5 GiB is allocated by PyTorch, and 1 GiB is reserved.\nSee documentation"
    )
    samples = [{"image_id": number, "image": torch.empty(3, 800, 1216 + number)} for number in range(6)]
    device = torch.device("cuda", 0)
    with (
        pytest.raises(OutOfMemoryError) as caught,
        telling_of_memory("iteration 7", samples, device, training=True),
    ):
        raise torch.OutOfMemoryError(said)
    told = str(caught.value)
    assert told.startswith(
        "iteration 7, images 0 (800 x 1216), 1 (800 x 1217), 2 (800 x 1218), 3 (800 x 1219) and 2 more: out of "
        "memory on cuda:0: "
    )
    assert (
        "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 0 bytes is free): lower"
        in told
    )
    for other in (RuntimeError, NotImplementedError):  # the second is a RuntimeError, too
        with pytest.raises(other, match="shapes"), telling_of_memory("", samples, device, training=False):
            raise other("shapes differ")
