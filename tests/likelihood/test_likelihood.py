"""loglik, encode and decode against exact densities, exact traces and exact Jacobians."""

import gc
import math
import shutil

import pytest
import torch
from oracles import SCHEDULES, TRANSFORMS, ThreePoints, Wiggle, gaussian, mixture, perturbed
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ndm_ct
from ndm_ct import NDM, SolverError, schedules, transforms
from ndm_ct.divergence import Exact, Hutchinson, Quadrature
from ndm_ct.divergence.quadrature import Sweeps
from ndm_ct.likelihood.path import Problem

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
        d = x[0].numel()
        assert info.vjps % d == 0
        assert 1 <= info.nfe - info.vjps // d <= 9  # evaluations at other noise levels, which tell the truncation
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
    for chunk in (None, 2, 1):
        value, trace = Exact(chunk).bind(z, None)(field, z)
        torch.testing.assert_close(value, field(z))
        torch.testing.assert_close(trace[:, 0], jacobian.diagonal(dim1=1, dim2=2).sum(1))
    _, whole = Hutchinson(7).bind(z, torch.Generator().manual_seed(3))(field, z)
    for chunk in (3, 1):
        _, chunked = Hutchinson(7, chunk).bind(z, torch.Generator().manual_seed(3))(field, z)
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
        generator = torch.Generator().manual_seed(seed)
        return ndm_ct.loglik(model, x, trace="hutchinson", generator=generator, rtol=1e-4, atol=1e-4)

    assert torch.equal(run(x), run(x))
    assert not torch.equal(run(x), run(x, seed=4))
    torch.testing.assert_close(run(x)[:3], run(x[:3]), rtol=0.0, atol=1e-9)


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


def small(*sizes):
    return nn.Sequential(nn.Linear(sizes[0], 6), nn.Tanh(), nn.Linear(6, sizes[1])).double()


class Conditioned(nn.Module):
    """A network of its own, one hidden in a closure, and a code."""

    def __init__(self, hidden):
        super().__init__()
        self.net, self.hidden = small(5, 2), hidden

    def forward(self, z, t, code):
        return 0.5 * z + 0.3 * self.net(torch.cat([z, t[:, None], code], 1)) + 0.3 * self.hidden(z)


class OfTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small(3, 2)

    def forward(self, x, t):
        return 0.3 * self.net(torch.cat([x, t[:, None]], 1))


class Everything:
    """A model of which everything can be trained, and the likelihood as a function of that."""

    def __init__(self):
        closure, self.encoder = small(2, 2), small(2, 2)
        schedule = perturbed(schedules.LearnedLogSNR(-2.0, 2.0, features=3).double())
        self.model = NDM(
            Conditioned(lambda z: closure(z)), (2,), transform=transforms.Neural(OfTime()), schedule=schedule, t_min=0.1
        )
        self.x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
        self.label = torch.randn(2, 2, dtype=torch.float64)
        self.groups = {
            "x": [self.x],
            "predictor": list(self.model.predictor.parameters()),
            "transform": list(self.model.transform.parameters()),
            "schedule": list(schedule.parameters()),
            "closure": list(closure.parameters()),
            "encoder": list(self.encoder.parameters()),
        }
        self.directions = {
            name: [torch.randn_like(p) / math.sqrt(sum(q.numel() for q in group)) for p in group]
            for name, group in self.groups.items()
        }

    def value(self, **options):
        code = self.encoder(self.label)
        return ndm_ct.loglik(self.model, self.x, code=code, rtol=1e-9, atol=1e-9, **options).sum()

    def gradient(self, **options):
        """Directional derivatives of each group by autograd."""
        tensors = [tensor for group in self.groups.values() for tensor in group]
        gradients = iter(torch.autograd.grad(self.value(**options), tensors))
        return {
            name: float(sum((next(gradients) * d).sum() for d in directions))
            for name, directions in self.directions.items()
        }

    @torch.no_grad()
    def difference(self, *names, h=0.02, **options):
        """The same for these groups at once, by seven-point differences."""
        pairs = [pair for name in names for pair in zip(self.groups[name], self.directions[name], strict=True)]
        kept, total = [tensor.clone() for tensor, _ in pairs], 0.0
        for k, weight in ((1, 45), (2, -9), (3, 1)):
            for sign in (1, -1):
                for (tensor, d), original in zip(pairs, kept, strict=True):
                    tensor.copy_(original + sign * k * h * d)
                total += sign * weight * float(self.value(**options))
        for (tensor, _), original in zip(pairs, kept, strict=True):
            tensor.copy_(original)
        return total / (60 * h)


