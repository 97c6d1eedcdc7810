"""The precision of products in float32."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Compute matrix products and convolutions of float32 in float32.

    GPUs since Ampere round the operands of convolutions to TF32, with 10 bits of mantissa, unless
    they are told otherwise. Matrix products are rounded where the user or a container asks for it.
    """
    flags = tf32_flags()
    before = [getattr(backend, name) for backend, name, _ in flags]
    try:
        for backend, name, value in flags:
            setattr(backend, name, value)
        yield
    finally:
        for (backend, name, _), value in zip(flags, before):
            setattr(backend, name, value)


def tf32_flags() -> list[tuple[Any, str, Any]]:
    """Return the flags that allow TF32: (backend, name, value without TF32).

    From torch 2.9 on there are two sets of them. After the newer one was used, reading the older
    one may raise ``RuntimeError``, and setting it may have no effect.
    """
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    flags = [(cudnn, 'allow_tf32', False), (matmul, 'allow_tf32', False)]
    try:
        for backend, name, _ in flags:
            getattr(backend, name)
        is_older_set_in_use = getattr(cudnn, 'fp32_precision', 'none') == 'none'
    except RuntimeError:
        is_older_set_in_use = False

    if is_older_set_in_use:
        return flags
    return [(cudnn.conv, 'fp32_precision', 'ieee'), (matmul, 'fp32_precision', 'ieee')]
