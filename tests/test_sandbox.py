"""The sandbox's interface: verdicts, comparing, pool, command line, and what it leaves."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import descendants, helper_or_skip

import sandbox
from sandbox import Demands, Limits, Sandbox, canonical

ROOT = Path(__file__).parent.parent
ADD = "print(sum(map(int, input().split())))"
TESTS = [{"stdin": "3 4\n", "stdout": "7"}, {"stdin": "1 1\n", "stdout": "2"}]


# ---------------------------------------------------------------------------------------------
# Verdicts


def test_ok(box):
    result = box.run(ADD, "python", TESTS)
    assert result.passed and result.verdict == "ok"
    assert [test.verdict for test in result.tests] == ["ok", "ok"]
    assert result.level == box.level
    first = result.tests[0]
    assert first.stdout == "7\n" and first.exit_code == 0 and first.signal == ""
    assert 0 < first.wall < 10 and 0 < first.cpu < 10 and 1 << 20 < first.memory < 512 << 20


def test_verdict_is_that_of_the_first_failure(box):
    program = "n = int(input())\nif n == 2: raise ValueError('two')\nprint(n)"
    tests = [{"stdin": str(n), "stdout": str(n + (n == 3))} for n in (1, 2, 3, 4)]
    result = box.run(program, "python", tests)
    verdicts = [test.verdict for test in result.tests]
    assert verdicts == ["ok", "runtime_error", "wrong_answer", "ok"]
    assert result.verdict == "runtime_error" and not result.passed
    assert "ValueError: two" in result.tests[1].stderr and result.tests[1].exit_code == 1
    result = box.run(program, "python", tests, stop_at_failure=True)
    assert len(result.tests) == 2 and result.verdict == "runtime_error"


def test_signal_is_named(box):
    result = box.run("import os\nos.abort()", "python", TESTS)
    assert result.verdict == "runtime_error"
    assert result.tests[0].signal == "SIGABRT" and result.tests[0].exit_code is None
    result = box.run("import os\nos.kill(os.getpid(), 40)", "python", TESTS)
    assert result.tests[0].signal == "signal 40"


def test_compile_error_has_the_message(box):
    result = box.run("int main( {", "c", TESTS)
    assert result.verdict == "compile_error" and result.tests == ()
    assert "main.c:1" in result.compile.stderr


def test_no_tests_compiles_only(box):
    result = box.run("int main() {}", "c", [])
    assert result.verdict == "ok" and not result.passed
    assert box.run("int main( {}", "c", []).verdict == "compile_error"


def test_unknown_and_missing_languages(box):
    with pytest.raises(ValueError, match="unknown language 'klingon'; known: python"):
        box.run("", "klingon", TESTS)
    missing = [name for name in sandbox.LANGUAGES if name not in sandbox.installed()]
    if missing:
        result = box.run("", missing[0], TESTS)
        assert result.verdict == "no_toolchain" and not result.passed and "Debian" in result.message


def test_arguments(box):
    tests = [{"args": ["a b", "{box}", 3], "stdout": "['a b', '{box}', '3']"}]
    assert box.run("import sys\nprint(sys.argv[1:])", "python", tests).passed


def test_braces_in_programs_are_left_alone(box):
    assert box.run("print('{box} {} {{')", "python", [{"stdout": "{box} {} {{"}]).passed


def test_what_is_kept(box):
    result = box.run("print('x' * 9999)", "python", TESTS[:1], limits=Limits(keep=100))
    assert result.tests[0].stdout == "x" * 100


@pytest.mark.parametrize(
    ("language", "program", "names"),
    [
        ("java", "public class A { public static void main(String[] x) {} }", ("A.java", "A")),
        ("java", "import x; class B { void main() {} }", ("B.java", "B")),
        ("java", "class S { } public class Main { static void main( }", ("Main.java", "Main")),
        ("java", "class N {}\nclass P { class Q { } static void main(", ("P.java", "P")),
        ("java", 'class A { String s = "} class Z {"; } // class Y\n', ("A.java", "A")),
        ("java", "public final class F { } class G { void main(", ("F.java", "G")),
        ("java", "class M { void main() {} } class N { final static public void main(final String... a)", ("N.java", "N")),
        ("java", 'class T { String s = """\n { \\""" " """; char c = \'"\'; } public class U { static void main(', ("U.java", "U")),
        ("java", "package a.b;\npublic class C { void main(", ("C.java", "a.b.C")),
        ("java", "class A { static class B { public static void main(String[] a) {} } } class C { void main() {} }", ("C.java", "C")),
        ("java", "class A { static void main(String s) {} } class B { static void main(String a[]) {} }", ("B.java", "B")),
        ("java", "class A$1 { static void main(int k, String[] s) {} } class B$ { static void main(String[] s) {} }", ("B$.java", "B$")),
        ("java", "class A { void main(AppConfig c) {} } class B { public static void main(String[] s) {} }", ("B.java", "B")),
        ("java", "", ("Main.java", "Main")),
        ("scala", "class A { def main(a: Array[String]) = 1 }\nobject B { def main(k: Int) = 1 }\nobject C:\n  def main(a: Array[String]) =", ("main.scala", "C")),
        ("scala", 'class A\nobject S { val s = "}" }\nobject T extends App {', ("main.scala", "T")),
        ("scala", "package p\nobject S {}\nobject T { def main(a: Array[String]", ("main.scala", "p.T")),
        ("kotlin", "// package x\npackage demo.a\nfun main() {}", ("main.kt", "demo.a.MainKt")),
        ("kotlin", "fun main() {}", ("main.kt", "MainKt")),
        ("kotlin", "class A {}\n// fun main() {\nobject B { fun main() {} }", ("main.kt", "MainKt")),
        ("kotlin", "object B { @JvmStatic\n  fun main(a: Array<String>) {} }", ("main.kt", "B")),
        ("kotlin", "object B { @JvmStatic fun main(a: Array<String>) {} }\nfun main() {}", ("main.kt", "MainKt")),
        ("kotlin", ' @file:JvmName("Foo")\nfun main() {}', ("main.kt", "Foo")),
        ("ada", "with X;\nprocedure Add_Up is", ("add_up.adb", "")),
        ("python", "class A", ("main.py", "")),
    ],
)  # fmt: skip
def test_names(language, program, names):
    assert sandbox._source_name(sandbox.LANGUAGES[language], program) == names


