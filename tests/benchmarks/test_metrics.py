"""Distances between sets of features, against other packages, explicit loops and distributions with known distances."""

import math
import sys

import numpy as np
import pytest
import torch

metrics = pytest.importorskip("bench.metrics", reason="needs ndm-ct[bench]")


def correlated(n, d, generator, *, shift=0.0):
    """Rows of a Gaussian whose covariance does not commute with that of another call."""
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + shift


def same_gaussian(n, d, generator, *, shift=0.0):
    """Rows of one Gaussian with standard deviations from 1 to 0.2, moved along the first axis."""
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(1.0, 0.2, d)
    rows[:, 0] += shift
    return rows


def test_frechet_is_that_of_scipys_matrix_root(generator):
    linalg = pytest.importorskip("scipy.linalg")
    x, y = correlated(80, 6, generator, shift=0.4), correlated(50, 6, generator)
    cov_x, cov_y = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    mean = np.square(x.numpy().mean(0) - y.numpy().mean(0)).sum()
    expected = mean + np.trace(cov_x + cov_y - 2.0 * linalg.sqrtm(cov_x @ cov_y).real)
    assert mean > 0.2
    assert metrics.frechet(x, y) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet(y, x) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet(x, x) == pytest.approx(0.0, abs=1e-9)


class Same(torch.nn.Module):
    """Features are the inputs."""

    num_features = 5

    def forward(self, x):
        return x


def test_frechet_is_that_of_torchmetrics(generator):
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = correlated(70, 5, generator, shift=-0.3), correlated(40, 5, generator)
    theirs = fid.FrechetInceptionDistance(feature=Same()).set_dtype(torch.float64)
    theirs.update(x, real=False)
    theirs.update(y, real=True)
    assert metrics.frechet(x, y) == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_frechet_of_fewer_rows_than_features_uses_the_part_they_span():
    """Two rows each, along different axes: the covariances are singular and their product vanishes."""
    x, y = torch.zeros(2, 4), torch.zeros(2, 4)
    x[0, 0], y[0, 1] = 2.0, 4.0
    # variances 2 and 8 on orthogonal axes, means (1, 0) and (0, 2)
    assert metrics.frechet(x, y) == pytest.approx(2.0 + 8.0 + 1.0 + 4.0)


def test_frechet_of_dead_features_and_few_rows(generator):
    """Most features are zero, rows are fewer than features: what replaces the root is a nuclear norm of rows."""
    x, y = torch.zeros(25, 200, dtype=torch.float64), torch.zeros(40, 200, dtype=torch.float64)
    x[:, 20:80], y[:, 30:90] = correlated(25, 60, generator, shift=0.1), correlated(40, 60, generator)
    a, b = (x - x.mean(0)) / 24.0**0.5, (y - y.mean(0)) / 39.0**0.5
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    expected -= 2.0 * torch.linalg.svdvals(a @ b.mT).sum()
    assert metrics.frechet(x, y) == pytest.approx(float(expected), rel=1e-6)
    assert metrics.frechet(y, x) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(("shift", "truth"), [(0.0, 0.0), (0.5, 0.25)])
def test_extrapolation_removes_the_bias(shift, truth, generator):
    """150 repeats: the extrapolated mean within three standard errors of the truth, the plain one five away."""
    plain, extrapolated, stderr = [], [], []
    for _ in range(150):
        x, y = same_gaussian(150, 6, generator, shift=shift), same_gaussian(200, 6, generator)
        result = metrics.frechet_infinity(x, y)
        plain.append(metrics.frechet(x, y))
        extrapolated.append(result.value)
        stderr.append(result.stderr)
    plain, extrapolated = torch.tensor(plain), torch.tensor(extrapolated)
    error = float(extrapolated.std()) / 150**0.5
    assert abs(float(extrapolated.mean()) - truth) < 3.0 * error
    assert float(plain.mean()) - truth > 5.0 * float(plain.std()) / 150**0.5
    assert error < 0.01
    # The reported error is that of one repeat: it may be cautious, not careless.
    assert 0.8 < float(torch.tensor(stderr).mean()) / float(extrapolated.std()) < 2.0


