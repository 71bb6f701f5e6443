"""Throughput and memory, each beside its measured bound."""
