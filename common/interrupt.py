"""Ctrl-C while a script is imported.

This module imports nothing that takes time, so that a script can import it before all else.
"""

import os
import signal
import sys


def exit_on_interrupt() -> None:
    """From here on, let Ctrl-C end the process with one line and exit code 2.

    Where SIGINT is ignored, as in a background job of a shell, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_at_once)


def exit_at_once(number: int, frame: object) -> None:
    """End the process. An exception could be caught, or changed to another, by what is imported."""
    if int(os.environ.get('LOCAL_RANK', 0)) == 0:
        line = f'{os.path.basename(sys.argv[0])}: error: interrupted\n'
        try:
            os.write(2, line.encode(errors='replace'))
        except OSError:  # nobody would see it
            pass
    os._exit(2)
