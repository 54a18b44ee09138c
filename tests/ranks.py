"""What tests/test_ranks.py starts: updates to compare, and runs with a made-up reward.

torchrun --nproc-per-node 2 tests/ranks.py updates FOLDER     writes one file of weights a case
torchrun --nproc-per-node 2 tests/ranks.py sft | rl | eval FLAGS     the last two with `by_length`
"""

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.run
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import eval as evaluation
import rl
import sft
from model import load
from sft import Hardware, Learner, World

PAD, LR, CLIP = 0, 1e-3, 0.01
CASES = {  # of two ranks, and of four that are two replicas of two shards: stage, shard, micro_tokens, dtype
    2: list(itertools.product(("sft", "rl"), (1, 2), (20, 64, 1000), ("float64", "float32"))),
    4: list(itertools.product(("sft", "rl"), (2,), (20, 1000), ("float64",))),
}


def by_length(rollouts, tokenizer, box, known=None, progress=None):
    """A reward that a random model can get: an even number of different tokens, those of the prompt included."""
    for r in rollouts:
        r.verdict = "ok" if len({*r.prompt, *r.tokens}) % 2 == 0 else "wrong_answer"


def kept(run):
    """{parameter: its master and moments} of the newest checkpoint, the ranks' parts put together by torch."""
    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(sft.newest_checkpoint(run) / "trainer", file.name)
        return torch.load(file.name)


def place(run):
    return json.loads((sft.newest_checkpoint(run) / "trainer.json").read_text())


def metrics(run, timed=False):
    """The lines of a run's metrics.jsonl, without times and speeds unless `timed`."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    return [{k: v for k, v in json.loads(x).items() if timed or not k.endswith("_s")} for x in text.splitlines()]


def same(a, b):
    """Whether two dicts, perhaps of dicts, hold equal tensors by the same names."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else same(a[k], b[k]) for k in a
    )


def rows():
    """11 rows of very different lengths, so that no split of them is even."""
    g = torch.Generator().manual_seed(0)
    lengths = [5, 40, 3, 17, 60, 2, 9, 33, 21, 4, 12]
    return [(torch.randint(1, 96, (n,), generator=g).tolist(), 1 + n // 3) for n in lengths]


def rollouts():
    """The same rows as responses in groups of their own, half of which have no spread."""
    record = {"id": "r", "prompt": "", "tests": [], "solutions": {}}
    made = []
    for i, (ids, first) in enumerate(rows() + rows()[:1]):
        logprobs = [-4.0 + 0.3 * (i % 3)] * (len(ids) - first)
        made.append(evaluation.Rollout(record, "python", ids[:first], ids[first:], logprobs, True))
    advantages = [1.5, -0.5, -1.0, 0.0, 0.0, 0.0, 0.7, 0.7, -1.4, 0.0, 0.0, 0.0]
    return made, advantages


def updated(folder, world, stage, shard, micro, dtype):
    """The learner after one update from the weights in `folder`, and the norm of its gradient, which is clipped."""
    s = (rl.Settings if stage == "rl" else Hardware)(device="cpu", shard=shard, micro_tokens=micro, clip=CLIP)
    model = load(folder, dtype=getattr(torch, dtype), shard=lambda model: sft.shard_model(model, world, s))
    learner = Learner(model, world, s, 0.1, PAD)
    if stage == "sft":
        sft.accumulate(learner, rows())
        return learner, learner.step(LR)
    made, advantages = rollouts()
    share = len(made) // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)  # whole groups of three
    return learner, rl.update(learner, made[mine], advantages[mine], LR, s, None)["grad_norm"]


def outcome(learner, norm):
    """What an update leaves, as tensors by name.

    The moments are the clipped gradient's, whose scale AdamW's first step would hide.
    """
    parts = {f"{kind} {name}": sft.whole(x) for name, state in learner.state().items() for kind, x in state.items()}
    return parts | {"norm": torch.tensor(norm)}


def replicas_are_equal(learner):
    """Whether the parts of the weights that ranks hold in common are the same to the bit."""
    local = torch.cat([p.to_local().flatten() for p in learner.model.parameters()])
    parts = learner.world.gather([local])
    return all(torch.equal(part, parts[i % learner.s.shard]) for i, part in enumerate(parts))


def gradient_of_ddp(folder, world):
    """The gradient of the mean loss by torch's DistributedDataParallel, row by row, float64."""
    model = load(folder, dtype=torch.float64)
    replica, count = DistributedDataParallel(model), sft.trained_tokens(rows())
    padded = [*rows(), ([PAD, PAD], 2)]  # DDP, too, wants as many on every rank
    total = 0.0
    for row in world.deal(padded):
        tokens, targets, _ = sft.collate([row], PAD, "cpu")
        total = total - replica(tokens, targets)[0].sum() / count
    (total * world.size).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def ours_against_ddp(folder, world):
    learner = Learner(load(folder, dtype=torch.float64), world, Hardware(device="cpu", shard=1), 0.0, PAD)
    sft.accumulate(learner, rows())
    theirs = gradient_of_ddp(folder, world)
    for name, p in learner.model.named_parameters():
        torch.testing.assert_close(sft.whole(p.grad), theirs[name], rtol=1e-10, atol=1e-12)


def updates(folder):
    torch.set_num_threads(1)
    with World("cpu") as world:
        if world.size == 2:
            ours_against_ddp(folder, world)
        for case in CASES[world.size]:
            learner, norm = updated(folder, world, *case)
            assert replicas_are_equal(learner), case
            got = outcome(learner, norm)
            if world.rank == 0:
                torch.save(got, Path(folder) / f"{'-'.join(map(str, case))}.pt")


def fails(*_, **__):
    raise ValueError("this rank's own trouble")


# Where one rank can fail alone: in the optimizer step, and when rank 0 writes a checkpoint.
PLACES = {"step": (sft.Learner, "step"), "write": (sft, "save")}


def main(what, *flags):
    if what == "updates":
        return updates(*flags)
    if what != "sft":
        rl.grade = evaluation.grade = by_length
    if os.environ.get("FAIL_ON_RANK") == os.environ.get("RANK", ""):
        setattr(*PLACES[os.environ["FAIL_IN"]], fails)
    stage = {"rl": rl, "sft": sft, "eval": evaluation}[what]
    data.command(stage.main, stage.Settings, stage.__doc__, flags)


def print_into(output):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def agent(output, environment, arguments):
    """torchrun, in a process of its own."""
    print_into(output)
    os.environ |= environment | {"OMP_NUM_THREADS": "1"}
    torch.distributed.run.main(arguments)


def member(output, rank, size, arguments):
    """One of `size` ranks, in a process that torchrun did not start."""
    print_into(output)
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        dist.init_process_group("gloo", store=dist.FileStore(f"{output}.store", size), rank=rank, world_size=size)
    main(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
