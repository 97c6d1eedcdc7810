"""Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma & Dhariwal, 2018, arXiv 1807.03039).

    python glow.py --train                                 drawn faces, about ten minutes on two CPU cores
    python glow.py --evaluate                              bits/dim of the newest model on the whole test split
    python glow.py --generate --z_std=0.7                  samples at temperature 0.7
    python glow.py --visualize --vis_attrs=8,20            edit attributes of a test image, or of --vis_img=photo.jpg
    torchrun --nproc_per_node=8 glow.py --train --dataset=celeba --data_dir=... --n_levels=3 --depth=32 --width=512

Every layer is a bijection with one protocol: forward(x) -> (z, logdet) and inverse(z) -> (x, logdet), where logdet
of shape (B,) is the log |det| of the Jacobian of the direction that was called, in nats. Images are (B, C, H, W).
"""

import argparse
import contextlib
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common.batches import batch_indices, seeded_generator, steps_per_epoch
from common.checkpoints import read_checkpoint, restore_state, save_checkpoint, tensor_cache
from common.errors import UserError, exit_on_user_error, warn_on_error
from common.files import digest, write_json
from common.logs import TrainingLog, progress_bar
from common.options import Options, RunRequest, option, parse, resolve_config
from common.runs import (
    catch_stop_signals,
    find_checkpoint,
    local_device,
    open_run_folder,
    require_agreement,
    stop_if_diverged,
)
from datasets import IMAGE_DATASETS, load_images, load_photo, save_grid, shift_randomly

# ---------------------------------------------------------------------------------------------------- config

NAME = 'glow'
N_DIMS = 3  # of an input: (C, H, W)
SCORE, UNIT, ITEMS = 'bits_per_dim', 'bits/dim', 'images'
MODES = {
    'train': 'train a new model, or go on with --resume or --restore_file',
    'evaluate': 'bits/dim on the test split',
    'generate': 'draw samples',
    'visualize': 'edit the attributes of an image',
    'check': 'error of the inverse on the test split, and the layer it comes from',
}


@dataclass
class Config(Options):
    """A run's options, set on the command line and kept in the checkpoint as a plain dict, to rebuild the model from."""

    dataset: str = option('data', 'faces', ', '.join(IMAGE_DATASETS))
    data_dir: str = option('data', 'data', 'where the data lies, or is kept once drawn')
    image_size: int = option('data', 64, 'pixels a side, of faces, celeba and folder', 1)
    n_bits: int = option('model', 5, 'grey levels are reduced to 2^n_bits a channel', 1, 8)
    n_levels: int = option(
        'model',
        3,
        'levels that end in a split; one more follows: L = n_levels + 1 in the paper',
        1,
        9,
    )
    depth: int = option('model', 32, 'steps of flow a level, K in the paper', 1, 2**10)
    width: int = option('model', 512, "channels of the coupling networks' hidden layers", 1, 2**14)
    plain_conv1x1: bool = option(
        'model', False, 'learn the matrices of the 1x1 convolutions, not their PLU factors'
    )
    checkpoint_grads: bool = option(
        'optimisation', False, 'less memory, slower: the backward pass recomputes activations'
    )
    bf16: bool = option(
        'optimisation', False, 'networks in bfloat16; latents and densities stay float32'
    )
    compile: bool = option(
        'optimisation', False, 'compile the step of flow: half a minute at the start, faster steps'
    )
    n_epochs: int = option('optimisation', 100, 'epochs', 1)
    n_epochs_warmup: float = option(
        'optimisation', 2.0, 'epochs over which the learning rate rises linearly from 0'
    )
    batch_size: int = option('optimisation', 16, 'images a process', 1, 2**20)
    batch_size_init: int = option('optimisation', 256, "images for actnorm's initialisation", 1)
    lr: float = option('optimisation', 1e-3, "Adam's learning rate", 0, 1e6)
    lr_decay: float = option(
        'optimisation',
        0.0,
        'final fraction of the training over which it falls linearly to 0',
        0,
        1,
    )
    grad_norm_clip: float = option('optimisation', 50.0, 'gradients are clipped at this norm')
    ema_decay: float = option(
        'optimisation',
        0.999,
        'Polyak average of weights, for all but training; 0 turns it off',
        0,
        1,
    )
    seed: int = option(
        'optimisation', 0, 'of initialisation, shuffling, noise and samples', 0, 2**63 - 1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % 2 ** (self.n_levels + 1):
            raise UserError(
                f'image size {self.image_size} is not divisible by 2^(n_levels + 1) = {2 ** (self.n_levels + 1)}: '
                'lower --n_levels or change --image_size'
            )


@dataclass
class Request(RunRequest):
    """Options of one invocation, not kept in the checkpoint."""

    z_std: float = option('output', None, 'temperature (default: a grid of them)', 0, 100)
    n_samples: int = option('output', 32, 'samples with --z_std', 1, 10**6)
    vis_attrs: list = option('output', None, 'attributes by index or name (default: all)')
    vis_alphas: list[float] = option(
        'output',
        (-2.0, -1.0, 0.0, 1.0, 2.0),
        'how far to go along them (default: -2,-1,0,1,2)',
        -1000,
        1000,
    )
    vis_img: str = option('output', '', 'a photo of your own (default: the first test image)')


# What a data set changes of the above. celeba and mnist: as github.com/kamenbliznashki/normalizing_flows trains them.
DEFAULTS = {
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
    ),
    'mnist': dict(image_size=32, n_bits=8),
    'cifar10': dict(image_size=32, n_bits=8, n_levels=2),
    'celeba': dict(n_epochs=80),
    'folder': dict(),
}
MAY_CHANGE = {
    True: {
        'data_dir',
        'checkpoint_grads',
        'bf16',
        'compile',
        'n_epochs',
    },  # options that may differ from the
    False: {'data_dir', 'batch_size', 'seed', 'bf16'},
}  # checkpoint's: to train on, to use it
VALIDATE_STEPS, SAVE_STEPS, LOG_STEPS = (
    500,
    1000,
    20,
)  # validation comes at the end of an epoch, at least so far apart
FIELDS = {
    'step': int,
    'n_skipped': int,
    'skips_in_a_row': int,
    'validation_loss': float,
    'best': float,
}  # of Training
PARTS = {'model': dict, 'average': dict, 'optimizer': {'state': dict, 'param_groups': [dict]}}
CHECKPOINT = {
    'script': str,
    'config': dict,
    'input_dims': [int],
    'world_size': int,
    **FIELDS,
    **PARTS,
}
TEMPERATURES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DZ_SCALE, DZ_IMAGES = 1.6, 30_000  # attribute directions, as in the paper's demo
S_MIN, LOG_STD_MAX = 0.5, 2.0  # bounds that keep the inverse of latents far out finite


