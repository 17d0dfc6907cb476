"""Pictures are read the way a viewer shows them, and arrays of images with their channels in the right place."""

import numpy as np
import pytest
import torch

from ndm_ct.files import read, write_picture

Image = pytest.importorskip("PIL.Image")
GREY = np.random.default_rng(0).integers(0, 256, (3, 6, 4), dtype=np.uint8)


def saved(folder, images, ending="png", **options):
    folder.mkdir(exist_ok=True)
    for place, image in enumerate(images):
        image.save(folder / f"{place}.{ending}", **options)
    return folder


def pictures(mode):
    return [Image.fromarray(each).convert(mode) for each in GREY]


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGB", "RGBA"])
def test_grey_pictures_have_one_channel(tmp_path, mode):
    rows = read(saved(tmp_path / "p", pictures(mode)))
    assert rows.values.shape == (3, 1, 6, 4)
    assert rows.levels == 256
    expected = np.stack([np.array(each.convert("L")) for each in pictures(mode)])
    np.testing.assert_array_equal(rows.values[:, 0], expected)


def test_one_colour_gives_all_three_channels(tmp_path):
    colour = Image.fromarray(np.stack([GREY[0], GREY[1], GREY[2]], -1))
    for first in (pictures("L")[0], pictures("LA")[0]):
        rows = read(saved(tmp_path / "p", [first, colour, colour.quantize(256)]))
        assert rows.values.shape == (3, 3, 6, 4)
        np.testing.assert_array_equal(rows.values[0], np.stack([GREY[0]] * 3))
        np.testing.assert_array_equal(rows.values[1], GREY)


def test_transparent_pixels_are_white(tmp_path):
    clear = Image.fromarray(np.stack([GREY[0], np.where(GREY[0] > 99, 0, 255).astype(np.uint8)], -1), mode="LA")
    rows = read(saved(tmp_path / "p", [clear]))
    np.testing.assert_array_equal(rows.values[0, 0], np.where(GREY[0] > 99, 255, GREY[0]))


def test_sixteen_bits_keep_their_levels(tmp_path):
    deep = np.random.default_rng(0).integers(0, 4096, (3, 6, 4)).astype(np.uint16)
    for ending in ("png", "tif"):
        rows = read(saved(tmp_path / ending, [Image.fromarray(each) for each in deep], ending))
        assert rows.levels == 65536
        np.testing.assert_array_equal(rows.values[:, 0].numpy(), deep)
    saved(tmp_path / "png", pictures("L")[:1])
    with pytest.raises(ValueError, match=r"numbers of bits: 0.png has 8, 1.png has 16"):
        read(tmp_path / "png")


def test_pixels_that_are_not_levels_are_refused(tmp_path):
    saved(tmp_path / "p", [Image.fromarray(GREY[0].astype(np.float32))], "tif")
    with pytest.raises(ValueError, match="more than 8 bits; convert"):
        read(tmp_path / "p")
    saved(tmp_path / "q", [Image.fromarray(GREY[0].astype(np.int32) * 1000)], "tif")
    with pytest.raises(ValueError, match="expected 16 bits"):
        read(tmp_path / "q")


def test_photographs_are_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    rows = read(saved(tmp_path / "p", [pictures("L")[0]], exif=exif))
    np.testing.assert_array_equal(rows.values[0, 0], np.rot90(GREY[0], -1))


def test_several_frames_are_refused(tmp_path):
    frames = pictures("L")
    saved(tmp_path / "p", frames[:1], "gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="has 3 frames"):
        read(tmp_path / "p")


def test_hidden_files_are_skipped_and_others_are_counted(tmp_path):
    folder = saved(tmp_path / ".hidden parents count for nothing", pictures("L"))
    for name in (".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/._0.png", "._0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"junk")
    (folder / "x.png").mkdir()
    (folder / "y.png").symlink_to(folder / "nothing")
    rows = read(folder)
    assert len(rows.values) == 3
    assert not any("left out" in note for note in rows.notes)
    for name in ("a.heic", "b.HEIC", "labels.txt"):
        (folder / name).write_bytes(b"")
    assert "files left out by their ending: 2 of .heic, 1 of .txt" in read(folder).notes


@pytest.mark.parametrize("ending", ["tif", "gif", "ppm", "bmp", "webp", "PNG"])
def test_endings_of_pictures(tmp_path, ending):
    options = {"lossless": True} if ending == "webp" else {}
    rows = read(saved(tmp_path / "p", pictures("L"), ending, **options))
    np.testing.assert_array_equal(rows.values[:, 0], GREY)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((8, 8, 4), (4, 8, 8)),
        ((4, 8, 8), (4, 8, 8)),
        ((13, 8, 8), (13, 8, 8)),
        ((8, 8, 13), (13, 8, 8)),
        ((2, 8, 6), (2, 8, 6)),
        ((8, 6, 2), (2, 8, 6)),
        ((3, 8, 6), (3, 8, 6)),
        ((8, 6, 3), (3, 8, 6)),
        ((1, 8, 8), (1, 8, 8)),
        ((8, 8, 1), (1, 8, 8)),
        ((8, 8, 8), (8, 8, 8)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_channels_come_first(tmp_path, shape, found, dtype):
    values = np.random.default_rng(0).integers(0, 256, (5, *shape)).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    rows = read(tmp_path / "x.npy")
    assert tuple(rows.values.shape[1:]) == found
    expected = values if shape == found else np.moveaxis(values, -1, 1)
    np.testing.assert_array_equal(np.asarray(rows.values), expected)
    side = "first" if shape == found else "last"
    assert rows.notes == (f"images of {found[1]} x {found[2]} pixels, channels {side} in the file: {found[0]}",)


@pytest.mark.parametrize("levels", [256, 17, 2])
def test_pictures_of_levels_are_not_stretched(tmp_path, levels):
    x = torch.tensor([[0, 1], [1, levels // 2]])[None, None]
    write_picture(tmp_path / "x.png", x, levels)
    with Image.open(tmp_path / "x.png") as opened:
        shown = np.array(opened)[1:-1, 1:-1]
    np.testing.assert_array_equal(shown, np.round(x[0, 0].numpy() * 255 / (levels - 1)))


def test_pictures_have_one_or_three_channels(tmp_path):
    with pytest.raises(ValueError, match="these images have 4; write npz"):
        write_picture(tmp_path / "x.png", torch.zeros(1, 4, 2, 2), None)
