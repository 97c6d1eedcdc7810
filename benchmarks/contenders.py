"""What is measured, ours and the peers' behind one interface: models of one shape, their training steps, densities and
samples. A shape is a dict of numbers: of images, or of rows."""

import importlib
from dataclasses import dataclass
from functools import partial
from typing import Callable

import numpy as np
import torch
from torch import nn

import bnaf
import glow
from datasets import ImageData, ImageSplit
from datasets.tabular import TableData

SCRIPTS = {'glow': glow, 'bnaf': bnaf}
PEERS = {
    'glow': ('normflows',),
    'bnaf': ('pyro', 'zuko'),
}  # the first is who the ratios are to, the others context
LR = 1e-5  # the weights hardly move: what is timed at the end is what was timed at first
OPTIONS = ('bf16', 'compile', 'checkpoint_grads')


@dataclass
class Contender:
    model: nn.Module
    step: Callable  # the whole training step
    evaluate: Callable  # log-densities of the same batch
    sample: Callable  # as many samples
    objective: Callable  # the loss alone, whose FLOPs are counted


def is_installed(peer):
    try:
        importlib.import_module(peer)
    except ImportError:
        return False
    return True


def offered(script, variant):
    """Whether a script has the options of a variant, such as 'bf16 compile'; 'float32' needs none"""
    return all(
        hasattr(SCRIPTS[script].Config, option) for option in OPTIONS if option in variant.split()
    )


def config_of(script, shape, variant):
    names = {key: value for key, value in shape.items() if key != 'data_dim'}
    options = {option: True for option in OPTIONS if option in variant.split()}
    if script == 'glow':
        names['batch_size_init'] = shape[
            'batch_size'
        ]  # a larger one would be the peak of small models' memory
    return SCRIPTS[script].Config(**names, **options, lr=LR)


def input_dims(script, shape):
    return (
        (3, shape['image_size'], shape['image_size']) if script == 'glow' else [shape['data_dim']]
    )


def build(script, shape, name):
    """-> the bare model, of a peer or of our variant"""
    if name == 'normflows':
        return normflows_glow(**shape)
    if name == 'pyro':
        return PyroBNAF(**shape)
    if name == 'zuko':
        return ZukoNAF(**shape)
    return SCRIPTS[script].build_model(config_of(script, shape, name), input_dims(script, shape))


def contend(script, shape, name, device):
    """-> the Contender of a peer or of our variant"""
    return (theirs if name in PEERS[script] else ours)(script, shape, name, device)


def noise(script, shape, n):
    rng = np.random.default_rng(0)
    if script == 'glow':
        return rng.integers(0, 256, (n, *input_dims(script, shape)), dtype=np.uint8)
    return rng.normal(size=(n, shape['data_dim'])).astype(np.float32)


def ours(script, shape, variant, device):
    """The script's own Training on noise that lies in memory: take_step, from the batch's choice to Polyak's average"""
    n, dims = shape['batch_size'], input_dims(script, shape)
    values = noise(script, shape, 4 * n)
    process = SCRIPTS[script].Process(0, 1, device)
    if script == 'glow':
        part = ImageSplit(values, np.zeros((len(values), 0), bool))
        data = ImageData(part, part, part, (), values[0].size, 0, '')
    else:
        columns = tuple(f'x{i}' for i in range(*dims))
        data = TableData(values, values[:n], values[:n], columns, np.zeros(dims), np.ones(dims))
    run = SCRIPTS[script].Training(config_of(script, shape, variant), data, process)
    x = torch.from_numpy(values[:n]).to(device)
    objective = (
        glow.BitsPerDim(run.model, data.n_values)
        if script == 'glow'
        else bnaf.Objective(run.model, data)
    )
    precision = partial(
        torch.autocast, device.type, torch.bfloat16, enabled='bf16' in variant.split()
    )
    return Contender(
        run.model,
        run.take_step,
        precision()(lambda: run.model.log_prob(x)),
        precision()(lambda: run.model.sample(n)),
        lambda: objective(x),
    )


