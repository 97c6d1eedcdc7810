"""Errors that the user can fix. They are raised anywhere and reported in one line."""

import argparse
import contextlib
import difflib
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from tqdm import tqdm


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what was wrong and what to do."""

    def __str__(self) -> str:
        """Return the text with unprintable characters escaped.

        They may come from a file or from its name, and must not control a terminal.
        """
        text = super().__str__()
        return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserErrorParser(argparse.ArgumentParser):
    """A parser of command lines that raises ``UserError`` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ``UserError``, with a pointer to ``--help``."""
        raise UserError(f'{message} (see {self.prog} --help)')


@contextlib.contextmanager
def exit_on_user_error(script: str) -> Iterator[None]:
    """Turn expected errors into one line on stderr and exit code 2.

    An error that all processes have in common is printed by the first process of each machine
    only. Any other exception passes through: it is a bug, and its traceback is wanted.
    """
    try:
        yield
        return
    except UserError as error:
        message, is_common = str(error), True
    except KeyboardInterrupt:
        message, is_common = 'interrupted', True
    except (OSError, torch.linalg.LinAlgError) as error:
        message, is_common = str(error), False
    except torch.cuda.OutOfMemoryError:
        message = 'out of GPU memory: lower --batch_size or the model, or add --checkpoint_grads'
        is_common = False
    except (RuntimeError, ValueError) as error:
        if not is_lost_connection(error):
            raise
        process = f'process {os.environ.get("RANK", 0)} on {socket.gethostname()}'
        message = f'{process} lost, or never reached, another process: {one_line(error)}'
        is_common = False

    if not is_common or int(os.environ.get('LOCAL_RANK', 0)) == 0:
        print(f'{script}.py: error: {message}', file=sys.stderr)
    sys.exit(2)


def is_lost_connection(error: Exception) -> bool:
    """Return whether an error of torch.distributed says that another process is gone."""
    words = 'gloo|nccl|connect|clients|rendezvous'
    return 'WORLD_SIZE' in os.environ and bool(re.search(words, str(error), re.IGNORECASE))


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

    Raises ``UserError`` with the nearest names, or with the range of indices. ``what`` says in
    that message what is named, such as ``'column'``.
    """
    if re.fullmatch(r'-?\d+', text):
        if not 0 <= int(text) < len(names):
            raise UserError(f'{what} {text} is out of range: there are 0 to {len(names) - 1}')
        return int(text)

    if text not in names:
        nearest = difflib.get_close_matches(text, names, cutoff=0) or names
        raise UserError(f'unknown {what} {text!r}: the nearest are {", ".join(nearest)}')
    return names.index(text)
