"""Tables in files: what becomes of columns and labels, from training to prediction, on real data of scikit-learn."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from commands import run as run_command
from training import single_thread, trainer

from batchkern import load_model
from batchkern.data import TableData, load_table_pair, open_pair
from batchkern.errors import UserError
from batchkern.rundir import CONFIG, METRICS, PREPROCESSING

pyarrow = pytest.importorskip("pyarrow")
one_thread = single_thread()
COLOURS = ["red", "green", "blue"]


def write(path, rows, header=("size", "colour", "old", "kind")):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return path


def plants(rows=60):
    """A number, a text, a truth value, and a class that follows from them."""
    numbers = torch.Generator().manual_seed(0)
    made = []
    for row in range(rows):
        size, colour = float(torch.randn((), generator=numbers)) * 40 + 100, COLOURS[row % 3]
        old = bool(torch.rand((), generator=numbers) < 0.5)
        made.append([f"{size:.3f}", colour, str(old).lower(), "yes" if (size > 100) == old else "no"])
    return made


def test_columns_become_features(tmp_path):
    rows = plants()
    train, test = load_table_pair(write(tmp_path / "a.csv", rows), write(tmp_path / "b.csv", rows[:20]), label="kind")
    assert train.classes == test.classes == ("no", "yes")
    expected = [[float(s), c == "blue", c == "green", c == "red", o == "true"] for s, c, o, _ in rows]
    assert torch.equal(train.inputs, torch.tensor(expected, dtype=torch.float64))
    assert train.labels.tolist() == [row[3] == "yes" for row in rows]
    assert torch.equal(test.inputs, train.inputs[:20])
    assert train.standardize
    assert train.shape == (5,)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
def test_the_three_kinds_of_files_and_columns_in_another_order(tmp_path, ending):
    rows = plants()
    path = write(tmp_path / f"a{'.csv' if ending == '.parquet' else ending}", rows)
    if ending == ".parquet":
        from pyarrow import csv as reader
        from pyarrow import parquet

        parquet.write_table(reader.read_csv(path), tmp_path / "a.parquet")
    turned = write(tmp_path / "b.csv", [row[::-1] for row in rows], header=("kind", "old", "colour", "size"))
    first, second = load_table_pair(tmp_path / f"a{ending}", turned, label="kind")
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.labels, second.labels)


def test_a_fifth_of_each_class_is_held_out(tmp_path):
    train, test = load_table_pair(write(tmp_path / "a.csv", plants()), label="kind")
    whole = load_table_pair(write(tmp_path / "b.csv", plants()), tmp_path / "a.csv", label="kind")[0]
    assert len(train) + len(test) == 60
    for part, share in ((train, 0.8), (test, 0.2)):
        counts = part.labels.bincount() - share * whole.labels.bincount()
        assert counts.abs().max() < 1
    found = sorted(torch.cat([train.inputs, test.inputs])[:, 0].tolist())
    assert found == sorted(whole.inputs[:, 0].tolist())
    assert isinstance(train, TableData)
    assert train.columns == whole.columns


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["10", "9", "9", "10", "2", "2"], ("2", "9", "10")),
        (["true", "false"] * 3, ("False", "True")),
        (["b", "a", "B"] * 2, ("B", "a", "b")),
    ],
)
def test_classes_are_sorted_as_what_they_are(tmp_path, values, classes):
    path = write(tmp_path / "a.csv", [[1 + i, value] for i, value in enumerate(values)], header=("x", "y"))
    data, _ = load_table_pair(path, path, label="y")
    assert data.classes == classes
    assert [classes[number].lower() for number in data.labels] == [value.lower() for value in values]


def test_clean_labels_are_no_feature(tmp_path):
    rows = [[i, "ab"[i % 2], "ab"[(i // 2) % 2]] for i in range(12)]
    path = write(tmp_path / "a.csv", rows, header=("x", "given", "right"))
    train, test = load_table_pair(path, path, label="given", clean_labels="right")
    assert [c.name for c in train.columns] == ["x"]
    assert train.clean_labels.tolist() == [(i // 2) % 2 for i in range(12)]
    assert test.clean_labels is None


def changed(row, column, value):
    def change(rows):
        rows[row][column] = value
        return rows

    return change


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("größe,kind\n1,a\n2,b\n", "the names of its columns are no text in UTF-8: write the file in this encoding"),
        ("size,kind\n1,ö\n2,b\n", "column 'kind' is no text in UTF-8"),
    ],
)
def test_text_of_another_encoding_is_told(tmp_path, text, sentence):
    (tmp_path / "latin.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"latin.csv: {sentence}"):
        load_table_pair(tmp_path / "latin.csv", label="kind")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed(3, 0, ""), "column 'size' has no value in row 4 of 60: fill them, or remove the rows or the column"),
        (changed(3, 1, ""), "column 'colour' has no value in row 4 of 60"),
        (changed(5, 3, ""), "column 'kind' has no value in row 6 of 60"),
        (changed(5, 0, "nan"), "column 'size' has no value in row 6 of 60"),
        (changed(2, 0, "inf"), "column 'size' is inf in row 3; it must be finite"),
        (changed(2, 0, "1e300"), r"column 'size' is 1e\+300 in row 3; it must be finite"),
        (lambda rows: [[f"name {i}", *row[1:]] for i, row in enumerate(rows * 2)], "'size' has 120 different texts"),
        (
            lambda rows: [[f"2020-01-{1 + i % 28:02}", *row[1:]] for i, row in enumerate(rows)],
            r"'size' is of type date32",
        ),
        (lambda rows: [[*row[:3], "yes"] for row in rows], "all 60 rows are of one class, 'yes'"),
        (lambda rows: [[*row[:3], i] for i, row in enumerate(rows)], "label is 'kind', of which each row has a value"),
        (lambda rows: [[*row[:3], 0.5 + i % 2] for i, row in enumerate(rows)], "'kind', a column of type double"),
        (lambda rows: [row[:3] for row in rows], "not a readable table: CSV parse error: Expected 4 columns, got 3"),
        (lambda rows: [], "the table has no rows"),
    ],
)
def test_what_is_no_table_is_a_sentence(tmp_path, change, sentence):
    path = write(tmp_path / "a.csv", change(plants()))
    with pytest.raises(UserError, match=rf"a.csv: .*{sentence}"):
        load_table_pair(path, label="kind")


@pytest.mark.parametrize(
    ("rows", "header", "sentence"),
    [
        ([[1, "red", "maybe"]], None, r"row 1 has 'maybe' in 'kind', which is none of the classes: no, yes"),
        (
            [[1, "pink", "yes"]],
            None,
            r"row 1 has 'pink' in 'colour', which no row of the training set has: blue, green",
        ),
        ([["big", "red", "yes"]], None, "column 'size' is of type string, but of numbers in the training set"),
        ([[1, "yes"]], ("size", "kind"), "no column 'colour', which the training set has; it has size, kind"),
        ([[1, "red", "yes", 3]], ("size", "colour", "kind", "age"), "its column 'age' is none of the training set's"),
        ([[1, "red"]], ("size", "colour"), "label is 'kind', which is none of its columns: size, colour"),
    ],
)
def test_a_test_set_of_other_columns_is_a_sentence(tmp_path, rows, header, sentence):
    train = write(tmp_path / "a.csv", [[r[0], r[1], r[3]] for r in plants()], header=("size", "colour", "kind"))
    test = write(tmp_path / "b.csv", rows, header=header or ("size", "colour", "kind"))
    with pytest.raises(UserError, match=f"b.csv: {sentence}"):
        load_table_pair(train, test, label="kind")


def test_what_is_asked_of_tables_alone(tmp_path):
    path = write(tmp_path / "a.csv", plants())
    with pytest.raises(UserError, match=r"a.csv is a table: give the column of its labels by label \(--label\)"):
        open_pair(path)
    with pytest.raises(
        UserError, match="label is 'kind', which is for tables, but image_size and center_crop are for images"
    ):
        open_pair(path, label="kind", image_size=8)
    with pytest.raises(UserError, match="label is 'sort', which is none of its columns: size, colour, old, kind"):
        open_pair(path, label="sort")
    with pytest.raises(UserError, match="digits is no file; a table"):
        open_pair("digits", label="kind")
    with pytest.raises(UserError, match="besides 'kind' there is no column for features"):
        open_pair(write(tmp_path / "b.csv", [["a"], ["b"], ["a"]], header=("kind",)), label="kind")
    with pytest.raises(UserError, match="two of its columns are called 'x'"):
        open_pair(write(tmp_path / "c.csv", [[1, 2, "a"]], header=("x", "x", "y")), label="y")


def test_seconds_of_a_date_keep_their_differences(tmp_path):
    """In float32 they would be multiples of 128."""
    rows = [[1_700_000_000 + 2 * i, "ab"[i % 2]] for i in range(20)]
    train, test = load_table_pair(write(tmp_path / "a.csv", rows, header=("t", "y")), tmp_path / "a.csv", label="y")
    run = trainer(model="mlp", train=train, test=test)
    fed = run.feed.batch(torch.arange(20), None)[0].flatten()
    places = torch.arange(20).double()
    expected = (places - places.mean()) / places.std(correction=0)
    torch.testing.assert_close(fed, expected.float())
    assert fed.dtype == torch.float32


@pytest.mark.parametrize("values", [("true", "false", "unknown"), ("01", "02", "x"), ("1", "2.5", "x")])
def test_texts_are_texts_in_a_file_of_a_few_rows_too(tmp_path, values):
    """Whatever they would be taken for by themselves; as a feature and as a class."""
    rows = [[i, values[i % 3], values[(i // 3) % 3]] for i in range(27)]
    train = write(tmp_path / "a.csv", rows, header=("n", "text", "y"))
    test = write(tmp_path / "b.csv", [[1, values[0], values[1]], [2, values[1], values[0]]], header=("n", "text", "y"))
    whole, few = load_table_pair(train, test, label="y")
    assert [whole.classes[number] for number in few.labels] == [values[1], values[0]]
    assert torch.equal(few.inputs[:, 1:], whole.inputs[:2, 1:])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b",x,y\n0,1,a\n1,2,b\n2,3,a\n", "the column '' is an index of pandas: write the table without"),
        (
            "x,y\n\u00e9,a\ne,b\nf,a\n".encode("latin-1"),
            "column 'x' is no text in UTF-8: write the file in this encoding",
        ),
        (b"x,y\nNA,a\nb,b\nc,a\n", "column 'x' has no value in row 1 of 3: .*NA, null and the like are no values"),
    ],
)
def test_what_programs_write_is_told(tmp_path, content, sentence):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"a.csv: {sentence}"):
        load_table_pair(tmp_path / "a.csv", label="y")


# --- from the file to the prediction ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cancer(tmp_path_factory):
    """569 rows of 30 measurements of scikit-learn's, with a text beside them."""
    datasets = pytest.importorskip("sklearn.datasets")
    found, folder = datasets.load_breast_cancer(), tmp_path_factory.mktemp("tables")
    header = [*(name.replace(" ", "_") for name in found.feature_names), "ward", "diagnosis"]
    rows = [
        [*map(repr, map(float, values)), "north" if i % 3 else "south", str(found.target_names[target])]
        for i, (values, target) in enumerate(zip(found.data, found.target, strict=True))
    ]
    write(folder / "all.csv", rows, header=header)
    write(folder / "new.csv", [row[:-1] for row in rows[:9]], header=header[:-1])
    return folder


