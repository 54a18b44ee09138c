"""Runs programs of many languages against tests, confined, and says how each test went.

    python sandbox.py languages                  the languages and their versions here
    python sandbox.py toolchains                 the Debian packages of those that are missing
    python sandbox.py run FILE --tests FILE      one program; tests as JSON lines
    python sandbox.py check FILE                 many programs; JSON lines, see --help

From Python:

    with Sandbox(workers=4) as sandbox:
        result = sandbox.run("print(int(input()) * 2)", "python", [{"stdin": "4", "stdout": "8"}])
        results = sandbox.map([(program, language, tests), ...])      # in order
        future = sandbox.submit(program, language, tests)             # while something else goes on

A job may end with a record of data.py, whose comparison, limits and harness then count: see Demands.

**Who starts whom, and who may end whom.** Each starts the next and may end all that are to the right of it; none
may end one to the left:

    caller ─────────▶ helper ────────▶ runner ──────────▶ program ────────▶ its own processes
    a Sandbox; owns   one a worker;    inside the         system calls
    the tests         clears up        confinement        filtered, limited

The caller, which may hold a model and many threads, is never forked. A helper only waits: when its runner ends, as
it does once the caller has gone, it ends what is left and removes its folder. The runner writes a program, has it
compiled once, and runs it once per test; it watches time, memory and files, ends every process that the program
started, and reports what was written and how it ended. Whether that is right is decided in the caller, where the
expected output stays: a program can't find it, and neither an early exit nor anything printed is a pass.

To start python takes longer than most of its programs. With `forkserver`, at level `namespaces`, a process between
helper and runner, outside the programs' process namespace, where none can see or signal it, turns into an interpreter
that has started, and each run is a copy of it by fork, left to the runner. It runs no program itself and is handed
nothing of a run but its streams, so each begins in the same state. It is off unless asked for, since a program can
tell: hashes and addresses are the same in all runs of a worker, some 80 more objects exist (so that garbage is
collected a little earlier, the first time), and the kernel's flags say that it was forked.

**What a program is kept from** (each claim is a case in tests/sandbox_cases.py):

1. Level `namespaces`: user, process, mount, network, IPC and UTS namespaces; a root directory that
   holds the toolchains read-only, the program read-only, and a scratch directory of limited size,
   new for each test. As root the user is changed first. When a test ends, so does every process
   that it started, daemons included: the runner is process 1 there.
2. Level `landlock`, where namespaces are forbidden: Landlock limits which files can be opened. The host's processes,
   with their command lines, can be seen, not touched; files' names and sizes can be seen, and how many processors the
   machine has; the size of the scratch directory is only watched. Root's programs run as a user of their own, which has
   no name, and share /dev/shm with the host; other users' lack it, so no semaphores of multiprocessing. There are no
   local sockets but pairs of streams. /tmp is closed, so tmpfile() of C, which heeds no TMPDIR, fails.
3. Both: system calls filtered (no network, no memory outside the limits, no extended attributes,
   no large or young parts of the kernel), no privileges, nothing of the caller's environment
   or descriptors, limits per process, and watched limits on time and memory of all processes together.
4. Level `none`: limits only, for programs that are trusted. It has to be asked for.

**What it does not protect against:** faults of the kernel, for programs talk to the same one; side channels, such as
timing; a program that guesses or tells test inputs apart (write better tests); an answer in a harness that alters what
the harness calls, or reads the word it has to print from its own source; use of up to the limits by every worker at
once (workers x memory should fit the machine). Memory and time are looked at every 20 ms: without a spare processor
memory can overshoot in between (where the machine has none left, the kernel ends programs before the caller, as a
runtime_error), and the time of children that live for less than a look and that nobody waits for counts only against
the wall limit. What sockets hold is not counted (up to 0.2 MB for each of 256 per process, and for 8 that wait to be
accepted), nor what locks on parts of files and the kernel's lists of maps take; memory mapped to be shared counts as
used in full, unless a second thread swaps its descriptor between the look and the mapping. /proc/cpuinfo and what asks
it, as node does, show the machine's processors. At level `landlock`, nothing counts what is in files that have no name
and are only mapped, that are on their way through a socket, or that stand in folders of others in /dev/shm which are
open to all; and files of the host that can be read can be locked.

In this order: limits; the table of languages, their toolchains, what these prepare once; what a problem demands of its
answers, and what is reported; messages between caller and runner, and system calls that Python lacks; the filter and
Landlock; the runner, then what it does at each level; helper; the caller's side, with Sandbox; command line.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import glob
import itertools
import json
import math
import os
import re
import resource
import select
import shlex
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import BinaryIO

# A helper runs this file too, and forks at every run: the less it holds, the faster.
_IN_HELPER = sys.argv[1:] == ["sandbox helper"]
if not _IN_HELPER:
    import argparse
    import hashlib
    import queue
    import secrets
    import subprocess
    import tempfile
    import warnings
    from collections import Counter
    from concurrent.futures import Future, ThreadPoolExecutor


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
    """How to build and run programs of one language.

    In the command lines {box} is the program's directory, {file} its source, {main} its main class, {tmp} a scratch
    directory, {cache} what `warm` prepared and {mb} the memory limit. Compilers work in {box}."""

    name: str
    file: str
    run: str
    package: str  # the Debian packages that bring the toolchain; "" where Debian has none
    compile: str = ""
    aliases: tuple[str, ...] = ()  # as in Markdown fences
    env: dict[str, str] = field(default_factory=dict)
    overhead: int = 16  # MB that the runtime itself takes beside the program's own memory
    version: str = ""  # command that prints the version, where it is not the compiler or interpreter with --version
    warm: str = ""  # shell lines that prepare $OUT, which {cache} and $CACHE will be
    sysroot: str = ""  # arguments that make a proxy, such as rustup's, print where the real tool lives
    libraries: dict[str, str] = field(default_factory=dict)  # that tests of public problems call: package -> its file
    copied: bool = False  # whether its command can wait on descriptor 3 and fork a copy of itself for each run


# An interpreter whose descriptor 3 is a socket to be asked on waits here, and forks a copy of itself for each run: the
# copy, left to the runner by its parent's end, leaves this text with the run's streams, in its scratch directory, once
# its limits are set. What could tell it from one just started is undone, but for what the top of this file says.
_COPY = """import posix, sys
finders = [*sys.path_importer_cache]
try:
    posix.fstat(3)
    from _socket import socket
    asked = socket(fileno=3)
except OSError:
    pass
else:
    compile("", "", "exec")  # makes types that last
    for stream in range(3):  # streams of the first run, which shall end with it
        posix.dup2(3, stream)
    asked.send(b"ready")
    while True:
        said, rights, *_ = asked.recvmsg(1, 64)
        if not said:
            posix._exit(0)
        fds = [int.from_bytes(rights[0][2][i : i + 4], sys.byteorder) for i in (0, 4, 8, 12)]
        try:
            if pid := posix.fork():
                posix.waitpid(pid, 0)
            elif posix.fork():
                posix._exit(0)
            else:
                break
        except OSError:
            posix._exit(1)
        for fd in fds:
            posix.close(fd)
        asked.send(b"forked")
    asked.close()
    posix.setsid()
    for target, fd in enumerate(fds[:3]):
        posix.dup2(fd, target)
        posix.close(fd)
    posix.chdir(posix.environ[b"TMPDIR"])
    limited = socket(fileno=fds[3])
    limited.send(b"%d" % posix.getpid())
    if limited.recv(1) != b".":
        posix._exit(1)
    limited.close()
    del sys.modules["_socket"]
    for path in [*sys.path_importer_cache][len(finders) :]:
        del sys.path_importer_cache[path]
"""
# Without the site module python starts four times faster, but lacks exit() and quit(). The names
# below are those that a program run as a file finds, and no others.
_PYTHON = (
    f"exec({_COPY!r}, dict());"
    '__builtins__.exit = __builtins__.quit = __import__("sys").exit;'
    '__import__("sys").argv.pop(0); __file__ = __import__("sys").argv[0];'
    'exec(compile(open(__file__, "rb").read(), __file__, "exec"))'
)
_NODE = "node --max-old-space-size={mb} --stack-size=50000 {box}/main.js"
# Node puts what a pipe does not take at once off until later, which process.exit() does not wait for.
_ON_NODE = {
    "env": {"NODE_OPTIONS": "-r {cache}/blocking.js", "NODE_PATH": "/usr/share/nodejs"},
    "warm": "echo 'for (const s of [process.stdout, process.stderr]) s._handle?.setBlocking?.(true)'"
    " > $OUT/blocking.js",
    "overhead": 128,
}
_LODASH = {"node-lodash": "/usr/share/nodejs/lodash/package.json"}
# Ruby starts eight times faster without its gems. This loads them once a program asks for one, and what adds hints to
# the messages of errors once a program asks for a message (as of Ruby 3.2 for a detailed one).
_GEMS = """autoload :Gem, "rubygems"
autoload :Monitor, "monitor"
autoload :MonitorMixin, "monitor"
autoload :RbConfig, "rbconfig"
module Kernel
  private(define_method(:gem) { |*names| Gem.then { gem(*names) } })
  plain = instance_method(:require)
  private(define_method(:require) do |name|
    plain.bind_call(self, name)
  rescue LoadError
    raise unless Object.autoload?(:Gem)
    Gem
    require name
  end)
end
asked = Exception.method_defined?(:detailed_message) ? :detailed_message : :to_s
hints = Module.new do
  define_method(asked) do |**how|
    next super(**how) if defined?(DidYouMean)
    [*("error_highlight" if RUBY_VERSION >= "3.1"), "did_you_mean"].each { |name| require name }
    public_send(asked, **how)
  end
