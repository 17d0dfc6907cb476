"""Guidance: scores mix as the formula says, and where the guided density is known the library finds it."""

import copy
import math

import pytest
import torch
from oracles import TRANSFORMS, k

import ndm_ct
from ndm_ct import NDM, guided, schedules, transforms
from ndm_ct.guidance import nulled
from ndm_ct.nn import MLP, Preconditioned, UNet
from ndm_ct.reference import Gaussian, GaussianMixture

SCHEDULES = {
    "LinearLogSNR": lambda: schedules.LinearLogSNR(-6.0, 6.0),
    "VariancePreserving": schedules.VariancePreserving,
    "VarianceExploding": lambda: schedules.VarianceExploding(0.05, 10.0),
}


class Exact:
    """The exact predictor of several densities by label, and of one of its own for "no label" (-1)."""

    def __init__(self, whole, classes, prediction="x"):
        self.models, self.prediction, self.null = [whole, *classes], prediction, {"label": -1}

    def __call__(self, z, t, *, label):
        x = torch.stack([model.marginals.posterior_mean(z, t) for model in self.models])
        x = x[label.long() + 1, torch.arange(len(z))]
        if self.prediction == "x":
            return x
        if self.prediction == "moments":
            return self.models[0].transform.with_derivative(x, t)
        c = self.models[0].schedule(t)
        alpha, sigma = c.alpha[:, None], c.sigma[:, None]
        eps = (z - alpha * x) / sigma
        return eps if self.prediction == "eps" else alpha * eps - sigma * x

    def model(self, **options):
        first = self.models[0]
        options = {"schedule": first.schedule, "transform": first.transform, "t_min": first.t_min} | options
        return ndm_ct.NDM(self, first.event_shape, prediction=self.prediction, **options)


def mixtures(schedule=None, transform=None, classes=3, d=2):
    """Classes that are mixtures of two normals each, and the density of all of them."""
    generator = torch.Generator().manual_seed(3)
    means = 1.5 * torch.randn(classes, 2, d, dtype=torch.float64, generator=generator)
    factors = 0.5 * torch.randn(classes, 2, d, d, dtype=torch.float64, generator=generator)
    covs = factors @ factors.mT + 0.1 * torch.eye(d, dtype=torch.float64)
    share = torch.tensor([0.3, 0.7], dtype=torch.float64)
    priors = torch.arange(1.0, classes + 1.0, dtype=torch.float64)
    priors = priors / priors.sum()
    options = {"schedule": schedule, "transform": transform}
    whole = GaussianMixture(
        (priors[:, None] * share).reshape(-1), means.reshape(-1, d), covs.reshape(-1, d, d), **options
    )
    return whole, [GaussianMixture(share, means[i], covs[i], **options) for i in range(classes)]


def score(model, z, t):
    """The score by differentiating the density in closed form, which no predictor enters."""
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(z, t).sum(), z)
    return gradient


LABEL = torch.tensor([0, 2, 1, 1, 0, 2, 0])


# ------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("prediction", ["x", "eps", "v", "moments"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_guided_score_is_the_mixture_of_exact_scores(name, prediction, scale):
    whole, classes = mixtures(SCHEDULES[name]())
    z, t = 1.5 * torch.randn(7, 2, dtype=torch.float64), torch.linspace(0.15, 0.85, 7, dtype=torch.float64)
    free = score(whole, z, t)
    given = torch.stack([score(model, z, t) for model in classes])[LABEL, torch.arange(7)]
    assert (given - free).abs().max() > 0.1
    found = guided(Exact(whole, classes, prediction).model(), scale).score(z, t, label=LABEL)
    torch.testing.assert_close(found, free + scale * (given - free), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", ["x", "moments"])
def test_guided_score_and_velocity_under_a_moving_scale(prediction):
    """With F = k(t) x the velocity is known from the score: k'/k and alpha'/alpha are a drift linear in z."""
    schedule, scale = schedules.LinearLogSNR(-6.0, 6.0), 2.5
    whole, classes = mixtures(schedule, transforms.TimeScaling(k))
    z, t = torch.randn(7, 2, dtype=torch.float64), torch.linspace(0.15, 0.85, 7, dtype=torch.float64)
    free = score(whole, z, t)
    given = torch.stack([score(model, z, t) for model in classes])[LABEL, torch.arange(7)]
    mixed = free + scale * (given - free)
    model = guided(Exact(whole, classes, prediction).model(), scale)
    torch.testing.assert_close(model.score(z, t, label=LABEL), mixed, rtol=1e-8, atol=1e-8)
    c = schedule(t)
    rate = c.dalpha / c.alpha + 1.5 / k(t)
    drift = rate[:, None] * z + (rate * c.sigma**2 - c.sigma**2 * c.dlog_sigma)[:, None] * mixed
    torch.testing.assert_close(model.velocity(z, t, label=LABEL), drift, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 4.0])
