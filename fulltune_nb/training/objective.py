"""What training minimizes: the settings of the loss that both engines read, whichever way they compute it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """Cross-entropy at the trained positions, and what is changed about it."""

    smoothing: float = 0.0
    """The share of a target's probability that is spread evenly over the vocabulary, the target included (Szegedy et al. 2016)."""

    @property
    def note(self) -> str | None:
        """What the user should hear about the losses that are told; None where they are those of an evaluation."""
        if self.smoothing:
            told = f"label_smoothing={self.smoothing:g}: the losses of steps are those of smoothed targets"
            return f"{told}, which a perfect model has above 0 too; evaluations have the plain cross-entropy"
        return None


PLAIN = Objective()
"""Cross-entropy, and nothing else."""
