"""Jacobian products that pass through any network that autograd can differentiate, and the tensors behind a result.

.. math::
    w^\\top J = \\frac{\\partial\\, w^\\top f(z)}{\\partial z}, \\qquad
    J u = \\frac{\\partial}{\\partial w}\\, (w^\\top J)\\, u .

``torch.func`` is the fastest way to both, and the one that composes. It cannot pass an ``autograd.Function`` without
``setup_context``, nor hooks on saved tensors, which activation checkpointing sets, nor most compiled code; ``vmap``
cannot pass a ``Function`` without a rule for it; LSTMs and batch statistics have no forward mode. :class:`Derivatives`
tries other ways there, and keeps to the first that works. The values are the same.

Fused scaled-dot-product attention has no forward-mode derivative and no second derivative, and the inference fast
path of ``nn.TransformerEncoderLayer`` has none at all. All products here run the function with torch's plain
matrix-product kernel, which has both.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ndm_ct._core.checks import sum_event
from ndm_ct._core.errors import PredictorError
from ndm_ct._core.precision import resolution

__all__ = ["WAYS", "Derivatives", "slope_along", "tensors_behind"]

Function = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A state to a value and a by-product; only the value is differentiated."""

Use = Callable[[Tensor, Tensor], Tensor]
"""What is kept of a covector w and its product :math:`w^\\top J`."""

WAYS = ("torch.func", "batched autograd", "autograd", "backward")
"""``torch.func.vjp``; ``torch.autograd.grad`` for several covectors at a time; the same, one by one; ``backward``, one
by one, for ``checkpoint(use_reentrant=True)``, which ``torch.autograd.grad`` cannot pass."""


_STEPS = (2.0**-8, 2.0**-6)
"""Steps of finite differences, in t and in units of the state's size."""

_SHARE = 0.1
"""Relative error of a derivative that is reported."""