def test_a_pair_is_guided_part_by_part(scale):
    """The two parts of "moments" mix with one weight each, and are not swapped."""

    def predictor(z, t, *, c):
        return 2.0 * z + c, 3.0 * z - 5.0 * c

    model = guided(ndm_ct.NDM(predictor, (2,), prediction="moments"), scale, null={"c": 0.25})
    z, c = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    F, dF = model.moments(z, torch.tensor(0.5, dtype=torch.float64), c=c)
    effective = 0.25 + scale * (c - 0.25)
    torch.testing.assert_close(F, 2.0 * z + effective)
    torch.testing.assert_close(dF, 3.0 * z - 5.0 * effective)


# ------------------------------------------------------------------------------------------------------- the density


def shifted(scale, schedule, transform=None):
    """Normals of one covariance: guided they are the normal at u + w (m - u), flow, bound and samples alike."""
    generator = torch.Generator().manual_seed(4)
    factor = torch.randn(2, 2, dtype=torch.float64, generator=generator)
    cov = 0.3 * factor @ factor.mT + 0.2 * torch.eye(2, dtype=torch.float64)
    free, means = torch.tensor([0.3, -0.2]).double(), torch.tensor([[1.0, 0.5], [-0.8, 0.9]]).double()
    options = {"schedule": schedule, "transform": transform}
    whole, classes = Gaussian(free, cov, **options), [Gaussian(mean, cov, **options) for mean in means]
    expected = [Gaussian(free + scale * (mean - free), cov, **options) for mean in means]
    return Exact(whole, classes), expected


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_density_of_normals_with_one_covariance(scale, transform):
    exact, expected = shifted(scale, schedules.LinearLogSNR(-5.0, 5.0), TRANSFORMS[transform]())
    x = torch.randn(4, 2, dtype=torch.float64)
    for label, normal in enumerate(expected):
        model = guided(exact.model(prior=normal.prior), scale)
        found = ndm_ct.loglik(model, x, label=torch.full((4,), label))
        torch.testing.assert_close(found, normal.log_prob(x), rtol=0.0, atol=5e-4)


def test_every_row_is_guided_by_its_own_label():
    """Rows leave the solver's batch at different times; each must keep its label. The guided flow carries x to
    alpha_1 m + (S_1/S_0)^(1/2) (x - alpha_0 m) with S = alpha^2 C + sigma^2 and the row's own guided mean m."""
    exact, expected = shifted(2.0, schedules.LinearLogSNR(-5.0, 5.0))
    model, label = guided(exact.model(), 2.0), torch.tensor([0, 0, 1, 1])
    x = torch.randn(4, 2, dtype=torch.float64) * torch.tensor([[1.0], [30.0]] * 2).double()
    spectrum, basis = torch.linalg.eigh(expected[0].marginals.covs[0])
    ends = model.schedule(torch.tensor([model.t_min, 1.0], dtype=torch.float64))
    (a0, a1), (s0, s1) = ends.alpha, ends.sigma
    ratio = ((a1**2 * spectrum + s1**2) / (a0**2 * spectrum + s0**2)).sqrt()
    truth = []
    for y in (label, 1 - label):
        mean = torch.stack([normal.marginals.means[0] for normal in expected])[y]
        end = a1 * mean @ basis + ratio * ((x - a0 * mean) @ basis)
        truth.append(torch.distributions.Normal(0.0, 1.0).log_prob(end).sum(1) + ratio.log().sum())
    assert (truth[0] - truth[1]).abs().min() > 0.1
    for options, margin in (({"trace": "exact"}, 1e-3), ({"stderr": 0.01}, 0.05), ({"method": "dopri5"}, 1e-3)):
        options = {"trace": "quadrature" if "stderr" in options else "exact"} | options
        found = ndm_ct.loglik(model, x, label=label, **options)
        torch.testing.assert_close(found, truth[0], rtol=1e-5, atol=margin)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.5, 1.0, 2.5])
