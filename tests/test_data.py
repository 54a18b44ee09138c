"""The corpus: every program agrees with the interpreter, nothing held out leaks, roles are kept."""

import contextlib
import gzip
import io
import json
import os
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
import eval as evaluation
import rl
import sandbox
import sft

SPLITS = ("train", "rl", "eval")


@pytest.fixture(scope="session")
def records(corpus):
    return {name: data.read_records(corpus / f"{name}.jsonl.gz") for name in SPLITS}


def run_python(program: str, line: str) -> str:
    """What a python program of the corpus prints for one line, run in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {"input": lambda: line.rstrip("\n")})
    return out.getvalue()


# --------------------------------------------------------------------------------------------------
# Programs and their tests


@pytest.fixture(scope="session")
def problems():
    """As few of four or five operations as hold each operation twice; SANDBOX_FULL=1: 200, and five times."""
    least, enough = (200, 5) if os.environ.get("SANDBOX_FULL") else (0, 2)
    rng, settings, used, made = random.Random(7), data.CorpusSettings(tests=2), Counter(), []
    while (short := {name for name in data.OPERATIONS if used[name] < enough}) or len(made) < least:
        functions = [data.random_function(rng, rng.randint(4, 5), 1.0, short) for _ in range(5)]
        function = max(functions, key=lambda f: len({name for name, _ in f[1]} & short))
        made.append(data.make_problem(function, "p", settings, rng, 0.0))
        if len(made) % 2:  # every other with comments
            comments, _ = data.wordings(function, random.Random(0), 0.0, ())
            made[-1]["solutions"] = {language: data.emit(function, language, comments) for language in data.SNIPPETS}
        used.update(made[-1]["operations"])
    return made


@pytest.mark.parametrize("language", list(data.SNIPPETS))
def test_emitters_agree_with_the_interpreter(problems, language):
    """The outputs were interpreted, the programs really run, half of them with comments."""
    if language not in sandbox.installed():
        pytest.skip(f"no toolchain for {language}")
    jobs = [(p["solutions"][language], language, p["tests"]) for p in problems]
    with sandbox.Sandbox() as box:
        failed = [(job[0], r) for job, r in zip(jobs, box.map(jobs), strict=True) if not r.passed]
    assert not failed, f"{len(failed)} of {len(jobs)} fail; the first:\n{failed[0][0]}{failed[0][1]}"


def test_interpreter_on_values_worked_out_by_hand():
    f = ("ints", (("odd", None), ("mul", 3), ("sums", None)))
    assert data.interpret(f, "4 -3 1 10 5\n") == "-9 -6 9\n"
    f = ("words", (("longer", 3), ("mirror", None), ("rsort", None)))
    assert data.interpret(f, "river tea stone ant\n") == "revir enots\n"
    f = ("words", (("has", "a"), ("lengths", None), ("cap", 6), ("max", None)))
    assert data.interpret(f, "tea sun lemonade\n") == "6\n"
    assert data.interpret(("ints", (("gt", 8), ("max", None))), "1 2\n") is None
    for last in ((), (("cap", 6),)):  # Java's integers overflow, whatever a later step makes of it
        assert data.interpret(("ints", (("square", None), ("square", None), *last)), "250\n") is None


def test_most_programs_are_short(records, tokenizer):
    lengths = [len(tokenizer.encode(p)) for r in records["train"] for p in r["solutions"].values()]
    assert sum(n < 120 for n in lengths) / len(lengths) > 0.75


def test_same_seed_same_bytes(corpus, tmp_path):
    s = data.CorpusSettings(out=str(tmp_path), sft=("python",), unseen=("lua",), train=300, rl=100, eval=20)
    data.make(s)
    for name in ("train.jsonl.gz", "rl.jsonl.gz", "eval.jsonl.gz", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes(), name


def test_a_corpus_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    s = data.CorpusSettings(out=str(tmp_path), sft=("python",), unseen=("lua",), train=3, rl=3, eval=3)
    data.make(s)
    data.Tokenizer(tmp_path, "plain").save(tmp_path)  # as `make --tokenizer` does
    data.make(s)
    assert data.Tokenizer(tmp_path).format == "chat"
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileNotFoundError, match=r"typo.tokenizer\.json"):
        data.make(replace(s, seed=1, tokenizer="typo"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(data, "train_tokenizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        data.make(replace(s, seed=1))
    with pytest.raises(FileNotFoundError, match=r"languages\.json: no such file"):
        data.read_roles(tmp_path)


# --------------------------------------------------------------------------------------------------
# Splits


def test_held_out_functions_occur_in_no_training_record(records):
    """Judged by what the python programs print on fresh inputs, not by the corpus's own hashes."""
    rng, seen = random.Random("fresh"), defaultdict(set)
    lines = {kind: [data.random_line(kind, rng) for _ in range(60)] for kind in ("ints", "words")}

    def behaviour(record):
        kind = "ints" if "int" in record["solutions"]["python"].splitlines()[0] else "words"
        printed = []
        for line in lines[kind]:
            with contextlib.suppress(ValueError):  # the maximum of nothing
                printed.append(run_python(record["solutions"]["python"], line))
        return kind, tuple(printed)

    for name in SPLITS:
        for record in records[name]:
            seen[name].add(behaviour(record))
    assert len(seen["eval"]) >= 0.75 * len(records["eval"])  # known and reserved may share functions
    assert not seen["eval"] & (seen["train"] | seen["rl"])


