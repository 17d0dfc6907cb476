"""Networks that torch.func cannot pass, or forward mode cannot: scored, sampled and trained like any other."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchdiffeq import odeint

import ndm_ct
from ndm_ct import PredictorError, schedules, transforms
from ndm_ct._core.autodiff import WAYS, Derivatives
from ndm_ct.divergence import Exact

D = 3
X = torch.randn(2, D, generator=torch.Generator().manual_seed(3))


class Tanh(torch.autograd.Function):
    """As it was written before ``setup_context``."""

    @staticmethod
    def forward(ctx, h):
        output = h.tanh()
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0] ** 2)


class TanhOfBetween(Tanh):
    """What it saves is neither input nor output, so that its second derivative is lost."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h.tanh())
        return h.tanh()


class TanhOfNumpy(torch.autograd.Function):
    """A kernel outside of torch."""

    @staticmethod
    def forward(ctx, h):
        ctx.output = torch.from_numpy(h.numpy(force=True)).tanh()
        return ctx.output.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(grad.numpy() * (1 - ctx.output.numpy() ** 2))


class TanhOnce(Tanh):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0] ** 2)


class TanhOnceWithContext(torch.autograd.Function):
    """torch.func and vmap pass it, and lose its second derivative without a word."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h):
        return h.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0] ** 2)


class TanhWithoutVmap(TanhOnceWithContext):
    generate_vmap_rule = False

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0] ** 2)


class Weights(torch.autograd.Function):
    """Attention weights in float32 inside a network of any precision, with a backward pass of their own."""

    @staticmethod
    def forward(ctx, q, k):
        weights = (q.float() @ k.float().mT / math.sqrt(k.shape[-1])).softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, weights)
        return weights

    @staticmethod
    def backward(ctx, grad):
        q, k, weights = ctx.saved_tensors
        grad, weights = grad.float(), weights.float()
        logits = weights * (grad - (grad * weights).sum(-1, keepdim=True)) / math.sqrt(k.shape[-1])
        return (logits @ k.float()).to(q.dtype), (logits.mT @ q.float()).to(k.dtype)


class Attention(nn.Module):
    """Every coordinate is a token."""

    def __init__(self, weights=Weights.apply):
        super().__init__()
        self.enter, self.leave, self.weights = nn.Linear(2, 16), nn.Linear(8, 1), weights

    def forward(self, z, t):
        q, k = self.enter(torch.stack([z, t[:, None].expand_as(z)], -1)).chunk(2, -1)
        return 0.3 * self.leave(self.weights(q, k) @ k).squeeze(-1)


class Layers(nn.Module):
    def __init__(self, middle=torch.tanh):
        super().__init__()
        self.enter, self.leave, self.middle = nn.Linear(D + 1, 16), nn.Linear(16, D), middle

    def forward(self, z, t):
        return 0.3 * self.leave(self.middle(self.enter(torch.cat([z, t[:, None]], 1))))


class Sequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D + 1, 16), nn.Tanh(), nn.Linear(16, D))

    def forward(self, z, t):
        return 0.3 * checkpoint_sequential(self.layers, 2, torch.cat([z, t[:, None]], 1), use_reentrant=True)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.inner, self.leave = kind(2, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, z, t):
        return 0.3 * self.leave(self.inner(torch.stack([z, t[:, None].expand_as(z)], -1))[0]).squeeze(-1)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(D + 1, 8), nn.BatchNorm1d(8), nn.Linear(8, D)

    def forward(self, z, t):
        return 0.3 * self.leave(torch.tanh(self.norm(self.enter(torch.cat([z, t[:, None]], 1)))))


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.LazyLinear(16), nn.LazyLinear(D)

    def forward(self, z, t):
        return 0.3 * self.leave(torch.tanh(self.enter(torch.cat([z, t[:, None]], 1))))


class Energy(nn.Module):
    """The gradient of an energy, which it takes itself."""

    def __init__(self):
        super().__init__()
        self.potential = Layers()

    def forward(self, z, t):
        with torch.enable_grad():
            z = z.requires_grad_()
            return -torch.autograd.grad(self.potential(z, t).square().sum(), z, create_graph=True)[0]


class OnCPU(Layers):
    """Its activations are kept elsewhere between the passes."""

    def forward(self, z, t):
        with torch.autograd.graph.save_on_cpu():
            return super().forward(z, t)


def compiled(backend):
    return lambda: torch.compile(Layers(), backend=backend)


def compiled_in_part():
    net = Layers()
    net.enter.compile(backend="aot_eager")
    return net


class Scriptable(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.3 * self.leave(torch.tanh(self.enter(torch.cat([z, t[:, None]], 1))))


NETWORKS = {
    "own attention": (Attention, None),
    "checkpoint": (lambda: Layers(lambda h: checkpoint(torch.tanh, h, use_reentrant=False)), "batched autograd"),
    "reentrant checkpoint": (lambda: Layers(lambda h: checkpoint(torch.tanh, h, use_reentrant=True)), "backward"),
    "checkpointed sequence": (Sequential, "backward"),
    "Function": (lambda: Layers(Tanh.apply), None),
    "Function of numpy": (lambda: Layers(TanhOfNumpy.apply), "autograd"),
    "Function without vmap": (lambda: Layers(TanhWithoutVmap.apply), None),
    "compiled, eager": (compiled("eager"), None),
    "compiled, aot_eager": (compiled("aot_eager"), None),
    "compiled in part": (compiled_in_part, None),
    "scripted": (lambda: torch.jit.script(Scriptable()), None),
    "traced": (lambda: torch.jit.trace(Layers(), (X, torch.rand(2))), None),
    "lazy": (Lazy, "torch.func"),
    "LSTM": (Recurrent, None),
    "GRU": (lambda: Recurrent(nn.GRU), None),
    "BatchNorm": (Normed, "torch.func"),
    "energy": (Energy, None),
    "saved on the CPU": (OnCPU, "batched autograd"),
}


def make(net, **options):
    return ndm_ct.NDM(net, (D,), schedule=schedules.LinearLogSNR(-4.0, 3.0), **options)


def independent(model, x):
    """log p by torchdiffeq on the formula of the flow, row by row, the trace by one backward pass per coordinate."""
    net, found = model.predictor, []

    def velocity(t, z):
        gamma = -4.0 + 7.0 * t  # alpha^2 + sigma^2 = 1, so that v = gamma'/2 (alpha^2 z - alpha x)
        alpha2 = torch.sigmoid(-gamma)
        x_hat = net(z.float(), t.float().reshape(1)).double()
        return 3.5 * (alpha2 * z - alpha2.sqrt() * x_hat)

    def slope(t, state):
        with torch.enable_grad():
            z = state[0].detach().requires_grad_()
            v, trace = velocity(t, z), 0.0
            for i in range(D):
                z.grad = None
                v[0, i].backward(retain_graph=True)
                trace = trace + z.grad[0, i]
        return v.detach(), trace.reshape(1)

    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for row in x.double():
        z, logdet = odeint(slope, (row[None], torch.zeros(1, dtype=torch.float64)), ends, rtol=1e-7, atol=1e-7)
        found.append(-0.5 * z[-1].square().sum() - 0.5 * D * math.log(2 * math.pi) + logdet[-1, 0])
    return torch.stack(found)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_is_scored_sampled_and_trained(name):
    """The sign of a wrong way: the exact trace along torchdiffeq's solve differs by more than 1e-4 nats."""
    build, way = NETWORKS[name]
    model = make(build())
    value, info = ndm_ct.loglik(model, X, return_info=True)
    assert info.pullback in WAYS
    assert way is None or info.pullback == way
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    torch.testing.assert_close(value.double(), independent(model.eval(), X), rtol=0.0, atol=1e-4)
    assert bool(ndm_ct.sample(model, 2, method="ddim", steps=2, generator=0).isfinite().all())
    assert ndm_ct.fit(model, torch.randn(8, D), steps=1, batch_size=4, progress=False).finished


