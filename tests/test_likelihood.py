"""loglik, encode and decode against exact densities, exact traces and exact Jacobians."""

import math

import pytest
import torch
from oracles import SCHEDULES, TRANSFORMS, ThreePoints, Wiggle, gaussian, mixture
from torch import nn

import ndm_ct
from ndm_ct import NDM, SolverError, schedules, transforms
from ndm_ct.divergence import Exact, Hutchinson

MODELS = {"gaussian": gaussian, "mixture": mixture}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_loglik_is_the_exact_density_at_a_bounded_cost(make, transform, schedule, generator):
    model = make(schedule(), transform())
    x = model.sample_data(16, generator=generator)
    exact = model.log_prob(x)
    for tolerance, error, cost in ((1e-5, 2e-3, 260), (None, 5e-4, 340), (1e-8, 1e-5, 760)):
        value, info = ndm_ct.loglik(model, x, trace="exact", rtol=tolerance, atol=tolerance, return_info=True)
        assert float((value - exact).abs().max()) < error
        assert info.nfe < cost
        assert info.vjps == info.nfe * exact.new_zeros(x[0].numel()).numel()
        assert float(info.stderr.abs().max()) == 0.0
        torch.testing.assert_close(info.log_prior + info.logdet, value)


@pytest.mark.parametrize("name", ["LinearLogSNR", "VariancePreserving"])
def test_default_prior_differs_by_the_closed_form_mismatch(name, generator):
    """With N(0, I) as prior, log p changes by log N(z_1; 0, I) - log p_1(z_1) at the exact z_1."""
    exact = gaussian(SCHEDULES[name]())
    default = NDM(exact.predictor, exact.event_shape, schedule=exact.schedule)
    x = exact.sample_data(8, generator=generator)
    value, info = ndm_ct.loglik(default, x, rtol=1e-8, atol=1e-8, return_info=True)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(info.z).sum(1)
    mismatch = standard - exact.log_prob(info.z, 1.0)
    assert float(mismatch.abs().max()) > 1e-4
    torch.testing.assert_close(value - exact.log_prob(x), mismatch, rtol=0.0, atol=1e-5)


def test_moments_head_with_a_nonlinear_transform_has_the_exact_marginal_density():
    exact = ThreePoints(schedules.LinearLogSNR(-6, 6), Wiggle())
    model = exact.model()
    x = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]
    value = ndm_ct.loglik(model, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(value, exact.log_prob(x, model.t_min), rtol=0.0, atol=2e-5)


def test_moments_need_both_derivatives():
    """The same model without dF/dt has another density: the term is not decoration."""
    exact = ThreePoints(schedules.LinearLogSNR(-6, 6), Wiggle())
    full = exact.model()
    dropped = NDM(
        lambda z, t: (exact.moments(z, t)[0], torch.zeros_like(z)), (1,), transform=exact.transform,
        schedule=exact.schedule, prediction="moments", prior=full.prior,
    )  # fmt: skip
    x = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None]
    gap = ndm_ct.loglik(dropped, x) - exact.log_prob(x, 0.0)
    assert float(gap.abs().max()) > 0.05


# --- Hutchinson ------------------------------------------------------------------------------------------------------


def test_probes_are_unbiased_for_a_rotated_jacobian(generator):
    """4,000 probes: their mean within four standard errors of the exact trace, with a standard error above zero."""
    model = gaussian(SCHEDULES["LinearLogSNR"]())
    z = torch.randn(3, 6, dtype=torch.float64)
    with_byproduct = model.flow(torch.float64).network_part(torch.tensor(0.5, dtype=torch.float64))

    def part(z):
        return with_byproduct(z)[0]

    _, exact = Exact().bind(z, None)(part, z)
    _, forms = Hutchinson(4000).bind(z, generator)(part, z)
    stderr = forms.std(1) / math.sqrt(4000)
    assert float(stderr.min()) > 1e-3
    assert bool(((forms.mean(1) - exact[:, 0]).abs() < 4 * stderr).all())


def test_exact_trace_is_the_jacobians(generator):
    matrix = torch.randn(5, 5, dtype=torch.float64)
    z = torch.randn(4, 5, dtype=torch.float64)

    def field(z):
        return torch.sin(z @ matrix)

    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: field(row[None])[0]))(z)
    for chunk in (None, 2):
        value, trace = Exact(chunk).bind(z, None)(field, z)
        torch.testing.assert_close(value, field(z))
        torch.testing.assert_close(trace[:, 0], jacobian.diagonal(dim1=1, dim2=2).sum(1))
    _, chunked = Hutchinson(7, chunk=3).bind(z, torch.Generator().manual_seed(3))(field, z)
    _, whole = Hutchinson(7).bind(z, torch.Generator().manual_seed(3))(field, z)
    torch.testing.assert_close(chunked, whole)