def test_reserved_wordings_are_absent_from_training(records):
    reserved = [re.escape(w).replace(r"\{k\}", r"\w+") for op in data.OPERATIONS.values() for w in op.new]
    known = {w.lower() for op in data.OPERATIONS.values() for w in op.known}
    assert not known & {w.lower() for op in data.OPERATIONS.values() for w in op.new}
    pattern = re.compile("|".join(reserved), re.IGNORECASE)
    texts = [t for r in records["train"] for t in (r["prompt"], *r["commented"].values())]
    assert not [t for t in texts if pattern.search(t)]
    assert all(r["difficulty"]["new"] for r in records["eval"] if r["id"].startswith("new"))
    for record in records["rl"] + records["eval"]:
        assert bool(pattern.search(record["prompt"])) == bool(record["difficulty"]["new"])


def test_share_of_reserved_wordings_in_rl(corpus):
    s = data.CorpusSettings(new_share=0.7)
    problems = data.make_problems(s, "rl", 400, False, 2, 0.7)
    reworded = sum(op in s.reworded for p in problems for op in p["operations"])
    new = sum(p["difficulty"]["new"] for p in problems)
    assert abs(new / reworded - 0.7) < 0.06  # three standard errors of about 0.02
    assert all(set(p["operations"]) & set(s.reworded) for p in problems)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"sft": ["python", "c"], "unseen": ["lua", "c"]}', "c: named twice"),
        ('{"sft": ["python", "py"], "unseen": ["lua"]}', "python: named twice"),
        ('{"sft": [], "unseen": ["lua"]}', "names no source PL"),
        ('{"sft": [3], "unseen": ["lua"]}', "no attribute"), ("{", "Expecting"),
    ],
)  # fmt: skip
def test_roles_that_are_none_are_refused(tmp_path, text, message):
    (tmp_path / "languages.json").write_text(text)
    with pytest.raises(ValueError, match=rf"languages\.json: .*{message}.*it must read"):
        data.read_roles(tmp_path)


def test_chosen_roles_do_not_overlap(monkeypatch):
    monkeypatch.setattr(sandbox, "installed", lambda: list(data.SNIPPETS))
    assert data.choose_roles((), ("py", "go")) == data.Roles(("javascript", "ruby", "php", "c"), ("python", "go"))
    assert data.choose_roles(("perl", "lua"), ()).unseen == ("bash", "rust", "tcl", "awk")
    with pytest.raises(ValueError, match="python: named twice"):
        data.choose_roles(("py", "c"), ("python",))


# --------------------------------------------------------------------------------------------------
# Mixtures


def mixture(corpus, records, tokenizer, name, **settings):
    roles = data.read_roles(corpus)
    return data.Mixture(name, records["train"], tokenizer, roles.sft, roles.everything, **settings)


@pytest.mark.parametrize("name", ["source", "multi", "parallel"])
def test_sft_shows_no_unseen_language_but_in_replay(corpus, records, tokenizer, name):
    roles = data.read_roles(corpus)
    examples = [mixture(corpus, records, tokenizer, name)[i] for i in range(900)]
    allowed = {roles.source} if name == "source" else set(roles.sft)
    assert {p for e in examples for p in e.languages} == allowed
    replayed = [mixture(corpus, records, tokenizer, name, general=0.3)[i] for i in range(900)]
    assert {p for e in replayed if e.kind != "base" for p in e.languages} == allowed
    assert abs(sum(e.kind == "base" for e in replayed) / 900 - 0.3) < 0.05


