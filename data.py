"""Problems, parallel programs, the tokenizer and the training mixtures.

    python data.py make             # write the embedded corpus and its tokenizer
    python data.py verify           # run every program of the corpus against its tests
    python data.py show train-17    # one problem with all its programs side by side
    python data.py import FORMAT FILE... --out DIR   # public problems and programs, as records
    python data.py split --data DIR --out DIR        # deals such records out to train, rl, dev and test

**Records.** One JSON object a line, in plain or gzipped JSONL:

    {"id": "train-17", "prompt": "Read integers. ...",
     "tests": [{"stdin": "3 1 2\\n", "stdout": "1 2 3\\n"}, ...],
     "solutions": {"python": "...", "cpp": "..."}}

A record whose `solutions` has several programming languages (PLs) is a *parallel program*: one
function, written once in each. `prompts` {PL: statement} may word it otherwise for some PLs. A test may have `args`, a list
of texts for the command line, and its `stdout` may be a list of accepted ones. A record may also say how its answers are run
and compared, by the fields of sandbox.Demands: `compare`, `tolerance`, `time_limit`, `memory_limit`, and `harness` for
problems that ask for a function. Extra fields are kept;
the embedded corpus adds `operations`, `function` (a hash of behaviour), `commented` (base's programs with comments),
`kind` for held-out and RL problems, `phrase` where a reserved wording is in it, and `distractors` (wrong programs a PL) beside that.

**The embedded corpus.** A function is a short pipeline of operations on a line of integers or
words. `OPERATIONS` says what each operation does, and expected outputs come from running that, so
the tests are independent of every program text. `SNIPPETS` says how each PL writes it: a PL is one
entry there. People who write in one PL also word their problems in their own way: each operation has a wording of
the source PL's community, one of everyone else's, and reserved ones for RL and evaluation.

Our choices, where the Parallel-SFT paper (arXiv 2604.20835) leaves freedom or is silent:

1. Splits are by behaviour: functions with equal outputs on fixed probe inputs are the same function,
   however they are written or worded. Base, SFT, dev and test have functions of their own; RL draws from the same as SFT.
2. `base` stands in for a general model, which knows every PL and follows instructions but has not seen equal
   programs: each function in exactly one PL, each operation in every PL, worded as the PL's community does; the
   source PL has twice as many as any other.
   Reserved wordings occur there in a few documents of the source PL, so that RL has something to reinforce.
3. The arms differ in one thing each. `source`: the source PL alone. `multi`: each function in one SFT PL, worded as
   its community does. `crossed`: the same, worded as any SFT community does: one wording meets several PLs.
   `parallel`: each function in all SFT PLs, with one statement.
   In all of them a share of the examples (`replay`) are base documents, the only place where an unseen PL occurs.
   Records may lack SFT PLs: what an arm shows of them is in those that they have, at least two in `parallel`.
4. Example number i of a mixture is a function of the seed and i, so that a resumed run reads on where
   it stopped.

In this order: settings and files; records; the parts that PLs play; mixtures, the paper's idea (`parallel`); tokenizer
and prompts; public data (`import`); and the embedded corpus: operations, their wordings, how each PL writes them,
what is made of these; the command line (`verify`, `split`, `show`).
"""

import argparse
import base64
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import string
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

import sandbox
from sandbox import are_texts, is_text

# --------------------------------------------------------------------------------------------------
# Settings and files: the few things that every stage needs


def flag(default, help: str, **metadata):
    """A dataclass field that `parse_flags` turns into a command-line flag with this help line."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def parse_flags(settings: type, description: str, argv: Sequence[str] | None = None):
    """An instance of the dataclass `settings`, its fields read from the command line.

    `snake_case` fields become `--kebab-case` flags; a tuple takes several words; a bool takes
    `--name` or `--no-name`. Metadata: `choices`, `least` and `most` restrict the values, `type` is that
    of a tuple's items.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = dataclasses.fields(settings)
    for f in fields:
        parser.add_argument("--" + f.name.replace("_", "-"), **_options(f))
    values = vars(parser.parse_args(argv))
    for f in fields:
        for word in {"least", "most"} & f.metadata.keys():
            bound, value = f.metadata[word], values[f.name]
            if not (value >= bound if word == "least" else value <= bound):  # "not" for the sake of nan
                parser.error(f"--{f.name.replace('_', '-')} must be at {word} {bound}")
    return settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _options(f: dataclasses.Field) -> dict:
    """What argparse needs to know of a field."""
    text = f.metadata["help"]
    if f.default not in ("", ()) and not isinstance(f.default, bool):
        text += f" (default: {' '.join(map(str, f.default)) if isinstance(f.default, tuple) else f.default})"
    options = {"default": f.default, "help": text.replace("%", "%%")}
    if isinstance(f.default, bool):
        return options | {"action": argparse.BooleanOptionalAction}
    if isinstance(f.default, tuple):
        return options | {"nargs": "*", "type": f.metadata.get("type", str), "metavar": f.name.upper()}
    if choices := f.metadata.get("choices"):
        return options | {"choices": choices}
    return options | {"type": type(f.default), "metavar": f.name.upper()}


