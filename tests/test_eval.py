"""Grading and estimates: what counts as a pass, pass@k, intervals, tables, representations, figures."""

import itertools
import json
import shutil
import sys
from dataclasses import replace
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
    mixed = evaluation.estimate(outcomes(), ["python", "lua"], 1)
    assert mixed["value"] == 0.5 and (mixed["low"], mixed["high"]) == evaluation.wilson(0.5, 2)  # 2 problems


def test_joined_runs_show_mean_and_range_over_seeds():
    titles, verdicts = {"python (source)": ["python"]}, ["ok", "wrong_answer", "ok", "ok"]
    runs = [
        evaluation.make_cells({"greedy pass@1": (1, {"m": [Outcome("a", "g", "python", (v,)), *outcomes()]})}, titles)
        for v in verdicts
    ]
    text = evaluation.tables(evaluation.join(runs))
    assert "| m | 75 (0–100) |" in text and "percent of 4 held-out problems, mean and range of 4 seeds" in text
    assert text.count("| m | 50 (50–50) |") == 1  # the other kind of problem
    with pytest.raises(
        ValueError, match=r"4 files, but 3 of greedy pass@1, g, m, python \(source\); evaluate all alike"
    ):
        evaluation.join([*runs[:3], runs[3][1:]])


def test_a_table_says_of_how_many_problems_its_cells_are():
    titles = {"python (source)": ["python"], "lua (unseen)": ["lua"]}
    some = [Outcome(str(i), "g", p, ("ok",)) for p, n in (("python", 20), ("lua", 3)) for i in range(n)]
    assert "(percent of 3–20 held-out problems, 95% interval)" in evaluation.tables(
        evaluation.make_cells({"greedy pass@1": (1, {"m": some})}, titles)
    )


@pytest.mark.parametrize("text", ['{"mixture": "base"}', "[1]", "no JSON", None])
def test_a_file_to_join_that_is_none_is_named(tmp_path, text):
    path = tmp_path / "other.json"
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=r"--join: .*/other\.json: not an eval\.json that an evaluation wrote"):
        evaluation.main(evaluation.Settings(join=(str(path),)))


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


def test_command_line_writes_tables_and_names_what_is_missing(corpus, tokenizer, tiny, tmp_path, monkeypatch):
    real, asked = evaluation.evaluate, []
    monkeypatch.setattr(evaluation, "evaluate", lambda *job, **how: asked.append(how) or real(*job, **how))
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
        temperature=0.7,
        top_k=50,
        top_p=0.9,
        device="cpu",
    )
    evaluation.main(s)
    greedy, drawn = asked
    assert drawn == greedy | {"samples": 2, "temperature": 0.7, "top_k": 50, "top_p": 0.9}
    assert not {"samples", "temperature"} & greedy.keys()
    text = (tmp_path / "out/table.md").read_text()
    assert text.count("| mine |") == 2 * 3 and (tmp_path / "out/eval.json").exists()
    assert "pass@2 of 2 samples, reserved wordings" in text
    with pytest.raises(SystemExit, match="nothing: holds no checkpoint"):
        evaluation.main(replace(s, models=(str(tmp_path / "nothing"),)))
    records = [r | {"solutions": {}} for r in data.read_split(corpus, "eval")]
    shutil.copytree(corpus, tmp_path / "bare")
    data.write_records(tmp_path / "bare/eval.jsonl.gz", records)
    shutil.copytree(tmp_path / "m", tmp_path / "mute")
    (tmp_path / "mute/tokenizer.json").unlink()
    for mistake, message in [
        ({"models": (str(tmp_path / "m"), str(tmp_path / "mute"))}, r"mute/tokenizer\.json: no such file"),
        ({"out": str(tmp_path / "m/config.json")}, "File exists: .*config.json"),
        ({"representations": True, "languages": ("python",)}, "name two or more with --languages"),
        ({"samples": 1}, "--k 1 2: give one or more from 1 to --samples, 1"),
        ({"k": (0,)}, "--k 0: give one or more from 1 to --samples, 2"),
        ({"k": ()}, "--k : give one or more"),
        ({"top_p": 0.0}, r"--top-p 0\.0: must be above 0 and at most 1"),
        ({"representations": True, "data": str(tmp_path / "bare")}, "0 problems with a program in each of python"),
    ]:
        asked.clear()
        with pytest.raises((ValueError, OSError), match=message):
            evaluation.main(replace(s, **mistake))
        assert not asked  # nothing was sampled for nothing
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
    assert measures["a", "b"]["cosine, equivalent"][0].tolist() == pytest.approx([h, -h, 0], abs=1e-6)
    assert measures["a", "b"]["cosine, others"][0].tolist() == pytest.approx([-h / 2, 0.5, (h - 1) / 2], abs=1e-6)
    assert measures["b", "a"]["cosine, others"][0].tolist() == pytest.approx([-0.5, h / 2, (1 - h) / 2], abs=1e-6)
    assert measures["a", "b"][MARGIN][0].tolist() == pytest.approx([h * 1.5, -h - 0.5, (1 - h) / 2], abs=1e-6)


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
    cells = evaluation.representation_cells("m", {("a", "b"): unrelated}, {"ab": [("a", "b")]})
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
    for record in data.read_split(corpus, "eval")[:5]:
        for language, program in record["solutions"].items():
            tokens, first = evaluation.document(tokenizer, record, language)
            shown = [tokenizer.bos, *tokenizer.encode(data.answer(record["solutions"], [language]))]
            assert shown[: len(tokens)] == tokens and tokenizer.decode(tokens[first:]) == program.strip() + "\n"


