"""GRPO: advantages and objective by hand, one denominator, on-policy checks, exact resume."""

import contextlib
import itertools
import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from ranks import by_length

import data
import eval as evaluation
import rl
import sandbox
import sft
from eval import Rollout
from model import load

# --------------------------------------------------------------------------------------------------
# Advantages and objective


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    got = rl.advantages(rewards, torch.ones_like(rewards, dtype=torch.bool))
    std = (1 / 3) ** 0.5  # of 1, 0, 0, 1: the squares of ±1/2 sum to 1, over 4 - 1
    torch.testing.assert_close(got[0], torch.tensor([0.5, -0.5, -0.5, 0.5]) / (std + 1e-4))
    assert got[1].tolist() == [0.0] * 4
    torch.testing.assert_close(got[2], torch.tensor([-0.25, -0.25, -0.25, 0.75]) / (0.5 + 1e-4))


def test_advantages_are_rloos_up_to_the_scale():
    """RLOO's baseline, the mean of the others (arXiv 2402.14740), is G / (G - 1) times r - mean."""
    rewards = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    rloo = torch.stack([rewards[:, i] - rewards[:, [j for j in range(6) if j != i]].mean(1) for i in range(6)], 1)
    scale = (rewards.std(1, keepdim=True) + 1e-4) * 6 / 5
    got = rl.advantages(rewards, torch.ones(5, 6, dtype=torch.bool))
    torch.testing.assert_close(got * scale, rloo)


def test_a_response_without_reward_is_left_out_of_its_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, False], [True, False, False]])
    got = rl.advantages(rewards, valid)
    torch.testing.assert_close(got[0, :2], torch.tensor([0.5, -0.5]) / (0.5**0.5 + 1e-4))
    assert got[0, 2] == 0 and got[1].tolist() == [0.0] * 3
    verdicts = ("ok", "wrong_answer", "internal_error", "ok", "internal_error", "internal_error")
    scored = rl.score([Rollout({}, "python", [], [], [], True, verdict=v) for v in verdicts], 3)
    assert all(torch.equal(*pair) for pair in zip(scored, (rewards, valid, got), strict=True))


def test_clipped_objective_by_hand():
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 1.1])
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, 0.0])
    logprobs = ratio.log().requires_grad_()
    gain, clipped = rl.clipped_objective(logprobs, torch.zeros(6), advantage, 0.2, 0.28)
    torch.testing.assert_close(gain, torch.tensor([2.0, 2.56, 1.0, -3.0, -1.6, 0.0]))
    assert clipped.tolist() == [False, True, False, False, True, False]
    gain.sum().backward()  # d(ratio A)/d log p = ratio A where not clipped, else 0
    torch.testing.assert_close(logprobs.grad, torch.tensor([2.0, 0.0, 1.0, -3.0, 0.0, 0.0]))


# --------------------------------------------------------------------------------------------------
# Updates

RECORD = {"id": "r", "prompt": "Print it.", "tests": [{"stdin": "", "stdout": ""}], "solutions": {}}


def settings(**changes):
    return rl.Settings(
        **({"prompts": 3, "samples": 4, "max_new_tokens": 12, "device": "cpu", "micro_tokens": 100} | changes)
    )


def some_rollouts(tiny, tokenizer, s, seed=0):
    records = [RECORD | {"id": str(i), "prompt": "Print it. " * (i + 1)} for i in range(s.prompts)]
    tasks = [(r, "python") for r in records]
    return evaluation.sample(tiny, tokenizer, tasks, s.max_new_tokens, s.temperature, s.samples, seed)


def learner_of(tiny, tokenizer, s):
    return sft.Learner(tiny, sft.World("cpu"), s, 0.0, tokenizer.pad)


