"""Measure the memory and time of all latents' contexts and monosemanticity, and the law behind.

    python scripts/bench_contexts.py [--sizes LATENTSxTOKENS …] [--k 64] [--out FILE.json]

Each size runs in a process of its own: `FeatureCollector`'s strongest contexts of every latent, and
`monosemanticity`'s sums and concepts, in one pass over drawn codes, k latents a token in k equal
strata with rates that fall as a power law. No language model and no coder run: their memory is
their own. The peaks are fitted by base + per_latent · latents + per_row · min(tokens, N_ROWS),
and `--target` is extrapolated, in time linearly in tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking import machine
from benchmarking.results import free_path

from sae.analysis.features import FeatureCollector
from sae.coder.latents import Latents
from sae.evals.fired_concepts import N_ROWS, Rows, lowest, score_concepts
from sae.evals.interface import ContextBatch
from sae.evals.numbers import halves_of, token_numbers
from sae.evals.pair_sums import PairSums
from sae.evals.text_windows import cut_windows, largest_in_windows
from sae.files import write_json, write_text
from sae.stream.contexts import CapturedContexts
from sae.train.memory import peak

SIZES = ("16384x65536", "32768x65536", "65536x16384", "65536x65536", "65536x131072")
TARGET = "65536x1000000"
SEQUENCES, CONTEXT, VOCABULARY, WIDTH, WINDOW = 16, 128, 50_000, 384, 16
LIMIT_BYTES = 8e9


class DrawnCodes:
    """Stands for a coder: the k latents of each token, drawn; what it is given is not read."""

    def __init__(self, d_sae: int, k: int, device: torch.device) -> None:
        self.d_sae, self.k = d_sae, k
        self.generator = torch.Generator(device).manual_seed(0)
        self.last: Latents | None = None

    def encode_sparse(self, x: torch.Tensor) -> Latents:
        """Return a code (n, k) for n tokens."""
        shape, size = (len(x), self.k), self.d_sae // self.k
        u, values = (torch.rand(shape, generator=self.generator, device=x.device) for _ in range(2))
        place = (u.pow(3) * size).long().clamp_max(size - 1)
        self.last = Latents(1 + values, place + size * torch.arange(self.k, device=x.device))
        return self.last


def run(d_sae: int, tokens: int, k: int) -> dict[str, Any]:
    """Read `tokens` tokens once; return seconds and the peak of memory in bytes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    coder, generator = DrawnCodes(d_sae, k, device), torch.Generator().manual_seed(1)
    features, pairs, rows = FeatureCollector(d_sae), PairSums(d_sae, WIDTH), Rows.empty()
    start = time.perf_counter()
    for number in range(-(-tokens // (SEQUENCES * CONTEXT))):
        contexts = _contexts(number, generator, device)
        features.update(coder, contexts)
        assert coder.last is not None
        kept = torch.arange(SEQUENCES * CONTEXT, device=device)
        batch = ContextBatch(contexts, coder.last, kept)
        windows = cut_windows(batch, WINDOW)
        vectors = torch.randn(len(windows.tokens), WIDTH, generator=generator).to(device)
        halves = halves_of(windows.documents, 0)
        vectors = torch.nn.functional.normalize(vectors, dim=1)
        pairs.add(vectors, halves, largest_in_windows(batch, windows))
        numbers = token_numbers(contexts, kept.cpu(), 0)
        halves = halves_of(contexts.document_ids.flatten(), 0)
        new = Rows.of(numbers, halves, contexts.tokens.flatten()[:, None], coder.last)
        rows = lowest([rows, new], N_ROWS)
    found, (likeness, _) = features.features(), pairs.scores()
    scores = score_concepts(rows, d_sae, 0, by_label=True)
    return {
        "seconds": time.perf_counter() - start,
        "bytes": peak(device),
        "latents_with_contexts": int((found.firing_counts > 0).sum()),
        "latents_scored": int(likeness.isfinite().sum()),
        "latents_with_concept": int((scores.concept >= 0).sum()),
    }


def _contexts(number: int, generator: torch.Generator, device: torch.device) -> CapturedContexts:
    tokens = torch.rand(SEQUENCES, CONTEXT, generator=generator).pow(4).mul(VOCABULARY).long()
    documents = (number * SEQUENCES + torch.arange(SEQUENCES))[:, None].expand_as(tokens)
    kept = torch.ones_like(tokens, dtype=torch.bool)
    activations = torch.zeros(SEQUENCES, CONTEXT, 1, device=device)
    return CapturedContexts(tokens, documents.contiguous(), kept, activations)


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the law's three numbers and the largest relative error, by least squares."""
    table = np.array([[1, row["latents"], min(row["tokens"], N_ROWS)] for row in rows], float)
    measured = np.array([row["bytes"] for row in rows], float)
    law, *_ = np.linalg.lstsq(table, measured, rcond=None)
    error = np.abs(table @ law / measured - 1).max()
    return dict(zip(("base", "per_latent", "per_row"), law.tolist(), strict=True)) | {
        "largest_error": float(error)
    }


def by_law(law: dict[str, float], latents: int, tokens: int) -> float:
    """Return the bytes that the law says."""
    return law["base"] + law["per_latent"] * latents + law["per_row"] * min(tokens, N_ROWS)


def extrapolate(rows: Sequence[dict[str, Any]], target: tuple[int, int]) -> dict[str, float | None]:
    """Return bytes and seconds at `target`: the law, and a line in tokens at that width."""
    law, (latents, tokens) = fit(rows), target
    size = by_law(law, latents, tokens)
    widest = max(row["latents"] for row in rows)
    own = [row for row in rows if row["latents"] == widest]
    slope, offset = np.polyfit([r["tokens"] for r in own], [r["seconds"] for r in own], 1)
    # Sizes too alike for their times to tell a slope from noise tell no time either.
    seconds = float(slope * tokens + offset) if slope > 0 else None
    return {"bytes": size, "seconds": seconds}


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} (extrapolated)"


def page(document: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    law, far = document["law"], document["extrapolated"]
    lines = [
        f"# Contexts of all latents in one pass, {document['machine']['device']}, "
        f"{document['date']}",
        f"```\n{document['command']}\n```",
        f"k {document['k']}, contexts of {CONTEXT} tokens, 8 contexts of 33 tokens a latent kept, "
        f"windows of {WINDOW} tokens with embeddings of {WIDTH}; codes drawn, no model run; "
        f"{document['machine']['cpu_threads']} CPU threads, machine shared.",
        "| latents | tokens | peak GB | by the law | seconds |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['latents']:,} | {row['tokens']:,} | {row['bytes'] / 1e9:.2f} | "
            f"{by_law(law, row['latents'], row['tokens']) / 1e9:.2f} | {row['seconds']:.0f} |"
            for row in document["rows"]
        ),
        f"| {document['target'][0]:,} | {document['target'][1]:,} | | {far['bytes'] / 1e9:.2f} "
        f"(extrapolated) | {_seconds(far['seconds'])} |",
        f"Law: {law['base'] / 1e9:.2f} GB + {law['per_latent'] / 1e3:.1f} kB a latent + "
        f"{law['per_row'] / 1e3:.2f} kB a token up to {N_ROWS:,}; largest error "
        f"{100 * law['largest_error']:.1f}%. Held for a latent by their definition: 3.3 kB of "
        f"contexts, {(24 * WIDTH + 48) / 1e3:.1f} kB of sums.",
        f"Under {LIMIT_BYTES / 1e9:.0f} GB: {'yes' if far['bytes'] < LIMIT_BYTES else 'NO'}.",
    ]
    blocks = "\n".join(lines[3:-2])
    return "\n\n".join([*lines[:3], blocks, *lines[-2:]]) + "\n"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure every size, fit, write both files; return the JSON's path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(run(*_size(options.one), options.k)))
        return Path()
    date = datetime.now(UTC).date().isoformat()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = machine.ROOT / "docs" / "benchmarks"
    path = options.out or free_path(folder, f"{date}-{machine.slug(device)}-contexts")
    rows = []
    for size in options.sizes:
        latents, tokens = _size(size)
        rows.append({"latents": latents, "tokens": tokens, **_in_own_process(size, options.k)})
        print(rows[-1], flush=True)
    document = {
        "date": date,
        "command": f"python scripts/bench_contexts.py --k {options.k} --sizes "
        + " ".join(options.sizes),
        "machine": machine.describe(device, None),
        "k": options.k,
        "rows": rows,
        "law": fit(rows),
        "target": _size(options.target),
        "extrapolated": extrapolate(rows, _size(options.target)),
    }
    write_json(path, document)
    write_text(path.with_suffix(".md"), page(document))
    print(page(document))
    return path


def _size(text: str) -> tuple[int, int]:
    latents, tokens = text.split("x")
    return int(latents), int(tokens)


def _in_own_process(size: str, k: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", size, "--k", str(k)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
