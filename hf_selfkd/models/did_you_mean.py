"""Suggestions for misspelled names in error messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` with the closest of ``words``, or ``""`` if none is close."""
    matches = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
