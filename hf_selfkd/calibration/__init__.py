"""Exit policies from held-out logits: the search for thresholds, and guarantees."""

from .calibrate import calibrate, fit_policy, gather_evidence, solve
from .risk_control import best_stake, betting_p_value, binomial_p_value, certify
from .search import Evidence

__all__ = [
    "Evidence",
    "best_stake",
    "betting_p_value",
    "binomial_p_value",
    "calibrate",
    "certify",
    "fit_policy",
    "gather_evidence",
    "solve",
]