end
[NameError, KeyError, LoadError, TypeError, ArgumentError].each { |kind| kind.prepend(hints) }"""
_CPP = "g++ -std=gnu++20 -O1 -w"
_FAST_JVM = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:-UsePerfData"
_JAVA = f"-ea {_FAST_JVM} -Xshare:auto -Djava.io.tmpdir={{tmp}} -Xss256m -Xmx{{mb}}m"
_JAVAC = f"javac -J{_FAST_JVM.replace(' ', ' -J')} -proc:none -nowarn"
_ON_JVM = {"env": {"JAVA_TOOL_OPTIONS": "", "JAVA_OPTS": _JAVA}, "overhead": 256}
_GO = (
    '"$0/compile" -p main -c=1 -importcfg "$0/packages" -o main.o main.go'
    ' && "$0/link" -s -w -importcfg "$0/packages" -o main main.o'
)
_GO_PACKAGES = "{{if .Export}}packagefile {{.ImportPath}}={{.Export}}{{end}}"
_ON_ERLANG = {"ERL_FLAGS": "+S 1:1 +SDcpu 1 +SDio 1 +A 1"}

# fmt: off
_TABLE = (
    Language("python", "main.py", f"python3 -I -S -B -c {shlex.quote(_PYTHON)} {{box}}/main.py", "python3",
             aliases=("py", "python3"), copied=True),
    Language("javascript", "main.js", _NODE, "nodejs", aliases=("js", "node"), **_ON_NODE, libraries=_LODASH),
    Language("typescript", "main.ts", _NODE, "esbuild nodejs",
             "esbuild --log-level=error --format=cjs --outfile={box}/main.js {file}",
             aliases=("ts",), **_ON_NODE, libraries=_LODASH),
    Language("c", "main.c", "{box}/main", "gcc libc6-dev", "gcc -std=gnu17 -O1 -w -o {box}/main {file} -lm",
             aliases=("h",)),
    Language("cpp", "main.cpp", "{box}/main", "g++", f"{_CPP} -I{{cache}} -o {{box}}/main {{file}}",
             aliases=("c++", "cc", "cxx"),
             warm=f"mkdir $OUT/bits; echo '#include <bits/stdc++.h>' > all.h\n"
                  f"{_CPP} -x c++-header -o $OUT/bits/stdc++.h.gch all.h"),
    Language("java", "Main.java",
             f"java {_JAVA} -XX:ReservedCodeCacheSize=64m -XX:CompressedClassSpaceSize=64m -cp {{box}} {{main}}",
             "default-jdk-headless", f"{_JAVAC} -J-XX:SharedArchiveFile={{cache}}/javac.jsa -d {{box}} {{file}}",
             overhead=256, version="javac -version",
             warm="echo 'import java.util.*; public class Main { public static void main(String[] a) {"
                  " System.out.println(new Scanner(System.in).nextInt() + List.of(a).size()); } }' > Main.java\n"
                  f"{_JAVAC} -J-XX:ArchiveClassesAtExit=$OUT/javac.jsa -d . Main.java"),
    Language("go", "main.go", "{box}/main", "golang-go", f"sh -c {shlex.quote(_GO)} {{cache}}",
             aliases=("golang",), env={"GOMEMLIMIT": "{mb}MiB"}, overhead=32, version="go version",
             warm="export GOCACHE=$OUT/build GO111MODULE=off GOPATH=/usr/share/gocode GOFLAGS= CGO_ENABLED=0\n"
                  "assert=github.com/stretchr/testify/assert; test -d $GOPATH/src/$assert || assert=\n"
                  f"go list -export -deps -f '{_GO_PACKAGES}' std $assert > all\n"
                  'sed "s|$OUT|$CACHE|" all > $OUT/packages; test -s $OUT/packages\n'
                  "ln -s $(go env GOTOOLDIR)/compile $(go env GOTOOLDIR)/link $OUT",
             libraries={"golang-github-stretchr-testify-dev":
                        "/usr/share/gocode/src/github.com/stretchr/testify/go.mod"}),
    Language("rust", "main.rs", "{box}/main", "rustc",
             "rustc --edition 2021 -C opt-level=1 -A warnings -o {box}/main {file}",
             aliases=("rs",), sysroot="--print sysroot"),
    Language("ruby", "main.rb", "ruby --disable=gems -r {cache}/gems.rb {box}/main.rb", "ruby", aliases=("rb",),
             warm=f"echo {shlex.quote(_GEMS)} > $OUT/gems.rb"),
    Language("perl", "main.pl", "perl {box}/main.pl", "perl", aliases=("pl",),
             libraries={"libdata-compare-perl": "/usr/share/perl5/Data/Compare.pm",
                        "libtest-deep-perl": "/usr/share/perl5/Test/Deep.pm"}),
    Language("php", "main.php", "php -d memory_limit={mb}M -d display_errors=stderr {box}/main.php", "php-cli"),
    Language("lua", "main.lua", "lua5.4 {box}/main.lua", "lua5.4", version="lua5.4 -v",
             libraries={"lua-unit": "/usr/share/lua/5.4/luaunit.lua"}),
    Language("bash", "main.sh", "bash {box}/main.sh", "bash", aliases=("sh", "shell")),
    Language("awk", "main.awk", "gawk -f {box}/main.awk", "gawk", aliases=("gawk",)),
    Language("tcl", "main.tcl", "tclsh {box}/main.tcl", "tcl", version="tclsh"),
    Language("csharp", "main.cs", "mono {box}/main.exe", "mono-mcs mono-runtime",
             "mcs -optimize+ -warn:0 -r:System.Numerics.dll -out:{box}/main.exe {file}", aliases=("cs", "c#"),
             env={"MONO_GC_PARAMS": "max-heap-size={mb}m", "MONO_SHARED_DIR": "{tmp}"}, overhead=64),
    Language("haskell", "main.hs", "{box}/main", "ghc", "ghc -v0 -O0 -outputdir {tmp} -o {box}/main {file}",
             aliases=("hs",)),
    Language("ocaml", "main.ml", "{box}/main", "ocaml-nox", "ocamlopt -w -a unix.cmxa str.cmxa -o {box}/main {file}",
             aliases=("ml",), version="ocamlopt -version"),
    Language("r", "main.R", "Rscript --vanilla {box}/main.R", "r-base-core", overhead=64),
    Language("racket", "main.rkt", "racket {box}/main.rkt", "racket", aliases=("rkt",), overhead=128),
    Language("commonlisp", "main.lisp", "sbcl --dynamic-space-size {mb}MB --script {box}/main.lisp", "sbcl",
             aliases=("lisp", "common-lisp", "cl"), overhead=64),
    Language("scheme", "main.scm", "guile --no-auto-compile -s {box}/main.scm", "guile-3.0",
             aliases=("scm", "guile"), overhead=64),
    Language("d", "main.d", "{box}/main", "ldc", "ldc2 -O1 -od={tmp} -of={box}/main {file}", aliases=("dlang",)),
    Language("ada", "main.adb", "{box}/main", "gnat", "gnatmake -q -D {tmp} -o {box}/main {file}", aliases=("adb",)),
    Language("fortran", "main.f90", "{box}/main", "gfortran", "gfortran -O1 -w -o {box}/main {file}", aliases=("f90",)),
    Language("pascal", "main.pas", "{box}/main", "fp-compiler fp-units-base fp-units-rtl",
             "fpc -v0e -l- -O1 -o{box}/main {file}", aliases=("pas", "delphi"), version="fpc -iV"),
    Language("erlang", "main.erl", "escript {box}/main.erl", "erlang-base",
             aliases=("erl",), env=_ON_ERLANG, overhead=64,
             version="erl -noshell -eval"
                     " 'io:put_chars(erlang:system_info(otp_release)),io:put_chars(\".0\"),halt().'"),
    Language("elixir", "main.exs", "elixir {box}/main.exs", "elixir",
             aliases=("ex", "exs"), env=_ON_ERLANG, overhead=128),
    Language("prolog", "main.pro", "swipl -q --on-error=halt -t halt {box}/main.pro", "swi-prolog-nox",
             aliases=("pro", "swipl"), env={"LANG": "C.UTF-8"}),
    Language("nim", "main.nim", "{box}/main", "nim",
             "nim c --hints:off --warnings:off --verbosity:0 --nimcache:{tmp}/nim -o:{box}/main {file}"),
    Language("kotlin", "main.kt", "kotlin -cp {box} {main}", "kotlin", "kotlinc -nowarn -d {box} {file}",
             aliases=("kt",), version="kotlinc -version", **_ON_JVM),
    Language("scala", "main.scala", "scala -cp {box} {main}", "scala", "scalac -nowarn -d {box} {file}",
             version="scalac -version", **_ON_JVM),
    Language("clojure", "main.clj", "clojure {box}/main.clj", "clojure", aliases=("clj",),
             version="clojure -e (clojure-version)", **_ON_JVM),
    Language("octave", "main.m", "octave-cli -q --no-init-file --no-history {box}/main.m", "octave",
             aliases=("matlab", "m"), overhead=128),
    Language("sql", "main.sql", "sqlite3 -batch -bail :memory: '.read {box}/main.sql'", "sqlite3", aliases=("sqlite",)),
    Language("crystal", "main.cr", "{box}/main", "crystal",
             "crystal build --no-color --error-trace -o {box}/main {file}",
             aliases=("cr",), env={"CRYSTAL_CACHE_DIR": "{tmp}"}),
    Language("cobol", "main.cob", "{box}/main", "gnucobol3", "cobc -x -free -w -o {box}/main {file}", aliases=("cob",)),
    Language("forth", "main.fs", "gforth {box}/main.fs -e bye", "gforth"),
    Language("raku", "main.raku", "raku {box}/main.raku", "rakudo", aliases=("perl6",), overhead=128),
    Language("coffeescript", "main.coffee", "coffee {box}/main.coffee", "coffeescript",
             aliases=("coffee",), **_ON_NODE),
    Language("julia", "main.jl", "julia --startup-file=no --compile=min -O0 {box}/main.jl", "",
             aliases=("jl",), overhead=256),
    Language("swift", "main.swift", "{box}/main", "", "swiftc -module-cache-path {tmp} -o {box}/main {file}"),
    Language("zig", "main.zig", "{box}/main", "",
             "zig build-exe --cache-dir {tmp} --global-cache-dir {tmp} -femit-bin={box}/main {file}",
             version="zig version"),
    Language("dart", "main.dart", "{box}/main", "", "dart compile exe -o {box}/main {file}"),
)
# fmt: on
LANGUAGES: dict[str, Language] = {language.name: language for language in _TABLE}
_NAMES = {alias: lang.name for lang in _TABLE for alias in (lang.name, *lang.aliases)}


def _libraries(name: str, here: bool) -> list[str]:
    """The packages of a language's libraries that are here, or that are not."""
    return [package for package, path in LANGUAGES[name].libraries.items() if os.path.exists(path) is here]


def canonical(name: str) -> str:
    """The language's name in LANGUAGES, from that name or an alias in any case.
    Raises ValueError naming the known ones."""
    try:
        return _NAMES[name.strip().lower()]
    except KeyError:
        raise ValueError(f"unknown language {name!r}; known: {', '.join(LANGUAGES)}") from None


# Strings, characters and comments, as Java, Kotlin and Scala write them. In time proportional to the text.
_NO_CODE = re.compile(
    r'"""(?:\\[\s\S]|[^\\])*?(?:"""|\Z)|"(?:\\[\s\S]|[^"\\])*"?|`[^`]*`?'
    r"|'(?:\\.[^'\n]*|[^\\'\n])'|//.*|/\*[\s\S]*?(?:\*/|\Z)"
)
_MAIN_CLASS = re.compile(
    r"[{}]|(?:\bpublic\s[\w\s]{0,99}?)?\b(?P<kind>class|record|enum|interface|object)\s+(?P<name>[\w$]+)"
    r"|(?P<main>(?:\bstatic\s[\w\s]{0,99}?)?\b(?:void|def)\s+main\s*\([^)]{0,99}|\b(?:extends|with)\s+App\b"
    r"|(?:@JvmStatic\s[\w\s]{0,99}?)?\bfun\s+main\s*\()"
)
# The parameter of a main method that is given the command line: String[] x, String... x or String x[]; in Scala Array[
_STRINGS = re.compile(r"\([^,]*(?:\bString\s*(?:\[|\.\.\.|\w+\s*\[)|\bArray\s*\[)[^,]*\Z")


def _main_class(code: str, whole: str = "") -> tuple[str | None, str]:
    """The public class in Java or Scala, if there is one, and that to be run: the one whose main method takes strings
    and is static, else one with any main method, and of several the public one, else the first. In Kotlin `whole`
    stands for the file's own functions, and comes before a class with a static main."""
    found = {whole: (1, False)} if whole else {}  # by class how good its main method is, and whether it is public
    depth, current = 0, ""
    for token in _MAIN_CLASS.finditer(code):
        text = token[0]
        if text in "{}":
            depth += 1 if text == "{" else -1
        elif token["name"] and depth == 0:
            current, kind = token["name"], token["kind"]
            found.setdefault(current, (0, text.startswith("public")))
        elif whole and token["main"]:
            found |= {whole: (3, False)} if depth == 0 else {current: (2, False)} if text.startswith("@") else {}
        elif token["main"] and current and depth <= ("main" in text):  # not of a class in it
            if text.startswith("def"):
                value = 2 * bool(kind == "object" and _STRINGS.search(text))
            else:
                value = 2 if "main" not in text or ("static" in text and _STRINGS.search(text)) else 1
            found[current] = max(found[current][0], value), found[current][1]
    public = next((name for name, (_, is_public) in found.items() if is_public), None)
    return public, max(found, key=found.get, default="Main")


def _source_name(language: Language, program: str) -> tuple[str, str]:
    """File name and, on the JVM, the class to be run; some languages tie them to the text."""
    (stem, suffix), main = os.path.splitext(language.file), ""
    if language.name == "ada" and (unit := re.search(r"^[ \t]*procedure\s+(\w+)\s+is\b", program, re.M)):
        stem = unit[1].lower()
    elif language.name in ("java", "kotlin", "scala"):
        code = _NO_CODE.sub(" ", program)
        named = re.search(r'^[ \t]*@file:JvmName\("([\w$]+)"\)', program, re.M)
        whole = (named[1] if named else "MainKt") if language.name == "kotlin" else ""
        public, main = _main_class(code, whole)
        stem = public or main if language.name == "java" else stem
        package = re.search(r"^[ \t]*package\s+([\w.]+)", code, re.M)
        main = f"{package[1]}.{main}" if package else main
    # A name has at most 255 bytes; where one is cut, the compiler says what is wrong.
    return stem.encode()[:240].decode(errors="ignore") + suffix, main


