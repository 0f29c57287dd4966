"""What belongs together, against a plain loop over sets."""

import numpy as np

from pipeline.forest import Forest


def test_groups_are_those_of_a_plain_loop() -> None:
    """The largest first, those of one size by their least score, then by their first place; members in order."""
    rng = np.random.default_rng(1)
    forest, groups = Forest(200), [{n} for n in range(200)]
    for _ in range(40):
        some = rng.choice(200, 2 + int(rng.integers(2)), replace=False)
        forest.join(some)
        touched = [group for group in groups if group & set(some.tolist())]
        groups = [group for group in groups if group not in touched] + [set().union(*touched)]
    scores = rng.integers(0, 5, 200).astype(np.float32)
    places, ends, least = forest.groups(scores)
    told = [places[at:end].tolist() for at, end in zip([0, *ends], ends, strict=False)]
    want = [sorted(group) for group in groups if len(group) > 1]
    want.sort(key=lambda group: (-len(group), -scores[group].min(), group[0]))
    assert told == want and len(want) > 20
    assert least.tolist() == [scores[group].min() for group in want]
    roots = forest.roots(np.arange(200))
    assert all(len(set(roots[sorted(group)].tolist())) == 1 for group in groups) and len(set(roots)) == len(groups)


def test_nothing_joined_gives_no_group() -> None:
    places, ends, least = Forest(3).groups(np.zeros(3, np.float32))
    assert (len(places), len(ends), len(least)) == (0, 0, 0)
