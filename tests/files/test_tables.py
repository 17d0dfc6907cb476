"""Tables as people have them: what is a name, what is a row, what is left out, and what is asked."""

import bz2
import gzip
import lzma
import zipfile

import numpy as np
import pytest

from ndm_ct.files import read, write_table

ROWS = np.array([[0.5, -1.25], [2.75, 3.5], [1e-3, -4.125]])
BODY = "".join(f"{a!r},{b!r}\n" for a, b in ROWS.tolist())


@pytest.fixture
def written(tmp_path):
    def write(text, name="t.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    "first", ["a,b\n", '"a","b"\n', "\n\na,b\n", "\ufeffa,b\n", " a , b\n", "# a,b\n", "# made\na,b\n"]
)
def test_a_line_of_words_is_names(written, first):
    rows = read(written(first + BODY))
    assert rows.columns == ("a", "b")
    np.testing.assert_array_equal(rows.values, ROWS)


def test_a_name_may_have_two_lines_or_a_comma(written):
    rows = read(written('"a\n(cm)","b, c"\n' + BODY))
    assert rows.columns == ("a (cm)", "b, c")
    np.testing.assert_array_equal(rows.values, ROWS)


@pytest.mark.parametrize(
    "first", ["0,1", "2001,2002", "1", "0,1,2", "400.5,401.0,401.5", "id,2001", "NA,b", "a,,c", "x,?"]
)
def test_a_line_that_may_be_names_is_asked_about(written, first):
    width = first.count(",") + 1
    text = first + "\n" + "".join(",".join(["0.25"] * width) + "\n" for _ in range(4))
    with pytest.raises(ValueError, match=r"header is needed for .*Give 'yes' if it names"):
        read(written(text))
    rows = read(written(text), header="yes")
    assert rows.columns[0] == first.split(",")[0]
    assert len(rows.values) == 4


@pytest.mark.parametrize("first", ["0.5,1.5", "3,1", "7,7.5", "1,1"])
def test_a_line_of_other_numbers_is_a_row(written, first):
    rows = read(written(first + "\n5,2\n6,4\n"))
    assert (rows.columns, len(rows.values)) == (None, 3)


def test_numbers_that_may_be_names_are_a_row_where_said(written):
    assert read(written("0,1\n" + BODY), header="no").values[0].tolist() == [0.0, 1.0]
    assert read(written("1,2,3\n7,5,9\n"), header="no").values.shape == (2, 3)


@pytest.mark.parametrize("gap", ["", "?", "NA", "-", "n/a", "nan", "NULL", "#N/A", '"1,5"'])
def test_a_first_row_with_a_gap_is_not_lost(written, gap):
    with pytest.raises(ValueError, match=r"line 1, column 'x0'|row 0, place"):
        read(written(f"{gap},2.0\n" + BODY))


def test_header_has_two_answers_and_belongs_to_text(written, tmp_path):
    with pytest.raises(ValueError, match="header='maybe' is unknown"):
        read(written("a,b\n" + BODY), header="maybe")
    np.save(tmp_path / "x.npy", ROWS)
    with pytest.raises(ValueError, match="header='no' has no effect"):
        read(tmp_path / "x.npy", header="no")


def test_quoted_numbers_are_numbers(written):
    text = '"a","b"\n' + "".join(f'"{a!r}","{b!r}"\n' for a, b in ROWS.tolist())
    np.testing.assert_array_equal(read(written(text)).values, ROWS)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("T.CSV", bytes),
        ("t.csv.gz", gzip.compress),
        ("t.csv.BZ2", bz2.compress),
        ("t.csv.xz", lzma.compress),
        ("t.txt", bytes),
        ("t.data", bytes),
    ],
)
def test_endings(written, name, pack):
    rows = read(written(pack(("a,b\n" + BODY).encode()), name))
    assert rows.columns == ("a", "b")
    np.testing.assert_array_equal(rows.values, ROWS)


def test_archives_of_one_file(tmp_path):
    path = tmp_path / "t.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("t.csv", "a,b\n" + BODY)
        archive.writestr("__MACOSX/._t.csv", "junk")
    np.testing.assert_array_equal(read(path).values, ROWS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("u.csv", BODY)
    with pytest.raises(ValueError, match="holds 2 files"):
        read(path)
    (tmp_path / "x.npy.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Unpack \.gz files first"):
        read(tmp_path / "x.npy.gz")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a b\n 0.5   -1.25\n2.75 3.5\n1e-3\t-4.125\n", "t.txt"),
        ("a\tb\n0.5\t-1.25\n2.75\t3.5\n1e-3\t-4.125\n", "t.csv"),
        ("a;b\n0.5;-1.25\n2.75;3.5\n1e-3;-4.125\n", "t.csv"),
        ("a;b\n0,5;-1,25\n2,75;3,5\n1e-3;-4,125\n", "t.csv"),
        ('"a" "b"\n"1" 0.5 -1.25\n"2" 2.75 3.5\n"3" 1e-3 -4.125\n', "t.txt"),
        ("a,b\r\n0.5,-1.25\r\n2.75,3.5\r\n1e-3,-4.125\r\n", "t.csv"),
    ],
    ids=["spaces", "tabs", "semicolons", "decimal commas", "row names of R", "Windows"],
)
def test_separators(written, text, name):
    rows = read(written(text, name))
    assert rows.columns == ("a", "b")
    np.testing.assert_allclose(rows.values, ROWS)
    assert any("decimal comma" in note for note in rows.notes) == ("0,5" in text)


@pytest.mark.parametrize("names", [",a,b", '"","a","b"', "Unnamed: 0,a,b"])
@pytest.mark.parametrize("index", [("0", "1", "7"), ("Mazda", "Fiat", "Honda")])
def test_a_first_column_without_a_name_is_left_out(written, names, index):
    lines = BODY.splitlines()
    text = names + "\n" + "".join(f"{label},{line}\n" for label, line in zip(index, lines, strict=True))
    rows = read(written(text))
    assert rows.columns == ("a", "b")
    np.testing.assert_array_equal(rows.values, ROWS)
    assert any("index of the rows and left out" in note for note in rows.notes)


def test_a_column_that_counts_rows_is_said(written):
    rows = read(written("id,a\n5,0.5\n6,0.25\n7,0.75\n"))
    assert rows.values.shape == (3, 2)
    assert rows.notes == ("column 'id' counts the rows; take it out if it is an index",)


def test_two_columns_of_one_name_are_refused(written):
    with pytest.raises(ValueError, match="two columns are called 'a'"):
        read(written("a,a\n" + BODY))


def test_parquet_without_its_index(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(ROWS, columns=["a", "b"])
    for name, kept in (
        ("plain", frame),
        ("filtered", frame[frame.a < 9].iloc[[2, 0, 1]]),
        ("named", frame.set_axis([3, 1, 2]).rename_axis("k")),
    ):
        folder = tmp_path / f"{name}.PARQUET"
        folder.mkdir()
        kept.to_parquet(folder / "part-0.parquet")
        rows = read(folder)
        assert rows.columns == ("a", "b")
        np.testing.assert_array_equal(rows.values, kept.to_numpy())
        assert bool(rows.notes) == (name != "plain")


@pytest.mark.parametrize("ending", ["CSV", "Tsv", "NPZ"])
def test_tables_are_written_by_endings_in_any_case(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    write_table(path, {"a": ROWS[:, 0], "b": ROWS[:, 1]})
    assert path.exists()
    if ending != "NPZ":
        np.testing.assert_array_equal(read(path).values, ROWS)
