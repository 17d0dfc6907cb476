"""Flows and encoders before the process, against densities that are known."""

import math

import numpy as np
import pytest
import torch
from oracles import rotated_covariance

import ndm_ct
from ndm_ct import nn, objectives, schedules, transforms
from ndm_ct.objectives import straight as transport
from ndm_ct.objectives.regression import Regression
from ndm_ct.quantisation import Quantisation

TIGHT = {"rtol": 1e-7, "atol": 1e-7, "trace": "exact"}


class Sinh(torch.nn.Module):
    """y = sinh(A x), everything about it known."""

    def __init__(self, d=2, context=False):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        matrix = torch.randn(d, d, generator=generator, dtype=torch.float64) + 2.0 * torch.eye(d)
        self.matrix, self.context = torch.nn.Parameter(0.5 * matrix), context

    def forward(self, x, shift=0.0):
        inner = x @ self.matrix.mT + shift
        return inner.sinh(), torch.linalg.slogdet(self.matrix)[1] + inner.cosh().log().sum(1)

    def inverse(self, y, shift=0.0):
        return torch.linalg.solve(self.matrix, (y.asinh() - shift).mT).mT


def pair(d=2, flow=None, **kwargs):
    """A model behind a flow, and the exact one of its latents."""
    latents = ndm_ct.reference.Gaussian(torch.full((d,), 0.3), rotated_covariance(d, 0.3, 2.0), **kwargs)
    model = ndm_ct.NDM(
        latents.predictor, (d,), transform=transforms.Flow(Sinh(d) if flow is None else flow),
        schedule=latents.schedule, prior=latents.prior,
    )  # fmt: skip
    return model, latents


