"""Reporting: run folders read, then tables, figures and the page. It reads files alone and trains nothing."""
