"""Jacobian products that pass through attention, and the tensors behind a result.

Fused scaled-dot-product attention has no forward-mode derivative and no second derivative, and the inference fast
path of ``nn.TransformerEncoderLayer`` has none at all. The two products here run the function with torch's plain
matrix-product kernel, which has both.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["jvp", "tensors_behind", "vjp"]


def jvp(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Value and directional derivative of ``function``, by forward mode."""
    # Forward mode refuses an expanded tensor.
    primals = tuple(primal.contiguous() for primal in primals)
    with _differentiable_attention():
        value, derivative = torch.func.jvp(function, primals, tangents)  # type: ignore[misc]
    return value, derivative


def vjp(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]], Tensor]:
    """Value of ``function``, its transposed Jacobian as a function, differentiable again, and a by-product.

    ``function`` returns value and by-product; only the value is differentiated.
    """
    with _differentiable_attention():
        value, pullback, byproduct = torch.func.vjp(function, z, has_aux=True)  # type: ignore[misc]
    return value, pullback, byproduct


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def tensors_behind(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cond: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Every tensor, besides ``inputs``, whose gradient an adjoint equation for ``outputs`` has to find.

    Args:
        outputs: tensors with a graph.
        inputs: leaves that are left out.
        cond: tensors of the conditioning; they stand for everything that they were computed from.
    """
    given = [value for value in cond if value.requires_grad]
    queue, found = [output.grad_fn for output in outputs if output.requires_grad], dict[int, Tensor]()
    seen = {id(tensor.grad_fn) for tensor in given if tensor.grad_fn is not None}
    while queue:
        node = queue.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        queue.extend(following for following, _ in node.next_functions)
    known = {id(tensor) for tensor in (*inputs, *given)}
    return (*given, *(leaf for key, leaf in found.items() if key not in known))
