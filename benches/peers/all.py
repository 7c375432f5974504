"""Every peer on the first GPU, in three interleaved rounds: python3 all.py --csv FILE [--seconds N] [--only NAME].

What is not installed, or does not run a shape, is told as `skipped: reason`.
"""
import argparse
import time

import bitdecoding
import flashinfer_decode
import kivi
import sdpa
from common import COLUMNS, ROUNDS, Card, Skip, row

PEERS = [sdpa, flashinfer_decode, kivi, bitdecoding]


def gather(peers):
    """Cases of those that are installed, ordered by shape so that rounds of a shape lie close together."""
    found, seen = [], []
    for peer in peers:
        try:
            found += list(peer.cases())
        except Skip as e:
            print(f"skipped: {peer.NAME}: {e}")
    for case in found:
        if case[1] not in seen:
            seen.append(case[1])
    return sorted(found, key=lambda case: seen.index(case[1]))


def run(card, cases, stop, write):
    """Three rounds over the cases of each shape; `write` gets a row when its shape is done."""
    torch = card.torch
    shapes = list(dict.fromkeys(shape for _, shape, _, _ in cases))
    for shape in shapes:
        here, times = [c for c in cases if c[1] == shape], {}
        for _ in range(ROUNDS):
            for kernel, _, bits, set_up in here:
                if time.monotonic() > stop or times.get(kernel) is None and kernel in times:
                    continue
                try:
                    modes = card.measure(shape, bits, set_up(card))
                except (Skip, RuntimeError, AttributeError, TypeError, ImportError) as e:
                    print(f"skipped: {kernel} at {shape.context} x {shape.batch}: {str(e).splitlines()[0]}")
                    times[kernel] = None
                    continue
                finally:
                    torch.cuda.empty_cache()
                for mode, us in modes.items():
                    times.setdefault(kernel, {}).setdefault(mode, []).extend(us)
        for kernel, _, bits, _ in here:
            for mode, us in (times.get(kernel) or {}).items():
                write(row(shape, kernel, mode, us, bits, card.copy_gbps))
    if time.monotonic() > stop:
        print("skipped: what was left: out of time")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--only", default="", help="part of a kernel's name")
    args = parser.parse_args()
    stop = time.monotonic() + args.seconds
    try:
        import torch
    except ImportError:
        return print("skipped: every peer: PyTorch is not installed")
    try:
        card = Card(torch)
    except Skip as e:
        return print(f"skipped: every peer: {e}")
    cases = [c for c in gather(PEERS) if args.only in c[0]]
    with open(args.csv, "w", encoding="utf-8") as csv:
        csv.write(f"# gpu={torch.cuda.get_device_name(0)}\n# torch={torch.__version__}\n{COLUMNS}\n")

        def write(line):
            print(line, flush=True)
            csv.write(line + "\n")
            csv.flush()

        run(card, cases, stop, write)


if __name__ == "__main__":
    main()
