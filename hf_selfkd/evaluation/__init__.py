"""What a multi-exit model is worth: costs, curves, and metrics of every exit."""

from .classification import calibration_error, compute_exit_metrics, reduce_to_answers, summarise_answers
from .costs import exit_costs, exit_latencies, exit_parameters, measure_throughput
from .curves import anytime_curve, budgeted_curve, collect_logits, plot_curves, to_table
from .segmentation import compute_pixel_metrics, reduce_to_pixel_counts

__all__ = [
    "anytime_curve",
    "budgeted_curve",
    "calibration_error",
    "collect_logits",
    "compute_exit_metrics",
    "compute_pixel_metrics",
    "exit_costs",
    "exit_latencies",
    "exit_parameters",
    "measure_throughput",
    "plot_curves",
    "reduce_to_answers",
    "reduce_to_pixel_counts",
    "summarise_answers",
    "to_table",
]
