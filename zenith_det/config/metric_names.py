"""What ``CHECKPOINT.BEST`` and ``TEST.EARLY_STOPPING`` call the metrics of an evaluation."""

#: Each task of COCO's evaluation, and what people call it.
TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
#: Before the name of an AP: that of the averaged weights.
AVERAGED = "averaged "
#: After the name of a task, as in Detectron2: evaluated with test-time augmentation (``TEST.AUG``).
TTA = "_TTA"
#: The AP of each task, under its name in COCO's evaluation.
TASK_APS = {f"{name} AP": f"{task}/AP" for task, name in TASKS.items()}
APS = (*TASK_APS, *(AVERAGED + name for name in TASK_APS))
VALIDATION_LOSS = "validation loss"
#: What the names of an evaluation's scalars begin with, after those of the averaged weights and of the test set.
EVALUATED = (*TASKS, "box_proposals", "sem_seg", "panoptic_seg", "validation_loss")


def is_evaluated(name: str, *, tta: bool = False) -> bool:
    """Whether a scalar of ``metrics.json`` is an evaluation's; ``tta``: one with test-time augmentation."""
    return any(f"/{task}{TTA if tta else ''}/" in f"/{name}" for task in EVALUATED)


def with_tta(name: str) -> str:
    """What a scalar is called that was evaluated with test-time augmentation: ``bbox_TTA/AP`` for ``bbox/AP``."""
    task, slash, metric = name.partition("/")
    return f"{task}{TTA}{slash}{metric}"
