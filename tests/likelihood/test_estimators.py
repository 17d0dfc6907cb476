"""The interface of trace estimators: an estimator of one's own, capabilities, and derivatives that are NaN."""

import math
from dataclasses import dataclass

import pytest
import torch
from oracles import gaussian

import ndm_ct
from ndm_ct import NDM, PredictorError, schedules
from ndm_ct.divergence import BoundTrace, Exact, Hutchinson, Quadrature, TraceEstimator, resolve

SHORT = schedules.LinearLogSNR(-4, 3)


@dataclass(frozen=True)
class GaussianProbes(TraceEstimator):
    """Hutchinson's estimator with normal probes, written with what the interface offers."""

    probes: int = 64

    def logdet(self, path, generator):
        def draw(*shape, generator):
            return torch.randn(self.probes, *shape, dtype=torch.float64, generator=generator)

        B, *event = path.start.shape
        if isinstance(generator, list):
            probes = torch.stack([draw(*event, generator=each) for each in generator], 1)
        else:
            probes = draw(B, *event, generator=generator)
        return BoundTrace(probes, exact=False, chunk=None).logdet(path)


def test_an_estimator_of_ones_own_is_taken_everywhere(generator):
    model, own = gaussian(), GaussianProbes()
    x = model.sample_data(3, generator=generator)
    value, info = ndm_ct.loglik(model, x, trace=own, generator=generator, return_info=True)
    assert bool(((value - model.log_prob(x)).abs() < 5 * info.stderr + 1e-3).all())
    assert info.vjps == 64 * (info.nfe - 2) + x[0].numel()  # the budget takes two evaluations and the exact trace
    result = ndm_ct.evaluate(model, x, trace=own, progress=False)
    assert abs(result.nll + float(model.log_prob(x).mean())) < 10.0
    _, drawn = ndm_ct.sample(model, 2, trace=own, generator=generator, return_info=True)
    assert drawn.stderr.shape == (2,)
    with pytest.raises(ValueError, match="an estimator that can add sweeps; GaussianProbes cannot"):
        ndm_ct.loglik(model, x, trace=own, stderr=0.1)


def test_capabilities_are_those_of_the_estimators():
    for estimator, sweeps, known, nodes in (
        (Exact(), 0, True, False),
        (Hutchinson(1), 0, False, False),
        (Hutchinson(2), 0, True, False),
        (Quadrature(sweeps=3), 3, False, True),
        (Quadrature(sweeps=4), 4, True, True),
        (GaussianProbes(), 0, False, False),
    ):
        assert (estimator.sweeps, estimator.knows_variance, estimator.needs_nodes) == (sweeps, known, nodes)
        assert resolve(estimator, (2,)) is estimator
    assert Quadrature(nodes=4).with_sweeps(9) == Quadrature(nodes=4, sweeps=9)
    with pytest.raises(TypeError, match="Exact has no sweeps"):
        Exact().with_sweeps(2)
    with pytest.raises(TypeError, match=r"trace must be one of .* got object"):
        resolve(object(), (2,))


def test_auto_is_exact_up_to_32_dimensions():
    assert resolve("auto", (32,)) == Exact()
    assert resolve("auto", (33,)) == Quadrature()
    assert resolve("auto", (33,), large=Quadrature(sweeps=1)) == Quadrature(sweeps=1)
    assert resolve("auto", (32,), large=Quadrature(sweeps=1)) == Exact()


def test_a_solver_that_cannot_visit_nodes_is_named():
    model = gaussian(d=40)
    with pytest.raises(ValueError, match=r"'quadrature' needs states at times of its own.*method='dopri5'"):
        ndm_ct.sample(model, 2, method="dopri5", return_info=True)


class Kinked(torch.nn.Module):
    """Finite everywhere, with a derivative that is NaN in rows of zeros: the norm at zero times zero."""

    def forward(self, z, t):
        bad = z[:, :1].detach().abs() > 30.0
        root = torch.where(bad, z * 0.0, z.abs() + 1.0).sqrt()
        return torch.where(bad, root, 0.1 * z) + 0.2 * z


@pytest.mark.parametrize(
    "trace", ["exact", "hutchinson", Quadrature(nodes=4, sweeps=4)], ids=["exact", "hutch", "quad"]
)
def test_a_derivative_that_is_nan_fails_its_row(trace):
    model = NDM(Kinked(), (2,), schedule=SHORT)
    x = torch.tensor([[0.5, -0.2], [100.0, 1.0], [0.1, 0.3]], dtype=torch.float64)
    options = {"trace": trace, "rtol": 1e-3, "atol": 1e-3}
    value, info = ndm_ct.loglik(model, x, on_failure="nan", return_info=True, **options)
    assert info.failed.tolist() == [False, True, False]
    assert value.isnan().tolist() == [False, True, False]
    assert bool(info.variance[1].isnan())
    with pytest.raises((PredictorError, ndm_ct.SolverError), match="1"):
        ndm_ct.loglik(model, x, **options)


def test_the_variance_is_that_of_the_estimates(generator):
    """Its mean over rows is the scatter of the estimates, while the squared standard error is wider."""
    model = gaussian()
    x = model.sample_data(1, generator=generator).expand(3000, -1)
    value, info = ndm_ct.loglik(
        model, x, trace=Quadrature(nodes=2, probes=1, sweeps=6), rtol=1e-3, atol=1e-3, generator=generator,
        return_info=True,
    )  # fmt: skip
    scatter = float(value.var())
    assert float(info.variance.mean()) == pytest.approx(scatter, rel=0.15)
    torch.testing.assert_close(info.stderr.square(), info.variance * 5.0 / 3.0)
    assert math.isfinite(scatter)