def _tools(language: Language) -> list[str]:
    """The commands that the language's lines begin with, but for the program itself."""
    lines = (language.version, language.compile, language.run)
    words = [line.split()[0] for line in lines if line]
    return list(dict.fromkeys(word for word in words if "{" not in word))


def _open_to_all(path: str) -> bool:
    """Whether any user may reach the file: root's tools often lie under a closed home."""
    return all(parent.stat().st_mode & 1 for parent in Path(os.path.realpath(path)).parents)


def _candidates(tool: str, language: Language) -> Iterable[str]:
    """Where a tool is, best place first. A proxy such as rustup's is followed."""
    if tool == "python3":
        yield os.path.realpath(sys.executable)
    for directory in os.get_exec_path():
        path = os.path.join(directory, tool)
        if not os.access(path, os.X_OK):
            continue
        if language.sysroot:
            command = [path, *language.sysroot.split()]
            done = subprocess.run(command, capture_output=True, text=True)
            inside = os.path.join(done.stdout.strip(), "bin", tool)
            path = inside if os.path.exists(inside) else path
        yield path


@functools.cache
def toolchain(name: str, level: str = "namespaces") -> dict[str, str] | None:
    """Path of each tool that a language needs; None if one is missing. Below `namespaces` root's
    programs, which run as another user, can't use what lies in closed directories."""
    closed = level == "landlock" and os.geteuid() == 0
    paths = {}
    for tool in _tools(LANGUAGES[name]):
        found = (path for path in _candidates(tool, LANGUAGES[name]) if not closed or _open_to_all(path))
        paths[tool] = next(found, None)
    return None if None in paths.values() else paths


@functools.cache
def installed() -> list[str]:
    """The languages whose toolchain is here, in the order of LANGUAGES."""
    return [name for name in LANGUAGES if toolchain(name)]


def _missing(language: Language) -> str:
    return f"Debian package {language.package}" if language.package else "not in Debian"


def _version(name: str) -> str:
    """What a language's toolchain says of itself; where there is none, what would bring it."""
    if name not in installed():
        return f"- ({_missing(LANGUAGES[name])})"
    first, *_ = toolchain(name)
    tool, *arguments = shlex.split(LANGUAGES[name].version or f"{first} --version")
    command = [toolchain(name)[tool], *arguments]
    tcl = "puts [info patchlevel]"  # it has no flag for that; the others don't read
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, input=tcl, capture_output=True, encoding="latin-1", timeout=30)
        if found := re.search(r"\d+(\.\d+)+\w*", done.stdout + done.stderr):
            return found[0]
    return "?"


# ---------------------------------------------------------------------------------------------
# Caches: what a toolchain can prepare once for all programs, which may only read it


def _cache_root() -> Path:
    """Where caches are; root's not at home, which may be closed to the user that programs run as."""
    base = "/var/cache" if os.geteuid() == 0 else Path.home() / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME", base)) / "parallel-sft-sandbox"


def _make_cache_root() -> None:
    """Open to all, whatever the caller's umask, which can't be changed for one thread."""
    subprocess.run(["mkdir", "-p", _cache_root()], umask=0o022, stderr=subprocess.DEVNULL)


@functools.cache
def cache(name: str, level: str = "namespaces") -> Path:
    """Where a language's prepared files are, for the toolchain and libraries as they are now and these commands."""
    language, tools = LANGUAGES[name], toolchain(name, level) or {}
    stamps = [(path, os.stat(os.path.realpath(path)).st_mtime) for path in tools.values()] + _libraries(name, True)
    return _cache_root() / f"{name}-{hashlib.sha256(repr((language, stamps)).encode()).hexdigest()[:16]}"


@functools.cache
def _warm(name: str, level: str) -> None:
    """Prepares a language's cache, if it has one, unless it is there. Raises OSError if that fails."""
    place, language = cache(name, level), LANGUAGES[name]
    if not language.warm or place.exists():
        return
    _make_cache_root()
    with tempfile.TemporaryDirectory(prefix="warm-", dir=place.parent) as temporary:
        env = {**os.environ, "HOME": temporary, "OUT": f"{temporary}/out", "CACHE": str(place)}
        os.mkdir(env["OUT"])
        command = ["/bin/sh", "-ec", language.warm]
        done = subprocess.run(command, env=env, cwd=temporary, umask=0o022, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"preparing {name}: {done.stderr[-500:]}")
        os.chmod(env["OUT"], 0o755)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(env["OUT"], place)


# ---------------------------------------------------------------------------------------------
# Comparing: what a problem demands of its answers

Checker = Callable[[dict, str], bool]  # (test, stdout) -> right?


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


# A program may write what a pattern is slow on: here and below each takes time in proportion to the text.
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def _same_token(expected: str, got: str, tolerance: float) -> bool:
    """A number too great to be told from infinity is equal to none but the same text."""
    if expected == got or not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(got)):
        return expected == got
    number = float(expected)
    return math.isfinite(number) and math.isclose(number, float(got), rel_tol=tolerance, abs_tol=tolerance)


def _close_numbers(expected: str, got: str, tolerance: float) -> bool:
    left, right = expected.split(), got.split()
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and all(_same_token(*pair, tolerance) for pair in pairs)


COMPARISONS: dict[str, Callable[[str, str, float], bool]] = {
    # equal but for white space at the ends of lines and blank lines at the end
    "lines": lambda expected, got, _: _lines(expected) == _lines(got),
    # white space only separates
    "tokens": lambda expected, got, _: expected.split() == got.split(),
    # the same, and numbers may differ by the tolerance, absolute or relative; all else, nan and inf too, is text
    "numbers": _close_numbers,
    "exact": lambda expected, got, _: expected == got,
}


@dataclass(frozen=True)
class Demands:
    """How a problem wants its answers run and compared: these fields of a record, where it has them.

    harness: by language the program around an answer. `«answer»` in it, once, is where the answer is put; `«word»` a
    word drawn anew for each job, which the harness has to print last, after its checks: an early exit or a
    caught exception prints none. A test's stdout, if given, is compared with what was printed before. An answer may
    begin with the harness's own first line (`<?php`, `package main`), which then counts once; Go's imports are
    gathered. What a harness does not protect against is said at the top of this file.
    """

    compare: str = "lines"  # one of COMPARISONS
    tolerance: float = 1e-6  # of "numbers"
    time_limit: float | None = None  # seconds per test, by the clock and of processor time
    memory_limit: float | None = None  # MB
    harness: dict[str, str] = field(default_factory=dict)

    def check(self, test: dict, stdout: str) -> bool:
        """Whether stdout is the test's, or one of them where it is a list."""
        accepted = [test["stdout"]] if isinstance(test["stdout"], str) else test["stdout"]
        return any(COMPARISONS[self.compare](text, stdout, self.tolerance) for text in accepted)


def is_text(value: object) -> bool:
    """Whether it is a text, and one that files and tokens can hold: JSON can write half a surrogate pair."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def are_texts(values: object) -> bool:
    return isinstance(values, list) and all(map(is_text, values))


def demands(record: dict) -> Demands:
    """A record's demands. Raises ValueError naming the field that is not valid, and the mend."""
    own = {f.name: record[f.name] for f in fields(Demands) if f.name in record}

    def need(name: str, right: Callable[[object], bool], mend: str) -> None:
        if name in own and not right(own[name]):
            raise ValueError(f"field {name!r}: give {mend}, or leave it out")

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9

    need("compare", lambda value: value in [*COMPARISONS], f"one of {', '.join(COMPARISONS)}")
    need("tolerance", number, "a number above 0")
    need("time_limit", number, "seconds, a number above 0")
    need("memory_limit", number, "MB, a number above 0")
    need("harness", lambda value: isinstance(value, dict), "an object from language to text")
    for name, text in own.get("harness", {}).items():
        if canonical(name) != name:
            raise ValueError(f"field 'harness.{name}': name it {canonical(name)}")
        if not isinstance(text, str) or text.count("«answer»") != 1 or "«word»" not in text:
            raise ValueError(f"field 'harness.{name}': give a text with «answer» once and «word»")
    return Demands(**own)


def tests_of(record: dict) -> tuple[list[dict], dict[str, str]]:
    """A record's tests and its harness: with one, tests may be lacking, or not say what is to be printed. Raises
    ValueError naming the field that is not valid, and the mend."""
    harness = demands(record).harness
    tests = record.get("tests", [{"stdin": ""}] if harness else None)
    if not isinstance(tests, list) or not tests:
        raise ValueError("field 'tests': give a list with at least one test")
    for i, test in enumerate(tests):
        stdout = test.get("stdout", "" if harness else None) if isinstance(test, dict) else None
        accepted = stdout if isinstance(stdout, list) else [stdout]
        if not (accepted and are_texts(accepted) and is_text(test.get("stdin", ""))):
            raise ValueError(f'field \'tests[{i}]\': give {{"stdin": text, "stdout": text or list of texts}}')
        if not are_texts(args := test.get("args", [])) or "\0" in "".join(args):
            raise ValueError(f"field 'tests[{i}].args': give a list of texts without NUL, or leave it out")
    return tests, harness


_GO_IMPORT = re.compile(r"^import\s*(?:\(([^)]*)\)|(.+))", re.M)


def _gather_go_imports(program: str) -> str:
    """Go wants imports before all else, each once, and none that nothing uses."""
    listed = "\n".join(a or b for a, b in _GO_IMPORT.findall(program))
    package, _, body = _GO_IMPORT.sub("", program).partition("\n")
    code = re.sub(r"//.*", "", body)
    used, names = [], {*re.findall(r"\b(\w+)\.", code)}
    for line in dict.fromkeys(map(str.strip, listed.split("\n"))):
        if found := re.match(r'(\w+\s+)?"(?:[^"]*/)?([^"/]+?)(?:/v\d+)?"', line):
            used += [f"import {found[0]}"] * ((found[1] or found[2]).strip() in names)
    return "\n".join([package, *used, body])


def _put(answer: str, harness: str, language: str, word: str) -> str:
    """The program that a harness makes of an answer. The word is put in first: an answer can't ask for it."""
    first, _, rest = answer.lstrip().partition("\n")
    if first.strip() == harness.lstrip().partition("\n")[0].strip():
        answer = rest
    program = harness.lstrip().replace("«word»", word).replace("«answer»", answer)
    return _gather_go_imports(program) if language == "go" else program


def _ends_with(word: str, check: Checker) -> Checker:
    """The word is the last thing printed, and what comes before is right if the test says what that is."""

    def right(test: dict, stdout: str) -> bool:
        before, found, after = stdout.rpartition(word)
        return bool(found) and not after.strip() and ("stdout" not in test or check(test, before))

    return right


# ---------------------------------------------------------------------------------------------
# Results


@dataclass(frozen=True)
class TestResult:
    """One test, or the compilation. Verdicts: ok, wrong_answer, compile_error, runtime_error, time_limit,
    memory_limit, output_limit."""

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
    """All tests of one program. The verdict is that of the first that is not ok, or no_toolchain, or
    internal_error where the sandbox itself failed."""

    verdict: str
    language: str
    tests: tuple[TestResult, ...] = ()
    compile: TestResult | None = None
    level: str = ""  # confinement in force, from LEVELS
    message: str = ""

    @property
    def passed(self) -> bool:
        """True only if there are tests, every one was run, and every output was right."""
        return self.verdict == "ok" and len(self.tests) > 0


# ---------------------------------------------------------------------------------------------
# Messages between the caller and a helper: a line of JSON, then raw bytes


def _message(header: dict, *blobs: bytes) -> bytes:
    head = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    return b"\n".join([head, b"".join(blobs)])


def _receive(stream: BinaryIO) -> tuple[dict, list[bytes]]:
    """The next message. Raises EOFError where the other side has gone."""
    if not (line := stream.readline()).endswith(b"\n"):
        raise EOFError("the other side has gone")
    header = json.loads(line)
    sizes = header.pop("blobs")
    blobs = [stream.read(size) for size in sizes]
    if [len(blob) for blob in blobs] != sizes:
        raise EOFError("the other side has gone")
    return header, blobs


def _encode(text: str) -> bytes:
    """UTF-8; bytes that surrogateescape kept become themselves again, and no other lone surrogate is an error."""
    with contextlib.suppress(UnicodeEncodeError):
        return text.encode("utf-8", "surrogateescape")
    return text.encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------
# The kernel, through ctypes

