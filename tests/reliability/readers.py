"""The three public readers, each with what must hold of its result: for tables, hypothesis and the fuzzer alike.

Each function reads files as a user's run would and returns a short description of what came out. It raises
:class:`~zenith_det.errors.UserError` for a file that is refused, and anything else is a bug.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from zenith_det.config import load_config
from zenith_det.data import coco_ground_truth, examine_coco_dataset, load_coco_dataset
from zenith_det.errors import UserError
from zenith_det.training.checkpoints.reading import load_checkpoint, read_facts
from zenith_det.training.checkpoints.weights import read_weights

MAX_MESSAGE = 2000


def assert_printable(text: str) -> None:
    """One line, not endless, that can be printed and logged without driving the terminal."""
    assert text
    assert len(text) <= MAX_MESSAGE, f"{len(text)} characters: {text[:300]}"
    bad = [c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    assert not bad, f"{bad!r} in {text!r}"


def refusal(read: Callable[..., str], *args: Any) -> str | None:
    """The message with which ``read`` refuses its file, ``None`` where it reads it."""
    try:
        read(*args)
    except UserError as error:
        assert_printable(str(error))
        return str(error)
    return None


def read_annotations(
    json_file: str, image_root: str, check_images: Any = "header", max_bad_images: int = 1000
) -> str:
    """As training reads a set that may lose its bad images."""
    source = (json_file, image_root)
    report = examine_coco_dataset(source, check_images=check_images, max_bad_images=max_bad_images).report
    for line in [report.summary(), *report.table().splitlines()]:
        assert_printable(line[:MAX_MESSAGE])
    dataset = load_coco_dataset(source, check_images=check_images, max_bad_images=max_bad_images)
    metadata = dataset.metadata
    for name in (*metadata.thing_classes, *metadata.keypoint_names):
        assert_printable(name[:MAX_MESSAGE])
    root = os.path.normpath(image_root) + os.sep
    for record in dataset.records:
        path = record["file_name"]
        assert os.path.normpath(path) == os.path.normpath(os.path.abspath(path))
        assert os.path.normpath(path).startswith(root)
        assert "/../" not in path  # which a link on the way would take elsewhere
        assert_printable(os.path.relpath(path, root)[:MAX_MESSAGE])
        assert record["height"] >= 1
        assert record["width"] >= 1
        for item in record["annotations"]:
            assert all(map(math.isfinite, item["bbox"]))
            assert item["bbox"][2] > 0
            assert item["bbox"][3] > 0
            assert 0 <= item["category_id"] < metadata.num_classes
            assert 0 <= item["area"] <= 1e18
            assert item["iscrowd"] in (0, 1)
            assert len(item.get("keypoints", ())) == 3 * metadata.num_keypoints
            assert all(map(math.isfinite, item.get("keypoints", ())))
    truth = coco_ground_truth(dataset)
    ids = [annotation["id"] for annotation in truth["annotations"]]
    assert len(set(ids)) == len(ids)
    assert all(-(2**63) <= i < 2**63 for i in ids)
    json.dumps(truth).encode()
    return report.summary()


def read_config(config_file: str | None, opts: Sequence[Any] = ()) -> str:
    """Read a config, write it as a run does, and read that: the same configuration."""
    loaded = load_config(config_file, opts)
    for key, source in loaded.sources.items():
        assert_printable(key)
        assert_printable(source)
    text = loaded.cfg.dump()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        assert load_config(str(path)).cfg.dump() == text
    return f"{len(loaded.sources)} keys set"


def read_checkpoint(path: str) -> str:
    """Read a checkpoint as ``--resume`` and as ``MODEL.WEIGHTS`` do."""
    told = ""
    if not path.endswith(".pkl"):
        read_facts(path)
        state = load_checkpoint(path)
        assert type(state) is dict or isinstance(state, dict)
        told = f"{len(state)} entries; "
    tensors = read_weights(path)
    size = os.path.getsize(path)
    for name, tensor in tensors.items():
        assert isinstance(name, str)
        assert type(tensor) in (torch.Tensor, torch.nn.Parameter)
        assert tensor.device.type == "cpu"
        assert tensor.layout == torch.strided
        assert tensor.numel() * tensor.element_size() <= max(size, 1 << 16)
        tensor.detach().clone()  # its memory is there
    return f"{told}{len(tensors)} tensors"


READERS: dict[str, Callable[..., str]] = {
    "annotations": read_annotations,
    "config": read_config,
    "checkpoint": read_checkpoint,
}
