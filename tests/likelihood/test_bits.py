"""Bits per dimension against a closed-form discretised Gaussian."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ndm_ct
from ndm_ct import adapters, schedules
from ndm_ct.divergence import Quadrature
from ndm_ct.quantisation import Quantisation, rename_earlier, resolve_quantisation
from ndm_ct.reference import Gaussian
from ndm_ct.storage.models import describe

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
    bits, info = ndm_ct.bits_per_dim(exact, k, quantisation=LEVELS, generator=generator, return_info=True)
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
    _, info = ndm_ct.bits_per_dim(exact, rows, quantisation=LEVELS, return_info=True)
    estimate = torch.logsumexp(info.nats, 0) - math.log(4000)
    normal, low, high = exact_bits(k, 1.0, math.exp(-8.0))
    truth = (normal.cdf(high) - normal.cdf(low)).log().sum()
    spread = float((info.nats - estimate).exp().std()) / math.sqrt(4000)
    assert abs(float(estimate - truth)) < 4 * spread + 1e-3


def test_truncated_normal_dequantisation_is_the_bound_on_its_bins(generator):
    """E[log p_0(z_0)] + entropy, computed independently, at the schedule offset for 17 levels."""
    exact, k = model(safe_gamma(LEVELS)), levels(2000, generator)
    bits = ndm_ct.bits_per_dim(exact, k, quantisation=LEVELS, dequantisation="process", generator=generator)
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


# --- several points per bin ------------------------------------------------------------------------------------------

WIDE = {"quantisation": 5, "rtol": 1e-4, "atol": 1e-4, "return_info": True}


def wide_bins(dequantisation):
    """A model whose density changes much within a bin of five, rows in its bulk, and their exact nats."""
    # truncated noise of half the bin's half-width: narrower, and few weights would rule
    gamma = -10.0 if dequantisation == "uniform" else 2.0 * math.log(0.2 / 1.5)
    exact, k = model(gamma), torch.tensor([[2, 2, 2, 2], [1, 2, 3, 2], [3, 2, 1, 3]])
    at_start = exact.schedule(torch.tensor(0.0, dtype=torch.float64))
    scale = at_start.alpha if dequantisation == "process" else 1.0
    bins = Quantisation(5)
    normal = torch.distributions.Normal(0.0, (at_start.alpha**2 * STD**2 + at_start.sigma**2).sqrt())
    low, high = (scale * (bins.centres(k, torch.float64) + sign * bins.half_width) for sign in (-1, 1))
    return exact, k, (normal.cdf(high) - normal.cdf(low)).log().sum(1)


@pytest.mark.parametrize("dequantisation", ["uniform", "process"])
def test_more_points_tighten_the_bound_to_the_probability(dequantisation, generator):
    """log P >= E[log mean of K weights], growing with K; the mean weight itself has no bias at any K."""
    exact, k, log_p = wide_bins(dequantisation)
    gaps = []
    for samples, repeats in ((1, 600), (4, 200), (32, 60)):
        _, info = ndm_ct.bits_per_dim(
            exact, k.repeat(repeats, 1), dequantisation=dequantisation, samples=samples, generator=generator, **WIDE
        )
        excess = info.nats.double().reshape(repeats, 3) - log_p
        gaps.append((-float(excess.mean()), float(excess.std()) / math.sqrt(3 * repeats)))
        if samples > 1 or dequantisation == "uniform":  # a single point of "process" has the entropy's mean
            weights = excess.exp().flatten()
            assert abs(float(weights.mean()) - 1.0) < 4 * float(weights.std()) / math.sqrt(len(weights)) + 1e-3
            assert float(weights.std()) / math.sqrt(len(weights)) < 0.05
    (one, one_error), (four, four_error), (many, many_error) = gaps
    assert one > 5 * one_error
    assert four < one / 2 + 3 * four_error
    assert -3 * many_error < many < one / 10 + 3 * many_error


def test_error_from_the_points_of_a_bin_is_calibrated(generator):
    exact, k, _ = wide_bins("uniform")
    _, info = ndm_ct.bits_per_dim(exact, k[:1].expand(300, D), samples=16, generator=generator, **WIDE)
    assert float(info.stderr.abs().max()) == 0.0
    reported = float(info.dequantisation_stderr.square().mean().sqrt())
    assert reported * D * math.log(2.0) == pytest.approx(float(info.nats.std()), rel=0.15)
    _, one = ndm_ct.bits_per_dim(exact, k, generator=generator, **WIDE)
    assert bool(one.dequantisation_stderr.isnan().all())


def noisy_model(d=16):
    """A rotated Gaussian: its probes scatter."""
    rotation, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    cov = rotation @ torch.diag(torch.linspace(0.2, 0.6, d, dtype=torch.float64) ** 2) @ rotation.mT
    return Gaussian(torch.zeros(d), cov, schedule=schedules.LinearLogSNR(-12.0, 4.0))


def test_weights_of_a_noisy_trace_have_no_bias(generator):
    """exp raises the mean of noise of size s by s^2 / 2; bins so fine that P is the density times their size."""
    exact, bins, samples = noisy_model(), Quantisation(4096), 4
    k = torch.full((1000, 16), 2200)
    options = {"quantisation": 4096, "trace": Quadrature(nodes=8, probes=1, sweeps=8), "rtol": 1e-3, "atol": 1e-3}
    _, info = ndm_ct.bits_per_dim(exact, k, samples=samples, generator=generator, return_info=True, **options)
    log_p = exact.log_prob(bins.centres(k[:1], torch.float64)) + 16 * math.log(2 * bins.half_width)
    ratio = (info.nats.double() - log_p).exp()
    stderr = float(ratio.std()) / math.sqrt(1000)
    variance = 5 / 7 * float((info.stderr.double() * 16 * math.log(2.0)).square().mean()) * samples
    assert 0.15 < variance < 0.35
    assert stderr < 0.012
    assert abs(float(ratio.mean()) - 1.0) < 3 * stderr
    assert math.exp(0.5 * variance) - 1.0 > 6 * stderr  # what the estimate would be wrong by without the correction
    assert math.exp(-0.2 * variance) - 1.0 < -3 * stderr  # and with the widened variance in its place


def test_the_error_of_several_points_is_that_of_their_mean(generator):
    """Of K weights the larger ones count more; equal ones average their errors as independent numbers."""
    exact, k = noisy_model(), torch.full((300, 16), 2200)
    options = {"quantisation": 4096, "trace": Quadrature(nodes=16, probes=1, sweeps=8), "rtol": 1e-3, "atol": 1e-3}
    bits, info = ndm_ct.bits_per_dim(exact, k, samples=4, generator=generator, return_info=True, **options)
    assert float(bits.std()) == pytest.approx(float(info.stderr.square().mean().sqrt()) * math.sqrt(5 / 7), rel=0.15)


def test_standard_error_on_demand_is_in_bits(generator):
    exact = noisy_model(40)
    k, target = levels_of(exact, 6, generator), 0.004
    options = {"rtol": 1e-3, "atol": 1e-3, "generator": generator, "return_info": True}
    _, loose = ndm_ct.bits_per_dim(exact, k, **options)
    _, tight = ndm_ct.bits_per_dim(exact, k, stderr=target, **options)
    assert float(loose.stderr.min()) > target
    assert 0.5 * target < float(tight.stderr.max()) <= target * (1 + 1e-6)


def levels_of(exact, n, generator):
    x = exact.sample_data(n, generator=generator)
    return ((x + 1) * 128).floor().clamp(0, 255).long()


def test_conditioning_of_several_points_goes_with_their_row():
    """A shared table may have as many entries as there are points, here 2 x 3, and stays shared."""
    tables = set()

    def predictor(z, t, shift, table):
        tables.add(tuple(table.shape))
        return 0.3 * torch.tanh(z) + shift[:, None] + 0.0 * table.sum()

    conditioned = ndm_ct.NDM(predictor, (2,), schedule=schedules.LinearLogSNR(-3, 3))
    k, table = torch.tensor([[8, 8], [8, 8]]), torch.ones(6, 2)
    shift, seed = torch.tensor([0.0, 0.7]), torch.Generator().manual_seed
    options = {"quantisation": LEVELS, "samples": 3, "table": table}
    bits = ndm_ct.bits_per_dim(conditioned, k, generator=seed(1), shift=shift, **options)
    assert tables == {(6, 2)}
    for row in range(2):
        generator = seed(1)
        torch.rand(3 * row, 2, generator=generator)  # the noise of the rows before
        alone = ndm_ct.bits_per_dim(conditioned, k[:1], generator=generator, shift=shift[row : row + 1], **options)
        assert float(alone) == pytest.approx(float(bits[row]), abs=1e-5)
    assert float((bits[1] - bits[0]).abs()) > 0.1


def test_truncated_normal_density_integrates_to_one_and_has_its_entropy(generator):
    alpha, sigma, bins = 0.9, 0.06, Quantisation(9)
    k = torch.tensor([[4]])
    half = alpha * bins.half_width
    grid = alpha * bins.centres(k, torch.float64) + torch.linspace(-half, half, 20001, dtype=torch.float64)[:, None]
    density = bins.truncated_normal_log_prob(grid, k, alpha, sigma).exp()
    assert float(torch.trapezoid(density, grid[:, 0])) == pytest.approx(1.0, abs=1e-7)
    many = torch.full((40_000, 3), 4)
    z = bins.truncated_normal(many, alpha, sigma, torch.float64, generator)
    surprise = -bins.truncated_normal_log_prob(z, many, alpha, sigma)
    assert surprise.shape == (40_000,)
    entropy = 3 * bins.truncated_normal_offset(alpha, sigma)
    assert abs(float(surprise.mean()) - entropy) < 4 * float(surprise.std()) / 200


def test_elbo_bounds_the_discrete_probability(generator):
    """Above the exact code length by what a smooth density must lose: it fills the bin, q(z_0|x) a third of it."""
    gamma = safe_gamma(LEVELS)
    exact, k = model(gamma), levels(2000, generator)
    bits, info = ndm_ct.bits_per_dim(
        exact, k, quantisation=LEVELS, bound="elbo", samples=64, generator=generator, return_info=True
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
    bits, info = ndm_ct.bits_per_dim(exact, k, quantisation=LEVELS, bound="elbo", generator=one, **options)
    nats, terms = ndm_ct.elbo(exact, BINS.centres(k, torch.float32), quantisation=BINS, generator=other, **options)
    torch.testing.assert_close(info.nats, nats)
    torch.testing.assert_close(info.stderr, terms.stderr / (D * math.log(2.0)))
    torch.testing.assert_close(bits, -nats / (D * math.log(2.0)))
    assert info.nfe == terms.nfe == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantisation": 8}, ValueError, r"outside \[0, 8\) in rows \[1\]"),
        ({"bound": "elob"}, ValueError, "did you mean 'elbo'"),
        ({"dequantisation": "proces"}, ValueError, "did you mean 'process'"),
        ({"bound": "elbo", "trace": "exact"}, ValueError, "trace has no effect with bound='elbo'"),
        ({"bound": "elbo", "dequantisation": "process"}, ValueError, "dequantisation has no effect"),
        ({"stderr": 0.1, "bound": "elbo"}, ValueError, "stderr has no effect with bound='elbo'"),
        ({"quantisation": None}, TypeError, "quantisation must be a number of levels or .*, got NoneType"),
        ({"levels": 8}, TypeError, "levels"),
        ({"quantisation": 1}, ValueError, "quantisation=1 .*levels must be an int of at least 2"),
    ],
)
def test_bad_options(options, error, message):
    k = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 16]])
    with pytest.raises(error, match=message):
        ndm_ct.bits_per_dim(model(-13.3), k, **({"quantisation": LEVELS} | options))


@pytest.mark.parametrize("x", [torch.rand(2, D), torch.ones(2, D, dtype=torch.bool), torch.rand(2, D).double()])
def test_data_that_are_not_integers_are_refused(x):
    with pytest.raises(TypeError, match="bits per dimension are defined for integer levels"):
        ndm_ct.bits_per_dim(model(-13.3), x, quantisation=LEVELS)


def test_empty_batch():
    assert ndm_ct.bits_per_dim(model(-13.3), torch.empty(0, D, dtype=torch.long), quantisation=LEVELS).shape == (0,)


def test_a_number_of_levels_means_bins_on_the_default_range(generator):
    """In every function that takes quantisation."""
    exact, k = model(-12.0), levels(64, generator)
    seed = torch.Generator().manual_seed
    bits = [ndm_ct.bits_per_dim(exact, k[:2], quantisation=q, generator=seed(1)) for q in (LEVELS, BINS)]
    assert torch.equal(*bits)
    options = {"bound": "elbo", "progress": False}
    results = [ndm_ct.evaluate(exact, k, quantisation=q, **options).bits_per_dim for q in (LEVELS, BINS)]
    assert results[0] == results[1]
    differences = [ndm_ct.compare(exact, exact, k, quantisation=q, **options).difference for q in (LEVELS, BINS)]
    assert differences == [0.0, 0.0]


@pytest.mark.parametrize("wrong", [0, 1, -3, True, 2.5, "256", torch.tensor(8)], ids=str)
def test_what_is_no_quantisation_is_named(wrong):
    with pytest.raises((TypeError, ValueError), match="quantisation"):
        resolve_quantisation(wrong)


def test_earlier_names_of_dequantisation_are_read():
    assert rename_earlier({"dequantisation": "truncated-normal", "lr": 1}) == {"dequantisation": "process", "lr": 1}
    assert rename_earlier({"dequantisation": "centres"}) == {"dequantisation": "process"}
    assert rename_earlier({"dequantisation": "uniform"}) == {"dequantisation": "uniform"}
    assert rename_earlier({"dequantisation": 3, "a": 1}) == {"dequantisation": 3, "a": 1}
    assert rename_earlier({"a": 1}) == {"a": 1}


def test_fine_levels_are_scored_by_either_bound(generator):
    """50,000 levels on (0, 1), whose bin centres float32 rounds by up to 0.3 % of a bin."""
    exact = Gaussian(torch.full((2,), 0.5), 0.01 * torch.eye(2), schedule=schedules.LinearLogSNR(-23.0, 5.0)).float()
    fine = Quantisation(50_000, edges=(0.0, 1.0))
    k = torch.randint(20_000, 30_000, (64, 2), generator=generator)
    x = fine.centres(k, torch.float32)
    fine.validate_centres(x)
    with pytest.raises(ValueError, match="not at the bin centres"):
        fine.validate_centres(x + 0.25 * fine.half_width)
    bits = ndm_ct.bits_per_dim(exact, k, quantisation=fine, bound="elbo", samples=64, generator=generator)
    assert bool(bits.isfinite().all())
    with pytest.raises(ValueError, match="float32 cannot tell 67108864 levels apart"):
        Quantisation(2**26).validate_centres(torch.zeros(1, 2))


# --- where the levels lie ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dequantisation": "process"}, {"bound": "elbo", "samples": 4}], ids=str)
def test_centres_are_edges_half_a_bin_further_out(options):
    """x / 8 - 1 for 17 levels: the extreme levels at -1 and 1, their outer edges at -17/16 and 17/16."""
    exact, k = model(safe_gamma(LEVELS)), levels(6, torch.Generator().manual_seed(0))
    by_centres, by_edges = Quantisation(17, centres=(-1.0, 1.0)), Quantisation(17, edges=(-17 / 16, 17 / 16))
    torch.testing.assert_close(by_centres.centres(k, torch.float64), k.double() / 8.0 - 1.0, rtol=0.0, atol=1e-15)
    found, expected, narrow = (
        ndm_ct.bits_per_dim(exact, k, quantisation=bins, generator=torch.Generator().manual_seed(1), **options)
        for bins in (by_centres, by_edges, Quantisation(17, edges=(-1, 1)))
    )
    assert torch.equal(found, expected)
    assert float((found - narrow).abs().max()) > 1e-3


@pytest.mark.parametrize("interval", [(-1.0, 1.0), (0.0, 1.0)], ids=["x / 8 - 1", "x / 16"])
def test_a_gaussian_on_its_levels_has_the_bits_of_their_bins(interval, generator):
    """-log2 of the normal's mass on each bin, whose centre is the value that the network was trained on."""
    low, high = interval
    mean, std, bins = 0.5 * (low + high), 0.2 * (high - low), Quantisation(17, centres=interval)
    exact = Gaussian(torch.full((1,), mean), torch.tensor([[std**2]]), schedule=schedules.LinearLogSNR(-14.0, 5.0))
    k = torch.tensor([[4], [8], [11]])
    value, half = low + (high - low) * k / 16.0, 0.5 * (high - low) / 16.0
    normal = torch.distributions.Normal(mean, math.hypot(std, math.exp(-7.0)))
    truth = -(normal.cdf(value + half) - normal.cdf(value - half)).log2()[:, 0]
    bits = ndm_ct.bits_per_dim(exact, k, quantisation=bins, samples=256, generator=generator)
    torch.testing.assert_close(bits, truth.to(bits.dtype), rtol=0.0, atol=0.02)
    wrong = ndm_ct.bits_per_dim(exact, k, quantisation=17, samples=256, generator=generator)
    assert float((wrong - truth).abs().max()) > 0.05


