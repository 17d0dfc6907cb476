"""The examples, run small: their numbers mean what they claim, their pictures show something."""

import ast
import gzip
import importlib.util
import itertools
import json
import math
import os
import struct
import subprocess
import sys
from functools import partial

import matplotlib.image
import matplotlib.pyplot as plt
import pytest
import torch
from paths import ROOT

import ndm_ct
from ndm_ct.reference import Gaussian, GaussianMixture
from ndm_ct.samplers import NAMES
from ndm_ct.samplers.base import walk
from ndm_ct.samplers.frozen import estimate_residuals

EXAMPLES = ROOT / "examples"


def load(name):
    """An example as a module, whatever the current folder and the path."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


solvers, traces, outliers = load("likelihood_solvers"), load("likelihood_traces"), load("out_of_distribution")
drawing, noise, grids = load("sampling_solvers"), load("sde_against_ode"), load("time_grids")
compression, interpolation = load("compression"), load("interpolation")
learned = load("learned_forward_process")
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture(autouse=True)
def figures():
    """Close the figures that an example leaves open for a notebook or a gallery."""
    yield
    plt.close("all")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_examples_stand_alone(script):
    """No example imports another script or the benchmarks, or changes the path; all have a title for the gallery."""
    tree = ast.parse(script.read_text())
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    own = {path.stem for path in SCRIPTS} | {"benchmarks", "examples", "sys"}
    assert not own & {module.split(".")[0] for module in modules}
    title, underline = ast.get_docstring(tree).splitlines()[:2]
    assert underline == "=" * len(title)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert body[-1].end_lineno - body[0].lineno < 50, node.name


def assert_picture(path, height, width):
    picture = matplotlib.image.imread(path)[..., :3]
    assert picture.shape[0] > height
    assert picture.shape[1] > width
    assert picture.std() > 0.05
    # no quarter of it is blank
    for rows in (slice(None, picture.shape[0] // 2), slice(picture.shape[0] // 2, None)):
        for columns in (slice(None, picture.shape[1] // 2), slice(picture.shape[1] // 2, None)):
            assert picture[rows, columns].std() > 0.02


def made(example, name, arguments, folder):
    """What an example returns, which is what it has written."""
    returned = example.main([*arguments.split(), "--out", str(folder)])
    report = json.loads((folder / f"{name}.json").read_text())
    assert report == json.loads(json.dumps(returned))
    return folder, report


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    out = tmp_path_factory.mktemp("solvers") / "new" / "folder"
    arguments = f"--schedules Rectified --methods {solvers.OURS} dopri5 --tolerances 1e-2 1e-4 --rows 4 --outlier 6"
    return made(solvers, "likelihood_solvers", arguments, out)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return made(traces, "likelihood_traces", "--rows 2 --repeats 12", tmp_path_factory.mktemp("traces") / "new")


def test_tighter_solves_cost_more_and_err_less(comparison):
    by_method = {}
    for solve in comparison[1]["work_precision"]:
        by_method.setdefault(solve["method"], []).append(solve)
    assert set(by_method) == {solvers.OURS, "dopri5"}
    for loose, tight in by_method.values():
        assert (loose["tolerance"], tight["tolerance"]) == (1e-2, 1e-4)
        assert 0.0 < tight["rms_error"] < 0.1 * loose["rms_error"]
        assert tight["evaluations"] > loose["evaluations"] > 10
        for solve in (loose, tight):
            assert solve["rms_error"] <= solve["max_error"] <= 2.0 * solve["rms_error"] * (1 + 1e-12)  # four rows
            assert (solve["reported"] is not None) == (solve["method"] == solvers.OURS)


def test_hard_row_is_felt_where_steps_are_shared_only(comparison):
    errors = {(s["method"], s["tolerance"]): s["max_error"] for s in comparison[1]["work_precision"]}
    rows = comparison[1]["hard_row"]
    assert {row["method"] for row in rows} == {solvers.OURS, "dopri5"}
    for row in rows:
        if row["method"] == solvers.OURS:
            assert row["change"] < 1e-9
            assert row["evaluations_with"] == row["evaluations_without"]
            assert row["evaluations_outlier"] > 1.5 * row["evaluations_with"]
        else:
            assert row["change"] > 1e-6
            assert row["change"] < 10.0 * errors[row["method"], row["tolerance"]]
            assert row["evaluations_with"] > row["evaluations_without"]
            assert row["evaluations_with"] == row["evaluations_outlier"]


def test_quadrature_is_the_better_trace_at_equal_passes(traced):
    folder, report = traced
    table = report["trace"]
    by_trace = {name: [e for e in table if e["trace"] == name] for name in ("hutchinson", "quadrature", "exact")}
    for quadrature in by_trace["quadrature"][1:]:
        cheaper = [h for h in by_trace["hutchinson"] if h["passes"] <= quadrature["passes"]]
        dearer = [h for h in by_trace["hutchinson"] if h["passes"] >= quadrature["passes"]]
        assert all(h["rmse"] > 1.5 * quadrature["rmse"] for h in [*cheaper[-1:], *dearer[:1]])
    ratios = report["hutchinson_over_quadrature"].values()
    assert min(ratios) > 1.5
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times" in report["reading"]
    assert_picture(folder / "likelihood_traces.png", 400, 700)
    # hutchinson's error falls with the root of its probes; the reported errors are right where they are from many
    first, last = by_trace["hutchinson"][0]["rmse"], by_trace["hutchinson"][-1]["rmse"]
    assert 2.0 < first / last < 8.0
    assert 0.6 < by_trace["hutchinson"][-1]["calibration"] < 1.6
    assert 0.5 < by_trace["quadrature"][-1]["calibration"] < 1.6
    errors = [e["rmse"] for e in by_trace["exact"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2


def test_solvers_reading_says_what_the_numbers_say(comparison):
    out, report = comparison
    reading = report["reading"]
    assert "\n" not in reading
    worst = max((row for row in report["hard_row"] if row["method"] != solvers.OURS), key=lambda row: row["change"])
    assert f"{worst['change']:.1g} nat ({worst['method']}" in reading
    assert_picture(out / "likelihood_solvers.png", 400, 1200)


def test_costs_are_interpolated_between_logarithms():
    def solve(evaluations, error):
        return solvers.Solve("Cosine", "dopri5", 1e-3, evaluations, error, error, None)

    table = [solve(10.0, 1e-1), solve(40.0, 1e-3)]
    assert solvers.cost_at(1e-2, table) == pytest.approx(20.0)
    assert solvers.cost_at(1e-3, table) == pytest.approx(40.0)
    assert solvers.cost_at(0.5, table) == 10.0
    assert math.isnan(solvers.cost_at(1e-4, table))
    assert math.isnan(solvers.cost_at(1e-4, []))
    estimates = [
        traces.Estimate("hutchinson", "1", 100.0, 4.0, None), traces.Estimate("hutchinson", "4", 400.0, 2.0, None),
        traces.Estimate("quadrature", "in", 200.0, 0.5, None), traces.Estimate("quadrature", "out", 50.0, 0.5, None),
    ]  # fmt: skip
    assert traces.advantage(estimates) == {"in": pytest.approx(8.0**0.5 / 0.5)}
    # a reading of numbers that say the opposite says the opposite
    bad = traces.reading([traces.Estimate("quadrature", "x", 100.0, 8.0, None), *estimates[:2]])
    assert "0.5 to 0.5 times" in bad
    assert "no method reached" in solvers.reading([solve(10.0, 1.0)], [])


def test_solvers_models_are_those_named():
    model = solvers.mixture("Cosine")
    assert isinstance(model, GaussianMixture)
    assert type(model.schedule).__name__ == "Cosine"
    assert model.event_shape == (8,)
    grid = traces.grid_gaussian()
    assert isinstance(grid, Gaussian)
    cov = grid.marginals.covs[0]
    assert cov[0, 1] == pytest.approx(math.exp(-0.5))
    assert cov[0, 9] == pytest.approx(math.exp(-math.sqrt(2.0) / 2.0))
    assert cov[0, 8] == cov[0, 1] == cov[7, 15]
    assert cov[7, 8] < 0.05  # ends of two lines of the grid


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """Two folders of idx files like those of Fashion-MNIST and MNIST."""
    generator = torch.Generator().manual_seed(0)
    folders = []
    for name in ("fashion", "mnist"):
        folders.append(tmp_path_factory.mktemp(name))
        pixels = torch.randint(256, (9, 4, 4), dtype=torch.uint8, generator=generator)
        pixels = pixels.repeat_interleave(7, 1).repeat_interleave(7, 2)
        with gzip.open(folders[-1] / "t10k-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 2051, 9, 28, 28) + pixels.numpy().tobytes())
    return folders


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    out = tmp_path_factory.mktemp("scores")
    return made(outliers, "out_of_distribution", "--rows 6 --shown 2 --stderr 0.1", out)


def test_means_and_areas_are_those_of_the_images(scores):
    from sklearn.metrics import roc_auc_score

    report = scores[1]
    inside, outside = report["sets"]
    assert (inside["role"], outside["role"]) == ("inside", "outside")
    for one in report["sets"]:
        bits = torch.tensor(one["bits"], dtype=torch.float64)
        assert len(bits) == len(one["stderr"]) == len(one["zlib"]) == 6
        assert one["mean"] == pytest.approx(float(bits.mean()))
        assert one["mean_stderr"] == pytest.approx(float(bits.std()) / 6.0**0.5)
        assert all(0.0 < error <= 0.1 for error in one["stderr"])
        assert len(one["again"]) == 2
        # with the noise of dequantisation some error bars more than the trace's
        assert all(0.0 < abs(a - b) < 0.5 for a, b in zip(one["again"], one["bits"], strict=False))
    assert 1.0 < inside["mean"] < 4.5
    labels = [0] * 6 + [1] * 6
    plain = inside["bits"] + outside["bits"]
    corrected = [b - z for one in report["sets"] for b, z in zip(one["bits"], one["zlib"], strict=True)]
    for name, values in (("bits", plain), ("bits less zlib", corrected)):
        area, error = report["auroc"][name]
        assert 0.0 <= area <= 1.0
        assert area == pytest.approx(roc_auc_score(labels, values))
        assert 0.0 <= error < 0.3
    assert report["auroc"]["bits less zlib"][0] > 0.7


def test_ood_reading_says_what_the_numbers_say(scores):
    out, report = scores
    inside, outside = report["sets"]
    gap = outside["mean"] - inside["mean"]
    clear = abs(gap) > 2.0 * math.hypot(inside["mean_stderr"], outside["mean_stderr"])
    expected = f"finds {outside['name']} {'MORE' if gap < 0.0 else 'less'} likely" if clear else "about as likely"
    assert expected in report["reading"]
    assert f"{gap:+.3f}" in report["reading"]
    area, error = report["auroc"]["bits"]
    separated = error == 0.0 and area in (0.0, 1.0)
    assert (f"AUROC of {area:.0f}, " if separated else f"AUROC of {area:.3f} ± ") in report["reading"]
    assert_picture(out / "out_of_distribution.png", 400, 1000)
    assert_picture(out / "out_of_distribution_images.png", 400, 800)


def test_reading_follows_the_numbers_either_way():
    generator = torch.Generator().manual_seed(0)

    def made(name, mean):
        bits = mean + 0.1 * torch.randn(20, dtype=torch.float64, generator=generator)
        error = torch.full_like(bits, 0.01)
        return outliers.Scored(name, torch.zeros(20, 1, 2, 2), bits, error, torch.ones_like(bits), bits[:0])

    low, high, alike, near = made("low", 1.0), made("high", 2.0), made("alike", 1.0), made("near", 1.15)
    for inside, outside, words in (
        (high, low, ("finds low MORE likely", "-1.0", "AUROC of 0, these images being separated")),
        (low, high, ("finds high less likely", "+1.0", "AUROC of 1, these images being separated")),
        (near, low, ("finds low MORE likely", "worse than a coin")),
        (low, near, ("finds near less likely", " better than a coin")),
        (low, alike, ("alike about as likely", "no better than a coin")),
    ):
        area = outliers.auroc(inside.bits, outside.bits)
        reading = outliers.reading(inside, outside, area, area)
        assert all(word in reading for word in words), reading
        assert "nan" not in reading


def test_auroc_error_is_the_scatter_of_repeated_draws():
    generator = torch.Generator().manual_seed(1)
    inside = torch.randn(400, 40, dtype=torch.float64, generator=generator)
    outside = torch.randn(400, 60, dtype=torch.float64, generator=generator) + 0.7
    areas, errors = torch.tensor([outliers.auroc(a, b) for a, b in zip(inside, outside, strict=True)]).T
    assert float(areas.mean()) == pytest.approx(0.5 * math.erfc(-0.7 / 2.0), abs=0.01)  # Phi(0.7 / sqrt 2)
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(areas.std()), rel=0.12)
    ties = outliers.auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    assert ties[0] == 0.75


def test_photo_patches_are_grey_levels():
    patches = outliers.photo_patches()
    assert patches.shape == (520, 1, 8, 8)
    assert patches.dtype == torch.uint8
    assert int(patches.min()) == 0
    assert int(patches.max()) == 16
    assert outliers.photo_patches(levels=256).float().std() > 20.0
    # pixels side by side are alike: these are patches of something
    neighbours = (patches[..., 1:].float() - patches[..., :-1].float()).square().mean()
    assert neighbours < 0.5 * 2.0 * patches.float().var()


def test_files_of_other_images_are_scored(fashion, tmp_path):
    arguments = f"--fashion {fashion[0]} --mnist {fashion[1]} --rows 3 --shown 0 --stderr 0.5"
    _, report = made(outliers, "out_of_distribution", arguments, tmp_path)
    assert (report["network"], report["levels"], report["repeat_noise"]) == ("fashion", 256, None)
    assert [one["name"] for one in report["sets"]] == ["Fashion-MNIST", "MNIST"]
    assert min(bits for one in report["sets"] for bits in one["bits"]) > 5.0  # clothes take 3 to 4
    assert outliers.idx_images(fashion[0]).shape == (9, 1, 16, 16)


def test_missing_files_are_named(fashion, tmp_path, capsys):
    for arguments, message in (
        (["--fashion", str(fashion[0]), "--mnist", str(tmp_path)], "Without --fashion and --mnist no files are needed"),
        (["--mnist", str(tmp_path)], "--fashion and --mnist go together"),
    ):
        with pytest.raises(SystemExit):
            outliers.main([*arguments, "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def precision(tmp_path_factory):
    out = tmp_path_factory.mktemp("precision") / "new"
    return made(
        drawing, "sampling_solvers", "--mixture 128 --digits 0 --evaluations 64 128 --tolerances 1e-3 1e-5", out
    )


def errors_at(report, evaluations):
    """Of the methods on a grid."""
    return {d["method"]: d["error"] for d in report["draws"] if d["setting"] == evaluations}


def test_slopes_are_the_documented_orders(precision):
    slopes = precision[1]["slopes"]["mixture"]
    assert set(slopes) == set(drawing.ORDERS)
    for method, order in drawing.ORDERS.items():
        assert slopes[method] == pytest.approx(order, abs=0.5)
    for draw in precision[1]["draws"]:
        if draw["method"] in drawing.ORDERS:
            assert 0.9 * draw["setting"] <= draw["evaluations"] <= draw["setting"]


def test_at_a_high_cost_the_higher_order_is_better(precision):
    errors = errors_at(precision[1], 128)
    for methods in (
        ("rk4", "heun", "euler"), ("unipc3", "unipc", "dpmpp_2m", "ddim"), ("deis3", "deis2", "deis1", "ddim"),
        ("dpmpp_3m", "dpmpp_2m"),
    ):  # fmt: skip
        for better, worse in itertools.pairwise(methods):
            assert 0.0 < errors[better] < 0.5 * errors[worse]
    for method in drawing.ADAPTIVE:
        loose, tight = (d for d in precision[1]["draws"] if d["method"] == method)
        assert tight["error"] < 0.1 * loose["error"]
        assert 20 < loose["evaluations"] < tight["evaluations"] < 200
    best = min(errors, key=errors.__getitem__)
    assert f"{best} at 128 ({errors[best]:.0e})" in precision[1]["reading"]
    assert_picture(precision[0] / "sampling_solvers.png", 400, 800)


def test_higher_orders_are_better_on_a_trained_network_too(tmp_path):
    arguments = "--methods ddim dpmpp_2m unipc ode --mixture 0 --digits 2 --evaluations 16 32 --tolerances 1e-3"
    _, report = made(drawing, "sampling_solvers", arguments, tmp_path)
    errors, slopes = errors_at(report, 32), report["slopes"]["digits"]
    assert errors["unipc"] < 0.5 * errors["dpmpp_2m"] < 0.1 * errors["ddim"]
    assert slopes["ddim"] == pytest.approx(1.0, abs=0.3)
    assert slopes["dpmpp_2m"] == pytest.approx(2.0, abs=0.5)
    assert slopes["unipc"] > 2.5
    assert next(d["error"] for d in report["draws"] if d["method"] == "ode") < 1e-2
    worst = max(slopes, key=lambda method: drawing.ORDERS[method] - slopes[method])
    assert f"that of {worst}, {slopes[worst]:.1f} instead of {drawing.ORDERS[worst]}" in report["reading"]


def test_every_deterministic_sampler_is_compared():
    model = drawing.model_of("mixture")
    residuals = estimate_residuals(model, model.sample_data(50), times=8)
    samplers = NAMES | {"ddpm_analytic": partial(NAMES["ddpm_analytic"], residuals=residuals)}
    z, grid = torch.randn(3, 4, dtype=torch.float64), torch.linspace(1.0, model.t_min, 6, dtype=torch.float64)

    def ends(name, seed):
        return walk(samplers[name](model), z, grid, generator=torch.Generator().manual_seed(seed))

    names = NAMES.keys() - {"map"}  # for flow maps alone
    assert {name for name in names if torch.equal(ends(name, 0), ends(name, 1))} == set(drawing.ORDERS)


def test_draws_are_counted_and_begin_at_the_same_noise():
    model = drawing.model_of("mixture")
    for method, budget, spent in (("heun", 7, 6), ("pndm", 20, 20), ("ddim", 7, 7)):
        x, cost = drawing.draw(model, 5, 3, method=method, nfe=budget)
        generator = torch.Generator().manual_seed(3)
        expected = ndm_ct.sample(model, 5, method=method, nfe=budget, dtype=torch.float64, generator=generator)
        assert torch.equal(x, expected)
        assert cost == spent
    z = model.sample_prior(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64, device=None)
    flow, cost = drawing.draw(model, 5, 3, method="ode", rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(flow, ndm_ct.decode(model, z, rtol=1e-10, atol=1e-10), rtol=0.0, atol=1e-6)
    assert 100 < cost < 400
    assert drawing.slope((10.0, 1.0), (20.0, 0.125)) == pytest.approx(3.0)
    assert drawing.rms(torch.tensor([[3.0, 4.0], [0.0, 5.0]])) == pytest.approx(12.5**0.5)


@pytest.fixture(scope="module")
def stochastic(tmp_path_factory):
    out = tmp_path_factory.mktemp("stochastic") / "new"
    folder, report = made(noise, "sde_against_ode", "--rows 3000 --evaluations 10 50 --tolerances 0.1", out)
    table = {}
    for d in report["draws"]:
        line = table.setdefault((d["score"], d["method"], d["stochasticity"]), [])
        line.append((d["evaluations"], d["distance"], d["stderr"]))
    return folder, report, table


def test_with_the_exact_score_every_stochasticity_is_right_at_many_steps(stochastic):
    _, report, table = stochastic
    mean, spread = report["exact_draws"]
    assert 0.0 < spread < mean < 0.05
    for (score, method, eta), line in table.items():
        cost, distance, stderr = line[-1]
        if score != "exact":
            continue
        first_order = 0.03 if method == "ddpm" else 0.0
        assert distance < mean + 4.0 * math.hypot(spread, stderr) + first_order, (method, eta)
        if method == noise.ADAPTIVE:
            assert 30 < cost < 60
        else:
            _, flow, flow_stderr = table["exact", method, 0.0][-1]
            assert abs(distance - flow) < 3.0 * math.hypot(stderr, flow_stderr) + first_order


def test_noise_hurts_at_few_steps(stochastic):
    for method in noise.METHODS:
        distances, errors = zip(*(stochastic[2]["exact", method, eta][0][1:] for eta in (0.0, 2.0)), strict=True)
        assert distances[1] - distances[0] > 2.0 * math.hypot(*errors)


def test_noise_mends_errors_made_before_and_magnifies_those_made_last(stochastic):
    table = stochastic[2]
    for method in noise.METHODS:
        early, late = ([table[score, method, eta] for eta in noise.STOCHASTICITIES] for score in ("early", "late"))
        # the flow keeps the damage, however many steps it takes
        assert early[0][1][1] > 0.6 * early[0][0][1] > 0.04
        mended = [line[1][1] for line in early]
        assert mended == sorted(mended, reverse=True)
        assert mended[-1] < 0.5 * mended[0]
        for cost in (0, 1):
            magnified = [line[cost][1] for line in late]
            assert magnified == sorted(magnified)
            assert magnified[-1] > 1.4 * magnified[0]
        for score in ("early", "late"):
            _, adaptive, error = table[score, noise.ADAPTIVE, 1.0][-1]
            _, fixed, other = table[score, "sde", 1.0][-1]
            assert abs(adaptive - fixed) < 4.0 * math.hypot(error, other)


def test_stochastic_reading_says_what_the_numbers_say(stochastic):
    folder, report, table = stochastic
    for score, title in noise.SCORES.items():
        (_, flow, _), (_, noisy, stderr) = (table[score, "dpmpp_2m_sde", eta][-1] for eta in (0.0, 2.0))
        assert title in report["reading"]
        assert f"{flow:.3f} and {noisy:.3f} ± {stderr:.3f} at 50 evaluations" in report["reading"]
    assert_picture(folder / "sde_against_ode.png", 800, 800)


def test_scores_are_exact_or_wrong_where_they_say():
    z = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = noise.data()
    for gamma in (-6.0, -4.5, 0.0, 4.5):
        t = torch.full((6,), (gamma + 8.0) / 14.0, dtype=torch.float64)
        right = exact.predictor(z, t)
        off = {score: float((noise.model_of(score).predictor(z, t) - right).abs().max()) for score in noise.SCORES}
        assert off["exact"] < 1e-12
        assert (off["early"] > 0.5) == (gamma > 2.0)
        assert (off["late"] > 0.05) == (gamma < -2.0)
        assert min(off["early"], off["late"]) < 1e-3
    assert math.exp(0.5 * 2.0) == pytest.approx(2.7, abs=0.05)  # where they begin, as the titles say
    assert math.exp(-0.5 * 2.0) == pytest.approx(0.37, abs=0.005)


def test_distance_is_how_far_samples_are_and_its_error_their_scatter():
    model, generator = noise.data(), torch.Generator().manual_seed(2)
    law, end = noise.Law(model, 1000), torch.tensor([model.t_min], dtype=torch.float64)
    shift = torch.tensor([0.3, 0.4], dtype=torch.float64)
    found = [law.distance(model.marginals.draw(1000, end, generator) + shift) for _ in range(40)]
    distances, errors = torch.tensor(found, dtype=torch.float64).T
    angles = math.pi * torch.arange(noise.DIRECTIONS, dtype=torch.float64) / noise.DIRECTIONS
    expected = float((0.3 * angles.cos() + 0.4 * angles.sin()).abs().mean())
    assert float(distances.mean()) == pytest.approx(expected, abs=4.0 * float(distances.std()) / 40**0.5 + 0.005)
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(distances.std()), rel=0.35)


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    out = tmp_path_factory.mktemp("grids") / "new"
    arguments = "--schedules VariancePreserving LinearLogSNR Rectified --methods dpmpp_2m heun --evaluations 12 50"
    folder, report = made(grids, "time_grids", f"{arguments} --rows 16", out)
    table = {}
    for d in report["draws"]:
        table.setdefault((d["schedule"], d["method"], d["grid"]), []).append(d["error"])
    return folder, report, table


def test_the_best_grid_depends_on_schedule_and_method(timed):
    table = timed[2]
    assert len(table) == 3 * 2 * 5
    for cheap, dear in table.values():
        assert dear < 0.35 * cheap
    vp, last = "VariancePreserving", {key: errors[-1] for key, errors in table.items()}
    # even steps in t leave VariancePreserving's last ones, large in the log-SNR, to a method in the log-SNR
    assert last[vp, "dpmpp_2m", "uniform"] > 5.0 * max(last[vp, "dpmpp_2m", g] for g in grids.GRIDS if g != "uniform")
    # a method in t does best with them where paths are straight in t
    assert last["Rectified", "heun", "uniform"] < 0.25 * last["Rectified", "heun", "logsnr"]
    assert last["Rectified", "heun", "uniform"] == min(last["Rectified", "heun", grid] for grid in grids.GRIDS)


def test_grids_by_noise_level_make_schedules_alike(timed):
    table = timed[2]
    for grid, alike in (("edm", True), ("uniform", False)):
        errors = [table[name, "dpmpp_2m", grid][-1] for name in ("VariancePreserving", "Rectified")]
        assert (max(errors) < 1.15 * min(errors)) == alike
    for method in ("dpmpp_2m", "heun"):
        same, other = (table["LinearLogSNR", method, grid] for grid in ("uniform", "logsnr"))
        assert same == pytest.approx(other, rel=1e-6)


def test_times_in_the_picture_are_those_of_the_grids(timed):
    folder, report, table = timed
    places = report["places"]
    for schedule, by_grid in places.items():
        for grid, values in by_grid.items():
            assert len(values) == grids.SHOWN + 1
            assert (values[0] is None) == (schedule == "Rectified")
            finite = [value for value in values if value is not None]
            assert finite == sorted(finite)
            assert finite[-1] == pytest.approx(13.8, abs=0.6)  # sigma/alpha = 0.001
            gaps = [b - a for a, b in itertools.pairwise(finite)]
            even = grid == "logsnr" or (schedule, grid) == ("LinearLogSNR", "uniform")
            assert (max(gaps) < 1.001 * min(gaps)) == even, (schedule, grid)
    assert places["VariancePreserving"]["uniform"][-2] < 4.0  # more than a third of the way is left to the last step
    for schedule in places:
        last = {grid: table[schedule, "dpmpp_2m", grid][-1] for grid in grids.GRIDS}
        best, worst = min(last, key=last.__getitem__), max(last, key=last.__getitem__)
        assert f"dpmpp_2m {best} ({worst} {last[worst] / last[best]:.1f})" in report["reading"]
    assert_picture(folder / "time_grids.png", 600, 1200)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out_of_distribution", ("--mnist", "AUROC", "idx files", "--fashion")),
        ("sampling_solvers", ("--methods", "probability flow", "order p")),
    ],
)
def test_examples_run_from_any_folder(name, words, tmp_path):
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--help"], cwd=tmp_path, capture_output=True, text=True,
        timeout=100, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    for word in (*words, f"runs/examples/{name}"):
        assert word in run.stdout


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        solvers.main(["--help"])
    text = capsys.readouterr().out
    for word in ("--max-evaluations", solvers.OURS, "network evaluations", "exact", "under a minute"):
        assert word in text
    for example in (drawing, noise, grids):
        with pytest.raises(SystemExit):
            example.main(["--help"])
        text = capsys.readouterr().out
        for word in ("--evaluations", "runs/examples/", "a minute"):
            assert word in text.replace("writes ``", "writes\n``")
    for example, arguments, message in (
        (drawing, ["--evaluations", "8"], "two --evaluations"), (drawing, ["--methods", "ode"], "method on a grid"),
        (noise, ["--rows", "25"], "multiple of 10"), (grids, ["--methods", "ddpm"], "invalid choice"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            example.main(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        outliers.main(["--rows", "1"])
    assert "--rows must be at least 2" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- diffusers' own training


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
def test_a_network_of_diffusers_scores_images(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    example = load("diffusers_likelihood")
    few = ["--steps", "40", "--rows", "3", "--out", str(tmp_path), "--save", str(tmp_path / "unet")]
    report = example.main(few)
    assert report["bits_per_dim"] == pytest.approx(sum(report["rows"]) / 3)
    assert report["stderr_estimate"] == pytest.approx(math.hypot(*report["rows_stderr"]) / 3)
    assert report["bits_per_dim"] < math.log2(17.0) + 1.0  # 4.09 without any model
    # The bound is of the same density: at the centres of the bins it is 7.1 here, above it by two bits.
    assert -4.0 * report["elbo_stderr_estimate"] - 0.1 < report["elbo"] - report["bits_per_dim"] < 1.0
    assert json.loads((tmp_path / "diffusers_likelihood.json").read_text())["rows"] == report["rows"]
    assert_picture(tmp_path / "diffusers_likelihood.png", 500, 1000)
    again = ndm_ct.adapters.from_diffusers(
        diffusers.UNet2DModel.from_pretrained(tmp_path / "unet"), diffusers.DDPMScheduler()
    )
    images = example.digits()[1][:3]
    bins = ndm_ct.quantisation.Quantisation(17, edges=(-1.0, 1.0))
    bits = ndm_ct.bits_per_dim(again, images, quantisation=bins, generator=torch.Generator().manual_seed(2))
    assert bits.tolist() == pytest.approx(report["rows"], rel=1e-5)


# ------------------------------------------------------------------------------------------- compression, interpolation


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("compression") / "new"
    return made(compression, "compression", "--rows 32 --steps 20 200 --samples 16", out)


def test_codes_get_shorter_with_steps_and_the_progress_adds_up(packed):
    folder, report = packed
    few, many, limit = report["codes"]
    error = math.hypot(few["stderr"], limit["stderr"])
    assert few["bits_per_dim"] > many["bits_per_dim"] + 3.0 * error
    assert many["bits_per_dim"] > limit["bits_per_dim"] - 3.0 * error
    assert limit["bits_per_dim"] < report["existing"]["independent pixels"] < report["existing"]["LZMA"]
    rates, distortions = report["rates"], report["errors"]
    assert len(rates) == 100
    assert all(b > a for a, b in itertools.pairwise(rates))
    assert distortions[-1] < 0.1 * distortions[0]
    # What the rate lacks: the last transition, the decoder, and the bits of the noise in the bins.
    model, bins = ndm_ct.load(compression.NETWORK), compression.BINS
    gamma = float(model.schedule.gamma(torch.tensor(model.t_min, dtype=torch.float64)).detach())
    decoder = 0.5 * (1.0 + math.log(2.0 * math.pi) + gamma) - bins.uniform_offset
    last = rates[-1] - rates[-2]
    assert rates[-1] + last + decoder / math.log(2.0) == pytest.approx(limit["bits_per_dim"], rel=0.2)
    assert_picture(folder / "compression.png", 300, 800)
    assert_picture(folder / "compression_progress.png", 300, 500)


def test_code_of_independent_pixels():
    """Two pixels, of which one never changes."""
    train = torch.tensor([[[[0, 3]]], [[[0, 5]]]] * 500, dtype=torch.uint8)
    assert compression.existing(train, train[:2], levels=6)["independent pixels"] == pytest.approx(0.5, abs=0.02)


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    out = tmp_path_factory.mktemp("interpolation") / "new"
    return made(interpolation, "interpolation", "--pairs 2 --points 5 --samples 40", out)


def test_what_lies_between_is_likelier_than_a_double_exposure(joined):
    folder, report = joined
    assert min(report["middle_gap"]) > 5.0
    assert report["distance_samples"] > 0.8 * report["distance_test"] > 0.0
    assert_picture(folder / "interpolation.png", 250, 500)
    assert (folder / "interpolation_neighbours.png").stat().st_size > 10_000


def test_arc_keeps_the_length_and_meets_its_ends():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 8, 8, generator=generator)
    u = torch.linspace(0.0, 1.0, 7)
    points = interpolation.arc(a, b * a.norm() / b.norm(), u)
    torch.testing.assert_close(points[0], a)
    torch.testing.assert_close(points[-1], b * a.norm() / b.norm())
    torch.testing.assert_close(points.flatten(1).norm(dim=1), a.norm().expand(7))
    angles = [float(torch.arccos((p * q).sum() / a.norm() ** 2)) for p, q in itertools.pairwise(points)]
    assert max(angles) - min(angles) < 1e-3
    torch.testing.assert_close(interpolation.arc(a, a, u), a.expand(7, 1, 8, 8))


def test_nearest_image_and_statistic():
    train = torch.tensor([0.0, 1.0, 5.0]).reshape(3, 1, 1, 1)
    distances, indices = interpolation.nearest(torch.tensor([0.9, 4.0]).reshape(2, 1, 1, 1), train)
    torch.testing.assert_close(distances, torch.tensor([0.1, 1.0]))
    assert indices.tolist() == [1, 2]
    same, bound = interpolation.statistic(torch.arange(100.0), torch.arange(100.0))
    assert same == 0.0
    assert bound == pytest.approx(1.358 * math.sqrt(0.02))
    assert interpolation.statistic(torch.arange(100.0), torch.arange(50.0, 150.0))[0] == pytest.approx(0.5, abs=0.02)


# --------------------------------------------------------------------------------------------- learned forward process


def test_a_learned_process_ends_near_the_prior_where_noise_alone_does_not(tmp_path):
    scores = learned.main(["--steps", "150", "--out", str(tmp_path)])
    (flow, bound), (plain_flow, plain_bound) = scores["F learned"], scores["F(x, t) = x"]
    assert bound > plain_bound + 0.3
    assert flow > plain_flow
    assert_picture(tmp_path / "learned_forward_process.png", 500, 1000)
