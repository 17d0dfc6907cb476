"""The command line: it writes what the library computes, in the units of the file, and explains what is wrong."""

import csv
import gzip
import json
import math
import re
import shutil
import struct

import numpy as np
import pytest
import torch

import ndm_ct
from ndm_ct._core.seeds import make_generator
from ndm_ct.cli import batches, runs, sampling, score, selfcheck
from ndm_ct.cli import commands as cli
from ndm_ct.cli.settings import settings_from_file
from ndm_ct.files import read, write_table

OWNERS = {"loglik": score, "sample": sampling}
SCALE = np.array([1.0, 1000.0, 0.01])
SHIFT = np.array([0.0, 5e4, -3.0])
QUICK = ["--steps", "60", "--width", "16", "--depth", "1", "--batch-size", "64", "--quiet"]


def table(n, seed=0):
    z = np.random.default_rng(seed).standard_normal((n, 3))
    z[:, 2] += z[:, 0]
    return z * SCALE + SHIFT


def write_csv(path, values, names=("a", "b", "c")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        if names:
            writer.writerow(names)
        writer.writerows(values.tolist())
    return path


def read_csv(path):
    with path.open(newline="") as file:
        return {
            name: np.array([float(row[name]) for row in rows])
            for rows in [list(csv.DictReader(file))]
            for name in rows[0]
        }


def ok(*arguments):
    assert cli.main([str(each) for each in arguments]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_csv(folder / "train.csv", table(400))
    write_csv(folder / "test.csv", table(40, seed=1))
    ok("train", folder / "train.csv", "--out", folder / "run", *QUICK)
    return folder


def test_densities_are_those_of_the_file(trained):
    """Shifted and scaled by the training rows alone, and the log-determinant counted once."""
    out = trained / "scores.csv"
    ok("loglik", trained / "run", trained / "test.csv", "--out", out, "--quiet")
    scores = read_csv(out)
    rows, model = table(40, seed=1), ndm_ct.load(trained / "run" / "model.safetensors")
    fitted = table(400)[runs.split(400, 0.1, 0)[0]]
    mean, std = fitted.mean(0), fitted.std(0)
    expected = ndm_ct.loglik(model, torch.tensor((rows - mean) / std, dtype=torch.float32)).double() - np.log(std).sum()
    assert scores["row"].tolist() == list(range(40))
    np.testing.assert_allclose(scores["log_p"], expected.numpy(), atol=2e-3)
    assert scores["stderr"].tolist() == [0.0] * 40
    # and near the truth: correlated normals in these units
    z = (rows - SHIFT) / SCALE
    truth = (
        -0.5 * (z[:, 0] ** 2 + z[:, 1] ** 2 + (z[:, 2] - z[:, 0]) ** 2 + 3 * math.log(2 * math.pi))
        - np.log(SCALE).sum()
    )
    assert abs((scores["log_p"] - truth).mean()) < 0.5


def test_mean_agrees_with_the_rows_and_continues(trained, capsys):
    out = trained / "evaluation"
    ok("evaluate", trained / "run", trained / "test.csv", "--out", out, "--max-rows", 8, "--quiet")
    capsys.readouterr()
    ok("evaluate", trained / "run", trained / "test.csv", "--out", out, "--quiet")
    line = capsys.readouterr().out.splitlines()[0]
    ok("loglik", trained / "run", trained / "test.csv", "--out", trained / "again.npz", "--quiet")
    mean = -np.load(trained / "again.npz")["log_p"].mean()
    assert float(line.split()[1]) == pytest.approx(mean, abs=2e-3)
    assert json.loads((out / "evaluation.json").read_text())["rows"] == 40


def test_samples_are_in_the_units_of_the_file(trained):
    ok("sample", trained / "run", "-n", 400, "--out", trained / "drawn.csv", "--quiet")
    drawn = read_csv(trained / "drawn.csv")
    assert list(drawn) == ["a", "b", "c"]
    for i, name in enumerate("abc"):
        real = table(400)[:, i]
        assert abs(drawn[name].mean() - real.mean()) < 0.4 * real.std()
        assert 0.6 < drawn[name].std() / real.std() < 1.6
    # every row has a seed of its own
    ok("sample", trained / "run", "-n", 3, "--out", trained / "few.npz", "--quiet")
    few = np.load(trained / "few.npz")
    np.testing.assert_allclose(few["b"], drawn["b"][:3], rtol=1e-5)


def test_seeds_have_no_row_in_common(trained, tmp_path):
    """Rows of neighbouring seeds are not the same noise a row further on."""
    rows = []
    for seed in range(3):
        ok("sample", trained / "run", "-n", 20, "--seed", seed, "--out", tmp_path / f"{seed}.npz", "--quiet")
        drawn = np.load(tmp_path / f"{seed}.npz")
        rows += zip(*(drawn[name].tolist() for name in "abc"), strict=True)
    assert len(set(rows)) == 60


def test_scores_of_neighbouring_seeds_do_not_share_their_noise(images, tmp_path):
    """All rows are the same image, so that equal noise gives equal scores."""
    folder, pixels = images
    np.savez(tmp_path / "same.npz", x=np.repeat(pixels[:1], 10, 0))
    bits = []
    for seed in range(2):
        out = tmp_path / f"{seed}.npz"
        ok("loglik", folder / "run", tmp_path / "same.npz", "--seed", seed, "--out", out, "--quiet")
        bits += np.load(out)["bits_per_dim"].tolist()
    assert len(set(bits)) == 20


def test_formats_hold_the_same_rows(trained, tmp_path):
    rows = table(40, seed=1)
    np.save(tmp_path / "rows.npy", rows)
    np.savez(tmp_path / "rows.npz", rows=rows, other=rows[:2])
    write_csv(tmp_path / "rows.tsv", rows, names=None)
    (tmp_path / "rows.tsv").write_text((tmp_path / "rows.tsv").read_text().replace(",", "\t"))
    files = [("rows.npy", []), ("rows.npz", ["--array", "rows"]), ("rows.tsv", [])]
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        pass
    else:
        write_table(tmp_path / "rows.parquet", dict(zip("abc", torch.tensor(rows).T, strict=True)))
        assert read(tmp_path / "rows.parquet").columns == ("a", "b", "c")
        files.append(("rows.parquet", []))
    results = []
    for k, (name, more) in enumerate(files):
        ok("loglik", trained / "run", tmp_path / name, *more, "--out", tmp_path / f"{k}.npz", "--quiet")
        results.append(np.load(tmp_path / f"{k}.npz")["log_p"])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_a_run_goes_on_by_its_folder_alone(tmp_path, capsys, monkeypatch):
    data = write_csv(tmp_path / "train.csv", table(200))
    monkeypatch.chdir(tmp_path)
    ok("train", data, "--out", tmp_path / "whole", *QUICK)
    code = cli.main(["train", "train.csv", "--out", str(tmp_path / "run"), *QUICK, "--time-limit", "1e-6"])
    assert code == 130
    monkeypatch.chdir("/")
    assert f"go on with: ndm-ct train --out {tmp_path / 'run'}" in capsys.readouterr().out
    assert cli.main(["loglik", str(tmp_path / "run"), str(data), "--out", str(tmp_path / "x.csv")]) == 1
    assert "holds a training that has not finished" in capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["settings"]["precision"]  # as in a folder of before there was this setting
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    ok("train", "--out", tmp_path / "run", "--quiet")
    a, b = (ndm_ct.load(tmp_path / name / "model.safetensors").state_dict() for name in ("whole", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "run" / "training.png").stat().st_size > 5000
    assert cli.main(["train", str(data), "--out", str(tmp_path / "run"), *QUICK, "--lr", "1e-4"]) == 1
    assert "lr was 0.002, now 0.0001" in capsys.readouterr().err


def test_a_finished_run_goes_on_with_more_steps(tmp_path, capsys):
    """With the data named again or not; other settings are still refused, and fewer steps too."""
    data = write_csv(tmp_path / "train.csv", table(60))
    small = ("--width", 8, "--depth", 1, "--quiet")
    ok("train", data, "--out", tmp_path / "a", "--steps", 4, *small)
    ok("train", data, "--out", tmp_path / "b", "--steps", 4, *small)
    ok("train", "--out", tmp_path / "a", "--steps", 9, "--quiet")
    ok("train", data, "--out", tmp_path / "b", "--steps", 9, *small)
    assert "trained 9 steps" in capsys.readouterr().out
    assert runs.settings_of(tmp_path / "a").steps == 9
    a, b = (ndm_ct.load(tmp_path / name / "model.safetensors").state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    for options, words in ((("--steps", 5), "steps was 9, now 5"), (("--steps", 12, "--lr", 1e-4), "lr was 0.002")):
        assert cli.main([*map(str, ("train", "--out", tmp_path / "a", "--quiet", *options))]) == 1
        assert words in capsys.readouterr().err
    assert runs.settings_of(tmp_path / "a").steps == 9


def test_settings_of_file_and_command_line(tmp_path):
    data = write_csv(tmp_path / "train.csv", table(100))
    (tmp_path / "c.json").write_text(json.dumps({"data": str(data), "steps": 3, "width": 8, "transform": "separable"}))
    ok("train", "--config", tmp_path / "c.json", "--width", 12, "--head", "moments", "--out", tmp_path / "r", "--quiet")
    settings = runs.Run.load(tmp_path / "r").settings
    assert (settings.steps, settings.width, settings.transform, settings.head) == (3, 12, "separable", "moments")
    model = ndm_ct.load(tmp_path / "r" / "model.safetensors")
    assert (type(model.transform.outer).__name__, model.prediction) == ("Separable", "moments")
    yaml = pytest.importorskip("yaml")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"steps": 4, "lr": 0.001}))
    assert settings_from_file(tmp_path / "c.yaml") == {"steps": 4, "lr": 0.001}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8) // 2
    with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">HBBIII", 0, 8, 3, *pixels.shape) + pixels.tobytes())
    np.savez(folder / "pixels.npz", pixels)
    quick = ["--steps", "40", "--width", "4", "--batch-size", "20", "--quiet"]
    ok("train", folder / "train-images-idx3-ubyte.gz", "--out", folder / "run", *quick)
    return folder, pixels


