"""Runs programs of many languages against tests and says how each test went.

    python sandbox.py languages                     the languages and their versions here
    python sandbox.py run FILE --tests FILE         one program, tests as JSON lines

From Python:

    with Sandbox(workers=4) as sandbox:
        result = sandbox.run("print(int(input()) * 2)", "python", [{"stdin": "4", "stdout": "8"}])
        results = sandbox.map([(program, language, tests), ...])

A program is compiled once and run once per test, by a small helper process per worker, so that
the caller, which may hold a model and many threads, is never forked. The helper reports what the
program wrote; whether that is right is decided here, where the expected output stays.
"""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import json
import os
import queue
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

VERDICTS = (
    "ok",
    "wrong_answer",
    "compile_error",
    "runtime_error",
    "time_limit",
    "memory_limit",
    "output_limit",
    "no_toolchain",
    "internal_error",
)


@dataclass(frozen=True)
class Limits:
    """What one test, and one compilation, may use."""

    wall: float = 10.0  # seconds per test, time spent waiting for a busy processor not counted
    cpu: float = 10.0  # seconds of processor time per test, all processes together
    memory: int = 512  # MB per test, all processes together
    output: int = 4 << 20  # bytes of stdout, and as many of stderr
    processes: int = 64  # processes and threads at a time
    files: int = 64  # MB in the scratch directory
    compile_wall: float = 60.0  # seconds to compile
    compile_memory: int = 2048  # MB to compile
    keep: int = 4096  # characters of stdout and stderr kept in a result


# ---------------------------------------------------------------------------------------------
# Languages


@dataclass(frozen=True)
class Language:
    """How to build and run programs of one language. In the commands {box} is the program's
    directory, {file} its source and {mb} the memory limit; a|b is the first of the two found."""

    name: str
    file: str
    run: str
    package: str  # the Debian package that brings the toolchain; "" where Debian has none
    compile: str = ""
    aliases: tuple[str, ...] = ()  # as in Markdown fences
    version: str = "--version"  # arguments that make the first tool print its version
    env: dict[str, str] = field(default_factory=dict)
    slack: int = 64  # MB of address space that the runtime reserves beside the program's own data
    sysroot: str = ""  # command printing the prefix of the real tool where PATH has a proxy


# Without the site module python starts four times faster, but lacks exit() and quit(). The names
# below are those that a program run as a file finds, and no others.
_PYTHON = (
    '__builtins__.exit = __builtins__.quit = __import__("sys").exit;'
    '__import__("sys").argv.pop(0); __file__ = __import__("sys").argv[0];'
    'exec(compile(open(__file__, "rb").read(), __file__, "exec"))'
)

_TABLE = (
    Language(
        "python",
        "main.py",
        f"python3 -I -S -B -c {shlex.quote(_PYTHON)} {{box}}/main.py",
        "python3",
        aliases=("py", "python3"),
    ),
    Language(
        "javascript", "main.js", "node {box}/main.js", "nodejs", aliases=("js", "node"), slack=1024
    ),
    Language(
        "c",
        "main.c",
        "{box}/main",
        "gcc",
        "gcc -std=gnu17 -O1 -w -o {box}/main {file} -lm",
        aliases=("h",),
    ),
    Language(
        "cpp",
        "main.cpp",
        "{box}/main",
        "g++",
        "g++ -std=gnu++17 -O1 -w -o {box}/main {file}",
        aliases=("c++", "cc", "cxx"),
    ),
    Language(
        "java",
        "Main.java",
        "java -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xshare:auto -Xss256m -Xmx{mb}m"
        " -XX:ReservedCodeCacheSize=64m -XX:CompressedClassSpaceSize=64m -cp {box} {stem}",
        "default-jdk-headless",
        "javac -J-XX:TieredStopAtLevel=1 -J-XX:+UseSerialGC -proc:none -nowarn -d {box} {file}",
        version="-version",
        slack=4096,
    ),
    Language(
        "go",
        "main.go",
        "{box}/main",
        "golang-go",
        "go build -o {box}/main {file}",
        aliases=("golang",),
        version="version",
        env={"GO111MODULE": "off", "CGO_ENABLED": "0"},
        slack=512,
    ),
    Language(
        "rust",
        "main.rs",
        "{box}/main",
        "rustc",
        "rustc --edition 2021 -C opt-level=1 -A warnings -o {box}/main {file}",
        aliases=("rs",),
        sysroot="rustc --print sysroot",
    ),
    Language("ruby", "main.rb", "ruby --disable=gems {box}/main.rb", "ruby", aliases=("rb",)),
    Language("perl", "main.pl", "perl {box}/main.pl", "perl-base", aliases=("pl",)),
    Language("php", "main.php", "php -n {box}/main.php", "php-cli"),
    Language("lua", "main.lua", "lua5.4|lua5.3|lua {box}/main.lua", "lua5.4", version="-v"),
    Language("bash", "main.sh", "bash {box}/main.sh", "bash", aliases=("sh", "shell")),
    Language("awk", "main.awk", "gawk -f {box}/main.awk", "gawk", aliases=("gawk",)),
    Language("tcl", "main.tcl", "tclsh {box}/main.tcl", "tcl", version=""),
)
LANGUAGES: dict[str, Language] = {language.name: language for language in _TABLE}
_NAMES = {alias: lang.name for lang in _TABLE for alias in (lang.name, *lang.aliases)}