def test_of_a_great_machine_programs_see_a_part():
    few = [set(sandbox._few(range(128))) for _ in range(200)]
    assert {len(part) for part in few} == {8} and len(set.union(*few)) == 128
    assert set(sandbox._few([3, 5])) == {3, 5}
    helper_or_skip("namespaces").close()
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(all_of_them)})
    try:
        with Sandbox(1, level="namespaces") as box:
            assert box.run("import os\nprint(os.cpu_count())", "python", [{"stdout": "1"}]).passed
    finally:
        os.sched_setaffinity(0, all_of_them)


def test_aliases():
    assert canonical("C++") == canonical(" cpp ") == "cpp"
    assert [canonical(name) for name in ("py", "js", "golang", "sh", "c#")] == [
        "python", "javascript", "go", "bash", "csharp"]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Comparing


LINES, TOKENS, NUMBERS, EXACT = ({"compare": name} for name in sandbox.COMPARISONS)


@pytest.mark.parametrize(
    ("record", "expected", "got", "right"),
    [
        ({}, "a\nb", "a\nb\n", True), ({}, "a\nb\n\n", "a  \nb\t\n", True), ({}, "a\r\nb", "a\nb", True), (LINES, "", "\n\n", True),
        ({}, "a b", "a  b", False), ({}, "a", " a", False), ({}, "a\n\nb", "a\nb", False), ({}, "a\nb", "a b", False), ({}, "a\nb", "b\na", False),
        ({}, "Yes", "yes", False), (LINES, "a", "", False), ({}, ["yes", "no"], "no\n", True), ({}, ["yes", "no"], "yes\nno\n", False),
        (TOKENS, "1 2\n3", "1\n2 3", True), (TOKENS, "1 2", "2 1", False), (TOKENS, "1.0", "1.00", False),
        (EXACT, "a\n", "a\n", True), (EXACT, "a\n", "a", False), (NUMBERS | {"tolerance": 0.01}, "100", "100.9", True),
        *((NUMBERS, *case, True) for case in (
            ("1.0 2", "1.0000000001\n2"), ("1000000", "1000000.5"), ("0", "1e-9"), ("1e400", "1e400"), ("nan", "nan"), ("inf", "inf"),
            ("x 1", "x 1.0"), ("1.", "1"), ("12345678901234567891", "12345678901234567892"),
        )),
        *((NUMBERS, *case, False) for case in (
            ("1", "1.1"), ("1", "nan"), ("nan", "1"), ("1", "1e400"), ("inf", "1e400"), ("inf", "-inf"), ("X 1", "x 1"), ("1 2", "1"),
            ("1", "1 2"), ("1_0", "10"), ("1", "\u0661"),  # a digit, but not one of ours
        )),
    ],
)  # fmt: skip
def test_comparing(record, expected, got, right):
    assert sandbox.demands(record).check({"stdout": expected}, got) is right


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"compare": "fuzzy"}, "field 'compare': give one of lines, tokens, numbers, exact"),
        ({"tolerance": "1"}, "field 'tolerance': give a number above 0"), ({"time_limit": 0}, "field 'time_limit': give seconds"),
        ({"memory_limit": float("nan")}, "field 'memory_limit': give MB"), ({"harness": "print"}, "field 'harness': give an object"),
        ({"harness": {"python": "«answer»"}}, "field 'harness.python': give a text with «answer» once and «word»"),
        ({"harness": {"python": "«answer»«answer»«word»"}}, "field 'harness.python'"), ({"harness": {"py": "«answer»«word»"}}, "field 'harness.py': name it python"),
    ],
)  # fmt: skip
def test_demands_that_are_none(record, message):
    with pytest.raises(ValueError, match=message):
        sandbox.demands(record)


