"""Errors that a user sees as one line."""

import contextlib
import difflib
import os
import re
import socket
import sys

import torch
from tqdm import tqdm


class UserError(Exception):
    """One clear line for the user: what is wrong and what to do."""

    def __str__(self):  # what comes from a file or its name must not reach a terminal as it is
        return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


def one_line(error):
    """What an error says, in one line and not too long"""
    return ' '.join(str(error).split())[:200] or type(error).__name__


def truncate(name, n=40):
    """A name as there is room for in a picture or a line"""
    return name if len(name) <= n else f'{name[: n - 1]}…'


def index_of_name(text, names, what):
    """'8' or 'Black_Hair' -> 8; raises UserError with the nearest names"""
    if re.fullmatch(r'-?\d+', text):
        if not 0 <= int(text) < len(names):
            raise UserError(f'{what} {text} is out of range: there are 0 to {len(names) - 1}')
        return int(text)
    if text not in names:
        near = difflib.get_close_matches(text, names, cutoff=0) or names
        raise UserError(f'unknown {what} {text!r}: the nearest are {", ".join(near)}')
    return names.index(text)


@contextlib.contextmanager
def warn_on_error(what):
    """For what is not worth a training: a UserError or a singular matrix in it is printed, and that is all"""
    try:
        yield
    except (UserError, torch.linalg.LinAlgError) as error:
        tqdm.write(f'no {what}: {error}')


@contextlib.contextmanager
def exit_on_user_error(name):
    """Ends the program with exit code 2 and one line on stderr, printed only once per machine where all its processes have
    the error in common."""
    try:
        yield
        return
    except (UserError, OSError, torch.linalg.LinAlgError) as error:
        common, message = isinstance(error, UserError), str(error)
    except torch.cuda.OutOfMemoryError:
        common, message = (
            False,
            'out of GPU memory: lower --batch_size or the model, or add --checkpoint_grads',
        )
    except (RuntimeError, ValueError) as error:
        if 'WORLD_SIZE' not in os.environ or not re.search(
            'gloo|nccl|connect|clients|rendezvous', str(error), re.IGNORECASE
        ):
            raise
        process = f'process {os.environ.get("RANK", 0)} on {socket.gethostname()}'
        common, message = (
            False,
            f'{process} stops, having lost another one or found none: {one_line(error)}',
        )
    except KeyboardInterrupt:
        common, message = True, 'interrupted'
    if not common or int(os.environ.get('LOCAL_RANK', 0)) == 0:
        print(f'{name}.py: error: {message}', file=sys.stderr)
    sys.exit(2)