def command(main: Callable, settings: type, description: str, argv: Sequence[str] | None = None) -> None:
    """Runs `main` on the settings of the command line; a user's mistake ends in one line, no traceback. A rank ends here."""
    try:
        main(parse_flags(settings, description, argv))
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    if "RANK" in os.environ:  # gloo's threads live on: one that frees a tensor while python ends aborts the process
        os._exit(0)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` fill a temporary name beside `path`, then renames it: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fail(message: str):
    """Ends the program with a message for its user: no traceback for a user's mistake."""
    sys.exit(f"error{' on rank ' + os.environ['RANK'] if 'RANK' in os.environ else ''}: {message}")


# --------------------------------------------------------------------------------------------------
# Records


class RecordError(ValueError):
    """A record that is not of the format; names file, line, field and the mend."""


def parse_record(line: str, where: str, general: bool = False) -> dict:
    """The record that `line` holds, if it is of the format in the module docstring, else a `RecordError`.

    `general`: one of general data, whose `answer` to its `prompt` may be any text.
    """

    def need(ok: bool, field: str, mend: str) -> None:
        if not ok:
            raise RecordError(f"{where}: field {field!r}: {mend}")

    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also an endless number, or too deep a list
        raise RecordError(f"{where}: not JSON ({error}); write one object a line") from None
    if not isinstance(record, dict):
        raise RecordError(f"{where}: not a JSON object; write one object a line")
    for name in ("prompt", "answer") if general else ("id", "prompt"):
        need(is_text(record.get(name)) and record[name], name, "give a text that is not empty")
    if general:
        return {"id": where, "prompt": record["prompt"], "answer": record["answer"].strip(), "solutions": {}}
    try:
        record["tests"], harness = sandbox.tests_of(record)
    except ValueError as error:
        raise RecordError(f"{where}: {error}") from None
    for name in ("function", "phrase"):
        need(is_text(record.get(name, "")), name, "give a text, or leave it out")
    wrong = record.get("distractors", {})
    ok = isinstance(wrong, dict) and all(map(are_texts, wrong.values()))
    need(ok, "distractors", "give an object from PL to a list of programs, or leave it out")
    for name in ("solutions", "commented", "prompts"):
        programs = record.get(name, None if name == "solutions" else {})
        need(isinstance(programs, dict), name, "give an object from PL to program, or {}")
        for language, program in programs.items():
            field = f"{name}.{language}"
            need(language in sandbox.LANGUAGES, field, "name a PL that `python sandbox.py languages` lists")
            need(is_text(program) and program.strip(), field, "give a text that is not empty")
            need(name == "prompts" or not harness or language in harness, field, "give it a harness, as others have")
    return record


def first_kind(records: Sequence[dict]) -> list[dict]:
    """Of held-out problems those of the first `kind`: in the embedded corpus those in each PL's own words."""
    return [r for r in records if r.get("kind") == records[0].get("kind")]


def gradable(record: dict, language: str) -> bool:
    """Whether the record's tests can judge an answer in the PL."""
    return not record.get("harness") or language in record["harness"]


def job(record: dict, language: str, program: str) -> tuple:
    """What Sandbox.map takes to judge `program` as the record's answer in the PL."""
    return program, language, record["tests"], record


def read_text(path: Path) -> str:
    """The text of a file, plain or .gz."""
    try:
        return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: not whole gzip or not UTF-8 ({error}); write the file again") from None


def read_records(path: str | Path, general: bool = False) -> list[dict]:
    """All records, or those of `general` data, of a JSONL file, plain or .gz; blank lines are passed over.

    Raises FileNotFoundError, or RecordError naming file, line, field and the mend.
    """
    path, records, seen = Path(path), [], {}
    if not path.exists():
        without = "sft.py --replay 0 does without, and " if path.name.startswith("base.") else ""
        raise FileNotFoundError(f"{path}: no such file; {without}`python data.py make` writes the embedded corpus")
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            records.append(parse_record(line, f"{path}:{number}", general))
            name = records[-1]["id"]
            if (first := seen.setdefault(name, number)) != number:
                raise RecordError(f"{path}:{number}: field 'id': {name!r} is also on line {first}; make it unique")
    if not records:
        raise RecordError(f"{path}: holds no record; give at least one line")
    return records


def leave_out(records: Sequence[dict], faults: dict[str, str], what: str, mend: str, most: float = 1.0) -> list[dict]:
    """The records without those in `faults` (id: reason); prints how many of `what` are left out, and the first reason.

    ValueError with the mend if none is left, or more than the share `most` would go.
    """
    if faults:
        first, why = next(iter(faults.items()))
        text = f"{len(faults)} of {len(records)} {what}, the first record {first!r}: {why}"
        if len(faults) == len(records) or len(faults) > most * len(records):
            raise ValueError(f"too many to leave out: {text}; {mend}")
        print(f"left out: {text}")
    return [r for r in records if r["id"] not in faults]


def read_split(folder: str | Path, name: str) -> list[dict]:
    """The records of `folder`/NAME.jsonl or NAME.jsonl.gz."""
    plain = Path(folder) / f"{name}.jsonl"
    zipped = plain.with_suffix(".jsonl.gz")
    if plain.exists() and zipped.exists():
        raise RecordError(f"{plain}: {zipped.name} is there as well; remove either")
    return read_records(plain if plain.exists() else zipped)


def record_files(place: str | Path) -> list[Path]:
    """`place` itself, or if it is a folder the JSONL files in it, but for what an interrupted write left."""
    found = [p for p in Path(place).glob("[!.]*") if p.name.endswith((".jsonl", ".jsonl.gz"))]
    return sorted(found) if Path(place).is_dir() else [Path(place)]


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Writes JSONL (gzipped for .gz, without a time stamp: equal records give equal bytes)."""
    body = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    if path.suffix == ".gz":
        body = gzip.compress(body, mtime=0)
    write_atomically(path, lambda p: p.write_bytes(body))


# --------------------------------------------------------------------------------------------------
# Roles of the PLs


@dataclass(frozen=True)
class Roles:
    """The part of each PL: `sft` are shown in SFT, the first of them is the source of RL; `unseen`
    occur in base documents alone, also where SFT replays those, and are evaluated. DATA/languages.json holds them."""

    sft: tuple[str, ...]
    unseen: tuple[str, ...]

    def __post_init__(self):
        if twice := ", ".join(p for p, n in Counter(self.everything).items() if n > 1):
            raise ValueError(f"{twice}: named twice; a PL is either an SFT one or an unseen one")
        if not self.sft:
            raise ValueError("'sft' names no source PL")

    @property
    def source(self) -> str:
        return self.sft[0]

    @property
    def everything(self) -> tuple[str, ...]:
        return self.sft + self.unseen


def read_roles(folder: str | Path) -> Roles:
    """The roles in `folder`/languages.json."""
    path, form = Path(folder) / "languages.json", '{"sft": ["python", ...], "unseen": [...]}'
    if not path.exists():
        mend = f"run `python data.py make`, or write {form} into it, the source PL first"
        raise FileNotFoundError(f"{path}: no such file; name another folder with --data, {mend}")
    try:
        raw = json.loads(path.read_text())
        return Roles(*(tuple(map(sandbox.canonical, raw[name])) for name in ("sft", "unseen")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; it must read {form}") from None


def write_roles(folder: Path, roles: Roles) -> None:
    """Writes `folder`/languages.json, and says who has which part."""
    text = json.dumps(dataclasses.asdict(roles)) + "\n"
    write_atomically(folder / "languages.json", lambda path: path.write_text(text))
    print(f"SFT PLs: {', '.join(roles.sft)} (the first is the source of RL); unseen: {', '.join(roles.unseen)}")


# --------------------------------------------------------------------------------------------------
# Mixtures: named iterators over records


class Example(NamedTuple):
    """Token ids; those from the `first` on are trained, the stop token among them."""

    tokens: list[int]
    first: int


def example(tokenizer: "Tokenizer", record: dict, text: str, language: str) -> Example:
    """The statement `text` and the record's answer in the PL ("" for general data); trained on answer and stop token."""
    prompt = tokenizer.prompt(text, language)
    response = answer(record["solutions"][language], language) if language else record["answer"]
    return Example([*prompt, *tokenizer.encode(response), tokenizer.stop], len(prompt))


def statement(record: dict, language: str) -> str:
    """The record's statement as people who write in the PL word it."""
    return record.get("prompts", {}).get(language, record["prompt"])


def home(function: str, languages: Sequence[str]) -> str:
    """The one of `languages` that shows a function in mixtures with a single PL for each: by its hash (or id), always the same."""
    return languages[int(hashlib.sha256(function.encode()).hexdigest(), 16) % len(languages)]


@dataclass(frozen=True)
class Mixture:
    """Example number i of an endless mixture: `mixture[i]`, a function of the seed and i alone.

    `records` are for the arm, `documents` for base and its replay. `sft` are the SFT PLs, the source PL first.
    Each pass over the records is shuffled anew. `statements` is the share of base documents that begin with one,
    `general_share` that of the examples that are `general` data.
    """

    name: str
    records: Sequence[dict]
    documents: Sequence[dict]
    tokenizer: "Tokenizer"
    sft: tuple[str, ...]
    seed: int = 0
    replay: float = 0.0
    statements: float = 0.7
    general: Sequence[dict] = ()
    general_share: float = 0.0

    def __getitem__(self, i: int) -> Example:
        """Every (1 / general_share)th example is of general data, and of the rest every (1 / replay)th a base document;
        the others are counted without them, so that neither parts the programs of one function. Each arm has
        the same of both."""
        before = int(i * self.general_share)
        if int((i + 1) * self.general_share) > before:
            record = self.general[pick(f"{self.seed} general", before, len(self.general))]
            return example(self.tokenizer, record, record["prompt"], "")
        i -= before
        before = 0 if self.name == "base" else int(i * self.replay)
        name, number = self.name, i - before
        if name != "base" and int((i + 1) * self.replay) > before:
            name, number = "base", before
        return MIXTURES[name](self, number, random.Random(f"{self.seed} {name} {number}"))

    def shown(self, record: dict) -> list[str]:
        """The PLs in which the arm may show a record; none if it lacks those that the arm needs."""
        own = [p for p in self.sft[: 1 if self.name == "source" else None] if p in record["solutions"]]
        return own if len(own) > (self.name == "parallel") else []

    @functools.cached_property
    def turns(self) -> tuple[int, ...]:
        """In how many PLs the arm may show each record."""
        return tuple(len(self.shown(record)) for record in self.records)

    def record(self, i: int) -> dict:
        """Record number i of the passes, in the same order in every arm."""
        return self.records[pick(f"{self.seed} sft", i, len(self.records))]

    def any_words(self, record: dict, language: str, rng: random.Random) -> str:
        """The statement as some SFT PL's people word it: each different text is as likely.

        A record with a harness states the signature in the PL that is asked for; no other PL's statement can replace it.
        """
        if "harness" in record:
            return statement(record, language)
        return rng.choice(list(dict.fromkeys(statement(record, p) for p in self.sft)))


@functools.lru_cache(maxsize=8)
def _shuffle(seed: str, count: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def pick(seed: str, i: int, count: int) -> int:
    """Item i of an endless sequence of passes over range(count), each shuffled anew."""
    return _shuffle(f"{seed} {i // count}", count)[i % count]


@functools.lru_cache(maxsize=8)
def _turns(seed: str, turns: tuple[int, ...]) -> list[tuple[int, int]]:
    """A shuffled pass in which item k has turns[k] examples in a row: for each, its item's place in the pass and which turn."""
    return [(place, turn) for place, k in enumerate(_shuffle(seed, len(turns))) for turn in range(turns[k])]


def base(m: Mixture, i: int, rng: random.Random) -> Example:
    """A stand-in for pre-training: a document of one PL, on which every token is trained.

    Some begin with a statement; the others have comments, where the record has commented programs.
    """
    record = m.documents[pick(f"{m.seed} base", i, len(m.documents))]
    language = rng.choice(list(record["solutions"]))
    if rng.random() < m.statements:
        return example(m.tokenizer, record, statement(record, language), language)._replace(first=1)
    program = record.get("commented", {}).get(language, record["solutions"][language])
    tokens = m.tokenizer.encode(answer(program, language))
    return Example([m.tokenizer.bos, *tokens, m.tokenizer.eos], 1)


def source(m: Mixture, i: int, rng: random.Random) -> Example:
    """The source PL only, in the words of its community."""
    record = m.record(i)
    return example(m.tokenizer, record, statement(record, m.sft[0]), m.sft[0])


def multi(m: Mixture, i: int, rng: random.Random) -> Example:
    """All SFT PLs, each function in one of those it has, in the words of that PL's community."""
    record = m.record(i)
    language = home(record.get("function", record["id"]), m.shown(record))
    return example(m.tokenizer, record, statement(record, language), language)


def crossed(m: Mixture, i: int, rng: random.Random) -> Example:
    """As `multi`, but in any SFT community's words: one wording meets several PLs, one function does not."""
    record = m.record(i)
    language = home(record.get("function", record["id"]), m.shown(record))
    return example(m.tokenizer, record, m.any_words(record, language, rng), language)


def parallel(m: Mixture, i: int, rng: random.Random) -> Example:
    """Each function in all SFT PLs that it has, one example after the other, with one statement for all of them."""
    passes, i = divmod(i, sum(m.turns))
    place, turn = _turns(f"{m.seed} sft {passes}", m.turns)[i]
    number = passes * len(m.records) + place
    record, lot = m.record(number), random.Random(f"{m.seed} parallel {number}")
    language = lot.sample(m.shown(record), len(m.shown(record)))[turn]
    return example(m.tokenizer, record, m.any_words(record, language, lot), language)


MIXTURES = {f.__name__: f for f in (base, source, multi, crossed, parallel)}


# --------------------------------------------------------------------------------------------------
# Tokenizer and prompt template

SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
# Llama-3's own pre-tokenisation: contractions, words, numbers of up to three digits, punctuation, space.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(records: Sequence[dict], vocabulary: int, out: Path) -> None:
    """Trains byte-level BPE on the records' texts and writes `out`/tokenizer.json, and removes an older tokenizer_config.json."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    texts = (ask(statement(r, p), p) + answer(r["solutions"][p], p) for r in records for p in r["solutions"])
    tokenizer.train_from_iterator(texts, trainer)
    (out / "tokenizer_config.json").unlink(missing_ok=True)
    write_atomically(out / "tokenizer.json", lambda path: tokenizer.save(str(path)))


# What the template of Llama 3.1's Instruct models puts before every conversation.
SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"  # how a role's turn begins and ends
CHATML = "<|im_start|>{}\n", "<|im_end|>\n"
BOS, EOS = "{{ bos_token }}", "{{ eos_token }}"  # the tokens of these roles


class Format(NamedTuple):
    """A prompt format: what stands before a statement and between it and the answer, and the token that ends that.

    `template` writes the same for other engines (tested), for conversations of any length.
    """

    before: str
    between: str
    stop: str
    template: str


def chat(begin: str, end: str, opening: str) -> Format:
    """The format of a conversation of turns, `opening` before the first."""
    turn, answer = begin.format("{{ m['role'] }}") + "{{ m['content'] | trim }}" + end, begin.format("assistant")
    turns = f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    return Format(opening + begin.format("user"), end + answer, end.strip(), opening + turns)


# Llama 3's chat, the same with 3.1's system turn, ChatML (SmolLM2 and others), and plain text for a base model, which
# never saw a chat's special tokens.
FORMATS = {
    "chat": chat(*LLAMA3, BOS),
    "llama3.1": chat(*LLAMA3, BOS + LLAMA3[0].format("system") + SYSTEM + LLAMA3[1]),
    "chatml": chat(*CHATML, ""),
    "plain": Format(
        f"{BOS}### Problem\n", "\n\n### Solution\n", EOS,
        BOS + "### Problem\n{{ messages[0]['content'] | trim }}\n\n### Solution\n"
        "{% for m in messages[1:] %}{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    ),
}  # fmt: skip


def own_format(template: str) -> dict[str, Format]:
    """{name: the format} that a model's own chat template writes; empty if that can't be told.

    A template may put a system turn of its own before a conversation that has none, as SmolLM2's does.
    """
    text = template.replace("\\n", "\n")
    if SYSTEM.partition("\n")[0] in text:
        return {"llama3.1": FORMATS["llama3.1"]._replace(template=template)}
    for name, (begin, end) in {"chat": LLAMA3, "chatml": CHATML}.items():
        system, answer = begin.format("system"), begin.format("assistant")
        own = re.search(re.escape(system) + r"[^{}+\\]*?" + re.escape(end), text)
        if (own or system not in text) and re.search(re.escape(answer) + r"""['"{]""", text):
            opening = BOS * ("bos_token" in text or "<|begin_of_text|>" in text) + (own[0] if own else "")
            return {name: chat(begin, end, opening)._replace(template=template)}
    return {}


def contents(value) -> list[str]:
    """The special tokens that a field of a folder's files names: a text, an object with `content`, or several."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [value["content"]] if "content" in value else value.values()
    return [name for part in value for name in contents(part)] if isinstance(value, Iterable) else []


# Characters of all kinds, a letter of two code points, white space around them: all must come back as they are.
PROBE = f" \n{string.printable}ünïcödé e\u0301 漢 \U0001f600\n "


class Tokenizer:
    """A byte-level tokenizer.json: token ids of texts, and of prompts and examples in a format of FORMATS.

    ValueError for a file that transformers would read otherwise, or that changes texts, but for a tokenizer_class that
    puts a pre-tokenizer of its own in place of the file's: here the file counts. What a library's calls
    left in it, how to truncate and to pad, is ignored and not saved on: a text is always encoded whole.
    `format` "" takes the one that the folder was saved with, else that of its chat template, else the chat that it has
    the tokens of. Attributes: `bos` (begins a document), `eos` (ends one) and `pad` (never trained) as the folder names
    them, else as Llama 3 does; `stop` (ends an answer: the end of a turn in a chat, eos in plain text); `stops` (all that
    may end one: also the end of a message that calls a tool, and what generation_config.json or config.json names).
    """

    def __init__(self, folder: str | Path, format: str = ""):
        self.path = Path(folder) / "tokenizer.json"
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file; copy the model's own, or run `python data.py make`")
        model = self._read(self.path.name).get("model")
        if isinstance(model, dict) and model.get("continuing_subword_prefix"):  # in which the library panics
            raise ValueError(f"{self.path}: has a continuing_subword_prefix; use a byte-level tokenizer")
        try:
            self.text = self.path.read_text(encoding="utf-8")
            self.core = tokenizers.Tokenizer.from_str(self.text)
        except Exception as error:  # of no narrower class from tokenizers
            raise ValueError(f"{self.path}: {error}") from None
        if self.core.truncation or self.core.padding:
            self.core.no_truncation()
            self.core.no_padding()
            self.text = self.core.to_str(pretty=True)
        self.size, self.config = self.core.get_vocab_size(), self._config()
        self._set_format(format)
        self._check()

    def _read(self, name: str) -> dict:
        """The object in the folder's file `name`; {} if there is none."""
        path = self.path.with_name(name)
        try:
            return {**json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    def _config(self) -> dict:
        """tokenizer_config.json, with the older files that transformers reads where it lists no added tokens.

        ValueError for a token that tokenizer.json has not, or not so: transformers would add it.
        """
        config = self._read("tokenizer_config.json")
        if config.get("split_special_tokens"):
            raise ValueError(f"{self.path.parent}: tokenizer_config.json: split_special_tokens: remove it")
        added = {str(i): token.__getstate__() for i, token in self.core.get_added_tokens_decoder().items()}
        if "added_tokens_decoder" not in config:
            config |= self._read("special_tokens_map.json")
            for name, i in self._read("added_tokens.json").items():
                if added.get(str(i), {}).get("content") != name:
                    what = f"{name!r} is not what {self.path.name} has as {i}"
                    raise ValueError(f"{self.path.parent}: added_tokens.json: {what}")
        try:
            for i, token in config.get("added_tokens_decoder", {}).items():
                if added.get(i, {}) | token != added.get(i):
                    raise ValueError(f"{token} is not what {self.path.name} has as {i}")
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{self.path.parent}: tokenizer_config.json: added_tokens_decoder: {error}") from None
        names = {token["content"] for token in added.values()}
        roles = {role: contents(value) for role, value in config.items() if role.endswith(("_token", "special_tokens"))}
        if missing := [f"{name!r}, the folder's {role}" for role in roles for name in roles[role] if name not in names]:
            raise ValueError(f"{self.path}: its added tokens lack {missing[0]}; use the model's own tokenizer")
        return config

    def _special(self, *names: str) -> int:
        """The id of the first of the names that there is."""
        for name in names:
            if (token := self.core.token_to_id(name)) is not None:
                return token
        mend = "use one of Llama 3's or ChatML's, or --format plain"
        raise ValueError(f"{self.path}: has no token {' or '.join(names)}; {mend}")

    def _template(self) -> str:
        """The folder's own chat template, "" if it has none."""
        path, template = self.path.with_name("chat_template.jinja"), self.config.get("chat_template") or ""
        if path.exists():
            return path.read_text(encoding="utf-8")
        if isinstance(template, list):
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default", "none")
        return str(template)

    def _set_format(self, format: str) -> None:
        """Sets the format and the special tokens; `parts` is its prompt as ids of these and texts, a NUL for the statement."""
        own = own_format(template := self._template())
        tokens = "chat" if self.core.token_to_id("<|im_start|>") is None else "chatml"
        self.format = format or str(self.config.get("prompt_format", next(iter(own), "" if template else tokens)))
        if self.format not in FORMATS:
            what = f"prompt format {self.format!r}" if self.format else "its chat template is none that is known here"
            raise ValueError(f"{self.path.parent}: {what}; choose --format {' or '.join(FORMATS)}")
        before, between, stop, self.template = (FORMATS | own)[self.format]
        bos, eos, pad = (contents(self.config.get(f"{role}_token"))[:1] for role in ("bos", "eos", "pad"))
        named = (self._read("generation_config.json") or self._read("config.json")).get("eos_token_id")
        named = [i for i in (named if isinstance(named, list) else [named]) if type(i) is int and 0 <= i < self.size]
        turn_ends = LLAMA3[1], CHATML[1].strip(), "<|eom_id|>"  # which some folders call the end of a text
        special = {t.content for t in self.core.get_added_tokens_decoder().values() if t.special}.difference(turn_ends)
        ends = *(t for t in (*eos, *map(self.core.id_to_token, named)) if t in special), "<|end_of_text|>"
        ends = *ends, "<|endoftext|>", *eos
        self.eos = self._special(*ends)
        self.bos = self._special(*(t for t in bos if t != "<|im_start|>"), "<|begin_of_text|>", *ends)
        self.pad = self._special(*pad, "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", *ends)
        pieces = re.split(r"(<\|\w+\|>|\{\{ \w+ \}\})", f"{before}\0{between}{stop}")
        ids = {BOS: self.bos, EOS: self.eos} | {p: self._special(p) for p in pieces[1::2] if p not in (BOS, EOS)}
        *self.parts, self.stop, _ = (ids.get(p, p) for p in pieces)
        known = *map(self.core.token_to_id, turn_ends), self.eos, *named
        self.stops = tuple(dict.fromkeys(i for i in known if i is not None))

    def _check(self) -> None:
        """ValueError unless ids below `size` are tokens, texts come back whole, and special tokens are not read in them."""
        ids = {self.bos, self.eos, self.pad, *(p for p in self.parts if isinstance(p, int))}
        name = {i: self.core.id_to_token(i) for i in ids}
        added = self.core.get_added_tokens_decoder().values()
        text = " ".join([PROBE, *(token.content for token in added if not token.special), ""])
        self.core.encode_special_tokens = False  # as transformers reads what a template wrote
        prompt = "".join(name.get(p, p) for p in self.parts).replace("\0", text)
        whole = self.core.encode(prompt, add_special_tokens=False).ids
        self.core.encode_special_tokens = True  # '<|eot_id|>' inside a statement is text, not a token
        faults = {
            "has ids without a token": sorted(self.core.get_vocab().values()) != list(range(self.size)),
            "does not mark special tokens as special": ids & {*self.encode("".join(name.values()) + text.strip())},
            "reads a text by what is around it (lstrip, rstrip or single_word of a special token) or by chance (dropout)":
                whole != self._fill(text),
        }  # fmt: skip
        if found := [fault for fault, there in faults.items() if there]:
            raise ValueError(f"{self.path}: {found[0]}; use the model's own tokenizer")

    def encode(self, text: str) -> list[int]:
        """Special tokens in a text are read as text. ValueError if the ids would not give it back."""
        ids = self.core.encode(text, add_special_tokens=False).ids
        if self.core.decode(ids, skip_special_tokens=False) != text:
            lost = "".join(c for c in dict.fromkeys(text) if self.core.decode(self.core.encode(c).ids) != c)
            why = f"has no tokens for {lost[:20]!r}" if lost else "a normalizer, or an added token's lstrip or rstrip"
            mend = "leave such texts out, or use the model's own tokenizer"
            raise ValueError(f"{self.path}: changes texts: {why}; {mend}")
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, special tokens written out, less a stop token at the end."""
        end = -1 if tokens and tokens[-1] in self.stops else None
        return self.core.decode(list(tokens[:end]), skip_special_tokens=False)

    def _fill(self, text: str) -> list[int]:
        """The ids of `parts` with `text` for the statement."""
        return [i for p in self.parts for i in (self.encode(p.replace("\0", text)) if isinstance(p, str) else [p])]

    def prompt(self, statement: str, language: str) -> list[int]:
        """Everything up to where the answer in the PL begins."""
        return self._fill(ask(statement, language))

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json into `folder`, so that a checkpoint is whole.

        The latter keeps of the model's own what has no say in how a text is read.
        """
        tokens = {"bos_token": self.bos, "eos_token": self.stop, "pad_token": self.pad}
        config = {"model_input_names": ["input_ids", "attention_mask"]}
        config |= {name: self.config[name] for name in (*config, "model_max_length") if name in self.config}
        config |= {name: self.core.id_to_token(token) for name, token in tokens.items()}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= {"prompt_format": self.format, "chat_template": self.template}
        for name, text in {self.path.name: self.text, "tokenizer_config.json": json.dumps(config, indent=2)}.items():
            write_atomically(Path(folder) / name, lambda p, text=text: p.write_text(text, encoding="utf-8"))


def ask(statement: str, language: str) -> str:
    """The prompt's text. The only prompt template: SFT, RL and evaluation all use it; general data names no PL."""
    return statement.strip() + (f"\nAnswer in {language}." if language else "")


def answer(program: str, language: str) -> str:
    """The response's text: a fenced block, of which `extract` gives the program back, its last line ended.

    A fence is ```, or longer than those that begin a line of the program, as in CommonMark.
    """
    program = program.removesuffix("\n")
    fence = "`" * (1 + max(map(len, re.findall("^`{3,}", program, re.MULTILINE)), default=2))
    return f"{fence}{language}\n{program}\n{fence}"


def extract(response: str, language: str) -> str | None:
    """The program in the last closed fenced block of `language`, else None.

    Its opening line is ``` or a longer fence and the PL's name or an alias, in any case, and no more; its
    closing line a fence at least as long, alone. A block without a name, of another PL, or that is not closed
    does not count, nor does text outside of blocks. If the opening line ends in CRLF, so may the others.
    """
    names = {language, *sandbox.LANGUAGES[language].aliases}
    program, block = None, None  # block: the lines of the one that is open
    for line in response.split("\n"):
        ticks = len(line) - len(line.lstrip("`"))
        rest = line[ticks:].strip()
        if block is None:
            if ticks >= 3 and "`" not in rest:
                fence, name, ending, block = ticks, rest.lower(), "\r" * line.endswith("\r"), []
        elif ticks < fence or rest:
            block.append(line.removesuffix(ending) + "\n")
        else:
            program, block = "".join(block) if name in names else program, None
    return program


