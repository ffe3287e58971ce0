"""Which layers a placement adapts, as something a search can choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftscape.spaces.knobs import Value

if TYPE_CHECKING:
    import optuna

Layers = Literal["all"] | tuple[int, ...]
WORDS = ("all", "top", "bottom", "alternate", "bits")


@dataclass(frozen=True)
class LayerChoice:
    """One of several ways to choose among `layers` layers.

    `all`; `top` and `bottom` k, k a knob; `alternate`, every second layer counted from the top; `bits`, one bit a
    layer. A choice of every layer is `all`, whichever way it was made; no layer at all is an empty tuple.
    """

    words: tuple[str, ...]
    layers: int

    def suggest(self, trial: optuna.Trial, name: str) -> Layers:
        word = trial.suggest_categorical(name, list(self.words)) if len(self.words) > 1 else self.words[0]
        n = self.layers
        if word == "bits":
            chosen = tuple(i for i in range(n) if trial.suggest_categorical(f"{name}.{i}", [False, True]))
        elif word in ("top", "bottom"):
            k = trial.suggest_int(f"{name}.count", 1, n)
            chosen = tuple(range(n - k, n) if word == "top" else range(k))
        else:
            chosen = self._fixed(str(word))
        return "all" if len(chosen) == n else chosen

    def params(self, name: str, value: Layers) -> dict[str, Value]:
        """The inverse of `suggest`, by the first way that gives these layers. Raises ValueError if none does."""
        n = self.layers
        wanted = tuple(range(n)) if value == "all" else value
        for word in self.words:
            more: dict[str, Value] = {}
            if word == "bits":
                more = {f"{name}.{i}": i in wanted for i in range(n)}
            elif word in ("top", "bottom") and wanted:
                k = len(wanted)
                if wanted != tuple(range(n - k, n) if word == "top" else range(k)):
                    continue
                more = {f"{name}.count": k}
            elif word not in ("all", "alternate") or self._fixed(word) != wanted:
                continue
            return more | ({name: word} if len(self.words) > 1 else {})
        raise ValueError(f"{name}: {value!r} cannot be chosen by {', '.join(self.words)}")

    def ends(self) -> tuple[Layers, ...]:
        """The fewest and the most layers it can choose."""
        n = self.layers
        least: Layers = "all"
        if "alternate" in self.words:
            least = self._fixed("alternate")
        if {"top", "bits"} & set(self.words):
            least = (n - 1,)
        elif "bottom" in self.words:
            least = (0,)
        most: Layers = least if self.words == ("alternate",) else "all"
        return (least,) if least == most else (least, most)

    def count(self) -> float:
        """How many different choices of layers."""
        n = self.layers
        chosen = {tuple(range(n))} if "all" in self.words else set()
        if "bits" in self.words:
            return float(2**n)
        for k in range(1, n + 1):
            chosen |= {tuple(range(n - k, n))} if "top" in self.words else set()
            chosen |= {tuple(range(k))} if "bottom" in self.words else set()
        return len(chosen | ({self._fixed("alternate")} if "alternate" in self.words else set()))

    def _fixed(self, word: str) -> tuple[int, ...]:
        n = self.layers
        return tuple(range(n)) if word == "all" else tuple(i for i in range(n) if (n - 1 - i) % 2 == 0)
