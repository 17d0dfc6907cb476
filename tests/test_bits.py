"""Bits per dimension against a closed-form discretised Gaussian."""

import math

import pytest
import torch

import ndm_ct
from ndm_ct import schedules
from ndm_ct.quantisation import Quantisation
from ndm_ct.reference import Gaussian

LEVELS, D = 17, 4
BINS = Quantisation(LEVELS)
STD = torch.tensor([0.5, 0.3, 0.4, 0.2], dtype=torch.float64)


def safe_gamma(levels):
    """The log-SNR at which three standard deviations of the noise fill a bin."""
    return -2.0 * math.log(3.02 * levels)


def model(gamma_min):
    return Gaussian(torch.zeros(D), torch.diag(STD**2), schedule=schedules.LinearLogSNR(gamma_min, 5.0))


def levels(n, generator):
    x = STD * torch.randn(n, D, dtype=torch.float64, generator=generator)
    return ((x + 1) * LEVELS / 2).floor().clamp(0, LEVELS - 1).long()


def exact_bits(k, alpha, sigma):
    """-log2 P of the bins under the marginal at t_min, N(0, alpha^2 std^2 + sigma^2), bins scaled by ``alpha``."""
    normal = torch.distributions.Normal(0.0, (alpha**2 * STD**2 + sigma**2).sqrt())
    low, high = (BINS.centres(k, torch.float64) + sign * BINS.half_width for sign in (-1, 1))
    return normal, low, high


def test_uniform_dequantisation_of_a_nearly_flat_density(generator):
    """Jensen's gap is second order in bin width over spread, so the bound is close to the closed form."""
    exact = model(-16.0)
    k = levels(2000, generator)
    bits, info = ndm_ct.bits_per_dim(exact, k, levels=LEVELS, generator=generator, return_info=True)
    normal, low, high = exact_bits(k, 1.0, math.exp(-8.0))
    truth = -(normal.cdf(high) - normal.cdf(low)).log2().mean(1)
    gap = bits - truth
    stderr = float(gap.std()) / math.sqrt(2000)
    assert -4 * stderr < float(gap.mean()) < 0.02
    torch.testing.assert_close(bits, -info.nats / (D * math.log(2.0)))


def test_uniform_dequantisation_averaged_by_logsumexp_is_exact():
    """Importance samples of one row: the log-mean of the bin's density times its width is its probability."""
    exact, k = model(-16.0), torch.tensor([[3, 8, 12, 9]])
    rows = k.expand(4000, D)
    _, info = ndm_ct.bits_per_dim(exact, rows, levels=LEVELS, return_info=True)
    estimate = torch.logsumexp(info.nats, 0) - math.log(4000)
    normal, low, high = exact_bits(k, 1.0, math.exp(-8.0))
    truth = (normal.cdf(high) - normal.cdf(low)).log().sum()
    spread = float((info.nats - estimate).exp().std()) / math.sqrt(4000)
    assert abs(float(estimate - truth)) < 4 * spread + 1e-3


def test_truncated_normal_dequantisation_is_the_bound_on_its_bins(generator):
    """E[log p_0(z_0)] + entropy, computed independently, at the schedule offset for 17 levels."""
    exact, k = model(safe_gamma(LEVELS)), levels(2000, generator)
    bits = ndm_ct.bits_per_dim(exact, k, levels=LEVELS, dequantisation="truncated-normal", generator=generator)
    gamma = torch.tensor(safe_gamma(LEVELS), dtype=torch.float64)
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    normal, _, _ = exact_bits(k, alpha, sigma)
    centre = alpha * BINS.centres(k, torch.float64)
    tau = float(BINS.half_width * alpha / sigma)
    assert tau == pytest.approx(3.02, abs=0.01)
    grid = torch.linspace(-tau, tau, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * grid**2)
    density = density / torch.trapezoid(density, grid)
    entropy = float(torch.trapezoid(-density * density.log(), grid)) + math.log(float(sigma))
    cross = torch.trapezoid(density * normal.log_prob(centre[..., None].movedim(-1, 0) + sigma * grid[:, None, None])
                            .movedim(0, -1), grid, dim=-1)  # fmt: skip
    expected = -(cross + entropy).sum(1) / (D * math.log(2.0))
    gap = bits - expected
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(2000) + 1e-4
    truth = (
        -(normal.cdf(centre + alpha * BINS.half_width) - normal.cdf(centre - alpha * BINS.half_width)).log2().mean(1)
    )
    assert bool((expected > truth - 1e-6).all())


