"""Networks in bfloat16, everything else in float32: a loss and gradients near those of full precision."""

import copy
import math

import pytest
import torch
from torch import nn
from torchdiffeq import odeint

import ndm_ct
from ndm_ct import schedules, transforms
from ndm_ct._core.precision import networks_in
from ndm_ct._core.seeds import derive_seeds
from ndm_ct.nn import MLP, Preconditioned, UNet
from ndm_ct.storage import tensors as checkpoint
from ndm_ct.training import fit

VECTORS, IMAGES = (2,), (1, 8, 8)


def network(shape, **options):
    return MLP(2, width=64, **options) if shape == VECTORS else UNet(1, width=8, **options)


def model(shape=VECTORS, kind="identity", head="x"):
    """Networks that return something, with a learned schedule."""
    torch.manual_seed(0)
    transform = None
    if kind == "neural":
        transform = transforms.Neural(network(shape))
    elif kind == "separable":
        transform = transforms.Separable(network(shape, outputs=2, time=False))
    predictor = Preconditioned(network(shape, outputs=2 if head == "moments" else None), prediction=head)
    made = ndm_ct.NDM(
        predictor, shape, transform=transform, schedule=schedules.LearnedLogSNR(-9.0, 5.0), prediction=head
    )
    with torch.no_grad():
        for parameter in [*made.predictor.parameters(), *made.transform.parameters()]:
            parameter.add_(0.03 * torch.randn_like(parameter))
    return made


def rows(n, shape=VECTORS, seed=1):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def loss_and_gradient(made, x, dtype):
    made.zero_grad()
    with networks_in(dtype):
        nats = ndm_ct.loss(made, x, generator=torch.Generator().manual_seed(2))
    nats.mean().backward()
    return nats.detach(), torch.cat([p.grad.flatten() for p in made.parameters()])


@pytest.mark.parametrize("shape", [VECTORS, IMAGES], ids=["vectors", "images"])
@pytest.mark.parametrize(
    ("kind", "head"), [("identity", "x"), ("neural", "x"), ("separable", "x"), ("neural", "moments")]
)
def test_loss_and_gradient_are_near_those_of_full_precision(shape, kind, head):
    """Measured: mean losses differ by 3e-5 to 3e-3, gradients by 0.2 to 0.6 %; the derivative in time is among them."""
    made, x = model(shape, kind, head), rows(256, shape)
    nats, gradient = loss_and_gradient(made, x, None)
    low, rounded = loss_and_gradient(made, x, torch.bfloat16)
    assert low.dtype == rounded.dtype == torch.float32
    assert not torch.equal(low, nats)
    assert float(low.mean()) == pytest.approx(float(nats.mean()), rel=0.01)
    assert float(((low - nats) / nats).abs().median()) < 0.01
    assert bool(rounded.isfinite().all())
    assert float((rounded - gradient).norm() / gradient.norm()) < 0.02


