"""Whitening and clusters: their log-determinants, and exact densities through them."""

import math

import pytest
import torch
from torch import nn

import ndm_ct
from ndm_ct import NDM, schedules, transforms

SCHEDULE = schedules.LinearLogSNR(-14.0, 5.0)


class Normal:
    """The exact prediction for data of N(0, I) under a variance-preserving schedule."""

    def __call__(self, z, t):
        return SCHEDULE.alpha(t.double())[:, None].to(z) * z


def model_behind(transform, d):
    return NDM(Normal(), (d,), transform=transform, schedule=SCHEDULE, checks=False)


def correlated(n, d):
    return torch.randn(n, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64) + 2.0


def test_whitening_is_exact_for_a_gaussian():
    x = correlated(300, 3)
    whitening = transforms.Whitening.of(x)
    law = torch.distributions.MultivariateNormal(x.mean(0), x.mT.cov())
    y, log_det = whitening.to_latent(x)
    torch.testing.assert_close(y.mT.cov(), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(whitening.from_latent(y), x)
    jacobian = torch.func.jacrev(lambda row: whitening.to_latent(row[None])[0][0])(x[0])
    torch.testing.assert_close(log_det, jacobian.det().log().expand(300))
    found = ndm_ct.loglik(model_behind(whitening, 3), x[:5])
    assert (found - law.log_prob(x[:5])).abs().max() < 1e-4


def test_whitening_of_dependent_columns_is_refused():
    x = torch.randn(50, 1).repeat(1, 2)
    with pytest.raises(ValueError, match="a direction in which they do not vary"):
        transforms.Whitening.of(x)


def labelled():
    label = torch.arange(90) % 3
    spread = torch.tensor([[0.5, 1.0], [2.0, 0.3], [1.0, 1.0]], dtype=torch.float64)
    x = torch.randn(90, 2, dtype=torch.float64) * spread[label] + 4.0 * label[:, None]
    return x[:-10], label[:-10]


def test_clusters_are_a_mixture_of_what_is_inside():
    x, label = labelled()
    clusters = transforms.Clusters.of(x, label)
    model = model_behind(clusters, 2)
    expected = []
    for k in range(3):
        mean, std = x[label == k].mean(0), x[label == k].std(0)
        law = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
        found = ndm_ct.loglik(model, x[:4], label=torch.full((4,), k))
        assert (found - law.log_prob(x[:4])).abs().max() < 1e-4
        expected.append(math.log(float((label == k).double().mean())) + law.log_prob(x[:4]))
    found = clusters.marginal(lambda label: ndm_ct.loglik(model, x[:4], label=label), 4)
    assert (found - torch.stack(expected).logsumexp(0)).abs().max() < 1e-4


def test_labels_are_drawn_by_their_shares():
    x, label = labelled()
    clusters = transforms.Clusters.of(x, label)
    drawn = clusters.sample_label(6000, generator=1)
    share = torch.bincount(drawn, minlength=3) / 6000
    torch.testing.assert_close(
        share.double(), torch.bincount(label) / len(label), atol=0.03, rtol=0.0, check_dtype=False
    )
    sampled = ndm_ct.sample(model_behind(clusters, 2), 6000, method="ddim", steps=10, label=drawn, generator=2)
    for k in range(3):
        torch.testing.assert_close(sampled[drawn == k].mean(0).double(), clusters.means[k], atol=0.2, rtol=0.0)


@pytest.mark.parametrize(
    ("label", "message"),
    [(None, "got NoneType"), (torch.zeros(2), "float32"), (torch.tensor([0, 3]), r"lie in 0 \.\.\. 2"),
     (torch.tensor([0]), r"shape \(1,\)")],
)  # fmt: skip
def test_labels_that_name_no_cluster_are_refused(label, message):
    clusters = transforms.Clusters((2,), 3)
    with pytest.raises(ValueError, match=message):
        clusters.to_latent(torch.randn(2, 2), label=label)


def test_a_cluster_of_one_row_is_refused():
    with pytest.raises(ValueError, match="fewer than two rows"):
        transforms.Clusters.of(torch.randn(3, 2), torch.tensor([0, 0, 1]))


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = ndm_ct.nn.MLP(2)

    def forward(self, z, t, label):
        return self.net(z, t) * (1.0 + label[:, None])


@pytest.mark.parametrize("kind", ["whitening", "clusters"])
def test_files_keep_what_was_measured(kind, tmp_path):
    x, label = labelled()
    x, cond = x.float(), {"label": label} if kind == "clusters" else {}
    transform = transforms.Clusters.of(x, label) if cond else transforms.Whitening.of(x)
    model = NDM(ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(2)), (2,), transform=transform)
    ndm_ct.save(model, tmp_path / "model.safetensors")
    again = ndm_ct.load(tmp_path / "model.safetensors")
    assert torch.equal(ndm_ct.elbo(again, x, generator=1, **cond), ndm_ct.elbo(model.eval(), x, generator=1, **cond))


def test_clusters_go_before_a_learned_log_snr():
    """And their label reaches a predictor that takes it."""
    x, label = labelled()
    scaling = transforms.LearnedScaling((2,), learn_start=True)
    both = transforms.Composed(scaling, transforms.Clusters.of(x.float(), label))
    model = NDM(Labelled(), (2,), transform=both, volatility=schedules.Matched())
    ndm_ct.fit(model, x.float(), cond={"label": label}, steps=3, batch_size=20, progress=False)
    assert bool(ndm_ct.elbo(model, x.float(), label=label).isfinite().all())