@pytest.mark.parametrize("chunk", [None, 2, 1])
def test_all_ways_find_the_same_products(chunk):
    net, z, t = Layers().double(), torch.randn(4, D, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    w = torch.randn(5, 4, D, dtype=torch.float64)
    found = []
    for way in WAYS:
        derivatives = Derivatives(net)
        derivatives.way = way
        with torch.no_grad():
            result = derivatives.vjps(lambda z: (net(z, t), z), z, w, lambda _, product: product, chunk=chunk)
        assert derivatives.way == way
        assert not any(each.requires_grad for each in result)
        found.append(result)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z, t: net(z[None], t[None])[0]))(z, t)
    torch.testing.assert_close(found[0][1], torch.einsum("kbi,bij->kbj", w, jacobian))
    for result in found[1:]:
        torch.testing.assert_close(result, found[0])


def test_a_batch_of_products_costs_no_more_than_torch_func():
    """A convolution is differentiated once for all products, where the backward of each would be one by one."""
    net = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv1d(4, 1, 3, padding=1))
    z, w, calls = torch.randn(2, 1, 6), torch.randn(8, 2, 1, 6), []
    for way in WAYS[:2]:
        derivatives = Derivatives(net)
        derivatives.way = way
        with torch.profiler.profile() as seen, torch.no_grad():
            derivatives.vjps(lambda z: (net(z), z), z, w, lambda _, product: product, chunk=None)
        counts = {event.key: event.count for event in seen.key_averages()}
        calls.append(counts["aten::convolution_backward"])
        assert derivatives.way == way
    assert calls[1] <= calls[0]


