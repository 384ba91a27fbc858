import subprocess
import sys

import pytest

from fastsft.data import DataError, Sample, content_id

ROW = {"prompt": "2 + 2?", "response": "4"}
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
]


def read(row, **given):
    return Sample.from_row(row, **{"source": "s", "ability": None, "where": "mix.jsonl, row 7", **given})


def test_prompt_and_response_become_two_turns():
    sample = read(ROW)
    assert sample.messages == (("user", "2 + 2?"), ("assistant", "4"))
    assert (sample.prompt, sample.response, sample.source, sample.ability) == ("2 + 2?", "4", "s", None)


def test_messages_are_kept_and_the_prompt_shows_every_earlier_turn():
    sample = read({"messages": CHAT})
    assert sample.messages == (("system", "Be short."), ("user", "hi"), ("assistant", "hello"))
    assert sample.prompt == "system: Be short.\nuser: hi"
    assert sample.response == "hello"


def test_id_is_a_pinned_hash_of_the_content_alone():
    # Pinned: a change of this number orphans every influence table written before it.
    assert read(ROW).id == read(ROW, source="other", ability="maths").id == "738dd7385c309535"
    assert read(ROW).id == content_id((("user", "2 + 2?"), ("assistant", "4")))
    assert read({**ROW, "response": "5"}).id != read(ROW).id


def test_content_moved_between_turns_changes_the_id():
    assert content_id((("user", "ab"), ("assistant", "c"))) != content_id((("user", "a"), ("assistant", "bc")))


def test_given_id_wins_and_numbers_become_text():
    assert read({**ROW, "id": "x1"}).id == "x1"
    assert read({**ROW, "id": 12}).id == "12"


def test_ability_and_source_given_win_over_the_rows_own():
    row = {**ROW, "ability": "code", "source": "there"}
    assert read(row, source=None).source == "there"
    assert read(row).source == "s"
    assert read(row).ability == "code"
    assert read(row, ability="maths").ability == "maths"


def test_null_fields_count_as_absent():
    sample = read({"messages": None, "id": None, "ability": None, **ROW})
    assert sample.ability is None
    assert sample.id == read(ROW).id


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "respons": "b"}, ['no field "response"', 'nearest is "respons"', "Rename or add"]),
        ({"prompt": "a", "completion": "b"}, ['no field "response"', 'nearest is "completion"']),
        ({"question": "a", "answer": "b"}, ['no field "prompt"', 'nearest is "question"']),
        ({}, ['no field "prompt"', "there is nothing"]),
        ({"prompt": "a", "response": "  \n"}, ["response is empty", "drop the row"]),
        ({"prompt": "a", "response": 4}, ['"response" must be text', "int", "write it as a string"]),
        ({"prompt": [CHAT[1]], "response": "b"}, ['"prompt" must be text', "a list", '"messages"']),
        ({"messages": CHAT[:2]}, ['last message must be of role "assistant"', 'role "user"', "Drop the turns"]),
        ({"messages": []}, ['role "assistant"', "no message at all"]),
        ({"messages": "hi"}, ['"messages" must be a list', "text"]),
        ({"messages": ["hi"]}, ["message 1", "must be an object"]),
        ({"messages": [{"from": "user", "content": "x"}]}, ["message 1", 'no field "role"', 'nearest is "from"']),
        ({"messages": [{"role": "user", "content": ["x"]}]}, ["message 1", '"content" must be text']),
        ({"messages": CHAT, "response": "b"}, ["has both", "remove one"]),
        ({**ROW, "id": 1.5}, ['"id" must be a text or a whole number', "1.5", "leave the field out"]),
        ({**ROW, "id": ""}, ['"id" must be', "leave the field out"]),
        ({**ROW, "ability": 3}, ['"ability" must be text', "int"]),
        ([1, 2], ["must be an object", "a list"]),
    ],
)
def test_bad_row_is_refused_with_its_place_the_rule_and_the_way_out(row, says):
    with pytest.raises(DataError) as error:
        read(row)
    for part in ["mix.jsonl, row 7", *says]:
        assert part in str(error.value)


def test_row_without_any_source_is_refused():
    with pytest.raises(DataError, match=r"mix.jsonl, row 7: no source is given.*pass `source=`"):
        read(ROW, source=None)


def test_a_sample_built_by_hand_keeps_the_same_rule():
    with pytest.raises(DataError, match=r"sample 'a' of source 's'.*last message"):
        Sample("a", "s", (("user", "x"),))


def test_import_loads_neither_transformers_nor_datasets():
    code = "import sys, fastsft.data; print([m for m in ('transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_example_of_the_package_runs():
    import fastsft.data

    lines = fastsft.data.__doc__.split("\n\n")
    code = "\n".join(line.removeprefix("    ") for block in lines[1:] for line in block.splitlines())
    names: dict = {}
    exec(code, names)
    assert names["batch"]["input_ids"].shape[0] == 4
    assert sorted(index for line in names["bins"] for index in line) == list(range(len(names["rows"])))
