"""Does a program that a model wrote do what the reference does? Both run in the sandbox, and must print the same."""

from __future__ import annotations

import ast
import doctest
import random
import textwrap
from collections.abc import Callable

from fastsft.data import Sample
from fastsft.evaluate._sandbox import NETWORK, Limits, run_program

COMPLETE = "Complete the following Python function.\n"
# appended to a program: each call by itself, so that one which fails, however it does, hides no other; what a call
# returns is told from what it prints
_CALLS = """
import sys
sys.displayhook = lambda value: print("returned", repr(value))
for call in {calls!r}:
    try:
        exec(compile(call, "<call>", "single"), globals())
    except Exception as error:
        print("raised", type(error).__name__)
"""


class Programs:
    """The checks that run code. `notes` gathers what must be said of the sandbox; seed: of the calls' arguments."""

    def __init__(self, seed: int = 0, limits: Limits | None = None) -> None:
        self.notes: set[str] = set()
        self.seed, self.limits = seed, limits

    def function(self, sample: Sample) -> Callable[[str], bool] | None:
        """The response is one function: is what it returns and prints the same for eight calls with whole numbers?

        Looks for a function of the reference's name. None where the reference is no such function, or every call of it
        fails.
        """
        tree = _parsed(sample.response.strip())
        if tree is None or len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
            return None
        calls = self._calls(tree.body[0])
        return self._like(sample.response, lambda answer: f"{answer.strip()}\n{_CALLS.format(calls=calls)}")

    def _calls(self, function: ast.FunctionDef) -> list[str]:
        generator = random.Random(f"calls {self.seed}")
        required = len(function.args.posonlyargs) + len(function.args.args) - len(function.args.defaults)
        drawn = [[generator.randint(-1000, 1000) for _ in range(required)] for _ in range(4)]
        drawn += [[value] * required for value in (0, 1, 7, -3)]
        return [f"{function.name}({', '.join(map(str, values))})" for values in drawn]

    def completion(self, sample: Sample) -> Callable[[str], bool] | None:
        """The response is a function's body, and the prompt holds its head and `>>>` examples: do they give the same?

        None where there are no examples, or the reference can't be run by itself (it needs a name from elsewhere).
        """
        if not sample.prompt.startswith(COMPLETE):
            return None
        head = sample.prompt.removeprefix(COMPLETE).strip("\n")
        calls = _examples(head)
        if not calls:
            return None

        def program(answer: str) -> str:
            body = textwrap.indent(textwrap.dedent(answer).strip("\n"), "    ")
            return f"{head}\n{body}\n{_CALLS.format(calls=calls)}"

        return self._like(sample.response, program)

    def printed(self, sample: Sample) -> Callable[[str], bool] | None:
        """The prompt is a program, and the response what it prints. None for any other sample."""
        tree = _parsed(sample.prompt)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)] if tree else []
        if not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
            return None
        wanted = self._run(sample.prompt)
        return None if wanted is None else lambda answer: answer.split() == wanted.split()

    def _like(self, reference: str, program: Callable[[str], str]) -> Callable[[str], bool] | None:
        wanted = self._run(program(reference))
        lines = (wanted or "").splitlines()
        if "raised NameError" in lines or all(line.startswith("raised ") for line in lines):
            return None
        # the reference itself need not run again
        return lambda answer: program(answer) == program(reference) or self._run(program(answer)) == wanted

    def _run(self, program: str) -> str | None:
        """What the program prints; None where it fails or goes beyond the limits."""
        found = run_program(program, self.limits)
        if found.network != NETWORK["isolated"]:
            self.notes.add(f"code ran, and {found.network}.")
        return found.output if found.ok else None


def _examples(head: str) -> list[str]:
    """The `>>>` calls in the docstring of the last function of `head`, which has no body yet."""
    tree = _parsed(f"{head}\n    pass")
    if tree is None or not tree.body or not isinstance(tree.body[-1], ast.FunctionDef):
        return []
    try:
        return [
            example.source for example in doctest.DocTestParser().get_examples(ast.get_docstring(tree.body[-1]) or "")
        ]
    except ValueError:  # examples that doctest can't read
        return []


def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # all that a text can do to the parser
        return None
