"""A model card on disk, next to the facts that it was rendered from."""

import hashlib
import json
import warnings
from pathlib import Path

from huggingface_hub import ModelCard

from .facts import CardFacts

CARD = "README.md"
FACTS = "card_facts.json"
# Where the card goes if README.md was edited.
NEW_CARD = "README.new.md"


def save_card(card: ModelCard, facts: CardFacts, folder: Path) -> None:
    """Write a card and its facts into a folder; a ``README.md`` that was edited since is left as it is.

    Warns:
        UserWarning: If ``README.md`` was edited. The card is then written to ``README.new.md``.
    """
    text = f"{str(card).rstrip()}\n"
    name = NEW_CARD if is_edited(folder) else CARD
    if name == NEW_CARD:
        warnings.warn(
            f"{folder / CARD} was edited, or not written by hf_selfkd, so it is left as it is. The new card is "
            f"{folder / NEW_CARD}: copy your text into it and rename it, or delete {CARD} before the next save.",
            stacklevel=4,
        )
    (folder / name).write_text(text, encoding="utf-8")
    record = {"card_sha256": _digest(text), "facts": vars(facts)}
    (folder / FACTS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_facts(folder: Path) -> CardFacts | None:
    """Return the facts of the card in a folder, ``None`` if it has none.

    Raises:
        ValueError: If the file cannot be read.
    """
    path = folder / FACTS
    if not path.exists():
        return None
    try:
        return CardFacts(**json.loads(path.read_text(encoding="utf-8"))["facts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold the facts of a model card ({error!r}). Delete it.") from error


def as_stored(facts: CardFacts) -> CardFacts:
    """Return facts as :func:`load_facts` will, so that rendering them later gives the same card."""
    return CardFacts(**json.loads(json.dumps(vars(facts), default=str)))


def is_edited(folder: Path) -> bool:
    """Whether a folder has a card that differs from the one that :func:`save_card` wrote last."""
    if not (folder / CARD).exists():
        return False
    try:
        known = json.loads((folder / FACTS).read_text(encoding="utf-8"))["card_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return known != _digest((folder / CARD).read_text(encoding="utf-8"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
