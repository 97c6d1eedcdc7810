"""What speed.py compares: our models and the peers', behind one interface.

A shape is a dict of numbers, as ``Config`` names them: of images for Glow, of rows for BNAF. A
variant names options of a script, such as ``'bf16 compile'``; ``'float32'`` stands for none. On a
GPU the steps of a variant are captured, unless it is called ``'eager'``.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import bnaf
import glow
from datasets import ImageData, ImageSplit
from datasets.tabular import TableData

SCRIPTS = {'glow': glow, 'bnaf': bnaf}
# Ratios are to the first peer of a script; the others give context.
PEERS = {'glow': ('normflows',), 'bnaf': ('pyro', 'zuko')}
# The option that each word of a variant sets.
OPTIONS = {
    'bf16': 'bf16',
    'compile': 'compile',
    'checkpoint_grads': 'checkpoint_grads',
    'eager': 'no_cuda_graph',
}
# So low that the weights hardly move: the model timed last is the model timed first.
LEARNING_RATE = 1e-5


@dataclass
class Contender:
    """A model and what is timed of it; no function takes an argument."""

    model: nn.Module
    step: Callable  # a whole training step
    evaluate: Callable  # log-densities of one batch
    sample: Callable  # as many samples as the batch has
    objective: Callable  # the loss alone, whose FLOPs are counted


def make_contender(script: str, shape: dict, name: str, device: torch.device) -> Contender:
    """Build a peer or a variant of ours, ready to be timed."""
    if name in PEERS[script]:
        return make_peer(script, shape, name, device)
    return make_own(script, shape, name, device)


def is_installed(peer: str) -> bool:
    """Say whether a peer's package can be imported."""
    try:
        importlib.import_module(peer)
    except ImportError:
        return False
    return True


def has_options(script: str, variant: str) -> bool:
    """Say whether a script has all options of a variant."""
    return all(hasattr(SCRIPTS[script].Config, option) for option in options_of(variant))


def options_of(variant: str) -> list[str]:
    """Return the options of ``Config`` that a variant sets."""
    return [OPTIONS[word] for word in variant.split() if word in OPTIONS]


def count_parameters(model: nn.Module) -> int:
    """Count the parameters that a model uses, if it says so, else those that it stores."""
    if hasattr(model, 'n_parameters'):
        return model.n_parameters
    return sum(parameter.numel() for parameter in model.parameters())


def make_config(script: str, shape: dict, variant: str) -> glow.Config | bnaf.Config:
    """Return the script's configuration of a shape and a variant."""
    values = {name: value for name, value in shape.items() if name != 'data_dim'}
    values |= {option: True for option in options_of(variant)}
    if script == 'glow':
        # A larger batch would set the peak memory of small models.
        values['batch_size_init'] = shape['batch_size']
    return SCRIPTS[script].Config(**values, lr=LEARNING_RATE)


def input_dims(script: str, shape: dict) -> list[int]:
    """Return the dimensions of one image or row, and of what it is given: nothing."""
    if script == 'glow':
        return [3, shape['image_size'], shape['image_size'], 0]
    return [shape['data_dim'], 0]


def build_bare_model(script: str, shape: dict, name: str) -> nn.Module:
    """Build the model of a peer or of a variant of ours, without its data and optimizer."""
    if name == 'normflows':
        return build_normflows_glow(**shape)
    if name == 'pyro':
        return PyroBNAF(**shape)
    if name == 'zuko':
        return ZukoNAF(**shape)
    config = make_config(script, shape, name)
    return SCRIPTS[script].build_model(config, input_dims(script, shape))


# -------------------------------------------------------------------------------------------- ours


def random_values(script: str, shape: dict, n: int) -> np.ndarray:
    """Draw ``n`` images (uint8) or rows (float32) of noise, the same at every call."""
    rng = np.random.default_rng(0)
    *dims, _ = input_dims(script, shape)
    if script == 'glow':
        return rng.integers(0, 256, (n, *dims), dtype=np.uint8)
    return rng.normal(size=(n, *dims)).astype(np.float32)


def as_image_data(images: np.ndarray) -> ImageData:
    """Return a data set whose three splits are the same images, without attributes."""
    split = ImageSplit(images, np.zeros((len(images), 0), bool))
    n_values = math.prod(images.shape[1:])
    return ImageData(split, split, split, (), n_values, fingerprint='')


def as_table_data(rows: np.ndarray, n_test: int) -> TableData:
    """Return a table to train on ``rows``, validated and tested on the first ``n_test``."""
    dim = rows.shape[1]
    columns = tuple(f'x{i}' for i in range(dim))
    units = dict(mean=np.zeros(dim), std=np.ones(dim))
    test = rows[:n_test]
    return TableData(rows, test, test, columns, **units)


