"""What a model computes before a place, kept from one forward and given again in others.

Forwards over the same tokens that differ at one place alone agree in all that ends before it. The
one idea: a module whose output is known need not run. Kept are the outputs of the blocks that stand
before the place in any list of blocks around it, and of the place's own module where its output is
meant; in a later forward these modules give what they gave, once for each variant of the batch.
Embeddings, and what a model computes once for all layers (masks, rotary angles), run again: they
are cheap, and their own.

Nothing here says that a model lets itself be treated so (layers might hand each other more than
their outputs): whoever uses it compares with a whole forward once (`intervening.running`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from sae.stream.hookpoints import Hookpoint

Kept = dict[nn.Module, Any]


@contextmanager
def keep_before(module: nn.Module, place: Hookpoint) -> Iterator[Kept]:
    """Yield what will hold, after the block's one forward, the outputs of modules before `place`.

    A module that runs several times, or after the place, or that gives more than one tensor, is
    left out.
    """
    kept: Kept = {}
    unfit: set[nn.Module] = set()
    is_reached = [False]

    def keep(one: nn.Module, _args: Any, output: Any) -> None:
        if one in kept or is_reached[0] or not _is_one_tensor(output):
            unfit.add(one)
        kept[one] = output

    def reach(*_: Any) -> None:
        is_reached[0] = True

    target = module.get_submodule(place.path)
    with ExitStack() as hooks:
        for one in _before(module, place):
            hooks.callback(one.register_forward_hook(keep).remove)
        register = (
            target.register_forward_hook
            if place.side == "out"
            else target.register_forward_pre_hook
        )
        hooks.callback(register(reach).remove)
        yield kept
    for one in unfit:
        kept.pop(one)


@contextmanager
def give_again(kept: Mapping[nn.Module, Any], times: int) -> Iterator[None]:
    """Let modules give what was kept, `times` behind one another along the batch, and not run.

    As with hooks, another thread that runs the model meanwhile sees nothing of it.
    """
    own_thread = threading.get_ident()

    def giver(output: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        def give(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != own_thread:
                return forward(*args, **kwargs)
            return _repeated(output, times)

        return give

    with ExitStack() as stack:
        for one, output in kept.items():
            # On the instance, in front of the class's own method, which comes back by deletion.
            had = one.__dict__.get("forward")
            stack.callback(_put_back, one, had)
            one.forward = giver(output, one.forward)
        yield


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _before(module: nn.Module, place: Hookpoint) -> list[nn.Module]:
    """Return the blocks before the one that `place` is in, and its module where it is an output."""
    parts = place.path.split(".")
    found: list[nn.Module] = []
    for depth, part in enumerate(parts):
        around = module.get_submodule(".".join(parts[:depth]))
        if isinstance(around, nn.ModuleList | nn.Sequential):
            names = [name for name, _ in around.named_children()]
            found += [around.get_submodule(name) for name in names[: names.index(part)]]
    return found + ([module.get_submodule(place.path)] if place.side == "out" else [])


def _is_one_tensor(output: Any) -> bool:
    if isinstance(output, tuple) and output:
        return isinstance(output[0], Tensor) and all(one is None for one in output[1:])
    return isinstance(output, Tensor)


def _repeated(output: Any, times: int) -> Any:
    tensor = output[0] if isinstance(output, tuple) else output
    repeated = tensor.repeat(times, *(1 for _ in tensor.shape[1:]))
    return (repeated, *output[1:]) if isinstance(output, tuple) else repeated