def test_a_record_sets_the_limits_of_its_own_job(box, monkeypatch):
    tests, done = [{"stdout": "done"}], "print('done')"
    slow, large = f"import time; time.sleep(2); {done}", f"x = bytearray(200 << 20); {done}"
    few = {"memory_limit": 64}
    jobs = [(slow, {"time_limit": 1}), (slow, {}), (large, few), (large, {}), (done, few)]
    verdicts = [r.verdict for r in box.map([(program, "python", tests, record) for program, record in jobs])]
    assert verdicts == ["time_limit", "ok", "memory_limit", "ok", "ok"]
    monkeypatch.setattr(box._pool, "submit", lambda _, job: job)
    limits = box.submit(done, "python", tests, {"time_limit": 1, "memory_limit": 64.5}).limits
    assert (limits.wall, limits.cpu, limits.memory) == (1, 1, 65)


HARNESS = {
    "python": "import atexit\n«answer»\ntry:\n    assert f(2) == 4\nexcept ValueError:\n    raise SystemExit(0)\nprint('«word»')\n"
}
ANSWERS = {  # the third begins as the harness does
    **dict.fromkeys(("def f(x): return x * x", "print('noise', end='')\ndef f(x): return 4", "import atexit\ndef f(x): return 4"), "ok"),
    **dict.fromkeys(("def f(x): return 5", ""), "runtime_error"), "def f(x): raise ValueError": "wrong_answer",
    "def f(x): exit(0)": "wrong_answer", "import os\ndef f(x): os._exit(0)": "wrong_answer",
    "def f(x):\n    print('«word»')\n    exit(0)": "wrong_answer", "def f(x): return 4\natexit.register(print, 'more')": "wrong_answer",
}  # fmt: skip


def test_an_answer_passes_if_the_harness_comes_to_its_last_line(box):
    results = box.map([(answer, "python", [{"stdin": ""}], {"harness": HARNESS}) for answer in ANSWERS])
    assert [r.verdict for r in results] == list(ANSWERS.values())
    first, second = (box.run("def f(x): return 4", "python", [{}], {"harness": HARNESS}) for _ in range(2))
    assert first.tests[0].stdout != second.tests[0].stdout  # the word is drawn anew
    with pytest.raises(ValueError, match="no harness for perl; there are python"):
        box.run("", "perl", [{}], {"harness": HARNESS})


def test_a_harness_may_leave_the_comparison_to_the_caller(box):
    harness = {"python": "«answer»\nprint(f(int(input())))\nprint('«word»')\n"}
    tests = [{"stdin": "2", "stdout": "4"}, {"stdin": "3", "stdout": ["6", "9"]}]
    answers = ("def f(x): return x * x", "def f(x): return x + 2")
    assert [box.run(a, "python", tests, {"harness": harness}).verdict for a in answers] == ["ok", "wrong_answer"]


GO_HARNESS = (
    'package main\nimport "fmt"\n«answer»\nfunc main() { if f(4) != 2 { panic("no") }; fmt.Println("«word»") }\n'
)


def test_imports_of_go_are_gathered():
    text = sandbox._put('import "a(b"\nfunc f() {}', GO_HARNESS, "go", "w")
    assert text.count("import") == 1  # no name, and no pattern
    answer = 'package main\nimport (\n\t"math"\n\t"os" // unused\n\tm2 "math/rand/v2"\n)\nfunc f(x float64) float64 { return math.Sqrt(x) }'
    text = sandbox._put(answer, GO_HARNESS, "go", "w")
    assert text.startswith('package main\nimport "fmt"\nimport "math"\n') and text.count("import") == 2
    if "go" in sandbox.installed():
        with Sandbox(1) as box:
            assert box.run(answer, "go", [{}], {"harness": {"go": GO_HARNESS}}).passed


MANY = 100_000


