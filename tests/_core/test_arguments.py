"""Arguments that are none: every public function names the one that is wrong, and never fails somewhere inside.

What came is drawn from things people pass by mistake. The function takes it, or raises ``TypeError`` or ``ValueError``
in this library's own words, which name the argument.
"""

import math
import traceback
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import ndm_ct
from ndm_ct import NDM, adapters, nn, reference, schedules, transforms
from ndm_ct.quantisation import Quantisation

DOCUMENTED = (ValueError, TypeError, ndm_ct.SolverError, ndm_ct.PredictorError)
HERE = Path(ndm_ct.__file__).parent
SHORT = schedules.LinearLogSNR(-4, 3)
X = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
LEVELS = torch.arange(6).reshape(3, 2)


def exact():
    return reference.Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 2.0]]), schedule=SHORT)


def net(classes=None):
    return NDM(nn.Preconditioned(nn.MLP(2, width=4, depth=1, classes=classes)), (2,), schedule=SHORT)


WRONG = {
    "None": None,
    "NaN": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "0": 0,
    "half": 0.5,
    "True": True,
    "huge": 10**30,
    "huger": 10**400,
    "tiny": 1e-300,
    "word": "a",
    "empty": "",
    "bytes": b"x",
    "list": [1, 2],
    "nothing": [],
    "pair": (1.0, 2.0),
    "mapping": {},
    "scalar": torch.tensor(1.0),
    "vector": torch.tensor([1.0, 2.0]),
    "numpy's": np.int64(2),
    "object": object(),
}

TOLERANCES = ("rtol", "atol")
FLOW = (*TOLERANCES, "trace", "stderr", "method", "on_failure")
CALLS = {
    "loglik": (lambda **k: ndm_ct.loglik(exact(), X, **k), FLOW),
    "encode": (lambda **k: ndm_ct.encode(exact(), X, return_info=True, **k), FLOW),
    "elbo": (lambda **k: ndm_ct.elbo(exact(), X, **k), ("quantisation", "generator")),
    "loss": (lambda **k: ndm_ct.loss(exact(), X, **k), ("generator",)),
    "sample": (
        lambda n=2, **k: ndm_ct.sample(exact(), n, **k),
        ("n", "method", *TOLERANCES, "denoise", "return_info", "dtype", "device", "batch_size"),
    ),
    "sample on a grid": (
        lambda **k: ndm_ct.sample(exact(), 2, method="ddpm", **({"steps": 3} | k)),
        ("stochasticity", "callback", "trajectory", "generator"),
    ),
    "bits_per_dim": (
        lambda **k: ndm_ct.bits_per_dim(exact(), LEVELS, **({"quantisation": 8} | k)),
        ("quantisation", "bound", "dequantisation", "stderr", *TOLERANCES, "method"),
    ),
    "evaluate": (
        lambda **k: ndm_ct.evaluate(exact(), X, progress=False, **k),
        ("cond", "quantisation", "dequantisation", "bound", "samples", "batch_size", "max_rows", "seed", "time_limit")
        + FLOW,
    ),
    "fit": (
        lambda **k: ndm_ct.fit(net(), X, progress=False, **({"steps": 1} | k)),
        ("batch_size", "optimizer", "grad_clip", "warmup", "lr_final", "ema", "cond", "cond_dropout", "quantisation")
        + ("dequantisation", "validate_every", "patience", "checkpoint_every", "log_every", "seed", "time_limit"),
    ),
    "distribution": (lambda **k: ndm_ct.distribution(exact(), **k).log_prob(X), (*TOLERANCES, "trace", "method")),
    "draws of a distribution": (lambda **k: ndm_ct.distribution(exact()).sample(**k), ("sample_shape",)),
    "loglik by an exact trace": (lambda **k: ndm_ct.loglik(exact(), X, trace="exact", **k), ("generator",)),
    "Gaussian": (
        lambda **k: reference.Gaussian(**({"mean": torch.zeros(2), "cov": torch.eye(2)} | k)),
        ("mean", "cov", "schedule", "transform", "volatility", "t_min"),
    ),
    "GaussianMixture": (
        lambda **k: reference.GaussianMixture(
            **({"weights": torch.ones(1), "means": torch.zeros(1, 2), "covs": torch.eye(2)[None]} | k)
        ),
        ("weights", "means", "covs"),
    ),
    "Quantisation": (Quantisation, ("levels", "edges", "centres")),
    "NDM": (
        lambda **k: NDM(**({"predictor": lambda z, t: z, "event_shape": (2,)} | k)),
        ("predictor", "event_shape", "transform", "schedule", "volatility", "prediction", "t_min"),
    ),
    "LinearLogSNR": (schedules.LinearLogSNR, ("gamma_min", "gamma_max")),
    "LearnedLogSNR": (schedules.LearnedLogSNR, ("gamma_min", "gamma_max")),
    "VariancePreserving": (schedules.VariancePreserving, ("beta_min", "beta_max")),
    "SubVariancePreserving": (schedules.SubVariancePreserving, ("beta_min", "beta_max")),
    "VarianceExploding": (schedules.VarianceExploding, ("sigma_min", "sigma_max")),
    "Cosine": (schedules.Cosine, ("offset",)),
    "Tabulated": (schedules.Tabulated, ("alphas_cumprod",)),
    "from_denoiser": (
        lambda **k: adapters.from_denoiser(**({"net": lambda z, s: z, "event_shape": (2,)} | k)),
        ("net", "event_shape", "sigma_min", "sigma_max"),
    ),
    "from_eps": (
        lambda **k: adapters.from_eps(
            **({"net": lambda z, k: z, "event_shape": (2,), "alphas_cumprod": [0.9, 0.1]} | k)
        ),
        ("net", "event_shape", "alphas_cumprod"),
    ),
    "from_velocity": (
        lambda **k: adapters.from_velocity(**({"net": lambda z, t: z, "event_shape": (2,)} | k)),
        ("net", "event_shape", "schedule", "data_at", "time_scale", "t_min"),
    ),
    "from_score": (
        lambda **k: adapters.from_score(**({"net": lambda z, t: z, "event_shape": (2,), "schedule": SHORT} | k)),
        ("net", "event_shape", "t_min"),
    ),
    "Blur": (lambda **k: transforms.Blur(**({"event_shape": (4, 4)} | k)), ("event_shape", "blur", "floor")),
    "MLP": (lambda **k: nn.MLP(**({"event_shape": 2, "width": 4} | k)), ("event_shape", "outputs", "dropout")),
    "UNet": (lambda **k: nn.UNet(**({"channels": 1, "width": 4} | k)), ("levels", "dropout")),
    "guided": (lambda **k: ndm_ct.guided(net(classes=3), **({"scale": 2.0} | k)), ("scale", "null")),
}