def test_line_is_drawn_through_the_means_of_the_parts():
    """Distances 3 + 2 k with a spread that cancels in the mean: the value at k = 0 is 3."""
    distances = [torch.tensor([5.0]), torch.tensor([6.0, 8.0]), torch.tensor([8.0, 9.0, 10.0])]
    result = metrics._extrapolate([each.double() for each in distances])
    assert result.value == pytest.approx(3.0)
    # squares 2/2 and 2/3 with 1 + 2 degrees of freedom
    assert result.stderr == pytest.approx(math.sqrt((1.0 + 2.0 / 3.0) / 3.0))


def explicit_mmd(x, y):
    """The definition, pair by pair."""

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1.0) ** 3

    x, y = x.tolist(), y.tolist()
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2.0 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kid_is_the_double_loop(generator):
    x, y = correlated(23, 3, generator, shift=0.2), correlated(31, 3, generator)
    reference = metrics.Reference(y)
    result = metrics.kid(x, reference)
    assert result.value == pytest.approx(explicit_mmd(x, y), rel=1e-10)
    blocks_x, blocks_y = metrics._blocks(x, metrics.make_generator(0, 2)), reference.kernel_sums[0]
    without = [
        explicit_mmd(*(torch.cat([*blocks[:i], *blocks[i + 1 :]]) for blocks in (blocks_x, blocks_y)))
        for i in range(metrics.BLOCKS)
    ]
    jackknife = math.sqrt((metrics.BLOCKS - 1) ** 2 / metrics.BLOCKS) * np.std(without, ddof=1)
    assert result.stderr == pytest.approx(jackknife, rel=1e-8)


def test_kid_is_unbiased_and_knows_its_error(generator):
    equal, moved = [], []
    for _ in range(40):
        y = same_gaussian(120, 4, generator)
        equal.append(metrics.kid(same_gaussian(80, 4, generator), y).value)
        moved.append(metrics.kid(same_gaussian(80, 4, generator, shift=0.7), y))
    equal, values = torch.tensor(equal), torch.tensor([each.value for each in moved])
    assert abs(float(equal.mean())) < 3.0 * float(equal.std()) / 40**0.5
    assert float(values.mean()) > 10.0 * float(values.std()) / 40**0.5
    ratio = float(torch.tensor([each.stderr for each in moved]).mean()) / float(values.std())
    assert 0.7 < ratio < 1.4


