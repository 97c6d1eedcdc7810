"""Ctrl-C, and output that nobody reads any more."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from .interrupt import exit_at_once


@contextlib.contextmanager
def raise_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise ``KeyboardInterrupt`` inside, as it did before ``exit_on_interrupt``."""
    if signal.getsignal(signal.SIGINT) is not exit_at_once:
        yield
        return

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, exit_at_once)


class LossyStream:
    """Standard output or standard error, whose loss does not end the program.

    Once something cannot be written, because the reader is gone, the terminal is closed or the disk
    is full, this and all that follows is dropped. ``error`` says why, and is None before.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        with self.drop_on_error():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written, or drop it."""
        with self.drop_on_error():
            self.stream.flush()

    @contextlib.contextmanager
    def drop_on_error(self) -> Iterator[None]:
        """Where writing fails, let the descriptor lead nowhere, with all that is still buffered."""
        try:
            yield
        except OSError as error:
            self.error = error
            with contextlib.suppress(OSError):
                descriptor = self.stream.fileno()
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


@contextlib.contextmanager
def lossy_output() -> Iterator[LossyStream]:
    """Go on inside when standard output or standard error is lost. Yields standard output."""
    open_closed_streams()
    output, errors = LossyStream(sys.stdout), LossyStream(sys.stderr)
    as_output: Any = output
    as_errors: Any = errors
    with contextlib.redirect_stdout(as_output), contextlib.redirect_stderr(as_errors):
        try:
            yield output
        finally:
            output.flush()
            errors.flush()


def open_closed_streams() -> None:
    """Open the null device for standard streams that were closed when the program started.

    Otherwise the next file that is opened would get the descriptor of the closed stream, and with
    it what libraries write there.
    """
    for descriptor, name in enumerate(('stdin', 'stdout', 'stderr')):
        if getattr(sys, name) is None:
            mode = 'w' if descriptor else 'r'
            setattr(sys, name, open(os.devnull, mode))