# ---------------------------------------------------------------------------------------------------- layers


class Dequantize(nn.Module):
    """Discrete images to continuous values: the top n_bits of the uint8 image, plus uniform noise u, scaled to [-0.5, 0.5).

    x = (floor(x_8bit / 2^(8 - n)) + u) / 2^n - 0.5 and log|det| = -D n log 2 for D values an image; with it the log-density
    is, on average over u, a lower bound of the n-bit image's log-probability (Theis et al., 2016).
    """

    def __init__(self, n_bits):
        super().__init__()
        self.n_bits = n_bits

    def forward(self, x, u=None):
        u = torch.rand(x.shape, device=x.device) if u is None else u
        bins = x >> (8 - self.n_bits)
        logdet = u.new_full((len(x),), -x[0].numel() * self.n_bits * math.log(2))
        return (bins + u) / 2**self.n_bits - 0.5, logdet

    def inverse(self, x):
        """-> uint8 images that show the n-bit images over the whole range 0..255; logdet as for forward, negated."""
        n_bins = 2**self.n_bits
        bins = ((x + 0.5) * n_bins).floor().clamp(0, n_bins - 1)
        logdet = x.new_full((len(x),), x[0].numel() * self.n_bits * math.log(2))
        return (bins * 255 / (n_bins - 1)).to(torch.uint8), logdet


class Actnorm(nn.Module):
    """Activation normalisation (sec. 3.1): y = s * x + b per channel, log|det| = H W sum(log s).

    The first batch sets s and b so that y has zero mean and unit variance per channel.
    """

    def __init__(self, n_channels):
        super().__init__()
        self.log_s = nn.Parameter(torch.zeros(n_channels, 1, 1))
        self.b = nn.Parameter(torch.zeros(n_channels, 1, 1))
        self.register_buffer('initialized', torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x):
        if self.initialized:
            return
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        std = torch.where(var > 1e-8, var.sqrt(), 1.0)[
            :, None, None
        ]  # a constant channel is only centred
        self.log_s.copy_(-std.log())
        self.b.copy_(-mean[:, None, None] / std)
        self.initialized.fill_(True)

    def forward(self, x):
        logdet = self.log_s.sum() * x.shape[2] * x.shape[3]
        return torch.addcmul(self.b, x, self.log_s.exp()), logdet.expand(len(x))

    def inverse(self, z):
        logdet = -self.log_s.sum() * z.shape[2] * z.shape[3]
        return (z - self.b) * (-self.log_s).exp(), logdet.expand(len(z))


