"""Try many cases of campaigns.

python -m campaigns                        what there is
python -m campaigns NAME COUNT [FIRST]     cases of one: what failed, what was refused, counts
python -m campaigns --docs COUNT           docs/campaigns.md: all of them
"""

import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context

from campaigns import KINDS, Tally, names, run, share


def _general(message: str) -> str:
    """A refusal without what differs from case to case."""
    text = re.sub(r"Spec\((?:[^()]|\([^()]*\))*\)", "SPEC", message.splitlines()[0])
    text = re.sub(r"\((?:\d+, ?)*\d+,?\)|\[(?:-?\d+, ?)*-?\d*\]", "N", text)
    # which ops a view and a write to it were
    text = re.sub(r"the result of [^,]+", "the result of OP", text)
    text = re.sub(r"(a view of it|written to) \([^)]+\)", r"\1 (OP)", text)
    return re.sub(r"-?\b\d+(?:\.\d+)?\b", "N", text)


def _page(tallies: list[Tally]) -> str:
    lines = [
        "# Campaigns",
        "",
        "Random cases of one kind, each run on simulated ranks and held against plain PyTorch, by "
        "`make campaigns`. `make test` tries sixty of each, `make fuzz` thousands.",
        "",
        f"| campaign | tried | {' | '.join(KINDS)} |",
        "|---" * (len(KINDS) + 2) + "|",
    ]
    for t in tallies:
        counts = " | ".join(str(t.counts[k]) for k in KINDS)
        lines.append(f"| {t.name} | {t.counts.total()} | {counts} |")
    total = sum((t.counts for t in tallies), Counter())
    lines.append(f"| all | {total.total()} | {' | '.join(str(total[k]) for k in KINDS)} |")
    lines += ["", "## What was refused", "", "| campaign | cases | reason |", "|---|---|---|"]
    for t in tallies:
        reasons: Counter[str] = Counter()
        for why, n in t.refusals.items():
            reasons[_general(why)] += n
        lines += [f"| {t.name} | {n} | {_cell(why)} |" for why, n in reasons.most_common()]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    args = sys.argv[1:]
    if len(args) < 2:
        print(__doc__, "\n".join(names()), sep="\n")
        return 0
    if args[0] == "--docs":
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            tallies = list(pool.map(share, names(), repeat(int(args[1]))))
        print(_page(tallies))
        print(*(text for t in tallies for text in t.bad), sep="\n", file=sys.stderr)
        return any(t.bad for t in tallies)
    first = int(args[2]) if len(args) > 2 else 0
    tally = run(args[0], range(first, first + int(args[1])))
    for text in tally.bad:
        print(text)
    for why, times in tally.refusals.most_common():
        print(f"{times:6} refused: {why}")
    print(tally)
    return bool(tally.bad)


if __name__ == "__main__":
    sys.exit(main())
