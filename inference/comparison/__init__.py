"""Comparing guides: how good a proposal is, by measures that are the same for all."""
