r"""How published code turns a model into a number called log p, each in a few lines of our own.

Every protocol is ``(model, x, bins, generator)`` to log p in nats, for :func:`ndm_ct.audit`. Integers are scored as
their source scores them. Most add uniform noise in the bins, with :math:`\log P(x) \ge E \log p(x + u) + d \log 2h`.
The divergence along the path is estimated by :math:`\epsilon^\top J \epsilon` unless it is said otherwise.

References:
    score_sde: Song et al., https://arxiv.org/abs/2011.13456
    ScoreFlow: Song et al., Maximum Likelihood Training of Score-Based Diffusion Models, https://arxiv.org/abs/2101.09258
    VDM: Kingma et al., Variational Diffusion Models, https://arxiv.org/abs/2107.00630
    i-DODE: Zheng et al., https://arxiv.org/abs/2305.03935
    k-diffusion: https://github.com/crowsonkb/k-diffusion
    zuko: https://github.com/probabilists/zuko
    SiT: Ma et al., https://arxiv.org/abs/2401.08740
    F2D2: joint distillation of samples and densities, judged here by its few-step estimate only
"""

import math
from collections.abc import Callable

import torch
import torchdiffeq
from torch import Tensor

import ndm_ct
from bench.peers import PEERS
from ndm_ct.quantisation import Quantisation

Bins = Quantisation | None
Protocol = Callable[[ndm_ct.NDM, Tensor, Bins, torch.Generator], Tensor | tuple[Tensor, Tensor]]


def spread(x: Tensor, bins: Bins, generator: torch.Generator) -> tuple[Tensor, float]:
    """Real values, and what turns their log-density into a log-probability: integers get uniform noise in the bins."""
    if bins is None:
        return x, 0.0
    return bins.uniform(x, torch.float64, generator), x[0].numel() * bins.uniform_offset


def of_peer(name: str, tol: float) -> Protocol:
    """A peer's own solver, trace and norm."""

    def protocol(model: ndm_ct.NDM, x: Tensor, bins: Bins, generator: torch.Generator) -> Tensor:
        values, offset = spread(x, bins, generator)
        return PEERS[name](model, values, tol, generator).logp + offset

    return protocol


