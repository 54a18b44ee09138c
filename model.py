"""Llama, written by hand: the network, its log-probs, its sampler, and its checkpoints.

What it is: the decoder of Llama 3 (RMSNorm, rotary positions, grouped-query attention, SwiGLU) in
plain PyTorch, read from and written to Hugging Face's folder layout, so that a 0.9M-parameter toy
and Llama-3.1-8B go through the same lines. sft.py and rl.py train with `Llama.forward`, rl.py and
eval.py sample with `generate`.

    from model import Config, Llama, generate, load, save
    model = Llama(Config(vocab_size=1024)).init_weights(seed=0)   # the tiny default
    model = load("/path/to/Llama-3.2-1B", device="cuda", dtype=torch.bfloat16)
    logprobs, entropy = model(tokens, targets)                    # training and scoring
    completions = generate(model, prompts, max_new_tokens=64, stop_ids=[2], samples=16)
    save(model, "runs/sft/model")                                 # transformers opens this folder

Choices:
1. Documents are packed one after the other into a row. `start` tells for each token where its
   document begins, and that one tensor is both its position and its mask: a token at t sees those
   at start[t] .. t. Without it a row is one document; attention is causal, so pads after a row's
   end change nothing before it, and what stands there is not to be read.
2. Log-probs are computed only where `targets` counts, a chunk of positions at a time, and again in
   the backward pass: no tensor of B x T x V numbers ever exists, unless it is small.
3. The sampler draws from softmax(logits / temperature) over all ids that the tokenizer has: the trainer scores
   the distribution that was sampled from, and no other. Top-k and top-p are for evaluation.
4. The device decides how: a GPU runs the Triton kernels, a CPU torch's own operations (and the kernels where
   TRITON_INTERPRET is set); each kernel has a plain function that computes the same. A decoding step never
   waits for the device, and a GPU replays a recording of it (CUDA graph).
5. The attention is a function handed down to the blocks (causal over a batch, causal that fills the
   cache, one query over the cache): a new kernel is a new function, and the network stays as it is.
6. Rotary frequencies are recomputed in each forward pass, in float32: no buffer, hence nothing that
   .to(bfloat16) could blur or that the meta device would leave unset.
7. With tied embeddings there is one parameter, `model.embed_tokens.weight`, and no `lm_head`.
8. On a GPU the sampler lays the weights of q, k and v, and those of gate and up, next to each other in memory
   and makes one product of each. They stay parameters of their own, with Hugging Face's names.

Axes: B batch, T tokens, D width, H query heads, K key/value heads, G = H / K queries per key/value
head, d head width, V vocabulary; N counted positions; R rows in the cache, L columns of the cache.

In this order: config; rotary positions; attention; the network (`Llama`) with its log-probs; sampling (`generate`);
checkpoints (`load`, `save`); and last the kernels, which compute what plain functions before them do.
"""

import itertools
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target that does not count
CHUNK = 512  # positions per chunk of log-probs: 512 x 128,256 float32 logits are 263 MB
KEPT = 1 << 22  # so many logits (16 MB) are kept for the backward pass, more are computed again
GPU_CHUNK = 4096  # the positions of a chunk on a GPU, where larger products are faster: 1.05 GB in bfloat16
STRIDE = 4  # decoding steps between two looks at which rows have finished
PREFILL_TOKENS = 16384  # prompt tokens per prefill pass, which bounds its activations
ROWS = 512  # responses written at a time on a CPU
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# ---------------------------------------------------------------------------------------------
# Config

LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
SHAPE = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
# What a config.json means by leaving a field out: LlamaConfig's defaults, which are not ours.
ABSENT = {"num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
ABSENT |= {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": None}
# The one value of each of these fields that this file computes; it may also be absent or null.
SUPPORTED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
SUPPORTED |= {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0, "quantization_config": None}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name: torch's
COUNTS = {*SHAPE, "num_key_value_heads", "head_dim", "max_position_embeddings", "tokenizer_size"}
KINDS = [  # fields, what their values must be, and how to tell
    (COUNTS, "a whole number from 1 up", lambda x: type(x) is int and x > 0),
    ({"rms_norm_eps", "rope_theta"} | LLAMA3_ROPE, "a number above 0", lambda x: type(x) in (int, float) and 0 < x < math.inf),
    ({"tie_word_embeddings"}, "true or false", lambda x: type(x) is bool),
    ({"bos_token_id", "pad_token_id"}, "a whole number", lambda x: type(x) is int),
    ({"eos_token_id"}, "a whole number or a list of them", lambda x: {*map(type, x if type(x) is list else [x])} <= {int}),
    ({"torch_dtype"}, f"one of {', '.join(DTYPES.values())}", lambda x: x in [*DTYPES.values()]),
]  # fmt: skip


@dataclass
class Config:
    """Hugging Face's config.json of a LlamaForCausalLM; the defaults are the tiny model (0.92M).

    ValueError names the field whose value makes no model that this file computes.
    """

    vocab_size: int = 1024
    hidden_size: int = 128  # D
    intermediate_size: int = 384  # width of the SwiGLU
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    num_key_value_heads: int | None = 2  # K; None: as many as query heads
    head_dim: int | None = None  # d; None: hidden_size / num_attention_heads
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or Llama 3.1's {"rope_type": "llama3", ...}
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    torch_dtype: str | None = "float32"  # of the weights in the folder, None: their own; `save` sets it
    tokenizer_size: int | None = None  # ids from there on, of a padded vocabulary, are never drawn; None: vocab_size

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(f"num_key_value_heads ({groups}) must divide {heads} attention heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        scaling = self.rope_scaling
        if scaling and (scaling["rope_type"] != "llama3" or scaling.keys() - {"rope_type"} != LLAMA3_ROPE):
            raise ValueError(
                f"rope_scaling is {scaling}: only null, or rope_type 'llama3' with exactly "
                f"{', '.join(sorted(LLAMA3_ROPE))}, is implemented; choose such a checkpoint"
            )

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Config":
        """Reads folder/config.json of transformers 4 or 5; ValueError names file, field and mend."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; give a folder that holds a Llama model")
        try:
            return cls(**read_fields(json.loads(path.read_text())))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, folder: str | os.PathLike) -> None:
        """Writes folder/config.json in transformers 4's form, which version 5 reads as well."""
        fields = {name: value for name, value in SUPPORTED.items() if value is not None}
        (Path(folder) / "config.json").write_text(json.dumps(fields | asdict(self), indent=2) + "\n")


def read_fields(raw: dict) -> dict:
    """The arguments of Config in a parsed config.json; ValueError for what we would get wrong. null means absent."""
    if not isinstance(raw, dict):
        raise ValueError("not an object; give a Llama's config.json")
    raw = {name: value for name, value in raw.items() if value is not None}
    for name, value in SUPPORTED.items():
        if raw.get(name, value) != value:
            raise ValueError(f"{name} is {raw[name]!r}, but only {value!r} is implemented; choose a plain Llama 3")
    if missing := [name for name in SHAPE if name not in raw]:
        raise ValueError(f"{', '.join(missing)} missing; add what the checkpoint was trained with")
    if "dtype" in raw:
        raw["torch_dtype"] = raw["dtype"]  # as version 5 calls it
    fields = {name: raw[name] for name in Config.__dataclass_fields__ if name in raw} | read_rope(raw)
    values = fields | (fields["rope_scaling"] or {})
    for names, kind, right in KINDS:
        for name in sorted(names & values.keys()):
            if not right(values[name]):
                raise ValueError(f"{name} is {values[name]!r}: must be {kind}")
    return ABSENT | fields


def read_rope(raw: dict) -> dict:
    """rope_theta and rope_scaling, from version 5's `rope_parameters` or version 4's two fields."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling is {rope!r}: must be an object or null")
    rope = dict(rope)
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    rope = {"rope_type": rope.pop("type", "default")} | rope  # the oldest files say `type`
    return {"rope_theta": theta, "rope_scaling": rope if rope != {"rope_type": "default"} else None}


# ---------------------------------------------------------------------------------------------
# Float32 sums and rotary positions


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is already that: for sums that bfloat16 would spoil."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Radians per position of each pair of coordinates: (d / 2,) float32 (arXiv 2104.09864, 3.2.2).

    Llama 3.1 slows down the waves longer than its first context by `factor`, keeps the short ones,
    and blends linearly between the two (arXiv 2407.21783, section 3.4.2, and its released code).
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent  # (d / 2,)
    if (scaling := config.rope_scaling) is None:
        return frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # per context
    keep = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / scaling["factor"] + keep * frequency


def rope_table(config: Config, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of positions 0 .. length - 1, each (length, d) in the dtype of `like`."""
    frequency = rope_frequencies(config, like.device)
    angle = torch.arange(length, device=like.device).float()[:, None] * frequency  # (L, d / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1).to(like.dtype), torch.cat([-sin, sin], dim=-1).to(like.dtype)


# ---------------------------------------------------------------------------------------------
# Attention: q (B, H, T, d), k and v (B, K, T, d) -> (B, H, T, d); query head h reads head h // G


def reference_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of coordinates (i, i + d / 2) of x (..., d) by its angle; a copy of x."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def reference_heads(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, T, H, d), k and v (B, T, K, d) -> (B, H or K, T, d), with q and k turned by their positions.

    cos and sin are (T, d), or (B, T, d).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return *(reference_rotate(x, cos.unsqueeze(-3), sin.unsqueeze(-3)) for x in (q, k)), v


def heads(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_heads` by what is fastest for the device."""
    if not on_kernels(q):
        return reference_heads(q, k, v, cos, sin)
    turns = (angle.reshape(-1, q.shape[-1]) for angle in (cos, sin))
    return tuple(part.transpose(1, 2) for part in FusedHeads.apply(q, k, v, *turns))


def reference_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(d)) v within documents, spelled out and in float32.

    start (B, T) int64: the first position of the document that position t belongs to (all 0 if
    None). What the fast paths must equal.
    """
    groups, columns = q.shape[1] // k.shape[1], torch.arange(q.shape[2], device=q.device)
    k, v = (wide(x).repeat_interleave(groups, dim=1) for x in (k, v))  # (B, H, T, d)
    scores = wide(q) @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    hidden = columns > columns[:, None]  # (T, T): the future
    if start is not None:
        hidden = hidden | (columns < start[:, None, :, None])  # (B, 1, T, T): other documents
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).to(q.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None) -> Tensor:
    """The same by torch's fused kernel for the device, called for each document by itself."""
    causal = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    if start is None:
        return causal(q, k, v)
    rows = []
    for b, row in enumerate(start == torch.arange(start.shape[1], device=start.device)):
        first = row.nonzero().flatten().tolist()  # where a document begins
        sizes = [end - begin for begin, end in itertools.pairwise([*first, len(row)])]
        documents = zip(*(x[b : b + 1].split(sizes, dim=2) for x in (q, k, v)), strict=True)
        rows.append(torch.cat([causal(*document) for document in documents], dim=2))
    return torch.cat(rows)


def attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None) -> Tensor:
    """`reference_attention` by what is fastest for the device."""
    return (triton_attention if on_kernels(q) else sdpa_attention)(q, k, v, start)


def project(x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """Each layer's output for x (..., D): by one product where `join` has put their weights below each other.

    Only without gradients. In training the weights stay apart, for FSDP to gather and forget.
    """
    weights = [layer.weight for layer in layers]
    if torch.is_grad_enabled() or not joined(weights):
        return [F.linear(x, w) for w in weights]
    sizes = list(map(len, weights))
    return F.linear(x, weights[0].data.as_strided((sum(sizes), x.shape[-1]), (x.shape[-1], 1))).split(sizes, dim=-1)


def joined(weights: Sequence[Tensor]) -> bool:
    """Whether the weights lie below each other in one piece of memory. (Pieces of their own may touch by chance.)"""
    if len({w.untyped_storage().data_ptr() for w in weights}) > 1:
        return False
    places = itertools.accumulate((w.nbytes for w in weights), initial=weights[0].data_ptr())
    return all(w.data_ptr() == place for w, place in zip(weights, places, strict=False))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions; no biases."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        width, self.head_dim, self.layer = config.hidden_size, config.head_dim, layer
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)

    def forward(self, x: Tensor, attend: Callable) -> Tensor:
        """x (B, T, D) -> (B, T, D).

        `attend` takes the layer, q (B, T, H, d), and k and v (B, T, K, d), all still without positions, to
        (B, H, T, d).
        """
        parts = project(x, self.q_proj, self.k_proj, self.v_proj)
        y = attend(self.layer, *(part.unflatten(-1, (-1, self.head_dim)) for part in parts))
        return self.o_proj(y.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------------------------------------
# The network


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) weight (arXiv 1910.07467, eq. 4)."""

    def forward(self, x: Tensor) -> Tensor:
        # With gradients torch's own kernel is as fast; for a few rows, while sampling, it takes twice as long.
        if torch.is_grad_enabled() or not on_kernels(x):
            return super().forward(x)
        N, y = x.shape[-1], torch.empty_like(x, memory_format=torch.contiguous_format)
        norm_forward[(x.numel() // N,)](x.contiguous(), self.weight, y, self.eps, N, triton.next_power_of_2(N))
        return y


# Activation checkpointing: keeps a call's arguments alone, and repeats the call in the backward pass.
again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, of one shape (..., N)."""
    if not on_kernels(gate):
        return F.silu(gate) * up
    return FusedSwiGLU.apply(*(x.reshape(-1, x.shape[-1]) for x in (gate, up))).view(gate.shape)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: Config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*project(x, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, T, D) -> (B, T, D).

    With `recompute` only x is kept for the backward pass, which computes the rest once more
    (activation checkpointing, arXiv 1604.06174).
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.recompute = False

    def forward(self, x: Tensor, attend: Callable) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return again(self.compute, x, attend)
        return self.compute(x, attend)

    def compute(self, x: Tensor, attend: Callable) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), attend)
        return x + self.mlp(self.post_attention_layernorm(x))


def score_chunk(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
    """hidden (N, D), weight (V, D), targets (N,) -> log-probs and entropy, both (N,), wide."""
    logp = (wide(F.linear(hidden, weight)) / temperature).log_softmax(-1)  # (N, V)
    fixed = logp.detach()
    entropy = -(fixed.exp() * fixed).sum(-1)
    # The same as a gather, with a cheaper backward pass.
    return -F.nll_loss(logp, targets, reduction="none"), entropy


def score(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
    """`score_chunk`, some rows at a time; unless logits are few, the backward pass computes them again."""
    if not on_kernels(hidden) and len(hidden) * len(weight) <= KEPT:
        return score_chunk(hidden, weight, targets, temperature)
    one, size = (FusedScore.apply, GPU_CHUNK) if on_kernels(hidden) else (partial(again, score_chunk), CHUNK)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    parts = [one(h, weight, t, temperature) for h, t in chunks]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class Llama(nn.Module):
    """A decoder whose parameters bear Hugging Face's names.

    The parameters are torch's own random ones until `init_weights` or `load` fills them.
    `attention` is the function that a batch goes through; tests put reference_attention in its place.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.attention = config, attention
        embed = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.model = nn.ModuleDict({"embed_tokens": embed, "layers": layers, "norm": norm})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Normal(0, 0.7 / sqrt(D)), projections into the residual stream / sqrt(2 layers) as in GPT-2.

        GPT-2's 0.02 is 0.55 / sqrt(768); as a constant it would be small for a narrow model.

        Drawn on the CPU in the order of the names: the same weights on every device. Returns self.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            std = 0.7 / math.sqrt(self.config.hidden_size)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            if weight.ndim == 1:  # a norm's
                weight.fill_(1.0)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        return self

    def head(self) -> Tensor:
        """The output matrix, (V, D), without the rows of a padded vocabulary that are no token's."""
        weight = (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight
        size = self.config.tokenizer_size or len(weight)
        return weight if size == len(weight) else weight[:size]

    @torch.inference_mode(False)
    @torch.no_grad()
    def join(self) -> None:
        """Moves weights that multiply the same numbers below each other in one piece of memory, for `project`."""
        for block in self.model.layers:
            a, mlp = block.self_attn, block.mlp
            for layers in ((a.q_proj, a.k_proj, a.v_proj), (mlp.gate_proj, mlp.up_proj)):
                weights = [layer.weight for layer in layers]
                if not joined(weights):
                    parts = torch.cat(weights).split(list(map(len, weights)))
                    for weight, part in zip(weights, parts, strict=True):
                        weight.data = part

    def hidden(self, tokens: Tensor, attend: Callable) -> Tensor:
        """tokens (B, T) -> the residual stream after the last block, before its norm, (B, T, D)."""
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, attend)
        return x

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, temperature: float = 1.0, start: Tensor | None = None
    ):
        """tokens (B, T) int64; start (B, T) int64, the first position of each token's document.

        Without `start` a row is one document, padded on the right. Without targets: logits (B, T, V)
        float32. With targets (B, T) int64, where targets[b, t] follows tokens[b, : t + 1] or is
        IGNORE: (logprobs, entropy), both (B, T) float32, of targets[b, t] under
        softmax(logits / temperature), and of that distribution, in nats; zeros where ignored. No
        gradient flows through the entropy. ValueError unless temperature > 0.
        (On a CPU a float64 model gives float64 throughout; the kernels sum in float32.)
        """
        rope = rope_table(self.config, tokens.shape[1], self.head())  # (T, d) each
        if start is not None:
            position = torch.arange(tokens.shape[1], device=tokens.device) - start
            rope = tuple(x[position] for x in rope)  # (B, T, d)
        x = self.hidden(tokens, lambda layer, *qkv: self.attention(*heads(*qkv, *rope), start))
        if targets is None:
            return wide(F.linear(self.model.norm(x), self.head()))
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0 to score tokens, not {temperature}")
        counted = targets != IGNORE
        x = self.model.norm(x[counted])  # (N, D)
        logprobs, entropy = score(x, self.head(), targets[counted], temperature)  # (N,) each
        spread = logprobs.new_zeros(targets.shape)
        return tuple(spread.masked_scatter(counted, part) for part in (logprobs, entropy.detach()))


# ---------------------------------------------------------------------------------------------
# Sampling


@dataclass
class Completion:
    """What followed a prompt."""

    tokens: list[int]  # the stop token included, if it was reached
    logprobs: list[float]  # of each token, under the distribution that it was drawn from
    stopped: bool  # by a stop token, not by max_new_tokens


def reference_sample(logits: Tensor, temperature: float | Tensor, generator: torch.Generator | None):
    """logits (R, V) -> one token id per row, (R,) int64, and its log-prob, (R,) float32.

    temperature, one for all rows or (R,), 0 takes the likeliest token, with its log-prob at temperature
    1. Else the first token at which the cumulated probability passes a uniform number: one number a
    row, where Gumbel-max needs V; on a CPU that noise would cost ten times as much as the rest.
    """
    t = torch.as_tensor(temperature, device=logits.device).expand(len(logits))[:, None]
    p = (wide(logits) / torch.where(t == 0, 1, t)).softmax(-1)  # (R, V)
    passed = p.cumsum(-1, dtype=torch.float64)
    u = torch.rand(t.shape, dtype=torch.float64, device=p.device, generator=generator) * passed[:, -1:]
    drawn = torch.searchsorted(passed, u, right=True).clamp(max=p.shape[1] - 1)
    token = torch.where(t == 0, logits.argmax(-1, keepdim=True), drawn)
    return token.squeeze(1), p.gather(1, token).squeeze(1).log()


def truncate(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits (R, V), minus infinity but for the likeliest tokens: those that could be drawn.

    top_k of them (0: all), and then no more than it takes for a probability of top_p together (nucleus
    sampling, arXiv 1904.09751, section 3.1), at least one.
    """
    if top_k:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ranked, order = logits.sort(descending=True)
        p = (wide(ranked) / (temperature or 1.0)).softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # never the first, before which there is nothing
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    return logits


def sample(logits: Tensor, temperature: float | Tensor, generator: torch.Generator | None):
    """`reference_sample` by what is fastest for the device; the same in distribution, not token for token."""
    return (triton_sample if on_kernels(logits) else reference_sample)(logits, temperature, generator)


def reference_decoder(cache: Tensor, rope: tuple[Tensor, Tensor], position: Tensor) -> Callable:
    """One step of R rows over the cache (layers, 2, R, K, L, d): attend(layer, q, k, v) -> (R, H, d).

    One token a row: q (R, H, d), k and v (R, K, d), rope's cos and sin (R, d), position (R,). Writes the turned
    k, and v, to column position[r] of row r, and attends to columns 0 .. position[r]. What is right of that must
    be finite, but does not count. What all layers share is made here, once.
    """
    R, K, L = cache.shape[2:5]
    row, (cos, sin) = torch.arange(R, device=cache.device), (x[:, None] for x in rope)
    hidden = torch.arange(L, device=cache.device) > position[:, None]  # (R, L)
    mask = cache.new_zeros(R, L).masked_fill_(hidden, -math.inf).repeat_interleave(K, dim=0)[:, None]  # (R K, 1, L)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for stored, x in zip(cache[layer], (reference_rotate(k, cos, sin), v), strict=True):
            stored[row, :, position] = x
        queries = reference_rotate(q, cos, sin).reshape(R * K, -1, q.shape[-1])  # (R K, G, d)
        keys, values = cache[layer].flatten(1, 2)  # (R K, L, d) each
        scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=1 / math.sqrt(q.shape[-1]))
        return (wide(scores).softmax(-1).to(q.dtype) @ values).view(q.shape)

    return attend


def decoder(cache: Tensor, rope: tuple[Tensor, Tensor], position: Tensor) -> Callable:
    """`reference_decoder` by what is fastest for the device."""
    if not on_kernels(cache):
        return reference_decoder(cache, rope, position)
    return lambda layer, *qkv: triton_decode(*qkv, rope, cache[layer], position)


class Rows:
    """The rows being sampled: the first n of a cache that is allocated once.

    Each row has its own length: it sees columns 0 .. position[r] of the cache, where position[r] is
    the place of its newest token, and what another row left further right is never read.

    `draw` takes logits (R, V) to a token and its log-prob for each row, with numbers from `generator`.
    On a GPU a decoding step, its draw included, is recorded once for each power of four of rows and replayed from
    then on (a CUDA graph), since a few hundred launches take four times as long as their work.
    """

    def __init__(self, model: Llama, rows: int, length: int, draw: Callable, generator: torch.Generator | None):
        config, weight = model.config, model.head()
        sizes = (config.num_hidden_layers, 2, rows, config.num_key_value_heads)
        # Zeros, because a masked column still enters the sum as 0 x its value: it must be finite.
        self.cache = weight.new_zeros(*sizes, length, config.head_dim)  # (layers, 2, R, K, L, d)
        self.token = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.position = torch.zeros_like(self.token)
        self.rope = rope_table(config, length, weight)
        self.model, self.draw, self.generator, self.n = model, draw, generator, 0
        if weight.is_cuda:
            model.join()
        self.graphs = None  # once a step is made: rows -> the recorded step, and where it leaves its results

    def admit(self, prompts: list[list[int]], copies: list[int]) -> None:
        """Appends copies[i] rows for prompt i, which is computed once."""
        size = max(1, PREFILL_TOKENS // max(map(len, prompts)))
        for i in range(0, len(prompts), size):
            self.prefill(prompts[i : i + size], copies[i : i + size])

    def prefill(self, prompts: list[list[int]], copies: list[int]) -> None:
        """One pass of `admit`, over the packed prompts. The first `step` feeds the last token again, for its logits."""
        device, lengths = self.token.device, torch.tensor(list(map(len, prompts)))
        tokens = torch.tensor([t for prompt in prompts for t in prompt], device=device)  # (T,)
        first = lengths.cumsum(0) - lengths  # (P,)
        start = torch.repeat_interleave(first, lengths).to(device)  # (T,)
        position = torch.arange(len(tokens), device=device) - start
        source = torch.repeat_interleave(torch.tensor(copies))  # row -> prompt
        rows, longest = slice(self.n, self.n + len(source)), int(lengths.max())
        # Where a row's columns stand in the pack; those right of its prompt are not read.
        places = (first[source, None] + torch.arange(longest)).clamp(max=len(tokens) - 1).to(device)
        rope = tuple(x[position] for x in self.rope)  # (T, d)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = heads(q, k, v, *rope)
            for cache, x in zip(self.cache[layer], (k, v), strict=True):
                cache[rows, :, :longest] = x[0][:, places].transpose(0, 1)
            return self.model.attention(q, k, v, start[None])

        self.model.hidden(tokens[None], attend)
        self.position[rows] = (lengths[source] - 1).to(device)
        self.token[rows] = tokens[(first + lengths - 1)[source].to(device)]
        self.n += len(source)

    def step(self, n: int, length: int) -> tuple[Tensor, Tensor]:
        """Feeds the first n rows their newest tokens and draws the next, (n,), and log-probs, (n,).

        length > every position: the columns of the cache that a CPU computes with.
        """
        token, position = self.token[:n], self.position[:n]
        rope = tuple(x[position] for x in self.rope)  # (n, d)
        decode = decoder(self.cache[:, :, :n, :, :length], rope, position)

        def attend(layer: int, *qkv: Tensor) -> Tensor:
            return decode(layer, *(x[:, 0] for x in qkv))[:, :, None]

        x = self.model.hidden(token[:, None], attend)  # (n, 1, D)
        drawn = self.draw(F.linear(self.model.model.norm(x[:, 0]), self.model.head()))
        token.copy_(drawn[0])
        position += 1
        return drawn

    def replay(self) -> tuple[Tensor, Tensor]:
        """`step` of all rows and of some idle ones, recorded when it is first made for so many."""
        n = 1
        while n < self.n:
            n *= 4
        n = min(n, len(self.token))
        self.position[self.n : n] = 0  # idle rows
        if self.graphs is None:
            self.graphs = {}  # the first step compiles kernels, which cannot be recorded
            return self.step(self.n, self.cache.shape[4])
        if n not in self.graphs:
            self.graphs[n] = self.record(n)
        graph, drawn = self.graphs[n]
        graph.replay()
        return tuple(x[: self.n].clone() for x in drawn)

    def record(self, n: int) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        """The step of n rows as a graph, and its results, which each replay overwrites."""
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            return graph, self.step(n, self.cache.shape[4])

    def decode(self, steps: int) -> tuple[Tensor, Tensor]:
        """Draws `steps` tokens for each row: ids (n, steps) and log-probs (n, steps)."""
        if self.token.is_cuda:
            drawn = [self.replay() for _ in range(steps)]
        else:
            length = int(self.position[: self.n].max()) + 1
            drawn = [self.step(self.n, length + i) for i in range(steps)]
        return tuple(torch.stack(x, dim=1) for x in zip(*drawn, strict=True))

    def keep(self, live: list[int]) -> list[int]:
        """Drops the other rows; returns the rows that now stand at 0 .. len(live) - 1.

        The last live rows move into the places of the dropped ones, so that the cost is that of the
        rows that finished and not of those that go on.
        """
        order = list(range(len(live)))
        holes = sorted(set(order) - set(live))
        tail = [row for row in live if row >= len(live)]
        for hole, row in zip(holes, tail, strict=True):
            order[hole] = row
        for layer in self.cache:  # one by one: the moved rows are copied first, and one layer's are few
            layer[:, holes] = layer[:, tail]
        self.token[holes], self.position[holes] = self.token[tail], self.position[tail]
        self.n = len(live)
        return order


def check_request(
    model, prompts, max_new_tokens: int, samples: int, temperature: float, rows: int, top_k: int, top_p: float
):
    """Raises ValueError for a request that `generate` cannot serve."""
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"{top_k=}, {top_p=}: give a top_k of 0 (all) or more, a top_p above 0 and up to 1 (all)")
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if not prompts or samples < 1 or min(rows, temperature) < 0 or not 0 < max_new_tokens < limit:
        raise ValueError(
            f"{len(prompts)} prompts, {samples=}, {rows=}, {temperature=}, {max_new_tokens=}: give at least "
            f"one prompt and sample, rows and a temperature from 0 up, and 1 to {limit - 1} new tokens"
        )
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit - max_new_tokens:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens: it may have 1 to {limit - max_new_tokens}, "
                f"max_position_embeddings ({limit}) less max_new_tokens ({max_new_tokens})"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(f"prompt {i} has a token outside 0 .. {vocab - 1}")


def fitting_rows(model: Llama, length: int) -> int:
    """How many rows of `length` tokens to write at a time: `ROWS` on a CPU, on a GPU what its free memory holds.

    A fifth is left for the prompts' activations; a row takes 32 bytes a logit beside it, for top-p's sort.
    """
    config, weight = model.config, model.head()
    if not weight.is_cuda:
        return ROWS
    torch.cuda.empty_cache()  # what earlier work has left counts as free
    column = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()
    free, _ = torch.cuda.mem_get_info(weight.device)
    return max(1, int(0.8 * free / (length * column + 32 * config.vocab_size)))


def collect(drawn: tuple[Tensor, Tensor], stops: Tensor, into: list[Completion]) -> None:
    """Appends a block of tokens to the rows' completions, cut after the first stop token."""
    tokens, logprobs = drawn  # (n, steps)
    stop = torch.isin(tokens, stops)
    stopped = stop.any(1)
    count = torch.where(stopped, stop.int().argmax(1) + 1, tokens.shape[1])  # (n,)
    columns = (x.tolist() for x in (tokens, logprobs, count, stopped))
    for completion, ids, logps, n, end in zip(into, *columns, strict=True):
        completion.tokens += ids[:n]
        completion.logprobs += logps[:n]
        completion.stopped = end


@torch.inference_mode()
def generate(
    model: Llama, prompts: list[list[int]], max_new_tokens: int, stop_ids: list[int], temperature: float = 1.0,
    samples: int = 1, generator: torch.Generator | None = None, progress: Callable[[int], object] | None = None,
    rows: int = 0, top_k: int = 0, top_p: float = 1.0,
) -> list[Completion]:  # fmt: skip
    """Samples `samples` completions of each prompt: prompt 0's first, then prompt 1's, ...

    temperature 0 is greedy. `generator` lives on the model's device; None is torch's global one.
    progress(n) hears of n newly finished completions (a tqdm bar's `update`). At most `rows` rows (0:
    `fitting_rows`) are sampled at a time, a finished one making place for the next; the cache is allocated for
    them at the longest prompt + max_new_tokens (512 rows of 1024 tokens: 64 GiB for Llama-3.1-8B in
    bfloat16). Their number decides which of the generator's numbers a completion gets. The model computes the
    same in train and eval mode, so its mode is left alone. top_k and top_p as in `truncate`; not for RL, whose
    trainer scores all tokens. ValueError for a request it cannot serve.
    """
    check_request(model, prompts, max_new_tokens, samples, temperature, rows, top_k, top_p)

    def draw(logits: Tensor) -> tuple[Tensor, Tensor]:
        return sample(truncate(logits, temperature, top_k, top_p), temperature, generator)

    done = [Completion([], [], False) for _ in range(len(prompts) * samples)]
    length = max(map(len, prompts)) + max_new_tokens
    rows = min(rows or fitting_rows(model, length), len(done))
    batch = Rows(model, rows, length, draw, generator)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=batch.token.device)
    waiting, live = deque(range(len(done))), []  # live[r]: the completion that row r is writing
    while waiting or live:
        new = [waiting.popleft() for _ in range(min(rows - len(live), len(waiting)))]
        if new:
            copies = Counter(i // samples for i in new)
            batch.admit([prompts[i] for i in copies], list(copies.values()))
            live += new
        steps = min(STRIDE, min(max_new_tokens - len(done[i].tokens) for i in live))
        collect(batch.decode(steps), stops, [done[i] for i in live])
        going = [r for r, i in enumerate(live) if not done[i].stopped and len(done[i].tokens) < max_new_tokens]
        if progress and len(going) < len(live):
            progress(len(live) - len(going))
        live = [live[r] for r in batch.keep(going)]
    return done


# ---------------------------------------------------------------------------------------------
# Checkpoints


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in `folder`; FileNotFoundError names a gap, ValueError a bad index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: holds neither {single.name} nor {index.name}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: no whole index of safetensors files; fetch it again") from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: {index.name} asks for {', '.join(missing)}; fetch them")
    return [folder / name for name in names]


def stored(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """(file, name, part to be sliced) of each tensor, memory-mapped; ValueError names a file that is cut short."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if not name.endswith("rotary_emb.inv_freq"):  # of older files; config.json gives them
                        yield path, name, file.get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def check_weights(folder: Path, model: Llama, twin: bool) -> list[str]:
    """The dtypes of the tensors in `folder`; ValueError if they do not fit `model`. twin: a copy of a tied head may be there."""
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    extra, wrong, kinds = {HEAD: shapes[EMBED]} if twin else {}, {}, {}
    for path, name, part in stored(folder):
        found, kinds[name], wanted = tuple(part.get_shape()), part.get_dtype(), (shapes | extra).get(name)
        if found != wanted:
            other = f"config.json says {wanted}" if wanted else "which the model does not have"
            wrong[name] = f"{found} in {path.name}, {other}"
        elif kinds[name] not in DTYPES:
            wrong[name] = f"{kinds[name]} in {path.name}, but only {', '.join(DTYPES)} are implemented"
    wrong |= {name: "missing" for name in shapes if name not in kinds}
    if wrong:
        lines = [f"  {name}: {what}" for name, what in sorted(wrong.items())]
        raise ValueError("\n".join([f"{folder}: weights do not fit config.json; correct either:", *lines]))
    return [DTYPES[kind] for kind in kinds.values()]


def whole(x: Tensor) -> Tensor:
    """x, gathered on every rank if it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own_rows(weight: Tensor) -> tuple[Tensor, slice]:
    """What this rank holds of a parameter, and which of its rows those are."""
    if not isinstance(weight, DTensor):
        return weight, slice(None)
    [chunk] = weight.__create_chunk_list__()
    return weight.to_local(), slice(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])


@torch.no_grad()
def load(
    folder: str | os.PathLike, device="cpu", dtype: torch.dtype | None = None, shard: Callable[[Llama], Any] | None = None
) -> Llama:  # fmt: skip
    """The model in a Hugging Face folder: config.json, and safetensors in one file or several.

    Tensors go one by one from the memory-mapped file to `device` and `dtype` (None: config.json's, else
    that of the first tensor, as in transformers). `shard` may split the model over ranks before any memory is
    taken; each then reads its own rows alone. FileNotFoundError for a missing file; ValueError that
    names every missing, unexpected or misshapen tensor, or the file that is cut short.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = Llama(Config.load(folder))
    twin, copy = model.config.tie_word_embeddings, None
    kinds = check_weights(folder, model, twin)
    model.to(dtype or getattr(torch, model.config.torch_dtype or kinds[0]))
    if shard:
        shard(model)
    model.to_empty(device=device)
    weights = {name: own_rows(weight) for name, weight in model.named_parameters()}
    for _, name, part in stored(folder):
        own, rows = weights.get(name, weights[EMBED])
        own = own if name in weights else (copy := torch.empty_like(own))
        if len(own):  # of few rows some ranks have none
            own.copy_(part[rows])
    if copy is not None and not torch.equal(copy, weights[EMBED][0]):
        raise ValueError(f"{folder}: {HEAD} differs from {EMBED}, but tie_word_embeddings is true; correct either")
    return model


@torch.no_grad()
def save(model: Llama, folder: str | os.PathLike, file_bytes: float = 5e9, dtype: torch.dtype | None = None) -> None:
    """Writes config.json and safetensors into `folder`, which holds no weights yet (else ValueError), as `dtype`.

    Of several ranks, which all call it, the first writes, a file's tensors at a time. Not atomic: write into a temporary
    folder and rename it.
    """
    folder, weights = Path(folder), model.state_dict()
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first and any(folder.glob("*.safetensors*")):
        raise ValueError(f"{folder}: holds weights; give another folder, or delete them")
    dtype = dtype or next(iter(weights.values())).dtype
    sizes = {name: dtype.itemsize * weight.numel() for name, weight in weights.items()}
    files, room = [], 0
    for name, size in sizes.items():  # consecutive ones, as many as fit `file_bytes` together, and at least one
        if size > room:
            files.append([])
            room = file_bytes
        files[-1].append(name)
        room -= size
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else ["model.safetensors"]
    model.config.torch_dtype = str(dtype).removeprefix("torch.")
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.save(folder)
    for file, keys in zip(names, files, strict=True):
        tensors = {}
        for key in keys:
            weight = whole(weights[key].to(dtype))
            tensors |= {key: weight.contiguous().cpu()} if first else {}
        if first:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if first and len(files) > 1:
        places = {key: file for file, keys in zip(names, files, strict=True) for key in keys}
        index = json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}, indent=2)
        (folder / "model.safetensors.index.json").write_text(index)


# ---------------------------------------------------------------------------------------------
# Kernels: Triton on a GPU; with TRITON_INTERPRET=1 on a CPU too, where the tests run them

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = tl.constexpr(INTERPRET)  # the same, for kernels
MASKED = tl.constexpr(-1e30)  # a maximum before there is one; not -inf, since -inf - -inf is nan
LOG2E = 1.4426950408889634  # exp(x) = exp2(x LOG2E), and exp2 is what the hardware has


def on_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels compute this: on a GPU, or anywhere with TRITON_INTERPRET=1."""
    return x.is_cuda or INTERPRET


def tuned(*sizes: tuple[int, int, int, int]):
    """Autotunes over (BM, BN, warps, stages), once for each head width and dtype.

    The first of each is the fastest on an H200 at head width 128, or within 3% of it; the last fits the shared
    memory of an A100 in float32.
    """
    configs = [triton.Config({"BM": m, "BN": n}, num_warps=w, num_stages=s) for m, n, w, s in sizes]
    small = [triton.Config({"BM": 16, "BN": 16})]
    return triton.autotune(configs=small if INTERPRET else configs, key=["d"])


@triton.jit
def tile(x, rows, stride, T, d: tl.constexpr, D: tl.constexpr):
    """Rows `rows` of a matrix of T rows and d columns, (len(rows), D); zeros outside of it."""
    columns = tl.arange(0, D)
    inside = (rows[:, None] < T) & (columns[None, :] < d)
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def put(x, y, rows, stride, T, d: tl.constexpr, D: tl.constexpr):
    """Stores y where `tile` loads."""
    columns = tl.arange(0, D)
    inside = (rows[:, None] < T) & (columns[None, :] < d)
    tl.store(x + rows[:, None] * stride + columns[None, :], y.to(x.dtype.element_ty), mask=inside)


@triton.jit
def blocks(x, T, stride, d: tl.constexpr, BN: tl.constexpr):
    """A descriptor of a matrix of T rows: load([i, j]) is BN rows and d columns from there, zeros beyond row T.

    On Hopper and later the tensor memory accelerator does that, without a register for an address.
    """
    return tl.make_tensor_descriptor(x, [T, stride], [stride, 1], [BN, d])


@triton.jit
def product(a, b):
    """a @ b in float32; float32 factors are not rounded to tf32."""
    if EMULATED:  # the interpreter would multiply the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@tuned((64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 3), (64, 32, 4, 2))
@triton.jit
def attention_forward(q, k, v, start, o, lse, scale, T, of_line, H: tl.constexpr, G: tl.constexpr, d: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One block of BM queries of one head: softmax over its keys, block by block (arXiv 2307.08691, alg. 1).

    `peak` and `mass` are the running maximum and sum, in units of log 2; a new maximum rescales what is there.
    Only blocks of keys at an edge, of the documents or of the past, are masked. The longest rows go first.
    """
    block, bh, K = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(0), H // G
    b, h, rows = (bh // H).to(tl.int64), bh % H, block * BM + tl.arange(0, BM)
    q, o = q + (b * T * H + h) * d, o + (b * T * H + h) * d
    k, v = blocks(k + (b * T * K + h // G) * d, T, K * d, d, BN), blocks(v + (b * T * K + h // G) * d, T, K * d, d, BN)
    first = tl.load(start + b * T + rows, mask=rows < T, other=T)
    begin, whole, end = tl.min(first) // BN * BN, tl.max(first), tl.minimum((block + 1) * BM, T)
    x = tile(q, rows, H * d, T, d, d)
    y, mass, peak = tl.zeros([BM, d], tl.float32), tl.zeros([BM], tl.float32), tl.full([BM], MASKED, tl.float32)
    for j in range(begin, end, BN):
        columns = j + tl.arange(0, BN)
        s = product(x, tl.trans(k.load([j, 0])))
        if (j < whole) | (j + BN > block * BM):
            s = tl.where((columns[None, :] >= first[:, None]) & (columns[None, :] <= rows[:, None]), s, -float("inf"))
        top = tl.maximum(peak, tl.max(s, 1) * scale)
        p, shrink = tl.exp2(s * scale - top[:, None]), tl.exp2(peak - top)
        values = v.load([j, 0])
        y = y * shrink[:, None] + product(p.to(values.dtype), values)
        mass, peak = mass * shrink + tl.sum(p, 1), top
    put(o, y / mass[:, None], rows, H * d, T, d, d)
    tl.store(lse + bh.to(tl.int64) * of_line + rows, peak + tl.log2(mass), mask=rows < T)


@tuned((64, 64, 4, 2), (128, 64, 8, 3), (64, 32, 4, 2))
@triton.jit
def attention_backward_q(q, k, v, start, o, do, lse, delta, dq, scale, T, of_line, H: tl.constexpr, G: tl.constexpr,
                         d: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """dq of one block of queries: with p = exp2(s - lse), ds = p (do v^T - delta), dq = ds k / sqrt(d).

    delta = do . o, which is sum_j p_j dp_j, is left for the keys' gradients.
    """
    block, bh, K = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(0), H // G
    b, h, rows = (bh // H).to(tl.int64), bh % H, block * BM + tl.arange(0, BM)
    at, place = (b * T * H + h) * d, bh.to(tl.int64) * of_line + rows
    k, v = blocks(k + (b * T * K + h // G) * d, T, K * d, d, BN), blocks(v + (b * T * K + h // G) * d, T, K * d, d, BN)
    first = tl.load(start + b * T + rows, mask=rows < T, other=T)
    begin, whole, end = tl.min(first) // BN * BN, tl.max(first), tl.minimum((block + 1) * BM, T)
    x, dy = tile(q + at, rows, H * d, T, d, d), tile(do + at, rows, H * d, T, d, d)
    shift = tl.sum(tile(o + at, rows, H * d, T, d, d).to(tl.float32) * dy.to(tl.float32), 1)
    tl.store(delta + place, shift, mask=rows < T)
    norm, dx = tl.load(lse + place, mask=rows < T, other=0.0), tl.zeros([BM, d], tl.float32)
    for j in range(begin, end, BN):
        columns = j + tl.arange(0, BN)
        keys = k.load([j, 0])
        p = tl.exp2(product(x, tl.trans(keys)) * scale - norm[:, None])
        if (j < whole) | (j + BN > block * BM):
            p = tl.where((columns[None, :] >= first[:, None]) & (columns[None, :] <= rows[:, None]), p, 0.0)
        ds = p * (product(dy, tl.trans(v.load([j, 0]))) - shift[:, None])
        dx += product(ds.to(keys.dtype), keys)
    put(dq + at, dx * (scale / 1.4426950408889634), rows, H * d, T, d, d)


@tuned((64, 64, 4, 2), (64, 128, 8, 3), (32, 64, 4, 2))
@triton.jit
def attention_backward_kv(q, k, v, end, do, lse, delta, dk, dv, scale, T, of_line, H: tl.constexpr, G: tl.constexpr,
                          d: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """dk and dv of one block of keys: the sums over the queries, of all heads of the group, that see them."""
    block, K = tl.program_id(1), H // G
    b, kv, columns = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K, block * BN + tl.arange(0, BN)
    at = (b * T * K + kv) * d
    keys, values = tile(k + at, columns, K * d, T, d, d), tile(v + at, columns, K * d, T, d, d)
    q, do = blocks(q + b * T * H * d, T, H * d, d, BM), blocks(do + b * T * H * d, T, H * d, d, BM)
    count = tl.num_programs(0) * G
    # load([i, j]) of these is (1, BM) of line i from j on, zeros beyond T.
    lse = tl.make_tensor_descriptor(lse, [count, T], [of_line, 1], [1, BM])
    delta = tl.make_tensor_descriptor(delta, [count, T], [of_line, 1], [1, BM])
    ends, whole = tl.load(end + b * T + columns, mask=columns < T, other=0), tl.load(end + b * T + block * BN)
    dkeys, dvalues = tl.zeros([BN, d], tl.float32), tl.zeros([BN, d], tl.float32)
    for g in range(G):
        for i in range(block * BN // BM * BM, tl.max(ends), BM):
            rows = i + tl.arange(0, BM)
            x, dy = q.load([i, (kv * G + g) * d]), do.load([i, (kv * G + g) * d])
            line = tl.program_id(0) * G + g
            p = tl.exp2(product(keys, tl.trans(x)) * scale - lse.load([line, i]))  # (BN, BM)
            if (i < (block + 1) * BN) | (i + BM > whole):
                p = tl.where((columns[:, None] <= rows[None, :]) & (rows[None, :] < ends[:, None]), p, 0.0)
            dvalues += product(p.to(dy.dtype), dy)
            ds = p * (product(values, tl.trans(dy)) - delta.load([line, i]))
            dkeys += product(ds.to(x.dtype), x)
    put(dk + at, dkeys * (scale / 1.4426950408889634), columns, K * d, T, d, d)
    put(dv + at, dvalues, columns, K * d, T, d, d)


def set_workspace() -> None:
    """Lets kernels make descriptors of their blocks. In every call, since Triton keeps it for each thread apart."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


class FusedAttention(torch.autograd.Function):
    """FlashAttention-2 (arXiv 2307.08691) over packed documents: q (B, T, H, d), k and v (B, T, K, d), contiguous.

    d is a power of two from 16 up, and `start` as in `reference_attention`, int32. Scores never leave the
    chip; kept for the backward pass are the inputs, the output and each query's log-sum-exp, from which p
    comes back.
    """

    @staticmethod
    def forward(ctx, q, k, v, start):
        """The output, (B, T, H, d)."""
        set_workspace()
        B, T, H, d = q.shape
        # Descriptors want lines of a multiple of 16 bytes.
        o, lse = torch.empty_like(q), q.new_empty(B, H, triton.cdiv(T, 4) * 4, dtype=torch.float32)
        ctx.shape, ctx.scale = {"H": H, "G": H // k.shape[2], "d": d}, LOG2E / math.sqrt(d)
        grid = lambda size: (B * H, triton.cdiv(T, size["BM"]))  # noqa: E731
        attention_forward[grid](q, k, v, start, o, lse, ctx.scale, T, lse.shape[2], **ctx.shape)
        ctx.save_for_backward(q, k, v, start, o, lse)
        return o

    @staticmethod
    def backward(ctx, do):
        """The gradients by q, k and v from that by the output."""
        set_workspace()
        q, k, v, start, o, lse = ctx.saved_tensors
        (B, T, H, _), do = q.shape, do.contiguous()
        dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
        end = torch.searchsorted(start, start, right=True).int()  # where each position's document ends
        of_queries = lambda size: (B * H, triton.cdiv(T, size["BM"]))  # noqa: E731
        of_keys = lambda size: (B * k.shape[2], triton.cdiv(T, size["BN"]))  # noqa: E731
        sizes = (ctx.scale, T, lse.shape[2])
        attention_backward_q[of_queries](q, k, v, start, o, do, lse, delta, dq, *sizes, **ctx.shape)
        attention_backward_kv[of_keys](q, k, v, end, do, lse, delta, dk, dv, *sizes, **ctx.shape)
        return dq, dk, dv, None


def triton_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None) -> Tensor:
    """`reference_attention` by the kernels above; a head width that is no power of two is filled up with zeros."""
    d = q.shape[-1]
    if start is None:
        start = torch.zeros(q.shape[0], q.shape[2], device=q.device)
    if (more := max(16, triton.next_power_of_2(d)) - d) > 0:
        q, k, v = (F.pad(x, (0, more)) for x in (q * math.sqrt((d + more) / d), k, v))
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # (B, T, H or K, d)
    return FusedAttention.apply(q, k, v, start.int().contiguous()).transpose(1, 2)[..., :d]


@triton.jit
def turned(x, rows, cos, sin, count, d: tl.constexpr, D: tl.constexpr):
    """`reference_rotate` of rows `rows` of x, (len(rows), D) float32; cos and sin (D,)."""
    columns = tl.arange(0, D)
    inside = (rows[:, None] < count) & (columns[None, :] < d)
    there, back = x + rows[:, None] * d + columns[None, :], x + rows[:, None] * d + (columns[None, :] + d // 2) % d
    other = tl.load(back, mask=inside, other=0.0).to(tl.float32)
    return tl.load(there, mask=inside, other=0.0).to(tl.float32) * cos[None, :] + other * sin[None, :]


@triton.jit
def decode_split(q, k, v, cos, sin, keys, values, position, part, top, total, scale, of_q, of_k, of_row, of_head,
                 of_column, K: tl.constexpr, G: tl.constexpr, S, d: tl.constexpr, D: tl.constexpr,
                 GP: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """The group of queries of one key/value head of one row over SPAN columns of its cache (flash-decoding).

    One load of a key serves all G queries. Leaves the sum of p v, the maximum and the sum of p. The newest
    key and value are not in the cache yet: the program with their column starts from them, and writes them.
    """
    r, kv, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    newest, heads, width = tl.load(position + r).to(tl.int32), tl.arange(0, GP), tl.arange(0, D)
    if split * SPAN > newest:
        return
    kind = keys.dtype.element_ty
    c = tl.load(cos + r * d + width, mask=width < d, other=0.0).to(tl.float32)
    s = tl.load(sin + r * d + width, mask=width < d, other=0.0).to(tl.float32)
    queries = turned(q + r * of_q + kv * G * d, heads, c, s, G, d, D).to(kind)  # (GP, D)
    keys, values = keys + r * of_row + kv * of_head, values + r * of_row + kv * of_head
    y, mass, peak = tl.zeros([GP, D], tl.float32), tl.zeros([GP], tl.float32), tl.full([GP], MASKED, tl.float32)
    if newest < (split + 1) * SPAN:
        one = tl.arange(0, 1)
        key = turned(k + r * of_k + kv * d, one, c, s, 1, d, D).to(kind)  # (1, D)
        value = tile(v + r * of_k + kv * d, one, d, 1, d, D)
        put(keys, key, one + newest, of_column, newest + 1, d, D)
        put(values, value, one + newest, of_column, newest + 1, d, D)
        peak = tl.sum(queries.to(tl.float32) * key.to(tl.float32), 1) * scale
        y, mass = y + value.to(tl.float32), mass + 1.0
    for j in range(split * SPAN, tl.minimum(newest, (split + 1) * SPAN), BN):
        columns = j + tl.arange(0, BN)
        w = product(queries, tl.trans(tile(keys, columns, of_column, newest, d, D))) * scale
        w = tl.where(columns[None, :] < newest, w, MASKED)
        new = tl.maximum(peak, tl.max(w, 1))
        p, shrink = tl.exp2(w - new[:, None]), tl.exp2(peak - new)
        seen = tile(values, columns, of_column, newest, d, D)
        y = y * shrink[:, None] + product(p.to(seen.dtype), seen)
        mass, peak = mass * shrink + tl.sum(p, 1), new
    place = ((r * K + kv) * G + heads) * S + split
    put(part + ((r * K + kv) * G * S + split) * d, y, heads, S * d, G, d, D)
    tl.store(top + place, peak, mask=heads < G)
    tl.store(total + place, mass, mask=heads < G)


@triton.jit
def decode_join(part, top, total, position, o, S, H: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
                SPAN: tl.constexpr, SB: tl.constexpr):  # fmt: skip
    """One query's output from its partial ones."""
    at = tl.program_id(0).to(tl.int64)
    count = tl.load(position + at // H).to(tl.int32) // SPAN + 1
    y, mass, peak = tl.zeros([D], tl.float32), 0.0, tl.full([], MASKED, tl.float32)
    for j in range(0, count, SB):
        splits = j + tl.arange(0, SB)
        tops = tl.load(top + at * S + splits, mask=splits < count, other=MASKED)
        new = tl.maximum(peak, tl.max(tops, 0))
        weight, shrink = tl.exp2(tops - new), tl.exp2(peak - new)
        mass = mass * shrink + tl.sum(weight * tl.load(total + at * S + splits, mask=splits < count, other=0.0), 0)
        y = y * shrink + tl.sum(weight[:, None] * tile(part + at * S * d, splits, d, count, d, D), 0)
        peak = new
    width = tl.arange(0, D)
    tl.store(o + at * d + width, (y / mass).to(o.dtype.element_ty), mask=width < d)


def triton_decode(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], cache: Tensor, position: Tensor):
    """A layer of `reference_decoder` by the kernels above, the columns split over programs so that few rows fill a GPU.

    q, k and v may be slices of one projection.
    """
    (R, K, L, d), H = cache[0].shape, q.shape[1]
    span, block, joined_at_once = (32, 16, 2) if INTERPRET else (512, 64, 16)
    S = triton.cdiv(L, span)
    part = q.new_empty(R, H, S, d, dtype=torch.float32)
    top, total = part.new_empty(2, R, H, S)
    o, scale, strides = q.new_empty(R, H, d), LOG2E / math.sqrt(d), (q.stride(0), k.stride(0), *cache.stride()[1:4])
    sizes = {"d": d, "D": max(16, triton.next_power_of_2(d)), "SPAN": span}
    decode_split[R, K, S](q, k, v, *rope, *cache, position, part, top, total, scale, *strides, K, H // K, S,
                          GP=max(16, triton.next_power_of_2(H // K)), BN=block, num_warps=2, num_stages=2, **sizes)  # fmt: skip
    decode_join[(R * H,)](part, top, total, position, o, S, H, SB=joined_at_once, num_warps=1, **sizes)
    return o


@triton.jit
def race(x, seed, at):
    """x plus Gumbel noise, numbers `at` of the stream of `seed`: the argmax is a draw from softmax(x).

    The noise is -log E with E = -log(1 - u) exponential, by its series where u is small: that is where
    winners come from, and 1 - u would round.
    """
    u = tl.rand(seed, at) + 2.33e-10  # the middle of its step of 2^-31: never 0
    return x - tl.log(tl.where(u < 0.01, u * (1 + u * (0.5 + u * (0.33333333 + u * 0.25))), -tl.log(1 - u)))


@triton.jit
def scaled(row, columns, V, scale):
    """`scale` times the row's logits in these columns, float32; minus infinity beyond V."""
    return tl.load(row + columns, mask=columns < V, other=-float("inf")).to(tl.float32) * scale


@triton.jit
def sample_row(logits, temperature, seed, token, logprob, V, PER_ROW: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
               TURNS: tl.constexpr):  # fmt: skip
    """A token of one row, and its log-prob, in one read of the row.

    Each of LANES lanes takes 8 logits in turn, and keeps their maximum and sum of exp, in units of log 2, without
    waiting for the others. Then Gumbel-max in two stages: a lane is drawn by the probability of all its tokens, then a
    token within it. So noise is needed for LANES numbers and for one lane's tokens, not for V. Temperature 0 takes
    the first of the largest logits.
    """
    r, lanes, width = tl.program_id(0), tl.arange(0, LANES), LANES * 8
    row, noise, LN2 = logits + r.to(tl.int64) * V, tl.load(seed), 0.6931471805599453
    t = tl.load(temperature + r) if PER_ROW else temperature
    scale = 1.4426950408889634 / tl.where(t == 0, 1.0, t)
    mass, peak, found = tl.zeros([LANES], tl.float32), tl.full([LANES], MASKED, tl.float32), lanes * 0
    turns = lanes[:, None, None] * 8 + tl.arange(0, UNROLL)[None, :, None] * width + tl.arange(0, 8)[None, None, :]
    for j in range(0, V, UNROLL * width):
        x = scaled(row, j + turns, V, scale)
        new = tl.maximum(peak, tl.max(tl.max(x, 2), 1))
        mass = mass * tl.exp2(peak - new) + tl.sum(tl.sum(tl.exp2(x - new[:, None, None]), 2), 1)
        found, peak = tl.where(new > peak, j, found), new
    top = tl.max(peak, 0)
    z = top + tl.log2(tl.sum(mass * tl.exp2(peak - top), 0))
    if t == 0:
        j = tl.min(tl.where(peak == top, found, V), 0)
        i = tl.min(tl.where(scaled(row, j + turns, V, scale) == top, j + turns, V))
    else:
        at, n = r * (LANES + TURNS * 8), tl.arange(0, TURNS * 8)
        columns = n // 8 * width + n % 8 + tl.argmax(race((peak + tl.log2(mass)) * LN2, noise, at + lanes), 0) * 8
        y = scaled(row, columns, V, scale)
        first = tl.argmax(race(y * LN2, noise, at + LANES + n), 0)
        top, i = tl.sum(tl.where(n == first, y, 0.0), 0), tl.sum(tl.where(n == first, columns, 0), 0)
    tl.store(token + r, tl.minimum(i, V - 1))  # a row of nan has no largest logit
    tl.store(logprob + r, (top - z) * LN2)


def triton_sample(logits: Tensor, temperature: float | Tensor, generator: torch.Generator | None):
    """`reference_sample` by the kernel above."""
    (R, V), device, logits = logits.shape, logits.device, logits.contiguous()
    if per_row := isinstance(temperature, Tensor):
        temperature = temperature.to(device, torch.float32).expand(R).contiguous()
    seed = torch.randint(2**31, (1,), generator=generator, device=device)
    token, logprob = torch.empty(R, dtype=torch.int64, device=device), torch.empty(R, device=device)
    lanes, unroll = (4, 2) if INTERPRET else (512, 4)
    turns = triton.next_power_of_2(triton.cdiv(V, lanes * 8))
    sample_row[(R,)](logits, temperature, seed, token, logprob, V, per_row, lanes, unroll, turns, num_warps=16)
    return token, logprob


@triton.jit
def score_forward(logits, targets, logprob, entropy, lse, scale, V, BN: tl.constexpr):
    """One row of logits in one pass: log-sum-exp z, log-prob of the target x_t - z, entropy z - sum p x."""
    r = tl.program_id(0).to(tl.int64)
    peak, mass, weighted = tl.full([], MASKED, tl.float32), 0.0, 0.0
    for j in range(0, V, BN):
        columns = j + tl.arange(0, BN)
        x = tl.load(logits + r * V + columns, mask=columns < V, other=MASKED).to(tl.float32) * scale
        new = tl.maximum(peak, tl.max(x, 0))
        e, shrink = tl.exp(x - new), tl.exp(peak - new)
        mass, weighted, peak = mass * shrink + tl.sum(e, 0), weighted * shrink + tl.sum(e * x, 0), new
    z = peak + tl.log(mass)
    tl.store(lse + r, z)
    tl.store(entropy + r, z - weighted / mass)
    tl.store(logprob + r, tl.load(logits + r * V + tl.load(targets + r)).to(tl.float32) * scale - z)


@triton.jit
def score_backward(logits, targets, lse, gradient, scale, V, BN: tl.constexpr):
    """The gradient of g log p_t by the logits, g scale (1[v = t] - p_v), in their place."""
    r = tl.program_id(0).to(tl.int64)
    z, t, g = tl.load(lse + r), tl.load(targets + r), tl.load(gradient + r) * scale
    for j in range(0, V, BN):
        columns = j + tl.arange(0, BN)
        place = logits + r * V + columns
        p = tl.exp(tl.load(place, mask=columns < V, other=MASKED).to(tl.float32) * scale - z)
        tl.store(place, (g * (tl.where(columns == t, 1.0, 0.0) - p)).to(logits.dtype.element_ty), mask=columns < V)


class FusedScore(torch.autograd.Function):
    """`score_chunk` by the kernels above. The logits are computed again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        logits, block = F.linear(hidden, weight), 32 if INTERPRET else 4096
        logprob, entropy, lse = logits.new_empty(3, len(hidden), dtype=torch.float32)
        ctx.sizes = (1 / temperature, logits.shape[1], block)
        score_forward[(len(hidden),)](logits, targets, logprob, entropy, lse, *ctx.sizes)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        hidden, weight, targets, lse = ctx.saved_tensors
        logits = F.linear(hidden, weight)
        score_backward[(len(hidden),)](logits, targets, lse, gradient.contiguous(), *ctx.sizes)
        return logits @ weight, logits.t() @ hidden, None, None


@triton.jit
def turn_heads(q, k, v, q_, k_, v_, cos, sin, period, sign, of_q, of_k, of_q_, of_k_, H: tl.constexpr, K: tl.constexpr,
               HP: tl.constexpr, KP: tl.constexpr, d: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """One token's heads from q, k, v to q_, k_, v_: q and k turned by `sign` times their angle, v as it is."""
    n, queries, keys, width = tl.program_id(0).to(tl.int64), tl.arange(0, HP), tl.arange(0, KP), tl.arange(0, D)
    place = (n % period) * d + width
    c = tl.load(cos + place, mask=width < d, other=0.0).to(tl.float32)
    s = tl.load(sin + place, mask=width < d, other=0.0).to(tl.float32) * sign
    put(q_ + n * of_q_, turned(q + n * of_q, queries, c, s, H, d, D), queries, d, H, d, D)
    put(k_ + n * of_k_, turned(k + n * of_k, keys, c, s, K, d, D), keys, d, K, d, D)
    put(v_ + n * of_k_, tile(v + n * of_k, keys, d, K, d, D), keys, d, K, d, D)


def launch_turn(source: list[Tensor], target: list[Tensor], cos: Tensor, sin: Tensor, sign: float) -> None:
    """The kernel above for all tokens: q, k and v of (B, T, heads, d) each, which may be slices of one projection."""
    (B, T, H, d), K = source[0].shape, source[1].shape[2]
    strides = [x.stride(1) for x in (*source[:2], *target[:2])]
    powers = [triton.next_power_of_2(n) for n in (H, K)] + [d, max(16, triton.next_power_of_2(d))]
    turn_heads[(B * T,)](*source, *target, cos, sin, len(cos), sign, *strides, H, K, *powers)


class FusedHeads(torch.autograd.Function):
    """`reference_heads` by the kernel above: q (B, T, H, d), k and v (B, T, K, d), cos and sin (T, d) or (B T, d)."""

    @staticmethod
    def forward(ctx, q, k, v, cos, sin):
        parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        launch_turn((q, k, v), parts, cos, sin, 1.0)
        ctx.save_for_backward(cos, sin)
        return tuple(parts)

    @staticmethod
    def backward(ctx, *gradients):
        """The gradients of q and k turned back."""
        gradients = [g.contiguous() for g in gradients]
        back = [torch.empty_like(g) for g in gradients]
        launch_turn(gradients, back, *ctx.saved_tensors, -1.0)
        return *back, None, None


@triton.jit
def swiglu_forward(gate, up, y, of_gate, of_up, N, BN: tl.constexpr):
    """silu(gate) up of BN of the N columns of a row."""
    n, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.load(gate + n * of_gate + columns, mask=columns < N, other=0.0).to(tl.float32)
    u = tl.load(up + n * of_up + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(y + n * N + columns, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=columns < N)


@triton.jit
def swiglu_backward(gate, up, dy, dgate, dup, of_gate, of_up, N, BN: tl.constexpr):
    """With s = sigmoid(g): d gate = dy u s (1 + g (1 - s)) and d up = dy g s."""
    n, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    at = n * N + columns
    g = tl.load(gate + n * of_gate + columns, mask=columns < N, other=0.0).to(tl.float32)
    u = tl.load(up + n * of_up + columns, mask=columns < N, other=0.0).to(tl.float32)
    e, s = tl.load(dy + at, mask=columns < N, other=0.0).to(tl.float32), tl.sigmoid(g)
    tl.store(dgate + at, (e * u * s * (1 + g * (1 - s))).to(dgate.dtype.element_ty), mask=columns < N)
    tl.store(dup + at, (e * g * s).to(dup.dtype.element_ty), mask=columns < N)


class FusedSwiGLU(torch.autograd.Function):
    """silu(gate) up of rows (R, N), which may be slices of one projection; kept for the backward pass are the arguments."""

    @staticmethod
    def forward(ctx, gate, up):
        (R, N), block = gate.shape, 32 if INTERPRET else 2048
        ctx.sizes, ctx.grid = (gate.stride(0), up.stride(0), N, block), (R, triton.cdiv(N, block))
        y = gate.new_empty(R, N)
        swiglu_forward[ctx.grid](gate, up, y, *ctx.sizes)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = dy.new_empty(2, *dy.shape)
        swiglu_backward[ctx.grid](gate, up, dy.contiguous(), dgate, dup, *ctx.sizes)
        return dgate, dup


@triton.jit
def norm_forward(x, weight, y, eps, N, NP: tl.constexpr):
    """y = x / sqrt(mean(x^2) + eps) weight, one row."""
    n, columns = tl.program_id(0).to(tl.int64), tl.arange(0, NP)
    v = tl.load(x + n * N + columns, mask=columns < N, other=0.0).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, 0) / N + eps)
    w = tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(y + n * N + columns, (v * w).to(y.dtype.element_ty), mask=columns < N)
