"""Try many cases of a campaign: python -m campaigns NAME COUNT [FIRST]; without a name, list them."""

import sys

from campaigns import names, run


def main() -> int:
    if len(sys.argv) < 3:
        print("\n".join(names()))
        return 0
    name, count = sys.argv[1], int(sys.argv[2])
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    tally = run(name, range(first, first + count))
    for text in tally.bad:
        print(text)
    for why, times in tally.refusals.most_common():
        print(f"{times:6} refused: {why}")
    print(tally)
    return bool(tally.bad)


if __name__ == "__main__":
    sys.exit(main())
