"""The RL stage: GRPO in one source PL, the reward being that the program passes its tests.

    python rl.py                                     # from runs/parallel, into runs/rl-parallel
    python rl.py --model runs/source                 # the other arm, into runs/rl-source

Each update samples a group of responses to each of some problems, runs the programs in the sandbox
(reward 1 if the response ended and its program passes all tests, else 0), turns rewards into
advantages within the group, and maximises the clipped objective. The run folder is as sft.py's, with
rollouts/step-N.txt beside: some problems with all their responses, to read what is being rewarded.

Advantage and objective are those of GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1). Our
choices, where that or the Parallel-SFT paper leaves freedom or is silent:

1. One denominator per update, the number of response tokens in it, as in DAPO (arXiv 2503.14476,
   equation 8): not a mean per response, which would weigh a token by its response's length.
2. No KL penalty and no reference model.
3. Sampler and trainer score one distribution, softmax(logits / temperature) over the whole
   vocabulary; |Δ log p| between them is logged. The ratio's denominator is what the sampler drew with.
4. Responses with advantage 0 have gradient 0, so they are left out of the forward pass; their
   tokens stay in the denominator.
5. A response whose run failed for the sandbox's own reasons has no reward: it is left out of its
   group's mean and has advantage 0.
6. A step whose groups all lack spread changes nothing, momentum included.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import sandbox
from data import Tokenizer, flag
from eval import Rollout, check_lengths, choose_records, estimate, evaluate, grade, sample
from eval import Settings as EvalSettings
from model import IGNORE, Llama, load
from sft import Row, Run, apply_gradients, collate, make_optimizer, micro_batches, starting_point


@dataclass(frozen=True)
class Settings:
    data: str = flag("runs/data", "folder of the corpus")
    model: str = flag("runs/parallel", "SFT checkpoint or run folder to start from")
    out: str = flag("", "run folder (default: runs/rl-NAME for the model runs/NAME)")
    steps: int = flag(50, "rollout phases, each followed by its updates", least=1)
    prompts: int = flag(24, "problems per step", least=1)
    samples: int = flag(16, "responses per problem: the group size", least=2)
    updates: int = flag(1, "optimizer steps per rollout phase; the groups are dealt out over them", least=1)
    max_new_tokens: int = flag(96, "token budget of a response", least=1)
    temperature: float = flag(1.0, "temperature of the sampler, and of the distribution that is trained", least=0.01)
    lr: float = flag(5e-4, "learning rate, constant")
    eps_low: float = flag(0.2, "the ratio is clipped below at 1 - EPS_LOW")
    eps_high: float = flag(0.2, "the ratio is clipped above at 1 + EPS_HIGH")
    clip: float = flag(1.0, "largest global gradient norm")
    micro_tokens: int = flag(4096, "most tokens in one forward pass, padding included", least=1)
    rows: int = flag(512, "responses to write at a time: less needs less memory", least=1)
    workers: int = flag(0, "programs to run at once; 0 means one a core")
    time_limit: float = flag(5.0, "seconds that a program may take for a test")
    eval_every: int = flag(10, "steps between two evaluations", least=1)
    eval_languages: tuple = flag((), "PLs to evaluate on the way (default: the source PL)")
    eval_problems: int = flag(32, "held-out problems of each kind for that", least=1)
    eval_tokens: int = flag(256, "token budget of a response there, where other PLs may need more", least=1)
    save_every: int = flag(10, "steps between two checkpoints", least=1)
    seed: int = flag(0, "seed of the order of problems and of the sampler")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")


# --------------------------------------------------------------------------------------------------
# Advantages and objective


def advantages(rewards: Tensor, valid: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-4) within each group, 0 where not valid. All (P, G); std is unbiased.

    GRPO, arXiv 2402.03300, section 4.1.2; the 1e-4 only keeps a group without spread finite.
    """
    count = valid.sum(1, keepdim=True)
    mean = (rewards * valid).sum(1, keepdim=True) / count.clamp(min=1)
    centred = (rewards - mean) * valid
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + 1e-4)


def clipped_objective(
    logprobs: Tensor, old: Tensor, advantage: Tensor, eps_low: float, eps_high: float
) -> tuple[Tensor, Tensor]:
    """(objective per token, whether the clip took its gradient), for tensors of one shape.

    min(ρA, clip(ρ, 1 - eps_low, 1 + eps_high) A), ρ = π/π_old: PPO, arXiv 1707.06347, equation 7.
    """
    ratio = (logprobs - old).exp()
    plain = ratio * advantage
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high) * advantage
    return torch.minimum(plain, clipped), clipped < plain


# --------------------------------------------------------------------------------------------------
# One update