PLAIN = ndm_ct.NDM(lambda z, t: 0.5 * z, (2,))
ADAPTED = adapters.from_denoiser(lambda z, sigma: z / (1.0 + sigma[:, None] ** 2), (2,))
CONDITIONED = adapters.from_denoiser(
    lambda z, sigma, label: z / (1.0 + sigma[:, None] ** 2) + 0.0 * label[:, None], (2,)
)
ROWS = torch.tensor([[0, 16], [3, 4], [8, 1]])
SCORED = {
    "bits_per_dim": lambda q: ndm_ct.bits_per_dim(ADAPTED, ROWS, quantisation=q),
    "guided": lambda q: ndm_ct.bits_per_dim(
        ndm_ct.guided(CONDITIONED, 2.0, null={"label": 0}), ROWS, quantisation=q, label=torch.tensor([1, 2, 3])
    ),
    "elbo": lambda q: ndm_ct.elbo(ADAPTED, resolve_quantisation(q).centres(ROWS, torch.float32), quantisation=q),
    "evaluate": lambda q: ndm_ct.evaluate(ADAPTED, ROWS, quantisation=q, progress=False),
    "compare": lambda q: ndm_ct.compare(PLAIN, ADAPTED, ROWS, quantisation=q, progress=False),
    "fit": lambda q: ndm_ct.fit(
        adapters.from_velocity(ndm_ct.nn.MLP(2, width=4, depth=1), (2,)), ROWS, quantisation=q, steps=1, progress=False
    ),
}