def fix_nodes(everything, monkeypatch):
    """One sweep of two nodes that stay where they are, though a schedule moves the path under them."""
    estimator = Quadrature(nodes=2, probes=1, sweeps=1)
    path = Problem(everything.model, everything.x, (everything.model.t_min, 1.0), 1e-6, 1e-6, "ode", "raise", False, {})
    fixed = Sweeps.draw(path, estimator, torch.ones(2).long(), torch.Generator().manual_seed(1))
    monkeypatch.setattr(Sweeps, "draw", classmethod(lambda *arguments: fixed))
    return {"trace": estimator}


def test_gradients_through_steps_and_by_the_adjoint_are_finite_differences():
    """In float64, to 1e-6: x, predictor, transform, schedule, a network in a closure, one that makes the code."""
    everything = Everything()
    through, adjoint = (everything.gradient(differentiable=kind) for kind in (True, "adjoint"))
    assert min(abs(value) for value in through.values()) > 1e-3  # none could be missing from the sum
    assert sum(through.values()) == pytest.approx(everything.difference(*through), rel=1e-6)
    assert adjoint == pytest.approx(through, rel=1e-6)


def test_gradients_of_quadrature_are_finite_differences(monkeypatch):
    everything = Everything()
    options = fix_nodes(everything, monkeypatch)
    gradient = everything.gradient(differentiable=True, **options)
    assert min(abs(value) for value in gradient.values()) > 1e-3
    assert sum(gradient.values()) == pytest.approx(everything.difference(*gradient, **options), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["exact", "quadrature"])
def test_gradients_of_every_group_alone(trace, monkeypatch):
    everything = Everything()
    options = fix_nodes(everything, monkeypatch) if trace == "quadrature" else {}
    gradient = everything.gradient(differentiable=True, **options)
    for name, value in gradient.items():
        assert value == pytest.approx(everything.difference(name, **options), rel=1e-6, abs=1e-8)


def test_adjoint_knows_no_more_than_it_needs():
    """Networks without a gradient get none; without any, the value is still right."""
    model = network_model(event_shape=(3,)).requires_grad_(False)
    x = torch.randn(2, 3, dtype=torch.float64)
    options = {"rtol": 1e-8, "atol": 1e-8, "differentiable": "adjoint"}
    value = ndm_ct.loglik(model, x, **options)
    assert not value.requires_grad
    torch.testing.assert_close(value, ndm_ct.loglik(model, x, rtol=1e-8, atol=1e-8), rtol=0.0, atol=1e-6)
    model.predictor.last.bias.requires_grad_(True)
    (gradient,) = torch.autograd.grad(ndm_ct.loglik(model, x, **options).sum(), model.predictor.last.bias)
    through = ndm_ct.loglik(model, x, **(options | {"differentiable": True})).sum()
    torch.testing.assert_close(gradient, *torch.autograd.grad(through, model.predictor.last.bias), rtol=1e-5, atol=1e-8)


