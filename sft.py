"""The supervised stage: trains a model on a mixture of data.py, from scratch (`base`) or further.

    python sft.py --mixture base          # the stand-in for pre-training, into runs/base
    python sft.py                         # Parallel-SFT from runs/base, into runs/parallel
    python sft.py --mixture source        # the arm without parallel programs, into runs/source
    torchrun --nproc-per-node 8 sft.py --model DIR --data DIR     # the same on 8 GPUs

A run folder holds `step-N`, the newest checkpoint (weights and tokenizer in Hugging Face's layout, trainer.json,
and in trainer/ the masters and moments, each rank's part in a file), metrics.jsonl, settings.json, and summary.json
once the run is finished. Called again, a run goes on from there, on any number of ranks; Ctrl-C saves first.

Our choices, where the Parallel-SFT paper leaves freedom or is silent:

1. The loss is the mean negative log-prob per trained token of the whole update: one denominator,
   however the update is cut into ranks and micro-batches. Trained are the response and its stop
   token; in `base` documents every token but the first.
2. A run ends after a number of *tokens*, prompts included, so that all arms see equally many; the
   learning rate (linear warm-up, then a cosine to a tenth) follows the same count.
3. AdamW with betas (0.9, 0.95); weight decay on matrices other than embeddings; gradients clipped by global norm.
4. A micro-batch is one row of whole sequences, packed without any padding; no sequence sees another.
5. Many ranks are FSDP2 (`fully_shard`) on a mesh of replicas x shards: with --shard 1 every rank holds
   the whole model, which is data parallelism as in DDP; with --shard 0 one copy is split over all.
   Masters, gradients and optimizer are float32; with bfloat16 the weights are cast as they are gathered,
   and so are the checkpoint's; the masters are the trainer's own.

Axes: T tokens of a packed row.

In this order: rows to tensors; ranks; the optimizer; `Learner`, a model in training, and `Run`, a run folder with its
checkpoints, which rl.py uses too; and the stage itself: settings, `update`, the loop.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads leave the cores to others

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data
from data import FORMATS, Example, Mixture, Tokenizer, flag
from model import IGNORE, Config, Llama, load, save, whole

MicroBatch = tuple[Tensor, Tensor, Tensor]  # tokens, targets, start: see `collate`


# --------------------------------------------------------------------------------------------------
# Rows to tensors


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of `lengths` in groups that sum to at most `limit` each (or hold one that is longer).

    Best fit, longest first: each goes where it leaves the least room (Johnson et al. 1974, at most
    11/9 of the best possible number of groups, and a few percent in practice).
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [g for g, free in enumerate(room) if free >= lengths[i]]
        if not fits:
            groups.append([])
            room.append(limit)
        best = min(fits, key=lambda g: room[g], default=len(groups) - 1)
        groups[best].append(i)
        room[best] -= lengths[i]
    return groups


def collate(rows: Sequence[Example], pad: int, device) -> MicroBatch:
    """tokens, targets and start, each (1, T) int64, of `rows` one after the other.

    targets[0, t] is the token after tokens[0, t], or IGNORE unless it is one of the row's trained
    ones; start[0, t] is where the row begins. No rows at all give one pad that trains nothing.
    """
    rows = rows or [([pad, pad], 2)]
    packed = np.full((3, 1, sum(len(ids) - 1 for ids, _ in rows)), IGNORE)
    (tokens,), (targets,), (start,) = packed
    at = 0
    for ids, first in rows:
        end = at + len(ids) - 1
        tokens[at:end], targets[at + first - 1 : end], start[at:end] = ids[:-1], ids[first:], at
        at = end
    return tuple(to_device(packed, device))


def to_device(x: np.ndarray, device) -> Tensor:
    """x as a tensor on `device`; to a GPU from pinned memory, so that the CPU need not wait until it is there."""
    x = torch.from_numpy(x)
    return (x.pin_memory() if torch.device(device).type == "cuda" else x).to(device, non_blocking=True)


def trained_tokens(rows: Sequence[Example]) -> int:
    return sum(len(tokens) - first for tokens, first in rows)


# --------------------------------------------------------------------------------------------------
# Ranks


class World:
    """The ranks that train together: those that torchrun started, or this process alone.

    Entering, leaving, `sum` and `gather` are collectives: every rank calls them, in the same order. Lesser ranks print
    nothing to standard output; an error names its rank. `device` is this rank's: of "cuda", the local one.
    """

    def __init__(self, device: str):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(device)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
        except (AttributeError, RuntimeError) as error:  # the former from a build of torch without CUDA
            raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None

    def __enter__(self):
        # A rank that fails ends the others through torchrun; the limit is for a host that vanishes.
        if not dist.is_initialized():
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if "RANK" not in os.environ else {}
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=30), **alone)
        if self.rank:
            self.stdout, sys.stdout = sys.stdout, open(os.devnull, "w")
        return self

    def __exit__(self, kind, *_):
        if self.rank:
            sys.stdout.close()
            sys.stdout = self.stdout
        if kind is None or self.size == 1:  # after an error the others may wait where this rank never comes
            dist.destroy_process_group()

    def dtype(self, precision: str) -> torch.dtype | None:
        """Of `precision`; "" is bfloat16 on a GPU and None, the weights' own, elsewhere."""
        if not precision:
            return torch.bfloat16 if self.device.type == "cuda" else None
        return getattr(torch, precision)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, items: list) -> list:
        """The items of all ranks, those of rank 0 first."""
        if self.size == 1:
            return items
        parts = [None] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def deal(self, items: Sequence) -> Sequence:
        """This rank's share of items that every rank has: each size-th."""
        return items[self.rank :: self.size]


