"""Where the published data sets come from; how they are downloaded, verified and unpacked.

Downloads use requests. The library pooch would start an interrupted download from the beginning;
here the bytes received so far stay in a file ending in ``.part``, which the next attempt continues.
"""

import contextlib
import filecmp
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from common.bounds import bounded_memory, file_size, open_regular
from common.errors import UserError, one_line, truncate
from common.files import file_lock, file_signature, first_existing, write_json

from .archives import BLOCK_SIZE, iterate_members, read_blocks
from .images import find_images
from .servers import TransferError, open_session, report_bad_answer
from .tabular import TABLES

TIMEOUT = (10, 30)  # seconds to connect, and seconds without a byte
MAX_FRUITLESS_ROUNDS = 4  # rounds over all mirrors in a row in which not one byte arrives
PAUSE = 2  # seconds between two rounds
MAX_DOWNLOAD = 4 * 2**30  # bytes; more than any archive below has
MAX_UNPACKED = 16 * 2**30  # bytes; more than any data set below has
MAX_SIGNATURES = 2**20  # bytes of the file that notes which files were verified
UNAVAILABLE = (  # a mirror that answers so is not asked again
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.GONE,
)


@dataclass(frozen=True)
class PublishedFile:
    """A file to download: an archive, or a file of the data set itself."""

    name: str
    urls: tuple[str, ...]  # mirrors; none where the owners give it out only on request
    targets: dict[str, str]  # regular expression of a member's name -> its path below data_dir
    md5: str = ''  # empty where no checksum is published
    is_kept: bool = False  # after unpacking, because other data sets need it too


@dataclass(frozen=True)
class Source:
    """One line of ``python -m datasets list``, and the files that the data set consists of."""

    kind: str
    items: str
    dimensions: str
    download: str  # size of the download
    origin: str
    license: str
    files: tuple[PublishedFile, ...] = ()
    raw_files: tuple[PublishedFile, ...] = ()  # from the UCI repository, without preprocessing
    citation: str = ''


def mnist_file(name: str, md5: str) -> PublishedFile:
    """Return one of the four files of MNIST, which two mirrors serve."""
    archive = f'{name}.gz'
    mirrors = (
        'https://ossci-datasets.s3.amazonaws.com/mnist/',
        'https://storage.googleapis.com/cvdf-datasets/mnist/',
    )
    urls = tuple(mirror + archive for mirror in mirrors)
    return PublishedFile(archive, urls, {re.escape(archive): f'mnist/{archive}'}, md5)


def celeba_file(name: str, pattern: str, target: str, md5: str) -> PublishedFile:
    """Return a file of CelebA, which its owners give out only after consent."""
    return PublishedFile(name, (), {rf'(.*/)?{pattern}': f'celeba/{target}'}, md5)


def maf_file(*paths: str) -> PublishedFile:
    """Return the archive that holds all five tables, with the members of one of them."""
    return PublishedFile(
        'maf_data.tar.gz',
        ('https://zenodo.org/records/1161203/files/data.tar.gz?download=1',),
        {rf'(\./)?data/{re.escape(path)}': path for path in paths},
        md5='9b9c9b0375315ad270eba4ce80c093ab',
        is_kept=True,
    )


def uci_file(number: int, title: str, name: str, *members: str) -> PublishedFile:
    """Return the archive of a data set of the UCI repository, which publishes no checksums."""
    return PublishedFile(
        f'uci_{name}.zip',
        (f'https://archive.ics.uci.edu/static/public/{number}/{title}.zip',),
        {rf'(.*/)?{re.escape(member)}': f'{name}/{member}' for member in members},
    )


