"""Everything random follows the generator or the seed that was passed, and touches no other.

A walk over the package finds every public function and method with such an argument; each must be in one of the two
tables below, so a new one cannot be forgotten.
"""

import importlib
import inspect
import pkgutil
from unittest import mock

import numpy as np
import pytest
import torch

import ndm_ct
from ndm_ct import NDM, bridges, discrete, nn, objectives, process, reference, samplers, schedules, solvers
from ndm_ct._core.noise import as_randomness
from ndm_ct._core.seeds import derive_seeds, make_generator
from ndm_ct.cli import runs, selfcheck, settings, train
from ndm_ct.data.containers import fixed_seeds
from ndm_ct.data.sources import Bins, Source
from ndm_ct.divergence import Hutchinson
from ndm_ct.likelihood.bits import dequantised
from ndm_ct.objectives.regression import Regression
from ndm_ct.objectives.straight import Straight, curvature
from ndm_ct.objectives.time_samplers import LossHistory
from ndm_ct.prior import DataPrior, IsotropicNormal, prior_divergence, sample_prior
from ndm_ct.quantisation import Quantisation
from ndm_ct.samplers import base as stepping
from ndm_ct.samplers.grids import time_grid
from ndm_ct.training import Samples
from ndm_ct.transforms import Clusters, Composed, Encoder, Identity

ARGUMENTS = {"generator", "seed", "random_state"}
SHORT = schedules.LinearLogSNR(-6.0, 5.0)
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
X64 = X.double()
LEVELS = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
COARSE = {"rtol": 1e-3, "atol": 1e-3}
FLOW_MAP = NDM(nn.Preconditioned(nn.MLP(2, width=4, until=True)), (2,), checks=False)


def random_functions():
    """Names of what takes a source of randomness, behind that of its package: ``samplers.Sampler.step``."""
    for info in pkgutil.walk_packages(ndm_ct.__path__, "ndm_ct."):
        room = info.name.split(".")[1]
        if any(part.startswith("_") for part in info.name.split(".")) or info.name == "ndm_ct.cli.demo":
            continue
        if room == "estimator":
            pytest.importorskip("sklearn", minversion="1.6")
        module = importlib.import_module(info.name)
        for public in getattr(module, "__all__", ()):
            thing = getattr(module, public)
            if getattr(thing, "__module__", None) != module.__name__:
                continue
            found = {f"{room}.{public}": thing.__init__ if inspect.isclass(thing) else thing}
            if inspect.isclass(thing):
                methods = {key: value for key, value in vars(thing).items() if inspect.isfunction(value)}
                found |= {f"{room}.{public}.{key}": value for key, value in methods.items() if key[0] != "_"}
                found |= {f"{room}.{public}": methods["__call__"]} if "__call__" in methods else {}
            for key, function in found.items():
                if inspect.isroutine(function) and ARGUMENTS & inspect.signature(function).parameters.keys():
                    yield key


