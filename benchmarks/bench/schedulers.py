r"""The schedulers of diffusers on our networks, for comparisons at equal numbers of network evaluations.

A scheduler knows a table of 1000 noise levels. It is given that of the model's own schedule,

.. math::
    \bar\alpha_i = \alpha(t_i)^2, \qquad t_i = t_{min} + (1 - t_{min})\, i / 999,

as ``trained_betas``; a timestep, whole or fractional, is the time at the same place between the t's. The network is
called through ``model.predict_x`` and becomes a prediction of the noise, :math:`(z - \alpha\hat x)/\sigma`. Schedules
must preserve the variance and F must be the identity, as diffusers supposes.

Names are ``diffusers:NAME`` with options behind plus signs, ``diffusers:DPMSolverMultistep+karras``:

============================  =========================================================================================
``karras``                    the noise levels of Karras et al. (not for DDPM, DDIM, PNDM, EulerAncestralDiscrete)
``order1, order3``            order of a multistep solver; it is 2 unless said (DPMSolverMultistep, DEIS, UniPC)
``sde``                       DPMSolverMultistep as sde-dpmsolver++
``linspace, trailing,``       timestep_spacing; unless said, "linspace" for DPMSolverMultistep, DEIS and UniPC,
``leading``                   "trailing" for the others, which are worse otherwise
``prk``                       PNDM starts with Runge-Kutta steps
============================  =========================================================================================

The number of steps is the largest whose evaluations stay within the budget: Heun takes 2k - 1 for k steps, PNDM k + 1.
Most schedulers end at their last prediction of x (noise level zero), PNDM and DEIS at the table's lowest level, while
``ndm_ct.sample`` returns a draw at :math:`t_{min}` with its noise, or with ``denoise=True`` a prediction of x.

References:
    https://github.com/huggingface/diffusers
    Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed (the spacings),
    https://arxiv.org/abs/2305.08891
"""

import importlib
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ndm_ct
from ndm_ct import transforms

PREFIX = "diffusers:"
TIMESTEPS = 1000

MULTISTEP = {"timestep_spacing": "linspace", "solver_order": 2, "lower_order_final": True}
RECIPES: dict[str, dict[str, Any]] = {
    "DDPM": {"timestep_spacing": "trailing", "clip_sample": False},
    "DDIM": {"timestep_spacing": "trailing", "clip_sample": False},
    "PNDM": {"timestep_spacing": "trailing", "skip_prk_steps": True},
    **dict.fromkeys(("DPMSolverMultistep", "DEISMultistep", "UniPCMultistep"), MULTISTEP),
    **{kind: {"timestep_spacing": "trailing"} for kind in ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")},
}
"""Settings by scheduler; the class is called NAMEScheduler."""

OPTIONS: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "order1": {"solver_order": 1},
    "order3": {"solver_order": 3},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading"},
    "prk": {"skip_prk_steps": False},
}
"""What may stand behind a plus sign."""

ONLY_FOR = {"sde": ("DPMSolverMultistep",)}
"""Options that other schedulers have under the same name with another meaning."""


@dataclass(frozen=True)
class Draw:
    """Samples, the network evaluations they took, and the noise they began with."""

    x: Tensor
    nfe: int
    z: Tensor


