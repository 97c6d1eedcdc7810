"""Training steps that a GPU replays as a whole: CUDA graphs.

A step of many small kernels is bound by the time that the CPU takes to launch them. A CUDA graph
is launched at once: the kernels are recorded, with the addresses of what they read and write, and
replayed with new values at these addresses.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from .devices import scales_gradients
from .errors import UserError
from .interfaces import Process

Step = Callable[..., tuple[Tensor, ...]]
N_WARMUP = 3  # steps in which libraries choose their kernels, and the optimizer makes its state


def can_capture(process: Process, optimizer: Optimizer) -> bool:
    """Return whether the steps of a training can be captured: those of a single GPU.

    Several processes wait for each other within a step. Anomaly detection waits for the GPU, and
    so does clipping for an optimizer that is not fused.
    """
    is_single_gpu = process.device.type == 'cuda' and process.world_size == 1
    first_group, *others = optimizer.param_groups
    is_supported = scales_gradients(optimizer) and 'capturable' in first_group and not others
    return is_single_gpu and is_supported and not torch.is_anomaly_enabled()


class CapturedStep:
    """A training step that is captured as a CUDA graph, and from then on replayed.

    It gives the results of the step itself. The first ``N_WARMUP`` calls are steps as they are;
    the next one captures. What a call returns is overwritten by the next call.

    Arguments:
        step: maps tensors, which have the same shapes at each call, to tensors. It must not make
            the CPU wait for the GPU, nor draw random numbers.
        optimizer: the fused optimizer by which it changes weights. Its learning rate may change
            from call to call.
    """

    def __init__(self, step: Step, optimizer: Optimizer) -> None:
        self.step, self.optimizer = step, optimizer
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None
        self.n_calls = 0

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.n_calls += 1
        if self.n_calls <= N_WARMUP:
            return self.warm_up(inputs)
        if self.graph is None:
            self.graph = self.capture(inputs)
        return self.replay(self.graph, inputs)

    def warm_up(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Take a step as it is, but on a stream of its own, as torch asks for before a capture."""
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def capture(self, inputs: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        """Record the kernels of a step as a graph, without running them.

        Raises ``UserError`` where the step makes the CPU wait for the GPU, and
        ``OutOfMemoryError`` where the graph's own memory does not fit.
        """
        self.inputs = [value.clone() for value in inputs]
        self.lr = torch.zeros((), device=inputs[0].device)
        self.optimizer.zero_grad()  # so that gradients get addresses that belong to the graph
        gc.collect()  # what is freed during the capture would break it
        graph = torch.cuda.CUDAGraph()
        try:
            with read_rate_from(self.lr, self.optimizer), torch.cuda.graph(graph):
                self.outputs = self.step(*self.inputs)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                'the training step cannot be captured as a CUDA graph: add --no_cuda_graph'
            ) from error
        return graph

    def replay(self, graph: torch.cuda.CUDAGraph, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the recorded kernels on new inputs, at the present learning rate."""
        for own, value in zip(self.inputs, inputs):
            own.copy_(value)
        self.lr.fill_(self.optimizer.param_groups[0]['lr'])
        graph.replay()
        return self.outputs


@contextlib.contextmanager
def read_rate_from(lr: Tensor, optimizer: Optimizer) -> Iterator[None]:
    """Inside, an optimizer reads its learning rate from a tensor, and can be captured.

    Its own options do not change, so that a checkpoint does not tell how its steps were run.
    """
    (group,) = optimizer.param_groups
    options = {name: group[name] for name in ('lr', 'capturable')}
    group.update(lr=lr, capturable=True)
    try:
        yield
    finally:
        group.update(options)
