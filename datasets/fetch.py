"""Where the data sets come from, and how their files get into a folder: downloaded, verified, unpacked.

requests does the transfer, and not pooch, which starts a broken download again: here a .part stays and is gone on with.
"""

import filecmp
import hashlib
import json
import os
import re
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial

import requests
from tqdm import tqdm

from common.errors import UserError
from common.files import file_lock, file_signature, first_existing, write_json

from .images import find_images
from .tabular import TABLES

TIMEOUT = 10, 30  # seconds to connect, and without a byte
TRIES, PAUSE = 4, 2  # rounds over the mirrors that bring nothing, and seconds between them
MAX_DOWNLOAD, MAX_UNPACKED = 4 * 2**30, 16 * 2**30  # bytes, more than any of these sets has


@dataclass(frozen=True)
class File:
    """One to download: an archive, or a file of the data set itself"""

    name: str
    urls: tuple  # mirrors of each other; none where only the owner's form gives it out
    members: dict  # regular expressions of what is wanted of it -> where that goes below data_dir
    md5: str = ''  # '' where none is published
    kept: bool = False  # as other data sets come from it too


@dataclass(frozen=True)
class Source:
    kind: str
    items: str
    dimensions: str
    download: str  # size
    origin: str
    license: str
    files: tuple = ()
    raw: tuple = ()  # the same from the UCI repository, as it was before its preprocessing
    citation: str = ''


def mnist_file(name, md5):
    mirrors = (
        'https://ossci-datasets.s3.amazonaws.com/mnist/',
        'https://storage.googleapis.com/cvdf-datasets/mnist/',
    )
    return File(
        f'{name}.gz',
        tuple(mirror + f'{name}.gz' for mirror in mirrors),
        {re.escape(f'{name}.gz'): f'mnist/{name}.gz'},
        md5,
    )


def maf_file(*paths):
    """The one archive of the five tables, of which each takes its own"""
    return File(
        'maf_data.tar.gz',
        ('https://zenodo.org/records/1161203/files/data.tar.gz?download=1',),
        {rf'(\./)?data/{re.escape(path)}': path for path in paths},
        '9b9c9b0375315ad270eba4ce80c093ab',
        True,
    )


def uci_file(number, title, name, *members):
    return File(
        f'uci_{name}.zip',
        (f'https://archive.ics.uci.edu/static/public/{number}/{title}.zip',),
        {f'(.*/)?{re.escape(member)}': f'{name}/{member}' for member in members},
    )