def theirs(script, shape, peer, device):
    n = shape['batch_size']
    x = torch.from_numpy(noise(script, shape, n)).to(device)
    if script == 'glow':
        x = (
            x + torch.rand(x.shape, device=device)
        ) / 256 - 0.5  # once: theirs get their images dequantized
    model = build(script, shape, peer).to(device)
    log_prob = (
        (lambda: model.log_prob(x, None)) if peer == 'normflows' else (lambda: model.log_prob(x))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    clip = SCRIPTS[script].Config.grad_norm_clip

    def step():
        optimizer.zero_grad()
        (-log_prob().mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    return Contender(model, step, log_prob, lambda: model.sample(n), lambda: -log_prob().mean())


# ----------------------------------------------------------------------------------------------------- the peers


def normflows_glow(image_size, n_levels, depth, width, **_):
    """normflows' Glow of n_levels + 1 levels, in its order: the coarsest first"""
    import normflows

    base, merges, flows = [], [], []
    for level in range(n_levels, -1, -1):
        c, size = 3 * 2 ** (level + 2), image_size // 2 ** (level + 1)
        flows.append(
            [
                *(normflows.flows.GlowBlock(c, width, net_actnorm=True) for _ in range(depth)),
                normflows.flows.Squeeze(),
            ]
        )
        if level < n_levels:
            merges.append(normflows.flows.Merge())
        base.append(
            normflows.distributions.GlowBase((c if level == n_levels else c // 2, size, size))
        )
    return normflows.MultiscaleFlow(base, flows, merges, class_cond=False)


class PyroBNAF(nn.Module):
    """Pyro's BlockAutoregressive flows from rows to noise, the variables flipped between them"""

    def __init__(self, data_dim, n_flows, n_hidden, hidden_dim, **_):
        super().__init__()
        from pyro.distributions.transforms import block_autoregressive

        self.flows = nn.ModuleList(
            block_autoregressive(
                data_dim,
                hidden_factors=[hidden_dim] * (n_hidden + 1),
                residual='gated' if k < n_flows - 1 else None,
            )
            for k in range(n_flows)
        )

    def log_prob(self, x):
        x, logdet = x.clone(), 0  # its cache goes by identity: every batch is a new tensor
        for flow in self.flows:
            z = flow(x)
            logdet = logdet + flow.log_abs_det_jacobian(x, z)
            x = z.flip(1)
        return bnaf.log_normal(x) + logdet


class ZukoNAF(nn.Module):
    """zuko's neural autoregressive flow: another algorithm, its conditioners as wide as BNAF's hidden layers"""

    def __init__(self, data_dim, n_flows, n_hidden, hidden_dim, **_):
        super().__init__()
        import zuko

        self.flow = zuko.flows.NAF(
            data_dim, transforms=n_flows, hidden_features=(data_dim * hidden_dim,) * 2
        )

    def log_prob(self, x):
        return self.flow().log_prob(x)


@torch.no_grad()
def bisect(model, z, tol=1e-5, reach=8.0):
    """The obvious inverse of a BNAF: flow after flow and variable after variable, bisection by whole forward passes"""
    for flow in reversed(model):
        if not isinstance(flow, bnaf.BlockFlow):
            z = flow.inverse(z)[0]
            continue
        x = torch.zeros_like(z)
        for i in range(z.shape[1]):
            low, high = torch.full_like(z[:, i], -reach), torch.full_like(z[:, i], reach)
            for _ in range(int(np.ceil(np.log2(reach / tol)))):
                x[:, i] = (low + high) / 2
                above = flow(x)[0][:, i] > z[:, i]
                low, high = torch.where(above, low, x[:, i]), torch.where(above, x[:, i], high)
            x[:, i] = (low + high) / 2
        z = x
    return z
