"""Cache specs, as the program reads them: `PRESET[,PART...]`, each part at most once."""
from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .errors import Error
from .evict import WHOLE, Evict, Refine, budget, check
from .ops import F16, FP8, Q2, Q4, Q8, TOKENS

_TOKENS_MOST = 1 << 20


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
    refine: Refine | None = None
    budget: str | None = None

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
        check(spec.evict, spec.refine, spec.budget)
        # LagKV looks at two partitions of f16 tokens at a time.
        return replace(spec, window=max(spec.window, 2 * spec.lag))

    def _with(self, part, value):
        if part in _CHOOSES:
            return replace(self, **{part: _CHOOSES[part](value)})
        if part in _REFUSED:
            raise Error(part, _REFUSED[part])
        if part not in _PARTS:
            raise Error(part, f"not a part of a spec; supported: {', '.join([*_CHOOSES, *_PARTS])}")
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
    def selects(self):
        """Whether tokens that are read are dropped."""
        return self.evict is not None and self.evict.keep < WHOLE

    @property
    def waits(self):
        """Whether all layers are to be read before any of them is packed."""
        return self.selects and self.budget in ("dynamickv", "prefixkv")

    @property
    def lag(self):
        """LagKV's partition, where tokens are dropped also while decoding; 0 elsewhere."""
        return self.evict.lag if self.selects and self.evict.method == "lagkv" else 0

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
_CHOOSES = {"evict": Evict.parse, "refine": Refine.parse, "budget": budget}
_REFUSED = {
    "kivi_exact": "KIVI's own boundaries are for parity tests; q2-kivi is its quantiser",
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