def test_probes_are_exact_for_a_diagonal_jacobian():
    z = torch.randn(4, 3, dtype=torch.float64)
    _, forms = Hutchinson(5).bind(z, None)(lambda z: z**2, z)
    torch.testing.assert_close(forms, (2 * z.sum(1))[:, None].expand(4, 5))


def calibration(probes, repeats, model, x):
    """z-scores of independent estimates of log p(x) against its exact-trace value."""
    rows = x.expand(repeats, -1)
    value, info = ndm_ct.loglik(model, rows, trace=Hutchinson(probes), rtol=1e-6, atol=1e-6, return_info=True)
    exact = ndm_ct.loglik(model, x, trace="exact", rtol=1e-9, atol=1e-9)
    return (value - exact) / info.stderr


def test_reported_standard_error_is_calibrated():
    model = gaussian(SCHEDULES["LinearLogSNR"](-8.0, 5.0), d=16)
    scores = calibration(16, 200, model, torch.randn(1, 16, dtype=torch.float64))
    assert 0.85 < float(scores.std()) < 1.2
    assert abs(float(scores.mean())) < 4 * 1.07 / math.sqrt(200)


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_reported_standard_error_is_calibrated_everywhere(make, name):
    model = make(SCHEDULES[name](), d=16)
    scores = calibration(16, 2000, model, model.sample_data(1))
    assert 0.95 < float(scores.std()) < 1.2
    assert abs(float(scores.mean())) < 4 * 1.07 / math.sqrt(2000)


def test_t_interval_of_four_probes_covers():
    from scipy.stats import t as student

    model = gaussian(SCHEDULES["LinearLogSNR"](-8.0, 5.0), d=16)
    scores = calibration(4, 2000, model, torch.randn(1, 16, dtype=torch.float64))
    covered = float((scores.abs() < student.ppf(0.975, 3)).double().mean())
    assert 0.92 < covered < 0.98


def test_one_probe_has_no_standard_error():
    model = gaussian()
    _, info = ndm_ct.loglik(model, torch.randn(2, 6).double(), trace=Hutchinson(1), return_info=True)
    assert bool(info.stderr.isnan().all())


def test_same_generator_same_bits_and_rows_keep_their_probes():
    model = gaussian(d=40)
    x = torch.randn(6, 40, dtype=torch.float64)

    def run(x, seed=3):
        return ndm_ct.loglik(model, x, generator=torch.Generator().manual_seed(seed), rtol=1e-6, atol=1e-6)

    assert torch.equal(run(x), run(x))
    assert not torch.equal(run(x), run(x, seed=4))
    torch.testing.assert_close(run(x)[:3], run(x[:3]), rtol=0.0, atol=1e-4)  # equal up to the shared steps


def test_auto_is_exact_for_small_events_and_sixteen_probes_for_large():
    for d, columns in ((32, 32), (33, 16)):
        _, info = ndm_ct.loglik(gaussian(d=d), torch.randn(2, d).double(), rtol=1e-3, atol=1e-3, return_info=True)
        assert info.vjps == columns * info.nfe


# --- the map ---------------------------------------------------------------------------------------------------------


class SmallNet(nn.Module):
    """A smooth network on any (B, *E), with its own random but reasonable field."""

    def __init__(self, d, dtype=torch.float64):
        super().__init__()
        self.first, self.last = nn.Linear(d + 1, 16, dtype=dtype), nn.Linear(16, d, dtype=dtype)

    def forward(self, z, t, shift=None):
        flat = torch.cat([z.flatten(1), t[:, None]], 1)
        out = z + 0.5 * self.last(torch.tanh(self.first(flat))).reshape(z.shape)
        return out if shift is None else out + shift.reshape(-1, *(1,) * (z.ndim - 1))


def network_model(event_shape=(2, 1, 2), dtype=torch.float64, **kwargs):
    d = math.prod(event_shape)
    return NDM(SmallNet(d, dtype), event_shape, schedule=schedules.LinearLogSNR(-5, 4), **kwargs)


