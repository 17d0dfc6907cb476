r"""The prediction: what a predictor returns and how the model uses it.

The model's ``prediction`` says how the output becomes the pair :math:`(\hat F, \hat{\dot F})` that the dynamics need:

==============  ====================================================================================================
``"x"``         :math:`\hat x` is predicted; the pair is :math:`F(\hat x, t), \dot F(\hat x, t)` (the paper)
``"eps"``       :math:`\hat x = (z - \sigma\hat\epsilon)/\alpha`; F must be the identity
``"v"``         :math:`v = \alpha\epsilon - \sigma x`, :math:`\hat x = (\alpha z - \sigma\hat v)/(\alpha^2+\sigma^2)`;
                F must be the identity (this is not the velocity :math:`\epsilon - x` of flow matching)
``"velocity"``  the velocity of the flow itself, :math:`u = \alpha' x + \sigma' \epsilon`, in this library's direction
                of time (flow matching's :math:`\epsilon - x`); F must be the identity. The flow takes it as it is, and
                :math:`\hat x = (\sigma' z - \sigma\hat u)/(\alpha\sigma' - \sigma\alpha')`
``"moments"``   the pair itself, estimates of :math:`E[F \mid z], E[\dot F \mid z]`; no transform is evaluated
==============  ====================================================================================================

With a scale of the noise the pair is :math:`(F_e, \dot F_e)` of :mod:`ndm_ct.process`, at :math:`\hat x` and z, and its
means are what "moments" predicts.

References:
    Bartosh, Vetrov and Naesseth, Neural Diffusion Models, https://arxiv.org/abs/2310.08337
    Salimans and Ho, Progressive Distillation (the v-prediction), https://arxiv.org/abs/2202.00512
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ndm_ct._core.autodiff import Derivatives
from ndm_ct._core.checks import (
    as_tensor,
    as_time,
    bad_rows,
    expand,
    expand_time,
    first_parameter,
    some,
    validate_number,
    validate_visible,
    with_float64,
)
from ndm_ct._core.conditioning import Conditioning
from ndm_ct._core.errors import PredictorError
from ndm_ct._core.keywords import accepted_by, keyword_names
from ndm_ct._core.parallel import unwrapped
from ndm_ct._core.precision import HALVES, autocast_in_networks, run_network, state_dtype
from ndm_ct.process import ForwardProcess, denoised
from ndm_ct.schedules import Schedule
from ndm_ct.transforms import Identity, NoiseScale, Transform

__all__ = ["PREDICTIONS", "PredictedProcess", "Predictor", "explain", "validate_finite", "validate_predictor"]

PREDICTIONS = ("x", "eps", "v", "velocity", "moments")


class Predictor(Protocol):
    """What a predictor may declare as attributes or methods. All of it is optional; a plain network declares nothing.

    ==========================  ======================================================================================
    ``prediction``              what its output means, a string; the model's prediction must agree
    ``wants_schedule``          True: it is called as ``predictor(z, t, schedule, **cond)``
    ``runs_network``            True: it casts what a network inside of it gets to that one's precision
    ``null``                    dict of the conditioning values that mean "no conditioning"
    ``evaluations_per_call``    network evaluations of one call, 1 unless it says so
    ``cond_names()``            names of the conditioning it takes, and whether it takes any other
    ``validate_event(shape)``   raises for an event shape that it was not built for
    ``validate_schedule(s)``    raises for a schedule that it cannot be used with
    ==========================  ======================================================================================
    """

    def __call__(self, z: Tensor, t: Tensor, /, **cond: Any) -> Any:
        """The prediction at states z ``(B, *E)`` and times t ``(B,)``."""
        ...


class PredictedProcess(nn.Module):
    r"""A forward process with a prediction in place of x.

    Args:
        process: the forward process.
        predictor: as :func:`validate_predictor` returns it.
        prediction: what its output means, one of ``PREDICTIONS``.
    """

    event_shape: tuple[int, ...]
    """E, the shape of a state without the batch."""

    def __init__(self, process: ForwardProcess, predictor: Callable[..., Any], prediction: str) -> None:
        super().__init__()
        self.process, self.predictor, self.prediction = process, predictor, prediction
        self.predictor_names = keyword_names(predictor, 2)
        self.derivatives = Derivatives(self)
        self._lazy = any(map(is_lazy, self.parameters()))

    @property
    def transform(self) -> Transform:
        """The transform F."""
        return self.process.transform

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self.process.schedule

    @property
    def noise_scale(self) -> NoiseScale | None:
        """The scale of the noise, log S; None is S = 1."""
        return self.process.noise_scale

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of states: that of the networks' parameters, float32 for half precision; None without parameters."""
        return state_dtype(self.predictor, self.transform, self.noise_scale)

    @property
    def network_dtype(self) -> torch.dtype | None:
        """Dtype of the networks' first parameter, in which they may run; None if they have no parameters."""
        parameter = first_parameter(self.predictor, self.transform, self.noise_scale)
        return None if parameter is None else parameter.dtype

    @property
    def data_dtype(self) -> torch.dtype | None:
        """The dtype that data must have; None: float32 or float64, for networks that have neither or no parameters."""
        return self.dtype if self.network_dtype == self.dtype else None

    def as_data(self, x: Any) -> Any:
        """Data as a tensor of states: a numpy array is converted, as is half precision for networks of half precision.

        Args:
            x: what a user passed as data; anything else is returned as it is.
        """
        if isinstance(x, Tensor) and x.dtype in HALVES and self.network_dtype in HALVES:
            return x.to(self.dtype)
        return as_tensor(x, self.dtype, self.device)

    @property
    def device(self) -> torch.device | None:
        """Device of the networks' parameters; None if they have none. Raises ValueError for one without float64."""
        parameter = first_parameter(self.predictor, self.transform, self.noise_scale)
        return None if parameter is None else with_float64(parameter.device)

    @property
    def unit(self) -> float:
        r"""The scale of the data, :attr:`ndm_ct.schedules.Schedule.unit`; absolute tolerances are multiples of it."""
        return self.schedule.unit

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch to eval mode for the length of a solve; afterwards every submodule is in its mode from before.

        Autocast that is on runs the networks in its precision, and nothing else.
        """
        modes = [(module, module.training) for module in self.modules()]
        try:
            self.eval()
        except NotImplementedError:  # graphs of torch.export have one mode
            for module in self.modules():
                module.training = False
        try:
            with autocast_in_networks(self.device):
                yield
        finally:
            for module, training in modes:
                module.training = training

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
            return _validate_pair(self._predict(z, t, cond), z)
        return self.process.along(self.predict_x(z, t, **cond), **cond).pair_at(t, z)

    def frozen(
        self, z: Tensor, t: Tensor, s: Tensor, std: float | Tensor = 0.0, /, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        r"""The model's F at t and at s < t from one prediction at t, for steps that freeze it.

        For a prediction of x these are :math:`F(\hat x, t), F(\hat x, s)`; for "moments"
        :math:`\hat F` and :math:`\hat F + (s - t) \hat{\dot F}`. Where the noise has a scale, the second F of a
        prediction of x also takes up what S changes in the step, so that the mean of the step is that of
        :math:`q(z_s \mid z_t, \hat x)`; with a volatility that varies over the event it is treated as "moments".

        Args:
            z: state :math:`z_t`, shape ``(B, *E)``.
            t: its time, float64, ``()`` or ``(B,)``.
            s: the time stepped to, of the shape of ``t``.
            std: :math:`\tilde\sigma` of the step, which matters for noise with a scale alone.
            cond: conditioning.

        Raises:
            PredictorError: the prediction has the wrong shape or dtype, or is NaN or infinite (with time and rows).
        """
        varies = isinstance(std, Tensor) and std.ndim > 1  # perhaps in another basis than S
        if self.prediction == "moments" or (self.noise_scale is not None and varies):
            F, dF = self.moments(z, t, **cond)
            F_s = F + expand(s - t, z) * dF
        else:
            path = self.process.along(self.predict_x(z, t, **cond), **cond)
            F, F_s = path.F(t), path.F(s)
            if path.r is not None:
                F_s = F_s + path.carried(z, F, s, t, std)
        validate_finite(F_s, t)
        return F, F_s

    def predict_x(self, z: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        r""":math:`\hat x(z, t)`, shape of ``z``.

        Args:
            z: state, shape ``(B, *E)``.
            t: time, float64, ``()`` or ``(B,)``.
            cond: conditioning.

        Raises:
            ValueError: the prediction is "moments", which predicts F and not x.
        """
        if self.prediction == "moments":
            raise ValueError("a model with prediction='moments' predicts (F, dF/dt), not x; call moments().")
        output = _validate_output(self._predict(z, t, cond), self.prediction, z)
        if self.prediction == "x":
            return output
        c = self.schedule(t)
        alpha, sigma = expand(c.alpha, z), expand(c.sigma, z)
        if self.prediction == "eps":
            return (z - sigma * output) / alpha
        if self.prediction == "velocity":
            return denoised(z, output, c)
        return (alpha * z - sigma * output) / (alpha**2 + sigma**2)

    def output(self, z: Tensor, t: Tensor, /, **cond: Any) -> Tensor:
        r"""What the predictor returns, one tensor, such as the velocity :math:`\hat u(z, t)`; arguments as of
        :meth:`predict_x`.
        """
        return _validate_output(self._predict(z, t, cond), self.prediction, z)

    def initialise(self, like: Tensor, cond: Conditioning) -> None:
        """Give layers that are lazy still their shapes, by an evaluation outside of any derivative.

        Args:
            like: rows of the batch, for their number, dtype and device.
            cond: their conditioning.
        """
        if not self._lazy:
            return
        rows = len(like) if cond else 1
        z, t = like.new_zeros(rows, *self.event_shape), as_time(0.5, like.device).expand(rows)
        with self.evaluating(), torch.no_grad():
            self.process.along(z, **cond).at(t)
            self._predict(z, t, cond)
        self._lazy = False

    def with_volatility(self, *, scale: float) -> Self:
        r"""The model with the volatility :math:`\eta` multiplied by ``scale``, everything else shared.

        Raises:
            ValueError: scale is negative or not finite.
        """
        validate_number("stochasticity", scale)
        if not (math.isfinite(scale) and scale >= 0.0):
            raise ValueError(f"stochasticity must be a finite number >= 0, got {scale!r}.")
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.process = self.process.with_volatility(scale)
        return other

    def _predict(self, z: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Any:
        # A copy, so that a predictor that works in place cannot change the state or the caller's data.
        inputs: tuple[Any, ...] = z.clone(), expand_time(t, z)
        if getattr(self.predictor, "wants_schedule", False) is True:
            inputs = *inputs, self.schedule
        return run_network(self.predictor, *inputs, **accepted_by(self.predictor_names, cond))


def validate_predictor(
    predictor: Any, prediction: str, event_shape: tuple[int, ...], transform: Transform, schedule: Schedule
) -> Callable[..., Any]:
    """The predictor without its wrappers, after a check that it fits the other parts of the model.

    Args:
        predictor: as the user gave it.
        prediction: what its output means, one of ``PREDICTIONS``.
        event_shape: E.
        transform: F.
        schedule: alpha and sigma.

    Raises:
        TypeError: it is not callable, or hides a module whose weights would be lost.
        ValueError: it declares another prediction, or rejects the event shape or the schedule; "eps", "v" or
            "velocity" with a transform; "eps" where alpha = 0.
    """
    predictor = unwrapped(predictor)
    if not callable(predictor):
        raise TypeError(f"predictor must be callable as predictor(z, t), got {type(predictor).__name__}.")
    validate_visible("predictor", predictor)
    declared = getattr(predictor, "prediction", prediction)
    if isinstance(declared, str) and declared != prediction:
        raise ValueError(
            f"the predictor is built for prediction={declared!r}, but prediction={prediction!r} was asked "
            "for; make the two agree."
        )
    if prediction in ("eps", "v", "velocity"):
        _validate_ordinary(prediction, transform, schedule)
    if hasattr(predictor, "validate_event"):
        predictor.validate_event(event_shape)
    if hasattr(predictor, "validate_schedule"):
        predictor.validate_schedule(schedule)
    return predictor


def validate_noise_scale(process: ForwardProcess, prediction: str) -> None:
    """Raise unless a process with a scale of the noise has a pair, and the prediction determines it.

    Args:
        process: the forward process.
        prediction: one of ``PREDICTIONS``.

    Raises:
        ValueError: a noise scale with "eps", "v" or "velocity", or with a schedule that ends at alpha = 0.
    """
    if process.noise_scale is None:
        return
    if prediction not in ("x", "moments"):
        raise ValueError(
            f"prediction={prediction!r} recovers x only where the noise has one size, but a noise_scale is given; use "
            "prediction='x' or 'moments'."
        )
    schedule = process.schedule
    with torch.no_grad():
        at_one = schedule(as_time(1.0, schedule.device))
    if float(at_one.alpha) < 1e-12:
        raise ValueError(
            f"noise_scale needs alpha(1) > 0, because its velocity divides by alpha, but {type(schedule).__name__} has "
            "alpha(1) = 0; use a schedule with a finite log-SNR, such as LinearLogSNR or StraightToNoise."
        )


def _validate_ordinary(prediction: str, transform: Transform, schedule: Schedule) -> None:
    """Raise unless x can be recovered from a prediction "eps", "v" or "velocity"."""
    if not isinstance(transform, Identity):
        raise ValueError(
            f"prediction={prediction!r} recovers x only where F is the identity, but transform is "
            f"{type(transform).__name__}; use prediction='x' or 'moments'."
        )
    with torch.no_grad():
        at_one = schedule(as_time(1.0, schedule.device))
    if prediction == "eps" and float(at_one.alpha) < 1e-12:
        raise ValueError(
            f"prediction='eps' divides by alpha, and {type(schedule).__name__} has alpha(1) = 0; use "
            "prediction='v' or 'x'."
        )


def _validate_output(output: Any, prediction: str, z: Tensor) -> Tensor:
    """The output if it is a tensor with the shape and dtype of the state; else raises PredictorError."""
    if not isinstance(output, Tensor):
        raise PredictorError(
            f"the predictor returned {type(output).__name__}, expected a tensor of shape {tuple(z.shape)} for "
            f"prediction={prediction!r}, alone or in a tuple, dict or dataclass without another; return the one that "
            "is the prediction."
        )
    if output.shape != z.shape:
        raise PredictorError(
            f"the predictor returned shape {tuple(output.shape)}, expected {tuple(z.shape)}, the shape of z."
        )
    if output.dtype != z.dtype:
        raise PredictorError(
            f"the predictor returned dtype {output.dtype} for z of {z.dtype}; keep one dtype (autocast inside the "
            f"network is fine, if its output is cast back; trainings have fit(precision='bf16-mixed'))."
        )
    return output


def _validate_pair(output: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """The two outputs of a predictor of "moments"; raises PredictorError if they are not two such tensors."""
    if not (isinstance(output, tuple | list) and len(output) == 2):
        came = f"{len(output)} values" if isinstance(output, tuple | list) else type(output).__name__
        raise PredictorError(
            f"prediction='moments' needs a pair (F, dF/dt) from the predictor, got {came}; return two tensors of "
            "the shape of z."
        )
    return _validate_output(output[0], "moments", z), _validate_output(output[1], "moments", z)


def validate_finite(prediction: Tensor, t: Tensor) -> None:
    """Raise if a prediction holds NaN or infinity.

    Args:
        prediction: the prediction or what follows from it, shape ``(B, *E)``.
        t: its time, ``()`` or ``(B,)``, for the message.

    Raises:
        PredictorError: naming the rows and the time of the first.
    """
    rows = bad_rows(prediction)
    if rows:
        time = float(t.expand(prediction.shape[0])[rows[0]])
        raise PredictorError(
            f"the predictor returned NaN or inf at t={time:.6g} in batch rows {some(rows)}; check its weights "
            "and its scale near the ends of the time interval."
        )


_MISFITS = (RuntimeError, TypeError, ValueError, IndexError, AssertionError)
"""What networks raise for arguments of another number, shape or dtype than theirs."""


def explain(model: PredictedProcess, z: Tensor, t: Tensor, cond: Conditioning, rows: int, error: Exception) -> None:
    """Raise for a predictor that fails, with how it is called. What this library says of it is left to the work.

    Args:
        model: the model.
        z: the states for which it fails, ``(N, *E)``.
        t: their times, ``(N,)``.
        cond: conditioning of the whole batch.
        rows: rows of the batch.
        error: what was raised.

    Raises:
        PredictorError: with the cure, from the error.
    """
    if not isinstance(error, _MISFITS) or _is_ours(error):
        return
    how = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    try:
        model.moments(z[:1].expand(rows, *z.shape[1:]), t[:1].expand(rows), **cond)
    except Exception:  # for all rows too
        given = "".join(f", {name}={_described(value)}" for name, value in cond.items())
        raise PredictorError(
            f"the predictor fails ({how}) when it is called as predictor(z, t{given}) with z of shape "
            f"{tuple(z.shape)} and t of shape {tuple(t.shape)}, one real time for each row. A network that takes the "
            "time first needs time_first=True (from_velocity); one that takes times of another shape, such as (B, 1), "
            "or whole numbers needs a module around it that converts them; what else it takes is passed by keyword."
        ) from error
    raise PredictorError(
        f"the predictor takes {rows} rows, but not two of them ({how}). The time has shape (B,), one for each row: "
        "where it multiplies or joins z, give it z's axes, t[:, None] for vectors. What belongs to rows is passed by "
        "keyword, as tensors that may be in dicts, lists, tuples or dataclasses: rows are not taken out of tensors "
        "that the predictor holds itself, nor out of lists of anything else."
    ) from error


def _is_ours(error: Exception) -> bool:
    """Whether an error was raised in this library, in whose words it is, and not by the call of a network."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    calls = where == run_network.__module__ and not isinstance(error, PredictorError)
    return where.partition(".")[0] == "ndm_ct" and not calls


def _described(value: Any) -> str:
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