def built(make):
    """What ``make`` returns, its weights always the same, torch's generator left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def model():
    net = built(lambda: NDM(nn.Preconditioned(nn.MLP(2, width=8, depth=1)), (2,), schedule=SHORT))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05
    return net


def bridge():
    nets = built(lambda: [nn.MLP(2, width=8, depth=1) for _ in range(2)])
    with torch.no_grad():
        for parameter in (parameter for net in nets for parameter in net.parameters()):
            parameter += 0.05
    return bridges.SchroedingerBridge(*nets, (2,), checks=False)


def bridged(seed):
    trained = bridge()
    bridges.alternate(trained, X, stages=1, steps=1, path_steps=2, seed=seed, progress=False)
    return torch.cat([parameter.flatten() for parameter in trained.parameters()])


def encoder():
    parts = nn.GaussianEncoder, nn.GaussianDecoder
    return built(lambda: Encoder(*(part((2,), (2,), width=4) for part in parts), (2,)))


def latent():
    return NDM(lambda z, t: 0.5 * z, (2,), transform=encoder(), schedule=SHORT)


def unknown_prior():
    """A prior that does not know its divergence from a normal, so that it is sampled."""
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    return reference.GaussianMixture(torch.tensor([0.5, 0.5]), means, torch.eye(2).repeat(2, 1, 1), schedule=SHORT)


def trained(seed):
    net = model()
    ndm_ct.fit(net, X, steps=2, batch_size=2, seed=seed, progress=False)
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def density(**options):
    from ndm_ct.estimator import NDMDensity

    return NDMDensity(width=4, depth=1, steps=2, **options).fit(X.numpy())


def drawn_from_table(estimator, seed):
    return torch.tensor(estimator.table_.draw_seeded(estimator.model_, 3, seed, steps=2, method="ddpm"))


def sampler():
    made = samplers.NAMES["ddpm"](model())
    made.prepare(time_grid(SHORT, 0.0, 2))
    return made


def infinite():
    return NDM(nn.MLP(2, width=8, depth=1), (2,), schedule=schedules.Rectified())


def sde(g):
    grid = torch.linspace(1.0, 0.5, 3, dtype=torch.float64)
    return solvers.sdeint(lambda t, y: -y, lambda t, y: torch.ones(()).to(y), X64, grid, generator=g).state[0]


def bins(dequantised=True):
    return Bins(model(), Quantisation(8) if dequantised else None, "uniform")


INTEGERS = {"quantisation": 8, **COARSE}


def coin_chain():
    return reference.Chain(torch.tensor([0.5, 0.5]), torch.full((2, 2), 0.5), 3, Quantisation(2))


def under_fixed_seeds(seed):
    with fixed_seeds(seed):
        return torch.rand(3)


def drawn_in_training(seed):
    kept = []
    samples = Samples(1, 2, to=lambda step, x: kept.append(x), seed=seed, method="ddpm", steps=2)
    ndm_ct.fit(model(), X, steps=1, callbacks=[samples], progress=False)
    return kept[-1]


def checked(seed):
    with mock.patch.multiple(selfcheck, ROWS=8, SAMPLES=32):
        return torch.tensor([check.value for check in selfcheck.run(seed=seed)])


FOLLOWS = {
    "reference.Chain.sample_levels": lambda g: coin_chain().sample_levels(20, generator=g),
    "transforms.Clusters.sample_label": lambda g: Clusters.of(X64, torch.arange(len(X64)) % 2).sample_label(
        20, generator=g
    ),
    "likelihood.bits_per_dim": lambda g: ndm_ct.bits_per_dim(model(), LEVELS, generator=g, **INTEGERS),
    "likelihood.dequantised": lambda g: dequantised(model(), Quantisation(8), LEVELS, "uniform", 1, g)[0],
    "inverse.posterior": lambda g: ndm_ct.posterior(
        model(), 0.5, lambda x: x[:, 0], 4, noise=0.5, method="smc", steps=2, particles=2, generator=g
    ),
    "inverse.vary": lambda g: ndm_ct.vary(model(), X, 0.5, steps=2, generator=g),
    "reweighting.reweight": lambda g: ndm_ct.reweight(model(), lambda x: x[:, 0], 4, generator=g, **COARSE).log_weights,
    "reweighting.Reweighted.resample": lambda g: ndm_ct.reweight(
        model(), lambda x: x[:, 0], 4, generator=0, **COARSE
    ).resample(20, generator=g),
    "samplers.estimate_residuals": lambda g: discrete.estimate_residuals(model(), X, times=3, generator=g).moments,
    "distributions.distribution": lambda g: ndm_ct.distribution(model(), generator=g, **COARSE).sample((3,)),
    "divergence.Hutchinson.bind": lambda g: Hutchinson(16).bind(X, g)(lambda z: z**2 + z.flip(1), X)[1],
    "likelihood.loglik": lambda g: ndm_ct.loglik(model(), X, trace="quadrature", generator=g, **COARSE),
    "likelihood.encode": lambda g: (
        ndm_ct.encode(model(), X, trace="hutchinson", generator=g, return_info=True, **COARSE)[1].logdet
    ),
    "likelihood.decode": lambda g: (
        ndm_ct.decode(model(), X, trace="hutchinson", generator=g, return_info=True, **COARSE)[1].logdet
    ),
    "model.NDM.to_latent": lambda g: latent().to_latent(X, generator=g)[0],
    "model.NDM.prior_divergence": lambda g: unknown_prior().prior_divergence(
        unknown_prior().process.along(X64), X64, g
    ),
    "model.NDM.sample_prior": lambda g: model().sample_prior(3, generator=g, dtype=torch.float32, device="cpu"),
    "prior.prior_divergence": lambda g: prior_divergence(unknown_prior().prior, X64, torch.ones_like(X64), g),
    "prior.sample_prior": lambda g: sample_prior(
        IsotropicNormal((2,)), 3, generator=g, dtype=torch.float32, device="cpu"
    ),
    "prior.IsotropicNormal.sample": lambda g: IsotropicNormal((2,)).sample(3, generator=g),
    "bridges.HalfBridge": lambda g: bridges.HalfBridge("forward", steps=2)(bridge(), X, generator=g),
    "bridges.SchroedingerBridge.path": lambda g: next(
        bridge().path("forward", X, torch.tensor([0.0, 0.1]), "euler", as_randomness(g, len(X), "cpu", "path"))
    ),
    "bridges.SchroedingerBridge.simulate": lambda g: bridge().simulate(X, steps=2, generator=g),
    "objectives.Bound.forward": lambda g: objectives.Bound(LossHistory())(model(), X, generator=g),
    "objectives.elbo": lambda g: ndm_ct.elbo(model(), X, samples=3, generator=g),
    "objectives.elbo_discrete": lambda g: objectives.elbo_discrete(model(), X, steps=4, generator=g),
    "objectives.loss": lambda g: ndm_ct.loss(model(), X, generator=g),
    "objectives.prior_term": lambda g: objectives.prior_term(unknown_prior(), X64, generator=g),
    "objectives.reconstruction_term": lambda g: objectives.reconstruction_term(
        model(), Quantisation(8).centres(LEVELS, torch.float32), quantisation=Quantisation(8), generator=g
    ),
    "process.ForwardProcess.sample": lambda g: process.ForwardProcess(Identity(), SHORT, 1.0).sample(
        X, torch.tensor(0.5).double(), generator=g
    ),
    "quantisation.Quantisation.uniform": lambda g: Quantisation(8).uniform(LEVELS, torch.float32, g),
    "quantisation.Quantisation.truncated_normal": lambda g: Quantisation(8).truncated_normal(
        LEVELS, 1.0, 0.1, torch.float32, g
    ),
    "reference.GaussianMixture.sample_data": lambda g: unknown_prior().sample_data(3, generator=g),
    "objectives.Regression": lambda g: Regression("eps")(model(), X, generator=g),
    "objectives.couple": lambda g: objectives.couple(X64, X64.flip(0), "entropic", regularisation=50.0, generator=g),
    "prior.DataPrior.sample": lambda g: DataPrior(torch.arange(50.0)).sample(20, generator=g),
    "data.Bins.real": lambda g: bins().real(LEVELS, g),
    "data.Bins.elbo": lambda g: bins(False).elbo(model(), X, g, {}),
    "data.Source.batch": lambda g: Source(LEVELS, {}, bins(), "data", ndm_ct.fit).batch(torch.arange(3), g)[0],
    "samplers.finite_start": lambda g: samplers.adaptive.finite_start(built(infinite), X, g, {})[0],
    "samplers.sample_torchsde": lambda g: samplers.adaptive.sample_torchsde(model(), X, generator=g).state[0],
    "samplers.sample_rows": lambda g: samplers.adaptive.sample_rows(model(), X, generator=g).state[0],
    "samplers.sample": lambda g: ndm_ct.sample(model(), 3, method="sde", steps=3, generator=g),
    "solvers.sdeint": sde,
    "solvers.sdeint_adaptive": lambda g: solvers.sdeint_adaptive(
        lambda t, y: -y, lambda t, y: torch.ones_like(y), X64, 1.0, 0.5, generator=g, first_step=0.1
    ).state[0],
    "solvers.sdeint_rows": lambda g: solvers.sdeint_rows(
        lambda t, y, rows: -y, lambda t, y, rows: torch.ones_like(y), X64, 1.0, 0.5, generator=g, first_step=0.1
    ).state[0],
    "samplers.Sampler.step": lambda g: sampler().step(X, 1.0, 0.5, generator=g),
    "samplers.walk": lambda g: stepping.walk(sampler(), X, time_grid(SHORT, 0.0, 2), generator=g),
    "transforms.Composed.to_latent": lambda g: Composed(Identity(), encoder()).to_latent(X, generator=g)[0],
    "transforms.Encoder.to_latent": lambda g: encoder().to_latent(X, generator=g)[0],
    "objectives.Distillation": lambda g: objectives.Distillation("mean_flow")(FLOW_MAP, X, generator=g),
    "objectives.Straight.forward": lambda g: Straight()(model(), X, generator=g),
    "objectives.curvature": lambda g: curvature(model(), X, generator=g),
}
SEEDED = {
    "bridges.alternate": bridged,
    "columns.Table.draw_seeded": lambda seed: drawn_from_table(density(random_state=0), seed),
    "auditing.audit": lambda seed: torch.tensor(
        [ndm_ct.audit(lambda m, x, bins, g: x[:, 0], ["checkers"], seed=seed, progress=False).verdicts[0].bias]
    ),
    "data.fixed_seeds": under_fixed_seeds,
    "training.Samples": drawn_in_training,
    "evaluation.evaluate": lambda seed: (
        ndm_ct.evaluate(model(), X, trace="hutchinson", seed=seed, progress=False, **COARSE).values
    ),
    "evaluation.compare": lambda seed: (
        ndm_ct.compare(model(), model(), X, trace="hutchinson", seed=seed, progress=False, **COARSE).values_a
    ),
    "training.fit": trained,
    "estimator.Diagnosed.diagnose": lambda seed: torch.tensor(
        density(random_state=0).diagnose(np.tile(X.numpy(), (15, 1)), random_state=seed).samples
    ),
    "estimator.NDMDensity": lambda seed: torch.tensor(density(random_state=seed).score_samples(X.numpy())),
    "cli.Settings": lambda seed: next(train.build(settings.Settings(seed=seed), (2,), None).parameters()),
    "cli.split": lambda seed: torch.cat([torch.as_tensor(part) for part in runs.split(20, 0.4, seed)]),
    "cli.run": checked,
    "estimator.NDMDensity.impute": lambda seed: torch.tensor(
        density(random_state=0, conditionals=True).impute([[1.0, np.nan]], random_state=seed)
    ),
    "estimator.NDMDensity.sample": lambda seed: torch.tensor(density(random_state=0).sample(3, random_state=seed)),
}
DRAWS_NOTHING = {
    "bridges.SchroedingerBridge.prior_divergence",  # it is not known
    "training.Settings",  # they hold the seed of fit and of evaluate
    "evaluation.Settings",
    "distributions.NDMDistribution",  # it holds that of distribution
    "divergence.Exact.bind",  # its probes are the unit vectors
    "transforms.Transform.to_latent",  # y is x
    "transforms.Flow.to_latent",  # one to one
    "transforms.Whitening.to_latent",
    "transforms.Clusters.to_latent",
}

INSIDE = {  # of loglik or NDMDensity, which pass them a generator or one per row; a seed ends there
    "columns.Table.score",
    "divergence.Exact.logdet",
    "divergence.Hutchinson.logdet",
    "divergence.Quadrature.logdet",
    "divergence.TraceEstimator.logdet",
    "likelihood.measure",
}


def test_nothing_random_is_left_out():
    assert set(random_functions()) == FOLLOWS.keys() | SEEDED.keys() | DRAWS_NOTHING | INSIDE


def drawn(name, source, others):
    """The result with a seed or generator, while torch's own generator stands somewhere, and stays there."""
    torch.manual_seed(others)
    before = torch.get_rng_state()
    result = (SEEDED | FOLLOWS)[name](source)
    assert torch.equal(torch.get_rng_state(), before)
    return result.detach()


