"""GRPO: advantages and objective by hand, one denominator, rounds of sampling, on-policy checks, exact resume."""

import contextlib
import copy
import itertools
import json
import re
import shutil
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import ranks
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

STD = (1 / 3) ** 0.5 + 1e-4  # of 1, 0, 0, 1


@pytest.mark.parametrize(
    "kind, rewards, expected",
    [
        # the squares of ±1/2 sum to 1, over 4 - 1
        ("grpo", [1, 0, 0, 1], [0.5 / STD, -0.5 / STD, -0.5 / STD, 0.5 / STD]),
        ("grpo", [0, 0, 0, 1], [-0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, 0.75 / 0.5001]),
        ("dr-grpo", [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
        ("dr-grpo", [0, 0, 0, 1], [-0.25, -0.25, -0.25, 0.75]),
        ("rloo", [1, 0, 0, 1], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),  # 1 less the mean of 0, 0, 1
        ("rloo", [0, 0, 0, 1], [-1 / 3, -1 / 3, -1 / 3, 1]),
        # One, or all but one, of the responses without a reward: None.
        ("grpo", [1, 0, None, None], [0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4), 0, 0]),
        ("dr-grpo", [1, 0, 0, None], [2 / 3, -1 / 3, -1 / 3, 0]),
        ("rloo", [1, 0, 0, None], [1, -0.5, -0.5, 0]),
        *((kind, rewards, [0] * 4) for kind in rl.ADVANTAGES for rewards in ([1] * 4, [0] * 4, [1] + [None] * 3, [None] * 4)),
    ],
)  # fmt: skip
def test_advantages_by_hand(kind, rewards, expected):
    valid = torch.tensor([[r is not None for r in rewards]])
    got = rl.advantages(torch.tensor([[r or 0.0 for r in rewards]]), valid, kind)
    torch.testing.assert_close(got, torch.tensor([expected], dtype=got.dtype), rtol=1e-5, atol=1e-6)
    assert (got == 0).tolist() == [[a == 0 for a in expected]]  # to the bit: such responses are not trained


def test_a_response_without_reward_is_left_out_of_its_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, False], [True, False, False]])
    verdicts = ("ok", "wrong_answer", "internal_error", "ok", "internal_error", "internal_error")
    rollouts = [Rollout({}, "python", [], [], [], True, verdict=v) for v in verdicts]
    batch = rl.Batch.of(rollouts, settings(samples=3))
    assert torch.equal(batch.rewards, rewards) and torch.equal(batch.valid, valid)
    torch.testing.assert_close(batch.advantage, torch.tensor([[1.0, -1.0, 0.0], [0.0] * 3]) * 0.5 / (0.5**0.5 + 1e-4))
    assert batch.spread.tolist() == [True, False]
    kept, advantage = batch.informative()
    assert kept == rollouts[:3] and torch.equal(advantage, batch.advantage[:1])
    plain = rl.Batch.of(rollouts, settings(samples=3, advantage="dr-grpo"))
    assert plain.advantage.tolist() == [[0.5, -0.5, 0], [0, 0, 0]]


RATIOS, SIGNS = [1.0, 1.5, 0.5, 1.5, 0.5, 4.0, 4.0, 1.1], [2.0, 2.0, 2.0, -2.0, -2.0, 2.0, -2.0, 0.0]


@pytest.mark.parametrize(
    "dual_clip, gains, taken",
    [
        (0.0, [2.0, 2.56, 1.0, -3.0, -1.6, 2.56, -8.0, 0.0], [1, 4, 5]),
        (3.0, [2.0, 2.56, 1.0, -3.0, -1.6, 2.56, -6.0, 0.0], [1, 4, 5, 6]),
        (1.4, [2.0, 2.56, 1.0, -2.8, -1.6, 2.56, -2.8, 0.0], [1, 3, 4, 5, 6]),
    ],
)
def test_clipped_objective_by_hand(dual_clip, gains, taken):
    """`taken` are the tokens whose gradient a clip takes: d(ratio A)/d log p = ratio A elsewhere, there 0."""
    advantage = torch.tensor(SIGNS)
    logprobs = torch.tensor(RATIOS).log().requires_grad_()
    gain, clipped = rl.clipped_objective(logprobs, torch.zeros(8), advantage, 0.2, 0.28, dual_clip)
    torch.testing.assert_close(gain, torch.tensor(gains))
    assert clipped.nonzero().flatten().tolist() == taken
    gain.sum().backward()
    expected = [0.0 if i in taken else ratio * a for i, (ratio, a) in enumerate(zip(RATIOS, SIGNS, strict=True))]
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected))


