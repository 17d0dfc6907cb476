"""Bad input: each has its own error, which says what came, what was expected and the cure."""

import functools
import math

import pytest
import torch
from torch import nn

import ndm_ct
from ndm_ct import NDM, PredictorError, schedules, transforms
from ndm_ct.divergence import Hutchinson, Quadrature

SHORT = schedules.LinearLogSNR(-5, 5)


def model(predictor=lambda z, t: 0.5 * z, **kwargs):
    return NDM(predictor, (2,), schedule=SHORT, **kwargs)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, z, t, label=None):
        return self.net(z)


FUNCTIONS = {
    "loglik": ndm_ct.loglik,
    "encode": ndm_ct.encode,
    "decode": ndm_ct.decode,
    "elbo": ndm_ct.elbo,
    "loss": ndm_ct.loss,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 4), ValueError, r"shape \(3, 4\), expected \(B, 2\)"),
        (torch.zeros(2), ValueError, "add a batch dimension"),
        (torch.zeros(3, 2, dtype=torch.long), TypeError, "a density needs real data"),
        (torch.zeros(3, 2, dtype=torch.bool), TypeError, "has dtype torch.bool"),
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0], [0.0, math.inf]]), ValueError, r"NaN or inf in rows \[1, 2\]"),
        (torch.zeros(3, 2, dtype=torch.float64), ValueError, "dtype torch.float64, the model torch.float32"),
        (torch.zeros(3, 2, device="meta"), ValueError, "is on device meta, the model on cpu"),
        ([[0.0, 0.0]], TypeError, "must be a torch.Tensor, got list"),
    ],
)
def test_unusable_data(function, x, error, message):
    with pytest.raises(error, match=message):
        function(model(Linear()), x)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    ("predictor", "prediction", "message"),
    [
        (lambda z, t: z[:, :1], "x", r"returned shape \(3, 1\), expected \(3, 2\)"),
        (lambda z, t: z.to(torch.float16), "x", "returned dtype torch.float16 for z of torch.float32"),
        (lambda z, t: None, "x", "returned NoneType, expected a tensor"),
        (lambda z, t: z, "moments", "needs a pair"),
        (lambda z, t: (z, z, z), "moments", "got 3 values"),
        (lambda z, t: (z, z[:1]), "moments", r"returned shape \(1, 2\)"),
    ],
)
def test_predictor_that_returns_no_prediction(function, predictor, prediction, message):
    with pytest.raises(PredictorError, match=message):
        function(model(predictor, prediction=prediction), torch.zeros(3, 2))


