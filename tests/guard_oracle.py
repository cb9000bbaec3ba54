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


def frame(S: np.ndarray, combine: str) -> tuple[np.ndarray, np.ndarray]:
    if combine == "symmetric":
        R = root_of_pinv(S, -0.5)
        return R, R
    present = np.diag((np.diag(S) > 0).astype(float))
    return (present, present) if combine == "sum" else (present, root_of_pinv(S, -1.0))


class Rule:
    """One rule on one coefficient row. ``step`` returns the edited g and remembers what the rule remembers."""

    def __init__(
        self, rule, A, h, combine="symmetric", aligned=1.0, conflict=0.0, lower=0.1, upper=0.1, z=3.0, beta=0.95
    ):
        self.rule, self.A, self.h, self.combine = rule, A, h, combine
        self.aligned, self.conflict, self.lower, self.upper, self.z, self.beta = (
            aligned,
            conflict,
            lower,
            upper,
            z,
            beta,
        )
        K = A.shape[0]
        self.history = np.zeros(K)  # sum of raw c per row
        self.mean, self.square, self.count = np.zeros(K), np.zeros(K), np.zeros(K)
        self.probe = np.zeros(K)

    def allowed(self, P, reach):
        if self.rule == "remove":
            return 0 * P
        if self.rule == "integrated":
            return np.array([p * (self.aligned if p > 0 else self.conflict) for p in P])
        size = self.h * reach
        return np.array([min(max(p, -self.lower * s), self.upper * s) for p, s in zip(P, size, strict=True)])

    def step(self, g: np.ndarray, active: np.ndarray) -> np.ndarray:
        A = self.A * active[:, None]
        S, c = A @ A.T, A @ g
        L, M = frame(S, self.combine)
        if self.rule in ("integrated", "bounded", "remove"):
            reach = np.sqrt(np.maximum(np.diag(L @ S @ L.T), 0))
            P_old = L @ (self.history * active)
            P_new = P_old + L @ c
            self.history = self.history + np.where(active, c, 0)
            want = self.allowed(P_new, reach) - self.allowed(P_old, reach)
            return g + A.T @ M @ (want - (P_new - P_old))
        K = len(c)
        sign = np.zeros(K)
        for i in range(K):
            if not active[i]:
                continue
            if self.rule == "instant":
                sign[i] = np.sign(c[i])
            elif self.rule == "significance":
                if self.count[i] >= round(1 / (1 - self.beta)):  # a sigma of fewer steps is noise itself
                    sigma = np.sqrt(self.square[i] / (1 - self.beta ** self.count[i]))
                    sign[i] = np.sign(c[i]) if abs(c[i]) > self.z * sigma else 0
            elif self.rule == "ema":
                sign[i] = np.sign(self.beta * self.mean[i] + (1 - self.beta) * c[i])
            else:
                sign[i] = np.sign(c[i] * self.probe[i])
            self.mean[i] = self.beta * self.mean[i] + (1 - self.beta) * c[i]
            self.square[i] = self.beta * self.square[i] + (1 - self.beta) * c[i] ** 2
            self.count[i] += 1
        w = np.where(sign > 0, self.aligned, np.where(sign < 0, self.conflict, 1.0))
        return g + A.T @ M @ ((w - 1) * (L @ c))