def test_a_record_without_a_pl_that_is_shown_is_refused(tokenizer):
    for changes in ({"name": "parallel"}, {"name": "base"}, {"name": "source", "general": 0.1}):
        with pytest.raises(data.RecordError, match="record 'a': 'solutions' lacks ruby;"):
            data.Mixture(
                records=[GOOD], tokenizer=tokenizer, sft=("python", "ruby"), everything=("python", "ruby"), **changes
            )
    source = data.Mixture("source", [GOOD], tokenizer, ("python", "ruby"), ("python", "ruby"))
    for share in ({"general": 30}, {"general": -1}, {"statements": 2}):
        with pytest.raises(ValueError, match="shares are between 0 and 1"):
            replace(source, **share)


def programs(tokenizer, e):
    return re.findall(r"```(\w+)\n(.*?)\n```", tokenizer.decode(e.tokens[e.start :]), re.DOTALL)


def test_multi_shows_each_problem_once_and_parallel_in_all(corpus, records, tokenizer):
    roles, count = data.read_roles(corpus), len(records["train"])
    multi = mixture(corpus, records, tokenizer, "multi")
    shown = defaultdict(set)
    for i in range(3 * count):
        shown[data.pick("0 sft", i, count)].add(multi[i].languages)
    assert {len(v) for v in shown.values()} == {1} and len(shown) == count
    parallel = mixture(corpus, records, tokenizer, "parallel")
    seen = Counter(programs(tokenizer, parallel[i])[0] for i in range(count * len(roles.sft)))
    assert seen == Counter((p, r["solutions"][p].strip()) for r in records["train"] for p in roles.sft)
    together = mixture(corpus, records, tokenizer, "parallel", in_context=True)[5]
    assert sorted(p for p, _ in programs(tokenizer, together)) == sorted(roles.sft)


def test_parallel_keeps_a_problems_languages_together_through_replay(corpus, records, tokenizer):
    """Of the first 300 examples, all but the last problem are shown in all SFT PLs."""
    roles = data.read_roles(corpus)
    m = mixture(corpus, records, tokenizer, "parallel", general=0.3)
    shown = defaultdict(set)
    for e in (m[i] for i in range(300)):
        if e.kind == "parallel":
            shown[tokenizer.decode(e.tokens[: e.start]).rsplit("Answer in", 1)[0]].add(e.languages)
    assert len(shown) > 60 and sum(len(v) != len(roles.sft) for v in shown.values()) <= 1


def test_tests_tell_a_problem_from_its_neighbours(records):
    """A step left out, two swapped or another number must fail a test, in nearly all problems."""
    fooled = 0
    for r in records["rl"]:
        lines, kind = (
            [t["stdin"] for t in r["tests"]],
            "ints" if "int" in r["solutions"]["python"].splitlines()[0] else "words",
        )
        near = r["solutions"]["python"].splitlines()
        for i in range(1, len(near) - 1):  # leave out a line of the program
            program = "\n".join(near[:i] + near[i + 1 :])
            if near[i].startswith((" ", "for ")) or (kind == "words" and near[i].startswith("a =")):
                continue
            with contextlib.suppress(NameError, ValueError):
                fooled += all(
                    run_python(program, line) == t["stdout"] for line, t in zip(lines, r["tests"], strict=True)
                )
    assert fooled <= 0.01 * len(records["rl"])


def test_base_shows_all_languages_mostly_without_statement(corpus, records, tokenizer):
    examples = [mixture(corpus, records, tokenizer, "base")[i] for i in range(600)]
    assert {p for e in examples for p in e.languages} == set(data.read_roles(corpus).everything)
    stated = sum(tokenizer.start in e.tokens for e in examples) / 600
    assert 0.38 < stated < 0.5
    assert all(e.start == 1 and e.tokens[0] == tokenizer.bos for e in examples)


def test_examples_depend_on_seed_and_number_alone(corpus, records, tokenizer):
    a, b = (mixture(corpus, records, tokenizer, "parallel", general=0.3) for _ in range(2))
    forward = [a[i] for i in range(40)]
    assert [b[i] for i in reversed(range(40))] == forward[::-1]
    other = mixture(corpus, records, tokenizer, "parallel", general=0.3, seed=1)
    assert [other[i] for i in range(40)] != forward