def test_nan_from_the_predictor_names_time_and_rows():
    def predictor(z, t, bad=(False, True, False)):
        where = (t > 0.5) & torch.as_tensor(bad)
        return torch.where(where[:, None], math.nan, 0.5 * z)

    broken, x = model(predictor), torch.zeros(3, 2)
    for method, time in ((None, r"0\.(49|5)"), ("dopri5", r"0\.[5-9]")):  # where it stood, and where it met the NaN
        with pytest.raises(ndm_ct.SolverError, match=f"at t={time}.* rows \\[1\\]"):
            ndm_ct.loglik(broken, x, method=method, bad=torch.tensor([False, True, False]))
    broken.checks = False  # which name a network of three rows
    with pytest.raises(PredictorError, match=r"NaN or inf at t=.* rows \[1\]"):
        ndm_ct.sample(broken, 3, method="ddim", steps=4)
    with pytest.raises(PredictorError, match=r"NaN or inf at t=.* rows \[1\]"):
        [ndm_ct.loss(broken, x, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("name", ["velocity", "score"])
def test_times_outside_the_interval(t, name):
    with pytest.raises(ValueError, match=r"t must lie in \[t_min, 1\] = \[0, 1\]"):
        getattr(model(), name)(torch.zeros(3, 2), t)
    late = model(t_min=0.2)
    with pytest.raises(ValueError, match=r"\[0.2, 1\]"):
        getattr(late, name)(torch.zeros(3, 2), 0.1)
    with pytest.raises(ValueError, match=r"t has shape \(2,\), expected \(\) or \(3,\)"):
        getattr(late, name)(torch.zeros(3, 2), torch.tensor([0.5, 0.6]))


def test_reference_density_checks_its_time():
    reference = ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="t must lie in"):
        reference.log_prob(torch.zeros(1, 2), 1.5)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: NDM(lambda z, t: z, (2,), schedule=schedules.Rectified(), t_min=0.0), ValueError, "has sigma = 0"),
        (lambda: NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2)), (2,), prediction="v"), ValueError, "is built for"),
        (lambda: NDM(ndm_ct.nn.MLP(2), (3,)), ValueError, r"event_shape=\(3,\) has 3 numbers, .* MLP .*\(2,\)"),
        (lambda: NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.UNet(1, width=4)), (3, 4, 4)), ValueError, "does not fit UNet"),
        (lambda: NDM(ndm_ct.nn.UNet(1, width=4), (3, 4, 5)), ValueError, "make the two agree"),
        (lambda: NDM(ndm_ct.nn.UNet(1, width=4), (16,)), ValueError, "does not fit UNet"),
        (lambda: model(t_min=1.0), ValueError, r"t_min must lie in \[0, 1\)"),
        (lambda: model(prediction="epsilon"), ValueError, "prediction='epsilon' is unknown"),
        (lambda: model(prediction="momens"), ValueError, "did you mean 'moments'"),
        (lambda: model(prediction="eps", transform=transforms.TimeScaling(lambda t: 1 + t)), ValueError, "F is the"),
        (lambda: NDM(lambda z, t: z, (2,), schedule=schedules.Cosine(), prediction="eps"), ValueError, "alpha.1. = 0"),
        (lambda: model(volatility=-1.0), ValueError, "volatility must be a float >= 0"),
        (lambda: NDM(3, (2,)), TypeError, "predictor must be callable"),
        (lambda: NDM(functools.partial(Linear()), (2,)), TypeError, "hides an nn.Module"),
        (lambda: NDM(Linear().forward, (2,)), TypeError, "hides an nn.Module"),
        (lambda: ndm_ct.adapters.from_velocity(Linear().forward, (2,)), TypeError, "net hides an nn.Module"),
        (lambda: ndm_ct.nn.FromDenoiser(functools.partial(Linear())), TypeError, "net hides an nn.Module"),
        (lambda: model(volatility=torch.ones(())), TypeError, "volatility must be a float or a callable"),
        (lambda: NDM(lambda z, t: z, (2,), schedule="cosine"), TypeError, "schedule must be a Schedule"),
        (lambda: NDM(lambda z, t: z, (2,), transform=lambda x, t: x), TypeError, "transform must be a Transform"),
        (lambda: NDM(lambda z, t: z, (0, 2)), ValueError, "event_shape must have positive sizes"),
        (lambda: Hutchinson(0), ValueError, "probes must be at least 1, got 0"),
        (lambda: Hutchinson(2.0), TypeError, "probes must be an int"),
        (lambda: ndm_ct.reference.Gaussian(torch.zeros(2), -torch.eye(2)), ValueError, "positive definite"),
        (lambda: ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(3)), ValueError, "do not fit"),
        (lambda: ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2), transform=transforms.Neural(lambda x, t: x)),
         ValueError, "linear in x"),
        (lambda: ndm_ct.reference.GaussianMixture(torch.tensor([0.5, 0.6]), torch.zeros(2, 1), torch.ones(2, 1, 1)),
         ValueError, "sum to 1"),
    ],
)  # fmt: skip
def test_impossible_models(build, error, message):
    with pytest.raises(error, match=message):
        build()


