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
   the backward pass: no tensor of B x T x V numbers ever exists.
3. The sampler draws from softmax(logits / temperature) over the whole vocabulary. There is no top-k
   and no top-p: the trainer scores the distribution that was sampled from, and no other.
4. Sampling is an argmax: token = argmax p_v / E_v with E_v exponential noise (the Gumbel-max trick),
   so a decoding step never waits for the device.
5. The attention is a function handed down to the blocks (causal over a batch, causal that fills the
   cache, one query over the cache): a new kernel is a new function, and the network stays as it is.
6. Rotary frequencies are recomputed in each forward pass, in float32: no buffer, hence nothing that
   .to(bfloat16) could blur or that the meta device would leave unset.
7. With tied embeddings there is one parameter, `model.embed_tokens.weight`, and no `lm_head`.

Axes: B batch, T tokens, D width, H query heads, K key/value heads, G = H / K queries per key/value
head, d head width, V vocabulary; N counted positions; R rows in the cache, L columns of the cache.
"""

import itertools
import json
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import write_atomically

IGNORE = -100  # a target that does not count
CHUNK = 512  # positions per chunk of log-probs: 512 x 128,256 float32 logits are 263 MB
STRIDE = 4  # decoding steps between two looks at which rows have finished
PREFILL_TOKENS = 16384  # prompt tokens per prefill pass, which bounds its activations
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# ---------------------------------------------------------------------------------------------
# Config

LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
SHAPE = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
# What a config.json means by leaving a field out: LlamaConfig's defaults, which are not ours.
ABSENT = {"num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
ABSENT |= {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
# The one value of each of these fields that this file computes; it may also be absent or null.
SUPPORTED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
SUPPORTED |= {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0}
SUPPORTED |= {"quantization_config": None}


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
    torch_dtype: str = "float32"  # of the weights in the folder; `save` sets it

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
        text = json.dumps(fields | asdict(self), indent=2) + "\n"
        write_atomically(Path(folder) / "config.json", lambda path: path.write_text(text))


def read_fields(raw: dict) -> dict:
    """The arguments of Config in a parsed config.json; ValueError for what we would get wrong."""
    for name, value in SUPPORTED.items():
        if raw.get(name) not in (value, None):
            raise ValueError(
                f"{name} is {raw[name]!r}, but only {value!r} is implemented; choose a checkpoint of a plain Llama 3"
            )
    if missing := [name for name in SHAPE if name not in raw]:
        raise ValueError(f"{', '.join(missing)} missing; add what the checkpoint was trained with")
    fields = {name: raw[name] for name in Config.__dataclass_fields__ if name in raw}
    fields["torch_dtype"] = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    return ABSENT | fields | read_rope(raw)


def read_rope(raw: dict) -> dict:
    """rope_theta and rope_scaling, from version 5's `rope_parameters` or version 4's two fields."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    rope = {"rope_type": rope.pop("type", "default")} | rope  # the oldest files say `type`
    return {"rope_theta": theta, "rope_scaling": rope if rope != {"rope_type": "default"} else None}


# ---------------------------------------------------------------------------------------------
# Norm and rotary positions


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is already that: for sums that bfloat16 would spoil."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


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
    """Cosines and sines of positions 0 .. length - 1, each (length, d) in the dtype of `like`."""
    frequency = rope_frequencies(config, like.device)
    angle = torch.arange(length, device=like.device).float()[:, None] * frequency  # (L, d / 2)
    angle = torch.cat([angle, angle], dim=-1)  # (L, d)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pair (x_i, x_{i + d/2}) by its angle; Hugging Face stores the pairs as two halves."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


