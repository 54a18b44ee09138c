"""Sampling, grading and pass@k: how well checkpoints solve held-out problems, per PL.

    python eval.py                                    # every run folder under runs/ that has a checkpoint
    python eval.py --models base=runs/base rl=runs/rl # these, under these names
    python eval.py --samples 8 --k 1 8                # pass@k from 8 samples beside greedy pass@1
    python eval.py --join runs/*/eval/eval.json       # mean and range over runs with different seeds

Prints one Markdown table per kind of problem and measure, with the PLs in three parts: the source PL
of RL, the other SFT PLs, and the unseen PLs; and writes eval.json (every cell, and every problem's
verdicts) beside table.md. rl.py samples and grades with the same `sample` and `grade`.

Our choices:

1. A response passes if it ended with its stop token, holds a program in a closed fenced block of the
   PL asked for, and that program passes all tests. A response cut off by the budget is `truncated`
   and one without such a block `no_program`: both are failures.
2. pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1), averaged over
   problems.
3. Intervals are Wilson's 95% score intervals with the number of problems as sample size. For means
   over several samples or PLs of one problem that is conservative: those share the problem.
4. Samples are drawn from the whole softmax unless --top-k or --top-p cut it; rl.py has neither.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, mean

import torch
from tqdm import tqdm

import data
import sandbox
from data import FORMATS, Roles, Tokenizer, flag
from model import Llama, generate
from sft import World, newest_checkpoint, open_checkpoint, starting_point

# --------------------------------------------------------------------------------------------------
# Rollouts: what the model wrote, and what came of it


@dataclass
class Rollout:
    """One response to one problem in one PL.

    Token ids are the currency: `prompt` and `tokens` (the stop token included if it was reached) are
    what the sampler saw and drew, `logprobs` the sampler's log-prob of each drawn token.
    """

    record: dict
    language: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    stopped: bool
    program: str | None = None
    verdict: str = "ungraded"

    @property
    def passed(self) -> bool:
        return self.verdict == "ok"


def sample(
    model: Llama, tokenizer: Tokenizer, tasks: Sequence[tuple[dict, str]], max_new_tokens: int,
    temperature: float, samples: int = 1, seed: int = 0, rows: int = 512, progress: Callable[[int], object] | None = None,
    **truncation,
) -> list[Rollout]:  # fmt: skip
    """`samples` ungraded rollouts for each task (record, PL), those of one task side by side.

    `rows` responses are written at a time, which bounds the memory of the key/value cache. No tasks, as
    on a rank for which none are left, give no rollouts. truncation: top_k and top_p of `generate`.
    """
    if not tasks:
        return []
    prompts = [tokenizer.prompt(record["prompt"], [language]) for record, language in tasks]
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    completions = generate(
        model, prompts, max_new_tokens, tokenizer.stops, temperature, samples, generator, progress, rows, **truncation
    )
    rollouts = []
    for i, c in enumerate(completions):
        (record, language), prompt = tasks[i // samples], prompts[i // samples]
        rollouts.append(Rollout(record, language, prompt, c.tokens, c.logprobs, c.stopped))
    return rollouts


def grade(
    rollouts: Sequence[Rollout], tokenizer: Tokenizer, box: sandbox.Sandbox, known: dict | None = None, progress: str | None = None
) -> None:  # fmt: skip
    """Sets `program` and `verdict` of each rollout by running its program against the tests.

    Equal programs for one problem run once; `known` carries their verdicts over to later calls.
    """
    known = {} if known is None else known
    for r in rollouts:
        r.program = data.extract(tokenizer.decode(r.tokens), r.language) if r.stopped else None
        r.verdict = "truncated" if not r.stopped else "no_program"
    graded = [(r, (r.record["id"], r.language, r.program)) for r in rollouts if r.program is not None]
    todo = {key: r for r, key in graded if key not in known}
    jobs = [(r.program, r.language, r.record["tests"]) for r in todo.values()]
    results = box.map(jobs, stop_at_failure=True, progress=progress)
    verdicts = known | {key: result.verdict for key, result in zip(todo, results, strict=True)}
    for r, key in graded:
        r.verdict = verdicts[key]
    known.update({key: v for key, v in verdicts.items() if v != "internal_error"})


# --------------------------------------------------------------------------------------------------
# Estimates


def pass_at_k(samples: int, passes: int, k: int) -> float:
    """Probability that one of k draws without replacement from the samples passes (eq. 1 there)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples; there are {samples}")
    miss = 1.0
    for i in range(k):
        miss *= max(0, samples - passes - i) / (samples - i)
    return 1.0 - miss


