"""Checks of data sets: quick ones before every run, and a full inspection on demand."""
