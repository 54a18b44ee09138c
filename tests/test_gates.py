"""The gates of the study's settings: each holds on a design that may be studied, and fails alone on one that may not."""

import json

import gates
import pytest

COLUMNS = ("python (source)", "ruby", "other SFT mean", "perl (unseen)", "unseen mean")
# (model, kind of problem) -> pass@1 in COLUMNS: a design that passes every gate, each by no more than it has to.
PASSES = {
    ("base", gates.OWN): (0.6, 0.5, 0.5, 0.35, 0.35), ("base", gates.RESERVED): (0.2, 0.1, 0.1, 0.3, 0.2),
    ("source", gates.OWN): (0.75, 0.5, 0.5, 0.6, 0.6), ("source", gates.RESERVED): (0.65, 0.1, 0.1, 0.1, 0.1),
    ("rl-source", gates.OWN): (0.75, 0.4, 0.4, 0.6, 0.6), ("rl-source", gates.RESERVED): (0.8, 0.1, 0.1, 0.1, 0.1),
}  # fmt: skip


def failing(tmp_path, passes: dict, no_spread: float = 0.89) -> list[str]:
    """What fails of a run whose table is `passes` and whose RL ends with that share of groups without spread."""
    cells = [
        {"measure": gates.GREEDY, "model": model, "group": group, "column": column, "value": value}
        for (model, group), values in passes.items()
        for column, value in zip(COLUMNS, values, strict=True)
    ]
    for name, text in (
        ("eval/eval.json", json.dumps({"cells": cells})),
        ("rl-source/metrics.jsonl", f'{{"no_spread": 0}}\n{{"no_spread": {no_spread}}}\n'),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return [what for what, _, _, holds in gates.gates(tmp_path) if not holds]


def test_a_design_that_may_be_studied_passes(tmp_path):
    for source in (0.2, 0.6):
        assert failing(tmp_path, PASSES | {("base", gates.RESERVED): (source, 0.1, 0.1, 0.3, 0.2)}) == []


@pytest.mark.parametrize(
    "model, group, values, gate",
    [
        ("base", gates.OWN, (0.6, 0.5, 0.5, 0.34, 0.6), "base, own words, each PL"),
        ("base", gates.RESERVED, (0.19, 0.1, 0.1, 0.1, 0.1), "base, reserved words, source, at least"),
        ("base", gates.RESERVED, (0.61, 0.1, 0.1, 0.1, 0.1), "base, reserved words, source, at most"),
        ("base", gates.RESERVED, (0.3, 0.1, 0.1, 0.3, 0.21), "base, reserved words, mean of other PLs"),
        ("source", gates.OWN, (0.74, 0.5, 0.5, 0.6, 0.6), "after SFT, own words, source"),
        ("rl-source", gates.RESERVED, (0.79, 0.1, 0.1, 0.1, 0.1), "gain of RL"),
        ("rl-source", gates.OWN, (0.8, 0.39, 0.5, 0.6, 0.6), "loss by RL"),
    ],
)
def test_each_gate_fails_alone(tmp_path, model, group, values, gate):
    [what] = failing(tmp_path, PASSES | {(model, group): values})
    assert what.startswith(gate)


def test_rl_must_have_something_left_to_teach_and_to_learn_from(tmp_path):
    taught = {("source", gates.RESERVED): (0.66, 0.1, 0.1, 0.1, 0.1), ("rl-source", gates.RESERVED): (0.9,) * 5}
    assert failing(tmp_path, PASSES | taught) == ["after SFT, reserved words, source, each arm, at most"]
    assert failing(tmp_path, PASSES, 0.91) == ["groups with spread in the last step of RL, each arm, at least"]


def test_the_exit_code_says_whether_all_hold(tmp_path, capsys):
    for no_spread, failed in ((0.5, 0), (1.0, 1)):
        failing(tmp_path, PASSES, no_spread)
        with pytest.raises(SystemExit) as ended:
            gates.main([str(tmp_path)])
        said = capsys.readouterr().out
        assert ended.value.code == failed == said.count("FAILS") and said.count("holds") == 9 - failed
