r"""Networks of the usual conventions.

With :math:`z = \alpha x + \sigma \epsilon` every one of them says what :math:`\hat x` is,

.. math::
    \hat x = D\Bigl(\frac{z}{\alpha}; \frac{\sigma}{\alpha}\Bigr), \qquad
    \hat x = \frac{z - \sigma\hat\epsilon}{\alpha}, \qquad
    \hat x = \frac{\alpha z - \sigma\hat v}{\alpha^2 + \sigma^2}, \qquad
    \hat x = \frac{\sigma' z - \sigma \hat u}{\alpha\sigma' - \sigma\alpha'}, \qquad
    \hat x = \frac{z + \sigma^2 \hat s}{\alpha},

and with it the whole model. What differs is the clock: a network trained in discrete time knows the index k of a table
:math:`\bar\alpha_k = \alpha_k^2`, which lies at :math:`t = k/(K - 1)` and is interpolated in its log-SNR between
(:class:`~ndm_ct.schedules.Tabulated`); flow matching runs from noise at 0 to data at 1, :math:`\tau = 1 - t`, and its
velocity :math:`dz/d\tau` is the negative of ours.

References:
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, https://arxiv.org/abs/2206.00364
    Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, https://arxiv.org/abs/2006.11239
    Lipman et al., Flow Matching for Generative Modeling, https://arxiv.org/abs/2210.02747
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ndm_ct._core.checks import validate_count, validate_positive
from ndm_ct._core.errors import PredictorError
from ndm_ct._core.precision import run_for_tensor
from ndm_ct.model import NDM
from ndm_ct.nn import FromDenoiser, FromScore
from ndm_ct.nn.heads import Wrapper
from ndm_ct.schedules.base import Schedule
from ndm_ct.schedules.fixed import Rectified, Tabulated, VarianceExploding, as_table
from ndm_ct.transforms import Transform

__all__ = [
    "FlowTime", "OnTable", "adapted", "from_denoiser", "from_eps", "from_score", "from_v", "from_velocity",
    "tabulated", "without_variance",
]  # fmt: skip

LEAST_ALPHA_SQUARED = 2.0**-24
"""In place of the zero at the end of a table rescaled to zero terminal SNR, as diffusers' own Euler scheduler has it;
or half of the entry before, where that is less."""


def adapted(predictor: Callable[..., Any], event_shape: Sequence[int], **options: Any) -> NDM:
    """An :class:`~ndm_ct.NDM` that is marked as adapted: nobody has said yet where integer levels lie in its data.

    Args:
        predictor: the predictor.
        event_shape: E.
        options: further arguments of :class:`~ndm_ct.NDM`.
    """
    model = NDM(predictor, event_shape, **options)
    model.adapted = True
    return model


def tabulated(alphas_cumprod: Sequence[float] | Tensor, prediction: str) -> Tabulated:
    r"""The schedule of a table :math:`\alpha_k^2`, zero terminal SNR made positive.

    Args:
        alphas_cumprod: the table. A last entry of zero, or diffusers' stand-in for it that may exceed the entry before,
            becomes a small number below that one.
        prediction: what the network predicts.

    Raises:
        ValueError: the table does not decrease, leaves (0, 1), or ends with more data than noise; or it ends at
            zero and the network predicts "eps".
    """
    table = as_table(alphas_cumprod).clone()
    if len(table) > 1:
        before, last = table[-2:].tolist()
        if 0.0 <= last < 1e-12 or before <= last <= LEAST_ALPHA_SQUARED:
            if prediction == "eps":
                raise ValueError(
                    "alphas_cumprod ends at zero (zero terminal SNR), where the noise says nothing about x: a "
                    "network of noise was not trained on this table. Use the table without rescaling, or from_v for a "
                    "network that predicts v."
                )
            table[-1] = min(LEAST_ALPHA_SQUARED, 0.5 * before)
        if last > 0.5:
            raise ValueError(
                f"alphas_cumprod ends at alpha^2 = {last:.4g}, more data than noise. If these are the alphas "
                "(1 - beta) of single steps, pass their cumulative product, torch.cumprod(alphas, 0)."
            )
    return Tabulated(table)


def without_variance(output: Any, z: Tensor) -> Any:
    """The first half of an output with twice the channels of z, whose second half is a learned variance."""
    doubled = isinstance(output, Tensor) and output.shape == (len(z), 2 * z.shape[1], *z.shape[2:])
    return output[:, : z.shape[1]] if doubled else output


class OnTable(Wrapper):
    r"""A network that takes the index k of a table in place of t: :math:`\mathrm{net}(z, (K - 1)\,t)`.

    Args:
        net: ``net(z, k, **cond)``, k of shape ``(B,)``. Where it returns twice the channels of z, the second half is a
            learned variance (improved DDPM), which no flow needs, and is dropped.
        entries: K.
        nearest: round the index to an integer. A network that looks up a learned vector for every index needs this, and
            is then constant between indices. A network of sinusoidal features does not.

    Raises:
        PredictorError: when it is called without ``nearest`` and the network looks up its index.
    """

    def __init__(self, net: Callable[..., Any], entries: int, nearest: bool = False) -> None:
        super().__init__(net)
        self.entries, self.nearest = validate_count("entries", entries), nearest

    def forward(self, z: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        """The network's output at state z ``(B, *E)`` and time t ``(B,)``."""
        k = (self.entries - 1) * t
        if self.nearest:
            return without_variance(run_for_tensor(self.net, z, k.round().long(), **cond), z)
        try:
            return without_variance(run_for_tensor(self.net, z, k, **cond), z)
        except RuntimeError as error:
            if "indices" not in str(error):
                raise
            raise PredictorError(
                f"the network does not take real times ({error}). If it looks up a vector for every index, pass "
                "nearest=True."
            ) from error


