"""Hostile and honest programs and what must become of them, run by test_sandbox_hostile.py.

    python tests/sandbox_cases.py --level namespaces     all cases, as JSON lines

This file needs nothing but the standard library, so that it can be run as another user.
"""

import argparse
import contextlib
import json
import os
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import sandbox

ONE = [{"stdin": "", "stdout": "yes"}]
PATIENT = sandbox.Limits(wall=20, cpu=20, memory=512)
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
    lacking: str = ""  # where that is not promised, as the docstring of sandbox.py says: "landlock", "landlock user"

    def patience(self) -> sandbox.Limits:
        """The limits; of time more where it does not decide, so that a busy machine decides nothing either."""
        if "time_limit" in self.verdicts:
            return self.limits
        return replace(self.limits, wall=max(10, self.limits.wall), cpu=max(10, self.limits.cpu))

    def promised(self, level: str) -> bool:
        return not self.lacking.startswith(level) or (self.lacking.endswith("user") and os.geteuid() == 0)


def refused(*lines: str, error: str = "OSError") -> str:
    """A program saying yes if each of its lines fails."""
    attempts = [f"try:\n    {line}\n    print('did', {line!r})\nexcept {error}: pass" for line in lines]
    return "\n".join(["import os, ctypes, socket, signal, mmap, sys", *attempts, "print('yes')"])


def system_call(name: str, *arguments: int) -> str:
    numbers = {**sandbox._REFUSED, "clone": sandbox._CLONE}[name]
    words = ", ".join(map(str, (numbers[sandbox._ARCH or 0], *arguments)))
    return f"assert ctypes.CDLL(None, use_errno=True).syscall({words}) < 0 and ctypes.get_errno() == 1; raise OSError"


