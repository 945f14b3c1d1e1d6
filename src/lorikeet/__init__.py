"""Lorikeet: LoRA fine-tuning of small causal language models, with numbers to be trusted.

The Python API is `lorikeet.api`. This file imports nothing: the command line starts at once.
"""
