"""Schrödinger bridges: between Gaussians everything is known, and training finds it."""

from unittest import mock

import pytest
import torch
from torch import nn

import ndm_ct
from ndm_ct.bridges import HalfBridge, Policies, SchroedingerBridge, alternate
from ndm_ct.prior import DataPrior
from ndm_ct.solvers import torchsde as backend

G = 1.2
M0, S0 = torch.tensor([1.0, -1.0]).double(), torch.tensor([[1.0, 0.5], [0.5, 0.6]]).double()
M1, S1 = torch.tensor([0.0, 0.5]).double(), torch.tensor([[0.5, -0.2], [-0.2, 1.5]]).double()


class Normal:
    """A normal law that draws from generators."""

    def __init__(self, mean, cov):
        self.law = torch.distributions.MultivariateNormal(mean, cov)

    def log_prob(self, z):
        return self.law.log_prob(z.double()).to(z.dtype)

    def sample(self, n, *, generator=None, dtype=None, device=None):
        noise = torch.randn(n, len(self.law.mean), generator=generator, dtype=torch.float64)
        return (self.law.mean + noise @ self.law.scale_tril.T).to(dtype)


def draws(mean, cov, n, seed, dtype=torch.float64):
    return Normal(mean, cov).sample(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


class Known:
    """The bridge between N(m0, S0) and N(m1, S1) over g dW (Bunne et al., 2023, https://arxiv.org/abs/2202.05722).

    The covariance of its ends is C = (R D R^-1 - g^2 I) / 2, with R^2 = S0 and D^2 = 4 R S1 R + g^4 I. Between the
    ends it is a Brownian bridge, whose mean velocity given the state is linear.
    """

    def __init__(self, m0=M0, S0=S0, m1=M1, S1=S1, g=G):
        self.m0, self.S0, self.m1, self.S1, self.g = m0, S0, m1, S1, g
        self.eye = torch.eye(len(m0)).double()
        R = root(S0)
        self.C = 0.5 * (R @ root(4.0 * R @ S1 @ R + g**4 * self.eye) @ torch.linalg.inv(R) - g**2 * self.eye)

    def marginal(self, t):
        """Mean and covariance at times (B,)."""
        t = t.double()[:, None, None]
        spread = self.C + self.C.T + self.g**2 * self.eye
        mean = (1.0 - t) * self.m0[:, None] + t * self.m1[:, None]
        return mean[..., 0], (1.0 - t) ** 2 * self.S0 + t**2 * self.S1 + t * (1.0 - t) * spread

    def velocity_and_score(self, z, t):
        (mean, cov), s = self.marginal(t), t.double()[:, None, None]
        cross = (1.0 - s) * (self.C.T - self.S0) + s * (self.S1 - self.C) + (0.5 - s) * self.g**2 * self.eye
        whitened = torch.linalg.solve(cov, (z.double() - mean)[..., None])
        return self.m1 - self.m0 + (cross @ whitened)[..., 0], -whitened[..., 0]

    def policy(self, sign):
        def policy(z, t):
            v, s = self.velocity_and_score(z, t)
            return ((0.5 * self.g**2 * s + sign * v) / self.g).to(z.dtype)

        return policy

    def bridge(self, checks=False):
        policies = self.policy(1.0), self.policy(-1.0)
        prior = Normal(self.m1, self.S1)
        return SchroedingerBridge(*policies, self.m0.shape, diffusion=self.g, prior=prior, checks=checks)


class Affine(nn.Module):
    """A(t) z + b(t), polynomials in t: it contains policies between Gaussians up to the degree."""

    def __init__(self, size, degree=4):
        super().__init__()
        self.A = nn.Parameter(torch.zeros(degree + 1, size, size, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(degree + 1, size, dtype=torch.float64))

    def forward(self, z, t):
        powers = torch.stack([(2.0 * t - 1.0) ** k for k in range(len(self.b))], 1)
        return torch.einsum("bk,kij,bj->bi", powers, self.A, z) + powers @ self.b


def small(prior=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nets = [ndm_ct.nn.MLP(2, width=8, depth=1) for _ in range(2)]
        for net in nets:
            nn.init.normal_(net.output.weight, std=0.1)
    return SchroedingerBridge(*nets, (2,), diffusion=0.8, prior=prior, checks=False)


X = draws(M0, S0, 40, 0, torch.float32)


def test_the_known_policies_have_the_known_likelihood():
    bridge, x = Known().bridge(checks=True), draws(M0, S0, 200, 0)
    value, info = ndm_ct.loglik(bridge, x, return_info=True)
    error = (value - Normal(M0, S0).log_prob(x)).abs()
    assert float(error.max()) < 2e-5
    assert bool((error <= 3.0 * info.ode_error + 1e-9).all())
    assert bool(info.prior_mismatch.isnan().all())
    torch.testing.assert_close(bridge.score(x, 0.0), -torch.linalg.solve(S0, (x - M0).T).T)


def test_the_known_policies_take_one_law_to_the_other_with_the_known_coupling():
    known, n = Known(), 20_000
    bridge, x = known.bridge(), draws(M0, S0, n, 1)
    y = bridge.simulate(x, to="prior", steps=20, generator=0)
    back = bridge.simulate(draws(M1, S1, n, 2), steps=20, generator=0)
    for found, mean, cov in ((y, M1, S1), (back, M0, S0)):
        torch.testing.assert_close(found.mean(0), mean, atol=0.03, rtol=0.0)
        torch.testing.assert_close(torch.cov(found.T), cov, atol=0.04, rtol=0.0)
    torch.testing.assert_close((x - M0).T @ (y - M1) / n, known.C, atol=0.03, rtol=0.0)
    assert float(known.C.abs().max()) > 0.3
    by_flow = ndm_ct.sample(bridge, n, method="ode", steps=20, generator=0, dtype=torch.float64)
    torch.testing.assert_close(torch.cov(by_flow.T), S0, atol=0.04, rtol=0.0)


@pytest.mark.parametrize("policy", ["backward", "forward"])
def test_the_known_policies_minimise_the_objective(policy):
    """The gradient along a change of either policy vanishes, and its curvature is that of half the square."""
    known, x = Known(), draws(M0, S0, 6000, 3)

    def loss(shift):
        bridge, sign = known.bridge(), 1.0 if policy == "forward" else -1.0
        exact = known.policy(sign)
        changed = lambda z, t: exact(z, t) + shift * torch.sin(z + t[:, None])  # noqa: E731
        setattr(bridge.predictor, f"{policy}_policy", changed)
        return float(HalfBridge(policy, steps=8)(bridge, x, generator=0).mean())

    low, middle, high = loss(-0.5), loss(0.0), loss(0.5)
    curvature = (high + low - 2.0 * middle) / 0.25
    assert 0.5 < curvature < 1.6
    assert abs((high - low) / (2.0 * 0.5)) < 0.04


def test_paths_are_solved_by_torchsde():
    with mock.patch.object(backend, "_imported", wraps=backend._imported) as imported:
        small().simulate(X, steps=3, generator=0)
        assert imported.call_count == 3
        HalfBridge("backward", steps=4)(small(), X, generator=0)
        assert imported.call_count == 7


def test_simulated_rows_do_not_depend_on_the_batch():
    own = [torch.Generator().manual_seed(k) for k in range(len(X))]
    whole = small().simulate(X, steps=4, generator=own)
    own = [torch.Generator().manual_seed(k) for k in range(len(X))]
    torch.testing.assert_close(small().simulate(X, steps=4, generator=own, batch_size=7), whole)
    assert small().simulate(X[:0]).shape == (0, 2)


def test_a_stage_trains_its_policy_alone():
    bridge = small()
    before = {name: value.clone() for name, value in bridge.state_dict().items()}
    trained = set()

    class Watch(ndm_ct.training.Callback):
        def step(self, training, row):
            trained.update(name.split(".")[1] for name, p in bridge.named_parameters() if p.requires_grad)

    options = {"steps": 2, "path_steps": 3, "batch_size": 20, "progress": False, "callbacks": [Watch()]}
    (result,) = alternate(bridge, X, stages=1, **options)
    changed = {name.split(".")[1] for name, value in bridge.state_dict().items() if not value.equal(before[name])}
    assert result.finished
    assert changed == trained == {"backward_policy"}
    assert all(parameter.requires_grad for parameter in bridge.parameters())


def test_a_training_that_was_stopped_continues_with_the_same_bits(tmp_path):
    class Stop(ndm_ct.training.Callback):
        def step(self, training, row):
            if training.step == 2:
                training.stop()

    options = {"stages": 3, "steps": 4, "path_steps": 3, "batch_size": 20, "progress": False}
    whole, parts = small(), small()
    alternate(whole, X, **options)
    assert [each.finished for each in alternate(parts, X, run_dir=tmp_path, callbacks=[Stop()], **options)] == [False]
    parts = small()
    assert len(alternate(parts, X, run_dir=tmp_path, **options)) == 3
    for name, value in whole.state_dict().items():
        assert value.equal(parts.state_dict()[name]), name


def test_a_file_holds_a_bridge(tmp_path):
    bridge = small().eval()
    ndm_ct.save(bridge, tmp_path / "bridge.safetensors")
    loaded = ndm_ct.load(tmp_path / "bridge.safetensors")
    assert isinstance(loaded, SchroedingerBridge)
    assert loaded.predictor.diffusion == 0.8
    assert loaded.score(X, 0.3).equal(bridge.score(X, 0.3))


@pytest.mark.slow
def test_training_finds_the_known_bridge():
    """Means within 2 % of the spread, variances and the covariance of the ends within 2 %."""
    m0, s0, m1, s1 = (torch.tensor(value).double() for value in ([1.0], [[0.5]], [-0.5], [[1.2]]))
    known, x = Known(m0, s0, m1, s1), draws(m0, s0, 50_000, 1)
    prior = Normal(m1, s1)
    bridge = SchroedingerBridge(Affine(1), Affine(1), (1,), diffusion=G, prior=prior, checks=False)
    options = {"batch_size": 1024, "lr": 3e-2, "ema": 0.98, "progress": False}
    alternate(bridge, x, stages=8, steps=150, path_steps=10, **options)
    y = bridge.simulate(x, to="prior", steps=50, generator=0)
    back = bridge.simulate(draws(m1, s1, 50_000, 2), steps=50, generator=0)
    for found, mean, cov in ((y, m1, s1), (back, m0, s0)):
        assert abs(float(found.mean() - mean)) < 0.02 * float(cov) ** 0.5
        assert float(found.var()) == pytest.approx(float(cov), rel=0.02)
    assert float(((x - m0) * (y - m1)).mean()) == pytest.approx(float(known.C), rel=0.02)
    error = ndm_ct.loglik(bridge, x[:500]) - Normal(m0, s0).log_prob(x[:500])
    assert abs(float(error.mean())) < 0.01


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: SchroedingerBridge(3, Affine(1), (1,)), TypeError, "forward_policy must be callable"),
    (lambda: Policies(Affine(1), Affine(1), 0.0), ValueError, "diffusion must be positive"),
    (lambda: SchroedingerBridge(Affine(1), ndm_ct.nn.MLP(3), (1,)), ValueError, "built for event_shape"),
    (lambda: HalfBridge("sideways"), ValueError, "policy='sideways' is unknown"),
    (lambda: HalfBridge(steps=0), ValueError, "steps"),
    (lambda: HalfBridge()(ndm_ct.NDM(lambda z, t: z, (2,)), X), TypeError, "trains a SchroedingerBridge"),
    (lambda: HalfBridge()(small(), X, generator=[torch.Generator() for _ in X]), TypeError, "drawn together"),
    (lambda: alternate(small(), X, stages=0), ValueError, "stages"),
    (lambda: alternate(small(), X, validation=X), TypeError, "no validation="),
    (lambda: alternate(ndm_ct.NDM(lambda z, t: z, (2,)), X), TypeError, "trains a SchroedingerBridge"),
    (lambda: small().simulate(X, to="noise"), ValueError, "to='noise' is unknown"),
    (lambda: small().simulate(X, method="milstein"), ValueError, "method='milstein' is unknown"),
    (lambda: small().simulate(X[:, :1]), ValueError, "start has shape"),
    (lambda: small().simulate(X, batch_size=0), ValueError, "batch_size"),
    (lambda: ndm_ct.elbo(small(), X), ValueError, "needs noise at the data end"),
    (lambda: ndm_ct.loglik(small(DataPrior(X)), X), ValueError, "has no density"),
    *[(lambda name=name: ndm_ct.sample(small(), 2, method=name, steps=3), ValueError, "assumes the noise of the sched")
      for name in ("sde", "torchsde:heun", "ddpm", "langevin")],
])  # fmt: skip
def test_bad_inputs_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