_libc = ctypes.CDLL(None, use_errno=True)
_ARCH = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)

_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC = 2, 4, 4096, 16384
_MS_PRIVATE, _MNT_DETACH = 1 << 18, 2
_NEW_NS, _NEW_TIME = 0x00020000, 0x80
_NEW_ALL = 0x10000000 | _NEW_NS | 0x20000000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SUBREAPER, _PR_NO_NEW_PRIVS = (1, 4, 36, 38)


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _syscall(name: str, number: int, *args) -> int:
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _checked(name, _libc.syscall(ctypes.c_long(number), *words))


def _prctl(option: int, value) -> None:
    _checked(f"prctl {option}", _libc.prctl(option, value, 0, 0, 0))


def _seccomp(program) -> int:
    """Filters system calls from now on; the descriptor on which to be asked about some."""
    mode_filter, new_listener = 1, 8
    return _syscall("seccomp", _SECCOMP[_ARCH], mode_filter, new_listener, program)


def _mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    arguments = [text.encode() for text in (source, target, kind)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), data.encode())
    _checked(f"mount {target}", result)


def _unmount(target: str) -> None:
    _checked(f"unmount {target}", _libc.umount2(target.encode(), _MNT_DETACH))


def _read_only(path: str, *, recursive: bool = True) -> None:
    """Makes a mount, and those under it, read-only and without setuid programs."""
    here, at_recursive = -100, 0x8000 if recursive else 0
    attributes = struct.pack("QQQQ", 1 | 2, 0, 0, 0)  # MOUNT_ATTR_RDONLY | NOSUID
    _syscall(f"read-only {path}", _REFUSED["mount_setattr"][_ARCH], here, path.encode(), at_recursive, attributes, 32)


# ---------------------------------------------------------------------------------------------
# System calls refused to programs (seccomp)

# On x86-64 and on 64-bit ARM; None where the architecture has no such call.
_REFUSED = {
    # memory and messages outside the limits
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmdt": (67, 197), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191),
    "mq_open": (240, 180), "mq_unlink": (241, 181), "io_setup": (206, 0),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "kcmp": (312, 272),
    "move_pages": (279, 239), "migrate_pages": (256, 238),
    # mounts, namespaces, and the whole machine
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "sethostname": (170, 161),
    "setdomainname": (171, 162), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "syslog": (103, 116), "vhangup": (153, 58), "lookup_dcookie": (212, 18), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "uselib": (134, None),
    # large or young parts of the kernel
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "fanotify_init": (300, 262),
    "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446),
    "inotify_init": (253, None), "inotify_init1": (294, 26),  # a user may have but so many watches
}  # fmt: skip
# Answered as by a file system that has no such attributes: they outlast a program, and some are inherited.
_UNSUPPORTED = {"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
                "lremovexattr": (198, 15), "fremovexattr": (199, 16)}  # fmt: skip
# Done only with these values of an argument, else answered with an error: (numbers, which argument, values, error).
# Local sockets alone; one's own limits; of files what every kind of file has, not their owners, leases and flags.
_ONLY = {
    "socket": ((41, 198), 0, (1,), errno.EPERM),
    "socketpair": ((53, 199), 0, (1,), errno.EPERM),
    "prlimit64": ((302, 261), 0, (0,), errno.EPERM),
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), errno.ENOTTY),
    "fcntl": ((72, 25), 1, (*range(8), 9, 36, 37, 38, *range(1030, 1035)), errno.EPERM),
}
# Not done, but answered with success: a runtime may ask for its threads, a program for others'.
_IGNORED = {"sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "setpriority": (141, 140),
            "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30)}  # fmt: skip
# Where no mount namespace hides the host's files: refused, or asked of the runner, which does it in the program's place
# to files of its own. openat2, whose flags are in memory, and fchmodat2 are lacking: libc does without.
_HOST_REFUSED = {
    "socket": (41, 198), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "pidfd_send_signal": (424, 424),
}  # fmt: skip
_ATTRIBUTES = {"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "utimensat": (280, 88),
               "truncate": (76, 45)}  # fmt: skip
# Asked of the runner where Landlock can't keep signals inside (before its version 6).
_SIGNALLING = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
               "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240)}  # fmt: skip
# Asked of the runner, which counts it: shared memory stays in use when no process's page tables show it any more.
_MMAP = {"mmap": (9, 222)}
_HOST_LACKING = {"fchmodat2": (452, 452), "openat2": (437, 437)}
_ASKED = {numbers[_ARCH or 0]: name for name, numbers in (_ATTRIBUTES | _SIGNALLING | _MMAP).items()}
_SECCOMP, _NOTICE, _REPLY = (317, 277), 0xC0502100, 0xC0182101  # the last two are requests to ioctl
_CLONE, _CLONE3 = (56, 220), (435, 435)
_NEWEST = 462  # mseal; what the kernel has learnt since is lacking here until someone has judged it
_OPEN, _OPENAT = (2, None), (257, 56)

_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
_LOAD, _AND, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_BITS, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_PERMIT, _KILL = (_RETURN, 0, 0, 0x7FFF0000), (_RETURN, 0, 0, 0x80000000)
_REFUSE, _LACK, _IGNORE, _UNSUPPORT = (
    (_RETURN, 0, 0, 0x00050000 | error) for error in (errno.EPERM, errno.ENOSYS, 0, errno.ENOTSUP)
)
_ASK = (_RETURN, 0, 0, 0x7FC00000)


def _argument(index: int) -> tuple:
    return _LOAD, 0, 0, 16 + 8 * index


def _only(index: int, values: Iterable[int], error: int) -> list[tuple]:
    tests = [line for value in values for line in ((_JUMP_EQUAL, 0, 1, value), _PERMIT)]
    return [_argument(index), *tests, (_RETURN, 0, 0, 0x00050000 | error)]


def _rules(host: bool, signals: bool) -> dict[int | None, list[tuple]]:
    """What the filter does at each system call that is not simply allowed. host: the host's files are in sight;
    signals: ask about them."""
    tables = [(_REFUSED, _REFUSE), (_UNSUPPORTED, _UNSUPPORT), (_IGNORED, _IGNORE)]
    if host:
        tables += [(_HOST_REFUSED, _REFUSE), (_HOST_LACKING, _LACK), (_ATTRIBUTES, _ASK)]
    if signals:
        tables += [(_SIGNALLING, _ASK)]
    rules = {numbers[_ARCH]: _only(*rule) for numbers, *rule in _ONLY.values()}
    rules |= {numbers[_ARCH]: [answer] for table, answer in tables for numbers in table.values()}
    if host:
        # A pair of datagram sockets may send to any other.
        stream = [_argument(1), (_AND, 0, 0, 15), (_JUMP_EQUAL, 1, 0, 1), (_JUMP_EQUAL, 0, 1, 5), _PERMIT, _REFUSE]
        rules[_ONLY["socketpair"][0][_ARCH]] = [_argument(0), (_JUMP_EQUAL, 1, 0, 1), _REFUSE, *stream]
        # Before version 3 Landlock does not see files being shortened on opening for reading.
        for numbers, index in ((_OPEN, 1), (_OPENAT, 2)):
            both = (_AND, 0, 0, os.O_TRUNC | os.O_ACCMODE)
            neither = [(_JUMP_EQUAL, 1, 0, os.O_TRUNC), (_JUMP_EQUAL, 0, 1, os.O_TRUNC | os.O_ACCMODE)]
            rules[numbers[_ARCH]] = [_argument(index), both, *neither, _REFUSE, _PERMIT]
    rules[_MMAP["mmap"][_ARCH]] = [_argument(3), (_JUMP_BITS, 0, 1, 1), _ASK, _PERMIT]  # MAP_SHARED
    rules[_CLONE[_ARCH]] = [_argument(0), (_JUMP_BITS, 0, 1, _NEW_ALL | _NEW_TIME), _REFUSE, _PERMIT]
    rules[_CLONE3[_ARCH]] = [_LACK]  # libc falls back to clone
    rules.pop(None, None)
    return rules


def _filter(host: bool = False, signals: bool = False):
    """The struct sock_fprog, to be given to _seccomp; arguments as for _rules. Foreign calling conventions, which
    number the calls differently, end the program."""
    start = [(_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[_ARCH]), _KILL]
    x32 = [(_JUMP_GREATER_EQUAL, 0, 1, 0x40000000), _KILL] if _ARCH == 0 else []
    young = [(_JUMP_GREATER_EQUAL, 0, 1, _NEWEST + 1), _LACK]
    rules = [[(_JUMP_EQUAL, 0, len(body), number), *body] for number, body in _rules(host, signals).items()]
    code = [*start, (_LOAD, 0, 0, 0), *x32, *young, *itertools.chain(*rules), _PERMIT]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(text)))
    program.text = text  # keeps it alive
    return program


# ---------------------------------------------------------------------------------------------
# Landlock: which files a program may open, where there are no mount namespaces

_READ, _WRITE_FILE = 1 | 4 | 8, 2
_ALL_BY_VERSION = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}  # 5 and later: 0xFFFF
_FILE_ONLY = 1 | 2 | 4 | 0x4000


def _landlock_version() -> int:
    """Raises OSError where the kernel has no Landlock."""
    return _syscall("landlock", _REFUSED["landlock_create_ruleset"][_ARCH], None, 0, 1)


def _landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Confines this process and its children to these files, for good."""
    version = _landlock_version()
    everything = _ALL_BY_VERSION.get(version, 0xFFFF)
    # Older kernels know fewer of these fields, and take the longer structure while the rest is zero.
    attributes = struct.pack("QQQ", everything, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = _syscall("landlock", _REFUSED["landlock_create_ruleset"][_ARCH], attributes, len(attributes), 0)
    access = dict.fromkeys(readable, _READ) | dict.fromkeys(writable, everything)
    access |= dict.fromkeys(("/dev/null", "/dev/zero", "/dev/full"), _READ | _WRITE_FILE)
    for path, allowed in access.items():
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed if os.path.isdir(path) else allowed & _FILE_ONLY, place)
        _syscall(f"landlock {path}", _REFUSED["landlock_add_rule"][_ARCH], rules, 1, rule, 0)
        os.close(place)
    _syscall("landlock", _REFUSED["landlock_restrict_self"][_ARCH], rules, 0)
    os.close(rules)


# ---------------------------------------------------------------------------------------------
# The runner: starts programs, one at a time, watches them, and ends all that they have started

_TICK = 0.02  # seconds between looks at memory and processor time
_CORES = os.cpu_count() or 1
_STACK = 64  # MB
_PROCESSORS = 8  # that a program may use
_RESERVE = 16 << 10  # MB of address space that a program may take without using it
_FILES = 4096  # in the scratch directory, and in that of the program
_BOX = 256  # MB of a program, built
_DESCRIPTORS = 256  # that a process may have: nothing counts what sockets hold
_OUT_OF_MEMORY = re.compile(
    rb"out of memory|OutOfMemory|heap exhausted|cannot allocate|allowed memory size|failed to allocate", re.IGNORECASE
)


def _patience(wall: float) -> float:
    """The most seconds that waiting for a busy processor, perhaps for one's own children, adds to a wall limit."""
    return min(10 * wall, 300.0)


