"""The corpus: every program agrees with the interpreter, nothing held out leaks, and what sets the arms apart."""

import contextlib
import gzip
import itertools
import json
import os
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from conftest import SIZES
from transformers import AutoTokenizer

import data
import eval as evaluation
import rl
import sandbox
import sft

SMALL = data.CorpusSettings(**SIZES)


@pytest.fixture(scope="session")
def records(corpus):
    return {name: data.read_records(corpus / f"{name}.jsonl.gz") for name in data.SPLITS}


def printed(program: str, lines: Sequence[str]) -> list[str | None]:
    """What a python program of the corpus prints for each line, run in this process; None for the maximum of nothing."""
    code, texts = compile(program, "", "exec"), []
    for line in lines:
        show = lambda *words: texts.append(" ".join(map(str, words)) + "\n")  # noqa: E731
        try:
            exec(code, {"input": lambda line=line: line, "print": show})
        except ValueError:
            texts.append(None)
    return texts


# --------------------------------------------------------------------------------------------------
# Programs and their tests


@pytest.fixture(scope="session")
def problems():
    """As few of four or five operations as hold each operation twice; SANDBOX_FULL=1: 200, and five times."""
    least, enough = (200, 5) if os.environ.get("SANDBOX_FULL") else (0, 2)
    rng, corpus, used, made = random.Random(7), data.Corpus(replace(SMALL, tests=2)), Counter(), []
    while (short := [name for name in data.OPERATIONS if used[name] < enough]) or len(made) < least:
        functions = [data.random_function(rng, rng.randint(4, 5), short[0] if short else "") for _ in range(5)]
        function = max(functions, key=lambda f: len({name for name, _ in f[1]} & set(short)))
        made.append(corpus.problem("p", function, tuple(data.SNIPPETS), rng))
        if len(made) % 2:  # every other with comments
            comments = data.wordings(function, "others")
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


def test_a_function_that_must_hold_an_operation_does():
    rng = random.Random(0)
    for name in data.OPERATIONS:
        assert name in [step for step, _ in data.random_function(rng, 2, name)[1]]


def test_most_programs_are_short(records, tokenizer):
    lengths = [len(tokenizer.encode(p)) for r in records["train"] for p in r["solutions"].values()]
    assert sum(n < 120 for n in lengths) / len(lengths) > 0.75


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    small = replace(SMALL, base=20, train=10, rl=10, held_out=5, reserved=5)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        data.make(replace(small, out=str(tmp_path / name), seed=seed))
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name
        same = (tmp_path / "c" / path.name).read_bytes() == path.read_bytes()
        assert same == (path.name in ("languages.json", "tokenizer_config.json")), path.name


def test_a_corpus_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    s = replace(SMALL, out=str(tmp_path), base=3, train=3, rl=3, held_out=3, reserved=3, weak=3)
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
# Splits: functions are judged by what python programs print on fresh inputs, not by the corpus's own hashes

LINES = {kind: [data.random_line(kind, random.Random(f"fresh {i}")) for i in range(200)] for kind in ("ints", "words")}


def behaviour(program: str) -> tuple:
    """The type of the input of a python program of the corpus, and what it prints for each of many fresh lines."""
    kind = "ints" if "int" in program.splitlines()[0] else "words"
    return kind, *printed(program, LINES[kind])


@pytest.fixture(scope="session")
def aligned(records):
    """Base with each function in all PLs, and otherwise the same: id -> record."""
    documents = data.Corpus(replace(SMALL, base_programs="all")).documents()
    return {r["id"]: r for r in documents}


@pytest.fixture(scope="session")
def functions(records, aligned):
    """Split -> function, as what its python program prints -> ids of its records."""
    seen, known = defaultdict(lambda: defaultdict(list)), {}
    for split, own in records.items():
        for record in own:
            if record["id"].startswith("rare"):  # in one PL alone, which need not be python
                continue
            program = (aligned[record["id"]] if split == "base" else record)["solutions"]["python"]
            known[program] = known[program] if program in known else behaviour(program)
            seen[split][known[program]].append(record["id"])
    return seen


