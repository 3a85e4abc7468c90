"""Inference-time scaling: repeated sampling with a judge, on a budget, in a folder that survives being killed."""
