"""How well checkpoints solve held-out problems, per PL, and how alike they see equal programs in two PLs.

    python eval.py                                    # every run folder under runs/ that has a checkpoint
    python eval.py --models base=runs/base rl=runs/rl # these, under these names
    python eval.py --samples 8 --k 1 8                # pass@k from 8 samples beside greedy pass@1
    python eval.py --representations                  # cross-PL retrieval in the residual stream, beside pass@1
    python eval.py --representations --no-sampling    # that alone: no toolchain and no sandbox
    python eval.py --join runs/*/eval/eval.json       # mean and range over runs with different seeds
    python eval.py --plots ...                        # with any of these: figures (needs matplotlib)

Prints one Markdown table per kind of problem and measure, with the PLs in three parts: the source PL
of RL, the other SFT PLs, and the unseen PLs; and writes eval.json (every cell, every problem's verdicts,
every pair of PLs) beside table.md; --plots adds passes.png and retrieval.png. rl.py samples and grades with
the same `sample` and `grade`.

Our choices:

1. A response passes if it ended with its stop token, holds a program in a closed fenced block of the
   PL asked for, and that program passes all tests. A response cut off by the budget is `truncated`
   and one without such a block `no_program`: both are failures.
2. pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1), averaged over
   problems.
3. Intervals are Wilson's 95% score intervals with the number of problems as sample size. For means
   over several samples or PLs of one problem that is conservative: those share the problem.
4. Samples are drawn from the whole softmax unless --top-k or --top-p cut it; rl.py has neither.
5. The representation of a program is the residual stream after each block (layer 0: after the embedding),
   averaged over the program's own tokens. It stands in a fenced block, as in base and SFT, but without a
   statement, which would be the same text in every PL.
6. From each PL's representations their mean is subtracted: what is left is how a program differs from the
   others in its PL. Otherwise a constant offset between two PLs would decide which neighbour is nearest.
7. Programs are equivalent if they are the same problem's. Problems that share a program's text in some PL, or
   their `function`, count once, so that every query has one right answer among n: chance is 1 / n.
   Neighbours whose cosines differ by less than TIE share the credit: at layer 0, where the order of tokens
   does not count, texts of the same tokens in another order are alike.
8. The tables show the block in the middle, number layers // 2, whatever the results; eval.json has all layers.
   Intervals of differences of cosines are normal ones over the problems.
"""

import contextlib
import itertools
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, mean

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import sandbox
from data import FORMATS, Roles, Tokenizer, flag
from model import PREFILL_TOKENS, Config, Llama, generate, wide
from sft import DTYPES, World, check_lengths, collate, newest_checkpoint, open_checkpoint, pack, starting_point

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
    prompts = [tokenizer.prompt(data.statement(record, [language]), [language]) for record, language in tasks]
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
    return 1.0 - math.comb(samples - passes, k) / math.comb(samples, k)


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
    mine = world.deal(range(len(tasks)))
    quiet = None if name and world.rank == 0 else True
    with tqdm(total=len(mine) * samples, desc=f"{name} sampling", disable=quiet) as bar:
        seed = seed * world.size + world.rank
        job = (model, tokenizer, [tasks[i] for i in mine], max_new_tokens)
        rollouts = sample(*job, temperature, samples, seed, rows, bar.update, **truncation)
    grade(rollouts, tokenizer, box, known, None if quiet else f"{name} running")
    verdicts = [tuple(r.verdict for r in rollouts[i : i + samples]) for i in range(0, len(rollouts), samples)]
    outcomes = []
    for i, own in sorted(world.gather(list(zip(mine, verdicts, strict=True)))):
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
# Representations: programs as vectors. L layers (the embedding's and each block's), D width, n problems

RETRIEVAL, MARGIN = "cross-PL retrieval", "cosine of equivalent programs less that of others"
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


@torch.inference_mode()
def represent(model: Llama, rows: Sequence[tuple[list[int], int]], budget: int = PREFILL_TOKENS) -> Tensor:
    """rows (tokens, first) -> the residual stream's mean over tokens[first:] at each layer, (len(rows), L, D).

    Float32 (float64 for such a model), on the CPU. Rows are packed into forward passes of `budget` tokens.
    ValueError for a row longer than the model's positions.
    """
    lengths, limit = [len(tokens) for tokens, _ in rows], model.config.max_position_embeddings
    if max(lengths) > limit:
        raise ValueError(f"a program of {max(lengths)} tokens, the model takes {limit}; leave its record out")
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
        pairs[a, b] = {RETRIEVAL: found, MARGIN: same - others, "cosine, equivalent": same, "cosine, others": others}
    return pairs


