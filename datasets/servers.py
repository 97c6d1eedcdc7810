"""Servers of strangers: what they answer is read in limited time and memory.

requests leaves three things open: how slowly a server may send, how long the lines of its answer
may be where urllib3 reads them, and what is raised where an answer is none that HTTP allows.
"""

import contextlib
import http.client
import io
import time
from collections.abc import Iterator
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import BaseHTTPError

from common.errors import one_line

SLOW_BYTES = 2**16  # a server is too slow if fewer bytes than these
SLOW_SECONDS = 60  # arrive in these seconds of waiting
MAX_LINE = 2**16  # bytes of a header or of the size of a chunk
MAX_LINES = 2**23  # bytes of all lines of an answer; its content is not made of lines


class TransferError(requests.RequestException):
    """A server answered, but not with the content that was asked for."""


class BadAnswer(Exception):
    """An answer goes beyond a limit, or is no HTTP.

    It is no ``OSError``, which urllib3 would take for a lost connection.
    """


def open_session() -> requests.Session:
    """Return a session whose answers are read within the limits above."""
    session = requests.Session()
    session.mount('http://', BoundedAdapter())
    session.mount('https://', BoundedAdapter())
    session.hooks['response'].append(skip_content_of_redirect)
    # Ranges and checksums refer to the file itself, not to a compressed form of it.
    session.headers['Accept-Encoding'] = 'identity'
    return session


def skip_content_of_redirect(response: requests.Response, **options: Any) -> None:
    """Close a redirect before requests reads its content, which may be endless, into memory."""
    if response.is_redirect:
        response.close()


@contextlib.contextmanager
def report_bad_answer() -> Iterator[None]:
    """Raise ``TransferError`` where an answer is none that HTTP allows.

    requests passes on some errors of urllib3 and of the standard library as they are. Those of the
    library are ``ValueError`` where a URL or a number cannot be read.
    """
    try:
        yield
    except requests.RequestException:
        raise
    except BadAnswer as error:
        raise TransferError(str(error)) from error
    except (BaseHTTPError, http.client.HTTPException, ValueError) as error:
        raise TransferError(f'its answer is malformed: {one_line(error)}') from error


class BoundedAdapter(HTTPAdapter):
    """Connections whose answers are read by ``BoundedAnswer``."""

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        """Return the connection pool of a request, as requests documents it for subclasses."""
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        connection_class = pool.ConnectionCls
        if connection_class.response_class is not BoundedAnswer:
            members = {'response_class': BoundedAnswer}
            pool.ConnectionCls = type('BoundedConnection', (connection_class,), members)
        return pool


class BoundedAnswer(http.client.HTTPResponse):
    """An answer that raises ``BadAnswer`` where it is sent too slowly, or is no HTTP."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fp = LineLimitReader(PacedSource(self.fp.detach()))

    def begin(self) -> None:
        """Read the status line and the headers."""
        try:
            super().begin()
        except http.client.RemoteDisconnected:
            raise
        except http.client.HTTPException as error:
            raise BadAnswer(f'its answer is no HTTP: {one_line(error)}') from error


class LineLimitReader(io.BufferedReader):
    """A buffer that never takes in more than a limited number of bytes at once.

    urllib3 reads the size of a chunk as a line of any length, and as many bytes as it says, which
    is all there are where it is -1.
    """

    n_line_bytes = 0

    def readline(self, size: int | None = -1) -> bytes:
        """Return the next line, or its first bytes where it is too long."""
        is_limited = size is not None and size >= 0
        line = super().readline(size if is_limited else MAX_LINE)
        self.n_line_bytes += len(line)
        if self.n_line_bytes > MAX_LINES:
            raise BadAnswer('it sends headers without end')
        return line

    def read(self, size: int | None = -1) -> bytes:
        """Return the next ``size`` bytes, or fewer at the end."""
        if size is None or size < 0:
            raise BadAnswer('its answer is malformed: it has a chunk of negative size')
        return super().read(size)


class PacedSource(io.RawIOBase):
    """The bytes that a socket receives. Reading raises ``BadAnswer`` where they come too slowly.

    Only the time spent waiting for the server counts.
    """

    def __init__(self, source: io.RawIOBase) -> None:
        self.source = source
        self.n_bytes = 0
        self.seconds = 0.0

    def readable(self) -> bool:
        """Return True, as a buffer requires."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read the bytes that are there into a buffer, after waiting for the first of them."""
        start = time.monotonic()
        n = self.source.readinto(buffer)
        self.seconds += time.monotonic() - start
        self.n_bytes += n or 0

        if self.n_bytes >= SLOW_BYTES:
            self.n_bytes = 0
            self.seconds = 0.0
        elif self.seconds > SLOW_SECONDS:
            raise BadAnswer('it sends too slowly')
        return n

    def close(self) -> None:
        """Close the socket's file."""
        self.source.close()
        super().close()
