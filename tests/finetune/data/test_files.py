"""Files and folders of rows, in the formats that people have."""

import bz2
import csv
import gzip
import json
import lzma

import datasets
import pyarrow
import pytest
from tiny_run import counting_rows, tiny_tokenizer, tiny_values, write_jsonl

from modeling_deepseek_moe.finetune.data.plain_rows import read_rows
from modeling_deepseek_moe.finetune.data.rows import load_data, recipe_rows
from modeling_deepseek_moe.finetune.data.sources import open_rows
from modeling_deepseek_moe.finetune.errors import UserError
from modeling_deepseek_moe.finetune.recipe.load import make_recipe

ROWS = [
    *counting_rows("prompt", 5),
    {"prompt": 'w1, "w2"\nw3', "completion": " NA"},
    {"prompt": "007", "completion": "é"},
]


def in_format(name, path):
    """The rows as a file of this format."""
    if name == "csv" or name == "tsv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="," if name == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    elif name == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif name == "json":
        path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        write_jsonl(path, ROWS)
    return path


def packed(path, suffix):
    content = path.read_bytes()
    other = path.with_name(path.name + suffix)
    if suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(other), "zstd") as file:
            file.write(content)
        return other
    other.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(content))
    return other


def rows_of(source, split="train"):
    return [row for _, row in open_rows(str(source), split)[0]()]


@pytest.mark.parametrize("name", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "of_no_ending"])
def test_a_file_of_each_format_has_the_same_rows(tmp_path, name):
    assert rows_of(in_format(name, tmp_path / f"rows.{name}")) == ROWS


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["jsonl", "json", "csv"])
def test_a_compressed_file_has_the_rows_of_the_file(tmp_path, name, suffix):
    assert rows_of(packed(in_format(name, tmp_path / f"rows.{name}"), suffix)) == ROWS


def test_rows_are_named_by_where_they_are(tmp_path):
    places = {}
    for name in ("jsonl", "json", "csv", "parquet"):
        rows = open_rows(str(in_format(name, tmp_path / f"rows.{name}")), "train")[0]()
        places[name] = [where for where, _ in rows][-2:]
    assert places == {
        "jsonl": ["line 6", "line 7"],
        "json": ["item 6 (line 22)", "item 7 (line 26)"],
        "csv": ["line 7", "line 9"],  # the one before has a line feed in it
        "parquet": ["row 5", "row 6"],
    }


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"w1", "another number of fields"),
        (b"w1,w2,w3", "another number of fields"),
        (b'"w1" w2,w3', "not CSV"),
        (b"w1,\xff", "no text in Unicode"),
        (b"w1,", "empty"),
    ],
    ids=["a field less", "a field more", "quotes", "not UTF-8", "empty"],
)
def test_a_bad_row_of_a_table_is_one_bad_row(tmp_path, line, reason):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\nw1,w2\n" + line + b"\nw3,w4\n")
    with pytest.raises(UserError, match=r"rows.csv, line 3: "):
        load_data(str(path), "train", tiny_tokenizer(), 64, tmp_path / "cache")
    assert len(load_data(str(path), "train", tiny_tokenizer(), 64, tmp_path / "cache", bad_rows="skip")) == 2
    (report,) = (tmp_path / "cache").glob("*.json")
    assert list(json.loads(report.read_text())["left_out"]) == [reason]


def test_a_text_longer_than_a_table_takes_by_default_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "w1 " * 100_000 + "\n")
    assert rows_of(path) == [{"text": "w1 " * 100_000}]


def test_a_folder_has_the_rows_of_the_files_of_a_split(tmp_path):
    folder = tmp_path / "data"
    (folder / ".hidden").mkdir(parents=True)
    packed(in_format("jsonl", folder / "train-0.jsonl"), ".gz")
    in_format("csv", folder / "train-1.csv")
    in_format("parquet", folder / "test.parquet")
    (folder / "README.md").write_text("Rows.")
    (folder / ".hidden" / "train.jsonl").write_text("no rows")
    assert rows_of(folder) == ROWS * 3 and rows_of(folder, "test") == ROWS
    rows, mark = open_rows(str(folder), "train")
    assert [where for where, _ in rows()][::7] == [
        "train-0.jsonl, line 1",
        "train-0.jsonl.gz, line 1",
        "train-1.csv, line 2",
    ]
    with pytest.raises(UserError, match="has no split 'dev': it has "):
        open_rows(str(folder), "dev")
    (folder / "train-1.csv").write_text("text\nw1\n")
    assert open_rows(str(folder), "train")[1] != mark


def test_a_folder_of_one_kind_of_files_is_the_split_train(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    assert rows_of(tmp_path) == ROWS * 2


def test_a_data_set_that_was_saved_to_disk_is_read(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two") == ROWS
    assert rows_of(tmp_path / "two", "test") == ROWS[:1]
    with pytest.raises(UserError, match="has no split 'dev': it has train, test"):
        open_rows(str(tmp_path / "two"), "dev")


def test_a_folder_without_rows_is_said(tmp_path):
    (tmp_path / "README.md").write_text("Nothing.")
    for folder in (tmp_path, tmp_path / "empty"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(UserError, match="is a folder without rows"):
            open_rows(str(folder), "train")


@pytest.mark.parametrize("name", ["json", "csv", "parquet"])
def test_these_are_streamed_too(tmp_path, name):
    path = in_format(name, tmp_path / f"rows.{name}")
    more = {"streaming": True, "eval_fraction": 0, "training.max_steps": 2, "max_length": 16}
    recipe = make_recipe({**tiny_values(tmp_path, "base"), "data": str(path), **more})
    (tmp_path / "run").mkdir()
    rows = recipe_rows(recipe, tiny_tokenizer(), tmp_path / "run")
    streamed = {tuple(row["input_ids"]) for row, _ in zip(rows.train, range(200), strict=False)}
    at_once = load_data(str(path), "train", tiny_tokenizer(), 16, tmp_path / "cache")
    assert streamed == set(map(tuple, at_once["input_ids"])) and len(streamed) == len(ROWS)


def test_a_conversion_reads_rows_of_these_files(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    expected = list(read_rows(tmp_path / "model", in_format("jsonl", tmp_path / "rows.jsonl")))
    assert len(expected) == len(ROWS)
    assert list(read_rows(tmp_path / "model", in_format("csv", tmp_path / "rows.csv"))) == expected
    path = packed(in_format("json", tmp_path / "rows.json"), ".gz")
    assert list(read_rows(tmp_path / "model", path)) == expected
