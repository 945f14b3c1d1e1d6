"""Rows -> examples -> packed batches."""
