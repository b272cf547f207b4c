"""Files that a stranger could send, by what they attack, and what must become of each."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.data.builders import HEIGHT, WIDTH, content, write

REFUSED, READ = "refused", "read"
Build = Callable[[Path], list[Any]]


@dataclass(frozen=True)
class Hostile:
    """One file, and what must become of it.

    Attributes:
        name: for the test's name.
        target: which reader reads it.
        build: writes it into a folder and returns the reader's arguments.
        kind: ``refused`` or ``read`` (without the bad record).
        says: what the refusal, or the summary, must say (a regular expression).
        memory_mib: address space that reading may take; the file's size where that says more.
    """

    name: str
    target: str
    build: Build
    kind: str
    says: str
    memory_mib: int = 256


# --- annotation files --------------------------------------------------------------------------------------


def annotations(change: Callable[[dict[str, Any], Path], Any], **more: Any) -> Build:
    """A clean set of three images and objects with one thing changed."""

    def build(folder: Path) -> list[Any]:
        data = content()
        write(folder, data)
        change(data, folder)
        return [*write(folder, data), *more.values()]

    return build


def image(**values: Any) -> Build:
    return annotations(lambda data, _: data["images"][1].update(values))


def annotation(**values: Any) -> Build:
    return annotations(lambda data, _: data["annotations"][1].update(values))


def category(**values: Any) -> Build:
    return annotations(lambda data, _: data["categories"][0].update(values))


def raw(text: str | bytes) -> Build:
    """An annotation file of exactly this text."""

    def build(folder: Path) -> list[Any]:
        source = write(folder, content())
        Path(source[0]).write_bytes(text.encode() if isinstance(text, str) else text)
        return list(source)

    return build


def picture_header(folder: Path, number: int, side: int) -> None:
    """A PNG of a few bytes whose header declares side x side pixels, and which ends as it should."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    (folder / f"images/{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


def bomb_in_the_header(data: dict[str, Any], folder: Path) -> None:
    picture_header(folder, 2, 100_000)


def large_image(data: dict[str, Any], folder: Path) -> None:
    """As large as an image may be, by its header and by the annotation file."""
    picture_header(folder, 2, 13_000)
    data["images"][1].update(height=13_000, width=13_000)
    data["annotations"][1]["bbox"] = [0, 0, 13_000, 13_000]


def zigzag_polygon(data: dict[str, Any], folder: Path) -> None:
    large_image(data, folder)
    data["annotations"][1]["segmentation"] = [[0, 0, 13_000, 13_000] * 2000]
    del data["annotations"][1]["area"]


def many_polygons(data: dict[str, Any], folder: Path) -> None:
    large_image(data, folder)
    tiny = [[7 * i % 12_000, 7 * (i // 1700), 7 * i % 12_000 + 3, 7 * (i // 1700) + 3, 7 * i % 12_000, 9]
            for i in range(60_000)]  # fmt: skip
    data["annotations"][1]["segmentation"] = tiny
    del data["annotations"][1]["area"]


def wide_counts(data: dict[str, Any], folder: Path) -> None:
    """numpy would make each of the numbers as wide as the text among them."""
    counts = ["9" * 100_000, *[0] * 100_000]
    data["annotations"][1]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}


def many_keypoints(data: dict[str, Any], folder: Path) -> None:
    """As many numbers as keypoints x annotations, none of which the file holds."""
    data["categories"][0]["keypoints"] = [str(i) for i in range(900)]
    data["annotations"] = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 1, 1]}] * 1000


def many_flip_pairs(data: dict[str, Any], folder: Path) -> None:
    names = [str(i) for i in range(60_000)]
    pairs = [list(pair) for pair in zip(names[::2], reversed(names[1::2]))]
    data["categories"][0].update(keypoints=names, flip_pairs=pairs)


def escape_through_a_link(data: dict[str, Any], folder: Path) -> None:
    elsewhere = folder / "elsewhere" / "train"
    elsewhere.mkdir(parents=True, exist_ok=True)
    os.link(folder / "images/2.png", elsewhere.parent / "private.png")
    (folder / "images/link").symlink_to(elsewhere)
    data["images"][1]["file_name"] = "link/../private.png"  # 'images/private.png', by its letters


