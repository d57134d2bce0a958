"""Tensors of a pretended device: they say they are on cuda:0, and compute on the CPU.

What CUDA refuses raises `MixedDevices`; what it allows at a price is counted, by phase and line, in
`Device.events`. `second_device.py` makes the device exist.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _python_dispatch as dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

import flowrl

FLOWRL = str(Path(flowrl.__file__).parent)
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
WITHIN = torch.device("cpu", 1)
"""The device that PyTorch's C++ sees in place of `GPU`. It is not that of plain tensors, and yet
has a stream and a queue of backward passes, as `cuda` has only where there is a driver.
"""
PACKAGES_OF_PYTORCH = ("torch/", "jaxtyping/", "beartype/")
"""The packages between a line and the operator that it calls, which nobody asks for."""

WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "is_nonzero",
}
"""Operators whose result, or the shape of it, the host must know before it goes on."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operators that take indices of the host."""
DRAWING = {"rand", "randn", "randint", "randperm", "normal_", "uniform_", "bernoulli", "bernoulli_"}
DRAWING |= {"rand_like", "randn_like", "multinomial", "native_dropout"}
"""Operators that draw from a generator."""


class Event(NamedTuple):
    """Something that the device allows at a price.

    `kind` is `wait` where the host reads from the device and waits for it, `upload` for a copy out
    of pageable memory, which waits too, `random` for the device's own generator, which no counter
    fixes, and `double` for float64. `line` is FlowRL's innermost, and `via` that of another package
    which it called.
    """

    kind: str
    phase: str
    line: str
    via: str
    what: str


class MixedDevices(RuntimeError):
    """CUDA refuses this: tensors of two devices in one operator, or another device's generator."""