# --------------------------------------------------------------------------------------------------
# Importing public data. A format is one function, from a row of its files to a record or a part of one; parts
# with one id are put together. `solutions` are lists of programs until then.


class LeftOut(ValueError):
    """Raised for a row that gives no record; the reason is counted and printed."""


class Row(dict):
    """A row of a public file. row(field, kind) is that field, else a RecordError names file, row and field."""

    where, name = "", ""  # file and row; a name for a row that has none
    left: Counter  # what of the file is left out, and why

    def __call__(self, field: str, kind=str, *default):
        value = self.get(field)
        if value in (None, "") and default:
            return default[0]
        if not isinstance(value, kind):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise RecordError(f"{self.where}: field {field!r}: must be {wanted}; is the file of this format?")
        return value

    def json(self, field: str, *default):
        """A list or object that the field holds, or that its text does."""
        value = self(field, (str, list, dict), *default)
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise RecordError(f"{self.where}: field {field!r}: not JSON ({error})") from None

    def program(self, name: str, text: str) -> dict:
        """The part of a record that a program makes up: empty, and counted, if its PL is none of ours."""
        try:
            return {public_language(name): [text]}
        except LeftOut as reason:
            self.left[f"programs: {reason}"] += 1
            return {}


PUBLIC_NAMES = {  # what contests and data sets call PLs -> ours; the first that is found in a name counts
    r"python ?2|pypy ?2|emacs": "", r"c\+\+|clang": "cpp", r"delphi|fpc|pascal": "pascal", r"c#|csharp|\.net": "csharp",
    "coffee": "coffeescript", r"node|javascript": "javascript", r"^java\b": "java", r"^py": "python", "kotlin": "kotlin",
    "^go": "go", "rust": "rust", "ruby": "ruby", "scala": "scala", "haskell": "haskell", "ocaml": "ocaml",
    "perl": "perl", "php": "php", "common lisp": "commonlisp", r"^(gnu )?c(\d\d)?\b": "c", r"^d\b": "d",
}  # fmt: skip


def public_language(name: str) -> str:
    """Our name of a PL that public data calls `name`, such as "GNU C++17 (64)"."""
    low = name.lower().strip()
    try:
        return sandbox.canonical(next((p for pattern, p in PUBLIC_NAMES.items() if re.search(pattern, low)), low))
    except ValueError:
        raise LeftOut(f"{name} is no PL of `python sandbox.py languages`") from None


def limits(seconds, memory) -> dict:
    """A record's limits, from numbers of seconds and MB or from texts such as "2 seconds", "256 megabytes"."""
    own = {}
    for name, value in (("time_limit", seconds), ("memory_limit", memory)):
        if found := re.match(r"([\d.]+) *(milli|kilo|giga)?", str(value or "")):
            own[name] = float(found[1]) * {"milli": 1e-3, "kilo": 2**-10, "giga": 2**10}.get(found[2], 1)
    return {name: value for name, value in own.items() if value}


def story(body: str, **sections: str) -> str:
    """A statement: the body, then each section that is not empty under its title."""
    parts = (f"{title}:\n{text.strip()}" for title, text in sections.items() if text.strip())
    return "\n\n".join([body.strip(), *parts])


def cases(pairs: Iterable[tuple]) -> dict:
    """`tests` and `compare` of (input, output or list of accepted ones). Contests compare tokens, and let numbers
    with a point differ in their last digits."""
    tests = []
    for given, outputs in pairs:
        accepted = outputs if isinstance(outputs, list) else [outputs]
        if not all(isinstance(text, str) for text in (given, *accepted)):
            raise LeftOut("tests that are no texts")
        accepted = [text.replace("\r\n", "\n") for text in accepted]
        tests.append({"stdin": given.replace("\r\n", "\n"), "stdout": accepted if len(accepted) > 1 else accepted[0]})
    if not tests:
        raise LeftOut("no tests")
    decimals = any(re.search(r"\d\.\d", "".join(t["stdout"])) for t in tests)
    return {"tests": tests, "compare": "numbers" if decimals else "tokens"}


CALL = """from typing import *
import bisect, collections, functools, heapq, itertools, json, math, operator, random, re, string, sys
«answer»
_arguments, _accepted = json.load(sys.stdin)
_got = (getattr(Solution(), "NAME") if "Solution" in globals() else NAME)(*_arguments)
_got = json.loads(json.dumps(_got, default=list))
assert any(_got == x or isinstance(x, float) and math.isclose(_got, x, abs_tol=1e-6) for x in _accepted), _got
print("«word»")
"""


def judged(given: dict | list, function: str = "") -> dict:
    """What judges answers: tests, with a harness where they call a function. Given as APPS has them, or as a list.

    The accepted results of a function are in the input of its tests: the harness compares them.
    """
    if isinstance(given, dict):
        inputs, outputs, function = given.get("inputs", []), given.get("outputs", []), given.get("fn_name") or ""
        if len(inputs) != len(outputs):
            raise LeftOut("not as many outputs as inputs")
        calls, pairs = bool(function), [*zip(inputs, outputs, strict=True)]
        if calls:  # Codewars' results are each in a list of their own
            pairs = [(i, [o, *o] if isinstance(o, list) and len(o) == 1 else [o]) for i, o in pairs]
        else:  # some have a list of lines
            pairs = [tuple("\n".join(map(str, x)) if isinstance(x, list) else x for x in pair) for pair in pairs]
    else:
        kinds = {t.get("testtype") or t.get("type") or "stdin" for t in given}
        calls, pairs = bool(kinds - {"stdin", "stdin_stdout"}), [(t["input"], t["output"]) for t in given]
        function = next((t["fn_name"] for t in given if t.get("fn_name")), function)
        if calls:  # a line of JSON for each argument
            read = lambda x: [*map(json.loads, filter(str.strip, x.split("\n")))] if isinstance(x, str) else x  # noqa: E731
            pairs = [(read(i), read(o) if isinstance(o, str) else [o]) for i, o in pairs]
    if not calls or not pairs:
        return cases(pairs)
    if not re.fullmatch(r"\w+", function):
        raise LeftOut("tests call a function that has no name")
    harness = {"python": CALL.replace("NAME", function)}
    return {"tests": [{"stdin": json.dumps(pair)} for pair in pairs], "harness": harness}


