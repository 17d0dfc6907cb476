"""Couplings: optimal where the optimum is known, with the right marginals, and bridges whose velocity is known."""

import itertools

import pytest
import torch

import ndm_ct
from ndm_ct import NDM, schedules
from ndm_ct._core.seeds import make_generator
from ndm_ct.objectives import Coupled, Regression, couple
from ndm_ct.prior import DataPrior

pytest.importorskip("ot")
M0, S0, M1, S1 = 2.0, 0.5, -1.0, 1.5  # data N(M0, S0^2) and source N(M1, S1^2), in one dimension


def normal(n, mean, std, seed, d=1):
    return mean + std * torch.randn(n, d, dtype=torch.float64, generator=make_generator(seed))


def straight(z, t):
    """The velocity of optimal transport between the two normal laws, z = (1 - t) x + t e."""
    t = t[:, None]
    std, mean = (1.0 - t) * S0 + t * S1, (1.0 - t) * M0 + t * M1
    return M1 - M0 + (S1 - S0) / std * (z - mean)


def bridge(predictor=straight, n=1000):
    return NDM(
        predictor, (1,), schedule=schedules.Rectified(), prediction="velocity", t_min=0.0, checks=False,
        prior=DataPrior(normal(n, M1, S1, 7)),
    )  # fmt: skip


def test_the_exact_coupling_keeps_the_order_on_a_line():
    x, e = normal(50, 0.0, 1.0, 0), normal(50, 3.0, 2.0, 1)
    partner = e[couple(x, e)]
    assert torch.equal(partner[x.flatten().argsort()], e.sort(0).values)


def test_the_exact_coupling_is_the_cheapest():
    x, e = normal(5, 0.0, 1.0, 0, d=3), normal(5, 0.0, 1.0, 1, d=3)
    orders = torch.tensor(list(itertools.permutations(range(5))))
    costs = (x - e[orders]).square().sum((1, 2))
    assert torch.equal(couple(x, e), orders[costs.argmin()])


def test_the_entropic_coupling_lies_between():
    x, e = normal(120, 0.0, 1.0, 0, d=2), normal(120, 0.0, 1.0, 1, d=2)

    def cost(name, **options):
        return float((x - e[couple(x, e, name, generator=0, **options)]).square().sum(1).mean())

    costs = [cost("exact"), cost("entropic", regularisation=0.02), cost("entropic", regularisation=0.5)]
    assert costs[0] < costs[1] < costs[2] < cost("independent")
    assert not torch.equal(couple(x, e, "entropic", generator=0), couple(x, e, "entropic", generator=1))
    assert torch.equal(couple(x, e, "entropic", generator=0), couple(x, e, "entropic", generator=0))


def test_the_velocity_of_a_bridge_is_that_of_optimal_transport():
    """Pairs of the exact coupling leave no ambiguity: their regression vanishes at the known velocity alone."""
    model, x = bridge(n=4000), normal(400, M0, S0, 3)
    losses = {
        name: float(Coupled("velocity", coupling=name)(model, x, generator=0).mean())
        for name in ("exact", "independent")
    }
    assert losses["exact"] < 0.03
    assert losses["independent"] > 1.0
    for change in (lambda z, t: straight(z, t) + 0.3, lambda z, t: 1.2 * straight(z, t)):
        assert float(Coupled()(bridge(change, n=4000), x, generator=0).mean()) > losses["exact"] + 0.05


def test_a_bridge_takes_one_law_to_the_other():
    model = bridge(n=20_000)
    drawn = ndm_ct.sample(model, 3000, generator=0, dtype=torch.float64)
    assert float(drawn.mean()) == pytest.approx(M0, abs=0.05)
    assert float(drawn.std()) == pytest.approx(S0, rel=0.06)
    x = normal(20, M0, S0, 4)
    torch.testing.assert_close(ndm_ct.encode(model, x), M1 + S1 / S0 * (x - M0), atol=1e-4, rtol=0.0)
    with pytest.raises(ValueError, match="a data set, which has no density"):
        ndm_ct.loglik(model, x)


@pytest.mark.slow
def test_a_trained_bridge_is_the_known_one():
    torch.manual_seed(0)
    model = bridge(ndm_ct.nn.MLP(1, width=32, depth=2).double())
    ndm_ct.fit(
        model, normal(20_000, M0, S0, 5), steps=600, batch_size=128, lr=3e-3, objective=Coupled(), progress=False
    )
    x = normal(500, M0, S0, 6)
    error = ndm_ct.encode(model, x) - (M1 + S1 / S0 * (x - M0))
    assert float(error.square().mean().sqrt()) < 0.1 * S1


def test_rows_of_one_class_are_coupled_among_themselves():
    """Else the noise of the class at the left would lie at the left, which the prior of a class does not."""

    def labelled(z, t, label=None):
        return -z

    model = NDM(labelled, (1,), schedule=schedules.Rectified(), prediction="velocity", t_min=0.0, checks=False)
    label = torch.arange(400) % 2
    x = normal(400, 0.0, 0.1, 0) + 6.0 * label[:, None]
    given = model.conditioning({"label": label}, x, Coupled.__call__)
    for objective, shift in ((Coupled(label="label"), 0.0), (Coupled(), 1.0)):
        noise = objective._noise(model, x, make_generator(1), given)
        means = torch.stack([noise[label == k].mean() for k in range(2)])
        assert float(means[1] - means[0]) == pytest.approx(1.6 * shift, abs=0.2)  # two halves of a normal: 2 sqrt(2/pi)
    loss = Coupled(label="label")(model, x, label=label, generator=0)
    assert loss.shape == (400,)


def test_an_independent_coupling_is_the_regression():
    model = NDM(lambda z, t: -z, (1,), schedule=schedules.Rectified(), prediction="velocity", t_min=0.0, checks=False)
    x = normal(6, 0.0, 1.0, 0)
    kinds = Coupled(coupling="independent"), Regression("velocity")
    losses = [kind(model, x, generator=make_generator(0)) for kind in kinds]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Coupled(coupling="exat"), "did you mean 'exact'"), (lambda: Coupled(regularisation=0.1), "has no effect"),
    (lambda: Coupled(coupling="entropic", regularisation=0.0), "regularisation must be positive"),
    (lambda: Coupled("score"), "target='score' is unknown"),
    (lambda: couple(torch.zeros(2, 1), torch.zeros(3, 1)), "must have one shape"),
    (lambda: couple(torch.zeros(2, 1), torch.ones(2, 1), "entropic", generator=[torch.Generator(), torch.Generator()]),
     "generator must be a seed"),
    (lambda: Coupled()(NDM(lambda z, t: z, (1,), checks=False), torch.zeros(2, 1)), "Take Rectified"),
    (lambda: Coupled(label="kind")(bridge(), torch.zeros(2, 1).double()), "names no conditioning"),
    (lambda: DataPrior(torch.zeros(0, 2)), "must have rows"), (lambda: DataPrior(torch.ones(2).long()), "real numbers"),
    (lambda: DataPrior([1.0]), "data must be a torch.Tensor"),
])  # fmt: skip
def test_unusable_arguments(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
