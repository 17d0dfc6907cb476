"""Models whose every quantity is known in closed form, and the registries the laws run over."""

import math

import torch

from ndm_ct import schedules, transforms
from ndm_ct.model import NDM
from ndm_ct.reference import Gaussian, GaussianMixture
from ndm_ct.schedules.volatility import Matched
from ndm_ct.transforms import Blur

SCHEDULES = {
    "VariancePreserving": schedules.VariancePreserving,
    "SubVariancePreserving": schedules.SubVariancePreserving,
    "VarianceExploding": schedules.VarianceExploding,
    "LinearLogSNR": schedules.LinearLogSNR,
    "Cosine": schedules.Cosine,
    "Rectified": schedules.Rectified,
}
ALL_SCHEDULES = SCHEDULES | {
    "Trigonometric": schedules.Trigonometric,
    "LearnedLogSNR": lambda: perturbed(schedules.LearnedLogSNR()),
    "StraightToNoise": schedules.StraightToNoise,
    "Tabulated": lambda: schedules.Tabulated(ddpm_table()),
}


def k(t):
    """A moving scale with k(0) = 1."""
    return 1.0 + 1.5 * t


TRANSFORMS = {"identity": transforms.Identity, "moving scale": lambda: transforms.TimeScaling(k)}


def ddpm_table(steps=1000):
    """Cumulative alpha^2 of the linear DDPM schedule."""
    return torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)


