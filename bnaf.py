"""Block Neural Autoregressive Flow (De Cao, Titov & Aziz, 2019, arXiv 1904.04676), with an exact numerical inverse.

    python bnaf.py --train                                 8gaussians, a minute or two on a CPU core
    python bnaf.py --evaluate                              log-likelihood of the newest model on the whole test split
    python bnaf.py --generate --n_samples=1000             samples, in the data's own units, to a .csv, .npy or .h5
    python bnaf.py --visualize                             what was learned beside the data
    python bnaf.py --train --dataset=u2                    density matching: from an energy instead of from data
    python bnaf.py --train --dataset=my.csv                a table of your own; its anomalies: --evaluate --scores=FILE

Bijections have one protocol: forward(x) -> (z, logdet) and inverse(z) -> (x, logdet), where logdet of shape (B,) is the
log |det| of the Jacobian of the direction that was called, in nats. Rows are (B, D). The layers inside a flow map d
blocks of a units each, (B, d a), and carry j (B, d, a), the units' derivatives by the variable of their own block.
"""
import argparse
import contextlib
import inspect
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tensorboardX import SummaryWriter
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from datasets import UserError
from datasets.figures import draw_pairs, draw_planes
from datasets.files import new_folder, write_atomically
from datasets.order import batch_index, seeded_generator, steps_per_epoch
from datasets.tabular import SUFFIXES, TABLES, Rows, load_rows, read_rows, write_table
from datasets.toy import ENERGIES, SAMPLERS


# ---------------------------------------------------------------------------------------------------- config

NAME = 'bnaf'
N_DIMS = 1                          # of an input: (D,)
RESIDUALS = ('none', 'normal', 'gated')


def option(group, default, text, low=0, high=math.inf):
    return field(default=default, metadata=dict(group=group, help=text, low=low, high=high))


@dataclass
class Config:
    """What a run is. The command line sets it; the checkpoint keeps it as a plain dict, to rebuild the model from."""
    dataset: str = option('data', '8gaussians', ', '.join([*SAMPLERS, *ENERGIES, *TABLES]) + ', or a .csv, .npy or .h5')
    data_dir: str = option('data', 'data', 'where the data lies')
    test_file: str = option('data', '', 'a table that is the test split of your own one (default: a tenth of its rows)')
    dequantize: bool = option('data', False, 'spread the discrete columns of your own table by uniform noise')
    n_flows: int = option('model', 5, 'flows, the variables flipped between them', 1, 2**8)
    n_hidden: int = option('model', 1, 'inner layers of a flow, hidden to hidden', 0, 2**6)
    hidden_dim: int = option('model', 10, 'hidden units a variable', 1, 2**12)
    residual: str = option('model', 'gated', ', '.join(RESIDUALS) + '; none on the last flow')
    checkpoint_grads: bool = option('optimisation', False, 'less memory, more time: compute activations again backward')
    n_epochs: int = option('optimisation', 1000, 'epochs, at most; of 100 steps where each draws new rows', 1)
    n_epochs_warmup: float = option('optimisation', 0., 'epochs over which the learning rate rises linearly from 0')
    batch_size: int = option('optimisation', 200, 'rows a process', 1)
    lr: float = option('optimisation', 1e-2, "Adam's learning rate")
    lr_patience: int = option('optimisation', 20, 'epochs without a better validation score until it is halved')
    min_lr: float = option('optimisation', 5e-4, 'but not below this')
    annealing: float = option('optimisation', 0.5, 'first share of the training over which an energy is turned on', 0, 1)
    early_stop: int = option('optimisation', 100, 'epochs without a better validation score that end the training', 1)
    grad_norm_clip: float = option('optimisation', 0.1, 'gradients are clipped at this norm')
    ema_decay: float = option('optimisation', 0.998, 'Polyak average, used for all but training; 0 turns it off', 0, 1)
    seed: int = option('optimisation', 0, 'of initialisation, splits, shuffling, noise and samples', 0, 2**63 - 1)


# The defaults are the official ones for tables, but for n_hidden (0 there); these for the two-dimensional problems.
TOY = dict(n_flows=1, n_hidden=2, hidden_dim=50, n_epochs=200, n_epochs_warmup=1., lr=0.1, early_stop=200)
MAY_CHANGE = {True: {'data_dir', 'checkpoint_grads', 'n_epochs', 'early_stop'},     # of a checkpoint's options, when
              False: {'data_dir', 'batch_size', 'seed'}}                            # training goes on, and else
CHECKPOINT = {'config': dict, 'input_dims': list, 'units': dict, 'step': int, 'world_size': int, 'n_annealing': float,
              'loss': float, 'best': float, 'best_step': int, 'model': dict, 'average': dict, 'optimizer': dict,
              'scheduler': dict}
EPOCH_STEPS, SAVE_STEPS, LOG_STEPS = 100, 1000, 20
REACH = 5.                          # of a flow without a residual at first, in standard deviations of the noise
SMALLEST = 1e-25                    # terms that float32 loses are below 1e-37, so what is above this has lost nothing
FARTHEST = 1e6                      # in standardised units: where the inverse gives up looking for a root


