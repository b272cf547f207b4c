"""Mask R-CNN, R50-FPN, on COCO with ZENITH: a LazyConfig file."""

from detectron2.model_zoo import get_config

from zenith_det.lazy import lr_multiplier, optimizer

train = get_config("common/train.py").train
model = get_config("common/models/mask_rcnn_fpn.py").model
dataloader = get_config("common/data/coco.py").dataloader

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
model.backbone.bottom_up.freeze_at = 2

optimizer.lr = 0.02
optimizer.window = 100
lr_multiplier.warmup_iters = 1000
