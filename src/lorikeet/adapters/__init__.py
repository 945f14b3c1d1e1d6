"""Adapters on disk, in PEFT's folder format."""

from __future__ import annotations

from lorikeet.adapters.folder import load_adapter, save_adapter
from lorikeet.adapters.schema import AdapterInfo, read_adapter_config

__all__ = ["AdapterInfo", "load_adapter", "read_adapter_config", "save_adapter"]
