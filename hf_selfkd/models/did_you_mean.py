"""Suggestions for misspelt names."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, words: Iterable[str], n: int = 1) -> str:
    """Return a question that names the up to ``n`` closest of ``words``, to append to an error; "" if none is close.

    Example:
        >>> did_you_mean("entropie", ["entropy", "margin"])
        " Did you mean 'entropy'?"
    """
    near = difflib.get_close_matches(word, words, n=n)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