# ---------------------------------------------------------------------------------------------------- layers

class MaskedLinear(nn.Module):
    """Weight-normalised linear map of d blocks of a units to d blocks of b, block lower triangular (eq. 8).

    Blocks on the diagonal are exp(.) > 0: block i of the output grows with block i of the input, and depends else on the
    blocks before it only. Rows are w = exp(log_g) v / |v|. forward: x (B, d a), j (B, d, a) -> the same with b.
    """
    def __init__(self, d, a, b):
        super().__init__()
        bound = (6 / (a * torch.arange(1., d + 1) + b)).sqrt()          # Xavier's, of the blocks that are not zero
        self.log_diagonal = nn.Parameter(bound[:, None, None] * torch.empty(d, b, a).uniform_(-1, 1))
        self.lower = nn.Parameter(bound.repeat_interleave(b)[:, None] * torch.empty(d * b, d * a).uniform_(-1, 1))
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
        w = torch._weight_norm(v, self.log_g.to(dtype).exp(), 0)       # what torch.nn.utils.weight_norm calls
        return w, w.view(d, b, d, a).diagonal(dim1=0, dim2=2)

    def forward(self, x, j):
        w, diagonal = self.weights(x.dtype)
        return F.linear(x, w, self.bias.to(x.dtype)), torch.einsum('bad,nda->ndb', diagonal, j)


class TanhFunction(torch.autograd.Function):
    """y = tanh(x) and tanh'(x) j, as cosh(x)^-2 j since 1 - y^2 cancels; its gradient reuses both: tanh'' = -2 y tanh'."""
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
        grad_x = (grad_j * j).reshape(y.shape).mul_(y).mul_(-2).addcmul_(grad_y, slope.view(y.shape))
        return grad_x, grad_j * slope


class Tanh(nn.Module):
    """tanh of every unit; its derivative multiplies j (eq. 10)."""
    def forward(self, x, j):
        return TanhFunction.apply(x, j)


def find_root(function, target, tol, max_steps=200):
    """Where increasing functions reach their targets (B, 1), all rows at once -> u (B, 1), NaN where they do not, and
    what else function(u, rows) -> value, slope, anything says there. It is asked for the rows that are still on the way.

    Newton's method in a bracket: a step that leaves the bracket, or is more than half the one before, is a bisection;
    while there is no bracket yet it is at most twice the one before. The step that is below tol is the last.
    """
    root, rows = torch.full_like(target, math.nan), torch.arange(len(target), device=target.device)
    u, step, low, high = target, torch.ones_like(target), torch.full_like(root, -math.inf), torch.full_like(root, math.inf)
    for _ in range(max_steps):
        value, slope, _ = function(u, rows)
        newton = (target - value) / slope.clamp_min(torch.finfo(u.dtype).tiny)
        arrived = (newton.abs() <= tol).squeeze(1)
        root[rows[arrived]] = (u + newton)[arrived]
        low, high = torch.where(value <= target, u, low), torch.where(value >= target, u, high)
        active = ~arrived & ((u.abs() < FARTHEST) & (high - low > torch.finfo(u.dtype).eps * u.abs())).squeeze(1)
        if not active.any():
            break
        bracketed = (high - low).isfinite()
        inside = (u + newton > low) & (u + newton < high) & (newton.abs() <= step / 2)
        new = torch.where(bracketed & ~inside, (low + high) / 2, u + newton.clamp(-2 * step, 2 * step))
        rows, target, u, step, low, high = (v[active] for v in (rows, target, new, (new - u).abs(), low, high))
    return root, function(root, slice(None))[2]


