"""Grading and estimates: what counts as a pass, pass@k, intervals, tables, representations, figures."""

import functools
import itertools
import json
import math
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

import data
import eval as evaluation
import sandbox
from eval import MARGIN, RETRIEVAL, Outcome, Rollout
from model import save
from sft import World

RECORD = {"id": "r", "prompt": "Double it.", "solutions": {}}
RECORD["tests"] = [{"stdin": "2\n", "stdout": "4\n"}, {"stdin": "5\n", "stdout": "10\n"}]
RIGHT = "print(2 * int(input()))"


def rollout(tokenizer, text, stopped=True, language="python", record=RECORD):
    return Rollout(record, language, [tokenizer.bos], tokenizer.encode(text), [], stopped)


def test_what_counts_as_a_pass(tokenizer):
    cases = {
        "ok": rollout(tokenizer, f"```python\n{RIGHT}\n```"),
        "truncated": rollout(tokenizer, f"```python\n{RIGHT}\n```", stopped=False),
        "no_program": rollout(tokenizer, f"```python\n{RIGHT}"),
        "wrong_answer": rollout(tokenizer, "```python\nprint(4)\n```"),  # passes the first test only
        "runtime_error": rollout(tokenizer, f"```python\n{RIGHT}\nraise SystemExit(3)\n```"),
    }
    forged = rollout(tokenizer, "```python\nimport sys\nsys.exit(0)\n```")
    with sandbox.Sandbox() as box:
        evaluation.grade([*cases.values(), forged], tokenizer, box)
    assert {name: r.verdict for name, r in cases.items()} == {name: name for name in cases}
    assert forged.verdict == "wrong_answer" and not forged.passed


class Counting:
    """A sandbox that counts its jobs and passes them all."""

    def __init__(self):
        self.jobs = []

    def map(self, jobs, **_):
        self.jobs += jobs
        return [SimpleNamespace(verdict="ok") for _ in jobs]


def test_equal_programs_for_one_problem_run_once(tokenizer):
    box, known = Counting(), {}
    text = f"```python\n{RIGHT}\n```"
    rows = [rollout(tokenizer, text) for _ in range(5)]
    rows += [rollout(tokenizer, text, record=RECORD | {"id": "other"}), rollout(tokenizer, "```python\npass\n```")]
    rows.append(rollout(tokenizer, text.replace("python", "ruby"), language="ruby"))  # the same text, another program
    evaluation.grade(rows, tokenizer, box, known)
    assert len(box.jobs) == 4 and all(r.passed for r in rows)
    evaluation.grade([rollout(tokenizer, text)], tokenizer, box, known)
    assert len(box.jobs) == 4


def test_sample_keeps_tasks_in_order_and_is_reproducible(tokenizer, tiny):
    records = [RECORD | {"id": str(i), "prompt": "word " * i} for i in range(1, 4)]
    tasks = [(r, p) for r in records for p in ("python", "ruby")]
    rows = evaluation.roll_out(tiny, tokenizer, tasks, 5, 1.0, samples=2, seed=3)
    assert [(r.record["id"], r.language) for r in rows] == [(r["id"], p) for r, p in tasks for _ in range(2)]
    assert all(r.prompt == tokenizer.prompt(r.record["prompt"], r.language) for r in rows)
    again = evaluation.roll_out(tiny, tokenizer, tasks, 5, 1.0, samples=2, seed=3)
    assert [r.tokens for r in rows] == [r.tokens for r in again]
    other = evaluation.roll_out(tiny, tokenizer, tasks, 5, 1.0, samples=2, seed=4)
    assert [r.tokens for r in rows] != [r.tokens for r in other]
    greedy, likeliest = (evaluation.roll_out(tiny, tokenizer, tasks, 5, t, top_k=k) for t, k in ((0.0, 0), (1.0, 1)))
    assert [r.tokens for r in greedy] == [r.tokens for r in likeliest] != [r.tokens for r in rows[::2]]


def test_pass_at_k_equals_counting_all_draws():
    for n, c in itertools.product(range(1, 7), range(7)):
        if c <= n:
            for k in range(1, n + 1):
                draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
                assert evaluation.pass_at_k(n, c, k) == pytest.approx(mean(max(d) for d in draws))
    with pytest.raises(ValueError, match="at least 5 samples"):
        evaluation.pass_at_k(4, 1, 5)


def test_wilson_intervals_as_published():
    """Newcombe 1998 (Stat. Med. 17:857), table I, method 3: 81/263, 15/148, 0/20, 1/29."""
    intervals = (0.2553, 0.3662), (0.0624, 0.1605), (0.0, 0.1611), (0.0061, 0.1718)
    for (passes, count), interval in zip(((81, 263), (15, 148), (0, 20), (1, 29)), intervals, strict=True):
        assert evaluation.wilson(passes / count, count) == pytest.approx(interval, abs=5e-5)


def outcomes():
    verdicts = {"python": ("ok", "wrong_answer"), "ruby": ("ok", "ok"), "lua": ("truncated", "ok")}
    return [Outcome(i, i, "own words", p, (v,)) for p, own in verdicts.items() for i, v in zip("ab", own, strict=True)]


def test_table_has_source_sft_and_unseen_parts():
    roles = data.Roles(("python", "ruby"), ("lua", "perl"))
    titles = evaluation.columns(roles, ["python", "ruby", "lua"])
    sft = {"python (source)": ["python"], "ruby": ["ruby"], "other SFT mean": ["ruby"]}
    assert titles == sft | {"lua (unseen)": ["lua"], "unseen mean": ["lua"]}
    cells = evaluation.make_cells({"greedy pass@1": (1, {"m": outcomes()})}, titles)
    text = evaluation.tables(cells)
    row = [c.strip() for c in text.splitlines()[-1].split("|")[1:-1]]
    assert row[0] == "m" and [c.split()[0] for c in row[1:]] == ["50", "100", "100", "50", "50"]
    assert {c["column"]: c["value"] for c in cells}["python (source)"] == 0.5
    mixed = evaluation.estimate(outcomes(), ["python", "lua"], 1)
    assert mixed["value"] == 0.5 and (mixed["low"], mixed["high"]) == evaluation.wilson(0.5, 2)  # 2 problems


def phrase_outcomes():
    """Three problems of one phrase, of which one is solved, and one of another, solved; in two PLs."""
    verdicts = {"a": "ok", "b": "wrong_answer", "c": "truncated", "d": "ok"}
    python = [Outcome(i, "even 1" if i < "d" else "gt 2", "g", "python", (v,)) for i, v in verdicts.items()]
    return python + [Outcome(o.id, o.unit, "g", "lua", ("ok" if o.id == "b" else "no_program",)) for o in python]


