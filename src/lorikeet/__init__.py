"""Lorikeet: LoRA fine-tuning of small causal language models, with numbers to be trusted."""
