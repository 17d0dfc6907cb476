"""Bad input: each has its own error, which says what came, what was expected and the cure."""

import math

import pytest
import torch
from torch import nn

import ndm_ct
from ndm_ct import NDM, PredictorError, schedules, transforms
from ndm_ct.divergence import Hutchinson

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
    def predictor(z, t):
        bad = (t > 0.5) & (torch.arange(len(z)) == 1)
        return torch.where(bad[:, None], math.nan, 0.5 * z)

    broken, x = model(predictor), torch.zeros(3, 2)
    with pytest.raises(ndm_ct.SolverError, match=r"at t=0\.[5-9].* rows \[1\]"):
        ndm_ct.loglik(broken, x)
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
        (lambda: model(t_min=1.0), ValueError, r"t_min must lie in \[0, 1\)"),
        (lambda: model(prediction="epsilon"), ValueError, "prediction='epsilon' is unknown"),
        (lambda: model(prediction="momens"), ValueError, "did you mean 'moments'"),
        (lambda: model(prediction="eps", transform=transforms.TimeScaling(lambda t: 1 + t)), ValueError, "F is the"),
        (lambda: NDM(lambda z, t: z, (2,), schedule=schedules.Cosine(), prediction="eps"), ValueError, "alpha.1. = 0"),
        (lambda: model(volatility=-1.0), ValueError, "volatility must be a float >= 0"),
        (lambda: NDM(3, (2,)), TypeError, "predictor must be callable"),
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
        (lambda: ndm_ct.encode(model(), X, trace="exact"), ValueError, "trace has no effect"),
        (lambda: ndm_ct.decode(model(), X, generator=torch.Generator()), ValueError, "generator has no effect"),
        (lambda: ndm_ct.sample(model(), 2, method="dd", steps=5), ValueError, "did you mean 'dd"),
        (lambda: ndm_ct.sample(model(), 2, method="heun", steps=0), ValueError, "steps must be at least 1"),
        (lambda: ndm_ct.sample(model(), 2, method="heun", steps=2.5), TypeError, "steps must be an int"),
        (lambda: ndm_ct.sample(model(), 2, method="sde"), ValueError, "pass steps="),
        (lambda: ndm_ct.sample(model(), 2, steps=10), ValueError, "steps has no effect"),
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
