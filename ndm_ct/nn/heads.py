r"""What a network's output means, and the scaling that makes it a good prediction at every noise level.

:class:`Preconditioned` turns a network of any meaning into a prediction of x,

.. math::
    \hat x = c_{skip} z - c_{out}\, \mathrm{net}(c_{in} z, t), \qquad
    c_{skip} = \frac{\alpha s^2}{\alpha^2 s^2 + \sigma^2}, \quad
    c_{out} = \frac{\sigma s}{\sqrt{\alpha^2 s^2 + \sigma^2}}, \quad
    c_{in} = \frac{1}{\sqrt{\alpha^2 s^2 + \sigma^2}},

where s is the standard deviation of the data: input and target of the network have unit variance at every t, and
the zero network is the exact denoiser of :math:`N(0, s^2 I)`. For s = 1 and a variance-preserving schedule this is
:math:`\alpha z - \sigma\,\mathrm{net}(z, t)`. :class:`FromVelocity` and :class:`FromScore` take a network that
estimates the velocity :math:`u = \alpha' x + \sigma' \epsilon` or the score
:math:`s = (\alpha x - z)/\sigma^2`, and solve for x with :math:`z = \alpha x + \sigma \epsilon`:

.. math::
    \hat x = \frac{\sigma' z - \sigma \hat u}{\alpha \sigma' - \sigma \alpha'}, \qquad
    \hat x = \frac{z + \sigma^2 \hat s}{\alpha} .

:class:`FromDenoiser` takes one that knows the noise on unscaled data, :math:`\hat x = D(z/\alpha; \sigma/\alpha)`.
:class:`Mixed` predicts the noise, as :math:`(1 - a)\,\sigma z + a\,\mathrm{net}(z, t)`.

References:
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, section 5,
    https://arxiv.org/abs/2206.00364
    Salimans and Ho, Progressive Distillation (the v-prediction), https://arxiv.org/abs/2202.00512
    Lipman et al., Flow Matching for Generative Modeling, https://arxiv.org/abs/2210.02747
    Vahdat, Kreis and Kautz, Score-based Generative Modeling in Latent Space (the mixed prediction),
    https://arxiv.org/abs/2106.05931
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import choose, expand, validate_visible
from ndm_ct._core.config import Configurable
from ndm_ct._core.keywords import keyword_names
from ndm_ct._core.parallel import unwrapped
from ndm_ct._core.precision import run_for_tensor

__all__ = ["FromDenoiser", "FromScore", "FromVelocity", "Mixed", "Preconditioned", "Wrapper", "null_of"]

PREDICTIONS = ("x", "moments")

Schedule = Callable[[Tensor], Any]
"""A noise schedule, float64 time to its coefficients (:class:`ndm_ct.schedules.Coefficients`)."""


class Wrapper(nn.Module, Configurable):
    """A network around another one, which gets its conditioning.

    Args:
        net: the other one; its first two arguments are state and time.
    """

    runs_network = True
    """It calls the other one in that one's precision."""

    def __init__(self, net: Callable[..., Any]) -> None:
        super().__init__()
        if not callable(net):
            raise TypeError(f"net must be callable as net(z, t), got {type(net).__name__}.")
        validate_visible("net", net)
        self.net = unwrapped(net)
        self._names, self._anything = keyword_names(self.net, 2)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        """Conditioning keywords the network accepts, and whether it accepts any."""
        return self._names, self._anything

    def validate_event(self, event_shape: tuple[int, ...]) -> None:
        """Raise if the network reports that it was not built for such events."""
        if hasattr(self.net, "validate_event"):
            self.net.validate_event(event_shape)

    @property
    def null(self) -> dict[str, Any]:
        """The values that mean "no conditioning" to the network, by name; empty if it declares none."""
        return null_of(self.net)


class _Scheduled(Wrapper):
    """A predictor around a network that needs the model's noise schedule.

    It is called as ``predictor(z, t, schedule, **cond)``; ``NDM`` passes its own schedule, so one predictor may serve
    several models.

    Args:
        net: ``net(z, t, **cond)``.
    """

    wants_schedule = True


