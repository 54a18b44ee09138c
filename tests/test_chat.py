"""Chat formats side by side with transformers, which renders each folder's own template; the folders are made here."""

import json

import pytest
import tokenizers
from test_llama import SPECIAL, conversation
from test_llama import TEMPLATE as LLAMA31
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

import data

# As SmolLM2's: one digit a token, GPT-2's split, and only the bytes that its training texts had.
SMOL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
SMOL_ROLES = {"bos_token": SMOL[1], "eos_token": SMOL[2], "pad_token": SMOL[2], "unk_token": SMOL[0]}
TURNS = (
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}" + TURNS
)
LLAMA3 = (  # of Llama-3-Instruct
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# A jinja file of several lines, with escapes, as ChatML folders have too.
FILE = r"""{{- bos_token }}
{%- if messages[0].role != 'system' %}
    {{- "<|im_start|>system\nYou're terse.<|im_end|>\n" }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA_ROLES = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[9]}
BOTH = [*SPECIAL, "<|im_start|>", "<|im_end|>"]  # ChatML taught to a Llama 3
FOLDERS = {  # special tokens, their roles, chat template; its format, and the roles that are found: bos, eos, stop, pad
    "SmolLM2": (SMOL, SMOL_ROLES, SMOL_TEMPLATE, "chatml", (SMOL[0], SMOL[0], SMOL[2], SMOL[2])),
    "SmolLM": (SMOL, SMOL_ROLES, "{% for message in messages %}" + TURNS, "chatml", (SMOL[0], SMOL[0], SMOL[2], SMOL[2])),
    "names of its own": (
        ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"], {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        FILE, "chatml", ("<s>", "</s>", "<|im_end|>", "<pad>"),
    ),
    "a Llama that speaks ChatML": (
        BOTH, LLAMA_ROLES | {"eos_token": "<|im_end|>"}, [{"name": "tools", "template": LLAMA3}, {"name": "default", "template": FILE}],
        "chatml", (SPECIAL[0], SPECIAL[1], "<|im_end|>", SPECIAL[4]),
    ),
    "Llama 3": (SPECIAL, LLAMA_ROLES, LLAMA3, "chat", (SPECIAL[0], SPECIAL[1], SPECIAL[9], SPECIAL[4])),
    "Llama 3.1": (SPECIAL, LLAMA_ROLES, LLAMA31, "llama3.1", (SPECIAL[0], SPECIAL[1], SPECIAL[9], SPECIAL[4])),
}  # fmt: skip


def change(folder, file, change):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))


def make(folder, special, roles, template, where="tokenizer_config.json"):
    """A tokenizer trained on three texts, its roles in the file `where`, and a template of several lines in its own."""
    core = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Digits(individual_digits=True)
    if SPECIAL[0] in special:
        split = pre_tokenizers.Split(tokenizers.Regex(data.SPLIT), "isolated")
    split = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=SPECIAL[0] not in special)]
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c != "Ą"]  # the byte 4 is never seen
    texts = ["Answer in python.\n\n\nuser\nassistant\n\nsystem", "Read integers. Keep the even ones, then print them."]
    tokens = [AddedToken(name, special=True, normalized=False) for name in special]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=tokens, show_progress=False))  # fmt: skip
    folder.mkdir(exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if template is FILE:
        (folder / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    change(folder, where, roles)
    return folder


STATEMENT = "  \n Read 12345 integers.\n\n    Keep the even ones,\tthen  print them. \n\n"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("name", FOLDERS)
def test_prompts_and_answers_are_what_transformers_renders_from_the_folders_template(tmp_path, name, where):
    *made, format, roles = FOLDERS[name]
    first = data.Tokenizer(make(tmp_path / "a", *made, where))
    first.save(tmp_path / "b")
    (tmp_path / "b/config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": first.stops}))
    record = {"solutions": {"python": "x = 1\n\n\nprint(x)"}}
    for folder in (tmp_path / "a", tmp_path / "b"):
        ours, theirs = data.Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        assert ours.format == format
        assert tuple(map(ours.core.id_to_token, (ours.bos, ours.eos, ours.stop, ours.pad))) == roles
        said = conversation(True)
        said[0]["content"] = data.ask(STATEMENT, "python")  # not every template takes white space off
        said[1]["content"] = said[1]["content"].strip()
        ids = theirs.apply_chat_template(said[:1], add_generation_prompt=True, return_dict=False)
        assert ours.prompt(STATEMENT, "python") == ids
        e = data.example(ours, record, STATEMENT, "python")
        ids = theirs.apply_chat_template(said, return_dict=False)
        assert e.tokens == ids[: len(e.tokens)] and theirs.decode(ids[len(e.tokens) :]).strip() == ""
        assert e.tokens[-1] == ours.stop == theirs.convert_tokens_to_ids(roles[2]) and ours.stop in ours.stops


def test_what_a_model_wrote_is_read_whole_but_for_the_token_that_it_stopped_by(tmp_path):
    ours = data.Tokenizer(make(tmp_path, *FOLDERS["SmolLM2"][:3]))
    start, pad = ours.core.token_to_id("<|im_start|>"), ours.core.token_to_id("<repo_name>")
    written = [*ours.encode("a"), start, *ours.encode("b"), ours.stop, pad, *ours.encode("c ")]
    text = "a<|im_start|>b<|im_end|><repo_name>c "
    for stop in ours.stops:
        assert ours.decode([*written, stop]) == text
    assert ours.decode(written) == text and ours.decode([ours.stop]) == ours.decode([]) == ""
    assert ours.decode([*written, ours.stop, ours.stop]) == text + "<|im_end|>"
    assert ours.encode(text) != written and ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_models_own_ends_of_a_text_stop_an_answer(tmp_path, file):
    make(tmp_path, *FOLDERS["SmolLM2"][:3])
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / file).write_text(json.dumps({"eos_token_id": [2, 3]}))
    ours = data.Tokenizer(tmp_path)
    assert set(ours.stops) == {2, 3} and ours.eos == 3 and ours.stop == 2


ZEPHYR = "{% for m in messages %}{{ '<|user|>\n' + m['content'] + eos_token }}{% endfor %}"
THINKING = SMOL_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
OWN_SYSTEM = SMOL_TEMPLATE.replace("You are", "' + persona + '")


@pytest.mark.parametrize(
    "file, changes, message",
    [
        *(("tokenizer_config.json", {"chat_template": t}, "its chat template is none that is known here; choose --format chat or")
          for t in (ZEPHYR, THINKING, OWN_SYSTEM, [{"name": "rag", "template": SMOL_TEMPLATE}], {"a": 1})),
        ("tokenizer_config.json", {"bos_token": "<s>"}, r"tokenizer\.json: its added tokens lack '<s>', the folder's bos_token; use"),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<image>"}}, "lack '<image>', the folder's extra_special_tokens"),
        ("special_tokens_map.json", {"sep_token": {"content": "Read"}}, "lack 'Read', the folder's sep_token"),
        ("special_tokens_map.json", {"additional_special_tokens": ["<|im_end|>", "<tool>"]}, "lack '<tool>'"),
        ("added_tokens.json", {"<tool>": 340}, r"added_tokens\.json: .*<tool>.* is not what tokenizer\.json has as 340"),
        ("added_tokens.json", {"<|im_end|>": 3}, r"added_tokens\.json: .*<\|im_end\|>.* is not what tokenizer\.json has as 3"),
        ("added_tokens.json", {"<tool>": []}, r"added_tokens\.json: "), ("special_tokens_map.json", {"eos_token": "<repo>"}, "lack '<repo>'"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0, "##b": 1, "a##b": 2}, "merges": [["a", "##b"]], "continuing_subword_prefix": "##"}},
         "has a continuing_subword_prefix; use"),
    ],
)  # fmt: skip
def test_what_would_be_read_otherwise_is_refused_by_name(tmp_path, file, changes, message):
    make(tmp_path, *FOLDERS["SmolLM2"][:3])
    change(tmp_path, file, changes)
    with pytest.raises(ValueError, match=message) as caught:
        data.Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_older_files_count_where_the_config_lists_no_added_tokens(tmp_path):
    """transformers reads special_tokens_map.json and added_tokens.json only then."""
    make(tmp_path, *FOLDERS["SmolLM2"][:3])
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 2}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<repo_name>"}))
    for listed, pad in ((None, 3), ({"2": {"content": "<|im_end|>", "special": True}}, 2)):
        change(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": listed} if listed else {})
        assert data.Tokenizer(tmp_path).pad == AutoTokenizer.from_pretrained(tmp_path).pad_token_id == pad


def test_a_format_may_be_chosen_where_a_folders_own_is_not_known(tmp_path):
    special, roles, *_ = FOLDERS["SmolLM2"]
    make(tmp_path, special, roles, ZEPHYR)
    plain, chatml = (data.Tokenizer(tmp_path, format) for format in ("plain", "chatml"))
    assert plain.stop == plain.bos == 0 and chatml.stop == 2
    assert chatml.prompt("x", "python")[0] == 1  # without a system turn
    with pytest.raises(ValueError, match=r"has no token <\|start_header_id\|>; use .* or --format plain"):
        data.Tokenizer(tmp_path, "chat")
    make(tmp_path, special, roles, "")
    assert data.Tokenizer(tmp_path).format == "chatml"


def test_a_character_without_a_token_is_named(tmp_path):
    ours = data.Tokenizer(make(tmp_path, *FOLDERS["SmolLM2"][:3]))
    assert ours.decode(ours.encode("ünïcödé 漢 \x05")) == "ünïcödé 漢 \x05"
    with pytest.raises(ValueError, match=r"has no tokens for '\\x04'; leave such texts out"):
        ours.prompt("Print \x04.", "python")