@pytest.mark.parametrize(
    "languages, phrases",
    [
        (["python"], {"even 1": 1 / 3, "gt 2": 1.0}), (["lua"], {"even 1": 1 / 3, "gt 2": 0.0}),
        (["python", "lua"], {"even 1": 1 / 3, "gt 2": 0.5}),
    ],
)  # fmt: skip
def test_the_phrase_is_the_sample(languages, phrases):
    cell, value = evaluation.estimate(phrase_outcomes(), languages, 1), mean(phrases.values())
    assert cell["value"] == pytest.approx(value) and cell["problems"] == 4  # not 2 of 4, or the like
    assert (cell["low"], cell["high"]) == pytest.approx(evaluation.wilson(value, 2))
    assert cell["phrases"] == pytest.approx(phrases, abs=1e-4)
    assert "phrases" not in evaluation.estimate(outcomes(), ["python"], 1)  # each problem stands for itself
    assert evaluation.estimate(phrase_outcomes()[3:4], ["python"], 1)["phrases"] == {"gt 2": 1}  # a problem a phrase
    assert evaluation.estimate(phrase_outcomes(), ["ruby"], 1) is None


def test_a_record_says_its_kind_and_its_phrase():
    record = {"id": "r", "operations": ["even", "sum"], "level": 3, "kind": "reserved words", "phrase": "even 1"}
    assert evaluation.outcome(record, "lua", ["ok"], "kind") == Outcome("r", "even 1", "reserved words", "lua", ("ok",))
    assert evaluation.outcome({"id": "r"}, "lua", ["ok"], "kind") == Outcome("r", "r", "all problems", "lua", ("ok",))
    assert evaluation.group_of(record, "operations") == "operations 2"
    assert evaluation.group_of(record, "level") == "level 3"
    with pytest.raises(ValueError, match=r"record 'r': no field 'size'; --by takes one that each held-out record has"):
        evaluation.group_of(record, "size")


# Student's t at 0.975, as published: of 1, 2, 3, 5 and 11 degrees of freedom.
@pytest.mark.parametrize(
    "values, t",
    [
        ((1, 3), 12.706), ((1, 2, 3), 4.303), ((1, 2, 3, 4), 3.182), ((1, 2, 3, 4, 5, 6), 2.571),
        (range(12), 2.201), (range(20), 2.093), (range(31), 2.042),
    ],
)  # fmt: skip
def test_a_mean_over_seeds_has_a_t_interval(values, t):
    got, n = evaluation.over_seeds(values), len(values)
    half = t * (sum((x - sum(values) / n) ** 2 for x in values) / (n - 1)) ** 0.5 / n**0.5
    assert (got["value"], got["seeds"]) == (sum(values) / n, n)
    assert (got["low"], got["high"]) == pytest.approx((sum(values) / n - half, sum(values) / n + half), rel=1e-4)


def test_an_interval_of_one_seed_is_endless_and_of_many_no_narrower_than_it_should():
    alone = evaluation.over_seeds([0.5])
    assert (alone["low"], alone["value"], alone["high"]) == (-math.inf, 0.5, math.inf)
    many = evaluation.over_seeds(range(40))
    assert (many["high"] - many["value"]) * 40**0.5 / stdev(range(40)) >= 2.023  # t of 39 degrees of freedom


def test_joined_runs_show_mean_and_t_interval_over_seeds():
    titles, verdicts = {"python (source)": ["python"]}, ["ok", "wrong_answer", "ok", "ok"]
    found = [{"m": [Outcome("a", "a", "g", "python", (v,)), *outcomes()]} for v in verdicts]
    runs = [evaluation.make_cells({"greedy pass@1": (1, own)}, titles) for own in found]
    text = evaluation.tables(evaluation.join_cells(runs))
    assert "| m | 75 (-5–155) |" in text  # 3.182 times a standard deviation of 0.5 over 2
    assert "percent of 4 held-out problems, mean and 95% t-interval over 4 seeds" in text
    assert text.count("| m | 50 (50–50) |") == 1  # the other kind of problem
    lacking = r"4 files, but 3 of greedy pass@1, g, m, python \(source\); evaluate all alike"
    with pytest.raises(ValueError, match=lacking):
        evaluation.join_cells([*runs[:3], runs[3][1:]])


def test_a_table_says_of_how_many_problems_its_cells_are():
    titles = {"python (source)": ["python"], "lua (unseen)": ["lua"]}
    some = [Outcome(str(i), str(i), "g", p, ("ok",)) for p, n in (("python", 20), ("lua", 3)) for i in range(n)]
    cells = evaluation.make_cells({"greedy pass@1": (1, {"m": some})}, titles)
    assert "(percent of 3–20 held-out problems, 95% interval)" in evaluation.tables(cells)


@pytest.mark.parametrize("text", ['{"mixture": "base"}', "[1]", "no JSON", None])
def test_a_file_to_join_that_is_none_is_named(tmp_path, text):
    path = tmp_path / "other.json"
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=r"--join: .*/other\.json: not an eval\.json that an evaluation wrote"):
        evaluation.main(evaluation.Settings(join=(str(path),)))


def test_evaluate_on_right_answers_scores_one_hundred(corpus, tokenizer, tiny, monkeypatch):
    """With the sampler replaced by the corpus's own programs, every PL must come out at 100%."""

    def perfect(model, tok, tasks, *_):
        return [rollout(tok, data.answer(r["solutions"][p], p), language=p, record=r) for r, p in tasks]

    monkeypatch.setattr(evaluation, "roll_out", perfect)
    records = data.read_split(corpus, "dev")[::20]
    languages = [p for p in data.read_roles(corpus).everything if p in sandbox.installed()]
    with sandbox.Sandbox() as box:
        rows = evaluation.evaluate(tiny, tokenizer, records, languages, box, World("cpu"), max_new_tokens=1)
    assert len(rows) == len(records) * len(languages) and {o.verdicts for o in rows} == {("ok",)}


def test_no_two_ranks_or_seeds_draw_with_one_seed(tokenizer, tiny, monkeypatch):
    seeds, records = [], [RECORD | {"id": i} for i in "abcd"]
    answers = lambda *job: seeds.append(job[6]) or [rollout(tokenizer, "", record=r) for r, _ in job[2]]  # noqa: E731
    monkeypatch.setattr(evaluation, "roll_out", answers)
    for seed, rank in itertools.product(range(2), range(2)):
        world = SimpleNamespace(rank=rank, size=2, deal=lambda x, rank=rank: x[rank::2], gather=list)
        job = (tiny, tokenizer, records, ["python"], Counting(), world)
        assert [o.id for o in evaluation.evaluate(*job, max_new_tokens=1, seed=seed)] == [*"abcd"[rank::2]]
    assert len({*seeds}) == 4