def parts(roles: Roles, languages: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Column title -> the ordered pairs of PLs that it averages."""
    sft, unseen = ([p for p in own if p in languages] for own in (roles.sft, roles.unseen))
    across = list(itertools.product(unseen, {roles.source} & set(sft)))
    titles = {
        "within SFT PLs": list(itertools.permutations(sft, 2)),
        f"{roles.source} and unseen PLs": across + [pair[::-1] for pair in across],
        "within unseen PLs": list(itertools.permutations(unseen, 2)),
    }
    return {title: pairs for title, pairs in titles.items() if pairs}


def representation_cells(name: str, pairs: dict, titles: dict[str, list[tuple[str, str]]]) -> list[dict]:
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
            group = f"after block {layer} of {last}" if layer else "embedding"
            place = {"measure": measure, "group": group, "model": name, "column": column}
            about = {"layer": layer, "shown": layer == last // 2 and measure in (RETRIEVAL, MARGIN)}
            about |= {} if measure == RETRIEVAL else {"unit": "hundredths, mean of"}
            rows.append({**place, "value": value, "low": low, "high": high, "problems": n, **about})
    return rows


def chance_cells(cells: Sequence[dict]) -> list[dict]:
    """A row more for the tables of retrieval: what guessing would give."""
    places = {(c["group"], c["column"]): c for c in cells if c["measure"] == RETRIEVAL}
    return [
        {**c, "model": "chance"} | dict.fromkeys(("value", "low", "high"), 1 / c["problems"]) for c in places.values()
    ]


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


def join(runs: Sequence[list[dict]]) -> list[dict]:
    """The cells of runs with several seeds as one: mean, least and greatest. ValueError for one that a run lacks."""
    places = defaultdict(list)
    for c in itertools.chain(*runs):
        places[c["measure"], c["group"], c["model"], c["column"]].append(c)
    joined = []
    for place, same in places.items():
        if len(same) != len(runs):
            raise ValueError(f"--join: {len(runs)} files, but {len(same)} of {', '.join(place)}; evaluate all alike")
        values, problems = [c["value"] for c in same], sum(c["problems"] for c in same)
        spread = {"value": mean(values), "low": min(values), "high": max(values), "problems": problems}
        joined.append({**same[0], **spread, "seeds": len(same)})
    return joined


def percent(cell: dict | None) -> str:
    return "–" if cell is None else "{:.0f} ({:.0f}–{:.0f})".format(*(100 * cell[n] for n in ("value", "low", "high")))


def meaning(cell: dict) -> str:
    """What the cell's `low` and `high` are."""
    return "95% interval" if "seeds" not in cell else f"mean and range of {cell['seeds']} seeds"


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


def draw(cells: Sequence[dict]):
    """A figure of all models: lines over layers, a panel for each column; or bars over PLs, one for each group."""
    lines = "layer" in cells[0]
    panel, x = ("column", "layer") if lines else ("group", "column")
    panels, places, models = (list(dict.fromkeys(c[name] for c in cells)) for name in (panel, x, "model"))
    shape, size = ((1, len(panels)), (9, 3.8)) if lines else ((len(panels), 1), (9, 0.7 + 2.5 * len(panels)))
    options = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(*shape, figsize=size, **options)
    width = 0.06 if lines else 0.84 / len(models)
    for (axis, title), (i, model) in itertools.product(zip(axes.flat, panels, strict=True), enumerate(models)):
        own = [c for c in cells if (c[panel], c["model"]) == (title, model)]
        at = [places.index(c[x]) + (i - (len(models) - 1) / 2) * width for c in own]  # side by side, to be seen
        values, low, high = ([100 * c[name] for c in own] for name in ("value", "low", "high"))
        spread = [[max(0, b - a) for a, b in zip(*ends, strict=True)] for ends in ((low, values), (values, high))]
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        if model == "chance":
            look = {"color": "black", "linestyle": ":"}
        if lines:
            axis.errorbar(at, values, spread, elinewidth=0.7, label=model, **look)
        else:
            axis.bar(at, values, width, color=look["color"], label=model)
            axis.errorbar(at, values, spread, elinewidth=0.7, fmt="none", ecolor="black", capsize=1.5)
        axis.set_title(title, fontsize="medium")
    first, step = axes[0, 0], 1 + len(places) // 12 if lines else 1
    first.set(xmargin=0.02, ylim=(0, None if lines else 100))
    first.set_xticks(range(0, len(places), step), [str(place).replace(" (", "\n(") for place in places[::step]])
    figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=len(models), frameon=False)
    figure.supylabel(f"{cells[0]['measure']}, percent", fontsize="medium")
    label = "layer (0: embedding, n: after block n)" if lines else "PL"
    figure.supxlabel(f"{label}; {meaning(cells[0])}", fontsize="medium")
    return figure