# --------------------------------------------------------------------------------------------------
# Tokenizer and prompt

TEMPLATE = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""


def test_prompt_is_llama3s_chat_format(corpus, tokenizer, records):
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(corpus / "tokenizer.json"), bos_token="<|begin_of_text|>")
    record = records["train"][0]
    messages = [{"role": "user", "content": data.ask(record["prompt"], ["python"])}]
    ids = theirs.apply_chat_template(messages, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False)
    assert tokenizer.prompt(record["prompt"], ["python"]) == ids
    messages.append({"role": "assistant", "content": data.answer(record["solutions"], ["python"])})
    ids = theirs.apply_chat_template(messages, chat_template=TEMPLATE, return_dict=False)
    e = data.example(tokenizer, record, ["python"], "source")
    assert e.tokens == ids and e.tokens[e.start - 1 :][0] != tokenizer.eot and e.tokens[-1] == tokenizer.eot


@pytest.mark.parametrize("format", data.FORMATS)
def test_transformers_writes_the_same_prompt_from_a_saved_folder(corpus, records, tmp_path, format):
    data.Tokenizer(corpus, format).save(tmp_path)
    ours, theirs, record = data.Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path), records["train"][0]
    messages = [{"role": "user", "content": data.ask(record["prompt"], ["python"])}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.format == format and ours.prompt(record["prompt"], ["python"]) == ids
    messages.append({"role": "assistant", "content": data.answer(record["solutions"], ["python"])})
    assert data.example(ours, record, ["python"], "x").tokens == theirs.apply_chat_template(messages, return_dict=False)
    assert theirs.eos_token_id == ours.stop and theirs.pad_token_id == ours.pad != ours.stop
    assert {ours.format, data.Tokenizer(tmp_path, "chat").format} == {format, "chat"}


def test_special_tokens(tokenizer, records):
    assert len({tokenizer.bos, tokenizer.eos, tokenizer.eot, tokenizer.start, tokenizer.end, tokenizer.pad}) == 6
    text = "a <|eot_id|> inside a statement, ünïcödé and \ttabs\n"
    ids = tokenizer.encode(text)
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == text
    assert all(tokenizer.pad not in data.example(tokenizer, r, ["python"], "x").tokens for r in records["train"])


def test_a_tokenizer_without_llama3s_tokens_is_refused(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.py make"):
        data.Tokenizer(tmp_path)
    for name, text in {"tokenizer.json": "{bad", "tokenizer_config.json": "[]"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: "):
            data.Tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").unlink()
    plain = data.tokenizers.Tokenizer(data.tokenizers.models.BPE())
    plain.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"begin_of_text.*use a Llama-3 tokenizer"):
        data.Tokenizer(tmp_path)


CUT = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDED = {"strategy": {"Fixed": 80}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0}
FIRST = {"id": "<|begin_of_text|>", "ids": [0], "tokens": ["<|begin_of_text|>"]}
TWO = [{"SpecialToken": {"id": FIRST["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
NEW = {"content": "<new>", "special": False} | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
SPACED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def spoil(folder, corpus, changes):
    """Copies the corpus's tokenizer with changes by section: its own, `model`, `added` (a token), `special` (all), `config`."""
    data.Tokenizer(corpus).save(folder)
    raw, config = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    raw["added_tokens"] = [token | changes.get("special", {}) for token in raw["added_tokens"]]
    raw["added_tokens"] += [{"id": len(raw["model"]["vocab"])} | NEW | changes["added"]] if "added" in changes else []
    raw["model"] |= changes.get("model", {})
    raw |= {name: value for name, value in changes.items() if name in raw and name != "model"}
    raw["model"]["vocab"] |= changes.get("vocab", {})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes.get("config", {})))


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"truncation": CUT}, {"padding": PADDED | {"pad_token": "<|finetune_right_pad_id|>"}}, {"added": {}},
        {"added": {"single_word": True}}, {"added": {"normalized": True}}, {"special": {"normalized": True}},
        {"model": {"ignore_merges": True}}, {"model": {"byte_fallback": True}},
        {"post_processor": {"type": "TemplateProcessing", "single": TWO, "pair": TWO, "special_tokens": {FIRST["id"]: FIRST}}},
        {"config": {"truncation": True, "max_length": 8, "truncation_side": "left", "pad_to_multiple_of": 16, "padding": True}},
        {"config": {"add_prefix_space": True, "add_bos_token": True, "clean_up_tokenization_spaces": True}},
        {"config": {"added_tokens_decoder": {"0": NEW | {"content": FIRST["id"], "special": True}}}},
    ],
)  # fmt: skip
def test_what_a_tokenizers_file_carries_means_what_it_means_to_transformers(corpus, records, tmp_path, changes):
    spoil(tmp_path / "a", corpus, changes)
    ours = data.Tokenizer(tmp_path / "a")
    ours.save(tmp_path / "b")
    statement, text = f"{records['rl'][0]['prompt']} <new>x", " \n<new> x<new>y ünïcödé e\u0301 漢\x00\n" + 100 * "a "
    for folder in (tmp_path / "a", tmp_path / "b"):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False) and len(theirs) == ours.size
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text)) == text
        messages = [{"role": "user", "content": data.ask(statement, ["python"])}]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.prompt(statement, ["python"]) == ids
    saved, config = (json.loads((tmp_path / "b" / f"tokenizer{x}.json").read_text()) for x in ("", "_config"))
    assert saved["truncation"] is saved["padding"] is None
    assert not {"truncation", "max_length", "padding"} & config.keys()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"added": {"lstrip": True}}, "changes texts"), ({"added": {"rstrip": True}}, "changes texts"),
        *(({"normalizer": {"type": kind}}, "changes texts") for kind in ("NFC", "NFKC", "NFD", "Lowercase")),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, "changes texts"),
        ({"normalizer": {"type": "Prepend", "prepend": "_"}}, "changes texts"), ({"decoder": None}, "changes texts"),
        ({"pre_tokenizer": SPACED}, "changes texts"), ({"model": {"end_of_word_suffix": "</w>"}}, "changes texts"),
        ({"model": {"vocab": {name: i for i, name in enumerate(data.SPECIAL_TOKENS)}, "merges": []}}, "changes texts"),
        ({"model": {"vocab": {name: i for i, name in enumerate(data.SPECIAL_TOKENS)}, "merges": [], "unk_token": "<|end_of_text|>"}},
         "changes texts"),
        *(({"special": {name: True}}, "reads a text by what is around it") for name in ("lstrip", "rstrip", "single_word")),
        ({"model": {"dropout": 0.5}}, "by chance"), ({"special": {"special": False}}, "does not mark special tokens"),
        ({"vocab": {"zzzz": 5}}, "has ids without a token"), ({"vocab": {"zzzz": 5000}}, "has ids without a token"),
        ({"config": {"added_tokens_decoder": {"5000": NEW}}}, "added_tokens_decoder: .*as 5000"),
        ({"config": {"added_tokens_decoder": {"0": {"content": "<|begin_of_text|>", "rstrip": True}}}}, "added_tokens_decoder: .*as 0"),
        ({"config": {"added_tokens_decoder": [3]}}, r"tokenizer_config\.json: "), ({"config": {"prompt_format": [3]}}, "prompt format"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_would_be_read_otherwise_is_refused(corpus, tmp_path, changes, message):
    spoil(tmp_path, corpus, changes)
    with pytest.raises(ValueError, match=message):
        data.Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "response, program",
    [
        ("```python\nx\n```", "x\n"),
        ("so:\n```py\nfirst\n```\nor\n```Python\nlast\n```\n", "last\n"),
        ("```python\r\nx\r\n```\r\n", "x\n"),
        ("```python\nx\n", None),  # not closed
        ("```ruby\nx\n```", None),  # another PL
        ("```\nx\n```", None),  # no PL
        ("```python title=a\nx\n```", None),  # more than the PL
        ("```\nsay:\n```python\nx\n```", None),  # inside another block, which its end closes
        (" ```python\nx\n ```", None),  # not at the beginning of a line
        ("```python\nprint('```')\n```", "print('```')\n"),  # a fence is a line of its own
        ("```python\nx\n```\n```ruby\ny\n```", "x\n"),
        ("```python\nx\n```\n```python\ny\n", "x\n"),  # the last that is closed
        ("````python\nx\n```\ny\n`````\n", "x\n```\ny\n"),  # its end is at least as long as its beginning
        ("````\n```python\nx\n```\n````", None),
        ("```python\nx\r\n```", "x\r\n"),
        ("print(1)", None),
    ],
)
def test_extract(response, program):
    assert data.extract(response, "python") == program


