"""The supervised stage: what is trained, one denominator, exact resume, safe checkpoints."""

import gzip
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
import ranks
import torch
import torch.nn.functional as F
from ranks import metrics, same
from torch.utils.flop_counter import FlopCounterMode

import data
import sft
from model import IGNORE, Llama, load, reference_attention, save


def settings(corpus, out, **changes):
    values = {
        "mixture": "parallel", "model": "", "data": str(corpus), "out": str(out), "tokens": 3000, "lr": 1e-3, "batch": 400,
        "layers": 1, "width": 16, "heads": 2, "eval_every": 1000, "eval_problems": 1, "save_every": 2, "device": "cpu",
    } | changes  # fmt: skip
    return sft.Settings(**values)


def run(s):
    with sft.World("cpu") as world:
        sft.train(s, world)


def weights(folder):
    return load(sft.newest_checkpoint(folder)).state_dict()


# --------------------------------------------------------------------------------------------------
# Loss


def learner(model, tokenizer, **changes):
    """One process's learner; its rows may be of any model, its learning rate is that of each step."""
    return sft.Learner(model, sft.World("cpu"), sft.Hardware(device="cpu", **changes), 0.0, tokenizer.pad)


def mixture(corpus, tokenizer):
    records, documents = data.read_split(corpus, "train"), data.read_split(corpus, "base")
    return data.Mixture("parallel", records, documents, tokenizer, data.read_roles(corpus).sft, replay=0.3)


def examples(corpus, tokenizer, count=12):
    m = mixture(corpus, tokenizer)
    return [(e.tokens, e.first) for e in (m[i] for i in range(count))]


@pytest.mark.parametrize("batch", [1, 500])
def test_every_update_draws_the_next_examples_until_its_tokens_are_seen(corpus, tokenizer, batch):
    """Over all updates together, so that what one has too many the next has too few; and one at least."""
    m, s = mixture(corpus, tokenizer), SimpleNamespace(batch=batch)
    so_far, expected = SimpleNamespace(step=0, tokens=0, drawn=0), examples(corpus, tokenizer, 60)
    for step in range(6):
        rows = sft.next_rows(m, so_far, s)
        assert rows == expected[so_far.drawn : so_far.drawn + len(rows)] and rows
        so_far.step, so_far.drawn = step + 1, so_far.drawn + len(rows)
        so_far.tokens += sum(len(ids) for ids, _ in rows)
        least = so_far.tokens - len(rows[-1][0])  # without its last example
        assert so_far.tokens >= (step + 1) * batch and (least < (step + 1) * batch or len(rows) == 1)
    assert batch > 1 or so_far.drawn == 6


def test_targets_are_the_response_and_its_stop_token_only(corpus, tokenizer):
    rows = examples(corpus, tokenizer)
    packed = sft.collate(rows, tokenizer.pad, "cpu")
    documents = zip(*(x[0].split([len(ids) - 1 for ids, _ in rows]) for x in packed), strict=True)
    begin = 0
    for (ids, first), document in zip(rows, documents, strict=True):
        x, y, start = (part.tolist() for part in document)
        assert x == ids[:-1] and start == [begin] * len(x) and tokenizer.pad not in y
        assert y == [IGNORE] * (first - 1) + ids[first:] and y[-1] in tokenizer.stops
        begin += len(x)


def test_loss_and_gradient_equal_torchs_cross_entropy_in_float64(corpus, tokenizer, tiny):
    tiny.double()
    rows = examples(corpus, tokenizer)
    loss = sft.accumulate(learner(tiny, tokenizer, micro_tokens=600), rows)
    ours = {n: p.grad.clone() for n, p in tiny.named_parameters()}
    tiny.zero_grad()
    losses = []
    for ids, start in rows:  # one by one: no padding, no batch
        logits = tiny(torch.tensor([ids[:-1]])).double()[0]
        losses.append(F.cross_entropy(logits[start - 1 :], torch.tensor(ids[start:]), reduction="none"))
    expected = torch.cat(losses).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    for name, p in tiny.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_packing_holds_every_row_once_and_keeps_the_limit():
    lengths = [3, 50, 7, 200, 7, 12, 90, 1]
    groups = sft.pack(lengths, 100)
    assert sorted(i for g in groups for i in g) == list(range(8))
    assert sorted([lengths[i] for i in g] for g in groups) == [[50, 12, 7, 1], [90, 7, 3], [200]]  # by hand


