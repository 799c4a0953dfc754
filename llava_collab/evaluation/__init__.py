"""Measuring any `Model` on any set of samples: metrics, record files, controls, baselines, tables.

`evaluate` writes `records.jsonl` and `run.json`; `report` computes every figure from these files again.
"""
