"""What ``CHECKPOINT.BEST`` and ``TEST.EARLY_STOPPING`` call the metrics of an evaluation."""

#: Before the name of an AP: that of the averaged weights.
AVERAGED = "averaged "
#: The AP of each task, under its name in COCO's evaluation.
TASK_APS = {"box AP": "bbox/AP", "mask AP": "segm/AP", "keypoint AP": "keypoints/AP"}
APS = (*TASK_APS, *(AVERAGED + name for name in TASK_APS))
VALIDATION_LOSS = "validation loss"
