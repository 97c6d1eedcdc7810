"""Errors that the user can fix. They are raised anywhere and reported in one line."""

import argparse
import contextlib
import difflib
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from .terminal import lossy_output, raise_interrupts

# Characters of a name, of a path, and of the text of an error. No name of a file is longer.
MAX_NAME, MAX_PATH, MAX_TEXT = 255, 600, 10_000
MAX_COMPARED = 2**24  # pairs of characters, of a text and of the names among which it is looked for
LONG_NAME = rf'[^\s,;=/\\\'"]{{{MAX_NAME + 1},}}'
LONG_PATH = rf'[^\s,;=\'"]{{{MAX_PATH + 1},}}'


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what was wrong and what to do."""

    def __str__(self) -> str:
        """Return the text with unprintable characters escaped, and with long names shortened.

        They may come from a file or from its name, and must not control or fill a terminal.
        """
        return shorten_names(printable(super().__str__()))


def printable(text: str) -> str:
    """Return a text with unprintable characters escaped, as from the name of a stranger's file."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shorten_names(text: str) -> str:
    """Return a text in which long names and paths, and then the text, have lost their middle.

    Lists of short names stay whole, such as those of columns to drop.
    """
    text = re.sub(LONG_NAME, lambda found: without_middle(found[0], MAX_NAME), text)
    text = re.sub(LONG_PATH, lambda found: without_middle(found[0], MAX_PATH), text)
    return without_middle(text, MAX_TEXT)


def without_middle(text: str, n: int) -> str:
    """Return a text of at most ``n`` characters, the middle of a longer one replaced by ``…``."""
    if len(text) <= n:
        return text
    n_end = n // 3
    return f'{text[: n - n_end - 1]}…{text[-n_end:]}'


class UserErrorParser(argparse.ArgumentParser):
    """A parser of command lines that raises ``UserError`` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ``UserError``, with a pointer to ``--help``."""
        raise UserError(f'{message} (see {self.prog} --help)')


@contextlib.contextmanager
def exit_on_user_error(script: str) -> Iterator[None]:
    """Turn expected errors into one line on stderr and exit code 2.

    Output that cannot be written is such an error too, but does not interrupt the work. Any other
    exception passes through: it is a bug, and its traceback is wanted.
    """
    with lossy_output() as output:
        try:
            with raise_interrupts():
                yield
                output.flush()
                if output.error:
                    raise UserError(f'the output cannot be written: {output.error.strerror}')
        except (Exception, KeyboardInterrupt) as error:
            if error_line(error) is None:
                raise
            report_error(script, error)
            sys.exit(2)


def report_error(script: str, error: BaseException, store: Any = None) -> None:
    """Print the line of an expected error, unless this or another process has printed it.

    ``store`` is shared by the processes of one start. Without it, the first process of each machine
    prints what all processes have in common.
    """
    line = error_line(error)
    if line is None or getattr(error, 'is_reported', False):
        return
    error.is_reported = True  # type: ignore[attr-defined]

    if store is not None:
        is_ours = claim_report(line, is_lost_connection(error), store)
    else:
        is_common = isinstance(error, (UserError, KeyboardInterrupt))
        is_ours = not is_common or int(os.environ.get('LOCAL_RANK', 0)) == 0
    if is_ours:
        print(f'{script}.py: error: {line}', file=sys.stderr)


def claim_report(line: str, is_lost: bool, store: Any) -> bool:
    """Return whether this process is the one to print a line.

    The first process that has the line prints it. A lost connection (``is_lost``) is worth a line
    only if no process has reported why it ended.
    """
    try:
        if is_lost:
            return store.add('errors', 0) == 0
        store.add('errors', 1)
        return store.add(f'error: {line}', 1) == 1
    except RuntimeError:  # the store is gone, and with it the launcher or the first process
        return True


def error_line(error: BaseException) -> str | None:
    """Return what to print of an expected error, and None of a bug."""
    if isinstance(error, KeyboardInterrupt):
        return 'interrupted'
    if isinstance(error, (UserError, OSError, torch.linalg.LinAlgError)):
        return shorten_names(printable(str(error)))
    advice = 'lower --batch_size or the model, or add --checkpoint_grads'
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f'out of GPU memory: {advice}'
    if is_out_of_memory(error):
        return f'out of memory: {advice}'
    if is_lost_connection(error):
        process = f'process {os.environ.get("RANK", 0)} on {socket.gethostname()}'
        return f'{process} lost, or never reached, another process: {one_line(error)}'
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is too little memory, other than a GPU's."""
    words = 'DefaultCPUAllocator|not enough memory|std::bad_alloc'
    is_of_torch = isinstance(error, RuntimeError) and bool(re.search(words, str(error)))
    return is_of_torch or isinstance(error, MemoryError)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error of torch.distributed says that another process is gone."""
    words = 'gloo|nccl|connect|clients|rendezvous'
    is_of_torch = isinstance(error, (RuntimeError, ValueError)) and 'WORLD_SIZE' in os.environ
    return is_of_torch and bool(re.search(words, str(error), re.IGNORECASE))


@contextlib.contextmanager
def warn_on_error(what: str) -> Iterator[None]:
    """Log errors of an optional side product instead of ending the training."""
    try:
        yield
    except (UserError, torch.linalg.LinAlgError) as error:
        tqdm.write(f'no {what}: {error}')


def one_line(error: BaseException) -> str:
    """Return the text of an error, or its type where it has none, in at most 200 characters."""
    return ' '.join(str(error).split())[:200] or type(error).__name__


def truncate(name: str, n: int = 40) -> str:
    """Shorten a name to ``n`` characters, for a picture or a line of text."""
    return name if len(name) <= n else f'{name[: n - 1]}…'


def index_of_name(text: str, names: Sequence[str], what: str) -> int:
    """Return the index that ``text`` means: ``'8'`` is 8, ``'Black_Hair'`` is its place in names.

    A name that is a number, such as ``'2021'``, counts where it is no index. Raises ``UserError``
    with the nearest names, or with the range of indices. ``what`` says in that message what is
    named, such as ``'column'``.
    """
    place = names.index(text) if text in names else None
    if re.fullmatch(r'-?\d+', text):
        is_index = 0 <= int(text) < len(names)
        if is_index and place not in (None, int(text)):
            raise UserError(
                f'{what} {text} may be number {text} or number {place}, which has this name: '
                'rename it'
            )
        if is_index:
            return int(text)
        if place is None:
            raise UserError(f'{what} {text} is out of range: there are 0 to {len(names) - 1}')

    if place is None:
        nearest = nearest_names(text, names, n=3, cutoff=0) or names[:3]
        raise UserError(f'unknown {what} {text!r}: the nearest are {", ".join(nearest)}')
    return place


def nearest_names(text: str, names: Sequence[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the n names that are most similar to a text, without those below ``cutoff``.

    There are none where the names are so many, or so long, that looking for them takes seconds.
    """
    if len(text) * sum(map(len, names)) > MAX_COMPARED:
        return []
    return difflib.get_close_matches(text, names, n, cutoff)
