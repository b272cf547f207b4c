"""What ``CHECKPOINT.BEST`` and ``TEST.EARLY_STOPPING`` call the metrics of an evaluation."""

#: Each task of COCO's evaluation, and what people call it.
TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
#: Before the name of an AP: that of the averaged weights.
AVERAGED = "averaged "
#: The AP of each task, under its name in COCO's evaluation.
TASK_APS = {f"{name} AP": f"{task}/AP" for task, name in TASKS.items()}
APS = (*TASK_APS, *(AVERAGED + name for name in TASK_APS))
VALIDATION_LOSS = "validation loss"
