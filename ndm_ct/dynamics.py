r"""The generative dynamics: the process with the model's prediction in place of x.

.. math::
    \text{probability flow} \quad dz = v\,dt, \qquad
    \text{reverse SDE} \quad dz = (v - \tfrac12 g^2 s)\,dt + g\,d\bar w ,

with v and s taken at the model's :math:`(\hat F, \hat{\dot F})(z, t)`. Both are one drift,

.. math::
    f = \alpha' \hat F + \alpha \hat{\dot F} + c\,(z - \alpha \hat F), \qquad
    c = \frac{\sigma'}{\sigma} + \frac{g^2}{2 \sigma^2} ,

with g = 0 for the flow. The part linear in z has the divergence :math:`d\,\sigma'/\sigma` exactly; only the network
part needs a trace. A network that is itself the velocity stays it: :class:`NetworkFlow`.

Warning:
    With prediction "x" and a transform that is nonlinear in x, flow and SDE are different models: the ELBO determines
    only one combination of v and s. See the README, "What the number means".
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ndm_ct._core.autodiff import Derivatives
from ndm_ct._core.checks import as_time, event_size, expand
from ndm_ct.process import ForwardProcess, denoised, drift
from ndm_ct.schedules.base import Coefficients

__all__ = ["NetworkFlow", "ProbabilityFlow", "ReverseSDE"]


class MomentsFunction(Protocol):
    r"""The model's moments, ``(z (B, *E), t (B,)) -> (F, dF)``, both ``(B, *E)``."""

    def __call__(self, z: Tensor, t: Tensor, /) -> tuple[Tensor, Tensor]: ...


