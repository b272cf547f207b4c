"""Reading pictures: whatever the file holds, (H, W, 3) uint8 upright, or one line that names the file."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zenith_det.data import ImageError, load_coco_dataset, read_image
from zenith_det.data.images import read_header
from zenith_det.errors import ConfigError, DatasetError

from .builders import HEIGHT, WIDTH, content, picture, write


def rotated(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(path, exif=exif, quality=95)
    return path


def bomb(path: Path, side: int = 100_000) -> Path:
    """A PNG of a few bytes whose header declares side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    return path


def test_bgr_is_rgb_backwards(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    rgb = read_image(path, "RGB")
    assert rgb.shape == (HEIGHT, WIDTH, 3)
    assert rgb.dtype == np.uint8
    assert np.array_equal(rgb, np.asarray(picture()))
    bgr = read_image(str(path))
    assert np.array_equal(bgr, rgb[:, :, ::-1])
    assert bgr.flags["C_CONTIGUOUS"]
    with pytest.raises(
        ConfigError, match=r"INPUT.FORMAT is 'HSV': it must be one of BGR, RGB, L, YUV-BT.601$"
    ):
        read_image(path, "HSV")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, tmp_path: Path) -> None:
    path = rotated(tmp_path / "a.jpg", orientation)
    plain = read_image(rotated(tmp_path / "plain.jpg", 1), "RGB")
    # How the stored picture is shown, by the EXIF standard: rows and columns of the stored one.
    shown = {
        1: plain,
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.transpose(1, 0, 2),
        6: plain[::-1].transpose(1, 0, 2),
        7: plain[::-1, ::-1].transpose(1, 0, 2),
        8: plain[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    assert np.array_equal(read_image(path, "RGB"), shown)
    header = read_header(str(path))
    assert (header.height, header.width) == shown.shape[:2]
    assert header.rotated == (orientation >= 5)


def test_broken_exif_does_not_matter(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(tmp_path / "a.jpg").shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_other_modes_become_colour(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture().convert("L").convert(mode).save(path)
    image = read_image(path, "RGB")
    assert image.shape == (HEIGHT, WIDTH, 3)
    grey = np.asarray(picture().convert("L")).astype(int)
    if mode != "1":
        assert np.abs(image.astype(int) - grey[:, :, None]).max() <= 2


def test_cmyk_jpeg(tmp_path: Path) -> None:
    picture().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    expected = np.asarray(picture()).astype(int)
    assert np.abs(read_image(tmp_path / "a.jpg", "RGB").astype(int) - expected).mean() < 6


def test_16_bit_keeps_its_contrast(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, WIDTH).astype(np.uint16)[None].repeat(HEIGHT, 0)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert np.array_equal(image[..., 0], ramp >> 8)


RAMP = np.linspace(0, 1, WIDTH)[None].repeat(HEIGHT, 0)


@pytest.mark.parametrize(
    ("values", "brightest"),
    [
        (RAMP.astype(np.float32), 255),
        ((RAMP * 200).astype(np.float32), 200),
        ((RAMP * 250).astype(np.int32), 250),
        ((RAMP * 20).astype(np.int32), 20),
    ],
)
def test_floats_and_32_bits_have_one_scale(values: np.ndarray, brightest: int, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif")
    assert (image.min(), image.max()) == (0, brightest)


@pytest.mark.parametrize(
    "values",
    [(RAMP * 300).astype(np.int32), (RAMP * 30 - 25).astype(np.float32), (RAMP * 65535).astype(np.float32)],
)
def test_values_without_a_known_scale_are_named(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(
        ImageError, match=f"values from {values.min():g} to {values.max():g}, of {values.dtype}"
    ):
        read_image(tmp_path / "a.tif")


def deep_set(folder: Path, *images: np.ndarray) -> tuple[str, str]:
    """A set of these pictures."""
    data = content(len(images))
    for n, entry in enumerate(data["images"]):
        entry |= {"file_name": f"{n}.tif", "height": None}
    source = write(folder, data)
    for n, values in enumerate(images):
        Image.fromarray(values).save(folder / f"images/{n}.tif")
    return source


@pytest.mark.parametrize(
    ("dtype", "low", "high", "black", "white"),
    [
        (np.uint16, 0, 65535, None, None),
        (np.uint16, 0, 4095, 0, 4095),
        (np.uint16, 100, 3000, 0, 4095),
        (np.uint16, 0, 1000, 0, 1023),
        (np.uint16, 0, 200, 0, 255),
        (np.uint16, 7000, 8000, 6900, 8100),
        (np.uint16, 28000, 31000, 27700, 31300),
        (np.float32, 0, 1, 0, 1),
        (np.float32, 0.2, 0.4, 0, 1),
        (np.float32, 0, 255, 0, 255),
        (np.float32, -25, 5, -28, 8),
        (np.float32, 0, 65535, 0, 65535),
        (np.float32, 1000, 1100, 990, 1110),
        (np.int32, 0, 255, 0, 255),
        (np.int32, 0, 300, 0, 511),
        (np.int32, -1000, 3000, -1400, 3400),
    ],
)
def test_deep_images_of_a_set_have_one_scale(
    dtype: Any, low: float, high: float, black: float | None, white: float | None, tmp_path: Path
) -> None:
    bright, dark = low + RAMP * (high - low), low + RAMP * (high - low) / 2
    dataset = load_coco_dataset(deep_set(tmp_path, bright.astype(dtype), dark.astype(dtype)))
    (remark,) = dataset.report.remarks()
    kind = {np.uint16: "16-bit", np.int32: "32-bit", np.float32: "float"}[dtype]
    assert remark.startswith(f"{kind} images have values from {low:g} to {high:g} (2 of 2 looked at)")
    ranges = [record.get("value_range") for record in dataset.records]
    if black is None or white is None:
        assert ranges == [None, None]
        black, white = 0, 65536
    else:
        assert ranges[0] == ranges[1] == pytest.approx([black, white], rel=0.003)
    for n, values in enumerate((bright, dark)):
        found = read_image(dataset.records[n]["file_name"], value_range=ranges[n])[:, :, 0]
        expected = (values.astype(dtype).astype(float) - black) / (white - black) * 255
        assert np.abs(found - expected).max() < 2
    for given in ([0, 1], (low, high)):  # as asked for, or of another set
        other = load_coco_dataset(deep_set(tmp_path, bright.astype(dtype)), value_range=given)
        assert other.records[0]["value_range"] == list(given)


@pytest.mark.parametrize(
    ("images", "fault"),
    [
        ([RAMP.astype(np.float32), (RAMP * 200).astype(np.float32)], "some are from 0 to 1, others are not"),
        ([(RAMP * 60000).astype(np.uint16), RAMP.astype(np.float32)], "kinds of several scales"),
        ([np.full((HEIGHT, WIDTH), 7, np.uint16)] * 2, "nothing to see"),
    ],
)
def test_deep_images_without_one_scale_stop(images: list[np.ndarray], fault: str, tmp_path: Path) -> None:
    source = deep_set(tmp_path, *images)
    with pytest.raises(DatasetError, match=rf"images have values from .* to .*{fault}.*INPUT\.VALUE_RANGE"):
        load_coco_dataset(source)
    assert load_coco_dataset(source, value_range=(0, 1)).records[0]["value_range"] == [0, 1]


def test_dead_pixels_and_holes_do_not_set_the_scale(tmp_path: Path) -> None:
    thermal = (7000 + RAMP * 1000).astype(np.uint16)
    thermal[0, 0], thermal[0, 1] = 65535, 0
    (record,) = load_coco_dataset(deep_set(tmp_path, thermal)).records
    assert record["value_range"] == pytest.approx([6900, 8100], rel=0.003)
    depth_map = (RAMP * 30 - 25).astype(np.float32)
    depth_map[0, :2] = np.nan, np.inf
    (record,) = load_coco_dataset(deep_set(tmp_path, depth_map), check_images="full").records
    image = read_image(record["file_name"], value_range=record["value_range"])
    assert (image[0, 0, 0], image[0, 1, 0]) == (0, 255)


def test_missing_empty_folder_and_text(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, kind, reason in (
        ("none.jpg", "missing file", "does not exist"),
        ("empty.jpg", "unreadable image", "0 bytes"),
        ("text.jpg", "unreadable image", "not an image"),
        ("folder.jpg", "unreadable image", "not a regular file"),
        ("pipe.jpg", "unreadable image", "not a regular file"),
        ("nul\0.jpg", "unreadable image", "can't be opened"),
    ):
        for read in (read_image, read_header):
            with pytest.raises(ImageError, match=reason) as caught:
                read(str(tmp_path / name))
            assert caught.value.kind == kind
            assert name.replace("\0", " ") in str(caught.value)  # no control character is printed
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_truncated_file_is_found_by_the_header_check_too(name: str, tmp_path: Path) -> None:
    picture(300, 400).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    for read in (read_image, read_header):
        with pytest.raises(ImageError, match="can't be decoded"):
            read(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_bytes_after_the_end_do_no_harm(name: str, tmp_path: Path) -> None:
    picture().save(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"\0" * 100)
    assert read_header(str(tmp_path / name)).width == WIDTH
    assert read_image(tmp_path / name).shape == (HEIGHT, WIDTH, 3)


def test_decompression_bomb(tmp_path: Path) -> None:
    for read in (read_image, read_header):
        with pytest.raises(ImageError, match="pixels") as caught:
            read(str(bomb(tmp_path / "a.png")))
        assert caught.value.kind == "image too large"


def test_postscript_is_not_run(tmp_path: Path) -> None:
    """Pillow would hand it to Ghostscript."""
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n")
    with pytest.raises(ImageError, match="not an image of a known format"):
        read_image(tmp_path / "a.jpg")


def test_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "missing file", "does not exist")))
    assert (str(error), error.kind) == ("a.jpg: does not exist", "missing file")


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["BGR", "RGB", "L", "YUV-BT.601"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "rotated JPEG"])
def test_pixels_are_detectron2s(name: str, mode: str, tmp_path: Path) -> None:
    utils = pytest.importorskip(
        "detectron2.data.detection_utils", reason="needs the real Detectron2: see docs/DETECTRON2.md"
    )
    if mode == "rotated JPEG":
        path = rotated(tmp_path / "a.jpg", 6)
    else:
        path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
        picture().convert(mode).save(path)
    ours, theirs = read_image(path, name), utils.read_image(str(path), name)
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)
