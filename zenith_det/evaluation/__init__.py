"""COCO evaluation without an engine: AP, its explanation, its tables, and result files.

results = evaluate_coco(ground_truth, detections, ("bbox", "segm"), class_names=names)
log_results(results, explain_results(results, ground_truth, detections, score_threshold=0.05))
"""

from zenith_det.evaluation.coco import (
    COCO_OKS_SIGMAS,
    METRICS,
    Results,
    SizeBin,
    evaluate_by_size,
    evaluate_coco,
    finite_scalars,
    infer_tasks,
)
from zenith_det.evaluation.evaluated_weights import (
    EVALUATED_FILE,
    EvaluatedWeights,
    forget_weights,
    note_weights,
    noted_weights,
)
from zenith_det.evaluation.expected import check_expected
from zenith_det.evaluation.explain import explain_results
from zenith_det.evaluation.explained import log_explanations, read_explanations, write_explanations
from zenith_det.evaluation.judging import Judgement, judge
from zenith_det.evaluation.masks import decode_masks, encode_masks
from zenith_det.evaluation.recommended import (
    RECOMMENDED_FILE,
    RecommendedScore,
    note_recommended,
    noted_recommended,
)
from zenith_det.evaluation.results import (
    RESULTS_FILE,
    ResultsWriter,
    check_results,
    detections_to_results,
    write_results,
)
from zenith_det.evaluation.tables import copypaste_lines, log_results, results_table

__all__ = [
    "COCO_OKS_SIGMAS",
    "EVALUATED_FILE",
    "METRICS",
    "RECOMMENDED_FILE",
    "RESULTS_FILE",
    "EvaluatedWeights",
    "Judgement",
    "RecommendedScore",
    "Results",
    "ResultsWriter",
    "SizeBin",
    "check_expected",
    "check_results",
    "copypaste_lines",
    "decode_masks",
    "detections_to_results",
    "encode_masks",
    "evaluate_by_size",
    "evaluate_coco",
    "explain_results",
    "finite_scalars",
    "forget_weights",
    "infer_tasks",
    "judge",
    "log_explanations",
    "log_results",
    "note_recommended",
    "note_weights",
    "noted_recommended",
    "noted_weights",
    "read_explanations",
    "results_table",
    "write_explanations",
    "write_results",
]
