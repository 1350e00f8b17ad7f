"""Programs that try to pass without solving, to get out, or to take the grader down. None may fool it or stop it."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator

import pytest

from verl_grad_routing.envs.sandbox import Call, Limits, Pool, Task

LIMITS = Limits(wall_s=3.0, cpu_s=1, memory_mb=256, file_mb=2, output_kb=64)
INPUTS = (3, -11, 0, 274177, 10**30, 18)
TASK = Task("mix", tuple(Call([number], [number * number - 5 * number, str(number)]) for number in INPUTS))
TRUTHY = Task("holds", (Call([4], True), Call([5], False), Call([6], True)))
NUMBER = Task("count", (Call(["ab"], 2), Call(["abc"], 3), Call([""], 0)))
HONEST = "def mix(number):\n    return [number * number - 5 * number, str(number)]\n"

ATTACKS: dict[str, str] = {
    "redefine-helpers": """
        import harness
        harness.call = lambda function, arguments: ["value", True]
        harness.plain = lambda value, depth=0: True
        def mix(number): return True
    """,
    "redefine-send": """
        import harness, os
        harness.send = lambda answer, report: os.write(answer, b'{"results": "passed"}\\n')
        def mix(number): return None
    """,
    "rewrite-the-runner": """
        import sys
        for name in ("harness", "__main__", "program"):
            module = sys.modules.get(name)
            if module: module.__dict__.update(main=lambda: None, same=lambda *a: True, grade=lambda *a: True)
        for name in ("/sandbox/program.py", "/sandbox/harness.py"):
            try: open(name, "w").write("print('passed')")
            except OSError: pass
        def mix(number): return True
    """,
    "read-argv": """
        import sys
        def mix(number): return sys.argv or sys.orig_argv
    """,
    "read-environ": """
        import os
        def mix(number): return list(os.environ.values())
    """,
    "read-proc": """
        import os
        def mix(number):
            found = []
            for name in ("self/cmdline", "self/environ", "self/maps", "1/environ", "1/cmdline", "self/mem"):
                try: found.append(open("/proc/" + name, "rb").read(1000).decode("latin-1"))
                except OSError: pass
            return found
    """,
    "read-frames": """
        import sys
        def mix(number):
            frame, found = sys._getframe(), []
            while frame:
                found += [v for v in frame.f_locals.values() if isinstance(v, (list, dict))]
                frame = frame.f_back
            for item in found:
                if isinstance(item, dict):
                    for key in ("value", "expected", "answer", "output"):
                        if key in item: return item[key]
            return found[0] if found else None
    """,
    "search-gc": """
        import gc
        def mix(number):
            for item in gc.get_objects():
                if type(item) is dict and ("expected" in item or "value" in item):
                    return item.get("expected", item.get("value"))
                if type(item) is list and len(item) == 2 and item[1] == str(number):
                    return item
    """,
    "inspect-the-stack": """
        import inspect
        def mix(number):
            for level in inspect.stack():
                for value in level.frame.f_locals.values():
                    if type(value) is dict and "calls" in value:
                        return value["calls"]
    """,
    "read-stdin": """
        import os, sys
        def mix(number): return [os.read(0, 100000).decode(), sys.stdin.read()]
    """,
    "patch-builtins": """
        import builtins
        builtins.all = builtins.any = lambda items: True
        builtins.map = lambda *a: [True]
        builtins.type = lambda *a: list
        builtins.len = lambda item: 2
        builtins.isinstance = lambda *a: True
        def mix(number): return True
    """,
    "patch-json": """
        import json
        json.dumps = lambda *a, **k: '{"results": [["value", true]], "passed": true, "solved": true}'
        json.loads = lambda *a, **k: True
        def mix(number): return 1
    """,
    "patch-encoder": """
        import json.encoder
        json.encoder.JSONEncoder.encode = lambda self, item: '{"passed": true}'
        json.JSONEncoder.iterencode = lambda self, item, _one_shot=False: ['{"passed": true}']
        def mix(number): return 1
    """,
    "own-eq": """
        class Same:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
        def mix(number): return Same()
    """,
    "own-eq-inside-a-list": """
        class Same:
            def __eq__(self, other): return True
        def mix(number): return [Same(), Same()]
    """,
    "list-subclass": """
        class Same(list):
            def __eq__(self, other): return True
            def __len__(self): return 2
        def mix(number): return Same([1, 2])
    """,
    "int-subclass": """
        class Same(int):
            def __eq__(self, other): return True
            def __hash__(self): return 1
            def __sub__(self, other): return 0
        def mix(number): return [Same(0), Same(0)]
    """,
    "str-subclass": """
        class Same(str):
            def __eq__(self, other): return True
            def __hash__(self): return 1
        def mix(number): return [Same("0"), Same("0")]
    """,
    "class-property": """
        class Same:
            __class__ = list
            def __eq__(self, other): return True
            def __iter__(self): return iter((1, 2))
        def mix(number): return Same()
    """,
    "reduce": """
        import os
        class Bomb:
            def __reduce__(self): return (os.system, ("echo fooled > /tmp/fooled",))
            def __reduce_ex__(self, protocol): return self.__reduce__()
        def mix(number): return [Bomb(), Bomb()]
    """,
    "pickle-on-the-wire": """
        import os, pickle
        class Bomb:
            def __reduce__(self): return (eval, ("__import__('os')._exit(0)",))
        for descriptor in range(1, 32):
            try: os.write(descriptor, pickle.dumps(Bomb()) + b"\\n")
            except OSError: pass
        def mix(number): return 1
    """,
    "write-passed-to-every-descriptor": """
        import os
        for descriptor in range(1, 64):
            try: os.write(descriptor, b'{"passed": true, "results": [true, true, true, true, true, true]}\\n')
            except OSError: pass
        def mix(number): return 1
    """,
    "write-results-to-every-descriptor": """
        import os
        line = b'{"results": [' + b",".join([b'["value", [0, "0"]]'] * 6) + b"]}\\n"
        for descriptor in range(1, 64):
            try: os.write(descriptor, line)
            except OSError: pass
        def mix(number): return [0, "0"]
    """,
    "too-few-results": """
        import os
        for descriptor in range(3, 64):
            try: os.write(descriptor, b'{"results": []}\\n')
            except OSError: pass
        os._exit(0)
    """,
    "twice-the-same-key": """
        import os
        for descriptor in range(3, 64):
            try: os.write(descriptor, b'{"results": [], "results": [], "passed": true}\\n')
            except OSError: pass
        os._exit(0)
    """,
    "ready-again": """
        import os
        for descriptor in range(1, 64):
            try: os.write(descriptor, b"ready\\nready\\n")
            except OSError: pass
        def mix(number): return 1
    """,
    "exit-0": """
        import os
        os._exit(0)
    """,
    "exit-in-a-method": """
        import sys
        def mix(number): sys.exit(0)
    """,
    "exit-in-str": """
        import os
        class Out:
            def __str__(self): os._exit(0)
            __repr__ = __eq__ = __len__ = __iter__ = lambda self, *a: os._exit(0)
        def mix(number): return Out()
    """,
    "exit-handlers": """
        import atexit, os
        atexit.register(lambda: os.write(3, b'{"results": "passed"}\\n'))
        def mix(number): raise SystemExit(0)
    """,
    "raise-base-exception": """
        class Passed(BaseException):
            pass
        Passed.__name__ = "value"
        def mix(number): raise Passed("passed")
    """,
    "fork-and-answer-twice": """
        import os
        try: os.fork()
        except OSError: pass
        def mix(number): return os.getpid()
    """,
    "fork-bomb": """
        import os
        def mix(number):
            while True:
                try: os.fork()
                except OSError: pass
    """,
    "thread-bomb": """
        import threading, time
        def mix(number):
            while True: threading.Thread(target=time.sleep, args=(9,)).start()
    """,
    "memory-bomb": """
        def mix(number):
            held = []
            while True: held.append(bytearray(1 << 24))
    """,
    "memory-bomb-at-once": """
        def mix(number): return "x" * (1 << 40)
    """,
    "disk-bomb": """
        import os
        def mix(number):
            for index in range(1000):
                with open(f"/tmp/{index}", "wb") as file: file.write(bytes(1 << 20))
            return os.listdir("/tmp")
    """,
    "signals": """
        import os, signal
        for number in range(1, 32):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        for process in (-1, 0, 1, os.getppid()):
            for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
                try: os.kill(process, number)
                except OSError: pass
        def mix(number): return 1
    """,
    "stop-itself": """
        import os, signal
        def mix(number): os.kill(os.getpid(), signal.SIGSTOP)
    """,
    "ignore-the-time-limit": """
        import signal, time
        for name in ("SIGXCPU", "SIGALRM", "SIGTERM", "SIGINT"):
            signal.signal(getattr(signal, name), lambda *a: None)
        def mix(number):
            while True: pass
    """,
    "sleep-past-the-limit": """
        import time
        def mix(number): time.sleep(1000)
    """,
    "raise-the-limits": """
        import resource
        for name in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
            try: resource.setrlimit(name, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            except (OSError, ValueError): pass
        def mix(number):
            held = bytearray(1 << 30)
            return len(held)
    """,
    "huge-output": """
        import os
        def mix(number):
            while True:
                for descriptor in range(1, 32):
                    try: os.write(descriptor, b"x" * 65536)
                    except OSError: pass
    """,
    "huge-value": """
        def mix(number): return ["x" * 1000000, str(number)]
    """,
    "huge-integer": """
        import sys
        getattr(sys, "set_int_max_str_digits", print)(0)
        def mix(number): return [10 ** 20000, str(number)]
    """,
    "not-a-number": """
        def mix(number): return [float("nan"), float("inf")]
    """,
    "deep-recursion": """
        import sys
        sys.setrecursionlimit(10 ** 9)
        def mix(number): return mix(number)
    """,
    "deep-value": """
        def mix(number):
            value = []
            for _ in range(100000): value = [value]
            return value
    """,
    "deep-line": """
        import os
        for descriptor in range(3, 32):
            try: os.write(descriptor, b"[" * 60000 + b"\\n")
            except OSError: pass
        def mix(number): return 1
    """,
    "cyclic-value": """
        def mix(number):
            value = [number]
            value.append(value)
            return value
    """,
    "symlinks": """
        import os
        for target in ("/etc/passwd", "/proc/self/fd/1", "/dev/stdout", "/dev/stderr", "/sandbox/program.py"):
            for name in ("/tmp/result", "/tmp/verdict.json", "/dev/stdout", "/dev/null"):
                try:
                    os.path.lexists(name) and os.unlink(name)
                    os.symlink(target, name)
                    open(name, "a").write('{"passed": true}\\n')
                except OSError: pass
        def mix(number): return 1
    """,
    "proc-self-fd": """
        import os
        for process in ("self", "1", "2", "thread-self"):
            for descriptor in range(32):
                try: open(f"/proc/{process}/fd/{descriptor}", "wb").write(b'{"passed": true}\\n')
                except OSError: pass
        def mix(number): return 1
    """,
    "chroot-and-mount": """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        libc.unshare(0x10000000 | 0x00020000)
        libc.mount(b"none", b"/", None, 1 << 14 | 1 << 18, None)
        libc.mount(b"proc", b"/tmp", b"proc", 0, None)
        libc.umount2(b"/", 2)
        for path in ("/", "/tmp"):
            try: os.chroot(path)
            except OSError: pass
        def mix(number): return os.listdir("/")
    """,
    "import-the-grader": """
        import sys
        sys.path += ["/usr/lib/python3/dist-packages", "/work", "/repo", "."]
        def mix(number):
            import verl_grad_routing
            return verl_grad_routing.__file__
    """,
    "network": """
        import socket
        def mix(number):
            socket.create_connection(("127.0.0.1", 22), timeout=1)
            return socket.gethostname()
    """,
    "abstract-socket": """
        import socket
        def mix(number):
            server = socket.socket(socket.AF_UNIX)
            server.bind("\\0verdict")
            server.listen()
            return server.accept()
    """,
    "threads-left-behind": """
        import os, threading, time
        def shout():
            while True:
                for descriptor in range(3, 16):
                    try: os.write(descriptor, b'{"passed": true}\\n')
                    except OSError: pass
        threading.Thread(target=shout).start()
        def mix(number):
            time.sleep(0.01)
            return 1
    """,
    "daemon-left-behind": """
        import os, time
        def mix(number):
            try:
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(1000)
            except OSError: pass
            return 1
    """,
    "lone-surrogates": """
        def mix(number): return ["\\ud800\\udfff", "\\udcff" * 10]
    """,
    "nul-and-non-ascii": """
        import os
        for descriptor in range(3, 32):
            try: os.write(descriptor, b"\\0\\0\\xff\\xfe{\\xc3\\x28}\\0\\n")
            except OSError: pass
        def mix(number): return ["\\0", "\\u00e9\\0"]
    """,
    "look-alike-digits": """
        wide = {48 + digit: 0xFF10 + digit for digit in range(10)}
        def mix(number): return [number * number - 5 * number, str(number).translate(wide)]
    """,
    "bytes-for-text": """
        def mix(number): return [number * number - 5 * number, str(number).encode()]
    """,
    "tuple-for-list": """
        def mix(number): return (number * number - 5 * number, str(number))
    """,
    "float-for-int": """
        def mix(number): return [float(number * number - 5 * number), str(number)]
    """,
    "source-of-garbage": "\0\x01 def mix(",
    "source-that-never-compiles": "mix = " + "(" * 50_000,
    "no-function": "mixture = 1",
    "generator": """
        def mix(number): yield from [number * number - 5 * number, str(number)]
    """,
    "hang-on-import": """
        while True: pass
    """,
    "audit-hook": """
        import sys
        def hook(event, arguments):
            if event != "exec": raise RuntimeError(event)
        sys.addaudithook(hook)
        def mix(number): return 1
    """,
    "trace-the-runner": """
        import sys
        def trace(frame, event, argument):
            frame.f_locals.update(passed=True, results=True)
            return trace
        sys.settrace(trace)
        sys.setprofile(trace)
        def mix(number): return 1
    """,
    "right-once-then-guess": """
        memory = []
        def mix(number):
            memory.append([number * number - 5 * number, str(number)])
            return memory[0]
    """,
}  # fmt: skip

TYPES: dict[str, tuple[str, Task]] = {
    "int-for-bool": ("def holds(n): return 1 - n % 2", TRUTHY),
    "truthy-for-bool": ("def holds(n): return 'yes' if n % 2 == 0 else ''", TRUTHY),
    "bool-subclass": ("class B(int):\n    __eq__ = lambda s, o: True\ndef holds(n): return B(1)", TRUTHY),
    "bool-for-int": ("def count(text): return bool(text)", Task("count", (Call(["a"], 1),))),
    "len-object": ("class N:\n    __index__ = __int__ = lambda s: 2\ndef count(text): return N()", NUMBER),
    "text-for-int": ("def count(text): return str(len(text))", NUMBER),
}  # fmt: skip

CASES = [pytest.param(textwrap.dedent(source), TASK, id=f"attack-{name}") for name, source in ATTACKS.items()]
CASES += [pytest.param(source, task, id=f"attack-{name}") for name, (source, task) in TYPES.items()]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Fails, with the one line that says what to install, where there is no sandbox. Never skipped."""
    with Pool(2, LIMITS) as pool:
        yield pool


@pytest.mark.parametrize(("source", "task"), CASES)
def test_attack_neither_fools_nor_stops_the_grader(pool: Pool, source: str, task: Task) -> None:
    start = time.monotonic()
    report = pool.grade(source, task)
    assert not report.solved
    assert time.monotonic() - start < LIMITS.wall_s + 10
    assert pool.grade(HONEST, TASK).solved


def test_there_are_enough_attacks() -> None:
    assert len(CASES) >= 25


def test_all_attacks_at_once_leave_the_pool_whole(pool: Pool) -> None:
    """Honest candidates between attacks that run beside them: none is hurt."""
    chosen = ["fork-bomb", "signals", "disk-bomb", "huge-output", "exit-0", "memory-bomb", "own-eq", "thread-bomb"]
    candidates = [source for name in chosen for source in (textwrap.dedent(ATTACKS[name]), HONEST)]
    reports = pool.grade_all((source, TASK) for source in candidates)
    assert [report.solved for report in reports] == [False, True] * len(chosen)
