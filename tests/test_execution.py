"""
The calculator: the table of what it computes, what it refuses, and that nothing makes it slow, loud or unsafe.
The sandbox: what its results say, a table of attacks, and what it says where the system lacks a protection.
"""
import contextlib
import multiprocessing
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from nanochat import execution
from nanochat.execution import (MAX_BYTES, MAX_EXPRESSION_CHARS, ExecutionResult, execute_code, sandbox_gaps,
                                use_calculator)

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
def test_costs_are_bounded(expr, expected, request):
    request.addfinalizer(lambda limit=sys.getrecursionlimit(): sys.setrecursionlimit(limit))
    sys.setrecursionlimit(1000) # Python's own, as torch's compiler raises it for the whole process
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

# -----------------------------------------------------------------------------
# The sandbox: results

def test_a_program_that_ends_is_a_success():
    result = execute_code("import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert repr(result) == r"ExecutionResult(success=True, stdout='out\n', stderr='err\n')"
    assert execute_code("") == ExecutionResult(True, "", "")


def test_surroundings_of_a_program(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    code = "import os, sys\nopen('a', 'w').write('b')\n" \
           "print(__name__, dict(os.environ), os.listdir('.'), 'torch' in sys.modules)"
    assert execute_code(code).stdout == "builtins {} ['a'] False\n"
    libraries = "import collections, datetime, decimal, hashlib, heapq, json, random, re, shutil, string, tempfile"
    assert execute_code(f"{libraries}\nprint(hashlib.md5(b'a').hexdigest(), '\\u20ac'.encode('cp1252'))").stdout == \
        "0cc175b9c0f1b6a831c399e269772661 b'\\x80'\n"
    assert execute_code("import os, builtins\nassert os.remove is os.getcwd is builtins.exit is None").success
    assert "ModuleNotFoundError" in execute_code("import psutil").error


def test_threads_run_and_need_not_end():
    code = "from threading import Thread\nThread(target=print, args=['in a thread']).start()\n" \
           "import time\ntime.sleep(0.1)\nThread(target=time.sleep, args=[60]).start()"
    assert repr(execute_code(code)) == r"ExecutionResult(success=True, stdout='in a thread\n')"


def test_output_of_a_failure_is_kept_with_its_traceback():
    result = execute_code("print('before')\ndef divide(n):\n    return n / 0\ndivide(1)")
    assert (result.success, result.stdout, result.error) == (False, "before\n", "ZeroDivisionError: division by zero")
    assert result.stderr.startswith("Traceback") and "line 3, in divide" in result.stderr
    assert "in run" not in result.stderr, "the driver is no part of it"


def test_memory_limits_mean_what_they_say():
    assert execute_code("x = bytes(150 * 1024**2)").success
    result = execute_code("x = bytes(150 * 1024**2)", maximum_memory_bytes=128 * 1024**2)
    assert result.memory_exceeded and not result.success
    assert result.error == "Memory limit exceeded: 134217728 bytes" and "MemoryError" in result.stderr
    assert execute_code("x = bytes(300 * 1024**2)", maximum_memory_bytes=None).success
    assert execute_code("", maximum_memory_bytes=1).error == "Memory limit exceeded: Python itself needs more"


def test_output_is_capped_not_punished():
    result = execute_code("print('x' * 3_000_000)")
    assert result.success and result.stdout == "x" * MAX_BYTES


def test_code_of_any_size_and_kind_is_taken():
    assert execute_code("x = 1\n" * 20_000, timeout=30).success
    assert execute_code("\ud800").error.startswith("UnicodeEncodeError: ")
    assert "null byte" in execute_code("x = '\0'").error
    assert execute_code("def f(:").error.startswith("SyntaxError: ")


def test_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors = len(os.listdir("/dev/fd"))
    deep = LIBC + "print(sum(libc.mkdir(b'd', 0o700) or libc.chdir(b'd') for _ in range(1500)))"
    assert execute_code(deep, timeout=20).stdout == "0\n"
    assert execute_code("while True: pass", timeout=0.2).timeout
    assert os.listdir(tmp_path) == [] and len(os.listdir("/dev/fd")) == descriptors
    assert multiprocessing.active_children() == []


def test_several_run_at_once():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(execute_code, [f"print({n})" for n in range(8)]))
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(8)]

# -----------------------------------------------------------------------------
# The sandbox: attacks and accidents. VICTIM is a file of the user, PORT a server of theirs.

LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
CHECK = "\nif result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))"
THROUGH_C = "PermissionError: .Errno (1|13)" # EPERM, EACCES

ATTACKS = { # name: (program, what the result shows)
    "fork bomb": ("import os\nwhile True: os.fork()", "TypeError"),
    "fork bomb, ctypes": (LIBC + "result = 0\nwhile result >= 0: result = libc.fork()" + CHECK, THROUGH_C),
    "fork bomb, clone3": (LIBC + "result = libc.syscall(435, bytes(88), 88)" + CHECK, "OSError: .Errno 38"),
    "fork bomb, subprocess": ("import subprocess\nwhile True: subprocess.Popen(['/bin/sleep', '9'])", THROUGH_C),
    "fork bomb, multiprocessing": ("import multiprocessing as m\nm.get_context('fork').Process().start()", "TypeError"),
    "spawn": ("import os\nos.posix_spawn('/bin/true', ['true'], {})", THROUGH_C),
    "another program": ("import os\nos.execv('/bin/true', ['true'])", THROUGH_C),
    "child that stays": (LIBC + "result = libc.fork()" + CHECK + "\nif result == 0: os.setsid()\nwhile True: pass",
                         THROUGH_C),
    "thread bomb": ("import time\nfrom threading import Thread\n"
                    "while True: Thread(target=time.sleep, args=[9]).start()", "RuntimeError: can't start new thread"),
    "memory bomb": ("x = [0]\nwhile True: x += x", "memory_exceeded=True, error='Memory limit exceeded"),
    "memory at once": ("x = 'x' * 10**12", "memory_exceeded=True, error='Memory limit exceeded"),
    "memory, mmap": ("import mmap\nx = [mmap.mmap(-1, 10**8) for _ in range(9)]", "OSError: .Errno 12"),
    "endless loop": ("while True: pass", "timeout=True, error='Execution timed out'"),
    "endless loop that catches": ("import time\nwhile True:\n try: time.sleep(9)\n except BaseException: pass",
                                  "timeout=True, error='Execution timed out .process killed"),
    "endless sleep": ("import time\ntime.sleep(99)", "timeout=True, error='Execution timed out'"),
    "endless, without timer": ("import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(99)",
                               "timeout=True, error='Execution timed out .process killed"),
    "endless output": ("while True: print('x' * 999)", "timeout=True"),
    "endless output, descriptors": ("import os\nwhile True: os.write(2, b'x' * 9999)", "timeout=True"),
    "deep recursion": ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
    "deeper recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
                         "timeout=True|memory_exceeded=True|signal 11|SystemError"), # by version and speed
    "standard input": ("input()", "OSError"),
    "standard input, descriptor": ("import os\nos.read(0, 1)", "OSError"),
    "delete": ("import os\nos.remove('VICTIM')", "TypeError"),
    "delete, pathlib": ("import pathlib\npathlib.Path('VICTIM').unlink()", "TypeError"),
    "delete, ctypes": (LIBC + "result = libc.unlink(b'VICTIM')" + CHECK, THROUGH_C),
    "delete a folder": ("import shutil, os\nshutil.rmtree(os.path.dirname('VICTIM'))", "PermissionError|TypeError"),
    "write": ("open('VICTIM', 'w')", THROUGH_C),
    "write, ctypes": (LIBC + "result = libc.open(b'VICTIM', os.O_WRONLY)" + CHECK, THROUGH_C),
    "write a new file": ("import os\nopen(os.path.dirname('VICTIM') + '/new', 'w')", THROUGH_C),
    "write to /tmp": ("open('/tmp/nanochat_attack', 'w')", THROUGH_C),
    "write in the folder above": ("open('../nanochat_attack', 'w')", THROUGH_C),
    "read": ("print(open('VICTIM').read())", THROUGH_C),
    "read, ctypes": (LIBC + "result = libc.open(b'VICTIM', 0)" + CHECK, THROUGH_C),
    "read by a link": ("import os\nos.symlink('VICTIM', 'link')\nopen('link')", THROUGH_C),
    "list a folder": ("import os\nos.listdir('/')", THROUGH_C),
    "environment of the parent": ("import os\nopen(f'/proc/{os.getppid()}/environ')", THROUGH_C),
    "rename, ctypes": (LIBC + "result = libc.rename(b'VICTIM', b'mine')" + CHECK, "PermissionError|OSError: .Errno 18"),
    "hard link": ("import os\nos.link('VICTIM', 'mine')", "PermissionError|OSError: .Errno 18"),
    "chmod, ctypes": (LIBC + "result = libc.chmod(b'VICTIM', 0)" + CHECK, THROUGH_C),
    "truncate, ctypes": (LIBC + "result = libc.truncate(b'VICTIM', 0)" + CHECK, THROUGH_C),
    "times of a file": ("import os\nos.utime('VICTIM', (0, 0))", THROUGH_C),
    "big file": ("f = open('big', 'wb')\nwhile True: f.write(bytes(2**16))", "OSError: .Errno 27"),
    "many open files": ("x = [open('a', 'w') for _ in range(999)]", "OSError: .Errno 24"),
    "socket": ("import socket\nsocket.create_connection(('127.0.0.1', PORT))", THROUGH_C),
    "socket, ctypes": (LIBC + "result = libc.socket(2, 1, 0)" + CHECK, THROUGH_C),
    "local socket": ("import socket\nsocket.socket(socket.AF_UNIX)", THROUGH_C),
    "download": ("from http.client import HTTPConnection\nHTTPConnection('127.0.0.1', PORT).connect()", THROUGH_C),
    "signal to the parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "TypeError"),
    "signal to the parent, ctypes": (LIBC + "result = libc.kill(os.getppid(), 9)" + CHECK, THROUGH_C),
    "signal to all, ctypes": (LIBC + "result = libc.kill(-1, 9)" + CHECK, THROUGH_C),
    "signal by pidfd": ("import os\nos.pidfd_open(os.getppid())", THROUGH_C),
    "priority of the parent": ("import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", THROUGH_C),
    "limits of the parent": (LIBC + "result = libc.prlimit(os.getppid(), 7, bytes(16), None)" + CHECK, THROUGH_C),
    "memory of the parent": (LIBC + "result = libc.ptrace(16, os.getppid(), 0, 0)" + CHECK, THROUGH_C),
    "shared memory": (LIBC + "result = libc.shmget(0, 4096, 0o1666)" + CHECK, THROUGH_C),
    "a new world": (LIBC + "result = libc.unshare(0x10000000)" + CHECK, THROUGH_C),
    "root again": ("import os\nos.setresuid(0, 0, 0)", "PermissionError|OSError"),
    "exit": ("import sys\nsys.exit(0)", "error='SystemExit: 0'"),
    "exit by its name": ("exit()", "TypeError"),
    "exit at once": ("import os\nos._exit(0)", "Ended before the last line: exit code 0'"),
    "exit, ctypes": (LIBC + "libc._exit(0)", "Ended before the last line: exit code 0'"),
    "exit at once after a marker": ("import os\nfor fd in range(1, 64):\n try: os.write(fd, b'ok')\n"
                                    " except OSError: pass\nos._exit(0)", "Ended before the last line: exit code 0'"),
    "functions of the harness": (
        "import __main__, builtins, os, signal, sys\nfor name in ('run', 'open_report', 'check', 'protect'):\n"
        " setattr(__main__, name, lambda *args: b'ok')\nos.write = os._exit = print\nsys.excepthook = print\n"
        "builtins.exec = builtins.isinstance = builtins.type = lambda *args: b'ok'\n1 / 0", "Ended before|Zero"),
    "report with a made-up token": ("import __main__\n__main__.open_report()(b'ok')", "OSError"),
    "exception that lies": ("class Lie(Exception):\n def __bool__(self): return False\n"
                            " def with_traceback(self, tb): return None\n def __str__(self): return 'ok'\n"
                            "raise Lie", "error='Lie: ok'|Ended before"),
    "exception without text": ("class Bad(Exception):\n def __str__(self): 1 / 0\nraise Bad", "Ended before"),
    "exception of many words": ("raise ValueError('x' * 10**7)", "error='ValueError: xxx"),
    "search for the token": (
        "import gc, sys, re\nframe, seen = sys._getframe(), []\nwhile frame:\n"
        " seen += [*frame.f_locals.values(), *frame.f_globals.values()]\n frame = frame.f_back\n"
        "seen += gc.get_objects()\nfor x in list(seen): seen += gc.get_referents(x)\n"
        "assert [x for x in seen if type(x) is bytes and re.fullmatch(b'[0-9a-f]{32}', x)]", "AssertionError"),
    "output that is no UTF-8": ("import os\nos.write(1, b'a\\xff')", "success=True, stdout='a\ufffd'"),
    "closed descriptors": ("import os\nos.closerange(0, 64)\nwhile True: pass", "Ended before the last line: signal 9"),
    "huge integer": ("9 ** 9 ** 9", "timeout=True|memory_exceeded=True"),
    "huge integer as text": ("print(10 ** 5000)", "ValueError"),
    "null pointer": ("import ctypes\nctypes.string_at(0)", "Ended before the last line: signal 11"),
}


