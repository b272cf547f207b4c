"""Files from strangers, each read by the public reader in a process of its own with limits on memory and time."""

from __future__ import annotations

import collections
import json
import ntpath
import os
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.builders import content, write
from tests.tools.called import called
from zenith_det.commands import check_dataset
from zenith_det.data import DatasetMetadata, examine_coco_dataset, image_files
from zenith_det.data.problems import Fault
from zenith_det.data.segmentations import check_polygons
from zenith_det.errors import DatasetError, UserError, one_line
from zenith_det.training.checkpoints.checkpoint import Checkpointer
from zenith_det.training.checkpoints.reading import load_checkpoint

from .hostile_files import HOSTILE, Hostile
from .readers import assert_printable
from .sandbox import Outcome, Sandbox

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits on a process's memory are tested on Linux"
)
SECONDS = 60  # on a busy machine; each takes a few at most


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox()
    yield box
    box.close()


def expect(outcome: Outcome, kind: str, says: str) -> None:
    assert outcome.kind == kind, outcome
    assert re.search(says, outcome.message), outcome.message
    assert_printable(outcome.message)
    assert outcome.output == ""  # the one line is the error's: no warning, nothing of a library's


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: f"{hostile.target}-{hostile.name}")
def test_a_hostile_file_is_refused_in_one_line_or_read_without_the_bad_record(
    hostile: Hostile, sandbox: Sandbox, tmp_path: Path
) -> None:
    arguments = hostile.build(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    outcome = sandbox.read(hostile.target, *arguments, memory_mib=hostile.memory_mib, seconds=SECONDS)
    expect(outcome, hostile.kind, hostile.says)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was run that leaves a file


# --- the bounds -------------------------------------------------------------------------------------------

# What docs/RELIABILITY.md states: this many times the file's size, and a constant.
ANNOTATION_FACTOR, CHECKPOINT_FACTOR = 48, 4
DENSE_JSON = {
    "empty objects": '"info": [' + ",".join(["{}"] * 700_000) + "]",
    "objects of one key": '"info": [' + ",".join(['{"":0}'] * 300_000) + "]",
    "wide text": '"info": "' + "\U0001f600" + "x" * 2_000_000 + '"',
    "lists": '"info": [' + ",".join(["[]"] * 700_000) + "]",
    "run lengths": '"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], '
    '"segmentation": {"size": [30, 40], "counts": "' + "0" * 2_000_000 + '"}}]',
    "small objects": '"annotations": ['
    + ",".join(['{"image_id":1,"category_id":1,"bbox":[1,1,1,1]}'] * 40_000)
    + "]",
    "broken objects": '"annotations": [' + ",".join(['{"image_id":1}'] * 140_000) + "]",
    "images": '"images": [' + ",".join(f'{{"id":{i},"file_name":"{i}"}}' for i in range(60_000)) + "]",
    # Not opened: the file's word is taken for the size.
    "images unseen": '"images": ['
    + ",".join(f'{{"id":{i},"file_name":"{i}","height":9,"width":9}}' for i in range(40_000))
    + "]",
}


@pytest.mark.parametrize("kind", DENSE_JSON)
def test_reading_annotations_takes_memory_in_proportion(kind: str, sandbox: Sandbox, tmp_path: Path) -> None:
    data = {key: value for key, value in content(1).items() if f'"{key}"' not in DENSE_JSON[kind][:20]}
    source = write(tmp_path, json.dumps(data)[:-1] + ", " + DENSE_JSON[kind] + "}")
    bound = ANNOTATION_FACTOR * os.path.getsize(source[0]) / 2**20
    check = ("none",) if kind == "images unseen" else ()
    outcome = sandbox.read("annotations", *source, *check, memory_mib=4096, seconds=SECONDS)
    assert outcome.kind in ("read", "refused"), outcome
    assert outcome.peak_mib < bound + 16, f"{outcome.peak_mib / os.path.getsize(source[0]) * 2**20:.0f} x"


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_reading_a_checkpoint_takes_memory_in_proportion(
    suffix: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    weights = {f"w{i}": torch.zeros(1_000_000) for i in range(16)}
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save({"model": weights}, path)
    else:
        path.write_bytes(pickle.dumps({"model": {k: v.numpy() for k, v in weights.items()}}, 2))
    outcome = sandbox.read("checkpoint", str(path), memory_mib=4096, seconds=SECONDS)
    assert outcome.kind == "read", outcome
    assert outcome.peak_mib < CHECKPOINT_FACTOR * os.path.getsize(path) / 2**20


def test_memory_that_runs_out_is_told(sandbox: Sandbox, tmp_path: Path) -> None:
    source = write(tmp_path, '{"a": [' + "{}," * 3_000_000 + "1]}")
    expect(sandbox.read("annotations", *source, memory_mib=64, seconds=SECONDS), "refused", "fit into memory")
    torch.save({"w": torch.zeros(60_000_000)}, tmp_path / "x.pth")
    outcome = sandbox.read("checkpoint", str(tmp_path / "x.pth"), memory_mib=64, seconds=SECONDS)
    assert outcome.kind == "refused", outcome


# --- what must still be read -------------------------------------------------------------------------------


def test_what_real_checkpoints_hold_is_read(tmp_path: Path) -> None:
    """Nothing that a training writes is refused."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    shared = torch.arange(6.0)
    state = {
        "model": model.state_dict(),  # an OrderedDict with _metadata
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),  # a Counter
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "rng": torch.get_rng_state(),
        "views": [shared, shared[2:4], shared.reshape(2, 3).t(), shared[:0], shared[0], shared[1:2].expand(3)],
        "dtypes": [torch.ones(2, dtype=getattr(torch, name)) for name in (
            "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
            "complex128", "uint16", "uint32", "float8_e4m3fn",
        )],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [None, True, 1, -1, 2**40, 2**70, 1.5, "text", b"bytes", bytearray(b"x"), 1j, (1, (2,)), {3}, set()],
        "torch": [torch.float32, torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 3])],
        "keys": {1: 1, (0, "a"): 2, 2**70: 3, None: 4, 1.5: 5, b"k": 6},
        "ordered": collections.OrderedDict(a=collections.OrderedDict(b=1)),
    }  # fmt: skip
    for modern in (True, False):
        path = tmp_path / f"{modern}.pth"
        # The old format has no kind of storage for these.
        kept = state if modern else {**state, "dtypes": state["dtypes"][:-3]}
        torch.save(kept, path, _use_new_zipfile_serialization=modern)
        loaded, expected = load_checkpoint(path), torch.load(path, weights_only=True)
        assert repr(loaded) == repr(expected)
        assert type(loaded["model"]) is collections.OrderedDict
        assert loaded["model"]._metadata == state["model"]._metadata


def test_a_long_history_in_a_checkpoint_is_read(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path).save("model_final", {"losses": [0.1 * i for i in range(500_000)]})
    assert len(load_checkpoint(path)["losses"]) == 500_000


def test_a_fine_outline_is_kept() -> None:
    """A comb of 150 teeth: hardly an object is finer."""
    comb = [v for x in range(0, 600, 4) for v in ((x, 0, x, 479) if x % 8 else (x, 479, x, 0))]
    assert check_polygons([comb], 480, 640) == ([comb], [])
    usable, faults = check_polygons([comb * 10], 480, 640)
    assert not usable
    assert "polygon 1 of 1 is longer than" in faults[0]


# --- Windows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a.png", True), ("sub/a.png", True), ("sub\\a.png", True), ("C:\\data\\images\\a.png", True),
        ("C:\\Windows\\win.ini", False), ("D:a.png", False), ("C:..\\a.png", False), ("\\Windows\\win.ini", False),
        ("/Windows/win.ini", False), ("\\\\server\\share\\a.png", False), ("..\\a.png", False),
        ("sub\\..\\..\\a.png", False), ("\\\\?\\C:\\a.png", False),
    ],
)  # fmt: skip
def test_drive_letters_and_backslashes_on_windows(
    name: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Windows:
        path, sep = ntpath, "\\"

    monkeypatch.setattr(image_files, "os", Windows)
    root = "C:\\data\\images"
    if inside:
        assert ntpath.normpath(image_files.check_file_name(name, root)).startswith(root + "\\")
    else:
        with pytest.raises(Fault, match="leads out of"):
            image_files.check_file_name(name, root)


# --- messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "\ud800", "\x9b1m", "x" * 100_000, "a\u2028b", "\0"])
def test_whatever_an_error_quotes_it_is_one_printable_line(text: str) -> None:
    assert_printable(str(UserError(f"file {text}: wrong")))
    assert_printable(str(DatasetError(f"file {text}: wrong")))
    assert_printable("." + one_line(text))
    assert str(UserError("größe 尺寸\u3000é: 3 × 4")) == "größe 尺寸\u3000é: 3 × 4"


# --- through a command ------------------------------------------------------------------------------------


def test_check_dataset_lists_the_bad_records_and_goes_on(tmp_path: Path) -> None:
    data = content()
    data["images"][1]["file_name"] = "/etc/hostname"
    data["annotations"][2] |= {"bbox": [float("nan")] * 4, "segmentation": []}
    json_file, images = write(tmp_path, data)
    done = called(check_dataset.main, "--json", json_file, "--images", images, "--max-bad-images", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search("path outside the image folder +dropped +1", done.stdout)
    assert re.search("broken box +dropped +1", done.stdout)


def test_report_keeps_counting_beyond_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zenith_det.data.problems.EXAMPLES_KEPT", 5)
    monkeypatch.setattr("zenith_det.data.image_entries.EXAMPLES_KEPT", 5)
    data = content()
    data["images"] += [{"id": i, "file_name": "/x.png"} for i in range(10, 30)] + [{"id": None}] * 3
    report = examine_coco_dataset(write(tmp_path, data), max_bad_images=100).report
    assert report.counts["path outside the image folder", "dropped"] == 20
    assert report.counts["bad image id", "dropped"] == 3
    assert len(report.problems) == 8
    report = examine_coco_dataset(write(tmp_path, data), max_bad_images=22).report
    assert report.count("stops") == 23


@pytest.mark.parametrize(
    "change",
    [
        {"thing_classes": 5}, {"thing_classes": ["\x1b[2J"]}, {"thing_classes": [1]}, {"thing_classes": {"a": 1}},
        {"keypoint_names": "ab"}, {"keypoint_flip_map": [["a"]]}, {"keypoint_flip_map": [["a", "z"]]},
        {"keypoint_flip_map": [[["a"], "b"]]}, {"keypoint_connections": [[0, 2]]}, {"keypoint_connections": [0]},
        {"keypoint_connections": [["0", 1]]}, {"category_ids": ["7"]}, {"category_ids": [7, 8]},
        {"category_ids": [True]},
    ],
    ids=str,
)  # fmt: skip
def test_the_classes_of_a_hostile_checkpoint_are_refused_in_one_line(change: dict[str, Any]) -> None:
    facts: dict[str, Any] = {
        "name": "set", "thing_classes": ["x"], "category_ids": [7], "keypoint_names": ["a", "b"],
        "keypoint_flip_map": [["a", "b"]], "keypoint_connections": [[0, 1]],
    }  # fmt: skip
    metadata = DatasetMetadata.from_dict(facts)
    assert metadata is not None
    assert metadata.to_dict() == facts
    with pytest.raises(DatasetError, match=f"remembers is broken: {next(iter(change))}") as caught:
        DatasetMetadata.from_dict({**facts, **change})
    assert_printable(str(caught.value))