@pytest.mark.slow
def test_images_are_scored_in_bits(images):
    folder, pixels = images
    ok("loglik", folder / "run", folder / "pixels.npz", "--out", folder / "scores.npz", "--quiet")
    scores = np.load(folder / "scores.npz")
    np.testing.assert_allclose(scores["log_p"], -scores["bits_per_dim"] * 16 * math.log(2.0), rtol=1e-6)
    model = ndm_ct.load(folder / "run" / "model.safetensors")
    x = torch.as_tensor(pixels)[:, None]
    generator = [make_generator(0, "loglik", row) for row in range(40)]
    expected, info = ndm_ct.bits_per_dim(model, x, dequantisation="process", generator=generator, return_info=True)
    np.testing.assert_array_equal(scores["bits_per_dim"], expected.double().numpy())
    np.testing.assert_allclose(scores["stderr"], info.stderr.double().numpy() * 16 * math.log(2.0))
    ok("evaluate", folder / "run", folder / "pixels.npz", "--bound", "elbo", "--samples", 4, "--quiet")


def test_images_are_drawn_as_levels_and_pictures(images):
    folder, _ = images
    ok("sample", folder / "run", "-n", 5, "--out", folder / "drawn.npz", "--quiet")
    drawn = np.load(folder / "drawn.npz")["x"]
    assert (drawn.dtype, drawn.shape) == (np.uint8, (5, 1, 4, 4))
    model = ndm_ct.load(folder / "run" / "model.safetensors")
    z = ndm_ct.sample(model, 5, generator=[make_generator(0, "sample", row) for row in range(5)])
    np.testing.assert_array_equal(drawn, ((z + 1) * 128).floor().clamp(0, 255).numpy().astype(np.uint8))
    image = pytest.importorskip("PIL.Image")
    ok("sample", folder / "run", "-n", 5, "--out", folder / "drawn.png", "--quiet")
    with image.open(folder / "drawn.png") as opened:
        picture = np.array(opened)
    assert picture.shape == (2 * 6, 3 * 6)
    np.testing.assert_array_equal(picture[7:11, 1:5], drawn[3, 0])  # the fourth begins the second line