@dataclass
class _Run:
    """A program that runs, and what is known of it."""

    step: dict  # its command and limits, see _Job.step
    began: float  # on the monotonic clock
    pid: int
    streams: dict[int, bytearray]  # read so far from stdout and stderr, by descriptor
    listener: int | None  # where its filter asks
    trouble: str  # why it could not be started
    verdict: str = ""
    message: str = ""
    code: int = 0  # at the end: its exit code, or minus the signal's number
    memory: int = 0  # most bytes seen
    shared: int = 0  # bytes of memory mapped to be shared, ever
    cpu: float = 0.0  # at the end: seconds of processor time, of all processes
    times: dict[int, float] = field(default_factory=dict)  # seconds of processor time by process, ended ones' too
    patience: float = 0.0  # seconds added to the wall limit
    ran: float = -1.0  # seconds, at the last look past the wall limit
    had_waited: float = field(default_factory=lambda: _schedule(os.getpid())[1])  # the runner, before the program

    def due(self) -> float:
        """When the wall limit is reached."""
        return self.began + self.step["wall"] + self.patience

    def end(self, verdict: str, message: str) -> None:
        if not self.verdict:
            self.verdict, self.message = verdict, message

    def read(self, fd: int) -> bool:
        """False where there is no more for now, or beyond what may be written."""
        stream, limit = self.streams[fd], self.step["output"]
        try:
            part = os.read(fd, min(1 << 16, limit + 1 - len(stream)))
        except BlockingIOError:
            return False
        stream += part
        if len(stream) > limit:
            self.end("output_limit", f"more than {limit} bytes")
            del stream[limit:]
            return False
        return bool(part)

    def close(self) -> None:
        """Reads what is left in the pipes, and closes all."""
        for fd in self.streams:
            while self.read(fd):
                pass
            os.close(fd)
        if self.listener is not None:
            os.close(self.listener)

    def excused(self, members: list[int]) -> bool:
        """Whether a program past its wall limit only waited for a busy processor, or for the runner, which reads what
        it writes. Waiting is counted once it is over: one that is ready and hasn't run since the last look, waits."""
        schedules = _each(_schedule, members)
        ran = sum(schedule[0] for schedule in schedules)
        ready = any(schedule[2] for schedule in schedules)
        starved = ready and (self.ran < 0 or ran == self.ran)
        waited = max((schedule[1] for schedule in schedules), default=0.0)
        self.ran, self.patience = ran, waited + _schedule(os.getpid())[1] - self.had_waited
        now, longest = time.monotonic(), self.step["wall"] + _patience(self.step["wall"])
        return now < self.began + longest and (starved or now < self.due())

    def used(self, members: list[int]) -> float:
        """Processor time, seconds, from /proc: at least that of each process at the last look that saw it, and at
        least that of those living now and the children they have waited for."""
        ticks = _each(_ticks, members)
        self.times |= {pid: own for pid, own, _ in ticks}
        return max(sum(self.times.values()), sum(own + waited for _, own, waited in ticks))


def _stat(place: str | Path) -> list[bytes]:
    """Of a process or thread, what follows its name, which may hold any bytes; its state comes first."""
    return Path(place, "stat").read_bytes().rpartition(b")")[2].split()


def _ticks(pid: int) -> tuple[int, float, float]:
    """Process, its processor time and that of the children it has waited for, seconds."""
    user, system, *waited = (int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in _stat(f"/proc/{pid}")[11:15])
    return pid, user + system, sum(waited)


def _kilobytes(place: Path, names: bytes) -> int:
    """The sum of these lines, which are in kB, in bytes."""
    return sum(int(kb) for kb in re.findall(rb"(?:%s):\s+(\d+)" % names, place.read_bytes())) << 10


def _memory(pid: int, *, fair: bool = False) -> int:
    """Memory of a process but for mapped files, with the tables that map it, bytes. fair: pages that processes share
    are divided among them; slow."""
    thread = Path(f"/proc/{pid}/task", max(os.listdir(f"/proc/{pid}/task"), key=int))  # the first may have ended
    with contextlib.suppress(PermissionError):
        if fair:
            pages = _kilobytes(thread / "smaps_rollup", b"Pss_Anon|Pss_Shmem|SwapPss")
            return pages + _kilobytes(thread / "status", b"VmPTE")
    return _kilobytes(thread / "status", b"RssAnon|RssShmem|VmSwap|VmPTE")


def _same_memory(pid: int, other: int) -> bool:
    """Whether one is the other before it turns into a program, as vfork leaves it."""
    kinds_of_memory = 1
    return _libc.syscall(_REFUSED["kcmp"][_ARCH or 0], pid, other, kinds_of_memory, 0, 0) == 0


def _schedule(pid: int) -> tuple[float, float, bool]:
    """Seconds that a process's threads ran, the longest that one of them was ready but had no
    processor, and whether one is running or ready now."""
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    times = [list(map(int, (thread / "schedstat").read_text().split())) for thread in threads]
    ready = any(_stat(thread)[0] == b"R" for thread in threads)
    return sum(ran for ran, *_ in times) / 1e9, max(waited for _, waited, _ in times) / 1e9, ready


def _each(measure: Callable, pids: Iterable) -> list:
    values = []
    for pid in pids:
        with contextlib.suppress(OSError, IndexError, ValueError):  # it has just ended
            values.append(measure(pid))
    return values


def _deaths(kill_all: Callable[[], None]) -> Iterator[tuple]:
    """Of every child, and of those that were left to this process by their parents' death, until the kernel knows of
    none: (process, wait status, resources used)."""
    with contextlib.suppress(ChildProcessError):
        while True:
            kill_all()
            death = os.wait4(-1, 0)
            while death[0]:
                yield death
                death = os.wait4(-1, os.WNOHANG)