def test_held_out_functions_occur_in_no_other_split_and_base_shares_none_with_sft(functions):
    splits = {name: set(own) for name, own in functions.items()}
    assert all(len(own) >= 30 for own in splits.values())
    for a, b in itertools.combinations(data.SPLITS, 2):
        assert bool(splits[a] & splits[b]) == ((a, b) == ("train", "rl")), (a, b)


def test_base_shows_a_function_in_one_pl_or_in_all(records, aligned, functions):
    ours = {r["id"]: r for r in records["base"]}
    assert {i for i in ours if not i.startswith("rare")} == aligned.keys()
    assert len(functions["base"]) < len(ours)  # some are shown more than once
    everything = SMALL.sft + SMALL.unseen
    for ids in functions["base"].values():
        assert len({p for i in ids for p in ours[i]["solutions"]}) == 1
        for i in ids:
            assert set(aligned[i]["solutions"]) == (set(everything) if i.startswith("base") else {"python"})
            assert ours[i]["solutions"].items() <= aligned[i]["solutions"].items()


def test_shares_are_those_of_the_design(records):
    """Of the source PL in base, twice any other's, and of functions of two operations; to three standard errors."""
    base = [r for r in records["base"] if r["id"].startswith("base")]
    counts = Counter(p for r in base for p in r["solutions"])
    for language in SMALL.sft + SMALL.unseen:
        assert abs(counts[language] / len(base) - (2 if language == "python" else 1) / 6) < 0.06
    held_out = [r for r in records["dev"] + records["test"] if r["kind"] == "own words"]
    for own, share in ((base, 0.4), (records["train"], 0.4), (records["rl"], 0.7), (held_out, 0.7)):
        assert abs(sum(len(r["operations"]) == 2 for r in own) / len(own) - share) < 1.5 / len(own) ** 0.5


def test_base_shows_each_operation_in_each_pl():
    """With as few PLs as make it quick; of more documents than these, as many more PLs."""
    documents = data.Corpus(data.CorpusSettings(sft=("python",), unseen=("lua",), base=1500, weak=0)).documents()
    shown = {(p, name) for r in documents for p in r["solutions"] for name in r["operations"]}
    assert shown == set(itertools.product(("python", "lua"), data.OPERATIONS))


def test_distractors_are_other_functions_in_every_pl(records):
    """And those alone: of problems with a reserved wording."""
    for record in records["rl"] + records["dev"] + records["test"]:
        wrong = record.get("distractors", {})
        assert bool(wrong) == ("phrase" in record)
        assert {p: len(programs) for p, programs in wrong.items()} == dict.fromkeys(wrong, len(wrong.get("python", "")))
        right = behaviour(record["solutions"]["python"])
        assert all(behaviour(program) != right for program in wrong.get("python", ()))
        if wrong:
            assert set(wrong) == set(SMALL.sft + SMALL.unseen)
    assert max(len(r["distractors"]["python"]) for r in records["rl"]) == 5
    alike = data.distractors(("ints", (("reverse", None), ("rsort", None))), data.Reserved("reverse", 0))
    assert {steps[0][0] for _, steps in alike} == {"take", "drop"}  # not sort, of which no more is seen


def test_tests_tell_a_problem_from_its_neighbours(records):
    """A line of the program left out must fail a test, in nearly all problems."""
    fooled = 0
    for r in records["rl"]:
        near = r["solutions"]["python"].splitlines()
        for i in range(1, len(near) - 1):
            program = "\n".join(near[:i] + near[i + 1 :])
            if near[i].startswith((" ", "for ")) or (near[0].startswith("w") and near[i].startswith("a =")):
                continue
            with contextlib.suppress(NameError):
                fooled += printed(program, [t["stdin"] for t in r["tests"]]) == [t["stdout"] for t in r["tests"]]
    assert fooled <= 0.01 * len(records["rl"])


# --------------------------------------------------------------------------------------------------
# Wordings