def manual(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (name, source)
        for source in (int, manual)
        for name in sorted(FOLLOWS | SEEDED)
        if source is int or name in FOLLOWS
    ],
)
def test_it_follows_its_source_alone(name, source):
    if name.startswith("estimator"):
        pytest.importorskip("sklearn", minversion="1.6")
    first, again, other = (drawn(name, source(seed), others) for seed, others in ((1, 0), (1, 99), (2, 0)))
    assert torch.equal(first, again)
    assert first.shape == other.shape
    assert not torch.equal(first, other)
    assert bool(first.isfinite().all())


@pytest.mark.parametrize("name", sorted(set(FOLLOWS) - {"data.Source.batch"}))
def test_torchs_own_generator_serves_where_none_is_passed(name):
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(FOLLOWS[name](None).detach())
    assert torch.equal(*results[:2])
    assert not torch.equal(*results[1:])


@pytest.mark.parametrize("name", sorted(set(FOLLOWS) - {"data.Bins.elbo", "data.Source.batch", "data.Bins.real"}))
@pytest.mark.parametrize(("wrong", "error", "words"), [
    ("0", TypeError, ("an int", "a torch.Generator", "a sequence of one torch.Generator per row", "got str")),
    (True, TypeError, ("an int", "a torch.Generator", "a sequence of one torch.Generator per row", "got bool")),
    (-1, ValueError, ("generator=-1", "at least 0")),
])  # fmt: skip
def test_what_is_no_source_is_refused_by_name(name, wrong, error, words):
    with pytest.raises(error, match="generator") as caught:
        FOLLOWS[name](wrong)
    assert all(word in str(caught.value) for word in words)


