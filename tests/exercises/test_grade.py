"""Grading right, wrong and hostile files."""

import csv
import json
import os
import re
from pathlib import Path

import pytest

from minilora.cli import main
from minilora.exercises import grade as grader
from minilora.exercises.grade import EXERCISES, as_csv, exercise_numbers, grade, report

FOLDER = Path(__file__).parents[2] / "notebooks" / "exercises"
GOOD = "def lora_backward(dout, x, A, B, s):\n" \
       "    d = s * dout @ B.T\n    return d @ A.T, x.T @ d, s * (x @ A).T @ dout\n"


def graded(tmp_path, name, text, seconds=30):
    path = tmp_path / name
    path.write_text(text)
    (row,) = grade(path, seconds)
    return row


def test_every_solution_is_complete_and_no_stub_is():
    rows = [grade(path)[0] for path in sorted((FOLDER / "solutions").glob("*.ipynb"))]
    assert all(row["passed"] == row["total"] > 0 and not row["error"] for row in rows), report(rows)
    assert {row["exercise"] for row in rows} == set(EXERCISES)
    for path in sorted(FOLDER.glob("*.ipynb"))[::5]:
        (row,) = grade(path)
        assert row["passed"] == 0 and row["total"] == len(EXERCISES[row["exercise"]])
        assert all("ot implemented yet" in item["message"] for item in row["checks"]), row


def test_a_file_counts_by_what_it_defines(tmp_path):
    row = graded(tmp_path, "whatever.py", GOOD)
    assert (row["passed"], row["total"], row["error"]) == (1, 1, "")
    row = graded(tmp_path, "smith_1.py", "def linear_forward(x, W, b): return x @ W + b")
    assert (row["passed"], row["total"]) == (1, 2)
    assert row["checks"][1]["message"] == "linear_backward is not defined."
    row = graded(tmp_path, "x.py", "def linear_forward(x, W, b): return x @ W + b")
    assert (row["passed"], row["total"]) == (1, 2)


def test_its_own_checks_are_not_believed(tmp_path):
    text = "from minilora import check\ncheck.lora_backward = lambda f: print('correct')\n" \
           "from minilora.exercises import grade\ngrade.CHECKS.clear()\n" \
           "def lora_backward(dout, x, A, B, s): return 1, 2, 3\n"
    row = graded(tmp_path, "04.py", text)
    assert row["passed"] == 0 and row["total"] == 1


@pytest.mark.parametrize("text, words", [
    ("while True: pass", "stopped after 2 seconds"),
    ("import os; os._exit(3)", "died (status 3)"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died"),
    ("raise SystemExit(0)", "lora_backward is not defined"),
    ("def lora_backward(", "SyntaxError"),
    ("x = [0] * 10**15", "MemoryError"), ("x = 'a' * (9 << 30)", "MemoryError"),
    ("import sys\nwhile True: sys.stderr.write('x' * 10**6)", "stopped after 2 seconds"),
    ("def lora_backward(*a): raise ValueError('y' * 10**7)", "raised ValueError: yyy"),
    ("print('x' * 10**8)", "is not defined"),
    ("import sys\ndef lora_backward(*a): sys.exit(1)", "SystemExit"),
    ("def lora_backward(*a):\n    while True: pass", "stopped after 2 seconds"),
    ("import missing_module\n" + "x = 1", "missing_module"),
    ("import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'"
     "])\nwhile True: pass", "stopped after 2 seconds"),
])
def test_what_goes_wrong_costs_one_row(tmp_path, text, words):
    row = graded(tmp_path, "04_x.py", text, seconds=2)
    assert row["passed"] == 0 and row["total"] == 1
    assert words in row["error"] + row["checks"][0]["message"]


def test_files_that_are_no_submission(tmp_path):
    (tmp_path / "a.ipynb").write_text("no")
    (tmp_path / "b.ipynb").write_text('{"cells": [{"cell_type": "code"}]}')
    (tmp_path / "c.py").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "d.py").write_text("#" * 3_000_000)
    (tmp_path / "e.py").write_text("x = 1")
    (tmp_path / "f.py").write_text("def f(:")
    (tmp_path / ".hidden.py").write_text(GOOD)
    rows = grade(tmp_path)
    assert [Path(row["file"]).name for row in rows] == [*(f"{x}.ipynb" for x in "ab"),
                                                        *(f"{x}.py" for x in "cdef")]
    faults = ("not a notebook", "not a notebook", "codec", "more than", "defines nothing",
              "SyntaxError")
    for row, words in zip(rows, faults, strict=True):
        assert words in row["error"], row
    with pytest.raises(ValueError, match="there is no .py or .ipynb"):
        (tmp_path / "empty").mkdir()
        grade(tmp_path / "empty")
    with pytest.raises(ValueError, match="neither a notebook"):
        grade(Path(__file__).parents[2] / "README.md")


