"""Model cards for the Hub, from the facts of a run."""

from .card import card_metadata, exit_rows, update_model_card, write_model_card
from .facts import CardFacts, collect_facts

__all__ = ["CardFacts", "card_metadata", "collect_facts", "exit_rows", "update_model_card", "write_model_card"]
