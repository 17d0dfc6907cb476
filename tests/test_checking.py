"""Networks, transforms and schedules that are not what the mathematics assumes are named before work is spent."""

import copy
import importlib

import pytest
import torch
from torch import nn

import ndm_ct
from ndm_ct import NDM, PredictorError, adapters, schedules, transforms
from ndm_ct.schedules import Coefficients

SCHEDULE = schedules.LinearLogSNR(-4.0, 3.0)
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


def model(predictor, **options):
    return NDM(predictor, options.pop("event_shape", (3,)), **{"schedule": SCHEDULE} | options)


class Net(nn.Module):
    """A perceptron with one fault."""

    def __init__(self, fault=""):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.fault = nn.Linear(4, 16), nn.Linear(16, 3), fault
        self.norm = nn.BatchNorm1d(16, track_running_stats=False) if fault == "BatchNorm" else None
        self.calls = 0

    def forward(self, z, t):
        self.calls += 1
        z = z - z.mean(0, keepdim=True) if self.fault == "centred" else z
        t = t[:1].expand_as(t) if self.fault == "one time" else t
        h = torch.tanh(self.first(torch.cat([z, t[:, None]], 1)))
        match self.fault:
            case "dropout":
                h = nn.functional.dropout(h, 0.1)
            case "noise":
                h = h + 1e-2 * torch.randn_like(h)
            case "BatchNorm":
                h = self.norm(h)
            case "std":
                h = h / (1.0 + h.std())
            case "half detached":
                h = torch.cat([h[:, :8].detach(), h[:, 8:]], 1)
        return 0.3 * self.second(h)


class Doubled(torch.autograd.Function):
    """The identity with a wrong derivative."""

    @staticmethod
    def forward(z):
        return z.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2.0 * gradient


RANDOM, MIXED, HIDDEN = (
    "different answers for the same z and t",
    "depends on the other rows|not one row",
    "autograd sees",
)


@pytest.mark.parametrize("trace", ["exact", "quadrature"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dropout", RANDOM), ("noise", RANDOM), ("BatchNorm", MIXED), ("centred", MIXED), ("std", MIXED),
        ("one time", MIXED), ("half detached", HIDDEN),
    ],
)  # fmt: skip
def test_a_density_that_would_be_wrong_is_refused(fault, message, trace):
    with pytest.raises(PredictorError, match=message):
        ndm_ct.loglik(model(Net(fault)), X, trace=trace)
    with pytest.raises(PredictorError, match=message):
        ndm_ct.check(model(Net(fault)), X)


def test_a_part_behind_detach_and_a_wrong_backward_are_refused():
    for predictor in (lambda z, t: 0.3 * z + 0.3 * z.detach(), lambda z, t: 0.5 * Doubled.apply(z)):
        with pytest.raises(PredictorError, match="only a part of it"):
            ndm_ct.loglik(model(predictor), X)


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.08])
def test_a_row_in_which_the_network_is_constant_is_not_refused(shift):
    """A ReLU that is dead near its kink: the derivative is zero, and right."""
    dead = model(lambda z, t: torch.relu(z - 3.0 - shift))
    x = torch.full((1, 3), 2.95)
    other = torch.cat([x, X])
    torch.testing.assert_close(ndm_ct.loglik(dead, x)[0], ndm_ct.loglik(dead, other)[0], rtol=0.0, atol=1e-4)


class Wrong(schedules.Schedule):
    def __init__(self, alpha=1.0, sigma=1.0):
        super().__init__()
        self.factors = alpha, sigma

    def forward(self, t):
        c = SCHEDULE(t)
        return Coefficients(c.alpha, c.sigma, self.factors[0] * c.dalpha, self.factors[1] * c.dsigma)


class Moving(transforms.Transform):
    def __init__(self, factor=1.0, start=1.0):
        super().__init__()
        self.factor, self.start = factor, start

    def forward(self, x, t, **cond):
        return x * (self.start + 0.7 * t).to(x.dtype).reshape(-1, 1)

    def with_derivative(self, x, t, **cond):
        return self(x, t), self.factor * 0.7 * x


