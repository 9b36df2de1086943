"""A differential equation of tensors, integrated by scipy."""

import numpy as np
import torch


def solve(velocity, state, t, s, tolerance):
    """d state/dt = velocity(state, t) by adaptive RK45: yields (t, state) from t to s.

    state: a tuple of tensors, and so are velocity's answers. tolerance: both relative
    and absolute. FloatingPointError where the solver gives up.
    """
    from scipy.integrate import RK45

    sizes = np.cumsum([part.numel() for part in state])[:-1]

    def pack(parts):
        arrays = [part.detach().cpu().double().numpy() for part in parts]
        return np.concatenate([array.ravel() for array in arrays])

    def unpack(flat):
        return tuple(torch.from_numpy(part).to(like.dtype).to(like.device).view_as(like)
                     for part, like in zip(np.split(flat, sizes), state, strict=True))

    def rhs(u, flat):
        u = np.clip(u, min(t, s), max(t, s))  # scipy 1.11 looks beyond the ends
        slope = pack(velocity(unpack(flat), float(u)))
        if not np.isfinite(slope).all():  # of which the solver would never tire
            raise FloatingPointError(f"the ODE solver stopped at t = {u:g}: nan or inf")
        return slope

    solver = RK45(rhs, t, pack(state), s, rtol=tolerance, atol=tolerance)
    yield t, state
    while solver.status == "running":
        failure = solver.step()
        yield solver.t, unpack(solver.y)
    if solver.status == "failed":
        reason = f"the ODE solver stopped at t = {solver.t:g}: {failure}"
        raise FloatingPointError(reason)
