"""What the certificate of `python -m fastafd.verify` consists of: distances, limits, and a look at each kernel."""