WORDINGS = [  # each wording, whose it is, its operation and number
    (words, (whose, op.name, i))
    for op in data.OPERATIONS.values()
    for whose, own in (("source", [op.source]), ("others", [op.others]), ("reserved", op.reserved))
    for i, words in enumerate(own)
]
PATTERNS = {re.compile(re.escape(words).replace(r"\{k\}", r"\w+")): about for words, about in WORDINGS}


def steps_of(text: str) -> list[tuple[str, str, int]]:
    """(whose wording, operation, number) of each step that a statement, or a single phrase, names."""
    for opener in itertools.chain(*data.OPENERS.values()):
        text = text.removeprefix(opener + " ")
    for closer in data.CLOSERS:
        text = text.removesuffix(closer)
    steps = re.split("|".join(data.JOINERS), text[0].lower() + text[1:])
    found = [[about for pattern, about in PATTERNS.items() if pattern.fullmatch(step)] for step in steps]
    assert all(len(own) == 1 for own in found), (text, found)  # no wording is another's
    return [own[0] for own in found]


def words_of(text: str) -> set[str]:
    return {whose for whose, _, _ in steps_of(text)}


def comments(record: dict, language: str) -> list[str]:
    """The comments of a record's program, each a phrase."""
    mark = (data.COMMON | data.SNIPPETS[language])["comment"] + " "
    lines = map(str.strip, record["commented"][language].splitlines())
    return [line.removeprefix(mark) for line in lines if line.startswith(mark)]


COMMUNITY = {"python": "source", "javascript": "others", "ruby": "others", "perl": "others", "lua": "others"}


def test_every_wording_is_of_one_community_alone():
    for words, about in WORDINGS:
        for k in data.OPERATIONS[about[1]].params:
            assert steps_of(words.format(k=k)) == [about]


def test_base_is_worded_as_each_pls_community_words_it(records):
    weak = [r for r in records["base"] if r["id"].startswith("weak")]
    for record in records["base"]:
        reserved = {"reserved"} if record in weak else set()
        for language in record["solutions"]:
            own, beside = data.statement(record, language), comments(record, language)
            assert words_of(own) - {COMMUNITY[language]} == reserved
            steps = steps_of(own)
            assert [name for _, name, _ in steps] == record["operations"]
            assert [steps_of(phrase) for phrase in beside] == [[step] for step in steps]
    assert len(weak) == SMALL.weak and all(list(r["solutions"]) == ["python"] for r in weak)


def test_borrowed_documents_are_in_the_other_communitys_words():
    for share, mine in ((1.0, 0), (0.5, 0.5)):
        documents = data.Corpus(replace(SMALL, base=200, weak=0, borrowed=share)).documents()
        own = 0
        for record in documents:
            for language in record["solutions"]:
                words = words_of(data.statement(record, language))
                own += words == {COMMUNITY[language]}
                assert len(words) == 1 and set.union(*map(words_of, comments(record, language))) == words
        assert abs(own / len(documents) - mine) < 0.11  # three standard errors of 0.035


def test_sft_is_worded_without_reserved_wordings_and_others_as_everyone_else(records):
    for record in records["train"]:
        assert words_of(record["prompt"]) == {"source"} and "commented" not in record
        assert set(record["prompts"]) == set(COMMUNITY) - {"python"}
        assert all(words_of(text) == {"others"} for text in record["prompts"].values())
        for p in COMMUNITY:
            assert [name for _, name, _ in steps_of(data.statement(record, p))] == record["operations"]


def test_problems_of_rl_and_the_reserved_kind_have_one_reserved_phrase_each_and_all_about_equally_often(records):
    everyone = {f"{name} {i + 1}" for name in data.REWORDED for i in range(len(data.OPERATIONS[name].reserved))}
    for split in ("rl", "dev", "test"):
        own = [r for r in records[split] if r["kind"] == "reserved words"]
        counts = Counter(r["phrase"] for r in own)
        assert len(own) == (SMALL.rl if split == "rl" else SMALL.reserved)
        assert set(counts) == everyone and max(counts.values()) - min(counts.values()) <= 1
        for record, language in itertools.product(own, COMMUNITY):
            steps = steps_of(data.statement(record, language))
            assert [f"{name} {i + 1}" for whose, name, i in steps if whose == "reserved"] == [record["phrase"]]
            assert {whose for whose, _, _ in steps} <= {"reserved", COMMUNITY[language]}