def python(program: str, **how) -> Case:
    return Case(program.splitlines()[-1][:60], program, tests=[{"stdin": "", "stdout": ""}], limits=PATIENT, **how)


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
    Case("a cycle of descriptors", """
import socket
a, b = socket.socketpair()
for each in (a, b): socket.send_fds(each, [b"x"], [1, a.fileno(), b.fileno()])
print("yes")"""),
    Case("the first thread ends, the second sleeps", """
#include <pthread.h>
#include <unistd.h>
void *wait(void *p) { sleep(600); return p; }
int main() { pthread_t t; pthread_create(&t, 0, wait, 0); pthread_exit(0); }""", "time_limit", "c"),
    Case("signals of a limit that was not reached", "import os, signal\nsignal.signal(25, signal.SIG_DFL)\nos.kill(os.getpid(), 25)", "runtime_error"),
    Case("signals of the time limit", "import os\nos.kill(os.getpid(), 24)", "runtime_error"),
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
    Case("one great block", "bytearray(b'x') * (64 << 30)", "runtime_error"),
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
    Case("shared map given back", """
import mmap
kept = mmap.mmap(-1, 1 << 30)
while True:
    for start in range(0, 1 << 30, 16 << 20):
        for at in range(start, start + (16 << 20), 4096): kept[at] = 1
        kept.madvise(mmap.MADV_DONTNEED, start, 16 << 20)""", "memory_limit", limits=sandbox.Limits(wall=5, memory=128)),
    Case("memory of a second thread", """
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
void *take(void *p) { p = malloc(400 << 20); memset(p, 1, 400 << 20); sleep(9); return p; }
int main() { pthread_t t; pthread_create(&t, 0, take, 0); pthread_exit(0); }""", "memory_limit", "c", limits=sandbox.Limits(wall=5, memory=128)),
    Case("tables of pages", """
#include <sys/mman.h>
#include <unistd.h>
int main() {
    char *m = mmap(0, 1L << 39, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    volatile char got;
    for (long at = 0; at < 1L << 39; at += 2 << 20) got = m[at];
    sleep(9);
}""", "memory_limit", "c", limits=sandbox.Limits(wall=5, memory=128)),
    Case("memfd, shared segments, queues", refused(
        "os.memfd_create('x')", *(system_call(name, 0, 1 << 20, 0o1600, 0, 0) for name in (
            "shmget", "shmctl", "msgget", "msgsnd", "msgrcv", "msgctl", "semget", "semop", "semctl", "mq_unlink", "io_setup")))),
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
    Case("files without a name", """
import os
try:
    kept = []
    for index in range(20):
        kept.append(open(str(index), "wb"))
        os.unlink(str(index))
        kept[-1].write(bytes(10 << 20))
    import time
    time.sleep(60)
except OSError: print("yes")""", "ok output_limit", limits=sandbox.Limits(wall=3, memory=256, files=16)),
    Case("a folder that cannot be listed", """
import os, time
os.mkdir("closed", 0o300)
try:
    for index in range(50):
        with open(f"closed/{index}", "wb") as file: file.write(bytes(10 << 20))
    time.sleep(60)
except OSError: print("yes")""", "ok output_limit", limits=sandbox.Limits(wall=3, memory=256, files=16)),
    Case("files in a folder of shared memory", """
import os, time
try:
    os.mkdir("/dev/shm/folder")
    for index in range(50):
        with open(f"/dev/shm/folder/{index}", "wb") as file: file.write(bytes(10 << 20))
    time.sleep(60)
except OSError: print("yes")""", "ok output_limit memory_limit", limits=sandbox.Limits(wall=3, memory=256, files=16)),
    Case("attributes between tests", """
import os, struct
for place in (".", os.path.dirname(__file__), __file__):
    state = os.stat(place)
    if os.listxattr(place) or state.st_mtime == 5 or state.st_mode & 0o777 not in (0o755, 0o644): print(place, state)
    entries = struct.pack("<I" + "HHI" * 3, 2, 1, 7, 0xFFFFFFFF, 4, 0, 0xFFFFFFFF, 32, 0, 0xFFFFFFFF)
    for change in (lambda: os.setxattr(place, "user.leak", b"1"), lambda: os.setxattr(place, "system.posix_acl_default", entries),
                   lambda: os.utime(place, (5, 5)), lambda: os.chmod(place, 0o711)):
        try: change()
        except OSError: pass
print("yes")""", tests=ONE * 3),
    Case("leases, owners and flags", refused(
        "import fcntl; fcntl.fcntl(os.open('a', os.O_CREAT), fcntl.F_SETLEASE, fcntl.F_WRLCK)",
        "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getpid())",
        "import fcntl; fcntl.ioctl(os.pipe()[0], 0x8901, os.getpid().to_bytes(4, 'little'))",
        "import fcntl; fcntl.ioctl(os.open('b', os.O_CREAT), 0x40086602, (64).to_bytes(8, 'little'))",
        "open('/proc/pressure/memory', 'r+').write('some 150000 2000000')")),
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
        "socket.socket(socket.AF_INET6)", "socket.getaddrinfo('example.org', 80)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "socket.socketpair(socket.AF_INET)")),
    Case("local sockets of the host", refused(
        "socket.socket(socket.AF_UNIX).connect('SECRET.s')", "socket.socket(socket.AF_UNIX).connect('\\0SECRET')",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', 'SECRET.d')")),
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
        system_call("keyctl", 0, 0), system_call("perf_event_open", 0, 0), system_call("userfaultfd", 0),
        system_call("landlock_create_ruleset", 0, 0, 1), system_call("inotify_init1", 0))),
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
    Case("the first that the kernel ends where memory runs out", "if open('/proc/self/oom_score_adj').read() == '1000\\n': print('yes')\nopen('/proc/self/oom_score_adj', 'w')",
         "runtime_error"),
    Case("environment", "import os\nprint('yes' if set(os.environ) <= {'PATH', 'HOME', 'TMPDIR', 'LANG', 'USER', 'LC_CTYPE'} else os.environ)"),
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
]  # fmt: skip

MESSAGES = [
    Case("out of memory in words, most of it taken", "kept = b'x' * (110 << 20)\nraise ValueError('slot out of memory range')", "runtime_error"),
    Case("ends itself, most of its memory taken", "import os\nkept = b'x' * (110 << 20)\nos.kill(os.getpid(), 9)", "runtime_error"),
    Case("out of memory in the text of an error", "class A { int OutOfMemoryError = \"\"; }", "compile_error", "java", limits=PATIENT),
]  # fmt: skip