def test_packed_rows_are_full(corpus, tokenizer):
    """Without padding at all, and 97% of the context used, the last row apart."""
    rows = examples(corpus, tokenizer, 200)
    lengths = [len(ids) - 1 for ids, _ in rows]
    groups = sft.pack(lengths, 1024)
    sizes = sorted(sft.collate([rows[i] for i in g], tokenizer.pad, "cpu")[0].shape[1] for g in groups)
    assert sum(sizes) == sum(lengths) and sizes[-1] <= 1024
    assert sum(sizes[1:]) > 0.97 * 1024 * len(sizes[1:])


def test_flops_count_the_multiplications_of_a_micro_batch(corpus, tokenizer, tiny, monkeypatch):
    """Against torch's own counter, which counts the whole square of the packed row in attention."""
    monkeypatch.setattr("model.again", lambda function, *a: function(*a))  # else what is computed again counts twice
    rows, config = examples(corpus, tokenizer, 2), tiny.config
    tiny.attention = reference_attention
    with FlopCounterMode(display=False) as counter:
        tiny(*sft.collate(rows, tokenizer.pad, "cpu")[:2])[0].sum().backward()
    lengths = [len(ids) - 1 for ids, _ in rows]
    square = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    extra = square * (2 * sum(lengths) ** 2 - sum(n * n for n in lengths))
    assert bench.flops(config, rows) + extra == counter.get_total_flops()


def test_schedule_is_warm_up_then_cosine_to_a_tenth():
    assert sft.schedule(0.025, 0.05) == pytest.approx(0.5)
    assert sft.schedule(0.05, 0.05) == pytest.approx(1.0)
    assert sft.schedule(0.525, 0.05) == pytest.approx(0.55)
    assert sft.schedule(1.0, 0.05) == pytest.approx(0.1)
    assert sft.schedule(0.0, 0.05) == pytest.approx(0.02) and sft.schedule(0.0, 1e-4) == 1.0  # never above the peak


@pytest.mark.parametrize("clip", [0, 1e-3])
def test_gradients_are_clipped_by_their_global_norm_and_by_0_not_at_all(corpus, tokenizer, tiny, clip):
    ours = learner(tiny, tokenizer, clip=clip)
    sft.accumulate(ours, examples(corpus, tokenizer, 4))
    before = {p: p.grad.clone() for p in tiny.parameters()}
    norm = torch.stack([g.norm() for g in before.values()]).norm().item()
    assert ours.step(0.0) == pytest.approx(norm) and norm > 0.1
    for p, gradient in before.items():  # AdamW's first moment is a tenth of it
        expected = 0.1 * gradient * (clip / norm if clip else 1)
        torch.testing.assert_close(ours.optimizer.state[p]["exp_avg"], expected, rtol=1e-4, atol=1e-9)


def test_two_steps_are_those_of_adamw_which_decays_matrices_but_the_embeddings(corpus, tokenizer, tiny):
    ours, rows, moments, lr = learner(tiny.double(), tokenizer, clip=0), examples(corpus, tokenizer, 4), {}, 1e-2
    ours.optimizer = sft.make_optimizer(tiny, 0.3)
    for step in (1, 2):
        sft.accumulate(ours, rows)
        before = {name: (p.detach().clone(), p.grad) for name, p in tiny.named_parameters()}
        ours.step(lr)
        for name, p in tiny.named_parameters():
            (weight, g), (m, v) = before[name], moments.get(name, (0, 0))
            m, v = moments[name] = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            kept = 1 - lr * 0.3 * (p.dim() > 1 and "embed" not in name)
            expected = kept * weight - lr * m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
            torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-9, msg=name)


def test_the_held_out_loss_is_of_dev_in_own_words_per_trained_token(corpus, tokenizer, tiny):
    held = sft.held_out_rows(settings(corpus, "", eval_problems=3), tokenizer, 1024)
    losses = sft.held_out_losses(learner(tiny, tokenizer), held)
    assert losses.keys() == {*data.read_roles(corpus).everything}
    for language, loss in losses.items():
        sums, count = 0.0, 0
        for record in data.read_split(corpus, "dev")[:3]:
            text = record["prompt"] if language == "python" else record["prompts"][language]
            tokens, first = data.example(tokenizer, record, text, language)
            logits, targets = tiny(torch.tensor([tokens[:-1]]))[0, first - 1 :], torch.tensor(tokens[first:])
            sums, count = sums + F.cross_entropy(logits, targets, reduction="sum").item(), count + len(targets)
        assert loss == pytest.approx(sums / count, abs=1e-4)


