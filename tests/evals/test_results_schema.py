"""results.json is what its published schema says, for text, worlds and bare activations."""

from __future__ import annotations

import json
from importlib.resources import files

import jsonschema
import pytest
import torch
from eval_stand_ins import FunctionCoder
from toy_worlds import Linear, ToyWorld

from sae.coder import SparseCoder
from sae.config import CoderConfig
from sae.evals import activation_contexts, evaluate, evaluate_on_world, write_results


@pytest.fixture(scope="module")
def schema() -> dict:
    found = json.loads((files("sae.evals") / "results.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def written(results, tmp_path) -> dict:
    write_results(results, tmp_path / "results.json")
    return json.loads((tmp_path / "results.json").read_text())


def test_results_on_text(schema, lm, hookpoint, contexts, tmp_path):
    coder = SparseCoder.create(32, CoderConfig(d_sae=64, k=8))
    results = evaluate(coder, [contexts], lm=lm, hookpoint=hookpoint, n_resamples=5)
    jsonschema.validate(written(results, tmp_path), schema)


def test_results_on_a_world(schema, tmp_path):
    world = ToyWorld(is_tree=True)
    coder = Linear(world, world.directions[:12], world.directions[:12], k=8)
    content = written(evaluate_on_world(coder, world, 600, n_resamples=5), tmp_path)
    jsonschema.validate(content, schema)


def test_results_of_an_object_without_tensors(schema, tmp_path):
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    results = evaluate(FunctionCoder(lambda x: x), activation_contexts([x]), n_resamples=5)
    content = written(results, tmp_path)
    jsonschema.validate(content, schema)
    assert content["provenance"]["dictionary"] is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("metrics", "fvu"), "0.1"),
        (("evals", "sparsity", "n_tokens"), -1),
        (("provenance", "evaluated"), None),
        (("schema",), "sae.evals/0"),
    ],
)
def test_the_schema_refuses_what_is_no_result(schema, place, value, tmp_path):
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    results = evaluate(FunctionCoder(lambda x: x), activation_contexts([x]), n_resamples=5)
    content = written(results, tmp_path)
    *path, last = place
    part = content
    for key in path:
        part = part[key]
    part[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)
