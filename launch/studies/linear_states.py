"""What the study of universality (arXiv 2307.11888) is made of: states of linear recurrences as an LRU draws them, inputs to
put into them, and maps of sequences to learn from them.

Shapes: B sequences, L inputs of each, N modes, F real numbers of a state (2 N of complex modes, N of real ones), P dimensions
that inputs vary in, O outputs.
"""

import functools
import math

import numpy as np

FLOAT32 = 1e-7  # directions of a state that are weaker than this, of the strongest, are rounding errors
TARGETS = ("FIR", "Volterra", "Van der Pol")


def eigenvalues(seed: int, modes: int, ring: tuple[float, float], real: bool):
    """lambda (N), complex64 as an LRU draws it, or float32 of the same moduli and random signs; and gamma (N)."""
    import jax

    return drawer()(jax.random.key(seed), modes, ring, real)


@functools.cache
def drawer():
    import jax
    import jax.numpy as jnp

    from models import lru

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def draw(key, modes: int, ring: tuple[float, float], real: bool):
        moduli, phases = jax.random.split(key)
        modulus = jnp.exp(-jnp.exp(lru.ring(*ring)(moduli, (modes,))))
        gamma = jnp.exp(lru.gammas(*ring)(moduli, (modes,)))
        if real:
            return jnp.where(jax.random.bernoulli(phases, 0.5, (modes,)), modulus, -modulus), gamma
        phase = jnp.exp(lru.phases(2 * jnp.pi)(phases, (modes,)))
        return jax.lax.complex(modulus * jnp.cos(phase), modulus * jnp.sin(phase)), gamma

    return draw


def states(eigenvalue, gamma, inputs: np.ndarray) -> np.ndarray:
    """The states (B L F), float32, of x_k = lambda x_{k-1} + gamma u_k after each of the inputs u (B L), by the LRU's scan."""
    return np.asarray(scanner()(eigenvalue, gamma, np.asarray(inputs, np.float32)))


@functools.cache
def scanner():
    import jax
    import jax.numpy as jnp

    from models.scan import linear_scan

    @jax.jit
    def scan(a, gamma, u):
        x = (u[:, :, None] * gamma[None, None]).astype(a.dtype)
        h, _ = linear_scan(jnp.broadcast_to(a[None, None], x.shape), x)
        return jnp.concatenate([h.real, h.imag], axis=-1) if jnp.iscomplexobj(h) else h

    return scan


def vandermonde(eigenvalue, gamma, length: int) -> np.ndarray:
    """V (F L) in float64: the state after u (L) is V u, with gamma lambda**(L-1-j) in column j."""
    nodes, scale = np.asarray(eigenvalue).astype(np.complex128), np.asarray(gamma).astype(np.float64)
    v = scale[:, None] * nodes[:, None] ** np.arange(length - 1, -1, -1)
    return np.concatenate([v.real, v.imag]) if np.iscomplexobj(eigenvalue) else v.real


def fourier(seed: int, dimensions: int, length: int) -> np.ndarray:
    """Psi (L P) with orthonormal columns: cosine and sine of P / 2 frequencies, drawn of the first P."""
    frequencies = 1 + np.random.default_rng(seed).choice(dimensions, dimensions // 2, replace=False)
    angles = 2 * np.pi * np.outer(np.arange(length), frequencies) / length
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * math.sqrt(2 / length)


def recovered(seed: int, psi: np.ndarray, modes: int, ring: tuple[float, float], real: bool) -> tuple[float, float]:
    """Relative RMS error of inputs psi alpha, of Gaussian alpha (P), decoded from the last state; and V psi's condition.

    The decoder knows psi (L P): it solves V psi alpha = x for the least alpha.
    """
    eigenvalue, gamma = eigenvalues(seed, modes, ring, real)
    inputs = np.random.default_rng(seed).normal(size=(64, psi.shape[1])) @ psi.T
    last = states(eigenvalue, gamma, inputs)[:, -1].astype(np.float64)
    map_ = vandermonde(eigenvalue, gamma, len(psi)) @ psi
    found = np.linalg.lstsq(map_, last.T, rcond=FLOAT32)[0].T @ psi.T
    return float(np.linalg.norm(found - inputs) / np.linalg.norm(inputs)), float(np.linalg.cond(map_))


def unreachable(numbers: int, dimensions: int) -> float:
    """The RMS error that F numbers leave of Gaussian inputs in P dimensions: F of them are known, P - F are not."""
    return math.sqrt(max(1 - numbers / dimensions, 0))


def fir(inputs: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """y_k = sum_j taps_j u_{k-j} of u (B L); inputs before the first are 0."""
    return sum(tap * delayed(inputs, lag) for lag, tap in enumerate(taps))


def volterra(inputs: np.ndarray) -> np.ndarray:
    """y_k = u_{k-3} u_{k-7} of u (B L)."""
    return delayed(inputs, 3) * delayed(inputs, 7)


def delayed(inputs: np.ndarray, lag: int) -> np.ndarray:
    return np.pad(inputs, ((0, 0), (lag, 0)))[:, : inputs.shape[1]]


def van_der_pol(inputs: np.ndarray, dt: float = 0.1) -> np.ndarray:
    """(q, p) (B L 2) after each step of q' = p, p' = (1 - q**2) p - q + u from rest, u (B L) held for dt: RK4."""

    def slope(z, u):
        q, p = z[:, 0], z[:, 1]
        return np.stack([p, (1 - q**2) * p - q + u], axis=1)

    z, all_ = np.zeros((len(inputs), 2)), []
    for u in inputs.T:
        a = slope(z, u)
        b = slope(z + dt / 2 * a, u)
        c = slope(z + dt / 2 * b, u)
        d = slope(z + dt * c, u)
        z = z + dt / 6 * (a + 2 * b + 2 * c + d)
        all_.append(z)
    return np.stack(all_, axis=1)


def wanted(target: str, inputs: np.ndarray, seed: int) -> np.ndarray:
    """Outputs (B L O) of one of TARGETS; the taps of the FIR filter are drawn."""
    if target == "Van der Pol":
        return van_der_pol(inputs)
    taps = np.random.default_rng(seed).normal(size=8)
    return (fir(inputs, taps) if target == "FIR" else volterra(inputs))[:, :, None]