def test_the_other_held_out_problems_are_asked_in_own_words_and_in_the_sources(records):
    for split in ("dev", "test"):
        by_kind = defaultdict(list)
        for record in records[split]:
            by_kind[record["kind"]].append(record)
        counts = {"own words": SMALL.held_out, "the source's words": SMALL.held_out, "reserved words": SMALL.reserved}
        assert {kind: len(own) for kind, own in by_kind.items()} == counts
        for own, source in zip(by_kind["own words"], by_kind["the source's words"], strict=True):
            assert all(own[name] == source[name] for name in ("tests", "solutions", "function"))
            for language, community in COMMUNITY.items():
                assert words_of(data.statement(own, language)) == {community}
                assert data.statement(source, language) == data.statement(own, "python")
        assert len({r["function"] for r in by_kind["own words"]}) == SMALL.held_out


# --------------------------------------------------------------------------------------------------
# Roles


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


def test_the_flags_name_the_roles_whatever_is_installed(monkeypatch):
    monkeypatch.setattr(sandbox, "installed", dict)
    roles = data.corpus_roles(data.CorpusSettings())
    assert roles.source == "python" and not set(roles.sft) & set(roles.unseen)
    named = data.corpus_roles(data.CorpusSettings(sft=("rb", "py"), unseen=("pl",)))
    assert named == data.Roles(("ruby", "python"), ("perl",)) and named.source == "ruby"
    for mistake, message in [
        ({"unseen": ("python",)}, "python: named twice"),
        ({"unseen": ("sql",)}, "sql: the embedded corpus has no programs in it; there are python, "),
    ]:
        with pytest.raises(ValueError, match=message):
            data.corpus_roles(data.CorpusSettings(**mistake))


def test_another_source_pl_has_the_sources_words():
    made = data.Corpus(replace(SMALL, sft=("ruby", "python"), unseen=("lua",))).problems("train", 5)
    for record in made:
        assert set(record["prompts"]) == {"python", "lua"}
        words = {p: words_of(data.statement(record, p)) for p in record["solutions"]}
        assert words == {"ruby": {"source"}, "python": {"others"}, "lua": {"others"}}


# --------------------------------------------------------------------------------------------------
# Mixtures

ARMS = ("source", "multi", "crossed", "parallel")


def mixture(records, tokenizer, name, **settings):
    return data.Mixture(name, records["train"], records["base"], tokenizer, SMALL.sft, **settings)


def block_of(tokenizer, e):
    """(PL, program) of the one fenced block of an example."""
    [block] = re.findall(r"```(\w+)\n(.*?)\n```", tokenizer.decode(e.tokens[e.first :]), re.DOTALL)
    return block


def asked(tokenizer, e):
    """The statement of an example."""
    text = tokenizer.decode(e.tokens)
    return text[text.index("\n\n") + 2 : text.rindex("\nAnswer in")]


@dataclass(frozen=True)
class Shown:
    """What one example of an arm shows: its function, PL and statement; `replayed`: a base document."""

    replayed: bool
    function: str
    language: str
    statement: str
    tokens: int


