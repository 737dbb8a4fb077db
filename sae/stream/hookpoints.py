"""Reading and replacing activations at any module of a model, named by its path.

A hookpoint is a module's path in `named_modules()` and a side: what goes `in` or what comes `out`.
Patterns are globs over the path's parts: `*` and `?` stay within one part, `**` crosses dots, and
`[0-3]` is a class of characters. A path may leave out the base model's own name: `layers.8` means
`model.layers.8` where no module is called `layers.8`.

An activation is a module's first input or output, also where it comes as a tuple, as a keyword or
in a `transformers` output object. Reading stops the forward after the last hooked module.
"""

from __future__ import annotations

import difflib
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Side = Literal["in", "out"]
_GLOB = re.compile(r"\*\*|\*|\?|\[[^\]]+\]")
_NO_KEYWORDS: Mapping[str, Any] = {}
_ESCAPED = {"**": r".*", "*": r"[^.]*", "?": r"[^.]"}


@dataclass(frozen=True, order=True)
class Hookpoint:
    """One module of a model, by its path, and the side on which its activations are meant."""

    path: str
    side: Side = "out"

    def __str__(self) -> str:
        return self.path if self.side == "out" else f"{self.path}:{self.side}"


class _AllSeen(Exception):
    """Raised inside the last hook to end the forward; no error."""


def find_hookpoints(
    module: nn.Module, pattern: str, setting: str = "model.hookpoint"
) -> list[Hookpoint]:
    """Return the hookpoints that `pattern`, a value of `setting`, matches, in the model's order.

    Raises ValueError, with the nearest paths, where none does.
    """
    glob, side = _split_side(pattern)
    paths = [path for path, _ in module.named_modules() if path]
    matches = _matches(glob, paths)
    if not matches and (prefix := _base_path(module)):
        matches = _matches(f"{prefix}.{glob}", paths)
    if not matches:
        raise ValueError(_no_match(pattern, glob, paths, setting))
    return [Hookpoint(path, side) for path in matches]


def find_hookpoint(module: nn.Module, pattern: str) -> Hookpoint:
    """Return the one hookpoint that `pattern` matches.

    Raises ValueError where none or several do.
    """
    found = find_hookpoints(module, pattern)
    if len(found) > 1:
        names = ", ".join(str(hookpoint) for hookpoint in found[:12])
        more = f" and {len(found) - 12} more" if len(found) > 12 else ""
        raise ValueError(
            f"A hookpoint must match exactly one module; got {pattern!r}, which matches "
            f"{len(found)}: {names}{more}. Give one of them."
        )
    return found[0]


def find_hookpoints_of(
    module: nn.Module, patterns: str, setting: str = "model.hookpoint"
) -> list[Hookpoint]:
    """Return the hookpoints of several patterns, separated by commas, in the order they are given.

    Raises ValueError as `find_hookpoints` does.
    """
    names = [pattern.strip() for pattern in patterns.split(",")]
    found = [hookpoint for name in names for hookpoint in find_hookpoints(module, name, setting)]
    return list(dict.fromkeys(found))


@torch.no_grad()
def capture(
    module: nn.Module, hookpoints: Sequence[Hookpoint], tokens: Tensor
) -> dict[Hookpoint, Tensor]:
    """Run `module` on `tokens` (b, t) and return each hookpoint's activations, (b, t, d).

    The activations keep the model's dtype and device, and are not copied; a later module that
    works in place would change them. Attention heads, (b, t, heads, d_head), come concatenated. The
    forward ends as soon as all hookpoints were seen; of a module that runs several times, the first
    run counts. No hook outlives the call. Several threads may read one module at the same time.
    Raises RuntimeError where a module never ran, ValueError where what it gives is not (b, t, d).
    """
    captured: dict[Hookpoint, Tensor] = {}
    b, t = tokens.shape

    def keep(hookpoint: Hookpoint, activation: Tensor) -> None:
        captured.setdefault(hookpoint, _as_sequences(activation, b, t, hookpoint))
        if len(captured) == len(set(hookpoints)):
            raise _AllSeen

    with ExitStack() as hooks:
        for hookpoint in dict.fromkeys(hookpoints):
            hooks.enter_context(_hooked(module, hookpoint, keep))
        _run_until_seen(module, tokens)
    _require_all(captured, hookpoints)
    return captured