@pytest.mark.parametrize(
    "judge",
    [
        lambda: Demands("numbers").check({"stdout": "1"}, "1" * MANY + "x"),
        lambda: sandbox._source_name(sandbox.LANGUAGES["scala"], "\n" * MANY)[0] == "?",
        lambda: sandbox._put("".join(f'import "a{i}"\n' for i in range(MANY)), GO_HARNESS, "go", "w") == "",
        *(
            lambda text=text: sandbox._source_name(sandbox.LANGUAGES["java"], text * MANY)[0] == "?"
            for text in ("/* ", "public ", '\\"', "\n", "'\\", 'r#"', "static ")
        ),
    ],
)
def test_what_a_program_writes_cannot_keep_the_caller_busy(judge):
    """In time that grows with the square these would take from many minutes to hours."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    try:
        assert not judge()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_lone_surrogates_end_no_batch(box):
    jobs = [("#\ud800", "python", [{"stdout": ""}]), ("print(1)", "python", [{"stdin": "\ud800", "stdout": "1"}])]
    bad, good = box.map(jobs)
    assert bad.verdict != "internal_error" and good.passed


def test_checker_sees_the_whole_output(box):
    seen = []
    checker = lambda test, stdout: seen.append((test["more"], len(stdout))) or True  # noqa: E731
    result = box.run("print('x' * 99_999)", "python", [{"more": 1}], checker=checker)
    assert result.passed and seen == [(1, 100_000)]


def test_a_checker_that_fails_is_the_callers_error(box):
    with pytest.raises(KeyError):
        box.run("print(1)", "python", [{"stdin": ""}])
    assert box.run(ADD, "python", TESTS).passed


# ---------------------------------------------------------------------------------------------
# Copies of an interpreter

# What a program in python can see of its interpreter and its process, and every way to end.
SURROUNDINGS = r"""
import os; end = os.open("/proc/self/fd/1", os.O_RDONLY); os.close(1); os.write(2, b"end of file: %r" % os.read(end, 9))
print(sorted(globals()), __name__, __file__, __doc__, __spec__, __loader__, __package__, __builtins__)
import sys; [print(n, v) for n, v in sorted(vars(sys).items()) if n != "modules" and not callable(v)]
import sys; print([*sys.modules], sys.path_importer_cache); import socket; print([*sys.modules], sys.path_importer_cache)
import sys; [print(s, s.buffer.raw, s.isatty(), s.seekable(), s.errors, s.line_buffering) for s in (sys.stdin, sys.stdout, sys.stderr)]
import os; print(os.getppid(), os.getsid(0) == os.getpid() == os.getpgrp(), os.getcwd(), os.environ, os.getresuid(), os.getgroups())
import os; print(os.umask(0), os.nice(0), os.times()[2:4], [fd for fd in range(300) if os.path.exists(f"/proc/self/fd/{fd}")])
import os; print(sorted(os.listdir("/proc"))[:2] == [str(os.getpid()), "acpi"], os.listdir("/tmp"), os.listdir("/box"))
print([open("/proc/self/" + n).read() for n in ("cmdline", "environ", "limits", "oom_score_adj", "comm", "uid_map")])
print([x for x in open("/proc/self/status") if x[:3] in ("Sig", "Shd", "Cap", "NoN", "Sec", "Thr", "TID", "Uid", "Gro")])
import signal; print([(s, signal.getsignal(s)) for s in range(1, 32)], signal.pthread_sigmask(0, []), signal.set_wakeup_fd(-1))
import resource as r; print([r.getrlimit(n) for n in range(16)], r.getrusage(r.RUSAGE_CHILDREN))
import ctypes; print([ctypes.CDLL(None).prctl(option, 0, 0, 0, 0) for option in (3, 7, 21, 23, 27, 39)])
import threading as t; print(t.active_count(), t.get_ident() == t.main_thread().ident, t.stack_size(), t._dangling.__len__())
import gc; print(gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), gc.callbacks, gc.garbage)
import traceback, sys; traceback.print_stack(); print(sys._getframe().f_back.f_globals is globals(), sys._getframe().f_back.f_back)
f = lambda n: f(n + 1)\nf(0)
n = [0]\ndef f(): n[0] += 1; f()\ntry: f()\nexcept RecursionError: print(n)
import sys; sys.setrecursionlimit(10**6); f = lambda n: n and 1 + f(n - 1); print(f(40_000))
print(input(), open(0).read()); input()
import sys, os; print([*sys.stdin], os.lseek(0, 0, 0), os.read(0, 3), os.fstat(0).st_size)
import sys; print(1, end=""); sys.exit(3)
exit("bye")
import os; print(1); os._exit(4)
import atexit; print(atexit._ncallbacks()); [atexit.register(print, n) for n in range(3)]; raise ValueError("é")
try: 1 / 0\nexcept ArithmeticError as e: raise KeyError("x") from e
def f(:
x = "\0"
import os, signal; os.kill(os.getpid(), signal.SIGINT); print(1)
import os; os.abort()
import os; os.close(1); print(1)
import sys; sys.stdout.close(); print(1)
import os; os.close(2); 1 / 0
import sys; sys.excepthook = lambda *a: print(a[0]); 1 / 0
class A: __del__ = lambda self: 1 / 0\na = A()
import threading, time; threading.Thread(target=lambda: time.sleep(9), daemon=True).start(); print(1)
import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print(2))).start(); print(1)
import threading; threading.Thread(target=lambda: 1 / 0, name="t").start()
from multiprocessing import get_context as c; __name__ == "__main__" and print([c(n).Pool(1).map(abs, [-1]) for n in ("fork", "spawn", "forkserver")])
import subprocess, sys; print(subprocess.run([sys.executable, "-c", "import os; print(os.listdir('/proc/self/fd'))"], capture_output=True))
import os, sys; "exec" in sys.argv or os.execv(sys.executable, [sys.executable, __file__, "exec"]); print(sys.argv, sys.orig_argv)
import runpy; x = __name__ != "__main__" or runpy.run_path(__file__)["x"]; print(x)
import inspect; f = lambda: 1; print(inspect.getsource(f))
import pickle; A = type("A", (), {}); print(pickle.loads(pickle.dumps(A)) is A)
import os; [os.fork() for _ in range(3)]; os.getpid() % 2 and os.kill(os.getppid(), 0)
import os; os.kill(-1, 9); print(1)
x = []\nwhile True: x.append(bytearray(1 << 20))
while True: print("x" * 999)
f = open("x", "wb")\nwhile True: f.write(bytes(1 << 20))
"""


def test_a_copy_of_an_interpreter_is_like_one_that_has_just_started():
    """Each program's verdict, end and output, but for addresses; the hash of a string tells that there were copies."""
    programs = [line.replace("\\n", "\n") for line in SURROUNDINGS.strip().split("\n")] + ["print(hash('x'))"] * 2
    jobs, seen = [(program, "python", [{"stdin": "a\nb", "stdout": ""}]) for program in programs], []
    with Sandbox(1, Limits(memory=128, files=8)) as box:
        if box.level != "namespaces":
            pytest.skip("copies need namespaces")
        for copied in (True, False):
            box.forkserver = copied  # in the same folders
            *tests, one, other = (result.tests[0] for result in box.map(jobs))
            assert (one.stdout == other.stdout) is copied
            seen.append([(t.verdict, t.message, t.exit_code, t.signal, t.stdout, t.stderr) for t in tests])
    for program, *both in zip(programs[:-2], *seen, strict=True):
        copy, fresh = ([re.sub("0x[0-9a-f]+", "0x", str(part)) for part in each] for each in both)
        assert copy == fresh, program
    assert len({each[0] for each in seen[0]}) >= 4  # wrong_answer, runtime_error, memory_limit, output_limit


