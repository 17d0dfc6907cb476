r"""The model: a forward process, a predictor, a prior and a time interval.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ndm_ct._core import checks
from ndm_ct._core.checks import as_time, choose, expand, validate_shape
from ndm_ct._core.conditioning import Conditioning, map_leaves
from ndm_ct._core.errors import PredictorError
from ndm_ct._core.keywords import validate_cond
from ndm_ct._core.noise import GeneratorLike, as_randomness
from ndm_ct._core.pretrained import Pretrained
from ndm_ct.dynamics import NetworkFlow, ProbabilityFlow, ReverseSDE
from ndm_ct.prediction import PREDICTIONS, PredictedProcess, validate_finite, validate_noise_scale, validate_predictor
from ndm_ct.prior import IsotropicNormal, log_prior, prior_divergence, sample_prior
from ndm_ct.process import ForwardProcess, ProcessPath, Volatility
from ndm_ct.schedules import LinearLogSNR, Schedule, VarianceExploding
from ndm_ct.transforms import Identity, Transform

__all__ = ["NDM"]


class NDM(PredictedProcess, Pretrained):
    r"""A Neural Diffusion Model: noise a transform of x, generate by its probability flow or reverse SDE.

    .. math::
        q(z_t \mid x) = N\bigl(\alpha_t F_\varphi(x, t),\ \sigma_t^2 S_\varphi(x, t)^2\bigr)

    Args:
        predictor: callable ``(z (B, *E), t (B,), **cond) -> (B, *E)`` (a pair of these for ``"moments"``); an
            ``nn.Module`` or a function (:class:`ndm_ct.prediction.Predictor` lists what it may declare). Modules that a
            function merely closes over are not part of the model. Wrappers (``DistributedDataParallel``,
            ``DataParallel``, ``torch.compile``) are removed; a compiled network still runs compiled.
        event_shape: E, the shape of one state z, and of one data point unless the transform is an Encoder.
        transform: :math:`F`; None is the identity, an ordinary diffusion.
        schedule: :math:`\alpha, \sigma`; None is ``LinearLogSNR(gamma_min=-13.3, gamma_max=5.0)``.
        volatility: :math:`\eta` in :math:`g^2 = \eta\sigma^2\gamma'`, a float or a callable of t.
        prediction: what the predictor returns: "x", "eps", "v", "velocity" or "moments" (:mod:`ndm_ct.prediction`).
        prior: distribution of :math:`z_1` with ``log_prob`` and ``sample(n, generator=, dtype=, device=)`` or
            ``sample((n,))``; None is :math:`N(0, s^2 I)`, s = :math:`\sigma_1` for VarianceExploding, else 1.
        noise_scale: :math:`r = \log S`, a network or function ``(x (B, *E), t (B,), **cond) -> (B, *E)``, trained and
            saved like a transform; None is S = 1. Choose r(x, 0) = 0, as F(x, 0) = x: bins of integer data and the
            decoder assume it. With prediction "x" the pair of :mod:`ndm_ct.process` is taken at the prediction; with
            "moments" the network predicts it. A method ``with_derivative`` of the network is called for r and its
            time derivative, which is found by differentiation otherwise.
        t_min: time of the data; None is 0 where :math:`\sigma_0 > 0`, else the time at which
            :math:`\sigma/\alpha` = 1e-3. With prediction "velocity" it may be 0 in any case: densities and samples
            are then those of other packages for flow matching, and there is no bound, score or reverse SDE.
        checks: whether ``fit``, ``loglik``, ``encode``, ``decode`` and ``sample`` check at their first use that the
            networks, transform and schedule are what the mathematics assumes (:func:`ndm_ct.check`); the attribute of
            this name turns them off later.

    Raises:
        ValueError: an unknown prediction; a network of ``ndm_ct.nn`` for other events; "eps" or "v" with a transform;
            "eps" where alpha = 0; t_min outside [0, 1), or 0 where :math:`\sigma_0 = 0` and the prediction is not
            "velocity".

    Example:
        >>> model = NDM(lambda z, t: 0.5 * z, event_shape=(2,))
        >>> model.velocity(torch.zeros(3, 2), 0.5).shape
        torch.Size([3, 2])
    """

    flow_only = False
    """Whether ``sample`` follows the probability flow alone, because the process is not that of the schedule."""

    adapted = False
    """Whether :mod:`ndm_ct.adapters` made it of a network trained elsewhere, with integer levels placed elsewhere."""

    def __init__(
        self,
        predictor: Callable[..., Any],
        event_shape: Sequence[int],
        *,
        transform: Transform | None = None,
        schedule: Schedule | None = None,
        volatility: Volatility = 1.0,
        prediction: str = "x",
        prior: Any = None,
        noise_scale: Callable[..., Tensor] | None = None,
        t_min: float | None = None,
        checks: bool = True,
    ) -> None:
        transform = Identity() if transform is None else transform
        schedule = LinearLogSNR() if schedule is None else schedule
        for name, value, kind in (("transform", transform, Transform), ("schedule", schedule, Schedule)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__} of ndm_ct, got {type(value).__name__}.")
        choose("prediction", prediction, PREDICTIONS)
        event_shape = validate_shape("event_shape", event_shape)
        predictor = validate_predictor(predictor, prediction, event_shape, transform, schedule)
        process = ForwardProcess(transform, schedule, volatility, noise_scale=noise_scale)
        validate_noise_scale(process, prediction)
        super().__init__(process, predictor, prediction)
        self.event_shape, self.t_min = event_shape, _validate_t_min(t_min, schedule, prediction)
        # The least time with noise: t_min, or the schedule's safe value where sigma(t_min) = 0.
        self.t_noise = self.t_min if _sigma(schedule, self.t_min) > 0.0 else schedule.safe_t_min
        self.has_custom_prior, self.checks = prior is not None, checks
        self.prior = prior if prior is not None else IsotropicNormal(event_shape, _prior_scale(schedule))
        self.checked: dict[str, Any] = {}  # by purpose, the model as it was when the checks were passed
        accepted = [self.predictor_names, transform.cond_names()]
        accepted += [] if self.noise_scale is None else [self.noise_scale.cond_names()]
        names = frozenset().union(*(names for names, _ in accepted))
        # "until" of a flow map is for its sampler to give.
        self.cond_names = names - {"until"}, any(every for _, every in accepted)

    @property
    def is_map(self) -> bool:
        """Whether the network takes ``until``, the time at which a step ends (:mod:`ndm_ct.flow_maps`)."""
        return "until" in self.predictor_names[0]

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one data point."""
        return self.event_shape if self.transform.data_shape is None else self.transform.data_shape

    def flow(self, dtype: torch.dtype | None = None, /, **cond: Any) -> ProbabilityFlow:
        """The probability flow under fixed conditioning, for ``torchdiffeq.odeint(flow, z, times)``.

        Args:
            dtype: precision in which the network is evaluated; None is that of its parameters.
            cond: conditioning.
        """
        dtype = self.dtype if dtype is None else dtype
        moments, derivatives = partial(self.moments, **cond), self.derivatives
        if self.prediction != "velocity":
            return ProbabilityFlow(self.process, moments, dtype, self.t_min, derivatives)
        network = partial(self.output, **cond)
        return NetworkFlow(self.process, moments, network, dtype, self.t_min, self.t_noise, derivatives)

    def reverse_sde(self, dtype: torch.dtype | None = None, /, **cond: Any) -> ReverseSDE:
        r"""The reverse SDE under fixed conditioning, for ``torchsde.sdeint(sde, y, times)``.

        Args:
            dtype: precision in which the network is evaluated; None is that of its parameters.
            cond: conditioning.

        Raises:
            ValueError: :math:`\sigma(t_{min}) = 0`, where the score is singular.
        """
        checks.validate_noise("the reverse SDE", self.t_min, self.t_noise)
        dtype, shape = self.dtype if dtype is None else dtype, self.event_shape
        return ReverseSDE(self.process, lambda z, t: self.moments(z, t, **cond), dtype, shape, self.t_min)

    def velocity(self, z: Tensor, t: float | Tensor, /, **cond: Any) -> Tensor:
        r"""Velocity of the probability flow, :math:`v(z, t)`.

        Args:
            z: state, shape ``(B, *E)``.
            t: time in [t_min, 1], ``()`` or ``(B,)``.
            cond: conditioning.

        Returns:
            Shape of ``z``.

        Raises:
            PredictorError: the prediction, or what follows from it, is NaN or infinite (with time and rows).
        """
        time, flow = self._flow_at(z, t, cond, self.velocity)
        velocity = flow(time, z)
        validate_finite(velocity, time)
        return velocity

    def score(self, z: Tensor, t: float | Tensor, /, **cond: Any) -> Tensor:
        r"""The model's score :math:`(\alpha\hat F - z)/\sigma^2`; arguments, result and errors as of ``velocity``."""
        time, flow = self._flow_at(z, t, cond, self.score)
        if self.t_noise > self.t_min and self.t_noise > float(time.min()):
            checks.validate_noise(f"the score at t={float(time.min()):g}", self.t_min, self.t_noise)
        score = flow.score(time, z, flow.prediction(time, z))
        validate_finite(score, time)
        return score

    def _flow_at(
        self, z: Tensor, t: float | Tensor, cond: Mapping[str, Any], caller: Callable[..., Any]
    ) -> tuple[Tensor, ProbabilityFlow]:
        given = self.validate_state(z, cond, caller)
        return checks.validate_time(t, self.t_min, z), self.flow(z.dtype, **given)

    def validate(
        self, x: Tensor, cond: Mapping[str, Any], caller: Callable[..., Any], *, name: str = "x"
    ) -> Conditioning:
        """Check data and conditioning before any work.

        Args:
            x: the data.
            cond: conditioning by name.
            caller: the public function that was called, for messages.
            name: the argument's name in messages.

        Returns:
            The conditioning of the rows of x.
        """
        given = self.conditioning(cond, x, caller)
        checks.validate_data(x, self.data_shape, name=name, dtype=self.data_dtype, device=self.device)
        return given

    def validate_state(
        self, z: Tensor, cond: Mapping[str, Any], caller: Callable[..., Any], *, name: str = "z"
    ) -> Conditioning:
        """Check states ``z`` and conditioning before any work; the arguments are those of ``validate``."""
        given = self.conditioning(cond, z, caller)
        checks.validate_data(z, self.event_shape, name=name, dtype=self.data_dtype, device=self.device)
        return given

    def conditioning(self, cond: Mapping[str, Any], like: Tensor, caller: Callable[..., Any]) -> Conditioning:
        """The conditioning of a batch, its names checked.

        Args:
            cond: values by name, arrays of numbers as tensors; a :class:`Conditioning` is returned as it is.
            like: rows of the batch, for their number, dtype and device.
            caller: the public function that was called, for messages.

        Raises:
            TypeError: a name that neither predictor nor transform takes.
        """
        validate_cond(cond, self.cond_names, caller)
        if isinstance(cond, Conditioning):
            return cond
        if not isinstance(like, Tensor) or like.ndim == 0:
            return Conditioning(cond, 0, _Probe(self, like))
        rows = like.shape[0]
        arrays = {name: map_leaves(partial(_as_condition, like=like), value) for name, value in cond.items()}
        given = Conditioning(arrays, rows, _Probe(self, like))
        if rows > 0:
            self.initialise(like, given)
        return given

    def to_latent(self, x: Tensor, /, *, generator: GeneratorLike = None, **cond: Any) -> tuple[Tensor, Tensor | None]:
        r"""Where the path of data begins: y with :math:`F(x, t) = G(y, t)`, and :math:`\log p(x) - \log p(y)`.

        Args:
            x: data, shape ``(B, *data_shape)``.
            generator: source of an Encoder's noise.
            cond: conditioning.

        Returns:
            y, ``(B, *E)``, and its log-weight in nats, ``(B,)`` (:meth:`ndm_ct.transforms.Transform.to_latent`); x
            itself and None without a Flow or Encoder.

        Raises:
            PredictorError: the Flow or Encoder returned something else, NaN or inf.
        """
        generator = as_randomness(generator, len(x), x.device, "to_latent")
        y, weight = self.transform.to_latent(x, generator=generator, **cond)
        if weight is not None:
            _validate_latent(self, y, weight, x)
        return y, weight

    def log_prior(self, z: Tensor) -> Tensor:
        r""":math:`\log p_1(z)`, nats, ``(B, *E)`` to ``(B,)``, in the dtype of z."""
        return log_prior(self.prior, z)

    def prior_divergence(self, path: ProcessPath, x: Tensor, generator: GeneratorLike) -> Tensor:
        r""":math:`KL(q(z_1 \mid x) \,\|\, p(z_1))`, nats, ``(B,)``: exact if the prior allows it, else one sample.

        Args:
            path: from ``process.along(x)``.
            x: data, shape ``(B, *E)``.
            generator: source of the one sample.
        """
        one = as_time(1.0, x.device).expand(x.shape[0])
        mean = expand(self.schedule(one).alpha, x) * path.F(one)
        return prior_divergence(self.prior, mean, path.std(one, x).expand_as(x), generator)

    def sample_prior(
        self, n: int, *, generator: GeneratorLike, dtype: torch.dtype, device: torch.device | str | None
    ) -> Tensor:
        """Draw :math:`z_1`, shape ``(n, *E)``.

        Args:
            n: number of draws.
            generator: a seed, a generator, or one per draw; None is torch's global generator.
            dtype: of the result.
            device: of the result; None is that of the model.
        """
        device = device or self.device or torch.get_default_device()
        return sample_prior(self.prior, n, generator=generator, dtype=dtype, device=device)

    def extra_repr(self) -> str:
        return f"event_shape={self.event_shape}, prediction={self.prediction!r}, t_min={self.t_min:g}"


