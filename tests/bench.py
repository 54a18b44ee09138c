"""Measurements, each against a reference in the same run.

python tests/bench.py sandbox            runs per second and time added, against subprocess.run
python tests/bench.py soak --runs 10000  many runs over mixed languages, and what they leave
python tests/bench.py attention | decode | sample | logprob    the kernels, against torch's
python tests/bench.py generate | sft                           against transformers
python tests/bench.py rl --model runs/source --data runs/data  a GRPO step, against TRL's

The last three lines run on the GPU if there is one, with the shapes of Llama 3, else on the CPU with the
tiny default's. Each prints a table: our time; the floor, which is the time of the bytes that must move at the
rate of a copy, or of the multiplications at the rate of a large product, as a share of our time; and
each peer's time with its ratio to ours (above 1: ours is faster).
"""

import argparse
import contextlib
import copy
import itertools
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))
import memory

import data
import eval as evaluation
import model
import rl
import sandbox
import sft

# ---------------------------------------------------------------------------------------------
# sandbox

PROGRAMS = {
    "python": "a, b = map(int, input().split())\nprint(a + b)\n",
    "cpp": "#include <bits/stdc++.h>\nusing namespace std;\n"
    "int main() { int a, b; cin >> a >> b; cout << a + b << endl; }\n",
}
SPIN, SLEEP = "while True: pass", "import time\ntime.sleep(60)"


def tests_of(count: int) -> list[dict]:
    return [{"stdin": f"{n} {n}\n", "stdout": f"{2 * n}\n"} for n in range(count)]


def commands(name: str, directory: str) -> list[list[str]]:
    """The same compiler and interpreter lines as the sandbox's, without what it prepares."""
    language, tools = sandbox.LANGUAGES[name], sandbox.toolchain(name)
    fill = {"box": directory, "file": f"{directory}/{language.file}", "cache": directory, "mb": 512}
    lines = [shlex.split(line) for line in (language.compile, language.run) if line]
    return [[tools.get(word, word).format_map(fill) for word in line] for line in lines]


def naive(name: str, tests: list[dict]) -> None:
    """What is usually done: write, compile and run with subprocess.run, once per test."""
    for test in tests:
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, sandbox.LANGUAGES[name].file).write_text(PROGRAMS[name])
            for command in commands(name, directory):
                done = subprocess.run(command, input=test["stdin"], capture_output=True, text=True, timeout=60)
                assert done.returncode == 0, done.stderr
            assert done.stdout == test["stdout"]


def bare_run(name: str) -> Callable[[], object]:
    """One run of a program that is compiled already, by subprocess.run."""
    place = tempfile.TemporaryDirectory(prefix="bench-")
    Path(place.name, sandbox.LANGUAGES[name].file).write_text(PROGRAMS[name])
    *compiling, running = commands(name, place.name)
    for command in compiling:
        subprocess.run(command, check=True)

    def run() -> None:
        assert place  # is removed with this function
        subprocess.run(running, input="1 2\n", capture_output=True, text=True, timeout=60)

    return run


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run_times(box: sandbox.Sandbox, name: str, count: int) -> list[float]:
    """Seconds from the end of one test to that of the next, of one program with many tests."""
    ends = []
    checker = lambda *_: ends.append(time.perf_counter()) or True  # noqa: E731
    box.run(PROGRAMS[name], name, tests_of(count + 1), checker=checker)
    return [end - start for start, end in itertools.pairwise(ends)]


def added_per_run(box: sandbox.Sandbox, name: str, repeats: int) -> tuple[float, float, float]:
    """Milliseconds of one more run in the sandbox, of a bare run, and of their difference: medians
    of ten runs of each, one after the other, and then of the repeats."""
    bare, rows = bare_run(name), []
    for _ in range(repeats):
        inside = statistics.median(run_times(box, name, 10)) * 1e3
        outside = statistics.median(seconds(bare) for _ in range(10)) * 1e3
        rows.append((inside, outside, inside - outside))
    return tuple(map(statistics.median, zip(*rows, strict=True)))


