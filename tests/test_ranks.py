"""Two ranks under torchrun: the same update as one process, bit-equal replicas, exact resume, one rank's failure."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch

import sft
from model import Config, Llama, load, save

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*arguments, ranks=2, torchrun=("--standalone",), **environment):
    command = [sys.executable]
    if ranks > 1 or environment:
        command += ["-m", "torch.distributed.run", *torchrun, f"--nproc-per-node={ranks}"]
    command += [HERE / "ranks.py", *map(str, arguments)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT | environment, start_new_session=True, **output)


def finish(process, code=0):
    """What it printed."""
    try:
        text, _ = process.communicate(timeout=240)
    finally:
        kill(process)
    assert (process.returncode == 0) == (code == 0), text
    return text


def parent(folder):
    with contextlib.suppress(OSError):  # it may have ended just now
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])


def descendants(pid):
    """torchrun puts its ranks into sessions of their own, where a signal to its group does not reach them."""
    children = [int(p.name) for p in Path("/proc").glob("[0-9]*") if parent(p) == pid]
    return children + [d for child in children for d in descendants(child)]


def kill(process):
    """As a power cut would: every process at once, without a chance to save."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("count", ranks.CASES)
def test_an_update_is_the_same_for_every_split_into_ranks_and_micro_batches(tmp_path, count):
    config = Config(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    save(Llama(config).init_weights(0), tmp_path)
    # It compares with DistributedDataParallel, and the replicas with each other.
    finish(start("updates", tmp_path, ranks=count))
    torch.set_num_threads(1)
    for case in ranks.CASES[count]:
        stage, _, _, dtype = case
        with sft.World("cpu") as world:
            whole = ranks.outcome(*ranks.updated(tmp_path, world, stage, 1, 10**9, dtype))
        got = torch.load(tmp_path / f"{'-'.join(map(str, case))}.pt")
        tolerance = 1e-10 if dtype == "float64" else 1e-5
        assert got.keys() == whole.keys() and whole["norm"] > 10 * ranks.CLIP
        for name, tensor in whole.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=tolerance, msg=f"{case} {name}")
        for name, weight in load(tmp_path, dtype=getattr(torch, dtype)).state_dict().items():
            assert not torch.equal(got[name], weight), (case, name)
            assert got[f"exp_avg {name}"].abs().max() > 1e-6  # what is compared is not lost in the tolerance


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def flags(corpus, tokenizer, tiny, tmp_path):
    """Flags of a short run of each stage from a random model."""
    save(tiny, tmp_path / "start")
    tokenizer.save(tmp_path / "start")
    common = ["--data", corpus, "--model", tmp_path / "start", "--device", "cpu", "--save-every", 3, "--seed", 5]
    sft_flags = ["--tokens", 9000, "--batch", 4, "--eval-problems", 1, "--micro-tokens", 300, "--lr", 1e-3]
    rl_flags = ["--steps", 8, "--prompts", 4, "--samples", 4, "--max-new-tokens", 8, "--eval-problems", 1]
    rl_flags += ["--micro-tokens", 400, "--lr", 1e-3, "--eval-tokens", 8]
    return {"sft": [*common, *sft_flags], "rl": [*common, *rl_flags]}


def steps(run):
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines]


def untimed(line):
    return {k: v for k, v in line.items() if not k.endswith("_s")}


def state(run):
    checkpoint = sft.newest_checkpoint(run)
    return load(checkpoint).state_dict(), torch.load(checkpoint / "trainer.pt")["optimizer"]["state"]


def same(a, b):
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else same(a[k], b[k]) for k in a)


@pytest.mark.parametrize("stage", ["sft", "rl"])
@pytest.mark.parametrize("shard", [None, 2], ids=["1 rank", "2 ranks"])
def test_resume_after_kill_9_is_exact_to_the_bit(flags, tmp_path, stage, shard):
    count = shard or 1
    arguments = [stage, *flags[stage], *(["--shard", shard] if shard else [])]
    finish(start(*arguments, "--out", tmp_path / "whole", ranks=count))
    process = start(*arguments, "--out", tmp_path / "cut", ranks=count)
    while process.poll() is None and len(steps(tmp_path / "cut")) < 5:  # past the checkpoint of step 3
        time.sleep(0.005)
    kill(process)
    checkpoint = sft.newest_checkpoint(tmp_path / "cut")
    assert checkpoint.name in ("step-3", "step-6") and not (tmp_path / "cut/summary.json").exists()
    finish(start(*arguments, "--out", tmp_path / "cut", ranks=count))
    (weights, optimizer), (others, other) = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert same(weights, others) and same(optimizer, other)
    whole, cut = (list(map(untimed, steps(tmp_path / n))) for n in ("whole", "cut"))
    assert whole == cut and len(whole) >= 8
    shutil.rmtree(tmp_path)


