"""How long the trainer waits for rows where the producer is faster than it."""

from typing import Any

import torch

from benchmarking.stream_rates import ReadyRows, Row, buffered
from sae.coder.sites import Sites
from sae.config import Config
from sae.configuration import from_flat
from sae.train.distributed import make_accelerator
from sae.train.run import resolve
from sae.train.steps import make_step
from sae.train.trainer import make_state


def waiting(cfg: Config, width: int, n_steps: int, refill: str) -> Row:
    """Train on rows that are ready at once, and return the share of time spent waiting."""
    sizes: dict[str, Any] = {"coder.d_sae": 8 * width, "train.tokens": 10**6}
    cfg = from_flat({**sizes, "stream.buffer_tokens": 65_536, "stream.refill": refill}, cfg)
    accelerator = make_accelerator(cfg.run, cfg.train)
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    stream: Any = ReadyRows(width, 2048, dtype, accelerator.device)
    source = buffered(stream, cfg, refill=refill)
    cfg = resolve(cfg, Sites((width,)), None, accelerator.device)
    state = make_state(cfg, source, accelerator)
    step = make_step(cfg, state, accelerator)
    source.warm_up(lambda *_: None)

    def train(n: int) -> None:
        for _ in range(n):
            x = source.next_batch(cfg.train.batch_tokens)
            step([state.calibration.normaliser.apply(x)], 1e-4)
            state.step += 1
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    train(3)
    source.log_values()
    train(n_steps)
    share = source.log_values()["wait_share"]
    source.close()
    return {
        "name": f"waiting: {refill}",
        "value": 100 * share,
        "unit": "% of the time",
        "goal": "≤ 3",
        "is_met": share <= 0.03,
        "note": f"d {width}, d_sae {8 * width}, {cfg.train.batch_tokens} tokens a step, rows ready",
    }
