r"""Classifier-free guidance: a conditional prediction extrapolated away from the unconditional one.

.. math::
    \hat y_w(z, t, c) = \hat y(z, t, \varnothing)
    + w\,\bigl[\hat y(z, t, c) - \hat y(z, t, \varnothing)\bigr]

for any kind of prediction, with the null values :math:`\varnothing` in the place of c. At fixed z and t the
score is an affine function of x, eps, v and of the pair of "moments", so the scores mix with the same weights,

.. math::
    s_w = s_\varnothing + w\,(s_c - s_\varnothing)

(with prediction "x", where F is linear in x). w = 1 is the conditional model, w = 0 the unconditional one, w > 1
guides; Ho and Salimans count from the conditional model, their weight is w - 1.

Warning:
    :math:`s_w` is the score of :math:`p_t(z)^{1-w} p_t(z|c)^w` at every t, but these are not the diffusions of one
    density, and the guided model generates another one than :math:`p(x)^{1-w} p(x|c)^w`. ``loglik`` of a guided model
    is the exact density of what its probability flow generates (its reverse SDE generates a third one). For
    :math:`p = N(0, u^2)` and :math:`p(\cdot|c) = N(0, v^2)` the flow, from no signal to no noise, makes a normal of
    variance :math:`u^{2(1-w)} v^{2w}`, while the product has the precision :math:`(1-w)/u^2 + w/v^2`; where both have
    one covariance, all agree.

References:
    Ho and Salimans, Classifier-Free Diffusion Guidance, https://arxiv.org/abs/2207.12598
    Bradley and Nakkiran, Classifier-Free Guidance is a Predictor-Corrector (what the density is not),
    https://arxiv.org/abs/2408.09000
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ndm_ct._core.checks import nearest, validate_number
from ndm_ct._core.conditioning import tensors_in
from ndm_ct._core.errors import PredictorError
from ndm_ct._core.keywords import keyword_names
from ndm_ct._core.precision import run_network
from ndm_ct.model import NDM
from ndm_ct.nn import null_of

__all__ = ["evaluations_per_call", "guided", "nulled"]


def guided(model: NDM, scale: float, null: Mapping[str, Any] | None = None) -> NDM:
    r"""The model whose prediction is :math:`u + w (c - u)`: guided by its own conditioning.

    c is the prediction with the conditioning given at call time, u that with the null values in its place. Both come
    from one call of the network with twice the rows; from two calls if null values have another shape than what they
    stand for (None, another number of tokens), or if it gets further tensors with as many entries as there are rows,
    which may or may not belong to them. Weights, transform, schedule, volatility and prior are those of
    ``model``, not copies; ``loglik``, ``elbo``, ``sample`` and every other function take the result as any model. To
    keep it in a file, save ``model`` and guide what is loaded.

    Args:
        model: a conditional model, trained with its conditioning dropped in some rows (``fit(cond_dropout=...)``), so
            that it can predict without it.
        scale: w. 1 is the conditional model, 0 the unconditional one, each by a single evaluation and with its bits.
        null: the conditioning that means none, by name: a number, which fills the tensors given at call time; a tensor
            that broadcasts to what is given, or that is one row of it with other sides (an empty prompt of another
            length); for dicts, lists and tuples one of their kind, or a number for all of their tensors; or None or
            anything else that the network takes in their place. null=None: the predictor's own, its attribute ``null``
            (for networks of ``ndm_ct.nn`` with classes ``{"label": -1}``).

    Returns:
        The guided model. Its predictor counts in ``evaluations_per_call`` how many evaluations of the network one call
        stands for: 2, or 1 for a scale of 0 or 1. All of ``null`` must be given at every call, tensors with one entry
        per row.

    Raises:
        TypeError: ``model`` is not a model, or ``scale`` is not a number.
        ValueError: ``scale`` is not finite; there is nothing to guide by; ``null`` names what the predictor does not
            take, or what the transform takes too.

    Example:
        >>> import ndm_ct
        >>> model = ndm_ct.NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2, classes=10)), event_shape=(2,))
        >>> ndm_ct.sample(guided(model, 3.0), 4, method="ddim", steps=8, label=torch.tensor([0, 1, 2, 9])).shape
        torch.Size([4, 2])
    """
    if not isinstance(model, NDM):
        raise TypeError(f"model must be an ndm_ct.NDM, got {type(model).__name__}.")
    validate_number("scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale!r}; 1 is the conditional model.")
    if null is not None and not isinstance(null, Mapping):
        raise TypeError(f"null must be a mapping of values by name, got {type(null).__name__}.")
    null = null_of(model.predictor) if null is None else dict(null)
    _validate_null(model, null)
    predictor = _Guided(model.predictor, float(scale), null)
    result = NDM(
        predictor,
        model.event_shape,
        transform=model.transform,
        schedule=model.schedule,
        volatility=model.process.volatility,
        prediction=model.prediction,
        prior=model.prior,
        noise_scale=model.noise_scale,
        t_min=model.t_min,
        checks=model.checks,
    )
    result.has_custom_prior, result.adapted = model.has_custom_prior, model.adapted
    result.training = predictor.training = model.training
    return result


def evaluations_per_call(predictor: Any) -> int:
    """Network evaluations that one call of a predictor stands for: one, unless it is guided."""
    return int(getattr(predictor, "evaluations_per_call", 1))


def nulled(name: str, value: Tensor, null: Any) -> Tensor:
    """The null value of one conditioning in the shape and on the device of ``value``.

    Args:
        name: of the conditioning, for messages.
        value: the conditioning, shape ``(B, ...)``.
        null: a number, or a tensor that broadcasts to ``value``.

    Returns:
        Shape of ``value``, in its dtype if that is real; integers take a wider one if ``null`` needs it (-1 is no
        uint8).

    Raises:
        ValueError: ``null`` does not broadcast, or is real where ``value`` holds integers.
    """
    fill = torch.as_tensor(null, device=value.device)
    if torch.can_cast(fill.dtype, value.dtype):
        integers = not (value.is_floating_point() or value.is_complex())
        dtype = torch.promote_types(fill.dtype, value.dtype) if integers else value.dtype
    elif value.dtype == torch.bool and not fill.is_floating_point():
        dtype = fill.dtype
    else:
        raise ValueError(
            f"null[{name!r}] has dtype {fill.dtype}, but the conditioning {name!r} holds {value.dtype}; give an "
            f"integer, or pass {name} in a float dtype."
        )
    try:
        return fill.to(dtype).broadcast_to(value.shape)
    except RuntimeError:
        raise ValueError(
            f"null[{name!r}] has shape {tuple(fill.shape)}, which does not broadcast to the conditioning {name!r} of "
            f"shape {tuple(value.shape)}; give a number, or the values of a single row."
        ) from None


def _validate_null(model: NDM, null: Mapping[str, Any]) -> None:
    if not null:
        raise ValueError(
            "guidance without a conditional model: the predictor has no dict null that says what 'no conditioning' "
            "is; build the network with classes=K, or pass null={name: value}, the value with which the conditioning "
            "was dropped in training."
        )
    names, anything = keyword_names(model.predictor, 2)
    for name in null:
        if name not in names and not anything:
            accepted = ", ".join(map(repr, sorted(names))) or "none"
            raise ValueError(
                f"null names {name!r}, which the predictor does not take{nearest(name, names) or '.'} Conditioning "
                f"keywords it names: {accepted}."
            )
        if name in model.transform.cond_names()[0]:
            raise ValueError(
                f"the transform takes {name!r} too, so with and without it z belongs to two different processes, whose "
                "scores do not mix; build the transform without it to guide by it."
            )


class _Guided(nn.Module):
    """The guided predictor; see :func:`guided`."""

    runs_network = True

    def __init__(self, predictor: Any, scale: float, null: dict[str, Any]) -> None:
        super().__init__()
        self.predictor, self.scale, self.null = predictor, scale, null
        own = 1 if scale in (0.0, 1.0) else 2
        self.wants_schedule = getattr(predictor, "wants_schedule", False)
        self.evaluations_per_call = own * evaluations_per_call(predictor)

    def cond_names(self) -> tuple[frozenset[str], bool]:
        """Conditioning that the predictor takes."""
        return keyword_names(self.predictor, 2)

    def forward(self, z: Tensor, t: Tensor, /, *schedule: Any, **cond: Any) -> Any:
        """The guided prediction at state z ``(B, *E)`` and time t ``(B,)``; a schedule is handed on.

        Raises:
            ValueError: a conditioning to guide by is missing or does not have one entry per row.
            PredictorError: the predictor does not return one row per row.
        """
        self._validate(cond, len(z))
        predict = partial(run_network, self.predictor)
        if self.scale == 1.0:
            return predict(z, t, *schedule, **cond)
        null = {name: _in_place_of(name, cond[name], value) for name, value in self.null.items()}
        if self.scale == 0.0:
            return predict(z, t, *schedule, **cond | null)
        others = {name: value for name, value in cond.items() if name not in null}
        alike = all(isinstance(v, Tensor) and v.shape == getattr(cond[name], "shape", 0) for name, v in null.items())
        if not alike or any(_by_rows(tensor, len(z)) for tensor in tensors_in(others)):
            # Only the predictor can tell whether these belong to the rows or are shared, so it gets them unchanged.
            return self._mixed(predict(z, t, *schedule, **cond), predict(z, t, *schedule, **cond | null))
        both = {name: torch.cat([cond[name], value]) for name, value in null.items()}
        output = predict(torch.cat([z, z]), torch.cat([t, t]), *schedule, **others | both)
        if isinstance(output, tuple | list):
            pairs = [_halves(part, len(z)) for part in output]
            return self._mixed([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        return self._mixed(*_halves(output, len(z)))

    def _mixed(self, conditional: Any, unconditional: Any) -> Any:
        if isinstance(conditional, tuple | list):
            return tuple(map(self._mixed, conditional, unconditional))
        if not isinstance(conditional, Tensor):  # the model says what it expected
            return conditional
        return unconditional + self.scale * (conditional - unconditional)

    def _validate(self, cond: Mapping[str, Any], rows: int) -> None:
        for name in self.null:
            value = cond.get(name)
            if value is None:
                raise ValueError(
                    f"a guided model needs the conditioning {name!r}, and got none; pass {name}=, one entry per row, "
                    f"or guide by something else with guided(model, scale, null=...)."
                )
            if isinstance(value, Tensor) and not _by_rows(value, rows):
                raise ValueError(
                    f"the conditioning {name!r}, by which this model is guided, is shape {tuple(value.shape)}, "
                    f"expected a tensor with one entry for each of the {rows} rows; expand it to them."
                )
            if isinstance(value, bool | int | float):
                raise ValueError(
                    f"the conditioning {name!r}, by which this model is guided, is a {type(value).__name__}, expected "
                    f"a tensor with one entry for each of the {rows} rows; pass torch.full(({rows},), {value!r})."
                )

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, null={self.null}"


def _in_place_of(name: str, value: Any, null: Any) -> Any:
    """What the network gets in the place of a conditioning; arguments and errors as of :func:`nulled`."""
    if isinstance(value, Mapping):
        named = null if isinstance(null, Mapping) else dict.fromkeys(value, null)
        return {key: _in_place_of(f"{name}[{key!r}]", each, named[key]) for key, each in value.items()}
    if isinstance(value, list | tuple) and not isinstance(null, str):
        parts = null if isinstance(null, list | tuple) else [null] * len(value)
        return type(value)(_in_place_of(f"{name}[{k}]", *pair) for k, pair in enumerate(zip(value, parts, strict=True)))
    if not isinstance(value, Tensor) or null is None or isinstance(null, str | Mapping):
        return null
    if isinstance(null, Tensor) and null.is_floating_point() == value.is_floating_point():
        row = null if null.ndim == value.ndim else null[None]
        if row.ndim == value.ndim and row.shape[0] in (1, len(value)) and not _broadcasts(null, value):
            return row.to(value).expand(len(value), *row.shape[1:])
    return nulled(name, value, null)


def _broadcasts(null: Tensor, value: Tensor) -> bool:
    pairs = zip(reversed(null.shape), reversed(value.shape), strict=False)
    return null.ndim <= value.ndim and all(a in (1, b) for a, b in pairs)


def _halves(output: Any, rows: int) -> tuple[Any, Any]:
    """The predictions with and without conditioning, from one call with twice the rows."""
    if not isinstance(output, Tensor):
        return output, output
    if output.ndim == 0 or output.shape[0] != 2 * rows:
        raise PredictorError(
            f"the predictor returned shape {tuple(output.shape)} for the {2 * rows} rows of a guided call, which "
            "asks for both predictions at once; return one row for every row of z."
        )
    return output[:rows], output[rows:]


def _by_rows(value: Any, rows: int) -> bool:
    """Whether a conditioning has one entry per row."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows
