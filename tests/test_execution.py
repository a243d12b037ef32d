"""The calculator: the table of what it computes, what it refuses, and that nothing makes it slow, loud or unsafe."""
import random
import threading
import time
import warnings

import pytest

from nanochat.execution import MAX_EXPRESSION_CHARS, use_calculator

RESULTS = {
    "1,000*2": 2000, "7//2": 3, "10/3": 3.3333333333333335, "12.50+1": 13.5, "1.0*3": 3.0, "-7//2": -4, "+-3": -3,
    "2*(3+4)": 14, " 1 + 1 ": 2, ".5+1.": 1.5, "0": 0, "1,234,567+1": 1234568, "6/3": 2.0, "1-1-1": -1,
    "'strawberry'.count('r')": 3, "'a,b,c'.count(',')": 2, "'direct'.count('d')": 1, "'important'.count('t')": 2,
    "'file'.count('f')": 1, "'opener'.count('e')": 2, "'a-b'.count('a')": 1, '"it\'s".count("\'")': 1,
    "'größe'.count('ö')": 1, "'日本日'.count('日')": 2, " 'banana' . count( 'an' ) ": 2,
    r"'it\'s, isn\'t it?'.count('\'')": 2, r"'C:\\temp\\new'.count('\\')": 2, r"'a\nb\tc\n'.count('\n')": 2,
    r"'\u00e9t\xe9'.count('é')": 2, r"'\\d'.count('d')": 1,
}
REFUSED = [
    "2**3", "9**9**9", "1/0", "1.0/0", "7//0", "007", "1 2", "3-", "5%2", "1e5", "", "   ", "()", "...", "(1)(2)",
    "1.2.3", "'a'.count('a') and 'zz'", "'a'.count('a') + 1", "'a'.upper()",
    "'a'.ljust(999999999).count('a')", "'a'*999999999",
    "'a'.count('a', 1)", "'a'.count(sub='a')", "'a'.count(b'a')", "b'a'.count(b'a')", "f'{1}'.count('1')", "abs(-1)",
    "__import__('os').system('true')", "x", "True", "1 if 1 else 2", "[1,2]", "'\\d'.count('d')", "1\n+1", "\0",
    r"'\\\d'.count('d')", r"'\0'.count('0')", r"'\x4'.count('4')", r"'a\'.count('a')", "1+\\\n1",
    "'\ud800'",     "lambda: 1", "1_000", "0x10", "1j", "'unclosed.count('a')",
]


@pytest.mark.parametrize("expr", RESULTS, ids=repr)
def test_results(expr):
    value = use_calculator(expr)
    assert value == RESULTS[expr] and type(value) is type(RESULTS[expr])


@pytest.mark.parametrize("expr", REFUSED, ids=ascii)
def test_refused(expr):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_calculator(expr) is None


def test_agrees_with_python_on_random_arithmetic():
    rng = random.Random(0)
    for _ in range(300):
        terms = [rng.choice(["", "-"]) + rng.choice(["7", "12", "0.5", "(3+4)", "100", "2."]) for _ in range(5)]
        expr = "".join(term + rng.choice([" + ", "-", "*", "/", "//"]) for term in terms) + "3"
        assert use_calculator(expr) == eval(expr) # noqa: S307 (our own text)


@pytest.mark.parametrize("expr, expected", [
    ("9" * 100, int("9" * 100)),        # a result of 100 characters is the longest
    ("9" * 101, None),
    ("9" * 5000, None),                 # beyond Python's own limit for integer literals
    ("*".join(["99999"] * 160), None),  # a product of 800 digits
    ("9" * 400 + ".0", None),           # infinity
    ("9" * 400 + "/" + "7", None),      # an integer too large for a float
    ("(" * 300 + "1" + ")" * 300, None),
    ("-" * 990 + "1", None),
    ("+".join(["1"] * 200), 200),
    ("'" + "a" * MAX_EXPRESSION_CHARS + "'.count('a')", None),
])
def test_costs_are_bounded(expr, expected):
    start = time.perf_counter()
    assert use_calculator(expr) == expected
    assert time.perf_counter() - start < 0.5


def test_works_in_any_thread():
    results = [None] * 8
    def work(i):
        results[i] = [use_calculator(f"{i}*{n}") for n in range(200)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[i * n for n in range(200)] for i in range(8)]
