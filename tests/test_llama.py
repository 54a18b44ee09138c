"""A folder laid out as Llama-3.1's, made by transformers and tokenizers: prompts, training, and back to transformers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import data
import eval as evaluation
import sft
from model import Config, Llama, load, save

logging.disable_progress_bar()
logging.set_verbosity_error()

# The special tokens of Llama-3.1's tokenizer in the order of their ids, the later reserved ones left out.
SPECIAL = "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id"
SPECIAL += " reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag"
SPECIAL = [f"<|{name}|>" for name in SPECIAL.split()]

# The chat template of Llama-3.1-Instruct, less its branches for tools.
TEMPLATE = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""


def train_tokenizer(texts):
    """As Llama-3's: byte-level BPE without unknowns, special tokens after the others, bos put before a text."""
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(data.SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence([split, to_bytes]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    first = {"single": f"{SPECIAL[0]} $A", "special_tokens": [(SPECIAL[0], core.token_to_id(SPECIAL[0]))]}
    core.post_processor = processors.TemplateProcessing(**first)
    return core


@pytest.fixture(scope="module")
def instruct(corpus, tmp_path_factory):
    """A bfloat16 model in shards, with the other files that such a folder holds."""
    folder = tmp_path_factory.mktemp("hub") / "Llama-3.1-0B-Instruct"
    records = data.read_split(corpus, "train")
    core = train_tokenizer(data.ask(r["prompt"], p) + r["solutions"][p] for r in records for p in r["solutions"])
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 500000.0}
    config = LlamaConfig(
        vocab_size=core.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, rope_parameters=rope, tie_word_embeddings=False,
        bos_token_id=core.token_to_id(SPECIAL[0]), eos_token_id=[core.token_to_id(SPECIAL[i]) for i in (1, 8, 9)],
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).bfloat16()
    theirs.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    theirs.save_pretrained(folder, max_shard_size="50KB")
    core.save(str(folder / "tokenizer.json"))
    about = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[9], "model_max_length": 131072, "chat_template": TEMPLATE}
    about |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "original").mkdir()
    (folder / "original/consolidated.00.pth").write_bytes(b"not read")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


STATEMENT = "  \n Read integers.\n\n    Keep the even ones,\tthen  print them. \n\n"


def conversation(answered):
    """Of one user, with white space around what is said, as the template is to take it off."""
    turns = [{"role": "user", "content": f"\n {data.ask(STATEMENT, 'python')}\n\n"}]
    return turns + [{"role": "assistant", "content": "\n```python\nx = 1\n\n\nprint(x)\n```\n"}] * answered


def train(model, corpus, out, **changes):
    flags = {"replay": 0.0, "tokens": 2000, "batch": 500, "eval_problems": 1, "lr": 1e-3, "device": "cpu"} | changes
    sft.main(sft.Settings(model=str(model), data=str(corpus), out=str(out), **flags))
    return sft.newest_checkpoint(out)


def test_a_trained_checkpoint_opens_in_transformers(instruct, corpus, tmp_path):
    final = train(instruct, corpus, tmp_path / "run", format="llama3.1", precision="bfloat16")
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert theirs.dtype == load(final).head().dtype == torch.bfloat16
    before = AutoTokenizer.from_pretrained(instruct)
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == Config.load(instruct).eos_token_id
    assert theirs.config.bos_token_id == Config.load(instruct).bos_token_id
    assert theirs.config.rope_parameters == LlamaConfig.from_pretrained(instruct).rope_parameters
    text = "def f(x):\n    return x , 1 <|eot_id|>"
    assert tokenizer(text) == before(text)
    assert tokenizer.model_max_length == 131072 and tokenizer.pad_token_id == data.Tokenizer(final).pad
    said = conversation(1)
    assert tokenizer.apply_chat_template(said) == before.apply_chat_template(said)
    ids = tokenizer.apply_chat_template(said, return_tensors="pt")
    with torch.no_grad():
        ours = load(final, dtype=torch.float32)(ids["input_ids"])
        torch.testing.assert_close(ours, theirs.float()(**ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(load(final).head(), load(instruct).head())


def test_a_base_model_that_learned_to_chat_stops_in_other_engines_too(instruct, corpus, tmp_path):
    """A base model's config.json names the end of a document alone."""
    base, raw = shutil.copytree(instruct, tmp_path / "base"), json.loads((instruct / "config.json").read_text())
    stops = raw["eos_token_id"]
    (base / "config.json").write_text(json.dumps(raw | {"eos_token_id": stops[0]}))
    assert Config.load(train(base, corpus, tmp_path / "run")).eos_token_id == stops


def test_a_padded_vocabulary_is_drawn_from_and_scored_as_far_as_the_tokenizer_goes(instruct, corpus, tmp_path):
    """The rows beyond it are made such that an id of theirs would nearly always be drawn."""
    padded, theirs = shutil.copytree(instruct, tmp_path / "padded"), AutoModelForCausalLM.from_pretrained(instruct)
    theirs.resize_token_embeddings(576, mean_resizing=False)
    theirs.lm_head.weight.data[511:] *= 200
    theirs.save_pretrained(padded)
    (padded / "model.safetensors.index.json").unlink()
    final = train(padded, corpus, tmp_path / "run", precision="bfloat16")
    model, tokenizer = sft.open_checkpoint(final, sft.World("cpu"), SimpleNamespace(precision="float32", format=""))
    assert (model.config.vocab_size, model.config.tokenizer_size) == (576, tokenizer.size) == (576, 511)
    assert AutoModelForCausalLM.from_pretrained(final).lm_head.weight.shape == (576, 32)
    tasks = [(record, "python") for record in data.read_split(corpus, "dev")[:2]]
    for rollout in evaluation.roll_out(model, tokenizer, tasks, 20, 1.0, 8):
        tokens = torch.tensor([rollout.prompt + rollout.tokens])
        logprobs = model(tokens[:, :-1], tokens[:, 1:])[0][0, len(rollout.prompt) - 1 :]
        assert tokens.max() < 511 and rollout.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)


def test_a_tokenizer_that_is_not_the_models_is_refused(instruct, corpus, tmp_path):
    strange = shutil.copytree(instruct, tmp_path / "strange")
    shutil.copy(corpus / "tokenizer.json", strange)
    with pytest.raises(ValueError, match=r"tokenizer\.json: has \d+ tokens, the model 511; take the model's own"):
        train(strange, corpus, tmp_path / "run")
    (strange / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file; copy the model's own"):
        train(strange, corpus, tmp_path / "run2")


PEAK = r"""
import re, sys
sys.path.insert(0, sys.argv[1])
import torch
from model import load
def resident(kind):
    return 1024 * int(re.search(rf"{kind}:\s*(\d+)", open("/proc/self/status").read())[1])
load(sys.argv[2], dtype=torch.float32)  # whatever a first load brings with it
before = resident("VmRSS")
model = load(sys.argv[3], dtype=torch.float32)
print(resident("VmHWM") - before)
"""


def test_loading_takes_the_model_and_at_most_one_shard(tmp_path):
    """Peak resident memory of a process of its own, which maps each file and copies it into float32."""
    for name, config in {"small": {}, "large": {"hidden_size": 512, "num_hidden_layers": 24}}.items():
        save(Llama(Config(**config)).bfloat16(), tmp_path / name, 1.2e7)
    shards = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    command = [sys.executable, "-c", PEAK, str(Path(__file__).parent.parent), tmp_path / "small", tmp_path / "large"]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    float32 = 2 * sum(shards)
    assert len(shards) > 4 and 0.95 * float32 < peak < float32 + 1.1 * max(shards)