PASSES = [
    Case("node leaves with much on its way out", "console.log('y'.repeat(900000)); process.exit(0)", "ok", "javascript",
         tests=[{"stdin": "", "stdout": "y" * 900_000}], limits=PATIENT),
    Case("memory of a process that vfork made is its parent's", """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main() {
    char *a = malloc(300 << 20); memset(a, 1, 300 << 20);
    if (vfork() == 0) { usleep(500000); _exit(0); }
    puts(a[9] ? "yes" : "no");
}""", "ok", "c", limits=PATIENT),
    python("exit()"),
    python("quit(0)"),
    python("import sys\nsys.exit()"),
    python("import numbers, json, decimal, fractions, re, math, heapq, bisect, itertools, collections"),
    python("import asyncio, threading, multiprocessing, sqlite3, subprocess, tempfile, random, typing"),
    python("from __future__ import annotations\nfrom dataclasses import dataclass\n"
           "@dataclass\nclass A:\n    x: int = 1\nassert A() == A(1) and __name__ == '__main__'"),
    python("import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))"),
    python("import sys; sys.setrecursionlimit(10**6)\ndef f(n): return n and f(n - 1)\nf(50_000)"),
    python("import subprocess\nassert subprocess.check_output(['echo', 'x']) == b'x\\n'"),
    python("def unused(): pass\ntry: sys\nexcept NameError: pass\nelse: raise SystemExit(1)"),
    python("import multiprocessing as m\nwith m.Pool(2) as p: assert p.map(abs, [-1]) == [1]", lacking="landlock user"),
    python("from concurrent.futures import *\nwith ProcessPoolExecutor(2) as p: assert list(p.map(abs, [-1])) == [1]", lacking="landlock user"),
    python("from multiprocessing.shared_memory import *\ns = SharedMemory(create=True, size=9); s.close(); s.unlink()", lacking="landlock user"),
    python("import multiprocessing as m\nif __name__ == '__main__':\n with m.get_context('forkserver').Pool(2) as p: p.map(abs, [1])", lacking="landlock"),
    python("import resource as r\nr.setrlimit(r.RLIMIT_STACK, (r.RLIM_INFINITY, r.RLIM_INFINITY))"),
    python("import subprocess\nwith subprocess.Popen(['sleep', '600']) as p: p.terminate()"),
    python("import getpass\ngetpass.getuser()"),
    python("import os, shutil\nos.mkdir('a', 0o700); open('a/b', 'w').close()\nshutil.copytree('a', 'c'); shutil.copy2('a/b', 'd')\n"
           "os.chmod('d', 0o640); os.utime('d', (5, 6)); assert (os.stat('d').st_mode & 0o777, os.stat('d').st_mtime) == (0o640, 6)"),
    python("import os, threading\nos.mkfifo('f'); threading.Thread(target=lambda: open('f', 'w').write('x')).start(); assert open('f').read() == 'x'"),
    python("import os\nassert os.cpu_count() == len(os.sched_getaffinity(0)) <= 8"),
    *(Case(f"{language}: {program.splitlines()[-1][:50]}", program, "ok", language, limits=PATIENT, lacking=lacking) for language, program, lacking in (
        ("bash", "echo yes > /dev/stdout", ""),
        ("bash", "echo yes | tee /dev/stderr", ""),
        ("bash", "touch x && cp -p x y && mv y z && tar cf t.tar x z && rm x z && tar xf t.tar && test -e z && echo yes", ""),
        ("bash", "echo 'echo yes' > t.sh && chmod +x t.sh && ./t.sh", ""),
        ("bash", "mkfifo p && (echo yes > p &) && cat p", ""),
        ("bash", "cat /proc/self/status | grep -q State && ls /proc/self/fd > list && echo yes", ""),
        ("bash", "echo 'int main() { return 0; }' > a.c && gcc a.c && ./a.out && echo yes", ""),
        ("bash", "ulimit -s unlimited && echo yes", ""),
        ("perl", "open F, '>', 'a'; print F 'x' x 9; close F; truncate 'a', 3; print 'yes' if -s 'a' == 3;", ""),
        ("python", "with open('/dev/stdout', 'w') as file: file.write('yes')", ""),
        ("javascript", "require('fs').writeFileSync('/dev/stdout', 'yes')", ""),
        ("javascript", "require('fs').writeFileSync('a', 'yes'); require('fs').copyFileSync('a', 'b'); console.log('yes')", ""),
        ("typescript", "import * as fs from 'fs'\nconst os = require('os')\nif (fs.existsSync('/') && os.EOL as string) console.log('yes')", ""),
        ("tcl", "close [open a w]; file copy a b; puts yes", ""),
        ("lua", "local f = io.tmpfile(); f:write('yes'); f:seek('set'); print(f:read('a'))", "landlock"),
        ("awk", 'BEGIN { if (sprintf("%d", 2^40) == "1099511627776" && gensub(/(.)x/, "\\\\1", 1, "ax") == "a") print "yes" }', ""),
        ("php", "<?php if (ctype_digit('1') && iconv('UTF-8', 'ISO-8859-1', 'a') && posix_getpid()) echo 'yes';", ""),
        ("ruby", "require 'prime'; require 'matrix'; puts 'yes' if 7.prime? && Matrix[[1]].det == 1", ""),
        ("ruby", "gem 'json'; puts 'yes' if RbConfig::CONFIG['ruby_version'] && Monitor.new.synchronize { true }", ""),
        ("ruby", "def said(e) = e.respond_to?(:detailed_message) ? e.detailed_message(highlight: false) : e.message\n"
                 "begin; {foo: 1}.fetch(:fo); rescue KeyError => e; end\nbegin; [].lenght; rescue NameError => f; end\n"
                 "puts 'yes' if said(e).end_with?('Did you mean?  :foo') && said(f).include?('^^^^^^') && said(f).end_with?('length')", ""),
        ("ruby", "Gem.ruby_version; require 'matrix'; begin; require 'none'; rescue LoadError => e; puts 'yes' if e.path == 'none'; end", ""),
        ("java", "class Menu { void main() { System.out.println(\"yes\"); } }\nclass App { public static void main(String[] a) { new Menu().main(); } }", ""),
        ("java", 'class Text { String s = """\n  {{ " \\""" public class No { static void main(String[] a) \n  """; char c = \'"\', d = \'\\\'\'; }\n'
                 'public class App { public static void main(String... a) { System.out.println("yes"); } }', ""),
        ("java", "import java.nio.file.*; class M { public static void main(String[] a) throws Exception { Files.createTempFile(\"a\", \"b\"); System.out.println(\"yes\"); } }", ""),
        ("kotlin", '@file:JvmName("Foo")\npackage demo\nclass No { fun main() {} }\nfun main() { println("yes") }', ""),
        ("kotlin", 'class App { companion object { @JvmStatic fun main(a: Array<String>) { println("yes") } } }', ""),
        ("scala", 'object Solver { val a = "object X {" }\nobject Main { def main(a: Array[String]): Unit = println("yes") }', ""),
        ("rust", '#[test] fn x() { assert!(true) }\n#[allow(dead_code)] fn main() { println!("{}", r#"yes"#); }', ""),
        ("go", 'package main; import ("fmt"; "testing"); func main() { fmt.Println("yes") }; func TestX(t *testing.T) { t.Fatal() }', ""),
    )),
]  # fmt: skip

