"""Model cards for the Hub, rendered from the facts of a run."""

from .card import card_metadata, update_model_card, write_model_card
from .facts import CardFacts, collect_facts, method_facts
from .values import exit_rows

__all__ = [
    "CardFacts",
    "card_metadata",
    "collect_facts",
    "exit_rows",
    "method_facts",
    "update_model_card",
    "write_model_card",
]
