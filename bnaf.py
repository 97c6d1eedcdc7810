"""Block Neural Autoregressive Flow (De Cao, Titov & Aziz, 2019, arXiv 1904.04676), with a numerical inverse.

    python bnaf.py --train                                 8gaussians, a minute or two on a CPU core
    python bnaf.py --evaluate                              log-likelihood of the newest model on the whole test split
    python bnaf.py --generate --n_samples=1000             samples, in the data's own units, to a .csv, .npy or .h5
    python bnaf.py --visualize                             what was learned beside the data
    python bnaf.py --train --dataset=u2                    density matching: from an energy instead of from data
    python bnaf.py --train --dataset=my.csv                a table of your own; its anomalies: --evaluate --scores=FILE

Bijections have one protocol: forward(x) -> (z, logdet) and inverse(z) -> (x, logdet), where logdet of shape (B,) is the
log |det| of the Jacobian of the direction that was called, in nats. Rows are (B, D). The layers inside a flow map d
blocks of a units each, (B, d a), and carry j (B, d, a), each unit's derivative with respect to its block's own variable.
"""

import argparse
import contextlib
import math
import os
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
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from common.batches import batch_indices, seeded_generator, steps_per_epoch
from common.checkpoints import read_checkpoint, restore_state, save_checkpoint
from common.errors import UserError, exit_on_user_error
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
from datasets.plots import draw_density, draw_pairs, save_figure
from datasets.tabular import (
    SUFFIXES,
    TABLES,
    load_run_table,
    read_rows,
    require_new_table,
    save_table,
    table_units,
)
from datasets.toy import ENERGIES, SAMPLERS

# ---------------------------------------------------------------------------------------------------- config

NAME = 'bnaf'
N_DIMS = 1  # of an input: (D,)
RESIDUALS = ('none', 'normal', 'gated')
SCORE, UNIT, ITEMS = 'loss', 'nats', 'rows'
MODES = {
    'train': 'train a new model, or go on with --resume or --restore_file',
    'evaluate': 'log-likelihood of the test split, or KL to an energy',
    'generate': 'draw samples',
    'visualize': 'draw what was learned beside the data',
    'check': 'error of the inverse on the test split, and the flow it comes from',
}


@dataclass
class Config(Options):
    """A run's options, set on the command line and kept in the checkpoint as a plain dict, to rebuild the model from."""

    dataset: str = option(
        'data',
        '8gaussians',
        ', '.join([*SAMPLERS, *ENERGIES, *TABLES]) + ', or a .csv, .npy or .h5',
    )
    data_dir: str = option('data', 'data', 'where the data lies')
    test_file: str = option(
        'data', '', 'a table that is the test split of your own one (default: a tenth of its rows)'
    )
    max_rows: int = option(
        'data', 0, 'train on the first so many rows of the training split only; 0: on all'
    )
    dequantize: bool = option(
        'data', False, 'spread the discrete columns of your own table by uniform noise'
    )
    n_flows: int = option('model', 5, 'flows, the variables flipped between them', 1, 2**8)
    n_hidden: int = option('model', 1, 'inner layers of a flow, hidden to hidden', 0, 2**6)
    hidden_dim: int = option('model', 10, 'hidden units a variable', 1, 2**12)
    residual: str = option(
        'model', 'gated', ', '.join(RESIDUALS) + '; none on the last flow', choices=RESIDUALS
    )
    checkpoint_grads: bool = option(
        'optimisation', False, 'less memory, slower: the backward pass recomputes activations'
    )
    n_epochs: int = option(
        'optimisation', 1000, 'epochs, at most; of 100 steps where each draws new rows', 1
    )
    n_epochs_warmup: float = option(
        'optimisation', 0.0, 'epochs over which the learning rate rises linearly from 0'
    )
    batch_size: int = option('optimisation', 200, 'rows a process', 1, 2**20)
    lr: float = option('optimisation', 1e-2, "Adam's learning rate", 0, 1e6)
    lr_patience: int = option(
        'optimisation', 20, 'epochs without a better validation score before the rate is halved'
    )
    min_lr: float = option('optimisation', 5e-4, 'lower bound of the rate when it is halved')
    annealing: float = option(
        'optimisation',
        0.5,
        'initial fraction of the training over which an energy is turned on',
        0,
        1,
    )
    early_stop: int = option(
        'optimisation', 100, 'epochs without a better validation score that end the training', 1
    )
    grad_norm_clip: float = option('optimisation', 0.1, 'gradients are clipped at this norm')
    ema_decay: float = option(
        'optimisation',
        0.998,
        'Polyak average of weights, for all but training; 0 turns it off',
        0,
        1,
    )
    seed: int = option(
        'optimisation', 0, 'of initialisation, splits, shuffling, noise and samples', 0, 2**63 - 1
    )