# --------------------------------------------------------------------------------------------------
# Runs


def test_the_flags_reach_the_weights_the_mixture_and_the_optimizer(corpus, tmp_path, monkeypatch):
    seen, flags = [], {"seed": 3, "replay": 0.2, "statements": 0.6}
    monkeypatch.setattr(sft, "loop", lambda s, run, *made: seen.extend(made))
    run(settings(corpus, tmp_path, problems=5, weight_decay=0.3, **flags))
    ours, m = seen
    assert same(ours.model.state_dict(), Llama(ours.model.config).init_weights(3).state_dict())
    assert m.records == data.read_split(corpus, "train")[:5] and {k: getattr(m, k) for k in flags} == flags
    assert [group["weight_decay"] for group in ours.optimizer.param_groups] == [0.3, 0]
    shape = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads"
    assert [getattr(ours.model.config, name) for name in shape.split()] == [1, 16, 48, 2, 1]


def test_base_and_an_arm_have_defaults_of_their_own():
    found = [sft.resolve(sft.Settings(mixture=name)) for name in ("base", "source")]
    expected = [("", "runs/base", 1_750_000, 3e-3), ("runs/base", "runs/source", 2_000_000, 1e-3)]
    assert [(s.model, s.out, s.tokens, s.lr) for s in found] == expected


