"""The arithmetic of the drivers, worked by hand: python3 -m unittest test_peers. No GPU, no PyTorch."""
import contextlib
import io
import math
import unittest

import all as peers
from common import COLUMNS, DECODE, PREFILL, Shape, Skip, copies, percentiles, row


class Arithmetic(unittest.TestCase):
    def test_bytes_of_a_decode_step(self):
        shape = Shape(32768, 16)
        self.assertEqual(shape.elements(), 2 * 16 * 8 * 32768 * 128)
        self.assertEqual(shape.cache_bytes(16), 2_147_483_648)
        self.assertEqual(shape.bytes(16) - shape.cache_bytes(16), 2 * 2 * 16 * 32 * 128)
        self.assertEqual(shape.cache_bytes(3), 402_653_184)
        self.assertEqual(shape.operations(), 0)
        self.assertEqual((shape.name, shape.family), ("32x8d128", "paged_attn"))

    def test_operations_of_a_causal_prefill(self):
        # Three queries after one token see 2 + 3 + 4 tokens.
        shape = Shape(4, 1, 3, q_heads=2, kv_heads=1, head_dim=8)
        self.assertEqual(shape.operations(), 4 * 9 * 2 * 8)
        self.assertEqual(shape.family, "prefill_attn")

    def test_copies_keep_l2_cold_and_fit(self):
        self.assertEqual(copies(16 << 20, 50 << 20, 80 << 30), 16)  # 250 MB
        self.assertEqual(copies(16 << 20, 120 << 20, 80 << 30), 23)  # 360 MB
        self.assertEqual(copies(2 << 30, 50 << 20, 80 << 30), 1)
        self.assertEqual(copies(16 << 20, 50 << 20, 64 << 20), 3)  # what fits
        self.assertEqual(copies(1, 50 << 20, 80 << 30), 512)

    def test_percentiles(self):
        self.assertEqual(percentiles(range(10, -1, -1)), (5, 1, 9))
        self.assertEqual(percentiles([7.0]), (7.0, 7.0, 7.0))

    def test_rows_have_the_columns_of_the_rust_benches(self):
        shape = Shape(32768, 16)
        fields = row(shape, "sdpa_flash_f16", "graph", [2147.0, 2148.0, 2149.0], 16, 2000.0).split(",")
        named = dict(zip(COLUMNS.split(","), fields))
        self.assertEqual(len(fields), len(COLUMNS.split(",")))
        self.assertEqual((named["family"], named["batch"], named["samples"]), ("paged_attn", "16", "3"))
        self.assertAlmostEqual(float(named["gbps"]), shape.bytes(16) / 2148e3, delta=0.06)
        self.assertAlmostEqual(float(named["copy_percent"]), 50.0, delta=0.1)
        self.assertAlmostEqual(float(named["bits"]), 16.0, delta=0.01)
        prefill = row(PREFILL[0], "sdpa_cudnn_f16", "alone", [1000.0], 16, 2000.0)
        self.assertTrue(math.isnan(float(prefill.split(",")[-1])))


class Driver(unittest.TestCase):
    def test_what_is_absent_is_told_and_left_out(self):
        class Absent:
            NAME = "Absent"

            @staticmethod
            def cases():
                raise Skip("not installed")

        class Present:
            NAME = "Present"

            @staticmethod
            def cases():
                yield "b_f16", DECODE[1], 16, None
                yield "a_f16", DECODE[0], 16, None
                yield "c_f16", DECODE[1], 16, None

        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            cases = peers.gather([Absent, Present])
        self.assertEqual(said.getvalue(), "skipped: Absent: not installed\n")
        self.assertEqual([c[0] for c in cases], ["b_f16", "c_f16", "a_f16"])

    def test_a_case_that_fails_does_not_stop_the_others(self):
        class Cuda:
            @staticmethod
            def empty_cache():
                pass

        class Torch:
            cuda = Cuda

        class Card:
            torch, copy_gbps = Torch, 2000.0

            @staticmethod
            def measure(shape, bits, launches):
                return {"alone": [10.0 * launches]}

        def fails(card):
            raise RuntimeError("no kernel for this\nand more")

        cases = [("x_f16", DECODE[1], 16, fails), ("y_f16", DECODE[1], 16, lambda card: 2)]
        rows, said = [], io.StringIO()
        with contextlib.redirect_stdout(said):
            peers.run(Card, cases, math.inf, rows.append)
        self.assertEqual(said.getvalue(), "skipped: x_f16 at 4096 x 1: no kernel for this\n")
        self.assertEqual(len(rows), 1)
        self.assertTrue(rows[0].startswith("paged_attn,y_f16,32x8d128,4096,1,1,,alone,20.000,"), rows)


if __name__ == "__main__":
    unittest.main()