class Invertible1x1Conv(nn.Module):
    """Invertible 1x1 convolution (sec. 3.2): y_ij = W x_ij, log|det| = H W log|det W|, W orthogonal at first.

    With plu it learns the factors of W = P L (U + diag(s)) (eq. 10), whose log|det W| is sum(log|s|) (eq. 11).
    """

    def __init__(self, n_channels, plu=True):
        super().__init__()
        w = torch.linalg.qr(torch.randn(n_channels, n_channels))[0]
        self.plu = plu
        if plu:
            p, l, u = torch.linalg.lu(w)
            self.register_buffer('p', p)
            self.register_buffer('sign_s', u.diagonal().sign())
            # one matrix holds L below, U above and log|s| on its diagonal, as LAPACK stores its factors
            w = l.tril(-1) + u.triu(1) + u.diagonal().abs().log().diag()
        self.w = nn.Parameter(w)

    def weight(self):
        """-> W (C, C) and log|det W|"""
        if not self.plu:
            return self.w, torch.linalg.slogdet(self.w)[1]
        log_s = self.w.diagonal()
        l = self.w.tril(-1) + torch.eye(len(self.w), device=self.w.device, dtype=self.w.dtype)
        u = self.w.triu(1) + torch.diag(self.sign_s * log_s.exp())
        return self.p @ l @ u, log_s.sum()

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # the latent itself is never rounded
            w, logdet = self.weight()
            return F.conv2d(x, w[:, :, None, None]), (logdet * x.shape[2] * x.shape[3]).expand(
                len(x)
            )

    def inverse(self, z):
        with torch.autocast(z.device.type, enabled=False):
            w, logdet = self.weight()
            w_inv = torch.linalg.inv(w.double()).to(w.dtype)
            return F.conv2d(z, w_inv[:, :, None, None]), (-logdet * z.shape[2] * z.shape[3]).expand(
                len(z)
            )


class ConvActnorm(nn.Module):
    """Convolution, then actnorm: s * (w x) + b is computed as (s w) x + b, one pass over the activations."""

    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        nn.init.normal_(self.conv.weight, std=0.05)
        self.actnorm = Actnorm(out_channels)

    def initialize(self, x):
        self.actnorm.initialize(self.conv(x))

    def forward(self, x):
        weight = self.actnorm.log_s.exp()[..., None] * self.conv.weight
        return F.conv2d(x, weight, self.actnorm.b.flatten(), padding=self.conv.padding)


class ZeroConv(nn.Conv2d):
    """3x3 convolution that starts at zero (sec. 3.3), its outputs scaled by exp(3 log_scale) as in the official code"""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.log_scale = nn.Parameter(torch.zeros(out_channels))
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        scale = (3 * self.log_scale).exp()
        return F.conv2d(x, scale[:, None, None, None] * self.weight, scale * self.bias, padding=1)


class AffineCoupling(nn.Module):
    """Affine coupling (sec. 3.3, table 1): y_a = s * x_a + t, y_b = x_b with (s, t) = NN(x_b), log|det| = sum(log s).

    s = sigmoid(raw + 2) as in the official code, but rescaled to (S_MIN, 1): the inverse stretches y_a - t at most twofold.
    """

    def __init__(self, n_channels, width):
        super().__init__()
        self.net = nn.Sequential(
            ConvActnorm(n_channels // 2, width, 3),
            nn.ReLU(inplace=True),
            ConvActnorm(width, width, 1),
            nn.ReLU(inplace=True),
            ZeroConv(width, n_channels),
        )

    def scale_and_shift(self, x_b):
        raw, t = (
            self.net(x_b).to(x_b.dtype).chunk(2, dim=1)
        )  # under autocast only the network is rounded
        return S_MIN + (1 - S_MIN) * torch.sigmoid(raw + 2), t

    def forward(self, x):
        x_a, x_b = x.chunk(2, dim=1)
        s, t = self.scale_and_shift(x_b)
        return torch.cat([s * x_a + t, x_b], dim=1), s.log().flatten(1).sum(1)

    def inverse(self, z):
        y_a, x_b = z.chunk(2, dim=1)
        s, t = self.scale_and_shift(x_b)
        return torch.cat([(y_a - t) / s, x_b], dim=1), -s.log().flatten(1).sum(1)


class Squeeze(nn.Module):
    """(B, C, H, W) -> (B, 4C, H/2, W/2): 2x2 blocks of pixels become channels (sec. 3.6 of RealNVP); log|det| = 0."""

    def forward(self, x):
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, z):
        return F.pixel_shuffle(z, 2), z.new_zeros(len(z))


class LearnedPrior(Actnorm):
    """The last level's prior, a Gaussian per channel: z = (x - mean) / std is actnorm's s * x + b, not set by data."""

    def __init__(self, n_channels):
        super().__init__(n_channels)
        self.initialized.fill_(True)


