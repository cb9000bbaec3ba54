"""TEMPORARY: the new guard's interface on the landed one."""
import time
from contextlib import contextmanager
import torch
from ..guard import CapabilityGuard as Landed

class CapabilityGuard(Landed):
    def __init__(self, model, *a, every=8, **kw):
        self.every, self.n = every, 0
        super().__init__(model, *a, **kw)

    def protect(self, name, batches, path=None):
        rec = self._new_recorder(name); rec.begin()
        t = time.perf_counter()
        with torch.no_grad():
            for b in batches:
                with rec.observing(): self._module(**b)
        rec.steps = 1; b = rec.finish(self._locals()); rec.end()
        self.observed = getattr(self, "observed", set()) | {name}
        self.add(b)
        self.seconds["record"] += time.perf_counter() - t

    def _start_here(self):
        self.n = 0
        super()._start_here()

    @torch.no_grad()
    def confine_(self):
        self._confine(self._own())

    def _confine(self, own):
        t = time.perf_counter()
        st, P = self._stack, self._locals()
        if not len(st): return
        q = st.project(P); fr = st.frame(own); act = st.active(own)
        if self.rule == "remove":
            st.edit_(P, fr.out(fr.into(torch.where(act, self._q_start - q, 0.0))))
        else:
            D = fr.into(torch.where(act, self._q_start - q, 0.0)); size = st.displacement * fr.reach
            lower, upper = self._params.lower, self._params.upper
            kept = torch.minimum(torch.maximum(D, -lower * size), upper * size)
            st.edit_(P, fr.out(D - kept))
        self.seconds["act"] += time.perf_counter() - t

    def _edit_update(self, own):
        self.n += 1
        if self.n % self.every and self.n % 80: return
        self._confine(own)