@contextmanager
def edit(module: nn.Module, hookpoint: Hookpoint, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the activation at `hookpoint` by `fn(activation)` in every forward of the block.

    `fn` gets the activation as the module gives it, mostly (b, t, d), with t = 1 for the tokens
    that `generate` adds, and must return its shape; the result is cast to its dtype. Gradients
    pass. Edits of one hookpoint apply in the order in which they were entered.
    """

    def replace(hookpoint: Hookpoint, activation: Tensor) -> Tensor:
        edited = fn(activation)
        if edited.shape != activation.shape:
            raise ValueError(
                f"An edit must keep the activation's shape; at `{hookpoint}` it got "
                f"{tuple(activation.shape)} and returned {tuple(edited.shape)}. Check the function."
            )
        return edited.to(activation.dtype)

    with _hooked(module, hookpoint, replace):
        yield


def width(module: nn.Module, hookpoint: Hookpoint, device: torch.device | str) -> int:
    """Return d, the number of activations a token has at `hookpoint`, from a tiny forward."""
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    return capture(module, [hookpoint], tokens)[hookpoint].shape[-1]


def choose_names(patterns: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return which of the hookpoints `names` comma-separated patterns match, in their order.

    For hookpoints whose model is not at hand: a path may leave out what stands before a dot. An
    empty text matches all. Raises ValueError where a pattern matches none.
    """
    chosen: set[str] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        glob, side = _split_side(pattern)
        paths = {path: name for name in names for path, s in [_split_side(name)] if s == side}
        found = _matches(glob, list(paths)) or _matches(f"**.{glob}", list(paths))
        if not found:
            raise ValueError(
                f"`model.hookpoint` must match the hookpoints that were harvested; got "
                f"{pattern!r}, and there are: {', '.join(names)}. Give some of them."
            )
        chosen |= {paths[path] for path in found}
    return tuple(name for name in names if name in chosen or not patterns.strip())


def _split_side(pattern: str) -> tuple[str, Side]:
    glob, colon, side = pattern.partition(":")
    if colon and side not in get_args(Side):
        raise ValueError(
            f"A hookpoint's side must be `:in` or `:out`; got {pattern!r}. "
            f"Write {glob + ':in'!r} or {glob!r}."
        )
    if not glob:
        raise ValueError(
            "`model.hookpoint` must name a module; got an empty path. "
            "Give a path such as `model.layers.8`."
        )
    return glob, "in" if side == "in" else "out"


def _matches(glob: str, paths: Sequence[str]) -> list[str]:
    if glob in paths:
        return [glob]
    regex = re.compile(_translate(glob))
    return [path for path in paths if regex.fullmatch(path)]


def _translate(glob: str) -> str:
    """Turn a glob into a regular expression in which `*` does not cross dots."""
    pieces, end = [], 0
    for match in _GLOB.finditer(glob):
        text = match.group()
        pieces += [re.escape(glob[end : match.start()]), _ESCAPED.get(text, text)]
        end = match.end()
    return "".join(pieces) + re.escape(glob[end:])


def _base_path(module: nn.Module) -> str | None:
    """Return the path of a `transformers` model's base model, such as `model`."""
    base = getattr(module, "base_model", None)
    if not isinstance(base, nn.Module):
        return None
    return next((path for path, child in module.named_modules() if child is base and path), None)


def _no_match(pattern: str, glob: str, paths: Sequence[str], setting: str) -> str:
    near = difflib.get_close_matches(glob, paths, n=5, cutoff=0.5)
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+", "*", path) for path in paths))
    nearest = f"Nearest: {', '.join(near)}. " if near else ""
    more = ", …" if len(kinds) > 20 else ""
    return (
        f"`{setting}` must match a module of the model; got {pattern!r}, which matches none. "
        f"{nearest}The model has: {', '.join(kinds[:20])}{more}."
    )


def _run_until_seen(module: nn.Module, tokens: Tensor) -> None:
    parameter = next(module.parameters(), None)
    device = tokens.device if parameter is None else parameter.device
    # A cache of keys and values would be filled and thrown away.
    options = {"use_cache": False} if "use_cache" in _forward_names(module) else {}
    try:
        module(tokens.to(device), **options)
    except _AllSeen:
        return


def _forward_names(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters


def _require_all(captured: Mapping[Hookpoint, Tensor], hookpoints: Sequence[Hookpoint]) -> None:
    missing = [str(hookpoint) for hookpoint in hookpoints if hookpoint not in captured]
    if missing:
        raise RuntimeError(
            f"Every hooked module must run in the model's forward; {', '.join(missing)} did not. "
            "Hook a module that the forward calls, such as a whole layer."
        )


def _as_sequences(activation: Tensor, b: int, t: int, hookpoint: Hookpoint) -> Tensor:
    """Return the activation as (b, t, d).

    Modules that see flattened tokens give (b·t, d), those that see heads (b, t, heads, d_head).
    """
    if activation.ndim == 2 and activation.shape[0] == b * t:
        return activation.reshape(b, t, -1)
    if activation.ndim == 4 and activation.shape[:2] == (b, t):
        return activation.flatten(2)
    if activation.ndim != 3 or activation.shape[:2] != (b, t):
        raise ValueError(
            f"Activations must have the shape (b, t, d) = ({b}, {t}, d); `{hookpoint}` gives "
            f"{tuple(activation.shape)}. Hook a module that handles whole sequences."
        )
    return activation


@contextmanager
def _hooked(
    module: nn.Module,
    hookpoint: Hookpoint,
    use: Callable[[Hookpoint, Tensor], Tensor | None],
) -> Iterator[None]:
    """Call `use` with the activation in every forward; what it returns, if any, replaces it.

    A hook sees the forwards of the thread that set it: another, such as one that refills a buffer,
    may run the same module at the same time.
    """
    target, own_thread = module.get_submodule(hookpoint.path), threading.get_ident()

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if threading.get_ident() != own_thread:
            return None
        key, activation = _find_activation(output, hookpoint)
        new = use(hookpoint, activation)
        return None if new is None else _with_activation(output, key, new)

    # torch leaves keywords out where the hook was removed while the forward was on its way to it.
    def before(_module: nn.Module, args: tuple, kwargs: Mapping[str, Any] = _NO_KEYWORDS) -> Any:
        if threading.get_ident() != own_thread:
            return None
        source = args if args and isinstance(args[0], Tensor) else kwargs
        key, activation = _find_activation(source, hookpoint)
        new = use(hookpoint, activation)
        if new is None:
            return None
        changed = _with_activation(source, key, new)
        return (changed, kwargs) if source is args else (args, changed)

    if hookpoint.side == "out":
        handle = target.register_forward_hook(after)
    else:
        handle = target.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _find_activation(value: Any, hookpoint: Hookpoint) -> tuple[Any, Tensor]:
    """Return the activation inside a module's inputs or outputs, and its index or keyword."""
    if isinstance(value, Tensor):
        return None, value
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return 0, value[0]
    if isinstance(value, Mapping):
        names = ["hidden_states", *value]
        for name in names:
            if isinstance(value.get(name), Tensor):
                return name, value[name]
    raise ValueError(
        f"A hooked module must take and give a tensor first; `{hookpoint}` has "
        f"{type(value).__name__}. Hook another module or its other side."
    )


def _with_activation(value: Any, key: Any, new: Tensor) -> Any:
    """Return `value` with its activation replaced, in the same kind of container."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Mapping):
        return type(value)(**{**value, key: new})
    rest = value[1:]
    if hasattr(value, "_fields"):
        return type(value)(new, *rest)
    return type(value)([new, *rest])
