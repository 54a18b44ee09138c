"""The RL stage: GRPO in one source PL, the reward being that the program passes its tests.

    python rl.py                                     # from runs/parallel, into runs/rl-parallel
    python rl.py --model runs/source                 # the other arm, into runs/rl-source
    torchrun --nproc-per-node 8 rl.py --model DIR    # on 8 GPUs

Each step samples a group of responses to each of some problems, runs the programs in the sandbox
(reward 1 if the response ended and its program passes all tests, else 0), turns rewards into
advantages within the group, and maximises the clipped objective. The run folder is as sft.py's, with
rollouts/step-N.txt at each evaluation: some groups with all their responses, to read what is being rewarded.

Advantage and objective are those of GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1). Our
choices, where they differ from that, or the Parallel-SFT paper leaves freedom or is silent:

1. A group whose rewards are all equal teaches nothing. So a step samples further problems, round after round,
   until `--informative` groups have spread or `--rounds` are drawn, and trains those that have: the dynamic sampling of
   DAPO (arXiv 2503.14476, section 3.2), but what the last round brings beyond the number is kept.
2. One denominator per update, the number of response tokens in the groups that are trained, as in DAPO (equation
   8 there): not a mean per response, which would weigh a token by its response's length. `--denominator budget` is
   Dr. GRPO's.
3. No KL penalty and no reference model, unless `--kl` is given.
4. Sampler and trainer score one distribution, softmax(logits / temperature) over the whole
   vocabulary; |Δ log p| between them is logged. The ratio's denominator is what the sampler drew with.
5. Responses with advantage 0 have gradient 0 without a KL penalty, so they are left out of the forward pass then;
   their tokens stay in the denominator.
6. A response whose run failed for the sandbox's own reasons has no reward: it is left out of its
   group's mean and has advantage 0.
7. An update whose groups all lack spread changes nothing, momentum included.
8. Each rank samples, grades and trains on whole groups of its own, from a whole copy of the weights
   in the trainer's precision, refreshed before each rollout phase.

In this order: `advantages` and the objective; `update`, one step of the optimizer; the run, from rollouts to the loop.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads leave the cores to others

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

import data
import sandbox
from data import FORMATS, Example, Tokenizer, flag
from eval import Rollout, choose_records, count_untested, estimate, evaluate, grade, open_sandbox, roll_out
from model import IGNORE, Llama, whole
from sft import Hardware, Learner, Run, World, fitting, open_checkpoint, starting_point, to_device, trained_tokens

# --------------------------------------------------------------------------------------------------
# Advantages and objective

# What is made of rewards less their group's mean, by their unbiased standard deviation and the group's size.
ADVANTAGES = {
    "grpo": lambda centred, std, count: centred / (std + 1e-4),  # arXiv 2402.03300, section 4.1.2
    "dr-grpo": lambda centred, std, count: centred,  # arXiv 2503.20783, equation 1
    "rloo": lambda centred, std, count: centred * count / (count - 1).clamp(min=1),  # arXiv 2402.14740
}
DENOMINATORS = ("tokens", "budget")


def advantages(rewards: Tensor, valid: Tensor, kind: str = "grpo") -> Tensor:
    """The advantage of each response in its group, 0 where not valid and in a group without spread. All (P, G)."""
    count = valid.sum(1, keepdim=True)
    mean = (rewards * valid).sum(1, keepdim=True) / count.clamp(min=1)
    centred = (rewards - mean) * valid
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return ADVANTAGES[kind](centred, std, count)


def clipped_objective(
    logprobs: Tensor, old: Tensor, advantage: Tensor, eps_low: float, eps_high: float, dual_clip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(objective per token, whether a clip took its gradient), for tensors of one shape.

    min(ρA, clip(ρ, 1 - eps_low, 1 + eps_high) A), ρ = π/π_old: PPO, arXiv 1707.06347, equation 7. With `dual_clip` at
    least that times A where A is negative (arXiv 1912.09729, equation 5).
    """
    ratio = (logprobs - old).exp()
    plain = ratio * advantage
    objective = torch.minimum(plain, ratio.clamp(1 - eps_low, 1 + eps_high) * advantage)
    if dual_clip:
        objective = torch.where(advantage < 0, torch.maximum(objective, dual_clip * advantage), objective)
    return objective, objective != plain