def test_a_schedule_with_a_wrong_derivative_is_refused():
    net = ndm_ct.nn.MLP(3, width=8)
    for wrong, name in ((Wrong(alpha=2.0), "dalpha"), (Wrong(sigma=2.0), "dsigma"), (Wrong(sigma=0.5), "dsigma")):
        for work in (
            lambda m: ndm_ct.loglik(m, X),
            lambda m: ndm_ct.fit(m, X, steps=1, progress=False),
            lambda m: ndm_ct.sample(m, 2, method="ddim", steps=2),
        ):
            with pytest.raises(ValueError, match=name):
                work(model(net, schedule=wrong))
    ndm_ct.check(model(net, schedule=Wrong()), X)


@pytest.mark.parametrize("prediction", ["x", "moments"])
def test_a_transform_with_a_wrong_derivative_or_start_is_refused(prediction):
    net = ndm_ct.nn.MLP(3, width=8, outputs=2 if prediction == "moments" else None)
    net = ndm_ct.nn.Preconditioned(net, prediction)
    make = lambda **wrong: model(net, transform=Moving(**wrong), prediction=prediction)  # noqa: E731
    ndm_ct.check(make(), X)
    for factor in (0.0, 0.5, 2.0):
        with pytest.raises(ValueError, match="finite difference of F"):
            ndm_ct.loglik(make(factor=factor), X)
        with pytest.raises(ValueError, match="finite difference of F"):
            ndm_ct.fit(make(factor=factor), X, steps=1, progress=False)
    with pytest.raises(ValueError, match=r"F\(x, 0\) different from x \(20 % apart\)"):
        ndm_ct.loglik(make(start=1.2), X)
    with pytest.warns(UserWarning, match=r"F\(x, 0\) different from x"):
        ndm_ct.fit(make(start=1.2), X, steps=1, progress=False)


def test_a_transform_of_another_shape_or_dtype_is_named():
    for change in (lambda F: F.double(), lambda F: F[:, :1]):
        other = Moving()
        other.forward = lambda x, t, change=change, own=other.forward, **cond: change(own(x, t))
        with pytest.raises(ValueError, match="the transform Moving returned F of shape"):
            ndm_ct.check(model(ndm_ct.nn.MLP(3, width=8), transform=other), X)


class Stiff(nn.Module):
    """Large weights, kinks, and fast functions of time: far from smooth on the scale of the noise."""

    def __init__(self, gain, activation):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(5, 64), activation, nn.Linear(64, 64), activation, nn.Linear(64, 64), activation, nn.Linear(64, 3)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)

    def forward(self, z, t):
        return self.layers(torch.cat([z, torch.sin(1000.0 * t)[:, None], torch.cos(1000.0 * t)[:, None]], 1))


class Autocast(nn.Module):
    """Half precision inside."""

    def __init__(self):
        super().__init__()
        self.net = ndm_ct.nn.MLP(3, width=32)
        nn.init.normal_(self.net.output.weight, std=0.2)

    def forward(self, z, t):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(z, t).float()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.enter, self.leave = nn.Linear(2, 8), nn.Linear(8, 1)

    def forward(self, z, t):
        return self.leave(self.inner(self.enter(torch.stack([z, t[:, None].expand_as(z)], -1)))).squeeze(-1)


def unet():
    torch.manual_seed(0)
    net = ndm_ct.nn.Preconditioned(ndm_ct.nn.UNet(1, width=8))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