@pytest.fixture(scope="session")
def runs(records, tokenizer):
    """What each arm shows in updates of 600 tokens until parallel has shown each of 40 problems in all PLs."""
    some = {"train": records["train"][:40], "base": records["base"]}
    function_of = {}
    for record in some["train"] + some["base"]:
        for kind in ("solutions", "commented"):
            for language, program in record.get(kind, {}).items():
                assert function_of.setdefault((language, program.strip()), record["function"]) == record["function"]
    shown = {}
    for arm in ARMS:
        m, run = mixture(some, tokenizer, arm, replay=0.3), SimpleNamespace(step=0, tokens=0, drawn=0)
        shown[arm] = []
        while run.step < 30:
            rows = sft.next_rows(m, run, SimpleNamespace(batch=600))
            run.step, run.drawn = run.step + 1, run.drawn + len(rows)
            run.tokens += sum(len(tokens) for tokens, _ in rows)
            update = []
            for tokens, start in rows:
                block = block_of(tokenizer, data.Example(tokens, start))
                text = "" if start == 1 else asked(tokenizer, data.Example(tokens, start))
                update.append(Shown(start == 1, function_of[block], block[0], text, len(tokens)))
            shown[arm].append(update)
    return some, shown


def own(updates):
    """The examples of an arm that are not replayed, in order."""
    return [e for e in itertools.chain(*updates) if not e.replayed]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_gets_the_same_functions_updates_tokens_and_replay(runs, arm):
    some, shown = runs
    assert {e.function for e in own(shown[arm])} == {r["function"] for r in some["train"]}
    seen = 0
    for number, update in enumerate(shown[arm], 1):  # as many tokens by each update as in every other arm
        seen += sum(e.tokens for e in update)
        assert number * 600 <= seen < number * 600 + max(e.tokens for e in update)
    examples = list(itertools.chain(*shown[arm]))
    replayed = [e for e in examples if e.replayed]
    assert len(replayed) == int(len(examples) * 0.3)  # so at any point, since this holds for runs of any length
    parallel = [e for e in itertools.chain(*shown["parallel"]) if e.replayed]
    for a, b in zip(replayed, parallel, strict=False):
        assert a == b  # to the token


def test_the_arms_differ_in_pls_and_wordings_alone(runs):
    _, shown = runs
    homes = {arm: defaultdict(set) for arm in ARMS}
    words = {arm: defaultdict(set) for arm in ARMS}  # by PL
    for arm in ARMS:
        for e in own(shown[arm]):
            homes[arm][e.function].add(e.language)
            words[arm][e.language].add(frozenset(words_of(e.statement)))
    both = {frozenset({"source"}), frozenset({"others"})}
    assert set(homes["source"]) and all(pls == {"python"} for pls in homes["source"].values())
    assert words["source"] == {"python": {frozenset({"source"})}}
    for arm in ("multi", "crossed"):  # no function in two PLs
        assert {len(pls) for pls in homes[arm].values()} == {1} and set.union(*homes[arm].values()) == set(SMALL.sft)
    assert homes["multi"] == homes["crossed"]
    assert words["multi"] == {p: {frozenset({COMMUNITY[p]})} for p in SMALL.sft}
    for arm in ("crossed", "parallel"):
        assert words[arm] == dict.fromkeys(SMALL.sft, both), arm
    assert all(pls == set(SMALL.sft) for pls in homes["parallel"].values())
    groups = [own(shown["parallel"])[i : i + 3] for i in range(0, len(own(shown["parallel"])) - 2, 3)]
    for group in groups:  # one function, one statement, each PL once, whatever is replayed in between
        assert len({(e.function, e.statement) for e in group}) == 1
        assert sorted(e.language for e in group) == sorted(SMALL.sft)
    assert len({tuple(e.language for e in group) for group in groups}) > 1  # their order varies


def test_records_without_communities_are_worded_alike_in_multi_and_crossed(records, tokenizer):
    foreign = [{k: r[k] for k in ("id", "prompt", "tests", "solutions")} for r in records["train"][:50]]
    multi, crossed, parallel = (
        mixture(records | {"train": foreign}, tokenizer, arm, replay=0.2) for arm in ("multi", "crossed", "parallel")
    )
    examples = [(multi[i], crossed[i]) for i in range(120)]
    assert all(a == b for a, b in examples if a.first > 1) and {b.first > 1 for _, b in examples} == {True, False}
    texts = {asked(tokenizer, e) for i in range(150) if (e := parallel[i]).first > 1}
    assert texts <= {r["prompt"] for r in foreign} and len(texts) > 30


