"""Every installed language does its verdicts."""

import pytest
from sandbox_programs import PROGRAMS

import sandbox
from sandbox import LANGUAGES, Limits

VERDICTS = {"sum": "ok", "fail": "runtime_error"}
VERDICTS |= {"spin": "time_limit", "hoard": "memory_limit", "flood": "output_limit"}
PATIENT = Limits(wall=30, cpu=30, memory=256, output=1 << 18)
HURRIED = Limits(wall=1.0, cpu=1.0, memory=256)
GARBAGE = "@@@ ( not a { program \n"


@pytest.mark.parametrize("name", PROGRAMS)
def test_language(box, name):
    if name not in sandbox.installed():
        pytest.skip(f"no toolchain: {sandbox._missing(LANGUAGES[name])}")
    programs = dict(PROGRAMS[name])
    stdin = programs.pop("stdin", "3 4\n")
    jobs, tests = {}, [{"stdin": stdin, "stdout": "7"}]
    for kind, program in programs.items():
        jobs[kind] = box.submit(program, name, tests, limits=HURRIED if kind == "spin" else PATIENT)
    wrong = box.submit(programs["sum"], name, [{"stdin": stdin, "stdout": "8"}])
    garbage = box.submit(GARBAGE, name, [{"stdin": "", "stdout": ""}])
    for kind, job in jobs.items():
        assert job.result().verdict == VERDICTS[kind], (kind, job.result())
    assert wrong.result().verdict == "wrong_answer"
    refused = "compile_error" if LANGUAGES[name].compile else "runtime_error wrong_answer"
    assert garbage.result().verdict in refused.split(), garbage.result()


def test_table_is_sound():
    names = [alias for lang in LANGUAGES.values() for alias in (lang.name, *lang.aliases)]
    assert len(names) == len(set(names)), "two languages share an alias"
    assert len(LANGUAGES) >= 40
    assert set(PROGRAMS) <= set(LANGUAGES)
    assert all(lang.run and lang.file for lang in LANGUAGES.values())
    tools = [tool for lang in LANGUAGES.values() for tool in sandbox._tools(lang)]
    assert not any("|" in tool for tool in tools)  # one implementation each