def test_density_of_normals_of_two_widths_is_their_geometric_mean(scale):
    """The guided flow is z_1 = A z_0 with A^2 = (U_1/U_0)^(1-w) (V_1/V_0)^w, U and V the variances at the ends."""
    schedule = schedules.LinearLogSNR(-5.0, 5.0)
    u, v = 2.0, 0.6
    whole, narrow = (
        Gaussian(torch.zeros(1), torch.tensor([[std**2]], dtype=torch.float64), schedule=schedule) for std in (u, v)
    )
    model = guided(Exact(whole, [narrow]).model(), scale)
    ends = schedule(torch.tensor([model.t_min, 1.0], dtype=torch.float64))
    U, V = ends.alpha**2 * u**2 + ends.sigma**2, ends.alpha**2 * v**2 + ends.sigma**2
    A = ((U[1] / U[0]) ** (1.0 - scale) * (V[1] / V[0]) ** scale).sqrt()
    x = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64)[:, None]
    truth = torch.distributions.Normal(0.0, 1.0).log_prob(A * x)[:, 0] + A.log()
    found = ndm_ct.loglik(model, x, label=torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(found, truth, rtol=0.0, atol=5e-4)
    product = (1.0 - scale) / U[0] + scale / V[0]
    assert (float(product * A**-2) == pytest.approx(1.0, abs=0.02)) == (scale in (0.0, 1.0))


def test_bound_of_normals_with_one_covariance():
    exact, expected = shifted(3.0, schedules.LinearLogSNR(-5.0, 5.0))
    x, label = torch.randn(6, 2, dtype=torch.float64), torch.ones(6, dtype=torch.long)
    found, wanted = (
        ndm_ct.elbo(model, x, samples=4, generator=torch.Generator().manual_seed(1), **cond)
        for model, cond in (
            (guided(exact.model(prior=expected[1].prior), 3.0), {"label": label}),
            (expected[1], {}),
        )
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "options"), [("ode", {}), ("sde", {"steps": 8}), ("ddpm", {"steps": 8})])
def test_samples_of_normals_with_one_covariance(method, options):
    exact, expected = shifted(3.0, schedules.LinearLogSNR(-5.0, 5.0))
    found, wanted = (
        ndm_ct.sample(
            model, 6, method=method, generator=torch.Generator().manual_seed(1), dtype=torch.float64, **options, **cond
        )
        for model, cond in (
            (guided(exact.model(prior=expected[0].prior), 3.0), {"label": torch.zeros(6, dtype=torch.long)}),
            (expected[0], {}),
        )
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------- calls and weights


def awake(net, seed=0):
    """The network with every parameter away from its start, the zero layers too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) / math.sqrt(p[0].numel()))
    return net


def labelled(**options):
    options = {"schedule": schedules.LinearLogSNR(-6.0, 6.0)} | options
    return ndm_ct.NDM(Preconditioned(awake(MLP(2, width=16, depth=1, classes=3))), event_shape=(2,), **options)


def test_scale_one_and_zero_are_the_model_bit_by_bit():
    model, x, label, solve = labelled(), torch.randn(7, 2), LABEL, {"rtol": 1e-3, "atol": 1e-3}
    for scale, same in ((1.0, label), (0.0, torch.full_like(label, -1))):
        one = guided(model, scale)
        assert one.predictor.evaluations_per_call == 1
        assert torch.equal(ndm_ct.loglik(one, x, label=label, **solve), ndm_ct.loglik(model, x, label=same, **solve))
    t = torch.tensor(0.5, dtype=torch.float64)
    assert not torch.equal(model.predict_x(x, t, label=label), model.predict_x(x, t))


def test_nfe_pays_for_both_predictions():
    for guidance, nfe, steps in ((2.0, 9, 4), (1.0, 9, 9), (None, 9, 9)):
        _, info = ndm_ct.sample(labelled(), 7, method="ddim", nfe=nfe, guidance=guidance, label=LABEL, return_info=True)
        assert (info.accepted, info.nfe) == (steps, steps * (2 if guidance == 2.0 else 1))
    with pytest.raises(ValueError, match="nfe=1 is less than one step of DDIM, which takes 2 evaluations"):
        ndm_ct.sample(labelled(), 7, method="ddim", nfe=1, guidance=2.0, label=LABEL)


@pytest.mark.parametrize(("scale", "calls"), [(0.0, [5]), (1.0, [5]), (2.0, [10]), (-1.0, [10])])
def test_both_predictions_are_one_call(scale, calls):
    seen = []

    def predictor(z, t, *, label, shared, table):
        seen.append((len(z), len(t), label.tolist(), shared, table))
        return z + label[:, None]

    model = guided(ndm_ct.NDM(predictor, (2,)), scale, null={"label": -1})
    assert model.predictor.evaluations_per_call == calls[0] // 5
    z, label, table = torch.randn(5, 2), torch.arange(5), torch.ones(1, 3)
    t = torch.linspace(0.2, 0.8, 5, dtype=torch.float64)
    out = model.predict_x(z, t, label=label, shared=0.5, table=table)
    torch.testing.assert_close(out, z - 1.0 + scale * (label + 1.0)[:, None])
    ((rows, times, labels, shared, same),) = seen
    assert [rows] == [times] == calls
    assert labels == {5: label.tolist() if scale else [-1] * 5, 10: [*label.tolist(), *[-1] * 5]}[rows]
    assert shared == 0.5
    assert same is table


def test_further_conditioning_with_as_many_entries_as_rows_reaches_the_predictor_as_it_came():
    seen = []

    def predictor(z, t, *, label, weight, context):
        seen.append((len(z), label.tolist()))
        return z + weight[:, None] * label[:, None] + context.sum(0)

    model = guided(ndm_ct.NDM(predictor, (2,)), 3.0, null={"label": -1})
    z, label, weight, context = torch.randn(5, 2), torch.arange(5), torch.arange(5.0), torch.randn(5, 2)
    out = model.predict_x(z, torch.tensor(0.5), label=label, weight=weight, context=context)
    expected = z + weight[:, None] * (-1.0 + 3.0 * (label + 1.0))[:, None] + context.sum(0)
    torch.testing.assert_close(out, expected)
    assert seen == [(5, label.tolist()), (5, [-1] * 5)]


def test_everything_but_the_prediction_is_the_model_s():
    prior = Gaussian(torch.zeros(2), torch.eye(2)).prior
    model = labelled(
        transform=transforms.Neural(MLP(2, width=8)), schedule=schedules.LearnedLogSNR(-8.0, 6.0), volatility=0.7,
        prior=prior, t_min=0.02,
    ).eval()  # fmt: skip
    result = guided(model, 2.0)
    assert (result.transform, result.schedule, result.prior) == (model.transform, model.schedule, model.prior)
    assert (result.process.volatility, result.t_min, result.prediction) == (0.7, 0.02, "x")
    assert (result.event_shape, result.dtype, result.training) == ((2,), torch.float32, False)
    assert {id(p) for p in result.parameters()} == {id(p) for p in model.parameters()}
    z, t = torch.randn(3, 2), torch.tensor(0.5, dtype=torch.float64)
    before = result.predict_x(z, t, label=torch.arange(3))
    with torch.no_grad():
        model.predictor.net.output.bias.add_(1.0)
    assert not torch.equal(result.predict_x(z, t, label=torch.arange(3)), before)
    result.predict_x(z, t, label=torch.arange(3)).sum().backward()
    assert model.predictor.net.labels.vectors.weight.grad.any(1).all()
    plain = guided(labelled(), 2.0)
    assert not plain.has_custom_prior
    clone = copy.deepcopy(plain)
    torch.testing.assert_close(
        clone.predict_x(z, t, label=torch.arange(3)), plain.predict_x(z, t, label=torch.arange(3))
    )


@pytest.mark.parametrize(
    "make", [lambda: MLP((1, 2, 2), width=16, depth=1, classes=3), lambda: UNet(1, width=4, classes=3)]
)
def test_networks_by_every_trace(make):
    """Hutchinson and quadrature agree with the exact trace of the guided field within their standard errors."""
    net = Preconditioned(awake(make()))
    model = guided(ndm_ct.NDM(net, (1, 2, 2), schedule=schedules.LinearLogSNR(-4.0, 2.0)), 2.0)
    x, label, solve = torch.randn(3, 1, 2, 2), torch.tensor([0, 2, 1]), {"rtol": 1e-5, "atol": 1e-5}
    exact = ndm_ct.loglik(model, x, label=label, trace="exact", **solve)
    for trace in ("hutchinson", "quadrature"):
        found, info = ndm_ct.loglik(model, x, label=label, trace=trace, return_info=True, **solve)
        assert ((found - exact).abs() < 5.0 * info.stderr + 5e-3).all()
    assert not torch.allclose(exact, ndm_ct.loglik(model, x, label=label.flip(0), trace="exact", **solve), atol=1e-2)


def test_guiding_twice_multiplies_the_scales():
    model, z, t = labelled().double(), torch.randn(3, 2).double(), torch.tensor(0.4, dtype=torch.float64)
    twice = guided(guided(model, 2.0), 1.5)
    assert twice.predictor.evaluations_per_call == 4
    once = guided(model, 3.0).predict_x(z, t, label=torch.arange(3))
    torch.testing.assert_close(twice.predict_x(z, t, label=torch.arange(3)), once)


# ------------------------------------------------------------------------------------------------------- null values


@pytest.mark.parametrize("null", [0.5, 1, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 2.0, 3.0]]).double()])
def test_null_values_fill_the_conditioning(null):
    def predictor(z, t, *, c):
        assert c.dtype == torch.float32
        return z + c.sum(1, keepdim=True)

    model = guided(ndm_ct.NDM(predictor, (2,)), 3.0, null={"c": null})
    z, c, t = torch.randn(4, 2), torch.randn(4, 3), torch.tensor(0.5, dtype=torch.float64)
    free = torch.as_tensor(null, dtype=torch.float32).expand(4, 3).sum(1, keepdim=True)
    torch.testing.assert_close(model.predict_x(z, t, c=c), z + free + 3.0 * (c.sum(1, keepdim=True) - free))


@pytest.mark.parametrize(
    ("value", "null", "expected"),
    [
        (torch.tensor([7, 200], dtype=torch.uint8), -1, torch.tensor([-1, -1])),
        (torch.tensor([7, 200], dtype=torch.int32), -1, torch.tensor([-1, -1])),
        (torch.tensor([True, False]), False, torch.tensor([False, False])),
        (torch.tensor([True, False]), -1, torch.tensor([-1, -1])),
        (torch.tensor([1.5, 2.5]), -1, torch.tensor([-1.0, -1.0])),
        (torch.ones(2, 2, dtype=torch.float64), torch.tensor([3.0, 4.0]), torch.tensor([[3.0, 4.0]] * 2).double()),
        (torch.ones(0, 2), 0.0, torch.ones(0, 2)),
    ],
)
def test_null_values_survive_the_dtype(value, null, expected):
    found = nulled("c", value, null)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_labels_may_be_bytes():
    model, z, t = guided(labelled(), 2.0), torch.randn(7, 2), torch.tensor(0.4, dtype=torch.float64)
    assert torch.equal(model.predict_x(z, t, label=LABEL.byte()), model.predict_x(z, t, label=LABEL))


def test_given_null_values_replace_the_predictor_s_own():
    model, z, t = labelled(), torch.randn(3, 2), torch.tensor(0.4, dtype=torch.float64)
    label, other = torch.tensor([0, 1, 2]), torch.tensor([2, 2, 2])
    wanted = model.predict_x(z, t, label=other)
    wanted = wanted + 2.0 * (model.predict_x(z, t, label=label) - wanted)
    torch.testing.assert_close(guided(model, 2.0, null={"label": 2}).predict_x(z, t, label=label), wanted)


# ------------------------------------------------------------------------------------------------------------- errors


class Anything(torch.nn.Module):
    """Takes every keyword, and has an attribute null of another meaning."""

    def __init__(self):
        super().__init__()
        self.null = torch.nn.Parameter(torch.zeros(2))

    def forward(self, z, t, **cond):
        return z + self.null


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: guided(lambda z, t: z, 2.0), TypeError, "model must be an ndm_ct.NDM, got function"),
        (lambda: guided(labelled(), True), TypeError, "scale must be a number, got bool"),
        (lambda: guided(labelled(), "2"), TypeError, "scale must be a number, got str"),
        (lambda: guided(labelled(), math.nan), ValueError, "scale must be finite, got nan"),
        (lambda: guided(ndm_ct.NDM(MLP(2), (2,)), 2.0), ValueError, "without a conditional model.*classes=K"),
        (lambda: guided(ndm_ct.NDM(Preconditioned(MLP(2)), (2,)), 2.0), ValueError, "without a conditional model"),
        (lambda: guided(ndm_ct.NDM(lambda z, t: z, (2,)), 2.0), ValueError, "pass null="),
        (lambda: guided(ndm_ct.NDM(Anything(), (2,)), 2.0), ValueError, "without a conditional model"),
        (lambda: guided(labelled(), 2.0, null={}), ValueError, "without a conditional model"),
        (lambda: guided(labelled(), 2.0, null={"labels": -1}), ValueError, "'labels'.*did you mean 'label'"),
        (lambda: guided(labelled(), 2.0, null={"text": 0.0}), ValueError, "'text', which the predictor does not take"),
        (
            lambda: guided(labelled(transform=transforms.Neural(MLP(2, width=8, classes=3))), 2.0),
            ValueError,
            "transform takes 'label' too",
        ),
    ],
)
def test_what_cannot_be_guided_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_any_keyword_can_guide_a_predictor_that_takes_any():
    model = guided(ndm_ct.NDM(Anything(), (2,)), 2.0, null={"text": 0.0})
    assert model.predict_x(torch.zeros(3, 2), torch.tensor(0.5).double(), text=torch.ones(3, 5)).shape == (3, 2)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    ("cond", "error", "words"),
    [
        ({}, ValueError, "needs the conditioning 'label', and got none; pass label="),
        ({"label": None}, ValueError, "needs the conditioning 'label', and got none"),
        ({"label": 1}, ValueError, "is a int, expected a tensor with one entry for each of the 3 rows"),
        ({"label": torch.tensor(1)}, ValueError, r"is shape \(\), expected"),
        ({"label": torch.zeros(2, dtype=torch.long)}, ValueError, r"is shape \(2,\), expected"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, TypeError, "did you mean 'label'"),
    ],
)
def test_conditioning_that_cannot_guide_is_named(scale, cond, error, words):
    model, x = guided(labelled(), scale), torch.randn(3, 2)
    for use in (lambda: ndm_ct.loglik(model, x, **cond), lambda: ndm_ct.elbo(model, x, **cond)):
        with pytest.raises(error, match=words):
            use()


def test_null_values_that_do_not_fit_are_named():
    model, x = labelled(), torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"null\['label'\] has dtype torch.float32.*torch.int64"):
        ndm_ct.loglik(guided(model, 2.0, null={"label": -1.0}), x, label=torch.arange(3))
    with pytest.raises(ValueError, match=r"null\['label'\] has shape \(2,\), which does not broadcast.*\(3,\)"):
        ndm_ct.loglik(guided(model, 2.0, null={"label": torch.tensor([-1, -1])}), x, label=torch.arange(3))


@pytest.mark.parametrize("returned", [lambda z: z[:3], lambda z: z.sum(), lambda z: "no tensor", lambda z: z[:, :1]])
def test_a_predictor_that_does_not_answer_every_row_is_refused(returned):
    model = guided(ndm_ct.NDM(lambda z, t, *, c: returned(z), (2,)), 2.0, null={"c": 0.0})
    with pytest.raises(ndm_ct.PredictorError, match="the predictor returned"):
        model.predict_x(torch.randn(3, 2), torch.tensor(0.5).double(), c=torch.ones(3))


# ----------------------------------------------------------------------------------------------------------- training


def test_dropped_labels_teach_the_marginal():
    """Two classes of unequal share and width in one dimension: with its label the network predicts the posterior mean
    within the class, without it that of the whole mixture."""
    schedule, share = schedules.LinearLogSNR(-3.0, 1.0), torch.tensor([0.7, 0.3], dtype=torch.float64)
    means, stds = torch.tensor([[-0.5], [1.5]]).double(), torch.tensor([0.5, 0.3]).double()
    covs = stds[:, None, None] ** 2
    whole = GaussianMixture(share, means, covs, schedule=schedule)
    classes = [Gaussian(mean, cov, schedule=schedule) for mean, cov in zip(means, covs, strict=True)]
    label = (torch.rand(8192, generator=torch.Generator().manual_seed(1)) < share[1]).long()
    data = means[label] + stds[label, None] * torch.randn(8192, 1).double()
    model = ndm_ct.NDM(Preconditioned(MLP(1, width=32, depth=1, classes=2)), event_shape=(1,), schedule=schedule)
    ndm_ct.fit(
        model, data.float(), steps=400, batch_size=256, lr=1e-2, ema=0.98, cond={"label": label}, cond_dropout=0.3,
        progress=False,
    )  # fmt: skip
    model.eval()
    for time in (0.3, 0.7, 1.0):
        t = torch.tensor(time, dtype=torch.float64)
        c = schedule(t)
        z = c.alpha * data + c.sigma * torch.randn_like(data)
        truth = torch.stack([each.marginals.posterior_mean(z, t.expand(8192)) for each in (whole, *classes)])
        for y in (-1, 0, 1):
            rows = torch.ones(8192, dtype=torch.bool) if y < 0 else label == y
            asked = torch.full((int(rows.sum()),), y)
            found = model.predict_x(z[rows].float(), t, label=asked).detach().double()
            # E[E[x | z]] = E[x]: of the class, or of all
            assert found.mean().item() == pytest.approx(data[rows].mean().item(), abs=0.1)
            errors = [(found - each[rows]).square().mean().sqrt().item() for each in truth]
            error = errors.pop(y + 1)
            assert error < 0.15
            assert time < 1.0 or error < 0.4 * min(errors)


class TestAnyNull:
    """Null values of another kind or shape than what they stand for."""

    @staticmethod
    def mixed(net, null, **cond):
        """The guided prediction, and the mixture of both by hand."""
        model = NDM(net, (2,), schedule=schedules.LinearLogSNR(), checks=False)
        z, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.4, dtype=torch.float64)
        found = ndm_ct.guided(model, 2.5, null=null).predict_x(z, t, **cond)
        alone = ndm_ct.guided(model, 0.0, null=null).predict_x(z, t, **cond)
        return z, found, model.predict_x(z, t, **cond), alone

    @staticmethod
    def texts(z, t, text=None):
        return 0.3 * z if text is None else z * (1.0 + text.mean((1, 2)) + text.shape[1])[:, None]

    @pytest.mark.parametrize("null", [None, torch.ones(7, 4), torch.ones(1, 7, 4), torch.ones(3, 7, 4)])
    def test_a_prompt_of_another_length_or_none(self, null):
        z, found, conditional, alone = self.mixed(self.texts, {"text": null}, text=torch.zeros(3, 5, 4))
        expected = 0.3 * z if null is None else 9.0 * z
        torch.testing.assert_close(alone, expected)
        torch.testing.assert_close(conditional, 6.0 * z)
        torch.testing.assert_close(found, expected + 2.5 * (6.0 * z - expected))

    def test_dicts_and_lists(self):
        def net(z, t, cond):
            return z * (cond["a"] + cond["b"][0])[:, None]

        cond = {"a": torch.full((3,), 2.0), "b": [torch.full((3,), 4.0)]}
        for null, free in ((1.0, 2.0), ({"a": 0.0, "b": [torch.tensor(0.5)]}, 0.5)):
            z, found, _, alone = self.mixed(net, {"cond": null}, cond=cond)
            torch.testing.assert_close(alone, free * z)
            torch.testing.assert_close(found, free * z + 2.5 * (6.0 - free) * z)

    def test_words(self):
        def net(z, t, style):
            return z * len(style)

        z, found, _, _ = self.mixed(net, {"style": ""}, style="blue")
        torch.testing.assert_close(found, 2.5 * 4.0 * z)

    def test_a_sample(self):
        model = NDM(self.texts, (2,), checks=False)
        guided = ndm_ct.guided(model, 2.0, null={"text": torch.zeros(7, 4)})
        assert ndm_ct.sample(guided, 3, method="ddim", steps=2, text=torch.zeros(3, 5, 4)).shape == (3, 2)
