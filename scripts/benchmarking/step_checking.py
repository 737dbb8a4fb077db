"""Are the steps right? Their losses beside those of our autograd step in float32.

All train from one start on the same tokens, so the squared error must be the same step after step:
the first tells of the forward, the later ones of gradients and update.
"""

import torch
import torch.nn.functional as F

from .step_contenders import EXACT, StepContender
from .step_ours import ours
from .step_task import Task, Trainee

N_STEPS = 6
SLICE = 64  # tokens at a time, for what is computed densely
AUTOGRAD_BYTES = 16  # a weight


def losses_of(trainee: Trainee, task: Task) -> list[float]:
    """Return the squared errors a token of the first steps."""
    assert trainee.loss is not None
    found = []
    for number in range(N_STEPS):
        trainee.step(task.xs[number % len(task.xs)])
        found.append(trainee.loss())
    return found


class Reference:
    """The losses that are right, each kind computed once for a shape.

    The first comes from a few lines of plain PyTorch, with which our autograd step must agree;
    where that step does not fit into memory, the first is all.
    """

    def __init__(self, task: Task, memory_bytes: int | None):
        self.task, self.memory_bytes = task, memory_bytes
        self._losses: dict[bool, list[float]] = {}

    def losses(self, with_auxk: bool) -> list[float]:
        """Return the losses with or without AuxK's pull on the dictionary."""
        if with_auxk not in self._losses:
            first = first_loss(self.task)
            found = self._autograd(with_auxk) if self._fits() else [first]
            if not deviation([first], found) <= EXACT:
                raise ArithmeticError(
                    f"our autograd step's first loss is {found[0]}, a dense forward's {first}"
                )
            self._losses[with_auxk] = found
        return self._losses[with_auxk]

    def _autograd(self, with_auxk: bool) -> list[float]:
        return losses_of(ours(self.task, "autograd", "fp32", with_auxk=with_auxk), self.task)

    def _fits(self) -> bool:
        shape = self.task.shape
        needed = 2 * AUTOGRAD_BYTES * shape.d_sae * shape.d + 8 * shape.n * shape.d_sae
        return self.memory_bytes is None or needed < 0.9 * self.memory_bytes


@torch.no_grad()
def first_loss(task: Task) -> float:
    """Return the squared error a token of the first set, before any training, in float32."""
    weight, total = task.weight(), 0.0
    for x in task.xs[0].split(SLICE):
        values, indices = F.linear(x, weight, task.b_enc).topk(task.shape.k, dim=-1)
        x_hat = torch.einsum("nk,nkd->nd", values.relu(), weight[indices])
        total += float((x - x_hat).double().square().sum())
    return total / len(task.xs[0])


def deviation(expected: list[float], found: list[float]) -> float:
    """Return the largest relative difference between two lists, over the shorter's length."""
    pairs = zip(expected, found, strict=False)
    return max(abs(right - one) / abs(right) for right, one in pairs)


def is_right(contender: StepContender, found: float) -> bool:
    """Say whether a deviation is allowed; NaN is not."""
    return found <= contender.tolerance