# ---------------------------------------------------------------------------------------------
# The pool


def test_map_keeps_the_order(box):
    jobs = [(f"print({n})", "python", [{"stdout": str(n)}]) for n in range(30)]
    results = box.map(jobs, progress="programs")
    assert all(result.passed for result in results)
    assert [result.tests[0].stdout for result in results] == [f"{n}\n" for n in range(30)]


def test_submit_does_not_wait(box):
    start = time.monotonic()
    future = box.submit("import time\ntime.sleep(0.5)\nprint(7)", "python", [{"stdout": "7"}])
    assert time.monotonic() - start < 0.4 and not future.done()
    assert future.result().passed


def test_threads_may_share_a_sandbox(box):
    passed = []
    call = lambda: passed.append(box.run(ADD, "python", TESTS).passed)  # noqa: E731
    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passed == [True] * 8


@pytest.mark.parametrize("count", [1, 1 + sandbox._RETRIES])
def test_killed_helpers_are_replaced(count):
    with Sandbox(1) as box:
        for _ in range(count):
            helper = sandbox._Helper(box.level)
            os.killpg(helper.process.pid, signal.SIGKILL)
            box._idle.put(helper)
        assert box.run(ADD, "python", TESTS).passed


def test_directories_that_a_program_closed_are_open_to_the_next():
    close = "import os\nfor place in ('.', os.path.dirname(__file__)):\n    try: os.chmod(place, 0)\n    except OSError: pass"
    with Sandbox(1, level="landlock") as box:
        box.run(close, "python", [{"stdout": ""}])
        assert box.run("open('x', 'w')", "python", [{"stdout": ""}]).passed


