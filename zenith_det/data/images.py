"""Reading image files: any kind of picture in, 8-bit colour out, no surprise from a stranger's file."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from zenith_det.data.pixel_formats import check_format, from_rgb
from zenith_det.errors import DatasetError

#: Formats that are pictures and nothing else. Pillow also opens EPS, by running Ghostscript on it.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "TGA", "AVIF")
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of a file that is strange but can be read Pillow says so on standard error, in lines of its own.
warnings.filterwarnings("ignore", module=r"PIL\.")
#: Larger images are decoded one at a time, however many threads look at files: a decoded image takes up to 20
#: bytes per pixel on its way to an array.
LARGE_IMAGE = 2**24
_one_large = threading.Lock()
_PIXELS_LOOKED_AT = 2**16  # of an image, for the range that nearly all of its values are in
#: The values that become black and white.
ValueRange = tuple[float, float]
_TAIL = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class ImageError(DatasetError):
    """An image file that can't be used.

    Attributes:
        path: the file.
        kind: ``missing file``, ``unreadable image`` or ``image too large``.
        reason: what is wrong, without the path.
    """

    # From a loader worker torch brings over a text alone: the message is kept, the parts are not.
    def __init__(self, path: str, kind: str = "", reason: str = "") -> None:
        super().__init__(f"{path}: {reason}" if reason else path)
        self.path, self.kind, self.reason = path, kind, reason

    def __reduce__(self) -> tuple[Any, ...]:  # a process sends it to its launcher
        return type(self), (self.path, self.kind, self.reason)


@dataclass(frozen=True)
class ImageHeader:
    """What the start of an image file says."""

    width: int  # as displayed, EXIF rotation applied
    height: int
    rotated: bool  # EXIF turns it by 90 degrees: width and height are the other way round in the file


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with; asking it for another is an error."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def max_pixels() -> int:
    """The largest image accepted, in pixels: Pillow's own limit, twice ``PIL.Image.MAX_IMAGE_PIXELS``."""
    return 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else 2**62


def _open(path: str) -> BinaryIO:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever, a device never end
            raise ImageError(path, "unreadable image", "is not a regular file")
        if status.st_size == 0:
            raise ImageError(path, "unreadable image", "is empty (0 bytes)")
        return open(path, "rb")
    except FileNotFoundError:
        raise ImageError(path, "missing file", "does not exist") from None
    except (OSError, ValueError) as error:
        raise ImageError(path, "unreadable image", f"can't be opened: {_cause(error)}") from None


