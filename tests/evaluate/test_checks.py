"""Checks of answers: numbers by value, code by what it does, formats by their wording, and which check is chosen."""

from fractions import Fraction

import pytest

from fastsft.data import DataError, Sample, answer_of, make_world, read_source
from fastsft.evaluate._programs import COMPLETE
from fastsft.evaluate.checks import FORMATS, Checker, final_answer, formats_of


def sample(prompt, response):
    return Sample("one", "source", (("user", prompt), ("assistant", response)))


def chosen(prompt, response):
    return Checker().choose(sample(prompt, response))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The total is 50+20 = 70.\n#### 700", 700),
        ("#### 1,234.50", Fraction("1234.5")),
        ("#### $3.50", Fraction(7, 2)),
        ("#### -$3", -3),
        ("#### 18 apples", 18),
        ("#### 50%", 50),
        ("first #### 3, then\n#### 4\nand so on 9", 4),
        ("#### B", "b"),
        ("#### (B)", "b"),
        ("#### 3, 4", "3, 4"),
        (r"so \boxed{\frac{1}{2}} and 7", Fraction(1, 2)),
        (r"\boxed{\text{12 cm}}", 12),
        (r"\boxed{x = 2}", "x = 2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("42 + 5 = 47", 47),
        ("5-3", 3),
        ("minus \u22122.0", -2),
        ("-104/3", Fraction(-104, 3)),
        ("it is .5", Fraction(1, 2)),
        ("12,34", 34),
        ("1/0", "1/0"),
        ("None of these", None),
        ("", None),
        (r"\boxed{1", 1),
        ("9" * 300, "9" * 300),
    ],
)
def test_final_answers_are_read_by_value(text, value):
    assert final_answer(text) == value


@pytest.mark.parametrize(
    ("prompt", "response", "name", "right", "wrong"),
    [
        ("How many?", "7 * 2 = 14\n#### 14", "final", ["#### 14.0", "so 14", r"\boxed{14}"], ["#### 15", "", "#### 4"]),
        ("Sum?", "42 + 5 = 47", "final", ["47", "It is 47."], ["42 + 5 = 48", "none"]),
        ("Divide.", "62/3", "final", ["62/3", "124/6"], ["62", "3"]),
        ("List 5 days.", "3 6 9 12 15", "exact", ["3 6 9 12 15", " 3  6 9 12 15\n"], ["15", "3 6 9 12 16"]),
        ("Sort.", "4, 3, 2, -12", "exact", ["4, 3, 2, -12"], ["-12"]),
        ("SQL?", "SELECT A FROM T WHERE B = 5", "exact", ["SELECT A FROM T WHERE B = 5"], ["5"]),
        ("Prime?", "True", "exact", ["True"], ["true", "False"]),
        ("Name three pets.", "1. Owl\n2. Cat\n3. Rat", "list:3", ["a, b and c", "- a\n- b\n- c"], ["a, b", "- a\n- b"]),
        ("Name three pets.", "Owls, cats.", "exact", ["Owls, cats."], ["a, b, c"]),
        ("Answer in one word: sky?", "blue", "one_word", ["Green", "blue."], ["dark blue", ""]),
        ("Say it in at most ten words.", "Yes, by all means.", "words:10", ["no"], ["a " * 11, ""]),
        ("Give it as JSON.", '{"a": 1}', "json", ["[]", '```json\n{"b": 2}\n```'], ["{a: 1}", ""]),
        ("for i in range(3, 13, 3): print(i)", "3 6 9 12", "printed", ["3 6 9 12", "3\n6\n9\n12"], ["3 6 9", ""]),
    ],
)
def test_the_check_is_chosen_by_the_sample(prompt, response, name, right, wrong):
    check = chosen(prompt, response)
    assert check.name == name
    assert check.passes(response)
    assert [answer for answer in right if not check.passes(answer)] == []
    assert [answer for answer in wrong if check.passes(answer)] == []


def test_functions_are_judged_by_what_they_return():
    check = chosen("Code f to raise x by 3.", "def f(x): return x + 3")
    assert check.name == "function"
    for right in ("def f(y):\n    y += 3\n    return y", " def f(n): return 3 + n\n", "f = lambda a: a - -3"):
        assert check.passes(right)
    for wrong in (
        "def f(x): return x + 4",
        "def f(x): print(x + 3)",
        "def f(x): return str(x + 3)",
        "def g(x): return x + 3",
        "def f(x): return x + 3 if x < 9 else x",
        "def f(x):",
        "I can not do that.",
        "while True: pass",
        "",
    ):
        assert not check.passes(wrong)


def test_functions_of_several_arguments_and_those_that_fail_on_some():
    check = chosen("?", "def f(a, b, c=2): return a // b + c")
    assert check.name == "function"
    assert check.passes("def f(x, y):\n    return x // y + 2")
    assert not check.passes("def f(x, y):\n    return x // y + 2 if y else 0"), "it fails where the reference does"
    assert chosen("?", "def f(text): return text.upper()").name == "exact", "no number will do: it can't be judged so"