class Split(AffineCoupling):
    """Half the channels as Gaussians given the others (sec. 3.6 of RealNVP): x_a ~ N(mean(x_b), std(x_b)^2).

    A coupling, z_a = (x_a - mean) / std, whose first half is a finished latent; x_b goes on to the next level.
    """

    def __init__(self, n_channels):
        nn.Module.__init__(self)
        self.net = ZeroConv(n_channels // 2, n_channels)

    def scale_and_shift(self, x_b):
        mean, log_std = self.net(x_b).to(x_b.dtype).chunk(2, dim=1)
        s = (-LOG_STD_MAX * torch.tanh(log_std / LOG_STD_MAX)).exp()
        return s, -mean * s


class Sequence(nn.ModuleList):
    """Bijections one after the other; their log-determinants add up."""

    def forward(self, x):
        logdet = x.new_zeros(len(x))
        for layer in self:
            x, logdet_layer = layer(x)
            logdet = logdet + logdet_layer
        return x, logdet

    def inverse(self, z):
        logdet = z.new_zeros(len(z))
        for layer in reversed(self):
            z, logdet_layer = layer.inverse(z)
            logdet = logdet + logdet_layer
        return z, logdet


class FlowStep(Sequence):
    """One step of flow (fig. 2a). checkpoint_grads trades time for memory: the backward pass recomputes activations."""

    def __init__(self, n_channels, width, plu=True, checkpoint_grads=False):
        super().__init__(
            [
                Actnorm(n_channels),
                Invertible1x1Conv(n_channels, plu),
                AffineCoupling(n_channels, width),
            ]
        )
        self.checkpoint_grads = checkpoint_grads

    def forward(self, x):
        if self.checkpoint_grads and torch.is_grad_enabled():
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


class FlowLevel(Sequence):
    """One level (fig. 2b): squeeze, depth steps of flow, then the split or, on the last level, the prior."""

    def __init__(self, in_channels, depth, width, is_last=False, plu=True, checkpoint_grads=False):
        c = 4 * in_channels
        steps = [FlowStep(c, width, plu, checkpoint_grads) for _ in range(depth)]
        super().__init__([Squeeze(), *steps, LearnedPrior(c) if is_last else Split(c)])


# ----------------------------------------------------------------------------------------------------- model


class Glow(nn.Module):
    """The multi-scale flow (fig. 2b) between images in [-0.5, 0.5) and latents z ~ N(0, I) of as many values.

    input_dims: (C, H, W), H and W divisible by 2^(n_levels + 1). z is (B, C H W): the levels' halves, finest first.
    """

    def __init__(
        self, input_dims, n_levels, depth, width, n_bits=5, checkpoint_grads=False, plu=True
    ):
        super().__init__()
        self.input_dims = c, h, w = tuple(input_dims)
        self.dequantize = Dequantize(n_bits)
        self.levels, self.z_shapes = nn.ModuleList(), []
        for level in range(n_levels + 1):
            is_last = level == n_levels
            self.levels.append(FlowLevel(c, depth, width, is_last, plu, checkpoint_grads))
            c, h, w = (4 if is_last else 2) * c, h // 2, w // 2
            self.z_shapes.append((c, h, w))

    def forward(self, x):
        z, logdet = [], x.new_zeros(len(x))
        for level in self.levels:
            x, logdet_level = level(x)
            logdet = logdet + logdet_level
            if level is not self.levels[-1]:
                z_a, x = x.chunk(2, dim=1)
                z.append(z_a.flatten(1))
        return torch.cat([*z, x.flatten(1)], dim=1), logdet

    def inverse(self, z):
        logdet = z.new_zeros(len(z))
        parts = z.split([math.prod(shape) for shape in self.z_shapes], dim=1)
        *parts, x = [part.unflatten(1, shape) for part, shape in zip(parts, self.z_shapes)]
        for level in reversed(self.levels):
            x, logdet_level = level.inverse(x)
            logdet = logdet + logdet_level
            if parts:
                x = torch.cat([parts.pop(), x], dim=1)
        return x, logdet

    def log_prob(self, x, u=None):
        """uint8 images (B, C, H, W), dequantization noise u of the same shape in [0, 1) -> log p(x) in nats (B,)"""
        x, logdet_bins = self.dequantize(x, u)
        z, logdet = self(x)
        return log_normal(z) + logdet + logdet_bins

    @torch.no_grad()
    def sample(self, n, z_std=1.0, generator=None):
        """-> n uint8 images (n, C, H, W), drawn at temperature z_std (sec. 6: the prior's deviation is scaled)"""
        z = z_std * torch.randn(n, math.prod(self.input_dims), generator=generator)
        return self.dequantize.inverse(self.inverse(z.to(next(self.parameters()).device))[0])[0]


@torch.no_grad()
def initialize(model, x, u=None):
    """Data-dependent initialisation of every actnorm that has none yet, from uint8 images (sec. 3.1)"""
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: module.initialize(inputs[0]))
        for module in model.modules()
        if hasattr(module, 'initialize')
    ]
    model(model.dequantize(x, u)[0])
    for hook in hooks:
        hook.remove()


def log_normal(z):
    """log N(z; 0, I) of each row, in nats: (B, D) -> (B,)"""
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


class BitsPerDim(nn.Module):
    """The training objective, -log2 p(x) / n_values averaged over the batch: what DistributedDataParallel wraps."""

    def __init__(self, model, n_values, bf16=False):
        super().__init__()
        self.model, self.n_values, self.bf16 = model, n_values, bf16

    def forward(self, x, u=None):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return -self.model.log_prob(x, u).mean() / (math.log(2) * self.n_values)


