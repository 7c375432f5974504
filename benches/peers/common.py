"""What every peer's driver shares: shapes, bytes, cold caches, times from CUDA events, rows of the CSV.

The method is that of the Rust benches: random data, copies in turn so that L2 is cold, a graph of 32 layers
replayed, and single launches after a long read; the median of three interleaved rounds.
"""
import math
import statistics
from dataclasses import dataclass

COLUMNS = (
    "family,format,shape,context,batch,queries,variant,mode,us,us_p10,us_p90,bytes,operations,"
    "copy_gbps,samples,gbps,copy_percent,bits"
)
LAYERS, LARGE_LAYERS, LARGE_BYTES = 32, 4, 1 << 30
BATCH, PLUG_BYTES, ROUNDS = 16, 512 << 20, 3


@dataclass(frozen=True)
class Shape:
    """Decode attention of `batch` sequences that hold `context` tokens, or a prefill of `context` queries."""

    context: int
    batch: int
    queries: int = 1
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def name(self):
        return f"{self.q_heads}x{self.kv_heads}d{self.head_dim}"

    @property
    def family(self):
        return "paged_attn" if self.queries == 1 else "prefill_attn"

    def elements(self):
        """Of K and V together."""
        return 2 * self.batch * self.kv_heads * self.context * self.head_dim

    def cache_bytes(self, bits):
        return math.ceil(self.elements() * bits / 8)

    def bytes(self, bits):
        """What must move: the cache at `bits` an element, q and out in 16 bits."""
        q = self.batch * self.q_heads * self.queries * self.head_dim
        return self.cache_bytes(bits) + 2 * 2 * q

    def operations(self):
        """Multiplications and additions of a causal prefill; 0 for decode, which bytes limit."""
        if self.queries == 1:
            return 0
        seen = self.queries * (self.context - self.queries + (self.queries + 1) / 2)
        return 4 * self.batch * seen * self.q_heads * self.head_dim


# Context and batch, those of the figures first.
DECODE = [Shape(n, b) for n, b in [(32768, 16), (4096, 1), (4096, 16), (4096, 64), (32768, 1), (131072, 1),
                                   (32768, 64), (131072, 16)]]
PREFILL = [Shape(n, 1, n) for n in (8192, 32768)]


def copies(size, l2_bytes, free_bytes):
    """How many caches of `size` bytes go round: 250 MB and three times L2 at least, as far as memory goes."""
    wanted = math.ceil(max(250 << 20, 3 * l2_bytes) / size)
    return max(1, min(wanted, 512, int(free_bytes * 0.8) // size))


def percentiles(times):
    """Median, 10th and 90th percentile, as the Rust benches take them."""
    times = sorted(times)
    return tuple(times[math.floor((len(times) - 1) * q + 0.5)] for q in (0.5, 0.1, 0.9))


def row(shape, kernel, mode, times, bits, copy_gbps):
    us, p10, p90 = percentiles(times)
    size = shape.bytes(bits)
    gbps = size / us * 1e-3
    effective = 8 * size / shape.elements() if shape.queries == 1 else math.nan
    values = [shape.family, kernel, shape.name, shape.context, shape.batch, shape.queries, "", mode, f"{us:.3f}",
              f"{p10:.3f}", f"{p90:.3f}", size, f"{shape.operations():.0f}", f"{copy_gbps:.1f}", len(times),
              f"{gbps:.1f}", f"{100 * gbps / copy_gbps:.1f}", f"{effective:.3f}"]
    return ",".join(str(v) for v in values)


class Skip(Exception):
    """A peer that cannot run here, and why."""


class Card:
    """The first GPU: copies of inputs, times, the bandwidth of a copy."""

    def __init__(self, torch):
        if not torch.cuda.is_available():
            raise Skip("no CUDA device")
        self.torch = torch
        self.l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.plug = torch.ones(PLUG_BYTES // 2, dtype=torch.float16, device="cuda")
        self.copy_gbps = self.copy_bandwidth()

    def free(self):
        self.torch.cuda.empty_cache()
        return self.torch.cuda.mem_get_info()[0]

    def times(self, count, enqueue):
        """Microseconds of each of `count` pieces of work, on a card that does not wait for the host."""
        torch, times = self.torch, []
        while len(times) < count:
            self.plug.sum()
            enqueue(0)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(min(BATCH, count - len(times)) + 1)]
            events[0].record()
            for i, event in enumerate(events[1:]):
                enqueue(len(times) + 1 + i)
                event.record()
            torch.cuda.synchronize()
            times += [a.elapsed_time(b) * 1e3 for a, b in zip(events, events[1:])]
        return times

    def copy_bandwidth(self):
        source = self.torch.empty(1 << 30, dtype=self.torch.uint8, device="cuda").random_()
        target = self.torch.empty_like(source)
        return 2 * (1 << 30) / statistics.median(self.times(16, lambda _: target.copy_(source))) * 1e-3

    def graphs(self, launches, layers):
        """Graphs of `layers` launches each, going round all of them."""
        torch, graphs = self.torch, []
        for first in range(0, len(launches), layers):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(layers):
                    launches[(first + i) % len(launches)]()
            graphs.append(graph)
        return graphs

    def measure(self, shape, bits, launches):
        """Times by mode. `launches`: one a copy of the inputs."""
        self.torch.cuda.synchronize()
        for launch in launches[:3]:
            launch()
        self.torch.cuda.synchronize()
        count = 8 if shape.bytes(bits) > LARGE_BYTES or shape.queries > 1 else 48
        out = {"alone": self.times(count, lambda i: launches[i % len(launches)]())}
        if shape.queries == 1:
            layers = LARGE_LAYERS if shape.bytes(bits) > LARGE_BYTES else LAYERS
            graphs = self.graphs(launches, layers)
            replays = self.times(max(4, count // 4), lambda i: graphs[i % len(graphs)].replay())
            out["graph"] = [us / layers for us in replays]
        return out
