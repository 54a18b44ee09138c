"""Hostile programs and what must become of them, run by test_sandbox_hostile.py.

    python tests/sandbox_cases.py --level namespaces [--no-cgroups]     all cases, as JSON lines

This file needs nothing but the standard library, so that it can be run as another user.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import sandbox

ONE = [{"stdin": "", "stdout": "yes"}]
LIMITS = sandbox.Limits(wall=0.6, cpu=0.6, memory=128, output=2 << 20, files=16, compile_wall=5, compile_memory=512)


@dataclass(frozen=True)
class Case:
    """A program that answers "yes" if it was held back, and the verdicts that are right for it.
    In the text SECRET stands for a host file that any user may read and write."""

    name: str
    program: str
    verdicts: str = "ok"  # names separated by blanks
    language: str = "python"
    tests: list = field(default_factory=lambda: ONE)
    limits: sandbox.Limits = LIMITS


def refused(*lines: str, error: str = "OSError") -> str:
    """A program saying yes if each of its lines fails."""
    attempts = [f"try:\n    {line}\n    print('did', {line!r})\nexcept {error}: pass" for line in lines]
    return "\n".join(["import os, ctypes, socket, signal, mmap, sys", *attempts, "print('yes')"])


def system_call(name: str, *arguments: int) -> str:
    numbers = {**sandbox._REFUSED, "clone": sandbox._CLONE}[name]
    words = ", ".join(map(str, (numbers[sandbox._ARCH or 0], *arguments)))
    return f"assert ctypes.CDLL(None, use_errno=True).syscall({words}) < 0; raise OSError"


PROCESSES = [
    Case("fork bomb", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "time_limit memory_limit"),
    Case("fork bomb of sessions", "import os\nwhile True:\n    try: os.fork() or os.setsid()\n    except OSError: pass", "time_limit memory_limit"),
    Case("thread bomb", """
import threading, time, os
count = 0
try:
    while count < 1000:
        threading.Thread(target=time.sleep, args=(60,)).start()
        count += 1
except RuntimeError:
    print("yes" if count < 400 else count, flush=True)
os._exit(0)""", limits=sandbox.Limits(wall=10, cpu=10, memory=256)),
    Case("daemon holds the pipe", """
import os, time
print("yes", flush=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)"""),
    Case("SIGTERM ignored", "import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass", "time_limit"),
    Case("kills everything it can", """
import os, signal
for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGUSR1):
    for pid in (-1, os.getppid(), 1):
        try: os.kill(pid, number)
        except OSError: pass
print("yes")"""),
    Case("zombie flood", """
import os
for _ in range(40):
    if os.fork() == 0: os._exit(0)
print("yes")"""),
    Case("leaves children", """
import os, time
for _ in range(5):
    if os.fork() == 0: time.sleep(600)
print("yes")"""),
    Case("raises the limits of others", refused(
        "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "import resource; resource.prlimit(1, resource.RLIMIT_NOFILE, (1, 1))")),
    Case("slows others down", """
import os
before = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
os.setpriority(os.PRIO_USER, 0, 19)
os.sched_setaffinity(0, {max(before[1])})
print("yes" if os.getpriority(os.PRIO_PROCESS, 0) == before[0] else "slower")"""),
]  # fmt: skip

MEMORY = [
    Case("touch loop", "kept = []\nwhile True: kept.append(bytearray(b'x') * (4 << 20))", "memory_limit"),
    Case("one great block", "bytearray(b'x') * (64 << 30)", "memory_limit"),
    Case("fork and allocate", """
import os, time
for _ in range(10):
    if os.fork() == 0: break
kept = bytearray(b'x') * (40 << 20)
time.sleep(60)""", "memory_limit"),
    Case("under a name that is no text", """
import ctypes, time
ctypes.CDLL(None).prctl(15, b"\\xff\\xfe)", 0, 0, 0)
kept = bytearray(b"x") * (200 << 20)
time.sleep(5)""", "memory_limit"),
    Case("shared map", """
import mmap
kept = mmap.mmap(-1, 1 << 30)
for at in range(0, 1 << 30, 4096): kept[at] = 1""", "memory_limit"),
    Case("memfd and shared segments", refused(
        "os.memfd_create('x')", system_call("shmget", 0, 1 << 20, 0o1600), system_call("msgget", 0, 0o1600))),
    Case("fills the scratch directory", """
import os
try:
    for place in ("/tmp", "/dev/shm"):
        for index in range(20):
            with open(f"{place}/{index}", "wb") as file: file.write(b"x" * (4 << 20))
except OSError: print("yes")""", "ok output_limit"),
    Case("4 GB sparse map", """
