"""Grading and estimates: what counts as a pass, pass@k, intervals, tables."""

import itertools
from dataclasses import replace
from statistics import mean
from types import SimpleNamespace

import pytest

import data
import eval as evaluation
import sandbox
from eval import Outcome, Rollout
from model import save
from sft import World

RECORD = {
    "id": "r",
    "prompt": "Double it.",
    "tests": [{"stdin": "2\n", "stdout": "4\n"}, {"stdin": "5\n", "stdout": "10\n"}],
    "solutions": {},
}
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
    evaluation.grade(rows, tokenizer, box, known)
    assert len(box.jobs) == 3 and all(r.passed for r in rows)
    evaluation.grade([rollout(tokenizer, text)], tokenizer, box, known)
    assert len(box.jobs) == 3


def test_sample_keeps_tasks_in_order_and_is_reproducible(tokenizer, tiny):
    records = [RECORD | {"id": str(i), "prompt": "word " * i} for i in range(1, 4)]
    tasks = [(r, p) for r in records for p in ("python", "ruby")]
    rows = evaluation.sample(tiny, tokenizer, tasks, 5, 1.0, samples=2, seed=3)
    assert [(r.record["id"], r.language) for r in rows] == [(r["id"], p) for r, p in tasks for _ in range(2)]
    assert all(r.prompt == tokenizer.prompt(r.record["prompt"], [r.language]) for r in rows)
    again = evaluation.sample(tiny, tokenizer, tasks, 5, 1.0, samples=2, seed=3)
    assert [r.tokens for r in rows] == [r.tokens for r in again]
    other = evaluation.sample(tiny, tokenizer, tasks, 5, 1.0, samples=2, seed=4)
    assert [r.tokens for r in rows] != [r.tokens for r in other]
    greedy, likeliest = (evaluation.sample(tiny, tokenizer, tasks, 5, t, top_k=k) for t, k in ((0.0, 0), (1.0, 1)))
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
    for passes, count, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert evaluation.wilson(passes / count, count) == pytest.approx((low, high), abs=5e-5)


def outcomes():
    rows = [
        ("a", "python", "ok"),
        ("b", "python", "wrong_answer"),
        ("a", "ruby", "ok"),
        ("b", "ruby", "ok"),
        ("a", "lua", "truncated"),
        ("b", "lua", "ok"),
    ]
    return [Outcome(i, "known wordings", p, (v,)) for i, p, v in rows]


def test_table_has_source_sft_and_unseen_parts():
    roles = data.Roles(("python", "ruby"), ("lua", "perl"))
    titles = evaluation.columns(roles, ["python", "ruby", "lua"])
    assert titles == {
        "python (source)": ["python"],
        "ruby": ["ruby"],
        "other SFT mean": ["ruby"],
        "lua (unseen)": ["lua"],
        "unseen mean": ["lua"],
    }
    cells = evaluation.make_cells({"greedy pass@1": (1, {"m": outcomes()})}, titles)
    text = evaluation.tables(cells)
    row = [c.strip() for c in text.splitlines()[-1].split("|")[1:-1]]
    assert row[0] == "m" and [c.split()[0] for c in row[1:]] == ["50", "100", "100", "50", "50"]
    assert {c["column"]: c["value"] for c in cells}["python (source)"] == 0.5
    assert evaluation.estimate(outcomes(), ["python", "lua"], 1)["value"] == 0.5


def test_joined_runs_show_mean_and_range_over_seeds():
    titles, verdicts = {"python (source)": ["python"]}, ["ok", "wrong_answer", "ok", "ok"]
    runs = [
        evaluation.make_cells({"greedy pass@1": (1, {"m": [Outcome("a", "g", "python", (v,)), *outcomes()]})}, titles)
        for v in verdicts
    ]
    text = evaluation.tables(evaluation.join(runs))
    assert "| m | 75 (0–100) |" in text and "percent of 4 held-out problems, mean and range of 4 seeds" in text
    assert text.count("| m | 50 (50–50) |") == 1  # the other kind of problem


def test_difficulty_groups():
    record = {"id": "r", "difficulty": {"operations": 2, "new": 1}}
    assert evaluation.group_of(record, "wording") == "reserved wordings"
    assert evaluation.group_of(record, "operations") == "operations 2"
    with pytest.raises(ValueError, match=r"no difficulty 'size'; --by takes wording or operations, new"):
        evaluation.group_of(record, "size")


def test_evaluate_on_right_answers_scores_one_hundred(corpus, tokenizer, tiny, monkeypatch):
    """With the sampler replaced by the corpus's own programs, every PL must come out at 100%."""

    def perfect(model, tok, tasks, *_):
        return [rollout(tok, data.answer(r["solutions"], [p]), language=p, record=r) for r, p in tasks]

    monkeypatch.setattr(evaluation, "sample", perfect)
    records = data.read_records(corpus / "eval.jsonl.gz")[::6]
    languages = [p for p in data.read_roles(corpus).everything if p in sandbox.installed()]
    with sandbox.Sandbox() as box:
        rows = evaluation.evaluate(tiny, tokenizer, records, languages, box, World("cpu"), max_new_tokens=1)
    assert len(rows) == len(records) * len(languages) and {o.verdicts for o in rows} == {("ok",)}


def test_command_line_writes_tables_and_names_what_is_missing(corpus, tokenizer, tiny, tmp_path, capsys):
    save(tiny, tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    s = evaluation.Settings(
        models=(f"mine={tmp_path / 'm'}",),
        data=str(corpus),
        out=str(tmp_path / "out"),
        problems=2,
        max_new_tokens=4,
        samples=2,
        k=(1, 2),
        device="cpu",
    )
    evaluation.main(s)
    text = (tmp_path / "out/table.md").read_text()
    assert text.count("| mine |") == 2 * 3 and (tmp_path / "out/eval.json").exists()
    assert "pass@2 of 2 samples, reserved wordings" in text
    with pytest.raises(SystemExit, match="nothing: holds no checkpoint"):
        evaluation.main(replace(s, models=(str(tmp_path / "nothing"),)))
    with pytest.raises(ValueError, match="--k 2: needs at least as many --samples, not 1"):
        evaluation.main(replace(s, samples=1))
    assert evaluation.sample(tiny, tokenizer, [], 4, 0.0) == []  # as on a rank that gets no problem
    with pytest.raises(ValueError, match="two of one name among m, m"):
        evaluation.main(replace(s, models=(str(tmp_path / "m"),) * 2))
    with pytest.raises(ValueError, match=r"--languages: rust: not in .*languages\.json"):
        evaluation.main(replace(s, languages=("rust",)))
    with pytest.raises(
        ValueError, match=r"record 'known-0': a prompt of \d+ tokens and 4000 new ones, the model takes"
    ):
        evaluation.main(replace(s, max_new_tokens=4000))


def test_a_sandbox_failure_is_neither_a_failure_of_the_program_nor_remembered(tokenizer, tiny, monkeypatch):
    class Broken(Counting):
        def map(self, jobs, **_):
            return [SimpleNamespace(verdict="internal_error") for _ in jobs]

    known = {}
    monkeypatch.setattr(evaluation, "sample", lambda *a: [rollout(tokenizer, f"```python\n{RIGHT}\n```")])
    assert (
        evaluation.evaluate(
            tiny, tokenizer, [RECORD], ["python"], Broken(), World("cpu"), max_new_tokens=1, known=known
        )
        == []
    )
    assert known == {}
    assert (
        len(
            evaluation.evaluate(
                tiny, tokenizer, [RECORD], ["python"], Counting(), World("cpu"), max_new_tokens=1, known=known
            )
        )
        == 1
    )
