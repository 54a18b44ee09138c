"""Measurements, each against a reference in the same run.

python tests/bench.py sandbox            runs per second and time added, against subprocess.run
python tests/bench.py soak --runs 10000  many runs over mixed languages, and what they leave
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import sandbox

# ---------------------------------------------------------------------------------------------
# sandbox

PROGRAMS = {
    "python": "a, b = map(int, input().split())\nprint(a + b)\n",
    "cpp": "#include <bits/stdc++.h>\nusing namespace std;\n"
    "int main() { int a, b; cin >> a >> b; cout << a + b << endl; }\n",
}
SPIN, SLEEP = "while True: pass", "import time\ntime.sleep(60)"


def tests_of(count: int) -> list[dict]:
    return [{"stdin": f"{n} {n}\n", "stdout": f"{2 * n}\n"} for n in range(count)]


def commands(name: str, directory: str) -> list[list[str]]:
    """The same compiler and interpreter lines as the sandbox's, without what it prepares."""
    language, tools = sandbox.LANGUAGES[name], sandbox.toolchain(name)
    fill = {"box": directory, "file": f"{directory}/{language.file}", "cache": directory, "mb": 512}
    lines = [*sandbox._commands(language.compile), *sandbox._commands(language.run)]
    return [[tools.get(word, word).format_map(fill) for word in line] for line in lines]


def naive(name: str, tests: list[dict]) -> None:
    """What is usually done: write, compile and run with subprocess.run, once per test."""
    for test in tests:
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, sandbox.LANGUAGES[name].file).write_text(PROGRAMS[name])
            for command in commands(name, directory):
                done = subprocess.run(command, input=test["stdin"], capture_output=True, text=True, timeout=60)
                assert done.returncode == 0, done.stderr
            assert done.stdout == test["stdout"]


def bare_run(name: str) -> Callable[[], object]:
    """One run of a program that is compiled already, by subprocess.run."""
    place = tempfile.TemporaryDirectory(prefix="bench-")
    Path(place.name, sandbox.LANGUAGES[name].file).write_text(PROGRAMS[name])
    *compiling, running = commands(name, place.name)
    for command in compiling:
        subprocess.run(command, check=True)

    def run() -> None:
        assert place  # is removed with this function
        subprocess.run(running, input="1 2\n", capture_output=True, text=True, timeout=60)

    return run


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def added_per_run(box: sandbox.Sandbox, name: str, repeats: int) -> tuple[float, float, float]:
    """Milliseconds of one more run in the sandbox, of a bare run, and of their difference: each
    pair measured one after the other, medians of the pairs."""
    bare, many = bare_run(name), 11
    rows = []
    for _ in range(repeats):
        short = seconds(lambda: box.run(PROGRAMS[name], name, tests_of(1)))
        plain = statistics.median(seconds(bare) for _ in range(many - 1))
        long = seconds(lambda: box.run(PROGRAMS[name], name, tests_of(many)))
        rows.append(((long - short) / (many - 1) * 1e3, plain * 1e3))
    inside, outside = (statistics.median(column) for column in zip(*rows, strict=True))
    return inside, outside, statistics.median(a - b for a, b in rows)


def throughput(box: sandbox.Sandbox, name: str, count: int, repeats: int) -> tuple[float, float]:
    """Runs per second, one program at a time: in the sandbox, and the naive way."""
    tests, ours, theirs = tests_of(count), [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: box.run(PROGRAMS[name], name, tests)))
        theirs.append(seconds(lambda: naive(name, tests)))
    return count / statistics.median(ours), count / statistics.median(theirs)


def overshoot(box: sandbox.Sandbox, program: str, limits: sandbox.Limits) -> float:
    """Milliseconds that a program lives beyond its limit, by the clock or by processor time."""
    test = box.run(program, "python", tests_of(1), limits=limits).tests[0]
    assert test.verdict == "time_limit", test
    return ((test.wall - limits.wall) if program == SLEEP else (test.cpu - limits.cpu)) * 1e3