@dataclass
class Request(RunRequest):
    """Options of one invocation, not kept in the checkpoint."""

    scores: str = option(
        'output',
        '',
        'write the log-likelihood of each row of the test split, or of --input, to this file',
    )
    input: str = option('output', '', 'evaluate the rows of this table instead of the test split')
    z_std: float = option('output', 1.0, 'temperature of samples')
    n_samples: int = option('output', 1000, 'how many', 1, 10**9)
    output: str = option(
        'output', '', 'where samples go, .csv, .npy or .h5 (default: beside the checkpoint)'
    )
    inverse_tol: float = option(
        'output', None, 'tolerance of each root search of the inverse', 1e-14
    )
    vis_dims: list = option(
        'output', None, 'columns to draw, by index or name (default: the first 8)'
    )

    def __post_init__(self):
        super().__post_init__()
        for file in filter(None, (self.scores, self.output)):
            require_new_table(Path(file))


# The defaults are the official ones for tables, but for n_hidden (0 there); these for the two-dimensional problems.
TOY = dict(
    n_flows=1, n_hidden=2, hidden_dim=50, n_epochs=200, n_epochs_warmup=1.0, lr=0.1, early_stop=200
)
DEFAULTS = dict.fromkeys((*SAMPLERS, *ENERGIES), TOY)
MAY_CHANGE = {
    True: {
        'data_dir',
        'checkpoint_grads',
        'n_epochs',
        'early_stop',
    },  # options that may differ from the
    False: {'data_dir', 'batch_size', 'seed'},
}  # checkpoint's: to train on, to use it
FIELDS = {
    'units': {'columns': [str], 'mean': [float], 'std': [float], 'steps': [float]},
    'step': int,
    'n_skipped': int,
    'skips_in_a_row': int,
    'n_annealing': float,
    'validation_loss': float,
    'best': float,
    'best_step': int,
}
PARTS = {
    'model': dict,
    'average': dict,
    'optimizer': {'state': dict, 'param_groups': [dict]},
    'scheduler': {'best': float, 'num_bad_epochs': int, 'cooldown_counter': int},
}
CHECKPOINT = {
    'script': str,
    'config': dict,
    'input_dims': [int],
    'world_size': int,
    **FIELDS,
    **PARTS,
}
EPOCH_STEPS, SAVE_STEPS, LOG_STEPS = 100, 1000, 20
REACH = 5.0  # of a flow without a residual at first, in standard deviations of the noise
MIN_SLOPE = (
    1e-25  # terms that float32 loses are below 1e-37, so what is above this has lost nothing
)
FARTHEST = 1e6  # in standardised units: where the inverse gives up looking for a root


# ---------------------------------------------------------------------------------------------------- layers


