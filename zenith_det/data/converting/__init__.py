"""Datasets in other formats (YOLO, Pascal VOC, labelme) made into COCO-format annotation files."""

from __future__ import annotations

from zenith_det.data.converting.convert import FORMATS, Conversion, convert_folder, find_format

__all__ = ["FORMATS", "Conversion", "convert_folder", "find_format"]