def test_info_says_what_is_there(trained, images, capsys):
    ok("info", trained / "run")
    text = capsys.readouterr().out
    assert "step 60 of 60" in text
    assert "width=16" in text
    assert "columns a, b, c" in text
    ok("info", trained / "test.csv")
    rows = table(40, seed=1)
    assert f"b:             {rows[:, 1].mean():.6g} ± {rows[:, 1].std():.6g}" in capsys.readouterr().out
    ok("info", images[0] / "run")
    assert "256 levels" in capsys.readouterr().out


def test_selfcheck_passes_and_can_fail(monkeypatch, capsys):
    assert cli.main(["selfcheck"]) == 0
    assert capsys.readouterr().out.count(" ok") == 7
    exact = selfcheck.loglik
    monkeypatch.setattr(selfcheck, "SAMPLES", 500)
    monkeypatch.setattr(selfcheck, "loglik", lambda *a, **k: (
        exact(*a, **k) if "return_info" in k else exact(*a, **k) + 0.01
    ))  # fmt: skip
    assert cli.main(["selfcheck"]) == 3
    assert capsys.readouterr().out.count("FAILED") == 1


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"a,b,c\n1,nan,3\n", "rows.csv", "row 0, column 'b' is nan"),
        (b"a,b,c\n1,x,3\n", "rows.csv", "line 2, column 'b' is 'x', expected a number. Drop"),
        (b"a,b,c\n1,,3\n", "rows.csv", "line 2, column 'b' is '', expected a number"),
        (b"3,1,\n\n1,2,x\n", "rows.csv", "line 1, column 'x2' is '', expected a number"),
        (b"a|b|c\n1|2|3\n", "rows.csv", "column 'a.b.c' is '1.2.3'.*separated by ','"),
        (b"a,b,c\n1,,3\n1,2\n", "rows.csv", "line 2, column 'b' is '', expected a number"),
        (b"\xff\xfea,b,c\n", "rows.csv", r"rows.csv cannot be read \('utf-8'"),
        (b"a,b,c\n1,2,3\n1,\xff,3\n", "rows.csv", r"rows.csv cannot be read \('utf-8'"),
        (b"a,b\n1,2,3\n", "rows.csv", "names 2 columns, the rows have 3"),
        (b"a,b,d\n1,2,3\n", "rows.csv", "has the columns a, b, d, the model was trained on a, b, c"),
        (b"1,2\n", "rows.csv", r"rows of shape \(2,\), the model has \(3,\)"),
        (b"a,b,c\n", "rows.csv", "holds no rows|cannot be read"),
        (b"", "rows.csv", "holds no rows|cannot be read"),
        (b"\x93NUMPY\x01", "rows.npy", "cannot be read"),
        (b"PK\x03\x04junk", "rows.npz", "cannot be read"),
        (b"\x00\x00\x08\x03\x00\x00", "t10k-images-idx3-ubyte", "cannot be read"),
        (b"", "rows.xlsx", "unknown format"),
    ],
)  # fmt: skip
def test_bad_data_are_explained(trained, tmp_path, capsys, content, name, words):
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out.csv"
    assert cli.main(["loglik", str(trained / "run"), str(tmp_path / name), "--out", str(out), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ndm-ct loglik: ")
    assert re.search(words, error), error
    assert not out.exists()


def test_pickles_are_not_opened(tmp_path):
    np.save(tmp_path / "rows.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "rows.npy")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "--out", "{}/none"], 2, "what is the model to be trained on?"),
        (["train", "{}/nothing.csv", "--out", "{}/none"], 1, "there is no"),
        (["train", "{}/train.csv", "--out", "{}/none", "--transform", "warp"], 1, "transform"),
        (["train", "{}/train.csv", "--out", "{}/none", "--head", "moments"], 1, "needs a learned transform"),
        (["train", "{}/train.csv", "--out", "{}/none", "--config", "{}/bad.json"], 1, "unknown entry 'stepz'"),
        (["train", "{}/train.csv", "--out", "{}/none", "--config", "{}/kind.json"], 1, "steps must be of type int"),
        (["loglik", "{}", "{}/test.csv", "--out", "{}/x.csv"], 1, "holds no run"),
        (["loglik", "{}/run", "{}/test.csv", "--out", "{}/x.txt"], 2, "--out must end in"),
        (["sample", "{}/run", "--out", "{}/x.png"], 2, "a png is for images"),
        (["sample", "{}/run", "--out", "{}/x.csv", "--method", "warp"], 1, "warp"),
        (["evaluate", "{}/run", "{}/test.csv", "--samples", "3"], 2, "--samples is for"),
    ],
)  # fmt: skip
def test_wrong_usage_is_explained(trained, capsys, arguments, code, words):
    (trained / "bad.json").write_text('{"stepz": 3}')
    (trained / "kind.json").write_text('{"steps": "3"}')
    assert cli.main([each.replace("{}", str(trained)) for each in arguments] + ["--quiet"]) == code
    assert words in capsys.readouterr().err
    assert not (trained / "none" / "model.safetensors").exists()


def test_a_constant_column_is_refused(tmp_path, capsys):
    rows = table(50)
    rows[:, 1] = 7.0
    write_csv(tmp_path / "rows.csv", rows)
    assert cli.main(["train", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "r"), *QUICK]) == 1
    assert "column 'b' is constant" in capsys.readouterr().err
    write_csv(tmp_path / "rows.csv", rows[:1])
    assert cli.main(["train", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "r"), *QUICK]) == 1
    assert "expected two or more rows to train on, which set the scale, got 1" in capsys.readouterr().err