class Allocations(TorchDispatchMode):
    """Sees every storage made while it is on; afterwards, those still alive are what the graph keeps."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self):
        """Bytes."""
        gc.collect()
        return sum(size for reference, size in self.storages.values() if not reference.expired())


class Squash(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

    def forward(self, z, t):
        return torch.tanh(self.weight * z)


def kept_bytes(tolerance, differentiable):
    """Bytes the graph of one likelihood keeps for its backward pass, and the steps it took."""
    model = NDM(Squash(), (1,), schedule=schedules.LinearLogSNR(-3, 3))
    x = torch.randn(64, 1, dtype=torch.float64)
    with Allocations() as allocations:
        value, info = ndm_ct.loglik(
            model, x, method="adaptive_heun", rtol=tolerance, atol=tolerance, differentiable=differentiable,
            return_info=True,
        )  # fmt: skip
    accepted = info.accepted
    assert value.requires_grad
    del info
    return allocations.alive(), accepted


@pytest.mark.parametrize(
    ("tolerance", "least"), [(1e-4, 90), pytest.param(1e-6, 900, marks=pytest.mark.slow)], ids=["100", "1000"]
)
def test_memory_of_the_adjoint_does_not_grow_with_the_steps(tolerance, least):
    """10 against 100 or 1,000 steps; through the steps memory grows with them."""
    (few, short), (many, long) = (kept_bytes(tol, "adjoint") for tol in (2e-2, tolerance))
    assert short < 15
    assert long > least
    assert many == pytest.approx(few, rel=0.1)
    (few, short), (many, long) = (kept_bytes(tol, True) for tol in (2e-2, 1e-4))
    assert many / few == pytest.approx(long / short, rel=0.3)


def test_the_backward_solve_of_the_adjoint_is_in_eval_mode_too():
    """Long after the forward solve, and although the model trains with dropout."""
    model = NDM(Dropped(4), (4,), schedule=schedules.LinearLogSNR(-3, 3))
    x = torch.randn(2, 4, dtype=torch.float64)

    def gradient():
        model.zero_grad()
        ndm_ct.loglik(model, x, rtol=1e-4, atol=1e-4, differentiable="adjoint").sum().backward()
        return model.predictor.last.weight.grad.clone()

    expected = gradient() if model.eval() else None
    model.train()
    torch.testing.assert_close(gradient(), expected)
    assert all(module.training for module in model.modules())


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


# --- rows alone and together -----------------------------------------------------------------------------------------


class Mixed:
    """Rows of three kinds: a smooth field, a rough one where ``rate`` is large, NaN from t = 0.5 on where it is < 0."""

    def __call__(self, z, t, rate):
        rate = rate[:, None]
        return torch.where((rate < 0.0) & (t[:, None] > 0.5), torch.nan, 0.5 * torch.sin(rate * z).flip(1))


def mixed_batch(rows=64, stiff=7, failing=11):
    model = NDM(Mixed(), (3,), schedule=schedules.LinearLogSNR(-4, 4))
    x = torch.randn(rows, 3, dtype=torch.float64)
    rate = torch.ones(rows, dtype=torch.float64)
    rate[stiff], rate[failing] = 12.0, -0.5
    return model, x, rate


TRACES = {"exact": "exact", "quadrature": Quadrature(nodes=4, probes=2, sweeps=4), "hutchinson": Hutchinson(3)}
DRAWN = {"exact": 0, "quadrature": 4 * (4 // 2 + 1 + 3), "hutchinson": 3 * 3}
"""Random numbers that a row takes."""


def generator_for(row, trace):
    """The generator as it is when a batch comes to this row."""
    generator = torch.Generator().manual_seed(1)
    if trace == "hutchinson":
        torch.randint(0, 2, (row, DRAWN[trace]), generator=generator)
    else:
        torch.rand(row, DRAWN[trace], dtype=torch.float64, generator=generator)
    return generator


@pytest.mark.parametrize("trace", TRACES)
def test_a_row_in_a_batch_is_the_row_alone(trace):
    """64 rows, one of them rough, one failing: values, errors and costs of each are those it has alone."""
    rows = 64 if trace == "exact" else 16
    model, x, rate = mixed_batch(rows)
    options = {"trace": TRACES[trace], "rtol": 1e-4, "atol": 1e-4, "on_failure": "nan", "return_info": True}
    value, together = ndm_ct.loglik(model, x, rate=rate, generator=generator_for(0, trace), **options)
    assert together.failed.nonzero().flatten().tolist() == [11]
    assert value.isnan().nonzero().flatten().tolist() == [11]
    assert int(together.row_nfe[7]) > 2 * int(together.row_nfe.median())
    assert together.nfe == int(together.row_nfe.max())
    for row in range(rows):
        one = slice(row, row + 1)
        own, alone = ndm_ct.loglik(model, x[one], rate=rate[one], generator=generator_for(row, trace), **options)
        torch.testing.assert_close(own, value[one], rtol=0.0, atol=1e-6, equal_nan=True)
        for name in ("stderr", "ode_error", "truncation", "prior_mismatch", "logdet", "log_prior", "loglik", "z"):
            torch.testing.assert_close(
                getattr(alone, name), getattr(together, name)[one], rtol=1e-6, atol=1e-6, equal_nan=True
            )
        assert (alone.nfe, alone.vjps) == (int(together.row_nfe[row]), int(together.row_vjps[row]))
        assert bool(alone.failed) == (row == 11)


def test_rows_of_a_torchdiffeq_solve_depend_on_each_other():
    """With shared steps the easy rows change when a stiff one joins, and pay for it; with "ode" they do not."""
    model, x, rate = mixed_batch(failing=12)
    x, rate = x[:9], rate[:9]
    options = {"rtol": 1e-4, "atol": 1e-4, "return_info": True}
    easy = torch.arange(9) != 7
    changes, costs = {}, {}
    for method in ("ode", "dopri5"):
        value, info = ndm_ct.loglik(model, x, rate=rate, method=method, **options)
        alone, _ = ndm_ct.loglik(model, x[easy], rate=rate[easy], method=method, **options)
        changes[method], costs[method] = float((value[easy] - alone).abs().max()), info.row_nfe[0]
    assert changes["ode"] < 1e-10
    assert changes["dopri5"] > 1e-7
    assert int(costs["dopri5"]) > 2 * int(costs["ode"])


class Table:
    """Conditioning of every kind: one number per row, one vector per row, a table for all, a number, a word, None."""

    def __call__(self, z, t, label, shift, table, gain, mode, nothing):
        assert (table.shape, gain, mode, nothing) == ((4, 3), 0.5, "tanh", None)
        assert label.shape[0] == shift.shape[0] == z.shape[0]
        return gain * torch.tanh(z + table[label]).flip(1) + 0.1 * shift


@pytest.mark.parametrize("method", ["ode", "dopri5"])
@pytest.mark.parametrize("trace", TRACES)
def test_conditioning_goes_with_its_rows_and_what_is_shared_stays(trace, method):
    model = NDM(Table(), (3,), schedule=schedules.LinearLogSNR(-4, 4))
    x, label = torch.randn(6, 3, dtype=torch.float64), torch.tensor([3, 0, 2, 2, 1, 0])
    own = {"label": label, "shift": torch.randn(6, 3, dtype=torch.float64)}
    shared = {"table": 2.0 * torch.randn(4, 3, dtype=torch.float64), "gain": 0.5, "mode": "tanh", "nothing": None}
    options = {"trace": TRACES[trace], "rtol": 1e-8, "atol": 1e-8, "method": method} | shared
    if trace == "quadrature" and method != "ode":
        with pytest.raises(ValueError, match="use method='ode', or trace='hutchinson' or 'exact'"):
            ndm_ct.loglik(model, x, **own, **options)
        return
    value = ndm_ct.loglik(model, x, generator=generator_for(0, trace), **own, **options)
    for row in range(6):
        one = {key: tensor[row : row + 1] for key, tensor in own.items()}
        alone = ndm_ct.loglik(model, x[row : row + 1], generator=generator_for(row, trace), **one, **options)
        torch.testing.assert_close(alone, value[row : row + 1], rtol=0.0, atol=1e-5)
    swapped = {key: tensor.flip(0) for key, tensor in own.items()}
    assert float((ndm_ct.loglik(model, x, **swapped, **options) - value).abs().min()) > 1e-3


@pytest.mark.parametrize("name", ["LinearLogSNR", "Rectified"])
def test_a_hard_row_changes_nobody_elses_loglik(name, generator):
    model = mixture(SCHEDULES[name]())
    x = model.sample_data(16, generator=generator)
    hard = torch.full((1, 8), 8.0, dtype=torch.float64)
    alone, together = (ndm_ct.loglik(model, y, rtol=1e-5, atol=1e-5) for y in (x, torch.cat([x, hard])))
    assert float((together[:-1] - alone).abs().max()) < 1e-9


def far_is_nan(z, t):
    return torch.where(z.abs().amax(1, keepdim=True) > 50.0, torch.full_like(z, math.nan), 0.5 * z)


@pytest.mark.parametrize("method", ["ode", "dopri5"])
@pytest.mark.parametrize("trace", ["exact", "quadrature", "hutchinson"])
def test_a_failing_row_is_named(trace, method):
    if trace == "quadrature" and method != "ode":
        return
    model = NDM(far_is_nan, (2,), schedule=schedules.LinearLogSNR(-5, 5))
    x = torch.randn(5, 2, dtype=torch.float64)
    x[3] = 60.0
    with pytest.raises(SolverError, match=r"rows \[3\]") as caught:
        ndm_ct.loglik(model, x, trace=trace, method=method)
    assert caught.value.rows == (3,)
    assert caught.value.t == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(SolverError, match=r"rows \[0, 2\]"):
        ndm_ct.decode(model, x[[3, 0, 3]])


@pytest.mark.parametrize("trace", ["exact", "quadrature", "hutchinson"])
def test_a_failing_row_spoils_neither_the_others_gradients_nor_a_prior_that_checks(trace):
    """NaN reaches neither log_prob of a torch distribution nor, times zero, the gradients of network and prior."""
    net, scale = small(2, 2), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2).double(), scale), 1)
    model = NDM(lambda z, t: far_is_nan(z, t) + 0.3 * net(z), (2,), schedule=schedules.LinearLogSNR(-4, 4), prior=prior)
    x = torch.randn(4, 2, dtype=torch.float64)
    x[2] = 60.0
    parameters = [scale, *net.parameters()]

    def run(x):
        options = {"trace": trace, "on_failure": "nan", "differentiable": True, "rtol": 1e-4, "atol": 1e-4}
        value = ndm_ct.loglik(model, x, generator=torch.Generator().manual_seed(1), **options)
        return value, torch.autograd.grad(value[:2].sum(), parameters)

    (value, gradients), (alone, expected) = run(x), run(x[:2])
    assert value.isnan().tolist() == [False, False, True, False]
    torch.testing.assert_close(value[:2], alone)
    torch.testing.assert_close(gradients, expected)
    back, info = ndm_ct.decode(model, x, on_failure="nan", return_info=True)
    assert back.isnan().any(1).tolist() == info.failed.tolist() == [False, False, True, False]


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
    estimate, info = ndm_ct.loglik(double, x.double(), trace=Hutchinson(16), return_info=True)
    assert bool(((value - estimate).abs() < 5 * info.stderr + 1e-4).all())


class Convolution(nn.Module):
    """A small image network with group norm, as denoisers have it."""

    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, z, t, shift=None):
        h = self.inside(torch.cat([z, t[:, None, None, None].expand_as(z)], 1))
        out = 0.3 * z + 0.5 * self.outside(torch.tanh(self.norm(h)))
        return out if shift is None else out + shift[:, None, None, None]


class HalfPrecision(nn.Module):
    """The network inside under bfloat16 autocast, its output cast back."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z, t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(z, t).to(z.dtype)