class BlockFlow(nn.Module):
    """One block neural autoregressive flow (sec. 3): z_i = f_i(x_1 ... x_i), strictly increasing in x_i.

    residual: None; 'normal', z = f(x) + x; or 'gated', z = s f(x) + (1 - s) x with s = sigmoid(gate).
    """
    inverse_tol = None          # in units of x; by default 1e-5 in float32 and 1e-10 in float64

    def __init__(self, data_dim, n_hidden, hidden_dim, residual=None, checkpoint_grads=False):
        super().__init__()
        units = [1, *[hidden_dim] * (n_hidden + 1), 1]
        self.linears = nn.ModuleList(MaskedLinear(data_dim, a, b) for a, b in zip(units, units[1:]))
        self.tanh = Tanh()
        self.residual, self.checkpoint_grads = residual, checkpoint_grads
        if residual is None:
            # sums of tanhs are bounded: each starts between -REACH and REACH as its own variable goes from -inf to inf
            last = self.linears[-1]
            last.log_g.data += math.log(REACH) - last.weights(last.bias.dtype)[1].sum(1).T.log().data
        if residual == 'gated':
            self.gate = nn.Parameter(torch.randn(()))

    def forward(self, x):
        if self.checkpoint_grads and torch.is_grad_enabled():
            return checkpoint(self.transform, x, use_reentrant=False)
        return self.transform(x)

    def transform(self, x):
        z, slope = self.derive(x)
        if slope.dtype == torch.float32 and slope.min() < SMALLEST:
            z, slope = self.derive(x.double())
        return z.to(x.dtype), slope.clamp_min(torch.finfo(slope.dtype).tiny).log().sum(1).to(x.dtype)

    def derive(self, x):
        """-> z and dz_i / dx_i, both (B, D): the chain rule over the blocks on the diagonal (eq. 9-11), without logs"""
        z, j = self.linears[0](x, x.new_ones(*x.shape, 1))
        for linear in self.linears[1:]:
            z, j = linear(*self.tanh(z, j))
        j = j.squeeze(2)
        if self.residual == 'normal':
            return z + x, j + 1
        if self.residual == 'gated':
            s, rest = torch.sigmoid(self.gate), torch.sigmoid(-self.gate)
            return s * z + rest * x, s * j + rest
        return z, j

    def inverse(self, z):
        """-> x, logdet; NaN where inverse_tol is not reached, as beyond the range of a flow of tanhs. It is solved for in
        float64; gradients are those of the implicit function theorem."""
        tol = self.inverse_tol or (1e-5 if z.dtype == torch.float32 else 1e-10)
        x = self.solve(z.detach().double(), tol).to(z.dtype)
        found = x.isfinite().all(1, keepdim=True)
        x = torch.where(found, x, 0.)               # what was not found must not reach the gradients of the others
        if torch.is_grad_enabled():
            x = self.attach(x, torch.where(found, z, 0.))
        logdet = -self(x)[1]
        return torch.where(found, x, math.nan), torch.where(found.squeeze(1), logdet, math.nan)

    @torch.no_grad()
    def solve(self, z, tol):
        """One variable after the other; of each layer only the rows that are the new variable's are computed."""
        weights = [linear.weights(z.dtype)[0] for linear in self.linears]
        biases = [linear.bias.to(z.dtype) for linear in self.linears]
        inputs = [z.new_zeros(len(z), w.shape[1]) for w in weights]     # to each layer, as far as known
        for i in range(z.shape[1]):
            blocks = []
            for linear, w, bias, known in zip(self.linears, weights, biases, inputs):
                _, b, a = linear.log_diagonal.shape
                rows, own = slice(i * b, (i + 1) * b), slice(i * a, (i + 1) * a)
                blocks.append((F.linear(known[:, :i * a], w[rows, :i * a], bias[rows]), w[rows, own]))
            u, units = find_root(partial(self.evaluate, blocks), z[:, i:i + 1], tol)
            for known, own in zip(inputs, [u, *units]):
                known[:, i * own.shape[1]:(i + 1) * own.shape[1]] = own
        return inputs[0]

    def evaluate(self, blocks, u, rows):
        """f_i of the i-th variable u (B, 1), its slope, and its hidden units; blocks holds the rest of each layer"""
        y, slope, units = u, torch.ones_like(u), []
        for k, (known, w) in enumerate(blocks):
            if k:
                y = y.tanh()
                slope = slope * (1 - y.square())
                units.append(y)
            y, slope = known[rows] + y @ w.T, slope @ w.T
        if self.residual == 'normal':
            return y + u, slope + 1, units
        if self.residual == 'gated':
            s, rest = torch.sigmoid(self.gate), torch.sigmoid(-self.gate)
            return s * y + rest * u, s * slope + rest, units
        return y, slope, units

    def attach(self, x, z):
        """x, with the gradients of the inverse: dx = (df/dx)^-1 (dz - df/dtheta dtheta)"""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            f = self(x)[0]
            jacobian = torch.stack([torch.autograd.grad(f[:, i].sum(), x, retain_graph=True)[0]
                                    for i in range(x.shape[1])], 1)
        x = x.detach()
        return x + torch.linalg.solve_triangular(jacobian, (z - self(x)[0])[..., None], upper=False).squeeze(2)


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
    def __init__(self, data_dim, n_flows=5, n_hidden=1, hidden_dim=10, residual='gated', checkpoint_grads=False):
        layers = []
        for k in range(n_flows):
            own = residual if k < n_flows - 1 else None
            layers += [BlockFlow(data_dim, n_hidden, hidden_dim, own, checkpoint_grads), Flip()]
        super().__init__(layers[:-1])
        self.data_dim = data_dim

    def log_prob(self, x):
        """rows (B, data_dim) -> log p(x) in nats (B,)"""
        z, logdet = self(x)
        return log_normal(z) + logdet

    def sample(self, n, z_std=1., generator=None):
        """-> n rows (n, data_dim), drawn at temperature z_std through the inverse"""
        return draw(self.inverse, n, self.data_dim, next(self.parameters()), z_std, generator)[0]


@torch.no_grad()
def draw(push, n, data_dim, like, z_std=1., generator=None):
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
            raise UserError(f'of {n_drawn:,} draws only {n_kept} could be inverted: the model is not trained, or '
                            '--inverse_tol is below its precision')
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

    def per_row(self, x, beta=1.):
        if self.energy is None:
            return self.constant - self.model.log_prob(x)
        y, logdet = self.model(x)
        return self.constant + log_normal(x) - logdet + beta * self.energy(y)

    def forward(self, x, beta=1.):
        return self.per_row(x, beta).mean()


