"""Dense numpy float64 versions of the guard's rules on snapshots; imports nothing from the package.

Written from the definitions: g is the raw step in the gradient convention (theta_old - theta_proposed, or the gradient), rows A
in the same convention, S = A A^T, c = A g. Works on one coefficient row (one weight matrix, or all parameters) at a time.
"""

from __future__ import annotations

import numpy as np


def root_of_pinv(S: np.ndarray, power: float, rcond: float = 1e-4) -> np.ndarray:
    values, vectors = np.linalg.eigh(S)
    if values[-1] <= 0:
        return np.zeros_like(S)
    powered = np.array([v**power if v > rcond * values[-1] else 0.0 for v in values])
    return vectors @ np.diag(powered) @ vectors.T


class Rule:
    """One rule on one coefficient row. `step` returns the edited g and remembers what the rule remembers.

    "bounded" and "remove" of parameters are a projection: `net` is how far the parameters are from their anchors.
    """

    def __init__(self, rule, A, h, aligned=1.0, conflict=0.0, lower=0.1, upper=0.1):
        self.rule, self.A, self.h = rule, A, h
        self.aligned, self.conflict, self.lower, self.upper = aligned, conflict, lower, upper
        K = A.shape[0]
        self.history = np.zeros(K)  # sum of raw c per row
        self.net = np.zeros(K)
        self.probe = np.zeros(K)

    def weighted(self, P):
        return np.array([p * (self.aligned if p > 0 else self.conflict) for p in P])

    def step(self, g: np.ndarray, active: np.ndarray, of_gradients: bool = False) -> np.ndarray:
        A = self.A * active[:, None]
        S, c = A @ A.T, A @ g
        R = root_of_pinv(S, -0.5)
        if self.rule == "remove" and of_gradients:
            return g - A.T @ R @ R @ c
        if self.rule in ("bounded", "remove"):
            size = self.h * np.sqrt(np.maximum(np.diag(R @ S @ R), 0)) * (self.rule == "bounded")
            D = R @ (self.net * active + c)
            X = D - np.clip(D, -self.lower * size, self.upper * size)
            edited = g - A.T @ R @ X
            self.net = self.net + np.where(active, self.A @ edited, 0)
            return edited
        if self.rule == "integrated":
            P_old = R @ (self.history * active)
            P_new = P_old + R @ c
            self.history = self.history + np.where(active, c, 0)
            want = self.weighted(P_new) - self.weighted(P_old)
            return g + A.T @ R @ (want - (P_new - P_old))
        sign = np.sign(c) if self.rule == "instant" else np.sign(c * self.probe)
        w = np.where(sign > 0, self.aligned, np.where(sign < 0, self.conflict, 1.0))
        return g + A.T @ R @ ((w - 1) * (R @ c))