MAF = (
    'Papamakarios, Pavlakou and Murray: Masked Autoregressive Flow for Density Estimation. '
    'NeurIPS 2017'
)
SOURCES = {
    'faces': Source(
        kind='images',
        items='12,000',
        dimensions='3x32x32',
        download='-',
        origin='drawn by datasets/drawn_faces.py',
        license='MIT',
    ),
    'digits': Source(
        kind='images',
        items='1,797',
        dimensions='1x8x8',
        download='-',
        origin='scikit-learn',
        license='CC BY 4.0',
    ),
    'mnist': Source(
        kind='images',
        items='70,000',
        dimensions='1x28x28',
        download='12 MB',
        origin='LeCun, Cortes, Burges',
        license='CC BY-SA 3.0',
        files=(
            mnist_file('train-images-idx3-ubyte', 'f68b3c2dcbeaaa9fbdd348bbdeb94873'),
            mnist_file('train-labels-idx1-ubyte', 'd53e105ee54ea40749a09fcbcd1e9432'),
            mnist_file('t10k-images-idx3-ubyte', '9fb629c4189551a2d022fa330f9573f3'),
            mnist_file('t10k-labels-idx1-ubyte', 'ec29112dd5afa0611ce80d1b7f02629c'),
        ),
        citation='LeCun, Bottou, Bengio and Haffner: Gradient-based learning applied to '
        'document recognition. 1998',
    ),
    'cifar10': Source(
        kind='images',
        items='60,000',
        dimensions='3x32x32',
        download='170 MB',
        origin='cs.toronto.edu/~kriz',
        license='none stated',
        files=(
            PublishedFile(
                'cifar-10-python.tar.gz',
                ('https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz',),
                {r'(\./)?(cifar-10-batches-py/(data_batch_[1-5]|test_batch))': r'cifar10/\2'},
                'c58f30108f718f92721af3b95e74349a',
            ),
        ),
        citation='Krizhevsky: Learning Multiple Layers of Features from Tiny Images. 2009',
    ),
    'celeba': Source(
        kind='images',
        items='202,599',
        dimensions='3x178x218',
        download='1.4 GB',
        origin='mmlab.ie.cuhk.edu.hk',
        license='non-commercial research',
        files=(
            celeba_file(
                'img_align_celeba.zip',
                r'img_align_celeba/(\d{6}\.jpg)',
                r'img_align_celeba/\2',
                '00d2c5bc6d35e252742224ab0c1e8fcb',
            ),
            celeba_file(
                'list_attr_celeba.txt',
                r'list_attr_celeba\.txt',
                'list_attr_celeba.txt',
                '75e246fa4810816ffd6ee81facbd244c',
            ),
            celeba_file(
                'list_eval_partition.txt',
                r'list_eval_partition\.txt',
                'list_eval_partition.txt',
                'd32c9cbf5e040fd4025c592c306e6668',
            ),
        ),
        citation='Liu, Luo, Wang and Tang: Deep Learning Face Attributes in the Wild. ICCV 2015',
    ),
    'folder': Source(
        kind='images',
        items='any',
        dimensions='3x64x64',
        download='-',
        origin='your own',
        license='yours',
    ),
    'power': Source(
        kind='rows',
        items='2,049,280',
        dimensions='6',
        download='0.8 GB',
        origin='MAF authors, from UCI 235',
        license='CC BY 4.0',
        files=(maf_file('power/data.npy'),),
        raw_files=(
            uci_file(
                235,
                'individual+household+electric+power+consumption',
                'power',
                'household_power_consumption.txt',
            ),
        ),
        citation=MAF,
    ),
    'gas': Source(
        kind='rows',
        items='1,052,065',
        dimensions='8',
        download='0.8 GB',
        origin='MAF authors, from UCI 322',
        license='CC BY 4.0',
        files=(maf_file('gas/ethylene_CO.pickle'),),
        raw_files=(
            uci_file(
                322,
                'gas+sensor+array+under+dynamic+gas+mixtures',
                'gas',
                'ethylene_CO.txt',
            ),
        ),
        citation=MAF,
    ),
    'hepmass': Source(
        kind='rows',
        items='525,123',
        dimensions='21',
        download='0.8 GB',
        origin='MAF authors, from UCI 347',
        license='CC BY 4.0',
        files=(maf_file('hepmass/1000_train.csv', 'hepmass/1000_test.csv'),),
        raw_files=(uci_file(347, 'hepmass', 'hepmass', '1000_train.csv.gz', '1000_test.csv.gz'),),
        citation=MAF,
    ),
    'miniboone': Source(
        kind='rows',
        items='36,488',
        dimensions='43',
        download='0.8 GB',
        origin='MAF authors, from UCI 199',
        license='CC BY 4.0',
        files=(maf_file('miniboone/data.npy'),),
        raw_files=(
            uci_file(
                199,
                'miniboone+particle+identification',
                'miniboone',
                'MiniBooNE_PID.txt',
            ),
        ),
        citation=MAF,
    ),
    'bsds300': Source(
        kind='rows',
        items='1,300,000',
        dimensions='63',
        download='0.8 GB',
        origin='MAF authors, from Berkeley',
        license='non-commercial research',
        files=(maf_file('BSDS300/BSDS300.hdf5'),),
        citation=MAF,
    ),
    '8gaussians ... swissroll': Source(
        kind='rows',
        items='drawn anew',
        dimensions='2',
        download='-',
        origin='datasets/toy.py',
        license='MIT',
    ),
    'u1 ... u4': Source(
        kind='energy',
        items='-',
        dimensions='2',
        download='-',
        origin='datasets/toy.py',
        license='MIT',
    ),
}
# Of the files that training reads. CIFAR-10's are not published by its author, but by torchvision.
PUBLISHED_MD5 = {
    **{file.name: file.md5 for file in SOURCES['mnist'].files},
    'data_batch_1': 'c99cafc152244af753f735de768cd75f',
    'data_batch_2': 'd4bba439e000b95fd0a9bffe97cbabec',
    'data_batch_3': '54ebc095f3ab1f0389bbae665268c751',
    'data_batch_4': '634d18415352ddfa80567beed471001a',
    'data_batch_5': '482c414d41f54cd18b22e5b47cb7c3cb',
    'test_batch': '40351d587109b95175f43aff81a1287e',
}
CELEBA_STEPS = """\
Only its owners give out CelebA, for non-commercial research:
  1. open https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, read the agreement,
     and follow a link to the downloads
  2. download Img/img_align_celeba.zip, Anno/list_attr_celeba.txt
     and Eval/list_eval_partition.txt
  3. python -m datasets fetch celeba --data_dir={} --from img_align_celeba.zip \\
       list_attr_celeba.txt list_eval_partition.txt
Or unpack Kaggle's archive of it, and give its folder to glow.py by --data_dir."""


