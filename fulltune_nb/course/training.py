"""The exercises about a step: the loss, AdamW, a schedule of the learning rate."""

from __future__ import annotations

import math

import numpy as np

from fulltune_nb.course.exercise import Exercise, Mistake


def _logits(seed: int, places: int, words: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    counted = rng.random(places) < 0.6
    counted[:2] = True, False
    return rng.normal(size=(places, words)).astype(np.float32) * np.float32(scale), rng.integers(words, size=places), counted


# ---- 01.loss


def _losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p of each place's target, (T,)."""
    logits = logits.astype(np.float64)
    highest = logits.max(axis=-1, keepdims=True)
    log_sums = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[:, 0]
    return log_sums - logits[np.arange(len(targets)), targets]


def _loss(logits, targets, counted):
    return _losses(logits, targets)[counted].mean()


def _unstable(logits, targets, counted):
    p = np.exp(logits)[np.arange(len(targets)), targets] / np.exp(logits).sum(axis=-1)
    return -np.log(p)[counted].mean()


LOSS = Exercise(
    name="01.loss",
    asks="The loss of a row: the mean of -log p of the token that came, over the places that count, in nats.",
    arguments={
        "logits": "(T, V) float32, a place's scores of all tokens of the vocabulary",
        "targets": "(T,) whole numbers, the token that came at each place",
        "counted": "(T,) bool, the places that count",
    },
    results=["loss"],
    cases=[
        ("", dict(zip(("logits", "targets", "counted"), _logits(0, 6, 5), strict=True))),
        ("more places and words", dict(zip(("logits", "targets", "counted"), _logits(1, 40, 100), strict=True))),
        ("with logits of some hundreds", dict(zip(("logits", "targets", "counted"), _logits(2, 8, 12, 400.0), strict=True))),
    ],
    solution=_loss,
    mistakes=[
        Mistake(lambda logits, targets, counted: _losses(logits, targets).mean(), "Which places count? The mean is over those alone."),
        Mistake(lambda logits, targets, counted: _losses(logits, targets)[counted].sum(), "A sum grows with the row. A loss is a mean."),
        Mistake(lambda *given: _loss(*given) / math.log(2), "That is in bits. Nats come of the natural logarithm."),
        Mistake(lambda *given: -_loss(*given), "The logarithm of a probability is negative, and a loss is not."),
        Mistake(
            lambda logits, targets, counted: (_losses(logits, targets) * counted).mean(),
            "The places that do not count are 0 in your mean, and yet it is divided by their number too.",
        ),
        Mistake(_unstable, "exp of some hundreds is infinite. What does a softmax do when the same number is taken from all its logits?"),
    ],
    hint="log softmax: the logit of the target less the log of the sum of exp of all logits of its place.",
)

# ---- 03.adamw


def _adamw(w, g, m, v, step, rate, betas, eps, decay):
    b1, b2 = betas
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    corrected = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
    return w - rate * (corrected + decay * w), m, v


def _uncorrected(w, g, m, v, step, rate, betas, eps, decay):
    b1, b2 = betas
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    return w - rate * (m / (np.sqrt(v) + eps) + decay * w), m, v


def _counted_from_zero(w, g, m, v, step, rate, betas, eps, decay):
    b1, b2 = betas
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    return w - rate * ((m / (1 - b1 ** (step + 1))) / (np.sqrt(v / (1 - b2 ** (step + 1))) + eps) + decay * w), m, v


def _weights(seed: int, step: int, decay: float) -> dict:
    rng = np.random.default_rng(seed)
    w, g, m, v = (rng.normal(size=(3, 4)) for _ in range(4))
    first = step == 1
    state = {"m": np.zeros_like(m) if first else 0.1 * m, "v": np.zeros_like(v) if first else 0.01 * v**2}
    return {"weight": w, "gradient": g, **state, "step": step, "rate": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "decay": decay}


ADAMW = Exercise(
    name="03.adamw",
    asks="One step of AdamW on a weight matrix, with bias correction and decoupled decay.",
    arguments={
        "weight": "(R, C)",
        "gradient": "(R, C)",
        "m, v": "(R, C) each, the running means of the gradient and of its square before the step",
        "step": "the step's number, from 1",
        "rate": "the learning rate",
        "betas": "how much of each running mean stays",
        "eps": "what keeps a division by 0 off",
        "decay": "the weight decay",
    },
    results=["weight", "m", "v"],
    cases=[
        ("the first step", _weights(0, 1, 0.0)),
        ("a later step, with decay", _weights(1, 7, 0.1)),
        ("a late step, with decay", _weights(2, 400, 0.5)),
    ],
    solution=_adamw,
    mistakes=[
        Mistake(_uncorrected, "m and v begin at 0, so at first they are too small. By how much, after one step?"),
        Mistake(_counted_from_zero, "The first step has the number 1, so the bias correction takes the step as it is."),
        Mistake(
            lambda w, g, m, v, step, rate, betas, eps, decay: _adamw(w, g + decay * w, m, v, step, rate, betas, eps, 0.0),
            "Your decay is part of the gradient, so Adam divides it by the gradient's size. In AdamW it stands beside that.",
        ),
        Mistake(lambda *given: _adamw(*given[:-1], 0.0), "Where is the decay? Every weight is drawn to 0 by rate * decay * weight."),
        Mistake(
            lambda w, g, m, v, step, rate, betas, eps, decay: _adamw(w, g, m, v, step, rate, betas, eps, decay / rate),
            "The decay goes by the learning rate too: rate * decay * weight.",
        ),
    ],
    hint="First m and v take in the gradient; then both are divided by 1 - beta**step; then the weight moves, by the decay as well.",
)

# ---- 05.schedule


def _schedule(step, steps, warmup, peak):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def _all_steps(of_step):
    """A schedule for all steps at once, which is what the cases ask for."""
    return lambda steps, warmup, peak: np.array([of_step(step, steps, warmup, peak) for step in range(steps)])


def _changed(rise=None, fall=None):
    def of_step(step, steps, warmup, peak):
        own = rise if step < warmup else fall
        return own(step, steps, warmup, peak) if own else _schedule(step, steps, warmup, peak)

    return _all_steps(of_step)


SCHEDULE = Exercise(
    name="05.schedule",
    asks="The learning rates of a run: warm-up in equal stairs, the first of them above 0, then a cosine from the peak to 0 at its end.",
    arguments={
        "steps": "of the run",
        "warmup": "W, the steps of rising: step s of them, from 0, has peak * (s + 1) / (W + 1)",
        "peak": "the rate of step W, from which it falls",
    },
    results=["rates"],
    cases=[
        ("10 steps, no warm-up", {"steps": 10, "warmup": 0, "peak": 1.0}),
        ("100 steps, 10 of warm-up", {"steps": 100, "warmup": 10, "peak": 2e-3}),
        ("30 steps, 20 of warm-up", {"steps": 30, "warmup": 20, "peak": 0.5}),
    ],
    solution=_all_steps(_schedule),
    mistakes=[
        Mistake(_changed(rise=lambda s, n, w, p: p * s / w), "At a rate of 0 the first step moves nothing."),
        Mistake(_changed(rise=lambda s, n, w, p: p * (s + 1) / w), "Your warm-up is at the peak a step early: step W is the first there."),
        Mistake(_changed(fall=lambda s, n, w, p: p), "It rises and stays. Where does it fall?"),
        Mistake(
            _changed(fall=lambda s, n, w, p: p * 0.5 * (1 + math.cos(math.pi * s / n))),
            "The cosine begins where the warm-up ends: measure how far it is from there.",
        ),
        Mistake(_changed(fall=lambda s, n, w, p: p * (1 - (s - w) / (n - w))), "That is a straight line. A cosine is flat at both ends."),
    ],
    hint="Behind the warm-up let x go from 0 to 1; the rate is peak * (1 + cos(pi * x)) / 2.",
)