# Programs that hold what ends a block: Markdown in a text, a heredoc, each in the one way that it runs.
FENCED = [
    'print("""\n```\ncode\n```\n""")\n', "cat <<'```'\n1\n```\n", "cat <<E\n```\nE\ncat <<E\n`````bash \nE\n",
    "```\n", "x = 1\n```python\ny = 2\n```", "\n\n  x\n\n\n", "a\r\nb\r\n", "```\r\nx\r\n", "echo `ls`\n", "```\f\nx\n```\x0b\n",
]  # fmt: skip


def test_a_program_is_read_back_whatever_it_holds(tokenizer):
    rng = random.Random(0)
    pieces = ["`", "```", "\n", "\r\n", "\r", " ", "\t", "python", "bash", "x", "\f", "\u2028", "<|eot_id|>"]
    drawn = ["".join(rng.choices(pieces, k=rng.randint(1, 14))) for _ in range(500)]
    for program in FENCED + [p for p in drawn if p.strip()]:
        whole = program if program.endswith("\n") else program + "\n"
        text = data.answer({"python": "```\n", "bash": program}, ["python", "bash", "python"])
        assert data.extract(tokenizer.decode(tokenizer.encode(text)), "bash") == whole
        assert data.extract(text, "python") == "```\n"


@pytest.mark.parametrize("text", ["```a\n", "```python\n", "```\n", "`", "x\n", " ", "```python\nx\n```\n"])
def test_the_work_of_extract_grows_with_the_length(text):
    """Lines of Python run, each of which reads a line of the response at most once: a search hidden in one shows none."""

    def work(response):
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            count += 1
            return trace

        sys.settrace(trace)
        try:
            data.extract(response, "python")
        finally:
            sys.settrace(None)
        return count

    once, twice = work(1000 * text), work(2000 * text)
    assert 2000 * text.count("\n") <= twice <= 2 * once


