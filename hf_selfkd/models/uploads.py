"""Uploads to the Hub that say why they failed."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def explained_upload(repo_id: str, kept: str) -> Iterator[None]:
    """Turn whatever breaks an upload into an OSError that names the reason, what is kept and what to do.

    Args:
        repo_id: Where the upload goes.
        kept: What is not lost.
    """
    try:
        yield
    except (TypeError, ValueError):  # a wrong argument or an invalid card: says all itself
        raise
    except Exception as error:
        raise OSError(
            f"Could not upload to {repo_id}: {reason_of(error)}. {kept} "
            "Push again: what has arrived is not sent twice."
        ) from error


def reason_of(error: BaseException) -> str:
    """Tell an error and what caused it, in one line."""
    told: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}".rstrip(".: ")
        if reason not in told:  # HTTP clients wrap each other's
            told.append(reason)
        cause = cause.__cause__
    return ", because of ".join(told)