def canonical(name: str) -> str:
    """The language's name in LANGUAGES, from that name or an alias in any case.
    Raises ValueError naming the known ones."""
    try:
        return _NAMES[name.strip().lower()]
    except KeyError:
        raise ValueError(f"unknown language {name!r}; known: {', '.join(LANGUAGES)}") from None


def _tools(language: Language) -> list[str]:
    """The commands that the language's lines begin with, but for the program itself."""
    words = [shlex.split(line)[0] for line in (language.compile, language.run) if line]
    return [word for word in words if "{" not in word]


def _locate(tool: str, language: Language) -> str | None:
    if tool == "python3":
        return os.path.realpath(sys.executable)
    found = next(filter(None, map(shutil.which, tool.split("|"))), None)
    if found and language.sysroot:
        prefix = subprocess.run(
            shlex.split(language.sysroot), capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        inside = Path(prefix.stdout.strip()) / "bin" / tool
        return str(inside) if inside.exists() else found
    return found


@functools.cache
def toolchain(name: str) -> dict[str, str] | None:
    """Path of each tool that the language needs; None if one is missing."""
    language = LANGUAGES[name]
    paths = {tool: _locate(tool, language) for tool in _tools(language)}
    return None if None in paths.values() else paths


def _version(name: str) -> str | None:
    tools = toolchain(name)
    if tools is None:
        return None
    command = [next(iter(tools.values())), *LANGUAGES[name].version.split()]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "?"
    found = re.search(r"\d+(\.\d+)+\w*", done.stdout + done.stderr)
    return found[0] if found else "?"


@functools.cache
def installed() -> dict[str, str]:
    """Version of each language whose toolchain is here, in the order of LANGUAGES."""
    with ThreadPoolExecutor(8) as pool:
        versions = zip(LANGUAGES, pool.map(_version, LANGUAGES), strict=True)
        return {name: version for name, version in versions if version is not None}


# ---------------------------------------------------------------------------------------------
# Comparing

Checker = Callable[[dict, str], bool]  # (test, stdout) -> right?


def _lines(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n").split("\n")


def same_lines(test: dict, stdout: str) -> bool:
    """Equal but for white space at the ends of lines and blank lines at the end."""
    return _lines(test["stdout"]) == _lines(stdout)


# ---------------------------------------------------------------------------------------------
# Results


@dataclass(frozen=True)
class TestResult:
    """One test, or the compilation."""

    __test__ = False  # not a test case, whatever pytest makes of the name
    verdict: str
    stdout: str = ""  # the head, Limits.keep characters
    stderr: str = ""
    exit_code: int | None = None  # None when ended by a signal or never started
    signal: str = ""  # such as SIGSEGV
    wall: float = 0.0  # seconds
    cpu: float = 0.0  # seconds
    memory: int = 0  # peak, bytes
    message: str = ""


@dataclass(frozen=True)
class Result:
    """All tests of one program; the verdict is that of the first test that is not ok."""

    verdict: str
    language: str
    tests: tuple[TestResult, ...] = ()
    compile: TestResult | None = None
    level: str = ""  # confinement in force
    message: str = ""

    @property
    def passed(self) -> bool:
        """True only if every test was run and its output was right."""
        return self.verdict == "ok"


# ---------------------------------------------------------------------------------------------
# Messages between the caller and a helper: two lengths, a JSON header, raw bytes


def _send(sock: socket.socket, header: dict, *blobs: bytes) -> None:
    head = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    sock.sendall(struct.pack("!I", len(head)) + head + b"".join(blobs))


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError("the other side has gone")
        data += part
    return bytes(data)


def _receive(sock: socket.socket) -> tuple[dict, list[bytes]]:
    (length,) = struct.unpack("!I", _receive_exactly(sock, 4))
    header = json.loads(_receive_exactly(sock, length))
    return header, [_receive_exactly(sock, size) for size in header["blobs"]]


# ---------------------------------------------------------------------------------------------
# The helper


class _Warden:
    """Runs steps, one at a time, in a process of its own."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.home = tempfile.mkdtemp(prefix="sandbox-")
        self.box, self.scratch = self.home + "/box", self.home + "/tmp"

    def serve(self) -> None:
        """Answers requests until the caller goes."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                request, blobs = _receive(self.sock)
                try:
                    reply, out = self.answer(request, blobs)
                except OSError as error:
                    reply, out = {"verdict": "internal_error", "message": repr(error)}, (b"", b"")
                _send(self.sock, reply, *out)
        shutil.rmtree(self.home, ignore_errors=True)

    def answer(self, request: dict, blobs: list[bytes]) -> tuple[dict, tuple[bytes, bytes]]:
        for path in [self.scratch] + [self.box] * (request["op"] == "open"):
            shutil.rmtree(path, ignore_errors=True)
            os.mkdir(path)
        if request["op"] == "open":
            Path(self.box, request["file"]).write_bytes(blobs[0])
            if not request["step"]:
                return {"verdict": "ok"}, (b"", b"")
            return self.execute(request["step"], b"")
        return self.execute(request["step"], blobs[0])

    def execute(self, step: dict, stdin: bytes) -> tuple[dict, tuple[bytes, bytes]]:
        source = os.memfd_create("stdin")
        with open(os.dup(source), "wb") as file:
            file.write(stdin)
        os.lseek(source, 0, 0)
        pipes = os.pipe(), os.pipe()
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            self.become(step, source, pipes[0][1], pipes[1][1])
        for fd in (source, pipes[0][1], pipes[1][1]):
            os.close(fd)
        outcome, out = self.watch(step, pid, start, pipes[0][0], pipes[1][0])
        os.close(pipes[0][0])
        os.close(pipes[1][0])
        return outcome, out

    def become(self, step: dict, *fds: int) -> None:
        try:
            os.setsid()
            for target, fd in enumerate(fds):
                os.dup2(fd, target)
            os.closerange(3, 4096)
            os.chdir(self.scratch)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_DATA, (step["data"] << 20,) * 2)
            fill = {"box": self.box}
            argv = [word.format(**fill) for word in step["argv"]]
            os.execve(argv[0], argv, {k: v.format(**fill) for k, v in step["env"].items()})
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(127)

    def watch(self, step: dict, pid: int, start: float, *pipes: int) -> tuple[dict, tuple]:
        poll, heads, verdict = select.poll(), {fd: bytearray() for fd in pipes}, "ok"
        alive = os.pidfd_open(pid)
        for fd in (*pipes, alive):
            poll.register(fd, select.POLLIN)
        while verdict == "ok":
            left = start + step["wall"] - time.monotonic()
            ready = [fd for fd, _ in poll.poll(max(0, left) * 1000)]
            if not ready:
                verdict = "time_limit"
            for fd in set(ready) - {alive}:
                part = os.read(fd, 1 << 16)
                heads[fd] += part
                if not part:
                    poll.unregister(fd)
                if len(heads[fd]) > step["output"]:
                    verdict = "output_limit"
            if ready == [alive]:
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.close(alive)
        _, status, usage = os.wait4(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if verdict == "ok" and code != 0:
            verdict = "memory_limit" if b"MemoryError" in heads[pipes[1]] else "runtime_error"
        outcome = {
            "verdict": verdict,
            "exit_code": code if code >= 0 else None,
            "signal": signal.Signals(-code).name if code < 0 else "",
            "wall": time.monotonic() - start,
            "cpu": usage.ru_utime + usage.ru_stime,
            "memory": usage.ru_maxrss << 10,
        }
        return outcome, tuple(bytes(heads[fd][: step["output"]]) for fd in pipes)


def _helper(fd: int) -> None:
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    _Warden(sock).serve()


# ---------------------------------------------------------------------------------------------
# The caller's side

_ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
_RETRIES = 2


class _Deadline(Exception):
    """The caller's time for a whole batch is over."""


def _stem(language: Language, program: str) -> tuple[str, str]:
    """File name and main class; Java ties both to the program's text."""
    if language.name != "java":
        return language.file, Path(language.file).stem
    public = re.search(
        r"^\s*public\s+(?:\w+\s+)*?(?:class|record|enum|interface)\s+(\w+)", program, re.M
    )
    name = public[1] if public else "Main"
    return f"{name}.java", name


def _step(line: str, language: Language, name: tuple[str, str], **settings) -> dict:
    tools = toolchain(language.name)
    fill = {"box": "{box}", "file": "{box}/" + name[0], "stem": name[1], "mb": settings["memory"]}
    words = [tools.get(word, word).format(**fill) for word in shlex.split(line)]
    return {"argv": words, "env": {**_ENV, **language.env}, **settings}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


class _Worker:
    """One helper process and the talk with it; used by one thread at a time."""

    def __init__(self):
        mine, theirs = socket.socketpair()
        place = Path(__file__)
        start = f"import sys; sys.path.insert(0, {str(place.parent)!r})\nimport {place.stem}"
        code = f"{start}; {place.stem}._helper({theirs.fileno()})"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.sock = mine

    def ask(self, request: dict, blob: bytes, seconds: float, expires: float) -> TestResult | tuple:
        """(outcome, stdout, stderr). Raises _Deadline, OSError or EOFError."""
        left = expires - time.monotonic()
        self.sock.settimeout(max(0.001, min(seconds, left)))
        try:
            _send(self.sock, request, blob)
            header, blobs = _receive(self.sock)
        except TimeoutError:
            if time.monotonic() >= expires:
                raise _Deadline from None
            raise
        header.pop("blobs")
        return header, *blobs

    def close(self) -> None:
        self.sock.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class _Job:
    program: str
    language: str
    tests: Sequence[dict]
    limits: Limits
    stop_at_failure: bool = False
    checker: Checker = same_lines
    expires: float = float("inf")


def _compile(worker: _Worker, job: _Job, name: tuple[str, str]) -> TestResult:
    language, limits = LANGUAGES[job.language], job.limits
    step = None
    if language.compile:
        step = _step(
            language.compile,
            language,
            name,
            memory=limits.compile_memory,
            data=limits.compile_memory + language.slack,
            wall=limits.compile_wall,
            cpu=limits.compile_wall,
            output=1 << 20,
        )
    request = {"op": "open", "file": name[0], "step": step}
    header, out, err = worker.ask(
        request, job.program.encode("utf-8", "replace"), limits.compile_wall * 10 + 10, job.expires
    )
    if header["verdict"] == "runtime_error":
        header["verdict"] = "compile_error"
    keep = limits.keep
    return TestResult(**header, stdout=_text(out)[:keep], stderr=_text(err)[:keep])


def _test(worker: _Worker, job: _Job, name: tuple[str, str], test: dict) -> TestResult:
    language, limits = LANGUAGES[job.language], job.limits
    step = _step(
        language.run,
        language,
        name,
        memory=limits.memory,
        data=limits.memory + language.slack,
        wall=limits.wall,
        cpu=limits.cpu,
        output=limits.output,
    )
    step["argv"] += map(str, test.get("args", ()))
    stdin = test.get("stdin", "").encode("utf-8", "replace")
    header, out, err = worker.ask(
        {"op": "test", "step": step}, stdin, limits.wall * 10 + 10, job.expires
    )
    stdout = _text(out)
    if header["verdict"] == "ok" and not job.checker(test, stdout):
        header["verdict"] = "wrong_answer"
    return TestResult(**header, stdout=stdout[: limits.keep], stderr=_text(err)[: limits.keep])


def _attempt(worker: _Worker, job: _Job) -> Result:
    name = _stem(LANGUAGES[job.language], job.program)
    built = _compile(worker, job, name)
    if built.verdict != "ok":
        return Result(built.verdict, job.language, compile=built)
    results: list[TestResult] = []
    for test in job.tests:
        results.append(_test(worker, job, name, test))
        if results[-1].verdict != "ok" and job.stop_at_failure:
            break
    verdict = next((r.verdict for r in results if r.verdict != "ok"), "ok")
    return Result(verdict, job.language, tuple(results), built)


class Sandbox:
    """A pool of helpers. Use it as a context manager, or call close().

    workers: programs run at a time; the number of processors by default."""

    def __init__(self, workers: int | None = None, limits: Limits = Limits()):
        self.limits = limits
        self.workers = workers or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self.workers, "sandbox")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Drops what has not begun, waits for what has, and ends the helpers."""
        self._pool.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()

    def submit(
        self,
        program: str,
        language: str,
        tests: Sequence[dict],
        *,
        stop_at_failure: bool = False,
        limits: Limits | None = None,
        checker: Checker = same_lines,
        deadline: float | None = None,
    ) -> "Future[Result]":
        """Queues one program and returns at once. tests: {"stdin", "stdout"} and, if wanted,
        "args"; deadline: seconds from now after which the result is internal_error.
        Raises ValueError for an unknown language."""
        job = _Job(
            program,
            canonical(language),
            tests,
            limits or self.limits,
            stop_at_failure,
            checker,
            time.monotonic() + deadline if deadline is not None else float("inf"),
        )
        return self._pool.submit(self._grade, job)

    def run(self, program: str, language: str, tests: Sequence[dict], **options) -> Result:
        """One program; options as for submit."""
        return self.submit(program, language, tests, **options).result()

    def map(
        self,
        jobs: Iterable[tuple[str, str, Sequence[dict]]],
        *,
        progress: str | None = None,
        **options,
    ) -> list[Result]:
        """Results of (program, language, tests) in the order given; options as for submit.
        progress: the label of a progress bar, drawn if tqdm is there."""
        futures = [self.submit(*job, **options) for job in jobs]
        return [future.result() for future in _watched(futures, progress)]

    def _grade(self, job: _Job) -> Result:
        if toolchain(job.language) is None:
            package = LANGUAGES[job.language].package or "none in Debian"
            return Result("no_toolchain", job.language, message=f"package: {package}")
        message = ""
        for _ in range(1 + _RETRIES):
            worker = self._idle.get() if not self._idle.empty() else _Worker()
            try:
                result = _attempt(worker, job)
            except _Deadline:
                worker.process.kill()
                worker.close()
                return Result("internal_error", job.language, message="deadline")
            except (OSError, EOFError) as error:
                message = repr(error)
                worker.process.kill()
                worker.close()
                continue
            self._idle.put(worker)
            if result.verdict != "internal_error":
                return result
            message = next((r.message for r in result.tests if r.message), "")
        return Result("internal_error", job.language, message=message)


def _watched(futures: list[Future], progress: str | None) -> Iterable[Future]:
    if progress is None:
        return futures
    try:
        from tqdm import tqdm
    except ImportError:
        return futures
    return tqdm(futures, desc=progress, unit="program")


_default_lock = threading.Lock()


@functools.cache
def _default() -> Sandbox:
    sandbox = Sandbox(workers=1)
    atexit.register(sandbox.close)
    return sandbox


def run(
    program: str,
    language: str,
    tests: Sequence[dict],
    limits: Limits = Limits(),
    *,
    stop_at_failure: bool = False,
    checker: Checker = same_lines,
) -> Result:
    """Runs one program in a sandbox kept for such calls; for many use Sandbox."""
    with _default_lock:
        return _default().run(
            program,
            language,
            tests,
            limits=limits,
            stop_at_failure=stop_at_failure,
            checker=checker,
        )


# ---------------------------------------------------------------------------------------------
# Command line


def _cmd_languages(_) -> int:
    versions = installed()
    for name, language in LANGUAGES.items():
        missing = f"- (package {language.package})" if language.package else "- (not in Debian)"
        print(f"{name:12} {versions.get(name, missing)}")
    return 0


def _cmd_run(options) -> int:
    path = Path(options.file)
    by_extension = {Path(lang.file).suffix[1:]: lang.name for lang in _TABLE}
    language = options.language or by_extension.get(path.suffix[1:], path.suffix[1:])
    tests = [json.loads(line) for line in Path(options.tests).read_text().splitlines() if line]
    result = run(path.read_text(), language, tests)
    print(json.dumps(dataclasses.asdict(result), indent=1))
    return 0 if result.passed else 1


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("languages", help="list the languages and their versions here")
    add.set_defaults(call=_cmd_languages)
    add = commands.add_parser("run", help="run one program against tests")
    add.add_argument("file", help="the program; its extension names the language")
    add.add_argument("--tests", required=True, help='JSON lines of {"stdin", "stdout"}')
    add.add_argument("--language", help="the language, where the extension does not name it")
    add.set_defaults(call=_cmd_run)
    options = parser.parse_args()
    return options.call(options)


if __name__ == "__main__":
    sys.exit(_main())
