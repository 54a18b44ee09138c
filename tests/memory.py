"""What fits on how many GPUs, worked out from the shapes: the README's table of memory.

    python tests/memory.py [--micro-tokens 8192] [--rows 32] [--length 2048]

Nothing is allocated: parameters are counted on the meta device, and so is what a forward pass keeps
for the backward pass. tests/test_memory.py holds the parts, and the sum, against real allocations of a
small model.
What is left out: the reference model of rl.py --kl; and the CUDA context, fragmentation and buffers of the
libraries, for which RESERVE is set aside. GB are 10^9 bytes, as in the names of the GPUs.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import command, flag
from model import CHUNK, Config, Llama, heads

GB = 1e9
RESERVE = 4 * GB
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
COMMON = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 5e5}
COMMON |= {"rope_scaling": LLAMA3}
# The published shapes of Llama 3.2 and 3.1.
MODELS = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "tie_word_embeddings": False},
}  # fmt: skip
GPUS, SIZES = (1, 2, 4, 8), (80, 141)
# Whether to --recompute: the first that fits wins.
TRIALS = (False, True)


@dataclass(frozen=True)
class Settings:
    micro_tokens: int = flag(8192, "tokens packed into one forward pass, on each rank", least=1)
    rows: int = flag(32, "rl: responses written at a time, on each rank", least=1)
    length: int = flag(2048, "rl: tokens of a prompt and its response together", least=1)


class KeepsItsInputs(torch.autograd.Function):
    """Keeps what a fused attention keeps (q, k, v, its output, a log-sum-exp); computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, torch.empty(q.shape[:-1], device=q.device))
        return y

    @staticmethod
    def backward(ctx, y):
        raise NotImplementedError


def meta_model(config: Config, dtype=torch.bfloat16) -> Llama:
    with torch.device("meta"):
        return Llama(config).to(dtype)


def kept(model: Llama, tokens: int) -> int:
    """Bytes that the blocks keep for the backward pass over a row of `tokens` tokens, weights apart."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = {}

    def count(x):
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    rope = tuple(torch.empty(tokens, model.config.head_dim, dtype=model.head().dtype, device="meta") for _ in "cs")
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        model.hidden(ids, lambda layer, *qkv: KeepsItsInputs.apply(*heads(*qkv, *rope)))
    return sum(s.nbytes() for key, s in storages.items() if key not in weights)


def activations(config: Config, tokens: int, recompute: bool) -> int:
    """Bytes kept at the end of the forward pass, or in the first block of the backward pass if that is more."""
    model = meta_model(config)
    if not recompute:
        return kept(model, tokens)
    one = kept(meta_model(Config(**vars(config) | {"num_hidden_layers": 1})), tokens)
    for block in model.model.layers:
        block.recompute = True
    return kept(model, tokens) + one


def states(config: Config, ranks: int) -> float:
    """Bytes a rank of float32 masters, their gradients, and AdamW's two moments."""
    return sum(p.numel() for p in meta_model(config).parameters()) * 16 / ranks


def gathered(config: Config) -> float:
    """Bytes of what FSDP2 puts together: what is outside of the blocks, and two blocks.

    In bfloat16 the weights and their gradients, and for reducing those once more in float32.
    """
    model = meta_model(config)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = sum(p.numel() for p in model.parameters()) - config.num_hidden_layers * block
    return (outside + 2 * block) * (2 + 2 + 4)


def logits(config: Config) -> float:
    """Bytes of a chunk's logits, their log-softmax, its gradient and theirs, in float32.

    The kernels' chunks hold eight times as many tokens, but only logits in bfloat16, in whose place is the gradient.
    """
    return 4.0 * 4 * CHUNK * config.vocab_size


def sampler(config: Config, rows: int, length: int) -> float:
    """Bytes of the bfloat16 copy of the weights and of the cache."""
    weights = sum(p.numel() for p in meta_model(config).parameters())
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * rows * length
    return 2.0 * (weights + cache)


def total(config: Config, stage: str, ranks: int, recompute: bool, s: Settings) -> float:
    """Bytes on each rank at the worst moment; sampling and training take turns, the cache stays for neither."""
    training = gathered(config) + activations(config, s.micro_tokens, recompute) + logits(config)
    held = states(config, ranks) + RESERVE
    if stage == "sft":
        return held + training
    weights = sampler(config, 0, 0)
    return held + weights + max(training, sampler(config, s.rows, s.length) - weights)


def cell(config: Config, stage: str, ranks: int, size: int, s: Settings) -> str:
    for recompute in TRIALS:
        if (needed := total(config, stage, ranks, recompute, s)) <= size * GB:
            return f"{needed / GB:.0f}{' r' if recompute else ''}"
    return f"no ({needed / GB:.0f})"


def main(s: Settings) -> None:
    columns = list(itertools.product(SIZES, GPUS))
    print("| model, stage | " + " | ".join(f"{n} × {size} GB" for size, n in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for (name, shape), stage in itertools.product(MODELS.items(), ("sft", "rl")):
        cells = [cell(Config(**COMMON | shape), stage, n, size, s) for size, n in columns]
        print(f"| {name}, {stage} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    command(main, Settings, __doc__)