def build_model(config, input_dims):
    if list(input_dims[1:]) != [config.image_size] * 2:
        raise UserError(
            f'a model of images of {config.image_size}x{config.image_size} has no input of {input_dims}'
        )
    torch.manual_seed(config.seed)
    model = Glow(
        input_dims,
        config.n_levels,
        config.depth,
        config.width,
        config.n_bits,
        config.checkpoint_grads,
        not config.plain_conv1x1,
    )
    return model.to(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------- processes, checkpoints


class Process(NamedTuple):
    """This process among those of the launcher, which keeps a store for them."""

    rank: int
    world_size: int
    device: torch.device
    store: object = None

    def gather(self, value):
        """-> what each process has, in the order of their ranks"""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, values):
        """-> a tensor, summed in place over all processes"""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag):
        """Whether the flag is set on any of the processes"""
        return (
            bool(flag)
            if self.world_size == 1
            else self.sum(torch.tensor(float(bool(flag)), device=self.device)).item() > 0
        )


@contextlib.contextmanager
def setup():
    """Join the process group of torchrun or torch.distributed.launch, if one started us: NCCL on GPUs, else Gloo."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ('RANK', 'LOCAL_RANK'))
    world_size, n_here, n_nodes = (
        int(os.environ.get(f'{of}WORLD_SIZE', 1)) for of in ('', 'LOCAL_', 'GROUP_')
    )
    device, store, n_restarts = (
        local_device(local_rank, n_here),
        None,
        os.environ.get('TORCHELASTIC_RESTART_COUNT'),
    )
    if world_size > 1 or n_restarts:
        store, _, _ = next(dist.rendezvous('env://'))
        store = getattr(
            store, 'underlying_store', store
        )  # torch 2.4 gives each start a part of its own
    if world_size > 1:
        # torchrun's store outlives the processes: those it starts anew must not find in it the addresses of the dead.
        # (Each node counts its own restarts, so that the count is of no use to several.)
        own = dist.PrefixStore(f'start {n_restarts if n_nodes == 1 else 0}', store)
        dist.init_process_group(
            'nccl' if device.type == 'cuda' else 'gloo',
            timeout=timedelta(minutes=30),
            store=own,
            rank=rank,
            world_size=world_size,
        )
    try:
        yield Process(rank, world_size, device, store)
    finally:
        if world_size > 1 and not isinstance(
            sys.exc_info()[1], RuntimeError
        ):  # report a lost process first
            time.sleep(
                0.1
            )  # torch 2.4 hangs in the next line while Gloo's thread still frees its last tensor
            dist.destroy_process_group()


def wrap_ddp(objective, process, **own):
    """-> the objective, its gradients averaged over all processes, once these are found to agree on all of own and on the
    weights; its buffers never change and are not sent"""
    if process.world_size == 1:
        return objective
    require_agreement(
        process,
        weights=digest('', (value.cpu() for value in objective.state_dict().values())),
        **own,
    )
    buffers = [name for name, _ in objective.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, buffers)
    return DistributedDataParallel(objective, gradient_as_bucket_view=True)


def load_checkpoint(path):
    """-> the dict in a checkpoint, its config a Config, or UserError: nothing in the file is trusted"""
    return read_checkpoint(
        path,
        f'{NAME}.py',
        CHECKPOINT,
        Config,
        N_DIMS,
        lambda *options: AveragedModel(build_model(*options)),
    )


def restore_model(saved, device):
    """-> the model with the averaged weights of a checkpoint, ready to evaluate and to sample"""
    average = AveragedModel(build_model(saved['config'], saved['input_dims']))
    average.load_state_dict(saved['average'])
    return average.module.to(device).eval()


# ------------------------------------------------------------------------------------------------------ data


def training_batch(data, config, step, process):
    """-> this process's uint8 images and noise of a step: functions of (seed, step, rank)"""
    index = batch_indices(
        len(data.train.images),
        config.batch_size,
        config.seed,
        step,
        process.rank,
        process.world_size,
    )
    generator = seeded_generator(process.device, config.seed, step, process.rank)
    x = torch.from_numpy(data.train.images[index]).to(process.device)
    if data.max_shift:
        x = shift_randomly(x, data.max_shift, generator)
    return x, torch.rand(x.shape, device=process.device, generator=generator)


@torch.no_grad()
def bits_per_dim(model, images, n_values, batch_size, process):
    """-> mean bits/dim over all the images and two standard errors of it. Image i always gets the same noise, so that
    the number depends neither on batch_size nor on how many processes share the work."""
    sums = torch.zeros(2, dtype=torch.float64, device=process.device)
    own = np.arange(len(images))[process.rank :: process.world_size]
    for index in (own[i : i + batch_size] for i in range(0, len(own), batch_size)):
        x = torch.from_numpy(images[index]).to(process.device)
        u = torch.stack(
            [torch.rand(x.shape[1:], generator=seeded_generator('cpu', int(i))) for i in index]
        )
        bits = -model.log_prob(x, u.to(process.device)).double() / (math.log(2) * n_values)
        sums += torch.stack([bits.sum(), bits.square().sum()])
    mean, mean_square = (process.sum(sums) / len(images)).tolist()
    return mean, 2 * math.sqrt(max(0, mean_square - mean**2) / len(images))


