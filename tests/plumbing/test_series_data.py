"""experiments/series.py: the series that are made, recorded or read from a person's table."""

import io
from pathlib import Path

from common.cli import Mistake

import matplotlib
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import series

TABLE = np.array([[1.5, -2.0, 3.25], [4.0, 5.5, -6.0], [0.5, 0.25, 8.0], [2.5, 7.0, 1.0]])
HEADER, INDEX = "; first row: header", "; first column: index, left out"
DATES = [f"2024-01-0{day}" for day in range(1, 5)]


def written(header=None, index=None, mark=",", decimal="."):
    """The table as a program writes it, with these names of columns and rows."""
    rows = [[str(value).replace(".", decimal) for value in row] for row in TABLE]
    if index is not None:
        rows = [[str(name), *row] for name, row in zip(index, rows, strict=True)]
    if header is not None:
        rows.insert(0, [str(name) for name in header])
    return "\n".join(mark.join(row) for row in rows) + "\n"


def of_numpy(**options):
    file = io.StringIO()
    np.savetxt(file, TABLE, **options)
    return file.getvalue()


@pytest.mark.parametrize("content, found", [
    (written(), ""),
    (written(header="abc"), HEADER),
    (written(header=range(2000, 2003)), HEADER),
    (written(header=["", 0, 1, 2], index=range(4)), HEADER + INDEX),  # pandas: to_csv(f)
    (written(header=["", 0.0, 0.1, 0.2], index=range(4)), HEADER + INDEX),
    (written(index=range(4)), INDEX),  # to_csv(f, header=False)
    (written(header=["year", *"abc"], index=range(2001, 2005)), HEADER + INDEX),
    (written(header=["day", 0, 1, 2], index=DATES), HEADER + INDEX),
    (written(header=["day", 0, 1, 2], index=range(4)), HEADER + INDEX),
    (written(index=[f"{day} 10:00" for day in DATES]), INDEX),
    (written(mark=";", decimal=","), ""),
    (written(header=["Datum", *"abc"], index=["1.1.24", "2.1.24", "3.1.24", "4.1.24"], mark=";", decimal=","),
     HEADER + INDEX),
    (written(header="abc", mark="\t").encode("utf-16"), HEADER),  # Excel: "Unicode text"
    (written(header=["가", "나", "다"]).encode("cp949"), HEADER),
    (written(header=["a, or b", "b", "c"], mark=";"), HEADER),
    (written(header=['"a, or b"', "b", "c"]), HEADER),
    (written(index=DATES, mark=" ", decimal=","), INDEX),
    (written(mark=", "), ""), (written(mark="   "), ""),
    ("\ufeff" + written(header="abc"), HEADER),
    (written().replace("\n", ",,\r\n\r\n"), ""),  # commas at the end of each row
    (written(mark=";").replace("1.5", '"1.5"').replace("\n", "\r\n"), ""),
    ("# made by hand\n\n" + written(), ""),
    (of_numpy(), ""), (of_numpy(fmt="%9.4f", header="a b c"), ""), (of_numpy(delimiter=","), "")])
def test_tables_are_read_as_programs_write_them(content, found, tmp_path, capsys):
    file = tmp_path / "a.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_close(series.read_csv("csv:a.csv", file), TABLE)
    assert capsys.readouterr().out == f"csv:a.csv: 4 series of 3 values{found}\n"


@pytest.mark.parametrize("content, first", [
    ("0,1,2\n.1,.2,.3\n.3,.1,.2\n", 1),
    ("1,2,3\n4,5,6\n7,8,10\n", 0),  # rows alike: no header
    ("0,1,2\n5,9,1\n", 0),  # without it a single series would be left
    ("0,0,0\n1,2,4\n2,4,8\n", 0),  # columns alike: no index
    ("0,0\n1,2\n", 0), ("1,2\n3,5\n", 0), ("1,9\n2,4\n3,1\n", 0),
    *((f"{row}\n.1,.5,.3\n.3,.1,.2\n", 0) for row in ("3,2,1", "0,1,3", "0,.5,1"))])  # these do not count