def documents(corpus, tokenizer):
    records = data.read_split(corpus, "eval")[:4]
    return [evaluation.document(tokenizer, r, p) for r in records for p in ("python", "ruby", "lua")]


def test_representations_equal_the_hidden_states_of_transformers(corpus, tokenizer, tiny, tmp_path):
    save(tiny, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
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
    with pytest.raises(ValueError, match=r"a program of 1025 tokens, the model takes 1024; leave its record out"):
        evaluation.represent(tiny, [([1] * 1025, 3)])


def test_pairs_of_languages_have_three_parts():
    roles = data.Roles(("python", "ruby"), ("lua", "perl"))
    assert evaluation.parts(roles, ["python", "ruby", "lua"]) == {
        "within SFT PLs": [("python", "ruby"), ("ruby", "python")],
        "python and unseen PLs": [("lua", "python"), ("python", "lua")],
    }
    assert list(evaluation.parts(roles, ["ruby", "lua", "perl"])) == ["within unseen PLs"]


@pytest.fixture
def representations(corpus, tiny_folder, tmp_path, monkeypatch):
    """Settings that were run, on a machine that has no toolchain and no sandbox; and what eval.json says."""

    def absent(*_):
        raise AssertionError("neither toolchains nor the sandbox are needed")

    monkeypatch.setattr(sandbox, "installed", absent)
    monkeypatch.setattr(sandbox, "Sandbox", absent)
    s = evaluation.Settings(
        models=(f"m={tiny_folder}", f"twin={tiny_folder}"), data=str(corpus), out=str(tmp_path), device="cpu",
        representations=True, sampling=False,
    )  # fmt: skip
    evaluation.main(s)
    return s, json.loads((tmp_path / "eval.json").read_text())


def test_command_line_measures_representations_without_a_sandbox(representations, tmp_path):
    (s, whole), text = representations, (tmp_path / "table.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| model", "| m", "| twin", "| chance", "| model", "| m", "| twin"]
    assert rows[1][1:] == rows[2][1:] and text.count("after block 1 of 2") == 2
    places = {(c["measure"], c["model"], c["column"], c["layer"]): c for c in whole["cells"]}
    assert len(places) == len(whole["cells"]) == 4 * 2 * 3 * 3 + 3 * 3  # measures, models, parts, layers; chance
    pairs = whole["representations"]["m"][RETRIEVAL]
    assert len(pairs) == 5 * 4  # 3 SFT and 2 unseen PLs
    for layer in range(3):
        cell, within = places[RETRIEVAL, "m", "within unseen PLs", layer], ("perl → lua", "lua → perl")
        assert cell["value"] == pytest.approx(mean(pairs[pair][layer] for pair in within), abs=1e-4)
        assert cell["low"] < cell["value"] < cell["high"]
        assert places[RETRIEVAL, "chance", "within unseen PLs", layer]["value"] == 1 / cell["problems"]
    assert places[RETRIEVAL, "m", "within SFT PLs", 0]["value"] > 0.1  # PLs share tokens, if the model knows nothing
    with pytest.raises(ValueError, match="--no-sampling: leaves nothing to measure without --representations"):
        evaluation.main(replace(s, representations=False))


def test_joined_representations_show_mean_and_range(representations):
    cells = representations[1]["cells"]
    other = [{**c, "value": c["value"] + 0.2, "problems": c["problems"] + 2} for c in cells]
    joined = evaluation.join([cells, other])
    assert [c["value"] for c in joined] == pytest.approx([c["value"] + 0.1 for c in cells])
    assert all(c["high"] - c["low"] == pytest.approx(0.2) for c in joined)
    text = evaluation.tables(joined)
    assert text.count("held-out problems, mean and range of 2 seeds") == 2 and text.count("after block 1 of 2") == 2


# --------------------------------------------------------------------------------------------------
# Figures


def test_missing_matplotlib_is_said_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"^error: --plots needs matplotlib; run `pip install matplotlib`$"):
        evaluation.main(evaluation.Settings(plots=True, models=("nothing",)))


def test_plots_draw_what_the_cells_say(representations, corpus, tmp_path, monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)  # else nothing is left to look at
    titles = {"python (source)": ["python"], "ruby": ["ruby"], "unseen mean": ["lua"]}
    passes = evaluation.make_cells({"greedy pass@1": (1, {"m": outcomes()})}, titles)
    (tmp_path / "both.json").write_text(json.dumps({"cells": representations[1]["cells"] + passes}))
    evaluation.main(evaluation.Settings(join=(str(tmp_path / "both.json"),), out=str(tmp_path / "drawn"), plots=True))
    assert f"wrote {tmp_path}/drawn/passes.png and {tmp_path}/drawn/retrieval.png" in capsys.readouterr().out
    for name in ("passes", "retrieval"):
        assert (tmp_path / f"drawn/{name}.png").read_bytes().startswith(b"\x89PNG")
    (bars, lines), roles = figures, data.read_roles(corpus)
    assert [bar.get_height() for bar in bars.axes[0].patches] == [50, 100]  # python and ruby; no mean
    assert [axis.get_title() for axis in lines.axes] == list(evaluation.parts(roles, roles.everything))
    cells = [c for c in representations[1]["cells"] if (c["measure"], c["column"]) == (RETRIEVAL, "within SFT PLs")]
    own = [[100 * c["value"] for c in cells if c["model"] == model] for model in ("m", "twin", "chance")]
    assert [list(line.get_ydata()) for line in lines.axes[0].get_lines()] == own
    pyplot.close("all")