def build_model(config, input_dims):
    torch.manual_seed(config.seed)
    residual = None if config.residual == 'none' else config.residual
    return BNAF(*input_dims, config.n_flows, config.n_hidden, config.hidden_dim, residual, config.checkpoint_grads)


# -------------------------------------------------------------------------------------- processes, checkpoints

@dataclass(frozen=True)
class Process:
    """This process among those of the launcher."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


@contextlib.contextmanager
def setup():
    """Join the process group of torchrun or torch.distributed.launch, if one started us: NCCL on GPUs, else Gloo."""
    rank, local_rank, world_size, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_WORLD_SIZE', 1)))
    device = torch.device('cpu')
    if torch.cuda.is_available():
        if local_world_size > torch.cuda.device_count():
            raise UserError(f'{local_world_size} processes on a machine of {torch.cuda.device_count()} GPUs: '
                            'lower --nproc_per_node')
        device = torch.device('cuda', local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=timedelta(hours=2))
    try:
        yield Process(rank, world_size, device)
    finally:
        if world_size > 1:
            time.sleep(0.1)     # torch 2.4 hangs in the next line while Gloo's thread still frees its last tensor
            dist.destroy_process_group()


def distribute(objective):
    """-> the objective, its gradients averaged over all processes; its buffers never change and are not sent"""
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'   # until torch 2.12
    return DistributedDataParallel(objective, gradient_as_bucket_view=True, **{sync_buffers: False})


def of_main_process(function, process):
    """-> what function() gives on the main process, on every process"""
    values = [function() if process.is_main else None]
    if process.world_size > 1:
        dist.broadcast_object_list(values)
    return values[0]


def newest_checkpoint(output_dir):
    """-> path of the newest run's best.pt under output_dir, or of its checkpoint.pt where there is no best.pt yet"""
    found = list(Path(output_dir).glob(f'{NAME}_*/checkpoint.pt'))
    if not found:
        raise UserError(f'no checkpoint of {NAME}.py under {output_dir}: train first (python {NAME}.py --train), '
                        'or give --restore_file or --output_dir')
    newest = max(found, key=lambda path: path.stat().st_mtime)
    best = newest.with_name('best.pt')
    return best if best.exists() else newest


def load_checkpoint(path):
    """-> the checkpoint's dict, its config a Config. Only tensors and plain values are read, never a pickled object."""
    if not Path(path).is_file():
        raise UserError(f'{path}: no such checkpoint')
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:      # a damaged file fails in too many ways to list
        raise UserError(f'{path} cannot be read as a checkpoint: it is truncated, damaged or holds more than tensors '
                        f'and plain values ({type(error).__name__})') from None
    if not isinstance(saved, dict) or saved.get('script') != f'{NAME}.py':
        raise UserError(f'{path} is not a checkpoint of {NAME}.py')
    if not is_sound(saved):
        raise UserError(f'{path} is a checkpoint of {NAME}.py, but of another version or damaged')
    return {**saved, 'config': Config(**saved['config']), 'path': path}


def is_sound(saved):
    """Whether a checkpoint has all its parts, each of its kind, and options within their bounds"""
    config, dims = saved.get('config'), saved.get('input_dims')
    return (all(isinstance(saved.get(key), kind) for key, kind in CHECKPOINT.items())
            and config.keys() == {f.name for f in fields(Config)}
            and all(type(config[f.name]) is f.type for f in fields(Config))
            and all(f.metadata['low'] <= config[f.name] <= f.metadata['high'] for f in fields(Config) if f.type is not str)
            and len(dims) == N_DIMS and all(type(n) is int and 0 < n < 2**16 for n in dims) and math.prod(dims) < 2**24)


def load_state(into, saved, key):
    try:
        into.load_state_dict(saved[key])
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise UserError(f'{saved["path"]}: its {key} and its options do not fit ({str(error).splitlines()[0]})') from None


def restore_model(saved, device):
    """-> the model with the averaged weights of a checkpoint, ready to evaluate and to sample"""
    average = AveragedModel(build_model(saved['config'], saved['input_dims']))
    load_state(average, saved, 'average')
    return average.module.to(device).eval()


def check_resume(path, saved, process):
    """Refuses what would overwrite a later state of the run; says what other processes change"""
    newest = path.with_name('checkpoint.pt')
    if path.name != newest.name and newest.exists() and load_checkpoint(newest)['step'] > saved['step']:
        raise UserError(f'{newest} is at a later step than {path} and would be overwritten: go on from it, or copy '
                        f'{path.name} to a folder of its own')
    if process.is_main and saved['world_size'] != process.world_size:
        print(f'note: the run had {saved["world_size"]} processes and now has {process.world_size}: the batch of a step, '
              'and how many steps make an epoch, change with them')


# ------------------------------------------------------------------------------------------------------ data

def training_batch(data, config, step, process):
    """-> this process's rows of a step, as indices or, where each step draws new ones, themselves: a function of (seed,
    step, rank), so that a resumed run goes on exactly as an unbroken one."""
    if data.draw:
        return data.draw(np.random.default_rng((config.seed, step, process.rank)), config.batch_size)
    return batch_index(len(data.train), config.batch_size, config.seed, step, process.rank, process.world_size)