@pytest.fixture
def not_run(monkeypatch):
    """Yield a list of (name, contents) of the files that would be run."""
    ran = []
    monkeypatch.setattr(grader, "_run", lambda *file: (ran.append(file[:2]) or [], "not run"))
    return ran


def test_a_file_that_is_reached_twice_is_graded_once(tmp_path, monkeypatch, not_run):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for name in ("b.py", "a.py", "inner/c.py"):
        (folder / name).write_text(name)
    monkeypatch.chdir(folder)
    again = ["b.py", str(folder / "b.py"), f"..{os.sep}folder", "b.py", "inner"]
    rows = grade([*again, folder, Path("inner") / ".." / "a.py"])
    assert [row["file"] for row in rows] == [
        "b.py", str(Path("..") / "folder" / "a.py"), str(Path("..") / "folder" / "inner" / "c.py")]
    assert not_run == [("b.py", b"b.py"), ("a.py", b"a.py"), ("c.py", b"inner/c.py")]
    assert grade("b.py")[0]["file"] == grade(Path("b.py"))[0]["file"] == "b.py"


def test_a_link_is_a_file_of_its_own(tmp_path, not_run):
    (tmp_path / "mueller.py").write_text("x")
    try:
        (tmp_path / "a.py").symlink_to("mueller.py")
    except OSError:
        pytest.skip("no links here")
    assert [Path(row["file"]).name for row in grade(tmp_path)] == ["a.py", "mueller.py"]