@dataclass(frozen=True)
class Scheduler:
    """A scheduler of diffusers with its settings.

    Args:
        name: as on the command line, with the prefix.
        kind: the class.
        settings: its arguments.
    """

    name: str
    kind: type
    settings: dict[str, Any] = field(default_factory=dict)

    def draw(self, model: ndm_ct.NDM, n: int, budget: int, generator: torch.Generator) -> Draw:
        """n samples with at most ``budget`` evaluations each; the generator draws the prior first.

        Raises:
            ValueError: the model is not one diffusers can sample from, or the budget is too small.
        """
        scheduler = self._scheduler(alphas_cumprod(model), budget)
        dtype, device = model.dtype or torch.get_default_dtype(), model.device
        random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        nfe = 0
        with torch.no_grad(), model.evaluating(), _quiet():
            z1 = model.sample_prior(n, generator=generator, dtype=dtype, device=device)
            z = z1 * scheduler.init_noise_sigma
            for timestep in scheduler.timesteps:
                scaled = scheduler.scale_model_input(z, timestep)
                z = scheduler.step(_noise(model, scaled, float(timestep)), timestep, z, **random).prev_sample
                nfe += 1
        return Draw(z.to(dtype), nfe, z1)

    def _scheduler(self, table: Tensor, budget: int) -> Any:
        betas = 1.0 - table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
        arguments = {"num_train_timesteps": TIMESTEPS, "trained_betas": betas.tolist(), **self.settings}
        for steps in range(budget, 0, -1):
            with _quiet():
                scheduler = self.kind(prediction_type="epsilon", **arguments)
                try:
                    scheduler.set_timesteps(steps)
                except (ValueError, IndexError):  # too few steps for a start by Runge-Kutta
                    continue
            if 0 < len(scheduler.timesteps) <= budget:
                return scheduler
        raise ValueError(f"{self.name} has no setting that takes at most {budget} network evaluations.")


def _noise(model: ndm_ct.NDM, z: Tensor, timestep: float) -> Tensor:
    """The model's prediction of the noise at a place in the table."""
    time = model.t_min + (1.0 - model.t_min) * timestep / (TIMESTEPS - 1)
    # Solvers that begin with Runge-Kutta steps ask for places beyond the table.
    t = torch.tensor(min(max(time, model.t_min), 1.0), dtype=torch.float64, device=z.device)
    c = model.schedule(t)
    # predict_x sees the dtype of its weights; the difference is divided by a small sigma.
    x = model.predict_x(z.to(model.dtype or z.dtype), t).double()
    return ((z.double() - c.alpha * x) / c.sigma).to(z.dtype)


def alphas_cumprod(model: ndm_ct.NDM) -> Tensor:
    r"""The table :math:`\alpha(t_i)^2`, 1000 values in float64.

    Raises:
        ValueError: the model has a transform or the head "moments", or its schedule does not preserve the variance.
    """
    if not isinstance(model.transform, transforms.Identity) or model.prediction == "moments":
        raise ValueError(
            "diffusers' schedulers suppose that x itself is noised; this model has the transform "
            f"{type(model.transform).__name__} and prediction={model.prediction!r}. Sample it by ndm_ct's methods."
        )
    t = torch.linspace(model.t_min, 1.0, TIMESTEPS, dtype=torch.float64)
    with torch.no_grad():
        c = model.schedule(t.to(model.schedule.device))
    alpha, sigma = c.alpha.cpu(), c.sigma.cpu()
    if float((alpha**2 + sigma**2 - 1.0).abs().max()) > 1e-9 or float(alpha[-1]) < 1e-6:
        raise ValueError(
            f"diffusers' schedulers need alpha^2 + sigma^2 = 1 and alpha(1) > 0; {type(model.schedule).__name__} has "
            "other values. Sample it by ndm_ct's methods."
        )
    return alpha**2


def parse(name: str) -> Scheduler:
    """A scheduler by its name on the command line.

    Raises:
        ImportError: diffusers is missing.
        ValueError: an unknown scheduler, or an option it does not have.
    """
    kind_name, *options = name.removeprefix(PREFIX).removesuffix("Scheduler").split("+")
    if kind_name not in RECIPES:
        raise ValueError(f"{name!r} is none of diffusers' schedulers offered here: {', '.join(RECIPES)}.")
    try:
        with _quiet():
            kind = getattr(importlib.import_module("diffusers"), f"{kind_name}Scheduler")
    except ImportError as error:
        raise ImportError(f"{name} needs diffusers: pip install diffusers.") from error
    known = inspect.signature(kind.__init__).parameters
    allowed = [
        option
        for option, change in OPTIONS.items()
        if set(change) <= set(known) and kind_name in ONLY_FOR.get(option, (kind_name,))
    ]
    settings = dict(RECIPES[kind_name])
    for option in options:
        if option not in allowed:
            raise ValueError(f"{kind_name} has no option {option!r}; it has: {', '.join(allowed)}.")
        settings |= OPTIONS[option]
    return Scheduler(name, kind, settings)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's own warnings about versions of numpy and of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
