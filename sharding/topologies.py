"""What chips can do. Dense bf16 peaks from the makers' data sheets, FLOP/s a device as jax counts devices."""

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of a jax device kind, or None where no honest figure exists (a CPU, an unknown chip)."""
    if device_kind in PEAK_FLOPS:
        return PEAK_FLOPS[device_kind]
    return next(
        (peak for kind, peak in PEAK_FLOPS.items() if kind.startswith("NVIDIA") and device_kind.startswith(kind)), None
    )
