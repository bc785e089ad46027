"""Evaluation of multi-exit models: costs, curves, and metrics of every exit."""

from .classification import calibration_error, compute_class_metrics, reduce_class_logits
from .costs import exit_costs, exit_latencies, exit_parameters, measure_throughput
from .curves import anytime_curve, budgeted_curve, collect_logits, plot_curves, to_table
from .multi_label import compute_binary_metrics, mean_average_precision, reduce_binary_logits
from .per_class import ClassCounts, ConfusionMatrices, class_rows, plot_confusion, write_class_scores, write_confusion
from .segmentation import compute_segmentation_metrics, reduce_pixel_logits

__all__ = [
    "ClassCounts",
    "ConfusionMatrices",
    "anytime_curve",
    "budgeted_curve",
    "calibration_error",
    "class_rows",
    "collect_logits",
    "compute_binary_metrics",
    "compute_class_metrics",
    "compute_segmentation_metrics",
    "exit_costs",
    "exit_latencies",
    "exit_parameters",
    "mean_average_precision",
    "measure_throughput",
    "plot_confusion",
    "plot_curves",
    "reduce_binary_logits",
    "reduce_class_logits",
    "reduce_pixel_logits",
    "to_table",
    "write_class_scores",
    "write_confusion",
]