def make_own(script: str, shape: dict, variant: str, device: torch.device) -> Contender:
    """Set up the script's own training on noise held in memory.

    Its step is all of ``take_step``, from the choice of the batch to Polyak's average.
    """
    n = shape['batch_size']
    values = random_values(script, shape, 4 * n)
    data = as_image_data(values) if script == 'glow' else as_table_data(values, n_test=n)

    config = make_config(script, shape, variant)
    process = SCRIPTS[script].Process(0, 1, device)
    run = SCRIPTS[script].Training(config, data, process)
    if script == 'glow':
        objective = glow.Objective(run.model, data.n_values)
    else:
        objective = bnaf.Objective(run.model, data)

    x = torch.from_numpy(values[:n]).to(device)
    is_bf16 = 'bf16' in variant.split()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)
    return Contender(
        model=run.model,
        step=run.take_step,
        evaluate=autocast(lambda: run.model.log_prob(x)),
        sample=autocast(lambda: run.model.sample(n)),
        objective=lambda: objective(x),
    )


@torch.no_grad()
def invert_by_bisection(
    model: Sequence[nn.Module],
    z: torch.Tensor,
    tol: float = 1e-5,
    reach: float = 8.0,
) -> torch.Tensor:
    """Invert a BNAF in the obvious way, flow after flow and variable after variable.

    Each step of a bisection is a forward pass of a whole flow. Roots beyond ±``reach`` are not
    found.
    """
    for flow in reversed(model):
        if isinstance(flow, bnaf.BlockFlow):
            z = bisect_flow(flow, z, tol, reach)
        else:
            z = flow.inverse(z)[0]
    return z


def bisect_flow(
    flow: bnaf.BlockFlow,
    z: torch.Tensor,
    tol: float,
    reach: float,
) -> torch.Tensor:
    """Solve ``flow(x) = z`` for x (B, D), one variable at a time."""
    n_steps = math.ceil(math.log2(reach / tol))
    x = torch.zeros_like(z)
    for i in range(z.shape[1]):
        low = torch.full_like(z[:, i], -reach)
        high = torch.full_like(z[:, i], reach)
        for _ in range(n_steps):
            x[:, i] = (low + high) / 2
            is_above = flow(x)[0][:, i] > z[:, i]
            low = torch.where(is_above, low, x[:, i])
            high = torch.where(is_above, x[:, i], high)
        x[:, i] = (low + high) / 2
    return x


# ----------------------------------------------------------------------------------------- peers


def make_peer(script: str, shape: dict, peer: str, device: torch.device) -> Contender:
    """Set up a peer's model with the usual training step, on one batch of noise."""
    x = torch.from_numpy(random_values(script, shape, shape['batch_size'])).to(device)
    if script == 'glow':
        # Dequantized once, ahead of all steps: normflows leaves this to its users.
        x = (x + torch.rand(x.shape, device=device)) / 256 - 0.5

    model = build_bare_model(script, shape, peer).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    max_norm = SCRIPTS[script].Config.grad_norm_clip

    def log_prob():
        return model.log_prob(x, None) if peer == 'normflows' else model.log_prob(x)

    def objective():
        return -log_prob().mean()

    def step():
        optimizer.zero_grad()
        objective().backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()

    return Contender(model, step, log_prob, lambda: model.sample(len(x)), objective)


def build_normflows_glow(
    image_size: int, n_levels: int, depth: int, width: int, **_: int
) -> nn.Module:
    """Build normflows' Glow of ``n_levels + 1`` levels, in its order: the coarsest first."""
    import normflows

    bases, merges, flows = [], [], []
    for level in range(n_levels, -1, -1):
        n_channels = 3 * 2 ** (level + 2)
        size = image_size // 2 ** (level + 1)
        blocks = [
            normflows.flows.GlowBlock(n_channels, width, net_actnorm=True) for _ in range(depth)
        ]
        flows.append([*blocks, normflows.flows.Squeeze()])

        n_latents = n_channels
        if level < n_levels:
            merges.append(normflows.flows.Merge())
            n_latents = n_channels // 2
        bases.append(normflows.distributions.GlowBase((n_latents, size, size)))
    return normflows.MultiscaleFlow(bases, flows, merges, class_cond=False)


class PyroBNAF(nn.Module):
    """Pyro's BlockAutoregressive flows from rows to noise, the variables flipped between them."""

    def __init__(self, data_dim: int, n_flows: int, n_hidden: int, hidden_dim: int, **_: int):
        super().__init__()
        from pyro.distributions.transforms import block_autoregressive

        self.flows = nn.ModuleList()
        for k in range(n_flows):
            residual = 'gated' if k < n_flows - 1 else None
            factors = [hidden_dim] * (n_hidden + 1)
            self.flows.append(
                block_autoregressive(data_dim, hidden_factors=factors, residual=residual)
            )

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Return the log-density (B,) of rows (B, D)."""
        x = x.clone()  # Pyro's cache knows a tensor by its identity: every batch is to be new
        logdet = 0
        for flow in self.flows:
            z = flow(x)
            logdet = logdet + flow.log_abs_det_jacobian(x, z)
            x = z.flip(1)
        return bnaf.log_normal(x) + logdet


class ZukoNAF(nn.Module):
    """zuko's neural autoregressive flow, its conditioners as wide as BNAF's hidden layers.

    It is another algorithm for the same task.
    """

    def __init__(self, data_dim: int, n_flows: int, n_hidden: int, hidden_dim: int, **_: int):
        super().__init__()
        import zuko

        width = data_dim * hidden_dim
        self.flow = zuko.flows.NAF(data_dim, transforms=n_flows, hidden_features=(width, width))

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Return the log-density (B,) of rows (B, D)."""
        return self.flow().log_prob(x)