class FlowTime(Wrapper):
    r"""The velocity dz/dt of a network with its own time axis: :math:`\pm\mathrm{net}(z, s\tau)`.

    Args:
        net: the network.
        data_at: its time at data, 1 (then :math:`\tau = 1 - t`, and the sign is minus) or 0 (:math:`\tau = t`).
        time_scale: s.
        time_first: call ``net(tau, z)``.
        sign: the sign, 1 or -1, if it is not the one that goes with ``data_at``.
    """

    def __init__(
        self, net: Callable[..., Any], data_at: int = 1, time_scale: float = 1.0, time_first: bool = False,
        sign: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(net)
        if not (isinstance(data_at, int) and data_at in (0, 1)):
            raise ValueError(f"data_at must be 0 or 1, the network's time at data, got {data_at!r}.")
        validate_positive("time_scale", time_scale)
        if sign not in (None, 1, -1):
            raise ValueError(f"sign must be 1, -1 or None (the sign that goes with data_at), got {sign!r}.")
        self.data_at, self.time_scale, self.time_first, self.sign = data_at, time_scale, time_first, sign

    def config(self, own: list[Any] | None = None) -> dict[str, Any]:
        """As of every configurable object; a sign that goes with ``data_at`` is not mentioned, as files never did."""
        return {name: value for name, value in super().config(own).items() if name != "sign" or value is not None}

    def forward(self, z: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        """dz/dt at state z ``(B, *E)`` and time t ``(B,)``."""
        tau = self.time_scale * (1.0 - t if self.data_at == 1 else t)
        velocity = run_for_tensor(self.net, *((tau, z) if self.time_first else (z, tau)), **cond)
        sign = (-1 if self.data_at == 1 else 1) if self.sign is None else self.sign
        return -velocity if sign == -1 else velocity


def from_denoiser(
    net: Callable[..., Any], event_shape: Sequence[int], *, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> NDM:
    r"""A denoiser :math:`D(z; \sigma) \approx E[x \mid x + \sigma\epsilon = z]`, as of EDM and k-diffusion.

    Args:
        net: ``net(z, sigma, **cond)``, z ``(B, *E)``, sigma ``(B,)``, to ``(B, *E)``: preconditioning included.
        event_shape: E.
        sigma_min: least noise; likelihoods are those of data with this noise.
        sigma_max: most noise; the prior is :math:`N(0, \sigma_{max}^2 I)`.

    Example:
        >>> import ndm_ct, torch
        >>> model = from_denoiser(lambda z, sigma: z / (1 + sigma[:, None] ** 2), (2,))  # N(0, I)
        >>> ndm_ct.loglik(model, torch.zeros(1, 2)).item()  # - log 2 pi
        -1.83...
    """
    return adapted(FromDenoiser(net), event_shape, schedule=VarianceExploding(sigma_min, sigma_max))


def from_eps(
    net: Callable[..., Any],
    event_shape: Sequence[int],
    *,
    alphas_cumprod: Sequence[float] | Tensor,
    nearest: bool = False,
) -> NDM:
    r"""A network that predicts noise, trained in discrete time: DDPM and its descendants.

    Args:
        net: ``net(z, k, **cond)`` to :math:`\hat\epsilon`, ``(B, *E)``; k ``(B,)`` is the index, 0 the least noise.
        event_shape: E.
        alphas_cumprod: :math:`\alpha_k^2`, K decreasing values in (0, 1). Zero terminal SNR is refused: at
            :math:`\alpha = 0` the noise says nothing about x.
        nearest: round k to integers, for a network that looks up a vector for every index, see :class:`OnTable`.

    Raises:
        ValueError: the table does not decrease, leaves (0, 1), or ends with more data than noise.
    """
    return _on_table(net, event_shape, alphas_cumprod, nearest, "eps")


def from_v(
    net: Callable[..., Any],
    event_shape: Sequence[int],
    *,
    alphas_cumprod: Sequence[float] | Tensor,
    nearest: bool = False,
) -> NDM:
    r"""A network that predicts :math:`v = \alpha\epsilon - \sigma x`, trained in discrete time.

    Args:
        net: ``net(z, k, **cond)`` to :math:`\hat v`, ``(B, *E)``; k ``(B,)`` is the index, 0 the least noise.
        event_shape: E.
        alphas_cumprod: :math:`\alpha_k^2`, K decreasing values in (0, 1); the last may be zero (zero terminal SNR).
        nearest: round k to integers, for a network that looks up a vector for every index, see :class:`OnTable`.

    Raises:
        ValueError: the table does not decrease, leaves (0, 1), or ends with more data than noise.
    """
    return _on_table(net, event_shape, alphas_cumprod, nearest, "v")


def _on_table(
    net: Callable[..., Any], event_shape: Sequence[int], table: Sequence[float] | Tensor, nearest: bool, prediction: str
) -> NDM:
    schedule = tabulated(table, prediction)
    predictor = OnTable(net, len(schedule.alphas_cumprod), nearest)
    return adapted(predictor, event_shape, schedule=schedule, prediction=prediction)


def from_velocity(
    net: Callable[..., Any],
    event_shape: Sequence[int],
    *,
    schedule: Schedule | None = None,
    data_at: int = 1,
    time_scale: float = 1.0,
    time_first: bool = False,
    sign: int | None = None,
    t_min: float | None = None,
    transform: Transform | None = None,
) -> NDM:
    r"""A network that predicts a velocity: flow matching, rectified flow, stochastic interpolants.

    flow_matching and torchcfm count time from noise at 0 to data at 1 and estimate :math:`dz/d\tau = x - \epsilon`:
    that is ``data_at=1``. Rectified flows of diffusers begin at data, and estimate :math:`\epsilon - x`:
    ``data_at=0``, with ``time_scale=1000`` where their network's time ends at 1000.

    Args:
        net: ``net(z, tau, **cond)`` to ``(B, *E)``, tau ``(B,)``.
        event_shape: E.
        schedule: the path :math:`\alpha x + \sigma\epsilon`; None is the straight one, 1 - t and t.
        data_at: the network's time at data, 1 or 0.
        time_scale: factor of its time.
        time_first: call ``net(tau, z, **cond)``, as torchcfm's examples do.
        sign: 1 or -1, with t from data to noise: :math:`dz/dt = \mathrm{sign} \cdot \mathrm{net}`. None is
            -1 for data at 1 and 1 for data at 0.
        t_min: where likelihoods are taken and samples end. None is the schedule's own value, at which :math:`\sigma` is
            about 0.001; bounds, scores and the reverse SDE need it. 0 is where flow_matching, torchcfm, zuko and sbi
            take theirs.
        transform: a :class:`~ndm_ct.transforms.Flow` or :class:`~ndm_ct.transforms.Encoder` from data to the states
            that the network knows. None takes data as states.

    Raises:
        ValueError: ``data_at`` is neither 0 nor 1, or ``sign`` neither 1 nor -1.

    Example:
        >>> import ndm_ct, torch
        >>> def net(z, tau):  # x and noise both N(0, I): E[x - noise | z]
        ...     return z * ((2 * tau - 1) / (tau**2 + (1 - tau) ** 2))[:, None]
        >>> model = from_velocity(net, (2,))
        >>> ndm_ct.loglik(model, torch.zeros(1, 2)).item()  # - log 2 pi, and log 0.999 twice
        -1.83...
    """
    predictor = FlowTime(net, data_at, time_scale, time_first, sign)
    schedule = Rectified() if schedule is None else schedule
    return adapted(predictor, event_shape, schedule=schedule, prediction="velocity", t_min=t_min, transform=transform)


def from_score(
    net: Callable[..., Any], event_shape: Sequence[int], *, schedule: Schedule, t_min: float | None = None
) -> NDM:
    r"""A network that predicts :math:`\nabla_z \log p_t(z)`, as of the score SDEs.

    Args:
        net: ``net(z, t, **cond)`` to ``(B, *E)``, t ``(B,)`` in [0, 1].
        event_shape: E.
        schedule: that of training, such as ``VariancePreserving(0.1, 20)`` or ``VarianceExploding(0.01, 50)``.
        t_min: where likelihoods are taken; the score SDEs take 1e-5. None is the schedule's own value.

    Raises:
        ValueError: :math:`\alpha_1 = 0`, where no score says anything about x.
    """
    return adapted(FromScore(net), event_shape, schedule=schedule, t_min=t_min)
