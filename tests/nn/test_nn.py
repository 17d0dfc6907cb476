"""The networks: the laws every head and feature network must obey."""

import copy
import math

import pytest
import torch

import ndm_ct
from ndm_ct import schedules, transforms
from ndm_ct._core.config import from_config, to_config
from ndm_ct.nn import MLP, Preconditioned, TimeEmbedding, UNet


def awake(net, seed=0):
    """The network with every parameter drawn at random, the zero layers too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            spread = 1.0 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.2
            p.add_(spread * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net.eval()


NETS = {
    "mlp": (lambda: MLP(3, width=16, depth=2), (3,)),
    "mlp-image": (lambda: MLP((2, 2, 3), width=16, depth=2), (2, 2, 3)),
    "unet": (lambda: UNet(1, width=8), (1, 8, 8)),
    "unet-3-levels": (lambda: UNet(3, width=4, levels=3), (3, 8, 12)),
    "unet-1-level": (lambda: UNet(2, width=4, levels=1), (2, 5, 5)),
}


@pytest.fixture(params=NETS, name="case")
def _case(request):
    make, event = NETS[request.param]
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(5, *event, generator=generator, dtype=torch.float64)
    t = torch.rand(5, generator=generator, dtype=torch.float64)
    return make().double(), z, t


def test_untrained_net_is_exactly_zero(case):
    net, z, t = case
    assert torch.equal(net(z, t), torch.zeros_like(z))


def test_every_parameter_matters(case):
    net, z, t = case
    awake(net)(z, t).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_rows_are_independent(case):
    net, z, t = case
    net, z, t = awake(net).float(), z.float(), t.float()
    together = net(z, t)
    alone = torch.cat([net(z[i : i + 1], t[i : i + 1]) for i in range(len(z))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_forward_and_reverse_derivatives_agree(case):
    net, z, t = case
    net = awake(net)
    u, v = torch.randn_like(z), torch.randn_like(z)
    _, forward = torch.func.jvp(lambda y: net(y, t), (z,), (u,))
    _, pullback = torch.func.vjp(lambda y: net(y, t), z)
    torch.testing.assert_close((forward * v).sum(), (pullback(v)[0] * u).sum())
    step = 1e-6
    central = (net(z + step * u, t) - net(z - step * u, t)) / (2.0 * step)
    torch.testing.assert_close(forward, central, rtol=1e-6, atol=1e-6)


def test_derivative_in_time(case):
    net, z, t = case
    net, step = awake(net), 1e-6
    _, forward = torch.func.jvp(lambda time: net(z, time), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(forward, (net(z, t + step) - net(z, t - step)) / (2.0 * step), rtol=1e-5, atol=1e-5)


def test_batched_cotangents_equal_a_loop(case):
    net, z, t = case
    net = awake(net)
    cotangents = torch.randn(4, *z.shape, dtype=z.dtype)
    _, pullback = torch.func.vjp(lambda y: net(y, t), z)
    batched = torch.func.vmap(lambda v: pullback(v)[0])(cotangents)
    torch.testing.assert_close(batched, torch.stack([pullback(v)[0] for v in cotangents]))


def test_double_backward(case):
    net, z, t = case
    net = awake(net)
    weight = next(p for p in net.parameters() if p.ndim > 1)

    def penalty():
        y = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(y, t).square().sum(), y, create_graph=True)
        return gradient.square().sum()

    (second,) = torch.autograd.grad(penalty(), weight)
    index, step = (0,) * weight.ndim, 1e-5
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            weight[index] += sign * step
        values.append(penalty().item())
        with torch.no_grad():
            weight[index] -= sign * step
    assert second[index].item() == pytest.approx((values[0] - values[1]) / (2.0 * step), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("make", [lambda k: MLP((1, 4, 4), width=8, outputs=k, time=False),
                                  lambda k: UNet(1, width=4, outputs=k, time=False)])  # fmt: skip
def test_features_of_a_separable_transform(make, outputs):
    features = make(outputs)
    F = transforms.Separable(features, transforms.PolynomialBasis(outputs))
    assert F.cond_names() == (frozenset(), False)
    x, t = torch.randn(3, 1, 4, 4), torch.rand(3, dtype=torch.float64)
    assert torch.equal(F(x, t), x)
    awake(features)
    value, rate = F.with_derivative(x, t)
    step = 1e-3
    torch.testing.assert_close(rate, (F(x, t + step) - F(x, t - step)) / (2.0 * step), rtol=1e-3, atol=1e-3)
    assert not torch.equal(value, x)


def test_neural_transform_derivative():
    F = transforms.Neural(awake(UNet(1, width=4).double()))
    x, t, step = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.rand(3, dtype=torch.float64), 1e-6
    _, rate = F.with_derivative(x, t)
    torch.testing.assert_close(rate, (F(x, t + step) - F(x, t - step)) / (2.0 * step), rtol=1e-6, atol=1e-6)


def test_time_embedding_tells_times_apart_smoothly():
    torch.manual_seed(0)
    embedding = TimeEmbedding(64).double()
    t = torch.linspace(0.0, 1.0, 201, dtype=torch.float64)
    features = embedding(t)
    distance = torch.cdist(features, features) + torch.eye(201, dtype=torch.float64)
    assert distance.min() > 1e-3
    steps = features.diff(dim=0).norm(dim=1)
    assert steps.max() < 0.2 * torch.cdist(features, features).max()


@pytest.mark.parametrize(("levels", "sides"), [(2, (7, 7)), (3, (5, 6)), (1, (3, 5))])
def test_a_unet_takes_images_of_any_sides(levels, sides):
    """As with zeros below and to the right, cut off again."""
    torch.manual_seed(0)
    net, z, t = awake(UNet(1, width=4, levels=levels)), torch.randn(2, 1, *sides), torch.rand(2)
    factor = 2 ** (levels - 1)
    whole = torch.zeros(2, 1, *(-(-side // factor) * factor for side in sides))
    whole[:, :, : sides[0], : sides[1]] = z
    torch.testing.assert_close(net(z, t), net(whole, t)[:, :, : sides[0], : sides[1]])
    model = ndm_ct.NDM(Preconditioned(net), (1, *sides))
    assert ndm_ct.sample(model, 1, method="ddim", steps=2).shape == (1, 1, *sides)


def test_errors_name_the_cure():
    z, t = torch.zeros(2, 1, 6, 6), torch.zeros(2)
    with pytest.raises(TypeError, match="time=False"):
        UNet(1)(z)
    with pytest.raises(TypeError, match=r"call net\(x\)"):
        UNet(1, time=False)(z, t)
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        UNet(3, levels=3)(z, t)
    with pytest.raises(ValueError, match="width"):
        MLP(2, width=0)
    with pytest.raises(TypeError, match="schedule"):
        Preconditioned(MLP(2))(torch.zeros(2, 2), t)
    with pytest.raises(ValueError, match="data_std"):
        Preconditioned(MLP(2), data_std=0.0)
    with pytest.raises(ValueError, match="did you mean 'moments'"):
        Preconditioned(MLP(2), prediction="moment")
    with pytest.raises(ValueError, match="outputs=2"):
        Preconditioned(MLP(2), prediction="moments")(torch.zeros(2, 2), t, schedules.LinearLogSNR())


@pytest.mark.parametrize(
    "net",
    [
        MLP((2, 3), width=8, depth=1, outputs=2, dropout=0.25),
        UNet(3, width=8, levels=3, outputs=1, time=False, dropout=0.5),
        Preconditioned(UNet(1, width=8, outputs=2), prediction="moments", data_std=0.7),
        Preconditioned(MLP((2, 3), width=8, depth=1, classes=4)),
        UNet(1, width=8, classes=2),
        TimeEmbedding(5),
    ],
)
def test_configuration_rebuilds_the_net(net):
    rebuilt = from_config(to_config(net))
    assert type(rebuilt) is type(net)
    assert to_config(rebuilt) == to_config(net)
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == shapes
    assert repr(rebuilt) == repr(net)


@pytest.mark.parametrize("std", [1.0, 0.4, 3.0])
@pytest.mark.parametrize(
    "schedule", [schedules.LinearLogSNR(-8.0, 6.0), schedules.VarianceExploding(0.01, 20.0), schedules.Rectified()]
)
def test_preconditioning_is_the_formula(schedule, std):
    net = awake(MLP(3, width=16).double())
    head = Preconditioned(net, data_std=std)
    z, t = torch.randn(6, 3, dtype=torch.float64), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    for i in range(6):
        a, b = float(schedule.alpha(t[i])), float(schedule.sigma(t[i]))
        v = (a * std) ** 2 + b**2
        raw = net(z[i : i + 1] / math.sqrt(v), t[i : i + 1])
        expected = a * std**2 / v * z[i : i + 1] - b * std / math.sqrt(v) * raw
        torch.testing.assert_close(head(z, t, schedule)[i : i + 1], expected)


def test_variance_preserving_preconditioning_is_the_v_prediction():
    net, schedule = awake(MLP(3, width=16).double()), schedules.Cosine()
    x_head = ndm_ct.NDM(Preconditioned(net), event_shape=(3,), schedule=schedule)
    v_head = ndm_ct.NDM(net, event_shape=(3,), schedule=schedule, prediction="v")
    z, t = torch.randn(6, 3, dtype=torch.float64), torch.linspace(0.05, 1.0, 6, dtype=torch.float64)
    torch.testing.assert_close(x_head.predict_x(z, t), v_head.predict_x(z, t))


def test_moments_head_is_the_pair():
    net, schedule = awake(MLP(3, width=16, outputs=2).double()), schedules.LinearLogSNR(-8.0, 6.0)
    model = ndm_ct.NDM(
        Preconditioned(net, prediction="moments"), event_shape=(3,), schedule=schedule, prediction="moments"
    )
    z, t = torch.randn(6, 3, dtype=torch.float64), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    F, dF = model.moments(z, t)
    raw = net(z, t)
    torch.testing.assert_close(F, alpha * z - sigma * raw[:, 0])
    torch.testing.assert_close(dF, raw[:, 1])


@pytest.mark.parametrize("std", [1.0, 0.5])
@pytest.mark.parametrize("schedule", [schedules.LinearLogSNR(-13.3, 8.0), schedules.VariancePreserving()])
def test_untrained_model_is_the_gaussian_it_assumes(schedule, std):
    """The zero net is the denoiser of N(0, s² I), so log p is that Gaussian's, smoothed by alpha, sigma at t_min.

    For s = 1 exactly; else up to the mismatch of the prior, of order alpha(1)^2.
    """
    torch.manual_seed(0)
    x = std * torch.randn(16, 1, 4, 4, dtype=torch.float64)
    net = UNet(1, width=4).double()
    model = ndm_ct.NDM(Preconditioned(net, data_std=std), event_shape=(1, 4, 4), schedule=schedule)
    start = torch.tensor(model.t_min, dtype=torch.float64)
    spread = float(torch.sqrt((schedule.alpha(start) * std) ** 2 + schedule.sigma(start) ** 2))
    expected = torch.distributions.Normal(0.0, spread).log_prob(x).sum((1, 2, 3))
    found = ndm_ct.loglik(model, x, trace="exact")
    mismatch = 0.0 if std == 1.0 else 16 * float(schedule.alpha(torch.ones((), dtype=torch.float64))) ** 2
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3 + 2.0 * mismatch)


class Labelled(torch.nn.Module):
    """A network with conditioning."""

    def __init__(self):
        super().__init__()
        self.net = MLP(2, width=8)

    def forward(self, z, t, *, label=None):
        out = self.net(z, t)
        return out if label is None else out + label[:, None]


def test_conditioning_passes_through_and_unknown_keywords_do_not():
    model = ndm_ct.NDM(Preconditioned(Labelled()), event_shape=(2,))
    z, t = torch.randn(3, 2), torch.tensor(0.3, dtype=torch.float64)
    plain, shifted = model.predict_x(z, t), model.predict_x(z, t, label=torch.ones(3))
    torch.testing.assert_close(plain - shifted, model.schedule.sigma(t).float().expand_as(z))
    with pytest.raises(TypeError, match="did you mean 'label'"):
        model.velocity(z, 0.3, labels=torch.ones(3))
    unlabelled = ndm_ct.NDM(Preconditioned(MLP(2, width=8)), event_shape=(2,))
    with pytest.raises(TypeError, match="label"):
        unlabelled.velocity(z, 0.3, label=torch.ones(3))


def test_a_copied_model_uses_its_own_schedule():
    schedule = schedules.LearnedLogSNR(-8.0, 6.0)
    model = ndm_ct.NDM(Preconditioned(MLP(2, width=8)), event_shape=(2,), schedule=schedule)
    assert not any(name.startswith("predictor") and "schedule" in name for name in model.state_dict())
    assert len(list(model.parameters())) == len(set(model.parameters()))
    clone = copy.deepcopy(model)
    z, t = torch.randn(3, 2), torch.tensor(0.4, dtype=torch.float64)
    before = model.predict_x(z, t)
    assert torch.equal(clone.predict_x(z, t), before)
    with torch.no_grad():
        clone.schedule.centre.sub_(0.3)
        clone.schedule.weight.add_(3.0)
    assert torch.equal(model.predict_x(z, t), before)
    torch.testing.assert_close(clone.predict_x(z, t), clone.schedule.alpha(t).float() * z)
    assert not torch.equal(clone.predict_x(z, t), before)


def test_gradient_reaches_a_learned_schedule_through_the_head():
    schedule = schedules.LearnedLogSNR(-8.0, 6.0)
    model = ndm_ct.NDM(Preconditioned(MLP(2, width=8)), event_shape=(2,), schedule=schedule)
    model.predict_x(torch.randn(3, 2), torch.tensor(0.4, dtype=torch.float64)).sum().backward()
    assert schedule.weight.grad.abs().sum() > 0.0


def test_a_predictor_serves_models_of_different_schedules():
    predictor = Preconditioned(awake(MLP(2, width=8)))
    z, t = torch.randn(3, 2), torch.full((3,), 0.4, dtype=torch.float64)
    first = ndm_ct.NDM(predictor, event_shape=(2,), schedule=schedules.LinearLogSNR(-8.0, 6.0))
    before = first.predict_x(z, t)
    second = ndm_ct.NDM(predictor, event_shape=(2,), schedule=schedules.LinearLogSNR(-2.0, 6.0))
    assert not torch.allclose(second.predict_x(z, t), before)
    assert torch.equal(first.predict_x(z, t), before)


class Layered(torch.nn.Module):
    """A network whose layers have names that predictors of the library declare things by."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        setattr(self, name, torch.nn.Linear(3, 2))

    def forward(self, z, t):
        return getattr(self, self.name)(torch.cat([z, t[:, None]], 1))


