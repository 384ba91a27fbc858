"""Triton kernels and their launchers, one file per operator; they import torch and triton only.

The folder stands at the root of the repository but is installed as fastsft.triton_kernels: the name at top level
belongs to others, and whoever installs last would break the other.
"""

if __name__ != "fastsft.triton_kernels":
    raise ImportError(
        f"These kernels are installed as fastsft.triton_kernels, and were imported as {__name__!r}: "
        f"run from another directory, or `pip install -e .` and import fastsft."
    )
