"""Parts of classes that are not this library's: saved by weights and loaded by passing them, or registered."""

import pytest
import torch

import ndm_ct
from ndm_ct import adapters, schedules, transforms
from ndm_ct._core.config import Configurable
from ndm_ct.prior import DataPrior

X = torch.linspace(-1.0, 1.0, 6).reshape(3, 2)
NORMAL = torch.distributions.MultivariateNormal(torch.zeros(2), 1.5 * torch.eye(2))


class OwnNet(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.width = width
        self.inner, self.outer = torch.nn.Linear(3, width), torch.nn.Linear(width, 2)

    def forward(self, z, k):
        return self.outer(torch.tanh(self.inner(torch.cat([z, k[:, None].to(z) / 1000.0], 1))))


class OwnTransform(transforms.Transform):
    """F = (1 + a t) x."""

    linear = True

    def __init__(self, rate=0.5):
        super().__init__()
        self.rate = rate

    def forward(self, x, t, /):
        return (1.0 + self.rate * t.to(x)).reshape(-1, *(1,) * (x.ndim - 1)) * x


class OwnSchedule(schedules.LinearLogSNR):
    def __init__(self, shift=0.0):
        super().__init__(-9.0 + shift, 5.0 + shift)
        self.shift = shift


class Ramp(torch.nn.Module):
    def __init__(self, slope=1.0):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(slope))

    def forward(self, t):
        return 1.0 + self.slope * t


class Gaussian(torch.nn.Module):
    """A prior N(0, scale^2)."""

    def __init__(self, scale):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor(float(scale)).log())

    def log_prob(self, z):
        return torch.distributions.Normal(0.0, self.log_scale.exp()).log_prob(z).sum(1)


@pytest.fixture
def registry():
    before = dict(Configurable.registry)
    yield Configurable.registry
    Configurable.registry.clear()
    Configurable.registry.update(before)


def model(**options):
    torch.manual_seed(0)
    return ndm_ct.NDM(ndm_ct.nn.MLP(2, width=8), (2,), **options)


def agrees(saved, loaded):
    generator = {"generator": 0} if saved.prediction == "x" else {}
    values = [ndm_ct.elbo(each, X, **generator) for each in (saved, loaded)]
    return torch.equal(*values) and torch.equal(*(ndm_ct.loglik(each, X) for each in (saved, loaded)))


PARTS = {
    "schedule": [lambda: OwnSchedule(1.0), lambda: schedules.FromLogSNR(lambda t: 9.0 - 14.0 * t)],
    "volatility": [lambda: Ramp(2.0), lambda: lambda t: 1.0 + t],
    "prior": [lambda: NORMAL, lambda: Gaussian(1.5)],
    "transform": [lambda: OwnTransform()],
}


@pytest.mark.parametrize(("name", "make"), [(name, make) for name, makers in PARTS.items() for make in makers])
def test_a_part_of_ones_own_is_passed_again(tmp_path, name, make):
    part = make()
    saved = model(**{name: part})
    ndm_ct.save(saved, tmp_path / "m")
    with pytest.raises(ValueError, match=f"pass load\\(path, {name}=...\\)"):
        ndm_ct.load(tmp_path / "m")
    assert agrees(saved, ndm_ct.load(tmp_path / "m", **{name: make()}))


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("schedule", lambda: OwnSchedule(1.0), lambda: OwnSchedule(1.001)),
        ("volatility", lambda: lambda t: 1.0 + t, lambda: lambda t: 1.0 + t**2),
        ("prior", lambda: NORMAL, lambda: torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))),
    ],
)
def test_a_part_without_weights_that_differs_is_refused(tmp_path, name, right, wrong):
    ndm_ct.save(model(**{name: right()}), tmp_path / "m")
    with pytest.raises(ValueError, match=f"{name} is not the one that was saved"):
        ndm_ct.load(tmp_path / "m", **{name: wrong()})


def test_the_weights_of_a_schedule_and_a_prior_of_ones_own_come_from_the_file(tmp_path):
    saved = model(volatility=Ramp(2.0), prior=Gaussian(1.5))
    ndm_ct.save(saved, tmp_path / "m")
    loaded = ndm_ct.load(tmp_path / "m", volatility=Ramp(0.3), prior=Gaussian(0.7))
    assert agrees(saved, loaded)


def test_an_adapted_network_is_passed_without_its_adapter(tmp_path):
    table = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000), 0)
    saved = adapters.from_eps(OwnNet(), (2,), alphas_cumprod=table)
    ndm_ct.save(saved, tmp_path / "m")
    loaded = ndm_ct.load(tmp_path / "m", predictor=OwnNet())
    assert loaded.adapted
    assert torch.equal(ndm_ct.loglik(saved, X), ndm_ct.loglik(loaded, X))
    whole = ndm_ct.load(tmp_path / "m", predictor=type(saved.predictor)(OwnNet(), 1000))
    assert torch.equal(ndm_ct.loglik(saved, X), ndm_ct.loglik(whole, X))


def test_a_data_set_in_place_of_noise_is_passed_again(tmp_path):
    """It has no density, by which it could be told from another."""
    saved = model(prior=DataPrior(X), schedule=schedules.Rectified())
    ndm_ct.save(saved, tmp_path / "m")
    loaded = ndm_ct.load(tmp_path / "m", prior=DataPrior(X))
    assert torch.equal(ndm_ct.sample(saved, 2, generator=0), ndm_ct.sample(loaded, 2, generator=0))


def test_registered_classes_are_rebuilt(tmp_path, registry):
    for cls in (OwnNet, OwnTransform, OwnSchedule):
        assert ndm_ct.register(cls) is cls
    options = {"schedule": OwnSchedule(0.5), "transform": OwnTransform(0.25)}
    saved = ndm_ct.NDM(ndm_ct.nn.Preconditioned(OwnNet(5)), (2,), **options)
    ndm_ct.save(saved, tmp_path / "m")
    loaded = ndm_ct.load(tmp_path / "m")
    assert (loaded.schedule.shift, loaded.transform.rate, loaded.predictor.net.width) == (0.5, 0.25, 5)
    assert agrees(saved, loaded)
    with pytest.raises(ValueError, match="leave schedule out"):
        ndm_ct.load(tmp_path / "m", schedule=OwnSchedule(0.5))
    del registry["OwnSchedule"]
    with pytest.raises(ndm_ct.CheckpointError, match=r"class 'OwnSchedule'.*import the module that registers it"):
        ndm_ct.load(tmp_path / "m")


def test_what_cannot_be_registered_is_refused(registry):
    class Options(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()

    class MLP(torch.nn.Module):
        pass

    with pytest.raises(TypeError, match="takes \\*args or \\*\\*kwargs"):
        ndm_ct.register(Options)
    with pytest.raises(ValueError, match="has a class MLP already"):
        ndm_ct.register(MLP)
    with pytest.raises(TypeError, match="decorates a class, got OwnNet"):
        ndm_ct.register(OwnNet())


def test_a_registered_class_that_forgets_its_arguments_is_passed_again(tmp_path, registry):
    @ndm_ct.register
    class Forgetful(schedules.LinearLogSNR):
        def __init__(self, shift=0.0):
            super().__init__(-9.0 + shift, 5.0 + shift)

    saved = model(schedule=Forgetful(0.5))
    ndm_ct.save(saved, tmp_path / "m")
    with pytest.raises(ValueError, match="pass load\\(path, schedule="):
        ndm_ct.load(tmp_path / "m")
    assert agrees(saved, ndm_ct.load(tmp_path / "m", schedule=Forgetful(0.5)))