def test_a_gradient_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(corpus, tmp_path):
    with pytest.raises(ValueError, match="the gradient's norm is nan: lower --lr; the last checkpoint is kept"):
        run(settings(corpus, tmp_path / "run", lr=1e30, save_every=1))
    assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_ctrl_c_saves_and_the_same_command_goes_on(corpus, tmp_path, monkeypatch, capsys):
    real, calls = sft.accumulate, []

    def interrupted(*a):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*a)

    monkeypatch.setattr(sft, "accumulate", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(settings(corpus, tmp_path / "run", save_every=1000))
    assert stop.value.code == 130  # what follows in a shell or a Makefile must not start
    monkeypatch.undo()
    assert sft.newest_checkpoint(tmp_path / "run").name == "step-3" and not (tmp_path / "run/summary.json").exists()
    assert "goes on from there" in capsys.readouterr().out
    run(settings(corpus, tmp_path / "run"))
    run(settings(corpus, tmp_path / "whole"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_ctrl_c_in_the_last_measurement_ends_the_program_too(corpus, tmp_path, monkeypatch):
    """Else main would start the next training; the run itself is finished."""
    real = sft.held_out_losses
    monkeypatch.setattr(sft, "held_out_losses", lambda *a: signal.raise_signal(signal.SIGINT) or real(*a))
    with pytest.raises(SystemExit) as stop:
        run(settings(corpus, tmp_path / "run", tokens=300))
    assert stop.value.code == 130 and (tmp_path / "run/summary.json").exists()


def test_a_finished_run_with_other_settings_is_refused(corpus, tmp_path, capsys):
    run(settings(corpus, tmp_path / "run", tokens=300))
    run(settings(corpus, tmp_path / "run", tokens=300, eval_every=7))  # which may differ
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"began with --lr 0\.001, not 0\.5; give that"):
        run(settings(corpus, tmp_path / "run", tokens=300, lr=0.5))


def test_metrics_keep_six_digits_of_any_size(corpus, tmp_path, capsys):
    s = settings(corpus, tmp_path / "run")
    with sft.Run(s.out, s, sft.World("cpu")) as ours:
        ours.start()
        ours.log("loss", lr=1.23456789e-7, tokens_per_s=123456.789, tokens=12345678)
        ours.log("pass@1", held_out={"own words": {"python": 0.5, "ruby": 0.25}, "reserved words": {"python": 0.0}})
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert line == {"step": 0, "lr": 1.23457e-7, "tokens_per_s": 123457.0, "tokens": 12345678}
    assert (
        capsys.readouterr().out
        == f"{s.out} step 0: pass@1 on dev: own words (python 0.5, ruby 0.25), reserved words (python 0.0)\n"
    )


def test_a_run_goes_on_from_the_newer_of_two_checkpoints(corpus, tmp_path, monkeypatch):
    """As after a kill while the older one was being removed. step-10 is newer than step-8."""
    run(settings(corpus, tmp_path / "whole", tokens=4800))
    remove = shutil.rmtree

    def dies(path, **options):
        if path.name == "step-8":
            (path / "config.json").unlink()
            raise MemoryError("as if killed")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", dies)
    with pytest.raises(MemoryError):
        run(settings(corpus, tmp_path / "cut", tokens=4800))
    monkeypatch.undo()
    assert {p.name for p in (tmp_path / "cut").glob("step-*")} == {"step-8", "step-10"}
    assert sft.newest_checkpoint(tmp_path / "cut").name == "step-10"
    run(settings(corpus, tmp_path / "cut", tokens=4800))
    assert len(list((tmp_path / "cut").glob("step-*"))) == 1
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_saving_changes_nothing_even_before_the_first_update(corpus, tokenizer, tiny, tmp_path):
    """In rl.py the first steps may find nothing to learn from."""
    results = []
    with sft.World("cpu"):
        for saved in (False, True):
            ours = learner(tiny.init_weights(0), tokenizer)
            assert not saved or ours.save(tmp_path) is None
            sft.accumulate(ours, examples(corpus, tokenizer, 4))
            ours.step(1e-3)
            results.append({n: p.detach().clone() for n, p in tiny.named_parameters()})
    assert same(*results)


def test_a_sharded_model_can_be_saved_after_a_forward_pass_alone(corpus, tokenizer, tiny, tmp_path):
    """As after a held-out loss: what is outside of the blocks is then still gathered."""
    with sft.World("cpu") as world:
        ours = sft.Learner(tiny, world, sft.Hardware(device="cpu", precision="bfloat16"), 0.0, tokenizer.pad)
        rows = examples(corpus, tokenizer, 4)
        sft.accumulate(ours, rows)
        ours.step(1e-3)
        ours.save(tmp_path / "before")
        with torch.no_grad():
            ours.model(*sft.collate(rows, tokenizer.pad, "cpu")[:2])
        ours.save(tmp_path / "after")
    before, after = ranks.kept(tmp_path / "before"), ranks.kept(tmp_path / "after")
    assert same(before, after) and before.keys() == dict(tiny.named_parameters()).keys()
    for folder in ("before", "after"):  # for other programs, in what is computed in
        assert same(weights(tmp_path / folder), {name: state["master"].bfloat16() for name, state in before.items()})


def test_a_run_is_not_taken_up_with_other_settings_or_records(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")
    s = settings(tmp_path / "data", tmp_path / "run", tokens=500)
    run(s)
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(ValueError, match=r"began with --lr 0\.001, not 0\.002"):
        run(replace(s, lr=2e-3))
    for name in ("base.jsonl.gz", "train.jsonl.gz", "dev.jsonl.gz", "languages.json"):
        path = tmp_path / "data" / name
        before = path.read_bytes()
        path.write_bytes(before + (gzip.compress(b"\n") if path.suffix == ".gz" else b"\n"))
        with pytest.raises(ValueError, match=r"began with other records in .*/data; give another --out"):
            run(s)
        path.write_bytes(before)
    for name in ("rl", "test"):  # never read here
        (tmp_path / f"data/{name}.jsonl.gz").unlink()
    run(replace(s, eval_every=7))  # already past its last token
    assert (tmp_path / "run/summary.json").exists()


def test_a_run_folder_keeps_its_owners_copies_and_nothing_of_a_killed_save(corpus, tmp_path):
    out = tmp_path / "run"
    for name in (".step-9.tmp", "step-1-keep"):
        (out / name).mkdir(parents=True)
    (out / "step-notes.txt").write_text("theirs")
    run(settings(corpus, out))
    [step] = sft.checkpoints(out)
    assert {p.name for p in out.glob("*step-*")} == {step.name, "step-1-keep", "step-notes.txt"}
    (out / "summary.json").unlink()
    for name, size in itertools.product(("trainer.json", "trainer/.metadata", "trainer/__0_0.distcp"), (100, 0)):
        before = (step / name).read_bytes()
        os.truncate(step / name, size)
        with pytest.raises(ValueError, match=rf"{step.name}/trainer.*: not whole .*; delete .*{step.name}, or give"):
            run(settings(corpus, out))
        (step / name).write_bytes(before)


@pytest.mark.parametrize("room", [20_000, 100_000], ids=["weights", "trainer"])
def test_a_disk_that_is_full_is_named_and_the_checkpoint_before_stays(corpus, tmp_path, monkeypatch, room):
    """After update 2 no file may have more bytes than `room`."""
    real, limits = sft.accumulate, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills(*a):
        if (tmp_path / "step-2").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        return real(*a)

    monkeypatch.setattr(sft, "accumulate", fills)
    try:
        with pytest.raises(ValueError, match=r"\.step-4\.tmp: .*; make room"):
            run(settings(corpus, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sft.newest_checkpoint(tmp_path).name == "step-2"
    monkeypatch.undo()
    run(settings(corpus, tmp_path))
    assert sft.newest_checkpoint(tmp_path).name == "step-8" and not list(tmp_path.glob(".step-*"))


STUB = """#!/bin/sh
# Stands for python: leaves the files of a stage, or half of them.
out="${*##*--out }"
out="${out%% *}"
case $1 in
sandbox.py) exit ;;
-m) exit ;;
esac
mkdir -p "$out"
case $1 in
data.py) touch "$out/languages.json" ;;
eval.py) touch "$out/table.md" "$out/eval.json" ;;
*)
    if [ -e "$out/step-1" ]; then echo "on $out"; else echo "new $out"; fi
    touch "$out/settings.json" "$out/step-1"
    [ "$out" != "$STOP" ] || exit 130
    touch "$out/summary.json"
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make, with stubs as stages, in a folder of its own; what the stages say."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(STUB)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    shutil.copy(Path(sft.__file__).parent / "Makefile", tmp_path)
    for name in ("requirements.txt", ".venv/installed", "tests/requirements.txt", ".venv/installed-tests"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def run(*arguments, stop="", touched=()):
        for path in tmp_path.rglob("*"):  # all files age, so that what is written now is newer
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 100))
        for name in touched:
            (tmp_path / name).touch()
        environment = {"PATH": os.environ["PATH"], "STOP": stop}
        command = ["make", "-s", "PYTHON=.venv/bin/python", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == (not stop), done.stderr
        return done.stdout.splitlines()

    return run


def test_make_goes_on_with_an_interrupted_stage_unless_its_input_is_newer(tmp_path, make):
    folder = "runs/some"

    def run(**how):
        lines = make("run", f"RUN={folder}", "ARMS=source parallel", **how)
        return [line.replace(f"{folder}/", "") for line in lines]

    assert run(stop=f"{folder}/source") == ["new base", "new source"]
    assert run(touched=[f"{folder}/source/settings.json"]) == [
        "on source", "new rl-source", "new parallel", "new rl-parallel",
    ]  # fmt: skip
    (tmp_path / folder / "source/summary.json").unlink()  # as if interrupted, from the older base
    assert run(touched=[f"{folder}/data/languages.json"]) == [
        "new base", "new source", "new rl-source", "new parallel", "new rl-parallel",
    ]  # fmt: skip
    assert run() == [] and (tmp_path / folder / "eval/eval.json").exists()


def test_make_goes_on_with_an_interrupted_study(tmp_path, make):
    arguments = ("study", "SEEDS=1 2", "--jobs=1")
    first = make(*arguments, stop="runs/study-1/rl-multi")
    assert "new runs/study-1/rl-multi" in first and not (tmp_path / "results/study/seed-1.json").exists()
    second = make(*arguments, touched=["runs/study-1/rl-multi/settings.json"])
    assert "on runs/study-1/rl-multi" in second
    arms = ("source", "multi", "crossed", "parallel")
    stages = {f"runs/study-{seed}/{stage}" for seed in "12" for arm in arms for stage in ("base", arm, f"rl-{arm}")}
    assert {line.split()[1] for line in first + second} == stages
    assert {(tmp_path / f"results/study/seed-{seed}.json").exists() for seed in "12"} == {True}
    assert make(*arguments) == []


def test_two_runs_do_not_write_into_one_folder(corpus, tmp_path):
    s = settings(corpus, tmp_path / "run")
    with sft.Run(s.out, s, sft.World("cpu")) as first:
        first.start()
        with pytest.raises(ValueError, match="another process trains here"):
            run(s)
    run(s)


def test_the_starting_models_tokenizer_is_used_and_weights_are_float32(corpus, tokenizer, tiny, tmp_path):
    """As with a real Llama folder: bf16 weights, and a tokenizer that is not the corpus's."""
    save(tiny.bfloat16(), tmp_path / "llama")
    tokenizer.save(tmp_path / "llama")
    path = tmp_path / "llama/tokenizer.json"
    path.write_text(path.read_text() + "\n")  # tells the two apart
    run(settings(corpus, tmp_path / "run", model=str(tmp_path / "llama"), tokens=300))
    final = sft.newest_checkpoint(tmp_path / "run")
    assert (final / "tokenizer.json").read_text() == path.read_text() != (corpus / "tokenizer.json").read_text()
    assert load(final).head().dtype == torch.float32


@pytest.mark.parametrize("name", data.MIXTURES)
def test_what_is_longer_than_the_model_takes_is_left_out(corpus, tokenizer, capsys, name):
    """The model takes one token less than the longest of 100 examples."""
    m = mixture(corpus, tokenizer)
    m = replace(m, name=name, records=m.records[:50], documents=m.documents[:50], general=[])
    assert sft.choose_examples(m, 1024) == m and not capsys.readouterr().out
    limit = max(len(m[i].tokens) for i in range(100)) - 1
    short, gone = sft.choose_examples(m, limit), 0
    assert all(len(short[i].tokens) <= limit for i in range(200))
    said = rf"left out: (\d+) of (\d+) (.*), the first record '\w+-\d+': .*, the model takes {limit}$"
    for line in capsys.readouterr().out.splitlines():
        n, total, what = re.match(said, line).groups()
        before, after = (x.records if what == "training problems" else x.documents for x in (m, short))
        assert (len(before) - len(after), len(before)) == (int(n), int(total))
        gone += int(n)
    assert gone == len(m.records) + len(m.documents) - len(short.records) - len(short.documents) > 0


def test_no_more_than_half_of_the_records_are_left_out_for_their_length(corpus, tokenizer, capsys):
    """Answers of 0 to 9 words more, a token each, and the model takes those of `words` more at most."""
    general = [{"id": str(i), "prompt": "p", "answer": "so" + i * " so", "solutions": {}} for i in range(10)]
    lengths = [len(data.example(tokenizer, r, "p", "").tokens) for r in general]
    m = replace(mixture(corpus, tokenizer), records=[], documents=[], general=general)
    for words in (9, 7, 4):
        assert sft.choose_examples(m, lengths[words]).general == general[: words + 1]
        said = f"left out: {9 - words} of 10 general examples, the first record '{words + 1}': a prompt of "
        assert capsys.readouterr().out.startswith(said) == (words < 9)
    too_many = r"too many to leave out: 6 of 10 .*'4': .* new ones, .*; give shorter ones or take"
    with pytest.raises(ValueError, match=too_many):
        sft.choose_examples(m, lengths[3])


def test_general_data_is_trained_on_and_must_stay_the_same(corpus, tmp_path, monkeypatch, capsys):
    rows, real, path = [], sft.accumulate, tmp_path / "chat.jsonl"
    monkeypatch.setattr(sft, "accumulate", lambda ours, update: rows.extend(update) or real(ours, update))
    data.write_records(path, [{"prompt": "hi", "answer": text} for text in ("yes", "no", 5000 * "no ")])
    s = settings(corpus, tmp_path / "run", tokens=800, general=str(path), general_share=0.5)
    run(s)
    short = {tuple(data.Tokenizer(corpus).encode(text)) for text in ("yes", "no")}
    assert sum(tuple(ids[start:-1]) in short for ids, start in rows) == len(rows) // 2 > 1
    assert f"left out: 1 of 3 general examples, the first record '{path}:3': " in capsys.readouterr().out
    (tmp_path / "run/summary.json").unlink()
    path.write_text(path.read_text() + '{"prompt": "hi", "answer": "maybe"}\n')
    with pytest.raises(ValueError, match="began with other records"):
        run(s)


@pytest.mark.parametrize("device", ["cudaa", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"--device {device}: ."):
        sft.World(device)


def test_all_arms_get_the_same_number_of_updates_and_tokens(corpus, tmp_path):
    """To within the last example of an update, of fewer than 250 tokens a program."""
    for name in data.MIXTURES:
        run(settings(corpus, tmp_path / name, mixture=name))
        lines = metrics(tmp_path / name)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["updates"] == len(lines) == 8 and summary["tokens"] == lines[-1]["tokens"]  # 3000 / 400, up
        rates = [1e-3 * sft.schedule(i / 8, 0.05) for i in range(8)]
        assert [line["lr"] for line in lines] == pytest.approx(rates, rel=1e-5)
        assert all(400 * line["step"] <= line["tokens"] < 400 * line["step"] + 250 for line in lines)


@pytest.mark.parametrize("share, kinds", [(0.0, {True}), (0.5, {True, False}), (1.0, {False})])
def test_the_shares_of_replay_and_statements_are_the_flags(corpus, tmp_path, monkeypatch, share, kinds):
    """Examples of the arm are trained from the answer on, base documents from their first token on."""
    rows, real = [], sft.accumulate
    monkeypatch.setattr(sft, "accumulate", lambda ours, update: rows.extend(update) or real(ours, update))
    run(settings(corpus, tmp_path / "run", replay=share, statements=share))
    assert {start > 1 for _, start in rows} == kinds
    stop = data.Tokenizer(corpus).stop  # of a turn; a commented document ends with the text
    stated = [stop in ids for ids, first in rows if first == 1]
    assert set(stated) == {0.0: set(), 0.5: {True, False}, 1.0: {True}}[share]
    assert abs(sum(first == 1 for _, first in rows) - share * len(rows)) < 1


def test_training_lowers_the_held_out_loss_of_every_language(corpus, tmp_path):
    sizes = {"tokens": 60_000, "batch": 2000, "lr": 3e-3, "width": 32, "eval_every": 1, "eval_problems": 4}
    run(settings(corpus, tmp_path / "base", mixture="base", **sizes))
    assert json.loads((tmp_path / "base/summary.json").read_text())["updates"] == 30
    held = [line["held_out"] for line in metrics(tmp_path / "base")]
    assert set(held[0]) == set(data.read_roles(corpus).everything)
    assert all(held[-1][p] < held[0][p] - 1 for p in held[0])


def test_main_trains_from_a_model_and_leaves_a_finished_run_alone(corpus, tmp_path, capsys):
    sft.main(settings(corpus, tmp_path / "base", mixture="base"))
    assert sorted(p.name for p in sft.newest_checkpoint(tmp_path / "base").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "trainer", "trainer.json",
    ]  # fmt: skip
    sft.main(settings(corpus, tmp_path / "sft", model=str(tmp_path / "base"), tokens=500))
    before = weights(tmp_path / "sft")
    sft.main(settings(corpus, tmp_path / "sft", model=str(tmp_path / "base"), tokens=500))
    assert "finished already" in capsys.readouterr().out and same(before, weights(tmp_path / "sft"))
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        sft.main(settings(corpus, tmp_path / "x", model=str(tmp_path / "nothing")))
    shutil.rmtree(tmp_path / "sft")


def test_without_flags_it_makes_what_is_missing_before_it(corpus, tmp_path, monkeypatch, capsys):
    """Corpus and base model first, each said aloud; only their sizes are changed here."""
    real = sft.resolve
    small = {"tokens": 400, "batch": 200, "layers": 1, "width": 16, "heads": 2, "eval_problems": 1, "device": "cpu"}
    monkeypatch.setattr(sft, "resolve", lambda s: replace(real(s), **small))
    monkeypatch.setattr(data, "make", lambda s: shutil.copytree(corpus, s.out))
    monkeypatch.chdir(tmp_path)
    sft.main(sft.Settings())
    out = capsys.readouterr().out
    assert "no corpus yet" in out and "no finished base model yet" in out
    assert sorted(p.parent.name for p in tmp_path.glob("runs/*/summary.json")) == ["base", "parallel"]


def test_every_flag_has_a_help_line_and_help_shows_the_manual(capsys):
    with pytest.raises(SystemExit):
        data.parse_flags(sft.Settings, sft.__doc__, ["--help"])
    out = capsys.readouterr().out
    assert "The supervised stage" in out and f"(default: {sft.Settings.batch})" in out
    given = data.parse_flags(sft.Settings, "", ["--batch", "7", "--mixture", "crossed"])
    assert (given.batch, given.mixture) == (7, "crossed")
