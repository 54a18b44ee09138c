"""Every right program of published data through `data.py import` and the sandbox; what fails there is run by hand.

    python tests/real.py ../shared/data --out runs/real                   # all sets, all PLs that are here; hours
    python tests/real.py ../shared/data --sets mbxp --languages ruby php --every 10

Prints for each set and PL how many programs pass, how many of the others pass by hand (their compiler or interpreter
alone, as the data's publishers put programs together), and names these: each is a fault of ours, unless it only ends
with success before its tests were run. HumanEvalPack's wrong programs have to fail in the sandbox. What was judged is kept in OUT/verdicts.jsonl, and not run again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import sandbox

SETS = {  # by name: its format, and where its files are
    "humanevalpack": ("humanevalpack", "humanevalpack.jsonl.gz"),
    "humaneval-x": ("humaneval-x", "humaneval-x/*.gz"),
    "mbxp": ("mbxp", "mbxp/*.gz"),
    "multilingual_humaneval": ("mbxp", "multilingual_humaneval/*.gz"),
    "mceval": ("mceval", "mceval/*.gz"),
}
GO = {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOFLAGS": "", "GOCACHE": "/tmp/real-go"}


def whole(format: str, row: dict, language: str) -> str:
    """The program as its publishers put it together."""
    if format == "humanevalpack":
        opening = row["setup"] + "".join(re.findall(r"\A\s*import \([^)]*\)\n", row["prompt"])) + row["declaration"]
        text, test = opening + row["solution"], row["test"]
    else:
        text, test = row["prompt"] + row["canonical_solution"], row["test"]
        text = row.get("test_setup", "") + text
    if language == "python" and "def check(" in test and not re.search(r"(?<!def )\bcheck\(", test):
        test += f"\ncheck({row['entry_point']})\n"
    if language == "javascript":  # which only writes, else
        text = "console.assert = (c, m) => { if (!c) throw new Error(m) };\n" + text
    if language == "rust":
        text = re.sub(r"^\s*use (rand|regex|md5)\b.*\n", "", text, flags=re.M)
    return f"{text}\n{test}"


def passes_by_hand(text: str, language: str) -> bool:
    own, tools = sandbox.LANGUAGES[language], sandbox.toolchain(language)
    name, main = sandbox._source_name(own, text)
    with tempfile.TemporaryDirectory() as place:
        lines = [line for line in (own.compile, own.run) if line]
        if language == "go":
            name, lines = "main_test.go", ["go test"]
        elif language == "rust":
            lines[0] += " --test"
        elif language in ("python", "ruby"):
            lines = [f"{lines[0].split()[0]} {{box}}/{name}"]
        Path(place, name).write_text(text)
        fill = {"box": place, "file": f"{place}/{name}", "main": main, "mb": 2048, "tmp": place, "cache": place}
        env = {**os.environ, **GO, "NODE_PATH": "/usr/share/nodejs"}
        for line in lines:
            command = [tools.get(word, word).format_map(fill) for word in line.split()]
            how = {"cwd": place, "env": env, "capture_output": True, "stdin": subprocess.DEVNULL}
            try:
                done = subprocess.run(command, timeout=30, **how)
            except subprocess.TimeoutExpired:
                return False
            if done.returncode:
                return False
    return True


def programs(options: argparse.Namespace, name: str, wrong: bool) -> Iterator[tuple]:
    """(what it is, the record, PL, program, the publishers' row)."""
    format, pattern = SETS[name]
    paths = sorted(map(str, Path(options.data).glob(pattern)))
    out = Path(options.out, name + " wrong" * wrong)
    if wrong:
        rows = [{**row, "solution": row["buggy"]} for path in paths for row in data.read_rows(Path(path))]
        out.mkdir(parents=True, exist_ok=True)
        paths = [str(out / "rows.jsonl")]
        Path(paths[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data.import_files(data.ImportSettings(out=str(out)), format, paths)
    rows = {}
    for row in (row for path in paths for row in data.read_rows(Path(path))):
        row.left = Counter()
        try:
            part = data.PUBLIC_FORMATS[format](row)
        except data.LeftOut:
            continue
        rows |= {(part["id"], language): row for language in part["solutions"]}
    for record in data.read_records(out / "problems.jsonl.gz")[:: options.every]:
        for language, program in record["solutions"].items():
            yield f"{out.name} {record['id']} {language}", record, language, program, rows[record["id"], language]


def main(options: argparse.Namespace) -> int:
    here = [p for p in options.languages or sandbox.installed() if p in sandbox.installed()]
    kept, counts, faults = Path(options.out, "verdicts.jsonl"), {}, 0
    kept.parent.mkdir(parents=True, exist_ok=True)
    known = dict(map(json.loads, kept.read_text().splitlines())) if kept.exists() else {}
    with sandbox.Sandbox(options.workers) as box, kept.open("a") as log:
        for name in options.sets:
            for wrong in (False, True)[: 1 + (name == "humanevalpack")]:
                jobs = [job for job in programs(options, name, wrong) if job[2] in here]
                new = [job for job in jobs if job[0] not in known]
                results = box.stream([data.job(*job[1:4]) for job in new], progress=name)
                for (what, _, language, _, row), result in zip(new, results, strict=True):
                    failed = not result.passed and not wrong
                    hand = failed and passes_by_hand(whole(SETS[name][0], row, language), language)
                    known[what] = [result.passed, hand]
                    log.write(json.dumps([what, known[what]]) + "\n")
                    log.flush()
                for what, _, language, *_ in jobs:
                    passed, hand = known[what]
                    count = counts.setdefault((name + " wrong" * wrong, language), Counter())
                    count.update(programs=1, passed=int(passed), hand=int(hand))
                    if passed if wrong else hand:
                        print("FAULT:", what)
                        faults += 1
    print("| set | PL | programs | pass | of the others pass by hand |\n|---|---|---|---|---|")
    for (name, language), c in counts.items():
        print(f"| {name} | {language} | {c['programs']} | {c['passed']} | {c['hand']} |")
    return faults > 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of the published files")
    parser.add_argument("--out", default="runs/real", help="folder for records and verdicts")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--languages", nargs="*", help="these PLs alone")
    parser.add_argument("--every", type=int, default=1, help="every Nth record")
    parser.add_argument("--workers", type=int, help="programs at a time")
    sys.exit(main(parser.parse_args()))
