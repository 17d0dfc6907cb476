"""Importance sampling of times: unbiased for any density, and the best density in the end."""

import math

import pytest
import torch

import ndm_ct
from ndm_ct import nn, objectives, schedules
from ndm_ct.objectives.time_samplers import LearnedBuckets, LossHistory

SAMPLERS = {"history": LossHistory, "learned": LearnedBuckets}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(n, generator):
    return torch.rand(n, dtype=torch.float64, generator=generator)


def trained(kind, scale, steps=3000, buckets=16, **options):
    """A sampler that has seen losses whose root mean square is ``scale(v)``, with noise."""
    sampler, generator = SAMPLERS[kind](buckets, **options), seeded()
    for _ in range(steps):
        v, _ = sampler(uniform(64, generator))
        noise = torch.exp(0.5 * torch.randn(64, dtype=torch.float64, generator=generator) - 0.25)
        sampler.observe(v, scale(v) * noise)
    return sampler


def steep(v):
    return torch.exp(-4.0 * v) + 0.05


@pytest.mark.parametrize("kind", SAMPLERS)
def test_weighted_mean_is_the_integral(kind):
    """By a fine grid of u, whatever has been learned; every v in its bucket, none outside [0, 1)."""
    sampler = trained(kind, steep, steps=200)
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    v, weight = sampler(u)
    assert float(v.min()) >= 0.0
    assert float(v.max()) < 1.0
    assert bool((v.diff() >= 0.0).all())
    assert float(weight.max()) <= 1.0 / sampler.mix + 1e-9
    for f, integral in ((torch.sin, 1.0 - math.cos(1.0)), (torch.exp, math.e - 1.0)):
        assert float((weight * f(v)).mean()) == pytest.approx(integral, rel=2e-6)
    share = torch.bincount((v * sampler.buckets).long(), minlength=sampler.buckets) / len(u)
    torch.testing.assert_close(share, sampler.probabilities(), rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_density_tends_to_the_root_of_the_second_moment(kind):
    options = {"memory": 2000} if kind == "history" else {"rate": 0.02}
    sampler = trained(kind, steep, mix=1e-3, **options)
    middles = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    best = steep(middles) / steep(middles).sum()
    torch.testing.assert_close(sampler.probabilities(), best, rtol=0.15, atol=0.0)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_variance_is_near_its_least(kind):
    sampler = trained(kind, steep, buckets=32)
    v, weight = sampler(uniform(400_000, seeded(1)))
    found = float((weight * steep(v)).var())
    plain = float(steep(uniform(400_000, seeded(1))).var())
    assert found < 0.05 * plain  # the least for exact shares of the buckets is 0.011 of it


def test_uniform_until_every_bucket_is_known():
    sampler = LossHistory(4)
    sampler.observe(torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64), torch.tensor([9.0, 1.0, 1.0]))
    assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    sampler.observe(torch.tensor([0.9], dtype=torch.float64), torch.tensor([1.0]))
    expected = 0.95 * torch.tensor([9.0, 1.0, 1.0, 1.0], dtype=torch.float64) / 12.0 + 0.0125
    torch.testing.assert_close(sampler.probabilities(), expected)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_losses_of_zero_change_nothing(kind):
    sampler = SAMPLERS[kind](4)
    v = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    sampler.observe(v, torch.zeros(4))
    assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))


def test_loss_with_a_sampler_is_unbiased():
    """On an exact model, with a strongly tilted density, in units of the standard error."""
    model = ndm_ct.reference.GaussianMixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[-1.5], [1.5]]), 0.1 * torch.ones(2, 1, 1),
        schedule=schedules.LinearLogSNR(-6.0, 5.0),
    )  # fmt: skip
    x = model.sample_data(1, generator=seeded()).expand(20_000, 1).contiguous()
    sampler = LearnedBuckets(8)
    sampler.logits.copy_(torch.linspace(-1.5, 1.5, 8))
    tilted = torch.stack(
        [objectives.loss(model, x[:500], sampler=frozen(sampler), generator=seeded(k)).mean() for k in range(60)]
    )
    plain = torch.stack([objectives.loss(model, x[:500], generator=seeded(100 + k)).mean() for k in range(60)])
    error = (tilted.var() / 60 + plain.var() / 60).sqrt()
    assert abs(float((tilted.mean() - plain.mean()) / error)) < 3.5
    wrong = frozen(sampler)
    wrong.forward = lambda u: (sampler(u)[0], torch.ones_like(u))
    biased = torch.stack(
        [objectives.loss(model, x[:500], sampler=wrong, generator=seeded(k)).mean() for k in range(60)]
    )
    assert abs(float((biased.mean() - plain.mean()) / error)) > 10.0


def frozen(sampler):
    """A copy that learns nothing."""
    copy = LearnedBuckets(sampler.buckets, sampler.mix)
    copy.load_state_dict(sampler.state_dict())
    copy._learn = lambda k, square: None
    return copy


def toy():
    torch.manual_seed(0)
    return ndm_ct.NDM(nn.Preconditioned(nn.MLP(2, width=8)), (2,), schedule=schedules.LinearLogSNR(-8.0, 5.0))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_training_with_a_sampler_resumes_to_the_same_weights(tmp_path, kind):
    """The sampler's state is part of the checkpoint; other settings are refused."""
    x = torch.randn(128, 2, generator=seeded())
    options = {"steps": 12, "batch_size": 32, "progress": False, "checkpoint_every": 5}

    def bound(**settings):
        return objectives.Bound(SAMPLERS[kind](6, **settings))

    whole = toy()
    ndm_ct.fit(whole, x, objective=bound(), run_dir=tmp_path / "whole", **options)
    first = bound()

    class Stop(Exception):
        pass

    def interrupted(model, x, **kwargs):
        if interrupted.calls == 8:
            raise Stop
        interrupted.calls += 1
        return original(model, x, **kwargs)

    interrupted.calls, original = 0, first.forward
    first.forward = interrupted
    part = toy()
    with pytest.raises(Stop):
        ndm_ct.fit(part, x, objective=first, run_dir=tmp_path / "part", **options)
    resumed = toy()
    second = bound()
    ndm_ct.fit(resumed, x, objective=second, run_dir=tmp_path / "part", **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    fresh = bound()
    assert not torch.equal(second.sampler.probabilities(), fresh.sampler.probabilities())
    with pytest.raises(ValueError, match="objective was 'Bound"):
        ndm_ct.fit(resumed, x, objective=bound(mix=0.5), run_dir=tmp_path / "part", **options)


def test_bad_settings():
    with pytest.raises(ValueError, match="mix must lie in"):
        LossHistory(mix=0.0)
    with pytest.raises(ValueError, match="rate must be positive"):
        LearnedBuckets(rate=0.0)
    with pytest.raises(ValueError, match="buckets must be at least 1"):
        LossHistory(0)