class _TextUnpickler(pickle.Unpickler):
    """Unpickles texts and plain values: nothing that a pickle names is loaded, let alone called."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def hidden_cases(row: Row, field: str) -> list:
    """Test cases as JSON, or as base64 of zlib of a pickled text of JSON."""
    value = row(field, (str, list), "[]")
    if isinstance(value, list) or value.lstrip().startswith("["):
        return row.json(field, [])
    try:
        return json.loads(_TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load())
    except (ValueError, TypeError, EOFError, zlib.error, pickle.UnpicklingError) as error:
        raise RecordError(f"{row.where}: field {field!r}: neither JSON nor a packed text of it ({error})") from None


# Comments, where public data describes a function, and the lines that tests need beside it
_C_LIKE, _HASH = r"/\*[\s\S]*?\*/|^[ \t]*//.*\n", r"^[ \t]*#(?!lang|!).*\n"
COMMENTS = {
    **dict.fromkeys("c cpp java javascript typescript go rust kotlin scala csharp swift d dart".split(), _C_LIKE),
    **dict.fromkeys("ruby perl bash r elixir coffeescript tcl julia awk".split(), _HASH), "php": f"{_C_LIKE}|{_HASH}",
    "python": rf"(?:\A\s*|^[ \t]+|(?<=:\n))r?(\"\"\"|\'\'\')[\s\S]*?\1|{_HASH}", "lua": r"--\[\[[\s\S]*?\]\]-*|^[ \t]*--.*\n",
    "haskell": r"\{-[\s\S]*?-\}|^[ \t]*--.*\n", "pascal": r"\(\*(?:\(\*[\s\S]*?\*\)|[\s\S])*?\*\)", "erlang": r"^[ \t]*%.*\n", "fortran": r"^[ \t]*!.*\n",
    **dict.fromkeys(("racket", "commonlisp"), r"#\|[\s\S]*?\|#|^[ \t]*;.*\n"),
}  # fmt: skip
HEADS = {
    "python": r"^(?:from|import) [^(\n]*$", "c": r"^#include.*", "cpp": r"^(?:#include|using namespace).*", "java": r"^import .*",
    "go": r"^package \w+|^import\s*\([^)]*\)|^import .*", "php": r"\A\s*<\?php", "racket": r"^#lang .*",
}  # fmt: skip
# How the tests of a PL are made to print the word when all is done: the first pattern that they have, and what takes
# its place. A main function is called by another, or prints as its scope is left by a return.
_GO_TEST = r"""\g<0>
func main() {
	testing.Main(func(_, _ string) (bool, error) { return true, nil }, []testing.InternalTest{{Name: "Test", F: func(t *testing.T) {
		if \1(t); !t.Failed() {
			os.Stdout.WriteString("«word»\\n")
			os.Exit(0)
		}
	}}}, nil, nil)
}
"""
LAST = {  # a line after all the others
    "coffeescript": 'console.log "«word»"', "bash": 'echo "«word»"', "r": 'cat("«word»")', "tcl": 'puts "«word»"',
    "julia": 'println("«word»")', "swift": 'print("«word»")', "commonlisp": '(format t "«word»~%")',
}  # fmt: skip
ENDINGS = {language: [(r"\Z", f"\n{line}\n")] for language, line in LAST.items()} | {
    "python": [(r"unittest\.main\(\)\s*\Z", r'assert unittest.main(exit=False).result.wasSuccessful()\nprint("«word»")\n'), (r"\Z", r'\nprint("«word»")\n')],
    **{p: [(r"\A([\s\S]*)\Z", r'console.assert = (ok, ...why) => { if (!ok) throw new Error(why.join(" ")); };\n\1\nconsole.log("«word»");\n')] for p in ("javascript", "typescript")},
    "ruby": [(r"require 'test/unit'([\s\S]*)", r"require 'test/unit'\1\nTest::Unit::AutoRunner.need_auto_run = false\nabort unless Test::Unit::AutoRunner.run\nputs '«word»'\n"), (r"\Z", r'\nputs "«word»"\n')],
    "perl": [(r"\Z", r'\nprint "«word»\\n" if !Test::More->can("builder") || Test::More->builder->is_passing;\n')],
    "php": [(r"(?:\?>\s*)?\Z", r'\necho "«word»";\n')],
    "lua": [(r"os\.exit\((.*)\)\s*\Z", r'assert(\1 == 0)\nprint("«word»")\n'), (r"\Z", r'\nprint("«word»")\n')],
    "racket": [(r"\A([\s\S]*)\Z", r'(require rackunit)\n(current-check-handler raise)\n\1\n(displayln "«word»")\n')],
    "elixir": [(r"ExUnit\.start\(\)([\s\S]*)", r'ExUnit.start(autorun: false)\1\n%{failures: 0} = ExUnit.run()\nIO.puts("«word»")\n')],
    "erlang": [(r"^test\(\) ->[\s\S]*", r'\g<0>\nmain(_) -> ok = test(), io:format("«word»~n").\n')],
    "haskell": [(r"^main :: IO \(\)\nmain =", r'main :: IO ()\nmain = checks >> putStrLn "«word»"\nchecks :: IO ()\nchecks =')],
    "fortran": [(r"^\s*contains\b", "print '(a)', '«word»'\n\\g<0>")],
    "pascal": [(r"\bend\.\s*\Z", "writeln('«word»');\nend.\n")],
    "c": [(r"\bint main\(.*?\)\s*\{", r'#include <stdio.h>\nstatic void last(int *_) { puts("«word»"); }\n\g<0> __attribute__((cleanup(last))) int last_ = 0;')],
    "cpp": [(r"\bint main\(.*?\)\s*\{", r'#include <cstdio>\n\g<0> struct Last { ~Last() { std::puts("«word»"); } } last_;')],
    "java": [(r"(?:public )?static void main\(.*?\)", r'public static void main(String[] args) throws Exception { checks(args); System.out.println("«word»"); }\nstatic void checks(String[] args)')],
    "csharp": [(r"(?:public )?static void Main\(.*?\)([\s\S]*)\Z", r'public static void Main() { Checks(); System.Console.WriteLine("«word»"); }\nstatic void Checks()\1\nstatic class Debug { public static void Assert(bool ok, string why = "") { if (!ok) throw new System.Exception(why); } }\n')],
    "kotlin": [(r"\bfun main\(.*?\)([\s\S]*?)(?:^main\(\)\s*)?\Z", r'fun main() { checks(); println("«word»") }\nfun checks()\1')],
    "scala": [(r"\bdef main\(.*?\)(?:: Unit)?", r'def main(args: Array[String]): Unit = { checks(args); println("«word»") }\ndef checks(args: Array[String]): Unit'),
              (r"\}\s*\Z", r'println("«word»")\n}\n')],
    "go": [(r"\bfunc main\(\)", r'func main() { checks(); os.Stdout.WriteString("«word»\\n") }\nfunc checks()'), (r"^func (Test\w*)\([\s\S]*", _GO_TEST)],
    "rust": [(r"#\[cfg\(test\)\]\s*mod (\w+)([\s\S]*?)#\[test\](?:\s|//.*)*fn (\w+)([\s\S]*)", r'mod \1\2pub fn \3\4\nfn main() { \1::\3(); println!("«word»"); }\n'),
             (r"\bfn main\(\)", r'fn main() { checks(); println!("«word»"); }\nfn checks()')],
    "d": [(r"\bunittest\b([\s\S]*?)void main\(.*?\)\s*\{", r'void checks()\1void main() { checks(); import std.stdio; writeln("«word»");')],
}  # fmt: skip


def function_part(
    name: str, language: str, opening: str, solution: str, test: str, *, shown: str = "", setup: str = "", entry: str = "", about: str = ""
) -> dict:  # fmt: skip
    """What a problem that asks for a function is in one PL: statement, harness and, if it is there, the solution.

    `opening` begins the function `entry`, `solution` ends it, `test` calls it; the model is shown `shown`, else the
    opening with its comments, and is asked for all of it. Where the test closes the class that the opening began, it
    is asked for the function alone, whose signature is the opening's last line with a parenthesis.
    """
    if not test.strip() or language not in ENDINGS:
        raise LeftOut(f"{language}: " + ("how its tests end is not known" if test.strip() else "no tests"))
    if language == "rust":  # without crates that are not here: few programs need them
        opening, shown = (re.sub(r"^\s*use (rand|regex|md5)\b.*\n", "", t, flags=re.M) for t in (opening, shown))
    bare = re.sub(COMMENTS[language], "", opening + "\n", flags=re.M)
    bare = re.sub(r"\n\s*\n+", "\n\n", bare).strip("\n")
    test = test if solution else re.sub(r"\A\s*\}", "", test)  # MultiPL-E's close the function
    if language == "python" and "def check(" in test and not re.search(r"(?<!def )\bcheck\(", test):
        test += f"\ncheck({entry})\n"
    if language == "rust":
        test = test.replace("use super::*;", "\n".join(["use super::*;", *re.findall(r"^\s*use .*;", bare, re.M)]), 1)
    patterns = ((pattern, text) for pattern, text in ENDINGS[language] if re.search(pattern, test, re.M))
    if not (first := next(patterns, None)):
        raise LeftOut(f"{language}: tests without a main function")
    test = re.sub(*first, test, count=1, flags=re.M)
    head = "\n".join(re.findall(HEADS.get(language, r"(?!)"), setup + bare, re.M))
    task = "Complete this and answer with the whole of it"
    code = re.sub(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])\'', "", test)
    if language in ("java", "csharp", "scala") and code.count("}") > code.count("{"):
        head, signature, rest = re.search(r"\A([\s\S]*^)(.*\w+\s*\(.*)([\s\S]*)\Z", bare, re.M).groups()
        bare, task = signature + rest, "Complete the function in this and answer with that function alone"
    elif language == "go":
        head = re.sub(r"package \w+", 'package main\nimport "os"', head)
        bare = re.sub(HEADS["go"], "", bare, flags=re.M).strip("\n")
    elif language == "php":
        test = f"?><?php\n{test}"
    elif language == "fortran":  # the test begins the program, the solution ends it
        head, test, solution = test, "end program", re.sub(r"end\s+program.*\s*\Z", "", solution)
    part = {
        "id": name,
        "prompt": about or shown or opening,
        "tests": [{"stdin": ""}],
        "prompts": {language: f"{task}:\n\n{(shown or opening).strip()}"},
        "harness": {language: "\n".join([head, "«answer»", test])},
    }
    return part | {"solutions": {language: [f"{bare}\n{solution.rstrip()}"]} if solution else {}}


def humaneval_x(row: Row) -> dict:
    """A row of HumanEval-X. A program begins with its prompt, which may lack the imports and, in Rust, the declaration."""
    name, number = row("task_id").split("/")
    language = public_language(name)
    imports, opening, declaration = row("import", str, "").strip(), row("prompt"), row("declaration")
    opening = opening if imports in opening else f"{imports}\n{opening}"
    if "".join(declaration.strip().split("\n")[-1].split()) not in "".join(opening.split()):
        opening += declaration
    setup, solution = row("test_setup", str, ""), row("canonical_solution")
    return function_part(f"HumanEval/{number}", language, opening, solution, row("test"), setup=setup)


def humanevalpack(row: Row) -> dict:
    language, imports = public_language(row("lang")), re.match(r"\s*import \([^)]*\)\n", row("prompt"))
    opening = (imports[0] if imports else "") + row("declaration")
    own = {"shown": row("prompt"), "setup": row("setup", str, ""), "entry": row("entry_point")}
    own["about"] = row("instruction").partition("\n")[2]
    return function_part(row("problem"), language, opening, row("solution"), row("test"), **own)


def mbxp(row: Row) -> dict:
    """A row of MBXP, multilingual HumanEval or HumanEval-XL, which share their fields."""
    task, number = row("task_id").split("/")[:2]
    name = f"{'MBXP' if task.startswith('MB') else 'HumanEval'}/{number}"
    if row("natural_language", str, ""):
        name = f"HumanEval-XL/{number}/{row('natural_language')}"
    if "KellermanSoftware" in row("prompt"):
        raise LeftOut("csharp: its tests call CompareNetObjects, which Debian does not have")
    own = {"entry": row("entry_point"), "about": row("description", str, "")}
    solution = row("canonical_solution", str, "")
    return function_part(name, public_language(row("language")), row("prompt"), solution, row("test"), **own)


def mceval(row: Row) -> dict:
    name, opening = row("task_id"), row("prompt")
    language = "racket" if opening.lstrip().startswith("#lang racket") else public_language(name.split("/")[0])
    own = {"entry": row("entry_point", str, ""), "about": row("instruction")}
    part = function_part(f"McEval/{name}", language, opening, row("canonical_solution"), row("test", str, ""), **own)
    return part | {"level": row("level")}


def multipl_e(row: Row) -> dict:
    language = public_language(row("language"))
    return function_part(f"MultiPL-E/{row('name')}", language, row("prompt"), "", row("tests"))


def xcodeeval(row: Row) -> dict:
    """A row of one of its three files: the tests of a problem, a program, or the problem's description."""
    name = row("src_uid")
    if "unittests" in row:
        return {"id": name} | cases((t["input"], t["output"]) for t in row("unittests", list))
    if "source_code" in row:
        if row("exec_outcome") != "PASSED":
            raise LeftOut(f"programs: outcome {row('exec_outcome')}")
        both = row("lang", str, "") or row("lang_cluster")
        return {"id": name, "solutions": row.program(both, row("source_code"))}
    samples = zip(row("sample_inputs", list, []), row("sample_outputs", list, []), strict=False)
    examples = "\n".join(f"{i}\n->\n{o}" for i, o in samples)
    about = {"Input": row("input_spec", str, ""), "Output": row("output_spec", str, ""), "Examples": examples}
    rating = {"rating": row("difficulty", (int, float))} if row.get("difficulty") else {}
    about["Notes"] = row("notes", str, "")
    own = limits(row.get("time_limit"), row.get("memory_limit"))
    return {"id": name, "prompt": story(row("description"), **about), **own, **rating}


def codeforces(row: Row) -> dict:
    """A row of open-r1/codeforces, or of its submissions."""
    if "source" in row:
        if row("verdict") != "OK":
            raise LeftOut(f"programs: verdict {row('verdict')}")
        return {"id": row("problem_id"), "solutions": row.program(row("programmingLanguage"), row("source"))}
    lacks = {
        "interactive": row.get("interaction_format"), "a checker of its own": row.get("generated_checker"),
        "reads a file": row.get("input_mode") == "file", "cannot be run": row.get("executable") is False,
    }  # fmt: skip
    if reason := next(filter(lacks.get, lacks), ""):
        raise LeftOut(reason)
    examples = "\n".join(f"{e['input']}\n->\n{e['output']}" for e in row("examples", list, []))
    about = {"Input": row("input_format", str, ""), "Output": row("output_format", str, ""), "Examples": examples}
    about["Note"] = row("note", str, "")
    tests = [*row("examples", list, []), *row("official_tests", list, [])]
    tests = {(t["input"], t["output"]): None for t in tests}
    own = limits(row.get("time_limit"), row.get("memory_limit"))
    prompt = story(f"{row('title')}\n\n{row('description', str, '')}", **about)
    return {"id": row("id"), "prompt": prompt, **cases(tests), **own}


def codecontests(row: Row) -> dict:
    """A row of CodeContests: a problem with its tests and its solutions in up to four PLs."""
    if row("input_file", str, "") or row("output_file", str, ""):
        raise LeftOut("reads a file")
    pairs, seconds, solutions = [], row("time_limit", dict, {}), {}
    for field in ("public_tests", "private_tests", "generated_tests"):
        pairs += zip(*(row(field, dict, {"input": [], "output": []})[k] for k in ("input", "output")), strict=True)
    names = {0: "UNKNOWN", 1: "Python 2", 2: "C++", 3: "Python 3", 4: "Java"}
    given = row("solutions", dict, {"language": [], "solution": []})
    for number, text in zip(given["language"], given["solution"], strict=True):
        for language, programs in row.program(names.get(number, str(number)), text).items():
            solutions.setdefault(language, []).extend(programs)
    seconds = (seconds.get("seconds") or 0) + (seconds.get("nanos") or 0) / 1e9
    own = limits(seconds, row("memory_limit_bytes", int, 0) / 2**20)
    return {"id": row("name"), "prompt": row("description"), **cases(pairs), **own, "solutions": solutions}


