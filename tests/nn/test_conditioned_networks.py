"""Networks with a context and a sequence, and what "none of it" is to them."""

import math

import pytest
import torch

import ndm_ct
from ndm_ct import transforms
from ndm_ct._core.config import from_config, to_config
from ndm_ct.nn import MLP, DiT, Preconditioned, UNet


def awake(net, seed=0):
    """Weights away from the zero function."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return net.eval()


IMAGE = (1, 4, 4)
NETS = {
    "MLP": (lambda **more: MLP(IMAGE, width=16, depth=1, **more), {"context": 3}),
    "UNet": (lambda **more: UNet(1, width=4, **more), {"context": 3}),
    "UNet with attention": (lambda **more: UNet(1, width=4, attention=2, **more), {"context": 3, "sequence": 5}),
    "DiT": (lambda **more: DiT(IMAGE, width=16, depth=2, **more), {"context": 3, "sequence": 5}),
}
NAN = math.nan


def given(sizes, rows=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"context": (rows, 3), "sequence": (rows, 4, 5)}
    return {name: torch.randn(shapes[name], generator=generator) for name in sizes}


def states(rows=3):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, *IMAGE, generator=generator), torch.rand(rows, generator=generator)


@pytest.mark.parametrize("name", NETS)
def test_the_network_starts_as_the_zero_function(name):
    make, sizes = NETS[name]
    z, t = states()
    assert torch.equal(make(**sizes, classes=2)(z, t, label=torch.tensor([0, 1, -1]), **given(sizes)), 0.0 * z)


@pytest.mark.parametrize("name", NETS)
def test_every_condition_counts_in_its_own_row(name):
    make, sizes = NETS[name]
    net, (z, t), cond = awake(make(**sizes)), states(), given(sizes)
    before = net(z, t, **cond)
    for key in sizes:
        other = {**cond, key: torch.cat([cond[key][:1], cond[key][1:2] + 1.0, cond[key][2:]])}
        after = net(z, t, **other)
        torch.testing.assert_close(after[[0, 2]], before[[0, 2]])
        assert float((after[1] - before[1]).detach().abs().max()) > 1e-4
    for row in range(3):
        alone = net(z[row : row + 1], t[row : row + 1], **{key: value[row : row + 1] for key, value in cond.items()})
        torch.testing.assert_close(alone, before[row : row + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_nan_is_none_of_it(name):
    make, sizes = NETS[name]
    net, (z, t), cond = awake(make(**sizes)), states(), given(sizes)
    assert set(net.null) == set(sizes)
    nothing = net(z, t)
    unknown = {key: torch.full_like(value, NAN) for key, value in cond.items()}
    torch.testing.assert_close(net(z, t, **unknown), nothing)
    some = {key: torch.cat([torch.full_like(value[:1], NAN), value[1:]]) for key, value in cond.items()}
    torch.testing.assert_close(net(z, t, **some)[0], nothing[0])
    torch.testing.assert_close(net(z, t, **some)[1:], net(z, t, **cond)[1:])
    partly = cond["context"].clone()
    partly[:, 0] = NAN
    torch.testing.assert_close(net(z, t, **{**unknown, "context": partly}), nothing)
    weights = torch.autograd.grad(net(z, t, **some).square().sum(), list(net.parameters()), allow_unused=True)
    assert all(bool(each.isfinite().all()) for each in weights if each is not None)


@pytest.mark.parametrize("name", ["UNet with attention", "DiT"])
def test_shorter_sequences_are_filled_up_with_nan(name):
    make, _ = NETS[name]
    net, (z, t) = awake(make(sequence=5)), states()
    sequence = given({"sequence"})["sequence"]
    filled = torch.cat([sequence, torch.full((3, 2, 5), NAN)], 1)
    torch.testing.assert_close(net(z, t, sequence=filled), net(z, t, sequence=sequence))
    torch.testing.assert_close(net(z, t, sequence=sequence.flip(1)), net(z, t, sequence=sequence))
    shorter = sequence.clone()
    shorter[0, 2:] = NAN
    torch.testing.assert_close(net(z, t, sequence=shorter)[:1], net(z[:1], t[:1], sequence=sequence[:1, :2]))


@pytest.mark.parametrize("name", NETS)
def test_guidance_leaves_the_conditions_out(name):
    make, sizes = NETS[name]
    model = ndm_ct.NDM(Preconditioned(awake(make(**sizes))), IMAGE)
    z, cond, t = states()[0], given(sizes), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        conditional, free = model.predict_x(z, t, **cond), model.predict_x(z, t)
        found = ndm_ct.guided(model, 3.0).predict_x(z, t, **cond)
    torch.testing.assert_close(found, free + 3.0 * (conditional - free), rtol=1e-4, atol=1e-4)
    assert ndm_ct.sample(model, 3, method="ddim", steps=2, guidance=2.0, **cond).shape == (3, *IMAGE)


@pytest.mark.parametrize("name", NETS)
def test_densities_and_derivatives_pass_through(name):
    """Forward derivatives for a transform, and the exact trace."""
    make, sizes = NETS[name]
    net, cond = awake(make(**sizes)).double(), {key: value.double() for key, value in given(sizes).items()}
    model = ndm_ct.NDM(Preconditioned(net), IMAGE, checks=False)
    x = states()[0].double()
    rows, rough = {key: value[:2] for key, value in cond.items()}, {"rtol": 1e-2, "atol": 1e-2}
    alone = ndm_ct.loglik(model, x[1:2], **{key: value[1:] for key, value in rows.items()}, **rough)
    torch.testing.assert_close(ndm_ct.loglik(model, x[:2], **rows, **rough)[1:], alone, rtol=1e-6, atol=1e-6)
    F, t, step = transforms.Neural(net), torch.rand(3, dtype=torch.float64), 1e-6
    _, rate = F.with_derivative(x, t, **cond)
    slope = (F(x, t + step, **cond) - F(x, t - step, **cond)) / (2.0 * step)
    torch.testing.assert_close(rate, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_a_description_makes_the_network_again(name):
    make, sizes = NETS[name]
    net = make(**sizes, classes=2)
    again = from_config(to_config(net))
    assert to_config(again) == to_config(net)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in net.state_dict().items()
    }
    plain = to_config(MLP(2))
    assert not {"classes", "context", "sequence", "attention", "heads"} & set(plain)


def test_conditions_are_dropped_in_training():
    torch.manual_seed(0)
    model = ndm_ct.NDM(Preconditioned(MLP(2, width=8, depth=1, context=2)), (2,), checks=False)
    x = torch.randn(64, 2)
    ndm_ct.fit(model, x, steps=3, batch_size=16, cond={"context": x + 0.1}, cond_dropout=0.5, progress=False)
    moved = model.predictor.net.contexts.none
    assert float(moved.detach().abs().max()) > 0.0
    assert ndm_ct.loglik(model, x[:2], context=x[:2]).shape == (2,)


def test_a_dit_puts_patches_back_in_their_places():
    """With attention and perceptron off and the output undoing the input, the network is the identity."""
    net = DiT((2, 4, 6), patch=2, width=8, depth=1)
    net.places.zero_()
    basis = torch.eye(8)
    net.input.weight.data.copy_(basis.reshape(8, 2, 2, 2))
    net.input.bias.data.zero_()
    net.norm = torch.nn.Identity()
    net.output.weight.data.copy_(basis)
    z = torch.randn(3, 2, 4, 6)
    torch.testing.assert_close(net(z, torch.zeros(3)), z)


def test_outputs_without_time():
    net = awake(DiT(IMAGE, width=16, depth=1, outputs=2, time=False))
    assert net(states()[0]).shape == (3, 2, *IMAGE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, t: MLP(IMAGE)(z, t, context=torch.zeros(3, 2)), TypeError, "built without a context"),
        (lambda z, t: MLP(IMAGE, context=2)(z, t, context=torch.zeros(3, 5)), ValueError, r"expected .*\(3, 2\).*cat"),
        (lambda z, t: UNet(1, sequence=2)(z, t, sequence=torch.zeros(3, 2)), ValueError, r"\(3, L, 2\).*NaN"),
        (lambda z, t: UNet(1)(z, t, sequence=torch.zeros(3, 2, 2)), TypeError, "built without a sequence"),
        (lambda z, t: UNet(1, attention=3), ValueError, "attention=3 must be"),
        (lambda z, t: UNet(1, sequence=2, attention=0), ValueError, "at least one"),
        (lambda z, t: UNet(1, width=5, attention=1, heads=3), ValueError, "heads=3 must divide"),
        (lambda z, t: DiT((1, 5, 4)), ValueError, "multiples of patch=2"),
        (lambda z, t: DiT(IMAGE, width=6), ValueError, "multiple of 4"),
        (lambda z, t: ndm_ct.NDM(DiT((1, 8, 8)), IMAGE), ValueError, "make the two agree"),
    ],
)
def test_errors_say_what_fits(call, error, message):
    with pytest.raises(error, match=message):
        call(*states())
