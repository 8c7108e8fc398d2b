"""Measure the time and memory of SViT and of other backbones, for ``tools/benchmark.py``.

``candidates`` defines the models, ``workloads`` what one run is, ``measure`` takes the times in
turns, ``memory`` the peaks, ``environment`` describes the machine, and ``report`` makes tables,
files and plots.
"""
