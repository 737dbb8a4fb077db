"""A pretended GPU, for machines that have none: it computes on the CPU, and refuses what CUDA does.

`Gpu` is a tensor in CPU memory that says it is on cuda:0. Everything that meets it is looked at:
tensors of two devices in one operation raise, as do `.numpy()` and a generator of the other device,
and what would wait for the device in the middle of a training step is noted in `waits`. So whole
runs and evaluations can be tried with real numbers.

Cannot see: kernels, streams, captured graphs (a step runs uncaptured), autocast, CUDA's own memory;
and an operation that torch has on one of the two devices only.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # which wraps functions as it is imported: before any is replaced here
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CODE = "vulkan"  # a device type that torch neither has nor looks for: inside it means the GPU
CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive"),
    *("equal", "bincount"),
}
NEW = {Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full}


class _Now(threading.local):
    """What a thread is in the middle of."""

    in_step = in_backward = is_for_cpu = False


_now = _Now()
waits: list[str] = []
"""What would have waited for the device in a training step, and where."""


class Gpu(Tensor):
    """A tensor that is said to be on the GPU; `inner` has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Gpu:
        """Return what looks like `inner`."""
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=CPU
        )

    def __init__(self, inner: Tensor):
        self.inner = inner

    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Gpu) -> None:
        self.inner = value.inner

    def __repr__(self) -> str:
        return f"Gpu({self.inner!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Generator(torch._C.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:  # noqa: ARG004 - CPU's, whichever is meant
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu"):
        self.is_gpus = _is_gpu(device)


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Gpu) -> Tensor:
        return x.inner.detach().clone()

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return Gpu(grad)


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return Gpu(x.detach().clone())

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return grad.inner if isinstance(grad, Gpu) else grad


# ---- what is called by name: devices that are asked for


def _called(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a function of torch with devices that it can understand."""
    kwargs = dict(kwargs)
    x = args[0] if args else None
    _check_generator(func, args, kwargs)
    if func in MOVES:
        return MOVES[func](*args, **kwargs)
    if isinstance(x, Gpu) and func in OF_THE_HOST:
        return OF_THE_HOST[func](x)
    if func in (Tensor.matmul, Tensor.__matmul__) and {x.ndim, args[1].ndim} == {1, 2}:
        # Inside, torch changes a shape in place, which a wrapper does not follow.
        return (x[None] @ args[1])[0] if x.ndim == 1 else (x @ args[1][:, None])[:, 0]
    if func in NEW and isinstance(x, Gpu) and kwargs.get("device") is None:
        kwargs["device"] = CUDA
    is_gpus, is_pinned = _is_gpu(kwargs.get("device")), kwargs.pop("pin_memory", False)
    if func in (torch.tensor, torch.as_tensor) and is_gpus:
        made = _called(func, args, {**kwargs, "device": CPU})
        return _to(made, CUDA)
    if is_gpus:
        kwargs["device"] = CODE
    _now.is_for_cpu = kwargs.get("device") is not None and not is_gpus
    try:
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
    finally:
        _now.is_for_cpu = False
    if is_pinned:
        out.is_pretended_pinned = True
    return out


def _check_generator(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    if (generator := kwargs.get("generator")) is None:
        return
    is_gpus = _is_gpu(kwargs.get("device")) or any(isinstance(a, Gpu) for a in args)
    if is_gpus != getattr(generator, "is_gpus", False):
        raise RuntimeError(f"a generator of the other device was given to {func}")


def _moved(x: Tensor, *given: Any, **named: Any) -> Tensor:
    """Do as `Tensor.to`."""
    device, dtype = named.get("device"), named.get("dtype")
    for one in given:
        if isinstance(one, Tensor):
            device, dtype = one.device, one.dtype
        elif isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, (str, torch.device)):
            device = one
    flags = [one for one in given if isinstance(one, bool)]
    is_async = named.get("non_blocking", bool(flags) and flags[0])
    return _to(x, device, dtype, is_async=is_async, copy=named.get("copy", False))


def _to(
    x: Tensor, device: Any, dtype: Any = None, *, is_async: bool = False, copy: bool = False
) -> Tensor:
    was_gpus = isinstance(x, Gpu)
    is_gpus = was_gpus if device is None else _is_gpu(device)
    if was_gpus != is_gpus:
        if was_gpus or not (is_async and getattr(x, "is_pretended_pinned", False)):
            _note("a copy between devices")
        x, copy = (_Down if was_gpus else _Up).apply(x), False
    with torch._C.DisableTorchFunction():
        return Tensor.to(x, dtype or x.dtype, copy=copy)


def _no_array(_: Tensor) -> None:
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")


def _listed(x: Gpu) -> Any:
    _note("tolist")
    return x.inner.detach().tolist()


MOVES: dict[Any, Callable[..., Tensor]] = {
    Tensor.to: _moved,
    Tensor.cpu: lambda x: _to(x, CPU),
    Tensor.cuda: lambda x: _to(x, CUDA),
    Tensor.type_as: lambda x, other: _moved(x, other),
}
OF_THE_HOST: dict[Any, Callable[[Any], Any]] = {
    Tensor.numpy: _no_array,
    Tensor.__array__: _no_array,
    Tensor.tolist: _listed,
    Tensor.data_ptr: lambda x: x.inner.data_ptr(),
}


# ---- what is computed: one operation of torch after the other


def _computed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what the operation would on the GPU, if it could."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    on_gpu = [t for t in tensors if isinstance(t, Gpu)]
    if on_gpu:
        _check(func, args, kwargs, tensors)
    device = kwargs.get("device")
    if _now.in_backward and not tensors and device is not None:
        is_gpus = True  # formulas of gradients give the device that torch itself believes in
    elif on_gpu and not _now.is_for_cpu:
        is_gpus = True
    else:
        is_gpus = _is_gpu(device) if device is not None else bool(on_gpu)
    real = tree_map(lambda t: t.inner if isinstance(t, Gpu) else t, (args, kwargs))
    if device is not None:
        real[1]["device"] = CPU
    out = func(*real[0], **real[1])
    if not is_gpus:
        return out
    written = {id(t.inner): t for t in _written(func, args, kwargs) if isinstance(t, Gpu)}

    def known(t: Any) -> Any:
        return written[id(t)] if id(t) in written else Gpu(t) if isinstance(t, Tensor) else t

    return tree_map(known, out)


def _check(func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    """Raise where two devices meet that must not; note what waits."""
    name = func._schema.name.split("::")[1]
    others = [t for t in tensors if not isinstance(t, Gpu)]
    if name in WAITING:
        _note(name)
    if name.startswith("masked_fill") and isinstance(args[2], Gpu):
        _note("masked_fill by a number on the device")
    if name in ("index", "index_put", "index_put_"):
        places = [t for t in args[1] if isinstance(t, Tensor)]
        if any(t.dtype == torch.bool or not isinstance(t, Gpu) for t in places):
            _note("an index by a mask, or from the host")
        if isinstance(args[0], Gpu):  # whose places may be on the host
            others = [t for t in args[2:] if isinstance(t, Tensor) and not isinstance(t, Gpu)]
    if name == "copy_":
        is_async = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if others and not (is_async and getattr(args[1], "is_pretended_pinned", False)):
            _note("a copy between devices")
        return
    is_written = any(not isinstance(t, Gpu) for t in _written(func, args, kwargs))
    if is_written or any(t.ndim > 0 for t in others):
        raise RuntimeError(f"Expected all tensors to be on the same device, in {func}")


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation changes in place."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    return found


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", CODE)


def _note(what: str) -> None:
    if _now.in_step:
        lines = [f for f in traceback.extract_stack() if "/sae" in f.filename]
        waits.append(f"{what}: " + " < ".join(f"{f.name}:{f.lineno}" for f in lines[:-5:-1]))


# ---- the world around


class _Stream:
    def __init__(self, *_: Any):
        self.wait_event = self.wait_stream = lambda _: None
        self.record_event = SimpleNamespace

    def synchronize(self) -> None:
        _note("a stream's synchronize")


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let this machine have a GPU in the block, for all threads that begin in it."""
    waits.clear()
    # Accelerate keeps the first device for good.
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _replace_what_asks_for_one(monkeypatch)
        with _Operations(), _Functions():
            try:
                yield
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)