def test_integers_of_a_table_are_levels_where_asked(tmp_path, capsys):
    values = np.random.default_rng(0).choice(4, size=(100, 2), p=[0.1, 0.2, 0.3, 0.4])
    write_csv(tmp_path / "rows.csv", values, names=None)
    ok("train", tmp_path / "rows.csv", "--levels", 4, "--out", tmp_path / "run", *QUICK)
    ok("loglik", tmp_path / "run", tmp_path / "rows.csv", "--out", tmp_path / "p.npz", "--quiet")
    model = ndm_ct.load(tmp_path / "run" / "model.safetensors")
    generator = [make_generator(0, "loglik", row) for row in range(100)]
    expected = ndm_ct.bits_per_dim(
        model, torch.as_tensor(values), quantisation=4, dequantisation="process", generator=generator
    )
    np.testing.assert_array_equal(np.load(tmp_path / "p.npz")["bits_per_dim"], expected.double().numpy())
    half = math.exp(0.5 * float(model.schedule.gamma(torch.tensor(model.t_min, dtype=torch.float64)))) * 3.02
    assert half == pytest.approx(0.25, rel=1e-3)  # noise a third of a bin's half-width
    ok("sample", tmp_path / "run", "-n", 50, "--out", tmp_path / "drawn.csv", "--quiet")
    assert set(read_csv(tmp_path / "drawn.csv")["x0"]) <= {0.0, 1.0, 2.0, 3.0}
    write_csv(tmp_path / "rows.csv", values + 0.5, names=None)
    assert (
        cli.main(["loglik", str(tmp_path / "run"), str(tmp_path / "rows.csv"), "--out", str(tmp_path / "q.npz")]) == 1
    )
    assert "values that are no integers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--head", "moments", "--transform", "neural", "--gamma-max", "-20"], "--gamma-min must be below --gamma-max"),
        (["--device", "cuda:99"], "device='cuda:99' is not available on this machine"),
        (["--lr", "0"], "lr must be positive"),
        (["--patience", "3", "--validation-fraction", "0"], "patience has no effect without validation"),
        (["--levels", "4"], "values that are no integers"),
    ],
)
def test_settings_that_make_no_training_leave_nothing_that_insists_on_them(tmp_path, capsys, arguments, words):
    data, out = write_csv(tmp_path / "train.csv", table(60)), tmp_path / "run"
    assert cli.main(["train", str(data), "--out", str(out), *QUICK, *arguments]) == 1
    assert words in capsys.readouterr().err
    assert not (out / "config.json").exists()
    assert cli.main(["train", str(data), "--out", str(out), *QUICK, "--time-limit", "1e-6"]) == 130
    assert cli.main(["train", str(data), "--out", str(out), *QUICK, "--patience", "0"]) == 1
    assert (out / "config.json").exists()  # of the training that has begun


