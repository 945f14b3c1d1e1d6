"""Lorikeet: LoRA fine-tuning of small causal language models, with numbers to be trusted.

The Python API is `lorikeet.api`; this file imports nothing, so that the command line starts at once.
"""
