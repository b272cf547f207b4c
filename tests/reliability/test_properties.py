"""Arbitrary and mutated files: a UserError of one line, or a result that holds what a result must hold."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.builders import content, write
from zenith_det.config import get_cfg
from zenith_det.config.keys import leaves, sections
from zenith_det.data import segmentations
from zenith_det.training.checkpoints.reading import CorruptCheckpointError, load_checkpoint

from .fuzz_targets import run_checkpoint, run_config
from .readers import read_annotations, read_checkpoint, read_config, refusal

# Each example is files read by the public reader: milliseconds on a quiet machine, any time on a busy one.
FILES = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
ODD_TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "1", "\0", "\ud800", "\x1b[2J", "a\nb", "../x", "/x", "1.png", "nan", "1e999",
     "None", "x" * 3000]),
)  # fmt: skip
ODD_NUMBERS = st.one_of(
    st.integers(-3, 50),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([2**31, 2**53, 2**61 - 1, 2**63 - 1, 2**63, -(2**63), 10**400, -0.0, 1e-320, 1e308]),
)
SCALARS = st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXT)


# --- annotation files -------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        "images",
        "annotations",
        "categories",
        "id",
        "image_id",
        "category_id",
        "bbox",
        "segmentation",
        "counts",
        "size",
        "area",
        "iscrowd",
        "keypoints",
        "num_keypoints",
        "skeleton",
        "flip_pairs",
        "sigmas",
        "file_name",
        "height",
        "width",
        "name",
        "info",
        "licenses",
        "ignore",
    ]
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=6), st.dictionaries(st.one_of(KEYS, st.text(max_size=3)), inner, max_size=6)
    ),
    max_leaves=25,
)


def record(**fields: Any) -> Any:
    """A dictionary of mostly the right kind: each field may be there, be missing, or be anything."""
    return st.fixed_dictionaries({}, optional={name: st.one_of(s, s, s, JSON) for name, s in fields.items()})


SMALL = st.integers(0, 3)
COORDINATES = st.floats(-10, 60) | ODD_NUMBERS
RLE = st.fixed_dictionaries(
    {
        "size": st.just([30, 40]) | JSON,
        "counts": st.lists(st.integers(-5, 1300), max_size=6)
        | st.text("0123456789:;<=>?@ABCNOPQRSTUVWXYZ[\\]^_`abcdefghijklmno", max_size=20)
        | JSON,
    }
)
ANNOTATION_FILES = st.fixed_dictionaries(
    {
        "images": st.lists(
            record(
                id=SMALL,
                file_name=st.sampled_from(["1.png", "2.png", "3.png", "./1.png"]),
                height=st.just(30),
                width=st.just(40),
            ),
            max_size=4,
        ),
        "categories": st.lists(
            record(
                id=SMALL,
                name=st.sampled_from("abc"),
                keypoints=st.lists(st.sampled_from(["left_x", "right_x", "y"]), max_size=3),
                skeleton=st.lists(st.lists(SMALL, max_size=2), max_size=2),
                flip_pairs=st.lists(st.lists(st.sampled_from(["left_x", "right_x"]), max_size=2), max_size=1),
                sigmas=st.lists(st.floats(0, 2), max_size=3),
            ),
            max_size=3,
        ),
        "annotations": st.lists(
            record(
                id=SMALL,
                image_id=SMALL,
                category_id=SMALL,
                bbox=st.lists(COORDINATES, min_size=4, max_size=4),
                segmentation=st.lists(st.lists(COORDINATES, max_size=8), max_size=3) | RLE,
                area=ODD_NUMBERS,
                iscrowd=st.integers(0, 1),
                keypoints=st.lists(COORDINATES | st.integers(0, 2), max_size=9),
            ),
            max_size=5,
        ),
    }
)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write(tmp_path, content())
    return tmp_path


def read_set(folder: Path, text: bytes) -> str | None:
    (folder / "set.json").write_bytes(text)
    return refusal(read_annotations, str(folder / "set.json"), str(folder / "images"))


@settings(FILES, max_examples=250)
@given(tree=ANNOTATION_FILES | JSON)
def test_any_annotation_file_is_refused_or_read_whole(tree: Any, dataset: Path) -> None:
    read_set(dataset, json.dumps(tree).encode())


@settings(FILES, max_examples=150)
@given(data=st.data())
def test_a_mutated_annotation_file_is_refused_or_read_whole(data: st.DataObject, dataset: Path) -> None:
    text = bytearray(json.dumps(content()).encode())
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(text) - 1))
        length = data.draw(st.integers(0, 12))
        text[start : start + length] = data.draw(
            st.binary(max_size=6) | st.sampled_from([b"null", b"[", b"]", b"{", b"}", b",", b"NaN", b'"',
             b"-", b"1e999"])
        )  # fmt: skip
        if not text:
            break
    read_set(dataset, bytes(text))


@settings(deadline=None, max_examples=200)
@given(
    runs=st.lists(st.integers(0, 400), min_size=1, max_size=40),
    block=st.integers(1, 5),
)
def test_compressed_runs_are_decoded_alike_in_blocks_of_any_size(runs: list[int], block: int) -> None:
    from pycocotools import mask as mask_utils

    packed = mask_utils.frPyObjects({"size": [sum(runs), 1], "counts": runs}, sum(runs), 1)["counts"]
    at_once = segmentations._RUNS_AT_ONCE
    try:
        segmentations._RUNS_AT_ONCE = block
        assert segmentations._compressed_counts(packed).tolist() == runs
    finally:
        segmentations._RUNS_AT_ONCE = at_once


# --- configurations ---------------------------------------------------------------------------------------

DEFAULTS = get_cfg()
KNOWN = [key for key, _ in leaves(DEFAULTS)]
CONFIG_KEYS = st.one_of(
    st.sampled_from(KNOWN), st.sampled_from(KNOWN), st.sampled_from(list(sections(DEFAULTS))), ODD_TEXT
)
CONFIG_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ODD_TEXT, inner, max_size=2), max_leaves=8
)  # fmt: skip


def nested(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        *path, name = key.split(".")
        node: Any = tree
        for part in path:
            node = node.setdefault(part, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[name] = value
    return tree


@settings(FILES, max_examples=80)
@given(pairs=st.lists(st.tuples(CONFIG_KEYS, CONFIG_VALUES), max_size=4))
def test_any_config_file_is_refused_or_read_and_written_alike(
    pairs: list[tuple[str, Any]], tmp_path: Path
) -> None:
    try:
        text = yaml.safe_dump(nested(pairs), allow_unicode=True).encode("utf-8", "surrogatepass")
    except ValueError:  # a whole number of hundreds of digits is no decimal text in Python, and so no file
        return
    (tmp_path / "x.yaml").write_bytes(text)
    refusal(read_config, str(tmp_path / "x.yaml"))


@settings(FILES, max_examples=80)
@given(pairs=st.lists(st.tuples(CONFIG_KEYS, ODD_TEXT | CONFIG_VALUES.map(repr) | CONFIG_VALUES), max_size=3))
def test_any_overrides_are_refused_or_taken(pairs: list[tuple[str, Any]]) -> None:
    refusal(read_config, None, [word for pair in pairs for word in pair])


@settings(FILES, max_examples=150)
@given(
    text=st.lists(
        st.sampled_from(
            ["SEED: ", "SOLVER:", "  BASE_LR: ", "MODEL: ", "_BASE_: ", "a.yaml", "{", "}", "[", "]",
             ", ", ": ", "- ", "? ", "&a ", "*a", "<<: ", "!!int ", "!!float ", "!!bool ",
             "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!null ", "!x ",
             "!!python/name:os.system", "\n", "\n", "\n", "  ", "1", "0x1f", "0b1", "1e3", ".nan",
             ".inf", "1:30", "1:30.5", "2024-13-45", "true", "null", "~", "'", '"', '"\\ud800"', '"\\0"',
             "\t", "\x1b", "\\", "#", "%YAML 1.1", "---", "...", "=== a.yaml", "=== opts",
             "SOLVER.STEPS ", "(1, 2)", "x"]
        ),
        max_size=25,
    ).map("".join)
)  # fmt: skip
def test_any_yaml_is_refused_or_read(text: str, tmp_path: Path) -> None:
    run_config(text.encode("utf-8", "surrogatepass"), tmp_path)


# --- checkpoints ------------------------------------------------------------------------------------------

NONEMPTY = st.binary(min_size=1, max_size=5)  # torch writes b"" as a call of bytes, and refuses to read that
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), NONEMPTY),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4),
    ),
    max_leaves=10,
)
TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)


def equal(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # NaN included, and the types of containers


@settings(FILES, max_examples=60)
@given(plain=PLAIN, tensors=st.lists(TENSORS, max_size=3), modern=st.booleans())
def test_any_plain_state_is_read_as_it_was_saved(
    plain: Any, tensors: list[torch.Tensor], modern: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.pth"
    torch.save({"plain": plain, "tensors": tensors}, path, _use_new_zipfile_serialization=modern)
    assert equal(load_checkpoint(path), {"plain": plain, "tensors": tensors})


def saved_bytes(modern: bool) -> bytes:
    buffer = io.BytesIO()
    state = {"model": {f"w{i}": torch.ones(8) for i in range(3)}, "iteration": 3, "b": (1.5, None)}
    torch.save(state, buffer, _use_new_zipfile_serialization=modern)
    return buffer.getvalue()


def zoo_bytes() -> bytes:
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.float64(1)}
    return pickle.dumps({"model": weights, "author": "x"}, 2)


PICKLES = {True: saved_bytes(True), False: saved_bytes(False)}
with zipfile.ZipFile(io.BytesIO(PICKLES[True])) as _archive:
    DATA_PKL = next(_archive.read(name) for name in _archive.namelist() if name.endswith("data.pkl"))
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.integers(0, 8),
        st.binary(max_size=8) | st.sampled_from([b"R", b"Q", b"b", b".", b"h\0", b"s"])
    ),
    min_size=1,
    max_size=5,
)  # fmt: skip


def changed(data: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    for where, length, new in changes:
        start = int(where * len(data))
        data = data[:start] + new + data[start + length :]
    return data


@settings(FILES, max_examples=300)
@given(changes=CHANGES, kind=st.sampled_from("zpf"))
def test_a_mutated_checkpoint_is_refused_or_read_whole(
    changes: list[tuple[float, int, bytes]], kind: str, tmp_path: Path
) -> None:
    original = {"z": DATA_PKL, "p": zoo_bytes(), "f": PICKLES[False]}[kind]
    run_checkpoint(kind.encode() + changed(original, changes), tmp_path)


@settings(FILES, max_examples=100)
@given(changes=CHANGES)
def test_a_mutated_archive_is_damaged_or_the_same(
    changes: list[tuple[float, int, bytes]], tmp_path: Path
) -> None:
    """What is read in spite of a change is what was saved: every part has its checksum."""
    path = tmp_path / "x.pth"
    path.write_bytes(changed(PICKLES[True], changes))
    if refusal(read_checkpoint, str(path)) is None:
        path.write_bytes(PICKLES[True])
        expected = load_checkpoint(path)
        path.write_bytes(changed(PICKLES[True], changes))
        assert equal(load_checkpoint(path), expected)


def opcodes() -> Iterator[bytes]:
    """Pieces of pickles that may follow one another."""
    for name in (
        "collections OrderedDict", "collections Counter", "torch FloatStorage", "torch float32",
        "torch Size", "torch Tensor", "torch device", "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
        "torch.storage UntypedStorage", "builtins set", "builtins bytearray", "builtins complex",
        "_codecs encode", "os system", "numpy dtype", "numpy ndarray",
        "numpy._core.multiarray _reconstruct", "numpy._core.multiarray scalar",
    ):  # fmt: skip
        yield b"c" + name.replace(" ", "\n").encode() + b"\n"
    for text in ("storage", "0", "cpu", "model", "w", "latin1", "_metadata"):
        yield b"X" + len(text).to_bytes(4, "little") + text.encode()
    yield from (
        b"K\x00",
        b"K\x04",
        b"K\x10",
        b"J\xff\xff\xff\xff",
        b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
        b"\x88",
        b"\x89",
        b"N",
    )
    yield from (
        b"G" + bytes(8),
        b"(",
        b")",
        b"]",
        b"}",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"a",
        b"e",
        b"s",
        b"u",
        b"b",
        b"R",
    )
    yield from (
        b"Q",
        b"q\x00",
        b"h\x00",
        b"\x81",
        b"0",
        b"2",
        b"U\x03\x00\x00\x00",
        b"\x8f",
        b"\x94",
        b"(t",
        b"\x80\x02",
    )


@settings(FILES, max_examples=300)
@given(parts=st.lists(st.sampled_from(list(opcodes())), max_size=30), kind=st.sampled_from("zp"))
def test_any_opcodes_are_refused_or_read(parts: list[bytes], kind: str, tmp_path: Path) -> None:
    run_checkpoint(kind.encode() + b"\x80\x02" + b"".join(parts) + b".", tmp_path)


def test_damage_is_told_from_refusal(tmp_path: Path) -> None:
    """A run that finds its newest checkpoint damaged takes the one before; one that holds code stops it."""
    (tmp_path / "x.pth").write_bytes(PICKLES[True][:-40])
    with pytest.raises(CorruptCheckpointError):
        load_checkpoint(tmp_path / "x.pth")
