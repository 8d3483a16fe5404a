"""Objectives: the enumerated evidence bound, its terms, and what it is made of."""
