"""Public data as records: each format's own fields, what is left out and said, bad rows, verify, split, the whole way."""

import base64
import collections
import gzip
import json
import pickle
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import real
from conftest import new_tiny
from test_ranks import torchrun

import data
import eval as evaluation
import sandbox
from model import save

SHARED = Path(__file__).parents[2] / "shared/data"


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def bring(folder: Path, format: str, *rows, **settings) -> list[dict]:
    """The records that `rows` become."""
    (folder / "rows.jsonl").write_text(lines(*rows))
    s = data.ImportSettings(out=str(folder / "out"), **settings)
    data.import_files(s, format, [str(folder / "rows.jsonl")])
    return data.read_records(folder / "out/problems.jsonl.gz")


# --------------------------------------------------------------------------------------------------
# Formats. The rows are made up; the fields are those that the publishers have.

ECHO, DOUBLE = "print(input())", "print(2 * int(input()))"
PY = {"prompt": "def twice(x):\n    '''Twice x.\n    >>> twice(2)\n    4\n    '''\n"}
PY["test"] = "def check(f):\n    assert f(21) == 42\n"


def pack(x) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(x))).decode()


PACKED = pack(json.dumps([{"input": "4", "output": "8", "testtype": "stdin"}]))
CODEFORCES = {
    "id": "1/A", "title": "Twice", "description": "Double it.", "time_limit": 2.0, "memory_limit": 256.0,
    "examples": [{"input": "1\r\n", "output": "2\r\n"}], "official_tests": [{"input": "3\n", "output": "6\n"}],
    "official_tests_complete": True, "interaction_format": None, "input_mode": "stdio", "generated_checker": None,
    "executable": True, "note": "",
}  # fmt: skip
CONTEST = {
    "name": "1_A. Twice", "description": "Double it.", "public_tests": {"input": ["1\n"], "output": ["2\n"]},
    "private_tests": {"input": ["3\n"], "output": ["6\n"]}, "generated_tests": {"input": ["5\n"], "output": ["10\n"]},
    "solutions": {"language": [1, 3, 3, 2], "solution": ["print input()", DOUBLE, DOUBLE + "  # longer", "int main() {}"]},
    "time_limit": {"seconds": 1, "nanos": 500_000_000}, "memory_limit_bytes": 256 << 20, "input_file": "", "output_file": "",
}  # fmt: skip
MULTIPL_E = {
    "name": "HumanEval_0_twice", "language": "py", "prompt": PY["prompt"], "stop_tokens": ["\ndef"],
    "tests": "def check(candidate):\n    assert candidate(21) == 42\n\ndef test_check():\n    check(twice)\n\ntest_check()\n",
}  # fmt: skip
FORMATS = {  # format -> (rows, what of the one record is to be found); every python program of it passes
    "humaneval-x": (
        [PY | {"task_id": "Python/7", "declaration": "def twice(x):\n    '\n", "canonical_solution": "    return x * 2\n",
               "test": PY["test"] + "check(twice)\n", "example_test": ""}], {"id": "HumanEval/7"},
    ),
    "humanevalpack": (
        [PY | {"problem": "HumanEval/7", "lang": "python", "entry_point": "twice", "instruction": "Write it:\nTwice x.", "setup": "",
               "declaration": "def twice(x):\n", "solution": "    return x * 2\n", "buggy": "    return x\n"}], {"prompt": "Twice x."},
    ),
    "mbxp": (
        [PY | {"task_id": "MBPP/7", "language": "python", "entry_point": "twice", "canonical_solution": "    return x * 2", "description": "Twice."},
         {"task_id": "MBGP/7", "language": "go", "entry_point": "twice", "canonical_solution": None, "description": "Twice.",
          "prompt": 'package main\nimport (\n\t"reflect"\n)\n// Twice\nfunc twice (x int) int {\n',
          "test": 'func main() {\n\tif !reflect.DeepEqual(twice(21), 42) { panic("no") }\n}\n'}],
        {"id": "MBXP/7", "prompt": "Twice."},
    ),
    "humaneval-xl": (
        [PY | {"task_id": "python/7", "language": "python", "entry_point": "twice", "canonical_solution": "    return x * 2", "description": "Doppelt.",
               "natural_language": "German"}], {"id": "HumanEval-XL/7/German"},
    ),
    "mceval": (
        [PY | {"task_id": "Python/7", "instruction": "Twice x.", "signature": "def twice(x)", "docstring": "", "entry_point": "twice",
               "canonical_solution": "    return x * 2", "level": "easy"}], {"id": "McEval/Python/7", "level": "easy"},
    ),
    "multipl-e": ([MULTIPL_E], {"id": "MultiPL-E/HumanEval_0_twice", "solutions": {}}),
    "xcodeeval": (
        [{"src_uid": "u", "description": "Double it.", "input_spec": "x", "output_spec": "2x", "notes": None, "sample_inputs": ["1"],
          "sample_outputs": ["2"], "time_limit": "2 seconds", "memory_limit": "256 megabytes", "difficulty": 800},
         {"u": [{"input": "3\r\n", "output": ["6\r\n", "6.0"]}]},
         *({"src_uid": "u", "lang": lang, "lang_cluster": "x", "source_code": code, "exec_outcome": outcome} for lang, code, outcome in
           [("PyPy 3", DOUBLE, "PASSED"), ("Python 3", ECHO, "WRONG_ANSWER"), ("GNU C++17 (64)", "int main() {}", "PASSED"), ("Python 2", "print 1", "PASSED")])],
        {"time_limit": 2.0, "memory_limit": 256.0, "tests": [{"stdin": "3\n", "stdout": ["6\n", "6.0"]}], "compare": "numbers", "rating": 800},
    ),
    "codeforces": (
        [CODEFORCES, *({"problem_id": "1/A", "programmingLanguage": "PyPy 3-64", "verdict": verdict, "source": source}
                       for verdict, source in (("OK", DOUBLE), ("WRONG_ANSWER", ECHO)))],
        {"id": "1/A", "tests": [{"stdin": "1\n", "stdout": "2\n"}, {"stdin": "3\n", "stdout": "6\n"}], "time_limit": 2.0, "compare": "tokens"},
    ),
    "codecontests": (
        [CONTEST], {"time_limit": 1.5, "memory_limit": 256.0, "solutions": {"python": DOUBLE, "cpp": "int main() {}"},
                    "tests": [{"stdin": f"{k}\n", "stdout": f"{2 * k}\n"} for k in (1, 3, 5)]},
    ),
    "apps": (
        [{"problem_id": 3, "question": "Double it.", "starter_code": "", "solutions": json.dumps([DOUBLE]),
          "input_output": json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]})}], {"id": "3"},
    ),
    "taco": (
        [{"question": "Double it.", "starter_code": "def twice(x):\n\t", "solutions": json.dumps(["def twice(x):\n    return 2 * x"]),
          "input_output": json.dumps({"fn_name": "twice", "inputs": [[2], [3]], "outputs": [[4], [6]]}), "time_limit": "2.0 seconds"}],
        {"id": "rows/1", "time_limit": 2.0},
    ),
    "deepcoder": (
        [{"problem": "Double it.", "solutions": [DOUBLE], "tests": json.dumps([{"input": "2", "output": "4", "type": "stdin_stdout"}])}],
        {"tests": [{"stdin": "2", "stdout": "4"}]},
    ),
    "livecodebench": (
        [{"question_id": "q", "question_content": "Double it.", "starter_code": "", "private_test_cases": PACKED,
          "public_test_cases": json.dumps([{"input": "2", "output": "4", "testtype": "stdin"}])}],
        {"tests": [{"stdin": "2", "stdout": "4"}, {"stdin": "4", "stdout": "8"}], "solutions": {}},
    ),
}  # fmt: skip