@pytest.mark.parametrize("name", SCORED)
def test_an_adapted_network_says_where_its_levels_lie(name):
    for bins in (17, Quantisation(17)):
        with pytest.raises(
            ValueError, match=r"centres=\(-1, 1\)\) .* x / 8 - 1 .*Normalize.* x / 16 .* edges=\(-1, 1\)"
        ):
            SCORED[name](bins)
    if name not in ("fit", "compare"):
        for bins in (Quantisation(17, centres=(-1, 1)), Quantisation(17, edges=(-1, 1))):
            SCORED[name](bins)


def test_a_saved_model_stays_adapted(tmp_path):
    network = ndm_ct.nn.MLP(2, width=4, depth=1)
    for made, adapted in ((adapters.from_velocity(network, (2,)), True), (ndm_ct.NDM(network, (2,)), False)):
        ndm_ct.save(made, tmp_path / "model")
        assert ndm_ct.load(tmp_path / "model").adapted is adapted
        assert ("adapted" in describe(made)) is adapted


def test_edges_and_centres_exclude_each_other():
    with pytest.raises(ValueError, match="give one"):
        Quantisation(4, edges=(0, 1), centres=(0, 1))
    assert Quantisation(4) == Quantisation(4, edges=(-1, 1))
    assert Quantisation(4).placed is False
    assert copy.deepcopy(Quantisation(4, edges=(-1, 1))).placed is True


