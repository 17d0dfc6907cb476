"""Networks in bfloat16, everything else in float32: a loss and gradients near those of full precision."""

import math

import pytest
import torch

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
