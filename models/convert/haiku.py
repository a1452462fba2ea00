"""DeepMind's NFNet files (F0_haiku.npz and so on): {module: {parameter: array}}, not as an npz but as a pickle.

A pickle is a program that calls what it names. Here it can name only the functions of `FUNCTIONS`, which are ours, keep
bytes and call nothing else; numpy sees no more than bytes whose type and length have been checked. This is the only file
of podwright that may import pickle (tests/test_security.py).
"""

import math
import pathlib
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from models.convert.tensors import ConversionError, Tensor, in_memory

FLOATS = ("f2", "f4", "f8")  # what parameters may be
# Ways to get at an object other than by its name.
REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "NEXT_BUFFER"}


def holds_haiku(source: pathlib.Path) -> bool:
    return haiku_file(source).suffix == ".npz"


def haiku_file(source: pathlib.Path) -> pathlib.Path:
    """The file itself, or the only .npz of a folder, as an export leaves one."""
    found = list(source.glob("*.npz")) if source.is_dir() else []
    return found[0] if len(found) == 1 else source


def read_haiku(source: pathlib.Path) -> dict[str, Tensor]:
    """The arrays by slash-joined names of module and parameter, all in memory. Raises ConversionError."""
    file = haiku_file(source)
    try:
        with open(file, "rb") as opened:
            is_zip = opened.read(4) == b"PK\x03\x04"
        return _read_zip(file) if is_zip else _read_pickle(file)
    except ConversionError as error:
        raise ConversionError(f"{file} {error}") from None
    except Exception as error:  # whatever a file that is damaged or made to do harm leads numpy and pickle to
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(
            f"{file} cannot be read, it is cut short or no file of Haiku parameters: {said}"
        ) from None