def _sealed(data: bytes) -> int:
    """A file of these bytes that can't be changed, to read standard input from: unlike a pipe
    it never fills, and is never left half read."""
    source = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(source, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(source, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(source, fcntl.F_ADD_SEALS, seals)
    return source


def _set_limits(step: dict, pid: int = 0) -> None:
    """Limits of a process, by default this one, beside those on all together that the runner keeps."""
    mb, cpu = 1 << 20, int(step["cpu"]) + 2
    # Of address space more than of memory: it is cheap and runtimes reserve much of it; what is used is watched.
    limits = {"CORE": 0, "MSGQUEUE": 0, "MEMLOCK": 64 << 10, "NOFILE": _DESCRIPTORS, "NPROC": step["processes"]}
    limits |= {"CPU": cpu, "FSIZE": step["files"] * mb, "DATA": (step["memory"] + _RESERVE) * mb}
    for name, value in limits.items():
        resource.prlimit(pid, getattr(resource, f"RLIMIT_{name}"), (value, value))


def _signal_name(number: int) -> str:
    """Real-time signals have no names."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


class _Runner:
    """What the runners of all levels do. A level's own adds its directories (new_directory, close_box, end_scratch,
    stored_too_much), its processes (members, kill_all) and its confinement (filter, confine)."""

    def __init__(self, sock: socket.socket, settings: dict):
        self.sock, self.requests = sock, sock.makefile("rb")
        self.box, self.tmp = settings["box"], settings["tmp"]  # directories as the programs see them
        _prctl(_PR_NO_NEW_PRIVS, 1)

    def serve(self) -> None:
        """Answers requests until the caller goes."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                request, blobs = _receive(self.requests)
                try:
                    reply, streams = self.answer(request, blobs[0])
                except OSError as error:
                    reply, streams = {"verdict": "internal_error", "message": str(error)}, (b"", b"")
                self.sock.sendall(_message(reply, *streams))

    def answer(self, request: dict, blob: bytes) -> tuple[dict, tuple]:
        """Runs one test, or writes a program and compiles it: (what came of it, its streams)."""
        if request["op"] == "test":
            return self.execute(request["step"], blob)
        self.new_directory(self.box, _BOX)
        Path(self.box, request["file"]).write_bytes(blob)
        answer = self.execute(request["step"], b"") if request["step"] else ({"verdict": "ok"}, (b"", b""))
        self.close_box()
        return answer

    def execute(self, step: dict, stdin: bytes) -> tuple[dict, tuple]:
        """Runs one program to its end and clears up after it."""
        self.new_directory(self.tmp, step["files"])
        run = self.start(step, stdin)
        try:
            if not run.trouble:
                self.watch(run)
        finally:
            self.reap(run)
            run.close()
            self.end_scratch()
        return self.report(run)

    def start(self, step: dict, stdin: bytes) -> _Run:
        """Returns when the new process has turned into the program, or could not."""
        source, out, err, (ours, theirs) = _sealed(stdin), os.pipe(), os.pipe(), socket.socketpair()
        pid, listener = self.launch(step, (source, out[1], err[1]), ours, theirs)
        began = time.monotonic()
        theirs.close()
        for end in (source, out[1], err[1]):
            os.close(end)
        for pipe, _ in (out, err):
            os.set_blocking(pipe, False)  # the kernel may hold the other end when all processes have gone
        trouble = b""
        with ours:
            while (said := socket.recv_fds(ours, 1 << 12, 1))[0]:
                trouble, listener = trouble + said[0].strip(b"\0"), (*said[1], listener)[0]
        streams = {out[0]: bytearray(), err[0]: bytearray()}
        return _Run(step, began, pid, streams, listener, trouble.decode("utf-8", "replace"))

    def launch(self, step: dict, streams: tuple, ours: socket.socket, theirs: socket.socket) -> tuple[int, int | None]:
        """A process that becomes the program, and where its filter asks if that is known. The process says on
        `theirs` what else there is to say, and closes it."""
        if (pid := os.fork()) == 0:
            self.become(step, streams, theirs)
        return pid, None

    def become(self, step: dict, streams: tuple[int, int, int], trouble: socket.socket) -> None:
        """In the new process: gives up all it can and turns into the program, which closes `trouble`. Whatever can't
        be done is said there; the program doesn't start without it."""
        try:
            os.setsid()
            for target, fd in enumerate(streams):
                os.dup2(fd, target)
            os.chdir(step["cwd"])
            self.confine(step)
            if self.filter:
                socket.send_fds(trouble, [b"\0"], [_seccomp(self.filter)])
            try:
                os.execve(step["argv"][0], step["argv"], step["env"])
            except OSError as error:
                if not step["argv"][0].startswith(f"{self.box}/"):
                    raise
                os.write(2, str(error).encode())  # it was built from a text that makes no program, or spoilt itself
                os._exit(126)
        except BaseException as error:
            trouble.send(f"{type(error).__name__}: {error}".encode())
            os._exit(127)

    def watch(self, run: _Run) -> None:
        """Collects output and answers the filter until the program ends or a limit is passed."""
        alive, poll = os.pidfd_open(run.pid), select.poll()
        for fd in (*run.streams, alive, run.listener):
            if fd is not None:
                poll.register(fd, select.POLLIN)
        poll.register(self.sock, select.POLLRDHUP)
        next_look = run.began + _TICK
        try:
            while not run.verdict:
                ready = dict(poll.poll(max(0, next_look - time.monotonic()) * 1000))
                if self.sock.fileno() in ready:
                    raise EOFError("the caller has gone")
                if alive in ready:
                    return
                for fd, events in ready.items():
                    if fd == run.listener and events & select.POLLIN:
                        self.decide(run)
                    elif fd == run.listener or not run.read(fd):
                        poll.unregister(fd)
                if time.monotonic() >= next_look:
                    self.look(run)
                    next_look = min(time.monotonic() + _TICK, max(run.due(), time.monotonic() + _TICK / 4))
        finally:
            os.close(alive)

    def decide(self, run: _Run) -> None:
        """Answers a system call about which the filter asks."""
        call, go_on = bytearray(80), 1
        with contextlib.suppress(OSError):  # the process has been killed meanwhile
            fcntl.ioctl(run.listener, _NOTICE, call)
            number_of_call, pid, _, number, _, _, *arguments = struct.unpack("=QIIiIQ6Q", call)
            error, name = 0, _ASKED[number]
            if name in _MMAP:
                anonymous, fd = arguments[3] & 0x20, ctypes.c_int(arguments[4]).value
                if anonymous or not os.path.isfile(f"/proc/{pid}/fd/{fd}"):  # memory, and no file
                    run.shared += arguments[1]
            elif name in _SIGNALLING:
                error = 0 if self.is_own(ctypes.c_int(arguments[0]).value) else errno.EPERM
            else:
                error, go_on = self.set_attributes(run.step, pid, name, arguments), 0
            fcntl.ioctl(run.listener, _REPLY, struct.pack("=QqiI", number_of_call, 0, -error, go_on and not error))

    def look(self, run: _Run) -> None:
        """Ends the watch if the program has passed a limit. Looking may take seconds where many processes leave this
        one little of the processor: hence the clock is read anew, and nothing is looked at once there is a verdict."""
        step, members = run.step, self.members()
        if time.monotonic() > run.due() and not run.excused(members):
            run.end("time_limit", f"{step['wall']} s by the clock")
        elif (time.monotonic() - run.began) * _CORES > step["cpu"] and run.used(members) > step["cpu"]:
            run.end("time_limit", f"{step['cpu']} s of processor time")
        elif self.short_of_memory(run, members):
            run.end("memory_limit", f"{step['memory']} MB")
        elif self.stored_too_much(step):
            run.end("output_limit", f"more than {step['files']} MB in files")

    def short_of_memory(self, run: _Run, members: list[int]) -> bool:
        """Whether the run uses more than its limit; looks closely, at what is shared, only where it may."""
        limit, used = run.step["memory"] << 20, max(run.shared, sum(_each(_memory, members)))
        if used > limit:
            owners: list[int] = []
            for pid in members:
                if not any(_same_memory(pid, owner) for owner in owners):
                    owners.append(pid)
            used = max(run.shared, sum(_each(functools.partial(_memory, fair=True), owners)))
        run.memory = max(run.memory, used)
        return used > limit

    def reap(self, run: _Run) -> None:
        """Ends every process that is left."""
        for pid, status, usage in _deaths(self.kill_all):
            if pid == run.pid:
                run.code = os.waitstatus_to_exitcode(status)
            run.cpu += usage.ru_utime + usage.ru_stime
            run.memory = max(run.memory, usage.ru_maxrss << 10)

    def report(self, run: _Run) -> tuple[dict, tuple]:
        """What is sent back of a program that has ended: (verdict and figures, its streams)."""
        out, err = map(bytes, run.streams.values())
        code, name = (run.code, "") if run.code >= 0 else (None, _signal_name(-run.code))
        how = f"ended by {name}" if name else f"exit code {code}"
        # Anybody may send the signal or write the words: they count where the time, or most of the memory, is used.
        late, full = run.cpu > run.step["cpu"], 0 < 0.75 * (run.step["heap"] << 20) < run.memory
        if run.trouble:
            run.verdict, run.message = "internal_error", run.trouble
        elif code == 0:
            run.end("ok", "")
        elif late and run.code == -signal.SIGXCPU:
            run.end("time_limit", how)
        elif full and (name or _OUT_OF_MEMORY.search(err[-(1 << 16) :])):
            run.end("memory_limit", how)
        else:
            run.end("runtime_error", how)
        outcome = {"verdict": run.verdict, "message": run.message, "exit_code": code, "signal": name}
        return outcome | {"wall": time.monotonic() - run.began, "cpu": run.cpu, "memory": run.memory}, (out, err)


# ---------------------------------------------------------------------------------------------
# Level `namespaces`

_MADE_UP = {"passwd": "user:x:1000:1000::/tmp:/bin/sh\n", "group": "user:x:1000:\n", "hosts": "127.0.0.1 localhost\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n"}  # fmt: skip
_DEVICES = ("null", "zero", "full", "random", "urandom")


def _show(path: str, top: str) -> None:
    """Makes a host file or directory appear, read-only, at its own path under top."""
    target = top + path
    if os.path.lexists(target) or not os.path.lexists(path):
        return  # it lies in one that is there already, or the host has none
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        Path(target).touch()
    _mount(path, target, "", _MS_BIND | _MS_REC)
    _read_only(target)


def _build_root(top: str, paths: Iterable[str]) -> None:
    """A root directory with the toolchains and a few devices, and nothing else of the host."""
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", top, "tmpfs", _MS_NOSUID, "size=4m,nr_inodes=8192,mode=755")
    for name in ("box", "tmp", "proc", "dev", "etc"):
        os.mkdir(f"{top}/{name}")
    for path in paths:
        _show(path, top)
    for name in _DEVICES:
        Path(f"{top}/dev/{name}").touch()
        _mount(f"/dev/{name}", f"{top}/dev/{name}", "", _MS_BIND)
    for name, number in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        os.symlink(f"/proc/self/fd{number}", f"{top}/dev/{name}")
    os.symlink("/tmp", f"{top}/dev/shm")
    for name, text in _MADE_UP.items():
        Path(f"{top}/etc/{name}").write_text(text)
    os.makedirs(f"{top}/sys/devices/system/cpu")
    Path(f"{top}/sys/devices/system/cpu/online").write_text(f"0-{len(os.sched_getaffinity(0)) - 1}\n")


def _drop_to(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _spare_uid() -> int:
    """A user id that nobody has and no other helper uses; that of nobody if the caller's own
    user namespace is too small for it."""
    wanted = (1 << 21) + os.getpid()
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, _, count = map(int, line.split())
        if inside <= wanted < inside + count:
            return wanted
    return 65534


def _enter_namespaces(top: str, paths: Iterable[str]) -> socket.socket:
    """Returns in a new process: the first of its own process namespace, in a private root. What it returns leads to
    its parent, which no program can see; the parent's children are of the new namespace, too."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    as_root = os.geteuid() == 0
    if as_root:  # builds first, from directories that others may not enter
        _checked("unshare", _libc.unshare(_NEW_NS))
        _build_root(top, paths)
        _drop_to(_spare_uid())
        _prctl(_PR_SET_DUMPABLE, 1)  # /proc/self/uid_map must be ours to write
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    uid, gid = os.getuid(), os.getgid()
    _checked("unshare", _libc.unshare(_NEW_ALL))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"1000 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"1000 {gid} 1")
    if not as_root:
        _build_root(top, paths)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        ours.close()
        _wait_to_be_copied(theirs)
    theirs.close()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _settle(top)
    return ours


def _wait_to_be_copied(sock: socket.socket) -> None:
    """The rest of the parent's life: it waits until the runner ends, or sends a command that can be copied, and turns
    into that, with a program's streams and filter."""
    try:
        text, streams, *_ = socket.recv_fds(sock, 1 << 16, 3)
        if text:
            argv, env = json.loads(text)
            _prctl(_PR_NO_NEW_PRIVS, 1)
            for target, fd in enumerate((*streams, sock.fileno())):
                os.dup2(fd, target)
            os.set_inheritable(3, True)
            socket.send_fds(sock, [b"."], [_seccomp(_filter())])
            os.closerange(4, _DESCRIPTORS)  # those that came are inherited
            os.execve(argv[0], argv, env)
    except Exception as error:
        print(f"sandbox helper: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)


def _settle(top: str) -> None:
    """Moves process 1 into the root directory that was built."""
    _mount(top, top, "", _MS_BIND | _MS_REC)
    noexec, hide_others = 8, "hidepid=2"
    _mount("proc", f"{top}/proc", "proc", _MS_NOSUID | _MS_NODEV | noexec, hide_others)
    os.chdir(top)
    _syscall("pivot_root", _REFUSED["pivot_root"][_ARCH], b".", b".")
    _unmount(".")
    os.chdir("/")
    with contextlib.suppress(OSError):  # older kernels hide it; what waits to be accepted holds memory
        Path("/proc/sys/net/core/somaxconn").write_text("8")
    _read_only("/proc", recursive=False)
    _read_only("/", recursive=False)
    socket.sethostname("sandbox")
    _prctl(_PR_SET_DUMPABLE, 0)  # programs share our user: keep them out of /proc/1


class _NamespaceRunner(_Runner):
    """Process 1 of a world that it alone outlives: work directories are file systems of their
    own and kill(-1) reaches every program. An interpreter that can be copied is the runner's parent."""

    def __init__(self, sock: socket.socket, settings: dict, parent: socket.socket):
        super().__init__(sock, settings)
        self.filter, self.parent = _filter(), parent
        self.command = None  # what the parent has turned into, once it has
        self.listener: int  # where it and its copies ask, from then on

    def launch(self, step: dict, streams: tuple, ours: socket.socket, theirs: socket.socket) -> tuple[int, int | None]:
        """By a copy of the parent, if the step asks for one and the parent is, or can become, its command."""
        command = [step["argv"], step["env"]]
        if not step.get("copied") or self.command not in (None, command):
            return super().launch(step, streams, ours, theirs)
        if self.command is None:
            self.start_parent(command, streams)
        socket.send_fds(self.parent, [b"."], [*streams, theirs.fileno()])
        theirs.close()
        self.hear(self.parent)  # it has forked
        pid = int(self.hear(ours))
        _set_limits(step, pid)
        ours.send(b".")
        return pid, os.dup(self.listener)

    def start_parent(self, command: list, streams: tuple) -> None:
        """Has the parent turn into the command, on streams of the kind that the copies will have."""
        socket.send_fds(self.parent, [json.dumps(command).encode()], streams)
        _, (self.listener,), *_ = socket.recv_fds(self.parent, 1, 1)
        os.set_inheritable(self.listener, False)
        self.hear(self.parent)  # it is ready
        self.command = command

    def hear(self, sock: socket.socket) -> bytes:
        """What the parent or a copy says; meanwhile answers what its filter asks. Raises OSError where it has gone,
        EOFError where the caller has."""
        poll, unlimited = select.poll(), _Run({}, 0, 0, {}, self.listener, "", had_waited=0)
        for fd, events in ((sock, select.POLLIN), (self.listener, select.POLLIN), (self.sock, select.POLLRDHUP)):
            poll.register(fd, events)
        while sock.fileno() not in (ready := dict(poll.poll())):
            if self.sock.fileno() in ready:
                raise EOFError("the caller has gone")
            self.decide(unlimited)
        if not (said := sock.recv(16)):
            raise OSError("the interpreter that is copied has gone")
        return said

    confine = staticmethod(_set_limits)

    def new_directory(self, path: str, mb: int) -> None:
        with contextlib.suppress(OSError):  # the first has nothing to replace
            _unmount(path)
        _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={mb}m,nr_inodes={_FILES},mode=755")

    def close_box(self) -> None:
        _read_only(self.box, recursive=False)

    def end_scratch(self) -> None:
        _unmount(self.tmp)

    def stored_too_much(self, step: dict) -> bool:
        return False  # the file systems are sized

    def members(self) -> list[int]:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]

    def kill_all(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------
# Levels `landlock` and `none`: programs share the host's process table and file systems

_VISIBLE = ("/dev/random", "/dev/urandom", "/proc", "/sys/devices/system/cpu", "/etc/passwd", "/etc/group",
            "/etc/nsswitch.conf", "/etc/localtime")  # fmt: skip


def _descendants(pid: int) -> list[int]:
    """Processes below pid, those that have ended but not all of whose threads have among them."""
    found = [pid]
    for parent in found:  # grows on the way
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, task.read_text().split())
    return found[1:]


def _end_descendants() -> None:
    """Those that a look finds. Stopped first, so that they don't multiply meanwhile."""
    pids = _descendants(os.getpid())
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, number)


def _tasks_of(uid: int) -> int:
    """Threads that a user has now: the kernel counts them against the process limit."""
    count = 0
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
    return count


@contextlib.contextmanager
def _held(place: str, flags: int, tops: Iterable[str]) -> Iterator[str]:
    """A path that leads to this file whatever becomes of its name. Raises OSError if it is below none of tops."""
    file = os.open(place, os.O_PATH | flags)
    try:
        path = f"/proc/self/fd/{file}"
        if not f"{os.readlink(path)}/".startswith(tuple(f"{top}/" for top in tops)):
            raise PermissionError(errno.EPERM, place)
        yield path
    finally:
        os.close(file)


def _below(directory: str) -> Iterator[os.DirEntry]:
    """All that is in a directory and in those below; what is closed to us is opened."""
    places = [directory]
    for place in places:  # grows on the way
        with contextlib.suppress(OSError):  # it has just been removed
            with contextlib.suppress(OSError), _held(place, os.O_NOFOLLOW, [directory]) as path:
                if os.stat(path).st_mode & 0o500 != 0o500:
                    os.chmod(path, 0o700)
            for entry in list(os.scandir(place)):
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    places.append(entry.path)


def _peek(memory: BinaryIO, address: int, count: int) -> bytes:
    """Of a process's memory, or a part of that where it ends."""
    return os.pread(memory.fileno(), count, address & (1 << 63) - 1)


class _LandlockRunner(_Runner):
    """Adopts what its programs leave, and kills by descent. Programs are kept from signalling others, this process
    among them, by Landlock (from version 6 on) or by having to ask. At level `none` all that is left out."""

    def __init__(self, sock: socket.socket, settings: dict):
        super().__init__(sock, settings)
        self.confined, self.workers = settings["level"] == "landlock", settings["workers"]
        self.own_user = settings["own_user"]  # that nobody else is
        self.readable = [*filter(os.path.exists, (*_VISIBLE, *settings["paths"]))]
        # In /dev/shm a user of its own reaches of others' files what any user may.
        self.common = [path for path in ("/dev/shm",) if self.own_user and os.path.isdir(path)]
        self.filter = _filter(host=True, signals=_landlock_version() < 6) if self.confined else None
        _prctl(_PR_SUBREAPER, 1)

    def confine(self, step: dict) -> None:
        # The kernel counts all processes of a user: those there are, and what every worker may start.
        crowd = 1 if self.own_user else _tasks_of(os.getuid()) + step["processes"] * (self.workers - 1)
        _set_limits({**step, "processes": step["processes"] + crowd})
        if self.confined:
            _landlock([*self.readable, self.box], self.writable(step))

    def writable(self, step: dict) -> set[str]:
        """Directories; a compiler works in the box."""
        return {self.tmp, step["cwd"], *self.common}

    def is_own(self, target: int) -> bool:
        """Whether a number given to kill or its like stands for processes, a thread or a group of the program's."""
        groups = (-group for group in _each(os.getpgid, self.members()))
        return target in (0, *groups) or any(os.path.exists(f"/proc/{p}/task/{target}") for p in self.members())

    def set_attributes(self, step: dict, pid: int, name: str, arguments: list[int]) -> int:
        """Changes a file's mode, times or length in a program's place, if that may write there; 0, or the error's
        number."""
        working_directory, no_follow = -100, 0x100
        here, text, value, flags = {
            "fchmod": (arguments[0], 0, *arguments[1:]),
            **dict.fromkeys(("chmod", "truncate"), (working_directory, *arguments)),
        }.get(name, arguments)[:4]
        here = ctypes.c_int(here).value
        place = f"/proc/{pid}/" + ("cwd" if here == working_directory else f"fd/{here}")
        try:
            with open(f"/proc/{pid}/mem", "rb", 0) as memory:
                if text:
                    path = os.fsdecode(_peek(memory, text, 4096).split(b"\0")[0])
                    place = os.path.join(place, re.sub("^/proc/self/", f"/proc/{pid}/", path))
                times = _peek(memory, value, 32) if name == "utimensat" and value else None
            no_link = os.O_NOFOLLOW if name == "utimensat" and flags & no_follow else 0
            with _held(place, no_link, self.writable(step)) as file:
                if name == "utimensat":
                    _checked(name, _libc.utimensat(working_directory, file.encode(), times, 0))
                elif name == "truncate":
                    os.truncate(file, ctypes.c_long(value).value)
                else:
                    os.chmod(file, value & 0o777)
        except OSError as error:
            return error.errno
        return 0

    def new_directory(self, path: str, _: int) -> None:
        """In place of the old one, whose attributes may have been changed."""
        _remove(path)
        os.mkdir(path)

    def close_box(self) -> None:
        pass  # no program may write there

    def end_scratch(self) -> None:
        for path in (self.tmp, *(entry.path for entry in self.shared())):
            _remove(path)

    def shared(self) -> list[os.DirEntry]:
        """What the programs' user has in common directories, and in its own folders there."""
        entries = [entry for top in self.common for entry in os.scandir(top)]
        owners = _each(lambda entry: (entry.stat(follow_symlinks=False).st_uid, entry), entries)
        own = [entry for owner, entry in owners if owner == os.getuid()]
        return own + [e for entry in own if entry.is_dir(follow_symlinks=False) for e in _below(entry.path)]

    def stored_too_much(self, step: dict) -> bool:
        """Or so deep that looking would take long: a path can have 4096 bytes."""
        sizes = {}
        for entry in itertools.chain(_below(self.tmp), self.shared()):
            found = _each(lambda entry: entry.stat(follow_symlinks=False), [entry])
            sizes |= {(file.st_dev, file.st_ino): file.st_blocks * 512 for file in found}
            if len(entry.path) > 1024 or len(sizes) > _FILES:
                return True
        # files that are open but have no name any more
        paths = [path for pid in self.members() for path in glob.glob(f"/proc/{pid}/fd/*")]
        found = [file for file in _each(os.stat, paths) if stat.S_ISREG(file.st_mode) and not file.st_nlink]
        sizes |= {(file.st_dev, file.st_ino): file.st_blocks * 512 for file in found}
        return sum(sizes.values()) > step["files"] << 20

    def members(self) -> list[int]:
        return _descendants(os.getpid())

    kill_all = staticmethod(_end_descendants)


# ---------------------------------------------------------------------------------------------
# The helper's and the runner's lives


def _remove(path: str) -> None:
    """Removes a file, or a directory with what is in it, whatever its modes. No program may be running in it. By rm,
    which neither follows links nor minds depth, and which root needs no modes for."""
    for remove in (os.unlink, os.rmdir):  # which will do for most
        with contextlib.suppress(OSError):
            remove(path)
    delete, quiet = ["rm", "-rf", path], [(os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0)]
    for command in (delete, ["chmod", "-R", "u+rwx", path], delete):
        if os.path.lexists(path):
            os.waitpid(os.posix_spawnp(command[0], command, os.environ, file_actions=quiet), 0)


def _runner(sock: socket.socket, settings: dict) -> None:
    """The rest of a runner's life."""
    level = settings["level"]
    settings["own_user"] = level == "landlock" and os.geteuid() == 0
    try:
        if _ARCH is None and level != "none":
            raise OSError(f"system calls of {os.uname().machine} are not in the table")
        if level == "namespaces":
            runner = _NamespaceRunner(sock, settings, _enter_namespaces(settings["home"], settings["paths"]))
        else:
            if settings["own_user"]:
                os.chown(settings["home"], uid := _spare_uid(), uid)
                _drop_to(uid)
            runner = _LandlockRunner(sock, settings)
        runner.new_directory(runner.box, _BOX)
        trial = {**vars(Limits()), "heap": 1, "argv": ["/bin/sh", "-c", ":"], "env": {}, "cwd": runner.tmp}
        outcome, streams = runner.execute(trial, b"")
        if outcome["verdict"] != "ok":
            raise OSError(f"{outcome['message']} {streams[1].decode('utf-8', 'replace')}".strip())
    except OSError as error:
        sock.sendall(_message({"refused": str(error)}))
        return
    sock.sendall(_message({}))
    runner.serve()


def _few(processors: Iterable[int]) -> list[int]:
    """At most 8, for programs to see: of a great machine's, runtimes start threads and set memory aside for each."""
    return sorted(processors, key=lambda _: os.urandom(8))[:_PROCESSORS]


def _helper(fd: int, settings: dict) -> None:
    """A helper's life. fd: of the socket to the caller, which its runner takes over."""
    os.umask(0o022)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # python's own ways would be inherited
        signal.signal(number, signal.SIG_DFL)
    os.sched_setaffinity(0, _few(os.sched_getaffinity(0)))
    _, most = resource.getrlimit(resource.RLIMIT_STACK)  # programs may raise it; what they use is watched
    resource.setrlimit(resource.RLIMIT_STACK, (min(_STACK << 20, most % (1 << 64)), most))
    with contextlib.suppress(OSError):  # where memory runs out, programs go before the caller
        Path("/proc/self/oom_score_adj").write_text("1000")
    _prctl(_PR_SUBREAPER, 1)
    if pid := os.fork():
        os.close(fd)
        os.waitpid(pid, 0)
        for _ in _deaths(_end_descendants):
            pass
        _remove(settings["home"])
        return
    os.set_inheritable(fd, False)
    try:
        _runner(socket.socket(fileno=fd), settings)
    except Exception as error:  # a fault of ours: the caller learns only that the other side has gone
        print(f"sandbox helper: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(0)


# ---------------------------------------------------------------------------------------------
# The caller's side

LEVELS = ("namespaces", "landlock", "none")
# What toolchains need; below /etc as patterns.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/var/lib/ghc")
_ETC = ("alternatives", "ldc2.conf", "gnucobol", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ssl/openssl.cnf",
        "java-*", "mono", "php", "R", "octave*", "erlang", "fpc*", "nim", "racket", "scala", "guile*", "ghc*",
        "prolog*")  # fmt: skip
_PATH = ("/usr/local/bin", "/usr/bin", "/bin")
_ENV = {"HOME": "{tmp}", "TMPDIR": "{tmp}", "LANG": "C.UTF-8", "USER": "user"}
_RETRIES = 2
_GRACE = 10.0  # seconds beyond every limit after which a silent helper is given up


class _Refused(Exception):
    """A level of confinement can't be had here."""


def _home_of(tool: str) -> str:
    """What must be visible for a tool to work."""
    real = Path(os.path.realpath(tool))
    prefix = real.parent.parent
    # Nobody's whole home, nor the whole disk, for a program that lies in ~/bin.
    return str(real if Path.home().is_relative_to(prefix) else prefix)


@functools.cache
def _visible_paths() -> list[str]:
    """What toolchains need, and where they and caches live: each before those inside it."""
    _make_cache_root()  # what is prepared later shall show too
    tools = [tool for name in installed() for tool in toolchain(name).values()]
    etc = [str(path) for name in _ETC for path in Path("/etc").glob(name)]
    return sorted({*_SYSTEM, *etc, str(_cache_root()), *map(_home_of, tools)})


class _Helper:
    """One helper process and the talk with it; used by one thread at a time."""

    def __init__(self, level: str, workers: int = 1):
        self.sock, theirs = socket.socketpair()
        self.answers = self.sock.makefile("rb")
        self.home = os.path.realpath(tempfile.mkdtemp(prefix=f"parallel-sft-{os.getpid()}-"))
        root = "" if level == "namespaces" else self.home
        self.places = {"box": f"{root}/box", "tmp": f"{root}/tmp"}  # as the programs see them
        here = Path(__file__).resolve()
        settings = {"level": level, "workers": workers, "paths": _visible_paths(), "home": self.home, **self.places}
        code = f"import sys; sys.path.insert(0, {str(here.parent)!r}); from {here.stem} import _helper"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", f"{code}; _helper({theirs.fileno()}, {settings})", "sandbox helper"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={name: path for name, path in os.environ.items() if name == "LD_LIBRARY_PATH"},
                start_new_session=True,
            )
        try:
            hello, *_ = self.ask(b"", 60)
            if "refused" in hello:
                raise _Refused(hello["refused"])
        except BaseException:
            self.close()
            raise

    def ask(self, request: bytes, seconds: float) -> tuple:
        """The answer: (header, stdout, stderr). Raises OSError or EOFError."""
        self.sock.settimeout(seconds)
        self.sock.sendall(request)
        header, blobs = _receive(self.answers)
        return header, *blobs

    def close(self) -> None:
        """The helper ends when its socket is shut down, and all it has started with it. Closing alone is no goodbye
        where the caller has forked: its children hold copies."""
        with contextlib.suppress(OSError):  # the helper has gone
            self.sock.shutdown(socket.SHUT_RDWR)
        self.answers.close()
        self.sock.close()
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _remove(self.home)


@functools.cache
def best_level() -> str:
    """The strongest confinement that works here. Raises OSError saying what was refused."""
    refusals = []
    for level in LEVELS[:2]:
        try:
            _Helper(level).close()
            return level
        except (_Refused, OSError, EOFError) as error:
            refusals.append(f"{level}: {error}")
    raise OSError(
        f"no confinement can be had here ({'; '.join(refusals)}); run as root, or where Linux allows user namespaces "
        "or has Landlock (5.13); level='none' runs programs with the caller's rights"
    )


@dataclass(frozen=True)
class _Job:
    """A program and what was asked of it, as for Sandbox.submit."""

    program: str
    language: Language
    tests: Sequence[dict]
    limits: Limits
    stop_at_failure: bool
    checker: Checker
    level: str
    forkserver: bool

    def step(self, helper: _Helper, line: str, limits: Limits, cwd: str) -> dict:
        """What a helper needs to know to run one of the language's command lines. cwd: "box" or "tmp"."""
        language, tools = self.language, toolchain(self.language.name, self.level)
        source, main = _source_name(language, self.program)
        fill = {**helper.places, "file": f"{helper.places['box']}/{source}", "main": main}
        fill |= {"mb": limits.memory, "cache": cache(language.name, self.level)}
        path = dict.fromkeys([*map(os.path.dirname, tools.values()), *_PATH])
        env = {**_ENV, "PATH": ":".join(path), **language.env}
        own_limit = "{mb}" in f"{line} {language.env}"  # what a runtime may have for its heap
        step = {**vars(limits), "heap": limits.memory * own_limit, "memory": limits.memory + language.overhead}
        step["cwd"] = helper.places[cwd]
        step["env"] = {key: value.format_map(fill) for key, value in env.items()}
        step["argv"] = [tools.get(word, word).format_map(fill) for word in shlex.split(line)]
        return step

    def compile(self, helper: _Helper) -> TestResult:
        """Writes the program into the helper's box and compiles it."""
        language, wall, processes = self.language, self.limits.compile_wall, max(self.limits.processes, 256)
        limits = Limits(wall, 2 * wall, self.limits.compile_memory, output=1 << 20, processes=processes, files=256)
        step = self.step(helper, language.compile, limits, "box") if language.compile else None
        name, _ = _source_name(language, self.program)
        request = _message({"op": "open", "file": name, "step": step}, _encode(self.program))
        result, _ = self.ask(helper, request, wall)
        if result.verdict == "runtime_error":
            result = replace(result, verdict="compile_error")
        return result

    def run(self, helper: _Helper) -> Iterator[TestResult]:
        """Runs the program on each test and compares its output here, in the caller."""
        step = self.step(helper, self.language.run, self.limits, "tmp")
        argv = step["argv"]
        for test in self.tests:
            args = [*map(str, test.get("args", ()))]
            copied = self.forkserver and self.language.copied and not args
            step = {**step, "argv": argv + args, "copied": copied}
            request = _message({"op": "test", "step": step}, _encode(test.get("stdin", "")))
            result, stdout = self.ask(helper, request, self.limits.wall)
            if result.verdict == "ok" and not self.checker(test, stdout):
                result = replace(result, verdict="wrong_answer")
            yield result
            if result.verdict != "ok" and self.stop_at_failure:
                return

    def ask(self, helper: _Helper, request: bytes, wall: float) -> tuple[TestResult, str]:
        """The helper's answer, and the whole of stdout for the checker. Raises OSError or EOFError where
        the sandbox failed."""
        answer, out, err = helper.ask(request, wall + _patience(wall) + _GRACE)
        if answer["verdict"] == "internal_error":
            raise OSError(answer["message"])
        stdout, stderr = (stream.decode("utf-8", "replace") for stream in (out, err))
        keep = self.limits.keep
        return TestResult(**answer, stdout=stdout[:keep], stderr=stderr[:keep]), stdout

    def grade(self, helper: _Helper) -> Result:
        """Compiles once, then runs the tests."""
        built = self.compile(helper)
        tests = tuple(self.run(helper)) if built.verdict == "ok" else ()
        first = next((result for result in (built, *tests) if result.verdict != "ok"), built)
        return Result(first.verdict, self.language.name, tests, built, self.level, first.message)


class Sandbox(contextlib.AbstractContextManager):
    """A pool of helpers. Use it as a context manager, or call close().

    workers: programs run at a time; by default the processors that this process may use.
    level:   of confinement, from LEVELS; by default the strongest that works here. Raises OSError where none does;
             `none` has to be asked for. ValueError where namespaces would hide the toolchains' caches.
    forkserver: whether a run of python is the fork of an interpreter that has started, at level
             `namespaces` and where a test has no arguments: faster, and a program can tell."""

    def __init__(
        self, workers: int | None = None, limits: Limits = Limits(), level: str | None = None, forkserver: bool = False
    ):
        if level not in (None, *LEVELS):
            raise ValueError(f"unknown level {level!r}; known: {', '.join(LEVELS)}")
        if level == "none":
            warnings.warn("programs run with this process's own rights (level none)", stacklevel=2)
        self.limits, self.forkserver = limits, forkserver
        for home in Path(tempfile.gettempdir()).glob("parallel-sft-*-*"):  # of callers that were killed
            owner = home.name.split("-")[2]
            if owner.isdigit() and not Path("/proc", owner).exists():
                _remove(str(home))
        self.level = level or best_level()
        if self.level == "namespaces" and _cache_root().is_relative_to("/tmp"):
            raise ValueError(
                f"{_cache_root()}: programs have a /tmp of their own; set XDG_CACHE_HOME to a directory elsewhere"
            )
        self._workers = workers or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._workers, "sandbox")
        self._idle = queue.SimpleQueue()

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Drops what has not begun, waits for what has, and ends the helpers."""
        self._pool.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()

    def submit(
        self, program: str, language: str, tests: Sequence[dict], record: dict | None = None, *,
        stop_at_failure: bool = False, limits: Limits | None = None, checker: Checker | None = None,
    ) -> "Future[Result]":  # fmt: skip
        """Queues one program and returns at once. tests: {"stdin", "stdout"}, stdout a text or a list of accepted ones,
        and, if wanted, "args"; record: its Demands count, its limits before those given; checker: in place of its
        comparison. Raises ValueError for an unknown language, one that a harness lacks, or invalid demands."""
        lang = LANGUAGES[canonical(language)]
        limits, own = limits or self.limits, demands(record or {})
        seconds, memory = own.time_limit, own.memory_limit
        limits = replace(limits, wall=seconds, cpu=seconds) if seconds else limits
        limits = replace(limits, memory=math.ceil(memory)) if memory else limits
        checker = checker or own.check
        if own.harness:
            if lang.name not in own.harness:
                raise ValueError(f"no harness for {lang.name}; there are {', '.join(own.harness)}")
            word = secrets.token_hex(16)
            program, checker = _put(program, own.harness[lang.name], lang.name, word), _ends_with(word, checker)
        job = _Job(program, lang, tests, limits, stop_at_failure, checker, self.level, self.forkserver)
        return self._pool.submit(self._grade, job)

    def run(self, *job, **options) -> Result:
        """One program; what it takes as for submit."""
        return self.submit(*job, **options).result()

    def map(self, jobs: Iterable[tuple], **options) -> list[Result]:
        """Results of (program, language, tests), perhaps with a record, in the order given; options as for stream."""
        return list(self.stream(jobs, **options))

    def stream(self, jobs: Iterable[tuple], *, progress: str | None = None, **options) -> Iterator[Result]:
        """The same, each as soon as it and those before it are there; options as for submit.
        progress: the label of a progress bar, drawn if tqdm is there."""
        futures = [self.submit(*job, **options) for job in jobs]
        bar = contextlib.nullcontext(futures)
        if progress is not None:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                bar = tqdm(futures, desc=progress, unit="program", disable=None)
        with bar as each:
            yield from (future.result() for future in each)

    def _grade(self, job: _Job) -> Result:
        failed = functools.partial(Result, language=job.language.name, level=self.level)
        if toolchain(job.language.name, self.level) is None:
            return failed("no_toolchain", message=_missing(job.language))
        for attempt in range(1 + _RETRIES):
            try:
                return self._attempt(job, fresh=attempt > 0)
            except (OSError, EOFError, _Refused) as error:
                result = failed("internal_error", message=str(error))
        return result

    def _attempt(self, job: _Job, fresh: bool) -> Result:
        """By an idle helper, if there is one, unless it has to be fresh: those that are idle may have died together."""
        _warm(job.language.name, self.level)
        helper = None
        with contextlib.suppress(queue.Empty):
            helper = None if fresh else self._idle.get_nowait()
        helper = helper or _Helper(self.level, self._workers)
        try:
            result = job.grade(helper)
        except BaseException:
            helper.close()
            raise
        self._idle.put(helper)
        return result


# ---------------------------------------------------------------------------------------------
# Command line


def _cmd_languages(_) -> int:
    with ThreadPoolExecutor(8) as pool:
        for name, version in zip(LANGUAGES, pool.map(_version, LANGUAGES), strict=True):
            print(f"{name:12} {version}")
    return 0


def _cmd_toolchains(options) -> int:
    wanted = [canonical(name) for name in options.languages] or list(LANGUAGES)
    packages = [p for name in wanted if toolchain(name) is None for p in LANGUAGES[name].package.split()]
    packages += [p for name in wanted for p in _libraries(name, False)]
    print(" ".join(dict.fromkeys(packages)))
    return 0


def _json_lines(path: str, parse: Callable[[object], object]) -> list:
    """Raises ValueError naming file and line."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            if line.strip():
                rows.append(parse(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return rows


def _parse_program(row: object) -> tuple:
    """Its id, and what Sandbox.submit takes."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("program", "language")):
        raise ValueError('give an object with texts "program" and "language"')
    tests, harness = tests_of(row)
    language = canonical(row["language"])
    if harness and language not in harness:
        raise ValueError(f"field 'harness': has none for {language}; there are {', '.join(harness)}")
    return row.get("id"), (row["program"], language, tests, row)


def _open_sandbox(options) -> Sandbox:
    limits = Limits(options.wall, options.cpu, options.memory)
    return Sandbox(options.workers, limits, options.level, options.forkserver)


def _cmd_run(options) -> int:
    path = Path(options.file)
    by_suffix = {Path(language.file).suffix: language.name for language in _TABLE}
    language = options.language or by_suffix.get(path.suffix, path.suffix.lstrip("."))
    program = path.read_text("utf-8", "surrogateescape")
    tests = _json_lines(options.tests, lambda test: tests_of({"tests": [test]})[0][0])
    if canonical(language) and not tests:
        raise ValueError(f"{options.tests}: no tests")
    with _open_sandbox(options) as sandbox:
        result = sandbox.run(program, language, tests)
    print(json.dumps(asdict(result), indent=1))
    return 0 if result.passed else 1


def _cmd_check(options) -> int:
    rows = _json_lines(options.file, _parse_program)
    if not rows:
        raise ValueError(f"{options.file}: no programs")
    counts, passed = Counter(), 0
    jobs = [job for _, job in rows]
    # Interrupted, it ends with its bar, and at once: not when somebody collects what is left of it.
    with _open_sandbox(options) as sandbox, contextlib.closing(sandbox.stream(jobs, progress="programs")) as results:
        for (identity, _), result in zip(rows, results, strict=True):
            row = {"id": identity, "language": result.language, "verdict": result.verdict}
            print(json.dumps({**row, "tests": [test.verdict for test in result.tests]}), flush=True)
            counts[result.language, result.verdict] += 1
            passed += result.passed
    for (language, verdict), count in counts.items():
        print(f"{language:12} {verdict:14} {count}", file=sys.stderr)
    return 0 if passed == len(rows) else 1


def _positive(kind: type) -> Callable[[str], float]:
    def positive(text: str) -> float:
        if not 0 < (value := kind(text)) < 1e9:  # what the kernel's clocks and limits can hold
            raise ValueError
        return value

    return positive


def _parser() -> "argparse.ArgumentParser":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands, limits = parser.add_subparsers(required=True), argparse.ArgumentParser(add_help=False)
    add = limits.add_argument
    add("--wall", type=_positive(float), default=Limits.wall, help="seconds per test (%(default)s)")
    add("--cpu", type=_positive(float), default=Limits.cpu, help="seconds of processor time (%(default)s)")
    add("--memory", type=_positive(int), default=Limits.memory, help="MB per test (%(default)s)")
    add("--level", choices=LEVELS, help="confinement; by default the strongest that works")
    add("--forkserver", action="store_true", help="fork python's runs from one interpreter: faster, and they can tell")
    add = commands.add_parser("languages", help="list the languages and their versions here")
    add.set_defaults(call=_cmd_languages)
    add = commands.add_parser("toolchains", help="print the Debian packages of missing languages and test libraries")
    add.add_argument("languages", nargs="*", help="only of these")
    add.set_defaults(call=_cmd_toolchains)
    add = commands.add_parser("run", parents=[limits], help="run one program against tests")
    add.add_argument("file", help="the program; its extension names the language")
    add.add_argument("--tests", required=True, help='JSON lines of {"stdin", "stdout"}')
    add.add_argument("--language", help="the language, where the extension does not name it")
    add.set_defaults(call=_cmd_run, workers=1)
    add = commands.add_parser("check", parents=[limits], help="grade a file of programs")
    add.add_argument("file", help='JSON lines of {"program", "language", "tests"}, perhaps "id" and demands')
    add.add_argument("--workers", type=_positive(int), help="programs at a time (one per processor)")
    add.set_defaults(call=_cmd_check)
    return parser


def _main() -> int:
    """0 if every program passed, 1 if not, 2 if the request was wrong, 130 if interrupted."""
    options = _parser().parse_args()
    try:
        return options.call(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"sandbox.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sandbox.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(_main())