PREDICTORS = {
    **{f"gain {gain} {type(a).__name__}": (lambda gain=gain, a=a: Stiff(gain, a))
       for gain in (1.0, 4.0, 20.0) for a in (nn.ReLU(), nn.Tanh(), nn.SiLU())},
    "autocast": Autocast,
    "attention": Attention,
    "half precision": lambda: (
        lambda z, t: torch.tanh(z.bfloat16() + t.bfloat16()[(...,) + (None,) * (z.ndim - 1)]).to(z)
    ),
    "rounded": lambda: lambda z, t: torch.relu(z).bfloat16().to(z.dtype),
    "zero": lambda: lambda z, t: torch.zeros_like(z),
    "constant in z": lambda: lambda z, t: torch.ones_like(z) * t[:, None],
    "step": lambda: lambda z, t: torch.sigmoid(1e4 * z),
    "linear": lambda: lambda z, t: 0.5 * z,
    "GroupNorm": unet,
}  # fmt: skip
SCHEDULES = {
    "narrow": (lambda: SCHEDULE, 1.0),
    "narrow, data too large": (lambda: SCHEDULE, 1e3),
    "default, data too small": (schedules.LinearLogSNR, 1e-3),
    "Rectified": (schedules.Rectified, 1.0),
    "Cosine": (schedules.Cosine, 1.0),
    "VarianceExploding": (lambda: schedules.VarianceExploding(0.01, 100.0), 1.0),
    "VarianceExploding, scaled": (lambda: schedules.VarianceExploding(1.0, 1e5), 1e3),
    "LearnedLogSNR": (schedules.LearnedLogSNR, 1.0),
}


