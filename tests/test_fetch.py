"""``python -m datasets``: interrupted downloads, hostile archives, and errors of one line."""

import dataclasses
import functools
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_tables
from helpers import call_with_own_lock, needs_limits, needs_pipes
from tiny_data import attribute_rows, write_celeba, write_folder, write_mnist, write_table

from common.errors import UserError
from datasets import fetch, load_images, servers
from datasets.__main__ import main

CONTENT = np.random.default_rng(0).bytes(300_000)
CONTENT_MD5 = hashlib.md5(CONTENT).hexdigest()
HALF = 147_456  # bytes of CONTENT that arrive before a transfer breaks: whole blocks of 2**14

needs_fork = pytest.mark.skipif(
    'fork' not in multiprocessing.get_all_start_methods(),
    reason='starts its process by fork, which Windows does not have',
)


# ----------------------------------------------------------------------- a server that misbehaves


class RawAnswer(NamedTuple):
    """All that a server sends: first these bytes, then others again and again."""

    start: bytes
    repeated: bytes = b''
    n_times: int = 0
    pause: float = 0.0


def redirect_to(location: bytes) -> RawAnswer:
    """Return a redirect to an address."""
    return RawAnswer(b'HTTP/1.1 302 Found\r\nLocation: ' + location + b'\r\n\r\n')


def of_length(length: bytes) -> RawAnswer:
    """Return the content with a header that announces its length."""
    return RawAnswer(OK + b'Content-Length: ' + length + b'\r\n\r\n' + CONTENT)


OK = b'HTTP/1.1 200 OK\r\n'
CHUNKED = OK + b'Transfer-Encoding: chunked\r\n\r\n'
GZIPPED = OK + b'Content-Encoding: gzip\r\n\r\n' + gzip.compress(CONTENT)
CONTINUE = b'HTTP/1.1 100 Continue\r\n\r\n'

RAW_ANSWERS = {  # what the answer is: the answer, and part of the line about it
    'address without an end': (redirect_to(b'http://['), 'answer is malformed'),
    'address with a space': (redirect_to(b'http://a b:99999/'), 'answer is malformed'),
    'address that is no UTF-8': (redirect_to(b'http://\xff/'), 'answer is malformed'),
    'address without a host': (redirect_to(b'http://..../'), 'answer is malformed'),
    'address of another protocol': (redirect_to(b'ftp://x'), "adapters were found for 'ftp://x'"),
    'no address': (redirect_to(b''), '302 Found'),
    'length in letters': (of_length(b'abc'), 'length that no file has'),
    'negative length': (of_length(b'-5'), 'length that no file has'),
    'two lengths': (of_length(b'10, 20'), '10, 20'),
    'length in another digit': (of_length(b'\xb2'), 'length that no file has'),
    'length of many digits': (of_length(b'1' + b'0' * 30), 'length that no file has'),
    'length of too many digits': (of_length(b'1' * 5000), 'length that no file has'),
    'compressed content': (RawAnswer(GZIPPED), 'in the encoding gzip'),
    'size of a chunk in letters': (RawAnswer(CHUNKED + b'zz\r\nabc'), 'broke off'),
    'negative size of a chunk': (RawAnswer(CHUNKED + b'-5\r\nabc'), 'negative size'),
    'chunk of all that comes': (RawAnswer(CHUNKED + b'-1\r\nabc'), 'negative size'),
    'no status': (RawAnswer(b'hello\r\n\r\n'), 'no HTTP: hello'),
    'status that is no number': (RawAnswer(b'HTTP/1.1 abc OK\r\n\r\n'), 'no HTTP'),
    'status without a file': (RawAnswer(b'HTTP/1.1 204 Empty\r\n\r\n'), '204 Empty'),
    'range that is not asked for': (RawAnswer(b'HTTP/1.1 416 No\r\n\r\n'), '416 No'),
    'many headers': (RawAnswer(OK, b'a: b\r\n', 1000), 'no HTTP: got more than'),
    'long header': (RawAnswer(OK, b'a' * 1000, 100), 'no HTTP: got more than'),
    'endless announcements': (RawAnswer(b'', CONTINUE, 5000), 'headers without end'),
    'endless trailers': (RawAnswer(CHUNKED + b'0\r\n', b'a: b\r\n' * 1000, 50), 'without end'),
}
SLOW_ANSWERS = {  # a byte of it, or a few, every 0.1 s
    'slow status': RawAnswer(b'', b'HTTP', 30, pause=0.1),
    'slow header': RawAnswer(OK, b'a', 30, pause=0.1),
    'slow announcements': RawAnswer(b'', CONTINUE, 30, pause=0.1),
    'slow content': RawAnswer(OK + b'\r\n' + CONTENT[:150_000], b'a', 30, pause=0.1),
    'slow chunks': RawAnswer(CHUNKED, b'1\r\na\r\n', 30, pause=0.1),
    'slow size of a chunk': RawAnswer(CHUNKED, b'1', 30, pause=0.1),
}


