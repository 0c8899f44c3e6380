"""A pretended GPU: tensors that say cuda:0 to Python, autograd and autocast, and hold a tensor on the CPU.

A `main` runs unchanged with --device cuda, and shows what a run on the CPU cannot: tensors of both sides in one
operation raise, autocast has CUDA's lists, and each moment at which the program would wait for the GPU is noted.
Not covered: kernels and their speed, several GPUs, compiled blocks (give --compile=off)."""

import collections
import contextlib
import ctypes
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT, Wait = Path(__file__).parents[1], collections.namedtuple("Wait", "kind place line")  # place: file:function
WAITS, UNDER_WAY = [], []
# Operations that wait: the CPU has to know a number, or the shape of the result.
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "nms", "_unique2", "unique_dim", "bincount"}


def note(kind):
    """Notes a wait of the main thread; others may wait. Asynchronous copies to the CPU have then arrived."""
    while UNDER_WAY and kind != "pageable copy":
        torch.Tensor.copy_(*UNDER_WAY.pop(0))
    frame = sys._getframe(1)
    while frame and (Path(frame.f_code.co_filename).parent not in (ROOT, ROOT / "eval") or "<" in frame.f_code.co_name):
        frame = frame.f_back
    if threading.current_thread() is threading.main_thread():
        place = frame and f"{Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()}:{frame.f_code.co_name}"
        WAITS.append(Wait(kind, place, frame and frame.f_lineno))


def pin_memory(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().pinned = True
    return tensor


def compute(_, function, types, args=(), kwargs=None):
    """Does an operation as CUDA would. Raises RuntimeError for tensors of both sides."""
    kwargs, name = kwargs or {}, function._schema.name.split("::")[1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours, device = [x for x in tensors if isinstance(x, CudaTensor)], kwargs.get("device")
    to_gpu = torch.device(device).type == "cuda" if device is not None else bool(ours)
    if not (ours or to_gpu or kwargs.get("pin_memory")):
        return function(*args, **kwargs)
    foreign = [x for x in tensors if x.ndim and not isinstance(x, CudaTensor)]  # a number may come from the CPU
    if name in ("copy_", "_to_copy"):
        target, source = args[:2] if name == "copy_" else (None, args[0])
        from_cpu, foreign = not isinstance(source, CudaTensor), []
        if from_cpu == (to_gpu if target is None else isinstance(target, CudaTensor)):
            free = kwargs.get("non_blocking", len(args) > 2 and args[2])
            pinned = source.is_pinned() if from_cpu else target is None or target.is_pinned()
            if free and pinned and not from_cpu:
                empty = torch.zeros_like(source.held, dtype=kwargs.get("dtype")).pin_memory()
                UNDER_WAY.append((empty if target is None else target, source.held.clone()))
                return UNDER_WAY[-1][0]
            if not (free and pinned):
                note("copy to the CPU" if not from_cpu else "pageable copy" if free else "blocking copy")
    elif ours and "index" in name and isinstance(args[1], (list, tuple)):
        for ids in (x for x in args[1] if x is not None):
            foreign = [x for x in foreign if x is not ids or not isinstance(args[0], CudaTensor)]  # copied first
            if not isinstance(ids, CudaTensor) or ids.dtype in (torch.bool, torch.uint8):
                note("nonzero" if isinstance(ids, CudaTensor) else "blocking copy")
    elif ours and name in WAITING:
        note("item" if name == "_local_scalar_dense" else name)
    if ours and foreign or to_gpu and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"{function}: all tensors, and a generator, must be on cuda:0, some are on the CPU")
    if name == "_fused_sdp_choice":
        return 0  # attention by its formula, as CUDA's kernels for it are not there
    changes = dict(pin_memory=False, device=torch.device("cpu") if to_gpu else device)
    held_args, held_kwargs = tree_map_only(CudaTensor, lambda x: x.held, (
        args, {key: changes.get(key, value) for key, value in kwargs.items()}))
    result = function(*held_args, **held_kwargs)
    if not to_gpu:
        return result.pin_memory() if kwargs.get("pin_memory") else result
    known = {id(getattr(x, "held", x)): x for x in tensors}  # what is changed in place stays what it is
    return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else CudaTensor(x), result)