def test_words_give_seeds_that_are_unrelated():
    """A seed is no sum, and a name is no number; a numpy integer is the int."""
    words = [(0, "sample", 1), (1, "sample", 0), (0, "loglik", 1), ("0", "sample", 1), (0, b"x", 1), (2**40, "sample")]
    assert len({derive_seeds(*each)[0] for each in words}) == len(words)
    assert derive_seeds(3, "a", count=3)[:2] == derive_seeds(3, "a", count=2)
    assert torch.equal(ndm_ct.sample(model(), 3, generator=np.int64(5)), ndm_ct.sample(model(), 3, generator=5))
    x = ndm_ct.sample(model(), 3, generator=5)
    assert not torch.equal(x, ndm_ct.sample(model(), 3, generator=manual(5)))


def test_functions_that_are_given_one_seed_draw_independent_noise():
    """Else the probes of a likelihood would be the noise that its rows were drawn from."""
    z = model().sample_prior(3, generator=5, dtype=torch.float32, device="cpu")
    end = torch.tensor(1.0).double()
    x = process.ForwardProcess(Identity(), SHORT, 1.0).sample(torch.zeros(3, 2), end, generator=5)
    eps = x / SHORT(end).sigma.float()
    assert not torch.allclose(z, eps, atol=1e-3)