def shard_model(model: Llama, world: World, s: "Hardware") -> Llama:
    """`model`, its parameters split over groups of `s.shard` ranks and replicated over the groups.

    FSDP2: every block, and what is outside of the blocks, is gathered (cast to what `s` computes in) when it is
    needed and forgotten after; gradients are reduced in the parameters' own dtype, the masters'. One
    process that computes in that needs none of it and gets `model` as it is. shard 0 means all ranks.
    ValueError if it does not divide them.
    """
    master, shard = next(model.parameters()).dtype, s.shard or world.size
    dtype = world.dtype(s.precision) or master
    if world.size % shard:
        raise ValueError(f"--shard {shard}: does not divide the number of ranks, {world.size}")
    if isinstance(model, FSDPModule) or (world.size == 1 and dtype == master):
        return model
    mesh = init_device_mesh(world.device.type, (world.size // shard, shard), mesh_dim_names=("replicas", "shards"))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=master))
    return model


# --------------------------------------------------------------------------------------------------
# Optimizer


def make_optimizer(model: Llama, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, but neither norms nor embeddings."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() <= 1 or "embed_tokens" in n]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for p in model.parameters():  # its first step would make them; but a checkpoint may come before it
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def schedule(progress: float, warmup: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]: linear warm-up, cosine to a tenth."""
    if progress < warmup:
        return min(1.0, max(progress, 1e-3) / warmup)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))


# --------------------------------------------------------------------------------------------------
# Learner: a model in training on all ranks. rl.py uses the same.

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Hardware:
    """The flags that say how an update is computed, which sft.py and rl.py share."""

    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "torch device")
    precision: str = flag("", "what to compute in (default: bfloat16 on a GPU, float32 on a CPU)", choices=PRECISIONS)
    shard: int = flag(0, "ranks that share a copy of the weights: 1 is data parallelism, 0 means all", least=0)
    micro_tokens: int = flag(1024, "tokens in one forward pass on each rank; a longer sequence goes alone", least=1)
    recompute: bool = flag(False, "recompute activations in the backward pass: a third more work, far less memory")
    clip: float = flag(1.0, "largest global gradient norm; 0 sets no limit", least=0)


class Learner:
    """A model and its optimizer on all ranks: splits rows into micro-batches, adds up gradients, steps.

    With more than one rank, or in bfloat16, `model` is sharded: call it, but do not read its weights.
    """

    def __init__(self, model: Llama, world: World, s: Hardware, weight_decay: float, pad: int):
        self.dtype = world.dtype(s.precision) or next(model.parameters()).dtype  # it computes in this
        for block in model.model.layers:
            block.recompute = s.recompute
        self.model = shard_model(model, world, s)
        self.optimizer = make_optimizer(self.model, weight_decay)
        self.world, self.s, self.pad = world, s, pad

    def micro_batches(self, rows: Sequence[Example], shared: bool = False) -> Iterator[tuple[list[int], MicroBatch]]:
        """(indices, tensors) of each micro-batch of `rows`: this rank's own, or `shared` out if all ranks have them.

        All ranks get as many as the one with the most: gathering and reducing needs every rank, so one
        that has no rows left computes a pad that trains nothing. Gradients add up where they are
        sharded; replicas exchange theirs after the last.
        """
        groups = pack([len(tokens) - 1 for tokens, _ in rows], self.s.micro_tokens)
        groups = self.world.deal(groups) if shared else groups
        rounds = max(self.world.gather([len(groups)]))
        for i in range(rounds):
            if isinstance(self.model, FSDPModule):
                self.model.set_requires_all_reduce(i == rounds - 1)
            group = groups[i] if i < len(groups) else []
            yield group, collate([rows[j] for j in group], self.pad, self.world.device)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the sum of all ranks' losses (FSDP2 takes their mean)."""
        (loss * self.world.size if isinstance(self.model, FSDPModule) else loss).backward()

    def step(self, lr: float) -> float:
        """Clips by global norm, steps with learning rate `lr`, clears. Returns the norm before clipping.

        ValueError on every rank, and no step, if that is not finite: the weights would be lost.
        """
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.s.clip or math.inf)))
        if not math.isfinite(norm):
            raise ValueError(f"the gradient's norm is {norm}: lower --lr; the last checkpoint is kept")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Each parameter's master and moments by its name, this rank's part of them: not copies."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # what is outside of the blocks stays gathered after a forward pass without a backward
        return {name: {"master": p.detach(), **self.optimizer.state[p]} for name, p in self.model.named_parameters()}

    def save(self, folder: Path) -> None:
        """Writes the weights, as they are computed with, and `state` into `folder`. All ranks call it, and `restore`."""
        state = self.state()
        save(self.model, folder, dtype=self.dtype)
        checkpoint.save(state, checkpoint_id=folder / "trainer")

    def restore(self, folder: Path) -> None:
        """Takes up what `save` wrote, on any number of ranks."""
        try:
            checkpoint.load(self.state(), checkpoint_id=folder / "trainer")
        except CheckpointException as error:
            raise broken(folder / "trainer", error) from None