class MaskedLinear(nn.Module):
    """Weight-normalised linear map of d blocks of a units to d blocks of b, block lower triangular (eq. 8).

    Blocks on the diagonal are exp(.) > 0: block i of the output grows with block i of the input, and otherwise depends on
    earlier blocks only. Rows are w = exp(log_g) v / |v|. forward: x (B, d a), j (B, d, a) -> the same with b.
    """

    def __init__(self, d, a, b):
        super().__init__()
        bound = (
            6 / (a * torch.arange(1.0, d + 1) + b)
        ).sqrt()  # Xavier's, of the blocks that are not zero
        self.log_diagonal = nn.Parameter(
            bound[:, None, None] * torch.empty(d, b, a).uniform_(-1, 1)
        )
        self.lower = nn.Parameter(
            bound.repeat_interleave(b)[:, None] * torch.empty(d * b, d * a).uniform_(-1, 1)
        )
        self.log_g = nn.Parameter((1 - torch.rand(d * b, 1)).log())
        self.bias = nn.Parameter(torch.empty(d * b).uniform_(-1, 1) / math.sqrt(d * b))
        mask = torch.ones(d, d).tril(-1).repeat_interleave(b, 0).repeat_interleave(a, 1)
        self.register_buffer('mask', mask, persistent=False)

    def weights(self, dtype):
        """-> W (d b, d a), and its diagonal blocks, a view (b, a, d)"""
        d, b, a = self.log_diagonal.shape
        lower = (self.mask * self.lower).to(dtype).view(d, b, d, a)
        diagonal = self.log_diagonal.to(dtype).exp().permute(1, 2, 0)
        v = torch.diagonal_scatter(lower, diagonal, dim1=0, dim2=2).view(d * b, d * a)
        w = torch._weight_norm(
            v, self.log_g.to(dtype).exp(), 0
        )  # what torch.nn.utils.weight_norm calls
        return w, w.view(d, b, d, a).diagonal(dim1=0, dim2=2)

    def forward(self, x, j):
        w, diagonal = self.weights(x.dtype)
        return F.linear(x, w, self.bias.to(x.dtype)), torch.einsum('bad,nda->ndb', diagonal, j)


class Tanh(torch.autograd.Function):
    """y = tanh(x) and tanh'(x) j (eq. 10), as cosh(x)^-2 j: 1 - y^2 cancels. The gradient reuses both: tanh'' = -2 y tanh'."""

    @staticmethod
    def forward(ctx, x, j):
        y, slope = x.tanh(), x.cosh().pow_(-2).view(j.shape)
        j = slope * j
        ctx.save_for_backward(y, slope, j)
        return y, j

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_j):
        y, slope, j = ctx.saved_tensors
        grad_x = (
            (grad_j * j).reshape(y.shape).mul_(y).mul_(-2).addcmul_(grad_y, slope.view(y.shape))
        )
        return grad_x, grad_j * slope


def find_root(function, target, tol, max_steps=200):
    """Solve function(u) = target (B, 1) of increasing functions, all rows at once -> u (B, 1), NaN where there is none, and
    the extra of function(u, rows) -> value, slope, extra there. Only rows that have not converged are evaluated.

    Newton's method in a bracket: a step that leaves the bracket, or is more than half the one before, is a bisection;
    while there is no bracket yet it is at most twice the one before. The step that is below tol is the last.
    """
    root, rows = torch.full_like(target, math.nan), torch.arange(len(target), device=target.device)
    u, step, low, high = (
        target,
        torch.ones_like(target),
        torch.full_like(root, -math.inf),
        torch.full_like(root, math.inf),
    )
    for _ in range(max_steps):
        value, slope, _ = function(u, rows)
        newton = (target - value) / slope.clamp_min(torch.finfo(u.dtype).tiny)
        arrived = (newton.abs() <= tol).squeeze(1)
        root[rows[arrived]] = (u + newton)[arrived]
        low, high = torch.where(value <= target, u, low), torch.where(value >= target, u, high)
        active = ~arrived & (
            (u.abs() < FARTHEST) & (high - low > torch.finfo(u.dtype).eps * u.abs())
        ).squeeze(1)
        if not active.any():
            break
        bracketed = (high - low).isfinite()
        inside = (u + newton > low) & (u + newton < high) & (newton.abs() <= step / 2)
        new = torch.where(
            bracketed & ~inside, (low + high) / 2, u + newton.clamp(-2 * step, 2 * step)
        )
        rows, target, u, step, low, high = (
            v[active] for v in (rows, target, new, (new - u).abs(), low, high)
        )
    return root, function(root, slice(None))[2]