class Server(ThreadingHTTPServer):
    """Serve ``files`` on this machine, and note the path and range of each request.

    ``plans[path]`` lists what goes wrong with the next requests, one after the other.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.files: dict[str, bytes] = {}
        self.plans: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.url = f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    """Answer a request as planned: a status code, a raw answer, or one of the words below."""

    server: Server

    def log_message(self, *args: Any) -> None:
        """Keep requests out of the output."""

    def do_GET(self) -> None:
        wanted_range = self.headers.get('Range')
        self.server.requests.append((self.path, wanted_range))
        plans = self.server.plans.get(self.path, [])
        plan = plans.pop(0) if plans else 'serve'
        content = self.server.files.get(self.path)

        if plan in RAW_ANSWERS:
            self.send_raw(RAW_ANSWERS[plan][0])
        elif plan in SLOW_ANSWERS:
            self.send_raw(SLOW_ANSWERS[plan])
        elif plan.isdigit():
            self.send_error(int(plan))
        elif content is None:
            self.send_error(404)
        elif plan == 'redirect':
            self.server.files['/elsewhere' + self.path] = content
            self.redirect('/elsewhere' + self.path)
        elif plan == 'loop':
            plans.append('loop')
            self.redirect(self.path)
        elif plan == 'redirect and hang':
            self.server.files['/elsewhere' + self.path] = content
            self.redirect('/elsewhere' + self.path, length=1000)
            time.sleep(3)
        elif plan == 'hang':
            time.sleep(3)
        elif wanted_range and plan != 'no ranges':
            start = int(re.fullmatch(r'bytes=(\d+)-', wanted_range)[1])
            self.send_range(content, start, plan)
        else:
            self.send_response(200)
            self.send_content(content, plan)

    def redirect(self, path: str, length: int = 0) -> None:
        self.send_response(302)
        self.send_header('Location', path)
        self.send_header('Content-Length', str(length))
        self.end_headers()

    def send_raw(self, answer: RawAnswer) -> None:
        """Send the bytes of an answer, with its pauses."""
        self.wfile.write(answer.start)
        for _ in range(answer.n_times):
            time.sleep(answer.pause)
            self.wfile.write(answer.repeated)

    def send_range(self, content: bytes, start: int, plan: str) -> None:
        """Send the content from a position on."""
        if start >= len(content) > 0:
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(content)}')
            self.end_headers()
            return
        first = start + 1 if plan == 'other range' else start
        self.send_response(206)
        self.send_header('Content-Range', f'bytes {first}-{len(content) - 1}/{len(content)}')
        self.send_content(content[start:], plan)

    def send_content(self, content: bytes, plan: str) -> None:
        """End the headers and send the content, or what the plan makes of it."""
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if plan == 'wrong':
            content = bytes(len(content))
        if plan == 'break':
            content = content[: len(content) // 2]
        for start in range(0, len(content), 2**14):
            self.wfile.write(content[start : start + 2**14])
            if plan == 'slow':
                time.sleep(0.2)


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, 'TIMEOUT', (1, 0.4))
    monkeypatch.setattr(fetch, 'PAUSE', 0)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def file_of_two_mirrors(server: Server) -> fetch.PublishedFile:
    """Serve CONTENT at two paths, as mirrors of one file."""
    server.files.update({'/a/file': CONTENT, '/b/file': CONTENT})
    urls = (f'{server.url}/a/file', f'{server.url}/b/file')
    return fetch.PublishedFile('file', urls, {'file': 'set/file'}, CONTENT_MD5)


def assert_downloaded(path: Path) -> None:
    """Fail unless the file is complete and nothing else is in its folder."""
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == [path.name]


# ------------------------------------------------------------------------------------- downloads


@pytest.mark.parametrize(
    'first, second, n_requests',
    [
        ([], [], 1),
        (['break'], [], 2),  # the second mirror continues
        (['break', 'break', 'break'], ['break'] * 3, 7),
        (['break'], ['no ranges'], 2),
        (['break'], ['other range'], 3),
        (['break'], ['hang'], 3),
        (['wrong'], [], 2),
        (['wrong', 'wrong'], ['wrong'], 4),
        (['hang'], [], 2),
        (['redirect'], [], 2),
        (['loop'], [], 32),
        (['404'], [], 2),
        (['503', '503'], ['404', '404'], 4),  # a mirror without the file is not asked again
        (['500', '429', '502'], ['408', '503', '504'], 7),
    ],
)
def test_a_download_survives(first, second, n_requests, server, tmp_path):
    file = file_of_two_mirrors(server)
    server.plans.update({'/a/file': list(first), '/b/file': list(second)})
    fetch.download(file, tmp_path / 'file')
    assert_downloaded(tmp_path / 'file')
    assert len(server.requests) == n_requests


def test_an_interrupted_download_is_continued(server, tmp_path):
    file = file_of_two_mirrors(server)
    server.plans['/a/file'] = ['break']
    fetch.download(file, tmp_path / 'file')
    (_, first), (_, second) = server.requests
    assert first is None
    assert second == f'bytes={HALF}-'


def test_a_download_is_continued_as_long_as_bytes_arrive(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, 'MAX_FRUITLESS_ROUNDS', 1)
    server.plans.update({'/a/file': ['break', 'break'], '/b/file': ['break']})
    fetch.download(file_of_two_mirrors(server), tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == CONTENT
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    'kept, ranges',
    [
        (CONTENT[:1000], ['bytes=1000-']),
        (CONTENT, ['bytes=300000-']),
        (CONTENT + b'more', ['bytes=300004-', None]),
        (b'x' * 1000, ['bytes=1000-', None]),
    ],
)
def test_a_part_from_an_earlier_download(kept, ranges, server, tmp_path):
    (tmp_path / 'file.part').write_bytes(kept)
    fetch.download(file_of_two_mirrors(server), tmp_path / 'file')
    assert_downloaded(tmp_path / 'file')
    assert [wanted_range for _, wanted_range in server.requests] == ranges


@pytest.mark.parametrize(
    'plan, words',
    [
        ('404', '404 Not Found'),
        ('503', '503 Service Unavailable'),
        pytest.param('hang', 'does not answer', marks=pytest.mark.slow),
        ('loop', 'redirects without end'),
        ('wrong', 'checksum is not the published one'),
        ('no server', 'no connection'),
    ],
)
def test_a_download_that_fails(plan, words, server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, 'MAX_FRUITLESS_ROUNDS', 2)
    file = file_of_two_mirrors(server)
    if plan == 'no server':
        file = dataclasses.replace(file, urls=('http://127.0.0.1:9/file',))
    server.plans.update({'/a/file': [plan] * 9, '/b/file': [plan] * 9})

    with pytest.raises(UserError) as error:
        fetch.download(file, tmp_path / 'file')
    message = str(error.value)
    assert words in message
    assert file.urls[0] in message
    assert '\n' not in message
    assert os.listdir(tmp_path) == []


def test_what_has_arrived_is_kept_and_mentioned(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, 'MAX_FRUITLESS_ROUNDS', 1)
    file = file_of_two_mirrors(server)
    server.plans.update({'/a/file': ['break', '404'], '/b/file': ['404']})
    with pytest.raises(UserError, match=f'{HALF:,} bytes are kept in .*file.part'):
        fetch.download(file, tmp_path / 'file')
    assert (tmp_path / 'file.part').read_bytes() == CONTENT[:HALF]


def test_a_download_larger_than_any_data_set(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, 'MAX_DOWNLOAD', 200_000)
    with pytest.raises(UserError, match='/a/file sends more than 200,000 bytes'):
        fetch.download(file_of_two_mirrors(server), tmp_path / 'file')
    assert os.listdir(tmp_path) == []


def test_a_download_without_progress_bars(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, 'tqdm', functools.partial(fetch.tqdm, disable=True))
    fetch.download(file_of_two_mirrors(server), tmp_path / 'file')
    assert_downloaded(tmp_path / 'file')
    assert len(server.requests) == 1


def test_a_proxy_of_the_environment(server, tmp_path, monkeypatch):
    url = 'http://data.invalid/file'
    server.files[url] = CONTENT  # a proxy is asked for the whole URL
    monkeypatch.setenv('http_proxy', server.url)
    file = dataclasses.replace(file_of_two_mirrors(server), urls=(url,))
    fetch.download(file, tmp_path / 'file')
    assert server.requests == [(url, None)]


def assert_refused(plan: str, words: str, server: Server, folder: Path) -> None:
    """Fail unless an answer of the first mirror, which is asked once, is refused in one line."""
    file = file_of_two_mirrors(server)
    server.plans['/a/file'] = [plan]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(fetch, 'is_permanent', lambda error: True)
        fetch.download(dataclasses.replace(file, urls=file.urls[:1]), folder / 'file')
    message = str(error.value)
    assert f'file cannot be downloaded: {file.urls[0]}: ' in message
    assert words in message
    assert '\n' not in message


@pytest.mark.parametrize('plan', RAW_ANSWERS)
def test_an_answer_that_cannot_be_used(plan, server, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, 'MAX_LINES', 100_000)
    assert_refused(plan, RAW_ANSWERS[plan][1], server, tmp_path)

    server.plans['/a/file'] = [plan]
    fetch.download(file_of_two_mirrors(server), tmp_path / 'file')
    assert_downloaded(tmp_path / 'file')
    assert [path for path, _ in server.requests] == ['/a/file', '/a/file', '/b/file']


@pytest.mark.parametrize('plan', SLOW_ANSWERS)
def test_a_server_that_sends_too_slowly(plan, server, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, 'SLOW_SECONDS', 0.5)
    assert_refused(plan, 'it sends too slowly', server, tmp_path)
    (tmp_path / 'file.part').unlink(missing_ok=True)

    server.plans['/a/file'] = [plan]
    fetch.download(file_of_two_mirrors(server), tmp_path / 'file')
    assert_downloaded(tmp_path / 'file')
    if plan == 'slow content':
        assert server.requests[-1] == ('/b/file', f'bytes={HALF}-')


def test_a_slow_disk_is_not_a_slow_server(server, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, 'SLOW_SECONDS', 0.1)
    update = fetch.tqdm.update

    def slow_update(bar: fetch.tqdm, n: int) -> None:
        time.sleep(0.05)
        update(bar, n)

    monkeypatch.setattr(fetch.tqdm, 'update', slow_update)
    fetch.download(file_of_two_mirrors(server), tmp_path / 'file')
    assert len(server.requests) == 1


def test_the_content_of_a_redirect_is_not_read(server, tmp_path):
    server.plans['/a/file'] = ['redirect and hang']
    fetch.download(file_of_two_mirrors(server), tmp_path / 'file')
    assert_downloaded(tmp_path / 'file')
    assert [path for path, _ in server.requests] == ['/a/file', '/elsewhere/a/file']


@needs_pipes
def test_only_regular_files_are_opened(server, tmp_path, monkeypatch, capsys):
    os.mkfifo('file.part')
    with pytest.raises(UserError, match='file.part is a pipe'):
        fetch.download(file_of_two_mirrors(server), tmp_path / 'file')
    assert server.requests == []

    Path('d').mkdir()
    for name, archive in (('gas', 'maf_data.tar.gz'), ('power', 'uci_power.zip')):
        os.mkfifo(Path('d', archive))
        raw = ['--raw'] if name == 'power' else []
        exit_code, _, error = run(capsys, 'fetch', name, '--data_dir=d', *raw)
        assert exit_code == 2
        assert f'{archive} is a pipe' in error

    os.mkfifo('given')
    exit_code, _, error = run(capsys, 'fetch', 'gas', '--data_dir=d', '--from', 'given')
    assert exit_code == 2
    assert 'given is a pipe' in error


@pytest.mark.slow
@needs_fork
def test_killed_while_downloading(server, tmp_path):
    """After SIGKILL in the middle of a download, the next one continues what has arrived."""
    file = file_of_two_mirrors(server)
    part = tmp_path / 'file.part'
    server.plans['/a/file'] = ['slow']
    process = multiprocessing.get_context('fork').Process(
        target=call_with_own_lock, args=(fetch.download, file, tmp_path / 'file')
    )
    process.start()
    while not part.exists() or part.stat().st_size < 100_000:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()

    size = part.stat().st_size
    assert not (tmp_path / 'file').exists()
    assert size < len(CONTENT)
    fetch.download(file, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == CONTENT
    assert server.requests[-1] == ('/a/file', f'bytes={size}-')


# ---------------------------------------------------------------------- data sets from end to end


def serve(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    contents: dict[str, bytes],
    kind: str = 'files',
) -> None:
    """Serve the files of a data set, or its ``raw_files``, with these contents by name.

    Published checksums become those of the contents.
    """

    def served(file: fetch.PublishedFile) -> fetch.PublishedFile:
        content = contents[file.name]
        server.files[f'/{file.name}'] = content
        md5 = hashlib.md5(content).hexdigest()
        if file.name in fetch.PUBLISHED_MD5:
            monkeypatch.setitem(fetch.PUBLISHED_MD5, file.name, md5)
        urls = (f'{server.url}/{file.name}',)
        return dataclasses.replace(file, urls=urls, md5=md5 if file.md5 else '')

    source = fetch.SOURCES[name]
    files = tuple(served(file) for file in getattr(source, kind))
    monkeypatch.setitem(fetch.SOURCES, name, dataclasses.replace(source, **{kind: files}))


def run(capsys: pytest.CaptureFixture, *argv: str | Path) -> tuple[int, str, str]:
    """Run a command. Return its exit code, its output, and the last line of its errors."""
    exit_code = 0
    try:
        main([str(word) for word in argv])
    except SystemExit as end:
        exit_code = end.code
    out, err = capsys.readouterr()
    assert 'Traceback' not in err
    return exit_code, out, err.rstrip('\n').split('\n')[-1]


def listed_status(capsys: pytest.CaptureFixture, name: str) -> str:
    """Return what ``list`` says is in the folder ``d`` of a data set."""
    exit_code, out, _ = run(capsys, 'list', '--data_dir=d')
    assert exit_code == 0
    return re.search(rf'^{name} .* (\w+)$', out, re.MULTILINE)[1]


@pytest.fixture
def mnist(server, monkeypatch, tmp_path):
    """A server of a tiny MNIST."""
    write_mnist(tmp_path / 'origin')
    contents = {}
    for path in (tmp_path / 'origin').iterdir():
        contents[f'{path.name}.gz'] = gzip.compress(path.read_bytes())
    serve(server, monkeypatch, 'mnist', contents)
    return server


def test_mnist_from_nothing_to_a_picture(mnist, tmp_path, capsys):
    assert listed_status(capsys, 'mnist') == 'absent'
    assert not (tmp_path / 'd').exists()

    exit_code, out, _ = run(capsys, 'fetch', 'mnist', '--data_dir=d')
    assert exit_code == 0
    assert 'mnist in d: verified' in out
    assert 'CC BY-SA' in out
    names = [file.name for file in fetch.SOURCES['mnist'].files]
    assert sorted(os.listdir('d/mnist')) == sorted(names)
    assert listed_status(capsys, 'mnist') == 'verified'
    assert len(mnist.requests) == 4

    assert run(capsys, 'fetch', 'mnist', '--data_dir=d')[0] == 0
    assert len(mnist.requests) == 4  # nothing is downloaded again

    exit_code, out, _ = run(capsys, 'prepare', 'mnist', '--data_dir=d')
    assert exit_code == 0
    assert 'mnist: 36 / 4 / 10 images of 1x32x32 are ready' in out

    exit_code, out, _ = run(capsys, 'show', 'mnist', '--data_dir=d')
    assert exit_code == 0
    assert 'mnist train: 36 of 1x32x32, from 0 to 255, 0 missing, 0 duplicates' in out
    assert Path('results/mnist.png').read_bytes().startswith(b'\x89PNG')


def test_a_damaged_file_is_named_and_left_alone(mnist, tmp_path, capsys):
    run(capsys, 'fetch', 'mnist', '--data_dir=d')
    path = tmp_path / 'd' / 'mnist' / 't10k-labels-idx1-ubyte.gz'
    path.write_bytes(b'my own')
    exit_code, _, error = run(capsys, 'fetch', 'mnist', '--data_dir=d')
    assert exit_code == 2
    assert 't10k-labels-idx1-ubyte.gz is not what is published' in error
    assert path.read_bytes() == b'my own'
    assert listed_status(capsys, 'mnist') == 'damaged'

    (tmp_path / 'd' / 'mnist' / 'train-labels-idx1-ubyte.gz').unlink()
    exit_code, _, error = run(capsys, 'fetch', 'mnist', '--data_dir=d')
    assert exit_code == 2
    assert 'there already, and differs' in error
    assert path.read_bytes() == b'my own'

    path.unlink()
    assert run(capsys, 'fetch', 'mnist', '--data_dir=d')[0] == 0


DAMAGED_NOTES = {
    'no UTF-8': b'[["\xff", 1, 2]]',
    'deep': b'[' * 100_000,
    'no list': b'{"a": 1}',
    'list of anything': b'[1, null, "a", {}, [], ["a", 1], ["a", 1, 2.5], ["a", 1, true]]',
    'huge': b'[["a/b", 1, 2]' + b' ' * 2**20 + b']',
}


@pytest.mark.parametrize('content', DAMAGED_NOTES.values(), ids=DAMAGED_NOTES)
def test_a_damaged_note_of_what_was_verified(content, tmp_path):
    path = tmp_path / '.cache' / 'verified.json'
    path.parent.mkdir()
    path.write_bytes(content)
    assert fetch.read_verified_signatures(tmp_path) == []

    (tmp_path / 'file').write_text('hello')
    fetch.save_verified_signatures(tmp_path, [tmp_path / 'file'])
    assert len(json.loads(path.read_text())) == 1
    assert fetch.read_verified_signatures(tmp_path) == [fetch.file_signature(tmp_path / 'file')]


@pytest.mark.parametrize(
    'make, words',
    [
        (os.mkdir, 'verified.json is a folder'),
        pytest.param('mkfifo', 'verified.json is a pipe', marks=needs_pipes),
    ],
)
def test_something_else_in_place_of_the_note(make, words, mnist, tmp_path, capsys):
    (tmp_path / 'd' / '.cache').mkdir(parents=True)
    make = getattr(os, make) if isinstance(make, str) else make
    make(tmp_path / 'd' / '.cache' / 'verified.json')
    assert listed_status(capsys, 'mnist') == 'absent'
    exit_code, _, error = run(capsys, 'fetch', 'mnist', '--data_dir=d')
    assert exit_code == 2
    assert words in error
    assert os.listdir(tmp_path / 'd' / '.cache') == ['verified.json']


def test_a_failed_fetch_puts_nothing_in_place(mnist, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch, 'MAX_FRUITLESS_ROUNDS', 1)
    mnist.plans['/train-images-idx3-ubyte.gz'] = ['404']
    exit_code, _, error = run(capsys, 'fetch', 'mnist', '--data_dir=d')
    assert exit_code == 2
    assert '404 Not Found' in error
    assert error.startswith('python -m datasets: error: ')
    assert not (tmp_path / 'd' / 'mnist').exists()


def tar_of_folder(folder: Path) -> bytes:
    """Return a compressed tar file in which the folder is called ``data``."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w:gz') as tar:
        tar.add(folder, 'data')
    return content.getvalue()


