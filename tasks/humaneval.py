"""
HumanEval: complete a Python function from its signature and docstring; hidden tests decide.

Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (https://arxiv.org/abs/2107.03374).

    prompt, completion, tests  ->  one program  ->  nanochat.execution.execute_code  ->  right or wrong
"""
import ast
import re
import warnings

from nanochat.execution import execute_code
from tasks.common import Task, load_rows

# The first fenced block. The fence may stay open or close on a line of code; only Python's tag may stand before code.
FENCE = re.compile(r"```(?:[\w+-]*[ \t\r]*\n|py(?:thon)?3?[ \t]+)?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

FUTURE = re.compile(r"^from __future__ import [^\n(]*(?:\([^)]*\))?.*\n?", re.MULTILINE)


class HumanEval(Task):
    eval_type = "generative"

    def __init__(self, **slice_kwargs):
        super().__init__(**slice_kwargs)
        self.data = load_rows("openai/openai_humaneval", None, "test", "prompt", "canonical_solution", "entry_point",
                              "test")

    def num_examples(self):
        return len(self.data)

    def get_example(self, index):
        row = self.data[index]
        messages = [{"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": f"{row['prompt']}\n{row['canonical_solution']}"}]
        return {"messages": messages, "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation, completion):
        program = build_program(conversation, completion)
        return execute_code(program, timeout=5.0, maximum_memory_bytes=256 * 1024**2).success


def build_program(conversation, completion):
    """
    What the completion needs of the prompt, the completion's code, the tests and a call of them.

    A completion that defines the function needs the prompt's imports and those of its other definitions that it does
    not repeat. One that does not define it goes on where the prompt ends, so it keeps its indentation. Imports from
    __future__ come first, as Python demands.
    """
    prompt, entry_point = conversation["messages"][0]["content"], conversation["entry_point"]
    block = FENCE.search(completion)
    code = block[1] if block else completion
    if entry_point in (defined := {name for _, names in _statements(code) for name in names}):
        prompt = "\n".join(text for text, names in _statements(prompt) if not names & defined)
    program = f"{prompt}\n{code}\n\n{conversation['test']}\ncheck({entry_point})\n"
    return "".join(FUTURE.findall(program)) + FUTURE.sub("", program)


def _statements(code):
    """[(text, names that it defines, imports aside)] of the statements at top level; [] when it is no whole program."""
    try:
        with warnings.catch_warnings(action="ignore"): # of escape sequences: what models write is not for the console
            body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError): # also null bytes and very deep nesting
        return []
    return [(ast.unparse(node), _defined_names(node)) for node in body]


def _defined_names(node):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return set()