def test_a_limit_that_cannot_be_set_is_an_error(box):
    result = box.run(ADD, "python", TESTS, limits=Limits(files=1 << 60))
    assert result.verdict == "internal_error" and not result.passed


def test_level_none_is_only_by_name_and_warns():
    with pytest.warns(UserWarning, match="own rights"), Sandbox(1, level="none") as box:
        result = box.run(ADD, "python", TESTS)
    assert result.passed and result.level == "none"
    with pytest.raises(ValueError, match="known: namespaces, landlock, none"):
        Sandbox(level="docker")
    assert sandbox.best_level() in ("namespaces", "landlock")


def test_caches_that_programs_could_not_see_are_refused(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/caches")
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME to a directory elsewhere"):
        Sandbox(level="namespaces")
    Sandbox(level="landlock").close()  # hides no directory of the host's


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_a_callers_umask_closes_nothing_to_programs(level):
    helper_or_skip(level).close()
    before = os.umask(0o077)
    try:
        with Sandbox(1, level=level) as box:
            add = '#include <stdio.h>\nint main() { int a, b; scanf("%d %d", &a, &b); printf("%d", a + b); }'
            for program, language in ((ADD, "python"), (add, "c")):
                result = box.run(program, language, TESTS)
                assert result.passed, result
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's programs are another user's")
def test_a_place_for_programs_that_is_closed_to_them_is_refused(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match=r"no confinement can be had.*landlock: .*Permission denied"):
        sandbox.best_level.__wrapped__()


def test_no_confinement_is_an_error(monkeypatch):
    def refuse(*_):
        raise sandbox._Refused("forbidden")

    monkeypatch.setattr(sandbox, "_Helper", refuse)
    with pytest.raises(OSError, match=r"namespaces: forbidden; landlock: forbidden.*level='none'"):
        sandbox.best_level.__wrapped__()


def test_four_times_more_workers_than_cores_give_no_false_time_limit():
    spin = "import time\nwhile time.process_time() < 0.25: pass\nprint(1)"
    limits = Limits(wall=0.6, cpu=2)
    with Sandbox(4 * (os.cpu_count() or 1), limits) as box:
        results = box.map([(spin, "python", [{"stdout": "1"}])] * (12 * (os.cpu_count() or 1)))
    assert {result.verdict for result in results} == {"ok"}


@pytest.mark.parametrize(
    ("before", "each", "after"),
    [("signal.signal(signal.SIGCHLD, signal.SIG_IGN)", 0.05, "time.sleep(0.06)"), ("", 0.006, "os.wait()")],
    ids=["nobody waits for", "live for less than a look"],
)
def test_time_of_children_is_counted(before, each, after):
    """Of those that a look saw or somebody waited for; with signals about them ignored, the kernel adds them to no account."""
    program = (
        f"import os, signal, time\n{before}\nwhile True:\n"
        f"    if os.fork() == 0:\n        while time.process_time() < {each}: pass\n        os._exit(0)\n    {after}"
    )
    with Sandbox(1, Limits(wall=8, cpu=1)) as box:
        result = box.run(program, "python", [{"stdout": ""}])
    assert (result.verdict, result.message) == ("time_limit", "1 s of processor time")


def _run_since(seconds: float) -> sandbox._Run:
    return sandbox._Run({"wall": 1.0}, time.monotonic() - seconds, 1, {}, None, "")


def test_a_program_kept_waiting_for_ever_is_ended(monkeypatch):
    """Its own children may be what keeps the processor busy."""
    monkeypatch.setattr(sandbox, "_schedule", lambda _: (1.0, 99.0, True))  # ran, waited, is ready
    assert _run_since(9.0).excused([1]) and not _run_since(12.0).excused([1])


def test_a_program_may_wait_for_its_runner(monkeypatch):
    """A full pipe is emptied only when that has a processor."""
    waited = {os.getpid(): 50.0, 1: 0.5}
    monkeypatch.setattr(sandbox, "_schedule", lambda pid: (1.0, waited[pid], False))
    run = _run_since(3.0)
    assert not run.excused([1])
    waited[os.getpid()] += 2
    assert run.excused([1])


def test_few_files_may_be_open(box):
    """They bound the memory that sockets hold, which nothing counts."""
    program = "import resource\nprint(resource.getrlimit(resource.RLIMIT_NOFILE))"
    assert box.run(program, "python", [{"stdout": "(256, 256)"}]).passed


# ---------------------------------------------------------------------------------------------
# Nothing is left


def _leftovers() -> dict:
    gc.collect()  # what tests before this one dropped
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": Path("/proc/self/mounts").read_text(),
        "homes": sorted(Path(sandbox.tempfile.gettempdir()).glob(f"parallel-sft-{os.getpid()}-*")),
        "threads": threading.active_count(),
    }


