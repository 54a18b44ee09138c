"""model.py against transformers' LlamaForCausalLM, plain float64 sums, and itself one row at a time."""

import dataclasses
import json
import math
import os
from types import SimpleNamespace

import memory
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import starts
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import logging

import model as model_py
from model import IGNORE, Config, Llama, generate, load, reference_attention, save

logging.disable_progress_bar()
logging.set_verbosity_error()

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on two threads, and much slower when the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peer(folder, shard=5_000_000_000, **changes):
    """A random checkpoint written by transformers, with weights large enough to tell tokens apart."""
    torch.manual_seed(0)
    fields = {"initializer_range": 0.2, "tie_word_embeddings": False} | TINY | changes
    theirs = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    for name, weight in theirs.named_parameters():
        if "norm" in name:  # ones would hide a norm that is left out or put elsewhere
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    theirs.save_pretrained(folder, max_shard_size=shard)
    return theirs


def tiny(seed=0, scale=10.0, **changes):
    """Our own random model, its weights of standard deviation 0.02 times `scale`."""
    ours = Llama(Config(**(TINY | {"tie_word_embeddings": True} | changes))).init_weights(seed)
    unit = 0.02 / (0.7 / math.sqrt(ours.config.hidden_size))
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            weight.mul_(1 if "norm" in name else scale * unit)
    return ours


