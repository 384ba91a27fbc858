import gzip
import hashlib
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastsft.data import DataError, Sample, check_unique, file_digest, find_file, read_source

ROWS = [{"prompt": f"q{i}", "response": f"a{i}", "in_base": i % 2 == 0} for i in range(6)]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(text)
    else:
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("FASTSFT_DATA", raising=False)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_samples(tmp_path, name):
    samples = read_source("s", write(tmp_path / name, ROWS), ability="maths")
    assert [(s.prompt, s.response, s.source, s.ability) for s in samples] == [
        (row["prompt"], row["response"], "s", "maths") for row in ROWS
    ]
    assert samples == read_source("s", write(tmp_path / "same.jsonl", ROWS), ability="maths")


def test_parquet_of_conversations_is_read(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (sample,) = read_source("s", write(tmp_path / "a.parquet", [{"messages": turns}]))
    assert sample.messages == (("user", "hi"), ("assistant", "ho"))


def test_where_filters_before_limit_counts(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert [s.prompt for s in read_source("s", path, where={"in_base": False}, limit=2)] == ["q1", "q3"]
    assert [s.prompt for s in read_source("s", path, limit=4)] == ["q0", "q1", "q2", "q3"]


def test_blank_lines_and_a_byte_order_mark_do_not_count_as_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]) + "\n\n", encoding="utf-8")
    assert len(read_source("s", path)) == 2


def test_relative_path_is_looked_up_under_root_then_variable_then_here(tmp_path, monkeypatch):
    for number, folder in enumerate(["root", "variable", "here"]):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", ROWS[number : number + 1])
    monkeypatch.setenv("FASTSFT_DATA", str(tmp_path / "variable"))
    monkeypatch.chdir(tmp_path / "here")
    assert read_source("s", "a.jsonl", root=tmp_path / "root")[0].prompt == "q0"
    assert read_source("s", "a.jsonl")[0].prompt == "q1"
    monkeypatch.delenv("FASTSFT_DATA")
    assert read_source("s", "a.jsonl")[0].prompt == "q2"


def test_missing_file_names_every_place_and_the_nearest_name(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", ROWS)
    monkeypatch.setenv("FASTSFT_DATA", str(tmp_path / "variable"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        read_source("s", "trian.jsonl", root=tmp_path / "root")
    for part in ["trian.jsonl", str(tmp_path / "root" / "trian.jsonl"), str(tmp_path / "variable"), "FASTSFT_DATA"]:
        assert part in str(error.value)
    assert "nearest name is 'train.jsonl'" in str(error.value)


def test_folder_given_as_a_file_says_so(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"a folder: name one file in it, such as train.jsonl"):
        read_source("s", tmp_path)


def test_bad_row_carries_file_and_line_number(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS[0], {"prompt": "x"}])
    with pytest.raises(DataError, match=r'a\.jsonl, row 2: no field "response".*Rename or add'):
        read_source("s", path)


def test_line_that_is_not_json_carries_file_row_and_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n{"prompt": oops}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: not JSON .*column 12.*Mend or remove"):
        read_source("s", path)


def test_line_that_is_not_an_object_or_not_utf8_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"a\.jsonl, row 1: a row must be an object"):
        read_source("s", path)
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, row 1: not UTF-8.*save the file as UTF-8"):
        read_source("s", path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("harm", ["torn", "foreign"])
def test_damaged_compression_names_the_file(tmp_path, name, harm):
    path = write(
        tmp_path / name, [{"prompt": hashlib.sha256(b"%d" % i).hexdigest(), "response": "a"} for i in range(500)]
    )
    path.write_bytes(path.read_bytes()[:-40] if harm == "torn" else b"these are no compressed bytes at all")
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+: the compressed data breaks off or is damaged.*again"):
        read_source("s", path)


def test_damaged_parquet_names_the_file(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"a\.parquet: not a parquet file.*write it again"):
        read_source("s", tmp_path / "a.parquet")


def test_unknown_suffix_lists_the_known_ones(tmp_path):
    path = write(tmp_path / "a.json", ROWS)
    with pytest.raises(DataError, match=r"a\.json: source 's' must be one of \.jsonl.*got '\.json'.*convert"):
        read_source("s", path)


def test_same_id_twice_names_both_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**ROWS[0], "id": "x"}, ROWS[1], {**ROWS[2], "id": "x"}])
    with pytest.raises(DataError, match=r"a\.jsonl: rows 1 and 3 both have the id 'x'.*another id"):
        read_source("s", path)


def test_same_content_without_ids_names_both_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS[0], ROWS[1], ROWS[0]])
    with pytest.raises(DataError, match=r"a\.jsonl: rows 1 and 3 have the same content and no id.*remove one"):
        read_source("s", path)


def test_source_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl: source 's' has no rows: add rows"):
        read_source("s", write(tmp_path / "a.jsonl", []))
    with pytest.raises(DataError, match=r"none of its 6 rows has \{'in_base': 'no'\}; loosen `where`"):
        read_source("s", write(tmp_path / "b.jsonl", ROWS), where={"in_base": "no"})


def test_where_on_a_field_that_a_row_lacks_is_refused(tmp_path):
    with pytest.raises(DataError, match=r'a\.jsonl, row 1: no field "inbase".*nearest is "in_base"'):
        read_source("s", write(tmp_path / "a.jsonl", ROWS), where={"inbase": False})


@pytest.mark.parametrize("limit", [0, -1, 2.0, True])
def test_limit_must_be_a_positive_whole_number(tmp_path, limit):
    with pytest.raises(DataError, match=r"`limit` of source 's' must be a whole number.*got"):
        read_source("s", write(tmp_path / "a.jsonl", ROWS), limit=limit)


def test_unique_over_sources_names_both_sources():
    one, two = (Sample("x", name, (("user", "q"), ("assistant", "a"))) for name in ("alpha", "beta"))
    check_unique([one])
    with pytest.raises(DataError, match=r"id 'x' appears in source 'alpha' and in source 'beta'.*Drop one"):
        check_unique([one, two])


def test_digest_is_sha256_of_the_bytes(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert find_file("a.jsonl", tmp_path) == path


def test_hub_id_is_loaded_by_name_and_split(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(read_source("s", "org/name")) == 6
    assert len(read_source("s", "org/name:test[:10%]", limit=2)) == 2
    assert asked == [("org/name", "train"), ("org/name", "test[:10%]")]


def test_hub_id_that_cannot_be_loaded_keeps_the_cause_and_the_way_out(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"'s': org/name is no file here.*ConnectionError: no route.*jsonl file"):
        read_source("s", "org/name")


def test_hub_id_without_the_datasets_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"'s': org/name is no file.*pip install datasets"):
        read_source("s", "org/name")


def test_real_sources_read_and_have_unique_ids(real_data):
    rows = read_source("gsm8k", "maths/gsm8k/train.jsonl.gz", where={"in_base": False}, limit=50, root=real_data)
    more = read_source("wikisql", "code/wikisql/validation.jsonl.gz", limit=50, root=real_data)
    assert len(rows) == 50
    assert {row.ability for row in rows} == {"maths"}
    check_unique([*rows, *more])