def two_clusters(n, generator):
    """The first half around the origin, the second far away."""
    rows = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    rows[n // 2 :, 0] += 100.0
    return rows


def test_neighbourhoods_tell_fidelity_from_diversity(generator, capsys):
    """One of two clusters: everything drawn is real, half of what is real is never drawn. Then the other way round."""
    pytest.importorskip("prdc")
    both, one = two_clusters(200, generator), two_clusters(400, generator)[:200]
    missing = metrics.neighbourhoods(one, both, k=5)
    assert missing["precision"] > 0.95
    assert missing["recall"] == pytest.approx(0.5, abs=0.05)
    assert missing["coverage"] == pytest.approx(0.5, abs=0.05)
    # Twice as many samples as the cluster has real images: each real neighbourhood holds twice the number expected.
    assert missing["density"] == pytest.approx(1.0, abs=0.2)
    invented = metrics.neighbourhoods(both, one, k=5)
    assert invented["precision"] == pytest.approx(0.5, abs=0.05)
    assert invented["recall"] > 0.95
    assert invented["density"] == pytest.approx(0.5, abs=0.1)
    # Five neighbours before the first of half as many samples: chance (2/3)^5.
    assert invented["coverage"] == pytest.approx(1.0 - (2.0 / 3.0) ** 5, abs=0.06)
    assert capsys.readouterr().out == ""


def test_neighbourhoods_are_thinned_to_equal_numbers(generator, monkeypatch):
    prdc = pytest.importorskip("prdc")
    seen = []

    def record(real_features, fake_features, nearest_k):
        seen.append((real_features, fake_features, nearest_k))
        return {"precision": 1.0, "recall": 0.0, "density": 0.5, "coverage": 0.25}

    monkeypatch.setattr(prdc, "compute_prdc", record)
    x, y = torch.ones(30, 2), torch.zeros(50, 2)
    metrics.neighbourhoods(x, y, k=3)
    monkeypatch.setattr(metrics, "NEIGHBOUR_ROWS", 12)
    metrics.neighbourhoods(x, y, k=4)
    assert [(real.shape, fake.shape, k) for real, fake, k in seen] == [((30, 2), (30, 2), 3), ((12, 2), (12, 2), 4)]
    assert all((real == 0).all() and (fake == 1).all() for real, fake, _ in seen)


def test_score_holds_every_distance(generator):
    x, y = correlated(60, 4, generator, shift=0.3).float(), correlated(90, 4, generator).float()
    reference = metrics.Reference(y)
    scores = metrics.score(x, reference, neighbours=0)
    assert scores.fd == pytest.approx(metrics.frechet(x, y), rel=1e-12)
    infinity, kid = metrics.frechet_infinity(x, reference), metrics.kid(x, reference)
    assert (scores.fd_inf, scores.fd_inf_se) == (infinity.value, infinity.stderr)
    assert (scores.kid, scores.kid_se) == (kid.value, kid.stderr)
    assert scores.precision is scores.recall is scores.density is scores.coverage is None
    assert scores == metrics.score(x, metrics.Reference(y), neighbours=0)


def test_too_few_rows_are_refused(generator):
    x, y = correlated(40, 3, generator), correlated(40, 3, generator)
    with pytest.raises(ValueError, match="4 parts of at least 2; got 7 rows"):
        metrics.frechet_infinity(x[:7], y)
    with pytest.raises(ValueError, match="10 blocks of at least 2 rows, got 19 rows"):
        metrics.kid(x, y[:19])
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        metrics.frechet(x[:1], y)


def test_small_samples_are_warned_of():
    assert metrics.too_small(101, 200, 100) is None
    for samples, reference in ((100, 200), (200, 100)):
        message = metrics.too_small(samples, reference, 100)
        assert f"{samples} samples and {reference} reference images for 100 features" in message
        assert "KID" in message


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prdc", None)
    with pytest.raises(ImportError, match="pip install prdc"):
        metrics.neighbourhoods(torch.zeros(9, 2), torch.zeros(9, 2))


def test_energy_distance_of_two_normals():
    r"""In one dimension :math:`E|X - Y|` of normals is known; the scatter is that of sets of one law."""
    generator = torch.Generator().manual_seed(0)

    def draw(mean, n):
        return mean + torch.randn(n, 1, dtype=torch.float64, generator=generator)

    def absolute(mean, std):  # E|N(mean, std^2)|
        z = mean / std
        return std * math.sqrt(2.0 / math.pi) * math.exp(-0.5 * z**2) + mean * math.erf(z / math.sqrt(2.0))

    expected = 2.0 * absolute(0.7, math.sqrt(2.0)) - 2.0 * absolute(0.0, math.sqrt(2.0))
    apart = [metrics.energy_distance(draw(0.0, 200), draw(0.7, 150)) for _ in range(100)]
    assert abs(np.mean(apart) - expected) < 3.0 * np.std(apart) / 10.0
    same = [metrics.energy_score(draw(0.0, 100), draw(0.0, 80), exchanges=40) for _ in range(300)]
    values, scatter = [each.value for each in same], np.mean([each.stderr for each in same])
    assert abs(np.mean(values)) < 4.0 * scatter / math.sqrt(300)
    assert np.std(values) == pytest.approx(scatter, rel=0.2)