@torch.no_grad()
def sample_rows(model, temperatures, n_columns, seed, device):
    """-> one row of uint8 samples (n_columns, C, H, W) a temperature, each sorted by log-probability, best first"""
    rows = []
    for row, z_std in enumerate(temperatures):
        eps = torch.randn(
            n_columns, math.prod(model.input_dims), generator=seeded_generator('cpu', seed, row)
        )
        z = z_std * eps.to(device)
        x, logdet = (
            torch.cat(parts) for parts in zip(*(model.inverse(z_some) for z_some in z.split(64)))
        )
        order = (log_normal(z) - logdet).argsort(descending=True)
        if not x.isfinite().all():
            raise UserError(
                f'samples at temperature {z_std:g} are not finite: the model has diverged'
            )
        rows.append(model.dequantize.inverse(x)[0][order].cpu().numpy())
    return rows


# -------------------------------------------------------------------------------------------------- training


def learning_rate(config, step, per_epoch):
    """Linear warm-up from 0, constant, and a linear fall to 0 over the last lr_decay of the training"""
    n_steps = config.n_epochs * per_epoch
    warmup = (step + 1) / max(1, config.n_epochs_warmup * per_epoch)
    fall = (n_steps - step) / (config.lr_decay * n_steps) if config.lr_decay else 1.0
    return config.lr * min(1.0, warmup, fall)


class Training:
    """What a run carries from step to step: weights, their average, the optimizer, and where it stands."""

    def __init__(self, config, data, process, saved=None):
        self.config, self.data, self.process = config, data, process
        self.input_dims = list(data.train.images.shape[1:])
        self.model = build_model(config, self.input_dims).to(process.device)
        self.step, self.best, self.validation_loss = 0, math.inf, math.nan
        self.n_skipped = self.skips_in_a_row = 0
        n = len(data.train.images)
        self.steps_per_epoch = steps_per_epoch(n, config.batch_size, process.world_size)
        self.validate_every = self.steps_per_epoch * math.ceil(
            VALIDATE_STEPS / self.steps_per_epoch
        )
        self.n_steps = self.last_step = config.n_epochs * self.steps_per_epoch
        if saved is None:  # the same on every process, before the model is wrapped
            x = data.train.images[
                batch_indices(n, min(n, config.batch_size_init), config.seed, step=0)
            ]
            u = torch.rand(x.shape, generator=seeded_generator('cpu', config.seed))
            initialize(self.model, torch.from_numpy(x).to(process.device), u.to(process.device))
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        if saved is not None:
            restore_state(self, saved, FIELDS, PARTS)
        for module in self.model.modules():
            if config.compile and isinstance(module, FlowStep):
                module.compile()  # steps of one shape share what was compiled for the first
        self.objective = wrap_ddp(
            BitsPerDim(self.model, data.n_values, config.bf16),
            process,
            data=data.fingerprint,
            options=asdict(replace(config, data_dir='')),
            step=self.step,
        )

    def take_step(self):
        """-> bits/dim and gradient norm of one step, as tensors"""
        self.optimizer.param_groups[0]['lr'] = learning_rate(
            self.config, self.step, self.steps_per_epoch
        )
        return update(
            self, self.objective(*training_batch(self.data, self.config, self.step, self.process))
        )

    def validate(self, run_dir):
        """Bits/dim on the validation split, with the averaged weights, and samples of these as a picture"""
        self.validation_loss, _ = bits_per_dim(
            self.average.module,
            self.data.validation.images,
            self.data.n_values,
            4 * self.config.batch_size,
            self.process,
        )
        if self.process.rank == 0:
            tqdm.write(f'step {self.step}: validation {self.validation_loss:.4f} bits/dim')
            with warn_on_error('picture'):
                rows = sample_rows(
                    self.average.module,
                    (0.0, 0.25, 0.7, 1.0),
                    8,
                    self.config.seed,
                    self.process.device,
                )
                save_grid(
                    run_dir / f'samples_at_step_{self.step:06}.png',
                    rows,
                    ['T = 0', 'T = 0.25', 'T = 0.7', 'T = 1'],
                )


def update(run, loss):
    """One step of the optimizer -> loss, gradient norm. Where these are not finite, no process changes its weights."""
    run.optimizer.zero_grad()
    loss.backward(
        torch.where(loss.isfinite(), 1.0, math.nan)
    )  # else NaN gradients, on all processes
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.config.grad_norm_clip)
    run.skips_in_a_row = 0 if norm.isfinite() else run.skips_in_a_row + 1
    run.n_skipped += run.skips_in_a_row > 0
    if not run.skips_in_a_row:
        run.optimizer.step()
        run.average.update_parameters(run.model)
    run.step += 1
    return loss.detach(), norm