@torch.no_grad()
def row_losses(objective, rows, device):
    """-> the objective of each row (N, D), in float64 (N,)"""
    losses = [torch.zeros(0, dtype=torch.float64, device=device)]           # a process may have no rows at all
    for i in range(0, len(rows), 10_000):
        losses.append(objective.per_row(torch.from_numpy(np.array(rows[i:i + 10_000])).to(device)).double())
    return torch.cat(losses)


def mean_loss(objective, rows, process):
    """-> mean of the objective over all the rows, and two standard errors, by all processes together"""
    losses = row_losses(objective, rows[process.rank::process.world_size], process.device)
    sums = torch.stack([losses.sum(), losses.square().sum()])
    if process.world_size > 1:
        dist.all_reduce(sums)
    mean, mean_square = (sums / len(rows)).tolist()
    return mean, 2 * math.sqrt(max(0, mean_square - mean**2) / len(rows))


# -------------------------------------------------------------------------------------------------- training

class Training:
    """What a run carries from step to step: weights, their average, the optimizer, and where it stands."""
    def __init__(self, config, data, process, saved=None):
        self.config, self.data, self.process = config, data, process
        self.input_dims = [len(data.columns)]
        self.model = build_model(config, self.input_dims).to(process.device)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, amsgrad=True, fused=True)
        self.scheduler = ReduceLROnPlateau(self.optimizer, factor=0.5, patience=config.lr_patience, cooldown=10,
                                           min_lr=config.min_lr, threshold=1e-4, threshold_mode='abs')
        self.step, self.loss, self.best, self.best_step = 0, math.nan, math.inf, 0
        self.steps_per_epoch = EPOCH_STEPS if data.draw else steps_per_epoch(
            len(data.train), config.batch_size, process.world_size)
        self.n_steps = config.n_epochs * self.steps_per_epoch
        self.n_annealing = config.annealing * self.n_steps          # as planned at first, however long it goes on
        if saved is not None:
            for name in ('step', 'loss', 'best', 'best_step', 'n_annealing'):
                setattr(self, name, saved[name])
            for name in ('model', 'average', 'optimizer', 'scheduler'):
                load_state(getattr(self, name), saved, name)
        self.objective = Objective(self.model, data)
        if process.world_size > 1:
            self.objective = distribute(self.objective)
        self.rows = None if data.draw else torch.from_numpy(np.array(data.train)).to(process.device)

    @property
    def is_over(self):
        return (self.step >= self.n_steps or
                self.step - self.best_step >= self.config.early_stop * self.steps_per_epoch)

    def take_step(self):
        """-> loss and gradient norm of one step, as tensors"""
        n_warmup = self.config.n_epochs_warmup * self.steps_per_epoch
        if self.step < n_warmup:
            self.optimizer.param_groups[0]['lr'] = self.config.lr * min(1., (self.step + 1) / n_warmup)
        batch = torch.from_numpy(training_batch(self.data, self.config, self.step, self.process)).to(self.process.device)
        # an energy is turned on little by little, lest the flow settles in one of its valleys
        beta = min(1., 0.01 + self.step / max(1., self.n_annealing))
        loss = self.objective(batch if self.rows is None else self.rows[batch], beta)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm_clip)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return loss.detach(), norm

    def save(self, path):
        units = {'columns': list(self.data.columns), 'mean': self.data.mean.tolist(), 'std': self.data.std.tolist(),
                 'steps': np.broadcast_to(self.data.steps, len(self.data.columns)).tolist()}
        state = {'script': f'{NAME}.py', 'config': asdict(self.config), 'input_dims': self.input_dims, 'units': units,
                 'world_size': self.process.world_size}
        state.update({name: getattr(self, name) for name in ('step', 'n_annealing', 'loss', 'best', 'best_step')})
        state.update({name: getattr(self, name).state_dict() for name in ('model', 'average', 'optimizer', 'scheduler')})
        write_atomically(path, lambda temporary: torch.save(state, temporary))


def validate(run, run_dir, writer):
    """The objective on the validation split with the averaged weights, the learning rate, and the checkpoints."""
    run.loss, _ = mean_loss(Objective(run.average.module, run.data), run.data.validation, run.process)
    require_finite(run.loss, run, run_dir)
    run.scheduler.step(run.loss)
    is_best = run.loss < run.best
    if is_best:
        run.best, run.best_step = run.loss, run.step
    if run.process.is_main:
        writer.add_scalar('loss/validation', run.loss, run.step)
        if is_best:
            run.save(run_dir / 'best.pt')
        run.save(run_dir / 'checkpoint.pt')


def progress(*args, **options):
    """tqdm, seldom updated where its output goes to a file"""
    return tqdm(*args, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15, **options)


def require_finite(value, run, run_dir):
    if not math.isfinite(value):
        raise UserError(f'training diverged by step {run.step}: the loss or gradients are not finite; lower --lr, or go on '
                        f'from a checkpoint before it, if there is one in {run_dir}')