def test_only_replay_shows_unseen_pls(runs):
    _, shown = runs
    for arm in ARMS:
        assert {e.language for e in own(shown[arm])} <= set(SMALL.sft)
        assert {e.language for e in itertools.chain(*shown[arm]) if e.replayed} >= set(SMALL.unseen)


PARTLY = {"a": "ruby python javascript", "b": "python ruby", "c": "ruby", "d": "lua", "e": "javascript lua ruby"}
PARTLY["f"] = ""


def partly(**more):
    """Records in some PLs each; a statement names record and PL, as does a program."""
    for name, pls in PARTLY.items():
        solutions, prompts = ({p: f"{name} {what} {p}" for p in pls.split()} for what in ("program", "states"))
        yield {"id": name, "prompt": name, "solutions": solutions, "prompts": prompts, **more}


@pytest.mark.parametrize(
    "arm, shown",  # what a pass shows: PLs of each example, by record
    [
        ("source", {"a": ["python"], "b": ["python"]}),
        ("parallel", {"a": ["javascript", "python", "ruby"], "b": ["python", "ruby"], "e": ["javascript", "ruby"]}),
        ("multi", {"a": 1, "b": 1, "c": 1, "e": 1}),
        ("crossed", {"a": 1, "b": 1, "c": 1, "e": 1}),
    ],
)  # fmt: skip
def test_records_that_lack_pls_are_shown_in_those_that_they_have(tokenizer, capsys, arm, shown):
    m = data.Mixture(arm, list(partly(harness={})), [], tokenizer, SMALL.sft)
    m, first = sft.choose_examples(m, 1024), next(name for name in PARTLY if name not in shown)
    said = f"left out: {6 - len(shown)} of 6 training problems, the first record {first!r}: too few programs in SFT PLs for {arm}; it has "
    assert capsys.readouterr().out == f"{said}{', '.join(PARTLY[first].split())}\n"
    size = sum(each if isinstance(each, int) else len(each) for each in shown.values())
    for start in range(0, 3 * size, size):
        found = []
        for e in (m[i] for i in range(start, start + size)):
            language, text = block_of(tokenizer, e)
            name = text.split()[0]
            assert (text, asked(tokenizer, e)) == (f"{name} program {language}", f"{name} states {language}")
            found.append((name, language))
        groups = [
            (name, sorted(language for _, language in own)) for name, own in itertools.groupby(found, lambda x: x[0])
        ]
        assert len(groups) == len(shown)  # the examples of a record follow on each other
        for name, own in groups:
            one = len(own) == 1 and own[0] in SMALL.sft and own[0] in PARTLY[name].split()
            assert one if shown[name] == 1 else own == shown[name]