@pytest.mark.parametrize(
    "transform",
    [
        transforms.Blur(IMAGES),
        transforms.LearnedScaling(IMAGES),
        transforms.Separable(lambda x: torch.stack([x, x**2], 1)),
        transforms.Composed(transforms.Blur(IMAGES), transforms.Neural(lambda x, t: x * t.reshape(-1, 1, 1, 1))),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_the_algebra_around_networks_is_not_rounded(transform):
    """With networks that autocast leaves alone nothing changes by a bit; autocast around all would round products."""
    made = ndm_ct.NDM(lambda z, t: 0.5 * z, IMAGES, transform=transform, schedule=schedules.LearnedLogSNR(-9.0, 5.0))
    x = rows(16, IMAGES)

    def nats():
        return ndm_ct.loss(made, x, generator=torch.Generator().manual_seed(2))

    full = nats()
    with networks_in(torch.bfloat16):
        assert torch.equal(nats(), full)
    if not isinstance(transform, transforms.LearnedScaling):
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(nats(), full)


def test_only_networks_of_a_training_are_rounded():
    """A training of which only the schedule's parameters are left is that of full precision, bit by bit."""
    trained = []
    for precision in ("full", "bf16-mixed"):
        made = ndm_ct.NDM(
            lambda z, t: 0.5 * z, IMAGES, transform=transforms.Blur(IMAGES), schedule=schedules.LearnedLogSNR(-9.0, 5.0)
        )
        train(made, rows(64, IMAGES), precision=precision)
        trained.append(made)
    assert same(*trained)


def test_the_derivative_in_time_is_that_of_the_network():
    made, x, t = model(IMAGES, "neural"), rows(64, IMAGES), torch.linspace(0.1, 0.9, 64, dtype=torch.float64)
    with torch.no_grad(), networks_in(torch.bfloat16):
        low, rate = made.transform.with_derivative(x, t)
    with torch.no_grad():
        F, dF = made.transform.with_derivative(x, t)
    assert low.dtype == rate.dtype == torch.float32
    for found, expected in ((low - x, F - x), (rate, dF)):
        assert 0.0 < float((found - expected).norm() / expected.norm()) < 0.02


def train(made, x=None, **options):
    given = {"steps": 6, "batch_size": 16, "progress": False, "precision": "bf16-mixed"}
    return fit(made, rows(64) if x is None else x, **given | options)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_training_goes_on_with_the_same_bits(tmp_path):
    whole, rest, full = (model(kind="neural") for _ in range(3))
    train(whole)
    train(full, precision="full")
    assert not same(whole, full)
    stopped = train(rest, run_dir=tmp_path, time_limit=1e-9)
    assert not stopped.finished
    with pytest.raises(ValueError, match="precision was 'bf16-mixed', now 'full'"):
        train(model(kind="neural"), run_dir=tmp_path, precision="full")
    rest = model(kind="neural")
    train(rest, run_dir=tmp_path)
    assert same(rest, whole)
    _, tensors = checkpoint.read(tmp_path / "checkpoint.safetensors", "training")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_trainings_from_before_were_in_full_precision(tmp_path):
    train(model(), run_dir=tmp_path, precision="full", time_limit=1e-9)
    path = tmp_path / "checkpoint.safetensors"
    description, tensors = checkpoint.read(path, "training")
    del description["settings"]["precision"]
    checkpoint.write(path, tensors, description)
    with pytest.raises(ValueError, match="precision was 'full', now 'bf16-mixed'"):
        train(model(), run_dir=tmp_path)
    assert train(model(), run_dir=tmp_path, precision="full").finished


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_validation_is_in_full_precision(ema):
    made, held_out = model(), rows(40, seed=5)
    result = train(made, ema=ema, validation=held_out, validate_every=6)
    with torch.no_grad():
        expected = torch.cat([
            ndm_ct.elbo(made, x, generator=torch.Generator().manual_seed(derive_seeds(0, place, 2)[0]))
            for place, x in enumerate(held_out.split(16))
        ])  # fmt: skip
    assert result.validation[-1]["validation_elbo"] == pytest.approx(expected.double().mean().item(), rel=1e-7)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp16", "float16 unless the loss is scaled"),
        (torch.float16, "float16 unless the loss is scaled"),
        ("bf16", "Valid: 'full', 'bf16-mixed'"),
        (None, "precision=None is unknown"),
    ],
)
def test_other_precisions_are_refused(precision, message):
    with pytest.raises(ValueError, match=message):
        train(model(), precision=precision)


def test_it_is_for_networks_in_float32():
    with pytest.raises(ValueError, match=r"no effect on networks of torch\.float64"):
        train(model().double(), rows(64).double())


def test_what_the_network_itself_returns_is_still_refused():
    made = ndm_ct.NDM(lambda z, t: z.half(), VECTORS)
    with networks_in(torch.bfloat16), pytest.raises(ndm_ct.PredictorError, match=r"dtype torch\.float16"):
        made.predict_x(rows(3), torch.tensor(0.5, dtype=torch.float64))