HOSTILE = [*PROCESSES, *MEMORY, *TIME, *OUTPUT, *STDIN, *FILES, *NETWORK, *KERNEL, *COMPILING, *GRADING]
CASES = [*HOSTILE, *MESSAGES, *PASSES]


@contextlib.contextmanager
def host(directory: Path):
    """A file, and local sockets named after it, that any user may use."""
    secret = directory / "secret.txt"
    secret.write_text("a secret of the host\n")
    directory.chmod(0o755)
    secret.chmod(0o666)
    with contextlib.ExitStack() as stack:
        for kind, name in (
            (socket.SOCK_STREAM, f"{secret}.s"),
            (socket.SOCK_STREAM, f"\0{secret}"),
            (socket.SOCK_DGRAM, f"{secret}.d"),
        ):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            listener.bind(name)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            if name[0] == "/":
                os.chmod(name, 0o777)
        yield secret


def run_case(box: sandbox.Sandbox, case: Case, secret: Path) -> sandbox.Result:
    """Raises AssertionError if the host's file was touched."""
    state = lambda: (secret.read_text(), secret.stat().st_mtime, secret.stat().st_mode, os.listxattr(secret))  # noqa: E731
    before = state()
    program = case.program.replace("SECRET", str(secret))
    result = box.run(program, case.language, case.tests, limits=case.patience())
    assert state() == before, "the host's file was changed"
    return result


def run_threads(level: str | None, forkserver: bool) -> sandbox.Result:
    """The worst of four programs with many threads at a time: they have no fewer for each other's sake."""
    program = "import threading, time\nfor _ in range(50): threading.Thread(target=time.sleep, args=(1,)).start()\nprint('yes')"
    with sandbox.Sandbox(4, PATIENT, level, forkserver) as box:
        return max(box.map([(program, "python", ONE)] * 4), key=lambda result: not result.passed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", choices=sandbox.LEVELS, help="confinement; the strongest by default")
    parser.add_argument("--forkserver", action="store_true", help="python's runs are forks of one interpreter")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.name]
    with contextlib.ExitStack() as stack:
        secret = stack.enter_context(host(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        box = stack.enter_context(sandbox.Sandbox(2, level=options.level, forkserver=options.forkserver))
        cases = [case for case in cases if case.promised(box.level)]
        threads = stack.enter_context(ThreadPoolExecutor(2))
        results = threads.map(lambda case: run_case(box, case, secret), cases)
        for case, result in zip(cases, results, strict=True):
            report(case.name, case.verdicts, result)
    report("many threads in each worker", "ok", run_threads(options.level, options.forkserver))


def report(name: str, verdicts: str, result: sandbox.Result) -> None:
    right = result.verdict in (*verdicts.split(), "no_toolchain")
    line = {"case": name, "right": right, "verdict": result.verdict, "level": result.level}
    print(json.dumps(line if right else {**line, "detail": repr(result)[:2000]}), flush=True)


if __name__ == "__main__":
    main()
