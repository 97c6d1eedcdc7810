"""Block Neural Autoregressive Flow (De Cao, Titov & Aziz, 2019), with a numerical inverse.

    python bnaf.py --train                         eight Gaussians, a minute or two on a CPU core
    python bnaf.py --evaluate                      log-likelihood of the newest model's test split
    python bnaf.py --generate --n_samples=1000     samples in the data's own units
    python bnaf.py --visualize                     what was learned beside the data
    python bnaf.py --train --dataset=u2            density matching: from an energy, without data
    python bnaf.py --train --dataset=my.csv        a table of your own
    python bnaf.py --train --dataset=my.csv --condition=age,sex      the others, given these columns
    python bnaf.py --generate --given=age=40,sex=1                   samples given these values
    python bnaf.py --evaluate --scores=FILE --explain                anomalies, and their causes

    BNAFDensity().fit(X).score_samples(X)          from Python, as a scikit-learn estimator

Notation: sec. and eq. refer to the paper, arXiv 1904.04676. Rows are (B, D).
Every bijection has one protocol: ``forward(x) -> (z, logdet)`` and ``inverse(z) -> (x, logdet)``.
``logdet``, of shape (B,), is the logarithm of the absolute determinant of the Jacobian of the
direction that was called, in nats.

A conditional density p(x | c) takes the context c, (B, C), as a second argument in both directions.

The layers inside a flow hold d blocks of a units each, (d a, B), one block per variable, with the
features first. Beside them they carry j (d, a, B), the derivative of each unit with respect to its
block's own variable.
"""

if __name__ == '__main__':
    from common.interrupt import exit_on_interrupt

    exit_on_interrupt()  # the imports below take seconds

import contextlib
import copy
import dataclasses
import io
import math
import numbers
import os
import re
import shlex
import sys
import threading
import time
import warnings
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
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common.averages import MovingAverage
from common.batches import Stream, batch_indices, seed_sequence, seeded_generator
from common.checkpoints import CheckpointFormat, batch_of_all_processes, is_same, require_entries
from common.devices import collect_gradients, scales_gradients, to_device
from common.errors import UserError, exit_on_user_error, report_error
from common.files import write_atomically, write_json
from common.graphs import CapturedStep, can_capture
from common.logs import TrainingLog, progress_bar
from common.options import CommandLine, Options, RunRequest, option, resolve_config
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
from datasets.anomalies import (
    cause_columns,
    lowest_rows,
    print_causes,
    score_columns,
    score_quantiles,
)
from datasets.baseline import gaussian_log_prob
from datasets.cache import cache_beside_data
from datasets.columns import parse_given, repeat_conditions
from datasets.inputs import condition_frame, input_frame
from datasets.learned import draw_learned
from datasets.own_tables import (
    frame_of_columns,
    is_own_table,
    is_unnamed,
    require_h5_names,
    require_new_table,
    require_numbers,
    save_table,
)
from datasets.plots import save_figure
from datasets.tabular import (
    TABLES,
    TableData,
    frame_of_rows,
    load_run_table,
    read_rows,
    require_known_table,
    rows_of_frame,
    table_from_frame,
    table_from_units,
    table_units,
)
from datasets.toy import ENERGIES, SAMPLERS

# ------------------------------------------------------------------------------------------ config

NAME = 'bnaf'
ITEMS = 'rows'
RESIDUALS = {'none': None, 'normal': 'normal', 'gated': 'gated'}
EPOCH_BATCHES = 100  # of data that is drawn anew at each step
SAVE_SECONDS = 600.0  # between checkpoints, besides those at each validation
LOG_STEPS = 20
ROWS_AT_ONCE = 10_000  # outside training


@dataclass
class Config(Options):
    """Options of a run. A checkpoint keeps them, to rebuild the model from."""

    dataset: str = option(
        'data',
        '8gaussians',
        ', '.join([*SAMPLERS, *ENERGIES, *TABLES]) + ', or a .csv, .tsv, .npy, .h5 or .parquet',
    )
    data_dir: str = option('data', 'data', 'where the data is')
    test_file: str = option(
        'data', '', 'a table that is the test split of your own one (default: a tenth of its rows)'
    )
    max_rows: int = option(
        'data', 0, 'train on so many rows of the training split, the first ones; 0: on all'
    )
    columns: list = option(
        'data',
        None,
        'columns of your own table to use: names, indices from 0, ranges like 2-5 (default: all)',
    )
    drop: list = option('data', None, 'columns to leave out, named likewise')
    condition: list = option(
        'data',
        None,
        'columns that the density of the others is given, numbers or categories, named likewise',
    )
    dequantize: bool = option(
        'data', False, 'spread the discrete columns of your own table by uniform noise'
    )
    n_flows: int = option(
        'model', 5, 'flows, with the variables flipped between them', low=1, high=2**8
    )
    n_hidden: int = option('model', 1, 'inner layers of a flow, hidden to hidden', high=2**6)
    hidden_dim: int = option('model', 10, 'hidden units per variable', low=1, high=2**12)
    residual: str = option(
        'model',
        'gated',
        'of all flows but the last: ' + ', '.join(RESIDUALS),
        choices=tuple(RESIDUALS),
    )
    last_residual: str = option(
        'model',
        'none',
        'of the last flow, one of these: without it, noise beyond some range has no row',
        choices=tuple(RESIDUALS),
    )
    checkpoint_grads: bool = option(
        'optimization', False, 'less memory, slower: the backward pass recomputes activations'
    )
    no_cuda_graph: bool = option(
        'optimization', False, 'launch the kernels of a step one by one, on a single GPU too'
    )
    n_epochs: int = option(
        'optimization', 1000, 'epochs, at most; of 100 batches where each is drawn anew', low=1
    )
    n_epochs_warmup: float = option(
        'optimization', 0.0, 'epochs over which the learning rate rises linearly from 0'
    )
    batch_size: int = option('optimization', 200, 'rows per process', low=1, high=2**20)
    lr: float = option('optimization', 1e-2, "Adam's learning rate", high=1e6)
    lr_patience: int = option(
        'optimization', 20, 'epochs without a better validation score before the rate is halved'
    )
    min_lr: float = option('optimization', 5e-4, 'lower bound of the rate when it is halved')
    annealing: float = option(
        'optimization', 0.5, 'first fraction of training over which an energy is turned on', high=1
    )
    early_stop: int = option(
        'optimization', 100, 'epochs without a better validation score that end training', low=1
    )
    grad_norm_clip: float = option('optimization', 0.1, 'gradients are clipped at this norm')
    ema_decay: float = option(
        'optimization',
        0.998,
        'Polyak average of the weights, which all but training uses; 0 turns it off',
        high=1,
    )
    seed: int = option(
        'optimization', 0, 'of initialization, splits, shuffling, noise, samples', high=2**63 - 1
    )


@dataclass
class Request(RunRequest):
    """Options of one call, which a checkpoint does not keep."""

    scores: str = option(
        'output',
        '',
        'write the log-likelihood of each row of the test split, or of --input, to this file',
    )
    input: str = option('output', '', 'evaluate the rows of this table instead of the test split')
    explain: bool = option(
        'output', False, 'name the columns that make the least likely rows so, also in --scores'
    )
    overwrite: bool = option('output', False, 'replace the file of --scores or --output')
    z_std: float = option('output', 1.0, 'temperature of samples')
    n_samples: int = option(
        'output', 1000, 'how many; with conditions, for each row of them', low=1, high=10**9
    )
    given: str = option(
        'output',
        '',
        'the conditions: age=40,sex=1, or a table with a row for each combination',
    )
    output: str = option(
        'output', '', 'where samples go, .csv, .npy or .h5 (default: beside the checkpoint)'
    )
    inverse_tol: float = option(
        'output', None, 'tolerance of each root search of the inverse', low=1e-14
    )
    vis_dims: list = option(
        'output', None, 'columns to draw, by index or name (default: the first 8)'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for file in (self.scores, self.output):
            if file:
                require_new_table(Path(file), self.overwrite)
        if self.explain and self.scores and not self.scores.endswith('.csv'):
            raise UserError('--explain names columns: --scores should end in .csv')


MODES = {
    'train': 'train a new model, or go on with --resume or --restore_file',
    'evaluate': 'log-likelihood of the test split, or KL divergence to an energy',
    'generate': 'draw samples',
    'visualize': 'draw what was learned beside the data',
    'check': 'error of the inverse on the test split, and the flow it comes from',
}
# Options that may differ from machine to machine
PATHS = ('data_dir', 'output_dir', 'restore_file', 'input', 'scores', 'output')
# Training without a checkpoint takes all options of Config as well
TABLE_PATHS = {'dataset', 'test_file'}  # they may only change from one own table to another
MODE_OPTIONS = {
    'train': {'data_dir', *TABLE_PATHS, 'checkpoint_grads', 'no_cuda_graph', 'n_epochs'}
    | {'early_stop', 'resume', 'max_skips', 'detect_anomaly', 'scores', 'explain', 'overwrite'},
    'evaluate': {'data_dir', *TABLE_PATHS, 'input', 'scores', 'explain', 'overwrite'},
    'generate': {'data_dir', *TABLE_PATHS, 'seed', 'z_std', 'given'}
    | {'n_samples', 'output', 'overwrite', 'inverse_tol'},
    'visualize': {'data_dir', *TABLE_PATHS, 'seed', 'inverse_tol', 'vis_dims', 'given'},
    'check': {'data_dir', *TABLE_PATHS, 'inverse_tol'},
}
# The defaults above are those of the official code for tables, but for n_hidden (0 there). These
# are its defaults for problems in the plane.
TOY = dict(
    n_flows=1,
    n_hidden=2,
    hidden_dim=50,
    n_epochs=200,
    n_epochs_warmup=1.0,
    lr=0.1,
    early_stop=200,
)
# Hidden units per column of the published tables. They and the one inner layer are not in the
# official code, but recovered from the ratios of parameters in table 2 of the paper.
PUBLISHED = dict(power=40, gas=40, hepmass=20, miniboone=5, bsds300=20)
DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys((*SAMPLERS, *ENERGIES), TOY),
    **{name: dict(hidden_dim=hidden_dim) for name, hidden_dim in PUBLISHED.items()},
}
# Those of your own tables, found by benchmarks/defaults.py: of all, and by the number of training
# rows, where the first limit that is above it counts.
OWN_TABLES = dict(last_residual='gated', n_hidden=0, lr=0.02, lr_patience=5, early_stop=20)
BY_ROWS: dict[float, dict[str, Any]] = {
    1_000: dict(hidden_dim=10, batch_size=20),
    20_000: dict(hidden_dim=20, batch_size=100),
    math.inf: dict(hidden_dim=20, batch_size=200),
}
TABLE_OPTIONS = (*OWN_TABLES, *BY_ROWS[math.inf])


def own_table_defaults(n_rows: int) -> dict[str, Any]:
    """Return the defaults of a table of the user's own that has so many training rows."""
    by_rows = next(defaults for limit, defaults in BY_ROWS.items() if n_rows < limit)
    return {**OWN_TABLES, **by_rows}


def with_table_defaults(config: Config, options: dict[str, Any], n_rows: int) -> Config:
    """Return a config with the defaults of a table of the user's own for what is not given.

    Arguments:
        config: the options of a training.
        options: those of them that were given.
        n_rows: the number of training rows.
    """
    defaults = own_table_defaults(n_rows)
    missing = {name: value for name, value in defaults.items() if name not in options}
    return replace(config, **missing)