def throughput(box: sandbox.Sandbox, name: str, count: int, repeats: int) -> tuple[float, float]:
    """Runs per second, one program at a time: in the sandbox, and the naive way."""
    tests, ours, theirs = tests_of(count), [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: box.run(PROGRAMS[name], name, tests)))
        theirs.append(seconds(lambda: naive(name, tests)))
    return count / statistics.median(ours), count / statistics.median(theirs)


def overshoot(box: sandbox.Sandbox, program: str, limits: sandbox.Limits) -> float:
    """Milliseconds that a program lives beyond its limit, by the clock or by processor time."""
    test = box.run(program, "python", tests_of(1), limits=limits).tests[0]
    assert test.verdict == "time_limit", test
    return ((test.wall - limits.wall) if program == SLEEP else (test.cpu - limits.cpu)) * 1e3


def bench_sandbox(options: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    with (
        sandbox.Sandbox(1, level=options.level) as box,
        sandbox.Sandbox(1, level=options.level, forkserver=True) as forks,
    ):
        rows = [("python, --forkserver", forks, "python"), *((name, box, name) for name in PROGRAMS)]
        first = [each.run(PROGRAMS[name], name, tests_of(1)) for _, each, name in rows]
        assert all(result.passed for result in first), first
        print(f"level {first[0].level}, {cores} cores, one program at a time")
        print("language              tests  sandbox runs/s  naive runs/s  ratio")
        for title, each, name in rows:
            for count in (1, 10):
                ours, theirs = throughput(each, name, count, options.repeats)
                print(f"{title:21} {count:5} {ours:15.1f} {theirs:13.1f} {ours / theirs:6.2f}")
        print("language              ms per run, sandbox   subprocess.run   added")
        for title, each, name in rows:
            inside, outside, added = added_per_run(each, name, options.repeats)
            print(f"{title:21} {inside:21.2f} {outside:16.2f} {added:7.2f}")
        limits = sandbox.Limits(wall=0.5, cpu=60)
        late = [overshoot(box, SLEEP, limits) for _ in range(options.repeats)]
        print(f"time limit by the clock: late by {statistics.median(late):.1f} ms, at most {max(late):.1f}")
        limits = sandbox.Limits(wall=60, cpu=0.5)
        late = [overshoot(box, SPIN, limits) for _ in range(options.repeats)]
        print(f"time limit by processor time: late by {statistics.median(late):.1f} ms, at most {max(late):.1f}")
    with sandbox.Sandbox(4 * cores, sandbox.Limits(wall=0.6, cpu=2), options.level) as box:
        spin = "import time\nwhile time.process_time() < 0.25: pass\nprint(1)"
        results = box.map([(spin, "python", [{"stdout": "1"}])] * (20 * cores))
        wall = statistics.median(result.tests[0].wall for result in results)
        false = sum(result.verdict == "time_limit" for result in results)
        print(f"{4 * cores} workers, 0.25 s of work, limit 0.6 s: took {wall:.2f} s, {false} false time limits")


# ---------------------------------------------------------------------------------------------
# soak

MIXTURE = {
    "python": PROGRAMS["python"],
    "bash": "read a b; echo $((a + b))",
    "perl": 'my ($a, $b) = split " ", <STDIN>; print $a + $b, "\\n";',
    "awk": "{ print $1 + $2 }",
    "lua": 'print(math.floor(io.read("n") + io.read("n")))',
    "tcl": "puts [expr [join [gets stdin] +]]",
    "c": '#include <stdio.h>\nint main() { int a, b; scanf("%d%d", &a, &b); printf("%d\\n", a + b); }',
    "rust": "fn main() { let mut s = String::new(); std::io::stdin().read_line(&mut s).unwrap();"
    ' println!("{}", s.split_whitespace().map(|x| x.parse::<i64>().unwrap()).sum::<i64>()); }',
}


def traces() -> dict[str, object]:
    """What runs could leave: counts that must not grow."""
    status = Path("/proc/self/status").read_text()
    return {
        "processes": len(list(Path("/proc").glob("[0-9]*/stat"))),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": Path("/proc/self/mounts").read_text().count("\n"),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
        "resident MB": int(status.split("VmRSS:")[1].split()[0]) >> 10,
    }


def bench_soak(options: argparse.Namespace) -> None:
    kinds = [(text, name, tests_of(5)) for name, text in MIXTURE.items() if name in sandbox.installed()]
    jobs = [kinds[index % len(kinds)] for index in range(options.runs // 5)]
    outside = traces()
    with sandbox.Sandbox(options.workers, level=options.level) as box:
        box.map(kinds * 2)
        before, start = traces(), time.perf_counter()
        results = box.map(jobs, progress="programs")
        took, after = time.perf_counter() - start, traces()
    verdicts = {result.verdict for result in results}
    print(f"{5 * len(jobs)} runs of {len(kinds)} languages in {took:.0f} s, verdicts {verdicts}")
    print(f"{'':16} {'before':>8} {'in the pool, start':>19} {'and end':>8} {'after':>8}")
    closed = traces()
    for name in outside:
        print(f"{name:16} {outside[name]:8} {before[name]:19} {after[name]:8} {closed[name]:8}")


# ---------------------------------------------------------------------------------------------
# Side by side


def timed(work: Callable[[], object]) -> float:
    """Seconds of `work`: on a GPU from event to event, after sums that fill the cache and let the launches get ahead."""
    if not CUDA:
        return seconds(work)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    other = torch.empty(1 << 28, dtype=torch.float32, device=DEVICE)
    for _ in range(8):  # 2 ms; reads only, since what is written would be evicted while `work` runs
        other.sum()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def side_by_side(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after a warm-up, taken in turns so that what disturbs one disturbs all.

    One that raises RuntimeError cannot do it (a backend of torch's for another device): left out.
    """
    able, times = {}, defaultdict(list)
    for name, work in works.items():
        with contextlib.suppress(RuntimeError):
            work()
            able[name] = work
    for _ in range(repeats):
        for name, work in able.items():
            times[name].append(timed(work))
    return {name: statistics.median(column) for name, column in times.items()}


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def row(what: str, times: dict[str, float], floor: float | None = None) -> None:
    """A row of the table: ours, the floor as a share of it, and each peer with its ratio to ours."""
    ours, *peers = times
    share = f"{floor / times[ours]:6.2f}" if floor else "     –"
    others = "; ".join(f"{name} {ms(times[name])} = {times[name] / times[ours]:.2f} x" for name in peers)
    print(f"| {what} | {ms(times[ours])} | {share} | {others} |")


def head(title: str) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{title}: {device}, torch {torch.__version__}\n")
    print("| what | ours | floor / ours | peers |\n|---|---|---|---|")


def copy_rate() -> float:
    """Bytes per second, read and written together, of copying what no cache holds."""
    x = torch.empty(1 << (30 if CUDA else 27), dtype=torch.uint8, device=DEVICE)
    return 2 * x.numel() / side_by_side({"copy": x.clone}, 7)["copy"]


def matmul_rate() -> float:
    """Operations per second of a large product in the dtype that is used here."""
    n = 8192 if CUDA else 1024
    x = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    return 2 * n**3 / side_by_side({"product": lambda: x @ x}, 7)["product"]


CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
# Shapes of Llama-3.1-8B on a GPU, of the tiny default on a CPU.
H, K, D_HEAD, WIDTH, VOCABULARY = (32, 8, 128, 4096, 128256) if CUDA else (4, 2, 32, 128, 1024)


def randn(*shape: int, **options) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE, **options)


# ---------------------------------------------------------------------------------------------
# Kernels


def sdpa(backend, *qkv: torch.Tensor, **options) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*qkv, enable_gqa=True, **options)


def backends(*qkv: torch.Tensor, after: Callable = lambda y: y, **options) -> dict[str, Callable]:
    """torch's attention by each of its backends."""
    kinds = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    default = partial(F.scaled_dot_product_attention, *qkv, enable_gqa=True, **options)
    return {"SDPA by default": lambda: after(default())} | {
        f"SDPA {kind.split('_')[0].lower()}": lambda kind=kind: after(sdpa(getattr(SDPBackend, kind), *qkv, **options))
        for kind in kinds
    }


def attention_rows(T: int, rate: float, repeats: int) -> None:
    # As the model lays them out: all heads of a token side by side.
    q, k, v = (randn(1, T, heads, D_HEAD).transpose(1, 2).requires_grad_() for heads in (H, K, K))
    gradient, floor = torch.randn_like(q), 2 * H * D_HEAD * T * T / rate
    start = (torch.arange(T, device=DEVICE) // (T // 8) * (T // 8))[None]

    def back(y: torch.Tensor) -> None:
        y.backward(gradient)

    with torch.no_grad():
        works = {"ours": lambda: model.attention(q, k, v), **backends(q, k, v, is_causal=True)}
        row(f"{T} tokens, forward", side_by_side(works, repeats), floor)
    peers = backends(q, k, v, is_causal=True, after=back)
    works = {"ours": lambda: back(model.attention(q, k, v)), **peers}
    row(f"{T} tokens, forward and backward", side_by_side(works, repeats), 3.5 * floor)
    works = {"ours": lambda: back(model.attention(q, k, v, start))}
    works |= {"SDPA, document by document": lambda: back(model.sdpa_attention(q, k, v, start)), **peers}
    row(f"{T} tokens in 8 packed documents (the other peers: in one)", side_by_side(works, repeats), 3.5 * floor / 8)


def bench_attention(options: argparse.Namespace) -> None:
    rate = matmul_rate()
    head("Causal attention, one row")
    for T in (4096, 8192, 16384) if CUDA else (256, 1024):
        attention_rows(T, rate, options.repeats)


def decode_row(R: int, L: int, rate: float, repeats: int) -> None:
    cache, x = randn(2, R, K, L, D_HEAD), randn(R, H + 2 * K, D_HEAD)
    rope = randn(2, R, D_HEAD)
    position = torch.randint(L // 2, L, (R,), device=DEVICE)
    seen = (torch.arange(L, device=DEVICE) <= position[:, None])[:, None, None]
    ours = lambda: model.decoder(cache[None], rope, position)(0, *x.split((H, K, K), dim=1))  # noqa: E731
    works = {"ours, rotary positions and append included": ours}
    works |= backends(x[:, :H, None], *cache, attn_mask=seen)
    used = 2 * int(position.sum() + R) * K * D_HEAD * cache.element_size()
    row(f"{R} rows of {L // 2} to {L}", side_by_side(works, repeats), used / rate)


@torch.inference_mode()
def bench_decode(options: argparse.Namespace) -> None:
    rate = copy_rate()
    head("Attention of one query a row over a cache of mixed lengths")
    for R, L in ((64, 2048), (256, 2048), (16, 16384)) if CUDA else ((64, 176), (256, 176)):
        decode_row(R, L, rate, options.repeats)


def softmax_multinomial(logits: torch.Tensor) -> torch.Tensor:
    p = logits.float().softmax(-1)
    return p.gather(1, torch.multinomial(p, 1)).log()


@torch.inference_mode()
def bench_sample(options: argparse.Namespace) -> None:
    rate = copy_rate()
    head("Drawing a token, and its log-prob")
    for R in (64, 256):
        logits = randn(R, VOCABULARY)
        works = {
            "ours": partial(model.sample, logits, 1.0, None),
            "softmax + multinomial": partial(softmax_multinomial, logits),
            "one read, torch's max": lambda logits=logits: logits.view(torch.int64).max(),
        }
        row(f"{R} rows of {VOCABULARY} logits", side_by_side(works, options.repeats), logits.nbytes / rate)


def bench_logprob(options: argparse.Namespace) -> None:
    rate, N = matmul_rate(), 8192 if CUDA else 2048
    hidden, weight = randn(N, WIDTH, requires_grad=True), randn(VOCABULARY, WIDTH, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (N,), device=DEVICE)

    def whole():
        return -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")

    head("Log-probs of given tokens, forward and backward; the floor holds three products")
    works = {"ours": lambda: model.score(hidden, weight, targets, 1.0)[0].sum().backward()}
    works["linear + cross_entropy"] = lambda: whole().sum().backward()
    times = side_by_side(works, options.repeats)
    row(f"{N} tokens of {VOCABULARY}", times, 6 * N * WIDTH * VOCABULARY / rate)


# ---------------------------------------------------------------------------------------------
# Whole steps


def both_models(config: model.Config) -> tuple[model.Llama, "transformers.LlamaForCausalLM"]:
    """Random weights, the same in ours and in transformers' model."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        config.save(folder)
        shape = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        ours, theirs = model.Llama(config).to(DTYPE), transformers.AutoModelForCausalLM.from_config(shape, dtype=DTYPE)
    ours.load_state_dict({name: weight for name, weight in theirs.state_dict().items() if name in ours.state_dict()})
    return ours, theirs


def padded(rows: list[list[int]], left: bool, value: int = 0) -> torch.Tensor:
    longest = max(map(len, rows))
    blanks = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([b + r if left else r + b for r, b in zip(rows, blanks, strict=True)], device=DEVICE)


def random_rows(count: int, low: int, high: int, vocabulary: int) -> list[list[int]]:
    """Of `low` to `high` tokens each, evenly spread."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(64, vocabulary, (n,), generator=generator).tolist() for n in lengths]


# Published shapes, with random weights.
SHAPES = {name: model.Config(**memory.COMMON | shape) for name, shape in memory.MODELS.items()}
SHAPES["tiny"] = model.Config()


@torch.no_grad()
def bench_generate(options: argparse.Namespace) -> None:
    config, tokens = SHAPES["8B" if CUDA else "tiny"], 128
    ours, theirs = both_models(config)
    prompts = random_rows(64, 8, 128, config.vocab_size)
    ids, mask = padded(prompts, left=True), padded([[1] * len(p) for p in prompts], left=True)
    # A random model draws evenly: with every 32nd token a stop an answer has 32 tokens in the mean.
    some = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(0))
    stops = {"all to the end": [], "ended by a stop token, 32 in the mean": some[: config.vocab_size // 32].tolist()}

    def transformers_(stop: list[int]):
        free = {"min_new_tokens": tokens} if not stop else {"eos_token_id": stop}
        torchs = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, "max_new_tokens": tokens}
        return theirs.generate(ids, attention_mask=mask, **torchs, **free)

    batch = model.Rows(ours, 64, 1024, lambda logits: model.sample(logits, 1.0, None), None)
    batch.admit([[1] * (512 if CUDA else 128)], [64])
    weights = sum(w.nbytes for w in ours.parameters())
    if not config.tie_word_embeddings:
        weights -= ours.model.embed_tokens.weight.nbytes  # of which a step reads a row for each token
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * ours.head().element_size()
    read = tokens * (weights + a_token * (sum(map(len, prompts)) + 64 * tokens / 2))
    head(f"64 prompts of 8 to 128 tokens, at most {tokens} new ones; the floor is reading weights and cache")
    works = {"ours": lambda: batch.decode(1)}
    if CUDA:
        works["launched one by one"] = lambda: batch.step(64, 1024)
    where = int(batch.position[0])
    matrices = [ours.head(), *(w for w in ours.model.layers.parameters() if w.dim() == 2)]
    products = [(randn(64, w.shape[1]), w) for w in matrices]
    held = batch.cache[..., :where, :]
    works["its products and a sum of the cache alone"] = lambda: (held.sum(), *(F.linear(x, w) for x, w in products))
    step = side_by_side(works, 2 * options.repeats)
    seen = (where + int(batch.position[0])) / 2
    what = f"a decoding step of 64 rows of {where} to {int(batch.position[0])} tokens"
    row(what, step, (weights + 64 * seen * a_token) / copy_rate())
    for what, stop in stops.items():
        works = {"ours": lambda stop=stop: model.generate(ours, prompts, tokens, stop)}
        works["transformers' generate"] = lambda stop=stop: transformers_(stop)
        row(what, side_by_side(works, options.repeats), None if stop else read / copy_rate())


# Dense bfloat16 operations per second from the makers' data sheets, by a part of the device's name.
PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def flops(config: model.Config, rows: list[sft.Example]) -> float:
    """Operations of a forward and a backward pass over `rows`, each a document of its own.

    Six per weight and token, in the head for the trained ones alone, and causal attention's 6 layers x heads x width x
    length^2. "Model FLOPs utilization" (arXiv 2204.02311, appendix B) charges the head for every token and attention
    12, for the whole square; like it, this counts no recomputation.
    """
    heads = config.num_attention_heads * config.head_dim
    attention = 2 * config.hidden_size * (heads + config.num_key_value_heads * config.head_dim)
    block = attention + 3 * config.hidden_size * config.intermediate_size
    lengths = [len(ids) - 1 for ids, _ in rows]
    blocks = 6.0 * config.num_hidden_layers * sum(block * n + heads * n * n for n in lengths)
    return blocks + 6.0 * config.vocab_size * config.hidden_size * sft.trained_tokens(rows)


def bench_sft(options: argparse.Namespace) -> None:
    config, count, high, micro = (SHAPES["1B"], 16, 4096, 1 << 15) if CUDA else (SHAPES["tiny"], 16, 240, 4096)
    ours, theirs = both_models(config)
    rows = [(ids, len(ids) // 3) for ids in random_rows(count, high // 4, high, config.vocab_size)]
    hardware = sft.Hardware(device=DEVICE, micro_tokens=micro)
    learner = sft.Learner(ours, sft.World(DEVICE), hardware, 0.1, 0)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)
    ids, mask = padded([r for r, _ in rows], left=False), padded([[1] * len(r) for r, _ in rows], left=False)
    labels = padded([[model.IGNORE] * first + r[first:] for r, first in rows], left=False, value=model.IGNORE)

    def step(learner: sft.Learner) -> float:
        loss = sft.accumulate(learner, rows)
        learner.step(1e-4)
        return loss

    def theirs_step() -> float:
        """As many rows at a time as are half of our micro-batch: their logits are held whole, in float32."""
        total, loss = (labels[:, 1:] != model.IGNORE).sum(), 0.0
        size = max(1, micro // 2 // ids.shape[1]) if CUDA else len(ids)
        for part in zip(ids.split(size), mask.split(size), labels.split(size), strict=True):
            one = theirs(input_ids=part[0], attention_mask=part[1], labels=part[2], num_items_in_batch=total).loss
            one.backward()
            loss += one.item()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    assert abs(step(learner) - theirs_step()) < (0.05 if CUDA else 1e-3)  # the same loss
    head(f"A supervised step on {count} sequences of {high // 4} to {high} tokens; the floor is its multiplications")
    works = {"ours, packed": partial(step, learner), "transformers, padded": theirs_step}
    needed, rate = flops(config, rows), matmul_rate()

    def show(what: str, works: dict) -> None:
        times = side_by_side(works, options.repeats)
        if CUDA:
            peak = next(rate for name, rate in PEAK.items() if name in torch.cuda.get_device_name())
            share = needed / next(iter(times.values())) / peak
            what += f"; MFU {share:.3f} of the data sheet's {peak / 1e12:.0f} TFLOP/s"
        row(what, times, needed / rate)

    show(f"weights and optimizer in {DTYPE}, micro-batches of {micro}", works)
    if not CUDA:
        return
    for size in (micro, 1 << 16):
        with sft.World(DEVICE) as world:
            hardware = sft.Hardware(device=DEVICE, micro_tokens=size)
            masters = sft.Learner(copy.deepcopy(ours).float(), world, hardware, 0.1, 0)
            show(f"float32 masters, as sft.py has them, micro-batches of {size}", {"ours": partial(step, masters)})
        del masters


PROMPTS, SAMPLES = 8, 8


def trl_steps(folder: Path, records: list[dict], language: str, box: sandbox.Sandbox, count: int) -> list[float]:
    """Seconds of each of TRL's GRPO steps on the same model, prompts, reward and budget."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, ends = transformers.AutoTokenizer.from_pretrained(folder), []
    by_prompt = {data.ask(r["prompt"], language): r for r in records}

    def reward(prompts, completions, **_):
        texts = [(p[0]["content"], c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]
        jobs = [(data.extract(text, language) or "", language, by_prompt[p]["tests"]) for p, text in texts]
        return [float(r.passed) for r in box.map(jobs, stop_at_failure=True)]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            out, max_steps=count + 2, num_generations=SAMPLES, per_device_train_batch_size=PROMPTS * SAMPLES,
            max_completion_length=rl.Settings.max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, beta=0.0, learning_rate=1e-5,
            gradient_checkpointing=False, bf16=CUDA, use_cpu=not CUDA, report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in by_prompt])
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
        GRPOTrainer(theirs, reward, config, rows, processing_class=tokenizer, callbacks=[Clock()]).train()
    return [b - a for a, b in itertools.pairwise(ends)][1:]


def bench_rl(options: argparse.Namespace) -> None:
    """The peers can't take turns step by step here: ours runs before TRL and after it, and both count."""
    s = rl.Settings(
        data=options.data, model=options.model, out=tempfile.mkdtemp(), prompts=PROMPTS, samples=SAMPLES, lr=1e-5,
        informative=0, forkserver=True,
    )  # fmt: skip
    folder, languages = sft.newest_checkpoint(s.model), [data.read_roles(s.data).source]
    records, ours = data.read_split(s.data, "rl")[: 40 * PROMPTS], []
    with sft.World(DEVICE) as world, evaluation.open_sandbox(s, world) as box, sft.Run(s.out, s, world) as run:
        tokenizer = data.Tokenizer(folder)
        learner = sft.Learner(model.load(folder, DEVICE, torch.float32), world, s, 0.0, tokenizer.pad)
        sampler = rl.Sampler(learner)

        def steps(count: int) -> None:
            for _ in range(count):
                job = records, languages, learner, sampler, tokenizer, box
                job = *job, {}, run, s, None  # TRL remembers no verdicts
                ours.append(seconds(lambda job=job: rl.step_once(*job)))
                run.step += 1

        steps(options.repeats + 1)
        theirs = trl_steps(folder, records, *languages, box, options.repeats)
        steps(options.repeats)
    what = f"{PROMPTS} problems x {SAMPLES} responses of at most {s.max_new_tokens} tokens"
    head(f"A GRPO step, {what}, the sandbox's time included")
    row("step", {"ours": statistics.median(ours[1:]), "TRL's GRPOTrainer": statistics.median(theirs)})
    totals = ", ".join(f"{name} {spent / len(ours) * 1e3:.0f} ms" for name, spent in run.seconds.items())
    print(f"\nours, by phase: {totals}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("sandbox", help="sandbox.py against subprocess.run")
    add.add_argument("--repeats", type=int, default=15, help="measurements per figure (%(default)s)")
    add.add_argument("--level", choices=sandbox.LEVELS, help="confinement; the strongest by default")
    add.set_defaults(call=bench_sandbox)
    add = commands.add_parser("soak", help="many runs, and what they leave")
    add.add_argument("--runs", type=int, default=10_000, help="(%(default)s)")
    add.add_argument("--workers", type=int, help="programs at a time (one per processor)")
    add.add_argument("--level", choices=sandbox.LEVELS, help="confinement; the strongest by default")
    add.set_defaults(call=bench_soak)
    kinds = {"attention": "causal attention", "decode": "attention over a cache", "sample": "drawing tokens"}
    kinds |= {"logprob": "log-probs of given tokens", "generate": "sampling", "sft": "a supervised step"}
    for name, what in kinds.items():
        add = commands.add_parser(name, help=what)
        add.add_argument("--repeats", type=int, default=9, help="measurements per figure (%(default)s)")
        add.set_defaults(call=globals()[f"bench_{name}"])
    add = commands.add_parser("rl", help="a GRPO step")
    add.add_argument("--repeats", type=int, default=9, help="steps of TRL's, and twice as many of ours (%(default)s)")
    add.add_argument("--model", default="runs/demo-0-test/source", help="checkpoint or run folder (%(default)s)")
    add.add_argument("--data", default="runs/demo-0-test/data", help="folder of the corpus (%(default)s)")
    add.set_defaults(call=bench_rl)
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
