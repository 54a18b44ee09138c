"""Several ranks: the same update as one process, bit-equal replicas, exact resume, one rank's failure."""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ranks
import torch
from conftest import descendants
from ranks import metrics, same

import sft
from model import Config, Llama, load, save


def kill(*pids):
    """As a power cut would: every process at once, without a chance to save."""
    for pid in [*pids, *(below for first in pids for below in descendants(first))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Job:
    """Processes forked where all is imported, which takes far longer than most of what they do."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rl", "torch._dynamo", "torch.distributed.run", "torch.nn.parallel"])

    def __init__(self, body, *jobs):
        """One process for each of `jobs`, the arguments of `body` after the file that takes what it prints."""
        self.folder = tempfile.TemporaryDirectory()
        self.output = Path(self.folder.name, "output")
        new = functools.partial(self.context.Process, target=body, daemon=True)
        self.processes = [new(args=(str(self.output), *job)) for job in jobs]
        for process in self.processes:
            process.start()

    def running(self):
        return all(process.is_alive() for process in self.processes)

    def kill(self):
        kill(*(process.pid for process in self.processes if process.is_alive()))
        for process in self.processes:
            process.join()
        self.folder.cleanup()

    def finish(self, code=0):
        """What they printed."""
        end = time.monotonic() + 240
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        text, codes = self.output.read_text(), [process.exitcode for process in self.processes]
        self.kill()
        assert None not in codes and (set(codes) == {0}) == (code == 0), f"{codes}\n{text}"
        return text


def start(*arguments, size=2):
    """Ranks without torchrun."""
    arguments = list(map(str, arguments))
    return Job(ranks.member, *((rank, size, arguments) for rank in range(size)))


def torchrun(*arguments, size=2, meeting=("--standalone",), script=ranks.__file__, **environment):
    """For what torchrun has a part in: meeting, failing, stopping."""
    flags = [*meeting, f"--nproc-per-node={size}", script, *arguments]
    return Job(ranks.agent, (environment, list(map(str, flags))))


@pytest.mark.parametrize("count", ranks.CASES)
def test_an_update_is_the_same_for_every_split_into_ranks_and_micro_batches(tmp_path, count):
    config = Config(vocab_size=97, hidden_size=32, intermediate_size=51, num_hidden_layers=2, num_attention_heads=4)
    save(Llama(config).init_weights(0), tmp_path)
    # It compares with DistributedDataParallel, and the replicas with each other.
    start("updates", tmp_path, size=count).finish()
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
            assert not torch.equal(got[f"master {name}"], weight), (case, name)
            assert got[f"exp_avg {name}"].abs().max() > 1e-6  # what is compared is not lost in the tolerance


@pytest.mark.parametrize("rank, ends", [({}, " as python ends\n"), ({"RANK": "0"}, "")], ids=["alone", "rank"])
def test_a_rank_that_succeeds_leaves_before_python_ends_under_gloos_threads(rank, ends):
    """With what it printed. Alone, a process ends as any other."""
    program = "import atexit, data; atexit.register(print, ' as python ends'); print('done', end=''); "
    program += "data.command(lambda s: None, data.CorpusSettings, '', [])"
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | rank
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=Path(sft.__file__).parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"done{ends}"), done.stderr


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def flags(corpus, tiny_folder):
    """Flags of a short run of each stage from a random model."""
    common = ["--data", corpus, "--model", tiny_folder, "--device", "cpu", "--save-every", 3, "--seed", 5]
    sft_flags = ["--tokens", 9000, "--batch", 600, "--eval-problems", 1, "--micro-tokens", 300, "--lr", 1e-3]
    rl_flags = ["--steps", 8, "--prompts", 4, "--samples", 4, "--max-new-tokens", 8, "--eval-problems", 1]
    rl_flags += ["--micro-tokens", 400, "--lr", 1e-3, "--eval-tokens", 8, "--informative", 4, "--rounds", 2]
    return {"sft": ["sft", *common, *sft_flags], "rl": ["rl", *common, *rl_flags]}


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """Folder of the uninterrupted run of a stage on a number of ranks."""

    @functools.cache
    def run(stage, count):
        out = tmp_path_factory.mktemp("whole") / "run"
        start(*flags[stage], "--out", out, size=count).finish()
        return out

    return run


def state(run):
    weights, kept = load(sft.newest_checkpoint(run)).state_dict(), ranks.kept(run)
    assert same(weights, {name: parts["master"] for name, parts in kept.items()})
    return weights, kept


def begin_and_kill(job, run, step):
    """Kills it as soon as it has logged `step`."""
    while job.running() and len(metrics(run)) < step:
        time.sleep(0.005)
    job.kill()


@pytest.mark.parametrize("stage", ["sft", "rl"])
@pytest.mark.parametrize("count", [1, 2], ids=["1 rank", "2 ranks"])
def test_resume_after_kill_9_is_exact_to_the_bit(flags, whole, tmp_path, stage, count):
    arguments, run = [*flags[stage], "--out", tmp_path], whole(stage, count)
    begin_and_kill(start(*arguments, size=count), tmp_path, 5)  # past the checkpoint of step 3
    assert sft.newest_checkpoint(tmp_path).name in ("step-3", "step-6") and not (tmp_path / "summary.json").exists()
    start(*arguments, size=count).finish()
    (weights, optimizer), (others, other) = state(run), state(tmp_path)
    assert same(weights, others) and same(optimizer, other)
    places = [{k: ranks.place(folder)[k] for k in ("step", "drawn", "tokens")} for folder in (run, tmp_path)]
    assert places[0] == places[1] and places[0]["drawn"] > 0
    lines = metrics(run)
    assert lines == metrics(tmp_path) and len(lines) >= 8


def test_a_run_goes_on_with_another_number_of_ranks(flags, whole, tmp_path):
    """Only rounding tells the two apart: the batches, the schedule and the moments are the same."""
    arguments = [*flags["sft"], "--out", tmp_path]
    begin_and_kill(start(*arguments), tmp_path, 4)
    start(*arguments, size=1).finish()
    (one, _), (two, _) = state(whole("sft", 1)), state(tmp_path)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)


def two_hosts(*commands):
    """Two agents of torchrun with one rank each, which meet at an address: the two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    meeting = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={address}", "--rdzv-id=test")
    return [torchrun(*command, size=1, meeting=meeting) for command in commands]


def test_two_hosts_meet_and_train_as_two_ranks_of_one(flags, tmp_path):
    flags = [*flags["sft"], "--shard", 1, "--out"]
    start(*flags, tmp_path / "one").finish()
    texts = [host.finish() for host in two_hosts(*[[*flags, tmp_path / "two"]] * 2)]  # each shares the other's folder
    assert sum("tokens per s" in text for text in texts) == 1  # rank 0 alone speaks
    assert all(map(same, state(tmp_path / "one"), state(tmp_path / "two")))


def test_what_only_one_host_lacks_ends_the_other_too(flags, tmp_path):
    """No agent tells the other's: the connection that breaks does."""
    good = [*flags["rl"], "--out", tmp_path / "run"]
    began = time.monotonic()
    texts = [host.finish(code=1) for host in two_hosts(good, [*good, "--data", tmp_path / "gone"])]
    assert "gone/languages.json" in texts[1] and time.monotonic() - began < 60


def test_evaluation_is_shared_out_and_put_together_in_order(corpus, tiny_folder, tmp_path):
    flags = ["eval", "--data", corpus, "--models", tiny_folder, "--problems", 3, "--max-new-tokens", 8]
    outcomes = []
    for count in (1, 2):
        text = start(*flags, "--device", "cpu", "--out", tmp_path / str(count), size=count).finish()
        assert text.count("wrote") == 3  # rank 0 alone
        outcomes.append(json.loads((tmp_path / str(count) / "outcomes.json").read_text())["outcomes"])
    assert outcomes[0] == outcomes[1]
    assert {v for o in outcomes[0]["greedy pass@1"][tiny_folder.name] for v in o["verdicts"]} == {"ok", "wrong_answer"}


@pytest.mark.parametrize(("stage", "place", "rank"), [("sft", "step", 1), ("rl", "write", 0)])
def test_a_rank_that_fails_ends_the_run_with_its_own_message(flags, tmp_path, stage, place, rank):
    began, trouble = time.monotonic(), {"FAIL_IN": place, "FAIL_ON_RANK": str(rank)}
    text = torchrun(*flags[stage], "--out", tmp_path, **trouble).finish(code=1)
    assert f"error on rank {rank}: this rank's own trouble" in text and time.monotonic() - began < 60


def rank_1(job):
    """The process that torchrun started as rank 1."""
    environments = {
        pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in descendants(job.processes[0].pid)
    }
    return next(pid for pid, variables in environments.items() if b"RANK=1" in variables)


@pytest.mark.parametrize(("stage", "one"), [("sft", False), ("rl", True)], ids=["all ranks", "one rank"])
def test_a_signal_saves_and_the_same_command_goes_on(flags, tmp_path, stage, one):
    flags = [*flags[stage], "--out", tmp_path, "--save-every", 1000]
    job = torchrun(*flags)
    while job.running() and len(metrics(tmp_path)) < 2:
        time.sleep(0.005)
    os.kill(rank_1(job) if one else job.processes[0].pid, signal.SIGTERM if one else signal.SIGINT)
    job.finish(code=1)
    saved = sft.newest_checkpoint(tmp_path)
    assert int(saved.name[5:]) == metrics(tmp_path)[-1]["step"] >= (1 if stage == "rl" else 2)
    start(*flags).finish()
    assert (tmp_path / "summary.json").exists()


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
        assert {x.dtype for state in ours.state().values() for x in state.values()} == {torch.float32}
