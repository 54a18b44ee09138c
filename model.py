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
1. Batches are padded on the right. Attention is causal, so pads after a row's end change nothing
   before it, and no mask is needed; what stands at the pads is not to be read.
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

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target that does not count
CHUNK = 512  # positions per chunk of log-probs: 512 x 128,256 float32 logits are 263 MB
STRIDE = 8  # decoding steps between two looks at which rows have finished
PREFILL_TOKENS = 16384  # prompt tokens per prefill pass, which bounds its activations

# ---------------------------------------------------------------------------------------------
# Config

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")  # fmt: skip
# What a config.json means when it leaves a field out (LlamaConfig's defaults, not the tiny ones).
ABSENT = {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The only values of these fields that this file computes.
SUPPORTED = {
    "model_type": ("llama", None),
    "architectures": (["LlamaForCausalLM"], None),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
}
LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


@dataclass
class Config:
    """Hugging Face's config.json of a LlamaForCausalLM; the defaults are the tiny model (0.85M).

    Raises ValueError naming the field when the values do not make a model that this file computes.
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
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        scaling = dict(self.rope_scaling or {})
        kind = scaling.pop("rope_type", "default")
        known = {"default": set(), "llama3": LLAMA3_ROPE}.get(kind)
        if known is None or set(scaling) != known:
            raise ValueError(
                f"rope_scaling is {self.rope_scaling}: use null, or rope_type 'llama3' with exactly "
                f"{', '.join(sorted(LLAMA3_ROPE))}; other kinds are not implemented"
            )

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Config":
        """Reads folder/config.json as transformers 4 or 5 wrote it.

        Raises FileNotFoundError, or ValueError naming the file, the field and the mend.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; give a folder that holds a Llama model")
        try:
            return cls(**read_fields(json.loads(path.read_text())))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, folder: str | os.PathLike) -> None:
        """Writes folder/config.json in transformers 4's form, which version 5 reads as well."""
        fields = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
        }
        text = json.dumps({**fields, **asdict(self)}, indent=2) + "\n"
        replace_file(Path(folder) / "config.json", lambda path: path.write_text(text))


def read_fields(raw: dict) -> dict:
    """The arguments of Config in a parsed config.json; ValueError for what we would get wrong."""
    for field, values in SUPPORTED.items():
        if raw.get(field) not in values:
            raise ValueError(
                f"{field} is {raw[field]!r}, but this model computes {values[0]!r} only; "
                "choose a plain Llama 3 checkpoint"
            )
    missing = [field for field in REQUIRED if field not in raw]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; add what the checkpoint was trained with")
    fields = {name: raw[name] for name in Config.__dataclass_fields__ if name in raw}
    fields["torch_dtype"] = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    return {**ABSENT, **fields, **read_rope(raw)}


def read_rope(raw: dict) -> dict:
    """rope_theta and rope_scaling, from version 5's `rope_parameters` or version 4's two fields."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.pop("type", "default")  # the oldest files say `type`
    rope.setdefault("rope_type", kind)
    return {"rope_theta": theta, "rope_scaling": rope if rope != {"rope_type": "default"} else None}


# ---------------------------------------------------------------------------------------------
# Norm and rotary positions


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (arXiv 1910.07467, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
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


def reference_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax(q k^T / sqrt(d)) v, spelled out in float32: what the fast paths must equal."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1).float() for x in (k, v))  # (B, H, T, d)
    scores = q.float() @ k.transpose(2, 3) / math.sqrt(q.shape[-1])  # (B, H, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(future, -math.inf).softmax(-1) @ v).to(q.dtype)


def sdpa_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by torch's fused kernel for the device."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions; no biases."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        width, self.head_dim, self.layer = config.hidden_size, config.head_dim, layer
        query, key = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(width, query, bias=False)
        self.k_proj = nn.Linear(width, key, bias=False)
        self.v_proj = nn.Linear(width, key, bias=False)
        self.o_proj = nn.Linear(query, width, bias=False)

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
    """x + attention(norm(x)), then x + mlp(norm(x)): (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Callable) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