MAF = 'Papamakarios, Pavlakou and Murray: Masked Autoregressive Flow for Density Estimation. NeurIPS 2017'
SOURCES = {
    'faces': Source('images', '12,000', '3x32x32', '-', 'drawn by datasets/faces.py', 'MIT'),
    'digits': Source('images', '1,797', '1x8x8', '-', 'scikit-learn', 'CC BY 4.0'),
    'mnist': Source(
        'images',
        '70,000',
        '1x28x28',
        '12 MB',
        'LeCun, Cortes, Burges',
        'CC BY-SA 3.0',
        (
            mnist_file('train-images-idx3-ubyte', 'f68b3c2dcbeaaa9fbdd348bbdeb94873'),
            mnist_file('train-labels-idx1-ubyte', 'd53e105ee54ea40749a09fcbcd1e9432'),
            mnist_file('t10k-images-idx3-ubyte', '9fb629c4189551a2d022fa330f9573f3'),
            mnist_file('t10k-labels-idx1-ubyte', 'ec29112dd5afa0611ce80d1b7f02629c'),
        ),
        citation='LeCun, Bottou, Bengio and Haffner: Gradient-based learning applied to document recognition. 1998',
    ),
    'cifar10': Source(
        'images',
        '60,000',
        '3x32x32',
        '170 MB',
        'cs.toronto.edu/~kriz',
        'none stated',
        (
            File(
                'cifar-10-python.tar.gz',
                ('https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz',),
                {r'(\./)?(cifar-10-batches-py/(data_batch_[1-5]|test_batch))': r'cifar10/\2'},
                'c58f30108f718f92721af3b95e74349a',
            ),
        ),
        citation='Krizhevsky: Learning Multiple Layers of Features from Tiny Images. 2009',
    ),
    'celeba': Source(
        'images',
        '202,599',
        '3x178x218',
        '1.4 GB',
        'mmlab.ie.cuhk.edu.hk',
        'non-commercial research',
        (
            File(
                'img_align_celeba.zip',
                (),
                {r'(.*/)?img_align_celeba/(\d{6}\.jpg)': r'celeba/img_align_celeba/\2'},
                '00d2c5bc6d35e252742224ab0c1e8fcb',
            ),
            File(
                'list_attr_celeba.txt',
                (),
                {r'(.*/)?list_attr_celeba\.txt': 'celeba/list_attr_celeba.txt'},
                '75e246fa4810816ffd6ee81facbd244c',
            ),
            File(
                'list_eval_partition.txt',
                (),
                {r'(.*/)?list_eval_partition\.txt': 'celeba/list_eval_partition.txt'},
                'd32c9cbf5e040fd4025c592c306e6668',
            ),
        ),
        citation='Liu, Luo, Wang and Tang: Deep Learning Face Attributes in the Wild. ICCV 2015',
    ),
    'folder': Source('images', 'any', '3x64x64', '-', 'your own', 'yours'),
    'power': Source(
        'rows',
        '2,049,280',
        '6',
        '0.8 GB',
        'MAF authors, of UCI 235',
        'CC BY 4.0',
        (maf_file('power/data.npy'),),
        (
            uci_file(
                235,
                'individual+household+electric+power+consumption',
                'power',
                'household_power_consumption.txt',
            ),
        ),
        MAF,
    ),
    'gas': Source(
        'rows',
        '1,052,065',
        '8',
        '0.8 GB',
        'MAF authors, of UCI 322',
        'CC BY 4.0',
        (maf_file('gas/ethylene_CO.pickle'),),
        (uci_file(322, 'gas+sensor+array+under+dynamic+gas+mixtures', 'gas', 'ethylene_CO.txt'),),
        MAF,
    ),
    'hepmass': Source(
        'rows',
        '525,123',
        '21',
        '0.8 GB',
        'MAF authors, of UCI 347',
        'CC BY 4.0',
        (maf_file('hepmass/1000_train.csv', 'hepmass/1000_test.csv'),),
        (uci_file(347, 'hepmass', 'hepmass', '1000_train.csv.gz', '1000_test.csv.gz'),),
        MAF,
    ),
    'miniboone': Source(
        'rows',
        '36,488',
        '43',
        '0.8 GB',
        'MAF authors, of UCI 199',
        'CC BY 4.0',
        (maf_file('miniboone/data.npy'),),
        (uci_file(199, 'miniboone+particle+identification', 'miniboone', 'MiniBooNE_PID.txt'),),
        MAF,
    ),
    'bsds300': Source(
        'rows',
        '1,300,000',
        '63',
        '0.8 GB',
        'MAF authors, of Berkeley',
        'non-commercial research',
        (maf_file('BSDS300/BSDS300.hdf5'),),
        citation=MAF,
    ),
    '8gaussians ... swissroll': Source('rows', 'drawn anew', '2', '-', 'datasets/toy.py', 'MIT'),
    'u1 ... u4': Source('energy', '-', '2', '-', 'datasets/toy.py', 'MIT'),
}
# Of files as they lie in the folder; CIFAR-10's as torchvision has them
MD5 = {
    **{file.name: file.md5 for file in SOURCES['mnist'].files},
    'data_batch_1': 'c99cafc152244af753f735de768cd75f',
    'data_batch_2': 'd4bba439e000b95fd0a9bffe97cbabec',
    'data_batch_3': '54ebc095f3ab1f0389bbae665268c751',
    'data_batch_4': '634d18415352ddfa80567beed471001a',
    'data_batch_5': '482c414d41f54cd18b22e5b47cb7c3cb',
    'test_batch': '40351d587109b95175f43aff81a1287e',
}
CELEBA_STEPS = """\
CelebA is handed out by its owners alone, for non-commercial research:
  1. open https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, read its agreement, and follow a link to its downloads
  2. download Img/img_align_celeba.zip, Anno/list_attr_celeba.txt and Eval/list_eval_partition.txt
  3. python -m datasets fetch celeba --data_dir={} --from img_align_celeba.zip list_attr_celeba.txt \\
       list_eval_partition.txt"""


# ------------------------------------------------------------------------------------------------- what is there


def locate(name, data_dir, raw=False):
    """-> the paths that the loader of a data set would read, None for what is missing; [] if it reads none"""
    if name not in TABLES:
        return find_images(name, data_dir)
    path = first_existing(data_dir, name, TABLES[name][2][int(raw) :])
    test = path and path.with_name(path.name.replace('train', 'test'))  # HEPMASS has two
    return [path, *([] if test == path else [test if test.exists() else None])]


def state(name, data_dir):
    """-> 'built in', 'absent', 'incomplete', 'present' or, by its checksums, 'verified' or 'damaged'"""
    if name == 'folder':
        return '-'
    paths = locate(name, data_dir)
    if None in paths:
        return 'incomplete' if any(paths) else 'absent'
    known = verified_stamps(data_dir)
    right = [
        file_signature(path) in known
        or (checksum(path) == MD5[path.name] if path.name in MD5 else None)
        for path in paths
    ]
    if False in right:
        return 'damaged'
    return 'built in' if not paths else 'verified' if all(right) else 'present'


