"""Reading of model cards: tables, sections and BibTeX keys."""

import re


def table_of(text: str, first: str) -> list[dict[str, str]]:
    """Read the Markdown table whose first column has a title."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {first} |"))
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    return [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]


def sections_of(text: str) -> dict[str, str]:
    """Split a card's text at its second-level headings."""
    _, *parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def cited_by(text: str) -> list[str]:
    """Return the keys of the BibTeX entries."""
    return re.findall(r"@\w+{(\w+),", text)


def percents_of(text: str) -> list[float]:
    """Return all percentages."""
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]