@pytest.mark.parametrize("name", ["head", "prediction", "null", "wants_schedule"])
def test_a_layer_may_have_any_name(name):
    model = ndm_ct.NDM(Layered(name), (2,))
    ndm_ct.fit(model, torch.randn(8, 2), steps=1, progress=False)


def test_a_configuration_names_the_prediction_as_earlier_files_did():
    config = to_config(Preconditioned(MLP(2, width=4, outputs=2), prediction="moments"))
    assert config["head"] == "moments"
    assert from_config(config).prediction == "moments"


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
@pytest.mark.parametrize("inside", [False, True])
def test_wrappers_leave_no_prefix_in_the_weights(wrap, inside):
    net = MLP(2, width=4, depth=1)
    predictor = Preconditioned(wrap(net)) if inside else wrap(Preconditioned(net))
    model = ndm_ct.NDM(predictor, (2,))
    assert model.state_dict().keys() == ndm_ct.NDM(Preconditioned(net), (2,)).state_dict().keys()


def test_a_compiled_network_runs_compiled():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    net = torch.compile(Layered("out"), backend=backend)
    model, plain = ndm_ct.NDM(net, (2,)), net._orig_mod
    z, t = torch.randn(3, 2), torch.full((3,), 0.4, dtype=torch.float64)
    out = model.predict_x(z, t)
    assert calls
    assert model.predictor is plain
    torch.testing.assert_close(out, plain.forward(z, t.float()))


