"""How well checkpoints solve held-out problems, per PL, what RL in one PL gave the others, and how
similar the representations of equal programs are.

    python eval.py                                    # every run folder under runs/ that has a checkpoint
    python eval.py --models base=runs/base A=runs/source # these, under these names
    python eval.py --split dev                        # on dev, where settings are chosen; test is for what is reported
    python eval.py --samples 8 --k 1 8                # pass@k from 8 samples beside greedy pass@1
    python eval.py --representations                  # cross-PL retrieval in the residual stream, beside pass@1
    python eval.py --representations --no-sampling    # that alone: no toolchain and no sandbox
    python eval.py --join results/study/seed-*.json   # runs with different seeds: the claims, means and intervals
    python eval.py --curves runs/rl-*                 # RL runs side by side, by step (needs matplotlib)
    python eval.py --plots ...                        # with any of these: figures (needs matplotlib)
    python eval.py --translate --models M --data DIR --to ruby php --samples 4 --keep DIR
                                                      # programs from programs, those that pass written as records;
                                                      # --solve: from the statements alone

Prints one Markdown table per kind of problem and measure, with the PLs in three parts: the source PL
of RL, the other SFT PLs, and the unseen PLs; and writes eval.json (the tables' cells), outcomes.json (every problem's
verdicts, every pair of PLs) and table.md. rl.py samples and grades with the same `roll_out` and `grade`.

Our choices:

1. A response passes if it ended with its stop token, holds a program in a closed fenced block of the
   PL asked for, and that program passes all tests. A response cut off by the budget is `truncated`
   and one without such a block `no_program`: both are failures.
2. pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1), averaged over
   problems; but where records name the reserved `phrase` in them, over phrases: problems of one phrase stand or
   fall together, so that the phrase is the sample.
3. Intervals of one evaluation are Wilson's 95% score intervals with the number of problems, or phrases, as sample
   size; over several seeds Student's t with the number of seeds. For means over several samples or PLs of one problem
   the former is conservative: those share the problem.
4. Samples are drawn from the whole softmax unless --top-k or --top-p cut it; rl.py has neither.
5. Forced choice: records with `distractors` count as right where their program is the most probable of all.
6. The representation of a program is the residual stream after each block (layer 0: after the embedding),
   averaged over the program's own tokens. It stands in a fenced block, as in base and SFT, but without a
   statement, which would be the same text in every PL. That of a prompt is the stream at its last token, each PL
   asked in its own community's words: the texts differ and the function is the same.
7. From each PL's representations their mean is subtracted: what is left is how a program differs from the
   others in its PL. Otherwise a constant offset between two PLs would decide which neighbour is nearest.
8. Programs, or prompts, are equivalent if they are the same problem's. Problems that share a program's text in some
   PL, or their `function`, count once, so that every query has one right answer among n: chance is 1 / n.
   Neighbours whose cosines differ by less than TIE share the credit: at layer 0, where the order of tokens
   does not count, texts of the same tokens in another order are alike. "bag of tokens" is what counts of tokens give.
9. The tables show the block in the middle for programs, the last one for prompts, whatever the results; outcomes.json
   has all layers. Intervals of differences of cosines are normal ones over the problems.

In this order: rollouts and their grades; estimates; forced choice; representations; tables; claims over seeds; figures;
the command line, programs from a model (--translate), the command itself.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads leave the cores to others

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import sandbox
from data import FORMATS, Roles, Tokenizer, flag
from model import PREFILL_TOKENS, ROWS, Config, Llama, generate, wide
from sft import PRECISIONS, World, collate, fitting, newest_checkpoint, open_checkpoint, pack, starting_point

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


def roll_out(
    model: Llama, tokenizer: Tokenizer, tasks: Sequence[tuple[dict, str]], max_new_tokens: int,
    temperature: float, samples: int = 1, seed: int = 0, rows: int = 0, progress: Callable[[int], object] | None = None,
    **truncation,
) -> list[Rollout]:  # fmt: skip
    """`samples` ungraded rollouts for each task (record, PL), those of one task side by side.

    `rows` responses are written at a time, as `generate` says. No tasks, as
    on a rank for which none are left, give no rollouts. truncation: top_k and top_p of `generate`.
    """
    if not tasks:
        return []
    prompts = [tokenizer.prompt(data.statement(record, language), language) for record, language in tasks]
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
    jobs = [data.job(r.record, r.language, r.program) for r in todo.values()]
    results = box.map(jobs, stop_at_failure=True, progress=progress)
    verdicts = {key: result.verdict for key, result in zip(todo, results, strict=True)}
    known.update({key: v for key, v in verdicts.items() if v != "internal_error"})
    for r, key in graded:
        r.verdict = verdicts.get(key) or known[key]


# --------------------------------------------------------------------------------------------------
# Estimates


def pass_at_k(samples: int, passes: int, k: int) -> float:
    """Probability that one of k draws without replacement from the samples passes (Chen et al., equation 1)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples; there are {samples}")
    return 1.0 - math.comb(samples - passes, k) / math.comb(samples, k)