def images(net, trace="quadrature", **cond):
    """log p of five 6 x 6 images, and what the budget says."""
    model = NDM(net, (1, 6, 6), schedule=schedules.LinearLogSNR(-5, 4))
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(1)
    return ndm_ct.loglik(model, x, trace=trace, generator=generator, return_info=True, **cond)


def has_compiler():
    return any(shutil.which(name) for name in ("cc", "gcc", "clang", "g++"))


@pytest.mark.filterwarnings("ignore")  # torch's own, of the compiler
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_gives_the_same_likelihood(backend):
    if backend == "inductor" and not has_compiler():
        pytest.skip("no C compiler")
    torch._dynamo.reset()
    net = Convolution()
    compiled = torch.compile(net, backend=backend)
    for trace in ("quadrature", "hutchinson"):
        torch.testing.assert_close(images(compiled, trace)[0], images(net, trace)[0], rtol=0.0, atol=2e-3)
    shift = torch.linspace(-1, 1, 5)
    torch.testing.assert_close(images(compiled, shift=shift)[0], images(net, shift=shift)[0], rtol=0.0, atol=2e-3)


def test_a_network_in_half_precision_inside_gives_nearly_the_same_likelihood():
    """Three digits of bfloat16 cost some tenths of a nat, which ode_error sees, and the solver does not give up."""
    net = Convolution()
    value, info = images(HalfPrecision(net))
    expected, _ = images(net)
    assert value.dtype == torch.float32
    assert 1e-4 < float((value - expected).abs().max()) < 0.5
    assert float(info.ode_error.max()) < 1.0
    assert info.nfe < 500