def test_all_files_are_read_before_one_is_run(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(grader, "_read", lambda path: done.append(f"read {path.name}") or b"")
    monkeypatch.setattr(grader, "_run", lambda name, *_: (done.append(f"run {name}") or [], ""))
    paths = [tmp_path / "1" / "a.py", tmp_path / "2"]
    for folder, name in (("1", "a.py"), ("2", "b.py")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    grade(paths)
    assert done == ["read a.py", "read b.py", "run a.py", "run b.py"]


@pytest.mark.parametrize("wrong, words", [
    ("none.py", "no such file or folder: none.py"), ("x.txt", "x.txt is neither a notebook"),
    ("empty", "there is no .py or .ipynb file in empty"),
])
def test_a_wrong_path_is_found_before_a_file_is_run(
    tmp_path, monkeypatch, capsys, not_run, wrong, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").touch()
    (tmp_path / "x.txt").touch()
    (tmp_path / "empty").mkdir()
    assert main(["check", "a.py", wrong, "a.py"]) == 2
    out, err = capsys.readouterr()
    assert not out and words in err and err.count("\n") == 1 and not not_run


def test_a_notebooks_magics_are_skipped(tmp_path):
    cells = ["%matplotlib inline\n!ls\nimport numpy as np", GOOD]
    notebook = {"cells": [{"cell_type": "code", "source": c, "metadata": {}} for c in cells]}
    row = graded(tmp_path, "x.ipynb", json.dumps(notebook))
    assert (row["exercise"], row["passed"], row["total"]) == (None, 1, 1)


@pytest.mark.parametrize("name, number", [
    ("smith_04_lora", [4]), ("12", [12]), ("exercise-7", [7]), ("x13", []), ("a", []),
    ("2024_03_01", [3, 1]),
])
def test_the_number_of_the_exercise_is_in_the_name(name, number):
    assert exercise_numbers(name) == number


def test_a_number_that_does_not_fit_is_not_believed(tmp_path):
    assert graded(tmp_path, "group12_week_4.py", GOOD)["exercise"] == 4
    row = graded(tmp_path, "week3_smith.py", GOOD)
    assert (row["passed"], row["total"]) == (1, 1)


def test_what_is_imported_does_not_count(tmp_path):
    text = "from minilora.exercises.e07_layer_norm import _reference as layer_norm_backward"
    row = graded(tmp_path, "07.py", text)
    assert row["passed"] == 0 and "is imported, not defined" in row["checks"][0]["message"]


def test_failed_checks_in_the_file_do_not_stop_what_follows(tmp_path):
    text = "from minilora import check\ndef linear_forward(x, W, b): return x @ W\n" \
           "check.linear_forward(linear_forward)\n1 / 0\n" \
           "def linear_backward(dout, x, W): return dout @ W.T, x.T @ dout, dout.sum(0)\n"
    row = graded(tmp_path, "x.py", text)
    assert [item["passed"] for item in row["checks"]] == [False, True]


def test_every_check_of_a_file_that_hangs_has_its_row(tmp_path):
    text = GOOD + "def adamw_step(*a):\n    while True: pass\n"
    row = graded(tmp_path, "x.py", text, seconds=10)
    assert [item["check"] for item in row["checks"]] == ["lora_backward", "adamw"]
    assert row["passed"] == 1 and "stopped after" in row["checks"][1]["message"]


def test_the_command_line(tmp_path, capsys):
    (tmp_path / "good_04.py").write_text(GOOD)
    assert main(["check", str(tmp_path / "good_04.py"), "--seconds", "1e300"]) == 0
    assert "1 of 1 checks passed" in capsys.readouterr().out
    (tmp_path / "bad_04.py").write_text(GOOD.replace("x.T @ d,", "x.T @ dout @ B.T,"))
    assert main(["check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 files are complete" in out
    assert re.search(r"bad_04.py +4 +0 of 1 +dA is wrong: it lacks the factor scale", out)
    assert main(["check", str(tmp_path / "bad_04.py"), "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["exercise"] == 4 and "lacks the factor" in row["checks"][0]["message"]
    assert main(["check", str(tmp_path / "none")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    ([], "required: PATH"), ([""], "is empty"), (["a.py", ""], "is empty"),
    (["a.py", "--json", "--csv"], "not allowed with"),
])
def test_bad_options(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(["check", *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err


# ---- For a spreadsheet

HEAD = ["file", "exercise", "passed", "total", "complete", "message"]


def test_the_csv_of_the_command_line(tmp_path, capfdbinary):
    for name, text in (("04, \"good\".py", GOOD), ("1.py", "def linear_forward(x, W, b): return x"),
                       ("x.py", "raise ValueError('a, \"b\"\\nxᵀ\\r=1+1')")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert main(["check", str(tmp_path), "--csv"]) == 1
    out = capfdbinary.readouterr().out.decode().replace(os.linesep, "\n")
    assert "\r" not in out and out.endswith("\n") and not out.endswith("\n\n")
    head, *rows = csv.reader(out.splitlines())
    assert head == HEAD
    assert [Path(row[0]).name for row in rows] == ["04, \"good\".py", "1.py", "x.py"]
    assert rows[0][1:] == ["4", "1", "1", "1", ""]
    assert rows[1][1:5] == ["1", "0", "2", "0"] and rows[1][5].startswith("y ")
    assert rows[2][1:] == ["", "0", "0", "0", 'Your code raised ValueError: a, "b"']


def row_of(file, error):
    return {"file": file, "exercise": None, "checks": [], "passed": 0, "total": 0, "error": error}


@pytest.mark.parametrize("text, cell", [
    ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@SUM(A1)", "'@SUM(A1)"), (" =1", "' =1"),
    ("＝1+1", "'＝1+1"), ('"=1"', "'\"=1\""), ("\t=1", r"\t=1"), ("\r=1", r"\r=1"), ("\n=1", ""),
    ("a;=1+1;b", "a;'=1+1;b"), ('a;"=1"', "a;'\"=1\""), ("a; -b, c = -1", "a;' -b, c = -1"),
    ("a=1, b+1", "a=1, b+1"), ("dW = xᵀ dout", "dW = xᵀ dout"), ("\x1b[2J\0", r"\x1b[2J\x00"),
    ("\u202e=1", r"\u202e=1"), ("\ud800", r"\ud800"), ("", ""),
])
def test_a_cell_is_no_formula(text, cell):
    head, row = csv.reader(as_csv([row_of(text, text)]).split("\n"))
    assert (head, row) == (HEAD, [cell if text[:1] != "\n" else r"\n=1", "", "0", "0", "0", cell])


def test_a_cell_is_not_longer_than_a_spreadsheet_can_hold():
    for character in ("y", "\U000e0001", '"', "=", ";="):
        (row,) = list(csv.reader([as_csv([row_of("x", character * 10_000)]).split("\n")[1]]))
        assert 500 <= len(row[-1]) < 32_767
