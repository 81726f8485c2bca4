"""A device that this machine lacks, played by the CPU: tensors say that they are on it, and nothing of it is fast.

    with StandInDevice("mps") as device:
        model.to("mps")            computes on the CPU, along the paths that the code takes for "mps"
    device.used                    the operations that ran on it

What the device lacks raises, as it would there. What that is stands in PyTorch's source: which operations MPS has, in
the list that is installed with it; the rest is quoted here. It says nothing of what a kernel does not take or gets
wrong, nor of the kernels inside operations that are made of others for every device. Nobody has run minilora on an
Apple or an Intel GPU.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torchgen
import yaml
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

COMPLEX = {torch.complex32, torch.complex64, torch.complex128}
LACKED_DTYPES = {
    # float64: "Cannot convert a float64 Tensor to MPS as the MPS framework doesn't support float64", OperationUtils.mm
    # in aten/src/ATen/native/mps; nor can a copy to the CPU change to it on the way (operations/Copy.mm).
    # Complex numbers: from macOS 14 on, operation by operation, gather since pytorch/pytorch#177794 (March 2026).
    "mps": {torch.float64} | COMPLEX,
    # "Required aspect fp64 is not supported on the device", on Arc A: intel/torch-xpu-ops#1742
    # What XPU has no kernel for runs on the CPU.
    "xpu": {torch.float64, torch.complex128},
}
RUN_ON_THE_CPU = {"_linalg_svd"}  # by MPS itself: linalg_svd in aten/src/ATen/mps/MPSFallback.mm
MAY_MIX_DEVICES = {"_to_copy", "copy_", "index.Tensor", "index_put", "index_put_"}

# What stands for the device, and for the CPU where a tensor leaves the device for it, in the arguments that PyTorch's
# bindings pass on: they would look for a driver, and take tensors for those of the CPU.
THERE, BACK = torch.device("meta", 1), torch.device("meta", 2)
READS_MEMORY = (Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage)


class _OnDevice(Tensor):
    """A tensor on the stand-in: `on_cpu` holds its values."""

    on_cpu: Tensor
    stand_in: "StandInDevice"

    @staticmethod
    def __new__(cls, on_cpu: Tensor, stand_in: "StandInDevice") -> "_OnDevice":
        return Tensor._make_wrapper_subclass(
            cls, on_cpu.shape, strides=on_cpu.stride(), storage_offset=on_cpu.storage_offset(), dtype=on_cpu.dtype
        )

    def __init__(self, on_cpu: Tensor, stand_in: "StandInDevice") -> None:
        self.on_cpu, self.stand_in = on_cpu, stand_in

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.stand_in.device

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = self.detach().clone()
        return nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: its `with` has ended")


class StandInDevice(TorchDispatchMode):
    """Inside the `with` there is a device of this type."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.device = torch.device(kind, 0)
        self.used: set[str] = set()
        self.names = _Names(self)

    def __enter__(self) -> "StandInDevice":
        with ExitStack() as stack:
            stack.enter_context(self.names)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the attention that every device has
            stack.enter_context(mock.patch("torch.xpu._lazy_init"))  # which would look for a driver
            stack.enter_context(mock.patch("torch.mps.driver_allocated_memory", return_value=2**20))
            # a module that moves gets new parameters: the old ones cannot take in what is no tensor of the CPU
            before = torch.__future__.get_overwrite_module_params_on_conversion()
            stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            super().__enter__()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        comes_from_there = any(isinstance(tensor, _OnDevice) for tensor in given)
        wanted = kwargs.get("device")
        wanted = THERE if wanted == self.device else wanted
        # what one call makes for itself has the device of its arguments, which PyTorch takes for the CPU
        goes_there = wanted == THERE or (wanted != BACK and (comes_from_there or self.names.of_one_call))
        if not comes_from_there and not goes_there:
            return func(*args, **kwargs)
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        cpu_args, cpu_kwargs = tree_map_only(_OnDevice, lambda x: x.on_cpu, (args, kwargs))
        out = func(*cpu_args, **cpu_kwargs)
        self._check(func, given, [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)])
        if not goes_there:
            return out
        wrapped = tree_map_only(Tensor, lambda x: _OnDevice(x, self), out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _check(self, func: Any, given: list[Tensor], out: list[Tensor]) -> None:
        name, kind = _name(func), self.device.type
        self.used.add(name)
        there = [tensor for tensor in given if isinstance(tensor, _OnDevice)]
        if lacked := {tensor.dtype for tensor in [*there, *out]} & LACKED_DTYPES[kind]:
            raise TypeError(f"{name}: {kind} has no {', '.join(map(str, lacked))}")
        if kind == "mps" and not has_mps_kernel(name):
            raise NotImplementedError(f"{name} is not implemented for the MPS device")
        elsewhere = [x for x in given if not isinstance(x, _OnDevice) and x.dim() > 0]
        if elsewhere and name not in MAY_MIX_DEVICES:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")


class _Names(TorchFunctionMode):
    """The names of devices, replaced in the arguments of every call."""

    def __init__(self, stand_in: StandInDevice) -> None:
        self.kind = stand_in.device.type
        self.of_one_call = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        from_there = any(isinstance(value, _OnDevice) for value in _values(*args, *kwargs.values()))
        if from_there and func in READS_MEMORY:
            return func(args[0].on_cpu, *args[1:], **kwargs)
        if from_there and func is Tensor.cpu:
            return args[0].to(BACK)
        if func is torch.tensor and self._is_there(kwargs.get("device")):
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(THERE)
        there = torch.device("cpu") if from_there and func is Tensor.to else THERE

        def replaced(value: Any) -> Any:
            if self._is_there(value):
                return there
            return BACK if from_there and isinstance(value, str | torch.device) and str(value) == "cpu" else value

        if from_there and func is F.scaled_dot_product_attention:
            self.of_one_call = True
        try:
            return func(*map(replaced, args), **{name: replaced(value) for name, value in kwargs.items()})
        finally:
            self.of_one_call = False

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, str | torch.device) and str(value).partition(":")[0] == self.kind


def _values(*arguments: Any) -> Iterator[Any]:
    """The arguments, and what those that are lists hold."""
    for argument in arguments:
        yield from argument if isinstance(argument, list | tuple) else (argument,)


def _name(func: Any) -> str:
    """As in PyTorch's list: gather.out, add_.Tensor, mm."""
    name, overload = func._schema.name.removeprefix("aten::"), func._schema.overload_name
    return f"{name}.{overload}" if overload else name


def has_mps_kernel(name: str) -> bool:
    """True if MPS has this operation: a kernel of its own, or one that is made of others."""
    entry = _operations().get(name)
    if name in RUN_ON_THE_CPU or entry is None:  # not in the list are variants that are generated from others
        return True
    if "structured_delegate" in entry:
        return has_mps_kernel(entry["structured_delegate"])
    keys = {key.strip() for keys in entry.get("dispatch", {"CompositeImplicitAutograd": ""}) for key in keys.split(",")}
    return "MPS" in keys or any(key.startswith("Composite") for key in keys)


@cache
def _operations() -> dict[str, dict[str, Any]]:
    """PyTorch's operations as it declares them, by name: which device has a kernel for which."""
    file = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return {entry["func"].partition("(")[0]: entry for entry in yaml.load(file.read_text(encoding="utf-8"), loader)}