def test_published_constants_of_the_truncated_normal():
    """At gamma_0 = -13.3 and 256 levels: tau = 3.0187, Z = 0.9974613, log Z - tau phi/Z = -0.01522 (i-DODE)."""
    gamma = torch.tensor(-13.3, dtype=torch.float64)
    alpha, sigma = float(torch.sigmoid(-gamma).sqrt()), float(torch.sigmoid(gamma).sqrt())
    offset = Quantisation(256).truncated_normal_offset(alpha, sigma)
    assert offset - 0.5 * math.log(2 * math.pi * math.e * sigma**2) == pytest.approx(-0.01522, abs=1e-5)


def test_dequantised_values_stay_in_their_bins(generator):
    k = torch.arange(LEVELS)[:, None].expand(LEVELS, 5000)
    x = BINS.uniform(k, torch.float64, generator)
    centre = BINS.centres(k, torch.float64)
    assert float((x - centre).abs().max()) <= BINS.half_width
    assert float((x - centre).mean(1).abs().max()) < 4 * BINS.half_width / math.sqrt(3 * 5000)
    z = BINS.truncated_normal(k, 0.9, 0.02, torch.float64, generator)
    assert float((z - 0.9 * centre).abs().max()) <= 0.9 * BINS.half_width + 1e-12
    assert float((z - 0.9 * centre).std()) == pytest.approx(0.02, rel=0.05)


def test_elbo_bounds_the_discrete_probability(generator):
    """Above the exact code length by what a smooth density must lose: it fills the bin, q(z_0|x) a third of it."""
    gamma = safe_gamma(LEVELS)
    exact, k = model(gamma), levels(2000, generator)
    bits, info = ndm_ct.bits_per_dim(
        exact, k, levels=LEVELS, bound="elbo", samples=64, generator=generator, return_info=True
    )
    normal, low, high = exact_bits(k, 1.0, 0.0)
    truth = -(normal.cdf(high) - normal.cdf(low)).log2().mean(1)
    gap = bits - truth
    stderr = float(gap.std()) / math.sqrt(2000)
    lost = (math.log(2 * BINS.half_width) - 0.5 * (math.log(2 * math.pi) + 1 + gamma)) / math.log(2.0)
    assert lost == pytest.approx(0.547, abs=0.01)
    assert float(gap.mean()) == pytest.approx(lost, abs=0.02 + 4 * stderr)
    reported = float(info.stderr.square().mean().sqrt()) / math.sqrt(2000)
    assert reported < 3 * stderr


def test_information_is_that_of_the_bound_in_bits(generator):
    exact, k = model(safe_gamma(LEVELS)), levels(5, generator)
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    options = {"samples": 4, "return_info": True}
    bits, info = ndm_ct.bits_per_dim(exact, k, levels=LEVELS, bound="elbo", generator=one, **options)
    nats, terms = ndm_ct.elbo(exact, BINS.centres(k, torch.float32), quantisation=BINS, generator=other, **options)
    torch.testing.assert_close(info.nats, nats)
    torch.testing.assert_close(info.stderr, terms.stderr / (D * math.log(2.0)))
    torch.testing.assert_close(bits, -nats / (D * math.log(2.0)))
    assert info.nfe == terms.nfe == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"levels": 8}, ValueError, r"outside \[0, 8\) in rows \[1\]"),
        ({"bound": "elob"}, ValueError, "did you mean 'elbo'"),
        ({"dequantisation": "truncated normal"}, ValueError, "did you mean 'truncated-normal'"),
        ({"bound": "elbo", "trace": "exact"}, ValueError, "trace has no effect with bound='elbo'"),
        ({"bound": "elbo", "dequantisation": "truncated-normal"}, ValueError, "dequantisation has no effect"),
        ({"stderr": 0.1, "bound": "elbo"}, ValueError, "stderr has no effect with bound='elbo'"),
        ({"range": (1.0, 0.0)}, ValueError, "range must be an interval"),
        ({"levels": 1}, ValueError, "levels must be an int of at least 2"),
    ],
)
def test_bad_options(options, error, message):
    k = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 16]])
    with pytest.raises(error, match=message):
        ndm_ct.bits_per_dim(model(-13.3), k, **({"levels": LEVELS} | options))


@pytest.mark.parametrize("x", [torch.rand(2, D), torch.ones(2, D, dtype=torch.bool), torch.rand(2, D).double()])
def test_data_that_are_not_integers_are_refused(x):
    with pytest.raises(TypeError, match="bits per dimension are defined for integer levels"):
        ndm_ct.bits_per_dim(model(-13.3), x, levels=LEVELS)


def test_empty_batch():
    assert ndm_ct.bits_per_dim(model(-13.3), torch.empty(0, D, dtype=torch.long), levels=LEVELS).shape == (0,)