def gradient(tiny, tokenizer, rollouts, weights, s):
    """The gradient that one update applies, caught in place of the optimizer step."""
    caught = {}

    class Catch:
        param_groups = ()

        def step(self):
            caught.update({n: p.grad.clone() for n, p in tiny.named_parameters()})

        def zero_grad(self, **_):
            tiny.zero_grad()

    learner = learner_of(tiny, tokenizer, s)
    learner.optimizer = Catch()
    figures = rl.update(learner, rollouts, weights, s)
    return caught, figures


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_equals_the_formula_one_response_at_a_time(tiny, tokenizer, temperature):
    """Against torch's own softmax in float64, unpadded, off-policy so that the clip is at work."""
    s = settings(temperature=temperature, clip=1e9)
    rollouts = some_rollouts(tiny, tokenizer, s)
    tiny.double()
    noise = torch.Generator().manual_seed(1)
    for r in rollouts:
        r.logprobs = [lp + 0.5 * float(torch.randn((), generator=noise)) for lp in r.logprobs]
    weights = [0.0 if i % 5 == 0 else (-1.0) ** i * (1 + i / 7) for i in range(len(rollouts))]
    ours, figures = gradient(tiny, tokenizer, rollouts, weights, s)
    assert 0 < figures["clipped"] < figures["trained"]
    total, count = 0.0, sum(len(r.tokens) for r in rollouts)
    for r, a in zip(rollouts, weights, strict=True):
        logits = tiny(torch.tensor([r.prompt + r.tokens]))[0, len(r.prompt) - 1 : -1].double()
        logprobs = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(r.tokens)[:, None])[:, 0]
        ratio = (logprobs - torch.tensor(r.logprobs, dtype=torch.float64)).exp()
        total = total + torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / count
    (-total).backward()
    for name, p in tiny.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("micro_tokens", [1, 150])
def test_one_denominator_for_any_micro_batch(tiny, tokenizer, micro_tokens):
    s = settings(clip=1e9)
    rollouts = some_rollouts(tiny, tokenizer, s)
    tiny.double()
    weights = [(-1.0) ** i * i for i in range(len(rollouts))]
    whole, _ = gradient(tiny, tokenizer, rollouts, weights, settings(clip=1e9, micro_tokens=10**9))
    parts, _ = gradient(tiny, tokenizer, rollouts, weights, settings(clip=1e9, micro_tokens=micro_tokens))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_on_policy_sampler_and_trainer_agree_and_nothing_clips(tiny, tokenizer, temperature):
    s = settings(temperature=temperature)
    rollouts = some_rollouts(tiny, tokenizer, s)
    _, figures = gradient(tiny, tokenizer, rollouts, [1.0] * len(rollouts), s)
    assert figures["trained"] == sum(len(r.tokens) for r in rollouts)
    assert figures["drift"] / figures["trained"] < 1e-4 and figures["clipped"] == 0


def test_no_spread_changes_nothing(tiny, tokenizer):
    s = settings()
    learner = learner_of(tiny, tokenizer, s)
    rollouts = some_rollouts(tiny, tokenizer, s)
    spread = torch.tensor([[1.0, -1.0, 1.0, -1.0]] * s.prompts)
    rl.learn(learner, rollouts, spread, s)  # now AdamW has momentum
    before = {n: p.clone() for n, p in tiny.named_parameters()}
    rl.learn(learner, rollouts, torch.zeros(s.prompts, s.samples), s)
    assert all(torch.equal(p, before[n]) for n, p in tiny.named_parameters())


