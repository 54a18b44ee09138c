"""The Triton kernels of model.py against torch in float64.

TRITON_INTERPRET=1 pytest tests/test_kernels.py     on a CPU, through Triton's interpreter
pytest tests/test_kernels.py                        on a GPU; without one, only whether they compile
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
import triton
from conftest import starts
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import model as model_py
from model import IGNORE, Config, Llama, generate

if model_py.INTERPRET:
    DEVICE = "cpu"
elif torch.cuda.is_available():
    DEVICE = "cuda"
else:
    DEVICE = ""
runs = pytest.mark.skipif(not DEVICE, reason="no GPU; TRITON_INTERPRET=1 runs the kernels on a CPU")
compiles = pytest.mark.skipif(model_py.INTERPRET, reason="the interpreter compiles nothing")
# What an output may be off by, of its largest entry or of 1: the rounding of p and ds to the inputs' type.
PRECISION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that torch hands out is full of nan, so that an entry that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE or "cpu").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (x * scale).to(DEVICE, dtype)


def close(ours, exact, tolerance):
    """Equal to within `tolerance` of the largest entry, or of 1 if all are small."""
    error, size = (ours.double() - exact).abs().max().item(), exact.abs().max().item()
    assert error <= tolerance * max(1.0, size), (error, size)  # false for nan


# ---------------------------------------------------------------------------------------------
# Attention

SHAPES = {  # B, H, K, d, and the documents of each row
    "one token": (1, 2, 1, 64, [[1]]), "whole row": (2, 2, 2, 64, None), "ragged": (2, 4, 2, 64, [[1, 30, 2, 17], [49, 1]]),
    "8 queries a key": (1, 8, 1, 128, [[5, 28]]), "all but one padding": (1, 2, 1, 64, [[1, *[1] * 36]]),
    "block edges": (1, 2, 1, 64, [[16, 16, 15, 17]]), "narrow head": (1, 2, 1, 24, [[20, 3]]),
}  # fmt: skip
if DEVICE == "cuda":  # more than one of a GPU's blocks: too slow for the interpreter
    SHAPES["several blocks"] = (2, 4, 2, 64, [[300, 1, 140, 70], [511]])
    SHAPES["several wide blocks"] = (1, 8, 1, 128, [[100, 100, 100, 100, 100]])


def check_attention(shape, dtype):
    """Output and gradients against the reference in float64."""
    B, H, K, d, documents = SHAPES[shape]
    start = torch.cat([starts(*row, device=DEVICE) for row in documents]) if documents else None
    T, results = start.shape[1] if documents else 37, []
    inputs = [random(B, heads, T, d, dtype=dtype, seed=i) for i, heads in enumerate((H, K, K, H))]
    for attention, kind in ((model_py.reference_attention, torch.float64), (model_py.triton_attention, dtype)):
        *qkv, weight = (x.to(kind, copy=True).requires_grad_() for x in inputs)
        output = attention(*qkv, start)
        (output * weight).sum().backward()
        results.append([output, *(x.grad for x in qkv)])
    assert results[1][0].dtype == dtype
    for exact, ours in zip(*results, strict=True):
        close(ours, exact, PRECISION[dtype])


@runs
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_forward_and_backward(shape, dtype):
    check_attention(shape, dtype)


@runs
@pytest.mark.parametrize("size", [0, 1] if model_py.INTERPRET else range(4))
def test_attention_with_every_size_of_blocks(size, monkeypatch):
    """Those that the autotuner did not pick here it may pick elsewhere."""
    for kernel in (model_py.attention_forward, model_py.attention_backward_q, model_py.attention_backward_kv):
        small = [triton.Config({"BM": m, "BN": 48 - m}) for m in (16, 32)]
        sizes = small if model_py.INTERPRET else kernel.configs
        monkeypatch.setattr(kernel, "configs", [sizes[size % len(sizes)]])
    check_attention("ragged" if model_py.INTERPRET else "several blocks", torch.bfloat16)


@runs
def test_large_scores_do_not_overflow():
    q, k, v = (random(1, 2, 20, 64, seed=i, scale=30.0) for i in range(3))
    exact = model_py.reference_attention(q.double(), k.double(), v.double())
    close(model_py.triton_attention(q, k, v), exact, 1e-4)


@runs
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize(("heads", "groups", "d"), [(4, 2, 64), (8, 1, 128), (3, 3, 24)])
def test_decode_attention_over_a_slice_of_a_cache(heads, groups, d, dtype):
    """With more columns than a span of them has, and more spans than are joined at once."""
    R, L = 4, 75 if model_py.INTERPRET else 9000
    position = torch.tensor([0, L - 1, 31, 32], device=DEVICE)
    x = random(R, heads + 2 * groups, d, dtype=dtype)
    qkv = x.split((heads, groups, groups), dim=1)
    rope = [angle[position] for angle in model_py.rope_table(Config(head_dim=d), L, x)]
    cache = random(2, R + 2, groups, L + 9, d, dtype=dtype, seed=3)
    for row, end in enumerate(position.tolist()):
        cache[:, row, :, end:] = math.nan  # what an earlier row left there is never read
    exact = cache.nan_to_num().double()
    ours = model_py.triton_decode(*qkv, rope, cache[:, :R, :, :L], position)
    reference = model_py.reference_decoder(exact[None, :, :R, :, :L], [y.double() for y in rope], position)
    reference = reference(0, *(y.double() for y in qkv))
    close(ours, reference, PRECISION[dtype])
    for row, end in enumerate(position.tolist()):
        close(cache[:, row, :, : end + 1], exact[:, row, :, : end + 1], PRECISION[dtype])
        assert cache[:, row, :, end + 1 :].isnan().all()
    assert not cache[:, R:].isnan().any()


@runs
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize(("B", "H", "K", "T", "d"), [(1, 1, 1, 1, 64), (2, 6, 3, 5, 24)])
def test_heads_are_turned_and_their_gradients_turned_back(B, H, K, T, d, dtype):
    x = random(B, T, H + 2 * K, d, dtype=dtype)
    table = model_py.rope_table(Config(head_dim=d), T + 3, x)
    position = torch.arange(B * T, device=DEVICE).view(B, T) % 3 + 1
    for rope in ([y[:T] for y in table], [y[position] for y in table]):
        results = []
        for heads, kind in ((model_py.reference_heads, torch.float64), (model_py.heads, dtype)):
            one = x.detach().to(kind).requires_grad_()
            parts = heads(*one.split((H, K, K), dim=2), *(y.to(kind) for y in rope))
            sum((part * random(*part.shape, seed=i)).sum() for i, part in enumerate(parts)).backward()
            results.append([*parts, one.grad])
        for ours, exact in zip(results[1], results[0], strict=True):
            close(ours, exact, PRECISION[dtype])


@runs
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 3, 67)])
def test_swiglu_and_its_gradients(shape, dtype):
    both, weight = random(2 * shape[-1], *shape[:-1], dtype=dtype, scale=2.0).movedim(0, -1), random(*shape, seed=1)
    results = []
    for product, kind in ((lambda g, u: F.silu(g) * u, torch.float64), (model_py.swiglu, dtype)):
        one = both.detach().to(kind).contiguous().requires_grad_()
        y = product(*one.chunk(2, dim=-1))
        (y * weight).sum().backward()
        results.append([y, one.grad])
    for ours, exact in zip(results[1], results[0], strict=True):
        close(ours, exact, PRECISION[dtype])


@runs
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 67)])
def test_norm_without_gradients(shape, dtype):
    x, norm = random(*shape, dtype=dtype, scale=3.0), model_py.RMSNorm(shape[-1], 1e-5, device=DEVICE)
    with torch.no_grad():
        norm.weight.copy_(random(shape[-1], seed=1))
        ours = norm.to(dtype)(x)
    exact = F.rms_norm(x.double(), shape[-1:], norm.weight.double(), 1e-5)
    assert ours.dtype == dtype
    close(ours, exact, PRECISION[dtype])


# ---------------------------------------------------------------------------------------------
# Sampling


def generator(seed=0):
    return torch.Generator(DEVICE).manual_seed(seed)


@runs
@pytest.mark.parametrize("step", [0.0, 2.0])
def test_greedy_rows_and_log_probs(step):
    """With step 2 several logits of a row are the largest: the first counts."""
    logits = random(6, 77, scale=4.0)
    logits = (logits / step).round() * step if step else logits
    temperature = torch.tensor([0, 0.5, 1, 1.7, 0, 3], device=DEVICE)
    token, logprob = model_py.triton_sample(logits, temperature, generator())
    greedy = temperature == 0
    assert torch.equal(token[greedy], logits.argmax(1)[greedy])
    scaled = logits.double() / torch.where(greedy, 1, temperature)[:, None]
    close(logprob, scaled.log_softmax(1).gather(1, token[:, None])[:, 0], 1e-5)


@runs
def test_a_seed_gives_the_same_tokens_and_another_others():
    logits = random(20, 77)
    first, again, other = (model_py.triton_sample(logits, 1.0, generator(seed))[0].tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) > 8


@runs
@pytest.mark.parametrize("sampler", [model_py.triton_sample, model_py.reference_sample])
def test_tokens_follow_the_softmax_as_multinomials_do(sampler):
    """Chi-square of two samples: ours, and as many by torch.multinomial. The interpreter needs 25 ms a draw."""
    temperature = 0.7
    n, logits = 300 if model_py.INTERPRET else 100_000, random(1, 40, scale=0.8)
    token, _ = sampler(logits.expand(n, -1).contiguous(), temperature, generator())
    theirs = torch.multinomial((logits[0] / temperature).softmax(0), n, replacement=True, generator=generator(1))
    counts = torch.stack([x.bincount(minlength=40).double() for x in (token, theirs)])
    counts = counts[:, counts.sum(0) >= 10]
    expected = counts.sum(0, keepdim=True) * counts.sum(1, keepdim=True) / counts.sum()
    statistic, freedom = ((counts - expected) ** 2 / expected).sum().item(), counts.shape[1] - 1
    assert freedom > 10
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)  # about one false alarm in 10,000


@runs
def test_minus_infinity_is_never_drawn():
    """As top-k and top-p leave it."""
    logits = torch.full((20, 70), -math.inf, device=DEVICE)
    logits[:, [3, 40]] = 0.0
    token, logprob = model_py.triton_sample(logits, 1.0, generator())
    assert set(token.tolist()) == {3, 40}
    close(logprob, torch.full_like(logprob, math.log(0.5)).double(), 1e-5)


@runs
@pytest.mark.parametrize("temperature", [0.0] if model_py.INTERPRET else [0.0, 1.0])  # numpy has no argmax of nan
def test_a_row_of_nan_gives_a_token_of_the_vocabulary(temperature):
    """What a model that diverged draws must not lead the next step out of the embedding."""
    token, _ = model_py.triton_sample(torch.full((3, 77), math.nan, device=DEVICE), temperature, generator())
    assert token.min() >= 0 and token.max() < 77


# ---------------------------------------------------------------------------------------------
# Log-probs


@runs
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 9])
def test_log_probs_entropy_and_gradients(rows, dtype, temperature):
    hidden, weight = random(rows, 48, dtype=dtype), random(77, 48, dtype=dtype, seed=1, scale=0.3)
    targets = torch.arange(rows, device=DEVICE) * 9 % 77
    gradient = random(rows, seed=2)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    ours = [x.requires_grad_() for x in (hidden, weight)]
    results = []
    for score, inputs in ((model_py.score_chunk, exact), (model_py.FusedScore.apply, ours)):
        logprob, entropy = score(*inputs, targets, temperature)
        (logprob * gradient).sum().backward()
        results.append((logprob, entropy))
    for a, b in zip(results[1], results[0], strict=True):
        assert a.dtype == torch.float32
        close(a, b, PRECISION[dtype])
    for a, b in zip(ours, exact, strict=True):
        close(a.grad, b.grad, PRECISION[dtype])


# ---------------------------------------------------------------------------------------------
# The whole model


@pytest.fixture
def tiny():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    config = Config(vocab_size=80, tokenizer_size=70, **sizes)  # the last 10 rows are no token's
    ours = Llama(config).init_weights(0).to(DEVICE)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.mul_(1 if weight.ndim == 1 else 3)
    return ours


def spelled_out(ours, monkeypatch):
    """The same weights by the plain functions."""
    monkeypatch.setattr(model_py, "on_kernels", lambda x: False)
    ours.attention = model_py.reference_attention


@runs
def test_a_training_step_goes_through_the_kernels_and_equals_the_plain_one(tiny, monkeypatch):
    tokens = (torch.arange(40, device=DEVICE) * 29 % 70)[None]
    targets = torch.where(tokens % 5 == 0, IGNORE, tokens.roll(-1, 1))
    start, results = starts(7, 21, 12, device=DEVICE), []
    for plain in (False, True):
        if plain:
            spelled_out(tiny, monkeypatch)
        logprobs, entropy = tiny(tokens, targets, 0.8, start)
        tiny.zero_grad()
        logprobs.sum().backward()
        results.append([logprobs.detach(), entropy, *(w.grad.clone() for w in tiny.parameters())])
    for ours, plain in zip(*results, strict=True):
        close(ours, plain.double(), 1e-4)


@runs
def test_greedy_text_is_that_of_the_plain_loop(tiny, monkeypatch):
    prompts = [[(7 * i + j) % 70 for j in range(n)] for i, n in enumerate((3, 18, 1))]
    ours = generate(tiny, prompts, 6, [5], temperature=0, rows=2)
    spelled_out(tiny, monkeypatch)
    for prompt, completion in zip(prompts, ours, strict=True):
        tokens, logprobs = list(prompt), []
        while len(logprobs) < 6 and 5 not in tokens[len(prompt) :]:
            last = tiny(torch.tensor([tokens], device=DEVICE))[0, -1].log_softmax(0)
            tokens.append(last.argmax().item())
            logprobs.append(last.max().item())
        assert completion.tokens == tokens[len(prompt) :]
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_recorded_steps_are_reproducible_and_score_as_the_trainer_does(tiny):
    prompts = [[(7 * i + j) % 70 for j in range(n)] for i, n in enumerate((3, 18, 1))]
    runs = [generate(tiny, prompts, 40, [5], samples=4, generator=generator(seed), rows=7) for seed in (1, 1, 2)]
    first, again, other = ([c.tokens for c in completions] for completions in runs)
    assert first == again != other
    for i, completion in enumerate(runs[0]):
        text, n = prompts[i // 4] + completion.tokens, len(completion.tokens)
        tokens = torch.tensor([text], device=DEVICE)
        scored = tiny(tokens[:, :-1], tokens[:, 1:])[0][0, -n:]
        assert completion.logprobs == pytest.approx(scored.tolist(), abs=1e-4)


# ---------------------------------------------------------------------------------------------
# Compiled for GPUs that need not be there

SIZES = {"H": 32, "G": 4, "d": 128}  # Llama-3.1-8B
ROWS = {"V": "i32", "S": "i32", "T": "i32", "of_line": "i32", "scale": "fp32"}
DECODE = {"position": "*i64", "part": "*fp32", "top": "*fp32", "total": "*fp32"}
KERNELS = {  # what each argument points to, and the sizes that are compiled in
    "attention_forward": ({"start": "*i32", "lse": "*fp32"}, SIZES),
    "attention_backward_q": ({"start": "*i32", "lse": "*fp32", "delta": "*fp32"}, SIZES),
    "attention_backward_kv": ({"end": "*i32", "lse": "*fp32", "delta": "*fp32"}, SIZES),
    "decode_split": (DECODE | dict.fromkeys(("of_q", "of_k", "of_row", "of_head", "of_column"), "i32"),
                     {"K": 8, "G": 4, "d": 128, "D": 128, "GP": 16, "SPAN": 512, "BN": 64}),
    "decode_join": (DECODE, {"H": 32, "d": 128, "D": 128, "SPAN": 512, "SB": 16}),
    "sample_row": ({"temperature": "fp32", "seed": "*i64", "token": "*i64", "logprob": "*fp32"},
                   {"PER_ROW": False, "LANES": 512, "UNROLL": 4, "TURNS": 32}),
    "turn_heads": ({"sign": "fp32"} | dict.fromkeys(("period", "of_q", "of_k", "of_q_", "of_k_"), "i32"),
                   {"H": 32, "K": 8, "HP": 32, "KP": 8, "d": 128, "D": 128}),
    **dict.fromkeys(("swiglu_forward", "swiglu_backward"), (dict.fromkeys(("N", "of_gate", "of_up"), "i32"), {"BN": 2048})),
    "norm_forward": ({"N": "i32", "eps": "fp32"}, {"NP": 4096}),
    "score_forward": ({"targets": "*i64"} | dict.fromkeys(("logprob", "entropy", "lse"), "*fp32"), {"BN": 4096}),
    "score_backward": ({"targets": "*i64"} | dict.fromkeys(("lse", "gradient"), "*fp32"), {"BN": 4096}),
}  # fmt: skip
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # bytes a block may have: A100, H100 and H200


def compile_for(capability, kernel, types, constants, warps, stages):
    """The kernel with pointers and strides aligned, as at a launch; bfloat16 where `types` says nothing."""
    types = dict.fromkeys(kernel.arg_names, "*bf16") | ROWS | types | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    names = enumerate(kernel.arg_names)
    aligned = [i for i, name in names if signature[name].startswith("*") or name.startswith("of_")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attrs)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@compiles
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_and_fit_the_shared_memory(name, capability):
    kernel, (types, constants) = getattr(model_py, name), KERNELS[name]
    tuned = [(c.kwargs, c.num_warps, c.num_stages) for c in getattr(kernel, "configs", [])]
    if capability == 80:
        tuned = tuned[-1:]  # the autotuner passes over those that do not fit
    for sizes, warps, stages in tuned or [({}, 4, 3)]:
        compiled = compile_for(capability, kernel.fn if tuned else kernel, types, constants | sizes, warps, stages)
        assert compiled.metadata.shared <= SHARED_MEMORY[capability], (sizes, warps, stages)
        products = re.findall(r"wgmma|mma\.sync", compiled.asm["ptx"])
        assert bool(products) == ("attention" in name or name == "decode_split")  # on the tensor cores