def test_a_device_that_is_not_there_is_named(trained, capsys):
    arguments = ["sample", str(trained / "run"), "--out", str(trained / "x.csv"), "--device", "cuda:99"]
    assert cli.main(arguments) == 1
    assert "device='cuda:99' is not available on this machine" in capsys.readouterr().err


COMMANDS = {
    "sample": ["sample", "{}/run", "-n", "50", "--batch-size", "16", "--quiet", "--out"],
    "loglik": ["loglik", "{}/run", "{}/test.csv", "--batch-size", "16", "--quiet", "--out"],
}
both = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture
def stopped(trained, tmp_path, monkeypatch):
    """Runs a command until Ctrl-C in its third batch; returns its arguments, the output and the folder beside it."""

    def stop(command, out="rows.npz"):
        arguments = [each.replace("{}", str(trained)) for each in COMMANDS[command]] + [str(tmp_path / out)]
        with monkeypatch.context() as patch:
            calls, work = [], getattr(OWNERS[command], command)

            def working(*given, **options):
                calls.append(given)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return work(*given, **options)

            patch.setattr(OWNERS[command], command, working)
            assert cli.main(arguments) == 130
        return arguments, tmp_path / out, tmp_path / f".{out}.parts"

    return stop


@both
@pytest.mark.parametrize("out", ["rows.npz", "rows.csv"])
def test_a_command_that_was_stopped_goes_on(stopped, trained, tmp_path, monkeypatch, capsys, command, out):
    """With the batches that are left, to the bytes of a command that was not stopped; nothing stays beside them."""
    arguments, path, beside = stopped(command, out)
    (tmp_path / f".{out}.{'0' * 32}.tmp").write_bytes(b"of a process killed while it wrote the output")
    assert "the same command goes on" in capsys.readouterr().err
    assert not path.exists()
    assert sorted(each.name for each in beside.iterdir()) == [".lock", "0-16.safetensors", "16-32.safetensors"]
    ok(*arguments[:-1], tmp_path / f"whole-{out}")
    calls, work = [], getattr(OWNERS[command], command)
    monkeypatch.setattr(
        OWNERS[command], command, lambda *given, **options: (calls.append(given), work(*given, **options))[1]
    )
    ok(*arguments)
    assert len(calls) == {"sample": 2, "loglik": 1}[command]
    assert path.read_bytes() == (tmp_path / f"whole-{out}").read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == [out, f"whole-{out}"]