# --------------------------------------------------------------------------------------------------
# Files and flags


@pytest.mark.parametrize(
    "flags, message",
    [
        ("make --train 1 --rl 1 --eval 1 --out {0}/r.jsonl", "error: .*r.jsonl"),
        ("verify --data {0}/r.jsonl/x", "error: .*r.jsonl/x"), ("verify --data {0}/r.jsonl --languages lua", "nothing to run"),
        ("verify --limit -1", "--limit must be at least 0"), ("make --held-out 1.5", "--held-out must be at most 1"),
        ("make --new-share nan", "--new-share must be at "), ("make --reworded", "--reworded: name an operation"),
        ("show --help", ""), ("make --out {0}/own", "own/rl.jsonl: records of your own"),
    ],
)  # fmt: skip
def test_a_users_mistake_ends_in_one_line(tmp_path, capsys, flags, message):
    data.write_records(tmp_path / "r.jsonl", [GOOD])
    data.write_records(tmp_path / "own/rl.jsonl", [GOOD])
    with pytest.raises(SystemExit) as stop:
        data.main(flags.format(tmp_path).split())
    assert re.search(message, f"{stop.value.code}{capsys.readouterr().err}") and bool(stop.value.code) == bool(message)


def test_two_forms_of_one_split_are_refused(tmp_path):
    for name in ("rl.jsonl", "rl.jsonl.gz"):
        data.write_records(tmp_path / name, [GOOD])
    with pytest.raises(data.RecordError, match=r"rl\.jsonl: rl\.jsonl\.gz is there as well"):
        data.read_split(tmp_path, "rl")


