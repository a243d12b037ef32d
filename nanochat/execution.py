"""
Running what a model wrote: Python programs in a sandbox, and the calculator tool of the chat model.

    program  ->  execute_code  ->  ExecutionResult(success=True, stdout="...")
    "12*3"  ->  use_calculator  ->  36          "'strawberry'.count('r')"  ->  3          anything else  ->  None

execute_code starts a fresh `python -I -S` (standard library only, empty environment) in a temporary folder, where
DRIVER puts up what the kernel offers; sandbox_gaps() says what this machine lacks:
- limits on memory, CPU time, file size, open files (the parent limits real time and output); for root, a new user id;
- Landlock: only the standard and shared libraries can be read, only the program's own folder changed;
- seccomp: no new process (so none stays behind), socket (so no asyncio), signal or other way to another process.
Not limited: the number of files while it runs, and of threads unless root starts it. No boundary: the names set to
None, for honest mistakes only, and the verdict. Success needs a random token that no name in the interpreter holds, so
early exits, fake markers and replaced functions fail, but a program written against this very driver could find it.

The calculator evaluates listed nodes of a syntax tree: no `eval`, no names, no signals, so it may be called from any
thread. What it costs is bounded by the length of the expression, because without powers a result is about as long.
"""
import ast
import contextlib
import functools
import math
import operator
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

MAX_EXPRESSION_CHARS = 1000
MAX_RESULT_CHARS = 100 # the result is fed to the model token by token
PLAIN_ESCAPE = re.compile(r"""\\[\\'"abfnrtvxuUN]""")
ARITHMETIC_CHARS = frozenset("0123456789*+-/.() ")
BINARY_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
                    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv}
UNARY_OPERATORS = {ast.UAdd: operator.pos, ast.USub: operator.neg}
MAX_BYTES = 1024**2 # of stdout, of stderr, and of a file that a program writes


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
# -----------------------------------------------------------------------------
# The sandbox. Its standard input: a token (32 bytes), then the program. Docstrings say what missing protections mean.