class Hidden(nn.Module):
    """A network the divergence cannot see through, in one of three ways."""

    def __init__(self, how):
        super().__init__()
        self.net, self.how = nn.Linear(2, 2), how

    def forward(self, z, t):
        if self.how == "detach":
            return self.net(z.detach())
        if self.how == "numpy":
            return torch.as_tensor(z.detach().numpy()) * 0.5
        with torch.no_grad():
            return self.net(z)


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "quadrature"])
@pytest.mark.parametrize("how", ["detach", "numpy", "no_grad"])
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_predictor_autograd_cannot_see_through_is_refused(how, trace):
    """Its divergence would be zero, and the density wrong without a sign of it."""
    if how == "numpy":
        with pytest.raises((PredictorError, RuntimeError)):
            ndm_ct.loglik(model(Hidden(how)), torch.zeros(3, 2), trace=trace)
        return
    with pytest.raises(PredictorError, match="autograd sees no dependence"):
        ndm_ct.loglik(model(Hidden(how)), torch.zeros(3, 2), trace=trace)


@pytest.mark.parametrize("trace", ["exact", "quadrature"])
def test_a_constant_predictor_is_not_mistaken_for_one(trace):
    """x-hat = 0: the flow only rescales, and the density is that of N(0, sigma_0^2) under the exact prior's match."""
    x = 0.05 * torch.randn(3, 2, dtype=torch.float64)
    constant = NDM(lambda z, t: torch.zeros_like(z), (2,), schedule=SHORT)
    at = SHORT(torch.tensor([0.0, 1.0], dtype=torch.float64))
    ratio = at.sigma[1] / at.sigma[0]
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x * ratio).sum(1) + 2 * ratio.log()
    torch.testing.assert_close(ndm_ct.loglik(constant, x, trace=trace), expected, rtol=0.0, atol=2e-4)


def test_a_predictor_that_writes_into_its_argument_changes_nobody_elses_data():
    def in_place(z, t):
        z *= 0.5
        return z

    z = torch.randn(3, 2, dtype=torch.float64)
    kept = z.clone()
    torch.testing.assert_close(model(in_place).velocity(z, 0.5), model().velocity(z, 0.5))
    assert torch.equal(z, kept)
    torch.testing.assert_close(ndm_ct.loglik(model(in_place), z), ndm_ct.loglik(model(), z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_half_precision_data_are_refused(function, dtype):
    with pytest.raises(TypeError, match="whose digits do not carry a density"):
        function(model(), torch.zeros(3, 2, dtype=dtype))


def test_a_prior_must_give_one_number_per_row():
    prior = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    for function in (ndm_ct.loglik, ndm_ct.elbo, ndm_ct.loss):
        with pytest.raises(ValueError, match=r"returned shape \(3, 2\) for 3 events.*Independent"):
            function(model(prior=prior), torch.zeros(3, 2))
    independent = model(prior=torch.distributions.Independent(prior, 1))
    x = torch.randn(3, 2)
    torch.testing.assert_close(ndm_ct.loglik(independent, x), ndm_ct.loglik(model(), x))


def test_a_module_prior_keeps_its_precision_and_its_single_entry_in_the_state():
    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def log_prob(self, z):
            assert z.dtype == torch.float32
            return torch.distributions.Normal(0.0, self.scale).log_prob(z).sum(1)

    with_prior, x = model(prior=Prior()), torch.randn(3, 2)
    torch.testing.assert_close(ndm_ct.loglik(with_prior, x), ndm_ct.loglik(model(), x), rtol=0.0, atol=1e-4)
    assert [name for name in with_prior.state_dict() if "scale" in name] == ["prior.scale"]


def test_volatilities_over_trailing_axes_mean_the_same_as_full_ones():
    x, eta = torch.randn(3, 3, 2, 2, dtype=torch.float64), 0.5 + torch.rand(2, 2, dtype=torch.float64)

    def loss(rate):
        blurred = NDM(
            lambda z, t: 0.4 * z, (3, 2, 2), transform=transforms.Blur((3, 2, 2), blur=1.0), schedule=SHORT,
            volatility=rate,
        )  # fmt: skip
        return ndm_ct.loss(blurred, x, generator=torch.Generator().manual_seed(1))

    full = loss(lambda t: eta.expand(len(t), 3, 2, 2))
    torch.testing.assert_close(loss(lambda t: eta.expand(len(t), 2, 2)), full)
    torch.testing.assert_close(loss(lambda t: eta.expand(len(t), 1, 2, 2)), full)
    per_row = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    with pytest.raises(ValueError, match="return one value per time"):
        loss(lambda t: per_row)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (lambda t: 0.0 * t, "zero at some t"),
        (lambda t: t - 0.9, "finite and not negative"),
        (lambda t: t * math.nan, "finite and not negative"),
    ],
)
def test_volatilities_out_of_range(rate, message):
    with pytest.raises(ValueError, match=message):
        ndm_ct.loss(model(volatility=rate), torch.zeros(64, 2))