def along_flow(
    tol: float = 1e-5, probes: int = 1, divide: int = 1, resample: bool = False, steps: int | None = None
) -> Protocol:
    """dopri5 of torchdiffeq, or Euler steps.

    Args:
        tol: rtol and atol of dopri5.
        probes: random vectors; the products are summed.
        divide: what the sum is divided by.
        resample: draw the vectors anew at every evaluation.
        steps: of Euler, in place of dopri5.
    """

    def protocol(model: ndm_ct.NDM, x: Tensor, bins: Bins, generator: torch.Generator) -> Tensor:
        values, offset = spread(x, bins, generator)
        flow, vectors = model.flow(values.dtype), [signs(values) for _ in range(probes)]

        def derivative(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            z = state[0].detach().requires_grad_()
            with torch.enable_grad():
                v = flow(t, z)
            own = [signs(z) for _ in range(probes)] if resample else vectors
            products = [torch.autograd.grad(v, z, each, retain_graph=True)[0] * each for each in own]
            return v.detach(), torch.stack(products).flatten(2).sum((0, 2)) / divide

        times = torch.linspace(model.t_min, 1.0, 2 if steps is None else steps + 1, dtype=torch.float64)
        start = values, torch.zeros(len(values), dtype=values.dtype)
        method = "dopri5" if steps is None else "euler"
        z, logdet = torchdiffeq.odeint(derivative, start, times, rtol=tol, atol=tol, method=method)
        return model.log_prior(z[-1]) + logdet[-1] + offset

    return protocol


def signs(z: Tensor) -> Tensor:
    """Independent signs, from torch's global generator."""
    return 2.0 * torch.randint(0, 2, z.shape).to(z) - 1.0


def karras(model: ndm_ct.NDM, x: Tensor, bins: Bins, generator: torch.Generator) -> Tensor:
    r"""k-diffusion's log_likelihood: :math:`dy/d\rho = (y - \hat x)/\rho` for y = z/alpha, prior N(0, rho_max^2)."""
    values, offset = spread(x, bins, generator)
    ends = model.schedule(torch.tensor([model.t_min, 1.0], dtype=torch.float64))
    low, high = ends.sigma / ends.alpha
    sign = signs(values)

    def derivative(rho: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        t = model.schedule.time_at(torch.atan(rho)).clamp(model.t_min, 1.0)
        y = state[0].detach().requires_grad_()
        with torch.enable_grad():
            slope = (y - model.predict_x(model.schedule(t).alpha * y, t.expand(len(y)))) / rho
        (product,) = torch.autograd.grad(slope, y, sign)
        return slope.detach(), (product * sign).flatten(1).sum(1)

    start = values / ends.alpha[0], torch.zeros(len(values), dtype=values.dtype)
    y, logdet = torchdiffeq.odeint(derivative, start, torch.stack([low, high]), method="dopri5", rtol=1e-4, atol=1e-4)
    prior = torch.distributions.Normal(0.0, high).log_prob(y[-1]).flatten(1).sum(1)
    return prior + logdet[-1] + offset


def bound_of_reals(model: ndm_ct.NDM, x: Tensor, bins: Bins, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ScoreFlow: the score-matching bound of uniformly dequantised data, here with 32 times per row."""
    values, offset = spread(x, bins, generator)
    value, info = ndm_ct.elbo(model, values, samples=32, generator=generator, return_info=True)
    return value + offset, info.stderr


def bound_of_levels(model: ndm_ct.NDM, x: Tensor, bins: Bins, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """VDM: the ELBO with a decoder over levels, 32 times per row; of densities it is ScoreFlow's."""
    if bins is None:
        return bound_of_reals(model, x, bins, generator)
    options = {"quantisation": bins, "bound": "elbo", "samples": 32, "generator": generator, "return_info": True}
    _, info = ndm_ct.bits_per_dim(model, x, **options)
    return info.nats, info.stderr * x[0].numel() * math.log(2.0)


def truncated(points: int) -> Protocol:
    """i-DODE: truncated normal noise in the bins, K points per bin, one frozen probe."""

    def protocol(model: ndm_ct.NDM, x: Tensor, bins: Bins, generator: torch.Generator) -> Tensor:
        trace = ndm_ct.divergence.Hutchinson(probes=1)
        if bins is None:
            return ndm_ct.loglik(model, x, trace=trace, generator=generator)
        _, info = ndm_ct.bits_per_dim(
            model, x, quantisation=bins, dequantisation="process", samples=points, trace=trace, generator=generator,
            return_info=True,
        )  # fmt: skip
        return info.nats

    return protocol


def ours(model: ndm_ct.NDM, x: Tensor, bins: Bins, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The defaults of this library; four points per bin, so that their scatter is known."""
    if bins is None:
        value, info = ndm_ct.loglik(model, x, generator=generator, return_info=True)
        return value, info.stderr
    noise = "uniform" if getattr(model, "filled", True) else "process"
    options = {"quantisation": bins, "dequantisation": noise, "samples": 4, "generator": generator}
    _, info = ndm_ct.bits_per_dim(model, x, **options, return_info=True)
    error = torch.hypot(info.stderr, info.dequantisation_stderr)
    return info.nats, error * x[0].numel() * math.log(2.0)


PROTOCOLS: dict[str, tuple[Protocol, bool, str]] = {
    "ndm_ct": (ours, True, "nodes at random places, fresh probes, K = 4 points per bin"),
    "score_sde": (of_peer("score_sde", 1e-5), True, "RK45 1e-5, one frozen probe"),
    "ScoreFlow": (bound_of_reals, True, "score-matching bound of dequantised data"),
    "VDM": (bound_of_levels, True, "ELBO with a decoder over levels"),
    "i-DODE, K = 1": (truncated(1), True, "truncated normal noise, one frozen probe"),
    "i-DODE, K = 8": (truncated(8), True, "the same, log of a mean over 8 points"),
    "few steps": (along_flow(steps=8), True, "8 Euler steps, one frozen probe, as after distillation"),
    "k-diffusion": (karras, True, "dopri5 1e-4 in sigma, one frozen probe"),
    "zuko": (of_peer("zuko", 1e-6), True, "Dormand-Prince 1e-6, one frozen Gaussian probe"),
    "SiT": (along_flow(1e-3, resample=True), True, "dopri5 1e-3, a new probe at every evaluation"),
    "undivided": (along_flow(probes=4), True, "4 frozen probes, summed and not averaged"),
}
"""Protocols by name: the function, whether it claims a bound, and what it is."""