def data(n=5, d=2):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def test_density_behind_a_flow_is_the_change_of_variables():
    """And what the information says is about data: log-determinants add up, both ways."""
    model, latents = pair()
    x = data(3)
    with torch.no_grad():
        y, logdet = model.transform.flow(x)
    exact = latents.log_prob(y) + logdet
    found, info = ndm_ct.loglik(model, x, return_info=True, **TIGHT)
    torch.testing.assert_close(found, exact, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(info.log_prior + info.logdet, exact, rtol=0.0, atol=1e-6)
    assert not found.requires_grad
    z1, up = ndm_ct.encode(model, x, return_info=True, **TIGHT)
    back, down = ndm_ct.decode(model, z1, return_info=True, **TIGHT)
    torch.testing.assert_close(back, x, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(down.z, back)
    torch.testing.assert_close(down.loglik, exact, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(down.logdet, -up.logdet, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(ndm_ct.encode(model, x), ndm_ct.encode(latents, y))
    torch.testing.assert_close(ndm_ct.decode(model, z1, rtol=1e-8, atol=1e-8), x, rtol=0.0, atol=1e-6)


def test_density_behind_a_flow_integrates_to_one():
    """In one dimension, by a rule that knows nothing of logarithms."""
    model, _ = pair(1)
    x = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64)[:, None]
    density = ndm_ct.loglik(model, x, trace="exact").exp()
    assert float(torch.trapezoid(density, x[:, 0])) == pytest.approx(1.0, abs=1e-5)


def test_samples_behind_a_flow_are_data_with_their_density():
    model, latents = pair()
    x, info = ndm_ct.sample(model, 6, generator=seeded(), return_info=True, dtype=torch.float64, trace="exact")
    assert torch.equal(info.z, ndm_ct.sample(latents, 6, generator=seeded(), return_info=True,
                                             dtype=torch.float64, trace="exact")[1].z)  # fmt: skip
    torch.testing.assert_close(info.logp, ndm_ct.loglik(model, x, **TIGHT), rtol=0.0, atol=1e-3)
    for options in ({"method": "dpmpp_2m", "steps": 12}, {"method": "ddpm", "steps": 12, "denoise": True}):
        drawn = ndm_ct.sample(model, 6, generator=seeded(), dtype=torch.float64, **options)
        y = ndm_ct.sample(latents, 6, generator=seeded(), dtype=torch.float64, **options)
        torch.testing.assert_close(model.transform.flow(drawn)[0].detach(), y)


def test_bound_behind_a_flow():
    """That of the latents with the same random numbers, plus the log-determinant; the terms add up."""
    model, latents = pair()
    x = data()
    with torch.no_grad():
        y, logdet = model.transform.flow(x)
        expected, _ = ndm_ct.elbo(latents, y, samples=6, generator=seeded(), return_info=True)
        found, info = ndm_ct.elbo(model, x, samples=6, generator=seeded(), return_info=True)
        torch.testing.assert_close(found, expected + logdet)
        torch.testing.assert_close(found, -(info.prior + info.diffusion + info.reconstruction))
        loss = objectives.loss(model, x, generator=seeded())
        torch.testing.assert_close(loss, objectives.loss(latents, y, generator=seeded()) - logdet)
        discrete = objectives.elbo_discrete(model, x, steps=50, generator=seeded())
        other = objectives.elbo_discrete(latents, y, steps=50, generator=seeded())
        torch.testing.assert_close(discrete, other + logdet)
        curved, expected = (transport.curvature(m, v, generator=seeded()) for m, v in ((model, x), (latents, y)))
        torch.testing.assert_close(curved, expected)
        regression = Regression("eps")
        model.requires_grad_(False)
        found, expected = (regression(m, v, generator=seeded()) for m, v in ((model, x), (latents, y)))
        torch.testing.assert_close(found, expected)
        kept = [ndm_ct.discrete.estimate_residuals(m, v, times=4, generator=seeded()) for m, v in
                ((model, x), (latents, y))]  # fmt: skip
        torch.testing.assert_close(kept[0].moments, kept[1].moments)


@pytest.mark.parametrize("mode", [True, "adjoint", "loss"])
def test_gradients_reach_the_flow(mode):
    model, _ = pair()
    x = data(2).requires_grad_()

    def value():
        if mode == "loss":
            return objectives.loss(model, x, generator=seeded()).sum()
        return ndm_ct.loglik(model, x, differentiable=mode, method="dopri5", rtol=1e-7, atol=1e-7).sum()

    matrix = model.transform.flow.matrix
    gradients = torch.autograd.grad(value(), (matrix, x))
    for tensor, gradient in zip((matrix, x), gradients, strict=True):
        direction = torch.randn(tensor.shape, dtype=torch.float64, generator=seeded(9))
        sides = []
        for h in (1e-5, -1e-5):
            tensor.data += h * direction
            sides.append(float(value().detach()))
            tensor.data -= h * direction
        slope = (sides[0] - sides[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-6, abs=1e-7)


def bits(model, latents, x, shift=None):
    """Bits per dimension by three uniform points a bin, conditioning of a row for each of its points."""
    bins = Quantisation(8)
    points = bins.uniform(x.repeat_interleave(3, 0), torch.float64, seeded())
    with torch.no_grad():
        y, logdet = model.transform.flow(points, **({} if shift is None else {"shift": shift.repeat_interleave(3, 0)}))
    log_p = (latents.log_prob(y) + logdet).reshape(-1, 3) + 2.0 * math.log(0.25)
    return -(torch.logsumexp(log_p, 1) - math.log(3.0)) / (2.0 * math.log(2.0))


def test_integer_data_behind_a_flow():
    """Uniform noise and the change of variables, for every way to bits; the other decoder is refused."""
    model, latents = pair()
    x = torch.tensor([[0, 7], [3, 4], [2, 6]])
    found = ndm_ct.bits_per_dim(model, x, quantisation=8, samples=3, generator=seeded(), **TIGHT)
    torch.testing.assert_close(found, bits(model, latents, x), rtol=0.0, atol=1e-5)
    with pytest.raises(ValueError, match="quantisation decodes levels from z_0, which holds latents of Flow"):
        ndm_ct.bits_per_dim(model, x, quantisation=8, bound="elbo")
    with pytest.raises(ValueError, match=r"dequantisation='process' decodes levels from z_0.*use 'uniform'"):
        ndm_ct.fit(model, x, steps=1, quantisation=Quantisation(8), dequantisation="process")


def test_a_flow_takes_its_own_conditioning():
    model, latents = pair(flow=Sinh(context=True))
    x, shift = data(), torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)[:, None]
    with torch.no_grad():
        y, logdet = model.transform.flow(x, shift)
    found = ndm_ct.loglik(model, x, shift=shift, **TIGHT)
    torch.testing.assert_close(found, latents.log_prob(y) + logdet, rtol=0.0, atol=1e-6)
    z1 = ndm_ct.encode(model, x, shift=shift, rtol=1e-8, atol=1e-8)
    back = ndm_ct.decode(model, z1, shift=shift, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back, x, rtol=0.0, atol=1e-6)
    x = torch.tensor([[0, 7], [3, 4], [2, 6], [1, 1], [5, 0]])
    found = ndm_ct.bits_per_dim(model, x, quantisation=8, samples=3, shift=shift, generator=seeded(), **TIGHT)
    torch.testing.assert_close(found, bits(model, latents, x, shift), rtol=0.0, atol=1e-5)
    assert float((found - bits(model, latents, x, shift.flip(0))).abs().max()) > 1e-2
    with pytest.raises(TypeError, match="shft"):
        ndm_ct.loglik(model, data(), shft=shift)


def test_a_learned_transform_behind_a_flow():
    """F(x, t) = G(h(x), t): the flow does not move, so that the time derivative is G's."""
    scale = transforms.TimeScaling(lambda t: 1.0 + t)
    latents = ndm_ct.reference.Gaussian(torch.zeros(2), rotated_covariance(2, 0.3, 2.0), transform=scale)
    composed = transforms.Composed(scale, transforms.Flow(Sinh()))
    model = ndm_ct.NDM(latents.predictor, (2,), transform=composed, schedule=latents.schedule, prior=latents.prior)
    x = data()
    with torch.no_grad():
        y, logdet = composed.inner.flow(x)
    torch.testing.assert_close(
        ndm_ct.loglik(model, x, **TIGHT), latents.log_prob(y) + logdet, rtol=0.0, atol=1e-6
    )  # fmt: skip
    with pytest.raises(ValueError, match="Flow maps data to latents and cannot be the outer transform"):
        transforms.Composed(transforms.Flow(Sinh()), scale)
    with pytest.raises(ValueError, match="the exact model needs a transform linear in x, got Flow"):
        ndm_ct.reference.Gaussian(torch.zeros(2), torch.eye(2), transform=transforms.Flow(Sinh()))


WEIGHT, NOISE = torch.tensor([[1.0], [0.5], [-0.7]], dtype=torch.float64), 0.6
"""Factor analysis, x = W y + r e with y a standard normal."""


class Posterior(torch.nn.Module):
    """The exact q(y | x), or one that is off by a factor of the standard deviation and a shift."""

    def __init__(self, factor=1.0, shift=0.0):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x):
        precision = 1.0 + float(WEIGHT.square().sum()) / NOISE**2
        mean = x @ WEIGHT / NOISE**2 / precision
        return mean + self.shift, torch.full_like(mean, math.log(self.factor / math.sqrt(precision)))


class Loadings(torch.nn.Module):
    def forward(self, y):
        return torch.distributions.Independent(torch.distributions.Normal(y @ WEIGHT.mT, NOISE), 1)


def factor_analysis(**kwargs):
    latents = ndm_ct.reference.Gaussian(
        torch.zeros(1), torch.eye(1), schedule=schedules.LinearLogSNR(-13.0, 9.0), t_min=0.0
    )
    transform = transforms.Encoder(Posterior(**kwargs), Loadings(), (3,))
    model = ndm_ct.NDM(latents.predictor, (1,), transform=transform, schedule=latents.schedule, prior=latents.prior)
    total = WEIGHT @ WEIGHT.mT + NOISE**2 * torch.eye(3)
    return model, torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), total)


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.0), (1.4, 0.2)])
def test_bound_behind_an_encoder(factor, shift):
    """log p(x) less the divergence of the encoder from the posterior, in units of its own standard error."""
    model, truth = factor_analysis(factor=factor, shift=shift)
    x = truth.sample((40,))
    bound, info = ndm_ct.elbo(model, x, samples=200, generator=seeded(), return_info=True)
    precision = 1.0 + float(WEIGHT.square().sum()) / NOISE**2
    gap = 0.5 * (factor**2 - 1.0 - math.log(factor**2) + shift**2 * precision)
    z = (bound - (truth.log_prob(x) - gap)) / info.stderr
    assert abs(float(z.mean())) < 3.0 / math.sqrt(40)
    assert 0.7 < float(z.std()) < 1.4
    torch.testing.assert_close(bound, -(info.prior + info.diffusion + info.reconstruction))
    losses = torch.stack([objectives.loss(model, x, generator=seeded(seed)) for seed in range(200)])
    z = (losses.mean(0) + truth.log_prob(x) - gap) / (losses.std(0) / math.sqrt(200))
    assert abs(float(z.mean())) < 3.0 / math.sqrt(40)


