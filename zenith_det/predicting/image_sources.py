"""Images to detect in, one after the other: files, arrays, folders of images and videos, the frames of a video."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from zenith_det import opencv as cv2
from zenith_det.data import ImageError, read_image
from zenith_det.errors import UserError, quote

# fmt: off
IMAGES = frozenset((
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".jp2", ".tga",
    ".avif",
))
VIDEOS = frozenset((".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg"))
# fmt: on

ByteImage: TypeAlias = npt.NDArray[np.uint8]
#: A file, BGR uint8 ``(H, W, 3)`` as OpenCV reads it, or a picture of Pillow's.
OneImage: TypeAlias = str | os.PathLike[str] | ByteImage | Image.Image
#: Called with what is wrong with an image that is then passed over.
OnBadImage: TypeAlias = Callable[[ImageError], None]


@dataclass(frozen=True)
class Picture:
    """An image to detect in.

    Attributes:
        pixels: BGR uint8 ``(H, W, 3)``.
        path: of the file; ``None`` for an array.
        frame: its number in a video, from 0.
    """

    pixels: ByteImage
    path: Path | None = None
    frame: int | None = None


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its name."""
    return path.suffix.lower() in VIDEOS


def collect(
    paths: Sequence[Path], *, videos: bool = True, leave_out: Path | None = None
) -> list[tuple[Path, Path]]:
    """The images and videos that ``paths`` name, folders and their subfolders opened; each once.

    Args:
        paths: files and folders.
        videos: take videos, too.
        leave_out: a folder that is not searched, such as one of an earlier command's pictures.

    Returns:
        Each with its path below the folder that was named, or its name alone.

    Raises:
        UserError: a path that isn't there or is neither, or nothing at all.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            for file in _files_below(path, leave_out):
                found.setdefault(file, file.relative_to(path))
        else:
            check_file(path)
            found.setdefault(path, Path(path.name))
    if not videos:
        found = {path: below for path, below in found.items() if not is_video(path)}
    if not found:
        kinds = "images or videos" if videos else "images"
        raise UserError(f"{' '.join(map(str, paths))}: no {kinds} there")
    return list(found.items())


def _files_below(folder: Path, leave_out: Path | None) -> list[Path]:
    """The images and videos in a folder and its subfolders, linked ones too, sorted by name."""
    files: list[Path] = []
    opened = {leave_out.resolve()} - {folder.resolve()} if leave_out else set()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in opened:  # a link may lead back
            subfolders.clear()
            continue
        opened.add(real)
        files += [Path(parent, name) for name in names if Path(name).suffix.lower() in IMAGES | VIDEOS]
    return sorted(files)


def check_file(path: Path) -> None:
    """Refuse what is no file, and a file whose name says that it is neither an image nor a video.

    Raises:
        UserError: naming it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix and path.suffix.lower() not in IMAGES | VIDEOS:
        raise UserError(f"{path}: neither an image nor a video ({', '.join(sorted(IMAGES | VIDEOS))})")


def read_one(source: Any, value_range: Sequence[float] = ()) -> Picture:
    """One image, whatever it is given as.

    Args:
        source: see :data:`OneImage`.
        value_range: of files of more than 8 bits, see :func:`zenith_det.data.read_image`.

    Raises:
        ImageError: a file that can't be read.
        UserError: anything else that is no image; what it is.
    """
    if isinstance(source, str | os.PathLike):
        return Picture(read_image(source, value_range=value_range), Path(source))
    if isinstance(source, Image.Image):
        if source.mode.startswith("I") or source.mode == "F":
            raise UserError(
                f"a picture of Pillow's mode {source.mode} has no scale that is known: give its file, or 8 bits"
            )
        colour = np.asarray(ImageOps.exif_transpose(source).convert("RGB"))
        return Picture(np.ascontiguousarray(colour[:, :, ::-1]))
    if not isinstance(source, np.ndarray):
        raise UserError(
            f"can't detect in {quote(source)}: give a path, an array, a picture of Pillow's, or a list of them"
        )
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
        raise UserError(
            f"an image must be uint8 (height, width, 3), BGR; this array is {source.dtype} {source.shape}"
        )
    return Picture(np.ascontiguousarray(source))


def read_all(
    sources: Iterable[Any],
    on_bad_image: OnBadImage | None = None,
    *,
    videos: bool = True,
    value_range: Sequence[float] = (),
) -> Iterator[Picture]:
    """Images one after the other, each read when it is asked for; of a video, its frames.

    Args:
        sources: as :func:`read_one` takes them, and videos.
        on_bad_image: called for a file that can't be read, in place of raising.
        videos: take the frames of videos.
        value_range: see :func:`read_one`.

    Raises:
        ImageError: a file that can't be read.
        UserError: see :func:`read_one`; also for a folder.
    """
    for source in sources:
        try:
            if isinstance(source, str | os.PathLike):
                path = Path(source)
                if path.is_dir() or (is_video(path) and not videos):
                    kind = "folder" if path.is_dir() else "video"
                    raise UserError(f"{path}: a {kind} within a list: give it alone")
                check_file(path)
                if is_video(path):
                    yield from _frames(path)
                    continue
            picture = read_one(source, value_range)
        except ImageError as error:
            if on_bad_image is None:
                raise
            on_bad_image(error)
        else:
            yield picture


def frames_per_second(path: Path) -> float:
    """Of a video; 25 where it doesn't say."""
    reader = cv2.VideoCapture(str(path))
    try:
        return float(reader.get(cv2.CAP_PROP_FPS)) or 25.0
    finally:
        reader.release()


def _frames(path: Path) -> Iterator[Picture]:
    reader = cv2.VideoCapture(str(path))
    number = 0
    try:
        while True:
            there, pixels = reader.read()
            if not there:
                break
            yield Picture(pixels, path, number)
            number += 1
    finally:
        reader.release()
    if number == 0:
        raise ImageError(str(path), "unreadable image", "no frame can be read")
