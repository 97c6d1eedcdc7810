"""python -m datasets: downloads that survive what servers do, archives that do no harm, and clear words otherwise."""

import dataclasses
import gzip
import hashlib
import io
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

import numpy as np
import pytest
import tiny_tables
from tiny_data import attribute_rows, write_celeba, write_folder, write_mnist, write_table

from common.errors import UserError
from datasets import fetch, load_images, tabular
from datasets.__main__ import main

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves self.files; self.plans[path] lists what goes wrong at the next requests, one after the other"""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.plans, self.requests = {}, {}, []
        self.url = f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, request, client_address):
        pass  # of clients that hang up


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        wanted = self.headers.get('Range')
        self.server.requests.append((self.path, wanted))
        plans = self.server.plans.get(self.path, [])
        plan = plans.pop(0) if plans else 'serve'
        content = self.server.files.get(self.path)
        if plan.isdigit() or content is None:
            return self.send_error(int(plan) if plan.isdigit() else 404)
        if plan == 'redirect':
            self.server.files['/elsewhere' + self.path] = content
            self.send_response(302)
            self.send_header('Location', '/elsewhere' + self.path)
            return self.end_headers()
        if plan == 'loop':
            plans.append('loop')
            self.send_response(302)
            self.send_header('Location', self.path)
            return self.end_headers()
        if plan == 'hang':
            return time.sleep(3)
        start = (
            int(re.fullmatch(r'bytes=(\d+)-', wanted)[1]) if wanted and plan != 'no ranges' else 0
        )
        if start >= len(content) > 0 and wanted:
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(content)}')
            return self.end_headers()
        self.send_response(206 if wanted and plan != 'no ranges' else 200)
        if wanted and plan != 'no ranges':
            first = start + 1 if plan == 'other range' else start
            self.send_header('Content-Range', f'bytes {first}-{len(content) - 1}/{len(content)}')
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        content = bytes(len(content)) if plan == 'wrong' else content
        end = (start + len(content)) // 2 if plan == 'break' else len(content)
        for i in range(start, end, 2**14):
            self.wfile.write(content[i : min(i + 2**14, end)])
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


def a_file(server, md5=hashlib.md5(CONTENT).hexdigest()):
    """Two mirrors of one file"""
    server.files.update({'/a/file': CONTENT, '/b/file': CONTENT})
    return fetch.File(
        'file', (f'{server.url}/a/file', f'{server.url}/b/file'), {'file': 'set/file'}, md5
    )


@pytest.mark.parametrize(
    'first, second, n_requests',
    [
        ([], [], 1),
        (['break'], [], 2),  # the second mirror goes on
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
        (['503', '503'], ['404', '404'], 4),  # a mirror that has it not is not asked again
        (['500', '429', '502'], ['408', '503', '504'], 7),
    ],
)
def test_a_download_survives(first, second, n_requests, server, tmp_path):
    file = a_file(server)
    server.plans.update({'/a/file': list(first), '/b/file': list(second)})
    fetch.download(file, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == CONTENT and os.listdir(tmp_path) == ['file']
    assert len(server.requests) == n_requests


def test_a_broken_download_is_gone_on_with(server, tmp_path):
    file = a_file(server)
    server.plans['/a/file'] = ['break']
    fetch.download(file, tmp_path / 'file')
    (_, first), (_, second) = server.requests
    assert first is None and second == 'bytes=147456-'  # of 150,000, in whole blocks of 2^14


def test_a_line_that_breaks_again_and_again_is_gone_on_with_as_long_as_something_comes(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(fetch, 'TRIES', 1)
    server.plans.update({'/a/file': ['break', 'break'], '/b/file': ['break']})
    fetch.download(a_file(server), tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == CONTENT and len(server.requests) == 4


@pytest.mark.parametrize(
    'kept, ranges',
    [
        (CONTENT[:1000], ['bytes=1000-']),
        (CONTENT, ['bytes=300000-']),
        (CONTENT + b'more', ['bytes=300004-', None]),
        (b'x' * 1000, ['bytes=1000-', None]),
    ],
)
def test_a_part_of_before(kept, ranges, server, tmp_path):
    (tmp_path / 'file.part').write_bytes(kept)
    fetch.download(a_file(server), tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == CONTENT and os.listdir(tmp_path) == ['file']
    assert [wanted for _, wanted in server.requests] == ranges


@pytest.mark.parametrize(
    'plan, words',
    [
        ('404', '404 Not Found'),
        ('503', '503 Service Unavailable'),
        ('hang', 'does not answer'),
        ('loop', 'redirects without end'),
        ('wrong', 'checksum is not the published one'),
        ('no server', 'no connection'),
    ],
)
def test_a_download_that_cannot_be_had(plan, words, server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, 'TRIES', 2)
    file = a_file(server)
    if plan == 'no server':
        file = dataclasses.replace(file, urls=('http://127.0.0.1:9/file',))
    server.plans.update({'/a/file': [plan] * 9, '/b/file': [plan] * 9})
    with pytest.raises(UserError) as error:
        fetch.download(file, tmp_path / 'file')
    assert (
        words in str(error.value)
        and file.urls[0] in str(error.value)
        and '\n' not in str(error.value)
    )
    assert os.listdir(tmp_path) == []


def test_what_came_is_kept_and_said_to_be(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, 'TRIES', 1)
    file = a_file(server)
    server.plans.update({'/a/file': ['break', '404'], '/b/file': ['404']})
    with pytest.raises(UserError, match='147,456 bytes are kept in .*file.part'):
        fetch.download(file, tmp_path / 'file')
    assert (tmp_path / 'file.part').read_bytes() == CONTENT[:147_456]


def test_more_than_any_set_has(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, 'MAX_DOWNLOAD', 200_000)
    with pytest.raises(UserError, match='/a/file sends more than 200,000 bytes'):
        fetch.download(a_file(server), tmp_path / 'file')
    assert os.listdir(tmp_path) == []


def test_a_proxy_of_the_environment(server, tmp_path, monkeypatch):
    url = 'http://data.invalid/file'
    server.files[url] = CONTENT  # of a proxy, the whole url is asked for
    monkeypatch.setenv('http_proxy', server.url)
    fetch.download(dataclasses.replace(a_file(server), urls=(url,)), tmp_path / 'file')
    assert server.requests == [(url, None)]


# ------------------------------------------------------------------------------------------ sets, from end to end


def serve(server, monkeypatch, name, contents, **changes):
    """The files of a data set come from the server, with contents {file name: bytes} and their checksums"""

    def served(file):
        content = contents[file.name]
        server.files[f'/{file.name}'] = content
        md5 = hashlib.md5(content).hexdigest()
        if file.name in fetch.MD5:
            monkeypatch.setitem(fetch.MD5, file.name, md5)
        return dataclasses.replace(
            file, urls=(f'{server.url}/{file.name}',), md5=md5 and file.md5 and md5
        )

    source = fetch.SOURCES[name]
    monkeypatch.setitem(
        fetch.SOURCES,
        name,
        dataclasses.replace(
            source,
            **{
                kind: tuple(map(served, getattr(source, kind)))
                for kind in changes.get('kinds', ['files'])
            },
        ),
    )


def run(capsys, *argv):
    """-> exit status, standard output, last line of standard error"""
    status = 0
    try:
        main([str(word) for word in argv])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert 'Traceback' not in err
    return status, out, err.rstrip('\n').split('\n')[-1]


@pytest.fixture
def mnist(server, monkeypatch, tmp_path):
    write_mnist(tmp_path / 'origin')
    serve(
        server,
        monkeypatch,
        'mnist',
        {
            f'{path.name}.gz': gzip.compress(path.read_bytes())
            for path in (tmp_path / 'origin').iterdir()
        },
    )
    return server


def test_mnist_from_nothing_to_a_picture(mnist, tmp_path, capsys):
    status, out, _ = run(capsys, 'list', '--data_dir=d')
    assert (
        status == 0 and re.search(r'^mnist .* absent$', out, re.M) and not (tmp_path / 'd').exists()
    )
    status, out, _ = run(capsys, 'fetch', 'mnist', '--data_dir=d')
    assert status == 0 and 'mnist in d: verified' in out and 'CC BY-SA' in out
    assert sorted(os.listdir('d/mnist')) == sorted(
        file.name for file in fetch.SOURCES['mnist'].files
    )
    assert re.search(r'^mnist .* verified$', run(capsys, 'list', '--data_dir=d')[1], re.M)
    assert len(mnist.requests) == 4
    assert (
        run(capsys, 'fetch', 'mnist', '--data_dir=d')[0] == 0 and len(mnist.requests) == 4
    )  # not again
    status, out, _ = run(capsys, 'prepare', 'mnist', '--data_dir=d')
    assert status == 0 and 'mnist: 36 / 4 / 10 images of 1x32x32 are ready' in out
    status, out, _ = run(capsys, 'show', 'mnist', '--data_dir=d')
    assert (
        status == 0 and 'mnist train: 36 of 1x32x32, from 0 to 255, 0 missing, 0 duplicates' in out
    )
    assert Path('results/mnist.png').read_bytes().startswith(b'\x89PNG')


def test_a_damaged_file_is_named_and_left(mnist, tmp_path, capsys):
    run(capsys, 'fetch', 'mnist', '--data_dir=d')
    path = tmp_path / 'd' / 'mnist' / 't10k-labels-idx1-ubyte.gz'
    path.write_bytes(b'my own')
    status, _, error = run(capsys, 'fetch', 'mnist', '--data_dir=d')
    assert status == 2 and 't10k-labels-idx1-ubyte.gz is not what is published' in error
    assert path.read_bytes() == b'my own'
    assert re.search(r'^mnist .* damaged$', run(capsys, 'list', '--data_dir=d')[1], re.M)
    (tmp_path / 'd' / 'mnist' / 'train-labels-idx1-ubyte.gz').unlink()
    status, _, error = run(capsys, 'fetch', 'mnist', '--data_dir=d')
    assert status == 2 and 'there already, and differs' in error and path.read_bytes() == b'my own'
    path.unlink()
    assert run(capsys, 'fetch', 'mnist', '--data_dir=d')[0] == 0


def test_a_failed_fetch_puts_nothing_in_place(mnist, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch, 'TRIES', 1)
    mnist.plans['/train-images-idx3-ubyte.gz'] = ['404']
    status, _, error = run(capsys, 'fetch', 'mnist', '--data_dir=d')
    assert (
        status == 2 and '404 Not Found' in error and error.startswith('python -m datasets: error: ')
    )
    assert not (tmp_path / 'd' / 'mnist').exists()


def test_killed_while_downloading(server, tmp_path):
    """A process of its own, with SIGKILL in the middle: the part is there, and the next goes on with it"""
    file, part = a_file(server), tmp_path / 'file.part'
    server.plans['/a/file'] = ['slow']
    process = multiprocessing.get_context('fork').Process(
        target=fetch.download, args=(file, tmp_path / 'file')
    )
    process.start()
    while not part.exists() or part.stat().st_size < 100_000:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    kept = part.stat().st_size
    assert not (tmp_path / 'file').exists() and kept < len(CONTENT)
    fetch.download(file, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == CONTENT and server.requests[-1] == (
        '/a/file',
        f'bytes={kept}-',
    )


def tar_of(folder, prefix='data/'):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w:gz') as tar:
        tar.add(folder, prefix.rstrip('/'))
    return content.getvalue()


def test_five_tables_of_one_archive(server, monkeypatch, tmp_path, capsys):
    origin = tmp_path / 'origin'
    (
        tiny_tables.write_power(origin),
        tiny_tables.write_hepmass(origin),
        tiny_tables.write_gas(origin),
    )
    content = {'maf_data.tar.gz': tar_of(origin)}
    for name in ('power', 'hepmass', 'gas'):
        serve(server, monkeypatch, name, content)
    assert 'power in d: verified' in run(capsys, 'fetch', 'power', '--data_dir=d')[1]
    assert sorted(os.listdir('d')) == ['.cache', '.fetch.lock', 'maf_data.tar.gz', 'power']
    assert run(capsys, 'fetch', 'hepmass', '--data_dir=d')[0] == 0
    assert (
        sorted(os.listdir('d/hepmass')) == ['1000_test.csv', '1000_train.csv']
        and len(server.requests) == 1
    )
    (tmp_path / 'd' / 'maf_data.tar.gz').write_bytes(b'mine')
    status, _, error = run(capsys, 'fetch', 'gas', '--data_dir=d')
    assert status == 2 and 'maf_data.tar.gz is not what is published' in error
    (tmp_path / 'my.tar.gz').write_bytes(tar_of(origin)[:-9] + b'123456789')
    status, _, error = run(capsys, 'fetch', 'gas', '--data_dir=d', '--from', 'my.tar.gz')
    assert status == 2 and 'my.tar.gz has the checksum' in error
    (tmp_path / 'my.tar.gz').write_bytes(server.files['/maf_data.tar.gz'])
    assert 'verified' in run(capsys, 'fetch', 'gas', '--data_dir=d', '--from', 'my.tar.gz')[1]
    monkeypatch.setitem(tabular.TABLES, 'gas', ((162, 18, 20), *tabular.TABLES['gas'][1:]))
    assert (
        'gas: 162 / 18 / 20 rows of 8 are ready' in run(capsys, 'prepare', 'gas', '--data_dir=d')[1]
    )
    assert 'gas train: 162 of 8' in run(capsys, 'show', 'gas', '--data_dir=d')[1]


def test_raw_tables_have_no_checksum_and_this_is_said(server, monkeypatch, tmp_path, capsys):
    tiny_tables.write_raw_power(tmp_path / 'origin')
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w') as archive:
        archive.write(
            tmp_path / 'origin' / 'household_power_consumption.txt',
            'x/household_power_consumption.txt',
        )
    serve(server, monkeypatch, 'power', {'uci_power.zip': content.getvalue()}, kinds=['raw'])
    status, out, _ = run(capsys, 'fetch', 'power', '--raw', '--data_dir=d')
    assert status == 0 and 'power in d: present, but not by a published checksum' in out
    assert (
        os.listdir('d/power') == ['household_power_consumption.txt']
        and not Path('d/uci_power.zip').exists()
    )
    assert 'leave --raw out' in run(capsys, 'fetch', 'mnist', '--raw')[2]
    Path('e').mkdir(), Path('e/uci_power.zip').write_bytes(content.getvalue())
    assert run(capsys, 'fetch', 'power', '--raw', '--data_dir=e')[0] == 0
    assert len(server.requests) == 1 and Path('e/uci_power.zip').exists()  # the user's own stays
    server.files['/uci_power.zip'] = b'<html>please log in</html>'
    status, _, error = run(capsys, 'fetch', 'power', '--raw', '--data_dir=f')
    assert (
        status == 2
        and 'holds nothing that is wanted of it' in error
        and os.listdir('f') == ['.fetch.lock']
    )


def test_celeba_from_what_the_user_downloaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, error = run(capsys, 'fetch', 'celeba', '--data_dir=d')
    assert status == 2 and 'name its files by --from' in error and not Path('d').exists()
    assert (
        'mmlab.ie.cuhk.edu.hk' in out
        and 'fetch celeba --data_dir=d --from img_align_celeba.zip' in out
    )
    write_celeba(tmp_path)
    with zipfile.ZipFile('my.zip', 'w') as archive:
        for path in sorted(Path('img_align_celeba').iterdir()):
            archive.write(path)
    status, _, error = run(capsys, 'fetch', 'celeba', '--data_dir=d', '--from', 'my.zip')
    assert status == 2 and 'still needs list_attr_celeba.txt, list_eval_partition.txt' in error
    status, out, _ = run(
        capsys,
        'fetch',
        'celeba',
        '--data_dir=d',
        '--from',
        'list_attr_celeba.txt',
        'list_eval_partition.txt',
    )
    assert status == 0 and 'celeba in d: present' in out
    assert (
        load_images('celeba', 'd').train.images == load_images('celeba', '.').train.images
    ).all()


# --------------------------------------------------------------------------------------------------- archives

WANTED = {r'(.*/)?wanted\d': r'set/wanted'}


def hostile_tar(change, name='wanted1'):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode='w') as tar:
        info = tarfile.TarInfo(name)
        info.size = 5
        change(info)
        tar.addfile(info, io.BytesIO(b'hello') if info.isreg() else None)
    return content.getvalue()


def hostile_zip(*names, mode=0, content=b'hello'):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as zipped:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            zipped.writestr(info, content)
    return archive.getvalue()


def link_to(kind, target='/etc/passwd'):
    return lambda info: (
        setattr(info, 'type', kind),
        setattr(info, 'linkname', target),
        setattr(info, 'size', 0),
    )


def damaged(content):
    """An archive whose first member no longer fits its checksum"""
    i = content.find(b'wanted1') + 8
    return content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :]


@pytest.mark.parametrize(
    'content, words',
    [
        *[
            (hostile_tar(link_to(kind)), 'not to be trusted')
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        ],
        (hostile_zip('wanted1', mode=0o120777), 'not to be trusted'),
        (hostile_zip('a/wanted1', 'wanted1'), 'not to be trusted'),
        (hostile_zip('wanted1', content=bytes(2**21)), 'unpacks to over 1,000,000 bytes'),
        (hostile_zip('wanted1')[:-30], 'nothing that is wanted'),
        (damaged(hostile_zip('wanted1')), 'cannot be unpacked'),
        (gzip.compress(hostile_tar(lambda info: None))[:-20], 'cannot be unpacked'),
        (hostile_zip('other', '/etc/other', '../../other'), 'nothing that is wanted'),
        (b'', 'nothing that is wanted'),
    ],
)
def test_hostile_archives(content, words, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, 'MAX_UNPACKED', 10**6)
    (tmp_path / 'archive').write_bytes(content)
    (tmp_path / 'd').mkdir()
    with pytest.raises(UserError, match=words):
        fetch.place(tmp_path / 'archive', WANTED, tmp_path / 'd')
    assert os.listdir(tmp_path / 'd') == [] and sorted(os.listdir(tmp_path)) == ['archive', 'd']


@pytest.mark.parametrize('name', ['../../wanted1', '/wanted1', 'a/../../wanted1', 'wanted1'])
def test_no_member_says_where_it_goes(name, tmp_path):
    (tmp_path / 'x' / 'd').mkdir(parents=True)
    for content in (hostile_tar(lambda info: None, name), hostile_zip(name)):
        (tmp_path / 'archive').write_bytes(content)
        fetch.place(tmp_path / 'archive', WANTED, tmp_path / 'x' / 'd')
        assert sorted(path.name for path in tmp_path.rglob('*')) == [
            'archive',
            'd',
            'set',
            'wanted',
            'x',
        ]
        assert (tmp_path / 'x' / 'd' / 'set' / 'wanted').read_bytes() == b'hello'


# --------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    'argv, words',
    [
        ([], 'required: verb'),
        (['show'], 'required: NAME'),
        (['fly', 'mnist'], 'invalid choice'),
        (['fetch', 'imagenet'], 'imagenet is none of those that can be fetched: mnist, cifar10'),
        (['fetch', 'faces'], 'faces is none of those'),
        (['fetch', 'moons'], 'moons is none of those'),
        (['prepare', 'imagenet'], "unknown data set 'imagenet'"),
        (['prepare', 'mnist'], 'python -m datasets fetch mnist'),
        (['prepare', 'cifar10'], 'python -m datasets fetch cifar10'),
        (['prepare', 'gas'], 'datasets fetch gas'),
        (['prepare', 'folder'], 'no directory'),
        (['prepare', 'faces', '--image_size=0'], 'outside 1..1024'),
        (['prepare', 'power', '--image_size=8'], '--image_size is for images'),
        (['show', 'no.csv'], 'no such table'),
        (['fetch', 'celeba', '--from', 'nothing.zip'], 'nothing.zip: no such file'),
        (['show', 'digits', '--output=there.png'], 'there.png exists'),
    ],
)
def test_mistakes_get_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('there.png').write_text('mine')
    status, out, error = run(capsys, *argv)
    assert (
        status == 2
        and out == ''
        and error.startswith('python -m datasets: error: ')
        and words in error
    )
    assert Path('there.png').read_text() == 'mine'


def test_the_scripts_need_nothing_of_what_fetch_needs():
    code = 'import sys, datasets, datasets.tabular; assert "requests" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parents[1], check=True)


def test_show_counts_what_a_table_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('my.csv').write_text('a,b\n1,2\n1,2\n3,\n5,-7\n')
    status, out, _ = run(capsys, 'show', 'my.csv', '--output=a/my.png')
    assert status == 0 and 'my.csv all: 4 of 2, from -7 to 5, 1 missing, 1 duplicates' in out
    assert Path('a/my.png').exists()


@pytest.mark.parametrize('name', ['digits', '2spirals', 'u3', 'folder'])
def test_show_draws_every_kind(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / 'data')
    write_table(tmp_path / 'data', attribute_rows())
    size = ['--image_size=16'] if name == 'folder' else []
    assert run(capsys, 'show', name, *size)[0] == 0
    assert Path(f'results/{name}.png').stat().st_size > 5000
