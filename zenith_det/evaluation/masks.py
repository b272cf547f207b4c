"""Instance masks as COCO's compressed run-length encoding (RLE), and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as coco_mask

BoolMasks = npt.NDArray[np.bool_]


def encode_masks(masks: npt.ArrayLike) -> list[dict[str, Any]]:
    """Compress masks.

    Args:
        masks: (N, H, W), bool or 0/1 integers; a NumPy array or anything ``numpy.asarray`` takes
            (a CPU tensor does).

    Returns:
        N dicts ``{"size": [H, W], "counts": str}``; the counts are text, so JSON takes them as they are.

    Raises:
        ValueError: ``masks`` has not three dimensions.
    """
    array = np.asarray(masks)
    if array.ndim != 3:
        raise ValueError(f"masks must have shape (N, H, W), got {array.shape}")
    encoded = []
    for mask in array:
        # One mask at a time: Fortran order needs a copy, and N full-size copies at once are a lot of memory.
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        encoded.append({"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")})
    return encoded


def decode_masks(rles: Sequence[dict[str, Any]], size: tuple[int, int] | None = None) -> BoolMasks:
    """Decompress masks of one image.

    Args:
        rles: dicts ``{"size": [H, W], "counts": str | bytes}``, all of one size.
        size: (H, W), only needed to give an empty list its shape.

    Returns:
        bool (N, H, W).

    Raises:
        ValueError: the sizes differ from one another or from ``size``, or ``rles`` is empty without a
            ``size``.
    """
    sizes = {(int(rle["size"][0]), int(rle["size"][1])) for rle in rles}
    if size is not None:
        sizes.add((int(size[0]), int(size[1])))
    if len(sizes) != 1:
        raise ValueError(f"masks of one image must have one size, got {sorted(sizes) or 'none'}")
    height, width = sizes.pop()
    out = np.zeros((len(rles), height, width), dtype=bool)
    for index, rle in enumerate(rles):
        out[index] = coco_mask.decode(dict(rle)).astype(bool)
    return out
