"""Samplers that benchmarks/rollout.py compares, one worker process each: `python -m contenders.NAME`."""