def apps(row: Row) -> dict:
    given, starter = row.json("input_output", {}), row("starter_code", str, "").strip()
    prompt = story(row("question"), **{"Complete this and answer with the whole of it": starter})
    own = limits(row.get("time_limit"), row.get("memory_limit"))
    name = str(row.get("problem_id", row.get("id", row.name)))
    return {"id": name, "prompt": prompt, **judged(given), **own, "solutions": {"python": row.json("solutions", [])}}


def function_name(row: Row) -> str:
    """The function that a problem's tests call, where the problem says so apart from them."""
    starter = re.findall(r"def (\w+)\(", row("starter_code", str, ""))
    return row.json("metadata", {}).get("func_name") or (starter[-1] if starter else "")


def deepcoder(row: Row) -> dict:
    own = judged(row.json("tests"), function_name(row))
    return {"id": row.name, "prompt": row("problem"), **own, "solutions": {"python": row.json("solutions", [])}}


def livecodebench(row: Row) -> dict:
    tests = [*row.json("public_test_cases", []), *hidden_cases(row, "private_test_cases")]
    starter = {"Complete this and answer with the whole of it": row("starter_code", str, "")}
    name = str(row.get("question_id") or row.name)
    return {"id": name, "prompt": story(row("question_content"), **starter), **judged(tests, function_name(row))}