def train(data, config, process, run_dir, saved=None):
    """Train until config.n_epochs or until the validation split gets no better; leaves checkpoint.pt and best.pt"""
    run = Training(config, data, process, saved)
    if not (run_dir / 'best.pt').exists():
        run.best = math.inf
    writer = SummaryWriter(str(run_dir), write_to_disk=process.is_main)
    per_step = config.batch_size * process.world_size
    if process.is_main:
        print(f'{sum(p.numel() for p in run.model.parameters()):,} parameters, at most {run.n_steps:,} steps')
    with progress(total=run.n_steps, initial=run.step, disable=not process.is_main, unit='step') as bar:
        start, start_step = time.perf_counter(), run.step
        while not run.is_over:
            loss, norm = run.take_step()
            bar.update()
            if run.step % LOG_STEPS == 0:
                loss, norm = loss.item(), norm.item()
                require_finite(loss + norm, run, run_dir)
                speed = (run.step - start_step) * per_step / (time.perf_counter() - start)
                validation = f'validation {objective_text(data, run.loss)}, ' if math.isfinite(run.loss) else ''
                bar.set_postfix_str(f'loss {loss:.3f}, {validation}{speed:.0f} rows/s', refresh=False)
                for name, value in (('loss/train', loss), ('gradient_norm', norm), ('rows_per_s', speed),
                                    ('lr', run.optimizer.param_groups[0]['lr'])):
                    writer.add_scalar(name, value, run.step)
            if run.step % run.steps_per_epoch == 0:
                validate(run, run_dir, writer)
            elif run.step % SAVE_STEPS == 0 and process.is_main:
                run.save(run_dir / 'checkpoint.pt')
    writer.close()
    if process.is_main:
        tqdm.write(f'step {run.step}: best validation {objective_text(data, run.best)} at step {run.best_step}')
    if process.world_size > 1:
        dist.barrier()          # the others read best.pt next


def objective_text(data, loss):
    return f'{-loss:.3f} nats' if data.energy is None else f'KL {loss:.4f} nats'


# ----------------------------------------------------------------------------------------------------- modes