class Remote(Tensor):
    """A tensor on cuda:0; its numbers are in `host`."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> Remote:
        return Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=WITHIN,
            requires_grad=host.requires_grad,
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Remote({self.host!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, size: Any, stride: Any) -> Remote:
        return Remote(inner["host"])

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Remote) -> None:
        # PyTorch's own setter changes what C++ has of the wrapper, and leaves the numbers.
        assert (other.host.shape, other.host.dtype) == (self.host.shape, self.host.dtype)
        self.host = other.host

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return itself where nothing changes, as PyTorch does by the device that C++ sees."""
        if args and isinstance(args[0], Tensor):
            other = args[0]
            args = args[1:]
            kwargs = {"device": other.device, "dtype": other.dtype} | kwargs
        is_copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        stays = device is None or is_gpu(device)
        if stays and dtype in (None, self.dtype) and layout is None and not is_copy:
            return self
        return torch.ops.aten._to_copy(
            self,
            dtype=dtype,
            device=None if stays else device,
            non_blocking=non_blocking,
            memory_format=layout,
        )

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or GPU)

    def tolist(self) -> Any:
        in_use().note("wait", "tolist")
        return self.host.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        in_use().refuse("a tensor on cuda:0 becomes no array; copy it with .cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return in_use().compute(func, args, kwargs or {})


class Device:
    """The pretended device: it checks each operator, computes it on the CPU and keeps count."""

    used: Device | None = None
    """The one that is in use, for tensors that know of none."""

    def __init__(self) -> None:
        self.phase = "set-up"
        self.events: Counter[Event] = Counter()
        self.passed: set[str] = set()
        self.num_terms = 0
        self.refused: MixedDevices | None = None
        self._lock = threading.Lock()

    def count(self, *kinds: str, phase: str) -> int:
        """Count the events of these kinds in a phase."""
        return sum(self.told(*kinds, phase=phase).values())

    def told(self, *kinds: str, phase: str | None = None) -> Counter[Event]:
        """Return the events of these kinds, in one phase or in all."""
        chosen: Counter[Event] = Counter()
        for event, number in self.events.items():
            if event.kind in kinds and phase in (None, event.phase):
                chosen[event] = number
        return chosen

    def note(self, kind: str, what: str) -> None:
        """Count an event; a thread beside the main one has the phase `scoring`."""
        is_main = threading.current_thread() is threading.main_thread()
        phase = self.phase if is_main else "scoring"
        with self._lock:
            self.events[Event(kind, phase, *_lines(), what)] += 1

    def refuse(self, why: str) -> None:
        """Raise MixedDevices. The first is kept, since another error may hide it on its way out."""
        line, via = _lines()
        error = MixedDevices(f"{why} [{line} {via}]")
        self.refused = self.refused or error
        raise error

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Check one operator, and run it on the CPU."""
        name = func.overloadpacket.__name__
        if name == "copy_":
            return self._copy(func, args, kwargs)
        if name == "_to_copy":
            return self._move(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        remote = [tensor for tensor in tensors if isinstance(tensor, Remote)]
        local = [tensor for tensor in tensors if not isinstance(tensor, Remote)]
        asked = kwargs.get("device")
        is_remote = bool(remote) if asked is None else is_gpu(asked)
        if not (remote or is_remote):
            return _run(func, args, kwargs)
        self._check(func, name, args, kwargs, remote, local)
        result = _run(func, args, kwargs)
        if not is_remote:
            return result
        result = tree_map_only(Tensor, Remote, result)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(output.dtype == torch.float64 for output in outputs):
            self.note("double", name)
        if not remote:
            return result
        return dispatch.return_and_correct_aliasing(func, args, kwargs, result)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Copy in place, which CUDA does between devices, too."""
        target, source = args[:2]
        if isinstance(target, Remote) and not isinstance(source, Remote):
            self.note("upload", "copy_")
        elif isinstance(source, Remote) and not isinstance(target, Remote):
            self.note("wait", "copy_")
        _run(func, args, kwargs)
        return target

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Copy to a device or a dtype."""
        source = args[0]
        asked = kwargs.get("device")
        was_remote = isinstance(source, Remote)
        is_remote = was_remote if asked is None else is_gpu(asked)
        if is_remote and not was_remote:
            if not (kwargs.get("non_blocking") and is_pinned(source)):
                self.note("upload", "to")
        elif was_remote and not is_remote and not kwargs.get("non_blocking"):
            self.note("wait", "to")
        result = _run(func, args, kwargs)
        if not is_remote:
            # PyTorch takes pinned memory for a copy that nobody waits for.
            if was_remote and kwargs.get("non_blocking"):
                result.is_in_pinned_memory = True
            return result
        if result.dtype == torch.float64:
            self.note("double", "to")
        return Remote(result)

    def _check(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        remote: list[Remote],
        local: list[Tensor],
    ) -> None:
        """Refuse what CUDA refuses, and note what it pays for."""
        leaves = tree_leaves((args, kwargs))
        generators = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
        if any(generator.device.type == "cpu" for generator in generators):
            self.refuse(f"{func} on cuda:0 takes no generator of the CPU")
        if name in DRAWING and not generators:
            self.note("random", name)
        if name in WAITING:
            self.note("wait", name)
        if name in INDEXING and self._takes_indices(args):
            return
        # A number of the CPU's may stand beside tensors where each element is computed alone.
        is_number = torch.Tag.pointwise in func.tags and all(not other.ndim for other in local)
        if remote and local and not is_number:
            shapes = [f"{tuple(tensor.shape)} on {tensor.device}" for tensor in (*remote, *local)]
            self.refuse(f"{func} of tensors on two devices: {', '.join(shapes)}")

    def _takes_indices(self, args: Any) -> bool:
        """Note what the indices of a tensor on the device cost; False where CUDA refuses them."""
        target, indices, *values = args
        is_value_there = all(
            isinstance(value, Remote) or not value.ndim
            for value in values[:1]
            if isinstance(value, Tensor)
        )
        if not isinstance(target, Remote) or not is_value_there:
            return False
        for index in indices:
            if index is None:
                continue
            if index.dtype in (torch.bool, torch.uint8):
                self.note("wait", "index by mask")
            if not isinstance(index, Remote):
                self.note("upload", "index")
        return True


class Watching(dispatch.TorchDispatchMode):
    """Hands every operator of a thread to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return in_use().compute(func, args, kwargs or {})


def in_use() -> Device:
    """Return the device of the `second_device` that is entered."""
    assert Device.used is not None, "a Remote tensor outlived its second_device()"
    return Device.used


def is_gpu(device: Any) -> bool:
    """Tell whether this is the pretended device, under the name that users or C++ have for it."""
    return device is not None and torch.device(device) in (GPU, torch.device("cuda"), WITHIN)


def is_pinned(tensor: Tensor) -> bool:
    """Tell whether this tensor is in pretended pinned memory, or a view of one that is."""
    whole = tensor if tensor._base is None else tensor._base
    return getattr(tensor, "is_in_pinned_memory", getattr(whole, "is_in_pinned_memory", False))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the numbers, without being asked about it again."""
    args, kwargs = tree_map_only(Remote, lambda remote: remote.host, (args, kwargs))
    if is_gpu(kwargs.get("device")):
        kwargs = kwargs | {"device": CPU}
    with dispatch._disable_current_modes():
        return func(*args, **kwargs)


def _lines() -> tuple[str, str]:
    """Return FlowRL's innermost line, and the innermost one of a package that it called."""
    via = ""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(FLOWRL):
            return f"{path.removeprefix(FLOWRL)[1:]}:{frame.f_lineno}", via
        _, is_package, place = path.partition("site-packages/")
        if is_package and not via and not place.startswith(PACKAGES_OF_PYTORCH):
            via = f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return "", via