def test_every_sample_of_the_bound_draws_its_own_latents():
    """So the term that depends on them alone scatters less with every sample."""
    model, truth = factor_analysis(factor=1.4)
    x = truth.sample((200,))

    def scatter(samples):
        terms = [ndm_ct.elbo(model, x, samples=samples, generator=seeded(s), return_info=True)[1] for s in (0, 1)]
        return float((terms[0].reconstruction - terms[1].reconstruction).std())

    assert scatter(16) == pytest.approx(scatter(1) / 4.0, rel=0.25)


def test_sampling_and_transport_behind_an_encoder():
    """Samples are the decoder's means; encoding draws latents."""
    model, _ = factor_analysis()
    x, info = ndm_ct.sample(model, 7, generator=seeded(), return_info=True, dtype=torch.float64)
    assert x.shape == (7, 3)
    assert info.z.shape == (7, 1)
    assert info.logp is None
    assert info.stderr is None
    torch.testing.assert_close(x, ndm_ct.decode(model, info.z, rtol=1e-7, atol=1e-7), rtol=0.0, atol=1e-4)
    torch.testing.assert_close(x / WEIGHT.mT, (x / WEIGHT.mT)[:, :1].expand(7, 3))
    x = torch.randn(4, 3, dtype=torch.float64, generator=seeded())
    y, _ = model.to_latent(x, generator=seeded(1))
    z1 = ndm_ct.encode(model, x, generator=seeded(1), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ndm_ct.decode(model, z1, rtol=1e-8, atol=1e-8), y @ WEIGHT.mT, rtol=0.0, atol=1e-6)
    for ask in (lambda: ndm_ct.loglik(model, x), lambda: ndm_ct.encode(model, x, return_info=True)):
        with pytest.raises(ValueError, match=r"Encoder is stochastic, so that log p\(x\) has only a bound"):
            ask()
    with pytest.raises(ValueError, match=r"x has shape \(4, 1\), expected \(B, 3\)"):
        ndm_ct.elbo(model, x[:, :1])
    with pytest.raises(ValueError, match=r"z1 has shape \(4, 3\), expected \(B, 1\)"):
        ndm_ct.decode(model, x)