def test_a_network_in_channels_last_passes_where_there_is_no_vmap():
    """torch has no such layout under vmap; quadrature does without, and so do the others one product at a time."""
    net = Convolution()
    expected = {trace: images(net, trace)[0] for trace in ("quadrature", "hutchinson")}
    net = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(images(net)[0], expected["quadrature"], rtol=0.0, atol=2e-3)
    torch.testing.assert_close(images(net, Hutchinson(chunk=1))[0], expected["hutchinson"], rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "quadrature"])
def test_empty_batch_gives_an_empty_result(trace):
    model = network_model()
    x = torch.empty(0, 2, 1, 2, dtype=torch.float64)
    value, info = ndm_ct.loglik(model, x, trace=trace, return_info=True)
    assert value.shape == (0,)
    assert all(getattr(info, name).shape == (0,) for name in ("stderr", "ode_error", "truncation", "row_nfe", "failed"))
    assert info.nfe == info.vjps == 0
    assert ndm_ct.encode(model, x).shape == x.shape


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "quadrature"])
def test_scalar_events(trace):
    model = ndm_ct.reference.Gaussian(torch.tensor(0.3), torch.tensor([[0.5]]), schedule=schedules.LinearLogSNR(-8, 5))
    x = torch.randn(4, dtype=torch.float64)
    value, info = ndm_ct.loglik(model, x, trace=trace, return_info=True)
    assert bool(((value - model.log_prob(x)).abs() < 5 * info.stderr + 1e-3).all())