@pytest.fixture
def maf_archive(server, monkeypatch, tmp_path):
    """Tiny tables in an archive like that of the MAF authors, which the server has."""
    origin = tmp_path / 'origin'
    tiny_tables.write_power(origin)
    tiny_tables.write_hepmass(origin)
    tiny_tables.write_gas(origin)
    archive = tar_of_folder(origin)
    for name in ('power', 'hepmass', 'gas'):
        serve(server, monkeypatch, name, {'maf_data.tar.gz': archive})
    return archive


def test_several_tables_from_one_archive(maf_archive, server, tmp_path, monkeypatch, capsys):
    assert 'power in d: verified' in run(capsys, 'fetch', 'power', '--data_dir=d')[1]
    assert sorted(os.listdir('d')) == ['.cache', '.fetch.lock', 'maf_data.tar.gz', 'power']

    assert run(capsys, 'fetch', 'hepmass', '--data_dir=d')[0] == 0
    assert sorted(os.listdir('d/hepmass')) == ['1000_test.csv', '1000_train.csv']
    assert len(server.requests) == 1

    (tmp_path / 'd' / 'maf_data.tar.gz').write_bytes(b'mine')
    exit_code, _, error = run(capsys, 'fetch', 'gas', '--data_dir=d')
    assert exit_code == 2
    assert 'maf_data.tar.gz is not what is published' in error

    (tmp_path / 'my.tar.gz').write_bytes(maf_archive[:-9] + b'123456789')
    exit_code, _, error = run(capsys, 'fetch', 'gas', '--data_dir=d', '--from', 'my.tar.gz')
    assert exit_code == 2
    assert 'my.tar.gz has the checksum' in error

    (tmp_path / 'my.tar.gz').write_bytes(maf_archive)
    assert 'verified' in run(capsys, 'fetch', 'gas', '--data_dir=d', '--from', 'my.tar.gz')[1]

    tiny_tables.set_counts(monkeypatch, 'gas')
    _, out, _ = run(capsys, 'prepare', 'gas', '--data_dir=d')
    assert 'gas: 162 / 18 / 20 rows of 8 are ready' in out
    assert 'gas train: 162 of 8' in run(capsys, 'show', 'gas', '--data_dir=d')[1]