def score(rollouts: Sequence[Rollout], group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards, valid, advantages) of rollouts that lie group by group, each (P, G)."""
    rewards = torch.tensor([float(r.passed) for r in rollouts]).view(-1, group)
    valid = torch.tensor([r.verdict != "internal_error" for r in rollouts]).view(-1, group)
    return rewards, valid, advantages(rewards, valid)


def update(
    model: Llama, optimizer, rollouts: Sequence[Rollout], advantage: Sequence[float], s: Settings, pad: int
) -> dict:
    """One optimizer step on the objective's mean over all response tokens; its figures, as sums."""
    count = sum(len(r.tokens) for r in rollouts)
    used = [(r, a) for r, a in zip(rollouts, advantage, strict=True) if a]
    rows: list[Row] = [(r.prompt + r.tokens, len(r.prompt)) for r, _ in used]
    sums = dict.fromkeys(("trained", "entropy", "clipped", "drift"), 0.0)
    for part in micro_batches([len(tokens) for tokens, _ in rows], s.micro_tokens):
        tokens, targets = collate([rows[i] for i in part], pad, s.device)
        on = targets != IGNORE  # (B, T); row by row, its true entries are the response tokens in order
        old, weight = (torch.zeros(on.shape, device=on.device), torch.zeros(on.shape, device=on.device))
        old[on] = torch.tensor([lp for i in part for lp in used[i][0].logprobs], device=on.device)
        weight[on] = torch.tensor([used[i][1] for i in part for _ in used[i][0].tokens], device=on.device)
        logprobs, entropy = model(tokens, targets, s.temperature)
        gain, clipped = clipped_objective(logprobs, old, weight, s.eps_low, s.eps_high)
        (-gain.sum() / count).backward()
        sums["trained"] += int(on.sum())
        sums["entropy"] += entropy.sum().item()
        sums["clipped"] += clipped.sum().item()
        sums["drift"] += (logprobs.detach() - old).abs().sum().item()
    if rows:
        sums["grad_norm"] = apply_gradients(model, optimizer, s.lr, s.clip)
    return sums


def learn(model: Llama, optimizer, rollouts: Sequence[Rollout], advantage: Tensor, s: Settings, pad: int) -> dict:
    """All updates of one rollout phase, whole groups dealt out over them; their mean figures.

    The means are over the tokens of groups with spread, the only ones that are trained; None if there
    are none. `drift`, the mean |Δ log p| between sampler and trainer, is of the first update alone:
    before it both have the same weights.
    """
    weights, figures = advantage.flatten().tolist(), []
    for u in range(s.updates):
        mine = [i for g in range(u, len(advantage), s.updates) for i in range(g * s.samples, (g + 1) * s.samples)]
        figures.append(update(model, optimizer, [rollouts[i] for i in mine], [weights[i] for i in mine], s, pad))
    trained, first = sum(f["trained"] for f in figures), figures[0]
    means = {name: sum(f[name] for f in figures) / trained if trained else None for name in ("entropy", "clipped")}
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
        text.append(f"=== {own[0].record['id']} in {own[0].language}: {own[0].record['prompt']}")
        text += [
            f"--- {r.verdict}, advantage {a:+.2f}\n{tokenizer.decode(r.tokens)}" for r, a in zip(own, row, strict=True)
        ]
    return "\n".join(text) + "\n"


def measure(
    model: Llama, tokenizer: Tokenizer, records: Sequence[dict], languages: Sequence[str], box, known: dict, s: Settings
) -> dict:
    """Greedy pass@1 on held-out problems, as {kind of problem: {PL: value}}."""
    outcomes = evaluate(
        model, tokenizer, records, languages, box, max_new_tokens=s.eval_tokens, rows=s.rows, known=known
    )
    values: dict = {}
    for kind in dict.fromkeys(o.group for o in outcomes):
        own = [o for o in outcomes if o.group == kind]
        values[kind] = {p: round(e["value"], 4) for p in languages if (e := estimate(own, [p], 1))}
    return values


def rollout_figures(rollouts: Sequence[Rollout], rewards: Tensor, valid: Tensor, advantage: Tensor) -> dict:
    """What the rollout phase itself shows: reward, groups without spread, truncation, lengths."""
    return {
        "reward": (rewards.sum() / valid.sum().clamp(min=1)).item(),
        "no_spread": (advantage == 0).all(1).float().mean().item(),
        "truncated": sum(not r.stopped for r in rollouts) / len(rollouts),
        "no_program": sum(r.verdict == "no_program" for r in rollouts) / len(rollouts),
        "response_tokens": sum(len(r.tokens) for r in rollouts) / len(rollouts),
    }