# --- the exact models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (2, 4), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_eigenbasis_of_exact_models_changes_nothing(make, shape, generator):
    """F = a(t) x is diagonal where the covariances are; hidden in a composition it takes the general path."""
    plain = make(schedules.LinearLogSNR(-6, 5), TRANSFORMS["moving scale"](), d=8).marginals
    models = [
        ndm_ct.reference.GaussianMixture(
            plain.log_weights.exp(), plain.means.reshape(-1, *shape), plain.covs, schedule=plain.schedule,
            transform=transform,
        )
        for transform in (plain.transform, transforms.Composed(transforms.Identity(), plain.transform))
    ]  # fmt: skip
    z = 2.0 * torch.randn(7, *shape, dtype=torch.float64, generator=generator)
    for t in (torch.tensor(0.0), torch.tensor(0.4), torch.linspace(0.0, 1.0, 7)):
        fast, general = (model.log_prob(z, t.double()) for model in models)
        torch.testing.assert_close(fast, general, rtol=1e-9, atol=1e-9)
        fast, general = (model.predict_x(z, t.double()) for model in models)
        torch.testing.assert_close(fast, general, rtol=1e-9, atol=1e-9)
        assert models[0].predict_x(z.float(), t.double()).dtype == torch.float32
    fast, general = (ndm_ct.loglik(model, z, rtol=1e-3, atol=1e-3) for model in models)
    torch.testing.assert_close(fast, general, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "t_min"), [(schedules.LinearLogSNR(-24.0, 5.0), None), (schedules.Rectified(), 1e-6)]
)
def test_the_error_includes_the_rounding_of_the_network(schedule, t_min):
    """Two narrow bumps at 10 and -10 in float32, solved far more accurately than it is rounded."""

    def mean(z, t):
        c = schedule(t.double())
        alpha, variance = (each[:, None].to(z.dtype) for each in (c.alpha, (0.5 * c.alpha) ** 2 + c.sigma**2))
        bump = 10.0 * torch.tanh(10.0 * alpha * z / variance)
        return bump + 0.25 * alpha / variance * (z - alpha * bump)

    model = ndm_ct.NDM(mean, (2,), schedule=schedule, t_min=t_min)
    x = torch.tensor([10.0, -10.0]) + 0.5 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    value, info = ndm_ct.loglik(model, x, rtol=1e-8, atol=1e-8, return_info=True)
    exact = ndm_ct.loglik(model, x.double(), rtol=1e-8, atol=1e-8)
    error = (value.double() - exact).square().mean().sqrt()
    assert 0.1 * error < info.ode_error.square().mean().sqrt() < 20.0 * error
    assert float(error) > 1e-6
    assert bool(((value.double() - exact).abs() < 10.0 * info.ode_error).all())