import mmap
kept = mmap.mmap(-1, 4 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
kept[1 << 31] = 1
print("yes")"""),
    Case("deep recursion", "def f(n): return f(n + 1)\nf(0)", "runtime_error"),
    Case("deep recursion in C", "int f(int n) { volatile char a[99]; a[0] = n; return f(n + 1) + a[0]; }\nint main() { return f(0); }",
         "runtime_error memory_limit", "c"),
    Case("heap limit of the runtime", "const a = []; for (;;) a.push(new Array(1e5).fill(1.5))", "memory_limit", "javascript",
         limits=sandbox.Limits(wall=10, cpu=10, memory=128)),
]  # fmt: skip

TIME = [
    Case("spin", "while True: pass", "time_limit"),
    Case("sleep", "import time\ntime.sleep(60)", "time_limit"),
    Case("blocked read", "import os\nos.read(os.pipe()[0], 1)", "time_limit"),
    Case("stopped", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "time_limit"),
    Case("raises its own limits", """
import resource
for name in (resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE):
    try: resource.setrlimit(name, (-1, -1))
    except (OSError, ValueError): pass
    else: print("raised", name)
print("yes")"""),
    Case("many threads of work", "import os\nfor _ in range(3): os.fork()\nwhile True: pass", "time_limit"),
]  # fmt: skip

CAP = LIMITS.output
OUTPUT = [
    Case("flood on stdout", "while True: print('x' * 1000)", "output_limit"),
    Case("flood on stderr", "import sys\nwhile True: print('x' * 1000, file=sys.stderr)", "output_limit"),
    Case("flood on both", "import sys\nwhile True:\n    print('x' * 999)\n    print('x' * 999, file=sys.stderr)", "output_limit"),
    Case("exactly the cap", f"import sys\nsys.stdout.write('x' * {CAP})", tests=[{"stdin": "", "stdout": "x" * CAP}]),
    Case("one over the cap", f"import sys\nsys.stdout.write('x' * {CAP + 1})", "output_limit", tests=[{"stdin": "", "stdout": "x" * CAP}]),
    Case("stdout closed, then spin", "import os\nos.close(1)\nos.close(2)\nwhile True: pass", "time_limit"),
    Case("stdout closed, then done", "import os\nos.close(1)\nos.close(2)", "wrong_answer"),
    Case("bytes that are not UTF-8", "import sys\nsys.stdout.buffer.write(b'\\xff\\x00')", tests=[{"stdin": "", "stdout": "\ufffd\0"}]),
    Case("no final newline", "import sys\nsys.stdout.write('yes')"),
    Case("much on stderr", "import sys\nsys.stderr.write('x' * (1 << 20))\nprint('yes')"),
]  # fmt: skip

STDIN = [
    Case("never read", "print('yes')", tests=[{"stdin": "x" * 10_000_000, "stdout": "yes"}]),
    Case("closed early", "import os\nos.close(0)\nprint('yes')", tests=[{"stdin": "x" * 100_000, "stdout": "yes"}]),
    Case("more than a pipe holds", "print(len(input()))", tests=[{"stdin": "x" * 1_000_000, "stdout": "1000000"}]),
    Case("empty", "import sys\nprint(repr(sys.stdin.read()))", tests=[{"stdin": "", "stdout": "''"}]),
    Case("stdin can't be changed", refused("open('/dev/stdin', 'w').write('x')", "os.ftruncate(0, 5)"), tests=[{"stdin": "x", "stdout": "yes"}] * 2),
]  # fmt: skip

FILES = [
    Case("reads the host", refused(
        "open('/root/.bashrc')", "open('/etc/hostname')", "open('/etc/shadow')", "open('SECRET')",
        f"open({sandbox.__file__!r})", "os.listdir('/var/log')", "open('/proc/1/environ', 'rb').read()", "open('/proc/1/mem', 'rb')",
        "open('/proc/kcore', 'rb')", "os.listdir('/proc/1/root')", "os.listdir('/sys/fs')", "open('/dev/mem')")),
    Case("finds the expected output", """
import os, re
memory = open("/proc/self/mem", "rb")
for line in open("/proc/self/maps"):
    start, end = (int(word, 16) for word in line.split()[0].split("-"))
    try:
        memory.seek(start)
        if found := re.search(rb"zq-[a-z]+-zq", memory.read(end - start)): print(found[0].decode())
    except (OSError, OverflowError, ValueError): pass""", "wrong_answer", tests=[{"stdin": "", "stdout": "zq-expected-zq"}]),
    Case("writes to the host", refused(
        "open('/usr/escaped', 'w')", "open('/etc/escaped', 'w')", "open('SECRET', 'a').write('x')",
        "os.mkdir('/escaped')", "open('/bin/sh', 'a')", "os.symlink('/x', '/usr/escaped')",
        "os.rename('SECRET', 'SECRET2')", "os.unlink('SECRET')", "os.truncate('SECRET', 0)")),
    Case("changes a host file's attributes", refused(
        "os.chmod('SECRET', 0o777)", "os.setxattr('SECRET', 'user.a', b'')", "os.utime('SECRET')",
        "assert ctypes.CDLL(None).syscall(463, -100, b'SECRET', 0, b'user.a', (ctypes.c_long * 2)(), 16) < 0; raise OSError")),
    Case("changes its own program", refused(
        "open(__file__, 'a')", "os.rename(__file__, __file__ + '2')", "os.unlink(__file__)",
        "os.symlink('/etc/passwd', os.path.dirname(__file__) + '/main')")),
    Case("makes its own program unusable", '#include <stdio.h>\n#include <sys/stat.h>\n'
         'int main(int count, char **words) { puts("yes"); chmod(words[0], 0); }', "ok runtime_error", "c", tests=ONE * 2),
    Case("100,000 files", """
try:
    for index in range(100_000): open(f"{index}", "w").close()
except OSError: print("yes")""", "ok output_limit", limits=sandbox.Limits(wall=10, memory=128, files=16)),
    Case("huge sparse file", "import os\ntry: os.truncate(os.open('x', os.O_CREAT | os.O_RDWR), 1 << 40)\nexcept OSError: print('yes')"),
    Case("closed directory", """
import os
os.makedirs("a/b/c"); open("a/b/c/d", "w").close()
os.symlink("/usr", "a/usr")
os.mkdir("closed", 0)
for place in ("a/b/c", "a/b", "a"):
    try: os.chmod(place, 0)
    except OSError: pass
print("yes")"""),
    Case("deep directories", """
import os
try:
    for _ in range(3000): os.mkdir("a"); os.chdir("a")
except OSError: pass
print("yes")""", "ok output_limit", tests=ONE * 2),
    Case("longer than any path", """
import os
for _ in range(30): os.mkdir("b" * 250); os.chdir("b" * 250)
print("yes")""", "ok output_limit", tests=ONE * 2),
    Case("state between tests", "import os\nprint('yes' if not os.path.exists('state') else 'state')\nopen('state', 'w').close()", tests=ONE * 3),
    Case("poisons caches", refused(*[
        f"open({str(sandbox.cache(name) / 'x')!r}, 'w')" for name in ("cpp", "java", "go")])),
]  # fmt: skip

NETWORK = [
    Case("network", refused(
        "socket.create_connection(('127.0.0.1', 22))", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_INET6)", "socket.getaddrinfo('example.org', 80)", "socket.socket(socket.AF_UNIX)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "socket.socketpair(socket.AF_INET)")),
    Case("socket pairs work", "import socket\na, b = socket.socketpair()\na.send(b'yes')\nprint(b.recv(9).decode())"),
]  # fmt: skip

KERNEL = [
    Case("mounts and namespaces", refused(
        "assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) < 0; raise OSError",
        *(f"assert ctypes.CDLL(None).unshare({flag:#x}) < 0; raise OSError" for flag in (0x10000000, 0x20000, 0x40000000)),
        "os.chroot('/tmp')", system_call("clone", 0x10000000 | 17, 0), system_call("open_tree", -100, 0, 0), system_call("fsopen", 0, 0))),
    Case("ptrace and its like", refused(
        "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) < 0; raise OSError",
        system_call("process_vm_readv", 1, 0, 0, 0, 0), system_call("pidfd_getfd", 1, 0, 0), system_call("bpf", 0, 0, 0), system_call("io_uring_setup", 8, 0),
        system_call("keyctl", 0, 0), system_call("perf_event_open", 0, 0), system_call("userfaultfd", 0))),
    Case("no privileges", """
status = open("/proc/self/status").read()
zero = [f"Cap{name}:\\t{0:016x}" for name in ("Inh", "Prm", "Eff", "Amb")]
import os
print("yes" if all(line in status for line in zero) and "NoNewPrivs:\\t1" in status
      and "Seccomp:\\t2" in status and os.getuid() != 0 else status)"""),
    Case("setuid programs", """
import subprocess
try:
    command = ["/bin/su", "-c", "id", "root"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=0.5)
    print("yes" if done.returncode and b"uid=0" not in done.stdout else done)
except subprocess.TimeoutExpired: print("yes")"""),
    Case("becomes root", refused("os.setuid(0)", "os.setgid(0)", "os.setgroups([0])", error="OSError")),
    Case("inherited descriptors", "import os\nprint('yes' if len(os.listdir('/proc/self/fd')) == 4 else os.listdir('/proc/self/fd'))"),
    Case("environment", "import os\nprint('yes' if set(os.environ) <= {'PATH', 'HOME', 'TMPDIR', 'LANG', 'LC_CTYPE'} else os.environ)"),
    Case("a foreign calling convention", """
#include <stdio.h>
int main() {
#ifdef __x86_64__
    long r; __asm__ volatile ("int $0x80" : "=a"(r) : "a"(20L) : "memory");
    printf("pid %ld\\n", r);
#else
    __builtin_trap();
#endif
}""", "runtime_error", "c"),
]  # fmt: skip

BOMB = "template<int N, int M> struct A { static const int v = A<N - 1, M>::v + A<N - 1, M + (1 << N)>::v; };\n" \
       "template<int M> struct A<0, M> { static const int v = 1; };\nint main() { return A<24, 0>::v; }"  # fmt: skip
NOT_BUILT = "compile_error time_limit memory_limit output_limit"
COMPILING = [
    Case("endless header", '#include "/dev/zero"\nint main() {}', NOT_BUILT, "c"),
    Case("name too long for a file", f"public class {300 * 'A'} {{ void main() {{ }} }}", "compile_error", "java"),
    Case("host file in the binary", '__asm__(".incbin \\"SECRET\\"");\nint main() {}', "compile_error", "c"),
    Case("host file as header", '#include "SECRET"\nint main() {}', "compile_error", "c"),
    Case("library in place of a program", '#![crate_type = "lib"]\nfn main() {}', "runtime_error", "rust"),
    Case("program's file larger than its memory", '#include <stdio.h>\nchar a[80 << 20] = {1};\nint main() { puts("yes"); }',
         "ok memory_limit", "c", limits=sandbox.Limits(memory=32)),
    Case("template bomb", BOMB, NOT_BUILT, "cpp"),
    Case("constexpr bomb", "constexpr long f(long n) { long s = 0; for (;;) s += n; return s; }\nconstexpr long v = f(1);\nint main() {}", NOT_BUILT, "cpp"),
    Case("2 GB static array", "char a[2147483647] = {1};\nint main() { return a[0]; }", NOT_BUILT + " memory_limit", "c"),
    Case("error flood", "".join(f"int f{n}() {{ return x{n}; }}\n" for n in range(20_000)), NOT_BUILT, "c"),
    Case("include_str", 'fn main() { print!("{}", include_str!("SECRET")); }', "compile_error", "rust"),
    Case("work at compile time", "BEGIN { open(F, '<', 'SECRET') and print 'did'; } print 'yes';", "ok", "perl"),
    Case("host file at compile time", 'const s = staticRead("SECRET")\necho s', NOT_BUILT, "nim"),
    Case("writes while compiling", 'import os\nstatic: writeFile("SECRET", "x")\necho "yes"', NOT_BUILT, "nim"),
]  # fmt: skip

GRADING = [
    Case("exit before output", "import os\nos._exit(0)\nprint('yes')", "wrong_answer"),
    Case("right, then a crash", "print('yes', flush=True)\nimport os\nos.abort()", "runtime_error"),
    Case("right, then exit 1", "print('yes')\nraise SystemExit(1)", "runtime_error"),
    Case("forged verdict", "print('{\"verdict\": \"ok\"}')\nimport os\nfor fd in range(3, 100):\n"
         "    try: os.write(fd, b'ok')\n    except OSError: pass", "wrong_answer"),
    Case("upper case", "print('YES')", "wrong_answer"),
    Case("white space before", "print(' yes')", "wrong_answer"),
    Case("white space after", "print('yes  \\t')\nprint()"),
    Case("lines run together", "print('a b')", "wrong_answer", tests=[{"stdin": "", "stdout": "a\nb"}]),
]  # fmt: skip

CASES = [*PROCESSES, *MEMORY, *TIME, *OUTPUT, *STDIN, *FILES, *NETWORK, *KERNEL, *COMPILING, *GRADING]


def run_case(box: sandbox.Sandbox, case: Case, secret: Path) -> sandbox.Result:
    """Raises AssertionError if the host's file was touched."""
    before = secret.read_text()
    program = case.program.replace("SECRET", str(secret))
    result = box.run(program, case.language, case.tests, limits=case.limits)
    assert secret.read_text() == before, "the host's file was changed"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", choices=sandbox.LEVELS, help="confinement; the strongest by default")
    parser.add_argument("--no-cgroups", action="store_true", help="do without control groups")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        secret = Path(directory, "secret.txt")
        secret.write_text("a secret of the host\n")
        os.chmod(directory, 0o755)
        cases = [case for case in CASES if options.only in case.name]
        box = sandbox.Sandbox(2, level=options.level, cgroups=not options.no_cgroups)
        with box, ThreadPoolExecutor(2) as threads:
            results = threads.map(lambda case: run_case(box, case, secret), cases)
            for case, result in zip(cases, results, strict=True):
                right = result.verdict in (*case.verdicts.split(), "no_toolchain")
                line = {"case": case.name, "right": right, "verdict": result.verdict, "level": result.level}
                if not right:
                    line["detail"] = repr(result)[:2000]
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
