"""The parts of a spec that choose tokens, as the program reads them (engine/src/policy): methods, representatives, budgets."""
from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import Error

# Options that a method takes, and those it has where none is given.
METHODS = {
    "lagkv": (("lag", "sink"), {"sink": 16}),
    "lagkv-kvpress": (("lag", "sink"), {"sink": 4}),
    "snapkv": (("window", "pool", "max"), {"window": 64, "pool": 5}),
    "fastkv": (("window", "pool", "max"), {"window": 8, "pool": 7, "max": 1}),
    "h2o": ((), {}),
    "keynorm": ((), {}),
    "streaming": (("sink",), {"sink": 4}),
    "random": (("seed",), {}),
}
_AGAIN = "has the model say the text again, which a cache cannot ask for"
_REFUSED = {"kvzip": _AGAIN, "kvzip-head": _AGAIN}
_OPTIONS = {
    "lag": ("multiples of 16 from 16 to 1024", lambda n: 16 <= n <= 1024 and n % 16 == 0),
    "sink": ("0 to 4096", lambda n: n <= 4096),
    "window": ("1 to 1024", lambda n: 1 <= n <= 1024),
    "pool": ("odd numbers from 1 to 63", lambda n: n <= 63 and n % 2 == 1),
    "max": ("on or off", lambda n: n <= 1),
    "seed": ("0 to 65535", lambda n: n <= 65535),
}
ANCHORS = ("mean", "random", "alternate", "zeros", "ones")
BUDGETS = ("uniform", "pyramid", "dynamickv", "prefixkv")
WHOLE = 10_000  # a share of everything


def share(part, text, accepts):
    """A share of 0 to 1, in ten-thousandths: exact."""
    if not re.fullmatch(r"0(\.\d{0,4})?|1(\.0{0,4})?", text):
        raise Error(part, f"{text!r}; supported: {accepts}, a share of 0 to 1 with at most four decimals")
    whole, _, decimals = text.partition(".")
    return int(whole + decimals.ljust(4, "0"))


@dataclass(frozen=True)
class Evict:
    """A method that keeps the share `keep` / 10,000 of tokens, and its numbers."""

    method: str
    keep: int
    lag: int = 128
    sink: int = 0
    window: int = 0
    pool: int = 1
    max: int = 0
    seed: int = 0

    def of(self, n):
        """Tokens kept of `n`."""
        return n * self.keep // WHOLE

    def protects(self, n):
        """Oldest and newest of `n` tokens read that always stay."""
        newest = {"snapkv": self.window, "fastkv": self.window, "h2o": self.of(n) // 2}.get(self.method, 0)
        if self.method == "lagkv-kvpress":
            rest = max(0, n - self.sink)
            newest = 0 if rest < 2 * self.lag else self.lag + rest % self.lag
        return min(n, self.sink), min(n, newest)

    @property
    def rows(self):
        """Newest tokens whose attention counts; `None`: of all."""
        return None if self.method == "h2o" else self.window

    @classmethod
    def parse(cls, text):
        method, *words = text.split(":")
        if method in _REFUSED:
            raise Error("evict", f"{method!r} {_REFUSED[method]}; supported: {', '.join(METHODS)}")
        if method not in METHODS:
            raise Error("evict", f"{method!r}; supported: {', '.join(METHODS)}")
        takes, options = METHODS[method]
        keep, given = share("evict", words[0] if words else "", f"{method}:SHARE"), {}
        for word in words[1:]:
            name, _, value = word.partition("=")
            if name not in takes or name in given:
                raise Error("evict", f"{word!r}; options of {method}, once each: {', '.join(takes) or 'none'}")
            accepts, holds = _OPTIONS[name]
            value = {"on": "1", "off": "0"}.get(value, value) if name == "max" else value
            if not re.fullmatch(r"[0-9]+", value) or not holds(int(value)):
                raise Error("evict", f"{word!r}; supported: {accepts}")
            given[name] = int(value)
        return cls(method, keep, **{**options, **given})


@dataclass(frozen=True)
class Refine:
    """KVCrush: the share `share` / 10,000 of what a head keeps stands for the rest."""

    share: int
    anchor: str = "mean"

    @classmethod
    def parse(cls, text):
        method, *words = text.split(":")
        accepts = f"kvcrush:SHARE[:{'|'.join(ANCHORS)}]"
        if method != "kvcrush" or not words or words[1:] and words[1] not in ANCHORS or len(words) > 2:
            raise Error("refine", f"{text!r}; supported: {accepts}")
        return cls(share("refine", words[0], accepts), *words[1:])


def budget(text):
    """How many each head keeps."""
    if text not in BUDGETS:
        why = "'global', heads of a KvwarpCache's layer hold as many tokens as each other" if text == "global" else repr(text)
        raise Error("budget", f"{why}; supported: {', '.join(BUDGETS)}")
    return text


def check(evict, refine, budget):
    """What these parts demand of each other."""
    for part, given in (("refine", refine), ("budget", budget)):
        if given is None:
            continue
        if evict is None:
            raise Error(part, "has no effect without evict")
        if evict.method == "lagkv":
            raise Error(part, "lagkv chooses within partitions; it goes with the other methods, such as lagkv-kvpress")