@pytest.mark.parametrize(
    "estimator, expected",
    [("k2", [0.0, 0.125, 0.5]), ("k3", [0.0, 0.60653066 - 0.5, 2.71828183 - 2])],  # of d = 0, 0.5 and -1
)
def test_kl_penalty_by_hand(estimator, expected):
    logprobs, reference = torch.tensor([-2.0, -1.0, -3.0]), torch.tensor([-2.0, -1.5, -2.0])
    torch.testing.assert_close(rl.kl_penalty(logprobs, reference, estimator), torch.tensor(expected))


def test_k2_has_the_right_gradient_and_k3_the_right_value():
    """In expectation over the policy, worked out exactly over 7 tokens. k3's gradient is of the KL the other way."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()

    def kl(p, q):
        return (p.exp() * (p - q)).sum()

    policy, reference = logits.log_softmax(0), other.log_softmax(0)
    forward, backward = kl(policy, reference), kl(reference, policy)
    wanted = {"k2": forward, "k3": backward}
    for estimator, divergence in wanted.items():
        expected = (policy.exp().detach() * rl.kl_penalty(policy, reference, estimator)).sum()
        ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (expected, divergence))
        torch.testing.assert_close(ours, theirs)
        assert (expected - forward).abs() < 1e-12 if estimator == "k3" else (expected - forward).abs() > 1e-2
    assert not torch.allclose(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (forward, backward)))


# --------------------------------------------------------------------------------------------------
# Updates

RECORD = {"id": "r", "prompt": "Print it.", "tests": [{"stdin": "", "stdout": ""}], "solutions": {}}


def settings(**changes):
    sizes = {"prompts": 3, "samples": 4, "max_new_tokens": 12, "micro_tokens": 100}
    return rl.Settings(**sizes | {"device": "cpu"} | changes)


def some_rollouts(tiny, tokenizer, s, seed=0):
    records = [RECORD | {"id": str(i), "prompt": "Print it. " * (i + 1)} for i in range(s.prompts)]
    tasks = [(r, "python") for r in records]
    return evaluation.roll_out(tiny, tokenizer, tasks, s.max_new_tokens, s.temperature, s.samples, seed)


def learner_of(tiny, tokenizer, s):
    return sft.Learner(tiny, sft.World("cpu"), s, 0.0, tokenizer.pad)


def gradient(tiny, tokenizer, rollouts, weights, s, reference=None):
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
    figures = rl.update(learner, rollouts, weights, s.lr, s, reference)
    return caught, figures


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"temperature": 0.7}, {"eps_high": 0.5}, {"dual_clip": 1.1}, {"denominator": "budget"},
        {"kl": 0.3, "kl_estimator": "k2"}, {"kl": 0.3, "kl_estimator": "k3", "temperature": 0.7},
    ],
    ids=str,
)  # fmt: skip
def test_gradient_equals_the_formula_one_response_at_a_time(tiny, tokenizer, changes):
    """Against torch's own softmax in float64, unpadded, off-policy so that the clip is at work."""
    s = settings(clip=1e9, **changes)
    rollouts = some_rollouts(tiny, tokenizer, s)
    tiny.double()
    reference = copy.deepcopy(tiny).init_weights(1) if s.kl else None
    noise = torch.Generator().manual_seed(1)
    for r in rollouts:
        r.logprobs = [lp + 0.5 * float(torch.randn((), generator=noise)) for lp in r.logprobs]
    weights = [0.0 if i % 5 == 0 else (-1.0) ** i * (1 + i / 7) for i in range(len(rollouts))]
    ours, figures = gradient(tiny, tokenizer, rollouts, weights, s, reference)
    assert 0 < figures["clipped"] < figures["trained"]

    def logprobs_of(model, r):
        logits = model(torch.tensor([r.prompt + r.tokens]))[0, len(r.prompt) - 1 : -1].double()
        return (logits / s.temperature).log_softmax(-1).gather(1, torch.tensor(r.tokens)[:, None])[:, 0]

    total, penalty, count = 0.0, torch.zeros(()), sum(len(r.tokens) for r in rollouts)
    for r, a in zip(rollouts, weights, strict=True):
        logprobs = logprobs_of(tiny, r)
        ratio = (logprobs - torch.tensor(r.logprobs, dtype=torch.float64)).exp()
        gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1 + s.eps_high) * a)
        if s.dual_clip and a < 0:
            gain = gain.clamp(min=s.dual_clip * a)
        total = total + gain.sum()
        if s.kl:  # also of responses that have no advantage
            d = logprobs - logprobs_of(reference, r).detach()
            penalty = penalty + (d**2 / 2 if s.kl_estimator == "k2" else torch.exp(-d) - 1 + d).sum()
    if s.denominator == "budget":
        count = s.max_new_tokens * s.samples * s.prompts
    ((s.kl * penalty - total) / count).backward()
    for name, p in tiny.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert figures["kl"] == pytest.approx(penalty.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_on_policy_sampler_and_trainer_agree_and_nothing_clips(tiny, tokenizer, temperature):
    s = settings(temperature=temperature)
    rollouts = some_rollouts(tiny, tokenizer, s)
    _, figures = gradient(tiny, tokenizer, rollouts, [1.0] * len(rollouts), s)
    assert figures["trained"] == sum(len(r.tokens) for r in rollouts)
    assert figures["drift"] / figures["trained"] < 1e-4 and figures["clipped"] == 0


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_no_spread_changes_nothing(tiny, tokenizer, kl):
    s = settings(kl=kl)
    learner, reference = learner_of(tiny, tokenizer, s), copy.deepcopy(tiny) if kl else None
    rollouts = some_rollouts(tiny, tokenizer, s)
    spread = torch.tensor([[1.0, -1.0, 1.0, -1.0]] * s.prompts)
    rl.learn(learner, rollouts, spread, 1e-3, s, reference)  # now AdamW has momentum
    state = learner.optimizer.state_dict()["state"]
    before = copy.deepcopy((tiny.state_dict(), state))
    figures = rl.learn(learner, rollouts, torch.zeros(s.prompts, s.samples), 1e-3, s, reference)
    torch.testing.assert_close((dict(tiny.state_dict()), state), (dict(before[0]), before[1]), rtol=0, atol=0)
    assert all(moments["exp_avg"].any() for moments in state.values())
    assert figures["trained_tokens"] == 0
    assert figures["entropy"] is figures["clipped"] is figures["drift"] is figures["grad_norm"] is None


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
        batch = rl.Batch.of(rollouts, s)
        shares.append(batch.rewards.mean().item())
        rl.learn(learner, rollouts, batch.advantage, s.lr, s)
    assert shares[0] < 0.7 and shares[-1] > 0.9


def test_the_groups_are_dealt_out_whole_over_the_updates(monkeypatch):
    dealt = []

    def update(learner, rollouts, weights, lr, s, reference):
        assert weights == [i / 10 for i in rollouts]
        dealt.append(sorted({i // s.samples for i in rollouts}))
        assert len(rollouts) == len(dealt[-1]) * s.samples
        return dict.fromkeys(("entropy", "clipped", "drift", "grad_norm"), len(dealt)) | {"trained": 2}

    monkeypatch.setattr(rl, "update", update)
    advantage = torch.arange(20, dtype=torch.float64).view(5, 4) / 10
    figures = rl.learn(None, range(20), advantage, 1e-3, settings(updates=3))
    assert dealt == [[0, 3], [1, 4], [2]]
    means = {"entropy": 1, "clipped": 1}  # (1 + 2 + 3) / 6; the drift is of the first update
    assert figures == means | {"drift": 1 / 2, "grad_norm": 3, "trained_tokens": 6}


# --------------------------------------------------------------------------------------------------
# Rounds of sampling


def a_run(step=0, drawn=0, rank=0, size=1, others=0):
    """A run of this rank, beside ranks with `others` groups with spread."""
    world = SimpleNamespace(rank=rank, size=size, deal=lambda x: x[rank::size], sum=lambda *v: [x + others for x in v])
    phase = contextlib.nullcontext
    return SimpleNamespace(world=world, phase=phase, step=step, drawn=drawn, seconds=defaultdict(lambda: 1.0))


def sampler_of(spread, drawn, s):
    """A sampler whose responses to problem number i pass in part if spread[i], else not at all; notes what is `drawn`."""

    def sample(model, tokenizer, tasks, max_new_tokens, temperature, samples, seed, rows):
        assert (max_new_tokens, temperature, samples) == (s.max_new_tokens, s.temperature, s.samples)
        drawn.append((seed, [(record["id"], language) for record, language in tasks]))
        made = []
        for record, language in tasks:
            for i in range(samples):
                verdict = "ok" if i == 0 and spread[record["number"]] else "wrong_answer"
                made.append(Rollout(record, language, [1], [2, 3], [-1.0, -1.0], True, verdict=verdict))
        return made

    return sample


# Of 12 problems in the order in which they are drawn, whether their groups have spread.
SPREAD = [True, False, False, False, True, False, True, True, True, False, False, False]


def gathered(monkeypatch, run, s, languages=("python",), spread=SPREAD):
    """(batch, what each round drew): of problems in the order of the passes."""
    ids = [data.pick(f"{s.seed} rl", i, len(spread)) for i in range(len(spread))]
    records = [RECORD | {"id": f"p{ids.index(i)}", "number": ids.index(i)} for i in range(len(spread))]
    drawn, known, given, s = [], {}, [], replace(s, temperature=0.7)
    monkeypatch.setattr(rl, "roll_out", sampler_of(spread, drawn, s))
    monkeypatch.setattr(rl, "grade", lambda *job: given.append(job[-1]))
    batch = rl.gather_rollouts(records, languages, Mock(), None, None, known, run, s)
    assert all(verdicts is known for verdicts in given)  # what is known is not run again
    return batch, drawn


@pytest.mark.parametrize(
    "informative, rounds, others, needed, kept",
    [
        (0, 4, 0, 1, [0]), (1, 4, 0, 1, [0]), (2, 4, 0, 2, [0, 4]),  # 0: off, a single round
        (3, 4, 0, 3, [0, 4, 6, 7, 8]),  # all of the last round, also what is more than asked for
        (9, 2, 0, 2, [0, 4]), (9, 4, 0, 4, [0, 4, 6, 7, 8]),  # rounds are over
        (5, 4, 3, 2, [0, 4]),  # other ranks have the rest
    ],
)  # fmt: skip
def test_rounds_go_on_until_enough_groups_have_spread(monkeypatch, informative, rounds, others, needed, kept):
    run = a_run(others=others)
    batch, drawn = gathered(monkeypatch, run, settings(informative=informative, rounds=rounds))
    assert [[i for i, _ in tasks] for _, tasks in drawn] == [[f"p{3 * n + i}" for i in range(3)] for n in range(needed)]
    assert run.drawn == 3 * needed and len(batch.rollouts) == 3 * 4 * needed
    assert batch.spread.tolist() == SPREAD[: 3 * needed]
    rollouts, advantage = batch.informative()
    assert [r.record["number"] for r in rollouts] == [i for i in kept for _ in range(4)]
    assert advantage.shape == (len(kept), 4) and (advantage[:, 0] > 0).all() and (advantage[:, 1:] < 0).all()


@pytest.mark.parametrize("informative, trained", [(2, [0, 4]), (0, [0, 1, 2])])
def test_only_groups_with_spread_are_trained_and_what_was_drawn_is_logged(monkeypatch, informative, trained):
    seen, run, s = [], a_run(step=3), settings(informative=informative, lr=1e-3, warmup=7)
    batch, _ = gathered(monkeypatch, run, s)
    monkeypatch.setattr(rl, "gather_rollouts", lambda *_: batch)
    monkeypatch.setattr(rl, "learn", lambda learner, *kept: seen.extend(kept) or {"trained_tokens": 7})
    shown, text = rl.step_once([], [], None, None, Mock(decode=lambda _: "it"), None, {}, run, s, "start")
    rollouts, advantage, lr, _, reference = seen
    assert reference == "start"  # of the KL penalty
    assert [r.record["number"] for r in rollouts[::4]] == trained and len(advantage) == len(trained)
    assert lr == shown["lr"] == pytest.approx(1e-3 * 4 / 8)  # the fourth step of seven that warm up
    groups = len(batch.spread)
    assert shown["groups"] == groups and shown["no_spread"] == pytest.approx(1 - sum(SPREAD[:groups]) / groups)
    assert shown["trained_tokens"] == 7 and "=== p0 in python" in text


def test_the_languages_of_rl_take_turns(monkeypatch):
    run, s = a_run(), settings(informative=9, rounds=4)
    _, drawn = gathered(monkeypatch, run, s, ("ruby", "lua"))
    assert [p for _, tasks in drawn for _, p in tasks] == ["ruby", "lua"] * 6


def test_no_two_rounds_steps_seeds_or_ranks_draw_with_one_seed(monkeypatch):
    seeds = []
    for seed, step, rank in itertools.product(range(2), range(3), range(2)):
        run = a_run(drawn=6 * step, rank=rank, size=2)
        _, drawn = gathered(monkeypatch, run, settings(seed=seed, informative=99, rounds=2))
        seeds += [number for number, _ in drawn]
    assert len(set(seeds)) == len(seeds) == 24


def test_the_ranks_share_the_problems_of_a_round(monkeypatch):
    s, shares = settings(informative=0, prompts=4), []
    for rank in range(2):
        _, [(_, tasks)] = gathered(monkeypatch, a_run(rank=rank, size=2), s)
        shares.append([i for i, _ in tasks])
    assert shares == [["p0", "p2"], ["p1", "p3"]]


def test_figures_of_the_rollouts_are_of_all_ranks(tiny, tokenizer):
    s, parts = settings(), []
    rollouts = some_rollouts(tiny, tokenizer, s)
    for i, r in enumerate(rollouts):
        r.verdict, r.stopped, r.tokens = ("ok", "no_program", "internal_error")[i % 3], i % 4 == 0, r.tokens[: 1 + i]

    def figures(rollouts, sum_):
        return rl.rollout_figures(rl.Batch.of(rollouts, s), SimpleNamespace(sum=sum_))

    whole = figures(rollouts, lambda *values: values)
    for part in (rollouts[:4], rollouts[4:]):  # two ranks, one with twice as many groups
        figures(part, lambda *values: parts.append(values) or values)
    assert figures(rollouts[:4], lambda *_: [sum(values) for values in zip(*parts, strict=True)]) == whole
    assert figures(rollouts[:4], lambda *values: values) != whole and whole["groups"] == 3
    assert (whole["reward"], whole["truncated"], whole["no_program"]) == (4 / 8, 9 / 12, 4 / 12)


def test_what_rl_has_to_work_with_is_said_and_whether_it_is_nothing():
    figures = {"groups": 20, "no_spread": 0.35, "reward": 0.123, "no_program": 0.125, "truncated": 0.25}
    text = rl.provisions(figures)
    assert text == "of 20 groups 65% have spread; mean reward 0.12; 62% of the responses hold a program"
    assert "nothing to learn from" in rl.provisions(figures | {"no_spread": 1.0})


# --------------------------------------------------------------------------------------------------
# Runs


def run_settings(corpus, start, out, **changes):
    values = {"data": str(corpus), "model": str(start), "out": str(out), "informative": 2, "rounds": 2, "steps": 5}
    values |= {"eval_every": 2, "eval_problems": 1, "eval_tokens": 8, "save_every": 3}
    return settings(**(values | changes))


@pytest.mark.parametrize(
    "changes",
    [{"informative": 3, "rounds": 3}, {"informative": 0, "kl": 0.1, "languages": ("ruby", "python"), "updates": 2}],
    ids=["rounds", "kl, two PLs"],
)
def test_resume_equals_an_uninterrupted_run_bitwise(corpus, tiny_folder, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(rl, "grade", by_length)
    monkeypatch.setattr(evaluation, "grade", by_length)
    real_sample, real_step, calls, steps = rl.roll_out, rl.step_once, [], []

    def sample(model, tokenizer, tasks, *budget, **how):
        calls.extend((record["id"], language) for record, language in tasks)
        return real_sample(model, tokenizer, tasks, *budget, **how)

    def dies(*a):
        steps.append(1)
        if len(steps) == 4:
            raise MemoryError("as if killed")
        return real_step(*a)

    monkeypatch.setattr(rl, "roll_out", sample)
    rl.main(run_settings(corpus, tiny_folder, tmp_path / "whole", **changes))
    ids, languages = [r["id"] for r in data.read_split(corpus, "rl")], changes.get("languages", ("python",))
    assert calls == [(ids[data.pick("0 rl", i, len(ids))], languages[i % len(languages)]) for i in range(len(calls))]
    drawn = calls.copy()
    calls.clear()
    monkeypatch.setattr(rl, "step_once", dies)
    with pytest.raises(MemoryError):
        rl.main(run_settings(corpus, tiny_folder, tmp_path / "cut", **changes))
    monkeypatch.setattr(rl, "step_once", real_step)
    saved = sft.newest_checkpoint(tmp_path / "cut")
    assert saved.name == "step-3" and calls == drawn[: len(calls)]
    before = ranks.place(saved)["drawn"]
    calls.clear()
    rl.main(run_settings(corpus, tiny_folder, tmp_path / "cut", **changes))
    assert 0 < before < len(drawn) and calls == drawn[before:]
    whole, cut = (ranks.place(tmp_path / n) for n in ("whole", "cut"))
    assert whole["tokens"] == cut["tokens"] > 0 and whole["drawn"] == cut["drawn"] == len(drawn)
    a, b = (load(sft.newest_checkpoint(tmp_path / n)).state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], v) for k, v in load(tiny_folder).state_dict().items())
    lines = [ranks.metrics(tmp_path / n) for n in ("whole", "cut")]
    assert lines[0] == lines[1] and [x["step"] for x in lines[0]] == list(range(6))
    assert sum(x.get("groups", 0) for x in lines[0]) == len(drawn)
    assert len({x["groups"] for x in lines[0] if "groups" in x}) == (2 if changes["informative"] else 1)
    texts = [(tmp_path / n / "rollouts/step-4.txt").read_text() for n in ("whole", "cut")]
    assert texts[0] == texts[1]
    assert whole["data"] == cut["data"] == sft.digest(corpus, ["rl", "dev"])


def test_a_step_with_real_programs_shows_its_figures(corpus, tiny_folder, tmp_path, monkeypatch, capsys):
    """The sampler is replaced by one that writes the corpus's program or a wrong one: in turn, or, if there is but one
    response to a problem, as in evaluation, the wrong one where a wording is reserved."""
    asked = []

    def half_right(model, tok, tasks, max_new_tokens, temperature, samples=1, seed=0, rows=512, progress=None):
        asked.extend((language, max_new_tokens, samples) for _, language in tasks)
        rollouts = []
        for record, language in tasks:
            for i in range(samples):
                right = i % 2 or (samples == 1 and "phrase" not in record)
                program = record["solutions"][language] if right else "print('no')"
                ids = [*tok.encode(data.answer(program, language)), tok.stop]
                prompt = tok.prompt(data.statement(record, language), language)
                rollouts.append(Rollout(record, language, prompt, ids, [-1.0] * len(ids), True))
        return rollouts

    monkeypatch.setattr(rl, "roll_out", half_right)
    monkeypatch.setattr(evaluation, "roll_out", half_right)
    rl.main(run_settings(corpus, tiny_folder, tmp_path / "run", steps=1, eval_languages=("ruby",)))
    lines = ranks.metrics(tmp_path / "run", timed=True)
    held = {"own words": {"ruby": 1.0}, "the source's words": {"ruby": 1.0}, "reserved words": {"ruby": 0.0}}
    assert [line["held_out"] for line in lines] == [held, held]
    assert lines[-1]["reward"] == 0.5 and lines[-1]["no_spread"] == 0 and lines[-1]["truncated"] == 0
    speeds = {f"{phase}_tokens_per_s" for phase in ("sample", "sandbox", "train")}
    assert {"entropy", "clipped", "drift"} | speeds <= lines[-1].keys()
    assert {*asked} == {("python", 12, 4), ("ruby", 8, 1)}  # RL in the source PL, since no other is asked for
    said = "of 3 groups 100% have spread; mean reward 0.50; 100% of the responses hold a program"
    assert said in capsys.readouterr().out
    text = (tmp_path / "run/rollouts/step-1.txt").read_text()
    assert "--- ok, advantage +" in text and "--- wrong_answer, advantage -" in text
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 1


def test_verdicts_are_kept_over_steps_and_apart_for_held_out_problems(corpus, tiny_folder, tmp_path, monkeypatch):
    """Apart, since two files may have the same ids."""
    given = {rl: [], evaluation: []}
    for module, dicts in given.items():
        keep = lambda rollouts, tokenizer, box, known, *_, dicts=dicts: (  # noqa: E731
            dicts.append(known) or by_length(rollouts, tokenizer, box)
        )
        monkeypatch.setattr(module, "grade", keep)
    rl.main(run_settings(corpus, tiny_folder, tmp_path / "run", steps=2))
    taught, held = ({id(known) for known in dicts} for dicts in given.values())
    assert len(given[rl]) >= 2 <= len(given[evaluation]) and len(taught) == len(held) == 1 and taught != held


def test_what_is_evaluated_is_what_is_saved_and_no_weight_decays(corpus, tiny_folder, tmp_path, monkeypatch):
    """In bfloat16, where the sampler has a copy of the weights, as on several ranks."""
    seen, decays, optimizer = [], [], sft.make_optimizer
    keep = lambda model, *_: seen.append({name: x.clone() for name, x in model.state_dict().items()}) or {}  # noqa: E731
    monkeypatch.setattr(rl, "held_out_passes", keep)
    monkeypatch.setattr(rl, "grade", by_length)
    monkeypatch.setattr(sft, "make_optimizer", lambda model, decay: decays.append(decay) or optimizer(model, decay))
    rl.main(run_settings(corpus, tiny_folder, tmp_path / "run", steps=1, precision="bfloat16", lr=1e-2, warmup=0))
    before, after = seen
    assert ranks.same(after, load(sft.newest_checkpoint(tmp_path / "run")).state_dict()) and decays == [0]
    assert not ranks.same(before, after)


def test_problems_that_are_too_long_or_have_no_tests_are_left_out_and_counted(
    corpus, tiny_folder, tmp_path, monkeypatch, capsys
):
    asked, real = [], rl.roll_out
    ruby = {"harness": {"ruby": "«answer»\nputs '«word»'"}, "solutions": {}, "tests": [{"stdin": ""}]}
    monkeypatch.setattr(rl, "grade", by_length)
    monkeypatch.setattr(evaluation, "grade", by_length)
    monkeypatch.setattr(rl, "roll_out", lambda *a, **how: asked.extend(r["id"] for r, _ in a[2]) or real(*a, **how))
    shutil.copytree(corpus, folder := tmp_path / "data")
    rl_records, dev = (data.read_split(corpus, name) for name in ("rl", "dev"))
    rl_records = [rl_records[0] | ruby, *(r | {"prompt": 1000 * "long "} for r in rl_records[1:3]), *rl_records[3:6]]
    data.write_records(folder / "rl.jsonl.gz", [{k: v for k, v in r.items() if k != "prompts"} for r in rl_records])
    dev = [dev[0] | ruby, dev[30], dev[60] | {"prompts": {"lua": 1000 * "long "}}]
    data.write_records(folder / "dev.jsonl.gz", dev)
    rl.main(run_settings(folder, tiny_folder, tmp_path / "run", steps=1))
    out = capsys.readouterr().out
    assert {*asked} == {"rl-3", "rl-4", "rl-5"}
    assert ranks.metrics(tmp_path / "run")[0]["held_out"].keys() == {"the source's words"}
    for line in (
        "left out: 1 of 6 RL problems, the first record 'rl-0': no tests in each of python",
        "left out: of 3 held-out problems without tests 1 in python",
        r"left out: 2 of 5 RL problems, the first record 'rl-1': a prompt of \d+ tokens and 12 new ones, the model takes 1024",
        r"left out: 1 of 3 held-out problems, the first record 'dev-reserved-0': a prompt of \d+ tokens and 8 new ones, .*",
    ):
        assert re.search(rf"^{line}$", out, re.MULTILINE)
    data.write_records(folder / "rl.jsonl.gz", [r | ruby for r in rl_records])
    lacking = r"too many to leave out: 6 of 6 RL problems, .* no tests in each of .*; give other"
    with pytest.raises(ValueError, match=lacking):
        rl.main(run_settings(folder, tiny_folder, tmp_path / "none"))


@pytest.mark.parametrize("flag", ["--top-k", "--top-p"])
def test_a_sampler_that_the_trainer_could_not_score_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        data.parse_flags(rl.Settings, rl.__doc__, [flag, "1"])
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_dual_clip_that_would_cut_what_the_other_clip_leaves_is_refused(corpus, tiny_folder, tmp_path, share):
    with pytest.raises(ValueError, match=f"--dual-clip {share}: must be at least 1, or 0 for no limit"):
        rl.main(run_settings(corpus, tiny_folder, tmp_path / "run", dual_clip=share))


def test_it_says_what_to_run_first(corpus, tmp_path):
    with pytest.raises(SystemExit, match=r"run `python sft\.py` first"):
        rl.main(run_settings(corpus, tmp_path / "nothing", tmp_path / "run"))


def test_a_missing_toolchain_is_named(corpus, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "installed", dict)
    for changes, absent in ({}, "python"), ({"languages": ("rb",), "eval_languages": ("lua",)}, "lua, ruby"):
        with pytest.raises(SystemExit, match=f"no toolchain here for {absent};"):
            rl.main(run_settings(corpus, tiny_folder, tmp_path / "run", **changes))


def test_a_bfloat16_sampler_and_trainer_nearly_agree(corpus, tokenizer, tiny):
    """The sampler's copy is of the weights that the trainer computes with, also after an update."""
    s = settings(precision="bfloat16", lr=1e-2)
    with sft.World("cpu") as world:
        learner = sft.Learner(tiny, world, s, 0.0, tokenizer.pad)
        sampler = rl.Sampler(learner)
        for _ in range(2):
            sampler.refresh()
            rollouts = some_rollouts(sampler.model, tokenizer, s)
            figures = rl.update(learner, rollouts, [1.0, -1.0] * (len(rollouts) // 2), s.lr, s, None)
            assert figures["drift"] / figures["trained"] < 0.02
        stale = rl.update(learner, rollouts, [1.0, -1.0] * (len(rollouts) // 2), s.lr, s, None)
        assert stale["drift"] / stale["trained"] > 0.05