def cause(error: BaseException) -> BaseException:
    """`error`, or, of torch.distributed.checkpoint's, what went wrong on the first rank that failed."""
    return next(iter(getattr(error, "failures", {0: (error, None)}).values()))[0]


def broken(path: Path, error: BaseException) -> ValueError:
    """The error for `path`, a part of a checkpoint, that cannot be read."""
    return ValueError(f"{path}: not whole ({cause(error)}); delete {path.parent}, or give another --out")


# --------------------------------------------------------------------------------------------------
# Runs: metrics, checkpoints, resume. rl.py uses the same.


def checkpoints(folder: Path) -> list[Path]:
    """The `step-N` folders of a run. Copies with other names are their owner's."""
    return [p for p in folder.glob("step-*") if p.name[5:].isdigit()]


def newest_checkpoint(folder: str | Path) -> Path | None:
    """`folder` if it is a checkpoint, else its newest whole `step-N`, else None."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    return max(checkpoints(folder), key=lambda p: int(p.name[5:]), default=None)


def starting_point(folder: str | Path, advice: str) -> Path:
    """The checkpoint to start from in `folder`; ends with `advice` if there is none.

    A run that is not finished serves too, but not unnoticed.
    """
    folder = Path(folder)
    if not (checkpoint := newest_checkpoint(folder)):
        data.fail(f"{folder}: holds no checkpoint, neither config.json nor step-N; {advice}")
    if (folder / "settings.json").exists() and not (folder / "summary.json").exists():
        print(f"note: the run in {folder} is not finished; going on from its {checkpoint.name}")
    return checkpoint


def open_checkpoint(folder: Path, world: World, s, train: bool = False) -> tuple[Llama, Tokenizer]:
    """The model and the tokenizer in `folder`, as the settings `s` want them; ValueError if they do not belong together.

    To `train` it is float32 and sharded, and each rank reads its own rows alone; else it is whole.
    The model's config gets the tokenizer's size, beyond which no id is drawn or scored, and its stop tokens: that of
    a base model names no end of a turn, and other engines would not stop where the checkpoints saved from it do.
    """
    how = (torch.float32, lambda model: shard_model(model, world, s)) if train else (world.dtype(s.precision),)
    tokenizer, model = Tokenizer(folder, s.format), load(folder, world.device, *how)
    if tokenizer.size > (rows := model.config.vocab_size):
        raise ValueError(f"{tokenizer.path}: has {tokenizer.size} tokens, the model {rows}; take the model's own")
    model.config.tokenizer_size = tokenizer.size
    model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos, sorted(tokenizer.stops)
    return model, tokenizer


def fitting(
    tokenizer: Tokenizer, limit: int, records: Sequence[dict], asked: Callable[[dict], Iterable[str]], what: str,
    budget: int = 0,
) -> list[dict]:  # fmt: skip
    """The records (`what` names them) whose prompt and answer fit into `limit` positions; at most half may be too long.

    `asked`: the PLs in which a record is to be answered ("" for general data). The answer has `budget` tokens, or with 0
    as many as the record's program, with comments, needs. Only texts of more bytes than positions are encoded: a token
    has at least one byte, and a format's template is longer than the tokens that it puts around a text.
    """

    def fault(record: dict) -> str:
        """Why it does not fit; "" if it does."""
        programs = record["solutions"] | record.get("commented", {})
        prompt = max([record["prompt"], *record.get("prompts", {}).values()], key=len)  # any of them may be asked
        for language in asked(record):
            text = "" if budget else data.answer(programs[language], language) if language else record["answer"]
            around = data.ask(prompt, language) + tokenizer.template
            if len((around + text).encode()) + budget > limit:
                length, new = len(tokenizer.prompt(prompt, language)), budget or len(tokenizer.encode(text)) + 1
                if length + new > limit:
                    return f"a prompt of {length} tokens and {new} new ones, the model takes {limit}"
        return ""

    mend = f"give shorter ones{', allow fewer new tokens' if budget else ''} or take a model that takes more"
    return data.leave_out(records, {r["id"]: why for r in records if (why := fault(r))}, what, mend, most=0.5)


def digest(folder: str | Path, splits: Sequence[str], *files: Path) -> str:
    """A hash of the bytes of `splits` and of languages.json in a data folder, and of `files`."""
    paths = [p for name in splits for p in sorted(Path(folder).glob(f"{name}.jsonl*"))]
    total = hashlib.sha256()
    for path in (*paths, Path(folder) / "languages.json", *files):
        total.update(path.read_bytes())
    return total.hexdigest()


# Settings that may differ when a run is taken up again.
FREE = {"device", "shard", "micro_tokens", "recompute", "workers", "forkserver", "out", "rows"}
FREE |= {"eval_every", "save_every", "eval_languages", "eval_problems", "eval_tokens"}


def as_text(figures: dict) -> str:
    """Figures by name as a line to read; a dict among them goes in brackets: a 1, b (c 2, d 3)."""
    return ", ".join(f"{k} ({as_text(v)})" if isinstance(v, dict) else f"{k} {v}" for k, v in figures.items())


class Run:
    """A run folder, the same for all ranks. `stopping` turns true on Ctrl-C or SIGTERM: finish the step, save.

    A checkpoint is written under a temporary name and renamed, so that a half-written one is never
    found. The metrics file is cut back to where the checkpoint left it, so that none stands twice.
    What is done so far: `step`, examples or problems `drawn`, `tokens` seen, prompts included (RL: response tokens
    trained), `seconds` of each phase.
    """

    def __init__(self, out: str | Path, settings, world: World):
        self.out, self.settings, self.world, self.stopping = Path(out), settings, world, False
        self.metrics, self.summary = self.out / "metrics.jsonl", self.out / "summary.json"
        self.step, self.drawn, self.tokens, self.seconds = 0, 0, 0, defaultdict(float)
        self.saved, self.locked, self.data = None, None, ""

    def __enter__(self):
        def stop(*_):
            if self.stopping and self.world.size == 1:  # torchrun sends its ranks the signal twice
                raise KeyboardInterrupt
            self.stopping = True
            if self.world.rank == 0:
                tqdm.write("stopping after this step; once more to stop at once", file=sys.stderr)

        self.handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.locked:
            self.locked.close()

    @contextlib.contextmanager
    def phase(self, name: str):
        """Counts the seconds of what is done within; they are in `seconds` of what it yields, too."""
        began, this = time.perf_counter(), SimpleNamespace()
        yield this
        this.seconds = time.perf_counter() - began
        self.seconds[name] += this.seconds

    def lock(self) -> None:
        """Keeps other processes out of the folder until this one ends, however it ends.

        ValueError if one is there: killing torchrun, say, leaves its ranks running.
        """
        if self.world.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.locked = open(self.out / ".lock", "w")  # noqa: SIM115
            try:
                fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.out}: another process trains here; wait for it, or end it") from None

    def finished(self) -> bool:
        """Whether the run is over; says so. ValueError if it had other settings."""
        if self.summary.exists():
            self.check_settings(json.loads((self.out / "settings.json").read_text()))
            print(f"{self.out}: finished already; give another --out, or delete the folder, to train anew")
        return self.summary.exists()

    def start(self, *splits: str, files: Sequence[Path] = ()) -> Path | None:
        """The newest checkpoint, from which to go on, or None for a new run, which reads `splits` and `files`.

        ValueError if the checkpoint was made with other settings or other data: it would not be the same run.
        """
        self.lock()
        self.data = digest(self.settings.data, splits, *files)
        newest = newest_checkpoint(self.out)
        if len(seen := set(self.world.gather([newest and newest.name]))) > 1:
            raise ValueError(f"{self.out}: the newest checkpoint is {seen} on the ranks; all hosts must share --out")
        metrics = self.take_up(newest) if newest else 0
        self.write_text("settings.json", json.dumps(asdict(self.settings), indent=2))
        if self.world.rank == 0:
            for path in self.out.glob(".step-*.tmp"):  # of a save that was killed
                shutil.rmtree(path)
            with open(self.metrics, "ab") as file:
                file.truncate(min(file.tell(), metrics))
        return newest

    def take_up(self, folder: Path) -> int:
        """Goes to where the run was at a checkpoint; returns the bytes of its metrics."""
        path = folder / "trainer.json"
        try:
            state = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise broken(path, error) from None
        self.check_settings(state["settings"])
        if state["data"] != self.data:
            raise ValueError(f"{self.out}: began with other records in {self.settings.data}; give another --out")
        self.step, self.drawn, self.tokens = (state[n] for n in ("step", "drawn", "tokens"))
        self.seconds.update(state["seconds"])
        self.saved = self.step
        return state["metrics_bytes"]

    def check_settings(self, before: dict) -> None:
        """ValueError if the run had settings `before` that are not its own now."""
        settings = json.loads(json.dumps(asdict(self.settings)))  # as they look after that
        for name, old in before.items():
            if old != (new := settings.get(name)) and name not in FREE:
                name = name.replace("_", "-")
                raise ValueError(f"{self.out}: began with --{name} {old}, not {new}; give that, or another --out")

    def log(self, measure: str, **figures) -> None:
        """Appends the step and its figures to metrics.jsonl; prints those held out, which are of `measure`."""
        if self.world.rank:
            return
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in figures.items()}
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"step": self.step} | rounded) + "\n")
        if "held_out" in figures:
            tqdm.write(f"{self.out} step {self.step}: {measure} on dev: {as_text(figures['held_out'])}")

    def write_text(self, name: str, text: str) -> None:
        """A file in the run folder."""
        if self.world.rank == 0:
            data.write_atomically(self.out / name, lambda p: p.write_text(text))

    def save(self, learner: Learner, tokenizer: Tokenizer) -> None:
        """Writes checkpoint step-N, each rank its part, and removes the older ones."""
        if self.step == self.saved:  # a moment ago, and nothing was learned since
            return
        temporary = self.out / f".step-{self.step}.tmp"
        with self.phase("save"):
            try:
                learner.save(temporary)
                if self.world.rank == 0:
                    self.complete(temporary, tokenizer)
            except (CheckpointException, SafetensorError, OSError) as error:  # of these each writer has its own
                raise ValueError(f"{temporary}: {cause(error)}; make room, and the same command goes on") from None
        self.saved = self.step

    def complete(self, temporary: Path, tokenizer: Tokenizer) -> None:
        """Adds to what the ranks wrote where the run is, and gives it its name."""
        state = {n: getattr(self, n) for n in ("step", "drawn", "tokens", "seconds", "data")}
        state |= {"metrics_bytes": self.metrics.stat().st_size, "settings": asdict(self.settings)}
        tokenizer.save(temporary)
        (temporary / "trainer.json").write_text(json.dumps(state))
        for path in temporary.glob("*.*"):  # on the disk, as trainer/ is, before its name says that it is whole
            with open(path) as file:
                os.fsync(file.fileno())
        older = checkpoints(self.out)
        os.replace(temporary, self.out / f"step-{self.step}")
        for old in older:
            shutil.rmtree(old)

    def stop(self):
        """Ends the program after Ctrl-C, as one that was interrupted."""
        print(f"{self.out}: stopped after step {self.step}; the same command goes on from there")
        sys.exit(130)

    def finish(self, **totals) -> None:
        """Prints the line of totals, with tokens per second of training, and writes summary.json: the run is finished."""
        totals |= {"tokens": self.tokens, "tokens_per_s": round(self.tokens / self.seconds["train"])}
        totals["seconds"] = {phase: round(t, 1) for phase, t in self.seconds.items()}
        self.write_text(self.summary.name, json.dumps(totals) + "\n")
        print(f"{self.out}: " + as_text(totals).replace("_", " "))
        if self.world.sum(self.stopping)[0]:  # told too late to stop before: but what follows must not start
            sys.exit(130)


# --------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Settings(Hardware):
    mixture: str = flag("parallel", "what to train on", choices=tuple(data.MIXTURES))
    data: str = flag("runs/data", "folder that `python data.py make` wrote; the default one is made if it is missing")
    model: str = flag("", "checkpoint or run folder to start from (default: runs/base, made if missing; base: none)")
    out: str = flag("", "run folder (default: runs/MIXTURE)")
    format: str = flag("", "prompt format (default: the starting model's own)", choices=tuple(FORMATS))
    tokens: int = flag(0, "tokens to train on, prompts included; 0: 1,750,000 for base, else 2,000,000", least=0)
    batch: int = flag(1024, "tokens per update, over all ranks; the last sequence may go beyond", least=1)
    lr: float = flag(0.0, "peak learning rate; 0: 3e-3 for base, else 1e-3", least=0)
    warmup: float = flag(0.05, "share of the run over which the learning rate rises", least=0, most=1)
    weight_decay: float = flag(0.1, "AdamW's decay of matrices", least=0)
    replay: float = flag(0.3, "share of an arm's examples that are base documents", least=0, most=1)
    statements: float = flag(0.7, "share of base documents that begin with a statement", least=0, most=1)
    general: str = flag("", 'JSONL file of general data to mix in: any {"prompt": text, "answer": text} a line')
    general_share: float = flag(0.1, "share of the examples that is general; replay is of the rest", least=0, most=1)
    problems: int = flag(0, "use only the first PROBLEMS training problems; 0 uses all", least=0)
    eval_every: int = flag(500, "updates between two measurements of the held-out loss", least=1)
    eval_problems: int = flag(32, "held-out problems for the loss", least=1)
    save_every: int = flag(200, "updates between two checkpoints", least=1)
    seed: int = flag(0, "seed of the initial weights and of the order of examples")
    layers: int = flag(4, "from scratch: layers", least=1)
    width: int = flag(128, "from scratch: width", least=1)
    heads: int = flag(4, "from scratch: query heads; half as many key/value heads", least=1)


def resolve(s: Settings) -> Settings:
    """The settings with the defaults that depend on the mixture filled in."""
    model, tokens, lr = ("", 1_750_000, 3e-3) if s.mixture == "base" else ("runs/base", 2_000_000, 1e-3)
    out = s.out or f"runs/{s.mixture}"
    return replace(s, model=s.model or model, out=out, tokens=s.tokens or tokens, lr=s.lr or lr)


def fresh(s: Settings, world: World) -> tuple[Llama, Tokenizer]:
    """A Llama of the size the flags ask for, the feed-forward 3 widths wide; and the corpus's tokenizer."""
    tokenizer = Tokenizer(s.data, s.format)
    config = Config(
        vocab_size=tokenizer.size, hidden_size=s.width, intermediate_size=3 * s.width, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=max(1, s.heads // 2), head_dim=s.width // s.heads,
        bos_token_id=tokenizer.bos, eos_token_id=list(tokenizer.stops),
    )  # fmt: skip
    return Llama(config).init_weights(s.seed).to(world.device), tokenizer


def choose_examples(m: Mixture, limit: int) -> Mixture:
    """The mixture without what lacks the PLs that it needs, or has more tokens than `limit`."""

    def chosen(records: Sequence[dict], shown: Callable, what: str) -> list[dict]:
        there = {r["id"]: ", ".join(r["solutions"]) or "none" for r in records if not shown(r)}
        lacking = {name: f"too few programs in SFT PLs for {m.name}; it has {own}" for name, own in there.items()}
        records = data.leave_out(records, lacking, what, "add programs, or give another --mixture")
        return fitting(m.tokenizer, limit, records, shown, what)

    return replace(
        m,
        records=chosen(m.records, m.shown, "training problems"),
        documents=chosen(m.documents, itemgetter("solutions"), "base documents"),
        general=chosen(m.general, lambda _: [""], "general examples"),
    )


def held_out_rows(s: Settings, tokenizer: Tokenizer, limit: int) -> dict[str, list[Example]]:
    """Rows of dev problems in the words of each PL's own community, by PL."""
    records = fitting(tokenizer, limit, data.read_split(s.data, "dev"), itemgetter("solutions"), "held-out problems")
    rows = defaultdict(list)
    for record in data.first_kind(records)[: s.eval_problems]:
        for language in record["solutions"]:
            rows[language].append(data.example(tokenizer, record, data.statement(record, language), language))
    return rows


@torch.no_grad()
def held_out_losses(learner: Learner, held: dict[str, list[Example]]) -> dict[str, float]:
    """Mean negative log-prob per trained token, by PL."""
    losses = {}
    for language, rows in sorted(held.items()):
        total = 0.0
        for _, (tokens, targets, start) in learner.micro_batches(rows, shared=True):
            total -= learner.model(tokens, targets, start=start)[0].sum().item()
        losses[language] = round(learner.world.sum(total)[0] / trained_tokens(rows), 4)
    return losses


def accumulate(learner: Learner, rows: Sequence[Example]) -> Tensor:
    """Adds the gradient of the mean loss over all trained tokens of `rows`, the same on every rank.

    Returns this rank's part of that mean, () float64: the parts of all ranks add up to it. Read it after `step`,
    since a GPU is to have its next work before it is done.
    """
    count, total = trained_tokens(rows), 0.0
    for _, (tokens, targets, start) in learner.micro_batches(rows, shared=True):
        loss = -learner.model(tokens, targets, start=start)[0].sum() / count
        learner.backward(loss)
        total += loss.detach().double()
    return total


def next_rows(mixture: Mixture, run: Run, s: Settings) -> list[Example]:
    """The rows of the next update: examples until (step + 1) * batch tokens are seen in all, at least one.

    So every mixture gets the same number of updates out of the same number of tokens.
    """
    rows, seen = [], run.tokens
    while not rows or seen < (run.step + 1) * s.batch:
        rows.append(mixture[run.drawn + len(rows)])
        seen += len(rows[-1].tokens)
    return rows


def update(learner: Learner, rows: Sequence[Example], lr: float, run: Run) -> tuple[dict, bool]:
    """One optimizer step: (its figures, whether any rank was told to stop)."""
    seen = sum(len(ids) for ids, _ in rows)
    with run.phase("train") as training:
        loss = accumulate(learner, rows)
        norm = learner.step(lr)
        loss, stopping = learner.world.sum(float(loss), run.stopping)
    run.step, run.tokens, run.drawn = run.step + 1, run.tokens + seen, run.drawn + len(rows)
    return {"loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_s": seen / training.seconds}, stopping > 0


def loop(s: Settings, run: Run, learner: Learner, mixture: Mixture) -> None:
    """The updates, from where `run` is."""
    tokenizer, stopping = mixture.tokenizer, False
    held = held_out_rows(s, tokenizer, learner.model.config.max_position_embeddings)
    updates = math.ceil(s.tokens / s.batch)
    quiet = run.world.rank > 0 or None
    bar = tqdm(total=s.tokens, initial=run.tokens, unit="tok", unit_scale=True, desc=run.out.name, disable=quiet)
    while run.step < updates and not stopping:
        with run.phase("data"):
            rows = next_rows(mixture, run, s)
        lr = s.lr * schedule(run.step / updates, s.warmup)
        figures, stopping = update(learner, rows, lr, run)
        bar.update(run.tokens - bar.n)
        bar.set_postfix(step=run.step, loss=f"{figures['loss']:.3f}", lr=f"{lr:.1e}")
        if run.step % s.eval_every == 0:
            with run.phase("evaluate"):
                figures["held_out"] = held_out_losses(learner, held)
        run.log("loss", tokens=run.tokens, **figures)
        if run.step % s.save_every == 0:
            run.save(learner, tokenizer)
    bar.close()
    run.save(learner, tokenizer)
    if run.step < updates:
        run.stop()
    with run.phase("evaluate"):
        losses = held_out_losses(learner, held)
    run.finish(updates=run.step, held_out=losses)


def train(s: Settings, world: World) -> None:
    """Trains until `s.tokens` tokens are seen, resuming a run that stopped.

    The tokenizer is the starting model's own; only a model from scratch takes the corpus's.
    """
    with Run(s.out, s, world) as run:
        if run.finished():
            return
        roles, base = data.read_roles(s.data), s.mixture == "base"
        records = [] if base else data.read_split(s.data, "train")[: s.problems or None]
        documents = data.read_split(s.data, "base") if s.replay or base else []
        general = data.read_records(s.general, general=True) if s.general else []
        source = newest = run.start("base", "train", "dev", files=[Path(s.general)] * bool(s.general))
        if s.model and not newest:
            source = starting_point(s.model, "train one with `python sft.py --mixture base`")
        model, tokenizer = open_checkpoint(source, world, s, train=True) if source else fresh(s, world)
        shares = s.replay, s.statements, general, s.general_share if general else 0.0
        mixture = Mixture(s.mixture, records, documents, tokenizer, roles.sft, s.seed, *shares)
        mixture = choose_examples(mixture, model.config.max_position_embeddings)
        learner = Learner(model, world, s, s.weight_decay, tokenizer.pad)
        if newest:
            learner.restore(newest)
        loop(s, run, learner, mixture)


def main(s: Settings) -> None:
    """Makes what is missing before it (corpus, base model), each said aloud, then trains."""
    s = resolve(s)
    with World(s.device) as world:
        if s.data == Settings.data and not (Path(s.data) / "languages.json").exists():
            print(f"{s.data}: no corpus yet; making the embedded one")
            if world.rank == 0:
                data.make(data.CorpusSettings(out=s.data))
        world.sum(0)  # nobody reads before it is written
        if s.model == "runs/base" and not Path("runs/base/summary.json").exists():
            print("runs/base: no finished base model yet; training it first (minutes on a CPU)")
            train(resolve(Settings(mixture="base", data=s.data, device=s.device, seed=s.seed)), world)
        train(s, world)


if __name__ == "__main__":
    data.command(main, Settings, __doc__)