def test_trainings_and_evaluations_keep_the_noise_they_began_with():
    """Their words are numbers, whose seeds are those of numpy: what was begun before goes on with the same bits."""
    assert derive_seeds(7, 12, 3, count=2) == np.random.SeedSequence((7, 12, 3)).generate_state(2, np.uint64).tolist()


def test_a_generator_has_the_whole_state_that_its_words_give():
    """Else two of 100,000 rows would be expected to be equal: torch's own seeds count by 32 bits on the CPU."""
    words = np.random.SeedSequence((1, 2)).generate_state(624, np.uint32)
    twister = np.random.MT19937()
    twister.state |= {"state": {"key": words, "pos": 624}}
    numbers = torch.randint(0, 2**20, (1000,), generator=make_generator(1, 2))
    np.testing.assert_array_equal(numbers.numpy(), twister.random_raw(1000) % 2**20)


def seeds(n, first=0):
    return [torch.Generator().manual_seed(first + k) for k in range(n)]


IMAGES = torch.randn(7, 1, 6, 6, generator=torch.Generator().manual_seed(0))
PIXELS = torch.randint(0, 8, IMAGES.shape, generator=torch.Generator().manual_seed(0))


def of_images():
    """Above the number of dimensions for which a trace is exact, in float64, and no zero function."""
    net = built(lambda: NDM(nn.Preconditioned(nn.UNet(1, width=4, levels=1)), (1, 6, 6), schedule=SHORT))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02
    return net.double().requires_grad_(False)


def mixed():
    """A prior whose divergence is sampled."""
    return unknown_prior().double()