def test_closing_leaves_nothing():
    before = _leftovers()
    with Sandbox(3) as box:
        pids = []
        assert all(r.passed for r in box.map([(ADD, "python", TESTS)] * 9))
        while not box._idle.empty():
            pids.append(box._idle.get())
        for worker in pids:
            box._idle.put(worker)
    assert pids and not any(Path(f"/proc/{worker.process.pid}").exists() for worker in pids)
    assert _leftovers()["homes"] == before["homes"]
    after = _leftovers()
    assert after["descriptors"] == before["descriptors"] and after["mounts"] == before["mounts"]
    assert after["threads"] == before["threads"]


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_closing_ends_helpers_though_the_caller_has_forked(level, monkeypatch):
    monkeypatch.setattr(sandbox, "_GRACE", 5.0)
    worker = helper_or_skip(level)
    copy = os.dup(worker.sock.fileno())  # as a forked child would hold
    try:
        worker.close()
        assert worker.process.returncode == 0  # it ended by itself
    finally:
        os.close(copy)


def test_many_runs_leave_nothing():
    """The shorter form of `python tests/bench.py soak`."""
    with Sandbox(2) as box:
        kinds = [
            (ADD, "python", TESTS[:1]),
            ("read a b; echo $((a + b))", "bash", TESTS[:1]),
            ("{ print $1 + $2 }", "awk", TESTS[:1]),
            ("import os\nif os.fork(): print(7)", "python", TESTS[:1]),
        ]
        kinds = [kind for kind in kinds if kind[1] in sandbox.installed()]
        box.map(kinds * 2)
        before = _leftovers()
        results = box.map(kinds * 125)
        assert {result.verdict for result in results} == {"ok"}
        assert _leftovers() == before


TRAINER = """
import sys; sys.path.insert(0, {root!r})
import sandbox
with sandbox.Sandbox(2, level={level!r}) as box:
    print(box.map([("print(1)", "python", [{{"stdout": "1"}}])] * 4)[0].verdict, flush=True)
    print([worker.home for worker in [box._idle.get(), box._idle.get()] if not box._idle.put(worker)], flush=True)
    box.map([("import os, time\\nif os.fork(): os.setsid\\ntime.sleep({mark})", "python", [{{}}])] * 4)
"""


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_a_killed_trainer_leaves_nothing(level):
    helper_or_skip(level).close()
    mark = f"9{os.getpid()}.5"
    code = TRAINER.format(root=str(ROOT), level=level, mark=mark)
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "ok\n"
    homes = re.findall(r"'([^']+)'", trainer.stdout.readline())
    time.sleep(0.5)
    started = descendants(trainer.pid)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    assert len(started) >= 4 and homes  # two helpers and their runners
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert not any(Path(home).exists() for home in homes)


def test_the_caller_is_not_forked(monkeypatch):
    monkeypatch.setattr(os, "fork", None)
    with Sandbox(1) as box:
        assert box.run(ADD, "python", TESTS).passed


# ---------------------------------------------------------------------------------------------
# Command line


def _cli(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "sandbox.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_cli_languages():
    done = _cli("languages")
    assert done.returncode == 0
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert set(lines) == set(sandbox.LANGUAGES)
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))


def test_cli_run(tmp_path):
    (tmp_path / "tests.jsonl").write_text("\n".join(map(json.dumps, TESTS)))
    for program, code, verdict in ((ADD, 0, "ok"), ("print(8)", 1, "wrong_answer")):
        (tmp_path / "add.py").write_text(program)
        done = _cli("run", tmp_path / "add.py", "--tests", tmp_path / "tests.jsonl", "--wall", "5")
        assert (done.returncode, json.loads(done.stdout)["verdict"]) == (code, verdict), done
    done = _cli("run", tmp_path / "none.py", "--tests", tmp_path / "tests.jsonl")
    assert done.returncode == 2 and "none.py" in done.stderr and "Traceback" not in done.stderr


def test_cli_check(tmp_path):
    rows = [
        {"id": "a", "program": ADD, "language": "py", "tests": TESTS},
        {"id": "b", "program": "print(7)", "language": "python", "tests": TESTS},
        {"id": "c", "program": "", "language": "klingon", "tests": TESTS},
    ]
    file = tmp_path / "programs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows[:2])))
    done = _cli("check", file)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(a["id"], a["verdict"]) for a in answers] == [("a", "ok"), ("b", "wrong_answer")]
    assert done.returncode == 1 and "python" in done.stderr
    file.write_text("\n".join(map(json.dumps, rows)))
    done = _cli("check", file)
    assert done.returncode == 2 and f"{file}:3" in done.stderr and "klingon" in done.stderr
    tokens = {"program": "print(1, 2)", "language": "python", "tests": [{"stdout": ["3", "1\n2"]}], "compare": "tokens"}
    function = {"program": "def f(x): return 4", "language": "python", "harness": HARNESS}
    file.write_text(json.dumps(tokens) + "\n" + json.dumps(function))
    assert _cli("check", file).returncode == 0
    file.write_text(json.dumps(tokens | {"compare": "fuzzy"}))
    assert f"{file}:1: field 'compare'" in _cli("check", file).stderr