@pytest.mark.parametrize(("schedule", "unit"), SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", PREDICTORS)
def test_no_false_alarm(name, schedule, unit):
    predictor = PREDICTORS[name]()
    shape = (1, 8, 8) if name == "GroupNorm" else (3,)
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64:
            if name == "autocast":
                continue
            predictor = predictor.double() if isinstance(predictor, nn.Module) else predictor
        x = unit * torch.randn(4, *shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
        ndm_ct.checking.verify(
            built := model(predictor, event_shape=shape, schedule=schedule().to(dtype)),
            x, built.validate(x, {}, ndm_ct.check), "likelihood",
        )  # fmt: skip


TRANSFORMS = {
    "Neural": lambda: transforms.Neural(Stiff(2.0, nn.SiLU())),
    "Neural, stiff": lambda: transforms.Neural(Stiff(20.0, nn.ReLU())),
    "Separable": lambda: transforms.Separable(ndm_ct.nn.MLP(3, width=8, outputs=2, time=False)),
    "LearnedScaling": lambda: transforms.LearnedScaling((3,)),
    "Composed": lambda: transforms.Composed(transforms.LearnedScaling((3,)), transforms.Neural(Stiff(1.0, nn.Tanh()))),
}


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_no_false_alarm_of_transforms(make):
    ndm_ct.check(model(Stiff(1.0, nn.Tanh()), transform=make()), X)


def test_it_is_done_once_until_the_model_changes_and_can_be_turned_off():
    net = Net()
    built = model(net)
    state, torch_state = copy.deepcopy(built.state_dict()), torch.get_rng_state()

    def calls(**options):
        before = net.calls
        ndm_ct.sample(built, 2, method="ddim", steps=3, generator=0, **options)
        return net.calls - before

    first, second = calls(), calls()
    assert second == 3
    assert 0 < first - second <= 5
    assert torch.equal(torch_state, torch.get_rng_state())
    assert built.state_dict().keys() == state.keys()
    noisy = model(Net("noise"))
    expected = torch.get_rng_state()
    with pytest.raises(PredictorError, match=RANDOM):
        ndm_ct.check(noisy, X)
    assert torch.equal(torch.get_rng_state(), expected)
    with torch.no_grad():
        net.second.weight.mul_(1.1)
    assert calls() == first
    assert calls() == second
    built.predictor = net = Net("noise")
    with pytest.warns(UserWarning, match=RANDOM):
        calls()
    assert calls() == second  # said once
    with pytest.raises(PredictorError, match=RANDOM):
        ndm_ct.sample(built, 2)
    built.checks = False
    ndm_ct.sample(built, 1, rtol=0.5, atol=0.5)
    quiet = model(net := Net("half detached"), checks=False)
    ndm_ct.loglik(quiet, X[:1], rtol=0.1, atol=0.1)
    assert not copy.deepcopy(quiet).checks


def test_what_only_samples_suffer_from_is_a_warning():
    with pytest.warns(UserWarning, match=MIXED):
        ndm_ct.sample(model(Net("centred")), 2, method="ddim", steps=2)
    with pytest.warns(UserWarning, match=HIDDEN):
        ndm_ct.fit(model(Net("half detached")), X, steps=1, progress=False)


class Idle(nn.Module):
    """One layer has no influence, and one that is behind a detach."""

    def __init__(self):
        super().__init__()
        self.net, self.idle, self.shift = ndm_ct.nn.MLP(3, width=8), nn.Linear(3, 3), nn.Parameter(torch.zeros(3))

    def forward(self, z, t):
        return self.net(z, t) + self.shift.detach()


def test_parameters_without_gradient_are_named():
    names = r"predictor\.shift, predictor\.idle\.weight, predictor\.idle\.bias"
    with pytest.warns(UserWarning, match=names):
        ndm_ct.fit(model(Idle()), X, steps=3, progress=False)
    with pytest.warns(UserWarning, match=names):
        ndm_ct.check(model(Idle()), X)
    frozen = model(Idle())
    frozen.predictor.idle.requires_grad_(False)
    frozen.predictor.shift.requires_grad_(False)
    ndm_ct.fit(frozen, X, steps=1, progress=False)


def test_a_conditional_and_a_guided_model_pass():
    net = ndm_ct.nn.Preconditioned(ndm_ct.nn.MLP(3, width=8, classes=4))
    nn.init.normal_(net.net.output.weight)
    label = torch.tensor([0, 1, 2, 3, 0, 1])
    ndm_ct.check(model(net), X, label=label)
    ndm_ct.check(ndm_ct.guided(model(net), 2.0), X, label=label)
    ndm_ct.sample(model(net), 6, method="ddim", steps=2, guidance=2.0, label=label)


SOURCE = """
import torch
from torch import nn
class {name}(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
    {comment}
    def forward(self, z, t):
        return {factor} * self.layer(z)
"""


def test_a_resumed_training_names_classes_of_ones_own_that_changed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def train(module, steps=4, name="Own", factor=1.0, comment=""):
        (tmp_path / f"{module}.py").write_text(SOURCE.format(name=name, factor=factor, comment=comment))
        importlib.invalidate_caches()
        net = getattr(importlib.import_module(module), name)()
        return ndm_ct.fit(
            model(net), X, steps=steps, batch_size=4, progress=False, run_dir=tmp_path / "run", time_limit=1e-6
        )

    train("own_a")
    train("own_b", comment="# a comment is no change")
    with pytest.raises(ValueError, match=r"classes\.predictor was 'Own \(source .*now 'Own \(source"):
        train("own_c", factor=2.0)
    with pytest.raises(ValueError, match=r"classes\.predictor was 'Own .*now 'Renamed"):
        train("own_d", name="Renamed")


def test_networks_without_a_derivative_in_time_are_refused_with_the_cure():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad

    def features(z, t):
        return Once.apply(z * t[:, None])

    with pytest.raises(PredictorError, match=r"needs forward-mode differentiation or a second.*Separable"):
        ndm_ct.fit(model(ndm_ct.nn.MLP(3, width=8), transform=transforms.Neural(features)), X, steps=1)
    with pytest.raises(ValueError, match=r"type list, expected a tensor.*torch\.stack"):
        ndm_ct.elbo(model(ndm_ct.nn.MLP(3, width=8), transform=transforms.Separable(lambda x: [x, x])), X)


class Steps(nn.Module):
    """A network that looks up a vector for every whole number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.vectors = nn.Linear(3, 3), nn.Embedding(1001, 3)

    def forward(self, z, t):
        return 0.3 * self.layer(z) + 0.1 * self.vectors(t.long())


TABLE = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000), 0)


def test_whole_numbers_handed_fractions_are_named():
    made = adapters.from_eps(Steps(), (3,), alphas_cumprod=TABLE)
    for built in (model(Steps()), adapters.from_velocity(Steps(), (3,), time_scale=1000.0), made):
        with pytest.warns(UserWarning, match=r"rounds its times to whole numbers.*nearest=True"):
            ndm_ct.check(built, X)
    with pytest.warns(UserWarning, match="rounds its times"):  # at first use too
        ndm_ct.sample(made, 1, method="ddim", steps=1)
    ndm_ct.check(adapters.from_eps(Steps(), (3,), alphas_cumprod=TABLE, nearest=True), X)


@pytest.mark.parametrize(("factor", "end"), [(lambda t: torch.log(1.0 - t), "1"), (lambda t: 1.0 / t, "0")])
def test_an_output_that_is_not_finite_at_an_end_is_refused(factor, end):
    built = adapters.from_velocity(lambda z, t: z * factor(t)[:, None], (3,), data_at=0, t_min=0.0)
    message = f"NaN or inf at t={end}, an end of the time interval"
    with pytest.raises(PredictorError, match=message):
        ndm_ct.check(built, X)
    with pytest.warns(UserWarning, match=message), pytest.raises(ndm_ct.SolverError):
        ndm_ct.loglik(built, X)


def denoiser(factor):
    return lambda z, sigma: factor * z / (1.0 + sigma[:, None] ** 2)


def test_an_output_that_has_the_scale_of_no_denoiser_is_named():
    right = adapters.from_denoiser(denoiser(1.0), (3,))
    ndm_ct.check(right, X)
    ndm_ct.loglik(right, torch.zeros(1, 3))
    for factor, unit in ((128.0, 1.0), (1.0, 128.0)):
        with pytest.warns(UserWarning, match="times as large as what prediction='x' estimates.*in the units"):
            ndm_ct.loglik(adapters.from_denoiser(denoiser(factor), (3,)), unit * X, rtol=0.1, atol=0.1)
    for make in (adapters.from_eps, adapters.from_v):
        with pytest.warns(UserWarning, match="times as large as what"):
            ndm_ct.check(make(lambda z, k: 60.0 * z, (3,), alphas_cumprod=TABLE), X)
        ndm_ct.check(make(lambda z, k: 0.9 * z, (3,), alphas_cumprod=TABLE), X)
    ndm_ct.check(model(lambda z, t: 1e-3 * z), X)  # not trained yet


def test_a_time_that_broadcasts_along_the_event_is_refused():
    """With as many rows as coordinates nothing else fails."""
    with pytest.raises(PredictorError, match=r"takes 3 rows, but not two of them .*t\[:, None\]"):
        ndm_ct.loglik(model(lambda z, t: 0.3 * z * t), X[:3])
    with pytest.raises(PredictorError, match="depends on the other rows"):
        ndm_ct.loglik(model(lambda z, t: 0.3 * z * t, event_shape=(2,)), X[:2, :2])


@pytest.mark.parametrize("slope", [1.0, 0.05])
@pytest.mark.parametrize("hide", [lambda z: z.detach(), lambda z: torch.tensor(z.detach().numpy())])
def test_a_lost_derivative_is_seen_where_the_algebra_hides_it(hide, slope):
    """Between data and noise a velocity's own derivative is a small part of that of the field that is solved."""
    velocity = adapters.from_velocity(lambda z, t: torch.tanh(slope * hide(z)), (3,))
    with pytest.raises(PredictorError, match="autograd sees no dependence"):
        ndm_ct.loglik(velocity, X)


def test_a_network_that_fails_is_told_how_it_is_called():
    def first(t, z):
        return z * torch.ones(len(t), 1) + t.reshape(6, 1)

    def column(z, t):
        return torch.cat([z, t], 1)[:, :3]

    def table(z, t):
        return z + torch.zeros(10)[t]

    for net in (first, column, table, lambda z, t, y: z):
        with pytest.raises(
            PredictorError, match=r"predictor\(z, t\) with z of shape \(2, 3\) and t of shape \(2,\)"
        ) as raised:
            ndm_ct.loglik(adapters.from_velocity(net, (3,)), X)
        assert raised.value.__cause__ is not None
    with pytest.raises(PredictorError, match=r"predictor\(z, t, y=tensor \(1, 2\)\).*what else it takes"):
        ndm_ct.sample(model(lambda z, t, y: torch.cat([z, y], 1)[:, :3]), 4, method="ddim", steps=2, y=torch.ones(1, 2))
    bound = torch.arange(6.0)[:, None]
    with pytest.raises(PredictorError, match=r"takes 6 rows, but not two of them .* that the predictor holds itself"):
        ndm_ct.loglik(model(lambda z, t: 0.3 * z + bound), X)