def test_the_way_is_found_once():
    calls = 0

    def middle(h):
        nonlocal calls
        calls += 1
        return Tanh.apply(h)

    model = make(Layers(middle), checks=False)
    counts = []
    for _ in range(2):
        calls = 0
        _, info = ndm_ct.loglik(model, X, return_info=True)
        counts.append(calls)
    assert info.pullback == model.derivatives.way != "torch.func"
    assert 1 <= counts[0] - counts[1] <= 2


def test_the_gradients_of_training_are_left_alone():
    model = make(Layers(lambda h: checkpoint(torch.tanh, h, use_reentrant=True)))
    model.predictor.leave.bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    ndm_ct.loglik(model, X)
    assert all(bool((p.grad == 1.0).all()) for p in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["predictor.leave.bias"]


@pytest.mark.parametrize("build", [lambda: Layers(Tanh.apply), Attention, Recurrent, Energy])
def test_inference_mode_changes_nothing(build):
    model = make(build())
    value = ndm_ct.loglik(model, X)
    with torch.inference_mode():
        torch.testing.assert_close(ndm_ct.loglik(model, X.clone()), value)


def gradient(net, **options):
    net.zero_grad()
    x = X.clone().requires_grad_()
    value = ndm_ct.loglik(make(net, checks=False), x, differentiable=True, rtol=1e-4, atol=1e-4, **options)
    value.sum().backward()
    return [x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("options", [{}, {"trace": Exact(chunk=1)}, {"trace": "hutchinson", "generator": 0}])
@pytest.mark.parametrize(
    ("net", "twin"),
    [
        (Layers(Tanh.apply), {"middle": torch.tanh}),
        (Layers(lambda h: checkpoint(torch.tanh, h, use_reentrant=False)), {"middle": torch.tanh}),
        (Attention(), {"weights": lambda q, k: (q @ k.mT / math.sqrt(k.shape[-1])).softmax(-1)}),
    ],
    ids=["Function", "checkpoint", "own attention"],
)
def test_gradients_of_likelihoods_are_those_of_a_plain_network(net, twin, options):
    plain = copy.deepcopy(net)
    for name, value in twin.items():
        setattr(plain, name, value)
    for found, expected in zip(gradient(net, **options), gradient(plain, **options), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("function", [TanhOfBetween, TanhOnce, TanhOnceWithContext, TanhOfNumpy])
@pytest.mark.parametrize("chunk", [None, 1])
def test_a_missing_second_derivative_is_said(function, frozen, chunk):
    """vmap hides from such functions that a gradient is wanted; their part of it would be missing in silence."""
    net = Layers(function.apply).requires_grad_(not frozen)
    with pytest.raises((PredictorError, RuntimeError), match=r"no second derivative|call numpy\(\)"):
        gradient(net, trace=Exact(chunk))
    ndm_ct.loglik(make(net), X)


def test_reentrant_checkpoints_have_no_second_derivative():
    net = Layers(lambda h: checkpoint(torch.tanh, h, use_reentrant=True))
    with pytest.raises(RuntimeError, match=r"use_reentrant=False"):
        gradient(net)


def test_errors_of_the_network_are_those_of_plain_autograd():
    def middle(h):
        raise KeyError("weights of the middle")

    with pytest.raises(KeyError, match="weights of the middle"):
        ndm_ct.loglik(make(Layers(middle)), X)


class Along(nn.Module):
    """A feature of t for an LSTM or BatchNorm, which have no forward mode."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x, t)


@pytest.mark.parametrize("build", [Recurrent, lambda: Recurrent(nn.GRU), Normed, lambda: Layers(Tanh.apply)])
def test_transforms_without_forward_mode_have_their_derivative(build):
    net = build().double()
    transform = transforms.Neural(net)
    x, t = X.double(), torch.tensor([0.3, 0.8], dtype=torch.float64)
    h = 1e-5
    net.eval()
    _, rate = transform.with_derivative(x, t)
    torch.testing.assert_close(rate, (transform(x, t + h) - transform(x, t - h)) / (2 * h), rtol=1e-6, atol=1e-7)
    model = make(ndm_ct.nn.MLP(D, width=8).double(), transform=transform)
    nats = ndm_ct.elbo(model, x, generator=0)
    assert bool(nats.isfinite().all())
    nats.sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p is not getattr(net, "leave", net).bias)
    assert bool(ndm_ct.loglik(model, x, rtol=1e-3, atol=1e-3).isfinite().all())
    assert ndm_ct.fit(model, torch.randn(8, D, dtype=torch.float64), steps=2, progress=False).finished


def test_batch_statistics_are_counted_once():
    net = Normed()
    transform = transforms.Neural(net.train())
    for calls in (1, 2):
        transform.with_derivative(X, torch.rand(2, dtype=torch.float64))
        assert int(net.norm.num_batches_tracked) == calls


def test_straight_paths_are_trained_through_any_network():
    found = []
    for middle in (torch.tanh, Tanh.apply):
        torch.manual_seed(0)
        model = make(Layers(middle))
        found.append(ndm_ct.objectives.curvature(model, X, generator=0))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    "use",
    [
        lambda model: ndm_ct.fit(model, torch.randn(8, D), steps=1, progress=False),
        lambda model: ndm_ct.loglik(model, X),
        lambda model: ndm_ct.sample(model, 2, method="ddim", steps=1),
        lambda model: ndm_ct.elbo(model, X),
        lambda model: model.velocity(X, 0.5),
    ],
    ids=["fit", "loglik", "sample", "elbo", "velocity"],
)
def test_lazy_layers_take_shape_before_anything_else(use):
    """Within forward mode they would end the process."""
    model = make(Lazy(), transform=transforms.Separable(nn.Sequential(nn.LazyLinear(2 * D), nn.Unflatten(1, (2, D)))))
    use(model)
    assert model.predictor.enter.weight.shape == (16, D + 1)