def test_evaluation_and_comparison_behind_an_encoder():
    model, truth = factor_analysis()
    x = truth.sample((60,))
    found = ndm_ct.evaluate(model, x, bound="elbo", samples=20, progress=False)
    assert abs(found.nll + float(truth.log_prob(x).mean())) < 4.0 * found.estimator_stderr + 1e-3
    worse, _ = factor_analysis(factor=2.0)
    paired = ndm_ct.compare(model, worse, x, bound="elbo", samples=20, progress=False)
    gap = 0.5 * (4.0 - 1.0 - math.log(4.0))
    assert abs(abs(paired.difference) - gap) < 4.0 * paired.stderr


def test_latents_that_cannot_be_used():
    with pytest.raises(TypeError, match=r"flow must have a method inverse\(y\), got a Linear without it"):
        transforms.Flow(torch.nn.Linear(2, 2))

    class Broken(Sinh):
        def forward(self, x, shift=0.0):
            y, logdet = super().forward(x, shift)
            return self.broken(y, logdet)

    model, _ = pair(flow=Broken())
    flow, x = model.transform.flow, data()
    flow.broken = lambda y, logdet: y
    with pytest.raises(TypeError, match=r"flow\(x\) returned Tensor, expected a pair"):
        ndm_ct.loglik(model, x)
    flow.broken = lambda y, logdet: (y[:, :1], logdet)
    with pytest.raises(ndm_ct.PredictorError, match=r"latents and log-weights of shapes \(5, 1\) and \(5,\)"):
        ndm_ct.loglik(model, x)
    flow.broken = lambda y, logdet: (y, logdet[:, None])
    with pytest.raises(ndm_ct.PredictorError, match=r"expected \(5, 2\) and \(5,\)"):
        ndm_ct.loglik(model, x)
    flow.broken = lambda y, logdet: (torch.where(torch.arange(5)[:, None] == 3, torch.nan, y), logdet)
    with pytest.raises(ndm_ct.PredictorError, match="Flow returned NaN or inf in batch rows \\[3\\]"):
        ndm_ct.elbo(model, x)