# ------------------------------------------------------------------- what is in the data folder


def find_data_files(name: str, data_dir: Path, raw: bool = False) -> list[Path | None]:
    """Return the paths that the loader of a data set reads, with ``None`` for each missing one.

    The list is empty for a data set that is computed. With ``raw``, a table's file from the MAF
    authors does not count.
    """
    if name not in TABLES:
        return list(find_images(name, data_dir).values())

    _, _, candidates = TABLES[name]
    path = first_existing(data_dir, name, candidates[1:] if raw else candidates)
    if path is None:
        return [None]
    test_path = path.with_name(path.name.replace('train', 'test'))
    if test_path == path:
        return [path]
    return [path, test_path if test_path.exists() else None]  # HEPMASS has two files


def data_set_status(name: str, data_dir: Path) -> str:
    """Return in one word what is in ``data_dir`` of a data set.

    It is 'built in', 'absent', 'incomplete', 'present' (without a published checksum), 'verified'
    or 'damaged' (by its checksum); '-' for ``folder``, of which nothing is known.
    """
    if name == 'folder':
        return '-'
    paths = find_data_files(name, data_dir)
    if not paths:
        return 'built in'
    existing = [path for path in paths if path]
    if not existing:
        return 'absent'
    if len(existing) < len(paths):
        return 'incomplete'

    verified = read_verified_signatures(data_dir)
    checks = [file_signature(path) in verified or has_published_md5(path) for path in existing]
    if False in checks:
        return 'damaged'
    return 'verified' if all(checks) else 'present'


