"""Measurements behind the figures of the README. Each prints a table and writes JSON."""