def test_completions_are_judged_by_the_examples_of_their_prompt():
    prompt = (
        COMPLETE
        + '\ndef double(x):\n    """Double it.\n\n    >>> double(3)\n    6\n    >>> double("ab")\n    \'abab\'\n    """'
    )
    check = chosen(prompt, "return 2 * x")
    assert check.name == "completion"
    assert check.passes("y = x + x\nreturn y")
    assert check.passes("    if True:\n        return x * 2")
    assert not check.passes("return 6")
    assert not check.passes("return x ** 2")
    assert not check.passes("")
    for reference in ("return helper(x)", "return 6 if x == 3 else helper(x)"):
        assert chosen(prompt, reference).name == "exact", "the reference needs a name from elsewhere"
    assert chosen(prompt.replace(">>>", "for example"), "return 2 * x").name == "exact"


def test_what_the_sandbox_could_not_do_is_noted(monkeypatch):
    from fastsft.evaluate import _sandbox

    inside = _sandbox._opening()
    checker = Checker()
    assert checker.choose(sample("print(3)", "3")).name == "printed"
    before = checker.notes
    monkeypatch.setattr(_sandbox, "_opening", lambda: inside.replace('"unshare", None)', '"unshare_", None)'))
    assert checker.choose(sample("print(4)", "4")).name == "printed"
    assert len(checker.notes) == 1
    assert "the kernel did not isolate the network" in checker.notes[0]
    assert before in ([], checker.notes)  # empty where this machine gives namespaces


def test_right_answers_of_the_world_pass_and_spoilt_ones_fail():
    world = make_world(seed=0, quick=True)
    checker = Checker()
    for ability, names in (
        ("maths", {"final", "exact"}),
        ("code", {"function", "printed"}),
        ("instructions", {"exact"}),
    ):
        checks = [(each, checker.choose(each)) for each in world.targets[ability][:12]]
        assert {check.name for _, check in checks} == names
        assert all(check.passes(answer_of(each)) for each, check in checks)
    harmful = set(world.planted.harmful)
    for name in ("shop_stories", "one_liners", "word_orders"):
        for spoilt in [each for each in world.sources[name] if each.id in harmful][:4]:
            right = Sample(spoilt.id, name, (("user", spoilt.prompt), ("assistant", answer_of(spoilt))))
            assert not checker.choose(right).passes(spoilt.response)


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("List 5 fruits, in lowercase.", ["list:5", "lower"]),
        ("Name two, in ALL CAPITAL LETTERS", ["list:2", "upper"]),
        ("Begin your answer with the word 'Well' and end with \"done\".", ["starts:Well", "ends:done"]),
        ("Tell it in two sentences, no more than 30 words.", ["words:30", "sentences:2"]),
        ("Return valid data as a JSON object.", ["json"]),
        ("Who was first in the list of words?", []),
    ],
)
def test_wordings_of_formats(prompt, names):
    assert formats_of(prompt) == names


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("upper", "WHY NOT 3", "Why NOT"),
        ("lower", "why not", "why Not"),
        ("starts:Well", "well, then", "Oh well"),
        ("ends:done", "It is Done.", "Done it is"),
        ("sentences:2", "One. Two!", "One. Two! Three?"),
        ("words:3", "one two three", "one two three four"),
        ("list:2", "a\nb", "a\nb\nc"),
    ],
)
def test_formats_by_name(name, right, wrong):
    check = Checker().named(name, sample("?", "anything"))
    assert name.split(":")[0] in FORMATS
    assert check.passes(f" {right}\n")
    assert not check.passes(wrong)


def test_checks_by_name_are_refused_where_they_cannot_judge():
    with pytest.raises(ValueError, match="there is no check 'fianl': name one of auto, exact, final"):
        Checker().named("fianl", sample("?", "4"))
    with pytest.raises(ValueError, match="the check 'final' can't judge sample 'one' of source 'source'"):
        Checker().named("final", sample("?", "no number"))
    with pytest.raises(ValueError, match="the check 'list' needs a whole number after a colon, as list:3: got 'many'"):
        Checker().named("list:many", sample("?", "a, b"))
    with pytest.raises(ValueError, match="the check 'ends' needs a text after a colon"):
        Checker().named("ends", sample("?", "a, b"))
    assert Checker().named("exact", sample("?", "4")).passes("4")


def test_real_samples():
    try:
        sums = read_source("gsm8k", "maths/gsm8k/test.jsonl.gz", limit=100)
        code = read_source("humaneval", "code/humaneval/test.jsonl.gz", limit=20)
    except DataError as error:
        pytest.skip(str(error))
    checker = Checker()
    assert {checker.choose(each).name for each in sums} == {"final"}
    assert all(isinstance(final_answer(each.response), Fraction) for each in sums)
    judged = [(each, checker.choose(each)) for each in code]
    by_running = [(each, check) for each, check in judged if check.name == "completion"]
    assert len(by_running) >= 5
    for each, check in by_running[:3]:
        assert check.passes(f"_unused = 0\n{each.response}")
        assert not check.passes("return None")