def test_published_programs_are_run_whole_and_what_only_ends_early_is_named(tmp_path, capsys):
    [right], _ = FORMATS["humanevalpack"]
    early = right | {"problem": "HumanEval/8", "solution": "    raise SystemExit\n"}
    broken = right | {"problem": "HumanEval/9", "solution": "    return x\n"}
    (tmp_path / "humanevalpack.jsonl.gz").write_bytes(gzip.compress(lines(right, early, broken).encode()))
    s = {"data": tmp_path, "out": tmp_path / "out", "sets": ["humanevalpack"], "languages": ["python"]}
    s = SimpleNamespace(**s, every=1, workers=1)
    for _ in range(2):  # the second time from what was kept
        assert real.main(s) == 1
        shown = capsys.readouterr().out
        assert "FAULT: humanevalpack HumanEval/8 python\n" in shown and shown.count("FAULT") == 1
        assert "| humanevalpack | python | 3 | 1 | 1 |" in shown  # programs, pass, of the others pass by hand
        assert "| humanevalpack wrong | python | 3 | 0 | 0 |" in shown


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format, tmp_path, box):
    rows, expected = FORMATS[format]
    if format == "xcodeeval":  # its tests are a file of their own: one object
        (tmp_path / "unittest_db.json").write_text(json.dumps(rows.pop(1)))
        (tmp_path / "rows.jsonl").write_text(lines(*rows))
        files = [str(tmp_path / name) for name in ("unittest_db.json", "rows.jsonl")]
        data.import_files(data.ImportSettings(out=str(tmp_path / "out")), format, files)
        [record] = data.read_records(tmp_path / "out/problems.jsonl.gz")
    else:
        [record] = bring(tmp_path, format, *rows)
    assert {name: record[name] for name in expected} == expected
    right = {"livecodebench": DOUBLE, "multipl-e": "def twice(x):\n    return x + x\n"}.get(format)
    right = right or record["solutions"]["python"]
    wrong = right.replace("x * 2", "x * 3").replace("2 * ", "3 * ").replace("x + x", "x")
    verdicts = [r.verdict for r in box.map([data.job(record, "python", p) for p in (right, wrong)])]
    assert verdicts[0] == "ok" and verdicts[1] in ("wrong_answer", "runtime_error"), record