@pytest.fixture(scope="module")
def sandbox():
    """Harmless probes come before any attack: what must hold for these, or there are none."""
    if gaps := sandbox_gaps():
        pytest.skip("no attacks where protections are missing: " + "; ".join(gaps))
    probe = "pid = libc.fork()\nif pid == 0: libc._exit(0)\n" \
            "print(pid, libc.kill(os.getppid(), 0), libc.socket(2, 1, 0))"
    assert execute_code(LIBC + probe).stdout == "-1 -1 -1\n"
    assert execute_code("open('a', 'wb').truncate(2**30)").error.startswith("OSError: [Errno 27]")
    assert execute_code(LIBC + "print(libc.open(b'/etc/passwd', 0))").stdout == "-1\n"


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name, sandbox, tmp_path):
    victim, (code, shown) = tmp_path / "victim", ATTACKS[name]
    victim.write_text("victim")
    victim.chmod(0o666)
    before = victim.stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        code = code.replace("VICTIM", str(victim)).replace("PORT", str(server.getsockname()[1]))
        result = execute_code(code, timeout=0.5 if shown.startswith("timeout") else 20)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert re.search(shown, repr(result)) and result.success == shown.startswith("success")
    assert len(result.stdout) <= MAX_BYTES and len(result.stderr) <= MAX_BYTES
    after = victim.stat()
    assert victim.read_text() == "victim" and os.listdir(tmp_path) == ["victim"]
    assert (after.st_mode, after.st_mtime, after.st_nlink) == (before.st_mode, before.st_mtime, before.st_nlink)
    drivers = [each for each in psutil.process_iter(["cmdline"]) if execution.DRIVER in (each.info["cmdline"] or ())]
    assert psutil.wait_procs(drivers, timeout=60)[1] == [], "those of tests that run beside this one end, too"