def test_autocast_around_the_work_is_one_of_the_networks():
    """The network is run by autocast, and no sum or product of the algebra."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def inside(z, t):
        with torch.autocast("cpu", torch.bfloat16):
            return net(z).float()

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, z, t):
            return self.net(z)

    x = rows(3)[:, :2].contiguous()
    around, own = (ndm_ct.adapters.from_velocity(each, (2,)) for each in (Around(), inside))
    own.checks, options = False, {"rtol": 1e-2, "atol": 1e-2, "trace": "exact"}
    expected = ndm_ct.loglik(own, x, **options), ndm_ct.sample(own, 3, method="euler", steps=4, generator=0)
    whole, error = ndm_ct.loglik(around, x, return_info=True, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = ndm_ct.loglik(around, x, **options), ndm_ct.sample(around, 3, method="euler", steps=4, generator=0)
        told = ndm_ct.loglik(around, x, return_info=True, **options)[1]
        assert torch.is_autocast_enabled("cpu")
        with around.evaluating():
            assert not torch.is_autocast_enabled("cpu")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)
    assert bool((whole != found[0]).any())
    least = torch.finfo(torch.bfloat16).eps * 2**0.5
    assert bool((told.ode_error > error.ode_error + least).all())  # it counts the network's rounding


@pytest.mark.slow
def test_it_trains_to_the_same_bound():
    """Eight Gaussians: the bounds differ by less than those of two seeds (measured: 0.0001 of a scatter of 0.006)."""

    def bound(precision, seed):
        torch.manual_seed(seed)
        made = ndm_ct.NDM(
            Preconditioned(MLP(2, width=64), data_std=0.7), VECTORS, schedule=schedules.LinearLogSNR(-8.0, 5.0)
        )
        generator = torch.Generator().manual_seed(7)
        angle = torch.randint(0, 8, (6000,), generator=generator) * (math.pi / 4)
        x = torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(6000, 2, generator=generator)
        options = {"steps": 600, "batch_size": 128, "lr": 2e-3, "ema": 0.99, "seed": seed}
        result = train(made, x[:4000], precision=precision, **options)
        assert result.finished
        with torch.no_grad():
            held_out = ndm_ct.elbo(made, x[4000:], samples=16, generator=torch.Generator().manual_seed(9))
        return held_out.mean().item()

    full, low = (torch.tensor([bound(name, seed) for seed in range(3)]) for name in ("full", "bf16-mixed"))
    assert float((full - low).abs().max()) < float(full.std())


# --- networks that are in lower or mixed precision themselves ---------------------------------------------------------

HALVES = [torch.bfloat16, torch.float16]


class Small(nn.Module):
    """A network whose output is small beside z, so that three digits of it are enough; it casts nothing."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 32), nn.Linear(32, 2)

    def forward(self, z, t):
        return self.leave(torch.tanh(self.enter(torch.cat([z, t[:, None]], 1)))) / 512


class FrozenEncoder(nn.Module):
    """A frozen encoder in bfloat16, which is not cast for, and a rest in float32."""

    def __init__(self):
        super().__init__()
        self.encoder, self.rest = nn.Linear(2, 4).bfloat16().requires_grad_(False), nn.Linear(7, 2)

    def forward(self, z, t):
        return 0.1 * self.rest(torch.cat([z, t[:, None], self.encoder(z.bfloat16()).float()], 1))


class NormInFloat32(nn.Module):
    """All in bfloat16 but the norm, as diffusers keeps some modules."""

    def __init__(self):
        super().__init__()
        self.norm, self.enter = nn.LayerNorm(8), nn.Linear(3, 8).bfloat16()
        self.leave = nn.Linear(8, 2).bfloat16()

    def forward(self, z, t):
        h = self.enter(torch.cat([z, t[:, None]], 1))
        return 0.1 * self.leave(torch.tanh(self.norm(h.float())).to(h.dtype))


class PartInFloat64(nn.Module):
    """The output takes the dtype of a part."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 8), nn.Linear(8, 2).double()

    def forward(self, z, t):
        return 0.1 * self.leave(torch.tanh(self.enter(torch.cat([z, t[:, None]], 1))).double())


class FirstInFloat64(PartInFloat64):
    def __init__(self):
        super().__init__()
        del self.enter
        self.enter = nn.Linear(3, 8)


class EmbedsTime(nn.Module):
    """Takes the time in full precision, as networks of diffusers do; 1000 t has no place in bfloat16."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave, self.seen = nn.Linear(3, 8), nn.Linear(8, 2), None

    def forward(self, z, t):
        self.seen = z.dtype, t.dtype
        feature = torch.sin(1000.0 * t.float())[:, None].to(z.dtype)
        return self.leave(torch.tanh(self.enter(torch.cat([z, feature], 1)))) / 32


def of(net, **options):
    return ndm_ct.NDM(net, VECTORS, schedule=schedules.LinearLogSNR(-4.0, 3.0), **options)