def wilson(value: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion `value` seen in `count` trials."""
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    centre = (value + z2 / (2 * count)) / (1 + z2 / count)
    half = (z2 * value * (1 - value) / count + z2 * z2 / (4 * count * count)) ** 0.5 / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Outcome:
    """The verdicts of one model on one problem in one PL, under one measure."""

    id: str
    group: str
    language: str
    verdicts: tuple[str, ...]

    def score(self, k: int) -> float:
        return pass_at_k(len(self.verdicts), self.verdicts.count("ok"), k)


def group_of(record: dict, by: str) -> str:
    """The kind of problem a record belongs to, from its `difficulty`."""
    difficulty = record.get("difficulty", {})
    if by == "wording":
        if "new" not in difficulty:
            return "all problems"
        return "reserved wordings" if difficulty["new"] else "known wordings"
    if by not in difficulty:
        raise ValueError(
            f"record {record['id']!r}: no difficulty {by!r}; --by takes wording or {', '.join(difficulty)}"
        )
    return f"{by} {difficulty[by]}"


def evaluate(
    model: Llama, tokenizer: Tokenizer, records: Sequence[dict], languages: Sequence[str], box: sandbox.Sandbox, world: World, *,
    max_new_tokens: int, temperature: float = 0.0, samples: int = 1, by: str = "wording", seed: int = 0, rows: int = 512,
    known: dict | None = None, name: str | None = None, **truncation,
) -> list[Outcome]:  # fmt: skip
    """The outcome of every record in every PL, shared out over the ranks; `name` heads a progress bar.

    truncation: top_k and top_p of `generate`.
    """
    tasks = [(record, language) for language in languages for record in records]
    mine = world.deal(tasks)
    quiet = None if name and world.rank == 0 else True
    with tqdm(total=len(mine) * samples, desc=f"{name} sampling", disable=quiet) as bar:
        seed = seed * world.size + world.rank
        rollouts = sample(
            model, tokenizer, mine, max_new_tokens, temperature, samples, seed, rows, bar.update, **truncation
        )
    grade(rollouts, tokenizer, box, known, None if quiet else f"{name} running")
    verdicts = [tuple(r.verdict for r in rollouts[i : i + samples]) for i in range(0, len(rollouts), samples)]
    places = world.deal(range(len(tasks)))
    outcomes = []
    for i, own in sorted(world.gather(list(zip(places, verdicts, strict=True)))):
        record, language = tasks[i]
        if "internal_error" in own:
            tqdm.write(f"{record['id']} in {language}: the sandbox itself failed; the problem is left out")
        else:
            outcomes.append(Outcome(record["id"], group_of(record, by), language, own))
    return outcomes


def estimate(outcomes: Sequence[Outcome], languages: Sequence[str], k: int) -> dict | None:
    """Mean pass@k over problems, each problem's own mean over `languages`, with its interval."""
    by_problem = defaultdict(list)
    for o in outcomes:
        if o.language in languages:
            by_problem[o.id].append(o.score(k))
    if not by_problem:
        return None
    value = mean(map(mean, by_problem.values()))
    low, high = wilson(value, len(by_problem))
    return {"value": value, "low": low, "high": high, "problems": len(by_problem)}


# --------------------------------------------------------------------------------------------------
# Tables


def columns(roles: Roles, languages: Sequence[str]) -> dict[str, list[str]]:
    """Column title -> the PLs it averages: source, SFT PLs and their mean, unseen PLs and theirs."""
    others = [p for p in roles.sft[1:] if p in languages]
    unseen = [p for p in roles.unseen if p in languages]
    titles = {f"{roles.source} (source)": [roles.source] if roles.source in languages else []}
    titles |= {p: [p] for p in others} | {"other SFT mean": others}
    titles |= {f"{p} (unseen)": [p] for p in unseen} | {"unseen mean": unseen}
    return {title: group for title, group in titles.items() if group}


def make_cells(measures: dict[str, tuple[int, dict]], titles: dict[str, list[str]]) -> list[dict]:
    """Every cell of every table, as JSON rows; measures: title -> (k, outcomes by model)."""
    rows = []
    for title, (k, results) in measures.items():
        for name, outcomes in results.items():
            for group in dict.fromkeys(o.group for o in outcomes):
                own, place = (
                    [o for o in outcomes if o.group == group],
                    {"model": name, "measure": title, "group": group},
                )
                estimates = {column: estimate(own, languages, k) for column, languages in titles.items()}
                rows += [{**place, "column": column, **e} for column, e in estimates.items() if e]
    return rows


PLACE = ("measure", "group", "model", "column")  # what tells a cell from the others


def join(runs: Sequence[list[dict]]) -> list[dict]:
    """The cells of runs with several seeds as one: the mean value, and from the least to the greatest."""
    places = defaultdict(list)
    for cells in runs:
        for c in cells:
            places[tuple(c[name] for name in PLACE)].append(c)
    joined = []
    for place, same in places.items():
        values, problems = [c["value"] for c in same], sum(c["problems"] for c in same)
        spread = {"value": mean(values), "low": min(values), "high": max(values), "problems": problems}
        joined.append({**dict(zip(PLACE, place, strict=True)), **spread, "seeds": len(same)})
    return joined


def percent(cell: dict | None) -> str:
    return "–" if cell is None else "{:.0f} ({:.0f}–{:.0f})".format(*(100 * cell[n] for n in ("value", "low", "high")))


def tables(cells: Sequence[dict]) -> str:
    """Markdown, a table for each measure and kind of problem: a row a model, percent with the range."""
    text = []
    for measure, group in dict.fromkeys((c["measure"], c["group"]) for c in cells):
        own = {(c["model"], c["column"]): c for c in cells if (c["measure"], c["group"]) == (measure, group)}
        models, titles = (list(dict.fromkeys(place[i] for place in own)) for i in (0, 1))
        some = next(iter(own.values()))
        about = "95% interval" if "seeds" not in some else f"mean and range of {some['seeds']} seeds"
        lines = [f"**{measure}, {group}** (percent of {some['problems']} held-out problems, {about})\n"]
        lines += ["| model | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
        for m in models:
            lines.append(f"| {m} | " + " | ".join(percent(own.get((m, title))) for title in titles) + " |")
        text.append("\n".join(lines))
    return "\n\n".join(text)


# --------------------------------------------------------------------------------------------------
# Command line


@dataclass(frozen=True)
class Settings:
    models: tuple = flag(
        (), "checkpoints or run folders, NAME=FOLDER or FOLDER (default: every run under runs/ with a checkpoint)"
    )
    data: str = flag("runs/data", "folder of the corpus")
    out: str = flag("runs/eval", "folder for table.md and eval.json")
    join: tuple = flag((), "eval.json files of runs with other seeds: print their mean and range, and evaluate nothing")
    languages: tuple = flag((), "PLs to evaluate (default: all of DATA/languages.json)")
    problems: int = flag(0, "only the first PROBLEMS problems of each kind; 0 takes all")
    by: str = flag("wording", "kinds of problems to tell apart: wording, or a field of `difficulty` such as operations")
    samples: int = flag(0, "samples per problem for pass@k; 0 measures greedy pass@1 alone")
    k: tuple = flag((1,), "the k of pass@k", type=int)
    temperature: float = flag(1.0, "temperature of the samples")
    top_k: int = flag(0, "draw the samples from the TOP_K likeliest tokens; 0 means all", least=0)
    top_p: float = flag(1.0, "draw the samples from the likeliest tokens of TOP_P probability together; 1 means all")
    max_new_tokens: int = flag(320, "token budget of a response", least=1)
    rows: int = flag(512, "responses to write at a time: less needs less memory", least=1)
    workers: int = flag(0, "programs to run at once; 0 means one a core")
    time_limit: float = flag(5.0, "seconds that a program may take for a test")
    seed: int = flag(0, "seed of the samples")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    precision: str = flag(
        "", "default: bfloat16 on a GPU, the checkpoint's own on a CPU", choices=("float32", "bfloat16")
    )
    format: str = flag("", "prompt format (default: the checkpoint's)", choices=tuple(FORMATS))


def check_lengths(
    model: Llama, tokenizer: Tokenizer, records: Sequence[dict], languages: Sequence[str], budget: int
) -> None:
    """ValueError naming the first record whose prompt and answer the model's positions do not hold."""
    limit = model.config.max_position_embeddings
    for record in records:
        if (length := max(len(tokenizer.prompt(record["prompt"], [p])) for p in languages)) + budget > limit:
            raise ValueError(
                f"record {record['id']!r}: a prompt of {length} tokens and {budget} new ones, the model takes {limit}; leave it out or lower --max-new-tokens"
            )


def find_models(s: Settings) -> dict[str, Path]:
    """Name -> checkpoint folder."""
    pairs = [m.rpartition("=")[::2] for m in s.models]
    if not pairs:
        pairs = [("", str(p)) for p in sorted(Path("runs").glob("*")) if newest_checkpoint(p)]
    names = [name or Path(folder).name for name, folder in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"--models: two of one name among {', '.join(names)}; write NAME=FOLDER")
    advice = "train one with sft.py or rl.py"
    found = {name: starting_point(folder, advice) for name, (_, folder) in zip(names, pairs, strict=True)}
    return found or data.fail("no checkpoint under runs/; train one with `python sft.py`, or name one with --models")


def present_languages(s: Settings, roles: Roles) -> list[str]:
    """The PLs to evaluate; those without a toolchain are named and left out."""
    wanted = [sandbox.canonical(p) for p in s.languages] or list(roles.everything)
    if strange := [p for p in wanted if p not in roles.everything]:
        raise ValueError(
            f"--languages: {', '.join(strange)}: not in {s.data}/languages.json; there are {', '.join(roles.everything)}"
        )
    absent = [p for p in wanted if p not in sandbox.installed()]
    if absent:
        print(f"left out, no toolchain here: {', '.join(absent)}; `python sandbox.py languages` names the packages")
    return [p for p in wanted if p not in absent] or data.fail("none of the PLs has a toolchain here")


def choose_records(s: Settings) -> list[dict]:
    """The held-out problems, the first `s.problems` of each kind."""
    kinds = defaultdict(list)
    for record in data.read_split(s.data, "eval"):
        kinds[group_of(record, s.by)].append(record)
    return [r for _, records in sorted(kinds.items()) for r in records[: s.problems or None]]


def open_sandbox(s, world: World) -> sandbox.Sandbox:
    """The sandbox of this rank: `s.workers` programs at a time, or its share of the cores."""
    workers = s.workers or max(1, len(os.sched_getaffinity(0)) // world.local_size)
    return sandbox.Sandbox(workers, sandbox.Limits(wall=s.time_limit, cpu=s.time_limit))


def measure(s: Settings, world: World, models: dict[str, Path], records: list[dict], languages: list[str]) -> dict:
    """Title of each measure -> (k, outcomes by model)."""
    measures = {"greedy pass@1": (1, {})}
    measures |= {f"pass@{k} of {s.samples} samples": (k, {}) for k in s.k if s.samples}
    shared = {"max_new_tokens": s.max_new_tokens, "by": s.by, "seed": s.seed, "rows": s.rows, "known": {}}
    with open_sandbox(s, world) as box:
        for name, checkpoint in models.items():
            model, tokenizer = open_checkpoint(checkpoint, world, world.dtype(s.precision), s.format)
            check_lengths(model, tokenizer, records, languages, s.max_new_tokens)
            job = (model, tokenizer, records, languages, box, world)
            measures["greedy pass@1"][1][name] = evaluate(*job, name=name, **shared)
            if s.samples:
                limits = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
                drawn = evaluate(*job, name=name, samples=s.samples, **limits, **shared)
                for title in list(measures)[1:]:
                    measures[title][1][name] = drawn
    return measures


def main(s: Settings) -> None:
    """Evaluates every model, prints the tables and writes them with all outcomes."""
    if s.join:
        return print(tables(join([json.loads(Path(path).read_text())["cells"] for path in s.join])))
    began = time.perf_counter()
    with World(s.device) as world:  # what fails on one host alone then breaks the connections that others wait on
        if s.samples and max(s.k) > s.samples:
            raise ValueError(f"--k {max(s.k)}: needs at least as many --samples, not {s.samples}")
        roles, models, records = data.read_roles(s.data), find_models(s), choose_records(s)
        languages = present_languages(s, roles)
        measures = measure(s, world, models, records, languages)
        if world.rank:
            return
    cells = make_cells(measures, columns(roles, languages))
    text = tables(cells)
    outcomes = {
        title: {name: [asdict(o) for o in own] for name, own in results.items()}
        for title, (_, results) in measures.items()
    }
    seconds = round(time.perf_counter() - began, 1)
    whole = json.dumps({"settings": asdict(s), "seconds": seconds, "cells": cells, "outcomes": outcomes})
    for name, content in {"table.md": text, "eval.json": whole}.items():
        data.write_atomically(Path(s.out) / name, lambda p, content=content: p.write_text(content + "\n"))
    print(f"{text}\n\nwrote {s.out}/table.md and {s.out}/eval.json")


if __name__ == "__main__":
    data.command(main, Settings, __doc__)