# -------------------------------------------------------------------------------------------------------------- labels

LABELLED = {
    "mlp": (lambda **options: MLP(3, width=16, depth=2, **options), (3,)),
    "unet": (lambda **options: UNet(1, width=4, **options), (1, 4, 4)),
}


@pytest.fixture(params=LABELLED, name="labelled")
def _labelled(request):
    """A network of three classes, states, times and every label, -1 included."""
    make, event = LABELLED[request.param]
    z = torch.randn(5, *event, dtype=torch.float64)
    t, label = torch.rand(5, dtype=torch.float64), torch.tensor([1, -1, 0, 2, 1])
    return awake(make(classes=3).double()), z, t, label


@pytest.mark.parametrize("name", LABELLED)
def test_a_label_adds_its_vector_to_the_embedding_of_time(name):
    make, event = LABELLED[name]
    net, plain = awake(make(classes=3).double()), make().double()
    z, t = torch.randn(5, *event, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    label = torch.tensor([1, -1, 0, 2, 1])
    state = net.state_dict()
    vectors = state.pop("labels.vectors.weight")
    plain.load_state_dict(state)
    plain.embedding.register_forward_hook(lambda module, given, out: out + vectors[[2, 0, 1, 3, 2]])
    torch.testing.assert_close(net(z, t, label), plain(z, t), rtol=1e-12, atol=1e-12)


def test_no_label_is_minus_one_and_every_class_has_its_own(labelled):
    net, z, t, label = labelled
    assert torch.equal(net(z, t), net(z, t, label=torch.full((5,), -1)))
    same = torch.stack([net(z[:1], t[:1], label=torch.tensor([y]))[0] for y in (-1, 0, 1, 2)]).flatten(1)
    assert (torch.cdist(same, same) + torch.eye(4)).min() > 1e-3
    for dtype in (torch.int8, torch.int16, torch.int32):
        assert torch.equal(net(z, t, label=label.to(dtype)), net(z, t, label=label))
    assert torch.equal(net(z[2:4], t[2:4], label=label[2:4].byte()), net(z[2:4], t[2:4], label=label[2:4]))
    assert net(z[:0], t[:0], label=label[:0]).shape == z[:0].shape


def test_labelled_rows_are_independent(labelled):
    net, z, t, label = labelled
    alone = torch.cat([net(z[i : i + 1], t[i : i + 1], label=label[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(net(z, t, label=label), alone)


def test_every_vector_of_the_labels_is_trained(labelled):
    net, z, t, label = labelled
    net(z, t, label=label).square().sum().backward()
    assert net.labels.vectors.weight.grad.any(1).all()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_labels_under_the_transforms_of_torch_func(labelled):
    net, z, t, label = labelled
    u, step = torch.randn_like(z), 1e-6
    _, forward = torch.func.jvp(lambda y: net(y, t, label=label), (z,), (u,))
    central = (net(z + step * u, t, label=label) - net(z - step * u, t, label=label)) / (2.0 * step)
    torch.testing.assert_close(forward, central, rtol=1e-6, atol=1e-6)
    value, pullback = torch.func.vjp(lambda y: net(y, t, label=label), z)
    (product,) = torch.func.vmap(pullback)(torch.stack([u, z]))
    torch.testing.assert_close((product[0] * u).sum(), (forward * u).sum())
    one = torch.func.vmap(lambda a, b, c: net(a[None], b[None], label=c[None])[0])(z, t, label)
    torch.testing.assert_close(one, value)


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "quadrature"])
def test_a_labelled_likelihood_is_that_of_each_class_by_itself(trace):
    """Rows have nodes and probes of their own, so a row's number is that of a batch all of whose labels are its own."""
    net = awake(MLP(3, width=16, depth=1, classes=3).double())
    model = ndm_ct.NDM(Preconditioned(net), event_shape=(3,), schedule=schedules.LinearLogSNR(-4.0, 4.0))
    x, label = torch.randn(4, 3, dtype=torch.float64), torch.tensor([2, 0, -1, 2])

    def loglik(**cond):
        generator = torch.Generator().manual_seed(2)
        return ndm_ct.loglik(model, x, trace=trace, rtol=1e-4, atol=1e-4, generator=generator, **cond)

    found = loglik(label=label)
    for y in (-1, 0, 2):
        alone = loglik(**({} if y == -1 else {"label": torch.full((4,), y)}))
        torch.testing.assert_close(found[label == y], alone[label == y], rtol=1e-9, atol=1e-9)
        assert (found - alone)[label != y].abs().min() > 1e-2


def test_features_and_transforms_take_labels():
    features = awake(MLP(3, width=8, outputs=2, time=False, classes=3))
    x, label = torch.randn(4, 3), torch.tensor([2, 0, -1, 2])
    assert torch.equal(features(x), features(x, label=torch.full((4,), -1)))
    for transform in (transforms.Separable(features), transforms.Neural(awake(MLP(3, width=8, classes=3)))):
        assert transform.cond_names() == (frozenset({"label"}), False)
        model = ndm_ct.NDM(lambda z, t: 0.5 * z, event_shape=(3,), transform=transform)
        found = model.velocity(x, 0.4, label=label)
        assert torch.equal(found[2], model.velocity(x, 0.4)[2])
        assert (found - model.velocity(x, 0.4)).abs().amax(1)[[0, 1, 3]].min() > 1e-4


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(
    ("label", "words"),
    [
        (torch.tensor([0, 3, -1, 4, 0]), r"label is 3 in row 1.*\[1, 3\].*from 0 to 2, or -1.*more classes"),
        (torch.tensor([0, 1, -2, 1, 0]), "label is -2 in row 2"),
        (torch.tensor([0, 1, 255, 1, 0], dtype=torch.uint8), "label is 255 in row 2"),
        (torch.zeros(5), r"label has dtype torch.float32.*\.long\(\)"),
        (torch.zeros(5, dtype=torch.bool), "label has dtype torch.bool"),
        (torch.zeros(5, 3, dtype=torch.long), r"label has shape \(5, 3\), expected \(5,\).*one-hot"),
        (torch.zeros(4, dtype=torch.long), r"label has shape \(4,\), expected \(5,\)"),
        (torch.tensor(1), r"label has shape \(\), expected \(5,\).*expand"),
        (torch.zeros(5, dtype=torch.long, device="meta"), r"label is on device meta.*\.to\(cpu\)"),
        (1, r"label is a int.*torch\.full"),
        ([0, 1, 0, 1, 0], "label is a list"),
    ],
)
def test_wrong_labels_are_named(name, label, words):
    make, event = LABELLED[name]
    with pytest.raises(ValueError, match=words):
        make(classes=3)(torch.zeros(5, *event), torch.zeros(5), label=label)


def test_wrong_labels_stop_a_likelihood():
    model = ndm_ct.NDM(Preconditioned(MLP(2, width=8, classes=3)), event_shape=(2,))
    for trace in ("exact", "hutchinson", "quadrature"):
        with pytest.raises(ValueError, match="label is 3 in row 1"):
            ndm_ct.loglik(model, torch.zeros(2, 2), label=torch.tensor([0, 3]), trace=trace)


@pytest.mark.parametrize("name", LABELLED)
def test_a_network_without_classes_refuses_a_label(name):
    make, event = LABELLED[name]
    net, x, label = make(), torch.zeros(2, *event), torch.zeros(2, dtype=torch.long)
    assert net.cond_names() == Preconditioned(net).cond_names() == (frozenset(), False)
    assert net.null == Preconditioned(net).null == {}
    with pytest.raises(TypeError, match=r"without classes.*classes=K"):
        net(x, torch.zeros(2), label=label)
    model = ndm_ct.NDM(Preconditioned(net), event_shape=event)
    for use in (ndm_ct.loglik, ndm_ct.elbo, ndm_ct.encode):
        with pytest.raises(TypeError, match="got the keyword 'label'"):
            use(model, x, label=label)


@pytest.mark.parametrize("name", LABELLED)
def test_a_network_with_classes_says_so(name):
    net = LABELLED[name][0](classes=3)
    assert net.cond_names() == Preconditioned(net).cond_names() == (frozenset({"label"}), False)
    assert net.null == Preconditioned(net).null == {"label": -1}
    assert Preconditioned(Labelled()).null == {}
    with pytest.raises(ValueError, match="classes"):
        LABELLED[name][0](classes=0)


@pytest.mark.parametrize("net", [MLP(2, width=8), UNet(1, width=4)], ids=["mlp", "unet"])
def test_configurations_from_before_there_were_classes(net):
    """They are the configurations of networks without classes, to the letter: files and digests stay the same."""
    config = to_config(net)
    assert "classes" not in config
    assert from_config(config).classes is None
    assert not any("labels" in name for name in net.state_dict())
    assert to_config(from_config(config | {"classes": 4}))["classes"] == 4


def test_default_unet_is_small():
    assert 150_000 < sum(p.numel() for p in UNet(1).parameters()) < 250_000


def test_initial_weights_of_a_perceptron_resolve_its_input():
    """Standard deviations 2/sqrt(n) in the first layer and He's sqrt(2/n) in the hidden ones."""
    torch.manual_seed(0)
    net = MLP(50, width=200, depth=1)
    assert float(net.input.weight.detach().std()) == pytest.approx(2.0 / math.sqrt(50.0), rel=0.03)
    assert float(net.input.bias.detach().std()) == pytest.approx(2.0 / math.sqrt(50.0), rel=0.15)
    assert float(net.blocks[0].first.weight.detach().std()) == pytest.approx(math.sqrt(2.0 / 200.0), rel=0.03)