class CudaTensor(torch.Tensor):  # says that it is on cuda:0; what it holds is on the CPU
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device="cuda:0")
        self.held = held
        return self
    __torch_dispatch__, __torch_function__ = classmethod(compute), torch._C._disabled_torch_function_impl
    __repr__, tolist = lambda self: f"CudaTensor({self.held})", lambda self: self.cpu().tolist()
    __reduce_ex__ = lambda self, protocol: self.cpu().__reduce_ex__(protocol)  # torch.save


class Factories(TorchDispatchMode):  # operations that have no tensor among their arguments, but a device
    _should_skip_dynamo, __torch_dispatch__ = classmethod(lambda cls: False), compute


class Stream:  # or event
    __init__ = lambda self, *args, **options: None
    __getattr__ = lambda self, name: lambda *_: note("synchronize") if name == "synchronize" else self


def let_backward_run():
    """autograd asks CUDA whether device 0 is in use, entry 4 of a table of functions, which raises without a GPU. It
    gets the answer of entry 2, whether torch was built for CUDA. This stays; without CudaTensors nobody asks."""
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
    library._ZN2at6detail12getCUDAHooksEv.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(library._ZN2at6detail12getCUDAHooksEv())
    table = let_backward_run.table = (ctypes.c_void_p * 128)(*(ctypes.c_void_p * 128).from_address(hooks.value - 16))
    table[2 + 4], hooks.value = table[2 + 2], ctypes.addressof(table) + 16
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(table))  # it is needed until the process has ended


@contextlib.contextmanager
def pretended_cuda():  # yields the list of waits
    if torch.version.cuda is None or torch.cuda.is_available():
        pytest.skip("a GPU is pretended where torch is built for CUDA and finds none")
    hasattr(let_backward_run, "table") or let_backward_run()
    WAITS.clear(), UNDER_WAY.clear()
    apply, compatible = nn.Module._apply, torch._has_compatible_shallow_copy_type

    def keep_hooks(self, *args, **options):  # `to` makes new parameters here, on CUDA it keeps them
        hooks = {name: p._backward_hooks for name, p in self._parameters.items() if p is not None}
        apply(self, *args, **options)
        for name, hook in hooks.items():
            self._parameters[name]._backward_hooks = hook
        return self

    cuda = dict(is_available=True, is_bf16_supported=True, is_current_stream_capturing=False, device_count=1,
                current_device=0, set_device=None, current_stream=Stream(), stream=contextlib.nullcontext(),
                max_memory_allocated=0, _lazy_init=None, _lazy_call=None)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for place, name, value in [(torch.cuda, name, lambda *_, x=x, **options: x) for name, x in cuda.items()] + [
                (torch.cuda, "synchronize", lambda *_: note("synchronize")), (torch.cuda, "Stream", Stream),
                (torch.cuda, "Event", Stream), (torch.accelerator, "is_available", lambda: True),
                (torch.Tensor, "is_pinned", lambda x: getattr(x.untyped_storage(), "pinned", False)),
                (torch.Tensor, "pin_memory", pin_memory), (nn.Module, "_apply", keep_hooks),
                (torch, "_has_compatible_shallow_copy_type", lambda *pair: compatible(*pair) and not any(
                    isinstance(x, CudaTensor) for x in pair)), (torch.backends.cudnn, "enabled", False),
                (torch.utils._foreach_utils, "_foreach_supported_types", [torch.Tensor, nn.Parameter, CudaTensor])]:
            patch.setattr(place, name, value)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is seen as a copy
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(Factories())
        yield WAITS
