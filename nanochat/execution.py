"""
Running what a model wrote. Here: the calculator tool of the chat model.

    "12*3"  ->  36          "'strawberry'.count('r')"  ->  3          anything else  ->  None

The expression is parsed to a syntax tree and only the listed node types are evaluated: no `eval`, no names, no
signals, so it may be called from any thread. What it costs is bounded by the length of the expression alone, because
without a power operator a result has about as many digits as the expression that makes it.
"""
import ast
import math
import operator
import re

MAX_EXPRESSION_CHARS = 1000
MAX_RESULT_CHARS = 100 # the result is fed to the model token by token
PLAIN_ESCAPE = re.compile(r"""\\[\\'"abfnrtvxuUN]""")
ARITHMETIC_CHARS = frozenset("0123456789*+-/.() ")
BINARY_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
                    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}
UNARY_OPERATORS = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def _evaluate_arithmetic(node):
    """Value of a tree of numbers, + - * / // and signs; ValueError for any other node."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY_OPERATORS:
        return BINARY_OPERATORS[type(node.op)](_evaluate_arithmetic(node.left), _evaluate_arithmetic(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY_OPERATORS:
        return UNARY_OPERATORS[type(node.op)](_evaluate_arithmetic(node.operand))
    raise ValueError(f"not arithmetic: {ast.dump(node)}")


def _evaluate_count(node):
    """Value of 'text'.count('part'), both string literals; ValueError for anything else."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
                      args=[ast.Constant(value=str(part))], keywords=[]):
            return text.count(part)
    raise ValueError(f"not a count: {ast.dump(node)}")


def use_calculator(expr):
    """
    Evaluate one expression that the model wrote; returns an int, a float, or None for "no result".

    Arithmetic: numbers, + - * / // and parentheses, with Python's meaning; thousands commas are removed. Strings:
    'text'.count('part'), two string literals of Python, where a comma is a character like any other. Everything else
    gives None, and so do errors, results that are not finite, and results of more than MAX_RESULT_CHARS characters.
    """
    # Of escape sequences not the octal and the unknown ones: they would make the parser warn.
    if len(expr) > MAX_EXPRESSION_CHARS or "\\" in PLAIN_ESCAPE.sub("", expr):
        return None
    without_commas = expr.replace(",", "")
    is_arithmetic = ARITHMETIC_CHARS.issuperset(without_commas)
    try:
        if is_arithmetic:
            value = _evaluate_arithmetic(ast.parse(without_commas.strip(), mode="eval").body)
        else:
            value = _evaluate_count(ast.parse(expr.strip(), mode="eval").body)
    # SyntaxError and ValueError: no such expression. ArithmeticError: division by zero, float overflow. The last two:
    # hundreds of nested signs or parentheses.
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if len(str(value)) <= MAX_RESULT_CHARS and math.isfinite(value) else None