DRIVER = r'''
import builtins, encodings, os, sys
if os.path.isdir("/proc/self/fd"): # descriptors of the library: who leaves root may have no way to it
    sys.path[:] = [f"/proc/self/fd/{os.open(path, os.O_PATH)}" for path in sys.path if os.path.isdir(path)]
    encodings.__path__[:] = [path + "/encodings" for path in sys.path]
import ctypes, gc, resource, signal, struct
TIMEOUT, MEMORY, MAX_BYTES, RESULT_FD = float(sys.argv[1]), *map(int, sys.argv[2:]) # seconds; bytes, 0 = no limit
LIBC = ctypes.CDLL(None, use_errno=True)
# Seccomp's code of a machine, the number of clone, and what is forbidden (asm/unistd.h): fork, exec; sockets; signals;
# ptrace; kernel log; queues, semaphores, shared memory; keys; modes, owners, times, attributes and lengths of files;
# priorities, limits; mounts, namespaces, file handles, bpf, perf. Above 423 (io_uring, pidfd) all machines agree.
CALLS = {
    "x86_64": (0xC000003E, 56, """29-31 41-55 57-59 62-62 64-71 76-76 90-94 101-101 103-103 129-129 132-132 141-142
        144-144 165-166 188-190 197-200 203-203 234-235 240-246 248-251 256-256 260-261 268-268 272-272 279-280 288-288
        297-304 307-308 310-314 320-323"""),
    "aarch64": (0xC00000B7, 220, """5-7 14-16 30-30 39-41 45-45 52-55 88-88 97-97 116-119 122-122 129-131 138-138
        140-140 180-212 217-219 221-221 238-243 261-265 268-274 280-282"""),
}
NEW_CALLS = " 424-434 438-438 440-440 442-443 448-448 452-4294967295"
def check(value):
    if value < 0:
        raise OSError(ctypes.get_errno(), "not on this system")
    return value
def limit(name, value):
    kind = getattr(resource, "RLIMIT_" + name)
    resource.setrlimit(kind, (min(value, resource.getrlimit(kind)[1] % 2**64),) * 2) # a hard limit of -1 is none

def restrict_files(): # https://docs.kernel.org/userspace-api/landlock.html
    "files: no Landlock (Linux 5.13) here, so programs can read and change what their user can"
    check(LIBC.prctl(38, 1, 0, 0, 0)) # no_new_privs, without which neither Landlock nor seccomp takes rules
    version = check(LIBC.syscall(444, None, 0, 1))
    everything = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    inside = 3 if version >= 6 else 0 # signals and abstract sockets
    rules = check(LIBC.syscall(444, struct.pack("QQQ", everything, 0, inside), 24, 0))
    prefixes = (sys.base_prefix + "/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
    for path in filter(os.path.isdir, (".", *sys.path, *prefixes)):
        access = everything if path == "." else 4 | 8 # read files and folders
        check(LIBC.syscall(445, rules, 1, struct.pack("=Qi", access, os.open(path, os.O_PATH)), 0))
    check(LIBC.syscall(446, rules, 0))

def leave_root():
    "user: no change of user id here, so programs run as root"
    if os.geteuid() == 0:
        user = 61184 + os.getpid() % 4096 # of the ids that systemd gives to passing services
        os.chown(".", user, user)
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        limit("NPROC", 64) # threads count
        check(LIBC.prctl(4, 1, 0, 0, 0)) # dumpable: else /proc/self would be root's

def restrict_calls():
    "network and signals: no seccomp filter here, so programs can open connections and signal other processes"
    check(LIBC.prctl(1, 9, 0, 0, 0)) # killed when the parent dies
    code, clone, ranges = CALLS[os.uname().machine]
    allow, forbid, unknown = (6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x50001), (6, 0, 0, 0x50026) # EPERM, ENOSYS
    # Instruction, lines to skip if so, if not, operand. Load 0x20, = 0x15, >= 0x35, > 0x25, any bit of 0x45, return 6.
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, code), forbid] # 32-bit programs have other numbers
    lines += [(0x20, 0, 0, 0), (0x15, 0, 1, 435), unknown] # clone3, so that the C library takes clone: its flags show
    lines += [(0x15, 0, 4, clone), (0x20, 0, 0, 16), (0x45, 0, 1, 0x10000), allow, forbid] # whether it makes a thread
    for calls in (ranges + NEW_CALLS).split():
        first, last = map(int, calls.split("-"))
        lines += [(0x35, 0, 2, first), (0x25, 1, 0, last), forbid]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in [*lines, allow]))
    check(LIBC.prctl(22, 2, struct.pack("HP", len(lines) + 1, ctypes.addressof(text)), 0, 0))

def limit_memory():
    "memory: not limited on this system"
    check(-1 if sys.platform == "darwin" else 0)
    for name in ("AS", "DATA", "STACK") if MEMORY else ():
        limit(name, MEMORY)
        bytearray(1024**2) # a MemoryError comes here, before there is a program to blame

def protect(): # returns what is not possible here
    missing = []
    for name, value in (("CORE", 0), ("CPU", int(TIMEOUT) + 2), ("FSIZE", MAX_BYTES), ("NOFILE", 64)):
        limit(name, value)
    for step in (restrict_files, leave_root, limit_memory, restrict_calls):
        try:
            step()
        except (AttributeError, KeyError, OSError):
            missing.append(step.__doc__)
    if restrict_calls.__doc__ in missing:
        limit("NPROC", 1) # no new process and, on Linux, no thread
    for name in """kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate
                replace unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir""".split():
        setattr(os, name, None)
    os.environ.clear() # the interpreter sets a locale by itself
    builtins.exit = builtins.quit = builtins.help = None
    sys.modules.update(dict.fromkeys(("ipdb", "joblib", "resource", "psutil", "tkinter"))) # None: no import
    return "; ".join(missing)

def open_report():
    token, fd, write, leave, streams = os.read(0, 32), RESULT_FD, os.write, os._exit, (sys.stdout, sys.stderr)
    return lambda outcome: ([f.closed or f.flush() for f in streams], write(fd, token + outcome), leave(0))

def run(): # returns the outcome: ok, or timeout, memory or error and an error message
    source, stderr, show = sys.stdin.buffer.read(), sys.stderr, sys.__excepthook__
    set_timer, expired = signal.setitimer, []
    os.dup2(os.open(os.devnull, os.O_WRONLY), 0) # so that reading it is an OSError
    os.write(RESULT_FD, b"started ")
    try:
        os.write(RESULT_FD, protect().encode() + b"\n")
    except MemoryError:
        return b"memory Memory limit exceeded: Python itself needs more"
    def expire(*_):
        expired.append(True)
        raise BaseException("time limit")
    signal.signal(signal.SIGALRM, expire)
    try:
        gc.freeze() # hides the token from gc.get_objects
        set_timer(signal.ITIMER_REAL, TIMEOUT)
        exec(compile(source.decode("utf-8", "surrogatepass"), "<program>", "exec"), {})
        set_timer(0, 0)
        return b"timeout Execution timed out" if expired else b"ok"
    except BaseException as error: # its methods may be the program's: nothing here may lead to "ok"
        set_timer(0, 0)
        sys.stderr = stderr
        show(type(error), error.with_traceback(error.__traceback__.tb_next), None)
        text = f"error {type(error).__name__}: {error}"
        if isinstance(error, MemoryError):
            text = f"memory Memory limit exceeded: {str(error) or f'{MEMORY} bytes'}"
        return b"timeout Execution timed out" if expired else text[:10_000].encode("utf-8", "replace")

open_report()(run()) # meanwhile the report lies on the interpreter's stack, where no name leads to it
'''


