"""The targets of the fuzzer, tests/fuzz.py."""