def bench_sandbox(options: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    with sandbox.Sandbox(1, level=options.level, cgroups=not options.no_cgroups) as box:
        first = [box.run(PROGRAMS[name], name, tests_of(1)) for name in PROGRAMS]
        assert all(result.passed for result in first), first
        print(f"level {first[0].level}, {first[0].accounting}, {cores} cores, one program at a time")
        print("language  tests  sandbox runs/s  naive runs/s  ratio")
        for name in PROGRAMS:
            for count in (1, 10):
                ours, theirs = throughput(box, name, count, options.repeats)
                print(f"{name:9} {count:5} {ours:15.1f} {theirs:13.1f} {ours / theirs:6.2f}")
        print("language  ms per run, sandbox   subprocess.run   added")
        for name in PROGRAMS:
            inside, outside, added = added_per_run(box, name, options.repeats)
            print(f"{name:9} {inside:21.2f} {outside:16.2f} {added:7.2f}")
        limits = sandbox.Limits(wall=0.5, cpu=60)
        late = [overshoot(box, SLEEP, limits) for _ in range(options.repeats)]
        print(f"time limit by the clock: late by {statistics.median(late):.1f} ms, at most {max(late):.1f}")
        limits = sandbox.Limits(wall=60, cpu=0.5)
        late = [overshoot(box, SPIN, limits) for _ in range(options.repeats)]
        print(f"time limit by processor time: late by {statistics.median(late):.1f} ms, at most {max(late):.1f}")
    with sandbox.Sandbox(4 * cores, sandbox.Limits(wall=0.6, cpu=2), options.level) as box:
        spin = "import time\nwhile time.process_time() < 0.25: pass\nprint(1)"
        results = box.map([(spin, "python", [{"stdout": "1"}])] * (20 * cores))
        wall = statistics.median(result.tests[0].wall for result in results)
        false = sum(result.verdict == "time_limit" for result in results)
        print(f"{4 * cores} workers, 0.25 s of work, limit 0.6 s: took {wall:.2f} s, {false} false time limits")


# ---------------------------------------------------------------------------------------------
# soak

MIXTURE = {
    "python": PROGRAMS["python"],
    "bash": "read a b; echo $((a + b))",
    "perl": 'my ($a, $b) = split " ", <STDIN>; print $a + $b, "\\n";',
    "awk": "{ print $1 + $2 }",
    "lua": 'print(math.floor(io.read("n") + io.read("n")))',
    "tcl": "puts [expr [join [gets stdin] +]]",
    "c": '#include <stdio.h>\nint main() { int a, b; scanf("%d%d", &a, &b); printf("%d\\n", a + b); }',
    "rust": "fn main() { let mut s = String::new(); std::io::stdin().read_line(&mut s).unwrap();"
    ' println!("{}", s.split_whitespace().map(|x| x.parse::<i64>().unwrap()).sum::<i64>()); }',
}


def traces() -> dict[str, object]:
    """What runs could leave: counts that must not grow."""
    status = Path("/proc/self/status").read_text()
    return {
        "processes": len(list(Path("/proc").glob("[0-9]*/stat"))),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": Path("/proc/self/mounts").read_text().count("\n"),
        "control groups": len(list(Path("/sys/fs/cgroup").rglob("sandbox-*"))),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
        "resident MB": int(status.split("VmRSS:")[1].split()[0]) >> 10,
    }


def bench_soak(options: argparse.Namespace) -> None:
    kinds = [(text, name, tests_of(5)) for name, text in MIXTURE.items() if name in sandbox.installed()]
    jobs = [kinds[index % len(kinds)] for index in range(options.runs // 5)]
    outside = traces()
    with sandbox.Sandbox(options.workers, level=options.level) as box:
        box.map(kinds * 2)
        before, start = traces(), time.perf_counter()
        results = box.map(jobs, progress="programs")
        took, after = time.perf_counter() - start, traces()
    verdicts = {result.verdict for result in results}
    print(f"{5 * len(jobs)} runs of {len(kinds)} languages in {took:.0f} s, verdicts {verdicts}")
    print(f"{'':16} {'before':>8} {'in the pool, start':>19} {'and end':>8} {'after':>8}")
    closed = traces()
    for name in outside:
        print(f"{name:16} {outside[name]:8} {before[name]:19} {after[name]:8} {closed[name]:8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("sandbox", help="sandbox.py against subprocess.run")
    add.add_argument("--repeats", type=int, default=15, help="measurements per figure (%(default)s)")
    add.add_argument("--level", choices=sandbox.LEVELS, help="confinement; the strongest by default")
    add.add_argument("--no-cgroups", action="store_true", help="do without control groups")
    add.set_defaults(call=bench_sandbox)
    add = commands.add_parser("soak", help="many runs, and what they leave")
    add.add_argument("--runs", type=int, default=10_000, help="(%(default)s)")
    add.add_argument("--workers", type=int, help="programs at a time (one per processor)")
    add.add_argument("--level", choices=sandbox.LEVELS, help="confinement; the strongest by default")
    add.set_defaults(call=bench_soak)
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