def _as_condition(value: Any, like: Tensor) -> Any:
    """An array of numbers as a tensor beside the data; anything else as it is."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "buif":
        return value
    return checks.as_tensor(value, like.dtype if like.is_floating_point() else None, like.device)


@dataclass(frozen=True)
class _Probe:
    """Evaluates the networks at two fixed states, for :class:`Conditioning` to see what they do with a tensor.

    Args:
        model: the model.
        like: gives dtype and device.
    """

    model: NDM
    like: Tensor

    def __call__(self, cond: Mapping[str, Any], places: Tensor, /) -> Tensor:
        model, transform = self.model, self.model.transform
        source = torch.Generator().manual_seed(0)
        z, x = (torch.randn(2, *shape, generator=source)[places] for shape in (model.event_shape, model.data_shape))
        z, x = z.to(self.like), x.to(self.like)
        t = as_time([0.3, 0.7])[places].to(self.like.device)
        with model.evaluating(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = [*model.moments(z, t, **cond)]
            if model.prediction == "moments":
                outputs += model.process.along(z, **cond).pair_at(t, z)
            if transform.latent:
                noise = [torch.Generator(z.device).manual_seed(place) for place in places.tolist()]
                latents, weight = transform.to_latent(x, generator=noise, **cond)
                outputs += [latents, transform.from_latent(z, **cond), *(() if weight is None else (weight,))]
        return torch.cat([output.reshape(len(places), -1).double() for output in outputs], 1)


def _validate_latent(model: NDM, y: Tensor, weight: Tensor, x: Tensor) -> None:
    shapes, expected = (tuple(y.shape), tuple(weight.shape)), ((x.shape[0], *model.event_shape), (x.shape[0],))
    kind = type(model.transform).__name__
    if shapes != expected or y.dtype != x.dtype:
        raise PredictorError(
            f"{kind} returned latents and log-weights of shapes {shapes[0]} and {shapes[1]}, {y.dtype}, expected "
            f"{expected[0]} and {expected[1]}, {x.dtype}."
        )
    rows = checks.bad_rows(torch.cat([y.flatten(1), weight[:, None].to(y.dtype)], 1))
    if rows:
        raise PredictorError(
            f"{kind} returned NaN or inf in batch rows {checks.some(rows)}; check its weights and the scale of x."
        )


def _prior_scale(schedule: Schedule) -> float:
    return schedule.sigma_max if isinstance(schedule, VarianceExploding) else 1.0


def _sigma(schedule: Schedule, t: float) -> float:
    with torch.no_grad():
        return float(schedule(as_time(t, schedule.device)).sigma)


def _validate_t_min(t_min: float | None, schedule: Schedule, prediction: str) -> float:
    if t_min is None:
        return schedule.safe_t_min
    checks.validate_number("t_min", t_min)
    if not 0.0 <= t_min < 1.0:
        raise ValueError(f"t_min must lie in [0, 1), got {t_min!r}.")
    if prediction != "velocity" and not _sigma(schedule, t_min) > 0.0:
        raise ValueError(
            f"t_min={t_min!r} has sigma = 0 under {type(schedule).__name__}, where the score, and a velocity "
            f"computed from prediction={prediction!r}, are singular; use t_min={schedule.safe_t_min:.3g} (the "
            "default) or another small positive time. For a network that is the velocity pass prediction='velocity'."
        )
    return float(t_min)