def train(data, config, request, process, saved=None):
    """Train to the end, from a checkpoint's dict if there is one; leaves checkpoint.pt, the last state, and best.pt
    -> the best one's dict, or None where a signal ended it before"""
    torch.autograd.set_detect_anomaly(request.detect_anomaly)
    with (
        open_run_folder(NAME, config, request, process, saved, load_checkpoint) as run_dir,
        catch_stop_signals() as signals,
    ):
        run, best, newest = (
            Training(config, data, process, saved),
            run_dir / 'best.pt',
            run_dir / 'checkpoint.pt',
        )
        log = TrainingLog(run, run_dir, SCORE, UNIT, ITEMS)
        save = partial(save_checkpoint, run, log, NAME, FIELDS, PARTS)
        if not newest.exists():
            save(newest)
        if not best.exists():
            run.best = math.inf
        with log:
            while run.step < run.last_step and not process.any(signals):
                loss, norm = run.take_step()
                log.step(loss, norm, LOG_STEPS)
                is_due = run.step % run.validate_every == 0 or run.step == run.last_step
                if is_due:
                    run.validate(run_dir)
                    log.validated()
                stop_if_diverged(run, is_due, request.max_skips, newest)
                if is_due and run.validation_loss < run.best:
                    run.best = run.validation_loss
                    save(best)
                if (
                    is_due or run.step % SAVE_STEPS == 0
                ):  # last: what a checkpoint is past is never redone
                    save(newest)
        if (
            process.any(signals) or run.step < run.last_step
        ):  # a collective call: by now rank 0 has written its files
            save(newest)
            log.stopped(signals, NAME, newest)
            return None
        return load_checkpoint(best if best.exists() else newest)


# ----------------------------------------------------------------------------------------------------- modes


def evaluate(model, data, saved, config, process):
    """Bits/dim on the whole test split: printed, and kept as results.json beside the checkpoint."""
    mean, error = bits_per_dim(
        model, data.test.images, data.n_values, 4 * config.batch_size, process
    )
    if process.rank == 0:
        results = {
            'bits_per_dim': mean,
            'two_standard_errors': error,
            'n_images': len(data.test.images),
            'values_per_image': data.n_values,
            'n_bits': config.n_bits,
            'dataset': config.dataset,
            'step': saved['step'],
            'checkpoint': saved['path'].name,
            'bf16': torch.is_autocast_enabled(process.device.type),
        }
        write_json(saved['path'].with_name('results.json'), results)
        print(
            f'{config.dataset} test: {mean:.4f} ± {error:.4f} bits/dim at {config.n_bits} bits '
            f'({len(data.test.images)} images, two standard errors)'
        )


def generate(model, path, config, device, z_std, n_samples):
    """Samples at one temperature, or the grid of TEMPERATURES, beside the checkpoint."""
    if z_std is None:
        name, labels = 'range', [f'T = {t:g}' for t in TEMPERATURES]
        rows = sample_rows(model, TEMPERATURES, 4, config.seed, device)
    else:
        name, labels = f'{z_std:g}', ()
        samples = sample_rows(model, [z_std], n_samples, config.seed, device)[0]
        rows = [samples[i : i + 8] for i in range(0, n_samples, 8)]
    save_grid(path.with_name(f'generated_samples_at_z_std_{name}.png'), rows, labels)


@torch.no_grad()
def encode(model, images, device):
    """uint8 images (N, C, H, W) -> latents (N, D) of the middles of their bins, so that decoding returns the same bins"""
    x = torch.tensor(images, device=device)
    return model(model.dequantize(x, torch.full(x.shape, 0.5, device=device))[0])[0]


@torch.no_grad()
def decode(model, z):
    """latents (N, D) -> uint8 images (N, C, H, W)"""
    return model.dequantize.inverse(model.inverse(z)[0])[0].cpu().numpy()


def attribute_directions(model, data, path, config, device):
    """-> dz (A, D): DZ_SCALE times the mean latent of training images with an attribute minus that without it (sec. 6)

    NaN where an attribute has no positives or no negatives. Kept beside the checkpoint under a key of its content.
    """
    images, attributes = (
        data.train.images[:DZ_IMAGES],
        torch.from_numpy(data.train.attributes[:DZ_IMAGES]).double(),
    )

    def compute():
        weights = (
            attributes / attributes.sum(0) - (1 - attributes) / (1 - attributes).sum(0)
        ).T  # of a difference of means
        n = 4 * config.batch_size
        return (
            DZ_SCALE
            * sum(
                weights[:, i : i + n] @ encode(model, images[i : i + n], device).double().cpu()
                for i in progress_bar(range(0, len(images), n), 'encoding training images')
            ).float()
        )

    key = digest(
        [data.fingerprint, DZ_IMAGES, DZ_SCALE, torch.is_autocast_enabled(device.type)],
        (value.cpu() for value in model.state_dict().values()),
    )
    shape = attributes.shape[1], math.prod(images.shape[1:])
    return tensor_cache(path.with_name(f'attribute_directions_{key}.pt'), shape, compute)


