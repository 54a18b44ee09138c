"""The parts of the memory table against what a small model really allocates."""

import weakref

import memory
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import sft
from model import Config, Llama, heads, rope_table

SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}


def test_states_are_masters_gradients_and_moments(tokenizer):
    config, s = Config(**SHAPE), sft.Hardware(device="cpu")
    learner = sft.Learner(Llama(config).init_weights(0), sft.World("cpu"), s, 0.0, tokenizer.pad)
    sft.accumulate(learner, [([5, 6, 7, 8], 1)])
    gradients = sum(p.grad.nbytes for p in learner.model.parameters())
    learner.step(1e-3)
    moments = sum(x.nbytes for state in learner.optimizer.state.values() for n, x in state.items() if n != "step")
    weights = sum(p.nbytes for p in learner.model.parameters())
    assert memory.states(config, 1) == weights + gradients + moments == 4 * memory.states(config, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_activations_are_what_a_real_forward_pass_keeps(dtype):
    ours, tokens, storages = Llama(Config(**SHAPE)).init_weights(0).to(dtype), 48, {}
    weights = {p.data_ptr() for p in ours.parameters()}

    def count(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        rope = rope_table(ours.config, tokens, ours.head())
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        y = ours.hidden(ids, lambda layer, *qkv: ours.attention(*heads(*qkv, *rope)))
    real = sum(s.nbytes() for place, s in storages.items() if place not in weights)
    assert y.requires_grad
    assert memory.kept(memory.meta_model(ours.config, dtype), tokens) == pytest.approx(real, rel=0.03)


def test_recomputing_keeps_less():
    config = Config(**SHAPE | {"num_hidden_layers": 24})
    assert memory.activations(config, 64, recompute=True) < memory.activations(config, 64, recompute=False) / 5


class Peak(TorchDispatchMode):
    """The most bytes alive at once, of the tensors `held` and of those that the operations within make."""

    def __init__(self, held):
        super().__init__()
        self.storages, self.most = {}, 0
        self.add(held)

    def add(self, tensors):
        for x in tensors:
            storage = getattr(x, "_local_tensor", x).untyped_storage()
            self.storages[storage._cdata] = weakref.ref(storage)
        self.storages = {key: storage for key, storage in self.storages.items() if storage()}
        self.most = max(self.most, sum(storage().nbytes() for storage in self.storages.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.add(x for x in tree_leaves(made) if isinstance(x, torch.Tensor))
        return made


@pytest.mark.parametrize("recompute", memory.TRIALS)
def test_the_table_holds_what_an_update_really_needs(monkeypatch, recompute):
    """Two micro-batches and the step, in bfloat16: no more than the table says, and not much less."""
    for module in (model, memory):
        monkeypatch.setattr(module, "CHUNK", 32)
    monkeypatch.setattr(model, "KEPT", 0)
    shape = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384, "tie_word_embeddings": False}
    config, tokens = Config(**shape, num_hidden_layers=12), 96
    chosen = {"recompute": recompute, "micro_tokens": tokens, "precision": "bfloat16"}
    rows = [(torch.arange(tokens + 1).tolist(), 1)] * 2
    with sft.World("cpu") as world:
        learner = sft.Learner(Llama(config).init_weights(0), world, sft.Hardware(device="cpu", **chosen), 0.0, 0)
        sft.accumulate(learner, rows)
        learner.step(1e-3)
        moments = [x for state in learner.optimizer.state.values() for x in state.values()]
        with Peak([*learner.model.parameters(), *moments]) as peak:
            del moments
            sft.accumulate(learner, rows)
            learner.step(1e-3)
    expected = memory.total(config, "sft", 1, recompute, memory.Settings(micro_tokens=tokens)) - memory.RESERVE
    assert 0.8 * expected < peak.most <= expected