def test_a_mixture_that_no_record_has_the_pls_for_is_refused(tokenizer):
    lone = [r for r in partly() if r["id"] in "cd"]
    lacking = "2 of 2 training problems, the first record 'c': too few programs in SFT PLs for"
    for arm, records, documents, what in [
        ("source", lone, [], f"{lacking} source; it has ruby"), ("parallel", lone, [], f"{lacking} parallel; it has ruby"),
        ("multi", lone, [GOOD | {"solutions": {}}], "1 of 1 base documents, the first record 'a': .*; it has none"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"too many to leave out: {what}; add programs"):
            sft.choose_examples(data.Mixture(arm, records, documents, tokenizer, SMALL.sft), 1024)


@pytest.mark.parametrize("arm, share", [("parallel", 0.25), ("base", 0.1), ("multi", 0.0), ("source", 1.0)])
def test_general_data_takes_its_share_and_moves_nothing_else(records, tokenizer, tmp_path, arm, share):
    """Chat of any kind: no PL is asked for, the answer and its stop token are trained."""
    lines = [{"prompt": f" Is {i} odd?", "answer": f"{'no yes'.split()[i % 2]}, {i}\n", "id": 3} for i in range(7)]
    data.write_records(tmp_path / "chat.jsonl.gz", lines)
    chat = data.read_records(tmp_path / "chat.jsonl.gz", general=True)
    plain = mixture(records, tokenizer, arm, replay=0.3)
    m, general = replace(plain, general=chat, general_share=share), []
    for i in range(60):
        e = m[i]
        if tokenizer.decode(e.tokens).endswith((*"0123456",)):
            general.append(tuple(e.tokens))
            text = re.sub(r"<\|.*?\|>", "", tokenizer.decode(e.tokens))
            assert re.fullmatch(r"user\n\nIs (\d) odd\?assistant\n\n(no|yes), \1", text)
            assert tokenizer.decode(e.tokens[e.first :]) in text and e.tokens[-1] == tokenizer.stop
        else:
            assert e == plain[i - len(general)]
        assert len(general) == int((i + 1) * share)
    assert all(len({*general[i : i + 7]}) == 7 for i in range(0, len(general) - 6, 7))  # each once in a pass


@pytest.mark.parametrize(
    "change, field", [({"prompt": ""}, "prompt"), ({"answer": None}, "answer"), ({"answer": "\ud800"}, "answer")]
)
def test_a_bad_line_of_general_data_is_named(tmp_path, change, field):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "answer": "a"} | c) + "\n" for c in ({}, change)))
    with pytest.raises(data.RecordError, match=rf"chat\.jsonl:2: field '{field}': give a text"):
        data.read_records(path, general=True)


def test_base_shows_every_document_in_a_pass_and_states_a_share_of_them(records, tokenizer):
    """Of 520 documents; the others have comments. The share's standard error is 0.02."""
    m, count = mixture(records, tokenizer, "base", statements=0.4, replay=0.3), len(records["base"])
    known = {
        (language, program.strip()): record["function"]
        for record in records["base"]
        for kind in ("solutions", "commented")
        for language, program in record[kind].items()
    }
    shown, stated = Counter(), 0
    for e in (m[i] for i in range(count)):
        assert e.first == 1 and e.tokens[0] == tokenizer.bos
        language, program = block_of(tokenizer, e)
        shown[language, known[language, program]] += 1
        lines, mark = map(str.strip, program.splitlines()), (data.COMMON | data.SNIPPETS[language])["comment"] + " "
        commented = any(line.startswith(mark) for line in lines)
        assert commented != (tokenizer.stop in e.tokens)
        assert e.tokens[-1] == (tokenizer.eos if commented else tokenizer.stop)
        stated += not commented
    assert shown == Counter((p, r["function"]) for r in records["base"] for p in r["solutions"])
    assert abs(stated / count - 0.4) < 0.065


def test_examples_depend_on_seed_and_number_alone(records, tokenizer):
    for arm in ARMS:
        a, b = (mixture(records, tokenizer, arm, replay=0.3) for _ in range(2))
        forward = [a[i] for i in range(30)]
        assert [b[i] for i in reversed(range(30))] == forward[::-1]
        other = mixture(records, tokenizer, arm, replay=0.3, seed=1)
        assert [other[i] for i in range(30)] != forward


# --------------------------------------------------------------------------------------------------
# Tokenizer and prompt


