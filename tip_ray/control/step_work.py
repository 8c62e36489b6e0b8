"""The rollouts of one step: which are still to be made, which came back, which cannot be."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from tip_ray.contract import tables
from tip_ray.contract.headers import Quarantined, RolloutHeader
from tip_ray.contract.tables import Key
from tip_ray.stages.prompts import Cursor


class RolloutWork:
    """Every key of a step's PROMPTS ends in exactly one of `row_tokens` and `quarantined`."""

    def __init__(self, step: int, prompts: pa.Table, cursor: Cursor) -> None:
        self.step, self.cursor = step, cursor  # the cursor behind the step's prompts
        self.row_tokens: dict[Key, int] = {}  # prompt and response tokens of what came back
        self.rewards: dict[Key, float] = {}  # of what came back, where there is a scorer
        self._prompts = prompts
        self._keys = tables.keys(prompts)
        self._quarantined: dict[Key, Quarantined] = {}
        self._tries: dict[int, int] = {}  # by shard

    @property
    def rows(self) -> int:
        return len(self._keys)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to generate."""
        return len(self.row_tokens) + len(self._quarantined) >= self.rows

    @property
    def quarantined(self) -> list[Quarantined]:
        return [self._quarantined[key] for key in sorted(self._quarantined)]

    def again(self) -> RolloutWork:
        """The same step from its beginning, with higher attempts."""
        work = RolloutWork(self.step, self._prompts, self.cursor)
        work._tries = self._tries
        return work

    def received(self, header: RolloutHeader) -> None:
        """Note a batch that came back."""
        self.row_tokens.update(zip(header.keys, header.row_tokens, strict=True))
        if header.rewards:
            self.rewards.update(zip(header.keys, header.rewards, strict=True))
        self.quarantine(header.quarantined)

    def quarantine(self, items: Iterable[Quarantined]) -> None:
        """Take rollouts out of the step."""
        for item in items:
            self._quarantined[item.key] = item
            self.row_tokens.pop(item.key, None)
            self.rewards.pop(item.key, None)

    def remaining(self, shard: int, shards: int) -> tuple[pa.Table] | None:
        """PROMPTS that shard `shard` of `shards` has still to make; None when there are none.

        A shard is a run of neighbouring rows, so that samples of a prompt share its prefix.
        """
        own = np.array_split(np.arange(self.rows), shards)[shard]
        rows = [
            row
            for row in own
            if self._keys[row] not in self.row_tokens and self._keys[row] not in self._quarantined
        ]
        if not rows:
            return None
        attempt = self._tries.get(shard, 0)
        self._tries[shard] = attempt + 1
        part = self._prompts.take(rows)
        place = part.schema.get_field_index("attempt")
        attempts = pa.array(np.full(len(rows), attempt, np.int32))
        return (part.set_column(place, tables.PROMPTS.field("attempt"), attempts),)