@pytest.fixture
def asked(corpus, tokenizer, tiny, tmp_path, monkeypatch):
    """(settings of an evaluation with greedy answers and samples, the options of each call of `evaluate`)."""
    real, calls = evaluation.evaluate, []
    monkeypatch.setattr(evaluation, "evaluate", lambda *job, **how: calls.append(how) or real(*job, **how))
    save(tiny, tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    drawn = {"samples": 2, "k": (1, 2), "temperature": 0.7, "top_k": 50, "top_p": 0.9}
    places = {"models": (f"mine={tmp_path / 'm'}",), "data": str(corpus), "out": str(tmp_path / "out")}
    return evaluation.Settings(**places, **drawn, problems=2, max_new_tokens=4, device="cpu"), calls


def test_command_line_writes_tables(asked, tmp_path):
    s, calls = asked
    evaluation.main(s)
    greedy, drawn = calls
    assert drawn == greedy | {"samples": 2, "temperature": 0.7, "top_k": 50, "top_p": 0.9}
    assert not {"samples", "temperature"} & greedy.keys()
    text = (tmp_path / "out/table.md").read_text()
    assert text.count("| mine |") == 3 * 3 + 1  # kinds of problems and measures, and forced choice
    assert "pass@2 of 2 samples, reserved words" in text and text.count("| chance |") == 1
    whole = json.loads((tmp_path / "out/eval.json").read_text())
    assert {len(c["phrases"]) for c in whole["cells"] if "phrases" in c} <= {2}
    outcomes = json.loads((tmp_path / "out/outcomes.json").read_text())["outcomes"]
    own = {o["id"] for o in outcomes["greedy pass@1"]["mine"]}
    assert own == {f"test-{kind}-{i}" for kind in ("own", "source", "reserved") for i in range(2)}
    calls.clear()
    evaluation.main(replace(s, split="dev", samples=0, languages=("python",), out=str(tmp_path / "dev")))
    assert len(calls) == 1 and '"dev-own-1"' in (tmp_path / "dev/outcomes.json").read_text()


def test_each_column_has_its_k_and_pls_without_a_toolchain_are_left_out(asked, monkeypatch, capsys):
    def half(model, tokenizer, records, languages, *_, samples=1, **__):
        assert languages == ["python"]
        return [Outcome("a", "a", "g", "python", ("ok", "wrong_answer")[:samples])]

    monkeypatch.setattr(evaluation, "evaluate", half)
    monkeypatch.setattr(sandbox, "installed", lambda: ["python"])
    found = {c["measure"]: c["value"] for c in evaluation.evaluate_models(asked[0]) if c["group"] == "g"}
    assert found == {evaluation.GREEDY: 1, "pass@1 of 2 samples": 0.5, "pass@2 of 2 samples": 1}
    assert "left out, no toolchain here: javascript, ruby, perl, lua;" in capsys.readouterr().out


def test_the_flags_reach_the_sandbox():
    with evaluation.open_sandbox(evaluation.Settings(time_limit=3, workers=2, forkserver=True), World("cpu")) as box:
        assert (box.limits.wall, box.limits.cpu, box._workers, box.forkserver) == (3, 3, 2, True)


def test_mistakes_are_said_before_anything_is_sampled(asked, corpus, tokenizer, tiny, tmp_path):
    (s, calls), m = asked, str(tmp_path / "m")
    shutil.copytree(corpus, tmp_path / "bare")
    records = [r | {"solutions": {}} for r in data.read_split(corpus, "test")]
    data.write_records(tmp_path / "bare/test.jsonl.gz", records)
    shutil.copytree(m, tmp_path / "mute")
    (tmp_path / "mute/tokenizer.json").unlink()
    for mistake, message in [
        ({"models": (str(tmp_path / "nothing"),)}, "nothing: holds no checkpoint"),
        ({"models": (m, str(tmp_path / "mute"))}, r"mute/tokenizer\.json: no such file"),
        ({"models": (m, m)}, "two of one name among m, m"),
        ({"languages": ("rust",)}, r"--languages: rust: not in .*languages\.json"),
        ({"max_new_tokens": 4000}, r"record 'test-own-0': a prompt of \d+ tokens and 4000 new ones, the model takes"),
        ({"out": str(tmp_path / "m/config.json")}, "File exists: .*config.json"),
        ({"representations": True, "languages": ("python",)}, "name two or more with --languages"),
        ({"samples": 1}, "--k 1 2: give one or more from 1 to --samples, 1"),
        ({"k": (0,)}, "--k 0: give one or more from 1 to --samples, 2"),
        ({"k": ()}, "--k : give one or more"),
        ({"top_p": 0.0}, r"--top-p 0\.0: must be above 0 and at most 1"),
        ({"representations": True, "data": str(tmp_path / "bare")}, "0 problems with a program in each of python"),
    ]:
        with pytest.raises((ValueError, OSError, SystemExit), match=message):
            evaluation.main(replace(s, **mistake))
        assert not calls
    assert evaluation.roll_out(tiny, tokenizer, [], 4, 0.0) == []  # as on a rank that gets no problem


def test_problems_that_are_too_long_or_have_no_tests_are_left_out_and_counted(corpus, tiny_folder, tmp_path, capsys):
    ruby = {"harness": {"ruby": "«answer»\nputs '«word»'"}, "solutions": {}, "tests": [{"stdin": ""}]}
    shutil.copytree(corpus, folder := tmp_path / "data")
    records = data.read_split(corpus, "test")[:6]
    records[1] |= ruby
    records[2] = {k: v for k, v in records[2].items() if k != "prompts"} | {"prompt": 1000 * "long "}
    records[3]["solutions"]["ruby"] += 1000 * "# long\n"
    data.write_records(folder / "test.jsonl.gz", records)
    s = evaluation.Settings(
        models=(f"m={tiny_folder}",), data=str(folder), out=str(tmp_path / "out"), languages=("python", "ruby"),
        max_new_tokens=4, device="cpu",
    )  # fmt: skip
    evaluation.main(s)
    out = capsys.readouterr().out
    assert "left out: of 6 held-out problems without tests 1 in python\n" in out
    said = "left out: {} of 6 held-out problems, the first record 'test-own-2': a prompt of \\d+ tokens and {} new ones, .*"
    assert re.search(said.format(1, 4), out)
    found = json.loads((tmp_path / "out/outcomes.json").read_text())["outcomes"]["greedy pass@1"]["m"]
    asked = {p: [o["id"][-1] for o in found if o["language"] == p] for p in ("python", "ruby")}
    assert asked == {"python": ["0", "3", "4", "5"], "ruby": ["0", "1", "3", "4", "5"]}
    evaluation.main(replace(s, sampling=False, representations=True))
    assert re.search(said.format(2, r"\d+"), capsys.readouterr().out)
    cells = json.loads((tmp_path / "out/eval.json").read_text())["cells"]
    assert {c["problems"] for c in cells} == {3}  # nor is there a program in each PL of another


def test_a_sandbox_failure_is_neither_a_failure_of_the_program_nor_remembered(tokenizer, tiny, monkeypatch):
    """One of two samples meets it."""

    class Broken(Counting):
        def map(self, jobs, **_):
            return [*super().map(jobs[1:]), SimpleNamespace(verdict="internal_error")]

    known, job, how = {}, (tiny, tokenizer, [RECORD], ["python"]), {"max_new_tokens": 1, "samples": 2}
    texts = [f"```python\n{program}\n```" for program in (RIGHT, "pass")]
    monkeypatch.setattr(evaluation, "roll_out", lambda *a: [rollout(tokenizer, text) for text in texts])
    assert evaluation.evaluate(*job, Broken(), World("cpu"), known=known, **how) == [] and {*known.values()} == {"ok"}
    [outcome] = evaluation.evaluate(*job, Counting(), World("cpu"), known=known, **how)
    assert outcome.verdicts == ("ok", "ok")


# --------------------------------------------------------------------------------------------------
# Forced choice


def log_probs_of_transformers(folder, tokenizer, answers):
    """The same by transformers, one answer at a time."""
    theirs, values = LlamaForCausalLM.from_pretrained(folder).eval(), []
    for record, language, program in answers:
        prompt = tokenizer.prompt(data.statement(record, language), language)
        response = [*tokenizer.encode(f"```{language}\n{program.strip()}\n```"), tokenizer.stop]
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        values.append(logits.double().log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum().item())
    return values


def test_forced_choice_goes_by_the_log_probs_of_transformers(corpus, tokenizer, tiny, tiny_folder, monkeypatch):
    monkeypatch.setattr(evaluation, "PREFILL_TOKENS", 300)  # several passes of several answers each
    records = [r for r in data.read_split(corpus, "dev") if "distractors" in r][:6]
    for record, language in itertools.product(records[:3], ("python", "lua")):
        programs = [record["solutions"][language], *record["distractors"][language]]
        answers = [(record, language, program) for program in programs]
        theirs = log_probs_of_transformers(tiny_folder, tokenizer, answers)
        assert evaluation.log_probs(tiny, tokenizer, answers) == pytest.approx(theirs, rel=1e-5)
        [got] = evaluation.choose(tiny, tokenizer, [record], [language], World("cpu"))
        right = "ok" if theirs[0] > max(theirs[1:]) else "wrong"
        assert got == Outcome(record["id"], record["phrase"], "reserved words", language, (right,))


def test_of_a_program_and_its_only_distractor_one_is_chosen(corpus, tokenizer, tiny):
    plain = data.read_split(corpus, "dev")[0]
    records = [r for r in data.read_split(corpus, "dev") if "distractors" in r][:8]
    pairs, languages = [], ("python", "ruby")
    for r in records:
        wrong = {p: r["distractors"][p][0] for p in languages}
        pairs.append(r | {"distractors": {p: [wrong[p]] for p in languages}})
        pairs.append(r | {"solutions": wrong, "distractors": {p: [r["solutions"][p]] for p in languages}})
    got = evaluation.choose(tiny, tokenizer, [plain, *pairs], languages, World("cpu"))
    asked = [(r["id"], p) for p in languages for r in pairs]  # without the plain one
    assert [(o.id, o.language) for o in got] == asked
    assert all({a.verdicts, b.verdicts} == {("ok",), ("wrong",)} for a, b in zip(got[::2], got[1::2], strict=True))
    same = [r | {"distractors": {p: [r["solutions"][p]] for p in languages}} for r in records]
    assert {o.verdicts for o in evaluation.choose(tiny, tokenizer, same, languages, World("cpu"))} == {("wrong",)}


def test_guessing_has_a_row_for_each_table_of_its_measure():
    cell = {"measure": evaluation.FORCED, "group": "g", "model": "m", "column": "lua"}
    cell |= {"value": 0.9, "low": 0.5, "high": 1}
    others = [cell | {"model": "n"}, cell | {"measure": evaluation.GREEDY}, cell | {"group": "h"}]
    records = [{"id": "1", "kind": "g", "distractors": {"lua": ["a"], "perl": ["a"], "tcl": []}}]
    records += [{"id": "2", "kind": "g", "distractors": {"lua": ["a", "b", "c"]}}, {"id": "3", "kind": "g"}]
    records += [{"id": "4", "kind": "h", "distractors": {"lua": ["a", "b", "c"]}}]
    guess = functools.partial(evaluation.guess, records, "kind")
    rows = evaluation.chance_cells([cell, *others], evaluation.FORCED, guess)
    sure = [dict.fromkeys(("value", "low", "high"), chance) for chance in ((0.5 + 0.5 + 0.25) / 3, 0.25)]
    assert rows == [cell | {"model": "chance"} | sure[0], others[-1] | {"model": "chance"} | sure[1]]


# --------------------------------------------------------------------------------------------------
# Representations


def layers(*vectors):
    """Vectors of each problem as `compare` takes them, (n, 1, D)."""
    return torch.tensor(vectors, dtype=torch.float32)[:, None]


def test_retrieval_and_cosines_by_hand():
    """After their means are subtracted, a is (2, 0), (-1, 1), (-1, -1) and b (1, 1), (0, -2), (-1, 1)."""
    vectors = {"a": layers((2, 0), (-1, 1), (-1, -1)), "b": layers((6, 8), (5, 5), (4, 8))}
    measures, h = evaluation.compare(vectors), 0.5**0.5
    assert measures["a", "b"][RETRIEVAL].tolist() == measures["b", "a"][RETRIEVAL].tolist() == [[1, 0, 0]]
    assert measures["a", "b"][MARGIN][0].tolist() == pytest.approx([h * 1.5, -h - 0.5, (1 - h) / 2], abs=1e-6)
    assert measures["b", "a"][MARGIN][0].tolist() == pytest.approx([h + 0.5, -h * 1.5, (h - 1) / 2], abs=1e-6)


def test_neighbours_that_are_equally_near_share_the_credit():
    for apart, credit in ((0, 0.5), (1e-4, 0.5), (1e-2, 1)):  # cosines of 1, 1 - 5e-9 and 1 - 5e-5
        twins = {p: layers((1, 0), (1, apart), (-2, 0)) for p in "ab"}
        assert evaluation.compare(twins)["a", "b"][RETRIEVAL].tolist() == [[credit, credit, 1]]
    blank = {p: layers((3, 4), (3, 4), (3, 4), (3, 4)) for p in "ab"}
    assert evaluation.compare(blank)["a", "b"][RETRIEVAL].tolist() == [[0.25] * 4]


def test_retrieval_is_perfect_for_equal_and_chance_for_unrelated_representations():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 100, 40, 8, generator=generator)  # 40 layers, for so many trials
    same = evaluation.compare({"a": x, "b": x, "c": x + 100 * torch.randn(8, generator=generator)})
    assert all(m[RETRIEVAL].eq(1).all() for m in same.values())
    unrelated = evaluation.compare({"a": x, "b": y})["a", "b"]
    assert unrelated[RETRIEVAL].mean().item() == pytest.approx(0.01, abs=0.005)  # 3 standard errors
    assert unrelated[MARGIN].mean().item() == pytest.approx(0, abs=0.02)
    cells = evaluation.representation_cells("m", "programs", 7, {("a", "b"): unrelated}, {"ab": [("a", "b")]})
    assert {(c["measure"], c["layer"]) for c in cells if c["shown"]} == {(RETRIEVAL, 7), (MARGIN, 7)}
    cell = next(c for c in cells if (c["measure"], c["layer"]) == (MARGIN, 7))
    half = 1.959964 * stdev(unrelated[MARGIN][7].tolist()) / 10  # of a mean over 100 problems
    assert [cell["low"], cell["high"]] == pytest.approx([cell["value"] - half, cell["value"] + half])
    order = torch.randperm(100, generator=generator)
    moved = evaluation.compare({"a": x[order], "b": y[order] + 7})["a", "b"]
    for measure, scores in moved.items():
        torch.testing.assert_close(scores, unrelated[measure][:, order], atol=1e-5, rtol=0)