def test_a_latent_model_survives_a_file(tmp_path):
    torch.manual_seed(0)
    encoder, decoder = nn.GaussianEncoder((1, 4, 4), (3,), width=8), nn.GaussianDecoder((3,), (1, 4, 4), width=8)
    model = ndm_ct.presets.lsgm(
        nn.MLP(3, width=8), (3,), encoder=encoder, decoder=decoder, data_shape=(1, 4, 4)
    ).model  # fmt: skip
    ndm_ct.save(model, tmp_path / "model.safetensors")
    loaded = ndm_ct.load(tmp_path / "model.safetensors")
    x = torch.randn(3, 1, 4, 4, generator=seeded())
    assert torch.equal(ndm_ct.elbo(loaded, x, generator=seeded()), ndm_ct.elbo(model, x, generator=seeded()))
    assert loaded.data_shape == (1, 4, 4)


def test_mixed_prediction_is_exact_for_a_normal():
    schedule = schedules.VariancePreserving()
    mixed = nn.Mixed(nn.MLP((2, 4, 4), width=8), (2, 4, 4))
    model = ndm_ct.NDM(mixed, (2, 4, 4), schedule=schedule, prediction="eps")
    assert mixed.share.shape == (2, 1, 1)
    exact = ndm_ct.reference.Gaussian(torch.zeros(2, 4, 4), torch.eye(32), schedule=schedule)
    with torch.no_grad():
        mixed.share.fill_(-60.0)
    z, t = torch.randn(3, 2, 4, 4, generator=seeded()), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(model.score(z, t), exact.score(z, t), rtol=1e-4, atol=1e-5)
    net = torch.randn(3, 2, 4, 4, generator=seeded())
    mixed.net = _Constant(net)
    with torch.no_grad():
        mixed.share.fill_(math.log(3.0))
    expected = 0.25 * schedule(t).sigma.float()[:, None, None, None] * z + 0.75 * net
    torch.testing.assert_close(mixed(z, t, schedule).detach(), expected)


class _Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, z, t):
        return self.value


def test_a_flow_of_zuko_onto_another_base_is_refused():
    """The diffusion model stands for N(0, I); another base was dropped, and the density with it."""
    zuko = pytest.importorskip("zuko")
    for base in (
        zuko.distributions.DiagNormal(torch.zeros(2), torch.full((2,), 3.0)),
        zuko.distributions.DiagNormal(torch.ones(2), torch.ones(2)),
        zuko.distributions.BoxUniform(-torch.ones(2), torch.ones(2)),
    ):
        flow = zuko.flows.NSF(2, transforms=1, hidden_features=(4,))
        flow = zuko.flows.Flow(flow.transform, zuko.lazy.UnconditionalDistribution(lambda base=base: base))
        model = ndm_ct.NDM(lambda z, t: z, (2,), transform=transforms.Flow(nn.FromZuko(flow)))
        with pytest.raises(ValueError, match=r"the flow's base is .*N\(0, I\)"):
            ndm_ct.loglik(model, torch.zeros(3, 2))


def test_flows_of_zuko():
    """Behind an exact standard normal the density is zuko's own."""
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    flow = zuko.flows.NSF(3, context=1, transforms=2, hidden_features=(16,)).double()
    latents = ndm_ct.reference.Gaussian(torch.zeros(3), torch.eye(3), schedule=schedules.LinearLogSNR(-16.0, 9.0))
    model = ndm_ct.NDM(
        latents.predictor, (3,), transform=transforms.Flow(nn.FromZuko(flow)), schedule=latents.schedule,
        prior=latents.prior,
    )  # fmt: skip
    x, context = data(4, 3), torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)[:, None]
    found = ndm_ct.loglik(model, x, context=context, **TIGHT)
    torch.testing.assert_close(found, flow(context).log_prob(x).detach(), rtol=0.0, atol=1e-5)
    back = ndm_ct.decode(model, ndm_ct.encode(model, x, context=context), context=context)
    torch.testing.assert_close(back, x, rtol=0.0, atol=1e-3)
    assert np.isfinite(float(objectives.loss(model, x, context=context).sum().detach()))