class Preconditioned(_Scheduled):
    r"""A network scaled to predict x, or the pair of prediction "moments", at every noise level.

    .. math::
        \hat x = c_{skip} z - c_{out}\,\mathrm{net}(c_{in} z, t), \qquad
        (\hat F, \hat{\dot F}) = (c_{skip} z - c_{out}\,\mathrm{net}_1(c_{in} z, t),\ \mathrm{net}_2(c_{in} z, t))

    with the coefficients of this module's header. The schedule is the model's, which ``NDM`` passes.

    Args:
        net: ``net(z, t, **cond)``, returning ``(B, *E)`` for "x" and ``(B, 2, *E)`` for "moments".
        prediction: "x" or "moments"; that of the model.
        data_std: s, standard deviation of the data over all coordinates.
    """

    names_in_files: ClassVar[dict[str, str]] = {"prediction": "head"}

    def __init__(self, net: nn.Module, prediction: str = "x", data_std: float = 1.0) -> None:
        super().__init__(net)
        self.prediction = choose("prediction", prediction, PREDICTIONS)
        if not (math.isfinite(data_std) and data_std > 0.0):
            raise ValueError(f"data_std must be a positive number, got {data_std!r}.")
        self.data_std = data_std

    def forward(self, z: Tensor, t: Tensor, schedule: Schedule, /, **cond: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction at state z ``(B, *E)`` and time t ``(B,)`` under a schedule; a pair for "moments".

        Raises:
            ValueError: the network's output does not fit the prediction.
        """
        skip, out, into = (expand(c, z) for c in self._coefficients(schedule(t.double())))
        output = run_for_tensor(self.net, into * z, t, **cond)
        if self.prediction == "x":
            return skip * z - out * output
        expected = (z.shape[0], 2, *z.shape[1:])
        if tuple(output.shape) != expected:
            raise ValueError(
                f"prediction='moments' needs two outputs of the network, shape {expected}, got {tuple(output.shape)}; "
                "build it with outputs=2."
            )
        return skip * z - out * output[:, 0], output[:, 1]

    def _coefficients(self, c: Any) -> tuple[Tensor, Tensor, Tensor]:
        s = self.data_std
        spread = torch.sqrt((c.alpha * s) ** 2 + c.sigma**2)
        return c.alpha * s**2 / spread**2, c.sigma * s / spread, 1.0 / spread


class FromVelocity(_Scheduled):
    r"""A network that estimates :math:`u = \alpha' x + \sigma' \epsilon`, as flow matching trains it.

    For :math:`\alpha = 1 - t, \sigma = t` that is :math:`\epsilon - x`: our time runs from data to noise, so a
    network trained with the opposite direction is passed as ``lambda z, t: -net(z, 1 - t)``.

    Args:
        net: ``net(z, t, **cond)``, returning u, ``(B, *E)``.
    """

    def forward(self, z: Tensor, t: Tensor, schedule: Schedule, /, **cond: Any) -> Tensor:
        r""":math:`\hat x` at state z ``(B, *E)`` and time t ``(B,)`` under a schedule."""
        c = schedule(t.double())
        u = run_for_tensor(self.net, z, t, **cond)
        return expand(c.dsigma / c.wronskian, z) * z - expand(c.sigma / c.wronskian, z) * u


class _WhereAlphaIsPositive(_Scheduled):
    """A predictor that divides by alpha."""

    def validate_schedule(self, schedule: Schedule) -> None:
        """Raises ValueError if alpha(1) = 0, where the network says nothing about x."""
        with torch.no_grad():
            end = schedule(torch.ones((), dtype=torch.float64, device=getattr(schedule, "device", None)))
        if float(end.alpha) == 0.0:
            raise ValueError(
                f"{type(self).__name__} finds x where alpha > 0, but {type(schedule).__name__} has alpha(1) = 0; use "
                "FromVelocity or Preconditioned, or a schedule that ends before."
            )


class FromDenoiser(_WhereAlphaIsPositive):
    r"""A network that estimates x from :math:`x + \sigma\epsilon`, given the noise: :math:`D(z; \sigma)`.

    Args:
        net: ``net(z, sigma, **cond)``, returning :math:`\hat x`, ``(B, *E)``.
    """

    def forward(self, z: Tensor, t: Tensor, schedule: Schedule, /, **cond: Any) -> Tensor:
        r""":math:`\hat x` at state z ``(B, *E)`` and time t ``(B,)`` under a schedule; alpha must not be zero there."""
        c = schedule(t.double())
        return run_for_tensor(self.net, z / expand(c.alpha, z), (c.sigma / c.alpha).to(z.dtype), **cond)


class FromScore(_WhereAlphaIsPositive):
    r"""A network that estimates the score :math:`\nabla_z \log p_t(z)`.

    Args:
        net: ``net(z, t, **cond)``, returning s, ``(B, *E)``.
    """

    def forward(self, z: Tensor, t: Tensor, schedule: Schedule, /, **cond: Any) -> Tensor:
        r""":math:`\hat x` at state z ``(B, *E)`` and time t ``(B,)`` under a schedule; alpha must not be zero there."""
        c = schedule(t.double())
        return (z + expand(c.sigma**2, z) * run_for_tensor(self.net, z, t, **cond)) / expand(c.alpha, z)


class Mixed(_Scheduled):
    r"""The noise of nearly normal data: :math:`\hat\epsilon = (1 - a)\,\sigma z + a\,\mathrm{net}(z, t)`.

    :math:`\sigma z` is exact for :math:`N(0, I)` under a variance-preserving schedule; :math:`a \in (0, 1)` is learned
    for every coordinate, or every channel of an event with several axes. For ``prediction="eps"``.

    Args:
        net: ``net(z, t, **cond)``, of the shape of z.
        event_shape: E.
    """

    prediction = "eps"

    def __init__(self, net: nn.Module, event_shape: Sequence[int]) -> None:
        super().__init__(net)
        self.event_shape = tuple(event_shape)
        self.share = nn.Parameter(torch.full((self.event_shape[0], *(1,) * (len(self.event_shape) - 1)), -2.0))

    def forward(self, z: Tensor, t: Tensor, schedule: Schedule, /, **cond: Any) -> Tensor:
        r""":math:`\hat\epsilon` at state z ``(B, *E)`` and time t ``(B,)`` under a schedule."""
        a = torch.sigmoid(self.share)
        return (1.0 - a) * expand(schedule(t.double()).sigma, z) * z + a * run_for_tensor(self.net, z, t, **cond)


def null_of(predictor: Any) -> dict[str, Any]:
    """The values that mean "no conditioning" to a predictor, by name: its attribute ``null``, if that is a mapping."""
    null = getattr(predictor, "null", None)
    return dict(null) if isinstance(null, Mapping) else {}