def test_problems_alike_in_some_language_count_once():
    def record(i, python, lua, **more):
        return {"id": i, "solutions": {"python": python, "lua": lua}, **more}

    rows = [
        record("a", "A", "A", function="f"),
        record("b", "B", "A\n"),  # a's lua
        record("c", "B", "C"),  # the python of b, which is alike a
        record("d", "D", "D", function="f"),  # a's behaviour
        record("e", "E", "E", function="g"),
        {"id": "f", "solutions": {"python": "F"}},
    ]
    assert [r["id"] for r in evaluation.distinct(rows, ["python", "lua"])] == ["a", "e"]
    assert [r["id"] for r in evaluation.distinct(rows, ["python"])] == ["a", "b", "e", "f"]
    with pytest.raises(ValueError, match=r"1 problems with a program in each of python, lua: retrieval needs two"):
        evaluation.distinct(rows[:4], ["python", "lua"])


def test_a_program_stands_where_training_shows_it(corpus, tokenizer):
    for record in data.read_split(corpus, "dev")[:5]:
        for language, program in record["solutions"].items():
            tokens, first = evaluation.document(tokenizer, record, language)
            shown = [tokenizer.bos, *tokenizer.encode(data.answer(record["solutions"][language], language))]
            assert shown[: len(tokens)] == tokens and tokenizer.decode(tokens[first:]) == program.strip() + "\n"