def has_published_md5(path: Path) -> bool | None:
    """Return whether a file has the published checksum, or ``None`` where none is published."""
    if path.name not in PUBLISHED_MD5:
        return None
    return md5_of_file(path) == PUBLISHED_MD5[path.name]


def read_verified_signatures(data_dir: Path) -> list[list]:
    """Return the signatures of the files that came from an archive with the right checksum."""
    try:
        with open_regular(data_dir / '.cache' / 'verified.json', MAX_SIGNATURES) as file:
            signatures = json.loads(file.read())
    except (OSError, UserError, ValueError, RecursionError):
        return []
    if not isinstance(signatures, list):
        return []
    return [signature for signature in signatures if is_signature(signature)]


def is_signature(value: Any) -> bool:
    """Return whether a value of a file is the name, size and time of another file."""
    return isinstance(value, list) and [type(item) for item in value] == [str, int, int]


def save_verified_signatures(data_dir: Path, paths: Sequence[Path]) -> None:
    """Note that these files came from an archive with the right checksum."""
    signatures = read_verified_signatures(data_dir)
    signatures += [file_signature(path) for path in paths]
    (data_dir / '.cache').mkdir(exist_ok=True)
    path = data_dir / '.cache' / 'verified.json'
    size_of_file(path)  # raises UserError for a folder or a pipe of that name
    write_json(path, signatures)


def md5_of_file(path: Path) -> str:
    """Return the MD5 checksum of a file as hexadecimal digits."""
    md5 = hashlib.md5(usedforsecurity=False)
    with open_regular(path) as file:
        while block := file.read(BLOCK_SIZE):
            md5.update(block)
    return md5.hexdigest()


# ----------------------------------------------------------------------------------------- fetch


def fetch_data_set(name: str, data_dir: Path, raw: bool = False, given: Sequence[Path] = ()) -> str:
    """Download, verify and unpack what ``data_dir`` lacks of a data set, and return its status.

    Args:
        raw: Take a table from the UCI repository instead of the MAF authors' archive.
        given: Files that the user has downloaded, which are unpacked instead.

    Raises ``UserError`` where the data set cannot be fetched, is incomplete afterwards, or does not
    have the published checksum.
    """
    files = files_to_fetch(name, raw)
    if None in find_data_files(name, data_dir, raw):
        if not given and not all(file.urls for file in files):
            print(CELEBA_STEPS.format(data_dir))
            raise UserError(
                f"{name} needs its owners' consent: download it yourself and name its files by "
                '--from'
            )
        data_dir.mkdir(parents=True, exist_ok=True)
        with file_lock(data_dir / '.fetch.lock', f'another process is fetching into {data_dir}'):
            # Another process may have fetched it while this one waited for the lock.
            if None in find_data_files(name, data_dir, raw):
                fetch_missing_files(name, files, data_dir, raw, given)

    status = data_set_status(name, data_dir)
    if status == 'damaged':
        for path in find_data_files(name, data_dir):
            if path and has_published_md5(path) is False:
                raise checksum_error(path, name)
    return status


def files_to_fetch(name: str, raw: bool) -> tuple[PublishedFile, ...]:
    """Return the files of a data set, or raise ``UserError`` where it has none."""
    if name not in SOURCES or not SOURCES[name].files:
        known = ', '.join(known for known, source in SOURCES.items() if source.files)
        raise UserError(f'{name} is none of those that can be fetched: {known}')
    files = SOURCES[name].raw_files if raw else SOURCES[name].files
    if not files:
        raise UserError(f'{name} has no raw form: leave --raw out')
    return files


