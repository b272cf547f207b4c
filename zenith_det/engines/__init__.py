"""The engines: the only places that import Detectron2 or torchvision's detection models."""