def pipe_for_an_image(data: dict[str, Any], folder: Path) -> None:
    (folder / "images/2.png").unlink()
    os.mkfifo(folder / "images/2.png")


def nested_json(depth: int, into: str = "[") -> str:
    opening, closing = {"[": ("[", "]"), "{": ('{"a":', "}")}[into]
    inside = opening * depth + "1" + closing * depth
    return '{"images": [], "annotations": [], "categories": [], "info": ' + inside + "}"


KEYPOINTS = ["left_a", "right_a"]


def all_keypoints(row: Any) -> Build:
    def change(data: dict[str, Any], folder: Path) -> None:
        data["categories"][0]["keypoints"] = KEYPOINTS
        for item in data["annotations"]:
            item["keypoints"] = row

    return annotations(change)


ANNOTATIONS = [
    # Where a name may lead.
    *[
        Hostile(f"file_name {name!r:.30}", "annotations", image(file_name=name), READ, f"dropped: .*{says}")
        for name, says in {
            "../../../../etc/hostname": "path outside the image folder 1",
            "/etc/hostname": "path outside the image folder 1",
            "1.png/../../secret.png": "path outside the image folder 1",
            ".": "unreadable image 1",
            "sub/..": "path outside the image folder 1",
            "C:\\Windows\\win.ini": "missing file 1",
            "\\\\server\\share\\x.png": "missing file 1",
            "2.png\0.txt": "no file name 1",
            "\ud800.png": "no file name 1",
            "a\nb.png": "no file name 1",
            "\x1b[2J.png": "no file name 1",
            "x" * 100_000: "missing file 1|unreadable image 1",
            "": "no file name 1",
        }.items()
    ],
    Hostile("file_name through a link", "annotations", annotations(escape_through_a_link), READ,
            "missing file 1"),
    Hostile("pipe for an image", "annotations", annotations(pipe_for_an_image), READ, "unreadable image 1"),
    # How large an image may be.
    Hostile("100,000 pixels wide, in the JSON", "annotations", image(height=100_000, width=100_000), READ,
            "image too large 1"),
    Hostile("100,000 pixels wide, in the header", "annotations", annotations(bomb_in_the_header), READ,
            "image too large 1"),
    *[
        Hostile(f"height {value!r:.12}", "annotations", image(height=value), READ, "wrong image size 1")
        for value in (-1, 2**63, 1e400, float("nan"), True, "30 px", [30], 1e19)
    ],
    Hostile("height 0", "annotations", image(height=0), READ, "filled: no image size 1"),
    Hostile("height '30'", "annotations", image(height="30"), READ, "filled: number as text 1"),
    # Numbers.
    *[
        Hostile(f"bbox {value!r:.30}", "annotations", annotation(bbox=value, segmentation=[]), READ,
                "dropped: broken box 1")
        for value in ([float("nan")] * 4, [1, 1, float("inf"), 1], [1, 1, 10**400, 1], [1] * 100_000, "1111",
                      [1e308, 1, 1e308, 1], [0, 0, 1e200, 1e200], [-1e30, 0, 2e30, 9], [[1]] * 4, {"x": 1})
    ],
    *[
        Hostile(f"image id {value!r:.30}", "annotations", image(id=value), READ, "bad image id 1")
        for value in (2**63, -(2**63), 2**70, 1.5, True, " ", None, float("nan"), 1e300)
    ],
    *[
        Hostile(f"annotation id {value!r:.30}", "annotations", annotation(id=value), READ,
                "filled: no annotation id 1")
        for value in (2**63, -(2**64), 0.5, False, "two", [2], float("inf"), 10**4000)
    ],
    Hostile("area of 1e400", "annotations", annotation(area=1e400), READ, "filled: no usable area 1"),
    Hostile("area NaN", "annotations", annotation(area=float("nan")), READ, "filled: no usable area 1"),
    Hostile("a number of 5,000 digits", "annotations", raw(json.dumps(content()).replace("100", "9" * 5000)),
            REFUSED, "not an annotation file"),
    # Masks.
    *[
        Hostile(f"segmentation {value!r:.40}", "annotations", annotation(segmentation=value), READ,
                "dropped: broken (polygon|RLE) 1")
        for value in (
            [[1, 2, 3, 4]], [[]], [[1, 1, 5, 1, 5, 10**400]], [[True] * 6, "xxxxxx"], [{"a": 1}] * 9, "1,2,3",
            {"size": [HEIGHT, WIDTH], "counts": [-5, 1205]},
            {"size": [HEIGHT, WIDTH], "counts": [2**63]},
            {"size": [HEIGHT, WIDTH], "counts": [2**40, HEIGHT * WIDTH - 2**40]},
            {"size": [HEIGHT, WIDTH], "counts": [1e3, 200.5]},
            {"size": [HEIGHT, WIDTH], "counts": [True] * HEIGHT * WIDTH},
            {"size": [HEIGHT, WIDTH], "counts": "o" * 100_000},
            {"size": [HEIGHT, WIDTH], "counts": "\ud800"},
            {"size": [2**40, 2**40], "counts": "1"},
            {"size": [-1, -1], "counts": [1]},
            {"size": [100_000, 100_000], "counts": [10_000_000_000]},
        )
    ],
    Hostile("RLE counts as wide as a text", "annotations", annotations(wide_counts), READ,
            "dropped: broken RLE 1"),
    Hostile("a polygon of 4,000 diagonals of a large image", "annotations", annotations(zigzag_polygon), READ,
            "dropped: broken polygon 1"),
    Hostile("60,000 polygons of one object", "annotations", annotations(many_polygons), READ,
            "dropped: broken polygon 1"),
    # Keypoints.
    *[
        Hostile(f"keypoints {value!r:.30}", "annotations", all_keypoints(value), READ,
                "dropped: broken keypoints 3")
        for value in ([[1, 1]] * 6, [[1]] * 6, [[]] * 6, ["one"] * 6, [None] * 6, [10**400] * 6, [[[1]]] * 6,
                      ["9" * 100_000] * 6, [float("nan")] * 6)
    ],
    Hostile("900 keypoints x 1,000 objects without any", "annotations", annotations(many_keypoints), READ,
            "1000 annotations"),
    Hostile("60,000 keypoints", "annotations", annotations(many_flip_pairs), READ,
            "keypoints that can't be trained"),
    Hostile("flip pairs of lists", "annotations", category(keypoints=KEYPOINTS, flip_pairs=[[[1], [2]]]), READ,
            "keypoints that can't be trained"),
    Hostile("sigmas of 1e400", "annotations", category(keypoints=KEYPOINTS, sigmas=[10**400] * 2), READ,
            "keypoints that can't be trained"),
    # Text that is printed.
    *[
        Hostile(f"category {value!r:.20}", "annotations", category(name=value), REFUSED, "has the name")
        for value in ("\x1b[2J", "a\nb", "\ud800", "a\u2028b", "\x9b31m")
    ],
    Hostile("keypoint name with an escape", "annotations", category(keypoints=["\x1b[2J"]), READ,
            "keypoints that can't be trained"),
    Hostile("a category of a million letters", "annotations", category(name="x" * 1_000_000), REFUSED,
            "has the name"),
    # The file itself.
    Hostile("nested 990 deep", "annotations", raw(nested_json(900)), REFUSED, "is empty|nested too deep"),
    Hostile("nested 1,000 deep", "annotations", raw(nested_json(1000)), REFUSED, "is empty|nested too deep"),
    Hostile("nested a million deep", "annotations", raw(nested_json(1_000_000)), REFUSED, "nested too deep"),
    Hostile("objects a million deep", "annotations", raw(nested_json(1_000_000, "{")), REFUSED,
            "nested too deep"),
    Hostile("a bbox nested 800 deep", "annotations",
            raw(json.dumps(content()).replace("[5, 5, 10, 10]", "[" * 800 + "]" * 800)), READ, "no usable box 3"),
    Hostile("zeros", "annotations", raw(bytes(1_000_000)), REFUSED, "not valid JSON"),
    Hostile("a gzip of zeros", "annotations", raw(b"\x1f\x8b" + zlib.compress(bytes(1_000_000))), REFUSED,
            "a gzip archive"),
    Hostile("300,000 broken image entries", "annotations",
            raw('{"images": [' + "1," * 299_999 + '1], "categories": [{"id": 1, "name": "a"}]}'), READ, "",
            128),
    Hostile("100,000 names that lead out", "annotations",
            raw('{"images": [' + '{"id":1,"file_name":"/"},' * 99_999
                + '{"id":1,"file_name":"/"}], "categories": [{"id": 1, "name": "a"}]}'), READ, "", 256),
    Hostile("300,000 broken annotations", "annotations",
            raw(json.dumps({**content(), "annotations": 0}).replace('"annotations": 0', '"annotations": ['
                + "1," * 299_999 + "1]")), REFUSED, "none of 300000 can be used: broken annotation 300000", 128),
]  # fmt: skip
# These have no image left, or more bad ones than training puts up with.
_ALL_BAD = ("300,000 broken image entries", "100,000 names that lead out")
ANNOTATIONS = [
    Hostile(h.name, h.target, h.build, REFUSED, "can't be used: (broken image entry|no images)", h.memory_mib)
    if h.name in _ALL_BAD
    else h
    for h in ANNOTATIONS
]