def test_train_evaluate_and_predict(cancer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = str(cancer / "all.csv")
    words = ["--data", table, "--label", "diagnosis", "--epochs", "4", "--strategy", "trimming", "--no-progress"]
    status, out, err = run_command("train", *words, "--out", "run")
    assert (status, err) == (0, "")
    last = json.loads(Path("run", METRICS).read_text().splitlines()[-1])
    assert last["test_accuracy"] > 0.93
    assert json.loads(Path("run", CONFIG).read_text())["settings"]["model"] == "mlp"

    status, out, err = run_command("evaluate", "run", "--data", table, "--split", "held-out")
    assert (status, err) == (0, "")
    assert f"accuracy {last['test_accuracy_plain']:.2%}" in out
    assert " rows of " in out
    status, out, err = run_command("evaluate", "run", "--data", table)
    assert status == 2
    assert "the model was trained on it; say by split (--split) held-out" in err

    status, out, err = run_command("predict", "run", str(cancer / "new.csv"), "--out", "new_predictions.csv")
    assert (status, err) == (0, "")
    found = list(csv.reader(Path("new_predictions.csv").read_text().splitlines()))
    assert found[0] == ["row", "predicted", "probability", "probability(benign)", "probability(malignant)"]
    trained = load_model("run")
    logits = trained.model(trained.preprocessing(str(cancer / "new.csv")))
    assert [row[1] for row in found[1:]] == [trained.classes[number] for number in logits.argmax(1)]
    assert [float(row[4]) for row in found[1:]] == pytest.approx(logits.softmax(1)[:, 1].tolist(), abs=1e-5)
    with pytest.raises(UserError, match="inputs must be the path of a table, got tensor"):
        trained.preprocessing(torch.zeros(2, 32))
    status, out, err = run_command("predict", "run", str(cancer))
    assert status == 2
    assert "the model was not trained on images: give one table of its columns" in err


def test_resume_and_compare(cancer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(cancer / "all.csv"), "--label", "diagnosis", "--epochs", "2"]
    for more in (["--noise", "0.2"], ["--noise", "0.2", "--resume"]):
        assert run_command("train", *words, *more, "--out", "run", "--no-progress")[0] == 0
    arms = "trimming,hard-batches,augmentation,mixup"
    status, out, err = run_command(
        "compare", *words, "--arms", arms, "--seeds", "2", "--budget", "updates", "--jobs", "1"
    )
    assert status == 0
    assert "random" in out
    status, _, err = run_command("train", *words, "--strategy", "cutout", "--out", "other")
    assert status == 2
    assert "cutout needs images (C, H, W), but inputs are torch.float32 of shape (32,)" in err


def test_a_column_of_clean_labels_may_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [[i, "ab"[i % 2], "ab"[(i // 2) % 2]] for i in range(40)]
    write(tmp_path / "a.csv", rows, header=("x", "given", "right"))
    words = ["--data", "a.csv", "--label", "given", "--clean-labels", "right", "--epochs", "1", "--batch-size", "8"]
    assert run_command("train", *words, "--out", "run", "--no-progress")[0] == 0
    assert run_command("evaluate", "run", "--data", "a.csv", "--split", "held-out")[0] == 0
    assert run_command("predict", "run", "a.csv")[0] == 0


def test_a_damaged_preprocessing_of_a_table_is_a_sentence(cancer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "--data",
        str(cancer / "all.csv"),
        "--label",
        "diagnosis",
        "--epochs",
        "1",
        "--no-progress",
        "--out",
        "run",
    ]
    assert run_command("train", *words)[0] == 0
    path = tmp_path / "run" / PREPROCESSING
    whole = json.loads(path.read_text())
    assert whole["kind"] == "table"
    for change, sentence in (
        ({"columns": whole["columns"][1:]}, "columns are not those of inputs of shape"),
        ({"mean": whole["mean"][1:]}, "mean must be one number for each channel"),
        ({"std": [0.0] * 32}, "std must be positive"),
        ({"label": 3}, "label"),
        ({"columns": [{"name": "x", "kind": "odd", "values": []}]}, "kind"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=f"preprocessing.json is damaged: .*{sentence}"):
            load_model("run")