def test_a_question_is_the_prompt_in_own_words_up_to_its_last_token(corpus, tokenizer):
    record = data.read_split(corpus, "dev")[0]
    for language in record["solutions"]:
        tokens, first = evaluation.question(tokenizer, record, language)
        text = record["prompt"] if language == "python" else record["prompts"][language]
        assert tokens == tokenizer.prompt(text, language) and first == len(tokens) - 1


def documents(corpus, tokenizer):
    """Programs and prompts."""
    records = data.read_split(corpus, "dev")[:3]
    views = (evaluation.document, evaluation.question)
    return [view(tokenizer, r, p) for r in records for p in ("python", "ruby", "lua") for view in views]


def test_a_bag_counts_tokens():
    bag = evaluation.bag_of_tokens([([2, 0, 2, 3], 1), ([1], 0)], 5)
    assert bag.tolist() == [[[1, 0, 2, 1, 0]], [[0, 1, 0, 0, 0]]]  # rows, one layer, tokens
    some, others = (evaluation.bag_of_tokens([([1, i, 2], 1) for i in own], 9) for own in ((3, 4, 5), (6, 7, 8)))
    for b, credit in ((some, 1), (others, 1 / 3)):  # shared tokens alone find them
        assert evaluation.compare({"a": some, "b": b})["a", "b"][RETRIEVAL].tolist() == [[credit] * 3]


def test_representations_equal_the_hidden_states_of_transformers(corpus, tokenizer, tiny, tiny_folder):
    theirs = LlamaForCausalLM.from_pretrained(tiny_folder).eval()
    theirs.model.norm = torch.nn.Identity()  # else it stands in the last hidden state
    rows = documents(corpus, tokenizer)
    found = evaluation.represent(tiny, rows)
    assert found.shape == (len(rows), 3, 32) and found.dtype == torch.float32
    for (tokens, first), vectors in zip(rows, found, strict=True):
        with torch.no_grad():
            states = theirs(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        expected = torch.stack([state[0, first:].mean(0) for state in states])
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 150, 10**6])
def test_packed_programs_are_represented_as_each_by_itself(corpus, tokenizer, tiny, budget):
    rows = documents(corpus, tokenizer)
    single = torch.cat([evaluation.represent(tiny, [row]) for row in rows])
    torch.testing.assert_close(evaluation.represent(tiny, rows, budget), single, atol=1e-6, rtol=1e-5)
    assert not any(m._forward_hooks for m in tiny.modules())


def test_pairs_of_languages_have_parts_and_prompts_only_those_with_the_source():
    roles = data.Roles(("python", "ruby", "php"), ("lua", "perl"))
    with_source = {
        "python and other SFT PLs": [("python", "ruby"), ("ruby", "python")],
        "python and unseen PLs": [("python", "lua"), ("lua", "python"), ("python", "perl"), ("perl", "python")],
    }
    asked, unseen = ["python", "ruby", "lua", "perl"], {"within unseen PLs": [("lua", "perl"), ("perl", "lua")]}
    assert evaluation.parts(roles, asked, "prompts") == with_source
    assert evaluation.parts(roles, asked, "programs") == with_source | unseen
    within = {"within other SFT PLs": [("ruby", "php"), ("php", "ruby")]} | unseen
    assert list(evaluation.parts(roles, roles.everything, "programs"))[2:] == list(within)
    assert evaluation.parts(roles, ["ruby", "php", "lua", "perl"], "programs") == within
    assert evaluation.parts(roles, ["ruby", "php", "lua", "perl"], "prompts") == {}