def test_bounds_of_levels_need_bin_centres():
    bins = ndm_ct.quantisation.Quantisation(8)
    x = bins.centres(torch.tensor([[0, 7], [3, 4]]), torch.float32)
    assert ndm_ct.elbo(model(), x, quantisation=bins).shape == (2,)
    for wrong in (x + 0.05, 2.0 * x):
        with pytest.raises(ValueError, match="is not at the bin centres of 8 levels"):
            ndm_ct.elbo(model(), wrong, quantisation=bins)


def test_copies_of_exact_models_are_whole():
    import copy

    exact = ndm_ct.reference.Gaussian(
        torch.zeros(2), 0.2 * torch.eye(2), schedule=schedules.LearnedLogSNR(-5, 5).double()
    )
    other = copy.deepcopy(exact)
    with torch.no_grad():
        other.schedule.weight[0] += 3.0
    x = torch.randn(3, 2, dtype=torch.float64)
    torch.testing.assert_close(ndm_ct.loglik(other, x), other.log_prob(x), rtol=0.0, atol=1e-3)
    assert float((other.log_prob(x, 0.3) - exact.log_prob(x, 0.3)).detach().abs().max()) > 1e-3


def test_no_graph_under_inference_mode_is_said():
    with torch.inference_mode():
        assert ndm_ct.loglik(model(), torch.zeros(1, 2)).shape == (1,)
        with pytest.raises(RuntimeError, match="leave that mode"):
            ndm_ct.loglik(model(), torch.zeros(1, 2), differentiable=True)


X = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ndm_ct.loglik(model(), X, trace="hutchison"), ValueError, "did you mean 'hutchinson'"),
        (lambda: ndm_ct.loglik(model(), X, trace=16), TypeError, "trace must be"),
        (lambda: ndm_ct.loglik(model(), X, method="dopri"), ValueError, "did you mean 'dopri"),
        (lambda: ndm_ct.loglik(model(), X, method="heun"), ValueError, "is unknown"),
        (lambda: ndm_ct.loglik(model(), X, rtol=-1e-3), ValueError, "rtol must be positive"),
        (lambda: ndm_ct.loglik(model(), X, atoll=1e-3), TypeError, "did you mean 'atol'"),
        (lambda: ndm_ct.loglik(model(), X, label=X), TypeError, "got the keyword 'label'"),
        (lambda: ndm_ct.loglik(model(Linear()), X, labell=X), TypeError, "did you mean 'label'"),
        (lambda: ndm_ct.loglik(model(lambda z, t, **kw: z), X, retol=1), TypeError, "did you mean 'rtol'"),
        (lambda: ndm_ct.loglik(model(lambda z, t, **kw: z), X, probes=4), TypeError, "has no option 'probes'"),
        (lambda: ndm_ct.loglik(model(), X, rtol=math.inf), ValueError, "rtol must be positive and finite"),
        (lambda: ndm_ct.encode(model(), X, trace="exact"), ValueError, "trace has no effect"),
        (lambda: ndm_ct.decode(model(), X, stderr=0.1), ValueError, "stderr has no effect without a log-determinant"),
        (
            lambda: ndm_ct.loglik(model(), X, trace="quadrature", method="dopri5"),
            ValueError,
            "use method='ode', or trace='hutchinson' or 'exact'",
        ),
        (lambda: ndm_ct.loglik(model(), X, on_failure="nan", method="dopri5"), ValueError, "use method='ode'"),
        (lambda: ndm_ct.loglik(model(), X, on_failure="NaN"), ValueError, "on_failure='NaN' is unknown"),
        (
            lambda: ndm_ct.loglik(model(), X, differentiable="adjoint", method="ode"),
            ValueError,
            "needs a torchdiffeq method; pass method='dopri5'",
        ),
        (
            lambda: ndm_ct.loglik(model(), X, differentiable="adjoint", trace="quadrature"),
            ValueError,
            "trace='hutchinson' or 'exact'",
        ),
        (lambda: ndm_ct.encode(model(), X, differentiable="adjont"), ValueError, "did you mean 'adjoint'"),
        (lambda: Quadrature(nodes=3), ValueError, "nodes must be even"),
        (lambda: Quadrature(sweeps=0), ValueError, "sweeps must be at least 1"),
        (lambda: Quadrature(probes=1.0), TypeError, "probes must be an int"),
        (lambda: ndm_ct.sample(model(), 2, trace="exact"), ValueError, "trace has no effect without return_info"),
        (
            lambda: ndm_ct.sample(model(), 2, method="heun", steps=2, trace="quadrature", return_info=True),
            ValueError,
            "trace of a method on a grid must be 'exact'",
        ),
        (lambda: ndm_ct.sample(model(), 2, rtol=0.0), ValueError, "rtol must be positive"),
        (
            lambda: ndm_ct.loglik(model(lambda z, t, **kw: z), X, on_failur="nan"),
            TypeError,
            "did you mean 'on_failure'",
        ),
        (lambda: ndm_ct.decode(model(), X, generator=torch.Generator()), ValueError, "generator has no effect"),
        (lambda: ndm_ct.sample(model(), 2, method="dd", steps=5), ValueError, "did you mean 'dd"),
        (lambda: ndm_ct.sample(model(), 2, method="heun", steps=0), ValueError, "steps must be at least 1"),
        (lambda: ndm_ct.sample(model(), 2, method="heun", steps=2.5), TypeError, "steps must be an int"),
        (lambda: ndm_ct.sample(model(), 2, method="ddpm"), ValueError, "pass steps="),
        (lambda: ndm_ct.sample(model(), 2, method="dopri5", steps=10), ValueError, "steps has no effect"),
        (lambda: ndm_ct.sample(model(), 2, method="ddim", steps=5, rtol=1e-3), ValueError, "rtol has no effect"),
        (lambda: ndm_ct.sample(model(), -1), ValueError, "n must be a non-negative int"),
        (lambda: ndm_ct.sample(model(), 2, step=10), TypeError, "did you mean 'steps'"),
        (lambda: ndm_ct.elbo(model(), X, samples=0), ValueError, "samples must be at least 1"),
        (lambda: ndm_ct.elbo(model(volatility=0.0), X), ValueError, "minus infinity"),
        (lambda: ndm_ct.loss(model(volatility=0.0), X), ValueError, "minus infinity"),
        (lambda: ndm_ct.objectives.elbo_discrete(model(), X, steps=0), ValueError, "steps must be at least 1"),
        (lambda: model(lambda z, t: (z, z), prediction="moments").predict_x(X, torch.tensor(0.5)), ValueError, "not x"),
    ],
)
def test_bad_options(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_predictor_that_takes_anything_gets_it():
    def predictor(z, t, **cond):
        return 0.1 * z + cond["colour"][:, None]

    assert ndm_ct.loglik(model(predictor), X, colour=torch.ones(2)).shape == (2,)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_empty_batches_work(function):
    result = function(model(Linear()), torch.empty(0, 2))
    assert result.shape[0] == 0