# ------------------------------------------------------------------------------------------ layers

REACH = 5.0  # of f in the last flow at first, in standard deviations of the noise
GATE_OF_LAST, GATE_OF_OTHERS = 1.0, -1.0  # at first, where the last flow has a residual, too
FARTHEST = 1e6  # in standardised units: where the inverse gives up looking for a root
ROUGH_TOL = 1e-4  # in the same units: of the inverse's search in float32
ROUGH_STEPS = 15  # of this search, at most
GROUP = 8  # variables for which the inverse adds up at once what those before them contribute


class MaskedLinear(nn.Module):
    """Weight-normalised linear map of d blocks of a units to d blocks of b units (eq. 8).

    The matrix W is block lower triangular, and its blocks on the diagonal are positive: block i of
    the output grows with block i of the input, and depends on earlier blocks besides. Its rows are
    exp(log_g) v / |v|, where v is ``weight`` below the diagonal and exp(``weight``) on it. What
    ``weight`` holds above the diagonal is not used.
    """

    def __init__(self, d: int, a: int, b: int) -> None:
        super().__init__()
        # Xavier's bound; block row i has i blocks of a inputs that are not zero
        bound = (6 / (a * torch.arange(1.0, d + 1) + b)).sqrt()
        diagonal = torch.empty(d, b, a).uniform_(-1, 1)
        weight = torch.empty(d * b, d * a).uniform_(-1, 1)
        diagonal_blocks(weight, d).copy_(diagonal)
        g = 1 - torch.rand(d * b, 1)  # in (0, 1], so that its logarithm is finite
        bias = torch.empty(d * b).uniform_(-1, 1)

        mask = torch.ones(d, d).tril().repeat_interleave(b, 0).repeat_interleave(a, 1)
        self.weight = nn.Parameter(bound.repeat_interleave(b)[:, None] * weight * mask)
        self.log_g = nn.Parameter(g.log())
        self.bias = nn.Parameter(bias / math.sqrt(d * b))
        self.register_buffer('mask', mask, persistent=False)
        self.d, self.n_masked = d, d * (d - 1) // 2 * a * b
        self.strips = cut_into_strips(d, a, b)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return W, of shape (d b, d a), and a view (d, b, a) of its blocks on the diagonal."""
        w = normalized(self.weight.to(dtype), self.log_g.to(dtype), self.mask, self.d)
        return w, diagonal_blocks(w, self.d)


def diagonal_blocks(matrix: Tensor, d: int) -> Tensor:
    """Return a view (d, b, a) of the d blocks on the diagonal of a matrix (d b, d a)."""
    rows, columns = matrix.shape
    blocks = matrix.view(d, rows // d, d, columns // d)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def normalized(weight: Tensor, log_g: Tensor, mask: Tensor, d: int) -> Tensor:
    """Return the matrix W of a ``MaskedLinear`` (eq. 8)."""
    v = weight * mask
    positive = diagonal_blocks(v, d).exp().permute(1, 2, 0)
    blocks = v.view(d, positive.shape[0], d, positive.shape[1])
    v = torch.diagonal_scatter(blocks, positive, dim1=0, dim2=2).view(v.shape)
    return log_g.exp() * v / v.norm(dim=1, keepdim=True)


def as_columns(bias: Tensor) -> Tensor:
    """Return the biases of a layer, (n,) or (n, B), as what is added to its units (n, B)."""
    return bias if bias.dim() == 2 else bias[:, None]


def plain_tanh(y: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tanh(y), its derivatives tanh'(y) j without their scale (eq. 10), and its log.

    The scale, constant as far as gradients go, is the largest derivative of each block. Without it
    nothing underflows that counts.
    """
    log_slope = 2 * (math.log(2) - torch.logaddexp(y, -y)).unflatten(0, (len(j), -1))
    tiny = torch.finfo(j.dtype).tiny
    log_scale = (log_slope + j.clamp_min(tiny).log()).detach().amax(1, keepdim=True)
    return y.tanh(), (log_slope - log_scale).exp() * j, log_scale


