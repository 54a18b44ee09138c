"""The supervised stage: trains a model on a mixture of data.py, from scratch (`base`) or further.

    python sft.py --mixture base          # the stand-in for pre-training, into runs/base
    python sft.py                         # Parallel-SFT from runs/base, into runs/parallel
    python sft.py --mixture source        # the arm without parallel programs, into runs/source

A run folder holds `step-N` checkpoint folders (weights and tokenizer in Hugging Face's layout, and
trainer.pt), metrics.jsonl, settings.json, and summary.json once the run is finished. Called again, a
run goes on from its newest checkpoint; Ctrl-C saves one first.

Our choices, where the Parallel-SFT paper leaves freedom or is silent:

1. The loss is the mean negative log-prob per trained token of the whole update: one denominator,
   however the update is cut into micro-batches. Trained are the response and its stop token; in
   `base` documents every token but the first.
2. A run ends after a number of *tokens*, prompts included, so that all arms see equally many; the
   learning rate (linear warm-up, then a cosine to a tenth) follows the same count.
3. AdamW with betas (0.9, 0.95); weight decay on matrices other than embeddings; gradients clipped by global norm.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
from data import Mixture, Tokenizer, flag
from model import IGNORE, Config, Llama, load, save

Row = tuple[list[int], int]  # token ids, and the index of the first that is trained


# --------------------------------------------------------------------------------------------------
# Rows to tensors


def collate(rows: Sequence[Row], pad: int, device) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets of right-padded rows, both (B, T) int64.

    targets[b, t] is the token after tokens[b, t]: IGNORE unless it is one of the row's trained ones.
    """
    longest = max(len(tokens) for tokens, _ in rows)
    padded = torch.full((len(rows), longest), pad)
    targets = torch.full((len(rows), longest), IGNORE)
    for b, (tokens, start) in enumerate(rows):
        padded[b, : len(tokens)] = torch.tensor(tokens)
        targets[b, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
    return padded[:, :-1].to(device), targets[:, :-1].to(device)


def micro_batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices in groups of similar length, each at most `limit` tokens with its padding (or one row)."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and lengths[i] * (len(group) + 1) > limit:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def trained_tokens(rows: Sequence[Row]) -> int:
    return sum(len(tokens) - start for tokens, start in rows)


# --------------------------------------------------------------------------------------------------
# Optimizer


def make_optimizer(model: Llama, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, but neither norms nor embeddings."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() <= 1 or "embed_tokens" in n]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), foreach=True)


def apply_gradients(model: Llama, optimizer: torch.optim.Optimizer, lr: float, clip: float) -> float:
    """Clips by global norm, steps with learning rate `lr`, clears. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def schedule(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: linear warm-up, cosine to a tenth."""
    if progress < warmup:
        return max(progress, 1e-3) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))


# --------------------------------------------------------------------------------------------------
# Runs: metrics, checkpoints, resume. rl.py uses the same.


