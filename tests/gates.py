"""Whether a design may be studied: gates on dev problems and dev seeds, before any seed of the study runs.

    make gates                              # runs seeds 101 to 103 on dev and ends with this
    python tests/gates.py runs/gates-101 runs/gates-102 runs/gates-103

The gates ask whether the study could show its claims or refute them: that base can program, that RL has something
to teach and is not starved, that it teaches, and that it breaks no PL. None asks which arm wins. Exits with 1 if
one does not hold.
"""

import json
import sys
from pathlib import Path

GREEDY, OWN, RESERVED = "greedy pass@1", "own words", "reserved words"


def food(run: Path) -> float:
    """Share of the groups that had spread in the last step of RL, in percent."""
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    return 100 * (1 - json.loads(last)["no_spread"])


def gates(run: Path) -> list[tuple[str, float, float, bool]]:
    """(what, value, bound, whether it holds) for the seed in `run`; all in percent, the worst of what it covers."""
    cells = {}
    for c in json.loads((run / "eval/eval.json").read_text())["cells"]:
        if c["measure"] == GREEDY:
            cells[c["model"], c["group"], c["column"]] = 100 * c["value"]
    columns = list(dict.fromkeys(column for _, _, column in cells))
    source = next(c for c in columns if c.endswith("(source)"))
    single, targets = ([c for c in columns if c.endswith(" mean") == wanted] for wanted in (False, True))
    arms = [m for m in dict.fromkeys(m for m, _, _ in cells) if (f"rl-{m}", OWN, source) in cells]

    def at_least(what: str, bound: float, values) -> tuple[str, float, float, bool]:
        return f"{what}, at least", (worst := min(values)), bound, worst >= bound

    def at_most(what: str, bound: float, values) -> tuple[str, float, float, bool]:
        return f"{what}, at most", (worst := max(values)), bound, worst <= bound

    gains = (cells[f"rl-{a}", RESERVED, source] - cells[a, RESERVED, source] for a in arms)
    losses = (cells[a, OWN, c] - cells[f"rl-{a}", OWN, c] for a in arms for c in single)
    return [
        at_least("base, own words, each PL", 35, (cells["base", OWN, c] for c in single)),
        at_least("base, reserved words, source", 20, [cells["base", RESERVED, source]]),
        at_most("base, reserved words, source", 60, [cells["base", RESERVED, source]]),
        at_most("base, reserved words, mean of other PLs", 20, (cells["base", RESERVED, c] for c in targets)),
        at_least("after SFT, own words, source, each arm", 75, (cells[a, OWN, source] for a in arms)),
        at_most("after SFT, reserved words, source, each arm", 65, (cells[a, RESERVED, source] for a in arms)),
        at_least("groups with spread in the last step of RL, each arm", 10, (food(run / f"rl-{a}") for a in arms)),
        at_least("gain of RL, reserved words, source, each arm", 15, gains),
        at_most("loss by RL, own words, each arm and PL", 10, losses),
    ]


def main(paths: list[str]) -> None:
    held = True
    for path in paths:
        for what, value, bound, holds in gates(Path(path)):
            print(f"{'holds' if holds else 'FAILS'}  {path}: {what} {bound:g}: {value:.0f}")
            held &= holds
    sys.exit(not held)


if __name__ == "__main__":
    main(sys.argv[1:])