class BlockFlow(nn.Module):
    """One block neural autoregressive flow (sec. 3): z_i = f_i(x_1 ... x_i), strictly increasing in x_i.

    residual: None; 'normal', z = f(x) + x; or 'gated', z = s f(x) + (1 - s) x with s = sigmoid(gate).
    """

    inverse_tol = None  # in units of x; by default 1e-5 in float32 and 1e-10 in float64

    def __init__(self, data_dim, n_hidden, hidden_dim, residual=None, checkpoint_grads=False):
        super().__init__()
        units = [1, *[hidden_dim] * (n_hidden + 1), 1]
        self.linears = nn.ModuleList(MaskedLinear(data_dim, a, b) for a, b in zip(units, units[1:]))
        self.residual, self.checkpoint_grads = residual, checkpoint_grads
        if residual is None:
            # sums of tanhs are bounded: each at first spans 2 REACH as its own variable goes from -inf to inf
            last = self.linears[-1]
            last.log_g.data += (
                math.log(REACH) - last.weights(last.bias.dtype)[1].sum(1).T.log().data
            )
        if residual == 'gated':
            self.gate = nn.Parameter(torch.randn(()))

    def forward(self, x):
        recompute = self.checkpoint_grads and torch.is_grad_enabled()
        forward_with_slope = (
            partial(checkpoint, self.forward_with_slope, use_reentrant=False)
            if recompute
            else self.forward_with_slope
        )
        z, slope = forward_with_slope(x)
        if slope.dtype == torch.float32 and slope.min() < MIN_SLOPE:
            z, slope = forward_with_slope(x.double())
        return z.to(x.dtype), slope.clamp_min(torch.finfo(slope.dtype).tiny).log().sum(1).to(
            x.dtype
        )

    def forward_with_slope(self, x):
        """-> z and dz_i / dx_i, both (B, D): the chain rule over the blocks on the diagonal (eq. 9-11), without logs"""
        z, j = self.linears[0](x, x.new_ones(*x.shape, 1))
        for linear in self.linears[1:]:
            z, j = linear(*Tanh.apply(z, j))
        return self.add_residual(z, j.squeeze(2), x)

    def add_residual(self, y, slope, x):
        """-> z and its derivative, from f(x) and its"""
        if self.residual is None:
            return y, slope
        s, rest = (
            (torch.sigmoid(self.gate), torch.sigmoid(-self.gate))
            if self.residual == 'gated'
            else (1.0, 1.0)
        )
        return s * y + rest * x, s * slope + rest

    def inverse(self, z):
        """-> x, logdet; NaN where inverse_tol is not reached, as beyond the range of a flow of tanhs. It is solved for in
        float64; gradients are those of the implicit function theorem."""
        tol = self.inverse_tol or (1e-5 if z.dtype == torch.float32 else 1e-10)
        x = solve(self, z.detach().double(), tol).to(z.dtype)
        found = x.isfinite().all(1, keepdim=True)
        x = torch.where(
            found, x, 0.0
        )  # what was not found must not reach the gradients of the others
        if torch.is_grad_enabled():
            x = attach_gradients(self, x, torch.where(found, z, 0.0))
        logdet = -self(x)[1]
        return torch.where(found, x, math.nan), torch.where(found.squeeze(1), logdet, math.nan)


@torch.no_grad()
def solve(flow, z, tol):
    """-> x (B, D) of z = flow(x), one variable after the other; of each layer only the rows of the new variable are computed"""
    weights = [linear.weights(z.dtype)[0] for linear in flow.linears]
    biases = [linear.bias.to(z.dtype) for linear in flow.linears]
    inputs = [z.new_zeros(len(z), w.shape[1]) for w in weights]  # to each layer, as far as known

    def function(blocks, u, rows):
        """f_i of the i-th variable u (B, 1), its slope, and its hidden units; blocks holds the rest of each layer"""
        y, slope, units = u, torch.ones_like(u), []
        for k, (known, w) in enumerate(blocks):
            if k:
                y = y.tanh()
                slope = slope * (1 - y.square())
                units.append(y)
            y, slope = known[rows] + y @ w.T, slope @ w.T
        return *flow.add_residual(y, slope, u), units

    for i in range(z.shape[1]):
        blocks = []
        for linear, w, bias, known in zip(flow.linears, weights, biases, inputs):
            _, b, a = linear.log_diagonal.shape
            rows, own = slice(i * b, (i + 1) * b), slice(i * a, (i + 1) * a)
            blocks.append((F.linear(known[:, : i * a], w[rows, : i * a], bias[rows]), w[rows, own]))
        u, units = find_root(partial(function, blocks), z[:, i : i + 1], tol)
        for known, own in zip(inputs, [u, *units]):
            known[:, i * own.shape[1] : (i + 1) * own.shape[1]] = own
    return inputs[0]