def evaluate(model, data, saved, path, config, process, scores, input_file):
    """Log-likelihood of the test split, or the KL divergence to an energy: printed, and kept as results.json beside the
    checkpoint. scores: a file that gets the log-likelihood of every row of the test split or of input_file."""
    if data.energy and (scores or input_file):
        raise UserError('--scores and --input are for models of data; --generate gives the log-density of each sample')
    objective = Objective(model, data)
    rows = read_rows(input_file, data) if input_file else data.test
    mean, error = mean_loss(objective, rows, process)
    if not process.is_main:
        return
    name = str(input_file) if input_file else f'{Path(config.dataset).name} test'
    about = {'dataset': name, 'n_rows': len(rows), 'two_standard_errors': error, 'step': saved['step'],
             'checkpoint': path.name}
    if data.energy is None:
        results = {'log_likelihood_nats': -mean, **about}
        print(f'{name}: {-mean:.4f} ± {error:.4f} nats ({len(rows):,} rows, two standard errors)')
    else:
        log_w = -row_losses(objective, rows, process.device)
        ess = (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp().item() / len(rows)
        results = {'kl_nats': mean, 'effective_sample_size': ess, **about}
        print(f'{name}: KL(q || p) {mean:.4f} ± {error:.4f} nats, effective sample size {ess:.1%} '
              f'({len(rows):,} samples, two standard errors)')
    if not input_file:
        write_atomically(path.with_name('results.json'), lambda f: f.write_text(json.dumps(results, indent=2) + '\n'))
    if scores:
        log_p = -row_losses(objective, rows, process.device).cpu().numpy()
        index = np.arange(len(rows)) if input_file else data.test_index
        save_table(scores, np.stack([index, log_p], 1), ('row', 'log_likelihood'))


def save_table(path, values, columns):
    write_atomically(Path(path), lambda temporary: write_table(temporary, Path(path).suffix, values, columns))
    print(f'wrote {path}')


def directions(model, data):
    """-> push, from noise to rows, and pull, back: trained on data a flow is pulled, matched to an energy it is pushed"""
    return (model.inverse, model) if data.energy is None else (model, model.inverse)


@torch.no_grad()
def sample_rows(model, data, n, z_std, seed):
    """-> n rows in the data's own units (n, D), and log p of each; in float64, as the inverse is exact to 1e-10 there"""
    push, pull = directions(model.double(), data)
    start = time.perf_counter()
    x, log_p, n_lost = draw(push, n, len(data.columns), next(model.parameters()), z_std, seeded_generator('cpu', seed))
    print(f'{n:,} samples, {n / (time.perf_counter() - start):,.0f} a second; ' + (
        f'{n_lost:,} more draws lay beyond what the flow reaches; ' if n_lost else '') +
        f'round trip within {(push(pull(x[:1000])[0])[0] - x[:1000]).abs().max().item():.0e}')
    return x.cpu().numpy() * data.std + data.mean, log_p.cpu().numpy() - np.log(data.std).sum()


def generate(model, data, path, config, z_std, n_samples, output):
    """Samples in the data's own units with their log-likelihood, as a table."""
    x, log_p = sample_rows(model, data, n_samples, z_std, config.seed)
    save_table(output or path.with_name('generated_samples.csv'), np.column_stack([x, log_p]),
               [*data.columns, 'log_likelihood'])


@torch.no_grad()
def density(model, data, points):
    """p at points (N, D) in the data's own units; 0 where the flow does not reach"""
    _, pull = directions(model.double(), data)
    x = (torch.from_numpy(points) - torch.from_numpy(data.mean)) / torch.from_numpy(data.std)
    log_p = []
    for part in x.to(next(model.parameters()).device).split(10_000):
        z, logdet = pull(part)
        log_p.append(log_normal(z) + logdet)
    return torch.cat(log_p).exp().nan_to_num(0.).cpu().numpy() / data.std.prod()


def visualize(model, data, path, config, process, vis_dims):
    """Two variables: target, learned density and samples side by side; more: samples over data, in pairs."""
    mean, _ = mean_loss(Objective(model, data), data.test, Process(0, 1, process.device))     # this process alone draws
    title = f'{Path(config.dataset).stem}: {objective_text(data, mean)}'
    if len(data.columns) == 2:
        figure = planes(model, data, config, title)
    else:
        chosen = [data.column_index(text) for text in vis_dims] if vis_dims else list(range(min(8, len(data.columns))))
        rows = np.concatenate([part[:1500] for part in (data.test, data.validation, data.train)])[:1500]
        real = rows * data.std + data.mean
        drawn, _ = sample_rows(model, data, len(real), 1., config.seed)
        figure = draw_pairs(real[:, chosen], drawn[:, chosen], [data.columns[k] for k in chosen],
                            f'{title}; data below, samples above')
    picture = path.with_name('visualization.png')
    write_atomically(picture, lambda temporary: figure.savefig(temporary, format='png', dpi=120))
    print(f'wrote {picture}')


def planes(model, data, config, title, n=300):
    """Figure of the target, the learned density on an n x n grid, and samples"""
    samples, _ = sample_rows(model, data, 50_000, 1., config.seed)
    rows = data.draw(np.random.default_rng(0), 10**6) if data.draw else data.test * data.std + data.mean
    low, high = ((-4.2, -4.2), (4.2, 4.2)) if data.draw else (rows.min(0), rows.max(0))
    centres = [a + (np.arange(n) + 0.5) / n * (b - a) for a, b in zip(low, high)]
    points = np.stack(np.meshgrid(*centres), 2).reshape(-1, 2)

    def histogram(rows, bins):
        return np.histogram2d(*rows.T, bins, tuple(zip(low, high)))[0].T

    if data.energy is None:
        target = histogram(rows, 200 if data.draw else 40)
    else:
        target = (-data.energy(torch.from_numpy(points))).exp().numpy().reshape(n, n)
    panels = {'target' if data.draw else 'test data': target, title: density(model, data, points).reshape(n, n),
              'samples': histogram(samples, 120)}
    return draw_planes(panels, data.columns, (low[0], high[0], low[1], high[1]))


# ------------------------------------------------------------------------------------------------------ main

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f'{message} (see python {NAME}.py --help)')


def number(kind, low=0, high=math.inf):
    """-> argparse type: a finite number of that kind between low and high"""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f'{text} is outside {low}..{high}')
        return value
    parse.__name__ = kind.__name__
    return parse


def parse_args(argv):
    parser = Parser(prog=f'{NAME}.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    group = parser.add_argument_group('mode, one of')
    mode = group.add_mutually_exclusive_group(required=True)
    for name, text in (('train', 'train a new model, or go on with --restore_file'),
                       ('evaluate', 'log-likelihood of the test split, or KL to an energy'),
                       ('generate', 'draw samples'), ('visualize', 'draw what was learned beside the data')):
        mode.add_argument(f'--{name}', action='store_true', help=text)

    groups = {f.metadata['group']: parser.add_argument_group(f'{f.metadata["group"]} (a checkpoint knows its own)')
              for f in fields(Config)}
    for f in fields(Config):
        how = dict(action='store_true', default=None) if f.type is bool else dict(
            metavar='X', type=str if f.type is str else number(f.type, f.metadata['low'], f.metadata['high']))
        groups[f.metadata['group']].add_argument(f'--{f.name}', help=f.metadata['help'], **how)

    group = parser.add_argument_group('processes (torchrun or torch.distributed.launch start them), output')
    group.add_argument('--distributed', action='store_true', help='accepted, but the launcher decides')
    group.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)
    group.add_argument('--output_dir', default='results', metavar='DIR', help='a run gets a folder of its own in it')
    group.add_argument('--restore_file', metavar='FILE', help='a checkpoint (default: of the newest run)')
    group.add_argument('--scores', metavar='FILE', help='write the log-likelihood of each row of the test split')
    group.add_argument('--input', metavar='FILE', help='evaluate the rows of this table instead of the test split')
    group.add_argument('--z_std', type=number(float), default=1., metavar='T', help='temperature of samples')
    group.add_argument('--n_samples', type=number(int, 1), default=1000, metavar='N', help='how many')
    group.add_argument('--output', metavar='FILE', help='where to, .csv, .npy or .h5 (default: beside the checkpoint)')
    group.add_argument('--inverse_tol', type=number(float, 1e-14), metavar='X', help='largest error of the inverse')
    group.add_argument('--vis_dims', nargs='+', metavar='C', help='columns to draw, by index or name (default: first 8)')

    args = parser.parse_args(argv)
    if args.vis_dims:
        args.vis_dims = [word.strip() for words in args.vis_dims for word in words.split(',') if word.strip()]
    for file in filter(None, (args.scores, args.output)):
        if Path(file).suffix not in ('.csv', '.npy', '.h5'):
            parser.error(f'{file} should end in .csv, .npy or .h5')
        if Path(file).exists():
            parser.error(f'{file} is there already: move it away or give another name')
    return args


