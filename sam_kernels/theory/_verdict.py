"""The result of :func:`sam_kernels.theory.admissible`, and its words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["PROPERTIES", "Admissible", "Rates", "rates_of"]

# The five properties of a sequence x_k, from weak to strong: each holds where the next one does. arXiv 2401.08060, table 1.
PROPERTIES = {
    1: "lim inf ‖∇f(x_k)‖ = 0",
    2: "every accumulation point of x_k is stationary",
    3: "∇f(x_k) → 0",
    4: "f(x_k) → f(x̄) with ∇f(x̄) = 0",
    5: "x_k → x̄ with ∇f(x̄) = 0",
}


class Rates(NamedTuple):
    """Orders in k, as text, of the three distances from the limit x̄; upper bounds with constants that depend on f and the start.

    Attributes:
        values: of f(x_k) - f(x̄).
        gradients: of ‖∇f(x_k)‖.
        iterates: of ‖x_k - x̄‖.
    """

    values: str
    gradients: str
    iterates: str


@dataclass(frozen=True)
class Admissible:
    """What :func:`sam_kernels.theory.admissible` found out. ``print`` it: the text has a line for each of the five properties.

    Attributes:
        holds: whether the schedules meet every condition of a theorem of arXiv 2401.08060 for this method and class of functions. True
            exactly where ``violated`` and ``undecided`` are empty.
        properties: numbers of the five properties that follow for every function of the class, in ascending order; the paper's and the
            derived ones. Some follow where ``holds`` is False, because a weaker condition is enough for them.
        derived: those of ``properties`` that no theorem of the paper gives; the proofs are in docs/convergence.md.
        violated: conditions of the paper's theorem that the schedules do not meet, each with what to choose instead. A violated
            condition need not break anything: see ``properties`` and ``counterexample``.
        undecided: conditions that depend on L where L is not known.
        counterexample: a function of the class, and a start, for which none of the five properties holds; None: none is known. Properties
            that are not in ``properties`` are not known to follow where this is None.
        assumes: what is assumed of f and of the steps beside the schedules.
        rates: of convergence, for relative errors and a KL exponent where (5) follows; None elsewhere.
        question: the method, the schedules and the class of functions, in words.
    """

    holds: bool
    properties: tuple[int, ...]
    derived: tuple[int, ...]
    violated: tuple[str, ...]
    undecided: tuple[str, ...]
    counterexample: str | None
    assumes: tuple[str, ...]
    rates: Rates | None
    question: str

    def __str__(self) -> str:
        verdict = "the conditions hold" if self.holds else "the conditions are violated" if self.violated else "undecided"
        lines = [f"{self.question}: {verdict}"]
        lines += [f"  violated:  {each}" for each in self.violated]
        lines += [f"  undecided: {each}" for each in self.undecided]
        for number, words in PROPERTIES.items():
            if number in self.properties:
                status = "derived" if number in self.derived else "follows"
            else:
                status = "fails" if self.counterexample else "unknown"
            lines.append(f"  {status + ':':<10} ({number}) {words}")
        if self.counterexample:
            lines.append(f"  example:   {self.counterexample}")
        if self.rates:
            lines.append(
                f"  rates:     f(x_k) - f(x̄) = {self.rates.values}, ‖∇f(x_k)‖ = {self.rates.gradients}, ‖x_k - x̄‖ = {self.rates.iterates}"
            )
        lines += [f"  assumes:   {each}" for each in self.assumes]
        return "\n".join(lines)


def rates_of(p: float, exponent: float) -> Rates:
    """Rates of a descent f(x⁺) ≤ f(x) - a t ‖∇f(x)‖² with t_k = c/k^p, p ≤ 1, where ‖∇f‖ ≥ M (f - f(x̄))^exponent. Derived.

    With r_k = f(x_k) - f(x̄): r_{k+1} ≤ r_k - a M² t_k r_k^{2 exponent}, so that r_k is O(exp(-a M² S_k)) for exponent ≤ 1/2 and
    O(S_k^{-1/(2 exponent - 1)}) above, S_k = t_1 + … + t_k. What is left of the path is O(r_k^{1 - exponent}), and ‖∇f(x)‖ ≤ L ‖x - x̄‖.
    """
    if exponent <= 0.5:  # a smooth function that is no constant has none below 1/2 around a minimiser
        order = "O(r^k), r < 1" if p == 0 else "O(k^-a), a > 0" if p == 1 else f"O(exp(-a k^{1 - p:g})), a > 0"
        return Rates(order, order, order)
    values, iterates = 1 / (2 * exponent - 1), (1 - exponent) / (2 * exponent - 1)
    orders = [f"O((ln k)^-{power:g})" if p == 1 else f"O(k^-{power * (1 - p):g})" for power in (values, iterates, iterates)]
    return Rates(*orders)
