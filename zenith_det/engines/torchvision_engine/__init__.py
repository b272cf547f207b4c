"""The built-in engine: Detectron2's R-CNN recipe on torchvision, from the package index alone."""