def choose_config(args, saved, path):
    """The options that were given over those of the checkpoint or, without one, over the defaults."""
    given = {f.name: getattr(args, f.name) for f in fields(Config) if getattr(args, f.name) is not None}
    for name in ('dataset', 'test_file'):               # tables are found from wherever the model is used
        if Path(given.get(name, '')).suffix in SUFFIXES:
            given[name] = str(Path(given[name]).resolve())
    if saved is None:
        name = given.get('dataset', Config.dataset)
        config = Config(**{**(TOY if name in SAMPLERS or name in ENERGIES else {}), **given})
        if config.residual not in RESIDUALS:
            raise UserError(f'--residual={config.residual}: it is one of {", ".join(RESIDUALS)}')
        return config
    for name in given.keys() - MAY_CHANGE[args.train]:
        if given[name] != getattr(saved['config'], name):
            raise UserError(f'--{name}={given[name]} contradicts the checkpoint {path}, '
                            f'which has {name}={getattr(saved["config"], name)}')
    return Config(**{**asdict(saved['config']), **given})


def load_data(args, config, saved):
    """-> Rows; in a checkpoint's units, and without any rows where only those are needed"""
    units = saved and {'columns': tuple(saved['units']['columns']),
                       **{key: np.array(saved['units'][key]) for key in ('mean', 'std', 'steps')}}
    if units and config.dataset not in (*SAMPLERS, *ENERGIES) and (args.generate or args.evaluate and args.input):
        return Rows(None, None, None, **units)
    seed = saved['config'].seed if saved else config.seed       # the splits are those of the training
    data = load_rows(config.dataset, config.data_dir, seed, config.test_file, config.dequantize)
    if units and not (data.columns == units['columns'] and np.allclose(data.mean, units['mean'])
                      and np.allclose(data.std, units['std'])):
        raise UserError(f'{config.dataset} is not what it was when the model was trained: '
                        'score new rows by --evaluate --input=FILE')
    return data


def start(args, process):
    saved, path = None, None
    if args.restore_file or not args.train:
        path = Path(args.restore_file) if args.restore_file else newest_checkpoint(args.output_dir)
        saved = load_checkpoint(path)
        if process.is_main:
            print(f'restored {path}: step {saved["step"]}, validation loss {saved["loss"]:.4f} nats')
    config = choose_config(args, saved, path)
    data = load_data(args, config, saved)
    if args.train:
        if path:
            check_resume(path, saved, process)
        for note in data.notes if process.is_main else ():
            print(f'note: {note}')
        name = f'{NAME}_{Path(config.dataset).stem}_{time.strftime("%Y-%m-%d_%H-%M-%S")}'
        run_dir = path.parent if path else of_main_process(lambda: new_folder(Path(args.output_dir) / name), process)
        if process.is_main:
            print(f'{run_dir}: ' + ' '.join(f'{name}={value}' for name, value in asdict(config).items()))
        train(data, config, process, run_dir, saved)
        path = run_dir / 'best.pt'
        saved = load_checkpoint(path)
    model = restore_model(saved, process.device)
    for flow in model:
        flow.inverse_tol = args.inverse_tol
    if args.train or args.evaluate:
        evaluate(model, data, saved, path, config, process, args.scores, args.input)
        if process.is_main and args.train:
            print(f'the model is {path}')
    elif process.is_main and args.generate:
        generate(model, data, path, config, args.z_std, args.n_samples, args.output)
    elif process.is_main:
        visualize(model, data, path, config, process, args.vis_dims)


def main(argv=None):
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        with setup() as process:
            start(args, process)
    except (UserError, OSError) as error:
        common, message = isinstance(error, UserError), str(error)      # common to all processes
    except torch.cuda.OutOfMemoryError:
        common, message = False, 'out of GPU memory: lower --batch_size, --width or --depth, or add --checkpoint_grads'
    except KeyboardInterrupt:
        common, message = True, 'interrupted; training goes on by --train --restore_file=RUN/checkpoint.pt'
    else:
        return
    if not common or int(os.environ.get('LOCAL_RANK', 0)) == 0:     # what is common is said once a machine
        print(f'{NAME}.py: error: {message}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
    main()