def plot(cells: Sequence[dict], out: Path) -> list[str]:
    """Draws what the cells hold; returns the paths of the files."""
    passes = [c for c in cells if c["measure"] == "greedy pass@1" and not c["column"].endswith(" mean")]
    retrieval = [c for c in cells if c["measure"] == RETRIEVAL]
    figures = {out / name: draw(own) for name, own in (("passes.png", passes), ("retrieval.png", retrieval)) if own}
    for path, figure in figures.items():
        data.write_atomically(path, lambda p, figure=figure: figure.savefig(p, format="png"))
        pyplot().close(figure)
    return list(map(str, figures))


# --------------------------------------------------------------------------------------------------
# Command line


@dataclass(frozen=True)
class Settings:
    models: tuple = flag((), "checkpoints or run folders, FOLDER or NAME=FOLDER (default: every run under runs/)")
    data: str = flag("runs/data", "folder of the corpus")
    out: str = flag("runs/eval", "folder for table.md, eval.json and figures")
    join: tuple = flag((), "eval.json files of runs with other seeds: print their mean and range, and evaluate nothing")
    languages: tuple = flag((), "PLs to evaluate (default: all of DATA/languages.json)")
    sampling: bool = flag(True, "pass@1 and pass@k: sample programs and run them")
    representations: bool = flag(False, "cross-PL retrieval and cosines of the held-out problems' own programs")
    plots: bool = flag(False, "draw passes.png and, of --representations, retrieval.png; needs matplotlib")
    problems: int = flag(0, "only the first PROBLEMS problems of each kind; 0 takes all", least=0)
    by: str = flag("wording", "kinds of problems to tell apart: wording, or a field of `difficulty` such as operations")
    samples: int = flag(0, "samples per problem for pass@k; 0 measures greedy pass@1 alone", least=0)
    k: tuple = flag((1,), "the k of pass@k", type=int)
    temperature: float = flag(1.0, "temperature of the samples", least=0)
    top_k: int = flag(0, "draw the samples from the TOP_K likeliest tokens; 0 means all", least=0)
    top_p: float = flag(1.0, "draw the samples from the likeliest tokens of TOP_P probability together; 1 means all")
    max_new_tokens: int = flag(320, "token budget of a response", least=1)
    rows: int = flag(512, "responses to write at a time: less needs less memory", least=1)
    workers: int = flag(0, "programs to run at once; 0 means one a core", least=0)
    time_limit: float = flag(5.0, "seconds that a program may take for a test", least=0.01)
    seed: int = flag(0, "seed of the samples")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    precision: str = flag("", "default: bfloat16 on a GPU, the checkpoint's own on a CPU", choices=DTYPES)
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


def choose_records(folder: str, problems: int, by: str = "wording") -> list[dict]:
    """The held-out problems, the first `problems` of each kind; 0 takes all."""
    kinds = defaultdict(list)
    for record in data.read_split(folder, "eval"):
        kinds[group_of(record, by)].append(record)
    return [r for _, records in sorted(kinds.items()) for r in records[: problems or None]]