def test_encode_and_decode_are_inverse_and_logdet_is_the_jacobians():
    model = network_model(transform=transforms.Neural(SmallNet(4)))
    x = torch.randn(3, 2, 1, 2, dtype=torch.float64)
    z, info = ndm_ct.encode(model, x, rtol=1e-9, atol=1e-9, return_info=True)
    torch.testing.assert_close(ndm_ct.encode(model, x, rtol=1e-9, atol=1e-9), z, rtol=0.0, atol=1e-7)
    back, down = ndm_ct.decode(model, z, rtol=1e-9, atol=1e-9, return_info=True)
    torch.testing.assert_close(back, x, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(down.logdet, -info.logdet, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(down.loglik, info.loglik, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(info.loglik, ndm_ct.loglik(model, x, rtol=1e-9, atol=1e-9), rtol=0.0, atol=1e-6)
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda y: ndm_ct.encode(model, y[None], rtol=1e-9, atol=1e-9, differentiable=True)[0], x[row]
        )
        _, expected = torch.linalg.slogdet(jacobian.reshape(4, 4))
        assert float(info.logdet[row]) == pytest.approx(float(expected), abs=1e-6)


def test_float32_network_matches_its_float64_copy():
    """States are float64 inside, so a float32 network loses only its own rounding."""
    single = network_model(dtype=torch.float32)
    double = network_model(dtype=torch.float64)
    double.load_state_dict(single.state_dict())
    x = torch.randn(8, 2, 1, 2)
    value = ndm_ct.loglik(single, x)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), ndm_ct.loglik(double, x.double()), rtol=0.0, atol=2e-4)


def test_states_are_float64_for_float32_data():
    """With the zero prediction z only grows with sigma: exact to float32's last bit, at a tolerance it cannot reach."""
    model = NDM(lambda z, t: torch.zeros_like(z), (2,), schedule=schedules.LinearLogSNR(-5, 4))
    x, tight = torch.randn(4, 2), {"rtol": 1e-10, "atol": 1e-10}
    ends = model.schedule.sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    growth = ends[1] / ends[0]
    z = growth * x.double()
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + 2.0 * growth.log()
    value = ndm_ct.loglik(model, x, **tight)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2e-7, atol=0.0)
    torch.testing.assert_close(ndm_ct.encode(model, x, **tight).double(), z, rtol=2e-7, atol=0.0)


def test_gradients_of_loglik_are_finite_differences():
    model = network_model(transform=transforms.Neural(SmallNet(4)))
    x = torch.randn(2, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    options = {"rtol": 1e-9, "atol": 1e-9}
    ndm_ct.loglik(model, x, differentiable=True, **options).sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters())
    h = 1e-4
    with torch.no_grad():
        for tensor, index in (
            (x, (1, 0, 0, 1)),
            (model.predictor.last.weight, (2, 5)),
            (model.transform.net.first.bias, (3,)),
        ):
            gradient, original = float(tensor.grad[index]), float(tensor[index])
            sums = []
            for sign in (1, -1):
                tensor[index] = original + sign * h
                sums.append(float(ndm_ct.loglik(model, x.detach(), **options).sum()))
            tensor[index] = original
            assert gradient == pytest.approx((sums[0] - sums[1]) / (2 * h), rel=1e-5, abs=1e-7)