# ---------------------------------------------------------------------------------------------
# Attention: q (B, H, T, d), k and v (B, K, T, d) -> (B, H, T, d); query head h reads head h // G


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        """x (B, T, D), rope's cos and sin broadcast to (B, H, T, d) -> (B, T, D)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, H or K, T, d)
        y = attend(self.layer, rotate(q, *rope), rotate(k, *rope), v)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------------------------------------
# The network

# A call of which only the arguments are kept; the backward pass makes it once more.
again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: Config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return again(self.compute, x, rope, attend)
        return self.compute(x, rope, attend)

    def compute(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


def score_chunk(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
    """hidden (N, D), weight (V, D), targets (N,) -> log-probs and entropy, both (N,), wide."""
    logp = (wide(F.linear(hidden, weight)) / temperature).log_softmax(-1)  # (N, V)
    fixed = logp.detach()
    entropy = -(fixed.exp() * fixed).sum(-1)
    # The same as a gather, with a cheaper backward pass.
    return -F.nll_loss(logp, targets, reduction="none"), entropy


class Llama(nn.Module):
    """A decoder whose parameters bear Hugging Face's names.

    The parameters are uninitialised noise until `init_weights` or `load` fills them.
    `attention` is the function that the batch goes through: sdpa_attention or reference_attention.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.attention = config, sdpa_attention
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
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.7 / math.sqrt(self.config.hidden_size)
            if residual:
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            if weight.ndim == 1:  # a norm's
                weight.fill_(1.0)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        return self

    def head(self) -> Tensor:
        """The output matrix, (V, D)."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def hidden(self, tokens: Tensor, rope: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        """tokens (B, T) -> the residual stream after the last block, before its norm, (B, T, D)."""
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x, rope, attend)
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
        (A float64 model gives float64 throughout.)
        """
        rope = rope_table(self.config, tokens.shape[1], self.head())  # (T, d) each
        if start is not None:
            position = torch.arange(tokens.shape[1], device=tokens.device) - start
            rope = tuple(x[position][:, None] for x in rope)  # (B, 1, T, d)
        x = self.hidden(tokens, rope, lambda layer, q, k, v: self.attention(q, k, v, start))
        if targets is None:
            return wide(F.linear(self.model.norm(x), self.head()))
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0 to score tokens, not {temperature}")
        counted = targets != IGNORE
        x = self.model.norm(x[counted])  # (N, D)
        chunks = zip(x.split(CHUNK), targets[counted].split(CHUNK), strict=True)
        scores = [again(score_chunk, h, self.head(), t, temperature) for h, t in chunks]
        logprobs, entropy = (torch.cat(parts) for parts in zip(*scores, strict=True))  # (N,)
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

    def finished(self, max_new_tokens: int) -> bool:
        return self.stopped or len(self.tokens) == max_new_tokens


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None):
    """logits (R, V) -> one token id per row, (R,) int64, and its log-prob, (R,) float32.

    temperature 0 takes the likeliest token, with its log-prob at temperature 1. Else, with u uniform
    in [0, 1), -log u is exponential noise, and argmax p / -log u = argmin p / log u is a draw from p.
    u = 0 makes the noise infinite: that token cannot win, and nothing is divided by zero.
    """
    p = (wide(logits) / (temperature or 1.0)).softmax(-1)  # (R, V)
    if temperature == 0:
        token = logits.argmax(-1)
    else:  # not torch's exponential_, which takes 9 times as long as uniform_ on a CPU
        noise = torch.empty_like(p).uniform_(generator=generator).log_()
        token = (p / noise).argmin(-1)
    return token, p.gather(1, token[:, None]).squeeze(1).log()