def test_more_rows_are_drawn_after_those_that_were_kept(stopped, tmp_path):
    arguments, path, _ = stopped("sample")
    arguments[arguments.index("50")] = "70"
    ok(*arguments[:-1], tmp_path / "whole.npz")
    ok(*arguments)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()


@both
def test_rows_that_differ_are_never_mixed(stopped, trained, tmp_path, capsys, command, monkeypatch):
    """Other options, data or weights are refused until the folder is deleted, and change nothing."""
    arguments, path, beside = stopped(command)
    before = {each: each.read_bytes() for each in beside.iterdir()}
    shutil.copytree(trained / "run", tmp_path / "other")
    model = ndm_ct.load(tmp_path / "other" / "model.safetensors")
    next(model.parameters()).data += 1e-6
    ndm_ct.save(model, tmp_path / "other" / "model.safetensors")
    shutil.copytree(trained / "run", tmp_path / "units")
    config = json.loads((tmp_path / "units" / "config.json").read_text())
    config["mean"][0] += 1e-9
    (tmp_path / "units" / "config.json").write_text(json.dumps(config))
    changes = {"--seed=1": "seed", "--batch-size=15": "--batch-size"}
    changes |= (
        {"--stderr=1": "stderr"}
        if command == "loglik"
        else {"--method=heun --steps=3": "method was 'ode', now 'heun'; steps"}
    )
    tries = [([*arguments, *more.split()], what) for more, what in changes.items()]
    scale = "model; data" if command == "loglik" else "model"  # rows are compared as the model takes them
    for name, what in (("other", "model"), ("units", scale)):
        tries.append(([arguments[0], str(tmp_path / name), *arguments[2:]], what))
    if command == "loglik":
        write_csv(tmp_path / "one.csv", table(40, seed=1) + np.eye(40, 3) * 1e-3)
        tries.append(([*arguments[:2], str(tmp_path / "one.csv"), *arguments[3:]], "data"))
    for changed, what in tries:
        assert cli.main(changed) == 1
        error = capsys.readouterr().err
        assert f"rows.npz.parts' holds work of other settings: {what}" in error
        assert "Repeat them to continue" in error
        assert {each: each.read_bytes() for each in beside.iterdir()} == before
    with monkeypatch.context() as patch:  # rows that a version began which derived seeds in another way
        patch.setattr(batches, "NOISE", "seed + row")
        assert cli.main(arguments) == 1
    assert f"noise was {batches.NOISE!r}, now 'seed + row'" in capsys.readouterr().err
    other = {"sample": "loglik", "loglik": "sample"}[command]
    assert cli.main([each.replace("{}", str(trained)) for each in COMMANDS[other]] + [str(path)]) == 1
    assert "other settings: command was" in capsys.readouterr().err
    shutil.rmtree(beside)
    ok(*tries[0][0])