def open_sandbox(s, world: World) -> sandbox.Sandbox:
    """The sandbox of this rank: `s.workers` programs at a time, or its share of the cores."""
    workers = s.workers or max(1, len(os.sched_getaffinity(0)) // world.local_size)
    return sandbox.Sandbox(workers, sandbox.Limits(wall=s.time_limit, cpu=s.time_limit))


def measure(s: Settings, world: World, models: dict[str, Path], records: list[dict], languages: list[str]) -> dict:
    """Title of each measure -> (k, outcomes by model)."""
    greedy, drawn = {}, {}
    shared = {"max_new_tokens": s.max_new_tokens, "by": s.by, "seed": s.seed, "rows": s.rows, "known": {}}
    with open_sandbox(s, world) as box:
        for name, checkpoint in models.items():
            model, tokenizer = open_checkpoint(checkpoint, world, world.dtype(s.precision), s.format)
            check_lengths(model, tokenizer, records, [[p] for p in languages], s.max_new_tokens)
            job = (model, tokenizer, records, languages, box, world)
            greedy[name] = evaluate(*job, name=name, **shared)
            if s.samples:
                limits = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
                drawn[name] = evaluate(*job, name=name, samples=s.samples, **limits, **shared)
    several = {f"pass@{k} of {s.samples} samples": (k, drawn) for k in s.k if s.samples}
    return {"greedy pass@1": (1, greedy)} | several


def measure_representations(
    s: Settings, world: World, models: dict[str, Path], records: list[dict], roles: Roles, languages: list[str]
) -> tuple[list[dict], dict]:
    """The cells of all models, and model -> measure -> "PL → PL" -> a mean for each layer."""
    records, cells, means = distinct(records, languages), [], {}
    for name, checkpoint in models.items():
        model, tokenizer = open_checkpoint(checkpoint, world, world.dtype(s.precision), s.format)
        pairs = compare({p: represent(model, [document(tokenizer, r, p) for r in records]) for p in languages})
        cells += representation_cells(name, pairs, parts(roles, languages))
        means[name] = defaultdict(dict)
        for (a, b), measures in pairs.items():
            for title, scores in measures.items():
                means[name][title][f"{a} → {b}"] = [round(x, 4) for x in scores.mean(1).tolist()]
    return cells + chance_cells(cells), means


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
        roles, models, records = data.read_roles(s.data), find_models(s), choose_records(s.data, s.problems, s.by)
        wanted, measures, cells, added, pairs = wanted_languages(s, roles), {}, [], [], {}
        if s.representations and len(wanted) < 2:
            raise ValueError("--representations: compares PLs; name two or more with --languages")
        for folder in models.values():  # what is missing shows before the long work, as does a place for the results
            Config.load(folder)
            Tokenizer(folder, s.format)
        Path(s.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=s.out).close()
        languages = present_languages(wanted) if s.sampling else []
        # A forward pass over short texts: the first rank does it alone, and before the long work, since it may refuse.
        if s.representations and not world.rank:
            added, pairs = measure_representations(s, world, models, records, roles, wanted)
        if s.sampling:
            measures = measure(s, world, models, records, languages)
            cells = make_cells(measures, columns(roles, languages))
    if world.rank:
        return []
    cells += added
    text = tables(cells)
    print(text, end="\n\n")
    outcomes = {title: results for title, (_, results) in measures.items()}
    seconds = round(time.perf_counter() - began, 1)
    whole = {"settings": s, "seconds": seconds, "cells": cells, "outcomes": outcomes, "representations": pairs}
    for name, content in {"table.md": text, "eval.json": json.dumps(whole, default=asdict)}.items():
        data.write_atomically(Path(s.out) / name, lambda p, content=content: p.write_text(content + "\n"))
    print(f"wrote {s.out}/table.md and {s.out}/eval.json")
    return cells


def read_cells(path: str) -> list[dict]:
    """The cells of an eval.json; ValueError naming `path` if it is anything else."""
    try:
        return json.loads(Path(path).read_text())["cells"]
    except (IsADirectoryError, KeyError, TypeError, ValueError):
        raise ValueError(f"--join: {path}: not an eval.json that an evaluation wrote") from None


def main(s: Settings) -> None:
    """Evaluates, or joins what was evaluated, and draws it."""
    if s.plots:
        pyplot()  # if it is missing, say so before the work
    if s.join:
        cells = join([read_cells(path) for path in s.join])
        print(tables(cells))
    else:
        cells = evaluate_models(s)
    if s.plots and cells:
        print("wrote " + " and ".join(plot(cells, Path(s.out))))


if __name__ == "__main__":
    data.command(main, Settings, __doc__)
