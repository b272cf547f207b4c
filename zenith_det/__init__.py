"""zenith_det: train Faster, Mask and Keypoint R-CNN without guessing a learning-rate schedule.

Importing this package is light: it brings in neither torchvision nor Detectron2; an engine does,
when one is asked for.
"""

__version__ = "0.1.0"