@pytest.mark.parametrize("old, new, gap, code, shown", [
    ("444, None", "9999, None", "files: ", "open('/etc/shadow')", "PermissionError" if os.getuid() == 0 else ""),
    ("os.uname().machine", "'abacus'", "network and signals: ", LIBC + "result = libc.fork()" + CHECK, "Errno 11"),
    ("os.setgroups([])", "raise OSError", "user: ", LIBC + "result = libc.fork()" + CHECK, THROUGH_C),
])
def test_what_is_not_enforced_is_said_and_the_rest_holds(monkeypatch, old, new, gap, code, shown):
    if not sys.platform == "linux" or (gap == "user: " and os.getuid() != 0):
        pytest.skip("needs Linux, and for the change of user root")
    assert old in execution.DRIVER
    monkeypatch.setattr(execution, "DRIVER", execution.DRIVER.replace(old, new))
    gaps = sandbox_gaps.__wrapped__()
    assert len(gaps) == 1 + len(sandbox_gaps()) and any(text.startswith(gap) for text in gaps)
    assert re.search(shown, repr(execute_code(code))) and execute_code("print(1)").success


def test_a_driver_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(execution, "DRIVER", "raise SystemExit('no ctypes')")
    assert execute_code("").error == "The sandbox did not start: exit code 1"
    assert sandbox_gaps.__wrapped__() == ["programs: the sandbox does not start, no ctypes\n"]


def test_an_ordinary_user_has_the_same_sandbox(sandbox):
    program = LIBC + "print(os.getuid(), libc.fork(), libc.socket(2, 1, 0), libc.open(b'/etc/passwd', 0))"
    source = f"{Path(execution.__file__).read_text()}\nprint(sandbox_gaps(), execute_code({program!r}).stdout)"
    as_user = {"user": 1234, "group": 1234, "extra_groups": []} if os.getuid() == 0 else {}
    for python in (sys.executable, "/usr/bin/python3"): # the first may lie where only root can reach it
        with contextlib.suppress(OSError):
            done = subprocess.run([python, "-I", "-"], input=source, capture_output=True, text=True, cwd="/", **as_user)
            assert done.stdout == f"[] {1234 if as_user else os.getuid()} -1 -1 -1\n\n", done.stderr
            return
    pytest.skip("no Python that an ordinary user can start")