class Derivatives:
    """Products with the Jacobian of one network, in the first way that can pass it.

    Args:
        network: the module whose parameters are kept from gradients by the way "backward". None keeps none.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        self.network, self.way, self.forward_mode, self.twice = network, WAYS[0], True, False

    def vjps(
        self, function: Function, z: Tensor, covectors: Tensor, use: Use, *, chunk: int | None = 1
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Products :math:`w^\top J` of the Jacobian with covectors.

        Returned are the value of ``function``; what ``use`` keeps of each product, ``(K, ...)``; and the by-product.
        With gradients enabled all three keep their graph.

        Args:
            function: the function.
            z: where it is evaluated, ``(B, *E)``.
            covectors: w, ``(K, B, *E)``.
            use: what is kept of w and :math:`w^\top J`.
            chunk: covectors at a time; None is all. 1 is one by one, without vmap.

        Raises:
            PredictorError: gradients are enabled, and the network has no second derivative.
            Exception: as the function raises it, or torch for a function without a derivative.
        """
        if torch.is_grad_enabled() and not self.twice:
            self._validate_twice(function, z)
        chunk = len(covectors) if chunk is None else chunk
        failures: dict[str, Exception] = {}
        for way in self._ways():
            try:
                with _differentiable_attention():
                    found = self._found(way, function, z, covectors, use, chunk)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                failures[way] = error
            else:
                self.way = way
                return found
        # What plain autograd says of a network is in words that its author knows.
        raise failures.get("autograd") or failures[way]

    def _validate_twice(self, function: Function, z: Tensor) -> None:
        r"""Raise unless products are differentiable themselves, once per network.

        The form :math:`q = w^\top J u` is linear in w, so :math:`w^\top \partial q/\partial w = q`. A ``backward`` that
        autograd cannot look into breaks the identity. One that has saved what is neither input nor output has no
        derivative there: :math:`\partial q/\partial z` is not that of a finite difference.
        """
        self.twice = True
        z = z.detach().requires_grad_()
        u = torch.linspace(0.5, 1.5, z[:1].numel()).reshape(z[:1].shape).to(z).expand_as(z)
        w = u.flip(0).square().requires_grad_()
        direction, eps = u * z.detach().square().mean().sqrt(), resolution(self.network, torch.float32)

        def form(z: Tensor) -> Tensor:
            return self.vjps(function, z, w[None], lambda _, product: sum_event(product * u))[1][0]

        q = form(z)
        try:
            in_w, in_z = torch.autograd.grad(q.sum(), (w, z), materialize_grads=True)
        except RuntimeError:
            in_w = in_z = torch.full_like(z, torch.nan)
        slope, allowed = slope_along(lambda step: form(z + step * direction).detach(), q.detach(), eps)
        linear = torch.allclose(sum_event(w * in_w), q, rtol=max(1e-3, 30.0 * eps))
        self.twice = linear and bool(((sum_event(in_z * direction) - slope).abs() <= allowed).all())
        if not self.twice:
            raise PredictorError(
                "a layer of the network has no second derivative, on which the gradient of a divergence depends; write "
                "its backward() in differentiable operations of torch that use its inputs or outputs, or leave "
                "differentiable out."
            )

    def _ways(self) -> list[str]:
        """The ways to try. Where a graph is wanted, "backward" leaves none, and a batch hides a missing derivative."""
        first = WAYS.index(self.way)
        if torch.is_grad_enabled():
            return ["torch.func", "autograd"][min(first, 1) :]
        return list(WAYS[first:])

    def _found(
        self, way: str, function: Function, z: Tensor, covectors: Tensor, use: Use, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        if way == "torch.func":
            return _by_functions(function, z, covectors, use, chunk)
        if way == "backward":
            return _by_backward(self.network, function, z, covectors, use)
        return _by_autograd(function, z, covectors, use, chunk if way == "batched autograd" else 1)

    def jvp(
        self, function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Value and directional derivative of ``function``, by forward mode, or where a layer has none twice backwards.

        Args:
            function: the function.
            primals: its arguments.
            tangents: the direction, one tensor for each argument.

        Raises:
            Exception: as the function raises it, or torch for a function with neither derivative.
        """
        # Forward mode refuses an expanded tensor.
        primals = tuple(primal.contiguous() for primal in primals)
        with _differentiable_attention():
            try:
                if self.forward_mode:
                    value, derivative = torch.func.jvp(function, primals, tangents)  # type: ignore[misc]
                    return value, derivative
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                try:
                    found = _twice_backwards(function, primals, tangents)
                except Exception:
                    raise error from None
                self.forward_mode = False
                return found
            return _twice_backwards(function, primals, tangents)


def slope_along(function: Callable[[float], Tensor], value: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The derivative at 0 of a function of a number, float64, and how far off it may be in each row, by differences.

    Args:
        function: the function.
        value: its value at 0, shape ``(B, ...)``.
        eps: the relative rounding of its values.
    """
    step, longer = _STEPS
    up, down = function(step).double() - value.double(), value.double() - function(-step).double()
    slope, coarse = 0.5 * (up + down) / step, 0.5 * (function(longer) - function(-longer)).double() / longer
    rounding = 300.0 * eps * _norm(value) / step
    return slope, _SHARE * _norm(slope) + 3.0 * (_norm(up - down) / step + _norm(slope - coarse)) + rounding


def _norm(y: Tensor) -> Tensor:
    """Norm of each row, float64."""
    return y.double().reshape(len(y), -1).norm(dim=1)


def _by_functions(
    function: Function, z: Tensor, covectors: Tensor, use: Use, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    value, pullback, byproduct = torch.func.vjp(function, z, has_aux=True)  # type: ignore[misc]

    def used(covector: Tensor) -> Tensor:
        (product,) = pullback(covector)
        return use(covector, product)

    # vmap costs more than it saves for a single covector.
    if min(chunk, len(covectors)) == 1:
        return value, torch.stack([used(covector) for covector in covectors]), byproduct
    return value, torch.func.vmap(used, chunk_size=chunk)(covectors), byproduct


def _by_autograd(
    function: Function, z: Tensor, covectors: Tensor, use: Use, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    graph = torch.is_grad_enabled()
    with _recording(z) as leaf:
        value, byproduct = function(leaf)

        def used(covector: Tensor) -> Tensor:
            return use(covector, _gradient(value, leaf, covector, graph))

        kept = (
            torch.stack([used(covector) for covector in covectors])
            if min(chunk, len(covectors)) == 1
            else torch.func.vmap(used, chunk_size=chunk)(covectors)
        )
    return _detached(graph, value, kept, byproduct)


def _gradient(value: Tensor, leaf: Tensor, covector: Tensor, graph: bool) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(covector)
    (product,) = torch.autograd.grad(
        value, leaf, covector, retain_graph=True, create_graph=graph, materialize_grads=True
    )
    return product


def _by_backward(
    network: nn.Module | None, function: Function, z: Tensor, covectors: Tensor, use: Use
) -> tuple[Tensor, Tensor, Tensor]:
    with _recording(z) as leaf, _frozen(network):
        value, byproduct = function(leaf)
        kept = []
        for covector in covectors:
            leaf.grad = None
            value.backward(covector, retain_graph=True)
            kept.append(use(covector, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad))
    return _detached(False, value, torch.stack(kept), byproduct)


@contextmanager
def _recording(z: Tensor) -> Iterator[Tensor]:
    """A copy of z that autograd follows; with gradients enabled it stays part of z's own graph."""
    graph = torch.is_grad_enabled() and z.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        yield z.view_as(z) if graph else z.detach().clone().requires_grad_()


@contextmanager
def _frozen(network: nn.Module | None) -> Iterator[None]:
    """Parameters get no gradient: ``backward`` would add to what training keeps there."""
    trained = [] if network is None else [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _detached(graph: bool, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value, kept, byproduct = tensors if graph else (each.detach() for each in tensors)
    return value, kept, byproduct


def _twice_backwards(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The product :math:`w^\\top J u` is linear in w; its derivative in w is :math:`J u`."""
    graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        leaves = tuple(p.view_as(p) if p.requires_grad else p.detach().clone().requires_grad_() for p in primals)
        value = function(*leaves)
        w = torch.ones_like(value, requires_grad=True)
        products = torch.autograd.grad(value, leaves, w, create_graph=True, materialize_grads=True)
        q = torch.stack([(each * u).sum() for each, u in zip(products, tangents, strict=True)]).sum()
        (derivative,) = torch.autograd.grad(q, w, create_graph=graph, materialize_grads=True)
    if not bool((derivative.sum() - q).abs() <= 1e-3 * (derivative.abs() + value.abs()).sum()):
        raise RuntimeError("a layer has no second derivative")
    return (value, derivative) if graph else (value.detach(), derivative)


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