@pytest.fixture
def raw_power(server, monkeypatch, tmp_path):
    """A tiny raw POWER in an archive like that of UCI, which the server has."""
    tiny_tables.write_raw_power(tmp_path / 'origin')
    name = 'household_power_consumption.txt'
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w') as archive:
        archive.write(tmp_path / 'origin' / name, f'x/{name}')
    serve(server, monkeypatch, 'power', {'uci_power.zip': content.getvalue()}, 'raw_files')
    return content.getvalue()


def test_raw_tables_are_not_called_verified(raw_power, capsys):
    exit_code, out, _ = run(capsys, 'fetch', 'power', '--raw', '--data_dir=d')
    assert exit_code == 0
    assert 'power in d: present, but not by a published checksum' in out
    assert os.listdir('d/power') == ['household_power_consumption.txt']
    assert not Path('d/uci_power.zip').exists()


def test_an_archive_of_the_users_own_is_used_and_kept(raw_power, server, capsys):
    Path('e').mkdir()
    Path('e/uci_power.zip').write_bytes(raw_power)
    assert run(capsys, 'fetch', 'power', '--raw', '--data_dir=e')[0] == 0
    assert len(server.requests) == 0
    assert Path('e/uci_power.zip').exists()


def test_a_login_page_instead_of_an_archive(raw_power, server, capsys):
    server.files['/uci_power.zip'] = b'<html>please log in</html>'
    exit_code, _, error = run(capsys, 'fetch', 'power', '--raw', '--data_dir=f')
    assert exit_code == 2
    assert 'holds nothing that is wanted of it' in error
    assert os.listdir('f') == ['.fetch.lock']


