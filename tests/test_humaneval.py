"""HumanEval: how a program is put together, and that reference solutions pass in the sandbox."""
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import hub_mirror_dir
from nanochat.execution import execute_code
from tasks.humaneval import HumanEval, build_program
from tasks.registry import EVALS

ROOT = Path(__file__).resolve().parent.parent
PROMPT = '''from math import tau
import re

LIMIT = 10

def twice(x):
    return 2 * x

def full_turns(n):
    """Angle of n turns, at most LIMIT; r"\\d" is only text.
    >>> full_turns(0)
    0.0
    """
'''
BODY = "    return tau * min(n, LIMIT)\n"
FUNCTION = "def full_turns(n):\n" + BODY
TEST = "def check(candidate):\n    assert candidate(1) == tau and candidate(99) == 10 * tau\n    assert twice(2) == 4\n"
ROW = {"prompt": PROMPT, "canonical_solution": BODY, "test": TEST, "entry_point": "full_turns"}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        folder = Path(hub_mirror_dir("openai/openai_humaneval", None, "test"))
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([ROW]), folder / "part-0.parquet")
        assert EVALS["HumanEval"].is_local()
        yield EVALS["HumanEval"].make()


def test_conversation(task):
    assert isinstance(task, HumanEval) and task.eval_type == "generative"
    assert task[0] == {"messages": [{"role": "user", "content": PROMPT},
                                    {"role": "assistant", "content": PROMPT + "\n" + BODY}],
                       "entry_point": "full_turns", "test": TEST}


RIGHT = {
    "whole": PROMPT + BODY,
    "function alone, needs the prompt's imports and definitions": FUNCTION,
    "body alone": BODY,
    "body after an empty line": "\n" + BODY + "\n\n",
    "fenced": f"Here it is:\n```python\n{FUNCTION}```\nIt multiplies.",
    "fenced body": f"```\n{BODY}```",
    "fence closed on the last line of code": f"```python\n{FUNCTION.rstrip()}```",
    "fence never closed": f"```python\n{FUNCTION}",
    "fence opened on the first line of code": "```python full_turns = lambda n: tau * min(n, LIMIT)```",
    "fence with line ends of Windows": f"```python\n{FUNCTION}```".replace("\n", "\r\n"),
    "other tag": f"```py\n{FUNCTION}```",
    "own helper in place of the prompt's": f"def twice(x):\n    return x + x\n\n{FUNCTION}",
    "imports from the future": "from __future__ import annotations\nfrom __future__ import (division,\n  "
                               f"print_function)  # old\nimport os\n{FUNCTION}",
    "whole, with an import from the future": f"from __future__ import annotations\n{PROMPT}{BODY}",
    "from the future after other code": f"import os\nfrom __future__ import annotations\r\n{FUNCTION}",
    "assignment": "LIMIT: int = 5 + 5\nfull_turns = lambda n: tau * min(n, LIMIT)",
}
WRONG = {
    "nothing": "",
    "prose": "I do not know.",
    "wrong value": FUNCTION.replace("tau", "3"),
    "own constant in place of the prompt's": f"LIMIT = 11\n{FUNCTION}",
    "own helper that is wrong": f"def twice(x):\n    return 5\n\n{FUNCTION}",
    "leaves before the tests": FUNCTION + "import sys\nsys.exit(0)",
    "leaves in the tests": "def full_turns(n):\n    import os\n    os._exit(0)",
    "endless": "    while True: pass",
    "only the second block is right": f"```\n1\n```\n```\n{FUNCTION}```",
    "null bytes": "\0",
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_completions(task, name):
    assert task.evaluate(task[0], RIGHT[name])


@pytest.mark.parametrize("name", [name for name in WRONG if name != "endless"])
def test_wrong_completions(task, name):
    assert not task.evaluate(task[0], WRONG[name])


@pytest.mark.slow
def test_an_endless_completion_is_wrong(task):
    assert not task.evaluate(task[0], WRONG["endless"])


def solve(rows):
    """Results of the reference solutions in two forms: the whole function, and the body alone."""
    programs = []
    for row in rows:
        conversation = {"messages": [{"role": "user", "content": row["prompt"]}], **row}
        programs += [build_program(conversation, row["prompt"] + "\n" + row["canonical_solution"]),
                     build_program(conversation, row["canonical_solution"])]
    with ThreadPoolExecutor(4) as pool:
        return [result.success for result in pool.map(execute_code, programs)]


def test_solutions_of_the_embedded_data_pass():
    rows = json.loads((ROOT / "dev/tinyworld/humaneval.json").read_text("utf-8"))
    assert solve(rows) == [True] * 2 * len(rows) and len(rows) > 10


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("NANOCHAT_TEST_DATA"), reason="NANOCHAT_TEST_DATA names no folder with "
                    "humaneval/HumanEval.jsonl")
def test_all_canonical_solutions_pass():
    with open(os.path.join(os.environ["NANOCHAT_TEST_DATA"], "humaneval", "HumanEval.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert solve(rows) == [True] * 2 * 164
