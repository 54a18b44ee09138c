"""A small corpus, made once, and a model small enough to train within a test."""

from pathlib import Path

import pytest
import torch

import data
import sandbox
from model import Config, Llama, save

SFT, UNSEEN = ("python", "javascript", "ruby"), ("perl", "lua")
SIZES = {"sft": SFT, "unseen": UNSEEN, "base": 500, "train": 300, "rl": 80, "held_out": 30, "weak": 20}
SIZES["reserved"] = 40


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder of an embedded corpus of 500 documents, 300 training, 80 RL and 2 × (30 + 30 + 40) held-out problems."""
    out = tmp_path_factory.mktemp("corpus")
    data.make(data.CorpusSettings(out=str(out), **SIZES))
    return out


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return data.Tokenizer(corpus)


def new_tiny(tokenizer):
    config = Config(
        vocab_size=tokenizer.size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return Llama(config).init_weights(0)


@pytest.fixture
def tiny(tokenizer):
    """A two-layer Llama with the corpus's vocabulary, float32."""
    torch.set_num_threads(1)
    return new_tiny(tokenizer)


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, tmp_path_factory):
    """Folder of `tiny` and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save(new_tiny(tokenizer), folder)
    tokenizer.save(folder)
    return folder


def starts(*documents, device="cpu"):
    """`start` of a row of documents of these lengths, (1, T)."""
    lengths = torch.tensor(documents, device=device)
    return torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)[None]


@pytest.fixture(scope="module")
def box():
    with sandbox.Sandbox(2) as box:
        yield box


def helper_or_skip(level: str) -> sandbox._Helper:
    try:
        return sandbox._Helper(level)
    except sandbox._Refused as refusal:
        pytest.skip(f"{level}: {refusal}")


def descendants(pid: int) -> set[int]:
    """The processes below `pid`, also those in sessions of their own, where a signal to its group does not reach them."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, rest = set(), [pid]
    while rest:
        below = children.get(rest.pop(), [])
        found.update(below)
        rest += below
    return found
