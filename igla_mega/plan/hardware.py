"""What the hardware can do, from its makers' data sheets. No torch."""

from pathlib import Path

# Dense tensor-core peaks, FLOP/s (no sparsity), of the SXM part where there are several.
_BF16_PEAK = {
    "A100": 312e12,  # NVIDIA A100 Tensor Core GPU data sheet, 2020
    "H100": 989e12,  # NVIDIA H100 Tensor Core GPU data sheet, 2022
    "H200": 989e12,  # NVIDIA H200 Tensor Core GPU data sheet, 2023
    "B200": 2250e12,  # NVIDIA Blackwell architecture brief, 2024
    "RTX 4090": 165.2e12,  # NVIDIA Ada GPU architecture white paper, 2022, with fp32 accumulation
}


def dense_peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak rate of a GPU by its name as CUDA gives it, or None when it is not in the table (or not for this dtype)."""
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in _BF16_PEAK.items() if name in device_name), None)


def num_local_gpus() -> int:
    """CUDA devices of this machine, without importing torch."""
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0