def _read_zip(file: pathlib.Path) -> dict[str, Tensor]:
    """A true npz, with the slash-joined names as keys."""
    with np.load(file, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    for name, array in found.items():
        if not isinstance(array, np.ndarray) or array.dtype.str[1:] not in FLOATS:
            raise ConversionError(f"holds {name}, which is no array of {', '.join(FLOATS)}")
    return {name: in_memory(array) for name, array in found.items()}


def _read_pickle(file: pathlib.Path) -> dict[str, Tensor]:
    with open(file, "rb") as opened:
        for opcode, _, _ in pickletools.genops(opened):
            if opcode.name in REFUSED_OPCODES:
                raise _forbidden(f"uses the opcode {opcode.name}")
        opened.seek(0)
        tree = _Reader(opened).load()
    if isinstance(tree, tuple) and len(tree) == 2 and tree[1] == {}:  # (parameters, state), and NFNet has no state
        tree = tree[0]
    if not isinstance(tree, dict) or not all(isinstance(module, dict) for module in tree.values()):
        raise ConversionError("is no file of Haiku parameters: {module: {parameter: array}} is one")
    leaves = {f"{module}/{name}": leaf for module, leaves in tree.items() for name, leaf in leaves.items()}
    for path, leaf in leaves.items():
        if not isinstance(leaf, _Array):
            raise ConversionError(f"holds a {type(leaf).__name__} as {path}: arrays are what can be imported")
    return {path: in_memory(leaf.value) for path, leaf in leaves.items()}


def _forbidden(what: str) -> ConversionError:
    return ConversionError(f"{what}, which parameters do not need and a pickle could run: nothing of it was run")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> "_Function":
        return _named(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise _forbidden("uses persistent ids")


class _Function:
    """One of `FUNCTIONS` as a pickle gets it. Not the function itself: a pickle can set attributes of whatever it holds, and
    this one refuses."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _forbidden("changes a function")


class _Dtype:
    """numpy.dtype("f4", False, True), and the state that follows, of which the second entry is the order of bytes."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self._order = state[1]

    def made(self) -> np.dtype:
        if self._code not in FLOATS or self._order not in ("<", ">", "=", "|"):
            raise ConversionError(f"holds an array of {self._code!r}: {', '.join(FLOATS)} are what can be imported")
        return np.dtype(self._order + self._code)


class _Array:
    """numpy's `_reconstruct` makes an empty one, the state that follows says what is in it."""

    __slots__ = ("value",)

    def __init__(self, *how: Any):
        self.value = np.zeros(0, np.float32)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, data = state
        self.value = _array(data, dtype, shape, "F" if by_columns else "C")


def _array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise ConversionError("holds an array without a dtype")
    made = dtype.made()  # first, since an array of objects has no bytes
    if (
        not isinstance(data, bytes | bytearray)
        or len(data) != math.prod(shape) * made.itemsize
        or min(shape, default=0) < 0
    ):
        raise ConversionError(f"holds an array of shape {shape} whose data is no {made} of that number")
    return np.frombuffer(data, made).reshape(shape, order="F" if order == "F" else "C")


def _filled(value: np.ndarray) -> _Array:
    array = _Array()
    array.value = value
    return array


def _rebuilt(function: Any, arguments: tuple, state: tuple, rest: Any = None) -> _Array:
    """As dill writes an array: the call that makes one, and its state."""
    array = function(*arguments) if isinstance(function, _Function) else None
    if not isinstance(array, _Array):
        raise _forbidden("makes an array of something else")
    array.__setstate__(state)
    return array


def _encoded(text: str, encoding: str) -> bytes:
    """How bytes are written in the protocols that have none."""
    if encoding != "latin1":
        raise _forbidden(f"encodes text as {encoding}")
    return text.encode("latin1")


class _Module(str):
    """The name of a module that dill would import."""

    __slots__ = ()


def _imported(name: Any, safe: bool = False) -> _Module:
    if not isinstance(name, str):
        raise _forbidden(f"imports {name!r}")
    return _Module(name)


def _attribute(module: Any, name: Any) -> _Function:
    if not isinstance(module, _Module):
        raise _forbidden(f"gets {name!r} of something")
    return _named(module, name)


def _scalar(dtype: Any, data: Any) -> _Array:
    return _filled(_array(data, dtype, (), "C"))


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _filled(_array(data, dtype, shape, order))


def _no_array(*arguments: Any) -> Any:
    """The class is only named, as what `_reconstruct` is to make."""
    raise _forbidden("calls numpy.ndarray")


NUMPY: Mapping[str, Callable[..., Any]] = {
    "multiarray._reconstruct": _Array,
    "_multiarray_umath._reconstruct": _Array,
    "multiarray.scalar": _scalar,
    "_multiarray_umath.scalar": _scalar,
    "numeric._frombuffer": _from_buffer,
}
DILL: Mapping[str, Callable[..., Any]] = {
    "_create_array": _rebuilt,
    "_import_module": _imported,
    "_get_attr": _attribute,
}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _no_array,
    **{f"numpy.{core}.{name}": function for core in ("core", "_core") for name, function in NUMPY.items()},
    "_codecs.encode": _encoded,
    "collections.OrderedDict": dict,
    **{f"haiku._src.data_structures.{name}": dict for name in ("FlatMapping", "FlatMap", "frozendict")},
    # dill 0.3.3, of the time of the released files, imports numpy's module and takes `_reconstruct` out of it.
    **{f"dill.{module}.{name}": function for module in ("_dill", "dill") for name, function in DILL.items()},
}


def _named(module: str, name: str) -> _Function:
    if f"{module}.{name}" not in FUNCTIONS:
        raise _forbidden(f"asks for {module}.{name}")
    return _Function(FUNCTIONS[f"{module}.{name}"])


def write_haiku(file: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """A pickle as DeepMind's, which dill and pickle load: plain dicts of numpy arrays, all in memory at once."""
    tree: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition("/")
        tree.setdefault(module, {})[parameter] = np.array(tensor.whole(), order="C")
    with open(file, "wb") as opened:
        pickle.dump(tree, opened, protocol=4)