def test_cli_check_answers_at_once_and_can_be_interrupted(tmp_path):
    row = {"language": "python", "tests": [{"stdout": "1"}]}
    rows = [{**row, "program": "print(1)"}, *[{**row, "program": "import time; time.sleep(2)"}] * 50]
    (tmp_path / "programs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, str(ROOT / "sandbox.py"), "check", str(tmp_path / "programs.jsonl"), "--workers", "1"]
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a job in the background does not
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heed) as done:
        assert json.loads(done.stdout.readline())["verdict"] == "ok"
        done.send_signal(signal.SIGINT)
        _, errors = done.communicate(timeout=60)
    assert done.returncode == 130 and errors.endswith("sandbox.py: interrupted\n") and "Traceback" not in errors


def test_cli_toolchains(monkeypatch, capsys):
    """What is here is not named; where nothing is, everything is, libraries of tests included."""
    assert "g++" not in _cli("toolchains").stdout.split() or "cpp" not in sandbox.installed()
    monkeypatch.setattr(sandbox, "toolchain", lambda name: None)
    monkeypatch.setattr(sandbox.os.path, "exists", lambda path: False)
    monkeypatch.setattr(sys, "argv", ["sandbox.py", "toolchains"])
    assert sandbox._main() == 0
    assert {"nodejs", "g++", "node-lodash", "libdata-compare-perl", "lua-unit"} <= {*capsys.readouterr().out.split()}


PROGRAM = '{"program": "print(1)", "language": "python", "tests": %s}'


@pytest.mark.parametrize(
    ("arguments", "content", "complaint"),
    [
        *(("check FILE", content, complaint) for content, complaint in (
            ("not json", ":1: Expecting value"), (b"\xff", ":1: 'utf-8' codec can't decode"), ("[" * 200_000, ":1: "), ("\n", "no programs"),
            ("\n[1, 2]", ':2: give an object with texts "program" and "language"'),
            ('{"program": 5, "language": "c", "tests": []}', ':1: give an object with texts "program"'),
            ('{"program": "", "language": 7, "tests": []}', ':1: give an object with texts "program"'),
            ('{"program": "", "language": "c"}', ":1: field 'tests': give a list"), (PROGRAM % "[]", "give a list with at least one test"), (PROGRAM % '["x"]', ":1: field 'tests[0]': give {"),
            (PROGRAM % '[{"stdout": "1"}, {}]', ":1: field 'tests[1]': give {"), (PROGRAM % '[{"stdout": []}]', ":1: field 'tests[0]': give {"),
            (PROGRAM % '[{"stdout": "1", "stdin": null}]', ":1: field 'tests[0]': give {"),
            (PROGRAM % '[{"stdout": "1", "args": ["a\\u0000"]}]', "'tests[0].args': give a list of texts without NUL"),
        )),
        *((f"run FILE --tests FILE --wall {value}", "", f"invalid positive value: '{value}'") for value in ("1e10", "nan")),
        ("check FILE --workers 0", "", "invalid positive value: '0'"), ("run FILE --tests /none", "", "'/none'"),
        ("run FILE --tests FILE --language python", '{"stdout": 1}', ":1: field 'tests[0]': give {"),
        *((f"{command} klingon", "", "unknown language 'klingon'") for command in ("toolchains", "run FILE --tests FILE --language")),
    ],
)  # fmt: skip
def test_cli_says_what_is_wrong(tmp_path, arguments, content, complaint):
    file = tmp_path / "file"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = _cli(*arguments.replace("FILE", str(file)).split())
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sandbox.py") and complaint in last and "Traceback" not in done.stderr


def test_cli_reads_text_as_it_is(tmp_path):
    """Bytes that are no UTF-8 in a program, and in JSON a separator of lines that is none."""
    (tmp_path / "a.pl").write_bytes(b"print length('\xff\xfe')")
    (tmp_path / "tests.jsonl").write_text(json.dumps({"stdout": "2", "why": "a\u2028b"}, ensure_ascii=False))
    done = _cli("run", tmp_path / "a.pl", "--tests", tmp_path / "tests.jsonl")
    assert done.returncode == 0 or "no_toolchain" in done.stdout, done