def kl_penalty(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimate per token of KL(π, π_ref) from samples of π: k2 or k3 of Schulman, "Approximating KL divergence" (2020).

    Only k2's gradient is right in expectation; k3, which GRPO uses (equation 4 there), is right in value.
    """
    d = logprobs - reference
    return d.square() / 2 if estimator == "k2" else (-d).exp() + d - 1


@dataclass(frozen=True)
class Settings(Hardware):
    micro_tokens: int = flag(4096, "tokens packed into one forward pass, on each rank", least=1)
    data: str = flag("runs/data", "folder of the corpus")
    model: str = flag("runs/parallel", "SFT checkpoint or run folder to start from")
    out: str = flag("", "run folder (default: runs/rl-NAME for the model runs/NAME)")
    format: str = flag("", "prompt format (default: the starting model's)", choices=tuple(FORMATS))
    languages: tuple = flag((), "PLs in which RL runs, problem by problem in turn (default: the source PL)")
    steps: int = flag(40, "rollout phases, each followed by its updates", least=1)
    prompts: int = flag(16, "problems per round of sampling, over all ranks, which must divide them", least=1)
    informative: int = flag(8, "sample until so many groups have spread, and train those that have; 0: off", least=0)
    rounds: int = flag(4, "most rounds of sampling in a step, if --informative is not reached", least=1)
    samples: int = flag(16, "responses per problem: the group size", least=2)
    updates: int = flag(1, "optimizer steps per rollout phase; the groups are dealt out over them", least=1)
    max_new_tokens: int = flag(96, "token budget of a response", least=1)
    temperature: float = flag(1.0, "temperature of the sampler, and of the distribution that is trained", least=0.01)
    lr: float = flag(1.5e-4, "learning rate after warm-up", least=0)
    warmup: int = flag(10, "steps over which the learning rate rises", least=0)
    advantage: str = flag("grpo", "what a response's reward is worth in its group", choices=tuple(ADVANTAGES))
    denominator: str = flag("tokens", "of the objective: response tokens, or responses x budget", choices=DENOMINATORS)
    eps_low: float = flag(0.2, "the ratio is clipped below at 1 - EPS_LOW", least=0, most=1)
    eps_high: float = flag(0.2, "the ratio is clipped above at 1 + EPS_HIGH", least=0)
    dual_clip: float = flag(0.0, "most that the ratio counts where the advantage is negative; 0: no limit", least=0)
    kl: float = flag(0.0, "weight of the KL divergence from the starting model; 0: off", least=0)
    kl_estimator: str = flag("k3", "how a token's KL divergence is estimated", choices=("k2", "k3"))
    rows: int = flag(0, "responses to write at a time; 0: what a GPU's free memory holds, 512 on a CPU", least=0)
    workers: int = flag(0, "programs to run at once, on each rank; 0 shares the cores out", least=0)
    time_limit: float = flag(5.0, "seconds that a program may take for a test", least=0.01)
    forkserver: bool = flag(False, "fork python's runs from one interpreter: faster, and a program can tell")
    eval_every: int = flag(20, "steps between two evaluations", least=1)
    eval_languages: tuple = flag((), "PLs to evaluate on the way (default: the source PL)")
    eval_problems: int = flag(20, "dev problems of each kind in an evaluation", least=1)
    eval_tokens: int = flag(256, "token budget of a response there, since other PLs may need more", least=1)
    save_every: int = flag(10, "steps between two checkpoints", least=1)
    seed: int = flag(0, "seed of the order of problems and of the sampler")


# --------------------------------------------------------------------------------------------------
# One update


def per_token(values: Sequence[Sequence[float]], on: Tensor) -> Tensor:
    """One value for each true entry of `on` (1, T), in order; zeros elsewhere. float32."""
    flat = to_device(np.array([v for row in values for v in row], dtype=np.float32), on.device)
    return torch.zeros(on.shape, device=on.device).masked_scatter(on, flat)


def update(
    learner: Learner, rollouts: Sequence[Rollout], advantage: Sequence[float], lr: float, s: Settings, reference: Llama | None
) -> dict:  # fmt: skip
    """One optimizer step on the objective's mean over the response tokens of all ranks; sums, and the gradient's norm.

    `rollouts` and their advantages are this rank's own. Nothing changes if no advantage of any rank differs from 0.
    """
    [spread] = learner.world.sum(any(advantage))
    used = [(r, a) for r, a in zip(rollouts, advantage, strict=True) if a or (reference and spread)]
    rows = [Example(r.prompt + r.tokens, len(r.prompt)) for r, _ in used]
    drawn = sum(s.max_new_tokens if s.denominator == "budget" else len(r.tokens) for r in rollouts)
    count, trained = learner.world.sum(drawn, trained_tokens(rows))
    # Summed on the device, read at the very end: a GPU is to have its next work before it is done.
    totals = torch.zeros(4, dtype=torch.float64, device=learner.world.device)
    for group, (tokens, targets, start) in learner.micro_batches(rows):
        on = targets != IGNORE  # its true entries are the response tokens, in order
        old = per_token([used[i][0].logprobs for i in group], on)
        weight = per_token([[used[i][1]] * len(used[i][0].tokens) for i in group], on)
        logprobs, entropy = learner.model(tokens, targets, s.temperature, start)
        gain, clipped = clipped_objective(logprobs, old, weight, s.eps_low, s.eps_high, s.dual_clip)
        kl = torch.zeros_like(gain)
        if reference:
            with torch.no_grad():
                start_logprobs, _ = reference(tokens, targets, s.temperature, start)
            kl = kl_penalty(logprobs, start_logprobs, s.kl_estimator)
        learner.backward((s.kl * kl - gain).sum() / count)
        totals += torch.stack([x.detach().sum() for x in (entropy, clipped, (logprobs - old).abs(), kl)])
    norm = {"grad_norm": learner.step(lr)} if spread else {}
    sums = learner.world.sum(*totals.tolist())
    names = ("entropy", "clipped", "drift", "kl")
    return dict(zip(names, sums, strict=True)) | {"trained": trained} | norm


def learn(
    learner: Learner, rollouts: Sequence[Rollout], advantage: Tensor, lr: float, s: Settings, reference: Llama | None = None
) -> dict:  # fmt: skip
    """All updates of one rollout phase, whole groups dealt out over them; their figures.

    The means are over the trained tokens; None if there are none. `grad_norm` is the largest. `drift`, the mean |Δ log
    p| between sampler and trainer, is of the first update alone: before it both have the same weights.
    """
    weights, figures = advantage.flatten().tolist(), []
    for u in range(s.updates):
        mine = [i for g in range(u, len(advantage), s.updates) for i in range(g * s.samples, (g + 1) * s.samples)]
        figures.append(update(learner, [rollouts[i] for i in mine], [weights[i] for i in mine], lr, s, reference))
    trained, first = sum(f["trained"] for f in figures), figures[0]
    names = ("entropy", "clipped", "kl") if reference else ("entropy", "clipped")
    means = {name: sum(f[name] for f in figures) / trained if trained else None for name in names}
    drift = first["drift"] / first["trained"] if first["trained"] else None
    norm = max((f["grad_norm"] for f in figures if "grad_norm" in f), default=None)
    return {**means, "drift": drift, "grad_norm": norm, "trained_tokens": int(trained)}


# --------------------------------------------------------------------------------------------------
# The run


def transcript(rollouts: Sequence[Rollout], advantage: Tensor, tokenizer: Tokenizer, groups: int = 4) -> str:
    """The first groups as text: each problem, and each response with verdict and advantage."""
    size, text = advantage.shape[1], []
    for g, row in enumerate(advantage[:groups].tolist()):
        own = rollouts[g * size : (g + 1) * size]
        text.append(f"=== {own[0].record['id']} in {own[0].language}: {data.statement(own[0].record, own[0].language)}")
        for r, a in zip(own, row, strict=True):
            text.append(f"--- {r.verdict}, advantage {a:+.2f}\n{tokenizer.decode(r.tokens)}")
    return "\n".join(text) + "\n"


class Sampler:
    """The model that writes the rollouts: on every rank a whole copy of the weights that are trained.

    `model` is the learner's own where that is whole; else a copy in the learner's precision, which
    `refresh` brings up to date. All ranks refresh together.
    """

    def __init__(self, learner: Learner):
        self.learner, self.model = learner, learner.model
        if isinstance(learner.model, FSDPModule):
            with torch.device("meta"):
                self.model = Llama(learner.model.config).to(learner.dtype)
            self.model.to_empty(device=learner.world.device)

    @torch.no_grad()
    def refresh(self) -> None:
        if self.model is not self.learner.model:
            for copy, weight in zip(self.model.parameters(), self.learner.model.parameters(), strict=True):
                copy.copy_(whole(weight.to(copy.dtype)))


def held_out_passes(
    model: Llama, tokenizer: Tokenizer, records: Sequence[dict], languages: Sequence[str], box, known: dict, world, s
) -> dict:
    """Greedy pass@1 on held-out problems, as {kind of problem: {PL: value}}."""
    budget = {"max_new_tokens": s.eval_tokens, "rows": s.rows}
    outcomes = evaluate(model, tokenizer, records, languages, box, world, known=known, **budget)
    values: dict = {}
    for kind in dict.fromkeys(o.group for o in outcomes):
        own = [o for o in outcomes if o.group == kind]
        values[kind] = {p: round(e["value"], 4) for p in languages if (e := estimate(own, [p], 1))}
    return values


@dataclass
class Batch:
    """What this rank sampled in a step: rollouts group by group, and their rewards and advantages, each (P, G)."""

    rollouts: list[Rollout]
    rewards: Tensor
    valid: Tensor
    advantage: Tensor

    @classmethod
    def of(cls, rollouts: list[Rollout], s: Settings) -> "Batch":
        """Scores graded rollouts."""
        rewards = torch.tensor([float(r.passed) for r in rollouts]).view(-1, s.samples)
        valid = torch.tensor([r.verdict != "internal_error" for r in rollouts]).view(-1, s.samples)
        return cls(rollouts, rewards, valid, advantages(rewards, valid, s.advantage))

    @property
    def spread(self) -> Tensor:
        """(P,) whether the group's rewards differ."""
        return (self.advantage != 0).any(1)

    def informative(self) -> tuple[list[Rollout], Tensor]:
        """Rollouts and advantages of the groups with spread alone."""
        size, groups = self.advantage.shape[1], self.spread.nonzero().flatten().tolist()
        return [self.rollouts[i] for g in groups for i in range(g * size, (g + 1) * size)], self.advantage[groups]


def rollout_figures(batch: Batch, world: World) -> dict:
    """What the rollout phase itself shows, over all ranks: reward, groups without spread, truncation, lengths."""
    sums = {
        "reward": batch.rewards.sum().item(),
        "no_spread": (~batch.spread).sum().item(),
        "truncated": sum(not r.stopped for r in batch.rollouts),
        "no_program": sum(r.verdict == "no_program" for r in batch.rollouts),
        "response_tokens": sum(len(r.tokens) for r in batch.rollouts),
    }
    counts = [batch.valid.sum().item(), len(batch.rewards), *[len(batch.rollouts)] * 3]
    totals = world.sum(*sums.values(), *counts)
    means = {name: a / max(1, n) for name, a, n in zip(sums, totals, totals[len(sums) :], strict=False)}
    return means | {"groups": int(totals[len(sums) + 1])}


def gather_rollouts(
    records: Sequence[dict], languages: Sequence[str], sampler: Sampler, tokenizer: Tokenizer, box, known: dict,
    run: Run, s: Settings,
) -> Batch:  # fmt: skip
    """Samples and grades rounds of problems, this rank's share of them, until enough groups have spread.
    known: as in `grade`; later steps meet many programs of earlier ones again."""
    world, rollouts, rounds = run.world, [], 0
    sampler.refresh()
    while True:
        order = range(run.drawn, run.drawn + s.prompts)
        tasks = [(records[data.pick(f"{s.seed} rl", i, len(records))], languages[i % len(languages)]) for i in order]
        seed = (s.seed * 1_000_003 + run.drawn) * world.size + world.rank
        with run.phase("sample"):
            budget = (s.max_new_tokens, s.temperature, s.samples)
            new = roll_out(sampler.model, tokenizer, world.deal(tasks), *budget, seed=seed, rows=s.rows)
        with run.phase("sandbox"):
            grade(new, tokenizer, box, known)
        rollouts, rounds, run.drawn = rollouts + new, rounds + 1, run.drawn + s.prompts
        batch = Batch.of(rollouts, s)
        if world.sum(batch.spread.sum().item())[0] >= s.informative or rounds == s.rounds:
            return batch


def step_once(
    records: Sequence[dict], languages: Sequence[str], learner: Learner, sampler: Sampler, tokenizer: Tokenizer, box,
    known: dict, run: Run, s: Settings, reference: Llama | None,
) -> tuple[dict, str]:  # fmt: skip
    """Sample, run, learn: (figures, transcript) of the next step."""
    before = dict(run.seconds)
    batch = gather_rollouts(records, languages, sampler, tokenizer, box, known, run, s)
    figures = rollout_figures(batch, run.world)
    if run.step == 0:
        tqdm.write(f"{run.out} step 1: {provisions(figures)}")
    lr = s.lr * min(1.0, (run.step + 1) / (s.warmup + 1))
    with run.phase("train"):
        kept = batch.informative() if s.informative else (batch.rollouts, batch.advantage)
        figures |= learn(learner, *kept, lr, s, reference) | {"lr": lr}
    drawn = figures["response_tokens"] * figures["groups"] * s.samples
    for phase, tokens in (("sample", drawn), ("sandbox", drawn), ("train", figures["trained_tokens"])):
        seconds = run.seconds[phase] - before.get(phase, 0.0)
        figures |= {f"{phase}_s": seconds, f"{phase}_tokens_per_s": tokens / seconds}
    return figures, transcript(batch.rollouts, batch.advantage, tokenizer)


def provisions(figures: dict) -> str:
    """What RL has to work with, said before the first update."""
    groups, spread = figures["groups"], 1 - figures["no_spread"]
    text = f"of {groups} groups {spread:.0%} have spread; mean reward {figures['reward']:.2f}; "
    text += f"{1 - figures['no_program'] - figures['truncated']:.0%} of the responses hold a program"
    return text if spread else text + ": nothing to learn from; try easier problems, more samples or another model"


SHOWN = ("reward", "groups", "no_spread", "entropy", "clipped", "truncated", "drift")  # on the progress bar


def loop(s: Settings, run: Run, learner: Learner, tokenizer: Tokenizer, reference: Llama | None) -> None:
    """The steps, from where `run` is."""
    records, roles, world = data.read_split(s.data, "rl"), data.read_roles(s.data), run.world
    held, sampler, stopping = choose_records(s.data, "dev", s.eval_problems), Sampler(learner), False
    taught = [sandbox.canonical(p) for p in s.languages] or [roles.source]
    languages = [sandbox.canonical(p) for p in s.eval_languages] or taught
    known, known_held = {}, {}  # verdicts by record's id: the two splits may share ids
    why = f"no tests in each of {', '.join(taught)}"
    untested = {r["id"]: why for r in records if not all(data.gradable(r, p) for p in taught)}
    records = data.leave_out(records, untested, "RL problems", "give other --languages")
    count_untested(held, languages)
    limit = sampler.model.config.max_position_embeddings
    records = fitting(tokenizer, limit, records, lambda _: taught, "RL problems", s.max_new_tokens)
    held = fitting(tokenizer, limit, held, lambda _: languages, "held-out problems", s.eval_tokens)
    bar = tqdm(total=s.steps, initial=run.step, desc=run.out.name, disable=world.rank > 0 or None)

    def evaluation() -> dict:
        with run.phase("evaluate"):
            sampler.refresh()
            return held_out_passes(sampler.model, tokenizer, held, languages, box, known_held, world, s)

    with open_sandbox(s, world) as box:
        if run.step == 0:
            run.log("pass@1", held_out=evaluation())
        while run.step < s.steps and not stopping:
            figures, text = step_once(records, taught, learner, sampler, tokenizer, box, known, run, s, reference)
            run.step, run.tokens = run.step + 1, run.tokens + figures["trained_tokens"]
            bar.update()
            bar.set_postfix({k: f"{figures[k] or 0:.2g}" for k in SHOWN})
            if run.step % s.eval_every == 0 or run.step == s.steps:
                figures["held_out"] = evaluation()
                run.write_text(f"rollouts/step-{run.step}.txt", text)
            run.log("pass@1", **figures)
            if run.step % s.save_every == 0:
                run.save(learner, tokenizer)
            stopping = world.sum(run.stopping)[0] > 0
    bar.close()
    run.save(learner, tokenizer)
    if run.step < s.steps:
        run.stop()
    run.finish(steps=run.step)


def train(s: Settings, world: World) -> None:
    """Trains for `s.steps` steps, resuming a run that stopped."""
    if s.prompts % world.size:
        raise ValueError(f"--prompts {s.prompts}: must be a multiple of the {world.size} ranks")
    if 0 < s.dual_clip < 1:
        raise ValueError(f"--dual-clip {s.dual_clip}: must be at least 1, or 0 for no limit")
    with Run(s.out, s, world) as run:
        if run.finished():
            return
        newest = run.start("rl", "dev")
        start = starting_point(s.model, "run `python sft.py` first, or name a checkpoint with --model")
        reference = open_checkpoint(start, world, s, train=True)[0] if s.kl else None
        model, tokenizer = open_checkpoint(newest or start, world, s, train=True)
        learner = Learner(model, world, s, weight_decay=0.0, pad=tokenizer.pad)
        if newest:
            learner.restore(newest)
        loop(s, run, learner, tokenizer, reference)


def main(s: Settings) -> None:
    """Runs GRPO from `s.model`, or goes on with the run in `s.out`."""
    s = replace(s, out=s.out or f"runs/rl-{Path(s.model).name}")
    with World(s.device) as world:  # what fails on one host alone then breaks the connections that others wait on
        taught = s.languages or (data.read_roles(s.data).source,)
        wanted = {*map(sandbox.canonical, (*taught, *s.eval_languages))}
        if absent := ", ".join(sorted(wanted - set(sandbox.installed()))):
            data.fail(f"no toolchain here for {absent}; `python sandbox.py languages` names the package")
        train(s, world)


if __name__ == "__main__":
    data.command(main, Settings, __doc__)