PUBLIC_FORMATS = {
    "humaneval-x": humaneval_x, "humanevalpack": humanevalpack, "mbxp": mbxp, "humaneval-xl": mbxp, "mceval": mceval,
    "multipl-e": multipl_e, "xcodeeval": xcodeeval, "codeforces": codeforces, "codecontests": codecontests,
    "apps": apps, "taco": apps, "deepcoder": deepcoder, "livecodebench": livecodebench,
}  # fmt: skip


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a public file: JSON lines, a JSON array or object, either gzipped, or parquet."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: parquet needs pyarrow; run `pip install pyarrow`") from None
        rows = ((f"row {n}", row) for n, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
    else:
        text = read_text(path)
        try:
            whole = json.loads(text)
            if isinstance(whole, dict) and all(isinstance(value, list) for value in whole.values()):
                whole = [{"src_uid": key, "unittests": value} for key, value in whole.items()]  # unittest_db.json
            rows = [(f"row {n}", row) for n, row in enumerate(whole if isinstance(whole, list) else [whole], 1)]
        except ValueError:
            rows = ((f"row {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    for where, content in rows:
        try:
            row = Row(json.loads(content) if isinstance(content, str) else content)
        except (ValueError, TypeError) as error:
            raise RecordError(f"{path}: {where}: no JSON object ({error}); write one a line, or an array") from None
        row.where, row.name = f"{path}: {where}", f"{path.name.partition('.')[0]}/{where.split()[1]}"
        yield row


def assemble(parts: dict, programs: int, left: Counter) -> list[dict]:
    """The records of one id: the first has the shortest program of each PL, the next the second, and so on."""
    if missing := [field for field in ("prompt", "tests") if not parts.get(field)]:
        left[f"problems without {missing[0]}" if "prompt" in parts else "programs and tests without a problem"] += 1
        return []
    given = {p: sorted(dict.fromkeys(filter(str.strip, texts)), key=len) for p, texts in parts["solutions"].items()}
    left["programs: longer than those kept"] += sum(max(0, len(texts) - programs) for texts in given.values())
    records = []
    for i in range(max(1, min(programs, max(map(len, given.values()), default=1)))):
        own = {p: texts[i] for p, texts in given.items() if i < len(texts)}
        records.append(parts | {"id": parts["id"] + f"#{i + 1}" * (i > 0), "solutions": own})
    return records


@dataclass(frozen=True)
class ImportSettings:
    out: str = flag("runs/problems", "folder to write problems.jsonl.gz into")
    programs: int = flag(1, "programs kept of each PL, the shortest first; each more makes a record more", least=1)


def import_files(s: ImportSettings, format: str, paths: Sequence[str]) -> None:
    """Writes the records of the files, and says what was left out and why."""
    if format not in PUBLIC_FORMATS:
        fail(f"import: no format {format!r}; there are {', '.join(PUBLIC_FORMATS)}")
    problems, left, records = {}, Counter(), []
    for row in itertools.chain(*(read_rows(Path(path)) for path in paths)):
        row.left = left
        try:
            part = PUBLIC_FORMATS[format](row)
        except RecordError:
            raise
        except LeftOut as reason:
            left[str(reason)] += 1
            continue
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{row.where}: {type(error).__name__} {error}; is this a file of {format}?") from None
        whole = problems.setdefault(part["id"], {"where": row.where, "solutions": {}})
        for language, texts in part.pop("solutions", {}).items():
            whole["solutions"].setdefault(language, []).extend(texts)
        for field, value in part.items():
            whole[field] = whole.get(field, {}) | value if isinstance(value, dict) else whole.get(field, value)
    for whole in problems.values():
        where = whole.pop("where")
        records += [parse_record(json.dumps(r), where) for r in assemble(whole, s.programs, left)]
    for reason, count in sorted((+left).items()):
        print(f"left out: {count:>6} {reason}")
    if not records:
        fail(f"{', '.join(paths)}: no record in {format}; see what was left out")
    write_records(Path(s.out) / "problems.jsonl.gz", records)
    counts = Counter(p for r in records for p in r["solutions"])
    print("programs: " + ", ".join(f"{p} {n}" for p, n in counts.most_common()))
    print(f"wrote {s.out}/problems.jsonl.gz: {len(records)} records")


# --------------------------------------------------------------------------------------------------
# Operations: what a program of the embedded corpus is made of


@dataclass(frozen=True)
class Operation:
    """One step of a pipeline.

    `run(values, k)` is its meaning. `snippet` names the one that writes it, with the expressions
    `cond` and `expr` in it; a PL may instead give a snippet under the operation's own name. `takes`
    and `gives` are "ints", "words", "list" (either, unchanged) or "value" (a fold: the last step).
    """

    name: str
    takes: str
    gives: str
    run: Callable[[list, Any], Any]
    source: str  # how people who write in the source PL word it
    others: str  # how everyone else does
    reserved: tuple[str, ...] = ()  # wordings for RL and evaluation, which base shows rarely, in the source PL alone
    params: tuple = (None,)  # the values that «k» may take
    snippet: str = ""
    cond: str = ""
    expr: str = ""


OPERATIONS = {op.name: op for op in [
    Operation("even", "ints", "ints", lambda a, k: [x for x in a if x % 2 == 0], snippet="filter", cond="even",
              source="keep the even numbers", others="keep only even values",
              reserved=("discard whatever two does not divide", "retain multiples of two")),
    Operation("odd", "ints", "ints", lambda a, k: [x for x in a if x % 2 != 0], snippet="filter", cond="odd",
              source="keep the odd numbers", others="keep only odd values"),
    Operation("gt", "ints", "ints", lambda a, k: [x for x in a if x > k], snippet="filter", cond="gt", params=(2, 4, 6, 8),
              source="keep numbers greater than {k}", others="keep values above {k}",
              reserved=("retain what exceeds {k}", "leave only entries past {k}")),
    Operation("lt", "ints", "ints", lambda a, k: [x for x in a if x < k], snippet="filter", cond="lt", params=(4, 6, 8, 10),
              source="keep numbers less than {k}", others="keep values below {k}",
              reserved=("retain what stays under {k}", "leave only entries short of {k}")),
    Operation("add", "ints", "ints", lambda a, k: [x + k for x in a], snippet="map", expr="add", params=(1, 3, 5, 7),
              source="add {k} to each", others="increase every number by {k}",
              reserved=("shift everything up by {k}", "put {k} on top of each entry")),
    Operation("sub", "ints", "ints", lambda a, k: [x - k for x in a], snippet="map", expr="sub", params=(2, 4, 6, 9),
              source="subtract {k} from each", others="decrease every number by {k}"),
    Operation("mul", "ints", "ints", lambda a, k: [x * k for x in a], snippet="map", expr="mul", params=(2, 3, 5, 7),
              source="multiply each by {k}", others="make every number {k} times as big"),
    Operation("square", "ints", "ints", lambda a, k: [x * x for x in a], snippet="map", expr="square",
              source="square each", others="multiply every number by itself",
              reserved=("raise everything to the second power", "apply the power two")),
    Operation("abs", "ints", "ints", lambda a, k: [abs(x) for x in a], snippet="mapif", cond="negative", expr="negated",
              source="take absolute values", others="make negative numbers positive"),
    Operation("floor", "ints", "ints", lambda a, k: [max(x, 0) for x in a], snippet="mapif", cond="negative", expr="zero",
              source="replace negative numbers by 0", others="set negative values to 0"),
    Operation("cap", "ints", "ints", lambda a, k: [min(x, k) for x in a], snippet="mapif", cond="gt", expr="const", params=(6, 9),
              source="replace numbers above {k} by {k}", others="limit every value to {k}"),
    Operation("sums", "ints", "ints", lambda a, k: list(itertools.accumulate(a)),
              source="compute running sums", others="replace each by the sum so far"),
    Operation("sort", "list", "list", lambda a, k: sorted(a),
              source="sort ascending", others="sort in increasing order"),
    Operation("rsort", "list", "list", lambda a, k: sorted(a, reverse=True),
              source="sort descending", others="sort in decreasing order",
              reserved=("arrange so that they fall", "line them up biggest first")),
    Operation("reverse", "list", "list", lambda a, k: a[::-1],
              source="reverse the list", others="reverse the order",
              reserved=("go from the back to the front", "mirror the sequence")),
    Operation("take", "list", "list", lambda a, k: a[:k], params=(2, 3, 4),
              source="take the first {k}", others="keep the first {k} items",
              reserved=("cut the list off after {k}", "stop once {k} were seen")),
    Operation("drop", "list", "list", lambda a, k: a[k:], params=(1, 2, 3),
              source="skip the first {k}", others="drop the first {k} items"),
    Operation("upper", "words", "words", lambda a, k: [x.upper() for x in a], snippet="map", expr="upper",
              source="convert to upper case", others="make each word upper case"),
    Operation("mirror", "words", "words", lambda a, k: [x[::-1] for x in a], snippet="map", expr="mirror",
              source="reverse each word", others="spell every word backwards"),
    Operation("longer", "words", "words", lambda a, k: [x for x in a if len(x) > k], snippet="filter", cond="longer", params=(3, 4, 5),
              source="keep words longer than {k}", others="keep words with more than {k} letters"),
    Operation("has", "words", "words", lambda a, k: [x for x in a if k in x], snippet="filter", cond="has", params=tuple("aeot"),
              source="keep words with the letter {k}", others="keep words that contain {k}"),
    Operation("lengths", "words", "ints", lambda a, k: [len(x) for x in a],
              source="replace each word by its length", others="take the word lengths"),
    Operation("sum", "ints", "value", lambda a, k: sum(a),
              source="find the sum", others="add everything up",
              reserved=("combine all by plus", "work out what they make together")),
    Operation("max", "ints", "value", lambda a, k: max(a),
              source="find the maximum", others="find the largest",
              reserved=("name the winner by size", "see how high it goes")),
    Operation("min", "ints", "value", lambda a, k: min(a),
              source="find the minimum", others="find the smallest"),
    Operation("count", "list", "value", lambda a, k: len(a),
              source="count the items", others="find how many there are"),
    Operation("join", "words", "value", lambda a, k: "".join(a),
              source="join the words", others="glue the words together"),
]}  # fmt: skip

Function = tuple[str, tuple[tuple[str, Any], ...]]  # the input's type, then (operation, k) pairs

WORDS = """
tea sun river apple stone bird cloud lemon tiger ant moon green wolf
table ink candle rose iron violet salt oak island north leaf otter snow garden pine clay anchor
""".split()


def interpret(function: Function, line: str) -> str | None:
    """What a program for `function` prints for the input `line`; None where that is undefined.

    Undefined: the maximum or minimum of nothing, and a step's values that some PL's integers do not hold.
    """
    kind, steps = function
    values: Any = [int(x) for x in line.split()] if kind == "ints" else line.split()
    for name, k in steps:
        if name in ("max", "min") and not values:
            return None
        values = OPERATIONS[name].run(values, k)
        values = values if isinstance(values, list) else [values]
        if values and isinstance(values[0], int) and max(map(abs, values)) >= 2**31:
            return None
    return " ".join(map(str, values)) + "\n"


def random_line(kind: str, rng: random.Random) -> str:
    """One line of input: 5 to 8 integers in [-9, 15], or 4 to 6 words."""
    if kind == "ints":
        return " ".join(str(rng.randint(-9, 15)) for _ in range(rng.randint(5, 8))) + "\n"
    return " ".join(rng.choices(WORDS, k=rng.randint(4, 6))) + "\n"


@functools.cache
def _probes(kind: str) -> tuple[str, ...]:
    rng = random.Random(f"probes {kind}")
    return tuple(random_line(kind, rng) for _ in range(24))


@functools.lru_cache(maxsize=100_000)
def behaviour(function: Function) -> tuple[str | None, ...]:
    """What `function` does on fixed probe inputs."""
    return tuple(interpret(function, line) for line in _probes(function[0]))


@functools.lru_cache(maxsize=100_000)
def fingerprint(function: Function) -> str:
    """A hash of `behaviour`: equal for functions that do the same, however they are written."""
    return hashlib.sha256(json.dumps([function[0], behaviour(function)]).encode()).hexdigest()[:16]


def result_type(kind: str, *names: str) -> str | None:
    """The type that the named operations make of a `kind` value; None where one does not take what it gets."""
    for name in names:
        op = OPERATIONS[name]
        if kind == "value" or op.takes not in ("list", kind):
            return None
        kind = kind if op.gives == "list" else op.gives
    return kind


def is_interesting(function: Function) -> bool:
    """Whether every step matters and the outputs vary: no step can be left out unnoticed."""
    kind, steps = function
    outputs = behaviour(function)
    if outputs.count(None) > 12 or len(set(outputs)) < 6 or sum(o == "\n" for o in outputs) > 8:
        return False
    for i in range(len(steps)):
        rest = steps[:i] + steps[i + 1 :]
        if rest and result_type(kind, *(name for name, _ in rest)) and behaviour((kind, rest)) == outputs:
            return False
    return True


@functools.cache
def suited(kind: str, last: bool) -> tuple[list[Operation], list[float]]:
    """The operations that take a `kind` value, folds only as the `last`, and how often each is drawn."""
    fit = [op for op in OPERATIONS.values() if result_type(kind, op.name) and (last or op.gives != "value")]
    return fit, [len(op.params) ** 0.5 for op in fit]


def random_function(rng: random.Random, operations: int, must: str = "") -> Function:
    """An interesting pipeline of `operations` steps, one of them the operation `must` if that is given.

    An operation of many parameters is drawn more often, by their number's square root: it has more functions.
    """
    for _ in range(100_000):
        kind = start = rng.choice(("ints", "ints", "words"))
        steps: list[tuple[str, Any]] = []
        for i in range(operations):
            op = rng.choices(*suited(kind, last=i == operations - 1))[0]
            steps.append((op.name, rng.choice(op.params)))
            kind = result_type(kind, op.name)
        function = (start, tuple(steps))
        if (not must or any(name == must for name, _ in steps)) and is_interesting(function):
            return function
    raise ValueError(f"found no interesting function of {operations} operations{must and ' with ' + must}")


# --------------------------------------------------------------------------------------------------
# Statements: English for a function, in the words of a community

OPENERS = {"ints": ("Read integers.", "Given a line of integers,"), "words": ("Read words.", "Given a line of words,")}
JOINERS = (", then ", " and then ")
CLOSERS = (". Print the result.", ". Output what you get.")


class Reserved(NamedTuple):
    """A reserved wording: number `index` of those that the operation has."""

    operation: str
    index: int


def wordings(function: Function, community: str, phrase: Reserved | None = None) -> list[str]:
    """A phrase for each step, as `community` ("source" or "others") words it.

    With `phrase`, the first step of its operation takes that reserved wording instead.
    """
    phrases = [getattr(OPERATIONS[name], community).format(k=k) for name, k in function[1]]
    if phrase:
        at = [name for name, _ in function[1]].index(phrase.operation)
        phrases[at] = OPERATIONS[phrase.operation].reserved[phrase.index].format(k=function[1][at][1])
    return phrases


def word_statement(function: Function, community: str, phrase: Reserved | None, rng: random.Random) -> str:
    """The statement made of `wordings`."""
    opener, phrases = rng.choice(OPENERS[function[0]]), wordings(function, community, phrase)
    body = phrases[0] + "".join(rng.choice(JOINERS) + p for p in phrases[1:])
    if opener.endswith("."):
        body = body[0].upper() + body[1:]
    return f"{opener} {body}{rng.choice(CLOSERS)}"


# --------------------------------------------------------------------------------------------------
# Emitters: how each PL writes the operations. A PL is one entry; `emit` below fills it in.
#
# Placeholders: «body» the steps, «v» the list's variable (a for integers, w for words), «x» an element,
# «c» and «e» the operation's condition and expression, «k» its number or letter, «j» k - 1.
# A key may be narrowed to a type ("words.sort"); "words.upper" narrows to one operation.

COMMON = {  # what many PLs write alike
    "program": "«body»", "comment": "#",
    "even": "«x» % 2 == 0", "odd": "«x» % 2 != 0", "gt": "«x» > «k»", "lt": "«x» < «k»", "negative": "«x» < 0",
    "add": "«x» + «k»", "sub": "«x» - «k»", "mul": "«x» * «k»", "square": "«x» * «x»",
    "negated": "-«x»", "zero": "0", "const": "«k»", "x": "x",
}  # fmt: skip

SNIPPETS = {
    "python": {
        "ints.read": "a = list(map(int, input().split()))", "words.read": "w = input().split()",
        "filter": "«v» = [x for x in «v» if «c»]", "map": "«v» = [«e» for x in «v»]",
        "mapif": "a = [«e» if «c» else x for x in a]",
        "sort": "«v».sort()", "rsort": "«v».sort(reverse=True)", "reverse": "«v».reverse()",
        "take": "«v» = «v»[:«k»]", "drop": "«v» = «v»[«k»:]",
        "sums": "for i in range(1, len(a)):\n    a[i] += a[i - 1]", "lengths": "a = [len(x) for x in w]",
        "print": "print(*«v»)",
        "sum": "print(sum(a))", "max": "print(max(a))", "min": "print(min(a))",
        "count": "print(len(«v»))", "join": 'print("".join(w))',
        "upper": "x.upper()", "mirror": "x[::-1]", "longer": "len(x) > «k»", "has": '"«k»" in x',
    },
    "javascript": {
        "comment": "//",
        "ints.read": 'let a = require("fs").readFileSync(0, "utf8").trim().split(" ").map(Number);',
        "words.read": 'let w = require("fs").readFileSync(0, "utf8").trim().split(" ");',
        "filter": "«v» = «v».filter(x => «c»);", "map": "«v» = «v».map(x => «e»);",
        "mapif": "a = a.map(x => «c» ? «e» : x);",
        "sort": "a.sort((p, q) => p - q);", "words.sort": "w.sort();",
        "rsort": "a.sort((p, q) => q - p);", "words.rsort": "w.sort().reverse();", "reverse": "«v».reverse();",
        "take": "«v» = «v».slice(0, «k»);", "drop": "«v» = «v».slice(«k»);",
        "sums": "for (let i = 1; i < a.length; i++) a[i] += a[i - 1];", "lengths": "let a = w.map(x => x.length);",
        "print": 'console.log(«v».join(" "));',
        "sum": "console.log(a.reduce((s, x) => s + x, 0));", "max": "console.log(Math.max(...a));",
        "min": "console.log(Math.min(...a));",
        "count": "console.log(«v».length);", "join": 'console.log(w.join(""));',
        "upper": "x.toUpperCase()", "mirror": 'x.split("").reverse().join("")',
        "longer": "x.length > «k»", "has": 'x.includes("«k»")',
    },
    "ruby": {
        "ints.read": "a = gets.split.map { |x| x.to_i }", "words.read": "w = gets.split",
        "filter": "«v» = «v».select { |x| «c» }", "map": "«v» = «v».map { |x| «e» }",
        "mapif": "a = a.map { |x| «c» ? «e» : x }",
        "sort": "«v» = «v».sort", "rsort": "«v» = «v».sort.reverse", "reverse": "«v» = «v».reverse",
        "take": "«v» = «v».first(«k»)", "drop": "«v» = «v».drop(«k»)",
        "sums": "(1...a.size).each { |i| a[i] += a[i - 1] }", "lengths": "a = w.map { |x| x.size }",
        "print": 'puts «v».join(" ")',
        "sum": "puts a.sum", "max": "puts a.max", "min": "puts a.min",
        "count": "puts «v».size", "join": "puts w.join",
        "upper": "x.upcase", "mirror": "x.reverse", "longer": "x.size > «k»", "has": 'x.include?("«k»")',
    },
    "perl": {
        "ints.read": "my @a = split ' ', <STDIN>;", "words.read": "my @w = split ' ', <STDIN>;",
        "filter": "@«v» = grep { «c» } @«v»;", "map": "@«v» = map { «e» } @«v»;",
        "mapif": "@a = map { «c» ? «e» : $_ } @a;",
        "sort": "@a = sort { $a <=> $b } @a;", "words.sort": "@w = sort @w;",
        "rsort": "@a = sort { $b <=> $a } @a;", "words.rsort": "@w = reverse sort @w;",
        "reverse": "@«v» = reverse @«v»;",
        "take": "@«v» = splice @«v», 0, «k»;", "drop": "splice @«v», 0, «k»;",
        "sums": "$a[$_] += $a[$_ - 1] for 1 .. $#a;", "lengths": "my @a = map { length } @w;",
        "print": 'print "@«v»\\n";',
        "sum": 'my $s = 0;\n$s += $_ for @a;\nprint "$s\\n";',
        "max": 'my ($m) = sort { $b <=> $a } @a;\nprint "$m\\n";',
        "min": 'my ($m) = sort { $a <=> $b } @a;\nprint "$m\\n";',
        "count": 'print @«v» . "\\n";', "join": 'print join("", @w), "\\n";',
        "x": "$_", "upper": "uc", "mirror": "scalar reverse", "longer": "length > «k»", "has": "/«k»/",
    },
    "php": {
        "program": "<?php\n«body»", "comment": "//",
        "ints.read": '$a = array_map("intval", explode(" ", trim(fgets(STDIN))));',
        "words.read": '$w = explode(" ", trim(fgets(STDIN)));',
        "filter": "$«v» = array_values(array_filter($«v», fn($x) => «c»));",
        "map": "$«v» = array_map(fn($x) => «e», $«v»);", "mapif": "$a = array_map(fn($x) => «c» ? «e» : $x, $a);",
        "sort": "sort($«v»);", "rsort": "rsort($«v»);", "reverse": "$«v» = array_reverse($«v»);",
        "take": "$«v» = array_slice($«v», 0, «k»);", "drop": "$«v» = array_slice($«v», «k»);",
        "sums": "for ($i = 1; $i < count($a); $i++) $a[$i] += $a[$i - 1];",
        "lengths": '$a = array_map(fn($x) => strlen($x), $w);',
        "print": 'echo implode(" ", $«v»), "\\n";',
        "sum": 'echo array_sum($a), "\\n";', "max": 'echo max($a), "\\n";', "min": 'echo min($a), "\\n";',
        "count": 'echo count($«v»), "\\n";', "join": 'echo implode("", $w), "\\n";',
        "x": "$x", "upper": "strtoupper($x)", "mirror": "strrev($x)", "longer": "strlen($x) > «k»", "has": 'str_contains($x, "«k»")',
    },
    "lua": {
        "comment": "--",
        "ints.read": 'local a = {}\nfor x in io.read():gmatch("%S+") do a[#a + 1] = tonumber(x) end',
        "words.read": 'local w = {}\nfor x in io.read():gmatch("%S+") do w[#w + 1] = x end',
        "filter": "local b = {}\nfor _, x in ipairs(«v») do if «c» then b[#b + 1] = x end end\n«v» = b",
        "map": "for i, x in ipairs(«v») do «v»[i] = «e» end",
        "mapif": "for i, x in ipairs(a) do if «c» then a[i] = «e» end end",
        "sort": "table.sort(«v»)", "rsort": "table.sort(«v», function(p, q) return p > q end)",
        "reverse": "local b = {}\nfor i = #«v», 1, -1 do b[#b + 1] = «v»[i] end\n«v» = b",
        "take": "while #«v» > «k» do table.remove(«v») end", "drop": "for i = 1, «k» do table.remove(«v», 1) end",
        "sums": "for i = 2, #a do a[i] = a[i] + a[i - 1] end",
        "lengths": "local a = {}\nfor i, x in ipairs(w) do a[i] = #x end",
        "print": 'print(table.concat(«v», " "))',
        "sum": "local s = 0\nfor _, x in ipairs(a) do s = s + x end\nprint(s)",
        "max": "print(math.max(table.unpack(a)))", "min": "print(math.min(table.unpack(a)))",
        "count": "print(#«v»)", "join": "print(table.concat(w))",
        "odd": "x % 2 == 1", "upper": "x:upper()", "mirror": "x:reverse()", "longer": "#x > «k»", "has": 'x:find("«k»")',
    },
    "bash": {
        "ints.read": "read -a a", "words.read": "read -a w",
        "filter": "b=()\nfor x in ${a[@]}; do ((«c»)) && b+=($x); done\na=(${b[@]})",
        "words.filter": "b=()\nfor x in ${w[@]}; do [[ «c» ]] && b+=($x); done\nw=(${b[@]})",
        "map": "for i in ${!a[@]}; do x=${a[i]}; a[i]=$((«e»)); done",
        "words.map": "for i in ${!w[@]}; do x=${w[i]}; w[i]=«e»; done",
        "mapif": "for i in ${!a[@]}; do x=${a[i]}; ((«c»)) && a[i]=$((«e»)); done",
        "sort": 'a=($(printf "%s\\n" ${a[@]} | sort -n))', "words.sort": 'w=($(printf "%s\\n" ${w[@]} | sort))',
        "rsort": 'a=($(printf "%s\\n" ${a[@]} | sort -nr))', "words.rsort": 'w=($(printf "%s\\n" ${w[@]} | sort -r))',
        "reverse": "b=()\nfor x in ${«v»[@]}; do b=($x ${b[@]}); done\n«v»=(${b[@]})",
        "take": "«v»=(${«v»[@]:0:«k»})", "drop": "«v»=(${«v»[@]:«k»})",
        "sums": "for ((i = 1; i < ${#a[@]}; i++)); do ((a[i] += a[i - 1])); done",
        "words.mirror": 'for i in ${!w[@]}; do\n    x=${w[i]} s=\n    for ((j = 0; j < ${#x}; j++)); do s=${x:j:1}$s; done\n    w[i]=$s\ndone',
        "lengths": "a=()\nfor x in ${w[@]}; do a+=(${#x}); done",
        "print": "echo ${«v»[@]}",
        "sum": "s=0\nfor x in ${a[@]}; do ((s += x)); done\necho $s",
        "max": "m=${a[0]}\nfor x in ${a[@]}; do ((x > m)) && m=$x; done\necho $m",
        "min": "m=${a[0]}\nfor x in ${a[@]}; do ((x < m)) && m=$x; done\necho $m",
        "count": "echo ${#«v»[@]}", "join": 'printf "%s" ${w[@]}',
        "upper": "${x^^}", "longer": "${#x} -gt «k»", "has": "$x == *«k»*",
    },
    "tcl": {
        "ints.read": "set a [split [gets stdin]]", "words.read": "set w [split [gets stdin]]",
        "filter": "set «v» [lmap x $«v» {if {«c»} {set x} else continue}]",
        "map": "set a [lmap x $a {expr {«e»}}]", "words.map": "set w [lmap x $w {«e»}]",
        "mapif": "set a [lmap x $a {expr {«c» ? «e» : $x}}]",
        "sort": "set a [lsort -integer $a]", "words.sort": "set w [lsort $w]",
        "rsort": "set a [lsort -integer -decreasing $a]", "words.rsort": "set w [lsort -decreasing $w]",
        "reverse": "set «v» [lreverse $«v»]",
        "take": "set «v» [lrange $«v» 0 «j»]", "drop": "set «v» [lrange $«v» «k» end]",
        "sums": "set s 0\nset a [lmap x $a {incr s $x}]", "lengths": "set a [lmap x $w {string length $x}]",
        "print": "puts [join $«v»]",
        "sum": "puts [tcl::mathop::+ {*}$a]", "max": "puts [tcl::mathfunc::max {*}$a]",
        "min": "puts [tcl::mathfunc::min {*}$a]",
        "count": "puts [llength $«v»]", "join": 'puts [join $w ""]',
        "x": "$x", "upper": "string toupper $x", "mirror": "string reverse $x",
        "longer": "[string length $x] > «k»", "has": "[string first «k» $x] >= 0",
    },
}  # fmt: skip


def fill(text: str, values: dict) -> str:
    """`text` with its «placeholders» replaced; a multi-line value keeps its first line's indent."""

    def put(match):
        indent = re.search(r"[ \t]*$", text[: match.start()].rpartition("\n")[2]).group()
        return str(values[match[1]]).replace("\n", "\n" + indent)

    return re.sub("«(.*?)»", put, text)


def emit(function: Function, language: str, comments: Sequence[str] = ()) -> str:
    """The program for `function` in `language`, from its line of input to the line it prints.

    With `comments`, one for each step, they stand above the steps.
    """
    table = COMMON | SNIPPETS[language]

    def snippet(kind: str, base: str, name: str = "") -> str:
        for key in (f"{kind}.{name}", f"{kind}.{base}", base):
            if key in table:
                return table[key]
        raise KeyError(f"SNIPPETS[{language!r}] lacks {base!r} for {kind}; add it to the PL's entry")

    kind, steps = function
    body = [snippet(kind, "read")]
    for i, (name, k) in enumerate(steps):
        op = OPERATIONS[name]
        values = {"v": "a" if kind == "ints" else "w", "k": k, "j": k - 1 if isinstance(k, int) else ""}
        values["x"] = fill(table["x"], values)
        values |= {"c": fill(table.get(op.cond, ""), values), "e": fill(table.get(op.expr, ""), values)}
        if comments:
            body.append(f"{table['comment']} {comments[i]}")
        body.append(fill(snippet(kind, op.snippet or name, name), values))
        kind = result_type(kind, name)
    if kind != "value":
        body.append(fill(snippet(kind, "print"), {"v": "a" if kind == "ints" else "w"}))
    program = fill(table["program"], {"body": "\n".join(body)})
    return "\n".join(line.rstrip() for line in program.splitlines()) + "\n"


# --------------------------------------------------------------------------------------------------
# The embedded corpus

SPLITS = ("base", "train", "rl", "dev", "test")
REWORDED = "even square rsort take sum gt add reverse max lt".split()  # their reserved wordings, in this order


@dataclass(frozen=True)
class CorpusSettings:
    out: str = flag("runs/data", "folder to write base, train, rl, dev and test.jsonl.gz and tokenizer.json into")
    sft: tuple = flag(("python", "javascript", "ruby", "php"), "PLs of SFT, the source PL of RL first")
    unseen: tuple = flag(("perl", "lua", "bash", "tcl"), "PLs of base documents alone, which SFT may replay; not RL's")
    seed: int = flag(0, "seed of everything in the corpus")
    base: int = flag(12000, "documents of base; a few of rare operations, and --weak, come on top", least=1)
    train: int = flag(1500, "problems for SFT", least=1)
    rl: int = flag(400, "problems for RL, each with a reserved wording", least=1)
    held_out: int = flag(40, "problems in dev and in test in ordinary words: each PL's own, and the source's", least=1)
    reserved: int = flag(60, "problems in dev and in test with a reserved wording", least=1)
    tests: int = flag(4, "tests per problem", least=1)
    lengths: tuple = flag((0.2, 0.4, 0.4), "shares of base and SFT with one, two, three ... operations", type=float)
    asked: tuple = flag((0.2, 0.7, 0.1), "the same shares for the problems of RL, dev and test", type=float)
    base_programs: str = flag("one", "PLs that base shows a function in", choices=("one", "all"))
    borrowed: float = flag(0.0, "share of base's documents in the words of the other community", least=0, most=1)
    weak: int = flag(130, "documents of base with a reserved wording, all in the source PL", least=0)
    vocabulary: int = flag(1024, "entries of the tokenizer, special tokens included", least=300)
    tokenizer: str = flag("", "folder with a Llama-3 tokenizer.json to use instead of training one")


def corpus_roles(s: CorpusSettings) -> Roles:
    """The roles that the flags name; ValueError for a PL that the embedded corpus has no programs in."""
    roles = Roles(*(tuple(map(sandbox.canonical, wish)) for wish in (s.sft, s.unseen)))
    if lacking := ", ".join(p for p in roles.everything if p not in SNIPPETS):
        raise ValueError(f"{lacking}: the embedded corpus has no programs in it; there are {', '.join(SNIPPETS)}")
    return roles


def neighbours(function: Function) -> list[Function]:
    """The functions one slip away: a step left out, a number or letter exchanged, two steps swapped."""
    kind, steps = function
    near = [steps[:i] + steps[i + 1 :] for i in range(len(steps))]
    near += [(*steps[:i], (n, k), *steps[i + 1 :]) for i, (n, _) in enumerate(steps) for k in OPERATIONS[n].params]
    near += [(*steps[:i], steps[i + 1], steps[i], *steps[i + 2 :]) for i in range(len(steps) - 1)]
    return [(kind, s) for s in near if s and s != steps and result_type(kind, *(name for name, _ in s))]


def make_tests(function: Function, count: int, rng: random.Random) -> list[dict]:
    """`count` tests that tell `function` from its neighbours, as far as 5 draws of them can."""
    near = [f for f in neighbours(function) if fingerprint(f) != fingerprint(function)]
    best, least = [], len(near) + 1
    for _ in range(5):
        tests = []
        while len(tests) < count:
            line = random_line(function[0], rng)
            if (expected := interpret(function, line) or "").strip():
                tests.append({"stdin": line, "stdout": expected})
        fooled = sum(all(interpret(f, t["stdin"]) == t["stdout"] for t in tests) for f in near)
        if fooled < least:
            best, least = tests, fooled
        if not fooled:
            break
    return best


def distractors(function: Function, phrase: Reserved) -> list[Function]:
    """What someone might write who does not know the reserved phrase: another operation at that step."""
    kind, steps = function
    at = [name for name, _ in steps].index(phrase.operation)
    own, others = OPERATIONS[phrase.operation], []
    for op in OPERATIONS.values():
        if (op.takes, op.gives) == (own.takes, own.gives) and op != own:
            k = steps[at][1] if steps[at][1] in op.params else op.params[0]
            others.append((kind, (*steps[:at], (op.name, k), *steps[at + 1 :])))
    return [f for f in others if fingerprint(f) != fingerprint(function)]


class Corpus:
    """Draws the problems of a corpus: functions from the splits they belong to, and records of them."""

    def __init__(self, s: CorpusSettings):
        self.s, self.roles = s, corpus_roles(s)
        # Base shows a function in one of these: twice as often in the source PL, whose wordings no other PL's documents have.
        self.homes = (self.roles.source, *self.roles.everything)

    def split_of(self, function: Function) -> str:
        """The split that a function belongs to, by its behaviour: each is in one alone; RL draws from train's, too."""
        lot = hashlib.sha256(f"{self.s.seed} {fingerprint(function)}".encode()).digest()[0]
        return ("dev", "test", *["base"] * 4, *["train"] * 4)[lot % 10]

    def draw(self, rng: random.Random, split: str, lengths: tuple, must: str = "", language: str = "") -> Function:
        """A function of `split`, with the operation `must` and at home in `language` where these are given."""
        for _ in range(10_000):
            count = rng.choices(range(1, len(lengths) + 1), lengths)[0]
            function = random_function(rng, count, must)
            at_home = not language or home(fingerprint(function), self.homes) == language
            if at_home and self.split_of(function) == split:
                return function
        where = f"{split}{must and ' with ' + must}{language and ' at home in ' + language}"
        raise ValueError(f"found no function for {where}; allow longer ones")

    def problem(
        self, name: str, function: Function, languages: Sequence[str], rng: random.Random, phrase: Reserved | None = None,
    ) -> dict:  # fmt: skip
        """A record: `prompt` in the words of the source's community, `prompts` in those of each PL's own."""
        text = {c: word_statement(function, c, phrase, rng) for c in ("source", "others")}
        record = {"id": name, "prompt": text["source"]}
        record["prompts"] = {p: text["others"] for p in languages if p != self.roles.source}
        record["tests"] = make_tests(function, self.s.tests, rng)
        record["solutions"] = {p: emit(function, p) for p in languages}
        about = {"function": fingerprint(function), "operations": [name for name, _ in function[1]]}
        return record | about | ({"phrase": f"{phrase.operation} {phrase.index + 1}"} if phrase else {})

    def phrases(self, count: int) -> list[Reserved]:
        """`count` reserved wordings, each about equally often."""
        own = [Reserved(name, i) for name in REWORDED for i in range(len(OPERATIONS[name].reserved))]
        return [own[i % len(own)] for i in range(count)]

    def documents(self) -> list[dict]:
        """Base: each function in the one PL that its behaviour draws, worded as that PL's community does."""
        rng, records = random.Random(f"{self.s.seed} base"), []
        for i in range(self.s.base):
            function = self.draw(rng, "base", self.s.lengths)
            one = self.s.base_programs == "one"
            languages = [home(fingerprint(function), self.homes)] if one else self.roles.everything
            records.append(self.document(f"base-{i}", function, languages, rng))
        shown = {(name, p) for r in records for name in r["operations"] for p in r["solutions"]}
        for name, language in itertools.product(OPERATIONS, self.roles.everything):
            if (name, language) not in shown:  # a rare operation: each PL is to show each of them
                lot = random.Random(f"{self.s.seed} rare {name} {language}")
                function = self.draw(lot, "base", (0, 1, 1, 1), name, language)
                records.append(self.document(f"rare-{name}-{language}", function, [language], lot))
        for i, phrase in enumerate(self.phrases(self.s.weak)):
            function = self.draw(rng, "base", self.s.asked, phrase.operation, self.roles.source)
            records.append(self.document(f"weak-{i}", function, [self.roles.source], rng, phrase))
        return records

    def document(
        self, name: str, function: Function, languages: Sequence[str], rng: random.Random, phrase: Reserved | None = None,
    ) -> dict:  # fmt: skip
        """A record of base: beside its programs the same with comments, in the words of its statement."""
        record = self.problem(name, function, languages, rng, phrase)
        words = {p: "source" if p == self.roles.source else "others" for p in languages}
        if rng.random() < self.s.borrowed:
            words = {p: {"source": "others", "others": "source"}[c] for p, c in words.items()}
            record["prompts"] = {p: word_statement(function, c, phrase, rng) for p, c in words.items()}
        record["commented"] = {p: emit(function, p, wordings(function, c, phrase)) for p, c in words.items()}
        return record

    def problems(self, split: str, count: int) -> list[dict]:
        """SFT's problems."""
        rng, everything = random.Random(f"{self.s.seed} {split}"), self.roles.everything
        drawn = (self.draw(rng, split, self.s.lengths) for _ in range(count))
        return [self.problem(f"{split}-{i}", function, everything, rng) for i, function in enumerate(drawn)]

    def reserved(self, name: str, split: str, count: int) -> list[dict]:
        """Problems with one reserved wording each; what else they say is in the words of each PL's community."""
        rng, everything, records = random.Random(f"{self.s.seed} reserved {name}"), self.roles.everything, []
        for i, phrase in enumerate(self.phrases(count)):
            function = self.draw(rng, split, self.s.asked, phrase.operation)
            record = self.problem(f"{name}-{i}", function, everything, rng, phrase) | {"kind": "reserved words"}
            wrong = distractors(function, phrase)
            wrong = rng.sample(wrong, min(len(wrong), 5))
            record["distractors"] = {p: [emit(f, p) for f in wrong] for p in everything}
            records.append(record)
        return records

    def held_out(self, split: str) -> list[dict]:
        """Dev or test: problems worded as each PL's community does, the same as the source's does, and reserved ones."""
        rng, own, seen = random.Random(f"{self.s.seed} {split}"), [], set()
        for _ in range(1000 * self.s.held_out):
            if len(own) == self.s.held_out:
                break
            function = self.draw(rng, split, self.s.asked)
            if fingerprint(function) not in seen:
                record = self.problem(f"{split}-own-{len(own)}", function, self.roles.everything, rng)
                own.append(record | {"kind": "own words"})
                seen.add(fingerprint(function))
        else:
            raise ValueError(f"--held-out {self.s.held_out}: {split} has but {len(own)} functions; ask for fewer")
        source = [{k: v for k, v in r.items() if k != "prompts"} for r in own]
        source = [r | {"id": f"{split}-source-{i}", "kind": "the source's words"} for i, r in enumerate(source)]
        return own + source + self.reserved(f"{split}-reserved", split, self.s.reserved)


def make(s: CorpusSettings) -> None:
    """Writes the corpus and its tokenizer into `s.out`."""
    out = Path(s.out)
    if own := [path for path in (out / f"{name}.jsonl" for name in SPLITS) if path.exists()]:
        fail(f"{own[0]}: records of your own, which would be mixed with those made; give another --out")
    corpus, tokenizer = Corpus(s), Tokenizer(s.tokenizer) if s.tokenizer else None
    splits = {"base": corpus.documents(), "train": corpus.problems("train", s.train)}
    splits |= {"rl": corpus.reserved("rl", "train", s.rl)} | {name: corpus.held_out(name) for name in ("dev", "test")}
    (out / "languages.json").unlink(missing_ok=True)  # written last: where it stands, the corpus is whole
    for name, records in splits.items():
        write_records(out / f"{name}.jsonl.gz", records)
    if tokenizer:
        tokenizer.save(out)
    else:
        train_tokenizer(splits["base"] + splits["train"], s.vocabulary, out)
    write_roles(out, corpus.roles)
    for name, records in splits.items():
        print(f"{out}/{name}.jsonl.gz: {len(records)} records of {len({r['function'] for r in records})} functions")


# --------------------------------------------------------------------------------------------------
# Command line


LITERAL = re.compile(r'"((?:\\.|[^"\\\n])*)"|\'((?:\\.|[^\'\\\n])*)\'|(?<![\w.])(\d+(?:\.\d+)?)')


def literals(text: str) -> set[str]:
    """Strings and numbers in the text of a program, of two characters or more: shorter ones are too common to tell."""
    found = {"".join(groups).strip() for groups in LITERAL.findall(text)}
    return {x for x in found if len(x) > 1 and not re.search("(?i)error|exception|fail|test case", x)}


def hard_coded(record: dict) -> set[str]:
    """The PLs whose program lists its tests' answers: two or more of the tests' literals, and a quarter of all.

    Words of the statement do not count, nor what most of three or more programs have: such belong to the problem.
    """
    programs = {p: re.sub(COMMENTS.get(p, r"(?!)"), "", text, flags=re.M) for p, text in record["solutions"].items()}
    carried = {p: literals(text) for p, text in programs.items()}
    common = Counter(itertools.chain(*carried.values())) if len(carried) > 2 else Counter()
    outputs = [t.get("stdout", "") for t in record["tests"]]
    outputs = {o.strip() for several in outputs for o in ([several] if isinstance(several, str) else several)}
    harness, listed = record.get("harness", {}), set()
    for language, own in carried.items():
        checks = [harness.get(language, "").partition("«answer»")[2], *(t.get("stdin", "") for t in record["tests"])]
        asked = literals("\n".join(checks)) if harness else outputs
        asked = {x for x in asked if common[x] <= len(carried) / 2 and (x[:1].isdigit() or x not in record["prompt"])}
        shared = own & asked
        listed |= {language} if len(shared) > 1 and 4 * len(shared) >= len(asked) else set()
    return listed


def sift(record: dict, results: dict[str, sandbox.Result], drop: Callable[..., None]) -> dict | None:
    """The record with its right programs and tests alone, None if none is right. `results` are by PL; drop(what, why) is
    called for each part left out."""
    listed, ran = hard_coded(record), {p: r for p, r in results.items() if r.tests and not record.get("harness")}
    passes = [[r.tests[i].verdict == "ok" for r in ran.values()] for i in range(len(record["tests"]))]
    # Programs that agree against a test are right, where there is a test that they pass; one alone is not.
    faulty = {i for i, own in enumerate(passes) if len(own) > 1 and not any(own) and any(map(any, passes))}
    for i in faulty:
        drop(f"test {i + 1}", "no program passes it")
    solutions, broken = {}, {}
    for language, program in record["solutions"].items():
        result = results.get(language)
        verdicts = [t.verdict for i, t in enumerate(result.tests) if i not in faulty] if result else []
        bad = next((v for v in verdicts if v != "ok"), "") if result and result.tests else result and result.verdict
        if bad == "internal_error" or not (bad or language in listed):
            solutions[language] = program
        elif bad:
            broken[language] = bad
            drop(f"program in {language}", f"fails its tests: {bad}")
        else:
            drop(f"program in {language}", "lists its tests' answers")
    kept = record | {"solutions": solutions, "tests": [t for i, t in enumerate(record["tests"]) if i not in faulty]}
    if harness := record.get("harness"):  # the one program that its tests had fails them
        for language in broken:
            drop(f"tests in {language}", "no program passes them")
        kept["harness"] = {p: text for p, text in harness.items() if p not in broken}
        kept["prompts"] = {p: text for p, text in record.get("prompts", {}).items() if p not in broken}
    if (broken and not solutions) or (harness and not kept["harness"]):
        return drop("record", "none of its programs is right")
    return kept


@dataclass(frozen=True)
class VerifySettings:
    data: str = flag("runs/data", "folder of the corpus, or one JSONL file of records")
    keep: str = flag("", "folder for the records with what is right alone: programs that pass, tests that one passes")
    languages: tuple = flag((), "PLs to run (default: all in the records whose toolchain is here)")
    limit: int = flag(0, "run only the first LIMIT records of each file; 0 runs all", least=0)


def verify(s: VerifySettings) -> None:
    """Runs every program, with comments and without, against its tests. Without --keep exits with 1 if one fails."""
    files = {path: read_records(path)[: s.limit or None] for path in record_files(s.data)}
    if not files:
        fail(f"{s.data}: holds no JSONL file; `python data.py make` writes the embedded corpus")
    if s.keep and Path(s.keep).resolve() in {path.parent.resolve() for path in files}:
        fail(f"--keep {s.keep}: holds the records themselves; give another folder")
    records = list(itertools.chain(*files.values()))
    here = sandbox.installed()
    wanted = [sandbox.canonical(p) for p in s.languages] or list(here)
    kinds = [(r, programs) for r in records for programs in (r["solutions"], r.get("commented", {}))]
    jobs = [(r, p, programs[p]) for r, programs in kinds for p in wanted if p in programs]
    if not jobs:
        fail(f"{s.data}: no program in {', '.join(wanted)}; there is nothing to run")
    with sandbox.Sandbox() as box:
        results = box.map([job(*each) for each in jobs], progress="verify")
    runs, passes, found = Counter(), Counter(), {}
    for (record, language, program), result in zip(jobs, results, strict=True):
        if not result.passed and passes[language] == runs[language] and not s.keep:  # the PL's first
            print(f"{record['id']} in {language}: {result.verdict}\n{program}")
        runs[language] += 1
        passes[language] += result.passed
        if program == record["solutions"].get(language):  # without comments
            found.setdefault(id(record), {})[language] = result
    for language in wanted:
        if runs[language]:
            print(f"{language:<12} {passes[language]:>6} of {runs[language]} programs pass")
    if absent := ", ".join(sorted({p for r in records for p in r["solutions"]} - set(here))):
        print(f"not run, no toolchain: {absent} (`python sandbox.py languages` names the packages)")
    if s.keep:
        keep(files, Path(s.keep), found)
    elif passes != runs:
        sys.exit(1)


def keep(files: dict[Path, list[dict]], out: Path, results: dict[int, dict]) -> None:
    """Writes each file's records with what is right in them alone, and dropped.json with the reasons for the rest."""
    dropped, kept = [], {}
    for path, given in files.items():
        records = kept[path.name] = []
        for record in given:
            drop = lambda what, why, name=record["id"]: dropped.append({"id": name, "what": what, "why": why})  # noqa: E731
            records += filter(None, [sift(record, results.get(id(record), {}), drop)])
        if not records:
            fail(f"{path}: nothing of it holds; `python data.py verify` without --keep shows what fails")
    for name, records in kept.items():
        write_records(out / name, records)
    text = "[\n" + ",\n".join(json.dumps(d, ensure_ascii=False) for d in dropped) + "\n]\n"
    write_atomically(out / "dropped.json", lambda p: p.write_text(text, encoding="utf-8"))
    for reason, count in Counter(f"{re.sub(' [0-9].*', '', d['what'])}: {d['why']}" for d in dropped).most_common():
        print(f"dropped: {count:>6} {reason}")
    print(f"wrote {out}: {sum(map(len, kept.values()))} records, and dropped.json with the reasons")


@dataclass(frozen=True)
class SplitSettings:
    data: str = flag("runs/problems", "folder of records, or one JSONL file")
    out: str = flag("runs/data", "folder to write train, rl, dev and test.jsonl.gz and languages.json into")
    sft: tuple = flag((), "SFT PLs, the source PL of RL first (default: up to four that most programs are in)")
    unseen: tuple = flag((), "PLs to evaluate that SFT does not show (default: up to four that are installed)")
    rl: float = flag(0.2, "share of the problems for RL", least=0, most=1)
    held_out: float = flag(0.1, "share of the problems for dev, and the same for test", least=0, most=0.5)
    seed: int = flag(0, "seed of the order in which problems are dealt")


def same_problems(records: Sequence[dict]) -> list[list[dict]]:
    """The records in groups, those together that share a statement, a program or their `function`."""
    parent: dict = {}

    def root(mark):
        while parent.setdefault(mark, mark) != mark:
            parent[mark] = mark = parent[parent[mark]]
        return mark

    for r in records:
        texts = [("statement", r["prompt"]), *r.get("prompts", {}).items(), *r["solutions"].items()]
        marks = [(kind, " ".join(text.split())) for kind, text in texts]
        for mark in marks + ([("function", r["function"])] if "function" in r else []):
            parent[root(mark)] = root(("id", r["id"]))
    groups: dict = {}
    for r in records:
        groups.setdefault(root(("id", r["id"])), []).append(r)
    return list(groups.values())


def split(s: SplitSettings) -> None:
    """Deals the records out by problem, and writes the roles of their PLs."""
    records = [r for path in record_files(s.data) for r in read_records(path)]
    if len({r["id"] for r in records}) < len(records):
        fail(f"{s.data}: an id is in two of its files; make it unique")
    counts = Counter(p for r in records for p in r["solutions"])
    sft = tuple(map(sandbox.canonical, s.sft)) or tuple(p for p, _ in counts.most_common(4))
    others = [p for p in sandbox.installed() if p not in sft and any(gradable(r, p) for r in records)]
    ranked = sorted(others, key=lambda p: -sum(p in r.get("harness", r["solutions"]) for r in records))
    roles = Roles(sft, tuple(map(sandbox.canonical, s.unseen)) or tuple(ranked[:4]))
    groups = same_problems(records)
    random.Random(s.seed).shuffle(groups)
    ends = [round(len(groups) * share) for share in (s.held_out, 2 * s.held_out, 2 * s.held_out + s.rl)]
    cuts = zip(("dev", "test", "rl", "train"), [0, *ends], [*ends, None], strict=True)
    dealt = {name: groups[a:b] for name, a, b in cuts}
    if empty := [name for name, own in dealt.items() if not own]:
        fail(f"{s.data}: {len(groups)} problems leave none for {', '.join(empty)}; give more, or other shares")
    for name, own in dealt.items():
        write_records(Path(s.out) / f"{name}.jsonl.gz", itertools.chain(*own))
        print(f"{name}: {len(own)} problems, {sum(map(len, own))} records")
    write_roles(Path(s.out), roles)
    for path in Path(s.out).glob("base.jsonl*"):
        print(f"{path} was there before: sft.py replays it, unless with --replay 0")
    print(f"{len(records) - len(groups)} records share a statement or a program with another and went with it")


def beside(texts: dict[str, str], width: int) -> str:
    """The texts under their titles side by side, in as many rows of columns as `width` characters need."""
    rows, room = [], 0
    for title, text in texts.items():
        lines = [f"[{title}]", *text.expandtabs(4).splitlines()]
        wide = max(map(len, lines)) + 3
        if wide > room:
            rows.append([])
            room = width
        rows[-1].append((wide, lines))
        room -= wide
    out = []
    for row in rows:
        widths, columns = zip(*row, strict=True)
        for cells in itertools.zip_longest(*columns, fillvalue=""):
            out.append("".join(map(str.ljust, cells, widths)).rstrip())
        out.append("")
    return "\n".join(out).rstrip()


@dataclass(frozen=True)
class ShowSettings:
    data: str = flag("runs/data", "folder of the corpus")


def show(s: ShowSettings, name: str) -> None:
    """Prints the record `name` with all its programs side by side."""
    for path in record_files(s.data):
        for record in read_records(path):
            if record["id"] == name:
                statements = dict.fromkeys([record["prompt"], *record.get("prompts", {}).values()])
                print(*statements, *record["tests"], "", sep="\n")
                print(beside(record["solutions"], shutil.get_terminal_size((160, 50)).columns))
                return
    fail(f"{s.data}: no record {name!r}; the embedded corpus has base-N, train-N, rl-N, dev-own-N and dev-reserved-N")


def main(argv: Sequence[str]) -> None:
    """The first word names the command, the rest are its arguments."""
    name, rest = (argv[0] if argv else "--help"), list(argv[1:])
    words = [*itertools.takewhile(lambda word: not word.startswith("-"), rest)]
    flags, asked = rest[len(words) :], {"-h", "--help"} & {*rest}
    if name == "make":
        command(make, CorpusSettings, "Writes the embedded corpus, its roles of PLs and its tokenizer.", rest)
    elif name == "verify":
        command(verify, VerifySettings, "Runs every program of a corpus in the sandbox.", rest)
    elif name == "show" and (asked or len(words) == 1):
        command(lambda s: show(s, words[0]), ShowSettings, "Prints one problem with all its programs: show ID.", flags)
    elif name == "split":
        command(split, SplitSettings, "Deals records out to train, rl, dev and test.", rest)
    elif name == "import" and (asked or len(words) > 1):
        about = f"Makes records of public data: import FORMAT FILE...; formats: {', '.join(PUBLIC_FORMATS)}."
        command(lambda s: import_files(s, words[0], words[1:]), ImportSettings, about, flags)
    else:
        print("usage: python data.py make | import FORMAT FILE... | verify | split | show ID   (each has --help)\n")
        print(__doc__)
        sys.exit(not (asked or name in ("-h", "--help")))


if __name__ == "__main__":
    main(sys.argv[1:])
