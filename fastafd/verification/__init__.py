"""The parts of the certificate of `python -m fastafd.verify`: distances, their limits, and a check of each kernel."""