def test_numbers_that_count_are_data_where_most_others_count_too(content, first, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    assert series.read_csv("csv:a.csv", tmp_path / "a.csv").tolist() == [
        [float(value) for value in row.split(",")] for row in content.split()[first:]]


def refused(name):
    """The message of the mistake with which load_series ends, one line."""
    with pytest.raises(Mistake) as stop:
        series.load_series(name)
    said, = str(stop.value).splitlines()
    return said


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text, words", [
    ("", "0 series of 0 numbers"), ("a,b\n", "0 series"), ("1,2", "1 series of 2 numbers"),
    ("h,i\n1,2\n\n3,4,5", "row 4 has 3 cells, must have 2"), ("1,2\n3,4\ninf,inf", "row 3, cell 1 is 'inf'"),
    ("1,2\nnan,3", "row 2, cell 1 is 'nan'"), ("1,2\n3,", "row 2, cell 2 is '', must be a finite number"),
    (",a,b\n0,1,2\n1,3,x\n2,4,4", "row 3, cell 3 is 'x'"), ("-1e308,0\n1e308,0", "row 1, cell 1 is '-1e308'"),
    ("date,price\n2024-01-01,5\n2024-01-02,7\n", "2 series of 1 numbers, needs at least 2 rows of 2"),
    ("PK\x03\x04", "save its sheet as CSV"), ("\x00\xff", "0 series"),
    ("5,5\n5,5\n", "all numbers of its training rows are 5")])
def test_a_table_that_is_none(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text, encoding="latin-1")
    said = refused(f"csv:{tmp_path / 'a.csv'}")
    assert said.startswith("dataset csv:") and words in said
    assert f"a table is named csv:{tmp_path}" in refused(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("name, words", [
    *((f"csv:{path}", "cannot be read (") for path in (".", "none.csv", "x" * 300, "a\0b")),
    *((name, f"dataset {name}: must be one of sines, membrane, csv:PATH") for name in ("csv:", "a.csv", "membranes"))])
def test_what_cannot_be_opened(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(name)


@pytest.mark.parametrize("mean, std", [(30, 5), (1e6, 1)])
def test_series_are_scaled_by_their_training_part_and_scaled_back(mean, std, tmp_path):
    """Those that are far from zero keep their digits."""
    table = mean + std * np.random.default_rng(1).normal(size=(40, 6))
    np.savetxt(tmp_path / "a.csv", table, delimiter=",")
    found = series.load_series(f"csv:{tmp_path / 'a.csv'}")
    assert found.train.shape == (36, 1, 6) and found.train.dtype == torch.float32 and found.train_labels is None
    assert abs(found.train.mean()) < 1e-5 and abs(found.train.std(correction=0) - 1) < 1e-5 < abs(found.test.mean())
    rows = found.restore(torch.cat([found.train, found.test])[:, 0].double()).numpy()
    assert_close(rows[rows[:, 0].argsort()], table[table[:, 0].argsort()], rtol=0, atol=1e-5)


def test_sines_are_one_wave_each_under_noise():
    found = series.load_series("sines")
    assert found.train.shape == (1000, 1, 128) and found.test.shape == (250, 1, 128)
    assert torch.equal(found.train, series.load_series("sines").train)
    x = found.restore(torch.cat([found.train, found.test]))[:40, 0].double().numpy()
    grid, fits = np.linspace(0, 1, 128), []
    for f in np.linspace(1, 9, 161):  # the best wave of any frequency leaves noise of 0.1
        waves = np.stack([np.sin(2 * np.pi * f * grid), np.cos(2 * np.pi * f * grid)], 1)
        weights = np.linalg.lstsq(waves, x.T, rcond=None)[0]
        fits.append([(x.T - waves @ weights).std(0), np.full(40, f), np.linalg.norm(weights, axis=0)])
    rest, speeds, sizes = np.array(fits)[np.array(fits)[:, 0].argmin(0), :, np.arange(40)].T
    assert 1.9 < min(speeds) < 2.6 and 7.4 < max(speeds) < 8.1
    assert 0.45 < min(sizes) < 0.55 and 0.95 < max(sizes) < 1.05
    assert np.mean(rest) == pytest.approx(0.1, abs=0.006)


def test_windows_of_the_recording_are_held_out_whole(monkeypatch):
    found = series.load_series("membrane")
    assert found.train.shape == (1003, 1, 128) and torch.equal(found.train[1, 0, :-1], found.train[0, 0, 1:])
    recorded = np.fromfile(Path(matplotlib.get_data_path()) / "sample_data" / "membrane.dat", np.float32)
    wanted = torch.from_numpy(recorded[1400:7050:4].copy())[1003 + 127:].unfold(0, 128, 1)  # none of training's values
    held_out = found.restore(found.test[:, 0])
    assert_close(held_out.sort(0).values, wanted.sort(0).values, rtol=1e-4, atol=1e-4)
    assert (held_out - wanted).abs().max() > 0.1  # shuffled
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: "/nowhere")
    assert "/nowhere" in refused("membrane")