@pytest.mark.parametrize(
    "prompt", ["# Twice.\n", "def one():\n    return 1\n\n\n# Twice.\ndef twice( x ):\n"], ids=["comment", "helper"]
)
def test_what_opens_a_program_of_humaneval_x(prompt, tmp_path, box):
    """Its prompt, which may lack the imports and, in Rust, the declaration."""
    solution = f"    return math.floor(2 * x * {'one()' if 'one' in prompt else 1})\n"
    own = {"prompt": prompt, "import": "import math\n", "canonical_solution": solution}
    [record] = bring(tmp_path, "humaneval-x", FORMATS["humaneval-x"][0][0] | {"declaration": "def twice(x):\n"} | own)
    program = record["solutions"]["python"]
    assert program.count("def twice") == program.count("import math") == 1
    assert box.run(*data.job(record, "python", program)).passed


def test_rust_is_asked_for_without_crates_that_are_not_here(tmp_path):
    test = "#[cfg(test)]\nmod tests {\n    use super::*;\n    #[test]\n    fn t() { assert_eq!(twice(21), 42); }\n}\n"
    own = {
        "task_id": "Rust/7",
        "prompt": "// Twice.\n",
        "canonical_solution": "    x * 2\n}\n",
        "test": test,
        "example_test": "",
    }
    own["declaration"] = "use rand::Rng;\nuse md5;\nuse std::cmp;\nfn twice(x: i32) -> i32 {\n"
    [record] = bring(tmp_path, "humaneval-x", own)
    opening = "use std::cmp;\nfn twice(x: i32) -> i32 {"
    assert record["prompts"]["rust"].endswith(f"// Twice.\n{opening}")
    assert record["solutions"]["rust"] == f"{opening}\n    x * 2\n}}"


def test_functions_are_asked_for_as_a_whole_and_shown_with_their_signature(tmp_path):
    [record] = bring(tmp_path, "mbxp", *FORMATS["mbxp"][0])
    assert PY["prompt"].strip() in record["prompts"]["python"] and "func twice (x int) int {" in record["prompts"]["go"]
    assert record["solutions"] == {"python": "def twice(x):\n    return x * 2"}  # without what the statement says
    # A text's end begins a line, as a comment may.
    held = PY | {"prompt": f"TEXT = '''\nNo comment.\n'''\n\n{PY['prompt']}"}
    [other] = bring(tmp_path, "mbxp", FORMATS["mbxp"][0][0] | held)
    assert other["solutions"] == {"python": "TEXT = '''\nNo comment.\n'''\n\ndef twice(x):\n    return x * 2"}
    assert record["harness"]["go"].startswith("package main")
    assert data.gradable(record, "go") and not data.gradable(record, "c")