def fetch_missing_files(
    name: str,
    files: Sequence[PublishedFile],
    data_dir: Path,
    raw: bool,
    given: Sequence[Path],
) -> None:
    """Unpack the given files, or download and unpack all, and require that nothing is missing."""
    if given:
        is_verified = unpack_given_files(name, files, given, data_dir)
    else:
        for file in files:
            download_and_unpack(name, file, data_dir)
        is_verified = all(file.md5 for file in files)

    paths = find_data_files(name, data_dir, raw)
    existing = [path for path in paths if path]
    if len(existing) < len(paths):
        missing = ', '.join(names_of_missing_files(files, paths))
        raise UserError(f'{name} is not complete in {data_dir}: it still needs {missing}')
    if is_verified:
        save_verified_signatures(data_dir, existing)


def names_of_missing_files(
    files: Sequence[PublishedFile], paths: Sequence[Path | None]
) -> list[str]:
    """Return the names of the published files that hold what is missing."""
    if len(files) < len(paths):  # one archive holds them all
        return [file.name for file in files]
    return [file.name for file, path in zip(files, paths) if path is None]


def unpack_given_files(
    name: str, files: Sequence[PublishedFile], given: Sequence[Path], data_dir: Path
) -> bool:
    """Unpack files that the user has downloaded. Return whether all have a published checksum.

    Raises ``UserError`` for a checksum other than the published one. Files that their owners give
    out on request are exempt, because users may have packed them in another way.
    """
    targets: dict[str, str] = {}
    for file in files:
        targets.update(file.targets)
    checksums = [file.md5 for file in files]
    is_checksum_required = all(file.urls and file.md5 for file in files)

    is_verified = True
    for path in given:
        if not path.exists():
            raise UserError(f'{path}: no such file')
        md5 = md5_of_file(path)
        if md5 not in checksums:
            if is_checksum_required:
                raise UserError(
                    f'{path} has the checksum {md5}, but {name} has {checksums[0]}: '
                    'download it again'
                )
            is_verified = False
        unpack(path, targets, data_dir)
    return is_verified


def download_and_unpack(name: str, file: PublishedFile, data_dir: Path) -> None:
    """Download a file unless it is in ``data_dir`` already, and unpack it there.

    A file that was downloaded here is removed afterwards, unless other data sets need it too.
    """
    path = data_dir / file.name
    is_new = not path.exists()
    if is_new:
        download(file, path)
    elif file.md5 and md5_of_file(path) != file.md5:
        raise checksum_error(path, name)
    try:
        unpack(path, file.targets, data_dir)
    finally:
        if is_new and not file.is_kept:
            path.unlink()


def checksum_error(path: Path, name: str) -> UserError:
    """Return the error for a file that differs from the published one."""
    return UserError(
        f'{path} is not what is published, as its checksum differs: '
        f'move it away and fetch {name} again'
    )


# -------------------------------------------------------------------------------------- download


def download(file: PublishedFile, path: Path) -> None:
    """Download a file from its mirrors to ``path`` and verify its checksum.

    Each mirror continues where the one before broke off, and all are tried again as long as bytes
    arrive. Raises ``UserError`` where the file stays incomplete; what has arrived by then is kept
    in a file ending in ``.part``, which the next call continues.
    """
    part = path.with_name(f'{path.name}.part')
    mirrors = list(file.urls)
    failures: dict[str, requests.RequestException] = {}
    fruitless_rounds = 0

    with open_session() as session:
        while mirrors and fruitless_rounds < MAX_FRUITLESS_ROUNDS:
            if failures:
                time.sleep(PAUSE)
            size_before = size_of_file(part)
            for url in mirrors:
                try:
                    download_and_verify(session, url, file.md5, part)
                except requests.RequestException as error:
                    failures[url] = error
                else:
                    os.replace(part, path)
                    return
            mirrors = [url for url in mirrors if not is_permanent(failures[url])]
            if size_of_file(part) > size_before:
                fruitless_rounds = 0
            else:
                fruitless_rounds += 1

    raise download_error(file.name, part, failures) from failures[file.urls[-1]]


