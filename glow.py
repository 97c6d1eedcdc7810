"""Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018).

    python glow.py --train                         drawn faces, ten minutes on two CPU cores
    python glow.py --evaluate                      bits/dim of the newest model on the test split
    python glow.py --generate --z_std=0.7          samples at temperature 0.7
    python glow.py --visualize --vis_attrs=8,20    edit attributes of a test image
    python glow.py --visualize --vis_img=me.jpg    edit a photo of your own
    python glow.py --visualize --vis_img=me.jpg,you.jpg --vis_gif   from one photo to another
    python glow.py --evaluate --input=PHOTOS       bits/dim of photos, the least likely ones by name
    python glow.py --train --dataset=digits --condition=classes     p(image | class)
    python glow.py --generate --given=7            samples of one class
    torchrun --nproc_per_node=8 glow.py --train --dataset=celeba --data_dir=CELEBA

Notation: sec., eq. and fig. refer to the paper, arXiv 1807.03039. Images are (B, C, H, W).
Every layer is a bijection with one protocol: ``forward(x) -> (z, logdet)`` and
``inverse(z) -> (x, logdet)``. ``logdet``, of shape (B,), is the logarithm of the absolute
determinant of the Jacobian of the direction that was called, in nats.
"""

if __name__ == '__main__':
    from common.interrupt import exit_on_interrupt

    exit_on_interrupt()  # the imports below take seconds

import contextlib
import logging
import math
import os
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common.averages import MovingAverage
from common.batches import Stream, batch_indices, seeded_generator
from common.bounds import memory_for, memory_limit
from common.checkpoints import CheckpointFormat, batch_of_all_processes, require_entries
from common.devices import collect_gradients, keep_on_device, scales_gradients, to_device
from common.errors import UserError, exit_on_user_error, printable, report_error, warn_on_error
from common.files import digest, make_writable, write_json
from common.graphs import CapturedStep, can_capture
from common.logs import TrainingLog, progress_bar
from common.options import CommandLine, Options, RunRequest, option, resolve_config
from common.precision import without_tf32
from common.runs import (
    BEST,
    LAST,
    StopQuestion,
    catch_stop_signals,
    is_validation_due,
    load_on_rank_0,
    load_selected_checkpoint,
    local_device,
    open_run_folder,
    print_how_to_go_on,
    print_if_over,
    require_agreement,
    require_launcher,
    stop_if_diverged,
)
from common.tensors import tensor_bytes, tensor_cache
from datasets import (
    IMAGE_DATASETS,
    PHOTO_DATASETS,
    ImageCondition,
    ImageData,
    ImageSplit,
    arrange_in_rows,
    condition_of_checkpoint,
    count_conditions,
    count_photos,
    flip_randomly,
    has_photos,
    load_input_photos,
    load_photo,
    load_run_images,
    name_for_file,
    save_grid,
    shift_randomly,
    split_paths,
    values_per_image,
)
from datasets.anomalies import percentiles, print_least_likely, score_quantiles
from datasets.cache import cache_beside_data
from datasets.latents import (
    EDITS,
    NEIGHBOURS,
    OTHER_CONDITIONS,
    RECONSTRUCTIONS,
    Start,
    choose_picture,
    draw_edits,
    draw_interpolation,
    draw_neighbours,
    draw_other_conditions,
    draw_reconstructions,
)
from datasets.own_tables import frame_of_columns, require_new_table, save_table

# ------------------------------------------------------------------------------------------ config

NAME = 'glow'
ITEMS = 'images'
VALIDATE_STEPS = 500  # validation comes at the end of an epoch, at least so many steps apart
SAVE_SECONDS = 600.0  # between checkpoints, besides those at each validation
LOG_STEPS = 20
LEAST_VALIDATION_IMAGES = 10  # fewer say little of a percentile
TEMPERATURES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of --generate without --z_std
# Of a model with conditions, samples of each class or combination of attributes are drawn
Z_STD_OF_EACH = 0.7  # the temperature, without --z_std
MAX_SHOWN = 16  # how many of the classes or combinations
DZ_SCALE, DZ_IMAGES = 1.6, 30_000  # attribute directions, as in the paper's demo
# The score that is the bits/dim of p(x), where the model is one of p(x | y)
WITHOUT_CONDITIONS = 'bits_per_dim_without_conditions'
# Scores that say how often conditions are guessed right, and who guesses
GUESSERS = {
    'accuracy_of_bayes_rule': "by Bayes' rule",
    'accuracy_of_head': 'by the head',
    'accuracy_of_most_frequent': 'by always guessing the most frequent',
}


