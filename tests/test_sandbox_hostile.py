"""Every program of sandbox_cases.py, at each level of confinement, as root and as an ordinary user;
and after each nothing is left."""

import ctypes
import errno
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import sandbox_cases
from conftest import descendants, helper_or_skip
from sandbox_cases import CASES, Case, run_case

import sandbox

ROOT = os.geteuid() == 0
HERE = Path(__file__).parent


def _listing(path: Path) -> object:
    try:
        return len(os.listdir(path)) if path.name == "fd" else path.read_text()
    except OSError:
        return None


def traces(box: sandbox.Sandbox) -> dict:
    """What a run could leave behind: processes, mounts, descriptors, files."""
    helper = box._idle.get()
    box._idle.put(helper)
    pids = sorted({helper.process.pid, *descendants(helper.process.pid)})
    files = sorted(str(path) for path in Path(helper.home).rglob("tmp/*"))
    return {
        "processes": pids,
        "mounts": {pid: _listing(Path(f"/proc/{pid}/mounts")) for pid in (*pids, os.getpid())},
        "descriptors": {pid: _listing(Path(f"/proc/{pid}/fd")) for pid in (*pids, os.getpid())},
        "files": files,
        "shared memory": sorted(os.listdir("/dev/shm")),
    }


@pytest.fixture(scope="module", params=["namespaces", "forkserver", "landlock"])
def box(request):
    forkserver = request.param == "forkserver"
    level = "namespaces" if forkserver else request.param
    helper_or_skip(level).close()
    with sandbox.Sandbox(1, level=level, forkserver=forkserver) as box:
        box.run("print(1)", "python", [{"stdin": "", "stdout": "1"}])
        yield box


@pytest.fixture(scope="module")
def secret():
    """Not in pytest's own directory, which is closed to others."""
    with tempfile.TemporaryDirectory() as directory, sandbox_cases.host(Path(directory)) as secret:
        yield secret


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile(box, secret, case: Case):
    if sandbox.toolchain(case.language, box.level) is None:
        pytest.skip(f"no toolchain for {case.language}")
    if not case.promised(box.level):
        pytest.skip(f"not promised: {case.lacking}")
    if box.forkserver and not sandbox.LANGUAGES[case.language].copied:
        pytest.skip(f"{case.language} is not forked")
    before = traces(box)
    result = run_case(box, case, secret)
    assert result.verdict in case.verdicts.split(), result
    assert result.level == box.level
    assert traces(box) == before


def _python_for_all() -> str | None:
    """An interpreter that any user may run."""
    candidates = [os.path.realpath(sys.executable), "/usr/bin/python3"]
    usable = [path for path in candidates if os.path.exists(path) and sandbox._open_to_all(path)]
    return usable[0] if usable else None


@pytest.mark.skipif(not ROOT, reason="the tests run as an ordinary user already")
@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv")
@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_hostile_as_ordinary_user(level, tmp_path_factory):
    python = _python_for_all()
    if python is None:
        pytest.skip("no python that other users can run")
    for language in ("cpp", "javascript", "ruby", "typescript"):
        sandbox._warm(language, level)  # to be shared, not made once more
    place = Path(f"/tmp/ordinary-{os.getpid()}-{level}")
    try:
        (place / "tests").mkdir(parents=True)
        for name in ("sandbox.py", "tests/sandbox_cases.py"):
            shutil.copy(HERE.parent / name, place / name)
        shutil.chown(place, 65534, 65534)
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        command += [python, "-B", str(place / "tests/sandbox_cases.py"), "--level", level, "--forkserver"]
        env = {"PATH": os.environ["PATH"], "HOME": str(place)}
        env["XDG_CACHE_HOME"] = str(sandbox._cache_root().parent)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    finally:
        shutil.rmtree(place)
    if "_Refused" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 1 + sum(not case.lacking.startswith(level) for case in CASES), done.stderr
    assert [line for line in lines if not line["right"]] == []
    assert {line["level"] for line in lines if line["verdict"] != "no_toolchain"} == {level}


# ---------------------------------------------------------------------------------------------
# Parts that this kernel's level would not reach


def _fork(work) -> int:
    """The id of a forked process in which work() is called; it exits with 1 if that raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def _code(pid: int) -> int:
    """The exit code of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _expect(number: int, call, *arguments) -> None:
    try:
        call(*arguments)
    except OSError as error:
        assert error.errno == number, error
    else:
        raise AssertionError(f"{call} was allowed")


