"""Measurements behind the figures of docs/. Each prints a table and writes JSON."""