@dataclass
class Config(Options):
    """Options of a run. A checkpoint keeps them, to rebuild the model from."""

    dataset: str = option('data', 'faces', ', '.join(IMAGE_DATASETS))
    data_dir: str = option('data', 'data', 'where the data is, or is kept once drawn')
    image_size: int = option('data', 64, 'pixels per side, of faces, celeba and folder', low=1)
    skip_broken: bool = option(
        'data', False, 'leave out photos that cannot be decoded or are too small, and name them'
    )
    n_bits: int = option(
        'model', 5, 'grey levels are reduced to 2^n_bits per channel', low=1, high=8
    )
    n_levels: int = option(
        'model',
        3,
        'levels that end in a split; one more follows: L = n_levels + 1 in the paper',
        low=1,
        high=9,
    )
    depth: int = option('model', 32, 'steps of flow per level, K in the paper', low=1, high=2**10)
    width: int = option(
        'model', 512, "channels of the coupling networks' hidden layers", low=1, high=2**14
    )
    coupling: str = option('model', 'affine', 'affine or additive', choices=('affine', 'additive'))
    permutation: str = option(
        'model',
        'conv1x1',
        'what mixes the channels before a coupling: conv1x1, shuffle or reverse',
        choices=('conv1x1', 'shuffle', 'reverse'),
    )
    plain_conv1x1: bool = option(
        'model', False, 'learn the matrices of the 1x1 convolutions, not their PLU factors'
    )
    condition: list = option(
        'model',
        None,
        'learn p(image | y), where y is its class (classes) or some attributes (Smiling,Male)',
    )
    weight_y: float = option(
        'model', 0.01, 'with --condition, weight of the loss of a linear head that guesses y'
    )
    fixed_top: bool = option(
        'model', False, 'the last prior is N(0, I), and only --condition changes it'
    )
    checkpoint_grads: bool = option(
        'optimization', False, 'less memory, slower: the backward pass recomputes activations'
    )
    bf16: bool = option(
        'optimization', False, 'networks in bfloat16; latents and densities stay float32'
    )
    compile: bool = option(
        'optimization', False, 'compile the step of flow: half a minute at the start, then faster'
    )
    no_cuda_graph: bool = option(
        'optimization', False, 'launch the kernels of a step one by one, on a single GPU too'
    )
    n_epochs: int = option('optimization', 100, 'epochs', low=1)
    n_epochs_warmup: float = option(
        'optimization', 2.0, 'epochs over which the learning rate rises linearly from 0'
    )
    batch_size: int = option('optimization', 16, 'images per process', low=1, high=2**20)
    batch_size_init: int = option('optimization', 256, 'images that initialize the actnorms', low=1)
    translate: int = option(
        'optimization', 0, 'training images are shifted by up to so many pixels', high=2**10
    )
    flip: float = option(
        'optimization', 0.0, 'probability that a training image is mirrored', high=1
    )
    lr: float = option('optimization', 1e-3, "Adam's learning rate", high=1e6)
    lr_decay: float = option(
        'optimization', 0.0, 'last fraction of training over which the rate falls to 0', high=1
    )
    grad_norm_clip: float = option('optimization', 50.0, 'gradients are clipped at this norm')
    ema_decay: float = option(
        'optimization',
        0.999,
        'Polyak average of the weights, which all but training uses; 0 turns it off',
        high=1,
    )
    seed: int = option(
        'optimization', 0, 'of initialization, shuffling, noise and samples', high=2**63 - 1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        divisor = 2 ** (self.n_levels + 1)
        if self.image_size % divisor:
            raise UserError(
                f'image size {self.image_size} is not divisible by 2^(n_levels + 1) = {divisor}: '
                'lower --n_levels or change --image_size'
            )
        if self.translate >= self.image_size:
            raise UserError(
                f'--translate={self.translate} shifts an image of {self.image_size} pixels away'
            )
        if self.plain_conv1x1 and self.permutation != 'conv1x1':
            raise UserError(
                f'--permutation={self.permutation} has no 1x1 convolutions: leave out '
                '--plain_conv1x1'
            )


@dataclass
class Request(RunRequest):
    """Options of one call, which a checkpoint does not keep."""

    z_std: float = option(
        'output',
        None,
        'temperature of samples (default: several, or 0.7 for each class); '
        'with --visualize, a factor of the latents factored out by the splits (default: 1)',
        high=100,
    )
    n_samples: int = option(
        'output',
        None,
        'samples with --z_std (default: 32, or 8 for each class)',
        low=1,
        high=10**6,
    )
    given: str = option(
        'output', None, 'what a model with conditions is given: 7, or Smiling,-Male'
    )
    vis_attrs: list = option('output', None, 'attributes by index or name (default: all)')
    vis_alphas: list[float] = option(
        'output',
        (-2.0, -1.0, 0.0, 1.0, 2.0),
        'how far to move along them (default: -2,-1,0,1,2)',
        low=-1000,
        high=1000,
    )
    vis_img: str = option(
        'output',
        '',
        'a photo of your own, or two to interpolate between: a.jpg,b.jpg (default: test images)',
    )
    vis_gif: bool = option(
        'output', False, 'show the steps of edits or interpolations as a GIF too'
    )
    input: str = option(
        'output', '', 'evaluate the photos in this folder instead of the test split'
    )
    scores: str = option(
        'output', '', 'write bits/dim and percentile of each image to this file, a .csv'
    )
    overwrite: bool = option('output', False, 'replace the file of --scores')
    output: str = option(
        'output', '', 'folder for pictures and results (default: that of the checkpoint)'
    )
    accept_changed_data: bool = option(
        'run', False, 'go on although the images are not those that the run was trained on before'
    )

    @property
    def is_edit(self) -> bool:
        """Whether --visualize is asked to move an image along attributes."""
        return bool(self.vis_attrs) or self.vis_alphas is not Request.vis_alphas

    def require_consistency(self, mode: str) -> None:
        """Raise ``UserError`` where an option has no effect because of the others."""
        if mode == 'generate' and self.z_std is None and self.n_samples is not None:
            raise UserError(
                '--n_samples goes with --z_std: without it, a few samples are drawn at each of '
                'several temperatures, or for each class'
            )
        if mode == 'visualize' and self.given is not None and self.is_edit:
            raise UserError(
                '--given changes the conditions: leave out --vis_attrs and --vis_alphas'
            )
        if self.scores:
            if not self.scores.endswith('.csv'):
                raise UserError(f'--scores={self.scores} names images: it should end in .csv')
            require_new_table(Path(self.scores), self.overwrite)


MODES = {
    'train': 'train a new model, or go on with --resume or --restore_file',
    'evaluate': 'bits/dim on the test split',
    'generate': 'draw samples',
    'visualize': 'edit the attributes of an image; without any, reconstruct and interpolate',
    'check': 'error of the inverse on the test split, and the layer it comes from',
}
# Options that may differ from machine to machine
PATHS = ('data_dir', 'output_dir', 'restore_file', 'vis_img', 'input', 'scores', 'output')
# Training without a checkpoint takes all options of Config as well
MODE_OPTIONS = {
    'train': {'data_dir', 'checkpoint_grads', 'bf16', 'compile', 'no_cuda_graph', 'n_epochs'}
    | {'skip_broken', 'resume', 'max_skips', 'detect_anomaly', 'accept_changed_data'},
    'evaluate': {'data_dir', 'skip_broken', 'batch_size', 'bf16'}
    | {'input', 'scores', 'overwrite', 'output'},
    'generate': {'seed', 'bf16', 'z_std', 'n_samples', 'given', 'output'},
    'visualize': {'data_dir', 'skip_broken', 'batch_size', 'bf16'}
    | {'z_std', 'given', 'vis_attrs', 'vis_alphas', 'vis_img', 'vis_gif', 'output'},
    'check': {'data_dir', 'skip_broken', 'batch_size', 'bf16'},
}
LARGE = dict(image_size=64, n_levels=3, depth=32, width=512, n_epochs=80, batch_size=16)
# What a data set changes of the defaults above. For celeba and mnist these are the settings of
# github.com/kamenbliznashki/normalizing_flows. Bits/dim are divided by the number of values, the
# bits of a class are not: the fewer values, the larger is the weight_y that balances them.
DEFAULTS: dict[str, dict[str, Any]] = {
    'faces': dict(
        image_size=32,
        n_levels=2,
        depth=8,
        width=64,
        n_epochs=12,
        n_epochs_warmup=0.5,
        batch_size=32,
        lr=5e-3,
        lr_decay=1 / 3,
        ema_decay=0.99,
    ),
    'digits': dict(
        image_size=8,
        n_bits=4,
        n_levels=1,
        depth=8,
        width=64,
        n_epochs=30,
        batch_size=32,
        lr_decay=1 / 3,
        ema_decay=0.99,
        weight_y=0.5,
    ),
    'mnist': dict(image_size=32, n_bits=8, translate=1, weight_y=0.04),
    'cifar10': dict(image_size=32, n_bits=8, n_levels=2),
    'celeba': LARGE,
    'folder': LARGE,
}
# Those of photos, celeba and folder, by how many there are: the first limit that is above their
# number counts. Few photos are soon learned by heart; mirrored and shifted ones delay that.
SMALL = dict(
    image_size=32,
    n_levels=2,
    depth=8,
    width=64,
    n_epochs_warmup=5.0,
    batch_size=16,
    translate=2,
    flip=0.5,
    lr=5e-3,
    lr_decay=0.33,
    ema_decay=0.99,
)
MEDIUM = {**SMALL, **dict(depth=16, n_epochs_warmup=2.0, batch_size=32, translate=0, lr=2e-3)}
BY_PHOTOS: dict[float, dict[str, Any]] = {
    300: {**SMALL, 'n_epochs': 500},
    1_000: {**SMALL, 'n_epochs': 250},
    3_000: {**SMALL, 'n_epochs': 100, 'n_epochs_warmup': 2.0, 'translate': 1},
    50_000: {**MEDIUM, 'n_epochs': 36},
    math.inf: LARGE,
}
PHOTO_OPTIONS = frozenset().union(*BY_PHOTOS.values())


def photo_defaults(n_photos: int) -> dict[str, Any]:
    """Return the defaults of celeba or folder where there are so many photos."""
    return next(defaults for limit, defaults in BY_PHOTOS.items() if n_photos < limit)


# ------------------------------------------------------------------------------------------ layers

S_MIN = 0.5  # smallest scale of a coupling
LOG_STD_MAX = 2.0  # bound on the log-deviation of a split's Gaussian, both ways


class Dequantize(nn.Module):
    """Dequantization: adds uniform noise to the bins of an ``n_bits``-bit image.

    A uint8 image is reduced to its top n = ``n_bits`` bits and scaled to [-0.5, 0.5):
    x = (floor(x_8bit / 2^(8 - n)) + u) / 2^n - 0.5 with noise u in [0, 1). For D values per image,
    log|det| = -D n log 2. With it, the log-density is on average over u a lower bound on the
    log-probability of the n-bit image (Theis et al., 2016).
    """

    def __init__(self, n_bits: int) -> None:
        super().__init__()
        self.n_bits = n_bits

    def log_bins(self, x: Tensor) -> float:
        """Return D n log 2, the logarithm of the number of images that there are."""
        return math.prod(x.shape[1:]) * self.n_bits * math.log(2)

    def forward(self, x: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Dequantize uint8 images. Without ``u``, of their shape, the noise is drawn."""
        if u is None:
            u = torch.rand(x.shape, device=x.device)
        bins = x >> (8 - self.n_bits)
        logdet = u.new_full((len(x),), -self.log_bins(x))
        return (bins + u) / 2**self.n_bits - 0.5, logdet

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return uint8 images that show the ``n_bits``-bit images over the whole range 0..255."""
        n_bins = 2**self.n_bits
        bins = ((x + 0.5) * n_bins).floor().clamp(0, n_bins - 1)
        logdet = x.new_full((len(x),), self.log_bins(x))
        return (bins * 255 / (n_bins - 1)).to(torch.uint8), logdet


class ChannelAffine(nn.Module):
    """Learned scale and shift per channel: y = s * x + b, log|det| = H W sum(log s)."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.log_s = nn.Parameter(torch.zeros(n_channels, 1, 1))
        self.b = nn.Parameter(torch.zeros(n_channels, 1, 1))

    def log_scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return log s and b, each of shape (C, 1, 1), or (B, C, 1, 1) if images differ in them."""
        return self.log_s, self.b

    def forward(self, x: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        log_s, b = self.log_scale_and_shift(*given)
        logdet = log_s.sum((-3, -2, -1)) * x.shape[2] * x.shape[3]
        return torch.addcmul(b, x, log_s.exp()), logdet.expand(len(x))

    def inverse(self, z: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        log_s, b = self.log_scale_and_shift(*given)
        logdet = -log_s.sum((-3, -2, -1)) * z.shape[2] * z.shape[3]
        return (z - b) * (-log_s).exp(), logdet.expand(len(z))


class Actnorm(ChannelAffine):
    """Activation normalization (sec. 3.1): y = s * x + b per channel, log|det| = H W sum(log s).

    The first images set s and b so that each channel of y has zero mean and unit variance.
    """

    def __init__(self, n_channels: int) -> None:
        super().__init__(n_channels)
        self.register_buffer('initialized', torch.tensor(False))

    @torch.no_grad()
    def initialize(self, pieces: Iterable[Tensor]) -> None:
        """Set s and b from the pieces of a batch, once. A constant channel is only centred."""
        if self.initialized:
            return
        mean, var = channel_moments(pieces)
        std = torch.where(var > 1e-8, var.sqrt(), 1.0)[:, None, None]
        self.log_s.copy_(-std.log())
        self.b.copy_(-mean[:, None, None] / std)
        self.initialized.fill_(True)


def channel_moments(pieces: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of each channel over all pieces of a batch, in float64."""
    sizes, means, variances = [], [], []
    for x in pieces:
        var, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
        sizes.append(len(x))
        means.append(mean)
        variances.append(var)

    shares = means[0].new_tensor(sizes) / sum(sizes)
    mean = shares @ torch.stack(means)
    deviations = torch.stack(means) - mean
    return mean, shares @ (torch.stack(variances) + deviations.square())


class Invertible1x1Conv(nn.Module):
    """Invertible 1x1 convolution (sec. 3.2): y_ij = W x_ij, log|det| = H W log|det W|.

    W is orthogonal at first. With ``plu`` its factors are learned, W = P L (U + diag(s))
    (eq. 10), whose log|det W| is sum(log|s|) (eq. 11).
    """

    def __init__(self, n_channels: int, plu: bool = True) -> None:
        super().__init__()
        w = torch.linalg.qr(torch.randn(n_channels, n_channels))[0]
        self.plu = plu
        if plu:
            p, l, u = torch.linalg.lu(w)
            self.register_buffer('p', p)
            self.register_buffer('sign_s', u.diagonal().sign())
            # one matrix holds L below, U above and log|s| on its diagonal, as LAPACK stores them
            log_s = u.diagonal().abs().log()
            w = l.tril(-1) + u.triu(1) + log_s.diag()
        self.w = nn.Parameter(w)

    @staticmethod
    def weights(layers: list['Invertible1x1Conv']) -> tuple[Tensor, Tensor]:
        """Return W (K, C, C) and log|det W| (K,) of K layers."""
        w = torch.stack([layer.w for layer in layers])
        if not layers[0].plu:
            # one by one: on a GPU, a batch may go to a library that waits, and cannot be captured
            return w, torch.stack([torch.linalg.slogdet(layer.w)[1] for layer in layers])

        p = torch.stack([layer.p for layer in layers])
        sign_s = torch.stack([layer.sign_s for layer in layers])
        log_s = w.diagonal(dim1=1, dim2=2)
        u = w.triu(1) + torch.diag_embed(sign_s * log_s.exp())
        with torch.autocast(w.device.type, enabled=False):
            l_u = torch.baddbmm(u, w.tril(-1), u)  # L is 1 on its diagonal
            return p @ l_u, log_s.sum(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, logdet = self.weights([self])
        logdet = x.shape[2] * x.shape[3] * logdet
        return multiply_channels(w[0], x), logdet.expand(len(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        w, logdet = self.weights([self])
        logdet = -z.shape[2] * z.shape[3] * logdet
        w_inverse = torch.linalg.inv(w.double()).to(w.dtype)
        return multiply_channels(w_inverse[0], z), logdet.expand(len(z))


class Permutation(nn.Module):
    """A fixed permutation of the channels, in place of a 1x1 convolution (sec. 3.2).

    Channel k of y is channel ``order[k]`` of x; log|det| = 0. It is kept as its matrix W.
    """

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer('w', torch.eye(len(order))[order])

    @staticmethod
    def weights(layers: list['Permutation']) -> tuple[Tensor, Tensor]:
        """Return W (K, C, C) and log|det W| (K,) of K layers."""
        w = torch.stack([layer.w for layer in layers])
        return w, w.new_zeros(len(w))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return multiply_channels(self.w, x), x.new_zeros(len(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return multiply_channels(self.w.T, z), z.new_zeros(len(z))


class Shuffle(Permutation):
    """A permutation that is drawn when the model is made."""

    def __init__(self, n_channels: int) -> None:
        super().__init__(torch.randperm(n_channels))


class Reverse(Permutation):
    """The reversal of the order of the channels, as in RealNVP."""

    def __init__(self, n_channels: int) -> None:
        super().__init__(torch.arange(n_channels).flip(0))


def multiply_channels(w: Tensor, x: Tensor, b: Tensor | None = None) -> Tensor:
    """Return W x_ij + b at every pixel of x, of shape (B, C, H, W).

    It is a matrix product, because GPUs round the operands of a float32 convolution to TF32.
    """
    with torch.autocast(x.device.type, enabled=False):  # the latent itself is never rounded
        return F.linear(x.permute(0, 2, 3, 1), w, b).permute(0, 3, 1, 2)


class ConvActnorm(nn.Module):
    """Convolution, then actnorm. It computes s * (w x) + b as (s w) x + b, in one pass."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        nn.init.normal_(self.conv.weight, std=0.05)
        self.actnorm = Actnorm(out_channels)

    def initialize(self, pieces: Iterable[Tensor]) -> None:
        """Set the actnorm from the pieces of a batch, once."""
        self.actnorm.initialize(self.conv(x) for x in pieces)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.actnorm.log_s.exp()[..., None] * self.conv.weight
        return F.conv2d(x, weight, self.actnorm.b.flatten(), padding=self.conv.padding)


class ZeroConv(nn.Conv2d):
    """3x3 convolution that starts at zero (sec. 3.3).

    Its outputs are scaled by exp(3 ``log_scale``) per channel, as in the official code.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.log_scale = nn.Parameter(torch.zeros(out_channels))
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        scale = (3 * self.log_scale).exp()
        weight = scale[:, None, None, None] * self.weight
        return F.conv2d(x, weight, scale * self.bias, padding=1)


def coupling_net(in_channels: int, width: int, out_channels: int) -> nn.Sequential:
    """Return the network of a coupling (sec. 3.3), with two hidden layers of ``width`` channels."""
    return nn.Sequential(
        ConvActnorm(in_channels, width, 3),
        nn.ReLU(inplace=True),
        ConvActnorm(width, width, 1),
        nn.ReLU(inplace=True),
        ZeroConv(width, out_channels),
    )


class Coupling(nn.Module):
    """Half the channels are scaled and shifted by amounts that the other half decides.

    z_a = s * x_a + t and z_b = x_b with (s, t) = ``scale_and_shift(x_b)``; log|det| = sum(log s).
    The inverse computes the same s and t, because x_b is still there.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def scale_and_shift(self, x_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return s > 0 and t, each of the shape of ``x_b``."""
        raise NotImplementedError

    def halves_of_net(self, x_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two halves of the network's output, in the type of ``x_b``.

        Under autocast, nothing but the network runs in bfloat16.
        """
        first, second = self.net(x_b).to(x_b.dtype).chunk(2, dim=1)
        return first, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_a, x_b = x.chunk(2, dim=1)
        s, t = self.scale_and_shift(x_b)
        z_a = s * x_a + t
        return torch.cat([z_a, x_b], dim=1), s.log().sum((1, 2, 3))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z_a, x_b = z.chunk(2, dim=1)
        s, t = self.scale_and_shift(x_b)
        x_a = (z_a - t) / s
        return torch.cat([x_a, x_b], dim=1), -s.log().sum((1, 2, 3))


class AffineCoupling(Coupling):
    """Affine coupling (sec. 3.3, table 1): a coupling whose (s, t) come from a network.

    s = sigmoid(raw + 2) as in the official code, but rescaled from (0, 1) to (S_MIN, 1), so that
    the inverse stretches z_a - t at most twofold.
    """

    def __init__(self, n_channels: int, width: int) -> None:
        super().__init__(coupling_net(n_channels // 2, width, n_channels))

    def scale_and_shift(self, x_b: Tensor) -> tuple[Tensor, Tensor]:
        raw, t = self.halves_of_net(x_b)
        return S_MIN + (1 - S_MIN) * torch.sigmoid(raw + 2), t


class AdditiveCoupling(nn.Module):
    """Additive coupling (sec. 3.3): z_a = x_a + t and z_b = x_b with t = net(x_b); log|det| = 0.

    The inverse subtracts the same t, and stretches no error. It is a ``Coupling`` without s, and so
    without division and logarithm.
    """

    def __init__(self, n_channels: int, width: int) -> None:
        super().__init__()
        self.net = coupling_net(n_channels // 2, width, n_channels // 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_a, x_b = x.chunk(2, dim=1)
        z_a = x_a + self.net(x_b).to(x.dtype)
        return torch.cat([z_a, x_b], dim=1), x.new_zeros(len(x))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z_a, x_b = z.chunk(2, dim=1)
        x_a = z_a - self.net(x_b).to(z.dtype)
        return torch.cat([x_a, x_b], dim=1), z.new_zeros(len(z))


class Split(Coupling):
    """The end of a level: half the channels become noise given the others (sec. 3.6 of RealNVP).

    That x_a ~ N(mean(x_b), std(x_b)^2) is the coupling z_a = (x_a - mean) / std, with s = 1 / std
    and t = -mean / std. The model takes z_a off as a finished latent, and x_b goes on to the next
    level. std stays within exp(+-LOG_STD_MAX).
    """

    def __init__(self, n_channels: int) -> None:
        super().__init__(ZeroConv(n_channels // 2, n_channels))

    def scale_and_shift(self, x_b: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.halves_of_net(x_b)
        log_std = LOG_STD_MAX * torch.tanh(raw / LOG_STD_MAX)
        s = (-log_std).exp()
        return s, -mean * s


class Prior(ChannelAffine):
    """The prior of the last latent: a Gaussian with learned mean and deviation per channel.

    It is written as the bijection that makes it N(0, I): z = s * x + b, where s is the inverse
    of the deviation and -b / s the mean. log|det| = H W sum(log s).

    Given conditions y, (B, Y), log s and b are linear functions of y, whose weights are 0 at first,
    plus constants. Where it ``is_fixed``, the constants stay 0: without y, it is N(0, I).
    """

    def __init__(self, n_channels: int, n_conditions: int = 0, is_fixed: bool = False) -> None:
        super().__init__(n_channels)
        if is_fixed:
            self.requires_grad_(False)
        if n_conditions:
            self.linear = nn.Linear(n_conditions, 2 * n_channels, bias=False)
            nn.init.zeros_(self.linear.weight)

    def log_scale_and_shift(self, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if y is None:
            return self.log_s, self.b
        with torch.autocast(y.device.type, enabled=False):
            log_s, b = self.linear(y)[..., None, None].chunk(2, dim=1)
        return self.log_s + log_s, self.b + b

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return log p(x), or log p(x | y), in nats: (B, C, H, W) becomes (B,)."""
        z, logdet = self(x, y)
        return log_normal(z.flatten(1)) + logdet


class ConditionHead(nn.Linear):
    """Guesses the conditions from the last latent: (B, C, H, W) becomes logits (B, Y).

    It is linear in the mean over all pixels, and 0 at first, as in the official code.
    """

    def __init__(self, n_channels: int, n_conditions: int) -> None:
        super().__init__(n_channels, n_conditions)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.mean((2, 3)))


class Squeeze(nn.Module):
    """2x2 blocks of pixels become channels (sec. 3.6 of RealNVP); log|det| = 0.

    (B, C, H, W) becomes (B, 4C, H/2, W/2).
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, c, h, w = x.shape
        z = F.pixel_unshuffle(x, 2)
        # torch leaves the shape of an empty batch as it was
        z = z.reshape(b, 4 * c, h // 2, w // 2)
        # all layers keep this layout, in which the channels of a pixel are multiplied fastest
        return z.contiguous(memory_format=torch.channels_last), x.new_zeros(b)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        b, c, h, w = z.shape
        x = F.pixel_shuffle(z, 2)
        return x.reshape(b, c // 4, 2 * h, 2 * w), z.new_zeros(b)


class Sequence(nn.ModuleList):
    """Bijections one after the other. Their log-determinants add up."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logdet = x.new_zeros(len(x))
        for layer in self:
            x, logdet_layer = layer(x)
            logdet = logdet + logdet_layer
        return x, logdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        logdet = z.new_zeros(len(z))
        for layer in reversed(self):
            z, logdet_layer = layer.inverse(z)
            logdet = logdet + logdet_layer
        return z, logdet


COUPLINGS = {'affine': AffineCoupling, 'additive': AdditiveCoupling}
PERMUTATIONS = {
    'conv1x1': Invertible1x1Conv,
    'plain_conv1x1': partial(Invertible1x1Conv, plu=False),
    'shuffle': Shuffle,
    'reverse': Reverse,
}


class FlowStep(Sequence):
    """One step of flow (fig. 2a): actnorm, 1x1 convolution or another permutation, coupling.

    A level hands over the first two layers as one ``channel_map``: A, c and log|det| of the
    affine map z_ij = A x_ij + c, or for ``inverse`` those of its inverse.

    Arguments:
        n_channels: C, an even number.
        width: channels of the hidden layers of the coupling's network.
        coupling: one of ``COUPLINGS``.
        permutation: one of ``PERMUTATIONS``.
        checkpoint_grads: save memory and take longer: the backward pass recomputes activations.
    """

    def __init__(
        self,
        n_channels: int,
        width: int,
        coupling: str = 'affine',
        permutation: str = 'conv1x1',
        checkpoint_grads: bool = False,
    ) -> None:
        super().__init__(
            [
                Actnorm(n_channels),
                PERMUTATIONS[permutation](n_channels),
                COUPLINGS[coupling](n_channels, width),
            ]
        )
        self.checkpoint_grads = checkpoint_grads

    def forward(self, x: Tensor, *channel_map: Tensor) -> tuple[Tensor, Tensor]:
        if self.checkpoint_grads and torch.is_grad_enabled():
            options = dict(use_reentrant=False, preserve_rng_state=False)
            return checkpoint(self.run, x, *channel_map, **options)
        return self.run(x, *channel_map)

    def run(self, x: Tensor, *channel_map: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what ``forward`` returns."""
        if not channel_map:
            return super().forward(x)

        a, c, logdet = channel_map
        _, _, coupling = self
        z, logdet_coupling = coupling(multiply_channels(a, x, c))
        return z, logdet + logdet_coupling

    def inverse(self, z: Tensor, *channel_map: Tensor) -> tuple[Tensor, Tensor]:
        if not channel_map:
            return super().inverse(z)

        a, c, logdet = channel_map
        _, _, coupling = self
        x, logdet_coupling = coupling.inverse(z)
        return multiply_channels(a, x, c), logdet + logdet_coupling


class FlowLevel(Sequence):
    """One level (fig. 2b): squeeze, ``depth`` steps of flow, then a split unless it is the last.

    What does not depend on x is computed for all steps at once, because a GPU takes longer to start
    a small product than to compute it. ``step_options`` are those of ``FlowStep``.
    """

    def __init__(
        self, in_channels: int, depth: int, width: int, is_last: bool = False, **step_options: Any
    ) -> None:
        c = 4 * in_channels
        steps = [FlowStep(c, width, **step_options) for _ in range(depth)]
        end = [] if is_last else [Split(c)]
        super().__init__([Squeeze(), *steps, *end])

    def steps(self) -> list[FlowStep]:
        """Return the steps of flow."""
        return [layer for layer in self if isinstance(layer, FlowStep)]

    def channel_maps(self, n_pixels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return actnorm and permutation of each of the K steps as one affine map.

        It is z_ij = W (s * x_ij + b) = A x_ij + c. Returns A (K, C, C), c (K, C) and log|det| (K,),
        which is that of all pixels.
        """
        actnorms = [step[0] for step in self.steps()]
        log_s = torch.stack([actnorm.log_s for actnorm in actnorms]).flatten(2)  # (K, C, 1)
        b = torch.stack([actnorm.b for actnorm in actnorms]).flatten(2)
        permutations = [step[1] for step in self.steps()]
        w, logdet = permutations[0].weights(permutations)

        logdet = n_pixels * (log_s.sum((1, 2)) + logdet)
        with torch.autocast(w.device.type, enabled=False):
            return w * log_s.exp().mT, (w @ b).flatten(1), logdet

    def inverse_channel_maps(self, n_pixels: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inverses of the channel maps, likewise as A, c and log|det|."""
        a, c, logdet = self.channel_maps(n_pixels)
        a_inverse = torch.linalg.inv(a.double())
        c_inverse = -(a_inverse @ c.double()[..., None]).flatten(1)
        return a_inverse.to(a.dtype), c_inverse.to(a.dtype), -logdet

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        squeeze, *layers = self
        x, logdet = squeeze(x)
        n_pixels = x.shape[2] * x.shape[3]
        maps = dict(zip(self.steps(), zip(*self.channel_maps(n_pixels))))
        for layer in layers:
            x, logdet_layer = layer(x, *maps.get(layer, ()))
            logdet = logdet + logdet_layer
        return x, logdet

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.contiguous(memory_format=torch.channels_last)
        logdet = z.new_zeros(len(z))
        n_pixels = z.shape[2] * z.shape[3]
        maps = dict(zip(self.steps(), zip(*self.inverse_channel_maps(n_pixels))))
        for layer in reversed(self):
            z, logdet_layer = layer.inverse(z, *maps.get(layer, ()))
            logdet = logdet + logdet_layer
        return z, logdet


# ------------------------------------------------------------------------------------------- model


class Glow(nn.Module):
    """The multi-scale flow (fig. 2b) between images in [-0.5, 0.5) and latents z ~ N(0, I).

    Arguments:
        input_dims: (C, H, W), with H and W divisible by 2^(n_levels + 1).
        n_levels: the number of levels that end in a split. One more level follows.
        depth: steps of flow per level.
        width: channels of the hidden layers of the coupling networks.
        n_bits: bits per value of an image.
        coupling, permutation, checkpoint_grads: see ``FlowStep``.
        n_conditions: Y, how many numbers y say what an image shows, 0 for none. The density is
            then p(x | y): the last prior depends on y.
        fixed_top: the last prior is N(0, I), but for what depends on y.

    z has the shape (B, C H W): the halves factored out by the splits, finest first, and the rest.
    Conditions y, of shape (B, Y), are 0 or 1, in any type. Only training uses TF32, in the coupling
    networks; all else is computed in float32.
    """

    def __init__(
        self,
        input_dims: tuple[int, ...],
        n_levels: int,
        depth: int,
        width: int,
        n_bits: int = 5,
        coupling: str = 'affine',
        permutation: str = 'conv1x1',
        checkpoint_grads: bool = False,
        n_conditions: int = 0,
        fixed_top: bool = False,
    ) -> None:
        super().__init__()
        self.input_dims = c, h, w = tuple(input_dims)
        self.width, self.n_conditions = width, n_conditions
        self.dequantize = Dequantize(n_bits)
        self.levels = nn.ModuleList()
        self.z_shapes = []

        step_options = dict(
            coupling=coupling, permutation=permutation, checkpoint_grads=checkpoint_grads
        )
        for level in range(n_levels + 1):
            is_last = level == n_levels
            self.levels.append(FlowLevel(c, depth, width, is_last, **step_options))
            c, h, w = (4 if is_last else 2) * c, h // 2, w // 2
            self.z_shapes.append((c, h, w))
        self.prior = Prior(c, n_conditions, fixed_top)
        if n_conditions:
            self.head = ConditionHead(c, n_conditions)

    @property
    def n_parameters(self) -> int:
        """The number of parameters that are learned."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @property
    def memory_per_image(self) -> int:
        """About how many bytes it takes to encode or to decode an image, without gradients.

        There are eight tensors of its size, and two hidden layers on a quarter of its pixels.
        """
        c, h, w = self.input_dims
        return 8 * 4 * c * h * w + 2 * 4 * self.width * h * w // 4

    @property
    def n_at_once(self) -> int:
        """How many images may be sampled or encoded at once.

        They take a quarter of the memory that a checkpoint of the model may take.
        """
        memory = memory_for(2 * 4 * self.n_parameters) // 4  # of the weights and their average
        return max(1, memory // self.memory_per_image)

    def in_parts(
        self, x: Tensor, y: Tensor | np.ndarray | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield a batch, and its conditions (N, Y), in parts of 64 or ``n_at_once`` images."""
        n = min(64, self.n_at_once)
        for start in range(0, max(1, len(x)), n):
            yield x[start : start + n], None if y is None else torch.as_tensor(y[start : start + n])

    def run_levels(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the latents of the splits, each of shape (B, D), the last one, and log|det|.

        The last one is as its level returns it, (B, C, H, W).
        """
        is_training = self.training and torch.is_grad_enabled()
        parts, logdet = [], x.new_zeros(len(x))
        with contextlib.nullcontext() if is_training else without_tf32():
            for level in self.levels:
                x, logdet_level = level(x)
                logdet = logdet + logdet_level
                if level is not self.levels[-1]:
                    z_a, x = x.chunk(2, dim=1)
                    parts.append(z_a.flatten(1))
        return parts, x, logdet

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.as_conditions(y, len(x))
        parts, last, logdet = self.run_levels(x)
        z, logdet_prior = self.prior(last, y)
        return torch.cat([*parts, z.flatten(1)], dim=1), logdet + logdet_prior

    @without_tf32()
    def inverse(self, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.as_conditions(y, len(z))
        parts = z.split([math.prod(shape) for shape in self.z_shapes], dim=1)
        *parts, x = [part.unflatten(1, shape) for part, shape in zip(parts, self.z_shapes)]
        x, logdet = self.prior.inverse(x, y)
        for level in reversed(self.levels):
            x, logdet_level = level.inverse(x)
            logdet = logdet + logdet_level
            if parts:
                x = torch.cat([parts.pop(), x], dim=1)
        return x, logdet

    def log_prob(self, x: Tensor, u: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Return log p(x), or log p(x | y), in nats and of shape (B,), of uint8 images.

        ``u`` is the noise of the dequantization, of the shape of ``x`` and in [0, 1). Without it
        the noise is drawn. Raises ``ValueError`` for other images than the model's.
        """
        return self.log_prob_and_last(x, u, y)[0]

    def log_prob_and_last(
        self, x: Tensor, u: Tensor | None = None, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what ``log_prob`` returns, and the last latent, which the prior is about."""
        if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1:] != self.input_dims:
            c, h, w = self.input_dims
            raise ValueError(
                f'log_prob takes uint8 images of shape (B, {c}, {h}, {w}), '
                f'not {x.dtype} of shape {tuple(x.shape)}'
            )
        y = self.as_conditions(y, len(x))
        x, logdet_bins = self.dequantize(x, u)
        parts, last, logdet = self.run_levels(x)
        log_p = log_normal(torch.cat(parts, dim=1))
        log_p = log_p + self.prior.log_prob(last, y) + logdet + logdet_bins
        return log_p, last

    def as_conditions(self, y: Tensor | np.ndarray | None, n: int) -> Tensor | None:
        """Return the conditions of n images, numbers of any type, in that of the weights.

        Raises ``ValueError`` where they are missing, too much or of another shape than (n, Y).
        """
        if y is not None:
            y = torch.as_tensor(y).to(self.prior.log_s)
        shape = None if y is None else tuple(y.shape)
        wanted = (n, self.n_conditions) if self.n_conditions else None
        if shape != wanted:
            found = 'none' if shape is None else f'those of shape {shape}'
            takes = 'no conditions' if wanted is None else f'conditions y of shape {wanted}'
            raise ValueError(f'the model takes {takes}, and was given {found}')
        return y

    @torch.no_grad()
    def sample(
        self,
        n: int,
        z_std: float = 1.0,
        generator: torch.Generator | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Return ``n`` uint8 images, drawn at temperature ``z_std`` (sec. 6).

        The temperature is a factor of the prior's deviation. A model with conditions takes those of
        each image, ``y`` of shape (n, Y).
        """
        z = z_std * torch.randn(n, math.prod(self.input_dims), generator=generator)
        x, _ = self.inverse(z.to(next(self.parameters()).device), y)
        return self.dequantize.inverse(x)[0]


@torch.no_grad()
@without_tf32()
def initialize(model: Glow, x: Tensor, u: Tensor | None = None, batch_size: int = 16) -> None:
    """Initialize, from uint8 images, every actnorm that is not initialized yet (sec. 3.1).

    The images go through one layer after the other, in pieces of ``batch_size``, which bounds the
    memory. Every module with a method ``initialize`` gets the pieces of its input there.
    """
    pieces = model.dequantize(x, u)[0].split(batch_size)
    layers_of_levels = [simple_layers(level) for level in model.levels]
    n_layers = sum(map(len, layers_of_levels))

    with progress_bar(total=n_layers, desc='initializing', delay=1, leave=False) as bar:
        for layers in layers_of_levels:
            for layer in layers:
                for module in modules_to_initialize(layer, pieces[0]):
                    module.initialize(inputs_of(module, layer, pieces))
                pieces = [layer(piece)[0] for piece in pieces]
                bar.update()
            pieces = [piece.chunk(2, dim=1)[1] for piece in pieces]


def simple_layers(layer: nn.Module) -> list[nn.Module]:
    """Return the layers that a sequence consists of, those of the sequences inside it included."""
    if not isinstance(layer, Sequence) or hasattr(layer, 'initialize'):
        return [layer]
    return [simple for part in layer for simple in simple_layers(part)]


def modules_to_initialize(layer: nn.Module, x: Tensor) -> list[nn.Module]:
    """Return the modules that have a method ``initialize``, in the order of ``layer(x)``."""
    order: list[nn.Module] = []
    hooks = []
    for module in layer.modules():
        if hasattr(module, 'initialize'):
            hooks.append(module.register_forward_pre_hook(lambda module, _: order.append(module)))
    layer(x)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(order))


def inputs_of(module: nn.Module, layer: nn.Module, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield what a module inside a layer gets as its input, for each piece of the layer's input."""
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    try:
        for piece in pieces:
            inputs.clear()
            layer(piece)
            yield inputs[0]
    finally:
        hook.remove()


def log_normal(z: Tensor) -> Tensor:
    """Return log N(z; 0, I) of each row in nats: (B, D) becomes (B,)."""
    log_of_constant = z.shape[1] * math.log(2 * math.pi)
    return -0.5 * (z.square().sum(1) + log_of_constant)


class Objective(nn.Module):
    """The training objective: -log2 p(x) / ``n_values``, averaged over the batch.

    Given conditions y it is that of p(x | y), plus ``weight_y`` times the bits that the model's
    head needs for y, as in the official code. The latter are part of the gradient and not of the
    value, so that curves of training and validation compare.

    DistributedDataParallel wraps it, so that the loss is computed inside ``forward``.
    """

    def __init__(
        self,
        model: Glow,
        n_values: int,
        bf16: bool = False,
        weight_y: float = 0.0,
        is_class: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.n_values, self.bf16 = model, n_values, bf16
        self.weight_y, self.is_class = weight_y, is_class

    def forward(self, x: Tensor, u: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            log_p, last = self.model.log_prob_and_last(x, u, y)
            loss = -log_p.mean() / (math.log(2) * self.n_values)
            if y is not None:
                bits_of_y = bits_of_conditions(self.model.head(last), y, self.is_class)
                loss = loss + self.weight_y * (bits_of_y - bits_of_y.detach()).mean()
        return loss


def bits_of_conditions(logits: Tensor, y: Tensor, is_class: bool) -> Tensor:
    """Return -log2 p(y) of each row (B, Y), where ``logits`` decide p.

    Either y is the class, 1 in one place, or its values are independent of each other.
    """
    if is_class:
        nats = F.cross_entropy(logits, y, reduction='none')
    else:
        nats = F.binary_cross_entropy_with_logits(logits, y, reduction='none').sum(1)
    return nats / math.log(2)


def build_model(config: Config, input_dims: tuple[int, ...]) -> Glow:
    """Build the model of a config, seeded by it, for images of (C, H, W) given Y conditions.

    ``input_dims`` is (C, H, W, Y).
    """
    *image_dims, n_conditions = input_dims
    if image_dims[1:] != [config.image_size] * 2:
        size = config.image_size
        raise UserError(f'a model of images of {size}x{size} has no input of {image_dims}')
    torch.manual_seed(config.seed)
    model = Glow(
        tuple(image_dims),
        config.n_levels,
        config.depth,
        config.width,
        config.n_bits,
        coupling=config.coupling,
        permutation='plain_conv1x1' if config.plain_conv1x1 else config.permutation,
        checkpoint_grads=config.checkpoint_grads,
        n_conditions=n_conditions,
        fixed_top=config.fixed_top,
    )
    return model.to(memory_format=torch.channels_last)


def compile_couplings(model: Glow) -> None:
    """Compile the couplings at their first call. Those of one level share the code."""
    dynamo: Any = torch._dynamo.config
    dynamo.optimize_ddp = False  # it is for models that are compiled as a whole
    limit = 64  # of sizes that are compiled; of the others torch runs the code as it is
    if hasattr(dynamo, 'recompile_limit'):
        dynamo.recompile_limit = max(limit, dynamo.recompile_limit)
    else:  # an older torch, which compiles each coupling anew unless it is told otherwise
        dynamo.cache_size_limit = max(limit, dynamo.cache_size_limit)
        dynamo.inline_inbuilt_nn_modules = True

    for name in ('torch._dynamo', 'torch._inductor'):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', module=r'torch\._(dynamo|inductor)')
    for module in model.modules():
        if isinstance(module, tuple(COUPLINGS.values())):
            module.compile(dynamic=False)


def build_optimizer(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer of a training."""
    return torch.optim.Adam(parameters, lr=config.lr, fused=True)


# --------------------------------------------------------------------------------------- processes


class Process(NamedTuple):
    """This process among those of the launcher, which keeps a store for them."""

    rank: int
    world_size: int
    device: torch.device
    store: Any = None

    def gather(self, value: Any) -> list:
        """Return the value of every process, in the order of ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """Return the value of rank 0 on every process."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: object) -> bool:
        """Return whether the flag is set on any process."""
        if self.world_size == 1:
            return bool(flag)
        flags = torch.tensor(float(bool(flag)), device=self.device)
        return self.sum(flags).item() > 0


@contextlib.contextmanager
def setup(device_type: str = '') -> Iterator[Process]:
    """Join the process group of torchrun or torch.distributed.launch, if one has started us.

    The backend is NCCL on GPUs and Gloo on CPUs. ``device_type`` is the value of ``--device``.
    """
    require_launcher(f'{NAME}.py')
    torch.set_float32_matmul_precision('highest')  # NVIDIA's containers lower it
    rank = int(os.environ.get('RANK', 0))
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    n_nodes = int(os.environ.get('GROUP_WORLD_SIZE', 1))
    n_restarts = os.environ.get('TORCHELASTIC_RESTART_COUNT')
    n_local = int(os.environ.get('LOCAL_WORLD_SIZE', 1))

    store = start_store = None
    if world_size > 1 or n_restarts:
        store, _, _ = next(dist.rendezvous('env://'))
        store = getattr(store, 'underlying_store', store)  # torch 2.4 wraps it for each start
    device = local_device(device_type, local_rank, n_local, store)
    if world_size > 1:
        # torchrun's store outlives the processes. A prefix for each start keeps new ones from
        # finding the addresses of dead ones. (Several nodes have no common count of starts.)
        prefix = f'start {n_restarts if n_nodes == 1 else 0}'
        start_store = dist.PrefixStore(prefix, store)
        dist.init_process_group(
            'nccl' if device.type == 'cuda' else 'gloo',
            timeout=timedelta(minutes=30),
            store=start_store,
            rank=rank,
            world_size=world_size,
        )

    try:
        yield Process(rank, world_size, device, store)
    except Exception as error:
        # at once, as the launcher ends all processes when the first has ended
        report_error(NAME, error, start_store)
        raise
    finally:
        # after an error of torch another process may be lost, and the teardown would wait for it
        if world_size > 1 and not isinstance(sys.exc_info()[1], RuntimeError):
            time.sleep(0.1)  # torch 2.4 hangs below while Gloo's thread still frees its last tensor
            dist.destroy_process_group()


def wrap_ddp(objective: nn.Module, process: Process, **values: Any) -> nn.Module:
    """Wrap the objective, so that its gradients are averaged over all processes.

    All processes get the parameters and buffers of rank 0, once: processors of several kinds round
    differently. Raises ``UserError`` unless all processes agree on the given values.
    """
    if process.world_size == 1:
        return objective
    require_agreement(process, **values)

    # sent here, as DDP sends buffers at each step or never, and not of every type
    buffers = dict(objective.named_buffers())
    shared = process.share({name: buffer.cpu() for name, buffer in buffers.items()})
    for name, buffer in buffers.items():
        buffer.copy_(shared[name])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, list(buffers))
    return DistributedDataParallel(objective, gradient_as_bucket_view=True)


# ------------------------------------------------------------------------------------- checkpoints


def upgrade_from_1(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint of format 1 as that of format 2."""
    n_per_step = batch_of_all_processes(saved, Config)
    require_entries(saved, {'step': int})
    return {
        **saved,
        'fingerprint': '',  # not known
        'split_bounds': [],  # a folder is then split at random, as it was
        'files': torch.zeros(0, 2, dtype=torch.int64),
        'first_world_size': saved['world_size'],
        'n_seen': saved['step'] * n_per_step,
    }


def upgrade_from_2(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint of format 2, without conditions, as that of format 3.

    The prior was the last layer of the last level, and training images of mnist were shifted.
    """
    require_entries(saved, {'config': dict, 'input_dims': [int], 'model': dict, 'average': dict})
    config = {'n_levels': Config.n_levels, 'depth': Config.depth, **saved['config']}
    config.setdefault('translate', int(config.get('dataset') == 'mnist'))
    require_entries(config, {'n_levels': int, 'depth': int})
    former_name = f'levels.{config["n_levels"]}.{config["depth"] + 1}.'
    weights = {}
    for part in ('model', 'average'):
        values = saved[part].items()
        weights[part] = {str(name).replace(former_name, 'prior.'): value for name, value in values}
    return {
        **saved,
        **weights,
        'config': config,
        'input_dims': [*saved['input_dims'], 0],
        'condition': ImageCondition().to_entry(),
    }


CHECKPOINT = CheckpointFormat(
    script=f'{NAME}.py',
    number=3,
    config_class=Config,
    least_dims=(1, 1, 1, 0),  # of an image and its conditions: (C, H, W, Y)
    fields={
        'condition': {'names': [str], 'is_class': bool, 'values': Tensor, 'counts': [int]},
        'fingerprint': str,
        'split_bounds': [int],
        'files': Tensor,
        'first_world_size': int,
        'step': int,
        'n_seen': int,
        'n_skipped': int,
        'skips_in_a_row': int,
        'validation_loss': float,
        'validation_quantiles': [float],
        'best': float,
    },
    parts={
        'model': dict,
        'average': dict,
        'optimizer': {'state': dict, 'param_groups': [dict]},
    },
    build_model=build_model,
    build_optimizer=build_optimizer,
    memory_per_input=lambda model: model.memory_per_image,
    upgrades={1: upgrade_from_1, 2: upgrade_from_2},
    defaults={'validation_quantiles': []},  # not known
)


def save_checkpoint(run: 'Training', log: TrainingLog, path: Path) -> None:
    """Save the state of a training, on rank 0, after the scalars of the steps that it includes."""
    if run.process.rank == 0:
        log.flush()
        CHECKPOINT.save(run, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, its config as a ``Config``.

    Nothing in the file is trusted. Raises ``UserError`` where it is damaged.
    """
    return CHECKPOINT.read(path)


def restore_model(saved: dict[str, Any], device: torch.device) -> nn.Module:
    """Return the model with the averaged weights of a checkpoint, in evaluation mode."""
    average = AveragedModel(build_model(saved['config'], saved['input_dims']))
    average.load_state_dict(saved['average'])
    return average.module.to(device).eval()


# -------------------------------------------------------------------------------------------- data


def training_batch(
    data: ImageData,
    config: Config,
    n_seen: int,
    process: Process,
    images: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return this process's part of the next step: uint8 images, noise, and conditions if any.

    All are functions of the seed, the number of images seen before, and the rank. ``images`` are
    the training images, where they are on the device already.
    """
    rank, device = process.rank, process.device
    n_images = len(data.train.images)
    indices = batch_indices(n_images, config.batch_size, config.seed, n_seen, rank)
    if images is None:
        x = to_device(data.train.images[indices], device)
    else:
        x = images[to_device(indices, device)]

    generator = seeded_generator(device, Stream.TRAINING, config.seed, n_seen, rank)
    if config.translate:
        x = shift_randomly(x, config.translate, generator)
    if config.flip:
        x = flip_randomly(x, config.flip, generator)
    u = torch.rand(x.shape, device=device, generator=generator)
    y = conditions_of(data.train, indices, device)
    return (x, u) if y is None else (x, u, y)


def conditions_of(
    split: ImageSplit, indices: slice | np.ndarray, device: torch.device
) -> Tensor | None:
    """Return the conditions (B, Y) of some images, or None for a model without conditions."""
    if split.conditions is None:
        return None
    return to_device(split.conditions[indices], device)


@torch.no_grad()
def score_images(
    split: ImageSplit,
    batch_size: int,
    process: Process,
    score: Callable[[Tensor, Tensor, Tensor | None], dict[str, Tensor]],
    names: Iterable[str] = ('bits_per_dim',),
    seeds: list[int] | None = None,
) -> dict[str, Tensor]:
    """Return the scores of each image, on the CPU, of shape (N,), float64.

    ``score`` maps images, noise and conditions to scores of these ``names``, each of shape (B,).
    Image i always gets the same noise, that of its place i or of its seed, so that its scores
    depend neither on ``batch_size`` nor on the number of processes that share the work.
    """
    n_images, names = len(split.images), list(names)
    table = torch.zeros(n_images, len(names), dtype=torch.float64, device=process.device)
    own = np.arange(n_images)[process.rank :: process.world_size]
    for start in range(0, len(own), batch_size):
        indices = own[start : start + batch_size]
        x = torch.from_numpy(split.images[indices]).to(process.device)
        noise = []
        for i in indices:
            seed = int(i) if seeds is None else seeds[i]
            generator = seeded_generator('cpu', Stream.EVALUATION, seed)
            noise.append(torch.rand(x.shape[1:], generator=generator))
        u = torch.stack(noise).to(process.device)
        scores = score(x, u, conditions_of(split, indices, process.device))
        values = torch.stack([scores[name].double() for name in names], dim=1)
        table[torch.from_numpy(indices).to(process.device)] = values

    columns = process.sum(table).T.cpu()
    return dict(zip(names, columns))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of some values, and two standard errors of it."""
    return values.mean().item(), 2 * values.std(correction=0).item() / math.sqrt(len(values))


def bits_per_dim(
    model: Glow, split: ImageSplit, n_values: int, batch_size: int, process: Process
) -> tuple[float, float]:
    """Return the mean bits/dim of all images, and two standard errors of it."""

    def score(x: Tensor, u: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        return {'bits_per_dim': to_bits(model.log_prob(x, u, y), n_values)}

    return mean_and_error(score_images(split, batch_size, process, score)['bits_per_dim'])


def score_split(
    model: Glow,
    split: ImageSplit,
    condition: ImageCondition,
    n_values: int,
    batch_size: int,
    process: Process,
    seeds: list[int] | None = None,
) -> dict[str, Tensor]:
    """Return all scores of each image: bits/dim and, given conditions, ``score_conditions``.

    Where the model has conditions and those of the images are not known, bits/dim are those of
    p(x), the sum of p(x | y) p(y) over all y of training images.
    """
    names: list[str] = ['bits_per_dim']
    if split.conditions is not None:
        names += [WITHOUT_CONDITIONS, *GUESSERS]

    def score(x: Tensor, u: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        if y is None and condition.names:
            any_y = torch.from_numpy(condition.values[:1]).to(x.device)
            y = any_y.expand(len(x), -1)
            log_p, last = model.log_prob_and_last(x, u, y)
            scores = score_conditions(model, condition, n_values, log_p, last, y)
            return {'bits_per_dim': scores[WITHOUT_CONDITIONS]}
        log_p, last = model.log_prob_and_last(x, u, y)
        scores = {'bits_per_dim': to_bits(log_p, n_values)}
        if y is not None:
            scores |= score_conditions(model, condition, n_values, log_p, last, y)
        return scores

    return score_images(split, batch_size, process, score, names, seeds)


def to_bits(log_p: Tensor, n_values: int) -> Tensor:
    """Return log-probabilities as bits per dimension, in float64."""
    return -log_p.double() / (math.log(2) * n_values)


def log_joint(model: Glow, last: Tensor, condition: ImageCondition) -> Tensor:
    """Return log p(last, y) of the last latents of images and each of K values of y: (B, K).

    p(y) is how frequent y is among the training images. Only the last latent depends on y, so this
    is all that Bayes' rule needs.
    """
    counts = torch.tensor(condition.counts, dtype=torch.float64)
    log_p_y = (counts / counts.sum()).log().to(last.device)
    columns = []
    for value in torch.from_numpy(condition.values).to(last):
        y = value.expand(len(last), -1)
        columns.append(model.prior.log_prob(last, y).double())
    return torch.stack(columns, dim=1) + log_p_y


@torch.no_grad()
def sample_grid(
    model: Glow,
    temperatures: Iterable[float],
    n_columns: int,
    seed: int,
    device: torch.device,
    conditions: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Return a row of uint8 samples (``n_columns``, C, H, W) for each of R temperatures.

    Each row is sorted by log-probability, best first. ``conditions`` are those of all rows, (Y,),
    or of each row, (R, Y). Raises ``UserError`` where samples are not finite.
    """
    rows = []
    for row, z_std in enumerate(temperatures):
        generator = seeded_generator('cpu', Stream.SAMPLES, seed, row)
        z = z_std * torch.randn(n_columns, math.prod(model.input_dims), generator=generator)
        y = None
        if conditions is not None:
            y = torch.from_numpy(conditions if conditions.ndim == 1 else conditions[row])
            y = y.to(device).expand(n_columns, -1)

        images, log_p = [], []
        for z_part, y_part in model.in_parts(z.to(device), y):
            x, logdet = model.inverse(z_part, y_part)
            if not x.isfinite().all():
                raise UserError(
                    f'samples at temperature {z_std:g} are not finite: the model has diverged'
                )
            images.append(model.dequantize.inverse(x)[0])
            log_p.append(log_normal(z_part) - logdet)
        order = torch.cat(log_p).argsort(descending=True)
        rows.append(torch.cat(images)[order].cpu().numpy())
    return rows


def sample_each_condition(
    model: Glow,
    condition: ImageCondition,
    z_std: float,
    n: int,
    seed: int,
    device: torch.device,
) -> tuple[list[np.ndarray], list[str]]:
    """Return rows of eight, with n samples given each class or combination of attributes.

    The labels of the rows are returned too. At most ``MAX_SHOWN`` of them are drawn.
    """
    values = condition.values[:MAX_SHOWN]
    rows, labels = [], []
    samples_of_each = sample_grid(model, [z_std] * len(values), n, seed, device, values)
    for value, samples in zip(values, samples_of_each):
        own_rows = arrange_in_rows(samples)
        rows += own_rows
        label = condition.label(value).replace(',', '\n')  # a line for each attribute
        labels += [label] + [''] * (len(own_rows) - 1)
    return rows, labels


# ---------------------------------------------------------------------------------------- training


def learning_rate(config: Config, n_seen: int, n_per_step: int, n_per_epoch: int) -> float:
    """Return the learning rate of the next step, from the number of images seen before it.

    It rises linearly over ``n_epochs_warmup`` epochs, stays constant, and falls linearly to 0 over
    the last fraction ``lr_decay`` of the training.
    """
    n_in_training = config.n_epochs * n_per_epoch
    n_in_warmup = config.n_epochs_warmup * n_per_epoch
    warmup = (n_seen + n_per_step) / max(1, n_in_warmup)
    fall = 1.0
    if config.lr_decay:
        fall = (n_in_training - n_seen) / (config.lr_decay * n_in_training)
    return config.lr * min(1.0, warmup, fall)


class Training:
    """A training: the weights, their average, the optimizer, and where it stands."""

    score_name, score_sign = 'bits_per_dim', 1

    def __init__(
        self,
        config: Config,
        data: ImageData,
        process: Process,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.data, self.process = config, data, process
        self.input_dims = [*data.train.images.shape[1:], len(data.condition.names)]
        self.model = build_model(config, self.input_dims).to(process.device)
        CHECKPOINT.require_readable(self.model)
        self.step, self.n_seen = 0, 0
        self.n_skipped, self.skips_in_a_row = torch.zeros(
            2, dtype=torch.int64, device=process.device
        )
        self.best, self.validation_loss = math.inf, math.nan
        self.validation_quantiles: list[float] = []
        self.first_world_size = saved['first_world_size'] if saved else process.world_size

        if saved is None and process.rank == 0:
            self.initialize_actnorms()
        self.objective = wrap_ddp(
            Objective(
                self.model, data.n_values, config.bf16, config.weight_y, data.condition.is_class
            ),
            process,
            data=data.fingerprint,
            options=asdict(replace(config, data_dir='')),
            step=saved['step'] if saved else 0,
        )
        self.average = MovingAverage(
            self.model, config.ema_decay, process.world_size / self.first_world_size
        )
        self.optimizer = build_optimizer(config, self.model.parameters())
        if saved is not None:
            CHECKPOINT.restore(self, saved)
            if saved['fingerprint'] not in ('', data.fingerprint):
                self.best = math.inf  # the score of other images
        # not those of the checkpoint: the run goes on with these images
        self.fingerprint, self.files = data.fingerprint, data.files
        self.split_bounds = data.split_bounds
        self.condition = data.condition.to_entry()

        n_per_first_step = config.batch_size * self.first_world_size
        self.n_per_step = config.batch_size * process.world_size
        self.n_per_epoch = max(len(data.train.images), n_per_first_step)  # at least a step
        self.n_to_see = config.n_epochs * self.n_per_epoch
        self.n_per_validation = self.n_per_epoch * math.ceil(
            VALIDATE_STEPS * n_per_first_step / self.n_per_epoch
        )

        self.images = keep_on_device(data.train.images, process.device)
        self.compute = self.forward_and_update
        if can_capture(process, self.optimizer) and not config.no_cuda_graph:
            self.compute = CapturedStep(self.compute, self.optimizer)
        if config.compile:
            compile_couplings(self.model)
            if process.rank == 0:
                tqdm.write('the first step compiles the model: half a minute or more')

    def initialize_actnorms(self) -> None:
        """Initialize the actnorms from images and noise that the seed decides."""
        images, config = self.data.train.images, self.config
        n = min(len(images), config.batch_size_init)
        x = images[batch_indices(len(images), n, config.seed)]
        generator = seeded_generator('cpu', Stream.INITIALIZATION, config.seed)
        u = torch.rand(x.shape, generator=generator)
        device = self.process.device
        initialize(self.model, torch.from_numpy(x).to(device), u.to(device), config.batch_size)

    def take_step(self) -> tuple[Tensor, Tensor]:
        """Take one step. Returns its bits/dim and its gradient norm."""
        lr = learning_rate(self.config, self.n_seen, self.n_per_step, self.n_per_epoch)
        self.optimizer.param_groups[0]['lr'] = lr
        batch = training_batch(self.data, self.config, self.n_seen, self.process, self.images)
        loss, norm = self.compute(*batch)
        self.step += 1
        self.n_seen += self.n_per_step
        return loss, norm

    def forward_and_update(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the objective and change the weights: what a GPU captures of a step."""
        return update(self, self.objective(*batch))

    def validate(self, folder: Path) -> None:
        """Score the averaged weights on the validation split, and draw samples of them."""
        scores = score_split(
            self.average.module,
            self.data.validation,
            self.data.condition,
            self.data.n_values,
            4 * self.config.batch_size,
            self.process,
        )
        self.validation_loss = scores['bits_per_dim'].mean().item()
        if math.isfinite(self.validation_loss):
            self.validation_quantiles = score_quantiles(-p_of_x(scores).numpy())
        if self.process.rank == 0:
            score = format_score(self.config, self.validation_loss)
            tqdm.write(f'step {self.step}: validation {score}')
            with warn_on_error('picture'):
                model, seed, device = self.average.module, self.config.seed, self.process.device
                if self.data.condition.names:
                    rows, labels = sample_each_condition(
                        model, self.data.condition, Z_STD_OF_EACH, 8, seed, device
                    )
                else:
                    temperatures = (0.0, 0.25, 0.7, 1.0)
                    rows = sample_grid(model, temperatures, 8, seed, device)
                    labels = [f'T = {temperature:g}' for temperature in temperatures]
                save_grid(folder / f'samples_at_step_{self.step:06}.png', rows, labels)


def update(run: Training, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Change the weights by a loss. Returns the loss and the gradient norm.

    Where these are not finite on one process, no process changes its weights. With the optimizer
    of ``build_optimizer``, all is decided on the device, and the CPU never waits for a GPU.
    """
    run.optimizer.zero_grad()
    loss.backward(torch.where(loss.isfinite(), 1.0, math.nan))  # NaN reaches all processes
    gradients = collect_gradients(run.model)
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    divisor = (norm / run.config.grad_norm_clip).clamp(min=1)
    is_skipped = ~norm.isfinite()

    if scales_gradients(run.optimizer):
        # it divides the gradients by the one, and changes nothing where the other is 1
        run.optimizer.grad_scale = divisor.float()
        run.optimizer.found_inf = is_skipped.float()
        run.optimizer.step()
    elif not is_skipped:
        torch._foreach_div_(gradients, divisor)
        run.optimizer.step()

    run.average.update(is_skipped)
    run.n_skipped += is_skipped
    run.skips_in_a_row += 1
    run.skips_in_a_row *= is_skipped
    return loss.detach(), norm


def train(
    data: Any,
    config: Config,
    request: Request,
    process: Process,
    saved: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Train to the end, from the content of a checkpoint if there is one.

    The folder of the run gets checkpoint.pt, the last state, and best.pt, the one with the best
    validation score. Returns the content of the latter, or None where a signal came first.
    """
    torch.autograd.set_detect_anomaly(request.detect_anomaly)
    with (
        open_run_folder(NAME, config, request, process, saved, load_checkpoint) as folder,
        catch_stop_signals() as signals,
    ):
        run = Training(config, data, process, saved)
        print_if_over(run)
        log = TrainingLog(run, folder, ITEMS, format_score)
        last, best = folder / LAST, folder / BEST
        if not process.share(best.exists()):
            run.best = math.inf  # a best score is worth nothing without its weights

        with log:
            if not last.exists():
                save_checkpoint(run, log, last)
                if process.rank == 0:
                    load_checkpoint(last)  # fail now, not at the end, if it cannot be read back
            take_steps(run, log, folder, request.max_skips, signals)
        # a collective call: when it returns, rank 0 has written its files
        was_stopped = process.any(signals) or run.n_seen < run.n_to_see
        if was_stopped:
            save_checkpoint(run, log, last)
            print_how_to_go_on(run, NAME, signals, last)
            return None
        return load_on_rank_0(process, lambda: load_checkpoint(best if best.exists() else last))


def take_steps(
    run: Training, log: TrainingLog, folder: Path, max_skips: int, signals: list[str]
) -> None:
    """Train, validate and save until the last step, or until a signal comes to any process."""
    last, best = folder / LAST, folder / BEST
    saved_at = time.monotonic()
    stop = StopQuestion(run.process, signals, LOG_STEPS)
    while run.n_seen < run.n_to_see and not stop.is_wanted():
        loss, norm = run.take_step()
        log.log_step(loss, norm, LOG_STEPS)

        validates = is_validation_due(run)
        if validates:
            run.validate(folder)
            log.log_validation()
        if validates or run.step % LOG_STEPS == 0:
            stop_if_diverged(run, validates, max_skips, last)

        if validates and run.validation_loss < run.best:
            run.best = run.validation_loss
            save_checkpoint(run, log, best)
        # best.pt comes first: a run resumed from this checkpoint does not validate again
        if validates or time.monotonic() >= saved_at + SAVE_SECONDS:
            save_checkpoint(run, log, last)
            saved_at = time.monotonic()


def format_score(config: Config, loss: float) -> str:
    """Return a loss as text: bits/dim."""
    return f'{loss:.4f} bits/dim'


# ------------------------------------------------------------------------------------------- modes


def evaluate(
    model: Glow,
    data: ImageData,
    saved: dict[str, Any],
    config: Config,
    process: Process,
    request: Request,
) -> None:
    """Print the scores on the whole test split, and save them as results.json.

    They are bits/dim and, for a model with conditions, those of ``score_conditions``.
    """
    batch_size = min(4 * config.batch_size, model.n_at_once)
    scores = score_split(model, data.test, data.condition, data.n_values, batch_size, process)
    if process.rank > 0:
        return
    if not config.weight_y:
        scores.pop('accuracy_of_head', None)  # it was not trained
    means, errors = {}, {}
    for name, values in scores.items():
        means[name], errors[name] = mean_and_error(values)

    n_images = len(data.test.images)
    results = {
        **means,
        'two_standard_errors': errors['bits_per_dim'],
        'n_images': n_images,
        'values_per_image': data.n_values,
        'n_bits': config.n_bits,
        'dataset': config.dataset,
        'step': saved['step'],
        'checkpoint': saved['path'].name,
        'bf16': torch.is_autocast_enabled(process.device.type),
    }
    given = f', given {data.condition.description}' if data.condition.names else ''
    bits, error = means['bits_per_dim'], errors['bits_per_dim']
    print(
        f'{config.dataset} test{given}: {bits:.4f} ± {error:.4f} bits/dim at {config.n_bits} bits '
        f'({n_images} images, two standard errors)'
    )
    if data.condition.names:
        print_scores_of_conditions(data.condition, means, errors)
    write_json(output_folder(request, saved['path']) / 'results.json', results)
    if request.scores:
        save_scores(scores, data.test.names or list(map(str, range(n_images))), saved, request)


def evaluate_input(
    model: Glow, saved: dict[str, Any], config: Config, process: Process, request: Request
) -> None:
    """Print the bits/dim of the photos in ``--input``, and which are the least likely ones.

    Those of a model with conditions are of p(x), the sum over all of them.
    """
    names, images, notes = load_input_photos(
        request.input, config.dataset, config.image_size, config.skip_broken, process.rank > 0
    )
    split = ImageSplit(images, np.zeros((len(images), 0), bool))
    condition = condition_of_checkpoint(saved)
    n_values = values_per_image(config.dataset, saved['input_dims'][:-1])
    # a photo has the same score, whichever others are beside it
    seeds = [zlib.crc32(image.tobytes()) for image in images]
    batch_size = min(4 * config.batch_size, model.n_at_once)
    scores = score_split(model, split, condition, n_values, batch_size, process, seeds)
    if process.rank > 0:
        return

    for note in notes:
        print(f'note: {note}')
    bits, error = mean_and_error(scores['bits_per_dim'])
    if len(images) > 1:
        print(
            f'{request.input}: {bits:.4f} ± {error:.4f} bits/dim at {config.n_bits} bits '
            f'({len(images):,} images, two standard errors)'
        )
    if request.output:
        results = {'bits_per_dim': bits, 'two_standard_errors': error, 'n_images': len(images)}
        folder = output_folder(request, saved['path'])
        write_json(folder / 'results.json', {**results, 'input': request.input})
    print_least_likely(save_scores(scores, names, saved, request))


def p_of_x(scores: dict[str, Tensor]) -> Tensor:
    """Return the bits/dim of p(x) among the scores of images, also of a model of p(x | y)."""
    return scores.get(WITHOUT_CONDITIONS, scores['bits_per_dim'])


def save_scores(
    scores: dict[str, Tensor], names: Iterable[str], saved: dict[str, Any], request: Request
) -> dict[str, Any]:
    """Return the columns image, bits_per_dim and percentile, and save them as ``--scores``.

    They are of p(x), and the percentile of an image is the share of the validation images that are
    less likely. There is no such column, and a note, where too few validation images are known.
    """
    bits, known = p_of_x(scores).numpy(), saved['validation_quantiles']
    columns = {'image': np.array([*map(printable, names)], dtype=object), 'bits_per_dim': bits}
    columns |= percentiles(-bits, known, saved['path'], LEAST_VALIDATION_IMAGES)
    if 'percentile' not in columns:
        print(
            f'note: no percentiles: the checkpoint has the scores of {len(known)} validation '
            f'images, and {LEAST_VALIDATION_IMAGES} are needed'
        )
    if request.scores:
        save_table(request.scores, frame_of_columns(columns))
    return columns


def print_scores_of_conditions(
    condition: ImageCondition, means: dict[str, float], errors: dict[str, float]
) -> None:
    """Print what ``score_conditions`` has found."""
    name = WITHOUT_CONDITIONS
    print(f'not given {condition.description}: {means[name]:.4f} ± {errors[name]:.4f} bits/dim')
    guesses = []
    for name, guesser in GUESSERS.items():
        if name in means:
            guesses.append(f'{means[name]:.1%} ± {errors[name]:.1%} {guesser}')
    each = '' if condition.is_class or len(condition.names) == 1 else ', on average'
    print(f'right guesses of {condition.description}{each}: {", ".join(guesses)}')


def score_conditions(
    model: Glow,
    condition: ImageCondition,
    n_values: int,
    log_p: Tensor,
    last: Tensor,
    y: Tensor,
) -> dict[str, Tensor]:
    """Return what the last latents of images tell of their conditions y, given log p(x | y).

    Without conditions, bits/dim are those of p(x), the sum of p(x | y) p(y) over all y of training
    images. The accuracy of a guess is 1 for the right class and 0 for others; of attributes, it is
    the share that is right.
    """
    joint = log_joint(model, last, condition)
    log_p_of_x = log_p - model.prior.log_prob(last, y) + joint.logsumexp(1)
    scores = {WITHOUT_CONDITIONS: to_bits(log_p_of_x, n_values)}

    logits = model.head(last)
    by_head = logits > 0
    if condition.is_class:
        by_head = F.one_hot(logits.argmax(1), len(condition.names))
    values = torch.from_numpy(condition.values).to(y.device)
    most_frequent = int(np.argmax(condition.counts))
    for name, guess in zip(GUESSERS, (values[joint.argmax(1)], by_head, values[most_frequent])):
        is_right = guess == y
        scores[name] = is_right.all(1) if condition.is_class else is_right.double().mean(1)
    return scores


def samples_within(memory: int, model: Glow, n: int, n_rows: int = 1) -> int:
    """Return n or, if ``n_rows`` times n samples take more bytes of memory, fewer, but not none."""
    # the latents of a sample, its image, and that of the picture
    memory_per_sample = 16 * math.prod(model.input_dims)
    memory -= min(64, model.n_at_once) * model.memory_per_image
    n_fitting = max(1, memory // memory_per_sample // n_rows)
    if n_fitting < n:
        print('note: fewer samples than usual, as such large images take much memory')
    return min(n, n_fitting)


def generate(
    model: Glow,
    condition: ImageCondition,
    folder: Path,
    config: Config,
    device: torch.device,
    request: Request,
    memory: int,
) -> None:
    """Save samples as a picture: at one temperature, or a row for each of several.

    Without ``--given``, a model with conditions draws a row for each class, or for each
    combination of attributes. Unless their number is given, there are fewer samples where they
    take more than so many bytes of ``memory``.
    """
    y = None if request.given is None else condition.parse(request.given)
    if y is not None and not (condition.values == y).all(1).any():
        print(f'note: no training image is {condition.label(y)}')
    z_std, labels = request.z_std, []
    if condition.names and y is None:
        z_std = Z_STD_OF_EACH if z_std is None else z_std
        n_values = len(condition.values)
        n = request.n_samples or samples_within(memory, model, 8, min(n_values, MAX_SHOWN))
        if n_values > MAX_SHOWN:
            print(f'note: the first {MAX_SHOWN} of {n_values}; add --given for another one')
        rows, labels = sample_each_condition(model, condition, z_std, n, config.seed, device)
    elif z_std is None:
        n = samples_within(memory, model, 4, len(TEMPERATURES))
        rows = sample_grid(model, TEMPERATURES, n, config.seed, device, y)
        labels = [f'T = {temperature:g}' for temperature in TEMPERATURES]
    else:
        n = request.n_samples or samples_within(memory, model, 32)
        samples = sample_grid(model, [z_std], n, config.seed, device, y)[0]
        rows = arrange_in_rows(samples)

    name = 'generated_samples_at_z_std_' + ('range' if z_std is None else f'{z_std:g}')
    if y is not None:
        name += f'_{name_for_file(condition.label(y))}'
    save_grid(folder / f'{name}.png', rows, labels)


@torch.no_grad()
def encode(
    model: Glow,
    images: np.ndarray | Tensor,
    device: torch.device,
    y: Tensor | np.ndarray | None = None,
) -> Tensor:
    """Return the latents (N, D) of uint8 images (N, C, H, W), given their conditions (N, Y).

    Each value is placed in the middle of its bin, so that decoding returns the same bins.
    """
    x = middles_of_bins(model, images, device)
    return torch.cat([model(*part)[0] for part in model.in_parts(x, y)])


def middles_of_bins(model: Glow, images: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Return dequantized images, each value in the middle of its bin."""
    x = images if isinstance(images, Tensor) else torch.tensor(images)
    x = x.to(device)
    middles = torch.full(x.shape, 0.5, device=device)
    return model.dequantize(x, middles)[0]


@torch.no_grad()
def decode(model: Glow, z: Tensor, y: Tensor | np.ndarray | None = None) -> np.ndarray:
    """Return the uint8 images (N, C, H, W) of latents (N, D), given conditions (N, Y)."""
    images = []
    for z_part, y_part in model.in_parts(z, y):
        x, _ = model.inverse(z_part, y_part)
        images.append(model.dequantize.inverse(x)[0])
    return torch.cat(images).cpu().numpy()


def attribute_directions(
    model: Glow, data: ImageData, path: Path, config: Config, device: torch.device
) -> Tensor:
    """Return the direction of each attribute in the space of latents, of shape (A, D) (sec. 6).

    It is ``DZ_SCALE`` times a difference: the mean latent of the images that have the attribute,
    minus that of those that do not, over the first ``DZ_IMAGES`` training images. It is NaN where
    one of the two groups is empty. The directions are cached beside the checkpoint ``path``, in a
    file whose name identifies what they were computed from.
    """
    images = data.train.images[:DZ_IMAGES]
    attributes = torch.from_numpy(data.train.attributes[:DZ_IMAGES]).double()
    batch_size = min(4 * config.batch_size, model.n_at_once)

    def compute() -> Tensor:
        share_with = attributes / attributes.sum(0)
        share_without = (1 - attributes) / (1 - attributes).sum(0)
        coefficients = (share_with - share_without).T
        total = 0
        for i in progress_bar(range(0, len(images), batch_size), 'encoding training images'):
            now = slice(i, i + batch_size)
            y = conditions_of(data.train, now, device)
            z = encode(model, images[now], device, y).double().cpu()
            # a difference of two means, batch by batch
            total = total + coefficients[:, now] @ z
        return DZ_SCALE * total.float()

    is_bf16 = torch.is_autocast_enabled(device.type)
    model_weights = map(tensor_bytes, model.state_dict().values())
    key = digest([data.cache_key, DZ_IMAGES, DZ_SCALE, is_bf16], model_weights)
    shape = attributes.shape[1], math.prod(images.shape[1:])
    return tensor_cache(path.with_name(f'attribute_directions_{key}.pt'), shape, compute)


def scale_splits(model: Glow, z: Tensor, factor: float | None) -> Tensor:
    """Multiply the latents factored out by the splits, all but the last, by a factor if any.

    The code that the options of ``--visualize`` come from does so by 0.6.
    """
    n_last = math.prod(model.z_shapes[-1])
    if factor is None:
        return z
    return torch.cat([factor * z[:, :-n_last], z[:, -n_last:]], dim=1)


def visualize(
    model: Glow,
    saved: dict[str, Any],
    folder: Path,
    config: Config,
    process: Process,
    request: Request,
) -> None:
    """Save a picture that starts from photos of the user's own, or from the first test images."""
    condition, device = condition_of_checkpoint(saved), process.device
    picture = choose_picture(request, config, condition)
    paths = split_paths(request.vis_img)
    photos = [load_photo(path, config.dataset, config.image_size) for path in paths]
    data = None
    if not photos or picture == EDITS:
        data = load_data(config, saved, process)

    if photos:
        images, y = np.stack(photos), None
        # 60 bytes of each, as names of files have limits
        stems = [Path(path).stem.encode()[:60].decode(errors='ignore') for path in paths]
        name = '_'.join(['img', *stems])
        if condition.names:
            y = guess_conditions(model, images, condition, device)
            for path, own in zip(paths, y.cpu().numpy()):
                print(f'the model takes {path} for {condition.label(own)}')
    else:
        images, name = data.test.images[: 1 if picture == EDITS else 8], 'sample'
        y = conditions_of(data.test, slice(len(images)), device)
    start = Start(images, encode(model, images, device, y), y, name)

    def decode_scaled(z: Tensor, y: Tensor | None = None) -> np.ndarray:
        return decode(model, scale_splits(model, z, request.z_std), y)

    if picture == EDITS:
        source = f'{config.dataset} in {config.data_dir}'
        chosen = data.differing(request.vis_attrs, DZ_IMAGES, source)
        dz = attribute_directions(model, data, saved['path'], config, device)
        draw_edits(decode_scaled, start, dz, chosen, data.attribute_names, folder, request)
    elif picture == OTHER_CONDITIONS:
        draw_other_conditions(decode_scaled, start, condition, folder, request)
    elif picture == NEIGHBOURS:
        generator = seeded_generator('cpu', Stream.SAMPLES, config.seed)
        noise = torch.randn(8, start.z.shape[1], generator=generator).to(device)
        draw_neighbours(decode_scaled, start, noise, folder, request)
    else:
        if picture == RECONSTRUCTIONS:
            draw_reconstructions(decode_scaled, start, folder, request)
        draw_interpolation(decode_scaled, start, folder, request)


@torch.no_grad()
def guess_conditions(
    model: Glow, images: np.ndarray, condition: ImageCondition, device: torch.device
) -> Tensor:
    """Return the conditions of images, (N, Y), that Bayes' rule guesses."""
    best = []
    for x, _ in model.in_parts(middles_of_bins(model, images, device)):
        _, last, _ = model.run_levels(x)
        best.append(log_joint(model, last, condition).argmax(1).cpu())
    return torch.from_numpy(condition.values)[torch.cat(best)].to(device)


@torch.no_grad()
@without_tf32()
def check(model: Glow, data: ImageData, config: Config, device: torch.device) -> None:
    """Print the largest error of inverse(forward(x)) on the test split.

    That of the whole flow is in bins. The layer with the largest error of its own is named.
    """
    names = {layer: name for name, layer in model.named_modules()}
    errors: dict[str, float] = {}

    def run(layer: nn.Module, x: Tensor, *given: Tensor | None) -> Tensor:
        """Return ``layer(x)``, and note how far its inverse is from x."""
        z, _ = layer(x, *given)
        error = (layer.inverse(z, *given)[0] - x).abs().max().nan_to_num(math.inf).item()
        errors[names[layer]] = max(error, errors.get(names[layer], 0.0))
        return z

    batch_size = min(4 * config.batch_size, model.n_at_once)
    for i in progress_bar(range(0, len(data.test.images), batch_size), 'decoding test images'):
        now = slice(i, i + batch_size)
        x = middles_of_bins(model, data.test.images[now], device)
        y = conditions_of(data.test, now, device)
        run(model, x, y)
        for level in model.levels:
            for layer in simple_layers(level):
                x = run(layer, x)
            if level is not model.levels[-1]:
                x = x.chunk(2, dim=1)[1]
        run(model.prior, x, y)

    bins = errors.pop('') * 2**config.n_bits  # '' is the name of the whole model
    worst = max(errors, key=lambda name: errors[name])
    kind = type(model.get_submodule(worst)).__name__
    verdict = '' if bins < 0.5 else ' (NOT the same images)'
    print(
        f'{config.dataset} test: all {len(data.test.images)} images come back within {bins:.2g} '
        f'bins{verdict}; worst layer: {worst} ({kind}), {errors[worst]:.2g}'
    )


# -------------------------------------------------------------------------------------------- main


def name_of_size(limit: float) -> str:
    """Return which photos are meant by a limit of ``BY_PHOTOS``."""
    return f'celeba and folder of fewer than {limit:,} photos'


PHOTO_DEFAULTS = {
    name_of_size(limit): values for limit, values in BY_PHOTOS.items() if limit < math.inf
}
COMMAND_LINE = CommandLine(
    script=f'{NAME}.py',
    description=(__doc__ or '').partition('Notation')[0],
    modes=MODES,
    mode_options=MODE_OPTIONS,
    config_class=Config,
    request_class=Request,
    defaults={**DEFAULTS, **PHOTO_DEFAULTS},
)


def parse_args(argv: list[str]) -> tuple[str, dict[str, Any], Request]:
    """Return the mode, the options of ``Config`` that were given, and the request."""
    return COMMAND_LINE.parse(argv)


def require_compiler() -> None:
    """Raise ``UserError`` where there is no C++ compiler, which torch.compile needs."""
    if not shutil.which(os.environ.get('CXX', 'g++')):
        raise UserError(
            '--compile needs a C++ compiler: install g++, or name yours in the environment '
            'variable CXX'
        )


def choose_config(
    mode: str, options: dict[str, Any], saved: dict[str, Any] | None, process: Process
) -> Config:
    """Return the config of a run, and print the defaults that follow from the number of photos."""
    defaults, data_dir = dict(DEFAULTS), options.get('data_dir', Config.data_dir)
    dataset = options.get('dataset', Config.dataset)
    is_implied = 'data_dir' in options and 'dataset' not in options
    if saved is None and is_implied and has_photos(data_dir):
        raise UserError(
            f'{data_dir} has photos: add --dataset=folder to learn them, or --dataset={dataset}'
        )
    if saved is None and dataset in PHOTO_DATASETS:
        n_photos = count_photos(dataset, data_dir)
        defaults[dataset] = photo_defaults(n_photos)
        own = {name: value for name, value in defaults[dataset].items() if name not in options}
        if process.rank == 0 and own:
            words = ' '.join(f'--{name}={value:.3g}' for name, value in own.items())
            print(f'defaults for {n_photos:,} photos: {words}')

    config = resolve_config(Config, options, defaults, saved, MODE_OPTIONS[mode])
    if mode == 'train' and config.compile:
        require_compiler()
    if mode == 'train' and 'weight_y' in options and not config.condition:
        raise UserError('--weight_y goes with --condition')
    return config


def load_data(
    config: Config, saved: dict[str, Any] | None, process: Process, may_differ: bool = True
) -> ImageData:
    """Load the images of a run, and print on rank 0 what the user should know of them.

    ``may_differ`` says whether they may differ from those that the run was trained on.
    """
    data = load_run_images(config, saved, may_differ)
    if process.rank == 0:
        for note in data.notes:
            print(f'note: {note}')
    return data


def output_folder(request: Request, path: Path) -> Path:
    """Return the folder for pictures and results, that of the checkpoint by default.

    Raises ``UserError`` where it cannot be written to.
    """
    folder = Path(request.output) if request.output else path.parent
    if not make_writable(folder):
        raise UserError(f'{folder} is no folder that can be written to: give one by --output')
    return folder


def run_mode(mode: str, options: dict[str, Any], request: Request, process: Process) -> None:
    """Build or restore what a mode needs, and run it."""
    saved = load_selected_checkpoint(
        NAME, mode, request, process, load_checkpoint, format_score, options.get('dataset')
    )
    config = choose_config(mode, options, saved, process)
    data = None
    if mode == 'train':
        data = load_data(config, saved, process, request.accept_changed_data)
        if saved is not None:
            data = count_conditions(data)  # the checkpoint's may be of other images
        saved = train(data, config, request, process, saved)
        if saved is None:
            return
    path, device = saved['path'], process.device
    model = restore_model(saved, device)

    # what was trained in bf16 is evaluated in it only when asked
    bf16 = mode != 'train' and options.get('bf16', False)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if request.input:
            evaluate_input(model, saved, config, process, request)
        elif mode in ('train', 'evaluate'):
            data = data or load_data(config, saved, process)
            evaluate(model, data, saved, config, process, request)
        elif process.rank == 0 and mode == 'generate':
            condition, folder = condition_of_checkpoint(saved), output_folder(request, path)
            generate(model, condition, folder, config, device, request, memory_limit(path))
        elif process.rank == 0 and mode == 'visualize':
            visualize(model, saved, output_folder(request, path), config, process, request)
        elif process.rank == 0:
            check(model, load_data(config, saved, process), config, device)
    if process.rank == 0 and mode == 'train':
        print(f'the model is {path}; sample grids lie beside it')


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    with exit_on_user_error(NAME):
        mode, options, request = parse_args(sys.argv[1:] if argv is None else argv)
        # a folder that only a checkpoint of anyone names is left as it is
        is_named = 'data_dir' in options or not request.restore_file
        with setup(request.device) as process, cache_beside_data(is_named):
            settings = {**options, **vars(request)}
            for path in PATHS:
                settings.pop(path, None)
            named = {f'--{name}': value for name, value in settings.items()}
            require_agreement(process, mode=mode, **named)
            run_mode(mode, options, request, process)


if __name__ == '__main__':
    main()