def _signal_and_alter(inside: Path, outside: Path, parent: int) -> None:
    """What a program may do to itself and to its own files, and may not to others."""
    tkill, answers = sandbox._SIGNALLING["tkill"][sandbox._ARCH], []
    os.setpgid(0, 0)
    os.kill(os.getpid(), 0)
    os.killpg(os.getpid(), 0)
    ask = lambda: answers.append(ctypes.CDLL(None).syscall(tkill, threading.get_native_id(), 0))  # noqa: E731
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [0]
    for target in (parent, -parent, -1, 1):
        _expect(errno.EPERM, os.kill, target, 0)
    os.chdir(inside)
    os.truncate("file", 3)
    _expect(errno.EINVAL, os.truncate, "file", -1)
    os.chmod("file", 0o7751)
    os.chmod(inside, 0o711)
    os.utime("file", (5, 6))
    os.utime(os.open("file", os.O_RDONLY), (5, 6))
    os.utime("link", (7, 8), follow_symlinks=False)
    for path in (outside, "../outside/file", "link", "/proc/self/cwd/../outside", inside / "link"):
        _expect(errno.EPERM, os.chmod, path, 0o777)
        _expect(errno.EPERM, os.utime, path)
        _expect(errno.EPERM, os.truncate, path, 0)
    _expect(errno.EPERM, os.fchmod, os.open(outside / "file", os.O_RDONLY), 0o777)
    _expect(errno.ENOENT, os.chmod, "none", 0o700)
    assert ctypes.CDLL(None).chmod(ctypes.c_void_p(-9), 0) == -1


def test_the_runner_allows_signals_and_attributes_inside_alone(tmp_path):
    """Signals: for kernels whose Landlock can't, before version 6."""
    inside, outside, parent = tmp_path / "inside", tmp_path / "outside", os.getpid()
    for place in (inside, outside):
        place.mkdir()
        (place / "file").touch(0o600)
    (inside / "link").symlink_to(outside / "file")
    before = outside.stat(), (outside / "file").stat()
    ours, theirs = socket.socketpair()

    def work():
        sandbox._prctl(sandbox._PR_NO_NEW_PRIVS, 1)
        socket.send_fds(theirs, [b"x"], [sandbox._seccomp(sandbox._filter(host=True, signals=True))])
        _signal_and_alter(inside, outside, parent)

    pid = _fork(work)
    theirs.close()
    runner = object.__new__(sandbox._LandlockRunner)
    runner.tmp, runner.common, runner.members = str(inside), [], lambda: [pid]
    with ours:
        listener = socket.recv_fds(ours, 1, 1)[1][0]
    run, poll = sandbox._Run({"cwd": str(inside)}, 0.0, pid, {}, listener, ""), select.poll()
    poll.register(listener, select.POLLIN)
    while not poll.poll()[0][1] & select.POLLHUP:
        runner.decide(run)
    run.close()
    assert _code(pid) == 0
    state = (inside / "file").stat()
    assert (state.st_mode & 0o7777, state.st_mtime, state.st_size) == (0o751, 6, 3)
    assert (inside / "link").lstat().st_mtime == 8
    assert before == (outside.stat(), (outside / "file").stat())


@pytest.mark.parametrize("version", range(1, 8))
def test_landlock_versions(version, monkeypatch, tmp_path):
    try:
        if sandbox._landlock_version() < version:
            pytest.skip("the kernel's Landlock is older")
    except OSError as error:
        pytest.skip(str(error))
    (tmp_path / "secret").write_text("x")
    (tmp_path / "shown").write_text("x")
    (tmp_path / "open").mkdir()
    monkeypatch.setattr(sandbox, "_landlock_version", lambda: version)

    def work():
        sandbox._prctl(sandbox._PR_NO_NEW_PRIVS, 1)
        sandbox._landlock(["/usr", str(tmp_path / "shown")], [str(tmp_path / "open")])
        os.close(sandbox._seccomp(sandbox._filter(host=True)))  # nobody does in its place what it asks for
        (tmp_path / "open" / "new").write_text("x")
        (tmp_path / "open" / "new").write_text("y")  # open() shortens it first
        for access in (os.O_RDONLY, os.O_ACCMODE):  # Linux takes both modes for the second
            _expect(errno.EPERM, os.open, tmp_path / "shown", access | os.O_TRUNC)
        _expect(errno.ENOSYS, os.truncate, tmp_path / "shown", 0)
        assert (tmp_path / "shown").read_text() == "x"
        os.listdir("/usr")
        _expect(errno.EACCES, os.open, tmp_path / "secret", os.O_RDONLY)
        _expect(errno.EACCES, os.open, "/usr/new", os.O_CREAT | os.O_WRONLY)

    assert _code(_fork(work)) == 0


def test_every_refused_call_is_in_the_filter():
    rules = sandbox._rules(host=False, signals=False)
    libc = ctypes.CDLL(None, use_errno=True)

    def work():
        sandbox._prctl(sandbox._PR_NO_NEW_PRIVS, 1)
        sandbox._seccomp(sandbox._filter())
        for number in (numbers[sandbox._ARCH] for numbers in sandbox._REFUSED.values()):
            if number is not None:
                assert libc.syscall(number, -1, -1, -1, -1, -1, -1) == -1
                assert ctypes.get_errno() == errno.EPERM, number
        for number in range(sandbox._NEWEST + 1, 500):
            assert libc.syscall(number, -1, -1, -1, -1, -1, -1) == -1
            assert ctypes.get_errno() == errno.ENOSYS, number

    assert len(rules) > 60
    assert _code(_fork(work)) == 0


def test_cases_cover_every_kind():
    assert len({case.name for case in CASES}) == len(CASES) >= 75
    assert sandbox_cases.LIMITS.wall <= 1