class Rows:
    """The rows being sampled: the first n of a cache that is allocated once.

    Each row has its own length: it sees columns 0 .. position[r] of the cache, where position[r] is
    the place of its newest token, and what another row left further right is never read.
    """

    def __init__(self, model: Llama, rows: int, length: int):
        config, weight = model.config, model.head()
        # Positions last: on a CPU, reading both as (d, L) matrices takes 0.6 of the time of (L, d).
        # Zeros, because a masked column still enters the sum as 0 x its value: it must be finite.
        shape = (rows, config.num_key_value_heads, config.head_dim, length)
        self.cache = weight.new_zeros(config.num_hidden_layers, 2, *shape)  # (layers, 2, R, K, d, L)
        self.token = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.position = torch.zeros_like(self.token)
        self.rope = rope_table(config, length, weight)
        self.model, self.n = model, 0

    def admit(self, prompts: list[list[int]], copies: list[int]) -> None:
        """Appends copies[i] rows for prompt i, which is computed once."""
        size = max(1, PREFILL_TOKENS // max(map(len, prompts)))
        for i in range(0, len(prompts), size):
            self.prefill(prompts[i : i + size], copies[i : i + size])

    def prefill(self, prompts: list[list[int]], copies: list[int]) -> None:
        """One pass of `admit`. The first `step` feeds a prompt's last token again, for its logits."""
        device, longest = self.token.device, max(map(len, prompts))
        tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
        source = torch.repeat_interleave(torch.tensor(copies, device=device))  # row -> prompt
        rows = slice(self.n, self.n + len(source))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cache, x in zip(self.cache[layer], (k, v), strict=True):
                cache[rows, ..., :longest] = x.transpose(2, 3)[source]
            return self.model.attention(q, k, v)

        self.model.hidden(tokens, tuple(x[:longest] for x in self.rope), attend)
        self.position[rows] = torch.tensor([len(p) - 1 for p in prompts], device=device)[source]
        self.token[rows] = tokens[source, self.position[rows]]
        self.n += len(source)

    def step(self, length: int) -> Tensor:
        """Feeds each row its newest token; logits (n, V) of the next. length > every position."""
        n, position = self.n, self.position[: self.n]
        row = torch.arange(n, device=position.device)
        hide = torch.arange(length, device=position.device) > position[:, None]  # (n, L)
        bias = self.cache.new_zeros(n, 1, 1, length).masked_fill_(hide[:, None, None], -math.inf)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for cache, x in zip(self.cache[layer], (k, v), strict=True):
                cache[row, :, :, position] = x[:, :, 0]
            keys, values = self.cache[layer, :, :n, ..., :length]  # (n, K, d, L)
            q = q.view(*keys.shape[:2], -1, q.shape[-1]) / math.sqrt(q.shape[-1])  # (n, K, G, d)
            weights = wide(q @ keys + bias).softmax(-1).to(q.dtype)  # (n, K, G, L)
            y = values @ weights.transpose(2, 3)  # (n, K, d, G)
            return y.transpose(2, 3).reshape(n, -1, 1, q.shape[-1])  # (n, H, 1, d)

        rope = tuple(x[position][:, None, None] for x in self.rope)  # (n, 1, 1, d)
        x = self.model.hidden(self.token[:n, None], rope, attend)  # (n, 1, D)
        return F.linear(self.model.model.norm(x[:, 0]), self.model.head())

    def decode(self, steps: int, temperature: float, generator: torch.Generator | None):
        """Draws `steps` tokens for each row: ids (n, steps) and log-probs (n, steps)."""
        length = int(self.position[: self.n].max()) + 1
        drawn = []
        for i in range(steps):
            drawn.append(sample(self.step(length + i), temperature, generator))
            self.token[: self.n] = drawn[-1][0]
            self.position[: self.n] += 1
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
        self.cache[:, :, holes] = self.cache[:, :, tail]
        self.token[holes], self.position[holes] = self.token[tail], self.position[tail]
        self.n = len(live)
        return order


def check_request(model, prompts, max_new_tokens: int, samples: int, temperature: float) -> None:
    """Raises ValueError for a request that `generate` cannot serve."""
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if not prompts or samples < 1 or temperature < 0 or not 0 < max_new_tokens < limit:
        raise ValueError(
            f"{len(prompts)} prompts, {samples=}, {temperature=}, {max_new_tokens=}: give at least "
            f"one prompt and one sample, a temperature from 0 up, and 1 to {limit - 1} new tokens"
        )
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit - max_new_tokens:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens: it may have 1 to {limit - max_new_tokens}, "
                f"max_position_embeddings ({limit}) less max_new_tokens ({max_new_tokens})"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(f"prompt {i} has a token outside 0 .. {vocab - 1}")


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
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: list[int],
    temperature: float = 1.0,
    samples: int = 1,
    generator: torch.Generator | None = None,
    progress: Callable[[int], object] | None = None,
    rows: int = 512,
) -> list[Completion]:
    """Samples `samples` completions of each prompt: prompt 0's first, then prompt 1's, ...

    temperature 0 is greedy. `generator` lives on the model's device; None is torch's global one.
    progress(n) hears of n newly finished completions (a tqdm bar's `update`). At most `rows` rows
    are sampled at a time, a finished one making place for the next; the cache is allocated for
    them at the longest prompt + max_new_tokens (512 rows of 1024 tokens: 64 GiB for Llama-3.1-8B in
    bfloat16). The model computes the same in train and eval mode, so its mode is left alone.
    ValueError for a request it cannot serve.
    """
    check_request(model, prompts, max_new_tokens, samples, temperature)
    done = [Completion([], [], False) for _ in range(len(prompts) * samples)]
    batch = Rows(model, min(rows, len(done)), max(map(len, prompts)) + max_new_tokens)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=batch.token.device)
    waiting, live = deque(range(len(done))), []  # live[r]: the completion that row r is writing
    while waiting or live:
        new = [waiting.popleft() for _ in range(min(rows - len(live), len(waiting)))]
        if new:
            copies = Counter(i // samples for i in new)
            batch.admit([prompts[i] for i in copies], list(copies.values()))
            live += new
        steps = min(STRIDE, min(max_new_tokens - len(done[i].tokens) for i in live))
        collect(batch.decode(steps, temperature, generator), stops, [done[i] for i in live])
        going = [r for r, i in enumerate(live) if not done[i].finished(max_new_tokens)]
        if progress and len(going) < len(live):
            progress(len(live) - len(going))
        live = [live[r] for r in batch.keep(going)]
    return done


# ---------------------------------------------------------------------------------------------
# Checkpoints


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`; FileNotFoundError names a gap."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: holds neither {single.name} nor {index.name}")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: {index.name} asks for {', '.join(missing)}; fetch them")
    return [folder / name for name in names]


def read_weights(path: Path, shapes: dict, device, dtype) -> tuple[dict, dict[str, str]]:
    """The tensors of one memory-mapped file that fit `shapes`, and what is wrong with the others."""
    state, wrong = {}, {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            found, wanted = tuple(file.get_slice(name).get_shape()), shapes.get(name)
            if found == wanted:
                # A copy of its own: a view would keep the file mapped, at its odd alignment.
                state[name] = file.get_tensor(name).to(device=device, dtype=dtype, copy=True)
            else:
                other = f"config.json says {wanted}" if wanted else "which the model does not have"
                wrong[name] = f"{found} in {path.name}, {other}"
    return state, wrong


def load(folder: str | os.PathLike, device="cpu", dtype: torch.dtype | None = None) -> Llama:
    """The model in a Hugging Face folder: config.json, and safetensors in one file or in shards.

    Tensors go one by one from the memory-mapped file to `device` and `dtype` (None: as stored).
    FileNotFoundError for a missing file; ValueError that names every missing, unexpected or
    misshapen tensor, or the file that is cut short.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = Llama(Config.load(folder))
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    twin = {HEAD: shapes[EMBED]} if model.config.tie_word_embeddings else {}
    state, wrong = {}, {}
    for path in weight_files(folder):
        try:
            found, unfit = read_weights(path, shapes | twin, device, dtype)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
        state, wrong = state | found, wrong | unfit
    wrong |= {name: "missing" for name in shapes if name not in state | wrong}
    if twin and EMBED in state and not torch.equal(state.pop(HEAD, state[EMBED]), state[EMBED]):
        wrong[HEAD] = f"differs from {EMBED}, but tie_word_embeddings is true"
    if wrong:
        lines = [f"  {name}: {what}" for name, what in sorted(wrong.items())]
        raise ValueError("\n".join([f"{folder}: weights do not fit config.json; correct either:", *lines]))
    model.load_state_dict(state, assign=True)
    return model


def split_shards(state: dict[str, Tensor], limit: float) -> list[dict[str, Tensor]]:
    """Consecutive tensors, as many as fit `limit` bytes together, and at least one."""
    shards, room = [], 0
    for name, weight in state.items():
        if weight.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = weight
        room -= weight.nbytes
    return shards


def save(model: Llama, folder: str | os.PathLike, shard_bytes: float = 5e9) -> None:
    """Writes config.json and safetensors into `folder`, leaving its other files alone.

    Killed at any moment it leaves the old weights or the new ones, never a mixture. A single file is
    renamed into place. Shards get names that are not in use; they count once their index is renamed
    into place and a model.safetensors from before, which would win over the index, is gone.
    """
    folder, state = Path(folder), model.state_dict()
    model.config.torch_dtype = str(model.head().dtype).removeprefix("torch.")
    # What a killed save left included, finished or not.
    old = [*folder.glob("model*.safetensors*"), *folder.glob(".model*.tmp")]
    shards = split_shards(state, shard_bytes)
    tag = f"-{time.time_ns():x}" if old else ""
    names = [f"model{tag}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    model.config.save(folder)
    for name, shard in zip(names, shards, strict=True):
        tensors = {key: weight.contiguous().cpu() for key, weight in shard.items()}
        write_atomically(folder / name, partial(save_file, tensors, metadata={"format": "pt"}))
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(weight.nbytes for weight in state.values())
        index = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2)
        names.append("model.safetensors.index.json")
        write_atomically(folder / names[-1], lambda path: path.write_text(index))
    for path in old:
        if path.name not in names:
            path.unlink(missing_ok=True)  # an unfinished one may have become a file of ours