def download_error(
    name: str, part: Path, failures: dict[str, requests.RequestException]
) -> UserError:
    """Return the error that says what went wrong at each mirror, and how to continue."""
    problems = [f'{url}: {describe_transfer_error(error)}' for url, error in failures.items()]
    message = f'{name} cannot be downloaded: {"; ".join(problems)}'
    size = size_of_file(part)
    if size:
        message += f'; {size:,} bytes are kept in {part}, and the same command continues from there'
    return UserError(message)


def size_of_file(path: Path) -> int:
    """Return the size of a regular file in bytes, 0 where it does not exist."""
    try:
        return file_size(path)
    except FileNotFoundError:
        return 0


def download_and_verify(session: requests.Session, url: str, md5: str, part: Path) -> None:
    """Complete ``part`` from a URL. Remove it where its checksum turns out to be wrong."""
    transfer(session, url, part)
    if md5 and md5_of_file(part) != md5:
        part.unlink()
        raise TransferError('its checksum is not the published one')


def transfer(session: requests.Session, url: str, part: Path) -> None:
    """Append to ``part`` what the URL has beyond it, or overwrite it where the server cannot."""
    start = size_of_file(part)
    headers = {'Range': f'bytes={start}-'} if start else {}
    with report_bad_answer():
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    with response:
        content_range = response.headers.get('Content-Range', '')

        if start and response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            if content_range == f'bytes */{start}':  # part is complete
                return
            part.unlink()
            raise TransferError('it is shorter than what was kept of it')

        response.raise_for_status()
        if response.status_code == HTTPStatus.OK:
            start = 0
        elif response.status_code != HTTPStatus.PARTIAL_CONTENT:
            raise TransferError(f'{response.status_code} {response.reason}')
        elif not content_range.startswith(f'bytes {start}-'):
            raise TransferError('it answers with another range than was asked for')
        refuse_encoding(response)
        write_content(response, url, part, start)


def write_content(response: requests.Response, url: str, part: Path, start: int) -> None:
    """Write the content of a response to ``part``, from the position ``start`` on.

    Raises ``UserError`` beyond ``MAX_DOWNLOAD`` bytes, and ``TransferError`` where fewer or more
    bytes arrive than the server has announced.
    """
    size = start
    length = content_length(response)
    total = None if length is None else start + length
    with (
        open(part, 'ab' if start else 'wb') as file,
        byte_progress_bar(part.stem, initial=start, total=total) as bar,
    ):
        for block in iterate_content(response):
            file.write(block)
            bar.update(len(block))
            size += len(block)
            if size > MAX_DOWNLOAD:
                break

    if size > MAX_DOWNLOAD:
        part.unlink()
        raise UserError(f'{url} sends more than {MAX_DOWNLOAD:,} bytes, which no data set has')
    if total is not None and size != total:
        raise TransferError('it broke off')


def refuse_encoding(response: requests.Response) -> None:
    """Raise ``TransferError`` where the content is compressed for the transfer, unasked.

    A few bytes of it could be unpacked to any number.
    """
    encoding = response.headers.get('Content-Encoding') or 'identity'
    if encoding.lower() != 'identity':
        raise TransferError(f'it sends the file in the encoding {encoding}')


def content_length(response: requests.Response) -> int | None:
    """Return how many bytes a server announces, or ``None`` where it does not.

    Raises ``TransferError`` where that is not the number of bytes of a file.
    """
    length = response.headers.get('Content-Length')
    if length is None:
        return None
    if not re.fullmatch('[0-9]{1,18}', length):
        raise TransferError('it announces a length that no file has')
    return int(length)