@dataclass(repr=False)
class ExecutionResult:
    """What became of a program; `error` says why it was no success."""
    success: bool
    stdout: str
    stderr: str
    error: str | None = None
    timeout: bool = False
    memory_exceeded: bool = False

    def __repr__(self):
        parts = [f", {name}={value!r}" for name in ("timeout", "memory_exceeded", "error", "stdout", "stderr")
                 if (value := getattr(self, name))]
        return f"ExecutionResult(success={self.success}{''.join(parts)})"


def execute_code(code, timeout=5.0, maximum_memory_bytes=256 * 1024**2):
    """
    Run a Python program in the sandbox described above. Any thread may call it; POSIX only. Returns an ExecutionResult:
    a success when the program came to its own end, which leaving before (with whatever status) is not.

    timeout               seconds of real time; what does not stop then is killed a second later
    maximum_memory_bytes  of address space, with the interpreter's own; None = no limit
    """
    token = os.urandom(16).hex()
    stdout, stderr, result, timed_out, status = _run_driver(token + code, timeout, maximum_memory_bytes)
    _, is_end, outcome = result.rpartition(token)
    kind, _, error = outcome.partition(" ")
    if not is_end and result and timed_out:
        kind, error = "timeout", "Execution timed out (process killed)"
    elif not is_end:
        error = "Ended before the last line: " if result else "The sandbox did not start: "
        error += f"exit code {status}" if status >= 0 else f"signal {-status} ({signal.strsignal(-status)})"
    return ExecutionResult(kind == "ok", stdout, stderr, error or None, kind == "timeout", kind == "memory")


@functools.cache
def sandbox_gaps():
    """Sentences on what execute_code cannot enforce on this machine, found by starting it once; [] = none."""
    _, stderr, result, *_ = _run_driver("0" * 32, 5.0, None)
    started, is_up, _ = result.partition("\n")
    gaps = started.removeprefix("started ") if is_up else f"programs: the sandbox does not start, {stderr}"
    return [gap for gap in gaps.split("; ") if gap]


def _run_driver(stdin, timeout, maximum_memory_bytes):
    """(stdout, stderr, result, is its time up?, exit status) of a sandbox, of which nothing is left."""
    folder = tempfile.mkdtemp(prefix="nanochat_")
    result_fd, driver_fd = os.pipe()
    arguments = map(str, (timeout, maximum_memory_bytes or 0, MAX_BYTES, driver_fd))
    try:
        with subprocess.Popen([sys.executable, "-I", "-S", "-X", "utf8", "-c", DRIVER, *arguments], cwd=folder, env={},
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              pass_fds=[driver_fd], start_new_session=True) as process:
            os.close(driver_fd)
            try:
                with contextlib.suppress(BrokenPipeError), process.stdin: # it died: its status will tell
                    process.stdin.write(stdin.encode("utf-8", "surrogatepass"))
                captured, timed_out = _read_all([process.stdout.fileno(), process.stderr.fileno(), result_fd], timeout)
            finally: # on Ctrl-C too; it does not change the status of a process that has come to its end
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
        return *captured, timed_out, process.returncode
    finally:
        os.close(result_fd)
        subprocess.run(["rm", "-rf", folder], check=False) # however deep it is: shutil.rmtree recurses


def _read_all(fds, timeout):
    """([the first MAX_BYTES of each, as text], is time up?); time runs from the first bytes of the last descriptor."""
    captured, deadline = {fd: bytearray() for fd in fds}, time.monotonic() + 30 # until then; busy machines start slowly
    with selectors.DefaultSelector() as selector:
        for fd in fds:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map() and (remaining := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(remaining):
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fd)
                elif key.fd == fds[-1] and not captured[key.fd]:
                    deadline = time.monotonic() + timeout + 1 # a second for the driver's own timer
                captured[key.fd] += chunk[:MAX_BYTES - len(captured[key.fd])]
        return [text.decode("utf-8", "replace") for text in captured.values()], bool(selector.get_map())