def complaint(function, arguments):
    """The error of a call, None if there is none; of any other type than those documented it is raised."""
    try:
        function(**arguments)
    except DOCUMENTED as error:
        return error
    return None


@pytest.mark.parametrize(
    ("call", "name"), [(call, name) for call, (_, names) in CALLS.items() for name in names], ids=lambda part: part
)
@pytest.mark.filterwarnings("ignore:.*is below what.*")  # a tolerance of 1e-300 is said to be out of reach, and taken
def test_what_is_no_argument_is_named(call, name):
    errors = {kind: complaint(CALLS[call][0], {name: value}) for kind, value in WRONG.items()}
    errors = {kind: error for kind, error in errors.items() if error is not None}
    assert len(errors) >= 4
    for kind, error in errors.items():
        raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        assert raised.is_relative_to(HERE), f"{kind}: {error!r} comes from {raised}"
        assert name in str(error), f"{kind}: {error!r}"


@pytest.mark.parametrize("kind", ["NaN", "0", "huge", "list", "mapping", "scalar", "object"])
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("path", ndm_ct.load),
        ("path", lambda value: ndm_ct.save(net(), value)),
        ("run_dir", lambda value: ndm_ct.fit(net(), X, steps=1, progress=False, run_dir=value)),
        ("run_dir", lambda value: ndm_ct.evaluate(exact(), X, progress=False, run_dir=value)),
    ],
    ids=["load", "save", "fit", "evaluate"],
)
def test_what_is_no_path_is_named(kind, name, function):
    with pytest.raises(TypeError, match=f"{name} must be a str or a path, got"):
        function(WRONG[kind])


def test_devices_without_float64_are_refused_with_the_cure(monkeypatch):
    """No such device is needed: what counts is where the parameters say that they are."""
    model = ndm_ct.NDM(ndm_ct.nn.MLP(2), (2,))
    place = types.SimpleNamespace(device=torch.device("mps", 0), dtype=torch.float32)
    monkeypatch.setattr("ndm_ct.prediction.first_parameter", lambda *_: place)
    message = r"mps:0 has no float64.*leave the model on the CPU.*net\(z.to\('mps:0'\), t.to\('mps:0'\)\).cpu\(\)"
    for work in (
        lambda: ndm_ct.loglik(model, torch.zeros(1, 2)),
        lambda: ndm_ct.sample(model, 1),
        lambda: ndm_ct.fit(model, torch.zeros(4, 2), steps=1, progress=False),
        lambda: ndm_ct.loss(model, torch.zeros(1, 2)),
    ):
        with pytest.raises(ValueError, match=message):
            work()


def test_a_network_on_another_device_has_its_gradients():
    net = ndm_ct.nn.MLP(2, width=4)
    model = ndm_ct.NDM(lambda z, t: net(z.to("cpu"), t.to("cpu")).cpu(), (2,))
    ndm_ct.loss(model, torch.ones(2, 2), generator=0).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
