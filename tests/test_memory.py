"""The parts of the memory table against what a small model really allocates."""

import memory
import pytest
import torch

import sft
from model import Config, Llama, rope_table

SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16}


@pytest.mark.parametrize("compact", [False, True])
def test_states_are_masters_gradients_and_moments(tokenizer, compact):
    config = Config(**SHAPE)
    kind = "bfloat16" if compact else "float32"
    s = sft.Hardware(device="cpu", optimizer_state=kind)
    learner = sft.Learner(Llama(config).init_weights(0), sft.World("cpu"), s, 0.0, tokenizer.pad)
    sft.accumulate(learner, [([5, 6, 7, 8], 1)])
    gradients = sum(p.grad.nbytes for p in learner.model.parameters())
    learner.step(1e-3)
    moments = sum(x.nbytes for state in learner.optimizer.state.values() for n, x in state.items() if n != "step")
    weights = sum(p.nbytes for p in learner.model.parameters())
    assert memory.states(config, 1, compact) == weights + gradients + moments
    assert memory.states(config, 4, compact) == memory.states(config, 1, compact) / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_activations_are_what_a_real_forward_pass_keeps(dtype):
    model, tokens, storages = Llama(Config(**SHAPE)).init_weights(0).to(dtype), 48, {}
    weights = {p.data_ptr() for p in model.parameters()}

    def count(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        rope = rope_table(model.config, tokens, model.head())
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        y = model.hidden(ids, rope, lambda layer, *qkv: model.attention(*qkv))
    real = sum(s.nbytes() for place, s in storages.items() if place not in weights)
    assert y.requires_grad
    assert memory.kept(memory.meta_model(model.config, dtype), tokens) == pytest.approx(real, rel=0.03)


def test_recomputing_keeps_less():
    config = Config(**SHAPE | {"num_hidden_layers": 24})
    assert memory.activations(config, 64, recompute=True) < memory.activations(config, 64, recompute=False) / 5