@both
def test_an_output_belongs_to_one_process(stopped, capsys, command, monkeypatch):
    arguments, _, beside = stopped(command)
    capsys.readouterr()
    work, refused = getattr(OWNERS[command], command), []

    def working(*given, **options):
        monkeypatch.setattr(OWNERS[command], command, work)
        refused.append(cli.main(arguments))
        return work(*given, **options)

    monkeypatch.setattr(OWNERS[command], command, working)
    ok(*arguments)
    assert refused == [1]
    assert "rows.npz' is in use by another process; wait until" in capsys.readouterr().err
    assert not beside.exists()


@both
def test_a_damaged_batch_is_named(stopped, capsys, command):
    arguments, _, beside = stopped(command)
    for name in ("0-16.safetensors", "16-32.safetensors"):
        good = (beside / name).read_bytes()
        (beside / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert cli.main(arguments) == 1
        assert f"{name}: the checksum does not match; the file was damaged or edited. Delete" in capsys.readouterr().err
        (beside / name).unlink()
    ok(*arguments)


@pytest.mark.parametrize(
    ("command", "bad", "words"),
    [
        ("sample", "--batch-size=0", "--batch-size must be at least 1"),
        ("sample", "--method=warp", "warp"),
        ("sample", "-n=-1", "n must be a non-negative int"),
        ("loglik", "--batch-size=0", "--batch-size must be at least 1"),
        ("loglik", "--stderr=-1", "stderr"),
    ],
)
def test_a_command_that_cannot_begin_leaves_nothing(trained, tmp_path, capsys, command, bad, words):
    arguments = [each.replace("{}", str(trained)) for each in COMMANDS[command]]
    assert cli.main([*arguments, str(tmp_path / "rows.csv"), bad]) == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_rows_are_drawn_where_none_are_asked_for(trained, tmp_path):
    ok("sample", trained / "run", "-n", 0, "--out", tmp_path / "new" / "rows.csv", "--quiet")
    assert (tmp_path / "new" / "rows.csv").read_text() == "a,b,c\n"


def test_integers_are_compressed_and_restored(images, trained, tmp_path, capsys):
    pytest.importorskip("constriction")
    folder, pixels = images
    np.savez(tmp_path / "few.npz", pixels[:3])
    ok("compress", folder / "run", tmp_path / "few.npz", "--out", tmp_path / "few.ndm", "--steps", 4, "--quiet")
    ok("decompress", folder / "run", tmp_path / "few.ndm", "--out", tmp_path / "back.npz", "--quiet")
    assert np.array_equal(np.load(tmp_path / "back.npz")["x"].reshape(3, 4, 4), pixels[:3])
    content = bytearray((tmp_path / "few.ndm").read_bytes())
    content[-1] ^= 1
    (tmp_path / "few.ndm").write_bytes(content)
    for code, arguments, words in (
        (1, ["decompress", folder / "run", tmp_path / "few.ndm", "--out", tmp_path / "no.npz"], "damaged"),
        (2, ["decompress", folder / "run", tmp_path / "few.ndm", "--out", tmp_path / "no.csv"], "must end in .npz"),
        (2, ["compress", trained / "run", trained / "test.csv", "--out", tmp_path / "no"], "real values"),
    ):
        assert cli.main([str(each) for each in arguments] + ["--quiet"]) == code
        assert words in capsys.readouterr().err
