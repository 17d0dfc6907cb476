r"""The accuracy on this machine: results of the library compared with exact ones for Gaussian data.

For :math:`x \sim N(m, C)` prediction, density, bound and samples are known in closed form (:mod:`ndm_ct.reference`).
Systematic errors are compared with a limit in nats; random ones are divided by their standard error and are numbers of
about one. A device, a precision or a version that gets something wrong shows here first.
"""

import argparse
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ndm_ct._core.seeds import make_generator
from ndm_ct._core.versions import __version__
from ndm_ct.divergence import Hutchinson
from ndm_ct.likelihood.api import decode, encode, loglik
from ndm_ct.objectives.bound import elbo
from ndm_ct.reference import Gaussian
from ndm_ct.samplers.sample import sample

__all__ = ["Check", "run", "run_selfcheck"]

ROWS, SAMPLES = 64, 4000
DIMENSIONS = (1, 6, 6)
Z_LIMIT = 5.0


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        name: what was compared.
        value: the error, in ``unit``.
        limit: it passes below.
        unit: "nats", "data std", or "standard errors".
    """

    name: str
    value: float
    limit: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the error is below the limit; NaN is not."""
        return self.value <= self.limit


def run(device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Check]:
    """Make all comparisons.

    Args:
        device: the torch device that computes, such as "cpu" or "cuda".
        dtype: float32 or float64. The limits of the exact calculations are tighter in float64.
        seed: seed of data, probes and samples. A result just above its limit should pass with most other seeds.

    Example:
        >>> all(check.passed for check in run(dtype=torch.float64))
        True
    """
    generator = make_generator(seed, "selfcheck", "data")
    d = math.prod(DIMENSIONS)
    factor = torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(d, d, generator=generator, dtype=torch.float64) / 6.0
    cov = factor @ factor.T
    mean = torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64)
    model = Gaussian(mean.to(dtype), cov.to(dtype)).to(device)
    x = mean + (torch.randn(ROWS, d, generator=generator, dtype=torch.float64) @ factor.T).reshape(ROWS, *DIMENSIONS)
    x = x.to(device, dtype)
    truth = model.log_prob(x, torch.tensor(model.t_min, dtype=torch.float64)).double().cpu()
    single = dtype == torch.float32
    own = make_generator(seed, "selfcheck", "noise", device=device)

    def worst(value: Tensor) -> float:
        return float(value.abs().max())

    def scatter(value: Tensor, error: Tensor) -> float:
        """Distance from 1 of the root mean square of errors over their standard errors, in its own standard errors."""
        z = ((value.double().cpu() - truth) / error.double().cpu()).square().mean().sqrt()
        return abs(float(z) - 1.0) * math.sqrt(2.0 * ROWS)

    exact = loglik(model, x, trace="exact", rtol=1e-6 if single else 1e-9, atol=1e-6 if single else 1e-9)
    traced, info = loglik(model, x, trace=Hutchinson(probes=16), generator=own, return_info=True)
    swept, sweeps = loglik(model, x, stderr=0.2, generator=own, return_info=True)
    bound, terms = elbo(model, x, samples=64, generator=own, return_info=True)
    log_0 = model.log_prob(x, torch.tensor(0.0, dtype=torch.float64)).double().cpu()
    there = encode(model, x, rtol=1e-6, atol=1e-6)
    return [
        Check("log p, exact trace", worst(exact.double().cpu() - truth), 2e-3 if single else 1e-6, "nats"),
        Check("log p, 16 probes", scatter(traced, info.stderr), Z_LIMIT, "standard errors"),
        Check("log p, error of 0.2 nats asked for", scatter(swept, sweeps.stderr), Z_LIMIT, "standard errors"),
        Check(
            "mean of the bound",
            abs(float((bound.double().cpu() - log_0).mean()))
            / float(terms.stderr.double().cpu().square().mean().sqrt() / math.sqrt(ROWS)),
            Z_LIMIT,
            "standard errors",
        ),
        Check("there and back", worst(decode(model, there, rtol=1e-6, atol=1e-6) - x), 1e-3, "data std"),
        *(
            Check(f"samples, {name}", _moments(drawn, mean, cov), Z_LIMIT, "standard errors")
            for name, drawn in (
                ("probability flow", lambda: sample(model, SAMPLES, generator=own)),
                ("reverse SDE", lambda: sample(model, SAMPLES, method="sde", steps=500, generator=own)),
            )
        ),
    ]


def _moments(draw: Callable[[], Tensor], mean: Tensor, cov: Tensor) -> float:
    """Largest deviation of mean and variance of a few projections, in standard errors."""
    y = draw().double().cpu().flatten(1) - mean.flatten()
    values, basis = torch.linalg.eigh(cov)
    y = (y @ basis / values.sqrt())[:, [0, len(values) // 2, -1]]
    n = len(y)
    return float(torch.cat([y.mean(0) * math.sqrt(n), (y.square().mean(0) - 1.0) * math.sqrt(n / 2.0)]).abs().max())


def run_selfcheck(options: argparse.Namespace) -> int:
    print(f"ndm-ct {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
          f"{options.device}, {options.dtype}")  # fmt: skip
    checks = run(options.device, getattr(torch, options.dtype), options.seed)
    for check in checks:
        verdict = "ok" if check.passed else "FAILED"
        print(f"{check.name:36} {check.value:9.2g} {check.unit:16} (limit {check.limit:g})  {verdict}")
    return 0 if all(check.passed for check in checks) else 3
