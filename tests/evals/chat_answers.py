"""A stand-in for a chat model: it explains by the word in marks, and is sure of texts with it."""

from __future__ import annotations

import json


def word_reader(content: str) -> str:
    """Return the answer to a request of `sae.evals.judging.prompts`."""
    lines = [line.partition(". ")[2] for line in content.splitlines() if line[:1].isdigit()]
    if "have in common" in content:
        return f"the word {lines[0].partition('«')[2].partition('»')[0].strip()}"
    word = content.partition("fire on: the word ")[2].split("\n")[0].strip()
    mark = "«" if "«" in lines[0] else ""
    found = [f"{mark} {word}" in line.replace("»", " ").replace('"', " ") + " " for line in lines]
    return json.dumps([10 * int(is_there) for is_there in found])