@pytest.mark.parametrize(
    "stage, flag",
    [
        (sft, "--lr -1"), (sft, "--warmup 2"), (sft, "--general 30"), (sft, "--problems -1"), (rl, "--lr -1"),
        (rl, "--eps-low 2"), (rl, "--time-limit 0"), (rl, "--workers -1"), (evaluation, "--temperature -1"),
        (evaluation, "--time-limit nan"), (evaluation, "--samples -1"),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(capsys, stage, flag):
    with pytest.raises(SystemExit):
        data.parse_flags(stage.Settings, "", flag.split())
    assert f"{flag.split()[0]} must be at " in capsys.readouterr().err


GOOD = {
    "id": "a",
    "prompt": "p",
    "tests": [{"stdin": "", "stdout": "1"}],
    "solutions": {"python": "print(1)"},
    "extra": 3,
}


@pytest.mark.parametrize(
    "change, field",
    [
        ({"id": 3}, "id"), ({"prompt": ""}, "prompt"), ({"tests": []}, "tests"),
        ({"tests": [{"stdin": ""}]}, r"tests\[0\]"), ({"solutions": {"klingon": "x"}}, "solutions.klingon"),
        ({"prompt": "p\ud800"}, "prompt"), ({"tests": [{"stdin": "\udfff", "stdout": ""}]}, r"tests\[0\]"),
        ({"solutions": None}, "solutions"), ({"commented": None}, "commented"), ({"commented": {"python": 3}}, "commented.python"),
        ({"solutions": {"python": " "}}, "solutions.python"), ({"id": "first"}, "id"), ({"difficulty": "hard"}, "difficulty"),
        *(({"tests": [GOOD["tests"][0] | {"args": args}]}, r"tests\[0\].args") for args in (None, "a", [1], ["a\0"], ["\ud800"])),
        *(({"difficulty": {"level": level}}, "difficulty") for level in (None, [], {})), ({"difficulty": {"new": "no"}}, "difficulty.new"),
        ({"tests": [{"stdin": 3, "stdout": ""}]}, r"tests\[0\]"), ({"function": ["f"]}, "function"), ({"function": None}, "function"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named(tmp_path, change, field):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(GOOD | {"id": "first"}) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(data.RecordError, match=rf"r\.jsonl:2: field '{field}': .+"):
        data.read_records(path)
    for line in ("{not json}", '{"x": ' + 5000 * "1" + "}", 200_000 * "["):
        path.write_text(json.dumps(GOOD) + f"\n{line}\n")
        with pytest.raises(data.RecordError, match=r"r\.jsonl:2: not JSON"):
            data.read_records(path)


def test_a_damaged_file_is_named(tmp_path):
    whole = gzip.compress(json.dumps(GOOD).encode())
    (tmp_path / "r.jsonl.gz").write_bytes(whole[:-9])
    (tmp_path / "flipped.jsonl.gz").write_bytes(whole[:12] + bytes(x ^ 255 for x in whole[12:]))
    (tmp_path / "r.jsonl").write_bytes(b"\xff\xfe")
    for name in ("r.jsonl.gz", "flipped.jsonl.gz", "r.jsonl"):
        with pytest.raises(data.RecordError, match=f"{name}: not whole gzip or not UTF-8"):
            data.read_records(tmp_path / name)


def test_records_round_trip_with_extra_fields_plain_and_gzipped(tmp_path):
    for name in ("r.jsonl", "r.jsonl.gz"):
        data.write_records(tmp_path / name, [GOOD])
        assert data.read_records(tmp_path / name) == [GOOD]
    assert gzip.decompress((tmp_path / "r.jsonl.gz").read_bytes()) == (tmp_path / "r.jsonl").read_bytes()


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def write(p):
        p.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_show_prints_the_problem_and_every_program(corpus, records, tmp_path, capsys):
    record = records["rl"][3]
    data.main(["show", record["id"], "--data", str(corpus)])
    out = capsys.readouterr().out
    assert record["prompt"] in out
    for language, program in record["solutions"].items():
        assert f"[{language}]" in out
        assert all(line.expandtabs(4) in out for line in program.splitlines())
    assert data.read_split(corpus, "rl") == records["rl"]
    for name in (".eval.jsonl.gz.tmp", ".a.jsonl", "b.jsonl.old"):
        (tmp_path / name).write_text("{")
    with pytest.raises(SystemExit, match="no record"):
        data.main(["show", "nothing", "--data", str(tmp_path)])


def test_verify_counts_failures_per_language(tmp_path, capsys):
    wrong = GOOD | {"id": "b", "solutions": {"perl": "print 1"}, "commented": {"python": "print(2)"}}
    data.write_records(tmp_path / "r.jsonl", [GOOD, wrong])
    with pytest.raises(SystemExit) as stop:
        data.main(["verify", "--data", str(tmp_path / "r.jsonl"), "--languages", "python", "perl"])
    out = capsys.readouterr().out
    assert stop.value.code == 1
    assert re.search(r"python +1 of 2 programs pass", out) and re.search(r"perl +1 of 1", out)
    assert "b in python: wrong_answer\nprint(2)" in out