def test_celeba_from_what_the_user_downloaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exit_code, out, error = run(capsys, 'fetch', 'celeba', '--data_dir=d')
    assert exit_code == 2
    assert 'name its files by --from' in error
    assert not Path('d').exists()
    assert 'mmlab.ie.cuhk.edu.hk' in out
    assert 'fetch celeba --data_dir=d --from img_align_celeba.zip' in out

    write_celeba(tmp_path)
    with zipfile.ZipFile('my.zip', 'w') as archive:
        for path in sorted(Path('img_align_celeba').iterdir()):
            archive.write(path)
    exit_code, _, error = run(capsys, 'fetch', 'celeba', '--data_dir=d', '--from', 'my.zip')
    assert exit_code == 2
    assert 'still needs list_attr_celeba.txt, list_eval_partition.txt' in error

    lists = ['list_attr_celeba.txt', 'list_eval_partition.txt']
    exit_code, out, _ = run(capsys, 'fetch', 'celeba', '--data_dir=d', '--from', *lists)
    assert exit_code == 0
    assert 'celeba in d: present' in out
    fetched = load_images('celeba', 'd').train.images
    original = load_images('celeba', '.').train.images
    assert (fetched == original).all()


# -------------------------------------------------------------------------------------- archives

WANTED = {r'(.*/)?wanted\d': r'set/wanted'}