MULTIPL_E_FILES = {  # language -> (prompt, tests, a right answer, what is wrong in a wrong one)
    "cpp": ("#include<assert.h>\n#include<bits/stdc++.h>\n// Twice.\nlong twice(long x) {\n",
            "}\nint main() {\n    auto candidate = twice;\n    assert(candidate((21)) == (42));\n}\n", "long twice(long x) { return x + x; }", "x + x"),
    "java": ("import java.util.*;\nclass Problem {\n    // Twice.\n    public static long twiceOf(long x) {\n",
             "    }\n    public static void main(String[] args) {\n    assert(twiceOf((21l)) == (42l));\n    }\n\n}\n",
             "public static long twiceOf(long x) { return x + x; }", "x + x"),
    "cs": ("using System;\nusing System.Diagnostics;\nclass Problem {\n    // Twice.\n    public static long Twice(long x) {\n",
           "    }\n    public static void Main(string[] args) {\n    Debug.Assert(Twice((21L)) == (42L));\n    }\n\n}\n",
           "public static long Twice(long x) { return x + x; }", "x + x"),
    "go_test.go": ('package twice_test\n\nimport (\n    "testing"\n    "fmt"\n)\n\n// Twice.\nfunc twice(x int) int {\n',
           '}\n\nfunc TestTwice(t *testing.T) {\n  candidate := twice\n    type test struct {\n        actual   interface{}\n        expected interface{}\n    }\n'
           '   tests := []test{\n     { actual: candidate(21), expected: 42 },\n   }\n\n    for i, tc := range tests {\n        t.Run(fmt.Sprintf("test num % d", i), '
           'func(t *testing.T) {\n            if fmt.Sprintf("%v", tc.actual) != fmt.Sprintf("%v", tc.expected) {\n                t.Errorf("no")\n            }\n        })\n    }\n}\n',
           "package main\n\nfunc twice(x int) int { return x + x }", "x + x"),
    "rs": ("/// Twice.\nfn twice(x: isize) -> isize {\n", "}\n\nfn main() {\n    let candidate = twice;\n    assert_eq!(candidate(21), 42);\n}\n",
           "fn twice(x: isize) -> isize { x + x }", "x + x"),
    "rb": ("# Twice.\ndef twice(x)\n", "require 'test/unit'\nclass TestHumanEval < Test::Unit::TestCase\n  def test_twice\n    candidate = method(:twice)\n"
           "    assert_equal(42, candidate.call(21))\n  end\nend\n", "def twice(x)\n  x + x\nend", "x + x"),
    "lua": ("-- Twice.\nlocal function twice(x)\n", "lu = require('luaunit')\n\nTestHumanEval = {}\nfunction TestHumanEval:test_twice()\n    local candidate = twice\n"
            "    lu.assertEquals(candidate(21), 42)\nend\n\nos.exit(lu.LuaUnit.run())", "local function twice(x)\n  return x + x\nend", "x + x"),
    "js": ("//Twice.\nfunction twice(x){\n", "const assert = require('node:assert');\n\n\nfunction test() {\n  let candidate = twice;\n"
           "  assert.deepEqual(candidate(21),42);\n}\n\ntest();", "function twice(x) { return x + x; }", "x + x"),
    "ts": ("//Twice.\nfunction twice(x: number): number {\n", "declare var require: any;\nconst assert = require('node:assert');\n\n\nfunction test() {\n"
           "  let candidate = twice;\n  assert.deepEqual(candidate(21),42);\n}\n\ntest();", "function twice(x: number): number { return x + x; }", "x + x"),
    "php": ("<?php\n// Twice.\nfunction twice($x) {\n", "}\n\nfunction candidate(...$args) {\n    return twice(...$args);\n}\n\nfunction test(): void {\n"
            "    if (candidate(21) !== 42) { throw new Exception(\"Test failed!\"); }\n}\n\ntest();", "<?php\nfunction twice($x) { return $x + $x; }\n?>", "$x + $x"),
    "sh": ("#!/bin/bash\n# Twice.\ntwice() {\n", "}\n\ncandidate() {\n    twice \"$@\"\n}\n\nset -e\nrun_test() {\n    [[ $(candidate \"21\") = \"42\" ]]\n}\n\nrun_test",
           "twice() {\n  echo $(($1 + $1))\n}", "$1 + $1"),
    "r": ("# Twice.\ntwice <- function(x) {", "test_humaneval <- function() {\ncandidate <- twice\n    if(!identical(candidate(21), 42)){quit('no', 1)}\n}\ntest_humaneval()",
          "twice <- function(x) { x + x }", "x + x"),
    "rkt": ("#lang racket\n\n;; Twice.\n(define (twice x)\n", "(require rackunit)\n\n(define (test-humaneval)\n\n  (let (( candidate twice))\n"
            "    (check-within (candidate 21) 42 0.001)\n))\n\n(test-humaneval)", "#lang racket\n(define (twice x) (+ x x))", "(+ x x)"),
    "pl": ("# Twice.\nsub twice {\n    my($x) = @_;\n", "}\nuse Test::Deep;\n\n\nsub testhumaneval {\n    my $candidate = \\&twice;\n"
           '        if(eq_deeply($candidate->(21),42)) {\n        print "ok!" }else{\n        exit 1;\n        }\n}\n\ntesthumaneval();', "sub twice { my($x) = @_; $x + $x }", "$x + $x"),
}  # fmt: skip


