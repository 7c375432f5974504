"""The C ABI by ctypes: constants, structs and functions as the header beside the library declares them.

ctypes releases the interpreter's lock during a call. Standard library alone.
"""
import ctypes
import os
import re
from pathlib import Path

from .errors import Error, VersionError

ABI_VERSION = 1  # of KVW_ABI_VERSION that this package is written for

_SCALARS = {
    "int8_t": ctypes.c_int8,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "float": ctypes.c_float,
    "kvw_status": ctypes.c_int32,
    "kvw_stream": ctypes.c_void_p,
}


def _parse(header):
    """Constants, structs and, of each function, its result and arguments."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    constants, structs, functions = {}, {}, {}
    for name, value in re.findall(r"^#define (KVW_\w+) \(?(-?(?:0x)?[0-9A-Fa-f]+)u?\)?\s*$", text, re.M):
        constants[name] = int(value, 0)

    def kind(name, stars):
        if stars:
            return ctypes.c_char_p if name == "char" else ctypes.c_void_p
        return structs.get(name) or _SCALARS[name]

    for name, body in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", text, re.S):
        name, body = body, name
        fields = []
        for field in filter(None, (f.strip() for f in body.split(";"))):
            base, stars, member, count = re.fullmatch(r"(?:const )?(\w+) (\**)(\w+)(?:\[(\w+)\])?", field).groups()
            member_kind = kind(base, stars)
            fields.append((member, member_kind * constants[count] if count else member_kind))
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    for result, stars, name, arguments in re.findall(r"^KVW_API (?:const )?(\w+) (\**)(\w+)\((.*?)\);", text, re.M | re.S):
        kinds = [] if arguments == "void" else [
            ctypes.c_void_p if "*" in a else kind(a.split()[0], "") for a in arguments.split(",")
        ]
        functions[name] = (kind(result, stars), kinds)
    return constants, structs, functions


def _open():
    folder = Path(os.environ.get("KVWARP_TREE") or Path(__file__).parent)
    inside = "KVWARP_TREE" not in os.environ
    header = folder / ("kvwarp.h" if inside else "include/kvwarp.h")
    library = folder / ("libkvwarp.so.1" if inside else "lib/libkvwarp.so.1")
    try:
        return header.read_text(), ctypes.CDLL(str(library))
    except OSError as e:
        raise ImportError(f"kvwarp: no library beside {header} (KVWARP_TREE names a tree of csrc/link/build): {e}") from e


_header, library = _open()
constants, structs, _functions = _parse(_header)
for _name, (_result, _arguments) in _functions.items():
    getattr(library, _name).restype, getattr(library, _name).argtypes = _result, _arguments
if library.kvw_abi_version() != ABI_VERSION or constants["KVW_ABI_VERSION"] != ABI_VERSION:
    raise VersionError("abi_version", f"the library has {library.kvw_abi_version()}, this package {ABI_VERSION}")


def params(op, /, **fields):
    """The params of an op, `struct_size` filled in; what is not named is zero."""
    struct = structs[f"kvw_{op}_params"]
    unknown = fields.keys() - {name for name, _ in struct._fields_}
    if unknown:
        raise Error(min(unknown), f"not a field of {struct.__name__}")
    return struct(struct_size=ctypes.sizeof(struct), **fields)


def describe(status):
    """A status in words."""
    return library.kvw_status_str(status).decode()


def call(op, args, stream=None):
    """Runs an op: on the processor where `stream` is None, else enqueued on that stream of the current CUDA context."""
    if stream is None:
        status = getattr(library, f"kvw_{op}_cpu")(ctypes.byref(args))
    else:
        status = getattr(library, f"kvw_{op}")(ctypes.byref(args), stream)
    if status == 0:
        return
    if status > 0:
        raise RuntimeError(f"kvwarp: {op}: CUDA error {status}: {describe(status)}")
    field, _, why = describe(status).partition(": ")
    raise Error(field, f"{why} ({op})", status)


def devices():
    """Usable CUDA devices."""
    count = ctypes.c_int32()
    library.kvw_device_count(ctypes.byref(count))
    return count.value


def slab_bytes(format, head_dim, group=32, meta=0):
    """Bytes of a slab, 64 tokens of one kv head."""
    size = library.kvw_slab_bytes(format, head_dim, group, meta)
    if size == 0:
        raise Error("head_dim", f"no slab of format {format}, head_dim {head_dim}, group {group}, meta {meta}")
    return size


def ring_slabs(window):
    """Ring slabs that a window needs."""
    return library.kvw_ring_slabs(window)