def test_gradients_through_probes_and_samples():
    model = network_model()
    x = torch.randn(2, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    run = {"trace": Hutchinson(2), "rtol": 1e-7, "atol": 1e-7}
    value = ndm_ct.loglik(model, x, differentiable=True, generator=torch.Generator().manual_seed(1), **run)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    direction, h = torch.randn_like(x), 1e-5
    shifted = [
        ndm_ct.loglik(model, x.detach() + sign * h * direction, generator=torch.Generator().manual_seed(1), **run).sum()
        for sign in (1, -1)
    ]
    assert float((gradient * direction).sum()) == pytest.approx(float(shifted[0] - shifted[1]) / (2 * h), rel=1e-4)
    z1 = torch.randn(2, 2, 1, 2, dtype=torch.float64)
    ndm_ct.decode(model, z1, differentiable=True).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_differentiable_no_graph_is_kept():
    model = network_model()
    x = torch.randn(2, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert not ndm_ct.loglik(model, x).requires_grad
    assert not ndm_ct.encode(model, x).requires_grad


def test_conditioning_reaches_the_likelihood():
    model, x = network_model(), torch.randn(2, 2, 1, 2, dtype=torch.float64)
    shift = torch.tensor([0.0, 1.0], dtype=torch.float64)
    value, plain = ndm_ct.loglik(model, x, shift=shift), ndm_ct.loglik(model, x)
    assert float((value - plain)[0].abs()) < 1e-4
    assert float((value - plain)[1].abs()) > 1e-2


# --- one hard row ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LinearLogSNR", "VariancePreserving", "Rectified"])
def test_a_hard_row_changes_nobody_elses_loglik(name, generator):
    model = mixture(SCHEDULES[name]())
    x = model.sample_data(64, generator=generator)
    hard = torch.full((1, 8), 8.0, dtype=torch.float64)
    alone, together = ndm_ct.loglik(model, x), ndm_ct.loglik(model, torch.cat([x, hard]))
    assert float((together[:-1] - alone).abs().max()) < 1e-3


def test_a_failing_row_is_named():
    def predictor(z, t):
        return torch.where(z.abs().amax(1, keepdim=True) > 50.0, torch.full_like(z, math.nan), 0.5 * z)

    model = NDM(predictor, (2,), schedule=schedules.LinearLogSNR(-5, 5))
    x = torch.randn(5, 2, dtype=torch.float64)
    x[3] = 60.0
    with pytest.raises(SolverError, match=r"rows \[3\]") as caught:
        ndm_ct.loglik(model, x)
    assert caught.value.rows == (3,)
    assert caught.value.t == pytest.approx(0.0, abs=1e-9)


# --- networks in the wild --------------------------------------------------------------------------------------------


class Dropped(SmallNet):
    def forward(self, z, t):
        return super().forward(nn.functional.dropout(z, 0.5, self.training), t)


def test_train_mode_is_switched_off_and_restored():
    model = NDM(Dropped(4), (4,), schedule=schedules.LinearLogSNR(-5, 5))
    model.train()
    model.predictor.first.eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    bounds = [ndm_ct.elbo(model, x, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*bounds)
    assert torch.equal(ndm_ct.loglik(model, x), ndm_ct.loglik(model, x))
    assert model.training
    assert model.predictor.training
    assert not model.predictor.first.training
    with pytest.raises(SolverError):
        ndm_ct.loglik(NDM(lambda z, t: z * math.nan, (4,)), x)


class Attention(nn.Module):
    """Tokens with self-attention: fused kernels have neither forward mode nor a second derivative."""

    def __init__(self, fast=False):
        super().__init__()
        self.inside = nn.Linear(2, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = layer if fast else None
        self.qkv, self.out = None if fast else nn.Linear(8, 24), nn.Linear(8, 1)

    def forward(self, z, t):
        h = self.inside(torch.stack([z, t[:, None].expand_as(z)], -1))
        if self.encoder is not None:
            return self.out(self.encoder(h))[..., 0]
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(h)[..., 0]


@pytest.mark.parametrize("fast", [False, True])
def test_attention_under_forward_mode_and_second_derivatives(fast):
    model = NDM(
        Attention(fast), (4,), transform=transforms.Neural(Attention(fast)), schedule=schedules.LinearLogSNR(-4, 4)
    )
    x = torch.randn(3, 4)
    ndm_ct.loss(model, x).mean().backward()  # reverse over forward
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.transform.parameters())
    model.zero_grad()
    ndm_ct.loglik(model, x, differentiable=True, rtol=1e-3, atol=1e-3).sum().backward()  # reverse over reverse
    assert all(p.grad is not None for p in model.predictor.parameters())
    double = model.double()
    value = ndm_ct.loglik(double, x.double(), trace="exact")
    estimate, info = ndm_ct.loglik(double, x.double(), trace=Hutchinson(64), return_info=True)
    assert bool(((value - estimate).abs() < 5 * info.stderr + 1e-4).all())


def test_empty_batch_gives_an_empty_result():
    model = network_model()
    x = torch.empty(0, 2, 1, 2, dtype=torch.float64)
    value, info = ndm_ct.loglik(model, x, return_info=True)
    assert value.shape == (0,)
    assert info.stderr.shape == (0,)
    assert ndm_ct.encode(model, x).shape == x.shape


def test_scalar_events():
    model = ndm_ct.reference.Gaussian(torch.tensor(0.3), torch.tensor([[0.5]]))
    x = torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(ndm_ct.loglik(model, x), model.log_prob(x), rtol=0.0, atol=1e-3)