def attach_gradients(flow, x, z):
    """x after one more Newton step, with the inverse's gradients: dx = (df/dx)^-1 (dz - df/dtheta dtheta)"""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        f = flow(x)[0]
        jacobian = torch.stack(
            [
                torch.autograd.grad(f[:, i].sum(), x, retain_graph=True)[0]
                for i in range(x.shape[1])
            ],
            1,
        )
    x = x.detach()
    return x + torch.linalg.solve_triangular(
        jacobian, (z - flow(x)[0])[..., None], upper=False
    ).squeeze(2)


class Flip(nn.Module):
    """The variables in reverse order; log|det| = 0."""

    def forward(self, x):
        return x.flip(1), x.new_zeros(len(x))

    inverse = forward


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


# ----------------------------------------------------------------------------------------------------- model


class BNAF(Sequence):
    """Flows with the variables flipped between them: of data, from rows (B, data_dim) to latents z ~ N(0, I); matched to
    an energy, from noise to rows. hidden_dim counts units a variable; the last flow has no residual.
    """

    def __init__(
        self,
        data_dim,
        n_flows=5,
        n_hidden=1,
        hidden_dim=10,
        residual='gated',
        checkpoint_grads=False,
    ):
        residuals = [residual] * (n_flows - 1) + [None]
        flows = [
            BlockFlow(data_dim, n_hidden, hidden_dim, own, checkpoint_grads) for own in residuals
        ]
        super().__init__([layer for flow in flows for layer in (flow, Flip())][:-1])
        self.data_dim = data_dim

    def log_prob(self, x):
        """rows (B, data_dim) -> log p(x) in nats (B,)"""
        z, logdet = self(x)
        return log_normal(z) + logdet

    def sample(self, n, z_std=1.0, generator=None):
        """-> n rows (n, data_dim), drawn at temperature z_std through the inverse"""
        return sample_with_log_prob(
            self.inverse, n, self.data_dim, next(self.parameters()), z_std, generator
        )[0]


@torch.no_grad()
def sample_with_log_prob(push, n, data_dim, like, z_std=1.0, generator=None):
    """-> n rows x = push(z) for z ~ N(0, z_std^2 I), their log p(x), and the number of z that had to be drawn anew

    A flow that ends in tanhs does not reach all of space: z that have no x within the inverse's tolerance are rejected.
    """
    kept, n_kept, n_drawn = [], 0, 0
    while n_kept < n:
        eps = torch.randn(min(n, 10_000), data_dim, generator=generator, dtype=like.dtype)
        z = z_std * eps.to(like.device)
        x, logdet = push(z)
        found = x.isfinite().all(1) & logdet.isfinite()
        kept.append((x[found], (log_normal(z) - logdet)[found]))
        n_kept, n_drawn = n_kept + int(found.sum()), n_drawn + len(z)
        if n_drawn >= 1000 and n_kept < 0.01 * n_drawn:
            raise UserError(
                f'of {n_drawn:,} draws only {n_kept} gave finite rows: the model is not trained, or '
                '--inverse_tol is below its precision'
            )
    x, log_p = (torch.cat(parts)[:n] for parts in zip(*kept))
    return x, log_p, n_drawn - n_kept


def log_normal(z):
    """log N(z; 0, I) of each row, in nats: (B, D) -> (B,)"""
    return -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


class Objective(nn.Module):
    """What is minimised, in nats, as DistributedDataParallel wraps it: -log p(x) in the data's own units (eq. 2) or, for
    an energy, the KL divergence of the flow's density to exp(-U) / Z, x being noise (eq. 3)."""

    def __init__(self, model, data):
        super().__init__()
        self.model = model
        self.energy = data.energy
        self.constant = float(data.log_z + np.log(data.std).sum())

    def per_row(self, x, beta=1.0):
        if self.energy is None:
            return self.constant - self.model.log_prob(x)
        y, logdet = self.model(x)
        return self.constant + log_normal(x) - logdet + beta * self.energy(y)

    def forward(self, x, beta=1.0):
        return self.per_row(x, beta).mean()