def test_files_with_a_range_are_read():
    earlier = {"quantisation": {"levels": 4, "range": [-1.0, 1.0]}, "lr": 1}
    assert rename_earlier(earlier) == {"quantisation": {"levels": 4, "edges": [-1.0, 1.0]}, "lr": 1}
    assert rename_earlier({"quantisation": [4, -1.0, 1.0]}) == {"quantisation": [4, -1.0, 1.0]}


@pytest.mark.parametrize("gamma", [-20.0, -6.0, 0.0])
def test_the_decoder_sums_the_levels_that_count(gamma, generator):
    """Levels far from z are left out, of 257 as of 5; beyond the ends too."""
    for count in (5, 257):
        bins = Quantisation(count)
        k = torch.randint(count, (50, 3), generator=generator)
        x, spread = bins.centres(k, torch.float64), torch.tensor([[0.05], [3.0]]).repeat(25, 1)
        z = x + spread * torch.randn(50, 3, dtype=torch.float64, generator=generator)
        values = bins.centres(torch.arange(count), torch.float64)
        logits = -0.5 * (z[..., None] - values) ** 2 * math.exp(-gamma)
        expected = torch.log_softmax(logits, -1).gather(-1, k[..., None]).sum((1, 2))
        found = bins.decoder_log_prob(z, x, torch.full((50, 1), gamma, dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_bound_of_many_levels_needs_little_memory():
    """Two colour images with 65,536 levels: a table of all levels would have 400 million entries."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    images = torch.full((2, 3, 32, 32), 30_000)
    net = ndm_ct.NDM(lambda z, t: 0.9 * z, (3, 32, 32), schedule=schedules.LinearLogSNR(-13.0, 5.0))
    with Watch():
        bits = ndm_ct.bits_per_dim(net, images, quantisation=65_536, bound="elbo")
    assert bool(bits.isfinite().all())
    assert largest <= 2**22