@pytest.fixture
def representations(corpus, tiny_folder, tmp_path, monkeypatch):
    """Settings that were run, on a machine that has no toolchain and no sandbox; all cells, and the pairs of PLs."""

    def absent(*_):
        raise AssertionError("neither toolchains nor the sandbox are needed")

    monkeypatch.setattr(sandbox, "installed", absent)
    monkeypatch.setattr(sandbox, "Sandbox", absent)
    s = evaluation.Settings(
        models=(f"m={tiny_folder}", f"twin={tiny_folder}"), data=str(corpus), out=str(tmp_path), device="cpu",
        representations=True, sampling=False,
    )  # fmt: skip
    cells = evaluation.evaluate_models(s)
    return s, cells, json.loads((tmp_path / "outcomes.json").read_text())["representations"]


def test_command_line_measures_representations_without_a_sandbox(representations, tmp_path):
    s, cells, pairs = representations
    text, kept = (tmp_path / "table.md").read_text(), json.loads((tmp_path / "eval.json").read_text())["cells"]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    models = ["| m", "| twin", "| bag of tokens"]
    table = ["| model", *models, "| chance", "| model", *models]
    assert [row[0] for row in rows] == table * 2 and rows[1][1:] == rows[2][1:]  # programs, then prompts
    assert [text.count(what) for what in ("programs, after block 1 of 2", "prompts, after block 2 of 2")] == [2, 2]
    assert kept == [c for c in cells if c["shown"]]
    places = {(c["measure"], c["group"], c["model"], c["column"]): c for c in cells}
    # For 4 and 2 parts: 2 measures of 2 models and the bag, and chance of one; 3 layers each.
    assert len(places) == len(cells) == (4 + 2) * (2 * 3 + 1) * 3
    for view, count in ("programs", 5 * 4), ("prompts", 5 * 4):  # 3 SFT and 2 unseen PLs
        assert len(pairs["m"][f"{view}, {RETRIEVAL}"]) == count
    for layer, where in enumerate(("embedding", "after block 1 of 2", "after block 2 of 2")):
        group = f"programs, {where}"
        cell, within = places[RETRIEVAL, group, "m", "within unseen PLs"], ("perl → lua", "lua → perl")
        found = (pairs["m"][f"programs, {RETRIEVAL}"][pair][layer] for pair in within)
        assert cell["value"] == pytest.approx(mean(found), abs=1e-4) and cell["layer"] == layer
        assert cell["low"] <= cell["value"] < cell["high"]
        chance = places[RETRIEVAL, group, "chance", "within unseen PLs"]
        assert chance["value"] == 1 / cell["problems"] and chance["problems"] == cell["problems"]
        bag = places[RETRIEVAL, group, "bag of tokens", "within unseen PLs"]
        assert bag["layer"] == layer and bag["value"] > 3 / cell["problems"]  # PLs share tokens
    with pytest.raises(ValueError, match="--no-sampling: leaves nothing to measure without --representations"):
        evaluation.main(replace(s, representations=False))


def test_prompts_are_those_of_one_kind_of_problem(representations, corpus):
    """Of own words, in which each PL is asked; programs are those of all problems, each function once."""
    _, cells, _ = representations
    records = data.read_split(corpus, "test")
    own = len({r["function"] for r in records if r["kind"] == "own words"})
    everyone = len({r["function"] for r in records})
    counts = {c["group"].split(",")[0]: c["problems"] for c in cells}
    assert counts["prompts"] == own and own < counts["programs"] <= everyone


# --------------------------------------------------------------------------------------------------
# Claims

COLUMNS = ("python (source)", "other SFT mean", "unseen mean")
SHOWN = ("programs, after block 2 of 4", "prompts, after block 4 of 4")


def study(arms, retrieval=None):
    """Cells of one seed: arm -> its gains by RL in COLUMNS, on reserved words, from 0.1; retrieval by arm."""
    rows = []
    for arm, gains in arms.items():
        for column, gain in zip(COLUMNS, gains, strict=True):
            for model, value in ((arm, 0.1), (f"rl-{arm}", 0.1 + gain)):
                place = {"measure": evaluation.GREEDY, "model": model, "column": column, "low": 0.0, "high": 1.0}
                rows.append(place | {"group": evaluation.RESERVED, "value": value, "problems": 20})
                rows.append(place | {"group": "own words", "value": 0.5 + gain, "problems": 20})  # not what counts
        for group, value in zip(("embedding", *SHOWN), (1, *(retrieval or {}).get(arm, ())), strict=False):
            place = {"measure": RETRIEVAL, "group": group, "model": arm, "column": "python and unseen PLs"}
            about = {"value": value, "low": 0, "high": 1, "problems": 9, "layer": int(value < 1), "shown": value < 1}
            rows.append(place | about)
    return rows


BY_SEED = {  # arm -> its gains in COLUMNS and its retrieval in SHOWN, seed by seed
    "source": [((0.30, 0.05, 0.02), (0.5, 0.5)), ((0.32, 0.07, 0.02), (0.5, 0.5)), ((0.28, 0.06, 0.02), (0.5, 0.5))],
    "multi": [((0.30, 0.30, 0.02), (0.4, 0.2)), ((0.30, 0.34, 0.02), (0.4, 0.3)), ((0.30, 0.33, 0.02), (0.4, 0.4))],
    "crossed": [((0.20, 0.10, 0.02), (0.6, 0.6)), ((0.20, 0.12, 0.02), (0.6, 0.6)), ((0.20, 0.11, 0.02), (0.6, 0.6))],
    "parallel": [((0.25, 0.20, 0.01), (0.6, 0.4)), ((0.25, 0.25, 0.02), (0.7, 0.41)), ((0.25, 0.21, 0.03), (0.8, 0.42))],
}  # fmt: skip
SEEDS = [study(*({arm: seeds[i][j] for arm, seeds in BY_SEED.items()} for j in (0, 1))) for i in range(3)]
T = {"source": [0.05 / 0.30, 0.07 / 0.32, 0.06 / 0.28], "parallel": [0.8, 1.0, 0.84], "multi": [1.0, 0.34 / 0.3, 1.1]}