def step_once(
    step: int, model: Llama, optimizer, tokenizer: Tokenizer, records: Sequence[dict], language: str, box, s: Settings
) -> tuple[dict, str]:
    """Sample, run, learn. (figures, transcript) of step number `step`."""
    order = range(step * s.prompts, (step + 1) * s.prompts)
    tasks = [(records[data.pick(f"{s.seed} rl", i, len(records))], language) for i in order]
    began = time.perf_counter()
    rollouts = sample(
        model, tokenizer, tasks, s.max_new_tokens, s.temperature, s.samples, seed=s.seed * 1_000_003 + step, rows=s.rows
    )
    sampled = time.perf_counter()
    grade(rollouts, tokenizer, box)
    graded = time.perf_counter()
    rewards, valid, advantage = score(rollouts, s.samples)
    learned = learn(model, optimizer, rollouts, advantage, s, tokenizer.pad)
    ended = time.perf_counter()
    drawn = sum(len(r.tokens) for r in rollouts)
    counts = {"sample": drawn, "sandbox": drawn, "train": learned["trained_tokens"]}
    seconds = {"sample_s": sampled - began, "sandbox_s": graded - sampled, "train_s": ended - graded}
    rates = {f"{k}_tokens_per_s": n / seconds[f"{k}_s"] for k, n in counts.items()}
    return rollout_figures(rollouts, rewards, valid, advantage) | learned | seconds | rates, transcript(
        rollouts, advantage, tokenizer
    )


def loop(s: Settings, run: Run, model: Llama, optimizer, tokenizer: Tokenizer, step: int, totals: dict) -> None:
    """The steps from number `step` on; `totals` are the seconds of each phase so far."""
    records, roles = data.read_split(s.data, "rl"), data.read_roles(s.data)
    held = choose_records(EvalSettings(data=s.data, problems=s.eval_problems))
    languages, known = [sandbox.canonical(p) for p in s.eval_languages] or [roles.source], {}
    check_lengths(model, tokenizer, records, [roles.source], s.max_new_tokens)
    bar = tqdm(total=s.steps, initial=step, desc=run.out.name, disable=None)
    with sandbox.Sandbox(s.workers or None, sandbox.Limits(wall=s.time_limit, cpu=s.time_limit)) as box:
        if step == 0 and not run.metrics.stat().st_size:
            run.log(step=0, held_out=measure(model, tokenizer, held, languages, box, known, s))
        while step < s.steps and not run.stopping:
            figures, text = step_once(step, model, optimizer, tokenizer, records, roles.source, box, s)
            step += 1
            totals = {k: totals.get(k, 0.0) + figures[k] for k in ("sample_s", "sandbox_s", "train_s")}
            bar.update()
            bar.set_postfix(
                {
                    k: f"{figures[k] or 0:.2g}"
                    for k in ("reward", "no_spread", "entropy", "clipped", "truncated", "drift")
                }
            )
            if step % s.eval_every == 0 or step == s.steps:
                figures["held_out"] = measure(model, tokenizer, held, languages, box, known, s)
                data.write_atomically(
                    run.out / "rollouts" / f"step-{step}.txt", lambda p, text=text: p.write_text(text)
                )
            run.log(step=step, **figures)
            if step % s.save_every == 0:
                run.save(step, model, tokenizer, optimizer, totals=totals)
    bar.close()
    run.save(step, model, tokenizer, optimizer, totals=totals)
    if step < s.steps:
        run.stop(step)
    run.finish(steps=step, **{k: round(v, 1) for k, v in totals.items()})


def main(s: Settings) -> None:
    """Runs GRPO from `s.model`, or goes on with the run in `s.out`."""
    s = replace(s, out=s.out or f"runs/rl-{Path(s.model).name}")
    wanted = {data.read_roles(s.data).source, *map(sandbox.canonical, s.eval_languages)}
    if absent := wanted - set(sandbox.installed()):
        data.fail(f"no toolchain here for {', '.join(sorted(absent))}; `python sandbox.py languages` names the package")
    with Run(s.out, s) as run:
        if run.finished():
            return
        checkpoint, state = run.start()
        source = checkpoint or starting_point(s.model, "run `python sft.py` first, or name a checkpoint with --model")
        model, tokenizer = load(source, s.device, torch.float32), Tokenizer(source)
        optimizer = make_optimizer(model, s.lr, weight_decay=0.0)
        if state:
            optimizer.load_state_dict(state["optimizer"])
        loop(s, run, model, optimizer, tokenizer, state.get("step", 0), state.get("totals", {}))


if __name__ == "__main__":
    data.command(main, Settings, __doc__)