@pytest.mark.parametrize("updates", [1, 3])
def test_reward_rises_when_one_token_is_rewarded(tiny, tokenizer, updates):
    """A task with a known answer: reward 1 for a first token from the lower half of ids."""
    wanted = set(range(tokenizer.size // 2))
    s = settings(prompts=4, samples=16, max_new_tokens=2, lr=1e-2, updates=updates)
    learner, shares = learner_of(tiny, tokenizer, s), []
    for step in range(30):
        rollouts = some_rollouts(tiny, tokenizer, s, seed=step)
        for r in rollouts:
            r.verdict = "ok" if r.tokens[0] in wanted else "wrong_answer"
        rewards, _, advantage = rl.score(rollouts, s.samples)
        shares.append(rewards.mean().item())
        rl.learn(learner, rollouts, advantage, s)
    assert shares[0] < 0.7 and shares[-1] > 0.9


def test_the_groups_are_dealt_out_whole_over_the_updates(monkeypatch):
    dealt = []

    def update(learner, rollouts, weights, s):
        assert weights == [i / 10 for i in rollouts]
        dealt.append(sorted({i // s.samples for i in rollouts}))
        assert len(rollouts) == len(dealt[-1]) * s.samples
        return dict.fromkeys(("entropy", "clipped", "drift", "flops", "trained"), 0)

    monkeypatch.setattr(rl, "update", update)
    advantage = torch.arange(20, dtype=torch.float64).view(5, 4) / 10
    rl.learn(None, range(20), advantage, settings(updates=3))
    assert dealt == [[0, 3], [1, 4], [2]]


def test_no_two_steps_or_ranks_draw_with_one_seed(monkeypatch):
    drawn = []

    def sample(*_, seed, **__):
        drawn.append(seed)
        raise InterruptedError

    monkeypatch.setattr(rl, "sample", sample)
    for seed, step, rank in itertools.product(range(2), range(3), range(2)):
        world = SimpleNamespace(rank=rank, size=2, deal=list)
        run = SimpleNamespace(world=world, phase=contextlib.nullcontext)
        with pytest.raises(InterruptedError):
            rl.step_once(step, None, Mock(), None, [], None, run, settings(seed=seed))
    assert len(set(drawn)) == len(drawn) == 12


def test_figures_of_the_rollouts_are_of_all_ranks(tiny, tokenizer):
    s, parts = settings(), []
    rollouts = some_rollouts(tiny, tokenizer, s)
    for i, r in enumerate(rollouts):
        r.verdict, r.stopped, r.tokens = ("ok", "no_program", "internal_error")[i % 3], i % 4 == 0, r.tokens[: 1 + i]

    def figures(rollouts, sum_):
        return rl.rollout_figures(rollouts, *rl.score(rollouts, s.samples), SimpleNamespace(sum=sum_))

    whole = figures(rollouts, lambda *values: values)
    for part in (rollouts[:4], rollouts[4:]):  # two ranks, one with twice as many groups
        figures(part, lambda *values: parts.append(values) or values)
    assert figures(rollouts[:4], lambda *_: [sum(values) for values in zip(*parts, strict=True)]) == whole
    assert figures(rollouts[:4], lambda *values: values) != whole


# --------------------------------------------------------------------------------------------------
# Runs


def run_settings(corpus, start, out, **changes):
    values = {
        "data": str(corpus),
        "model": str(start),
        "out": str(out),
        "steps": 5,
        "eval_every": 2,
        "eval_problems": 1,
        "save_every": 2,
    }
    return settings(**(values | changes))


def test_resume_equals_an_uninterrupted_run_bitwise(corpus, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "grade", by_length)
    monkeypatch.setattr(evaluation, "grade", by_length)
    rl.main(run_settings(corpus, tiny_folder, tmp_path / "whole"))
    real, calls = rl.step_once, []

    def dies(*a):
        calls.append([record["id"] for record, _ in a[4]])
        if len(calls) == 4:
            raise MemoryError("as if killed")
        return real(*a)

    monkeypatch.setattr(rl, "step_once", dies)
    with pytest.raises(MemoryError):
        rl.main(run_settings(corpus, tiny_folder, tmp_path / "cut"))
    monkeypatch.setattr(rl, "step_once", real)
    assert sft.newest_checkpoint(tmp_path / "cut").name == "step-2"
    rl.main(run_settings(corpus, tiny_folder, tmp_path / "cut"))
    ids = [r["id"] for r in data.read_split(corpus, "rl")]
    assert list(itertools.chain(*calls)) == [ids[data.pick("0 rl", i, len(ids))] for i in range(12)]
    whole, cut = (torch.load(sft.newest_checkpoint(tmp_path / n) / "trainer.pt") for n in ("whole", "cut"))
    assert whole["flops"] == cut["flops"] > 0
    assert whole["data"] == cut["data"] == sft.digest(corpus, ["rl", "eval"])
    a, b = (load(sft.newest_checkpoint(tmp_path / n)).state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], v) for k, v in load(tiny_folder).state_dict().items())
    lines = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("whole", "cut")
    ]
    strip = [[{k: v for k, v in x.items() if not k.endswith("_s")} for x in run] for run in lines]
    assert strip[0] == strip[1] and [x["step"] for x in strip[0]] == list(range(6))
    texts = [(tmp_path / n / "rollouts/step-4.txt").read_text() for n in ("whole", "cut")]
    assert texts[0] == texts[1]


def test_a_step_with_real_programs_shows_its_figures(corpus, tiny_folder, tokenizer, tmp_path, monkeypatch):
    """The sampler is replaced by one that writes the corpus's program or a wrong one: in turn, or, if there is but one
    response to a problem, as in evaluation, the wrong one where the wording is new."""
    asked = []

    def half_right(model, tok, tasks, max_new_tokens, temperature, samples=1, seed=0, rows=512, progress=None):
        asked.extend(tasks)
        rollouts = []
        for record, language in tasks:
            for i in range(samples):
                right = i % 2 or (samples == 1 and not record["difficulty"]["new"])
                program = record["solutions"][language] if right else "print('no')"
                ids = [*tok.encode(data.answer({language: program}, [language])), tok.eot]
                rollouts.append(
                    Rollout(record, language, tok.prompt(record["prompt"], [language]), ids, [-1.0] * len(ids), True)
                )
        return rollouts

    monkeypatch.setattr(rl, "sample", half_right)
    monkeypatch.setattr(evaluation, "sample", half_right)
    rl.main(run_settings(corpus, tiny_folder, tmp_path / "run", steps=1))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    held = {"known wordings": {"python": 1.0}, "reserved wordings": {"python": 0.0}}
    assert [line["held_out"] for line in lines] == [held, held]
    assert lines[-1]["reward"] == 0.5 and lines[-1]["no_spread"] == 0 and lines[-1]["truncated"] == 0
    assert {"entropy", "clipped", "drift", "sample_tokens_per_s", "sandbox_tokens_per_s", "train_tokens_per_s"} <= set(
        lines[-1]
    )
    assert {language for _, language in asked} == {"python"}  # the source PL: no unseen PL in RL
    text = (tmp_path / "run/rollouts/step-1.txt").read_text()
    assert "--- ok, advantage +" in text and "--- wrong_answer, advantage -" in text
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 1


@pytest.mark.parametrize("flag", ["--top-k", "--top-p"])
def test_a_sampler_that_the_trainer_could_not_score_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        data.parse_flags(rl.Settings, rl.__doc__, [flag, "1"])
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_it_says_what_to_run_first(corpus, tmp_path):
    with pytest.raises(SystemExit, match=r"run `python sft\.py` first"):
        rl.main(run_settings(corpus, tmp_path / "nothing", tmp_path / "run"))


def test_a_missing_toolchain_is_named(corpus, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "installed", dict)
    with pytest.raises(SystemExit, match="no toolchain here for python"):
        rl.main(run_settings(corpus, tiny_folder, tmp_path / "run"))


def test_a_bfloat16_sampler_and_trainer_nearly_agree(corpus, tokenizer, tiny):
    """The sampler's copy is of the weights that the trainer computes with, also after an update."""
    s = settings(precision="bfloat16", lr=1e-2)
    with sft.World("cpu") as world:
        learner = sft.Learner(tiny, world, s, 0.0, tokenizer.pad)
        sampler = rl.Sampler(learner)
        for _ in range(2):
            sampler.refresh()
            rollouts = some_rollouts(sampler.model, tokenizer, s)
            figures = rl.update(learner, rollouts, [1.0, -1.0] * (len(rollouts) // 2), s)
            assert figures["drift"] / figures["trained"] < 0.02
        stale = rl.update(learner, rollouts, [1.0, -1.0] * (len(rollouts) // 2), s)
        assert stale["drift"] / stale["trained"] > 0.05