@pytest.mark.parametrize(
    "claim, decides, text, values, outcome",
    [
        ("a", True, "source: gain of the source PL", [0.30, 0.32, 0.28], "seen"),
        ("a", True, "source: gain of the source PL less that of other SFT PLs", [0.25, 0.25, 0.22], "seen"),
        ("a", True, "source: gain of the source PL less that of unseen PLs", [0.28, 0.30, 0.26], "seen"),
        ("b", True, "gain of other SFT PLs, parallel less source", [0.15, 0.18, 0.15], "seen"),
        ("b", True, "gain of unseen PLs, parallel less source", [-0.01, 0.0, 0.01], "not seen"),
        ("b", False, "T of other SFT PLs, parallel less source",
         [p - s for p, s in zip(T["parallel"], T["source"], strict=True)], "seen"),
        ("c", True, "gain of other SFT PLs, parallel less multi", [-0.10, -0.09, -0.12], "the reverse"),
        ("c", False, "T of other SFT PLs, parallel less multi",
         [p - m for p, m in zip(T["parallel"], T["multi"], strict=True)], "the reverse"),
        ("c", False, "gain of other SFT PLs, parallel less crossed", [0.10, 0.13, 0.10], "seen"),
        ("d", True, f"{RETRIEVAL}, {SHOWN[0]}, python and unseen PLs: parallel less source", [0.1, 0.2, 0.3], "not seen"),
        ("d", True, f"{RETRIEVAL}, {SHOWN[1]}, python and unseen PLs: parallel less source", [-0.1, -0.09, -0.08], "the reverse"),
        ("d", True, f"{RETRIEVAL}, {SHOWN[1]}, python and unseen PLs: parallel less multi", [0.2, 0.11, 0.02], "not seen"),
    ],
)  # fmt: skip
def test_claims_by_hand(claim, decides, text, values, outcome):
    [row] = [row for row in evaluation.claims(SEEDS) if row["text"] == text]
    assert (row["claim"], row["decides"], row["seeds"]) == (claim, decides, 3)
    assert row["values"] == pytest.approx(values) and row["value"] == pytest.approx(mean(values))
    assert row["high"] - row["value"] == pytest.approx(4.303 * stdev(values) / 3**0.5)
    assert evaluation.verdict(row) == outcome
    mark = "**" if decides else ""
    line = f"| {claim} | {text} | {100 * row['value']:.1f} | {100 * row['low']:.1f} to {100 * row['high']:.1f} |"
    [shown] = [x for x in evaluation.claims_table(evaluation.claims(SEEDS)).splitlines() if x.startswith(line)]
    assert shown.endswith(f" | 3 | {mark}{outcome}{mark} |")


def test_claims_are_about_the_arms_that_are_there():
    every = evaluation.claims(SEEDS)
    assert Counter(row["claim"] for row in every) == {"a": 3, "b": 4, "c": 8, "d": 6}
    assert len({row["text"] for row in every}) == 21
    two = [[c for c in cells if c["model"].removeprefix("rl-") in ("source", "parallel")] for cells in SEEDS]
    assert Counter(row["claim"] for row in evaluation.claims(two)) == {"a": 3, "b": 4, "d": 2}
    assert evaluation.claims([[c for c in cells if c["model"] == "rl-source"] for cells in SEEDS]) == []
    text = evaluation.claims_table(evaluation.claims(two[:1]))  # one seed says nothing
    assert text.count("| one seed | 1 | ") == 9 and not any(word in text for word in ("seen |", "reverse", "inf"))


def test_transfer_is_no_number_where_the_source_gains_nothing():
    for gain in (0.0, -0.1):
        lost = study({"source": (gain, 0.1, 0.1), "parallel": (0.3, 0.15, 0.0)})
        assert math.isnan(evaluation.Study(lost).transfer("source", COLUMNS[1]))
    assert evaluation.Study(lost).transfer("parallel", COLUMNS[1]) == pytest.approx(0.5)
    row = next(r for r in evaluation.claims([lost, SEEDS[0]]) if r["text"].startswith("T of other"))
    assert math.isnan(row["value"]) and evaluation.verdict(row) == "not seen"


def test_an_arm_has_a_line_of_what_rl_added():
    lines = evaluation.summary(SEEDS[0]).splitlines()
    text = (
        "source: RL in python adds 30.0 points there, 5.0 in the other SFT PLs, 2.0 in the unseen PLs (reserved words)"
    )
    assert len(lines) == 4 and lines[0] == text
    assert evaluation.summary([c for c in SEEDS[0] if not c["model"].startswith("rl-")]) == ""
    some = evaluation.summary([c for c in SEEDS[0] if c["column"] == COLUMNS[0]])  # as with --languages python
    assert "adds 30.0 points there" in some


def test_one_seed_says_what_its_phrases_say_of_the_claim():
    def cells(model, *values):
        own = {"measure": evaluation.GREEDY, "group": evaluation.RESERVED, "model": model, "value": sum(values) / 2}
        return [own | {"column": column, "phrases": dict(zip("xy", values, strict=True))} for column in COLUMNS]

    both = [
        *cells("source", 0.1, 0.2),
        *cells("rl-source", 0.3, 0.2),
        *cells("parallel", 0, 0),
        *cells("rl-parallel", 0.4, 0.5),
    ]
    # By phrase: source gains 0.2 and 0, parallel 0.4 and 0.5; the differences 0.2 and 0.5 have a mean of 0.35 and a
    # standard error of 0.15, and t is 12.706 with one degree of freedom.
    said = evaluation.conclusion(evaluation.claims(evaluation.by_phrase(both)), "phrases")
    assert (
        "gain of other SFT PLs +35.0 (-155.6 to 225.6), not seen; gain of unseen PLs" in said
        and "over 2 phrases" in said
    )
    assert evaluation.by_phrase([c | {"group": "own words"} for c in both]) == []
    assert evaluation.conclusion([], "seeds") == ""
    others = [c for c in both if c["column"] != COLUMNS[0]]  # as with --languages ruby: no claim can be told
    assert evaluation.claims(evaluation.by_phrase(others)) == []


def join(folder, *runs, **settings):
    """Writes the cells of each run and joins the files in `folder`."""
    paths = [folder / f"seed-{i}.json" for i in range(len(runs))]
    for path, cells in zip(paths, runs, strict=True):
        path.write_text(json.dumps({"cells": cells}))
    evaluation.main(evaluation.Settings(join=tuple(map(str, paths)), out=str(folder), **settings))


def test_claims_and_joined_tables_are_written(tmp_path, capsys):
    join(tmp_path, *SEEDS)
    text, printed = (tmp_path / "joined.md").read_text(), capsys.readouterr().out
    rows = evaluation.claims(SEEDS)
    assert json.loads((tmp_path / "claims.json").read_text()) == rows and text.strip() in printed
    assert evaluation.claims_table(rows) in text and evaluation.summary(evaluation.join_cells(SEEDS)) in text
    assert "mean and 95% t-interval over 3 seeds" in text
    join(tmp_path, [c for c in SEEDS[0] if c["group"] != evaluation.RESERVED])
    assert "own words" in capsys.readouterr().out


