"""Latency and quality per step count: measuring, the report, and the pictures drawn from it."""