def _replace_what_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae.train.capture import Captured
    from sae_kernels import launching

    total = SimpleNamespace(total_memory=8 * 2**30, name="pretended", major=9, minor=0)
    stand_ins = {
        **{"is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0},
        **{"set_device": lambda _: None, "synchronize": lambda _=None: _note("synchronize")},
        **{"Stream": _Stream, "current_stream": _Stream, "stream": lambda _: nullcontext()},
        **{"device": lambda _: nullcontext(), "graph_pool_handle": lambda: (0, 0)},
        **{"get_device_capability": lambda _=None: (9, 0), "is_bf16_supported": lambda *_: True},
        **{"get_device_properties": lambda _=None: total, "get_device_name": lambda _=None: "none"},
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setattr(launching, "HAS_TRITON", False)
    monkeypatch.setattr(Captured, "_capture", lambda *_: None)
    _let_modules_move(monkeypatch)
    _let_optimisers_group(monkeypatch)
    engine, run = torch.autograd._engine_run_backward, threading.Thread.run

    def backward(outputs: Any, *rest: Any, **named: Any) -> Any:
        before, _now.in_backward = _now.in_backward, isinstance(outputs[0], Gpu)
        try:
            return engine(outputs, *rest, **named)
        finally:
            _now.in_backward = before

    def run_in_modes(thread: threading.Thread) -> None:
        with _Operations(), _Functions():
            run(thread)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", backward)
    monkeypatch.setattr(threading.Thread, "run", run_in_modes)


@contextmanager
def in_step() -> Iterator[None]:
    """Note in the block what would wait for the device."""
    _now.in_step = True
    try:
        yield
    finally:
        _now.in_step = False


def _let_modules_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module have other parameters once it is on another device; tied ones stay tied."""
    apply = torch.nn.Module._apply

    def has_compatible_type(input: Tensor, from_: Tensor) -> bool:
        return isinstance(input, Gpu) == isinstance(from_, Gpu)

    def applied(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
        own = self._parameters
        tied = [(a, b) for a in own for b in own if a < b and own[a] is own[b] is not None]
        apply(self, fn, recurse)
        for a, b in tied:
            own[b] = own[a]
        return self

    monkeypatch.setattr(torch, "_has_compatible_shallow_copy_type", has_compatible_type)
    monkeypatch.setattr(torch.nn.Module, "_apply", applied)


def _let_optimisers_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own grouping of tensors by device looks below what a tensor says."""

    def grouped(lists: Any, with_indices: bool = False) -> Any:  # noqa: ARG001 - torch's signature
        device = lists[0][0].device
        return {(device, lists[0][0].dtype): ([list(part) for part in lists], [])}

    name = "_group_tensors_by_device_and_dtype"
    monkeypatch.setattr(torch.optim.Optimizer, name, staticmethod(grouped))
