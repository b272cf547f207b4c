from __future__ import annotations

import collections
import enum
import io
import logging
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoints.checkpoint import Checkpointer, to_plain
from zenith_det.training.checkpoints.pickles import check_pickle
from zenith_det.training.checkpoints.reading import CorruptCheckpointError, load_checkpoint, read_facts


class RunsCode:
    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> object:
        return self.call


def state(iteration: int) -> dict:
    generator = torch.Generator().manual_seed(iteration)
    return {"model": {"w": torch.randn(1000, generator=generator)}, "iteration": iteration}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def one_line(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


# --- saving -----------------------------------------------------------------------------------------------


def test_what_is_saved_loads_and_is_named_as_the_last(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "new" / "folder")
    path = checkpointer.save("model_0000099", state(99))
    assert path.name == "model_0000099.pth"
    # Detectron2's format: the name alone, so that its own resume finds it.
    assert (path.parent / "last_checkpoint").read_text() == "model_0000099.pth"
    assert checkpointer.last() == path
    loaded = load_checkpoint(path)
    assert loaded["iteration"] == 99
    assert torch.equal(loaded["model"]["w"], state(99)["model"]["w"])
    assert names(path.parent) == {"model_0000099.pth", "last_checkpoint"}


def test_the_best_is_saved_without_becoming_the_last(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    last = checkpointer.save("model_0000099", state(99))
    checkpointer.save("model_best", state(49), mark_last=False)
    assert checkpointer.last() == last


def test_the_newest_are_kept_and_final_and_best_always(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    checkpointer.save("model_best", state(0), mark_last=False)
    checkpointer.save("model_final", state(0))
    for iteration in (9, 19, 29, 39):
        checkpointer.save(f"model_{iteration:07d}", state(iteration))
    assert names(tmp_path) == {
        "model_best.pth", "model_final.pth", "model_0000029.pth", "model_0000039.pth", "last_checkpoint",
    }  # fmt: skip


def test_the_last_good_one_is_kept_while_training_goes_badly(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=1)
    good = {19: True, 29: True, 39: False, 49: False}
    for iteration, went_well in good.items():
        facts = {"run_id": "a", "good": went_well}
        checkpointer.save(f"model_{iteration:07d}", state(iteration) | facts)
    assert names(tmp_path) == {"model_0000029.pth", "model_0000049.pth", "last_checkpoint"}
    found = checkpointer.newest_good("a")
    assert found is not None
    assert found.name == "model_0000029.pth"
    checkpointer.save("model_0000059", state(59) | {"run_id": "a", "good": True})
    assert names(tmp_path) == {"model_0000059.pth", "last_checkpoint"}


def test_a_run_started_anew_keeps_its_own_checkpoints_not_the_higher_numbers(tmp_path: Path) -> None:
    for iteration in (899, 999):
        path = Checkpointer(tmp_path).save(f"model_{iteration:07d}", state(iteration))
        os.utime(path, (iteration, iteration))
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save("model_0000009", state(9))
    assert names(tmp_path) == {"model_0000009.pth", "last_checkpoint"}


def test_left_overs_of_a_crash_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".model_0000009.pth.4242.tmp").write_bytes(b"half")
    Checkpointer(tmp_path).save("model_0000019", state(19))
    assert ".model_0000009.pth.4242.tmp" not in names(tmp_path)


def test_the_newest_stays_when_the_clock_was_set_back(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep=2)
    for iteration in (9, 19):
        path = checkpointer.save(f"model_{iteration:07d}", state(iteration))
        os.utime(path, (4e9 + iteration, 4e9 + iteration))  # the year 2096
    for iteration in (29, 39):
        checkpointer.save(f"model_{iteration:07d}", state(iteration))
    assert names(tmp_path) == {"model_0000029.pth", "model_0000039.pth", "last_checkpoint"}
    (tmp_path / "last_checkpoint").unlink()
    last = checkpointer.last()
    assert last is not None
    assert last.name == "model_0000039.pth"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_folders_under_the_names_of_checkpoints_are_passed_over(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    saved = checkpointer.save("model_0000009", state(9))
    (tmp_path / "last_checkpoint").unlink()
    os.mkfifo(tmp_path / "last_checkpoint")
    os.mkfifo(tmp_path / "model_0000019.pth")
    (tmp_path / "model_final.pth").mkdir()
    assert checkpointer.last() == saved
    with pytest.raises(
        CheckpointError, match=r"model_final.pth: cannot be written: Is a directory; see to it"
    ):
        checkpointer.save("model_final", state(29))


class Level(enum.IntEnum):
    HIGH = 3


def test_numpy_and_other_containers_become_plain(tmp_path: Path) -> None:
    Pair = collections.namedtuple("Pair", "a b")
    given = {
        "ap": np.float64(41.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "array": np.arange(3, dtype=">f4"),
        "queue": collections.deque([1.0, 2.0], maxlen=2),
        "pair": Pair(1, np.float32(0.5)),
        "results": collections.OrderedDict(bbox={"AP": np.float64(1.0)}),
        "default": collections.defaultdict(list, x=[1]),
        "level": Level.HIGH,
        "path": Path("a/b"),
        "python_random": random.getstate(),
        "numpy_random": np.random.get_state(),
        "torch_random": torch.get_rng_state(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        np.int64(5): "a key",
    }
    path = Checkpointer(tmp_path).save("model_0000000", given)
    loaded = torch.load(path, weights_only=True)
    assert loaded["ap"] == 41.5
    assert type(loaded["ap"]) is float
    assert loaded["count"] == 3
    assert loaded["flag"] is True
    assert loaded["array"].tolist() == [0.0, 1.0, 2.0]
    assert loaded["queue"] == [1.0, 2.0]
    assert loaded["pair"] == (1, 0.5)
    assert loaded["results"] == {"bbox": {"AP": 1.0}}
    assert loaded["default"] == {"x": [1]}
    assert loaded["level"] == 3
    assert loaded["path"] == os.path.join("a", "b")
    assert loaded[5] == "a key"
    assert not loaded["parameter"].requires_grad
    # Random states come back as the functions that restore them want them.
    random.setstate(loaded["python_random"])
    kind, keys, *rest = loaded["numpy_random"]
    np.random.set_state((kind, keys.numpy(), *rest))
    torch.set_rng_state(loaded["torch_random"])


def test_an_object_that_could_not_be_read_back_is_named_by_its_place(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match=r"state\['trainer'\]\['hooks'\]\[1\] is a builtins\.function"):
        checkpointer.save("model_0000000", {"trainer": {"hooks": [1, lambda: 0]}})
    assert names(tmp_path) == set()
    assert to_plain(torch.float16) is torch.float16


# --- a disk that is full ---------------------------------------------------------------------------------


FULL_DISK = """
import resource, sys
import torch
from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoints.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
checkpointer.save("model_0000009", {"w": torch.zeros(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpointer.save("model_0000019", {"w": [torch.zeros(20_000) for _ in range(20)]})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits on Windows")
def test_a_write_that_fails_half_way_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    message = done.stdout.strip()
    assert "model_0000019.pth: cannot be written: File too large; model_0000009.pth is whole" in message
    assert "\n" not in message
    # The half-written file does not hold the space that is short.
    assert names(tmp_path) == {"model_0000009.pth", "last_checkpoint"}
    last = Checkpointer(tmp_path).last()
    assert last is not None
    assert torch.equal(load_checkpoint(last)["w"], torch.zeros(10))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    (tmp_path / f".model_0000009.pth.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="No space left on device; free some space") as error:
        checkpointer.save("model_0000009", state(9))
    one_line(error)
    assert checkpointer.last() is None


# --- torn, damaged, foreign ------------------------------------------------------------------------------


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = Checkpointer(tmp_path).save("model_0000009", state(9)).read_bytes()
    torn = tmp_path / "torn.pth"
    for size in sorted({0, 1, 3, 4, 30, 64, 500, *range(0, len(whole), len(whole) // 40), len(whole) - 1}):
        torn.write_bytes(whole[:size])
        for check in (load_checkpoint, read_facts):
            with pytest.raises(CheckpointError, match=r"torn\.pth") as error:
                check(torn)
            one_line(error)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    whole = Checkpointer(tmp_path).save("model_0000009", state(9)).read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)  # the tensor's data
    flipped = bytearray(whole)
    flipped[entry.header_offset + 1000] ^= 1
    (tmp_path / "flipped.pth").write_bytes(flipped)
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        load_checkpoint(tmp_path / "flipped.pth")


def test_blocks_of_zeros_that_a_power_cut_leaves_are_noticed(tmp_path: Path) -> None:
    whole = Checkpointer(tmp_path).save("model_0000009", state(9)).read_bytes()
    for begin, end in ((0, len(whole)), (0, 512), (1024, 3000), (len(whole) - 512, len(whole))):
        (tmp_path / "zeros.pth").write_bytes(whole[:begin] + bytes(end - begin) + whole[end:])
        with pytest.raises(CorruptCheckpointError):
            load_checkpoint(tmp_path / "zeros.pth")


def saved(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "given.pth"
    torch.save(value, path)
    return path


@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_with_code_runs_nothing(tmp_path: Path, nested: bool) -> None:
    witness = tmp_path / "ran"
    bad: object = RunsCode(os.system, f"touch {witness}")
    path = saved(tmp_path, {"model": {"w": torch.zeros(1), "x": [bad]}} if nested else {"model": bad})
    with pytest.raises(CheckpointError, match=r"refused.*system.*weights_only=False") as error:
        load_checkpoint(path)
    one_line(error)
    assert not isinstance(error.value, CorruptCheckpointError)
    assert not witness.exists()


def test_an_old_format_checkpoint_with_code_runs_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    path = tmp_path / "old.pth"
    torch.save(
        {"x": RunsCode(eval, f"open({str(witness)!r}, 'w')")}, path, _use_new_zipfile_serialization=False
    )
    with pytest.raises(CheckpointError, match=r"refused.*eval"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(RunsCode(eval, f"open({str(witness)!r}, 'w')")))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not witness.exists()


def test_what_older_versions_of_torch_let_corrupt_memory_is_refused_under_each(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.zeros(4)})
    with zipfile.ZipFile(path) as archive:
        data = archive.read("given/data.pkl")
    assert list(check_pickle(io.BytesIO(data), {"0": 16})) == ["w"]
    with pytest.raises(pickle.UnpicklingError, match="'0' of 16 bytes, which the file doesn't hold"):
        check_pickle(io.BytesIO(data), {"0": 12})
    item_of_a_tensor = data.removesuffix(b"s.") + b"K\x00K\x01ss."
    with pytest.raises(TypeError, match="item assignment"):
        check_pickle(io.BytesIO(item_of_a_tensor), {"0": 16})


def test_an_old_format_checkpoint_loads(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old.pth")["w"].tolist() == [1.0, 1.0]


def test_what_is_no_checkpoint_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello, this is no checkpoint\nat all\n")
    (tmp_path / "folder.pth").mkdir()
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    saved(tmp_path, [1, 2])
    for name, reason in {
        "absent.pth": "No such file",
        "text.pth": "not a checkpoint",
        "folder.pth": "not a file",
        "zip.pth": "without 'data.pkl'",
        "given.pth": "holds a list",
    }.items():
        with pytest.raises(CheckpointError, match=reason) as error:
            load_checkpoint(tmp_path / name)
        assert name in one_line(error)


# --- going on from the last one --------------------------------------------------------------------------


def fill(tmp_path: Path) -> Checkpointer:
    checkpointer = Checkpointer(tmp_path)
    for iteration in (9, 19, 29):
        path = checkpointer.save(f"model_{iteration:07d}", state(iteration))
        os.utime(path, (1_000_000 + iteration, 1_000_000 + iteration))
    return checkpointer


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def test_an_empty_directory_has_no_last(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path).last() is None
    assert Checkpointer(tmp_path / "absent").last() is None


def test_a_torn_last_is_set_aside_and_the_one_before_it_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = fill(tmp_path)
    tear(tmp_path / "model_0000029.pth")
    with caplog.at_level(logging.WARNING, "zenith_det"):
        assert checkpointer.last() == tmp_path / "model_0000019.pth"
    assert "model_0000029.pth.corrupt" in names(tmp_path)
    assert "model_0000029.pth" not in names(tmp_path)
    assert "set aside as model_0000029.pth.corrupt" in caplog.text
    assert "going on from" in caplog.text


def test_two_torn_ones_and_a_named_one_that_is_gone(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path)
    tear(tmp_path / "model_0000019.pth")
    (tmp_path / "model_0000029.pth").unlink()
    assert checkpointer.last() == tmp_path / "model_0000009.pth"


def test_no_whole_checkpoint_stops_and_does_not_start_anew_in_silence(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path)
    for path in tmp_path.glob("*.pth"):
        tear(path)
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is whole") as error:
        checkpointer.last()
    one_line(error)


@pytest.mark.parametrize("content", ["", "\n", "model_0000009.pth\n", "../../etc/passwd", "\x00\xff junk"])
def test_a_damaged_last_checkpoint_file_is_no_obstacle(tmp_path: Path, content: str) -> None:
    checkpointer = fill(tmp_path)
    (tmp_path / "last_checkpoint").write_text(content, encoding="latin1")
    expected = "model_0000009.pth" if "0009" in content else "model_0000029.pth"
    assert checkpointer.last() == tmp_path / expected


def test_a_last_checkpoint_with_code_is_an_error_and_stays(tmp_path: Path) -> None:
    checkpointer = fill(tmp_path)
    torch.save({"x": RunsCode(os.system, "true")}, tmp_path / "model_0000029.pth")
    with pytest.raises(CheckpointError, match="refused"):
        checkpointer.last()
    assert "model_0000029.pth" in names(tmp_path)


KILLED = """
import sys, torch
from zenith_det.training.checkpoints.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=2)
print("ready", flush=True)
for i in range(100_000):
    checkpointer.save(f"model_{i:07d}", {"iteration": i, "w": torch.full((100_000,), float(i))})
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_last_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    while not (tmp_path / "last_checkpoint").exists():
        assert process.poll() is None
    for _ in range(200):
        names(tmp_path)  # let it be anywhere in its loop
    process.kill()
    process.wait()
    process.stdout.close()
    last = Checkpointer(tmp_path).last()
    assert last is not None
    loaded = load_checkpoint(last)
    assert (loaded["w"] == loaded["iteration"]).all()
    assert not list(tmp_path.glob("*.corrupt"))