def newest_checkpoint(folder: str | Path) -> Path | None:
    """`folder` if it is a checkpoint, else its newest whole `step-N`, else None."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    steps = [p for p in folder.glob("step-*") if p.name[5:].isdigit()]
    return max(steps, key=lambda p: int(p.name[5:]), default=None)


def starting_point(folder: str | Path, advice: str) -> Path:
    """The checkpoint to start from in `folder`; ends with `advice` if there is none.

    A run that is not finished serves too, but not unnoticed.
    """
    checkpoint = newest_checkpoint(folder) or data.fail(f"{folder}: holds no checkpoint; {advice}")
    if (Path(folder) / "settings.json").exists() and not (Path(folder) / "summary.json").exists():
        print(f"note: the run in {folder} is not finished; going on from its {checkpoint.name}")
    return checkpoint


# Settings that may differ when a run is taken up again.
FREE = ("device", "workers", "out", "eval_every", "save_every", "eval_languages", "eval_problems", "micro_tokens")


class Run:
    """A run folder. `stopping` turns true on Ctrl-C or SIGTERM: finish the step, save, leave.

    A checkpoint is written under a temporary name and renamed, so that a half-written one is never
    found. The metrics file is cut back to where the checkpoint left it, so that none stands twice.
    """

    def __init__(self, out: str | Path, settings):
        self.out, self.settings, self.stopping = Path(out), settings, False
        self.metrics, self.summary = self.out / "metrics.jsonl", self.out / "summary.json"
        self.began = time.perf_counter()

    def __enter__(self):
        def stop(*_):
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            tqdm.write("stopping after this step; once more to stop at once", file=sys.stderr)

        self.handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def finished(self) -> bool:
        """Whether the run is over; says so."""
        if self.summary.exists():
            print(f"{self.out}: finished already; give another --out, or delete the folder, to train anew")
        return self.summary.exists()

    def start(self) -> tuple[Path | None, dict]:
        """(newest checkpoint folder, its trainer state), or (None, {}) for a new run.

        ValueError if the checkpoint was made with other settings: it would not be the same run.
        """
        checkpoint = newest_checkpoint(self.out)
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True) if checkpoint else {}
        for name, old in state.get("settings", {}).items():
            new = asdict(self.settings).get(name)
            if old != new and name not in FREE:
                raise ValueError(
                    f"{self.out}: began with --{name.replace('_', '-')} {old}, not {new}; give that, or another --out"
                )
        text = json.dumps(asdict(self.settings), indent=2)
        data.write_atomically(self.out / "settings.json", lambda p: p.write_text(text))
        with open(self.metrics, "ab") as file:
            file.truncate(min(file.tell(), state.get("metrics_bytes", 0)))
        return checkpoint, state

    def log(self, **figures) -> None:
        """Appends one line of figures to metrics.jsonl; shows held-out figures."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()}) + "\n")
        if "held_out" in figures:
            tqdm.write(f"{self.out} step {figures['step']}: held-out {figures['held_out']}")

    def save(self, step: int, model: Llama, tokenizer: Tokenizer, optimizer, **state) -> None:
        """Writes checkpoint step-N and removes the older ones."""
        final, temporary = self.out / f"step-{step}", self.out / f".step-{step}.tmp"
        if final.exists():  # saved a moment ago, and nothing was learned since
            return
        shutil.rmtree(temporary, ignore_errors=True)
        save(model, temporary)
        tokenizer.save(temporary)
        position = self.metrics.stat().st_size if self.metrics.exists() else 0
        state |= {"step": step, "optimizer": optimizer.state_dict(), "metrics_bytes": position}
        torch.save(state | {"settings": asdict(self.settings)}, temporary / "trainer.pt")
        older = list(self.out.glob("step-*"))
        os.replace(temporary, final)
        for old in older:
            shutil.rmtree(old)

    def stop(self, step: int):
        """Ends the program after Ctrl-C, as one that was interrupted."""
        print(f"{self.out}: stopped after step {step}; the same command goes on from there")
        sys.exit(130)

    def finish(self, **totals) -> None:
        """Writes summary.json, which marks the run as finished, and prints its line of totals."""
        totals["seconds"] = round(time.perf_counter() - self.began, 1)
        data.write_atomically(self.summary, lambda p: p.write_text(json.dumps(totals) + "\n"))
        print(f"{self.out}: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in totals.items()))


# --------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Settings:
    mixture: str = flag("parallel", "what to train on", choices=tuple(data.MIXTURES))
    data: str = flag("runs/data", "folder that `python data.py make` wrote; made first if it is missing")
    model: str = flag(
        "",
        "checkpoint or run folder to start from (default: runs/base, trained first if missing; base starts from scratch)",
    )
    out: str = flag("", "run folder (default: runs/MIXTURE)")
    tokens: int = flag(0, "training tokens, prompts included; 0 means 3,500,000 for base and 400,000 otherwise")
    batch: int = flag(16, "sequences per update", least=1)
    micro_tokens: int = flag(1024, "most tokens in one forward pass, padding included")
    lr: float = flag(0.0, "peak learning rate; 0 means 3e-3 for base and 5e-4 otherwise")
    warmup: float = flag(0.05, "share of the run over which the learning rate rises")
    weight_decay: float = flag(0.1, "AdamW's decay of matrices")
    clip: float = flag(1.0, "largest global gradient norm")
    general: float = flag(0.3, "share of base documents replayed inside an SFT mixture")
    statements: float = flag(0.45, "share of base documents that begin with a statement")
    in_context: bool = flag(False, "parallel only: all SFT PLs of a problem in one answer")
    problems: int = flag(0, "use only the first PROBLEMS training problems; 0 uses all")
    eval_every: int = flag(500, "updates between two measurements of the held-out loss", least=1)
    eval_problems: int = flag(32, "held-out problems for the loss", least=1)
    save_every: int = flag(1000, "updates between two checkpoints", least=1)
    seed: int = flag(0, "seed of the initial weights and of the order of examples")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    layers: int = flag(4, "from scratch: layers", least=1)
    width: int = flag(128, "from scratch: width", least=1)
    heads: int = flag(4, "from scratch: query heads; half as many key/value heads", least=1)


def resolve(s: Settings) -> Settings:
    """The settings with the defaults that depend on the mixture filled in."""
    fresh = s.mixture == "base"
    return replace(
        s,
        model=s.model or ("" if fresh else "runs/base"),
        out=s.out or f"runs/{s.mixture}",
        tokens=s.tokens or (3_500_000 if fresh else 400_000),
        lr=s.lr or (3e-3 if fresh else 5e-4),
    )


def fresh_model(s: Settings, tokenizer: Tokenizer) -> Llama:
    """A Llama of the size the flags ask for; the feed-forward is 3 widths wide."""
    config = Config(
        vocab_size=tokenizer.size, hidden_size=s.width, intermediate_size=3 * s.width, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=max(1, s.heads // 2), head_dim=s.width // s.heads,
        bos_token_id=tokenizer.bos, eos_token_id=list(tokenizer.stops),
    )  # fmt: skip
    return Llama(config).init_weights(s.seed)


def held_out_rows(s: Settings, tokenizer: Tokenizer, languages: Sequence[str]) -> dict[str, list[Row]]:
    """Rows of held-out problems with known wordings, by PL."""
    records = [r for r in data.read_split(s.data, "eval") if not r.get("difficulty", {}).get("new")]
    rows = defaultdict(list)
    for record in records[: s.eval_problems]:
        for language in set(languages) & set(record["solutions"]):
            e = data.example(tokenizer, record, [language], "held-out")
            rows[language].append((e.tokens, e.start))
    return rows


@torch.no_grad()
def held_out_losses(model: Llama, held: dict[str, list[Row]], s: Settings, pad: int) -> dict[str, float]:
    """Mean negative log-prob per trained token, by PL."""
    losses = {}
    for language, rows in sorted(held.items()):
        total = 0.0
        for part in micro_batches([len(tokens) for tokens, _ in rows], s.micro_tokens):
            total -= float(model(*collate([rows[i] for i in part], pad, s.device))[0].sum())
        losses[language] = round(total / trained_tokens(rows), 4)
    return losses


def accumulate(model: Llama, rows: Sequence[Row], s: Settings, pad: int) -> float:
    """Adds the gradient of the mean loss over all trained tokens of `rows`; returns that loss."""
    count, total = trained_tokens(rows), 0.0
    for part in micro_batches([len(tokens) for tokens, _ in rows], s.micro_tokens):
        logprobs, _ = model(*collate([rows[i] for i in part], pad, s.device))
        loss = -logprobs.sum() / count
        loss.backward()
        total += loss.item()
    return total


def train(s: Settings) -> None:
    """Trains until `s.tokens` tokens are seen, resuming a run that stopped.

    The tokenizer is the starting model's own; only a model from scratch takes the corpus's.
    """
    roles, records = data.read_roles(s.data), data.read_split(s.data, "train")[: s.problems or None]
    with Run(s.out, s) as run:
        checkpoint, state = run.start()
        source = checkpoint or (
            starting_point(s.model, "train one with `python sft.py --mixture base`") if s.model else None
        )
        tokenizer = Tokenizer(source or s.data)
        model = load(source, s.device, torch.float32) if source else fresh_model(s, tokenizer).to(s.device)
        mixture = Mixture(
            s.mixture, records, tokenizer, roles.sft, roles.everything, s.seed, s.general, s.statements, s.in_context
        )
        optimizer = make_optimizer(model, s.lr, s.weight_decay)
        if state:
            optimizer.load_state_dict(state["optimizer"])
        loop(s, run, model, optimizer, mixture, state.get("step", 0), state.get("tokens", 0))


def draw(mixture: Mixture, step: int, s: Settings, limit: int) -> list[Row]:
    """The rows of update number `step`. ValueError for one longer than the model's `limit`."""
    rows = [(e.tokens, e.start) for e in (mixture[i] for i in range(step * s.batch, (step + 1) * s.batch))]
    longest = max(rows, key=lambda row: len(row[0]))[0]
    if len(longest) > limit:
        text = mixture.tokenizer.decode(longest[:60])
        raise ValueError(
            f"{s.data}: an example of {len(longest)} tokens, the model takes {limit}; leave out the record that begins {text!r}"
        )
    return rows


def loop(s: Settings, run: Run, model: Llama, optimizer, mixture: Mixture, step: int, tokens: int) -> None:
    """The updates from `step` on, `tokens` tokens into the run."""
    tokenizer = mixture.tokenizer
    held = held_out_rows(s, tokenizer, mixture.everything)
    bar = tqdm(total=s.tokens, initial=tokens, unit="tok", unit_scale=True, desc=run.out.name, disable=None)
    while tokens < s.tokens and not run.stopping:
        began = time.perf_counter()
        rows = draw(mixture, step, s, model.config.max_position_embeddings)
        loss = accumulate(model, rows, s, tokenizer.pad)
        lr = s.lr * schedule(tokens / s.tokens, s.warmup)
        norm = apply_gradients(model, optimizer, lr, s.clip)
        seen = sum(len(ids) for ids, _ in rows)
        step, tokens = step + 1, tokens + seen
        figures = {
            "step": step,
            "tokens": tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": seen / (time.perf_counter() - began),
        }
        bar.update(seen)
        bar.set_postfix(step=step, loss=f"{loss:.3f}", lr=f"{lr:.1e}")
        if step % s.eval_every == 0:
            figures["held_out"] = held_out_losses(model, held, s, tokenizer.pad)
        run.log(**figures)
        if step % s.save_every == 0:
            run.save(step, model, tokenizer, optimizer, tokens=tokens)
    bar.close()
    run.save(step, model, tokenizer, optimizer, tokens=tokens)
    if tokens < s.tokens:
        run.stop(step)
    run.finish(updates=step, tokens=tokens, held_out=held_out_losses(model, held, s, tokenizer.pad))


def main(s: Settings) -> None:
    """Makes what is missing before it (corpus, base model), each said aloud, then trains."""
    s = resolve(s)
    if s.data == Settings.data and not (Path(s.data) / "languages.json").exists():
        print(f"{s.data}: no corpus yet; making the embedded one")
        data.make(data.CorpusSettings(out=s.data))
    if s.model == "runs/base" and not Path("runs/base/summary.json").exists():
        print("runs/base: no finished base model yet; training it first (minutes on a CPU)")
        train(resolve(Settings(mixture="base", data=s.data, device=s.device, seed=s.seed)))
    if not Run(s.out, s).finished():
        train(s)


if __name__ == "__main__":
    data.command(main, Settings, __doc__)
