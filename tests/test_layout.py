"""The house in order: who imports whom, what an import may do, and rules that every file keeps."""
import ast
import json
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nanochat", "tasks", "scripts")
MAY_IMPORT = {"nanochat": {"nanochat"}, "tasks": {"tasks", "nanochat"}, "scripts": {"tasks", "nanochat"}}
FLOORS = [ # of nanochat; imports at the top of a file point to a lower floor
    {"common"},
    {"optim", "flash_attention", "execution", "loss_eval"},
    {"gpt", "engine", "tokenizer", "dataset", "core_eval", "task_eval", "report"},
    {"checkpoint_manager", "chat", "dataloader", "hf_model", "training"},
    {"serving", "chat_training", "forecast", "preflight"},
]
HEAVY = {"pyarrow", "datasets", "transformers", "wandb", "pandas", "matplotlib", "tiktoken", "rustbpe", "tokenizers",
         "requests", "tqdm", "psutil", "kernels", "uvicorn", "fastapi", "prometheus_client"}
POSIX_ONLY = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))
SOURCES = sorted([*MODULES, *ROOT.glob("nanochat/*/*.py"), *ROOT.glob("dev/**/*.py"), *ROOT.glob("tests/*.py")])


def name_of(path):
    return str(path.relative_to(ROOT))


def imported(nodes):
    """Full names of the modules that these statements import; relative imports as an empty name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module if node.level == 0 else ""
            yield from (f"{base}.{alias.name}" if base in PACKAGES else base for alias in node.names)


def floor_of(module):
    parts = module.split(".")
    return next((i for i, names in enumerate(FLOORS) if parts[0] == "nanochat" and parts[1] in names), None)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    package, tree = path.parent.name, ast.parse(path.read_text("utf-8"))
    everywhere, at_top = list(imported(ast.walk(tree))), list(imported(tree.body))
    assert "" not in everywhere, "relative imports hide where things come from"
    ours = {name for name in everywhere if name.split(".")[0] in PACKAGES}
    wrong = [name for name in ours if name.split(".")[0] not in MAY_IMPORT[package]]
    assert not wrong, f"{package}/ must not import {wrong}"
    assert not [name for name in everywhere if name.split(".")[0] in ("dev", "tests")]
    assert not POSIX_ONLY & {name.split(".")[0] for name in at_top}, "must import on Windows and macOS too"
    if package == "tasks":
        allowed = ("nanochat.common", "nanochat.execution")
        assert not [name for name in everywhere if name.startswith("nanochat") and not name.startswith(allowed)]
    if package == "nanochat" and path.stem != "__init__":
        own = floor_of(f"nanochat.{path.stem}")
        assert own is not None, "a new module needs its floor in FLOORS"
        assert not [name for name in at_top if name.startswith("nanochat") and floor_of(name) >= own]
        outside = {name.split(".")[0] for name in at_top} - sys.stdlib_module_names - {"nanochat", "torch", "numpy"}
        assert not outside, f"import {outside} inside the functions that need it"


PROBE = """
import importlib, json, logging, os, socket, sys
import torch
def refuse(*args, **kwargs):
    raise RuntimeError("an import must not touch the network")
socket.socket.connect = socket.getaddrinfo = refuse
before, handlers = set(sys.modules), len(logging.getLogger().handlers)
for name in sys.argv[1:]:
    importlib.import_module(name)
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"new": sorted(new), "handlers": len(logging.getLogger().handlers) - handlers, "files": os.listdir()}))
"""


def probe(tmp_path, *modules):
    """Import modules in a process of its own, in an empty folder, with a base directory that does not exist."""
    homes = {"NANOCHAT_BASE_DIR": str(tmp_path / "base"), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "here"
    folder.mkdir()
    done = subprocess.run([sys.executable, "-c", PROBE, *modules], cwd=folder, env=os.environ | homes,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1, f"an import printed: {lines[:-1]}"
    return json.loads(lines[0])


def test_importing_does_nothing(tmp_path):
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if path.stem != "__init__"]
    seen = probe(tmp_path, *modules)
    assert not HEAVY & set(seen["new"]), "import these inside the functions that need them"
    assert seen["handlers"] == 0, "only entry points configure logging"
    assert seen["files"] == [] and sorted(os.listdir(tmp_path)) == ["here"], "an import made files"


def calls(tree):
    """(dotted name, keywords) of every call by a dotted name, e.g. ("torch.load", {"map_location"})."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_file_keeps_the_rules(path):
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    long_lines = [number for number, line in enumerate(text.splitlines(), start=1) if len(line) > 120]
    assert not long_lines, f"lines of more than 120 characters: {long_lines}"
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    assert not [handler.lineno for handler in handlers if handler.type is None], "bare except"
    for name, keywords in [] if path.parent.name == "tests" else calls(tree):
        assert name not in ("pickle.load", "pickle.loads", "eval", "exec", "os.system"), "it runs what others wrote"
        assert keywords.get("shell") != "True", "argument lists, no shell"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", "torch.load must be told weights_only=True"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_code_and_comments_are_ascii(path):
    """Strings may hold data in any language."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    words = [token for token in tokens if token.type in (tokenize.NAME, tokenize.COMMENT)]
    odd = [token.start[0] for token in words if not token.string.isascii()]
    assert not odd, f"lines that are not ASCII: {odd}"


def requirement_name(text):
    return re.match(r"[\w.-]+", text)[0].lower().replace("_", "-")


def test_the_lock_pins_what_the_project_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["plots"], *extras["hf"], *extras["dev"]]
    declared = {requirement_name(item) for item in wanted}
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    pinned = {requirement_name(line) for line in lock.splitlines() if "==" in line}
    assert declared <= pinned, f"write requirements.lock anew: it lacks {declared - pinned}"
    assert not {name for name in pinned if name.startswith(("torch", "nvidia", "triton"))}, "setup.sh chooses these"
    assert "://" not in lock, "names no package index"
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=\S)", lock.strip()) if not entry.startswith("#"))
    assert extras["torch"] == ["torch==2.13.0"]
