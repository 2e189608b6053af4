"""Two hospitals for the story: a worker process each, over mutual TLS, with a table, its tags and its policy.

This is the owners' side. In earnest each hospital does this on its own machine: `housecall worker init`, `add`, `policy
sign`, `up` (`examples/two_machines.md`). Here `LocalCluster` does it for both, in a temporary folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from table import FILES, split, table

import housecall as hc

# The scientist may run programs that the owner has read, and touch the records in no other way. Nothing leaves, but
# what the owner approves; and mean scores of her models, with noise, until they have cost epsilon 1 for each patient.
POLICY = hc.Policy(
    use=hc.Use(plans=("scientist/me",)),
    plans=hc.Plans(ask=True),
    release=hc.Release(approvals=True, metrics=hc.Metrics(minimum=100, noise=5)),
    budget=hc.Budget(epsilon=1),
)
# Records of nobody, for everybody: 13 standard normal numbers, and a diagnosis from 0 to 1. To write programs on.
MOCK = hc.Fakes(records=50, y=(0, 1))


@contextmanager
def hospitals(data: Path | None = None) -> Iterator[hc.LocalCluster]:
    """Both hospitals, running; they end with the block."""
    with hc.LocalCluster(tuple(FILES)) as cluster:
        for hospital in cluster:
            (x, y), _ = split(table(hospital.id, data))
            hospital.add("heart", x=x, y=y, tags=["#heart"], description="heart disease", mock=MOCK, policy=POLICY)
        yield cluster
