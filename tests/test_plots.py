"""Pictures show the numbers that they are given: axes, ranges, marks, and refusals by name."""

import numpy as np
import pytest
import torch

import ndm_ct
from ndm_ct import nn, transforms

pytest.importorskip("matplotlib")
from ndm_ct import plots


class Doubling(transforms.Transform):
    """F = (1 + t) x."""

    linear = True

    def forward(self, x, t, /):
        return (1.0 + t.to(x)).reshape(-1, *(1,) * (x.ndim - 1)) * x


def model(network, shape):
    return ndm_ct.NDM(nn.Preconditioned(network), shape, transform=Doubling())


def drawn(axis):
    return np.asarray(axis.get_images()[0].get_array())


def test_images_of_the_forward_process_and_what_it_changes():
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    figure = plots.forward_process(model(nn.UNet(1, width=8, levels=1), (1, 4, 4)), x, times=(0.0, 0.5, 1.0))
    axes = np.array(figure.axes[:-1]).reshape(6, 3)
    for row, t in enumerate((0.0, 0.5, 1.0)):
        for column in range(3):
            np.testing.assert_allclose(drawn(axes[2 * row, column]), 0.5 + 0.5 * (1 + t) * x[column, 0], atol=1e-6)
            np.testing.assert_allclose(drawn(axes[2 * row + 1, column]), t * x[column, 0], atol=1e-6)
    limits = {axes[row, column].get_images()[0].get_clim() for row in (1, 3, 5) for column in range(3)}
    assert len(limits) == 1  # one scale, with zero in its middle
    (low, high), largest = limits.pop(), float(x.abs().max())
    assert (low, high) == pytest.approx((-largest, largest))


def test_points_of_the_forward_process():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    figure = plots.forward_process(model(nn.MLP(2, width=8), (2,)), x, times=(0.0, 1.0))
    places = [axis.collections[0].get_offsets() for axis in figure.axes]
    np.testing.assert_allclose(places[0], x, atol=1e-6)
    np.testing.assert_allclose(places[1], 2.0 * x, atol=1e-6)


def test_of_many_coordinates_those_that_change_most():
    scale = torch.tensor([1.0, 5.0, 0.1, 3.0])
    x = scale * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    figure = plots.forward_process(model(nn.MLP(4, width=8), (4,)), x, times=(1.0,))
    assert figure.axes[0].get_xlabel() == "coordinate 1"
    assert figure.axes[0].get_ylabel() == "coordinate 3"


def test_one_coordinate_is_drawn_against_x():
    x = torch.randn(20, 1, generator=torch.Generator().manual_seed(0))
    (axis,) = plots.forward_process(model(nn.MLP(1, width=8), (1,)), x, times=(1.0,)).axes
    np.testing.assert_allclose(axis.collections[0].get_offsets(), torch.cat([x, 2.0 * x], 1), atol=1e-6)


def test_images_are_levels_of_their_bins():
    bins = ndm_ct.quantisation.Quantisation(5)
    levels = torch.arange(4).reshape(1, 1, 2, 2)
    real = bins.centres(levels, torch.float64) + 0.05
    figure = plots.image_rows({"levels": levels, "real": real}, quantisation=5)
    for axis in figure.axes:
        np.testing.assert_allclose(drawn(axis), levels[0, 0] / 4.0)
    assert [axis.get_ylabel() for axis in figure.axes] == ["levels", "real"]
    colour = plots.image_rows({"colour": torch.zeros(2, 3, 2, 2)})
    assert drawn(colour.axes[0]).shape == (2, 2, 3)
    with pytest.raises(ValueError, match=r"one or three channels, got \{'a': \(2, 2\)\}"):
        plots.image_rows({"a": torch.zeros(2, 2)})


@pytest.mark.parametrize("bits", [False, True])
def test_a_training_marks_the_best_held_out_bound(bits):
    factor = 0.5 if bits else 1.0
    history = tuple(
        {"step": s, "seconds": s / 2, "loss": 9.0 - s} | ({"bits_per_dim": 0.5 * (9.0 - s)} if bits else {})
        for s in range(1, 6)
    )
    validation = tuple(
        {"step": s, "seconds": s / 2, "validation_elbo": -v, "validation_stderr": 0.1}
        | ({"validation_bits_per_dim": 0.5 * v} if bits else {})
        for s, v in ((2, 7.0), (4, 5.0), (5, 5.5))
    )
    result = ndm_ct.FitResult(step=5, finished=True, history=history, validation=validation)
    for axis, key in zip(plots.training(result).axes, ("step", "seconds"), strict=True):
        ring = next(line for line in axis.lines if line.get_label() == "best")
        assert float(np.ravel(ring.get_xdata())[0]) == (4.0 if key == "step" else 2.0)
        assert float(np.ravel(ring.get_ydata())[0]) == 5.0 * factor
        bar = axis.containers[0].lines[2][0].get_segments()[0]
        assert bar[1][1] - bar[0][1] == pytest.approx(0.2 * factor)
    alone = tuple(row | {"validation_stderr": None} for row in validation)  # of a single held-out row
    plots.training(ndm_ct.FitResult(step=5, finished=True, history=history, validation=alone))
    plots.training({"no validation": ndm_ct.FitResult(step=5, finished=True, history=history, validation=())})


def test_pairs_of_columns():
    generator = np.random.default_rng(0)
    data, samples = generator.standard_normal((80, 3)), generator.standard_normal((90, 3))
    figure = plots.pairs(data, torch.as_tensor(samples), names=("a", "b", "c"))
    axes = np.array(figure.axes).reshape(3, 3)
    np.testing.assert_allclose(axes[2, 0].collections[0].get_offsets(), data[:, [0, 2]])
    np.testing.assert_allclose(axes[2, 0].collections[1].get_offsets(), samples[:, [0, 2]])
    assert [axis.get_xlabel() for axis in axes[2]] == ["a", "b", "c"]
    assert len(plots.pairs(data, samples, most=2).axes) == 4
    with pytest.raises(ValueError, match=r"same columns, got \(80, 3\) and \(90, 2\)"):
        plots.pairs(data, samples[:, :2])


def test_work_and_precision_have_plain_numbers(tmp_path):
    figure = plots.work_precision({"a": ([10, 20, 40], [1e-2, 1e-3, 1e-4]), "b": ([10], [1e-1])}, error="nats")
    plots.save(figure, tmp_path / "w.png")
    (axis,) = figure.axes
    words = [label.get_text() for label in axis.get_xticklabels()]
    assert {"10", "20"} <= set(words)
    assert not any("$" in label.get_text() for label in axis.get_xticklabels(minor=True))
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"curves \['a'\] have work or error that is not positive"):
        plots.work_precision({"a": ([1.0], [0.0])})