def score_chunk(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
    """hidden (N, D), weight (V, D), targets (N,) -> log-probs and entropy, both (N,) float32."""
    logp = (F.linear(hidden, weight).float() / temperature).log_softmax(-1)  # (N, V)
    entropy = -(logp.exp() * logp).sum(-1).detach()
    return logp.gather(1, targets[:, None]).squeeze(1), entropy


class Llama(nn.Module):
    """A decoder whose parameters bear Hugging Face's names.

    The parameters are uninitialised noise until `init_weights` or `load` fills them.
    `attention` is the function that the batch goes through: sdpa_attention or reference_attention.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.attention = config, sdpa_attention
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Normal(0, 0.02), projections into the residual stream / sqrt(2 layers) as in GPT-2.

        Drawn on the CPU in the order of the names: the same weights on every device. Returns self.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:  # a norm's weight
                weight.fill_(1.0)
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if residual else 0.02
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

    def forward(self, tokens: Tensor, targets: Tensor | None = None, temperature: float = 1.0):
        """tokens (B, T) int64, padded on the right.

        Without targets: logits (B, T, V) float32. With targets (B, T) int64, where targets[b, t]
        follows tokens[b, : t + 1] or is IGNORE: (logprobs, entropy), both (B, T) float32, of
        targets[b, t] under softmax(logits / temperature), and of that distribution, in nats; zeros
        where ignored. No gradient flows through the entropy. ValueError unless temperature > 0.
        """
        rope = rope_table(self.config, tokens.shape[1], self.head())
        x = self.hidden(tokens, rope, self.attention)  # (B, T, D)
        if targets is None:
            return F.linear(self.model.norm(x), self.head()).float()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0 to score tokens, not {temperature}")
        counted = (targets.flatten() != IGNORE).nonzero().squeeze(1)  # (N,)
        x = self.model.norm(x.flatten(0, 1)[counted])  # (N, D)
        chunks = [
            checkpoint(score_chunk, h, self.head(), t, temperature, use_reentrant=False, preserve_rng_state=False)
            for h, t in zip(x.split(CHUNK), targets.flatten()[counted].split(CHUNK), strict=True)
        ]  # fmt: skip
        zeros = torch.zeros(targets.numel(), device=tokens.device)
        logprobs, entropy = (zeros.index_copy(0, counted, torch.cat(x)) for x in zip(*chunks, strict=True))  # fmt: skip
        return logprobs.view_as(targets), entropy.view_as(targets)


# ---------------------------------------------------------------------------------------------
# Sampling


@dataclass
class Completion:
    """What followed a prompt."""

    tokens: list[int]  # the stop token included, if it was reached
    logprobs: list[float]  # of each token, under the distribution that it was drawn from
    stopped: bool  # by a stop token, not by max_new_tokens


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None):
    """logits (R, V) -> one token id per row, (R,) int64, and its log-prob, (R,) float32.

    temperature 0 takes the likeliest token, with its log-prob at temperature 1. Else with u uniform
    in [0, 1), -log u is exponential noise and argmax p_v / -log u_v is a draw from p, without a wait
    for the device; u = 0 gives infinite noise, so a token that cannot win, never a division by zero.
    (torch's own exponential_ takes 9 times as long on a CPU.)
    """
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)  # (R, V)
    score = logp
    if temperature > 0:
        noise = torch.empty_like(logp).uniform_(generator=generator).log_().neg_()
        score = logp.exp().div_(noise)
    token = score.argmax(-1)  # (R,)
    return token, logp.gather(1, token[:, None]).squeeze(1)


class Rows:
    """The rows being sampled: rows 0 .. n - 1 of a cache that is allocated once.

    Each row has its own length; `position` is the column that its newest token will take. Row r sees
    columns 0 .. position[r], so what a longer or an earlier row left further right is never read.
    """

    def __init__(self, model: Llama, rows: int, length: int):
        config, weight = model.config, model.head()
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads)
        # Zeros, because a masked column still enters the sum as 0 x its value: it must be finite.
        self.k = weight.new_zeros(*shape, config.head_dim, length)  # (layers, R, K, d, L)
        self.v = weight.new_zeros(*shape, length, config.head_dim)  # (layers, R, K, L, d)
        self.token = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.position = torch.zeros_like(self.token)
        self.index = torch.arange(rows, device=weight.device)
        self.columns = torch.arange(length, device=weight.device)
        self.rope = rope_table(config, length, weight)
        self.model, self.n = model, 0

    def admit(self, prompts: list[list[int]]) -> None:
        """Appends a row for each prompt; a run of equal prompts is computed once."""
        unique = [p for i, p in enumerate(prompts) if i == 0 or p is not prompts[i - 1]]
        copies, last = [], None
        for prompt in prompts:
            copies.append((copies[-1] if copies else -1) + (prompt is not last))
            last = prompt
        device = self.token.device
        longest = max(map(len, unique))
        size = max(1, PREFILL_TOKENS // longest)
        copies = torch.tensor(copies, device=device)
        for start in range(0, len(unique), size):
            self.prefill(unique[start : start + size], copies, start)
        rows = slice(self.n, self.n + len(prompts))
        self.token[rows] = torch.tensor([p[-1] for p in prompts], device=device)
        self.position[rows] = torch.tensor([len(p) - 1 for p in prompts], device=device)
        self.n += len(prompts)

    def prefill(self, prompts: list[list[int]], copies: Tensor, start: int) -> None:
        """Fills the cache of the rows that copy prompts start .. start + len(prompts) - 1."""
        longest = max(map(len, prompts))
        tokens = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=copies.device)
        mine = ((copies >= start) & (copies < start + len(prompts))).nonzero().squeeze(1)
        rows, source = self.n + mine, copies[mine] - start

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer, rows, :, :, :longest] = k[source].transpose(2, 3)
            self.v[layer, rows, :, :longest] = v[source]
            return self.model.attention(layer, q, k, v)

        self.model.hidden(tokens, tuple(x[:longest] for x in self.rope), attend)

    def step(self, length: int) -> Tensor:
        """Feeds each row its newest token; logits (n, V) of the next. length > every position."""
        n, position = self.n, self.position[: self.n]
        bias = torch.zeros(n, 1, 1, length, dtype=self.k.dtype, device=self.k.device)
        bias.masked_fill_((self.columns[:length] > position[:, None])[:, None, None], -math.inf)
        index = self.index[:n]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.k[layer][index, :, :, position] = k[:, :, 0]
            self.v[layer][index, :, position] = v[:, :, 0]
            keys, values = self.k[layer, :n, ..., :length], self.v[layer, :n, :, :length]
            q = q.view(n, keys.shape[1], -1, q.shape[-1]) / math.sqrt(q.shape[-1])  # (n, K, G, d)
            weights = (q @ keys + bias).softmax(-1, dtype=torch.float32)  # (n, K, G, L)
            return (weights.to(q.dtype) @ values).view(n, -1, 1, q.shape[-1])

        rope = tuple(x[position][:, None, None] for x in self.rope)  # (n, 1, 1, d)
        x = self.model.hidden(self.token[:n, None], rope, attend)  # (n, 1, D)
        return F.linear(self.model.model.norm(x[:, 0]), self.model.head())

    def decode(self, steps: int, temperature: float, generator: torch.Generator | None):
        """Draws `steps` tokens for each row: ids (n, steps) and log-probs (n, steps)."""
        length = int(self.position[: self.n].max()) + 1
        drawn = []
        for i in range(steps):
            token, logprob = sample(self.step(length + i), temperature, generator)
            self.token[: self.n] = token
            self.position[: self.n] += 1
            drawn.append((token, logprob))
        tokens, logprobs = zip(*drawn, strict=True)
        return torch.stack(tokens, 1), torch.stack(logprobs, 1)

    def keep(self, live: list[int]) -> list[int]:
        """Drops the other rows by moving the last live ones into their places; the new order."""
        order = list(range(len(live)))
        holes = sorted(set(order) - set(live))
        tail = [row for row in live if row >= len(live)]
        for hole, row in zip(holes, tail, strict=True):
            order[hole] = row
        for x, axis in ((self.k, 1), (self.v, 1), (self.token, 0), (self.position, 0)):
            to, source = (
                torch.tensor(rows, device=x.device, dtype=torch.int64) for rows in (holes, tail)
            )
            x.index_copy_(axis, to, x.index_select(axis, source))
        self.n = len(live)
        return order


def check_request(model: Llama, prompts: list[list[int]], max_new_tokens: int, samples: int) -> int:
    """Columns of cache that the request needs; ValueError for one that cannot be served."""
    limit = model.config.max_position_embeddings
    if not prompts or samples < 1 or max_new_tokens < 1:
        raise ValueError("give at least one prompt, samples >= 1 and max_new_tokens >= 1")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit - max_new_tokens:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} and "
                f"max_position_embeddings={limit} it may have 1 to {limit - max_new_tokens}"
            )
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ValueError(f"prompt {i} holds ids outside 0 .. {model.config.vocab_size - 1}")
    return max(map(len, prompts)) + max_new_tokens


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
    are sampled at a time; a finished row makes place for the next. Nothing in the model depends on
    train or eval mode, so it is left alone. ValueError for a request that cannot be served.
    """
    length = check_request(model, prompts, max_new_tokens, samples)
    done = [Completion([], [], False) for _ in range(len(prompts) * samples)]
    batch = Rows(model, min(rows, len(done)), length)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=batch.token.device)
    admitted, live = 0, []  # live[r]: the completion that row r is writing
    while admitted < len(done) or live:
        if (room := min(batch.token.numel() - len(live), len(done) - admitted)) > 0:
            new = range(admitted, admitted + room)
            batch.admit([prompts[i // samples] for i in new])
            live, admitted = live + list(new), admitted + room
        steps = min(STRIDE, min(max_new_tokens - len(done[i].tokens) for i in live))
        finished = collect(
            batch.decode(steps, temperature, generator),
            stops,
            [done[i] for i in live],
            max_new_tokens,
        )
        if any(finished):
            order = batch.keep([r for r, end in enumerate(finished) if not end])
            live = [live[r] for r in order]
            if progress:
                progress(sum(finished))
    return done


def collect(
    drawn: tuple[Tensor, Tensor], stops: Tensor, into: list[Completion], limit: int
) -> list[bool]:
    """Appends a block of tokens, each row's cut after its first stop token; which rows are done."""
    tokens, logprobs = drawn  # (n, steps)
    stop = torch.isin(tokens, stops)
    stopped = stop.any(1)
    count = torch.where(stopped, stop.int().argmax(1) + 1, tokens.shape[1])
    columns = (x.tolist() for x in (tokens, logprobs, count, stopped))
    for completion, ids, logps, n, end in zip(into, *columns, strict=True):
        completion.tokens += ids[:n]
        completion.logprobs += logps[:n]
        completion.stopped = end
    return [c.stopped or len(c.tokens) == limit for c in into]


# ---------------------------------------------------------------------------------------------
# Checkpoints


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes under another name and renames, so that `path` is either the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder}: neither {single.name} nor {index.name} is there")
    files = [
        folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
    ]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{folder}: {index.name} names {', '.join(missing)}; copy these shards too"
        )
    return files


def load(folder: str | os.PathLike, device="cpu", dtype: torch.dtype | None = None) -> Llama:
    """The model in a Hugging Face folder: config.json, and safetensors in one file or in shards.

    Tensors go from the memory-mapped file to `device` and `dtype` (None: as stored) one by one.
    FileNotFoundError for a missing file; ValueError that names every missing, unexpected or
    misshapen tensor, or the file that is cut short.
    """
    folder = Path(folder)
    config = Config.load(folder)
    with torch.device("meta"):
        model = Llama(config)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    state, wrong = {}, []
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    shape = tuple(file.get_slice(name).get_shape())
                    if name == "lm_head.weight" and config.tie_word_embeddings:
                        continue  # a second copy of the embeddings
                    if shape != shapes.get(name):
                        wrong.append(
                            f"{name}: {shape} in {path.name}, {tuple(shapes[name])} in config.json"
                            if name in shapes
                            else f"{name}: unexpected in {path.name}"
                        )
                        continue
                    state[name] = file.get_tensor(name).to(device=device, dtype=dtype, copy=True)
        except SafetensorError as error:
            raise ValueError(
                f"{path}: not a whole safetensors file ({error}); copy it again"
            ) from None
    wrong += [f"{name}: missing" for name in shapes if name not in state]
    if wrong:
        raise ValueError(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(wrong))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def split_shards(state: dict[str, Tensor], limit: float) -> list[dict[str, Tensor]]:
    """Consecutive tensors of at most `limit` bytes together, but at least one."""
    shards, room = [], 0
    for name, weight in state.items():
        if not shards or weight.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = weight
        room -= weight.nbytes
    return shards


def save(model: Llama, folder: str | os.PathLike, shard_bytes: float = 5e9) -> None:
    """Writes config.json and safetensors into `folder`, leaving its other files alone.

    A kill at any moment leaves the old model or the new one, never a mixture: a single file is
    renamed into place; shards get names of their own, and count once their index is renamed into
    place and a model.safetensors from before, which would win over the index, is gone.
    """
    folder = Path(folder)
    state = model.state_dict()
    model.config.torch_dtype = str(model.head().dtype).removeprefix("torch.")
    before = set(folder.glob("model*.safetensors*"))
    shards = split_shards(state, shard_bytes)
    tag = f"-{time.time_ns():x}" if before else ""
    names = [
        f"model{tag}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        names = ["model.safetensors"]
    model.config.save(folder)
    for name, shard in zip(names, shards, strict=True):
        tensors = {key: weight.detach().contiguous().cpu() for key, weight in shard.items()}
        replace_file(
            folder / name, lambda path, tensors=tensors: save_file(tensors, path, {"format": "pt"})
        )
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {
            "metadata": {"total_size": sum(w.nbytes for w in state.values())},
            "weight_map": places,
        }
        names.append("model.safetensors.index.json")
        replace_file(folder / names[-1], lambda path: path.write_text(json.dumps(index, indent=2)))
    for path in sorted(before - {folder / name for name in names}):
        path.unlink()