def verified_stamps(data_dir):
    try:
        return json.loads((data_dir / '.cache' / 'verified.json').read_text())
    except (OSError, ValueError):
        return []


def checksum(path):
    md5 = hashlib.md5(usedforsecurity=False)
    with open(path, 'rb') as file:
        for content in iter(partial(file.read, 2**20), b''):
            md5.update(content)
    return md5.hexdigest()


# -------------------------------------------------------------------------------------------------------- fetch


def fetch(name, data_dir, raw=False, given=()):
    """Puts the files of a data set below data_dir -> its state. given: files that the user has downloaded."""
    if name not in SOURCES or not SOURCES[name].files:
        fetched = [known for known, source in SOURCES.items() if source.files]
        raise UserError(f'{name} is none of those that can be fetched: {", ".join(fetched)}')
    files = SOURCES[name].raw if raw else SOURCES[name].files
    if not files:
        raise UserError(f'{name} has no raw form: leave --raw out')
    if None in locate(name, data_dir, raw):
        if not given and not all(file.urls for file in files):
            print(CELEBA_STEPS.format(data_dir))
            raise UserError(
                f"{name} needs its owners' consent: download it yourself, and name its files by --from"
            )
        data_dir.mkdir(parents=True, exist_ok=True)
        with file_lock(data_dir / '.fetch.lock', f'another process fetches into {data_dir}'):
            if None in locate(name, data_dir, raw):
                get(name, files, data_dir, raw, given)
    found = state(name, data_dir)
    if found == 'damaged':
        damaged = [
            path
            for path in locate(name, data_dir)
            if path.name in MD5 and checksum(path) != MD5[path.name]
        ]
        raise UserError(
            f'{damaged[0]} is not what is published, by its checksum: move it away and fetch {name} again'
        )
    return found


def get(name, files, data_dir, raw, given):
    members = {pattern: target for file in files for pattern, target in file.members.items()}
    right = True
    for path in given:
        if not path.is_file():
            raise UserError(f'{path}: no such file')
        md5 = checksum(path)
        if not any(md5 == file.md5 for file in files):
            if all(file.urls and file.md5 for file in files):
                raise UserError(
                    f'{path} has the checksum {md5}, and {name} has {files[0].md5}: download it again'
                )
            right = False
        place(path, members, data_dir)
    for file in files if not given else ():
        path = data_dir / file.name
        is_new = not path.exists()
        if is_new:
            download(file, path)
        elif file.md5 and checksum(path) != file.md5:
            raise UserError(
                f'{path} is not what is published, by its checksum: move it away and fetch {name} again'
            )
        try:
            place(path, file.members, data_dir)
        finally:
            if is_new and not file.kept:
                path.unlink()
        right = right and bool(file.md5)
    paths = locate(name, data_dir, raw)
    if None in paths:
        missing = [
            file.name for file, path in zip(files, paths) if path is None or len(files) < len(paths)
        ]
        raise UserError(
            f'{name} is not complete in {data_dir}: it still needs {", ".join(missing)}'
        )
    if right:
        stamps = verified_stamps(data_dir) + [file_signature(path) for path in paths]
        (data_dir / '.cache').mkdir(exist_ok=True)
        write_json(data_dir / '.cache' / 'verified.json', stamps)


class TransferError(requests.RequestException):
    pass


def download(file, path):
    """path is the whole verified file, or UserError is raised, and what came of it lies in path.part."""
    part = path.with_name(f'{path.name}.part')
    size = lambda: part.stat().st_size if part.exists() else 0
    problems, mirrors, tries = {}, list(file.urls), TRIES
    with requests.Session() as session:
        session.headers['Accept-Encoding'] = (
            'identity'  # ranges and checksums are those of the bytes as they lie
        )
        while mirrors and tries:
            before = size()
            for url in list(mirrors):
                try:
                    transfer(session, url, part, size())
                    if file.md5 and checksum(part) != file.md5:
                        part.unlink()
                        raise TransferError('its checksum is not the published one')
                    os.replace(part, path)
                    return
                except requests.RequestException as error:
                    problems[url] = explain(error)
                    if isinstance(error, requests.HTTPError) and error.response.status_code in (
                        401,
                        403,
                        404,
                        410,
                    ):
                        mirrors.remove(url)
            tries = TRIES if size() > before else tries - 1
            if mirrors and tries:
                time.sleep(PAUSE)
    rest = (
        f'; {size():,} bytes are kept in {part}, and the same command goes on from there'
        if size()
        else ''
    )
    raise UserError(
        f'{file.name} cannot be downloaded: '
        + '; '.join(f'{url}: {problem}' for url, problem in problems.items())
        + rest
    )


