"""Steps of several groups on one batch: on a CPU side by side, each with its share of the threads.

Threads that share one step wait for each other after every operation, many times a step; steps of
different coders never wait. So a CPU's threads are divided among the groups, and a group with fewer
of them makes up for it by waiting less. A GPU takes the groups one after the other: a stacked step
fills it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sae.train.fleet_groups import Group


class SideBySide:
    """Train groups on the same batches; a context, as it may keep threads.

    Which threads a group has follows from the number of groups and of torch's threads, so results
    are the same in every run of as many threads.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device):
        self.groups, self.n_threads = groups, torch.get_num_threads()
        n_workers = min(len(groups), self.n_threads) if device.type == "cpu" else 1
        self.threads_each = self.n_threads // n_workers
        self._pool = None
        if n_workers > 1:
            self._pool = ThreadPoolExecutor(
                n_workers, "coder", torch.set_num_threads, (self.threads_each,)
            )

    def train(self, batches: Mapping[int, Sequence[Tensor]]) -> None:
        """Take one step of every group on the micro-batches of its hookpoint."""
        if self._pool is None:
            for group in self.groups:
                group.train(batches[group.place])
            return
        # A matmul's library has one number for the whole process, other operations one a thread.
        torch.set_num_threads(self.threads_each)
        try:
            list(self._pool.map(lambda group: group.train(batches[group.place]), self.groups))
        finally:
            torch.set_num_threads(self.n_threads)

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
