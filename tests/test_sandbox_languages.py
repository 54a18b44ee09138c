"""Every installed language does its verdicts; programs that no one here wrote are judged rightly.

SANDBOX_FULL=1 pytest tests/test_sandbox_languages.py    all problems of HumanEvalPack
HUMANEVALPACK=FILE pytest ...                            those of another file of its kind
"""

import gzip
import json
import os
import re
from pathlib import Path

import pytest
from sandbox_programs import PROGRAMS

import sandbox
from sandbox import LANGUAGES, Limits, Sandbox

VERDICTS = {
    "sum": "ok",
    "fail": "runtime_error",
    "spin": "time_limit",
    "hoard": "memory_limit",
    "flood": "output_limit",
}
PATIENT = Limits(wall=30, cpu=30, memory=256, output=1 << 18)
HURRIED = Limits(wall=1.0, cpu=1.0, memory=256)
GARBAGE = "@@@ ( not a { program \n"


@pytest.fixture(scope="module")
def box():
    with Sandbox(2) as box:
        yield box


@pytest.mark.parametrize("name", PROGRAMS)
def test_language(box, name):
    if name not in sandbox.installed():
        pytest.skip(f"no toolchain: {sandbox._missing(LANGUAGES[name])}")
    programs = dict(PROGRAMS[name])
    stdin = programs.pop("stdin", "3 4\n")
    jobs = {
        kind: box.submit(
            program, name, [{"stdin": stdin, "stdout": "7"}], limits=HURRIED if kind == "spin" else PATIENT
        )
        for kind, program in programs.items()
    }
    wrong = box.submit(programs["sum"], name, [{"stdin": stdin, "stdout": "8"}])
    garbage = box.submit(GARBAGE, name, [{"stdin": "", "stdout": ""}])
    for kind, job in jobs.items():
        assert job.result().verdict == VERDICTS[kind], (kind, job.result())
    assert wrong.result().verdict == "wrong_answer"
    refused = "compile_error" if LANGUAGES[name].compile else "runtime_error wrong_answer"
    assert garbage.result().verdict in refused.split(), garbage.result()


def test_table_is_sound():
    names = [alias for lang in LANGUAGES.values() for alias in (lang.name, *lang.aliases)]
    assert len(names) == len(set(names)), "two languages share an alias"
    assert len(LANGUAGES) >= 40
    assert set(PROGRAMS) <= set(LANGUAGES)
    assert all(lang.version and lang.run and lang.file for lang in LANGUAGES.values())
    assert not any(
        "|" in tool for lang in LANGUAGES.values() for tool in sandbox._tools(lang)
    )  # one implementation each


UNIT_TESTS = {
    "go": 'package main\nimport ("os"; "testing")\nfunc TestX(t *testing.T) { if %s { t.Fatal() } }\n'
    "func TestY(t *testing.T) { if %s { os.Exit(0) } }",
    "rust": "fn main() {}\n#[test]\nfn x() { assert!(!(%s)); }\n#[test]\nfn y() { if %s { std::process::exit(0) } }",
}


@pytest.mark.parametrize("name", UNIT_TESTS)
def test_unit_tests_are_run(box, name):
    """Those that pass print nothing, as if they were asserts in a main function; an early exit fails."""
    if name not in sandbox.installed():
        pytest.skip(f"no toolchain for {name}")
    verdict = lambda *holes: box.run(UNIT_TESTS[name] % holes, name, [{"stdin": "", "stdout": ""}]).verdict  # noqa: E731
    assert verdict("1 == 2", "1 == 2") == "ok"
    assert verdict("1 == 1", "1 == 2") == "runtime_error"
    assert verdict("1 == 2", "1 == 1") == "wrong_answer"


# ---------------------------------------------------------------------------------------------
# HumanEvalPack

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "humanevalpack.jsonl.gz"
PACK = Path(os.environ.get("HUMANEVALPACK", SHARED))
NOT_BARE = {  # need more than the bare compiler or interpreter, whatever runs them
    "rust": {32, 38, 50, 53, 91, 162},
    "cpp": {22, 38, 162},
    "js": {162},
}
ASSERT = "console.assert = (c, m) => { if (!c) throw new Error(m) }\n"


def assembled(row: dict, body: str) -> str:
    """A whole program, as the data's README says."""
    program = row["declaration"] + row[body] + row["test"]
    if row["lang"] == "python":
        return program + (f"\ncheck({row['entry_point']})" if "\ncheck(" not in row["test"] else "")
    if row["lang"] == "js":
        return ASSERT + program
    if row["lang"] == "rust":
        return re.sub(r"use (rand|regex|md5)\b.*", "", program)
    if row["lang"] == "go":
        return go_program(row, body)
    return program


def go_program(row: dict, body: str) -> str:
    """The data lacks the solution's imports; helper functions stand in the prompt alone."""
    text = re.sub(r"^import \([^)]*\)\n", "", row["prompt"], flags=re.M) + row[body] + row["test"]
    packages = {"md5": "crypto/md5", "rand": "math/rand"}
    for name in ("bytes", "fmt", "math", "os", "regexp", "sort", "strconv", "strings", "time", "unicode"):
        packages[name] = name
    used = [path for name, path in packages.items() if re.search(rf"\b{name}\.[A-Z]", text)]
    imports = "".join(f'import "{path}"\n' for path in used if f'"{path}"' not in row["setup"])
    return row["setup"] + imports + text


def pack_rows() -> list[dict]:
    if not PACK.exists():
        return []
    text = gzip.decompress(PACK.read_bytes()) if PACK.suffix == ".gz" else PACK.read_bytes()
    rows = [json.loads(line) for line in text.splitlines()]
    number = lambda row: int(row["problem"].split("/")[1])  # noqa: E731
    rows = [row for row in rows if number(row) not in NOT_BARE.get(row["lang"], ())]
    return rows if os.environ.get("SANDBOX_FULL") else [row for row in rows if number(row) % 25 == 4]


@pytest.mark.skipif(not PACK.exists(), reason=f"{PACK} is not there")
@pytest.mark.parametrize("lang", ["python", "js", "java", "cpp", "go", "rust"])
def test_humanevalpack(box, lang):
    name = sandbox.canonical(lang)
    if name not in sandbox.installed():
        pytest.skip(f"no toolchain for {name}")
    rows = [row for row in pack_rows() if row["lang"] == lang]
    if lang == "go" and not Path("/usr/share/gocode/src/github.com/stretchr/testify").exists():
        pytest.skip("no testify: Debian package golang-github-stretchr-testify-dev")
    tests = [{"stdin": "", "stdout": ""}]
    right = box.map([(assembled(row, "solution"), name, tests) for row in rows])
    buggy = box.map([(assembled(row, "buggy"), name, tests) for row in rows])
    assert rows
    failed = {row["problem"]: r for row, r in zip(rows, right, strict=True) if not r.passed}
    assert not failed
    passed = {row["problem"] for row, r in zip(rows, buggy, strict=True) if r.passed}
    assert not passed
