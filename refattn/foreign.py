"""How an array of any library becomes a NumPy array, without importing that library.

NumPy's own protocols come first.  What they cannot say (NumPy has no bfloat16 or float8) is read from the DLPack capsule itself,
whose layout is fixed: https://dmlc.github.io/dlpack/latest/c_api.html.  No element is copied.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from .errors import BackendUnavailableError, DtypeError

#: (DLPack type code, bits) -> NumPy dtype.  0 int, 1 uint, 2 float, 4 bfloat, 6 bool, from 7 the narrow floats of DLPack 1.1.
_DLPACK_DTYPES: dict[tuple[int, int], Any] = {
    **{(0, 8 * n): np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{(1, 8 * n): np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{(2, 8 * n): np.dtype(f"f{n}") for n in (2, 4, 8)},
    (4, 16): ml_dtypes.bfloat16,
    (6, 8): np.bool_,
    (7, 8): ml_dtypes.float8_e3m4,
    (8, 8): ml_dtypes.float8_e4m3,
    (9, 8): ml_dtypes.float8_e4m3b11fnuz,
    (10, 8): ml_dtypes.float8_e4m3fn,
    (11, 8): ml_dtypes.float8_e4m3fnuz,
    (12, 8): ml_dtypes.float8_e5m2,
    (13, 8): ml_dtypes.float8_e5m2fnuz,
}
_CPU_DEVICES = {1, 3}  # kDLCPU, kDLCUDAHost


class _DLDevice(ctypes.Structure):
    _fields_ = [("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class _DLDataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def as_numpy(x: Any, what: str) -> np.ndarray:
    """`x` as a NumPy array that shares its memory where it can; `what` names it in errors ("softmax: q").

    Raises
    ------
    DtypeError
        When `x` is no array, an array NumPy cannot hold, or a masked one.
    BackendUnavailableError
        When it lives on a device.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise DtypeError(f"{what} is a masked array, whose mask would be ignored; fill it, and pass what is allowed as the mask operand")
    if isinstance(x, np.ndarray | np.generic):
        return np.asarray(x)
    if isinstance(x, type) or not any(hasattr(x, protocol) for protocol in ("__array__", "__dlpack__", "__cuda_array_interface__")):
        raise DtypeError(f"{what} is a {type(x).__name__}, not an array; pass anything with __array__ or __dlpack__ (np.asarray makes one)")
    _refuse_device(x, what)
    try:
        if getattr(x, "requires_grad", False) and hasattr(x, "detach"):
            x = x.detach()
        if hasattr(x, "__array__"):
            return np.asarray(x)
    except (TypeError, ValueError) as problem:  # NumPy has no such dtype; any other trouble DLPack might pass over in silence
        if not hasattr(x, "__dlpack__"):
            raise _unreadable(x, what, problem) from problem
    except Exception as problem:
        raise _unreadable(x, what, problem) from problem
    try:
        return _from_dlpack(x, what)
    except DtypeError:
        raise
    except Exception as problem:
        raise _unreadable(x, what, problem) from problem


def _unreadable(x: Any, what: str, problem: Exception) -> DtypeError:
    return DtypeError(f"{what}: {type(x).__name__} could not be read as an array: {problem}")


def _refuse_device(x: Any, what: str) -> None:
    readable = hasattr(x, "__array__") or hasattr(x, "__dlpack__")
    try:
        device = int(x.__dlpack_device__()[0]) if hasattr(x, "__dlpack_device__") else 1
    except Exception:  # it cannot say; reading it will tell
        device = 1
    if device not in _CPU_DEVICES or not readable:
        raise BackendUnavailableError(f"{what} is on a device, and no installed backend computes there; copy it to the host first")


def _from_dlpack(x: Any, what: str) -> np.ndarray:
    capsule = x.__dlpack__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _DLTensor.from_address(pointer(capsule, b"dltensor"))
    key = (tensor.dtype.code, tensor.dtype.bits)
    if key not in _DLPACK_DTYPES or tensor.dtype.lanes != 1:
        raise DtypeError(f"{what}: element type {getattr(x, 'dtype', key)} has no NumPy or ml_dtypes counterpart")
    dtype = np.dtype(_DLPACK_DTYPES[key])
    shape = tuple(tensor.shape[n] for n in range(tensor.ndim))
    if not tensor.data or 0 in shape:
        return np.empty(shape, dtype)
    strides = _strides(tensor, shape, dtype.itemsize)
    first = min(0, sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0))
    length = sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True)) + dtype.itemsize
    memory = (ctypes.c_char * length).from_address(tensor.data + tensor.byte_offset + first)
    memory.owner = capsule  # the capsule keeps the tensor alive, and the array keeps this buffer alive
    return np.ndarray(shape, dtype, memory, offset=-first, strides=strides)


def _strides(tensor: _DLTensor, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    if tensor.strides:
        return tuple(tensor.strides[n] * itemsize for n in range(tensor.ndim))
    return tuple(int(np.prod(shape[n + 1 :])) * itemsize for n in range(tensor.ndim))
