"""The peers' protocols of the benchmark against exact densities, and their counts against hooks on the network."""

import sys

import pytest
import torch

import ndm_ct

peers = pytest.importorskip("bench.peers", reason="needs ndm-ct[bench]")

NEEDS = {
    "score_sde": "scipy.integrate",
    "flow_matching": "flow_matching.solver",
    "flow_matching_exact": "flow_matching.solver",
    "zuko": "zuko.transforms",
    "zuko_exact": "zuko.transforms",
    "torchdyn": "torchdyn.models",
    "torchdyn_exact": "torchdyn.models",
    "torchdiffeq_exact": "torchdiffeq",
}
EXACT = [name for name, peer in peers.PEERS.items() if peer.exact]
ONE_PROBE = [name for name, peer in peers.PEERS.items() if not peer.exact]

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages' own


@pytest.fixture
def peer(request):
    try:
        peers._package(NEEDS[request.param])
    except ImportError as error:
        pytest.skip(str(error))
    return peers.PEERS[request.param]


def rotated_gaussian(d=5):
    """Variances from 0.05 to 3 along rotated axes: no Jacobian of its flow is diagonal."""
    generator = torch.Generator().manual_seed(3)
    rotation, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    variances = torch.logspace(-1.3, 0.5, d, dtype=torch.float64)
    return ndm_ct.reference.Gaussian(torch.linspace(-1.0, 1.0, d), rotation @ variances.diag() @ rotation.T)


def rotated_mixture():
    cov = rotated_gaussian(4).marginals.covs[0]
    covs = torch.stack([cov, cov.flip(0, 1)])
    means = torch.tensor([[-1.0, 0.0, 0.5, 0.0], [1.0, 0.5, 0.0, -1.0]])
    return ndm_ct.reference.GaussianMixture(torch.tensor([0.3, 0.7]), means, covs)


class Net(torch.nn.Module):
    """A small network that counts its forward and backward passes."""

    def __init__(self, d):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(d + 1, 16), torch.nn.Tanh(), torch.nn.Linear(16, d))
        self.forwards = self.backwards = 0
        self.register_forward_hook(self.count_forward)
        self.layers.register_full_backward_hook(self.count_backward)

    def count_forward(self, *_):
        self.forwards += 1

    def count_backward(self, *_):
        self.backwards += 1

    def forward(self, z, t):
        return self.layers(torch.cat([z.flatten(1), t[:, None]], 1)).reshape(z.shape)


@pytest.mark.parametrize("peer", EXACT, indirect=True)
def test_exact_peers_reach_the_exact_density(peer, generator):
    model = rotated_mixture()
    x = model.sample_data(8, generator=generator)
    result = peer(model, x, 1e-6, generator)
    assert result.logp.dtype == torch.float64
    assert float((result.logp - model.log_prob(x)).abs().max()) < 1e-3


@pytest.mark.parametrize("peer", ONE_PROBE, indirect=True)
def test_one_probe_peers_are_unbiased(peer, generator):
    """256 probes per row: the mean within three standard errors, and an error large enough to mean something."""
    model = rotated_gaussian()
    x = model.sample_data(3, generator=generator)
    repeats = peer(model, x.repeat_interleave(256, 0), 1e-6, generator).logp.reshape(3, 256)
    stderr = repeats.std(1) / 16.0
    assert float(stderr.min()) > 0.02
    assert bool(((repeats.mean(1) - model.log_prob(x)).abs() < 3.0 * stderr).all())


@pytest.mark.parametrize("peer", peers.PEERS, indirect=True)
def test_counts_are_those_of_the_network(peer, generator):
    net = Net(4)
    model = ndm_ct.NDM(net, (4,), schedule=ndm_ct.schedules.LinearLogSNR(-6.0, 5.0)).train()
    x = torch.randn(5, 4, generator=generator)
    result = peer(model, x, 1e-3, generator)
    assert result.logp.shape == (5,)
    assert result.forward == net.forwards > 10
    batched = 4 if peer.name == "zuko_exact" else 1
    assert result.vjps == net.backwards * batched > 0
    per_pass = 0.5 if peer.name == "score_sde" else 4 if peer.exact else 1
    assert result.vjps == per_pass * result.forward
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("peer", ONE_PROBE, indirect=True)
def test_probes_come_from_the_generator_alone(peer, generator):
    model = ndm_ct.NDM(Net(4), (1, 2, 2), schedule=ndm_ct.schedules.LinearLogSNR(-6.0, 5.0))
    x = torch.randn(3, 1, 2, 2, generator=generator)
    state = torch.get_rng_state()
    first, again, other = (peer(model, x, 1e-3, torch.Generator().manual_seed(seed)).logp for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_exact_divergence_of_flow_matching_takes_flat_events_only(generator):
    pytest.importorskip("flow_matching.solver")
    model = ndm_ct.NDM(Net(4), (1, 2, 2))
    with pytest.raises(ValueError, match=r"flat events \(B, D\), got x of shape \(3, 1, 2, 2\)"):
        peers.PEERS["flow_matching_exact"](model, torch.randn(3, 1, 2, 2), 1e-3, generator)


@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != "torchdiffeq_exact"])
def test_a_missing_package_is_named_only_when_it_is_used(name, monkeypatch):
    for module in ("scipy.integrate", "flow_matching.solver", "zuko.transforms", "torchdyn.core"):
        monkeypatch.setitem(sys.modules, module, None)
    model, package = rotated_gaussian(), name.removesuffix("_exact").replace("score_sde", "scipy")
    with pytest.raises(ImportError, match=rf"needs {package}\..*pip install {package}"):
        peers.PEERS[name](model, torch.zeros(1, 5, dtype=torch.float64))
    assert peers.PEERS["torchdiffeq_exact"](model, torch.zeros(1, 5, dtype=torch.float64), 1e-2).vjps > 0
