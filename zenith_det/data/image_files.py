"""Image files as an annotation file names them: are they there, can they be read, are they of that size?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from zenith_det.data.images import ImageError, ImageHeader, read_header, read_image
from zenith_det.data.problems import WRONG_SIZE, Fault
from zenith_det.errors import is_printable, quote

ImageCheck = Literal["none", "header", "full"]
#: The kind of a name that no file has.
MISSING = "missing file"
#: The kind of a name that leads out of the image folder.
OUTSIDE = "path outside the image folder"


def check_file_name(name: object, image_root: str) -> str:
    """The path of an image below ``image_root``.

    Raises:
        Fault: no name, or one that leads out of ``image_root``.
    """
    if not isinstance(name, str) or not name or not is_printable(name):
        raise Fault("no file name", f"file_name is {quote(name)}")
    path = os.path.join(image_root, name)
    # Windows: "C:x" and "\\x" are not absolute, and lead out nevertheless.
    if ".." in name or os.path.isabs(name) or os.path.splitdrive(name)[0] or name[0] in "/\\":
        # What is checked is what is opened: the system would follow a link before it goes up by "..".
        path = os.path.normpath(path)
        if not path.startswith(image_root.rstrip(os.sep) + os.sep):
            raise Fault(OUTSIDE, "file_name leads out of the image folder")
    return path


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image to look at: its path and the size that the annotation file gives, None where it gives none."""

    path: str
    height: int | None
    width: int | None


class OtherSize(Fault):
    """An image of another size than the annotation file says.

    Attributes:
        size: the image's own (height, width).
    """

    def __init__(self, reason: str, size: tuple[int, int]) -> None:
        super().__init__(WRONG_SIZE, reason)
        self.size = size


def check_image_file(file: ImageFile, full: bool) -> tuple[int, int]:
    """(height, width) of an image file.

    Args:
        file: the image.
        full: decode it wholly; otherwise its header and end are read.

    Raises:
        Fault: missing, unreadable or too large.
        OtherSize: of another size than declared.
    """
    try:
        header = read_header(file.path)
        if full:
            # Whatever the range of its values, which is the whole set's to tell.
            height, width = read_image(file.path, value_range=(0, 1)).shape[:2]
            header = ImageHeader(width, height, header.rotated)
    except ImageError as error:
        where = f" ({error.path})" if error.kind == "missing file" else ""
        raise Fault(error.kind, error.reason + where) from None
    found = (header.height, header.width)
    if (file.height, file.width) == (None, None) or found == (file.height, file.width):
        return found
    reason = f"is {header.width}x{header.height}, the annotation file says {file.width}x{file.height}"
    if found == (file.width, file.height):
        reason += (
            " (its size before the EXIF rotation, which is applied on reading)"
            if header.rotated
            else " (width and height swapped)"
        )
    raise OtherSize(reason, found)


def check_image_files(files: Sequence[ImageFile], check: ImageCheck) -> Iterator[tuple[int, int] | Fault]:
    """For each image in order, its (height, width) or what is wrong with it; in threads.

    With ``check="none"`` only images whose size isn't declared are opened.
    """

    def look(file: ImageFile) -> tuple[int, int] | Fault:
        if not file.path:
            return Fault(OUTSIDE, "file_name leads out of the image folder")
        if check == "none" and file.height is not None and file.width is not None:
            return file.height, file.width
        try:
            return check_image_file(file, check == "full")
        except OtherSize as fault:  # each without the frames that it was raised through
            return OtherSize(fault.reason, fault.size)
        except Fault as fault:
            return Fault(fault.kind, fault.reason)

    if len(files) < 64 or check == "none":
        yield from map(look, files)
        return
    # Threads: most of the time goes into waiting for the disk and into Pillow's C code.
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        # In parts: the pool takes up two kilobytes for each that waits.
        for start in range(0, len(files), 4096):
            yield from pool.map(look, files[start : start + 4096])