def test_a_run_goes_on_with_another_number_of_ranks(flags, tmp_path):
    """Only rounding tells the two apart: the batches, the schedule and the moments are the same."""
    arguments = ["sft", *flags["sft"], "--out"]
    finish(start(*arguments, tmp_path / "one", ranks=1))
    process = start(*arguments, tmp_path / "two")
    while process.poll() is None and len(steps(tmp_path / "two")) < 4:
        time.sleep(0.005)
    kill(process)
    finish(start(*arguments, tmp_path / "two", ranks=1))
    (one, _), (two, _) = state(tmp_path / "one"), state(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)


def two_hosts(*commands):
    """Two agents of torchrun with one rank each, which meet at an address: the two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    meeting = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={address}", "--rdzv-id=test")
    return [start(*command, ranks=1, torchrun=meeting, HOST=str(i)) for i, command in enumerate(commands)]


def test_two_hosts_meet_and_train_as_two_ranks_of_one(flags, tmp_path):
    flags = ["sft", *flags["sft"], "--shard", 1, "--out"]
    finish(start(*flags, tmp_path / "one"))
    texts = [finish(host) for host in two_hosts(*[[*flags, tmp_path / "two"]] * 2)]  # each shares the other's folder
    assert sum("tokens per s" in text for text in texts) == 1  # rank 0 alone speaks
    assert all(map(same, state(tmp_path / "one"), state(tmp_path / "two")))


def test_what_only_one_host_lacks_ends_the_other_too(flags, tmp_path):
    """No agent tells the other's: the connection that breaks does."""
    good = ["rl", *flags["rl"], "--out", tmp_path / "run"]
    began = time.monotonic()
    texts = [finish(host, code=1) for host in two_hosts(good, [*good, "--data", tmp_path / "gone"])]
    assert "gone/languages.json" in texts[1] and time.monotonic() - began < 60


def test_evaluation_is_shared_out_and_put_together_in_order(flags, corpus, tmp_path):
    flags = ["eval", "--data", corpus, "--models", tmp_path / "start", "--problems", 3, "--max-new-tokens", 8]
    outcomes = []
    for count in (1, 2):
        text = finish(start(*flags, "--device", "cpu", "--out", tmp_path / str(count), ranks=count))
        assert text.count("wrote") == 1
        outcomes.append(json.loads((tmp_path / str(count) / "eval.json").read_text())["outcomes"])
    assert outcomes[0] == outcomes[1]
    assert {v for o in outcomes[0]["greedy pass@1"]["start"] for v in o["verdicts"]} == {"ok", "wrong_answer"}


@pytest.mark.parametrize(("stage", "place", "rank"), [("sft", "step", 1), ("rl", "write", 0)])
def test_a_rank_that_fails_ends_the_run_with_its_own_message(flags, tmp_path, stage, place, rank):
    began, trouble = time.monotonic(), {"FAIL_IN": place, "FAIL_ON_RANK": str(rank)}
    text = finish(start(stage, *flags[stage], "--out", tmp_path / "run", **trouble), code=1)
    assert f"error on rank {rank}: this rank's own trouble" in text and time.monotonic() - began < 60


def rank_1(process):
    """The process that torchrun started as rank 1."""
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in descendants(process.pid)}
    return next(pid for pid, variables in environments.items() if b"RANK=1" in variables)


@pytest.mark.parametrize(("stage", "one"), [("sft", False), ("rl", True)], ids=["all ranks", "one rank"])
def test_a_signal_saves_and_the_same_command_goes_on(flags, tmp_path, stage, one):
    flags = [*flags[stage], "--out", tmp_path / "run", "--save-every", 1000]
    process = start(stage, *flags)
    while process.poll() is None and len(steps(tmp_path / "run")) < 2:
        time.sleep(0.005)
    os.kill(rank_1(process) if one else process.pid, signal.SIGTERM if one else signal.SIGINT)
    finish(process, code=1)
    saved = sft.newest_checkpoint(tmp_path / "run")
    assert int(saved.name[5:]) == steps(tmp_path / "run")[-1]["step"] >= (1 if stage == "rl" else 2)
    finish(start(stage, *flags))
    assert (tmp_path / "run/summary.json").exists()


def test_bfloat16_computes_low_and_keeps_float32_masters(corpus, tokenizer, tiny):
    with sft.World("cpu") as world:
        ours = sft.Learner(tiny, world, sft.Hardware(device="cpu", precision="bfloat16"), 0.0, tokenizer.pad)
        seen = []
        ours.model.model.layers[0].mlp.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
        before = {n: sft.whole(p).clone() for n, p in ours.model.named_parameters()}
        sft.accumulate(ours, ranks.rows())
        assert {p.grad.dtype for p in ours.model.parameters()} == {torch.float32} and set(seen) == {torch.bfloat16}
        ours.step(1e-6)  # a step that bfloat16 weights could not take
        after = {n: sft.whole(p) for n, p in ours.model.named_parameters()}
        assert all(p.dtype == torch.float32 and not torch.equal(p, before[n]) for n, p in after.items())
        model, optimizer = ours.state()
        assert model.head().dtype == torch.float32
        assert {x.dtype for state in optimizer["state"].values() for x in state.values()} == {torch.float32}
