"""Polyak's average of the weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """A copy of a model, whose parameters are the exponential moving average of the model's.

    After n updates the average decays by min(``decay``, (1 + n) / (10 + n)), so that it soon
    forgets the first weights. The first update copies them. Buffers are those of the model when
    it was copied.

    Arguments:
        model: the model.
        decay: what the average is multiplied by at each update, in the long run.
        n_batches: how many updates each update counts for. With twice as many processes as
            a training began with, one step stands for two.
    """

    def __init__(self, model: nn.Module, decay: float, n_batches: float = 1.0) -> None:
        super().__init__(model, device=next(model.parameters()).device)
        self.decay, self.n_batches = decay, n_batches
        self.averages: list[Tensor] = list(self.module.parameters())
        self.values: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, is_skipped: Tensor) -> None:
        """Move the average towards the model, unless ``is_skipped``, a tensor of one bool.

        The CPU does not read the tensor, and so does not wait for a GPU.
        """
        n = self.n_averaged.double()
        decay = ((1 + n) / (10 + n)).clamp(max=self.decay) ** self.n_batches
        weight = torch.where(n == 0, 1.0, 1 - decay)
        weight = torch.where(is_skipped, 0.0, weight).to(self.averages[0].dtype)
        self.n_averaged += ~is_skipped

        if not weight.is_cuda:
            torch._foreach_lerp_(self.averages, self.values, [weight] * len(self.values))
            return
        # on a GPU the function above takes a kernel for each tensor, these one for many
        differences = list(torch._foreach_sub(self.values, self.averages))
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(self.averages, differences)
