"""The library by ctypes: versions, sizes, refusals that name the argument. Standard library alone."""
import ctypes
import os
import threading
import unittest

from kvwarp import abi
from kvwarp.errors import Error


class Abi(unittest.TestCase):
    def test_header_and_library_are_of_one_version(self):
        self.assertEqual(abi.library.kvw_abi_version(), abi.constants["KVW_ABI_VERSION"])

    def test_sizes_are_those_of_the_header(self):
        self.assertEqual(abi.slab_bytes(abi.constants["KVW_SLAB_Q2"], 128), 6144)
        self.assertEqual(abi.ring_slabs(64), 2)
        with self.assertRaisesRegex(Error, "head_dim"):
            abi.slab_bytes(0, 80)

    def test_structs_are_those_of_the_library(self):
        for op in ("paged_attn", "kv_pack", "prefill_attn", "kv_gather", "rms_norm", "rope_select", "sim_evict"):
            with self.assertRaises(Error) as raised:
                abi.call(op, abi.params(op))
            self.assertNotEqual(raised.exception.argument, "struct_size", op)
            args = abi.params(op)
            args.struct_size += 8
            with self.assertRaises(Error) as raised:
                abi.call(op, args)
            self.assertEqual(raised.exception.argument, "struct_size", op)

    def test_unknown_fields_are_refused(self):
        with self.assertRaisesRegex(Error, "q_head:"):
            abi.params("paged_attn", q_head=1)

    def test_rows_are_normalised_from_many_threads_and_after_a_fork(self):
        self.assertEqual(normalise(), 0)
        failures = []
        threads = [threading.Thread(target=lambda: failures.append(normalise())) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        self.assertEqual(sum(failures), 0)
        child = os.fork()
        if child == 0:
            os._exit(normalise())
        self.assertEqual(os.waitpid(child, 0)[1], 0)


def aligned(kind, count):
    """An array that starts at a multiple of 16."""
    room = ctypes.create_string_buffer(ctypes.sizeof(kind) * count + 16)
    return (kind * count).from_buffer(room, -ctypes.addressof(room) % 16)


def normalise(tokens=200, width=64):
    """1 where rows of threes do not become ones."""
    x, weight, out = aligned(ctypes.c_float, tokens * width), aligned(ctypes.c_float, width), aligned(ctypes.c_uint16, tokens * width)
    x[:], weight[:] = [3.0] * (tokens * width), [1.0] * width
    at = lambda array: ctypes.addressof(array)
    abi.call("rms_norm", abi.params("rms_norm", eps=1e-6, x=at(x), weight=at(weight), out=at(out), tokens=tokens, width=width))
    return int(any(h != 0x3C00 for h in out))


if __name__ == "__main__":
    unittest.main()