class ProbabilityFlow:
    r"""The field :math:`v(z, t)` of the deterministic generator, callable as torchdiffeq wants: ``flow(t, z)``.

    Args:
        process: the forward process.
        moments: the model's :math:`(\hat F, \hat{\dot F})`.
        dtype: precision in which the network is evaluated; the algebra around it keeps the precision of z. None is that
            of z.
        t_min: the data end; times outside [t_min, 1], which adaptive solvers try, are moved to it.
        derivatives: how derivatives of the networks are taken; None finds it out.
    """

    def __init__(
        self, process: ForwardProcess, moments: MomentsFunction, dtype: torch.dtype | None, t_min: float = 0.0,
        derivatives: Derivatives | None = None,
    ) -> None:  # fmt: skip
        self.process, self.moments, self.dtype, self.t_min = process, moments, dtype, t_min
        self.derivatives = Derivatives() if derivatives is None else derivatives
        self._last: tuple[Tensor, bool, Coefficients] | None = None

    def _coefficients(self, t: Tensor) -> Coefficients:
        """The schedule at time ``t``, evaluated once for the parts of one evaluation, which pass the same tensor."""
        graph = torch.is_grad_enabled()
        if self._last is None or self._last[0] is not t or (graph and not self._last[1]):
            self._last = t, graph, self.process.schedule(t)
        return self._last[2]

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        """Velocity, shape of z.

        Args:
            t: any time, ``()`` or ``(B,)``; it is moved into [t_min, 1].
            z: state, shape ``(B, *E)``.
        """
        return self.velocity(as_time(t, z.device).clamp(self.t_min, 1.0), z)

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        """The same at a float64 time in [t_min, 1]."""
        t = t.expand(z.shape[0])
        return drift(z, *_in_dtype(self.moments, z, t, self.dtype), self.process.schedule(t), self.process.transform)

    def linear_rate(self, t: Tensor) -> Tensor:
        r""":math:`\sigma'/\sigma`, the factor of the part of v that is linear in z; shape of ``t``."""
        return self._coefficients(t).dlog_sigma

    def linear_divergence(self, t: Tensor, event_shape: tuple[int, ...]) -> Tensor:
        """The exact divergence of the part of v that is linear in z; shape of ``t``."""
        return event_size(event_shape) * self.linear_rate(t)

    def network_part(self, t: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        r"""The rest of v at time t, :math:`z \mapsto (\alpha' - \alpha\sigma'/\sigma)\hat F + \alpha\hat{\dot F}`, with
        :math:`\hat F` as a by-product."""

        c = self._coefficients(t)

        def part(z: Tensor) -> tuple[Tensor, Tensor]:
            F, dF = _in_dtype(self.moments, z, t.expand(z.shape[0]), self.dtype)
            return expand(c.dalpha - c.alpha * c.dlog_sigma, z) * F + expand(c.alpha, z) * dF, F

        return part

    def prediction(self, t: Tensor, z: Tensor) -> Tensor:
        r""":math:`\hat F(z, t)`, in the precision of z."""
        return _in_dtype(self.moments, z, t.expand(z.shape[0]), self.dtype)[0]

    def score(self, t: Tensor, z: Tensor, F: Tensor) -> Tensor:
        r"""The model's score :math:`(\alpha\hat F - z)/\sigma^2` from :math:`\hat F` at time ``t`` and state ``z``."""
        c = self._scored(t)
        return (expand(c.alpha, z) * F - z) / expand(c.sigma**2, z)

    def _scored(self, t: Tensor) -> Coefficients:
        """The schedule by which predictions and scores are read."""
        return self._coefficients(t)

    def assemble(self, t: Tensor, z: Tensor, network_part: Tensor) -> Tensor:
        """The velocity from its network part: adds the part linear in z."""
        return network_part + expand(self.linear_rate(t), z) * z


class NetworkFlow(ProbabilityFlow):
    r"""The flow of a network that is the velocity: the field is its output, with nothing divided by :math:`\sigma`.

    So the flow reaches :math:`\sigma = 0`. The part whose divergence is known exactly is then not
    :math:`(\sigma'/\sigma) z`, which is infinite there, but :math:`\sigma\sigma'/(\sigma^2 + \sigma_f^2)\, z`, where
    :math:`\sigma_f` is the noise at ``t_noise``; and the score, which serves the estimate of errors, is that with the
    noise of ``t_noise`` at times before it. Where ``t_min`` has noise, :math:`\sigma_f = 0` and nothing differs.

    Args:
        process: the forward process; F is the identity.
        moments: the model's :math:`(\hat F, \hat{\dot F})`.
        network: :math:`\hat u`, ``(z (B, *E), t (B,))`` to ``(B, *E)``.
        dtype: as of :class:`ProbabilityFlow`.
        t_min: the data end.
        t_noise: the least time that is treated as one with noise.
        derivatives: as of :class:`ProbabilityFlow`.
    """

    def __init__(
        self, process: ForwardProcess, moments: MomentsFunction, network: Callable[[Tensor, Tensor], Tensor],
        dtype: torch.dtype | None, t_min: float, t_noise: float, derivatives: Derivatives | None = None,
    ) -> None:  # fmt: skip
        super().__init__(process, moments, dtype, t_min, derivatives)
        self.network, self.t_noise = network, t_noise

    @property
    def floored(self) -> bool:
        """Whether the data end has no noise."""
        return self.t_noise > self.t_min

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        return self.network(z.to(dtype=self.dtype), t.expand(z.shape[0])).to(z.dtype)

    def linear_rate(self, t: Tensor) -> Tensor:
        r""":math:`\sigma\sigma'/(\sigma^2 + \sigma_f^2)`, shape of ``t``."""
        c = self._coefficients(t)
        if not self.floored:
            return c.dlog_sigma
        floor = self.process.schedule(torch.full_like(t, self.t_noise)).sigma
        return c.sigma * c.dsigma / (c.sigma**2 + floor**2)

    def network_part(self, t: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        c, rate = self._scored(t), self.linear_rate(t)

        def part(z: Tensor) -> tuple[Tensor, Tensor]:
            u = self.velocity(t, z)
            return u - expand(rate, z) * z, denoised(z, u, c)

        return part

    def prediction(self, t: Tensor, z: Tensor) -> Tensor:
        return denoised(z, self.velocity(t, z), self._scored(t))

    def _scored(self, t: Tensor) -> Coefficients:
        return self.process.schedule(t.clamp(min=self.t_noise)) if self.floored else self._coefficients(t)


class ReverseSDE:
    r"""Drift :math:`v - \tfrac12 g^2 s` and diffusion g of the stochastic generator.

    States are in the transform's basis, where g is diagonal (pixels, unless the transform says otherwise).

    ``f``, ``g``, ``noise_type`` and ``sde_type`` are what torchsde asks for. Its time runs from 0 (noise) to
    ``1 - t_min`` (data), and its states are flat, ``(B, d)``. The Ito and Stratonovich readings agree, because g does
    not depend on the state: set ``sde_type = "stratonovich"`` for the methods of torchsde that want it.

    Args:
        process: the forward process.
        moments: the model's :math:`(\hat F, \hat{\dot F})`.
        dtype: precision in which the network is evaluated; None is that of the state.
        event_shape: E.
        t_min: the data end; later times of torchsde are moved to it.
    """

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(
        self, process: ForwardProcess, moments: MomentsFunction, dtype: torch.dtype | None,
        event_shape: tuple[int, ...], t_min: float = 0.0,
    ) -> None:  # fmt: skip
        self.process, self.moments, self.dtype, self.event_shape, self.t_min = (
            process, moments, dtype, event_shape, t_min,
        )  # fmt: skip

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """Drift as torchsde asks for it, shape of y.

        Args:
            s: torchsde's time, 0 at noise, ``()``.
            y: flat states, ``(B, d)``.
        """
        return -self.drift(self._time(s, y), self._state(y)).reshape_as(y)

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        """The diagonal of g as torchsde asks for it, shape of y.

        Args:
            s: torchsde's time, 0 at noise, ``()``.
            y: flat states, ``(B, d)``.
        """
        state = self._state(y)
        return self.diffusion(self._time(s, y), state).to(y.dtype).expand_as(state).reshape_as(y)

    def _time(self, s: Tensor, y: Tensor) -> Tensor:
        return (1.0 - as_time(s, y.device)).clamp(self.t_min, 1.0)

    def _state(self, y: Tensor) -> Tensor:
        return y.reshape(len(y), *self.event_shape)

    def drift(self, t: Tensor, y: Tensor) -> Tensor:
        """Drift, shape of y.

        Args:
            t: float64 time, 1 at noise, ``()`` or ``(B,)``.
            y: state in the transform's basis, ``(B, *E)``.
        """
        process, t = self.process, t.expand(y.shape[0])
        z = process.transform.from_basis(y)
        F, dF = _in_dtype(self.moments, z, t, self.dtype)
        return process.transform.to_basis(drift(z, F, dF, process.schedule(t), process.transform, process.half_rate(t)))

    def diffusion(self, t: Tensor, y: Tensor) -> Tensor:
        """The diagonal of g at time ``t``, broadcastable to ``y``."""
        return expand(self.process.diffusion(t.expand(y.shape[0])), y)


def _in_dtype(moments: MomentsFunction, z: Tensor, t: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    F, dF = moments(z.to(dtype=dtype), t)
    return F.to(z.dtype), dF.to(z.dtype)
