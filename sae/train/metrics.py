"""What the log says about the tokens since the last row: sums on the device, divided once.

fvu = Σ‖x − x_hat‖² / (Σ‖x − c‖² − n ‖mean(x) − c‖²), with a fixed reference point c near the mean:
the plain Σ‖x‖² − n‖x̄‖² loses all digits where the mean is large.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.coder.latents import SparseCode
from sae.train.distributed import sum_over_ranks


class MetricSums:
    """Sums over the tokens since the last `clear`, in float64, additive over any split.

    Args:
        centre: (d_in), the reference point c. loss_names: losses to average.
    """

    def __init__(self, centre: Tensor, loss_names: tuple[str, ...]):
        self.centre, self.loss_names = centre, loss_names
        self.sums = {name: self._zero() for name in self._names()}
        self.sums["x"] = torch.zeros_like(centre, dtype=torch.float64)

    def update(
        self, x: Tensor, residual: Tensor, code: SparseCode | Tensor, losses: Mapping[str, Tensor]
    ) -> None:
        """Add one batch: x, what was to be written, and residual (n, d_out), its code, its mean
        losses."""
        shifted = x - self.centre
        self.sums["n"].add_(len(x))
        self._add("x", shifted.sum(0))
        self._add("x_squared", _squared(shifted))
        self._add("squared_error", _squared(residual.detach()))
        values = code if isinstance(code, Tensor) else code.values
        self._add("active", (values.detach() != 0).sum())
        for name in self.loss_names:
            self._add(name, losses[name].detach() * len(x))

    def compute(self) -> dict[str, float]:
        """Return the averages over all processes; the one time that the host waits for them."""
        names = list(self.sums)
        total = sum_over_ranks(torch.cat([self.sums[name].flatten() for name in names])).cpu()
        parts = dict(zip(names, total.split([self.sums[n].numel() for n in names]), strict=True))
        n = float(parts["n"])
        if n == 0:
            return {}
        variance = float(parts["x_squared"]) - float(parts["x"].pow(2).sum()) / n
        means = {name: float(parts[name]) / n for name in self.loss_names}
        error = float(parts["squared_error"])
        return {
            **means,
            "fvu": error / variance if variance > 0 else float("nan"),
            "l0": float(parts["active"]) / n,
        }

    def clear(self) -> None:
        """Begin the next window."""
        for value in self.sums.values():
            value.zero_()

    def _names(self) -> tuple[str, ...]:
        return ("n", "x_squared", "squared_error", "active", *self.loss_names)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.centre.device)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name].add_(value)


def _squared(rows: Tensor) -> Tensor:
    """Return Σ‖row‖² in float64, without a matrix of squares."""
    return torch.linalg.vector_norm(rows, dim=-1).square().sum(dtype=torch.float64)