def visualize(model, data, path, config, device, vis_attrs, vis_alphas, vis_img):
    """Decode z + alpha * dz: one row an attribute, one column an alpha, the unchanged image in the middle."""
    names, chosen = (
        data.attribute_names,
        data.editable(vis_attrs, DZ_IMAGES, f'{config.dataset} in {config.data_dir}'),
    )
    image = (
        load_photo(vis_img, config.dataset, config.image_size) if vis_img else data.test.images[0]
    )
    dz = attribute_directions(model, data, path, config, device)
    z = encode(model, image[None], device)
    alphas = torch.tensor(vis_alphas, device=device)[:, None]
    rows = [decode(model, z + alphas * dz[i].to(device)) for i in chosen]
    labels = [names[i] if names[i] == str(i) else f'{i} {names[i]}' for i in chosen]
    attrs = ','.join(str(i) for i in chosen) if vis_attrs else 'all'
    source = f'img_{Path(vis_img).stem}' if vis_img else 'sample'
    save_grid(
        path.with_name(f'manipulated_{source}_attr_{attrs}.png'),
        rows,
        labels,
        [f'{alpha:+g}' if alpha else 'unchanged' for alpha in vis_alphas],
    )


@torch.no_grad()
def check(model, data, config, device):
    """Largest error of inverse(forward(x)) on the test split: of the whole flow in bins, and of the layer with the most"""
    errors = {}

    def compare(name, layer, inputs, output):
        error = (layer.inverse(output[0])[0] - inputs[0]).abs().max().nan_to_num(math.inf).item()
        errors[name] = max(error, errors.get(name, 0.0))

    for name, layer in model.named_modules():
        if hasattr(layer, 'inverse') and not isinstance(layer, (Sequence, Dequantize)):
            layer.register_forward_hook(partial(compare, name))
    for i in progress_bar(
        range(0, len(data.test.images), 4 * config.batch_size), 'decoding test images'
    ):
        encode(model, data.test.images[i : i + 4 * config.batch_size], device)
    bins = errors.pop('') * 2**config.n_bits
    worst = max(errors, key=errors.get)
    print(
        f'{config.dataset} test: all {len(data.test.images)} images come back within {bins:.2g} bins'
        f'{"" if bins < 0.5 else ", which is NOT to the same bin"}; worst layer: {worst} '
        f'({type(model.get_submodule(worst)).__name__}), {errors[worst]:.2g}'
    )


# ------------------------------------------------------------------------------------------------------ main


def parse_args(argv):
    """-> the mode, {name: value} of the options of Config that were given, and a Request"""
    parser = argparse.ArgumentParser(
        f'{NAME}.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)
    return parse(parser, argv, MODES, Config, Request, DEFAULTS)


def start(mode, values, request, process):
    saved = find_checkpoint(NAME, UNIT, mode, request, process, load_checkpoint)
    config = resolve_config(Config, values, DEFAULTS, saved, MAY_CHANGE[mode == 'train'])
    if mode == 'train' and config.compile and not shutil.which(os.environ.get('CXX', 'g++')):
        raise UserError(
            '--compile needs a C++ compiler: install g++, or name yours in the environment variable CXX'
        )
    data = (
        None
        if mode == 'generate'
        else load_images(config.dataset, config.data_dir, config.image_size)
    )
    if mode == 'train':
        saved = train(data, config, request, process, saved)
        if saved is None:
            return
    model, path, device = restore_model(saved, process.device), saved['path'], process.device
    bf16 = mode != 'train' and values.get(
        'bf16', False
    )  # what was trained in bf16 is evaluated in it only when asked
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if mode in ('train', 'evaluate'):
            evaluate(model, data, saved, config, process)
        elif process.rank == 0 and mode == 'generate':
            generate(model, path, config, device, request.z_std, request.n_samples)
        elif process.rank == 0 and mode == 'visualize':
            visualize(
                model,
                data,
                path,
                config,
                device,
                request.vis_attrs,
                request.vis_alphas,
                request.vis_img,
            )
        elif process.rank == 0:
            check(model, data, config, device)
    if process.rank == 0 and mode == 'train':
        print(f'the model is {path}; sample grids lie beside it')


def main(argv=None):
    with exit_on_user_error(NAME):
        mode, values, request = parse_args(sys.argv[1:] if argv is None else argv)
        with setup() as process:
            require_agreement(
                process,
                mode=mode,
                **{
                    f'--{name}': value
                    for name, value in {**values, **vars(request)}.items()
                    if name not in ('data_dir', 'output_dir', 'restore_file')
                },
            )
            start(mode, values, request, process)


if __name__ == '__main__':
    main()