def tar_of_member(name: str = 'wanted1', kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a tar file with one member: a file of five bytes, or something else."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w') as tar:
        info = tarfile.TarInfo(name)
        info.type = kind
        if kind == tarfile.REGTYPE:
            info.size = 5
            tar.addfile(info, io.BytesIO(b'hello'))
        else:
            info.linkname = '/etc/passwd'
            tar.addfile(info)
    return content.getvalue()


def zip_of_members(*names: str, mode: int = 0, content: bytes = b'hello') -> bytes:
    """Return a compressed zip file whose members all have the same mode and content."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w') as zipped:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            zipped.writestr(info, content)
    return archive.getvalue()


def tar_of_size(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a tar file of three members, whose second declares this size."""
    info = tarfile.TarInfo('other')
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size.to_bytes(12, 'big', signed=True)
    header[124] = 0x80 if size >= 0 else 0xFF  # marks a binary number
    header[148:156] = b' ' * 8
    header[148:156] = b'%06o\0 ' % sum(header)
    first = tar_of_member('first')[:1024]
    return first + bytes(header) + bytes(512) + tar_of_member()


def tar_of_large_header() -> bytes:
    """Return a small compressed tar file with a header of 512 MiB, of names that are too long."""
    header = tar_of_size(2**29, tarfile.GNUTYPE_LONGNAME)[1024:1536]
    return gzip.compress(header) + gzip.compress(bytes(2**24)) * 32 + gzip.compress(tar_of_member())


def damage_first_member(archive: bytes) -> bytes:
    """Return a zip file whose first member no longer fits its checksum."""
    i = archive.find(b'wanted1') + 8
    return archive[:i] + bytes([archive[i] ^ 255]) + archive[i + 1 :]


HOSTILE_ARCHIVES = {  # what the archive is: its content, and part of the line that refuses it
    'symbolic link in tar': (tar_of_member(kind=tarfile.SYMTYPE), 'not to be trusted'),
    'hard link': (tar_of_member(kind=tarfile.LNKTYPE), 'not to be trusted'),
    'device': (tar_of_member(kind=tarfile.CHRTYPE), 'not to be trusted'),
    'pipe': (tar_of_member(kind=tarfile.FIFOTYPE), 'not to be trusted'),
    'symbolic link in zip': (zip_of_members('wanted1', mode=0o120777), 'not to be trusted'),
    'two of one name': (zip_of_members('a/wanted1', 'wanted1'), 'not to be trusted'),
    'too large': (
        zip_of_members('wanted1', content=bytes(2**21)),
        'unpacks to over 1,000,000 bytes',
    ),
    'cut off zip': (zip_of_members('wanted1')[:-30], 'nothing that is wanted'),
    'damaged zip': (damage_first_member(zip_of_members('wanted1')), 'cannot be unpacked'),
    'cut off tar': (gzip.compress(tar_of_member())[:-20], 'cannot be unpacked'),
    'name that is no UTF-8': (
        zip_of_members('\xe9/wanted1').replace(b'\xc3\xa9', b'\xff\xa9'),
        'cannot be unpacked',
    ),
    'size of 2^80': (tar_of_size(2**80), 'cannot be unpacked'),
    'header of 2^80 bytes': (tar_of_size(2**80, tarfile.XHDTYPE), 'cannot be unpacked'),
    'header of negative size': (tar_of_size(-512, tarfile.XHDTYPE), 'cannot be unpacked'),
    'negative size': (tar_of_size(-512), 'its members are not in order'),
    'others': (zip_of_members('other', '/etc/other', '../../other'), 'nothing that is wanted'),
    'empty': (b'', 'nothing that is wanted'),
}


@pytest.mark.parametrize('content, words', HOSTILE_ARCHIVES.values(), ids=HOSTILE_ARCHIVES)
def test_hostile_archives(content, words, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, 'MAX_UNPACKED', 10**6)
    (tmp_path / 'archive').write_bytes(content)
    (tmp_path / 'd').mkdir()
    with pytest.raises(UserError, match=words):
        fetch.unpack(tmp_path / 'archive', WANTED, tmp_path / 'd')
    assert os.listdir(tmp_path / 'd') == []
    assert sorted(os.listdir(tmp_path)) == ['archive', 'd']


@needs_limits
def test_an_archive_that_takes_much_memory(tmp_path):
    (tmp_path / 'archive').write_bytes(tar_of_large_header())
    (tmp_path / 'd').mkdir()
    with pytest.raises(UserError, match='archive takes more than 256 MiB of memory'):
        fetch.unpack(tmp_path / 'archive', WANTED, tmp_path / 'd')
    assert os.listdir(tmp_path / 'd') == []


def test_damage_in_compressed_data(tmp_path):
    """Each compression method has its own error, and all become one line."""
    (tmp_path / 'd').mkdir()
    content = np.random.default_rng(0).bytes(5000)
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    for method in methods:
        with zipfile.ZipFile(tmp_path / 'archive', 'w', method) as zipped:
            zipped.writestr('wanted1', content)
        damaged = bytearray((tmp_path / 'archive').read_bytes())
        damaged[2000:2100] = bytes(100)
        (tmp_path / 'archive').write_bytes(damaged)
        with pytest.raises(UserError, match='cannot be unpacked'):
            fetch.unpack(tmp_path / 'archive', WANTED, tmp_path / 'd')
        assert os.listdir(tmp_path / 'd') == []


@pytest.mark.parametrize('name', ['../../wanted1', '/wanted1', 'a/../../wanted1', 'wanted1'])
def test_no_member_says_where_it_goes(name, tmp_path):
    data_dir = tmp_path / 'x' / 'd'
    data_dir.mkdir(parents=True)
    for content in (tar_of_member(name), zip_of_members(name)):
        (tmp_path / 'archive').write_bytes(content)
        fetch.unpack(tmp_path / 'archive', WANTED, data_dir)
        names = sorted(path.name for path in tmp_path.rglob('*'))
        assert names == ['archive', 'd', 'set', 'wanted', 'x']
        assert (data_dir / 'set' / 'wanted').read_bytes() == b'hello'


# ---------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    'argv, words',
    [
        ([], 'required: verb'),
        (['show'], 'required: NAME'),
        (['fly', 'mnist'], 'invalid choice'),
        (['fetch', 'imagenet'], 'imagenet is none of those that can be fetched: mnist, cifar10'),
        (['fetch', 'faces'], 'faces is none of those'),
        (['fetch', 'moons'], 'moons is none of those'),
        (['fetch', 'mnist', '--raw'], 'leave --raw out'),
        (['prepare', 'imagenet'], "unknown data set 'imagenet'"),
        (['prepare', 'mnist'], 'python -m datasets fetch mnist'),
        (['prepare', 'cifar10'], 'python -m datasets fetch cifar10'),
        (['prepare', 'gas'], 'datasets fetch gas'),
        (['prepare', 'folder'], 'no folder'),
        (['prepare', 'faces', '--image_size=0'], 'outside 1..1024'),
        (['prepare', 'power', '--image_size=8'], '--image_size is for images'),
        (['show', 'u1', '--image_size=8'], '--image_size is for images'),
        (['show', 'no.csv'], 'no such table'),
        (['fetch', 'celeba', '--from', 'nothing.zip'], 'nothing.zip: no such file'),
        (['show', 'digits', '--output=there.png'], 'there.png exists'),
    ],
)
def test_mistakes_get_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('there.png').write_text('mine')
    exit_code, out, error = run(capsys, *argv)
    assert exit_code == 2
    assert out == ''
    assert error.startswith('python -m datasets: error: ')
    assert words in error
    assert Path('there.png').read_text() == 'mine'


@pytest.mark.slow
def test_the_scripts_need_nothing_of_what_fetch_needs():
    code = 'import sys, datasets, datasets.tabular; assert "requests" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parents[1], check=True)


def test_show_counts_what_a_table_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('my.csv').write_text('a,b\n1,2\n1,2\n3,\n5,-7\n')
    exit_code, out, _ = run(capsys, 'show', 'my.csv', '--output=a/my.png')
    assert exit_code == 0
    assert 'my.csv all: 4 of 2, from -7 to 5, 1 missing, 1 duplicates' in out
    assert Path('a/my.png').exists()


@pytest.mark.parametrize('name', ['digits', '2spirals', 'u3', 'folder'])
def test_show_draws_every_kind(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'data')
    write_table(tmp_path / 'data', attribute_rows())
    size = ['--image_size=16'] if name == 'folder' else []
    assert run(capsys, 'show', name, *size)[0] == 0
    assert Path(f'results/{name}.png').stat().st_size > 5000