class BlockFlow(nn.Module):
    """One block neural autoregressive flow (sec. 3).

    z_i = f_i(x_1 ... x_i) is strictly increasing in x_i, so the Jacobian is lower triangular and
    log|det| = sum_i log dz_i / dx_i.

    Arguments:
        data_dim: the number of variables.
        n_hidden: inner layers, from hidden to hidden units.
        hidden_dim: hidden units per variable.
        residual: None for z = f(x); ``'normal'`` for z = f(x) + x; or ``'gated'`` for
            z = s f(x) + (1 - s) x with s = sigmoid(gate).
        checkpoint_grads: recompute activations in the backward pass.
        context_dim: the size of the context that the density is conditional on, 0 for none. Its
            linear map, which has no constraints, is added to what enters the first tanh.
    """

    inverse_tol = None  # in units of x; by default 1e-5 in float32 and 1e-10 in float64

    def __init__(
        self,
        data_dim: int,
        n_hidden: int,
        hidden_dim: int,
        residual: str | None = None,
        checkpoint_grads: bool = False,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.units = [1, *[hidden_dim] * (n_hidden + 1), 1]  # per variable
        layers = [MaskedLinear(data_dim, a, b) for a, b in zip(self.units, self.units[1:])]
        self.linears = nn.ModuleList(layers)
        self.residual, self.checkpoint_grads = residual, checkpoint_grads
        if residual is None:
            self.widen_range()
        if residual == 'gated':
            self.gate = nn.Parameter(torch.randn(()))
        if context_dim:
            # zero: at first, the density is the same for all contexts
            self.context_weight = nn.Parameter(torch.zeros(data_dim * hidden_dim, context_dim))

    @torch.no_grad()
    def widen_range(self) -> None:
        """Scale f so that its share of each output runs from about -``REACH`` to ``REACH``.

        It does so as its own variable goes from -inf to inf. A sum of tanhs is bounded, and without
        a residual what it does not reach cannot be sampled.
        """
        last = self.linears[-1]
        dtype = last.bias.dtype
        _, diagonal = last.weights(dtype)
        log_s: Tensor | float = 0.0
        if self.residual is not None:
            log_s, _ = self.log_shares(self.parameters_in(dtype))
        last.log_g.add_(math.log(REACH) - log_s - diagonal.sum(2).log())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # a density is never rounded
            parameters = self.parameters_in(x.dtype, context)
            if is_transformed():
                return self.plain_forward(x, *parameters)
            if self.checkpoint_grads and torch.is_grad_enabled():
                options = dict(use_reentrant=False, preserve_rng_state=False)
                return checkpoint(FastFlow.apply, self, x, *parameters, **options)
            return FastFlow.apply(self, x, *parameters)

    def parameters_in(
        self, dtype: torch.dtype, context: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the gate, if there is one, and the parameters of the layers, converted to a type.

        A context (B, C) moves the biases of the first layer, which become (d b, B).
        """
        gates = [self.gate] if self.residual == 'gated' else []
        parameters = [value.to(dtype) for value in (*gates, *self.linears.parameters())]
        if context is not None:
            first_bias = len(gates) + 2
            shift = self.context_weight.to(dtype) @ context.to(dtype).t()
            parameters[first_bias] = parameters[first_bias][:, None] + shift
        return tuple(parameters)

    def plain_forward(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and the log-determinant by the chain rule over blocks (eq. 9-11).

        The derivatives j of the units with respect to their block's own variable are positive.
        They are multiplied and added as they are, but for a scale per block, kept as its log.
        ``parameters`` are those of ``parameters_in``. ``FastFlow`` computes the same, faster.
        """
        u, j, log_scale = x.t(), x.new_ones(x.shape[1], 1, 1), 0.0
        for k, (weight, log_g, bias, mask) in enumerate(self.layers(parameters)):
            if k:
                u, j, log_taken = plain_tanh(u, j)
                log_scale = log_scale + log_taken
            w = normalized(weight, log_g, mask, len(j))
            u, j = w @ u + as_columns(bias), diagonal_blocks(w, len(j)) @ j

        tiny = torch.finfo(j.dtype).tiny  # a slope of zero gets a logarithm that is finite
        log_slope = (j.clamp_min(tiny).log() + log_scale).squeeze(1).t()
        y = u.t()
        if self.residual is None:
            return y, log_slope.sum(1)

        log_s, log_rest = self.log_shares(parameters)
        log_slope = torch.logaddexp(log_s + log_slope, log_rest)
        return log_s.exp() * y + log_rest.exp() * x, log_slope.sum(1)

    def layers(self, parameters: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Return the weight, log_g, bias and mask of each layer, given all parameters."""
        masks = [linear.mask.to(parameters[0].dtype) for linear in self.linears]
        first = len(parameters) - 3 * len(masks)  # the gate comes before the layers
        own = parameters[first:]
        return list(zip(own[::3], own[1::3], own[2::3], masks))

    def log_shares(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the logs of s and of 1 - s, the shares of f(x) and of x in z."""
        if self.residual == 'normal':
            zero = parameters[0].new_zeros(())
            return zero, zero
        gate, *_ = parameters
        return F.logsigmoid(gate), F.logsigmoid(-gate)

    def add_residual(self, y: Tensor, slope: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and its slope, given y = f(x) and the slope of f."""
        if self.residual is None:
            return y, slope
        s, rest = (log_share.exp() for log_share in self.log_shares(self.parameters_in(y.dtype)))
        return s * y + rest * x, s * slope + rest

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and the log-determinant, both NaN where ``inverse_tol`` is not reached.

        It is not reached where z is outside the range of a flow without a residual, which is
        bounded, nor where the slope is so small that the rounding error of z alone moves x by
        more. x is solved for in float64; its gradients are those of the implicit function
        theorem. Differentiating these again raises ``NotImplementedError``.
        """
        tol = self.inverse_tol or (1e-5 if z.dtype == torch.float32 else 1e-10)
        exact_z = z.detach().double()
        rounding = torch.finfo(z.dtype).eps / 2 * exact_z.abs()
        x, slope = solve_inverse(self, exact_z, rounding, tol, context)
        x, logdet = x.to(z.dtype), -slope.log().sum(1).to(z.dtype)

        # what was not found must not reach the gradients of the others
        found = x.isfinite().all(1, keepdim=True)
        x = torch.where(found, x, 0.0)
        if torch.is_grad_enabled():
            x = attach_gradients(self, x, torch.where(found, z, 0.0), context)
            logdet = -self(x, context)[1]
        return (
            torch.where(found, x, math.nan),
            torch.where(found.squeeze(1), logdet, math.nan),
        )


# --------------------------------------------------------------------------------- fast forward


class FastFlow(torch.autograd.Function):
    """What ``BlockFlow.plain_forward`` computes, and its gradients by hand.

    Small models spend their time on starting operations, larger ones on passes over memory. Here
    both are few: units are rows of a matrix, W is normalised in one pass, and products skip the
    zeros of W. A gradient that is to be differentiated again comes from the plain form.
    """

    @staticmethod
    def forward(ctx: Any, flow: BlockFlow, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        d = x.shape[1]
        u, j, log_scale = x.t(), None, 0.0
        saved: list[Tensor | None] = []
        for linear, (weight, log_g, bias, mask) in zip(flow.linears, flow.layers(parameters)):
            slope = None
            if j is not None:
                u, j, slope, log_taken = fast_tanh(u, j)
                log_scale = log_scale + log_taken
            w, v, g, norm = fast_normalized(weight, log_g, mask, d)
            saved += [u, j, slope, w, v, g, norm]

            u = product(w, u, bias, linear.strips)
            j = fast_blocks(w, d) if j is None else torch.bmm(fast_blocks(w, d), j)

        log_slope = j.clamp_min(torch.finfo(j.dtype).tiny).log_().add_(log_scale).squeeze(1)
        ctx.flow = flow
        if flow.residual is None:
            ctx.save_for_backward(x, j, *parameters, *saved)
            return u.t(), log_slope.sum(0)

        log_s, log_rest = flow.log_shares(parameters)
        s, rest = log_s.exp(), log_rest.exp()
        log_slope.add_(log_s)
        log_total = torch.logaddexp(log_slope, log_rest)
        share = log_slope.sub_(log_total).exp_()  # of f in the slope of z
        difference = u - x.t()
        ctx.save_for_backward(x, j, *parameters, *saved, s, rest, share, difference)
        return torch.addcmul(rest * x, s, u.t()), log_total.sum(0)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_logdet: Tensor) -> tuple[Tensor | None, ...]:
        flow, n_parameters = ctx.flow, len(ctx.needs_input_grad) - 2
        x, j, *others = ctx.saved_tensors
        parameters, saved = tuple(others[:n_parameters]), others[n_parameters:]
        if torch.is_grad_enabled():
            inputs = [x, *parameters]
            return None, *gradients_of(flow.plain_forward, inputs, (grad_z, grad_logdet))

        d, needs_x = x.shape[1], ctx.needs_input_grad[1]
        grad_u, grad_log_j, grad_gate = grad_z.t(), grad_logdet.expand(d, -1), []
        if flow.residual is not None:
            *saved, s, rest, share, difference = saved
            if flow.residual == 'gated':
                of_slope = (grad_log_j * (share - s)).sum()
                grad_gate = [of_slope + s * rest * (grad_u * difference).sum()]
            grad_u, grad_log_j = s * grad_u, grad_log_j * share
        grad_j = grad_log_j[:, None] / j.clamp_min(torch.finfo(j.dtype).tiny)

        gradients: list[Tensor] = []
        layers = list(zip(flow.linears, flow.layers(parameters)))
        for k, (linear, (*_, bias, mask)) in reversed(list(enumerate(layers))):
            u, j, slope, w, *of_weight_norm = saved[7 * k : 7 * k + 7]
            grad_bias = grad_u if bias.dim() == 2 else grad_u.sum(1)
            grad_w = outer_product(grad_u, u, mask, linear.strips)
            fast_blocks(grad_w, d).add_(grad_j if j is None else torch.bmm(grad_j, j.mT))
            of_weights = fast_normalized_gradients(grad_w, *of_weight_norm, d)
            gradients = [*of_weights, grad_bias, *gradients]

            if k or needs_x:
                grad_u = transposed_product(w, grad_u, linear.strips)
            if k:
                grad_j = torch.bmm(fast_blocks(w, d).mT, grad_j)
                grad_u, grad_j = fast_tanh_gradients(grad_u, grad_j, u, j, slope)
            if k == 1:
                grad_j = grad_j.sum(2, keepdim=True)  # the same j for all rows

        grad_x = None
        if needs_x:
            grad_x = grad_u.t()
            if flow.residual is not None:
                grad_x = torch.addcmul(grad_x, rest, grad_z)
        return None, grad_x, *grad_gate, *gradients


def fast_normalized(
    weight: Tensor, log_g: Tensor, mask: Tensor, d: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the W of a layer, and v, g and |v|, of which ``normalized`` makes it."""
    v, g = weight * mask, log_g.exp()
    fast_blocks(v, d).exp_()
    w, norm = torch._weight_norm_interface(v, g, 0)
    return w, v, g, norm


def fast_normalized_gradients(
    grad_w: Tensor, v: Tensor, g: Tensor, norm: Tensor, d: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a layer's ``weight`` and ``log_g``."""
    grad_v, grad_g = torch.ops.aten._weight_norm_interface_backward(grad_w, v, g, norm, 0)
    fast_blocks(grad_v, d).mul_(fast_blocks(v, d))
    return grad_v, grad_g.mul_(g)


def fast_tanh(y: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``plain_tanh`` does, with a scale of its own, and the slopes over that scale.

    With e = exp(-2 |y|), |tanh(y)| = (1 - e) / (1 + e) and tanh'(y) = 4 e / (1 + e)^2. The scale is
    4 times the largest e j of a block.
    """
    size = y.abs().view(len(j), len(y) // len(j), y.shape[1])
    smallest = size.amin(1, keepdim=True).mul_(2)
    e_of_largest = torch.sub(smallest, size, alpha=2, out=size).exp_()  # e over the largest e
    j_out = e_of_largest * j
    largest = j_out.amax(1, keepdim=True).clamp_min_(torch.finfo(j.dtype).tiny)

    e = e_of_largest * smallest.neg().exp_()
    r = (1 + e).reciprocal_()
    x = torch.rsub(e, 1).mul_(r).view(y.shape).copysign_(y)
    factor = r.mul_(r).div_(largest)
    log_scale = largest.log().sub_(smallest).add_(math.log(4))
    return x, j_out.mul_(factor), e_of_largest.mul_(factor), log_scale


def fast_tanh_gradients(
    grad_x: Tensor, grad_j: Tensor, x: Tensor, j: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of what ``fast_tanh`` takes, given those of what it returns, in place.

    The derivative of tanh is 1 - x^2, and that of its slope is -2 x times the slope.
    """
    half = (grad_j * j).view(x.shape).mul_(2).addcmul_(x, grad_x)
    return grad_x.addcmul_(half, x, value=-1), grad_j.mul_(slope)


def fast_blocks(matrix: Tensor, d: int) -> Tensor:
    """Return what ``diagonal_blocks`` does, in one operation."""
    rows, columns = matrix.shape
    b, a = rows // d, columns // d
    return matrix.as_strided((d, b, a), (b * columns + a, columns, 1))


Strips = list[tuple[slice, slice, slice]]
STRIP = 110  # rows of W worth a product of their own, which skips the zeros to the right of them


def cut_into_strips(d: int, a: int, b: int) -> Strips:
    """Cut the W (d b, d a) of a layer into strips of whole blocks of rows.

    Each is given by its rows, the columns that are not all zero in them, and the last of these,
    where the blocks on the diagonal are. A matrix that is not worth it is not cut: [].
    """
    n = min(d, d * min(a, b) // STRIP)
    edges = [round(k * d / n) for k in range(n + 1)] if n > 1 else []
    return [
        (slice(p * b, q * b), slice(q * a), slice(p * a, q * a)) for p, q in zip(edges, edges[1:])
    ]


def product(w: Tensor, x: Tensor, bias: Tensor, strips: Strips) -> Tensor:
    """Return W x + bias."""
    bias = as_columns(bias)
    if w.is_cuda or not strips:
        return torch.addmm(bias, w, x)
    y = x.new_empty(len(w), x.shape[1])
    for rows, columns, _ in strips:
        torch.addmm(bias[rows], w[rows, columns], x[columns], out=y[rows])
    return y


def transposed_product(w: Tensor, y: Tensor, strips: Strips) -> Tensor:
    """Return W^T y."""
    if w.is_cuda or not strips:
        return w.t() @ y
    *others, (rows, _, _) = strips
    x = w[rows].t() @ y[rows]
    for rows, columns, _ in others:
        x[columns].addmm_(w[rows, columns].t(), y[rows])
    return x


def outer_product(y: Tensor, x: Tensor, mask: Tensor, strips: Strips) -> Tensor:
    """Return y x^T, where the mask is 1."""
    if mask.is_cuda or not strips:
        return torch.mm(y, x.t()).mul_(mask)
    w = x.new_zeros(mask.shape)
    for rows, columns, corner in strips:
        torch.mm(y[rows], x[columns].t(), out=w[rows, columns])
        w[rows, corner] *= mask[rows, corner]
    return w


def gradients_of(
    function: Callable, inputs: list[Tensor], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs of a function, such that they can be differentiated."""
    with torch.enable_grad():
        outputs = function(*inputs)
    pairs = [(output, grad) for output, grad in zip(outputs, grads) if output.requires_grad]
    needed = [value for value in inputs if value.requires_grad]
    kept, grads_of_kept = zip(*pairs)
    gradients = iter(torch.autograd.grad(kept, needed, grads_of_kept, create_graph=True))
    return tuple(next(gradients) if value.requires_grad else None for value in inputs)


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@torch.no_grad()
def solve_inverse(
    flow: BlockFlow, z: Tensor, rounding: Tensor, tol: float, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return x (B, D) with flow(x) = z, NaN where it is not found within ``tol``, and dz_i / dx_i.

    ``rounding`` (B, D) bounds the rounding error of z. One variable after the other is solved
    for. Of each layer only the rows that belong to the new variable are computed. Everything is
    (D, B) in here, as products of so few units are several times as fast that way.
    """
    weights, biases = [], []
    for weight, log_g, bias, mask in flow.layers(flow.parameters_in(z.dtype, context)):
        weights.append(normalized(weight, log_g, mask, z.shape[1]))
        biases.append(as_columns(bias))

    # the last layer rounds as well: it adds up products with tanhs, which are at most 1
    largest_sum = weights[-1].abs().sum(1) + biases[-1].abs().squeeze(1)
    rounding = rounding + torch.finfo(z.dtype).eps * largest_sum

    # z = scale f(x) + rest x. Hidden units are halved in here, as tanh(x) / 2 = sigmoid(2 x) - 1/2
    # is several times as fast, and the factors are part of the weights
    one, zero = z.new_ones(1), z.new_zeros(1)
    scale, _ = flow.add_residual(one, zero, zero)
    rest, _ = flow.add_residual(zero, zero, one)
    layers = []
    for k, (weight, bias) in enumerate(zip(weights, biases)):
        of_output = scale if k == len(weights) - 1 else 2.0
        of_input = 2.0 if k else 1.0
        layers.append(LayerOfInverse(of_output * of_input * weight, of_output * bias, z))

    x, slopes = torch.empty_like(z.T), torch.empty_like(z.T)
    for i, (target, bound) in enumerate(zip(z.T.contiguous(), rounding.T)):
        blocks = [layer.block(i) for layer in layers]
        u, slopes[i], units = solve_variable(blocks, rest, target, tol)
        x[i] = torch.where(bound <= tol * slopes[i], u, math.nan)
        for layer, own in zip(layers, [x[i : i + 1], *units]):
            layer.store(i, own)
    return x.T, slopes.T


class LayerOfInverse:
    """A layer, of whose inputs one block after the other becomes known.

    Arguments:
        weight: of shape (d b, d a).
        bias: of shape (d b, 1) or (d b, B).
        z: what is inverted, of shape (B, d).
    """

    def __init__(self, weight: Tensor, bias: Tensor, z: Tensor) -> None:
        n_rows, d = z.shape
        self.weight, self.bias = weight, bias
        self.b, self.a = weight.shape[0] // d, weight.shape[1] // d
        self.inputs = z.new_empty(d * self.a, n_rows)

    def block(self, i: int) -> tuple[Tensor, Tensor]:
        """Return what earlier blocks add to the i-th of the output, and the weights of the i-th."""
        a, b = self.a, self.b
        first = i - i % GROUP
        if i == first:
            # one product for several variables is faster than one for each
            group, seen = slice(first * b, (first + GROUP) * b), slice(first * a)
            self.sums = torch.addmm(self.bias[group], self.weight[group, seen], self.inputs[seen])

        weight = self.weight[i * b : (i + 1) * b]
        sums = self.sums[(i - first) * b : (i - first + 1) * b]
        seen = slice(first * a, i * a)
        earlier = torch.addmm(sums, weight[:, seen], self.inputs[seen])
        return earlier, weight[:, i * a : (i + 1) * a]

    def store(self, i: int, units: Tensor) -> None:
        """Make the i-th block of the input known, which is of shape (a, B)."""
        self.inputs[i * self.a : (i + 1) * self.a] = units


def solve_variable(
    blocks: list[tuple[Tensor, Tensor]], rest: Tensor, target: Tensor, tol: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the i-th variable u (B,) with f_i(u) = ``target``, its slope, and its hidden units.

    ``blocks`` and ``rest`` are those of ``evaluate_variable``. The search is made in float32, which
    is faster. At most two steps of Newton's method in float64 then make its result exact. The few
    rows for which they do not suffice are searched again in float64.
    """
    blocks_32 = [(earlier.float(), weight.float()) for earlier, weight in blocks]
    function = partial(evaluate_variable, blocks_32, rest.float())
    u, _ = find_root(function, target.float(), ROUGH_TOL, max_steps=ROUGH_STEPS)
    u = torch.where(u.isfinite(), u, target)

    function = partial(evaluate_variable, blocks, rest)
    for _ in range(2):
        value, slope, _ = function(u)
        newton = (target - value) / slope
        u = u + newton.clamp(-1, 1)
        slow = (newton.abs() > tol).nonzero().squeeze(1)
        if len(slow) == 0:
            break

    if len(slow):
        blocks_slow = [(earlier[:, slow], weight) for earlier, weight in blocks]
        slow_function = partial(evaluate_variable, blocks_slow, rest)
        root, converged = find_root(slow_function, target[slow], tol, u[slow])
        u[slow] = torch.where(converged, root, math.nan)
    return u, *function(u)[1:]


def evaluate_variable(
    blocks: list[tuple[Tensor, Tensor]],
    rest: Tensor,
    u: Tensor,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return f_i of the i-th variable ``u`` (B,), its slope, and the hidden units on the way.

    ``blocks`` holds, for each layer, what earlier variables add to its units of this variable
    (b, B), and the weights (b, a) of its units of this variable. ``rest`` is the factor of u
    itself. ``rows`` are the columns of the former to take.
    """
    if rows is not None:
        blocks = [(earlier[:, rows], weight) for earlier, weight in blocks]
    units, half = [], u.new_tensor(0.5)
    earlier, weight = blocks[0]
    x, slope = torch.addmm(earlier, weight, u[None]), weight
    for earlier, weight in blocks[1:]:
        s = x.abs().neg_().sigmoid_()  # at most 1/2: no digits of s (1 - s) are lost
        y, slope = (half - s).copysign_(x), torch.addcmul(s, s, s, value=-1) * slope
        units.append(y)
        x, slope = torch.addmm(earlier, weight, y), weight @ slope
    return torch.addcmul(x[0], rest, u), slope[0] + rest, units


def find_root(
    function: Callable[[Tensor, Tensor | slice], tuple[Tensor, Tensor, Any]],
    target: Tensor,
    tol: float,
    start: Tensor | None = None,
    max_steps: int = 200,
) -> tuple[Tensor, Tensor]:
    """Solve function(u) = target by Newton's method, safeguarded and for all rows at once.

    Arguments:
        function: maps u (B,) and the rows it belongs to, to an increasing value, its slope, and
            what is not used here.
        target: of shape (B,).
        tol: the step, in units of u, below which a row has converged.
        start: the first u; by default the target.
        max_steps: the steps after which the search is given up.

    Returns u and whether it has converged, which it does not where there is no root up to
    ``FARTHEST``. Once most rows have come to an end, only the others are evaluated.

    A step is at most twice the one before, and at most half the bracket of the root, which is
    a bisection.
    """
    u = target if start is None else start
    root, found = u.clone(), torch.zeros_like(u, dtype=torch.bool)
    rows = None
    half = u.new_tensor(0.5)
    step = torch.ones_like(u)
    low, high = torch.full_like(u, -math.inf), torch.full_like(u, math.inf)

    for k in range(max_steps):
        value, slope, _ = function(u, rows)
        newton = (target - value) / slope
        converged = newton.abs() <= tol

        is_low = newton > 0
        low = torch.where(is_low, u, low)
        high = torch.where(is_low, high, u)
        limit = torch.minimum(half * (high - low), step + step)
        new_u = u + newton.clamp(-limit, limit)
        # a row that has converged stays, so that it does so in the next step, too
        new_u = torch.where(converged, u, new_u.clamp(-FARTHEST, FARTHEST))
        step = (new_u - u).abs()

        active = step > 0
        n_active = int(active.sum())
        is_over = n_active == 0 or k == max_steps - 1
        if is_over or n_active < len(u) / 2:
            own = slice(None) if rows is None else rows
            root[own] = torch.where(converged, u + newton, new_u)
            found[own] = converged
        if is_over:
            break
        if n_active < len(u) / 2:
            kept = active.nonzero().squeeze(1)
            rows = kept if rows is None else rows[kept]
            target, step = target[kept], step[kept]
            new_u, low, high = new_u[kept], low[kept], high[kept]
        u = new_u
    return root, found


def attach_gradients(
    flow: BlockFlow, x: Tensor, z: Tensor, context: Tensor | None = None
) -> Tensor:
    """Return x after one more Newton step, with the gradients of the inverse.

    By the implicit function theorem, dx = (df/dx)^-1 (dz - df/dtheta dtheta), where theta are the
    parameters and the context. df/dx is a constant here, so these gradients cannot be
    differentiated again.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        f = flow(x, context)[0]
        rows = []
        for i in range(x.shape[1]):
            (row,) = torch.autograd.grad(f[:, i].sum(), x, retain_graph=True)
            rows.append(row)
        jacobian = torch.stack(rows, 1)

    x = x.detach()
    residual = (z - flow(x, context)[0])[..., None]
    step = torch.linalg.solve_triangular(jacobian, residual, upper=False).squeeze(2)
    return OnceDifferentiable.apply(x + step)


class OnceDifferentiable(torch.autograd.Function):
    """The identity, which refuses to be differentiated twice rather than to lose derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                'the inverse has first derivatives only: call backward without create_graph, or '
                'differentiate the forward direction twice'
            )
        return grad_x


class Flip(nn.Module):
    """The variables in reverse order; log|det| = 0."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.flip(1), x.new_zeros(len(x))

    inverse = forward


class Sequence(nn.ModuleList):
    """Bijections one after the other, given the same context. Their log-determinants add up."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logdet = x.new_zeros(len(x))
        for layer in self:
            x, logdet_layer = layer(x, context)
            logdet = logdet + logdet_layer
        return x, logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logdet = z.new_zeros(len(z))
        for layer in reversed(self):
            z, logdet_layer = layer.inverse(z, context)
            logdet = logdet + logdet_layer
        return z, logdet


# ------------------------------------------------------------------------------------------- model


class BNAF(Sequence):
    """Block neural autoregressive flows, with the variables flipped between them.

    A model of data maps rows x (B, ``data_dim``) to latents z ~ N(0, I), given their contexts
    (B, ``context_dim``) if there are any: the density is p(x | context). A model that is matched
    to an energy maps noise to rows.

    Arguments:
        data_dim: the number of variables.
        n_flows: the number of flows.
        n_hidden: inner layers of a flow, from hidden to hidden units.
        hidden_dim: hidden units per variable.
        residual: of all flows but the last: None, ``'normal'`` or ``'gated'``.
        checkpoint_grads: recompute activations in the backward pass.
        context_dim: the size of the context, 0 for a density without conditions.
        last_residual: of the last flow, likewise. The paper's has none, so that its range is
            bounded. If all flows have one, every z has an x, and the tails of x are those of z,
            scaled.
    """

    def __init__(
        self,
        data_dim: int,
        n_flows: int = 5,
        n_hidden: int = 1,
        hidden_dim: int = 10,
        residual: str | None = 'gated',
        checkpoint_grads: bool = False,
        context_dim: int = 0,
        last_residual: str | None = None,
    ) -> None:
        layers: list[nn.Module] = []
        for k in range(n_flows):
            if k:
                layers.append(Flip())
            own = residual if k < n_flows - 1 else last_residual
            options = checkpoint_grads, context_dim
            layers.append(BlockFlow(data_dim, n_hidden, hidden_dim, own, *options))
        super().__init__(layers)
        self.data_dim, self.context_dim = data_dim, context_dim
        if last_residual is not None:
            self.init_tails()

    @torch.no_grad()
    def init_tails(self) -> None:
        """Set the gates such that what is sampled has tails like those of the data.

        Far from the data, tanhs are constant, and a gated flow scales its variables by 1 - s. The
        inverse divides by that, flow after flow: with five flows by 0.077 at first. So all flows
        but the last start with a small s, and in the last, f reaches as far as it would without a
        residual.
        """
        *others, last = [layer for layer in self if isinstance(layer, BlockFlow)]
        for flow in (*others, last):
            if flow.residual == 'gated':
                flow.gate.fill_(GATE_OF_LAST if flow is last else GATE_OF_OTHERS)
        last.widen_range()

    @property
    def n_parameters(self) -> int:
        """The number of parameters that are used: weights above the diagonal are not."""
        linears = [module for module in self.modules() if isinstance(module, MaskedLinear)]
        n_masked = sum(linear.n_masked for linear in linears)
        return sum(parameter.numel() for parameter in self.parameters()) - n_masked

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split rows (B, ``data_dim`` + ``context_dim``) into x and its context, None for none."""
        if self.context_dim == 0:
            return rows, None
        return rows[:, : self.data_dim], rows[:, self.data_dim :]

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return log p(x), or log p(x | context), in nats and of shape (B,).

        ``x`` is of shape (B, ``data_dim``) and ``context`` of (B, ``context_dim``). Raises
        ``ValueError`` for any other shape, and where a context is missing or too much.
        """
        if x.ndim != 2 or x.shape[1] != self.data_dim:
            raise ValueError(f'log_prob takes rows (B, {self.data_dim}), not {tuple(x.shape)}')
        self.require_context(context, len(x))
        z, logdet = self(x, context)
        return log_normal(z) + logdet

    def sample(
        self,
        n: int,
        z_std: float = 1.0,
        generator: torch.Generator | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Return ``n`` rows, drawn at temperature ``z_std`` through the inverse.

        A model with conditions takes the context of each row, of shape (n, ``context_dim``).
        """
        self.require_context(context, n)
        like = next(self.parameters())
        return sample_with_log_prob(
            self.inverse, n, self.data_dim, like, z_std, generator, context
        )[0]

    def require_context(self, context: Tensor | None, n: int) -> None:
        """Raise ``ValueError`` unless there is a context of n rows if the model takes one."""
        shape = None if context is None else tuple(context.shape)
        wanted = (n, self.context_dim) if self.context_dim else None
        if shape != wanted:
            raise ValueError(f'the context of this model is of shape {wanted}, not {shape}')


@torch.no_grad()
def sample_with_log_prob(
    from_noise: Callable[..., tuple[Tensor, Tensor]],
    n: int,
    data_dim: int,
    like: Tensor,
    z_std: float = 1.0,
    generator: torch.Generator | None = None,
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Draw ``n`` rows x = from_noise(z) with z ~ N(0, z_std^2 I).

    Where there are contexts (n, C), the i-th row is from_noise(z, context[i]).

    Returns the rows (n, ``data_dim``), of the type and on the device of ``like``, their log p(x),
    and the number of z that were rejected: a flow that ends in tanhs does not reach all of space,
    and a z without an x within the tolerance of the inverse is drawn again. Raises ``UserError``
    where hardly any z has an x.
    """
    rows, log_probs = like.new_empty(n, data_dim), like.new_empty(n)
    waiting = torch.arange(n, device=like.device)  # the rows that have no x yet
    n_drawn, n_in_vain = 0, 0
    while len(waiting):
        now, later = waiting[:ROWS_AT_ONCE], waiting[ROWS_AT_ONCE:]
        eps = torch.randn(len(now), data_dim, generator=generator, dtype=like.dtype)
        z = z_std * eps.to(like.device)
        given = () if context is None else (context[now],)
        x, logdet = from_noise(z, *given)

        found = x.isfinite().all(1) & logdet.isfinite()
        rows[now[found]] = x[found]
        log_probs[now[found]] = (log_normal(z) - logdet)[found]
        waiting = torch.cat([now[~found], later])

        n_drawn += len(z)
        n_in_vain = 0 if found.any() else n_in_vain + len(z)
        n_found = n - len(waiting)
        if n_in_vain >= 1000 or (n_drawn >= 1000 and n_found < 0.01 * n_drawn):
            raise UserError(
                f'of {n_drawn:,} draws only {n_found} gave finite rows: the model is not trained, '
                'its conditions are far from the data, or --inverse_tol is below its precision'
            )
    return rows, log_probs, n_drawn - n


def log_normal(z: Tensor) -> Tensor:
    """Return log N(z; 0, I) of each row in nats: (B, D) becomes (B,)."""
    log_of_constant = z.shape[1] * math.log(2 * math.pi)
    return -0.5 * (z.square().sum(1) + log_of_constant)


class Objective(nn.Module):
    """The training objective in nats, which DistributedDataParallel wraps.

    For data it is -log p(x), in the data's own units (eq. 2), or -log p(x | context). For an energy
    it is the KL divergence of the flow's density to exp(-U) / Z, and x is noise (eq. 3).
    """

    def __init__(self, model: BNAF, data: TableData) -> None:
        super().__init__()
        self.model = model
        self.energy = data.energy
        self.constant = float(data.log_z + np.log(data.std).sum())

    def per_row(self, rows: Tensor, beta: Tensor | float = 1.0) -> Tensor:
        """Return the objective of each row, which holds x and its context.

        ``beta`` multiplies an energy.
        """
        if self.energy is None:
            return self.constant - self.model.log_prob(*self.model.split(rows))
        y, logdet = self.model(rows)
        return self.constant + log_normal(rows) - logdet + beta * self.energy(y)

    def forward(self, rows: Tensor, beta: Tensor | float = 1.0) -> Tensor:
        return self.per_row(rows, beta).mean()


def build_model(config: Config, input_dims: tuple[int, ...]) -> BNAF:
    """Build the model of a config, seeded by it, for rows of D columns given C values: (D, C)."""
    torch.manual_seed(config.seed)
    data_dim, context_dim = input_dims
    return BNAF(
        data_dim,
        config.n_flows,
        config.n_hidden,
        config.hidden_dim,
        RESIDUALS[config.residual],
        config.checkpoint_grads,
        context_dim,
        RESIDUALS[config.last_residual],
    )


def build_optimizer(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer of a training."""
    return torch.optim.Adam(parameters, lr=config.lr, amsgrad=True, fused=True)


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
    require_entries(saved, {'step': int, 'best_step': int, 'n_annealing': float, 'units': dict})
    saved, units = dict(saved), saved['units']
    best_step = saved.pop('best_step')
    return {
        **saved,
        'units': {**units, 'levels': [[] for _ in units['columns']]},  # not known
        'fingerprint': '',  # not known
        'first_world_size': saved['world_size'],
        'n_seen': saved['step'] * n_per_step,
        'n_seen_at_best': best_step * n_per_step,
        'n_annealing': saved['n_annealing'] * n_per_step,
    }


def upgrade_from_2(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint of format 2 as that of format 3.

    The former keeps the blocks on the diagonal of each weight, and those below, apart.
    """
    adam_schema = {'state': dict, 'param_groups': [dict]}
    require_entries(saved, {'model': dict, 'average': dict, 'optimizer': adam_schema})
    names = list(saved['model'])
    state, groups = saved['optimizer']['state'], saved['optimizer']['param_groups']
    indices = [group.get('params') for group in groups]
    if not is_same(indices, [list(range(len(names)))]):
        raise ValueError('its optimizer belongs to other weights')

    model = merge_blocks(saved['model'])
    states: dict[int, dict[str, Any]] = {i: {} for i in range(len(model) if state else 0)}
    keys = [list(values) for values in state.values()]
    if any(other != keys[0] for other in keys):
        raise ValueError("its optimizer's state does not match its weights")
    for key in keys[0] if keys else ():
        merged = merge_blocks({name: state[i][key] for i, name in enumerate(names)})
        for i, value in enumerate(merged.values()):
            states[i][key] = value

    group = {**groups[0], 'params': list(range(len(model)))}
    return {
        **saved,
        'model': model,
        'average': merge_blocks(saved['average']),
        'optimizer': {'state': states, 'param_groups': [group]},
    }


def merge_blocks(values: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict of format 2, or what an optimizer keeps for one, in format 3."""
    merged = {}
    for name, value in values.items():
        layer, _, parameter = name.rpartition('.')
        if parameter == 'log_diagonal':
            lower = values[f'{layer}.lower']
            merged[f'{layer}.weight'] = merge_weight(value, lower)
        elif parameter != 'lower':
            merged[name] = value
    return merged


def merge_weight(diagonal: Tensor, lower: Tensor) -> Tensor:
    """Return the matrix (d b, d a) of blocks on the diagonal (d, b, a) and those of a matrix below.

    Numbers that belong to both, counts of steps, are returned as they are. Raises ``ValueError``
    for anything that is not of these shapes.
    """
    for value in (diagonal, lower):
        is_plain = type(value) is Tensor and value.layout == torch.strided
        if not is_plain or value.dtype != torch.float32:
            raise ValueError('something among its weights is no tensor of numbers')
    if diagonal.dim() == lower.dim() == 0:
        return lower

    is_fit = diagonal.dim() == 3 and diagonal.numel() > 0
    d, b, a = diagonal.shape if is_fit else (0, 0, 0)
    if not is_fit or lower.shape != (d * b, d * a):
        raise ValueError('its weights do not fit each other')
    below = torch.ones(d, d).tril(-1)
    weight = lower * below.repeat_interleave(b, 0).repeat_interleave(a, 1)
    diagonal_blocks(weight, d).copy_(diagonal)
    return weight


def upgrade_from_3(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint of format 3, without conditions, as that of format 4."""
    require_entries(saved, {'input_dims': [int], 'units': dict})
    n_columns = len(saved['units']['columns'])
    units = {
        **saved['units'],
        'features': saved['units']['columns'],
        'conditions': [],
        'quantiles': [[] for _ in range(n_columns)],  # not known
    }
    return {
        **saved,
        'input_dims': [*saved['input_dims'], 0],
        'units': units,
        'validation_quantiles': [],  # not known
    }


def upgrade_from_4(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint of format 4 as that of format 5."""
    require_entries(saved, {'units': dict})
    ranges: list[list[float]] = [[] for _ in saved['units']['columns']]  # not known
    return {**saved, 'units': {**saved['units'], 'ranges': ranges}}


PLATEAU = {'best': float, 'num_bad_epochs': int, 'cooldown_counter': int}  # changes in training
CHECKPOINT = CheckpointFormat(
    script=f'{NAME}.py',
    number=5,
    config_class=Config,
    least_dims=(1, 0),  # D columns, given C values
    fields={
        'units': {
            'columns': [str],
            'mean': [float],
            'std': [float],
            'steps': [float],
            'levels': [[float]],
            'features': [str],
            'conditions': [{'name': str, 'mean': float, 'std': float, 'categories': [str]}],
            'quantiles': [[float]],
            'ranges': [[float]],
        },
        'fingerprint': str,
        'first_world_size': int,
        'step': int,
        'n_seen': int,
        'n_skipped': int,
        'skips_in_a_row': int,
        'n_annealing': float,
        'validation_loss': float,
        'validation_quantiles': [float],
        'best': float,
        'n_seen_at_best': int,
    },
    parts={
        'model': dict,
        'average': dict,
        'optimizer': {'state': dict, 'param_groups': [dict]},
        'scheduler': PLATEAU,
    },
    build_model=build_model,
    build_optimizer=build_optimizer,
    upgrades={1: upgrade_from_1, 2: upgrade_from_2, 3: upgrade_from_3, 4: upgrade_from_4},
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


def training_batch(data: TableData, config: Config, n_seen: int, process: Process) -> np.ndarray:
    """Return the indices of this process's next rows or, if they are sampled, the rows.

    They are a function of the seed, the number of rows seen before, and the rank.
    """
    rank = process.rank
    if data.sampler:
        seed = seed_sequence(Stream.TRAINING, config.seed, n_seen, rank)
        return data.sampler(np.random.default_rng(seed), config.batch_size)
    return batch_indices(len(data.train), config.batch_size, config.seed, n_seen, rank)


@torch.no_grad()
def row_losses(objective: Objective, rows: np.ndarray, process: Process) -> Tensor:
    """Return the objective of each row (N, D), in float64 on the CPU of every process.

    The processes share the work.
    """
    losses = torch.zeros(len(rows), dtype=torch.float64, device=process.device)
    own = np.arange(len(rows))[process.rank :: process.world_size]
    for start in range(0, len(own), ROWS_AT_ONCE):
        indices = own[start : start + ROWS_AT_ONCE]
        x = torch.from_numpy(rows[indices]).to(process.device)
        losses[indices] = objective.per_row(x).double()
    return process.sum(losses).cpu()  # zero where another process fills in


# ---------------------------------------------------------------------------------------- training


class Plateau(ReduceLROnPlateau):
    """Lowers the learning rate where the score no longer improves.

    Its state is only what changes; all else follows from the config.
    """

    def state_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in PLATEAU}


def build_scheduler(config: Config, optimizer: torch.optim.Optimizer) -> Plateau:
    """Build what halves the learning rate, after each validation."""
    return Plateau(
        optimizer,
        factor=0.5,
        patience=config.lr_patience,
        cooldown=10,
        min_lr=config.min_lr,
        threshold=1e-4,
        threshold_mode='abs',
    )


class Training:
    """A training: the weights, their average, the optimizer, and where it stands."""

    def __init__(
        self,
        config: Config,
        data: TableData,
        process: Process,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.data, self.process = config, data, process
        self.score_name, self.score_sign = 'log_likelihood', -1
        if data.energy:
            self.score_name, self.score_sign = 'kl', 1
        self.input_dims = [len(data.columns), data.n_context]
        self.step, self.n_seen = 0, 0
        self.n_skipped, self.skips_in_a_row = torch.zeros(
            2, dtype=torch.int64, device=process.device
        )
        self.best, self.n_seen_at_best, self.validation_loss = math.inf, 0, math.nan
        self.validation_quantiles: list[float] = []
        self.first_world_size = saved['first_world_size'] if saved else process.world_size

        self.model = build_model(config, self.input_dims).to(process.device)
        self.objective = wrap_ddp(
            Objective(self.model, data),
            process,
            options=asdict(replace(config, data_dir='')),
            data=data.fingerprint,
            step=saved['step'] if saved else 0,
        )
        self.average = MovingAverage(
            self.model, config.ema_decay, process.world_size / self.first_world_size
        )
        self.optimizer = build_optimizer(config, self.model.parameters())
        self.scheduler = build_scheduler(config, self.optimizer)

        self.rows = None
        self.n_per_step = config.batch_size * process.world_size
        self.n_per_epoch = config.batch_size * EPOCH_BATCHES
        if not data.sampler:
            self.rows = torch.from_numpy(np.array(data.train)).to(process.device)
            # at least a step, of the processes that the run began with
            self.n_per_epoch = max(len(data.train), config.batch_size * self.first_world_size)
        self.n_per_validation = self.n_per_epoch
        # kept by the checkpoint, so that more epochs later do not stretch the annealing
        self.n_annealing = float(config.annealing * config.n_epochs * self.n_per_epoch)

        if saved is not None:
            CHECKPOINT.restore(self, saved)
        # not those of the checkpoint, which may be older and not know the levels or the rows
        self.units = table_units(data)
        self.fingerprint = data.fingerprint

        self.compute = self.forward_and_update
        if can_capture(process, self.optimizer) and not config.no_cuda_graph:
            self.compute = CapturedStep(self.compute, self.optimizer)

    @property
    def n_to_see(self) -> int:
        """The number of rows after which training ends. It grows with each better score."""
        best_epoch = self.n_seen_at_best // self.n_per_epoch
        n_epochs = min(self.config.n_epochs, best_epoch + self.config.early_stop)
        return n_epochs * self.n_per_epoch

    def take_step(self) -> tuple[Tensor, Tensor]:
        """Take one step. Returns its loss and its gradient norm."""
        n_in_warmup = self.config.n_epochs_warmup * self.n_per_epoch
        if self.n_seen < n_in_warmup:
            fraction = min(1.0, (self.n_seen + self.n_per_step) / n_in_warmup)
            self.optimizer.param_groups[0]['lr'] = self.config.lr * fraction

        batch = training_batch(self.data, self.config, self.n_seen, self.process)
        x = to_device(batch, self.process.device)
        if self.rows is not None:
            x = self.rows[x]

        # an energy is turned on gradually, so that the flow does not collapse onto one of its modes
        beta = min(1.0, 0.01 + self.n_seen / max(1.0, self.n_annealing))
        loss, norm = self.compute(x, to_device(np.array(beta, np.float32), self.process.device))
        self.step += 1
        self.n_seen += self.n_per_step
        return loss, norm

    def forward_and_update(self, x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the objective and change the weights: what a GPU captures of a step."""
        return update(self, self.objective(x, beta))

    def validate(self, folder: Path | None) -> None:
        """Score the averaged weights on the validation split, and adjust the learning rate.

        Says so where this ends the training, unless there is no ``folder``.
        """
        objective = Objective(self.average.module, self.data)
        losses = row_losses(objective, self.data.validation, self.process)
        loss = losses.mean().item()
        if math.isfinite(loss):
            self.scheduler.step(loss)
            self.validation_quantiles = score_quantiles(-losses.numpy())
        self.validation_loss = loss
        if loss < self.best:
            self.n_seen_at_best = self.n_seen

        n_most = self.config.n_epochs * self.n_per_epoch
        is_over = self.n_to_see <= self.n_seen < n_most
        if is_over and folder and self.process.rank == 0:
            tqdm.write(
                f'step {self.step}: training ends early, as {self.config.early_stop} epochs have '
                'not brought a better validation score'
            )


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
    """Return a loss as text: a log-likelihood or, for an energy, a KL divergence."""
    if config.dataset in ENERGIES:
        return f'KL {loss:.4f} nats'
    return f'{-loss:.3f} nats'


# ------------------------------------------------------------------------------------------- modes


def evaluate(
    model: BNAF,
    data: TableData,
    saved: dict[str, Any],
    config: Config,
    process: Process,
    request: Request,
) -> None:
    """Print the log-likelihood of the test split, or the KL divergence to an energy.

    The test split's is saved as results.json beside the checkpoint, and compared with that of a
    Gaussian. ``--input`` is a table to score instead. The file ``--scores`` gets the log-likelihood
    of every row.
    """
    if data.energy and (request.scores or request.input or request.explain):
        raise UserError(
            '--scores, --input and --explain are for models of data; --generate gives the '
            'log-density of each sample'
        )
    rows = read_rows(request.input, data) if request.input else data.test
    objective = Objective(model, data)
    losses = row_losses(objective, rows, process)

    indices = np.arange(len(rows)) if request.input else data.test_index
    scores = score_columns(-losses.numpy(), indices, saved['validation_quantiles'], saved['path'])
    if request.explain:
        lowest = lowest_rows(scores)
        gains = cell_gains(objective, data, rows[lowest], process)
        causes = cause_columns(len(rows), data.columns, lowest, gains)
    if process.rank > 0:
        return

    results = summarise(losses, data, request.input, config)
    if not request.input:
        if data.train is not None and len(data.train) > 2:  # else its covariance is not known
            results |= compare_with_gaussian(losses, data)
        results = {**results, 'step': saved['step'], 'checkpoint': saved['path'].name}
        write_json(saved['path'].with_name('results.json'), results)
    if request.explain:
        print_causes(scores, causes, lowest)
        scores |= causes
    if request.scores:
        save_table(request.scores, frame_of_columns(scores))


def summarise(losses: Tensor, data: TableData, input_file: str, config: Config) -> dict[str, Any]:
    """Print the mean objective of rows; return it, and what it is of, as plain values."""
    mean, n_rows = losses.mean().item(), len(losses)
    error = 2 * losses.std(correction=0).item() / math.sqrt(n_rows)
    name = input_file or f'{Path(config.dataset).name} test'
    if data.energy is None:
        items = 'rows'
        results = {'log_likelihood_nats': -mean}
        summary = f'{-mean:.4f} ± {error:.4f} nats'
    else:
        weights = (-losses).softmax(0)
        effective = 1 / (weights.square().sum().item() * n_rows)
        items = 'samples'
        results = {'kl_nats': mean, 'effective_sample_size': effective}
        summary = f'KL(q || p) {mean:.4f} ± {error:.4f} nats, effective sample size {effective:.1%}'
    names = ', '.join(condition.name for condition in data.conditions)
    given = f', given {names}' if names else ''
    print(f'{name}{given}: {summary} ({n_rows:,} {items}, two standard errors)')
    return {**results, 'dataset': name, 'n_rows': n_rows, 'two_standard_errors': error}


def compare_with_gaussian(losses: Tensor, data: TableData) -> dict[str, Any]:
    """Print how far the flow is above a Gaussian that is fitted to the training split.

    Both are scored on the test split. Returns the score of the Gaussian as plain values.
    """
    log_p = gaussian_log_prob(data.train, data.test, len(data.columns)) - np.log(data.std).sum()
    text = f'a Gaussian fitted to the training rows scores {log_p.mean():.4f} nats'

    lead = -losses.numpy() - log_p
    if np.isfinite(lead).all():
        side = 'above' if lead.mean() >= 0 else 'below'
        error = 2 * lead.std() / math.sqrt(len(lead))
        text += f'; the flow is {abs(lead.mean()):.4f} ± {error:.4f} nats {side} it'
    print(text)
    return {'gaussian_log_likelihood_nats': float(log_p.mean())}


def cell_gains(
    objective: Objective, data: TableData, rows: np.ndarray, process: Process
) -> np.ndarray:
    """Return how far log p of each row would rise if one cell had its best value, (N, D).

    The values that are tried are the quantiles that the column has in the training split. The rows
    are standardised, (N, D + C), and their conditions stay as they are. Raises ``UserError`` where
    the quantiles are not known.
    """
    n_levels = len(data.quantiles)
    if n_levels == 0:
        raise UserError('the model is of an older version: train it on, to have cells explained')
    losses = row_losses(objective, rows, process).numpy()
    gains = np.zeros((len(rows), len(data.columns)))
    n_at_once = max(1, ROWS_AT_ONCE // n_levels)
    for start in range(0, len(rows), n_at_once):
        some = slice(start, start + n_at_once)
        for k in range(len(data.columns)):
            changed = np.repeat(rows[some], n_levels, axis=0)
            changed[:, k] = np.tile(data.quantiles[:, k], len(rows[some]))
            best = row_losses(objective, changed, process).view(-1, n_levels).amin(1)
            gains[some, k] = losses[some] - best.numpy()
    return gains


def directions(model: BNAF, data: TableData) -> tuple[Callable, Callable]:
    """Return the model's map from noise to rows, and its map back.

    A model of data maps rows to noise, one that is matched to an energy noise to rows.
    """
    if data.energy is None:
        return model.inverse, model
    return model, model.inverse


@torch.no_grad()
def sample_rows(
    model: BNAF,
    data: TableData,
    n: int,
    z_std: float,
    seed: int,
    context: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``n`` rows (n, D) in the data's own units, and log p of each.

    A model with conditions takes the context of each row, (n, C). Columns that ``--dequantize`` has
    spread are still spread. The model is converted to float64, where the inverse is exact to 1e-10
    unless ``--inverse_tol`` says otherwise. Prints the speed and the error of a round trip.
    """
    from_noise, to_noise = directions(model.double(), data)
    like = next(model.parameters())
    generator = seeded_generator('cpu', Stream.SAMPLES, seed)
    contexts = None if context is None else torch.from_numpy(context).to(like)
    start = time.perf_counter()
    x, log_p, n_lost = sample_with_log_prob(
        from_noise, n, len(data.columns), like, z_std, generator, contexts
    )
    speed = n / (time.perf_counter() - start)

    head = x[:1000]
    given = [] if contexts is None else [contexts[:1000]]
    again, _ = from_noise(to_noise(head, *given)[0], *given)
    error = (again - head).abs().max().item()
    rows = x.cpu().numpy()
    lost = f'{n_lost:,} more draws lay beyond what the flow reaches; ' if n_lost else ''
    print(f'{n:,} samples, {speed:,.0f} per second; {lost}round trip within {error:.0e}')
    if len(data.ranges):
        n_beyond = data.is_outside(rows).sum()
        print(f'{n_beyond:,} of them leave the range of the training rows in some column')

    log_p = log_p.cpu().numpy() - np.log(data.std).sum()
    return data.to_own_units(rows), log_p


def given_conditions(text: str, data: TableData, n: int) -> tuple[Any, np.ndarray]:
    """Return the rows of ``--given``, each ``n`` times, as a table and as contexts (N, C).

    Raises ``UserError`` where the model has no conditions, or ``text`` lacks one of them.
    """
    names = [condition.name for condition in data.conditions]
    if not names:
        raise UserError('--given is for models that were trained with --condition')
    if not text:
        example = shlex.quote(','.join(f'{name}=...' for name in names))
        raise UserError(
            f'the model has conditions: add --given={example}, or --given=TABLE with these columns'
        )
    return repeat_conditions(parse_given(text, names), data.conditions, n, '--given')


def generate(model: BNAF, data: TableData, path: Path, config: Config, request: Request) -> None:
    """Save samples in the data's own units, with their log-likelihood, as a table.

    A model with conditions draws ``--n_samples`` for each row of ``--given``, and the table has
    these besides. Columns that ``--dequantize`` has spread are put back on the values of the table.
    The log-likelihood is that of the row as it is saved, which ``--evaluate --input`` gives too.
    """
    output = request.output or path.with_name('generated_samples.csv')
    given, context, n = None, None, request.n_samples
    if data.conditions or request.given:
        given, context = given_conditions(request.given, data, n)
        n = len(given)
        if n > request.n_samples:
            n_given = n // request.n_samples
            print(f'{request.n_samples:,} samples for each of {n_given:,} rows of conditions')
    is_whole = given is None and data.used_features == data.features
    if Path(output).suffix == '.npy' and not is_whole:
        raise UserError(
            f'{output}: a .npy has no names for the columns, and these are not all of the table: '
            'give a name that ends in .csv'
        )
    if Path(output).suffix == '.h5':
        require_h5_names([*data.used_features, 'log_likelihood'], Path(output))
        if given is not None:
            require_numbers(given, Path(output))

    x, log_p = sample_rows(model, data, n, request.z_std, config.seed, context)
    if any(map(len, data.levels)):
        x = data.quantize(x)
    table = frame_of_rows(x, data, given)
    if any(map(len, data.levels)):
        rows = rows_of_frame(table, data, output).astype(np.float64)
        single = Process(rank=0, world_size=1, device=next(model.parameters()).device)
        log_p = -row_losses(Objective(model, data), rows, single).numpy()
    table['log_likelihood'] = log_p
    save_table(output, table)


class Learned:
    """What a model of a table has learned, in the table's own units, for pictures.

    Contexts are of shape (N, C), and None for a model without conditions. The model is converted
    to float64.
    """

    def __init__(self, model: BNAF, data: TableData, seed: int) -> None:
        self.model, self.data, self.seed = model.double(), data, seed
        self.like = next(model.parameters())

    def sample(self, n: int, context: np.ndarray | None = None) -> np.ndarray:
        """Draw n rows (n, D), one for each context."""
        return sample_rows(self.model, self.data, n, 1.0, self.seed, context)[0]

    @torch.no_grad()
    def density(self, points: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
        """Return p at points (N, D), given one context; 0 where the flow does not reach."""
        _, to_noise = directions(self.model, self.data)
        rows = torch.from_numpy((points - self.data.mean) / self.data.std).to(self.like)
        log_p = []
        for x in rows.split(ROWS_AT_ONCE):
            given = []
            if context is not None:
                given = [torch.from_numpy(context).to(self.like).expand(len(x), -1)]
            z, logdet = to_noise(x, *given)
            log_p.append(log_normal(z) + logdet)
        p = torch.cat(log_p).exp().nan_to_num(0.0).cpu().numpy()
        return p / self.data.std.prod()

    @torch.no_grad()
    def quantiles(self, levels: tuple[float, ...], context: np.ndarray) -> np.ndarray:
        """Return quantiles of the only column given each context, (N, k).

        All flows increase, so they are what the quantiles of the noise are mapped to.
        """
        z = torch.special.ndtri(torch.tensor(levels, dtype=torch.float64)).to(self.like)
        contexts = torch.from_numpy(context).to(self.like).repeat_interleave(len(z), 0)
        x, _ = self.model.inverse(z.repeat(len(context))[:, None], contexts)
        return self.data.to_own_units(x.cpu().numpy()).reshape(len(context), len(z))


def visualize(
    model: BNAF,
    data: TableData,
    path: Path,
    config: Config,
    process: Process,
    request: Request,
) -> None:
    """Save a picture of what was learned: see ``draw_learned``."""
    single = Process(rank=0, world_size=1, device=process.device)
    loss = row_losses(Objective(model, data), data.test, single).mean().item()
    title = f'{Path(config.dataset).stem}: {format_score(config, loss)}'
    learned = Learned(model, data, config.seed)
    figure = draw_learned(learned, data, request.given, request.vis_dims, title)
    save_figure(path.with_name('visualization.png'), figure)


@torch.no_grad()
def check(model: BNAF, data: TableData, config: Config) -> None:
    """Print the largest error of inverse(forward(x)) on the test split.

    It is in standardised units and computed in float64: of the whole model, and of the layer with
    the largest error of its own. Rows that the inverse does not reach are counted.
    """
    model = model.double()
    device = next(model.parameters()).device
    errors = [0.0] * len(model)
    n_lost, largest = 0, 0.0
    for start in progress_bar(range(0, len(data.test), ROWS_AT_ONCE), 'inverting test rows'):
        rows = np.array(data.test[start : start + ROWS_AT_ONCE])
        x, context = model.split(torch.from_numpy(rows).double().to(device))
        z = x
        for k, flow in enumerate(model):
            y = z
            z, _ = flow(y, context)
            error = (flow.inverse(z, context)[0] - y).abs().nan_to_num(0.0)
            errors[k] = max(errors[k], error.max().item())
        error_of_row = (model.inverse(z, context)[0] - x).abs().amax(1)
        n_lost += int(error_of_row.isnan().sum())
        largest = max(largest, error_of_row.nan_to_num(0.0).max().item())

    k = int(np.argmax(errors))
    n_rows = len(data.test)
    lost = f'; the other {n_lost:,} lie beyond what the inverse reaches' if n_lost else ''
    print(
        f'{Path(config.dataset).name} test: {n_rows - n_lost:,} of {n_rows:,} rows come back '
        f'within {largest:.2g}{lost}; worst layer: {k} ({type(model[k]).__name__}), {errors[k]:.2g}'
    )


# -------------------------------------------------------------------------------------------- main


def name_of_size(limit: float) -> str:
    """Return which tables of the user's own are meant by a limit of ``BY_ROWS``."""
    return f'of fewer than {limit:,} training rows' if limit < math.inf else 'of more rows'


TABLE_DEFAULTS = {
    'your own table': OWN_TABLES,
    **{name_of_size(limit): values for limit, values in BY_ROWS.items()},
}
COMMAND_LINE = CommandLine(
    script=f'{NAME}.py',
    description=(__doc__ or '').partition('Notation')[0],
    modes=MODES,
    mode_options=MODE_OPTIONS,
    config_class=Config,
    request_class=Request,
    defaults={**DEFAULTS, **TABLE_DEFAULTS},
)


def parse_args(argv: list[str]) -> tuple[str, dict[str, Any], Request]:
    """Return the mode, the options of ``Config`` that were given, and the request."""
    return COMMAND_LINE.parse(argv)


def run_mode(mode: str, options: dict[str, Any], request: Request, process: Process) -> None:
    """Build or restore what a mode needs, and run it."""
    own_tables = {name for name in TABLE_PATHS if is_own_table(options.get(name, ''))}
    for name in own_tables:
        # an absolute path, so that the checkpoint works from any folder
        options[name] = str(Path(options[name]).resolve())
    saved = load_selected_checkpoint(
        NAME, mode, request, process, load_checkpoint, format_score, options.get('dataset')
    )
    if saved:
        own_tables = {name for name in own_tables if is_own_table(getattr(saved['config'], name))}
    needs_rows = mode != 'generate' and not request.input
    if saved and needs_rows:
        require_known_table(saved)
    may_change = MODE_OPTIONS[mode] - TABLE_PATHS | own_tables
    config = resolve_config(Config, options, DEFAULTS, saved, may_change)
    data = load_run_table(config, saved, needs_rows=needs_rows)

    if mode == 'train':
        notes = [f'note: {note}' for note in data.notes]
        if saved is None and is_own_table(config.dataset):
            config = with_table_defaults(config, options, len(data.train))
            notes += describe_defaults(config, options, len(data.train))
        if process.rank == 0:
            for note in notes:
                print(note)
        saved = train(data, config, request, process, saved)
        if saved is None:
            return
    path = saved['path']
    model = restore_model(saved, process.device)
    for flow in model:
        flow.inverse_tol = request.inverse_tol

    if mode in ('train', 'evaluate'):
        evaluate(model, data, saved, config, process, request)
    elif process.rank == 0 and mode == 'generate':
        generate(model, data, path, config, request)
    elif process.rank == 0 and mode == 'visualize':
        visualize(model, data, path, config, process, request)
    elif process.rank == 0:
        check(model, data, config)
    if process.rank == 0 and mode == 'train':
        score = format_score(config, saved['validation_loss'])
        print(f'the model is {path}: step {saved["step"]}, validation {score}')


def describe_defaults(config: Config, options: dict[str, Any], n_rows: int) -> list[str]:
    """Return a line with the options that a table of the user's own has because of its rows.

    Those that were given are left out; no line where all were.
    """
    names = [name for name in TABLE_OPTIONS if name not in options]
    words = ' '.join(f'--{name}={getattr(config, name)}' for name in names)
    return [f'defaults for {n_rows:,} training rows: {words}'] if words else []


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


# ------------------------------------------------------------------------------------ scikit-learn

BUILDING = threading.Lock()  # of torch's random generator, which all threads share


class BNAFDensity(DensityMixin, BaseEstimator):
    """The density of the rows of a table, p(x), or p(x | c), as an estimator of scikit-learn.

    ``fit`` writes no file; a tenth of the rows, at least one, decides when its training ends.
    Columns are given by name, by index, or as a range such as ``'2-5'``.

    Arguments:
        condition: the columns c that the density of the others is conditional on. They may be
            numbers, or categories: texts, booleans, and numbers of at most ten different values.
        columns: the columns to use, by default all.
        drop: the columns to leave out.
        dequantize: spread discrete columns by uniform noise.
        n_flows: flows, with the variables flipped between them.
        n_hidden: inner layers of a flow.
        hidden_dim: hidden units per variable.
        residual: of all flows but the last: ``'gated'``, ``'normal'`` or ``'none'``.
        last_residual: of the last flow, likewise; by default ``'gated'``.
        checkpoint_grads: take less memory and more time.
        no_cuda_graph: launch the kernels of a step one by one, on a GPU.
        n_epochs: epochs, at most.
        n_epochs_warmup: epochs over which the learning rate rises from 0.
        batch_size: rows per step.
        lr: the learning rate.
        lr_patience: epochs without a better validation score before the rate is halved.
        min_lr: lower bound of the rate when it is halved.
        early_stop: epochs without a better validation score that end training.
        grad_norm_clip: the norm at which gradients are clipped.
        ema_decay: of the average of the weights that is used after training.
        seed: of the initial weights, the validation rows, and the order of the others.
        device: ``'cpu'`` or ``'cuda'``; by default a GPU if there is one.
        verbose: whether to show a progress bar.

    These are the options of ``python bnaf.py --train``, with its defaults. Those that are None by
    default have the values of ``OWN_TABLES`` and ``BY_ROWS``; ``bnaf.py --help`` lists them.

    Attributes:
        model_: the ``BNAF``, in float64, of standardised rows.
        data_: a ``TableData`` without rows: the columns, their units and conditions.
        n_features_in_, feature_names_in_: the number of columns of the table, and their names.

    Errors are those of scikit-learn, and ``ValueError`` with a line that says what to do.
    """

    def __init__(
        self,
        condition: list[str | int] | None = None,
        columns: list[str | int] | None = None,
        drop: list[str | int] | None = None,
        dequantize: bool = False,
        n_flows: int = 5,
        n_hidden: int | None = None,
        hidden_dim: int | None = None,
        residual: str = 'gated',
        last_residual: str | None = None,
        checkpoint_grads: bool = False,
        no_cuda_graph: bool = False,
        n_epochs: int = 1000,
        n_epochs_warmup: float = 0.0,
        batch_size: int | None = None,
        lr: float | None = None,
        lr_patience: int | None = None,
        min_lr: float = 5e-4,
        early_stop: int | None = None,
        grad_norm_clip: float = 0.1,
        ema_decay: float = 0.998,
        seed: int = 0,
        device: str = '',
        verbose: bool = False,
    ) -> None:
        self.condition = condition
        self.columns = columns
        self.drop = drop
        self.dequantize = dequantize
        self.n_flows = n_flows
        self.n_hidden = n_hidden
        self.hidden_dim = hidden_dim
        self.residual = residual
        self.last_residual = last_residual
        self.checkpoint_grads = checkpoint_grads
        self.no_cuda_graph = no_cuda_graph
        self.n_epochs = n_epochs
        self.n_epochs_warmup = n_epochs_warmup
        self.batch_size = batch_size
        self.lr = lr
        self.lr_patience = lr_patience
        self.min_lr = min_lr
        self.early_stop = early_stop
        self.grad_norm_clip = grad_norm_clip
        self.ema_decay = ema_decay
        self.seed = seed
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: None = None) -> 'BNAFDensity':
        """Learn the density of the rows of a DataFrame or an array (N, D). Returns itself.

        Warns where the likelihood has no upper bound, as that of discrete columns.
        """
        with raise_value_errors():
            frame = input_frame(self, X, is_new=True)
            options = self.given_options()
            config = Config(**options)
            data = table_from_frame(
                frame,
                'X',
                config.seed,
                with_test=False,
                dequantize=config.dequantize,
                columns=config.columns,
                drop=config.drop,
                condition=config.condition,
            )
            for note in data.notes:
                warnings.warn(as_parameters(note), stacklevel=2)

            config = with_table_defaults(config, options, len(data.train))
            process = Process(0, 1, local_device(self.device, 0, 1, None))
            with BUILDING, torch.random.fork_rng(devices=[]):
                run = Training(config, data, process)
            self.checkpoint_ = train_in_memory(run, self.verbose)
            content = torch.load(io.BytesIO(self.checkpoint_), 'cpu', weights_only=True)
            self.use_checkpoint({**content, 'config': config, 'path': Path('X')})
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Return the log-likelihood of each row, in nats and in the units of the data, (N,).

        With conditions, it is that of the other columns given these.
        """
        rows = self.standardised_rows(X)
        return -self.losses(rows).numpy()

    def score(self, X: Any, y: None = None) -> float:
        """Return the sum of the log-likelihoods of all rows, as ``KernelDensity`` does."""
        return float(self.score_samples(X).sum())

    def explain(self, X: Any) -> Any:
        """Return which cells make rows unlikely: the gain of each cell in nats, (N, D).

        It is how far the log-likelihood of the row would rise if this cell alone had the best of
        the quantiles of its column in the training rows. The D columns are those of the density,
        ``data_.columns``, without conditions. It is a DataFrame if the model was fitted to one.
        """
        rows = self.standardised_rows(X)
        with raise_value_errors():
            gains = cell_gains(self.objective(), self.data_, rows, self.process())
        return self.as_input(frame_of_columns(dict(zip(self.data_.columns, gains.T))))

    def sample(self, n_samples: int = 1, given: Any = None, random_state: Any = None) -> Any:
        """Draw rows, as a DataFrame if the model was fitted to one with names, else as an array.

        Arguments:
            n_samples: how many; with conditions, for each row of them.
            given: the conditions, as a dict ``{'age': 40, 'sex': 'f'}`` or a DataFrame. They are
                part of the rows that are returned.
            random_state: None, a seed, or a ``numpy.random.RandomState``.
        """
        check_is_fitted(self)
        check_scalar(n_samples, 'n_samples', numbers.Integral, min_val=1)
        seed = check_random_state(random_state).randint(2**31 - 1)
        with raise_value_errors():
            conditions, context, n = None, None, n_samples
            if self.data_.conditions or given is not None:
                frame = condition_frame(given, self.data_.conditions)
                conditions, contexts = repeat_conditions(frame, self.data_.conditions, n, 'given')
                context = torch.from_numpy(contexts).to(next(self.model_.parameters()))
                n = len(conditions)

            generator = seeded_generator('cpu', Stream.SAMPLES, seed)
            x = self.model_.sample(n, generator=generator, context=context)
            values = self.data_.quantize(self.data_.to_own_units(x.cpu().numpy()))
            frame = frame_of_rows(values, self.data_, conditions)
        return self.as_input(frame)

    def save(self, path: str | Path) -> None:
        """Save the model as a checkpoint, which ``bnaf.py --restore_file=PATH`` reads too."""
        check_is_fitted(self)
        path = Path(path)
        with raise_value_errors():
            if path.is_dir() or not path.parent.is_dir():
                raise UserError(f'{path} is a folder, or in none: give the name of a new file')
            write_atomically(path, lambda temporary: temporary.write_bytes(self.checkpoint_))

    @classmethod
    def load(cls, path: str | Path, device: str = '') -> 'BNAFDensity':
        """Return the fitted estimator of a checkpoint, one that ``bnaf.py`` wrote included.

        Its parameters are those of the training, as if all had been given.
        """
        with raise_value_errors():
            saved = load_checkpoint(Path(path))
            config = saved['config']
            if config.dataset in ENERGIES:
                raise UserError(f'{path} is a model of the energy {config.dataset}, not of rows')
            names = set(cls._get_param_names()) & set(asdict(config))
            estimator = cls(**{name: getattr(config, name) for name in names}, device=device)
            estimator.checkpoint_ = Path(path).read_bytes()
            estimator.use_checkpoint(saved)
        return estimator

    # What these methods are made of

    def given_options(self) -> dict[str, Any]:
        """Return the parameters that are options of a training.

        Those that depend on the table are left out where they are None. Raises ``UserError`` for a
        parameter of another type than its option.
        """
        if self.device not in ('', 'cpu', 'cuda'):
            raise UserError(f"device={self.device!r} is none of '', 'cpu' and 'cuda'")
        options: dict[str, Any] = {'dataset': ''}
        for field in dataclasses.fields(Config):
            if not hasattr(self, field.name):
                continue
            value = getattr(self, field.name)
            if value is not None or field.name not in TABLE_OPTIONS:
                options[field.name] = as_option(field, value)
        return options

    def use_checkpoint(self, saved: dict[str, Any]) -> None:
        """Take the model and the units from the content of a checkpoint."""
        device = local_device(self.device, 0, 1, None)
        self.data_ = table_from_units(saved['units'], *saved['input_dims'], saved['path'])
        with BUILDING, torch.random.fork_rng(devices=[]):
            self.model_ = restore_model(saved, device).double()
        self.n_features_in_ = len(self.data_.features)
        if not is_unnamed(self.data_.features):
            self.feature_names_in_ = np.array(self.data_.features, dtype=object)

    def as_input(self, frame: Any) -> Any:
        """Return a table as a DataFrame if the model was fitted to one, else as an array."""
        return frame if hasattr(self, 'feature_names_in_') else frame.to_numpy()

    def standardised_rows(self, X: Any) -> np.ndarray:
        """Return rows in the units of the model, with their encoded conditions."""
        check_is_fitted(self)
        with raise_value_errors():
            frame = input_frame(self, X)
            return rows_of_frame(frame, self.data_, 'X', np.float64)

    def losses(self, rows: np.ndarray) -> Tensor:
        """Return minus the log-likelihood of each standardised row."""
        return row_losses(self.objective(), rows, self.process())

    def objective(self) -> Objective:
        """Return the objective of the model."""
        return Objective(self.model_, self.data_)

    def process(self) -> Process:
        """Return this process, and the device that the model is on."""
        return Process(0, 1, next(self.model_.parameters()).device)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: a model on a GPU is brought to the CPU."""
        state = dict(super().__getstate__())
        if 'model_' in state:
            state['model_'] = copy.deepcopy(state['model_']).cpu()
        return state


def train_in_memory(run: Training, is_shown: bool) -> bytes:
    """Train to the end. Returns the checkpoint with the best validation score.

    Raises ``UserError`` where it diverges.
    """
    n_steps = math.ceil(run.config.n_epochs * run.n_per_epoch / run.n_per_step)
    best = io.BytesIO()
    with progress_bar(total=n_steps, unit='step', disable=not is_shown) as bar:
        while run.n_seen < run.n_to_see:
            run.take_step()
            bar.update()
            if not is_validation_due(run):
                continue

            run.validate(None)
            is_stuck = int(run.skips_in_a_row) > Request.max_skips
            if is_stuck or not math.isfinite(run.validation_loss):
                raise UserError(f'training diverged at step {run.step}: fit again with a lower lr')
            bar.set_postfix_str(format_score(run.config, run.validation_loss), refresh=False)
            if run.validation_loss < run.best:
                run.best = run.validation_loss
                best = io.BytesIO()
                torch.save(CHECKPOINT.content(run), best)
    return best.getvalue()


def as_option(field: dataclasses.Field, value: Any) -> Any:
    """Return a parameter with the type of its option, if it is of the same kind.

    A list of columns may be any sequence, or a single column.
    """
    if field.type is list and value is not None:
        return [str(item) for item in np.atleast_1d(np.array(value, dtype=object)).tolist()]
    kinds = {bool: (bool, np.bool_), int: numbers.Integral, float: numbers.Real}
    is_flag = isinstance(value, (bool, np.bool_))
    if field.type in kinds and isinstance(value, kinds[field.type]):
        return field.type(value) if is_flag == (field.type is bool) else value
    return value


@contextlib.contextmanager
def raise_value_errors() -> Iterator[None]:
    """Raise ``UserError`` as ``ValueError``, which users of scikit-learn expect."""
    try:
        yield
    except UserError as error:
        raise ValueError(as_parameters(str(error))) from error


def as_parameters(text: str) -> str:
    """Return a text in which options are parameters: ``--drop=a,b`` becomes ``drop=['a', 'b']``."""

    def as_list(match: re.Match) -> str:
        words = match[2].strip("'").split(',')
        return f'{match[1]}={words}'

    value = r"('[^']*'|[^\s',:]+(?:,[^\s',:]+)*)"
    text = re.sub(rf'--(columns|drop|condition)={value}', as_list, text)
    return text.replace('] condition=', '], condition=').replace('--', '')


if __name__ == '__main__':
    main()