def wilson(value: float, count: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion `value` seen in `count` trials."""
    z2 = NormalDist().inv_cdf(0.975) ** 2
    centre = (value + z2 / (2 * count)) / (1 + z2 / count)
    half = (z2 * value * (1 - value) / count + z2 * z2 / (4 * count * count)) ** 0.5 / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Outcome:
    """The verdicts of one model on one problem in one PL, under one measure.

    `unit` is what counts as one sample: problems of one reserved phrase stand or fall together, others alone.
    """

    id: str
    unit: str
    group: str
    language: str
    verdicts: tuple[str, ...]

    def score(self, k: int) -> float:
        return pass_at_k(len(self.verdicts), self.verdicts.count("ok"), k)


def group_of(record: dict, by: str) -> str:
    """The kind of problem a record is, by its field `by`; a list counts by its length."""
    if by not in record and by != "kind":
        raise ValueError(f"record {record['id']!r}: no field {by!r}; --by takes one that each held-out record has")
    value = record.get(by, "all problems")
    return value if isinstance(value, str) else f"{by} {len(value) if isinstance(value, list) else value}"


def outcome(record: dict, language: str, verdicts: Sequence[str], by: str) -> Outcome:
    unit = record.get("phrase", record["id"])
    return Outcome(record["id"], unit, group_of(record, by), language, tuple(verdicts))


def evaluate(
    model: Llama, tokenizer: Tokenizer, records: Sequence[dict], languages: Sequence[str], box: sandbox.Sandbox, world: World, *,
    max_new_tokens: int, temperature: float = 0.0, samples: int = 1, by: str = "kind", seed: int = 0, rows: int = 0,
    known: dict | None = None, name: str | None = None, **truncation,
) -> list[Outcome]:  # fmt: skip
    """The outcome of every record in every PL, shared out over the ranks; `name` heads a progress bar.

    truncation: top_k and top_p of `generate`.
    """
    tasks = [(record, language) for language in languages for record in records if data.gradable(record, language)]
    mine = world.deal(range(len(tasks)))
    quiet = None if name and world.rank == 0 else True
    with tqdm(total=len(mine) * samples, desc=f"{name} sampling", disable=quiet) as bar:
        seed = seed * world.size + world.rank
        job = (model, tokenizer, [tasks[i] for i in mine], max_new_tokens)
        rollouts = roll_out(*job, temperature, samples, seed, rows, bar.update, **truncation)
    grade(rollouts, tokenizer, box, known, None if quiet else f"{name} running")
    verdicts = [tuple(r.verdict for r in rollouts[i : i + samples]) for i in range(0, len(rollouts), samples)]
    outcomes = []
    for i, own in sorted(world.gather(list(zip(mine, verdicts, strict=True)))):
        record, language = tasks[i]
        if "internal_error" in own:
            tqdm.write(f"{record['id']} in {language}: the sandbox itself failed; the problem is left out")
        else:
            outcomes.append(outcome(record, language, own, by))
    return outcomes


@torch.inference_mode()
def log_probs(model: Llama, tokenizer: Tokenizer, answers: Sequence[tuple[dict, str, str]]) -> list[float]:
    """The log-prob of each (record, PL, program) as the answer to the record's statement, its stop token included."""
    rows = [data.example(tokenizer, {"solutions": {p: text}}, data.statement(r, p), p) for r, p, text in answers]
    values = [0.0] * len(rows)
    lengths = [len(tokens) - 1 for tokens, _ in rows]
    for group in pack(lengths, PREFILL_TOKENS):
        tokens, targets, start = collate([rows[i] for i in group], tokenizer.pad, model.head().device)
        scores = model(tokens, targets, start=start)[0][0].split([lengths[i] for i in group])
        for i, own in zip(group, scores, strict=True):
            values[i] = own.double().sum().item()  # tokens that are not trained count 0
    return values


def choose(
    model: Llama, tokenizer: Tokenizer, records: Sequence[dict], languages: Sequence[str], world: World, by: str = "kind"
) -> list[Outcome]:  # fmt: skip
    """Forced choice, for records with `distractors`: is the right program more probable than each of those?

    It sees what the model takes the statement to mean, even where it can't write the program without a slip.
    """
    tasks = [(r, p) for p in languages for r in records if r.get("distractors", {}).get(p)]
    mine = world.deal(range(len(tasks)))
    programs = {i: [tasks[i][0]["solutions"][tasks[i][1]], *tasks[i][0]["distractors"][tasks[i][1]]] for i in mine}
    scores = iter(log_probs(model, tokenizer, [(*tasks[i], program) for i in mine for program in programs[i]]))
    verdicts = []
    for i in mine:
        right, *wrong = (next(scores) for _ in programs[i])
        verdicts.append((i, ("ok" if right > max(wrong) else "wrong",)))
    return [outcome(*tasks[i], verdict, by) for i, verdict in sorted(world.gather(verdicts))]


def estimate(outcomes: Sequence[Outcome], languages: Sequence[str], k: int) -> dict | None:
    """Mean pass@k over units, each unit's own mean over its problems and `languages`, with its interval."""
    by_unit, problems = defaultdict(list), set()
    for o in outcomes:
        if o.language in languages:
            by_unit[o.unit].append(o.score(k))
            problems.add(o.id)
    if not by_unit:
        return None
    value = mean(map(mean, by_unit.values()))
    low, high = wilson(value, len(by_unit))
    units = {unit: round(mean(scores), 4) for unit, scores in by_unit.items()}
    by_phrase = {"phrases": units} if units.keys() != problems else {}
    return {"value": value, "low": low, "high": high, "problems": len(problems), **by_phrase}


# --------------------------------------------------------------------------------------------------
# Representations: programs as vectors. L layers (the embedding's and each block's), D width, n problems

GREEDY, FORCED = "greedy pass@1", "forced choice"
RETRIEVAL, MARGIN = "cross-PL retrieval", "cosine of equivalents less that of others"
TIE = 1e-6  # float32 moves a cosine by up to 5e-7 in the demo's models


def distinct(records: Sequence[dict], languages: Sequence[str]) -> list[dict]:
    """The records with a program in each PL, less those that share a text or their `function` with one before."""
    kept, seen = [], set()
    for record in records:
        programs = record["solutions"]
        if set(languages) <= programs.keys():
            marks = {(p, programs[p].strip()) for p in languages}
            marks |= {("function", record["function"])} if "function" in record else set()
            kept += [] if marks & seen else [record]
            seen |= marks
    if len(kept) < 2:
        raise ValueError(f"{len(kept)} problems with a program in each of {', '.join(languages)}: retrieval needs two")
    return kept


def document(tokenizer: Tokenizer, record: dict, language: str) -> tuple[list[int], int]:
    """The tokens of a fenced program, up to its end, and the index of the program's first."""
    opening = [tokenizer.bos, *tokenizer.encode(f"```{language}\n")]
    return opening + tokenizer.encode(record["solutions"][language].strip() + "\n"), len(opening)


def question(tokenizer: Tokenizer, record: dict, language: str) -> tuple[list[int], int]:
    """The prompt for the record in the words of the PL's own community, and the index of its last token."""
    tokens = tokenizer.prompt(data.statement(record, language), language)
    return tokens, len(tokens) - 1


# What is represented -> (its tokens, the layer that the tables show of how many).
VIEWS = {"programs": (document, lambda blocks: blocks // 2), "prompts": (question, lambda blocks: blocks)}


def bag_of_tokens(rows: Sequence[tuple[list[int], int]], size: int) -> Tensor:
    """What shared tokens alone give: how often each of `size` tokens occurs in a row, (len(rows), 1, size)."""
    return torch.stack([torch.bincount(torch.tensor(ids), minlength=size).float()[None] for ids, _ in rows])


@torch.inference_mode()
def represent(model: Llama, rows: Sequence[tuple[list[int], int]], budget: int = PREFILL_TOKENS) -> Tensor:
    """rows (tokens, first) -> the residual stream's mean over tokens[first:] at each layer, (len(rows), L, D).

    Float32 (float64 for such a model), on the CPU. Rows are packed into forward passes of `budget` tokens.
    """
    lengths = [len(tokens) for tokens, _ in rows]
    vectors: list[list[Tensor]] = [[] for _ in rows]  # of each row, its layers

    def keep(module, inputs, stream: Tensor) -> None:
        for i, part in zip(group, stream[0].split([lengths[i] for i in group]), strict=True):
            vectors[i].append(wide(part[rows[i][1] :]).mean(0).cpu())

    with contextlib.ExitStack() as hooks:
        for module in (model.model.embed_tokens, *model.model.layers):
            hooks.enter_context(module.register_forward_hook(keep))
        for group in pack(lengths, budget):
            # What follows a row's last token is no input, and no target counts: the head has nothing to do.
            whole = [([*rows[i][0], 0], lengths[i] + 1) for i in group]
            tokens, targets, start = collate(whole, 0, model.head().device)
            model(tokens, targets, start=start)
    return torch.stack([torch.stack(layers) for layers in vectors])


def compare(vectors: dict[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Vectors (n, L, D) by PL -> for each ordered pair of PLs its measures, each (L, n) float64.

    A program of the first PL is the query, those of the second are its neighbours, and the one of the same
    problem is the right one.
    """
    units = {p: F.normalize((x - x.mean(0)).double().transpose(0, 1), dim=-1) for p, x in vectors.items()}  # (L, n, D)
    pairs = {}
    for a, b in itertools.permutations(units, 2):
        cosine = units[a] @ units[b].mT  # (L, n, n)
        nearest = (cosine >= cosine.amax(-1, keepdim=True) - TIE).double()
        same = cosine.diagonal(dim1=1, dim2=2)  # (L, n)
        others = (cosine.sum(-1) - same) / (cosine.shape[-1] - 1)
        found = nearest.diagonal(dim1=1, dim2=2) / nearest.sum(-1)
        pairs[a, b] = {RETRIEVAL: found, MARGIN: same - others}
    return pairs


def parts(roles: Roles, languages: Sequence[str], view: str) -> dict[str, list[tuple[str, str]]]:
    """Column title -> the ordered pairs of PLs that it averages.

    Prompts are compared with the source's alone: the other PLs' people may use the same words.
    """
    groups, titles, s = {"other SFT PLs": roles.sft[1:], "unseen PLs": roles.unseen}, {}, roles.source
    groups = {name: [p for p in own if p in languages] for name, own in groups.items()}
    for name, own in groups.items():
        titles[f"{s} and {name}"] = [pair for p in own if s in languages for pair in ((s, p), (p, s))]
    if view == "programs":
        titles |= {f"within {name}": list(itertools.permutations(own, 2)) for name, own in groups.items()}
    return {title: pairs for title, pairs in titles.items() if pairs}


def representation_cells(name: str, view: str, shown: int, pairs: dict, titles: dict[str, list]) -> list[dict]:
    """The cells of one model, from `compare`'s measures and `parts`: every layer and measure.

    The score of a problem is its own mean over the pairs, as in `estimate`.
    """
    rows = []
    for measure, column in itertools.product(next(iter(pairs.values())), titles):
        scores = torch.stack([pairs[pair][measure] for pair in titles[column]]).mean(0)  # (L, n)
        last, n = len(scores) - 1, scores.shape[1]
        for layer, own in enumerate(scores):
            value, error = own.mean().item(), NormalDist().inv_cdf(0.975) * own.std().item() / n**0.5
            low, high = wilson(value, n) if measure == RETRIEVAL else (value - error, value + error)
            group = f"{view}, after block {layer} of {last}" if layer else f"{view}, embedding"
            place = {"measure": measure, "group": group, "model": name, "column": column}
            about = {"layer": layer, "shown": layer == shown}
            about |= {} if measure == RETRIEVAL else {"unit": "hundredths, mean of"}
            rows.append({**place, "value": value, "low": low, "high": high, "problems": n, **about})
    return rows


def control_cells(cells: Sequence[dict], bag: Sequence[dict]) -> list[dict]:
    """A row more for each table of `cells`: `bag`, the cells of shared tokens alone."""
    tokens = {(c["measure"], c["column"]): c for c in bag}
    own = {(c["measure"], c["group"], c["column"]): {k: c[k] for k in ("group", "layer", "shown")} for c in cells}
    return [tokens[measure, column] | place for (measure, _, column), place in own.items()]


def guess(records: Sequence[dict], by: str, cell: dict) -> float:
    """The share of forced choices that guessing gets right, over the records of the cell's kind."""
    options = [w for r in records if group_of(r, by) == cell["group"] for w in r.get("distractors", {}).values() if w]
    return mean(1 / (len(wrong) + 1) for wrong in options)


def chance_cells(cells: Sequence[dict], measure: str, chance: Callable[[dict], float]) -> list[dict]:
    """A row more for each table of `measure`: what guessing gives."""
    places = {(c["group"], c["column"]): c for c in cells if c["measure"] == measure}
    rows = ((c | {"model": "chance"}, chance(c)) for c in places.values())
    return [c | {"value": value, "low": value, "high": value} for c, value in rows]


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
                own = [o for o in outcomes if o.group == group]
                place = {"model": name, "measure": title, "group": group}
                estimates = {column: estimate(own, languages, k) for column, languages in titles.items()}
                rows += [{**place, "column": column, **e} for column, e in estimates.items() if e]
    return rows


# Student's t at 0.975 by degrees of freedom, from 1; what lies beyond takes the last, which is a little wider.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def over_seeds(values: Sequence[float]) -> dict:
    """Mean and 95% t-interval of one value a seed: endless for a single seed, nan where a value is."""
    n, centre = len(values), math.fsum(values) / len(values)
    half = math.inf
    if n > 1:
        half = T95[min(n - 1, len(T95)) - 1] * (math.fsum((v - centre) ** 2 for v in values) / (n - 1) / n) ** 0.5
    return {"value": centre, "low": centre - half, "high": centre + half, "seeds": n}


def join_cells(runs: Sequence[list[dict]]) -> list[dict]:
    """The cells of runs with several seeds as one: mean and t-interval. ValueError for one that a run lacks."""
    places = defaultdict(list)
    for c in itertools.chain(*runs):
        places[c["measure"], c["group"], c["model"], c["column"]].append(c)
    joined = []
    for place, same in places.items():
        if len(same) != len(runs):
            raise ValueError(f"--join: {len(runs)} files, but {len(same)} of {', '.join(place)}; evaluate all alike")
        problems = sum(c["problems"] for c in same)
        joined.append({**same[0], **over_seeds([c["value"] for c in same]), "problems": problems})
    return joined


def percent(cell: dict | None) -> str:
    if cell is None:
        return "–"
    value, low, high = (100 * cell[name] for name in ("value", "low", "high"))
    return f"{value:.0f} ({low:.0f}–{high:.0f})" if math.isfinite(low) else f"{value:.0f}"


def meaning(cell: dict) -> str:
    """What the cell's `low` and `high` are."""
    if "seeds" in cell:
        return f"mean and 95% t-interval over {cell['seeds']} seeds"
    return "95% interval" + (f" over {len(cell['phrases'])} phrases" if "phrases" in cell else "")


def tables(cells: Sequence[dict]) -> str:
    """Markdown, a table for each measure and kind of problem: a row a model, percent with the range."""
    text, cells = [], [c for c in cells if c.get("shown", True)]
    for measure, group in dict.fromkeys((c["measure"], c["group"]) for c in cells):
        own = {(c["model"], c["column"]): c for c in cells if (c["measure"], c["group"]) == (measure, group)}
        models, titles = (list(dict.fromkeys(place[i] for place in own)) for i in (0, 1))
        some, problems = next(iter(own.values())), sorted({c["problems"] for c in own.values()})
        count = "–".join(map(str, dict.fromkeys((problems[0], problems[-1]))))
        about = f"{some.get('unit', 'percent of')} {count} held-out problems, {meaning(some)}"
        lines = [f"**{measure}, {group}** ({about})\n"]
        lines += ["| model | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
        for m in models:
            lines.append(f"| {m} | " + " | ".join(percent(own.get((m, title))) for title in titles) + " |")
        text.append("\n".join(lines))
    return "\n\n".join(text)


# --------------------------------------------------------------------------------------------------
# Claims: what the paper says, as differences between arms, paired by seed

RESERVED = "reserved words"
TARGETS = {"other SFT PLs": "other SFT mean", "unseen PLs": "unseen mean"}


class Study:
    """The cells of one seed, by what the claims need of them. An arm X is the models X and rl-X."""

    def __init__(self, cells: Sequence[dict]):
        self.cells = {(c["measure"], c["group"], c["model"], c["column"]): c["value"] for c in cells}
        models = dict.fromkeys(model for *place, model, _ in self.cells if place == [GREEDY, RESERVED])
        self.arms = [model for model in models if f"rl-{model}" in models]
        self.source = next((c["column"] for c in cells if c["column"].endswith(" (source)")), "")
        self.shown = {(c["measure"], c["group"]) for c in cells if "layer" in c and c["shown"]}

    def gain(self, arm: str, column: str) -> float:
        """What RL adds to an arm's pass@1 on reserved wordings."""
        after, before = (self.cells[GREEDY, RESERVED, model, column] for model in (f"rl-{arm}", arm))
        return after - before

    def transfer(self, arm: str, column: str) -> float:
        """T: the gain of the target PLs for each point that the source PL gains; nan where that gains nothing."""
        gained = self.gain(arm, self.source)
        return self.gain(arm, column) / gained if gained > 0 else math.nan


def summary(cells: Sequence[dict]) -> str:
    """A line an arm: what RL in the source PL added there and elsewhere. Empty where no arm was evaluated."""
    study, lines = Study(cells), []
    places = {"points there": study.source} | {f"in the {part}": column for part, column in TARGETS.items()}
    for arm in study.arms:
        there = {p: c for p, c in places.items() if (GREEDY, RESERVED, arm, c) in study.cells}
        gains = ", ".join(f"{100 * study.gain(arm, column):.1f} {place}" for place, column in there.items())
        lines.append(f"{arm}: RL in {study.source.removesuffix(' (source)')} adds {gains} ({RESERVED})")
    return "\n".join(lines)


def conclusion(rows: Sequence[dict], over: str) -> str:
    """A line: what claim (b) comes to, from its rows of `claims`, whose intervals are over so many `over`; else empty."""
    own = [row for row in rows if row["claim"] == "b" and row["decides"] and math.isfinite(row["low"])]
    texts = [
        f"{row['text'].partition(',')[0]} {100 * row['value']:+.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f}), "
        + verdict(row)
        for row in own
    ]
    return f"parallel less source: {'; '.join(texts)} (95% intervals over {own[0]['seeds']} {over})" if own else ""


def by_phrase(cells: Sequence[dict]) -> list[list[dict]]:
    """The cells of one seed as if each reserved phrase were a seed of its own."""
    own = [c for c in cells if c["group"] == RESERVED and "phrases" in c]
    shared = [phrase for phrase in own[0]["phrases"] if all(phrase in c["phrases"] for c in own)] if own else []
    return [[c | {"value": c["phrases"][phrase]} for c in own] for phrase in shared]


def claims(runs: Sequence[list[dict]]) -> list[dict]:
    """The paper's claims over runs with several seeds: a row each, with its value in every seed."""
    studies, rows = [Study(cells) for cells in runs], []
    arms = studies[0].arms if studies[0].source else []

    def add(claim: str, decides: bool, text: str, value: Callable[[Study], float]) -> None:
        values = [value(study) for study in studies]
        rows.append({"claim": claim, "decides": decides, "text": text, "values": values, **over_seeds(values)})

    there = {column for measure, group, _, column in studies[0].cells if (measure, group) == (GREEDY, RESERVED)}
    targets = {part: column for part, column in TARGETS.items() if column in there}
    if "source" in arms:
        add("a", True, "source: gain of the source PL", lambda s: s.gain("source", s.source))
        for part, column in targets.items():
            text = f"source: gain of the source PL less that of {part}"
            add("a", True, text, lambda s, c=column: s.gain("source", s.source) - s.gain("source", c))
    for other in [arm for arm in arms if arm != "parallel"] if "parallel" in arms else []:
        claim, decides = ("b" if other == "source" else "c"), other != "crossed"
        for part, column in targets.items():
            text = f"gain of {part}, parallel less {other}"
            add(claim, decides, text, lambda s, c=column, o=other: s.gain("parallel", c) - s.gain(o, c))
            text = f"T of {part}, parallel less {other}"
            add(claim, False, text, lambda s, c=column, o=other: s.transfer("parallel", c) - s.transfer(o, c))
        for measure, group in sorted(studies[0].shown):  # the source and the unseen PLs alone
            column = f"{studies[0].source.removesuffix(' (source)')} and unseen PLs"
            before, after = ((measure, group, arm, column) for arm in (other, "parallel"))
            text = f"{measure}, {group}, {column}: parallel less {other}"
            if after in studies[0].cells:
                add("d", True, text, lambda s, a=after, b=before: s.cells[a] - s.cells[b])
    return rows


def verdict(row: dict) -> str:
    """What the interval says of a claim: that the value is above 0 in the mean of all seeds, below, or neither."""
    return "seen" if row["low"] > 0 else "the reverse" if row["high"] < 0 else "not seen"


def claims_table(rows: Sequence[dict]) -> str:
    """Markdown, in points (T and cosines: in hundredths). Rows that decide a claim are bold."""
    lines = ["| claim | what must be above 0 | mean | 95% interval | seeds | outcome |", "|---" * 6 + "|"]
    for row in sorted(rows, key=lambda r: r["claim"]):
        value, low, high = (100 * row[name] for name in ("value", "low", "high"))
        about, outcome = ("one seed", "–") if row["seeds"] == 1 else (f"{low:.1f} to {high:.1f}", verdict(row))
        outcome = f"**{outcome}**" if row["decides"] else outcome
        lines.append(f"| {row['claim']} | {row['text']} | {value:.1f} | {about} | {row['seeds']} | {outcome} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Figures

# Okabe and Ito's colours, which the colour-blind tell apart; in the demo's order an arm has one hue.
COLOURS = "#999999 #E69F00 #D55E00 #56B4E9 #0072B2 #009E73 #CC79A7 #F0E442".split()
MARKERS = "osD^vP*X"


def pyplot():
    """matplotlib's pyplot, drawing into files; ends with advice if there is none."""
    try:
        import matplotlib.pyplot
    except ImportError:
        data.fail("--plots needs matplotlib; run `pip install matplotlib`")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150})
    return matplotlib.pyplot


def draw(cells: Sequence[dict], x_label: str = "PL", side_by_side: bool = False):
    """A figure of all models: lines over layers, a panel for each column; or bars over columns, one for each group."""
    lines = "layer" in cells[0]
    panel, x = ("column", "layer") if lines else ("group", "column")
    panels, places, models = (list(dict.fromkeys(c[name] for c in cells)) for name in (panel, x, "model"))
    n = len(panels)
    shape, height = ((1, n), 3.8) if lines or side_by_side else ((n, 1), 0.7 + 2.5 * n)
    options = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(*shape, figsize=(9, height), **options)
    width = 0.06 if lines else 0.84 / len(models)
    for (axis, title), (i, model) in itertools.product(zip(axes.flat, panels, strict=True), enumerate(models)):
        own = [c for c in cells if (c[panel], c["model"]) == (title, model)]
        at = [places.index(c[x]) + (i - (len(models) - 1) / 2) * width for c in own]  # side by side, to be seen
        values, low, high = ([100 * c[name] for c in own] for name in ("value", "low", "high"))
        most = math.inf if lines else 100  # of one seed no interval has an end
        ends = [[max(0, min(most, b - a)) for a, b in zip(*e, strict=True)] for e in ((low, values), (values, high))]
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        if model == "chance":
            look = {"color": "black", "linestyle": ":"}
        if lines:
            axis.errorbar(at, values, ends, elinewidth=0.7, label=model, **look)
        else:
            axis.bar(at, values, width, color=look["color"], label=model, yerr=ends, capsize=1.5, error_kw={"lw": 0.7})
        axis.set_title(title, fontsize="medium")
    first, step = axes[0, 0], 1 + len(places) // 12 if lines else 1
    first.set(xmargin=0.02, ylim=(0, None if lines else 100))
    first.set_xticks(range(0, len(places), step), [str(place).replace(" (", "\n(") for place in places[::step]])
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=len(models), frameon=False)
    figure.supylabel(f"{cells[0]['measure']}, percent", fontsize="medium")
    label = "layer (0: embedding, n: after block n)" if lines else x_label
    figure.supxlabel(f"{label}; {meaning(cells[0])}", fontsize="medium")
    return figure


def draw_transfer(cells: Sequence[dict]):
    """The study's figure: each arm's pass@1 on reserved wordings before and after RL, in the three groups of PLs."""
    own = {(c["model"], c["column"]): c for c in cells if (c["measure"], c["group"]) == (GREEDY, RESERVED)}
    study, bars = Study(cells), []
    for column, arm in itertools.product((study.source, *TARGETS.values()), study.arms):
        for model, prefix in (("before RL", ""), ("after RL", "rl-")):
            if c := own.get((prefix + arm, column)):
                bars.append(c | {"measure": f"{GREEDY}, {RESERVED}", "group": column, "column": arm, "model": model})
    return draw(bars, "arm", side_by_side=True)


CURVES = {
    "reward": "mean reward", "no_spread": "groups without spread", "entropy": "entropy, nats", "held_out": "pass@1 on dev",
}  # fmt: skip


def draw_curves(folders: Sequence[Path]):
    """RL runs side by side, by step, from their metrics.jsonl."""
    figure, axes = pyplot().subplots(1, len(CURVES), figsize=(12, 3), layout="constrained")
    for i, folder in enumerate(folders):
        try:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"--curves: {folder}/metrics.jsonl: {error}; name run folders of rl.py") from None
        for axis, (name, title) in zip(axes, CURVES.items(), strict=True):
            own = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if name == "held_out":
                own = [(step, mean(kinds.get(RESERVED, list(kinds.values())[-1]).values())) for step, kinds in own]
            axis.plot(*zip(*own, strict=True), color=COLOURS[(i + 1) % len(COLOURS)], label=folder.name)
            axis.set(title=title, xlabel="step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def write_figures(figures: dict[Path, Any]) -> list[str]:
    """Writes them; returns the paths."""
    for path, figure in figures.items():
        data.write_atomically(path, lambda p, figure=figure: figure.savefig(p, format="png"))
        pyplot().close(figure)
    return list(map(str, figures))


def plot(cells: Sequence[dict], out: Path) -> list[str]:
    """Draws what the cells hold; returns the paths of the files."""
    passes = [c for c in cells if c["measure"] == GREEDY and not c["column"].endswith(" mean")]
    retrieval = [c for c in cells if c["measure"] == RETRIEVAL and c["group"].startswith("programs")]
    figures = {out / name: draw(own) for name, own in (("passes.png", passes), ("retrieval.png", retrieval)) if own}
    if Study(cells).arms:
        figures[out / "transfer.png"] = draw_transfer(cells)
    return write_figures(figures)


# --------------------------------------------------------------------------------------------------
# Command line


@dataclass(frozen=True)
class Settings:
    models: tuple = flag((), "checkpoints or run folders, FOLDER or NAME=FOLDER (default: every run under runs/)")
    data: str = flag("runs/data", "folder of the corpus")
    translate: bool = flag(False, "write programs in --to for DATA's records from those in another; keep what passes")
    solve: bool = flag(False, "the same, shown the statement alone")
    to: tuple = flag((), "PLs to write programs in")
    source: str = flag("python", "PL to translate from, where a record has it; else the first that it has")
    keep: str = flag("", "folder for the records with their new programs, and ledger.txt, which says what was tried")
    out: str = flag("runs/eval", "folder for table.md, eval.json, outcomes.json and figures")
    join: tuple = flag((), "eval.json files, one a seed: join them, weigh the claims, and evaluate nothing")
    curves: tuple = flag((), "run folders of rl.py: draw reward and pass@1 by step, and evaluate nothing")
    languages: tuple = flag((), "PLs to evaluate (default: all of DATA/languages.json)")
    sampling: bool = flag(True, "pass@1 and pass@k: sample programs and run them")
    representations: bool = flag(False, "cross-PL retrieval and cosines of the held-out problems' own programs")
    plots: bool = flag(False, "draw passes.png, transfer.png and, of --representations, retrieval.png (matplotlib)")
    problems: int = flag(0, "only the first PROBLEMS problems of each kind; 0 takes all", least=0)
    split: str = flag("test", "held-out problems: dev, on which settings are chosen, or test", choices=("dev", "test"))
    by: str = flag("kind", "the field of the records that tells kinds of problems apart")
    samples: int = flag(0, "samples per problem for pass@k, or to --translate; 0 measures greedy pass@1 alone", least=0)
    k: tuple = flag((1,), "the k of pass@k", type=int)
    temperature: float = flag(1.0, "temperature of the samples", least=0)
    top_k: int = flag(0, "draw the samples from the TOP_K likeliest tokens; 0 means all", least=0)
    top_p: float = flag(1.0, "draw the samples from the likeliest tokens of TOP_P probability together; 1 means all")
    max_new_tokens: int = flag(320, "token budget of a response", least=1)
    rows: int = flag(0, "responses to write at a time; 0: what a GPU's free memory holds, 512 on a CPU", least=0)
    workers: int = flag(0, "programs to run at once; 0 shares the cores out over the ranks of a host", least=0)
    time_limit: float = flag(5.0, "seconds that a program may take for a test", least=0.01)
    forkserver: bool = flag(False, "fork python's runs from one interpreter: faster, and a program can tell")
    seed: int = flag(0, "seed of the samples")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    precision: str = flag("", "default: bfloat16 on a GPU, the checkpoint's own on a CPU", choices=PRECISIONS)
    format: str = flag("", "prompt format (default: the checkpoint's)", choices=tuple(FORMATS))


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


def wanted_languages(s: Settings, roles: Roles) -> list[str]:
    wanted = [sandbox.canonical(p) for p in s.languages] or list(roles.everything)
    if strange := ", ".join(p for p in wanted if p not in roles.everything):
        there = ", ".join(roles.everything)
        raise ValueError(f"--languages: {strange}: not in {s.data}/languages.json; there are {there}")
    return wanted


def present_languages(wanted: Sequence[str]) -> list[str]:
    """Those with a toolchain; the others are named and left out."""
    absent = [p for p in wanted if p not in sandbox.installed()]
    if absent:
        print(f"left out, no toolchain here: {', '.join(absent)}; `python sandbox.py languages` names the packages")
    return [p for p in wanted if p not in absent] or data.fail("none of the PLs has a toolchain here")


def choose_records(folder: str, split: str, problems: int, by: str = "kind") -> list[dict]:
    """The problems of `split`, the first `problems` of each kind; 0 takes all."""
    kinds = defaultdict(list)
    for record in data.read_split(folder, split):
        kinds[group_of(record, by)].append(record)
    return [r for records in kinds.values() for r in records[: problems or None]]


def count_untested(records: Sequence[dict], languages: Sequence[str]) -> None:
    """Says how many problems have no tests in a PL, where `evaluate` passes them over."""
    counts = {p: sum(not data.gradable(r, p) for r in records) for p in languages}
    if any(counts.values()):
        missing = ", ".join(f"{n} in {p}" for p, n in counts.items() if n)
        print(f"left out: of {len(records)} held-out problems without tests {missing}")


def open_sandbox(s, world: World) -> sandbox.Sandbox:
    """The sandbox of this rank: `s.workers` programs at a time, or its share of the cores."""
    workers = s.workers or max(1, len(os.sched_getaffinity(0)) // world.local_size)
    return sandbox.Sandbox(workers, sandbox.Limits(wall=s.time_limit, cpu=s.time_limit), forkserver=s.forkserver)


def measure(s: Settings, world: World, models: dict[str, Path], records: list[dict], languages: list[str]) -> dict:
    """Title of each measure -> (k, outcomes by model)."""
    greedy, drawn, chosen = {}, {}, {}
    shared = {"max_new_tokens": s.max_new_tokens, "by": s.by, "seed": s.seed, "rows": s.rows, "known": {}}
    with open_sandbox(s, world) as box:
        for name, checkpoint in models.items():
            model, tokenizer = open_checkpoint(checkpoint, world, s)
            job = (model, tokenizer, records, languages, box, world)
            greedy[name] = evaluate(*job, name=name, **shared)
            chosen[name] = choose(model, tokenizer, records, languages, world, s.by)
            if s.samples:
                limits = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
                drawn[name] = evaluate(*job, name=name, samples=s.samples, **limits, **shared)
    several = {f"pass@{k} of {s.samples} samples": (k, drawn) for k in s.k if s.samples}
    choice = {FORCED: (1, chosen)} if any(chosen.values()) else {}
    return {GREEDY: (1, greedy)} | several | choice


def measure_representations(
    s: Settings, world: World, models: dict[str, Path], records: list[dict], roles: Roles, languages: list[str]
) -> tuple[list[dict], dict]:
    """The cells of all models, and model -> view and measure -> "PL → PL" -> a mean for each layer."""
    cells, means = [], defaultdict(lambda: defaultdict(dict))
    for view, (rows_of, shown) in VIEWS.items():
        own = records if view == "programs" else data.first_kind(records)
        own, titles, before = distinct(own, languages), parts(roles, languages, view), len(cells)
        for name, checkpoint in models.items():
            model, tokenizer = open_checkpoint(checkpoint, world, s)
            rows = {p: [rows_of(tokenizer, r, p) for r in own] for p in languages}
            pairs = compare({p: represent(model, texts) for p, texts in rows.items()})
            layer = shown(model.config.num_hidden_layers)
            cells += representation_cells(name, view, layer, pairs, titles)
            for ((a, b), measures), title in itertools.product(pairs.items(), (RETRIEVAL, MARGIN)):
                means[name][f"{view}, {title}"][f"{a} → {b}"] = [round(x, 4) for x in measures[title].mean(1).tolist()]
        counts = compare({p: bag_of_tokens(texts, tokenizer.size) for p, texts in rows.items()})
        bag = representation_cells("bag of tokens", view, 0, counts, titles)
        cells += control_cells(own := cells[before:], bag)
        cells += chance_cells(own, RETRIEVAL, lambda c: 1 / c["problems"])
    return cells, means


def evaluate_models(s: Settings) -> list[dict]:
    """Evaluates every model, prints the tables and writes them with all outcomes. Returns the cells (of rank 0)."""
    began = time.perf_counter()
    if not (s.sampling or s.representations):
        raise ValueError("--no-sampling: leaves nothing to measure without --representations")
    if s.samples and not (s.k and all(1 <= k <= s.samples for k in s.k)):
        raise ValueError(f"--k {' '.join(map(str, s.k))}: give one or more from 1 to --samples, {s.samples}")
    if not 0 < s.top_p <= 1:
        raise ValueError(f"--top-p {s.top_p}: must be above 0 and at most 1")
    with World(s.device) as world:  # what fails on one host alone then breaks the connections that others wait on
        roles, models = data.read_roles(s.data), find_models(s)
        records = choose_records(s.data, s.split, s.problems, s.by)
        wanted, measures, cells, added, pairs = wanted_languages(s, roles), {}, [], [], {}
        if s.representations and len(wanted) < 2:
            raise ValueError("--representations: compares PLs; name two or more with --languages")
        languages = present_languages(wanted) if s.sampling else []
        count_untested(records, languages)
        checks = [(s.max_new_tokens, lambda _: languages)] * s.sampling
        checks += [(0, lambda r: [p for p in wanted if p in r["solutions"]])] * s.representations
        for folder in models.values():  # what is missing shows before the long work, as does a place for the results
            limit, tokenizer = Config.load(folder).max_position_embeddings, Tokenizer(folder, s.format)
            for budget, asked in checks:  # every model gets the same problems
                records = fitting(tokenizer, limit, records, asked, "held-out problems", budget)
        Path(s.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=s.out).close()
        # A forward pass over short texts: the first rank does it alone, and before the long work, since it may refuse.
        if s.representations and not world.rank:
            added, pairs = measure_representations(s, world, models, records, roles, wanted)
        if s.sampling:
            measures = measure(s, world, models, records, languages)
            cells = make_cells(measures, columns(roles, languages))
            cells += chance_cells(cells, FORCED, functools.partial(guess, records, s.by))
    if world.rank:
        return []
    cells += added
    phrases = by_phrase(cells)
    end = conclusion(claims(phrases), f"phrases of one seed, {s.split}") if phrases else ""
    text = "\n\n".join(filter(None, (tables(cells), summary(cells), end)))
    print(text, end="\n\n")
    seconds = round(time.perf_counter() - began, 1)
    rest = {"outcomes": {title: results for title, (_, results) in measures.items()}, "representations": pairs}
    write(s.out, "table.md", text)
    write(s.out, "outcomes.json", json.dumps(rest, default=asdict))
    shown = [c for c in cells if c.get("shown", True)]
    write(s.out, "eval.json", json.dumps({"settings": asdict(s), "seconds": seconds, "cells": shown}))
    return cells


def write(folder: str, name: str, text: str) -> None:
    """A result of an evaluation, said aloud."""
    data.write_atomically(Path(folder) / name, lambda p: p.write_text(text + "\n"))
    print(f"wrote {folder}/{name}")


def read_cells(path: str) -> list[dict]:
    """The cells of an eval.json; ValueError naming `path` if it is anything else."""
    try:
        cells = json.loads(Path(path).read_text())["cells"]
        if all({"measure", "group", "model", "column", "value", "problems"} <= c.keys() for c in cells) and cells:
            return cells
    except (AttributeError, IsADirectoryError, KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"--join: {path}: not an eval.json that an evaluation wrote")


def join_seeds(s: Settings) -> list[dict]:
    """Prints and writes the tables of several seeds and what they say of the claims. Returns the joined cells."""
    runs = [read_cells(path) for path in s.join]
    cells, rows = join_cells(runs), claims(runs)
    text = "\n\n".join(
        filter(None, (summary(cells), conclusion(rows, "seeds"), rows and claims_table(rows), tables(cells)))
    )
    print(text, end="\n\n")
    write(s.out, "joined.md", text)
    finite = [{k: v for k, v in row.items() if not isinstance(v, float) or math.isfinite(v)} for row in rows]
    write(s.out, "claims.json", json.dumps(finite, indent=1))
    return cells


# --------------------------------------------------------------------------------------------------
# Parallel programs from a model: what it writes and what passes is kept


def shown_program(record: dict, source: str) -> dict:
    """The record with its program in `source` below each of its statements."""
    program = f"The same in {source}:\n```{source}\n{record['solutions'][source].strip()}\n```"
    own = {p: f"{text.strip()}\n\n{program}" for p, text in record.get("prompts", {}).items()}
    return record | {"prompt": f"{record['prompt'].strip()}\n\n{program}", "prompts": own}


def read_ledger(path: Path) -> dict[tuple[str, str], dict]:
    """What is done, by record and PL. A last line that an interrupted run left unfinished is done again."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return {(row["id"], row["language"]): row for row in map(json.loads, lines)}


def tell(rollouts: Sequence[Rollout]) -> dict:
    """The ledger's line on one record in one PL: the first program that is right, and why the others are not kept."""
    record, language, program, rejected = rollouts[0].record, rollouts[0].language, None, {}
    for r in rollouts:
        listed = r.passed and language in data.hard_coded(record | {"solutions": {language: r.program}})
        if r.passed and not listed:
            program = program or r.program
        elif r.program is not None:
            rejected[r.program] = "hard_coded" if listed else r.verdict
    verdicts = [r.verdict for r in rollouts]
    row = {"id": record["id"], "language": language, "program": program, "verdicts": verdicts}
    return row | {"rejected": [{"verdict": v, "program": text} for text, v in rejected.items()]}


def write_programs(s: Settings) -> None:
    """Samples programs in the PLs `s.to` for records that lack them, and writes the records with those that pass.

    Each record and PL is a line of KEEP/ledger.txt as soon as it is judged, so that a run that stopped goes on from there.
    """
    if not (s.to and s.samples and s.keep and len(s.models) == 1):
        raise ValueError("--translate and --solve: give --models MODEL, --to PL..., --samples N and --keep FOLDER")
    files = {path: data.read_records(path) for path in data.record_files(s.data)}
    languages, out, left, tasks = present_languages([*map(sandbox.canonical, s.to)]), Path(s.keep), Counter(), []
    with World(s.device) as world, open_sandbox(s, world) as box:
        model, tokenizer = open_checkpoint(*find_models(s).values(), world, s)
        done, limit = read_ledger(out / "ledger.txt"), model.config.max_position_embeddings - s.max_new_tokens
        for record, language in itertools.product(itertools.chain(*files.values()), languages):
            given = [p for p in (s.source, *record["solutions"]) if p in record["solutions"]]
            if language in record["solutions"] or (record["id"], language) in done:
                left["done before"] += 1
            elif not data.gradable(record, language) or (s.translate and not given):
                left[f"no tests in {language}" if given or s.solve else "no program to translate"] += 1
            else:
                task = shown_program(record, given[0]) if s.translate else record
                fits = len(tokenizer.prompt(data.statement(task, language), language)) <= limit
                tasks += [(task, language)] * fits
                left["prompt too long"] += not fits
        if not world.rank:
            print(f"{len(tasks)} to write" + "".join(f"; {n} left out: {why}" for why, n in left.items()))
            data.write_records(out / "ledger.txt", done.values())
        batch = max(1, (s.rows or ROWS) // s.samples) * world.size
        for start in tqdm(range(0, len(tasks), batch), desc="batches", disable=world.rank > 0 or None):
            own, seed = world.deal(tasks[start : start + batch]), (s.seed, len(done) + start, world.rank)
            job = (model, tokenizer, own, s.max_new_tokens, s.temperature, s.samples, zlib.crc32(repr(seed).encode()))
            rollouts = roll_out(*job, s.rows, top_k=s.top_k, top_p=s.top_p)
            grade(rollouts, tokenizer, box)
            rows = [tell(rollouts[i : i + s.samples]) for i in range(0, len(rollouts), s.samples)]
            rows = [row for row in world.gather(rows) if "internal_error" not in row["verdicts"]]
            done |= {(row["id"], row["language"]): row for row in rows}
            if not world.rank:
                with open(out / "ledger.txt", "a", encoding="utf-8") as ledger:
                    ledger.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not world.rank:
        keep_programs(files, done, out)


def keep_programs(files: dict[Path, list[dict]], done: dict, out: Path) -> None:
    """Writes the files' records with the programs that are right, and prints the pass rate in each PL."""
    new = defaultdict(dict)
    for (name, language), row in done.items():
        new[name] |= {language: row["program"]} if row["program"] else {}
    for path, records in files.items():
        data.write_records(out / path.name, [r | {"solutions": new[r["id"]] | r["solutions"]} for r in records])
    for language in dict.fromkeys(language for _, language in done):
        rows = [row for (_, p), row in done.items() if p == language]
        drawn, kept = [v for row in rows for v in row["verdicts"]], sum(row["program"] is not None for row in rows)
        rate = f"{100 * drawn.count('ok') / len(drawn):.1f}% of {len(drawn)} samples pass" if drawn else "none sampled"
        print(f"{language:<12} {rate}; {kept} of {len(rows)} problems have a program")
    print(f"wrote {out}: {', '.join(path.name for path in files)} and ledger.txt, with what was rejected and why")


# --------------------------------------------------------------------------------------------------
# The command


def main(s: Settings) -> None:
    """Evaluates, or joins what was evaluated, and draws it."""
    if s.plots or s.curves:
        pyplot()  # if it is missing, say so before the work
    if s.curves:
        figures = {Path(s.out) / "curves.png": draw_curves(list(map(Path, s.curves)))}
        print("wrote " + " and ".join(write_figures(figures)))
        return
    if s.translate or s.solve:
        return write_programs(s)
    cells = join_seeds(s) if s.join else evaluate_models(s)
    if s.plots and cells:
        print("wrote " + " and ".join(plot(cells, Path(s.out))))


if __name__ == "__main__":
    data.command(main, Settings, __doc__)