def _cause(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _failure(path: str, error: Exception) -> ImageError:
    if isinstance(error, ImageError):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(
            path, "image too large", f"has more than {max_pixels()} pixels (a decompression bomb?)"
        )
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError(
            path, "unreadable image", f"is not an image of a known format ({', '.join(FORMATS)})"
        )
    return ImageError(path, "unreadable image", f"can't be decoded: {_cause(error)}")


def _decoding(pixels: int) -> contextlib.AbstractContextManager[Any]:
    return _one_large if pixels > LARGE_IMAGE else contextlib.nullcontext()


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # broken EXIF raises anything at all, and says nothing about the pixels
        return 1


def read_header(path: str) -> ImageHeader:
    """Read an image's size without decoding it, and look whether the file ends where it should.

    A file whose end mark is missing is decoded, which tells a truncated file from one with bytes appended.

    Raises:
        ImageError: missing, empty, not an image, truncated, or larger than :func:`max_pixels`.
    """
    with _open(path) as file:
        try:
            with Image.open(file, formats=_formats()) as image:
                width, height = image.size
                # Asking for a PNG's EXIF decodes the whole image when none stands before the pixels.
                declared = {"exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys()
                rotated = bool(declared or image.format == "TIFF") and _orientation(image) >= 5
                mark = _TAIL.get(image.format or "")
                if mark is not None:
                    position = file.tell()
                    file.seek(-min(len(mark), os.fstat(file.fileno()).st_size), os.SEEK_END)
                    ended = file.read() == mark
                    file.seek(position)
                    if not ended:
                        with _decoding(width * height):
                            image.load()
        except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them into
            raise _failure(path, error) from None
    if rotated:
        width, height = height, width
    return ImageHeader(width, height, rotated)


def _is_deep(image: Image.Image) -> bool:
    """Whether its values are wider than 8 bits; Pillow would clip them at 255, which turns the picture white."""
    return image.mode.startswith("I") or image.mode == "F"


def _has_16_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _to_rgb(image: Image.Image, has_16_bits: bool, value_range: ValueRange | None) -> npt.NDArray[np.uint8]:
    """One scale for each kind of file, whatever is in it: images of a set must not differ by their brightest pixel.

    Raises:
        ValueError: values of 32 bits or floats that have no known scale.
    """
    if not _is_deep(image):
        return np.asarray(image.convert("RGB"))
    deep = np.asarray(image)
    if value_range is None and has_16_bits:
        deep = deep >> 8
    elif value_range is None:
        low, high = _range(deep)
        if low < 0 or high > 255:
            raise ValueError(
                f"values from {low:g} to {high:g}, of {deep.dtype}, have no scale that is known: save all images of "
                "the set with one scale, as 0 to 255, floats as 0 to 1, or 16 bits"
            )
        value_range = (0, 1) if image.mode == "F" and high <= 1 else (0, 255)
    if value_range is not None:
        low, high = value_range
        deep = (np.nan_to_num(deep.astype(np.float64), nan=low, posinf=high, neginf=low) - low) * (
            255 / (high - low)
        )
    grey = np.clip(deep, 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _range(deep: npt.NDArray[Any]) -> tuple[float, float]:
    finite = deep[np.isfinite(deep)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


@dataclass(frozen=True)
class DeepValues:
    """Of a grey image of more than 8 bits.

    Attributes:
        kind: "16-bit", "32-bit" or "float".
        low, high: its least and largest value.
        first, last: between these are nearly all: dead pixels of a sensor are not.
    """

    kind: str
    low: float
    high: float
    first: float
    last: float


def deep_values(path: str) -> DeepValues | None:
    """The values of a grey image of more than 8 bits; ``None`` for any other file, and one that can't be read."""
    try:
        with _open(path) as file, Image.open(file, formats=_formats()) as image:
            if not _is_deep(image):
                return None
            kind = "16-bit" if _has_16_bits(image) else "float" if image.mode == "F" else "32-bit"
            with _decoding(image.width * image.height):
                deep = np.asarray(image)
                few = deep.ravel()[:: max(1, deep.size // _PIXELS_LOOKED_AT)]
                few = few[np.isfinite(few)]
                first, last = np.percentile(few, (0.1, 99.9)) if few.size else (0, 0)
                return DeepValues(kind, *_range(deep), float(first), float(last))
    except Exception:  # told by the check of the image itself
        return None


def read_image(
    path: str | os.PathLike[str], format: str = "BGR", value_range: Sequence[float] | None = None
) -> npt.NDArray[Any]:
    """Read an image as Detectron2 does: EXIF rotation applied, alpha dropped, grey and CMYK made colour.

    Grey images of 16 or 32 bits or of floats are brought to 8 bits by ``value_range``. Without it, 16 bits are by their
    high byte; floats up to 1 are taken times 255; other floats, and whole numbers of 32 bits, must lie within 0 to 255.

    Args:
        path: the file.
        format: ``BGR``, ``RGB``, ``L`` or ``YUV-BT.601``, see :func:`~zenith_det.data.pixel_formats.from_rgb`.
        value_range: the values that become black and white in an image of more than 8 bits, such as those of
            ``INPUT.VALUE_RANGE``; empty as None.

    Returns:
        uint8, (H, W, 3), contiguous; with ``L`` (H, W, 1), with ``YUV-BT.601`` float64.

    Raises:
        ImageError: a :class:`~zenith_det.errors.DatasetError` that names the file: missing, empty, truncated,
            not an image, or larger than :func:`max_pixels`.
        ConfigError: another ``format``.
    """
    check_format(format)
    path = os.fspath(path)
    with _open(path) as file:
        try:
            with Image.open(file, formats=_formats()) as image, _decoding(image.width * image.height):
                image.load()
                turn = _TRANSPOSE.get(_orientation(image))
                turned = image if turn is None else image.transpose(turn)
                low_high = (float(value_range[0]), float(value_range[1])) if value_range else None
                array = _to_rgb(turned, _has_16_bits(image), low_high)
        except Exception as error:  # as in read_header
            raise _failure(path, error) from None
    return from_rgb(array, format)