@pytest.mark.parametrize("format", ["chat", "llama3.1", "plain"])
def test_transformers_writes_the_same_prompt_from_a_saved_folder(corpus, records, tmp_path, format):
    data.Tokenizer(corpus, format).save(tmp_path)
    ours, theirs, record = data.Tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path), records["train"][0]
    messages = [{"role": "user", "content": data.ask(record["prompt"], "python")}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.format == format and ours.prompt(record["prompt"], "python") == ids
    messages.append({"role": "assistant", "content": data.answer(record["solutions"]["python"], "python")})
    e = data.example(ours, record, record["prompt"], "python")
    assert e.tokens == theirs.apply_chat_template(messages, return_dict=False)
    assert theirs.eos_token_id == ours.stop and theirs.pad_token_id == ours.pad != ours.stop
    assert {ours.format, data.Tokenizer(tmp_path, "chat").format} == {format, "chat"}


def test_special_tokens(tokenizer, records):
    parts = {p for p in tokenizer.parts if isinstance(p, int)}
    assert len({tokenizer.bos, tokenizer.eos, tokenizer.pad, *parts}) == 6 and tokenizer.stop in parts
    text = "a <|eot_id|> inside a statement, ünïcödé and \ttabs\n"
    ids = tokenizer.encode(text)
    assert tokenizer.stop not in ids and tokenizer.decode(ids) == text
    examples = (data.example(tokenizer, r, r["prompt"], "python") for r in records["train"])
    assert all(tokenizer.pad not in e.tokens for e in examples)


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
    with pytest.raises(ValueError, match=r"end_of_text.*use one of Llama 3's"):
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
        messages = [{"role": "user", "content": data.ask(statement, "python")}]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.prompt(statement, "python") == ids
        messages.append({"role": "assistant", "content": "```python\nx = 1\n\n\nprint(x)\n```"})
        record = {"solutions": {"python": "x = 1\n\n\nprint(x)"}}
        ids = theirs.apply_chat_template(messages, return_dict=False)
        assert data.example(ours, record, statement, "python").tokens == ids
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
        ({"config": {"split_special_tokens": True}}, "split_special_tokens"),
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
        text = "\n".join(
            data.answer(text, p) for text, p in [("```\n", "python"), (program, "bash"), ("```\n", "python")]
        )
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
        ("make --base 1 --train 1 --rl 1 --held-out 1 --reserved 1 --weak 1 --out {0}/r.jsonl", "error: .*r.jsonl"),
        ("verify --data {0}/r.jsonl/x", "error: .*r.jsonl/x"), ("verify --data {0}/r.jsonl --languages lua", "nothing to run"),
        ("verify --limit -1", "--limit must be at least 0"), ("make --borrowed 1.5", "--borrowed must be at most 1"),
        ("make --borrowed nan", "--borrowed must be at "), ("make --unseen sql", "sql: the embedded corpus has no programs in it"),
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
        (sft, "--lr -1"), (sft, "--clip -1"), (sft, "--warmup 2"), (sft, "--replay 30"), (sft, "--problems -1"), (rl, "--lr -1"), (rl, "--rounds 0"), (rl, "--kl -1"),
        (rl, "--eps-low 2"), (rl, "--time-limit 0"), (rl, "--workers -1"), (evaluation, "--temperature -1"),
        (evaluation, "--time-limit nan"), (evaluation, "--samples -1"),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(capsys, stage, flag):
    with pytest.raises(SystemExit):
        data.parse_flags(stage.Settings, "", flag.split())
    assert f"{flag.split()[0]} must be at " in capsys.readouterr().err


GOOD = {"id": "a", "prompt": "p", "extra": 3, "solutions": {"python": "print(1)"}}
GOOD["tests"] = [{"stdin": "", "stdout": "1"}]


@pytest.mark.parametrize(
    "change, field",
    [
        ({"id": 3}, "id"), ({"prompt": ""}, "prompt"), ({"tests": []}, "tests"),
        ({"tests": [{"stdin": ""}]}, r"tests\[0\]"), ({"solutions": {"klingon": "x"}}, "solutions.klingon"),
        ({"prompt": "p\ud800"}, "prompt"), ({"tests": [{"stdin": "\udfff", "stdout": ""}]}, r"tests\[0\]"),
        ({"solutions": None}, "solutions"), ({"commented": None}, "commented"), ({"commented": {"python": 3}}, "commented.python"),
        ({"solutions": {"python": " "}}, "solutions.python"), ({"id": "first"}, "id"),
        *(({"tests": [GOOD["tests"][0] | {"args": args}]}, r"tests\[0\].args") for args in (None, "a", [1], ["a\0"], ["\ud800"])),
        ({"tests": [{"stdin": 3, "stdout": ""}]}, r"tests\[0\]"), ({"harness": {"perl": "«answer»«word»"}}, "solutions.python"), ({"function": ["f"]}, "function"), ({"function": None}, "function"),
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