def test_multipl_e(tmp_path, box):
    rows = [{"name": f"HumanEval_0_twice_{p}", "language": p, "prompt": prompt, "tests": tests, "doctests": "keep", "stop_tokens": []}
            for p, (prompt, tests, *_) in MULTIPL_E_FILES.items()]  # fmt: skip
    jobs, expected, records = [], [], bring(tmp_path, "multipl-e", *rows)
    for record, (name, (_, _, right, slip)) in zip(records, MULTIPL_E_FILES.items(), strict=True):
        language = data.public_language(name)
        assert list(record["harness"]) == [language]
        if language in sandbox.installed():
            other = "$x + 1" if language == "php" else slip.replace("x", "1", 1).replace("$1", "1", 1)
            wrong = right.replace(slip, other)
            jobs += [data.job(record, language, right), data.job(record, language, wrong)]
            expected += [(name, True), (name, False)]
    found = zip(expected, box.map(jobs), strict=True)
    assert not [(name, r) for (name, passed), r in found if r.passed != passed] and jobs


LEFT_OUT = {  # (format, what of its row differs): the reason that is said
    "its own checker": ("codeforces", CODEFORCES | {"generated_checker": "def check(): ..."}, "a checker of its own"),
    "interaction": ("codeforces", CODEFORCES | {"interaction_format": "Ask."}, "interactive"),
    "files": ("codecontests", CONTEST | {"input_file": "in.txt"}, "reads a file"),
    "no tests": ("apps", FORMATS["apps"][0][0] | {"input_output": ""}, "no tests"),
    "an unknown PL": ("mceval", FORMATS["mceval"][0][0] | {"task_id": "Klingon/1"}, "Klingon is no PL"),
    "a nameless function": ("deepcoder", {"problem": "p", "tests": '[{"input": "1", "output": "2", "testtype": "functional"}]'}, "no name"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_counted_and_said(name, tmp_path, capsys):
    format, row, reason = LEFT_OUT[name]
    other = FORMATS[format][0][0] | {"id": "2/B", "name": "other", "problem_id": 9}
    assert len(bring(tmp_path, format, row, other)) == 1
    assert f"1 {reason}" in capsys.readouterr().out or reason == "no name"


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


MISTAKES = {
    "no field": ("apps", lines({"question": 3}), r"rows.jsonl: row 1: field 'question': must be str"),
    "no JSON": ("apps", "{\n", r"rows.jsonl: row 1: no JSON object"),
    "no object": ("apps", "[1]", r"rows.jsonl: row 1: no JSON object"),
    "not JSON in a text": ("apps", lines({"question": "q", "input_output": "{"}), "field 'input_output': not JSON"),
    "a nested field": ("codeforces", lines(CODEFORCES | {"official_tests": [{"in": 1}]}), "row 1: KeyError 'input'"),
    "half a surrogate pair": ("deepcoder", lines({"problem": "\ud800", "tests": '[{"input": "1", "output": "1"}]'}), "row 1: field 'prompt'"),
    "a pickle that calls": (
        "livecodebench",
        lines({"question_content": "q", "private_test_cases": pack(Evil())}),
        "field 'private_test_cases': neither JSON nor a packed text of it .asks for builtins.print",
    ),
    "another format": ("klingon", "", "no format 'klingon'; there are humaneval-x"),
    "nothing of use": ("apps", lines(FORMATS["apps"][0][0] | {"input_output": ""}), "no record in apps"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_files_end_in_one_line_and_write_nothing(name, tmp_path, capsys):
    format, text, message = MISTAKES[name]
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message) as error:
        data.main(["import", format, str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    assert "unpickled" not in capsys.readouterr().out


def test_forms_of_files(tmp_path):
    row = FORMATS["apps"][0][0]
    (tmp_path / "array.json").write_text(json.dumps([row, row | {"problem_id": 4}]))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines(row | {"problem_id": 5}).encode()))
    rows = [r for path in sorted(tmp_path.iterdir()) for r in data.read_rows(path)]
    assert [r["problem_id"] for r in rows] == [3, 4, 5] and rows[2].where.endswith("lines.jsonl.gz: row 1")
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "table.parquet")
    assert [r["problem_id"] for r in data.read_rows(tmp_path / "table.parquet")] == [3]


def test_names_of_languages():
    names = {"GNU C++17 (64)": "cpp", "GNU C11": "c", "Node.js": "javascript", "JavaScript": "javascript", "Java 11": "java", "MS C#": "csharp",
             "PyPy 3-64": "python", "PascalABC.NET": "pascal", "Delphi 7": "pascal", "Kotlin 1.7": "kotlin", "go_test.go": "go", "rs": "rust",
             "Rust 2021": "rust", "CPP": "cpp", "C": "c", "Common Lisp": "commonlisp", "Shell": "bash", "D": "d", "cs": "csharp", "r": "r"}  # fmt: skip
    assert {name: data.public_language(name) for name in names} == names
    for name in ("Python 2", "PyPy 2", "Emacs Lisp", "F#", "Visual Basic"):
        with pytest.raises(data.LeftOut):
            data.public_language(name)


def test_units_of_limits():
    assert data.limits("1500 milliseconds", "262144 kilobytes") == {"time_limit": 1.5, "memory_limit": 256}
    assert data.limits(2, "1 gigabyte") == {"time_limit": 2, "memory_limit": 1024} and data.limits(None, 0) == {}


def test_several_programs_of_a_problem_are_records_of_their_own(tmp_path, capsys):
    first, second = bring(tmp_path, "codecontests", CONTEST, programs=2)
    assert [first["id"], second["id"]] == ["1_A. Twice", "1_A. Twice#2"] and list(second["solutions"]) == ["python"]
    assert len(first["solutions"]["python"]) < len(second["solutions"]["python"])
    assert "Python 2 is no PL" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Published files


def public_rows(*names: str):
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not here")
    for name in names:
        for line in gzip.decompress((SHARED / name).read_bytes()).decode().splitlines():
            yield json.loads(line)


def test_published_programs_pass_and_their_buggy_versions_fail(tmp_path, box):
    """The first problems in each PL that is here; problem 0 in Rust and others by hand: see the data's own notes."""
    rows, here = list(public_rows("humanevalpack.jsonl.gz")), sandbox.installed()
    rows = [r for r in rows if r["problem"] in ("HumanEval/1", "HumanEval/3", "HumanEval/64")]
    right = bring(tmp_path, "humanevalpack", *rows)
    wrong = bring(tmp_path, "humanevalpack", *(r | {"solution": r["buggy"]} for r in rows))
    for records, passed in ((right, True), (wrong, False)):
        jobs = [(r, p, text) for r in records for p, text in r["solutions"].items() if p in here]
        results = box.map([data.job(*job) for job in jobs])
        assert jobs and not [(job, r.verdict) for job, r in zip(jobs, results, strict=True) if r.passed != passed]


# --------------------------------------------------------------------------------------------------
# Verify and split

TESTS = [{"stdin": f"{k}\n", "stdout": f"{2 * k}\n"} for k in (11, 22, 33)]
LISTED = 'n = input()\nprint("22" if n == "11" else "44" if n == "22" else 66)'


def problem(name, prompt="Double it.", **fields):
    return {"id": name, "prompt": prompt, "tests": TESTS, "solutions": {"python": DOUBLE}} | fields


def test_verify_keeps_what_holds(tmp_path, capsys):
    perl = "print 2 * <STDIN>"
    records = [
        problem("right", solutions={"python": DOUBLE, "perl": perl}),
        problem("one is wrong", solutions={"python": ECHO, "perl": perl}),
        problem("a faulty test", tests=[*TESTS, {"stdin": "1", "stdout": "3"}], solutions={"python": DOUBLE, "perl": perl}),
        problem("lists its answers", solutions={"python": LISTED, "perl": perl}),
        problem("none is right", solutions={"python": ECHO}), problem("nor of two", solutions={"python": ECHO, "perl": "print 1"}),
        problem("years", "Print a year.", tests=[{"stdin": "1", "stdout": "1999"}, {"stdin": "2", "stdout": "2001"}], solutions={
            "python": 'print("1999" if input() == "1" else "2001")', "ruby": 'puts gets.to_i == 1 ? "1999" : "2001"',
            "perl": 'print <STDIN> == 1 ? "1999" : "2001"'}),  # what most of three programs have belongs to the problem
        problem("words of the statement", "Print YES or NO.", tests=[{"stdin": "1", "stdout": "YES"}, {"stdin": "2", "stdout": "NO"}],
                solutions={"python": 'print("YES" if input() == "1" else "NO")'}),
    ]  # fmt: skip
    data.write_records(tmp_path / "in.jsonl", records)
    data.verify(data.VerifySettings(data=str(tmp_path / "in.jsonl"), keep=str(tmp_path / "kept")))
    kept = {r["id"]: r for r in data.read_records(tmp_path / "kept/in.jsonl")}
    assert {name: list(r["solutions"]) for name, r in kept.items()} == {
        "right": ["python", "perl"], "one is wrong": ["perl"], "a faulty test": ["python", "perl"],
        "lists its answers": ["perl"], "words of the statement": ["python"], "years": ["python", "ruby", "perl"],
    }  # fmt: skip
    assert kept["a faulty test"]["tests"] == TESTS
    ledger = json.loads((tmp_path / "kept/dropped.json").read_text())
    reasons = {(d["id"], d["what"]): d["why"] for d in ledger}
    assert reasons["lists its answers", "program in python"] == "lists its tests' answers"
    calls = sandbox.demands(record := bring(tmp_path, "taco", *FORMATS["taco"][0])[0]).harness["python"]
    record["tests"] = [{"stdin": json.dumps([[k], [2 * k]])} for k in (11, 22)]
    listing = "def twice(x):\n    return {11: 22, 22: 44}[x]"
    assert "«answer»" in calls and not data.hard_coded(record)
    assert data.hard_coded(record | {"solutions": {"python": listing}}) == {"python"}
    assert reasons["one is wrong", "program in python"] == "fails its tests: wrong_answer"
    assert reasons["a faulty test", "test 4"] == "no program passes it"
    assert reasons["none is right", "record"] == "none of its programs is right" and len(ledger) == 8
    assert reasons["nor of two", "record"] == "none of its programs is right"  # its tests are not at fault
    assert "3 program in python: fails its tests: wrong_answer" in capsys.readouterr().out


def test_verify_keeps_files_apart_that_share_an_id(tmp_path):
    perl = "print 2 * <STDIN>"
    for name, program in (("a", ECHO), ("b", DOUBLE)):
        data.write_records(tmp_path / f"{name}.jsonl", [problem("same", solutions={"python": program, "perl": perl})])
    data.verify(data.VerifySettings(data=str(tmp_path), keep=str(tmp_path / "kept")))
    kept = [list(data.read_records(tmp_path / f"kept/{name}.jsonl")[0]["solutions"]) for name in "ab"]
    assert kept == [["perl"], ["python", "perl"]]
    with pytest.raises(SystemExit, match="holds the records themselves; give another folder"):
        data.verify(data.VerifySettings(data=str(tmp_path), keep=str(tmp_path)))


def test_split_keeps_equal_problems_on_one_side(tmp_path, capsys):
    records = [problem(str(i), f"Statement {i // 2}.", solutions={"python": f"print({i})"}) for i in range(40)]
    for i in range(20):
        same = {"python": f"print( {i} )", "perl": f"print {i % 7}"}
        records.append(problem(f"same {i}", f"Other {i}.", solutions=same))
    data.write_records(tmp_path / "problems.jsonl", records)
    data.split(data.SplitSettings(data=str(tmp_path), out=str(tmp_path / "out"), held_out=0.2, rl=0.4))
    sides = collections.defaultdict(set)
    splits = {name: data.read_split(tmp_path / "out", name) for name in ("train", "rl", "dev", "test")}
    for name, own in splits.items():
        for r in own:
            for mark in [r["prompt"], *r["solutions"].items()]:
                sides[mark].add(name)
    assert all(len(names) == 1 for names in sides.values())
    assert sorted(r["id"] for own in splits.values() for r in own) == sorted(r["id"] for r in records)
    out = capsys.readouterr().out
    assert "33 records share a statement or a program" in out
    assert re.findall(r"^(\w+: \d+) problems", out, re.M) == ["dev: 5", "test: 6", "rl: 11", "train: 5"]
    assert data.read_roles(tmp_path / "out").sft == ("python", "perl") and "base.jsonl" not in out
    (tmp_path / "one").mkdir()
    (tmp_path / "one/base.jsonl").write_text("")
    data.split(data.SplitSettings(data=str(tmp_path), out=str(tmp_path / "one"), sft=("python",)))
    assert data.read_roles(tmp_path / "one").unseen[0] == "perl"  # which has programs
    assert "one/base.jsonl was there before: sft.py replays it" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="leave none for"):
        data.split(data.SplitSettings(data=str(tmp_path), out=str(tmp_path / "none"), held_out=0))
    assert not (tmp_path / "none").exists()


# --------------------------------------------------------------------------------------------------
# Programs from a model, and the whole way

LANGUAGES = {"python": "print(int(input()) + {k})", "javascript": "console.log(parseInt(require('fs').readFileSync(0)) + {k})",
             "ruby": "puts gets.to_i + {k}"}  # fmt: skip


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    """A file as xCodeEval has it and a model of two layers with a tokenizer: (folder of both)."""
    folder = tmp_path_factory.mktemp("way")
    names, rows = {"python": "PyPy 3", "javascript": "Node.js", "ruby": "Ruby 3"}, []
    for k in range(10, 34):
        rows.append({"src_uid": str(k), "description": f"Add {k}.", "sample_inputs": [], "sample_outputs": []})
        for p, text in LANGUAGES.items():
            program = {"lang": names[p], "source_code": text.format(k=k)}
            rows.append({"src_uid": str(k), "exec_outcome": "PASSED"} | program)
    tests = {str(k): [{"input": str(i), "output": [str(i + k)]} for i in (1, 5)] for k in range(10, 34)}
    (folder / "programs.jsonl").write_text(lines(*rows))
    (folder / "unittest_db.json").write_text(json.dumps(tests))
    records = [problem(str(k), solutions={p: text.format(k=k) for p, text in LANGUAGES.items()}) for k in range(40)]
    data.train_tokenizer(records, 400, folder / "model")
    tokenizer = data.Tokenizer(folder / "model")
    save(new_tiny(tokenizer), folder / "model")
    tokenizer.save(folder / "model")
    return folder


WAY = """
data.py import xcodeeval {way}/programs.jsonl {way}/unittest_db.json --out {out}/problems
data.py verify --data {out}/problems --keep {out}/kept
data.py split --data {out}/kept --out {out}/data --sft python javascript --unseen ruby --held-out 0.1
sft.py --data {out}/data --model {way}/model --replay 0 --tokens 3000 --out {out}/sft
rl.py --data {out}/data --model {out}/sft --steps 1 --prompts 2 --samples 2 --max-new-tokens 4 --eval-tokens 4 --out {out}/rl
eval.py --data {out}/data --models {out}/sft {out}/rl --max-new-tokens 4 --out {out}/table
"""


def test_the_whole_way(way, tmp_path):
    """The README's way at toy size: import, verify, split, then SFT, RL and evaluation on two ranks."""
    for line in WAY.strip().splitlines():
        script, *flags = line.format(way=way, out=tmp_path).split()
        if script == "data.py":
            data.main(flags)
        else:
            torchrun(*flags, "--device", "cpu", script=Path(data.__file__).with_name(script)).finish()
    table = (tmp_path / "table/table.md").read_text()
    assert "| sft |" in table and "| rl |" in table and "ruby (unseen)" in table


def test_programs_from_a_model(way, tmp_path, monkeypatch, capsys):
    """What it writes is made up, for a model of two layers writes nothing; all that is judged is judged by the sandbox."""
    folder, seen, asked = tmp_path / "problems", [], []
    records = [problem("right"), problem("listed", "Twice."), problem("there", solutions={"perl": "print 1"})]
    records.append(problem("wrong", "Two times.", solutions={"ruby": "puts 1", "python": DOUBLE}))
    data.write_records(folder / "problems.jsonl", records)
    answers = {"right": ["print 1", "print 2 * <STDIN>", "print 2*<STDIN>"], "wrong": ["print 3"] * 3,
               "listed": ['%a = (11 => "22", 22 => "44", 33 => "66"); print $a{0 + <STDIN>}'] * 3}  # fmt: skip

    def sample(model, tokenizer, tasks, max_new_tokens, temperature, samples, seed, rows, **_):
        seen.extend(tasks)
        asked.append((temperature, seed))
        text = [(r, p, f"```{p}\n{program}\n```") for r, p in tasks for program in answers[r["id"]]]
        return [evaluation.Rollout(r, p, [], tokenizer.encode(t), [], True) for r, p, t in text]

    monkeypatch.setattr(evaluation, "roll_out", sample)
    s = evaluation.Settings(translate=True, models=(str(way / "model"),), data=str(folder), to=("perl",), samples=3, temperature=0.8, rows=3, keep=str(tmp_path / "out"), device="cpu")  # fmt: skip
    evaluation.main(s)
    assert {r["id"] for r, _ in seen} == set(answers) and all(DOUBLE in r["prompt"] for r, _ in seen)
    assert len({seed for _, seed in asked}) == len(asked) == 3 and {temperature for temperature, _ in asked} == {0.8}
    kept = {r["id"]: r["solutions"] for r in data.read_records(tmp_path / "out/problems.jsonl")}
    assert kept["right"] == {"perl": "print 2 * <STDIN>\n", "python": DOUBLE}
    assert "perl" not in kept["listed"] | kept["wrong"]
    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "out/ledger.txt").read_text().splitlines())}
    assert rows["listed"]["rejected"][0]["verdict"] == "hard_coded" and len(rows["wrong"]["rejected"]) == 1
    assert "perl         55.6% of 9 samples pass; 1 of 3 problems have a program" in capsys.readouterr().out
    text = (tmp_path / "out/ledger.txt").read_text().splitlines(keepends=True)
    (tmp_path / "out/ledger.txt").write_text("".join(text[:2]) + text[2][:20])  # interrupted within its last line
    seen.clear()
    evaluation.main(s)
    assert len(seen) == 1 and "55.6% of 9" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--translate and --solve: give --models"):
        evaluation.main(SimpleNamespace(**vars(s) | {"samples": 0}))
