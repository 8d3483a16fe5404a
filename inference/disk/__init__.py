"""Rows that stay on disk and are read while a step computes."""
