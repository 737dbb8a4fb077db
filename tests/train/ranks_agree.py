"""Train as `sae train` does and fail where the processes' states differ at the end."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from sae.configuration import from_command_line
from sae.train import resampling, run, trainer
from sae.train.distributed import leave_group


def main() -> None:
    """Run on one of several processes."""
    states, n_resampled = [], []
    make_state, resample_ = trainer.make_state, resampling.resample_

    def kept(*arguments):
        states.append(make_state(*arguments))
        return states[-1]

    def counted(*arguments):
        n_resampled.append(len(resample_(*arguments)))

    trainer.make_state, resampling.resample_ = kept, counted
    run(from_command_line(sys.argv[1:], "sae train"))
    for name, tensor in states[0].tensors().items():
        mine = tensor.detach().double()
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first), name
    if sum(n_resampled):
        sys.stdout.write(f"resampled {n_resampled}\n")


if __name__ == "__main__":
    main()
    leave_group()  # once nothing holds on to it
