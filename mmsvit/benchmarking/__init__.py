"""Measuring the time and memory of SViT and of its peers; the program is ``tools/benchmark.py``.

``candidates`` says what can be measured, ``workloads`` what one run of it is,
``measure`` takes the times in turns, ``memory`` the peaks, ``environment`` says
on what, and ``report`` makes tables, files and plots of the results.
"""
