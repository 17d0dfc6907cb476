r"""The model: a forward process, a predictor, a prior and a time interval.

The predictor's output becomes the pair :math:`(\hat F, \hat{\dot F})` that the dynamics need:

=============  ====================================================================================================
``"x"``        :math:`\hat x` is predicted; the pair is :math:`F(\hat x, t), \dot F(\hat x, t)` (the paper)
``"eps"``      :math:`\hat x = (z - \sigma\hat\epsilon)/\alpha`; F must be the identity
``"v"``        :math:`v = \alpha\epsilon - \sigma x`, :math:`\hat x = (\alpha z - \sigma\hat v)/(\alpha^2+\sigma^2)`;
               F must be the identity (this is not the velocity :math:`\epsilon - x` of flow matching)
``"moments"``  the pair itself, estimates of :math:`E[F \mid z], E[\dot F \mid z]`; no transform is evaluated
=============  ====================================================================================================

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
    Salimans and Ho, Progressive Distillation (the v-prediction), https://arxiv.org/abs/2202.00512
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ndm_ct._core import checks as _shapes
from ndm_ct._core.checks import as_time, expand, expand_time
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.errors import PredictorError
from ndm_ct._core.keywords import accepted_by, keyword_names, validate_cond
from ndm_ct._core.noise import GeneratorLike, as_randomness, normal_like
from ndm_ct._core.parallel import unwrapped
from ndm_ct._core.precision import run_network
from ndm_ct.dynamics import ProbabilityFlow, ReverseSDE
from ndm_ct.process import ForwardProcess, Volatility
from ndm_ct.schedules.base import Schedule
from ndm_ct.schedules.fixed import LinearLogSNR, VarianceExploding
from ndm_ct.transforms import Identity, Path, Transform

__all__ = ["NDM", "IsotropicNormal", "NormalKL", "Prior", "validate_prediction"]

PREDICTIONS = ("x", "eps", "v", "moments")


class Prior(Protocol):
    """The distribution of :math:`z_1`. A ``torch.distributions`` object over events will do."""

    def log_prob(self, z: Tensor, /) -> Tensor:
        """Log density in nats, ``(B, *E)`` to ``(B,)``."""
        ...


@runtime_checkable
class NormalKL(Protocol):
    """A prior that knows its divergence from a diagonal normal in closed form."""

    def kl_from_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        r""":math:`KL(N(\mathrm{mean}, \mathrm{std}^2) \,\|\, p_1)`, ``(B, *E)`` twice to ``(B,)``."""
        ...


class Predictor(Protocol):
    """What a predictor may declare, all of it optional, as attributes or methods; a plain network declares nothing.

    ==========================  ======================================================================================
    ``prediction``              what its output means, a string; the model's prediction must agree
    ``wants_schedule``          True: it is called as ``predictor(z, t, schedule, **cond)``
    ``null``                    dict of the conditioning values that mean "no conditioning"
    ``evaluations_per_call``    network evaluations of one call, 1 unless it says so
    ``cond_names()``            names of conditioning it takes, and whether it takes any
    ``validate_event(shape)``   raises for an event shape that it was not built for
    ``validate_schedule(s)``    raises for a schedule that it cannot be used with
    ==========================  ======================================================================================
    """

    def __call__(self, z: Tensor, t: Tensor, /, **cond: Any) -> Any:
        """The prediction at states z ``(B, *E)`` and times t ``(B,)``."""
        ...


class IsotropicNormal:
    r""":math:`N(0, s^2 I)` over an event.

    Args:
        event_shape: E.
        scale: s.
    """

    def __init__(self, event_shape: Sequence[int], scale: float = 1.0) -> None:
        self.event_shape, self.scale = tuple(event_shape), scale

    def log_prob(self, z: Tensor) -> Tensor:
        d = _shapes.event_size(self.event_shape)
        return -0.5 * (_shapes.sum_event((z / self.scale) ** 2) + d * math.log(2.0 * math.pi * self.scale**2))

    def sample(
        self,
        n: int,
        *,
        generator: GeneratorLike = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw ``(n, *E)``."""
        like = torch.empty((n, *self.event_shape), dtype=dtype, device=device)
        noise = normal_like(like, as_randomness(generator, n, like.device, "prior"))
        return self.scale * noise

    def kl_from_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        ratio = (std / self.scale) ** 2
        return 0.5 * _shapes.sum_event((mean / self.scale) ** 2 + ratio - ratio.log() - 1.0)


