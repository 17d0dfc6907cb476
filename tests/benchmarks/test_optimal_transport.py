"""The benchmark of straight paths: its measures on cases that are known, and a small run."""

import json
import math

import pytest
import torch

import ndm_ct
from ndm_ct import schedules, transforms

optimal_transport = pytest.importorskip("optimal_transport")
from bench import transport  # noqa: E402


def normal(tau, schedule, k=None, t_min=None):
    transform = None if k is None else transforms.TimeScaling(k)
    return ndm_ct.reference.Gaussian(
        torch.zeros(1), torch.full((1, 1), tau**2), schedule=schedule, transform=transform, t_min=t_min
    )


def test_straight_paths_have_no_error():
    tau = 0.5
    model = normal(
        tau, schedules.Rectified(), lambda t: torch.sqrt(((1.0 - t) * tau + t) ** 2 - t**2) / ((1.0 - t) * tau), 0.01
    )
    # Not to the very end, where F is infinite.
    times = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    x = model.sample_data(20)
    states = torch.stack([x * ((1.0 - t) * tau + t) / (0.99 * tau + 0.01) for t in times])
    velocity = torch.stack([model.velocity(z, t) for z, t in zip(states, times, strict=True)])
    chord = (states[-1] - states[0]) / 0.98
    assert float((velocity - chord).abs().max()) < 1e-6
    assert float(transport.straightness(states)) < 1e-20


def test_paths_and_their_error_under_the_rectified_schedule():
    model = normal(1.0, schedules.Rectified(), t_min=0.1)
    x = model.sample_data(20)
    states = transport.paths(model, x, 200)
    t = torch.linspace(0.1, 1.0, 201, dtype=torch.float64)
    spread = torch.sqrt((1.0 - t) ** 2 + t**2)
    torch.testing.assert_close(states, (spread / spread[0])[:, None, None] * x, rtol=1e-5, atol=1e-5)
    chord = float(spread[-1] - spread[0])
    velocity = 0.9 * (2.0 * t - 1.0) / spread
    expected = float(torch.trapezoid((velocity - chord).square(), dx=1.0 / 200) / chord**2)
    assert float(transport.straightness(states)) == pytest.approx(expected, rel=1e-3)
    # The monotone map is x spread_1/spread_0; the path is furthest from the line where its velocity is the chord's.
    line = (1.0 - t) / 0.9 + (t - 0.1) / 0.9 * spread[-1] / spread[0]
    furthest = float((spread / spread[0] - line).abs().max())
    rms, largest = transport.deviation(states, x * spread[-1] / spread[0])
    assert rms == pytest.approx(furthest * float(x.square().mean().sqrt()), rel=1e-3)
    assert largest == pytest.approx(furthest * float(x.abs().max()), rel=1e-3)


def test_the_monotone_map_preserves_ranks():
    line = transport.Line()
    x = line.law.sample_data(20_000, generator=torch.Generator().manual_seed(0))
    assert float(x.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(x.std()) == pytest.approx(1.0, abs=0.03)
    image = line.monotone_map(x)
    assert bool((image[x[:, 0].argsort(), 0].diff() >= 0.0).all())
    assert float(image.std()) == pytest.approx(1.0, abs=0.03)
    u = torch.tensor([0.01, 0.4, 0.9], dtype=torch.float64)
    torch.testing.assert_close(line.cdf(line.quantile(u, 0.3), 0.3), u)


def test_quantiles_of_smoothed_points_and_their_gradient():
    points = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.2, 0.5], dtype=torch.float64)
    q = transport.smoothed_quantiles(points, torch.tensor([0.5]).double(), u)
    torch.testing.assert_close(q, 0.5 * math.sqrt(2.0) * torch.erfinv(2.0 * u - 1.0)[None])
    (gradient,) = torch.autograd.grad(q[0, 0], points)  # all points shifted by h shift the quantile by h
    torch.testing.assert_close(gradient, torch.full_like(points, 0.25))


def test_less_noise_allows_straighter_paths():
    line = transport.Line()
    quiet, loud = transport.LATE["transport"], schedules.LinearLogSNR(transport.GAMMA_MIN, 7.0)
    found = [transport.straightest(line, schedule, 0.0, (16, 8), 20) for schedule in (quiet, loud)]
    errors = [float(transport.straightness(states)) for states in found]
    assert 0.0 < errors[0] < 0.5 * errors[1]
    deviations = [transport.deviation(states, states[-1])[0] for states in found]
    assert 0.0 < deviations[0] < 0.5 * deviations[1]


@pytest.fixture
def tiny(monkeypatch):
    size = optimal_transport.Size(8, 32, 20, 3, 20, 20, (8, 4), 3, (0,))
    monkeypatch.setitem(optimal_transport.PRESETS, "smoke", size)


def test_a_small_run_is_computed_once(tmp_path, tiny, monkeypatch):
    words = ["--preset", "smoke", "--quiet", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    words += ["--data", "mixture", "--models", "rectified,transport,transport-batch"]
    report = optimal_transport.main(words)
    assert [row["model"] for row in report["cells"]] == ["rectified", "transport", "transport-batch"]
    assert report["cells"][0]["nll_gap"] == 0.0
    for key, value in report["least"]["transport"].items():
        assert value < report["least"]["diffusion"][key]
    monkeypatch.setattr(ndm_ct, "fit", None)
    assert optimal_transport.main(words) == report
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(report))
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()
    assert "| mixture | transport | 0 |" in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        optimal_transport.main(["--models", "rectifed"])
    assert "rectifed unknown" in capsys.readouterr().err


def test_what_is_for_the_line_only_is_left_out_elsewhere(tmp_path, tiny, capsys):
    words = ["--preset", "smoke", "--quiet", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    words += ["--data", "moons", "--models"]
    with pytest.raises(SystemExit):
        optimal_transport.main([*words, "transport-batch"])
    assert "transport-batch is for --data mixture" in capsys.readouterr().err
    report = optimal_transport.main([*words, "rectified,transport-batch"])
    assert [row["model"] for row in report["cells"]] == ["rectified"]
    assert "moons, transport-batch: left out" in capsys.readouterr().out


def test_every_way_of_estimating_the_bounds_agrees():
    model = normal(1.0, schedules.Rectified(), t_min=0.1)
    x = model.sample_data(20_000, generator=torch.Generator().manual_seed(0))
    found = transport.weightings(model, x)
    tau = torch.linspace(0.0, 1.0, 4001, dtype=torch.float64)
    t = 0.1 + 0.9 * tau
    square = (0.81 / ((1.0 - t) ** 2 + t**2) ** 1.5).square()  # z is proportional to sqrt((1-t)^2 + t^2)
    for weight, share in (("legendre", 0.5 * tau * (1.0 - tau)), ("even", torch.full_like(tau, math.pi**-2))):
        exact = float(torch.trapezoid(share * square, tau))
        for times in ("own", "bound"):
            value = found[f"{weight}, {times}"]
            assert abs(value["mean"] - exact) < 5.0 * value["scatter"] * exact / math.sqrt(len(x)), (weight, times)
            assert value["scatter"] * exact / math.sqrt(len(x)) < 0.03 * exact
