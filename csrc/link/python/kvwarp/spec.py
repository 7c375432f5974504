"""Cache specs, as the program reads them: `PRESET[,PART...]`, each part at most once."""
from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .errors import Error
from .ops import F16, FP8, Q2, Q4, Q8, TOKENS

_TOKENS_MOST = 1 << 20


@dataclass(frozen=True)
class Evict:
    """LagKV: of each `lag` tokens that are followed by as many, the share `keep` / 10,000; the first `sink` stay."""

    keep: int
    lag: int = 128
    sink: int = 16

    def of(self, n):
        """Tokens kept of `n`."""
        return n * self.keep // 10_000

    @classmethod
    def parse(cls, text):
        method, *words = text.split(":")
        if method != "lagkv":
            raise Error("evict", f"{method!r} needs the weights of attention or reads a prompt again; supported: lagkv")
        if not words or not re.fullmatch(r"0(\.\d{0,4})?|1(\.0{0,4})?", words[0]):
            raise Error("evict", f"{text!r}; supported: lagkv:SHARE, a share of 0 to 1 with at most four decimals")
        whole, _, decimals = words[0].partition(".")
        given = {}
        for word in words[1:]:
            name, _, value = word.partition("=")
            if name not in ("lag", "sink") or name in given or not re.fullmatch(r"[0-9]+", value):
                raise Error("evict", f"{word!r}; supported options, once each: lag=N, sink=N")
            given[name] = int(value)
        evict = cls(int(whole + decimals.ljust(4, "0")), **given)
        if evict.lag % 16 or not 16 <= evict.lag <= 1024:
            raise Error("evict", f"lag={evict.lag}; supported: multiples of 16 from 16 to 1024")
        if evict.sink > 4096:
            raise Error("evict", f"sink={evict.sink}; supported: 0 to 4096")
        return evict


@dataclass(frozen=True)
class Spec:
    """What a cache holds. Slabs that leave the `window` of newest tokens go to `format`, those of the first `sinks` tokens
    stay f16; `range` is the percent of a group's range that 2-bit codes span, `keep` the percent of the heads that a
    calibration leaves at 4 bits."""

    preset: str
    format: int
    window: int = 128
    sinks: int = 0
    group: int = 32
    meta: int = 0
    hadamard: bool = False
    range: int = 100
    keep: int = 0
    evict: Evict | None = None

    @classmethod
    def parse(cls, text):
        name, *words = text.strip().split(",")
        if name not in PRESETS:
            raise Error("preset", f"{name!r}; supported: {', '.join(PRESETS)}")
        spec, seen = PRESETS[name], set()
        for word in words:
            part, _, value = word.partition("=")
            if part in seen:
                raise Error(part, "given twice")
            spec = spec._with(part, value)
            seen.add(part)
        if spec.meta and (spec.format == Q8 or spec.group == 128):
            raise Error("meta", "u8 is for q4 and q2 with a group of 32 or 64")
        # LagKV looks at two partitions of f16 tokens at a time.
        return replace(spec, window=max(spec.window, 2 * spec.lag))

    def _with(self, part, value):
        if part == "evict":
            return replace(self, evict=Evict.parse(value))
        if part in _REFUSED:
            raise Error(part, _REFUSED[part])
        if part not in _PARTS:
            raise Error(part, f"not a part of a spec; supported: evict, {', '.join(_PARTS)}")
        if self.format == F16 or (self.format == FP8 and part not in ("window", "sinks")):
            raise Error(part, f"has no effect on {self.preset}")
        if self.format != Q2 and part in ("range", "keep"):
            raise Error(part, f"has no effect on {self.preset}: it is for codes of 2 bits")
        accepts, read = _PARTS[part]
        found = read(value)
        if found is None:
            raise Error(part, f"{value!r}; supported: {accepts}")
        return replace(self, **{part: found})

    @property
    def lag(self):
        """Tokens of a partition among which are dropped; 0 where none are."""
        return self.evict.lag if self.evict and self.evict.keep < 10_000 else 0

    @property
    def sink_slabs(self):
        return -(-self.sinks // TOKENS)


def _number(low, high):
    return lambda value: int(value) if re.fullmatch(r"[0-9]+", value) and low <= int(value) <= high else None


_PARTS = {
    "window": (f"0 to {_TOKENS_MOST} tokens", _number(0, _TOKENS_MOST)),
    "sinks": (f"0 to {_TOKENS_MOST} tokens", _number(0, _TOKENS_MOST)),
    "group": ("32, 64 or 128", {"32": 32, "64": 64, "128": 128}.get),
    "meta": ("f16 or u8", {"f16": 0, "u8": 1}.get),
    "hadamard": ("on or off", {"on": True, "off": False}.get),
    "range": ("50 to 100 percent", _number(50, 100)),
    "keep": ("0 to 100 percent", _number(0, 100)),
}
_REFUSED = {
    "kivi_exact": "KIVI's own boundaries are for parity tests; q2-kivi is its quantiser",
    "refine": "goes with methods that score all tokens of a prompt, of which a KvwarpCache has none",
    "budget": "goes with methods that score all tokens of a prompt, of which a KvwarpCache has none",
    "tsp": "changes which tokens later layers read, which a cache cannot",
}


def _low_error(preset, window):
    return Spec(preset, Q2, window, sinks=64, group=64, meta=1, hadamard=True, range=88, keep=2)


_ALL = (
    Spec("f16", F16, window=0),
    Spec("q8", Q8),
    Spec("fp8", FP8),
    Spec("q4", Q4, hadamard=True),
    _low_error("q2", 64),
    _low_error("q2-small", 0),
    Spec("q2-kivi", Q2),
)
PRESETS = {spec.preset: spec for spec in _ALL}