class NDM(nn.Module):
    r"""A Neural Diffusion Model: noise a transform of x, generate by its probability flow or reverse SDE.

    .. math::
        q(z_t \mid x) = N(\alpha_t F_\varphi(x, t),\ \sigma_t^2 I)

    Args:
        predictor: callable ``(z (B, *E), t (B,), **cond) -> (B, *E)`` (a pair of these for ``"moments"``); an
            ``nn.Module`` or a function (:class:`Predictor` lists what it may declare). Modules that a function merely
            closes over are not part of the model. Of ``DistributedDataParallel``, ``DataParallel`` and
            ``torch.compile``, here and in transforms, the network inside is taken; it still runs compiled.
        event_shape: E, the shape of one state z, and of one data point unless the transform is an Encoder.
        transform: :math:`F`; None is the identity, an ordinary diffusion.
        schedule: :math:`\alpha, \sigma`; None is ``LinearLogSNR(gamma_min=-13.3, gamma_max=5.0)``.
        volatility: :math:`\eta` in :math:`g^2 = \eta\sigma^2\gamma'`, a float or a callable of t.
        prediction: what the predictor returns: "x", "eps", "v" or "moments".
        prior: distribution of :math:`z_1` with ``log_prob`` and ``sample(n, generator=, dtype=, device=)`` or
            ``sample((n,))``; None is :math:`N(0, s^2 I)`, s = :math:`\sigma_1` for VarianceExploding, else 1.
        t_min: where data lives; None is the schedule's own safe value, 0 where :math:`\sigma_0 > 0`.

    Raises:
        ValueError: an unknown prediction; a network of ``ndm_ct.nn`` for other events; "eps" or "v" with a transform;
            "eps" where alpha = 0; t_min outside [0, 1) or 0 where :math:`\sigma_0 = 0`.

    Example:
        >>> model = NDM(lambda z, t: 0.5 * z, event_shape=(2,))
        >>> model.velocity(torch.zeros(3, 2), 0.5).shape
        torch.Size([3, 2])
    """

    residuals: Tensor | None
    """Times, second moments and standard errors, ``(7, N)``, if ``discrete.estimate_residuals`` has measured them."""

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
        t_min: float | None = None,
    ) -> None:
        super().__init__()
        predictor = unwrapped(predictor)
        if not callable(predictor):
            raise TypeError(f"predictor must be callable as predictor(z, t), got {type(predictor).__name__}.")
        hidden = getattr(predictor, "func", getattr(predictor, "__self__", None))
        if isinstance(hidden, nn.Module) and not isinstance(predictor, nn.Module):
            raise TypeError(
                f"predictor hides an nn.Module ({type(hidden).__name__}) in a partial or a bound method, so its "
                "weights would not be trained, saved or moved; pass the module itself, and conditioning as keywords."
            )
        transform = Identity() if transform is None else transform
        schedule = LinearLogSNR() if schedule is None else schedule
        for name, value, kind in (("transform", transform, Transform), ("schedule", schedule, Schedule)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__} of ndm_ct, got {type(value).__name__}.")
        self.event_shape = _shapes.validate_shape("event_shape", event_shape)
        self.prediction = _shapes.choose("prediction", prediction, PREDICTIONS)
        self.process = ForwardProcess(transform, schedule, volatility)
        self.predictor = predictor
        self.t_min = _validate_t_min(t_min, schedule)
        self._validate_prediction()
        self.has_custom_prior = prior is not None
        self.prior = prior if prior is not None else IsotropicNormal(self.event_shape, _prior_scale(schedule))
        self.register_buffer("residuals", None)
        if hasattr(predictor, "validate_event"):
            predictor.validate_event(self.event_shape)
        if hasattr(predictor, "validate_schedule"):
            predictor.validate_schedule(schedule)
        self._wants_schedule = getattr(predictor, "wants_schedule", False) is True
        self._predictor_names = names, anything = keyword_names(predictor, 2)
        transform_names, transform_anything = transform.cond_names()
        self.cond_names = names | transform_names, anything or transform_anything

    def _validate_prediction(self) -> None:
        declared = getattr(self.predictor, "prediction", self.prediction)
        if isinstance(declared, str) and declared != self.prediction:
            raise ValueError(
                f"the predictor is built for prediction={declared!r}, but prediction={self.prediction!r} was asked "
                "for; make the two agree."
            )
        if self.prediction not in ("eps", "v"):
            return
        if not isinstance(self.transform, Identity):
            raise ValueError(
                f"prediction={self.prediction!r} recovers x only where F is the identity, but transform is "
                f"{type(self.transform).__name__}; use prediction='x' or 'moments'."
            )
        with torch.no_grad():
            at_one = self.schedule(as_time(1.0, self.schedule.device))
        if self.prediction == "eps" and float(at_one.alpha) < 1e-12:
            raise ValueError(
                f"prediction='eps' divides by alpha, and {type(self.schedule).__name__} has alpha(1) = 0; use "
                "prediction='v' or 'x'."
            )

    @property
    def transform(self) -> Transform:
        """The transform F."""
        return self.process.transform

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self.process.schedule

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one data point."""
        return self.event_shape if self.transform.data_shape is None else self.transform.data_shape

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the networks' parameters; None if they have none."""
        parameter = self._network_parameter()
        return None if parameter is None else parameter.dtype

    @property
    def device(self) -> torch.device | None:
        """Device of the networks' parameters; None if they have none."""
        parameter = self._network_parameter()
        return None if parameter is None else parameter.device

    def _network_parameter(self) -> Tensor | None:
        for module in (self.predictor, self.transform):
            if isinstance(module, nn.Module):
                for parameter in module.parameters():
                    if parameter.is_floating_point():
                        return parameter
        return None

    def moments(self, z: Tensor, t: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        r"""The model's :math:`(\hat F, \hat{\dot F})`.

        Args:
            z: state, shape ``(B, *E)``.
            t: time, float64, ``()`` or ``(B,)``.
            cond: conditioning of predictor and transform.

        Raises:
            PredictorError: the predictor returned the wrong shape, dtype, or no pair for "moments".
        """
        if self.prediction == "moments":
            return self._pair(self._predict(z, t, cond), z)
        return self.transform.with_derivative(self.predict_x(z, t, **cond), t, **cond)

    def frozen(self, z: Tensor, t: Tensor, s: Tensor, /, **cond: Any) -> tuple[Tensor, Tensor]:
        r"""The model's F at t and at s < t from one prediction at t, for steps that freeze it.

        For a prediction of x these are :math:`F(\hat x, t), F(\hat x, s)`; for "moments"
        :math:`\hat F` and :math:`\hat F + (s - t) \hat{\dot F}`.

        Args:
            z: state :math:`z_t`, shape ``(B, *E)``.
            t: its time, float64, ``()`` or ``(B,)``.
            s: the time stepped to, of the shape of ``t``.
            cond: conditioning.

        Raises:
            PredictorError: as in ``moments``, or the prediction is NaN or infinite (with time and rows).
        """
        if self.prediction == "moments":
            F, dF = self.moments(z, t, **cond)
            F_s = F + expand(s - t, z) * dF
        else:
            path = self.transform.along(self.predict_x(z, t, **cond), **cond)
            F, F_s = path(t), path(s)
        validate_prediction(F_s, t)
        return F, F_s

    def predict_x(self, z: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        r""":math:`\hat x(z, t)`, shape of ``z``.

        Raises:
            ValueError: the head is "moments", which predicts F and not x.
        """
        if self.prediction == "moments":
            raise ValueError("a model with prediction='moments' predicts (F, dF/dt), not x; call moments().")
        output = self._validated(self._predict(z, t, cond), z)
        if self.prediction == "x":
            return output
        c = self.schedule(t)
        alpha, sigma = expand(c.alpha, z), expand(c.sigma, z)
        if self.prediction == "eps":
            return (z - sigma * output) / alpha
        return (alpha * z - sigma * output) / (alpha**2 + sigma**2)

    def _predict(self, z: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Any:
        # A copy, so that a predictor that works in place cannot change the state or the caller's data.
        state, time, cond = z.clone(), expand_time(t, z), accepted_by(self._predictor_names, cond)
        if self._wants_schedule:
            return run_network(self.predictor, state, time, self.schedule, **cond)
        return run_network(self.predictor, state, time, **cond)

    def _pair(self, output: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        if not (isinstance(output, tuple | list) and len(output) == 2):
            came = f"{len(output)} values" if isinstance(output, tuple | list) else type(output).__name__
            raise PredictorError(
                f"prediction='moments' needs a pair (F, dF/dt) from the predictor, got {came}; return two tensors of "
                "the shape of z."
            )
        return self._validated(output[0], z), self._validated(output[1], z)

    def _validated(self, output: Any, z: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise PredictorError(
                f"the predictor returned {type(output).__name__}, expected a tensor of shape {tuple(z.shape)} for "
                f"prediction={self.prediction!r}."
            )
        if output.shape != z.shape:
            raise PredictorError(
                f"the predictor returned shape {tuple(output.shape)}, expected {tuple(z.shape)}, the shape of z."
            )
        if output.dtype != z.dtype:
            raise PredictorError(
                f"the predictor returned dtype {output.dtype} for z of {z.dtype}; keep one dtype (autocast inside the "
                f"network is fine, if its output is cast back)."
            )
        return output

    def flow(self, dtype: torch.dtype | None = None, /, **cond: Any) -> ProbabilityFlow:
        """The probability flow under fixed conditioning, for ``torchdiffeq.odeint(flow, z, times)``.

        Args:
            dtype: precision in which the network is evaluated; None is that of its parameters.
            cond: conditioning.
        """
        dtype = self.dtype if dtype is None else dtype
        return ProbabilityFlow(self.process, lambda z, t: self.moments(z, t, **cond), dtype, self.t_min)

    def reverse_sde(self, dtype: torch.dtype | None = None, /, **cond: Any) -> ReverseSDE:
        """The reverse SDE under fixed conditioning, for ``torchsde.sdeint(sde, y, times)``.

        Args:
            dtype: precision in which the network is evaluated; None is that of its parameters.
            cond: conditioning.
        """
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
        given = self.validate_state(z, cond, self.velocity)
        time = _shapes.validate_time(t, self.t_min, z)
        velocity = self.flow(z.dtype, **given)(time, z)
        validate_prediction(velocity, time)
        return velocity

    def score(self, z: Tensor, t: float | Tensor, /, **cond: Any) -> Tensor:
        r"""The model's score :math:`(\alpha\hat F - z)/\sigma^2`; arguments and shapes as in ``velocity``."""
        given = self.validate_state(z, cond, self.score)
        time = _shapes.validate_time(t, self.t_min, z)
        F, _ = self.moments(z, time, **given)
        score = self.flow(z.dtype, **given).score(time, z, F)
        validate_prediction(score, time)
        return score

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
        _shapes.validate_data(x, self.data_shape, name=name, dtype=self.dtype, device=self.device)
        return given

    def validate_state(
        self, z: Tensor, cond: Mapping[str, Any], caller: Callable[..., Any], *, name: str = "z"
    ) -> Conditioning:
        """The same for states."""
        given = self.conditioning(cond, z, caller)
        _shapes.validate_data(z, self.event_shape, name=name, dtype=self.dtype, device=self.device)
        return given

    def conditioning(self, cond: Mapping[str, Any], like: Tensor, caller: Callable[..., Any]) -> Conditioning:
        """The conditioning of a batch, its names checked.

        Args:
            cond: values by name; a :class:`Conditioning` is returned as it is.
            like: rows of the batch, for their number, dtype and device.
            caller: the public function that was called, for messages.

        Raises:
            TypeError: a name that neither predictor nor transform takes.
        """
        validate_cond(cond, self.cond_names, caller)
        if isinstance(cond, Conditioning):
            return cond
        rows = len(like) if isinstance(like, Tensor) and like.ndim > 0 else 0
        return Conditioning(cond, rows, _Probe(self, like))

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
            self._validate_latent(y, weight, x)
        return y, weight

    def _validate_latent(self, y: Tensor, weight: Tensor, x: Tensor) -> None:
        shapes, expected = (tuple(y.shape), tuple(weight.shape)), ((x.shape[0], *self.event_shape), (x.shape[0],))
        kind = type(self.transform).__name__
        if shapes != expected or y.dtype != x.dtype:
            raise PredictorError(
                f"{kind} returned latents and log-weights of shapes {shapes[0]} and {shapes[1]}, {y.dtype}, expected "
                f"{expected[0]} and {expected[1]}, {x.dtype}."
            )
        rows = _shapes.bad_rows(torch.cat([y.flatten(1), weight[:, None].to(y.dtype)], 1))
        if rows:
            raise PredictorError(
                f"{kind} returned NaN or inf in batch rows {_shapes.some(rows)}; check its weights and the scale of x."
            )

    def log_prior(self, z: Tensor) -> Tensor:
        r""":math:`\log p_1(z)`, nats, ``(B, *E)`` to ``(B,)``, in the dtype of z.

        Raises:
            ValueError: the prior's log_prob does not return one number per row.
        """
        parameters = self.prior.parameters() if isinstance(self.prior, nn.Module) else iter(())
        dtype = next((parameter.dtype for parameter in parameters), z.dtype)
        value = self.prior.log_prob(z.to(dtype))
        if tuple(value.shape) != (z.shape[0],):
            raise ValueError(
                f"prior.log_prob returned shape {tuple(value.shape)} for {z.shape[0]} events, expected "
                f"({z.shape[0]},); wrap the distribution in torch.distributions.Independent."
            )
        return cast(Tensor, value.to(z.dtype))

    def prior_divergence(self, path: Path, x: Tensor, generator: GeneratorLike) -> Tensor:
        r""":math:`KL(q(z_1 \mid x) \,\|\, p(z_1))`, nats, ``(B,)``: exact if the prior knows it, else one sample.

        Args:
            path: :math:`t \mapsto F(x, t)`, from ``transform.along(x)``.
            x: data, shape ``(B, *E)``.
            generator: source of the one sample.
        """
        c = self.schedule(as_time(1.0, x.device).expand(x.shape[0]))
        mean = expand(c.alpha, x) * path(as_time(1.0, x.device).expand(x.shape[0]))
        std = expand(c.sigma, x).expand_as(x)
        if isinstance(self.prior, NormalKL):
            return self.prior.kl_from_normal(mean, std)
        eps = normal_like(x, as_randomness(generator, len(x), x.device, "prior_divergence"))
        log_q = -_shapes.sum_event(0.5 * eps**2 + std.log() + 0.5 * math.log(2.0 * math.pi))
        return log_q - self.log_prior(mean + std * eps)

    def sample_prior(
        self, n: int, *, generator: GeneratorLike, dtype: torch.dtype, device: torch.device | str | None
    ) -> Tensor:
        """Draw :math:`z_1`, shape ``(n, *E)``, from one generator or one per row."""
        source = as_randomness(generator, n, device or self.device or "cpu", "prior")
        if not (source is None or isinstance(source, torch.Generator)):
            rows = [self.sample_prior(1, generator=each, dtype=dtype, device=device) for each in source]
            return torch.cat(rows) if rows else torch.empty((0, *self.event_shape), dtype=dtype, device=device)
        if isinstance(self.prior, torch.distributions.Distribution):
            if source is not None:
                raise ValueError(
                    "a torch.distributions prior cannot draw from a generator; give the prior a method "
                    "sample(n, generator=, dtype=, device=), or leave generator out."
                )
            return self.prior.sample(torch.Size((n,))).to(dtype=dtype, device=device)
        return cast(Tensor, self.prior.sample(n, generator=source, dtype=dtype, device=device))

    def with_volatility(self, *, scale: float) -> "NDM":
        r"""The model with the volatility :math:`\eta` multiplied by ``scale``, everything else shared.

        Raises:
            ValueError: scale is negative or not finite.
        """
        _shapes.validate_number("stochasticity", scale)
        if not (math.isfinite(scale) and scale >= 0.0):
            raise ValueError(f"stochasticity must be a finite number >= 0, got {scale!r}.")
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.process = self.process.with_volatility(scale)
        return other

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        # A state brings its residuals, of any length, or none; those of other weights would be wrong.
        came = state_dict.get(f"{prefix}residuals")
        self.residuals = None if came is None else torch.empty_like(came, device=self.device)
        super()._load_from_state_dict(state_dict, prefix, *others)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode for the length of a solve, every submodule's own mode restored afterwards."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    def extra_repr(self) -> str:
        return f"event_shape={self.event_shape}, prediction={self.prediction!r}, t_min={self.t_min:g}"


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
                outputs += transform.with_derivative(z, t, **cond)
            if transform.latent:
                noise = [torch.Generator(z.device).manual_seed(place) for place in places.tolist()]
                latents, weight = transform.to_latent(x, generator=noise, **cond)
                outputs += [latents, transform.from_latent(z, **cond), *(() if weight is None else (weight,))]
        return torch.cat([output.reshape(len(places), -1).double() for output in outputs], 1)


def validate_prediction(prediction: Tensor, t: Tensor) -> None:
    """Refuse a prediction with NaN or inf, naming rows and times.

    Raises:
        PredictorError: naming the rows and the time of the first.
    """
    rows = _shapes.bad_rows(prediction)
    if rows:
        time = float(t.expand(prediction.shape[0])[rows[0]])
        raise PredictorError(
            f"the predictor returned NaN or inf at t={time:.6g} in batch rows {_shapes.some(rows)}; check its weights "
            "and its scale near the ends of the time interval."
        )


def _prior_scale(schedule: Schedule) -> float:
    return schedule.sigma_max if isinstance(schedule, VarianceExploding) else 1.0


def _validate_t_min(t_min: float | None, schedule: Schedule) -> float:
    if t_min is None:
        return schedule.safe_t_min
    _shapes.validate_number("t_min", t_min)
    if not 0.0 <= t_min < 1.0:
        raise ValueError(f"t_min must lie in [0, 1), got {t_min!r}.")
    with torch.no_grad():
        sigma = float(schedule(as_time(t_min, schedule.device)).sigma)
    if not sigma > 0.0:
        raise ValueError(
            f"t_min={t_min!r} has sigma = 0 under {type(schedule).__name__}, where score and velocity are singular; "
            f"use t_min={schedule.safe_t_min:.3g} (the default) or another small positive time."
        )
    return float(t_min)