def same(a, b):
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def ids(*shape, seed=0):
    return torch.randint(0, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def prompts_of(*lengths):
    return [ids(n, seed=i).tolist() for i, n in enumerate(lengths)]


def shifted(tokens):
    """Each position's next token; the last has none."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], dim=1)


# ---------------------------------------------------------------------------------------------
# The same function as transformers'

VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one key/value head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 24},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3 rope": {"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}, "head_dim": 32},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_text_equal_transformers(tmp_path, variant):
    theirs = peer(tmp_path, **VARIANTS[variant])
    ours = load(tmp_path)
    tokens = ids(2, 200)  # far past the 32 positions that the llama3 scaling starts from
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    prompt = tokens[:1, :9]
    text = theirs.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    [completion] = generate(ours, prompt.tolist(), 24, [], temperature=0)
    assert completion.tokens == text[0, 9:].tolist()


def test_llama3_scaling_matters_where_it_is_tested(tmp_path):
    plain = peer(tmp_path, **VARIANTS["llama3 rope"] | {"rope_parameters": None})
    scaled = peer(tmp_path, **VARIANTS["llama3 rope"])
    with torch.no_grad():
        gap = (plain(ids(1, 200)).logits - scaled(ids(1, 200)).logits).abs().amax(-1)[0]
    assert gap[100:].min() > 0.01


@pytest.mark.parametrize("start", [None, torch.cat([starts(1, 20, 12), starts(33)])], ids=["whole", "packed"])
def test_reference_attention_equals_sdpa_forward_and_backward(start):
    ours, tokens = tiny(), ids(2, 33)
    results = []
    for attention in (model_py.sdpa_attention, reference_attention):
        ours.attention = attention
        ours.zero_grad()
        logits = ours(tokens, start=start)
        logits.square().mean().backward()
        results.append([logits] + [weight.grad.clone() for weight in ours.parameters()])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", [model_py.sdpa_attention, reference_attention])
def test_packed_documents_cannot_see_each_other(attention):
    ours, lengths = tiny(), (7, 1, 30, 12)
    ours.attention = attention
    documents = [ids(1, n, seed=i) for i, n in enumerate(lengths)]
    packed = ours(torch.cat(documents, 1), start=starts(*lengths)).split(lengths, dim=1)
    for document, logits in zip(documents, packed, strict=True):  # as if each stood alone
        torch.testing.assert_close(logits, ours(document), atol=1e-4, rtol=1e-4)
    documents[2] = (documents[2] + 1) % TINY["vocab_size"]
    other = ours(torch.cat(documents, 1), start=starts(*lengths)).split(lengths, dim=1)
    assert [torch.equal(a, b) for a, b in zip(packed, other, strict=True)] == [True, True, False, True]


def test_recomputed_activations_change_nothing():
    results = []
    for recompute in (False, True):
        ours, tokens = tiny(), ids(2, 20)
        for block in ours.model.layers:
            block.recompute = recompute
        kept = []  # what the forward pass leaves for the backward pass
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            logprobs, _ = ours(tokens, shifted(tokens))
        logprobs.sum().backward()
        results.append((sum(kept), [logprobs, *(weight.grad for weight in ours.parameters())]))
    (much, plain), (little, again) = results
    assert little < much / 3
    assert all(map(torch.equal, plain, again))


def test_init_is_deterministic_scaled_and_leaves_the_global_generator_alone():
    config = Config(num_hidden_layers=8)
    ours = Llama(config)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    ours.init_weights(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(ours, Llama(config).init_weights(3))
    assert not torch.equal(ours.head(), Llama(config).init_weights(4).head())
    mlp = ours.model.layers[0].mlp
    assert mlp.up_proj.weight.std().item() == pytest.approx(0.7 / 128**0.5, rel=0.05)
    assert mlp.down_proj.weight.std().item() == pytest.approx(0.7 / 128**0.5 / 4, rel=0.05)
    assert (ours.model.norm.weight == 1).all()


# ---------------------------------------------------------------------------------------------
# Log-probs


def plain_scores(ours, tokens, targets, temperature):
    """Log-probs and entropy by a full float64 log_softmax."""
    logp = (ours(tokens).double() / temperature).log_softmax(-1)
    counted = targets != IGNORE
    chosen = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return chosen * counted, -(logp.exp() * logp).sum(-1) * counted


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [True, False])
def test_scores_and_gradients_equal_a_plain_float64_log_softmax(temperature, tied):
    ours, tokens = tiny(tie_word_embeddings=tied).double(), ids(3, 40)
    targets = shifted(tokens)
    targets[0, :11] = targets[2, 25:] = IGNORE
    weight = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    gradients = []
    for score in (ours, lambda *a: plain_scores(ours, *a)):
        ours.zero_grad()
        logprobs, entropy = score(tokens, targets, temperature)
        (logprobs * weight).sum().backward()
        gradients.append([w.grad.clone() for w in ours.parameters()])
        if score is ours:
            kept = logprobs.detach(), entropy
            assert not entropy.requires_grad
    for ours_, plain in zip(kept, (logprobs, entropy), strict=True):
        assert (ours_[targets == IGNORE] == 0).all()
        torch.testing.assert_close(ours_, plain, atol=1e-10, rtol=1e-10)
    for ours_, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours_, plain, atol=1e-10, rtol=1e-10)


def test_the_chunk_size_changes_nothing(monkeypatch):
    ours, tokens = tiny(), ids(2, 40)
    results = []
    for chunk, kept in ((1, 0), (7, 0), (78, 0), (512, 0), (512, 1 << 22)):
        monkeypatch.setattr(model_py, "CHUNK", chunk)
        monkeypatch.setattr(model_py, "KEPT", kept)
        ours.zero_grad()
        logprobs, entropy = ours(tokens, shifted(tokens))
        logprobs.sum().backward()
        results.append([logprobs.detach(), entropy, ours.head().grad.clone()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_no_tensor_of_all_logits_exists(monkeypatch):
    monkeypatch.setattr(model_py, "CHUNK", 8)
    monkeypatch.setattr(model_py, "KEPT", 0)
    ours, tokens, sizes = tiny(), ids(4, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        logprobs, _ = ours(tokens, shifted(tokens))
    linear, shapes = F.linear, []
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: shapes.append((*x.shape[:-1], w.shape[0])) or linear(x, w))
    ours(tokens, shifted(tokens))[0].sum().backward()
    logits = [shape for shape in shapes if shape[-1] == TINY["vocab_size"]]
    assert len(logits) >= 2 * 4 * 31 / 8  # forward, and again in the backward pass
    assert max(map(math.prod, logits)) == 8 * TINY["vocab_size"]
    # What the forward pass keeps for the backward pass: nothing with a column per vocabulary entry.
    assert logprobs.requires_grad and max(sizes) < 4 * 31 * TINY["vocab_size"]


def test_scoring_nothing_and_bad_temperature():
    ours, tokens = tiny(), ids(2, 5)
    logprobs, entropy = ours(tokens, torch.full_like(tokens, IGNORE))
    logprobs.sum().backward()  # a rank with nothing to learn still takes part in the all-reduce
    assert logprobs.abs().sum() == entropy.abs().sum() == 0
    assert all((weight.grad == 0).all() for weight in ours.parameters())
    with pytest.raises(ValueError, match="temperature"):
        ours(tokens, shifted(tokens), 0.0)


# ---------------------------------------------------------------------------------------------
# Sampling


def test_batched_greedy_equals_one_by_one_with_early_retirement(monkeypatch):
    ours = tiny(rope_scaling=LLAMA3, tie_word_embeddings=False)
    prompts = prompts_of(3, 40, 1, 17, 29, 8, 5, 61, 2, 33, 12)
    stops = list(range(0, 96, 16))
    alone = [generate(ours, [p], 50, stops, temperature=0)[0] for p in prompts]
    lengths = {len(c.tokens) for c in alone}
    assert len(lengths) > 4 and 50 in lengths  # some stop early, at different steps, some never
    monkeypatch.setattr(model_py, "PREFILL_TOKENS", 150)  # two prompts a pass
    for rows in (512, 4, 3):  # 4 and 3: a finished row's place goes to the next prompt
        together = generate(ours, prompts, 50, stops, temperature=0, rows=rows)
        assert [c.tokens for c in together] == [c.tokens for c in alone]
        assert [c.stopped for c in together] == [c.stopped for c in alone]
    for completion in alone:
        assert completion.stopped == (completion.tokens[-1] in stops)
        assert not set(completion.tokens[:-1]) & set(stops)
        assert len(completion.logprobs) == len(completion.tokens)


def test_joined_weights_stay_parameters_of_their_own(monkeypatch):
    ours = tiny()
    attention, x = ours.model.layers[0].self_attn, torch.randn(3, 32)
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    before = {name: weight.clone() for name, weight in ours.state_dict().items()}
    ours.join()
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    assert all(torch.equal(weight, before[name]) for name, weight in ours.state_dict().items())

    def check(products):
        with torch.no_grad(), monkeypatch.context() as patch:
            made = []
            patch.setattr(F, "linear", lambda *a, linear=F.linear: made.append(1) or linear(*a))
            parts = model_py.project(x, *layers)
            assert len(made) == products
        for part, layer in zip(parts, layers, strict=True):
            torch.testing.assert_close(part, x @ layer.weight.detach().t())

    check(products=1)
    with torch.no_grad():
        layers[1].weight.mul_(2)  # as an optimizer does
    check(products=1)
    layers[2].weight = torch.nn.Parameter(layers[2].weight * 3)  # no longer next to the others
    check(products=3)
    memory = np.random.default_rng(0).random(sum(w.weight.numel() for w in layers), dtype=np.float32)
    for layer in layers:  # next to each other by chance, as an allocator may lay them, but not in one piece
        rows, memory = np.split(memory, [layer.weight.numel()])
        layer.weight = torch.nn.Parameter(torch.from_numpy(rows).view_as(layer.weight))
    assert layers[0].weight.data_ptr() + layers[0].weight.nbytes == layers[1].weight.data_ptr()
    check(products=3)
    sum(part.sum() for part in model_py.project(x, *layers)).backward()
    torch.testing.assert_close(layers[0].weight.grad, x.sum(0).expand_as(layers[0].weight))


def test_finished_rows_are_no_longer_computed(monkeypatch):
    ours, seen = tiny(), []
    step = model_py.Rows.step
    monkeypatch.setattr(model_py.Rows, "step", lambda rows, *sizes: seen.append(rows.n) or step(rows, *sizes))
    generate(ours, prompts_of(*range(2, 30)), 60, list(range(0, 96, 8)))
    assert seen[0] == 28 and seen[-1] < 14


@pytest.mark.parametrize(("temperature", "scored"), [(1.0, 1.0), (0.6, 0.6), (1.7, 1.7), (0.0, 1.0)])
def test_sampler_log_probs_equal_the_trainers(temperature, scored):
    ours = tiny(rope_scaling=LLAMA3)
    prompts = prompts_of(3, 20, 11)
    generator = torch.Generator().manual_seed(0)
    done = generate(ours, prompts, 40, [1, 2, 3], temperature, samples=4, generator=generator)
    for i, completion in enumerate(done):
        prompt, n = prompts[i // 4], len(completion.tokens)
        tokens = torch.tensor([prompt + completion.tokens])
        logprobs, _ = ours(tokens, shifted(tokens), scored)
        ours_ = logprobs[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(ours_, torch.tensor(completion.logprobs), atol=1e-4, rtol=0)
        assert n == 40 or completion.stopped


@pytest.mark.parametrize("tied", [True, False])
def test_ids_that_no_token_has_are_neither_drawn_nor_scored(tmp_path, tied):
    """A vocabulary padded from 70 to 96 is the one of 70, whatever stands in the other rows; and saved with them."""
    ours, whole = tiny(tie_word_embeddings=tied, tokenizer_size=70), tiny(tie_word_embeddings=tied)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    with torch.no_grad():
        for model in (ours, whole):
            model.get_parameter(head)[70:] *= 3
    cut = Llama(dataclasses.replace(ours.config, vocab_size=70, tokenizer_size=None))
    cut.load_state_dict({name: x[:70] if len(x) == 96 else x for name, x in ours.state_dict().items()})
    prompts, tokens, drawn, scored = [[1, 2, 3], [69, 4]], ids(2, 40) % 70, [], []
    for model in (ours, cut, whole):
        done = generate(model, prompts, 30, [], samples=20, generator=torch.Generator().manual_seed(0))
        done += generate(model, prompts, 30, [], temperature=0) + generate(model, prompts, 30, [], top_k=1)
        drawn.append([c.tokens for c in done])
        logprobs, entropy = model(tokens, shifted(tokens), 0.8)
        logprobs.sum().backward()
        gradients = [x.grad[:70] if len(x) == 96 else x.grad for x in model.parameters()]
        scored.append([logprobs.detach(), entropy, model(tokens).detach()[..., :70], *gradients])
    assert drawn[0] == drawn[1] and max(map(max, drawn[2])) >= 70
    for a, b in zip(*scored[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert (ours.get_parameter(head).grad[70:] == 0).all()
    save(ours, tmp_path)
    again = load(tmp_path)
    assert again.config.tokenizer_size == 70 and len(again.get_parameter(head)) == 96


def test_samples_of_a_prompt_stand_together_and_differ():
    ours, prompts = tiny(scale=4.0), prompts_of(4, 9, 6)
    done = generate(ours, prompts, 12, [], samples=5, generator=torch.Generator().manual_seed(0))
    assert len(done) == 15 and len({tuple(c.tokens) for c in done}) == 15
    greedy = generate(ours, prompts, 12, [], temperature=0, samples=5)
    single = generate(ours, prompts, 12, [], temperature=0)
    assert [c.tokens for c in greedy] == [c.tokens for c in single for _ in range(5)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(temperature):
    ours, [prompt] = tiny(scale=14.0), prompts_of(6)
    n, generator = 20000, torch.Generator().manual_seed(0)
    done = generate(ours, [prompt], 1, [], temperature, samples=n, generator=generator, rows=n)
    drawn = torch.tensor([c.tokens[0] for c in done]).bincount(minlength=96)
    with torch.no_grad():
        expected = (ours(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1) * n
    rare = expected < 20  # chi-square wants no tiny cells: one cell for all the rare tokens
    drawn, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (drawn, expected))
    freedom = len(expected) - 1
    statistic = ((drawn - expected) ** 2 / expected).sum().item()
    assert freedom > 10
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)  # about one false alarm in 10,000


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (8, 0.9), (1000, 1.0), (0, 1e-6)])
def test_top_k_and_top_p_leave_what_transformers_leaves(top_k, top_p):
    logits, temperature = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)), 0.7
    theirs = logits / temperature
    theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
    ours = model_py.truncate(logits, temperature, top_k, top_p)
    assert torch.equal(ours.isinf(), theirs.isinf()) and torch.equal(ours[~ours.isinf()], logits[~ours.isinf()])


def test_generate_draws_from_what_top_k_leaves():
    ours, prompts = tiny(scale=4.0), prompts_of(4, 9)
    greedy = generate(ours, prompts, 12, [], temperature=0)
    for limits in ({"top_k": 1}, {"top_p": 1e-6}):
        assert [c.tokens for c in generate(ours, prompts, 12, [], **limits)] == [c.tokens for c in greedy]
    done = generate(ours, prompts, 1, [], samples=200, top_k=3, generator=torch.Generator().manual_seed(0))
    assert all(len({c.tokens[0] for c in done[i : i + 200]}) == 3 for i in (0, 200))
    chances = {c.tokens[0]: math.exp(c.logprobs[0]) for c in done[:200]}
    assert sum(chances.values()) == pytest.approx(1, abs=1e-5)  # of the distribution that was drawn from


def test_sampling_repeats_with_a_seed_and_leaves_the_mode_and_gradients_usable():
    ours, prompts = tiny(scale=4.0).train(), prompts_of(4, 9)

    def draw(seed):
        return generate(ours, prompts, 10, [0], samples=3, generator=torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1) != draw(2)
    assert ours.training
    ours(ids(1, 5), shifted(ids(1, 5)))[0].sum().backward()
    assert ours.head().grad.abs().sum() > 0


def test_progress_hears_of_every_completion_once():
    heard = []
    done = generate(tiny(), prompts_of(3, 4, 5), 30, list(range(20)), samples=4, progress=heard.append)
    assert sum(heard) == len(done) == 12 and 0 not in heard


def test_a_stop_token_counts_wherever_the_block_ends():
    ours, [prompt] = tiny(), prompts_of(7)
    [free] = generate(ours, [prompt], 30, [], temperature=0)
    for n in range(1, 31):
        first = free.tokens.index(free.tokens[n - 1])
        [cut] = generate(ours, [prompt], 30, [free.tokens[n - 1]], temperature=0)
        assert cut.stopped and cut.tokens == free.tokens[: first + 1]
        [short] = generate(ours, [prompt], n, [], temperature=0)
        assert not short.stopped and short.tokens == free.tokens[:n]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"), ([[1], []], {}, "prompt 1 has 0 tokens"), ([[1], [2, 96]], {}, "prompt 1 has a token outside 0 .. 95"),
        ([[1] * 253], {}, "prompt 0 has 253 tokens: it may have 1 to 252"), ([[1]], {"temperature": -1.0}, "temperature"),
        *(([[1]], {name: value}, f"{name}={value}") for name, value in (
            ("max_new_tokens", 256), ("max_new_tokens", 0), ("samples", 0), ("rows", -1), ("top_p", 0.0), ("top_k", -1),
        )),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_served(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), prompts, **({"max_new_tokens": 4, "stop_ids": []} | options))


def test_the_longest_prompt_is_served():
    [completion] = generate(tiny(), [[1] * 252], 4, [])
    assert len(completion.tokens) == 4


def test_the_default_rows_are_512_on_a_cpu_and_fill_a_gpu(monkeypatch):
    """There four fifths of what is free holds them and not one more; the GPU is made up."""
    ours, length = tiny(), 40
    row = model_py.Rows(ours, 1, length, None, None).cache.nbytes + 32 * TINY["vocab_size"]
    assert model_py.fitting_rows(ours, length) == 512
    gpu = SimpleNamespace(is_cuda=True, device="cuda:0", element_size=lambda: 4)
    monkeypatch.setattr(ours, "head", lambda: gpu)
    for free in (row, 1_000_000, 10**9):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        rows = model_py.fitting_rows(ours, length)
        assert rows == 1 or rows * row <= 0.8 * free
        assert (rows + 1) * row > 0.8 * free


# ---------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard", [5e9, 2e4], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip_through_transformers(tmp_path, tied, shard, dtype):
    rope = {"rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}
    peer(tmp_path / "a", int(shard), tie_word_embeddings=tied, **rope)
    ours, tokens = load(tmp_path / "a", dtype=dtype), ids(2, 60)
    save(ours, tmp_path / "b", shard)
    files = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert (len(files) > 3) == (shard == 2e4)
    theirs, info = LlamaForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values()) and theirs.dtype == dtype
    before = LlamaForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    again = load(tmp_path / "b")
    assert again.config == ours.config and again.head().dtype == dtype
    assert ("lm_head.weight" in again.state_dict()) != tied
    with torch.no_grad():
        logits = ours(tokens)
        assert torch.equal(logits, again(tokens))
        assert torch.equal(theirs(tokens).logits, before(tokens).logits)
        near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.05}
        torch.testing.assert_close(logits, theirs(tokens).logits.float(), **near)


PUBLISHED = {"1B": 1_235_814_400, "3B": 3_212_749_824, "8B": 8_030_261_248, "70B": 70_553_706_496}  # parameters
GREAT = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(tmp_path, name):
    """Of Llama 3.2 and 3.1, by the shapes that the table of memory is worked out from."""
    raw = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False,
        "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "tie_word_embeddings": name in ("1B", "3B"),
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0", "use_cache": True,
    } | memory.COMMON | memory.MODELS.get(name, GREAT)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = Config.load(tmp_path)
    assert config.rope_theta == 500000.0 and config.rope_scaling["factor"] == 8.0
    assert config.head_dim == raw["hidden_size"] // raw["num_attention_heads"]
    assert config.eos_token_id == [128001, 128008, 128009]
    with torch.device("meta"):
        assert sum(weight.numel() for weight in Llama(config).parameters()) == PUBLISHED[name]


def edit_config(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in raw.items() if value != "drop"}))


def test_both_styles_of_rope_fields_mean_the_same(tmp_path):
    peer(tmp_path, rope_parameters=LLAMA3 | {"rope_theta": 7000.0})
    new = Config.load(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, rope_parameters="drop", rope_theta=7000.0, rope_scaling=LLAMA3)
    old = Config.load(tmp_path)
    assert old == new and old.rope_scaling == LLAMA3 and old.rope_theta == 7000.0
    edit_config(tmp_path, rope_scaling={"type" if k == "rope_type" else k: v for k, v in LLAMA3.items()})
    assert Config.load(tmp_path) == new


def test_absent_fields_mean_what_they_mean_to_transformers(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama"} | {k: v for k, v in TINY.items() if "key" not in k and "max" not in k})
    )
    ours, theirs = Config.load(tmp_path), LlamaConfig.from_pretrained(tmp_path)
    for field in dataclasses.fields(ours):
        if field.name not in ("rope_theta", "rope_scaling", "torch_dtype", "tokenizer_size"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: value}, f"{name} is {value!r}") for name, value in (
            ("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu"), ("model_type", "mistral"), ("attention_dropout", "0"),
            ("hidden_size", "32"), ("head_dim", -2), ("rms_norm_eps", math.nan), ("vocab_size", True), ("vocab_size", 96.0),
            ("tokenizer_size", "90"), ("bos_token_id", "1"),
        )),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"), ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling is .*yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"head_dim": 7}, "head_dim"),
        ({"vocab_size": "drop"}, "vocab_size missing"), ({"vocab_size": None}, "vocab_size missing"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5': must be a number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': must be true or false"),
        ({"eos_token_id": ["2"]}, r"eos_token_id is \['2'\]: must be a whole number or a list of them"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'"), ({"rope_parameters": {"rope_theta": None}}, "rope_theta is None"),
        ({"rope_parameters": "drop", "rope_theta": []}, r"rope_theta is \[\]"),
        ({"rope_parameters": LLAMA3 | {"factor": "8"}}, "factor is '8'"), ({"rope_parameters": LLAMA3 | {"factor": None}}, "factor is None"),
        ({"rope_parameters": "llama3"}, "rope_scaling is 'llama3': must be an object"),
        ({"dtype": "int8"}, "torch_dtype is 'int8': must be one of float64"), ({"dtype": ["float32"]}, "torch_dtype is"),
    ],
)  # fmt: skip
def test_a_config_we_would_get_wrong_is_refused(tmp_path, changes, message):
    peer(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)
    Config().save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(tmp_path)
    save(tiny(), tmp_path, file_bytes=2e4)
    shard = sorted(tmp_path.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load(tmp_path)
    for name in ("model.safetensors.index.json", "config.json"):
        for text in ("{", "[]"):
            (tmp_path / name).write_text(text)
            with pytest.raises(ValueError, match=name):
                load(tmp_path)


@pytest.mark.parametrize("shard", [5e9, 2e4])
def test_every_wrong_tensor_is_named(tmp_path, shard):
    save(tiny(), tmp_path, shard)
    for path in tmp_path.glob("*.safetensors"):
        state = load_file(path)
        state.pop("model.layers.1.mlp.up_proj.weight", None)
        state.pop("model.layers.1.mlp.up_proj.weight2", None)
        if "model.norm.weight" in state:
            state["model.norm.weight"] = torch.ones(31)
            state["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 32)
        save_file(state, path)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    text = str(error.value)
    assert "model.layers.1.mlp.up_proj.weight: missing" in text
    assert "model.norm.weight: (31,) in" in text and "config.json says (32,)" in text
    assert "model.layers.2.mlp.up_proj.weight: (48, 32) in" in text
    assert text.count("\n") == 3  # and nothing else


def test_a_second_copy_of_tied_embeddings_must_be_equal(tmp_path):
    save(tiny(), tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path)
    assert "lm_head.weight" not in load(tmp_path).state_dict()
    state["lm_head.weight"][3, 5] += 1
    save_file(state, path)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load(tmp_path)


def test_weights_that_diverged_are_still_read(tmp_path):
    ours = tiny()
    with torch.no_grad():
        ours.head()[3, 5] = math.nan
    save(ours, tmp_path)
    assert load(tmp_path).head()[3, 5].isnan()


def test_rotary_frequencies_of_older_files_are_passed_over(tmp_path):
    save(tiny(), tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    assert same(load(tmp_path), tiny())


def test_a_file_that_is_cut_short_is_named(tmp_path):
    save(tiny(), tmp_path)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["drop", "float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_of_several_dtypes_get_the_one_that_transformers_gives_them(tmp_path, dtype, tied):
    peer(tmp_path, tie_word_embeddings=tied)
    path, wide = tmp_path / "model.safetensors", ("model.embed_tokens.weight", "lm_head.weight")
    mixed = {name: x if name in wide else x.bfloat16() for name, x in load_file(path).items()}
    save_file(mixed, path, metadata={"format": "pt"})
    edit_config(tmp_path, dtype=dtype)
    ours, theirs = load(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path)
    assert {x.dtype for x in ours.parameters()} == {x.dtype for x in theirs.parameters()}
    with torch.no_grad():
        torch.testing.assert_close(ours(ids(2, 60)), theirs(ids(2, 60)).logits.float(), atol=0.1, rtol=0.05)


def test_weights_that_are_no_floating_point_are_named(tmp_path):
    save(tiny(), tmp_path)
    path = tmp_path / "model.safetensors"
    for dtype, name in {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3"}.items():
        save_file(load_file(path) | {"model.norm.weight": torch.ones(32).to(dtype)}, path)
        with pytest.raises(ValueError, match=f"model.norm.weight: {name} in model.safetensors, but only F64"):
            load(tmp_path)


def test_loaded_weights_are_trainable_and_their_own(tmp_path):
    save(tiny(), tmp_path)
    ours = load(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for weight in ours.parameters():
            assert weight.requires_grad and weight.device.type == "cpu"
            weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    again = load(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:  # not by rename: the same inode
        file.write(bytes(len(before)))
    assert same(again, tiny())
    (tmp_path / "model.safetensors").write_bytes(before)
    assert load(tmp_path, dtype=torch.float64).head().dtype == torch.float64


def test_a_folder_with_weights_is_not_written_into(tmp_path):
    save(tiny(seed=1), tmp_path, file_bytes=2e4)
    with pytest.raises(ValueError, match="holds weights; give another folder, or delete them"):
        save(tiny(seed=2), tmp_path)
    assert same(load(tmp_path), tiny(seed=1))