def transfer(session, url, part, start):
    """Adds to part, of start bytes, what the url has beyond them"""
    headers = {'Range': f'bytes={start}-'} if start else {}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:
            if response.headers.get('Content-Range') == f'bytes */{start}':
                return  # all of it was there
            part.unlink()
            raise TransferError('it is shorter than what was kept of it')
        response.raise_for_status()
        goes_on = response.status_code == 206
        if goes_on and not response.headers.get('Content-Range', '').startswith(f'bytes {start}-'):
            raise TransferError('it answers with another range than was asked for')
        start = start if goes_on else 0
        length = response.headers.get('Content-Length', '')
        total = start + int(length) if length.isdigit() else None
        with (
            open(part, 'ab' if goes_on else 'wb') as file,
            tqdm(
                desc=part.stem,
                initial=start,
                total=total,
                unit='B',
                unit_scale=True,
                dynamic_ncols=True,
            ) as bar,
        ):
            for content in response.iter_content(2**14):
                file.write(content)
                bar.update(len(content))
                if bar.n > MAX_DOWNLOAD:
                    part.unlink()
                    raise UserError(
                        f'{url} sends more than {MAX_DOWNLOAD:,} bytes, which no data set has'
                    )
        if total is not None and bar.n != total:
            raise TransferError('it broke off')


def explain(error):
    """What a failed transfer comes down to, in a few words"""
    if isinstance(error, TransferError):
        return str(error)
    if isinstance(error, requests.HTTPError):
        return f'{error.response.status_code} {error.response.reason}'
    if 'timed out' in str(error):
        return 'it does not answer'
    kinds = {
        requests.TooManyRedirects: 'it redirects without end',
        requests.exceptions.ProxyError: 'the proxy fails',
        requests.exceptions.SSLError: 'its certificate is not trusted',
        requests.ConnectionError: 'no connection',
        requests.exceptions.ChunkedEncodingError: 'it broke off',
    }
    return next((words for kind, words in kinds.items() if isinstance(error, kind)), str(error))


# ------------------------------------------------------------------------------------------------------- unpack


def entries(archive):
    """-> name, whether it is a regular file, and a function that opens it, of each member of a zip or tar; of a file
    that is neither, its own"""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                yield info.filename, kind in (0, stat.S_IFREG), partial(zipped.open, info)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for member in tar:
                yield member.name, member.isreg(), partial(tar.extractfile, member)
    else:
        yield archive.name, True, partial(open, archive, 'rb')


def place(archive, members, data_dir):
    """Unpacks the members of an archive whose names are wanted, to places that members gives and the archive has no say
    in: nothing can leave data_dir. They are moved there when all are whole; what is there already is not overwritten."""
    scratch = data_dir / '.unpack'
    shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
    targets, n_bytes = [], 0
    try:
        with tqdm(
            desc=f'unpacking {archive.name}', unit='B', unit_scale=True, dynamic_ncols=True
        ) as bar:
            for name, is_file, opened in entries(archive):
                target = next(
                    (
                        match.expand(members[pattern])
                        for pattern in members
                        if (match := re.fullmatch(pattern, name))
                    ),
                    None,
                )
                if target is None:
                    continue
                if not is_file or target in targets:
                    raise UserError(
                        f'{archive} is not to be trusted: {name} is in it twice, or is no regular file'
                    )
                targets.append(target)
                (scratch / target).parent.mkdir(parents=True, exist_ok=True)
                with opened() as source, open(scratch / target, 'wb') as file:
                    for content in iter(partial(source.read, 2**20), b''):
                        n_bytes += len(content)
                        if n_bytes > MAX_UNPACKED:
                            raise UserError(
                                f'{archive} is not to be trusted: it unpacks to over {MAX_UNPACKED:,} bytes'
                            )
                        file.write(content)
                        bar.update(len(content))
        if not targets:
            raise UserError(
                f'{archive} holds nothing that is wanted of it, such as {next(iter(members.values()))}'
            )
        for target in targets:
            if (data_dir / target).exists():
                if not filecmp.cmp(scratch / target, data_dir / target, shallow=False):
                    raise UserError(
                        f'{data_dir / target} is there already, and differs: move it away first'
                    )
            else:
                (data_dir / target).parent.mkdir(parents=True, exist_ok=True)
                os.replace(scratch / target, data_dir / target)
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        EOFError,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise UserError(f'{archive} cannot be unpacked: {error}; download it again') from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