def independent(model, x):
    """log p by torchdiffeq on the flow's formula with the network in its own precision, exact trace, row by row."""
    net, found = model.predictor, []
    dtype = next(net.parameters()).dtype

    def slope(t, state):
        gamma = -4.0 + 7.0 * t
        alpha2 = torch.sigmoid(-gamma)
        with torch.enable_grad():
            z = state[0].detach().requires_grad_()
            x_hat = net(z.float().to(dtype), t.float().to(dtype).reshape(1)).float().double()
            trace = sum(torch.autograd.grad(x_hat[0, i], z, retain_graph=True)[0][0, i] for i in range(2))
        v = 3.5 * (alpha2 * z - alpha2.sqrt() * x_hat)
        return v.detach(), (3.5 * (2 * alpha2 - alpha2.sqrt() * trace)).reshape(1).detach()

    for row in x.double():
        start, ends = (row[None], torch.zeros(1, dtype=torch.float64)), torch.tensor([0.0, 1.0], dtype=torch.float64)
        z, logdet = odeint(slope, start, ends, method="rk4", options={"step_size": 1 / 64})
        found.append(-0.5 * z[-1].square().sum() - math.log(2 * math.pi) + logdet[-1, 0])
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float16])
def test_a_network_in_half_precision_is_scored_by_its_own_flow(dtype):
    """Against torchdiffeq with the exact trace; what is left is the rounding of the network."""
    made, x = of(Small().to(dtype)), rows(1)
    value, info = ndm_ct.loglik(made, x, return_info=True)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), independent(made, x), rtol=0.0, atol=1e-4)
    assert info.nfe < 2000
    full = copy.deepcopy(made).float()
    torch.testing.assert_close(value, ndm_ct.loglik(full, x), rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("dtype", HALVES)
def test_data_for_a_network_in_half_precision_may_have_any(dtype):
    made, rough = of(Small().to(dtype)), {"rtol": 1e-2, "atol": 1e-2}
    x = rows(2).to(dtype)
    value = ndm_ct.loglik(made, x.float(), **rough)
    torch.testing.assert_close(ndm_ct.loglik(made, x, **rough), value, rtol=0.0, atol=0.0)
    torch.testing.assert_close(ndm_ct.loglik(made, x.double(), **rough), value.double(), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
def test_samples_come_out_in_the_dtype_asked_for(dtype):
    made = of(Preconditioned(MLP(2, width=8))).to(dtype)
    full = copy.deepcopy(made).float()
    expected = ndm_ct.sample(full, 4, method="ddim", steps=4, generator=0)
    for asked, found in ((None, torch.float32), (dtype, dtype), (torch.float32,) * 2, (torch.float64,) * 2):
        x = ndm_ct.sample(made, 4, method="ddim", steps=4, generator=0, dtype=asked)
        assert x.dtype == found
        if asked is None:
            torch.testing.assert_close(x, expected, rtol=0.0, atol=0.05)
    assert ndm_ct.sample(full, 2, method="ddim", steps=2, dtype=dtype).dtype == dtype
    assert ndm_ct.sample(full, 2, method="ddim", steps=2, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", HALVES)
def test_the_algebra_of_heads_is_not_in_the_networks_precision(dtype):
    """c_skip z is float32: with it in half precision, scores near the data would be off by 1 / sigma^2 roundings."""
    net = MLP(2, width=8).to(dtype)
    made, z = of(Preconditioned(net)), rows(64)
    c = made.schedule(torch.tensor(0.1, dtype=torch.float64))
    spread = (c.alpha**2 + c.sigma**2).sqrt()
    t = torch.full((64,), 0.1)
    expected = c.alpha / spread**2 * z - c.sigma / spread * net((z / spread).to(dtype), t).float()
    torch.testing.assert_close(made.predict_x(z, torch.tensor(0.1, dtype=torch.float64)), expected.float())


@pytest.mark.parametrize("build", [FrozenEncoder, NormInFloat32, PartInFloat64, FirstInFloat64])
def test_networks_of_several_precisions_work(build):
    made = of(build())
    x = rows(3).to(made.dtype)
    value = ndm_ct.loglik(made, x, rtol=1e-4, atol=1e-4)
    assert value.dtype == made.dtype
    full = ndm_ct.loglik(of(_in_float64(made.predictor)), x.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(value.double(), full, rtol=0.0, atol=0.02)
    assert ndm_ct.sample(made, 2, method="ddim", steps=2).dtype == made.dtype
    assert fit(made, rows(8).to(made.dtype), steps=1, progress=False).finished


def _in_float64(net):
    net = copy.deepcopy(net).double()
    kept = torch.Tensor.bfloat16, torch.Tensor.float

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, z, t):
            try:
                torch.Tensor.bfloat16 = torch.Tensor.float = torch.Tensor.double
                return self.net(z, t)
            finally:
                torch.Tensor.bfloat16, torch.Tensor.float = kept

    return Wide()


def test_the_time_keeps_its_precision_where_the_network_embeds_it():
    made = of(EmbedsTime().bfloat16(), checks=False)
    made.velocity(rows(2), 0.3)
    assert made.predictor.seen == (torch.bfloat16, torch.float32)
    seen = []

    class Joined(Small):
        def forward(self, z, t):
            seen.append((z.dtype, t.dtype))
            return super().forward(z, t)

    joined = of(Joined().bfloat16(), checks=False)
    for _ in range(2):
        joined.velocity(rows(2), 0.3)
    assert seen[1:] == [(torch.bfloat16, torch.bfloat16)] * 2, "found once"


def test_conditioning_is_cast_for_the_network():
    class Conditioned(Small):
        def forward(self, z, t, context, label):
            assert context["text"].dtype == torch.bfloat16
            assert label.dtype == torch.int64
            return super().forward(z + self.enter.bias[:1] + context["text"], t)

    made = of(Conditioned().bfloat16())
    context, label = {"text": rows(3, seed=4)}, torch.arange(3)
    assert bool(ndm_ct.loglik(made, rows(3), rtol=1e-3, atol=1e-3, context=context, label=label).isfinite().all())


def test_guided_and_adapted_networks_in_half_precision():
    guided = ndm_ct.guided(of(Preconditioned(MLP(2, width=8, classes=3))).bfloat16(), 2.0)
    assert ndm_ct.sample(guided, 3, method="ddim", steps=2, label=torch.arange(3)).dtype == torch.float32
    table = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000), 0)
    seen = []

    class Timestep(EmbedsTime):
        def forward(self, z, t):
            seen.append(float(t[0]))
            return super().forward(z, t / 1000.0)

    for made in (
        ndm_ct.adapters.from_eps(Timestep().bfloat16(), VECTORS, alphas_cumprod=table),
        ndm_ct.adapters.from_velocity(Small().half(), VECTORS),
        ndm_ct.adapters.from_denoiser(Small().bfloat16(), VECTORS),
    ):
        made.checks = False  # an output as small as that of Small is named
        assert bool(ndm_ct.loglik(made, rows(2), rtol=1e-2, atol=1e-2, on_failure="nan").isfinite().any())
        assert bool(ndm_ct.sample(made, 2, method="ddim", steps=2).isfinite().all())
    assert any(k != round(k) for k in seen), "indices of the table are not rounded to three digits"


def test_fit_trains_a_network_in_bfloat16():
    made = of(Preconditioned(MLP(2, width=16))).bfloat16()
    before = copy.deepcopy(made.state_dict())
    assert fit(made, rows(64), steps=3, batch_size=16, progress=False, ema=0.0).finished
    assert not all(torch.equal(before[name], value) for name, value in made.state_dict().items())
    assert all(value.dtype == torch.bfloat16 for value in made.predictor.state_dict().values())
    with pytest.raises(ValueError, match=r"no effect on networks of torch\.bfloat16"):
        fit(made, rows(64), steps=1, precision="bf16-mixed")


def test_weights_in_float16_are_not_trained():
    """Adam's eps of 1e-8 is zero there."""
    with pytest.raises(ValueError, match=r"float16.*model\.float\(\)"):
        fit(of(Preconditioned(MLP(2, width=16))).half(), rows(64), steps=1)


def test_transforms_in_half_precision(tmp_path):
    made = of(Preconditioned(MLP(2, width=8)), transform=transforms.Neural(MLP(2, width=8))).bfloat16()
    assert bool(ndm_ct.elbo(made, rows(4)).isfinite().all())
    assert ndm_ct.elbo(made, rows(4)).dtype == torch.float32
    ndm_ct.save(made, tmp_path / "model")
    loaded = ndm_ct.load(tmp_path / "model")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(loaded.velocity(rows(2), 0.5), made.velocity(rows(2), 0.5))
