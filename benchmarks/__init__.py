"""Measurements of the project, and the tables made of them."""
