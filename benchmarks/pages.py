"""Markdown tables, and the pages that scripts write them into."""

import math
from collections.abc import Iterable
from pathlib import Path

END_MARK = '<!-- until here -->'


def significant(value: float | None) -> str:
    """Round to three significant digits, without an exponent: 0.0123, 4.56, 1,230.

    ``None``, where nothing was measured, gives an empty string, and infinity "out of memory".
    """
    if value is None:
        return ''
    if not math.isfinite(value):
        return 'out of memory'
    if value == 0:
        return '0'

    digits = 2 - math.floor(math.log10(abs(value)))
    return f'{round(value, digits):,.{max(0, digits)}f}'


def table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Return a Markdown table, one line per row, with a line break at its end."""
    header = list(header)
    lines = [header, ['---'] * len(header), *rows]
    return ''.join(f'| {" | ".join(map(str, cells))} |\n' for cells in lines)


def insert(page: Path, script: str, text: str) -> None:
    """Replace what stands between the marks of ``script`` in a page by ``text``.

    The marks are ``<!-- what SCRIPT wrote -->`` and the next ``<!-- until here -->``. Raises
    ``ValueError`` where the page does not have them.
    """
    begin_mark = f'<!-- what {script} wrote -->'
    before, _, rest = page.read_text().partition(begin_mark)
    _, end_mark, after = rest.partition(END_MARK)
    if not end_mark:
        raise ValueError(f'{page} has no {begin_mark} ... {END_MARK}')
    page.write_text(f'{before}{begin_mark}\n\n{text}\n{END_MARK}{after}')
