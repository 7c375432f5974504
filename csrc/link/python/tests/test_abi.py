"""The library by ctypes: versions, sizes, refusals that name the argument. Standard library alone."""
import ctypes
import os
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

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
        for op in ("paged_attn", "kv_pack", "prefill_attn", "kv_gather", "rms_norm", "rope_select", "sim_evict", "token_score",
                   "token_select"):
            with self.assertRaises(Error) as raised:
                abi.call(op, abi.params(op))
            self.assertNotEqual(raised.exception.argument, "struct_size", op)
            args = abi.params(op)
            args.struct_size += 8
            with self.assertRaises(Error) as raised:
                abi.call(op, args)
            self.assertEqual(raised.exception.argument, "struct_size", op)

    def test_another_version_is_refused_at_import(self):
        with tempfile.TemporaryDirectory() as tree:
            (Path(tree) / "include").mkdir()
            (Path(tree) / "lib").mkdir()
            (Path(tree) / "lib/libkvwarp.so.1").symlink_to(Path(abi.library._name).resolve())
            for version, header in ((99, abi._header.replace("KVW_ABI_VERSION 1", "KVW_ABI_VERSION 99")), (1, abi._header)):
                (Path(tree) / "include/kvwarp.h").write_text(header)
                environment = {**os.environ, "KVWARP_TREE": tree, "PYTHONPATH": str(Path(abi.__file__).parents[1])}
                done = subprocess.run([sys.executable, "-c", "import kvwarp"], env=environment, capture_output=True, text=True)
                self.assertEqual("VersionError: abi_version" in done.stderr, version == 99, done.stderr)

    def test_the_interpreter_goes_on_during_a_call(self):
        (args, *arrays), spans, ticks = rows(20000), [], []

        def work():
            for _ in range(50):
                begin = time.perf_counter()
                abi.call("rms_norm", args)
                spans.append((begin, time.perf_counter()))

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1000)  # only who lets go of the lock lets others run
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)
        sys.setswitchinterval(interval)
        self.assertTrue(any(begin < tick < end for tick in ticks for begin, end in spans))

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


def rows(tokens, width=64):
    """Params that normalise rows of threes, and the arrays that they point to, the last of them the output."""
    x, weight = aligned(ctypes.c_float, tokens * width), aligned(ctypes.c_float, width)
    out = aligned(ctypes.c_uint16, tokens * width)
    x[:], weight[:] = [3.0] * (tokens * width), [1.0] * width
    at = lambda array: ctypes.addressof(array)
    return abi.params("rms_norm", eps=1e-6, x=at(x), weight=at(weight), out=at(out), tokens=tokens, width=width), x, weight, out


def normalise():
    """1 where rows of threes do not become ones."""
    args, *_, out = rows(200)
    abi.call("rms_norm", args)
    return int(any(h != 0x3C00 for h in out))


if __name__ == "__main__":
    unittest.main()