def build_model(config, input_dims):
    torch.manual_seed(config.seed)
    residual = None if config.residual == 'none' else config.residual
    return BNAF(
        *input_dims,
        config.n_flows,
        config.n_hidden,
        config.hidden_dim,
        residual,
        config.checkpoint_grads,
    )


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
    """-> this process's rows of a step, as indices or, where each step draws new ones, themselves: a function of (seed,
    step, rank), so that a resumed run goes on exactly as an unbroken one."""
    if data.draw:
        return data.draw(
            np.random.default_rng((config.seed, step, process.rank)), config.batch_size
        )
    return batch_indices(
        len(data.train), config.batch_size, config.seed, step, process.rank, process.world_size
    )


@torch.no_grad()
def row_losses(objective, rows, process):
    """-> the objective of each of the rows (N, D), by all processes together: (N,) in float64 on every one of them"""
    losses = torch.zeros(len(rows), dtype=torch.float64, device=process.device)
    own = np.arange(len(rows))[process.rank :: process.world_size]
    for index in (own[i : i + 10_000] for i in range(0, len(own), 10_000)):
        losses[index] = objective.per_row(torch.from_numpy(rows[index]).to(process.device)).double()
    return process.sum(losses).cpu()  # zero where another process fills in


# -------------------------------------------------------------------------------------------------- training


class Plateau(ReduceLROnPlateau):
    """The learning rate is lowered where the score no longer improves; what of that changes is what a checkpoint keeps."""

    def state_dict(self):
        return {key: getattr(self, key) for key in PARTS['scheduler']}