# --- configurations ----------------------------------------------------------------------------------------


def config(text: str | bytes, **others: str) -> Build:
    """A config file ``x.yaml``, and others beside it."""

    def build(folder: Path) -> list[Any]:
        for name, body in others.items():
            (folder / f"{name}.yaml").write_text(body)
        (folder / "x.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return [str(folder / "x.yaml")]

    return build


def overrides(*words: Any) -> Build:
    return lambda folder: [None, list(words)]


def base_is_a_pipe(folder: Path) -> list[Any]:
    os.mkfifo(folder / "pipe.yaml")
    return config("_BASE_: pipe.yaml")(folder)


def laughs(leaf: str, more: str = "") -> str:
    lines = [f"a0: &a0 {leaf}"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(lines) + more


def merge_laughs(depth: int) -> str:
    """Merge keys: each level lists the one before nine times."""
    lines = ["a0: &a0 {SEED: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, depth)]
    return "\n".join(lines)


def diamonds(depth: int) -> dict[str, str]:
    """Each file has the next for a base, twice."""
    files = {f"d{i}": f"_BASE_: [d{i + 1}.yaml, d{i + 1}.yaml]\n" for i in range(depth)}
    return {**files, f"d{depth}": "SEED: 1\n"}


def colliding_keys(count: int) -> str:
    """Whole numbers that all hash to the same: a dictionary of them takes quadratic time."""
    prime = 2**61 - 1
    return "SEED: {" + ", ".join(f"{hex(prime * i)}: 1" for i in range(1, count)) + "}"


CONFIGS = [
    *[
        Hostile(f"config {text!r:.45}", "config", config(text), REFUSED, says)
        for text, says in {
            "SEED: !!python/object/apply:os.system ['true']": "YAML tag",
            "_BASE_: /dev/zero": "not a regular file",
            "_BASE_: /proc/self/environ": "not valid YAML|unknown key|KEY: value|empty",
            "_BASE_: '../../../../../../../../etc/passwd'": "not valid YAML|unknown key|KEY: value",
            '_BASE_: "a\\nb.yaml"': "no such config file|file names are needed",
            '_BASE_: "\\0"': "can't be read|file names are needed",
            '_BASE_: "\\ud800"': "can't be read|no such|not valid YAML|file names are needed",
            f"_BASE_: [{', '.join(['x.yaml'] * 1000)}]": "comes back",
            "_BASE_: ''": "file names are needed",
            '"\\e[2J\\n": 1': "unknown key|can't be a key",
            '"a\\nb": 1': "unknown key|can't be a key",
            '? "x"\n: 1\n? [a]\n: 1': "can't be a key",
            "2024-13-45: 1": "x.yaml:1: ",
            "!!int '': 1": "x.yaml:1: ",
            "SEED: !!int ''": "x.yaml:1: SEED",
            "SEED: !!float ''": "x.yaml:1: SEED",
            "SEED: !!bool maybe": "x.yaml:1: SEED",
            "SEED: !!timestamp soon": "x.yaml:1: SEED",
            "SEED: !!binary '='": "x.yaml:1:",
            "SEED: !!int abc": "x.yaml:1: SEED",
            "SEED: 1" + ":00" * 400: "x.yaml:1: SEED",
            "SOLVER: {BASE_LR: 1" + ":00" * 400 + ".5}": "x.yaml:1: SOLVER.BASE_LR",
            "SOLVER: {BASE_LR: 0x1" + "0" * 400 + "}": "SOLVER.BASE_LR",
            "SOLVER: {MAX_ITER: 1" + "0" * 400 + "}": "SOLVER.MAX_ITER",
            "SEED: 0x1" + "0" * 100_000: "SEED",
            "SEED: 1" + "0" * 100_000: "SEED",
            "SEED: 9223372036854775808": "SEED",
            "SOLVER: {STEPS: [1, 99999999999999999999]}": "SOLVER.STEPS",
            "SOLVER: {ADAMW: {BETAS: null}}": "SOLVER.ADAMW.BETAS",
            "SOLVER: {ADAMW: {BETAS: [a, b]}}": "SOLVER.ADAMW.BETAS",
            "SOLVER: {STEPS: ['" + "x" * 100_000 + "']": "",
            "DATASETS: {TRAIN: [" + "x, " * 50_000 + "]}\nSEED: x": "SEED",
            "SOLVER: {MAX_ITER: " + "x" * 100_000 + "}": "SOLVER.MAX_ITER",
            "x" * 100_000 + ": 1": "x.yaml:1",
            'OUTPUT_DIR: "a\\0b"': "OUTPUT_DIR",
            'OUTPUT_DIR: "\\ud800"': "OUTPUT_DIR|not valid YAML",
            'OUTPUT_DIR: "\\e[2J"': "OUTPUT_DIR",
            "SOLVER: &a {<<: *a}": "x.yaml",
            "SEED: {a: &a [*a]}": "x.yaml",
            "<<: {SEED: {}}": "SEED",
            "<<: 3": "x.yaml",
            laughs("lol"): "too many|unknown key",
            laughs("1", "\nSEED: *a11"): "too many|unknown key",
            merge_laughs(12): "x.yaml",
            merge_laughs(12).replace("a0", "SOLVER"): "x.yaml",
            "SEED: " + "[" * 20_000: "nested too deep",
            "SEED: " + "{a: " * 5000: "nested too deep",
            "SEED: " + "- " * 20_000 + "1": "nested too deep|not valid YAML",
            "? " * 20_000: "nested too deep|not valid YAML",
            "&a " * 20_000: "not valid YAML",
            "%TAG ! tag:yaml.org,2002:python/\n---\nSEED: !object/apply:os.system [x]": "YAML tag",
            "%YAML 9.9\n---\nSEED: 1": "not valid YAML",
            "\ufeff\ufeffSEED: 1": "x.yaml",
            colliding_keys(8000): "can't be a key",
            "# " + "x" * 3_000_000: "larger than",
            ("SEED: 1\n" * 3).encode("utf-16"): "second time",
            b"\xff\xfe\x00": "not valid YAML",
            bytes(1000): "not valid YAML",
        }.items()
    ],
    Hostile("_BASE_ is a pipe", "config", base_is_a_pipe, REFUSED, "not a regular file"),
    Hostile("_BASE_ files in 2^40 ways", "config", config("_BASE_: d0.yaml", **diamonds(40)), REFUSED,
            "more than"),
    Hostile("200 KB in each of two files", "config",
            config("_BASE_: a.yaml\n# " + "x" * 200_000, a="# " + "x" * 200_000), REFUSED, "larger than"),
    Hostile("_BASE_ files 500 deep", "config",
            config("_BASE_: c0.yaml", **{f"c{i}": f"_BASE_: c{i + 1}.yaml" for i in range(500)}), REFUSED,
            "more than|nested too deep"),
    *[
        Hostile(f"override {words!r:.50}", "config", overrides(*words), REFUSED, says)
        for words, says in {
            ("SOLVER.MAX_ITER", "1" + "0" * 400): "SOLVER.MAX_ITER",
            ("SOLVER.MAX_ITER", "0x1" + "0" * 10_000): "SOLVER.MAX_ITER",
            ("SOLVER.BASE_LR", "0x1" + "0" * 400): "SOLVER.BASE_LR",
            ("SOLVER.BASE_LR", "9" * 5000): "SOLVER.BASE_LR",
            ("SOLVER.BASE_LR", "1e999"): "SOLVER.BASE_LR",
            ("SOLVER.MAX_ITER", "-" * 100_000 + "1"): "SOLVER.MAX_ITER",
            ("SOLVER.MAX_ITER", "+".join(["1"] * 100_000)): "SOLVER.MAX_ITER",
            ("SOLVER.STEPS", "(" + "[" * 90 + "]" * 90 + ",)"): "SOLVER.STEPS",
            ("SOLVER.STEPS", "(b'a', {1}, {2: 3})"): "SOLVER.STEPS",
            ("OUTPUT_DIR", "a\0b"): "OUTPUT_DIR",
            ("OUTPUT_DIR", "\udc80\ud800"): "OUTPUT_DIR",
            ("a\nb", "1"): "unknown key",
            ("x" * 100_000, "1"): "unknown key",
            ("", "1"): "unknown key",
            ("." * 1000, "1"): "unknown key",
            ("SOLVER..MAX_ITER", "1"): "unknown key",
            ("SOLVER.MAX_ITER\x1b[2J", "1"): "unknown key",
        }.items()
    ],
]  # fmt: skip


# --- checkpoints -------------------------------------------------------------------------------------------


def saved(state: Any, change: Callable[[dict[str, bytes]], None] | None = None) -> Build:
    """What torch.save writes of ``state`` (or of what it returns), its parts changed."""

    def build(folder: Path) -> list[Any]:
        path = folder / "x.pth"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of its sparse and quantized tensors
            torch.save(state() if callable(state) else state, path)
        if change is not None:
            with zipfile.ZipFile(path) as archive:
                parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
            change(parts)
            path.write_bytes(zipped(parts))
        return [str(path)]

    return build


def zipped(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def pickled_pth(data_pkl: bytes, **parts: bytes) -> Build:
    """A checkpoint of torch's zip format with this ``data.pkl``."""

    def build(folder: Path) -> list[Any]:
        entries = {"x/data.pkl": data_pkl, "x/byteorder": b"little", "x/version": b"3\n"}
        entries |= {f"x/data/{key}": value for key, value in parts.items()}
        (folder / "x.pth").write_bytes(zipped(entries))
        return [str(folder / "x.pth")]

    return build


def written(name: str, data: bytes) -> Build:
    def build(folder: Path) -> list[Any]:
        (folder / name).write_bytes(data)
        return [str(folder / name)]

    return build


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def call(name: str, *args: Any, then: bytes = b"") -> bytes:
    """A pickle of ``{"model": name(*args)}`` in the opcodes that torch's reader knows."""
    module, function = name.rsplit(".", 1)
    values = b"".join(value if isinstance(value, bytes) else small(value) for value in args)
    return (
        b"\x80\x02}"
        + small("model")
        + f"c{module}\n{function}\n".encode()
        + b"("
        + values
        + b"tR"
        + then
        + b"s."
    )


def small(value: Any) -> bytes:
    """One value in torch's opcodes, without frame and end."""
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, tuple):
        return b"(" + b"".join(map(small, value)) + b"t"
    if isinstance(value, bytes):
        return value
    return pickle.dumps(value, 2)[2:-1]


def storage(count: int, key: str = "0", old: bool = False) -> bytes:
    end = b"NtQ" if old else b"tQ"
    return b"(" + small("storage") + b"ctorch\nFloatStorage\n" + small((key, "cpu", count))[1:-1] + end


def tensor(
    count: int, size: tuple[int, ...], stride: tuple[int, ...], key: str = "0", old: bool = False
) -> bytes:
    """A pickle of ``{"model": {"w": tensor}}``."""
    rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(count, key, old) + small(0) + small(size) + small(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip
    return b"\x80\x02}" + small("model") + b"}" + small("w") + rebuilt + b"ss."


def old_format(data: bytes, keys: bytes = b"\x80\x02]" + small("0") + b"a.", tail: bytes = b"") -> bytes:
    """A checkpoint of torch's format before 1.6 with this pickle."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    info = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    return magic + pickle.dumps(1001, 2) + info + data + keys + tail


def tar_of_a_pickle(witness: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            data = pickle.dumps(Calls(os.system, f"touch {witness}"), 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def two_of_a_name(folder: Path) -> list[Any]:
    torch.save({"model": {"w": torch.zeros(3)}}, folder / "x.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(folder / "x.pth", "a") as archive:
            archive.writestr("x/data.pkl", call("os.system", "true"))
    return [str(folder / "x.pth")]


def sparse_file(folder: Path) -> list[Any]:
    """64 GiB of zeros that take no room on the disk, after the start of an old checkpoint."""
    path = folder / "x.pth"
    path.write_bytes(old_format(tensor(4, (4,), (1,), old=True)))
    os.truncate(path, 1 << 36)
    return [str(path)]


def sparse_pickle(folder: Path) -> list[Any]:
    (folder / "x.pkl").write_bytes(pickle.dumps({"model": {"w": np.zeros(2)}}))
    os.truncate(folder / "x.pkl", 1 << 36)
    return [str(folder / "x.pkl")]


def deep(depth: int, leaf: bytes = b"]") -> bytes:
    return b"\x80\x02}" + small("model") + b"]" + b"]" * depth + b"a" * depth + b"s."


GIANT = 10**12
CHECKPOINTS = [
    # Code.
    Hostile("code", "checkpoint", saved({"model": Calls(os.system, "true")}), REFUSED, "refused.*system"),
    Hostile("code, nested", "checkpoint", saved({"model": {"w": [({"a": Calls(eval, "1")},)]}}), REFUSED,
            "refused.*eval"),
    Hostile("code in the old format", "checkpoint", written("x.pth", old_format(call("os.system", "true"))),
            REFUSED, "refused.*system"),
    Hostile("code in a tar", "checkpoint", written("x.pth", tar_of_a_pickle("hacked")), REFUSED,
            "not a checkpoint"),
    Hostile("code in a plain pickle", "checkpoint", written("x.pth", pickle.dumps(Calls(eval, "1"), 2)), REFUSED,
            "not a checkpoint|refused"),
    Hostile("a second data.pkl", "checkpoint", two_of_a_name, REFUSED, "twice"),
    # Tensors that are no weights, and data that isn't there.
    Hostile("a meta tensor", "checkpoint",
            pickled_pth(call("torch._utils._rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n", (GIANT,), (1,),
                             False)), REFUSED, "no weights"),
    Hostile("a sparse tensor", "checkpoint",
            saved(lambda: {"model": {"w": torch.sparse_coo_tensor([[0], [0]], [1.0], (10**9, 10**9))}}),
            REFUSED, "no weights|meta tensor"),
    Hostile("a quantized tensor", "checkpoint",
            saved(lambda: {"model": {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}}), REFUSED,
            "no weights|[Qq]uantized"),
    Hostile("a storage of 4 TB", "checkpoint", pickled_pth(tensor(GIANT, (GIANT,), (1,)), **{"0": bytes(16)}), REFUSED,
            "x.pth"),
    Hostile("a storage of 4 TB in the old format", "checkpoint",
            written("x.pth", old_format(tensor(GIANT, (GIANT,), (1,), old=True))), REFUSED, "x.pth"),
    Hostile("a storage of minus 1", "checkpoint", pickled_pth(tensor(-1, (1,), (1,)), **{"0": bytes(16)}), REFUSED,
            "x.pth"),
    Hostile("a storage that is not there", "checkpoint", pickled_pth(tensor(4, (4,), (1,), "9")), REFUSED, "x.pth"),
    Hostile("a storage of another name", "checkpoint", pickled_pth(tensor(4, (4,), (1,), "../data.pkl")), REFUSED,
            "x.pth"),
    Hostile("four floats as a tensor of 4 TB", "checkpoint",
            pickled_pth(tensor(4, (10**6, 10**6), (0, 0)), **{"0": bytes(16)}), REFUSED, "x.pth"),
    Hostile("a tensor larger than its storage", "checkpoint",
            pickled_pth(tensor(4, (100,), (1,)), **{"0": bytes(16)}), REFUSED, "x.pth"),
    Hostile("a size of 2^70", "checkpoint", pickled_pth(tensor(4, (2**70,), (1,)), **{"0": bytes(16)}), REFUSED,
            "x.pth"),
    Hostile("a negative size", "checkpoint", pickled_pth(tensor(4, (-1,), (1,)), **{"0": bytes(16)}), REFUSED, "x.pth"),
    Hostile("a negative stride", "checkpoint", pickled_pth(tensor(4, (4,), (-1,)), **{"0": bytes(16)}), REFUSED,
            "x.pth"),
    Hostile("half the storage there", "checkpoint", pickled_pth(tensor(8, (8,), (1,)), **{"0": bytes(16)}), REFUSED,
            "x.pth"),
    Hostile("64 GiB of zeros", "checkpoint", sparse_file, REFUSED, "x.pth"),
    Hostile("64 GiB of zeros after a pickle", "checkpoint", sparse_pickle, READ, "1 tensors"),
    Hostile("a text of 4 GB", "checkpoint", written("x.pth", old_format(b"\x80\x02X\xff\xff\xff\xffabc.")), REFUSED,
            "x.pth"),
    Hostile("a text of 2^56 bytes", "checkpoint",
            written("x.pkl", b"\x80\x04\x8d\x00\x00\x00\x00\x00\x00\x00\x01abc."), REFUSED, "x.pkl"),
    Hostile("lists 100,000 deep", "checkpoint", pickled_pth(deep(100_000)), REFUSED, "x.pth"),
    Hostile("lists 100,000 deep in a zoo file", "checkpoint", written("x.pkl", deep(100_000)), REFUSED, "x.pkl"),
    # Archives.
    Hostile("a TorchScript archive", "checkpoint",
            saved({"model": {"w": torch.zeros(2)}}, lambda parts: parts.update({"x/constants.pkl": b""})), REFUSED,
            "TorchScript"),
    Hostile("byte order of nowhere", "checkpoint",
            saved({"w": torch.zeros(2)}, lambda parts: parts.update({"x/byteorder": b"middle"})), REFUSED, "x.pth"),
    Hostile("zeros", "checkpoint", written("x.pth", bytes(1_000_000)), REFUSED, "zeros"),
    Hostile("zeros for a zoo file", "checkpoint", written("x.pkl", bytes(1_000_000)), REFUSED, "x.pkl"),
    Hostile("a name with escapes in the refusal", "checkpoint",
            pickled_pth(b"\x80\x02c\x1b[2Jos\nsystem\x07\n."), REFUSED, "refused"),
    Hostile("a part with escapes in its name", "checkpoint",
            written("x.pth", zipped({"x/data.pkl": b"\x80\x02}.", "x/\x1b[2J\n": b"1"}).replace(
                zlib.crc32(b"1").to_bytes(4, "little"), b"abcd")), REFUSED, "checksum|twice|damaged"),
    Hostile("an object with state of its own", "checkpoint",
            pickled_pth(b"\x80\x02ccollections\nOrderedDict\n)R}" + small("popitem") + b"K\x01sb" + b"."), REFUSED,
            "x.pth"),
    Hostile("the model is a list", "checkpoint", saved({"model": [1, 2]}), REFUSED, "no weights"),
    Hostile("the keys are numbers", "checkpoint", saved({"model": {1: torch.zeros(1)}}), REFUSED, "no weights"),
    Hostile("a Counter of a schedule", "checkpoint",
            saved({"model": {"w": torch.zeros(2)}, "milestones": collections.Counter([1, 2])}), READ, "1 tensors"),
]  # fmt: skip


HOSTILE = [*ANNOTATIONS, *CONFIGS, *CHECKPOINTS]