def perturbed(module, scale=0.3):
    """A learnable schedule away from its initial, nearly linear shape."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def rotated_covariance(d=6, low=0.05, high=4.0):
    """Anisotropic and rotated: with an isotropic one Rademacher probes are exact and test nothing."""
    generator = torch.Generator().manual_seed(7)
    rotation, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    spectrum = torch.logspace(math.log10(low), math.log10(high), d, dtype=torch.float64)
    return rotation @ torch.diag(spectrum) @ rotation.mT


def gaussian(schedule=None, transform=None, d=6, **kwargs):
    generator = torch.Generator().manual_seed(8)
    mean = torch.randn(d, dtype=torch.float64, generator=generator)
    return Gaussian(mean, rotated_covariance(d), schedule=schedule, transform=transform, **kwargs)


def mixture(schedule=None, transform=None, components=5, d=8, **kwargs):
    generator = torch.Generator().manual_seed(9)
    factors = 0.3 * torch.randn(components, d, d, dtype=torch.float64, generator=generator)
    covs = factors @ factors.mT + 0.05 * torch.eye(d, dtype=torch.float64)
    means = 2.0 * torch.randn(components, d, dtype=torch.float64, generator=generator)
    weights = torch.arange(1.0, components + 1.0, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covs, schedule=schedule, transform=transform, **kwargs)


def exact_flow(model, z1):
    """The probability flow of Gaussian data with F = k(t) x: an affine map between marginals that commute."""
    one, start = (torch.tensor([t], dtype=torch.float64) for t in (1.0, model.t_min))
    (mean1, factor1, _), (mean0, factor0, _) = model.marginals.components(one), model.marginals.components(start)

    def root(factor):
        values, vectors = torch.linalg.eigh(factor[0, 0] @ factor[0, 0].mT)
        return vectors @ torch.diag(values.sqrt()) @ vectors.mT

    matrix = root(factor0) @ torch.linalg.inv(root(factor1))
    return mean0[0] + (z1 - mean1[0]) @ matrix.mT


class Wiggle(transforms.Transform):
    """F(x, t) = x + a t sin 3x: nonlinear, with F(x, 0) = x."""

    def __init__(self, a=0.8):
        super().__init__()
        self.a = a

    def forward(self, x, t, **cond):
        return x + self.a * t.reshape(-1, 1) * torch.sin(3.0 * x)


class Breathe(transforms.NoiseScale):
    """log S(x, t) = a t (1 - t) cos(2x + 0.5): noise of another size for all data, with S = 1 at both ends."""

    def __init__(self, a=0.9):
        super().__init__()
        self.a = a

    def forward(self, x, t, **cond):
        return self.a * (t * (1.0 - t)).reshape(-1, 1) * torch.cos(2.0 * x + 0.5)

    def with_derivative(self, x, t, **cond):
        return self(x, t), self.a * (1.0 - 2.0 * t).reshape(-1, 1) * torch.cos(2.0 * x + 0.5)


class ThreePoints:
    """Data on three points: every posterior moment is a sum of three terms (d = 1)."""

    points = torch.tensor([-1.0, 0.2, 1.1], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)

    def __init__(self, schedule, transform, eta=1.0, scale=None):
        self.schedule, self.transform, self.eta, self.scale = schedule, transform, eta, scale

    def at(self, t):
        """F, dF of the points at times (B,): each (B, 3)."""
        n = t.shape[0]
        x = self.points.repeat(n)[:, None]
        F, dF = self.transform.with_derivative(x, t.repeat_interleave(3))
        return F.reshape(n, 3), dF.reshape(n, 3)

    def noise_at(self, t):
        """log S of the points and its time derivative: each (B, 3)."""
        n = t.shape[0]
        if self.scale is None:
            return torch.zeros(n, 3, dtype=torch.float64), torch.zeros(n, 3, dtype=torch.float64)
        r, dr = self.scale.with_derivative(self.points.repeat(n)[:, None], t.repeat_interleave(3))
        return r.reshape(n, 3), dr.reshape(n, 3)

    def log_joint(self, z, t):
        """log w_k + log q(z | x_k): (B, 3)."""
        c, (F, _), (r, _) = self.schedule(t), self.at(t), self.noise_at(t)
        std = c.sigma[:, None] * r.exp()
        log_normal = -0.5 * ((z - c.alpha[:, None] * F) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        return self.weights.log() + log_normal

    def posterior(self, z, t):
        """q(x = x_k | z): (B, 3)."""
        return torch.softmax(self.log_joint(z, t), 1)

    def moments(self, z, t):
        """E[F | z], E[dF | z], of the pair where the noise has a scale: the exact "moments" head."""
        t = t.expand(z.shape[0]).double()
        share, c = self.posterior(z, t), self.schedule(t)
        (F, dF), (r, dr) = self.at(t), self.noise_at(t)
        w, shift = 1.0 - torch.exp(-2.0 * r), (z - c.alpha[:, None] * F) / c.alpha[:, None]
        F, dF = F + w * shift, dF + (dr + 0.5 * c.dgamma[:, None] * w) * shift
        return (share * F).sum(1, keepdim=True), (share * dF).sum(1, keepdim=True)

    def log_prob(self, z, t):
        t = torch.as_tensor(t, dtype=torch.float64).expand(z.shape[0])
        return torch.logsumexp(self.log_joint(z, t), 1)

    def model(self, **kwargs):
        """The NDM with the exact moments and the exact prior."""
        exact = self

        class Prior:
            def log_prob(self, z):
                return exact.log_prob(z, 1.0)

            def sample(self, n, *, generator=None, dtype=None, device=None):
                index = torch.multinomial(exact.weights, n, replacement=True, generator=generator)
                one = torch.ones(1, dtype=torch.float64)
                c = exact.schedule(one)
                mean = c.alpha * exact.at(one)[0][0][index]
                noise = torch.randn(n, dtype=torch.float64, generator=generator)
                noise = noise * exact.noise_at(one)[0][0][index].exp()
                return (mean + c.sigma * noise)[:, None].to(dtype)

        return NDM(
            self.moments, (1,), transform=self.transform, schedule=self.schedule, prediction="moments",
            volatility=self.eta, prior=Prior(), noise_scale=self.scale, **kwargs,
        )  # fmt: skip


def hermite_points(n):
    """Points whose equal-weight average is exact for polynomials of degree 3 of a standard normal in n dimensions."""
    unit = math.sqrt(n) * torch.eye(n, dtype=torch.float64)
    return torch.cat([unit, -unit])


def order(errors, steps):
    """Slope of log error against log step size, by least squares."""
    x = -torch.tensor([math.log(s) for s in steps], dtype=torch.float64)
    y = torch.tensor([math.log(float(e)) for e in errors], dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def blurred():
    """Blurred Gaussian data with the optimal volatility of every frequency, and the variances of the frequencies."""
    blur = Blur((2, 2), blur=1.0, floor=0.2)
    spectrum = torch.tensor([1.5, 0.8, 0.4, 0.2], dtype=torch.float64)
    basis = blur.from_basis(torch.eye(4, dtype=torch.float64).reshape(4, 2, 2)).reshape(4, 4)
    cov = basis.mT @ torch.diag(spectrum) @ basis
    schedule = schedules.LinearLogSNR(-5, 4)
    model = Gaussian(torch.zeros(2, 2), cov, schedule=schedule, transform=blur, volatility=Matched())
    return model, spectrum


class Prescribed:
    """Brownian increments given by hand, for torchsde."""

    levy_area_approximation = "space-time"

    def __init__(self, shape, w, u):
        self.shape, self.w, self.u = shape, w, u

    def __call__(self, ta, tb, return_U=False):
        return (self.w, self.u) if return_U else self.w


def setting(*keys, to):
    """A change of one entry of a checkpoint's description."""

    def change(description, tensors):
        for key in keys[:-1]:
            description = description[key]
        description[keys[-1]] = to

    return change