ROW_BY_ROW = {
    "loglik": lambda x, g: ndm_ct.loglik(of_images(), x.double(), generator=g, **COARSE),
    "loglik, hutchinson": lambda x, g: ndm_ct.loglik(
        of_images(), x.double(), trace=Hutchinson(4), generator=g, **COARSE
    ),
    "loglik to an error": lambda x, g: ndm_ct.loglik(of_images(), x.double(), stderr=0.06, generator=g, **COARSE),
    "truncation": lambda x, g: (
        ndm_ct.loglik(of_images(), x.double(), generator=g, return_info=True, **COARSE)[1].truncation
    ),
    "encode": lambda x, g: ndm_ct.encode(of_images(), x.double(), generator=g, return_info=True, **COARSE)[1].logdet,
    "elbo": lambda x, g: ndm_ct.elbo(of_images(), x.double(), samples=3, generator=g),
    "elbo, sampled prior": lambda x, g: ndm_ct.elbo(mixed(), x.double().flatten(1)[:, :2], generator=g),
    "elbo, encoder": lambda x, g: ndm_ct.elbo(latent(), x.flatten(1)[:, :2], generator=g),
    "elbo_discrete": lambda x, g: objectives.elbo_discrete(of_images(), x.double(), steps=5, generator=g),
}
LEVEL_BY_LEVEL = {
    "bits": {}, "bits, points": {"samples": 3}, "bits, truncated": {"dequantisation": "process"},
    "bits, bound": {"bound": "elbo", "samples": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", [*ROW_BY_ROW, *LEVEL_BY_LEVEL])
def test_a_row_with_a_generator_of_its_own_does_not_know_its_batch(name):
    def scored(rows, generators):
        if name in ROW_BY_ROW:
            return ROW_BY_ROW[name](IMAGES[rows], generators)
        options = LEVEL_BY_LEVEL[name] | ({} if "bound" in name else COARSE)
        return ndm_ct.bits_per_dim(of_images(), PIXELS[rows], quantisation=8, generator=generators, **options)

    whole = scored(slice(0, 7), seeds(7))
    assert whole.isfinite().any()  # a truncation that cannot be known is NaN, row by row
    for size in (1, 3):
        parts = [scored(slice(k, k + size), seeds(min(size, 7 - k), k)) for k in range(0, 7, size)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert not torch.allclose(scored(slice(0, 7), seeds(7, 100)), whole, rtol=1e-4, atol=1e-4, equal_nan=True)
    with pytest.raises(ValueError, match="generator has 3 generators for 7 rows; pass one, or one per row"):
        scored(slice(0, 7), seeds(3))
    with pytest.raises(TypeError, match=r"generator must be an int .*, a torch.Generator or a sequence of one"):
        scored(slice(0, 7), "5")


@pytest.mark.parametrize("options", [
    {}, {"trace": Hutchinson(2)}, {"bound": "elbo", "samples": 3}, {"quantisation": Quantisation(8)},
    {"quantisation": Quantisation(8), "bound": "elbo", "samples": 2},
], ids=["sweep", "hutchinson", "elbo", "levels", "levels, elbo"])  # fmt: skip
def test_evaluations_do_not_depend_on_batches(options):
    data = PIXELS if "quantisation" in options else IMAGES.double()
    tolerances = {} if "bound" in options else COARSE
    net = of_images()
    found = [
        ndm_ct.evaluate(net, data, batch_size=size, seed=3, progress=False, **options, **tolerances)
        for size in (1, 3, 7)
    ]
    for each in found[1:]:
        assert torch.equal(each.indices, found[0].indices)
        torch.testing.assert_close(each.values, found[0].values, rtol=1e-6, atol=1e-6)
    differences = [
        ndm_ct.compare(net, model_b=net, data=data, batch_size=size, seed=3, progress=False, **options, **tolerances)
        for size in (2, 7)
    ]
    torch.testing.assert_close(*(each.values_a for each in differences), rtol=1e-6, atol=1e-6)


def test_samples_with_generators_of_their_own_have_densities_of_their_own():
    def drawn_with_density(size):
        x, info = ndm_ct.sample(
            of_images(), 5, batch_size=size, generator=seeds(5), return_info=True, dtype=torch.float64, **COARSE
        )
        return x, info.logp

    for parts, whole in zip(drawn_with_density(2), drawn_with_density(None), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
