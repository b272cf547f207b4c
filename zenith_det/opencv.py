"""OpenCV's functions, for pictures, videos and generated images: ``from zenith_det import opencv as cv2``.

opencv-python and opencv-python-headless install the same module ``cv2``, the one that comes last over the other. So
this package requires neither, takes what is there, and says what to install when a function is asked for and there is
none.
"""

from __future__ import annotations

import importlib
from typing import Any

from zenith_det.errors import MissingLibraryError

HOW_TO_INSTALL = (
    "pip install opencv-python-headless (or opencv-python, which also opens windows: one of them, as they are the "
    "same module)"
)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            told = f"OpenCV is needed to draw and isn't installed: {HOW_TO_INSTALL}"
        else:  # a library of the screen's is missing, most often
            told = (
                f"OpenCV can't be imported ({error}): pip uninstall opencv-python, then pip install "
                "opencv-python-headless"
            )
        raise MissingLibraryError(told) from error
    return getattr(cv2, name)