def iterate_content(response: requests.Response) -> Iterator[bytes]:
    """Yield the content of a response in blocks."""
    with report_bad_answer():
        yield from response.iter_content(2**14)


def byte_progress_bar(description: str, initial: int = 0, total: int | None = None) -> tqdm:
    """Return a progress bar that counts bytes."""
    return tqdm(
        desc=description,
        initial=initial,
        total=total,
        unit='B',
        unit_scale=True,
        dynamic_ncols=True,
    )


def is_permanent(error: requests.RequestException) -> bool:
    """Return whether a mirror does not have the file, or does not give it out."""
    if not isinstance(error, requests.HTTPError) or error.response is None:
        return False
    return error.response.status_code in UNAVAILABLE


def describe_transfer_error(error: requests.RequestException) -> str:
    """Return in a few words why a transfer failed."""
    if isinstance(error, TransferError):
        return one_line(error)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return truncate(f'{error.response.status_code} {error.response.reason}', 100)
    if 'timed out' in str(error):
        return 'it does not answer'

    descriptions = (  # the first two are also a ConnectionError
        (requests.exceptions.ProxyError, 'the proxy fails'),
        (requests.exceptions.SSLError, 'its certificate is not trusted'),
        (requests.ConnectionError, 'no connection'),
        (requests.TooManyRedirects, 'it redirects without end'),
        (requests.exceptions.ChunkedEncodingError, 'it broke off'),
    )
    for error_class, description in descriptions:
        if isinstance(error, error_class):
            return description
    return one_line(error)


# ---------------------------------------------------------------------------------------- unpack


def unpack(archive: Path, targets: dict[str, str], data_dir: Path) -> None:
    """Unpack the wanted members of an archive into ``data_dir``.

    ``targets`` maps regular expressions of the members' names to paths below ``data_dir``. An
    archive has no say in where its members go, so none can leave ``data_dir``. They are moved there
    when all are complete, and a file that is there already is not overwritten.
    """
    scratch = data_dir / '.unpack'
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
    try:
        with bounded_memory(archive):
            unpacked = extract_members(archive, targets, scratch)
        if not unpacked:
            example = next(iter(targets.values()))
            raise UserError(f'{archive} holds nothing that is wanted of it, such as {example}')
        for target in unpacked:
            move_into_place(scratch / target, data_dir / target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def extract_members(archive: Path, targets: dict[str, str], scratch: Path) -> list[str]:
    """Extract the wanted members into an empty folder. Return their paths relative to it."""
    extracted: list[str] = []
    n_bytes = 0
    with (
        contextlib.closing(iterate_members(archive)) as members,
        byte_progress_bar(f'unpacking {archive.name}') as bar,
    ):
        for member in members:
            target = match_target(member.name, targets)
            if target is None:
                continue
            if not member.is_regular or target in extracted:
                raise UserError(
                    f'{archive} is not to be trusted: {member.name} is in it twice, '
                    'or is not a regular file'
                )
            extracted.append(target)

            path = scratch / target
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, 'wb') as file:
                for block in read_blocks(archive, member):
                    n_bytes += len(block)
                    if n_bytes > MAX_UNPACKED:
                        raise UserError(
                            f'{archive} is not to be trusted: '
                            f'it unpacks to over {MAX_UNPACKED:,} bytes'
                        )
                    file.write(block)
                    bar.update(len(block))
    return extracted


def match_target(name: str, targets: dict[str, str]) -> str | None:
    """Return where a member goes by the first pattern that matches it, else ``None``."""
    for pattern, target in targets.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(target)
    return None


def move_into_place(path: Path, target: Path) -> None:
    """Move a file to its target, unless the same is there. Another one there is an error."""
    if target.exists():
        if not filecmp.cmp(path, target, shallow=False):
            raise UserError(f'{target} is there already, and differs: move it away first')
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)