class Training:
    """What a run carries from step to step: weights, their average, the optimizer, and where it stands."""

    def __init__(self, config, data, process, saved=None):
        self.config, self.data, self.process = config, data, process
        self.input_dims = [len(data.columns)]
        self.units = table_units(data)
        self.model = build_model(config, self.input_dims).to(process.device)
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)
        )
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=config.lr, amsgrad=True, fused=True
        )
        self.scheduler = Plateau(
            self.optimizer,
            factor=0.5,
            patience=config.lr_patience,
            cooldown=10,
            min_lr=config.min_lr,
            threshold=1e-4,
            threshold_mode='abs',
        )
        self.step, self.validation_loss, self.best, self.best_step = 0, math.nan, math.inf, 0
        self.n_skipped = self.skips_in_a_row = 0
        self.steps_per_epoch = self.validate_every = (
            EPOCH_STEPS
            if data.draw
            else steps_per_epoch(len(data.train), config.batch_size, process.world_size)
        )
        self.n_steps = config.n_epochs * self.steps_per_epoch
        self.n_annealing = (
            config.annealing * self.n_steps
        )  # as planned at first, however long it goes on
        if saved is not None:
            restore_state(self, saved, FIELDS, PARTS)
        self.objective = wrap_ddp(
            Objective(self.model, data),
            process,
            options=asdict(replace(config, data_dir='')),
            data=data.fingerprint,
            step=self.step,
        )
        self.rows = None if data.draw else torch.from_numpy(np.array(data.train)).to(process.device)

    @property
    def last_step(self):
        return min(self.n_steps, self.best_step + self.config.early_stop * self.steps_per_epoch)

    def take_step(self):
        """-> loss and gradient norm of one step, as tensors"""
        n_warmup = self.config.n_epochs_warmup * self.steps_per_epoch
        if self.step < n_warmup:
            self.optimizer.param_groups[0]['lr'] = self.config.lr * min(
                1.0, (self.step + 1) / n_warmup
            )
        batch = torch.from_numpy(
            training_batch(self.data, self.config, self.step, self.process)
        ).to(self.process.device)
        # an energy is turned on gradually, lest the flow collapse onto one of its modes
        beta = min(1.0, 0.01 + self.step / max(1.0, self.n_annealing))
        return update(self, self.objective(batch if self.rows is None else self.rows[batch], beta))

    def validate(self, run_dir):
        """The objective on the validation split with the averaged weights, and the learning rate that follows from it"""
        loss = (
            row_losses(
                Objective(self.average.module, self.data), self.data.validation, self.process
            )
            .mean()
            .item()
        )
        if math.isfinite(loss):
            self.scheduler.step(loss)
        self.best_step, self.validation_loss = (
            self.step if loss < self.best else self.best_step,
            loss,
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


def objective_text(data, loss):
    return f'{-loss:.3f} nats' if data.energy is None else f'KL {loss:.4f} nats'


# ----------------------------------------------------------------------------------------------------- modes


def evaluate(model, data, saved, config, process, scores, input_file):
    """Log-likelihood of the test split, or the KL divergence to an energy: printed, and kept as results.json beside the
    checkpoint. scores: a file that gets the log-likelihood of every row of the test split or of input_file."""
    if data.energy and (scores or input_file):
        raise UserError(
            '--scores and --input are for models of data; --generate gives the log-density of each sample'
        )
    rows = read_rows(input_file, data) if input_file else data.test
    losses = row_losses(Objective(model, data), rows, process)
    if process.rank > 0:
        return
    mean, error = losses.mean().item(), 2 * losses.std(correction=0).item() / math.sqrt(len(rows))
    name = str(input_file) if input_file else f'{Path(config.dataset).name} test'
    if data.energy is None:
        results, said = {'log_likelihood_nats': -mean}, f'{-mean:.4f} ± {error:.4f} nats'
    else:
        ess = ((-losses).softmax(0).square().sum() * len(rows)).reciprocal().item()
        results = {'kl_nats': mean, 'effective_sample_size': ess}
        said = f'KL(q || p) {mean:.4f} ± {error:.4f} nats, effective sample size {ess:.1%}'
    print(
        f'{name}: {said} ({len(rows):,} {"samples" if data.energy else "rows"}, two standard errors)'
    )
    if not input_file:
        write_json(
            saved['path'].with_name('results.json'),
            {
                **results,
                'dataset': name,
                'n_rows': len(rows),
                'two_standard_errors': error,
                'step': saved['step'],
                'checkpoint': saved['path'].name,
            },
        )
    if scores:
        index = np.arange(len(rows)) if input_file else data.test_index
        save_table(scores, np.stack([index, -losses], 1), ('row', 'log_likelihood'))


def directions(model, data):
    """-> push, from noise to rows, and pull, back: a model of data is itself pull, one matched to an energy is push"""
    return (model.inverse, model) if data.energy is None else (model, model.inverse)


@torch.no_grad()
def sample_rows(model, data, n, z_std, seed):
    """-> n rows in the data's own units (n, D), and log p of each; in float64, as the inverse is exact to 1e-10 there"""
    push, pull = directions(model.double(), data)
    start = time.perf_counter()
    x, log_p, n_lost = sample_with_log_prob(
        push, n, len(data.columns), next(model.parameters()), z_std, seeded_generator('cpu', seed)
    )
    print(
        f'{n:,} samples, {n / (time.perf_counter() - start):,.0f} a second; '
        + (f'{n_lost:,} more draws lay beyond what the flow reaches; ' if n_lost else '')
        + f'round trip within {(push(pull(x[:1000])[0])[0] - x[:1000]).abs().max().item():.0e}'
    )
    return x.cpu().numpy() * data.std + data.mean, log_p.cpu().numpy() - np.log(data.std).sum()


def generate(model, data, path, config, z_std, n_samples, output):
    """Samples in the data's own units with their log-likelihood, as a table."""
    x, log_p = sample_rows(model, data, n_samples, z_std, config.seed)
    save_table(
        output or path.with_name('generated_samples.csv'),
        np.column_stack([x, log_p]),
        [*data.columns, 'log_likelihood'],
    )


@torch.no_grad()
def density(model, data, points):
    """p at points (N, D) in the data's own units; 0 where the flow does not reach"""
    _, pull = directions(model.double(), data)
    x = (torch.from_numpy(points) - torch.from_numpy(data.mean)) / torch.from_numpy(data.std)
    x = x.to(next(model.parameters()).device)
    log_p = [log_normal(z) + logdet for z, logdet in map(pull, x.split(10_000))]
    return torch.cat(log_p).exp().nan_to_num(0.0).cpu().numpy() / data.std.prod()


def visualize(model, data, path, config, process, vis_dims):
    """Two variables: target, learned density and samples side by side; more: samples over data, in pairs."""
    mean = (
        row_losses(Objective(model, data), data.test, Process(0, 1, process.device)).mean().item()
    )  # it draws alone
    title = f'{Path(config.dataset).stem}: {objective_text(data, mean)}'
    if len(data.columns) == 2:
        samples, _ = sample_rows(model, data, 50_000, 1.0, config.seed)
        figure = draw_density(data, samples, partial(density, model, data), title)
    else:
        chosen = (
            [data.column_index(text) for text in vis_dims]
            if vis_dims
            else list(range(min(8, len(data.columns))))
        )
        real = data.head(1500)
        drawn, _ = sample_rows(model, data, len(real), 1.0, config.seed)
        figure = draw_pairs(
            real[:, chosen],
            drawn[:, chosen],
            [data.columns[k] for k in chosen],
            f'{title}; data grey, samples orange',
        )
    save_figure(path.with_name('visualization.png'), figure)


@torch.no_grad()
def check(model, data, config):
    """Largest error of inverse(forward(x)) on the test split, in standardised units and float64: of the whole model, and of
    the flow with the most. Rows that the inverse does not reach are counted."""
    model, device = model.double(), next(model.parameters()).device
    errors, n_lost, worst = [0.0] * len(model), 0, 0.0
    for i in progress_bar(range(0, len(data.test), 10_000), 'inverting test rows'):
        x = z = torch.from_numpy(np.array(data.test[i : i + 10_000])).double().to(device)
        for k, flow in enumerate(model):
            y, (z, _) = z, flow(z)
            errors[k] = max(errors[k], (flow.inverse(z)[0] - y).abs().nan_to_num(0.0).max().item())
        error = (model.inverse(z)[0] - x).abs().amax(1)
        n_lost, worst = (
            n_lost + int(error.isnan().sum()),
            max(worst, error.nan_to_num(0.0).max().item()),
        )
    k = int(np.argmax(errors))
    lost = f'; the other {n_lost:,} lie beyond what the inverse reaches' if n_lost else ''
    print(
        f'{Path(config.dataset).name} test: {len(data.test) - n_lost:,} of {len(data.test):,} rows come back within '
        f'{worst:.2g}{lost}; worst layer: {k} ({type(model[k]).__name__}), {errors[k]:.2g}'
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
    if request.input and mode != 'evaluate':
        raise UserError('--input goes with --evaluate')
    for name in ('dataset', 'test_file'):  # tables are found from wherever the model is used
        if Path(values.get(name, '')).suffix in SUFFIXES:
            values[name] = str(Path(values[name]).resolve())
    saved = find_checkpoint(NAME, UNIT, mode, request, process, load_checkpoint)
    config = resolve_config(Config, values, DEFAULTS, saved, MAY_CHANGE[mode == 'train'])
    data = load_run_table(config, saved, no_split=mode == 'generate' or bool(request.input))
    if mode == 'train':
        for note in data.notes * (process.rank == 0):
            print(f'note: {note}')
        saved = train(data, config, request, process, saved)
        if saved is None:
            return
    model = restore_model(saved, process.device)
    for flow in model:
        flow.inverse_tol = request.inverse_tol
    if mode in ('train', 'evaluate'):
        evaluate(model, data, saved, config, process, request.scores, request.input)
    elif process.rank == 0 and mode == 'generate':
        generate(
            model, data, saved['path'], config, request.z_std, request.n_samples, request.output
        )
    elif process.rank == 0 and mode == 'visualize':
        visualize(model, data, saved['path'], config, process, request.vis_dims)
    elif process.rank == 0:
        check(model, data, config)
    if process.rank == 0 and mode == 'train':
        print(
            f'the model is {saved["path"]}: step {saved["step"]}, validation {objective_text(data, saved["validation_loss"])}'
        )


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