def test_the_readmes_show_what_the_studies_gave():
    """Line by line, out of the results that are kept: all claims but those of T; of the study's (d) what is seen."""
    root, lines = Path(evaluation.__file__).parent, {"first": [], "study": []}
    readmes = [(root / name).read_text() for name in ("README.md", "results/README.md")]
    shown = [[line for line in text.splitlines() if re.match(r"\| [a-d] \|", line)] for text in readmes]
    for name, rows in lines.items():
        seeds = sorted((root / "results" / name).glob("seed-*.json"))
        if len(seeds) == 6:
            table = evaluation.claims_table(evaluation.claims([evaluation.read_cells(str(seed)) for seed in seeds]))
            rows += [line for line in table.splitlines()[2:] if "| T of" not in line]
    study = [line for line in lines["study"] if not (line.startswith("| d |") and "not seen" in line)]
    assert shown == [study, lines["first"]] and all(shown)
    hidden = len(lines["study"]) - len(study), sum(line.startswith("| d |") for line in lines["study"])
    assert hidden == (9, 12) and "nine of (d)'s twelve that are not seen" in readmes[0]
    cells = evaluation.read_cells(str(root / "results/smollm2/eval.json"))
    text = {
        (c["model"], c["column"]): evaluation.percent(c)
        for c in cells
        if c["group"] == evaluation.RESERVED and c["measure"] == evaluation.GREEDY
    }
    for arm in ("source", "parallel"):
        row = [f"{text[arm, c]} → {text[f'rl-{arm}', c]}" for c in ("python (source)", "other SFT mean", "unseen mean")]
        assert f"| {arm} | {' | '.join(row)} |" in readmes[0]


# --------------------------------------------------------------------------------------------------
# Figures


def test_missing_matplotlib_is_said_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"^error: --plots needs matplotlib; run `pip install matplotlib`$"):
        evaluation.main(evaluation.Settings(plots=True, models=("nothing",)))


@pytest.fixture
def figures(monkeypatch):
    """Those that are drawn, which are closed only after the test."""
    pyplot, drawn = pytest.importorskip("matplotlib.pyplot"), []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", drawn.append)
    yield drawn
    close("all")


def test_plots_draw_what_the_cells_say(representations, corpus, tmp_path, figures, capsys):
    titles = {"python (source)": ["python"], "ruby": ["ruby"], "unseen mean": ["lua"]}
    cells = representations[1] + evaluation.make_cells({"greedy pass@1": (1, {"m": outcomes()})}, titles)
    written = evaluation.plot(cells, tmp_path / "drawn")
    assert written == [str(tmp_path / f"drawn/{name}.png") for name in ("passes", "retrieval")]
    for name in ("passes", "retrieval"):
        assert (tmp_path / f"drawn/{name}.png").read_bytes().startswith(b"\x89PNG")
    (bars, lines), roles = figures, data.read_roles(corpus)
    assert [bar.get_height() for bar in bars.axes[0].patches] == [50, 100]  # python and ruby; no mean
    panels = [axis.get_title() for axis in lines.axes]
    for title in evaluation.parts(roles, roles.everything, "programs"):
        assert any(title in panel for panel in panels)
    for axis in lines.axes:  # a line is of one view, from the embedding to the last block
        for line in axis.get_lines():
            assert len(line.get_xdata()) in (0, 3) and list(line.get_xdata()) == sorted(line.get_xdata())
    column = "within other SFT PLs"
    own = [c for c in cells if (c["measure"], c["column"]) == (RETRIEVAL, column)]
    values = [[100 * c["value"] for c in own if c["model"] == m] for m in ("m", "twin", "bag of tokens", "chance")]
    [axis] = [axis for axis in lines.axes if column in axis.get_title()]
    assert sorted(list(line.get_ydata()) for line in axis.get_lines() if len(line.get_ydata())) == sorted(values)


def test_a_joined_study_is_drawn_with_its_transfer_before_and_after_rl(tmp_path, figures):
    join(tmp_path, *SEEDS, plots=True)
    assert {path.name for path in tmp_path.glob("*.png")} == {"passes.png", "retrieval.png", "transfer.png"}
    axes = figures[-1].axes
    assert [axis.get_title() for axis in axes] == list(COLUMNS)
    gains = {"source": (0.30, 0.06, 0.02), "multi": (0.30, 0.97 / 3, 0.02), "crossed": (0.2, 0.11, 0.02)}
    gains["parallel"] = (0.25, 0.22, 0.02)
    for i, axis in enumerate(axes):
        assert [label.get_text() for label in axis.get_xticklabels()] == list(gains)
        heights = [bar.get_height() for bar in axis.patches]
        assert heights == pytest.approx([10] * 4 + [100 * (0.1 + gain[i]) for gain in gains.values()])
    _, after = (container for container in axes[0].containers if hasattr(container, "errorbar"))
    [intervals] = after.errorbar.lines[2]
    bottom, top = intervals.get_segments()[0][:, 1]  # of source's 40, 42 and 38
    assert (bottom, top) == pytest.approx((40 - 4.303 * 2 / 3**0.5, 40 + 4.303 * 2 / 3**0.5), rel=1e-3)


def test_one_seed_alone_is_drawn_too(tmp_path, figures):
    join(tmp_path, SEEDS[0], plots=True)
    assert len(figures) == 3 and "inf" not in (tmp_path / "joined.md").read_text()
    assert all(axis.get_ylim()[1] <= 110 for figure in figures for axis in figure.axes)


def test_curves_of_rl_runs_side_by_side(tmp_path, figures):
    for shift, name in enumerate(("rl-source", "rl-parallel")):
        lines = [{"step": 0, "held_out": {"own words": {"python": 0.4, "lua": 0.2}, "reserved words": {"python": 0.1}}}]
        for step in (1, 2, 3):
            figure = {"reward": step / 10 + shift, "no_spread": 0.5, "entropy": None if step == 2 else 1.0}
            lines.append({"step": step, **figure})
        lines[-1]["held_out"] = {"own words": {"python": 0.6, "lua": 0.4}, "reserved words": {"python": 0.7}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    s = evaluation.Settings(curves=(str(tmp_path / "rl-source"), str(tmp_path / "rl-parallel")), out=str(tmp_path))
    evaluation.main(s)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    [figure] = figures
    drawn = {axis.get_title(): [line.get_xydata().tolist() for line in axis.get_lines()] for axis in figure.axes}
    assert drawn["mean reward"] == [[[i, i / 10 + shift] for i in (1, 2, 3)] for shift in (0, 1)]
    assert drawn["entropy, nats"] == [[[1, 1], [3, 1]]] * 2  # nothing was trained in step 2
    assert drawn["pass@1 on dev"] == [[[0, 0.1], [3, 0.7]]] * 2  # of reserved words
    with pytest.raises(ValueError, match=r"--curves: .*gone/metrics\.jsonl: .*; name run folders of rl\.py"):
        evaluation.main(replace(s, curves=(str(tmp_path / "gone"),)))
